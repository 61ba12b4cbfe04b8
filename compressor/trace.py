"""Trace a multi-task model into one flat, functional graph of ATen operators whose outputs are the tasks' answers."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from compressor.errors import CompressError
from compressor.graph import name_of, tensor_of, tensors_of
from compressor.quantization.simulate import computed, folded, quantized
from compressor.tensors import names_of
from compressor.workload import Task, answers

if TYPE_CHECKING:
    from compressor.model import MultiTaskModel

_REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""Operators that run a part of the graph in another mode, and which argument that part is."""


class _Answers(nn.Module):
    """forward returns a tuple: one tensor for each task, cut from the shared output where tasks share one."""

    def __init__(self, module: nn.Module, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.module, self.tasks = module, tuple(tasks)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(answers(self.module(*inputs), self.tasks).values())


def trace(model: "MultiTaskModel", tasks: Sequence[Task] | None = None) -> fx.GraphModule:
    """The model as a graph: parameters keep their names, one output for each task, dead code gone.

    The module is put into evaluation mode. A tensor that the module holds under several names appears under its first.
    Of a quantized model batch norms are folded, and values and weights rounded to their grids.

    Raises:
        CompressError: the network cannot be traced (data-dependent control flow, for example), or its forward
            overwrites its inputs or its own state.
    """
    network = as_brought(model, model.inputs, tasks)
    return network if model.quantization is None else computed(quantized(folded(network), model.quantization))


def as_brought(
    model: "MultiTaskModel", inputs: tuple[Tensor, ...], tasks: Sequence[Task] | None = None
) -> fx.GraphModule:
    """`trace` in floating point, for inputs of these shapes: their number in a batch may differ from the examples'."""
    program = export(_Answers(model.module.eval(), tuple(tasks or model.tasks)), inputs)
    first = {f"module.{name}": names[0] for names in names_of(model.module) for name in names}
    return flatten(program, first)


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """torch.export without in-place operators, with this project's errors.

    An in-place operator would otherwise keep what only other tasks need alive, as its effect cannot be seen locally.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on recurrent layers, nothing a user can act on
            program = torch.export.export(module, inputs, strict=False)
            if _mutates(program):
                program = program.run_decompositions({})
    except Exception as error:  # its many errors have no common base
        first = str(error).strip().split("\n", 1)[0]
        raise CompressError(
            f"The network cannot be traced by torch.export ({type(error).__name__}: {first}). "
            "Its forward must not branch on tensor values."
        ) from error
    if _mutates(program):
        raise CompressError("The network's forward overwrites values in a region under autocast; take it out of there.")
    for node in program.graph.nodes:
        sizes = [
            size for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor) for size in value.shape
        ]
        if not all(isinstance(size, int) for size in sizes):
            raise CompressError(
                f"The shape that {name_of(node)} gives depends on values; the shapes in an artifact are fixed."
            )
    signature = program.graph_signature
    if signature.user_inputs_to_mutate:
        raise CompressError("The network's forward overwrites its input; let it work on a copy: x = x.clone().")
    if signature.buffers_to_mutate:
        names = ", ".join(name.removeprefix("module.") for name in signature.buffers_to_mutate.values())
        raise CompressError(f"The network's forward changes its own state ({names}) at every call; an artifact cannot.")
    return program


def flatten(program: ExportedProgram, names: Mapping[str, str] | None = None) -> fx.GraphModule:
    """An exported program as a plain graph module; `names` renames tensors."""
    lifted = program.module(check_guards=False)
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    assert isinstance(lifted, fx.GraphModule)
    graph.output(_copied(lifted, {}, graph, tensors, names or {}))
    return living(fx.GraphModule(tensors, graph))


def _copied(
    part: fx.GraphModule, known: Mapping[fx.Node, fx.Node], graph: fx.Graph, tensors: dict[str, Tensor],
    names: Mapping[str, str],
) -> tuple[fx.Node, ...]:
    """Copy a graph to the end of another, regions in their place; what it answers there."""
    environment: dict[fx.Node, Any] = dict(known)
    for node in part.graph.nodes:
        if node in environment or name_of(node).startswith("_assert"):  # what the tracer saw of types
            continue
        if node.op == "output":
            break
        if node.op == "get_attr" and isinstance(getattr(part, str(node.target), None), fx.GraphModule):
            if odd := [name_of(user) for user in node.users if name_of(user) not in _REGIONS]:
                raise CompressError(f"The network's forward uses {odd[0]}, which runs parts of it by turns.")
            continue
        if name_of(node) in _REGIONS:
            at = _REGIONS[name_of(node)]
            region, given = getattr(part, str(node.args[at].target)), map(environment.__getitem__, node.args[at + 1 :])
            if name_of(node) == "wrap_with_autocast":
                _refuse_halves(*node.args[:3])
            places = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
            environment[node] = _copied(region, dict(zip(places, given, strict=True)), graph, tensors, names)
        elif name_of(node) == "getitem" and isinstance(environment[node.args[0]], tuple):
            environment[node] = environment[node.args[0]][node.args[1]]
        else:
            new = environment[node] = graph.node_copy(node, environment.__getitem__)
            if node.op == "get_attr":
                old = str(node.target)
                new.target = names.get(old, old)
                tensors[str(new.target)] = tensor_of(part, old)
    return tuple(environment[leaf] for leaf in tree_leaves(node.args))


def _refuse_halves(device: str, precision: torch.dtype, enabled: bool) -> None:
    """A region under autocast is nothing where that is off, or for another device than the network is traced on."""
    if enabled and device == "cpu":
        raise CompressError(
            f"The network's forward computes a part under torch.autocast('cpu') in {precision}; answers are compared "
            "with what it answers in float32. Take autocast out of forward."
        )


def living(network: fx.GraphModule) -> fx.GraphModule:
    """A functional graph with only the operators and tensors that its outputs need.

    torch.fx by itself would keep what could draw random numbers, such as another task's dropout or recurrent layer.
    """
    network.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(tensors_of(network), network.graph).eval()


def _mutates(program: ExportedProgram) -> bool:
    """Whether an operator overwrites what it is given, in regions too."""
    parts = [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    schemas = (getattr(node.target, "_schema", None) for part in parts for node in part.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)
