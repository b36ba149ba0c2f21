"""The same bits from every build: other instruction sets, other optimisation, no OpenMP, another compiler if there is one."""
import json
import os
import platform
import shutil
import subprocess

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DEMO = os.path.join(ROOT, "demo", "tiny-mistral-q8.bin")
FLAGS = {"native": "-O3 -march=native -fopenmp", "unoptimised": "-O0", "contracting": "-O3 -march=native -ffp-contract=fast",
         "not contracting": "-O3 -march=native -ffp-contract=off", "C++": "-O2 -x c++ -std=c++17 -march=native"}
if platform.machine() == "x86_64":
    FLAGS["no vectors beyond SSE2"] = "-O3 -march=x86-64"
    if " avx2 " in open("/proc/cpuinfo").read():
        FLAGS["AVX2"] = "-O3 -march=haswell -fopenmp"
BUILDS = [("cc", name) for name in FLAGS] + ([("clang", "native without OpenMP")] if shutil.which("clang") else [])


def outputs(program, models, folder):
    """What a build makes of a batch with sampling (ids) and of a text (nll to 9 digits), for each model."""
    results, out = [], str(folder / "out.json")
    text = folder / "text.txt"
    text.write_text(open(os.path.join(HERE, "text", "heldout-fairy.txt")).read()[:1500])
    for model in models:
        for arguments in (["-i", "Once upon a time", "-b", "3", "-n", "30", "-E"], ["-m", "perplexity", "-f", str(text)]):
            subprocess.run([program, model, *arguments, "-q", "-o", out], check=True, stdout=subprocess.DEVNULL)
            result = json.load(open(out))
            results.append(result["nll"] if "nll" in result else [s["ids"] for s in result["sequences"]])
    return results


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Models of every type, and what ./run makes of them."""
    folder = tmp_path_factory.mktemp("variants")
    models = [DEMO]
    for dtype in ("f32", "f16", "q8", "q4"):
        models.append(str(folder / dtype) + ".bin")
        subprocess.run([os.path.join(ROOT, "quantize"), "--random", "odd", models[-1], dtype], check=True)
    return models, outputs(os.path.join(ROOT, "run"), models, folder)


@pytest.mark.parametrize("compiler,name", BUILDS)
def test_same_bits(expected, tmp_path, compiler, name):
    models, results = expected
    flags = FLAGS.get(name, "-O3 -march=native").split()
    program = str(tmp_path / "run")
    subprocess.run([compiler, *flags, "-w", os.path.join(ROOT, "run.c"), "-o", program, "-lm"], check=True)
    assert outputs(program, models, tmp_path) == results
