"""The artifact folder: written whole or not at all, and verified file by file before anything of it is opened."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, resources
from pathlib import Path

from pydantic import ValidationError

from profiles.settings import faults
from targets.base import Artifact, BuildPlan, Manifest, Tensor
from targets.errors import TargetError

MANIFEST = "manifest.json"
LIBRARY = "model.so"
MODEL = "model.onnx"
KERNELS = "kernels.json"
LOADER = "run.py"


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary folder beside `directory` that takes its place when the block ends well, and vanishes otherwise.

    An artifact that stands there already is replaced; anything else is refused.

    Raises:
        TargetError: `directory` holds something that is no artifact, or the disk refuses (full, read-only).
    """
    if directory.exists() and not _replaceable(directory):
        raise TargetError(f"'{directory}' exists and is no artifact, so it is left alone. Choose another folder.")
    folder = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield folder
        sync(folder)
        _replace(folder, directory)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise TargetError(f"Cannot write the artifact '{directory}': {why}. Nothing was left behind.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def seal(
    folder: Path, plan: BuildPlan, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...],
    extra: Mapping[str, bytes], about: Mapping[str, object],
) -> None:
    """Add model, account, loader, the caller's files and last the manifest to a folder that holds the library.

    Raises:
        TargetError: an extra file whose name is a path or is taken.
    """
    own = {name: plan.files[name] for name in (MODEL, KERNELS) if name in plan.files}
    own |= {LOADER: resources.files("targets").joinpath("loader.py.txt").read_bytes()}
    for name in extra:
        if Path(name).name != name or name.startswith(".") or name in {*own, MANIFEST, LIBRARY}:
            raise TargetError(f"Cannot add '{name}' to an artifact: the name must be a plain, free file name.")
    for name, content in {**own, **extra}.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        schema="taskpress.artifact/1", program=plan.program.name, tasks=plan.program.tasks,
        inputs=inputs, outputs=outputs,
        normalisation=plan.program.normalisation, target=plan.target, device=plan.device,
        versions=versions(), plan=plan.digest(),
        files={file.name: _sha256(file) for file in sorted(folder.iterdir())}, about=dict(about),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")


def read(directory: Path) -> Artifact:
    """The artifact in a folder, every file checked against its manifest; nothing is loaded.

    Raises:
        TargetError: no manifest, another schema, a file missing, added, changed or linked, a path that leads outside.
    """
    where = f"Artifact '{directory}'"
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TargetError(f"{where} has no {MANIFEST}: it is no artifact, or an unfinished one.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{where}: {MANIFEST} cannot be read: {error}.") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise TargetError("\n".join(faults(error, Manifest, f"{where}: {MANIFEST}"))) from error
    _verify(directory, manifest, where)
    return Artifact(directory, manifest)


def versions() -> dict[str, str]:
    """Of everything that shapes the code of an artifact."""
    return {name: _version(name) for name in ("taskpress", "apache-tvm", "onnx", "numpy")}


def _verify(directory: Path, manifest: Manifest, where: str) -> None:
    for name in manifest.files:
        if Path(name).name != name:
            raise TargetError(f"{where}: the manifest names '{name}', which leads out of the folder.")
    present = {entry.name: entry for entry in directory.iterdir() if entry.name != MANIFEST}
    links = sorted(name for name, entry in present.items() if entry.is_symlink() or not entry.is_file())
    if links or (directory / MANIFEST).is_symlink():
        raise TargetError(f"{where}: {', '.join(links) or MANIFEST} is no regular file; an artifact has no other.")
    if missing := sorted(manifest.files.keys() - present):
        raise TargetError(f"{where} lacks {', '.join(missing)}. Copy the whole folder, or build it again.")
    if added := sorted(present.keys() - manifest.files):
        raise TargetError(f"{where} holds {', '.join(added)}, which its manifest does not name. Remove it.")
    with ThreadPoolExecutor() as pool:  # the library and the model are of about the same size
        found = dict(zip(manifest.files, pool.map(_sha256, (present[name] for name in manifest.files)), strict=True))
    for name, digest in manifest.files.items():
        if found[name] != digest:
            raise TargetError(f"{where}: {name} differs from its manifest (SHA-256). Copy or build it again.")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "run from source"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / MANIFEST).exists() or not any(directory.iterdir()))


def sync(folder: Path) -> None:
    """Have a folder and the files in it on the disk before it gets its name."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(folder: Path, directory: Path) -> None:
    folder.chmod(0o755)
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        try:
            directory.rename(old / "artifact")
            folder.rename(directory)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(directory)
