"""What several tests share: hypothesis profiles and the browser."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

# Tests are repeatable: the same examples in every run, and no deadline that a busy machine could miss.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, print_blob=True)
hypothesis.settings.register_profile("soak", max_examples=5_000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

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
