"""The benchmark: this project's programs over types of weights and batch sizes, beside other engines, in one report.

    python3 bench/bench.py --model HF_DIR_or_BIN [--backends cpu,cuda] [--dtypes f16,q8,q4,nf4,gptq] [--batches 1,2,4,8,16,32]

MODEL is a Hugging Face directory with a Mistral model, a checkpoint, or random:mistral-7b for that shape with random weights.
What is measured, in this order:
  - speed: --rounds visits of every combination, in an order shuffled anew each round, so that a slow minute does not hit
    one column; other engines (--peers) that are installed take their turns among them;
  - quality: perplexity of --text, divergence from f16, greedy text, and multiple-choice items if run can score them;
  - time by operation.
A table goes to the terminal; results.json, results.csv, report.md and charts (PNG, with matplotlib) go to --output. A run
that was stopped goes on where it was when the same command is given again. What fails is a line in the report.
Exit status: 0 done, 1 nothing could be measured or no combination reached --target, 2 wrong usage."""
import argparse
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time

import report
from measure import (BENCH, CORES, PEERS as PEERS_PY, ROOT, Progress, ask_peer, cost, execute, generate, gpus, machine,
                     memory_bytes, need_room, outcome, read_shape, run_json, say, write_json)
from peers import PEERS

PROGRAMS = {"cpu": "run", "cuda": "run_cuda"}
EXPORT = os.path.join(ROOT, "export.py")
# Types of weights: what `quantize` is told, what its --help must name for that, bits a weight, about
DTYPES = {"f32": ([], "", 32), "f16": ([], "", 16), "q8": (["q8"], "q8", 8.6), "q4": (["q4"], "q4", 4.4),
          "nf4": (["nf4"], "nf4", 4.6), "gptq": (["q4", "--gptq"], "--gptq", 4.4), "awq": (["q4", "--awq"], "--awq", 4.4)}
PEER_BITS = {"float32": 32, "float16": 16, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "nf4": 4.6, "int8": 9}
PROFILED = 2        # batch sizes of which the time by operation is taken: the smallest and the largest


def digest(*parts):
    """A short fingerprint of strings and bytes."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else str(part).encode())
    return h.hexdigest()[:12]


def plain(name):
    """A model's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def file_digest(path, limit=1 << 20):
    """A fingerprint of a file's size and first bytes."""
    with open(path, "rb") as f:
        return digest(str(os.path.getsize(path)), f.read(limit))


# --------------------------------------------------------------------------------------------------------------------
# The model, in every type

