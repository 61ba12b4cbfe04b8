"""What a run found out, as `report.json` holds it; a report that contradicts itself is refused. See docs/report.md."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, model_validator

from compressor.margin import margin
from profiles.host import Environment
from profiles.measure import FEWEST_SAMPLES, Emulated, Estimate, Measurement, Ratio
from profiles.settings import Settings

SCHEMA = "taskpress.report/1"

PNG = "iVBORw0KGgo"  # the eight bytes every PNG starts with, in base64

Fraction = Annotated[float, Field(ge=0, le=1)]


def _png(text: str) -> str:
    if not text.startswith(PNG):
        raise ValueError("should be a PNG file in base64")
    return text


Png = Annotated[str, AfterValidator(_png)]


class Part(Settings):
    """A table of the report: unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(allow_inf_nan=False)


class Size(Part):
    """What a network costs: multiply-adds of one inference at batch 1, and parameters."""

    macs: NonNegativeInt
    parameters: NonNegativeInt
    nonzero_parameters: NonNegativeInt


class TaskResult(Part):
    """One task before and after compression, in its metric's own unit.

    Attributes:
        before, after: the original's and the compressed network's score; None when the task cannot be scored.
        budget: the largest accepted drop, >= 0; None without one. `budget_text` is as the recipe says it: "3 %".
        margin: budget less drop; negative is beyond the budget. None unless all three are known.
        split, split_sha256: the data both scores come from.
    """

    name: str
    metric: str
    higher_is_better: bool
    before: float | None
    after: float | None
    budget: NonNegativeFloat | None
    budget_text: str
    margin: float | None
    within_budget: bool | None
    split: str
    split_sha256: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        metric: str,
        *,
        higher_is_better: bool,
        before: float | None,
        after: float | None,
        budget: float | None,
        budget_text: str,
        split: str,
        split_sha256: str | None = None,
    ) -> Self:
        """A result whose margin and verdict follow from its scores."""
        left = _margin(higher_is_better, before, after, budget)
        return cls(
            name=name,
            metric=metric,
            higher_is_better=higher_is_better,
            before=before,
            after=after,
            budget=budget,
            budget_text=budget_text,
            margin=left,
            within_budget=None if left is None else left >= 0,
            split=split,
            split_sha256=split_sha256,
        )

    @property
    def drop(self) -> float | None:
        """How much worse the task became, in its metric's unit; negative when it improved."""
        if self.before is None or self.after is None:
            return None
        return self.before - self.after if self.higher_is_better else self.after - self.before

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        left = _margin(self.higher_is_better, self.before, self.after, self.budget)
        if left is None or self.margin is None:
            agrees = left is self.margin and self.within_budget is None
        else:
            agrees = abs(left - self.margin) <= 1e-9 and self.within_budget == (self.margin >= 0)
        if not agrees:
            raise ValueError(f"task '{self.name}': margin and verdict do not follow from its scores and budget")
        return self


def _margin(higher_is_better: bool, before: float | None, after: float | None, budget: float | None) -> float | None:
    if before is None or after is None or budget is None:
        return None
    return margin(before, after, budget, higher_is_better=higher_is_better)


class StageResult(Part):
    """One stage as it ran, or as an earlier run left it (`resumed`); sizes and scores are those after it.

    `short`: it ended short of its goal, as `note` says.
    """

    index: NonNegativeInt
    kind: str
    key: str
    resumed: bool
    seconds: NonNegativeFloat
    macs: NonNegativeInt
    parameters: NonNegativeInt
    nonzero_parameters: NonNegativeInt
    scores: Mapping[str, float] = Field(default_factory=dict)
    note: str = ""
    short: bool = False


class LayerResult(Part):
    """One layer with weights, in the order of the forward pass; `density` is the fraction of kept weights not zero."""

    name: str
    channels_before: NonNegativeInt
    channels_after: NonNegativeInt
    parameters: NonNegativeInt
    density: Fraction


