"""Reading a traced graph: an operator's name, its arguments by name, the shape of its answer, the tensors it holds."""

import operator
from typing import Any

from torch import Tensor, fx, nn

from compressor.errors import CompressError


def name_of(node: fx.Node) -> str:
    """The ATen name without namespace and overload: "conv2d" for aten.conv2d.padding."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[-1] if schema is not None else str(node.target)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operator's schema, or else the schema's default, or else `default`."""
    schema = getattr(node.target, "_schema", None)
    if name in node.kwargs or schema is None:
        return node.kwargs.get(name, default)
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return declared.default_value if declared.has_default_value() else default
    return default


def with_argument(node: fx.Node, name: str, value: Any) -> tuple[Any, ...]:
    """A node's positional arguments with the one of this name, given or not, set to `value`."""
    declared = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = declared.index(name)
    given = [argument(node, n) for n in declared[: max(position + 1, len(node.args))]]
    given[position] = value
    return tuple(given)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The traced shape of a node's tensor."""
    return tuple(int(size) for size in node.meta["val"].shape)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter, buffer or plain tensor attribute by its dotted name.

    Raises:
        CompressError: what has this name is no tensor.
    """
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Tensor):
        raise CompressError(f"The network has no tensor '{name}' but a {type(found).__name__}; only tensors compile.")
    return found


def tensors_of(network: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that a graph reads, by name, in the order of first use."""
    return {str(n.target): tensor_of(network, str(n.target)) for n in network.graph.nodes if n.op == "get_attr"}
