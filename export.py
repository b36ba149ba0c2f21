#!/usr/bin/env python3
"""Turn a Hugging Face directory with a Mistral model into one checkpoint file for run and run_cuda:

    python3 export.py HF_DIR OUT.bin [--dtype f32|f16]

FORMAT.md describes the file. Every offset in it follows from the shapes, which are known before the
first weight is read, so the file is written front to back, some hundred rows at a time, to a file
or a pipe alike. What the format cannot hold exactly is refused by name, never approximated.

Top to bottom: errors, config.json, the weights, the tokenizer, the file, the command line.
"""
import argparse, contextlib, json, math, os, re, signal, struct, sys, time
from types import SimpleNamespace

try:
    import numpy as np
    import ml_dtypes  # noqa: F401  importing it is what makes numpy, and so safetensors, know bfloat16
    from google.protobuf.message import DecodeError
    from safetensors import SafetensorError, safe_open
    from sentencepiece import sentencepiece_model_pb2
except ImportError as error:
    sys.exit(f"export.py: Python: {error} (pip install -r requirements.txt)")

# ---------------------------------------------------------------------------- errors


class Bad(Exception):
    """Input that cannot be exported; the message is the line shown: WHAT: what is wrong (what to do)."""


def show(value):
    """A value as JSON, short enough for a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."


def demand(where, key, value, wanted):
    """Raise Bad, naming the file, the key and the value, unless value is the only one supported."""
    if value != wanted:
        raise Bad(f"{where}: {key} is {show(value)} (only {show(wanted)} is supported)")


@contextlib.contextmanager
def form(where):
    """Inside, a value of an unexpected JSON type or an absent one is bad input in the file `where`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Bad(f"{where}: not in the expected form ({type(error).__name__}: {error})")


def read(path, optional=False):
    """The bytes of a file; b"" if it is absent and may be."""
    if optional and not os.path.exists(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Bad(f"{path}: {error.strerror}")


def read_json(path, optional=False):
    """The object in a JSON file; {} if it is absent and may be."""
    data = read(path, optional)
    with form(path):
        value = json.loads(data) if data or not optional else {}
        return dict(value.items())  # fails for what is no object


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
                              ("vocab_size", c.vocab_size, 2**24), ("rms_norm_eps", c.norm_eps, 1)):
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


class Weights:
    """The tensors of a Hugging Face directory by their names there, read in pieces."""

    def __init__(self, directory):
        shards = [os.path.join(directory, "model.safetensors")]
        index = shards[0] + ".index.json"
        if not os.path.exists(shards[0]) and os.path.exists(index):
            with form(index):
                shards = [os.path.join(directory, name) for name in sorted(set(read_json(index)["weight_map"].values()))]
        self.tensors, self.used = {}, set()  # name -> (shard, shape, type); the names that were checked
        for shard in shards:
            with self.open(shard) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    self.tensors[name] = shard, part.get_shape(), part.get_dtype()

    def open(self, shard):
        """A safetensors file, opened; Bad if it is absent or cut."""
        if not os.path.isfile(shard):
            raise Bad(f"{shard}: missing (download it again; only safetensors files are read)")
        try:
            return safe_open(shard, "numpy")
        except (SafetensorError, OSError) as error:
            raise Bad(f"{shard}: not a whole safetensors file: {error} (download it again)")

    def check(self, name, shape):
        """Bad unless the tensor is there, has this shape and is of a type that is read."""
        if name not in self.tensors:
            raise Bad(f"{name}: this tensor is missing")
        shard, found, dtype = self.tensors[name]
        if found != shape:
            raise Bad(f"{name}: the shape is {found} in {os.path.basename(shard)}, but {shape} by config.json")
        if dtype not in ("BF16", "F16", "F32"):
            raise Bad(f"{name}: the type is {dtype} (only BF16, F16 and F32 are supported)")
        self.used.add(name)

    def rows(self, name, start, stop):
        """Rows start to stop - 1 of a tensor [out, in], as f32 [stop - start, in]; of a vector, as [stop - start, 1].

        All values of weights come through here. The shard is opened anew for every piece: that costs
        little and gives back what was mapped, so that memory does not grow with the shards."""
        with self.open(self.tensors[name][0]) as file:
            rows = file.get_slice(name)[start:stop]
        return rows.astype(np.float32).reshape(stop - start, -1)


