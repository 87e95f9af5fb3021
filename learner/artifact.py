"""A trained model on disk: one directory, no pickle, verified when it is read. Reading it needs no torch.

    manifest.json        format version, library versions, settings, vocabulary, encoders, metrics, fingerprint
    model.safetensors    fixed.*, first.*, second.*: what the stream serves
                         parameters.*: every trainable tensor, the item posterior included, for later updates
    histories.safetensors   what later updates replay of the offline users (``learner.offline_histories``)

The fingerprint is the SHA-256 of the canonical manifest, which holds the SHA-256 of both files: any changed byte
shows. Only the clock's readings (``wall_clock``) stand outside it, so that the same training gives the same
fingerprint, interrupted or not. ArtifactError names what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from configs.exceptions import ColdstreamError
from configs.settings import LearnerSettings, TrainingSettings
from learner.features import Catalogue, EncodedField, FeatureEncoder, FeatureField, SparseRows
from learner.offline_histories import OfflineHistories
from learner.serving import FirstFilter, FixedPart, SecondFilter, ServingModel

FORMAT_VERSION = 1
"""Raised when a reader of the old layout would misread the new one."""
MANIFEST, TENSORS, HISTORIES = "manifest.json", "model.safetensors", "histories.safetensors"
HISTORIES_HASH = "histories_sha256"
WALL_CLOCK = "wall_clock"
"""Part of the manifest outside the fingerprint."""
_CLOCK_METRICS = frozenset({"train_s"})
"""Metrics that a clock gave: they differ from run to run of the same training."""


class ArtifactError(ColdstreamError):
    """The directory holds no model that this version can use: the message names what differs."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Everything a trained model is."""

    fixed: FixedPart
    first: FirstFilter
    second: SecondFilter | None
    learner: LearnerSettings
    training: TrainingSettings
    parameters: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Trainable tensors by their name in ``learner.recommender.Recommender``."""
    like_rate: tuple[float, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was measured in training (JSON values): history, events, users, seconds."""
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library versions of the process that wrote it."""
    offline: OfflineHistories | None = None
    """What was trained on; not there in a model that was read, see ``read_histories``"""

    def with_metrics(self, **metrics: Any) -> Artifact:
        """The same model with more said about how it was made."""
        return dataclasses.replace(self, metrics={**self.metrics, **metrics})

    def serving(self, users: Catalogue | None = None, items: Catalogue | None = None) -> ServingModel:
        """The model as the stream uses it; catalogues give features of ids the vocabulary does not hold."""
        return ServingModel(self.fixed, self.first, self.second, users=users, items=items, fingerprint=self.fingerprint)


def write_artifact(directory: Path, artifact: Artifact) -> str:
    """Writes the model and returns its fingerprint. The manifest comes last, so a torn write is not an artifact."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    tensors = _tensors(artifact)
    partial = directory / (TENSORS + ".partial")
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, partial)
    partial.replace(directory / TENSORS)
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": library_versions(),
        "tensors_sha256": _sha256(directory / TENSORS),
        **_write_histories(directory, artifact.offline),
        "learner": artifact.learner.model_dump(mode="json"),
        "training": artifact.training.model_dump(mode="json"),
        "item_ids": list(artifact.fixed.item_ids),
        "item_encoder": _encoder_to_json(artifact.fixed.item_encoder),
        "user_encoder": _encoder_to_json(artifact.fixed.user_encoder),
        "like_rate": list(artifact.like_rate),
        "metrics": {name: value for name, value in artifact.metrics.items() if name not in _CLOCK_METRICS},
    }
    fingerprint = _fingerprint(manifest)
    clock = {name: value for name, value in artifact.metrics.items() if name in _CLOCK_METRICS}
    text = json.dumps({"fingerprint": fingerprint, **manifest, WALL_CLOCK: clock}, indent=1, ensure_ascii=False)
    partial = directory / (MANIFEST + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST)
    return fingerprint


