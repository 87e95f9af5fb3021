"""The planted truth: who the users and items are, when they arrive and what the users like.

Symbols: U users, I items, K width of the latent tastes.

A user's taste is what the user's features say plus an individual part of the user's own, an item's factors
likewise; the logit of a click is an intercept, a bias of the user and of the item, and taste times factors.
Users and items are numbered in order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streams.generation.settings import GeneratorSettings

K = 8
"""Width of the latent tastes: few enough that some 20 to 50 events teach a user's, too many for a handful."""

AGES = ("under 18", "18-24", "25-34", "35-44", "45-54", "55 and over")
COUNTRIES = ("AR", "BR", "CA", "DE", "FR", "IN", "JP", "KE", "NG", "US")
CATEGORIES = tuple(f"category-{n:02d}" for n in range(1, 13))
TAGS = tuple(f"tag-{n:02d}" for n in range(1, 25))
MOST_TAGS = 3
"""An item has one to so many distinct tags."""

USER_FEATURE_SHARE = 0.35
"""Share of a taste's variance that the user's features explain: what a start from features can reach."""
ITEM_FEATURE_SHARE = 0.7
"""Share of the factors' variance that category and tags explain, half each."""
TASTE_SCALE = 1.5
"""Standard deviation of taste times factors, in logits. With the biases below the best AUC is near .82."""
USER_BIAS_SCALE = 0.6
ITEM_BIAS_SCALE = 0.35
QUALITY_WEIGHT = 0.45
"""Logits for one standard deviation of an item's quality."""

ITEM_POPULARITY = 0.8
"""Exponent of the items' popularity over their ranks."""
ITEMS_AT_START = 0.4
"""Share of the items that are there when the stream starts; the rest arrive evenly over the span."""


class Draw(IntEnum):
    """What a random sequence is for: each has its own, so that one option does not disturb another's draws."""

    USERS = 1
    ITEMS = 2
    EVENTS = 3


def random_for(settings: GeneratorSettings, draw: Draw, block: int = 0) -> np.random.Generator:
    """The random sequence of one purpose (and block of events)."""
    return np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(draw, block)))


@dataclass(frozen=True, slots=True)
class Users:
    """U users in order of arrival."""

    age: NDArray[np.int64]
    """(U,) index into ``AGES``"""
    country: NDArray[np.int64]
    """(U,) index into ``COUNTRIES``"""
    taste: NDArray[np.float64]
    """(U, K) in logits per unit of an item's factors"""
    taste_after: NDArray[np.float64]
    """(U, K) the taste that drift leads to, drawn independently"""
    bias: NDArray[np.float64]
    """(U,) logits"""
    arrival: NDArray[np.float64]
    """(U,) rising; share of the span, negative for users who were there before it began"""
    activity: NDArray[np.float64]
    """(U,) relative rate of events while present"""


@dataclass(frozen=True, slots=True)
class Items:
    """I items in order of arrival."""

    category: NDArray[np.int64]
    """(I,) index into ``CATEGORIES``"""
    tags: NDArray[np.bool_]
    """(I, len(TAGS)) which tags an item has"""
    quality: NDArray[np.float64]
    """(I,) two decimals, as the catalogue tells it"""
    factors: NDArray[np.float64]
    """(I, K) unit variance"""
    bias: NDArray[np.float64]
    """(I,) logits, quality included"""
    arrival: NDArray[np.float64]
    """(I,) rising; share of the span"""
    popularity: NDArray[np.float64]
    """(I,) relative rate of events once there"""


def draw_users(settings: GeneratorSettings) -> Users:
    """The users of these settings."""
    rng, count = random_for(settings, Draw.USERS), settings.users
    arrival = -settings.lifetime + (1 + settings.lifetime) * (np.arange(count) + rng.random(count)) / count
    ranks = rng.permutation(count).astype(np.float64) + 1
    age, country = rng.integers(len(AGES), size=count), rng.integers(len(COUNTRIES), size=count)
    bias = USER_BIAS_SCALE * rng.standard_normal(count)
    taste, taste_after = (_tastes(rng, age, country) for _ in range(2))
    return Users(age, country, taste, taste_after, bias, arrival, ranks**-settings.zipf)


def _tastes(rng: np.random.Generator, age: NDArray[np.int64], country: NDArray[np.int64]) -> NDArray[np.float64]:
    by_age, by_country = rng.standard_normal((len(AGES), K)), rng.standard_normal((len(COUNTRIES), K))
    own = rng.standard_normal((len(age), K))
    told = (by_age[age] + by_country[country]) / np.sqrt(2)
    taste = np.sqrt(USER_FEATURE_SHARE) * told + np.sqrt(1 - USER_FEATURE_SHARE) * own
    scaled: NDArray[np.float64] = taste * (TASTE_SCALE / np.sqrt(K))
    return scaled


def draw_items(settings: GeneratorSettings) -> Items:
    """The items of these settings."""
    rng, count = random_for(settings, Draw.ITEMS), settings.items
    there = int(np.ceil(ITEMS_AT_START * count))
    arriving = count - there
    arrival = np.concatenate([np.zeros(there), (np.arange(arriving) + rng.random(arriving)) / max(arriving, 1)])
    ranks = rng.permutation(count).astype(np.float64) + 1
    category = rng.integers(len(CATEGORIES), size=count)
    tags = _draw_tags(rng, count)
    quality = np.round(rng.standard_normal(count), 2)
    by_category, by_tag = rng.standard_normal((len(CATEGORIES), K)), rng.standard_normal((len(TAGS), K))
    own = rng.standard_normal((count, K))
    per_item = tags.sum(axis=1, keepdims=True)
    tagged = np.stack([(tags * by_tag[:, k]).sum(axis=1) for k in range(K)], axis=1) / np.sqrt(per_item)
    told = (by_category[category] + tagged) / np.sqrt(2)
    factors = np.sqrt(ITEM_FEATURE_SHARE) * told + np.sqrt(1 - ITEM_FEATURE_SHARE) * own
    bias = QUALITY_WEIGHT * quality + ITEM_BIAS_SCALE * rng.standard_normal(count)
    return Items(category, tags, quality, factors, bias, arrival, ranks**-ITEM_POPULARITY)


def _draw_tags(rng: np.random.Generator, count: int) -> NDArray[np.bool_]:
    how_many = rng.integers(1, MOST_TAGS + 1, size=count)
    order = rng.random((count, len(TAGS))).argsort(axis=1, kind="stable")
    tags: NDArray[np.bool_] = order.argsort(axis=1, kind="stable") < how_many[:, None]
    return tags
