"""No importance at all: the control that every other criterion has to beat."""

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.criteria import magnitude
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 in 0..1, the same for every task: drawn from the seed; 0 for a channel of zeros alone."""
    drawn_C = torch.rand(prunable.class_count, generator=torch.Generator().manual_seed(bench.seed))
    return torch.where(magnitude.group(model, prunable, bench, batches) > 0, drawn_C, 0.0)
