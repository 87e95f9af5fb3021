"""The offline stage: it learns, resumes to the bit, and never looks beyond the events it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.settings import LearnerSettings, TrainingSettings
from learner import scan
from learner.artifact import ArtifactError, read_artifact, write_artifact
from learner.features import Catalogue, FeatureField
from learner.interactions import Interactions
from learner.meta_training import MetaTrainer, TrainingError, meta_train, one_cycle, prepare
from learner.recommender import gaussian_kl

TRAINING = TrainingSettings(epochs=3, users_per_batch=4, seed=7)
SMALL = LearnerSettings(dim=4, item_dim=6, second_dim=3)
USERS = Catalogue((FeatureField("side", "categorical"),), {f"u{k}": ("ab"[k % 2],) for k in range(20)})
ITEMS = Catalogue((FeatureField("tags", "multi"),), {f"i{k}": ("x|y" if k % 2 else "x",) for k in range(12)})


def taste_events(users: int = 20, per_user: int = 15, seed: int = 0) -> Interactions:
    """Even users like even items, odd users odd ones; the value is 1..5 around the label."""
    rng = np.random.default_rng(seed)
    rows = [(u, int(i)) for u in range(users) for i in rng.integers(0, 12, per_user)]
    labels = [int(u % 2 == i % 2) for u, i in rows]
    values = [3.0 + 2 * y - (i % 2) for y, (_, i) in zip(labels, rows, strict=True)]
    return Interactions.from_columns(
        [f"u{u}" for u, _ in rows], [f"i{i}" for _, i in rows], labels, list(range(len(rows))), values=values
    )


def trainer(learner: LearnerSettings = SMALL, training: TrainingSettings = TRAINING) -> MetaTrainer:
    return MetaTrainer(*prepare(taste_events(), USERS, ITEMS, learner), training)


def parameters(t: MetaTrainer) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in t.model.named_parameters()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("head", ["full", "diagonal", "gradient"])
def test_training_learns_a_planted_taste_with_every_head(head):
    learner = SMALL.model_copy(update={"head": head})
    t = trainer(learner, TRAINING.model_copy(update={"epochs": 30}))
    t.run()
    assert t.history[-1] < 0.8 * t.history[0]


def test_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, second, other = trainer(), trainer(), trainer(training=TRAINING.model_copy(update={"seed": 8}))
    for t in (first, second, other):
        t.run()
    assert_same_bits(parameters(first), parameters(second))
    assert first.history != other.history


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(scan, "MIN_EVENTS_PER_THREAD", 1)
    results = []
    for threads in (1, 3):
        artifact = meta_train(
            taste_events(), USERS, ITEMS, SMALL, TRAINING.model_copy(update={"epochs": 1, "threads": threads})
        )
        results.append(artifact.parameters)
    assert_same_bits(*results)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    class Stop(Exception):
        pass

    def stop_after_first(report):
        if report.epoch == 2:
            raise Stop

    straight, broken, resumed = trainer(), trainer(), trainer()
    straight.run()
    with pytest.raises(Stop):
        broken.run(tmp_path, stop_after_first)
    epochs = []
    resumed.run(tmp_path, lambda report: epochs.append(report.epoch))
    assert epochs == [2, 3]
    assert resumed.history == straight.history
    assert_same_bits(parameters(resumed), parameters(straight))


def test_a_checkpoint_of_another_run_is_refused_by_name_of_what_differs(tmp_path):
    trainer().run(tmp_path)
    with pytest.raises(TrainingError, match=r"different learner.*remove it"):
        trainer(SMALL.model_copy(update={"dim": 5})).run(tmp_path)


def test_no_events_or_one_class_is_an_error_that_says_what_to_do():
    with pytest.raises(TrainingError, match="no offline events"):
        prepare(Interactions.empty(), USERS, ITEMS, SMALL)
    ones = Interactions.from_columns(["a", "b"], ["x", "y"], [1, 1], [0, 1])
    with pytest.raises(TrainingError, match=r"all 2 offline events have label 1.*data\.events\.label"):
        prepare(ones, USERS, ITEMS, SMALL)


def test_graded_settings_without_values_are_an_error():
    events = Interactions.from_columns(["a", "b"], ["x", "y"], [1, 0], [0, 1])
    with pytest.raises(TrainingError, match=r"data.events.value"):
        prepare(events, USERS, ITEMS, SMALL.model_copy(update={"graded_targets": True}))


def test_an_unusable_device_is_an_error_that_names_it():
    with pytest.raises(TrainingError, match=r"device 'cuda:63'.*--device cpu"):
        trainer(training=TRAINING.model_copy(update={"device": "cuda:63"}))


def test_thresholds_that_repeat_the_label_carry_no_ordinal_weight():
    learner = SMALL.model_copy(update={"ordinal_auxiliary": 1.0})
    events = taste_events()
    ratings = np.where(events.label > 0, 4 + events.item % 2, 1 + events.item % 3).astype(np.float32)
    graded = Interactions.from_columns(
        [events.user_ids[u] for u in events.user],
        [events.item_ids[i] for i in events.item],
        events.label,
        events.event_time_ms,
        values=ratings,
    )
    t = MetaTrainer(*prepare(graded, USERS, ITEMS, learner), TRAINING)
    assert t.model.spec.grades == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert t.redundant.tolist() == [False, False, True, False]


def test_gaussian_kl_and_its_gradients_equal_autograd():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 3), torch.randn(5, 3) * 0.3, torch.randn(3) * 0.3]

    def plain(mean, log_sigma, log_scale):
        ratio = (torch.exp(2 * log_sigma) + mean**2) / torch.exp(2 * log_scale)
        return (0.5 * (ratio - 1) + log_scale - log_sigma).sum()

    grads = []
    for function in (gaussian_kl, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        (value * 0.7).backward()
        grads.append([value.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_cycle_starts_low_peaks_after_a_tenth_and_ends_at_almost_nothing():
    assert one_cycle(0, 101) == (pytest.approx(0.04), pytest.approx(0.95))
    assert one_cycle(9, 101)[0] == pytest.approx(1.0, abs=1e-3)
    assert one_cycle(101, 101) == (pytest.approx(1e-5), pytest.approx(0.95))


def graded_artifact():
    learner = SMALL.model_copy(update={"graded_targets": True, "ordinal_auxiliary": 0.5})
    return meta_train(taste_events(), USERS, ITEMS, learner, TRAINING)


def test_an_artifact_comes_back_with_the_same_bits(tmp_path):
    artifact = graded_artifact()
    fingerprint = write_artifact(tmp_path, artifact)
    again = read_artifact(tmp_path)
    assert again.fingerprint == fingerprint
    assert_same_bits(artifact.parameters, again.parameters)
    assert again.fixed.item_ids == artifact.fixed.item_ids
    ours, theirs = artifact.serving(USERS, ITEMS), again.serving(USERS, ITEMS)
    ids = ["i3", "i0", "never seen"]
    np.testing.assert_array_equal(ours.item_rows(ids, {}), theirs.item_rows(ids, {}))
    np.testing.assert_array_equal(ours.items.psi, theirs.items.psi)
    np.testing.assert_array_equal(ours.initial_means(["u1", "?"], {}), theirs.initial_means(["u1", "?"], {}))
    np.testing.assert_array_equal(ours.grades(np.array([1, 5, np.nan], np.float32)), [0, 3, 4])
    assert write_artifact(tmp_path / "twin", artifact) == fingerprint


def test_serving_tables_equal_the_torch_model():
    t = trainer()
    t.run()
    serving = t.artifact().serving(USERS, ITEMS)
    items = torch.arange(len(t.model.spec.item_ids))
    with torch.no_grad():
        e, bias = t.model.embeddings(items)
        torch.testing.assert_close(torch.from_numpy(serving.items.psi[: len(items), 1:]), t.model.projection(e))
        base = t.model.base(e).squeeze(-1) + bias
        torch.testing.assert_close(torch.from_numpy(serving.items.base[: len(items)]), base)


def test_a_damaged_or_foreign_artifact_is_refused_by_name(tmp_path):
    write_artifact(tmp_path, graded_artifact())
    manifest, tensors = tmp_path / "manifest.json", tmp_path / "model.safetensors"
    whole = manifest.read_text()

    manifest.write_text(whole.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ArtifactError, match="format version 99, this program reads 1"):
        read_artifact(tmp_path)
    manifest.write_text(whole.replace('"i3"', '"i4"', 1))
    with pytest.raises(ArtifactError, match="does not match its fingerprint"):
        read_artifact(tmp_path)
    manifest.write_text(whole)
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"model\.safetensors does not match its hash"):
        read_artifact(tmp_path)
    tensors.unlink()
    with pytest.raises(ArtifactError, match="missing: the copy is incomplete"):
        read_artifact(tmp_path)
    manifest.unlink()
    with pytest.raises(ArtifactError, match="coldstream train"):
        read_artifact(tmp_path)
