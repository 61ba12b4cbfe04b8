"""Batch norm's scales as importance; the same for every task."""

import torch
from torch import Tensor

from compressor.bench import Bench, running_norms
from compressor.channels import FIXED, Axis
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


def score(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: sum of the absolute scales that batch norms multiply a channel with.

    A channel that no batch norm scales is worth as much as the one with the largest scale.

    Raises:
        CompressError: no batch norm of the network has a scale.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    del bench, batches
    norms = {id(norm.weight) for norm in running_norms(model.module) if norm.weight is not None}
    score_C = torch.zeros(prunable.class_count)
    scaled_C = torch.zeros(prunable.class_count, dtype=torch.bool)
    for name, parameter in model.module.named_parameters():
        classes = prunable.channels.axes.get(Axis(name, 0))
        if id(parameter) in norms and classes is not None:
            score_C.index_add_(0, classes, parameter.detach().abs().float())
            scaled_C[classes] = True
    if not bool(scaled_C.any()):
        raise CompressError("The network has no batch norm with a scale; use another criterion than 'batchnorm'.")
    score_C[FIXED] = 0.0  # which stands for many
    return torch.where(scaled_C, score_C, score_C.max()).expand(len(model.tasks), -1).clone()