def model_tensors(c, weights, dtype):
    """Check the model's tensors and list them in the file's order: [(name, dtype, rows, cols, sources)].

    dtype "f16" or "f32" is the matrices'; norms are f32. sources: the (Hugging Face name, rows) that
    stand one below the other in the tensor."""
    tensors = []

    def add(name, dtype, cols, *sources):
        for source, rows in sources:
            weights.check(source, [rows, cols] if cols else [rows])
        tensors.append((name, dtype, sum(rows for _, rows in sources), cols or 1, sources))

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
    return tensors


def panels(weights, dtype, cols, sources):
    """Yield a tensor of the list above as the bytes of its panels of 32 rows, about a million numbers at a time."""
    total, step = sum(rows for _, rows in sources), max(1, 2**20 // (32 * cols)) * 32
    limit = 65520 if dtype == "f16" else math.inf  # what would round to infinity in f16
    for start in range(0, total, step):
        block, first = np.zeros((min(step, total - start + -(total - start) % 32), cols), np.float32), 0
        for name, rows in sources:  # the part of this source that lies in the block
            a, b = max(start, first), min(start + step, first + rows)
            if a < b:
                x = block[a - start:b - start] = weights.rows(name, a - first, b - first)
                peak = max(x.max(), -x.min())  # NaN if there is one
                if not peak < limit:
                    raise Bad(f"{name}: holds {peak}, too large for f16 (use --dtype f32)" if np.isfinite(peak)
                              else f"{name}: holds a value that is not finite (the checkpoint is damaged)")
            first += rows
        block = block.astype("<f2" if dtype == "f16" else "<f4")
        yield block.reshape(-1, 32, cols).transpose(0, 2, 1).tobytes()


# ---------------------------------------------------------------------------- the tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types
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
        for id, (text, score, _) in enumerate(t.pieces):
            if len(text.encode()) > 0xFFFF or not math.isfinite(score):
                raise Bad(f"{directory}: piece {id} {show(text)} is too long, or its score {score} is no number")

    unknown, n_bytes = ([id for id, piece in enumerate(t.pieces) if piece[2] == kind] for kind in (UNKNOWN, BYTE))
    if len(unknown) != 1 or t.byte_fallback and len(n_bytes) != 256:
        raise Bad(f"{directory}: the tokenizer has {len(unknown)} unknown pieces and {len(n_bytes)} bytes, not 1 and 256")
    t.unk = unknown[0]
    return t


def sequence_ids(directory, config, t, vocab_size):
    """(bos, [eos, eos, eos]), -1 where there is none: config.json's (eos: generation_config.json's), else tokenizer t's."""
    generation, settings = (read_json(os.path.join(directory, name), optional=True)
                            for name in ("generation_config.json", "tokenizer_config.json"))
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
def output(path):
    """A binary file that becomes `path`: a temporary one beside it, renamed when it is whole and closed,
    removed if anything goes wrong. "-", and what is no plain file (a pipe, a device), is written directly."""
    if path == "-" or os.path.exists(path) and not os.path.isfile(path):
        with open(1 if path == "-" else path, "wb", closefd=path != "-") as file:
            yield file
        return
    path = os.path.realpath(path)  # a link stays a link
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def align(n):
    """n rounded up to a multiple of 64."""
    return n + -n % 64


def progress(started, done, total):
    """On a terminal, rewrite the line: percent, MB/s, time left; `started` in seconds of time.monotonic()."""
    if sys.stderr.isatty():
        speed = done / (time.monotonic() - started + 1e-9)
        left = round((total - done) / speed)
        line = f"{100 * done // total}%, {speed / 1e6:.0f} MB/s, {left // 60}:{left % 60:02} left" if done < total else ""
        print(f"\r{line:40}", end="\r", file=sys.stderr, flush=True)


def write_checkpoint(file, name, c, chat, tokenizer, tensors, weights):
    """Write a checkpoint front to back: the header of config c and chat template `chat`, the table of `tensors`
    (model_tensors), the section `tokenizer` (bytes), the weights. Returns its size in bytes."""
    tokenizer_offset = align(256 + 96 * len(tensors))
    total, table = tokenizer_offset + len(tokenizer), []
    for tensor, kind, rows, cols, _ in tensors:
        offset, size = align(total), (rows + -rows % 32) * cols * (2 if kind == "f16" else 4)
        table.append(struct.pack("<48sIIQQQQ8x", tensor.encode(), 2 if kind == "f16" else 1, 0, rows, cols, offset, size))
        total = offset + size
    name = name.encode(errors="replace")[:67].decode(errors="ignore").encode()  # whole characters, and a zero
    header = struct.pack(
        "<8sIIQQQ9IfdI68s96x", b"mistralc", 1, len(tensors), total, tokenizer_offset, len(tokenizer),
        c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size, c.window, c.max_positions,
        c.norm_eps, c.rope_theta, chat, name)

    def pieces():
        yield [header, *table]
        yield [tokenizer]
        for _, kind, _, cols, sources in tensors:
            yield panels(weights, kind, cols, sources)

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


def export(directory, out, dtype):
    """Write the model in a Hugging Face directory to the file `out` ("-": standard output), the matrices as
    "f16" or "f32"; returns a line that sums it up. Raises Bad for bad input, OSError if `out` cannot be written."""
    if not os.path.isdir(directory):
        raise Bad(f"{directory}: not a directory (give the one that holds config.json)")
    config = read_json(os.path.join(directory, "config.json"))
    with form("config.json"):
        c = read_config(config)
    weights = Weights(directory)
    tensors = model_tensors(c, weights, dtype)
    t = read_tokenizer(directory, c.vocab_size)
    tokenizer, chat = pack_tokenizer(t, *sequence_ids(directory, config, t, c.vocab_size)), chat_template(directory, t)
    with output(out) as file:
        size = write_checkpoint(file, os.path.basename(os.path.abspath(directory)), c, chat, tokenizer, tensors, weights)
    return (f"{size / 1e6:.1f} MB, {dtype}, {c.n_layers} layers, {f'window {c.window}' if c.window else 'no window'}, "
            f"{len(t.pieces)} pieces, chat template {('none', 'v1', 'v3')[chat]}")


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Turn a Hugging Face directory with a Mistral model into one checkpoint file.")
    parser.add_argument("directory", metavar="HF_DIR", help="config.json, *.safetensors, tokenizer.model or tokenizer.json")
    parser.add_argument("out", metavar="OUT.bin", help="the file to write; - is standard output")
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f16", help="of the matrices (default f16); norms are f32")
    args = parser.parse_args()
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed by the shell: messages must not go elsewhere
    if args.out == "-" and sys.stdout and sys.stdout.isatty():
        parser.error("OUT.bin is -, but standard output is a terminal")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up first
    out, status = "standard output" if args.out == "-" else args.out, 1
    try:
        line, status = f"{out}: {export(args.directory, args.out, args.dtype)}", 0
    except Bad as error:
        line = f"export.py: {error}"
    except OSError as error:  # of the output: what reads the input raises Bad
        line = f"export.py: {out}: {error.strerror}"
    except KeyboardInterrupt:
        line = f"export.py: {out}: interrupted"
    if status or args.out != "-" or sys.stderr.isatty():
        print(" ".join(line.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
