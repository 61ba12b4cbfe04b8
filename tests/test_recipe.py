"""Recipes: every fault at once, overrides, task sets, and what makes stored work stale."""

from importlib.resources import files
from pathlib import Path

import pytest
import tiny
from conftest import Golden

from compressor.budgets import Budget, drop, margins
from compressor.errors import CompressError
from compressor.factory import make_workload
from compressor.pipeline import prepare
from compressor.progress import Silent
from compressor.recipe import Recipe, fingerprint, load, portable, task_sets
from compressor.workload import Task

FAULTY = """
nmae = "x"
device = 3
threads = [0]

[workload]
factory = "tiny.py"

[budgets]
kind = "three"

[[stages]]
kind = "prune"
ration = 0.5

[[stages]]
kind = "prunes"

[[stages]]
kind = "ticket"
keep_ratio = 0.5
rewind = 9
train = { steps = 8 }

[[stages]]
steps = 3

[measure]
samples = 1
"""


def given(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_every_fault_of_a_recipe_is_told_at_once(tmp_path: Path, golden: Golden) -> None:
    path = given(tmp_path, FAULTY)
    with pytest.raises(CompressError) as error:
        load(path)
    golden("recipe-faults.txt", str(error.value).replace(str(path), "recipe.toml") + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = 3\n[workload]\nfactory = 'a.py:A'", "'stages' is a list of tables: write [[stages]]."),
        ("[workload]\nfactory = 'a.py:A'\n[[stages]]\nkind = 'prune'", "a goal is missing"),
        ("[workload]\nfactory = 'a.py:A'\n[[stages]]\nkind = 'prune'\nmacs = 0.5\ncriterion = 'taylr'",
         "Stage 1 (prune): no criterion 'taylr'. Did you mean 'taylor'?"),
        ("[workload]\nfactory = 'a.py:A'\n[[stages]]\nkind = ['prune']", "no stage kind '['prune']'"),
        ("name = ", "is not TOML"),
        ("", "'workload' is missing."),
        ("threads = [1, 1]\n[workload]\nfactory = 'a.py:A'", "each named once"),
        ("[workload]\nfactory = 'a.py:A'\n[budgets]\nkind = -1", "a budget is at least 0 and finite"),
        ("[workload]\nfactory = 'a.py:A'\n[budgets]\nkind = nan", "a budget is at least 0 and finite"),
        ("seed = -1\n[workload]\nfactory = 'a.py:A'", "'seed' = -1: should be greater than or equal to 0."),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompressError) as error:
        load(given(tmp_path, text))
    assert message in str(error.value)


def test_no_recipe(tmp_path: Path) -> None:
    for path in (tmp_path / "no.toml", tmp_path):
        with pytest.raises(CompressError, match=r"There is no recipe to read at .*\.toml: No such file"):
            load(path)


def test_a_device_profile_lies_beside_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = files("profiles") / "devices" / "raspberry-pi-5.toml"
    (tmp_path / "board.toml").write_text(profile.read_text())
    path = tiny.recipe(tmp_path, device='"board.toml"')
    monkeypatch.chdir("/")
    assert prepare(*load(path), Silent(), builds=False).device.name == "board"
    assert portable(path)["device"] == str(tmp_path / "board.toml")


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path)
    changes = ["stages.0.macs=0.7", "measure.samples=12", "workload.options.batch_size=8", "device=raspberry-pi-5",
               "stages.1.train.steps=9", "threads=[2]", "budgets.size=10 %"]  # fmt: skip
    recipe, base = load(path, changes)
    prune, ticket = (stage.model_dump() for stage in recipe.stages[:2])
    assert (prune["macs"], ticket["train"]["steps"], recipe.measure.samples, recipe.threads) == (0.7, 9, 12, (2,))
    assert (recipe.device, recipe.workload.options, recipe.budgets["size"]) == (
        "raspberry-pi-5", {"batch_size": 8}, "10 %",
    )  # fmt: skip
    assert base == tmp_path


@pytest.mark.parametrize("text", ["stages.9.macs=1", "stages.x.macs=1", "name.deep.er=1", "device.x=1"])
def test_an_override_of_no_place_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CompressError, match="there is no such place in the recipe"):
        load(tiny.recipe(tmp_path), [text])


@pytest.mark.parametrize("text", ["stages", "=3", ""])
def test_an_override_is_key_and_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(CompressError, match="--set takes key=value"):
        load(tiny.recipe(tmp_path), [text])


def test_the_resolved_recipe_keeps_the_settings_of_its_stages(tmp_path: Path) -> None:
    dumped = load(tiny.recipe(tmp_path))[0].model_dump(mode="json")
    assert [stage["kind"] for stage in dumped["stages"]] == ["prune", "ticket", "finetune", "pathway"]
    assert dumped["stages"][0]["recover"]["steps"] == 4


def test_task_sets_are_in_task_order_and_named_once(tmp_path: Path) -> None:
    def sets(text: str) -> list[tuple[str, ...]]:
        return task_sets(load(tiny.recipe(tmp_path, task_sets=text))[0], ["kind", "size", "mask"])

    assert sets('["each", "all"]') == [("kind",), ("size",), ("mask",), ("kind", "size", "mask")]
    assert sets('[["mask", "kind"], "kind", ["kind", "mask"]]') == [("kind", "mask"), ("kind",)]
    assert sets("[]") == []
    with pytest.raises(CompressError, match=r"task_sets: no task 'mas'. Did you mean 'mask'\?"):
        sets('[["mas"]]')
    with pytest.raises(CompressError, match="a set names one task or more"):
        sets("[[]]")


