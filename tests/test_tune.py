"""Choosing kernels by measured times: records, what they change, what tuning and profiling make of an artifact."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import networks
import numpy as np
import pytest
import tiny
from onnx import helper
from typer.testing import CliRunner

from compressor.cli import app
from compressor.progress import Silent
from compressor.tuning import tune_artifact, tune_artifacts
from profiles.device import load
from targets import artifact as artifacts
from targets import records
from targets import tune as tuning
from targets.base import Artifact, BuildPlan, Program
from targets.choice import Candidate, Choices
from targets.cpu import CpuTarget
from targets.errors import TargetError
from targets.profiling import kernels, profile
from targets.records import Records

pytestmark = pytest.mark.compile
DEVICE = networks.cpu_device(bits=networks.host_bits(), cores=2)


def two_layers() -> Program:
    """Two 3x3 convolutions of one shape after each other, then one of another."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["d", "e"], ["y"]),
    ]
    weights = {name: networks.example(32, 32, 3, 3, seed=k) * np.float32(0.1) for k, name in enumerate("ab")}
    weights["e"] = networks.example(5, 32, 1, 1)
    return networks.node_program(nodes, {"x": (1, 32, 16, 16)}, {"y": (1, 5, 16, 16)}, weights, "two-layers")


def planned(known: Records = records.NONE) -> BuildPlan:
    return CpuTarget().plan(two_layers(), DEVICE, known)


def made(plan: BuildPlan) -> Choices:
    return tuning.choices_of(plan)


