"""The benchmark: this project's programs over types of weights and batch sizes, beside other engines, in one report.

    python3 bench/bench.py --model HF_DIR_or_BIN [--backends cpu,cuda] [--dtypes f16,q8,q4,nf4,gptq] [--batches 1,2,4,8,16,32]

MODEL is a Hugging Face directory with a Mistral model, a checkpoint or several, or random:mistral-7b for that shape with random
weights. Of several checkpoints each is a type of the same model (FILE, or TYPE=FILE where the file does not say, as in gptq=FILE).
What is measured, in this order:
  - speed: --rounds visits of every combination, in an order shuffled anew each round, so that a slow minute does not hit
    one column; other engines (--peers) that are installed take their turns among them;
  - quality: perplexity of --text, divergence from f16, greedy text, and multiple-choice items if run can score them;
  - time by operation.
A table goes to the terminal; results.json, results.csv, report.md and charts (PNG, with matplotlib) go to --output. A run
that was stopped goes on where it was when the same command is given again. What fails is a line in the report.
Exit status: 0 done, 1 nothing could be measured or no combination reached --target, 2 wrong usage."""
import argparse
import collections
import functools
import json
import os
import random
import shlex
import sys
import time

import report
from measure import (BENCH, CORES, PEERS as PEERS_PY, ROOT, Progress, ask_peer, cost, execute, file_digest, generate, machine,
                     memory_bytes, need_room, outcome, read_shape, run_json, say, write_json)
from models import DTYPES, USUAL, Model, base, plain
from peers import PEERS

PROGRAMS = {"cpu": "run", "cuda": "run_cuda"}
PEER_BITS = {"float32": 32, "float16": 16, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "nf4": 4.6, "int8": 9}

# What there is to do. key: a name for people, and where the result is kept; cost: how long it takes, relative to others;
# do: does it, raising a RuntimeError if it fails
Task = collections.namedtuple("Task", "key cost do")


