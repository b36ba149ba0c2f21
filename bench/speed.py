"""make bench: the speed of run on this machine's CPU beside the machine's ceilings and, where it is installed, llama.cpp.

For each type of weights: a checkpoint of random weights in the shape of Mistral-7B, made where it is missing; then rounds
of
  - the ceilings (build/limits), asked before and after what is measured under them: the higher counts,
  - run: a pass to warm up and a measured one of each of CELLS, sampling included,
  - llama.cpp (llama_cpp_peer.py, in a process of its own): the same without sampling, on a GGUF file of the same shape.
So ours and theirs take turns. Shares and ratios are formed within a round; every figure is the median over the rounds.
A table goes to standard output, everything that was measured to a JSON file. Needs nothing but the standard library, and
for llama.cpp the packages llama-cpp-python, gguf and numpy in the Python that runs this."""
import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time

BENCH = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BENCH)
PEER = os.path.join(BENCH, "llama_cpp_peer.py")
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
# What is measured

def command(args, **options):
    """Runs a program and returns what it printed; if it fails, raises a RuntimeError with the last line of its errors."""
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(args[:3])} ended with status {done.returncode}: {last}")
    return done.stdout


def ceilings(program, threads):
    """{name: value} of the lines "name value unit how" that bench/limits.c prints."""
    lines = command([program], env={**os.environ, "OMP_NUM_THREADS": str(threads)}).splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines}


def measure(run, model, cell, threads, warmup=1, repeat=1):
    """The statistics of run (README.md) for a cell (batch, prompt tokens, new tokens), without the sequences."""
    batch, n_in, n_out = map(str, cell)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "statistics.json")
        command([run, model, "-q", "-E", "-i", "Hello", "-b", batch, "-l", n_in, "-n", n_out, "-j", str(threads),
                 "-w", str(warmup), "-r", str(repeat), "-o", path])
        with open(path) as f:
            result = json.load(f)
    del result["sequences"]
    return result


def measure_peer(gguf, cells, threads, warmup=1, repeat=1):
    """The same by llama.cpp for a list of cells: a list of dicts with the names and units of run's statistics."""
    options = ["-j", str(threads), "-w", str(warmup), "-r", str(repeat)]
    what = [":".join(map(str, cell)) for cell in cells]
    return json.loads(command([sys.executable, PEER, "measure", gguf, *what, *options]))


# --------------------------------------------------------------------------------------------------------------------
# What there is to do, and how fast it could be

def read_shape(path):
    """What a checkpoint's header and table (FORMAT.md) say: the model's dimensions; `type`, of its matrices; and what a
    forward has to do: `ops` for a token, `ops_logits` more where its logits are wanted, `bytes` of weights to read."""
    names = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "window", "max_positions"]
    with open(path, "rb") as f:
        header = f.read(256)
        if header[:8] != b"mistralc":
            raise RuntimeError(f"{path}: not a checkpoint")
        shape = dict(zip(names, struct.unpack_from("<9I", header, 40)))
        shape["norm_eps"], shape["rope_theta"] = struct.unpack_from("<fd", header, 76)
        n_tensors, = struct.unpack_from("<I", header, 12)
        table = [struct.unpack("<48sIIQQQQ8x", f.read(96)) for _ in range(n_tensors)]
    tensors = {}                        # name: (type, operations of a product with a vector, bytes)
    for name, kind, _, rows, cols, _, size in table:
        tensors[name.rstrip(b"\0").decode()] = kind, 2 * rows * cols, size
    classifier = "wcls" if "wcls" in tensors else "token_embedding"
    shape["type"] = {1: "f32", 2: "f16", 3: "q8", 4: "q4"}[tensors["layers.0.wqkv"][0]]
    shape["ops"] = sum(ops for name, (_, ops, _) in tensors.items() if ".w" in name)
    shape["ops_logits"] = tensors[classifier][1]
    shape["bytes"] = sum(size for _, _, size in tensors.values())
    if classifier == "wcls":            # of the embedding only a row a token is read
        shape["bytes"] -= tensors["token_embedding"][2]
    return shape


def work(shape, cell, statistic):
    """What a statistic of a cell stands for: (tokens, operations of their products with weights, bytes read of weights and,
    in decoding, of the cache). A prefill counts as one reading of the weights: arithmetic bounds it."""
    batch, n_in, n_out = cell
    steps = n_out - 1
    position = 2 * 2 * shape["n_kv_heads"] * shape["head_dim"] * shape["n_layers"]      # bytes: FP16 keys and values
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


def print_table(shape, rows, limits):
    """The figures of one type of weights as a Markdown table that can be read as it stands."""
    print(f"\n{shape['type']}: {shape['bytes'] / 1e9:.2f} GB of weights a step, {limits['threads']:.0f} threads; ceilings: "
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
# Files, the machine, progress

def say(message):
    print(message, file=sys.stderr)


def need_files(directory, dtypes, quantize, peer):
    """[(checkpoint, GGUF file or None)]: makes those that are missing, if the disk has room for all of them."""
    ends = ["bin", "gguf"] if peer else ["bin"]
    files = [[os.path.join(directory, f"{SHAPE}-{dtype}.{end}") for end in ends] for dtype in dtypes]
    sizes = {path: size for dtype, paths in zip(dtypes, files) for path, size in zip(paths, GIGABYTES[dtype])}
    missing = {path: size for path, size in sizes.items() if not os.path.exists(path)}
    os.makedirs(directory, exist_ok=True)
    need, free = sum(missing.values()), shutil.disk_usage(directory).free / 1e9
    if need > free - 0.5:
        raise RuntimeError(f"{directory}: the files to be made need {need:.1f} GB, free are {free:.1f}: "
                           "choose fewer --dtypes or another --dir")
    for path in missing:
        say(f"making {path}, {missing[path]:.2f} GB of random weights")
    for dtype, (checkpoint, *gguf) in zip(dtypes, files):
        if checkpoint in missing:
            subprocess.run([quantize, "--random", SHAPE, checkpoint, dtype], check=True)
        if gguf and gguf[0] in missing:
            subprocess.run([sys.executable, PEER, "write", checkpoint, gguf[0]], check=True)
    return [(checkpoint, gguf[0] if gguf else None) for checkpoint, *gguf in files]


def memory_gb():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def machine():
    """{processor, cores, memory_gb, system, commit}, as far as they can be found out."""
    processor, commit = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            processor = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), processor)
    if shutil.which("git"):
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout
    return {"processor": processor, "cores": os.cpu_count(), "memory_gb": round(memory_gb(), 1),
            "system": f"{platform.system()} {platform.release()}", "commit": commit.strip()}


