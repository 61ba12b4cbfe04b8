"""What is left of every layer: channels kept, and the density of the weights kept."""

from typing import Any

from compressor.report.blocks import Block, Drawing, Section, Table, Text
from compressor.report.figure import AFTER, BEFORE, INK, panels, styled, svg, tail
from compressor.report.numbers import change, count, percent
from compressor.report.schema import LayerResult, Report

NAMED, NUMBERED = 60, 30  # most layers whose names, and whose channel counts, fit under and over the bars


def section(report: Report) -> Section | None:
    """None when no layers were recorded."""
    if not report.layers:
        return None
    sparse = any(layer.density < 1 for layer in report.layers)
    blocks: list[Block] = [_drawing(report.layers, sparse)]
    if not sparse:
        blocks.append(Text("Density: every weight kept is nonzero in every layer, no mask was applied."))
    rows = tuple(_row(layer) for layer in report.layers)
    head = ("Layer", "Channels before", "After", "Change", "Parameters", "Density")
    blocks.append(Table(head, "lrrrrr", rows, f"All {len(rows)} layers as a table", folded=True))
    return Section("Layers", tuple(blocks), "In the order of the forward pass.")


def _row(layer: LayerResult) -> tuple[str, ...]:
    before, after = layer.channels_before, layer.channels_after
    return layer.name, str(before), str(after), change(before, after), count(layer.parameters), percent(layer.density)


def _drawing(layers: tuple[LayerResult, ...], sparse: bool) -> Drawing:
    caption = "Channels kept per layer: the pale bar is the original, the dark one what is left."
    if sparse:
        caption += " Below, density per layer: the fraction of the weights kept that are not zero."
    places = range(len(layers))
    named = len(layers) <= NAMED
    longest = max(len(tail(layer.name)) for layer in layers) * 0.075 if named else 0.3
    width = min(0.78, 0.09 * len(layers))
    with styled():
        figure, axes = panels(2.2 + 1.5 * sparse + longest, 1 + sparse, 1, sharex=True)
        axes[0].bar(places, [layer.channels_before for layer in layers], width, color=BEFORE, alpha=0.35)
        axes[0].bar(places, [layer.channels_after for layer in layers], width, color=AFTER)
        axes[0].set_ylabel("channels")
        if len(layers) <= NUMBERED:
            for place, layer in zip(places, layers, strict=True):
                above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes[0].annotate(str(layer.channels_after), (place, layer.channels_after), color=INK, **above)
        if sparse:
            axes[1].bar(places, [layer.density for layer in layers], width, color=AFTER)
            axes[1].set_ylim(0, 1)
            axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axes[1].set_ylabel("density")
        if named:
            axes[-1].set_xticks(places, [tail(layer.name) for layer in layers], rotation=90, fontsize=8)
        else:
            axes[-1].set_xlabel("layer, counted from the input")
        axes[-1].set_xlim(-0.8, len(layers) - 0.2)
        for panel in axes:
            panel.grid(True, axis="y")
            panel.tick_params(axis="x", length=0)
            panel.spines["left"].set_visible(False)
            panel.locator_params(axis="y", nbins=5)
        return Drawing(svg(figure, "layers", caption), caption)
