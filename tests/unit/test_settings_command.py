"""``coldstream config check | show``."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from configs.loading import load_settings
from streams.commands.config import app


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_check_prints_ok() -> None:
    assert run("check", "--config", "ml-1m") == (0, "OK: ml-1m\n", "")


def test_check_prints_each_error_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("learner:\n  dmi: 3\n  dim: 1\n")
    code, out, err = run("check", "--config", str(path))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"error: {path}:2: learner.dmi: unknown key, did you mean learner.dim?; known under learner: head, dim, "
        "item_dim, second_filter, second_dim, ordinal_auxiliary, graded_targets, grades",
        f"error: {path}:3: learner.dim: Input should be greater than or equal to 2, given 1",
    ]


def test_check_writes_json() -> None:
    assert json.loads(run("check", "--json")[1]) == {"ok": True, "errors": []}
    code, out, _ = run("check", "--json", "--config", "nowhere.yaml")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_show_is_yaml_of_the_resolved_settings_with_origins() -> None:
    code, out, _ = run("show", "-c", "ml-100k", "--set", "learner.dim=8", "--set", r"data.delimiter=\t")
    expected = load_settings("ml-100k", {"learner.dim": 8, "data.delimiter": "\t"}, {}).model_dump(mode="json")
    assert code == 0
    assert yaml.safe_load(out) == expected
    assert "  dim: 8  # flag learner.dim" in out.splitlines()
    assert "  users_per_batch: 16  # profile ml-100k:6" in out.splitlines()
    assert "  epochs: 20" in out.splitlines()


def test_show_writes_json_with_origins() -> None:
    shown = json.loads(run("show", "--json", "--set", "learner.dim=8")[1])
    assert shown["origins"] == {"learner.dim": "flag learner.dim"}
    assert shown["settings"]["learner"]["dim"] == 8


def test_an_override_without_a_value_says_how_to_write_it() -> None:
    assert run("check", "--set", "learner.dim") == (
        2,
        "",
        "error: --set learner.dim: write it as KEY=VALUE, for example --set learner.dim=8\n",
    )
