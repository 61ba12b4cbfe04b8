"""The embedded world is deterministic and its labels exact; its workload keeps the contract; training resumes."""

import importlib
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from compressor.errors import CompressError
from compressor.workload import Batch, Workload
from examples.scenes import train
from examples.scenes.dataset import scenes
from examples.scenes.metrics import AbsoluteRelativeError, MeanAngle, MeanIoU
from examples.scenes.network import SceneNet
from examples.scenes.rays import SHAPES, Solid, nearest, room_distances
from examples.scenes.workload import Scenes
from examples.scenes.world import CLASSES, FOCAL, SIZE, View, view

FOLDER = Path(train.__file__).parent
VIEWS = tuple(view("validate", index) for index in range(24))


def rays() -> np.ndarray:
    """Directions (3, H, W) in camera axes with z = 1, written out apart from the world's own."""
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    return np.stack([column / FOCAL, row / FOCAL, np.ones((SIZE, SIZE))])


def is_class(seen: View, *names: str) -> np.ndarray:
    return np.isin(seen.segmentation, [CLASSES.index(name) for name in names])


def test_a_view_is_a_function_of_split_and_index() -> None:
    first, again = view("train", 5), view("train", 5)
    for name in ("image", "segmentation", "depth", "normals"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    others = [view("train", 6), view("calibrate", 5), view("validate", 5)]
    assert all(not np.array_equal(first.depth, other.depth) for other in others)


def test_every_class_is_seen_and_none_fills_the_world() -> None:
    share = np.bincount(np.stack([v.segmentation for v in VIEWS]).ravel(), minlength=len(CLASSES)) / (24 * SIZE**2)
    assert share.min() > 0.003
    assert share.max() < 0.7


def test_depths_are_metres_inside_a_room() -> None:
    for seen in VIEWS:
        assert seen.depth.min() > 0.2
        assert seen.depth.max() < 10


def test_normals_are_unit_vectors_that_face_the_camera() -> None:
    for seen in VIEWS:
        np.testing.assert_allclose(np.linalg.norm(seen.normals, axis=0), 1, atol=1e-5)
        assert ((seen.normals * rays()).sum(0) < 1e-4).all()


@pytest.mark.parametrize("names", [("floor", "rug"), ("ceiling",)])
def test_the_room_is_flat(names: tuple[str, ...]) -> None:
    """Back-projected pixels of one plane lie on it: normal . point is the same everywhere."""
    for seen in VIEWS:
        there = is_class(seen, *names)
        if there.any():
            distance = (seen.normals * rays() * seen.depth).sum(0)[there]
            assert np.ptp(distance) < 1e-3


def test_normals_are_those_of_the_depth() -> None:
    """Inside a surface the cross product of central differences of back-projected depth is the normal."""
    angles = []
    for seen in VIEWS:
        points = rays() * seen.depth
        across, along = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
        from_depth = np.cross(along, across, axis=0)
        from_depth /= np.linalg.norm(from_depth, axis=0)
        normals = seen.normals[:, 1:-1, 1:-1]
        around = [
            seen.normals[:, 1 + y : SIZE - 1 + y, 1 + x : SIZE - 1 + x] for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))
        ]
        inside = np.all([(normals * other).sum(0) > 0.97 for other in around], axis=0)
        inside &= np.all([is_same(seen.segmentation, y, x) for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))], axis=0)
        angles.append(np.degrees(np.arccos(np.clip((normals * from_depth).sum(0), -1, 1)))[inside])
    angle = np.concatenate(angles)
    assert angle.size > 0.7 * 24 * SIZE**2
    assert np.quantile(angle, 0.98) < 2.0


def is_same(classes: np.ndarray, y: int, x: int) -> np.ndarray:
    return classes[1:-1, 1:-1] == classes[1 + y : SIZE - 1 + y, 1 + x : SIZE - 1 + x]