@pytest.fixture
def built(tmp_path: Path) -> Artifact:
    return CpuTarget().build(planned(), tmp_path / "two", {"surgery.json": b"{}"}, {"macs": 7})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Measurements take no time; the candidate that should be slowest turns out fastest."""
    seen: list[str] = []

    def measure(candidate: Candidate, _: object) -> float:
        seen.append(candidate.name)
        return 1 / candidate.cycles

    monkeypatch.setattr(tuning, "measure", measure)
    yield seen


# Records


def test_records_are_kept_by_machine_and_later_times_win(tmp_path: Path) -> None:
    file, other = tmp_path / "kept" / "records.json", networks.cpu_device(bits=networks.host_bits(), cores=4)
    assert records.read(file, DEVICE) == {}
    records.write(file, DEVICE, {"layer": {"a": 1.0, "b": 2.0}})
    records.write(file, other, {"layer": {"a": 9.0}})
    records.write(file, DEVICE, {"layer": {"b": 0.5}, "more": {"a": 3.0}})
    assert records.read(file, DEVICE) == {"layer": {"a": 1.0, "b": 0.5}, "more": {"a": 3.0}}
    assert records.read(file, other) == {"layer": {"a": 9.0}}
    assert records.read(file, DEVICE.model_copy(update={"name": "another name"})) == records.read(file, DEVICE)
    assert [path.name for path in file.parent.iterdir()] == ["records.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": "taskpress.records/2", "machines": {}}',
        '{"schema": "taskpress.records/1", "machines": {"m": {"l": {"c": "fast"}}}}',
    ],
)
def test_a_broken_records_file_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text(text)
    for act in (lambda: records.read(file, DEVICE), lambda: records.write(file, DEVICE, {"l": {"c": 1.0}})):
        with pytest.raises(TargetError, match=re.escape(str(file))):
            act()
    assert file.read_text() == text


# Choices


def test_the_measured_fastest_is_used_and_pinned() -> None:
    untuned = planned()
    layer, choice = next((key, c) for key, c in made(untuned).made.items() if len(c.candidates) > 10)
    slowest = max(choice.candidates, key=lambda c: c.cycles)
    times = {slowest.name: 1e-6, choice.picked.name: 2e-6, "of an older version": 1e-9}
    known = {layer: times, "elsewhere": {"x": 1.0}}
    tuned = planned(known)
    assert made(tuned).made[layer].picked.name == slowest.name
    assert tuned.digest() != untuned.digest() == planned().digest()
    assert tuned.digest() == planned(known).digest()
    account = json.loads(tuned.files[artifacts.KERNELS])
    assert account["records"] == {layer: {slowest.name: 1e-6, choice.picked.name: 2e-6}}
    assert account["picks"][layer] == slowest.name


def test_measured_times_count_as_cycles_at_the_usual_pace() -> None:
    untuned = made(planned()).made
    layers = list(untuned)[:2]
    known = {layer: {c.name: c.cycles * 1e-9 for c in untuned[layer].candidates} for layer in layers}
    slower = dict(known, **{layers[0]: {name: 3 * t for name, t in known[layers[0]].items()}})
    for records_, times in ((known, 1.0), (slower, 3.0)):
        tuned = made(planned(records_))
        assert tuned.measured(layers[0])
        estimate = tuned.cycles(layers[0], measured=False)
        paced = tuned.cycles(layers[0], measured=True) / tuned.cycles(layers[1], measured=True)
        assert estimate == untuned[layers[0]].picked.cycles
        assert paced == pytest.approx(times * estimate / tuned.cycles(layers[1], measured=False))


def test_equal_records_build_equal_libraries(tmp_path: Path) -> None:
    digests = {
        CpuTarget().build(planned(), tmp_path / name, {}, {}).manifest.files[artifacts.LIBRARY] for name in ("a", "b")
    }
    assert len(digests) == 1


# Tuning


def test_heavy_layers_come_first_and_the_budget_ends_it(quick: list[str]) -> None:
    plan = planned()
    ticks = iter(range(100))
    found = list(tuning.tune([plan], 5, clock=lambda: float(next(ticks))))
    assert [timed.candidate for timed in found] == quick and len(found) == 4
    choices = made(plan).made
    heaviest = max(choices, key=lambda key: choices[key].picked.cycles * len(made(plan).occurrences[key]))
    assert found[0].layer == heaviest and len({timed.layer for timed in found}) == min(4, len(choices))
    assert found[0].candidate == choices[heaviest].picked.name
    assert not list(tuning.tune([plan], 0))


def test_tuning_an_artifact_rebuilds_it_and_goes_on_later(built: Artifact, quick: list[str]) -> None:
    tuned = tune_artifact(built.directory, 1000, Silent())
    again = artifacts.read(built.directory)
    assert {row.after for row in tuned} <= set(quick) and again.manifest.plan != built.manifest.plan
    assert again.manifest.about == {"macs": 7} and (again.directory / "surgery.json").read_bytes() == b"{}"
    account = kernels(again)
    assert all(account.picks[row.layer] == row.after for row in tuned)
    assert [path.name for path in built.directory.parent.iterdir()] == ["two"]
    quick.clear()
    assert tune_artifact(built.directory, 1000, Silent()) == tuned
    assert quick == [] and artifacts.read(built.directory).manifest == again.manifest
    x = networks.example(1, 32, 16, 16)
    found, wanted = CpuTarget().load(again, 2)(x), networks.answers(two_layers(), x)
    np.testing.assert_allclose(found["y"], wanted["y"], atol=2e-4)


def test_times_of_several_artifacts_go_into_one_file(built: Artifact, quick: list[str], tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    tune_artifacts([built, built], 1000, file, Silent())
    known = records.read(file, DEVICE)
    assert set(known) == set(kernels(built).picks)
    assert planned(known).digest() != built.manifest.plan


def test_only_what_runs_here_is_tuned() -> None:
    plan = CpuTarget().plan(two_layers(), load("raspberry-pi-5"))
    with pytest.raises(TargetError, match="this machine is"):
        list(tuning.tune([plan], 10))


def test_measuring_takes_real_time() -> None:
    choice = max(made(planned()).made.values(), key=lambda c: c.picked.cycles)
    assert 1e-7 < tuning.measure(choice.picked, DEVICE) < 1


# Profiles


def test_a_profile_names_every_kernel_and_adds_up(built: Artifact) -> None:
    found = profile(built, (networks.example(1, 32, 16, 16),), threads=1, seconds=0.1)
    named = [timed.call.kernel for timed in found.calls]
    assert [call.function for call in kernels(built).calls] == [timed.call.function for timed in found.calls]
    assert sum("winograd" in name or name == "direct" for name in named) == 3
    assert 0.5 < found.total / found.wall < 1.5
    heavy = [timed for timed in found.calls if timed.call.macs > 1e6]
    assert [timed.call.macs for timed in heavy] == [32 * 32 * 9 * 256] * 2
    assert all(0 < timed.bound < timed.seconds for timed in heavy)


# From the command line


def test_the_verbs(built: Artifact, quick: list[str]) -> None:
    run = partial(CliRunner().invoke, app)
    tuned = json.loads(run(["tune", str(built.directory), "--json"]).stdout)
    assert {row["after"] for row in tuned} <= set(quick)
    assert "another kernel than untuned" in run(["tune", str(built.directory)]).stdout
    options = ["bench", str(built.directory), "--profile", "--seconds", "0.1"]
    found = json.loads(run([*options, "--json"]).stdout)
    assert found["sum_ms"] == pytest.approx(sum(row["ms"] for row in found["calls"]) + found["between_ms"])
    shown = run(options).stdout
    assert "of what is possible" in shown and "sum / whole" in shown
    assert {row["after"].split()[0] for row in tuned} <= {row["kernel"].split()[0] for row in found["calls"]}
    for row, line in zip(found["calls"], shown.splitlines()[1:], strict=False):
        assert line.startswith(row["kernel"])


def test_tuning_a_recipe_writes_its_records_and_builds_with_them(tmp_path: Path, quick: list[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    given = ["tune", str(recipe), "--out", str(tmp_path / "out"), "--json", "--set", 'task_sets=["all", ["kind"]]']
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) and quick
    known = records.read(tmp_path / "records.json", load("host"))
    for folder in (tmp_path / "out" / "artifacts").iterdir():
        account = kernels(artifacts.read(folder))
        assert account.records.items() <= known.items() and account.records.keys() == account.picks.keys()
