"""Lottery tickets: iterative magnitude pruning with rewinding."""

from math import ceil
from typing import Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.bench import Bench, reestimate_batchnorm
from compressor.channels import Axis
from compressor.criteria.gradients import by_task
from compressor.masks import Pattern, Scope, keep_most, keep_n_of_m, unanimous
from compressor.model import MultiTaskModel, get_tensor
from compressor.training import Training, train
from profiles.settings import Settings

SHARE_A_ROUND = 0.8  # of the survivors, where the budgets alone decide how many rounds there are


class Ticket(Settings):
    """In each round drop the smallest surviving weights, rewind the survivors, and train them with the mask held.

    Attributes:
        keep_ratio: fraction of the weights of convolutions and linear layers left in the end; each round keeps the
            same share of the survivors. Biases and normalisation layers are never pruned. Without one each round keeps
            80 % of the survivors, as far as the budgets allow.
        scope: one threshold for the whole network, or the same share in every layer.
        saliency: "magnitude" of the weight; or "tasks": a weight goes when every task ranks it low by its own gradient
            (DiSparse), measured on `calibrate_batches`.
        pattern: "free"; blocks of outputs that are kept or pruned together, such as "4x1", which the CPU's kernels run
            1.4 times as fast as scattered weights; or N of each M inputs, such as "2:4", which sets the ratio itself.
        rewind_step: 0 rewinds the survivors to the weights the stage was given (with the learning rate's schedule);
            k > 0 first trains the dense network and rewinds to its weights after k of those steps.
        train: what happens in each round (and first, for rewind_step > 0).
        slack: budgets are multiplied by this while rounds are judged.
        calibrate_batches: batch norm is re-estimated on so many before a round is judged, where it trains no step.

    Source: Frankle & Carbin, ICLR 2019; rewinding: Frankle et al., ICML 2020; Renda et al., ICLR 2020.
    """

    kind: Literal["ticket"]
    keep_ratio: float | None = Field(gt=0, lt=1, default=None)
    rounds: int = Field(ge=1, default=4)
    scope: Scope = "global"
    saliency: Literal["magnitude", "tasks"] = "magnitude"
    pattern: str = "free"
    rewind_step: int = Field(ge=0, default=0)
    train: Training
    slack: float = Field(ge=1, default=1.0)
    calibrate_batches: int = Field(ge=1, default=8)

    @model_validator(mode="after")
    def _rewinds_to_a_step_there_is(self) -> "Ticket":
        if self.rewind_step > self.train.steps:
            raise ValueError(f"'rewind_step' is {self.rewind_step}, but 'train' has {self.train.steps} steps")
        if Pattern.parse(self.pattern).of and self.keep_ratio is not None:
            raise ValueError(f"pattern '{self.pattern}' says how many weights stay; leave 'keep_ratio' out")
        return self

    @property
    def train_steps(self) -> int:
        return self.train.steps * (self.rounds + (1 if self.rewind_step else 0))

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The sparsest round in which every task is inside its (slackened) budget; masks nest from round to round."""
        trained = model.clone()
        rewound = {name: value.detach().clone() for name, value in trained.module.state_dict().items()}
        if self.rewind_step:
            saved = train(trained, bench, self.train, "ticket, dense", bench.seed, snapshot=self.rewind_step)
            assert saved is not None  # rewind_step is one of the steps
            rewound = saved
        good = model
        names = prunable_weights(model.module)
        pattern = Pattern.parse(self.pattern)
        if odd := [name for name in names if not pattern.fits(get_tensor(model.module, name))]:
            how = "left whole" if pattern.of else "pruned weight by weight"
            bench.note(f"{how}, because their size does not fit '{self.pattern}': {', '.join(odd)}.")
        for turn in range(1, self.rounds + 1):
            masks = self._masks(trained, names, pattern, bench, turn)
            candidate = rewind(trained, rewound, masks)
            if self.train.steps:
                train(candidate, bench, self.train, f"ticket {turn}/{self.rounds}", bench.seed + turn)
            else:
                reestimate_batchnorm(candidate.module, bench.calibration(self.calibrate_batches), bench.device)
            scores = bench.scores(candidate)
            density = sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))
            told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
            bench.progress.line(f"  ticket {turn}/{self.rounds}: {density:.1%} of the weights left; {told}")
            if over := bench.over(scores, self.slack):
                tell = bench.note if self.keep_ratio is None and not pattern.of else bench.fall_short
                tell(f"ticket stopped before round {turn} of {self.rounds} ({density:.1%} left): {over}.")
                return good
            contiguous = {name: mask.contiguous() for name, mask in masks.items()}
            save_file(contiguous, bench.directory / f"masks-round-{turn:02d}.safetensors")
            good = trained = candidate
        return good

    def _masks(
        self, model: MultiTaskModel, names: list[str], pattern: Pattern, bench: Bench, turn: int
    ) -> dict[str, Tensor]:
        score = (
            magnitude(model, names) if self.saliency == "magnitude"
            else by_tasks(model, names, bench, self.calibrate_batches)
        )
        living = alive(model, names)
        if pattern.of:
            left = pattern.of - ceil((pattern.of - pattern.n) * turn / self.rounds)
            return keep_n_of_m(score, living, left, pattern.of)
        share = SHARE_A_ROUND if self.keep_ratio is None else self.keep_ratio ** (1 / self.rounds)
        return keep_most(score, living, share, self.scope, pattern.block)


def rewind(model: MultiTaskModel, state: dict[str, Tensor], masks: dict[str, Tensor]) -> MultiTaskModel:
    """A copy with the weights of `state` where the masks keep them, and zero where they do not."""
    copy = model.clone()
    copy.module.load_state_dict(state)
    copy.masks = masks
    with torch.no_grad():
        for name, mask in masks.items():
            get_tensor(copy.module, name).masked_fill_(~mask, 0.0)
    return copy


def prunable_weights(module: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers, each tensor once."""
    layers = {
        f"{name}.weight".lstrip(".")
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    }
    return [name for name, _ in module.named_parameters() if name in layers]


def alive(model: MultiTaskModel, names: list[str]) -> dict[str, Tensor]:
    """What a mask kept so far, whatever its value; all of a weight that has no mask."""
    weights = {name: get_tensor(model.module, name) for name in names}
    return {name: model.masks.get(name, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}


def magnitude(model: MultiTaskModel, names: list[str]) -> dict[str, Tensor]:
    """Absolute weights."""
    return {name: get_tensor(model.module, name).detach().abs() for name in names}


def by_tasks(model: MultiTaskModel, names: list[str], bench: Bench, batches: int) -> dict[str, Tensor]:
    """What every task alone would keep: |gradient of its loss| * weight^2 over calibration batches, ranks unanimous.

    Source: Sun et al., "DiSparse", CVPR 2022, its saliency for trained networks.
    """
    total = [{name: torch.zeros_like(get_tensor(model.module, name)) for name in names} for _ in model.tasks]
    for found in by_task(model, bench, batches, [Axis(name, 0) for name in names]):
        for task, parts in zip(total, found, strict=True):
            for name, part in zip(names, parts, strict=True):
                if part is not None:
                    weight, gradient = part
                    task[name] += gradient.abs() * weight.square()
    return unanimous(total)
