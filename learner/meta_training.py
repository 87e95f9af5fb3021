"""The offline meta-learning stage: unroll every past user's sequence, test-then-train, and learn θ and φ_0.

The loss is the log-loss of each event predicted before its label is used, with full gradients through the
adaptive updates (``learner.scan``), plus the KL of the item posterior and, where events carry a graded value, an
ordinal auxiliary loss. Checkpoints hold everything that moves, so a resumed run ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configs.exceptions import ColdstreamError
from configs.settings import LearnerSettings, TrainingSettings
from learner.artifact import Artifact
from learner.features import Catalogue, FeatureEncoder, FeatureField, SparseRows
from learner.interactions import Interactions
from learner.offline_histories import kept_histories
from learner.recommender import PackedSequences, Recommender, RecommenderSpec, padded
from learner.scan import scan_threads
from learner.serving import nearest_grades, raw_features
from learner.user_hash import held_out_users

MAX_GRADES = 20
"""More distinct values than this are no grades: the settings must then name the grades to use."""
LOSS_SCALE = 100.0
"""Events a user counts for in the loss, so that the clip norm means the same for any batch size."""
WARM_UP_SHARE = 0.1
"""Share of the steps in which the one-cycle rate rises (Smith 2018, arXiv 1708.07120)."""


class TrainingError(ColdstreamError):
    """The offline stage cannot start or go on: the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What a caller may show after each epoch."""

    epoch: int
    epochs: int
    log_loss: float
    """Mean test-then-train log-loss of the epoch, in nats, under sampled item embeddings."""


@dataclass(frozen=True, slots=True)
class OfflineUsers:
    """All offline users' sequences, packed: user j owns rows ``starts[j] .. starts[j + 1] − 1``."""

    starts: NDArray[np.int64]
    item: NDArray[np.int64]
    label: NDArray[np.float32]
    grade: NDArray[np.int64]
    columns: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, users: NDArray[np.int64], cap: int | None, device: torch.device) -> PackedSequences:
        """The sequences of the given users, each cut to its first ``cap`` events."""
        lengths = self.starts[users + 1] - self.starts[users]
        if cap is not None:
            lengths = np.minimum(lengths, cap)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        rows = np.repeat(self.starts[users], lengths) + index
        columns = (self.item[rows], self.label[rows], self.grade[rows], index.astype(np.float32))
        item, label, grade, position = (torch.from_numpy(c).to(device) for c in columns)
        picked = torch.from_numpy(users)
        return PackedSequences(
            torch.from_numpy(starts),
            item,
            label,
            grade,
            position,
            self.columns[picked].to(device),
            self.weights[picked].to(device),
        )


def prepare(
    offline: Interactions, users: Catalogue, items: Catalogue, learner: LearnerSettings
) -> tuple[RecommenderSpec, OfflineUsers]:
    """Fits vocabularies, encoders and grades on the offline events alone, and packs them by user.

    Raises TrainingError when there is nothing to learn from: no events, or a single class.
    """
    if not len(offline):
        raise TrainingError("no offline events to learn from: raise the offline fraction, or check the time column")
    if offline.label.min() == offline.label.max():
        raise TrainingError(
            f"all {len(offline):,} offline events have label {offline.label[0]}: "
            "check the label rule (data.events.label), a threshold outside the values gives one class"
        )
    offline = offline.pruned()
    item_encoder, item_rows = _encode(items, offline.item_ids, offline.item_features)
    user_encoder, user_rows = _encode(users, offline.user_ids, offline.user_features)
    grades, like_rate = _grades(offline, learner)
    spec = RecommenderSpec(learner, offline.item_ids, item_rows, item_encoder, user_encoder, grades, like_rate)
    order = np.argsort(offline.user, kind="stable")
    counts = np.bincount(offline.user, minlength=len(offline.user_ids))
    grade = nearest_grades(np.asarray(grades, np.float32), offline.value[order])
    packed_users = OfflineUsers(
        np.concatenate([[0], np.cumsum(counts)]),
        offline.item[order].astype(np.int64),
        offline.label[order].astype(np.float32),
        grade.astype(np.int64),
        *padded(user_rows),
    )
    return spec, packed_users


def _encode(
    catalogue: Catalogue, ids: tuple[str, ...], event_features: dict[str, Any]
) -> tuple[FeatureEncoder, SparseRows]:
    known = {f.name for f in catalogue.fields}
    fields = catalogue.fields + tuple(FeatureField(name, "categorical") for name in event_features if name not in known)
    raw = raw_features(fields, catalogue, ids, range(len(ids)), event_features)
    encoder = FeatureEncoder.fit(fields, (row for row in raw if row is not None))
    return encoder, encoder.encode(raw)


