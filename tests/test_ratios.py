"""Ratios between grids are short binary fractions, as far as they can all be, and no step moves far for it."""

from math import frexp, prod
from pathlib import Path

import pytest
import torch
from plain import setup
from torch import Tensor, nn

from compressor.model import MultiTaskModel
from compressor.quantization.grids import Grid, Quantization
from compressor.quantization.points import points
from compressor.quantization.ratios import RATIO_BITS, rounded
from compressor.quantization.simulate import computed, folded
from compressor.trace import as_brought


class Joined(nn.Module):
    """Two branches that are joined, added to what they are made of, averaged over 5 x 7, and multiplied by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.cat([self.left(x), self.right(x)], 1) + x
        pooled = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        rows = y.flatten(2)
        return (rows @ rows.transpose(1, 2)).mean(2) + pooled


class Circle(nn.Module):
    """A value that is added to a sum of itself: the last ratio follows from the two others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (nn.functional.avg_pool2d(y, 3, 1, 1) + y) + y


def short(ratio: float) -> bool:
    """Has it so few bits, but for what float32 leaves of two steps?"""
    scaled = ratio * 2.0 ** (RATIO_BITS - frexp(ratio)[1])
    return abs(scaled - round(scaled)) < 4 * scaled * 2.0**-24


def grids(module: type[nn.Module], folder: Path, seed: int = 0) -> tuple[MultiTaskModel, Quantization, Quantization]:
    """(the network, any grids, the same with short ratios)."""
    chance = torch.Generator().manual_seed(seed)
    model, _ = setup(module, (torch.randn(1, 3, 5, 7, generator=chance),), folder)
    network = computed(folded(as_brought(model, model.inputs)))
    where = points(network)
    steps = torch.rand(len(where.values), generator=chance) * 0.2 + 0.01
    values = {name: Grid(float(step), 3) for name, step in zip(where.values, steps, strict=True)}
    weights = [node for node in network.graph.nodes if node.name in where.weighted]
    scales = {node.name: torch.rand(node.meta["val"].shape[1], generator=chance) * 0.01 + 1e-4 for node in weights}
    before = Quantization(values, scales)
    return model, before, rounded(network, before)


@pytest.mark.parametrize("seed", range(5))
def test_every_ratio_is_short_and_no_step_moves_far(seed: int, tmp_path: Path) -> None:
    _, before, after = grids(Joined, tmp_path, seed)
    step = {name: grid.scale for name, grid in after.values.items()}
    stem, left, right, joined = step["relu"], step["conv2d_1"], step["conv2d_2"], step["cat"]
    total, pooled = step["add"], step["adaptive_avg_pool2d"]
    ratios = [left / joined, right / joined, joined / total, stem / total, total / pooled / 35]
    ratios += [prod((total, total)) / step["matmul"], step["matmul"] / step["mean"] / 8]
    ratios += [step["mean"] / step["add_1"]]
    ratios += [float(s) * next(iter(step.values())) / stem for s in after.scales["conv2d"]]
    ratios += [float(s) * stem / left for s in after.scales["conv2d_1"]]
    assert all(map(short, ratios)), ratios
    for name, grid in before.values.items():
        assert after.values[name].zero_point == grid.zero_point
        assert after.values[name].scale == pytest.approx(grid.scale, rel=1e-3)
    for name, scale in before.scales.items():
        torch.testing.assert_close(after.scales[name], scale, rtol=2e-3, atol=0)


def test_a_ratio_that_others_decide_stays_and_the_others_are_short(tmp_path: Path) -> None:
    _, before, after = grids(Circle, tmp_path)
    step = {name: grid.scale for name, grid in after.values.items()}
    ratios = {
        "average": step["conv2d"] / step["avg_pool2d"] / 9, "sum": step["avg_pool2d"] / step["add"],
        "whole": step["add"] / step["add_1"],
    }
    assert all(map(short, ratios.values())), ratios
    kept = before.values["conv2d"].scale / before.values["add"].scale
    assert step["conv2d"] / step["add"] == pytest.approx(kept, rel=1e-3)


def test_what_is_rounded_already_stays(tmp_path: Path) -> None:
    model, _, after = grids(Joined, tmp_path)
    again = rounded(computed(folded(as_brought(model, model.inputs))), after)
    for name, grid in after.values.items():
        assert again.values[name].scale == pytest.approx(grid.scale, rel=1e-6)
