"""Lottery tickets: iterative magnitude pruning with rewinding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field, StrictInt, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.bench import Bench, reestimate_batchnorm
from compressor.channels import Axis
from compressor.components import SHARED, components, left_by_component, names_of_components
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.masks import Pattern, Scope, Scores, count, keep_most, keep_n_of_m, pools_of
from compressor.model import MultiTaskModel, some
from compressor.reconstruction import reconstruct
from compressor.saliency import Also, alive, by_layer, by_tasks, magnitude, prunable
from compressor.tensors import plain
from compressor.thresholds import learnt
from compressor.training import Training, train
from profiles.settings import Settings, did_you_mean

Saliency = Literal["magnitude", "layers", "tasks", "learnt"]

SHARE_A_ROUND = 0.8  # of the survivors, where the budgets alone decide how many rounds there are


class Ticket(Settings):
    """In each round drop the smallest surviving weights, rewind the survivors, and train them with the mask held.

    Where a round leaves a budget, densities between it and the last that kept them all are tried.

    Attributes:
        keep_ratio: fraction of the weights of convolutions and linear layers left in the end; each round keeps the
            same share of the survivors. Without any goal each round keeps 80 % of the survivors, as far as the budgets
            allow.
        keep: such a fraction for components, each with a threshold of its own: "shared" (what several tasks read) or a
            task's name (what only this task reads). What is not named keeps `keep_ratio`, or all without one.
        schedule: in place of both, the fraction left after each round, falling.
        rounds: how many, where there is no schedule.
        retries: when a round leaves a budget: so many densities are tried, each half way (geometrically) between the
            last that kept them all and the first that did not.
        scope: one threshold for the whole network, or the same share in every layer.
        saliency: "layers": a weight's share of what would be left of its layer (LAMP), so that small layers are not the
            first to starve; its "magnitude"; "tasks": a weight goes when every task ranks it low by its own
            gradient (DiSparse), measured on `calibrate_batches`; or "learnt": a training before each round finds a
            threshold for each component (AdapMTL, `compressor/thresholds.py`).
        pattern: "free"; blocks of outputs that are kept or pruned together, such as "4x1", which the CPU's kernels run
            1.4 times as fast as scattered weights; tiles such as "8x16", 8 outputs and 16 inputs at one tap, which an
            accelerator leaves out where they are empty; or N of each M inputs, such as "2:4", which sets the ratio
            itself.
        prune_also: what is pruned beside the weights of convolutions and linear layers: their "bias", the "norm" layers
            (scales and shifts), and every "other" parameter (the module's own, embeddings, recurrent layers).
        reconstruct: before each training, give the survivors of every layer the values with which it answers most like
            before the round, by least squares on `calibrate_batches` (`compressor/reconstruction.py`).
        rewind: the state to which survivors, and all that is not pruned, return before each training: "none", they stay
            as the round before left them and only the learning rate starts anew; "trained", the one the stage was
            given; "init", what the workload builds under the recipe's seed; or k > 0: first the dense network is
            trained, and its state after k of those steps is taken.
        train: what happens in each round (and first, for a rewind to a step).
        slack: budgets are multiplied by this while rounds are judged.
        calibrate_batches: batches for reconstruction and for "tasks"; and for batch norm, before a round is judged that
            trains no step.

    Source: Frankle & Carbin, ICLR 2019; rewinding to a step: Frankle et al., ICML 2020; rewinding the learning rate
    alone: Renda et al., ICLR 2020.
    """

    measures: ClassVar[bool] = False
    kind: Literal["ticket"]
    keep_ratio: float | None = Field(gt=0, lt=1, default=None)
    keep: Mapping[str, float] = {}
    schedule: tuple[float, ...] = ()
    rounds: int = Field(ge=1, default=4)
    retries: int = Field(ge=0, default=2)
    scope: Scope = "global"
    saliency: Saliency = "layers"
    pattern: str = "free"
    prune_also: tuple[Also, ...] = ()
    reconstruct: bool = False
    rewind: str | StrictInt = "none"
    train: Training
    slack: float = Field(ge=1, default=1.0)
    calibrate_batches: int = Field(ge=1, default=8)

    @model_validator(mode="after")
    def _rewinds_to_a_state_there_is(self) -> "Ticket":
        if isinstance(self.rewind, str):
            if self.rewind not in ("none", "trained", "init"):
                raise ValueError(f"'rewind' is 'none', 'trained', 'init' or a number of steps, not '{self.rewind}'")
            if self.rewind == "init" and not self.train.steps:
                raise ValueError("'rewind' is 'init', which needs 'train' to have steps")
        elif not 1 <= self.rewind <= self.train.steps:
            raise ValueError(f"'rewind' is {self.rewind}, but 'train' has {self.train.steps} steps")
        if self.reconstruct and self.rewind != "none":
            raise ValueError("'reconstruct' fits the weights that stay, which 'rewind' would undo; leave one out")
        return self

    @model_validator(mode="after")
    def _has_one_goal(self) -> "Ticket":
        ratios = {"keep_ratio": self.keep_ratio is not None, "keep": bool(self.keep)}
        given = ", ".join(f"'{name}'" for name, there in ratios.items() if there)
        if Pattern.parse(self.pattern).of:
            if given or self.schedule:
                wrong = given or "'schedule'"
                raise ValueError(f"pattern '{self.pattern}' says how many weights stay; leave {wrong} out")
            if self.saliency == "learnt":
                raise ValueError(f"saliency 'learnt' finds how many weights stay where, which '{self.pattern}' fixes")
        if self.schedule:
            if not all(before > after for before, after in pairwise((1.0, *self.schedule, 0.0))):
                raise ValueError("'schedule' falls from round to round, between 1 and 0")
            if given:
                raise ValueError(f"'schedule' says how many weights stay; leave {given} out")
            if "rounds" in self.model_fields_set:
                raise ValueError("'schedule' has a ratio for each round; leave 'rounds' out")
        if odd := [name for name, ratio in self.keep.items() if not 0 < ratio <= 1]:
            raise ValueError(f"'keep.{odd[0]}' is a fraction above 0, up to 1")
        if self.saliency == "learnt" and (self.keep or self.scope == "layer" or not self.train.steps):
            raise ValueError(
                "saliency 'learnt' finds by training how many weights stay where: "
                "leave 'keep' and scope 'layer' out, and let 'train' have steps"
            )
        return self

    @property
    def turns(self) -> int:
        return len(self.schedule) or self.rounds

    @property
    def training(self) -> Training:
        return self.train

    @property
    def train_steps(self) -> int:
        each = 2 if self.saliency == "learnt" else 1
        return self.train.steps * (self.turns * each + (1 if isinstance(self.rewind, int) else 0))

    def check(self, model: MultiTaskModel, bench: Bench) -> None:
        """Refuse a training that the tasks and budgets do not allow, a network of which nothing can be pruned, and a
        name in `keep` that is no component's.
        """
        self.train.check(model, bench)
        names, _ = self._names(model)
        if self.keep:
            part = components(model, names, Pattern.parse(self.pattern).block)
            self._check(model, left_by_component(model, part))

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The sparsest found at which every task is inside its (slackened) budget; masks nest from round to round.

        Raises:
            CompressError: `keep` names what is no component of this network, or nothing can be pruned.
        """
        pattern, (names, turned) = Pattern.parse(self.pattern), self._names(model)
        if turned:
            bench.note(f"left whole, as '{self.pattern}' is for rows of outputs: {', '.join(turned)}.")
        if odd := [name for name in names if not pattern.fits(tensor_of(model.module, name))]:
            how = "left whole" if pattern.of else "pruned weight by weight"
            bench.note(f"{how}, because their size does not fit '{self.pattern}': {', '.join(odd)}.")
        part = components(model, names, pattern.block)
        self._check(model, left_by_component(model, part))
        course = self._course(model, part, pattern)
        good, (trained, rewound) = model, self._start(model, bench)
        done, failed, why, tries, turn, kept = 0.0, 0.0, "", self.retries, 0, 0
        while done < self.turns:
            aim = (done + failed) / 2 if failed else done + 1
            left = course.left(aim)
            if failed and (not tries or left in (course.left(done), course.left(failed))):
                tell = bench.fall_short if self._has_goal else bench.note
                tell(f"ticket stopped with {_density(good, names):.1%} of the weights left: {why}.")
                break
            turn, tries = turn + 1, tries - bool(failed)
            title = f"ticket, a smaller step ({tries} left)" if failed else f"ticket {round(aim)}/{self.turns}"
            seed = bench.seed + turn
            score = self._score(trained, part, sum(left), bench, f"{title}, thresholds", seed)
            masks = course.masks(score, alive(trained, names), left)
            candidate = rewind(trained, trained.module.state_dict() if rewound is None else rewound, masks)
            if self.reconstruct:
                whole = reconstruct(candidate, trained, bench.calibration(self.calibrate_batches), bench.device)
                if whole:
                    bench.note(f"not reconstructed: {some(whole)}.")
            if self.train.steps:
                train(candidate, bench, self.train, title, seed)
            else:
                reestimate_batchnorm(candidate.module, bench.calibration(self.calibrate_batches), bench.device)
            scores, density = bench.scores(candidate), _density(candidate, names)
            told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
            bench.progress.line(f"  {title}: {density:.1%} of the weights left; {told}")
            if over := bench.over(scores, self.slack):
                failed, why = aim, f"with {density:.1%} {over}"
                continue
            good, trained, done, kept = candidate, candidate, aim, kept + 1
            contiguous = {name: mask.contiguous() for name, mask in masks.items()}
            save_file(contiguous, bench.directory / f"masks-round-{kept:02d}.safetensors")
        shares = [f"{name} {now / before:.1%}" for name, (now, before) in left_by_component(good, part).items()]
        bench.note(f"weights left: {', '.join(shares)}.")
        return good

    def _names(self, model: MultiTaskModel) -> tuple[list[str], list[str]]:
        """The parameters that are pruned, and those that the pattern leaves whole.

        Raises:
            CompressError: there is none to prune.
        """
        names, free = prunable(model.module, self.prune_also), self.pattern == "free"
        turned = [name for name in names if not free and _turned(model.module, name)]
        if not (pruned := [name for name in names if name not in turned]):
            lacks = f"pattern '{self.pattern}' is for rows of outputs" if turned else "see 'prune_also'"
            raise CompressError(f"ticket: the network has no convolution and no linear layer to prune; {lacks}.")
        return pruned, turned

    @property
    def _has_goal(self) -> bool:
        return bool(self.keep_ratio or self.keep or self.schedule or Pattern.parse(self.pattern).of)

    def _check(self, model: MultiTaskModel, there: Mapping[str, object]) -> None:
        if self.keep and SHARED in [task.name for task in model.tasks]:
            raise CompressError(f"keep: a task is called '{SHARED}', as is what several tasks read; rename the task.")
        if unknown := [name for name in self.keep if name not in there]:
            raise CompressError(f"keep: no component '{unknown[0]}' has weights.{did_you_mean(unknown[0], there)}")

    def _course(self, model: MultiTaskModel, part: Mapping[str, Tensor], pattern: Pattern) -> "_Course":
        """Pool 0 is all that `keep` does not name; each component that it names is one more."""
        named = list(self.keep)
        of = torch.tensor([1 + named.index(c) if c in named else 0 for c in names_of_components(model)])
        pool = pools_of({name: of[number] for name, number in part.items()}, self.scope, 1 + len(named))
        rest = self.keep_ratio or (1.0 if named else SHARE_A_ROUND**self.turns)
        rounds = range(1, self.turns + 1)
        paths = [[share ** (turn / self.turns) for turn in rounds] for share in (rest, *self.keep.values())]
        given = count(pool, alive(model, list(part)))
        return _Course(pattern, pool, given, [list(self.schedule)] if self.schedule else paths)

    def _start(self, model: MultiTaskModel, bench: Bench) -> tuple[MultiTaskModel, dict[str, Tensor] | None]:
        """The network whose weights the first round compares, and the state that survivors return to, if any."""
        trained = model.clone()
        if isinstance(self.rewind, int):
            saved = train(trained, bench, self.train, "ticket, dense", bench.seed, snapshot=self.rewind)
            assert saved is not None  # it is one of the steps
            return trained, saved
        if self.rewind == "none":
            return trained, None
        source = initial(model, bench) if self.rewind == "init" else model
        return trained, {name: value.detach().clone() for name, value in source.module.state_dict().items()}

    def _score(
        self, model: MultiTaskModel, part: Mapping[str, Tensor], left: int, bench: Bench, title: str, seed: int
    ) -> dict[str, Tensor]:
        names = list(part)
        if self.saliency == "learnt":
            now = sum(int(mask.sum()) for mask in alive(model, names).values())
            return learnt(model, part, (now, left), bench, self.train, title, seed)
        if self.saliency == "layers":
            return by_layer(model, names, Pattern.parse(self.pattern).block)
        if self.saliency == "tasks":
            return by_tasks(model, names, bench, self.calibrate_batches)
        return magnitude(model, names)


@dataclass(frozen=True, slots=True)
class _Course:
    """How many weights are left at any time of the rounds.

    Attributes:
        pool: which weights compete, by a number for each.
        given: weights alive at the start, by pool.
        paths: the share of them left after each round; pools take turns.
    """

    pattern: Pattern
    pool: Scores
    given: Sequence[int]
    paths: Sequence[Sequence[float]]

    def left(self, turn: float) -> list[int]:
        """Weights of each pool after so many rounds, geometric between two; of an N:M pattern, inputs of each M."""
        pattern, rounds = self.pattern, len(self.paths[0])
        if pattern.of:
            return [pattern.of - ceil((pattern.of - pattern.n) * turn / rounds)]
        before = min(int(turn), rounds - 1)
        shares = []
        for path in self.paths:
            last, after = (1.0, *path)[before : before + 2]
            shares.append(last * (after / last) ** (turn - before))
        wanted = [round(shares[number % len(shares)] * size) for number, size in enumerate(self.given)]
        return [max(left, min(1, size)) for left, size in zip(wanted, self.given, strict=True)]

    def masks(self, score: Scores, living: Scores, left: Sequence[int]) -> dict[str, Tensor]:
        if self.pattern.of:
            return keep_n_of_m(score, living, left[0], self.pattern.of)
        return keep_most(score, living, self.pool, left, self.pattern.block)


def _turned(module: nn.Module, name: str) -> bool:
    """Is a weight a transposed convolution's, whose first dimension is its inputs?"""
    owner = module.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.modules.conv._ConvTransposeNd) and name.endswith("weight")


def rewind(model: MultiTaskModel, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> MultiTaskModel:
    """A copy with the weights of `state` where its masks and the given ones keep them, and zero where they do not."""
    copy = model.clone()
    copy.module.load_state_dict(state)
    copy.masks |= masks
    with torch.no_grad():
        for name, mask in copy.masks.items():
            tensor_of(copy.module, name).masked_fill_(~mask, 0.0)
    return copy


def initial(model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
    """What the workload builds under the recipe's seed, cut as the model is; without masks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        fresh = MultiTaskModel(plain(bench.workload.build()), model.tasks, model.inputs)
    keep = {Axis(n, dim): torch.tensor(left) for n, dims in model.kept.items() for dim, left in dims.items()}
    fresh.cut(keep, model.attributes)
    return fresh


def _density(model: MultiTaskModel, names: Sequence[str]) -> float:
    """The share of the weights that masks keep."""
    masks = alive(model, list(names)).values()
    return sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))
