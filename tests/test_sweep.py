"""A sweep: its trials are kept, counted and gone on with; what it chooses is a recipe of its own."""

import json
import shutil
import tomllib
from pathlib import Path

import optuna
import pytest
import tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compressor import recipe as recipes
from compressor import sweep as sweeps
from compressor.cli import app
from compressor.errors import CompressError
from compressor.pipeline import prepare
from compressor.progress import Reporter, Silent
from compressor.report.search import Sweep
from compressor.workers import Failed

SPACE = """
[sweep]
"stages.0.macs" = { low = 0.3, high = 0.9 }
"stages.0.rounds" = { low = 1, high = 2 }
"stages.0.criterion" = { choices = ["taylor", "magnitude"] }
"""
OWN = {"stages.0.macs": 0.5, "stages.0.rounds": 2, "stages.0.criterion": "taylor"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tiny.recipe(tmp_path, kind="0.5", size='"300 %"', mask='"90 %"')
    kept = path.read_text().split("[[stages]]")
    path.write_text(f"{kept[0]}[[stages]]{kept[1]}[[stages]]{kept[3]}{SPACE}")
    return path


def searched(recipe: Path, trials: int, workers: int = 1, *overrides: str) -> Sweep:
    return sweeps.sweep(recipe, overrides, recipe.parent / "out", trials, workers, Silent())


def figures(trial: sweeps.Trial, progress: Reporter | None = None) -> sweeps.Outcome | Failed:
    """What a trial might come to, at once; more work costs less, and rounds are wasted."""
    trial.folder.mkdir(parents=True)
    work = trial.settings["stages.0.macs"]
    scores = {"kind": 0.9 * work, "size": 0.1, "mask": 0.9}
    return sweeps.Outcome(work, work - 0.2 * trial.settings["stages.0.rounds"], scores, scores, 1.0)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "attempt", figures)


# --- what is found


def test_a_sweep_tries_the_recipe_first_and_writes_the_best_inside_the_budgets(recipe: Path, tmp_path: Path) -> None:
    found = searched(recipe, 2)
    folder = recipe.parent / "out"
    assert len(found.trials) == 2 and not found.failed
    assert next(point.settings for point in found.trials if point.number == 0) == OWN and found.own == 0
    for point in found.trials:
        assert 0.3 <= point.settings["stages.0.macs"] <= 0.9 and point.settings["stages.0.rounds"] in (1, 2)
        assert 0 < point.work <= 1 and (folder / point.folder / "work").is_dir()
        left = [result.margin / result.budget for result in found.results(point)]
        assert point.margin == pytest.approx(min(left)) and point.margin >= 0, "the tiny network has room"
    told = json.loads((folder / "sweep.json").read_text())
    assert told["schema"] == "taskpress.sweep/1" and Sweep.model_validate(told) == found
    assert f"Trial {found.chosen} does" in (folder / "sweep.html").read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "chosen.toml").rename(elsewhere / "recipe.toml")
    chosen, base = recipes.load(elsewhere)
    assert not chosen.sweep and chosen.name == "tiny"
    assert chosen.stages[0].model_dump()["macs"] == found.trials[0].settings["stages.0.macs"]
    assert prepare(chosen, base, Silent(), builds=False).model.module is not None


def test_the_front_and_the_choice_follow_from_the_trials(recipe: Path, at_once: None) -> None:
    found = searched(recipe, 6)
    assert [p.work for p in found.trials] == sorted(p.work for p in found.trials)
    for point in found.trials:
        better = [p for p in found.trials if p.work <= point.work and p.margin >= point.margin and p != point]
        assert point.front == all((p.work, p.margin) == (point.work, point.margin) for p in better)
    assert 1 < len(found.front) < 6
    inside = [point.number for point in found.trials if point.margin >= 0]
    assert found.chosen == inside[0]
    text = (recipe.parent / "out" / "chosen.toml").read_text()
    assert text.startswith(f"# Trial {found.chosen} of the sweep of '{recipe}'")
    assert tomllib.loads(text)["stages"][0]["macs"] == found.taken.settings["stages.0.macs"]


