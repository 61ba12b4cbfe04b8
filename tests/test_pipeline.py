"""Whole runs of the tiny recipe: to the end, killed and resumed, outside a budget, and with the disk in the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.numpy import load_file
from test_cli import compress, fails
from test_store import largest_file

from compressor.pipeline import prepare
from compressor.progress import Silent
from compressor.recipe import load
from compressor.report import read
from compressor.store import opened
from compressor.verify import RUNGS
from targets.errors import TargetError

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parent.parent
POINTS = (
    "compressor.store.sync:1",  # the original is scored, its entry not yet in place
    "compressor.stages.prune.train:2",
    "compressor.stages.ticket.train:2",  # one round's masks are written
    "compressor.stages.finetune.train:1",
    "compressor.stages.pathway.needed:1",
    "compressor.deploy.climb:2",  # the second artifact is built, not verified
    "compressor.latency.interleave:1",
    "compressor.pipeline.write:1",
)


def interrupted(recipe: Path, out: Path, *points: str) -> list[tuple[int, dict[str, int]]]:
    done = subprocess.run(
        [sys.executable, "tests/interrupted.py", recipe, out, *points],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(status, work) for status, work in json.loads(done.stdout)]


def settled(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what no two runs share: times and the moment."""
    for name in ("created", "duration_s", "environment", "warnings"):
        del report[name]
    for stage in report["stages"]:
        del stage["seconds"], stage["resumed"]
    for row in (*report["artifacts"], *report["baselines"]):
        for name in ("latency_ms", "samples", "ratio_to_dense", "load_ms", "first_ms", "compile_s", "sha256", "bytes"):
            row.pop(name, None)
    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert [status for status, _ in interrupted(tiny.recipe(folder), folder / "out")] == [0]
    return folder / "out"


def test_a_run_leaves_a_report_verified_artifacts_and_nothing_else(whole: Path) -> None:
    report = read(whole)
    names = ["kind", "size", "mask", "kind+size+mask"]
    assert [row.name for row in report.artifacts] == names
    assert sorted(path.name for path in (whole / "artifacts").iterdir()) == sorted(names)
    assert sorted(path.name for path in whole.iterdir()) == [
        ".taskpress",
        "artifacts",
        "report.html",
        "report.json",
        "work",
    ]
    for row in report.artifacts:
        assert [(v.rung, v.task) for v in row.verified] == [(rung, task) for rung in RUNGS for task in row.tasks]
        assert row.latency_ms is not None and row.latency_ms.n == len(row.samples) >= 1
        assert row.ratio_to_dense is not None
    assert {row.name for row in report.baselines} == {
        "ONNX Runtime, dense",
        "PyTorch, dense",
        *(f"ONNX Runtime, {name}" for name in names),
    }
    assert [stage.kind for stage in report.stages] == ["prune", "ticket", "finetune", "pathway"]
    assert not any(stage.resumed for stage in report.stages)
    assert report.compressed.macs < report.original.macs
    assert report.compressed.nonzero_parameters < report.compressed.parameters


def test_each_artifact_says_what_was_cut_from_the_original(whole: Path) -> None:
    original = load_file(tiny.weights())
    for folder in (whole / "artifacts").iterdir():
        kept = json.loads((folder / "surgery.json").read_text())["kept"]
        for name, tensor in load_file(folder / "weights.safetensors").items():
            for dim, size in enumerate(original[name].shape):
                indices = kept.get(name, {}).get(str(dim), list(range(size)))
                assert len(indices) == tensor.shape[dim] and set(indices) <= set(range(size)), (folder.name, name)


def test_a_run_killed_anywhere_ends_with_the_same_report_and_repeats_nothing(whole: Path, tmp_path: Path) -> None:
    runs = interrupted(tiny.recipe(tmp_path), tmp_path / "out", *POINTS)
    assert [status for status, _ in runs] == [-signal.SIGKILL] * len(POINTS) + [0]
    for (_, before), (_, after) in pairwise(runs):
        assert before.items() <= after.items(), "finished work is neither repeated nor touched"
    left = [len([name for name in work if name.startswith("work/0")]) for _, work in runs]
    assert left == [0, 0, 1, 2, 3, 4, 4, 4, 4], "each kill came in another stage"
    ends = [json.loads((out / "report.json").read_text()) for out in (whole, tmp_path / "out")]
    assert all(stage["resumed"] for stage in ends[1]["stages"])
    assert settled(ends[0]) == settled(ends[1])
    for folder in (whole / "work").glob("0*"):
        again = load_file(tmp_path / "out" / "work" / folder.name / "weights.safetensors")
        for name, value in load_file(folder / "weights.safetensors").items():
            assert value.tobytes() == again[name].tobytes(), "the same seed gives the same weights bit for bit"
    assert sorted(path.name for path in (tmp_path / "out").rglob(".*")) == [".taskpress"]


# --- what a finished run is good for


