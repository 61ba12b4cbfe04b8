"""A training's state on disk, so that one that was killed goes on at its last checkpoint, bit for bit."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from compressor import compute
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.store import writing

SECONDS = 30.0  # between checkpoints
_STEP, _WEIGHT, _OPTIMISER, _OTHER = "step", "weight.", "optimiser.", "other."


class Checkpoint:
    """One training's: known by where it starts (weights, masks), its settings, seed and code.

    The file holds weights, the optimiser's moments, what else the next steps depend on, and the number of steps done.
    It is written after every `every` steps, or after 30 seconds where that is 0; by the first of several processes. It
    also stays when the training is over, so that a stage which was killed later repeats nothing.
    """

    def __init__(self, folder: Path | None, model: MultiTaskModel, every: int, title: str, *about: object) -> None:
        self._written, self._every = time.monotonic(), every
        self._file: Path | None = None
        if folder is not None:
            sha = hashlib.sha256(json.dumps([title, *about], sort_keys=True).encode())
            for name, tensor in (*model.module.state_dict().items(), *sorted(model.masks.items())):
                sha.update(name.encode())
                sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._file = folder / f"training-{sha.hexdigest()[:24]}.safetensors"

    def restore(self, model: MultiTaskModel, optimiser: Optimizer, others: dict[str, Tensor]) -> int:
        """Bring all to where they were, in place; returns the steps done, 0 where there is no checkpoint.

        Raises:
            CompressError: the file was damaged.
        """
        if self._file is None or not self._file.is_file():
            return 0
        try:
            with safe_open(self._file, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model.module.load_state_dict(_under(found, _WEIGHT))
            for index, parameter in enumerate(_parameters(optimiser)):
                moments = _under(found, f"{_OPTIMISER}{index}.")
                for name, value in moments.items():
                    like = parameter if value.shape == parameter.shape else value
                    optimiser.state[parameter][name] = torch.empty_like(like, device=parameter.device).copy_(value)
            for name, value in _under(found, _OTHER).items():
                others[name].copy_(value)
            return int(found[_STEP])
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise CompressError(f"'{self._file}' is damaged ({error}). Remove it, or use --no-resume.") from error

    def keep(
        self, step: int, model: MultiTaskModel, optimiser: Optimizer, others: dict[str, Tensor], last: bool
    ) -> None:
        """Write the state after so many steps, if it is time to or they are the last.

        Raises:
            CompressError: the disk refuses; nothing half-written is left.
        """
        due = step % self._every == 0 if self._every else time.monotonic() - self._written > SECONDS
        if self._file is None or not (last or due) or compute.rank():
            return
        state = {_STEP: torch.tensor(step)}
        state |= {_WEIGHT + name: value for name, value in model.module.state_dict().items()}
        state |= {_OTHER + name: value for name, value in others.items()}
        for index, parameter in enumerate(_parameters(optimiser)):
            for name, value in optimiser.state.get(parameter, {}).items():
                state[f"{_OPTIMISER}{index}.{name}"] = torch.as_tensor(value)
        draft = self._file.with_suffix(".draft")
        with writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, draft)
                draft.replace(self._file)
            except BaseException:
                draft.unlink(missing_ok=True)
                with suppress(OSError):  # other trainings' files are in it
                    self._file.parent.rmdir()
                raise
        self._written = time.monotonic()


def _parameters(optimiser: Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _under(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
