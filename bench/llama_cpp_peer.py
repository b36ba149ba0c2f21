"""llama.cpp beside run: a GGUF file in the shape of a checkpoint, and run's measurements through llama.cpp's C interface.

    llama_cpp_peer.py write CHECKPOINT.bin OUT.gguf            random weights of the checkpoint's shape and type
    llama_cpp_peer.py measure MODEL.gguf 1:128:17 32:128:16    BATCH:PROMPT_TOKENS:NEW_TOKENS ...; prints JSON

Needs llama-cpp-python, gguf and numpy. Nothing is sampled: it is the time of llama_decode() alone, on made-up tokens."""
import argparse
import json
import os
import statistics
import sys
import time

import numpy as np

N_BATCH = 512           # tokens of a llama_decode() at most
TYPES = {"q4": "Q4_0", "q8": "Q8_0", "f16": "F16"}


# --------------------------------------------------------------------------------------------------------------------
# The file

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
    """{GGUF name: (rows, columns), or (size,) of a norm} of a model of the shape c (speed.read_shape)."""
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
    import gguf
    from speed import read_shape
    c = read_shape(checkpoint)
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


# --------------------------------------------------------------------------------------------------------------------
# The measurements

def forward(llama, ctx, batch, tokens):
    """llama_decode() of tokens [(position, sequence, whether its logits are wanted)], N_BATCH at a time. Returns seconds."""
    start = time.perf_counter()
    for first in range(0, len(tokens), N_BATCH):
        part = tokens[first:first + N_BATCH]
        batch.n_tokens = len(part)
        for i, (pos, seq, want) in enumerate(part):
            batch.token[i] = 300 + (pos * 7919 + seq) % 20000
            batch.pos[i] = pos
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = want
        status = llama.llama_decode(ctx, batch)
        if status:
            sys.exit(f"llama_decode() returned {status}")
    llama.llama_synchronize(ctx)
    return time.perf_counter() - start


def one_pass(llama, ctx, batch, cell):
    """Seconds of prefill and of decoding for a cell (sequences, prompt tokens, new tokens); the first new token of a
    sequence comes from its prefill."""
    n_sequences, n_in, n_out = cell
    llama.llama_memory_clear(llama.llama_get_memory(ctx), False)
    prompts = [(pos, seq, pos == n_in - 1) for seq in range(n_sequences) for pos in range(n_in)]
    steps = [[(pos, seq, True) for seq in range(n_sequences)] for pos in range(n_in, n_in + n_out - 1)]
    return forward(llama, ctx, batch, prompts), sum(forward(llama, ctx, batch, step) for step in steps)


def measure(path, cells, threads, warmup=1, repeat=1, unified_kv=False):
    """For each cell (sequences, prompt tokens, new tokens) a dict with the names and units of run's statistics. The warm-up
    is a pass of one sequence and a step: what it is for is the pages of the weights."""
    import llama_cpp as llama
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"{path}: llama.cpp cannot load it")
    batch = llama.llama_batch_init(N_BATCH, 0, 1)
    results = []
    for cell in cells:
        n_sequences, n_in, n_out = cell
        params = llama.llama_context_default_params()
        params.n_ctx = n_sequences * ((n_in + n_out + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified_kv
        ctx = llama.llama_init_from_model(model, params)
        if not ctx:
            sys.exit(f"{path}: llama.cpp makes no context of {params.n_ctx} positions")
        for _ in range(warmup):
            one_pass(llama, ctx, batch, (1, min(n_in, 128), 2))
        passes = [one_pass(llama, ctx, batch, cell) for _ in range(repeat)]
        prefill, decode = (statistics.median(seconds) for seconds in zip(*passes))
        total = statistics.median(map(sum, passes))
        results.append({
            "backend": "llama.cpp", "version": "llama-cpp-python " + llama.__version__,
            "system": llama.llama_print_system_info().decode().strip(" |"), "batch": n_sequences, "threads": threads,
            "prompt_tokens": n_sequences * n_in, "generated_tokens": n_sequences * n_out,
            "prefill_seconds": prefill, "decode_seconds": decode, "total_seconds": total,
            "prefill_tok_s": n_sequences * n_in / prefill,
            "decode_tok_s": n_sequences * (n_out - 1) / decode if decode else 0,
            "total_tok_s": n_sequences * (n_in + n_out) / total})
        llama.llama_free(ctx)
    return results


def main():
    parser = argparse.ArgumentParser(prog="llama_cpp_peer.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("write").add_argument
    add("checkpoint")
    add("gguf")
    add = commands.add_parser("measure").add_argument
    add("gguf")
    add("cells", nargs="+", metavar="BATCH:IN:OUT", type=lambda text: tuple(map(int, text.split(":"))))
    add("-j", "--threads", type=int, default=os.cpu_count(), help="(the cores)")
    add("-w", "--warmup", type=int, default=1, help="short passes before the measured ones of a cell (1)")
    add("-r", "--repeat", type=int, default=1, help="measured passes of a cell, their median counts (1)")
    add("--unified-kv", action="store_true", help="one cache for all sequences instead of one for each, which is faster")
    o = parser.parse_args()
    if o.command == "write":
        write_gguf(o.checkpoint, o.gguf)
    else:
        json.dump(measure(o.gguf, o.cells, o.threads, o.warmup, o.repeat, o.unified_kv), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
