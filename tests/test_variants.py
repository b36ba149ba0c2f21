"""The same bits from every build: other instruction sets, other optimisation, no OpenMP, other compilers where there are any,
ARM's under an emulator."""
import json
import os
import platform
import shutil
import subprocess

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DEMO = os.path.join(ROOT, "demo", "tiny-mistral-q8.bin")
CPU = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
# compiler, what runs the program, flags
BUILDS = {"native": ("cc", [], "-O3 -march=native -fopenmp"), "unoptimised": ("cc", [], "-O0"),
          "contracting": ("cc", [], "-O3 -march=native -ffp-contract=fast"),
          "not contracting": ("cc", [], "-O3 -march=native -ffp-contract=off"),
          "C++": ("cc", [], "-O2 -x c++ -std=c++17 -march=native"),
          "clang": ("clang", [], "-O3 -march=native"),
          "NEON with dot products": ("aarch64-linux-gnu-gcc", ["qemu-aarch64"], "-O3 -march=armv8.2-a+dotprod -static"),
          "ARM without": ("aarch64-linux-gnu-gcc", ["qemu-aarch64"], "-O2 -march=armv8-a -static")}
if platform.machine() == "x86_64":
    BUILDS["no vectors beyond SSE2"] = ("cc", [], "-O3 -march=x86-64")
    if " avx2 " in CPU:
        BUILDS["AVX2"] = ("cc", [], "-O3 -march=haswell -fopenmp")
    if " avx512_vnni " in CPU:      # what AVX-VNNI has, in the encoding that processors with AVX-512 know
        BUILDS["AVX2 with VNNI"] = ("cc", [], "-O3 -march=haswell -mavx512vnni -mavx512vl")
    if " avx_vnni " in CPU:
        BUILDS["AVX-VNNI"] = ("cc", [], "-O3 -march=haswell -mavxvnni")


def missing(compiler, runner):
    """Which program a build needs that is not here; None if all are. What .ci/run installs must be there where it runs."""
    return next((program for program in (compiler, *runner) if not shutil.which(program)), None)


def compile_with(name, source, program):
    compiler, runner, flags = BUILDS[name]
    subprocess.run([compiler, *flags.split(), "-w", os.path.join(ROOT, source), "-o", program, "-lm"], check=True)
    return [*runner, program]


def outputs(command, models, folder):
    """What a build makes of a batch with sampling (ids) and of a text (nll to 9 digits), for each model."""
    results, out = [], str(folder / "out.json")
    text = folder / "text.txt"
    text.write_text(open(os.path.join(HERE, "text", "heldout-fairy.txt")).read()[:1500])
    for model in models:
        for arguments in (["-i", "Once upon a time", "-b", "3", "-n", "30", "-E"], ["-m", "perplexity", "-f", str(text)]):
            subprocess.run([*command, model, *arguments, "-q", "-o", out], check=True, stdout=subprocess.DEVNULL)
            result = json.load(open(out))
            results.append(result["nll"] if "nll" in result else [s["ids"] for s in result["sequences"]])
    return results


def logits(command, models):
    return [subprocess.run([*command, "logits", model], check=True, stdout=subprocess.PIPE).stdout for model in models]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of every type."""
    folder = tmp_path_factory.mktemp("variants")
    made = [DEMO]
    for dtype in ("f32", "f16", "q8", "q4", "nf4"):
        made.append(str(folder / dtype) + ".bin")
        subprocess.run([os.path.join(ROOT, "quantize"), "--random", "odd", made[-1], dtype], check=True)
    return made


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """What the programs that make built do with them."""
    return (outputs([os.path.join(ROOT, "run")], models, tmp_path_factory.mktemp("expected")),
            logits([os.path.join(ROOT, "build", "test_all")], models))


@pytest.mark.parametrize("name", [n for n in BUILDS if n != "C++"])         # only run.c is C++ as well
def test_same_logits(models, expected, tmp_path, name):
    need = missing(*BUILDS[name][:2])
    if need:
        pytest.skip(f"{name}: no {need} here")
    assert all(len(bits) > 100 * 300 * 4 for bits in expected[1])
    assert logits(compile_with(name, "test_all.c", str(tmp_path / "test_all")), models) == expected[1]


@pytest.mark.parametrize("name", [n for n in BUILDS if BUILDS[n][0] == "cc"])
def test_same_output(models, expected, tmp_path, name):
    assert outputs(compile_with(name, "run.c", str(tmp_path / "run")), models, tmp_path) == expected[0]
