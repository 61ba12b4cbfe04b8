"""Latency that can be believed: what was seen, what was emulated and what was computed are different types."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from profiles.errors import ProfileError

Clock = Callable[[], int]
Run = Callable[[], object]
Loaded = TypeVar("Loaded")

# Fewest samples that support a percentile with 99 % confidence while one of them may be set aside: the smallest n for
# which at most one of n samples lies above it with a probability of at most 1 %. MLPerf Inference, early stopping.
FEWEST_SAMPLES = {90: 64, 95: 130, 99: 662}

CONFIDENCE = 0.95
WINDOW = 5  # calls whose medians are compared while warming up
STABLE = 0.02  # two windows this close count as warm


@dataclass(frozen=True, slots=True)
class Measurement:
    """A latency seen on hardware.

    Attributes:
        samples_ms: every timed call in order of time, none dropped; each encloses exactly one call.
        warmup_calls: untimed calls before the first sample.
        stable: whether the warm-up ended because timings had settled, rather than for lack of time.
    """

    samples_ms: tuple[float, ...]
    warmup_calls: int = 0
    stable: bool = True

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(0 <= sample < math.inf for sample in self.samples_ms):
            raise ProfileError("A measurement needs samples, each a finite number of milliseconds.")

    @property
    def n(self) -> int:
        return len(self.samples_ms)

    @property
    def p50(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p90(self) -> float | None:
        return self._percentile(90)

    @property
    def p95(self) -> float | None:
        return self._percentile(95)

    @property
    def p99(self) -> float | None:
        return self._percentile(99)

    @property
    def min(self) -> float:
        return min(self.samples_ms)

    @property
    def max(self) -> float:
        return max(self.samples_ms)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples_ms)

    @property
    def spread(self) -> float | None:
        """Interquartile range as a fraction of the median; None under 4 samples."""
        if self.n < 4 or self.p50 == 0:
            return None
        low, _, high = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return (high - low) / self.p50

    @property
    def drift(self) -> float | None:
        """Median of the last quarter over that of the first, less one: 0.1 is 10 % slower at the end; None under 8."""
        quarter = self.n // 4
        if quarter < 2:
            return None
        first = statistics.median(self.samples_ms[:quarter])
        return statistics.median(self.samples_ms[-quarter:]) / first - 1 if first else None

    def _percentile(self, percent: int) -> float | None:
        """The nearest-rank percentile, a sample that was seen; None where n is too small to support it."""
        if self.n < FEWEST_SAMPLES[percent]:
            return None
        return sorted(self.samples_ms)[math.ceil(self.n * percent / 100) - 1]


@dataclass(frozen=True, slots=True)
class Emulated:
    """The latency that an emulator or simulator of the device reports in the device's own time, such as RTL cycles.

    The wall time of an emulator (QEMU) is no latency of anything and does not belong here.

    Attributes:
        emulator: its name and version.
        basis: how its answer becomes milliseconds, e.g. "412,003 cycles at 100 MHz".
    """

    latency_ms: float
    emulator: str
    basis: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A latency that was computed and seen nowhere; `basis` names the model and what it assumes."""

    latency_ms: float
    basis: str


