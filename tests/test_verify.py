"""The verification ladder: wrong importers, kernels and simplifiers are caught, and the layer is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import pytest
import tiny
import torch
from onnx import numpy_helper

from compressor import export
from compressor.deploy import deploy, real_inputs
from compressor.errors import CompressError
from compressor.export import to_program
from compressor.model import MultiTaskModel
from compressor.pathway import Pathway, extract
from compressor.store import opened
from compressor.verify import RUNGS, Answer, climb, compare, difference, onnx_answers, told
from profiles.device import load as load_device
from targets.base import Array, Artifact, Program, Runner
from targets.cpu import CpuTarget
from targets.errors import TargetError
from targets.registry import target

TASKS = ("kind", "size", "mask")
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return tiny.model()


@pytest.fixture(scope="module")
def pathway(model: MultiTaskModel) -> Pathway:
    return extract(model, TASKS)


@pytest.fixture(scope="module")
def programs(model: MultiTaskModel, pathway: Pathway) -> tuple[Program, Program]:
    return to_program(pathway, model.inputs)


@pytest.fixture(scope="module")
def inputs() -> list[tuple[torch.Tensor, ...]]:
    images, _ = tiny.pictures(3, torch.Generator().manual_seed(1))
    return [(image[None],) for image in images]


def changed(program: Program, change: Change) -> Program:
    copy = onnx.ModelProto()
    copy.CopyFrom(program.model)
    change(copy)
    return Program(program.name, copy, program.tasks, program.normalisation)


def larger(nth: int) -> Change:
    """Make the nth convolution's weights 1 % larger, where there are so many."""

    def change(model: onnx.ModelProto) -> None:
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        if nth < len(convolutions):
            weight = next(w for w in model.graph.initializer if w.name == convolutions[nth].input[1])
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))

    return change


def wrong_for(change: Change) -> Callable[[Program], Answer]:
    """An engine that runs every program with the same fault in it, as a wrong importer or kernel would."""
    return lambda program: onnx_answers(changed(program, change))


CONVOLUTIONS = ("stem.0", "down.0", "inner.0", "outer.0", "mask.0", "mask.2")


def test_a_sound_pathway_climbs_every_rung(
    model: MultiTaskModel, pathway: Pathway, programs: tuple[Program, Program], inputs: list[tuple[torch.Tensor, ...]]
) -> None:
    found = climb(model, pathway, programs, inputs, onnx_answers, onnx_answers, onnx_answers(programs[1]))
    assert [(c.rung, c.task) for c in found] == [(rung, task) for rung in RUNGS for task in TASKS]
    assert all(c.holds and c.tolerance > 0 for c in found)


@pytest.mark.parametrize("nth", [0, 2, 4])
def test_a_wrong_importer_is_named_with_its_first_layer(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    inputs: list[tuple[torch.Tensor, ...]],
    nth: int,
) -> None:
    wrong = wrong_for(larger(nth))
    with pytest.raises(CompressError) as error:
        climb(model, pathway, programs, inputs, wrong, onnx_answers, onnx_answers(programs[1]))
    layer = CONVOLUTIONS[nth]
    assert "of pathway 'kind+size+mask': rung 'relax' differs by" in str(error.value)
    assert f"from eager PyTorch, first at layer '{layer}' (Conv). Nothing was deployed." in str(error.value)


def test_a_wrong_kernel_is_named_with_its_first_layer(
    model: MultiTaskModel, pathway: Pathway, programs: tuple[Program, Program], inputs: list[tuple[torch.Tensor, ...]]
) -> None:
    wrong = wrong_for(larger(1))
    with pytest.raises(CompressError) as error:
        climb(model, pathway, programs, inputs, onnx_answers, wrong, wrong(programs[1]))
    assert "rung 'artifact' differs" in str(error.value)
    assert "first at layer 'down.0' (Conv)" in str(error.value)


def test_a_wrong_exporter_is_named_with_its_first_layer(
    model: MultiTaskModel, pathway: Pathway, programs: tuple[Program, Program], inputs: list[tuple[torch.Tensor, ...]]
) -> None:
    wrong = changed(programs[0], larger(4))
    with pytest.raises(CompressError) as error:
        climb(model, pathway, (wrong, programs[1]), inputs, onnx_answers, onnx_answers, onnx_answers(programs[1]))
    assert "rung 'onnx' differs" in str(error.value) and "first at layer 'mask.0' (Conv)" in str(error.value)


def test_a_simplifier_that_changes_answers_is_caught(
    model: MultiTaskModel, pathway: Pathway, inputs: list[tuple[torch.Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = onnxsim.simplify

    def simplify(given: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, bool]:
        found, same = plain(given, **options)
        larger(1)(found)
        return found, same

    monkeypatch.setattr(export.onnxsim, "simplify", simplify)
    programs = to_program(pathway, model.inputs)
    with pytest.raises(CompressError) as error:
        climb(model, pathway, programs, inputs, onnx_answers, onnx_answers, onnx_answers(programs[1]))
    assert "rung 'onnxsim' differs" in str(error.value)
    assert "first at layer 'down.0' (Conv)" in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a: a * np.float32(np.nan), "rung 'artifact' answers NaN or infinity in other places than eager"),
        (
            lambda a: np.where(a > 0, np.float32(np.inf), a),
            "answers NaN or infinity in other places than eager PyTorch",
        ),
        (lambda a: a.astype(np.float64), "rung 'artifact' answers float64 (1, 3), not float32 (1, 3) as eager PyTorch"),
        (lambda a: a[:, :1], "rung 'artifact' answers float32 (1, 1), not float32 (1, 3) as eager PyTorch"),
    ],
)
def test_other_shapes_dtypes_and_nan_are_told_apart(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    inputs: list[tuple[torch.Tensor, ...]],
    answer: Callable[[Array], Array],
    message: str,
) -> None:
    sound = onnx_answers(programs[1])

    def built(*x: Array) -> dict[str, Array]:
        return {task: answer(a) if task == "kind" else a for task, a in sound(*x).items()}

    with pytest.raises(CompressError) as error:
        climb(model, pathway, programs, inputs, onnx_answers, onnx_answers, built)
    assert message in str(error.value)


