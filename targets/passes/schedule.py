"""Give every kernel its schedule: the template its anchor names, or the general one."""

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import s_tir, tirx

from profiles.device import Device
from targets.kernels.convolution import schedule_convolution
from targets.kernels.dense import schedule_dense, schedule_narrow_dense
from targets.kernels.other import schedule_other
from targets.kernels.product import schedule_product
from targets.kernels.rows import schedule_rows
from targets.kernels.sliding import schedule_sliding
from targets.kernels.winograd import schedule_winograd

ABOUT = ("layer", "method", "macs", "work")

_TEMPLATES: dict[str, Callable[[s_tir.Schedule, Any], None]] = {
    "convolution": schedule_convolution,
    "sliding": schedule_sliding,
    "dense": schedule_dense,
    "narrow_dense": schedule_narrow_dense,
    "winograd": schedule_winograd,
    "product": schedule_product,
    "rows": schedule_rows,
}


def schedule(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """No function keeps TVM's serial scalar loops; each says of itself what its anchor says (`ABOUT`)."""
    scheduled = {}
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and "scheduled" not in function.attrs:
            s = s_tir.Schedule(function)
            about = _schedule(s, device)
            scheduled[name] = s.mod["main"].with_attr({key: about[key] for key in ABOUT if key in about})
    module = module.clone()
    for name, function in scheduled.items():
        module.update_func(name, function.without_attr("global_symbol"))
    return module


def _schedule(s: s_tir.Schedule, device: Device) -> Mapping[str, Any]:
    """Schedule one kernel; returns what its anchor says about it."""
    for block in s.get_child_blocks(s.get_sblock("root")):
        annotations = dict(s.get(block).annotations)
        if "kernel" in annotations:
            _TEMPLATES[str(annotations["kernel"])](s, block)
            return annotations
    schedule_other(s, device)
    return {}
