"""The instructions: 128 bits, one of four units each, synchronised by tokens.

A unit takes its instructions in order. Before one starts it takes a token from each unit that it `waits` for; when it
is done it gives one to each that it `signals`. Nothing else orders the units, so what one writes and another reads
must lie between such a pair (`tokens.py` puts it there and checks it).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from operator import attrgetter
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from targets.errors import TargetError

BITS, BYTES = 128, 16


class Unit(IntFlag):
    """Who executes an instruction."""

    NONE = 0
    LOAD = 1
    GEMM = 2
    POST = 4
    STORE = 8


class Memory(IntEnum):
    """What LOAD fills."""

    INPUTS = 0
    WEIGHTS = 1
    SIDE = 2
    PARAMETERS = 3


class Source(IntEnum):
    """What POST reads."""

    ACCUMULATORS = 0
    SIDE = 1


class Reduce(IntEnum):
    """What POST makes of a window, channel by channel."""

    LARGEST = 0
    SUM = 1


@dataclass(frozen=True, slots=True)
class Bits:
    """Width of a field; fields are unsigned but where said."""

    width: int
    signed: bool = False

    @property
    def range(self) -> tuple[int, int]:
        return (-(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) if self.signed else (0, 2**self.width - 1)


U1, U2, U4, U8, U10 = (Bits(width) for width in (1, 2, 4, 8, 10))
U12, U14, U20, U26, S8 = Bits(12), Bits(14), Bits(20), Bits(26), Bits(8, signed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Rows of a buffer from memory: `ny` lines of `nx` entries each, with a frame of `pad` around them.

    An entry is a channel block of a pixel (INPUTS, SIDE), a row of a tile (WEIGHTS) or a row of parameters; it goes
    into its own row, which is the one after its predecessor's. Lines are `stride` words apart.

    Attributes:
        lane: which of the channel blocks of its row an entry of INPUTS is.
        row: of the buffer, of the first entry.
        address: of the first word of the first line.
    """

    UNIT: ClassVar = Unit.LOAD
    waits: Annotated[Unit, U4] = Unit.NONE
    signals: Annotated[Unit, U4] = Unit.NONE
    memory: Annotated[Memory, U2]
    lane: Annotated[int, U4] = 0
    row: Annotated[int, U14]
    address: Annotated[int, U26]
    ny: Annotated[int, U10] = 1
    nx: Annotated[int, U12]
    stride: Annotated[int, U20] = 0
    top: Annotated[int, U4] = 0
    bottom: Annotated[int, U4] = 0
    left: Annotated[int, U4] = 0
    right: Annotated[int, U4] = 0
    pad: Annotated[int, S8] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """One tile of weights times `ny * nx` rows of inputs, into as many rows of accumulators.

    Attributes:
        row: of the inputs, of the first pixel; `step_y` and `step_x` rows lie between lines and between pixels.
        weights: first row of the tile.
        row_out: of the accumulators; pixels go into rows one after the other.
        clear: whether sums start at zero, rather than at what the accumulators hold.
    """

    UNIT: ClassVar = Unit.GEMM
    waits: Annotated[Unit, U4] = Unit.NONE
    signals: Annotated[Unit, U4] = Unit.NONE
    row: Annotated[int, U14]
    weights: Annotated[int, U14]
    bank: Annotated[int, U1]
    row_out: Annotated[int, U10] = 0
    clear: Annotated[int, U1]
    ny: Annotated[int, U10] = 1
    nx: Annotated[int, U10]
    step_y: Annotated[int, U14] = 0
    step_x: Annotated[int, U8] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """`ny * nx` windows of accumulators or of the side buffer to int8 rows of the output buffer.

    Windows have `window_y` lines of `window_x` rows, the lines `line` rows apart; `step_y` and `step_x` rows lie
    between lines of windows and between windows.

    Attributes:
        bank, row: of the accumulators, and their first window's first row.
        side: first row of the side buffer's first window.
        parameters: row of the header; the channels' follow it.
        row_out: of the output buffer; the rows follow each other.
        add: whether the side buffer's windows are added to those of accumulators; all have one row then.
    """

    UNIT: ClassVar = Unit.POST
    waits: Annotated[Unit, U4] = Unit.NONE
    signals: Annotated[Unit, U4] = Unit.NONE
    source: Annotated[Source, U1]
    reduce: Annotated[Reduce, U1] = Reduce.LARGEST
    bank: Annotated[int, U1] = 0
    row: Annotated[int, U10] = 0
    parameters: Annotated[int, U10]
    row_out: Annotated[int, U12]
    ny: Annotated[int, U10] = 1
    nx: Annotated[int, U10]
    add: Annotated[int, U1] = 0
    side: Annotated[int, U12] = 0
    window_y: Annotated[int, U4] = 1
    window_x: Annotated[int, U4] = 1
    line: Annotated[int, U10] = 0
    step_y: Annotated[int, U12] = 0
    step_x: Annotated[int, U4] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Rows of the output buffer, one after the other, to `ny` lines of `nx` entries in memory."""

    UNIT: ClassVar = Unit.STORE
    waits: Annotated[Unit, U4] = Unit.NONE
    signals: Annotated[Unit, U4] = Unit.NONE
    row: Annotated[int, U12]
    address: Annotated[int, U26]
    ny: Annotated[int, U10] = 1
    nx: Annotated[int, U12]
    stride: Annotated[int, U20] = 0


Instruction = Load | Gemm | Post | Store
KINDS: tuple[type[Instruction], ...] = (Load, Gemm, Post, Store)
_OPCODE = Bits(4)


def layout(kind: type[Instruction]) -> dict[str, tuple[int, Bits]]:
    """First bit and width of each field, the opcode first."""
    return _LAYOUTS[KINDS.index(kind)][0]


def _laid_out(kind: type[Instruction]) -> tuple[dict[str, tuple[int, Bits]], dict[str, type[int]]]:
    """Where each field is, and what type its values have."""
    places, types, at = {"opcode": (0, _OPCODE)}, {}, _OPCODE.width
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        types[field.name], bits = get_args(hints[field.name])
        places[field.name] = at, bits
        at += bits.width
    assert at <= BITS, f"{kind.__name__} has {at} bits"
    return places, types


_LAYOUTS = tuple(_laid_out(kind) for kind in KINDS)


def _fields(kind: type[Instruction]) -> tuple[Any, list[tuple[str, int, int, int, int]]]:
    """What gets an instruction's values, and of each its name, first bit, range and mask."""
    places = {name: place for name, place in layout(kind).items() if name != "opcode"}
    return attrgetter(*places), [(name, at, *bits.range, 2**bits.width - 1) for name, (at, bits) in places.items()]


