"""What rounding alone moves answers by is measured, and two right ways to compute a network are no further apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiny
import torch
from plain import setup
from torch import Tensor, nn

from compressor.bench import Bench
from compressor.export import run, session, to_program
from compressor.leeway import leeway
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.stages.quantize import Quantize
from compressor.verify import compare
from targets.base import Program


class Deep(nn.Module):
    """Many convolutions one behind the other, untrained and without norms, that carry every rounding on."""

    def __init__(self, blocks: int = 24, bend: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.bend = bend
        self.stem, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)
        self.wide = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(blocks))
        for one in self.wide:
            nn.init.orthogonal_(one.weight, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one in self.wide:
            x = self.bend(one(x)) - 0.3
        return self.last(x).mean((2, 3))


def program_of(
    model: MultiTaskModel, bench: Bench, steps: Literal["exact", "any"] = "any"
) -> tuple[MultiTaskModel, Program]:
    found = Quantize(kind="quantize", batches=2, most_kept=0, steps=steps).run(model, bench)
    return found, to_program(extract(found, [task.name for task in found.tasks]), found.inputs)[1]


def test_a_deep_network_is_given_as_much_as_it_needs(tmp_path: Path) -> None:
    model, bench = setup(Deep, (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),), tmp_path)
    found, program = program_of(model, bench)
    chance = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(1, 3, 16, 16, generator=chance).numpy(),) for _ in range(4)]
    plain = session(program.model, optimised=False)
    with torch.no_grad():
        pairs = [(found.answers(torch.from_numpy(x))["t"].numpy(), run(plain, (x,))["t"]) for (x,) in inputs]
    room = leeway(program.model, inputs)["t"]
    assert compare("onnx", "t", pairs, room).holds
    scale = max(np.abs(want).max() for want, _ in pairs)
    assert room > 1e-3 * scale
    far = [(want, have + np.float32(1.1 * max(room, 0.03 * scale))) for want, have in pairs]
    assert not compare("onnx", "t", far, room).holds


def test_a_network_on_exact_grids_is_given_nothing_but_for_what_is_not_exact(tmp_path: Path) -> None:
    given = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)
    for make, exact in ((Deep, True), (lambda: Deep(bend=torch.tanh), False)):
        model, bench = setup(make, given, tmp_path)
        _, program = program_of(model, bench, "exact")
        assert (leeway(program.model, [tuple(x.numpy() for x in given)])["t"] == 0.0) == exact


def test_it_is_the_same_each_time_and_small_for_a_shallow_network(model: MultiTaskModel, bench: Bench) -> None:
    _, program = program_of(model, bench)
    inputs = [tuple(x.numpy() for x in model.inputs)]
    room = leeway(program.model, inputs)
    assert room == leeway(program.model, inputs)
    answers = run(session(program.model, optimised=False), inputs[0])
    for name, value in answers.items():
        assert room[name] <= 0.03 * np.abs(value).max()


def test_a_network_without_grids_has_none() -> None:
    model = tiny.model()
    program = to_program(extract(model, ["kind", "mask"]), model.inputs)[1]
    assert leeway(program.model, [tuple(x.numpy() for x in model.inputs)]) == {"kind": 0.0, "mask": 0.0}
    pairs = [(np.ones(3, np.float32), np.full(3, 1.001, np.float32))]
    assert not compare("onnx", "t", pairs).holds and compare("onnx", "t", pairs, 0.0).holds
    assert compare("onnx", "t", pairs, 0.0).tolerance == pytest.approx(0.03)
    assert compare("onnx", "t", pairs, 1e9).tolerance == pytest.approx(0.25), "no network may answer just anything"
