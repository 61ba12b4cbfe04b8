"""MultiFashion: pictures and labels belong together, splits share no item, and the checkpoint has its figures."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import CompressError
from compressor.workload import Batch, Workload
from examples.fashion import dataset, train
from examples.fashion.dataset import CLASSES, altered, overlap
from examples.fashion.workload import MultiFashion

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"no {DEBIAN}: apt-get install dataset-fashion-mnist")


def write_idx(file: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sixty training and twenty test items; each is of one grey, its number, and its class is that modulo ten."""
    for part, first, count in (("train", 1, 60), ("t10k", 101, 20)):
        greys = np.arange(first, first + count)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.broadcast_to(greys[:, None, None], (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", greys % 10)
    return tmp_path


def pairs(workload: MultiFashion, split: str, seed: int = 0) -> list[tuple[int, int]]:
    """The items of each picture, read where one alone is, however it was moved; their labels are looked at too."""
    found = []
    for batch in workload.batches(split, seed):  # type: ignore[arg-type]
        grey = (batch.inputs[0][:, 0] * 255).round().int()
        pair = grey[:, 4, 4], grey[:, -5, -5]
        assert torch.equal(batch.labels["left"], pair[0] % 10) and torch.equal(batch.labels["right"], pair[1] % 10)
        found += list(zip(*(items.tolist() for items in pair), strict=True))
    return found


def test_two_items_overlap_at_their_places_and_the_brighter_wins() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 3, 28, 28), dtype=np.uint8)
    picture = overlap(left, right)
    for y in range(36):
        for x in range(36):
            covers = [item[:, at_y, at_x] for item, at_y, at_x in ((left, y, x), (right, y - 8, x - 8))
                      if 0 <= at_y < 28 and 0 <= at_x < 28]  # fmt: skip
            assert np.array_equal(picture[:, y, x], np.max(covers or [np.zeros(3)], axis=0))


def test_an_altered_item_is_moved_by_up_to_two_pixels_and_mirrored_half_the_time() -> None:
    picture = np.random.default_rng(0).integers(1, 256, (28, 28), dtype=np.uint8)
    wide = np.pad(picture, 2)
    moved = [wide[down : down + 28, along : along + 28] for down in range(5) for along in range(5)]
    could_be = {item.tobytes(): (number, side) for number, one in enumerate(moved)
                for side, item in enumerate((one, one[:, ::-1]))}  # fmt: skip
    found = altered(np.repeat(picture[None], 2000, 0), np.random.default_rng(1))
    kinds = [could_be[item.tobytes()] for item in found]
    assert len(set(kinds)) == 50 and 900 < sum(side for _, side in kinds) < 1100


def test_labels_are_of_the_items_at_either_place_and_every_item_is_seen_at_both(root: Path) -> None:
    seen = pairs(MultiFashion(str(root), batch_size=5), "train")
    left, right = (sorted(items) for items in zip(*seen, strict=True))
    assert left == right == [n for n in range(1, 61) if n % 12] and len(set(seen)) == 55


def test_splits_share_no_item(root: Path) -> None:
    workload = MultiFashion(str(root), batch_size=1)
    train_items, calibrate, validate = (
        {item for pair in pairs(workload, split) for item in pair} for split in ("train", "calibrate", "validate")
    )
    assert train_items | calibrate == set(range(1, 61)) and validate == set(range(101, 121))
    assert not train_items & calibrate and len(calibrate) == 5


def test_pairs_follow_from_the_seed_and_only_those_of_training(root: Path) -> None:
    workload = MultiFashion(str(root), batch_size=8)
    assert pairs(workload, "train", 1) == pairs(workload, "train", 1) != pairs(workload, "train", 2)
    assert len(pairs(workload, "train")) == 48  # 55 pairs, and a last batch of 7 dropped
    for split, count in (("calibrate", 5), ("validate", 20)):
        assert pairs(workload, split, 1) == pairs(workload, split, 2) and len(pairs(workload, split)) == count


def test_a_missing_package_is_refused_with_its_name(tmp_path: Path) -> None:
    told = r"no t10k-labels-idx1-ubyte\.gz in .*'apt-get install dataset-fashion-mnist'"
    with pytest.raises(CompressError, match=told):
        MultiFashion(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no gzip", "cannot be read as an idx file"),
        (gzip.compress(b"\0\0"), "cannot be read as an idx file"),
        (gzip.compress(b"\0\0\x0d\1\0\0\0\1abcd"), "it holds no unsigned bytes"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\5abcd"), "cannot be read as an idx file"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\4abcd"), r"labels \(4,\); needed are"),
    ],
    ids=["not packed", "cut short", "no bytes", "fewer than it says", "too few labels"],
)
def test_a_damaged_file_is_refused(root: Path, content: bytes, told: str) -> None:
    (root / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(CompressError, match=told):
        next(iter(MultiFashion(str(root)).batches("train", 0)))


def test_the_workload_keeps_the_protocol(root: Path) -> None:
    workload = MultiFashion(str(root))
    assert isinstance(workload, Workload)
    net = workload.build().eval()
    assert {name: tuple(v.shape) for name, v in net(*workload.example_inputs()).items()} == {
        "left": (1, 10), "right": (1, 10)
    }  # fmt: skip
    batch = next(iter(workload.batches("validate", 0)))
    answers = {name: 9.0 * torch.nn.functional.one_hot(label, len(CLASSES)) for name, label in batch.labels.items()}
    assert all(loss < 0.01 for loss in workload.losses(answers, batch).values())
    only = Batch(batch.inputs, {"right": batch.labels["right"]})
    assert list(workload.losses(answers, only)) == ["right"]
    assert list(workload.losses({"right": answers["right"]}, batch)) == ["right"]


def test_accuracy_is_the_share_of_pictures_and_not_of_classes(root: Path) -> None:
    metric = MultiFashion(str(root)).metrics()["left"]
    answers = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 5, 6]), 10).float()
    metric.update(answers, torch.tensor([0, 0, 0, 1, 2]))
    assert float(metric.compute()) == pytest.approx(3 / 5)


def test_training_begins_from_nothing_and_leaves_one_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "MultiFashion", lambda: MultiFashion(str(root), batch_size=5))
    out = tmp_path / "weights" / "net.safetensors"
    out.parent.mkdir()
    train.main(out=out, steps=2)
    assert [file.name for file in out.parent.iterdir()] == ["net.safetensors"]
    assert capsys.readouterr().out.count("accuracy") == 2
    MultiFashion(str(root)).build().load_state_dict(load_file(out), strict=True)


@needs_debian
def test_the_checkpoint_is_small_and_good_on_unseen_items() -> None:
    file = Path(dataset.__file__).with_name("fashion.safetensors")
    assert file.stat().st_size < 6e6
    workload = MultiFashion()
    net = workload.build().eval()
    net.load_state_dict(load_file(file), strict=True)
    metrics = workload.metrics()
    with torch.inference_mode():
        for batch, _ in zip(workload.batches("validate", 0), range(16), strict=False):
            for name, answer in net(*batch.inputs).items():
                metrics[name].update(answer, batch.labels[name])
    assert all(float(metric.compute()) > 0.86 for metric in metrics.values())
