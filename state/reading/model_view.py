"""What a reader of a state directory needs of the model, in one file beside the rows: ``model.safetensors``.

With it a query scores items and replays a user's latest events without torch, compiled code or the training artifact.
The run that owns the directory writes it. Symbols: I items, U users, K distinct starts, d and e widths, G grades.

    item_hash (I,) u64 rising      ``item_hash`` of each id; item_buckets: where each range of hashes starts
    item_ids u8, item_ends u64     the ids' UTF-8, one after the other, and where each ends
    psi base second_psi            (I + 1, …) rows of ``ItemTable``, in the order of hashes; the last: unknown items
    start_hash (U,) start_row (U,) users whose start is not φ_0, by the hash of their id, and their row of
    start_mean (K, d)              the distinct starts
    user_weights (Fu, d)           W, for a user whose encoded features are at hand (not in views of older programs)
    first.* second.*               constants of the filters; ``kappa``, ``tau`` and such as f64
    grades (G,)                    the graded values
    earlier.V.*                    priors of version V, for rows that stand on it: start_mean, user_weights, and of
                                   first.* and second.* the initialization and the covariance
    canary.*                       all of the above but the grades, of the version that serves a share of the users

Metadata: format version, layout of the rows, meta version, fingerprint of the artifact, days until a user expires;
how rows come onto a version, the newest version there was, the canary's and its share of the users (``Versions``; not
in views of older programs).
Items are the vocabulary, all of the catalogue, and those that the run met. Features that come inside the events are
known of items that the run met, and of no user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from learner.filters import FirstFilter, Float, ItemTable, SecondFilter
from learner.prior_exchange import Prior
from learner.retrace import AdaptivePart, Retrace
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import RowLayout, item_hash
from state.exceptions import StoreDamaged
from state.expiry import Expiry
from state.reading.sealed_tensors import SealedTensors, write_sealed

if TYPE_CHECKING:  # it brings compiled code
    from learner.serving import ServingModel

Rebase = Literal["history", "ring", "closed"]
FILE = "model.safetensors"
FORMAT, FORMAT_VERSION = "coldstream model view", "1"
DAY_MS = 86_400_000
CHUNK = 8192
"""Items that a walk over the catalogue takes at once: their arithmetic stays within a processor's cache"""
_CANARY = "canary."
RING_BITS = 40
"""Of an item's hash, as a ring entry keeps it"""
_BUCKET = 8
"""Items that share a bucket, on average"""


class Features(NamedTuple):
    """A user's encoded features."""

    columns: NDArray[np.int64]
    """(n,)"""
    weights: Float
    """(n,)"""


@dataclass(frozen=True, slots=True)
class Versions:
    """What else a run knows of its versions when it writes the model that serves."""

    rebase: Rebase = "history"
    """How the stream brings a row onto a version: ``meta.rebase``, or ``ring`` where no histories are kept"""
    newest: int | None = None
    """The highest number given so far, to whatever became of it; None: the model's own, or the canary's"""
    canary: ServingModel | None = None
    canary_share: float = 0.0
    """Of the users, by a hash of their id, whom the canary serves"""
    earlier: tuple[ServingModel, ...] = ()
    """Whose priors the stream exchanges for those of the version that serves"""


ONE = Versions()
"""There is no version but the model's"""


def write_model_view(
    directory: Path,
    model: ServingModel,
    layout: RowLayout,
    expire_after_days: float | None,
    versions: Versions = ONE,
) -> None:
    """Writes the file into the state directory, which is made where it is missing; an older one is replaced whole."""
    directory.mkdir(parents=True, exist_ok=True)
    earlier = versions.earlier if versions.rebase == "closed" else ()
    tensors = {"grades": model.fixed.grades.astype(np.float32), **_model_tensors(model, earlier)}
    canary, newest = versions.canary, model.meta_version
    if canary is not None:
        tensors |= {f"{_CANARY}{name}": tensor for name, tensor in _model_tensors(canary, earlier).items()}
        newest = max(newest, canary.meta_version)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": layout.fingerprint,
        "meta_version": str(model.meta_version),
        "artifact": model.fingerprint,
        "expire_after_days": "" if expire_after_days is None else repr(float(expire_after_days)),
        "rebase": versions.rebase,
        "newest_version": str(newest if versions.newest is None else versions.newest),
        "canary_version": "" if canary is None else str(canary.meta_version),
        "canary_share": repr(float(versions.canary_share if canary is not None else 0)),
    }
    write_sealed(directory / FILE, tensors, metadata)


