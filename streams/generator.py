"""A deterministic stream with a planted truth, written to a directory that every command can read.

The directory holds ``events.<format>``, ``users.csv``, ``items.csv``, ``truth.json`` (counts, and the best AUC
and log-loss that anything can reach on these events) and ``config.yaml``, which maps the files onto the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from streams.generation.events import EventStream
from streams.generation.files import (
    Columns,
    EventTable,
    item_columns,
    user_columns,
    whole_file,
    write_csv,
    write_events,
)
from streams.generation.settings import FileFormat, GeneratorError, GeneratorSettings
from streams.generation.truth import TruthCollector

TRUTH_FILE = "truth.json"
CONFIG_FILE = "config.yaml"
USERS_FILE = "users.csv"
ITEMS_FILE = "items.csv"


def write_dataset(
    directory: Path,
    settings: GeneratorSettings,
    *,
    file_format: FileFormat = "csv",
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda events: None,
) -> dict[str, object]:
    """Writes the stream and returns its truth; memory grows with users and items, not with events.

    ``on_progress`` is told how many events each step has written. Raises ``GeneratorError`` where the directory
    holds one of the files already and ``overwrite`` is not set.
    """
    directory.mkdir(parents=True, exist_ok=True)
    events_file = f"events.{file_format}"
    if not overwrite:
        _refuse_to_overwrite(directory, (events_file, USERS_FILE, ITEMS_FILE, TRUTH_FILE, CONFIG_FILE))
    stream = EventStream(settings)
    collector = TruthCollector(stream)
    table = EventTable(stream)

    def columns() -> Iterator[Columns]:
        for batch in collector.watch(stream.batches()):
            yield table.columns(batch)
            on_progress(len(batch))

    write_events(directory / events_file, file_format, columns())
    write_csv(directory / USERS_FILE, [user_columns(stream.users)])
    write_csv(directory / ITEMS_FILE, [item_columns(stream.items)])
    truth = collector.truth()
    with whole_file(directory / TRUTH_FILE) as out:
        out.write((json.dumps(truth, indent=2) + "\n").encode())
    with whole_file(directory / CONFIG_FILE) as out:
        out.write(
            yaml.safe_dump(dataset_config(directory.resolve(), file_format, settings.graded), sort_keys=False).encode()
        )
    return truth


def dataset_config(directory: Path, file_format: FileFormat, graded: bool) -> dict[str, object]:
    """The settings that read such a directory: absolute, so that a command may run anywhere."""
    events: dict[str, object] = {
        "user_id": {"field": "user_id"},
        "item_id": {"field": "item_id"},
        "label": {"field": "label"},
        "event_time": {"field": "event_time_ms", "unit": "ms"},
    }
    if graded:
        events["value"] = {"field": "value"}
    return {
        "extends": "demo",
        "data": {
            "format": "delimited" if file_format == "csv" else file_format,
            "paths": [str(directory / f"events.{file_format}")],
            "events": events,
            "users": {
                "path": str(directory / USERS_FILE),
                "format": "delimited",
                "id": {"field": "user_id"},
                "features": {"age": {"kind": "categorical"}, "country": {"kind": "categorical"}},
            },
            "items": {
                "path": str(directory / ITEMS_FILE),
                "format": "delimited",
                "id": {"field": "item_id"},
                "features": {
                    "category": {"kind": "categorical"},
                    "tags": {"kind": "multi", "separator": "|"},
                    "quality": {"kind": "numeric"},
                },
            },
        },
    }


def _refuse_to_overwrite(directory: Path, names: tuple[str, ...]) -> None:
    if there := [name for name in names if (directory / name).exists()]:
        raise GeneratorError(
            f"{directory} already holds {', '.join(there)}: name another directory, or overwrite them (--overwrite)"
        )
