"""``coldstream meta``, as it is typed."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from learner.gate import Evidence, Verdict
from state.lineage import Decision, Lineage, Record, Span
from streams.cli import main
from streams.commands import meta as command
from streams.commands.meta_text import worst_rise

ITEMS = ("apple", "pear\x1b[31m", "plum")
START_MS = 1_700_000_000_000


def tensors(version: int) -> dict[str, np.ndarray]:
    embedding = np.array([[3, 4], [1, 0], [0, 2]], np.float32)
    embedding[0] += version
    return {
        "parameters.item_embedding": embedding,
        "parameters.head.initialization": np.array([2 + version / 2, 0, 0], np.float32),
        "moments.first.head.initialization": np.full(3, version, np.float32),
    }


def filled(directory: Path, key: bytes | None = None) -> Path:
    """0 initial, 1 promoted, 2 rejected, 3 a candidate; a minute apart."""
    clock = iter(range(START_MS, START_MS + 10**9, 60_000))
    lineage = Lineage(directory, key, now_ms=lambda: next(clock))
    lineage.add(Record(0, None, "abc", 0, Decision("initial", "trained")), tensors(0), ITEMS)
    for version in (1, 2):
        metrics = {"cohorts": {"slice 0 / new": {"auc": 0.75, "log_loss": 0.5}, "slice 1 / warm": {"auc": 0.8}}}
        record = Record(
            version, version - 1, "abc", version, Decision("candidate", "5,000 events"), (Span(0, 0, 4_999),),
            {"rate": 0.01}, {**metrics, "step": 0.25},
        )  # fmt: skip
        lineage.add(record, tensors(version), ITEMS)
        rises = {"slice 0 / new": {"rise": -0.01, "bound": -0.002}, "slice 1 / warm": {"rise": 0.02, "bound": 0.03}}
        kind = "promoted" if version == 1 else "rejected"
        lineage.decide(version, Decision(kind, f"{kind} by gate", {"limit": 0.003, "cohorts": rises}))
    lineage.add(Record(3, 1, "abc", 3, Decision("candidate", "more events")), tensors(3), ITEMS)
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    return filled(tmp_path / "meta")


@pytest.fixture
def run(monkeypatch, capsys):
    """Types a line: (exit code, output, errors)."""

    def typed(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coldstream", "meta", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


def test_the_list_is_a_table_of_all_versions(run, directory):
    assert run("list", "--meta", directory) == (
        0,
        "version  parent  stage              round  made                     worst rise              why\n"
        "0                initial            0      2023-11-14 22:13:20 UTC                          trained\n"
        "1        0       promoted, current  1      2023-11-14 22:14:20 UTC  +0.0200 slice 1 / warm  promoted by gate\n"
        "2        1       rejected           2      2023-11-14 22:16:20 UTC  +0.0200 slice 1 / warm  rejected by gate\n"
        "3        1       candidate          3      2023-11-14 22:18:20 UTC                          more events\n",
        "",
    )


def test_the_list_for_machines(run, directory):
    code, out, _ = run("list", "--meta", directory, "--json")
    document = json.loads(out)
    assert (code, document["current"], document["signed"], document["torn"]) == (0, 1, False, False)
    assert [version["stage"] for version in document["versions"]] == ["initial", "promoted", "rejected", "candidate"]
    second = document["versions"][2]
    del second["serving_sha256"]
    assert second == {
        "version": 2, "parent": 1, "stage": "rejected", "current": False, "round": 2, "made_at_ms": START_MS + 180_000,
        "worst_cohort": "slice 1 / warm", "worst_rise": 0.02, "reason": "rejected by gate",
        "decided_at_ms": START_MS + 240_000, "undone_by": None, "pruned": False,
    }  # fmt: skip


def test_the_directory_may_come_from_the_settings(run, directory):
    assert run("list", "--set", f"meta.directory={directory}") == run("list", "--meta", directory)
    assert run("list") == (
        2, "", "error: say where the lineage is: --meta DIRECTORY, or meta.directory in the settings\n"
    )  # fmt: skip
    code, _, err = run("list", "--meta", directory / "none")
    assert (code, err) == (
        2, f"error: {directory / 'none'} holds no lineage: name the directory that a run with --meta was given\n"
    )  # fmt: skip


def test_a_version_is_shown_with_its_evidence(run, directory):
    code, out, _ = run("show", 2, "--meta", directory)
    record = Lineage(directory).version(2).record
    assert code == 0
    assert out == (
        "version 2: rejected\n"
        "parent        1\n"
        "round         2\n"
        "made          2023-11-14 22:16:20 UTC\n"
        "model         abc\n"
        f"serving hash  {record.serving_sha256}\n"
        "tensors       verified\n"
        "learned from  partition 0, offsets 0 to 4,999\n"
        "\n"
        "settings\n"
        "  rate: 0.01\n"
        "\n"
        "metrics\n"
        "  step: 0.25\n"
        "\n"
        "its row of the forgetting matrix\n"
        "  cohorts         auc   log_loss\n"
        "  slice 0 / new   0.75  0.5\n"
        "  slice 1 / warm  0.8\n"
        "\n"
        "2023-11-14 22:16:20 UTC  candidate: 5,000 events\n"
        "\n"
        "2023-11-14 22:17:20 UTC  rejected: rejected by gate\n"
        "    cohorts         bound   rise\n"
        "    slice 0 / new   -0.002  -0.01\n"
        "    slice 1 / warm  0.03    0.02\n"
        "    limit: 0.003\n"
    )


def test_a_verdict_of_the_gate_is_shown_as_a_table(run, directory):
    found = [
        Evidence("slice 0 / new", "rises", 64, 0.003, 0.25, 0.125, 0.5, 1),
        Evidence("all", "not finite", 9, 0.003),
    ]
    verdict = Verdict("anchors", "reject", "slice 0 / new rises", tuple(found))
    Lineage(directory).decide(3, Decision("rejected", verdict.reason, verdict.as_dict()))
    assert run("show", 3, "--meta", directory)[1].endswith(
        "rejected: slice 0 / new rises\n"
        "    evidence       finding     limit  lower  reference  rise  upper  users\n"
        "    slice 0 / new  rises       0.003  0.125  1          0.25  0.5    64\n"
        "    all            not finite  0.003  -      -          -     -      9\n"
        "    outcome: reject\n"
        "    reason: slice 0 / new rises\n"
        "    stage: anchors\n"
    )
    assert "+0.2500 slice 0 / new" in run("list", "--meta", directory)[1]


def test_a_version_for_machines(run, directory):
    code, out, _ = run("show", 2, "--meta", directory, "--json")
    document = json.loads(out)
    assert (code, document["tensors"], document["damage"], document["current"]) == (0, "verified", None, False)
    assert document["record"]["spans"] == [{"partition": 0, "first": 0, "last": 4_999}]
    assert document["record"]["metrics"]["cohorts"]["slice 0 / new"] == {"auc": 0.75, "log_loss": 0.5}
    assert [decision["kind"] for decision in document["decisions"]] == ["candidate", "rejected"]
    assert document["decisions"][1]["evidence"]["limit"] == 0.003


def test_a_damaged_version_is_shown_and_said_to_be(run, directory):
    path = directory / "version-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run("show", 2, "--meta", directory)
    damage = (
        f"version 2 is refused: {path} does not match the hash in its record; restore it from a copy, or use another"
    )
    assert (code, err) == (1, "")
    assert f"\ntensors       {damage} version\n" in out
    code, out, _ = run("show", 2, "--meta", directory, "--json")
    assert (code, json.loads(out)["tensors"], json.loads(out)["damage"]) == (1, "damaged", f"{damage} version")
    for step in (("promote", 2), ("diff", 1, 2)):
        assert run(*step, "--meta", directory) == (2, "", f"error: {damage} version\n")


def test_a_difference_is_by_tensor_and_item(run, directory):
    assert run("diff", 0, 1, "--meta", directory) == (
        0,
        "from version 0 to version 1\n"
        "tensor                          shape  moved  relative\n"
        "parameters.head.initialization  3      0.5    25.00%\n"
        "parameters.item_embedding       3×2    1.414  25.82%\n"
        "\n"
        "items whose embedding moved most\n"
        "item   moved  relative\n"
        "apple  1.414  28.28%\n",
        "",
    )
    code, out, _ = run("diff", 0, 1, "--meta", directory, "--json")
    document = json.loads(out)
    assert (code, document["equal"], document["items"][0]["item_id"]) == (0, False, "apple")
    assert document["tensors"][0] == {
        "name": "parameters.head.initialization", "before": [3], "after": [3], "moved": 0.5, "relative": 0.25
    }  # fmt: skip
    assert run("diff", 1, 1, "--meta", directory)[1] == (
        "versions 1 and 1 serve the same: their serving hashes are equal\n"
    )
    assert "embedding moved" not in run("diff", 0, 1, "--meta", directory, "--items", 0)[1]


def test_items_and_tensors_that_come_and_go_are_counted(run, directory):
    grown = {"parameters.item_embedding": np.ones((4, 2), np.float32), "parameters.more": np.ones(())}
    Lineage(directory).add(Record(4, 1, "abc", 4, Decision("candidate", "")), grown, ("apple", "a", "b", "c"))
    assert run("diff", 1, 4, "--meta", directory)[1] == (
        "from version 1 to version 4\n"
        "tensor                          shape      moved  relative\n"
        "parameters.head.initialization  3          gone\n"
        "parameters.item_embedding       3×2 → 4×2  5      78.09%\n"
        "parameters.more                 ()         new\n"
        "3 items of the vocabulary are new\n"
        "2 items of the vocabulary are gone\n"
        "\n"
        "items whose embedding moved most\n"
        "item   moved  relative\n"
        "apple  5      78.09%\n"
    )


def test_an_item_id_does_a_terminal_no_harm(run, directory):
    moved = tensors(3)
    moved["parameters.item_embedding"][1] += 50
    Lineage(directory).add(Record(4, 1, "abc", 4, Decision("candidate", "\x1b[2J")), moved, ITEMS)
    assert "\npear\\x1b[31m  " in run("diff", 1, 4, "--meta", directory)[1]
    assert "\x1b" not in run("list", "--meta", directory)[1] + run("show", 4, "--meta", directory)[1]


def test_promoting_by_hand(run, directory):
    assert run("promote", 3, "--meta", directory, "--reason", "seen it") == (
        0, "version 3 serves now; it was candidate, and version 1 served before\n", ""
    )  # fmt: skip
    lineage = Lineage(directory)
    assert (lineage.current, lineage.version(3).decisions[-1].reason) == (3, "seen it")
    code, out, _ = run("promote", 2, "--meta", directory, "--json")
    assert (code, json.loads(out)["stage"], json.loads(out)["current"]) == (0, "promoted by hand", True)


def test_rolling_back(run, directory):
    wanted = Lineage(directory).version(0).record.serving_sha256
    code, out, err = run("rollback", 0, "--meta", directory, "--reason", "worse")
    assert (code, err) == (0, "")
    assert out == (
        "version 4 serves now: worse; back to version 0, undoes versions 1, 3: users adapted from them are re-based at "
        f"their next event\nits serving hash is that of version 0: {wanted}\n"
    )
    listed = run("list", "--meta", directory)[1]
    assert "\n1        0       promoted, undone by 4  1 " in listed
    assert "\n4        0       rollback, current      3 " in listed
    shown = run("show", 4, "--meta", directory)[1]
    assert "\nundoes        versions 1, 3\n" in shown
    assert "\n    undone: 1, 3\n" in shown
    code, out, _ = run("rollback", 1, "--meta", directory, "--json")
    assert (code, json.loads(out)["version"], json.loads(out)["undone"]) == (0, 5, [4])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", 9), "there is no version 9: there are versions 0 to 3; the nearest is 3"),
        (("diff", 0, 9), "there is no version 9: there are versions 0 to 3; the nearest is 3"),
        (("promote", 1), "version 1 is the current one already"),
        (("promote", 0), "version 0 served before: bring it back by a rollback to it"),
        (("rollback", 2), "version 2 never served (it is rejected): promote it instead"),
        (("rollback", 1), "version 1 is the current one already"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, directory, words, said):
    assert run(*words, "--meta", directory) == (2, "", f"error: {said}\n")


def test_pruned_tensors_are_said_to_be(run, directory):
    Lineage(directory).prune(1)
    said = "the tensors of version 0 were pruned (meta.keep_versions); there are those of versions 1, 3"
    assert run("rollback", 0, "--meta", directory) == (2, "", f"error: {said}\n")
    assert run("diff", 0, 1, "--meta", directory) == (2, "", f"error: {said}\n")
    code, out, _ = run("show", 0, "--meta", directory)
    assert (code, out.splitlines()[0], "\ntensors       pruned\n" in out) == (0, "version 0: initial, pruned", True)


def test_a_writer_who_is_there_is_named(run, directory, monkeypatch):
    monkeypatch.setattr(command, "LOCK_WAIT_S", 0.05)
    lock = os.open(directory / "lineage.lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        code, _, err = run("promote", 3, "--meta", directory)
        assert (code, err) == (
            2, f"error: another process writes to the lineage {directory} (it holds lineage.lock): try again when it "
            "is done, or end it\n",
        )  # fmt: skip
        assert run("list", "--meta", directory)[0] == 0
    finally:
        os.close(lock)


def test_a_damaged_lineage_is_refused_whole(run, directory):
    path = directory / "lineage.jsonl"
    path.write_bytes(path.read_bytes().replace(b"5,000 events", b"6,000 events", 1))
    code, out, err = run("list", "--meta", directory)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: line 2 does not match its hash: restore the directory from a copy; ")


def test_a_torn_line_is_noted(run, directory):
    with (directory / "lineage.jsonl").open("ab") as file:
        file.write(b'{"content"')
    assert run("list", "--meta", directory)[1].endswith(
        "\nnote: a crash left a part of a last line; it does not count, and the next write takes it off\n"
    )
    assert json.loads(run("list", "--meta", directory, "--json")[1])["torn"] is True


def test_the_key_comes_from_where_the_settings_say(run, tmp_path, monkeypatch):
    directory = filled(tmp_path / "meta", b"a secret")
    (tmp_path / "key").write_text("a secret\n")
    monkeypatch.setenv("A_KEY_OF_A_TEST", "another")
    right = ("--meta", directory, "--set", f"meta.hmac.file={tmp_path / 'key'}")
    assert run("promote", 3, *right)[0] == 0
    assert json.loads(run("list", *right, "--json")[1])["signed"] is True
    code, _, err = run("list", "--meta", directory, "--set", "meta.hmac.env=A_KEY_OF_A_TEST")
    assert (code, "line 1 has a signature that the key (meta.hmac) does not make" in err) == (2, True)
    assert "another'" not in err
    assert run("list", "--meta", directory)[0] == 0
    code, _, err = run("promote", 2, "--meta", directory)
    assert (code, "is signed, and no key is set: name the one that signs it (meta.hmac)" in err) == (2, True)


@pytest.mark.parametrize(
    ("evidence", "metrics", "worst"),
    [
        ({}, {}, None),
        ({}, {"cohorts": {"new": {"rise": 0.1}, "warm": {"rise": 0.2}}}, ("warm", 0.2)),
        (
            {"evidence": [{"cohort": "new", "rise": 0.3}, {"cohort": "all", "rise": None}]},
            {"cohorts": {}},
            ("new", 0.3),
        ),
        ({"cohorts": {"new": {"rise": float("nan")}, "warm": {"rise": 0.2}}}, {}, ("new", "nan")),
        ({"cohorts": "none"}, {"cohorts": {"new": 3}}, None),
    ],
)
def test_the_worst_rise_is_found_where_the_evidence_has_it(tmp_path, evidence, metrics, worst):
    lineage = Lineage(tmp_path)
    record = Record(0, None, "m", 0, Decision("initial", "", evidence), metrics=metrics)
    found = worst_rise(lineage.add(record, {}, ()))
    assert (found if found is None or found[1] == found[1] else (found[0], "nan")) == worst
