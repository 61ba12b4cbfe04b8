"""A sweep's page: drawn for any number of trials, self-contained, and from JSON that cannot contradict itself."""

import json
import re
from pathlib import Path

import fake_sweep
import pytest
from conftest import Golden
from pydantic import ValidationError
from test_report import Page

from compressor.errors import CompressError
from compressor.report import front, search
from compressor.report.front import render
from compressor.report.numbers import MINUS
from compressor.report.schema import Part
from compressor.report.search import Sweep, nondominated


def test_the_page_says_what_it_said(golden: Golden) -> None:
    golden("sweep.txt", Page(render(fake_sweep.sweep())).text)


@pytest.mark.parametrize(("trials", "inside", "failed"), [(1, True, 0), (1, False, 1), (12, False, 0), (200, True, 40)])
def test_any_number_of_trials_can_be_drawn(trials: int, inside: bool, failed: int) -> None:
    sweep = fake_sweep.sweep(trials, inside, failed)
    page = render(sweep)
    seen = Page(page)
    assert seen.open == [] and page == render(sweep)
    rows = {line.split(" | ")[0] for line in seen.lines if line.startswith("| ")}
    assert {f"| {point.number}" for point in (*sweep.trials, *sweep.failed)} <= rows
    assert ("Failed trials" in seen.lines) == (failed > 0)
    assert ("No trial keeps every task inside its budget" in seen.lines) == (sweep.chosen is None)
    sources = [value for _, key, value in seen.attributes if key in ("src", "href", "xlink:href", "srcset")]
    assert all(value.startswith("#") for value in sources)
    assert "http" not in page and "<script" not in page and "@import" not in page


def test_what_leaves_a_budget_by_far_does_not_flatten_the_rest() -> None:
    sweep = fake_sweep.sweep()
    wrecked = sweep.trials[0].model_copy(update={"work": 0.0, "margin": -1e12, "number": 77})
    page = render(Sweep.model_validate(sweep.model_dump() | {"trials": (wrecked, *sweep.trials)}))
    assert f"under {MINUS}1,000 %" in Page(page).text and f"at the lower edge went below {MINUS}200 %" in page
    ticks = {float(found) for found in re.findall(r">[^<>]*?([\d.,]+) %</text>", page)}
    assert max(ticks) <= 200


def test_text_from_outside_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    data = json.loads(fake_sweep.sweep().model_dump_json(by_alias=True).replace("stages.0.macs", evil))
    data |= {"name": evil, "command": evil}
    page = render(Sweep.model_validate(data))
    assert "<img" not in page and Page(page).text.count(evil) > 3


def _altered(*path: str | int, to: object) -> dict[str, object]:
    data = json.loads(fake_sweep.sweep().model_dump_json(by_alias=True))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize(("path", "to", "message"), [
    (("chosen",), None, "the trial that is chosen does not follow from the trials"),
    (("trials", 0, "front"), False, "on the front does not follow from the trials"),
    (("trials", 0, "work"), 0.99, "the trials are not in the order of their work"),
    (("trials", 0, "margin"), "NaN", "finite number"),
    (("trials",), [], "at least 1 item"),
    (("schema",), "taskpress.sweep/0", "should be 'taskpress.sweep/1'"),
])
def test_a_sweep_cannot_contradict_itself(
    tmp_path: Path, path: tuple[str | int, ...], to: object, message: str
) -> None:
    altered = _altered(*path, to=to)
    (tmp_path / "sweep.json").write_text(json.dumps(altered))
    with pytest.raises(CompressError, match=message):
        front.read(tmp_path)
    with pytest.raises(ValidationError):
        Sweep.model_validate(altered)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(0.1, -1.0), (0.2, 0.5), (0.2, 0.4), (0.3, 0.5), (0.4, 0.6), (0.1, -1.0)]
    assert nondominated(points) == {(0.1, -1.0), (0.2, 0.5), (0.4, 0.6)}


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8").partition("## A sweep's")[2]
    parts = [part for part in vars(search).values() if isinstance(part, type) and issubclass(part, Part)]
    own = [part for part in parts if part.__module__ == search.__name__]
    fields = {field.alias or name for part in own for name, field in part.model_fields.items()}
    assert len(fields) > 20
    assert sorted(field for field in fields if f"`{field}`" not in text) == []
