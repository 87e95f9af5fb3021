"""Progress bars on stderr: on a terminal only, so that logs and pipes stay clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from learner.meta_training import EpochReport
from streams.replay import RunProgress


@contextmanager
def shown_progress() -> Iterator[RunProgress]:
    """Hooks for a run that show its stages: bars on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("starting", total=None)

        def stage(words: str) -> None:
            bars.reset(task, description=words, total=None)

        def epoch(report: EpochReport) -> None:
            bars.update(
                task,
                completed=report.epoch,
                total=report.epochs,
                description=f"offline stage, log-loss {report.log_loss:.4f}",
            )

        def streamed(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield RunProgress(stage, epoch, streamed)
