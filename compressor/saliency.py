"""Which single weights can go, and what each is worth."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.bench import Bench
from compressor.blocks import Block
from compressor.channels import Axis
from compressor.criteria.gradients import by_task
from compressor.graph import tensor_of
from compressor.masks import shares, unanimous
from compressor.model import MultiTaskModel

Also = Literal["bias", "norm", "other"]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def prunable(module: nn.Module, also: Sequence[Also] = ()) -> list[str]:
    """Names of the weights of convolutions and linear layers, and of what else is asked for, each tensor once.

    Numbers that stand alone are never among them.
    """
    kinds = {}
    for layer_name, layer in module.named_modules():
        for key, _ in layer.named_parameters(recurse=False):
            if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) and key in ("weight", "bias"):
                kind = key
            else:
                kind = "norm" if isinstance(layer, NORMS) else "other"
            kinds[f"{layer_name}.{key}".lstrip(".")] = kind
    return [name for name, value in module.named_parameters() if kinds[name] in ("weight", *also) and value.dim()]


def alive(model: MultiTaskModel, names: list[str]) -> dict[str, Tensor]:
    """What a mask kept so far, whatever its value; all of a weight that has no mask."""
    weights = {name: tensor_of(model.module, name) for name in names}
    return {name: model.masks.get(name, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}


def magnitude(model: MultiTaskModel, names: list[str]) -> dict[str, Tensor]:
    """Absolute weights."""
    return {name: tensor_of(model.module, name).detach().abs() for name in names}


def by_layer(model: MultiTaskModel, names: list[str], block: Block) -> dict[str, Tensor]:
    """Squared weights as shares of their layer, small layers' weights worth more than large ones' (LAMP).

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
    """
    squared = {name: tensor_of(model.module, name).detach().double().square() for name in names}
    return shares(squared, alive(model, names), block)


def by_tasks(model: MultiTaskModel, names: list[str], bench: Bench, batches: int) -> dict[str, Tensor]:
    """What every task alone would keep: |gradient of its loss| * weight^2 over calibration batches, ranks unanimous.

    Source: Sun et al., "DiSparse", CVPR 2022, its saliency for trained networks.
    """
    total = [{name: torch.zeros_like(tensor_of(model.module, name)) for name in names} for _ in model.tasks]
    for found in by_task(model, bench, batches, [Axis(name, 0) for name in names]):
        for task, parts in zip(total, found, strict=True):
            for name, part in zip(names, parts, strict=True):
                if part is not None:
                    weight, gradient = part
                    task[name] += gradient.abs() * weight.square()
    return unanimous(total)
