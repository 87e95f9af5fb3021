"""Versions adopted at given offsets: how the stream is cut into batches and commits changes no bit of any row."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.user_state import HeadKind
from streams.versions import Rebase, Serving
from tests.models import HEADS, at
from tests.versions import Kept, processor, stream_of, streamed, version

EVENTS = 400
Outcome = tuple[bytes, dict[bytes, bytes], tuple[int | None, int | None], dict[Rebase, int]]
"""Logits, rows by user, the store's offset and version, how many rows moved which way"""


def outcome(kind: HeadKind, rebase: Rebase, adopted: tuple[int, ...], cuts=(), *, commit_events=16384) -> Outcome:
    """Version 1 from the first place in ``adopted`` on, beside it version 2 from the second, and so on."""
    models = [version(number, kind) for number in range(len(adopted) + 1)]
    served = {}
    for number, place in enumerate(adopted):
        canary = models[number + 1]
        served[place] = Serving(canary, earlier=tuple(models)) if number % 2 == 0 else Serving(
            models[number], canary, 0.4, tuple(models)
        )  # fmt: skip
    opened = Kept()
    with processor(models[0], opened, rebase=rebase, commit_events=commit_events) as work:
        logits = streamed(work, stream_of(EVENTS, 15), served, cuts)
        return logits.tobytes(), opened.rows(), at(opened.stores[0]), dict(work.moved)


@cache
def uncut(kind: HeadKind, rebase: Rebase, adopted: tuple[int, ...]) -> Outcome:
    return outcome(kind, rebase, adopted)


@pytest.mark.parametrize("rebase", ["history", "ring", "closed"])
@pytest.mark.parametrize("kind", HEADS)
def test_batches_and_commits_of_one_size_agree(kind, rebase):
    adopted = (90, 210, 300)
    assert outcome(kind, rebase, adopted, range(7, EVENTS, 7), commit_events=5) == uncut(kind, rebase, adopted)


@settings(max_examples=20)
@given(
    adopted=st.sets(st.integers(1, EVENTS - 1), min_size=1, max_size=3).map(sorted).map(tuple),
    cuts=st.sets(st.integers(1, EVENTS - 1), max_size=10),
    commit_events=st.integers(1, EVENTS),
    rebase=st.sampled_from(["history", "ring", "closed"]),
    kind=st.sampled_from(HEADS),
)
def test_any_cuts_and_commits_agree_whenever_versions_are_adopted(adopted, cuts, commit_events, rebase, kind):
    assert outcome(kind, rebase, adopted, cuts, commit_events=commit_events) == outcome(kind, rebase, adopted)
