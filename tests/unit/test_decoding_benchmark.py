"""The benchmark of decoding runs, and all its events are ones that compiled code reads."""

from __future__ import annotations

from benchmarks import decoding
from benchmarks.command import Options
from configs.settings import EventSchema
from streams.decoding.flat_events import FlatReader


def test_it_measures_every_way_of_decoding():
    figures = list(decoding.run(Options(scale=1e-3)))
    assert [(figure.case, figure.name) for figure in figures] == [
        ("JSON, flat", "compiled"),
        ("JSON, flat", "decoding"),
        ("JSON, flat", "record by record"),
        ("JSON, flat", "msgspec alone"),
        ("JSON, flat", "json.loads alone"),
        ("JSON, flat", "msgspec alone / decoding"),
        ("JSON, flat", "json.loads alone / decoding"),
        ("JSON, event ids", "decoding"),
        ("JSON, features", "decoding"),
        ("Avro", "decoding"),
    ]
    assert all(figure.value > 0 and figure.target is None for figure in figures)


def test_its_events_take_the_compiled_path():
    chunk = decoding.events(100)
    columns = FlatReader(EventSchema()).read(chunk.data, chunk.value_start, chunk.value_length)
    assert columns.accepted.all()
    assert 110 < chunk.value_length.mean() < 130
