"""A GGUF file for llama.cpp with random weights, in the shape and type of a checkpoint.

    random_gguf.py CHECKPOINT.bin OUT.gguf

For speed alone, where no converter brings the same weights: Q4_0 is the type that llama.cpp is fastest with. Needs gguf and
numpy."""
import os
import sys

from measure import outcome, read_shape

try:
    import gguf
    import numpy as np
except ImportError as error:
    sys.exit(f"random_gguf.py: {error} (pip install gguf numpy)")

TYPES = {"q4": "Q4_0", "q8": "Q8_0", "f16": "F16"}


def random_rows(type_name, cols):
    """64 rows of random weights, of standard deviation 0.02, as the bytes of a GGUF type: uint8 [64, bytes of a row]."""
    rng = np.random.default_rng(1)
    if type_name == "F16":
        return (0.02 * rng.standard_normal((64, cols))).astype(np.float16).view(np.uint8)
    size, deviation = {"Q4_0": (18, 4.6), "Q8_0": (34, 74)}[type_name]      # bytes of a block; of codes in -8..7, -128..127
    blocks = rng.integers(0, 256, (64, cols // 32, size), dtype=np.uint8)   # 32 weights: a scale in FP16, then the codes
    blocks[:, :, :2] = np.full(1, 0.02 / deviation, np.float16).view(np.uint8)
    return blocks.reshape(64, -1)


def tensor_shapes(c):
    """{GGUF name: (rows, columns), or (size,) of a norm} of a model of the shape c (measure.read_shape)."""
    dim, hidden, vocab = c["dim"], c["hidden_dim"], c["vocab_size"]
    q_dim, kv_dim = c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
    layer = {"attn_norm": (dim,), "attn_q": (q_dim, dim), "attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim),
             "attn_output": (dim, q_dim), "ffn_norm": (dim,), "ffn_gate": (hidden, dim), "ffn_up": (hidden, dim),
             "ffn_down": (dim, hidden)}
    shapes = {"token_embd.weight": (vocab, dim), "output_norm.weight": (dim,), "output.weight": (vocab, dim)}
    shapes.update({f"blk.{i}.{name}.weight": shape for i in range(c["n_layers"]) for name, shape in layer.items()})
    return shapes


def write_gguf(checkpoint, path):
    """Writes a GGUF file with the shape and type of a checkpoint, a tensor at a time: 64 random rows again and again."""
    c = read_shape(checkpoint)
    if c["type"] not in TYPES:
        raise RuntimeError(f"{checkpoint}: {c['type']} has no type of GGUF that compares")
    type_name = TYPES[c["type"]]
    shapes = tensor_shapes(c)
    rows = {cols: random_rows(type_name, cols) for cols in {shape[1] for shape in shapes.values() if len(shape) == 2}}

    w = gguf.GGUFWriter(path + ".tmp", "llama")
    w.add_name("random weights")
    w.add_file_type(gguf.LlamaFileType["MOSTLY_" + type_name])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(c["vocab_size"])
    w.add_context_length(c["max_positions"])
    w.add_embedding_length(c["dim"])
    w.add_feed_forward_length(c["hidden_dim"])
    w.add_block_count(c["n_layers"])
    w.add_head_count(c["n_heads"])
    w.add_head_count_kv(c["n_kv_heads"])
    w.add_rope_dimension_count(c["head_dim"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_layer_norm_rms_eps(c["norm_eps"])
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += [f"piece{i}" for i in range(len(pieces), c["vocab_size"])]
    kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL] + 256 * [gguf.TokenType.BYTE]
    kinds += [gguf.TokenType.NORMAL] * (len(pieces) - len(kinds))
    w.add_tokenizer_model("llama")
    w.add_token_list(pieces)
    w.add_token_scores([-float(i) for i in range(len(pieces))])
    w.add_token_types(kinds)
    w.add_unk_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)

    for name, shape in shapes.items():
        if len(shape) == 1:
            w.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = shape[0], rows[shape[1]].shape[1]
            kind = gguf.GGMLQuantizationType[type_name]
            w.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for i, shape in enumerate(shapes.values()):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[Kwriting: {i / len(shapes):.0%}")
        if len(shape) == 1:
            w.write_tensor_data(np.ones(shape, np.float32))
        else:
            w.write_tensor_data(np.resize(rows[shape[1]], (shape[0], rows[shape[1]].shape[1])))
    w.close()
    os.replace(path + ".tmp", path)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit("usage: random_gguf.py CHECKPOINT.bin OUT.gguf")
    write_gguf(*sys.argv[1:])


if __name__ == "__main__":
    outcome("random_gguf.py", main)
