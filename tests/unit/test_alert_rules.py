"""deploy/prometheus/alerts.yaml asks for metrics that exist, says what to do, and fires when it should, not else."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from typer.main import get_command

from configs.settings import Settings
from learner.gate import FROZEN, FROZEN_PATIENCES
from state.lineage.record import Kind as Decided
from streams.cli import app
from streams.live.metrics import Outcome, Stage, WorkerMetrics
from streams.rejects import Reason

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml"
OF_META_UPDATES = {
    "coldstream_meta_version": set(),
    "coldstream_meta_rounds_total": set(),
    "coldstream_meta_decisions_total": {"decision"},
    "coldstream_meta_ladder_rung": set(),
    "coldstream_meta_refused_gradients_total": {"reason"},
    "coldstream_forgetting_log_loss": {"cohort"},
    "coldstream_forgetting_rise": {"cohort"},
    "coldstream_drift_alarms_total": {"detector"},
}
"""Names and labels that rules and metrics have agreed on"""
OF_PROMETHEUS = {"job", "instance"}
"""Labels that every sample has once it was scraped"""
MINUTES = {"m": 1, "h": 60}
METRIC = re.compile(r"\bcoldstream_\w+")


def groups() -> list[dict[str, Any]]:
    return yaml.safe_load(RULES.read_text())["groups"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


each_rule = pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])


def minutes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([mh])", text)
    assert found, f"{text}: minutes or hours"
    return int(found[1]) * MINUTES[found[2]]


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Samples that a worker can tell, with their labels."""
    worker = WorkerMetrics("1", "m")
    worker.owns(0)
    worker.follows(1, 5)
    worker.lag(0, 1, 1)
    worker.restore(0, 1, 2)
    worker.state(0, 1, 1)
    worker.pending_commits(0, 1)
    worker.poison(0, False)
    worker.took(Stage.ADAPT, 0.1)
    worker.retried(Stage.ADAPT)
    worker.dead_letters(Reason.WRONG_TYPE, 1)
    worker.durable(np.zeros(1, np.int64))
    families = text_string_to_metric_families(generate_latest(worker.registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples} | OF_META_UPDATES


def texts(rule: dict[str, Any]) -> str:
    return " ".join(rule["annotations"].values())


# --- what every rule has


def test_names_are_given_once() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 20
    assert len({group["name"] for group in groups()}) == len(groups())


@each_rule
def test_a_rule_says_how_bad_it_is_for_how_long_what_and_what_to_do(rule) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Coldstream([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert len(rule["annotations"]["summary"]) <= 120
    assert len(rule["annotations"]["description"]) > len(rule["annotations"]["summary"])


@each_rule
def test_times_are_sane(rule) -> None:
    """A window of less than 5 minutes may hold one scrape and tell no rate; after a blink nobody is woken up."""
    windows = [minutes(text) for text in re.findall(r"\[([^\]]*)\]", rule["expr"])]
    assert all(5 <= window <= 60 for window in windows)
    waits = minutes(rule["for"])
    assert waits <= 60
    assert waits or windows or rule["labels"]["severity"] == "critical"


# --- what they ask for is there


@each_rule
def test_metrics_and_labels_exist(rule, metrics) -> None:
    asked = set(METRIC.findall(rule["expr"]))
    assert asked
    assert asked <= metrics.keys()
    labels = OF_PROMETHEUS.union(*(metrics[name] for name in asked))
    for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"]):
        assert set(grouping.split(", ")) <= labels | {"le"}
    for name, label, value in re.findall(r'(coldstream_\w+)\{(\w+)="([^"]*)"\}', rule["expr"]):
        assert label in metrics[name]
        assert value in {"outcome": {*Outcome}, "decision": {*get_args(Decided)}}[label]


@each_rule
def test_texts_name_metrics_that_exist_and_labels_that_the_alert_still_has(rule, metrics) -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics}
    assert set(METRIC.findall(texts(rule))) <= families
    left = OF_PROMETHEUS.union(*(metrics[name] for name in METRIC.findall(rule["expr"])))
    for grouping in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
        left &= set(grouping.split(", "))
    assert set(re.findall(r"\$labels\.(\w+)", texts(rule))) <= left


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, default) of all settings below."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.default
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def test_settings_that_texts_name_exist_and_have_the_defaults_that_they_say() -> None:
    defaults = dict(keys(Settings))
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", RULES.read_text()))
    assert named <= defaults.keys()
    said = re.findall(r"`([\w.]+)` (?:is |\()([\d.]+) unless set", " ".join(map(texts, rules())))
    assert {name: float(value) for name, value in said} == {
        "worker.ready_lag": defaults["worker.ready_lag"],
        "meta.every_events": defaults["meta.every_events"],
        "meta.gate.limit": defaults["meta.gate.limit"],
    }


def test_commands_that_texts_name_exist() -> None:
    named = set(re.findall(r"`coldstream ([a-z -]+)`", " ".join(map(texts, rules()))))
    assert {"meta show", "dead-letters list"} < named
    for words in map(str.split, named):
        group: Any = get_command(app)
        for word in words:
            assert word in group.commands, f"coldstream {' '.join(words)}"
            group = group.commands[word]


def test_the_ladder_is_frozen_where_the_gate_says_so() -> None:
    frozen = next(rule for rule in rules() if rule["alert"] == "ColdstreamMetaFrozen")
    assert frozen["expr"].endswith(f" >= {FROZEN}")
    assert (FROZEN_PATIENCES, "eight times `meta.gate.patience`" in texts(frozen)) == (8, True)
    for rule in rules():
        assert {*re.findall(r"coldstream_meta_ladder_rung\) (?:>=|<) (\d+)", rule["expr"])} <= {str(FROZEN)}
        assert {*re.findall(r"rung {{ \$value }} of (\d+)", texts(rule))} <= {str(FROZEN)}


# --- when they fire: promtool runs the rules over made-up samples of 90 minutes, one a minute

AT = '{job="c", instance="a"'
HEALTHY = {
    f"coldstream_build_info{AT}}}": "1+0x90",
    f'coldstream_partition_owned{AT}, partition="0"}}': "1+0x90",
    f'coldstream_partition_owned{AT}, partition="1"}}': "0+0x90",
    f'coldstream_lag_events{AT}, partition="0"}}': "5+0x90",
    f'coldstream_events_total{AT}, outcome="applied"}}': "0+6000x90",
    f'coldstream_events_total{AT}, outcome="dead_letter"}}': "0+1x90",
    f'coldstream_events_total{AT}, outcome="guarded"}}': "0+0x90",
    f'coldstream_durable_seconds_bucket{AT}, le="0.25"}}': "0+5990x90",
    f'coldstream_durable_seconds_bucket{AT}, le="1.0"}}': "0+6000x90",
    f'coldstream_durable_seconds_bucket{AT}, le="2.5"}}': "0+6000x90",
    f'coldstream_durable_seconds_bucket{AT}, le="+Inf"}}': "0+6000x90",
    f"coldstream_loop_delay_max_seconds{AT}}}": "0.02+0x90",
    f"coldstream_rebalances_total{AT}}}": "3+0x90",
    f"coldstream_fenced_total{AT}}}": "0+0x90",
    f"coldstream_gap_events_total{AT}}}": "0+0x90",
    f'coldstream_poison_red{AT}, partition="0"}}': "0+0x90",
    f'coldstream_retries_total{AT}, stage="publish"}}': "2+0x90",
    f'coldstream_changelog_pending_commits{AT}, partition="0"}}': "1+0x90",
    f'coldstream_state_events{AT}, partition="0"}}': "0+6000x90",
    f'coldstream_restore_share{AT}, partition="0"}}': "1+0x90",
    f'coldstream_restore_records{AT}, partition="0"}}': "50+0x90",
    f'coldstream_standby_lag_records{AT}, partition="1"}}': "3+0x90",
    f"coldstream_meta_version{AT}}}": "7+0x90",
    'coldstream_meta_version{job="c", instance="b"}': "8+0x90",
    f"coldstream_meta_rounds_total{AT}}}": "0+1x90",
    f'coldstream_meta_decisions_total{AT}, decision="promoted"}}': "0+1x90",
    f'coldstream_meta_decisions_total{AT}, decision="rejected"}}': "1+0x90",
    f"coldstream_meta_ladder_rung{AT}}}": "0+0x90",
    f'coldstream_meta_refused_gradients_total{AT}, reason="not finite"}}': "0+0x90",
    f'coldstream_forgetting_log_loss{AT}, cohort="slice 0 / new"}}': "0.5+0x90",
    f'coldstream_forgetting_rise{AT}, cohort="slice 0 / new"}}': "0.001+0x90",
    f'coldstream_drift_alarms_total{AT}, detector="adwin"}}': "1+0x90",
}
CASES: dict[str, dict[str, str]] = {
    "PartitionWithoutOwner": {'coldstream_partition_owned{*, partition="0"}': "1+0x60 stale"},
    "StandsStill": {
        'coldstream_events_total{*, outcome="applied"}': "6000+0x90",
        'coldstream_events_total{*, outcome="dead_letter"}': "6+0x90",
    },
    "FallsBehind": {'coldstream_lag_events{*, partition="0"}': "90000+1000x90"},
    "SlowToBecomeDurable": {
        'coldstream_durable_seconds_bucket{*, le="0.25"}': "0+5800x90",
        'coldstream_durable_seconds_bucket{*, le="1.0"}': "0+5900x90",
    },
    "LoopBlocked": {"coldstream_loop_delay_max_seconds{*}": "1.5+0x90"},
    "RebalancesOften": {"coldstream_rebalances_total{*}": "0+1x90"},
    "FencedOften": {"coldstream_fenced_total{*}": "0+1x90"},
    "EventsDeletedUnread": {"coldstream_gap_events_total{*}": "0+0x79 5+0x9"},
    "Poison": {'coldstream_poison_red{*, partition="0"}': "1+0x90"},
    "DeadLetters": {'coldstream_events_total{*, outcome="dead_letter"}': "0+100x90"},
    "UpdatesGuarded": {'coldstream_events_total{*, outcome="guarded"}': "0+0x79 1+0x9"},
    "Retries": {'coldstream_retries_total{*, stage="publish"}': "0+6x90"},
    "ChangelogBehind": {'coldstream_state_events{*, partition="0"}': "0+6000x60 360000+0x29"},
    "RestoreStandsStill": {'coldstream_restore_share{*, partition="0"}': "0.5+0x90"},
    "StandbyBehind": {'coldstream_standby_lag_records{*, partition="1"}': "200000+0x90"},
    "MetaFrozen": {"coldstream_meta_ladder_rung{*}": "0+0x79 4+0x9", "coldstream_meta_rounds_total{*}": "5+0x90"},
    "MetaOnTheLadder": {"coldstream_meta_ladder_rung{*}": "1+0x90"},
    "MetaRejects": {'coldstream_meta_decisions_total{*, decision="rejected"}': "0+1x90"},
    "MetaStandsStill": {"coldstream_meta_rounds_total{*}": "5+0x90"},
    "MetaVersionsApart": {"coldstream_meta_version{*}": "6+0x90"},
    "GradientsRefused": {'coldstream_meta_refused_gradients_total{*, reason="not finite"}': "0+0x79 1+0x9"},
    "Forgetting": {'coldstream_forgetting_rise{*, cohort="slice 0 / new"}': "0.004+0x90"},
    "ForgettingFast": {'coldstream_forgetting_rise{*, cohort="slice 0 / new"}': "0.001+0x79 0.02+0x9"},
    "AnchorsNotFinite": {'coldstream_forgetting_log_loss{*, cohort="slice 0 / new"}': "0.5+0x79 NaN+0x9"},
    "Drift": {'coldstream_drift_alarms_total{*, detector="adwin"}': "0+0x79 1+0x9"},
}
"""What is otherwise than in ``HEALTHY``, * for the labels of Prometheus, where an alert, and no other, fires"""
NOT_YET = {
    "StandsStill": {'coldstream_lag_events{*, partition="0"}': "0+0x90"} | CASES["StandsStill"],
    "FallsBehind": {'coldstream_lag_events{*, partition="0"}': "250000-1000x90"},
    "RestoreStandsStill": CASES["RestoreStandsStill"] | {'coldstream_restore_records{*, partition="0"}': "0+50x90"},
    "MetaRejects": {
        'coldstream_meta_decisions_total{*, decision="rejected"}': "1+0x60 2+0x29",
        "coldstream_meta_rounds_total{*}": "1+0x60 2+0x29",  # one of one
    },
    "MetaStandsStill": CASES["MetaStandsStill"] | {'coldstream_events_total{*, outcome="applied"}': "0+100x90"},
    "MetaOnTheLadder": {"coldstream_meta_ladder_rung{*}": "0+0x60 1+0x29"},
    "Forgetting": {'coldstream_forgetting_rise{*, cohort="slice 0 / new"}': "0.001+0x79 0.004+0x9"},
}
"""Beside it: close to a case, and nothing fires"""


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on PATH: it comes with Prometheus (Debian: apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    assert {f"Coldstream{name}" for name in (*CASES, "NoWorker")} == {rule["alert"] for rule in rules()}
    changed = {key.replace("{*", AT) for case in (*CASES.values(), *NOT_YET.values()) for key in case}
    assert changed <= HEALTHY.keys()


def test_promtool_accepts_the_rules() -> None:
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", str(RULES))


def scenario(name: str, series: dict[str, str], firing: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "85m",
                "exp_samples": [{"labels": f'{{alertname="Coldstream{one}"}}', "value": 1} for one in firing],
            }
        ],
    }


def changed(case: dict[str, str]) -> dict[str, str]:
    return HEALTHY | {key.replace("{*", AT): values for key, values in case.items()}


def test_each_alert_fires_in_its_case_and_no_other_does(tmp_path: Path) -> None:
    scenarios = [
        scenario("all is well", HEALTHY, []),
        scenario("NoWorker", {'up{job="c"}': "0+0x90"}, ["NoWorker"]),
        *(scenario(name, changed(case), [name]) for name, case in CASES.items()),
        *(scenario(f"not yet {name}", changed(case), []) for name, case in NOT_YET.items()),
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": scenarios}))
    assert "SUCCESS" in promtool("test", "rules", str(file))
