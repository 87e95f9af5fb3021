"""``verify``: a store against itself, against the source that it was fed from, and against receipts of erasures."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.exceptions import ColdstreamError
from learner.event_clock import NOBODY, advance, new_clock
from learner.interactions import Interactions
from learner.ledger_trace import Divergence, History, trace
from learner.tally import Tally
from learner.user_state import ItemHashes
from state.audit import Audit, Difference, Expected, audit, shown
from state.codec import Progress
from state.exceptions import SnapshotError, StoreUnreadable
from state.expiry import Expiry, pack_clock
from state.receipt import Receipt
from state.snapshots.content import held_partitions
from state.snapshots.manifest import partition_name, partition_of
from state.snapshots.snapshot import restore
from state.store import RocksReader

Batches = Callable[[], Iterable[Interactions]]
"""Reads the source from its start: the partition's events, their offsets rising. Called twice where users differ."""
TRACED_USERS = 200
"""Users that differ whose events are read again to name the offset: those who differ earliest, as far as it is known"""


class VerificationError(ColdstreamError):
    """A store cannot be held against what was named: the message says why and what to name."""


def verify_store(
    path: Path,
    batches: Batches | None = None,
    *,
    expiry: Expiry | None = None,
    receipts: Mapping[str, Receipt] | None = None,
) -> Audit:
    """Audits one partition's store, beside a writer or not, and writes nothing.

    ``batches`` is the source; ``expiry`` is what the store was run with. ``receipts``, by their names, must hold, and
    what they erased is not missed. Raises StoreError and VerificationError when it cannot be checked.
    """
    receipts = receipts or {}
    with RocksReader(path) as store:
        if batches is None:
            result = audit(store)
        else:
            progress = store.progress()
            _refuse_other_expiry(path, progress, expiry)
            floor = _floor(tuple(receipts.values()), partition_of(path.name) or 0)
            tally = _tallied(batches, progress, expiry, floor)
            result = audit(store, _expected(tally))
            _check_source(result, tally, expiry)
            _tell_differences(result, store, batches, expiry, floor)
        for name, receipt in receipts.items():
            _check_receipt(result, store, name, receipt)
    return result


def verify_receipt_in_snapshots(name: str, receipt: Receipt) -> Audit:
    """Searches the snapshots that a receipt names for its user; a snapshot that is gone is noted, not found fault with.

    Raises nothing for a snapshot that cannot be read: the note says why.
    """
    result = Audit(Path(name), None)
    for removed in receipt.snapshots:
        with tempfile.TemporaryDirectory(prefix="coldstream-verify-") as directory:
            try:
                restore(removed.url, Path(directory))
            except SnapshotError as error:
                result.notes.append(f"receipt {name}: the snapshot {removed.url} was not searched: {error}")
                continue
            for partition in held_partitions(Path(directory)):
                with RocksReader(Path(directory) / partition_name(partition)) as store:
                    _check_receipt(result, store, name, receipt, f"partition {partition} of the snapshot {removed.url}")
    return result


# --- the source


def _refuse_other_expiry(path: Path, progress: Progress | None, expiry: Expiry | None) -> None:
    if progress is None or bool(progress.clock) == (expiry is not None):
        return
    says = "with state.expire_after_days set" if progress.clock else "without state.expire_after_days"
    raise VerificationError(f"{path} was run {says}: verify it with the settings of that run")


def _floor(receipts: Sequence[Receipt], partition: int) -> Callable[[bytes], int] | None:
    """Up to which offset a user's events do not count; None where no receipt says anything of the partition."""
    erased = [(receipt, offset) for receipt in receipts if (offset := receipt.offset(partition)) is not None]
    if not erased:
        return None
    return lambda user: max((offset for receipt, offset in erased if receipt.names(user)), default=-1)


def _tallied(
    batches: Batches, progress: Progress | None, expiry: Expiry | None, floor: Callable[[bytes], int] | None
) -> Tally:
    tally = Tally(None if expiry is None else expiry.pace, floor)
    if progress is not None:
        for batch in _up_to(batches(), progress.offset):
            tally.add(batch)
    return tally


def _up_to(batches: Iterable[Interactions], offset: int) -> Iterator[Interactions]:
    for batch in batches:
        within = int(np.searchsorted(batch.offset, offset, side="right"))
        yield batch if within == len(batch) else batch.take(slice(0, within))
        if within < len(batch):
            return


def _expected(tally: Tally) -> Expected:
    return Expected(tally.users, tally.events, tally.ledgers, tally.last_offsets, tally.idle_up_to)


