"""Importance criteria by name: `score` says what each channel is worth to each task."""

from typing import Protocol

from torch import Tensor

from compressor.bench import Bench
from compressor.criteria import magnitude, taylor
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


class Criterion(Protocol):
    """A module with a `score` function; higher is kept; comparable across groups of one network, not across tasks."""

    def score(self, model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor: ...


CRITERIA: dict[str, Criterion] = {
    "taylor": taylor,
    "magnitude": magnitude,
}
