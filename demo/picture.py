"""Draws demo/demo.svg, the picture in the README: some of the sequences that `make demo` writes, as a terminal shows them.

    python3 demo/picture.py [NUMBER ...]        the numbers of the sequences to show"""
import html
import os
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMAND = ["./run", "demo/tiny-mistral-q8.bin", "-i", "Once upon a time", "-b", "32", "-n", "200"]
WIDTH, LINES = 104, 5                   # columns; lines of a sequence that are shown
CELL, LEADING = 7.83, 17                # pixels of a character and of a line in 13 pixels of a monospaced font


def main():
    """Runs the demo and writes the picture."""
    done = subprocess.run(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=True)
    texts = [part.split("==\n", 1)[1].strip() for part in done.stdout.split("== ") if "==\n" in part]
    lines = [("prompt", "$ " + " ".join(f'"{w}"' if " " in w else w for w in COMMAND))]
    for number in map(int, sys.argv[1:] or ["8", "14", "16", "22"]):
        wrapped = [line for paragraph in texts[number - 1].split("\n") for line in textwrap.wrap(paragraph, WIDTH)]
        lines += [("head", f"== {number} ==")] + [("text", line) for line in wrapped[:LINES - 1]]
        lines += [("text", wrapped[LINES - 1] + " ..."), ("text", "")]
    lines += [("head", line) for line in done.stderr.strip().split("\n")]
    width, height = WIDTH * CELL + 90, (len(lines) + 2) * LEADING
    with open(os.path.join(ROOT, "demo", "demo.svg"), "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="Menlo, Consolas, monospace" font-size="13">\n'
                '<style>.prompt { fill: #9ece6a } .head { fill: #7aa2f7 } .text { fill: #d5d9e8 }</style>\n'
                f'<rect width="100%" height="100%" rx="8" fill="#1a1b26"/>\n')
        for i, (kind, line) in enumerate(lines):
            f.write(f'<text class="{kind}" x="16" y="{(i + 1.6) * LEADING:.0f}" xml:space="preserve">{html.escape(line)}</text>\n')
        f.write("</svg>\n")


if __name__ == "__main__":
    main()
