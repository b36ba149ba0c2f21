#!/usr/bin/env python3
"""Turn a Hugging Face directory or a GGUF file with a Mistral model into one checkpoint file for run and run_cuda, and back:

    python3 export.py HF_DIR OUT.bin [--dtype f32|f16] [--lora ADAPTER[:WEIGHT] ...] [--base-quant nf4]
    python3 export.py GPTQ_AWQ_OR_BITSANDBYTES_DIR_OR_GGUF OUT.bin [--dtype f32|f16]
    python3 export.py --to gguf|hf MODEL.bin OUT [--dtype f32|f16]

FORMAT.md describes the file. Every offset in it follows from the shapes, which are known before the
first weight is read, so the file is written front to back, some hundred rows at a time, to a file
or a pipe alike. What the format cannot hold exactly is refused by name, never approximated.

Top to bottom: config.json, the weights, the tokenizer, the file, the command line. What reads safetensors files, and
merges LoRA adapters into what is read, is in lora_merge.py; what knows quantized directories and GGUF, in formats.py.
"""
import argparse, contextlib, json, math, os, re, signal, struct, sys, time
from types import SimpleNamespace

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take a while: until outcome() Ctrl-C ends this without a word
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # where lora_merge.py is, whatever imports this file
try:
    import numpy as np
    from google.protobuf.message import DecodeError
    from formats import (
        BYTE, CONTROL, DIRECTORIES, FILE_TYPES, GGUF, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Checkpoint, Packed, pack_panels, spans,
        tensor_bytes, write_gguf, write_hf)
    from lora_merge import (  # noqa: F401  Weights is for those who import this
        BASE_QUANT_HELP, NUMPY, Bad, MergedWeights, Weights, adapter_argument, demand, form, outcome, progress, read,
        read_json, rounded, show, temporary)
    from sentencepiece import sentencepiece_model_pb2
except ImportError as error:
    sys.exit(f"export.py: Python: {error} (pip install -r requirements.txt)")

# ---------------------------------------------------------------------------- config.json


