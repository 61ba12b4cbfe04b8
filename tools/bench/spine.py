"""The spine's promises: `compress run` on the embedded and on foreign networks, read off the reports it writes.

    python tools/bench/spine.py [--json FILE] [--quick]

Scenes and DroNet are compressed as their recipes say, with three seeds (--quick: one); MTCNN O-Net and age/gender are
cut, compiled and verified. Networks whose inputs are absent (../shared/inputs) are left out with a word. Speed-ups are
medians of paired ratios.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Row, finish, options

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ROOT.parent / "shared" / "inputs"


def compress(*words: str) -> tuple[float, int]:
    """Run the command line; (seconds, exit code)."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *words], cwd=ROOT, check=False, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begun, done.returncode


def report_of(recipe: str, folder: Path, *words: str) -> tuple[dict[str, Any], float]:
    seconds, code = compress("run", recipe, "--out", str(folder), *words)
    if code not in (0, 3):
        raise SystemExit(f"compress run {recipe} failed with exit code {code}.")
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found, seconds


def lost(task: dict[str, Any]) -> float:
    """Drop in the metric's unit."""
    return float(task["budget"] - task["margin"])


def scenes(folder: Path, seed: int, quick: bool) -> list[Row]:
    """What one seed's run took, lost and saved; latencies from seed 0 alone."""
    seconds = ["--set", "measure.seconds=5"] if quick else []
    report, took = report_of("examples/scenes/recipe.toml", folder, "--set", f"seed={seed}", *seconds)
    last, original, name = report["stages"][-1], report["original"], f"scenes, seed {seed}"
    rows = [
        Row("compress run, seconds", name, "", 2, took, 300, most=True),
        Row("MACs left", name, "original", 0, last["macs"] / original["macs"], 0.4, most=True),
        Row("parameters left", name, "original", 0, last["parameters"] / original["parameters"], 0.4, most=True),
    ]
    rows += [
        Row(f"relative drop of {t['name']}", name, "original", 0, lost(t) / t["before"], 0.03, most=True)
        for t in report["tasks"]
    ]
    if seed != 0:
        return rows
    single = [a for a in report["artifacts"] if len(a["tasks"]) == 1]
    for threads in sorted({a["threads"] for a in single}):
        for a in (a for a in single if a["threads"] == threads):
            if threads == 1:
                whole = a["macs"] / last["macs"]
                rows.append(Row(f"MACs of {a['name']}", name, "pruned whole", 0, whole, 0.7, most=True))
            faster = 1 / a["ratio_to_dense"]["value"]
            rows.append(Row(f"{a['name']} times faster", name, "ORT, dense", threads, faster, 2.0, most=False))
    return rows


def dronet(folder: Path, seed: int) -> list[Row]:
    words = ["--set", f"seed={seed}", "--set", "measure.seconds=5"]
    report, _ = report_of("examples/dronet/recipe.toml", folder, *words)
    last, original = report["stages"][-1], report["original"]
    tasks = {t["name"]: t for t in report["tasks"]}
    steering, collision = tasks["steering"], tasks["collision"]
    left, name = last["parameters"] / original["parameters"], f"dronet, seed {seed}"
    return [
        Row("parameters left", name, "original", 0, left, 0.4, most=True),
        Row("relative drop of steering", name, "original", 0, lost(steering) / steering["before"], 0.05, most=True),
        Row("drop of collision", name, "original", 0, lost(collision), 0.01, most=True),
    ]


def foreign(name: str, folder: Path) -> list[Row]:
    """Every task's pathway cut, compiled, and within tolerance on every rung; the worst error over its tolerance."""
    report, _ = report_of(f"tests/workloads/{name}.toml", folder, "--set", "measure.seconds=2")
    checks = [check for artifact in report["artifacts"] for check in artifact["verified"]]
    worst = max(check["max_abs_error"] / check["tolerance"] for check in checks)
    rungs = len({check["rung"] for check in checks})
    return [
        Row("error / tolerance, all rungs", name, "eager", 1, worst, 1.0, most=True),
        Row("rungs verified", name, "", 1, rungs, 5, most=False),
    ]


def help_seconds() -> Row:
    compress("--help")
    return Row("compress --help, seconds", "-", "", 1, min(compress("--help")[0] for _ in range(5)), 0.5, most=True)


def main() -> None:
    given = options(__doc__).parse_args()
    rows = [help_seconds()]
    with tempfile.TemporaryDirectory() as folder:
        seeds = (0,) if given.quick else (0, 1, 2)
        for seed in seeds:
            rows += scenes(Path(folder) / f"scenes-{seed}", seed, given.quick)
        if INPUTS.is_dir():
            for seed in seeds:
                rows += dronet(Path(folder) / f"dronet-{seed}", seed)
            rows += foreign("onet", Path(folder) / "onet") + foreign("age_gender", Path(folder) / "age_gender")
        else:
            print(f"DroNet, O-Net and age/gender are left out: {INPUTS} is not there.", file=sys.stderr)
    finish(rows, given.json)


if __name__ == "__main__":
    main()
