"""The query benchmark asks what it says it asks, on inputs of a moment; no time is asserted."""

from __future__ import annotations

from benchmarks import query
from benchmarks.__main__ import BENCHMARKS
from benchmarks.command import Options
from state.query import StateReader

OPTIONS = Options(scale=0.01)


def names(figures):
    return [figure.name for figure in figures]


def test_the_asked_user_has_a_full_ring_that_is_replayed(tmp_path):
    query.prepare(tmp_path, 50).close()
    with StateReader(tmp_path) as reader:
        report = reader.query(query.ASKED, items=query.ASKED_ITEMS)
    assert (report.events, report.explanation.replayed_from) == (32, "the start")
    assert [score.known for score in report.scores] == [True] * 20


def test_cold_and_warm_runs_are_measured_and_held_to_their_targets_at_full_scale(tmp_path):
    query.prepare(tmp_path, 50).close()
    figures = [*query.cold("case", tmp_path, OPTIONS), *query.warm("case", tmp_path, OPTIONS)]
    assert names(figures) == [
        "Python, numpy, RocksDB, typer", "cold", "cold, scores of 20 items", "cold, best 10 of the catalogue",
        "warm, row and scores of 20 items", "warm, explained too", "warm, best 10 of the catalogue",
    ]  # fmt: skip
    assert all(figure.value > 0 and figure.unit == "ms" and figure.target is None for figure in figures)
    assert BENCHMARKS["query"] is query.run


def test_beside_a_writer_the_log_is_what_was_written(tmp_path):
    figures = list(query.beside_a_writer("case", tmp_path, OPTIONS))
    assert names(figures) == [
        "log to replay", "cold", "opening a follower", "catching up with 50 rows", "catching up with nothing",
        "warm, row and scores of 20 items",
    ]  # fmt: skip
    assert figures[0].value * 1e6 > 500 * 1104
