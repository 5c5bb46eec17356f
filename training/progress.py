"""Progress bars with a rate and an ETA, on stderr, silent unless asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[float], None]


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"- {self.unit}/s")


@contextmanager
def progress_bar(
    title: str, total: int, unit: str, *, shown: bool, done: int = 0, shares: Advance = lambda _: None
) -> Iterator[Advance]:
    """Give a function that advances the bar by n `unit`s; `done` of `total` were finished by an earlier run. `shares`
    is told the same as shares of the whole, whether the bar is shown or not."""
    shares(done / max(1, total))
    if not shown:
        yield lambda count: shares(count / max(1, total))
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(count: float) -> None:
            bar.advance(task, count)
            shares(count / max(1, total))

        yield advance
