"""What verbs print on stdout: tables for people, JSON for machines."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from compressor.report.schema import Report
    from compressor.report.search import Sweep
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
        side: Literal["left", "right"] = "right" if index and figures else "left"
        table.add_column(title, justify=side, no_wrap=not sys.stdout.isatty(), overflow="fold")
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


def print_search(plan: dict[str, Any]) -> None:
    """What a sweep would search, and what is missing."""
    print_table(
        ("setting", "searched", "the recipe's own"),
        [
            (row["setting"], row["over"], "-" if row["own"] is None else str(row["own"]))
            for row in plan["searched"]
        ],
        figures=False,
    )
    first = "first, the recipe's own settings" if plan["own_first"] else "none has the recipe's own settings"
    sys.stdout.write(
        f"{plan['finished']} trials finished, {plan['missing']} to run ({first}); "
        f"training alone takes about {plan['seconds']:.0f} s a trial as the recipe stands\n"
    )


def print_sweep(found: "Sweep", folder: Path, as_json: bool) -> None:
    """The Pareto front by work; the trial that was chosen and the recipe's own are marked."""
    from compressor.report.front import mark, share, value

    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    print_table(
        ("trial", "work left", "margin", *(task.name for task in found.tasks), ""),
        [
            (
                str(point.number),
                f"{point.work:.1%}",
                share(point.margin),
                *(f"{point.scores[task.name]:.4g}" if task.name in point.scores else "-" for task in found.tasks),
                mark(found, point),
            )
            for point in found.front
        ],
        figures=False,
    )
    sys.stdout.write("\n")
    print_table(
        ("trial", *found.searched),
        [(str(point.number), *(value(point.settings[name]) for name in found.searched)) for point in found.front],
        figures=False,
    )
    sys.stdout.write("\n")
    for why in dict.fromkeys(failure.why for failure in found.failed):
        numbers = [str(failure.number) for failure in found.failed if failure.why == why]
        sys.stdout.write(f"trial{'s' * (len(numbers) > 1)} {', '.join(numbers)} failed: {why}\n")
    sys.stdout.write(f"{len(found.trials)} trials finished, {len(found.front)} on the front")
    if found.chosen is None:
        sys.stdout.write("; none keeps every task inside its budget.\n")
    else:
        sys.stdout.write(f"; the recipe of trial {found.chosen} is {folder / 'chosen.toml'}\n")
    sys.stdout.write(f"{folder / 'sweep.html'}\n")
