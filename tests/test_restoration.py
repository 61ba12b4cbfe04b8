"""Restoration: degradations are what their names say, crops stay in their split, and the checkpoint restores."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import CompressError
from compressor.workload import Batch, Workload
from examples.restoration import photographs as bundled
from examples.restoration import workload
from examples.restoration.degradations import DEGRADATIONS
from examples.restoration.photographs import PHOTOGRAPHS, photographs
from examples.restoration.workload import Restoration

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage", reason="the photographs are scikit-image's: pip install 'taskpress[examples]'")

TASKS = [task.name for task in Restoration.tasks]


def dice() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def clean() -> torch.Tensor:
    """A crop of 256x256."""
    return torch.from_numpy(photographs("validate")[0][100:356, 100:356].copy())[None, None]


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_noise_is_white_and_as_strong_as_its_name_says(sigma: int) -> None:
    noise = (DEGRADATIONS[f"denoise{sigma}"](clean(), dice()) - clean())[0, 0] * 255
    assert float(noise.std()) == pytest.approx(sigma, rel=0.02) and abs(float(noise.mean())) < sigma / 50
    for neighbour in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]):
        assert abs(float(neighbour.mean())) < 0.02 * sigma**2


def test_blocks_are_those_of_a_jpeg_encoder_at_quality_10() -> None:
    file = io.BytesIO()
    picture = (clean()[0, 0] * 255).round().byte()
    Image.fromarray(picture.numpy()).save(file, "JPEG", quality=10)
    encoded = torch.from_numpy(np.asarray(Image.open(file)).astype(np.float32))
    ours = DEGRADATIONS["deblock"](picture[None, None] / 255, dice())[0, 0] * 255
    gap = (ours - encoded).abs()
    assert float(gap.mean()) < 0.1 and float((gap > 1).float().mean()) < 0.01
    assert float((encoded - picture).abs().mean()) > 3


def test_half_the_size_and_back_loses_what_is_finer_and_nothing_else() -> None:
    down = torch.linspace(0.2, 0.8, 64).view(1, 1, 64, 1).expand(1, 1, 64, 64)
    checks = 0.5 + 0.25 * (-1.0) ** (torch.arange(64).view(-1, 1) + torch.arange(64)).view(1, 1, 64, 64)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert torch.allclose(DEGRADATIONS["upscale2"](down, dice())[inner], down[inner], atol=2e-3)
    assert torch.allclose(DEGRADATIONS["upscale2"](checks, dice())[inner], torch.tensor(0.5), atol=2e-2)


def test_no_photograph_is_in_two_splits() -> None:
    names = [name for split in PHOTOGRAPHS.values() for name in split]
    assert len(names) == len(set(names))
    scenes = {split: {name.split("_")[0].split(".")[0] for name in names} for split, names in PHOTOGRAPHS.items()}
    assert scenes["train"].isdisjoint(scenes["validate"] | scenes["calibrate"])  # a stereo pair is one scene
    assert scenes["validate"].isdisjoint(scenes["calibrate"])


@pytest.mark.parametrize("split", ["train", "calibrate", "validate"])
def test_a_batch_is_of_one_degradation_and_five_have_all_of_them(split: str) -> None:
    restoration = Restoration(train_crops=40, batch_size=4)
    batches = list(restoration.batches(split, 3))  # type: ignore[arg-type]
    tasks = [next(iter(batch.labels)) for batch in batches]
    assert all(len(batch.labels) == 1 for batch in batches)
    assert all(sorted(tasks[first : first + 5]) == sorted(TASKS) for first in range(0, len(tasks), 5))
    assert len(batches) == {"train": 10, "calibrate": 60, "validate": 80}[split]
    for batch, task in zip(batches, tasks, strict=True):
        (picture,), label = batch.inputs, batch.labels[task]
        assert picture.shape == label.shape == (4, 1, 64, 64) and picture.dtype == label.dtype == torch.float32
        assert label.min() >= 0 and label.max() <= 1
        if task == "deblock":
            assert torch.equal(picture, DEGRADATIONS[task](label, dice()))


def test_batches_follow_from_the_seed_and_only_those_of_training() -> None:
    restoration = Restoration(train_crops=80)
    for split, differs in (("train", True), ("calibrate", False), ("validate", False)):
        first, again, other = (list(restoration.batches(split, seed)) for seed in (1, 1, 2))  # type: ignore[arg-type]
        assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(first, again, strict=True))
        assert differs == any(not torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(first, other, strict=True))


def test_training_crops_are_whole_pieces_of_a_photograph_in_all_eight_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = np.arange(100 * 120, dtype=np.float32).reshape(100, 120)  # each pixel says where it is
    monkeypatch.setattr(workload, "photographs", lambda split: (photograph,) if split == "train" else ())
    seen = set()
    for crop in workload._drawn(np.random.default_rng(0), 100)[:, 0].numpy():
        top, left = divmod(int(crop.min()), 120)
        piece = photograph[top : top + 64, left : left + 64]
        turns = [np.rot90(mirrored, k) for mirrored in (piece, piece.T) for k in range(4)]
        seen.add(next(turn for turn, turned in enumerate(turns) if np.array_equal(turned, crop)))
    assert seen == set(range(8))


def test_psnr_by_hand_is_of_all_pixels_and_clips_answers() -> None:
    metric = Restoration().metrics()["deblock"]
    label = torch.full((2, 1, 4, 4), 0.5)
    metric.update(label + torch.tensor([0.1, 0.0]).view(2, 1, 1, 1), label)
    assert float(metric.compute()) == pytest.approx(-10 * np.log10((0.1**2 + 0) / 2), abs=1e-3)
    metric.update(torch.full((2, 1, 4, 4), 7.0), torch.full((2, 1, 4, 4), 0.9))  # clipped to 1
    assert float(metric.compute()) == pytest.approx(-10 * np.log10((0.1**2 + 0 + 2 * 0.1**2) / 4), abs=1e-3)


def test_the_workload_keeps_the_protocol() -> None:
    restoration = Restoration()
    assert isinstance(restoration, Workload)
    net = restoration.build().eval()
    answers = net(*restoration.example_inputs())
    assert list(answers) == TASKS == list(restoration.metrics())
    assert {tuple(answer.shape) for answer in answers.values()} == {(1, 1, 64, 64)}
    batch = next(iter(restoration.batches("validate", 0)))
    (task,) = batch.labels
    losses = restoration.losses(net(*batch.inputs), batch)
    assert list(losses) == [task] and losses[task].ndim == 0 and not restoration.losses({}, batch)
    drawn = restoration.pictures({task: batch.labels[task], "deblock": batch.labels[task]}, batch)
    assert list(drawn) == ["input", task, f"{task} truth"] and np.array_equal(drawn[task], drawn[f"{task} truth"])
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in drawn.values())
    assert not restoration.losses(answers, Batch(batch.inputs))


def test_without_scikit_image_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "find_spec", lambda name: None if name == "skimage" else find_spec(name))
    with pytest.raises(CompressError, match=r"scikit-image's, .* not installed: pip install 'taskpress\[examples\]'"):
        Restoration()


def test_the_checkpoint_is_small_and_restores_what_it_has_not_seen() -> None:
    file = Path(bundled.__file__).with_name("restoration.safetensors")
    assert file.stat().st_size < 6e6
    restoration = Restoration()
    net = restoration.build().eval()
    net.load_state_dict(load_file(file), strict=True)
    before, after = restoration.metrics(), restoration.metrics()
    with torch.inference_mode():
        for batch in restoration.batches("validate", 0):
            ((name, label),) = batch.labels.items()
            before[name].update(batch.inputs[0], label)
            after[name].update(net(*batch.inputs)[name], label)
    gain_dB = {name: float(after[name].compute() - before[name].compute()) for name in TASKS}
    assert all(gain_dB[name] > least for name, least in GAINS_DB.items()), gain_dB


GAINS_DB = {"denoise15": 6.7, "denoise25": 8.8, "denoise50": 12.1, "deblock": 1.0, "upscale2": 1.6}
