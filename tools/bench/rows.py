"""What every benchmark here prints and writes: rows of {case, network, peer, threads, value, goal, holds}."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `goal` is a bound: `most` says whether it is the largest or the smallest value that holds.

    A figure without a goal is for the record; whether it holds is then None.
    """

    case: str
    network: str
    peer: str
    threads: int
    value: float
    goal: float | None
    most: bool

    @property
    def holds(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark; one may add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="less sampling, the same figures")
    return parser


def finish(rows: list[Row], to: Path | None) -> None:
    """Print a table, and write the rows as JSON; whatever holds, the caller exits 0."""
    width = max((len(row.case) for row in rows), default=0)
    for row in rows:
        bound = "" if row.goal is None else f"{'<=' if row.most else '>='} {row.goal:g}"
        verdict = {True: "holds", False: "FALLS SHORT", None: "no goal"}[row.holds]
        where = f"{row.network:14} {row.peer:13} {row.threads or '-':>2}"
        print(f"{row.case:{width}}  {where}  {row.value:10.4g}  {bound:10}  {verdict}")
    if to is not None:
        facts = [{k: v for k, v in asdict(row).items() if k != "most"} | {"holds": row.holds} for row in rows]
        to.write_text(json.dumps(facts, indent=1))
