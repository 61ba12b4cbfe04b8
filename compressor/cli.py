"""The command line: `compress VERB`. Results go to stdout (`--json` for machines), everything else to stderr.

Exit codes: 0 done, 1 something the user can fix, 2 usage, 3 built, but a task is outside its budget or a stage ended
short of its goal, or no trial of a sweep is inside the budgets.
"""

import functools
import inspect as inspection
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.console import (
    print_json,
    print_line,
    print_plan,
    print_profile,
    print_report,
    print_search,
    print_sweep,
    print_table,
    print_tuned,
)
from compressor.errors import CompressError
from profiles.errors import ProfileError
from targets.errors import TargetError

if TYPE_CHECKING:
    from compressor.pipeline import Job
    from targets.base import Array

OUTSIDE_BUDGET = 3
INTERRUPTED = 130


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


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks and warnings.")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a verb with `-v`; without it an error is one message, and third parties' warnings are mute."""

    @functools.wraps(function)
    def quietly(*, verbose: bool, **options: Any) -> None:
        if verbose:
            function(**options)
            return
        warnings.simplefilter("ignore")
        try:
            function(**options)
        except (CompressError, TargetError, ProfileError) as error:
            typer.echo(f"compress: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("compress: stopped; the same command goes on from its last checkpoint.", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            typer.echo(f"compress: {type(error).__name__}: {error} (-v shows where)", err=True)
            raise typer.Exit(1) from error

    known = inspection.signature(function)
    option = inspection.Parameter("verbose", inspection.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
    quietly.__signature__ = known.replace(parameters=[*known.parameters.values(), option])  # type: ignore[attr-defined]
    quietly.__annotations__ = {**function.__annotations__, "verbose": Verbose}
    return app.command()(quietly)


@verb
def run(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("runs/latest"),
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Take finished stages from the run's folder.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress, compile, verify and measure, as a recipe says; write artifacts and a report."""
    from compressor import compute, pipeline

    job = _job(recipe, overrides)
    if dry_run:
        plan = pipeline.dry_run(job, out)
        if compute.rank():
            return
        if as_json:
            print_json(plan)
        else:
            print_plan(plan)
        return
    report = pipeline.run(job, out, shlex.join(["compress", *sys.argv[1:]]), resume)
    if report is None:  # another process has it
        return
    print_report(report, out, as_json)
    if any(task.within_budget is False for task in report.tasks) or any(stage.short for stage in report.stages):
        raise typer.Exit(OUTSIDE_BUDGET)


@verb
def inspect(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show a network's tasks: what each needs, what it shares, what is its own."""
    from compressor.groups import Prunable
    from compressor.inspection import inspect as inspected

    job = _job(recipe, overrides, builds=False)
    rows = inspected(job.model, job.task_sets)
    if as_json:
        names = ("tasks", "macs", "parameters", "shared", "private")
        print_json([{name: getattr(row, name) for name in names} for row in rows])
        return
    print_table(
        ("task set", "MACs", "parameters", "shared", "private"),
        [
            (" + ".join(r.tasks), f"{r.macs / 1e6:,.1f} M", f"{r.parameters:,}", f"{r.shared:,}", f"{r.private:,}")
            for r in rows
        ],
    )
    for why in Prunable.of(job.model).held():
        print_line(f"prune leaves whole, {why}")


@verb
def verify(
    artifact: ArtifactPath,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Compare on this recipe's validation inputs, not on random ones.")
    ] = None,
    overrides: Overrides = None,
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Check an artifact against its manifest, then its answers against ONNX Runtime's."""
    from compressor.checks import verify_artifact

    given = None if recipe is None else _inputs(recipe, overrides, inputs)
    compared = verify_artifact(artifact, inputs, given)
    if as_json:
        print_json([{"task": c.task, "max_abs_error": c.max_abs_error, "tolerance": c.tolerance} for c in compared])
        return
    print_table(
        ("task", "differs from ONNX Runtime by", "tolerance"),
        [(c.task, f"{c.max_abs_error:.1e}", f"{c.tolerance:.1e}") for c in compared],
    )


@verb
def bench(
    artifact: ArtifactPath,
    threads: Annotated[int, typer.Option(min=1, help="Threads of an inference.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Longest sampling.")] = 10.0,
    samples: Annotated[int, typer.Option(min=10, help="Samples wanted.")] = 662,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, kernel by kernel.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure an artifact's latency beside its own graph in ONNX Runtime, taking turns."""
    from compressor.checks import bench_artifact, is_simulated, profile_accelerated, profile_artifact

    if profile and is_simulated(artifact):
        rows = profile_accelerated(artifact)
        if as_json:
            print_json(rows)
        else:
            shown = [(row["layer"], row["kernel"], f"{row['ms']:.4f}", row["how"]) for row in rows]
            print_table(("layer", "kernel", "ms", "how"), shown)
        return
    if profile:
        profiled = profile_artifact(artifact, threads, seconds)
        if as_json:
            print_json(profiled)
        else:
            print_profile(profiled)
        return
    found = bench_artifact(artifact, threads, seconds, samples)
    if as_json:
        print_json(found)
        return
    percentiles = ("p50", "p90", "p95", "p99")
    print_table(
        ("engine", *(f"{p} ms" for p in percentiles), "samples"),
        [
            (name, *("-" if row[p] is None else f"{row[p]:.3f}" for p in percentiles), str(row["n"]))
            for name, row in found["engines"].items()
        ],
    )
    if found["ratio"] is None:
        sys.stdout.write(f"{found['engines']['artifact']['basis']}; not measured\n")
    else:
        sys.stdout.write(f"artifact / ONNX Runtime: {found['ratio']:.2f} (under 1 is faster)\n")


@verb
def build(
    artifact: ArtifactPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a new one.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Record this recipe's first validation input, not a random one.")
    ] = None,
    overrides: Overrides = None,
    synth: Annotated[bool, typer.Option("--synth", help="Place and route it, too (ECP5; minutes a seed).")] = False,
    seeds: Annotated[int, typer.Option(min=1, max=8, help="Seeds to place from; the best is kept.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Write what a board needs of an artifact for an fpga: Verilog, memory, a recorded frame, a driver in C."""
    from compressor.boards import write_board

    given = None if recipe is None else _inputs(recipe, overrides, 1)[0]
    told = write_board(artifact, out, given, seeds if synth else 0)
    if as_json:
        print_json(told)
    elif synth:
        rows = [(str(run["seed"]), f"{run['megahertz']:.1f}") for run in told["runs"]]
        print_table(("seed", "MHz"), rows + [(seed, why) for seed, why in told["failed"].items()])
        print_line(", ".join(f"{count:,} {what}" for what, count in told["resources"].items()))


@verb
def tune(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT|RECIPE", help="An artifact's folder, or a recipe.")],
    seconds: Annotated[
        float, typer.Option("--budget-seconds", min=0, help="Longest time to spend on timing kernels.")
    ] = 300.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder, for a recipe.")] = Path("runs/latest"),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time the kernels each layer could use on this machine, and build again with the fastest.

    An artifact is replaced; a recipe is run, and its records file keeps the times for every later run.
    """
    from dataclasses import asdict

    from compressor.progress import Reporter

    if (path / "manifest.json").exists():
        from compressor.tuning import tune_artifact

        tuned = tune_artifact(path, seconds, Reporter())
    else:
        from compressor import pipeline

        tuned, _ = pipeline.tune(_job(path, overrides), out, shlex.join(["compress", *sys.argv[1:]]), seconds)
    if as_json:
        print_json([asdict(row) for row in tuned])
        return
    print_tuned(tuned)


@verb
def sweep(
    recipe: RecipePath,
    trials: Annotated[int, typer.Option(min=1, help="Finished trials wanted; earlier ones count.")] = 20,
    out: Annotated[Path, typer.Option("--out", "-o", help="The sweep's folder.")] = Path("runs/sweep"),
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials side by side, each in a process of its own.")] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Run them on the Ray cluster there, such as 'auto'.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be searched; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's \\[sweep] settings for the least work inside the budgets; goes on where it was stopped."""
    from compressor import sweep as sweeps
    from compressor.progress import Reporter

    path = recipe / "recipe.toml" if recipe.is_dir() else recipe
    if dry_run:
        plan = sweeps.plan(path, overrides or [], out, trials)
        if as_json:
            print_json(plan)
        else:
            print_search(plan)
        return
    command = shlex.join(["compress", *sys.argv[1:]])
    found = sweeps.sweep(path, overrides or [], out, trials, workers, Reporter(), ray=ray, command=command)
    print_sweep(found, out, as_json)
    if found.chosen is None:
        raise typer.Exit(OUTSIDE_BUDGET)


@verb
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN|SWEEP", help="A run's or a sweep's folder.")],
    as_json: AsJson = False,
) -> None:
    """Draw the HTML anew from report.json or sweep.json, and print the verdict."""
    from compressor.report import front, read, write
    from compressor.report.page import replace_together

    if (run_folder / front.JSON).exists():
        swept = front.read(run_folder)
        replace_together(front.texts(swept), run_folder)
        print_sweep(swept, run_folder, as_json)
        return
    found = read(run_folder)
    write(found, run_folder)
    print_report(found, run_folder, as_json)


@verb
def targets(as_json: AsJson = False) -> None:
    """List the targets."""
    from targets.registry import TARGETS

    if as_json:
        print_json(list(TARGETS))
    else:
        sys.stdout.write("".join(f"{name}\n" for name in TARGETS))


@verb
def devices(as_json: AsJson = False) -> None:
    """List the device profiles."""
    from profiles.device import load, names

    found = [load(name) for name in names()]
    if as_json:
        print_json([device.model_dump(mode="json") for device in found])
    else:
        print_table(("device", "kind", ""), [(d.name, d.kind, d.description) for d in found], figures=False)


def main() -> None:
    """The entry point."""
    app(prog_name="compress")


def _inputs(recipe: Path, overrides: list[str] | None, count: int) -> "list[tuple[Array, ...]]":
    """A recipe's validation inputs."""
    from compressor.deploy import real_inputs

    job = _job(recipe, overrides, builds=False)
    return [tuple(t.numpy() for t in x) for x in real_inputs(job.model, job.bench, count)]


def _job(path: Path, overrides: Sequence[str] | None, *, builds: bool = True) -> "Job":
    from compressor import compute, pipeline, recipe
    from compressor.progress import Reporter, Silent

    loaded, base = recipe.load(path, tuple(overrides or ()))
    return pipeline.prepare(loaded, base, Silent() if compute.rank() else Reporter(), builds=builds)


if __name__ == "__main__":
    main()
