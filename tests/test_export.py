"""Tests of export.py: writes small Hugging Face directories, exports them, and reads the result with a reader of its
own that knows FORMAT.md only. Needs numpy, ml_dtypes, safetensors, sentencepiece, protobuf, pytest."""
import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
EXPORT = os.path.join(ROOT, "export.py")
TINY = os.path.join(ROOT, "demo", "tiny-mistral")
MISTRAL = {v: os.path.join(ROOT, "..", "shared", "tokenizers", f"mistral-{v}.model") for v in ("v1", "v3")}
spec = importlib.util.spec_from_file_location("export_py", EXPORT)
export_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export_py)
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}

# ---------------------------------------------------------------------------- a Hugging Face directory

# Sizes that divide nothing: 5 * 14 query rows need not be dim, no matrix fills its last panel.
ODD = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 40, "intermediate_size": 100,
       "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "vocab_size": 77,
       "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 12345.0, "sliding_window": 19,
       "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}


def random_tensors(config, dtypes=("BF16",), seed=0):
    """The tensors of a MistralForCausalLM by their Hugging Face names, their types from `dtypes` in turn."""
    rng = np.random.default_rng(seed)
    c = config
    dim, hidden, head = c["hidden_size"], c["intermediate_size"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], dim), "model.norm.weight": (dim,)}
    for i in range(c["num_hidden_layers"]):
        for name, shape in {
                "input_layernorm": (dim,), "post_attention_layernorm": (dim,),
                "self_attn.q_proj": (c["num_attention_heads"] * head, dim), "self_attn.k_proj": (c["num_key_value_heads"] * head, dim),
                "self_attn.v_proj": (c["num_key_value_heads"] * head, dim), "self_attn.o_proj": (dim, c["num_attention_heads"] * head),
                "mlp.gate_proj": (hidden, dim), "mlp.up_proj": (hidden, dim), "mlp.down_proj": (dim, hidden)}.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (c["vocab_size"], dim)
    return {name: rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtypes[i % len(dtypes)]])
            for i, (name, shape) in enumerate(shapes.items())}


def small_sentencepiece(n=60):
    """A SentencePiece BPE model of n pieces, without bytes, put together by hand."""
    proto = sentencepiece_model_pb2.ModelProto()
    for text, kind in ("<unk>", 2), ("<s>", 3), ("</s>", 3):
        proto.pieces.add(piece=text, score=0.0, type=kind)
    texts = ["\u2581t", "he", "\u2581the", "in", "an"] + [chr(97 + i) for i in range(26)] + [chr(65 + i) for i in range(26)] + ["\u2581"]
    for i, text in enumerate(texts[:n - 3]):
        proto.pieces.add(piece=text, score=-float(i), type=1)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto


