"""What a campaign against live workers stands on: topics of its own, a small model, and settings in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.settings import LearnerSettings, TrainingSettings
from learner.artifact import Artifact, write_artifact
from tests.kafka_broker import create_topic, delete_topics, free_topic
from tests.models import small_model

SESSION_TIMEOUT_MS = 6_000
"""The least that Kafka's brokers accept as they come"""
DIM = 5


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a campaign is played."""

    directory: Path
    bootstrap: str
    topic: str
    partitions: int

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def changelog(self) -> str:
        return f"{self.topic}-state"

    @property
    def predictions(self) -> str:
        return f"{self.topic}-predictions"

    @property
    def dead_letters(self) -> str:
        return f"{self.topic}-dead-letters"


@contextmanager
def staged(
    directory: Path,
    bootstrap: str,
    partitions: int,
    *,
    sections: dict[str, Any] | None = None,
    **topic_settings: object,
) -> Iterator[Stage]:
    """A stage, and its topics gone afterwards. ``sections`` are settings beside those that a stage decides."""
    stage = Stage(directory, bootstrap, free_topic("faults"), partitions)
    directory.mkdir(parents=True, exist_ok=True)
    write_small_model(stage.model)
    stage.config.write_text(yaml.safe_dump(_merged(_settings(stage), sections or {})), encoding="utf-8")
    create_topic(bootstrap, stage.topic, partitions, **topic_settings)
    try:
        yield stage
    finally:
        delete_topics(bootstrap, stage.topic, stage.changelog, stage.predictions, stage.dead_letters)


def write_small_model(directory: Path) -> None:
    """A model with random constants: faults have nothing to do with how good it is."""
    model = small_model("full", graded=False, dim=DIM)
    assert model.second is not None
    learner = LearnerSettings(head="full", dim=DIM, second_dim=model.second.dim, item_dim=6)
    write_artifact(directory, Artifact(model.fixed, model.first, model.second, learner, TrainingSettings()))


def _settings(stage: Stage) -> dict[str, Any]:
    return {
        "kafka": {"bootstrap": stage.bootstrap.split(","), "session_timeout_ms": SESSION_TIMEOUT_MS},
        "stream": {
            "topic": stage.topic,
            "group": stage.topic,
            "topics": {
                "changelog": stage.changelog,
                "predictions": stage.predictions,
                "dead_letters": stage.dead_letters,
            },
        },
        # Small commits and fetches, so that there is much to interrupt.
        "state": {
            "ring": 4, "commit_events": 500, "hot_rows_mb": 8, "block_cache_mb": 8, "write_buffers_mb": 16,
        },
        "worker": {"fetch_kb": 64, "commit_ms": 200, "shutdown_s": 20},
    }  # fmt: skip


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in more.items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged
