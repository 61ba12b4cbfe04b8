"""What each task's loss says about weights, batch by batch: the common part of the criteria that look at data."""

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.channels import Axis
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.model import MultiTaskModel
from compressor.workload import Batch


def by_task(
    model: MultiTaskModel, bench: Bench, batches: int, axes: list[Axis]
) -> Iterator[list[list[tuple[Tensor, Tensor] | None]]]:
    """For each batch of the calibrate split, for each task, (weight, gradient of its loss) for each axis's tensor.

    None where the loss does not depend on the tensor. A task without a label in a batch is represented by a random
    projection of its answer. The model is left alone, and frozen weights count as well.

    Raises:
        CompressError: a task's loss has no gradient or is not finite.
    """
    probe = model.clone()
    probe.module.eval()
    weights = [tensor_of(probe.module, axis.tensor).requires_grad_() for axis in axes]
    generator = torch.Generator().manual_seed(bench.seed)
    for batch in bench.calibration(batches):
        losses = _losses(probe, bench, batch, generator)
        found: list[list[tuple[Tensor, Tensor] | None]] = []
        for task in model.tasks:
            if not losses[task.name].requires_grad or not losses[task.name].isfinite():
                raise CompressError(
                    f"Task '{task.name}': its loss has no gradient or is not finite on the calibrate split, "
                    "so no criterion that looks at data can score channels for it. Answer with logits, or use "
                    "criterion = 'magnitude'."
                )
            try:
                gradients = torch.autograd.grad(losses[task.name], weights, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise CompressError(
                    "The network uses torch.utils.checkpoint with use_reentrant=True, through which gradients of "
                    "single weights cannot be taken: let it use use_reentrant=False, or choose criterion = 'magnitude'."
                ) from error
            found.append(
                [None if g is None else (w.detach(), g) for w, g in zip(weights, gradients, strict=True)]
            )
        yield found


def sums_by_class(value: Tensor, axis: Axis, classes: Tensor, class_count: int) -> Tensor:
    """(class,) sums of a tensor over all its axes but one, by that axis's classes."""
    others = [dim for dim in range(value.dim()) if dim != axis.dim]
    return torch.zeros(class_count).index_add_(0, classes, (value.sum(others) if others else value).float())


def _losses(model: MultiTaskModel, bench: Bench, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    answers = model.answers(*batch.inputs)
    losses = dict(bench.workload.losses(answers, batch)) if batch.labels else {}
    for name, answer in answers.items():
        if name not in losses:
            signs = torch.randint(0, 2, answer.shape, generator=generator) * 2 - 1
            losses[name] = (signs * answer).sum() / answer.numel() ** 0.5
    return losses
