"""int8, inside each task's budget."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, fx

from compressor.bench import Bench
from compressor.budgets import margins
from compressor.errors import CompressError
from compressor.macs import macs_of
from compressor.model import MultiTaskModel, some
from compressor.quantization.bias import offsets
from compressor.quantization.calibrate import grids, seen
from compressor.quantization.equalise import equalised
from compressor.quantization.grids import Quantization
from compressor.quantization.points import Points, points
from compressor.quantization.ranges import Rule
from compressor.quantization.simulate import computed, folded, layer_names
from compressor.sequential import judging
from compressor.trace import as_brought
from profiles.settings import Settings, did_you_mean


class Quantize(Settings):
    """Put weights and values on grids of 256 steps: after pruning and tickets, whose zeros stay zero.

    Weights get symmetric grids, one for each channel written; values get one grid each, with an exact zero. A
    `finetune` stage after this one trains through the grids (quantization-aware training); nothing can be cut any more.

    Attributes:
        ranges: how far the grid of a value reaches: "minmax", all that is seen; "percentile", what lies between the two
            outer shares; "mse", where the squared error is least.
        weights: the same for weights ("percentile" takes all, as "minmax").
        steps: "exact": powers of two for values, short numbers for weights, with which ONNX Runtime, an integer device
            and the simulation answer alike, to the bit (`compressor/quantization/grids.py`); "any": as fine as the
            range allows, up to half as wide; "auto": exact, but any where a task leaves its budget, if the worst gains.
        percentile: the share of values, in percent, that "percentile" spans.
        batches: calibration batches, of the calibrate split; each is seen once, and only counts are kept.
        answers: "int32" leaves a contraction's answer that is a task's answer as the accumulators hold it; "int8" puts
            it on a grid as well.
        keep: layers that stay in floating point, by the names of their modules.
        equalise: first bring a tensor's channels to like ranges, by powers of two that leave the answers as they are:
            "auto" where a task leaves its budget without, if the worst task gains.
        correct_bias: add to each layer's bias what its outputs are off by on the calibration batches, on average.
        most_kept: where a task leaves its budget, layers are left in floating point, those first that win most of it
            back, up to this share of the multiply-adds.
        slack: budgets are multiplied by this here, since a later `finetune` wins much of the drop back.

    Source: Jacob et al., CVPR 2018; bias correction: Nagel et al., "Data-Free Quantization Through Weight Equalization
    and Bias Correction", ICCV 2019, section 4.2 (measured on data, layer after layer); equalisation: section 4.1 of the
    same (`compressor/quantization/equalise.py`).
    """

    measures: ClassVar[bool] = False
    training: ClassVar[None] = None
    kind: Literal["quantize"]
    ranges: Rule = "mse"
    weights: Rule = "mse"
    steps: Literal["auto", "exact", "any"] = "auto"
    percentile: float = Field(gt=50, le=100, default=99.99)
    batches: int = Field(ge=1, default=8)
    answers: Literal["int32", "int8"] = "int32"
    keep: tuple[str, ...] = ()
    equalise: Literal["auto", "always", "never"] = "auto"
    correct_bias: bool = True
    most_kept: Annotated[float, Field(ge=0, le=1)] = 0.1
    slack: float = Field(ge=1, default=1.0)

    @property
    def train_steps(self) -> int:
        return 0

    def check(self, model: MultiTaskModel, bench: Bench) -> None:
        """Refuse a name in `keep` that no layer has."""
        if not self.keep:
            return
        known = layer_names(folded(as_brought(model, model.inputs)))
        for module in self.keep:
            if not _under(known, module):
                raise CompressError(f"quantize: no layer '{module}'.{did_you_mean(module, known.values())}")

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The model on its grids.

        Raises:
            CompressError: it already is quantized, has no layer that could be, or none of a name in `keep`.
        """
        self.check(model, bench)
        if model.quantization is not None:
            raise CompressError("The network is quantized already; a recipe has one 'quantize' stage.")
        work = _Work(self, model.clone(), bench)
        if self.equalise == "always":
            work = work.equalised()
        found, scores = work.scored()
        changes = [_Work.with_any_steps] if self.steps == "auto" else []
        changes += [_Work.equalised] if self.equalise == "auto" else []
        for change in changes:
            if not bench.over(scores, self.slack):
                break
            changed = change(work)
            after = changed.scored()
            if min(bench.shares(after[1]).values()) > min(bench.shares(scores).values()):
                work, (found, scores) = changed, after
        for told in work.told:
            bench.note(told)
        assert found.quantization is not None
        bench.note(
            f"{len(found.quantization.values)} values and {len(found.quantization.scales)} weights lie on grids, from "
            f"{len(work.batches)} batches of the calibrate split."
        )
        if bench.over(scores, self.slack) and self.most_kept:
            found, scores = work.relieved(scores)
        if over := bench.over(scores, self.slack):
            bench.fall_short(f"quantize: {over}.")
        return found


