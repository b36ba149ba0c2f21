"""The table of what types of weights cost in quality (FIGURES.md): python3 bench/quality.py --calib text.txt [--model f32.bin]

Makes a checkpoint of each kind with ./quantize, measures perplexity and divergence (KL) from FP32 with ./run on the texts in
tests/text, and prints a table in Markdown; sizes are of whole files. Text that is judged must not be calibrated on. "plain" is what
papers on quantization call rounding to nearest, between a group's least and largest weight (but the zero need not be whole), where
./quantize searches for the best scale and zero. Needs `make`, and what export.py needs."""
import argparse
import os
import struct
import sys
import tempfile

import numpy as np

from measure import ROOT, execute, outcome, read_shape, run_json

sys.path.insert(0, ROOT)
from formats import pack_panels  # noqa: E402

FAIRY, TREASURE = (os.path.join(ROOT, "tests", "text", name) for name in ("heldout-fairy.txt", "treasure-eval.txt"))
SIZE = 3338560                              # bytes of the demo model as llama.cpp's Q4_K_S, which --bits may take too
PLAIN = "q4 -g 128, plain"
KINDS = ["f16", "q8 -g 32", "q8 -g 64", "q8 -g 128", "q4 -g 32", "q4 -g 64", "q4 -g 128", PLAIN, "nf4 -g 64", "nf4 -g 128",
         "q4 --awq", "q4 --gptq", "q4 --gptq --awq", "q4 --gptq --bits %.2f"]


def table(file):
    """The table of an open checkpoint (FORMAT.md): [(type, group, rows, cols, offset, size)]."""
    header = file.read(256)
    return list(struct.iter_unpack("<48xIIQQQQ8x", file.read(96 * struct.unpack_from("<I", header, 12)[0])))


def count_weights(path):
    """The weights of a checkpoint."""
    with open(path, "rb") as file:
        return sum(rows * cols for _, _, rows, cols, _, _ in table(file))


def make_plain(reference, path):
    """Gives the q4 checkpoint at `path` the codes of plain rounding to nearest: in each group of a row the least weight of the FP32
    checkpoint `reference` is code 0 and the largest is code 15. Raises a RuntimeError if it is not FP32, or a row not whole groups."""
    with open(reference, "rb") as source, open(path, "r+b") as made:
        for (_, _, rows, cols, at, size), (kind, group, _, _, to, to_size) in zip(table(source), table(made)):
            if kind != 4:
                continue
            if size != 4 * -(-rows // 32) * 32 * cols or cols % group:
                raise RuntimeError(f"{reference}: plain rounding is made of FP32 and rows of whole groups of {group} alone")
            source.seek(at)
            w = np.frombuffer(source.read(size), "<f4").reshape(-1, cols, 32).transpose(0, 2, 1).reshape(-1, cols // group, group)
            least, largest = w.min(2), w.max(2)
            scales = ((largest - least) / 15).astype(np.float16)
            step = np.where(scales > 0, scales, 1).astype(np.float32)
            zeros = (-least / step).astype(np.float16)
            codes = np.clip(np.rint(w / step[..., None] + zeros.astype(np.float32)[..., None]), 0, 15).astype(np.uint8)
            packed = pack_panels(codes.reshape(-1, cols), scales, zeros, "q4", group)
            assert len(packed) == to_size
            made.seek(to)
            made.write(packed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--calib", required=True, help="the text to calibrate with")
    parser.add_argument("--calib-tokens", default="65536", metavar="N", help="so many of its tokens (65536)")
    parser.add_argument("--model", help="an FP32 checkpoint (the demo model)")
    o = parser.parse_args()
    with open(o.calib, "rb"):
        pass                                # a wrong name is no surprise after minutes
    with tempfile.TemporaryDirectory() as directory:
        reference, made, both = o.model or os.path.join(directory, "f32.bin"), os.path.join(directory, "made.bin"), os.path.join(directory, "both.txt")
        if not o.model:
            execute([sys.executable, os.path.join(ROOT, "export.py"), os.path.join(ROOT, "demo", "tiny-mistral"), reference, "--dtype", "f32"])
        read_shape(reference)               # or it is no checkpoint
        with open(both, "wb") as out:
            for text in (FAIRY, TREASURE):
                with open(text, "rb") as f:
                    out.write(f.read())
        cases = [["-f", FAIRY], ["-f", TREASURE], ["-f", both, "-c", 128, "--skip", 64]]
        weights = count_weights(reference)
        judge = lambda model, case: run_json(os.path.join(ROOT, "run"), model, ["-m", "perplexity", "--against", reference, *case])[0]
        base = [judge(reference, case) for case in cases]
        print("| kind | bytes | bits a weight | fairy tales: perplexity | KL | Treasure Island: perplexity | KL | both, `-c 128 --skip 64`: perplexity | KL |")
        print("| --- " * 9 + "|")
        print("| f32 | | |" + "".join(" %.3f ± %.2f | 0 |" % (b["ppl"], b["ppl_error"]) for b in base))
        for kind in KINDS:
            kind = kind % (4.75 if o.model else int(800 * SIZE / weights) / 100) if "%" in kind else kind
            calibration = ["--calib", o.calib, "--calib-tokens", o.calib_tokens] if "tq" in kind or "awq" in kind else []
            execute([os.path.join(ROOT, "quantize"), reference, made, *kind.split(",")[0].split(), *calibration])
            if kind == PLAIN:
                try:
                    make_plain(reference, made)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    continue
            size = os.path.getsize(made)
            cells = ["`%s`" % kind, f"{size:,}", "%.2f" % (8 * size / weights)]
            for case, was in zip(cases, base):
                got = judge(made, case)
                cells += ["%.3f (%+.2f%%)" % (got["ppl"], 100 * (got["ppl"] / was["ppl"] - 1)), "%.5f ± %.5f" % (got["kl"], got["kl_error"])]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    outcome("quality.py", main)