class Model:
    """What --model names: `name`, `identity` (a fingerprint), `source` (hf, bin or random), and its checkpoints by type."""

    def __init__(self, o):
        self.o, self.path, self.made = o, o.model, {}
        if o.model.startswith("random:"):
            self.source, self.name, self.own = "random", o.model[7:], None
            self.identity = digest(o.model)
        elif os.path.isdir(o.model):
            config = os.path.join(o.model, "config.json")
            if not os.path.exists(config):
                raise RuntimeError(f"{o.model}: no config.json: not a Hugging Face directory")
            self.source, self.own = "hf", None
            self.name = os.path.basename(os.path.abspath(o.model))
            files = sorted(name for name in os.listdir(o.model) if name.endswith((".safetensors", ".json", ".model")))
            self.identity = digest(*(file_digest(os.path.join(o.model, name)) for name in files))
        else:
            if not os.path.exists(o.model):
                raise RuntimeError(f"{o.model}: no such file or directory")
            shape = read_shape(o.model)
            self.source, self.own = "bin", shape["type"]
            self.name = shape["name"] or os.path.basename(o.model)
            self.identity = file_digest(o.model)
        self.help = execute([o.quantize, "-h"])[0] if os.path.exists(o.quantize) else ""
        if self.own not in ("f32", "f16", None):
            self.refuse = f"{o.model} is {self.own}: other types are made from a Hugging Face directory, f32 or f16"
        else:
            self.refuse = ""

    def file(self, ending):
        """A name in --dir that another model does not have."""
        return os.path.join(self.o.dir, f"{plain(self.name)}-{self.identity[:8]}-{ending}")

    def checkpoint(self, dtype):
        """The path of the checkpoint of a type; makes it if it is not there. Raises RuntimeErrors."""
        if dtype == self.own:
            return self.path
        if dtype not in self.made:
            self.made[dtype] = self.make(dtype)
        return self.made[dtype]

    def make(self, dtype):
        base, _, group = dtype.partition("-g")
        arguments, needs, bits = DTYPES[base]
        path = self.file(dtype + ".bin")
        if self.refuse:
            raise RuntimeError(self.refuse)
        if needs and needs not in self.help:
            raise RuntimeError(f"this quantize knows no {needs}" if self.help else f"{self.o.quantize}: not there (make)")
        if os.path.exists(path):
            return path
        if len(arguments) > 1:
            arguments = [*arguments, "--calib", self.o.calib]
        arguments = [path, *arguments, *(["-g", group] if group else [])]
        f16 = self.path if self.own else self.file("f16.bin")
        if "--calib" in arguments and self.source == "hf":
            f16 = self.checkpoint("f16")        # calibration reads the model more than once: no pipe will do
        need_room(self.o.dir, self.n_weights() * bits / 8)
        say(f"making {path}")
        if self.source == "random":
            execute([self.o.quantize, "--random", self.name, path, base, *arguments[2:]])
        elif base in ("f16", "f32") and self.source == "hf":
            execute([sys.executable, EXPORT, self.path, path, "--dtype", base])
        elif base in ("f16", "f32"):
            execute([self.o.quantize, self.path, path, base])
        elif os.path.exists(f16):
            execute([self.o.quantize, f16, *arguments])
        else:                                   # straight to the type, without a file in between
            with tempfile.TemporaryFile() as messages:
                export = subprocess.Popen([sys.executable, EXPORT, self.path, "-"], stdout=subprocess.PIPE, stderr=messages)
                quantize = subprocess.run([self.o.quantize, "-", *arguments], stdin=export.stdout, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.PIPE, text=True)
                export.stdout.close()
                export.wait()
                messages.seek(0)
                said = messages.read().decode(errors="replace") if export.returncode > 0 else quantize.stderr
            if export.returncode or quantize.returncode:
                raise RuntimeError((said.strip().splitlines() or ["export.py and quantize failed"])[-1])
        return path

    def n_weights(self):
        """How many there are, about: from a checkpoint's table, or the bytes of an HF directory's files in 16 bits."""
        if self.source == "hf":
            return sum(os.path.getsize(os.path.join(self.path, name)) for name in os.listdir(self.path)
                       if name.endswith(".safetensors")) / 2
        if self.source == "random":
            return 12.3e9 if "nemo" in self.name else 7.3e9
        shape = read_shape(self.path)
        return (shape["ops"] + 2 * shape["ops_logits"]) / 2

    # Other engines' models: (path, whether its weights are ours)

    def knows(self, target):
        """Whether this export.py can write a target (--to gguf, --to hf)."""
        said = execute([sys.executable, EXPORT, "-h"])[0]
        return "--to" in said and target in said.split("--to", 1)[1]

    def convert(self, target, dtype, path):
        """Whether `path` holds the checkpoint of a type as a target of export.py --to; makes it if it can."""
        if self.source == "random":             # its weights are as good as any, and Q4_0 is what llama.cpp is fastest with
            return False
        try:
            if os.path.exists(path):
                return True
            if not self.knows(target):
                return False
            say(f"making {path}")
            execute([sys.executable, EXPORT, "--to", target, self.checkpoint(dtype), path])
            return True
        except RuntimeError as error:
            say(f"{path}: the same shape with random weights instead ({error})")
            return False

    def gguf(self, dtype, python):
        path = self.file(f"{dtype}.gguf")
        if self.convert("gguf", dtype, path):
            return path, True
        path = self.file(f"random-{dtype}.gguf")
        if not os.path.exists(path):
            need_room(self.o.dir, self.n_weights() * DTYPES[dtype.partition("-g")[0]][2] / 8)
            execute([python, os.path.join(BENCH, "random_gguf.py"), self.checkpoint(dtype), path])
        return path, False

    def hf(self, dtype, python):
        if self.source == "hf":
            return self.path, True
        path = self.file("hf")
        if dtype in ("f16", "f32") and self.convert("hf", dtype, path):
            return path, True
        path = self.file("random-hf")
        if not os.path.exists(os.path.join(path, "config.json")):
            need_room(self.o.dir, self.n_weights() * 2)
            with tempfile.TemporaryDirectory() as directory:
                shape = os.path.join(directory, "shape.json")
                write_json(shape, read_shape(self.checkpoint(dtype)))
                execute([python, PEERS_PY, "random", shape, path])
        return path, False


