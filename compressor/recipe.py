"""A recipe: one TOML file that says what to compress, how far, for which device; validated before any work starts."""

import hashlib
import inspect
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import Field, InstanceOf, ValidationError, field_validator, model_validator

from compressor.budgets import Budget
from compressor.compute import Where
from compressor.errors import CompressError
from compressor.factory import module_of
from compressor.stages import STAGES, Stage
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


class Choices(Settings):
    """What a sweep may set a setting to: numbers from `low` to `high` (whole ones if both are), or one of `choices`.

    `log`: by orders of magnitude.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[str | int | float | bool, ...] = ()

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "Choices":
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("give 'low' and 'high', or 'choices'")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("'low' is less than 'high'")
        if self.log and not (self.low or 0) > 0:
            raise ValueError("'log' needs a 'low' above 0")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def fitted(self, value: object) -> str | int | float | bool | None:
        """A value as one of these, or None when it is none of them."""
        if self.choices:
            return next((c for c in self.choices if c == value and (type(c) is bool) == (type(value) is bool)), None)
        assert self.low is not None and self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if self.whole:
            return int(value) if value == int(value) else None
        return float(value)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(str(choice) for choice in self.choices)}"
        orders = ", by orders of magnitude" if self.log else ""
        return f"{self.low} to {self.high}{', whole' * self.whole}{orders}"


class Recipe(Settings):
    """The whole recipe.

    Attributes:
        target, device: a name in `compress targets` and one in `compress devices` (or the path of a profile, relative
            to the recipe).
        threads: thread counts to measure with.
        compute_threads: threads that compress; results repeat bit for bit at the same number, on any number of cores.
        train_on: where trainings and scores are computed; "auto" is a GPU where there is one.
        task_sets: which pathways become artifacts: "each" task alone, "all" together, or lists of names.
        stages: in order; `load` makes each from its table and STAGES.
        verify_inputs: how many validation inputs climb the verification ladder.
        sweep: what `compress sweep` may set, by the names that `--set` takes; `run` does not look at it.
    """

    name: str
    seed: int = Field(ge=0, default=0)
    target: str = "cpu"
    device: str = "host"
    threads: tuple[int, ...] = (1, 2)
    compute_threads: int = Field(ge=1, default=2)
    train_on: Where = "auto"
    task_sets: tuple[str | tuple[str, ...], ...] = ("each", "all")
    verify_inputs: int = Field(ge=1, default=4)
    records: str = "records.json"
    workload: WorkloadTable
    budgets: Mapping[str, str | float] = {}
    stages: tuple[InstanceOf[Stage], ...] = ()
    measure: MeasureTable = MeasureTable()
    sweep: Mapping[str, Choices] = {}

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
        if not value or min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("thread counts are 1 or more, each named once")
        return value


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """Read a recipe and apply `key=value` overrides; returns it with the folder its paths are relative to.

    Raises:
        CompressError: with every fault at once, one line each.
    """
    path, raw = _read(path, overrides)
    raw.setdefault("name", path.resolve().parent.name)
    stages, found = _stages(raw.get("stages", []))
    try:
        recipe = Recipe.model_validate({**raw, "stages": stages})
    except ValidationError as error:
        found = faults(error, Recipe) + found
    if found:
        raise CompressError(
            f"{path} has {len(found)} fault{'s' * (len(found) > 1)}:\n" + "\n".join(f"  {f}" for f in found)
        )
    return recipe, path.resolve().parent


def portable(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe with its overrides as plain tables that mean the same in any folder: files named absolutely, no sweep.

    Raises:
        CompressError: as `load`.
    """
    load(path, overrides)
    path, raw = _read(path, overrides)
    base = path.resolve().parent
    raw.setdefault("name", base.name)
    raw.pop("sweep", None)
    table = raw["workload"]
    where, colon, name = table["factory"].partition(":")
    if (base / where).is_file():
        table["factory"] = f"{(base / where).resolve()}{colon}{name}"
    if "checkpoint" in table:
        table["checkpoint"] = str((base / table["checkpoint"]).resolve())
    table["paths"] = {key: str((base / value).resolve()) for key, value in table.get("paths", {}).items()}
    if str(raw.get("device", "")).endswith(".toml"):
        raw["device"] = str((base / raw["device"]).resolve())
    raw["records"] = str((base / raw.get("records", Recipe.model_fields["records"].default)).resolve())
    return raw