class Latency(Part):
    """A steady-state latency of one inference in ms; what it is called by `kind` decides what it may claim.

    Attributes:
        p90, p95, p99: None where n is too small (64, 130 and 662 samples).
        spread: interquartile range over median. drift: last quarter over first, less one.
        warmup_calls, stable: untimed calls before the first sample, and whether timings had settled by then.
        basis: emulator or model behind a figure that was not measured.
    """

    kind: Literal["measured", "emulated", "estimate"]
    n: NonNegativeInt
    p50: NonNegativeFloat
    p90: NonNegativeFloat | None = None
    p95: NonNegativeFloat | None = None
    p99: NonNegativeFloat | None = None
    min: NonNegativeFloat | None = None
    max: NonNegativeFloat | None = None
    mean: NonNegativeFloat | None = None
    spread: NonNegativeFloat | None = None
    drift: float | None = None
    warmup_calls: NonNegativeInt | None = None
    stable: bool | None = None
    basis: str = ""

    @classmethod
    def of(cls, seen: Measurement | Emulated | Estimate) -> Self:
        """The figures of a latency, under the kind that its type says."""
        if isinstance(seen, Measurement):
            names = ("n", "p50", "p90", "p95", "p99", "min", "max", "mean", "spread", "drift", "warmup_calls", "stable")
            return cls(kind="measured", **{name: getattr(seen, name) for name in names})
        if isinstance(seen, Emulated):
            return cls(kind="emulated", n=0, p50=seen.latency_ms, basis=f"{seen.emulator}: {seen.basis}")
        return cls(kind="estimate", n=0, p50=seen.latency_ms, basis=seen.basis)

    @model_validator(mode="after")
    def _claims_no_more_than_it_may(self) -> Self:
        if (self.kind == "measured") != (self.n > 0):
            raise ValueError(f"a latency of kind '{self.kind}' cannot have {self.n} samples")
        for percent, fewest in FEWEST_SAMPLES.items():
            if self.n < fewest and getattr(self, f"p{percent}") is not None:
                raise ValueError(f"p{percent} needs {fewest} samples, there are {self.n}")
        if self.kind != "measured" and not self.basis:
            raise ValueError(f"a latency of kind '{self.kind}' names its basis")
        return self


class Timed(Part):
    """What was timed: the latency and the raw samples in order of time, in ms; none unless measured."""

    latency_ms: Latency | None
    samples: tuple[NonNegativeFloat, ...] = ()

    @model_validator(mode="after")
    def _samples_are_those_counted(self) -> Self:
        counted = 0 if self.latency_ms is None else self.latency_ms.n
        if counted != len(self.samples):
            raise ValueError(f"latency_ms counts {counted} samples, there are {len(self.samples)}")
        return self


class Verified(Part):
    """One rung of the ladder eager -> ONNX -> Relax -> artifact: how far a task's answers are from eager's."""

    rung: str
    task: str
    max_abs_error: NonNegativeFloat
    tolerance: NonNegativeFloat


class PairedRatio(Part):
    """Latency of this artifact over that of the baseline named, from interleaved pairs: under 1 is faster."""

    baseline: str
    value: NonNegativeFloat
    low: NonNegativeFloat | None = None
    high: NonNegativeFloat | None = None

    @classmethod
    def of(cls, baseline: str, seen: Ratio) -> Self:
        return cls(baseline=baseline, value=seen.value, low=seen.low, high=seen.high)


class Kernel(Part):
    """The kernel that one layer of an artifact got.

    Attributes:
        layer: what was computed, by its sizes.
        kernel: how: "direct", "winograd 4", "sparse".
        macs: by definition, zeros included.
        instead: of a layer that could be dense or sparse, how many times as long the other would have taken.
        cycles, moved_bytes: of a layer that an accelerator computes, and what goes over its memory's ports for that.
    """

    layer: str
    kernel: str
    macs: NonNegativeInt
    density: Fraction
    instead: str = ""
    cycles: NonNegativeInt = 0
    moved_bytes: NonNegativeInt = 0