@pytest.mark.parametrize(
    ("shape", "height", "distance"),
    [("ball", 0.0, 3.0), ("cube", 0.0, 3.0), ("cylinder", 0.0, 3.0), ("cone", 0.0, 3.5), ("cone", 1.0, 3.0 + 0.999)],
)
def test_a_ray_along_z_meets_a_unit_shape_where_it_should(shape: str, height: float, distance: float) -> None:
    solid = Solid(shape, np.array([0, 1, 4], np.float32), np.ones(3, np.float32))
    ray = np.array([[0], [0], [1]], np.float32)
    eye = np.array([0, min(1 + height, 1.998), 0], np.float32)
    t, index = nearest((solid,), eye, ray, np.full(1, 9, np.float32))
    assert index.tolist() == [0]
    assert t[0] == pytest.approx(distance, abs=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(sorted(SHAPES)))
@example(seed=362879, shape="cone")  # 3 of 70 hits at its edge
def test_hits_lie_on_the_surface_and_are_the_first(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    half = rng.uniform(0.2, 1.5, 3).astype(np.float32)
    half[2] = half[0]
    solid = Solid(shape, rng.uniform(-1, 1, 3).astype(np.float32), half, rng.uniform(0, 6))
    origin = (solid.centre + 4 * unit(rng.standard_normal(3))).astype(np.float32)
    targets = solid.centre[:, None] + rng.uniform(-1, 1, (3, 200)) * half.max()
    directions = (targets - origin[:, None]).astype(np.float32)
    t, index = nearest((solid,), origin, directions, np.full(200, 100, np.float32))
    hit = index == 0
    for share in np.linspace(0, 0.995, 40):
        assert not inside(shape, solid, origin[:, None] + directions * (share * t), 0.99).any()
    just_in = (
        origin[:, None]
        + directions[:, hit] * t[hit]
        - 0.01 * half.min() * solid.normals(origin[:, None] + directions[:, hit] * t[hit])
    )
    at_an_edge = ~inside(shape, solid, just_in, 1.001)
    assert at_an_edge.sum() <= max(3, 0.03 * len(at_an_edge))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def inside(shape: str, solid: Solid, points: np.ndarray, size: float) -> np.ndarray:
    x, y, z = solid.to_local(points.astype(np.float32), points=True) / solid.half[:, None] / size
    return {
        "ball": x * x + y * y + z * z < 1,
        "cube": np.maximum(np.maximum(abs(x), abs(y)), abs(z)) < 1,
        "cylinder": (np.hypot(x, z) < 1) & (abs(y) < 1),
        "cone": (np.hypot(x, z) < (1 - y) / 2) & (abs(y) < 1),
    }[shape]


def test_a_room_is_left_through_the_face_ahead_even_along_an_axis() -> None:
    size, eye = np.array([4, 3, 5], np.float32), np.array([1, 1, 1], np.float32)
    t, face = room_distances(size, eye, np.array([[1, 0, -1], [0, 0, 0], [0, 1, 0]], np.float32))
    assert t.tolist() == [3, 4, 1]
    assert face.tolist() == [1, 5, 0]


def test_kept_scenes_are_the_views_and_a_longer_row_begins_with_the_shorter() -> None:
    kept, longer = scenes("validate", 3), scenes("validate", 6)
    assert np.array_equal(kept, longer[:3])
    for record, seen in zip(longer, VIEWS, strict=False):
        assert np.array_equal(record["image"], seen.image)
        assert np.array_equal(record["segmentation"], seen.segmentation)
        np.testing.assert_allclose(record["depth"][0], seen.depth, rtol=1e-3)
        np.testing.assert_allclose(record["normals"], seen.normals, atol=1e-3)


@pytest.mark.parametrize(("split", "count"), [("test", 3), ("train", 0)])
def test_scenes_that_do_not_exist_are_refused(split: str, count: int) -> None:
    with pytest.raises(CompressError, match=f"No {count} scenes of split '{split}'"):
        scenes(split, count)


def multiply_adds(net: nn.Module) -> dict[str, int]:
    """Of each convolution by its name, at 96x96."""
    found: dict[str, int] = {}

    def note(name: str, module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        found[name] = output.numel() * module.weight[0].numel()

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(note, name))
    net.eval()(torch.zeros(1, 3, SIZE, SIZE))
    return found


def test_the_network_has_the_size_and_the_split_it_promises() -> None:
    net = SceneNet()
    assert 0.5e6 < sum(p.numel() for p in net.parameters()) < 1.5e6
    macs = multiply_adds(net)
    total = sum(macs.values())
    assert 150e6 < total < 300e6
    for task in Scenes.tasks:
        pathway = sum(n for name, n in macs.items() if name.startswith(("encoder.", f"decoders.{task.name}.")))
        assert pathway < 0.6 * total
    inner = [m.out_channels for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "head" not in name]
    assert all(width % 16 == 0 for width in inner)


def test_the_workload_keeps_the_protocol() -> None:
    workload = Scenes(train_scenes=70, validate_scenes=5, calibrate_scenes=4, batch_size=32)
    assert isinstance(workload, Workload)
    net = workload.build().eval()
    outputs = net(*workload.example_inputs())
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {"segmentation": (1, 10, 96, 96), "depth": (1, 1, 96, 96), "normals": (1, 3, 96, 96)}
    assert [len(b.inputs[0]) for b in workload.batches("train", 0)] == [32, 32]
    assert [len(b.inputs[0]) for b in workload.batches("validate", 0)] == [5]
    batch = next(iter(workload.batches("calibrate", 0)))
    losses = workload.losses(net(*batch.inputs), batch)
    assert list(losses) == [task.name for task in workload.tasks] == list(workload.metrics())
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    for task in workload.tasks:
        workload.metrics()[task.name].update(net(*batch.inputs)[task.output], batch.labels[task.name])


def test_training_batches_follow_from_the_seed_and_mirror_whole_scenes() -> None:
    workload = Scenes(train_scenes=70)
    first, again, other = (next(iter(workload.batches("train", seed))) for seed in (1, 1, 2))
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])
    kept = scenes("train", 70).copy()
    straight = torch.from_numpy(kept["image"]).permute(0, 3, 1, 2) / 255
    mirrored = 0
    for row in range(32):
        image = first.inputs[0][row]
        same = [i for i in range(70) if torch.equal(straight[i], image)]
        number = (same or [i for i in range(70) if torch.equal(straight[i].flip(-1), image)])[0]
        turn = (lambda x: x) if same else partial(torch.flip, dims=(-1,))
        normals = torch.from_numpy(kept["normals"][number].astype(np.float32))
        expected = turn(normals * torch.tensor([1.0 if same else -1.0, 1, 1]).view(3, 1, 1))
        assert torch.equal(first.labels["normals"][row], expected)
        assert torch.equal(first.labels["depth"][row], turn(torch.from_numpy(kept["depth"][number].astype(np.float32))))
        assert torch.equal(
            first.labels["segmentation"][row], turn(torch.from_numpy(kept["segmentation"][number]).long())
        )
        mirrored += not same
    assert 5 < mirrored < 27