def read_config(config):
    """The object in config.json as a namespace of the header's fields, and `tied`.

    Defaults are those of MistralConfig in transformers, for the keys that files do leave out."""
    def get(key, default=None, null=None, kind=int):
        """config[key], a positive number; `default` where it is absent, `null` where it is null."""
        value = config.get(key, default)
        if value is None and null is not None:
            return null
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**31:
            raise Bad(f"config.json: {key} is {'missing' if value is None else show(value)} "
                      f"(a positive {kind.__name__} is expected)")
        return value

    rope = config.get("rope_parameters") or {}
    for key, value, wanted in (
            ("model_type", config.get("model_type"), "mistral"),
            ("architectures", config.get("architectures") or ["MistralForCausalLM"], ["MistralForCausalLM"]),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", config.get("attention_bias") or False, False),
            ("mlp_bias", config.get("mlp_bias") or False, False),
            ("rope_scaling", config.get("rope_scaling"), None),
            ("rope_parameters", [key for key in rope if isinstance(rope[key], dict)], []),  # one for each kind of layer
            ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
            ("quantization_config.quant_method", (config.get("quantization_config") or {}).get("quant_method"), None),
            ("quantization_config", config.get("quantization_config"), None)):
        demand("config.json", key, value, wanted)
    if "rope_theta" in rope:  # where newer files have it
        config = {**config, "rope_theta": rope["rope_theta"]}

    c = SimpleNamespace(
        dim=get("hidden_size"), hidden_dim=get("intermediate_size"), n_layers=get("num_hidden_layers"),
        n_heads=get("num_attention_heads"), vocab_size=get("vocab_size"), window=get("sliding_window", 4096, null=0),
        max_positions=get("max_position_embeddings", 4096 * 32), norm_eps=get("rms_norm_eps", 1e-6, kind=float),
        rope_theta=get("rope_theta", 10000.0, kind=float), tied=config.get("tie_word_embeddings") or False)
    if c.tied not in (True, False):
        raise Bad(f"config.json: tie_word_embeddings is {show(c.tied)} (true or false is expected)")
    c.n_kv_heads = get("num_key_value_heads", 8, null=c.n_heads)
    c.head_dim = get("head_dim", null=c.dim // c.n_heads)
    if config.get("head_dim") is None and c.dim % c.n_heads:
        raise Bad(f"config.json: hidden_size is {c.dim}, not a multiple of num_attention_heads {c.n_heads} (set head_dim)")
    if c.n_heads % c.n_kv_heads:
        raise Bad(f"config.json: num_attention_heads is {c.n_heads}, not a multiple of num_key_value_heads {c.n_kv_heads}")
    if c.head_dim % 2:
        raise Bad(f"config.json: head_dim is {c.head_dim} (RoPE rotates pairs: an even number is needed)")
    for key, value, limit in (("hidden_size", c.dim, 2**20), ("intermediate_size", c.hidden_dim, 2**24), ("head_dim", c.head_dim, 512),
                              ("num_hidden_layers", c.n_layers, 2**16), ("num_attention_heads", c.n_heads, 2**16),
                              ("vocab_size", c.vocab_size, 2**24), ("rms_norm_eps", c.norm_eps, 1 - 2**-24)):  # as FP32 below 1
        if value > limit:
            raise Bad(f"config.json: {key} is {value} (at most {limit} is supported)")

    kinds = config.get("layer_types")
    if kinds is not None:
        kind = set(kinds) if len(kinds) == c.n_layers else None
        if kind == {"full_attention"}:
            c.window = 0
        elif kind != {"sliding_attention"} or not c.window:
            raise Bad(f"config.json: layer_types is {show(kinds)}, with num_hidden_layers {c.n_layers} and sliding_window "
                      f"{c.window or 'null'} (one window, or none, for all layers is supported)")
    return c


# ---------------------------------------------------------------------------- the weights


def model_tensors(c, weights, dtype):
    """Check the model's tensors and list them in the file's order: [(name, dtype, group, rows, cols, sources)].

    dtype "f16" or "f32" is the matrices'; norms are f32. With None, quantized matrices whose codes the file can hold are
    "q4", "q8" or "nf4", with a group size (else 0), and the others "f16". sources: the (Hugging Face name, rows) that stand one
    below the other in the tensor."""
    tensors = []

    def add(name, dtype, cols, *sources):
        for source, rows in sources:
            weights.check(source, [rows, cols] if cols else [rows])
        tensors.append((name, dtype, 0, sum(rows for _, rows in sources), cols or 1, sources))

    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    add("token_embedding", dtype, c.dim, ("model.embed_tokens.weight", c.vocab_size))
    for layer in range(c.n_layers):
        to, hf = f"layers.{layer}.", f"model.layers.{layer}."
        add(to + "rms_att_weight", "f32", None, (hf + "input_layernorm.weight", c.dim))
        add(to + "wqkv", dtype, c.dim, (hf + "self_attn.q_proj.weight", q_dim),
            (hf + "self_attn.k_proj.weight", kv_dim), (hf + "self_attn.v_proj.weight", kv_dim))
        add(to + "wo", dtype, q_dim, (hf + "self_attn.o_proj.weight", c.dim))
        add(to + "rms_ffn_weight", "f32", None, (hf + "post_attention_layernorm.weight", c.dim))
        add(to + "w13", dtype, c.dim, (hf + "mlp.gate_proj.weight", c.hidden_dim), (hf + "mlp.up_proj.weight", c.hidden_dim))
        add(to + "w2", dtype, c.hidden_dim, (hf + "mlp.down_proj.weight", c.dim))
    add("rms_final_weight", "f32", None, ("model.norm.weight", c.dim))
    if c.tied:
        weights.used.add("lm_head.weight")  # some files hold the embedding twice
    else:
        add("wcls", dtype, c.dim, ("lm_head.weight", c.vocab_size))
    for name in sorted(weights.tensors.keys() - weights.used):
        if name.startswith(("model.", "lm_head")) and not name.endswith("rotary_emb.inv_freq"):
            raise Bad(f"{name}: this tensor has no place in the model that config.json describes")
    if dtype is None:
        if isinstance(weights, Packed):
            weights.fold(c)
        tensors = [tensor if tensor[1] else (tensor[0], *kept(weights, tensor[-1]), *tensor[3:]) for tensor in tensors]
    return tensors


def kept(weights, sources):
    """(dtype, group) of a tensor joined from `sources`: those of their codes if the file can hold them, else ("f16", 0)."""
    kinds = {weights.kind(name) if isinstance(weights, Packed) else None for name, _ in sources}
    return kinds.pop() or ("f16", 0) if len(kinds) == 1 else ("f16", 0)


def conversions(weights, tensors):
    """What became of quantized matrices, as lines for the user."""
    lines, counts = [], {}
    for _, dtype, group, _, _, sources in tensors:
        names = [name for name, _ in sources if name in weights.packed]
        if names:
            reasons = [weights.reasons[name] for name in names if weights.reasons.get(name)]
            what = (f"codes kept as {dtype} in groups of {group}" if group else f"dequantized to {dtype}" + (
                f" for {reasons[0]}" if reasons else " for parts of several types" if len(names) > 1 and weights.kinds else ""))
            counts[what] = counts.get(what, 0) + 1
    return [f"{n} matri{'x' if n == 1 else 'ces'}: {what}" for what, n in counts.items()] + weights.notes


def panels(weights, dtype, group, cols, sources):
    """Yield a tensor of the list above as the bytes of its panels of 32 rows, about a million numbers at a time."""
    for start, stop in spans(sum(rows for _, rows in sources), cols):
        n, first = stop - start + -(stop - start) % 32, 0
        block = np.zeros((n, cols), NUMPY[dtype.upper()] if not group else np.uint8)
        scales, zeros = np.zeros((2, n, -(-cols // group) if group else 0), np.float16)
        for name, rows in sources:  # the part of this source that lies in the block
            a, b = max(start, first), min(stop, first + rows)
            here = slice(a - start, b - start)
            if a < b and group:
                block[here], scales[here], zeros[here] = weights.stored(name, a - first, b - first)
            elif a < b:
                block[here] = rounded(name, weights.rows(name, a - first, b - first), dtype.upper())
            first += rows
        yield pack_panels(block, scales, zeros, dtype, group) if group else block.reshape(-1, 32, cols).transpose(0, 2, 1).tobytes()


# ---------------------------------------------------------------------------- the tokenizer

GAP = ("", 0.0, CONTROL)  # an id that no token has
SPACE = "\u2581"


def read_sentencepiece(path):
    """A tokenizer from tokenizer.model: pieces [(text, score, type)], the flags prefix and byte_fallback, bos and eos (texts)."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(read(path))
    except DecodeError:
        raise Bad(f"{path}: not a SentencePiece model (download it again)")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for key, value, wanted in (
            ("trainer_spec.model_type", trainer.ModelType.Name(trainer.model_type), "BPE"),
            ("trainer_spec.treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
            ("normalizer_spec.name", normalizer.name, "identity"),
            ("normalizer_spec.precompiled_charsmap", normalizer.precompiled_charsmap.hex(), ""),
            ("normalizer_spec.remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
            ("normalizer_spec.escape_whitespaces", normalizer.escape_whitespaces, True)):
        demand("tokenizer.model", key, value, wanted)
    for id, piece in enumerate(proto.pieces):
        if piece.type == UNUSED:
            raise Bad(f"tokenizer.model: type of piece {id} {show(piece.piece)} is UNUSED (not supported)")
    return SimpleNamespace(
        pieces=[(piece.piece, piece.score, piece.type) for piece in proto.pieces], prefix=normalizer.add_dummy_prefix,
        byte_fallback=trainer.byte_fallback, bos=trainer.bos_piece, eos=trainer.eos_piece)


def merge_scores(merges):
    """Scores {piece: -rank} of the pieces that a list of merges [(left, right)] makes.

    SentencePiece ranks the merged pieces, a merge list ranks the pairs; they agree where the pairs
    that make one piece are neighbours. Pieces of equal score (Mistral's runs of spaces) are written by
    transformers as one stretch of pairs, longest left part first: there they share a rank again."""
    last = {left + right: i for i, (left, right) in enumerate(merges)}
    groups, end, scores = [], -1, {}
    for i, (left, right) in enumerate(merges):
        if i > end:  # no piece has pairs on both sides of here
            groups.append([])
        groups[-1].append((left, right))
        end = max(end, last[left + right])
    for rank, group in enumerate(groups, 1):
        made = {left + right for left, right in group}
        lengths = [(len(left), len(right)) for left, right in group]
        if len(made) > 1 and lengths != sorted(lengths, reverse=True):
            raise Bad(f"tokenizer.json: model.merges has {show(group[0])}, but not beside the other pairs for that piece "
                      "(the order of the merges is not SentencePiece's)")
        scores.update(dict.fromkeys(made, float(-rank)))
    return scores


def read_tokenizer_json(path):
    """The same from a tokenizer.json that transformers made of a SentencePiece model, and its added tokens
    [(id, text, special)]."""
    tokenizer = read_json(path)
    model, normalizer, splitter = tokenizer["model"], tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer") or {}
    if "ByteLevel" in json.dumps(splitter):
        raise Bad(f"tokenizer.json: model.type {model.get('type')} with ByteLevel: "
                  "a byte-level (tiktoken) tokenizer is not supported")
    for key, wanted in ("type", "BPE"), ("byte_fallback", True):
        demand("tokenizer.json", "model." + key, model.get(key), wanted)
    for key in "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix":
        demand("tokenizer.json", "model." + key, model.get(key) or None, None)

    # A space becomes U+2581 either in the normalizer or in a pre-tokenizer, which must not split there.
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = steps[0] == prepend
    if splitter or steps not in ([prepend, replace], [replace]):
        demand("tokenizer.json", "normalizer", normalizer, None)
        for key, wanted in ("type", "Metaspace"), ("replacement", SPACE), ("split", False):
            demand("tokenizer.json", "pre_tokenizer." + key, splitter.get(key), wanted)
        scheme = splitter.get("prepend_scheme", "always")
        if scheme not in ("always", "first", "never"):
            raise Bad(f"tokenizer.json: pre_tokenizer.prepend_scheme is {show(scheme)} (always, first, never are supported)")
        prefix = scheme != "never"

    vocab, unk = model["vocab"], model.get("unk_token")
    added = [(token["id"], token["content"], token["special"]) for token in tokenizer.get("added_tokens") or []]
    special = {id: flag for id, _, flag in added}
    scores = merge_scores([pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]])
    for key, texts in ("merges makes", scores), ("unk_token is", [unk]):
        for text in texts:
            if text not in vocab:
                raise Bad(f"tokenizer.json: model.{key} {show(text)}, which is not in model.vocab")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise Bad(f"tokenizer.json: the ids in model.vocab are not 0 to {len(vocab) - 1}")
    pieces = []
    for text, id in sorted(vocab.items(), key=lambda item: item[1]):
        kind = (UNKNOWN if text == unk else (CONTROL if special[id] else USER_DEFINED) if id in special
                else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL)
        pieces.append((text, scores.get(text, -1e9) if kind == NORMAL else 0.0, kind))
    return SimpleNamespace(pieces=pieces, prefix=prefix, byte_fallback=True, bos="<s>", eos="</s>"), added


def read_tokenizer(directory, vocab_size):
    """The tokenizer of a Hugging Face directory, as above, with the added tokens and unk, the unknown piece's id."""
    settings, added = read_json(os.path.join(directory, "tokenizer_config.json"), optional=True), []
    model, fast = (os.path.join(directory, name) for name in ("tokenizer.model", "tokenizer.json"))
    if os.path.exists(model):
        t = read_sentencepiece(model)
    elif os.path.exists(fast):
        with form(fast):
            t, added = read_tokenizer_json(fast)
    else:
        raise Bad(f"{directory}: no tokenizer.model and no tokenizer.json (no other tokenizer is supported)")

    with form(f"{directory}: added_tokens.json or tokenizer_config.json"):
        for id, token in (settings.get("added_tokens_decoder") or {}).items():
            added.append((int(id), token["content"], token.get("special", False)))
        for text, id in read_json(os.path.join(directory, "added_tokens.json"), optional=True).items():
            added.append((id, text, True))
        n_pieces = max([len(t.pieces), *(id + 1 for id, _, _ in added)])
        if n_pieces > vocab_size:
            raise Bad(f"{directory}: the tokenizer has {n_pieces} pieces, but vocab_size is {vocab_size} in config.json")
        for id, text, special in sorted(added, key=lambda token: token[0]):
            t.pieces += [GAP] * (id - len(t.pieces))
            if id == len(t.pieces):
                t.pieces.append((text, 0.0, CONTROL if special else USER_DEFINED))
            elif t.pieces[id][0] != text:  # a token that the model has keeps its piece, but must be the same
                raise Bad(f"{directory}: added token {id} is {show(text)}, but piece {id} is {show(t.pieces[id][0])}")
        return checked(directory, t)


def checked(where, t):
    """The tokenizer t, with unk, the unknown piece's id; Bad if the file cannot hold it."""
    for id, (text, score, kind) in enumerate(t.pieces):
        if len(text.encode()) > 0xFFFF or not math.isfinite(score):
            raise Bad(f"{where}: piece {id} {show(text)} is too long, or its score {score} is no number")
        if kind == BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            raise Bad(f"{where}: piece {id} {show(text)} is a byte, but not of the form <0xHH>")
    unknown, n_bytes = ([id for id, piece in enumerate(t.pieces) if piece[2] == kind] for kind in (UNKNOWN, BYTE))
    if len(unknown) != 1 or t.byte_fallback and len(n_bytes) != 256:
        raise Bad(f"{where}: the tokenizer has {len(unknown)} unknown pieces and {len(n_bytes)} bytes, not 1 and 256")
    t.unk = unknown[0]
    return t


def read_gguf_tokenizer(path, metadata, vocab_size):
    """The same from the metadata of a GGUF file."""
    def get(key, default=None):
        return metadata.get("tokenizer.ggml." + key, default)

    for key, value, wanted in (
            ("model", get("model"), "llama"), ("remove_extra_whitespaces", get("remove_extra_whitespaces", False), False),
            ("precompiled_charsmap", get("precompiled_charsmap") or None, None)):
        demand(path, "tokenizer.ggml." + key, value, wanted)
    with form(path):
        texts, scores, kinds = get("tokens"), get("scores"), get("token_type")
        if not len(texts) == len(scores) == len(kinds) == vocab_size:
            raise Bad(f"{path}: {len(texts)} tokens, {len(scores)} scores, {len(kinds)} types, but token_embd.weight has "
                      f"{vocab_size} rows")
        if not set(kinds) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
            raise Bad(f"{path}: tokenizer.ggml.token_type has {show(sorted(set(kinds)))} (1 to 6 are known)")
        pieces = [GAP if kind == UNUSED else (text, float(score), kind) for text, score, kind in zip(texts, scores, kinds)]
        while pieces and pieces[-1] == GAP:
            pieces.pop()
        return checked(path, SimpleNamespace(
            pieces=pieces, prefix=bool(get("add_space_prefix", True)), byte_fallback=BYTE in kinds, bos="<s>", eos="</s>"))


def sequence_ids(directory, tokenizer_directory, config, t, vocab_size):
    """(bos, [eos, eos, eos]), -1 where there is none: config.json's (eos: generation_config.json's), else tokenizer t's."""
    generation = read_json(os.path.join(directory, "generation_config.json"), optional=True)
    settings = read_json(os.path.join(tokenizer_directory, "tokenizer_config.json"), optional=True)
    found = []
    for name, most in ("bos", 1), ("eos", 3):
        where, key, value = "config.json", name + "_token_id", config.get(name + "_token_id")
        if name == "eos" and generation.get(key) is not None:
            where, value = "generation_config.json", generation[key]
        if value is None:
            text = settings.get(name + "_token") or getattr(t, name)
            text = text.get("content") if isinstance(text, dict) else text
            value = [id for id, piece in enumerate(t.pieces) if piece[0] == text][:1]
        value = value if isinstance(value, list) else [value]
        if len(value) > most or not all(type(id) is int and 0 <= id < vocab_size for id in value):
            raise Bad(f"{where}: {key} is {show(value)} (up to {most} ids below vocab_size {vocab_size} are supported)")
        found.append(value + [-1] * (most - len(value)))
    return found[0][0], found[1]


def chat_template(directory, t):
    """Which of Mistral's chat templates the directory has: 0 none, 1 v1, 2 v3 (FORMAT.md)."""
    jinja, settings, template = (os.path.join(directory, name) for name in (
        "chat_template.jinja", "tokenizer_config.json", "chat_template.json"))
    with form(f"{directory}: chat_template"):
        text = (read(jinja, optional=True).decode() or read_json(settings, optional=True).get("chat_template")
                or read_json(template, optional=True).get("chat_template") or "")
        if isinstance(text, list):  # several, by name
            text = {entry["name"]: entry["template"] for entry in text}.get("default", "")
        return template_version(text, t)


def template_version(text, t):
    """Which of Mistral's chat templates a template in Jinja is, for the tokenizer t: 0, 1 or 2 as above."""
    if "[INST]" not in text:
        return 0
    return 2 if any(piece[0] == "[INST]" and piece[2] == CONTROL for piece in t.pieces) else 1


def pack_tokenizer(t, bos, eos):
    """The tokenizer as the bytes of its section of the file."""
    parts = [struct.pack("<III5i", 1, len(t.pieces), t.prefix | t.byte_fallback << 1, t.unk, bos, *eos)]
    for text, score, kind in t.pieces:
        parts.append(struct.pack("<fHH", score, kind, len(text.encode())) + text.encode())
    return b"".join(parts)


# ---------------------------------------------------------------------------- the file


@contextlib.contextmanager
def output(path, sources):
    """A binary file that becomes `path`: a temporary one beside it, renamed when it is whole and closed, removed if anything
    goes wrong; Bad if it is a file that is read: of `sources`, files and directories. "-", and what is no plain file (a pipe,
    a device), is written directly."""
    # standard output by its names as a path, too: what it is redirected to must not be replaced
    number = 1 if path in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") else None
    if number or os.path.exists(path) and not os.path.isfile(path):
        with open(number or path, "wb", closefd=not number) as file:
            yield file
        return
    inside = (os.path.join(folder, name) for source in sources for folder, _, names in os.walk(source) for name in names
              if name.endswith((".json", ".safetensors", ".model", ".jinja")))
    if os.path.exists(path) and any(os.path.exists(each) and os.path.samefile(path, each) for each in (*sources, *inside)):
        raise Bad(f"{path}: is one of the files that are read (give another name)")
    with temporary(path) as name, open(name, "wb") as file:
        yield file


def align(n):
    """n rounded up to a multiple of 64."""
    return n + -n % 64


def write_checkpoint(file, name, c, chat, tokenizer, tensors, weights):
    """Write a checkpoint front to back: the header of config c and chat template `chat`, the table of `tensors`
    (model_tensors), the section `tokenizer` (bytes), the weights. Returns its size in bytes."""
    tokenizer_offset = align(256 + 96 * len(tensors))
    total, table = tokenizer_offset + len(tokenizer), []
    for tensor, kind, group, rows, cols, _ in tensors:
        offset, size = align(total), tensor_bytes(kind, group, rows, cols)
        table.append(struct.pack("<48sIIQQQQ8x", tensor.encode(), FILE_TYPES[kind], group, rows, cols, offset, size))
        total = offset + size
    name = "".join(letter if letter.isprintable() else "?" for letter in name)  # what run would refuse
    name = name.encode(errors="replace")[:67].decode(errors="ignore").encode()  # whole characters, and a zero
    header = struct.pack(
        "<8sIIQQQ9IfdI68s96x", b"mistralc", 1, len(tensors), total, tokenizer_offset, len(tokenizer),
        c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size, c.window, c.max_positions,
        c.norm_eps, c.rope_theta, chat, name)

    def pieces():
        yield [header, *table]
        yield [tokenizer]
        for _, kind, group, _, cols, sources in tensors:
            yield panels(weights, kind, group, cols, sources)

    started, done = time.monotonic(), 0
    for section in pieces():
        file.write(bytes(-done % 64))
        done = align(done)
        for data in section:
            file.write(data)
            done += len(data)
            progress(started, done, total)
    return total


# ---------------------------------------------------------------------------- the command line


def open_model(source, adapters=(), base_quant=None):
    """The Weights of a Hugging Face directory, quantized or not, or of a GGUF file, with the attributes config (the object in
    config.json, or what it would be) and tokenizer (where that is). adapters, base_quant: as for MergedWeights."""
    plain = "(adapters are merged into a plain directory: make one with export.py, then export.py --to hf)"
    if os.path.isfile(source):
        if adapters or base_quant:
            raise Bad(f"{source}: not a directory {plain}")
        weights = GGUF(source)
        try:
            with form(source):
                read_config(weights.config)
        except Bad as error:  # there is no such file here
            raise Bad(str(error).replace("config.json", source, 1))
        return weights
    if not os.path.isdir(source):
        raise Bad(f"{source}: not a directory (give the one that holds config.json), and not a GGUF file")
    config = read_json(os.path.join(source, "config.json"))
    with form("config.json"):
        method = (config.get("quantization_config") or {}).get("quant_method")
        settings = config.pop("quantization_config") if method in DIRECTORIES else None
        read_config(config)  # says what is wrong with it before anything else is looked at
    if not settings:
        base = Weights(source)
        model_tensors(read_config(config), base, "f32")  # the base must be whole by itself before adapters are compared with it
        return MergedWeights(base, config, adapters, base_quant)
    if adapters or base_quant:
        raise Bad(f"config.json: quantization_config.quant_method is {show(method)} {plain}")
    return DIRECTORIES[method](source, config, settings)


def export(source, out, dtype=None, adapters=(), base_quant=None):
    """Write the model in a Hugging Face directory or a GGUF file to the file `out` ("-": standard output), the matrices as
    "f16" or "f32", with LoRA adapters merged in: [(directory, weight)], on a base rounded to base_quant (MergedWeights).
    dtype None is "f16", but for codes of quantized matrices, which stay what they are if the file can hold them.
    Returns a line that sums it up. Raises Bad for bad input, OSError if `out` cannot be written."""
    weights = open_model(source, adapters, base_quant)
    c = read_config(weights.config)
    tensors = model_tensors(c, weights, dtype)
    if isinstance(weights, GGUF):
        t = read_gguf_tokenizer(source, weights.metadata, c.vocab_size)
        with form(source):
            chat = template_version(weights.metadata.get("tokenizer.chat_template", ""), t)
    else:
        t = read_tokenizer(weights.tokenizer, c.vocab_size)
        chat = chat_template(weights.tokenizer, t)
    bos, eos = sequence_ids(source, weights.tokenizer, weights.config, t, c.vocab_size)
    sources = source, *(adapter for adapter, _ in adapters)
    name = "+".join(os.path.basename(os.path.abspath(each)) for each in sources)
    with output(out, sources) as file:
        size = write_checkpoint(file, name, c, chat, pack_tokenizer(t, bos, eos), tensors, weights)
    types = dict.fromkeys(dtype for _, dtype, _, _, cols, _ in tensors if cols > 1)
    return "; ".join([
        f"{size / 1e6:.1f} MB, {', '.join(types)}, {c.n_layers} layers, {f'window {c.window}' if c.window else 'no window'}, "
        f"{len(t.pieces)} pieces, chat template {('none', 'v1', 'v3')[chat]}",
        *(conversions(weights, tensors) if isinstance(weights, Packed) else weights.report())])


def convert(source, out, to, dtype=None):
    """Write the checkpoint `source` as another program's: a GGUF file (to="gguf") or a Hugging Face directory ("hf"), the matrices
    as "f16" or "f32", or, with None, as the format can hold them best. Returns a line that sums it up; raises as export()."""
    model = Checkpoint(source)
    if to == "hf":
        size, lines = write_hf(model, out, dtype)
    else:
        with output(out, [source]) as file:
            size, lines = write_gguf(model, file, dtype)
    return "; ".join([f"{size / 1e6:.1f} MB", *lines])


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Turn a Hugging Face directory or a GGUF file with a Mistral model into one checkpoint "
        "file, or such a file into one of those.")
    parser.add_argument("source", metavar="MODEL", help="a Hugging Face directory, plain or in the format of GPTQ, AWQ or "
                        "bitsandbytes, or a GGUF file; with --to, a checkpoint file")
    parser.add_argument("out", metavar="OUT", help="the file to write (- is standard output); with --to hf, the directory to make")
    parser.add_argument("--to", choices=("gguf", "hf"), help="write a GGUF file, or a Hugging Face directory")
    parser.add_argument("--dtype", choices=("f32", "f16"),
                        help="of the matrices (default f16, but codes as they are); norms are f32")
    parser.add_argument("--lora", metavar="ADAPTER[:WEIGHT]", action="append", default=[], type=adapter_argument,
                        help="merge a PEFT LoRA adapter; WEIGHT multiplies its scaling; may be repeated")
    parser.add_argument("--base-quant", choices=("nf4",), help=BASE_QUANT_HELP)
    args = parser.parse_args()
    if args.to and (args.lora or args.base_quant):
        parser.error("--lora and --base-quant are for the way in, not for --to")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed by the shell: messages must not go elsewhere
    if args.out == "-" and args.to == "hf":
        parser.error("--to hf makes a directory: OUT cannot be -")
    if args.out == "-" and sys.stdout and sys.stdout.isatty():
        parser.error("OUT is -, but standard output is a terminal")
    out = "standard output" if args.out == "-" else args.out
    status, lines = outcome("export.py", out, lambda: [f"{out}: " + (
        convert(args.source, args.out, args.to, args.dtype) if args.to
        else export(args.source, args.out, args.dtype, args.lora, args.base_quant))])
    print(*lines, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
