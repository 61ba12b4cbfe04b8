"""What a network's channels cost, kept up to date while channels are dropped."""

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import Tensor

from compressor.channels import Axis
from compressor.groups import Prunable

Costs = tuple[int, int]
Term = tuple[int, int, tuple[Axis, ...]]
"""Which cost (0 multiply-adds, 1 parameters), a constant, and the axes whose lengths multiply it."""


class Ledger:
    """(multiply-adds, parameters) of a shrinking network.

    Both are sums of products of axis lengths: a contraction is its work per channel pair times the channels written and
    read, a product of activations its work per index times the indices, a tensor the product of its axes. Dropping
    channels changes only the products over the axes they are on, so a question about one group costs the same however
    large the network is.

    Attributes:
        now: what the network costs with the channels that are left.
    """

    def __init__(self, prunable: Prunable) -> None:
        axes = {**prunable.channels.axes, **_products(prunable)}
        self._length = {axis: len(ids) for axis, ids in axes.items()}
        self._terms = [*_contractions(prunable), *_tensors(prunable)]
        self._over: dict[Axis, list[int]] = {axis: [] for axis in axes}
        for index, (_, _, factors) in enumerate(self._terms):
            for axis in set(factors):
                self._over[axis].append(index)
        self._on: dict[int, list[tuple[Axis, int]]] = {}
        for axis, ids in axes.items():
            for identity, count in Counter(ids.tolist()).items():
                self._on.setdefault(identity, []).append((axis, count))
        self.now: Costs = self._cost(range(len(self._terms)), self._length)

    def saving(self, classes: Iterable[int]) -> Costs:
        """What dropping these classes would take off `now`."""
        after = dict(self._lengths_without(classes))
        touched = {index for axis in after for index in self._over[axis]}
        macs, parameters = self._cost(touched, self._length)
        left_macs, left_parameters = self._cost(touched, ChainMap(after, self._length))
        return macs - left_macs, parameters - left_parameters

    def drop(self, classes: Iterable[int]) -> None:
        """Take classes off; each may be dropped once."""
        gone = list(classes)
        macs, parameters = self.saving(gone)
        self._length.update(self._lengths_without(gone))
        self.now = self.now[0] - macs, self.now[1] - parameters

    def touching(self, classes: Iterable[int]) -> set[int]:
        """Names for the products these classes are part of: two groups with none in common do not affect each other."""
        return {index for identity in classes for axis, _ in self._on[identity] for index in self._over[axis]}

    def _lengths_without(self, classes: Iterable[int]) -> Iterable[tuple[Axis, int]]:
        gone: dict[Axis, int] = {}
        for identity in classes:
            for axis, count in self._on[identity]:
                gone[axis] = gone.get(axis, 0) + count
        return ((axis, self._length[axis] - count) for axis, count in gone.items())

    def _cost(self, terms: Iterable[int], length: Mapping[Axis, int]) -> Costs:
        costs = [0, 0]
        for index in terms:
            kind, constant, factors = self._terms[index]
            costs[kind] += constant * prod(length[axis] for axis in factors)
        return costs[0], costs[1]


def _contractions(prunable: Prunable) -> Iterator[Term]:
    yield 0, prunable.channels.whole_macs, ()
    for found in prunable.channels.contractions:
        yield 0, found.macs_per_pair, (found.writes,) if found.reads is None else (found.writes, found.reads)
    for axis, product in zip(_products(prunable), prunable.channels.products, strict=True):
        yield 0, product.macs_per_index, (axis,)


def _products(prunable: Prunable) -> dict[Axis, Tensor]:
    """The dimension of each product of activations that can shrink, named as a tensor's would be."""
    return {Axis(f"{k} {found.node}", 0): found.ids for k, found in enumerate(prunable.channels.products)}


def _tensors(prunable: Prunable) -> Iterator[Term]:
    for name in sorted(prunable.trained):
        axes = [Axis(name, dim) for dim in range(len(prunable.sizes[name]))]
        free = tuple(axis for axis in axes if axis in prunable.channels.axes)
        yield 1, prod(prunable.sizes[name][axis.dim] for axis in axes if axis not in free), free