def test_running_again_repeats_nothing_and_changes_what_was_asked(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    times = {path: path.stat().st_mtime_ns for path in (out / "work").iterdir()}
    recipe = tiny.recipe(tmp_path, steps="25", samples="12")
    result = compress("run", recipe, "--out", out, "--json")
    assert result.exit_code in (0, 3), result.output
    found = json.loads(result.stdout)
    assert [stage["resumed"] for stage in found["stages"]] == [True, True, False, False]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "Stage 1 (prune), done before" in result.stderr and "Stage 3 (finetune)\n" in result.stderr


def test_an_artifact_alone_is_verified_and_measured(whole: Path, tmp_path: Path) -> None:
    alone = tmp_path / "copied"
    shutil.copytree(whole / "artifacts" / "kind+size+mask", alone)
    found = json.loads(compress("verify", alone, "--json").stdout)
    assert [row["task"] for row in found] == ["kind", "size", "mask"]
    assert all(row["max_abs_error"] <= row["tolerance"] for row in found)
    table = compress("verify", alone, "--recipe", tiny.recipe(tmp_path)).stdout.splitlines()
    assert [row.split()[0] for row in table] == ["task", "kind", "size", "mask"]
    timed = json.loads(compress("bench", alone, "--seconds", "0.2", "--samples", "10", "--json").stdout)
    assert timed["ratio"] > 0 and timed["engines"].keys() == {"artifact", "onnxruntime"}
    assert len(timed["engines"]["artifact"]["samples_ms"]) == timed["engines"]["artifact"]["n"]
    text = compress("bench", alone, "--seconds", "0.1", "--samples", "10").stdout
    assert text.splitlines()[0].split()[:3] == ["engine", "p50", "ms"] and "artifact / ONNX Runtime:" in text
    fails(compress("bench", alone, "--threads", "999"), "Cannot run with 999 threads")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "model.onnx differs from its manifest (SHA-256)"),
        (lambda folder: (folder / "run.py").unlink(), "lacks run.py"),
        (lambda folder: (folder / "evil.so").write_bytes(b"x"), "holds evil.so, which its manifest does not name"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "'schema' is missing"),
    ],
)
def test_an_artifact_that_does_not_match_its_manifest(whole: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(whole / "artifacts" / "kind", tmp_path / "kind")
    damage(tmp_path / "kind")
    for verb in ("verify", "bench"):
        fails(compress(verb, tmp_path / "kind"), message)


def test_a_damaged_artifact_is_built_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "artifacts" / "mask" / "model.so").write_bytes(b"x")
    before = (out / "artifacts" / "kind" / "manifest.json").stat().st_mtime_ns
    result = compress("run", tiny.recipe(tmp_path), "--out", out)
    assert result.exit_code in (0, 3), result.output
    assert compress("verify", out / "artifacts" / "mask").exit_code == 0
    assert (out / "artifacts" / "kind" / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_stage_is_told(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    next((out / "work").glob("01-*")).joinpath("weights.safetensors").write_bytes(b"x")
    fails(compress("run", tiny.recipe(tmp_path), "--out", out), "is not a readable safetensors file")


def test_a_report_is_drawn_anew(whole: Path, tmp_path: Path) -> None:
    for name in ("report.json",):
        shutil.copy(whole / name, tmp_path / name)
    result = compress("report", tmp_path)
    assert result.exit_code == 0 and (tmp_path / "report.html").read_text() == (whole / "report.html").read_text()
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["task", "metric", "before", "after"] and lines[-1] == str(tmp_path / "report.html")
    assert json.loads(compress("report", tmp_path, "--json").stdout)["name"] == "tiny"


# --- what stands in the way


def test_a_task_outside_its_budget_exits_3_with_everything_written(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, task_sets='["size"]', slack="1e9", size='"1 %"')
    recipe.write_text(recipe.read_text().replace("steps = 24\n", "steps = 1\n"))
    result = compress("run", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert [row.split()[-1] for row in result.stdout.splitlines()[1:4]][1] == "OUTSIDE"
    assert compress("verify", tmp_path / "out" / "artifacts" / "size").exit_code == 0
    assert [task.name for task in read(tmp_path / "out").tasks if task.within_budget is False] == ["size"]


def test_what_was_measured_elsewhere_is_measured_again(tmp_path: Path) -> None:
    def keys(*overrides: str) -> list[str]:
        return prepare(*load(tiny.recipe(tmp_path), overrides), Silent(), builds=False).keys()

    assert keys("threads=[1]") == keys("threads=[2]")
    goal = "stages.0.latency=0.5"
    assert not set(keys(goal, "threads=[1]")) & set(keys(goal, "threads=[2]"))


def test_a_device_that_cannot_be_measured_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "[[stages]]\nkind = 'finetune'\nsteps = 2\n[[stages]]\nkind = 'prune'\nlatency = 0.5\n"
    def refuse(device: object) -> None:
        raise TargetError("it was built for another machine.")

    path = tiny.recipe(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.index("[[stages]]")] + stages)
    monkeypatch.setattr("compressor.stages.finetune.train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("targets.cpu.require_host_runs", refuse)
    fails(compress("run", path, "--out", tmp_path / "out"), "it was built for another machine.")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "out", resume=True):
        fails(compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out"), "Another run is working in")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    fails(compress("run", tiny.recipe(tmp_path), "--out", "/proc/taskpress"), "Cannot write '/proc/taskpress'")


def test_a_full_disk_stops_a_run_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with largest_file(30_000):
        result = compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out")
    assert (
        result.exit_code == 1 and "Cannot write" in result.stderr and "Nothing half-written was left" in result.stderr
    )
    assert [path.name.split("-")[0] for path in (tmp_path / "out" / "work").iterdir()] == ["original"]
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor import pipeline

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_compress", interrupt)
    result = compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.endswith("compress: stopped; the same command goes on from its last checkpoint.\n")
