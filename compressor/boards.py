"""From an artifact for an fpga to a folder for its board."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.checks import random_inputs
from targets import artifact as artifacts
from targets.accelerator import package, tools
from targets.base import Array, Artifact
from targets.errors import TargetError


def write_board(artifact: Path, out: Path, inputs: tuple[Array, ...] | None, seeds: int) -> dict[str, Any]:
    """Write the folder whole or not at all; place and route from so many seeds, and what that found.

    Args:
        inputs: of the frame that the testbench replays; random ones without them.

    Raises:
        TargetError: the artifact is damaged or for no fpga, `out` is taken, a tool is missing, or no seed routes.
    """
    built = artifacts.read(artifact)
    if built.manifest.target != "fpga":
        raise TargetError(f"'{artifact}' was built for '{built.manifest.device.name}', which is no fpga.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"'{out}' exists and is not empty, so it is left alone. Choose another folder.")
    tools.require_amaranth()
    if seeds:
        tools.nextpnr()
    from targets.accelerator import board

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        draft = Path(place) / out.name
        board.write(built, inputs or random_inputs(built, 0), draft)
        told = _fitted(built, seeds, draft) if seeds else {}
        if out.exists():
            out.rmdir()
        draft.rename(out)
    return told


def _fitted(built: Artifact, seeds: int, folder: Path) -> dict[str, Any]:
    """What placing and routing found, as `synthesis.json` has it."""
    from targets.accelerator import synthesis

    device, design = built.manifest.device, package.read(built.directory).design
    found = synthesis.fit(design, device.name, range(1, seeds + 1), folder)
    if found.best is None:
        raise TargetError(f"The circuit does not route on '{device.name}': {'; '.join(found.failed.values())}")
    told = {
        "device": device.name, "design": design.model_dump(), "asked_megahertz": synthesis.AIM,
        "resources": asdict(found.resources), "runs": [asdict(run) for run in found.runs],
        "failed": {str(seed): why for seed, why in found.failed.items()},
    }  # fmt: skip
    (folder / "synthesis.json").write_text(json.dumps(told, indent=1) + "\n")
    return told
