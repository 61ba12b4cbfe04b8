"""DroNet's workload: refusals on made-up files, and the published figures where the real ones are there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import CompressError
from compressor.workload import Batch, Workload
from examples.dronet.workload import DroNet, LogitAccuracy, _altered

INPUTS = Path("../shared/inputs/dronet")
needs_inputs = pytest.mark.skipif(
    not INPUTS.is_dir(), reason=f"no {INPUTS}: the published weights and frames are not here"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny data set whose frames say their number in the first pixels."""
    rng = np.random.default_rng(0)
    for name, steering, collision in (("train", 230, 200), ("validate", 20, 10)):
        frames = [np.zeros((count, 200, 200), np.uint8) for count in (steering, collision)]
        for array in frames:
            array[:, 0, 0] = np.arange(len(array))
        np.savez(
            tmp_path / f"{name}.npz",
            steer_frames=frames[0],
            steer=rng.normal(size=steering).astype(np.float32),
            collision_frames=frames[1],
            collision=(rng.random(collision) < 0.5).astype(np.float32),
        )
    return tmp_path


def numbers(workload: DroNet, split: str, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Each batch's task and frame numbers, read off frames as they are."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.dronet.workload._altered", lambda frame, label, *_: (frame, label))
        for batch in workload.batches(split, seed):  # type: ignore[arg-type]
            (task,) = batch.labels
            found.append((task, (batch.inputs[0][:, 0, 0, 0] * 255).round().int().tolist()))
    return found


def test_a_missing_folder_is_refused_by_the_option_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        CompressError, match=r"no train\.npz and no validate\.npz in .* Set the workload's option 'root'"
    ):
        DroNet(root=str(tmp_path / "nowhere"))


def test_a_pickle_in_the_frames_is_not_run(root: Path) -> None:
    np.savez(root / "validate.npz", steer_frames=np.array([{}], object), steer=np.zeros(1, np.float32))
    with pytest.raises(CompressError, match=r"validate\.npz cannot be read as DroNet's frames"):
        next(iter(DroNet(str(root)).batches("validate", 0)))


def test_frames_of_another_size_are_refused(root: Path) -> None:
    np.savez(root / "validate.npz", steer_frames=np.zeros((2, 96, 96), np.uint8), steer=np.zeros(2, np.float32))
    with pytest.raises(CompressError, match=r"steer_frames \(2, 96, 96\) uint8 .* needed are \(n, 200, 200\)"):
        next(iter(DroNet(str(root)).batches("validate", 0)))


def test_train_and_calibrate_share_no_frame_and_leave_none_out(root: Path) -> None:
    workload = DroNet(str(root), batch_size=1)
    train, calibrate = numbers(workload, "train"), numbers(workload, "calibrate")
    for task, count in (("steering", 230), ("collision", 200)):
        of_train = [n for name, (n,) in train if name == task]
        of_calibrate = [n for name, (n,) in calibrate if name == task]
        assert sorted(of_train + of_calibrate) == list(range(count))
        assert 0.05 < len(of_calibrate) / count < 0.3


def test_training_batches_mix_the_tasks_and_follow_from_the_seed(root: Path) -> None:
    workload = DroNet(str(root), batch_size=8)
    first = numbers(workload, "train", 1)
    assert first == numbers(workload, "train", 1) != numbers(workload, "train", 2)
    assert {len(chosen) for _, chosen in first} == {8}
    tasks = [task for task, _ in first]
    assert tasks != sorted(tasks, reverse=True)
    assert numbers(workload, "validate", 1) == numbers(workload, "validate", 2)


@pytest.mark.parametrize("task", ["steering", "collision"])
def test_a_mirrored_frame_steers_the_other_way_and_light_changes_no_label(task: str) -> None:
    frame = torch.zeros(400, 1, 8, 8)
    frame[..., :4] = 0.5  # bright on the left
    label = torch.linspace(0.1, 1, 400)[:, None]
    altered, labels = _altered(frame, label, task, np.random.default_rng(0))
    mirrored = altered[:, 0, 0, 0] < altered[:, 0, 0, 7]
    assert 120 < mirrored.sum() < 280 and len(altered.flatten(1).unique(dim=0)) > 350
    wanted = torch.where(mirrored[:, None], -label, label) if task == "steering" else label
    assert torch.equal(labels, wanted) and altered.min() >= 0 and altered.max() <= 1


def test_frames_are_altered_in_training_alone_and_follow_from_the_seed(root: Path) -> None:
    workload = DroNet(str(root), batch_size=8)
    first, again, other = (next(iter(workload.batches("train", seed))).inputs[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for split in ("calibrate", "validate"):
        frame = next(iter(workload.batches(split, 1))).inputs[0]  # type: ignore[arg-type]
        assert torch.equal(frame[:, 0, 1:].unique(), torch.zeros(1))


def test_frames_without_labels_are_moved_as_well(root: Path) -> None:
    rng = np.random.default_rng(0)
    for file in root.glob("*.npz"):
        arrays = dict(np.load(file))
        for name in ("steer_frames", "collision_frames"):
            arrays[name] = rng.integers(0, 256, arrays[name].shape, np.uint8)
        np.savez(file, **arrays)
    free, again = (list(DroNet(str(root), train_labels=False).batches("train", 3)) for _ in range(2))
    labelled = list(DroNet(str(root)).batches("train", 3))
    assert len(free) == len(labelled) and not any(batch.labels for batch in free)
    for one, other in zip(free, again, strict=True):
        assert torch.equal(one.inputs[0], other.inputs[0])
        assert float(one.inputs[0].min()) >= 0 and float(one.inputs[0].max()) <= 1
    assert not torch.equal(free[0].inputs[0], labelled[0].inputs[0])
    assert all(batch.labels for batch in DroNet(str(root), train_labels=False).batches("validate", 0))


def test_the_workload_keeps_the_protocol(root: Path) -> None:
    workload = DroNet(str(root))
    assert isinstance(workload, Workload)
    net = workload.build().eval()
    outputs = net(*workload.example_inputs())
    assert outputs.shape == (1, 2)
    batch = next(iter(workload.batches("validate", 0)))
    answer = net(*batch.inputs).detach()
    answers = {task.name: answer[:, slice(*task.channels)] for task in workload.tasks if task.channels}
    losses = workload.losses(answers, batch)
    assert list(losses) == ["steering"]
    assert losses["steering"] == pytest.approx(float((answer[:, :1] - batch.labels["steering"]).square().mean()))
    assert list(workload.losses(answers, Batch(batch.inputs, {"collision": torch.ones(20, 1)}))) == ["collision"]


def test_accuracy_takes_logits_for_logits_even_between_0_and_1() -> None:
    metric = LogitAccuracy()
    metric.update(torch.tensor([[0.2], [0.3], [-0.1]]), torch.tensor([[1.0], [0.0], [0.0]]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


@needs_inputs
def test_the_published_network_has_the_published_figures() -> None:
    workload = DroNet(str(INPUTS))
    net = workload.build().eval()
    net.load_state_dict(load_file(INPUTS / "dronet.safetensors"), strict=True)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(321_000, rel=0.01)
    metrics = workload.metrics()
    with torch.inference_mode():
        for batch in workload.batches("validate", 0):
            answer = net(*batch.inputs)
            for task in workload.tasks:
                if task.name in batch.labels and task.channels:
                    metrics[task.name].update(answer[:, slice(*task.channels)], batch.labels[task.name])
    assert float(metrics["steering"].compute()) == pytest.approx(0.1368, abs=2e-4)
    assert float(metrics["collision"].compute()) == pytest.approx(0.979, abs=1e-3)
