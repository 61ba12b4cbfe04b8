"""What each task of a network needs, what it shares and what is its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model import MultiTaskModel
from compressor.pathway import Pathway, extract


@dataclass(frozen=True, slots=True)
class Row:
    """One task set.

    Attributes:
        macs: multiply-adds of its pathway.
        parameters: trained values its pathway needs.
        shared: of those, how many a task outside the set needs too (for the set of all tasks: two tasks or more).
    """

    tasks: tuple[str, ...]
    macs: int
    parameters: int
    shared: int

    @property
    def private(self) -> int:
        return self.parameters - self.shared


def inspect(model: MultiTaskModel, task_sets: Sequence[tuple[str, ...]]) -> list[Row]:
    """A row for each task set, in the given order."""
    alone = {task.name: _elements(model, extract(model, [task.name])) for task in model.tasks}
    return [_row(model, extract(model, tasks), alone) for tasks in task_sets]


def _row(model: MultiTaskModel, pathway: Pathway, alone: Mapping[str, Mapping[str, Tensor]]) -> Row:
    mine = _elements(model, pathway)
    outside = [needs for task, needs in alone.items() if task not in pathway.tasks]
    shared = 0
    for name, elements in mine.items():
        if outside:
            others = sum((needs[name].int() for needs in outside if name in needs), torch.zeros(1, dtype=torch.int32))
            shared += int((elements & (others > 0)).sum())
        else:
            users = sum(
                (needs[name].int() for needs in alone.values() if name in needs), torch.zeros(1, dtype=torch.int32)
            )
            shared += int((elements & (users > 1)).sum())
    return Row(pathway.tasks, pathway.macs, pathway.parameters(model), shared)


def _elements(model: MultiTaskModel, pathway: Pathway) -> dict[str, Tensor]:
    """For each trained tensor a pathway reads: which of its elements."""
    found = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        if name not in pathway.tensors:
            continue
        elements = torch.ones(parameter.shape, dtype=torch.bool)
        for dim, kept in pathway.kept.get(name, {}).items():
            side = torch.zeros(parameter.shape[dim], dtype=torch.bool)
            side[list(kept)] = True
            elements &= side.reshape([-1 if d == dim else 1 for d in range(parameter.dim())])
        found[name] = elements
    return found
