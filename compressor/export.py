"""A pathway as ONNX: exported, checked, simplified, and shown to answer the same after each step."""

import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import onnxsim
import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.pathway import Pathway
from compressor.quantization.integers import to_integers
from targets.base import Program

OPSET = 20


def to_program(pathway: Pathway, inputs: tuple[Tensor, ...], normalisation: str = "") -> tuple[Program, Program]:
    """(as exported, simplified by onnxsim) for static shapes of `inputs`; both pass ONNX's checker.

    Constants of the simplified one that are too small for a normal float are zero: processors are slow at them.
    Inputs are named "input" ("input_0", "input_1", ... when there are several), outputs after their tasks.

    Raises:
        CompressError: the exporter lacks an operator, or the checker or onnxsim refuses the model.
    """
    model = _export(pathway, inputs)
    try:
        simplified, same = onnxsim.simplify(model, check_n=0)
    except (RuntimeError, ValueError) as error:
        raise CompressError(f"onnxsim cannot simplify the pathway of {pathway.name}: {error}") from error
    if not same:
        raise CompressError(f"onnxsim says that its own result for {pathway.name} differs from the model it was given.")
    _flush(simplified)
    _check(simplified, pathway.name)
    name = file_name(pathway.tasks)
    return Program(name, model, pathway.tasks, normalisation), Program(name, simplified, pathway.tasks, normalisation)


def file_name(tasks: tuple[str, ...]) -> str:
    """A task set as a folder name; task names have no '+'."""
    return "+".join(tasks)


def session(model: onnx.ModelProto, threads: int = 1, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with exactly `threads` threads.

    Not `optimised`, it runs the graph as written, which is what answers are compared with: ONNX Runtime 1.31's
    rewrites change answers in places (a Pad before a MaxPool).

    Raises:
        CompressError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its many errors have no common base
        tasks = ", ".join(output.name for output in model.graph.output)
        raise CompressError(f"ONNX Runtime cannot load the graph of {tasks}: {error}") from error


def run(loaded: onnxruntime.InferenceSession, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Answers by output name."""
    names = [i.name for i in loaded.get_inputs()]
    return dict(
        zip(
            (o.name for o in loaded.get_outputs()), loaded.run(None, dict(zip(names, inputs, strict=True))), strict=True
        )
    )


def _export(pathway: Pathway, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = ["input"] if len(inputs) == 1 else [f"input_{k}" for k in range(len(inputs))]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations, nothing a user can act on
            exported = torch.onnx.export(
                pathway.network,
                inputs,
                dynamo=True,
                verbose=False,
                optimize=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(pathway.tasks),
                external_data=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().split("\n", 1)[0]
        raise CompressError(f"The pathway of {pathway.name} cannot be exported to ONNX: {reason}") from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    del model.metadata_props[:]
    model.doc_string = ""
    for node in model.graph.node:  # stack traces of the machine that exported it
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    tensors = pathway.tensors
    to_integers(model, {name: (tensors[name], grid) for name, grid in pathway.grids.items() if name in tensors})
    _check(model, pathway.name)
    return model


def _flush(model: onnx.ModelProto) -> None:
    """Subnormal constants to zero; folding a batch norm into tiny weights makes more of them."""
    for held in model.graph.initializer:
        values = onnx.numpy_helper.to_array(held)
        if np.issubdtype(values.dtype, np.floating):
            tiny = (values != 0) & (np.abs(values) < np.finfo(values.dtype).smallest_normal)
            if tiny.any():
                held.CopyFrom(onnx.numpy_helper.from_array(np.where(tiny, values.dtype.type(0), values), held.name))


def _check(model: onnx.ModelProto, name: str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompressError(f"ONNX's checker refuses the pathway of {name}: {error}") from error