class ModelView:
    """The model of one state directory, mapped into memory. Raises StoreUnreadable, StoreDamaged."""

    def __init__(self, directory: Path, *, canary_of: ModelView | None = None) -> None:
        """``canary_of``: the view that ``serving`` makes this one of."""
        self._directory = directory
        self.path = directory / FILE
        self._tensors: SealedTensors = SealedTensors(self.path) if canary_of is None else canary_of._tensors
        self._canary: ModelView | None = None
        metadata = self._tensors.metadata
        if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise StoreDamaged(
                f"{self.path} is {metadata.get('format', 'no model view')} of version "
                f"{metadata.get('format_version', 'unknown')}, this program reads a {FORMAT} of version "
                f"{FORMAT_VERSION}: use the version of coldstream that wrote it, or run again"
            )
        layout = RowLayout.parse(metadata["layout"])
        if layout is None:
            raise StoreDamaged(f"{self.path} names no layout of rows ({metadata['layout']}): run again")
        self.layout = layout
        self.is_canary = canary_of is not None
        self._of = _CANARY if self.is_canary else ""
        self.meta_version = int(metadata["canary_version" if self.is_canary else "meta_version"])
        self.newest_version = int(metadata.get("newest_version", self.meta_version))
        self.rebase = _rebase(self.path, metadata.get("rebase", "history"))
        self._canary_share = float(metadata.get("canary_share", 0))
        self.fingerprint = metadata["artifact"]
        days = metadata["expire_after_days"]
        self.expiry = Expiry(round(float(days) * DAY_MS)) if days else None
        self.grades: Float = self._tensors.whole("grades")
        self.first = FirstFilter(kind=layout.kind, **self._group("first"))
        self.second = SecondFilter(**self._group("second")) if layout.second_dim else None
        self.retrace = Retrace(self.first, self.second)
        self.item_count = self._tensors.length(f"{self._of}item_hash")
        self._items = _Index(self._tensors, f"{self._of}item")
        self._starts = _Index(self._tensors, f"{self._of}start")

    def serving(self, user_id: str) -> ModelView:
        """Of the version that serves this user: the canary's for its share of the users, else this one."""
        if not self._canary_share or not drawn(user_crcs([user_id.encode()]), CANARY, self._canary_share)[0]:
            return self
        if self._canary is None:
            self._canary = ModelView(self._directory, canary_of=self)
        return self._canary

    def places(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """(len(item_ids),) where each item stands; I for one that is not here."""
        return np.fromiter(map(self._place, item_ids), np.int64, len(item_ids))

    def place_of_ring_item(self, ring_item: int) -> int:
        """Where the item of a ring entry stands; I for none. Of two with the same 40 bits, the first."""
        return next(self._items.find(ring_item, RING_BITS), self.item_count)

    def items(self, places: NDArray[np.int64]) -> ItemTable:
        """Their rows, in this order; place I is the row of an unknown item."""
        return ItemTable(*(self._tensors.rows(self._of + name, places) for name in ("psi", "base", "second_psi")))

    def chunks(self) -> Iterator[tuple[int, ItemTable]]:
        """(first place, rows) of all items, some thousands at a time."""
        for start in range(0, self.item_count, CHUNK):
            stop = min(start + CHUNK, self.item_count)
            columns = (self._tensors.part(self._of + n, start, stop) for n in ("psi", "base", "second_psi"))
            yield start, ItemTable(*columns)

    def item_id(self, place: int) -> str:
        """The id of the item at a place below I."""
        start, stop = self._tensors.part(f"{self._of}item_ends", place, place + 2).tolist()
        return self._tensors.part(f"{self._of}item_ids", start, stop).tobytes().decode()

    def start(self, user_id: str, features: Features | None = None) -> AdaptivePart:
        """Where a user starts: by the catalogue's features, else by these ones, else at φ_0."""
        return self.retrace.start(self._start_mean("", user_id, features))

    def start_of(self, user_id: str, features: Features) -> AdaptivePart:
        """Where the user starts with these features; in views of older programs with the catalogue's."""
        if not self._tensors.has(f"{self._of}user_weights"):
            return self.start(user_id)
        return self.retrace.start(self._mean_of("", features))

    def priors(self, version: int, user_id: str, features: Features | None = None) -> list[Prior] | None:
        """What the filters of a user begin with, as ``start``, under this version or an earlier one; None: not here."""
        of = "" if version == self.meta_version else f"earlier.{version}."
        if not self._tensors.has(f"{self._of}{of}first.initialization"):
            return None
        own = [Prior(self._start_mean(of, user_id, features)[None], self._whole(f"{of}first.covariance"))]
        if self.second is None:
            return own
        return [*own, Prior(self._whole(f"{of}second.initialization")[None], self._whole(f"{of}second.covariance"))]

    def grade_value(self, grade: int) -> float | None:
        """The graded value of a ring entry's grade; None where it has none."""
        return float(self.grades[grade]) if grade < len(self.grades) else None

    def _place(self, item_id: str) -> int:
        found = self._items.find(item_hash(item_id), 64)
        return next((place for place in found if self.item_id(place) == item_id), self.item_count)

    def _start_mean(self, of: str, user_id: str, features: Features | None) -> Float:
        """(d,) under a version, as ``start``."""
        for place in self._starts.find(item_hash(user_id), 64):
            row = int(self._tensors.part(f"{self._of}start_row", place, place + 1)[0])
            mean: Float = self._tensors.part(f"{self._of}{of}start_mean", row, row + 1)[0]
            return mean
        if features is None or not self._tensors.has(f"{self._of}{of}user_weights"):
            return self._whole(f"{of}first.initialization")
        return self._mean_of(of, features)

    def _mean_of(self, of: str, features: Features) -> Float:
        """(d,) as ``ServingModel.means_of`` has it, to the bit."""
        mean, table = self._whole(f"{of}first.initialization").copy(), self._whole(f"{of}user_weights")
        for column, weight in zip(features.columns.tolist(), features.weights, strict=True):
            mean += weight * table[column]
        return mean

    def _whole(self, name: str) -> Float:
        return self._tensors.whole(self._of + name)

    def _group(self, name: str) -> dict[str, Any]:
        kind = FirstFilter if name == "first" else SecondFilter
        fields = [field.name for field in dataclasses.fields(kind) if field.name != "kind"]
        arrays = {field: self._whole(f"{name}.{field}") for field in fields}
        return {field: float(a[()]) if a.ndim == 0 else a for field, a in arrays.items()}


def _rebase(path: Path, named: str) -> Rebase:
    for rebase in get_args(Rebase):
        if rebase == named:
            known: Rebase = rebase
            return known
    raise StoreDamaged(f"{path} brings rows onto a version by {named!a}: use the version of coldstream that wrote it")


class _Index:
    """Places in a rising array of hashes, found by way of buckets: a look-up touches a few bytes of a large file."""

    def __init__(self, tensors: SealedTensors, name: str) -> None:
        self._tensors = tensors
        self._hash, self._buckets = f"{name}_hash", f"{name}_buckets"
        self._bits = (tensors.length(self._buckets) - 1).bit_length() - 1

    def find(self, prefix: int, bits: int) -> Iterator[int]:
        """Places of the hashes that begin with the ``bits`` bits of ``prefix``; at least the buckets' bits."""
        bucket = prefix >> (bits - self._bits)
        start, stop = self._tensors.part(self._buckets, bucket, bucket + 2).tolist()
        hashes = self._tensors.part(self._hash, start, stop).tolist()
        return (place for place, hashed in enumerate(hashes, start) if hashed >> (64 - bits) == prefix)


def _bucket_starts(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """(2^b + 1,) where each range of hashes starts, b ≥ 1."""
    bits = min(max((len(hashes) // _BUCKET).bit_length(), 1), 30)
    return np.searchsorted(hashes >> np.uint64(64 - bits), np.arange(2**bits + 1)).astype(np.uint32)


def _model_tensors(model: ServingModel, earlier: Sequence[ServingModel]) -> dict[str, NDArray[Any]]:
    """All that there is of one version."""
    others = [version for version in earlier if version.meta_version != model.meta_version]
    tensors = _constants("first", model.first)
    if model.second is not None:
        tensors |= _constants("second", model.second)
    for version in others:
        tensors |= _prior_tensors(version)
    return tensors | _item_tensors(*model.named_items()) | _start_tensors(model, others)


def _item_tensors(item_ids: tuple[str, ...], table: ItemTable) -> dict[str, NDArray[Any]]:
    hashes = np.fromiter(map(item_hash, item_ids), np.uint64, len(item_ids))
    order = np.argsort(hashes, kind="stable")
    encoded = [item_ids[k].encode() for k in order.tolist()]
    ends = np.zeros(len(encoded) + 1, np.uint64)
    np.cumsum(np.fromiter(map(len, encoded), np.uint64, len(encoded)), out=ends[1:])
    rows = np.append(order, len(order))
    return {
        "item_hash": hashes[order],
        "item_buckets": _bucket_starts(hashes[order]),
        "item_ids": np.frombuffer(b"".join(encoded), np.uint8),
        "item_ends": ends,
        "psi": table.psi[rows],
        "base": table.base[rows],
        "second_psi": table.second_psi[rows],
    }


def _start_tensors(model: ServingModel, earlier: Sequence[ServingModel]) -> dict[str, NDArray[Any]]:
    """Users are told apart by where they start under any of the versions: all of them know the same catalogue."""
    versions = (model, *earlier)
    user_ids = model.named_starts()[0]
    means = np.concatenate([version.named_starts()[1] for version in versions], axis=1)
    shared = np.concatenate([version.first.initialization for version in versions])
    own = np.flatnonzero((means.view(np.uint32) != shared.view(np.uint32)).any(axis=1))
    hashes = np.fromiter((item_hash(user_ids[k]) for k in own.tolist()), np.uint64, len(own))
    order = np.argsort(hashes, kind="stable")
    distinct, rows = np.unique(means[own[order]].view(np.uint32), axis=0, return_inverse=True)
    tensors: dict[str, NDArray[Any]] = {
        "start_hash": hashes[order],
        "start_buckets": _bucket_starts(hashes[order]),
        "start_row": rows.reshape(-1).astype(np.uint32),
    }
    dim = model.first.dim
    for k, version in enumerate(versions):
        of = f"earlier.{version.meta_version}." if k else ""
        mean = np.ascontiguousarray(distinct[:, k * dim : (k + 1) * dim]).view(np.float32)
        tensors |= {f"{of}start_mean": mean, f"{of}user_weights": version.fixed.user_feature_weights}
    return tensors


def _prior_tensors(version: ServingModel) -> dict[str, NDArray[Any]]:
    filters = {"first": version.first, "second": version.second}
    return {
        f"earlier.{version.meta_version}.{name}.{field}": getattr(each, field)
        for name, each in filters.items()
        for field in ("initialization", "covariance")
        if each is not None
    }


def _constants(group: str, constants: FirstFilter | SecondFilter) -> dict[str, NDArray[Any]]:
    values = {field.name: getattr(constants, field.name) for field in dataclasses.fields(constants)}
    return {
        f"{group}.{name}": np.asarray(value, np.float64 if isinstance(value, float) else np.float32)
        for name, value in values.items()
        if name != "kind"
    }
