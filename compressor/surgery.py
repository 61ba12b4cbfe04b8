"""Cuts that a module's own code may not go along with: which groups it refuses, and which only go together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.channels import FIXED, Axis
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.model import MultiTaskModel

Tied = tuple[tuple[Axis, Axis], ...]
"""Pairs of axes that lose the same channels."""


def refused(model: MultiTaskModel, prunable: Prunable, keep: Tensor, groups: Sequence[Group]) -> dict[str, str]:
    """The groups whose channels cannot go together with those, before them, that can; and why."""
    accepted, found = prunable.keep_all(), dict[str, str]()
    for group in groups:
        tried = accepted.clone()
        tried[group.classes] = keep[group.classes]
        try:
            if not tried.equal(accepted):
                prunable.cut(model, tried)
            accepted = tried
        except CompressError as error:
            found[group.name] = str(error)
    return found


def one_width(model: MultiTaskModel, prunable: Prunable, stuck: Sequence[Group], tied: Tied) -> Tied:
    """Pairs of axes that can be cut, of groups that cannot by themselves, if they lose the same channels: code that has
    one integer for the width of both, as a non-local block for its projections.
    """
    alike: dict[tuple[int, int, int, str], list[Axis]] = {}
    for group in stuck:
        axis = prunable.written(group)
        size = len(group), group.span, len(prunable.channels.axes[axis])
        alike.setdefault((*size, _owner(axis)), []).append(axis)
    found: list[tuple[Axis, Axis]] = []
    for first, *others in alike.values():
        pairs = [(first, other) for other in dict.fromkeys(others) if other != first and (first, other) not in tied]
        tried = Prunable.of(model, (*tied, *pairs), shrinks=prunable.shrinks)
        keep = tried.keep_all()
        classes = torch.unique(tried.channels.axes[first])
        keep[classes[classes != FIXED][1::2]] = False
        if pairs and not keep.all() and cut(model, tried, keep) is not None:
            found += pairs
    return tuple(found)


def _owner(axis: Axis) -> str:
    """The module whose code calls the layer that has a weight, itself or in a sequence."""
    parts = axis.tensor.split(".")[:-1]
    while parts and parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts[:-1])


def cut(model: MultiTaskModel, prunable: Prunable, keep: Tensor) -> MultiTaskModel | None:
    """The cut copy, or None where the module's own code does not allow it."""
    try:
        return prunable.cut(model, keep)
    except CompressError:
        return None