class Bench:
    """A benchmark under way: the options, the model, `pairs` [(backend, type, checkpoint)] that work, and `state`, which is
    what results.json holds."""

    def __init__(self, o, model, argv):
        self.o, self.model, self.checkpoints, self.pairs, self.notes = o, model, {}, [], []
        here = machine()
        settings = {"model": model.name, "identity": model.identity, "in": o.n_in, "out": o.n_out, "prompt": o.prompt,
                    "warmup": o.warmup, "repeat": o.repeat, "threads": o.threads, "context": o.context,
                    "text": file_digest(o.text), "greedy tokens": o.greedy, "items": file_digest(o.items), "calib": file_digest(o.calib),
                    "machine": ", ".join([here["processor"], *(gpu["name"] for gpu in here["gpus"])])}
        self.path = os.path.join(o.output, "results.json")
        self.state = {"format": 1, "began": time.strftime("%Y-%m-%d %H:%M"), "settings": settings, "programs": {}, "speed": {},
                      "peers": {}, "quality": {}, "operations": {}}
        if os.path.exists(self.path) and not o.fresh:
            self.resume(settings)
        self.state.update(machine=here, command=shlex.join(["bench.py", *argv]), checkpoints={}, failures={}, notes=self.notes)

    def resume(self, settings):
        """Goes on with what results.json holds, if it was measured in the same way."""
        try:
            self.state = report.load_state(self.path)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: --fresh begins anew") from None
        old = self.state["settings"]
        self.demand_same([f"{name} was {old.get(name)}" for name in settings if old.get(name) != settings[name]])
        say(f"going on with {self.path}: {sum(map(len, self.state['speed'].values()))} visits are there")

    def demand_same(self, different):
        """Raises a RuntimeError if there is anything in which results.json differs from this run."""
        if different:
            raise RuntimeError(f"{self.path} holds another run ({'; '.join(different)}): choose another --output, or --fresh")

    def note(self, text):
        """Something that was left out, for the terminal and the report."""
        self.notes.append(text)
        say(text)

    def save(self):
        self.state["updated"] = time.strftime("%Y-%m-%d %H:%M")
        write_json(self.path, self.state)

    def program(self, backend):
        return self.o.run if backend == "cpu" else self.o.run_cuda

    def fits(self, what, backend, n_bytes):
        """Whether n_bytes fit in a backend's memory, as far as that is known; notes it if not."""
        sizes = [gpu["memory_bytes"] for gpu in self.state["machine"]["gpus"] if gpu["memory_bytes"]]
        there = max(sizes, default=memory_bytes()) if backend == "cuda" else memory_bytes()
        if n_bytes > 0.97 * there:
            self.note(f"{what}: needs {n_bytes / 1e9:.1f} GB, {there / 1e9:.1f} are there")
        return n_bytes <= 0.97 * there

    # Before the first measurement

    def prepare(self):
        """Makes the checkpoints and finds out which of them work on which backend. Raises a RuntimeError if none does."""
        for dtype in self.o.dtypes:
            try:
                path = self.model.checkpoint(dtype)
                self.checkpoints[dtype] = path
                self.state["checkpoints"][dtype] = {"file": os.path.basename(path), "bytes": os.path.getsize(path),
                                                    "weights_read": read_shape(path)["bytes"]}
            except RuntimeError as error:
                self.note(f"{dtype} is left out: {error}")
        if not self.checkpoints:
            raise RuntimeError("no checkpoint to measure: see above")
        for backend in self.o.backends:
            program = self.program(backend)
            if not os.path.exists(program):
                self.note(f"{backend} is left out: {os.path.relpath(program)} is not there (make {PROGRAMS[backend]})")
                continue
            build = file_digest(program)
            if self.state["programs"].setdefault(backend, build) != build:
                self.demand_same([f"{os.path.relpath(program)} was another build"])
            self.pairs += [(backend, dtype, path) for dtype, path in self.checkpoints.items() if self.works(backend, dtype, path)]
        if not self.pairs:
            raise RuntimeError("no program to measure: see above")

    def works(self, backend, dtype, path):
        """Whether a backend can run a checkpoint: it did, or a short run of it succeeds; notes why not."""
        if not self.fits(f"{backend} {dtype} is left out", backend, os.path.getsize(path)):
            return False
        if any(key.startswith(f"{backend} {dtype} ") for key in self.state["speed"]):
            return True
        try:
            result, _ = run_json(self.program(backend), path, ["-i", self.o.prompt, "-l", self.o.n_in, "-n", 1, "-E"],
                                 self.o.timeout)
            self.state["prompt_ids"] = result["sequences"][0]["prompt_ids"]
            return True
        except RuntimeError as error:
            self.note(f"{backend} {dtype} is left out: {error}")
            return False

    # Speed

    def speed_tasks(self):
        """Tasks of one visit to each combination."""
        for backend, dtype, path in self.pairs:
            for batch in self.o.batches:
                cell, key = (batch, self.o.n_in, self.o.n_out), f"{backend} {dtype} batch {batch}"
                yield Task(key, cost(cell, self.o.warmup + self.o.repeat),
                           functools.partial(self.measure_speed, key, backend, path, cell))

    def measure_speed(self, key, backend, path, cell):
        result = generate(self.program(backend), path, cell, self.o.threads, self.o.warmup, self.o.repeat, self.o.prompt,
                          timeout=self.o.timeout)
        self.state["speed"].setdefault(key, []).append(result)

    def peer_tasks(self):
        """The same for the other engines: a task is all batch sizes of an engine with a type of weights."""
        cells = [(batch, self.o.n_in, self.o.n_out) for batch in self.o.batches]
        for name in self.o.peers:
            try:
                execute([self.peer_python(name), PEERS_PY, "versions", name])
            except RuntimeError as error:
                self.note(f"{name} is left out: {str(error).removeprefix('peers.py: ')}")
                continue
            for backend in PEERS[name].DEVICES:
                dtypes = [dtype for b, dtype, _ in self.pairs if b == backend]
                for kind, ours in PEERS[name].TYPES.items():
                    dtype = next((d for own in ours for d in dtypes if own in (d, base(d))), None)
                    key, n_bytes = f"{name} {backend} {kind}", self.model.n_weights() * PEER_BITS[kind] / 8
                    if dtype and self.fits(f"{key} is left out", backend, n_bytes):
                        yield Task(key, sum(cost(cell, self.o.repeat) for cell in cells),
                                   functools.partial(self.measure_peer, key, dtype, cells))

    def peer_python(self, name):
        return self.o.peer_python.get(name, sys.executable)

    def measure_peer(self, key, dtype, cells):
        name, backend, kind = key.split()
        python = self.peer_python(name)
        path, same = (self.model.gguf if PEERS[name].FORMAT == "gguf" else self.model.hf)(dtype, python)
        task = {"model": path, "type": kind, "device": backend, "cells": cells, "threads": self.o.threads,
                "prompt_ids": self.state["prompt_ids"], "warmup": self.o.warmup, "repeat": self.o.repeat}
        measured = {}
        for (batch, _, _), result in zip(cells, ask_peer(python, name, task, self.o.timeout)):
            if "error" in result:
                self.fail(f"{key} batch {batch}", result["error"])
            else:
                measured[str(batch)] = result
        self.state["peers"].setdefault(key, []).append({"against": dtype, "same_weights": same, "cells": measured})

    # Quality and time by operation

    def quality_tasks(self):
        """Perplexity with divergence from f16, greedy text and task score of each pair."""
        reference, n_text = self.checkpoints.get("f16"), os.path.getsize(self.o.text) / 3
        greedy = ["-f", os.path.join(BENCH, "prompts.txt"), "-b", 8, "-n", self.o.greedy, "-t", 0, "-E"]
        for backend, dtype, path in self.pairs:
            perplexity = ["-m", "perplexity", "-f", self.o.text, "-c", self.o.context]
            if reference and self.fits(f"{backend} {dtype}: no divergence from f16, two models at once", backend,
                                       1.1 * (os.path.getsize(path) + os.path.getsize(reference))):
                perplexity += ["--against", reference]
            for what, arguments, c in (("perplexity", perplexity, n_text * (2 if "--against" in perplexity else 1)),
                                       ("greedy text", greedy, cost((8, 10, self.o.greedy), 1)),
                                       ("score", ["-m", "score", "-f", self.o.items], os.path.getsize(self.o.items) / 3)):
                key = f"{backend} {dtype} {what}"
                yield Task(key, c, functools.partial(self.measure_quality, key, backend, path, arguments))

    def measure_quality(self, key, backend, path, arguments):
        self.state["quality"][key] = run_json(self.program(backend), path, [*arguments, "-j", self.o.threads], self.o.timeout)[0]

    def operation_tasks(self):
        """The smallest and the largest batch of each pair, with -P."""
        for backend, dtype, path in self.pairs:
            for batch in sorted({min(self.o.batches), max(self.o.batches)}):
                cell, key = (batch, self.o.n_in, self.o.n_out), f"{backend} {dtype} batch {batch} operations"
                yield Task(key, cost(cell, 2), functools.partial(self.measure_operations, key, backend, path, cell))

    def measure_operations(self, key, backend, path, cell):
        batch, n_in, n_out = cell
        _, messages = run_json(self.program(backend), path, ["-E", "-P", "-i", self.o.prompt, "-b", batch, "-l", n_in, "-n", n_out,
                                                             "-j", self.o.threads, "-w", min(self.o.warmup, 1)], self.o.timeout)
        self.state["operations"][key] = report.parse_operations(messages)

    # The run

    def plan(self):
        """[(task, what to say beside it)] of all that is not done yet, in order."""
        o, state, plan = self.o, self.state, []
        visits = [*self.speed_tasks(), *self.peer_tasks()]
        for i in range(o.rounds):
            todo = [task for task in visits if len((state["speed"] | state["peers"]).get(task.key, ())) <= i]
            random.Random(i).shuffle(todo)
            plan += [(task, f", round {i + 1} of {o.rounds}") for task in todo]
        if o.quality and self.model.random:
            self.note("quality is left out: the weights are random")
        elif o.quality:
            plan += [(task, "") for task in self.quality_tasks() if task.key not in state["quality"]]
        return plan + [(task, "") for task in self.operation_tasks() if task.key not in state["operations"]]

    def run(self):
        """Does what is not done yet, saving after each task. What failed once is not tried again in this run."""
        plan = self.plan()
        self.save()
        progress = Progress([(task.key, task.cost) for task, _ in plan], self.state.get("seconds"))
        for task, more in plan:
            progress.start(task.key, more)
            if task.key not in self.state["failures"]:
                try:
                    task.do()
                except RuntimeError as error:
                    self.fail(task.key, str(error))
            progress.end()
            self.state["seconds"] = progress.known
            self.save()
        progress.clear()

    def fail(self, key, message):
        self.state["failures"][key] = message
        Progress.clear()
        say(f"{key} failed: {message}")


