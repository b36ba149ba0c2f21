"""make speed: the speed of run on this machine's CPU beside the machine's ceilings and, where it is installed, llama.cpp.

For each type of weights: a checkpoint of random weights in the shape of Mistral-7B, made where it is missing; then rounds
of
  - the ceilings (limits.c), asked before and after what is measured under them: the higher counts; in this process, which keeps
    the 2 GiB that it reads,
  - run: a pass to warm up and a measured one of each of CELLS, sampling included,
  - llama.cpp (peers.py, in a process of its own): the same without sampling, on a GGUF file of the same shape.
So ours and theirs take turns. Shares and ratios are formed within a round; every figure is the median over the rounds.
A table goes to standard output, everything that was measured to a JSON file. Needs nothing but the standard library, and
for llama.cpp the packages llama-cpp-python, gguf and numpy in the Python that runs this."""
import argparse
import ctypes
import importlib.util
import os
import statistics
import subprocess
import sys
import time

from measure import (BENCH, CORES, ROOT, Progress, ask_peer, cost, execute, generate, machine, memory_bytes, need_room, outcome,
                     read_shape, say, write_json)

SHAPE = "mistral-7b"
GIGABYTES = {"q4": (3.85, 4.08), "q8": (7.70, 7.70), "f16": (14.49, 14.49)}     # of our checkpoint, of the GGUF file

# What is run: name: (sequences, prompt tokens of each, new tokens of each). The first new token comes from the prompt's
# pass, so that 17 of them are 16 steps of decoding, at the positions 128 to 143.
CELLS = {"batch 1": (1, 128, 17), "batch 8": (8, 128, 17), "batch 32": (32, 128, 16), "context": (1, 4096, 17),
         "long": (32, 128, 128)}
ONLY_WITH_LONG, ONLY_OURS = ["long"], ["context"]

# The figures: (name, cell, statistic of run's JSON)
FIGURES = [("prefill, 128 tokens", "batch 1", "prefill_tok_s"),
           ("decode, batch 32", "batch 32", "decode_tok_s"),
           ("decode, batch 8", "batch 8", "decode_tok_s"),
           ("decode, batch 1", "batch 1", "decode_tok_s"),
           ("32 x (128 + 16), in and out", "batch 32", "total_tok_s"),
           ("32 x (128 + 128), in and out", "long", "total_tok_s"),
           ("prefill, 4,096 tokens", "context", "prefill_tok_s"),
           ("decode at position 4,096", "context", "decode_tok_s")]

# What is aimed at. TARGETS: tok/s of the 7B shape on a machine with the ceilings of REFERENCE, scaled with bound()
# elsewhere; TARGET_SHARE: a share of bound(); TARGET_KEPT: a share of another figure of the same round.
REFERENCE = {"int8_peak": 2170, "fp32_peak": 540, "read_bandwidth": 44}
TARGETS = {"q4": {"prefill, 128 tokens": 95, "decode, batch 32": 85, "decode, batch 8": 45,
                  "32 x (128 + 16), in and out": 85, "32 x (128 + 128), in and out": 85},
           "q8": {"prefill, 128 tokens": 95, "decode, batch 32": 80, "decode, batch 8": 30},
           "f16": {"prefill, 128 tokens": 30, "decode, batch 32": 26, "decode, batch 8": 18}}
TARGET_SHARE = {"decode, batch 1": 0.95}
TARGET_KEPT = {"prefill, 4,096 tokens": (0.85, "prefill, 128 tokens"),
               "decode at position 4,096": (0.85, "decode, batch 1")}


# --------------------------------------------------------------------------------------------------------------------
# What there is to do, and how fast it could be