def show_progress(state, what, cost=0):
    """Rewrites a line on the terminal: what is being done, the share that is done, the time left. `cost` has been done
    since the last call. state: {start, in seconds; done, all, in units of cost}."""
    state["done"] += cost
    if not sys.stderr.isatty():
        return
    left = (time.monotonic() - state["start"]) * (state["all"] / state["done"] - 1) if state["done"] else None
    line = f"{what}: {state['done'] / state['all']:.0%}" + (f", {left / 60:.0f} min left" if left is not None else "")
    sys.stderr.write("\r\033[K" + (line if what else ""))
    sys.stderr.flush()


def cost(cell, passes):
    """How long passes of a cell take, about, in tokens of prefill: a step takes as long as 10 of them, or as its tokens."""
    batch, n_in, n_out = cell
    return passes * (batch * n_in + (n_out - 1) * max(batch, 10))


# --------------------------------------------------------------------------------------------------------------------

def arguments():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
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
    add("-j", "--threads", type=int, default=cores, help="(the cores)")
    add("--no-llama-cpp", action="store_true", help="leave llama.cpp out")
    add("--model", help="measure this checkpoint, without llama.cpp, instead of random ones")
    add("-o", "--output", default=os.path.join(BENCH, "results", "speed.json"), help="(bench/results/speed.json)")
    for program, path in (("run", "run"), ("quantize", "quantize"), ("limits", "build/limits")):
        add("--" + program, default=os.path.join(ROOT, path), help=f"({path}, which make bench builds)")
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
    o = arguments()
    missing = [name for name in ("llama_cpp", "gguf", "numpy") if not importlib.util.find_spec(name)]
    peer = not (o.no_llama_cpp or o.model or missing)
    if missing and not (o.no_llama_cpp or o.model):
        say(f"llama.cpp is skipped: this Python has no {', '.join(missing)}")
    fitting = [dtype for dtype in o.dtypes if GIGABYTES[dtype][0] + 2 < memory_gb()]
    if fitting != o.dtypes and not o.model:
        say(f"skipped, too large for {memory_gb():.1f} GB of memory: {', '.join(sorted(set(o.dtypes) - set(fitting)))}")
    files = [(o.model, None)] if o.model else need_files(o.dir, fitting, o.quantize, peer)

    cells = {name: CELLS[name] for name in o.cells}
    peer_cells = {name: cell for name, cell in cells.items() if peer and name not in ONLY_OURS}
    ours = {name: cost(cell, o.warmup + o.repeat) for name, cell in cells.items()}
    theirs = 2 * sum(cost(cell, o.repeat) for cell in peer_cells.values())
    progress = {"start": time.monotonic(), "done": 0, "all": (sum(ours.values()) + theirs) * o.rounds * len(files)}
    report = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "arguments": sys.argv[1:], "results": []}

    for checkpoint, gguf in files:
        shape, rounds = read_shape(checkpoint), []
        for i in range(o.rounds):
            what = f"{shape['type']}, round {i + 1} of {o.rounds}"
            show_progress(progress, what)
            entry, before = {"ours": {}, "llama_cpp": {}}, ceilings(o.limits, o.threads)
            for name, cell in cells.items():
                show_progress(progress, f"{what}, {name}")
                entry["ours"][name] = measure(o.run, checkpoint, cell, o.threads, o.warmup, o.repeat)
                show_progress(progress, what, ours[name])
            after = ceilings(o.limits, o.threads)
            entry["ceilings"] = {name: max(before[name], after[name]) for name in before}
            if peer_cells:
                show_progress(progress, f"{what}, llama.cpp")
                try:
                    results = measure_peer(gguf, peer_cells.values(), o.threads, o.warmup, o.repeat)
                    entry["llama_cpp"] = dict(zip(peer_cells, results))
                except RuntimeError as error:
                    say(f"\nllama.cpp failed: {error}")
                show_progress(progress, what, theirs)
            rounds.append(entry)
        show_progress(progress, "")
        rows = medians([figures(shape, entry) for entry in rounds])
        limits = {name: statistics.median(entry["ceilings"][name] for entry in rounds) for name in ("threads", *REFERENCE)}
        print_table(shape, rows, limits)
        report["results"].append({"checkpoint": os.path.basename(checkpoint), "shape": shape, "ceilings": limits,
                                  "figures": rows, "rounds": rounds})
        os.makedirs(os.path.dirname(os.path.abspath(o.output)), exist_ok=True)
        with open(o.output + ".tmp", "w") as f:
            json.dump(report, f, indent=1)
        os.replace(o.output + ".tmp", o.output)
    say(f"\neverything that was measured: {o.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nspeed.py: stopped")
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"speed.py: {error}")
