"""The trained model against numbers that transformers and a float64 reference agree on (tests/golden/tiny-mistral.json)."""
import html
import json
import os
import re
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
GOLDEN = json.load(open(os.path.join(HERE, "golden", "tiny-mistral.json")))["tiny-mistral"]
EVALS = {name: os.path.join(HERE, "text", name + ".txt") for name in GOLDEN["eval"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of demo/tiny-mistral: {dtype: path} for f32, f16 (export.py) and q8, q4 (quantize, through a pipe)."""
    folder = tmp_path_factory.mktemp("models")
    paths = {dtype: str(folder / (dtype + ".bin")) for dtype in ("f32", "f16", "q8", "q4")}
    export = [sys.executable, os.path.join(ROOT, "export.py"), os.path.join(ROOT, "demo", "tiny-mistral")]
    for dtype in ("f32", "f16"):
        subprocess.run(export + [paths[dtype], "--dtype", dtype], check=True)
    for dtype, group in (("q8", "32"), ("q4", "32")):
        pipe = subprocess.Popen(export + ["-", "--dtype", "f32"], stdout=subprocess.PIPE)
        subprocess.run([os.path.join(ROOT, "quantize"), "-", paths[dtype], dtype, "-g", group], stdin=pipe.stdout, check=True)
        assert pipe.wait() == 0
    return paths


def run(*arguments):
    """Standard output of ./run with these arguments."""
    return subprocess.run([os.path.join(ROOT, "run"), *arguments], stdout=subprocess.PIPE, check=True).stdout.decode()


def perplexity(model, text, *options):
    """The fields of the perplexity line: {name: number}."""
    words = run(model, "-m", "perplexity", "-f", text, "-q", *options).replace("+- ", "").replace("%", "").split()
    assert words[0] == "ppl" and words[3] == "nll" and words[5] == "tokens" and words[7] == "ctx"
    fields = {"ppl": words[1], "nll": words[4], "tokens": words[6], "ctx": words[8]}
    if len(words) > 9:
        assert words[9] == "kl" and words[12] == "kl_p99" and words[14] == "same_top"
        fields.update(kl=words[10], kl_error=words[11], kl_p99=words[13], same_top=words[15])
    return {name: float(value) for name, value in fields.items()}


# f32: the golden numbers are float64's; f16: weights (BF16 in the source) lose next to nothing, keys and values 11 bits
@pytest.mark.parametrize("dtype,tolerance", [("f32", 2e-5), ("f16", 5e-4)])
@pytest.mark.parametrize("name", EVALS)
def test_perplexity(models, name, dtype, tolerance):
    golden, got = GOLDEN["eval"][name], perplexity(models[dtype], EVALS[name])
    assert got["tokens"] == golden["tokens"] and got["ctx"] == golden["ctx"]
    assert abs(got["nll"] - golden["nll"]) <= tolerance


@pytest.mark.parametrize("name", EVALS)
def test_perplexity_quantized(models, name):
    """q8 within 0.1% of f32. q4 by round to nearest in groups of 32 loses 2 to 3%, and must not lose more."""
    golden = GOLDEN["eval"][name]["ppl"]
    assert abs(perplexity(models["q8"], EVALS[name])["ppl"] / golden - 1) <= 1e-3
    assert 0.005 <= perplexity(models["q4"], EVALS[name])["ppl"] / golden - 1 <= 0.03


def test_demo_model(models):
    """The checkpoint in demo/ is what its recipe gives."""
    with open(models["q8"], "rb") as made, open(os.path.join(ROOT, "demo", "tiny-mistral-q8.bin"), "rb") as demo:
        assert made.read() == demo.read()


def test_against(models):
    same = perplexity(models["f32"], EVALS["heldout-fairy"], "--against", models["f32"])
    assert same["kl"] == 0 and same["same_top"] == 100
    q8 = perplexity(models["q8"], EVALS["heldout-fairy"], "--against", models["f32"])
    assert 1e-5 < q8["kl"] <= 5e-4 and q8["same_top"] > 98


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(models, tmp_path, batch):
    """240 tokens after each prompt, across the window of 128: every id."""
    for golden in GOLDEN["greedy"]:
        out = str(tmp_path / "out.json")
        run(models["f32"], "-i", golden["prompt"], "-n", str(len(golden["out_ids"])), "-t", "0", "-E", "-b", str(batch), "-q", "-o", out)
        for sequence in json.load(open(out))["sequences"]:
            assert sequence["prompt_ids"] == golden["prompt_ids"]
            assert sequence["ids"] == golden["out_ids"]


def test_picture_and_readme_are_of_this_code():
    """The texts in demo/demo.svg, the README's picture, and its line of perplexity are what run prints: the same bits everywhere."""
    demo = os.path.join(ROOT, "demo", "tiny-mistral-q8.bin")
    with open(os.path.join(ROOT, "demo", "demo.svg")) as f:
        shown = [html.unescape(line) for line in re.findall(r'<text class="text"[^>]*>([^<]*)</text>', f.read())]
    written = " ".join(run(demo, "-i", "Once upon a time", "-b", "32", "-n", "200", "-q").split())
    shown = [" ".join(line.removesuffix(" ...").split()) for line in shown if line]
    assert len(shown) > 10 and [line for line in shown if line not in written] == []
    with open(os.path.join(ROOT, "README.md")) as f:
        assert run(demo, "-m", "perplexity", "-f", EVALS["heldout-fairy"], "-q").strip() in f.read()
