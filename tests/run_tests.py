"""Runs all tests and prints a last line "N passed, N failed, N skipped"; exit status 1 if any failed.

The C tests run twice, the second time built with the address and undefined-behaviour sanitizers. The Python tests run in a virtual
environment of their own, build/venv; where it cannot be made (no network, no python3-venv) they are skipped, and a line says so.
Needs nothing but the standard library. --need-python makes a skip of all Python tests a failure (for CI)."""
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, "build", "venv")
PYTHON = os.path.join(VENV, "bin", "python")
REQUIREMENTS = [os.path.join(ROOT, *path, "requirements.txt") for path in ([], ["tests"], ["bench"])]


# with sanitizers: all but what repeats other tests' code very often
SANITIZED = ["half", "exp", "norm_rope_swiglu", "activations", "cache_codes", "attention", "number_tiles", "group_product",
             "group_product_wide", "matrices", "scales", "sampler", "forward", "batch", "lookup", "decode", "damaged_files"]


def c_tests(program, names, environment):
    """(passed, failed) of a build of test_all.c; one more failed if it ended without its last line."""
    done = subprocess.Popen([program, *names], stdout=subprocess.PIPE, env={**os.environ, **environment}, cwd=ROOT, text=True)
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line
    match = re.fullmatch(r"(\d+) passed, (\d+) failed\n", last)
    if not match:
        print(f"{program} ended with status {done.wait()}")
        return 0, 1
    return int(match[1]), int(match[2])


def make_venv():
    """Whether build/venv holds what the requirements say; makes it if need be."""
    want = "".join(open(r).read() for r in REQUIREMENTS)
    stamp = os.path.join(VENV, "installed")
    if os.path.exists(stamp) and open(stamp).read() == want:
        return True
    print("setting up build/venv for the Python tests ...", flush=True)
    steps = [[sys.executable, "-m", "venv", "--clear", VENV],
             [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *[w for r in REQUIREMENTS for w in ("-r", r)]]]
    for step in steps:
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print("\n".join(done.stdout.strip().splitlines()[-3:]))
            return False
    with open(stamp, "w") as f:
        f.write(want)
    return True


def python_tests(path, **programs):
    """(passed, failed, skipped) of pytest in build/venv; programs: RUN and QUANTIZE for builds other than the usual."""
    report = os.path.join(ROOT, "build", "pytest.xml")
    if os.path.exists(report):
        os.remove(report)
    # threads that wait asleep: the tests run beside whatever else this machine does
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1", **programs}
    subprocess.run([PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "--junitxml", report, os.path.join(ROOT, path)],
                   cwd=ROOT, env=environment)
    if not os.path.exists(report):
        return 0, 1, 0
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    total, bad, skipped = int(suite.get("tests")), int(suite.get("failures")) + int(suite.get("errors")), int(suite.get("skipped"))
    return total - bad - skipped, bad, skipped


def has_gpu():
    return bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.startswith("GPU")


def cuda_tests():
    """(passed, failed, skipped) of the CUDA sources: compiled where nvcc is, run where a GPU is."""
    if not shutil.which("nvcc"):
        print("no nvcc: the CUDA sources were neither compiled nor run")
        return 0, 0, 1
    if subprocess.run(["make", "-s", "build/run_cuda", "build/test_cuda", *([] if has_gpu() else ["ARCH=75"])], cwd=ROOT).returncode:
        return 0, 1, 0
    if not has_gpu():
        print("compiled for a T4, and not run: there is no GPU here")
        return 1, 0, 0
    names = ["cuda_products", "cuda_attention", "cuda_forward", "cuda_batch", "cuda_sampler"]
    passed, failed = c_tests(os.path.join(ROOT, "build", "test_cuda"), names, {})
    return passed + 1, failed, 0


def main():
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):       # tests send what a shell ignores in what it starts with &
        signal.signal(number, signal.SIG_DFL)
    passed = failed = skipped = 0
    for program, names in (("build/test_all", []), ("build/test_all_sanitized", SANITIZED)):
        print(f"\n{program}", flush=True)
        p, f = c_tests(os.path.join(ROOT, program), names, {"OMP_WAIT_POLICY": "passive"})
        passed, failed = passed + p, failed + f
    print("\nCUDA", flush=True)
    p, f, skipped = cuda_tests()
    passed, failed = passed + p, failed + f
    print("\nPython tests", flush=True)
    if make_venv():
        of_gpu = {"RUN": os.path.join(ROOT, "build", "run_cuda"), "QUANTIZE": os.path.join(ROOT, "quantize")}
        for path, programs in [("tests", {})] + [(os.path.join("tests", "test_cli.py"), of_gpu)] * (has_gpu() and os.path.exists(of_gpu["RUN"])):
            p, f, s = python_tests(path, **programs)
            passed, failed, skipped = passed + p, failed + f, skipped + s
    else:
        print("SKIPPED: the Python tests need python3-venv and the packages of requirements.txt")
        failed += "--need-python" in sys.argv
        skipped += 1
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
