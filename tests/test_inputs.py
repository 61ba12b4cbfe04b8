"""Trained networks from outside: strict loading, exact pathways, and what `inspect` says of them."""

from pathlib import Path

import pytest
import torch

from compressor.groups import Prunable
from compressor.inspection import inspect
from compressor.model import MultiTaskModel, load_checkpoint
from compressor.pathway import extract
from compressor.workload import Workload
from tests.test_pathway import assert_answers_as_the_whole
from tests.workloads.age_gender import AgeGender
from tests.workloads.onet import ONet

INPUTS = Path(__file__).parent.parent.parent / "shared" / "inputs"


def trained(workload: Workload, file: str) -> MultiTaskModel:
    path = INPUTS / file
    if not path.is_file():
        pytest.skip(f"the trained weights are not there: {path}")
    return load_checkpoint(workload, path)


def onet() -> MultiTaskModel:
    return trained(ONet(), "mtcnn_onet/onet.safetensors")


def age_gender() -> MultiTaskModel:
    return trained(AgeGender(), "age_gender/age_gender.safetensors")


def test_onet_face_is_a_probability() -> None:
    model = onet()
    with torch.no_grad():
        answers = model.answers(*model.inputs)
    assert {name: tuple(answer.shape) for name, answer in answers.items()} == {
        "face": (1, 2),
        "box": (1, 4),
        "landmarks": (1, 10),
    }
    assert float(answers["face"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("make", [onet, age_gender])
def test_every_pathway_is_exact(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    names = [task.name for task in model.tasks]
    for tasks in ([name] for name in names):
        pathway = extract(model, tasks)
        assert pathway.error <= 1e-12
        assert_answers_as_the_whole(pathway, model)
    assert_answers_as_the_whole(extract(model, names), model)


def test_onet_pathways_leave_only_the_other_heads_out() -> None:
    heads = {"face": "dense6_1", "box": "dense6_2", "landmarks": "dense6_3"}
    model = onet()
    for task, head in heads.items():
        assert {name.split(".")[0] for name in extract(model, [task]).tensors if "6_" in name} == {head}


def test_inspect_onet() -> None:
    rows = inspect(onet(), [("face",), ("box",), ("face", "box", "landmarks")])
    heads = {"face": 257 * 2, "box": 257 * 4, "landmarks": 257 * 10}
    shared = rows[0].shared
    assert [row.private for row in rows] == [heads["face"], heads["box"], sum(heads.values())]
    assert [row.parameters for row in rows] == [shared + row.private for row in rows]
    assert shared == 389_040 - sum(heads.values())
    assert rows[2].macs - rows[0].macs == 256 * 14


def test_inspect_age_and_gender() -> None:
    """11 weights of the trained age layer are zero, so 11 channels of the last convolution are gender's own."""
    model = age_gender()
    rows = inspect(model, [("age",), ("gender",), ("age", "gender")])
    assert int((model.module.age.weight == 0).sum()) == 11
    own = {"age": 513 - 11, "gender": 2 * 513 + 11 * 257}
    assert [row.private for row in rows] == [own["age"], own["gender"], sum(own.values()) + 11]
    assert rows[2].parameters == sum(p.numel() for p in model.module.parameters())
    assert rows[2].macs == pytest.approx(97e6, rel=0.01)
    assert rows[2].macs - rows[0].macs == 11 * (256 * 49 + 1) + 2 * 512


def test_onet_groups_reach_through_the_permutation() -> None:
    model = onet()
    prunable = Prunable.of(model)
    assert [(group.name, len(group)) for group in prunable.groups] == [
        ("conv1", 32),
        ("conv2", 64),
        ("conv3", 64),
        ("conv4", 128),
        ("dense5", 256),
    ]
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[::2]] = False
    cut = prunable.cut(model, keep)
    assert cut.module.dense5.weight.shape == (128, 576)
    assert prunable.cost(keep)[1] == sum(p.numel() for p in cut.module.parameters())
