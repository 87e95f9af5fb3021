"""Errors of a worker.

ColdstreamError
└── WorkerError     it cannot start, or cannot go on
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class WorkerError(ColdstreamError):
    """A worker cannot start, or cannot go on: the message says what to do."""
