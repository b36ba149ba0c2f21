"""Tests of lora_merge.py and of export.py --lora: against what PEFT itself makes (tests/golden/lora, lora-treasure.json, both by
make_golden_lora.py), and what must be refused. Needs numpy, ml_dtypes, safetensors, sentencepiece, protobuf, pytest; ./run."""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import export  # noqa: E402
import lora_merge  # noqa: E402
from test_export import ODD, Checkpoint, hf_directory, random_tensors, small_sentencepiece  # noqa: E402
from test_golden import perplexity, run  # noqa: E402

GOLDEN = os.path.join(HERE, "golden", "lora")
BASE = os.path.join(GOLDEN, "base")
TINY, TREASURE = (os.path.join(ROOT, "demo", name) for name in ("tiny-mistral", "lora-treasure"))
MERGED = load_file(os.path.join(GOLDEN, "merged.safetensors"))
with safe_open(os.path.join(GOLDEN, "merged.safetensors"), "numpy") as golden_file:
    LINES = json.loads(golden_file.metadata()["merges"])  # name -> [[adapter, weight]]
with open(os.path.join(HERE, "golden", "lora-treasure.json")) as golden_file:
    TREASURE_GOLDEN = json.load(golden_file)

# FP32 sums of a few products, and DoRA's division by a length, in another order than PEFT's: a few units in the last place
# of the largest value. A wrong scaling, rank or order is thousands of times larger.
TOLERANCE = 5e-7

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # what ends the scripts, cleanly


def call(module, *arguments):
    """A script's main() in this process: exit status and what it says."""
    text, argv, handlers = io.StringIO(), sys.argv, [signal.getsignal(number) for number in STOPS]
    sys.argv = [module.__file__, *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(text):
            return module.main(), text.getvalue()
    finally:
        sys.argv = argv
        assert [signal.getsignal(number) for number in STOPS] == handlers


def merge(*arguments):
    """Run lora_merge.py; the tensors of OUT, which is the last of the arguments that is no option, and what was said."""
    status, text = call(lora_merge, *arguments)
    assert status == 0, text
    out = [argument for argument in arguments if isinstance(argument, os.PathLike)][-1]
    tensors = {}
    for name in os.listdir(out):
        if name.endswith(".safetensors"):
            tensors.update(load_file(os.path.join(out, name)))
    return tensors, text


def exported(directory, *options):
    """The checkpoint that export.py makes of a directory in f32, from its tensors on: the name in the header differs."""
    out = directory.parent / "exported.bin"
    status, text = call(export, directory, out, "--dtype", "f32", *options)
    assert status == 0, text
    data = out.read_bytes()
    Checkpoint(data)
    return data[:92] + data[160:]


def near(got, expected):
    assert got.shape == expected.shape
    assert not np.abs(got - expected).max() > TOLERANCE * np.abs(expected).max()  # NaN fails the next
    assert np.isfinite(got).all()


def f32(tensors):
    return {name: x.astype(np.float32) for name, x in tensors.items()}


# ---------------------------------------------------------------------------- against PEFT


@pytest.fixture()
def base(tmp_path):
    """The golden base, with a tokenizer, as a directory that export.py takes."""
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(small_sentencepiece(20).SerializeToString())
    return tmp_path / "base"


@pytest.mark.parametrize("line", LINES)
def test_as_peft(tmp_path, base, line):
    """Every tensor is PEFT's, or the base's own; and export.py --lora writes the same bits as export.py of the merged directory."""
    adapters = [f"{GOLDEN}/{name}:{weight}" for name, weight in LINES[line]]
    options = ["--base-quant", "nf4"] if line.startswith("nf4") else []
    expected = f32(load_file(base / "model.safetensors"))
    if line == "nf4_dora":  # noted against nf4
        expected.update({name.split("/")[1]: x for name, x in MERGED.items() if name.startswith("nf4/")})
    changed = {name.split("/", 1)[1]: x for name, x in MERGED.items() if name.startswith(line + "/")}
    assert changed
    if not adapters:  # the 4-bit base by itself, which only export.py has a use for
        status, text = call(export, base, tmp_path / "nf4.bin", "--dtype", "f32", *options)
        assert status == 0, text
        weights = lora_merge.MergedWeights(lora_merge.Weights(base), json.loads((base / "config.json").read_text()), [], "nf4")
        got = {name: weights.rows(name, 0, x.shape[0]).reshape(x.shape) for name, x in expected.items()}
        assert all(np.array_equal(got[name], {**expected, **changed}[name]) for name in got)  # bitsandbytes' bits
        return
    got, text = merge(base, *adapters, tmp_path / "out", "--dtype", "f32", *options)
    assert got.keys() == expected.keys()
    for name, x in got.items():
        if name in changed:
            near(x, changed[name])
        else:
            assert np.array_equal(x, expected[name]), name
    lora_options = [option for adapter in adapters for option in ("--lora", adapter)]
    assert exported(tmp_path / "out") == exported(base, *lora_options, *options)


def test_treasure_as_peft(tmp_path):
    got, text = merge(TINY, TREASURE, tmp_path / "out", "--dtype", "f32")
    base = f32(load_file(os.path.join(TINY, "model.safetensors")))
    golden = TREASURE_GOLDEN["merged"]
    assert len(golden) == 42
    for name, x in got.items():
        if name in golden:
            expected = np.float32(golden[name]["values"])
            assert not np.abs(x.ravel()[golden[name]["at"]] - expected).max() > TOLERANCE * np.abs(x).max(), name
            assert math.isclose(np.square(x, dtype=np.float64).sum(), golden[name]["squares"], rel_tol=1e-6)
        else:
            assert np.array_equal(x, base[name])
    change = {name: np.linalg.norm(got[name] - base[name]) / np.linalg.norm(base[name]) for name in golden}
    most = max(change, key=change.get)
    assert text.splitlines()[:2] == [f"{TREASURE}: LoRA, rank 8, scaling 2, matrices: 42",
                                     f"matrices changed: 42, largest relative change {100 * change[most]:.3g}% ({most})"]


@pytest.fixture(scope="module")
def treasure(tmp_path_factory):
    """An f32 checkpoint of the demo model with its adapter."""
    out = str(tmp_path_factory.mktemp("treasure") / "treasure.bin")
    subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), TINY, out, "--dtype", "f32", "--lora", TREASURE], check=True)
    return out


def test_treasure_perplexity(treasure):
    golden = TREASURE_GOLDEN["eval"]["treasure-eval"]
    got = perplexity(treasure, os.path.join(HERE, "text", "treasure-eval.txt"))
    assert got["tokens"] == golden["tokens"] and abs(got["nll"] - golden["nll"]) <= 2e-5  # as in test_golden.py
    assert f"{got['ppl']:.3f}" == "28.917"


