"""The one training loop: labels where a batch has them, distillation from the original where it has none."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.bench import Bench, running_norms
from compressor.checkpoint import Checkpoint
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.weighting import Rule, Weighting
from compressor.workload import Batch
from profiles.settings import Settings, did_you_mean

LARGEST_GRADIENT = 5.0
SHORTEST_WINDOW = 10
SETTLING_SHARE, SETTLING_STEPS = 0.1, 20
"""The last steps of a training (this share of them, and no fewer than this number), in which weights hardly move any
more: batch norm's running statistics become the plain average over them. The usual exponential average sees about
twenty batches, too few for layers whose pictures are only a few pixels large, and scores then depend on which batches
came last (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3)."""


class Training(Settings):
    """How long and how a model is trained.

    Attributes:
        steps: optimiser steps (one batch each).
        learning_rate: peak of a linear warm-up over the first `warmup` share followed by a cosine to zero.
        distill: "missing" distils a task from the original only where a batch has no label for it, "always" mixes
            distillation in with `distill_weight` everywhere, "only" looks at no label (for labels that are worse than
            the original's answers), "never" leaves unlabelled tasks alone.
        loss_weights: factor of each task's loss; 1 where none is given.
        weighting: what else a task's loss is weighed by: nothing ("fixed"), a learnt uncertainty, or its progress over
            the last windows of a twentieth of the steps (`compressor/weighting.py`).
        precision: "bf16" runs the forward pass under autocast; "auto" does so where the processor multiplies bfloat16
            (AMX or AVX512-BF16), so its weights differ between machines. Scores are always taken in fp32.
    """

    steps: int = Field(ge=0)
    learning_rate: float = Field(gt=0, default=1e-3)
    weight_decay: float = Field(ge=0, default=0.0)
    warmup: float = Field(ge=0, lt=1, default=0.05)
    distill: Literal["missing", "always", "only", "never"] = "missing"
    distill_weight: float = Field(ge=0, default=1.0)
    loss_weights: Mapping[str, float] = {}
    weighting: Rule = "fixed"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"

    @property
    def halves(self) -> bool:
        """Whether the forward pass runs in bfloat16 here."""
        return self.precision == "bf16" or (self.precision == "auto" and torch.cpu._is_avx512_bf16_supported())


def train(
    model: MultiTaskModel, bench: Bench, how: Training, title: str, seed: int, snapshot: int | None = None
) -> dict[str, Tensor] | None:
    """Train in place, masks held; returns the state after `snapshot` steps when asked for.

    Batch norm's running statistics are averages over the last steps. A training that was killed goes on at its last
    checkpoint, where the bench has a place for them, and ends as if nothing had happened.

    Raises:
        CompressError: the loss is not finite, a batch offers nothing to learn, or a loss weight is for no known task.
    """
    names = [task.name for task in model.tasks]
    if unknown := sorted(set(how.loss_weights) - set(names)):
        raise CompressError(f"loss_weights: no task '{unknown[0]}'.{did_you_mean(unknown[0], names)}")
    checkpoint = Checkpoint(bench.checkpoints, model, title, how.model_dump(), seed, snapshot)
    torch.manual_seed(seed)
    _lay_out(model.module, torch.channels_last)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    weighting = Weighting(how.weighting, names, how.loss_weights, max(SHORTEST_WINDOW, how.steps // 20))
    learnt = [*plain, *weighting.parameters]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": learnt, "weight_decay": 0.0}],
        lr=how.learning_rate,
        fused=True,
    )
    held = [(p, model.masks[name]) for name, p in model.module.named_parameters() if name in model.masks]
    saved = _snapshot(model) if snapshot == 0 else None
    done, earlier = checkpoint.restore(model, optimiser, weighting.state())
    saved = earlier or saved
    norms = running_norms(model.module)
    momenta = [norm.momentum for norm in norms]
    settling = max(0, how.steps - max(SETTLING_STEPS, round(SETTLING_SHARE * how.steps)))
    batches = islice(_batches(bench, how.steps, seed), done, None)
    for step, batch in enumerate(bench.progress.track(batches, title, how.steps - done), done):
        if step >= settling:
            for norm in norms:
                norm.momentum = 1 / (step - settling + 1)
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * _schedule(step, how)
        model.module.train()
        loss = weighting.total(_losses(model, bench, how, batch), step)
        if not loss.isfinite():
            raise CompressError(f"{title}: the loss became {loss.item()} at step {step}; lower learning_rate.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, mask in held:  # before clipping, so that dead weights do not shrink the steps of the others
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimiser.step()
        with torch.no_grad():
            for parameter, mask in held:
                parameter.mul_(mask)
        if snapshot == step + 1:
            saved = _snapshot(model)
        checkpoint.keep(step + 1, model, optimiser, weighting.state(), saved, last=step + 1 == how.steps)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.module.eval()
    _lay_out(model.module, torch.contiguous_format)
    return saved


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out images and their weights; convolutions train faster with the channels last (not for volumes)."""
    if all(parameter.dim() <= 4 for parameter in module.parameters()):
        module.to(memory_format=memory_format)  # type: ignore[call-overload]


def _schedule(step: int, how: Training) -> float:
    ramp = max(1, round(how.warmup * how.steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, how.steps - ramp)))


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


def _losses(model: MultiTaskModel, bench: Bench, how: Training, batch: Batch) -> dict[str, Tensor]:
    """Each task's loss where the batch has one: of its label, of distillation, or of both."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.halves):
        raw = model.answers(*batch.inputs)
    answers = {name: answer.float() if answer.is_floating_point() else answer for name, answer in raw.items()}
    losses = dict(bench.workload.losses(answers, batch)) if batch.labels and how.distill != "only" else {}
    teachable = {name for name, answer in answers.items() if answer.requires_grad}
    distilled = set() if how.distill == "never" else teachable if how.distill != "missing" else teachable - set(losses)
    if distilled:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.halves):
            taught = bench.original.answers(*batch.inputs)
        for name in (name for name in answers if name in distilled):
            gap = how.distill_weight * _gap(answers[name], taught[name].float())
            losses[name] = losses[name] + gap if name in losses else gap
    if not any(loss.requires_grad for loss in losses.values()):
        raise CompressError(
            f"A training batch offers nothing to learn: labels for {', '.join(batch.labels) or 'no task'}, "
            f"distill = '{how.distill}'. Label it, or use distill = 'missing'."
        )
    return losses


def _gap(answer: Tensor, taught: Tensor) -> Tensor:
    """Squared error as a share of what the teacher's answers vary, or of their size where they hardly vary."""
    spread = torch.maximum(taught.var(correction=0), 0.01 * taught.square().mean())
    return (answer - taught).square().mean() / spread.clamp_min(1e-12)


def _snapshot(model: MultiTaskModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}
