"""Finished work: whole or not at all, by key, one run at a time, and the disk's refusals."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import CompressError
from compressor.store import Store, key_of, opened

KEY = key_of("x")


def test_an_entry_comes_back_with_its_facts_and_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    facts: dict[str, object] = {"a": 1}
    with store.entry("00-prune", KEY, facts) as folder:
        (folder / "weights").write_bytes(b"w")
        facts["b"] = [2]
    assert Store(tmp_path).facts("00-prune", KEY) == {"a": 1, "b": [2]}
    assert (store.path("00-prune", KEY) / "weights").read_bytes() == b"w"
    assert store.facts("00-prune", key_of("y")) is None


def test_equal_beginnings_of_keys_are_told_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.entry("x", KEY, {}):
        pass
    assert store.facts("x", KEY[:16] + "0" * 48) is None


def test_keys_follow_every_fact() -> None:
    assert key_of("a", [1, {"b": 2}]) == key_of("a", [1, {"b": 2}])
    assert len({key_of("a"), key_of("a", 1), key_of(["a", 1]), key_of("a1")}) == 4


def test_an_entry_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.entry("x", KEY, {"n": 1}):
        pass
    with pytest.raises(KeyError), store.entry("x", KEY, {"n": 2}) as folder:
        (folder / "half").write_bytes(b"h")
        raise KeyError
    assert store.facts("x", KEY) == {"n": 1}
    assert [path.name for path in (tmp_path / "work").iterdir()] == [store.path("x", KEY).name]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"a": '])
def test_damaged_facts_are_told_with_the_fix(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    with store.entry("x", KEY, {}):
        pass
    (store.path("x", KEY) / "facts.json").write_text(content)
    with pytest.raises(CompressError, match=r"facts.json' is damaged .* use --no-resume"):
        store.facts("x", KEY)


# --- the folder


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "out", resume=True),
        pytest.raises(CompressError, match="Another run is working in"),
        opened(tmp_path / "out", resume=True),
    ):
        pass
    with opened(tmp_path / "out", resume=True):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CompressError, match="is not empty and holds no run of this tool"), opened(tmp_path, True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CompressError, match="Not a directory"), opened(tmp_path / "file", True):
        pass


def test_what_a_killed_run_left_is_swept_and_the_rest_kept(tmp_path: Path) -> None:
    left = ["work/.new-abc", "artifacts/.depth", "artifacts/..depth.x1", "artifacts/.depth.old.y"]
    kept = ["work/00-prune-0123456789abcdef", "artifacts/depth"]
    with opened(tmp_path, True):
        pass
    for name in (*left, *kept):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".report.json.77").write_text("x")
    (tmp_path / "report.json").write_text("x")
    with opened(tmp_path, True):
        pass
    assert not [name for name in (*left, ".report.json.77") if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in (*kept, "report.json"))


def test_without_resume_finished_work_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, True) as store, store.entry("x", KEY, {}):
        pass
    with opened(tmp_path, True) as store:
        assert store.facts("x", KEY) == {}
    with opened(tmp_path, False) as store:
        assert store.facts("x", KEY) is None


# --- the disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail with EFBIG, as a quota's do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["bytes", "safetensors"])
def test_a_full_disk_is_one_message_and_nothing_half_written(tmp_path: Path, writer: str) -> None:
    store = Store(tmp_path)
    with (
        pytest.raises(CompressError, match=r"Cannot write '.*': .*File too large.*Nothing half-written was left"),
        largest_file(4096),
        store.entry("x", KEY, {}) as folder,
    ):
        if writer == "bytes":
            (folder / "weights").write_bytes(bytes(8192))
        else:
            save_file({"w": torch.zeros(4096)}, folder / "weights.safetensors")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CompressError, match=r"Cannot write .*: Permission denied"), opened(tmp_path / "out", True):
        pass


def test_an_error_about_a_file_elsewhere_is_not_called_a_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Store(tmp_path / "run").entry("x", KEY, {}):
        (tmp_path / "elsewhere").read_bytes()