def perfect(batch: Batch) -> dict[str, torch.Tensor]:
    classes = nn.functional.one_hot(batch.labels["segmentation"], len(CLASSES)).permute(0, 3, 1, 2)
    return {
        "segmentation": 50.0 * classes,
        "depth": batch.labels["depth"].log(),
        "normals": 3 * batch.labels["normals"],
    }


def test_perfect_answers_have_no_loss_and_perfect_figures() -> None:
    workload = Scenes(calibrate_scenes=4)
    batch = next(iter(workload.batches("calibrate", 0)))
    answers = perfect(batch)
    assert all(loss < 2e-3 for loss in workload.losses(answers, batch).values())
    figures = workload.metrics()
    for name, answer in answers.items():
        figures[name].update(answer, batch.labels[name])
    assert float(figures["segmentation"].compute()) == pytest.approx(1)
    assert float(figures["depth"].compute()) == pytest.approx(0, abs=1e-5)
    assert float(figures["normals"].compute()) == pytest.approx(0, abs=1e-3)


def test_losses_cover_what_is_both_answered_and_labelled() -> None:
    workload = Scenes(calibrate_scenes=4)
    batch = next(iter(workload.batches("calibrate", 0)))
    answers = perfect(batch)
    assert list(workload.losses({"depth": answers["depth"]}, batch)) == ["depth"]
    assert list(workload.losses(answers, Batch(batch.inputs, {"normals": batch.labels["normals"]}))) == ["normals"]


