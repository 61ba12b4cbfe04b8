"""Equalisation: the same answers from channels of like ranges, and less that rounding them loses."""

from pathlib import Path

import pytest
import tiny
import torch
from plain import setup
from torch import Tensor, nn

from compressor.model import MultiTaskModel
from compressor.quantization.equalise import equalised
from compressor.stages.quantize import Quantize
from compressor.workload import Task

FAR = torch.tensor([8.0, 1, 0.25, 1, 4, 1, 0.5, 2])
"""Powers of two, so that scaling by them is exact."""


class Chain(nn.Module):
    """A convolution, what is given, and a convolution that answers."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.between = nn.Sequential(*between)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((x + self.inner(x).relu()).relu())


def depthwise() -> nn.Module:
    return Chain(
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2),
    )  # fmt: skip


NETWORKS = {
    "relu": lambda: Chain(nn.ReLU()),
    "leaky, then average": lambda: Chain(nn.LeakyReLU(0.1), nn.AvgPool2d(2)),
    "norm": lambda: Chain(nn.BatchNorm2d(8), nn.ReLU()),
    "depthwise": depthwise,
    "residual": Residual,
}


def of(module: nn.Module) -> MultiTaskModel:
    """Trained as badly as can be for a grid: some channels reach much farther than others."""
    chance = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=chance) / max(1, parameter[0].numel()) ** 0.5
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data, norm.bias.data = FAR.clone(), 0.1 * FAR
    if not any(isinstance(one, nn.BatchNorm2d) for one in module.modules()):
        module.first.weight.data *= FAR[:, None, None, None]  # type: ignore[operator, union-attr]
        module.first.bias.data *= FAR  # type: ignore[operator, union-attr]
    module.last.weight.data /= FAR[:, None, None]  # type: ignore[operator, union-attr]
    return MultiTaskModel(module.eval(), (Task("t"),), (pictures(1, 2),))


def pictures(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def lost(module: nn.Module, folder: Path, how: str) -> float:
    """Of the answers' power, what rounding makes of them otherwise."""
    inputs = pictures(5)
    model, bench = setup(lambda: module, (pictures(1, 2),), folder)
    found = Quantize(kind="quantize", equalise=how, most_kept=0).run(model, bench)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted, answer = model.answers(inputs)["t"], found.answers(inputs)["t"]
    return float((answer - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_answers_the_same_and_loses_less_to_rounding(name: str, tmp_path: Path) -> None:
    model = of(NETWORKS[name]())
    found, moved = equalised(model, [(pictures(3),)])
    assert moved >= 4
    inputs = pictures(5)
    with torch.no_grad():
        assert torch.allclose(found.answers(inputs)["t"], model.answers(inputs)["t"], rtol=1e-4, atol=1e-5)
    assert lost(model.module, tmp_path, "always") < 0.7 * lost(model.module, tmp_path, "never")


@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.GELU(), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8)])
def test_what_no_factor_gets_through_is_left_alone(between: nn.Module) -> None:
    model = of(Chain(between))
    found, moved = equalised(model, [(pictures(3),)])
    assert moved == 0
    for name, value in model.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value)


def test_zeros_stay_zeros_and_a_channel_of_them_is_no_trouble() -> None:
    model = of(Chain(nn.ReLU()))
    with torch.no_grad():
        for tensor in (model.module.first.weight, model.module.first.bias):  # type: ignore[union-attr]
            tensor[3] = 0  # type: ignore[operator, index]
        model.module.last.weight[:, 5] = 0  # type: ignore[operator, union-attr, index]
    found, moved = equalised(model, [(pictures(3),)])
    assert moved
    for name, value in model.module.state_dict().items():
        other = found.module.state_dict()[name]
        assert torch.equal(other == 0, value == 0) and bool(other.isfinite().all())


def test_the_stage_takes_it_where_a_task_would_leave_its_budget_without(tmp_path: Path) -> None:
    model = tiny.model()
    far = FAR.square().repeat(2)
    with torch.no_grad():  # the network as it was, harder to put on grids
        stem, down = model.module.stem, model.module.down  # type: ignore[union-attr]
        stem[1].weight *= far  # type: ignore[index, operator]
        stem[1].bias *= far  # type: ignore[index, operator]
        down[0].weight /= far[:, None, None]  # type: ignore[index, operator]
    tight = tiny.bench(model, tmp_path, size="0.1 %", kind=1.0, mask=1.0)
    lost = {}
    for how in ("never", "auto"):
        tight.notes.clear()
        found = Quantize(kind="quantize", equalise=how, most_kept=0).run(model, tight)  # type: ignore[arg-type]
        lost[how] = -tight.margins(tight.scores(found))["size"]
        assert (how == "auto") == any("channels were brought nearer" in note for note in tight.notes)
    assert lost["never"] > 0 and lost["auto"] < lost["never"]

    wide = tiny.bench(model, tmp_path, size=1e3, kind=1.0, mask=1.0)
    Quantize(kind="quantize").run(model, wide)
    assert len(wide.notes) == 1  # nothing is tried where the budgets hold
