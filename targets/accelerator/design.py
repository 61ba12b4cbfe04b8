"""The sizes that a circuit is generated from and programs are compiled for."""

from typing import Literal, Self

from pydantic import Field, model_validator

from profiles.settings import Settings

WORD_BYTES = 8
"""The memory bus is 64 bits wide; addresses count such words."""


MOST_PARTS = 16
"""Turns that the lanes may take for all columns, and words that may be a row of parameters."""


class Design(Settings):
    """An array of multipliers with the memories around it; `rows`, `columns` and `lanes` are powers of two.

    The array multiplies `rows` input channels by `rows x columns` weights in each cycle. Activations lie in memory in
    blocks of `columns` channels, so a row of the input buffer holds `rows / columns` blocks.

    Attributes:
        rows: input channels of one tile of weights.
        columns: output channels of one tile, at most `rows`.
        lanes: channels that are requantized in each cycle, at most `columns` and at least a sixteenth of them.
        input_rows: rows of the input buffer, of `rows` bytes each.
        weight_rows: rows of the weight buffer, of `columns` bytes each; a tile takes `rows` of them.
        accumulator_rows: rows of each of the two banks of accumulators, of `columns` int32 each.
        side_rows: rows of the buffer of operands that are added or pooled, of `columns` bytes each.
        output_rows: rows of the output buffer, of `columns` bytes each.
        parameter_rows: rows of requantization parameters, of `lanes` words each.
        queue: instructions that each unit's queue holds.
        array_in: what the array multiplies in: the device's multipliers, or look-up tables where it has too few.
    """

    rows: int = Field(ge=8, le=64, default=16)
    columns: int = Field(ge=8, le=64, default=8)
    lanes: int = Field(ge=2, le=16, default=4)
    input_rows: int = Field(ge=64, le=2**14, default=2048)
    weight_rows: int = Field(ge=64, le=2**14, default=4096)
    accumulator_rows: int = Field(ge=32, le=2**10, default=1024)
    side_rows: int = Field(ge=32, le=2**12, default=2048)
    output_rows: int = Field(ge=32, le=2**12, default=2048)
    parameter_rows: int = Field(ge=16, le=2**10, default=512)
    queue: int = Field(ge=2, le=64, default=8)
    array_in: Literal["multipliers", "luts"] = "multipliers"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in ("rows", "columns", "lanes"):
            if (size := getattr(self, name)).bit_count() != 1:
                raise ValueError(f"'{name}' is {size}, which is no power of two")
        if self.columns > self.rows:
            raise ValueError(f"'columns' is {self.columns}, more than the {self.rows} 'rows'")
        if not self.columns // MOST_PARTS <= self.lanes <= self.columns:
            raise ValueError(f"'lanes' is {self.lanes}, not between 'columns' / {MOST_PARTS} and 'columns'")
        if self.weight_rows < 2 * self.rows:
            raise ValueError(f"'weight_rows' must hold two tiles, which are {2 * self.rows} rows")
        return self

    @property
    def multipliers(self) -> int:
        return self.rows * self.columns

    @property
    def blocks(self) -> int:
        """Channel blocks side by side in a row of the input buffer."""
        return self.rows // self.columns

    @property
    def block_words(self) -> int:
        """Bus words of one channel block of one pixel, or of one row of weights."""
        return self.columns // WORD_BYTES

    @property
    def buffers(self) -> dict[str, int]:
        """Bytes of memory on the chip, by what they hold."""
        return {
            "inputs": self.input_rows * self.rows,
            "weights": self.weight_rows * self.columns,
            "sums": 2 * 4 * self.accumulator_rows * self.columns,
            "side": self.side_rows * self.columns,
            "outputs": self.output_rows * self.columns,
            "parameters": self.parameter_rows * self.lanes * WORD_BYTES,
        }

    @property
    def parameter_block(self) -> int:
        """Rows of parameters that one POST reads: a header, then its channels."""
        return 1 + self.columns // self.lanes
