"""What comes from a file: unknown keys refused, every fault listed at once, the nearest valid name offered."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


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
    return [_sentence(item, model, where) for item in error.errors(include_url=False)]


def _sentence(item: Any, model: type[BaseModel], where: str) -> str:
    path = [str(part) for part in item["loc"]]
    place = f"{where}: " if where else ""
    if item["type"] == "extra_forbidden":
        *parents, key = path
        inside = f" in [{'.'.join(parents)}]" if parents else ""
        return f"{place}no option '{key}'{inside}.{did_you_mean(key, _keys(model, parents))}"
    name = ".".join(path)
    if item["type"] == "missing":
        return f"{place}'{name}' is missing."
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return f"{place}{message}."
    return f"{place}'{name}' = {item['input']!r}: {message}."


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """The option names at a nested place of a settings class, as far as its annotations say."""
    found = [model]
    for parent in parents:
        fields = [m.model_fields[parent].annotation for m in found if parent in m.model_fields]
        found = [m for annotation in fields for m in _models(annotation)] or found
    return [name for m in found for name in m.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
