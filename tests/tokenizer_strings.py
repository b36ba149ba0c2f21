"""Strings that tokenizers get wrong: the same for the same seed. Standard library only."""
import random

# Ordinary text: the beginning of Treasure Island (public domain) and a few lines of other kinds.
ENGLISH = """Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down the
whole particulars about Treasure Island, from the beginning to the end, keeping nothing back but the bearings
of the island, and that only because there is still treasure not yet lifted, I take up my pen in the year of
grace 17__ and go back to the time when my father kept the Admiral Benbow inn and the brown old seaman with the
sabre cut first took up his lodging under our roof.

"This is a handy cove," says he at length; "and a pleasant sittyated grog-shop. Much company, mate?"
\tfor (int i = 0; i < 1024; i++) { x[i] += 3.14159e-10f * y[i]; }   // don't: 50% of $1,234.56
See https://example.org/a_b?c=d&e=%20f#g -- or write to someone@example.org...  (2nd ed., pp. 12--34)
""".encode()

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0x0A>", "<0xFF>", "<0xG1>", "[INST]", "[/INST]", " [INST] ",
           "[TOOL_CALLS]", "[IMG]", "[control_8]", "[REFERENCE_DOC_3]", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_19]",
           "[REFERENCE_DOC_190]", "[REFERENCE_DOC_", "[REFERENCE_DOC_1[REFERENCE_DOC_2]", " [REFERENCE_DOC_0] ",
           "<<SYS>>", "<|im_start|>", "\u2581", "\u2047", " \u2047 "]

OTHERS = ["\u0301", "e\u0301", "a\u0300\u0301\u0302\u0303\u0304", "\u00e9", "\ufb01", "\u212b", "\u1100\u1161\u11a8", "\ud55c\uad6d\uc5b4",
          "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\U00020000\U0002a6d6", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627",
          "\u202eabc\u202c", "\u200e\u200f", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u041f\u0440\u0438\u0432\u0435\u0442", "\u0393\u03b5\u03b9\u03ac",
          "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7", "\u2764\ufe0f", "1\ufe0f\u20e3",
          "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\u0085", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "\U000e0041", "\ue000", "\U0001d54f"]

INVALID = [b"\x80", b"\xbf", b"\xc0", b"\xc0\x80", b"\xc1\xbf", b"\xc2", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xe2", b"\xe2\x96", b"\xe2\x96\xe2\x96\x81",
           b"\xe2\x28\xa1", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb8\x80", b"\xef\xbf", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xf0\x80\x80\x80",
           b"\xf0\x8f\xbf\xbf", b"\xf0\x9f\x41\x98", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xfe", b"\xff", b"\xff\xfe"]

SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "\u2581", "\u2581\u2581", "\v", "\f"]


def _fixed():
    """What is always there: the empty string, every byte alone, every entry of the tables alone and between letters, long runs."""
    yield b""
    for i in range(256):
        yield bytes([i])
    for s in SPECIAL + OTHERS + SPACES:
        yield s.encode()
        yield b"a" + s.encode() + b"b"
    for s in INVALID:
        yield s
        yield b" a" + s + b"b"
    for n in list(range(2, 20)) + [31, 32, 33, 64, 100]:
        yield b" " * n
        yield b" " * n + b"the"
        yield b"the" + b"\n" * n + b"end"
    # Runs of one letter: pairs that are equal everywhere, so that the order among equals shows.
    for s in ("a", "e", " ", "\n", "\u2581", "=", "-", "\u00e9", "\U0001f600", "ab", " a", "the "):
        yield s.encode() * 5000
        yield s.encode() * 37
    yield b"\xff" * 300
    yield bytes(range(256))
    yield bytes(range(255, -1, -1))


def _character(r):
    """A code point of any plane that is not a surrogate; small ones more often."""
    while True:
        c = r.randrange(r.choice([0x80, 0x250, 0x3000, 0x10000, 0x110000]))
        if not 0xd800 <= c <= 0xdfff:
            return chr(c).encode()


def _slice(r):
    i = r.randrange(len(ENGLISH))
    return ENGLISH[i:i + r.randrange(1, 120)]


def _mutated(r):
    s = bytearray(_slice(r))
    for _ in range(r.randrange(1, 6)):
        i = r.randrange(len(s) + 1)
        what = r.randrange(4)
        if what == 0:
            s[i:i + 1] = bytes([r.randrange(256)])
        elif what == 1:
            s[i:i] = _character(r)
        elif what == 2:
            del s[i:i + r.randrange(1, 4)]
        else:
            s[i:i] = r.choice(SPECIAL + OTHERS + SPACES).encode()
    return bytes(s)


def _mixture(r, pieces):
    """Entries of all tables, whole and cut, glued together."""
    out = b""
    for _ in range(r.randrange(1, 12)):
        s = r.choice([r.choice(SPECIAL).encode(), r.choice(OTHERS).encode(), r.choice(SPACES).encode(), r.choice(INVALID), _character(r),
                      bytes([r.randrange(32, 127)]), r.choice(pieces).encode()])
        out += s[:r.randrange(1, len(s) + 1)] if s and r.random() < 0.15 else s
    return out


def _random(r, pieces):
    kind = r.randrange(10)
    n = r.randrange(1, 24)
    if kind == 0:
        return _slice(r)
    if kind == 1:
        return _mutated(r)
    if kind == 2:
        return b"".join(_character(r) for _ in range(n))
    if kind == 3:
        return bytes(r.randrange(256) for _ in range(n))
    if kind == 4:
        return bytes(r.randrange(32) for _ in range(n))
    if kind == 5:  # few letters: many merges that compete
        return "".join(r.choice(r.choice(["ab", "aeinst ", "the ", "e\u0301\u00e9 "])) for _ in range(4 * n)).encode()
    if kind == 6:
        return "".join(r.choice(pieces) for _ in range(n)).encode()
    if kind == 7:  # the same with ordinary spaces
        return "".join(r.choice(pieces) for _ in range(n)).replace("\u2581", " ").encode()
    if kind == 8:
        return "".join(r.choice(SPACES[:9] + ["a", "."]) * r.randrange(1, 9) for _ in range(n // 3 + 1)).encode()
    return _mixture(r, pieces)


def strings(n, seed, pieces=()):
    """Yield n byte strings, the same ones for the same arguments. pieces: texts of a vocabulary, to be glued together at random."""
    r = random.Random(seed)
    pieces = list(pieces) or ["\u2581the", "ing", "\u2581", "a"]
    count = 0
    for s in _fixed():
        if count == n:
            return
        yield s
        count += 1
    for _ in range(n - count):
        yield _random(r, pieces)
