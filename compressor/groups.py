"""Channel groups that can be pruned, and what each channel costs: read from the channel analysis of a model."""

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.attributes import settings
from compressor.channels import FIXED, Axis, ChannelMap, analyse
from compressor.equivalence import EXACT, difference
from compressor.errors import CompressError
from compressor.graph import tensor_of, tensors_of
from compressor.model import MultiTaskModel, some
from compressor.norms import SHRINKING, over_what_is_left
from compressor.trace import trace

IN_TRAINING = "In training"
"""What a cut's refusal begins with where the network still answers, but can no longer be trained."""


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that the same layers write: they compete with each other and share one width.

    Attributes:
        name: the first layer that writes them; all of them, joined by "+", where it also writes others.
        classes: one class of the channel analysis for each channel.
        span: how many channels of a layer go with a class at least: one, or as many as a head or a convolution's group
            has.
        layers: all that write them.
    """

    name: str
    classes: Tensor
    span: int = 1
    layers: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.classes)

    def step(self, multiple: int) -> int:
        """The least number of classes that are a multiple of so many channels."""
        return multiple // gcd(multiple, self.span)


@dataclass(frozen=True, slots=True)
class Prunable:
    """A model's groups and the cost of keeping any subset of its channels.

    Attributes:
        network: the model as it was traced.
        channels: the analysis of the whole model.
        groups: in graph order; classes that no group names stay.
        sizes: shape of each tensor of the model's state.
        trained: names of the parameters, one for each that is shared.
        shrinks: norms and means over channels may go over fewer.
    """

    network: fx.GraphModule
    channels: ChannelMap
    groups: tuple[Group, ...]
    sizes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    shrinks: bool = False

    @classmethod
    def of(
        cls, model: MultiTaskModel, tied: Iterable[tuple[Axis, Axis]] = (), *, shrinks: bool = False
    ) -> "Prunable":
        """Analyse the whole model, all tasks together.

        Args:
            tied: pairs of axes that lose the same indices, whatever the graph says.
            shrinks: norms and means over channels may go over fewer (`compressor.norms`).
        """
        network = trace(model)
        state = model.module.state_dict()
        channels = analyse(network, state, even=True, tied=tied, shrinks=shrinks)
        trained = frozenset(name for name, _ in model.module.named_parameters())
        sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return cls(network, channels, _groups(channels), sizes, trained, shrinks)

    @property
    def class_count(self) -> int:
        """Length of every bool or score by class."""
        return self.channels.class_count

    def reads(self) -> list[Axis]:
        """Axes of weights that read channels: zero there, and the channel is gone."""
        return list(dict.fromkeys(c.reads for c in self.channels.contractions if c.reads is not None))

    def written(self, group: Group) -> Axis:
        """The first axis that writes a group."""
        mine = set(group.classes.tolist())
        return next(c.writes for c in self.channels.contractions if mine & set(self.channels.axes[c.writes].tolist()))

    def whole(self, group: Group) -> list[Axis]:
        """Axes that hold every channel of a group once and nothing else."""
        mine, size = set(group.classes.tolist()), len(group) * group.span
        found = (axis for c in self.channels.contractions for axis in (c.writes, c.reads) if axis is not None)
        return [a for a in found if len(ids := self.channels.axes[a]) == size and mine == set(ids.tolist())]

    def held(self) -> list[str]:
        """Why layers stay whole: clauses that name them."""
        found = []
        for operator, layers in left_whole(self.channels).items():
            may = " ('shrink_norms' may let it go over fewer)" * (operator in SHRINKING and not self.shrinks)
            found.append(f"because of what {operator} does with their channels{may}: {some(layers)}")
        written = {c.weight.removesuffix(".weight"): self.channels.axes[c.writes] for c in self.channels.contractions}
        one = {layer: ids for layer, ids in written.items() if len(ids) > 1 and bool((ids == ids[0]).all())}
        if joined := [layer for layer, ids in one.items() if int(ids[0]) != FIXED]:
            found.append(f"because all their channels would have to go at once: {some(joined)}")
        return found

    def keep_all(self) -> Tensor:
        """Bool by class, all True: what callers then clear class by class."""
        return torch.ones(self.class_count, dtype=torch.bool)

    def kept(self, keep: Tensor) -> dict[Axis, Tensor]:
        """What MultiTaskModel.cut takes, for a bool by class."""
        return {axis: keep[ids].nonzero().flatten() for axis, ids in self.channels.axes.items() if not keep[ids].all()}

    def cut(self, model: MultiTaskModel, keep: Tensor) -> MultiTaskModel:
        """A copy without the channels, shown to answer as the model does when every weight that reads them is zero, and
        norms and means that may go over fewer channels go over what is left.

        Where the module's own code does not go along, integers that it keeps about sizes are tried at their new values;
        those without which it does are left. What only training runs, such as an auxiliary head, must run as well.

        Args:
            model: the one that was analysed, whatever its weights are now.
            keep: bool by class, True for FIXED.

        Raises:
            CompressError: the module's own code fixes a size or picks channels by number, so that it fails or answers
                otherwise once they are gone.
        """
        state = model.module.state_dict()
        now = {name: state.get(name, value).detach().clone() for name, value in tensors_of(self.network).items()}
        zeroed = fx.GraphModule(now, self.network.graph)
        self.silence(zeroed, keep)
        zeroed = over_what_is_left(zeroed, self.channels, keep)
        faults = []
        for chosen in settings(self.network, self.channels, model.module, keep):
            try:
                smaller = self._tried(model, zeroed, keep, chosen)
            except CompressError as error:
                faults.append(error)
                continue
            for one in list(chosen) if len(chosen) > 1 else ():
                fewer = [other for other in chosen if other is not one]
                with suppress(CompressError):
                    smaller, chosen = self._tried(model, zeroed, keep, fewer), fewer
            return smaller
        raise faults[0]

    def _tried(
        self, model: MultiTaskModel, zeroed: fx.GraphModule, keep: Tensor, chosen: Sequence[Mapping[str, int]]
    ) -> MultiTaskModel:
        """The cut copy with these attributes set.

        Raises:
            CompressError: it fails, or answers otherwise than the zeroed network.
        """
        smaller = model.clone()
        smaller.cut(self.kept(keep), {name: value for one in chosen for name, value in one.items()})
        try:
            with torch.no_grad():
                smaller.answers(*model.inputs)
            traced = trace(smaller)
        except Exception as error:
            raise CompressError(f"The network's code fixes a size that the cut changes: {error}") from error
        gap = difference(zeroed, traced, model.inputs)
        if not gap <= EXACT:
            raise CompressError(
                f"Without {int((~keep).sum())} of its channels the network answers otherwise (by {gap:.1e} of its "
                "answer) than with the weights that read them at zero: its code picks channels by number."
            )
        if (fault := _training_fault(smaller)) and not _training_fault(model):
            raise CompressError(f"{IN_TRAINING} the network's code fixes a size that the cut changes: {fault}")
        return smaller

    def silence(self, module: nn.Module, keep: Tensor) -> None:
        """Zero, in place, every weight of the model (or of its traced graph) that reads a class that is not kept.

        Of what a product of activations sums over, all that writes it and all that goes with it is zero.
        """
        reads, summed = set(self.reads()), self.channels.summed()
        with torch.no_grad():
            for axis, ids in self.channels.axes.items():
                gone = ~keep[ids] if axis in reads else ~keep[ids] & summed[ids]
                tensor_of(module, axis.tensor).index_fill_(axis.dim, gone.nonzero().flatten(), 0)

    def cost(self, keep: Tensor) -> tuple[int, int]:
        """(multiply-adds, parameters) when only some classes are kept.

        Args:
            keep: bool by class, True for FIXED.
        """
        left = {axis: int(keep[ids].sum()) for axis, ids in self.channels.axes.items()}
        macs = self.channels.whole_macs + sum(
            c.macs_per_pair * left[c.writes] * (left[c.reads] if c.reads is not None else 1)
            for c in self.channels.contractions
        )
        macs += sum(product.macs_per_index * int(keep[product.ids].sum()) for product in self.channels.products)
        return macs, self._parameters(left)

    def _parameters(self, left: Mapping[Axis, int]) -> int:
        total = 0
        for name in self.trained:
            size = 1
            for dim, full in enumerate(self.sizes[name]):
                size *= left.get(Axis(name, dim), full)
            total += size
        return total


def _training_fault(model: MultiTaskModel) -> str:
    """Why the module's forward fails on the example inputs while it trains; empty where it does not."""
    module, chances = model.clone().module.train(), (random.getstate(), np.random.get_state())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(*model.inputs)
    except Exception as error:  # noqa: BLE001 - the user's own code raises what it likes
        return str(error) or type(error).__name__
    finally:
        random.setstate(chances[0])
        np.random.set_state(chances[1])
    return ""


