"""Sums are the same however users are split, and whatever was stepped is taken back to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.histories import Histories
from learner.meta_model import MetaModel, Undo
from learner.meta_update import GradientSum, add, check, gradient_sum, take_back, take_step
from tests.meta_models import VOCABULARY, assert_same_tensors, by_hand, histories, meta_model

USERS = 7
NEW = tuple(f"new {k}" for k in range(4))


@cache
def silent() -> tuple[MetaModel, Histories, GradientSum]:
    """(a model without noise, histories with unknown items among them, their sum)"""
    model = meta_model(silent=True)
    users, _ = histories(model, (9, 1, 14, 5, 2, 30, 4), (*VOCABULARY[:9], "unheard"))
    return model, users, gradient_sum(model, 2, users, "everything", seed=[0], ordinal=0.5)


@given(part=st.lists(st.integers(0, 3), min_size=USERS, max_size=USERS))
@settings(max_examples=25)
def test_sums_of_users_in_any_parts_are_the_sum_of_all(part):
    model, users, whole = silent()
    groups = [np.flatnonzero(np.array(part) == k) for k in sorted(set(part))]
    total = add([
        gradient_sum(model, 2, users.take(group), "everything", seed=[0], ordinal=0.5) for group in groups
    ])  # fmt: skip
    check(total, model, 2, "everything")
    assert (total.users, total.events) == (whole.users, whole.events)
    assert abs(total.log_loss - whole.log_loss) < 1e-4 * whole.log_loss
    place = [total.item_ids.index(item) for item in whole.item_ids]
    assert len(total.item_ids) == len(place)
    np.testing.assert_array_equal(total.item_events[place], whole.item_events)
    for name, gradient in {**whole.dense, **whole.tables}.items():
        found = total.tables[name][place] if name in total.tables else total.dense[name]
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=5e-5, err_msg=name)


STEPS = st.lists(
    st.one_of(
        st.just("back"),
        st.tuples(
            st.sets(st.sampled_from((*VOCABULARY[:5], *NEW)), min_size=1, max_size=4), st.sampled_from((0.0, 0.6)),
            st.sampled_from((1.0, 3000.0)),
        ),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(steps=STEPS)
@settings(max_examples=40)
def test_whatever_was_stepped_is_taken_back_to_the_bit(steps):
    model = meta_model()
    stack: list[tuple[Undo, dict[str, np.ndarray]]] = []
    for number, step in enumerate(steps):
        if step == "back":
            if stack:
                undo, before = stack.pop()
                take_back(model, undo)
                assert_known_rows(model, before)
            continue
        items, kl_weight, scale = step
        named = tuple(sorted(items))
        gradient = by_hand(model, named, scale=scale, seed=number)
        gradient = replace(gradient, new_items={i: ("y",) for i in named if i in NEW}, seen=dict.fromkeys(named, 2))
        before = model.tensors()
        stack.append((take_step(model, gradient, "everything", rate=0.05, kl_weight=kl_weight).undo, before))
    for undo, before in reversed(stack):
        take_back(model, undo)
        assert_known_rows(model, before)
    untouched = meta_model()
    untouched.grow(dict.fromkeys(model.item_ids[len(VOCABULARY) :], ("y",)))
    assert_same_tensors(model.tensors(), untouched.tensors())


def assert_known_rows(model: MetaModel, before: dict[str, np.ndarray]) -> None:
    """What there was then is as it was."""
    now = model.tensors()
    for name, array in before.items():
        found = now[name][: len(array)] if array.ndim else now[name]
        np.testing.assert_array_equal(found, array, err_msg=name)
