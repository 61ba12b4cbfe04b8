"""What pruned weights gave is taken over by those that stay: every layer fitted by least squares, without training.

Source: layer-wise reconstruction, as for channels in He et al., "Channel Pruning for Accelerating Very Deep Neural
Networks", ICCV 2017, and for single weights in Hubara et al., "Accelerated Sparse Neural Training", NeurIPS 2021.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compressor import compute
from compressor.groups import Prunable
from compressor.model import MultiTaskModel
from compressor.tensors import names_of
from compressor.workload import Batch

ROWS = 12_000
"""Of inputs that a layer is fitted to."""
_RIDGE = 0.01  # of the inputs' mean square: how much weights are held to what they were
_MOST_NUMBERS = 2**27  # of second moments at a time: a gigabyte
_MOST_WORK = 2**36  # multiply-adds that a layer's fit may take at each turn
_TURNS, _ENOUGH = 200, 1e-10

Layer = nn.Linear | nn.modules.conv._ConvNd


def reconstruct(
    model: MultiTaskModel, before: MultiTaskModel, batches: Sequence[Batch], device: torch.device = compute.CPU
) -> list[str]:
    """Give the weights that masks keep, and biases, the values with which each layer answers most like in `before`.

    Layers are fitted one by one, in place, each to its own inputs in `before`: what `batches` bring to it, at up to
    `ROWS` places drawn at random. Layers without a mask stay as they are.

    Returns:
        Names of the modules with a mask that were not fitted: transposed convolutions, norms, parametrised weights,
        those that several layers share, layers of so many inputs that it would take many minutes (a linear one
        of 9,216 to 4,096), and what the network's own forward does not call.
    """
    before, copies = before.clone(), names_of(model.module)
    shared = {name for names in copies if len(names) > 1 for name in names}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in model.masks)
    fits: dict[str, Layer] = {}
    for name in owners:
        layer = before.module.get_submodule(name)
        own = {f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)}
        if _can_be(layer) and _affordable(layer) and f"{name}.weight".lstrip(".") in own and not own & shared:
            fits[name] = layer
    done = set()
    with compute.at(device, before.module), torch.no_grad():
        before.module.eval()
        for some in _portions(fits):
            for name, moment_GKK in _moments(before.module, some, batches, device).items():
                _fit(model, some[name], name, moment_GKK)
                done.add(name)
    return [name for name in owners if name not in done]


def without(
    model: MultiTaskModel, prunable: Prunable, keep: Tensor, batches: Sequence[Batch], device: torch.device
) -> tuple[MultiTaskModel, list[str]]:
    """A copy, not cut yet, whose layers answer most like before with the weights that read kept classes alone; and the
    names of the modules that read fewer classes and were not fitted.
    """
    probe, fitted = model.clone(), model.clone()
    for value in probe.module.parameters():
        nn.init.ones_(value)
    prunable.silence(probe.module, keep)
    for name, value in probe.module.named_parameters():
        if not value.all():
            fitted.masks[name] = value.detach().bool() & model.masks.get(name, torch.tensor(True))
    whole = reconstruct(fitted, model, batches, device)
    fitted.masks = dict(model.masks)
    return fitted, whole


def _can_be(layer: nn.Module) -> TypeGuard[Layer]:
    return isinstance(layer, Layer) and not isinstance(layer, nn.modules.conv._ConvTransposeNd)


def _affordable(layer: Layer) -> bool:
    groups, inputs = _inputs(layer)
    return groups * inputs**2 <= _MOST_NUMBERS and len(layer.weight) * inputs**2 <= _MOST_WORK


def _inputs(layer: Layer) -> tuple[int, int]:
    """(G, K): the groups of a layer, and what one of its outputs is made of, the bias counted as one more input."""
    return getattr(layer, "groups", 1), layer.weight[0].numel() + (layer.bias is not None)


def _portions(layers: Mapping[str, Layer]) -> Iterator[dict[str, Layer]]:
    """The layers, as many at a time as there is room for their second moments."""
    some: dict[str, Layer] = {}
    room = _MOST_NUMBERS
    for name, layer in layers.items():
        groups, inputs = _inputs(layer)
        if some and groups * inputs**2 > room:
            yield some
            some, room = {}, _MOST_NUMBERS
        some[name] = layer
        room -= groups * inputs**2
    yield some


def _moments(
    module: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Batch], device: torch.device
) -> dict[str, Tensor]:
    """(G, K, K) float64 second moments of the inputs of those layers that are called, by name."""
    found: dict[str, Tensor] = {}
    rows = -(-ROWS // max(1, len(batches)))
    chance = torch.Generator().manual_seed(0)

    def see(name: str, layer: Layer, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        input_GRK = _patches(layer, given[0] if given else named["input"], rows, chance)
        moment_GKK = (input_GRK.mT @ input_GRK).double()
        found[name] = found[name] + moment_GKK if name in found else moment_GKK

    hooks = [layer.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for batch in batches:
            module(*batch.to(device).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _patches(layer: Layer, x: Tensor, rows: int, chance: torch.Generator) -> Tensor:
    """(G, R, K) what outputs at R places are made of, with a 1 at the end where there is a bias."""
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        found = flat[_places(len(flat), rows, chance).to(x.device)][None]
    else:
        found = _windows(layer, x, rows, chance)
    ones = [] if layer.bias is None else [found.new_ones(*found.shape[:2], 1)]
    return torch.cat([found.float(), *ones], 2)


def _windows(layer: nn.modules.conv._ConvNd, x: Tensor, rows: int, chance: torch.Generator) -> Tensor:
    """(G, R, C / G * taps) of what a convolution reads for its outputs at R places."""
    taps, steps, apart = layer.kernel_size, layer.stride, layer.dilation
    x = x if x.dim() == len(taps) + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = pad(x, layer._reversed_padding_repeated_twice, mode)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], taps, steps, apart, strict=True)]
    place = _places(len(x) * prod(sizes), rows, chance)
    at = list(torch.unravel_index(place, (len(x), *sizes)))
    index: list[Tensor | slice] = [at[0].view(-1, *[1] * len(taps)), slice(None)]
    for axis, (k, s, d) in enumerate(zip(taps, steps, apart, strict=True)):
        shape = [1] * len(taps)
        shape[axis] = k
        index.append(at[axis + 1].view(-1, *[1] * len(taps)) * s + torch.arange(k).view(1, *shape) * d)
    found = x[tuple(part if isinstance(part, slice) else part.to(x.device) for part in index)]  # (R, taps..., C)
    return found.movedim(-1, 1).reshape(len(place), layer.groups, -1).transpose(0, 1)


def _places(there: int, wanted: int, chance: torch.Generator) -> Tensor:
    return torch.arange(there) if there <= wanted else torch.randint(there, (wanted,), generator=chance)


def _fit(model: MultiTaskModel, layer: Layer, name: str, moment_GKK: Tensor) -> None:
    """Fit a layer of the model in place to what `layer` answers on inputs of these second moments."""
    target, device = model.module.get_submodule(name), moment_GKK.device
    weights = {key: value for key, value in layer.named_parameters() if key in ("weight", "bias")}
    mask = {key: model.masks.get(f"{name}.{key}".lstrip(".")) for key in weights}
    masks = {key: torch.ones_like(value) if (m := mask[key]) is None else m for key, value in weights.items()}

    def rows(parts: Mapping[str, Tensor]) -> Tensor:
        each = [parts[key].to(device, torch.float64).reshape(len(parts[key]), -1) for key in parts]
        return torch.cat(each, 1).reshape(*moment_GKK.shape[:1], -1, moment_GKK.shape[-1])

    now_OK = _least_squares(rows(weights), rows(masks), moment_GKK).flatten(0, 1)
    sizes = [value[0].numel() for value in weights.values()]
    for (key, value), part in zip(weights.items(), torch.split(now_OK, sizes, 1), strict=True):
        kept = target.get_parameter(key)
        kept.copy_(part.reshape(value.shape).to(kept))


def _least_squares(was_GOK: Tensor, mask_GOK: Tensor, moment_GKK: Tensor) -> Tensor:
    """(G, O, K) the weights, zero where the mask is, whose answers differ least in the mean square.

    By conjugate gradients from the masked weights, all rows at once; each row is a problem of its own.
    """
    diagonal_GK = moment_GKK.diagonal(dim1=-2, dim2=-1)
    ridge = _RIDGE * diagonal_GK.mean() + torch.finfo(torch.float64).tiny
    moment_GKK = moment_GKK.clone()
    moment_GKK.diagonal(dim1=-2, dim2=-1).add_(ridge)
    scale_GOK = mask_GOK / moment_GKK.diagonal(dim1=-2, dim2=-1)[:, None]
    now = was_GOK * mask_GOK
    left = (was_GOK - now) @ moment_GKK
    step = scale_GOK * left
    size = first = (left * step).sum(-1, keepdim=True)
    for _ in range(_TURNS):
        if bool((size <= _ENOUGH * first).all()):
            break
        moved = step @ moment_GKK
        far = size / (step * moved).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        now, left = now + far * step, left - far * moved
        scaled = scale_GOK * left
        size, before = (left * scaled).sum(-1, keepdim=True), size
        step = scaled + size / before.clamp_min(torch.finfo(torch.float64).tiny) * step
    return now