class Accelerated(Part):
    """What an accelerator is at in one frame, by its cycle models; its host's part is not in it.

    Attributes:
        rows, columns: of its array of multipliers.
        megahertz, clock_by: its clock, and whether that was placed and routed or is an estimate.
        cycles: of each run, in their order, with a bus for each of the memory's ports.
        shared_cycles: of all runs where these ports share one: not to the cycle.
        read_bytes, written_bytes, program_bytes: that loads, stores and instructions move.
        memory_bytes: of the memory that it works in, programs aside.
        buffer_bytes: of the memories on the chip, by what they hold.
        work: of each unit, the share of each of equally long spans of the frame in which it does not wait.
    """

    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]
    megahertz: Annotated[float, Field(gt=0)]
    clock_by: str
    cycles: tuple[NonNegativeInt, ...]
    shared_cycles: NonNegativeInt
    read_bytes: NonNegativeInt
    written_bytes: NonNegativeInt
    program_bytes: NonNegativeInt
    memory_bytes: NonNegativeInt
    buffer_bytes: Mapping[str, NonNegativeInt]
    work: Mapping[str, tuple[Fraction, ...]]


class ArtifactResult(Timed):
    """One built artifact at one number of threads.

    Attributes:
        directory: relative to the report.
        bytes: of all its files.
        sha256: of its manifest.
        load_ms, first_ms: opening it and its first inference, apart from the steady state.
        peak_rss_bytes: of a process that loads and runs it alone.
        kernels: of its layers, in order; empty where the target keeps no account of them.
        accelerator: of one that an accelerator runs.
    """

    name: str
    tasks: tuple[str, ...]
    target: str
    device: str
    directory: str
    macs: NonNegativeInt
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    threads: Annotated[int, Field(ge=1)]
    load_ms: NonNegativeFloat | None = None
    first_ms: NonNegativeFloat | None = None
    compile_s: NonNegativeFloat | None = None
    peak_rss_bytes: NonNegativeInt | None = None
    ratio_to_dense: PairedRatio | None = None
    verified: tuple[Verified, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    accelerator: Accelerated | None = None


class BaselineResult(Timed):
    """Something to compare with, measured in the same rounds as the artifacts, such as "ONNX Runtime, dense".

    Attributes:
        artifact: the artifact whose graph another engine ran; empty for the original network.
    """

    name: str
    artifact: str = ""
    tasks: tuple[str, ...]
    threads: Annotated[int, Field(ge=1)]
    macs: NonNegativeInt
    parameters: NonNegativeInt


class Picture(Part):
    """A task's answer on one input before and after, with the input and the truth where there are any."""

    name: str
    task: str
    before_png_base64: Png
    after_png_base64: Png
    input_png_base64: Png | None = None
    truth_png_base64: Png | None = None


class Report(Part):
    """Everything a run found out; `report.html` is drawn from this and nothing else.

    Attributes:
        command: as a shell would take it.
        recipe: resolved, with every default.
        created: with its time zone.
        original: the dense multi-task network as it came.
        environment: of the machine that ran and measured; its moments lie before and after the timings.
        computed_on: where trainings and scores were computed, and with how many threads and processes.
        warnings: what a reader must know before believing the rest.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["taskpress.report/1"] = Field(default="taskpress.report/1", alias="schema")
    name: str
    command: str
    recipe: Mapping[str, Any]
    seed: int
    created: datetime
    duration_s: NonNegativeFloat
    original: Size
    tasks: tuple[TaskResult, ...] = Field(min_length=1)
    stages: tuple[StageResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    artifacts: tuple[ArtifactResult, ...] = ()
    baselines: tuple[BaselineResult, ...] = ()
    environment: Environment
    computed_on: str
    pictures: tuple[Picture, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def compressed(self) -> Size:
        """The multi-task network after the last stage; the original when there was none."""
        if not self.stages:
            return self.original
        last = self.stages[-1]
        return Size(macs=last.macs, parameters=last.parameters, nonzero_parameters=last.nonzero_parameters)

    @model_validator(mode="after")
    def _names_only_its_own_tasks(self) -> Self:
        known = {task.name for task in self.tasks}
        owners: tuple[ArtifactResult | BaselineResult, ...] = (*self.artifacts, *self.baselines)
        named = {task for owner in owners for task in owner.tasks} | {picture.task for picture in self.pictures}
        named |= {task for stage in self.stages for task in stage.scores}
        if unknown := sorted(named - known):
            raise ValueError(f"tasks {', '.join(unknown)} are named, but only {', '.join(sorted(known))} have results")
        return self
