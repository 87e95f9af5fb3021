"""What can be asked of the generator, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from configs.exceptions import ColdstreamError

Drift = Literal["none", "gradual", "abrupt"]
FileFormat = Literal["csv", "jsonl", "parquet"]

LEAST_PRESENT_USERS = 5
"""Users present at any moment, at least: with fewer, a moment could come at which nobody can act."""

MOST_ZIPF = 4
"""Beyond it one user has nearly all the events."""

DEFAULT_DRIFT_AT = 0.7
"""Inside the part of the stream that the evaluation protocol plays online, which begins near 0.6."""


class GeneratorError(ColdstreamError):
    """A stream cannot be generated as asked."""


@dataclass(frozen=True, slots=True)
class GeneratorSettings:
    """A stream, named by its numbers: the same settings give the same bytes.

    Times are shares of the stream's span, 0 at its start and 1 at its end.
    """

    users: int = 2_000
    items: int = 1_000
    events: int = 200_000
    zipf: float = 0.8
    """Exponent s of the users' activity, rank^-s; 0 makes all equally active."""
    lifetime: float = 0.35
    """How long a user stays after arriving, as a share of the span."""
    drift: Drift = "none"
    drift_at: float | None = None
    """When tastes change at once (``abrupt``) or begin to (``gradual``, until the span ends); None is 0.7."""
    label_noise: float = 0.0
    """Share of labels that are flipped."""
    graded: bool = False
    """Whether events carry a value from 1 to 5 beside the label, which is 1 from 4 on."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ``GeneratorError`` that names the option, its value and what is allowed."""
        _require(self.items >= 1, "items", self.items, "at least 1")
        _require(self.events >= 1, "events", self.events, "at least 1")
        _require(0 <= self.zipf <= MOST_ZIPF, "zipf", self.zipf, f"from 0 (uniform) to {MOST_ZIPF}")
        _require(0 < self.lifetime <= 1, "lifetime", self.lifetime, "a share of the span, above 0 and at most 1")
        _require(0 <= self.drift_start <= 1, "drift-at", self.drift_at, "a share of the span, from 0 to 1")
        _require(0 <= self.label_noise <= 0.5, "label-noise", self.label_noise, "from 0 to 0.5 (labels by the coin)")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.drift in get_args(Drift), "drift", self.drift, ", ".join(get_args(Drift)))
        drifts = self.drift != "none"
        _require(drifts or self.drift_at is None, "drift-at", self.drift_at, "left out unless --drift is given")
        enough = LEAST_PRESENT_USERS * (1 + self.lifetime) / self.lifetime
        _require(self.users >= enough, "users", self.users, f"at least {enough:.0f} for a lifetime of {self.lifetime}")

    @property
    def drift_start(self) -> float:
        """When drift begins, as a share of the span; without drift it means nothing."""
        return DEFAULT_DRIFT_AT if self.drift_at is None else self.drift_at

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def _require(holds: bool, option: str, given: object, allowed: str) -> None:
    if not holds:
        raise GeneratorError(f"--{option} is {given}: it has to be {allowed}")
