"""Compile random small multi-task networks and compare them with eager PyTorch in float64, on every core.

    python tools/fuzz.py [FIRST [COUNT]]

Exit code 1 if any differs or fails; each line names the seed, which makes the same network anywhere.
"""

import logging
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def finding(seed: int) -> str:
    """What is wrong with the network of a seed; nothing where its answers are right."""
    from test_fuzz import differs

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        return differs(seed)
    except Exception as error:  # noqa: BLE001  whatever a network provokes is a finding; the next may provoke more
        return f"{type(error).__name__}: {str(error).strip()[-300:]}"


def main(first: int = 0, count: int = 250) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core
    seeds, begun, wrong = range(first, first + count), time.monotonic(), 0
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
        for seed, text in zip(seeds, workers.map(finding, seeds), strict=True):
            if text:
                wrong += 1
                print(f"seed {seed}: {text}", flush=True)
    print(f"{count} networks from seed {first}: {wrong} wrong, {time.monotonic() - begun:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:])))
