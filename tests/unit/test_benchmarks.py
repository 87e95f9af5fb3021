"""Benchmarks run, and say what they measured, on inputs of a moment; no time is asserted."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import kernel, quality, sources, stream_run, training
from benchmarks.__main__ import run_all
from benchmarks.child import in_child
from benchmarks.clock import clocked
from benchmarks.command import Options, Skipped, options_of, parser
from benchmarks.report import Figure, table, write_json
from benchmarks.synthetic import uniform_users, write_csv, write_jsonl, zipf_users
from configs.settings import DataSettings, Settings
from learner.interactions import Interactions
from streams.sources import open_source


def small(tmp_path, **learner):
    path = tmp_path / "events.csv"
    write_csv(path, uniform_users(600, 40), items=20)
    return Settings.model_validate(
        {
            "data": {"paths": [path]},
            "learner": {"dim": 4, "item_dim": 4, "second_filter": False, **learner},
            "training": {"epochs": 2, "threads": 1},
            "protocol": {"bootstrap_samples": 0},
        }
    )


def names(figures):
    return [(figure.case, figure.name) for figure in figures]


def test_kernel_measures_each_head_without_and_with_the_second_filter():
    figures = list(kernel.run(Options(scale=1e-3)))
    assert [figure.case for figure in figures] == [
        "full", "full, second filter", "diagonal", "diagonal, second filter", "gradient", "gradient, second filter",
    ]  # fmt: skip
    assert {(figure.name, figure.unit, figure.target) for figure in figures} == {("speed", "events/s", None)}


def test_kernel_is_held_to_its_target_at_full_scale_only():
    (figure,) = kernel.run(Options(case="full, second"))
    assert (figure.case, figure.target) == ("full, second filter", None)
    assert Options().target(3e6) == 3e6
    assert Options(scale=0.5).target(3e6) is None


def test_a_stream_run_covers_every_event_and_user_and_its_stages_add_up(tmp_path):
    settings = stream_run.generated(tmp_path / "events.csv", second=False)
    write_csv(tmp_path / "events.csv", uniform_users(500, 40))
    model = stream_run.train(settings, tmp_path / "model")
    run = stream_run.stream(settings, model, tmp_path / "state")
    assert (run.events, run.users) == (500, 40)
    assert sum(run.stages.values()) == pytest.approx(run.seconds)
    assert [figure.name.strip() for figure in stream_run.figures("case", run, peak=1)] == [
        "speed", "CPU time", "CPU time, main thread", "wait for decoding", "read rows", "kernel", "write rows", "close",
        "the rest", "users", "disk", "peak memory",
    ]  # fmt: skip


def test_clocks_leave_the_measured_calls_as_they_were():
    before = [getattr(owner, name) for owner, name in stream_run.STAGES]
    with clocked(stream_run.STAGES, dict.fromkeys(stream_run.STAGES.values(), 0.0)):
        assert [getattr(owner, name) for owner, name in stream_run.STAGES] != before
    assert [getattr(owner, name) for owner, name in stream_run.STAGES] == before


def test_training_reports_its_seconds_and_what_it_learned_from(tmp_path):
    figures = list(training.measure(small(tmp_path), "small", 60.0))
    assert names(figures) == [
        ("small", "offline stage"), ("small", "an epoch"), ("small", "reading and ordering"),
        ("small", "offline events"), ("small", "last epoch's log-loss"),
    ]  # fmt: skip
    assert (figures[0].target, figures[0].at_most) == (60.0, True)


def test_quality_reports_the_mean_over_seeds_beside_the_target(tmp_path):
    results = [quality.backtest(small(tmp_path), baselines=False) for _ in range(2)]
    row = quality.Row("small", "default", "none", {"AUC": 0.5, "log-loss": 0.7})
    figures = {figure.name: figure for figure in quality.figures(row, results)}
    assert list(figures) == ["AUC", "GAUC", "log-loss", "calibration error"]
    assert figures["AUC"].runs == (results[0].metrics.auc, results[1].metrics.auc)
    assert (figures["AUC"].target, figures["AUC"].at_most) == (0.5, False)
    assert (figures["log-loss"].target, figures["log-loss"].at_most) == (0.7, True)
    assert all(figure.target is None for figure in quality.figures(row, results, held_to_targets=False))


def test_every_quality_row_names_a_profile_that_exists(tmp_path):
    for name in ("ml-1m", "ml-100k"):
        (tmp_path / name).mkdir()
    options = Options(data=tmp_path, seeds=(0,))
    fractions = {row.case: quality.settings_of(options, row, 3) for row in quality.ROWS}
    assert {settings.training.seed for settings in fractions.values()} == {3}
    tenth = fractions["ml-1m, a tenth of the users offline"].protocol
    assert (tenth.offline_fraction, tenth.score_last) == (0.1, 0.3)


def test_sources_decodes_both_formats_and_orders_a_shuffled_file():
    figures = list(sources.run(Options(scale=1e-4)))
    assert names(figures) == [
        ("100 events, csv", "decoding"), ("100 events, jsonl", "decoding"),
        ("1,000 shuffled CSV lines", "ordering"), ("1,000 shuffled CSV lines", "reading back"),
        ("1,000 shuffled CSV lines", "peak memory"),
    ]  # fmt: skip


def test_generated_formats_hold_the_same_events(tmp_path):
    users = uniform_users(300, 50)
    write_csv(tmp_path / "a.csv", users)
    write_jsonl(tmp_path / "a.jsonl", users)
    one, two = (
        Interactions.concatenate(open_source(DataSettings(paths=(tmp_path / name,))).batches())
        for name in ("a.csv", "a.jsonl")
    )
    assert one.user_ids == two.user_ids
    assert one.item_ids == two.item_ids
    for column in ("user", "item", "label", "event_time_ms"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))


def test_shuffled_times_are_a_permutation_a_second_apart(tmp_path):
    write_csv(tmp_path / "a.csv", uniform_users(100, 5), shuffled=True)
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        times = [int(row["event_time_ms"]) for row in csv.DictReader(file)]
    assert times != sorted(times)
    assert np.diff(sorted(times)).tolist() == [1000] * 99


def test_zipf_draws_the_most_frequent_user_as_often_as_the_law_says():
    users, exponent, events = 50, 1.1, 200_000
    share = np.sort(np.bincount(zipf_users(events, users, exponent), minlength=users))[::-1] / events
    law = np.arange(1, users + 1) ** -exponent
    np.testing.assert_allclose(share[:3], (law / law.sum())[:3], atol=0.005)


def test_a_child_is_another_process_with_a_peak_of_its_own():
    result, peak = in_child(os.getpid)
    assert result != os.getpid()
    assert peak > 0


def test_without_data_a_benchmark_says_what_is_missing(tmp_path):
    with pytest.raises(Skipped, match="needs ml-1m: give --data DIRECTORY, or set COLDSTREAM_DATA"):
        list(training.run(Options()))
    with pytest.raises(Skipped, match="ml-1m is not a directory"):
        list(training.run(Options(data=tmp_path)))
    with pytest.raises(Skipped, match="needs ml-1m: give --data DIRECTORY"):
        list(quality.run(Options()))


def test_running_all_skips_what_lacks_data_and_shows_the_rest():
    console = Console(record=True, width=120, file=io.StringIO())
    results = run_all(["training", "kernel"], Options(scale=1e-3, case="gradient"), console)
    assert list(results) == ["training", "kernel"]
    assert results["training"] == []
    assert names(results["kernel"]) == [("gradient", "speed"), ("gradient, second filter", "speed")]


def test_a_figure_is_met_on_the_right_side_of_its_target():
    assert Figure("c", "speed", (3.0, 5.0), target=4.0).met is True
    assert Figure("c", "speed", (3.0, 4.0), target=4.0).met is False
    assert Figure("c", "loss", (0.5,), target=0.5, at_most=True).met is True
    assert Figure("c", "loss", (0.6,), target=0.5, at_most=True).met is False
    assert Figure("c", "loss", (0.6,)).met is None


def test_table_and_file_show_measured_beside_target(tmp_path):
    figures = [Figure("case", "speed", (2e6,), "events/s", 3e6), Figure("case", "loss", (0.5,), "", 0.6, True)]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table("title", figures))
    speed, loss = (line.split() for line in console.export_text().splitlines() if "speed" in line or "loss" in line)
    assert speed == ["case", "speed", "2,000,000", "events/s", "≥", "3,000,000", "MISSED"]
    assert loss == ["loss", "0.5000", "≤", "0.6000", "met"]
    write_json(tmp_path / "out" / "figures.json", {"name": figures}, scale=1.0)
    written = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))
    assert written["benchmarks"]["name"][0] == {
        "case": "case", "name": "speed", "value": 2e6, "runs": [2e6], "unit": "events/s", "target": 3e6,
        "at_most": False, "met": False,
    }  # fmt: skip
    assert set(written) == {"machine", "versions", "scale", "benchmarks"}


def test_the_command_line_reads_every_option():
    arguments = parser("x").parse_args(["--data", "d", "--scale", "0.5", "--seeds", "0,1,2", "--case", "ML"])
    options = options_of(arguments, print)
    assert (options.data, options.scale, options.seeds) == (Path("d"), 0.5, (0, 1, 2))
    assert options.wants("ml-1m")
    assert options.scaled(8) == 4