@dataclass(frozen=True, slots=True)
class Cold:
    """What a caller pays once, apart from the steady state: opening the artifact, and its first call."""

    load_ms: float
    first_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one run takes as another: under 1 is faster.

    Attributes:
        value: median of the rounds' ratios.
        low, high: interval that holds the true median with 95 % confidence, from the ratios' ranks; None under 6
            rounds, which support none.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def interleave(
    runs: Mapping[str, Run],
    *,
    warmup_s: float = 1.0,
    min_samples: int = 64,
    max_seconds: float = 20.0,
    seed: int = 0,
    settle_ms: float = 5.0,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Measurement]:
    """Time several runs side by side, so that whatever disturbs the machine disturbs all of them.

    Each run is called until it is warm. Then come rounds: every run once, in an order that `seed` shuffles anew each
    round, so the i-th samples of all runs were taken together and may be compared in pairs (`ratio`). A sample
    encloses one call and nothing else: neither the garbage collector, which is off, nor freeing the answer. A run
    that returns before its work is done (a GPU's queue) must wait for it itself.

    Args:
        runs: by name; each does one inference.
        warmup_s: longest warm-up of each run; it ends sooner once two windows of 5 calls agree within 2 %.
        min_samples: rounds wanted; sampling ends when there are as many.
        max_seconds: sampling also ends here, after one round at least; fewer samples allow fewer percentiles.
        settle_ms: a run is called untimed for this long (at least once) before each of its samples, so that it meets
            its own caches and not the spinning threads of the run before. 0 measures it just after a switch instead.
        clock: nanoseconds that only grow.

    Raises:
        ProfileError: no runs, or `min_samples` under 1. What a run raises passes through.
    """
    if not runs or min_samples < 1:
        raise ProfileError(f"Nothing to measure: {len(runs)} runs, {min_samples} samples wanted of each.")
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        warm = {name: _warm_up(run, warmup_s * 1e3, clock) for name, run in runs.items()}
        order, start = list(runs), clock()
        for _ in range(min_samples):
            shuffler.shuffle(order)
            for name in order:
                _settle(runs[name], settle_ms, clock)
                samples[name].append(_time_ms(runs[name], clock))
            if clock() - start >= max_seconds * 1e9:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Measurement(tuple(taken), *warm[name]) for name, taken in samples.items()}


def cold(
    load: Callable[[], Loaded], call: Callable[[Loaded], object], clock: Clock = time.perf_counter_ns
) -> tuple[Loaded, Cold]:
    """Time `load()` and the first `call` on what it returns, which is handed back for the steady state."""
    start = clock()
    loaded = load()
    load_ms = (clock() - start) / 1e6
    return loaded, Cold(load_ms, _time_ms(lambda: call(loaded), clock))


def ratio(a: Measurement, b: Measurement) -> Ratio:
    """How many times as long `a` takes as `b`, by the pairs of their interleaved samples.

    Raises:
        ProfileError: the two were not interleaved (different numbers of samples), or a sample of `b` is zero.
    """
    if a.n != b.n:
        raise ProfileError(f"Ratios need runs measured in the same rounds; these have {a.n} and {b.n} samples.")
    if min(b.samples_ms) == 0:
        raise ProfileError("A call took no time by this clock; repeat the work within the call to compare it.")
    pairs = sorted(x / y for x, y in zip(a.samples_ms, b.samples_ms, strict=True))
    rank = _median_rank(a.n)
    low, high = (None, None) if rank is None else (pairs[rank], pairs[-1 - rank])
    return Ratio(statistics.median(pairs), low, high, a.n)


def peak_rss_bytes() -> int:
    """Most memory this process has held resident since it began, by Linux's VmHWM; includes Python and libraries."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ProfileError(f"Peak memory is read from {status}, which Linux has.")
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _warm_up(run: Run, limit_ms: float, clock: Clock) -> tuple[int, bool]:
    """Call until two windows in a row agree or the time is up; the calls made and whether they agreed."""
    start, taken = clock(), [_time_ms(run, clock)]
    while clock() - start < limit_ms * 1e6:
        taken.append(_time_ms(run, clock))
        if len(taken) >= 2 * WINDOW:
            before, now = statistics.median(taken[-2 * WINDOW : -WINDOW]), statistics.median(taken[-WINDOW:])
            if abs(now - before) <= STABLE * before:
                return len(taken), True
    return len(taken), False


def _settle(run: Run, limit_ms: float, clock: Clock) -> None:
    """Call untimed for this long, at least once unless it is 0."""
    start = clock()
    while limit_ms > 0:
        run()
        if clock() - start >= limit_ms * 1e6:
            return


def _time_ms(run: Run, clock: Clock) -> float:
    start = clock()
    answer = run()
    stop = clock()
    del answer  # freed after the clock is read
    return (stop - start) / 1e6


def _median_rank(n: int) -> int | None:
    """Largest k for which the median lies between the k-th sample from either end (0-based) with 95 % confidence."""
    tail, rank = 0.0, None
    for k in range(n // 2):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank = k
    return rank
