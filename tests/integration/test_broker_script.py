"""deploy/kafka/broker.py: brokers that start, say where they are, die, come back with their data, and leave nothing."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from deploy.kafka import cluster as cluster_module
from deploy.kafka import launchers
from deploy.kafka.answering import answers, brokers_known
from deploy.kafka.broker import ROOT, main
from deploy.kafka.cluster import Cluster, free_ports, new_cluster_id
from deploy.kafka.launchers import BrokerError, Jars
from tests.kafka_broker import create_topic, free_topic, no_broker, running_cluster

SCRIPT = ROOT / "deploy" / "kafka" / "broker.py"
QUICK = {"broker.session.timeout.ms": "2000", "broker.heartbeat.interval.ms": "400"}
"""A killed broker may come back once its session has ended: after 9 s by default"""


@pytest.fixture
def own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), properties=QUICK, heap_mb=256) as started:
        yield started


def written(bootstrap: str, topic: str, values: list[bytes]) -> None:
    with closing(KafkaProducer(bootstrap_servers=bootstrap)) as producer:
        for value in values:
            producer.send(topic, value)
        producer.flush()


def contents(bootstrap: str, topic: str, count: int) -> list[bytes]:
    with closing(KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        found: list[bytes] = []
        while len(found) < count:
            batches = consumer.poll(timeout_ms=20_000)
            assert batches, f"{len(found)} of {count} records"
            found += [record.value for records in batches.values() for record in records]
        return found


def test_a_killed_broker_comes_back_with_its_port_and_its_data(cluster: Cluster) -> None:
    before, topic = cluster.bootstrap, free_topic("broker")
    create_topic(before, topic)
    written(before, topic, [b"a", b"b", b"c"])

    cluster.kill(1)
    assert cluster.running() == ()
    assert not answers(before)
    with pytest.raises(BrokerError, match="broker 1 does not run; `restart` starts it"):
        cluster.kill(1)
    cluster.restart(1)

    assert cluster.bootstrap == before
    assert contents(before, topic, 3) == [b"a", b"b", b"c"]


def test_it_answers_in_kafkas_protocol_and_knows_its_node(cluster: Cluster) -> None:
    assert answers(cluster.bootstrap)
    assert brokers_known(cluster.bootstrap) == {1}


def test_another_process_finds_it_by_its_directory(
    cluster: Cluster, own_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--dir", str(cluster.directory)]
    assert main(["where", *there]) == 0
    assert capsys.readouterr().out == f"{cluster.bootstrap}\n"
    assert main(["start", *there, "--heap", "256"]) == 0  # it runs already
    assert capsys.readouterr().out == f"{cluster.bootstrap}\n"
    assert main(["logs", *there]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(cluster.log(1))
    assert "Kafka Server started" in cluster.log(1).read_text()
    assert main(["start", *there, "--brokers", "2"]) == 2
    assert "holds a cluster of 1 brokers" in capsys.readouterr().err
    assert main(["start", *there, "--fresh"]) == 2
    assert "brokers 1 run; stop them first" in capsys.readouterr().err


def test_the_script_starts_three_brokers_with_one_more_listener_and_stops_them(
    tmp_path: Path, own_cluster: None
) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(SCRIPT), *arguments, "--dir", str(tmp_path / "three")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd="/")

    login = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_ann="secret";'
    listener = ["--listener", "SECURE=SASL_PLAINTEXT", "--property", "sasl.enabled.mechanisms=PLAIN"]
    jaas = ["--property", f"listener.name.secure.plain.sasl.jaas.config={login}"]
    try:
        started = script("start", "--brokers", "3", "--heap", "200", *listener, *jaas)
        assert started.returncode == 0, started.stderr
        addresses = started.stdout.strip().split(",")
        assert [brokers_known(address) for address in addresses] == [{1, 2, 3}] * 3

        secure = script("where", "--listener", "SECURE").stdout.strip()
        assert len(set(secure.split(",")) - set(addresses)) == 3
        as_ann = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_plain_username": "ann"}
        with closing(KafkaProducer(bootstrap_servers=secure, sasl_plain_password="secret", **as_ann)) as producer:
            topic = create_topic(started.stdout.strip(), free_topic("secure"))
            assert producer.send(topic, b"x").get(timeout=30).offset == 0

        assert script("kill", "--broker", "2", "--signal", "TERM").returncode == 0
        assert [answers(address) for address in addresses] == [True, False, True]
    finally:
        stopped = script("stop")
    assert stopped.returncode == 0
    assert script("where").returncode == 1
    assert not any(answers(address) for address in addresses)
    assert "Kafka Server started" in (tmp_path / "three" / "broker-3.log").read_text()


def test_a_broker_that_cannot_start_says_why_and_leaves_nothing_running(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, properties={"log.retention.ms": "soon"}, heap_mb=200)
    with pytest.raises(BrokerError, match=r"broker-1.*refused it.*soon"):
        cluster.start()
    assert cluster.running() == ()


def test_a_clusters_id_never_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([uuid.UUID("f8" + 30 * "0"), uuid.UUID("04" + 30 * "0")])
    monkeypatch.setattr(cluster_module.uuid, "uuid4", lambda: next(drawn))
    assert new_cluster_id() == "B" + 21 * "A"


def test_what_the_cluster_decides_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="listeners: the cluster decides this itself; add a listener with --listener"):
        Cluster(tmp_path, properties={"listeners": "X://0.0.0.0:1"})
    with pytest.raises(BrokerError, match="listener X=TLS: write NAME=SSL"):
        Cluster(tmp_path, listeners={"X": "TLS"})


def test_kafka_bootstrap_is_checked_and_used_but_never_started_or_stopped(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--dir", str(tmp_path)]
    monkeypatch.setenv("KAFKA_BOOTSTRAP", cluster.bootstrap)
    assert [main([command, *there]) for command in ("start", "where", "stop")] == [0, 0, 0]
    assert capsys.readouterr().out == f"{cluster.bootstrap}\n" * 2
    assert list(tmp_path.iterdir()) == []
    assert answers(cluster.bootstrap)
    assert main(["kill", *there]) == 2
    assert "KAFKA_BOOTSTRAP names a cluster that is not ours" in capsys.readouterr().err

    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("KAFKA_BOOTSTRAP", nobody)
    assert main(["start", *there]) == 2
    assert f"KAFKA_BOOTSTRAP={nobody}: no broker answers there" in capsys.readouterr().err


def test_what_is_no_broker_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert brokers_known(address) == frozenset()
    assert not answers("nonsense")


@pytest.mark.parametrize(
    ("missing", "words"),
    [("java", "no java on PATH: a broker needs it; Debian: apt-get install"), ("mvn", "no mvn on PATH: it fetches")],
)
def test_what_is_not_installed_is_named(
    missing: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(launchers, "JARS", tmp_path / "lib")
    monkeypatch.setattr(launchers.shutil, "which", lambda name, **_: None if name == missing else f"/usr/bin/{name}")
    with pytest.raises(BrokerError, match=words):
        launchers.find_java() if missing == "java" else launchers.fetched_jars()


def test_an_older_java_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(BrokerError, match=r'is openjdk version "11.0.2" 2019-01-15: Kafka .* needs Java 17 or newer'):
        launchers.find_java()


def test_a_process_that_got_the_same_id_is_not_taken_for_a_broker(tmp_path: Path) -> None:
    assert not Jars().alive(str(os.getpid()), tmp_path / "broker-1.properties")


# --- Docker: a stand-in for its command, which runs the image's own scripts' work with the jars, outside of a container

STAND_IN = r"""#!{python} -IS
import json, os, subprocess, sys
from pathlib import Path

