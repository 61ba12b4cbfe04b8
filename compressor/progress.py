"""What a person sees while work goes on: a bar with the time left on a terminal, plain lines elsewhere; on stderr."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Reporter:
    """Lines and bars on stderr; where that is no terminal, a line about what is under way every `every_s` seconds."""

    def __init__(self, every_s: float = 15.0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.every_s = every_s

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        """Yield the items, showing how far and how long."""
        return self._bar(items, title, total) if self.console.is_terminal else self._lines(items, title, total)

    def _bar(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield from bar.track(items, total=total, description=title)

    def _lines(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        begun = last = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - last >= self.every_s:
                left = (now - begun) / done * (total - done)
                self.line(f"  {title}: {done}/{total}, about {left:.0f} s left")
                last = now
            yield item


class Silent(Reporter):
    """Says nothing."""

    def line(self, text: str) -> None:
        del text

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        del title, total
        yield from items
