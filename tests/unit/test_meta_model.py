"""A version as the online stage has it: it serves what was trained, grows by items, comes back from its tensors."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from learner import recommender
from learner.meta_model import MetaModel
from learner.meta_update import take_step
from learner.recommender import ITEM_TABLES, NEW_LOG_SIGMA
from learner.serving import ServingModel
from tests.meta_models import (
    ITEM_COUNT,
    ITEMS,
    USERS,
    VOCABULARY,
    artifact,
    assert_same_tensors,
    by_hand,
    meta_model,
    ring_items,
    settings,
)
from tests.models import HEADS

GROWN = {"tagged": ("x|y",), "strange": ("unheard",), "plain": None, "half": ("y",)}


def assert_same_parts(found, expected) -> None:
    """Of fixed part or filter, whatever is an array or a number."""
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray | float | str | tuple):
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(("second", "graded"), [(False, False), (True, True)])
@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_one_serves_the_bits_of_the_trained_model(head, second, graded):
    trained = artifact(settings(head, second=second, graded=graded))
    fixed, first, second_filter = MetaModel(trained, np.ones(ITEM_COUNT, np.int64)).parts()
    ours, theirs = ServingModel(fixed, first, second_filter, users=USERS, items=ITEMS), trained.serving(USERS, ITEMS)
    assert_same_parts(fixed, trained.fixed)
    assert_same_parts(first, trained.first)
    assert (second_filter is None) == (trained.second is None)
    if trained.second is not None:
        assert_same_parts(second_filter, trained.second)
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(ours.items, name), getattr(theirs.items, name), err_msg=name)
    ids = ["u0", "u1", "nobody"]
    np.testing.assert_array_equal(ours.initial_means(ids, {}), theirs.initial_means(ids, {}))


def test_a_fresh_one_has_taken_no_step():
    model = meta_model()
    tensors = model.tensors()
    assert model.item_ids == list(VOCABULARY)
    assert model.steps == 0
    assert tensors["counts.steps"].tolist() == [0]
    assert tensors["counts.item_steps"].tolist() == [0] * ITEM_COUNT
    assert tensors["counts.item_events"].tolist() == list(range(10, 22))
    assert not any(array.any() for name, array in tensors.items() if name.startswith("moments."))
    assert model.finite()


def test_ordinal_grades_that_the_stream_does_not_read_are_no_grades_of_the_model():
    learner = settings(graded=False).model_copy(update={"ordinal_auxiliary": 0.5})
    model = MetaModel(artifact(learner), np.ones(ITEM_COUNT, np.int64))
    assert not model.graded
    assert model.parameters["ordinal_item"].shape == (ITEM_COUNT, 4)


def test_items_are_found_by_hash_and_by_name():
    model = meta_model()
    model.grow(GROWN)
    asked = ["half", "i3", "never", "tagged", "i0"]
    assert model.rows_of(ring_items(asked)).tolist() == [15, 3, -1, 12, 0]
    assert model.rows_named(asked).tolist() == [15, 3, -1, 12, 0]
    assert model.rows_of(ring_items([])).tolist() == []
    assert model.lacks({"never": ("x",), "plain": None, "i1": None}) == {"never": ("x",)}


def test_growth_keeps_the_rows_that_are_there_and_adds_items_of_which_nothing_is_known():
    model = meta_model()
    take_step(model, by_hand(model), "everything", rate=0.01, kl_weight=0.5)
    before = model.tensors()
    model.grow({"i4": ("y",), **GROWN})  # i4 stays as it is
    after = model.tensors()
    assert model.item_ids == [*VOCABULARY, *GROWN]
    for name, array in before.items():
        grows = name.split(".", 1)[1].removeprefix("first.").removeprefix("second.") in ITEM_TABLES
        if not grows and name not in ("counts.item_events", "counts.item_steps"):
            if name.startswith("features."):
                continue
            np.testing.assert_array_equal(after[name], array, err_msg=name)
            continue
        assert len(after[name]) == ITEM_COUNT + 4
        np.testing.assert_array_equal(after[name][:ITEM_COUNT], array, err_msg=name)
        fresh = NEW_LOG_SIGMA.get(name.removeprefix("parameters."), 0.0)
        np.testing.assert_array_equal(after[name][ITEM_COUNT:], np.full_like(after[name][ITEM_COUNT:], fresh))
    again = model.tensors()
    model.grow({**GROWN, "i1": None})
    assert_same_tensors(model.tensors(), again)


@pytest.mark.parametrize("dense", [True, False])
def test_a_grown_item_serves_the_bits_of_one_that_the_stream_brought(dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(recommender, "DENSE_FEATURE_COLUMNS", 1)
    model = meta_model()
    model.grow({"tagged": GROWN["tagged"]})
    model.grow(GROWN)
    assert model.recommender.dense_features == dense
    grown, met = ServingModel(*model.parts()), ServingModel(*meta_model().parts())
    event_features = {"tags": tuple(None if raw is None else raw[0] for raw in GROWN.values())}
    ours, theirs = grown.item_rows(list(GROWN), {}), met.item_rows(list(GROWN), event_features)
    assert ours.tolist() == [12, 13, 14, 15]
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(grown.items, name)[ours], getattr(met.items, name)[theirs], err_msg=name)
        np.testing.assert_array_equal(getattr(grown.items, name)[:12], getattr(met.items, name)[:12], err_msg=name)


def test_a_version_comes_back_from_its_tensors_in_a_model_that_has_gone_on():
    model = meta_model()
    take_step(model, by_hand(model, ("i1", "i5"), seed=1), "everything", rate=0.02, kl_weight=0.5)
    model.grow({"tagged": ("x|y",)})
    version, ids = model.tensors(), list(model.item_ids)
    take_step(model, by_hand(model, ("i1", "tagged"), seed=2), "everything", rate=0.02, kl_weight=0.5)
    model.grow({"later": ("y",)})
    take_step(model, by_hand(model, ("later",), seed=3), "everything", rate=0.02, kl_weight=0.5)

    model.load(version, ids)

    assert model.item_ids == [*ids, "later"]
    other = meta_model()
    take_step(other, by_hand(other, ("i1", "i5"), seed=1), "everything", rate=0.02, kl_weight=0.5)
    other.grow({"tagged": ("x|y",)})
    other.grow({"later": ("y",)})
    assert_same_tensors(model.tensors(), other.tensors())
    assert other.steps == model.steps == 1


def test_a_version_comes_back_in_a_model_that_has_never_heard_of_its_items():
    model, fresh = meta_model(), meta_model()
    model.grow(GROWN)
    take_step(model, by_hand(model, ("i1", "tagged"), seed=1), "everything", rate=0.02, kl_weight=0.5)
    fresh.load(model.tensors(), model.item_ids)
    assert fresh.item_ids == model.item_ids
    assert_same_tensors(fresh.tensors(), model.tensors())
    ours, theirs = ServingModel(*fresh.parts()), ServingModel(*model.parts())
    for name in ("psi", "base", "second_psi"):
        np.testing.assert_array_equal(getattr(ours.items, name), getattr(theirs.items, name), err_msg=name)
    # and goes on as the other does
    for each in (fresh, model):
        take_step(each, by_hand(each, ("half", "i2"), seed=2), "everything", rate=0.02, kl_weight=0.5)
    assert_same_tensors(fresh.tensors(), model.tensors())


def test_an_item_has_the_features_that_the_version_gives_it():
    model, other = meta_model(), meta_model()
    model.grow({"tagged": ("x|y",), "half": ("y",)})
    other.grow({"tagged": None})
    other.load(model.tensors(), model.item_ids)
    assert_same_tensors(other.tensors(), model.tensors())
    # and items that the version does not have keep theirs
    model.grow({"later": ("y",), "last": None})
    version, ids = other.tensors(), list(other.item_ids)
    model.load(version, ids)
    features = model.recommender.spec.item_features
    assert features.columns[features.starts[12] :].tolist() == [0, 1, 1, 1]
    assert np.diff(features.starts[12:]).tolist() == [2, 1, 1, 0]
    assert model.item_ids[12:] == ["tagged", "half", "later", "last"]


def test_what_a_version_is_made_of_is_a_copy():
    model = meta_model()
    tensors = model.tensors()
    kept = {name: array.copy() for name, array in tensors.items()}
    fixed = model.parts()[0]
    embedding = fixed.item_embedding.copy()
    take_step(model, by_hand(model), "everything", rate=0.1, kl_weight=0.5)
    assert_same_tensors(tensors, kept)
    np.testing.assert_array_equal(fixed.item_embedding, embedding)
    model.load(tensors, VOCABULARY)
    take_step(model, by_hand(model), "everything", rate=0.1, kl_weight=0.5)
    assert_same_tensors(tensors, kept)


@pytest.mark.parametrize("ids", [("i1", "i0", *VOCABULARY[2:]), ("other",), (*VOCABULARY[:11], "i99", "i11")])
def test_a_version_of_another_model_is_refused(ids):
    model = meta_model()
    before = model.tensors()
    with pytest.raises(ValueError, match="made by another model"):
        model.load(before, ids)
    assert_same_tensors(model.tensors(), before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_none_shows(value):
    model = meta_model()
    assert model.finite()
    model.parameters["item_bias"].data[7] = value
    assert not model.finite()
