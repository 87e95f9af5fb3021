"""What several tests share: options, hypothesis profiles, the figures of campaigns, and the browser."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests.kafka_broker import kafka_bootstrap

__all__ = ["kafka_bootstrap"]

# Tests are repeatable: the same examples in every run, and no time to make or try one that a busy machine could miss.
_BUSY = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=_BUSY, print_blob=True
)
hypothesis.settings.register_profile(
    "soak", max_examples=5_000, deadline=None, suppress_health_check=_BUSY, print_blob=True
)
hypothesis.settings.load_profile("repeatable")

CAMPAIGN = pytest.StashKey[list[str]]()
"""What campaigns of faults found, one line each, for the end of the run"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign", choices=("short", "soak"), default="short", help="how many faults tests/faults injects"
    )
    parser.addoption(
        "--write-golden", action="store_true", help="write the golden files of today's versions anew, then test them"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CAMPAIGN] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[CAMPAIGN]:
        terminalreporter.section("campaigns")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long campaign."""
    return bool(request.config.getoption("--campaign") == "soak")


@pytest.fixture
def seed(soak: bool) -> int:
    """Of a campaign's faults: always the same in the short one; tests report it."""
    return time.time_ns() % 1_000_000 if soak else 1


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line of figures that is shown at the end of the run."""
    return request.config.stash[CAMPAIGN].append


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser's executable. Without one a test is skipped, and in CI it fails."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return Path(found)
    message = f"no browser on PATH (looked for {', '.join(BROWSERS)}): run `make browser`, or install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