# --------------------------------------------------------------------------------------------------------------------
# What there is to do. A task is (key, cost, function): the key is a name for people, and where the result is kept.

class Bench:
    """A benchmark under way: the options, the model, and `state`, which is what results.json holds."""

    def __init__(self, o, model, argv):
        self.o, self.model, self.checkpoints, self.backends, self.notes = o, model, {}, [], []
        settings = {"model": model.name, "identity": model.identity, "in": o.n_in, "out": o.n_out, "prompt": o.prompt,
                    "warmup": o.warmup, "repeat": o.repeat, "threads": o.threads, "context": o.context,
                    "text": file_digest(o.text), "greedy tokens": o.greedy, "items": file_digest(o.items)}
        here = machine()
        settings["machine"] = here["processor"] + "".join(f", {gpu['name']}" for gpu in here["gpus"])
        self.path = os.path.join(o.output, "results.json")
        self.state = {"format": 1, "began": time.strftime("%Y-%m-%d %H:%M"), "settings": settings, "speed": {}, "peers": {},
                      "quality": {}, "operations": {}}
        if os.path.exists(self.path) and not o.fresh:
            self.resume(settings)
        self.state.update(machine=here, command=shlex.join(["bench.py", *argv]), checkpoints={}, failures={}, notes=self.notes)

    def resume(self, settings):
        """Goes on with what results.json holds, if it was measured in the same way."""
        with open(self.path) as f:
            try:
                state = json.load(f)
            except ValueError:
                raise RuntimeError(f"{self.path}: not whole, or not a result: --fresh begins anew") from None
        old = state.get("settings", {}) if isinstance(state, dict) else {}
        other = [f"{name} was {old.get(name)}" for name in settings if old.get(name) != settings[name]]
        if other:
            raise RuntimeError(f"{self.path} holds another run ({'; '.join(other)}): choose another --output, or --fresh")
        self.state = state
        say(f"going on with {self.path}: {sum(map(len, state['speed'].values()))} visits are there")

    def note(self, text):
        """Something that was left out, for the terminal and the report."""
        self.notes.append(text)
        say(text)

    def save(self):
        self.state["updated"] = time.strftime("%Y-%m-%d %H:%M")
        write_json(self.path, self.state)

    def program(self, backend):
        return self.o.run if backend == "cpu" else self.o.run_cuda

    def memory(self, backend):
        """Bytes that a backend has."""
        return memory_bytes() if backend == "cpu" else max((gpu["memory_bytes"] for gpu in gpus()), default=memory_bytes())

    def prepare(self):
        """Makes the checkpoints and finds out which backends work."""
        for dtype in self.o.dtypes:
            try:
                path = self.model.checkpoint(dtype)
                shape = read_shape(path)
                self.checkpoints[dtype] = path
                self.state["checkpoints"][dtype] = {"file": os.path.basename(path), "bytes": os.path.getsize(path),
                                                    "weights_read": shape["bytes"]}
            except RuntimeError as error:
                self.note(f"{dtype} is left out: {error}")
        if not self.checkpoints:
            raise RuntimeError("no checkpoint to measure: see above")
        smallest = min(self.checkpoints.values(), key=os.path.getsize)
        for backend in self.o.backends:
            program = self.program(backend)
            if not os.path.exists(program):
                self.note(f"{backend} is left out: {os.path.relpath(program)} is not there (make {PROGRAMS[backend]})")
                continue
            try:
                result, _ = run_json(program, smallest, ["-i", self.o.prompt, "-l", self.o.n_in, "-n", 1, "-E"], self.o.timeout)
                self.state["prompt_ids"] = result["sequences"][0]["prompt_ids"]
                self.backends.append(backend)
            except RuntimeError as error:
                self.note(f"{backend} is left out: {error}")
        if not self.backends:
            raise RuntimeError("no program to measure: see above")

    def fits(self, what, backend, n_bytes):
        """Whether n_bytes fit in a backend's memory; notes it if not."""
        memory = self.memory(backend)
        if n_bytes > 0.97 * memory:
            self.note(f"{what} is left out: needs {n_bytes / 1e9:.1f} GB, {memory / 1e9:.1f} are there")
        return n_bytes <= 0.97 * memory

    # Speed

    def speed_tasks(self):
        """Tasks of one visit to each combination."""
        for backend in self.backends:
            for dtype, path in self.checkpoints.items():
                if not self.fits(f"{backend} {dtype}", backend, os.path.getsize(path)):
                    continue
                for batch in self.o.batches:
                    cell = batch, self.o.n_in, self.o.n_out
                    key = f"{backend} {dtype} batch {batch}"

                    def visit(key=key, backend=backend, path=path, cell=cell):
                        result = generate(self.program(backend), path, cell, self.o.threads, self.o.warmup, self.o.repeat,
                                          self.o.prompt, timeout=self.o.timeout)
                        self.state["speed"].setdefault(key, []).append(result)
                        return result
                    yield key, cost(cell, self.o.warmup + self.o.repeat), visit

    def peer_tasks(self):
        """The same for the other engines: a task is all batch sizes of an engine with a type of weights."""
        for name in self.o.peers:
            peer, python = PEERS[name], self.o.peer_python.get(name, sys.executable)
            try:
                execute([python, PEERS_PY, "versions", name])
            except RuntimeError as error:
                self.note(f"{name} is left out: {str(error).removeprefix('peers.py: ')}")
                continue
            for backend in self.backends:
                if backend not in peer.DEVICES:
                    continue
                for kind, ours in peer.TYPES.items():
                    dtype = next((d for d in ours if d in self.checkpoints), None)
                    key = f"{name} {backend} {kind}"
                    if not dtype or not self.fits(key, backend, self.model.n_weights() * PEER_BITS[kind] / 8):
                        continue
                    cells = [(batch, self.o.n_in, self.o.n_out) for batch in self.o.batches]

                    def visit(key=key, name=name, peer=peer, python=python, backend=backend, kind=kind, dtype=dtype, cells=cells):
                        path, same = (self.model.gguf if peer.FORMAT == "gguf" else self.model.hf)(dtype, python)
                        results = ask_peer(python, name, {
                            "model": path, "type": kind, "device": backend, "cells": cells, "threads": self.o.threads,
                            "prompt_ids": self.state["prompt_ids"], "warmup": self.o.warmup, "repeat": self.o.repeat},
                            self.o.timeout)
                        for (batch, _, _), result in zip(cells, results):
                            if "error" in result:
                                self.fail(f"{key} batch {batch}", result["error"])
                        self.state["peers"].setdefault(key, []).append(
                            {"against": dtype, "same_weights": same,
                             "cells": {str(cell[0]): r for cell, r in zip(cells, results) if "error" not in r}})
                        return results
                    yield key, sum(cost(cell, self.o.repeat) for cell in cells), visit

    # Quality

    def quality_tasks(self):
        reference, n_text = self.checkpoints.get("f16"), os.path.getsize(self.o.text) / 3
        for backend in self.backends:
            program = self.program(backend)
            can_score = re.search(r"--mode .*\bscore\b", "".join(execute([program, "-h"])))
            if not can_score:
                self.note(f"{backend}: no task score: this {os.path.basename(program)} has no mode score")
            for dtype, path in self.checkpoints.items():
                if not self.fits(f"{backend} {dtype}, quality", backend, os.path.getsize(path)):
                    continue
                against = reference
                if reference and os.path.getsize(path) + os.path.getsize(reference) > 0.9 * self.memory(backend):
                    self.note(f"{backend} {dtype}: no divergence from f16: both models do not fit in memory")
                    against = None
                score = ["-m", "score", "-f", self.o.items]
                perplexity = ["-m", "perplexity", "-f", self.o.text, "-c", self.o.context]
                greedy = ["-f", os.path.join(BENCH, "prompts.txt"), "-b", 8, "-n", self.o.greedy, "-t", 0, "-E"]
                todo = [("perplexity", perplexity + (["--against", against] if against else []), n_text * (2 if against else 1)),
                        ("greedy text", greedy, cost((8, 10, self.o.greedy), 1))]
                if can_score:
                    todo.append(("score", score, os.path.getsize(self.o.items) / 3))
                for what, arguments, c in todo:
                    key = f"{backend} {dtype} {what}"

                    def visit(key=key, program=program, path=path, arguments=arguments):
                        result, _ = run_json(program, path, [*arguments, "-j", self.o.threads], self.o.timeout)
                        self.state["quality"][key] = result
                        return result
                    yield key, c, visit

    def operation_tasks(self):
        batches = sorted({min(self.o.batches), max(self.o.batches)})[-PROFILED:]
        for backend in self.backends:
            for dtype, path in self.checkpoints.items():
                for batch in batches:
                    cell, key = (batch, self.o.n_in, self.o.n_out), f"{backend} {dtype} batch {batch} operations"
                    if os.path.getsize(path) > 0.97 * self.memory(backend):
                        continue

                    def visit(key=key, backend=backend, path=path, cell=cell):
                        arguments = ["-E", "-P", "-i", self.o.prompt, "-b", cell[0], "-l", cell[1], "-n", cell[2],
                                     "-j", self.o.threads, "-w", min(self.o.warmup, 1)]
                        _, messages = run_json(self.program(backend), path, arguments, self.o.timeout)
                        self.state["operations"][key] = report.parse_operations(messages)
                    yield key, cost(cell, 2), visit

    # The run

    def fail(self, key, message):
        self.state["failures"][key] = message
        Progress.clear()
        say(f"{key} failed: {message}")

    def run(self):
        """Does what is not done yet, saving after each task."""
        o, state, plan = self.o, self.state, []
        visits = [*self.speed_tasks(), *self.peer_tasks()]
        for i in range(o.rounds):
            todo = [task for task in visits if len((state["speed"] | state["peers"]).get(task[0], ())) <= i]
            random.Random(i).shuffle(todo)
            plan += [(*task, f", round {i + 1} of {o.rounds}") for task in todo]
        if o.quality and self.model.source != "random":
            plan += [(*task, "") for task in self.quality_tasks() if task[0] not in state["quality"]]
        elif self.model.source == "random":
            self.note("quality is left out: the weights are random")
        plan += [(*task, "") for task in self.operation_tasks() if task[0] not in state["operations"]]
        self.save()
        progress = Progress([(key, c) for key, c, _, _ in plan], state.get("seconds"))
        for key, _, visit, more in plan:
            progress.start(key, more)
            if key not in state["failures"]:
                try:
                    visit()
                except RuntimeError as error:
                    self.fail(key, str(error))
            progress.end()
            state["seconds"] = progress.known
            self.save()
        progress.clear()


