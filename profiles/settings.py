"""What comes from a file: unknown keys refused, every fault listed at once, the nearest valid name offered."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

SHOWN_CHARACTERS = 60


class Settings(BaseModel):
    """Base of every table read from a TOML or JSON file; frozen, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" Did you mean 'ratio'?"`, or the possible names when none is near; empty when there are none."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Possible: {', '.join(names)}." if names else ""


def faults(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """Every fault of a table as one plain sentence each; `where` names the table for the reader."""
    place = f"{where}: " if where else ""
    return [place + _sentence(item, model) for item in error.errors(include_url=False)]


def _sentence(item: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        *parents, key = path
        inside = f" in [{'.'.join(parents)}]" if parents else ""
        return f"no option '{key}'{inside}.{did_you_mean(key, _keys(model, parents))}"
    name = ".".join(path)
    if item["type"] == "missing":
        return f"'{name}' is missing."
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "should").rstrip(".")
    if not name:
        return f"{message}."
    return f"'{name}'{_given(item['input'])}: {message}."


def _given(value: object) -> str:
    """` = 3` for a value worth showing; a whole table or list would hide the message."""
    if isinstance(value, dict | list | tuple | BaseModel):
        return ""
    text = repr(value)
    return f" = {text}" if len(text) <= SHOWN_CHARACTERS else f" = {text[:SHOWN_CHARACTERS]}..."


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """The option names at a nested place of a settings class, as far as its annotations say."""
    found = [model]
    for parent in parents:
        fields = [field.annotation for m in found for name, field in _fields(m) if name == parent]
        found = [m for annotation in fields for m in _models(annotation)] or found
    return [name for m in found for name, _ in _fields(m)]


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Each field under the name it has in a file."""
    return ((field.alias or name, field) for name, field in model.model_fields.items())


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
