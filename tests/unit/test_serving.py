"""The model as the stream uses it, from version to version: items by hash, items met, and users' starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learner import serving
from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.serving import HashedItems, ServingModel, raw_features
from tests.meta_models import ring_items
from tests.models import ITEMS, f32, small_model

TAGS = FeatureField("tags", "multi")
WIDTH = 6
"""D of ``small_model``"""
LISTED = Catalogue((TAGS,), {"listed": ("x",), "i3": ("y",)})


def model(*, items: Catalogue | None = None, users: Catalogue | None = None, version: int = 0) -> ServingModel:
    """``small_model`` with the item tags x and y, which no item of the vocabulary has."""
    plain = small_model()
    weights = f32(np.random.default_rng(4).normal(size=(2, WIDTH)))
    encoder = FeatureEncoder.fit((TAGS,), [("x",), ("y",)])
    fixed = replace(plain.fixed, item_encoder=encoder, item_feature_weights=weights)
    return ServingModel(fixed, plain.first, plain.second, items=items, users=users, meta_version=version,
                        fingerprint="abc")  # fmt: skip


def met(made: ServingModel) -> ServingModel:
    """After the stream brought a listed item, a tagged one, and one without features."""
    made.item_rows(["listed", "i1", "tagged", "plain"], {"tags": (None, None, "x|y", None)})
    return made


UNKNOWN = ITEMS
"""The row after the vocabulary"""
ASKED = ("i0", "i11", "listed", "tagged", "plain", "never")


# --- items by hash --------------------------------------------------------------------------------------------


def test_items_of_the_vocabulary_items_met_and_unknown_ones_have_their_rows():
    made = model(items=LISTED)
    assert made.rows_of(ring_items(ASKED)).tolist() == [0, 11, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]
    met(made)
    assert made.rows_of(ring_items(ASKED)).tolist() == [0, 11, 13, 14, UNKNOWN, UNKNOWN]
    assert made.rows_of(ring_items(ASKED)).tolist() == made.item_rows(ASKED, {}).tolist()
    assert made.rows_of(ring_items([])).tolist() == []
    assert made.rows_of(ring_items(["i4"] * 3 + ["tagged"])).tolist() == [4, 4, 4, 14]


def test_asking_by_hash_settles_nothing():
    made = model(items=LISTED)
    made.rows_of(ring_items(["listed", "never"]))
    assert made.met_items == {}
    assert made.item_count == ITEMS + 1
    # what was asked for without being settled is still unknown by hash
    assert made.item_rows(["later"], {}, settle=False).tolist() == [UNKNOWN]
    made.item_rows(["later"], {"tags": ("y",)})
    assert made.rows_of(ring_items(["later"])).tolist() == [13]


def test_of_items_with_one_hash_the_first_stays(monkeypatch):
    names = {"a": 7 << 24, "b": 7 << 24, "c": 9 << 24, "d": 9 << 24, "e": 7 << 24}
    monkeypatch.setattr(serving, "item_hash", names.__getitem__)
    items = HashedItems(["a", "b"])
    items.add("c", 2)
    items.add("d", 3)
    items.add("e", 4)
    assert items.rows(np.array([7, 9, 8], np.uint64)).tolist() == [0, 2, -1]


@pytest.mark.parametrize("vocabulary", [[], ["i0"]])
def test_items_can_be_added_before_and_after_the_first_question(vocabulary):
    items = HashedItems(vocabulary)
    items.add("n0", 5)
    assert items.rows(ring_items(["n0", "n1", "i0"])).tolist() == [5, -1, 0 if vocabulary else -1]
    items.add("n1", 6)
    assert items.rows(ring_items(["n0", "n1"])).tolist() == [5, 6]
    assert HashedItems(vocabulary).rows(ring_items(["n0"])).tolist() == [-1]


def test_every_one_of_many_items_is_found():
    ids = [f"item {k}" for k in range(5_000)]
    items = HashedItems(ids[:3_000])
    for row, item in enumerate(ids[3_000:], 3_000):
        items.add(item, row)
    order = np.random.default_rng(0).permutation(5_000)
    np.testing.assert_array_equal(items.rows(ring_items([ids[k] for k in order])), order)


# --- the next version -----------------------------------------------------------------------------------------


def moved(made: ServingModel, seed: int = 1) -> ServingModel:
    """A version 5 with other item embeddings, other features' weights and another start."""
    rng = np.random.default_rng(seed)
    fixed = replace(
        made.fixed, item_embedding=f32(rng.normal(size=made.fixed.item_embedding.shape)),
        item_feature_weights=f32(rng.normal(size=(2, WIDTH))),
    )  # fmt: skip
    return made.successor(fixed, replace(made.first, initialization=made.first.initialization + 1), made.second, 5)


