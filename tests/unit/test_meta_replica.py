"""A copy of the versions: it takes a transaction whole or not at all, and refuses what is not what the marker says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from learner.histories import take_rows
from learner.meta_update import take_back
from state.changelog import Record
from streams.meta.messages import MessageRefused
from streams.meta.published import ROW, Marker, RowForm, Shelf, moving, opened, piece_key, sealed
from tests.meta_models import meta_model
from tests.unit.test_meta_aggregator import World, assert_follows, compacted, replica
from tests.unit.test_meta_update import assert_same_tensors

KEY = b"k" * 32


def test_before_the_first_marker_it_is_the_trained_model():
    follower = replica()
    assert (follower.head, follower.consumed, follower.task, follower.marker) == (0, {}, None, None)
    assert follower.serving.canary is None
    assert follower.current.meta_version == 0


def test_a_transaction_counts_at_its_marker_and_not_before():
    world = World()
    follower = replica(world.log)
    before = follower.model.tensors()
    world.round(new=True)
    half = len(world.last.versions) - 1
    assert follower.follow(world.last.versions[:half]) == []
    assert_same_tensors(follower.model.tensors(), before)
    assert follower.head == 0
    reached = follower.follow(world.last.versions[half:])
    assert [marker.sequence for marker in reached] == [1]
    assert_follows(follower, world.aggregator)


@pytest.mark.parametrize("read", range(7))
def test_it_goes_on_with_the_tail_from_wherever_it_is(read):
    world = World()
    places = [len(world.log)]
    for k in range(6):
        world.round(new=k % 2 == 0, rise=0.5 if k == 3 else 0.0)
        places.append(len(world.log))
    assert "rejected" in world.stages()
    follower = replica(world.log[: places[read]])
    tail = world.log[places[read] :]
    assert len(follower.follow(tail)) == 6 - read
    assert_follows(follower, world.aggregator)
    if read < 6:
        gone = replica(world.log[: places[read]])
        assert len(gone.follow(compacted(tail))) == 1  # several rounds at once
        assert_follows(gone, world.aggregator)


def test_models_that_serve_are_not_made_anew_where_they_are_known():
    world = World()
    world.round()
    shadow = world.follower.open_versions[0][1]
    world.round()
    assert world.follower.serving.canary is shadow
    world.round()
    assert world.follower.current is shadow


def damaged(log: Sequence[Record], prefix: bytes, change: Callable[[bytes], bytes | None]) -> list[Record]:
    """The last record with the prefix is changed."""
    place = max(k for k, record in enumerate(log) if record.key.startswith(prefix) and record.value is not None)
    value = log[place].value
    assert value is not None
    return [*log[:place], Record(log[place].key, change(value)), *log[place + 1 :]]


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


@pytest.mark.parametrize(
    ("prefix", "change", "reason"),
    [
        (b"m", flipped, "damaged"),
        (b"r/", flipped, "damaged"),
        (b"r/", lambda value: value[:-4], "damaged"),
        (b"p/", flipped, "damaged"),
        (b"p/", lambda _: None, "hash"),
        (b"r/", lambda _: None, "hash"),
        (b"d/", flipped, "damaged"),
        (b"d/", lambda _: None, "incomplete"),
        (b"n/", flipped, "damaged"),
        (b"n/", lambda _: b"", "damaged"),
        (b"m", lambda _: b"{}", "damaged"),
        (b"m", lambda _: sealed({"sequence": 1}), "shape"),
    ],
)
def test_what_does_not_verify_is_refused_and_serves_nobody(prefix, change, reason):
    world = World()
    world.round(new=True)
    world.round()
    served = replica(world.log)
    before = served.serving
    world.round()
    world.round()
    for log, follower in ((world.log, replica()), (compacted(world.log), replica())):
        with pytest.raises(MessageRefused) as refused:
            follower.read(damaged(log, prefix, change))
        assert refused.value.reason == reason
        assert follower.serving.model.meta_version == 0
    tail = list(world.log[len(world.log) - len(world.last.versions) :])
    whole = [record for record in world.log if record not in tail]
    served = replica(whole)
    before = served.serving
    if prefix != b"n/":  # the last round brought no items
        with pytest.raises(MessageRefused) as refused:
            served.follow(damaged(tail, prefix, change))
        assert refused.value.reason == reason
        assert served.serving == before
        if reason not in ("shape",) and prefix != b"m":
            with pytest.raises(MessageRefused, match="from its start"):
                served.follow(tail)
    again = replica(world.log)
    assert_follows(again, world.aggregator)


def test_a_number_that_was_changed_with_its_checksum_is_found_by_the_hash():
    world = World()
    for _ in range(4):
        world.round()
    model = meta_model()
    form = RowForm(model, moving(model, "everything")[0])
    last = next(record for record in reversed(world.log) if record.key.startswith(ROW) and record.value)
    item = last.key.removeprefix(ROW).decode()
    row = model.rows_named([item])
    excerpt = form.unpack([last.value or b""], row, 0)
    forged = excerpt.tensors["item_embedding"][0].copy()
    forged[0, 0] += 1e-3
    tensors = {**excerpt.tensors, "item_embedding": (forged, *excerpt.tensors["item_embedding"][1:])}
    record = form.pack(excerpt._replace(tensors=tensors), [item])[0]
    assert record.key == last.key
    with pytest.raises(MessageRefused, match="version 2 is refused") as refused:
        replica().read([record if each is last else each for each in world.log])
    assert refused.value.reason == "hash"


def test_a_marker_that_comes_again_or_from_before_is_refused():
    world = World()
    world.round()
    follower = replica(world.log)
    with pytest.raises(MessageRefused, match="follows 1") as refused:
        follower.follow(world.log)
    assert refused.value.reason == "order"
    assert_follows(follower, world.aggregator)  # nothing was taken in
    world.round()
    follower.follow(world.last.versions)
    assert_follows(follower, world.aggregator)


# --- formats --------------------------------------------------------------------------------------------------


def test_a_marker_comes_back_and_is_signed():
    world = World()
    world.round()
    marker = world.follower.marker
    assert marker is not None
    assert Marker.decode(marker.encode(None), None) == marker
    assert Marker.decode(marker.encode(KEY), KEY) == marker
    assert Marker.decode(marker.encode(KEY), None) == marker  # no key, no check
    for value, key in ((marker.encode(None), KEY), (marker.encode(b"other"), KEY)):
        with pytest.raises(MessageRefused) as refused:
            Marker.decode(value, key)
        assert refused.value.reason == "signature"
    content = json.loads(marker.encode(KEY))
    content["content"]["consumed"]["0"] = 5
    content.pop("sha256")
    forged = sealed(content["content"])
    with pytest.raises(MessageRefused, match="not signed"):
        Marker.decode(forged, KEY)


def test_a_marker_of_format_1_is_still_read():
    value = (
        b'{"content":{"canary_share":0.1,"consumed":{"0":9,"3":4},"current":{"items":12,"sha256":"ab","stage":"initial",'
        b'"version":0},"events":15,"model":"f0","moves":"biases","open":[{"items":13,"sha256":"cd","stage":"canary",'
        b'"version":2}],"round":2,"sequence":3,"task":{"distillation":0.0,"number":2,"recent_share":0.25,"users":256,'
        b'"version":2},"vocabulary":14},"format":1,"hmac":null,'
        b'"sha256":"4219a9cfe69d0f96da1a3a8710a282509e5d7409da636da59ffc15a2b6323430"}'
    )
    marker = Marker.decode(value, None)
    assert marker.encode(None) == value
    assert (marker.sequence, marker.head.version, marker.consumed) == (3, 2, {0: 9, 3: 4})
    assert marker.task is not None
    assert marker.task.users == 256


def test_json_of_another_format_is_refused():
    value = sealed({"a": 1})
    assert opened(value, "it") == {"a": 1}
    with pytest.raises(MessageRefused, match="format 2") as refused:
        opened(value.replace(b'"format":1', b'"format":2'), "it")
    assert refused.value.reason == "format"


def test_a_value_that_becomes_shorter_leaves_no_piece_behind():
    shelf = Shelf()
    long, short = np.random.default_rng(0).bytes(2_000_000), b"short"
    first = shelf.put(b"s/best", long)
    assert [record.key for record in first] == [piece_key(b"s/best", k) for k in range(3)]
    known = Shelf(dict(first))
    for each in (shelf, known):
        values = [record.value is None for record in each.put(b"s/best", short)]
        assert values == [False, True, True]
        assert [record.value for record in each.remove(b"s/best")] == [None]
        assert each.remove(b"s/best") == []


@pytest.mark.parametrize("moves", ["initialization", "biases", "everything"])
def test_rows_come_back_with_their_counts(moves):
    model = meta_model()
    tables, _ = moving(model, moves)
    form = RowForm(model, tables)
    rows = np.array([2, 5, 11])
    model.item_steps[5] = 3
    model.moments.get("item_bias", ())[0][5] = 0.25
    excerpt = model.excerpt(tables, rows)
    sent = form.pack(excerpt, [model.item_ids[k] for k in rows.tolist()])
    assert [record.key for record in sent] == [b"r/i2", b"r/i5", b"r/i11"]
    found = form.unpack([record.value or b"" for record in sent], rows, 7)
    assert found.steps == 7
    assert found.item_steps.tolist() == [0, 3, 0]
    assert found.item_events.tolist() == [12, 15, 21]
    assert list(found.tensors) == tables
    for name in tables:
        for one, other in zip(found.tensors[name], excerpt.tensors[name], strict=True):
            np.testing.assert_array_equal(one, other)
    value = sent[0].value or b""
    for wrong, reason in ((value + b"1234", "damaged"), (b"\2" + value[1:], "format")):
        with pytest.raises(MessageRefused) as refused:
            form.unpack([wrong], rows[:1], 7)
        assert refused.value.reason == reason


def test_a_row_of_other_tables_of_the_same_width_is_refused():
    model = meta_model()
    sent = RowForm(model, ["item_bias"]).pack(model.excerpt(["item_bias"], np.array([1])), ["i1"])
    with pytest.raises(MessageRefused, match="another model"):
        RowForm(model, ["item_bias_log_sigma"]).unpack([sent[0].value or b""], np.array([1]), 0)


def test_an_excerpt_is_put_back_and_its_undo_restores_what_was_there():
    model, other = meta_model(), meta_model()
    rows = np.array([1, 4])
    names = list(model.parameters)
    part = other.excerpt(names, rows)
    values = {n: (v + 1, m + 2, s + 3) for n, (v, m, s) in part.tensors.items()}
    changed = part._replace(tensors=values, item_events=part.item_events + 5, item_steps=part.item_steps + 1, steps=9)
    before = model.tensors()
    undo = model.put(changed)
    found = model.excerpt(names, rows)
    for name in names:
        for one, two in zip(found.tensors[name], values[name], strict=True):
            np.testing.assert_array_equal(one, two)
    assert (found.item_events.tolist(), found.steps) == ([16, 19], 9)
    untouched = np.array([0, 2, 3, *range(5, 12)])
    kept = model.excerpt(["item_embedding"], untouched).tensors["item_embedding"][0]
    np.testing.assert_array_equal(kept, other.excerpt(["item_embedding"], untouched).tensors["item_embedding"][0])
    take_back(model, undo)
    assert_same_tensors(model.tensors(), before)
    for wrong, match in (
        (replace_rows(changed, [1, 12]), "another vocabulary"),
        (replace_rows(changed, [-1, 4]), "another vocabulary"),
        (changed._replace(tensors={"log_weight": (np.zeros(2, np.float32),) * 3}), "log_weight is"),
        (changed._replace(tensors={"nothing": (np.zeros(2, np.float32),) * 3}), "no parameter"),
        (changed._replace(item_steps=part.item_steps[:1]), "has counts of"),
    ):
        with pytest.raises(ValueError, match=match):
            model.put(wrong)
    assert_same_tensors(model.tensors(), before)


def replace_rows(part, rows):
    return part._replace(rows=np.array(rows))


def test_a_vocabulary_is_extended_by_new_items_alone():
    model, other = meta_model(), meta_model()
    model.grow({"a": ("x|y",), "b": None})
    features = model.recommender.spec.item_features
    other.extend(["a", "b"], take_rows(features, np.array([12, 13])))
    assert other.item_ids == model.item_ids
    assert_same_tensors(other.tensors(), model.tensors())
    for again in (["b"], ["c", "c"]):
        with pytest.raises(ValueError, match="already"):
            other.extend(again, take_rows(features, np.arange(len(again))))
