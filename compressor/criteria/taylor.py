"""First-order Taylor importance, one row for each task."""

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel, get_tensor
from compressor.workload import Batch


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: the mean over batches of the absolute change of each task's loss, to first order,
    if the channel read zero everywhere.

    The change is the sum of gradient * weight over all weights that read the channel, which is the derivative with
    respect to a gate on it whatever operator wrote it; before a batch norm the writer's own sum would always be zero.
    A task without a label in a batch is scored by a random projection of its answer.

    Raises:
        CompressError: a task's loss has no gradient or is not finite.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8, one row per task;
    absolute rather than squared, as values are added up and set against costs here.
    """
    probe = model.clone()
    probe.module.eval()
    reads = [(axis, prunable.channels.axes[axis], get_tensor(probe.module, axis.tensor)) for axis in prunable.reads()]
    weights = [weight.requires_grad_() for _, _, weight in reads]  # frozen ones too
    total_TC = torch.zeros(len(model.tasks), prunable.class_count)
    generator = torch.Generator().manual_seed(bench.seed)
    seen = bench.calibration(batches)
    for batch in seen:
        losses = _losses(probe, bench, batch, generator)
        for row, task in enumerate(model.tasks):
            if not losses[task.name].requires_grad or not losses[task.name].isfinite():
                raise CompressError(
                    f"Task '{task.name}': its loss has no gradient or is not finite on the calibrate split, "
                    "so 'taylor' cannot score channels for it. Answer with logits, or use criterion = 'magnitude'."
                )
            gradients = torch.autograd.grad(losses[task.name], weights, retain_graph=True, allow_unused=True)
            change_C = torch.zeros(prunable.class_count)
            for (axis, classes, weight), gradient in zip(reads, gradients, strict=True):
                if gradient is not None:
                    others = [dim for dim in range(weight.dim()) if dim != axis.dim]
                    change_C.index_add_(0, classes, (gradient * weight.detach()).sum(others))
            total_TC[row] += change_C.abs()
    return total_TC / len(seen)


def _losses(model: MultiTaskModel, bench: Bench, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    answers = model.answers(*batch.inputs)
    losses = dict(bench.workload.losses(answers, batch)) if batch.labels else {}
    for name, answer in answers.items():
        if name not in losses:
            signs = torch.randint(0, 2, answer.shape, generator=generator) * 2 - 1
            losses[name] = (signs * answer).sum() / answer.numel() ** 0.5
    return losses
