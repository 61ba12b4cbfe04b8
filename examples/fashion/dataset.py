"""Fashion-MNIST as Debian packages it, and pictures of two of its items that overlap.

Sources: Xiao et al., "Fashion-MNIST", 2017 (MIT licence); two items in one picture after Sabour et al., "Dynamic
routing between capsules", NeurIPS 2017, at places that do not change, as Lin et al., "Pareto multi-task learning",
NeurIPS 2019.
"""

import gzip
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from compressor.errors import CompressError

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ITEM, SIZE, MOVES = 28, 36, 2
PARTS = ("train", "t10k")

Bytes = NDArray[np.uint8]


def check(root: Path) -> None:
    """Refuse a folder that lacks one of the four files.

    Raises:
        CompressError: with the package to install.
    """
    names = [f"{part}-{kind}.gz" for part in PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise CompressError(
            f"Fashion-MNIST is not there: no {', no '.join(missing)} in {root}. Install Debian's package with "
            "'apt-get install dataset-fashion-mnist', or set the workload's path 'root' to the folder that holds them."
        )


@cache
def items(root: Path, part: str) -> tuple[Bytes, Bytes]:
    """Pictures (n, 28, 28) and classes (n,) of "train" or "t10k", kept in memory for the life of the process.

    Raises:
        CompressError: a file is not what it should be.
    """
    pictures, classes = (_idx(root / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if pictures.shape != (len(classes), ITEM, ITEM) or not len(classes) or classes.max() >= len(CLASSES):
        raise CompressError(
            f"{root} holds for '{part}' pictures {pictures.shape} and labels {classes.shape}; "
            f"needed are (n, {ITEM}, {ITEM}) and (n,), with classes below {len(CLASSES)}."
        )
    return pictures, classes


def altered(pictures: Bytes, rng: np.random.Generator) -> Bytes:
    """(n, 28, 28) -> the same shape: each moved by up to two pixels either way, and mirrored at even odds."""
    count = len(pictures)
    padded = np.pad(pictures, ((0, 0), (MOVES, MOVES), (MOVES, MOVES)))
    down, along = rng.integers(2 * MOVES + 1, size=(2, count))
    moved: Bytes = sliding_window_view(padded, (ITEM, ITEM), axis=(1, 2))[np.arange(count), down, along]
    return np.where((rng.random(count) < 0.5)[:, None, None], moved[:, :, ::-1], moved)


def overlap(left: Bytes, right: Bytes) -> Bytes:
    """(n, 28, 28) twice -> (n, 36, 36): one in the upper left corner, one in the lower right, the brighter wins."""
    picture = np.zeros((len(left), SIZE, SIZE), np.uint8)
    picture[:, :ITEM, :ITEM] = left
    np.maximum(picture[:, -ITEM:, -ITEM:], right, out=picture[:, -ITEM:, -ITEM:])
    return picture


def _idx(file: Path) -> Bytes:
    """An idx file of unsigned bytes: 0, 0, 8, the number of axes, each one's length in four bytes, then the values."""
    try:
        data = gzip.decompress(file.read_bytes())
        zero, kind, axes = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{axes}I", data, 4)
        if (zero, kind) != (0, 8):
            raise ValueError("it holds no unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise CompressError(f"{file} cannot be read as an idx file: {error}.") from error
