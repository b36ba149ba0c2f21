"""What bench.py measured, for people: a table for the terminal, recommendations with their rules, report.md, results.csv, charts.

    python3 bench/report.py RESULTS_DIR [--memory 16GB] [--latency 200] [--price-per-hour X] [--target 200]

writes the report of a RESULTS_DIR with a results.json anew, for other limits or prices. Charts need matplotlib."""
import argparse
import collections
import csv
import hashlib
import json
import math
import os
import re
import statistics

from measure import BENCH, outcome, say
from peers import PEERS

OURS = "mistral.c"
SHARED = ["prefill_tok_s", "decode_tok_s", "total_tok_s", "prefill_seconds", "decode_seconds", "total_seconds", "ttft_ms",
          "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95", "bandwidth_gb_s", "weights_bytes", "kv_bytes", "peak_bytes"]
QUALITY = ["ppl", "ppl_error", "kl", "kl_error", "kl_p99", "same_top", "accuracy", "accuracy_error", "accuracy_norm",
           "accuracy_norm_error"]
COLUMNS = ["engine", "backend", "dtype", "batch", "visits", *SHARED, "total_tok_s_min", "total_tok_s_max", "spread", *QUALITY,
           "greedy_equal", "first_difference", "usd_per_million"]


def add_options(parser):
    """The options that only the report depends on, for bench.py too."""
    add = parser.add_argument
    add("--memory", type=size, default=16e9, metavar="SIZE", help="a limit for a recommendation: 16GB, 800MB (16GB)")
    add("--latency", type=number, default=200.0, metavar="MS", help="between tokens, 95%% of them, likewise (200)")
    add("--max-loss", type=number, default=5.0, metavar="PERCENT",
        help="recommendations with a limit leave out what has a perplexity this much above the best (5)")
    add("--price-per-hour", type=number, metavar="USD", help="of this machine (as bench/prices.csv says)")
    add("-T", "--target", type=number, metavar="X", help="tokens a second, in and out, to pass; prints PASS or FAIL")


def number(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def size(text):
    """Bytes of 16GB, 800MB or a number."""
    match = re.fullmatch(r"([0-9.]+)\s*([kMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 16GB")
    return number(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


# --------------------------------------------------------------------------------------------------------------------
# From visits to rows

def parse_operations(messages):
    """[(operation, seconds)] of the table that -P prints among a program's messages."""
    rows, inside = [], False
    for line in messages.splitlines():
        match = re.match(r"(\S.*?)\s+([0-9.]+)\s+[0-9.]+%", line)
        if line.startswith("operation"):
            inside = True
        elif inside and match:
            rows.append((match[1], float(match[2])))
        elif inside:
            break
    return rows


def summary(visits):
    """A row's figures from a list of statistics: medians, and the spread of total_tok_s over all passes, (largest - smallest)
    / median; None if there was one pass alone."""
    row = {"visits": len(visits)}
    for name in SHARED:
        values = [visit[name] for visit in visits if visit.get(name) is not None]
        row[name] = statistics.median(values) if values else None
    totals = [visit["total_tok_s"] * visit.get("total_seconds", 1) / visit.get(name, visit.get("total_seconds", 1))
              for visit in visits for name in ("total_seconds_min", "total_seconds_max")]
    row["total_tok_s_min"], row["total_tok_s_max"] = min(totals), max(totals)
    row["spread"] = (max(totals) - min(totals)) / row["total_tok_s"] if row["total_tok_s"] and len(set(totals)) > 1 else None
    return row


def greedy_ids(state, backend, dtype):
    """The ids of the greedy texts, a list for each prompt; None if they were not made."""
    result = state["quality"].get(f"{backend} {dtype} greedy text")
    return [sequence["ids"] for sequence in result["sequences"]] if result else None


def agreement(ids, reference):
    """(texts that are equal, token of the first difference as the median over the others or None)."""
    firsts = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), None) for x, y in zip(ids, reference)]
    differing = [first for first in firsts if first is not None]
    return len(firsts) - len(differing), statistics.median(differing) if differing else None


def fingerprint(state):
    """{"backend dtype": 16 hexadecimal digits of the greedy tokens}: equal on every machine where the programs agree."""
    found = {}
    for key in state["quality"]:
        if key.endswith(" greedy text"):
            backend, dtype = key.split()[:2]
            found[f"{backend} {dtype}"] = hashlib.sha256(json.dumps(greedy_ids(state, backend, dtype)).encode()).hexdigest()[:16]
    return found