def test_mean_iou_by_hand() -> None:
    metric = MeanIoU(3)
    labels = torch.tensor([[[0, 0], [1, 1]]])
    answers = nn.functional.one_hot(torch.tensor([[[0, 1], [1, 2]]]), 3).permute(0, 3, 1, 2).float()
    metric.update(answers, labels)
    assert float(metric.compute()) == pytest.approx((1 / 2 + 1 / 3) / 2)  # class 2 is not in the labels


def test_absolute_relative_error_by_hand() -> None:
    metric = AbsoluteRelativeError()
    metric.update(torch.tensor([2.0, 3.0]).log(), torch.tensor([1.0, 4.0]))
    metric.update(torch.tensor([5.0]).log(), torch.tensor([5.0]))
    assert float(metric.compute()) == pytest.approx((1 + 0.25 + 0) / 3)


def test_mean_angle_by_hand() -> None:
    metric = MeanAngle()
    answer = torch.tensor([[0.0, 0, 9], [1, 1, 0], [0, 2, 0]]).view(3, 3, 1, 1)
    label = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]).view(3, 3, 1, 1)
    metric.update(answer, label)
    assert float(metric.compute()) == pytest.approx((0 + 45 + 180) / 3)


def test_pictures_show_the_first_scene_as_it_is() -> None:
    workload = Scenes(calibrate_scenes=4)
    batch = next(iter(workload.batches("calibrate", 0)))
    drawn = workload.pictures(perfect(batch), batch)
    assert list(drawn) == ["input", *(f"{t.name}{end}" for t in workload.tasks for end in ("", " truth"))]
    assert all(picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 for picture in drawn.values())
    assert np.array_equal(drawn["input"], view("calibrate", 0).image)
    for task in workload.tasks:
        assert np.abs(drawn[task.name].astype(int) - drawn[f"{task.name} truth"]).max() <= 1


def test_the_folder_works_as_a_package_of_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("a_recipe_folder")
    package.__path__ = [str(FOLDER)]
    monkeypatch.setitem(sys.modules, "a_recipe_folder", package)
    known = set(sys.modules)
    workload = importlib.import_module("a_recipe_folder.workload").Scenes(calibrate_scenes=2)
    assert len(next(iter(workload.batches("calibrate", 0))).inputs[0]) == 2
    for name in set(sys.modules) - known:
        monkeypatch.delitem(sys.modules, name)


def test_training_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Scenes", partial(Scenes, validate_scenes=2))
    run = partial(train.main, steps=4, train_scenes=64, bf16=False, every=2)
    run(out=tmp_path / "whole.safetensors")
    losses, calls = train.task_losses, []

    def killed(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(train, "task_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "killed.safetensors")
    assert not (tmp_path / "killed.safetensors").exists()
    run(out=tmp_path / "killed.safetensors")
    assert len(calls) == 4 + 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "killed.safetensors")
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-5) for name in whole)


def test_training_does_not_go_on_from_a_run_with_other_settings(tmp_path: Path) -> None:
    settings = {"steps": 9, "train_scenes": 64, "seed": 1, "bf16": False}
    torch.save({"step": 3, "settings": settings}, tmp_path / "net.snapshot.pt")
    with pytest.raises(CompressError, match=r"is of a run with .*'seed': 1.* Go on with these, or delete it"):
        train.main(out=tmp_path / "net.safetensors", steps=9, train_scenes=64, seed=0, bf16=False)


def test_the_checkpoint_is_small_and_good_on_unseen_scenes() -> None:
    file = FOLDER / "scenes.safetensors"
    assert file.stat().st_size < 6e6
    workload = Scenes(validate_scenes=64)
    net = workload.build()
    net.load_state_dict(load_file(file), strict=True)
    figures = train.evaluate(workload, net)
    assert figures["segmentation"] > 0.75
    assert figures["depth"] < 0.085
    assert figures["normals"] < 9
