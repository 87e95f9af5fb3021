"""The command line: every error is one line that says what to do, and training can be interrupted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from learner.artifact import HISTORIES, MANIFEST, TENSORS, read_artifact
from streams.commands import train
from streams.replay import RunProgress

HEADER = "user_id,item_id,label,event_time_ms\n"
ROOT = Path(__file__).parents[2]

COMMANDS = (
    "", "train", "backtest", "query", "generate", "config", "config check", "config show", "worker", "play",
    "dead-letters", "dead-letters list", "dead-letters replay",
)  # fmt: skip


@pytest.fixture
def fails(coldstream):
    """Runs a command that has to fail as promised and gives the words after ``error: ``."""

    def run(line: str) -> str:
        outcome = coldstream(line)
        assert outcome.code == 2, outcome
        assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
        return outcome.err.removeprefix("error: ").rstrip()

    return run


def events_file(directory: Path, rows: list[str]) -> Path:
    path = directory / "events.csv"
    path.write_text(HEADER + "".join(row + "\n" for row in rows))
    return path


def stream_of(users: int, labels: str = "01") -> list[str]:
    """Two events of each user, one user after the other, one second between events."""
    return [f"u{k // 2},i{k % 3},{labels[k % len(labels)]},{1_700_000_000_000 + 1000 * k}" for k in range(2 * users)]


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(coldstream, command):
    outcome = coldstream(f"{command} --help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


# --- errors of the input


def test_no_data_names_the_setting(fails):
    assert "data.paths is empty: name files or a directory" in fails("backtest")


def test_a_missing_file_is_named(fails, tmp_path):
    assert fails(f"backtest --data {tmp_path}/none.csv").startswith(f"{tmp_path}/none.csv: no such file")


def test_an_unknown_column_names_the_nearest(fails, generated):
    message = fails(f"backtest --config {generated}/config.yaml --set data.events.item_id.field=item")
    assert "events.csv: no column 'item' for data.events.item_id.field, nearest: 'item_id'" in message


@pytest.mark.parametrize("text", ["", HEADER])
def test_a_file_without_events_is_refused(fails, tmp_path, text):
    path = tmp_path / "events.csv"
    path.write_text(text)
    assert str(path) in fails(f"backtest --data {path}")


def test_offline_events_of_one_class_are_refused(fails, tmp_path, small):
    path = events_file(tmp_path, stream_of(20, labels="1"))
    assert "all 28 offline events have label 1: check the label rule" in fails(f"backtest --data {path} {small}")


def test_online_events_of_one_class_are_refused(fails, tmp_path, small):
    path = events_file(tmp_path, stream_of(14) + [row.replace(",0,", ",1,") for row in stream_of(20)[28:]])
    message = fails(f"backtest --data {path} {small}")
    assert "all 12 scored events have label 1, so no ranking can be measured" in message
    assert "protocol.offline_fraction" in message


def test_a_single_user_is_refused(fails, tmp_path):
    path = events_file(tmp_path, stream_of(1))
    assert "the data has 1 user" in fails(f"train --data {path} --out {tmp_path}/model")


def test_users_who_all_begin_at_once_are_refused(fails, tmp_path):
    path = events_file(tmp_path, [f"u{k},i{k % 3},{k % 2},1700000000000" for k in range(20)])
    message = fails(f"backtest --data {path}")
    assert "no offline users: the first 70% of 20 users all began at the same time (1700000000000 ms)" in message
    assert "raise protocol.offline_fraction, or check the time column" in message


def test_too_many_unusable_lines_stop_the_run(fails, generated, tmp_path):
    lines = (generated / "events.csv").read_text().splitlines()
    lines[1:401] = [f"{line},too,many" for line in lines[1:401]]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    message = fails(f"backtest --config {generated}/config.yaml --data {tmp_path}/events.csv")
    assert "records cannot be used" in message
    assert "data.rejects.max_share is 1.0%" in message
    assert f"{tmp_path}/events.csv line 2: malformed line" in message


def test_a_few_unusable_lines_are_counted_and_written_down(coldstream, generated, model, small, tmp_path):
    lines = (generated / "events.csv").read_text().splitlines()
    lines[10] = lines[10].rsplit(",", 1)[0]
    lines[20] = re.sub(r",[01],", ",7,", lines[20])
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    outcome = coldstream(
        f"backtest --model {model} --config {generated}/config.yaml {small} --data {tmp_path}/events.csv "
        f"--rejects {tmp_path}/rejects.jsonl --json {tmp_path}/result.json"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "result.json").read_text())["rejects"] == {
        "malformed line": 1,
        "label outside the rule": 1,
    }
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in written] == [(11, "malformed line"), (21, "label outside the rule")]


# --- errors of the settings and arguments


def test_an_unknown_setting_names_the_nearest(fails):
    message = fails("backtest --set learner.dims=4")
    assert message.startswith("flag learner.dims: learner.dims: unknown key, did you mean learner.dim?")


def test_a_setting_without_a_value_is_refused(fails):
    assert fails("train --out model --set learner.dim") == (
        "--set learner.dim: write it as KEY=VALUE, for example --set learner.dim=8"
    )


@pytest.mark.parametrize("fraction", ["-0.5", "0", "1", "nan"])
def test_an_offline_fraction_outside_its_range_is_refused(fails, generated, fraction):
    message = fails(f"backtest --config {generated}/config.yaml --offline-fraction {fraction}")
    assert message.startswith("flag protocol.offline_fraction: protocol.offline_fraction: ")


def test_score_last_that_reaches_into_the_offline_users_is_refused(fails, generated):
    message = fails(f"backtest --config {generated}/config.yaml --score-last 0.5")
    assert message.endswith("it can be at most 0.3")


def test_an_unknown_profile_is_refused(fails):
    assert "no profile and no file is named 'ml-1n' (nearest: ml-1m)" in fails("train --out model --config ml-1n")


def test_set_reaches_settings_that_have_a_flag_of_their_own(fails, generated, tmp_path):
    assert fails("train --out model --set data.paths=none.csv").startswith("none.csv: no such file")
    message = fails(f"backtest --config {generated}/config.yaml --set state.directory={generated}")
    assert message.startswith(f"the state directory {generated} is not empty")
    message = fails(f"backtest --config {generated}/config.yaml --set protocol.score_last=0.5")
    assert message.endswith("it can be at most 0.3")


def test_a_flag_wins_over_set(fails):
    assert fails("train --out model --set data.paths=first.csv --data second.csv").startswith("second.csv: no such")


def test_a_negative_seed_is_refused(fails):
    assert fails("backtest --seed -1").startswith("flag training.seed: training.seed: ")


@pytest.mark.parametrize("setting", ["training.learning_rate=1e9", "training.weight_decay=1e30"])
def test_training_that_diverges_says_what_to_lower(fails, generated, small, tmp_path, setting):
    message = fails(f"train --config {generated}/config.yaml {small} --set {setting} --out {tmp_path}/model")
    assert message.startswith("the training loss ")
    assert "lower training.learning_rate (now " in message


def test_an_unknown_device_is_refused(fails, generated, small, tmp_path):
    message = fails(f"train --config {generated}/config.yaml {small} --device nope --out {tmp_path}/model")
    assert message.startswith("device 'nope' cannot be used here: ")
    assert message.endswith("use --device cpu")


@pytest.mark.parametrize("option", ["--json", "--predictions", "--report", "--rejects"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(fails, generated, option, tmp_path):
    message = fails(f"backtest --config {generated}/config.yaml {option} {tmp_path}")
    assert message == f"{option} {tmp_path}: is a directory; name a file in it"
    below = generated / "events.csv" / "below" / "it"
    message = fails(f"backtest --config {generated}/config.yaml {option} {below}")
    assert message == f"{option} {below}: {generated}/events.csv is no directory; give another path"


@pytest.mark.parametrize("option", ["--state", "--save-model"])
def test_an_output_directory_that_is_a_file_is_refused_before_the_work(fails, generated, option):
    path = generated / "events.csv"
    message = fails(f"backtest --config {generated}/config.yaml {option} {path}")
    assert message == f"{option} {path}: {path} is no directory; give another path"


def test_a_used_state_directory_is_refused_before_the_work(fails, generated, tmp_path):
    (tmp_path / "partition-0").mkdir()
    message = fails(f"backtest --config {generated}/config.yaml --state {tmp_path}")
    assert message.startswith(f"the state directory {tmp_path} is not empty")
    assert message.endswith("give a new directory")


def test_what_the_file_system_refuses_is_one_line(fails, generated):
    path = generated / ("x" * 300)
    message = fails(f"backtest --config {generated}/config.yaml --json {path}")
    assert message == f"{path}: File name too long; check the path, its rights and the space on its disk"


# --- errors of the model


@pytest.fixture
def copy(model, tmp_path):
    """A model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_directory_without_a_model_is_refused(fails, generated, tmp_path):
    message = fails(f"backtest --config {generated}/config.yaml --model {tmp_path}")
    assert message == f"{tmp_path} holds no {MANIFEST}: it is not a trained model; make one: coldstream train"


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_model_with_one_changed_byte_is_refused(fails, generated, copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    message = fails(f"backtest --config {generated}/config.yaml --model {copy}")
    assert str(copy / name) in message
    assert "train again" in message


def test_a_changed_name_beside_the_fingerprint_is_refused(fails, generated, copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"train_s"', '"train_t"'))
    message = fails(f"backtest --config {generated}/config.yaml --model {copy}")
    assert message == f"{copy / MANIFEST} is damaged (wall_clock holds train_t): restore it or train again"


def test_a_model_of_another_format_version_is_refused(fails, generated, copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"format_version": 1', '"format_version": 2'))
    message = fails(f"backtest --config {generated}/config.yaml --model {copy}")
    assert "has format version 2, this program reads 1: train again" in message


def test_a_model_that_knows_the_future_is_refused(fails, generated, model):
    message = fails(f"backtest --config {generated}/config.yaml --model {model} --offline-fraction 0.5")
    learned_until = read_artifact(model).metrics["cut_time_ms"]
    assert f"has learned from events up to {learned_until} ms, after this backtest's cut at " in message
    assert "use the offline fraction it was trained with, or a larger one" in message


# --- training


def test_train_prints_json(coldstream, generated, model, small, tmp_path):
    outcome = coldstream(f"train --config {generated}/config.yaml {small} --out {tmp_path}/model --json")
    learned = json.loads(outcome.out)
    assert learned["model"] == f"{tmp_path}/model"
    assert learned["fingerprint"] == read_artifact(model).fingerprint  # the same training, the same fingerprint
    assert learned["offline_users"] == 81
    assert len(learned["train_log_loss"]) == 2


@contextmanager
def interrupted_after_two_epochs():
    """Progress hooks of a user who presses Ctrl-C while the second epoch ends."""

    def epoch(report):
        if report.epoch == 2:
            raise KeyboardInterrupt

    yield RunProgress(epoch=epoch)


def test_interrupted_training_resumes_to_the_same_model(coldstream, generated, small, tmp_path, monkeypatch):
    arguments = f"train --config {generated}/config.yaml {small} --set training.epochs=3"
    assert coldstream(f"{arguments} --out {tmp_path}/once").code == 0

    with monkeypatch.context() as patch:
        patch.setattr(train, "shown_progress", interrupted_after_two_epochs)
        interrupted = coldstream(f"{arguments} --out {tmp_path}/twice")
    assert (interrupted.code, interrupted.err) == (1, "interrupted; the same command resumes\n")
    assert [path.name for path in (tmp_path / "twice").iterdir()] == ["checkpoints"]

    assert coldstream(f"{arguments} --out {tmp_path}/twice").code == 0
    assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == [HISTORIES, MANIFEST, TENSORS]
    assert read_artifact(tmp_path / "twice").fingerprint == read_artifact(tmp_path / "once").fingerprint


@pytest.mark.parametrize(
    ("content", "setting", "expected"),
    [
        (b"damaged", "0.01", "cannot be read as a checkpoint"),
        (None, "0.02", "belongs to another training run (different training)"),
    ],
    ids=["damaged", "of other settings"],
)
def test_a_checkpoint_of_no_use_is_refused(
    fails, coldstream, generated, small, tmp_path, monkeypatch, content, setting, expected
):
    arguments = f"train --config {generated}/config.yaml {small} --out {tmp_path}/model"
    with monkeypatch.context() as patch:
        patch.setattr(train, "shown_progress", interrupted_after_two_epochs)
        assert coldstream(arguments).code == 1
    checkpoint = tmp_path / "model" / "checkpoints" / "checkpoint.safetensors"
    if content is not None:
        checkpoint.write_bytes(content)
    message = fails(f"{arguments} --set training.learning_rate={setting}")
    assert message.startswith(f"{checkpoint} {expected}")
    assert "remove it to start afresh" in message


# --- the process itself


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_program_ends_with_code_2_and_no_traceback():
    ended = in_a_process("-m", "streams.cli", "backtest", "--set", "learner.dims=4")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: flag learner.dims: ")
    assert ended.stderr.count("\n") == 1


STREAM_WITHOUT_TORCH = """
import sys
from pathlib import Path
import numpy as np
import learner.artifact, learner.adaptation, state.store, state.query, streams.processor
from configs.settings import StateSettings
from learner.interactions import Interactions

serving = learner.artifact.read_artifact(Path(sys.argv[1])).serving()
events = Interactions(
    user_ids=("a",), item_ids=("i1",), user=np.zeros(1, np.int32), item=np.zeros(1, np.int32),
    label=np.ones(1, np.int8), value=np.full(1, np.nan, np.float32), event_time_ms=np.ones(1, np.int64),
    offset=np.zeros(1, np.int64), user_features={}, item_features={},
)
open_store = lambda partition, layout: state.store.RocksUserStore(Path(sys.argv[2]), layout)
with streams.processor.Processor(serving, open_store, StateSettings()) as stream:
    print(stream.process(0, events).applied.tolist())
print([name for name in sys.modules if name.split(".")[0] == "torch"])
"""


def test_the_stream_runs_without_torch(model, tmp_path):
    ended = in_a_process("-c", STREAM_WITHOUT_TORCH, str(model), str(tmp_path / "store"))
    assert (ended.stdout, ended.stderr) == ("[True]\n[]\n", "")


def test_a_query_loads_no_torch_and_no_kernel():
    program = "import sys, state.store, state.query; print('torch' in sys.modules, 'learner.adaptation' in sys.modules)"
    assert in_a_process("-c", program).stdout == "False False\n"
