"""A sweep: its trials are kept, counted and gone on with; what it chooses is a recipe of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import tiny
from typer.testing import CliRunner

from compressor import recipe as recipes
from compressor import sweep as sweeps
from compressor.cli import app
from compressor.errors import CompressError
from compressor.pipeline import prepare
from compressor.progress import Silent

SPACE = """
[sweep]
"stages.0.macs" = { low = 0.3, high = 0.9 }
"stages.0.rounds" = { low = 1, high = 2 }
"stages.0.criterion" = { choices = ["taylor", "magnitude"] }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tiny.recipe(tmp_path, kind="0.5", size='"300 %"', mask='"90 %"')
    kept = path.read_text().split("[[stages]]")
    path.write_text(f"{kept[0]}[[stages]]{kept[1]}[[stages]]{kept[3]}{SPACE}")
    return path


def searched(recipe: Path, trials: int, workers: int = 1, *overrides: str) -> sweeps.Sweep:
    return sweeps.sweep(recipe, overrides, recipe.parent / "out", trials, workers, Silent())


def test_a_sweep_finds_a_front_and_writes_the_best_inside_the_budgets(recipe: Path, tmp_path: Path) -> None:
    found = searched(recipe, 4)
    assert len(found.trials) == 4 and not found.failed
    assert [p.work for p in found.trials] == sorted(p.work for p in found.trials)
    for point in found.trials:
        better = [p for p in found.trials if p.work <= point.work and p.margin >= point.margin and p != point]
        assert point.front == all((p.work, p.margin) == (point.work, point.margin) for p in better)
        assert set(point.settings) == {"stages.0.macs", "stages.0.rounds", "stages.0.criterion"}
        assert 0.3 <= point.settings["stages.0.macs"] <= 0.9 and point.settings["stages.0.rounds"] in (1, 2)
        assert 0 < point.work <= 1 and (recipe.parent / "out" / point.folder).is_dir()
    inside = [point for point in found.trials if point.margin >= 0]
    assert found.chosen == (inside[0].number if inside else None)
    told = json.loads((recipe.parent / "out" / "sweep.json").read_text())
    assert told["schema"] == "taskpress.sweep/1" and len(told["trials"]) == 4
    assert inside, "the tiny network has room"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (recipe.parent / "out" / "chosen.toml").rename(elsewhere / "recipe.toml")
    chosen, base = recipes.load(elsewhere)
    assert not chosen.sweep and chosen.name == "tiny"
    assert chosen.stages[0].model_dump()["macs"] == inside[0].settings["stages.0.macs"]
    assert prepare(chosen, base, Silent(), builds=False).model.module is not None


def test_a_sweep_goes_on_where_it_was_stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searched(recipe, 2)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{recipe.parent / 'out' / 'sweep.db'}")
    killed = study.ask({
        "stages.0.macs": optuna.distributions.FloatDistribution(0.3, 0.9),
        "stages.0.rounds": optuna.distributions.IntDistribution(1, 2),
        "stages.0.criterion": optuna.distributions.CategoricalDistribution(["taylor", "magnitude"]),
    })
    later = searched(recipe, 3)
    assert {p.number: p.settings for p in first.trials}.items() <= {p.number: p.settings for p in later.trials}.items()
    [new] = {p.number for p in later.trials} - {p.number for p in first.trials}
    assert next(p.settings for p in later.trials if p.number == new) == killed.params, "what was killed comes first"
    monkeypatch.setattr(sweeps.pipeline, "compress", lambda *_: pytest.fail("no trial is missing"))
    assert searched(recipe, 3) == later


def test_workers_share_the_trials(recipe: Path) -> None:
    found = searched(recipe, 3, 2)
    assert len(found.trials) == 3
    assert len({point.number for point in found.trials}) == 3


def test_a_trial_that_fails_is_told_and_costs_no_other(recipe: Path) -> None:
    text = recipe.read_text().replace('"magnitude"]', '"no-such"]')
    recipe.write_text(text)
    with optuna_proposing("no-such", "taylor"):
        found = searched(recipe, 2)
    assert [point.settings["stages.0.criterion"] for point in found.trials] == ["taylor"]
    assert all("no criterion 'no-such'" in why for why in found.failed.values()) and len(found.failed) == 1


@contextmanager
def optuna_proposing(*criteria: str) -> Iterator[None]:
    """Trials get these criteria in turn."""
    proposed, turn = sweeps._proposed, iter(criteria)

    def fixed(trial: optuna.Trial, key: str, choices: recipes.Choices) -> object:
        return next(turn) if key.endswith("criterion") else proposed(trial, key, choices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "_proposed", fixed)
        yield


@pytest.mark.parametrize(("swap", "by", "said"), [
    (SPACE, "", "has no \\[sweep\\]"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0.3 }", "give 'low' and 'high', or 'choices'"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0.9, high = 0.3 }", "'low' is less than 'high'"),
    ("{ low = 0.3, high = 0.9 }", "{ low = 0, high = 0.3, log = true }", "'log' needs a 'low' above 0"),
    ('kind = 0.5\nsize = "300 %"\nmask = "90 %"\n', "", "weighs work against budgets"),
])
def test_what_cannot_be_searched_is_refused(recipe: Path, swap: str, by: str, said: str) -> None:
    text = recipe.read_text()
    assert swap in text
    recipe.write_text(text.replace(swap, by))
    with pytest.raises(CompressError, match=said):
        searched(recipe, 1)


def test_another_recipe_does_not_join_a_sweep(recipe: Path) -> None:
    searched(recipe, 1)
    with pytest.raises(CompressError, match="holds the sweep of another recipe"):
        searched(recipe, 2, 1, "seed=5")


def test_the_verb_prints_the_front(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", str(recipe), "--trials", "1", "--out", str(recipe.parent / "out")])
    assert result.exit_code in (0, 3), result.output
    assert "trial" in result.stdout and "1 trials finished" in result.stdout
