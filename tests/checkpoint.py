"""Write checkpoints for tests, following FORMAT.md and nothing else: an independent second writer beside export.py. Needs numpy.

    config = small_config(vocab_size=len(pieces))
    write_checkpoint("m.bin", config, random_tensors(config, seed=1), "f16", pieces)

A config is a dict with the header's names (FORMAT.md): dim hidden_dim n_layers n_heads n_kv_heads head_dim vocab_size window max_positions
norm_eps rope_theta chat_template name. Tensors are a dict from the table's names to float32 arrays of shape [rows, cols], the norms
[dim, 1] or [dim]; with "wcls" in it the classifier is a matrix of its own, without it the embedding is used.
Pieces are a list of (score, type, text): float, int (1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte), str or bytes.
"""
import os
import struct

import numpy as np

TYPES = {"f32": (1, np.dtype("<f4")), "f16": (2, np.dtype("<f2"))}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def small_config(**change):
    """The configuration of a model of one layer that loads and runs; change replaces entries."""
    config = dict(dim=32, hidden_dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=32, window=16, max_positions=128,
                  norm_eps=1e-5, rope_theta=10000.0, chat_template=0, name="small random model")
    unknown = set(change) - set(config)
    if unknown:
        raise ValueError(f"not in a config: {sorted(unknown)}")
    config.update(change)
    return config


def shapes(config, tied=False):
    """The table's names and shapes [rows, cols], in the file's order."""
    c = config
    heads = c["n_heads"] * c["head_dim"]
    out = [("token_embedding", (c["vocab_size"], c["dim"]))]
    for i in range(c["n_layers"]):
        out += [(f"layers.{i}.rms_att_weight", (c["dim"], 1)),
                (f"layers.{i}.wqkv", ((c["n_heads"] + 2 * c["n_kv_heads"]) * c["head_dim"], c["dim"])),
                (f"layers.{i}.wo", (c["dim"], heads)),
                (f"layers.{i}.rms_ffn_weight", (c["dim"], 1)),
                (f"layers.{i}.w13", (2 * c["hidden_dim"], c["dim"])),
                (f"layers.{i}.w2", (c["dim"], c["hidden_dim"]))]
    out.append(("rms_final_weight", (c["dim"], 1)))
    if not tied:
        out.append(("wcls", (c["vocab_size"], c["dim"])))
    return out


def random_tensors(config, seed=0, tied=False):
    """Random tensors: matrices normal with variance 1/cols, norms near 1."""
    r = np.random.default_rng(seed)
    out = {}
    for name, (rows, cols) in shapes(config, tied):
        x = r.standard_normal((rows, cols), dtype=np.float32)
        out[name] = np.float32(1) + np.float32(0.1) * x if "rms_" in name else x / np.float32(np.sqrt(cols))
    return out


def panels(x, dtype):
    """The bytes of x [rows, cols] as panels: 32 rows (filled up with zeros) interleaved, for each column the 32 rows' element."""
    rows, cols = x.shape
    full = np.zeros(((rows + 31) // 32 * 32, cols), dtype)
    full[:rows] = x
    return full.reshape(-1, 32, cols).transpose(0, 2, 1).tobytes()


def plain_pieces(n):
    """A vocabulary of n >= 259 pieces without sentencepiece: unknown, <s>, </s>, 256 bytes, then normal ones that never match."""
    pieces = [(0.0, UNKNOWN, "<unk>"), (0.0, CONTROL, "<s>"), (0.0, CONTROL, "</s>")]
    pieces += [(0.0, BYTE, f"<0x{i:02X}>") for i in range(256)]
    return pieces + [(float(-i), NORMAL, f"\u2603{i}") for i in range(n - len(pieces))]


def model_pieces(model):
    """The pieces of a sentencepiece ModelProto and the keyword arguments of write_checkpoint that go with them."""
    pieces = [(p.score, p.type, p.piece) for p in model.pieces]
    ids = {p.piece: i for i, p in enumerate(model.pieces)}
    t = model.trainer_spec
    return pieces, dict(add_dummy_prefix=model.normalizer_spec.add_dummy_prefix, byte_fallback=t.byte_fallback,
                        unk=[p.type for p in model.pieces].index(UNKNOWN), bos=ids.get(t.bos_piece, -1), eos=[ids.get(t.eos_piece, -1)])


def tokenizer_bytes(pieces, add_dummy_prefix=True, byte_fallback=True, unk=0, bos=1, eos=(2,)):
    """The tokenizer's section of the file."""
    eos = (list(eos) + [-1, -1, -1])[:3]
    out = [struct.pack("<IIIiiiii", 1, len(pieces), int(bool(add_dummy_prefix)) | 2 * int(bool(byte_fallback)), unk, bos, *eos)]
    for score, kind, text in pieces:
        text = text.encode() if isinstance(text, str) else text
        out.append(struct.pack("<fHH", score, kind, len(text)) + text)
    return b"".join(out)


def write_checkpoint(path, config, tensors, dtype="f32", pieces=None, **tokenizer):
    """Write the file at path; it appears there whole or not at all.

    dtype: "f32" or "f16", of the matrices; the norms are f32 always.
    pieces: see above; None: plain_pieces(vocab_size). tokenizer: keyword arguments of tokenizer_bytes.
    """
    c = config
    tied = "wcls" not in tensors
    table = shapes(c, tied)
    if {name for name, _ in table} != set(tensors):
        raise ValueError(f"tensors missing or too many: {sorted({name for name, _ in table} ^ set(tensors))}")
    tok = tokenizer_bytes(plain_pieces(c["vocab_size"]) if pieces is None else pieces, **tokenizer)

    def align(n):
        return (n + 63) // 64 * 64

    tokenizer_offset = align(256 + 96 * len(table))
    offset = align(tokenizer_offset + len(tok))
    entries, blocks = [], []
    for name, (rows, cols) in table:
        x = np.asarray(tensors[name], np.float32).reshape(rows, -1)
        if x.shape != (rows, cols):
            raise ValueError(f"{name} is {x.shape}, not {(rows, cols)}")
        code, number = TYPES["f32" if "rms_" in name else dtype]
        data = panels(x, number)
        entries.append(struct.pack("<48sIIQQQQ8x", name.encode(), code, 0, rows, cols, offset, len(data)))
        blocks.append((offset, data))
        offset = align(offset + len(data))
    file_size = blocks[-1][0] + len(blocks[-1][1])
    name = c["name"].encode()[:67]
    header = struct.pack("<8sIIQQQ9IfdI68s96x", b"mistralc", 1, len(table), file_size, tokenizer_offset, len(tok),
                         c["dim"], c["hidden_dim"], c["n_layers"], c["n_heads"], c["n_kv_heads"], c["head_dim"], c["vocab_size"], c["window"],
                         c["max_positions"], c["norm_eps"], c["rope_theta"], c["chat_template"], name)
    assert len(header) == 256 and all(len(e) == 96 for e in entries)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(header + b"".join(entries))
            for at, data in [(tokenizer_offset, tok)] + blocks:
                f.write(bytes(at - f.tell()))
                f.write(data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
