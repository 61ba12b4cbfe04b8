"""Make the workload a recipe names: its code runs, so it is only ever taken from the recipe or the command line."""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from compressor.errors import CompressError
from compressor.workload import Workload
from profiles.settings import did_you_mean


def make_workload(named: str, options: Mapping[str, Any], paths: Mapping[str, str], base: Path) -> Workload:
    """The workload that "file.py:Class" (relative to `base`) or "package.module:Class" names.

    Args:
        paths: further keyword arguments, made absolute from `base`.

    Raises:
        CompressError: no such file, module or class, options that its constructor does not take, a constructor that
            fails, or an object that lacks a part of the Workload protocol.
    """
    where, _, name = named.partition(":")
    module = module_of(where, base)
    factory = getattr(module, name, None)
    if factory is None:
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise CompressError(f"{where} has no '{name}'.{did_you_mean(name, classes)}")
    known = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()) and (extra := sorted({*options, *paths} - set(known))):
        raise CompressError(f"{named} takes no option '{extra[0]}'.{did_you_mean(extra[0], known)}")
    places = {key: str((base / path).resolve()) for key, path in paths.items()}
    try:
        made = factory(**options, **places)
    except CompressError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise CompressError(f"{named} cannot be made: {type(error).__name__}: {error}") from error
    parts = ("tasks", "normalisation", "build", "example_inputs", "batches", "losses", "metrics")
    if lacking := [part for part in parts if not hasattr(made, part)]:
        raise CompressError(f"{named} is no workload: it lacks {', '.join(lacking)}.")
    _check_names([task.name for task in made.tasks], named)
    return cast(Workload, made)


def _check_names(names: list[str], where: str) -> None:
    """Task names become names of folders, of the artifact's outputs and of keys in a recipe."""
    if not names or len(set(names)) < len(names):
        raise CompressError(f"{where}: task names must be there and differ, not {names}.")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or re.fullmatch(r"each|all|input(_\d+)?", name):
            raise CompressError(
                f"{where}: a task cannot be called '{name}'; letters, digits, '-' and '_' make a name, "
                "and 'each', 'all' and 'input' are taken."
            )


def module_of(where: str, base: Path) -> ModuleType:
    """The module at a path that ends in '.py', or of that name; a file may import its neighbours relatively."""
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except Exception as error:  # the user's own code raises what it likes
            raise CompressError(f"{where} cannot be imported: {type(error).__name__}: {error}.") from error
    path = (base / where).resolve()
    if not path.is_file():
        raise CompressError(f"There is no workload file at {path}.")
    package = "workload_" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]
    if package not in sys.modules:  # a package for the folder, so that the file may import its neighbours
        holder = ModuleType(package)
        holder.__path__ = [str(path.parent)]
        sys.modules[package] = holder
    name = f"{package}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code raises what it likes
        del sys.modules[name]
        raise CompressError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    return module
