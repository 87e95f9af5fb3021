"""Small models with known random constants, for tests of the kernel and all that stands on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learner.features import FeatureEncoder, FeatureField, SparseRows
from learner.interactions import Interactions
from learner.serving import FirstFilter, FixedPart, SecondFilter, ServingModel
from learner.user_state import HeadKind, RowLayout, Slab
from state import codec
from state.store import UserStore

HEADS: tuple[HeadKind, ...] = ("full", "diagonal", "gradient")
ITEMS = 12
GRADES = np.array([1, 2, 3, 4, 5], np.float32)


def f32(array: NDArray[np.float64]) -> NDArray[np.float32]:
    """Contiguous float32."""
    return np.ascontiguousarray(array, np.float32)


def packed(matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """Row-major lower triangle."""
    return f32(matrix[np.tril_indices(len(matrix))])


def spread(rng: np.random.Generator, dim: int, scale: float) -> NDArray[np.float64]:
    """A positive definite matrix with entries off its diagonal."""
    factor = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return scale * (factor @ factor.T + np.eye(dim))


def first_filter(kind: HeadKind = "full", dim: int = 5, *, graded: bool = False, seed: int = 0) -> FirstFilter:
    """A first filter with every constant in use."""
    rng = np.random.default_rng(seed)
    covariance = spread(rng, dim, 0.4)
    grades = len(GRADES) if graded else 0
    return FirstFilter(
        kind,
        f32(rng.normal(size=dim) / 3),
        {"full": packed(covariance), "diagonal": f32(np.diag(covariance)), "gradient": f32(np.zeros(0))}[kind],
        0.3,
        f32(rng.uniform(1e-4, 1e-3, dim) * (kind != "gradient")),
        f32(rng.uniform(0.05, 0.3, dim) * (kind == "gradient")),
        7.0,
        0.6,
        f32(np.append(np.linspace(0.05, 0.95, grades), 0)),
        f32(rng.uniform(0.6, 1.4, grades + 1)),
    )


def second_filter(dim: int = 4, seed: int = 1) -> SecondFilter:
    """A second filter that mostly trusts the first."""
    rng = np.random.default_rng(seed)
    mean = np.append([0.1, 1.8], rng.normal(size=dim - 2) / 5)
    return SecondFilter(f32(mean), packed(spread(rng, dim, 0.1)), 0.25, f32(np.full(dim, 3e-4)), 0.9)


def small_model(
    kind: HeadKind = "full", *, second: bool = True, graded: bool = True, dim: int = 5, meta_version: int = 0
) -> ServingModel:
    """A model of the items ``i0 … i11`` whose users have one feature, ``plan``: free or paid."""
    rng = np.random.default_rng(7)
    width, second_dim = 6, 4 if second else 2
    plan = FeatureEncoder.fit((FeatureField("plan", "categorical"),), [("free",), ("paid",)])
    no_features = SparseRows(np.zeros(ITEMS + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    fixed = FixedPart(
        item_ids=tuple(f"i{k}" for k in range(ITEMS)),
        item_embedding=f32(rng.normal(size=(ITEMS, width))),
        item_bias=f32(rng.normal(size=ITEMS) / 2),
        item_features=no_features,
        item_feature_weights=f32(np.zeros((0, width))),
        base_weight=f32(rng.normal(size=width) / 4),
        base_bias=0.2,
        projection=f32(rng.normal(size=(width, dim - 1)) / 3),
        projection_bias=f32(rng.normal(size=dim - 1) / 5),
        second_projection=f32(rng.normal(size=(width, second_dim - 2)) / 3),
        second_projection_bias=f32(np.zeros(second_dim - 2)),
        user_feature_weights=f32(rng.normal(size=(2, dim)) / 3),
        item_encoder=FeatureEncoder(),
        user_encoder=plan,
        grades=GRADES if graded else GRADES[:0],
    )
    return ServingModel(
        fixed,
        first_filter(kind, dim, graded=graded),
        second_filter() if second else None,
        meta_version=meta_version,
    )


def random_stream(events: int, users: int, seed: int = 0) -> Interactions:
    """Events of ``users`` users over known and unknown items; two in three carry a grade, user features come along."""
    rng = np.random.default_rng(seed)
    values = rng.choice(GRADES, events)
    values[rng.random(events) < 1 / 3] = np.nan
    stream = Interactions.from_columns(
        [f"u{k}" for k in rng.integers(0, users, events)],
        [f"i{k}" for k in rng.integers(0, ITEMS + 3, events)],
        rng.integers(0, 2, events).astype(np.int8),
        np.cumsum(rng.integers(0, 7_200_000, events)) + 1_600_000_000_000,
        values=values,
        offsets=np.cumsum(rng.integers(1, 4, events)) - 1,
    )
    plans = tuple((None, "free", "paid")[k % 3] for k in range(len(stream.user_ids)))
    return Interactions(
        stream.user_ids, stream.item_ids, stream.user, stream.item, stream.label, stream.value,
        stream.event_time_ms, stream.offset, {"plan": plans},
    )  # fmt: skip


def sealed(layout: RowLayout, users: list[bytes], rows: Slab) -> Slab:
    """The rows as a store gives them back: with version, owner and checksum."""
    values = codec.encode(layout, users, rows)
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(users), layout.row_bytes)


def at(store: UserStore) -> tuple[int | None, int | None]:
    """(offset, meta version) of a store's progress."""
    progress = store.progress()
    return (None, None) if progress is None else (progress.offset, progress.meta_version)


def offset_of(store: UserStore) -> int | None:
    """The last source offset that a store has applied."""
    return at(store)[0]
