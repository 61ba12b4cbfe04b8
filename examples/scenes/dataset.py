"""Scenes as one array of records, rendered by two processes of their own and kept as long as this one lives."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CompressError

from .world import RECORD, SPLITS

WORKERS = 2


@cache
def scenes(split: str, count: int) -> NDArray[Any]:
    """The first `count` scenes of a split, (count,) of `RECORD`, read-only.

    Raises:
        CompressError: no such split, no scene asked for, or a renderer died.
    """
    if split not in SPLITS or count < 1:
        raise CompressError(f"No {count} scenes of split '{split}': splits are {', '.join(SPLITS)}, from 1 scene on.")
    records = np.zeros(count, RECORD)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda worker: _receive(records[worker::WORKERS], split, worker), range(WORKERS)))
    records.flags.writeable = False
    return records


def _receive(records: NDArray[Any], split: str, first: int) -> None:
    """Fill every record from a process that renders scenes first, first + WORKERS, ... to its standard output."""
    folder = Path(__file__).resolve().parent
    command = [sys.executable, "-m", f"{folder.name}.world", split, str(first), str(WORKERS), str(len(records))]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, env=os.environ | threads) as process:
        assert process.stdout is not None
        for number in range(len(records)):
            data = process.stdout.read(RECORD.itemsize)
            if len(data) < RECORD.itemsize:
                raise CompressError(
                    f"The renderer stopped after {number} of {len(records)} scenes with exit code {process.wait()}. "
                    f"Run it alone to see why: cd {folder.parent} && {' '.join(command)} | wc -c"
                )
            records[number] = np.frombuffer(data, RECORD)[0]
