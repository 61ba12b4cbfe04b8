"""Workers: every job has one result, and a worker that is killed loses none."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from compressor.errors import CompressError
from compressor.workers import Failed, in_processes, on_ray


def square(folder: Path, job: int) -> int:
    """Leaves a file a try; job 1 is killed at its first, job 2 at every one."""
    tries = len(list(folder.glob(f"{job}-*")))
    (folder / f"{job}-{tries}-{os.getpid()}").touch()
    if job == 2 or (job == 1 and not tries):
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


def test_a_killed_worker_is_replaced_and_its_job_begun_once_more(tmp_path: Path) -> None:
    dealt: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(5):
            assert len(dealt) >= job - 2, "a job is taken when a result has been dealt with"
            yield job

    found = {}
    for job, result in in_processes(jobs(), functools.partial(square, tmp_path), 2):
        dealt.append(job)
        found[job] = result
    assert {job: found[job] for job in (0, 1, 3, 4)} == {0: 0, 1: 1, 3: 9, 4: 16}
    assert found[2] == Failed("Two processes were lost to it; the second was ended by SIGKILL.")
    tries = sorted(file.name.split("-")[0] for file in tmp_path.iterdir())
    assert tries == ["0", "1", "1", "2", "2", "3", "4"]


def test_workers_end_with_whoever_gave_them_jobs(tmp_path: Path) -> None:
    code = (
        "import functools, pathlib, test_workers, compressor.workers as w\n"
        f"idle = functools.partial(test_workers.idle, pathlib.Path({str(tmp_path)!r}))\n"
        "if __name__ == '__main__': list(w.in_processes(iter((1, 2)), idle, 2))"
    )
    (tmp_path / "main.py").write_text(code)
    giver = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=importing())
    pids = [int(pid) for pid in wait_for(lambda: [f.name for f in tmp_path.glob("[0-9]*")], 2)]
    giver.kill()
    giver.wait()
    wait_for(lambda: [pid for pid in pids if not Path(f"/proc/{pid}").exists()], 2)


def importing() -> dict[str, str]:
    """The environment of a process that imports what this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}


def idle(folder: Path, job: int) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(60)
    return job


def wait_for(found: Callable[[], list[str]] | Callable[[], list[int]], count: int) -> list[str] | list[int]:
    until = time.monotonic() + 60
    while len(now := found()) < count:
        assert time.monotonic() < until, now
        time.sleep(0.02)
    return now


def test_ray_is_needed_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CompressError, match="not installed: pip install 'taskpress\\[ray\\]'"):
        next(on_ray(iter((1,)), str, 1, "auto"))
    for wrong in ("local", "", "head:", ":6379"):
        with pytest.raises(CompressError, match=f"takes 'auto' or a cluster's HOST:PORT, not '{wrong}'"):
            next(on_ray(iter((1,)), str, 1, wrong))


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what makes Ray take a loopback address for itself
    pytest.importorskip("ray")
    with pytest.raises(CompressError, match=r"No Ray cluster answers at '127\.0\.0\.1:1'"):
        next(on_ray(iter((1,)), str, 1, "127.0.0.1:1"))
    with cluster() as address:
        found = dict(on_ray(iter(range(5)), functools.partial(square, tmp_path), 2, address))
    assert {job: found[job] for job in (0, 1, 3, 4)} == {0: 0, 1: 1, 3: 9, 4: 16}
    assert isinstance(found[2], Failed) and found[2].why.startswith("Ray: ")
    tries = sorted(file.name.split("-")[0] for file in tmp_path.iterdir())
    assert tries == ["0", "1", "1", "2", "2", "3", "4"]


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of this machine alone, reached over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # its sockets' names must be short
    address = "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"
    options = "--include-dashboard=false", "--num-cpus=2", "--num-gpus=1", "--disable-usage-stats", "--block"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *address, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(command, env=importing(), start_new_session=True, **quiet)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
