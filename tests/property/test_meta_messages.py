"""Contributions cut, interleaved, repeated, lost and damaged: what comes out is what went in, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.meta.messages import Assembler, MessageRefused, cut, decode
from streams.meta.messages.chunks import PIECE
from streams.meta.messages.contribution import encode
from tests.unit.test_meta_messages import assert_same, contribution

WHOLE = encode(contribution())


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * PIECE), min_size=1, max_size=4), data=st.data())
def test_a_block_comes_out_whole_or_not_at_all(sizes, data):
    """Of each sender one block; its records may be lost, spoiled or repeated, in order; senders interleave."""
    sent = {b"%d" % k: np.random.default_rng(k).bytes(size) for k, size in enumerate(sizes)}
    left = {sender: cut(block) for sender, block in sent.items()}
    sound = dict.fromkeys(sent, True)
    refused: list[MessageRefused] = []
    together = Assembler(refused.append)
    found, offset = {}, 0
    while any(left.values()):
        sender = data.draw(st.sampled_from([s for s, values in left.items() if values]))
        value = left[sender].pop(0)
        what = data.draw(st.sampled_from(["send"] * 6 + ["lose", "spoil", "repeat"]))
        if what == "lose":
            sound[sender] = False
            continue
        if what == "spoil":
            sound[sender] = False
            place = data.draw(st.integers(0, len(value) - 1))
            value = value[:place] + bytes([value[place] ^ 16]) + value[place + 1 :]
        for _ in range(2 if what == "repeat" else 1):
            block = together.add(offset, sender, value)
            offset += 1
            if block is not None:
                found[sender] = block
    assert found == {sender: block for sender, block in sent.items() if sound[sender]}
    if all(sound.values()):
        assert together.size == 0


flips = st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))


@settings(max_examples=200, deadline=None)
@given(damage=st.one_of(flips, st.integers(0, len(WHOLE) - 1)))
def test_a_block_with_a_bit_flipped_or_its_end_cut_off_is_refused(damage):
    spoiled = bytearray(WHOLE)
    if isinstance(damage, tuple):
        spoiled[damage[0]] ^= 1 << damage[1]
    else:
        del spoiled[damage:]
    with pytest.raises(MessageRefused) as refused:
        decode(bytes(spoiled), b"2")
    assert refused.value.reason in ("damaged", "format")


@settings(max_examples=60, deadline=None)
@given(partition=st.integers(0, 1 << 30), items=st.integers(0, 50), scored=st.booleans(), seed=st.integers(0, 1 << 20))
def test_contributions_come_back_as_they_were(partition, items, scored, seed):
    made = contribution(partition, items=max(items, 1), scored=scored, seed=seed)
    assert_same(decode(encode(made), b"%d" % partition), made)
