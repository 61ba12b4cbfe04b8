"""The command line: `compress VERB`. Results go to stdout (`--json` for machines), everything else to stderr.

Exit codes: 0 done, 1 something the user can fix, 2 usage, 3 built but a task is outside its budget.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compressor.pipeline import Job

app = typer.Typer(
    help="Compress a trained multi-task network inside each task's accuracy budget, and compile every task's pathway.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe (TOML), or a folder that holds recipe.toml.")]
ArtifactPath = Annotated[Path, typer.Argument(help="An artifact's folder, such as DIR/artifacts/NAME.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's value; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]

OUTSIDE_BUDGET = 3


@app.command()
def run(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("runs/latest"),
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Take finished stages from the run's folder.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost; write nothing.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compress, compile, verify and measure, as a recipe says; write artifacts and a report."""
    from compressor import pipeline

    job = _job(recipe, overrides)
    if dry_run:
        plan = pipeline.dry_run(job, out)
        _print(plan, as_json, _plan_lines(plan))
        return
    report = pipeline.run(job, out, shlex.join(["compress", *sys.argv[1:]]), resume)
    lines = [_task_line(task) for task in report.tasks]
    lines += [_artifact_line(row) for row in report.artifacts]
    lines.append(f"report: {out / 'report.html'}")
    _print(report.model_dump(mode="json", by_alias=True), as_json, lines)
    if any(task.within_budget is False for task in report.tasks):
        raise typer.Exit(OUTSIDE_BUDGET)


@app.command()
def inspect(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show a network's tasks: what each needs, what it shares, what is its own."""
    from rich.console import Console
    from rich.table import Table

    from compressor.inspection import inspect as inspected

    job = _job(recipe, overrides)
    rows = inspected(job.model, job.task_sets)
    if as_json:
        _print(
            [
                {"tasks": r.tasks, "macs": r.macs, "parameters": r.parameters, "shared": r.shared, "private": r.private}
                for r in rows
            ],
            True,
            [],
        )
        return
    table = Table("task set", "MACs", "parameters", "shared", "private")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        figures = (row.parameters, row.shared, row.private)
        table.add_row(" + ".join(row.tasks), f"{row.macs / 1e6:,.1f} M", *(f"{n:,}" for n in figures))
    Console().print(table)


@app.command()
def verify(
    artifact: ArtifactPath,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Compare on this recipe's validation inputs, not on random ones.")
    ] = None,
    overrides: Overrides = None,
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs.")] = 4,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check an artifact against its manifest, then its answers against ONNX Runtime's."""
    from compressor.checks import verify_artifact

    given = None
    if recipe is not None:
        from compressor.deploy import real_inputs

        job = _job(recipe, overrides)
        given = [tuple(t.numpy() for t in x) for x in real_inputs(job.model, job.bench, inputs)]
    compared = verify_artifact(artifact, inputs, given)
    rows = [{"task": c.task, "max_abs_error": c.max_abs_error, "tolerance": c.tolerance} for c in compared]
    _print(
        rows,
        as_json,
        [f"{c.task}: within {c.max_abs_error:.1e} of ONNX Runtime (tolerance {c.tolerance:.1e})" for c in compared],
    )


@app.command()
def bench(
    artifact: ArtifactPath,
    threads: Annotated[int, typer.Option(min=1, help="Threads of an inference.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Longest sampling.")] = 10.0,
    samples: Annotated[int, typer.Option(min=10, help="Samples wanted.")] = 662,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure an artifact's latency beside its own graph in ONNX Runtime, taking turns."""
    from compressor.checks import bench_artifact

    found = bench_artifact(artifact, threads, seconds, samples)
    _print(
        found,
        as_json,
        [
            f"{name}: p50 {row['p50']:.3f} ms, "
            + ", ".join(
                f"{p} {row[p]:.3f} ms" if row[p] is not None else f"{p} not supported by n = {row['n']}"
                for p in ("p90", "p95", "p99")
            )
            for name, row in found["engines"].items()
        ]
        + [f"artifact / ONNX Runtime: {found['ratio']:.2f} (under 1 is faster)"],
    )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Draw report.html anew from report.json, and print the verdict."""
    from compressor.report import read, write

    found = read(run_folder)
    write(found, run_folder)
    lines = [_task_line(task) for task in found.tasks] + [_artifact_line(row) for row in found.artifacts]
    _print(found.model_dump(mode="json", by_alias=True), as_json, [*lines, f"report: {run_folder / 'report.html'}"])


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the targets."""
    from targets.registry import TARGETS

    _print(list(TARGETS), as_json, list(TARGETS))


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the device profiles."""
    from profiles.device import load, names

    found = [load(name) for name in names()]
    width = max(len(d.name) for d in found)
    _print(
        [d.model_dump(mode="json") for d in found],
        as_json,
        [f"{d.name:{width}}  {d.kind:4}  {d.description}" for d in found],
    )


def main() -> None:
    """The entry point: errors the user can fix become one message and exit code 1."""
    from compressor.errors import CompressError
    from profiles.errors import ProfileError
    from targets.errors import TargetError

    try:
        app()
    except (CompressError, TargetError, ProfileError) as error:
        if any(flag in sys.argv for flag in ("-v", "--verbose")):
            raise
        sys.stderr.write(f"compress: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("compress: stopped; run the same command again to go on from the last finished stage.\n")
        sys.exit(130)


def _job(path: Path, overrides: Sequence[str] | None) -> "Job":
    from compressor import pipeline, recipe
    from compressor.progress import Reporter

    loaded, base = recipe.load(path, tuple(overrides or ()))
    return pipeline.prepare(loaded, base, Reporter())


def _print(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n" if as_json else "".join(f"{line}\n" for line in lines))


def _task_line(task: Any) -> str:
    if task.before is None or task.after is None:
        return f"{task.name}: not scored"
    told = f"{task.name}: {task.metric} {task.before:.4g} -> {task.after:.4g}"
    if task.margin is None:
        return told
    return told + (
        f", inside its budget of {task.budget_text}"
        if task.within_budget
        else f", OUTSIDE its budget of {task.budget_text} by {-task.margin:.4g}"
    )


def _artifact_line(row: Any) -> str:
    told = f"{row.name} ({row.device}): {row.macs / 1e6:.1f} M MACs, {row.parameters:,} parameters"
    if row.latency_ms is None:
        return told + ", not measured"
    told += f", {row.latency_ms.p50:.2f} ms at {row.threads} thread{'s' * (row.threads > 1)}"
    return told + (
        f", {1 / row.ratio_to_dense.value:.1f}x faster than {row.ratio_to_dense.baseline}" if row.ratio_to_dense else ""
    )


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"{plan['name']}: {plan['macs'] / 1e6:.1f} M MACs, {plan['parameters']:,} parameters, "
        f"{plan['target']} target, device {plan['device']}"
    ]
    for index, stage in enumerate(plan["stages"], 1):
        cost = "done before" if stage["done"] else f"about {stage['seconds']:.0f} s of training"
        lines.append(f"stage {index} {stage['kind']}: {stage['train_steps']} training steps, {cost}")
    lines.append(f"artifacts: {', '.join(plan['artifacts'])}")
    lines.append(f"measuring: at most {plan['measure_seconds']:.0f} s")
    return lines


if __name__ == "__main__":
    main()