def left_whole(channels: ChannelMap) -> dict[str, list[str]]:
    """By operator: the layers none of whose channels can go because of it."""
    found: dict[str, list[str]] = {}
    for operator, weights in channels.mixed.values():
        found.setdefault(operator, []).extend(weight.removesuffix(".weight") for weight in weights)
    return found


def _groups(channels: ChannelMap) -> tuple[Group, ...]:
    """Classes by the set of layers that write them, in graph order; what is FIXED is in no group."""
    writers: dict[int, list[Axis]] = {}
    for axis in dict.fromkeys(c.writes for c in channels.contractions):
        for identity in torch.unique(channels.axes[axis]).tolist():
            if identity != FIXED:
                writers.setdefault(identity, []).append(axis)
    by_layers: dict[tuple[Axis, ...], list[int]] = {}
    for identity in _in_order(channels, writers):
        by_layers.setdefault(tuple(writers[identity]), []).append(identity)
    used = {axis for c in channels.contractions for axis in (c.writes, c.reads) if axis is not None}
    counts = [torch.bincount(channels.axes[axis], minlength=channels.class_count) for axis in used]
    return tuple(
        Group(
            name,
            torch.tensor(classes),
            min(int(count[classes[0]]) for count in counts if count[classes[0]]),
            tuple(dict.fromkeys(axis.tensor.removesuffix(".weight") for axis in axes)),
        )
        for name, (axes, classes) in zip(_names(list(by_layers)), by_layers.items(), strict=True)
    )


def _names(groups: list[tuple[Axis, ...]]) -> list[str]:
    """The shortest name of each that no other has: its first layer, all its layers, or the dimensions as well."""
    layers = [[axis.tensor.removesuffix(".weight") for axis in axes] for axes in groups]
    spelled = [
        [names[0] for names in layers],
        ["+".join(names) for names in layers],
        ["+".join(f"{n}.{axis.dim}" for n, axis in zip(*one, strict=True)) for one in zip(layers, groups, strict=True)],
    ]
    return [next(names[k] for names in spelled if names.count(names[k]) == 1) for k in range(len(groups))]


def _in_order(channels: ChannelMap, wanted: Iterable[int]) -> list[int]:
    """Classes in the order the graph first writes them."""
    seen: dict[int, None] = {}
    for contraction in channels.contractions:
        seen.update(dict.fromkeys(channels.axes[contraction.writes].tolist()))
    wanted = set(wanted)
    return [identity for identity in seen if identity in wanted]
