"""Finished work by key, so that a run which was killed goes on where it was and repeats nothing."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import CompressError

MARK = ".taskpress"
FACTS = "facts.json"


class Store:
    """A run's folder. Each entry is a folder named by its kind and key that appears whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, kind: str, key: str) -> Path:
        return self.directory / "work" / f"{kind}-{key[:16]}"

    def facts(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was recorded with an entry, or None when it is not there (or was not made by this key)."""
        file = self.path(kind, key) / FACTS
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if found.pop("key") == key else None

    @contextmanager
    def entry(self, kind: str, key: str, facts: dict[str, Any]) -> Iterator[Path]:
        """A temporary folder that becomes the entry when the block ends well; `facts` may be filled inside it.

        Raises:
            CompressError: the disk refuses; nothing is left behind.
        """
        final = self.path(kind, key)
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
            try:
                yield folder
                (folder / FACTS).write_text(json.dumps({"key": key, **facts}, indent=1), encoding="utf-8")
                sync(folder)
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def opened(directory: Path, resume: bool) -> Iterator[Store]:
    """A run's folder, made if need be and held by this process alone; without `resume` its finished work is dropped.

    Raises:
        CompressError: the folder holds something else, another run is using it, or it cannot be written.
    """
    with writing(directory):
        if directory.exists() and not (directory / MARK).exists() and any(directory.iterdir()):
            raise CompressError(f"'{directory}' is not empty and holds no run of this tool. Choose another --out.")
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / MARK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CompressError(
                f"Another run is working in '{directory}'. Wait for it, or choose another --out."
            ) from None
        for left in (directory / "work").glob(".new-*"):  # a killed run's unfinished entry
            shutil.rmtree(left, ignore_errors=True)
        if not resume:
            shutil.rmtree(directory / "work", ignore_errors=True)
        yield Store(directory)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusals into one clear message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EFBIG):
            raise CompressError(f"Cannot write '{path}': {error.strerror}. Nothing half-written was left.") from error
        raise


def sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
