"""Multiple-choice items for `run -m score`, a line for each: context TAB choice TAB choice ... TAB index of the right choice.

    python3 bench/items.py fairy [OUT.tsv]                    makes bench/items.tsv from tests/text/heldout-fairy.txt
    python3 bench/items.py hellaswag IN.jsonl OUT.tsv         brings HellaSwag's validation set in that form
    python3 bench/items.py arc IN.jsonl OUT.tsv               likewise ARC (easy or challenge)

Indices begin at 0. A context ends, and a choice begins, without a space: one stands between them. The model's answer is
the choice that is most probable after the context (accuracy), or most probable for its length (normalised accuracy).

The items of `fairy` are sentences of fairy tales in the public domain, cut in the middle: which of four ends, the others being
ends of other sentences of the same text, belongs to this beginning? Random choice finds a quarter of them."""
import hashlib
import json
import os
import re
import sys

from measure import BENCH, ROOT, outcome

TEXT = os.path.join(ROOT, "tests", "text", "heldout-fairy.txt")
N_ITEMS, N_CHOICES, SEED = 100, 4, "mistral.c"
WORDS = range(14, 37)           # of a sentence that is used
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St)\.$")


def sentences(text):
    """The sentences of a text, each with the one before it in its paragraph or ""; quotations, which are cut badly, left out."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        parts, before = [], ""
        for part in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            parts = parts[:-1] + [f"{parts[-1]} {part}"] if parts and ABBREVIATION.search(parts[-1]) else parts + [part]
        for part in parts:
            if not re.search(r"[\"“”_\[\]*]|--$", part) and re.match(r"[A-Z]", part) and part[-1] in ".!?":
                found.append((before, part))
                before = part
            else:
                before = ""
    return found


def order(*key):
    """A number that looks random and is the same everywhere."""
    return hashlib.sha256("\0".join([SEED, *map(str, key)]).encode()).digest()


def fairy_items(text):
    """[(context, choices, answer)] of a text, N_ITEMS of them, always the same."""
    halves = []                 # (context, end) of every sentence of a fitting length
    for before, sentence in sentences(text):
        words = sentence.split()
        middle = len(words) // 2
        if len(words) in WORDS and re.match(r"[a-z]", words[middle]):
            halves.append((f"{before} {' '.join(words[:middle])}".strip(), " ".join(words[middle:])))
    items = []
    for context, end in sorted(halves, key=lambda half: order(half[0])):
        # wrong ends as long as the right one, give or take a fifth, so that length says nothing
        others = [other for _, other in halves if other != end and 0.8 < len(other) / len(end) < 1.25]
        wrong = sorted(set(others), key=lambda other: order(context, other))[:N_CHOICES - 1]
        if len(wrong) == N_CHOICES - 1:
            choices = sorted([end, *wrong], key=lambda choice: order("place", context, choice))
            items.append((context, choices, choices.index(end)))
    return items[:N_ITEMS]


def one_line(text):
    return " ".join(text.split())


def hellaswag_item(line):
    """An item of HellaSwag: {"activity_label", "ctx_a", "ctx_b", "endings", "label"}, cleaned as is usual for it."""
    def clean(text):
        return one_line(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")))
    context = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in line["endings"]], int(line["label"])


def arc_item(line):
    """An item of ARC: {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"} as AI2 has it, or {"question",
    "choices": {"text": [], "label": []}, "answerKey"} as the Hugging Face hub has it."""
    if isinstance(line["question"], dict):
        stem, choices = line["question"]["stem"], [(c["text"], c["label"]) for c in line["question"]["choices"]]
    else:
        stem, choices = line["question"], list(zip(line["choices"]["text"], line["choices"]["label"]))
    labels = [name for _, name in choices]
    return f"Question: {one_line(stem)} Answer:", [one_line(text) for text, _ in choices], labels.index(line["answerKey"])


def converted(path, convert):
    """The items of a file of JSON lines; raises a RuntimeError that names the line that is not one."""
    items = []
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            try:
                items += [convert(json.loads(line.encode("utf-8", "surrogateescape")))] if line.strip() else []
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise RuntimeError(f"{path}, line {number}: not an item: {type(error).__name__} {error}") from None
    return items


def write(items, path):
    """Writes items as lines; the file is whole or is not there."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines("\t".join([context, *choices, str(answer)]) + "\n" for context, choices, answer in items)
    os.replace(path + ".tmp", path)


def main():
    """The command line."""
    converters = {"hellaswag": hellaswag_item, "arc": arc_item}
    kind, *paths = sys.argv[1:] or [""]
    if kind == "fairy" and len(paths) <= 1:
        with open(TEXT, encoding="utf-8") as f:
            write(fairy_items(f.read()), *paths or [os.path.join(BENCH, "items.tsv")])
    elif kind in converters and len(paths) == 2:
        write(converted(paths[0], converters[kind]), paths[1])
    else:
        sys.stderr.write("usage: items.py fairy [OUT.tsv] | hellaswag IN.jsonl OUT.tsv | arc IN.jsonl OUT.tsv\n")
        return 2
    return 0


if __name__ == "__main__":
    outcome("items.py", main)
