"""First-order Taylor importance, one row for each task."""

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.channels import FIXED
from compressor.criteria.gradients import by_task, sums_by_class
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: the mean over batches of the absolute change of each task's loss, to first order,
    if the channel read zero everywhere.

    The change is the sum of gradient * weight over all weights that read the channel, which is the derivative with
    respect to a gate on it whatever operator wrote it; before a batch norm the writer's own sum would always be zero.
    A channel that no weight reads, because a product of activations sums over it or only a mean goes over it, is scored
    by those that write it.
    A task without a label in a batch is scored by a random projection of its answer.

    Raises:
        CompressError: a task's loss has no gradient or is not finite.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8, one row per task;
    absolute rather than squared, as values are added up and set against costs here.
    """
    count, axes = prunable.class_count, prunable.channels.axes
    reads = dict.fromkeys(prunable.reads(), torch.ones(count))
    unread_C = torch.ones(count, dtype=torch.bool)
    unread_C[torch.cat([axes[axis] for axis in reads] + [torch.tensor([FIXED])])] = False
    unread_C |= prunable.channels.summed()
    writes = dict.fromkeys((c.writes for c in prunable.channels.contractions), unread_C.float())
    gates = {**writes, **reads} if bool(unread_C.any()) else reads
    total_TC, seen = torch.zeros(len(model.tasks), count), 0
    for found in by_task(model, bench, batches, list(gates)):
        seen += 1
        for row, parts in enumerate(found):
            change_C = torch.zeros(count)
            for (axis, share_C), part in zip(gates.items(), parts, strict=True):
                if part is not None:
                    weight, gradient = part
                    change_C += share_C * sums_by_class(gradient * weight, axis, axes[axis], count)
            total_TC[row] += change_C.abs()
    return total_TC / seen
