"""Trace a multi-task model into one flat graph of ATen operators whose outputs are the tasks' answers."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from compressor.errors import CompressError
from compressor.model import MultiTaskModel, answers
from compressor.workload import Task


class _Answers(nn.Module):
    """forward returns a tuple: one tensor for each task, cut from the shared output where tasks share one."""

    def __init__(self, module: nn.Module, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.module, self.tasks = module, tuple(tasks)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(answers(self.module(*inputs), self.tasks).values())


def trace(model: MultiTaskModel, tasks: Sequence[Task] | None = None) -> fx.GraphModule:
    """The model as a graph: parameters keep their names, one output for each task, dead code gone.

    Raises:
        CompressError: the network cannot be traced (data-dependent control flow, for example).
    """
    chosen = tuple(tasks or model.tasks)
    program = export(_Answers(model.module.eval(), chosen), model.inputs)
    return flatten(program, prefix="module.")


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """torch.export with this project's error."""
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise CompressError(
            f"The network cannot be traced by torch.export ({type(error).__name__}: {first}). "
            "Its forward must not branch on tensor values."
        ) from error


def flatten(program: ExportedProgram, prefix: str = "") -> fx.GraphModule:
    """An exported program as a plain graph module; `prefix` is taken off every tensor's name."""
    lifted = program.module(check_guards=False)
    graph, tensors = fx.Graph(), {}
    environment: dict[fx.Node, fx.Node] = {}
    for node in lifted.graph.nodes:
        new = graph.node_copy(node, lambda old: environment[old])
        if node.op == "get_attr":
            name = str(node.target)
            new.target = name.removeprefix(prefix)
            tensors[new.target] = _get(lifted, name)
        elif node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args)
            new.args = (tuple(environment[leaf] for leaf in leaves),)
        environment[node] = new
    flat = fx.GraphModule(tensors, graph)  # type: ignore[arg-type]
    flat.graph.eliminate_dead_code()
    return prune_tensors(flat)


def prune_tensors(network: fx.GraphModule) -> fx.GraphModule:
    """Recompile a graph, keeping only the tensors that it still reads."""
    used = {str(node.target): _get(network, str(node.target)) for node in network.graph.nodes if node.op == "get_attr"}
    return fx.GraphModule(used, network.graph).eval()  # type: ignore[arg-type]


def _get(module: nn.Module, name: str) -> Tensor:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        raise CompressError(f"The traced network reads {name}, a {type(found).__name__}; only tensors can be compiled.")
    return found
