"""What was built, and how far each rung of verification is from the eager answers."""

from compressor.report.blocks import Block, Cell, Section, Table
from compressor.report.numbers import change, count, listed, number, percent, seconds, size
from compressor.report.schema import ArtifactResult, Report, Verified

HEAD = (
    "Artifact",
    "Tasks",
    "Target",
    "Device",
    "Multiply-adds",
    "vs original",
    "Parameters",
    "vs original",
    "Files",
    "Compiled in",
    "Folder",
    "SHA-256",
)

FOLDED_ROWS = 16  # a longer table of checks opens on a click


def section(report: Report) -> Section | None:
    """None when nothing was built."""
    if not report.artifacts:
        return None
    once = {artifact.name: artifact for artifact in report.artifacts}
    rows = tuple(_row(artifact, report) for artifact in once.values())
    blocks: list[Block] = [Table(HEAD, "llllrrrrrrll", rows)]
    checks = tuple(row for artifact in report.artifacts for row in _rungs(artifact))
    if checks:
        head = ("Artifact", "Rung", "Tasks", "Furthest", "Largest difference", "Tolerance", "of tolerance", "Verdict")
        distinct = tuple(dict.fromkeys(checks))
        caption = (
            "Verified against the eager network's answers on the same inputs; per rung the task nearest its tolerance"
        )
        blocks.append(Table(head, "llrlrrrl", distinct, caption, folded=len(distinct) > FOLDED_ROWS))
    blocks += [_kernels(artifact) for artifact in once.values() if any(not one.cycles for one in artifact.kernels)]
    return Section("Artifacts", tuple(blocks))


def _kernels(artifact: ArtifactResult) -> Table:
    rows = tuple(
        (one.layer, one.kernel, count(one.macs), percent(one.density), one.instead or "no choice")
        for one in artifact.kernels
        if not one.cycles
    )
    caption = f"Kernels of '{artifact.name}': what each layer got, and how long its other form would have taken"
    return Table(("Layer", "Kernel", "Multiply-adds", "Density", "Instead"), "llrrl", rows, caption, folded=True)


def _row(artifact: ArtifactResult, report: Report) -> tuple[str, ...]:
    return (
        artifact.name,
        listed(artifact.tasks),
        artifact.target,
        artifact.device,
        count(artifact.macs),
        change(report.original.macs, artifact.macs),
        count(artifact.parameters),
        change(report.original.parameters, artifact.parameters),
        size(artifact.bytes),
        seconds(artifact.compile_s),
        artifact.directory,
        artifact.sha256[:12],
    )


def _rungs(artifact: ArtifactResult) -> list[tuple[str | Cell, ...]]:
    """One row a rung, in the order verified."""
    rows: list[tuple[str | Cell, ...]] = []
    for rung in dict.fromkeys(check.rung for check in artifact.verified):
        checks = [check for check in artifact.verified if check.rung == rung]
        worst = max(checks, key=_share)
        holds = worst.max_abs_error <= worst.tolerance
        rows.append(
            (
                artifact.name,
                rung,
                str(len({check.task for check in checks})),
                worst.task,
                number(worst.max_abs_error, 2),
                number(worst.tolerance, 2),
                percent(_share(worst)) if worst.tolerance else "exact",
                Cell("holds", "good") if holds else Cell("differs", "bad"),
            )
        )
    return rows


def _share(check: Verified) -> float:
    """Difference over tolerance; with none to spare, any difference is the worst."""
    if check.tolerance:
        return check.max_abs_error / check.tolerance
    return 0.0 if check.max_abs_error == 0 else float("inf")
