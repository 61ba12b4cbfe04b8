"""How much the tasks' gradients agree about a channel; where they pull apart it is a source of conflict."""

from itertools import combinations

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.criteria.gradients import by_task, sums_by_class
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 in 0..1, the same for every task: (1 + c) / 2 for the mean c, over batches and pairs of
    tasks, of the cosine between the gradients of the weights that write the channel.

    A channel that one task alone has a gradient for agrees with itself (1), one that none has is worth nothing (0).

    Raises:
        CompressError: there is one task, or a task's loss has no gradient or is not finite.

    Source: "Structured Pruning for Multi-Task Deep Neural Networks" (CosPrune), arXiv 2304.06840.
    """
    if len(model.tasks) < 2:
        raise CompressError("criterion = 'agreement' compares tasks, and there is one; use 'taylor'.")
    count, tasks = prunable.class_count, range(len(model.tasks))
    writes = list(dict.fromkeys(c.writes for c in prunable.channels.contractions))
    total_C, pairs_C, reached_C = torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.bool)

    def dot(one: list[tuple[Tensor, Tensor] | None], other: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        found_C = torch.zeros(count)
        for axis, a, b in zip(writes, one, other, strict=True):
            if a is not None and b is not None:
                found_C += sums_by_class(a[1] * b[1], axis, prunable.channels.axes[axis], count)
        return found_C

    for found in by_task(model, bench, batches, writes):
        length_TC = torch.stack([dot(found[t], found[t]).clamp_min(0).sqrt() for t in tasks])
        reached_C |= (length_TC > 0).any(0)
        for one, other in combinations(tasks, 2):
            product_C = length_TC[one] * length_TC[other]
            both_C = product_C > 0
            cosine_C = dot(found[one], found[other]) / product_C.where(both_C, 1.0)
            total_C += torch.where(both_C, cosine_C.clamp(-1, 1), 0.0)
            pairs_C += both_C
    mean_C = torch.where(pairs_C > 0, total_C / pairs_C.clamp_min(1), 1.0)
    return torch.where(reached_C, (1 + mean_C) / 2, 0.0).expand(len(model.tasks), -1).clone()
