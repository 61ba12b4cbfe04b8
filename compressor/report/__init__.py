"""What a run found out: `report.json` is the truth, `report.html` is drawn from it alone."""

import os
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from compressor.errors import CompressError
from compressor.report import (
    artifacts,
    latency,
    layers,
    pictures,
    recipe,
    stages,
    summary,
    surroundings,
    tasks,
    tradeoff,
)
from compressor.report.blocks import Section
from compressor.report.numbers import seconds
from compressor.report.schema import Report
from profiles.settings import faults

JSON, HTML = "report.json", "report.html"

# In reading order. A section that has nothing to show returns None.
SECTIONS: dict[str, Callable[[Report], Section | None]] = {
    "summary": summary.section,
    "tradeoff": tradeoff.section,
    "tasks": tasks.section,
    "pictures": pictures.section,
    "latency": latency.section,
    "layers": layers.section,
    "stages": stages.section,
    "artifacts": artifacts.section,
    "environment": surroundings.section,
    "recipe": recipe.section,
}


def write(report: Report, directory: Path) -> None:
    """Write both files or neither; an earlier report there is replaced only once the new one is whole.

    Raises:
        CompressError: the folder cannot be written to.
    """
    texts = {HTML: render(report), JSON: report.model_dump_json(indent=1, by_alias=True) + "\n"}
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


def read(directory: Path) -> Report:
    """The report in a run's folder, checked.

    Raises:
        CompressError: none there, or not one of this version; every fault at once.
    """
    file = directory / JSON
    try:
        return Report.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"No report in '{directory}': cannot read {JSON}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CompressError(f"'{file}' is not text: {error}.") from error
    except ValidationError as error:
        raise CompressError("\n".join(faults(error, Report, f"'{file}'"))) from error


def render(report: Report) -> str:
    """The page: one self-contained HTML text, equal for equal reports."""
    from jinja2 import Environment, StrictUndefined

    page = files("compressor.report").joinpath("page.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = {name: draw(report) for name, draw in SECTIONS.items()}
    sections = {name: section for name, section in drawn.items() if section is not None}
    return jinja.from_string(page).render(report=report, sections=sections, duration=seconds(report.duration_s))
