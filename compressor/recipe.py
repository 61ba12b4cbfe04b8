"""A recipe: one TOML file that says what to compress, how far, for which device; validated before any work starts."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from compressor.budgets import Budget
from compressor.errors import CompressError
from compressor.stages import STAGES, AnyStage, Stage
from compressor.workload import Workload
from profiles.settings import Settings, did_you_mean, faults


class WorkloadTable(Settings):
    """Which workload: `factory` is "file.py:Class", relative to the recipe, or "package.module:Class".

    A factory is code and runs; it is only ever taken from the recipe or the command line. `options` are its keyword
    arguments, and so are `paths`, made absolute from the recipe's folder. `checkpoint` is a safetensors file, relative
    to the recipe.
    """

    factory: str
    checkpoint: str | None = None
    options: Mapping[str, Any] = {}
    paths: Mapping[str, str] = {}

    @field_validator("factory")
    @classmethod
    def _names_a_class(cls, value: str) -> str:
        if value.count(":") != 1 or not all(value.split(":")):
            raise ValueError("a factory is 'file.py:Class' or 'package.module:Class'")
        return value


class MeasureTable(Settings):
    """How latency is measured: samples of one inference each, engines taking turns."""

    seconds: float = Field(gt=0, default=20.0)
    samples: int = Field(ge=10, default=130)
    warmup_seconds: float = Field(ge=0, default=1.0)


class Recipe(Settings):
    """The whole recipe.

    Attributes:
        target, device: a name in `compress targets` and one in `compress devices` (or a path to a profile).
        threads: thread counts to measure with.
        task_sets: which pathways become artifacts: "each" task alone, "all" together, or lists of names.
        verify_inputs: how many validation inputs climb the verification ladder.
    """

    name: str
    seed: int = Field(ge=0, default=0)
    target: str = "cpu"
    device: str = "host"
    threads: tuple[int, ...] = (1, 2)
    task_sets: tuple[str | tuple[str, ...], ...] = ("each", "all")
    verify_inputs: int = Field(ge=1, default=4)
    workload: WorkloadTable
    budgets: Mapping[str, str | float] = {}
    stages: tuple[AnyStage, ...] = ()
    measure: MeasureTable = MeasureTable()

    @field_validator("budgets")
    @classmethod
    def _budgets_parse(cls, value: Mapping[str, str | float]) -> Mapping[str, str | float]:
        for task, text in value.items():
            try:
                Budget.parse(text)
            except ValueError as error:
                raise ValueError(f"budget of '{task}': {error}") from None
        return value

    @field_validator("threads")
    @classmethod
    def _threads_positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("thread counts are 1 or more")
        return value


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """Read a recipe and apply `key=value` overrides; returns it with the folder its paths are relative to.

    Raises:
        CompressError: with every fault at once, one line each.
    """
    if path.is_dir():
        path = path / "recipe.toml"
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise CompressError(f"There is no recipe at {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CompressError(f"{path} is not TOML: {error}.") from None
    for text in overrides:
        _override(raw, text)
    raw.setdefault("name", path.resolve().parent.name)
    found = _stage_faults(raw)
    rest = {key: value for key, value in raw.items() if key != "stages"} if found else raw
    try:
        recipe = Recipe.model_validate(rest)
    except ValidationError as error:
        found = faults(error, Recipe) + found
    if found:
        raise CompressError(
            f"{path} has {len(found)} fault{'s' * (len(found) > 1)}:\n" + "\n".join(f"  {f}" for f in found)
        )
    return recipe, path.resolve().parent


def _stage_faults(raw: Mapping[str, Any]) -> list[str]:
    """Faults of each stage table, named "Stage 1 (prune)"."""
    stages = raw.get("stages", [])
    if not isinstance(stages, list):
        return ["'stages' is a list of tables: write [[stages]]."]
    found = []
    for number, table in enumerate(stages, 1):
        kind = table.get("kind") if isinstance(table, dict) else None
        if kind not in STAGES:
            named = f"no stage kind '{kind}'.{did_you_mean(str(kind), STAGES)}" if kind else "'kind' is missing."
            found.append(f"Stage {number}: {named}")
            continue
        try:
            TypeAdapter(STAGES[kind]).validate_python(table)
        except ValidationError as error:
            found += faults(error, STAGES[kind], f"Stage {number} ({kind})")
    return found


def _override(raw: dict[str, Any], text: str) -> None:
    """Set `a.b.c=value` in place; numbers index lists (`stages.0.macs=0.5`), the value is TOML or else plain text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise CompressError(f"--set takes key=value, not '{text}'.")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    at: Any = raw
    *parents, last = key.strip().split(".")
    try:
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if isinstance(at, list):
            at[int(last)] = parsed
        else:
            at[last] = parsed
    except (IndexError, ValueError, AttributeError, TypeError):
        raise CompressError(f"--set {key}: there is no such place in the recipe.") from None


