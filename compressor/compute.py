"""What a compression computes with: a device, a number of threads, and processes that share its batches.

Several processes, as `torchrun` starts them, all run the same recipe and take the same decisions. Each trains on
batches of its own, and their gradients are averaged at every step. What is scored, measured or read from the run's
folder, the first of them finds and tells the others; it alone writes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from compressor.errors import CompressError

Where = Literal["auto", "cpu", "cuda"]
Found = TypeVar("Found")

CPU = torch.device("cpu")
LONGEST_WAIT = timedelta(minutes=30)
"""One process waits no longer for another; `torchrun` ends all as soon as one fails."""


def count() -> int:
    """How many processes work on this compression."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, 0 for the first."""
    return int(os.environ.get("RANK", "0"))


def join(where: Where) -> torch.device:
    """The device this process computes on, once it has met the others; "auto" is a GPU where torch sees one.

    Raises:
        CompressError: a GPU is asked for, and there is none.
    """
    seen = torch.cuda.is_available()
    if where == "cuda" and not seen:
        raise CompressError("train_on = 'cuda', but torch sees no CUDA device here. Use train_on = 'auto' or 'cpu'.")
    on_cpu = where == "cpu" or not seen
    if count() == 1:
        return CPU if on_cpu else torch.device("cuda")
    from accelerate import PartialState

    if os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # those who meet on this machine talk on it alone
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    return CPU if on_cpu else torch.device(state.device)


def place(device: torch.device, threads: int) -> str:
    """Where and how this compression computes, for a reader: "CPU, 2 threads"."""
    on_cpu = device.type == "cpu"
    name = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    parts = [name, *([f"{threads} thread{'s' * (threads != 1)}"] if on_cpu else [])]
    return ", ".join(parts + ([f"{count()} processes"] if count() > 1 else []))


def alone(verb: str) -> None:
    """Refuse to do in several processes what one does.

    Raises:
        CompressError: there are several.
    """
    if count() > 1:
        raise CompressError(f"{count()} processes cannot {verb} together; `compress run` alone can. Start one.")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads. Sums are split among threads, so results repeat bit for bit at the same number;
    where there are fewer cores they take turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def at(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on a device, and then where they were."""
    before = [next((parameter.device for parameter in module.parameters()), CPU) for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, place in zip(modules, before, strict=True):
            module.to(place)


def by_first(work: Callable[[], Found]) -> Found:
    """What the first process finds by some work, a JSON value; the others wait for it."""
    if count() == 1:
        return work()
    from accelerate.utils import broadcast

    device = _meeting().device
    text = json.dumps(work()).encode() if rank() == 0 else b""
    size = int(broadcast(torch.tensor([len(text)], device=device)))
    letters = torch.tensor(list(text) or [0] * size, dtype=torch.uint8, device=device)
    found: Found = json.loads(bytes(broadcast(letters).tolist()))
    return found


def average(parameters: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
    """Replace the parameters' gradients, and other tensors, by their means over all processes, in one exchange.

    A process whose batch says nothing about a parameter counts as a gradient of zero; where none says anything there
    is none afterwards either.
    """
    if count() == 1:
        return
    from accelerate.utils import reduce

    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=_meeting().device)
    parts = [part.detach() for part in (*own, *others, there)]
    mean = reduce(torch.cat([part.flatten() for part in parts]), "mean")
    for part, value in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view(part.shape))
    for parameter, gradient, anywhere in zip(parameters, own, there.tolist(), strict=True):
        parameter.grad = gradient if anywhere else None


def check_alike(what: str, tensors: Iterable[Tensor]) -> None:
    """Every process holds the same bits.

    Raises:
        CompressError: they do not; raised in all of them.
    """
    if count() == 1:
        return
    from accelerate.utils import gather

    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    own = torch.tensor(list(sha.digest()), dtype=torch.uint8, device=_meeting().device)
    if len(gather(own[None]).unique(dim=0)) > 1:
        raise CompressError(
            f"The processes do not agree about {what}. They must see the same files and run on equal machines."
        )


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        _meeting().wait_for_everyone()


def _meeting() -> Any:
    from accelerate import PartialState

    return PartialState()