command, rest = sys.argv[1], sys.argv[2:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
if command == "run":
    options, image = rest, rest.index("apache/kafka:4.1.0")
    def each(name):
        return [rest[k + 1] for k in range(image) if rest[k] == name]
    (entrypoint,), arguments = each("--entrypoint"), rest[image + 1 :]
    assert each("--network") == ["host"] and each("--user") == [f"{{os.getuid()}}:{{os.getgid()}}"]
    environment = os.environ | dict(pair.split("=", 1) for pair in each("--env"))
    inside = [text.replace("/opt/kafka/bin", {scripts!r}) for text in (entrypoint, *arguments)]
    if "--rm" in rest:
        sys.exit(subprocess.run(inside, env=environment).returncode)
    print(subprocess.Popen(inside, env=environment, stdout=subprocess.DEVNULL, start_new_session=True).pid)
elif command == "inspect":
    stat = Path(f"/proc/{{rest[-1]}}/stat")
    print("true" if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" else "false")
elif command == "kill":
    os.kill(int(rest[-1]), getattr(__import__("signal"), "SIG" + rest[1]))
elif command not in ("info", "image", "rm"):
    sys.exit(f"docker: what is {{command}}?")
"""


@pytest.fixture
def docker_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in on PATH; returns where it writes down how it was called."""
    try:
        java = shlex.join(launchers.java_with_kafka())
    except BrokerError as error:
        no_broker(error)
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name, main_class in (("kafka-storage.sh", "kafka.tools.StorageTool"), ("kafka-server-start.sh", "kafka.Kafka")):
        (programs / name).write_text(f'#!/bin/sh\nexec {java} ${{KAFKA_HEAP_OPTS:-}} {main_class} "$@"\n')
    text = STAND_IN.format(python=sys.executable, calls=str(calls), scripts=str(programs))
    (programs / "docker").write_text(text)
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return calls


def test_docker_comes_before_the_jars_and_runs_the_same_cluster(docker_calls: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    with Cluster(directory, heap_mb=256) as cluster:
        assert brokers_known(cluster.bootstrap) == {1}
        assert json.loads((directory / "cluster.json").read_text())["launcher"] == "docker"
        create_topic(cluster.bootstrap, free_topic("docker"))
        again = Cluster.at(directory)
        assert again is not None
        assert again.running() == (1,)
        again.kill(1, "TERM")
        cluster.start()
        assert brokers_known(cluster.bootstrap) == {1}
    assert not answers(cluster.bootstrap)
    calls = [json.loads(line) for line in docker_calls.read_text().splitlines()]
    started = next(call for call in calls if call[:2] == ["run", "--detach"])
    assert f"{directory}:{directory}" in started
    assert "KAFKA_HEAP_OPTS=-Xmx256m" in started
    assert [call[0] for call in calls].count("rm") == 2
