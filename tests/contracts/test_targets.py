"""What every target in the registry keeps, whichever it is."""

import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
from onnx import helper

from profiles.device import Device, load, names
from targets import artifact as artifacts
from targets.base import Array, Artifact, Program, Target
from targets.errors import TargetError
from targets.registry import TARGETS, target

pytestmark = pytest.mark.compile


@pytest.fixture(params=list(TARGETS))
def each(request: pytest.FixtureRequest) -> Target:
    return target(request.param)


def device_for(each: Target) -> Device:
    """One this target plans for; for the cpu target one that this machine can run."""
    if each.kind == "cpu":
        return networks.cpu_device(bits=networks.host_bits())
    return load(names(each.kind)[-1])


def two_tasks(each: Target | None = None) -> Program:
    """A product that keeps its input's channels apart, and a sum that does not; the product in int8 for an fpga."""
    quantized = each is not None and each.kind == "fpga"
    nodes = [
        helper.make_node("Conv", ["x on a grid", "w on a grid"] if quantized else ["x", "w"], ["p"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["p on a grid" if quantized else "p"], ["edges"]),
        helper.make_node("Flatten", ["p on a grid" if quantized else "p"], ["flat"]),
        helper.make_node("Gemm", ["flat", "g"], ["score"], transB=1),
    ]
    weights: dict[str, Array] = {"w": networks.example(5, 3, 3, 3), "g": networks.example(2, 5 * 36)}
    if quantized:
        weights |= {"w": np.rint(weights["w"] * 40).clip(-127, 127).astype(np.int8), "w zero": np.zeros(5, np.int8)}
        weights |= {"w scale": np.full(5, 1 / 40, np.float32)}
        for name, scale, zero in (("x", 0.03, 4), ("p", 0.2, -7)):
            weights |= {f"{name} scale": np.float32(scale), f"{name} zero": np.int8(zero)}
        rounding = {name: [name, f"{name} scale", f"{name} zero"] for name in ("x", "p")}
        back = {name: [f"{name} rounded", *steps[1:]] for name, steps in rounding.items()}
        nodes[:1] = [
            helper.make_node("QuantizeLinear", rounding["x"], ["x rounded"]),
            helper.make_node("DequantizeLinear", back["x"], ["x on a grid"]),
            helper.make_node("DequantizeLinear", ["w", "w scale", "w zero"], ["w on a grid"], axis=0),
            nodes[0],
            helper.make_node("QuantizeLinear", rounding["p"], ["p rounded"]),
            helper.make_node("DequantizeLinear", back["p"], ["p on a grid"]),
        ]
    return networks.node_program(nodes, {"x": (1, 3, 6, 6)}, {"edges": (1, 5, 6, 6), "score": (1, 2)}, weights, "two")


def test_it_says_who_it_is(each: Target) -> None:
    assert TARGETS[each.name].startswith("targets.")
    assert each.kind in ("cpu", "gpu", "fpga")


def test_it_refuses_devices_of_another_kind_and_offers_its_own(each: Target) -> None:
    for name in names():
        device = load(name)
        if device.kind == each.kind:
            continue
        article = "an" if device.kind == "fpga" else "a"
        wanted = (
            f"The {each.name} target cannot compile for '{name}', which is {article} {device.kind} device. "
            f"{each.kind.upper()} devices: {', '.join(names(each.kind))}."
        )
        for refuse in (lambda d=device: each.check(d), lambda d=device: each.plan(two_tasks(each), d)):
            with pytest.raises(TargetError) as caught:
                refuse()
            assert str(caught.value) == wanted


def test_planning_is_pure_and_needs_no_tool(each: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    first, second = (each.plan(two_tasks(each), device_for(each)) for _ in range(2))
    assert first.digest() == second.digest()
    assert first.files == second.files
    assert first.commands and first.files["model.onnx"]
    assert list(tmp_path.iterdir()) == []


def test_every_built_in_device_can_be_planned_for(each: Target) -> None:
    digests = {each.plan(two_tasks(each), load(name)).digest() for name in names(each.kind)}
    assert len(digests) == len(names(each.kind))


def test_the_digest_knows_weights_names_and_devices(each: Target) -> None:
    device = device_for(each)
    plan = each.plan(two_tasks(each), device)
    changed = two_tasks(each)
    weights = changed.model.graph.initializer[0]
    weights.raw_data = bytes(len(weights.raw_data))
    assert each.plan(changed, device).digest() != plan.digest()
    renamed = Program("other", two_tasks(each).model, plan.program.tasks)
    assert each.plan(renamed, device).digest() != plan.digest()


def test_a_missing_tool_is_named_before_anything_is_written(
    each: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = each.plan(two_tasks(each), device_for(each))
    monkeypatch.setenv("PATH", "")
    for act in (lambda: each.check(plan.device), lambda: each.build(plan, tmp_path / "out", {}, {})):
        with pytest.raises(TargetError, match="PATH") as caught:
            act()
        assert "apt install" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_built_answers_as_onnx_does(each: Target, tmp_path: Path, threads: int) -> None:
    device = device_for(each)
    try:
        each.check(device)
    except TargetError as error:
        pytest.skip(str(error))
    built = each.build(each.plan(two_tasks(each), device), tmp_path / "built", {}, {})
    assert artifacts.read(built.directory).manifest.target == each.name
    try:
        run = each.load(built, threads)
    except TargetError as error:
        if each.kind != "gpu":
            raise
        pytest.skip(str(error))
    x = networks.example(1, 3, 6, 6)
    found, wanted = run(x), networks.answers(two_tasks(each), x)
    assert run.tasks == tuple(found) == ("edges", "score")
    for task, want in wanted.items():
        np.testing.assert_allclose(found[task], want, rtol=1e-4, atol=1e-4)


def test_a_bad_name_is_met_with_the_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        target("cpuu")
    assert str(caught.value) == "No target 'cpuu'. Did you mean 'cpu'?"


def test_the_registry_imports_nothing_heavy() -> None:
    code = "import sys, targets.registry; assert not {'tvm', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Built by the target that runs everywhere, for what a Runner promises."""
    cpu = target("cpu")
    folder = tmp_path_factory.mktemp("runner") / "two"
    return cpu.build(cpu.plan(two_tasks(), networks.cpu_device(bits=networks.host_bits())), folder, {}, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "0 inputs given; the artifact takes 'x' float32 (1, 3, 6, 6)."),
        (
            (np.zeros((1, 3, 6, 6)),),
            "Input 'x' is float64 (1, 3, 6, 6); the artifact takes 'x' float32 (1, 3, 6, 6).",
        ),
        (
            (np.zeros((1, 3, 6, 5), np.float32),),
            "Input 'x' is float32 (1, 3, 6, 5); the artifact takes 'x' float32 (1, 3, 6, 6).",
        ),
    ],
)
def test_wrong_inputs_are_refused(artifact: Artifact, given: tuple[Array, ...], said: str) -> None:
    with pytest.raises(TargetError) as caught:
        target("cpu").load(artifact, 1)(*given)
    assert str(caught.value) == said


def test_answers_outlive_the_next_call(artifact: Artifact) -> None:
    run = target("cpu").load(artifact, 1)
    first = run(networks.example(1, 3, 6, 6))
    kept = {task: answer.copy() for task, answer in first.items()}
    run(networks.example(1, 3, 6, 6, seed=1))
    for task, answer in first.items():
        np.testing.assert_array_equal(answer, kept[task])
        assert not answer.flags.writeable


def test_strided_inputs_are_read_as_numpy_sees_them(artifact: Artifact) -> None:
    x = networks.example(1, 6, 6, 3).transpose(0, 3, 1, 2)
    run = target("cpu").load(artifact, 1)
    np.testing.assert_array_equal(run(x)["edges"], run(np.ascontiguousarray(x))["edges"])


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_impossible_thread_counts_are_refused(artifact: Artifact, threads: int) -> None:
    with pytest.raises(TargetError, match=f"Cannot run with {threads} threads"):
        target("cpu").load(artifact, threads)


def test_code_for_another_machine_is_not_opened(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr(artifacts, "read", lambda directory: artifact_for(artifact, mtriple="x86_64-linux-gnu"))
    with pytest.raises(TargetError) as caught:
        target("cpu").load(artifact, 1)
    assert str(caught.value) == "The artifact was built for 'test-cpu' (x86_64); this machine is riscv64."


def artifact_for(artifact: Artifact, **changes: object) -> Artifact:
    """The artifact as its manifest would read for another TVM target."""
    device = artifact.manifest.device
    other = device.model_copy(update={"target": {**device.target, **changes}})
    return Artifact(artifact.directory, artifact.manifest.model_copy(update={"device": other}))
