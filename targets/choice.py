"""Which kernel computes a layer: the one measured fastest, or where nothing was measured, the one that should be.

A layer is known by its key, a candidate by its name; both are plain text, so that records outlive a process and can be
pinned beside an artifact. The same layers, candidates and records give the same choices, on any machine.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from targets.base import Array
from targets.records import Records


class Candidate(Protocol):
    """One way to compute a layer.

    `cycles` is what it should take, all cores together; only ratios count. `trial` is a kernel, scheduled unless an
    anchor's annotation says how, and arguments of the right shapes, input first, result last: what is timed.
    """

    @property
    def name(self) -> str: ...
    @property
    def cycles(self) -> float: ...
    def trial(self) -> tuple[Any, list[Array]]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How one layer was decided; `seconds`, by candidate, is empty where nothing was measured."""

    layer: str
    picked: Candidate
    candidates: Sequence[Candidate]
    seconds: Mapping[str, float] = field(default_factory=dict)


class Choices:
    """Decides layers by `records` and remembers each decision, in order, for whoever tunes or reports.

    `occurrences` holds, for each layer as often as it occurs, its multiply-adds by definition, its density
    and what its other form would have taken; `instead` says the latter by layer and number of nonzero weights.
    """

    def __init__(self, records: Records | None = None) -> None:
        self._records = records or {}
        self.made: dict[str, Choice] = {}
        self.instead: dict[tuple[str, int], str] = {}
        self.occurrences: dict[str, list[tuple[int, float, str]]] = {}

    def best(self, layer: str, candidates: Sequence[Candidate]) -> Any:
        """The candidate with the least time for this layer."""
        if layer not in self.made:
            known = {c.name for c in candidates}
            seconds = {name: t for name, t in self._records.get(layer, {}).items() if name in known}
            if seconds:
                picked = min((c for c in candidates if c.name in seconds), key=lambda c: seconds[c.name])
            else:
                picked = min(candidates, key=lambda c: c.cycles)
            self.made[layer] = Choice(layer, picked, candidates, seconds)
        return self.made[layer].picked

    def measured(self, layer: str) -> bool:
        """Whether any candidate of a layer was measured."""
        return layer in self.made and bool(self.made[layer].seconds)

    def cycles(self, layer: str, measured: bool) -> float:
        """What a layer's pick takes: its time at the usual pace of all that was measured, or its estimate."""
        choice = self.made[layer]
        if not measured:
            return choice.picked.cycles
        made = self.made.values()
        paces = [one.seconds[c.name] / c.cycles for one in made for c in one.candidates if c.name in one.seconds]
        return choice.seconds[choice.picked.name] / statistics.median(paces)

    def note(self, layer: str, macs: int, weights: Array) -> None:
        """Remember that the network computes this layer once more, with such weights."""
        nonzeros = int(np.count_nonzero(weights))
        instead = self.instead.get((layer, nonzeros), "")
        self.occurrences.setdefault(layer, []).append((macs, nonzeros / max(1, weights.size), instead))