def load_workload(table: WorkloadTable, base: Path) -> Workload:
    """Make the workload a recipe names.

    Raises:
        CompressError: no such file, module or class, options that its constructor does not take, or an object that
            lacks a part of the Workload protocol.
    """
    where, _, name = table.factory.partition(":")
    module = _module_of(where, base)
    factory = getattr(module, name, None)
    if factory is None:
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise CompressError(f"{where} has no '{name}'.{did_you_mean(name, classes)}")
    known = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()) and (
        extra := sorted({*table.options, *table.paths} - set(known))
    ):
        raise CompressError(f"{table.factory} takes no option '{extra[0]}'.{did_you_mean(extra[0], known)}")
    options = dict(table.options) | {key: str((base / path).resolve()) for key, path in table.paths.items()}
    made = factory(**options)
    parts = ("tasks", "normalisation", "build", "example_inputs", "batches", "losses", "metrics")
    if lacking := [part for part in parts if not hasattr(made, part)]:
        raise CompressError(f"{table.factory} is no workload: it lacks {', '.join(lacking)}.")
    names = [task.name for task in made.tasks]
    if not names or len(set(names)) < len(names):
        raise CompressError(f"{table.factory}: task names must be there and differ, not {names}.")
    return cast(Workload, made)


def checkpoint(table: WorkloadTable, base: Path) -> Path | None:
    return (base / table.checkpoint).resolve() if table.checkpoint else None


def task_sets(recipe: Recipe, tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """The recipe's task sets spelled out, in task order, without repeats."""
    found: dict[tuple[str, ...], None] = {}
    for item in recipe.task_sets:
        if item == "each":
            found.update(dict.fromkeys((task,) for task in tasks))
        elif item == "all":
            found[tuple(tasks)] = None
        else:
            wanted = [item] if isinstance(item, str) else list(item)
            if unknown := [name for name in wanted if name not in tasks]:
                raise CompressError(
                    f"task_sets: no task '{unknown[0]}'.{did_you_mean(unknown[0], [*tasks, 'each', 'all'])}"
                )
            found[tuple(task for task in tasks if task in wanted)] = None
    return list(found)


def fingerprint(recipe: Recipe, base: Path) -> str:
    """SHA-256 of what the compression of a recipe starts from: workload code and options, checkpoint, seed, budgets."""
    sha = hashlib.sha256()
    where = recipe.workload.factory.partition(":")[0]
    if where.endswith(".py"):
        for source in sorted((base / where).resolve().parent.glob("*.py")):
            sha.update(source.read_bytes())
    weights = checkpoint(recipe.workload, base)
    if weights is not None:
        sha.update(hashlib.sha256(weights.read_bytes()).digest())
    facts = recipe.workload.model_dump(mode="json") | {"seed": recipe.seed}

    facts["budgets"] = dict(recipe.budgets)
    sha.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    return cast(tuple[Stage, ...], recipe.stages)


def _module_of(where: str, base: Path) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise CompressError(f"The workload's module cannot be imported: {error}.") from error
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
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise CompressError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
        raise
    return module
