"""A multi-task model: the user's module, what its tasks answer, and the record of every cut made to it."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.attributes import set_attributes
from compressor.channels import Axis
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.quantization.grids import Quantization
from compressor.simulation import Simulation
from compressor.tensors import names_of, plain, refit, set_groups, set_tensor
from compressor.workload import Task, Workload, answers, spare

WEIGHTS, SURGERY, MASKS = "weights.safetensors", "surgery.json", "masks.safetensors"
SCHEMA = "taskpress.surgery/1"
_RANDOM = 1e-3  # of the largest answer: two answers to the same that are further apart hang on chance


@dataclass(slots=True)
class MultiTaskModel:
    """A module with its tasks.

    Attributes:
        module: the user's network; its forward may return a tensor, a tuple or a dict.
        inputs: example inputs, batch first.
        kept: for each cut tensor and dimension, the indices of the original that are left, in order.
        attributes: integers of the module's own code that follow the cuts (how many heads are left), by dotted name.
        masks: for each ticket-pruned weight, a bool tensor of its shape; False stays zero in every later stage.
        quantization: the grids on which values and weights lie; None where all is floating point.
    """

    module: nn.Module
    tasks: tuple[Task, ...]
    inputs: tuple[Tensor, ...]
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    quantization: Quantization | None = None
    _simulation: Simulation = field(default_factory=Simulation, repr=False, compare=False)

    def answers(self, *inputs: Tensor) -> dict[str, Tensor]:
        """One tensor for each task, in task order; rounded to its grids all the way where the model is quantized."""
        if self.quantization is not None:
            return self._simulation(self, inputs)
        return answers(self.module(*inputs), self.tasks)

    def spare(self) -> tuple[str, ...]:
        """What the module returns that is no task's, by name or number."""
        with torch.no_grad():
            return spare(self.module(*self.inputs), self.tasks)

    def clone(self) -> "MultiTaskModel":
        for part in self.module.modules():  # what hooks such as torch.nn.utils.weight_norm computed in the last forward
            for name, value in vars(part).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    setattr(part, name, value.detach())
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        module, kept = copy.deepcopy(self.module), copy.deepcopy(self.kept)
        attributes = dict(self.attributes)
        return MultiTaskModel(module, self.tasks, self.inputs, kept, attributes, masks, self.quantization)

    def cut(self, keep: Mapping[Axis, Tensor], attributes: Mapping[str, int] | None = None) -> None:
        """Keep only the given indices (ascending int64, of the present size) along each named axis, in place.

        A tensor that the module holds under several names is cut under all of them, and so are its masks. What torch's
        own layers keep about their shapes follows; `attributes` are other integers to set, by dotted name.

        Raises:
            CompressError: indices that are no such list, or the model is quantized; nothing is cut then.
        """
        if self.quantization is not None:
            raise CompressError("A quantized network cannot be cut: put 'quantize' after the stages that cut.")
        for axis, indices in keep.items():
            _check_indices(axis, indices.tolist(), tensor_of(self.module, axis.tensor).shape)
        set_groups(self.module, keep)
        names = {name: group for group in names_of(self.module) for name in group}
        for axis, indices in keep.items():
            old = tensor_of(self.module, axis.tensor)
            if len(indices) == old.shape[axis.dim]:
                continue
            set_tensor(self.module, axis.tensor, old.index_select(axis.dim, indices.to(old.device)))
            before = self.kept.setdefault(axis.tensor, {}).get(axis.dim)
            now = indices.tolist() if before is None else [before[k] for k in indices.tolist()]
            self.kept[axis.tensor][axis.dim] = now
            for name in self.masks.keys() & set(names[axis.tensor]):
                self.masks[name] = self.masks[name].index_select(axis.dim, indices)
        refit(self.module)
        set_attributes(self.module, attributes or {})
        self.attributes.update(attributes or {})

    def save(self, directory: Path) -> None:
        """Write weights, surgery record and masks into an existing folder."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.module.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        record = {name: {str(dim): kept for dim, kept in dims.items()} for name, dims in self.kept.items()}
        surgery = {"schema": SCHEMA, "kept": record, "attributes": self.attributes}
        (directory / SURGERY).write_text(json.dumps(surgery))
        if self.masks:
            save_file({name: mask.contiguous() for name, mask in self.masks.items()}, directory / MASKS)
        if self.quantization is not None:
            self.quantization.save(directory)

    @classmethod
    def load(cls, directory: Path, workload: Workload) -> "MultiTaskModel":
        """Rebuild a saved model: build the original, replay the cuts, load the weights strictly.

        Raises:
            CompressError: the folder holds no saved model, or not one of this workload's network.
        """
        model = cls(plain(workload.build()), tuple(workload.tasks), tuple(workload.example_inputs()))
        model.cut(*_read_surgery(directory / SURGERY))
        load_weights(model.module, directory / WEIGHTS)
        if (directory / MASKS).exists():
            model.masks = load_file(directory / MASKS)
        model.quantization = Quantization.load(directory)
        return model


def _check_indices(axis: Axis, kept: list[int], shape: tuple[int, ...]) -> None:
    size = shape[axis.dim] if 0 <= axis.dim < len(shape) else 0
    if kept != sorted(set(kept)) or not all(0 <= k < size for k in kept):
        raise CompressError(
            f"Dimension {axis.dim} of {axis.tensor}, whose shape is {tuple(shape)}, cannot keep the indices {kept[:8]}"
            f"{'...' if len(kept) > 8 else ''}; they must ascend and lie inside it."
        )


def _read_surgery(path: Path) -> tuple[dict[Axis, Tensor], dict[str, int]]:
    """What `MultiTaskModel.save` recorded of cuts, as `MultiTaskModel.cut` takes it."""
    try:
        record = json.loads(path.read_text())
        if record["schema"] != SCHEMA:
            raise CompressError(f"{path} has the schema {record['schema']!r}; this version reads {SCHEMA!r}.")
        keep = {
            Axis(name, int(dim)): torch.tensor(kept, dtype=torch.int64)
            for name, dims in record["kept"].items()
            for dim, kept in dims.items()
        }
        return keep, {str(name): int(value) for name, value in record.get("attributes", {}).items()}
    except OSError as error:
        raise CompressError(f"There is no saved model in {path.parent}: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{path} is not a surgery record ({type(error).__name__}: {error}).") from error


def load_checkpoint(workload: Workload, checkpoint: Path | None) -> MultiTaskModel:
    """The trained network as the user brought it, checked before any work starts.

    Weights that it computes of others, as weight norm does, are computed. Those too small for a normal float become
    zero: weight decay leaves them in dead channels, where they change no answer, and processors compute with them
    about twenty times more slowly.

    Raises:
        CompressError: the file is missing, no safetensors file, or does not fit the network; a weight or an answer
            is not finite, or a weight is complex; forward fails on the example inputs, does not return what the tasks
            say, or answers otherwise each time.
    """
    module = workload.build()
    if checkpoint is not None:
        load_weights(module, checkpoint)
    plain(module)
    if odd := [name for name, value in module.named_parameters() if value.is_complex()]:
        raise CompressError(f"Complex weights can be neither pruned, trained nor compiled here: {some(odd)}.")
    broken = [n for n, value in module.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CompressError(f"The weights hold NaN or infinity: {some(broken)}.")
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value[value.abs() < torch.finfo(value.dtype).smallest_normal] = 0.0
    model = MultiTaskModel(module, tuple(workload.tasks), tuple(workload.example_inputs()))
    try:
        with torch.no_grad():
            raw = module(*model.inputs)
            with torch.random.fork_rng(devices=[]):
                again = answers(module(*model.inputs), model.tasks)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in model.inputs)
        raise CompressError(f"The network fails on its example inputs of shape {shapes}: {error}") from error
    for name, answer in answers(raw, model.tasks).items():
        if not answer.isfinite().all():
            raise CompressError(f"Task '{name}' answers NaN or infinity on the example inputs.")
        one, other = answer.double(), again[name].double()
        if answer.numel() and float((one - other).abs().max()) > _RANDOM * float(one.abs().max()):
            raise CompressError(
                f"Task '{name}' answers otherwise each time it is asked the same: its forward draws random numbers in "
                "evaluation too. Let it draw them while it trains alone (self.training)."
            )
    return model


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file strictly; every missing, unexpected or misshapen tensor is named at once."""
    if not path.is_file():
        raise CompressError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CompressError(f"{path} is not a readable safetensors file ({error}).{_format_hint(path)}") from error
    wanted = module.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    faults = []
    if missing := sorted(set(wanted) - set(given) - optional):
        faults.append(f"missing {some(missing)}")
    if extra := sorted(set(given) - set(wanted)):
        faults.append(f"unexpected {some(extra)}")
    faults += [
        f"{name} has shape {tuple(given[name].shape)}, the network's is {tuple(wanted[name].shape)}"
        for name in sorted(set(given) & set(wanted))
        if given[name].shape != wanted[name].shape
    ]
    faults += [
        f"{name} is {given[name].dtype}, which the network's {wanted[name].dtype} cannot hold exactly"
        for name in sorted(set(given) & set(wanted))
        if torch.promote_types(given[name].dtype, wanted[name].dtype) != wanted[name].dtype
    ]
    if faults:
        raise CompressError(f"{path} does not fit the network: {'; '.join(faults)}.")
    module.load_state_dict(given, strict=False)


def _format_hint(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return (
            " It looks like a pickle, which can run code when opened and is refused. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')."
        )
    return ""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
