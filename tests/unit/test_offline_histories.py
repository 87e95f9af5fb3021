"""What a model keeps of the users it was trained on: their very events, and those it was told to keep its hands off."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from configs.settings import LearnerSettings
from learner import offline_histories
from learner.artifact import Artifact, ArtifactError, read_artifact, read_histories, write_artifact
from learner.histories import Histories
from learner.interactions import Interactions
from learner.meta_training import meta_train
from learner.offline_histories import UNKNOWN, OfflineHistories
from learner.user_hash import held_out_users
from learner.user_state import NO_GRADE
from tests.meta_models import ITEMS, TRAINING, USER_COUNT, USERS, ring_items, settings, taste_events

HELD_OUT = 0.3


def train(events: Interactions, learner: LearnerSettings | None = None, *, held_out: float = HELD_OUT) -> Artifact:
    return meta_train(events, USERS, ITEMS, learner or settings(), TRAINING, held_out=held_out)


def out(events: Interactions) -> dict[str, bool]:
    return dict(zip(events.user_ids, held_out_users([u.encode() for u in events.user_ids], HELD_OUT), strict=True))


def offline(artifact: Artifact) -> OfflineHistories:
    assert artifact.offline is not None
    return artifact.offline


Events = list[tuple[int, int, int]]
"""One user's (item, label, grade), the item by its 40 bits"""


def by_events(events: Interactions, *, graded: bool = True) -> dict[str, tuple[Events, str | None]]:
    """User -> (events, side), by plain loops."""
    found: dict[str, tuple[Events, str | None]] = {}
    for k in range(len(events)):
        user, value = events.user_ids[events.user[k]], events.value[k]
        grade = NO_GRADE if np.isnan(value) or not graded else int(value) - 1
        side = USERS.rows[user][0] if user in USERS.rows else None
        item = int(ring_items([events.item_ids[events.item[k]]])[0])
        found.setdefault(user, ([], side))[0].append((item, int(events.label[k]), grade))
    return found


def by_user(histories: Histories) -> list[tuple[Events, str | None]]:
    """(events, side) of each, as kept."""
    found = []
    for k, (first, last) in enumerate(zip(histories.starts[:-1], histories.starts[1:], strict=True)):
        own = [c[first:last].tolist() for c in (histories.item, histories.label, histories.grade)]
        columns = histories.features.columns[histories.features.starts[k] : histories.features.starts[k + 1]]
        found.append((list(zip(*own, strict=True)), "ab"[columns[0]] if len(columns) else None))
    return found


def sorted_by_events(users: list[tuple[Events, str | None]]) -> list[tuple[Events, str | None]]:
    return sorted(users, key=lambda user: user[0])


@pytest.mark.parametrize("graded", [True, False])
def test_what_was_learned_from_comes_back_event_by_event(graded):
    events = taste_events()
    artifact = train(events, settings(graded=graded))
    learned, held = offline(artifact).histories(artifact.fixed.item_ids)
    expected, away = by_events(events, graded=graded), out(events)
    assert 0 < sum(away.values()) < USER_COUNT
    for histories, is_out in ((learned, False), (held, True)):
        wanted = [expected[user] for user in expected if away[user] == is_out]
        assert sorted_by_events(by_user(histories)) == sorted_by_events(wanted)
        assert histories.first.tolist() == [0] * len(wanted)


def test_items_that_only_users_held_out_have_met_are_unknown_ones():
    events = taste_events()
    away = out(events)
    only = next(user for user, is_out in away.items() if is_out)
    extra = Interactions.from_columns([only] * 2, ["secret", "i0"], [1, 0], [10_000, 10_001])
    artifact = train(Interactions.concatenate([events, extra]))
    assert "secret" not in artifact.fixed.item_ids
    kept = offline(artifact)
    assert (kept.item == UNKNOWN).sum() == 1
    assert kept.held_out[np.searchsorted(kept.starts, np.flatnonzero(kept.item == UNKNOWN)[0], "right") - 1]
    _, held = kept.histories(artifact.fixed.item_ids)
    assert artifact.serving().rows_of(held.item).max() == artifact.serving().item_count - 1  # the unknown item's row
    last = [user[0][-2:] for user in by_user(held) if user[0][-1][0] == int(ring_items(["i0"])[0])]
    assert ((1 << 40) - 1, 1, NO_GRADE) in [events[0] for events in last]


def test_counts_of_items_are_of_all_who_were_learned_from(monkeypatch):
    monkeypatch.setattr(offline_histories, "MAX_EVENTS", 40)  # two users are in the sample
    events = taste_events()
    artifact, away = train(events), out(events)
    counts = dict.fromkeys(artifact.fixed.item_ids, 0)
    for k in range(len(events)):
        if not away[events.user_ids[events.user[k]]]:
            counts[events.item_ids[events.item[k]]] += 1
    assert offline(artifact).item_events.tolist() == list(counts.values())


