"""What layers hand on is compared with what the original's hand on, at the channels they kept."""

import pytest
import torch
from test_reconstruction import halved
from torch import Tensor, nn

from compressor.bench import Bench
from compressor.channels import Axis
from compressor.errors import CompressError
from compressor.features import Features
from compressor.groups import Prunable
from compressor.model import MultiTaskModel
from compressor.training import Training, _gap, train
from compressor.workload import Task


def test_features_of_a_cut_network_are_compared_at_the_channels_it_kept(model: MultiTaskModel) -> None:
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[1::2]] = False
    cut = prunable.cut(model, keep)
    layer = next(name for name, module in cut.module.named_modules() if isinstance(module, nn.BatchNorm2d))
    features = Features(cut, model)
    wrong = cut.clone()
    wrong.kept[f"{layer}.weight"][0] = [k + 1 for k in wrong.kept[f"{layer}.weight"][0]]
    gaps = []
    for candidate in (cut, wrong):
        features = Features(candidate, model)
        with features, torch.no_grad():
            candidate.module(*model.inputs)
            model.module(*model.inputs)
        seen: list[float] = []
        features.gap(lambda a, b, seen=seen: seen.append(float((a - b).abs().max())) or a.new_zeros(()))
        gaps.append(seen)
    assert gaps[0][0] < 1e-5 < gaps[1][0]  # the first reads the picture itself


def test_features_are_forgotten_between_batches_and_hooks_are_gone(model: MultiTaskModel) -> None:
    copy = model.clone()
    features = Features(copy, model)
    for _ in range(2):
        with features:
            copy.module(*model.inputs)
            model.module(*model.inputs)
        assert float(features.gap(_gap).detach()) == 0
    assert not any(module._forward_hooks for module in (*copy.module.modules(), *model.module.modules()))
    with pytest.raises(CompressError, match="no layer of this network can be compared"):
        features.gap(_gap)


def test_features_bring_layers_back(model: MultiTaskModel, bench: Bench) -> None:
    """Without a label or an answer to learn from, layers are what is left."""
    left = []
    for weight in (0.0, 5.0):
        pruned = halved(model)
        how = Training(steps=30, learning_rate=1e-2, distill="always", features=weight)
        train(pruned, bench, how, "t", 0)
        features = Features(pruned, model)
        with features, torch.no_grad():
            for batch in bench.workload.batches("calibrate", 0):
                pruned.module(*batch.inputs)
                model.module(*batch.inputs)
        left.append(float(features.gap(_gap)))
    assert left[1] < 0.8 * left[0]


class Plain(nn.Module):
    """Without a norm; as many channels leave the transposed convolution as enter it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last = nn.Conv2d(2, 8, 1), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.up(self.first(x).relu()).relu())
        return answer


def test_without_norms_convolutions_are_compared_by_their_outputs() -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(Plain().eval(), (Task("y"),), (torch.rand(1, 2, 4, 4),))
    cut = model.clone()
    even, odd = torch.arange(0, 8, 2), torch.arange(1, 8, 2)
    axes = {Axis("first.weight", 0): even, Axis("first.bias", 0): even, Axis("up.weight", 0): even}
    cut.cut(axes | {Axis("up.weight", 1): odd, Axis("up.bias", 0): odd, Axis("last.weight", 1): odd})
    features = Features(cut, model)
    with features, torch.no_grad():
        cut.module(*model.inputs)
        model.module(*model.inputs)
    seen: list[float] = []
    features.gap(lambda a, b: seen.append(float((a - b).abs().max())) or a.new_zeros(()))
    assert len(seen) == 2 and seen[0] < 1e-6 < seen[1]
