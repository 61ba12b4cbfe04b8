"""Measurement by a clock the tests hold: what is enclosed, when it stops, and what a sample size may claim."""

import gc
import math
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import ProfileError
from profiles.measure import (
    FEWEST_SAMPLES,
    Emulated,
    Estimate,
    Measurement,
    cold,
    interleave,
    peak_rss_bytes,
    ratio,
)

samples = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200).map(tuple)


class Machine:
    """A clock that moves only while work is done; remembers the order of calls."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def clock(self) -> int:
        return self.now_ns

    def work(self, name: str, cost_ms: Callable[[int], float] | float) -> Callable[[], object]:
        def run() -> object:
            self.calls.append(name)
            cost = cost_ms if isinstance(cost_ms, float | int) else cost_ms(self.calls.count(name))
            self.now_ns += round(cost * 1e6)
            return name

        return run


def _at_most_one_above(n: int, percent: int) -> float:
    """Chance that at most one of n samples lies above the true percentile."""
    p = percent / 100
    return p**n + n * (1 - p) * p ** (n - 1)


@pytest.mark.parametrize("percent", FEWEST_SAMPLES)
def test_the_fewest_samples_are_those_of_the_early_stopping_rule(percent: int) -> None:
    fewest = FEWEST_SAMPLES[percent]
    assert _at_most_one_above(fewest, percent) <= 0.01 < _at_most_one_above(fewest - 1, percent)


@pytest.mark.parametrize("percent", FEWEST_SAMPLES)
def test_a_percentile_is_none_until_there_are_enough_samples(percent: int) -> None:
    fewest = FEWEST_SAMPLES[percent]
    assert getattr(Measurement((1.0,) * (fewest - 1)), f"p{percent}") is None
    assert getattr(Measurement((1.0,) * fewest), f"p{percent}") == 1.0


def test_percentiles_are_nearest_ranks() -> None:
    shuffled = tuple(float(i * 37 % 1000 + 1) for i in range(1000))
    seen = Measurement(shuffled)
    assert (seen.p50, seen.p90, seen.p95, seen.p99, seen.max) == (500.5, 900, 950, 990, 1000)


@given(samples)
def test_statistics_stay_in_order(values: tuple[float, ...]) -> None:
    seen = Measurement(values)
    known = [v for v in (seen.min, seen.p50, seen.p90, seen.p95, seen.p99, seen.max) if v is not None]
    assert known == sorted(known)
    assert seen.min <= seen.mean * (1 + 1e-12)
    assert seen.n == len(values)
    assert (seen.spread is None) == (seen.n < 4)
    assert (seen.drift is None) == (seen.n < 8)


def test_drift_compares_the_last_quarter_with_the_first() -> None:
    assert Measurement((1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.5, 1.5)).drift == pytest.approx(0.5)
    assert Measurement((1.0,) * 8).drift == 0


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Measurement((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(2 / 3)


@pytest.mark.parametrize("values", [(), (math.nan,), (math.inf,), (-1.0,)])
def test_a_measurement_without_real_samples_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ProfileError, match="needs samples"):
        Measurement(values)


def test_what_was_not_seen_has_no_samples() -> None:
    assert not isinstance(Emulated(1.0, "verilator 5.048", "100 cycles at 100 MHz"), Measurement)
    for other in (Emulated(1.0, "sim", "cycles"), Estimate(1.0, "roofline")):
        assert not hasattr(other, "samples_ms")
        assert not hasattr(other, "p90")


def test_a_sample_encloses_one_call_and_nothing_else() -> None:
    machine = Machine()
    found = interleave({"a": machine.work("a", 2.0), "b": machine.work("b", 3.0)}, min_samples=10, clock=machine.clock)
    assert found["a"].samples_ms == (2.0,) * 10
    assert found["b"].samples_ms == (3.0,) * 10


def test_rounds_are_shuffled_by_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        machine = Machine()
        runs = {name: machine.work(name, 1.0) for name in "abc"}
        interleave(runs, min_samples=20, seed=seed, settle_ms=0, warmup_s=0, clock=machine.clock)
        return machine.calls[3:]

    first = order(1)
    assert first == order(1) != order(2)
    rounds = [first[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(taken) == ["a", "b", "c"] for taken in rounds)
    assert len({tuple(taken) for taken in rounds}) > 2


def test_each_sample_follows_untimed_calls_of_its_own_run() -> None:
    machine = Machine()
    runs = {"a": machine.work("a", 2.0), "b": machine.work("b", 10.0)}
    interleave(runs, min_samples=3, settle_ms=5, warmup_s=0, clock=machine.clock)
    text = "".join(machine.calls[2:])
    assert text.replace("aaaa", "").replace("bb", "") == ""


def test_warming_ends_when_timings_settle() -> None:
    machine = Machine()
    run = machine.work("a", lambda call: 100.0 / call if call < 20 else 5.0)
    seen = interleave({"a": run}, warmup_s=60, min_samples=4, settle_ms=0, clock=machine.clock)["a"]
    assert seen.stable
    assert seen.warmup_calls >= 20
    assert seen.samples_ms == (5.0,) * 4


def test_warming_gives_up_after_its_time_and_says_so() -> None:
    machine = Machine()
    run = machine.work("a", lambda call: 1.0 + call)
    seen = interleave({"a": run}, warmup_s=0.1, min_samples=4, settle_ms=0, clock=machine.clock)["a"]
    assert not seen.stable
    assert machine.calls.count("a") == seen.warmup_calls + 4


def test_sampling_stops_for_time_after_a_whole_round() -> None:
    machine = Machine()
    runs = {"a": machine.work("a", 400.0), "b": machine.work("b", 400.0)}
    found = interleave(runs, warmup_s=0, min_samples=100, max_seconds=2, settle_ms=0, clock=machine.clock)
    assert found["a"].n == found["b"].n == 3
    slow = interleave({"a": machine.work("a", 9e3)}, warmup_s=0, max_seconds=0, settle_ms=0, clock=machine.clock)
    assert slow["a"].n == 1


def test_garbage_is_collected_before_and_not_during() -> None:
    seen: list[bool] = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, warmup_s=0, min_samples=2)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_what_a_run_raises_passes_and_the_collector_is_back() -> None:
    def fail() -> object:
        raise ArithmeticError("kernel")

    with pytest.raises(ArithmeticError, match="kernel"):
        interleave({"a": fail})
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "wanted"), [({}, 1), ({"a": list}, 0)])
def test_nothing_to_measure_is_refused(runs: dict[str, Callable[[], object]], wanted: int) -> None:
    with pytest.raises(ProfileError, match="Nothing to measure"):
        interleave(runs, min_samples=wanted)


def test_load_and_first_call_are_kept_apart() -> None:
    machine = Machine()
    loaded, times = cold(machine.work("load", 30.0), lambda name: machine.work(f"{name} run", 7.0)(), machine.clock)
    assert loaded == "load"
    assert (times.load_ms, times.first_ms) == (30.0, 7.0)
    assert machine.calls == ["load", "load run"]


@given(samples, st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly_with_the_interval_around_it(
    values: tuple[float, ...], factor: float
) -> None:
    found = ratio(Measurement(tuple(factor * value for value in values)), Measurement(values))
    assert found.value == pytest.approx(factor)
    assert (found.low is None) == (found.high is None) == (len(values) < 6)
    if found.low is not None and found.high is not None:
        assert found.low <= found.value <= found.high


def test_pairs_cancel_what_disturbs_both() -> None:
    noise = [1.0 + (i * 7919 % 100) for i in range(64)]
    found = ratio(Measurement(tuple(0.5 * x for x in noise)), Measurement(tuple(noise)))
    assert found.low == found.high == 0.5


@pytest.mark.parametrize("n", [6, 20, 64, 662, 3000])
def test_the_interval_has_the_stated_coverage(n: int) -> None:
    found = ratio(Measurement(tuple(float(i) for i in range(1, n + 1))), Measurement((1.0,) * n))
    assert found.low is not None and found.high is not None
    below = round(found.low) - 1  # samples under the interval; as many above

    def outside(k: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    assert found.high == n - below
    assert outside(below) <= 0.05 < outside(below + 1)
    assert found.value == statistics.median(range(1, n + 1))


def test_runs_of_different_rounds_are_not_compared() -> None:
    with pytest.raises(ProfileError, match="2 and 1 samples"):
        ratio(Measurement((1.0, 1.0)), Measurement((1.0,)))
    with pytest.raises(ProfileError, match="no time"):
        ratio(Measurement((1.0,)), Measurement((0.0,)))


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_rss_bytes()
    held = bytearray(before + (64 << 20))
    assert peak_rss_bytes() >= before + (32 << 20)
    assert len(held) > before
