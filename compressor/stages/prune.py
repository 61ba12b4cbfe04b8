"""Global channel pruning inside each task's budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from compressor.allocation import cheapest, uniform
from compressor.bench import Bench, reestimate_batchnorm
from compressor.combining import Combine, combine
from compressor.costs import Costs
from compressor.criteria import BY_TASK, CRITERIA
from compressor.errors import CompressError
from compressor.groups import IN_TRAINING, Group, Prunable
from compressor.model import MultiTaskModel, some
from compressor.reconstruction import without
from compressor.sequential import Oracle, walk
from compressor.surgery import Tied, cut, one_width, refused
from compressor.training import Training, train
from profiles.settings import Settings, did_you_mean

Search = Literal["value", "sequential", "uniform"]

_CLOSE = 0.05  # a latency goal is met this closely
_MEASURED = 6  # first guesses that are built and timed
_EQUAL = 0.02  # latencies this close are equal
_FINEST = 4  # multiple of channels
_CORRECTIONS = 2  # more rounds where the network that was pruned in the end is slower than the guess


class Prune(Settings):
    """Remove the channels worth least per multiply-add and parameter they cost, in rounds, until the goal is met.

    Attributes:
        macs, parameters: fraction of what the stage was given to keep (0-1).
        latency: fraction of the original's latency to keep, measured on the device at the recipe's first number of
            threads, whole networks beside each other, or told by the device's simulator; met within 5 %. At least one
            goal is needed, every given one is met.
        rounds: the goal is approached geometrically; importance is measured anew in each round.
        retries: when a round leaves a budget, so many steps half as far as the one before are tried from the last point
            that kept them all; a sequential search that the budgets stopped is repeated, after recovery, as often.
        search: how widths are found: "value" drops, over the whole network, the channels of least value for what they
            cost; "sequential" narrows group by group as far as the cut network itself stays inside every task's budget
            (`compressor/sequential.py`); "uniform" keeps the same share of every group.
        criterion: a name in CRITERIA.
        combine: how a channel's importance to each task becomes one number: each task's row is first scaled to sum 1
            and weighed by the root of how tight its budget is (relative to its score), then "max" protects what any one
            task needs, "sum" trades tasks against each other. "unanimous" takes each task's ranks instead, unweighed: a
            channel goes when every task ranks it low (Sun et al., "DiSparse", CVPR 2022).
        weights: a factor for each task's importance beside what its budget says; 1 where none is given. For a task of
            which training wins little back; of a criterion in BY_TASK.
        batches: calibration batches for importance and reconstruction, and for batch norm where nothing is recovered.
        slack: budgets are multiplied by this while pruning, since a later `finetune` wins much of the drop back; a
            sequential search, asking before that, counts a score's fall as the rise of its inverse.
        keep_at_least: no group goes below this fraction of the width it came with.
        round_to: widths become multiples of this; 0 means the device's vector width, "measured" the one of it and its
            halves (down to 4) whose networks, cut to the goal, take the device least time for each multiply-add that is
            left; the finest of equally good ones.
        reconstruct: after each round, before recovery, layers get the weights with which they answer most like before
            from the channels that are left, by least squares on `batches` (`compressor/reconstruction.py`).
        shrink_norms: layer norms, RMS norms, group norms of one group, means, variances and deviations over channels
            may go over fewer (`compressor/norms.py`). The rest of a network is cut so that channels worth nothing
            change nothing; here their statistics change as well, which recovery has to make good.
        recover: a short training after each round, before it is judged.
    """

    kind: Literal["prune"]
    macs: float | None = Field(gt=0, lt=1, default=None)
    parameters: float | None = Field(gt=0, lt=1, default=None)
    latency: float | None = Field(gt=0, lt=1, default=None)
    rounds: int = Field(ge=1, default=4)
    retries: int = Field(ge=0, default=2)
    search: Search = "value"
    criterion: str = "taylor"
    combine: Combine = "max"
    weights: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    batches: int = Field(ge=1, default=16)
    slack: float = Field(ge=1, default=1.0)
    keep_at_least: float = Field(ge=0, le=1, default=0.1)
    round_to: Annotated[int, Field(ge=0)] | Literal["measured"] = 0
    reconstruct: bool = False
    shrink_norms: bool = False
    recover: Training | None = None

    @model_validator(mode="after")
    def _has_goal(self) -> "Prune":
        if self.macs is None and self.parameters is None and self.latency is None:
            raise ValueError("a goal is missing: give 'macs', 'parameters' or 'latency', as the fraction to keep")
        if self.criterion not in CRITERIA:
            raise ValueError(f"no criterion '{self.criterion}'.{did_you_mean(self.criterion, CRITERIA)}")
        if self.weights and self.combine == "unanimous":
            raise ValueError("combine 'unanimous' goes by ranks, which no factor changes; leave 'weights' out")
        if self.weights and self.criterion not in BY_TASK:
            raise ValueError(f"criterion '{self.criterion}' scores channels for no task alone; leave 'weights' out")
        if self.shrink_norms and self.reconstruct:
            raise ValueError("'reconstruct' fits layers to what norms gave before; leave it or 'shrink_norms' out")
        return self

    @property
    def measures(self) -> bool:
        return self.latency is not None or self.round_to == "measured"

    @property
    def training(self) -> Training | None:
        return self.recover

    @property
    def train_steps(self) -> int:
        return self.rounds * (self.recover.steps if self.recover else 0)

    def check(self, model: MultiTaskModel, bench: Bench) -> None:
        """Refuse what the model, its tasks and budgets do not allow, before any work."""
        names = [task.name for task in model.tasks]
        if unknown := sorted(set(self.weights) - set(names)):
            raise CompressError(f"weights: no task '{unknown[0]}'.{did_you_mean(unknown[0], names)}")
        if self.search == "sequential" and not bench.budgets:
            raise CompressError("search = 'sequential' goes by budgets, and the recipe has none; give [budgets].")
        if self.recover is not None:
            self.recover.check(model, bench)

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The furthest point towards the goal at which every task is inside its (slackened) budget."""
        self.check(model, bench)
        if self.round_to == "measured":
            return self._rounded(model, bench).run(model, bench)
        start = self._prunable(model)
        for why in start.held():
            bench.note(f"left whole, {why}.")
        least, full = self._least(start), start.cost(start.keep_all())
        if self.latency is None:
            found, why = self._rounds(model, bench, (self.macs, self.parameters), self.rounds, least, full)
            self._tell(found, why, bench, full)
            return found
        if bench.speed is None:
            raise CompressError("prune has a goal in latency, but there is no device to measure it on.")
        macs = self._macs_for(self.latency, model, bench, bench.speed)
        if macs == 1 and self.parameters is None:
            bench.note(f"nothing was pruned: the latency is within {self.latency:.1%} of the original's as it is.")
            return model
        found, why = self._rounds(model, bench, (macs, self.parameters), self.rounds, least, full)
        self._tell(found, why, bench, full)
        for corrections in range(_CORRECTIONS, -1, -1):
            reached = bench.speed(found)
            bench.progress.line(f"  latency {reached:.1%} of the original's")
            if reached <= (1 + _EQUAL) * self.latency or why:
                break
            if corrections:  # the channels that went in the end are not those that were measured
                found, why = self._rounds(found, bench, (0.99 * self.latency / reached, None), 1, least, full)
        if reached > (1 + _CLOSE) * self.latency:
            instead = f"{reached:.1%} of the original's latency instead of {self.latency:.1%}"
            bench.fall_short(f"prune ended at {instead}{': ' * bool(why)}{why}.")
        return found

    def _tell(self, found: MultiTaskModel, why: str, bench: Bench, full: Costs) -> None:
        """Say why a network is not all the way, where it is not."""
        if why:
            left = self._prunable(found)
            bench.fall_short(f"prune stopped short of its goal, at {_left(left.cost(left.keep_all()), full)}: {why}.")

    def _macs_for(
        self, latency: float, model: MultiTaskModel, bench: Bench, speed: Callable[[MultiTaskModel], float]
    ) -> float:
        """The share of multiply-adds at which the network, cut without training, takes that share of the latency."""
        start = self._prunable(model)
        full = start.cost(start.keep_all())
        multiple, least = self._multiple(bench), self._least(start)
        search: Search = "value" if self.search == "sequential" else self.search
        guess = self.model_copy(update={"search": search, "reconstruct": False})
        low, high, share = (0.0, 0.0), (1.0, speed(model)), latency  # (multiply-adds, latency) that do, that do not
        if high[1] <= latency:
            return self.macs or 1.0
        for _ in range(_MEASURED):
            goal = _goal(full, (share, self.parameters), 1.0)
            shrunk = guess._shrink(model, bench, goal, multiple, least)
            reached = speed(shrunk.model)
            bench.progress.line(f"  {_left(shrunk.costs, full)}: latency {reached:.1%} of the original's")
            if (1 - _CLOSE) * latency <= reached <= latency:
                break
            low, high = ((share, reached), high) if reached < latency else (low, (share, reached))
            aim = (1 - _CLOSE / 2) * latency
            share = low[0] + (high[0] - low[0]) * (aim - low[1]) / max(high[1] - low[1], 1e-6)
        else:
            share = low[0] or share
        return min(share, self.macs or 1.0)

    def _prunable(self, model: MultiTaskModel, tied: Tied = ()) -> Prunable:
        return Prunable.of(model, tied, shrinks=self.shrink_norms)

    def _multiple(self, bench: Bench) -> int:
        """What widths are multiples of."""
        return bench.multiple if self.round_to == "measured" else self.round_to or bench.multiple

    def _least(self, start: Prunable) -> dict[str, int]:
        """The least number of channels to keep of each group that there is at first, and of each of its layers.

        Groups may come apart when they are cut: queries and keys of a single head need not be cut with its values.
        """
        least: dict[str, int] = {}
        for group in start.groups:
            channels = ceil(self.keep_at_least * len(group)) * group.span
            for name in (group.name, *group.layers):
                least[name] = min(least.get(name, channels), channels)
        return least

    def _rounded(self, model: MultiTaskModel, bench: Bench) -> "Prune":
        """These settings with a number for `round_to`: the finest multiple that costs no more time a multiply-add.

        A coarse multiple may go far past the goal in a small network, so that latencies alone would not compare.
        """
        if bench.speed is None:
            raise CompressError("round_to = 'measured' needs a device to measure on; give a number, or 0.")
        start = self._prunable(model)
        share = min(fraction for fraction in (self.macs, self.latency, 1.0) if fraction is not None)
        full = start.cost(start.keep_all())
        goal = _goal(full, (share, self.parameters), 1.0)
        search: Search = "value" if self.search == "sequential" else self.search
        took: dict[int, float] = {}
        multiple = bench.multiple
        while multiple >= min(_FINEST, bench.multiple):
            tried = self.model_copy(update={"round_to": multiple, "search": search, "reconstruct": False})
            shrunk = tried._shrink(model, bench, goal, multiple, self._least(start))
            took[multiple] = bench.speed(shrunk.model) / max(shrunk.costs[0] / full[0], 1e-9)
            multiple //= 2
        best = min(m for m in took if took[m] <= (1 + _EQUAL) * min(took.values()))
        told = ", ".join(f"{m}: {time:.2f}" for m, time in took.items())
        bench.note(f"widths are multiples of {best}; time a multiply-add over the original's, by multiple: {told}.")
        return self.model_copy(update={"round_to": best})

    def _rounds(
        self, model: MultiTaskModel, bench: Bench, fractions: tuple[float | None, float | None], rounds: int,
        least: Mapping[str, int], full: Costs,
    ) -> tuple[MultiTaskModel, str]:
        """The furthest point towards fractions of what is given, and why that is not all the way, if it is not.

        Args:
            full: costs that people are told shares of.
        """
        start = self._prunable(model)
        given = start.cost(start.keep_all())
        multiple = self._multiple(bench)
        good, sizes, why = model, given, ""
        done, failed, turn, tries, trust = 0.0, 0.0, 0, self.retries, 1.0
        while done < 1:
            turn += 1
            step = round(done * rounds) + 1
            aim = (done + failed) / 2 if failed else step / rounds
            goal = _goal(given, fractions, aim)
            shrunk = self._shrink(good, bench, goal, multiple, least, trust)
            title = f"prune {step}/{rounds}" if not failed else f"prune, a smaller step ({tries} left)"
            if self.recover and self.recover.steps:  # which leaves batch norm better estimated than a few batches would
                train(shrunk.model, bench, self.recover, title, bench.seed + turn)
            else:
                reestimate_batchnorm(shrunk.model.module, bench.calibration(self.batches), bench.device)
            scores = bench.scores(shrunk.model)
            told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
            bench.progress.line(f"  {title}: {_left(shrunk.costs, full)}; {told}")
            if over := bench.over(scores, self.slack):
                worst, failed, trust = bench.worst(scores), aim, trust / 2
                why = f"with {_left(shrunk.costs, full)} {over}{shrunk.culprit(worst)}"
            else:
                narrower, sizes = shrunk.costs != sizes, shrunk.costs
                good = shrunk.model
                if _short(sizes, goal) and shrunk.stopped and narrower and tries:
                    tries -= 1  # what was recovered since may be spent on the same step again
                    continue
                done = aim
                if _short(sizes, goal):
                    return good, self._stuck(shrunk)
            if failed:
                if not tries:
                    return good, why
                tries -= 1
        return good, ""

    def _stuck(self, shrunk: "_Shrunk") -> str:
        if shrunk.stopped:
            return "no budget allows more of " + ", ".join(f"'{g}' (task '{t}')" for g, t in shrunk.stopped.items())
        least = f"at least {self.keep_at_least:.0%} of what they were"
        return f"no group may become narrower (widths are multiples of {shrunk.multiple}, {least})"

    def _shrink(
        self, model: MultiTaskModel, bench: Bench, goal: Costs, multiple: int, least: Mapping[str, int],
        trust: float = 1.0, tied: Tied = (),
    ) -> "_Shrunk":
        """A copy cut to the goal, shown to answer as the uncut network does with the same channels zeroed.

        Args:
            trust: share of the budgets that a sequential search may spend: what it asked has been too hopeful before.
            tied: axes of layers whose widths the module's code has in one integer.
        """
        prunable = self._prunable(model, tied)
        score_TC = CRITERIA[self.criterion](model, prunable, bench, self.batches)
        floors = {group.name: _floor(group, multiple, least) for group in prunable.groups}
        value_C = combine(score_TC, [task.name for task in model.tasks], bench, self.combine, self.weights)
        groups, stopped = list(prunable.groups), dict[str, str]()
        while True:
            given = prunable, groups, value_C, goal, multiple, floors
            if self.search == "sequential":
                oracle = Oracle(model, prunable, bench, self.batches, trust * self.slack)
                keep, stopped = walk(*given, oracle.holds), oracle.stopped
                bench.asked.append((oracle.asked, len(groups)))
                bench.progress.line(f"  asked the cut network {oracle.asked} times about {len(groups)} groups")
            else:
                keep = (cheapest if self.search == "value" else uniform)(*given)
            fitted = model
            if self.reconstruct:
                fitted, whole = without(model, prunable, keep, bench.calibration(self.batches), bench.device)
                if whole:
                    bench.note(f"not reconstructed: {some(whole)}.")
            smaller = cut(fitted, prunable, keep)
            if smaller is not None:
                names = tuple(task.name for task in model.tasks)
                return _Shrunk(smaller, prunable.cost(keep), keep, tuple(groups), names, score_TC, stopped, multiple)
            wrong = refused(model, prunable, keep, groups)
            if not wrong:
                why = "of its fitted layers; leave 'reconstruct' out" if self.reconstruct else "it answers by chance"
                raise CompressError(f"prune: the cut network does not answer as the zeroed one does, because {why}.")
            if more := one_width(model, prunable, [group for group in groups if group.name in wrong], tied):
                return self._shrink(model, bench, goal, multiple, least, trust, (*tied, *more))
            groups = [group for group in groups if group.name not in wrong]
            for training in (False, True):
                held = [name for name, why in wrong.items() if why.startswith(IN_TRAINING) is training]
                if held:
                    code = "what runs in training alone" if training else "the module's own code"
                    bench.note(f"left whole, because {code} fixes their size: {', '.join(held)}.")
            if spare := model.spare():
                bench.note(f"the network also returns {some(spare)}, of which no task is made: what reads channels for "
                           "that is not cut along. Leave it out of forward, or make it a task.")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """A cut model, its costs, and what tells why it is as it is."""

    model: MultiTaskModel
    costs: Costs
    keep: Tensor
    groups: tuple[Group, ...]
    tasks: tuple[str, ...]
    score_TC: Tensor
    stopped: Mapping[str, str]
    multiple: int

    def culprit(self, task: str) -> str:
        """", which needs most of what went from 'x'": the group whose lost channels were worth most to a task."""
        row_C = self.score_TC[self.tasks.index(task)]
        lost = {g.name: float(row_C[g.classes[~self.keep[g.classes]]].sum()) for g in self.groups}
        return f", which needs most of what went from '{max(lost, key=lambda n: lost[n])}'" if lost else ""


def _floor(group: Group, multiple: int, least: Mapping[str, int]) -> int:
    """The least width of a group: of what its layers must keep the least, in whole steps."""
    known = [group.name] if group.name in least else group.layers
    channels = [least[name] for name in known if name in least]
    step = group.step(multiple)
    return min(len(group), max(step, ceil(ceil(min(channels, default=1) / group.span) / step) * step))


def _goal(full: Costs, fractions: tuple[float | None, float | None], share: float) -> Costs:
    macs, parameters = (1.0 if fraction is None else fraction**share for fraction in fractions)
    return int(full[0] * macs), int(full[1] * parameters)


def _left(costs: Costs, full: Costs) -> str:
    return f"MACs {costs[0] / full[0]:.0%}, parameters {costs[1] / full[1]:.0%}"


def _short(reached: Costs, goal: Costs) -> bool:
    return any(now > wanted for now, wanted in zip(reached, goal, strict=True))
