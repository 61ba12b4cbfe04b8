"""Importance criteria by name: what each channel is worth to each task."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from compressor.bench import Bench
from compressor.criteria import agreement, batchnorm, magnitude, random, taylor
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


class Criterion(Protocol):
    """A function; higher is kept; comparable across groups of one network, not across tasks."""

    def __call__(self, model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor: ...


CRITERIA: Mapping[str, Criterion] = {
    "taylor": taylor.score,
    "agreement": agreement.score,
    "magnitude": magnitude.l2,
    "magnitude-l1": magnitude.l1,
    "magnitude-group": magnitude.group,
    "batchnorm": batchnorm.score,
    "random": random.score,
}

BY_TASK = frozenset({"taylor"})
"""Those that tell a channel's worth to one task from its worth to another."""
