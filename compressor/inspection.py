"""What each task of a network needs, what it shares and what is its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model import MultiTaskModel
from compressor.pathway import Pathway, elements, extract


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
    """A row for each task set, in the given order.

    Raises:
        CompressError: an unknown task.
    """
    alone = {task.name: extract(model, [task.name]) for task in model.tasks}
    cut: dict[tuple[str, ...], Pathway] = {(name,): pathway for name, pathway in alone.items()}
    needs = {name: elements(model, pathway.tensors, pathway.kept) for name, pathway in alone.items()}
    return [_row(model, cut.get(tuple(tasks)) or extract(model, tasks), needs) for tasks in task_sets]


def _row(model: MultiTaskModel, pathway: Pathway, alone: Mapping[str, Mapping[str, Tensor]]) -> Row:
    outside = [needs for task, needs in alone.items() if task not in pathway.tasks]
    least = 1 if outside else 2
    shared = 0
    for name, own in elements(model, pathway.tensors, pathway.kept).items():
        users = sum((n[name].int() for n in outside or alone.values() if name in n), torch.zeros(()))
        shared += int((own & (users >= least)).sum())
    return Row(pathway.tasks, pathway.macs, pathway.parameters(model), shared)
