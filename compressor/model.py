"""A multi-task model: the user's module, what its tasks answer, and the record of every cut made to it."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
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
from compressor.workload import Task, Workload
from profiles.settings import did_you_mean

WEIGHTS, SURGERY, MASKS = "weights.safetensors", "surgery.json", "masks.safetensors"
SCHEMA = "taskpress.surgery/1"


@dataclass(slots=True)
class MultiTaskModel:
    """A module with its tasks.

    Attributes:
        module: the user's network; its forward may return a tensor, a tuple or a dict.
        inputs: example inputs, batch first.
        kept: for each cut tensor and dimension, the indices of the original that are left, in order.
        attributes: integers of the module's own code that follow the cuts (how many heads are left), by dotted name.
        masks: for each ticket-pruned weight, a bool tensor of its shape; False stays zero in every later stage.
    """

    module: nn.Module
    tasks: tuple[Task, ...]
    inputs: tuple[Tensor, ...]
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def answers(self, *inputs: Tensor) -> dict[str, Tensor]:
        """One tensor for each task, in task order."""
        return answers(self.module(*inputs), self.tasks)

    def clone(self) -> "MultiTaskModel":
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        module, kept = copy.deepcopy(self.module), copy.deepcopy(self.kept)
        return MultiTaskModel(module, self.tasks, self.inputs, kept, dict(self.attributes), masks)

    def cut(self, keep: Mapping[Axis, Tensor], attributes: Mapping[str, int] | None = None) -> None:
        """Keep only the given indices (ascending int64, of the present size) along each named axis, in place.

        A tensor that the module holds under several names is cut under all of them, and so are its masks. What torch's
        own layers keep about their shapes follows; `attributes` are other integers to set, by dotted name.

        Raises:
            CompressError: indices that are no such list; nothing is cut then.
        """
        for axis, indices in keep.items():
            _check_indices(axis, indices.tolist(), get_tensor(self.module, axis.tensor).shape)
        _set_groups(self.module, keep)
        names = {name: group for group in names_of(self.module) for name in group}
        for axis, indices in keep.items():
            old = get_tensor(self.module, axis.tensor)
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

    @classmethod
    def load(cls, directory: Path, workload: Workload) -> "MultiTaskModel":
        """Rebuild a saved model: build the original, replay the cuts, load the weights strictly.

        Raises:
            CompressError: the folder holds no saved model, or not one of this workload's network.
        """
        model = cls(workload.build(), tuple(workload.tasks), tuple(workload.example_inputs()))
        model.cut(*_read_surgery(directory / SURGERY))
        load_weights(model.module, directory / WEIGHTS)
        if (directory / MASKS).exists():
            model.masks = load_file(directory / MASKS)
        model.module.eval()
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


def answers(raw: object, tasks: Iterable[Task]) -> dict[str, Tensor]:
    """Cut what forward returned into one tensor for each task.

    Raises:
        CompressError: an output is missing, is not a tensor, or has fewer channels than a task says.
    """
    found = {}
    for task in tasks:
        output = _pick(raw, task)
        if task.channels is not None:
            first, last = task.channels
            if output.dim() < 2 or not 0 <= first < last <= output.shape[1]:
                raise CompressError(
                    f"Task '{task.name}' is channels {first}:{last} of output {task.output!r}, "
                    f"whose shape is {tuple(output.shape)}."
                )
            output = output[:, first:last]
        found[task.name] = output
    return found


def _pick(raw: object, task: Task) -> Tensor:
    if isinstance(raw, Tensor):
        raw = (raw,)
    if isinstance(raw, Mapping):
        found = raw.get(task.output)
        names = [str(key) for key in raw]
    elif isinstance(raw, tuple | list):
        known = isinstance(task.output, int) and 0 <= task.output < len(raw)
        found = raw[int(task.output)] if known else None
        names = [str(k) for k in range(len(raw))]
    else:
        raise CompressError(f"The network returns a {type(raw).__name__}; a tensor, a tuple or a dict is needed.")
    if not isinstance(found, Tensor):
        what = "is not among the network's outputs" if found is None else f"is a {type(found).__name__}, not a tensor"
        hint = did_you_mean(str(task.output), names)
        raise CompressError(f"Task '{task.name}': output {task.output!r} {what}.{hint}")
    return found


def load_checkpoint(workload: Workload, checkpoint: Path | None) -> MultiTaskModel:
    """The trained network as the user brought it, checked before any work starts.

    Weights too small for a normal float become zero: weight decay leaves them in dead channels, where they change no
    answer, and processors compute with them about twenty times more slowly.

    Raises:
        CompressError: the file is missing, no safetensors file, or does not fit the network; a weight or an answer
            is not finite; forward fails on the example inputs or does not return what the tasks say.
    """
    module = workload.build()
    if checkpoint is not None:
        load_weights(module, checkpoint)
    module.eval()
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
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in model.inputs)
        raise CompressError(f"The network fails on its example inputs of shape {shapes}: {error}") from error
    for name, answer in answers(raw, model.tasks).items():
        if not answer.isfinite().all():
            raise CompressError(f"Task '{name}' answers NaN or infinity on the example inputs.")
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


# --- tensors by name, and module attributes that repeat a tensor's shape


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer (or plain tensor attribute) by its dotted name."""
    return tensor_of(module, name)


def names_of(module: nn.Module) -> list[list[str]]:
    """The names of each parameter and buffer; more than one where the module shares it."""
    names: dict[int, list[str]] = {}
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in held:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer under every name that the module has for it."""
    old = get_tensor(module, name)
    value = value.detach().clone()
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            for key, tensor in list(held.items()):
                if tensor is old:
                    held[key] = new  # type: ignore[assignment]


def _set_groups(module: nn.Module, keep: Mapping[Axis, Tensor]) -> None:
    """Give grouped convolutions and group norms the groups of which a cut leaves anything."""
    rows = {id(get_tensor(module, axis.tensor)): indices for axis, indices in keep.items() if axis.dim == 0}
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and id(layer.weight) in rows:
            each = layer.weight.shape[0] // layer.groups
            layer.groups = len(torch.unique(rows[id(layer.weight)] // each))
        elif isinstance(layer, nn.GroupNorm) and id(layer.weight) in rows:
            each = layer.num_channels // layer.num_groups
            layer.num_groups = len(torch.unique(rows[id(layer.weight)] // each))


def refit(module: nn.Module) -> None:
    """Set the attributes that layers keep about their shapes to what their tensors say."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.modules.conv._ConvNd):
            layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            size = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = len(size) if size is not None else layer.num_features
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = len(layer.weight) if layer.weight is not None else layer.num_channels
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = layer.weight.shape[1]
