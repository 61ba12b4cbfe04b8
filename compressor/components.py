"""A network's components: what several tasks share, and what is one task's own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.blocks import ALONE, Block, blocks, spread
from compressor.graph import tensor_of
from compressor.model import MultiTaskModel
from compressor.pathway import reach

SHARED = "shared"


def names_of_components(model: MultiTaskModel) -> list[str]:
    """What the numbers of `components` stand for."""
    return [SHARED, *(task.name for task in model.tasks)]


def components(model: MultiTaskModel, names: Sequence[str], block: Block = ALONE) -> dict[str, Tensor]:
    """For each named parameter, int64 of its shape: 1 + the only task whose answer could depend on an element, else 0.

    The other tasks' rows of a fused layer are told apart. A block whose elements are several tasks' own is
    shared.
    """
    readers = reach(model).values()
    found = {}
    for name in names:
        shape = tensor_of(model.module, name).shape
        read_T = torch.stack([read.get(name, torch.zeros(shape, dtype=torch.bool)) for read in readers])
        part = torch.where(read_T.sum(0) == 1, 1 + read_T.int().argmax(0), 0)
        least, most = blocks(part, block, len(model.tasks) + 1).amin(1), blocks(part, block, 0).amax(1)
        found[name] = spread(torch.where(least == most, least, 0), shape, block)
    return found


def left_by_component(model: MultiTaskModel, part: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(weights that the masks keep, all) of each component that has any."""
    labels = names_of_components(model)
    whole, left = torch.zeros(2, len(labels), dtype=torch.int64)
    for name, numbers in part.items():
        mask = model.masks.get(name, torch.ones_like(numbers, dtype=torch.bool))
        whole += torch.bincount(numbers.flatten(), minlength=len(labels))
        left += torch.bincount(numbers[mask], minlength=len(labels))
    return {label: (int(left[n]), int(whole[n])) for n, label in enumerate(labels) if whole[n]}
