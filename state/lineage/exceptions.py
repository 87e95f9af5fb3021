"""Errors of the lineage.

ColdstreamError
└── LineageError           versions cannot be used as asked
    ├── LineageLocked      another process writes to it
    ├── LineageDamaged     a record or a tensor does not verify: it is not what was written
    ├── UnknownVersion     there is no such version
    ├── TensorsPruned      the version's record is there, its tensors were removed
    └── WrongStep          a version, or a decision, that cannot follow what the lineage holds
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class LineageError(ColdstreamError):
    """Versions cannot be used as asked. The message names the directory, or the version, and the next action."""


class LineageLocked(LineageError):
    """Another process writes to it."""


class LineageDamaged(LineageError):
    """Something in it is not what was written, or is not signed with the key."""


class UnknownVersion(LineageError):
    """There is no such version."""


class TensorsPruned(LineageError):
    """The version's tensors were removed to save space."""


class WrongStep(LineageError):
    """What is asked for cannot follow what the lineage holds. Nothing was written."""
