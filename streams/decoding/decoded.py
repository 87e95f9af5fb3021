"""What decoding a chunk gives: the events that are good, and each record that is not, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from learner.interactions import Interactions
from streams.kafka.chunk import Chunk
from streams.rejects import Problem, Reason

DECODE, REGISTRY, SCHEMA = "decode", "registry", "schema"
"""Stages at which a record is refused: its bytes are no record; its writer's schema cannot be had or used; a field is
missing or wrong."""
MESSAGE_CHARACTERS = 500
"""How much of a message is kept: enough to see the cause, and a hostile record cannot fill headers and logs with it."""
NO_EVENT_ID = np.uint64(0)
"""Stands for an event without an id of its own."""


class Refusal(NamedTuple):
    """Why one record is no event."""

    stage: str
    problem: Problem
    error: str
    """Class of the exception that said so; where none did, the reason in the same form"""

    @staticmethod
    def at(stage: str, problem: Problem, cause: Exception | None = None) -> Refusal:
        """The refusal for a problem, and for the exception behind it if there was one."""
        return Refusal(stage, problem, _in_camel_case(problem.reason) if cause is None else type(cause).__name__)


@dataclass(frozen=True, slots=True)
class Poison:
    """One record of a chunk that is no event."""

    index: int
    """Which record of the chunk"""
    stage: str
    """``DECODE``, ``REGISTRY`` or ``SCHEMA``"""
    reason: Reason
    error: str
    """Class of the exception that said so; where none did, the reason in the same form, such as ``MissingField``"""
    message: str
    """One line of at most MESSAGE_CHARACTERS"""

    @staticmethod
    def of(index: int, refusal: Refusal) -> Poison:
        """Record ``index`` as it was refused."""
        stage, problem, error = refusal
        return Poison(index, stage, problem.reason, error, _one_line(problem.detail))


@dataclass(frozen=True, slots=True)
class Decoded:
    """A chunk's events and its poison; together they are all of its records."""

    events: Interactions
    """The good ones in order, under the chunk's offsets; N of them."""
    poison: tuple[Poison, ...]
    """The others, in order."""
    event_id: NDArray[np.uint64] | None
    """(N,) hash of the event's own id, ``NO_EVENT_ID`` where it has none; None: data.events.event_id is not mapped"""


class Decoder(Protocol):
    """Reads chunks of one format under one schema. It reuses its memory: not for several threads at once."""

    def decode(self, chunk: Chunk) -> Decoded:
        """Never raises for what is in a record.

        Raises:
            RegistryUnavailable: a schema is needed that cannot be fetched now; the same chunk may be tried again.
        """
        ...


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"


def _in_camel_case(reason: Reason) -> str:
    return "".join(part.capitalize() for part in reason.name.split("_"))
