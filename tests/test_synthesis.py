"""What yosys makes of the circuit for an ECP5: within the bounds that the largest of them has, as few as it was."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerated import LUTS, SMALL

from targets.accelerator.design import Design
from targets.accelerator.synthesis import Resources, route, synthesise
from targets.errors import TargetError


def multipliers(design: Design) -> int:
    """The array's, if it is made of them, and of each lane two for either step."""
    return (design.multipliers if design.array_in == "multipliers" else 0) + 4 * design.lanes


@pytest.mark.toolchain
@pytest.mark.skipif(not find_spec("pyosys"), reason="needs pyosys")
@pytest.mark.parametrize(
    ("design", "bound"),
    [
        (SMALL, Resources(luts=7000, flip_flops=9000, multipliers=72, memories=26)),
        pytest.param(LUTS, Resources(luts=17500, flip_flops=13500, multipliers=8, memories=26), marks=pytest.mark.slow),
        pytest.param(
            Design(), Resources(luts=10000, flip_flops=13000, multipliers=144, memories=88), marks=pytest.mark.slow
        ),
    ],
    ids=["8 x 8, small", "8 x 8, in look-up tables", "16 x 8"],
)
def test_the_circuit_takes_no_more_than_it_did(design: Design, bound: Resources, tmp_path: Path) -> None:
    found = synthesise(design, tmp_path)
    assert found.multipliers == bound.multipliers == multipliers(design), "one that is not ours, or ours elsewhere"
    assert found.memories <= bound.memories and found.luts <= bound.luts and found.flip_flops <= bound.flip_flops, found


def test_a_device_that_is_no_ecp5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"No ECP5 'zcu104'; there are ecp5-25k, ecp5-45k, ecp5-85k"):
        route(tmp_path, "zcu104", 6, 1)