def price(state, backend, given):
    """(US dollars an hour, where that is from) of a backend's machine; (None, why)."""
    if given:
        return given, "--price-per-hour"
    with open(os.path.join(BENCH, "prices.csv")) as f:
        table = list(csv.DictReader(line for line in f if not line.startswith("#")))
    names = [gpu["name"] for gpu in state["machine"]["gpus"]]
    for row in table:
        usd, source = float(row["usd_per_hour"]), f"{row['what']}, {row['dated']} ({row['seen']})"
        if backend == "cpu" and row["match"] == "cpu-core":
            return usd * state["machine"]["cores"], f"{state['machine']['cores']} x {usd} for {source}"
        if backend == "cuda" and any(re.search(row["match"], name) for name in names):
            return usd, source
    return None, "no price in bench/prices.csv"


def rows_of(state, price_per_hour=None):
    """A row (a dict with COLUMNS) for each combination that was measured, ours first."""
    rows = []
    for key, visits in state["speed"].items():
        backend, dtype, _, batch = key.split()
        row = {"engine": OURS, "backend": backend, "dtype": dtype, "batch": int(batch), **summary(visits)}
        for what in ("perplexity", "score"):
            found = state["quality"].get(f"{backend} {dtype} {what}", {})
            row.update({name: found[name] for name in QUALITY if name in found})
        ids, reference = greedy_ids(state, backend, dtype), greedy_ids(state, backend, "f16")
        if ids and reference:
            row["greedy_equal"], row["first_difference"] = agreement(ids, reference)
        rows.append(row)
    for key, visits in state["peers"].items():
        name, backend, kind = key.split()
        for batch in dict.fromkeys(batch for visit in visits for batch in visit["cells"]):
            cells = [visit["cells"][batch] for visit in visits if batch in visit["cells"]]
            rows.append({"engine": name, "backend": backend, "dtype": cells[-1].get("type", kind), "batch": int(batch),
                         "against": visits[-1]["against"], "versions": cells[-1]["versions"],
                         "same_weights": all(visit["same_weights"] for visit in visits), **summary(cells)})
    for row in rows:
        usd, _ = price(state, row["backend"], price_per_hour)
        row["usd_per_million"] = usd / row["total_tok_s"] / 3600 * 1e6 if usd and row["total_tok_s"] else None
    engines, types = [OURS, *PEERS], list(state["checkpoints"])
    return sorted(rows, key=lambda row: (engines.index(row["engine"]), row["backend"],
                                         types.index(row["dtype"]) if row["dtype"] in types else 99, row["dtype"], row["batch"]))


# --------------------------------------------------------------------------------------------------------------------
# Recommendations

def recommend(rows, o):
    """[(title, rule, row or None)]: the choice among our rows by each rule."""
    ours = [row for row in rows if row["engine"] == OURS and row["total_tok_s"]]
    if not ours:
        return []
    perplexities = [row["ppl"] for row in ours if row.get("ppl")]
    best = {"speed": max(row["total_tok_s"] for row in ours), "ppl": min(perplexities, default=None),
            "memory": min(row["peak_bytes"] for row in ours)}
    good = [row for row in ours if not best["ppl"] or row.get("ppl") and row["ppl"] <= best["ppl"] * (1 + o.max_loss / 100)]
    loss = f" and perplexity at most {o.max_loss:g}% above the best" if best["ppl"] else ""

    def speed(row):
        return row["total_tok_s"]

    def balance(row):
        shares = [row["total_tok_s"] / best["speed"], best["memory"] / row["peak_bytes"]]
        shares += [best["ppl"] / row["ppl"]] if best["ppl"] and row.get("ppl") else [0.0] if best["ppl"] else []
        return math.prod(shares) ** (1 / len(shares))

    def pick(candidates, key):
        return max(candidates, key=key, default=None)

    quality = [row for row in ours if row.get("ppl")]
    measure, name = (("kl", "divergence from f16") if quality and all(row.get("kl") is not None for row in quality)
                     else ("ppl", "perplexity"))
    priced = [row for row in ours if row["usd_per_million"]]
    shares = ", 1 / perplexity" if best["ppl"] else " (perplexity was not measured)"
    return [
        ("fastest", "most tokens a second, in and out", pick(ours, speed)),
        ("smallest", "least memory at its peak; within 1% the faster",
         pick([row for row in ours if row["peak_bytes"] <= 1.01 * best["memory"]], speed)),
        ("best quality", f"least {name}; of equal ones the fastest" if quality else "perplexity was not measured",
         pick(quality, lambda row: (-row[measure], speed(row)))),
        ("balanced", f"greatest geometric mean of the shares of the best: speed, 1 / memory{shares}", pick(ours, balance)),
        (f"under {o.memory / 1e9:g} GB", f"fastest with a peak of at most {o.memory / 1e9:g} GB{loss}",
         pick([row for row in good if row["peak_bytes"] <= o.memory], speed)),
        (f"within {o.latency:g} ms", f"fastest with 95% of the times between tokens at most {o.latency:g} ms{loss}",
         pick([row for row in good if row["itl_ms_p95"] <= o.latency], speed)),
        ("cheapest", f"least cost of a million tokens{' with' + loss[4:] if loss else ''}",
         pick([row for row in good if row in priced], lambda row: -row["usd_per_million"]))]


