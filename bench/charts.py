"""The charts of a report, as PNG files: report.py says what is in them. Needs matplotlib."""
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt     # noqa: E402  after the choice of a backend that needs no screen

from report import OURS, figure, memory, quality_rows   # noqa: E402

COLOURS = {"f32": "#7f7f7f", "f16": "#222222", "q8": "#1f77b4", "q4": "#e07b00", "nf4": "#2a9d4a", "gptq": "#c2255c",
           "awq": "#7b4fc9"}
LINES = {"cpu": "-", "cuda": "--"}
MARKERS = {"": "o", "32": "s", "64": "^", "128": "D"}       # of q4-g32 and the like, which are paler too


def colour(dtype):
    base, _, group = dtype.partition("-g")
    tone = COLOURS.get(base, "#888888")
    return "#" + "".join(f"{(int(tone[i:i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5)) if group else tone


def label(row, rows):
    """What a row is called in a chart: its type, and its backend if there are several."""
    return f"{row['dtype']}, {row['backend']}" if len({r["backend"] for r in rows}) > 1 else row["dtype"]


def new_figure(columns=1, width=7.5, height=4.6):
    fig, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes[0]


def by_batch(ax, rows, statistic, named, low=None, high=None, style=None):
    """A line for each of our backends and types: a statistic over the batch size, with its range if there is one."""
    series = {}
    for row in rows:
        if row["engine"] == OURS and row.get(statistic):
            series.setdefault((row["backend"], row["dtype"]), []).append(row)
    for (backend, dtype), line in series.items():
        x, y = [row["batch"] for row in line], [row[statistic] for row in line]
        ax.plot(x, y, style or LINES[backend], color=colour(dtype), marker=MARKERS.get(dtype.partition("-g")[2], "v"),
                markersize=4, label=label(line[0], rows) if named else None)
        if low:
            ax.fill_between(x, [row[low] for row in line], [row[high] for row in line], color=colour(dtype), alpha=0.15,
                            linewidth=0)
    values = [row[statistic] for line in series.values() for row in line]
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({row["batch"] for row in rows}))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("sequences at once (batch)")
    if values and max(values) > 20 * min(values):
        ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def charts(state, rows, directory):
    """Writes the PNG charts that there are data for; returns [(file name, title)]."""
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "savefig.dpi": 150})
    ours, written = [row for row in rows if row["engine"] == OURS], []
    s = state["settings"]
    work = f"{s['in']} tokens in, {s['out']} out"

    def save(fig, name, title):
        fig.savefig(os.path.join(directory, name))
        plt.close(fig)
        written.append((name, title))

    def bar_labels(ax, y, values, form):
        for position, value in zip(y, values):
            ax.text(value, position, " " + form(value), va="center", fontsize=9)
        ax.margins(x=0.16)

    if ours:
        fig, axes = new_figure(2, width=11)
        for ax, statistic, title in zip(axes, ("total_tok_s", "decode_tok_s"), ("in and out", "decoding")):
            low, high = ("total_tok_s_min", "total_tok_s_max") if statistic == "total_tok_s" else (None, None)
            by_batch(ax, ours, statistic, low is not None, low, high)
            ax.set_title(f"Throughput, {title}")
            ax.set_ylabel("tokens a second")
            ax.set_ylim(bottom=0 if ax.get_yscale() == "linear" else None)
        fig.legend(frameon=False, loc="outside right upper")
        save(fig, "throughput.png", f"throughput by batch, {work}; the band is the range over all passes")

        fig, axes = new_figure(2, width=11)
        by_batch(axes[0], ours, "ttft_ms", True)
        by_batch(axes[0], ours, "ttft_ms_p95", False, style=":")
        axes[0].set_title("Time to the first token: median" + (", and dotted 95%" if ours[0]["ttft_ms_p95"] else ""))
        axes[0].set_ylabel("ms")
        by_batch(axes[1], ours, "itl_ms_p50", False)
        by_batch(axes[1], ours, "itl_ms_p95", False, style=":")
        axes[1].set_title("Time between tokens: median, and dotted 95%")
        axes[1].set_ylabel("ms")
        for ax in axes:
            ax.set_ylim(bottom=0 if ax.get_yscale() == "linear" else None)
        fig.legend(frameon=False, loc="outside right upper")
        save(fig, "latency.png", f"latency by batch, {work}")

        fig, (ax,) = new_figure(height=1.7 + 0.45 * len({(r["backend"], r["dtype"]) for r in ours}))
        last = list({(row["backend"], row["dtype"]): row for row in ours}.values())[::-1]
        unit, unit_name = (1e9, "GB") if max(row["peak_bytes"] for row in last) > 1e9 else (1e6, "MB")
        y = list(range(len(last)))
        left = [0.0] * len(last)
        for name, tone, part in (("weights", 1.0, "weights_bytes"), ("KV cache", 0.55, "kv_bytes"), ("other", 0.2, None)):
            widths = [row[part] / unit if part else
                      max(0, row["peak_bytes"] - row["weights_bytes"] - row["kv_bytes"]) / unit for row in last]
            ax.barh(y, widths, left=left, color="#3d6a94", alpha=tone, label=name, height=0.65)
            left = [a + b for a, b in zip(left, widths)]
        bar_labels(ax, y, left, lambda value: f"{value:.3g}")
        ax.set_yticks(y, [label(row, ours) for row in last])
        ax.grid(False, axis="y")
        ax.set_xlabel(unit_name)
        ax.set_title(f"Memory at its peak, batch {last[0]['batch']}")
        fig.legend(frameon=False, ncols=3, loc="outside lower center")
        save(fig, "memory.png", "memory: the checkpoint, the KV cache, and the rest of the process")

    judged = quality_rows(rows)
    if judged:
        with_kl = any(row.get("kl") for row in judged)
        fig, axes = new_figure(1 + with_kl, width=11 if with_kl else 7.5, height=1.6 + 0.45 * len(judged))
        y, names = list(range(len(judged)))[::-1], [label(row, judged) for row in judged]
        axes[0].errorbar([row["ppl"] for row in judged], y, xerr=[row["ppl_error"] for row in judged], fmt="none",
                         ecolor="#bbbbbb", capsize=3)
        axes[0].scatter([row["ppl"] for row in judged], y, c=[colour(row["dtype"]) for row in judged], zorder=3)
        for row, position in zip(judged, y):
            axes[0].annotate(f"{row['ppl']:.2f}", (row["ppl"], position), xytext=(0, 6), textcoords="offset points",
                             ha="center", fontsize=9)
        axes[0].set_title("Perplexity, with the standard error of the text")
        axes[0].set_xlabel("perplexity (less is better)")
        if with_kl:
            values = [row.get("kl") or 0 for row in judged]
            axes[1].barh(y, values, color=[colour(row["dtype"]) for row in judged], height=0.6)
            bar_labels(axes[1], y, values, lambda value: figure(value, 2))
            axes[1].set_title("Divergence of the predictions from f16's")
            axes[1].set_xlabel("KL, nats a token (less is better)")
        for ax in axes:
            ax.set_yticks(y, names)
            ax.set_ylim(-0.6, len(judged) - 0.2)
        save(fig, "quality.png", "quality: perplexity and divergence from f16")

        fig, (ax,) = new_figure(height=5)
        largest = max(row["peak_bytes"] for row in judged)
        speeds = [row["total_tok_s"] for row in judged]
        ax.scatter(speeds, [row["ppl"] for row in judged], c=[colour(row["dtype"]) for row in judged], alpha=0.75,
                   s=[800 * row["peak_bytes"] / largest for row in judged], linewidths=0)
        if max(speeds) > 20 * min(speeds):
            ax.set_xscale("log")
        ax.margins(x=0.3, y=0.25)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        ax.set_xlabel(f"tokens a second, in and out, batch {judged[0]['batch']} (more is better)")
        ax.set_ylabel("perplexity (less is better)")
        ax.set_title("Quality, speed and memory (the area of a circle)")
        fig.draw_without_rendering()            # from here on points have their places
        places = {id(row): ax.transData.transform((row["total_tok_s"], row["ppl"])) * 72 / fig.dpi for row in judged}
        taken = []                              # boxes in points: left, right, middle, half of the height
        for row in sorted(judged, key=lambda row: -row["ppl"]):
            name, (x, y) = f"{label(row, judged)}, {memory(row['peak_bytes'])}", places[id(row)]
            circles = [(a - 14, a + 14, b, 14) for key, (a, b) in places.items() if key != id(row)]
            left, right, low = x + 19, x + 19 + 5.2 * len(name), y
            while any(left < b and a < right and abs(low - middle) < 6 + half for a, b, middle, half in taken + circles):
                low -= 2                        # a name goes down until it meets nothing
            taken.append((left, right, low, 6))
            ax.annotate(name, (row["total_tok_s"], row["ppl"]), xytext=(19, low - y), textcoords="offset points", va="center",
                        fontsize=9, arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if low < y else None)
        save(fig, "tradeoff.png", "quality against speed against memory")

    shares = {}         # {combination: {operation: % of its time}}
    for key, operations in state["operations"].items():
        total = sum(seconds for _, seconds in operations)
        if total:
            shares[key.removesuffix(" operations")] = {name: 100 * seconds / total for name, seconds in operations}
    if shares:
        names = {name for part in shares.values() for name in part}
        names = sorted(names, key=lambda name: (-sum(part.get(name, 0) for part in shares.values()), name))
        fig, (ax,) = new_figure(width=9, height=1.9 + 0.42 * len(shares))
        y, left = list(range(len(shares)))[::-1], [0.0] * len(shares)
        palette = plt.get_cmap("tab20").colors
        for i, name in enumerate(names):
            widths = [part.get(name, 0) for part in shares.values()]
            ax.barh(y, widths, left=left, color=palette[i % len(palette)], label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths)]
        ax.set_yticks(y, shares)
        ax.set_xlim(0, 100)
        ax.grid(False, axis="y")
        ax.set_xlabel("% of the time, reading the prompts included")
        ax.set_title("Time by operation")
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        save(fig, "operations.png", "time by operation")

    theirs = [row for row in rows if row["engine"] != OURS]
    if theirs and ours:
        batch = max(row["batch"] for row in theirs)
        bars = sorted([row for row in rows if row["batch"] == batch and row["backend"] in {r["backend"] for r in theirs}],
                      key=lambda row: row["total_tok_s"])
        fig, (ax,) = new_figure(width=8.5, height=1.4 + 0.36 * len(bars))
        y, values = list(range(len(bars))), [row["total_tok_s"] for row in bars]
        ax.barh(y, values, color=[colour(row["dtype"]) if row["engine"] == OURS else "#c4c4c4" for row in bars], height=0.7)
        bar_labels(ax, y, values, figure)
        ax.set_yticks(y, [f"{row['engine']} {label(row, bars)}" for row in bars])
        ax.grid(False, axis="y")
        ax.set_xlabel("tokens a second, in and out")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        ax.set_title(f"Beside other engines, batch {batch}")
        save(fig, "peers.png", f"beside other engines, batch {batch}, {work}")
    return written