def test_treasure_greedy(treasure, tmp_path):
    for golden in TREASURE_GOLDEN["greedy"]:
        out = str(tmp_path / "out.json")
        run(treasure, "-i", golden["prompt"], "-n", str(len(golden["out_ids"])), "-t", "0", "-E", "-q", "-o", out)
        with open(out) as file:
            assert json.load(file)["sequences"][0]["ids"] == golden["out_ids"]


# ---------------------------------------------------------------------------- adapters made here

Q0, V1, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
SHAPES = {name: x.shape for name, x in random_tensors(ODD).items()}
EMBEDDING, CLASSIFIER = "model.embed_tokens.weight", "lm_head.weight"


def small_adapter(path, modules=(Q0,), rank=3, change=None, prefix="base_model.model.", files=None, seed=1, **config):
    """Write an adapter for ODD with random matrices for the modules, named in target_modules. change: name -> tensor, None to
    leave it out, added to it. Returns {module: scaling B A}."""
    rng, tensors, deltas = np.random.default_rng(seed), {}, {}
    for module in modules:
        out, cols = SHAPES[module + ".weight"]
        a, b = rng.standard_normal((rank, cols), dtype=np.float32), rng.standard_normal((out, rank), dtype=np.float32)
        tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"] = a, b
        deltas[module] = b @ a * np.float32(2)
    tensors = {name: x for name, x in {**tensors, **(change or {})}.items() if x is not None}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    for name, data in (files or {}).items():
        (path / name).write_bytes(data)
    return deltas


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_prefix_shards_and_types(tmp_path, prefix):
    """The base's shards, types and files; only what the adapter names differs, rounded once from f32."""
    tensors = random_tensors(ODD, ["BF16", "F32", "F16"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.float32([1, 0.1])
    directory = hf_directory(tmp_path / "base", {**ODD, "torch_dtype": "bfloat16"}, tensors, 3,
                             files={"generation_config.json": {"eos_token_id": 2}, "notes.txt": "not a part of the model"})
    deltas = small_adapter(tmp_path / "a", (Q0, V1, DOWN), prefix=prefix)
    merge(directory, tmp_path / "a", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(set(os.listdir(directory)) - {"notes.txt"})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    total = 0
    for shard in set(index["weight_map"].values()):
        got, before = load_file(tmp_path / "out" / shard), load_file(directory / shard)
        assert got.keys() == before.keys()
        data = (tmp_path / "out" / shard).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}  # transformers asks for it
        assert all((start + entry["data_offsets"][0]) % got[name].itemsize == 0 for name, entry in header.items())
        for name, x in got.items():
            total += x.nbytes
            expected, delta = before[name], deltas.get(name.removesuffix(".weight"))
            if delta is not None:
                expected = (expected.astype(np.float32) + delta).astype(expected.dtype)
            assert x.dtype == expected.dtype and np.array_equal(x, expected), name
    assert total == index["metadata"]["total_size"]

    for option, dtype, word in ("f32", np.float32, "float32"), ("f16", np.float16, "float16"), ("bf16", ml_dtypes.bfloat16, "bfloat16"):
        got, _ = merge(directory, tmp_path / "a", tmp_path / option, "--dtype", option)
        expected = (tensors[V1 + ".weight"].astype(np.float32) + deltas[V1]).astype(dtype)
        assert np.array_equal(got[V1 + ".weight"], expected)
        assert {x.dtype for name, x in got.items() if name.endswith(".weight")} == {np.dtype(dtype)}
        assert got["model.layers.0.self_attn.rotary_emb.inv_freq"].dtype == np.float32
        assert json.loads((tmp_path / option / "config.json").read_text())["torch_dtype"] == word


def test_adapter_dtypes(tmp_path):
    """Adapters in BF16 and F16 are computed with in f32."""
    directory = hf_directory(tmp_path / "base", tensors=random_tensors(ODD, ["F32"]))
    for dtype in ml_dtypes.bfloat16, np.float16:
        a = np.full((1, 40), 1.0009765625, np.float32).astype(dtype)
        b = np.full((84, 1), 3, dtype)
        small_adapter(tmp_path / dtype.__name__, rank=1, lora_alpha=1, change={f"{Q0}.lora_A.weight": a, f"{Q0}.lora_B.weight": b}, prefix="")
        got, _ = merge(directory, tmp_path / dtype.__name__, tmp_path / f"out-{dtype.__name__}")
        assert np.array_equal(got[Q0 + ".weight"], random_tensors(ODD, ["F32"])[Q0 + ".weight"] + np.float32(a[0, 0]) * 3)


def test_weights_and_order(tmp_path):
    tensors = random_tensors(ODD, ["F32"])
    directory = hf_directory(tmp_path / "base", tensors=tensors)
    first, second = small_adapter(tmp_path / "first", (Q0, V1)), small_adapter(tmp_path / "second:2", (V1, DOWN), seed=5)
    got, text = merge(directory, tmp_path / "first", f"{tmp_path}/second:2:-0.25", tmp_path / "out")
    near(got[Q0 + ".weight"], tensors[Q0 + ".weight"] + first[Q0])
    near(got[V1 + ".weight"], tensors[V1 + ".weight"] + first[V1] - second[V1] / 4)
    near(got[DOWN + ".weight"], tensors[DOWN + ".weight"] - second[DOWN] / 4)
    assert text.startswith(f"{tmp_path}/first: LoRA, rank 3, scaling 2, matrices: 2\n"
                           f"{tmp_path}/second:2: LoRA, rank 3, scaling 2 times -0.25, matrices: 2\n"
                           "matrices changed: 3, largest relative change ")
    got, _ = merge(directory, tmp_path / "second:2", tmp_path / "whole")  # a colon in the name
    near(got[V1 + ".weight"], tensors[V1 + ".weight"] + second[V1])
    got, _ = merge(directory, f"{tmp_path}/first:0", tmp_path / "nothing")
    assert all(np.array_equal(x, tensors[name]) for name, x in got.items())


@pytest.mark.parametrize("config, module, expected", [
    (dict(target_modules=["q_proj"]), Q0, True), (dict(target_modules=["proj"]), Q0, False), (dict(target_modules=["self_attn.q_proj"]), Q0, True),
    (dict(target_modules=["_proj"]), Q0, False), (dict(target_modules="q_proj"), Q0, False), (dict(target_modules=r".*q_proj"), Q0, True),
    (dict(target_modules=r"layers\.0.*"), Q0, False), (dict(target_modules="ALL-Linear"), Q0, True),
    (dict(target_modules="all-linear"), "lm_head", False), (dict(target_modules="all-linear"), "model.embed_tokens", False),
    (dict(target_modules=["lm_head"]), "lm_head", True), (dict(), Q0, True), (dict(), DOWN, False), (dict(target_modules=None), V1, True),
    (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), Q0, False), (dict(target_modules=["q_proj"], exclude_modules="q_proj"), Q0, True),
    (dict(target_modules=["q_proj"], modules_to_save=["self_attn"]), Q0, False),
    (dict(target_modules=["q_proj"], modules_to_save=["attn"]), Q0, True),
    (dict(target_modules=["q_proj"], layers_to_transform=[1]), Q0, False), (dict(target_modules=["q_proj"], layers_to_transform=0), Q0, True),
    (dict(target_modules=["q_proj"], layers_to_transform=[]), Q0, True), (dict(target_modules=[Q0], layers_to_transform=[1]), Q0, True),
    (dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"), Q0, True),
    (dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["h", "layers"]), Q0, True),
    (dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h"), Q0, False),
    (dict(target_modules=["lm_head"], layers_to_transform=[0]), "lm_head", True)])
def test_targets(tmp_path, config, module, expected):
    """What PEFT 0.21.2's check_target_module_exists() says (all-linear: what it is replaced by)."""
    (tmp_path / "c.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    assert lora_merge.is_target(lora_merge.read_adapter_config(str(tmp_path / "c.json")), module) is expected


def test_resized_vocabulary_and_tokenizer(tmp_path):
    """config.json has the new size; the tokenizer is the adapter's if it brings one, the base's if not."""
    directory = hf_directory(tmp_path / "base", files={"tokenizer_config.json": {"chat_template": "old"}})
    new = {name: np.random.default_rng(2).standard_normal((80, 40), dtype=np.float32) for name in (EMBEDDING, CLASSIFIER)}
    change = {f"base_model.model.{name}": x for name, x in new.items()}
    small_adapter(tmp_path / "plain", change=change)
    tokenizer = small_sentencepiece(60)
    tokenizer.pieces[59].piece = "new"
    small_adapter(tmp_path / "tokens", change=change, files={
        "tokenizer.model": tokenizer.SerializeToString(), "added_tokens.json": b'{"<|end|>": 79}'})
    for adapter, files, pieces in [("plain", ["tokenizer.model", "tokenizer_config.json"], 60),
                                   ("tokens", ["added_tokens.json", "tokenizer.model"], 80)]:
        out = tmp_path / ("out-" + adapter)
        got, text = merge(directory, tmp_path / adapter, out, "--dtype", "f32")
        assert all(np.array_equal(got[name], x) for name, x in new.items()) and "whole tensors: 2" in text
        assert re.search(r"matrices changed: 1, largest relative change .*\), tensors replaced: 2\n", text)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 80
        assert sorted(name for name in os.listdir(out) if "token" in name) == files
        assert exported(out) == exported(directory, "--lora", tmp_path / adapter)
        status, text = call(export, directory, tmp_path / "e.bin", "--lora", tmp_path / adapter)
        assert f" {pieces} pieces" in text and "base+" + adapter in Checkpoint((tmp_path / "e.bin").read_bytes()).header["name"]


def test_two_adapters_of_one_resized_base(tmp_path):
    """Both carry the same new embedding: that is no conflict."""
    directory = hf_directory(tmp_path / "base")
    change = {f"base_model.model.{name}": np.full((80, 40), i, np.float32) for i, name in enumerate((EMBEDDING, CLASSIFIER))}
    for name in "first", "second":
        small_adapter(tmp_path / name, change=change)
    got, _ = merge(directory, tmp_path / "first", f"{tmp_path}/second:0.5", tmp_path / "out")
    assert (got[CLASSIFIER] == 1).all() and got[EMBEDDING].shape == (80, 40)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], []])
