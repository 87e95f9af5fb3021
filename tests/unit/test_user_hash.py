"""Shares of users by a hash of their id: the same everywhere, of the right size, and none tells another."""

from __future__ import annotations

import zlib
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest

from learner import anchors
from learner.user_hash import CANARY, HELD_OUT, OFFLINE, drawn, held_out_users, mixed, user_crcs

SALTS = {"canary": CANARY, "held out": HELD_OUT, "offline": OFFLINE}
CHANCE = 15.1
"""Of χ² with one degree of freedom: beyond it lies chance with a probability of 1 in 10,000"""

GOLDEN_CRCS = [1112514422, 3678850764, 0, 1739342378]
"""Of "u1", "u2", "" and "Zoë"; what they are mixed to was computed with a few lines of plain Python integers"""
GOLDEN_MIXED = {
    "canary": [1354827573, 3655956582, 2628190328, 3149186284],
    "held out": [201618974, 2027944561, 2462723854, 4286728373],
    "offline": [3961727287, 439338837, 2612203797, 1264897860],
}
GOLDEN_HELD_OUT = ["u1", "u3", "u4", "u38", "u49", "u54", "u60"]
GOLDEN_CANARY = ["u9", "u36", "u37", "u45"]


@cache
def ids(form: str = "u{}") -> list[bytes]:
    return [form.format(k).encode() for k in range(1, 100_001)]


def dependence(a: np.ndarray, b: np.ndarray) -> float:
    """χ² of two choices being independent (Pearson), one degree of freedom."""
    table = np.array([[(x & y).sum() for y in (b, ~b)] for x in (a, ~a)], float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def test_hashes_are_the_golden_ones():
    crcs = user_crcs([b"u1", b"u2", b"", "Zoë".encode()])
    assert crcs.dtype == np.uint32
    assert crcs.tolist() == [zlib.crc32(u) for u in (b"u1", b"u2", b"", "Zoë".encode())]
    assert crcs.tolist() == GOLDEN_CRCS
    assert {name: mixed(crcs, salt).tolist() for name, salt in SALTS.items()} == GOLDEN_MIXED
    assert user_crcs([]).shape == mixed(user_crcs([]), CANARY).shape == (0,)


def test_the_mix_is_murmurs_finalizer_over_the_salted_hash():
    # fmix32 of MurmurHash3 (A. Appleby, public domain): 0 stays 0, and 1 becomes this
    assert mixed(np.array([CANARY, CANARY ^ 1], np.uint32), CANARY).tolist() == [0, 0x514E28B7]


def test_the_first_users_who_are_drawn_are_the_golden_ones():
    names = np.array([u.decode() for u in ids()[:60]])
    assert names[held_out_users(ids()[:60], 0.1)].tolist() == GOLDEN_HELD_OUT
    assert names[drawn(user_crcs(ids()[:60]), CANARY, 0.1)].tolist() == GOLDEN_CANARY


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("salt", SALTS)
@pytest.mark.parametrize("form", ["u{}", "{}", "user-{:08}", "{}@example.org"])
def test_shares_are_right_within_the_error_of_sampling(form, salt, share):
    found = drawn(user_crcs(ids(form)), SALTS[salt], share)
    error = np.sqrt(share * (1 - share) / len(found))
    assert found.mean() == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("form", ["u{}", "{}", "user-{:08}"])
def test_a_share_for_one_purpose_tells_nothing_of_another(form, share):
    crcs = user_crcs(ids(form))
    for a, b in combinations(SALTS.values(), 2):
        assert dependence(drawn(crcs, a, share), drawn(crcs, b, share)) < CHANCE


def test_partitions_of_offline_users_are_even_and_tell_nothing_of_who_is_held_out():
    crcs = user_crcs(ids())
    partition = mixed(crcs, OFFLINE) % np.uint32(4)
    assert np.bincount(partition) / len(crcs) == pytest.approx(0.25, abs=0.006)
    for k in range(4):
        assert dependence(partition == k, drawn(crcs, HELD_OUT, 0.1)) < CHANCE


def test_salted_hashes_without_the_mix_would_be_one_and_the_same_choice():
    # what the module's docstring warns of, and proof that the test above can see it
    def salted(salt: bytes) -> np.ndarray:
        return user_crcs([salt + user for user in ids("user-{:08}")]) < 0.1 * 2**32

    assert dependence(salted(b"canary"), salted(b"offset")) > 50 * CHANCE


def test_a_larger_share_has_those_of_a_smaller_one():
    crcs = user_crcs(ids()[:20_000])
    shares = [drawn(crcs, CANARY, share) for share in (0.0, 0.02, 0.1, 0.5, 1.0)]
    assert not shares[0].any()
    assert shares[-1].all()
    for smaller, larger in pairwise(shares):
        assert not (smaller & ~larger).any()


def test_who_is_drawn_hangs_on_nobody_else():
    chosen = held_out_users(ids()[:500], 0.3)
    assert [bool(held_out_users([user], 0.3)[0]) for user in ids()[:500]] == chosen.tolist()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 1 / 3, 0.5, 1.0])
def test_anchors_hold_out_the_very_same_users(share):
    crcs = user_crcs(ids())
    np.testing.assert_array_equal(anchors.held_out(crcs, share), held_out_users(ids(), share))


@pytest.mark.parametrize("share", [0.05, 0.1, 1 / 3])
def test_anchors_agree_at_the_very_edge_of_a_share(share):
    edge = int(share * 2**32)
    crcs = np.array([unmixed(h) ^ HELD_OUT for h in (edge - 1, edge, edge + 1)], np.uint32)
    assert mixed(crcs, HELD_OUT).tolist() == [edge - 1, edge, edge + 1]
    found = drawn(crcs, HELD_OUT, share)
    assert found.tolist() == [True, edge < share * 2**32, False]
    np.testing.assert_array_equal(anchors.held_out(crcs, share), found)


def unmixed(h: int) -> int:
    """The inverse of murmur3's finalizer."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h ^= (h >> 13) ^ (h >> 26)
    h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ (h >> 16)