def test_items_met_are_met_in_the_next_version_with_the_features_they_came_with():
    old = met(model(items=LISTED))
    new = moved(old)
    assert list(old.met_items.items()) == [("listed", ("x",)), ("tagged", ("x|y",)), ("plain", None)]
    assert list(new.met_items.items()) == list(old.met_items.items())
    assert new.rows_of(ring_items(ASKED)).tolist() == [0, 11, 13, 14, UNKNOWN, UNKNOWN]
    fixed = new.fixed
    e = fixed.item_feature_weights.sum(0, dtype=float)
    np.testing.assert_allclose(
        new.items.psi[14, 1:], e @ fixed.projection + fixed.projection_bias, rtol=1e-5, atol=1e-6
    )
    # later features are not those of the first event
    assert new.item_rows(["plain", "tagged"], {"tags": ("x", "y")}).tolist() == [UNKNOWN, 14]


def test_the_next_version_serves_what_one_that_met_the_items_itself_would():
    new = moved(met(model(items=LISTED)))
    alone = met(moved(model(items=LISTED)))
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(new.items, name), getattr(alone.items, name), err_msg=name)
    assert new.item_count == alone.item_count == ITEMS + 3


def test_the_old_version_goes_on_as_it_was():
    old = met(model(items=LISTED))
    psi, start = old.items.psi.copy(), old.initial_means(["a"], {})
    new = moved(old)
    new.item_rows(["after"], {"tags": ("y",)})
    np.testing.assert_array_equal(old.items.psi, psi)
    np.testing.assert_array_equal(old.initial_means(["a"], {}), start)
    np.testing.assert_allclose(new.initial_means(["a"], {}), start + 1, rtol=1e-6)
    assert "after" not in old.met_items
    assert (old.meta_version, new.meta_version) == (0, 5)
    assert new.fingerprint == "abc"


def test_items_met_that_joined_the_vocabulary_have_a_row_of_their_own_there():
    old = met(model(items=LISTED))
    fixed = old.fixed
    rows = fixed.item_embedding
    grown = replace(
        fixed, item_ids=(*fixed.item_ids, "plain", "fresh"),
        item_embedding=np.concatenate([rows, f32(np.ones((2, WIDTH)))]),
        item_bias=np.append(fixed.item_bias, f32(np.zeros(2))),
        item_features=SparseRows(np.zeros(ITEMS + 3, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)),
    )  # fmt: skip
    new = old.successor(grown, old.first, old.second, 1)
    assert new.item_rows(["plain", "fresh", "i1"], {}).tolist() == [12, 13, 1]
    assert new.rows_of(ring_items(["plain", "fresh", "never", "listed", "tagged"])).tolist() == [12, 13, 14, 15, 16]
    assert list(new.met_items) == ["listed", "tagged"]
    np.testing.assert_array_equal(new.items.psi[[14, 15, 16]], old.items.psi[[12, 13, 14]])
    np.testing.assert_array_equal(new.items.psi[12], new.items.psi[13])


def test_catalogues_go_along():
    users = Catalogue((FeatureField("plan", "categorical"),), {"u": ("paid",)})
    old = model(items=LISTED, users=users)
    new = moved(old)
    np.testing.assert_array_equal(
        new.initial_means(["u"], {})[0], new.first.initialization + new.fixed.user_feature_weights[1]
    )
    assert new.item_rows(["listed"], {}).tolist() == [13]
    assert new.met_items == {"listed": ("x",)}
    assert old.met_items == {}


# --- users' starts --------------------------------------------------------------------------------------------


def test_starts_by_encoded_features_are_those_by_id():
    users = Catalogue((FeatureField("plan", "categorical"),), {"a": ("free",), "b": ("paid",), "c": ("other",)})
    made = model(users=users)
    ids, carried = ["a", "b", "c", "d", "e"], {"plan": (None, None, None, "paid", None)}
    features = made.user_features(ids, carried)
    assert features.starts.tolist() == [0, 1, 2, 2, 3, 3]
    assert features.columns.tolist() == [0, 1, 1]
    assert features.weights.tolist() == [1, 1, 1]
    means = made.means_of(features)
    np.testing.assert_array_equal(means, made.initial_means(ids, carried))
    phi, W = made.first.initialization, made.fixed.user_feature_weights
    np.testing.assert_array_equal(means, np.array([phi + W[0], phi + W[1], phi, phi + W[1], phi]))


def test_nobody_has_no_start_and_a_model_without_features_gives_everybody_the_same():
    made = model()
    assert made.means_of(made.user_features([], {})).shape == (0, 5)
    plain = ServingModel(
        replace(made.fixed, user_encoder=FeatureEncoder(), user_feature_weights=f32(np.zeros((0, 5)))),
        made.first, made.second,
    )  # fmt: skip
    features = plain.user_features(["a", "b"], {"plan": ("free", "paid")})
    assert len(features) == 2
    assert not len(features.columns)
    np.testing.assert_array_equal(plain.means_of(features), np.tile(made.first.initialization, (2, 1)))


def test_raw_features_without_any_text_are_none():
    fields = (FeatureField("plan", "categorical"), TAGS)
    assert raw_features(fields, LISTED, ["listed", "i3", "never"], range(3), {"plan": (None, "paid", None)}) == [
        (None, "x"), ("paid", "y"), None,
    ]  # fmt: skip