def test_users_held_out_did_not_touch_the_model():
    events = taste_events()
    away = out(events)
    rest = events.take(np.flatnonzero([not away[events.user_ids[u]] for u in events.user]))
    flipped = replace(
        events, label=np.where([away[events.user_ids[u]] for u in events.user], 1 - events.label, events.label)
    )
    with_them, without, with_others = train(events), train(rest, held_out=0.0), train(flipped)
    for other in (without, with_others):
        assert other.fixed.item_ids == with_them.fixed.item_ids
        for name, parameter in with_them.parameters.items():
            np.testing.assert_array_equal(other.parameters[name], parameter, err_msg=name)
        assert other.like_rate == with_them.like_rate
        assert other.metrics["train_log_loss"] == with_them.metrics["train_log_loss"]
    assert with_them.metrics["offline_users"] == USER_COUNT - sum(away.values())
    assert any(
        not np.array_equal(train(events, held_out=0.0).parameters[n], p) for n, p in with_them.parameters.items()
    )


def test_users_held_out_touch_neither_vocabulary_nor_encoders():
    events = taste_events()
    away = out(events)
    only = next(user for user, is_out in away.items() if is_out)
    extra = Interactions.from_columns([only], ["secret"], [1], [10_000], values=[9.0])
    extra = replace(extra, item_features={"colour": ("red",)}, user_features={"town": ("Ulm",)})
    artifact = train(Interactions.concatenate([extra, events]))
    assert "secret" not in artifact.fixed.item_ids
    assert len(artifact.like_rate) == 5
    assert all(not e.vocabulary for e in artifact.fixed.item_encoder.encoded if e.field.name == "colour")
    assert all(not e.vocabulary for e in artifact.fixed.user_encoder.encoded if e.field.name == "town")


def test_without_anybody_held_out_all_are_learned_from():
    artifact = train(taste_events(), held_out=0.0)
    learned, held = offline(artifact).histories(artifact.fixed.item_ids)
    assert (len(learned), len(held)) == (USER_COUNT, 0)
    assert held.events == 0


def test_samples_fit_their_bounds_with_whole_users_and_hang_on_the_seed(monkeypatch):
    monkeypatch.setattr(offline_histories, "MAX_EVENTS", 70)
    monkeypatch.setattr(offline_histories, "HELD_OUT_EVENTS", 44)
    events = taste_events()
    artifact = train(events)
    learned, held = offline(artifact).histories(artifact.fixed.item_ids)
    assert learned.lengths.tolist() == [15] * 4  # four users of 15 events fit 70, and two fit 44
    assert held.lengths.tolist() == [15] * 2
    whole = by_events(events)
    assert all(user in whole.values() for user in by_user(learned) + by_user(held))
    again = offline(train(events))
    other = offline(meta_train(events, USERS, ITEMS, settings(), TRAINING.model_copy(update={"seed": 8}),
                               held_out=HELD_OUT))  # fmt: skip
    np.testing.assert_array_equal(again.item, offline(artifact).item)
    assert not np.array_equal(other.item, offline(artifact).item)


# --- on disk --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Artifact:
    return train(taste_events())


def test_histories_come_back_from_the_disk_with_the_same_bits(trained, tmp_path):
    fingerprint = write_artifact(tmp_path, trained)
    found, kept = read_histories(tmp_path).tensors(), offline(trained).tensors()
    assert found.keys() == kept.keys()
    for name, array in kept.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert read_artifact(tmp_path).fingerprint == fingerprint
    assert read_artifact(tmp_path).offline is None  # a serving process does not read them
    assert {f.name for f in fields(OfflineHistories)} - {"features"} <= found.keys()


def test_the_fingerprint_vouches_for_the_histories_too(trained, tmp_path):
    label = offline(trained).label.copy()
    label[0] ^= 1
    other = replace(trained, offline=replace(offline(trained), label=label))
    assert write_artifact(tmp_path / "a", trained) != write_artifact(tmp_path / "b", other)


def test_a_model_without_histories_says_so_where_they_are_wanted(trained, tmp_path):
    write_artifact(tmp_path, trained)
    write_artifact(tmp_path, replace(trained, offline=None))
    assert not (tmp_path / "histories.safetensors").exists()
    assert read_artifact(tmp_path).fixed.item_ids == trained.fixed.item_ids
    with pytest.raises(ArtifactError, match=r"written without histories\.safetensors.*train it again"):
        read_histories(tmp_path)


def test_missing_or_damaged_histories_are_refused_by_name(trained, tmp_path):
    write_artifact(tmp_path, trained)
    path = tmp_path / "histories.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"histories\.safetensors is missing, or does not match its hash"):
        read_histories(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"histories\.safetensors is missing.*copy the whole directory"):
        read_histories(tmp_path)
    read_artifact(tmp_path)  # whoever needs no histories is not stopped


def test_a_damaged_model_has_no_histories_either(trained, tmp_path):
    write_artifact(tmp_path, trained)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"i3"', '"i4"', 1))
    with pytest.raises(ArtifactError, match="does not match its fingerprint"):
        read_histories(tmp_path)


def test_a_file_that_lacks_a_part_is_refused(trained, tmp_path, monkeypatch):
    whole = OfflineHistories.tensors
    monkeypatch.setattr(
        OfflineHistories, "tensors", lambda self: {n: a for n, a in whole(self).items() if n != "held_out"}
    )
    write_artifact(tmp_path, trained)
    with pytest.raises(ArtifactError, match=r"cannot be read as histories: 'held_out'; train the model again"):
        read_histories(tmp_path)
