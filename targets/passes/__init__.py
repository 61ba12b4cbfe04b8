"""What happens to a program between the importer and the code generator, in the order written here."""

import tvm
from tvm import relax

from profiles.device import Device
from targets.choice import Choices
from targets.passes.columns import columns
from targets.passes.fold import fold
from targets.passes.matrices import matrices
from targets.passes.pattern import correct_patterns
from targets.passes.schedule import schedule
from targets.passes.sparse import lay_out
from targets.passes.vector_math import vector_math


def cpu_passes(module: tvm.IRModule, device: Device, choices: Choices) -> tvm.IRModule:
    """Relax as imported to scheduled kernels for a CPU; call it within the device's TVM target."""
    module = fold(module)  # batch norms and moved constants, so that only real weights are left to pack
    module = columns(module, device)  # dense layers with mostly zero weights, as convolutions
    module = matrices(module, device)  # matrix products, and what goes over rows
    module = lay_out(module, device, choices)  # channels in blocks; planes in regions for sparse weights
    for step in (
        relax.transform.FoldConstant(),  # what is left of constant arithmetic
        relax.transform.LegalizeOps(),  # every other operator becomes a kernel
        relax.transform.AnnotateTIROpPattern(),  # what may be fused with what,
        correct_patterns,  # where TVM does not take a change of shape for an element-wise operator
        relax.transform.FuseOps(),  # bias, residual sum and activation join the kernel before them
        relax.transform.FuseTIR(),  # each group becomes one function
        relax.transform.DeadCodeElimination(),
        vector_math,  # exp and its kin as arithmetic, before loops are made vectors
    ):
        module = step(module)
    module = relax.transform.RewriteDataflowReshape()(schedule(module, device))  # a new shape alone moves nothing
    return relax.transform.DeadCodeElimination()(module)


FINISH = relax.get_pipeline("default_build")  # static memory planning and calls; kernels are left as they are
