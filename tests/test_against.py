"""-m perplexity and --against on small random models against a forward in float64, written here from the model's definition. Needs numpy, pytest."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE]
from checkpoint import random_tensors, small_config, write_checkpoint  # noqa: E402

RUN = os.path.join(os.path.dirname(HERE), "run")
CONFIG = small_config(dim=40, hidden_dim=72, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, vocab_size=300, window=9)
TEXT = "Once upon a time a fox\nsaw naïve crows; \u2603 \u2581 ??? " * 6
NUMBERS = "ppl ppl_error nll tokens ctx kl kl_error kl_p99 same_top".split()


def text_ids(text):
    """The ids of a text for checkpoint.plain_pieces(): a space before it, spaces as U+2581, then bytes, since no other piece fits."""
    return [3 + byte for byte in (" " + text).replace(" ", "\u2581").encode()]


def forward(config, tensors, ids):
    """Logits [n, vocab_size] of a sequence in float64."""
    c, f = config, {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    n, half, kv_dim = len(ids), c["head_dim"] // 2, c["n_kv_heads"] * c["head_dim"]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["norm_eps"]) * weight.ravel()

    def rope(x):  # [n, heads, head_dim]
        angle = np.arange(n)[:, None, None] * c["rope_theta"] ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    x, back = f["token_embedding"][ids], np.arange(n)[:, None] - np.arange(n)
    hidden = (back < 0) | (back >= c["window"])
    for i in range(c["n_layers"]):
        w = {name: f[f"layers.{i}.{name}"] for name in ("rms_att_weight", "wqkv", "wo", "rms_ffn_weight", "w13", "w2")}
        qkv = norm(x, w["rms_att_weight"]) @ w["wqkv"].T
        q, k, v = (part.reshape(n, -1, c["head_dim"]) for part in np.split(qkv, [-2 * kv_dim, -kv_dim], 1))
        k, v = (each.repeat(c["n_heads"] // c["n_kv_heads"], 1) for each in (rope(k), v))
        scores = np.einsum("qhd,khd->hqk", rope(q), k) / np.sqrt(c["head_dim"])
        x = x + np.einsum("hqk,khd->qhd", softmax(np.where(hidden, -np.inf, scores)), v).reshape(n, -1) @ w["wo"].T
        gate, up = np.split(norm(x, w["rms_ffn_weight"]) @ w["w13"].T, 2, 1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["w2"].T
    return norm(x, f["rms_final_weight"]) @ f.get("wcls", f["token_embedding"]).T


def expected(config, model, reference, ids, ctx, skip):
    """The numbers of the JSON file, as README has them."""
    nll, kl, same = [], [], []
    for start in range(0, len(ids), ctx - 1):
        window = ids[start:start + ctx - 1]
        logits = [forward(config, tensors, [1] + window[:-1])[skip:] for tensors in (model, reference)]
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)  # log-probabilities
        nll.append(-p[np.arange(len(p)), window[skip:]])
        kl.append((np.exp(q) * (q - p)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    nll, kl, same = (np.concatenate(each) for each in (nll, kl, same))
    error = [x.std(ddof=1) / np.sqrt(len(x)) for x in (nll, kl)]
    ppl = np.exp(nll.mean())
    return dict(zip(NUMBERS, (ppl, ppl * error[0], nll.mean(), len(nll), ctx, kl.mean(), error[1],
                              np.quantile(kl, 0.99), same.mean())))


def measured(folder, model, reference, *options):
    """What ./run says of checkpoint `model` against `reference`: {name: number} of the JSON file."""
    (folder / "text").write_text(TEXT)
    subprocess.run([RUN, folder / model, "-m", "perplexity", "-f", folder / "text", "--against", folder / reference, "-q", "-o",
                    folder / "out.json", *options], check=True, stdout=subprocess.DEVNULL)
    out = json.load(open(folder / "out.json"))
    return {name: out[name] for name in NUMBERS}


@pytest.mark.parametrize("tied", [False, True])
def test_known_pair(tmp_path, tied):
    """Two models, the one some noise away from the other: all numbers, both ways round. FP32 has 24 bits, of which a
    forward and a difference of logarithms lose some: over a dozen such pairs 2e-6 of kl_p99 is the most, 3e-7 of kl."""
    a, noise = random_tensors(CONFIG, 1, tied), random_tensors(CONFIG, 2, tied)
    b = {name: x if "rms_" in name else x + np.float32(0.1) * noise[name] for name, x in a.items()}
    models = {"a": a, "b": b}
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, CONFIG, tensors, "f32")
    ids, results = text_ids(TEXT), []
    for (x, y), ctx, skip in (("ab", 40, 0), ("ba", 40, 0), ("ab", 12, 5), ("ab", 512, 0)):
        got = measured(tmp_path, x, y, "-c", str(ctx), "--skip", str(skip))
        want = expected(CONFIG, models[x], models[y], ids, ctx, skip)
        for name in NUMBERS:
            assert abs(got[name] - want[name]) <= 5e-6 * abs(want[name]), (x, ctx, name, got[name], want[name])
        assert 0.02 < got["kl"] < got["kl_p99"] and 0.1 < got["same_top"] < 1
        results.append(got)
    assert abs(results[0]["kl"] / results[1]["kl"] - 1) > 1e-3, "the direction matters: a test of which is the reference"


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_itself(tmp_path, dtype):
    """A checkpoint against itself: nothing, exactly."""
    write_checkpoint(tmp_path / "m", CONFIG, random_tensors(CONFIG, 3), dtype)
    got = measured(tmp_path, "m", "m", "-c", "40")
    assert (got["kl"], got["kl_error"], got["kl_p99"], got["same_top"]) == (0, 0, 0, 1)
