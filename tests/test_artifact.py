"""The artifact folder: whole or not at all, verified before anything is opened, runnable without this package."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
from onnx import helper

from targets import artifact as artifacts
from targets.base import Artifact, Program
from targets.cpu import CpuTarget
from targets.errors import TargetError

pytestmark = pytest.mark.compile


def tiny() -> Program:
    """Two tasks over a 4x4 picture."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["edges"]),
        helper.make_node("Sigmoid", ["c"], ["mask"]),
    ]
    shapes = {"edges": (1, 2, 4, 4), "mask": (1, 2, 4, 4)}
    weights = {"w": networks.example(2, 3, 1, 1)}
    program = networks.node_program(nodes, {"x": (1, 3, 4, 4)}, shapes, weights, "edges+mask")
    return Program(program.name, program.model, program.tasks, "divide by 255")


def built(folder: Path, extra: dict[str, bytes] | None = None) -> Artifact:
    target = CpuTarget()
    device = networks.cpu_device(bits=networks.host_bits())
    return target.build(target.plan(tiny(), device), folder, extra or {}, {"run": "r1"})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built(tmp_path_factory.mktemp("artifacts") / "tiny", {"surgery.json": b"{}"})


@pytest.fixture
def folder(original: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original.directory, tmp_path / "copy"))


def test_the_manifest_says_what_is_inside(original: Artifact) -> None:
    manifest = original.manifest
    assert manifest.tasks == ("edges", "mask")
    assert [(spec.name, spec.shape, spec.dtype) for spec in manifest.inputs] == [("x", (1, 3, 4, 4), "float32")]
    assert [spec.name for spec in manifest.outputs] == ["edges", "mask"]
    assert manifest.normalisation == "divide by 255"
    assert manifest.about == {"run": "r1"}
    assert sorted(manifest.files) == ["kernels.json", "model.onnx", "model.so", "run.py", "surgery.json"]
    text = json.loads((original.directory / "manifest.json").read_text())
    assert text["schema"] == "taskpress.artifact/1"
    assert text["device"]["name"] == "test-cpu"


def spoil_nothing_missing(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def spoil_byte(folder: Path) -> None:
    data = bytearray((folder / "model.so").read_bytes())
    data[100] ^= 1
    (folder / "model.so").write_bytes(data)


def spoil_extra(folder: Path) -> None:
    (folder / "evil.so").write_bytes(b"")


def spoil_link(folder: Path) -> None:
    (folder / "run.py").rename(folder.parent / "run.py")
    (folder / "run.py").symlink_to(folder.parent / "run.py")


def spoil_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def edit(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing_missing, "lacks model.onnx. Copy the whole folder, or build it again."),
        (spoil_byte, ": model.so differs from its manifest (SHA-256). Copy or build it again."),
        (spoil_extra, "holds evil.so, which its manifest does not name. Remove it."),
        (spoil_link, ": run.py is no regular file; an artifact has no other."),
        (spoil_folder, ": more is no regular file; an artifact has no other."),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: it is no artifact, or an unfinished one."),
        (
            lambda f: edit(f, lambda m: m.update(schema="taskpress.artifact/9")),
            "'schema' = 'taskpress.artifact/9': should be 'taskpress.artifact/1'.",
        ),
        (lambda f: edit(f, lambda m: m.update(tassks=[])), "no option 'tassks'. Did you mean 'tasks'?"),
        (
            lambda f: edit(f, lambda m: m["files"].update({"../x": "0"})),  # type: ignore[attr-defined]
            ": the manifest names '../x', which leads out of the folder.",
        ),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: Invalid JSON"),
    ],
)
def test_a_spoiled_artifact_is_refused_before_it_is_loaded(
    folder: Path, original: Artifact, spoil: Callable[[Path], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(folder)
    monkeypatch.setattr("tvm.runtime.load_module", lambda path: pytest.fail("opened"))
    with pytest.raises(TargetError) as caught:
        CpuTarget().load(Artifact(folder, original.manifest), 1)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TargetError, match=r"the disk is full\. Nothing was left behind"):
        built(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_old_artifact(folder: Path) -> None:
    with pytest.raises(TargetError, match=r"Cannot add 'model\.so' to an artifact"):
        built(folder, {"model.so": b""})
    assert artifacts.read(folder).manifest.about == {"run": "r1"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["copy"]


def test_building_over_an_artifact_replaces_it(folder: Path) -> None:
    built(folder, {"notes.txt": b"new"})
    assert "notes.txt" in artifacts.read(folder).manifest.files
    assert "surgery.json" not in artifacts.read(folder).manifest.files
    assert [entry.name for entry in folder.parent.iterdir()] == ["copy"]


def test_an_artifact_that_was_built_again_runs_its_new_code(folder: Path) -> None:
    x = networks.example(1, 3, 4, 4)
    before = CpuTarget().load(artifacts.read(folder), 1)(x)
    weights = {"w": networks.example(2, 3, 1, 1, seed=7)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["edges"])]
    program = networks.node_program(nodes, {"x": (1, 3, 4, 4)}, {"edges": (1, 2, 4, 4)}, weights)
    target, device = CpuTarget(), networks.cpu_device(bits=networks.host_bits())
    again = target.build(target.plan(program, device), folder, {}, {})
    after = target.load(again, 1)(x)
    np.testing.assert_allclose(after["edges"], networks.answers(program, x)["edges"], atol=1e-6)
    assert not np.allclose(after["edges"], before["edges"])


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(TargetError, match="exists and is no artifact, so it is left alone"):
        built(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"


def test_the_same_plan_builds_the_same_digest() -> None:
    device = networks.cpu_device(bits=256)
    assert CpuTarget().plan(tiny(), device).digest() == CpuTarget().plan(tiny(), device).digest()


@pytest.mark.parametrize("runtime_only", [False, True])
def test_the_loader_needs_only_the_runtime(original: Artifact, tmp_path: Path, runtime_only: bool) -> None:
    x = networks.example(1, 3, 4, 4)
    np.save(tmp_path / "x.npy", x)
    code = f"""
import runpy, sys
import numpy
for absent in ("torch", "onnx", "onnxruntime", "targets", "profiles", "compressor"):
    sys.modules[absent] = None
answers = runpy.run_path({str(original.directory / "run.py")!r})["load"](2)(numpy.load("x.npy"))
numpy.savez("y.npz", **answers)
"""
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"} if runtime_only else dict(os.environ)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    wanted = networks.answers(tiny(), x)
    with np.load(tmp_path / "y.npz") as found:
        for task, want in wanted.items():
            np.testing.assert_allclose(found[task], want, atol=1e-6)
    artifacts.read(original.directory)  # running it left nothing in it


def test_the_loader_refuses_a_changed_file(folder: Path) -> None:
    spoil_byte(folder)
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("model.so differs from the manifest.")