def test_tied_embedding(tmp_path, saved, ensure):
    """Of a tied embedding that is in modules_to_save PEFT trains a copy, which is tied no longer; a resized one stays tied."""
    config = {**ODD, "tie_word_embeddings": True}
    tensors = random_tensors(config, ["F32"])
    directory = hf_directory(tmp_path / "base", config, tensors)
    rows = 77 if saved else 80
    new = {name: np.random.default_rng(i + 7).standard_normal((rows, 40), dtype=np.float32) for i, name in enumerate((EMBEDDING, CLASSIFIER))}
    written = {name: x for name, x in new.items() if not saved or name.split(".")[-2] in saved}
    if not saved or ensure and len(saved) == 2:
        written[CLASSIFIER] = written[EMBEDDING]  # as PEFT saves what is tied
    small_adapter(tmp_path / "a", change={f"base_model.model.{name}": x for name, x in written.items()},
                  modules_to_save=saved, ensure_weight_tying=ensure)
    got, _ = merge(directory, tmp_path / "a", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "config.json").read_text())
    tied = not saved or ensure and "embed_tokens" in saved
    assert result["tie_word_embeddings"] is tied and (CLASSIFIER in got) is not tied and result["vocab_size"] == rows
    assert np.array_equal(got[EMBEDDING], written.get(EMBEDDING, tensors[EMBEDDING]))
    if not tied:
        assert np.array_equal(got[CLASSIFIER], written.get(CLASSIFIER, tensors[EMBEDDING]))
    assert exported(tmp_path / "out") == exported(directory, "--lora", tmp_path / "a")


@pytest.mark.parametrize("yes", [True, 1])
def test_tied_tokens(tmp_path, yes):
    config = {**ODD, "tie_word_embeddings": yes}
    tensors = random_tensors(config, ["F32"])
    directory = hf_directory(tmp_path / "base", config, tensors)
    rows = np.random.default_rng(2).standard_normal((2, 40), dtype=np.float32)
    for name, indices in ("list", [70, 3]), ("dict", {"embed_tokens": [70, 3], "lm_head": [70, 3]}):
        small_adapter(tmp_path / name, trainable_token_indices=indices,
                      change={f"base_model.model.{m}.token_adapter.trainable_tokens_delta": rows for m in ("model.embed_tokens", "lm_head")})
        got, _ = merge(directory, tmp_path / name, tmp_path / ("out-" + name))
        expected = tensors[EMBEDDING].copy()
        expected[[70, 3]] = rows
        assert np.array_equal(got[EMBEDDING], expected) and CLASSIFIER not in got


def test_zero_biases(tmp_path):
    directory = hf_directory(tmp_path / "base")
    zero = np.zeros(84, np.float32)
    small_adapter(tmp_path / "a", bias="all", lora_bias=True, change={f"{Q0}.lora_B.bias": zero, f"{Q0}.bias": zero})
    merge(directory, tmp_path / "a", tmp_path / "out")