def _read(path: Path, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    if path.is_dir():
        path = path / "recipe.toml"
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"There is no recipe to read at {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CompressError(f"{path} is not TOML: {error}.") from None
    for text in overrides:
        _override(raw, text)
    return path, raw


def _stages(tables: object) -> tuple[list[Stage], list[str]]:
    """Each stage table as its stage, and the faults of those that are none, named "Stage 1 (prune)"."""
    if not isinstance(tables, list):
        return [], ["'stages' is a list of tables: write [[stages]]."]
    made: list[Stage] = []
    found = []
    for number, table in enumerate(tables, 1):
        kind = str(table["kind"]) if isinstance(table, dict) and "kind" in table else None
        if kind is None:
            found.append(f"Stage {number}: 'kind' is missing. Possible: {', '.join(STAGES)}.")
        elif kind not in STAGES:
            found.append(f"Stage {number}: no stage kind '{kind}'.{did_you_mean(kind, STAGES)}")
        else:
            try:
                made.append(cast(Stage, STAGES[kind].model_validate(table)))
            except ValidationError as error:
                found += faults(error, STAGES[kind], f"Stage {number} ({kind})")
    kinds = [stage.kind for stage in made]
    for number, kind in enumerate(kinds, 1):
        if "quantize" in kinds[: number - 1] and kind != "finetune":
            found.append(f"Stage {number} ({kind}): after 'quantize' nothing can be cut, only 'finetune' follows.")
    return made, found


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


def setting(recipe: Recipe, key: str) -> object:
    """What a recipe has at `a.b.c`, the names that `--set` takes; None below a table that it lacks.

    Raises:
        CompressError: no recipe has such a setting.
    """
    at: Any = recipe
    for part in key.split("."):
        if isinstance(at, Settings):
            if part not in type(at).model_fields:
                raise CompressError(f"'{key}': no option '{part}'.{did_you_mean(part, type(at).model_fields)}")
            at = getattr(at, part)
        elif isinstance(at, tuple):
            if not part.isdecimal() or int(part) >= len(at):
                raise CompressError(f"'{key}': there are {len(at)} of them, counted from 0, and no '{part}'.")
            at = at[int(part)]
        else:
            at = at.get(part) if isinstance(at, Mapping) else None
    return at


def device(recipe: Recipe, base: Path) -> str:
    """The device's name, or the path of its profile."""
    return str(base / recipe.device) if recipe.device.endswith(".toml") else recipe.device


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
            if not wanted:
                raise CompressError("task_sets: a set names one task or more, or write 'each' or 'all'.")
            if unknown := [name for name in wanted if name not in tasks]:
                raise CompressError(
                    f"task_sets: no task '{unknown[0]}'.{did_you_mean(unknown[0], [*tasks, 'each', 'all'])}"
                )
            found[tuple(task for task in tasks if task in wanted)] = None
    return list(found)


def fingerprint(recipe: Recipe, base: Path) -> str:
    """SHA-256 of what the compression of a recipe starts from: seed, budgets, the workload's options and code (its
    folder, and what it imports relatively), the checkpoint, and name, size and time of every file below `paths`.
    """
    sha = hashlib.sha256()
    module = module_of(recipe.workload.factory.partition(":")[0], base)
    for source in _sources(module):
        sha.update(source.read_bytes())
    if (weights := checkpoint(recipe.workload, base)) is not None:
        with weights.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    facts = recipe.workload.model_dump(mode="json", exclude={"checkpoint", "paths"})
    data = [fact for path in recipe.workload.paths.values() for fact in _files(base / path)]
    sha.update(json.dumps([facts, data, recipe.seed, dict(recipe.budgets)], sort_keys=True, default=str).encode())
    return sha.hexdigest()


def _sources(module: ModuleType) -> list[Path]:
    """The Python files of a module's folder, and those that it imported of its package's folders."""
    return sorted({*_imported(module), *Path(inspect.getfile(module)).parent.glob("*.py")})


@cache
def _imported(module: ModuleType) -> list[Path]:
    """Files of its package that a module had imported when this was first asked: later ones would differ by process."""
    package = module.__name__.partition(".")[0]
    own = [found for name, found in sys.modules.items() if name.partition(".")[0] == package]
    return [Path(file) for found in own if (file := getattr(found, "__file__", None)) and Path(file).is_file()]


def _files(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.exists()
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
