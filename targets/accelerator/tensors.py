"""Where a tensor of activations lies in memory: blocks of channels, each with its pixels line by line."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Int8
from targets.accelerator.design import WORD_BYTES, Design


@dataclass(frozen=True, slots=True)
class Place:
    """int8 (channels, height, width), blocks of `design.columns` channels innermost, the last one filled up.

    Attributes:
        address: of the first word.
    """

    address: int
    channels: int
    height: int
    width: int

    def blocks(self, design: Design) -> int:
        return -(-self.channels // design.columns)

    def block_words(self, design: Design) -> int:
        """Words of one block, all of its pixels."""
        return self.height * self.width * design.block_words

    def words(self, design: Design) -> int:
        return self.blocks(design) * self.block_words(design)

    def at(self, block: int, y: int, x: int, design: Design) -> int:
        """Address of a pixel of a block."""
        return self.address + block * self.block_words(design) + (y * self.width + x) * design.block_words

    def read(self, memory: NDArray[np.uint8], design: Design) -> Int8:
        """The tensor in a memory image."""
        shape = self.blocks(design), self.height, self.width, design.columns
        packed = memory[self._bytes(design)].view(np.int8).reshape(shape)
        return packed.transpose(0, 3, 1, 2).reshape(-1, self.height, self.width)[: self.channels]

    def write(self, tensor: NDArray[Any], memory: NDArray[np.uint8], design: Design) -> None:
        """Put the tensor into a memory image; channels that it lacks of its last block are zero."""
        whole = np.zeros((self.blocks(design) * design.columns, self.height, self.width), np.int8)
        whole[: self.channels] = tensor
        packed = whole.reshape(-1, design.columns, self.height, self.width).transpose(0, 2, 3, 1)
        memory[self._bytes(design)] = packed.reshape(-1).view(np.uint8)

    def _bytes(self, design: Design) -> slice:
        return slice(self.address * WORD_BYTES, (self.address + self.words(design)) * WORD_BYTES)
