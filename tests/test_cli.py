"""The command line as a person and a script meet it: help, usage, plans, messages and exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Golden
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from compressor.cli import app

VERBS = ("run", "inspect", "verify", "bench", "build", "tune", "sweep", "report", "targets", "devices")


def compress(*arguments: object, **environment: str) -> Result:
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="compress", env=plain | environment)


def fails(result: Result, message: str) -> None:
    """Progress on stderr and then one message, nothing on stdout, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    _, said, told = f"\n{result.stderr}".partition("\ncompress: ")
    assert said and message in told
    assert "Traceback" not in result.stderr and result.stdout == ""


# --- help and usage


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str, golden: Golden) -> None:
    result = compress(*[verb] * bool(verb), "--help")
    assert result.exit_code == 0
    text = "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"
    golden(f"help/{verb or 'compress'}.txt", text)


def test_help_imports_nothing_heavy_and_costs_little_more_than_its_library() -> None:
    ours = "import compressor.cli as cli; app = cli.app"
    bare = "import typer; app = typer.Typer(); app.command()(lambda: None); app.command('run')(lambda: None)"
    took, heavy = dict[str, float](), dict[str, str]()
    for defined in [ours, bare] * 3:  # in turn, as neighbours slow both; the least of three is the code's own
        code = (
            f"import sys, time; begun = time.process_time(); {defined}\n"
            "try:\n    app(['run', '--help'], prog_name='compress')\nexcept SystemExit as done: assert done.code == 0\n"
            "heavy = {'torch', 'tvm', 'numpy', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)\n"
            "print(time.process_time() - begun, *heavy)"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        seconds, _, heavy[defined] = done.stdout.splitlines()[-1].partition(" ")
        took[defined] = min(float(seconds), took.get(defined, float("inf")))
    assert heavy[ours] == ""
    assert took[ours] < 1.5 * took[bare]


@pytest.mark.parametrize(
    "arguments",
    [
        ["runn"],
        ["run"],
        ["run", "x", "--outt", "y"],
        ["bench", "x", "--threads", "0"],
        ["verify", "x", "--inputs", "no"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = compress(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage: compress" in result.stderr


def test_targets_and_devices() -> None:
    assert compress("targets").stdout == "cpu\ngpu\nfpga\n"
    assert json.loads(compress("targets", "--json").stdout) == ["cpu", "gpu", "fpga"]
    listed = compress("devices").stdout
    assert listed.splitlines()[0].split() == ["device", "kind"]
    assert any(line.split()[:2] == ["raspberry-pi-5", "cpu"] for line in listed.splitlines())
    assert {device["name"] for device in json.loads(compress("devices", "--json").stdout)} >= {"host", "zcu104"}


# --- inspect and the plan


def test_inspect_is_a_table_or_json_and_needs_no_compiler(tmp_path: Path) -> None:
    result = compress("inspect", tiny.recipe(tmp_path), PATH="")
    assert result.exit_code == 0
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["task", "set", "MACs", "parameters", "shared", "private"]
    assert [row.split("  ")[0] for row in rows] == ["kind", "size", "mask", "kind + size + mask"]
    found = json.loads(compress("inspect", tmp_path, "--json").stdout)
    assert found[2]["tasks"] == ["mask"] and found[2]["private"] > 0 and found[0]["macs"] < found[3]["macs"]
    assert all(row["shared"] + row["private"] == row["parameters"] for row in found)


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor import pipeline

    recipe = tiny.recipe(tmp_path, device='"x86-64-v3"')
    real, ticks = pipeline.dry_run, iter((0.0, 0.5) * 3)
    monkeypatch.setattr(pipeline, "dry_run", lambda job, out: real(job, out, lambda: next(ticks)))
    result = compress("run", recipe, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    golden("plan.txt", "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n")
    assert not (tmp_path / "out").exists()


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    result = compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert [stage["kind"] for stage in plan["stages"]] == ["prune", "ticket", "finetune", "pathway"]
    assert plan["stages"][1]["train_steps"] == 16 and plan["artifacts"][-1] == "kind+size+mask"


# --- what can be wrong


def checkpoint(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = load_file(tiny.weights())
    change(state)
    path = folder / "changed.safetensors"
    save_file(state, path)
    return path


def rename(state: dict[str, torch.Tensor]) -> None:
    state["fused.wieght"] = state.pop("fused.weight")
    state["stem.0.weight"] = torch.zeros(8, 1, 3, 3)


def poison(state: dict[str, torch.Tensor]) -> None:
    state["fused.bias"][1] = torch.nan


def overflow(state: dict[str, torch.Tensor]) -> None:
    state["stem.1.weight"].fill_(3e38)
    state["down.0.weight"].fill_(3e38)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (rename, ["does not fit the network: missing fused.weight; unexpected fused.wieght",
                  "stem.0.weight has shape (8, 1, 3, 3), the network's is (16, 1, 3, 3)"]),
        (poison, ["The weights hold NaN or infinity: fused.bias."]),
        (overflow, ["Task 'kind' answers NaN or infinity on the example inputs."]),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], messages: list[str]
) -> None:
    recipe = tiny.recipe(tmp_path, checkpoint=f'"{checkpoint(tmp_path, change)}"')
    for message in messages:
        fails(compress("run", recipe, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no checkpoint at"),
        (b"", "is not a readable safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json", "is not a readable safetensors file"),
        ("truncated", "is not a readable safetensors file"),
        ("pickle", "It looks like a pickle, which can run code when opened and is refused."),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "weights.pt"
    if content == "pickle":
        torch.save({"w": torch.zeros(1)}, path)
    elif content == "truncated":
        path.write_bytes(tiny.weights().read_bytes()[:-10])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    fails(compress("run", tiny.recipe(tmp_path), "--set", f"workload.checkpoint={path}"), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgets.sise=1", "[budgets] no task 'sise'. Did you mean 'size'?"),
        ("device=zcu104", "The cpu target cannot compile for 'zcu104', which is an fpga device. CPU devices: host"),
        ("device=hots", "No device 'hots'. Did you mean 'host'?"),
        ("target=cqu", "No target 'cqu'. Did you mean 'cpu'?"),
        ("workload.options.batch=2", "takes no option 'batch'. Did you mean 'batch_size'?"),
        ("stages.0.loops=2", "Stage 1 (prune): no option 'loops'."),
        ("task_sets=[['kind', 'masks']]", "task_sets: no task 'masks'. Did you mean 'mask'?"),
        ("workload.factory=tiny.py", "a factory is 'file.py:Class' or 'package.module:Class'"),
    ],
)
def test_a_recipe_that_cannot_be_served(tmp_path: Path, override: str, message: str) -> None:
    fails(compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out", "--set", override), message)
    assert not (tmp_path / "out").exists()


def test_no_compiler_is_told_before_any_work(tmp_path: Path) -> None:
    result = compress("run", tiny.recipe(tmp_path), "--out", tmp_path / "out", PATH=str(tmp_path))
    fails(result, "No linker for 'host': looked on PATH for cc, gcc, clang. On Debian or Ubuntu: apt install gcc.")
    assert not (tmp_path / "out").exists()


WORKLOAD = """
from pathlib import Path
import sys
sys.path.insert(0, {tests!r})
import tiny
from compressor.workload import Task

class Broken(tiny.Tiny):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('tasks = (Task("kind", output="fusd"), *tiny.Tiny.tasks[1:])',
         "Task 'kind': output 'fusd' is not among the network's outputs. Did you mean 'fused'?"),
        ('tasks = (*tiny.Tiny.tasks[1:], Task("kind", output="fused", channels=(2, 9)))',
         "Task 'kind' is channels 2:9 of output 'fused', whose shape is (1, 4)."),
        ('def example_inputs(self): return (tiny.torch.zeros(1, 3, 16, 16),)',
         "The network fails on its example inputs of shape (1, 3, 16, 16)"),
        ('def build(self): raise KeyError("layers")', "KeyError: 'layers' (-v shows where)"),
        ('def metrics(self): return {}', "[budgets] 'kind' has a budget, but the workload has no metric for it."),
    ],
)  # fmt: skip
def test_a_workload_whose_network_is_not_what_it_says(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(WORKLOAD.format(tests=str(Path(__file__).parent), body=body))
    recipe = tiny.recipe(tmp_path, factory=f'"{tmp_path}/broken.py:Broken"')
    fails(compress("run", recipe, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_verbose_shows_where_it_went_wrong(tmp_path: Path) -> None:
    result = compress("run", tmp_path / "no.toml", "-v")
    assert type(result.exception).__name__ == "CompressError" and result.exit_code == 1


def test_a_folder_that_is_no_artifact_or_run(tmp_path: Path) -> None:
    for verb in ("verify", "bench"):
        fails(compress(verb, tmp_path), "has no manifest.json: it is no artifact, or an unfinished one.")
    fails(compress("report", tmp_path), "cannot read report.json: No such file or directory.")


def test_a_reader_that_goes_away_is_no_error() -> None:
    root = Path(__file__).parent.parent
    script = f"'{sys.executable}' -m compressor devices --json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, cwd=root, env=dict(os.environ)
    )
    assert "Traceback" not in done.stderr
