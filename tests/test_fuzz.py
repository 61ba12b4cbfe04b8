"""Random networks, eager PyTorch in float64 against the artifact; `tools/fuzz.py` runs as many more as one likes."""

import networks
import numpy as np
import pytest
import torch
from random_networks import RandomNetwork

pytestmark = pytest.mark.compile

SEEDS, EACH = 10, 10
WIDTHS = [bits for bits in (512, 256, 128) if bits <= networks.host_bits()]


def differs(seed: int) -> str:
    """Empty if the artifact of this seed's network answers as the network; else by how much which task differs."""
    net = RandomNetwork(seed).eval()
    x = torch.from_numpy(networks.example(*net.shape, seed=seed))
    with torch.no_grad():
        wanted = [answer.numpy() for answer in net.double()(x.double())]
    net.float()
    tasks = tuple(f"task{k}" for k in range(len(wanted)))
    program = networks.to_program(net, (x,), tasks, f"seed{seed}")
    device = networks.cpu_device(bits=WIDTHS[seed % len(WIDTHS)], cores=1 + seed % 2)
    found = networks.run_built(program, device, x.numpy())
    for task, want in zip(tasks, wanted, strict=True):
        slack = 5e-4 * max(1e-3, float(np.abs(want).max()))
        error = float(np.abs(found[task] - want).max()) if found[task].shape == want.shape else np.inf
        if not error <= slack:
            return f"{task} differs by {error:.2g} where {slack:.2g} is allowed"
    return ""


@pytest.mark.parametrize("first", range(0, SEEDS, EACH))
def test_random_networks(first: int) -> None:
    wrong = {seed: text for seed in range(first, first + EACH) if (text := differs(seed))}
    assert not wrong