# --- what makes stored work stale


def test_the_fingerprint_follows_what_the_work_depends_on(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("from .models.deep import net\nclass W: ...\n")
    (tmp_path / "models" / "deep").mkdir(parents=True)
    (tmp_path / "models" / "deep" / "net.py").touch()
    (tmp_path / "w.safetensors").write_bytes(b"1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "frames").write_bytes(b"1")

    def now(*overrides: str) -> str:
        text = '[workload]\nfactory = "work.py:W"\ncheckpoint = "w.safetensors"\n[workload.paths]\nroot = "data"\n'
        recipe, base = load(given(tmp_path, text), overrides)
        return fingerprint(recipe, base)

    first = now()
    assert now() == first
    assert now("measure.samples=20", "threads=[1]", "task_sets=[]") == first
    assert len({first, now("seed=1"), now("budgets.kind=1"), now("workload.options.a=1")}) == 4
    for file in ("w.safetensors", "data/frames", "neighbour.py", "models/deep/net.py"):
        (tmp_path / file).write_bytes(b"#2")
        assert now() != first, file
        first = now()
    (tmp_path / "models" / "run.py").write_bytes(b"#2")  # as artifacts have one, in a run's folder
    assert now() == first


# --- workloads


WORKLOAD = """
class Work:
    tasks = ()
    normalisation = ""
    def __init__(self, size: int = 1):
        self.size = 1 / size
    def build(self): ...
    def example_inputs(self): ...
    def batches(self, split, seed): ...
    def losses(self, outputs, batch): ...
"""


@pytest.mark.parametrize(
    ("text", "factory", "options", "message"),
    [
        ("", "no.py:Work", {}, "There is no workload file at"),
        ("", "nopackage.here:Work", {}, "nopackage.here cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "work.py:Work", {}, "work.py cannot be imported: ZeroDivisionError: division by zero."),
        ("x = ", "work.py:Work", {}, "work.py cannot be imported: SyntaxError"),
        (WORKLOAD, "work.py:Wrok", {}, "work.py has no 'Wrok'. Did you mean 'Work'?"),
        (WORKLOAD, "work.py:Work", {"sizes": 1}, "work.py:Work takes no option 'sizes'. Did you mean 'size'?"),
        (WORKLOAD, "work.py:Work", {"size": 0}, "work.py:Work cannot be made: ZeroDivisionError: division by zero"),
        (WORKLOAD, "work.py:Work", {}, "work.py:Work is no workload: it lacks metrics."),
        (WORKLOAD + "    metrics = None", "work.py:Work", {}, "task names must be there and differ, not []."),
    ],
)  # fmt: skip
def test_what_is_no_workload(tmp_path: Path, text: str, factory: str, options: dict[str, int], message: str) -> None:
    (tmp_path / "work.py").write_text(text)
    with pytest.raises(CompressError) as error:
        make_workload(factory, options, {}, tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["a+b", "all", "input", "input_0", "", "a b", "../x"])
def test_a_task_name_must_do_for_a_folder_and_an_output(tmp_path: Path, name: str) -> None:
    lines = f"    metrics = None\n    class T:\n        name = {name!r}\n    tasks = (T,)\n"
    (tmp_path / "work.py").write_text(WORKLOAD + lines)
    with pytest.raises(CompressError, match="a task cannot be called"):
        make_workload("work.py:Work", {}, {}, tmp_path)


def test_a_workload_file_may_import_its_neighbours_and_gets_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text("from types import SimpleNamespace\nTASKS = (SimpleNamespace(name='a'),)\n")
    text = "from .near import TASKS\n" + WORKLOAD.replace("size: int = 1", "root=''").replace("1 / size", "root")
    (tmp_path / "work.py").write_text(text.replace("tasks = ()", "tasks = TASKS\n    metrics = None"))
    made = make_workload("work.py:Work", {}, {"root": "data"}, tmp_path)
    assert made.size == str(tmp_path / "data")  # type: ignore[attr-defined]


# --- budgets


def test_budgets_are_relative_or_in_the_metrics_unit() -> None:
    assert Budget.parse("3 %").allowed(-50) == pytest.approx(1.5)
    assert Budget.parse(0.02).allowed(50) == 0.02
    assert (str(Budget.parse("3%")), str(Budget.parse("0.5"))) == ("3 %", "0.5")
    for text in ("-1", "inf", "x", "%", "nan %", True):
        with pytest.raises(ValueError, match="a budget is"):
            Budget.parse(text)


def test_a_drop_follows_the_metrics_direction() -> None:
    up, down = Task("up"), Task("down", higher_is_better=False)
    assert (drop(up, 5, 4), drop(down, 5, 4)) == (1, -1)
    budgets = {"up": Budget.parse("10 %"), "down": Budget.parse(2)}
    left = margins((up, down), budgets, {"up": 5.0, "down": 5.0}, {"up": 4.0, "down": 6.0}, slack=2)
    assert left == {"up": pytest.approx(0.0), "down": pytest.approx(3.0)}


def test_a_recipe_needs_no_stage() -> None:
    recipe = Recipe.model_validate({"name": "x", "workload": {"factory": "a.py:A"}})
    assert recipe.stages == ()
