"""What an accelerator is at while a frame runs: its units over time, its layers, and what it moves."""

from compressor.report.blocks import Block, Drawing, Facts, Section, Table
from compressor.report.figure import AFTER, INK, QUIET, panels, styled, svg
from compressor.report.numbers import NONE, count, number, percent, size
from compressor.report.schema import Accelerated, ArtifactResult, Kernel, Report

FOLDED_ROWS = 24
HEAD = ("Layer", "Multiply-adds", "Cycles", "Of all", "Array full", "Moved")


def section(report: Report) -> Section | None:
    """None when no artifact runs on an accelerator."""
    blocks: list[Block] = []
    once = {artifact.name: artifact for artifact in report.artifacts}
    for number_, artifact in enumerate(once.values()):
        if artifact.accelerator is not None:
            blocks += _blocks(artifact, artifact.accelerator, f"units{number_}")
    lead = "By RTL simulation: the cycle model, which tests hold to the circuit. Nothing here was measured on a device."
    return Section("Accelerator", tuple(blocks), lead) if blocks else None


def _blocks(artifact: ArtifactResult, seen: Accelerated, name: str) -> list[Block]:
    layers = [kernel for kernel in artifact.kernels if kernel.cycles]
    rows = tuple(_row(layer, seen) for layer in layers)
    caption = (
        f"Layers of '{artifact.name}' on the array; a layer's cycles are those from the last instruction of the one"
        " before until its own last, so where both overlap the array may seem fuller than full"
    )
    return [
        _drawing(artifact.name, seen, name),
        Facts(_facts(artifact.name, seen, sum(layer.macs for layer in layers))),
        Table(HEAD, "lrrrrr", rows, caption, folded=len(rows) > FOLDED_ROWS),
    ]


def _facts(name: str, seen: Accelerated, macs: int) -> dict[str, str]:
    cycles = sum(seen.cycles)
    runs = "one run" if len(seen.cycles) == 1 else f"{len(seen.cycles)} runs"
    clock = f"{seen.megahertz:g} MHz ({seen.clock_by})"
    moved = seen.read_bytes + seen.written_bytes + seen.program_bytes
    return {
        "Artifact": f"{name}: {runs} on an array of {seen.rows} x {seen.columns} at {clock}",
        "A frame": f"{cycles:,} cycles, {number(_ms(cycles, seen))} ms, all memory stalls counted; what the host"
        " computes is not in it",
        "On one bus": f"about {seen.shared_cycles:,} cycles, {number(_ms(seen.shared_cycles, seen))} ms, where the"
        " program, loads and stores share one (a model that is not exact)",
        "Array full": _full(macs, cycles, seen),
        "Memory traffic": f"{size(moved)} a frame: loads {size(seen.read_bytes)}, stores {size(seen.written_bytes)},"
        f" instructions {size(seen.program_bytes)}",
        "On the chip": ", ".join(f"{what} {size(held)}" for what, held in seen.buffer_bytes.items())
        + f"; together {size(sum(seen.buffer_bytes.values()))}",
        "In memory": f"{size(seen.memory_bytes)} of weights, parameters and activations,"
        f" {size(seen.program_bytes)} of programs",
    }


def _ms(cycles: int, seen: Accelerated) -> float:
    return cycles / seen.megahertz / 1e3


def _full(macs: int, cycles: int, seen: Accelerated) -> str:
    return percent(macs / (seen.rows * seen.columns * cycles)) if cycles and macs else NONE


def _row(layer: Kernel, seen: Accelerated) -> tuple[str, ...]:
    return (
        layer.layer,
        count(layer.macs),
        f"{layer.cycles:,}",
        percent(layer.cycles / max(1, sum(seen.cycles))),
        _full(layer.macs, layer.cycles, seen),
        size(layer.moved_bytes),
    )


def _drawing(title: str, seen: Accelerated, name: str) -> Drawing:
    caption = (
        f"Units of the accelerator during a frame of '{title}': the height is the share of the time in which a unit"
        " works rather than waits."
    )
    total = sum(seen.cycles)
    with styled():
        figure, axes = panels(0.62 * len(seen.work) + 0.6, len(seen.work), sharex=True)
        for axis, (unit, shares) in zip(axes, seen.work.items(), strict=True):
            edges = [total * k / len(shares) for k in range(len(shares) + 1)]
            axis.stairs(shares, edges, fill=True, color=AFTER, alpha=0.75, linewidth=0)
            axis.set_ylim(0, 1)
            axis.set_yticks([])
            axis.set_ylabel(unit, rotation=0, ha="right", va="center", color=INK)
            mean = percent(sum(shares) / len(shares)) if shares else NONE
            axis.annotate(
                mean, (1, 0.5), (6, 0), xycoords="axes fraction", textcoords="offset points", va="center", color=QUIET
            )
            begun = 0
            for cycles in seen.cycles[:-1]:
                begun += cycles
                axis.axvline(begun, color=INK, linewidth=0.8)
            axis.tick_params(axis="x", length=0 if axis is not axes[-1] else 3)
        axes[-1].set_xlim(0, max(1, total))
        axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        runs = ", with a line between two runs" if len(seen.cycles) > 1 else ""
        axes[-1].set_xlabel(f"cycle of the frame{runs}")
        return Drawing(svg(figure, name, caption), caption)
