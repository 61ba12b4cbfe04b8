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
    """Pairs of axes that can be cut, of groups that cannot by themselves, if they lose the same channels.

    Either code has one integer for the width of both, as a non-local block for its projections; or the width of one is
    made of the other's, as that of heads is of their input's (`C // num_heads`), where whole heads go with as many
    channels.
    """
    of_one_owner: dict[tuple[int, int, int, str], list[Axis]] = {}
    of_one_width: dict[int, list[Axis]] = {}
    for group in stuck:
        axis = prunable.written(group)
        size = len(group), group.span, len(prunable.channels.axes[axis])
        of_one_owner.setdefault((*size, _owner(axis)), []).append(axis)
        for axis in prunable.whole(group)[:1]:
            of_one_width.setdefault(len(group) * group.span, []).append(axis)
    for axes in (*of_one_owner.values(), *of_one_width.values()):
        if _go_together(model, prunable, tied, pairs := _pairs(axes, tied)):
            return pairs
    for width, axes in of_one_width.items():  # others, that can go by themselves, may have to follow
        free = [group for group in prunable.groups if group not in stuck and len(group) * group.span == width]
        more = [axis for group in free for axis in prunable.whole(group)[:1]]
        if more and _go_together(model, prunable, tied, pairs := _pairs([*axes, *more], tied)):
            for axis in more:
                fewer = tuple(pair for pair in pairs if pair[1] != axis)
                pairs = fewer if _go_together(model, prunable, tied, fewer) else pairs
            return pairs
    return ()


def _pairs(axes: Sequence[Axis], tied: Tied) -> Tied:
    first, *others = dict.fromkeys(axes)
    return tuple((first, other) for other in others if (first, other) not in tied)


def _go_together(model: MultiTaskModel, prunable: Prunable, tied: Tied, pairs: Tied) -> bool:
    """Whether half of what these axes hold can go, if they lose the same channels."""
    if not pairs:
        return False
    tried = Prunable.of(model, (*tied, *pairs), shrinks=prunable.shrinks)
    keep = tried.keep_all()
    classes = torch.unique(tried.channels.axes[pairs[0][0]])
    keep[classes[classes != FIXED][1::2]] = False
    return not bool(keep.all()) and cut(model, tried, keep) is not None


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
