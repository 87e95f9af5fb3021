"""The trainable model over a part of its vocabulary: the same numbers, and gradients of that part alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from learner import recommender
from learner.meta_training import MetaTrainer, prepare
from learner.recommender import ITEM_TABLES, PackedSequences, Recommender
from tests.meta_models import ITEM_COUNT, ITEMS, TRAINING, USERS, settings, taste_events
from tests.models import HEADS

ROWS = torch.tensor([7, 2, 9, 0])


@pytest.fixture(params=[True, False], ids=["dense", "sparse"])
def dense(request, monkeypatch) -> bool:
    """Whether the items' features are a matrix."""
    if not request.param:
        monkeypatch.setattr(recommender, "DENSE_FEATURE_COLUMNS", 1)
    return request.param


def whole(head: str = "full") -> Recommender:
    model = MetaTrainer(*prepare(taste_events(), USERS, ITEMS, settings(head)), TRAINING).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batch(item: torch.Tensor) -> PackedSequences:
    """Three users of four events each; the second has no features."""
    generator = torch.Generator().manual_seed(2)
    return PackedSequences(
        torch.tensor([0, 4, 8, 12]), item, torch.randint(0, 2, (12,), generator=generator).float(),
        torch.randint(0, 6, (12,), generator=generator), torch.arange(4).repeat(3).float(),
        torch.tensor([[0], [0], [1]]), torch.tensor([[1.0], [0.0], [1.0]]),
    )  # fmt: skip


PLACES = torch.tensor([0, 1, 2, 3, 3, 1, 0, 0, 2, 2, 1, 3])


@pytest.mark.parametrize("head", HEADS)
def test_a_part_of_the_vocabulary_gives_the_numbers_of_the_whole(head, dense):
    model = whole(head)
    assert model.dense_features == dense
    part = model.restricted(ROWS)
    ours, theirs = part(batch(PLACES)), model(batch(ROWS[PLACES]))
    torch.testing.assert_close(ours.logit, theirs.logit, rtol=1e-5, atol=1e-6)
    redundant = torch.tensor([False, False, True, False])
    torch.testing.assert_close(
        part.ordinal_loss(batch(PLACES), ours, redundant), model.ordinal_loss(batch(ROWS[PLACES]), theirs, redundant)
    )


def test_gradients_of_the_part_are_those_of_its_rows_and_all_else_is_shared(dense):
    model = whole()
    part = model.restricted(ROWS)
    tables = {name: table for name, table in part._parameters.items() if name in ITEM_TABLES}
    assert tables.keys() == set(ITEM_TABLES)
    grads = []
    for made, item in ((part, PLACES), (model, ROWS[PLACES])):
        unrolled = made(batch(item))
        loss = F.binary_cross_entropy_with_logits(unrolled.logit, batch(item).label, reduction="sum")
        shared = [p for n, p in model.named_parameters() if n not in ITEM_TABLES]
        wanted = [made.get_parameter("item_embedding"), made.get_parameter("item_bias"), *shared]
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    ours, theirs = grads
    for table in range(2):
        torch.testing.assert_close(ours[table], theirs[table][ROWS], rtol=1e-4, atol=1e-5)
        others = [row for row in range(ITEM_COUNT) if row not in ROWS.tolist()]
        assert not theirs[table][others].any()
    compared = 0
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > 15


def test_a_part_has_its_own_tables_and_leaves_the_whole_alone(dense):
    model = whole()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    part = model.restricted(ROWS)
    with torch.no_grad():
        for name, table in part._parameters.items():
            if name in ITEM_TABLES:
                table.fill_(9.0)
        for name in ("item_features", "item_weights"):
            if name in part._buffers:
                part._buffers[name].fill_(9.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not part.training
    part.train()
    assert not model.training
    assert part.projection is model.projection
    assert part.head is model.head


def test_rows_may_come_again(dense):
    model = whole()
    twice = model.restricted(torch.tensor([4, 4]))
    e, bias = twice.embeddings(torch.tensor([0, 1]))
    expected, expected_bias = model.embeddings(torch.tensor([4, 4]))
    torch.testing.assert_close(e, expected)
    torch.testing.assert_close(bias, expected_bias)
