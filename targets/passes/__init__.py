"""What happens to a program between the importer and the code generator, in the order written here."""

import tvm
from tvm import relax

from profiles.device import Device


def cpu_pipeline(device: Device) -> tvm.transform.Pass:
    """Relax to scheduled kernels for a CPU."""
    del device
    return tvm.transform.Sequential([relax.transform.LegalizeOps()])


FINISH = relax.get_pipeline("default_build")
