"""The versions of the shared parameters of one model, and where each came from. Which file owns what:

what is said    ``record`` (a version's record, its decisions, the bytes of a line), ``history`` (what follows what)
the disk        ``journal`` (``lineage.jsonl``, its chain, its lock), ``tensors`` (one file a version, its hashes)
all together    ``lineage`` (adding, deciding, rolling back, pruning), ``difference`` (how far apart two versions are)
what goes wrong ``exceptions``
"""

from state.lineage.exceptions import (
    LineageDamaged,
    LineageError,
    LineageLocked,
    TensorsPruned,
    UnknownVersion,
    WrongStep,
)
from state.lineage.history import Version
from state.lineage.lineage import Lineage
from state.lineage.record import Decision, Record, Span
from state.lineage.tensors import Parameters, serving_sha256

__all__ = [
    "Decision",
    "Lineage",
    "LineageDamaged",
    "LineageError",
    "LineageLocked",
    "Parameters",
    "Record",
    "Span",
    "TensorsPruned",
    "UnknownVersion",
    "Version",
    "WrongStep",
    "serving_sha256",
]
