"""Run a recipe again and again in one folder, each time killed at another point, and at last to the end.

    python tests/interrupted.py RECIPE FOLDER [MODULE.NAME:CALL ...]

A point is a function and which of its calls ends the process with SIGKILL. Each run is a fork of one process that has
imported (and traced once, which imports more) all there is. Prints a JSON list: for each run how it ended, and what
finished work then lay in the folder, with its times.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from compressor import pipeline, recipe
from compressor.export import to_program
from compressor.pathway import extract
from compressor.progress import Silent


def kill_at(point: str) -> None:
    place, _, call = point.partition(":")
    module, _, name = place.rpartition(".")
    holder = importlib.import_module(module)
    plain, calls = getattr(holder, name), iter(range(1, 1000))

    def deadly(*args: Any, **options: Any) -> Any:
        if next(calls) == int(call):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)

    setattr(holder, name, deadly)


def once(job: pipeline.Job, out: Path, point: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            if point:
                kill_at(point)
            pipeline.run(job, out, "compress run")
        finally:  # an exit with handlers would wait for threads that a fork does not have
            failed = sys.exc_info()[0] is not None
            if failed:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(out: Path) -> dict[str, int]:
    """Stored work and artifacts under their final names, each with the latest time of a file in it."""
    folders = [*(out / "work").glob("[!.]*"), *(out / "artifacts").glob("[!.]*")]
    return {
        str(folder.relative_to(out)): max(file.stat().st_mtime_ns for file in folder.iterdir()) for folder in folders
    }


def main() -> None:
    path, out, *points = sys.argv[1:]
    loaded, base = recipe.load(Path(path))
    job = pipeline.prepare(loaded, base, Silent())
    to_program(extract(job.model, ["kind"]), job.model.inputs)
    ends = [(once(job, Path(out), point), finished(Path(out))) for point in (*points, "")]
    json.dump(ends, sys.stdout)


main()
