"""Compile random small multi-task networks and compare them with eager PyTorch in float64.

    python tools/fuzz.py [FIRST [COUNT]]

Exit code 1 if any differs or fails; each line names the seed, which makes the same network anywhere.
"""

import logging
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_fuzz import differs  # noqa: E402


def main(first: int = 0, count: int = 250) -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    begun, wrong = time.monotonic(), 0
    for seed in range(first, first + count):
        try:
            text = differs(seed)
        except Exception as error:  # noqa: BLE001  whatever a network provokes is a finding; the next may provoke more
            text = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        if text:
            wrong += 1
            print(f"seed {seed}: {text}", flush=True)
    print(f"{count} networks from seed {first}: {wrong} wrong, {time.monotonic() - begun:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:])))