def _check_source(result: Audit, tally: Tally, expiry: Expiry | None) -> None:
    """What the source says of the partition as a whole."""
    result.source_events = tally.total_events
    progress = result.progress
    if progress is None:
        return
    if tally.last_offset != progress.offset:
        text = f"the store is at offset {progress.offset}, the source's latest event up to there at {tally.last_offset}"
        result.add("source", text, offset=tally.last_offset)
    if expiry is not None and pack_clock(tally.clock) != progress.clock:
        result.add("clock", "the expiry clock is not the source's: other events, or another state.expire_after_days")


# --- users who differ


def _tell_differences(
    result: Audit, store: RocksReader, batches: Batches, expiry: Expiry | None, floor: Callable[[bytes], int] | None
) -> None:
    """Turns differences into findings, the first of them with the offset where they begin."""
    differences = sorted(result.differences, key=lambda difference: difference.bound)
    result.differences = []
    if not differences or result.progress is None:
        for difference in differences:
            _tell(result, difference, None)
        return
    offset = result.progress.offset
    traced = [difference.user for difference in differences[:TRACED_USERS] if difference.due is not None]
    histories = _histories(_up_to(batches(), offset), set(traced), expiry, floor)
    for difference in differences:
        history = histories.get(difference.user)
        _tell(result, difference, None if history is None else _traced(store, history, difference, offset))
    if len(differences) > TRACED_USERS:
        result.notes.append(
            f"offsets were traced for {len(traced):,} of {len(differences):,} users that differ; of the others the "
            "latest possible one is told"
        )
    result.findings.sort(key=lambda finding: (finding.offset is None, finding.offset or 0))


def _traced(store: RocksReader, history: History, difference: Difference, offset: int) -> Divergence:
    if difference.held is None:
        start = int(np.flatnonzero(history.starts)[-1])
        return Divergence(int(history.offsets[start]), True, "the first event that is missing")
    rows, _ = store.get_many([difference.user])
    return trace(history, store.layout, store.layout.rows(rows)[0], offset)


def _tell(result: Audit, difference: Difference, found: Divergence | None) -> None:
    user, held, due = difference.user, difference.held, difference.due
    offset = max(side[1] for side in (held, due) if side is not None)
    place, exact = f"at or before offset {offset}", False
    if found is not None:
        offset, exact = found.offset, found.exact
        place = f"{'' if exact else 'at or before '}offset {offset}: {found.what}"
    if held is None and due is not None:
        result.add(
            "missing", f"user {shown(user)} has no row, the source has {due[0]:,} events; {place}", user, offset, exact
        )
    elif due is None and held is not None:
        text = f"user {shown(user)} has {held[0]:,} events, the source none that count; {place}"
        result.add("extra", text, user, offset, exact)
    elif held is not None and due is not None:
        same = "other ones than the source" if held[0] == due[0] else f"the source {due[0]:,}"
        result.add("differs", f"user {shown(user)} has {held[0]:,} events, {same}; {place}", user, offset, exact)


def _histories(
    batches: Iterable[Interactions], users: set[bytes], expiry: Expiry | None, floor: Callable[[bytes], int] | None
) -> dict[bytes, History]:
    """All events of these users."""
    hashes, clock = ItemHashes(), new_clock()
    parts: dict[bytes, list[History]] = {}
    latest: dict[bytes, int] = {}
    for batch in batches:
        idle = np.full(len(batch), NOBODY, np.int64)
        if expiry is not None:
            idle, clock = advance(clock, batch, expiry.pace)
        hashed = hashes.of(batch.item_ids)
        for code, user in enumerate(map(str.encode, batch.user_ids)):
            if user not in users:
                continue
            mine = np.flatnonzero((batch.user == code) & (batch.offset > (-1 if floor is None else floor(user))))
            if len(mine):
                offsets = batch.offset[mine]
                before = np.append(latest.get(user, -1), offsets[:-1])
                starts = (before <= idle[mine]) | (before < 0)
                latest[user] = int(offsets[-1])
                parts.setdefault(user, []).append(
                    History(offsets, hashed[batch.item[mine]], batch.label[mine], batch.event_time_ms[mine], starts)
                )
    return {user: History.joined(found) for user, found in parts.items()}


# --- receipts


def _check_receipt(result: Audit, store: RocksReader, name: str, receipt: Receipt, where: str = "the store") -> None:
    """The receipt's user must not be among the rows."""
    salted, wanted = hashlib.sha256(bytes.fromhex(receipt.salt)), bytes.fromhex(receipt.id_sha256)
    searched = 0
    try:
        for users, _ in store.stored():
            searched += len(users)
            for user in users:
                salted_id = salted.copy()
                salted_id.update(user)
                if salted_id.digest() == wanted:
                    result.add("erased", f"the user of receipt {name} is in {where}: {shown(user)}", user)
    except StoreUnreadable as error:
        result.notes.append(f"receipt {name}: not all of {where} could be searched: {error}")
        return
    result.notes.append(f"receipt {name}: unchanged since it was written; {searched:,} ids of {where} were searched")
