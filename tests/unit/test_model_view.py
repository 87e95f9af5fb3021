"""The model beside the rows: what a reader finds in it is what the stream uses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.serving import ServingModel
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import RowLayout, item_hash, ring_item
from state.exceptions import StoreDamaged
from state.expiry import Expiry
from state.reading.model_view import CHUNK, FILE, Features, ModelView, Versions, write_model_view
from state.reading.sealed_tensors import SealedTensors, write_sealed
from tests.models import GRADES, HEADS, small_model

USERS = Catalogue(
    (FeatureField("plan", "categorical"),), {"free": ("free",), "free2": ("free",), "paid": ("paid",), "none": (None,)}
)


def featured_model(items=None):
    """``small_model`` whose items have a feature, too."""
    model = small_model()
    kind = FeatureEncoder.fit((FeatureField("kind", "categorical"),), [("a",), ("b",)])
    weights = np.random.default_rng(3).normal(size=(2, 6)).astype(np.float32)
    fixed = dataclasses.replace(model.fixed, item_encoder=kind, item_feature_weights=weights)
    return ServingModel(fixed, model.first, model.second, users=USERS, items=items, fingerprint="f" * 64)


def viewed(directory, model, days=None):
    layout = RowLayout.of(model.first, model.second, 4)
    write_model_view(directory, model, layout, days)
    return ModelView(directory)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_filters_come_back_to_the_bit(tmp_path, kind, second):
    model = small_model(kind, second=second, meta_version=3)
    view = viewed(tmp_path, model, 2.5)
    for held, made in ((view.first, model.first), (view.second, model.second)):
        assert (held is None) == (made is None)
        for field in dataclasses.fields(made) if made is not None else ():
            np.testing.assert_array_equal(getattr(held, field.name), getattr(made, field.name), strict=True)
    assert view.layout == RowLayout.of(model.first, model.second, 4)
    assert (view.meta_version, view.expiry) == (3, Expiry(216_000_000))
    assert [view.grade_value(k) for k in (0, 4, 5, 63)] == [GRADES[0], GRADES[4], None, None]


def test_items_are_the_rows_of_the_stream_and_an_unknown_one_has_the_unknown_row(tmp_path):
    model = small_model()
    view = viewed(tmp_path, model)
    ids = [f"i{k}" for k in range(12)] + ["stranger"]
    places = view.places(ids)
    rows = model.item_rows(ids, {}, settle=False)
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(view.items(places), name), getattr(model.items, name)[rows])
    assert [view.item_id(place) for place in places[:12].tolist()] == ids[:12]
    assert places[12] == view.item_count == 12


def test_items_of_the_catalogue_that_training_never_saw_are_scored_by_their_features(tmp_path):
    model = featured_model(Catalogue((FeatureField("kind", "categorical"),), {"new": ("b",), "i3": ("a",)}))
    view = viewed(tmp_path, model)
    assert view.item_count == 13
    row = model.item_rows(["new"], {})
    np.testing.assert_array_equal(view.items(view.places(["new"])).psi, model.items.psi[row])
    assert (view.items(view.places(["new"])).psi != view.items(view.places(["stranger"])).psi).any()


def test_items_that_a_run_met_are_there_with_the_features_they_came_with(tmp_path):
    model = featured_model()
    assert viewed(tmp_path, model).places(["met"])[0] == 12
    row = model.item_rows(["met", "bare"], {"kind": ("a", None)})
    view = viewed(tmp_path, model)
    assert view.item_count == 14
    np.testing.assert_array_equal(view.items(view.places(["met"])).psi, model.items.psi[row[:1]])
    assert view.item_id(view.place_of_ring_item(ring_item(item_hash("bare")))) == "bare"


def test_writing_it_settles_nothing_for_the_stream(tmp_path):
    catalogue = Catalogue((FeatureField("other", "categorical"),), {"new": ("x",)})
    untouched, written = featured_model(catalogue), featured_model(catalogue)
    viewed(tmp_path, written)
    rows = [model.item_rows(["new"], {"kind": ("a",)}) for model in (untouched, written)]
    np.testing.assert_array_equal(untouched.items.psi[rows[0]], written.items.psi[rows[1]])


def test_users_start_where_their_features_say(tmp_path):
    model = featured_model()
    view = viewed(tmp_path, model)
    for user in ("free", "free2", "paid", "none", "stranger"):
        np.testing.assert_array_equal(view.start(user).mean, model.initial_means([user], {})[0])
    assert view.start("stranger").mean.tobytes() == model.first.initialization.tobytes()
    assert view._tensors.length("start_hash") == 3
    assert view._tensors.length("start_mean") == 2


def test_ring_items_are_found_by_their_forty_bits(tmp_path):
    view = viewed(tmp_path, small_model())
    for k in range(12):
        assert view.item_id(view.place_of_ring_item(ring_item(item_hash(f"i{k}")))) == f"i{k}"
    assert view.place_of_ring_item(ring_item(item_hash("stranger"))) == view.item_count


def test_look_ups_agree_with_a_dictionary_in_a_catalogue_of_many(tmp_path):
    many = Catalogue((FeatureField("kind", "categorical"),), {f"n{k}é": ("ab"[k % 2],) for k in range(20_000)})
    model = featured_model(many)
    view = viewed(tmp_path, model)
    ids, table = model.named_items()
    asked = [*ids[::37], "", "n1", "n20000é"]
    places = view.places(asked)
    known = {item: k for k, item in enumerate(ids)}
    rows = [known.get(item, len(ids)) for item in asked]
    np.testing.assert_array_equal(view.items(places).base, table.base[rows])
    assert (places == view.item_count).tolist() == [item not in known for item in asked]
    walked = np.concatenate([rows.base for _, rows in view.chunks()])
    np.testing.assert_array_equal(np.sort(walked), np.sort(table.base[:-1]))
    assert [start for start, _ in view.chunks()] == [0, CHUNK, 2 * CHUNK]


def moved_on(model, number):
    """The same model as another version, all of whose starts differ."""
    initialization = model.first.initialization + np.float32(number)
    weights = model.fixed.user_feature_weights * np.float32(number)
    return model.successor(
        dataclasses.replace(model.fixed, user_feature_weights=weights, item_bias=model.fixed.item_bias + number),
        dataclasses.replace(model.first, initialization=initialization),
        dataclasses.replace(model.second, covariance=model.second.covariance * np.float32(number)), number,
    )  # fmt: skip


@pytest.mark.parametrize("user", ["free", "free2", "paid", "none", "stranger"])
def test_priors_are_those_of_each_version_at_hand(tmp_path, user):
    model = featured_model()
    versions = {number: moved_on(model, number) for number in (1, 2, 3)}
    layout = RowLayout.of(model.first, model.second, 4)
    write_model_view(tmp_path, versions[3], layout, None, Versions("closed", earlier=(versions[1], versions[2])))
    view = ModelView(tmp_path)
    assert view.priors(0, user) is None
    for number, version in versions.items():
        first, second = view.priors(number, user)
        np.testing.assert_array_equal(first.mean, version.initial_means([user], {}))
        np.testing.assert_array_equal(first.covariance, version.first.covariance)
        np.testing.assert_array_equal(second.mean[0], version.second.initialization)
        np.testing.assert_array_equal(second.covariance, version.second.covariance)
    given = SparseRows(np.array([0, 1]), np.array([0]), np.array([2], np.float32))
    started = view.priors(2, "stranger", Features(given.columns, given.weights))[0].mean
    np.testing.assert_array_equal(started, versions[2].means_of(given))


def test_priors_are_kept_where_the_stream_exchanges_them_only(tmp_path):
    model = featured_model()
    write_model_view(
        tmp_path, moved_on(model, 2), RowLayout.of(model.first, model.second, 4), None,
        Versions("ring", earlier=(moved_on(model, 1),)),
    )  # fmt: skip
    view = ModelView(tmp_path)
    assert (view.rebase, view.priors(1, "free")) == ("ring", None)


def test_the_canary_has_its_own_items_and_starts_and_its_share_of_the_users(tmp_path):
    model = featured_model()
    one, two = moved_on(model, 1), moved_on(model, 2)
    two.item_rows(["met"], {"kind": ("a",)})
    layout = RowLayout.of(model.first, model.second, 4)
    write_model_view(tmp_path, one, layout, None, Versions(canary=two, canary_share=0.3))
    view = ModelView(tmp_path)
    users = [f"u{k}" for k in range(1000)]
    canary = [view.serving(user).is_canary for user in users]
    assert 250 < sum(canary) < 350
    assert canary == drawn(user_crcs([user.encode() for user in users]), CANARY, 0.3).tolist()
    other = view.serving(users[canary.index(True)])
    assert (view.meta_version, other.meta_version, view.newest_version, other.newest_version) == (1, 2, 2, 2)
    assert (view.item_count, other.item_count) == (12, 13)
    for seen, made in ((view, one), (other, two)):
        places = seen.places(["i7"])
        np.testing.assert_array_equal(seen.items(places).base[0], made.items.base[7])
        np.testing.assert_array_equal(seen.start("paid").mean, made.initial_means(["paid"], {})[0])
        assert seen.item_id(int(places[0])) == "i7"


def test_a_way_onto_a_version_that_nobody_knows_is_refused(tmp_path):
    viewed(tmp_path, small_model())
    tensors = SealedTensors(tmp_path / FILE)
    names = [name for name in tensors._places if name not in ("checks", "padding")]
    copied = {name: tensors.whole(name).copy() for name in names}
    metadata = {name: text for name, text in tensors.metadata.items() if name != "seal"}
    write_sealed(tmp_path / FILE, copied, {**metadata, "rebase": "teleport"})
    with pytest.raises(StoreDamaged, match="brings rows onto a version by 'teleport': use the version of coldstream"):
        ModelView(tmp_path)


def test_a_file_of_another_kind_or_version_is_refused(tmp_path):
    for metadata, message in (
        ({"format": "another"}, "is another of version unknown"),
        ({"format": "coldstream model view", "format_version": "9"}, "of version 9, this program reads .* version 1"),
        ({"format": "coldstream model view", "format_version": "1", "layout": "rows"}, "names no layout of rows"),
    ):
        write_sealed(tmp_path / FILE, {"x": np.zeros(1)}, metadata)
        with pytest.raises(StoreDamaged, match=message):
            ModelView(tmp_path)


def test_a_damaged_one_is_refused(tmp_path):
    viewed(tmp_path, small_model())
    packed = bytearray((tmp_path / FILE).read_bytes())
    packed[len(packed) // 2] ^= 4
    (tmp_path / FILE).write_bytes(packed)
    with pytest.raises(StoreDamaged, match=r"model.safetensors .*damaged or foreign"):
        ModelView(tmp_path)


def test_todays_file_is_the_golden_one_and_the_golden_one_is_read(tmp_path, pytestconfig):
    golden = Path(__file__).parents[1] / "golden" / "model-view-v1.safetensors"
    model = small_model(meta_version=3)
    viewed(tmp_path, model, 2.5)
    written = (tmp_path / FILE).read_bytes()
    if pytestconfig.getoption("--write-golden"):
        golden.write_bytes(written)
    assert written == golden.read_bytes()
    (tmp_path / "old").mkdir()
    shutil.copyfile(golden, tmp_path / "old" / FILE)
    view = ModelView(tmp_path / "old")
    assert (view.item_count, view.meta_version) == (12, 3)
    np.testing.assert_array_equal(view.items(view.places(["i7"])).psi[0], model.items.psi[7])
    started = view.start_of("u1", Features(np.array([1]), np.array([2], np.float32)))
    expected = model.means_of(SparseRows(np.array([0, 1]), np.array([1]), np.array([2], np.float32)))
    assert started.mean.tobytes() == expected[0].tobytes()


def test_a_view_without_user_weights_is_read_and_knows_the_starts_of_the_catalogue(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "model-view-v1-without-user-weights.safetensors"
    shutil.copyfile(golden, tmp_path / FILE)
    view = ModelView(tmp_path)
    assert (view.item_count, view.meta_version) == (12, 3)
    features = Features(np.array([1]), np.array([2], np.float32))
    assert view.start_of("u1", features).same_bits(view.start("u1"))
    assert view.start("u1", features).same_bits(view.start("u1"))
    assert (view.rebase, view.newest_version, view.serving("u1")) == ("history", 3, view)
    assert view.priors(2, "u1") is None
