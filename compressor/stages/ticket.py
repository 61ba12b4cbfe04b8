"""Lottery tickets: iterative magnitude pruning with rewinding."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.bench import Bench, reestimate_batchnorm
from compressor.model import MultiTaskModel, get_tensor
from compressor.training import Training, train
from profiles.settings import Settings


class Ticket(Settings):
    """In each round drop the smallest surviving weights, rewind the survivors, and train them with the mask held.

    Attributes:
        keep_ratio: fraction of the weights of convolutions and linear layers left in the end; each round keeps the
            same share of the survivors. Biases and normalisation layers are never pruned.
        scope: one threshold for the whole network, or the same share in every layer.
        rewind_step: 0 rewinds the survivors to the weights the stage was given (with the learning rate's schedule);
            k > 0 first trains the dense network and rewinds to its weights after k of those steps.
        train: what happens in each round (and first, for rewind_step > 0).
        slack: budgets are multiplied by this while rounds are judged.
        calibrate_batches: batch norm is re-estimated on so many before a round is judged, where it trains no step.

    Source: Frankle & Carbin, ICLR 2019; rewinding: Frankle et al., ICML 2020; Renda et al., ICLR 2020.
    """

    kind: Literal["ticket"]
    keep_ratio: float = Field(gt=0, lt=1)
    rounds: int = Field(ge=1, default=4)
    scope: Literal["global", "layer"] = "global"
    rewind_step: int = Field(ge=0, default=0)
    train: Training
    slack: float = Field(ge=1, default=1.0)
    calibrate_batches: int = Field(ge=1, default=8)

    @model_validator(mode="after")
    def _rewinds_to_a_step_there_is(self) -> "Ticket":
        if self.rewind_step > self.train.steps:
            raise ValueError(f"'rewind_step' is {self.rewind_step}, but 'train' has {self.train.steps} steps")
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
        share = self.keep_ratio ** (1 / self.rounds)
        for turn in range(1, self.rounds + 1):
            masks = smallest_out(trained, prunable_weights(trained.module), share, self.scope)
            candidate = rewind(trained, rewound, masks)
            if self.train.steps:
                train(candidate, bench, self.train, f"ticket {turn}/{self.rounds}", bench.seed + turn)
            else:
                reestimate_batchnorm(candidate.module, bench.calibration(self.calibrate_batches))
            scores = bench.scores(candidate)
            density = sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))
            told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
            bench.progress.line(f"  ticket {turn}/{self.rounds}: {density:.1%} of the weights left; {told}")
            if over := bench.over(scores, self.slack):
                bench.fall_short(f"ticket stopped before round {turn} of {self.rounds} ({density:.1%} left): {over}.")
                return good
            contiguous = {name: mask.contiguous() for name, mask in masks.items()}
            save_file(contiguous, bench.directory / f"masks-round-{turn:02d}.safetensors")
            good = trained = candidate
        return good


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


def smallest_out(
    model: MultiTaskModel, names: list[str], keep_ratio: float, scope: Literal["global", "layer"]
) -> dict[str, Tensor]:
    """Masks that keep exactly `round(keep_ratio * survivors)` of the surviving weights, largest magnitude first.

    Survivors are those a mask kept so far, whatever their value; among equal magnitudes the earlier position is kept,
    so the count is exact.
    """
    size = {name: get_tensor(model.module, name).detach().abs() for name in names}
    alive = {name: model.masks.get(name, torch.ones_like(size[name], dtype=torch.bool)) for name in names}
    masks = {}
    for pool in [names] if scope == "global" else [[name] for name in names]:
        magnitude = torch.cat([torch.where(alive[name], size[name], -1.0).flatten() for name in pool])
        keep = round(keep_ratio * sum(int(alive[name].sum()) for name in pool))
        flat = torch.zeros_like(magnitude, dtype=torch.bool)
        flat[magnitude.argsort(descending=True, stable=True)[:keep]] = True
        for name, part in zip(pool, torch.split(flat, [size[name].numel() for name in pool]), strict=True):
            masks[name] = part.reshape(size[name].shape)
    return masks