# --------------------------------------------------------------------------------------------------------------------

def listed(known=None, kind=str):
    """A parser of a comma-separated list for argparse, of `known` words if they are given."""
    def parse(text):
        words = [word for word in text.split(",") if word]
        for word in words:
            if known and base(word) not in known:
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
    add("--model", required=True, nargs="+", help="a Hugging Face directory, checkpoints, or random:mistral-7b")
    add("--backends", type=listed(PROGRAMS), default=list(PROGRAMS), help="cpu is run, cuda is run_cuda (cpu,cuda)")
    add("--dtypes", type=listed(DTYPES), metavar="LIST",
        help=f"of {','.join(DTYPES)}; q4-g32 is q4 in groups of 32 ({','.join(USUAL)}; those of several checkpoints)")
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
    bad = [text for text in o.peer_python if text.partition("=")[0] not in PEERS or "=" not in text]
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
    o.dtypes = model.dtypes(o.dtypes)
    o.output = o.output or os.path.join(BENCH, "results", plain(model.name))
    need_room(o.output, 0)
    bench = Bench(o, model, sys.argv[1:] if argv is None else argv)
    bench.prepare()
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.save()
        Progress.clear()
        say(f"\nbench.py: stopped; the same command goes on from {bench.path}, report.py reports what is there")
        return 1
    return report.write(bench.state, o.output, o)


if __name__ == "__main__":
    outcome("bench.py", main)
