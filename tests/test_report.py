"""The report: JSON that cannot contradict itself, and a self-contained page that is drawn from it and escaped."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import fake_report
import numpy as np
import pytest
from conftest import Golden
from pydantic import ValidationError

from compressor import report as reports
from compressor.errors import CompressError
from compressor.report import SECTIONS, pictures, read, render, write
from compressor.report.numbers import MINUS, NONE, change, count, listed, number, percent, percentile, seconds, size
from compressor.report.schema import SCHEMA, ArtifactResult, Latency, Part, Report, TaskResult
from compressor.report.tradeoff import _looks, _owners
from profiles.measure import Emulated, Estimate, Measurement

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The page's visible text by line without its drawings, and whether every tag is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "tr":
            self.lines.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        if data.strip() and not {"svg", "style"} & set(self.open):
            cell = {"td", "th"} & set(self.open)
            if cell and self.lines and self.lines[-1] and self.lines[-1].startswith("| "):
                self.lines[-1] += f" | {data.strip()}"
            else:
                self.lines.append(f"{'| ' if cell else ''}{data.strip()}")

    @property
    def text(self) -> str:
        return "\n".join(line for line in self.lines if line) + "\n"


@pytest.fixture(scope="module")
def page() -> str:
    return render(fake_report.report())


def test_the_page_says_what_it_said(page: str, golden: Golden) -> None:
    golden("report.txt", Page(page).text)


def test_the_json_is_what_it_was(golden: Golden) -> None:
    small = fake_report.report(layers=2, samples=3, threads=(1,)).model_dump(mode="json", by_alias=True)
    for picture in small["pictures"]:
        picture |= {key: "PNG" for key in picture if key.endswith("base64")}
    golden("report.json", json.dumps(small, indent=1, ensure_ascii=False) + "\n")


def test_every_tag_is_closed_and_ids_are_unique(page: str) -> None:
    seen = Page(page)
    assert seen.open == []
    ids = [value for _, key, value in seen.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, key, value in seen.attributes if key in ("href", "xlink:href") and value.startswith("#")}
    assert links <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_page_needs_nothing_else(page: str) -> None:
    sources = [value for _, key, value in Page(page).attributes if key in ("src", "href", "xlink:href", "srcset")]
    assert sources
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    assert "http" not in page
    assert "<script" not in page
    assert "@import" not in page


def test_drawings_leave_their_colours_to_the_page(page: str) -> None:
    used = set(re.findall(r"#[0-9a-f]{6}\b", page[page.index("<body") :]))
    assert used <= {"#ffffff", "#000000"}
    variables = set(re.findall(r"var\((--[a-z]+)\)", page))
    assert all(page.count(f"{name}:") >= 1 for name in variables)


def test_equal_reports_make_equal_pages(page: str) -> None:
    assert render(fake_report.report()) == page


@pytest.mark.parametrize(
    ("tasks", "layers", "threads"), [(1, 0, (1,)), (1, 1, (1, 2)), (2, 61, (1,)), (20, 200, (1, 2))]
)
def test_any_number_of_tasks_and_layers_can_be_drawn(tasks: int, layers: int, threads: tuple[int, ...]) -> None:
    report = fake_report.report(tasks, layers, samples=10, threads=threads)
    seen = Page(render(report))
    assert seen.open == []
    assert all(task.name in seen.text for task in report.tasks)
    assert ("Layers" in seen.lines) == (layers > 0)


def test_what_an_accelerator_is_at_is_drawn_from_cycles_and_called_simulated() -> None:
    page = render(fake_report.accelerated())
    seen = Page(page)
    assert seen.open == []
    assert 'id="accelerator"' in page and all(f">{unit}<" in page for unit in ("LOAD", "GEMM", "POST", "STORE"))
    lines = seen.text.splitlines()
    assert "whole" not in lines and "Nothing here was measured on a device." in seen.text
    assert "A diamond is a latency that was not measured" in page and "Every sample" not in page
    assert "| conv 3 x 3: 16 x 24 x 24 to 32 x 24 x 24 | 922 k | 8,000 | 80 % | 90 % | 43.0 KiB" in lines
    assert f"| largest of 2 x 2 | 0 | 1,990 | 20 % | {NONE} | 7.81 KiB" in lines
    assert "segmentation: 2 runs on an array of 16 x 8 at 117.1 MHz (place-and-route)" in lines
    assert "10,000 cycles, 0.0854 ms, all memory stalls counted; what the host computes is not in it" in lines
    assert "54.8 KiB a frame: loads 39.1 KiB, stores 11.7 KiB, instructions 4.00 KiB" in lines
    assert "| host | host: softmax | 0 | 100 % | no choice" in lines, "which is the host's table, not the array's"


def test_sections_without_anything_to_show_are_left_out() -> None:
    full = fake_report.report()
    empty = ("stages", "layers", "artifacts", "baselines", "pictures", "warnings")
    bare = Report.model_validate(full.model_dump() | {name: () for name in empty})
    seen = Page(render(bare))
    titles = {link.removeprefix("#") for tag, key, link in seen.attributes if (tag, key) == ("a", "href")}
    assert titles == {"tasks", "environment", "recipe"}
    assert bare.compressed == bare.original


def test_everything_from_outside_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>&\"'$x_1$"
    report = fake_report.report(tasks=2, layers=3, samples=8)
    text = report.model_dump_json(by_alias=True)
    for word in (
        "segmentation",
        "depth",
        "onnxruntime dense",
        "3 %",
        "encoder.stage0.block0.conv1",
        "validate",
        "prune",
    ):
        text = text.replace(json.dumps(word)[1:-1], json.dumps(evil + word)[1:-1])
    data = json.loads(text)
    data |= {"name": evil, "command": evil, "warnings": [evil], "recipe": {evil: evil}}
    data["environment"]["cpu"] = evil
    page = render(Report.model_validate(data))
    assert "<img src=x" not in page
    seen = Page(page)
    assert seen.open == []
    assert seen.text.count(evil) > 20
    assert not any(key.startswith("on") for _, key, _ in seen.attributes)


def test_percentiles_that_n_does_not_support_are_said_to_be_so() -> None:
    text = Page(render(fake_report.report(samples=100, threads=(1,)))).text
    (row,) = [line for line in text.splitlines() if line.startswith("| eager dense | 1 | measured")]
    cells = row.split(" | ")
    assert cells[3] == "100"
    assert cells[7:9] == ["n too small", "n too small"]
    assert "n too small" not in cells[6]


def test_what_was_not_measured_is_never_called_measured() -> None:
    report = fake_report.report(tasks=1, threads=(1,))
    latency = Latency.of(Estimate(1.25, "roofline of 200 GFLOP/s"))
    artifact = ArtifactResult.model_validate(report.artifacts[0].model_dump() | {"latency_ms": latency, "samples": ()})
    text = Page(render(report.model_copy(update={"artifacts": (artifact,), "baselines": ()}))).text
    assert "estimate (roofline of 200 GFLOP/s)" in text
    assert "1 of 1 are computed, seen nowhere." in text
    assert "Measured on" not in text
    assert "| measured" not in text


def test_a_latency_that_never_settled_says_so() -> None:
    report = fake_report.report(tasks=1, samples=5, threads=(1,))
    restless = report.baselines[0].model_dump()
    restless["latency_ms"] |= {"stable": False, "warmup_calls": 9}
    text = Page(render(Report.model_validate(report.model_dump() | {"baselines": (restless,)}))).text
    assert "| onnxruntime dense | 1 | measured, never settled | 5" in text


def test_an_engine_that_runs_a_compressed_graph_stands_at_the_compressed_score() -> None:
    report = fake_report.report()
    own = report.baselines[0].model_copy(update={"artifact": report.artifacts[0].name})
    report = report.model_copy(update={"baselines": (own, *report.baselines[1:])})
    task = report.tasks[0]
    scores = [(owner, score) for _, owner, score in _owners(report, task)]
    assert (own, task.after) in scores and (report.baselines[1], task.before) in scores
    assert task.after != task.before


def test_no_two_of_a_dozen_series_look_alike() -> None:
    assert len(set(islice(_looks(), 12))) == 12


def test_the_verdict_names_what_is_beyond_budget() -> None:
    text = Page(render(fake_report.report(tasks=20, layers=0, samples=5))).text
    assert "1 of 20 tasks beyond budget: depth-1\n" in text
    assert "depth-1: abs_rel 0.05120 → 0.05320, beyond its budget of 3 % (130 % of it used).\n" in text


def test_a_task_that_cannot_be_scored_is_not_judged() -> None:
    report = fake_report.report(tasks=1, layers=0, samples=5)
    task = TaskResult.of(
        "box", "IoU", higher_is_better=True, before=None, after=None, budget=0.1, budget_text="0.1", split="none"
    )
    seen = report.model_copy(update={"tasks": (task, *report.tasks)})
    text = Page(render(seen)).text
    assert "1 of 2 tasks within budget, not judged: box\n" in text
    assert "box: cannot be scored, so its budget was not judged.\n" in text


def test_write_then_read_gives_the_same_report(tmp_path: Path) -> None:
    report = fake_report.report(samples=10)
    write(report, tmp_path / "new" / "run")
    assert read(tmp_path / "new" / "run") == report
    assert sorted(file.name for file in (tmp_path / "new" / "run").iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "new" / "run" / "report.json").read_text())["schema"] == SCHEMA
    assert render(read(tmp_path / "new" / "run")) == (tmp_path / "new" / "run" / "report.html").read_text()


def test_a_full_disk_leaves_the_earlier_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(fake_report.report(samples=5), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    whole = Path.write_text

    def full(self: Path, data: str, encoding: str | None = None) -> int:
        if "json" in self.name:
            whole(self, data[:100], encoding=encoding)
            raise OSError(28, "No space left on device")
        return whole(self, data, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CompressError, match="No space left on device"):
        write(fake_report.report(samples=6), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="Cannot write the report to"):
        write(fake_report.report(samples=5), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read report.json: No such file"),
        ("{", "Invalid JSON"),
        ('{"schema": "taskpress.report/2"}', "'schema' = 'taskpress.report/2': should be 'taskpress.report/1'"),
        ('{"schema": "taskpress.report/1", "task": []}', "no option 'task'. Did you mean 'tasks'?"),
    ],
)
def test_what_is_not_a_report_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(CompressError) as error:
        read(tmp_path)
    assert message in str(error.value)


def _altered(*path: str | int, to: object) -> dict[str, object]:
    data = json.loads(fake_report.report(samples=70).model_dump_json(by_alias=True))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("tasks", 0, "after"), 0.1, "margin and verdict do not follow"),
        (("tasks", 0, "within_budget"), False, "margin and verdict do not follow"),
        (("tasks", 0, "margin"), None, "margin and verdict do not follow"),
        (("tasks", 0, "before"), "NaN", "finite number"),
        (("tasks",), [], "at least 1 item"),
        (("artifacts", 0, "samples"), [1.0], "counts 70 samples, there are 1"),
        (("artifacts", 0, "latency_ms", "p99"), 5.0, "p99 needs 662 samples, there are 70"),
        (("artifacts", 0, "latency_ms", "kind"), "estimate", "cannot have 70 samples"),
        (("artifacts", 0, "tasks"), ["dept"], "tasks dept are named"),
        (("baselines", 0, "threads"), 0, "greater than or equal to 1"),
        (("layers", 0, "density"), 1.5, "less than or equal to 1"),
        (("pictures", 0, "after_png_base64"), "javascript:alert(1)", "should be a PNG file in base64"),
        (("created",), "yesterday", "datetime"),
    ],
)
def test_a_report_cannot_contradict_itself(path: tuple[str | int, ...], to: object, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Report.model_validate(_altered(*path, to=to))


@pytest.mark.parametrize(
    ("higher", "before", "after", "budget", "drop", "within"),
    [
        (True, 0.8, 0.7, 0.2, 0.1, True),
        (True, 0.8, 0.5, 0.2, 0.3, False),
        (False, 0.8, 0.7, 0.0, -0.1, True),
        (False, 0.8, 0.9, 0.05, 0.1, False),
        (True, 0.8, 0.8, 0.0, 0.0, True),
        (True, 0.8, 0.7, None, 0.1, None),
        (True, None, 0.7, 0.2, None, None),
    ],
)
def test_a_drop_is_worse_whichever_way_the_metric_runs(
    higher: bool,
    before: float | None,
    after: float | None,
    budget: float | None,
    drop: float | None,
    within: bool | None,
) -> None:
    task = TaskResult.of(
        "t", "m", higher_is_better=higher, before=before, after=after, budget=budget, budget_text="", split="validate"
    )
    assert task.drop == (None if drop is None else pytest.approx(drop))
    assert task.within_budget is within
    assert (task.margin is None) == (within is None)


def test_latencies_keep_the_kind_of_their_type() -> None:
    seen = Latency.of(Measurement((1.0,) * 64))
    assert (seen.kind, seen.n, seen.p90, seen.p95) == ("measured", 64, 1.0, None)
    assert Latency.of(Emulated(2.0, "verilator", "200 cycles at 100 MHz")).kind == "emulated"
    assert Latency.of(Estimate(2.0, "roofline")).n == 0
    with pytest.raises(ValidationError, match="names its basis"):
        Latency(kind="estimate", n=0, p50=1.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_pictures_come_back_pixel_by_pixel(dtype: type, shape: tuple[int, ...]) -> None:
    import base64
    import io

    from matplotlib.image import imread

    image = np.linspace(0, 255, np.prod(shape)).round().reshape(shape)
    given = image.astype(np.uint8) if dtype is np.uint8 else (image / 255).astype(dtype)
    back = imread(io.BytesIO(base64.b64decode(pictures.png(given))))[..., :3] * 255
    expected = image if len(shape) == 3 else np.repeat(image[..., None], 3, axis=2)
    assert np.abs(back - expected).max() < 0.51


@pytest.mark.parametrize("image", [np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4), np.int64), np.full((2, 2), np.nan)])
def test_what_is_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(CompressError, match=r"A picture is \(H, W\)"):
        pictures.png(image)


def test_figures_are_written_for_people() -> None:
    def plain(texts: list[str]) -> list[str]:
        return [text.replace(MINUS, "-").replace(NONE, "none") for text in texts]

    values = (0, 0.05123, 12.345, 1234.5, -0.5, 9.999, 3.3e-6, None)
    assert plain([number(v) for v in values]) == [
        "0.00",
        "0.0512",
        "12.3",
        "1,234",
        "-0.500",
        "10.0",
        "3.30e-6",
        "none",
    ]
    counts = [count(v) for v in (0, 812, 12_345, 1_042_113, 3_740_000_000, 999_999)]
    assert counts == ["0", "812", "12.3 k", "1.04 M", "3.74 G", "1.00 M"]
    shares = [percent(v, signed=True) for v in (-0.61, 0.012, 0.0, 1.5)]
    assert plain(shares) == ["-61 %", "+1.2 %", "+0.0 %", "+150 %"]
    assert plain([size(v) for v in (None, 12, 2048, 5 << 20)]) == ["none", "12 B", "2.00 KiB", "5.00 MiB"]
    assert plain([seconds(v) for v in (0.41, 59.94, 245.0, 7260.0)]) == [
        "0.410 s",
        "59.9 s",
        "4 min 05 s",
        "2 h 01 min",
    ]
    assert plain([seconds(None), change(100, 39), change(0, 5)]) == ["none", "-61 %", "none"]
    assert listed(tuple("abcdef")) == "a, b, c and 3 more"
    assert plain([percentile(None, 90, n).text for n in (0, 10, 64)]) == ["none", "n too small", "none"]


def test_the_package_imports_without_matplotlib_torch_or_tvm() -> None:
    heavy = "{'matplotlib', 'torch', 'tvm', 'jinja2'} & set(sys.modules)"
    code = f"import sys, compressor.report; sys.exit(' '.join({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_its_own_file(name: str) -> None:
    module = SECTIONS[name].__module__
    assert module.startswith("compressor.report.")
    assert [section.__module__ for section in SECTIONS.values()].count(module) == 1


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    parts = [part for part in vars(reports.schema).values() if isinstance(part, type) and issubclass(part, Part)]
    fields = {field.alias or name for part in parts for name, field in part.model_fields.items()}
    assert len(fields) > 50
    assert sorted(field for field in fields if f"`{field}`" not in text) == []