# --------------------------------------------------------------------------------------------------------------------

def listed(known=None, kind=str):
    """A parser of a comma-separated list for argparse, of `known` words if they are given."""
    def parse(text):
        words = [word for word in text.split(",") if word]
        for word in words:
            if known and word.partition("-g")[0] not in known and word not in known:
                raise argparse.ArgumentTypeError(f"{word} is not one of {', '.join(known)}")
            if kind is int and not (word.isdigit() and int(word) > 0):
                raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
        if not words:
            raise argparse.ArgumentTypeError("the list is empty")
        return list(dict.fromkeys(map(kind, words)))
    return parse


def peer_names(text):
    """The engines that a list of names or beginnings of names stands for; none for "none"."""
    names = [name for word in text.split(",") for name in PEERS if name.startswith(word)] if text != "none" else []
    if not names and text != "none":
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def count(least):
    def parse(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return int(text)
    return parse


def arguments(argv):
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face directory, a checkpoint, or random:mistral-7b")
    add("--backends", type=listed(PROGRAMS), default=list(PROGRAMS), help="cpu is run, cuda is run_cuda (cpu,cuda)")
    add("--dtypes", type=listed(DTYPES), default=["f16", "q8", "q4", "nf4", "gptq"], metavar="LIST",
        help=f"of {','.join(DTYPES)}; q4-g32 is q4 in groups of 32 (f16,q8,q4,nf4,gptq)")
    add("--batches", type=listed(kind=int), default=[1, 2, 4, 8, 16, 32], metavar="LIST", help="(1,2,4,8,16,32)")
    add("--in", dest="n_in", type=count(1), default=128, metavar="N", help="prompt tokens of a sequence (128)")
    add("--out", dest="n_out", type=count(1), default=128, metavar="N", help="new tokens of a sequence (128)")
    add("--rounds", type=count(1), default=3, help="visits of each combination, of which the medians are taken (3)")
    add("-w", "--warmup", type=count(0), default=1, help="passes before the measured ones of a visit (1)")
    add("-r", "--repeat", type=count(1), default=1, help="measured passes of a visit, their median counts (1)")
    add("-j", "--threads", type=count(1), default=CORES, help="(the cores)")
    add("--prompt", default="Once upon a time", help="repeated or cut to --in tokens (Once upon a time)")
    add("--peers", type=peer_names, default=list(PEERS), metavar="LIST",
        help=f"other engines, of {', '.join(PEERS)}, or beginnings of these, or none (those that are installed)")
    add("--peer-python", action="append", default=[], metavar="NAME=PYTHON", help="the Python that has an engine (this one)")
    add("--text", default=os.path.join(ROOT, "tests", "text", "heldout-fairy.txt"),
        help="for perplexity (tests/text/heldout-fairy.txt)")
    add("--context", type=count(2), default=512, metavar="N", help="positions of a window of the perplexity (512)")
    add("--greedy", type=count(1), default=64, metavar="N", help="new tokens of the greedy texts that are compared (64)")
    add("--items", default=os.path.join(BENCH, "items.tsv"), help="multiple-choice items, see items.py (bench/items.tsv)")
    add("--calib", default=os.path.join(ROOT, "tests", "text", "treasure-eval.txt"),
        help="calibration text of gptq and awq (tests/text/treasure-eval.txt)")
    add("--no-quality", dest="quality", action="store_false", help="speed and memory alone")
    add("--dir", default=os.path.join(ROOT, "build", "bench"), help="where checkpoints are made (build/bench)")
    add("-o", "--output", metavar="DIR", help="(bench/results/MODEL)")
    add("--fresh", action="store_true", help="begin anew instead of going on with what --output holds")
    add("--timeout", type=count(1), default=3600, metavar="SECONDS", help="of one visit; after that it counts as failed (3600)")
    add("--run", default=os.path.join(ROOT, "run"), help="(run)")
    add("--run-cuda", default=os.path.join(ROOT, "run_cuda"), help="(run_cuda)")
    add("--quantize", default=os.path.join(ROOT, "quantize"), help="(quantize)")
    report.add_options(parser)
    o = parser.parse_args(argv)
    bad = [text for text in o.peer_python if text.partition("=")[0] not in PEERS]
    if bad:
        parser.error(f"--peer-python {bad[0]}: NAME=PYTHON, with a name of {', '.join(PEERS)}")
    o.peer_python = dict(text.split("=", 1) for text in o.peer_python)
    for path in (o.text, o.items, o.calib):
        if not os.path.isfile(path):
            parser.error(f"{path}: no such file")
    return o


def main(argv=None):
    """Measures, prints, writes; returns the exit status."""
    o = arguments(argv)
    model = Model(o)
    o.output = o.output or os.path.join(BENCH, "results", plain(model.name))
    need_room(o.output, 0)
    bench = Bench(o, model, sys.argv[1:] if argv is None else argv)
    bench.prepare()
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.save()
        Progress.clear()
        say(f"\nbench.py: stopped; the same command goes on from {bench.path}")
        return 1
    return report.write(bench.state, o.output, o)


if __name__ == "__main__":
    outcome("bench.py", main)