def test_rows_do_not_depend_on_the_slice(tmp_path):
    """Matrices of several pieces, NF4 blocks that cross rows: every slice has the bits of the whole."""
    config = {**ODD, "hidden_size": 1030, "num_attention_heads": 100, "num_key_value_heads": 50, "intermediate_size": 1501, "num_hidden_layers": 1}
    tensors, rng = random_tensors(config, ["F32"]), np.random.default_rng(3)
    directory, name = hf_directory(tmp_path / "base", config, tensors), "model.layers.0.mlp.down_proj"
    a, b, m = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4, 1501), (1030, 4), (1030,)))
    small_adapter(tmp_path / "a", (), rank=4, lora_alpha=4, target_modules=["down_proj"], use_dora=True, change={
        f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": m})

    def weights():
        return lora_merge.MergedWeights(lora_merge.Weights(directory), config, [(str(tmp_path / "a"), 1.0)], "nf4")

    whole = weights().rows(name + ".weight", 0, 1030)
    x = tensors[name + ".weight"].ravel()
    blocks = np.pad(x, (0, -x.size % 64)).reshape(-1, 64)  # the same by the definition
    scale = np.abs(blocks).max(1, keepdims=True)
    codes = ((blocks * (1 / scale))[:, :, None] > lora_merge.NF4_BOUNDS).sum(2)
    expected = (lora_merge.NF4[codes] * scale).ravel()[:x.size].reshape(1030, 1501) + b @ a
    expected *= (m / np.linalg.norm(expected, axis=1))[:, None]
    assert not np.abs(whole - expected).max() > 1e-5  # sums of 1501 squares, in another order
    w = weights()
    for start, stop in (0, 1), (1029, 1030), (630, 710), (3, 641), (640, 1030), (0, 1030):
        assert np.array_equal(w.rows(name + ".weight", start, stop), whole[start:stop])


def test_nf4_by_hand():
    bounds = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984, -0.13791173323988914,
              -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
              0.5016634166240692, 0.6427869200706482, 0.8614784181118011]  # of dQuantizeNF4() in bitsandbytes' CUDA code
    assert lora_merge.NF4_BOUNDS.tolist() == np.float32(bounds).tolist()
    x = np.zeros((3, 32), np.float32)
    x[0, :4] = [8, -8, 4, 0.31]  # over 8: 1, -1, 0.5, 0.03875
    x[2, 0] = 0.01
    got = lora_merge.nf4(x)
    assert got[0, :4].tolist() == np.float32([8, -8, 8 * np.float32(0.44070982933044434), 0]).tolist()
    assert got[2, 0] == np.float32(0.01) and not got[1].any() and not got[2, 1:].any() and np.isfinite(got).all()
    assert not lora_merge.nf4(np.zeros((1, 64), np.float32)).any()


# ---------------------------------------------------------------------------- what is refused


def refused(base, *adapters, words, options=()):
    """Both scripts: exit status 1, one line with all the words, nothing written."""
    before = sorted(os.listdir(base.parent))
    for module, arguments in (lora_merge, [base, *adapters, base.parent / "out", *options]), \
            (export, [base, base.parent / "out.bin", *options, *(x for adapter in adapters for x in ("--lora", adapter))]):
        status, text = call(module, *arguments)
        assert status == 1, text
        assert text.startswith(os.path.basename(module.__file__) + ": ") and text.count("\n") == 1, text
        assert len(text) < 1100 and text[:-1].isprintable(), text
        for word in words:
            assert word in text, text
        assert sorted(os.listdir(base.parent)) == before


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return hf_directory(tmp_path_factory.mktemp("odd") / "base")


@pytest.fixture()
def adapter(odd):
    """A place for an adapter beside the base `odd`."""
    yield odd.parent / "adapter"
    for path in odd.parent.glob("adapter*"):
        shutil.rmtree(path)


@pytest.mark.parametrize("config, words", [
    *(({"peft_type": name}, ["adapter_config.json", "peft_type", f'"{name}"', '"LORA"']) for name in (
        "LOHA", "LOKR", "IA3", "VERA", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "OFT", "BOFT", "LN_TUNING", "XLORA",
        "TRAINABLE_TOKENS", "HRA", "FOURIERFT", "RANDLORA", "ADAPTION_PROMPT", "a new one")),
    ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens"]), ({"use_qalora": True}, ["use_qalora"]),
    ({"arrow_config": {"top_k": 3}}, ["arrow_config"]), ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora"]),
    ({"kasa_config": {"beta": 1}}, ["kasa_config"]),
    ({"monteclora_config": {"num_samples": 1}}, ["monteclora_config"]), ({"velora_config": {"scale": 1}}, ["velora_config"]),
    ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]), ({"megatron_config": {"x": 1}}, ["megatron_config"]),
    ({"target_parameters": ["q_proj.weight"]}, ["target_parameters"]), ({"a_key_of_tomorrow": 1}, ["a_key_of_tomorrow"]),
    *(({"init_lora_weights": name}, ["init_lora_weights", name]) for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
    ({"target_modules": ["c_attn"]}, ["target_modules", "c_attn"]), ({"target_modules": []}, ["target_modules"]),
    ({"target_modules": "("}, ["adapter_config.json"]),
    ({"target_modules": 7}, ["adapter_config.json"]), ({"rank_pattern": {"(": 3}}, ["adapter_config.json"]),
    ({"rank_pattern": [1]}, ["adapter_config.json"]),
    ({"r": 0}, ["adapter_config.json", "rank 0"]), ({"r": "3"}, ["adapter_config.json", '"3"', "int is expected"]),
    *(({key: "no"}, ["adapter_config.json", key, '"no"', "bool is expected"]) for key in ("use_rslora", "use_dora", "ensure_weight_tying")),
    ({"modules_to_save": "lm_head"}, ["modules_to_save", '"lm_head"', "list is expected"]), ({"r": True}, ["r is true"]),
    ({"layers_to_transform": "0"}, ["layers_to_transform", '"0"', "list or int"]), ({"init_lora_weights": 1}, ["init_lora_weights is 1"]),
    ({"r": 10**4000}, ["adapter_config.json", "rank 1000", "..."]), ({"lora_alpha": 10**4000}, ["adapter_config.json", "alpha 1000", "..."]),
    ({"lora_alpha": 1e300}, ["adapter_config.json", "alpha 1e+300"]), ({"r": 1, "lora_alpha": 3.4028236e38}, ["[84, 1]"]),
    ({"lora_alpha": None, "alpha_pattern": {"q_proj": "x"}}, ["alpha"]),
    ({"lora_alpha": float("nan")}, ["alpha NaN"]),
    ({"r": 4}, [f"{Q0}.lora_B.weight", "[84, 3]", "[84, 4]", "[84, 40]", "rank 4"]),
    ({"rank_pattern": {"q_proj": 2}}, [f"{Q0}.lora_B.weight", "[84, 3]", "[84, 2]"]),
    ({"target_modules": ["q_proj"]}, ["model.layers.1.self_attn.q_proj.lora_B.weight", "missing"]),
    ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, [f"{V1}.lora_B.weight", "missing"]),
    ({"exclude_modules": [Q0], "target_modules": ["q_proj"]}, ["layers.1.self_attn.q_proj", "missing"]),
    ({"use_dora": True}, [f"{Q0}.lora_magnitude_vector", "missing"]),
    ({"modules_to_save": ["lm_head"]}, ["lm_head.weight", "missing", "modules_to_save"]),
    ({"trainable_token_indices": [3]}, ["trainable_tokens_delta", "missing"]), ({"trainable_token_indices": [77]}, ["trainable_token_indices", "77"]),
    ({"trainable_token_indices": [5, 3, 5]}, ["trainable_token_indices", "[5, 3, 5]", "twice"]),
    ({"trainable_token_indices": {"embed_tokens": [5], "model.embed_tokens": [6]}}, ["trainable_token_indices", "twice"]),
    ({"trainable_token_indices": {"wte": [1]}}, ["trainable_token_indices", "wte"]), ({"trainable_token_indices": 5}, ["trainable_token_indices"])])
