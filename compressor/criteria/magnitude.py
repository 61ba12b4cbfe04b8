"""Magnitudes of weights as importance; the same for every task, as they see no data."""

from collections.abc import Iterable

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.channels import Axis
from compressor.criteria.gradients import sums_by_class
from compressor.graph import tensor_of
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


def l2(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: squared L2 norm of the weights that write a channel, each layer's mean scaled to 1.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (with L2, and normalised by layer so that
    layers can be ranked together).
    """
    del bench, batches
    return _sized(model, prunable, _written(prunable), power=2)


def l1(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: sum of the absolute weights that write a channel, each layer's mean scaled to 1.

    Source: Li et al., ICLR 2017, as published; PAGCP (Ye et al., T-PAMI 2023) ranks filters by it too.
    """
    del bench, batches
    return _sized(model, prunable, _written(prunable), power=1)


def group(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """(task, class) float32 >= 0: squared L2 norm of everything that goes with a channel: weights that write or read
    it, biases and norms; each tensor's mean scaled to 1.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    del bench, batches
    trained = [axis for axis in prunable.channels.axes if axis.tensor in prunable.trained]
    return _sized(model, prunable, trained, power=2)


def _written(prunable: Prunable) -> Iterable[Axis]:
    return dict.fromkeys(c.writes for c in prunable.channels.contractions)


def _sized(model: MultiTaskModel, prunable: Prunable, axes: Iterable[Axis], power: int) -> Tensor:
    score_C = torch.zeros(prunable.class_count)
    for axis in axes:
        weight = tensor_of(model.module, axis.tensor).detach().abs() ** power
        classes = prunable.channels.axes[axis]
        mean = weight.sum() / max(1, len(classes))
        score_C += sums_by_class(weight / mean.clamp_min(1e-12), axis, classes, prunable.class_count)
    return score_C.expand(len(model.tasks), -1).clone()
