"""One round of the online stage: its gradients are autograd's, its step is Adam's, and it can be undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from learner import recommender
from learner.features import Catalogue
from learner.histories import Histories
from learner.meta_model import MetaModel
from learner.meta_training import MetaTrainer, prepare
from learner.meta_update import (
    BETA_1,
    LOSS_SCALE,
    UNSETTLED_SHARE,
    WARM_UP_STEPS,
    GradientRefused,
    GradientSum,
    add,
    check,
    gradient_sum,
    moves_with,
    take_back,
    take_step,
)
from learner.recommender import ITEM_TABLES, PackedSequences, Recommender, gaussian_kl
from tests.meta_models import (
    ITEM_COUNT,
    MOSTLY_NEW,
    TRAINING,
    VOCABULARY,
    artifact,
    assert_same_tensors,
    by_hand,
    histories,
    meta_model,
    ring_items,
    settings,
    taste_events,
)
from tests.models import HEADS

LENGTHS = (9, 1, 14, 5)
REDUNDANT = (False, False, True, False)
"""``tests.meta_models`` likes grades 4 and 5: the third of four thresholds says the same as the label"""


# --- gradients ------------------------------------------------------------------------------------------------


def whole(model: MetaModel, extra: int = 0) -> Recommender:
    """The means of the model over its whole vocabulary, and ``extra`` items after it of which nothing is known."""
    spec = model.recommender.spec
    starts = np.append(spec.item_features.starts, np.repeat(spec.item_features.starts[-1:], extra))
    names = (*spec.item_ids, *(f"extra {k}" for k in range(extra)))
    made = Recommender(replace(spec, item_ids=names, item_features=replace(spec.item_features, starts=starts)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            held = model.parameters[name]
            if name in ITEM_TABLES:
                parameter.zero_()
                parameter[: len(held)] = held
            else:
                parameter.copy_(held)
    return made.eval()


def packed(made: Recommender, given: Histories, items: list[str], graded: bool) -> PackedSequences:
    """The batch, event by event; items that the vocabulary lacks are the one after it."""
    row = {item: k for k, item in enumerate(made.spec.item_ids)}
    index, columns, weights = [], [], []
    for user in range(len(given)):
        index += [int(given.first[user]) + k for k in range(int(given.starts[user + 1] - given.starts[user]))]
        own = given.features.columns[given.features.starts[user] : given.features.starts[user + 1]].tolist()
        columns.append(own or [0])
        weights.append([1.0] if own else [0.0])
    none = len(made.spec.grades)
    grade = [none if not graded or g == 63 else g for g in given.grade.tolist()]
    return PackedSequences(
        torch.tensor(given.starts), torch.tensor([row.get(i, len(row) - 1) for i in items]),
        torch.tensor(given.label.tolist(), dtype=torch.float32), torch.tensor(grade),
        torch.tensor(index, dtype=torch.float32), torch.tensor(columns), torch.tensor(weights),
    )  # fmt: skip


def autograd(
    model: MetaModel,
    given: Histories,
    items: list[str],
    *,
    extra: int = 0,
    ordinal: float = 0.0,
    teacher: np.ndarray | None = None,
    distillation: float = 0.0,
) -> tuple[float, dict[str, np.ndarray]]:
    """(log-loss, gradients) of one backward pass through the whole model, none of it by the module under test."""
    made = whole(model, extra)
    batch = packed(made, given, items, model.graded)
    unrolled = made(batch)
    log_loss = F.binary_cross_entropy_with_logits(unrolled.logit, batch.label, reduction="sum")
    loss = log_loss
    if ordinal:
        loss = loss + ordinal * made.ordinal_loss(batch, unrolled, torch.tensor(REDUNDANT))
    if teacher is not None:
        p = torch.sigmoid(torch.tensor(teacher))
        loss = loss - distillation * (p * F.logsigmoid(unrolled.logit) + (1 - p) * F.logsigmoid(-unrolled.logit)).sum()
    loss.backward()
    return float(log_loss.detach()), {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}


def assert_gradients_equal(found: GradientSum, expected: Mapping[str, np.ndarray], rows: list[int]) -> None:
    """``rows``: of the items in ``expected``. The width of a posterior that has none has gradient 0."""
    given = {**found.dense, **found.tables}
    for name, gradient in given.items():
        if "_log_sigma" in name:
            assert not gradient.any(), name
            continue
        wanted = expected[name][rows] if name in ITEM_TABLES else expected[name]
        assert np.abs(wanted).max(initial=1) > 0, name
        np.testing.assert_allclose(gradient, wanted, rtol=2e-4, atol=2e-5, err_msg=name)
    assert given.keys() - {"item_embedding_log_sigma", "item_bias_log_sigma"} == expected.keys()


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize(("second", "graded"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_autograd_through_the_whole_model(head, second, graded, first):
    learner = settings(head, second=second, graded=graded)
    model = meta_model(learner, silent=True)
    given, items = histories(model, LENGTHS, VOCABULARY[:8], first=first)
    ordinal = learner.ordinal_auxiliary
    log_loss, expected = autograd(model, given, items, ordinal=ordinal)

    found = gradient_sum(model, 3, given, "everything", seed=[0], ordinal=ordinal)

    assert (found.version, found.users, found.events) == (3, 4, 29)
    assert found.log_loss == pytest.approx(log_loss, rel=1e-5)
    assert list(found.item_ids) == [i for i in VOCABULARY if i in items]
    assert found.item_events.tolist() == [items.count(item) for item in found.item_ids]
    assert_gradients_equal(found, expected, [VOCABULARY.index(item) for item in found.item_ids])


def test_a_users_place_in_his_own_order_counts_only_where_steps_shrink_with_it():
    moved = {}
    for head in HEADS:
        model = meta_model(settings(head), silent=True)
        early, late = (
            gradient_sum(model, 0, histories(model, LENGTHS, first=n)[0], "everything", seed=[0]) for n in (0, 40)
        )
        moved[head] = early.log_loss != late.log_loss
    assert moved == {"full": False, "diagonal": False, "gradient": True}


def test_features_kept_as_sparse_rows_give_the_same_gradients(monkeypatch):
    given, items = histories(meta_model(silent=True), LENGTHS, (*VOCABULARY[:6], "unheard"))
    _, expected = autograd(meta_model(silent=True), given, items, extra=1)
    monkeypatch.setattr(recommender, "DENSE_FEATURE_COLUMNS", 1)
    model = meta_model(silent=True)
    model.grow({"wide": ("x|y",)})  # the same again, with a vocabulary that has grown
    found = gradient_sum(model, 0, given, "everything", seed=[0])
    assert not model.recommender.dense_features
    unused = {n for n in expected if n.startswith("ordinal")}
    assert_gradients_equal(
        found, {n: g for n, g in expected.items() if n not in unused}, [VOCABULARY.index(i) for i in found.item_ids]
    )


@pytest.mark.parametrize("head", HEADS)
def test_an_unknown_item_counts_as_one_of_which_nothing_is_known(head):
    learner = settings(head)
    model = meta_model(learner, silent=True)
    given, items = histories(model, LENGTHS, ("i0", "i5", "unheard", "other"))
    log_loss, expected = autograd(model, given, items, extra=1, ordinal=0.5)
    found = gradient_sum(model, 0, given, "everything", seed=[0], ordinal=0.5)
    assert found.item_ids == ("i0", "i5")
    assert found.item_events.tolist() == [items.count("i0"), items.count("i5")]
    assert found.log_loss == pytest.approx(log_loss, rel=1e-5)
    assert_gradients_equal(found, expected, [0, 5])


def test_unknown_items_alone_still_teach_the_start():
    model = meta_model()
    found = gradient_sum(model, 0, histories(model, (6, 3), ("unheard",))[0], "everything", seed=[0])
    assert found.item_ids == ()
    assert found.tables["item_embedding"].shape == (0, 6)
    assert np.abs(found.dense["head.initialization"]).max() > 0
    check(found, model, 0, "everything")


def test_sums_of_two_halves_are_the_sum_of_the_whole():
    model = meta_model(silent=True)
    given, _ = histories(model, (9, 4, 14, 5), VOCABULARY[:9])
    sums = [
        gradient_sum(model, 1, part, "everything", seed=[0], ordinal=0.5, seen=seen, new_items=new)
        for part, seen, new in (
            (given, {}, {}),
            (given.take(np.array([0, 1])), {"i1": 2, "i2": 1}, {"n1": ("x",)}),
            (given.take(np.array([2, 3])), {"i2": 5, "n1": 1}, {"n1": ("x",), "n2": None}),
        )
    ]
    whole_sum, halves = sums[0], add(sums[1:])
    assert (halves.version, halves.users, halves.events) == (1, 4, 32)
    assert halves.log_loss == pytest.approx(whole_sum.log_loss, rel=1e-6)
    assert halves.seen == {"i1": 2, "i2": 6, "n1": 1}
    assert halves.new_items == {"n1": ("x",), "n2": None}
    assert halves.item_ids[: len(sums[1].item_ids)] == sums[1].item_ids
    assert sorted(halves.item_ids) == sorted(whole_sum.item_ids)
    place = [halves.item_ids.index(item) for item in whole_sum.item_ids]
    np.testing.assert_array_equal(halves.item_events[place], whole_sum.item_events)
    assert halves.dense.keys() == whole_sum.dense.keys()
    for name, gradient in whole_sum.dense.items():
        np.testing.assert_allclose(halves.dense[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, gradient in whole_sum.tables.items():
        np.testing.assert_allclose(halves.tables[name][place], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_sum_is_its_own_and_sums_are_left_as_they_were():
    model = meta_model(silent=True)
    part = gradient_sum(model, 1, histories(model, (5, 5))[0], "everything", seed=[0])
    assert add([part]) is part
    before = {n: g.copy() for n, g in {**part.dense, **part.tables}.items()}
    twice = add([part, part])
    for name, gradient in {**part.dense, **part.tables}.items():
        np.testing.assert_array_equal(gradient, before[name], err_msg=name)
        np.testing.assert_allclose({**twice.dense, **twice.tables}[name], 2 * gradient, err_msg=name)


def test_a_sum_without_grades_is_added_to_one_with_them():
    model = meta_model(silent=True)
    given, _ = histories(model, LENGTHS)
    plain, graded = (gradient_sum(model, 0, given, "everything", seed=[0], ordinal=ordinal) for ordinal in (0.0, 0.5))
    assert graded.dense.keys() - plain.dense.keys() == {"ordinal_slope", "ordinal_threshold", "ordinal_projection"}
    assert graded.tables.keys() - plain.tables.keys() == {"ordinal_item"}
    for parts in ([plain, graded], [graded, plain]):
        total = add(parts)
        check(total, model, 0, "everything")
        np.testing.assert_array_equal(total.dense["ordinal_slope"], graded.dense["ordinal_slope"])
        np.testing.assert_array_equal(total.tables["ordinal_item"], graded.tables["ordinal_item"])
        expected = plain.tables["item_embedding"] + graded.tables["item_embedding"]
        np.testing.assert_array_equal(total.tables["item_embedding"], expected)


def test_sums_of_several_versions_or_of_none_are_no_sum():
    part = by_hand(meta_model())
    with pytest.raises(ValueError, match=r"versions \[0, 1\] cannot be added"):
        add([part, replace(part, version=1)])
    with pytest.raises(ValueError, match=r"versions \[\] cannot be added"):
        add([])


START = {
    "head.initialization", "head.log_scale", "head.lower", "head.log_drift", "head.log_kappa", "second.initialization",
    "second.log_scale", "second.lower", "second.log_drift", "second.log_kappa", "user_factors", "user_projection",
    "log_weight", "second_log_weight", "grade_log_weight",
}  # fmt: skip


def test_the_setting_says_what_moves():
    model = meta_model()
    given, _ = histories(model, LENGTHS)
    names = {}
    for moves in ("initialization", "biases", "everything"):
        found = gradient_sum(model, 0, given, moves, seed=[0], ordinal=0.5)
        names[moves] = found.dense.keys() | found.tables.keys()
    assert names["initialization"] == START
    assert names["biases"] == START | {"item_bias", "item_bias_log_sigma"}
    # the scales of the priors are in no event's loss; they move with the KL
    assert names["everything"] == model.parameters.keys() - {"prior_log_scale", "prior_bias_log_scale"}
    assert all(moves_with(name, "everything") for name in model.parameters)
    assert {n for n in model.parameters if moves_with(n, "biases")} == names["biases"] | {"prior_bias_log_scale"}


def test_moving_less_changes_no_bit_of_what_still_moves():
    model = meta_model()
    given, _ = histories(model, LENGTHS)
    every, start = (gradient_sum(model, 0, given, moves, seed=[4]) for moves in ("everything", "initialization"))
    assert start.tables == {}
    assert start.item_ids == every.item_ids
    for name, gradient in start.dense.items():
        np.testing.assert_array_equal(gradient, every.dense[name], err_msg=name)


def test_the_same_seed_gives_the_same_bits_whatever_the_threads_and_another_seed_does_not(monkeypatch):
    monkeypatch.setattr("learner.scan.MIN_EVENTS_PER_THREAD", 1)
    model = meta_model()
    given, _ = histories(model, LENGTHS)
    first, again, other = (
        gradient_sum(model, 0, given, "everything", seed=seed, threads=threads)
        for seed, threads in (([1, 0, 7], 1), ([1, 0, 7], 2), ([1, 0, 8], 1))
    )
    for name in (*first.dense, *first.tables):
        a, b = ({**x.dense, **x.tables}[name] for x in (first, again))
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert first.log_loss == again.log_loss != other.log_loss
    assert np.abs(first.tables["item_embedding_log_sigma"]).max() > 0


def test_nothing_else_changes_when_a_gradient_is_taken():
    model = meta_model()
    before, noise = model.tensors(), torch.get_rng_state()
    gradient_sum(model, 0, histories(model, LENGTHS)[0], "everything", seed=[1], ordinal=0.5)
    assert_same_tensors(model.tensors(), before)
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(parameter.grad is None for parameter in model.parameters.values())


def test_new_items_are_in_the_sum_and_begin_at_their_features():
    model = meta_model(silent=True)
    given, items = histories(model, (8, 8), ("i0", "new"))
    found = gradient_sum(model, 0, given, "everything", seed=[0], new_items={"new": ("y",)})
    assert found.item_ids == ("i0", "new")
    assert found.item_events.tolist() == [items.count("i0"), items.count("new")]
    assert found.new_items == {"new": ("y",)}
    # beside the others' weights, C takes what the new item's tag y says
    known = gradient_sum(meta_model(silent=True), 0, given, "everything", seed=[0])
    assert known.item_ids == ("i0",)
    assert not known.dense["item_feature_weights"][1].any()  # i0 has the tag x alone
    assert np.abs(found.dense["item_feature_weights"][1]).max() > 0


def test_a_teacher_draws_every_logit_and_leaves_the_log_loss_alone():
    model = meta_model(silent=True)
    given, items = histories(model, LENGTHS)
    teacher = np.random.default_rng(3).normal(size=given.events).astype(np.float32)
    log_loss, expected = autograd(model, given, items, teacher=teacher, distillation=0.7)
    found = gradient_sum(model, 0, given, "everything", seed=[0], teacher=teacher, distillation=0.7)
    assert found.log_loss == pytest.approx(log_loss, rel=1e-5)
    expected = {n: g for n, g in expected.items() if not n.startswith("ordinal")}
    assert_gradients_equal(found, expected, [VOCABULARY.index(item) for item in found.item_ids])


def logits(model: MetaModel, given: Histories, items: list[str]) -> np.ndarray:
    made = whole(model)
    with torch.no_grad():
        return made(packed(made, given, items, model.graded)).logit.numpy()


def test_steps_towards_a_teacher_come_nearer_and_one_who_agrees_says_nothing():
    model = meta_model(silent=True)
    given, items = histories(model, LENGTHS)
    now = logits(model, given, items)
    plain, agreed = (
        gradient_sum(model, 0, given, "everything", seed=[0], teacher=teacher, distillation=50.0)
        for teacher in (None, now)
    )
    for name, gradient in plain.dense.items():
        np.testing.assert_allclose(agreed.dense[name], gradient, rtol=1e-3, atol=1e-3, err_msg=name)
    teacher = (now + np.random.default_rng(0).normal(size=len(now))).astype(np.float32)
    for version in range(8):
        drawn = gradient_sum(
            model, version, given, "everything", seed=[version], teacher=teacher, distillation=1000.0, seen=MOSTLY_NEW
        )
        take_step(model, drawn, "everything", rate=0.03, kl_weight=0.0)
    assert np.abs(logits(model, given, items) - teacher).mean() < 0.8 * np.abs(now - teacher).mean()


# --- refusals -------------------------------------------------------------------------------------------------


def spoiled(gradient: GradientSum, name: str, value: float) -> GradientSum:
    part = "tables" if name in gradient.tables else "dense"
    array = getattr(gradient, part)[name].copy()
    array[...] = np.where(np.arange(array.size).reshape(array.shape) == array.size - 1, value, array)
    return replace(gradient, **{part: {**getattr(gradient, part), name: array}})


REFUSED = {
    "of an earlier version": (lambda g: replace(g, version=-1), "version", r"of version -1.*over version 0"),
    "of a later version": (lambda g: replace(g, version=1), "version", r"of version 1.*over version 0"),
    "a parameter of another shape": (
        lambda g: replace(g, dense={**g.dense, "log_weight": np.zeros(1, np.float32)}),
        "shape", r"log_weight is \(1,\), and \(\) is wanted",
    ),
    "a table of other items": (
        lambda g: replace(g, tables={**g.tables, "item_bias": np.zeros(5, np.float32)}),
        "shape", r"item_bias is \(5,\), and \(12,\) is wanted",
    ),
    "a parameter that is none": (
        lambda g: replace(g, dense={**g.dense, "head.wings": np.zeros(2, np.float32)}),
        "shape", r"head\.wings is \(2,\), and nothing is wanted",
    ),
    "NaN in a parameter": (lambda g: spoiled(g, "head.initialization", np.nan), "not finite", "head.initialization"),
    "Inf in a table": (lambda g: spoiled(g, "item_embedding", np.inf), "not finite", "item_embedding"),
    "minus Inf in a number": (lambda g: spoiled(g, "log_weight", -np.inf), "not finite", "log_weight"),
    "a log-loss of NaN": (lambda g: replace(g, log_loss=np.nan), "not finite", "the log-loss is not finite"),
    "no user": (lambda g: replace(g, users=0), "counts", "counts 0 users"),
    "counts of other items": (lambda g: replace(g, item_events=np.ones(3, np.int64)), "counts", r"\[1 1 1\] events"),
    "an item without events": (lambda g: replace(g, item_events=g.item_events - 1), "counts", r"\[ 0  1"),
    "a parameter left out": (
        lambda g: replace(g, dense={n: a for n, a in g.dense.items() if n != "head.lower"}),
        "shape", r"no head\.lower, and \(4, 4\) is wanted",
    ),
    "a table left out": (
        lambda g: replace(g, tables={n: a for n, a in g.tables.items() if n != "item_bias_log_sigma"}),
        "shape", r"no item_bias_log_sigma, and \(12,\) is wanted",
    ),
    "an item that was met less than never": (
        lambda g: replace(g, seen={"i1": 3, "i2": -1}), "counts", "-1 new events of an item",
    ),
    "an item twice": (lambda g: replace(g, item_ids=("i1", *g.item_ids[1:])), "items", "names an item twice"),
    "an item that nobody has": (
        lambda g: replace(g, item_ids=(*g.item_ids[:-1], "unheard")), "items", "'unheard', which no vocabulary has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_gradient_that_would_do_damage_is_refused_by_reason(case):
    model = meta_model()
    change, reason, message = REFUSED[case]
    with pytest.raises(GradientRefused, match=message) as refused:
        check(change(by_hand(model)), model, 0, "everything")
    assert refused.value.reason == reason


def test_a_model_without_features_and_grades_has_no_gradient_of_them_and_passes():
    learner = settings(graded=False)
    events = taste_events()
    trainer = MetaTrainer(*prepare(events, Catalogue(), Catalogue(), learner), TRAINING)
    model = MetaModel(trainer.artifact(), np.full(ITEM_COUNT, 9))
    given, _ = histories(model, LENGTHS)
    found = gradient_sum(model, 0, given, "everything", seed=[0], ordinal=0.5)
    assert not {n for n in found.dense if n.startswith(("user_", "ordinal_", "item_feature_weights"))}
    check(found, model, 0, "everything")
    take_step(model, found, "everything", rate=0.01, kl_weight=0.5)
    assert model.finite()


def test_what_does_not_move_under_the_setting_is_refused():
    model = meta_model()
    with pytest.raises(GradientRefused, match=r"item_embedding is .*, and nothing is wanted") as refused:
        check(replace(by_hand(model), dense={}), model, 0, "biases")
    assert refused.value.reason == "shape"


def test_a_gradient_that_fits_passes_with_its_new_items_too():
    model = meta_model()
    check(by_hand(model), model, 0, "everything")
    new = by_hand(model, ("i3", "new"))
    check(replace(new, new_items={"new": None}), model, 0, "everything")
    assert model.rows_named(["new"]).tolist() == [-1]


# --- steps ----------------------------------------------------------------------------------------------------


def adamw(model: MetaModel, rate: float) -> tuple[torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
    """The optimizer of the offline stage on copies: the filters' constants twice as fast, decay for what is left."""
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.parameters.items()}
    groups = []
    for name, copy in copies.items():
        fast = name.startswith(("head.", "second.", "prior_", "grade_")) or name.endswith("log_weight")
        decay = 0.0 if fast or name in ITEM_TABLES else model.training.weight_decay
        groups.append({"params": [copy], "lr": 0.0, "peak": rate * (1 + fast), "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8), copies


def test_steps_over_every_item_are_those_of_adamw_with_a_clipped_norm_and_a_warm_up():
    model, rate, steps = meta_model(), 0.02, WARM_UP_STEPS + 3
    optimizer, copies = adamw(model, rate)
    clipped = []
    for step in range(steps):
        gradient = by_hand(model, scale=(20.0, 400.0, 3000.0)[step % 3], seed=step)
        before = {n: p.detach().clone() for n, p in model.parameters.items()}
        report = take_step(model, gradient, "everything", rate=rate, kl_weight=0.0)
        for name, array in {**gradient.dense, **gradient.tables}.items():
            copies[name].grad = torch.from_numpy(array) / (gradient.users * LOSS_SCALE)
        norm = torch.nn.utils.clip_grad_norm_(list(copies.values()), model.training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / WARM_UP_STEPS)
        optimizer.step()
        clipped.append(float(norm) > model.training.clip_norm)
        assert report.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        moved = sum(float(((p.detach() - before[n]) ** 2).sum()) for n, p in model.parameters.items())
        assert report.length == pytest.approx(moved**0.5, rel=1e-3)
    assert any(clipped)
    assert not all(clipped)
    for name, copy in copies.items():
        torch.testing.assert_close(model.parameters[name], copy, rtol=1e-5, atol=2e-6, msg=name)
    assert model.steps == steps
    assert model.item_steps.tolist() == [steps] * 12


def adam_of_one_row(gradients: list[np.ndarray], rates: list[float]) -> np.ndarray:
    """What Adam adds to a row that took these steps and no others (arXiv 1412.6980, algorithm 1)."""
    moved, m, v = np.zeros(gradients[0].shape), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        moved = moved - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    return moved


def test_an_item_moves_only_with_steps_that_met_it_as_if_there_were_no_others():
    model, rate = meta_model(), 0.01
    start = {n: model.parameters[n].detach().numpy().copy() for n in ITEM_TABLES}
    met: dict[str, list[tuple[dict[str, np.ndarray], float]]] = {item: [] for item in VOCABULARY}
    for step, items in enumerate([("i1", "i2"), ("i2", "i7"), ("i1", "i2", "i9"), ("i7",)]):
        gradient = by_hand(model, items, seed=step)
        take_step(model, gradient, "everything", rate=rate, kl_weight=0.0)
        for place, item in enumerate(items):
            tables = {n: g[place].astype(float) / (10 * LOSS_SCALE) for n, g in gradient.tables.items()}
            met[item].append((tables, rate * (step + 1) / WARM_UP_STEPS))
    for row, item in enumerate(VOCABULARY):
        for name in ITEM_TABLES:
            found, moments = model.parameters[name].detach().numpy()[row], [m[row] for m in model.moments[name]]
            if not met[item]:
                np.testing.assert_array_equal(found, start[name][row])
                assert not any(bool(m.any()) for m in moments)
                continue
            moved = adam_of_one_row([g[name] for g, _ in met[item]], [r for _, r in met[item]])
            np.testing.assert_allclose(found - start[name][row], moved, rtol=1e-3, atol=2e-6, err_msg=name)
    assert model.item_steps.tolist() == [0, 2, 3, 0, 0, 0, 0, 2, 0, 1, 0, 0]
    assert model.steps == 4


@pytest.mark.parametrize(
    ("new", "share"), [({"i0": 1, "i3": 1}, 2 / 188 / UNSETTLED_SHARE), ({"i0": 4}, 1.0), ({}, 0.0)]
)
def test_the_rate_falls_with_the_share_of_new_events(new, share):
    # Adam's first step is the rate in every direction; the vocabulary has 186 events before
    model = meta_model()
    before = model.parameters["item_bias"].detach().clone()
    take_step(model, replace(by_hand(model, scale=100.0), seen=new), "everything", rate=0.5, kl_weight=0.0)
    moved = (model.parameters["item_bias"].detach() - before).abs()
    np.testing.assert_allclose(moved, np.full(12, 0.5 / WARM_UP_STEPS * share), rtol=1e-3, atol=1e-7)


def test_before_any_event_was_counted_the_rate_is_whole():
    model = MetaModel(artifact(), np.zeros(ITEM_COUNT, np.int64))
    report = take_step(model, replace(by_hand(model), seen={}), "everything", rate=0.5, kl_weight=0.0)
    assert report.length > 0.05


def gradient_used(model: MetaModel, name: str) -> np.ndarray:
    """The gradient of a model's first step, from Adam's first moment."""
    return model.moments[name][0].numpy() / (1 - BETA_1) * 10 * LOSS_SCALE


def test_an_items_prior_is_spread_over_its_events():
    weight = 0.6
    model = meta_model()
    items = ("i0", "i4", "new")
    gradient = replace(
        by_hand(model, items, scale=0.0), item_events=np.array([5, 14, 3]), seen={"i0": 10, "new": 2, "i8": 1},
        new_items={"new": ("x",)},
    )  # fmt: skip
    model.grow({"new": ("x",)})
    # i0 has had 10 + 10 events, i4 14, and the new one 2: fewer than the histories have of it
    shares = [weight * 5 / 20, weight * 14 / 14, weight * 3 / 3]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.parameters.items()}
    rows = [0, 4, 12]
    expected = sum(
        share
        * (
            gaussian_kl(
                leaves["item_embedding"][row : row + 1], leaves["item_embedding_log_sigma"][row : row + 1],
                leaves["prior_log_scale"],
            )
            + gaussian_kl(
                leaves["item_bias"][row].view(1, 1), leaves["item_bias_log_sigma"][row].view(1, 1),
                leaves["prior_bias_log_scale"].view(1),
            )
            + 2 * (leaves["ordinal_item"][row] ** 2).sum()
        )
        for share, row in zip(shares, rows, strict=True)
    )  # fmt: skip
    expected.backward()  # type: ignore[union-attr]

    take_step(model, gradient, "everything", rate=1e-3, kl_weight=weight)

    for name, leaf in leaves.items():
        if leaf.grad is not None:
            np.testing.assert_allclose(gradient_used(model, name), leaf.grad, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            assert not gradient_used(model, name).any(), name
    assert leaves["prior_log_scale"].grad is not None
    assert model.item_events.tolist() == [20, 11, 12, 13, 14, 15, 16, 17, 19, 19, 20, 21, 2]


def test_with_biases_alone_only_the_prior_of_biases_counts():
    model = meta_model()
    gradient = by_hand(model, ("i0", "i4"), scale=0.0)
    moving = {n: g for n, g in {**gradient.dense, **gradient.tables}.items() if moves_with(n, "biases")}
    gradient = replace(
        gradient, dense={n: g for n, g in moving.items() if n not in ITEM_TABLES},
        tables={n: g for n, g in moving.items() if n in ITEM_TABLES},
    )  # fmt: skip
    before = model.tensors()
    take_step(model, gradient, "biases", rate=0.01, kl_weight=1.0)
    after = model.tensors()
    moved = {n.removeprefix("parameters.") for n in before if n.startswith("parameters.") and
             not np.array_equal(before[n], after[n])}  # fmt: skip
    # with gradients of zero all else moves by its decay: W's factors
    assert moved == {"item_bias", "item_bias_log_sigma", "prior_bias_log_scale", "user_factors", "user_projection"}


def test_items_that_a_step_is_the_first_to_name_join_the_vocabulary():
    model = meta_model()
    gradient = replace(
        by_hand(model, ("new", "i1")), new_items={"new": ("y",)}, seen={"i1": 4, "plain": 2, "new": 3}
    )  # fmt: skip
    take_step(model, gradient, "everything", rate=0.01, kl_weight=0.5)
    assert model.item_ids[12:] == ["plain", "new"]
    assert model.item_events[[1, 12, 13]].tolist() == [15, 2, 3]
    assert model.item_steps[[1, 12, 13]].tolist() == [1, 0, 1]
    assert not model.parameters["item_embedding"][12].any()  # nobody's history had it
    assert bool(model.parameters["item_embedding"][13].all())
    assert model.recommender.spec.item_features.columns[-1] == 1  # y


def test_steps_are_taken_back_to_the_bit_though_the_vocabulary_has_grown():
    model, untouched = meta_model(), meta_model()
    steps = [
        by_hand(model, ("i1", "i2"), scale=300.0, seed=1),
        replace(by_hand(model, ("i2", "new"), seed=2), new_items={"new": ("y",)}, seen={"new": 3, "i0": 1}),
        replace(by_hand(model, ("new", "i1", "later"), seed=3), new_items={"later": None}, seen={"later": 1}),
    ]
    tensors, undos = [model.tensors()], []
    for gradient in steps:
        undos.append(take_step(model, gradient, "everything", rate=0.05, kl_weight=0.6).undo)
        tensors.append(model.tensors())
    taken_back = []
    for undo in reversed(undos):
        take_back(model, undo)
        taken_back.append(model.tensors())
    untouched.grow({"new": ("y",), "later": None})
    assert_same_tensors(taken_back[-1], untouched.tensors())
    for found, was in zip(reversed(taken_back), tensors[:-1], strict=True):
        for name, array in was.items():
            rows = len(array) if array.ndim else None
            np.testing.assert_array_equal(found[name][:rows] if array.ndim else found[name], array, err_msg=name)
    # and the same steps lead to the same place
    for gradient in steps:
        take_step(model, gradient, "everything", rate=0.05, kl_weight=0.6)
    assert_same_tensors(model.tensors(), tensors[-1])


def test_a_step_of_real_gradients_lowers_the_loss_it_was_taken_on():
    model = meta_model()
    given, _ = histories(model, (20,) * 12)
    losses = []
    for version in range(30):
        gradient = gradient_sum(model, version, given, "everything", seed=[version], seen=MOSTLY_NEW)
        losses.append(gradient.log_loss / gradient.events)
        take_step(model, gradient, "everything", rate=0.02, kl_weight=0.0)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert model.finite()


def test_a_gradient_is_of_the_histories_rather_than_of_their_order():
    model = meta_model(silent=True)
    given, _ = histories(model, LENGTHS)
    forth, back = (
        gradient_sum(model, 0, given.take(np.array(order)), "everything", seed=[0])
        for order in ([0, 1, 2, 3], [3, 2, 1, 0])
    )
    assert forth.item_ids == back.item_ids
    np.testing.assert_allclose(forth.tables["item_bias"], back.tables["item_bias"], rtol=1e-4, atol=1e-5)
    assert ring_items(["i0"])[0] in given.item
