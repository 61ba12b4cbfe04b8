"""What a quantized model answers: its trace for the shapes of the inputs, kept, reading the module's own tensors."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from compressor.errors import CompressError
from compressor.quantization.simulate import folded, quantized
from compressor.tensors import tensors_by_name
from compressor.trace import as_brought

if TYPE_CHECKING:
    from compressor.model import MultiTaskModel


class Simulation:
    """The graphs of one model, one for each set of input shapes; they see what its module's tensors are now."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[torch.Size, ...], fx.GraphModule] = {}

    def __call__(self, model: "MultiTaskModel", inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One tensor for each task.

        Raises:
            CompressError: the network does other things with inputs of this shape than with its examples.
        """
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = _graph(model, inputs)
        graph = self._graphs[shapes]
        _bind(graph, model, inputs[0].device)
        return dict(zip((task.name for task in model.tasks), graph(*inputs), strict=True))


def _graph(model: "MultiTaskModel", inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    assert model.quantization is not None
    network = folded(as_brought(model, inputs))
    names = {node.name for node in network.graph.nodes}
    if strange := sorted({*model.quantization.values, *model.quantization.scales} - names):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise CompressError(
            f"With inputs of shape {shapes} the network's code does not compute '{strange[0]}', which it does with its "
            "example inputs; only networks whose code is the same for every batch size can be quantized."
        )
    return quantized(network, model.quantization)


def _bind(graph: fx.GraphModule, model: "MultiTaskModel", device: torch.device) -> None:
    """Give a graph the module's tensors as they are now, which moving a module to a device replaces."""
    now = tensors_by_name(model.module)
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, last = str(node.target).rpartition(".")
        owner = graph.get_submodule(path)
        held = getattr(owner, last)
        wanted = now.get(str(node.target))
        if wanted is None:
            wanted = held.to(device)
        if wanted is not held:
            setattr(owner, last, wanted)
