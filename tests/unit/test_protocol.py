"""The evaluation protocol: which events are offline, online, scored."""

from __future__ import annotations

import numpy as np
import pytest

from configs.settings import DataSettings, EventSchema
from streams.protocol import ProtocolError, offline_events, online_batches, split_users
from streams.sources import open_source, time_ordered

EVENTS = """user_id,item_id,label,event_time_ms
a,x,1,0
b,x,0,10
a,y,1,20
c,x,1,30
b,y,0,30
d,z,1,40
c,y,0,50
a,z,0,60
d,x,1,70
"""


@pytest.fixture
def ordered(tmp_path):
    def order(text):
        path = tmp_path / "events.csv"
        path.write_text(text)
        return time_ordered(open_source(DataSettings(paths=(path,), events=EventSchema())), tmp_path)

    return order


def triples(batch):
    return [
        (batch.user_ids[u], batch.item_ids[i], int(t))
        for u, i, t in zip(batch.user, batch.item, batch.event_time_ms, strict=True)
    ]


def test_users_before_the_cut_are_learned_from_and_later_ones_streamed_whole(ordered):
    events = ordered(EVENTS)
    split = split_users(events, 0.5)
    assert (split.cut_time_ms, split.offline_users) == (30, 2)
    assert triples(offline_events(events, split)) == [("a", "x", 0), ("b", "x", 10), ("a", "y", 20)]
    (online,) = online_batches(events, split)
    assert triples(online) == [("c", "x", 30), ("d", "z", 40), ("c", "y", 50), ("d", "x", 70)]
    np.testing.assert_array_equal(online.offset, [3, 5, 6, 8])


def test_order_of_lines_does_not_matter_but_time_does(ordered):
    head, *rows = EVENTS.splitlines()
    events = ordered("\n".join([head, *reversed(rows)]) + "\n")
    split = split_users(events, 0.5)
    (online,) = online_batches(events, split)
    assert triples(online) == [("c", "x", 30), ("d", "z", 40), ("c", "y", 50), ("d", "x", 70)]
    assert (np.diff(online.offset) > 0).all()


def test_scoring_the_last_share_keeps_the_users_and_not_the_cut(ordered):
    events = ordered(EVENTS)
    split = split_users(events, 0.25, score_last=0.25)
    assert split.is_online(events) == {"b", "c", "d"}
    assert split.is_scored(events) == {"d"}


def test_scoring_users_that_are_offline_is_an_error(ordered):
    with pytest.raises(ProtocolError, match=r"score_last 0\.8.*at most 0\.5"):
        split_users(ordered(EVENTS), 0.5, score_last=0.8)


def test_a_single_user_or_a_common_start_is_an_error_that_says_what_to_do(ordered):
    with pytest.raises(ProtocolError, match="the data has 1 user"):
        split_users(ordered("user_id,item_id,label,event_time_ms\na,x,1,0\na,y,0,1\n"), 0.5)
    with pytest.raises(ProtocolError, match=r"no offline users.*time column"):
        split_users(ordered("user_id,item_id,label,event_time_ms\na,x,1,5\nb,y,0,5\n"), 0.5)
