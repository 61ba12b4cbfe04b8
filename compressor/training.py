"""The one training loop: labels where a batch has them, distillation from the original where it has none."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor import compute
from compressor.averaging import SETTLING_STEPS, Average, Settling
from compressor.bench import Bench, reestimate_batchnorm, statistics
from compressor.checkpoint import Checkpoint
from compressor.errors import CompressError
from compressor.features import Features
from compressor.model import MultiTaskModel
from compressor.watching import Watch
from compressor.weighting import Rule, Weighting
from compressor.workload import Batch
from profiles.settings import Settings, did_you_mean

LARGEST_GRADIENT = 5.0
SHORTEST_WINDOW = 10
WIDEST_VECTOR = 16  # floats
SEEDS_APART = 1_000_003  # each step of each process draws its chance from a seed of its own
EPOCHS_APART, SEEDS = 1_009, 2**31  # each epoch of each training has an order of its own


class Training(Settings):
    """How long and how a model is trained.

    Attributes:
        steps: optimiser steps (one batch each, in every process).
        learning_rate: peak of a linear warm-up over the first `warmup` share followed by a cosine to zero.
        distill: "missing" distils a task from the original only where a batch has no label for it, "always" mixes
            distillation in with `distill_weight` everywhere, "only" looks at no label (for labels that are worse than
            the original's answers), "never" leaves unlabelled tasks alone.
        features: factor of what layers hand on otherwise than the original's do, at the channels they kept
            (`compressor/features.py`); 0 compares answers alone. Of most use in short trainings after much pruning.
        loss_weights: factor of each task's loss; 1 where none is given.
        weighting: what else a task's loss is weighed by: nothing ("fixed"), a learnt uncertainty, its progress over the
            last windows of a twentieth of the steps, or what its budget has left ("margins", at every check;
            `compressor/weighting.py`).
        precision: "bf16" runs the forward pass under autocast; "auto" does so where the device multiplies bfloat16
            (a GPU, AMX or AVX512-BF16), so its weights differ between machines. Scores are always taken in fp32, and a
            quantized network is always trained in it, as bfloat16 cannot tell its steps apart.
        ema: decay of a moving average of the weights, which are what is handed back; 0 hands back the last weights.
        check_every: steps between checks, each of which scores the validate split; 0 never does. With checks the state
            is handed back whose worst task had the largest share of its budget left.
        stop_at_margin: stop at a check where every task has this share of its budget left.
        patience: stop after so many checks without a better worst task; 0 never does. The learning rate follows the
            schedule of all the steps, so a training that stops has not come to its slow end.
        checkpoint_every: steps between checkpoints; 0 writes one every 30 seconds.
    """

    steps: int = Field(ge=0)
    learning_rate: float = Field(gt=0, default=1e-3)
    weight_decay: float = Field(ge=0, default=0.0)
    warmup: float = Field(ge=0, lt=1, default=0.05)
    distill: Literal["missing", "always", "only", "never"] = "missing"
    distill_weight: float = Field(ge=0, default=1.0)
    features: float = Field(ge=0, default=0.0)
    loss_weights: Mapping[str, float] = {}
    weighting: Rule = "fixed"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    ema: float = Field(ge=0, lt=1, default=0.0)
    check_every: int = Field(ge=0, default=0)
    stop_at_margin: float | None = None
    patience: int = Field(ge=0, default=0)
    checkpoint_every: int = Field(ge=0, default=0)

    @model_validator(mode="after")
    def _checks_where_it_goes_by_them(self) -> Self:
        by_checks = (self.stop_at_margin is not None, self.patience > 0, self.weighting == "margins")
        named = ("stop_at_margin", "patience", "weighting = 'margins'")
        if not self.check_every and any(by_checks):
            raise ValueError(f"'{named[by_checks.index(True)]}' goes by checks; give 'check_every'")
        return self

    def check(self, model: MultiTaskModel, bench: Bench) -> None:
        """Refuse, before any work, a loss weight that is for no known task and checks that have no budgets to go by."""
        names = [task.name for task in model.tasks]
        if unknown := sorted(set(self.loss_weights) - set(names)):
            raise CompressError(f"loss_weights: no task '{unknown[0]}'.{did_you_mean(unknown[0], names)}")
        if self.check_every and not bench.budgets:
            raise CompressError("check_every goes by what is left of budgets, and the recipe has none; give [budgets].")

    def halves(self, device: torch.device) -> bool:
        """Whether the forward pass runs in bfloat16 there."""
        if self.precision != "auto":
            return self.precision == "bf16"
        return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def train(
    model: MultiTaskModel, bench: Bench, how: Training, title: str, seed: int, snapshot: int | None = None
) -> dict[str, Tensor] | None:
    """Train in place, on the bench's device, masks held; returns the state after `snapshot` steps when asked for.

    Batch norm's running statistics are averages over the last steps before the state that is handed back, or over as
    many batches of the train split where that is an average of weights; a quantized model's stay as they are, since
    they are part of its weights. A training that was killed goes on at its last checkpoint, where the bench has a place
    for them, and ends as if nothing had happened.

    Raises:
        CompressError: the loss is not finite, a batch offers nothing to learn, a loss weight is for no known task, or
            checks have no budgets to go by.
    """
    how.check(model, bench)
    about = how.model_dump(), seed, snapshot, bench.device.type, compute.count()
    checkpoint = Checkpoint(bench.checkpoints, model, how.checkpoint_every, title, *about)
    both = model.module, bench.original.module
    with compute.at(bench.device, *both):
        last = _takes_channels_last(model, bench, seed)
        with _laid_out(torch.channels_last if last else torch.contiguous_format, *both):
            saved = _train(model, bench, how, title, seed, snapshot, checkpoint)
        model.module.eval()
    return saved


def _train(
    model: MultiTaskModel, bench: Bench, how: Training, title: str, seed: int, snapshot: int | None,
    checkpoint: Checkpoint,
) -> dict[str, Tensor] | None:
    module, names = model.module, [task.name for task in model.tasks]
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    window = max(SHORTEST_WINDOW, how.steps // 20)
    weighting = Weighting(how.weighting, names, how.loss_weights, window, bench.device)
    learnt = [*plain, *weighting.parameters]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": learnt, "weight_decay": 0.0}],
        lr=how.learning_rate,
        fused=True,
    )
    held = [(p, model.masks[name].to(p.device)) for name, p in module.named_parameters() if name in model.masks]
    average, settling = Average(module, how.ema), Settling(module, how.steps, how.check_every)
    watch = Watch(model, bench, how.steps, how.check_every, how.stop_at_margin, how.patience)
    features = Features(model, bench.original) if how.features else None
    saved = _snapshot(model) if snapshot is not None else {}
    others = {f"snapshot.{name}": value for name, value in saved.items()}
    others |= {**weighting.state(), **average.state(), **watch.state()}
    done = checkpoint.restore(model, optimiser, others)
    compute.check_alike(f"where '{title}' starts", [*module.state_dict().values(), torch.tensor(done)])
    batches = islice(_batches(bench, how.steps, seed), 0 if watch.over else done, 0 if watch.over else None)
    for step, batch in enumerate(bench.progress.track(batches, title, how.steps - done), done):
        torch.manual_seed(seed * SEEDS_APART + step * compute.count() + compute.rank())
        settling.before(step)
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * _schedule(step, how)
        module.train()
        try:
            loss = weighting.total(_losses(model, bench, how, batch.to(bench.device), features))
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            raise CompressError(f"{title}: batch norm cannot be trained on so small a batch: {error}") from error
        if features is not None:
            loss = loss + how.features * features.gap(_gap)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:  # of an embedding built so
                parameter.grad = parameter.grad.to_dense()
        compute.average([*parameters, *weighting.parameters], [loss, *statistics(module), *weighting.tallies])
        if not loss.isfinite():
            raise CompressError(f"{title}: the loss became {loss.item()} at step {step}; lower learning_rate.")
        for parameter, mask in held:  # before clipping, so that dead weights do not shrink the steps of the others
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimiser.step()
        with torch.no_grad():
            for parameter, mask in held:
                parameter.mul_(mask)
        average.add(step)
        weighting.turn(step)
        if snapshot == step + 1:
            for name, value in module.state_dict().items():
                saved[name].copy_(value)
        last = step + 1 == how.steps
        if watch.due(step + 1):
            candidate = model.clone()
            _finish(candidate, average, bench)
            weighting.follow(watch.look(candidate, step + 1, may_stop=step + 1 >= (snapshot or 0)))
        checkpoint.keep(step + 1, model, optimiser, others, last=last or watch.over)
        if watch.over:
            break
    settling.end()
    if how.check_every:
        watch.end(model, title)
    elif how.steps:
        _finish(model, average, bench)
    return saved or None


def _finish(model: MultiTaskModel, average: Average, bench: Bench) -> None:
    """Make of a model in training what would be handed back: average weights, and batch norm to go with them.

    Batches of "train", since weights are used to how those are altered, and "calibrate" may be a few like pictures.
    """
    if average.write(model.module) and model.quantization is None:
        batches = list(islice(bench.workload.batches("train", bench.seed), SETTLING_STEPS))
        reestimate_batchnorm(model.module, batches, bench.device)


@contextmanager
def _laid_out(memory_format: torch.memory_format, *modules: nn.Module) -> Iterator[None]:
    """Modules laid out so, and contiguous afterwards; a teacher as its pupil, since what they answer is compared."""
    for module in modules:
        _lay_out(module, memory_format)
    try:
        yield
    finally:
        for module in modules:
            _lay_out(module, torch.contiguous_format)


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out images and their weights; convolutions train faster with the channels last (not for volumes)."""
    if all(tensor.dim() <= 4 for tensor in (*module.parameters(), *module.buffers())):
        module.to(memory_format=memory_format)  # type: ignore[call-overload]


def _takes_channels_last(model: MultiTaskModel, bench: Bench, seed: int) -> bool:
    """Whether the network and its losses compute on images laid out so: code may view them as if they were not.

    On a processor some gradients may not be computed so (`_NarrowPoints`).
    """
    batch = next(iter(bench.workload.batches("train", seed)), None)
    if batch is None:
        return False
    tried, batch = model.clone(), batch.to(bench.device)
    tried.module.eval()
    _lay_out(tried.module, torch.channels_last)
    narrow = _NarrowPoints()
    try:
        with torch.no_grad(), narrow:
            answers = tried.answers(*batch.inputs)
            if batch.labels:
                bench.workload.losses(answers, batch)
    except RuntimeError:
        return False
    return bench.device.type != "cpu" or not narrow.seen


class _NarrowPoints(TorchFunctionMode):
    """Looks for strided convolutions of single pixels that read fewer channels than a vector holds.

    oneDNN (3.12, which torch 2.13 brings) writes past its workspace when it computes the gradient of their weights with
    the channels last (https://github.com/uxlfoundation/oneDNN/issues/6035), and pruning makes such layers.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias", "stride"), args, strict=False)) | (kwargs or {})
        if func is torch.conv2d:
            stride, weight = given.get("stride", 1), given["weight"]
            strided = max(stride if isinstance(stride, tuple | list) else (stride,)) > 1
            self.seen |= strided and weight.shape[1] < WIDEST_VECTOR and tuple(weight.shape[2:]) == (1, 1)
        return func(*args, **(kwargs or {}))


def _schedule(step: int, how: Training) -> float:
    ramp = max(1, round(how.warmup * how.steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, how.steps - ramp)))


def _batches(bench: Bench, steps: int, seed: int) -> Iterator[Batch]:
    """This process's batches: every so-manieth, as many as there are processes, over epochs of which each has a seed.

    Trainings of different seeds share no epoch, so that results of several seeds are independent.
    """
    count, epoch = 0, 0
    while count < steps * compute.count():
        empty = True
        for batch in bench.workload.batches("train", (seed * EPOCHS_APART + epoch) % SEEDS):
            empty = False
            if count % compute.count() == compute.rank():
                yield batch
            count += 1
            if count == steps * compute.count():
                return
        if empty:
            raise CompressError("The workload has no batch in its train split, so nothing can be trained on it.")
        epoch += 1


def _losses(
    model: MultiTaskModel, bench: Bench, how: Training, batch: Batch, features: Features | None
) -> dict[str, Tensor]:
    """Each task's loss where the batch has one: of its label, of distillation, or of both."""
    halves = how.halves(bench.device) and model.quantization is None
    autocast = partial(torch.autocast, bench.device.type, dtype=torch.bfloat16, enabled=halves)
    watching = features or nullcontext()
    with watching, autocast():
        raw = model.answers(*batch.inputs)
    answers = {name: answer.float() if answer.is_floating_point() else answer for name, answer in raw.items()}
    losses = dict(bench.workload.losses(answers, batch)) if batch.labels and how.distill != "only" else {}
    teachable = {name for name, answer in answers.items() if answer.requires_grad}
    distilled = set() if how.distill == "never" else teachable if how.distill != "missing" else teachable - set(losses)
    if distilled or features is not None:
        with watching, torch.no_grad(), autocast():
            taught = bench.original.answers(*batch.inputs)
        for name in (name for name in answers if name in distilled):
            gap = how.distill_weight * _gap(answers[name], taught[name].float())
            losses[name] = losses[name] + gap if name in losses else gap
    if features is None and not any(loss.requires_grad for loss in losses.values()):
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
    return {name: value.detach().to("cpu", copy=True) for name, value in model.module.state_dict().items()}
