"""What a compiled program runs, call by call: which kernel, for which layer, and how much work it is."""

from typing import Any

import numpy as np
import tvm
from pydantic import Field
from tvm import relax

from profiles.settings import Settings
from targets.choice import Choices
from targets.passes.walk import array_of, bindings, operator
from targets.records import Records


class Call(Settings):
    """One call of a kernel.

    Attributes:
        function: its name in the library.
        kernel: what it does, such as "winograd 4", "sparse", or the operators in it.
        layer: key of the layer whose candidates it was chosen from; empty where there was no choice.
        layout: of what it makes: "blocked", "regions" or "plain"; "int8" where an accelerator makes it.
        macs: multiply-adds that the layer takes by definition, zeros included; 0 where they are not counted.
        work: multiply-adds that this kernel does for them.
        density: share of the layer's weights that are not zero; 1 where there are none.
        instead: of a layer that could be dense or sparse, how many times as long the other would have taken.
        bytes: of everything it reads and writes, each once.
        weight_bytes: the constants among them.
        cycles: that an accelerator takes for it; 0 for what a processor computes.
        moved_bytes: that an accelerator reads from its memory and writes to it, each as often as it does.
    """

    function: str
    kernel: str
    layer: str
    layout: str
    macs: int
    work: int
    density: float
    instead: str
    bytes: int
    weight_bytes: int
    cycles: int = 0
    moved_bytes: int = 0

    @property
    def accelerated(self) -> bool:
        """Is it an accelerator's?"""
        return self.layout == "int8"


class Kernels(Settings):
    """What `kernels.json` says: calls in order, each layer's pick, and the records that decided."""

    schema_: str = Field(default="taskpress.kernels/1", alias="schema", pattern="^taskpress.kernels/1$")
    calls: tuple[Call, ...]
    picks: dict[str, str]
    records: Records

    def to_json(self) -> bytes:
        """As the file holds it."""
        return (self.model_dump_json(indent=1, by_alias=True) + "\n").encode()


def account(module: tvm.IRModule, choices: Choices) -> Kernels:
    """Every kernel call of a scheduled module's main function, in order."""
    occurrences = {layer: iter(found) for layer, found in choices.occurrences.items()}
    calls = []
    for binding in bindings(module):
        call = binding.value
        if operator(call) != "relax.call_tir":
            continue
        name, function = call.args[0].name_hint, module[call.args[0]]
        about = dict(function.attrs or {})
        layer = str(about.get("layer", ""))
        made, arguments = call.ty_args[0], list(call.args[1].fields)
        macs, density, instead = next(occurrences.get(layer, iter(())), (int(about.get("macs", 0)), 1.0, ""))
        weights = sum(array.nbytes for array in map(array_of, arguments) if array is not None)
        calls.append(
            Call(
                function=name,
                kernel=str(about.get("method", "")) or _named(name),
                layer=layer,
                layout=str(about.get("layout", "blocked" if _is_blocked(made) else "plain")),
                macs=macs,
                work=int(about.get("work", macs)),
                density=density,
                instead=instead,
                bytes=sum(_size(argument.ty) for argument in arguments) + _size(made),
                weight_bytes=weights,
            )
        )
    made_choices = choices.made.values()
    return Kernels(
        calls=tuple(calls),
        picks={choice.layer: choice.picked.name for choice in made_choices},
        records={choice.layer: dict(choice.seconds) for choice in made_choices if choice.seconds},
    )


def _named(function: str) -> str:
    """A generated name without its numbers: "fused_mean1_add" is mean + add."""
    parts = function.removeprefix("fused_").split("_")
    return " ".join(part.rstrip("0123456789") or part for part in parts)


def _size(kind: Any) -> int:
    if isinstance(kind, relax.TupleType):
        return sum(map(_size, kind.fields))
    return int(np.prod(_shape(kind))) * np.dtype(str(kind.dtype)).itemsize


def _is_blocked(kind: Any) -> bool:
    return not isinstance(kind, relax.TupleType) and len(_shape(kind)) == 5


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in kind.shape)
