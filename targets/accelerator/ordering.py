"""In which order instructions go to their units: loads run ahead of what needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from targets.accelerator.design import Design
from targets.accelerator.isa import Instruction, Load, Store


@dataclass(slots=True)
class Group:
    """What is computed together, and what must be loaded for it.

    Attributes:
        constants: loads that can be done long before, as they read no answer of a layer.
        inputs: loads of activations.
        work: everything else.
        layer: its number.
    """

    constants: list[Instruction] = field(default_factory=list)
    inputs: list[Load] = field(default_factory=list)
    work: list[Instruction] = field(default_factory=list)
    layer: int = 0


Owned = tuple[Instruction, int]
"""An instruction, and the number of the layer that it is for."""


def ordered(groups: Sequence[Group], design: Design) -> list[Owned]:
    """All instructions: what a group needs is loaded while the one before it is computed.

    But what that one stores itself is loaded after it.
    """
    found, late = list[Owned](), list[Owned]()
    for now, after in zip([Group(), *groups], [*groups, Group()], strict=True):
        stores = [one for one in now.work if isinstance(one, Store)]
        ahead = [one for one in after.inputs if not any(_meets(one, store, design) for store in stores)]
        found += late
        found += _spread([(one, now.layer) for one in now.work],
                         [(one, after.layer) for one in (*after.constants, *ahead)])  # fmt: skip
        late = [(one, after.layer) for one in after.inputs if one not in ahead]
    return found


def _spread(work: Sequence[Owned], loads: Sequence[Owned]) -> Iterator[Owned]:
    """Both in their order, the loads evenly between the rest."""
    done = 0
    if not work:
        yield from loads
    for index, one in enumerate(work):
        until = len(loads) * (index + 1) // len(work)
        yield from loads[done:until]
        yield one
        done = until


def _meets(load: Load, store: Store, d: Design) -> bool:
    """Might a load read what a store writes? Lines are taken for all that lies between the first and the last."""
    ends = [one.address + one.stride * (one.ny - 1) + one.nx * d.block_words for one in (load, store)]
    return load.address < ends[1] and store.address < ends[0]
