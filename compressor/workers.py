"""Jobs side by side, in processes of this machine or as tasks of a Ray cluster; each result as it comes.

A worker that is killed takes nothing with it: its job is begun once more by another, and is `Failed` the second time.
"""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from compressor.errors import CompressError

Job = TypeVar("Job")
Result = TypeVar("Result")

CONNECT_S = 10.0  # longest wait for a cluster to answer

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Failed:
    """A job without a result, and why."""

    why: str


def in_processes(
    jobs: Iterator[Job], work: Callable[[Job], Result], workers: int
) -> Iterator[tuple[Job, Result | Failed]]:
    """Each job with its result, `workers` at a time; the next job is taken once a result has been dealt with.

    Args:
        work: a function of a module, or a partial of one, as spawned processes import it. What it raises is printed by
            its process, which ends.
    """
    lanes: dict[Connection, _Lane] = {}
    try:
        for job in islice(jobs, workers):
            lane = _Lane(job, work)
            lanes[lane.pipe] = lane
        while lanes:
            for pipe in wait(list(lanes)):
                lane = lanes.pop(pipe)  # type: ignore[call-overload]
                result = lane.result()
                if result is None:
                    lanes[lane.pipe] = lane
                    continue
                yield lane.job, result
                following = next(jobs, None)
                if following is None:
                    lane.end()
                else:
                    lane.give(following)
                    lanes[lane.pipe] = lane
    finally:
        for lane in lanes.values():
            lane.end()


class _Lane:
    """A process that does one job after the other; the next one takes over when it is killed."""

    def __init__(self, job: Any, work: Callable[[Any], Any]) -> None:
        self.work = work
        self._start()
        self.give(job)

    def give(self, job: Any) -> None:
        self.job, self.tries = job, 1
        self._send()

    def result(self) -> Any:
        """What the process has to say, or None when it died and another has begun its job anew."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            self._start()
        if self.tries == 2:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Failed(f"Two processes were lost to it; the second {how}.")
        self.tries += 1
        self._send()
        return None

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()

    def _start(self) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, self.work))
        self.process.start()
        theirs.close()

    def _send(self) -> None:
        with suppress(OSError):  # it is dead already, as `result` will find
            self.pipe.send(self.job)


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; whoever gave the jobs ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        pipe.send(work(pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process
    wait([parent.sentinel])
    os._exit(1)


def on_ray(
    jobs: Iterator[Job], work: Callable[[Job], Result], workers: int, address: str
) -> Iterator[tuple[Job, Result | Failed]]:
    """As `in_processes`, as tasks of the Ray cluster at `address`; each has an equal share of its processors.

    Every node needs this package, and the files that jobs name at the same paths. No cluster is ever started.

    Raises:
        CompressError: Ray is not installed, or no cluster answers there.
    """
    ray = _joined(address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        processors = _share([node.get("CPU", 0.0) for node in nodes], workers)
        accelerators = _share([node.get("GPU", 0.0) for node in nodes], workers)
        options = {"num_cpus": max(1, int(processors)), "num_gpus": min(1, int(100 * accelerators) / 100)}
        task = ray.remote(max_retries=1, **options)(_done)
        running = {task.remote(work, job): job for job in islice(jobs, workers)}
        while running:
            [done], _ = ray.wait(list(running))
            job, result = running.pop(done), None
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                result = Failed(f"Ray: {str(error).strip().splitlines()[-1]}")
            yield job, result
            following = next(jobs, None)
            if following is not None:
                running[task.remote(work, following)] = following
    finally:
        ray.shutdown()


def _done(work: Callable[[Job], Result], job: Job) -> Result:
    return work(job)


def _joined(address: str) -> Any:
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal()):
        raise CompressError(f"--ray takes 'auto' or a cluster's HOST:PORT, not '{address}'.")
    try:
        import ray
    except ImportError:
        raise CompressError("--ray needs Ray, which is not installed: pip install 'taskpress[ray]'.") from None
    try:
        if address != "auto":  # Ray itself would try for minutes
            socket.create_connection((host.removeprefix("ray://"), int(port)), CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise CompressError(
            f"No Ray cluster answers at '{address}' ({told}). Start one with 'ray start --head', or name another."
        ) from None
    return ray


def _share(nodes: list[float], workers: int) -> float:
    """One worker's share of a resource; no more than one node has, as a task runs on one."""
    return min(max(nodes), sum(nodes) / workers)