_FIELDS = tuple(_fields(kind) for kind in KINDS)


def encode(program: Iterable[Instruction]) -> bytes:
    """16 bytes each, least significant first.

    Raises:
        TargetError: a field does not fit its bits.
    """
    return b"".join(_word(one).to_bytes(BYTES, "little") for one in program)


def _word(one: Instruction) -> int:
    word = KINDS.index(type(one))
    values, fields = _FIELDS[word]
    for value, (name, at, low, high, mask) in zip(values(one), fields, strict=True):
        if not low <= value <= high:
            bits = mask.bit_length()
            raise TargetError(f"{type(one).__name__}.{name} is {int(value)}, but has {bits} bits ({low} to {high}).")
        word |= (int(value) & mask) << at  # of a flag, `&` is slow
    return word


def decode(program: bytes) -> Iterator[Instruction]:
    """The instructions that were encoded.

    Raises:
        TargetError: the length is no multiple of 16, a bit is set that no field has, or an opcode is unknown.
    """
    if len(program) % BYTES:
        raise TargetError(f"A program of {len(program)} bytes is not one of whole instructions of {BYTES} bytes.")
    for first in range(0, len(program), BYTES):
        word = int.from_bytes(program[first : first + BYTES], "little")
        opcode = word & (2**_OPCODE.width - 1)
        if opcode >= len(KINDS):
            raise TargetError(f"Instruction {first // BYTES} has the unknown opcode {opcode}.")
        try:
            one = KINDS[opcode](**_values(KINDS[opcode], word))
        except ValueError as error:
            raise TargetError(f"Instruction {first // BYTES} is damaged: {error}.") from error
        if _word(one) != word:
            raise TargetError(f"Instruction {first // BYTES} sets bits that {type(one).__name__} has not.")
        yield one


def _values(kind: type[Instruction], word: int) -> dict[str, Any]:
    places, types = _LAYOUTS[KINDS.index(kind)]
    found = {}
    for name, meaning in types.items():
        at, bits = places[name]
        value = word >> at & (2**bits.width - 1)
        over = bits.signed and value >= 2 ** (bits.width - 1)
        found[name] = meaning(value - over * 2**bits.width)
    return found
