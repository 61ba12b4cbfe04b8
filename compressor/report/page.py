"""One self-contained page out of sections, and files that are replaced together: a run's report, or a sweep's."""

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import CompressError
from compressor.report.blocks import Section
from profiles.settings import faults

Model = TypeVar("Model", bound=BaseModel)


def page(title: str, byline: str, schema: str, source: str, sections: Mapping[str, Section | None]) -> str:
    """The HTML text; sections that are None have nothing to show, `source` names the file it is drawn from."""
    from jinja2 import Environment, StrictUndefined

    text = files("compressor.report").joinpath("page.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = {name: section for name, section in sections.items() if section is not None}
    return jinja.from_string(text).render(title=title, byline=byline, schema=schema, source=source, sections=shown)


def replace_together(texts: Mapping[str, str], directory: Path) -> None:
    """Write all files of a report or none; earlier ones are replaced only once the new ones are whole.

    Raises:
        CompressError: the folder cannot be written to.
    """
    drafts = {name: directory / f".{name}.{os.getpid()}" for name in texts}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, draft in drafts.items():
            draft.write_text(texts[name], encoding="utf-8")
        for name, draft in drafts.items():
            draft.replace(directory / name)
    except OSError as error:
        raise CompressError(f"Cannot write the report to '{directory}': {error.strerror}.") from error
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink()


def read_json(file: Path, model: type[Model]) -> Model:
    """A report's JSON, checked.

    Raises:
        CompressError: none there, or not one of this version; every fault at once.
    """
    try:
        return model.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"No report in '{file.parent}': cannot read {file.name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CompressError(f"'{file}' is not text: {error}.") from error
    except ValidationError as error:
        raise CompressError("\n".join(faults(error, model, f"'{file}'"))) from error
