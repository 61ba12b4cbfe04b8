"""Extract the pathway of a task set: the part of a network its answers need, and nothing else, exactly.

Three cuts, each without changing an answer: operators no chosen answer depends on; channels and slices of fused layers
that only other tasks read; channels every remaining reader of which has only zero weights (as masks leave them).
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from compressor.channels import FIXED, ChannelMap, Contraction, analyse
from compressor.cut import CannotCut, cut
from compressor.equivalence import EXACT, difference
from compressor.errors import CompressError
from compressor.graph import tensor_of, tensors_of
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.quantization.integers import Steps, steps_of
from compressor.trace import export, flatten, living, trace


@dataclass(frozen=True, slots=True)
class Pathway:
    """One task set's network.

    Attributes:
        network: traced graph, one output for each task in order.
        kept: indices kept of each cut tensor's dimensions, as MultiTaskModel.kept but relative to the whole model.
        macs, effective_macs: multiply-adds of one inference over the example inputs; those with a weight not zero.
        error: largest difference to the whole network, relative, as measured in float64.
        grids: by name, those of the tensors that lie on one.
    """

    tasks: tuple[str, ...]
    network: fx.GraphModule
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    macs: int
    effective_macs: int
    error: float
    grids: Mapping[str, Steps] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join(self.tasks)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the pathway reads, by its name in the whole model."""
        return tensors_of(self.network)

    def parameters(self, model: MultiTaskModel) -> int:
        """How many trained values are left (buffers such as batch-norm statistics not counted)."""
        trained = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name in trained)


def extract(model: MultiTaskModel, tasks: Sequence[str]) -> Pathway:
    """Cut the pathway of the named tasks and prove it on the example inputs.

    Raises:
        CompressError: no task, an unknown one or one named twice; or a pathway whose answers differ from the whole
            network's.
    """
    by_name = {task.name: task for task in model.tasks}
    if unknown := [name for name in tasks if name not in by_name]:
        raise CompressError(f"No task {', '.join(map(repr, unknown))}. Tasks: {', '.join(by_name)}.")
    if not tasks or len(set(tasks)) < len(tasks):
        raise CompressError(f"A pathway answers one task or more, each once; given: {', '.join(tasks) or 'none'}.")
    whole = trace(model, [by_name[name] for name in tasks])
    part, channels, need = _cut(whole, model)
    error = difference(whole, part, model.inputs)
    if not error <= EXACT:
        raise CompressError(
            f"The pathway of {'+'.join(tasks)} differs from the whole network by {error:.1e} of its answer; "
            "it was not used. Please report this network."
        )
    network = flatten(export(part, model.inputs))
    kept = _kept(channels, need)
    grids = {} if model.quantization is None else steps_of(whole, model.quantization)
    left = {name: steps.taken(kept.get(name, {})) for name, steps in grids.items()}
    return Pathway(tuple(tasks), network, kept, *count_macs(network), error, left)


def reach(model: MultiTaskModel) -> dict[str, dict[str, Tensor]]:
    """By task, for each trained tensor: bool, of the elements that its answer depends on, whatever their values."""
    probe = model.clone()
    with torch.no_grad():
        for parameter in probe.module.parameters():
            parameter.fill_(1.0)
    network, found = trace(probe), {}
    for position, task in enumerate(model.tasks):
        graph = fx.Graph()
        answers = graph.graph_copy(network.graph, {})
        graph.output((answers[position],))  # type: ignore[index]
        part, channels, need = _cut(living(fx.GraphModule(network, graph)), probe)
        found[task.name] = elements(probe, tensors_of(part), _kept(channels, need))
    return found


def elements(
    model: MultiTaskModel, read: Container[str], kept: Mapping[str, Mapping[int, Sequence[int]]]
) -> dict[str, Tensor]:
    """For each trained tensor that is named in `read`: bool, of its elements those at the kept indices."""
    found = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        if name not in read:
            continue
        found[name] = torch.ones(parameter.shape, dtype=torch.bool)
        for dim, indices in kept.get(name, {}).items():
            side = torch.zeros(parameter.shape[dim], dtype=torch.bool)
            side[list(indices)] = True
            found[name] &= side.reshape([-1 if d == dim else 1 for d in range(parameter.dim())])
    return found


def needed(network: fx.GraphModule, channels: ChannelMap) -> Tensor:
    """Bool by class: does an output depend on it through a weight that is not zero? (FIXED always is needed.)"""
    need = torch.zeros(channels.class_count, dtype=torch.bool)
    need[FIXED] = True
    need |= channels.summed()  # no weight reads them
    reading = [
        (channels.axes[c.writes], channels.axes[c.reads], _links(network, c))
        for c in reversed(channels.contractions)
        if c.reads is not None
    ]
    while True:
        before = int(need.sum())
        for writes, reads, link_WR in reading:
            alive = need[writes]
            need[reads[link_WR[alive].any(0)]] = True
            if bool(alive.any()) and not bool(need[reads].any()):
                need[reads[0]] = True  # an operator without any input channel cannot be expressed
        if int(need.sum()) == before:
            return need


def _cut(whole: fx.GraphModule, model: MultiTaskModel) -> tuple[fx.GraphModule, ChannelMap, Tensor]:
    """The cut graph, with the analysis and the needs it was cut by."""
    resizable = model.module.state_dict().keys()
    hold: set[str] = set()
    while True:  # ends: `hold` grows at every turn, and a node that is held is copied as it is
        channels = analyse(whole, resizable, hold)
        need = needed(whole, channels)
        try:
            return cut(whole, channels, need), channels, need
        except CannotCut as error:
            hold.update(error.nodes)


def _kept(channels: ChannelMap, need: Tensor) -> dict[str, dict[int, tuple[int, ...]]]:
    """The needed indices of each dimension that is not needed whole."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), classes in channels.axes.items():
        if not need[classes].all():
            kept.setdefault(name, {})[dim] = tuple(need[classes].nonzero().flatten().tolist())
    return kept


def _links(network: fx.GraphModule, contraction: Contraction) -> Tensor:
    """(written, read) bool: is there a weight that is not zero between the two channels?"""
    weight = tensor_of(network, contraction.weight).detach()
    taps = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    return taps if contraction.writes.dim == 0 else taps.T