def test_config_refused(odd, adapter, config, words):
    small_adapter(adapter, **config)
    refused(odd, adapter, words=words)


@pytest.mark.parametrize("config", [
    {"target_modules": r"((\w|\.)+)+Z"}, {"exclude_modules": r"((\w|\.)+)+Z"}, {"modules_to_save": [r"((\w|\.)+)+Z"]},
    {"rank_pattern": {r"((\w|\.)+)+Z": 3}}, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [r"((\w|\.)+)+Z"]}])
def test_regular_expressions_without_end(odd, adapter, monkeypatch, config):
    limit = lora_merge.time_limit
    monkeypatch.setattr(lora_merge, "time_limit", lambda where: limit(where, 0.2))
    small_adapter(adapter, **config)
    refused(odd, adapter, words=["adapter_config.json", "regular expressions", "longer than 0.2 s"])


def zeros(*shape):
    return np.zeros(shape, np.float32)


P = "base_model.model."


@pytest.mark.parametrize("change, config, words", [
    ({f"{P}{Q0}.lora_A.weight": zeros(3, 41)}, {}, [f"{Q0}.lora_A.weight", "[3, 41]", "[3, 40]", "[84, 40]"]),
    ({f"{P}{Q0}.lora_A.weight": zeros(40, 3)}, {"fan_in_fan_out": True}, ["[40, 3]", "[3, 40]"]),
    ({f"{P}{Q0}.lora_B.weight": zeros(83, 3)}, {}, [f"{Q0}.lora_B.weight", "[83, 3]", "[84, 3]"]),
    ({f"{P}{Q0}.lora_B.weight": None}, {}, [f"{Q0}.lora_B.weight", "missing"]),
    ({f"{P}{Q0}.lora_B.weight": np.zeros((84, 3), np.int8)}, {}, [f"{Q0}.lora_B.weight", "I8"]),
    ({f"{P}{Q0}.lora_B.weight": np.full((84, 3), np.nan, np.float32)}, {}, [f"{Q0}.weight", "not finite"]),
    ({f"{P}{Q0}.lora_B.weight": np.full((84, 3), 1e38, np.float32)}, {"lora_alpha": 3e30}, [f"{Q0}.weight", "not finite", "scaling 1e+30"]),
    ({f"{P}{Q0}.\x1b[31m\x9b\n" + 5000 * "x": zeros(1)}, {}, ["\\x1b[31m\\x9b xxx", "not a part of a LoRA"]),
    ({f"{P}{Q0}.lora_magnitude_vector": zeros(84)}, {}, [f"{Q0}.lora_magnitude_vector", "[84]", "not used"]),
    ({f"{P}{Q0}.lora_magnitude_vector": zeros(40)}, {"use_dora": True}, [f"{Q0}.lora_magnitude_vector", "[40]", "[84]"]),
    ({f"{P}{Q0}.lora_magnitude_vector": zeros(84), f"{P}{Q0}.lora_B.weight": zeros(84, 3)}, {"use_dora": True, "lora_alpha": 0}, None),
    ({f"{P}{V1}.lora_A.weight": zeros(3, 40)}, {}, [f"{V1}.lora_A.weight", "[3, 40]", "[42, 40]", "not used"]),
    ({f"{P}model.layers.2.mlp.up_proj.lora_A.weight": zeros(3, 40)}, {}, ["model.layers.2.mlp.up_proj.lora_A.weight", "[3, 40]", "the base has no"]),
    ({f"{P}model.layers.0.self_attn.qkv_proj.lora_A.weight": zeros(3, 40)}, {}, ["qkv_proj.lora_A.weight", "the base has no"]),
    ({"layers.0.self_attn.q_proj.lora_A.weight": zeros(3, 40)}, {}, ["layers.0.self_attn.q_proj.lora_A.weight", "the base has no"]),
    ({f"{P}{Q0}.lora_A.default.weight": zeros(3, 40)}, {}, [f"{Q0}.lora_A.default.weight", "[3, 40]"]),
    ({f"{P}{Q0}.hada_w1_a": zeros(3, 40)}, {}, [f"{Q0}.hada_w1_a", "not a part of a LoRA"]),
    ({f"{P}{Q0}.lora_B.bias": zeros(84) + 1}, {"lora_bias": True}, [f"{Q0}.lora_B.bias", "not zero"]),
    ({f"{P}{Q0}.base_layer.bias": zeros(84) + 1}, {"bias": "lora_only"}, [f"{Q0}.base_layer.bias", "not zero"]),
    ({f"{P}model.layers.1.mlp.up_proj.bias": zeros(100) + 1}, {"bias": "all"}, ["up_proj.bias", "not zero"]),
    ({f"{P}{Q0}.weight": zeros(84, 40)}, {}, [f"{Q0}.weight", "[84, 40]", "not used"]),
    ({f"{P}model.norm.weight": zeros(41)}, {"modules_to_save": ["model.norm"]}, ["model.norm.weight", "[41]", "[40]"]),
    ({f"{P}lm_head.weight": zeros(80, 40)}, {}, ["lm_head.weight", "[80, 40]", "[77, 40]"]),
    ({f"{P}lm_head.weight": zeros(77, 41)}, {}, ["lm_head.weight", "[77, 41]", "[77, 40]"]),
    ({f"{P}model.embed_tokens.weight": zeros(80, 40), f"{P}lm_head.weight": zeros(79, 40)}, {}, ["[80, 40]", "[79, 40]"]),
    ({f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": zeros(1, 40)}, {"trainable_token_indices": [1, 2]}, ["[1, 40]", "[2, 40]"]),
    ({f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": zeros(1, 40)}, {}, ["trainable_tokens_delta", "not used"]),
    ({f"{P}prompt_embeddings": zeros(1, 40)}, {}, ["prompt_embeddings", "not a part of a LoRA"])])
def test_tensor_refused(odd, adapter, change, config, words):
    deltas = small_adapter(adapter, change=change, **config)
    assert deltas
    if words is None:  # a magnitude of zero is a matrix of zeros, and no error
        got, _ = merge(odd, adapter, odd.parent / "adapter-out")
        assert not got[Q0 + ".weight"].any()
    else:
        refused(odd, adapter, words=words)


def test_adapters_that_do_not_go_together(odd, adapter):
    second, other = odd.parent / "adapter2", odd.parent / "adapter3"
    small_adapter(adapter, change={f"{P}lm_head.weight": zeros(77, 40)}, modules_to_save=["lm_head"])
    small_adapter(second, change={f"{P}lm_head.weight": zeros(77, 40) + 1}, modules_to_save=["lm_head"])
    small_adapter(other, ("lm_head",))
    refused(odd, adapter, second, words=["lm_head.weight", "adapter2", "before"])
    refused(odd, other, adapter, words=["lm_head.weight", "adapter", "before"])
    refused(odd, f"{adapter}:0.5", words=["lm_head.weight", "0.5"])
    got, _ = merge(odd, adapter, other, odd.parent / "adapter-out")  # in this order there is a meaning
    part, config = load_file(str(other / "adapter_model.safetensors")), json.loads((other / "adapter_config.json").read_text())
    product = part[f"{P}lm_head.lora_B.weight"].astype(np.float64) @ part[f"{P}lm_head.lora_A.weight"].astype(np.float64)
    expected = (config["lora_alpha"] / config["r"] * product).astype(got[CLASSIFIER].dtype)       # the saved weight is 0
    assert np.abs(got[CLASSIFIER].astype(np.float32) - expected.astype(np.float32)).max() <= 2**-8 * np.abs(expected.astype(np.float32)).max()
    assert expected.any()
    tokens = {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": zeros(2, 40)}
    for i, indices in enumerate(([1, 2], [2, 3], [4, 5])):
        small_adapter(odd.parent / f"adapter-t{i}", change=tokens, trainable_token_indices=indices)
    refused(odd, *(odd.parent / f"adapter-t{i}" for i in (0, 1)), words=["trainable_tokens_delta", "adapter-t1", "before"])
    merge(odd, *(odd.parent / f"adapter-t{i}" for i in (0, 2)), odd.parent / "adapter-out2")


def test_tied_refused(tmp_path):
    directory = hf_directory(tmp_path / "base", {**ODD, "tie_word_embeddings": True})
    small_adapter(tmp_path / "head", ("lm_head",))
    refused(directory, tmp_path / "head", words=["lm_head.weight", "tie_word_embeddings"])
    small_adapter(tmp_path / "tokens", trainable_token_indices={"embed_tokens": [1], "lm_head": [2]})
    refused(directory, tmp_path / "tokens", words=["trainable_token_indices", "tie_word_embeddings"])


def test_files_refused(odd, adapter):
    small_adapter(adapter)
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, good = weights.read_bytes(), config.read_text()
    for data in whole[:-5], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1\n":
        weights.write_bytes(data)
        refused(odd, adapter, words=["adapter_model.safetensors", "not a whole"])
    weights.unlink()
    refused(odd, adapter, words=["adapter_model.safetensors", "missing"])
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    refused(odd, adapter, words=["adapter_model.bin", "pickle", "save_pretrained"])
    weights.write_bytes(whole)
    for text in "", "{", "[]", "3", "[" * 100000, "{}", '{"peft_type": "LORA", "modules_to_save": 5}':
        config.write_text(text)
        refused(odd, adapter, words=["adapter_config.json"])
    config.unlink()
    refused(odd, adapter, words=["adapter_config.json", "No such file"])
    refused(odd, odd.parent / "nowhere", words=["nowhere", "No such file"])
    os.mkfifo(config)
    refused(odd, adapter, words=["adapter_config.json", "not a regular file"])
    config.unlink()
    config.write_text(good)
    for name in config, weights:  # export.py's OUT
        data = name.read_bytes()
        status, text = call(export, odd, name, "--lora", adapter)
        assert status == 1 and "files that are read" in text and name.read_bytes() == data
    merge(odd, adapter, odd.parent / "adapter-out")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, ["config.json", "model_type", '"llama"']),
    ({"architectures": ["MistralForSequenceClassification"]}, ["config.json", "architectures", "MistralForSequenceClassification"]),
    ({"num_hidden_layers": 3}, ["model.layers.2.", "missing"]), ({"num_hidden_layers": 1}, ["model.layers.1.", "no place"]),
    ({"tie_word_embeddings": 1, "vocab_size": 78}, [EMBEDDING, "[77, 40]", "[78, 40]"]),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantization_config", "bitsandbytes"])])
def test_base_refused(tmp_path, change, words):
    small_adapter(tmp_path / "a")
    refused(hf_directory(tmp_path / "base", {**ODD, **change}, random_tensors(ODD)), tmp_path / "a", words=words)


def test_base_tensors_refused(tmp_path):
    small_adapter(tmp_path / "a")
    for i, (name, value) in enumerate([
            (Q0 + ".weight", np.zeros((84, 40), np.int8)), (CLASSIFIER, None), (V1 + ".weight", None), ("model.norm.weight", None)]):
        tensors = {**random_tensors(ODD), name: value}
        directory = hf_directory(tmp_path / f"base{i}", tensors={name: x for name, x in tensors.items() if x is not None})
        refused(directory, tmp_path / "a", words=[name])
    small_adapter(tmp_path / "saved", modules_to_save=["embed_tokens"], change={P + EMBEDDING: zeros(77, 40)})
    small_adapter(tmp_path / "tokens", trainable_token_indices=[1],
                  change={f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": zeros(1, 40)})
    for i, (value, word) in enumerate([(np.zeros((77, 40), ml_dtypes.float8_e4m3fn), "F8_E4M3"), (zeros(77), "[77]")]):
        directory = hf_directory(tmp_path / f"embedding{i}", tensors={**random_tensors(ODD), EMBEDDING: value})
        for name in "saved", "tokens":
            refused(directory, tmp_path / name, words=[EMBEDDING, word])
    extra = hf_directory(tmp_path / "extra", tensors={**random_tensors(ODD), "x.lm_head.weight": np.zeros((3, 3), np.int8)})
    status, text = call(lora_merge, extra, tmp_path / "a", tmp_path / "out")  # of no concern to export.py
    assert status == 1 and "x.lm_head.weight" in text and "I8" in text
    large = {**random_tensors(ODD), V1 + ".weight": np.full((42, 40), 70000, np.float32)}
    status, text = call(lora_merge, hf_directory(tmp_path / "large", tensors=large), tmp_path / "a", tmp_path / "out", "--dtype", "f16")
    assert status == 1 and V1 in text and "70000" in text and "--dtype f32" in text


def change_index(directory, change):
    """Rewrite a base's index; change: {tensor: shard}, added to it."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(change)
    path.write_text(json.dumps(index))
    return index["weight_map"]


def test_shards_refused(tmp_path):
    small_adapter(tmp_path / "a")
    lacking = hf_directory(tmp_path / "lacking", shards=3)
    change_index(lacking, {"model.layers.2.mlp.up_proj.weight": "model-00002-of-00003.safetensors"})
    refused(lacking, tmp_path / "a", words=["model.layers.2.mlp.up_proj.weight", "index.json", "none"])
    twice = hf_directory(tmp_path / "twice", shards=2)
    first, second = sorted(twice.glob("*.safetensors"))
    save_file({**load_file(first), **load_file(second)}, second)
    refused(twice, tmp_path / "a", words=[sorted(load_file(first))[0], str(first), str(second)])


def test_shards_in_folders(tmp_path):
    """Two of one name, in folders of the base: OUT has them side by side under the usual names."""
    small_adapter(tmp_path / "a")
    directory = hf_directory(tmp_path / "base", shards=2)
    expected, _ = merge(directory, tmp_path / "a", tmp_path / "flat")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()):
        folder = directory / shard.split("-")[1]
        folder.mkdir()
        (directory / shard).rename(folder / "model.safetensors")
    change_index(directory, {name: shard.split("-")[1] + "/model.safetensors" for name, shard in index.items()})
    got, _ = merge(directory, tmp_path / "a", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "flat"))
    assert got.keys() == expected.keys() and all(np.array_equal(x, expected[name]) for name, x in got.items())


# ---------------------------------------------------------------------------- the report


def test_report_of_large_and_of_equal_names(tmp_path):
    directory = hf_directory(tmp_path / "base", tensors={**random_tensors(ODD, ["F32"]), V1 + ".weight": zeros(42, 40)})
    for name in "one", "two":
        (tmp_path / name).mkdir()
        small_adapter(tmp_path / name / "checkpoint-9", (Q0, V1), lora_alpha=1e30)
    _, text = merge(directory, tmp_path / "one" / "checkpoint-9", tmp_path / "two" / "checkpoint-9", tmp_path / "out")
    assert [line.split(": ")[0] for line in text.splitlines()[:2]] == [str(tmp_path / name / "checkpoint-9") for name in ("one", "two")]
    assert re.search(rf"matrices changed: 2, largest relative change \d\.\d+e\+\d\d% \({Q0}\.weight\)\n", text)  # what was 0 has no ratio


def test_report_beside_a_checkpoint_on_stdout(tmp_path, odd):
    small_adapter(tmp_path / "a")
    done = subprocess.run([sys.executable, export.__file__, odd, "-", "--lora", tmp_path / "a"], capture_output=True, check=True)
    assert f"{tmp_path / 'a'}: LoRA, rank 3, scaling 2, matrices: 1; matrices changed: 1, largest" in done.stderr.decode()
    Checkpoint(done.stdout)


def test_scaling_too_large(odd, adapter):
    small_adapter(adapter, lora_alpha=1e38)
    refused(odd, f"{adapter}:1000", words=[str(adapter), "scaling", "3.33333e+37", "times 1000"])


# ---------------------------------------------------------------------------- the directory and the command line


def start(*arguments, **options):
    """The script as a process of its own."""
    return subprocess.Popen([sys.executable, lora_merge.__file__, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def finish(process):
    """Exit status and standard error of a process that must end."""
    error = process.communicate(timeout=60)[1].decode()
    return process.returncode, error


def test_usage(tmp_path):
    for arguments in [], ["x"], ["x", "y"], ["x", "y", "z", "--dtype", "q8"], ["x", "y", "z", "--what"], ["x", "y:nan", "z"], ["x", "y:inf", "z"], \
            ["x", "y", "z", "--base-quant", "q4"], ["x", "--dtype", "f32", "y"], ["x", "y:1_0", "z"]:
        status, error = finish(start(*arguments))
        assert status == 2 and "Traceback" not in error
    status, error = finish(start(TREASURE, TREASURE, tmp_path / "out"))  # raised below export.py: still one line
    assert status == 1 and error.count("\n") == 1 and "config.json: No such file" in error
    help_text = start("--help").communicate()[0]
    assert help_text.count(b"\n") <= 24 and b"--base-quant" in help_text
    status, _ = call_usage(export, "x", "y", "--lora", "z:nan")
    assert status == 2


def test_options_between(tmp_path, odd):
    for name in "a", "b":
        small_adapter(tmp_path / name)
    for i, arguments in enumerate([["--dtype", "f32", odd, "a", "b", "out0"], [odd, "--dtype", "f32", "a", "b", "out1"],
                                   [odd, "a", "--dtype", "f32", "b", "out2"], [odd, "a", "b", "--dtype", "f32", "out3"]]):
        status, error = finish(start(*arguments, cwd=tmp_path))
        assert status == 0 and "b: LoRA" in error, error
        assert load_file(tmp_path / f"out{i}" / "model.safetensors")[EMBEDDING].dtype == np.float32


def test_adapter_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").mkdir()
    for text, expected in [("a", ("a", 1)), ("a:2", ("a:2", 1)), ("a:2:.5", ("a:2", 0.5)), ("a:3", ("a", 3)), ("a:-0.25", ("a", -0.25)),
                           ("a:+1.", ("a", 1)), ("b:c:0", ("b:c", 0))]:
        assert lora_merge.adapter_argument(text) == expected
    for weight in "1_0", " 2", "2 ", "1e3", "0x1", "nan", "inf", "", ".", "-", "\u0662", "1.2.3", "\x1b", "\x9b", "9" * 4000:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            lora_merge.adapter_argument("a:" + weight)
        assert str(error.value).isprintable() and len(str(error.value)) < 1100


def test_demo_looks_for_all_that_is_needed(monkeypatch):
    """demo/lora.py makes its own environment when any package of requirements.txt is missing, protobuf too."""
    spec = importlib.util.spec_from_file_location("demo_lora", os.path.join(ROOT, "demo", "lora.py"))
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    import run_tests
    assert demo.python() == sys.executable
    find = importlib.util.find_spec
    monkeypatch.setattr(run_tests, "make_venv", lambda: True)
    for missing in "numpy", "ml_dtypes", "safetensors", "sentencepiece", "google", "google.protobuf":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
        assert demo.python() == run_tests.PYTHON, missing


def call_usage(module, *arguments):
    """call(), of arguments that argparse refuses."""
    try:
        return call(module, *arguments)
    except SystemExit as error:
        return error.code, ""


def test_target_that_cannot_be_written(tmp_path, odd):
    small_adapter(tmp_path / "a")
    (tmp_path / "there").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = sorted(os.listdir(tmp_path))
    for out, word in ("there", "exists"), ("full", "exists"), ("file", "exists"), ("there/", "exists"), ("no/out", "No such file"), \
            ("file/out", "Not a directory"), ("/proc/out", "/proc/out"), (odd, "exists"):
        status, error = finish(start(odd, tmp_path / "a", tmp_path / out))
        assert status == 1 and error.count("\n") == 1 and word in error and str(out).rstrip("/") in error
    assert finish(start(odd, tmp_path / "a", "")) == (1, "lora_merge.py: OUT is empty (give it a name)\n")
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "kept"


def test_full_disk(tmp_path, odd):
    """A limit on the size of files stands in for a full disk."""
    small_adapter(tmp_path / "a")
    size = os.path.getsize(odd / "model.safetensors")
    for limit in 100, 30000, size - 100:
        status, error = finish(start(odd, tmp_path / "a", tmp_path / "out",
                                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        assert status == 1 and error.count("\n") == 1 and str(tmp_path / "out") in error and "large" in error
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [*STOPS, signal.SIGKILL])
@pytest.mark.parametrize("late", [False, True])
def test_stopped(tmp_path, odd, number, late):
    """Slowed down, and stopped when the temporary directory is there, or when the last tensors are: OUT is not, and what a
    kill leaves has no config.json. A terminal that is closed sends more than one signal: the second comes while the first is
    cleaned up after."""
    small_adapter(tmp_path / "a")
    code = (f"import os, sys, time; sys.path.insert(0, {ROOT!r}); import lora_merge; rows = lora_merge.Weights.rows\n"
            "lora_merge.Weights.rows = lambda *a: (time.sleep(0.03), rows(*a))[1]\n"
            "def slow(*a, **k):\n    if k:  # of rmtree()\n        open('cleaning', 'w').close()\n        time.sleep(0.3)\n    unlink(*a, **k)\n"
            "unlink, os.unlink = os.unlink, slow\n"
            f"sys.argv = ['lora_merge.py', {str(odd)!r}, 'a', 'out']; sys.exit(lora_merge.main())")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)

    def there():
        return [name for name in os.listdir(tmp_path) if name.startswith("out.tmp.")]
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(0.4 * late)
    process.send_signal(number)
    if number != signal.SIGKILL:
        while not (tmp_path / "cleaning").exists() and process.poll() is None:  # there may be nothing in it yet to clean up
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for second in STOPS:
            process.send_signal(second)
    error = process.stderr.read().decode()
    if number == signal.SIGKILL:
        assert process.wait() == -number
        left, = there()
        assert "config.json" not in os.listdir(tmp_path / left) and sorted(os.listdir(tmp_path)) == ["a", left]
        merge(odd, tmp_path / "a", tmp_path / "out")  # and it is not in the way
    else:
        assert process.wait() == 1 and error == "lora_merge.py: out: interrupted\n"
        assert set(os.listdir(tmp_path)) - {"cleaning"} == {"a"}


def test_stopped_in_mkdir(tmp_path, odd, monkeypatch):
    """The signal comes when the directory has just been made."""
    small_adapter(tmp_path / "a")
    mkdir = os.mkdir

    def stopped(path):
        mkdir(path)
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(os, "mkdir", stopped)
    status, text = call(lora_merge, odd, tmp_path / "a", tmp_path / "out")
    assert status == 1 and text == f"lora_merge.py: {tmp_path}/out: interrupted\n" and os.listdir(tmp_path) == ["a"]


def test_leftovers_are_not_in_the_way(tmp_path, odd):
    """Of a process that was killed and had our number, as in a container: a directory or a file."""
    small_adapter(tmp_path / "a")
    for i in range(2):
        left = tmp_path / f"out{i}.tmp.{os.getpid()}"
        left.mkdir() if i else left.touch()
        merge(odd, tmp_path / "a", tmp_path / f"out{i}")
    assert sorted(os.listdir(tmp_path)) == ["a", "out0", "out1"]


@pytest.mark.parametrize("module", [lora_merge, export])
def test_stopped_in_the_imports(tmp_path, module):
    """No traceback: the process ends as any other that Ctrl-C ends."""
    (tmp_path / "safetensors.py").write_text("import sys, time; print('here', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, module.__file__, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b"" and process.returncode == -signal.SIGINT


def test_ignored_signals_stay_ignored(tmp_path, odd):
    """As under nohup: the merge goes on."""
    small_adapter(tmp_path / "a")
    code = (f"import signal, sys; sys.path.insert(0, {ROOT!r}); import lora_merge; rows = lora_merge.Weights.rows\n"
            "lora_merge.Weights.rows = lambda *a: (signal.raise_signal(signal.SIGHUP), rows(*a))[1]\n"
            f"sys.argv = ['lora_merge.py', {str(odd)!r}, 'a', 'out']; sys.exit(lora_merge.main())")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_memory_stays_below_the_largest_tensor(tmp_path):
    """The peak with matrices of 48 MB, merged with DoRA and rounded to NF4, against that with a small one."""
    def peak(name, vocabulary):
        directory = hf_directory(tmp_path / name, {**ODD, "tie_word_embeddings": True, "vocab_size": vocabulary, "intermediate_size": vocabulary,
                                                   "num_hidden_layers": 1})
        adapter, rng = tmp_path / (name + "-adapter"), np.random.default_rng(0)
        up = "model.layers.0.mlp.up_proj"
        small_adapter(adapter, (), target_modules=["up_proj"], use_dora=True, change={
            f"{up}.lora_A.weight": rng.standard_normal((3, 40), dtype=np.float32), f"{up}.lora_B.weight": np.ones((vocabulary, 3), np.float32),
            f"{up}.lora_magnitude_vector": np.ones(vocabulary, np.float32)})
        code = (f"import re, sys; sys.path.insert(0, {ROOT!r}); import lora_merge\n"
                f"lora_merge.merge({str(directory)!r}, [({str(adapter)!r}, 1.0)], {str(tmp_path / ('out-' + name))!r}, None, 'nf4')\n"
                "print(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace(chr(9), ' '))[1])")  # ru_maxrss is also the parent's
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    assert peak("large", 600000) - peak("small", 100) < 60000  # kilobytes


def test_progress_on_a_terminal(tmp_path, odd):
    small_adapter(tmp_path / "a")
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, lora_merge.__file__, str(odd), str(tmp_path / "a"), str(tmp_path / "out")], stderr=slave)
    assert process.wait() == 0
    os.close(slave)
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert re.search(r"\d+%, \d+ MB/s, \d+:\d\d left", text)
    assert re.search(r"matrices changed: 1, largest relative change [\d.]+% \(model\.layers\.0\.self_attn\.q_proj\.weight\)\r\n"
                     r".*out: [\d.]+ MB in 1 file, [\d.]+ s\r\n$", text)