def load_limits(path, threads):
    """bench/limits.c as a library, whose functions measure with so many threads. A program of its own would give 2 GiB back
    each time, which disturbs what is measured next (SPEED.md, What a measurement leaves behind)."""
    given = dict(os.environ)        # OpenMP looks there as it is loaded; threads that spin or stay on a core would be in run's way
    for name in [name for name in given if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        library = ctypes.CDLL(os.path.abspath(path))
        for name in REFERENCE:
            getattr(library, name).restype = ctypes.c_double
    except AttributeError as error:
        raise RuntimeError(f"not what make build/limits.so makes: {error}") from None
    finally:
        os.environ.clear()
        os.environ.update(given)
    return library


def ceilings(library):
    """{name of REFERENCE: what the machine can do now}."""
    limits = {name: getattr(library, name)() for name in REFERENCE}
    if not limits["read_bandwidth"]:
        raise RuntimeError("no memory for the 2 GiB that reading is measured with")
    return limits


def work(shape, cell, statistic):
    """What a statistic of a cell stands for: (tokens, operations of their products with weights, bytes read of weights and,
    in decoding, of the cache). A prefill counts as one reading of the weights: arithmetic bounds it."""
    batch, n_in, n_out = cell
    steps = n_out - 1
    position = 2 * 2 * shape["n_kv_heads"] * shape["head_dim"] * shape["n_layers"]      # bytes: keys and values of 16 bits
    if statistic == "prefill_tok_s":
        return batch * n_in, batch * (n_in * shape["ops"] + shape["ops_logits"]), shape["bytes"]
    if statistic == "decode_tok_s":
        return (batch * steps, batch * steps * (shape["ops"] + shape["ops_logits"]),
                steps * (shape["bytes"] + batch * min(n_in + n_out / 2, shape["window"] or 1e9) * position))
    prefill, decode = work(shape, cell, "prefill_tok_s"), work(shape, cell, "decode_tok_s")
    return batch * (n_in + n_out), prefill[1] + decode[1], prefill[2] + decode[2]


def arithmetic(shape):
    """The name of the ceiling of a model's arithmetic: of integers for quantized weights."""
    return "int8_peak" if shape["type"] in ("q8", "q4") else "fp32_peak"


def bound(shape, cell, statistic, limits):
    """tok/s that the ceilings allow: arithmetic or reading at its peak, whichever takes longer."""
    tokens, ops, size = work(shape, cell, statistic)
    if statistic == "total_tok_s":
        parts = ["prefill_tok_s", "decode_tok_s"]
        return tokens / sum(work(shape, cell, part)[0] / bound(shape, cell, part, limits) for part in parts)
    return tokens / max(ops / 1e9 / limits[arithmetic(shape)], size / 1e9 / limits["read_bandwidth"])


# --------------------------------------------------------------------------------------------------------------------
# The table

def figures(shape, entry):
    """The figures of one round, those that were measured: {name: {tok_s, of_peak, of_bandwidth, target, llama_cpp, ...}}."""
    rows, limits = {}, entry["ceilings"]
    targets = TARGETS.get(shape["type"], {}) if (shape["dim"], shape["n_layers"]) == (4096, 32) else {}
    for name, cell, statistic in FIGURES:
        if cell not in entry["ours"]:
            continue
        tok_s = entry["ours"][cell][statistic]
        tokens, ops, size = work(shape, CELLS[cell], statistic)
        most = bound(shape, CELLS[cell], statistic, limits)
        row = rows[name] = {"tok_s": tok_s, "of_peak": tok_s * ops / tokens / 1e9 / limits[arithmetic(shape)]}
        if statistic == "decode_tok_s":
            row["of_bandwidth"] = tok_s * size / tokens / 1e9 / limits["read_bandwidth"]
        if name in targets:
            row["target"] = targets[name] * most / bound(shape, CELLS[cell], statistic, REFERENCE)
        elif name in TARGET_SHARE:
            row["target"] = TARGET_SHARE[name] * most
        elif name in TARGET_KEPT and TARGET_KEPT[name][1] in rows:
            row["target"] = TARGET_KEPT[name][0] * rows[TARGET_KEPT[name][1]]["tok_s"]
        if "target" in row:
            row["of_target"] = tok_s / row["target"]
        if cell in entry["llama_cpp"]:
            row["llama_cpp"] = entry["llama_cpp"][cell][statistic]
            row["ratio"] = tok_s / row["llama_cpp"]
    return rows


def medians(rounds):
    """The median of each value over a list of {name: {column: value}}, of the rounds that have it."""
    result = {}
    for name in rounds[0]:
        columns = dict.fromkeys(column for rows in rounds for column in rows[name])
        result[name] = {column: statistics.median(rows[name][column] for rows in rounds if column in rows[name])
                        for column in columns}
    return result


def print_table(shape, rows, limits, threads):
    """The figures of one type of weights as a Markdown table that can be read as it stands."""
    print(f"\n{shape['type']}: {shape['bytes'] / 1e9:.2f} GB of weights a step, {threads} threads; ceilings: "
          f"int8 {limits['int8_peak']:,.0f} GOP/s, FP32 {limits['fp32_peak']:,.0f} GFLOP/s, "
          f"reading {limits['read_bandwidth']:.1f} GB/s")
    peak = {"int8_peak": "of int8 peak", "fp32_peak": "of FP32 peak"}[arithmetic(shape)]
    columns = [("tok/s", "tok_s", ",.1f"), (peak, "of_peak", ".0%"), ("of bandwidth", "of_bandwidth", ".0%"),
               ("target here", "target", ",.1f"), ("of target", "of_target", ".0%")]
    if any("ratio" in row for row in rows.values()):
        columns += [("llama.cpp", "llama_cpp", ",.1f"), ("ratio", "ratio", ".2f")]
    print(f"| {shape['type']:<28} | " + " | ".join(f"{title:>12}" for title, _, _ in columns) + " |")
    print(f"| {'-' * 28} | " + " | ".join(["-----------:"] * len(columns)) + " |")
    for name, row in rows.items():
        values = [format(row[column], text) if column in row else "" for _, column, text in columns]
        print(f"| {name:<28} | " + " | ".join(f"{value:>12}" for value in values) + " |")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------------------

def need_files(directory, dtypes, quantize, peer):
    """[(checkpoint, GGUF file or None)]: makes those that are missing, if the disk has room for all of them."""
    ends = ["bin", "gguf"] if peer else ["bin"]
    files = [[os.path.join(directory, f"{SHAPE}-{dtype}.{end}") for end in ends] for dtype in dtypes]
    sizes = {path: size for dtype, paths in zip(dtypes, files) for path, size in zip(paths, GIGABYTES[dtype])}
    missing = {path: size for path, size in sizes.items() if not os.path.exists(path)}
    need_room(directory, 1e9 * sum(missing.values()))
    for path in missing:
        say(f"making {path}, {missing[path]:.2f} GB of random weights")
    for dtype, (checkpoint, *gguf) in zip(dtypes, files):
        if checkpoint in missing:
            subprocess.run([quantize, "--random", SHAPE, checkpoint, dtype], check=True)
        if gguf and gguf[0] in missing:
            subprocess.run([sys.executable, os.path.join(BENCH, "random_gguf.py"), checkpoint, gguf[0]], check=True)
    return [(checkpoint, gguf[0] if gguf else None) for checkpoint, *gguf in files]


def arguments():
    parser = argparse.ArgumentParser(prog="speed.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dtypes", default="q4,q8,f16", help="types of weights (q4,q8,f16)")
    add("--dir", default=os.path.join(ROOT, "build", "bench"), help="where the checkpoints are (build/bench)")
    add("--long", action="store_true", help="measure 32 x (128 + 128) too")
    add("--cells", help="measure only these, of: " + ",".join(CELLS))
    add("--rounds", type=int, default=3, help="rounds, of which the medians are taken (3)")
    add("-w", "--warmup", type=int, default=1, help="passes before the measured ones of a round (1)")
    add("-r", "--repeat", type=int, default=1, help="measured passes of a round, their median counts (1)")
    add("-j", "--threads", type=int, default=CORES, help="(the cores)")
    add("--no-llama-cpp", action="store_true", help="leave llama.cpp out")
    add("--model", help="measure this checkpoint, without llama.cpp, instead of random ones")
    add("-o", "--output", default=os.path.join(BENCH, "results", "speed.json"), help="(bench/results/speed.json)")
    for program, path in (("run", "run"), ("quantize", "quantize"), ("limits", "build/limits.so")):
        add("--" + program, default=os.path.join(ROOT, path), help=f"({path}, which make speed builds)")
    o = parser.parse_args()
    o.dtypes = o.dtypes.split(",")
    o.cells = o.cells.split(",") if o.cells else [name for name in CELLS if o.long or name not in ONLY_WITH_LONG]
    for name, given, known in (("--dtypes", o.dtypes, GIGABYTES), ("--cells", o.cells, CELLS)):
        if not set(given) <= set(known):
            parser.error(f"{name} {','.join(given)}: known are {','.join(known)}")
    if min(o.rounds, o.repeat, o.threads) < 1 or o.warmup < 0:
        parser.error("--rounds, --repeat and --threads are at least 1, --warmup at least 0")
    return o


def main():
    """Makes what is missing, measures, prints a table for each type of weights, and writes everything."""
    o = arguments()
    missing = [name for name in ("llama_cpp", "gguf", "numpy") if not importlib.util.find_spec(name)]
    peer = not (o.no_llama_cpp or o.model or missing)
    if missing and not (o.no_llama_cpp or o.model):
        say(f"llama.cpp is skipped: this Python has no {', '.join(missing)}")
    library, memory = load_limits(o.limits, o.threads), memory_bytes() / 1e9
    fitting = [dtype for dtype in o.dtypes if GIGABYTES[dtype][0] + 4 < memory]     # caches, and what limits.c reads
    if fitting != o.dtypes and not o.model:
        say(f"skipped, too large for {memory:.1f} GB of memory: {', '.join(sorted(set(o.dtypes) - set(fitting)))}")
    files = [(o.model, None)] if o.model else need_files(o.dir, fitting, o.quantize, peer)

    cells = {name: CELLS[name] for name in o.cells}
    peer_cells = {name: cell for name, cell in cells.items() if peer and name not in ONLY_OURS}
    shapes = [read_shape(checkpoint) for checkpoint, _ in files]
    items = []
    for shape in shapes:
        for _ in range(o.rounds):
            items += [(f"{shape['type']} {name}", cost(cell, o.warmup + o.repeat)) for name, cell in cells.items()]
            if peer_cells:
                items.append((f"{shape['type']} llama.cpp", 2 * sum(cost(cell, o.repeat) for cell in peer_cells.values())))
    progress = Progress(items)
    report = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "arguments": sys.argv[1:], "results": []}

    for (checkpoint, gguf), shape in zip(files, shapes):
        rounds = []
        for i in range(o.rounds):
            entry, before = {"ours": {}, "llama_cpp": {}}, ceilings(library)
            for name, cell in cells.items():
                progress.start(f"{shape['type']} {name}", f", round {i + 1} of {o.rounds}")
                entry["ours"][name] = generate(o.run, checkpoint, cell, o.threads, o.warmup, o.repeat)
                progress.end()
            after = ceilings(library)
            entry["ceilings"] = {name: max(before[name], after[name]) for name in before}
            if peer_cells:
                progress.start(f"{shape['type']} llama.cpp", f", round {i + 1} of {o.rounds}")
                # any ids below the smallest vocabulary will do
                task = {"model": gguf, "device": "cpu", "cells": list(peer_cells.values()), "threads": o.threads,
                        "warmup": o.warmup, "repeat": o.repeat, "prompt_ids": [300 + 7919 * i % 20000 for i in range(4096)]}
                try:
                    results = dict(zip(peer_cells, ask_peer(sys.executable, "llama.cpp", task)))
                    entry["llama_cpp"] = {name: result for name, result in results.items() if "error" not in result}
                    for name in set(results) - set(entry["llama_cpp"]):
                        say(f"\nllama.cpp failed, {name}: {results[name]['error']}")
                except RuntimeError as error:
                    say(f"\nllama.cpp failed: {error}")
                progress.end()
            rounds.append(entry)
        progress.clear()
        rows = medians([figures(shape, entry) for entry in rounds])
        limits = {name: statistics.median(entry["ceilings"][name] for entry in rounds) for name in REFERENCE}
        print_table(shape, rows, limits, o.threads)
        report["results"].append({"checkpoint": os.path.basename(checkpoint), "shape": shape, "ceilings": limits,
                                  "figures": rows, "rounds": rounds})
        write_json(o.output, report)
    say(f"\neverything that was measured: {o.output}")


if __name__ == "__main__":
    outcome("speed.py", main)