def _grades(offline: Interactions, learner: LearnerSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not (learner.graded_targets or learner.ordinal_auxiliary > 0):
        return (), ()
    given = offline.value[~np.isnan(offline.value)]
    if not len(given):
        raise TrainingError(
            "learner.graded_targets or learner.ordinal_auxiliary is on but no offline event has a graded value: "
            "map one with data.events.value, or switch both off"
        )
    grades = learner.grades or tuple(float(v) for v in np.unique(given))
    if len(grades) > MAX_GRADES:
        raise TrainingError(
            f"{len(grades)} distinct graded values are too many to learn a target for each (at most {MAX_GRADES}): "
            "name the grades to round to in learner.grades"
        )
    grade = nearest_grades(np.asarray(grades, np.float32), offline.value)
    seen = np.bincount(grade, minlength=len(grades) + 1)[: len(grades)]
    liked = np.bincount(grade, weights=offline.label, minlength=len(grades) + 1)[: len(grades)]
    return tuple(grades), tuple((liked / np.maximum(seen, 1)).tolist())


class MetaTrainer:
    """Runs the offline stage epoch by epoch. Deterministic by seed on one machine, whatever the threads."""

    def __init__(self, spec: RecommenderSpec, users: OfflineUsers, training: TrainingSettings) -> None:
        self.training = training
        self.users = users
        self.device = _device(training.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = Recommender(spec)
        self.model.to(self.device)
        self.order = np.random.default_rng(training.seed)
        self.noise = torch.Generator().manual_seed(training.seed).get_state()
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.model, training), fused=self.device.type == "cpu")
        self.steps_per_epoch = math.ceil(len(users) / training.users_per_batch)
        self.step = 0
        self.history: list[float] = []
        thresholds = np.asarray(spec.like_rate)
        rises = np.diff(thresholds) == 1.0
        self.redundant = torch.from_numpy(np.atleast_1d(rises)).to(self.device)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    def run(self, checkpoints: Path | None = None, progress: Callable[[EpochReport], None] | None = None) -> None:
        """Trains what is left of the epochs; resumes from ``checkpoints`` when it holds one of this very run."""
        if checkpoints is not None:
            self._resume(checkpoints)
        while self.epoch < self.training.epochs:
            loss = self.run_epoch()
            self.history.append(loss)
            if progress is not None:
                progress(EpochReport(self.epoch, self.training.epochs, loss))
            due = self.epoch % self.training.checkpoint_every == 0 and self.epoch < self.training.epochs
            if checkpoints is not None and due:
                self._save(checkpoints)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise self._diverged("left the finite numbers")
        self.model.eval()

    def run_epoch(self) -> float:
        """One pass over the users in random order; the mean test-then-train log-loss of its events."""
        self.model.train()
        total, events = 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.noise)
            for users in self._batches():
                batch = self.users.batch(users, self.training.max_events_per_user, self.device)
                try:
                    total += self.run_step(batch)
                except ZeroDivisionError as error:  # of the compiled scans, where a variance has left the numbers
                    raise self._diverged("divided by zero") from error
                events += len(batch.item)
            self.noise = torch.get_rng_state()
        return total / events

    def run_step(self, batch: PackedSequences) -> float:
        """One optimizer step; the summed log-loss of the batch before it."""
        learner, training = self.model.spec.learner, self.training
        unrolled = self.model(batch)
        log_loss = F.binary_cross_entropy_with_logits(unrolled.logit, batch.label, reduction="sum")
        loss = log_loss + training.kl_weight * (batch.users / len(self.users)) * self.model.kl()
        if learner.ordinal_auxiliary > 0 and len(self.model.spec.grades) > 1:
            loss = loss + learner.ordinal_auxiliary * self.model.ordinal_loss(batch, unrolled, self.redundant)
        if not torch.isfinite(loss):
            raise self._diverged(f"became {loss.item()}")
        self.optimizer.zero_grad()
        (loss / (training.users_per_batch * LOSS_SCALE)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self._set_rate()
        self.optimizer.step()
        self.step += 1
        return float(log_loss.detach())

    def _diverged(self, how: str) -> TrainingError:
        training = self.training
        return TrainingError(
            f"the training loss {how} in epoch {min(self.epoch + 1, training.epochs)}: lower training.learning_rate "
            f"(now {training.learning_rate}) or training.clip_norm (now {training.clip_norm})"
        )

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        order = self.order.permutation(len(self.users))
        size = self.training.users_per_batch
        return (order[a : a + size] for a in range(0, len(order), size))

    def _set_rate(self) -> None:
        rate, momentum = one_cycle(self.step, self.steps_per_epoch * self.training.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
            group["betas"] = (momentum, 0.999)

    def artifact(self, seconds: float = 0.0) -> Artifact:
        """The model as it stands."""
        model, spec = self.model, self.model.spec
        metrics = {
            "train_log_loss": self.history,
            "train_s": round(seconds, 3),
            "offline_users": len(self.users),
            "offline_events": int(self.users.starts[-1]),
        }
        parameters = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
        return Artifact(
            model.fixed_part(), model.first_filter(), model.second_filter(), spec.learner, self.training,
            parameters, spec.like_rate, metrics,
        )  # fmt: skip

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to belong to this run."""
        spec = self.model.spec
        return {
            "learner": spec.learner.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude={"threads", "device", "checkpoint_every"}),
            "users": len(self.users),
            "events": int(self.users.starts[-1]),
            "items": len(spec.item_ids),
        }

    def _save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self.model.named_parameters()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = torch.as_tensor(value).contiguous()
        tensors["noise"] = self.noise
        state = {
            "identity": self._identity(),
            "step": self.step,
            "history": self.history,
            "order": self.order.bit_generator.state,
        }
        target = directory / "checkpoint.safetensors"
        partial = directory / "checkpoint.safetensors.partial"
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        partial.replace(target)  # one file holds all, so a crash leaves the old checkpoint or the new one

    def _resume(self, directory: Path) -> None:
        path = directory / "checkpoint.safetensors"
        if not path.exists():
            return
        state = _read_state(path)
        if state["identity"] != self._identity():
            differs = [k for k, v in self._identity().items() if state["identity"].get(k) != v]
            raise TrainingError(
                f"{path} belongs to another training run (different {', '.join(differs)}): "
                "remove it to start afresh, or train with the settings and data it was made with"
            )
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                prefix = f"optimizer.{name}."
                moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(self.device) for k, v in moments.items()
                }
        self.noise = tensors["noise"]
        self.step, self.history = state["step"], state["history"]
        self.order.bit_generator.state = state["order"]


def meta_train(
    offline: Interactions,
    users: Catalogue,
    items: Catalogue,
    learner: LearnerSettings,
    training: TrainingSettings,
    *,
    held_out: float = 0.0,
    checkpoints: Path | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> Artifact:
    """The whole offline stage, from events to a model. Raises TrainingError when there is nothing to learn from.

    ``held_out``: share of the users who are not learned from, see ``learner.anchors``; their histories are kept too.
    """
    offline = offline.pruned()
    held = held_out_users([user.encode() for user in offline.user_ids], held_out)
    learned = offline if not held.any() else offline.take(np.flatnonzero(~held[offline.user])).pruned()
    with scan_threads(training.threads):
        spec, sequences = prepare(learned, users, items, learner)
        trainer = MetaTrainer(spec, sequences, training)
        start = time.perf_counter()
        trainer.run(checkpoints, progress)
        artifact = trainer.artifact(seconds=time.perf_counter() - start)
    return dataclasses.replace(artifact, offline=kept_histories(offline, held, spec, users, training.seed))


def one_cycle(step: int, steps: int) -> tuple[float, float]:
    """(rate as a share of its peak, Adam's β1) at a step: cosine up, cosine down, momentum the other way round."""
    rise = max(1.0, WARM_UP_SHARE * steps - 1)
    if step <= rise:
        share = (1 - math.cos(math.pi * step / rise)) / 2
        return 1 / 25 + (1 - 1 / 25) * share, 0.95 - 0.1 * share
    share = (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise)))) / 2
    return 1e-5 + (1 - 1e-5) * share, 0.95 - 0.1 * share


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["state"])  # type: ignore[no-any-return]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read as a checkpoint ({error}): remove it to start afresh") from error


def _parameter_groups(model: Recommender, training: TrainingSettings) -> list[dict[str, Any]]:
    """Item tables are held by the KL and need no weight decay; the filters' constants learn twice as fast."""
    item_tables, filters, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith(("item_embedding", "item_bias", "ordinal_item")):
            item_tables.append(parameter)
        elif name.startswith(("head.", "second.", "prior_", "grade_")) or name.endswith("log_weight"):
            filters.append(parameter)
        else:
            rest.append(parameter)
    rate = training.learning_rate
    return [
        {"params": item_tables, "lr": rate, "peak": rate, "weight_decay": 0.0},
        {"params": filters, "lr": 2 * rate, "peak": 2 * rate, "weight_decay": 0.0},
        {"params": rest, "lr": rate, "peak": rate, "weight_decay": training.weight_decay},
    ]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without storage has no item
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device {name!r} cannot be used here: {error}; use --device cpu") from error
    return device
