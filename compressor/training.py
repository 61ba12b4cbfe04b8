"""The one training loop: labels where a batch has them, distillation from the original where it has none."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.bench import Bench
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.workload import Batch
from profiles.settings import Settings


class Training(Settings):
    """How long and how a model is trained.

    Attributes:
        steps: optimiser steps (one batch each).
        learning_rate: peak of a linear warm-up over the first `warmup` share followed by a cosine to zero.
        distill: "missing" distils a task from the original only where a batch has no label for it, "always" mixes
            distillation in with `distill_weight` everywhere, "never" leaves unlabelled tasks alone.
        loss_weights: factor of each task's loss; 1 where none is given.
        precision: "bf16" runs the forward pass under autocast (fast on CPUs with AMX or AVX512-BF16).
    """

    steps: int = Field(ge=0)
    learning_rate: float = Field(gt=0, default=1e-3)
    weight_decay: float = Field(ge=0, default=0.0)
    warmup: float = Field(ge=0, lt=1, default=0.05)
    distill: Literal["missing", "always", "never"] = "missing"
    distill_weight: float = Field(ge=0, default=1.0)
    loss_weights: Mapping[str, float] = {}
    precision: Literal["fp32", "bf16"] = "fp32"


def train(
    model: MultiTaskModel, bench: Bench, how: Training, title: str, seed: int, snapshot: int | None = None
) -> dict[str, Tensor] | None:
    """Train in place, masks held; returns the state after `snapshot` steps when asked for.

    Raises:
        CompressError: the loss is not finite, or a loss is given for no known task.
    """
    if unknown := set(how.loss_weights) - {task.name for task in model.tasks}:
        raise CompressError(f"loss_weights names no task: {', '.join(sorted(unknown))}.")
    torch.manual_seed(seed)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=how.learning_rate,
    )
    ramp = max(1, round(how.warmup * how.steps))
    held = [
        (parameter, model.masks[name]) for name, parameter in model.module.named_parameters() if name in model.masks
    ]
    saved = _snapshot(model) if snapshot == 0 else None
    for step, batch in enumerate(bench.progress.track(_batches(bench, how.steps, seed), title, how.steps)):
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * _schedule(step, ramp, how.steps)
        model.module.train()
        loss = _loss(model, bench, how, batch)
        if not loss.isfinite():
            raise CompressError(f"{title}: the loss became {float(loss)} at step {step}; lower learning_rate.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        with torch.no_grad():
            for parameter, mask in held:
                parameter.mul_(mask)
        if snapshot == step + 1:
            saved = _snapshot(model)
    model.module.eval()
    return saved


def _schedule(step: int, ramp: int, steps: int) -> float:
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - ramp) / max(1, steps - ramp)))))


def _batches(bench: Bench, steps: int, seed: int) -> Iterator[Batch]:
    left, epoch = steps, 0
    while left:
        empty = True
        for batch in bench.workload.batches("train", seed + epoch):
            empty = False
            yield batch
            left -= 1
            if not left:
                return
        if empty:
            raise CompressError("The workload has no batch in its train split, so nothing can be trained on it.")
        epoch += 1


def _loss(model: MultiTaskModel, bench: Bench, how: Training, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.precision == "bf16"):
        answers = model.answers(*batch.inputs)
    answers = {name: answer.float() for name, answer in answers.items()}
    losses = dict(bench.workload.losses(answers, batch)) if batch.labels else {}
    missing = {name for name in answers if name not in losses}
    distilled = {"missing": missing, "always": set(answers), "never": set()}[how.distill]
    total = torch.zeros(())
    for name, loss in losses.items():
        total = total + how.loss_weights.get(name, 1.0) * loss
    if distilled:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.precision == "bf16"):
            taught = bench.original.answers(*batch.inputs)
        for name in sorted(distilled):
            target = taught[name].float()
            gap = (answers[name] - target).square().mean() / target.var().clamp_min(1e-6)
            total = total + how.distill_weight * how.loss_weights.get(name, 1.0) * gap
    if not total.requires_grad:
        raise CompressError("A training batch has no label for any task and distill = 'never': nothing to learn from.")
    return total


def _snapshot(model: MultiTaskModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}