def test_an_error_on_one_input_of_several_is_enough(
    model: MultiTaskModel, pathway: Pathway, programs: tuple[Program, Program], inputs: list[tuple[torch.Tensor, ...]]
) -> None:
    sound, calls = onnx_answers(programs[1]), iter(range(9))

    def built(*x: Array) -> dict[str, Array]:
        factor = np.float32(1.01 if next(calls) == 2 else 1)
        return {task: factor * a for task, a in sound(*x).items()}

    with pytest.raises(CompressError, match="rung 'artifact' differs"):
        climb(model, pathway, programs, inputs, onnx_answers, onnx_answers, built)


# --- how far apart


def test_differences() -> None:
    a = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert difference(a, a.copy()) == 0
    assert difference(a, np.array([1.5, np.nan, np.inf, -np.inf], np.float32)) == 0.5
    for other in ([np.nan, np.nan, np.inf, -np.inf], [1, 1, np.inf, -np.inf], [1, np.nan, -np.inf, -np.inf]):
        assert difference(a, np.array(other, np.float32)) == float("inf")
    assert difference(np.zeros((0, 2)), np.zeros((0, 2))) == 0


def test_whole_numbers_must_be_equal() -> None:
    a = np.array([[1, 2**62]])
    assert compare("onnx", "t", [(a, a.copy())]).holds
    assert not compare("onnx", "t", [(a, a + np.array([[1, 0]]))]).holds


def test_tolerance_follows_the_largest_finite_answer() -> None:
    want = np.array([100.0, np.inf], np.float32)
    assert compare("onnx", "t", [(want, want)]).tolerance == pytest.approx(1e-2)
    near, far = want + np.float32(0.009), want + np.float32(0.02)
    assert compare("onnx", "t", [(want, near)]).holds and not compare("onnx", "t", [(want, far)]).holds
    assert "differs by 2.00e-02 (tolerance 1.00e-02) from" in told(compare("onnx", "t", [(want, far)]), want, far)


# --- through a real target


@pytest.mark.compile
def test_a_lowering_that_is_wrong_deploys_nothing(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is in what every TVM rung shares, so the first of them is named, and the folder stays empty."""
    import compressor.deploy as module
    import targets.cpu
    import targets.lower

    plain = targets.lower.lower
    for place in (targets.lower, targets.cpu):
        monkeypatch.setattr(place, "lower", lambda program: plain(changed(program, larger(2))))
    assert module.reference is targets.lower.reference
    bench = tiny.bench(model, tmp_path)
    device = load_device("host")
    with opened(tmp_path / "out", resume=True) as store:
        with pytest.raises(CompressError, match=r"rung 'relax' differs by .* first at layer '.*' \(Conv\)"):
            deploy(model, ("kind",), target("cpu"), device, bench, store, 2)
        assert list((store.directory / "artifacts").iterdir()) == []
        monkeypatch.undo()
        made = deploy(model, ("kind",), target("cpu"), device, bench, store, 2)
    assert [path.name for path in (tmp_path / "out" / "artifacts").iterdir()] == ["kind"]
    assert {c.rung for c in made.verified} == set(RUNGS) and made.unverified == ""


def test_an_artifact_for_elsewhere_is_verified_on_every_rung_but_its_own(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(self: CpuTarget, artifact: Artifact, threads: int) -> Runner:
        raise TargetError("built for another machine")

    bench = tiny.bench(model, tmp_path)
    with opened(tmp_path / "out", resume=True) as store, monkeypatch.context() as patch:
        patch.setattr(CpuTarget, "load", elsewhere)
        made = deploy(model, ("kind",), target("cpu"), load_device("host"), bench, store, 2)
        assert {c.rung for c in made.verified} == set(RUNGS) - {"artifact"}
        assert made.unverified == "built for another machine" and not made.runs_here
        again = deploy(model, ("kind",), target("cpu"), load_device("host"), bench, store, 2)
        assert again.resumed and again.verified == made.verified
        patch.undo()
        here = deploy(model, ("kind",), target("cpu"), load_device("host"), bench, store, 2)
    assert not here.resumed and here.runs_here and {c.rung for c in here.verified} == set(RUNGS)


def test_real_inputs_are_spread_over_the_validate_split(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path)
    found = real_inputs(model, bench, 5)
    assert [tuple(x.shape) for (x,) in found] == [(1, 1, 16, 16)] * 5
    wanted = [bench.validation[k // 2].inputs[0][k % 2][None] for k in range(5)]
    assert all(torch.equal(have, want) for (have,), want in zip(found, wanted, strict=True))
    bench.validation.clear()
    assert real_inputs(model, bench, 5) == [model.inputs]
