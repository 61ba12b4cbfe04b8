"""The README's two commands, run as a stranger would: a copy of the repository, an empty virtual environment each.

    python tools/bench/readme.py [--json FILE] [--quick]

--quick leaves out the second command (the tests).
"""

import re
import subprocess
import tempfile
import time
from pathlib import Path

from rows import Row, finish, options

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"^\$ (python3 -m venv .*)$", re.MULTILINE)


def run(command: str) -> float:
    """Seconds that a command takes in a fresh clone beside which ../shared is linked, when there is one here."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "taskpress"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        if (shared := ROOT.parent / "shared").is_dir():
            (Path(folder) / "shared").symlink_to(shared)
        begun = time.perf_counter()
        subprocess.run(["bash", "-euc", command], cwd=clone, check=True)
        return time.perf_counter() - begun


def main() -> None:
    given = options(__doc__).parse_args()
    main_job, tests = COMMAND.findall((ROOT / "README.md").read_text())
    rows = [Row("install and main job, seconds", "scenes", "", 2, run(main_job), 480, most=True)]
    if not given.quick:
        rows.append(Row("install and tests, seconds", "-", "", 2, run(tests), 600, most=True))
    finish(rows, given.json)


if __name__ == "__main__":
    main()
