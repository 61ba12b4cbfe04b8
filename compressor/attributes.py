"""Integers that a module's own code keeps about sizes, such as its number of heads, where a cut changes the size.

One in a tuple or list of its own counts as well, as the shape that a layer norm goes over.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.channels import ChannelMap
from compressor.errors import CompressError
from compressor.ids import distinct

MOST_TRIED = 16


def settings(
    network: fx.GraphModule, channels: ChannelMap, module: nn.Module, keep: Tensor
) -> Iterator[Sequence[Mapping[str, int]]]:
    """Values by attribute name to try in turn: none, all that may have to follow a cut, then fewer and fewer; those
    that go together in one mapping.

    A candidate is an attribute whose value is the old size of a dimension that shrinks in its module's own code.
    Modules of one class share their code, so that an attribute follows in all of them or in none.

    Args:
        network: traced from the uncut module.
        keep: bool by class.
    """
    shrinking: dict[str, set[tuple[int, int]]] = {}
    for node in network.graph.nodes:
        owner = _owner(node)
        ids = channels.values.get(node.name, [])
        for part in [ids] if isinstance(ids, Tensor) else ids:
            if owner is not None:
                shrinking.setdefault(owner, set()).update(_shrinking(part, keep))
    choices: dict[tuple[type, str, int], dict[str, int]] = {}
    for owner, sizes in shrinking.items():
        held = module.get_submodule(owner)
        if type(held).__module__.startswith("torch.") and not isinstance(held, nn.LayerNorm | nn.RMSNorm):
            continue  # torch's layers follow their tensors, but a norm may have none
        for name, value in vars(held).items():
            if (size := _size(value)) is not None:
                for rank, new in enumerate(sorted({new for old, new in sizes if old == size})):
                    choices.setdefault((type(held), name, rank), {})[f"{owner}.{name}".lstrip(".")] = new
    yield ()
    subsets = (chosen for count in range(len(choices), 0, -1) for chosen in combinations(choices.values(), count))
    yield from islice(subsets, MOST_TRIED)


def set_attributes(module: nn.Module, values: Mapping[str, int]) -> None:
    """Set integers by their dotted names.

    Raises:
        CompressError: the module has no integer of this name.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        held: Any = getattr(modules.get(path), last, None)
        if _size(held) is None:
            raise CompressError(f"The network has no integer '{name}' that could be set to {value}.")
        setattr(modules[path], last, value if isinstance(held, int) else type(held)([value]))


def _size(value: Any) -> int | None:
    """The integer that an attribute is or holds alone."""
    if type(value) in (tuple, list, torch.Size) and len(value) == 1:
        value = value[0]
    return value if type(value) is int else None


def _owner(node: fx.Node) -> str | None:
    """The innermost module whose forward made a node, by its name in the model."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    first, _, name = str(stack[-1][0]).partition(".") if stack else ("", "", "")
    return name if first == "module" else None


def _shrinking(ids: Tensor, keep: Tensor) -> set[tuple[int, int]]:
    """(old, new) size of each dimension that shrinks but does not vanish."""
    kept, found = keep[distinct(ids)], set()
    for dim, size in enumerate(ids.shape):
        others = [d for d in range(kept.dim()) if d != dim]
        left = int((kept.any(others) if others else kept).sum())
        if kept.shape[dim] == size and 0 < left < size:
            found.add((size, left))
    return found