def read_artifact(directory: Path) -> Artifact:
    """Reads and verifies a model. Raises ArtifactError when it is absent, damaged or of another version."""
    manifest = _verified_manifest(directory)
    try:
        learner = LearnerSettings.model_validate(manifest["learner"])
        training = TrainingSettings.model_validate(manifest["training"])
        item_encoder = _encoder_from_json(manifest["item_encoder"])
        user_encoder = _encoder_from_json(manifest["user_encoder"])
        with safe_open(directory / TENSORS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (KeyError, ValidationError, SafetensorError) as error:
        raise ArtifactError(f"{directory} cannot be read as a model: {error}; train it again") from error
    fixed, first, second = (_group(tensors, name) for name in ("fixed", "first", "second"))
    features = SparseRows(*(fixed.pop(f"item_features.{part}") for part in ("starts", "columns", "weights")))
    return Artifact(
        FixedPart(
            item_ids=tuple(manifest["item_ids"]), item_features=features, item_encoder=item_encoder,
            user_encoder=user_encoder, base_bias=float(fixed.pop("base_bias")), **fixed,
        ),
        FirstFilter(kind=learner.head, **{k: _scalar(k, v) for k, v in first.items()}),
        SecondFilter(**{k: _scalar(k, v) for k, v in second.items()}) if second else None,
        learner,
        training,
        _group(tensors, "parameters"),
        tuple(manifest["like_rate"]),
        {**manifest["metrics"], **manifest[WALL_CLOCK]},
        manifest["fingerprint"],
        manifest["versions"],
    )  # fmt: skip


def read_histories(directory: Path) -> OfflineHistories:
    """The offline users' histories of a model. Raises ArtifactError where it has none, or they are damaged."""
    manifest, path = _verified_manifest(directory), directory / HISTORIES
    if HISTORIES_HASH not in manifest:
        raise ArtifactError(
            f"{directory} was written without {HISTORIES}, so the online stage has nothing to replay: train it again"
        )
    if not path.is_file() or _sha256(path) != manifest[HISTORIES_HASH]:
        raise ArtifactError(f"{path} is missing, or does not match its hash in {MANIFEST}: copy the whole directory")
    try:
        return OfflineHistories.of(load_file(path))
    except (KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as histories: {error}; train the model again") from error


def _write_histories(directory: Path, offline: OfflineHistories | None) -> dict[str, str]:
    """What the manifest says of them."""
    path = directory / HISTORIES
    if offline is None:
        path.unlink(missing_ok=True)
        return {}
    partial = path.with_name(path.name + ".partial")
    save_file({name: np.asarray(array, order="C") for name, array in offline.tensors().items()}, partial)
    partial.replace(path)
    return {HISTORIES_HASH: _sha256(path)}


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("coldstream", "numpy", "numba", "torch", "rocksdict", "pyarrow", "safetensors")
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


_SCALARS = {"kappa", "tau", "alpha"}


def _scalar(name: str, value: NDArray[Any]) -> Any:
    return float(value) if value.ndim == 0 or name in _SCALARS else value


def _tensors(artifact: Artifact) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for group, part in (("fixed", artifact.fixed), ("first", artifact.first), ("second", artifact.second)):
        if part is None:
            continue
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if isinstance(value, SparseRows):
                for inner in dataclasses.fields(value):
                    tensors[f"{group}.{f.name}.{inner.name}"] = getattr(value, inner.name)
            elif isinstance(value, np.ndarray):
                tensors[f"{group}.{f.name}"] = value
            elif isinstance(value, float):
                tensors[f"{group}.{f.name}"] = np.asarray(value, np.float64)
    return tensors | {f"parameters.{name}": array for name, array in artifact.parameters.items()}


def _group(tensors: dict[str, NDArray[Any]], group: str) -> dict[str, Any]:
    prefix = group + "."
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _encoder_to_json(encoder: FeatureEncoder) -> list[dict[str, Any]]:
    return [
        {
            **dataclasses.asdict(e.field),
            "first": e.first,
            "vocabulary": list(e.vocabulary),
            "mean": e.mean,
            "scale": e.scale,
        }
        for e in encoder.encoded
    ]


def _encoder_from_json(rows: list[dict[str, Any]]) -> FeatureEncoder:
    return FeatureEncoder(
        tuple(
            EncodedField(
                FeatureField(r["name"], r["kind"], r["separator"]),
                r["first"],
                tuple(r["vocabulary"]),
                r["mean"],
                r["scale"],
            )
            for r in rows
        )
    )


def _verified_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} holds no {MANIFEST}: it is not a trained model; make one: coldstream train")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, fingerprint = manifest["format_version"], manifest.pop("fingerprint")
        clock = _checked_clock(manifest.pop(WALL_CLOCK, {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): restore it or train again") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}: "
            "train again, or use the version of coldstream that wrote it "
            f"({manifest.get('versions', {}).get('coldstream', 'unknown')})"
        )
    if _fingerprint(manifest) != fingerprint:
        raise ArtifactError(
            f"{path} does not match its fingerprint {fingerprint[:12]}…: it was edited or damaged; "
            "restore it or train again"
        )
    if not (directory / TENSORS).is_file():
        raise ArtifactError(f"{directory / TENSORS} is missing: the copy is incomplete; copy the whole directory")
    if _sha256(directory / TENSORS) != manifest["tensors_sha256"]:
        raise ArtifactError(
            f"{directory / TENSORS} does not match its hash in {MANIFEST}: it is damaged or foreign; "
            "restore it or train again"
        )
    return {"fingerprint": fingerprint, **manifest, WALL_CLOCK: clock}


def _checked_clock(clock: dict[str, Any]) -> dict[str, float]:
    """The one part that no hash covers. Raises ValueError when it is not what this module writes."""
    if not set(clock) <= _CLOCK_METRICS:
        raise ValueError(f"{WALL_CLOCK} holds {', '.join(sorted(clock))}")
    return {name: float(value) for name, value in clock.items()}


def _fingerprint(manifest: dict[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
