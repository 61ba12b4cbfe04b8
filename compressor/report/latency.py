"""How long one inference takes: every raw sample as a distribution, and the figures that its number supports."""

import math
from collections import Counter
from typing import TYPE_CHECKING

from compressor.report.blocks import Block, Cell, Drawing, Section, Table, Text
from compressor.report.figure import AFTER, BEFORE, INK, QUIET, height, milliseconds, panels, styled, svg, tail
from compressor.report.numbers import NONE, TIMES, number, percent, percentile, threads
from compressor.report.schema import ArtifactResult, BaselineResult, Latency, PairedRatio, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 48
HEAD = (
    "What",
    "Threads",
    "How",
    "n",
    "min",
    "p50",
    "p90",
    "p95",
    "p99",
    "max",
    "Spread",
    "Drift",
    "Time over dense",
    "Load",
    "First",
)

Owner = ArtifactResult | BaselineResult
Row = tuple[str, Owner, Latency]


def section(report: Report) -> Section | None:
    """None when nothing has a latency."""
    timed: tuple[Owner, ...] = (*report.baselines, *report.artifacts)
    rows = [(owner.name, owner, owner.latency_ms) for owner in timed if owner.latency_ms is not None]
    if not rows:
        return None
    by_threads = {n: [row for row in rows if row[1].threads == n] for n in sorted({row.threads for _, row, _ in rows})}
    blocks: list[Block] = [_drawing(by_threads)]
    table = tuple(_row(*row) for group in by_threads.values() for row in group)
    blocks.append(Table(HEAD, "lrlrrrrrrrrrrrr", table, "Milliseconds of one inference, batch 1"))
    if ratios := [row.ratio_to_dense for _, row, _ in rows if isinstance(row, ArtifactResult) and row.ratio_to_dense]:
        names = " and ".join(dict.fromkeys(ratio.baseline for ratio in ratios))
        blocks.append(
            Text(
                f"Time over dense is the median of the paired ratios to {names} in the same rounds, with its 95 %"
                " interval; under 1 is faster."
            )
        )
    return Section("Latency", tuple(blocks), _how(report, rows))


def _how(report: Report, rows: list[Row]) -> str:
    kinds: Counter[str] = Counter(latency.kind for _, _, latency in rows)
    said = []
    if kinds["measured"]:
        machine = " with ".join((report.environment.cpu, *report.environment.gpus))
        said.append(f"Measured on {machine}, all interleaved; a sample encloses one call and none is dropped.")
    for kind, phrase in (("emulated", "emulated, not measured"), ("estimate", "computed, seen nowhere")):
        if kinds[kind]:
            said.append(f"{kinds[kind]} of {len(rows)} are {phrase}.")
    said.append("Spread is the interquartile range over the median; drift compares the last quarter with the first.")
    return " ".join(said)


def _row(name: str, row: Owner, latency: Latency) -> tuple[str | Cell, ...]:
    artifact = row if isinstance(row, ArtifactResult) else None
    return (
        name,
        str(row.threads),
        _kind(latency),
        str(latency.n),
        number(latency.min),
        number(latency.p50),
        percentile(latency.p90, 90, latency.n),
        percentile(latency.p95, 95, latency.n),
        percentile(latency.p99, 99, latency.n),
        number(latency.max),
        percent(latency.spread),
        percent(latency.drift, signed=True),
        _ratio(artifact.ratio_to_dense if artifact else None),
        number(artifact.load_ms if artifact else None),
        number(artifact.first_ms if artifact else None),
    )


def _kind(latency: Latency) -> Cell:
    if latency.kind != "measured":
        return Cell(f"{latency.kind} ({latency.basis})", "quiet")
    return Cell("measured, never settled", "bad") if latency.stable is False else Cell("measured")


def _ratio(ratio: PairedRatio | None) -> str:
    if ratio is None:
        return NONE
    if ratio.low is None or ratio.high is None:
        return f"{number(ratio.value)}{TIMES}"
    return f"{number(ratio.value)}{TIMES} ({number(ratio.low)} to {number(ratio.high)})"


_SHAPES = "Every sample: the height of a shape is how many calls took that long; the line marks the median."
_DIAMONDS = "A diamond is a latency that was not measured: an emulator told it, or it is an estimate."


def _drawing(by_threads: dict[int, list[Row]]) -> Drawing:
    sampled = [bool(row.samples) for group in by_threads.values() for _, row, _ in group]
    caption = " ".join(text for text, said in ((_SHAPES, any(sampled)), (_DIAMONDS, not all(sampled))) if said)
    sizes = [len(group) for group in by_threads.values()]
    with styled():
        figure, axes = panels(
            height(sum(sizes), 0.34) + 0.3 * len(sizes), len(sizes), sharex=True, height_ratios=[s + 0.6 for s in sizes]
        )
        values = [v for group in by_threads.values() for _, row, latency in group for v in (*row.samples, latency.p50)]
        low, high = max(min(values), 1e-6) / 1.1, max(max(values), 1e-6) * 1.1
        for panel, (n, group) in zip(axes, by_threads.items(), strict=True):
            panel.set_title(threads(n))
            panel.set_xscale("log")
            panel.set_xlim(low, high)
            for place, (_, row, latency) in enumerate(group):
                _shape(panel, place, row, latency, (low, high))
            panel.set_ylim(len(group) - 0.5, -0.62)
            panel.set_yticks(range(len(group)), [tail(name) for name, _, _ in group], color=INK)
            panel.tick_params(axis="y", length=0)
            panel.grid(True, axis="x")
            panel.spines["left"].set_visible(False)
        milliseconds(axes[-1])
        return Drawing(svg(figure, "latency", caption), caption)


def _shape(axes: "Axes", place: int, row: Owner, latency: Latency, limits: tuple[float, float]) -> None:
    """One row: a histogram of the samples over its base line, the median and what it is."""
    colour = AFTER if isinstance(row, ArtifactResult) else BEFORE
    base = place + 0.36
    if row.samples:
        low, high = (math.log(limit) for limit in limits)
        step = (high - low) / (BINS * 4)
        bins = Counter(int((math.log(max(sample, limits[0])) - low) / step) for sample in row.samples)
        most = max(bins.values())
        first, last = min(bins), max(bins)
        edges = [math.exp(low + step * i) for i in range(first, last + 2)]
        tops = [base - 0.72 * bins[i] / most for i in range(first, last + 1)]
        axes.stairs(tops, edges, baseline=base, fill=True, color=colour, alpha=0.75, linewidth=0)
        axes.plot([latency.p50, latency.p50], [base, base - 0.8], color=INK, linewidth=1.2)
        note = f"{number(latency.p50)} ms, n = {latency.n}"
    else:
        axes.plot(latency.p50, place, "D", color=colour, markerfacecolor="none", markersize=6)
        note = f"{number(latency.p50)} ms, {latency.kind}"
    right = max((*row.samples, latency.p50))
    axes.annotate(note, (right, place), (7, 0), textcoords="offset points", va="center", color=QUIET, fontsize=8)
