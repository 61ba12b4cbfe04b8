"""A model is saved and rebuilt bit for bit, and what does not fit is refused with one clear message."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.channels import Axis
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.groups import Prunable
from compressor.model import SURGERY, MultiTaskModel, load_checkpoint, load_weights
from compressor.tensors import names_of
from compressor.trace import trace
from compressor.workload import Task, answers
from tests.models import Spec, Toy, build, of

SPEC = Spec(("conv_bn_relu", "tied", "depthwise", "transposed_depthwise"), (("tokens",), ("norms",)), batch=2)


def cut_model() -> MultiTaskModel:
    model = build(SPEC)
    for part in (slice(0, 1), slice(1, 2)):  # twice, so that indices of indices are recorded
        prunable = Prunable.of(model)
        keep = prunable.keep_all()
        for group in prunable.groups:
            keep[group.classes[part]] = len(group) < 3
        model = prunable.cut(model, keep)
    return model


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    model = cut_model()
    model.masks = {"stem.weight": torch.rand(tensor_of(model.module, "stem.weight").shape) > 0.5}
    model.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path, Toy(SPEC))
    state, again = model.module.state_dict(), loaded.module.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert loaded.kept == model.kept
    assert loaded.masks.keys() == model.masks.keys()
    assert torch.equal(loaded.masks["stem.weight"], model.masks["stem.weight"])
    assert not loaded.module.training
    tied = loaded.module.trunk[1]
    assert tied.a.weight is tied.b.weight
    with torch.no_grad():
        wanted, given = model.answers(*model.inputs), loaded.answers(*model.inputs)
    assert all(torch.equal(given[task], wanted[task]) for task in wanted)


def test_kept_names_the_original_indices() -> None:
    model, original = cut_model(), build(SPEC)
    whole = tensor_of(original.module, "trunk.0.0.weight")
    for dim, kept in model.kept["trunk.0.0.weight"].items():
        whole = whole.index_select(dim, torch.tensor(kept))
    assert torch.equal(whole, tensor_of(model.module, "trunk.0.0.weight"))


def test_a_cut_reaches_every_name_of_a_tensor_and_its_masks() -> None:
    model = build(Spec(("tied",), ((), ())))
    names = next(group for group in names_of(model.module) if len(group) > 1)
    assert names == ["trunk.0.a.weight", "trunk.0.b.weight"]
    model.masks = {name: torch.ones(8, 8, 3, 3, dtype=torch.bool) for name in names}
    left = torch.tensor([0, 3])
    model.cut({Axis(names[0], 0): left, Axis("trunk.0.a.bias", 0): left, Axis("trunk.0.b.bias", 0): left})
    assert [tensor_of(model.module, name).shape[0] for name in names] == [2, 2]
    assert [model.masks[name].shape[0] for name in names] == [2, 2]
    assert model.module.trunk[0].b.out_channels == 2


def test_a_clone_shares_nothing() -> None:
    model = cut_model()
    copy = model.clone()
    copy.cut({Axis("stem.weight", 0): torch.tensor([0])})
    with torch.no_grad():
        tensor_of(copy.module, "trunk.0.0.weight").zero_()
    assert tensor_of(model.module, "stem.weight").shape[0] > 1
    assert tensor_of(model.module, "trunk.0.0.weight").any()
    assert model.kept["stem.weight"][0] != copy.kept["stem.weight"][0]


@pytest.mark.parametrize("kept", [[0, 8], [-1], [3, 1], [2, 2]])
def test_indices_that_are_none_are_refused_and_nothing_is_cut(kept: list[int]) -> None:
    model = build(Spec((), ((), ())))
    with pytest.raises(
        CompressError, match=r"^Dimension 0 of stem\.weight, whose shape is \(8, 3, 3, 3\), cannot keep"
    ):
        model.cut({Axis("stem.bias", 0): torch.tensor([0]), Axis("stem.weight", 0): torch.tensor(kept)})
    assert model.kept == {}
    assert tensor_of(model.module, "stem.bias").shape == (8,)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "is not a surgery record"),
        ("[]", "is not a surgery record"),
        ('{"schema": "taskpress.surgery/9", "kept": {}}', "has the schema 'taskpress.surgery/9'; this version reads"),
        (
            json.dumps({"schema": "taskpress.surgery/1", "kept": {"stem.weight": {"0": [99]}}}),
            "cannot keep the indices",
        ),
        (
            json.dumps({"schema": "taskpress.surgery/1", "kept": {"none.weight": {"0": [0]}}}),
            "has no tensor 'none.weight'",
        ),
    ],
)
def test_a_broken_surgery_record_is_refused(tmp_path: Path, record: str, says: str) -> None:
    spec = Spec((), ((), ()))
    build(spec).save(tmp_path)
    (tmp_path / SURGERY).write_text(record)
    with pytest.raises(CompressError, match=says):
        MultiTaskModel.load(tmp_path, Toy(spec))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"^There is no saved model in"):
        MultiTaskModel.load(tmp_path, Toy(SPEC))


# --- weights that a user brings


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(
        {name: value.clone() for name, value in build(SPEC).module.state_dict().items()}, tmp_path / "w.safetensors"
    )
    return tmp_path / "w.safetensors"


def test_a_checkpoint_is_loaded_strictly(weights: Path) -> None:
    model = load_checkpoint(Toy(SPEC), weights)
    wanted = build(SPEC).module.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.module.state_dict().items())


def test_every_fault_of_a_checkpoint_is_told_at_once(weights: Path) -> None:
    state = load_file(weights)
    state["stem.wieght"] = state.pop("stem.weight")
    state["stem.bias"] = state["stem.bias"][:4].clone()
    state["trunk.0.1.weight"] = state["trunk.0.1.weight"].double()
    save_file(state, weights)
    with pytest.raises(CompressError) as caught:
        load_weights(build(SPEC).module, weights)
    assert str(caught.value) == (
        f"{weights} does not fit the network: missing stem.weight; unexpected stem.wieght; "
        "stem.bias has shape (4,), the network's is (8,); "
        "trunk.0.1.weight is torch.float64, which the network's torch.float32 cannot hold exactly."
    )


def test_half_precision_weights_fit_a_float_network(weights: Path) -> None:
    state = load_file(weights)
    state["stem.bias"] = state["stem.bias"].half()
    save_file(state, weights)
    module = build(SPEC).module
    load_weights(module, weights)
    assert torch.equal(tensor_of(module, "stem.bias"), state["stem.bias"].float())


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build(SPEC).module.state_dict(), path)
    with pytest.raises(CompressError, match=r"is not a readable safetensors file .* looks like a pickle"):
        load_weights(build(SPEC).module, path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"^There is no checkpoint at .*none\.safetensors\.$"):
        load_checkpoint(Toy(SPEC), tmp_path / "none.safetensors")


def test_weights_that_are_not_finite_are_refused(weights: Path) -> None:
    state = load_file(weights)
    state["stem.bias"][3] = torch.nan
    save_file(state, weights)
    with pytest.raises(CompressError, match=r"^The weights hold NaN or infinity: stem\.bias\.$"):
        load_checkpoint(Toy(SPEC), weights)


def test_answers_that_are_not_finite_are_refused(weights: Path) -> None:
    state = load_file(weights)
    state["trunk.0.1.running_var"].fill_(-1)
    save_file(state, weights)
    with pytest.raises(CompressError, match=r"^Task 't0' answers NaN or infinity on the example inputs"):
        load_checkpoint(Toy(SPEC), weights)


# --- what forward returns


def test_answers_are_picked_by_key_index_and_channels() -> None:
    x = torch.arange(12.0).reshape(1, 6, 2)
    assert answers({"a": x}, [Task("t", output="a")])["t"] is x
    assert answers([x, x + 1], [Task("t", output=1)])["t"][0, 0, 0] == 1
    assert answers(x, [Task("t", channels=(2, 5))])["t"].shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("raw", "task", "says"),
    [
        (
            {"depth": torch.ones(1)},
            Task("d", output="dept"),
            "output 'dept' is not among the network's outputs. Did you",
        ),
        ((torch.ones(1),), Task("d", output=1), "output 1 is not among the network's outputs. Possible: 0."),
        ({"d": [1]}, Task("d", output="d"), "output 'd' is a list, not a tensor"),
        (3, Task("d"), "returns a int; a tensor, a tuple or a dict is needed"),
        (torch.ones(1, 2), Task("d", channels=(1, 3)), r"channels 1:3 of output 0, whose shape is \(1, 2\)"),
    ],
)
def test_outputs_that_are_not_what_the_tasks_say(raw: object, task: Task, says: str) -> None:
    with pytest.raises(CompressError, match=says):
        answers(raw, [task])


# --- networks that cannot be traced


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.count += 1
        return (x + self.count,)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x if x.sum() > 0 else -x,)


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        x -= 1
        return (x.relu(),)


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.repeat_interleave(torch.tensor([1, 2, 1]), 1),)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Selecting(), "The shape that repeat_interleave gives depends on values"),
        (Stateful(), r"changes its own state \(count\) at every call"),
        (Branching(), "must not branch on tensor values"),
        (Overwriting(), "overwrites its input"),
    ],
)
def test_networks_that_no_artifact_can_be(module: nn.Module, says: str) -> None:
    with pytest.raises(CompressError, match=says):
        trace(of(module, torch.randn(2, 3)))