class _Work:
    """What the stage computes once: the trace, and how far its values reach.

    Attributes:
        exact: whether grids are.
        told: what was done differently than by default, in sentences.
    """

    def __init__(self, how: Quantize, model: MultiTaskModel, bench: Bench) -> None:
        self.how, self.model, self.bench = how, model, bench
        self.exact, self.told = how.steps != "any", tuple[str, ...]()
        self._traces: dict[object, fx.GraphModule] = {}
        self.network = self.trace(model.inputs)
        self.names = layer_names(self.network)
        self.batches = [batch.inputs for batch in bench.calibration(how.batches)]
        everything = points(self.network)
        if not everything.layers:
            raise CompressError("quantize: the network has no convolution, linear layer or matrix product.")
        self.layers = everything.layers
        self.histograms = seen(self.trace, everything.values, self.batches)

    def equalised(self) -> "_Work":
        """The same of the network with equalised channels."""
        found, moved = equalised(self.model, self.batches)
        work = _Work(self.how, found, self.bench)
        told = f"{moved} channels were brought nearer to the range of those beside them, by powers of two."
        work.exact, work.told = self.exact, (*self.told, told)
        return work

    def with_any_steps(self) -> "_Work":
        """The same on grids whose steps need not be exact."""
        found = copy(self)
        found.exact = False
        found.told = *self.told, "With steps that are powers of two a task left its budget, so they are not."
        return found

    def trace(self, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
        """The folded trace for inputs of these shapes."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._traces:
            self._traces[shapes] = folded(as_brought(self.model, inputs))
        return self._traces[shapes]

    def points(self, whole: Sequence[str]) -> Points:
        wide = range(len(self.model.tasks)) if self.how.answers == "int32" else ()
        return points(self.network, whole, wide)

    def asked_to_stay(self) -> list[str]:
        """The contractions of the modules in `keep`."""
        return [node for module in self.how.keep for node in _under(self.names, module)]

    def quantized(self, whole: Sequence[str], *, corrected: bool) -> MultiTaskModel:
        """The model with all but some contractions on grids, its biases corrected or not."""
        where = self.points(whole)
        if new := [name for name in where.values if name not in self.histograms]:
            self.histograms |= seen(self.trace, new, self.batches)
        rules = self.how.ranges, self.how.weights
        record = grids(computed(self.network), where, self.histograms, rules, self.how.percentile, exact=self.exact)
        if corrected:
            shifts = offsets(self.trace, record, self.batches)
            record = Quantization(record.values, record.scales, shifts)
        found = self.model.clone()
        found.quantization = record
        return found

    def scored(self) -> tuple[MultiTaskModel, dict[str, float]]:
        """The model with all contractions on grids but those that were asked to stay, and its scores."""
        found = self.quantized(self.asked_to_stay(), corrected=self.how.correct_bias)
        scores = self.bench.scores(found)
        self.bench.progress.line(f"  quantize: {_told(scores)}")
        return found, scores

    def relieved(self, scores: dict[str, float]) -> tuple[MultiTaskModel, dict[str, float]]:
        """With layers left in floating point, the most helpful first, until the budgets hold or too much work would be.

        How much a layer helps is asked alone, all others being on grids and no bias corrected: the margin that the
        worst task wins.
        """
        bench, whole = self.bench, self.asked_to_stay()
        judge = judging(bench)
        before = bench.scores(bench.original, judge)

        def margin(model: MultiTaskModel) -> float:
            found = margins(model.tasks, bench.budgets, before, bench.scores(model, judge), self.how.slack)
            return min(found[t] / max(bench.budgets[t].allowed(before[t]), 1e-12) for t in found)

        start = margin(self.quantized(whole, corrected=False))
        layers = [layer for layer in self.layers if layer not in whole]
        gains = {layer: margin(self.quantized([*whole, layer], corrected=False)) - start for layer in layers}
        layers.sort(key=lambda layer: -gains[layer])
        told = ", ".join(f"{self.names[layer]} {gains[layer]:+.0%}" for layer in layers[:5])
        bench.note(f"of its budget the worst task wins back most where these stay in floating point: {told}.")
        work = {node.name: macs_of(node) for node in self.network.graph.nodes}
        total = sum(work[layer] for layer in self.layers)
        found, kept = self.quantized(whole, corrected=self.how.correct_bias), list[str]()
        for layer in layers:
            if gains[layer] <= 0 or not bench.over(scores, self.how.slack):
                break
            if sum(work[name] for name in (*kept, layer)) > self.how.most_kept * total:
                continue
            kept.append(layer)
            found = self.quantized([*whole, *kept], corrected=self.how.correct_bias)
            scores = bench.scores(found)
        if kept:
            share = sum(work[name] for name in kept) / total
            names = some([self.names[layer] for layer in kept])
            bench.note(f"left in floating point, {share:.1%} of the multiply-adds: {names}.")
        return found, scores


def _under(names: Mapping[str, str], module: str) -> list[str]:
    """The nodes of a module and those inside it."""
    return [node for node, name in names.items() if name == module or name.startswith(f"{module}.")]


def _told(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
