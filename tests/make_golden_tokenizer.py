"""Make golden/tokenizer.json.gz: strings, what SentencePiece encodes them to and what it decodes that to.

    python3 tests/make_golden_tokenizer.py

Needs sentencepiece; the test that reads the file needs the standard library only. The content, before gzip, is JSON:
    {"model": SHA-256 of demo/tiny-mistral/tokenizer.model, "sentencepiece": version,
     "cases": [[text, ids, decoded], ...]}      text and decoded are bytes in base64, decoded null where it equals text
"""
import base64
import gzip
import hashlib
import json
import os
import sys

import sentencepiece

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from tokenizer_strings import strings  # noqa: E402

MODEL = os.path.join(HERE, "..", "demo", "tiny-mistral", "tokenizer.model")
GOLDEN = os.path.join(HERE, "golden", "tokenizer.json.gz")


def main():
    sp = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    normal = [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
    cases = []
    for text in strings(1200, 1, normal):
        ids = sp.encode(text)
        decoded = sp.decode(ids).encode()
        cases.append([base64.b64encode(text).decode(), ids, None if decoded == text else base64.b64encode(decoded).decode()])
    with open(MODEL, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    data = json.dumps({"model": digest, "sentencepiece": sentencepiece.__version__, "cases": cases}, separators=(",", ":"))
    os.makedirs(os.path.dirname(GOLDEN), exist_ok=True)
    with open(GOLDEN + ".tmp", "wb") as f:
        f.write(gzip.compress(data.encode(), 9, mtime=0))
    os.replace(GOLDEN + ".tmp", GOLDEN)
    print(f"{GOLDEN}: {len(cases)} strings, {os.path.getsize(GOLDEN)} bytes")


if __name__ == "__main__":
    main()