def target_lines(rows, target):
    """(lines of PASS or FAIL for each of our types at its largest batch, whether any combination passes)."""
    lines, passed = [], False
    ours = [row for row in rows if row["engine"] == OURS]
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in ours):
        row = max((r for r in ours if (r["backend"], r["dtype"]) == (backend, dtype)), key=lambda r: r["batch"])
        met = row["total_tok_s"] >= target
        passed |= met
        lines.append(f"{'PASS' if met else 'FAIL'}: {backend} {dtype} batch {row['batch']}: {figure(row['total_tok_s'])} tok/s "
                     f"in and out, target {target:g}")
    return lines, passed


# --------------------------------------------------------------------------------------------------------------------
# Tables

def figure(value, digits=3):
    """A number with some significant digits and thousands set off; empty for None."""
    if value is None:
        return ""
    if not value:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def memory(n_bytes):
    return "" if n_bytes is None else f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def share(value):
    return "" if value is None else f"{100 * value:.1f}%"


def markdown(header, lines, left=(0,)):
    """A Markdown table whose columns line up: those in `left` to the left, the others to the right."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in [header, *lines])) for i in range(len(header))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cell.ljust(width) if i in left else cell.rjust(width)
                                      for i, (cell, width) in enumerate(zip(line, widths))) + " |"
                     for line in [header, rule, *lines])


def speed_table(rows):
    header = ["engine", "batch", "prefill tok/s", "decode tok/s", "in+out tok/s", "spread", "first token ms p50", "p95",
              "between ms p50", "p95", "peak memory", "$ a million"]
    return markdown(header, [[f"{row['engine']} {row['backend']} {row['dtype']}", row["batch"], figure(row["prefill_tok_s"]),
                              figure(row["decode_tok_s"]), figure(row["total_tok_s"]), share(row["spread"]),
                              *(figure(row[name]) for name in ("ttft_ms", "ttft_ms_p95", "itl_ms_p50", "itl_ms_p95")),
                              memory(row["peak_bytes"]), figure(row["usd_per_million"])] for row in rows])


def memory_table(rows):
    """Our rows, one for each backend and type: that of the largest batch."""
    last = {(row["backend"], row["dtype"]): row for row in rows if row["engine"] == OURS}.values()
    return markdown(["type", "batch", "checkpoint", "KV cache", "peak"], [[f"{row['backend']} {row['dtype']}", row["batch"], *(
        memory(row[name]) for name in ("weights_bytes", "kv_bytes", "peak_bytes"))] for row in last])


def quality_rows(rows):
    """Our rows, one for each backend and type: that of the largest batch; those whose quality was measured."""
    last = {(row["backend"], row["dtype"]): row for row in rows if row["engine"] == OURS and row.get("ppl")}
    return list(last.values())


def quality_table(state, rows):
    header = ["type", "file", "perplexity", "+-", "KL from f16", "same first choice", "greedy texts as f16's", "first difference",
              "accuracy", "normalised"]
    prompts = max((len(found["sequences"]) for key, found in state["quality"].items() if key.endswith("greedy text")), default=0)
    return markdown(header, [[
        f"{row['backend']} {row['dtype']}", memory(row["weights_bytes"]), f"{row['ppl']:.3f}", f"{row['ppl_error']:.3f}",
        "" if row.get("kl") is None else f"{row['kl']:.5f}", share(row.get("same_top")),
        "" if row.get("greedy_equal") is None else f"{row['greedy_equal']} of {prompts}",
        "" if row.get("first_difference") is None else f"token {row['first_difference'] + 1:g}",
        *("" if row.get(name) is None else f"{share(row[name])} +- {share(row.get(name + '_error'))}"
          for name in ("accuracy", "accuracy_norm"))] for row in quality_rows(rows)])


def ratio_table(rows):
    """Ours over theirs, for the same backend, type to compare with, and batch."""
    ours = {(row["backend"], row["dtype"], row["batch"]): row for row in rows if row["engine"] == OURS}
    lines = []
    for row in rows:
        mine = ours.get((row["backend"], row.get("against"), row["batch"]))
        if row["engine"] != OURS and mine:
            ratios = [figure(mine[name] / row[name]) if row[name] and mine[name] else ""
                      for name in ("prefill_tok_s", "decode_tok_s", "total_tok_s")]
            lines.append([f"{row['engine']} {row['backend']} {row['dtype']}", "same" if row["same_weights"] else "same shape",
                          f"{row['against']}", row["batch"], *ratios])
    header = ["engine", "weights", "ours", "batch", "prefill, ours / theirs", "decode", "in+out"]
    return markdown(header, lines, (0, 1, 2)) if lines else ""


def recommendation_table(choices):
    lines = []
    for title, rule, row in choices:
        lines.append([title, f"{row['backend']} {row['dtype']}, batch {row['batch']}" if row else "none",
                      f"{figure(row['total_tok_s'])} tok/s" if row else "", memory(row["peak_bytes"]) if row else "",
                      f"{row['ppl']:.3f}" if row and row.get("ppl") else "",
                      figure(row["usd_per_million"]) if row else "", rule])
    return markdown(["choice", "combination", "in+out", "peak memory", "perplexity", "$ a million", "rule"], lines, (0, 1, 6))


def operations_table(state):
    names = list(dict.fromkeys(name for operations in state["operations"].values() for name, _ in operations))
    keys = [key for key, operations in state["operations"].items() if operations]
    header = ["operation", *(key.removesuffix(" operations") for key in keys)]
    lines = []
    for name in names:
        shares = []
        for key in keys:
            total = sum(seconds for _, seconds in state["operations"][key])
            shares.append(share(dict(state["operations"][key]).get(name, 0) / total) if total else "")
        lines.append([name, *shares])
    return markdown(header, lines) if lines else ""


# --------------------------------------------------------------------------------------------------------------------
# The files

def side_by_side(state, n_prompts=4, width=240):
    """Greedy texts of our types, one table a prompt."""
    parts, found = [], {key.removesuffix(" greedy text"): result["sequences"] for key, result in state["quality"].items()
                        if key.endswith(" greedy text")}
    for i in range(min([n_prompts, *map(len, found.values())]) if found else 0):
        lines = [[name, sequences[i]["text"].strip()[:width]] for name, sequences in found.items()]
        prompt = next(iter(found.values()))[i]["prompt"]
        parts.append(markdown(["type", f"{prompt} ..."], lines, (0, 1)))
    return "\n\n".join(parts)


def gpu_text(gpus):
    """The GPUs of a machine, as the end of a sentence."""
    names = collections.Counter(gpu["name"] + (f" ({memory(gpu['memory_bytes'])})" if gpu["memory_bytes"] else "") for gpu in gpus)
    return "".join(f", {f'one of {n} ' if n > 1 else ''}{name}" for name, n in names.items())


def report_text(state, rows, choices, pictures, o):
    """The report as Markdown."""
    s, m = state["settings"], state["machine"]
    cuda = f"driver {m['gpus'][0]['driver']}, CUDA Toolkit {m['cuda'] or 'unknown'}, " if m["gpus"] else ""
    versions = {name: version for row in rows if row.get("versions") for name, version in row["versions"].items()}
    backends = dict.fromkeys(row["backend"] for row in rows)
    batches = sorted(row["batch"] for row in rows)
    parts = [f"# {s['model']}: {s['in']} tokens in, {s['out']} out, batches of {batches[0]} to {batches[-1]}",
             "\n".join([f"- date: {state['began']}" + (f" to {state['updated']}" if state["updated"] != state["began"] else ""),
                        f"- machine: {m['processor']}, {m['cores']} cores, {m['memory_gb']} GB{gpu_text(m['gpus'])}; "
                        f"{m['system']}",
                        f"- programs: {m['commit']}, {m['compiler']}, {cuda}Python {m['python']}; {s['threads']} threads",
                        f"- command: `{state['command']}`",
                        *([f"- other engines: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}"]
                          if versions else []),
                        *(f"- price, {backend}: " + (f"${usd:.3f} an hour, " if usd else "") + source for backend in backends
                          for usd, source in [price(state, backend, o.price_per_hour)]),
                        *(f"- fingerprint of the greedy texts, {name}: `{value}`" for name, value in fingerprint(state).items())])]
    if o.target:
        parts.append("## Target\n\n" + "\n".join("- " + line for line in target_lines(rows, o.target)[0]))
    parts.append("## Recommendations\n\n" + recommendation_table(choices))
    shown = dict(pictures)

    def picture(name):
        return [f"![{shown[name]}]({name})"] if name in shown else []

    parts += ["## Speed", *picture("throughput.png"), *picture("latency.png"), speed_table(rows),
              "Medians over the visits; the spread is that of all passes, (largest - smallest) / median. The first token of "
              "another engine is that of the whole batch, of ours that of a sequence (p95: what 95% of them do not exceed)."]
    ratios = ratio_table(rows)
    if ratios:
        parts += ["## Beside other engines", *picture("peers.png"), ratios,
                  "Above 1 ours is faster. llama.cpp's time is that of its forward passes alone; ours and the others sample."]
    parts += ["## Memory", *picture("memory.png"), memory_table(rows),
              "The peak is of the process, the mapped checkpoint included; on a GPU, of the memory allocated there."]
    if quality_rows(rows):
        parts += ["## Quality", *picture("quality.png"), *picture("tradeoff.png"), quality_table(state, rows)]
    texts = side_by_side(state)
    if texts:
        parts += ["## The same prompts, greedy", texts]
    operations = operations_table(state)
    if operations:
        parts += ["## Time by operation", *picture("operations.png"), operations]
    if state["failures"]:
        parts += ["## What failed", "\n".join(f"- {key}: {message}" for key, message in state["failures"].items())]
    if state["notes"]:
        parts += ["## What was left out", "\n".join(f"- {note}" for note in state["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(state, directory, o):
    """Prints the table and the recommendations, writes results.csv, report.md and the charts; returns the exit status: 1 if
    nothing was measured or no combination reached the target."""
    rows = rows_of(state, o.price_per_hour)
    if not rows:
        say("nothing could be measured:")
        for key, message in state["failures"].items():
            say(f"  {key}: {message}")
        return 1
    choices = recommend(rows, o)
    print(speed_table(rows))
    quality = quality_table(state, rows) if quality_rows(rows) else ""
    for table in filter(None, (quality, ratio_table(rows), recommendation_table(choices))):
        print("\n" + table)
    lines, passed = target_lines(rows, o.target) if o.target else ([], True)
    for line in lines:
        print(line)
    for key, message in state["failures"].items():
        print(f"failed: {key}: {message}")

    temporary = os.path.join(directory, "results.csv.tmp")
    with open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, temporary[:-4])
    try:
        from charts import charts
        pictures = charts(state, rows, directory)
    except ImportError as error:
        pictures = []
        say(f"no charts: {error} (pip install -r bench/requirements.txt)")
    temporary = os.path.join(directory, "report.md.tmp")
    with open(temporary, "w") as f:
        f.write(report_text(state, rows, choices, pictures, o))
    os.replace(temporary, temporary[:-4])
    more = f" and {len(pictures)} charts" if pictures else ""
    say(f"\n{os.path.join(directory, 'report.md')}, results.csv, results.json{more}")
    if not passed:
        say(f"no combination reached {o.target:g} tok/s")
    return 0 if passed else 1


def load_state(path):
    """What bench.py wrote to results.json; raises a RuntimeError if it is something else."""
    with open(path) as f:
        try:
            state = json.load(f)
            parts = [state[name] for name in ("settings", "programs", "speed", "peers", "quality", "operations")]
            visits = [visit for of_key in state["speed"].values() for visit in of_key]
            seconds = state.get("seconds") or {}
            good = all(isinstance(part, dict) for part in [*parts, seconds]) and all(visit["total_tok_s"] >= 0 for visit in visits)
            good &= all(value >= 0 for value in seconds.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
    if not good:
        raise RuntimeError(f"{path}: not whole, or not a result of bench.py")
    return state


def main():
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="RESULTS_DIR", help="what bench.py wrote to --output")
    add_options(parser)
    o = parser.parse_args()
    path = os.path.join(o.directory, "results.json")
    return write(load_state(path), o.directory, o)


if __name__ == "__main__":
    outcome("report.py", main)
