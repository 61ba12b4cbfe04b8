"""A module's tensors under all their names, and the attributes of torch's layers that repeat a tensor's shape."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.channels import Axis
from compressor.graph import tensor_of


def names_of(module: nn.Module) -> list[list[str]]:
    """The names of each parameter and buffer; more than one where the module shares it."""
    names: dict[int, list[str]] = {}
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in held:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer under every name that the module has for it."""
    old = tensor_of(module, name)
    value = value.detach().clone()
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            for key, tensor in list(held.items()):
                if tensor is old:
                    held[key] = new  # type: ignore[assignment]


def plain(module: nn.Module) -> nn.Module:
    """The module, put in evaluation and changed in place: weights that it computes of others are parameters.

    Weight norm, spectral norm and every other parametrization, of `torch.nn.utils.parametrizations` or of the older
    functions of `torch.nn.utils`: they serve training alone, and no channel of them could be cut.
    """
    module.eval()
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(layer, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(layer, hook.name)
    return module


def set_groups(module: nn.Module, keep: Mapping[Axis, Tensor]) -> None:
    """Give grouped convolutions and group norms the groups of which a cut leaves anything."""
    rows = {id(tensor_of(module, axis.tensor)): indices for axis, indices in keep.items() if axis.dim == 0}
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and id(layer.weight) in rows:
            each = layer.weight.shape[0] // layer.groups
            layer.groups = len(torch.unique(rows[id(layer.weight)] // each))
        elif isinstance(layer, nn.GroupNorm) and id(layer.weight) in rows:
            each = layer.num_channels // layer.num_groups
            layer.num_groups = len(torch.unique(rows[id(layer.weight)] // each))


def refit(module: nn.Module) -> None:
    """Set the attributes that layers keep about their shapes to what their tensors say."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.modules.conv._ConvNd):
            layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            size = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = len(size) if size is not None else layer.num_features
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            if layer.weight is not None and layer.weight.dim() == len(layer.normalized_shape):
                layer.normalized_shape = tuple(layer.weight.shape)
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = len(layer.weight) if layer.weight is not None else layer.num_channels
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = layer.weight.shape[1]
