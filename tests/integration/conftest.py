"""The command as a user types it, a small generated stream and a model trained on its offline part."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from streams.cli import main

SMALL = (
    "--set learner.dim=4 --set learner.item_dim=8 --set training.epochs=2 --set training.users_per_batch=4 "
    "--set protocol.bootstrap_samples=20"
)
"""A model that learns in a fraction of a second."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Coldstream = Callable[[str], Outcome]


def coldstream(line: str) -> Outcome:
    """Runs ``coldstream <line>`` through the program's own entry point; exceptions it does not catch come through."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["coldstream", *shlex.split(line)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", name="coldstream")
def _coldstream() -> Coldstream:
    return coldstream


@pytest.fixture(scope="session")
def small() -> str:
    return SMALL


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with events.csv, the catalogues, config.yaml and truth.json: 4,000 events of 120 users."""
    directory = tmp_path_factory.mktemp("generated")
    outcome = coldstream(f"generate --out {directory} --users 120 --items 60 --events 4000 --overwrite")
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture(scope="session")
def model(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model trained on the offline part of ``generated``."""
    directory = tmp_path_factory.mktemp("trained") / "model"
    outcome = coldstream(f"train --config {generated}/config.yaml {SMALL} --out {directory}")
    assert outcome.code == 0, outcome.err
    return directory