def test_a_recipe_outside_what_is_searched_is_not_tried(recipe: Path, at_once: None) -> None:
    found = searched(recipe, 1, 1, "stages.0.macs=0.95")
    assert found.own is None and 0.3 <= found.trials[0].settings["stages.0.macs"] <= 0.9


# --- stopping and going on


def test_a_sweep_goes_on_as_if_it_had_not_been_stopped(recipe: Path, at_once: None) -> None:
    for trials in (3, 11):
        stopped = searched(recipe, trials)
    (recipe.parent / "out").rename(recipe.parent / "stopped")
    assert searched(recipe, 11).trials == stopped.trials
    assert len({json.dumps(point.settings) for point in stopped.trials}) == 11


def test_a_killed_trial_comes_first_and_in_its_folder(
    recipe: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(trial: sweeps.Trial, progress: Reporter | None = None) -> sweeps.Outcome | Failed:
        if trial.number == 2:
            raise KeyboardInterrupt
        return figures(trial, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweeps, "attempt", killed)
        searched(recipe, 3)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{recipe.parent / 'out' / 'sweep.db'}")
    lost = study.trials[2]
    later = searched(recipe, 3)
    assert sorted(point.number for point in later.trials) == [0, 1, 3]
    [again] = [point for point in later.trials if point.number == 3]
    assert again.settings == lost.params and again.folder == "trials/2"
    monkeypatch.setattr(sweeps, "attempt", lambda *_: pytest.fail("no trial is missing"))
    assert searched(recipe, 3).trials == later.trials


def test_a_trial_that_fails_is_told_and_costs_no_other(recipe: Path) -> None:
    text = recipe.read_text().replace('"magnitude"]', '"no-such"]').replace('"taylor", ', "")
    recipe.write_text(text)
    with pytest.raises(CompressError, match=r"(?s)No trial of the sweep was finished: .*no criterion 'no-such'"):
        searched(recipe, 2)


def test_a_device_that_does_not_exist_costs_no_other_trial(recipe: Path) -> None:
    trial = sweeps.Trial(0, recipe, (), {"device": "raspbery-pi-5"}, recipe.parent / "trial")
    failed = sweeps.attempt(trial, Silent())
    assert isinstance(failed, Failed) and "Did you mean 'raspberry-pi-5'" in failed.why


def test_an_error_nobody_expects_ends_the_sweep_and_is_not_met_again(
    recipe: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trial: sweeps.Trial, progress: Reporter | None = None) -> sweeps.Outcome | Failed:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(sweeps, "attempt", broken)
        searched(recipe, 2)
    found = searched(recipe, 2)
    assert [(one.number, one.why) for one in found.failed] == [(0, "RuntimeError: out of memory")]
    assert sorted(point.number for point in found.trials) == [1, 2]


def test_a_trial_whose_folder_stayed_elsewhere_is_none(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "attempt", lambda *_: sweeps.Outcome(0.5, 0.5, {}, {}, 1.0))
    with pytest.raises(CompressError, match="trials/0' is not here: --out must be a folder that all machines share"):
        searched(recipe, 1)


def test_workers_share_the_trials(recipe: Path) -> None:
    found = searched(recipe, 2, 2, "stages.0.recover.steps=1", "stages.1.steps=1")
    assert {point.number for point in found.trials} == {0, 1}


# --- what is refused


@pytest.mark.parametrize(("swap", "by", "said"), [
    (SPACE, "", "has no \\[sweep\\]"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0.3 }", "give 'low' and 'high', or 'choices'"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0.9, high = 0.3 }", "'low' is less than 'high'"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0, high = 0.3, log = true }", "'log' needs a 'low' above 0"),
    ('kind = 0.5\nsize = "300 %"\nmask = "90 %"\n', "", "weighs work against budgets"),
    ('"stages.0.macs"', '"stages.0.mcas"', "'stages.0.mcas': no option 'mcas'. Did you mean 'macs'?"),
    ('"stages.0.macs"', '"stages.7.macs"', "'stages.7.macs': there are 2 of them, counted from 0, and no '7'."),
])
def test_what_cannot_be_searched_is_refused(recipe: Path, swap: str, by: str, said: str) -> None:
    text = recipe.read_text()
    assert swap in text
    recipe.write_text(text.replace(swap, by))
    with pytest.raises(CompressError, match=said):
        searched(recipe, 1)