def hf_directory(path, config=ODD, tensors=None, shards=1, tokenizer=None, files=None):
    """Write an HF directory. tokenizer: a path, a ModelProto, or None for a small one; files: {name: JSON value or str}."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
    else:
        names, index = sorted(tensors), {}
        for s in range(shards):
            shard = f"model-{s + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in names[s::shards]}, path / shard)
            index.update(dict.fromkeys(names[s::shards], shard))
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if isinstance(tokenizer, (str, os.PathLike)):
        shutil.copy(tokenizer, path / "tokenizer.model")
    elif tokenizer is not False:
        (path / "tokenizer.model").write_bytes((tokenizer or small_sentencepiece()).SerializeToString())
    for name, value in (files or {}).items():
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def run(*arguments, **options):
    """The script as a process of its own."""
    return subprocess.run([sys.executable, EXPORT, *map(str, arguments)], capture_output=True, timeout=60, **options)


def call(*arguments):
    """The script's main() in this process, which is ten times as fast: exit status and what it says."""
    text, argv, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [EXPORT, *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(text):
            return export_py.main(), text.getvalue()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def export(directory, *options):
    """Export; the file as the reader below sees it."""
    out = directory.parent / (directory.name + ".bin")
    status, text = call(directory, out, *options)
    assert status == 0, text
    assert text.count("\n") == 1 and str(out) in text
    assert [p for p in os.listdir(out.parent) if ".tmp" in p] == []
    return Checkpoint(out.read_bytes())


# ---------------------------------------------------------------------------- a reader of FORMAT.md


class Checkpoint:
    """header: dict; tensors: {name: (dtype, array [rows, cols])}; tokenizer: dict. Checks all that FORMAT.md promises."""

    def __init__(self, data):
        self.data = data
        names = ("magic version n_tensors file_size tokenizer_offset tokenizer_size dim hidden_dim n_layers n_heads n_kv_heads "
                 "head_dim vocab_size window max_positions norm_eps rope_theta chat_template name").split()
        self.header = dict(zip(names, struct.unpack_from("<8sIIQQQIIIIIIIIIfdI68s", data)))
        assert self.header["magic"] == b"mistralc" and self.header["version"] == 1
        assert self.header["file_size"] == len(data)
        assert data[160:256] == bytes(96) and data[159] == 0
        self.header["name"] = self.header["name"].rstrip(b"\0").decode()

        self.covered = [(0, 256 + 96 * self.header["n_tensors"])]  # (start, end) of all sections, in order
        at, size = self.header["tokenizer_offset"], self.header["tokenizer_size"]
        assert at % 64 == 0
        self.covered.append((at, at + size))
        self.tokenizer = self.read_tokenizer(data[at:at + size])

        self.tensors = {}
        for i in range(self.header["n_tensors"]):
            entry = data[256 + 96 * i:352 + 96 * i]
            name, kind, group, rows, cols, offset, size = struct.unpack("<48sIIQQQQ", entry[:88])
            assert entry[88:] == bytes(8) and name[47] == 0 and group == 0 and offset % 64 == 0 and kind in (1, 2)
            dtype = np.dtype({1: "<f4", 2: "<f2"}[kind])
            n_panels = -(-rows // 32)
            assert size == n_panels * 32 * cols * dtype.itemsize
            self.covered.append((offset, offset + size))
            array = np.empty((n_panels * 32, cols), dtype)
            flat = np.frombuffer(data, dtype, n_panels * 32 * cols, offset).reshape(n_panels, cols, 32)
            for r in range(n_panels * 32):
                array[r] = flat[r // 32, :, r % 32]
            assert not array[rows:].any(), "rows that do not exist are zeros"
            self.tensors[name.rstrip(b"\0").decode()] = {1: "f32", 2: "f16"}[kind], array[:rows]

        end = 0
        for start, stop in self.covered:  # ascending, only alignment between them, and that is zeros
            assert end <= start < end + 64 and data[end:start] == bytes(start - end)
            end = stop
        assert end == len(data)

    @staticmethod
    def read_tokenizer(data):
        kind, n, flags, unk, bos, *eos = struct.unpack_from("<IIIiiiii", data)
        assert kind == 1
        pieces, at = [], 32
        for _ in range(n):
            score, kind, length = struct.unpack_from("<fHH", data, at)
            pieces.append((data[at + 8:at + 8 + length].decode(), score, kind))
            at += 8 + length
        assert at == len(data)
        return dict(pieces=pieces, flags=flags, unk=unk, bos=bos, eos=eos)


def expected_tensors(c, source, tied):
    """[(name, array f32)] in the file's order from the Hugging Face tensors."""
    f = {name: x.astype(np.float32) for name, x in source.items()}
    out = [("token_embedding", f["model.embed_tokens.weight"])]
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        out += [(f"layers.{i}.rms_att_weight", f[h + "input_layernorm.weight"][:, None]),
                (f"layers.{i}.wqkv", np.concatenate([f[h + f"self_attn.{p}_proj.weight"] for p in "qkv"])),
                (f"layers.{i}.wo", f[h + "self_attn.o_proj.weight"]),
                (f"layers.{i}.rms_ffn_weight", f[h + "post_attention_layernorm.weight"][:, None]),
                (f"layers.{i}.w13", np.concatenate([f[h + "mlp.gate_proj.weight"], f[h + "mlp.up_proj.weight"]])),
                (f"layers.{i}.w2", f[h + "mlp.down_proj.weight"])]
    out.append(("rms_final_weight", f["model.norm.weight"][:, None]))
    return out + ([] if tied else [("wcls", f["lm_head.weight"])])


def check_tensors(got, config, source, dtype, tied=False):
    expected = expected_tensors(config, source, tied)
    assert list(got.tensors) == [name for name, _ in expected]
    for name, x in expected:
        kind, array = got.tensors[name]
        assert kind == ("f32" if "rms" in name else dtype), name
        assert array.shape == x.shape, name
        assert np.array_equal(array, x.astype(np.float16 if kind == "f16" else np.float32)), name


# ---------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("source, shards, tied", [
    (["BF16"], 1, False), (["F16"], 1, True), (["F32"], 3, False), (["BF16", "F32", "F16"], 4, True)])
def test_every_value(tmp_path, dtype, source, shards, tied):
    config = {**ODD, "tie_word_embeddings": tied}
    tensors = random_tensors(config, source)
    got = export(hf_directory(tmp_path / "odd model", config, tensors, shards), "--dtype", dtype)
    check_tensors(got, config, tensors, dtype, tied)
    expected = dict(dim=40, hidden_dim=100, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=14, vocab_size=77, window=19,
                    max_positions=512, norm_eps=np.float32(1e-5), rope_theta=12345.0, chat_template=0, name="odd model")
    assert {key: got.header[key] for key in expected} == expected


def test_tied_ignores_lm_head_and_inv_freq(tmp_path):
    config = {**ODD, "tie_word_embeddings": True}
    tensors = random_tensors(ODD)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(7, np.float32)
    check_tensors(export(hf_directory(tmp_path / "m", config, tensors)), config, tensors, "f16", tied=True)


def test_matrices_of_several_blocks(tmp_path):
    """A block is about a million numbers: here a tensor takes three, and q, k and v meet inside of one."""
    config = {**ODD, "hidden_size": 1030, "num_attention_heads": 100, "num_key_value_heads": 50, "intermediate_size": 1500, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    check_tensors(export(hf_directory(tmp_path / "m", config, tensors)), config, tensors, "f16")


def test_f16_rounds_to_nearest_even(tmp_path):
    tensors = random_tensors(ODD, ["F32"])
    row = tensors["model.embed_tokens.weight"][3]
    row[:8] = [1 + 2**-11, 1 + 3 * 2**-11, 65519.996, -65519.996, 2**-25, 3 * 2**-26, 2**-24, -0.0]
    got = export(hf_directory(tmp_path / "m", ODD, tensors)).tensors["token_embedding"][1][3, :8]
    assert got.tolist() == [1, 1 + 2**-9, 65504, -65504, 0, 2**-24, 2**-24, 0]


def test_tiny_mistral(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    got = export(tmp_path / "tiny")
    with open(os.path.join(TINY, "config.json")) as file:
        config = json.load(file)
    check_tensors(got, config, load_file(os.path.join(TINY, "model.safetensors")), "f16")
    check_sentencepiece(got.tokenizer, os.path.join(TINY, "tokenizer.model"))
    assert (got.header["window"], got.header["vocab_size"], got.tokenizer["bos"], got.tokenizer["eos"]) == (128, 2048, 1, [2, -1, -1])


def without(*keys, **change):
    return {**{key: value for key, value in ODD.items() if key not in keys}, **change}


@pytest.mark.parametrize("config, expected", [
    (without("rope_theta"), dict(rope_theta=10000.0)),
    (without("rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 1e6}), dict(rope_theta=1e6)),
    (without(rope_theta=1000000), dict(rope_theta=1e6)),
    (without(sliding_window=None), dict(window=0)),
    (without("sliding_window"), dict(window=4096)),
    (without(layer_types=["full_attention"] * 2), dict(window=0)),
    (without(layer_types=["sliding_attention"] * 2), dict(window=19)),
    (without("head_dim", hidden_size=84), dict(head_dim=14, dim=84)),
    (without(head_dim=None, hidden_size=84), dict(head_dim=14)),
    (without("num_key_value_heads", num_attention_heads=16), dict(n_kv_heads=8)),
    (without(num_key_value_heads=None), dict(n_kv_heads=6)),
    (without("rms_norm_eps"), dict(norm_eps=np.float32(1e-6))),
    (without("max_position_embeddings"), dict(max_positions=131072)),
    (without("architectures", "hidden_act", "tie_word_embeddings", attention_bias=False, rope_scaling=None), dict(dim=40)),
])
def test_config(tmp_path, config, expected):
    full = {**config, "num_key_value_heads": expected.get("n_kv_heads", 3)}
    got = export(hf_directory(tmp_path / "m", config, random_tensors(full)))
    assert {key: got.header[key] for key in expected} == expected


def test_long_names_are_cut_at_a_character(tmp_path):
    assert export(hf_directory(tmp_path / ("é" * 60))).header["name"] == "é" * 33


def test_names_without_control_characters(tmp_path):
    done = run(hf_directory(tmp_path / "a\tb\x1b[2J"), "-")
    assert done.returncode == 0 and Checkpoint(done.stdout).header["name"] == "a?b?[2J"


def test_pipe_equals_file(tmp_path):
    directory = hf_directory(tmp_path / "m")
    done = run(directory, "-")
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1 and b" layers, " in done.stderr
    assert done.stdout == export(directory).data


def test_replaces_target_keeps_link(tmp_path):
    directory = hf_directory(tmp_path / "m")
    (tmp_path / "real.bin").write_text("old")
    (tmp_path / "link.bin").symlink_to("real.bin")
    assert run(directory, tmp_path / "link.bin").returncode == 0
    assert (tmp_path / "link.bin").is_symlink() and (tmp_path / "real.bin").read_bytes()[:8] == b"mistralc"


def test_memory_stays_below_the_largest_tensor(tmp_path):
    """The peak of an export with a 128 MB tensor against one with a small one (the rest is Python and its libraries)."""
    def peak(directory):
        code = (f"import resource, sys; sys.path.insert(0, {ROOT!r}); import export\n"
                f"export.export({str(directory)!r}, '/dev/null', 'f16'); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    small = hf_directory(tmp_path / "small")
    large = hf_directory(tmp_path / "large", {**ODD, "tie_word_embeddings": True, "vocab_size": 1600000}, tokenizer=None)
    assert peak(large) - peak(small) < 60000  # kilobytes


# ---------------------------------------------------------------------------- tokenizers


def check_sentencepiece(got, path):
    """The tokenizer section against SentencePiece's own view of the model."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else None for i in range(len(sp))]
    assert len(got["pieces"]) == len(sp)
    for i, (text, score, kind) in enumerate(got["pieces"]):
        assert (text, score) == (sp.id_to_piece(i), sp.get_score(i))
        assert kind == types[i] or types[i] is None and kind in (1, 4)
    assert (got["unk"], got["bos"]) == (sp.unk_id(), sp.bos_id())
    assert got["flags"] == 3


def tokenizer_only(path, n_pieces, **options):
    """A directory with next to no weights for a tokenizer of n_pieces."""
    config = without("bos_token_id", "eos_token_id", vocab_size=n_pieces, hidden_size=4, intermediate_size=4, head_dim=2)
    return hf_directory(path, config, **options)


def rebuilt(tokenizer):
    """A SentencePiece processor that works with what the file holds."""
    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in tokenizer["pieces"]:
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = bool(tokenizer["flags"] & 2)
    proto.normalizer_spec.CopyFrom(sentencepiece_model_pb2.NormalizerSpec(
        name="identity", remove_extra_whitespaces=False, add_dummy_prefix=bool(tokenizer["flags"] & 1)))
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def sources():
    return [pytest.param(path, id=name, marks=pytest.mark.skipif(not os.path.exists(path), reason=f"no {path}"))
            for name, path in {"tiny": os.path.join(TINY, "tokenizer.model"), **MISTRAL}.items()]


@pytest.mark.parametrize("path", sources())
def test_sentencepiece(tmp_path, path):
    got = export(tokenizer_only(tmp_path / "m", 33000, tokenizer=path)).tokenizer
    check_sentencepiece(got, path)
    assert got["eos"] == [2, -1, -1]


def tokenizer_json(path, order="lengths", metaspace=None, prefix=True):
    """tokenizer.json as transformers' converter makes it: a pair (l, r) for each way to put a piece together from two.

    order: how pieces of one score are sorted: "lengths" (of l, r), or "ids", as older versions did."""
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece in proto.pieces:
        text = piece.piece
        local = [(text[:i], text[i:], piece.score) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
        merges += sorted(local, key=lambda merge: (vocab[merge[0]], vocab[merge[1]]))
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])) if order == "lengths" else merge[2], reverse=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece.piece, "special": piece.type != 4, "normalized": False}
                         for i, piece in enumerate(proto.pieces) if piece.type in (2, 3, 4)],
        "normalizer": None if metaspace else {"type": "Sequence", "normalizers": [prepend, replace] if prefix else [replace]},
        "pre_tokenizer": metaspace,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
                  "merges": [f"{l} {r}" if order == "lengths" else [l, r] for l, r, _ in merges]}}


TEXTS = ["Once upon a time, there was a king.", "   three spaces,  two,\n\n\ttabs\t\t", "", " ", "Ünïcödé 日本語 \u2581 🦙 <s>[INST] x</s>",
         "the therein thereinafter; 1234567890 0x1F != 3.14159", "a" * 50, " " * 15 + "indented" + " " * 33 + "x"]


@pytest.mark.parametrize("order", ["lengths", "ids"])
@pytest.mark.parametrize("path", sources())
def test_tokenizer_json(tmp_path, path, order):
    source = tokenizer_json(path, order)
    got = export(tokenizer_only(tmp_path / "m", 33000, tokenizer=False, files={"tokenizer.json": source})).tokenizer
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [text for text, _, _ in got["pieces"]] == [sp.id_to_piece(i) for i in range(len(sp))]
    assert (got["flags"], got["unk"], got["bos"], got["eos"]) == (3, 0, 1, [2, -1, -1])
    control = [i for i in range(len(sp)) if sp.is_control(i)]
    assert [i for i, piece in enumerate(got["pieces"]) if piece[2] == 3] == control
    assert [i for i, piece in enumerate(got["pieces"]) if piece[2] == 6] == [i for i in range(len(sp)) if sp.is_byte(i)]

    # The merged pieces stand in SentencePiece's order. "ids" gives pieces of one score different ranks.
    made = {left + right for left, right in (m.split(" ") if isinstance(m, str) else m for m in source["model"]["merges"])}
    ours = [(score, sp.get_score(i)) for i, (text, score, kind) in enumerate(got["pieces"]) if kind == 1 and text in made]
    assert len(ours) > 1000
    ours.sort(reverse=True)
    assert all(a[1] >= b[1] for a, b in zip(ours, ours[1:]))
    assert all(score == -1e9 for text, score, kind in got["pieces"] if kind == 1 and text not in made)

    if order == "lengths":  # with ids, runs of spaces are joined otherwise, by tokenizers itself too
        other = rebuilt(got)
        with open(os.path.join(ROOT, "FORMAT.md"), encoding="utf-8") as file:
            for text in [*TEXTS, file.read()]:
                assert other.encode(text) == sp.encode(text), text


def test_merge_scores():
    merges = [("a", "b"), ("aaa", "b"), ("aa", "b"), ("a", "aab"), ("c", "c")]
    assert export_py.merge_scores(merges) == {"ab": -1, "aaab": -2, "aab": -2, "cc": -3}  # aaab and aab are tied
    with pytest.raises(export_py.Bad, match="model.merges"):
        export_py.merge_scores([("a", "b"), ("a", "aab"), ("aa", "b"), ("aaa", "b")])  # as no tie is written


@pytest.mark.parametrize("scheme, flags", [("always", 3), ("first", 3), ("never", 2)])
def test_tokenizer_json_metaspace(tmp_path, scheme, flags):
    source = tokenizer_json(os.path.join(TINY, "tokenizer.model"),
                            metaspace={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False})
    assert export(tokenizer_only(tmp_path / "m", 2048, tokenizer=False, files={"tokenizer.json": source})).tokenizer["flags"] == flags


def test_tokenizer_json_without_prefix_and_with_new_tokens(tmp_path):
    source = tokenizer_json(os.path.join(TINY, "tokenizer.model"), prefix=False)
    source["added_tokens"] += [{"id": 2048, "content": "[INST]", "special": True}, {"id": 2050, "content": "word", "special": False}]
    settings = {"bos_token": {"content": "[INST]"}, "eos_token": "[INST]", "chat_template": "[INST]"}
    files = {"tokenizer.json": source, "tokenizer_config.json": settings}
    got = export(tokenizer_only(tmp_path / "m", 2051, tokenizer=False, files=files))
    assert got.tokenizer["flags"] == 2
    assert got.tokenizer["pieces"][2048:] == [("[INST]", 0, 3), ("", 0, 3), ("word", 0, 4)]
    assert (got.tokenizer["bos"], got.tokenizer["eos"], got.header["chat_template"]) == (2048, [2048, -1, -1], 2)


def test_added_tokens(tmp_path):
    files = {"added_tokens.json": {"[PAD]": 60, "<|end|>": 63},
             "tokenizer_config.json": {"added_tokens_decoder": {
                 "0": {"content": "<unk>", "special": True}, "3": {"content": "\u2581t", "special": True},
                 "63": {"content": "<|end|>", "special": False}, "64": {"content": "hello there", "special": False}}}}
    got = export(hf_directory(tmp_path / "m", files=files)).tokenizer["pieces"]
    assert got[60:] == [("[PAD]", 0, 3), ("", 0, 3), ("", 0, 3), ("<|end|>", 0, 4), ("hello there", 0, 4)]
    assert got[3] == ("\u2581t", 0, 1)


@pytest.mark.parametrize("config, generation, bos, eos", [
    ({"bos_token_id": 5, "eos_token_id": [7, 8]}, None, 5, [7, 8, -1]),
    ({"bos_token_id": 5, "eos_token_id": 7}, {"eos_token_id": [1, 2, 3]}, 5, [1, 2, 3]),
    ({"bos_token_id": 5, "eos_token_id": 7}, {"bos_token_id": 6}, 5, [7, -1, -1]),
    ({"bos_token_id": None, "eos_token_id": None}, None, 1, [2, -1, -1])])
def test_bos_and_eos(tmp_path, config, generation, bos, eos):
    files = {"generation_config.json": generation} if generation else {}
    got = export(hf_directory(tmp_path / "m", {**ODD, **config}, files=files)).tokenizer
    assert (got["bos"], got["eos"]) == (bos, eos)


def with_piece(text, kind):
    proto = small_sentencepiece()
    proto.pieces[10].piece, proto.pieces[10].type = text, kind
    return proto


@pytest.mark.parametrize("files, tokenizer, expected", [
    ({"tokenizer_config.json": {"chat_template": "{{ '[INST] ' + x }}"}}, None, 1),
    ({"tokenizer_config.json": {"chat_template": "{{ '[INST] ' + x }}"}}, with_piece("[INST]", 3), 2),
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "[INST]"}]}}, None, 1),
    ({"tokenizer_config.json": {"chat_template": [{"name": "tool", "template": "[INST]"}]}}, None, 0),
    ({"chat_template.jinja": "[INST]"}, with_piece("[INST]", 1), 1),
    ({"chat_template.json": {"chat_template": "[INST]"}}, with_piece("[INST]", 3), 2),
    ({"tokenizer_config.json": {"chat_template": "<|im_start|>"}}, None, 0),
    ({}, with_piece("[INST]", 3), 0)])
def test_chat_template(tmp_path, files, tokenizer, expected):
    assert export(hf_directory(tmp_path / "m", tokenizer=tokenizer, files=files)).header["chat_template"] == expected


# ---------------------------------------------------------------------------- what is refused


def refused(directory, *words):
    """Exit status 1, one line with all the words, no target, nothing temporary."""
    before = sorted(os.listdir(directory.parent))
    status, text = call(directory, directory.parent / "out.bin")
    assert status == 1, text
    assert text.startswith("export.py: ") and text.count("\n") == 1
    for word in words:
        assert word in text, text
    assert sorted(os.listdir(directory.parent)) == before


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, ["model_type", '"llama"']),
    ({"architectures": ["MixtralForCausalLM"]}, ["architectures", "MixtralForCausalLM"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention", "sliding_attention"]),
    ({"layer_types": ["chunked_attention"] * 2}, ["layer_types", "chunked_attention"]),
    ({"layer_types": ["full_attention"] * 3}, ["layer_types", "num_hidden_layers 2"]),
    ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, ["layer_types", "sliding_window null"]),
    ({"layer_types": []}, ["config.json"]),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling", "linear"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_parameters.rope_type", '"yarn"']),
    ({"rope_parameters": 5}, ["config.json"]),
    ({"hidden_act": "gelu"}, ["hidden_act", '"gelu"']),
    ({"attention_bias": True}, ["attention_bias", "true"]),
    ({"mlp_bias": True}, ["mlp_bias", "true"]),
    ({"quantization_config": {"quant_method": "hqq", "nbits": 4}}, ["quantization_config", "quant_method", '"hqq"']),
    ({"quantization_config": {}}, ["quantization_config"]),
    ({"head_dim": 15}, ["head_dim", "15"]),
    ({"head_dim": None}, ["hidden_size", "40", "num_attention_heads", "6"]),
    ({"num_key_value_heads": 4}, ["num_attention_heads", "6", "num_key_value_heads", "4"]),
    ({"hidden_size": None}, ["hidden_size"]),
    ({"hidden_size": "40"}, ["hidden_size", '"40"']),
    ({"hidden_size": 40.0}, ["hidden_size", "40.0"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "true"]),
    ({"num_hidden_layers": 2**40}, ["num_hidden_layers"]),
    ({"num_hidden_layers": 2**30}, ["num_hidden_layers", "1073741824", "65536"]), ({"head_dim": 514}, ["head_dim", "514", "512"]),
    ({"num_hidden_layers": 50000}, ["model.layers.2.input_layernorm.weight", "missing"]),
    ({"num_hidden_layers": 1}, ["model.layers.1.input_layernorm.weight"]),
    ({"sliding_window": 0}, ["sliding_window", "0"]),
    ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
    ({"rms_norm_eps": 1}, ["rms_norm_eps", "1"]), ({"rms_norm_eps": 1 - 1e-9}, ["rms_norm_eps", "0.999999999"]),  # 1 as FP32
    ({"rope_theta": float("nan")}, ["rope_theta", "NaN"]),
    ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", '"no"']),
    ({"bos_token_id": 77}, ["bos_token_id", "77"]),
    ({"eos_token_id": [1, 2, 3, 4]}, ["eos_token_id", "[1, 2, 3, 4]"]),
    ({"eos_token_id": "x"}, ["eos_token_id", '"x"']),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "full_attention"]),
    ({"intermediate_size": 99}, ["mlp.gate_proj.weight", "[100, 40]", "[99, 40]"])])
def test_config_refused(tmp_path, change, words):
    refused(hf_directory(tmp_path / "m", {**ODD, **change}, random_tensors(ODD)), *words)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"])
def test_required_keys(tmp_path, key):
    refused(hf_directory(tmp_path / "m", without(key), random_tensors(ODD)), "config.json", key)


def change(name, f):
    """A change of one tensor, for the test below."""
    def apply(tensors):
        tensors[name] = f(tensors[name])
    return apply


def put(index, value):
    def apply(x):
        x = x.astype(np.float32)
        x[index] = value
        return x
    return apply


V = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize("change, words", [
    (change(V, lambda x: np.ascontiguousarray(x.T)), [V, "[40, 42]", "[42, 40]"]),
    (change(V, lambda x: x[:-1]), [V, "[41, 40]", "[42, 40]"]),
    (change("model.norm.weight", lambda x: x[:, None]), ["model.norm.weight", "[40, 1]", "[40]"]),
    (change(V, lambda x: x.astype(np.int8)), [V, "I8"]),
    (change(V, lambda x: x.astype(np.float64)), [V, "F64"]),
    (change(V, put((41, 39), np.nan)), [V, "not finite"]),
    (change(V, put((0, 0), -np.inf)), [V, "not finite"]),
    (change(V, put((20, 5), 65520.0)), [V, "65520", "--dtype f32"]),
    (change(V, put((20, 5), -1e30)), [V, "--dtype f32"]),
    (change("model.norm.weight", put(7, np.inf)), ["model.norm.weight", "not finite"]),
    (lambda t: t.pop(V), [V, "missing"]),
    (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
    (lambda t: t.update({V.replace("weight", "bias"): np.zeros(42, np.float32)}), [V.replace("weight", "bias")]),
    (lambda t: t.update({"lm_head.bias": np.zeros(77, np.float32)}), ["lm_head.bias"])])
def test_tensor_refused(tmp_path, change, words):
    tensors = random_tensors(ODD)
    change(tensors)
    refused(hf_directory(tmp_path / "m", ODD, tensors), *words)


def test_large_values_are_exported_as_f32(tmp_path):
    tensors = random_tensors(ODD)
    change(V, put((20, 5), 1e30))(tensors)
    tensors["model.norm.weight"] = put(0, 1e6)(tensors["model.norm.weight"])  # a norm is f32 in any case
    directory = hf_directory(tmp_path / "m", ODD, tensors)
    check_tensors(export(directory, "--dtype", "f32"), ODD, tensors, "f32")
    refused(directory, V)


def test_files_refused(tmp_path):
    shards = hf_directory(tmp_path / "shards", shards=3)
    second = shards / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    for data in whole[:-5], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\n":
        second.write_bytes(data)
        refused(shards, "model-00002-of-00003.safetensors")
    second.unlink()
    refused(shards, "model-00002-of-00003.safetensors", "missing")
    (shards / "model.safetensors.index.json").write_text("[1]")
    refused(shards, "model.safetensors.index.json")
    (shards / "model.safetensors.index.json").unlink()
    refused(shards, "model.safetensors", "missing")

    one = hf_directory(tmp_path / "one")
    for text in "", "{", "[]", "3", '"' + "x" * 10, "[" * 100000, "\xff":
        (one / "config.json").write_text(text, encoding="latin-1")
        refused(one, "config.json")
    (one / "config.json").unlink()
    refused(one, "config.json")
    os.mkfifo(one / "config.json")
    refused(one, "config.json", "not a regular file")
    refused(tmp_path / "nowhere", "nowhere", "directory")


def changed_sentencepiece(spec, key, value):
    proto = small_sentencepiece()
    setattr(getattr(proto, spec), key, value)
    return proto


@pytest.mark.parametrize("tokenizer, words", [
    (changed_sentencepiece("trainer_spec", "model_type", 1), ["model_type", "UNIGRAM"]),
    (changed_sentencepiece("trainer_spec", "treat_whitespace_as_suffix", True), ["treat_whitespace_as_suffix", "true"]),
    (changed_sentencepiece("trainer_spec", "byte_fallback", True), ["0 byte"]),
    (changed_sentencepiece("normalizer_spec", "name", "nmt_nfkc"), ["normalizer_spec.name", "nmt_nfkc"]),
    (changed_sentencepiece("normalizer_spec", "precompiled_charsmap", b"x"), ["precompiled_charsmap"]),
    (changed_sentencepiece("normalizer_spec", "remove_extra_whitespaces", True), ["remove_extra_whitespaces", "true"]),
    (changed_sentencepiece("normalizer_spec", "escape_whitespaces", False), ["escape_whitespaces", "false"]),
    (with_piece("spare", 5), ["UNUSED", "10", "spare"]),
    (with_piece("again", 2), ["2 unknown"]),
    *((with_piece(text, 6), ["piece 10", text, "<0xHH>"]) for text in ("<0xG0>", "<0x+1>", "<0x1>", "<0x012>", "a")),
    (with_piece("x" * 70000, 1), ["piece 10"]),
    (sentencepiece_model_pb2.ModelProto(), ["tokenizer"])])
def test_sentencepiece_refused(tmp_path, tokenizer, words):
    directory = hf_directory(tmp_path / "m", tokenizer=tokenizer)
    if not tokenizer.pieces:
        (directory / "tokenizer.model").write_bytes(b"version https://git-lfs")
    refused(directory, *words)


@pytest.mark.parametrize("files, words", [
    ({"added_tokens.json": {"<pad>": 5}}, ["5", "<pad>"]),
    ({"added_tokens.json": {"<pad>": 77}}, ["78", "77", "vocab_size"]),
    ({"added_tokens.json": {"<pad>": 10**12}}, ["vocab_size"]),
    ({"added_tokens.json": {"<pad>": "x"}}, ["added_tokens.json"]),
    ({"added_tokens.json": {"<pad>": -1000}}, ["added_tokens.json"]),
    ({"added_tokens.json": {"<pad>": -1}}, ["-1", "<pad>"]),
    ({"added_tokens.json": '{"\\ud800": 60}'}, ["added_tokens.json", "surrogate"]),
    ({"added_tokens.json": {"a": 60}, "tokenizer_config.json": {"added_tokens_decoder": {"60": {"content": "b"}}}}, ["60", '"a"', '"b"']),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"60": "b"}}}, ["tokenizer_config.json"]),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"60": {"content": 7}}}}, ["tokenizer"]),
    ({"tokenizer_config.json": {"chat_template": 7}}, ["chat_template"]),
    ({"generation_config.json": {"eos_token_id": 99}}, ["generation_config.json", "eos_token_id", "99"])])
def test_added_tokens_refused(tmp_path, files, words):
    refused(hf_directory(tmp_path / "m", files=files), *words)


def test_more_pieces_than_vocabulary_refused(tmp_path):
    refused(hf_directory(tmp_path / "m", {**ODD, "vocab_size": 59}), "60", "59", "vocab_size")


def test_no_tokenizer_refused(tmp_path):
    refused(hf_directory(tmp_path / "m", tokenizer=False), "tokenizer.model", "tokenizer.json")


def test_tokenizer_json_refused(tmp_path):
    directory = tokenizer_only(tmp_path / "m", 2048, tokenizer=False)
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    byte_level = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}

    def merges(f):
        def apply(t):
            t["model"]["merges"] = f(t["model"]["merges"])
        return apply

    for change, words in [
            (lambda t: t["model"].update(type="Unigram"), ["model.type", '"Unigram"']),
            (lambda t: t["model"].update(byte_fallback=False), ["model.byte_fallback", "false"]),
            (lambda t: t["model"].update(ignore_merges=True), ["model.ignore_merges", "true"]),
            (lambda t: t["model"].update(unk_token=None), ["model.unk_token", "null"]),
            (lambda t: t.update(pre_tokenizer=byte_level, normalizer=None), ["model.type BPE", "ByteLevel", "tiktoken"]),
            (lambda t: t.update(normalizer={"type": "NFKC"}), ["normalizer", "NFKC"]),
            (lambda t: t.update(pre_tokenizer=metaspace), ["normalizer"]),
            (lambda t: t.update(normalizer=None, pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer.type", '"Whitespace"']),
            (lambda t: t.update(normalizer=None), ["pre_tokenizer.type", "null"]),
            (lambda t: t.update(normalizer=None, pre_tokenizer={**metaspace, "replacement": "_"}), ["pre_tokenizer.replacement", '"_"']),
            (lambda t: t.update(normalizer=None, pre_tokenizer={**metaspace, "split": True}), ["pre_tokenizer.split", "true"]),
            (lambda t: t.update(normalizer=None, pre_tokenizer={**metaspace, "prepend_scheme": "x"}), ["prepend_scheme", '"x"']),
            (merges(lambda m: m[::2] + m[1::2]), ["model.merges"]),  # the pairs of a piece no longer neighbours
            (merges(lambda m: m + ["q \u2581zebra"]), ["model.merges", "q\u2581zebra"]),
            (merges(lambda m: m + ["a b c"]), ["tokenizer.json"]),
            (lambda t: t["model"].pop("merges"), ["tokenizer.json", "merges"]),
            (lambda t: t["model"]["vocab"].update(new=5), ["model.vocab"]),
            (lambda t: t["added_tokens"].append({"id": 700, "content": "x", "special": True}), ["700", '"x"'])]:
        source = tokenizer_json(os.path.join(TINY, "tokenizer.model"))
        change(source)
        (directory / "tokenizer.json").write_text(json.dumps(source))
        refused(directory, *words)


# ---------------------------------------------------------------------------- the command line


def test_usage(tmp_path):
    for arguments in [], ["x"], ["x", "y", "z"], ["x", "y", "--dtype", "q8"], ["x", "y", "--what"]:
        done = run(*arguments)
        assert done.returncode == 2 and b"Traceback" not in done.stderr
    done = run("--help")
    assert done.returncode == 0 and done.stdout.count(b"\n") <= 24 and b"--dtype" in done.stdout


def test_missing_package(tmp_path):
    (tmp_path / "safetensors.py").write_text("raise ImportError('No module named safetensors')")
    done = run("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"pip install -r requirements.txt" in done.stderr


def test_target_that_cannot_be_written(tmp_path):
    directory = hf_directory(tmp_path / "m")
    for out in "/dev/full", tmp_path, tmp_path / "no" / "out.bin":
        done = run(directory, out)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and str(out).encode() in done.stderr
    assert os.listdir(tmp_path) == ["m"] and not os.path.isfile("/dev/full")


def test_target_that_is_read(tmp_path):
    """Neither what is read nor the directory around an empty name is replaced; what else is in the source may be."""
    directory = hf_directory(tmp_path / "m")
    for name in "model.safetensors", "config.json", "tokenizer.model":
        data = (directory / name).read_bytes()
        status, text = call(directory, directory / name)
        assert status == 1 and text.count("\n") == 1 and name in text and "files that are read" in text
        assert (directory / name).read_bytes() == data
    for _ in range(2):
        status, text = call(directory, directory / "model.bin")
        assert status == 0, text
    for arguments in [directory], ["--to", "hf", directory / "model.bin"], ["--to", "gguf", directory / "model.bin"]:
        status, text = call(*arguments, "")
        assert status == 1 and text == "export.py: OUT is empty (give it a name)\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_appends_to_standard_output(tmp_path, name):
    directory = hf_directory(tmp_path / "m")
    with open(tmp_path / "all", "ab") as file:
        file.write(b"before")
        file.flush()
        assert subprocess.run([sys.executable, EXPORT, directory, name], stdout=file, stderr=subprocess.PIPE).returncode == 0
    assert (tmp_path / "all").read_bytes() == b"before" + export(directory).data


def test_closed_stderr(tmp_path):
    """Messages must not end up in the checkpoint, on whatever descriptor it is."""
    directory = hf_directory(tmp_path / "m")
    done = run(directory, "-", preexec_fn=lambda: os.close(2))
    assert done.returncode == 0 and done.stdout == export(directory).data
    done = run(directory, "/dev/full", preexec_fn=lambda: os.close(2))
    assert done.returncode == 1 and done.stdout == b""


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for a full disk: in the middle of a write and at the last one, in close()."""
    directory, out = hf_directory(tmp_path / "m"), tmp_path / "out.bin"
    size = len(export(directory).data)
    (tmp_path / "m.bin").unlink()
    for limit in 1000, 50000, size - 1:
        done = run(directory, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and str(out).encode() in done.stderr
        assert os.listdir(tmp_path) == ["m"]


def test_closed_pipe(tmp_path):
    process = subprocess.Popen([sys.executable, EXPORT, str(hf_directory(tmp_path / "m")), "-"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait() == 1 and error.count("\n") == 1 and "roken pipe" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tmp_path, number):
    """With a slowed-down source; the signal comes when the temporary file is there."""
    hf_directory(tmp_path / "m")
    code = (f"import sys, time; sys.path.insert(0, {ROOT!r}); import export; rows = export.Weights.rows\n"
            "export.Weights.rows = lambda *a: (time.sleep(0.5), rows(*a))[1]\n"
            "sys.argv = ['export.py', 'm', 'out.bin']; sys.exit(export.main())")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not [name for name in os.listdir(tmp_path) if name.startswith("out.bin.tmp")]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.stderr.read().decode()
    assert process.wait() == 1 and error == "export.py: out.bin: interrupted\n"
    assert os.listdir(tmp_path) == ["m"]


def test_progress_on_a_terminal(tmp_path):
    directory, (master, slave) = hf_directory(tmp_path / "m"), pty.openpty()
    process = subprocess.Popen([sys.executable, EXPORT, str(directory), str(tmp_path / "out.bin")], stderr=slave)
    assert process.wait() == 0
    os.close(slave)
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert re.search(r"\d+%, \d+ MB/s, \d+:\d\d left", text)
    assert re.search(r"out\.bin: [\d.]+ MB, f16, 2 layers, window 19, 60 pieces, chat template none\r\n$", text)
