"""Vowpal Wabbit on the same events and protocol: test, then train, over the offline events and then the stream.

    python -m benchmarks.peers --config ml-1m --data DIRECTORY [--args="-q ug -l 0.5 -b 22"] [--json]

Namespaces of an example: ``u`` the user's id, ``i`` the item's id, ``g`` the item's features, ``f`` the user's
features. Vowpal Wabbit goes on learning about every user on the stream, as our learner does; its predictions are
its own progressive ones. The speed is that of its driver reading text, parsing included, over all events.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.loading import load_settings
from learner.features import Catalogue
from learner.interactions import Interactions
from learner.metrics import evaluate, event_index
from learner.serving import raw_features
from streams.protocol import offline_events, online_batches, split_users
from streams.sources import load_catalogues, open_source, time_ordered

DEFAULT_ARGUMENTS = "-q ug -l 0.5 -b 22"
"""The best of eleven settings by their AUC on ML-1M's own stream, which flatters the peer. Fewer bits collide."""

_SPECIAL = str.maketrans({" ": "_", ":": "_", "|": "_", "\n": "_", "\t": "_", "\r": "_"})
"""Characters that end a feature's name in Vowpal Wabbit's text format."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What a peer predicted for the online events, and how long it took over all events."""

    probability: NDArray[np.float64]
    """(N,) online events in order"""
    seconds: float
    events: int


def run_vowpal_wabbit(
    offline: Interactions, online: Interactions, users: Catalogue, items: Catalogue, arguments: str = DEFAULT_ARGUMENTS
) -> PeerRun:
    """One pass of Vowpal Wabbit over offline and online events, logistic loss, progressive predictions.

    Raises RuntimeError when it does not predict every event.
    """
    from vowpalwabbit import Workspace

    total = len(offline) + len(online)
    with tempfile.TemporaryDirectory() as folder:
        data, predictions = Path(folder, "events.txt"), Path(folder, "predictions.txt")
        with data.open("w", encoding="utf-8") as file:
            for part in (offline, online):
                file.writelines(examples(part, users, items))
        command = ["--loss_function", "logistic", "--link", "logistic", "--quiet", *arguments.split()]
        began = time.perf_counter()
        Workspace(arg_list=[*command, "-d", str(data), "-p", str(predictions)]).finish()
        seconds = time.perf_counter() - began
        probability = np.loadtxt(predictions, dtype=np.float64, ndmin=1)
    if len(probability) != total:
        raise RuntimeError(f"Vowpal Wabbit predicted {len(probability)} of {total} events; check --args={arguments!r}")
    return PeerRun(np.clip(probability[len(offline) :], 0, 1), seconds, total)


def examples(events: Interactions, users: Catalogue, items: Catalogue) -> Iterable[str]:
    """A line of Vowpal Wabbit's text format for each event in order."""
    who = _namespaces("u", "f", events.user_ids, users, events.user_features)
    what = _namespaces("i", "g", events.item_ids, items, events.item_features)
    for user, item, label in zip(events.user.tolist(), events.item.tolist(), events.label.tolist(), strict=True):
        yield f"{1 if label else -1} {who[user]} {what[item]}\n"


def _namespaces(
    of_id: str,
    of_features: str,
    ids: Sequence[str],
    catalogue: Catalogue,
    carried: dict[str, tuple[str | None, ...]],
) -> list[str]:
    lines = []
    for entity, row in zip(ids, raw_features(catalogue.fields, catalogue, ids, range(len(ids)), carried), strict=True):
        names = []
        for spec, text in zip(catalogue.fields, row or (), strict=False):
            if text and spec.kind == "numeric":
                names.append(f"{spec.name}:{float(text)}")
            elif text:
                texts = text.split(spec.separator) if spec.kind == "multi" else [text]
                names += [f"{spec.name}={t}".translate(_SPECIAL) for t in texts if t]
        lines.append(f"|{of_id} {entity.translate(_SPECIAL)} |{of_features} {' '.join(names)}")
    return lines


def main() -> None:
    """Runs the peer and prints its figures."""
    parser = argparse.ArgumentParser(description="Vowpal Wabbit on the backtest's events")
    parser.add_argument("--config", default="ml-1m", help="a profile or a YAML file")
    parser.add_argument("--data", type=Path, help="file or directory of events; default: the config's data.paths")
    parser.add_argument("--args", default=DEFAULT_ARGUMENTS, help="Vowpal Wabbit's arguments")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    settings = load_settings(options.config, {"data.paths": [str(options.data)]} if options.data else {})
    users, items = load_catalogues(settings.data)
    with tempfile.TemporaryDirectory() as spool, time_ordered(open_source(settings.data), Path(spool)) as ordered:
        split = split_users(ordered, settings.protocol.offline_fraction)
        offline, online = offline_events(ordered, split), Interactions.concatenate(online_batches(ordered, split))
    run = run_vowpal_wabbit(offline, online, users, items, options.args)
    metrics = evaluate(online.label, run.probability, online.user, event_index(online.user))
    result = {
        "peer": "vowpalwabbit", "arguments": options.args, "online_events": len(online),
        "events_per_second": run.events / run.seconds, **metrics.as_dict(),
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
    else:
        low, high = metrics.ci95["auc"]
        print(f"Vowpal Wabbit {options.args}: {len(online):,} online events")
        print(
            f"AUC {metrics.auc:.4f} [{low:.4f}, {high:.4f}]  GAUC {metrics.gauc:.4f}  log-loss {metrics.log_loss:.4f}"
        )
        print(f"{run.events / run.seconds:,.0f} events/s over all {run.events:,} events, text parsing included")


if __name__ == "__main__":
    main()
