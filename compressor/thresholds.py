"""Learnable thresholds: a training finds how much each component of a network can do without (AdapMTL)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from compressor.bench import Bench
from compressor.graph import tensor_of
from compressor.model import MultiTaskModel
from compressor.tensors import names_of
from compressor.training import Training, train

SPEED = 10.0
"""How many times as fast as a weight an s moves: weights change by thousandths, thresholds by their own size."""
LARGEST = 1 - 1e-6  # share of the network's largest weight above which a weight counts as this


def learnt(
    model: MultiTaskModel,
    part: Mapping[str, Tensor],
    course: tuple[int, int],
    bench: Bench,
    how: Training,
    title: str,
    seed: int,
) -> dict[str, Tensor]:
    """What each weight is worth, on a scale on which one common threshold serves every component.

    A copy is trained with W~ = sign(W) * relu(|W| - sigmoid(s)), in units of the network's largest weight, with one
    learnable s for each component. In the paper weight decay raises every s, and so decides what is left. Here a common
    offset does, set anew at each step so that the number of weights above their thresholds follows `course`; the loss
    decides which components they are of.

    Args:
        part: the component of each element of each weight that can be pruned, by name.
        course: how many weights are alive, and how many shall be left.

    Returns:
        For each weight the odds of |W| over exp(s) after the training; higher is kept.

    Source: Xiang et al., "AdapMTL: Adaptive Pruning Framework for Multitask Learning Model", ACM MM 2024.
    """
    copy = model.clone()
    weights = {name: tensor_of(copy.module, name) for name in part}
    thresholds = _Thresholds(weights, part, course, how.steps)
    for name, *others in names_of(copy.module):
        if name in part:
            owners = {copy.module.get_submodule(n.rpartition(".")[0]): n.rpartition(".")[2] for n in (name, *others)}
            for owner, attribute in owners.items():
                register_parametrization(owner, attribute, _Shrunk(thresholds, part[name]))
    copy.module.register_forward_pre_hook(lambda module, _: thresholds.follow() if module.training else None)
    to_the_end = {"check_every": 0, "patience": 0, "stop_at_margin": None}  # the last state is the one on its course
    by_margins = {"weighting": "fixed"} if how.weighting == "margins" else {}
    train(copy, bench, how.model_copy(update=to_the_end | by_margins), title, seed)
    with torch.no_grad():
        return {name: level.contiguous().exp() for name, level in thresholds.levels().items()}


class _Thresholds(nn.Module):
    """An s for each component, and the offset common to all that holds the number of weights left to its course."""

    common: Tensor
    course: Tensor

    def __init__(
        self, weights: Mapping[str, Tensor], part: Mapping[str, Tensor], course: tuple[int, int], steps: int
    ) -> None:
        super().__init__()
        self._weights, self._part, self._steps = weights, part, steps
        self._largest = max(float(weight.detach().abs().max()) for weight in weights.values())
        self.s = nn.Parameter(torch.zeros(1 + max(int(number.max()) for number in part.values())))
        self.register_buffer("common", torch.tensor(-torch.inf))
        self.register_buffer("course", torch.tensor([*course, 0]))  # weights at first, at last; steps done

    def of(self, part: Tensor) -> Tensor:
        return _spread((SPEED * self.s + self.common).sigmoid() * self._largest, part)

    def levels(self) -> dict[str, Tensor]:
        """For each weight, the common offset at which it goes."""
        shares = {name: (weight.abs() / self._largest).clamp_max(LARGEST) for name, weight in self._weights.items()}
        return {name: share.logit() - _spread(SPEED * self.s, self._part[name]) for name, share in shares.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Set the common offset for the next step: what is left falls along a cubic (Zhu and Gupta, 2017)."""
        first, last, done = self.course.tolist()
        left = round(last + (first - last) * (1 - min(1.0, (done + 1) / self._steps)) ** 3)
        level = torch.cat([level.flatten() for level in self.levels().values()])
        self.common.fill_(level.kthvalue(len(level) - left).values if left < len(level) else -torch.inf)
        self.course[2] += 1


class _Shrunk(nn.Module):
    """A weight with its components' thresholds taken off; what was zero stays zero, whatever its gradient."""

    def __init__(self, thresholds: _Thresholds, part: Tensor) -> None:
        super().__init__()
        self.thresholds, self._part = thresholds, part

    def forward(self, weight: Tensor) -> Tensor:
        return weight.sign() * (weight.abs() - self.thresholds.of(self._part).to(weight.dtype)).relu()


def _spread(value_C: Tensor, part: Tensor) -> Tensor:
    """Each component's value at its elements; one number where they are all of one component."""
    if bool((part == part.flatten()[0]).all()):
        return value_C[int(part.flatten()[0])]
    part = part.to(value_C.device)
    return torch.stack([value * (part == number).to(value) for number, value in enumerate(value_C)]).sum(0)
