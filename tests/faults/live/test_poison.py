"""Records that are no events among good ones: set aside whole with the right reason, and their neighbours untouched."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

from streams.live.letter import Letter, read_letter
from streams.rejects import Reason
from tests.faults.live.judge import EXPECTED
from tests.faults.live.playing import Place, Sent, clicks, committed_records, ends, send
from tests.faults.live.poison import BOMB, LEGAL, POISON, poison_for_ever
from tests.faults.live.stage import Stage, staged
from tests.faults.live.workers import WorkerProcess, crew, until_settled, wait_until

LARGEST = 12 << 20
"""What the topics take; a bomb is smaller until it is opened"""
GOOD = 8_000
SETTLED_S = 120.0
DEAD_LETTERS = "coldstream_dead_letters_total"
POISONED = "cannot be used"
SMALL = 1_000
"""Bytes of the poison that a source is made of"""
ALL_POISON, ALL_GOOD = 3_000, 2_000
SLOW = 1_000
"""Letters a second; without waiting a worker sends several thousand"""


def test_poison_among_good_events_is_set_aside_whole_and_its_neighbours_are_untouched(
    tmp_path, kafka_bootstrap, judge_all, seed, report
):
    """The first worker dies when it has sent some letters, so that they are sent again."""
    with staged(tmp_path, kafka_bootstrap, 2, max_message_bytes=LARGEST) as stage:
        sent = _mixed(seed)
        places = send(stage.bootstrap, stage.topic, sent, max_request_size=LARGEST)
        bombs = [_bomb(codec) for codec in ("gzip", "lz4", "snappy", "zstd")]
        for codec, bomb in bombs:
            places += send(stage.bootstrap, stage.topic, [bomb], max_request_size=2 * len(BOMB), compression_type=codec)
        sent += [bomb for _, bomb in bombs]
        worker = WorkerProcess(stage, "worker")
        with crew(worker):
            worker.start("after letters are sent", 2)
            assert worker.wait(SETTLED_S) < 0
            worker.start()
            until_settled((worker,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            verdict = judge_all(stage, (worker,))
        letters, again = _letters(stage)
    expected = {place: one for place, one in zip(places, sent, strict=True) if _reason(one) is not None}
    wrong = [
        f"{place}: {_reason(one)}: {wrong}"
        for place, one in expected.items()
        if (wrong := _wrong(letters.get(place), one, stage.topic))
    ]
    assert wrong == []
    assert letters.keys() == expected.keys()
    assert verdict.poison == len(expected)
    assert verdict.predictions == verdict.events == len(sent) - len(expected)
    assert verdict.repeated == 0
    reasons = Counter(letter.cause.reason for letter in letters.values())
    report(
        f"poison: {len(expected)} of {len(sent):,} records, {len(POISON)} kinds and {len(bombs)} compressed bombs, all "
        f"in the dead letters with the right one of {len(reasons)} reasons, {again} twice after a kill -9; all of "
        f"{verdict.events:,} neighbours as in one pass"
    )


def test_a_source_that_is_all_poison_is_waited_for_and_shows(tmp_path, kafka_bootstrap, judge_all, seed, report):
    small = (one for _, one in poison_for_ever() if len(one.value or b"") < SMALL)
    with staged(tmp_path, kafka_bootstrap, 1) as stage:
        worker = WorkerProcess(stage, "worker")
        with crew(worker):
            send(stage.bootstrap, stage.topic, islice(small, ALL_POISON))
            worker.start()
            wait_until(lambda: POISONED in _problems(worker), SETTLED_S, lambda: worker.probe())
            live = worker.probe("/livez")
            assert live is not None
            assert live[0] == 200, live
            began, before = time.monotonic(), worker.metric(DEAD_LETTERS)
            wait_until(lambda: worker.metric(DEAD_LETTERS) == ALL_POISON, SETTLED_S, "letters of all of it")
            rate = (ALL_POISON - before) / (time.monotonic() - began)
            assert rate < SLOW, "the worker does not slow down"
            send(stage.bootstrap, stage.topic, islice(clicks(seed, 50), ALL_GOOD))
            took = until_settled((worker,), ends(stage.bootstrap, stage.topic), SETTLED_S)
            assert POISONED not in _problems(worker)
            verdict = judge_all(stage, (worker,))
    assert (verdict.events, verdict.poison) == (ALL_GOOD, ALL_POISON)
    report(
        f"a source that is all poison: /readyz says so, {rate:.0f} letters/s are sent, and all is well {took:.1f} s "
        f"after {ALL_GOOD:,} good events were sent"
    )


def _mixed(seed: int) -> list[Sent]:
    """Ten good events to one that is none; legal oddities among them."""
    good, poison = clicks(seed, 200), poison_for_ever()
    sent: list[Sent] = []
    for number in range(GOOD // 10):
        sent += islice(good, 10)
        sent.append(next(poison)[1])
        if number % 50 == 0:
            sent += [Sent(b"u1", value) for value in LEGAL.values()]
    return sent


def _bomb(codec: str) -> tuple[str, Sent]:
    return codec, Sent(b"bomber", BOMB, ((EXPECTED, str(Reason.TOO_LARGE).encode()), ("codec", codec.encode())))


def _letters(stage: Stage) -> tuple[dict[Place, Letter], int]:
    """By the place that they came from, and how many came again."""
    found: dict[Place, Letter] = {}
    again = 0
    for records in committed_records(stage.bootstrap, stage.dead_letters)[stage.dead_letters].values():
        for record in records:
            letter = read_letter(record)
            assert letter is not None, record
            place = Place(letter.cause.partition, letter.cause.offset)
            again += place in found
            found[place] = letter
    return found, again


def _wrong(letter: Letter | None, one: Sent, topic: str) -> str | None:
    """How the letter is not the record's."""
    if letter is None:
        return "no letter"
    size = None if one.value is None else len(one.value)
    kept = letter.value is None or (one.value or b"").startswith(letter.value)
    differs = {
        "topic": letter.cause.topic != topic,
        "reason": letter.cause.reason != _reason(one),
        "key": letter.key != one.key,
        "headers": tuple(letter.headers) != one.headers,
        "size": letter.value_bytes != size,
        "value": not kept or (letter.value is None) != (one.value is None),
        "cut": letter.whole != (size is None or size < LARGEST) or (letter.whole and letter.value != one.value),
    }
    return ", ".join(f"{what}: {letter.cause}" for what, so in differs.items() if so) or None


def _reason(one: Sent) -> str | None:
    return next((value.decode() for name, value in one.headers if name == EXPECTED), None)


def _problems(worker: WorkerProcess) -> str:
    answer = worker.probe()
    return "" if answer is None or answer[0] != 503 else "; ".join(answer[1]["problems"])
