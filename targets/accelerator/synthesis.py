"""What the circuit takes of a device, and how fast it is there: yosys' synthesis, nextpnr's placing and routing."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from amaranth.back import rtlil

from targets.accelerator import tools
from targets.accelerator.circuit.harness import Harness
from targets.accelerator.design import Design
from targets.errors import TargetError

TOP, NETLIST = "harness", "circuit.json"
SPEED = 6
"""The slowest grade, and the cheapest."""
SIZES = {"ecp5-25k": "25k", "ecp5-45k": "45k", "ecp5-85k": "85k"}
PACKAGE = "CABGA381"
AIM = 130.0
"""Megahertz that the router aims at: more than these circuits reach on that grade, so that it always tries."""
MINUTES = 40
"""After which a seed counts as one that does not route: most take ten, some never end."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Cells of an ECP5: 4-input look-up tables, flip-flops, 18x18 multipliers, block memories of 18 Kbit."""

    luts: int
    flip_flops: int
    multipliers: int
    memories: int


@dataclass(frozen=True, slots=True)
class Routed:
    """One run of nextpnr.

    Attributes:
        megahertz: the highest clock that it says the routed circuit has.
        used, there: of each kind of cell.
    """

    seed: int
    megahertz: float
    used: dict[str, int]
    there: dict[str, int]


def synthesise(design: Design, folder: Path) -> Resources:
    """Write `circuit.json`, the circuit behind four pins for an ECP5, into a folder.

    Raises:
        TargetError: yosys is missing or fails.
    """
    (folder / "circuit.il").write_text(_circuit(design))
    tools.yosys(["read_rtlil circuit.il", f"synth_ecp5 -nodsp -top {TOP} -json {NETLIST}"], folder)
    return _resources(folder / NETLIST)


def _circuit(design: Design) -> str:
    """The harness in yosys' language."""
    text = str(rtlil.convert(Harness(design, "ecp5"), name=TOP))
    text = re.sub(r"\n *attribute \\src [^\n]*", "", text)  # where it is from, which differs between checkouts
    # Amaranth asks that a row which is read while it is written is read as it was. Tokens keep that from happening.
    return re.sub(r"(parameter \\COLLISION_X_MASK) (\d+)'0+", lambda m: f"{m[1]} {m[2]}'{'1' * int(m[2])}", text)


def _resources(netlist: Path) -> Resources:
    cells = json.loads(netlist.read_text())["modules"][TOP]["cells"].values()
    kinds = [cell["type"] for cell in cells]
    luts = kinds.count("LUT4") + 2 * kinds.count("CCU2C")
    return Resources(luts, kinds.count("TRELLIS_FF"), kinds.count("MULT18X18D"), kinds.count("DP16KD"))


def route(folder: Path, device: str, speed: int, seed: int, options: Sequence[str] = ()) -> Routed:
    """Place and route what `synthesise` wrote; leaves the routed configuration `circuit-SEED.config`.

    Args:
        speed: grade of the device, 6 to 8.

    Raises:
        TargetError: nextpnr is missing, or the circuit cannot be placed or routed in `MINUTES`.
    """
    if device not in SIZES:
        raise TargetError(f"No ECP5 '{device}'; there are {', '.join(SIZES)}.")
    report = folder / f"route-{seed}.json"
    command = [
        tools.nextpnr(), f"--{SIZES[device]}", "--package", PACKAGE, "--speed", str(speed), "--json", NETLIST,
        "--textcfg", f"circuit-{seed}.config", "--report", report.name, "--seed", str(seed), "--freq", str(AIM),
        "--timing-allow-fail", "--quiet", *options,
    ]  # fmt: skip
    tools.run(command, folder, minutes=MINUTES)
    found = json.loads(report.read_text())
    cells = found["utilization"]
    return Routed(
        seed, min(clock["achieved"] for clock in found["fmax"].values()),
        {name: cell["used"] for name, cell in cells.items() if cell["used"]},
        {name: cell["available"] for name, cell in cells.items() if cell["used"]},
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fitted:
    """A design placed and routed from several seeds.

    Attributes:
        runs: in the order of their seeds; of one that did not route, nothing.
        failed: of each other seed, why not.
    """

    resources: Resources
    runs: tuple[Routed, ...]
    failed: dict[int, str]

    @property
    def best(self) -> Routed | None:
        return max(self.runs, key=lambda run: run.megahertz, default=None)


def fit(design: Design, device: str, seeds: Sequence[int], folder: Path) -> Fitted:
    """Synthesise, and place and route from each seed: minutes each, then cached. Leaves the best's `harness.config`.

    Raises:
        TargetError: the device is no ECP5, a tool is missing, or synthesis fails.
    """
    if device not in SIZES:
        raise TargetError(f"No ECP5 '{device}'; there are {', '.join(SIZES)}.")
    router = tools.run([tools.nextpnr(), "--version"], folder)
    circuit, runs, failed = _circuit(design), dict[int, tuple[Routed, str]](), dict[int, str]()

    def synthesised(into: Path) -> Path:
        synthesise(design, into)
        return into / NETLIST

    netlist = tools.built(NETLIST, (circuit,), synthesised)
    for seed in seeds:

        def routed(into: Path, seed: int = seed) -> Path:
            shutil.copy(netlist, into / NETLIST)
            found = route(into, device, SPEED, seed)
            made = into / "routed.json"
            made.write_text(json.dumps([asdict(found), (into / f"circuit-{seed}.config").read_text()]))
            return made

        key = (circuit, router, device, str(SPEED), str(seed), str(AIM))
        try:
            found, config = json.loads(tools.built("routed.json", key, routed).read_text())
        except TargetError as error:
            failed[seed] = str(error).splitlines()[-1]
        else:
            runs[seed] = Routed(**found), config
    fitted = Fitted(_resources(netlist), tuple(run for run, _ in runs.values()), failed)
    if fitted.best is not None:
        (folder / "harness.config").write_text(runs[fitted.best.seed][1])
    return fitted
