"""What a run found out: `report.json` is the truth, `report.html` is drawn from it alone."""

from collections.abc import Callable
from pathlib import Path

from compressor.report import (
    accelerator,
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
from compressor.report.page import page, read_json, replace_together
from compressor.report.schema import Report

JSON, HTML = "report.json", "report.html"

# In reading order. A section that has nothing to show returns None.
SECTIONS: dict[str, Callable[[Report], Section | None]] = {
    "summary": summary.section,
    "tradeoff": tradeoff.section,
    "tasks": tasks.section,
    "pictures": pictures.section,
    "latency": latency.section,
    "accelerator": accelerator.section,
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
    replace_together({HTML: render(report), JSON: report.model_dump_json(indent=1, by_alias=True) + "\n"}, directory)


def read(directory: Path) -> Report:
    """The report in a run's folder, checked.

    Raises:
        CompressError: none there, or not one of this version; every fault at once.
    """
    return read_json(directory / JSON, Report)


def render(report: Report) -> str:
    """The page: one self-contained HTML text, equal for equal reports."""
    when, took = report.created.strftime("%Y-%m-%d %H:%M %Z"), seconds(report.duration_s)
    byline = f"taskpress, {when}, took {took}, seed {report.seed}"
    return page(report.name, byline, report.schema_, JSON, {name: draw(report) for name, draw in SECTIONS.items()})
