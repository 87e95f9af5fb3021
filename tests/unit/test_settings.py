"""Settings: layers, origins, and errors that name what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.exceptions import InvalidSettings, UnknownProfile, UnreadableSettings
from configs.loading import load_settings, profile_names, resolve_settings
from configs.settings import HISTORY_CHUNK, Settings
from state.history_codec import CHUNK_EVENTS


def written(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_the_default_profile_restates_the_built_in_defaults() -> None:
    assert load_settings("default", environ={}) == Settings()
    assert load_settings(None, environ={}) == Settings()


def test_the_published_profiles_are_found() -> None:
    assert profile_names() == ["default", "demo", "ml-100k", "ml-100k-graded", "ml-1m", "ml-1m-graded"]


@pytest.mark.parametrize("suffix", ["", "-graded"])
def test_ml_100k_carries_over_the_hyperparameters_of_ml_1m(suffix: str) -> None:
    small, large = (load_settings(f"{name}{suffix}", environ={}) for name in ("ml-100k", "ml-1m"))
    assert (small.data, small.learner, small.protocol) == (large.data, large.learner, large.protocol)
    assert (small.training.users_per_batch, large.training.users_per_batch) == (16, 32)
    assert small.training.model_copy(update={"users_per_batch": 32}) == large.training


def test_only_the_graded_profiles_use_the_rating() -> None:
    clicks, graded = load_settings("ml-1m", environ={}), load_settings("ml-1m-graded", environ={})
    assert (clicks.learner.graded_targets, clicks.learner.ordinal_auxiliary) == (False, 0.0)
    assert graded.learner.graded_targets is True
    assert (clicks.data.format, clicks.data.events.label.at_least) == ("movielens", 4.0)


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "learner: {dim: 4, item_dim: 5, second_dim: 6}\n")
    environ = {"COLDSTREAM__LEARNER__ITEM_DIM": "50", "COLDSTREAM__LEARNER__SECOND_DIM": "7"}
    learner = load_settings(path, {"learner.second_dim": 9}, environ).learner
    assert (learner.dim, learner.item_dim, learner.second_dim) == (4, 50, 9)


def test_a_file_extends_a_profile_and_a_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", "extends: ml-100k\nlearner: {dim: 4}\n")
    path = written(tmp_path, "own.yaml", "extends: base.yaml\ntraining: {epochs: 1}\n")
    resolved = resolve_settings(path, environ={})
    assert (resolved.settings.learner.dim, resolved.settings.training.epochs) == (4, 1)
    assert resolved.settings.training.users_per_batch == 16
    assert resolved.changed()["training.users_per_batch"] == "profile ml-100k:6"
    assert resolved.changed()["learner.dim"] == f"{tmp_path / 'base.yaml'}:2"


def test_origins_name_only_values_that_differ_from_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "learner:\n  dim: 16\n  head: diagonal\n")
    environ = {"COLDSTREAM__TRAINING__SEED": "3"}
    assert resolve_settings(path, {"protocol.offline_fraction": 0.5}, environ).changed() == {
        "learner.head": f"{path}:3",
        "training.seed": "environment variable COLDSTREAM__TRAINING__SEED",
        "protocol.offline_fraction": "flag protocol.offline_fraction",
    }


def test_part_of_a_field_rule_keeps_the_built_in_rest(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "data: {events: {user_id: {prefix: 'shop:'}, label: {at_least: 4}}}\n")
    events = load_settings(path, environ={}).data.events
    assert (events.user_id.field, events.user_id.prefix) == ("user_id", "shop:")
    assert (events.label.field, events.label.at_least) == ("label", 4.0)


def test_an_unknown_key_names_file_key_nearest_and_allowed(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "data:\n  events:\n    labels: {field: x}\n")
    with pytest.raises(InvalidSettings) as caught:
        load_settings(path, environ={})
    assert str(caught.value) == (
        f"{path}:3: data.events.labels.field: unknown key, did you mean data.events.label?; known under data.events: "
        "user_id, item_id, label, value, event_time, event_id, user_features, item_features"
    )


def test_an_unknown_key_of_another_section_is_found_there() -> None:
    with pytest.raises(InvalidSettings, match=r"flag training\.dim: .*did you mean learner\.dim\?"):
        load_settings(None, {"training.dim": 3}, {})


def test_an_unknown_environment_variable_is_named() -> None:
    with pytest.raises(InvalidSettings) as caught:
        load_settings(None, environ={"COLDSTREAM__TRAINING__EPOCH": "3"})
    assert str(caught.value).startswith(
        "environment variable COLDSTREAM__TRAINING__EPOCH: training.epoch: unknown key, did you mean training.epochs?"
    )


def test_all_problems_are_reported_at_once() -> None:
    overrides = {"learner.dim": 1, "learner.head": "ful", "learner.dims": 2}
    with pytest.raises(InvalidSettings) as caught:
        load_settings(None, overrides, {})
    assert [p.key for p in caught.value.problems] == ["learner.dims", "learner.head", "learner.dim"]
    assert caught.value.problems[1].message == "Input should be 'full', 'diagonal' or 'gradient', given 'ful'"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.events.label.equals": "5", "data.events.label.at_least": "3"}, "takes one rule"),
        ({"data.delimiter": ""}, "one or more characters"),
        ({"data.encoding": "utf-16"}, "convert the file to utf-8"),
        ({"data.encoding": "latin"}, ""),
        ({"data.encoding": "klingon"}, "unknown encoding"),
        ({"data.columns": "[a, a]"}, "named twice"),
        ({"training.learning_rate": "nan"}, "finite number"),
        ({"learner.dim.x": 1}, "has no keys below it"),
        ({"data.events.user_features": {"age": {"kin": "numeric"}}}, "did you mean data.events.user_features.age.kind"),
    ],
)
def test_values_outside_their_meaning_are_refused(overrides: dict[str, object], message: str) -> None:
    if not message:
        assert load_settings(None, overrides, {}).data.encoding == "iso8859-1"
        return
    with pytest.raises(InvalidSettings, match=message):
        load_settings(None, overrides, {})


def test_text_of_flags_and_environment_is_read_as_lists_null_and_scalars() -> None:
    environ = {"COLDSTREAM__DATA__PATHS": "[a.csv, b.csv]", "COLDSTREAM__STATE__DIRECTORY": "null"}
    settings = load_settings(None, {"data.delimiter": r"\t", "learner.second_filter": "false"}, environ)
    assert settings.data.paths == (Path("a.csv"), Path("b.csv"))
    assert (settings.state.directory, settings.data.delimiter, settings.learner.second_filter) == (None, "\t", False)


def test_one_path_may_stand_without_a_list() -> None:
    assert load_settings(None, {"data.paths": "a.csv"}, {}).data.paths == (Path("a.csv"),)


def test_an_override_of_none_is_a_flag_not_given() -> None:
    assert load_settings(None, {"learner.dim": None}, {}) == Settings()


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "own.yaml", "learner:\n  dim: 4\n  dim: 8\n")
    with pytest.raises(UnreadableSettings, match=r"own\.yaml:3: learner\.dim is given twice"):
        load_settings(path, environ={})


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UnreadableSettings, match=r"own\.yaml"):
        load_settings(written(tmp_path, "own.yaml", text), environ={})


def test_a_circle_of_files_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = written(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UnreadableSettings, match="extends itself"):
        load_settings(path, environ={})


def test_an_unknown_profile_names_the_nearest_and_all() -> None:
    with pytest.raises(UnknownProfile) as caught:
        load_settings("ml-1mm", environ={})
    assert str(caught.value) == (
        "no profile and no file is named 'ml-1mm' (nearest: ml-1m); profiles: default, demo, ml-100k, "
        "ml-100k-graded, ml-1m, ml-1m-graded; or give the path of a YAML file"
    )


# --- the online stage


def test_the_online_stage_is_off_unless_it_is_asked_for() -> None:
    meta = load_settings(None, environ={}).meta
    assert meta.moves == "off"
    assert (meta.every_events, meta.users, meta.recent_share, meta.rebase) == (5_000, 256, 0.25, "history")
    assert (meta.rate, meta.narrow_rate, meta.kl_weight) == (1e-2, 3e-2, 0.4)
    assert meta.directory is None
    assert meta.gate.enabled
    assert (meta.gate.limit, meta.gate.confidence, meta.gate.canary_share) == (0.003, 0.95, 0.1)
    assert (meta.anchors.held_out, meta.anchors.segment) == (0.05, None)
    assert meta.alarms.webhook is None
    assert not meta.hmac.given


@pytest.mark.parametrize("name", ["demo", "ml-100k", "ml-1m-graded"])
def test_every_published_profile_leaves_it_off(name: str) -> None:
    assert load_settings(name, environ={}).meta.moves == "off"


def test_the_section_meta_is_set_like_any_other(tmp_path: Path) -> None:
    path = written(
        tmp_path, "own.yaml", "meta: {moves: biases, gate: {limit: 0.01}, anchors: {segment: plan}, directory: kept}\n"
    )
    environ = {"COLDSTREAM__META__EVERY_EVENTS": "700", "COLDSTREAM__META__GATE__PATIENCE": "2"}
    meta = load_settings(path, {"meta.moves": "everything", "meta.alarms.webhook": "https://hook"}, environ).meta
    assert (meta.moves, meta.every_events, meta.directory) == ("everything", 700, Path("kept"))
    assert (meta.gate.limit, meta.gate.patience, meta.gate.confidence) == (0.01, 2, 0.95)
    assert (meta.anchors.segment, meta.alarms.webhook) == ("plan", "https://hook")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("meta.moves", "all"),
        ("meta.moves", "true"),
        ("meta.every_events", "0"),
        ("meta.users", "0"),
        ("meta.recent_share", "1.1"),
        ("meta.recent_share", "-0.1"),
        ("meta.rate", "0"),
        ("meta.narrow_rate", "0"),
        ("meta.kl_weight", "-1"),
        ("meta.rebase", "all"),
        ("meta.keep_versions", "0"),
        ("meta.histories.events", "0"),
        ("meta.histories.events_per_user", "31"),
        ("meta.anchors.held_out", "0"),
        ("meta.anchors.held_out", "0.6"),
        ("meta.anchors.users", "0"),
        ("meta.anchors.slice_events", "0"),
        ("meta.anchors.query", "3"),
        ("meta.gate.limit", "0"),
        ("meta.gate.confidence", "0.5"),
        ("meta.gate.confidence", "1"),
        ("meta.gate.bootstrap_samples", "99"),
        ("meta.gate.min_users", "1"),
        ("meta.gate.min_stream_users", "1"),
        ("meta.gate.canary_share", "1"),
        ("meta.gate.canary_share", "-0.1"),
        ("meta.gate.patience", "0"),
        ("meta.alarms.min_interval_s", "0"),
    ],
)
def test_what_the_online_stage_cannot_use_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        load_settings(None, {key: value}, environ={})
    assert [problem.key for problem in error.value.problems] == [key]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("meta.gate.limits", "meta.gate.limit"),
        ("meta.every_event", "meta.every_events"),
        ("meta.anchor", "meta.anchors"),
    ],
)
def test_an_unknown_key_of_the_online_stage_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        load_settings(None, {key: "1"}, environ={})
    assert nearest.rsplit(".", 1)[1] in str(error.value)


def test_histories_need_a_ring_that_holds_a_chunk_of_them() -> None:
    assert load_settings(None, {"state.ring": "8"}, environ={}).state.ring == 8  # without the online stage it may
    with pytest.raises(InvalidSettings, match=r"set state\.ring \(now 8\) to at least 32"):
        load_settings(None, {"state.ring": "8", "meta.moves": "everything"}, environ={})


def test_the_settings_chunk_is_the_codecs() -> None:
    assert HISTORY_CHUNK == CHUNK_EVENTS
