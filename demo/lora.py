"""What a LoRA adapter does to a model: the same prompt before and after, side by side, and the perplexity of a text.

    python3 demo/lora.py [PROMPT]        (make demo-lora)

demo/lora-treasure was trained on the first four fifths of Treasure Island; the text is the last fifth. Needs ./run, and for
export.py numpy and the like, which a virtual environment under build/ gets if this Python has none."""
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = {"without": [], "with lora-treasure": ["--lora", "demo/lora-treasure"]}  # title -> options of export.py
TEXT, PROMPT = "tests/text/treasure-eval.txt", "The captain looked at the sea and said"
WIDTH = 52


def python():
    """A Python that can run export.py."""
    needs = "numpy", "ml_dtypes", "safetensors", "sentencepiece", "google", "google.protobuf"  # a package before its parts
    if all(importlib.util.find_spec(name) for name in needs):
        return sys.executable
    sys.path.insert(0, os.path.join(ROOT, "tests"))
    import run_tests
    if not run_tests.make_venv():
        sys.exit("demo/lora.py: export.py needs its packages: pip install -r requirements.txt")
    return run_tests.PYTHON


def run(*arguments):
    """The standard output of a program in the root directory; its messages only if it fails."""
    done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr.strip()}")
    return done.stdout


def wrapped(text):
    """The text as lines of WIDTH characters, without empty ones."""
    return [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, WIDTH)]


def main():
    """Makes both models, lets them write, and prints."""
    prompt, interpreter = " ".join(sys.argv[1:]) or PROMPT, python()
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
    columns, perplexities = [], []
    for number, options in enumerate(MODELS.values()):
        model, result = f"build/demo-lora-{number}.bin", f"build/demo-lora-{number}.json"
        run(interpreter, "export.py", "demo/tiny-mistral", model, *options)
        run("./run", model, "-i", prompt, "-b", "3", "-n", "90", "-t", "0.7", "-q", "-o", result)
        with open(os.path.join(ROOT, result)) as file:
            columns.append([wrapped(sequence["text"]) for sequence in json.load(file)["sequences"]])
        perplexities.append(run("./run", model, "-m", "perplexity", "-f", TEXT, "-q").split()[1])

    print(f"{prompt} ...\n\n" + " | ".join(f"{title:{WIDTH}}" for title in MODELS))
    for texts in zip(*columns):
        print("-+-".join("-" * WIDTH for _ in texts))
        for i in range(max(map(len, texts))):
            print(" | ".join(f"{lines[i] if i < len(lines) else '':{WIDTH}}" for lines in texts))
    print(f"\nperplexity of {TEXT}: {perplexities[0]} without the adapter, {perplexities[1]} with it")


if __name__ == "__main__":
    main()
