"""What verbs print on stdout: tables for people, JSON for machines."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.report.schema import Report
    from compressor.sweep import Sweep
    from compressor.tuning import Tuned


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, figures: bool = True) -> None:
    """Aligned columns, all but the first to the right if they hold figures; never cut where nobody's window is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index and figures else "left", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def print_report(report: "Report", folder: Path, as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json", by_alias=True))
        return
    print_table(
        ("task", "metric", "before", "after", "budget", "left of it", "verdict"),
        [
            (
                task.name,
                task.metric,
                *("-" if score is None else f"{score:.4g}" for score in (task.before, task.after)),
                task.budget_text or "-",
                "-" if task.margin is None else f"{task.margin:.4g}",
                {True: "inside", False: "OUTSIDE", None: "-"}[task.within_budget],
            )
            for task in report.tasks
        ],
    )
    if report.artifacts:
        sys.stdout.write("\n")
        print_table(
            ("artifact", "device", "MACs", "parameters", "threads", "p50 ms", "dense / this"),
            [
                (
                    row.name,
                    row.device,
                    f"{row.macs / 1e6:,.1f} M",
                    f"{row.parameters:,}",
                    str(row.threads) if row.latency_ms else "-",
                    f"{row.latency_ms.p50:.3f}" if row.latency_ms else "not measured",
                    f"{1 / row.ratio_to_dense.value:.1f}x" if row.ratio_to_dense else "-",
                )
                for row in report.artifacts
            ],
        )
    for warning in report.warnings:
        sys.stdout.write(f"\n{warning}")
    sys.stdout.write(f"\n{folder / 'report.html'}\n")


def print_plan(plan: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{plan['name']}: {plan['macs'] / 1e6:.1f} M MACs, {plan['parameters']:,} parameters; "
        f"{plan['target']} target, device {plan['device']}\n"
        f"budgets: {', '.join(f'{task} {budget}' for task, budget in plan['budgets'].items()) or 'none'}\n"
    )
    print_table(
        ("stage", "kind", "training steps", "about"),
        [
            (
                str(index),
                stage["kind"],
                str(stage["train_steps"]),
                "done before" if stage["done"] else f"{stage['seconds']:.0f} s",
            )
            for index, stage in enumerate(plan["stages"], 1)
        ],
    )
    sys.stdout.write(f"artifacts: {', '.join(plan['artifacts'])}\nmeasuring: at most {plan['measure_seconds']:g} s\n")


def print_profile(found: dict[str, Any]) -> None:
    """Every kernel call that takes time, longest share or not, in order; then how the parts add up."""
    wall = found["wall_ms"]
    print_table(
        ("kernel", "ms", "share", "layout", "density", "GFLOP/s", "of what is possible", "instead"),
        [
            (
                row["kernel"],
                f"{row['ms']:.3f}",
                f"{row['ms'] / wall:.1%}",
                row["layout"],
                f"{row['density']:.0%}" if row["layer"] else "-",
                f"{row['gflops']:.0f}" if row["gflops"] else "-",
                f"{row['of_roofline']:.0%}" if row["gflops"] else "-",
                row["instead"],
            )
            for row in found["calls"]
        ],
    )
    sys.stdout.write(
        f"kernels {found['kernels_ms']:.3f} ms + runtime {found['between_ms']:.3f} ms = {found['sum_ms']:.3f} ms; "
        f"a whole inference {wall:.3f} ms (sum / whole {found['sum_ms'] / wall:.2f})\n"
        f"possible here with {found['threads']} thread{'s' * (found['threads'] > 1)}: "
        f"{found['peak_gflops']:.0f} GFLOP/s, {found['peak_gbytes']:.1f} GB/s\n"
    )


def print_tuned(tuned: "Sequence[Tuned]") -> None:
    """Layers whose kernel changed, and by how much."""
    changed = [row for row in tuned if row.after != row.before]
    print_table(
        ("layer", "untuned", "ms", "tuned", "ms"),
        [
            (
                row.layer,
                row.before,
                "-" if row.before_s is None else f"{row.before_s * 1e3:.3f}",
                row.after,
                f"{row.after_s * 1e3:.3f}",
            )
            for row in changed
        ],
    )
    sys.stdout.write(f"{len(tuned)} layers measured, {len(changed)} with another kernel than untuned\n")


def print_sweep(found: "Sweep", folder: Path) -> None:
    """The Pareto front by work; the point that was chosen is marked."""
    front = [point for point in found.trials if point.front]
    print_table(
        ("trial", "work left", "least of a budget", "", "settings"),
        [
            (
                str(point.number),
                f"{point.work:.1%}",
                f"{point.margin:+.0%}",
                "chosen" if point.number == found.chosen else "",
                ", ".join(f"{key}={value}" for key, value in point.settings.items()),
            )
            for point in front
        ],
        figures=False,
    )
    for number, why in found.failed.items():
        sys.stdout.write(f"trial {number} failed: {why}\n")
    done = f"{len(found.trials)} trials finished, {len(front)} on the front"
    if found.chosen is None:
        sys.stdout.write(f"{done}; none keeps every task inside its budget.\n")
    else:
        sys.stdout.write(f"{done}; the recipe of trial {found.chosen} is {folder / 'chosen.toml'}\n")
