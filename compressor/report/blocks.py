"""What a section is made of; `page.html` draws each kind of block and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from markupsafe import Markup

Tone = Literal["", "good", "bad", "warn", "quiet"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a tone, where a plain string will not do; no tone is said by colour alone."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Lines:
    """One verdict a line."""

    kind: ClassVar[str] = "lines"
    lines: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """Headline figures: (figure, what it is)."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; `align` has one letter a column, l or r. A `folded` table opens on a click on its caption."""

    kind: ClassVar[str] = "table"
    head: tuple[str, ...]
    align: str
    rows: tuple[tuple[str | Cell, ...], ...]
    caption: str = ""
    folded: bool = False

    @property
    def cells(self) -> tuple[tuple[tuple[str, Cell], ...], ...]:
        """Each row's (alignment, cell)."""
        return tuple(
            tuple((a, cell if isinstance(cell, Cell) else Cell(cell)) for a, cell in zip(self.align, row, strict=True))
            for row in self.rows
        )


@dataclass(frozen=True, slots=True)
class Drawing:
    """An inline SVG and what it shows."""

    kind: ClassVar[str] = "drawing"
    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures in rows under common column heads; each is a base64 PNG, or None."""

    kind: ClassVar[str] = "gallery"
    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Code:
    """Text as written."""

    kind: ClassVar[str] = "code"
    text: str


Block = Lines | Text | Tiles | Table | Drawing | Gallery | Facts | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the page; `lead` says in a sentence how to read it."""

    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