def test_another_recipe_does_not_join_a_sweep(recipe: Path, at_once: None) -> None:
    searched(recipe, 1)
    with pytest.raises(CompressError, match="holds the sweep of another recipe"):
        searched(recipe, 2, 1, "seed=5")


def test_a_changed_checkpoint_does_not_join_a_sweep(recipe: Path, at_once: None) -> None:
    weights, own = load_file(tiny.weights()), recipe.parent / "own.safetensors"
    save_file(weights, own)
    recipe.write_text(recipe.read_text().replace(str(tiny.weights()), str(own)))
    searched(recipe, 1)
    save_file(weights | {"fused.bias": weights["fused.bias"] + 1}, own)
    with pytest.raises(CompressError, match="its workload or its checkpoint changed"):
        searched(recipe, 2)


def test_a_sweep_killed_in_a_trial_proposes_what_it_would_have(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "attempt", figures)
    whole = [trial.settings for trial in searched(recipe, 5).trials]
    shutil.rmtree(recipe.parent / "out")
    tried: list[int] = []

    def dying(trial: sweeps.Trial, progress: Reporter | None = None) -> sweeps.Outcome | Failed:
        tried.append(trial.number)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return figures(trial, progress)

    monkeypatch.setattr(sweeps, "attempt", dying)
    with pytest.raises(KeyboardInterrupt):
        searched(recipe, 5)
    found = searched(recipe, 5)
    assert sorted(map(str, (trial.settings for trial in found.trials))) == sorted(map(str, whole))


@pytest.mark.parametrize(("table", "value", "fitted"), [
    ({"low": 1, "high": 4}, 4, 4),
    ({"low": 1, "high": 4}, 2.5, None),
    ({"low": 1, "high": 4}, True, None),
    ({"low": 0.1, "high": 4}, 4, 4.0),
    ({"low": 0.1, "high": 4}, None, None),
    ({"low": 0.1, "high": 4}, 4.1, None),
    ({"choices": ["a", 1]}, 1.0, 1),
    ({"choices": ["a", 1]}, True, None),
    ({"choices": ["a", False]}, False, False),
])
def test_a_value_lies_inside_what_is_searched_or_not(table: dict[str, object], value: object, fitted: object) -> None:
    found = recipes.Choices.model_validate(table).fitted(value)
    assert found == fitted and type(found) is type(fitted)


# --- the verb


def compress(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_verb_prints_the_front_and_draws_it_anew(recipe: Path, at_once: None) -> None:
    out = recipe.parent / "out"
    said = compress("sweep", recipe, "--trials", 3, "--out", out)
    assert "recipe's own" in said and "3 trials finished" in said and str(out / "sweep.html") in said
    page = (out / "sweep.html").read_text()
    (out / "sweep.html").unlink()
    assert compress("report", out) == said
    assert (out / "sweep.html").read_text() == page
    assert json.loads(compress("report", out, "--json")) == json.loads((out / "sweep.json").read_text())


def test_a_dry_run_says_what_would_be_searched_and_writes_nothing(
    recipe: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps.pipeline, "dry_run", lambda *_: {"stages": [{"seconds": 3.0}, {"seconds": 4.0}]})
    arguments = ("sweep", recipe, "--trials", 3, "--out", recipe.parent / "out", "--dry-run")
    said = compress(*arguments)
    assert not (recipe.parent / "out").exists()
    assert [line.split()[0] for line in said.splitlines()[1:4]] == list(OWN)
    assert "0 trials finished, 3 to run" in said and "about 7 s a trial" in said
    searched(recipe, 2)
    before = (recipe.parent / "out" / "sweep.db").read_bytes()
    plan = json.loads(compress(*arguments, "--json"))
    assert (plan["finished"], plan["missing"], plan["own_first"]) == (2, 1, True)
    assert (recipe.parent / "out" / "sweep.db").read_bytes() == before
