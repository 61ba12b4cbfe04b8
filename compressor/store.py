"""Finished work by key, so that a run which was killed goes on where it was and repeats nothing."""

import errno
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compressor.errors import CompressError
from targets.artifact import sync

MARK = ".taskpress"
FACTS = "facts.json"
LEFTOVERS = ("work/.new-*", "artifacts/.*", ".report.*", ".sweep.*", ".chosen.*")
"""What a killed run may leave: unfinished entries, artifacts and reports, none of them under its final name."""

_PARTIAL = ".partial-"

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Store:
    """A run's folder. Each entry is a folder named by its kind and key that appears whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, kind: str, key: str) -> Path:
        return self.directory / "work" / f"{kind}-{key[:16]}"

    def facts(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was recorded with an entry, or None when it is not there (or was not made by this key).

        Raises:
            CompressError: the entry was damaged since.
        """
        file = self.path(kind, key) / FACTS
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found if found.pop("key") == key else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressError(f"'{file}' is damaged ({error}). Remove its folder, or use --no-resume.") from error

    def partial(self, kind: str, key: str) -> Path:
        """Where an entry that is being made may keep what a killed run goes on from; other entries' leftovers go."""
        folder = self._partial(kind, key)
        self.drop_partial(but=folder)
        return folder

    def _partial(self, kind: str, key: str) -> Path:
        return self.directory / "work" / f"{_PARTIAL}{kind}-{key[:16]}"

    def drop_partial(self, but: Path | None = None) -> None:
        """Remove what entries left while they were being made."""
        for folder in self.directory.glob(f"work/{_PARTIAL}*"):
            if folder != but:
                shutil.rmtree(folder)

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
                if final.exists():
                    shutil.rmtree(final)
                folder.rename(final)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


class Follower(Store):
    """The folder of a run that another process writes: here it is only read, and what would be kept in it is not."""

    def partial(self, kind: str, key: str) -> Path:
        return self._partial(kind, key)

    def drop_partial(self, but: Path | None = None) -> None:
        del but

    @contextmanager
    def entry(self, kind: str, key: str, facts: dict[str, Any]) -> Iterator[Path]:
        del kind, key, facts
        with tempfile.TemporaryDirectory(prefix="taskpress-") as folder:
            yield Path(folder)


def key_of(*facts: object) -> str:
    """SHA-256 of what decides a piece of work (JSON values), and of the code that does it."""
    return hashlib.sha256(json.dumps([_code(), *facts], sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the code whose change makes stored work stale: all of this package but what draws reports."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for source in sorted(here.rglob("*.py")):
        if source.relative_to(here).parts[0] != "report":
            sha.update(source.read_bytes())
    return sha.hexdigest()


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
        except BlockingIOError:
            raise CompressError(
                f"Another run is working in '{directory}'. Wait for it, or choose another --out."
            ) from None
        with writing(directory):
            _tidy(directory, resume)
        yield Store(directory)


def _tidy(directory: Path, resume: bool) -> None:
    for left in (path for pattern in LEFTOVERS for path in directory.glob(pattern)):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not resume and (directory / "work").exists():
        shutil.rmtree(directory / "work")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusals into one clear message; an error about a file elsewhere passes through."""
    try:
        yield
    except SafetensorError as error:  # raised for a failed write, without an errno
        raise CompressError(f"Cannot write '{path}': {error}. Nothing half-written was left.") from error
    except OSError as error:
        beside = error.filename is not None and Path(str(error.filename)).is_relative_to(path.parent)
        if error.errno in DISK or beside:
            raise CompressError(f"Cannot write '{path}': {error.strerror}. Nothing half-written was left.") from error
        raise
