"""Run a compiled Relax module: inputs checked, exactly as many threads as asked for, answers by task."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from targets.artifact import LIBRARY
from targets.base import Array, Artifact, Tensor
from targets.errors import TargetError

# Read by TVM when a thread first runs a parallel loop. Left alone, TVM counts half of the machine's cores (it takes
# them for hyper-threads) and pins the threads it makes, and with them every other library's in this process.
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("TVM_BIND_THREADS", "0")

_config_threadpool = tvm.get_global_func("runtime.config_threadpool")
_BIG_CORES = 1
_GO_ON = 0  # what an instrument of the virtual machine answers


def configure(threads: int) -> None:
    """Let TVM's next parallel loops use so many threads, the caller's included."""
    _config_threadpool(_BIG_CORES, threads)


class VirtualMachineRunner:
    """A Relax executable behind the `Runner` contract; one call at a time.

    Args:
        module: holds the executable, from a library or from memory.
        device: where it runs.
        inputs: what it takes, in order.
        tasks: names of its answers, in order.
        threads: all threads an inference uses, the caller's included.

    Raises:
        TargetError: more threads than this process can have.
    """

    def __init__(
        self, module: tvm.runtime.Module, device: tvm.runtime.Device, inputs: tuple[Tensor, ...],
        tasks: tuple[str, ...], threads: int,
    ) -> None:
        configure(max(threads, 1))
        granted = tvm.runtime.num_threads()
        if granted != threads:
            raise TargetError(
                f"Cannot run with {threads} threads: TVM grants {granted} here. "
                f"Choose 1 to {os.environ['TVM_NUM_THREADS']}, or set TVM_NUM_THREADS before the process starts."
            )
        self.tasks = tasks
        self._threads = threads
        self._inputs = inputs
        self._tensors = [tvm.runtime.empty(spec.shape, spec.dtype, device) for spec in inputs]
        self._on_host = device.dlpack_device_type() == tvm.cpu().dlpack_device_type()
        self._fill = [_copier(tensor, self._on_host) for tensor in self._tensors]
        self._machine = VirtualMachine(module, device)
        self._main = self._machine["main"]

    def __call__(self, *inputs: Array) -> dict[str, Array]:
        if len(inputs) != len(self._inputs):
            raise TargetError(f"{len(inputs)} inputs given; the artifact takes {self._expected()}.")
        for fill, spec, given in zip(self._fill, self._inputs, inputs, strict=True):
            if given.shape != spec.shape or given.dtype != spec.dtype:
                raise TargetError(
                    f"Input '{spec.name}' is {given.dtype} {given.shape}; the artifact takes {self._expected()}."
                )
            fill(given)
        configure(self._threads)
        found = self._main(*self._tensors)
        return {task: self._array(tensor) for task, tensor in zip(self.tasks, found, strict=True)}

    def calls(self, *inputs: Array) -> list[tuple[str, float]]:
        """Run once and say how many seconds each call took, in order: kernels by name, and TVM's own steps.

        Each time includes about a microsecond of asking for it. TVM goes on asking: from now on this runner is slower.
        """
        found: list[tuple[str, float]] = []
        begun = 0.0

        def watch(_: object, name: str, before: bool, *__: object) -> int:
            nonlocal begun
            now = time.perf_counter()
            if not before:
                found.append((name, now - begun))
            begun = time.perf_counter()
            return _GO_ON

        self._machine.set_instrument(watch)
        self(*inputs)
        return found

    def _array(self, tensor: tvm.runtime.Tensor) -> Array:
        if not self._on_host:
            return np.asarray(tensor.numpy())
        view = np.from_dlpack(tensor)
        view.flags.writeable = False
        return view

    def _expected(self) -> str:
        return ", ".join(f"'{spec.name}' {spec.dtype} {spec.shape}" for spec in self._inputs)


def open_library(artifact: Artifact) -> tvm.runtime.Module:
    """Open the library of a verified artifact, from a private copy.

    The system's loader goes by path: opened in place, an artifact that was built again would still run its old code.

    Raises:
        TargetError: the loader refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="taskpress-") as folder:
        copy = shutil.copy(artifact.directory / LIBRARY, folder)
        try:
            return tvm.runtime.load_module(copy)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise TargetError(f"'{artifact.directory / LIBRARY}' cannot be opened here: {reason}") from error


def _copier(tensor: tvm.runtime.Tensor, on_host: bool) -> Callable[[Array], object]:
    """What copies an array into a tensor; on the host through a view, which costs a tenth of TVM's own way."""
    if not on_host:
        return tensor.copyfrom  # type: ignore[no-any-return]
    return partial(np.copyto, np.from_dlpack(tensor))
