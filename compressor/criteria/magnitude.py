"""Weight magnitude importance; the same for every task, as it sees no data."""

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.groups import Prunable
from compressor.model import MultiTaskModel, get_tensor


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: squared L2 norm of the weights that write a channel, each layer's mean scaled to 1.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (with L2, and normalised by layer so that
    layers can be ranked together).
    """
    del bench, batches
    score_C = torch.zeros(prunable.class_count)
    for axis in dict.fromkeys(c.writes for c in prunable.channels.contractions):
        weight = get_tensor(model.module, axis.tensor).detach()
        others = [dim for dim in range(weight.dim()) if dim != axis.dim]
        norm = weight.square().sum(others)
        score_C.index_add_(0, prunable.channels.axes[axis], norm / norm.mean().clamp_min(1e-12))
    return score_C.expand(len(model.tasks), -1).clone()
