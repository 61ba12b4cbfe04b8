"""Pruned layers are fitted to what they answered before."""

from pathlib import Path

import plain
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from compressor.model import MultiTaskModel
from compressor.reconstruction import reconstruct
from compressor.stages.prune import Prune
from compressor.stages.ticket import Ticket, rewind
from compressor.training import Training
from compressor.workload import Batch, Task

LAYERS = {
    "strided and grouped": (nn.Conv2d(6, 8, 3, 2, 1, groups=2), (6, 9, 9)),
    "dilated, without a bias": (nn.Conv2d(6, 8, (3, 1), 1, (2, 0), dilation=(2, 1), bias=False), (6, 9, 9)),
    "depthwise, reflecting": (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6), (6, 9, 9)),
    "of signals": (nn.Conv1d(6, 5, 3, padding="same"), (6, 20)),
    "of volumes": (nn.Conv3d(2, 3, 2), (2, 6, 6, 6)),
    "linear, over tokens": (nn.Linear(12, 5), (7, 12)),
}


def halved(model: MultiTaskModel) -> MultiTaskModel:
    chance = torch.Generator().manual_seed(1)
    names = [name for name, value in model.module.named_parameters() if value.dim() > 1]
    shapes = {name: model.module.get_parameter(name).shape for name in names}
    masks = {name: torch.rand(shape, generator=chance) < 0.5 for name, shape in shapes.items()}
    return rewind(model, model.module.state_dict(), masks)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_answers_as_near_as_its_weights_allow(kind: str) -> None:
    layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    few = torch.randn(64, *shape).movedim(channels, -1)[..., :1]  # so that inputs can stand for each other
    inputs = (few @ torch.randn(1, shape[max(channels - 1, -1)])).movedim(-1, channels).contiguous() + 0.5
    model = MultiTaskModel(layer, (Task("y"),), (inputs[:1],))
    pruned = halved(model)
    fitted = pruned.clone()
    assert reconstruct(fitted, model, [Batch((inputs,), {})]) == []
    with torch.no_grad():
        wanted = layer(inputs)
        error = [float((found.module(inputs) - wanted).square().mean()) for found in (pruned, fitted)]
        for name, mask in fitted.masks.items():
            assert not fitted.module.get_parameter(name)[~mask].any()
        assert error[1] < 0.95 * error[0]
        for _ in range(3):  # nowhere near is anything better
            near = fitted.clone()
            weight = near.module.get_parameter("weight")
            weight += 0.3 * weight.abs().mean() * torch.randn(weight.shape) * near.masks["weight"]
            assert float((near.module(inputs) - wanted).square().mean()) > error[1]


class Odd(nn.Module):
    """Layers that share a weight or a bias, one of which only the weight is read, and others that are out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.turned = nn.ConvTranspose1d(4, 4, 2), weight_norm(nn.Linear(4, 4))
        self.one, self.two, self.three, self.four, self.silent, self.seen = (nn.Linear(4, 4) for _ in range(6))
        self.two.weight, self.four.bias = self.one.weight, self.three.bias

    def forward(self, x: Tensor) -> Tensor:
        shared = self.four(self.three(self.two(self.one(self.turned(self.up(x).mT)))))
        answer: Tensor = self.seen(shared @ self.silent.weight)
        return answer


def test_what_cannot_be_fitted_is_named_and_left() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 4, 6)
    model = MultiTaskModel(Odd(), (Task("y"),), (inputs,))
    pruned = halved(model)
    fitted = pruned.clone()
    assert reconstruct(fitted, model, [Batch((inputs,), {})]) == [
        "up", "turned.parametrizations.weight", "one", "three", "four", "silent",
    ]
    changed = {n for n, p in fitted.module.named_parameters() if not p.equal(pruned.module.get_parameter(n))}
    assert changed == {"seen.weight", "seen.bias"}


def test_a_layer_of_very_many_inputs_is_named_and_left() -> None:
    inputs = torch.randn(3, 12_000)
    model = MultiTaskModel(nn.Sequential(nn.Linear(12_000, 2)), (Task("y"),), (inputs,))
    pruned = halved(model)
    fitted = pruned.clone()
    assert reconstruct(fitted, model, [Batch((inputs,), {})]) == ["0"]
    assert fitted.module.get_parameter("0.weight").equal(pruned.module.get_parameter("0.weight"))


def test_a_ticket_that_is_reconstructed_loses_less(model: MultiTaskModel, tmp_path: Path) -> None:
    apart = []
    for how in (False, True):
        bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=1.0, kind=1.0, mask=1.0)
        stage = Ticket(kind="ticket", keep_ratio=0.15, rounds=3, reconstruct=how, train=Training(steps=0))
        after, inputs = stage.run(model, bench), bench.validation[0].inputs
        with torch.no_grad():
            answers, originals = after.answers(*inputs), model.answers(*inputs)
        apart.append({task: float((answers[task] - originals[task]).square().mean()) for task in answers})
    assert all(apart[1][task] < 0.5 * apart[0][task] for task in apart[0]), apart


def test_channels_that_go_are_made_up_for_by_those_that_stay(model: MultiTaskModel, tmp_path: Path) -> None:
    lost = []
    for how in (False, True):
        bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=1e3, kind=1e3, mask=1e3)
        stage = Prune(kind="prune", macs=0.5, rounds=2, criterion="magnitude", reconstruct=how)
        after = stage.run(model, bench)
        scores = bench.scores(after)
        lost.append(scores["size"] - bench.before["size"])
        assert after.masks == {}
        assert not bench.notes
    assert lost[1] < 0.7 * lost[0]


def test_prune_says_once_what_it_could_not_reconstruct(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3), nn.Conv2d(16, 1, 1))

    model, bench = plain.setup(make, (torch.randn(1, 3, 8, 8),), tmp_path)
    stage = Prune(kind="prune", macs=0.4, rounds=2, round_to=1, slack=1e9, criterion="magnitude", reconstruct=True)
    stage.run(model, bench)
    assert bench.notes == ["not reconstructed: 2."]


def test_reconstruction_and_rewinding_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="'rewind' would undo"):
        Ticket(kind="ticket", keep_ratio=0.5, reconstruct=True, rewind="init", train=Training(steps=1))
