"""Items that training has not seen: their features speak, and how the stream is cut changes no bit of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.interactions import FeatureColumn, Interactions
from learner.serving import ServingModel
from state.memory_store import MemoryUserStore
from streams.processor import Predictions, Processor
from tests.models import f32, small_model

TAGS = FeatureField("tags", "multi")
WIDTH = 6
"""D, of ``small_model``'s item embedding"""


def tagged_model(catalogue: Catalogue | None = None) -> ServingModel:
    """``small_model`` with the item tags x and y, which no item of the vocabulary has."""
    plain = small_model(second=False)
    weights = f32(np.random.default_rng(4).normal(size=(2, WIDTH)))
    encoder = FeatureEncoder.fit((TAGS,), [("x",), ("y",)])
    fixed = replace(plain.fixed, item_encoder=encoder, item_feature_weights=weights)
    return ServingModel(fixed, plain.first, None, items=catalogue)


def processor(model: ServingModel) -> Processor:
    return Processor(model, lambda _, layout: MemoryUserStore(layout), StateSettings(ring=2))


def events(users: list[str], items: list[str], tags: list[str | None] | None = None, first: int = 0) -> Interactions:
    """Label 1 throughout; each item's tags are those at its first event, as a source gives them."""
    n = len(users)
    plain = Interactions.from_columns(users, items, [1] * n, [7] * n, offsets=list(range(first, first + n)))
    if tags is None:
        return plain
    column: FeatureColumn = tuple(tags[items.index(item)] for item in plain.item_ids)
    return replace(plain, item_features={"tags": column})


def first_logit(model: ServingModel, psi: np.ndarray, base: float) -> float:
    """A new user's first logit for an item, in closed form."""
    lower = np.zeros((5, 5))
    lower[np.tril_indices(5)] = model.first.covariance
    covariance = lower + np.tril(lower, -1).T
    return float((base + model.first.initialization @ psi) / np.sqrt(1 + model.first.kappa * psi @ covariance @ psi))


def expected_logit(model: ServingModel, columns: list[int]) -> float:
    """For an item whose embedding is the sum of its feature columns alone."""
    fixed = model.fixed
    e = fixed.item_feature_weights[columns].sum(axis=0, dtype=float) if columns else np.zeros(WIDTH)
    psi = np.append(1, e @ fixed.projection + fixed.projection_bias)
    return first_logit(model, psi, float(e @ fixed.base_weight + fixed.base_bias))


@pytest.mark.parametrize(("tags", "columns"), [("x", [0]), ("y|x", [0, 1]), ("x|unheard", [0]), ("unheard", [])])
def test_an_unseen_item_is_predicted_by_its_features(tags, columns):
    carried = tagged_model()
    listed = tagged_model(Catalogue((TAGS,), {"new": (tags,)}))
    expected = expected_logit(carried, columns)
    found = processor(carried).process(0, events(["a"], ["new"], [tags])).logit
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    np.testing.assert_array_equal(processor(listed).process(0, events(["a"], ["new"])).logit, found)


def test_unseen_items_without_features_share_the_base_bias_and_one_row():
    model = tagged_model()
    known = model.item_count
    found = processor(model).process(0, events(["a", "b"], ["new", "other"], [None, None]))
    np.testing.assert_allclose(found.logit, [expected_logit(model, [])] * 2, rtol=1e-5)
    assert model.item_count == known


def test_the_catalogue_speaks_before_the_event():
    model = tagged_model(Catalogue((TAGS,), {"new": ("y",)}))
    found = processor(model).process(0, events(["a"], ["new"], ["x"]))
    np.testing.assert_allclose(found.logit, [expected_logit(model, [1])], rtol=1e-5)


@pytest.mark.parametrize("tags", [[None, "x", None], ["x", None, "y"], ["x", "y", None]])
def test_an_items_features_are_those_of_its_first_event_however_the_stream_is_cut(tags):
    users, items = ["a", "b", "c"], ["new"] * 3
    whole = processor(tagged_model()).process(0, events(users, items, tags))
    cut = processor(tagged_model())
    one_by_one: list[Predictions] = [cut.process(0, events([users[k]], ["new"], [tags[k]], first=k)) for k in range(3)]
    np.testing.assert_array_equal(whole.logit, np.concatenate([p.logit for p in one_by_one]))
    np.testing.assert_array_equal(whole.logit[1:], whole.logit[:1].repeat(2))


def test_asking_without_features_does_not_settle_what_an_item_is():
    model = tagged_model()
    work = processor(model)
    asked = work.predict(0, events(["a"], ["new"], [None]))
    learned = work.process(0, events(["a"], ["new"], ["x"]))
    np.testing.assert_allclose(asked.logit, [expected_logit(model, [])], rtol=1e-5)
    np.testing.assert_allclose(learned.logit, [expected_logit(model, [0])], rtol=1e-5)


def test_many_new_items_grow_the_table_and_keep_the_rows_of_the_old():
    model = tagged_model()
    before = model.items.psi[: model.item_count].copy()
    ids = [f"n{k}" for k in range(3_000)]
    rows = model.item_rows(ids, {"tags": tuple("xy"[k % 2] for k in range(3_000))})
    assert rows.tolist() == list(range(len(before), len(before) + 3_000))
    np.testing.assert_array_equal(model.items.psi[: len(before)], before)
    np.testing.assert_array_equal(model.items.psi[rows[2::2]], model.items.psi[rows[:1]].repeat(1_499, axis=0))
    np.testing.assert_array_equal(model.item_rows(ids, {}), rows)


def test_features_of_the_vocabulary_are_part_of_its_rows():
    model = tagged_model()
    n = len(model.fixed.item_ids)
    features = SparseRows(np.arange(n + 1), np.zeros(n, np.int64), np.full(n, 2, np.float32))
    tagged = ServingModel(replace(model.fixed, item_features=features), model.first, None)
    e = model.fixed.item_embedding.astype(float) + 2 * model.fixed.item_feature_weights[0]
    np.testing.assert_allclose(
        tagged.items.psi[:n, 1:], e @ model.fixed.projection + model.fixed.projection_bias, rtol=1e-5, atol=1e-6
    )
