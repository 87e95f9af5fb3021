"""The report, drawn and opened in a real browser."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from configs.settings import AlarmSettings, DataSettings, LearnerSettings, MetaSettings, ProtocolSettings, Settings
from learner.drift import DriftAlarm
from learner.forgetting import Column, ForgettingMatrix
from learner.metrics import Metrics, auc, evaluate, event_index
from state.lineage.history import Version
from state.lineage.record import Decision, Kind, Record, Span
from streams.meta.result import FROZEN, MetaResult
from streams.report import render, write_report
from streams.report.analysis import Lift, learning_curve, paired_lifts, reliability, user_gain, wilson_interval
from streams.report.axes import series_of, short_number, shortened, spread
from streams.report.figures import byte_size
from streams.report.online_section import account, worth_of_it
from streams.report.page import headline, settings_list
from streams.results import BacktestResult, Protocol, ScoredStream, Speed, StateSize

HOSTILE = "<script>alert(1)</script>"
HOSTILE_MATHS = "$\\broken{ & <b>"
TOKEN = "token-of-the-webhook"
INITIAL = Decision("initial", "the trained model")
FIGURES = {
    "by-index", "learning-windows", "learning-cumulative", "training", "reliability", "classes", "users",
    "row-parts", "state-growth",
}  # fmt: skip
ONLINE_FIGURES = {
    "stage-auc-events", "stage-log_loss-events", "stage-auc-users", "stage-log_loss-users", "forgetting",
    "forgetting-zero-shot",
}  # fmt: skip
HEADINGS = ["Results", "Learning", "Calibration", "Users", "State", "Settings", "Reproduce"]
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip


class Page(HTMLParser):
    """The elements a reader would meet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags for key, value in attrs.items() if key == name and value is not None]


def synthetic(
    events: int = 4_000, users: int = 80, baselines: tuple[str, ...] = ("item mean", "pooled")
) -> BacktestResult:
    """A model that learns the user's bias, and baselines that know less."""
    rng = np.random.default_rng(7)
    user = np.sort(rng.zipf(1.6, events) % users).astype(np.int32)[rng.permutation(events)]
    index = event_index(user)
    taste, item = rng.normal(0, 1.2, users)[user], rng.normal(0, 1, events)
    label = (rng.random(events) < 1 / (1 + np.exp(-taste - item))).astype(np.int8)
    learned = taste * (1 - np.exp(-(index + 0.3) / 6))

    def probability(logit: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-logit)), np.float32)

    known = {name: probability(item * 0.8 + 0.35 * k * learned) for k, name in enumerate(baselines)}
    model = probability(item + learned)
    score = {name: evaluate(label, p, user, index, bootstrap_samples=50) for name, p in known.items()}
    return BacktestResult(
        protocol=Protocol(12_000, 190, events, users, 978_307_200_000),
        metrics=evaluate(label, model, user, index, bootstrap_samples=50),
        baselines=score,
        speed=Speed(12.5, 1_234_567.0),
        state=StateSize(users, 928, {"header": 64, "adaptive part": 608, "ring of events": 256}),
        versions={"coldstream": "0.1.0", "artifact": "sha256:feed"},
        settings=Settings(
            data=DataSettings(paths=(Path("/data") / HOSTILE,)),
            learner=LearnerSettings(dim=12),
            protocol=ProtocolSettings(bootstrap_samples=50),
        ),
        scored=ScoredStream(
            tuple(HOSTILE if u == 0 else f"user-{u}" for u in range(users)),
            ("item",),
            user,
            np.zeros(events, np.int32),
            978_307_200_000 + 6_000 * np.arange(events, dtype=np.int64),
            np.arange(events, dtype=np.int64),
            label,
            index,
            model,
            known,
        ),
        command=("coldstream", "backtest", "--data", HOSTILE),
        rejects={"missing label": 3},
        notes=("The clock of this data is an estimate.",),
        training_loss=(0.61, 0.57, 0.55, 0.545),
        machine="Example CPU, 2 cores",
    )


def with_online_stage(result: BacktestResult, rounds: int = 12) -> BacktestResult:
    """The same as if the stream had improved the model: one version in four is rejected."""
    rng = np.random.default_rng(5)
    every, versions = len(result.scored) // (rounds + 1), [Version(Record(0, None, "m", 0, INITIAL), (INITIAL,))]
    for n in range(1, rounds + 1):
        kinds: tuple[Kind, ...] = ("candidate", "shadow", "rejected" if n % 4 == 0 else "promoted")
        told = [{"cohort": f"slice 0 / {HOSTILE}", "finding": "passes", "users": 20, "rise": 0.001 * n}]
        evidence = {"verdicts": [{"stage": "anchors", "evidence": told}]}
        made = tuple(Decision(kind, f"{kind}: {HOSTILE}", evidence) for kind in kinds)
        spans = (Span(0, every * (n - 1), every * n - 1),)
        versions.append(Version(Record(n, n - 1, "m", n, made[0], spans, metrics={"events": every * n}), made))
    columns = tuple(Column(f"slice {s} / {k}", s, k) for s in (0, 1) for k in ("new", f"segment={HOSTILE}"))
    values = rng.normal(0.6, 0.02, (rounds + 1, 4, 2, 2))
    values[:4, 2:] = np.nan
    matrix = ForgettingMatrix(tuple(range(rounds + 1)), columns, values, values[4])
    alarms = (DriftAlarm("warm", "page_hinkley", every * 2 + 7, 0.52, 0.58),)
    scored = result.scored
    frozen = np.clip(0.8 * scored.probability + 0.1, 0, 1).astype(np.float32)
    score = evaluate(scored.label, frozen, scored.user, scored.index, bootstrap_samples=0)
    moved, refused = {"history": 7, "ring": 0}, {"late": 2}
    settings = result.settings.model_copy(
        update={
            "meta": MetaSettings(
                moves="everything", every_events=every, alarms=AlarmSettings(webhook=f"https://alarms.example/{TOKEN}")
            )
        }
    )
    return dataclasses.replace(
        result, settings=settings, baselines={**result.baselines, FROZEN: score},
        scored=dataclasses.replace(scored, baselines={**scored.baselines, FROZEN: frozen}),
        meta=MetaResult(tuple(versions), matrix, alarms, 1.25, rounds, moved, refused, ("Mind.",)),
        command=(*result.command, "-s", f"meta.alarms.webhook=https://alarms.example/{TOKEN}"),
    )  # fmt: skip


def opened(browser: Path, page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM once loaded, and what the browser's console said."""
    run = subprocess.run(
        [str(browser), *BROWSER_FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["offline stage alone", "online stage"])
def result(request: pytest.FixtureRequest) -> BacktestResult:
    plain = synthetic(baselines=("item mean", "pooled", HOSTILE, HOSTILE_MATHS))
    return with_online_stage(plain) if request.param == "online stage" else plain


def figures_of(result: BacktestResult) -> set[str]:
    return FIGURES if result.meta is None else FIGURES | ONLINE_FIGURES


def headings_of(result: BacktestResult) -> list[str]:
    return HEADINGS if result.meta is None else [*HEADINGS[:2], "Online stage", *HEADINGS[2:]]


def test_the_browser_opens_the_report_without_a_word_and_shows_every_part(
    chromium: Path, result: BacktestResult, tmp_path: Path
) -> None:
    write_report(tmp_path / "report.html", result)
    html, console = opened(chromium, tmp_path / "report.html", tmp_path / "profile")
    page = Page(html)
    assert console == []
    assert page.texts["h2"] == headings_of(result)
    assert set(page.attributes("data-figure")) == figures_of(result)
    assert "script" not in page.texts
    assert any(HOSTILE in text for text in page.texts["code"])


def test_the_report_asks_for_nothing_from_elsewhere(result: BacktestResult) -> None:
    html = render(result)
    page = Page(html)
    links = page.attributes("href") + page.attributes("xlink:href") + page.attributes("src")
    assert [link for link in links if not link.startswith("#")] == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.texts)
    assert "@import" not in html
    assert "url(http" not in html


def test_the_same_result_gives_the_same_page(result: BacktestResult) -> None:
    assert render(result) == render(result)


def test_the_report_stays_under_two_megabytes(result: BacktestResult) -> None:
    assert len(render(result).encode()) < 2_000_000


def test_ids_are_unique_and_every_reference_meets_one(result: BacktestResult) -> None:
    page = Page(render(result))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    wanted = page.attributes("aria-labelledby") + [h.removeprefix("#") for h in page.attributes("href")]
    assert set(wanted) <= set(ids)


def test_every_figure_has_a_text_alternative_and_every_table_headers(result: BacktestResult) -> None:
    page = Page(render(result))
    drawn = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert [attrs["role"] for attrs in drawn] == ["img"] * len(figures_of(result))
    named = {attrs["id"]: text for attrs, text in titles_of(page) if "id" in attrs}
    assert set(named) == {f"{name}-title" for name in figures_of(result)}
    assert all(named.values())
    assert len(page.texts["caption"]) == len(page.texts["table"])
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def titles_of(page: Page) -> list[tuple[dict[str, str | None], str]]:
    attributes = [attrs for tag, attrs in page.tags if tag == "title"]
    return list(zip(attributes, page.texts["title"], strict=True))


def test_no_stand_in_colour_is_left(result: BacktestResult) -> None:
    html = render(result)
    assert "#0101" not in html
    assert "#0200" not in html


def test_a_report_without_baselines_and_with_few_events_is_whole(chromium: Path, tmp_path: Path) -> None:
    small = synthetic(events=12, users=3, baselines=())
    small = dataclasses.replace(
        small, training_loss=(), machine="", command=(), rejects={}, notes=(),
        state=StateSize(3, 928), settings=Settings(protocol=ProtocolSettings(bootstrap_samples=0)),
    )  # fmt: skip
    write_report(tmp_path / "report.html", small)
    html, console = opened(chromium, tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert Page(html).texts["h2"] == HEADINGS
    assert set(Page(html).attributes("data-figure")) == FIGURES - {"training", "row-parts"}


def test_every_decision_is_listed_and_the_rejected_are_marked() -> None:
    page = Page(render(with_online_stage(synthetic(), rounds=12)))
    rows = [attrs for tag, attrs in page.tags if tag == "th" and attrs.get("data-name") == "version"]
    assert len(rows) == 13
    assert sum(attrs.get("class") == "rejected" for tag, attrs in page.tags if tag == "tr") == 3


def test_the_account_of_the_online_stage_gives_its_numbers() -> None:
    result = with_online_stage(synthetic(), rounds=12)
    assert result.meta is not None
    assert account(result, result.meta) == (
        "A round of meta-updates every 307 events moved all shared parameters: 12 rounds made 12 versions.",
        "9 promoted, 3 rejected, 0 still to be decided on when the stream ended; 1 drift alarm.",
        "Meta-updates took 1.2 s in all.",
        "7 times a user's row came onto another version: 7 re-derived from the user's whole history.",
        "2 gradients could not be used: 2 late.",
    )


def test_what_the_online_stage_is_worth_is_said_against_the_same_model_frozen() -> None:
    result = with_aucs(0.8196, {FROZEN: 0.799})
    assert worth_of_it(result, Lift(2.06, 1.9, 2.2)) == (
        "AUC 0.8196 with the online stage, 0.7990 with the same model frozen: +2.06 points (95% interval +1.90 to "
        "+2.20). Log-loss 0.5000 against 0.5000."
    )


def test_the_headline_says_what_frozen_means() -> None:
    assert headline(with_aucs(0.8196, {FROZEN: 0.799}), {FROZEN: Lift(2.06, math.nan, math.nan)}) == (
        "Coldstream reaches an AUC of 0.8196, 2.06 points above frozen (0.7990), the same model, not improved by the "
        "stream."
    )


def test_an_online_stage_without_a_round_is_told_without_figures_of_forgetting(chromium: Path, tmp_path: Path) -> None:
    bare = MetaResult((Version(Record(0, None, "m", 0, INITIAL), (INITIAL,)),), ForgettingMatrix(), (), 0.0, 0)
    write_report(tmp_path / "report.html", dataclasses.replace(synthetic(events=12, users=3, baselines=()), meta=bare))
    html, console = opened(chromium, tmp_path / "report.html", tmp_path / "profile")
    page = Page(html)
    assert console == []
    assert set(page.attributes("data-figure")) & ONLINE_FIGURES == ONLINE_FIGURES - {
        "forgetting", "forgetting-zero-shot",
    }  # fmt: skip


def test_the_address_of_a_webhook_is_on_no_page() -> None:
    html = render(with_online_stage(synthetic()))
    assert TOKEN not in html
    assert "meta.alarms.webhook=(given, not shown)" in html
    assert '<th scope="row">meta.alarms.webhook</th><td>given, not shown</td>' in html


def test_the_headline_gives_the_lift_over_the_best_baseline_and_its_interval() -> None:
    result = with_aucs(0.8221, {"item mean": 0.7379, "pooled": 0.7949})
    lifts = {"item mean": Lift(8.42, 8.0, 8.9), "pooled": Lift(2.72, 2.41, 3.05)}
    assert headline(result, lifts) == (
        "Coldstream reaches an AUC of 0.8221, 2.72 points above pooled (0.7949), the best baseline "
        "(95% interval of the lift +2.41 to +3.05)."
    )


def test_the_headline_admits_a_loss_that_is_not_settled() -> None:
    result = with_aucs(0.7, {"item mean": 0.705})
    assert headline(result, {"item mean": Lift(-0.5, -1.2, 0.2)}) == (
        "Coldstream reaches an AUC of 0.7000, 0.50 points below item mean (0.7050), the only baseline "
        "(95% interval of the lift −1.20 to +0.20; the interval holds zero, so this stream does not settle which is "
        "better)."
    )


def test_the_headline_without_baselines_is_the_auc_and_its_interval() -> None:
    assert headline(with_aucs(0.7, {}), {}) == "Coldstream reaches an AUC of 0.7000 (95% interval 0.6900 to 0.7100)."


def test_the_headline_without_intervals_claims_none() -> None:
    result = with_aucs(0.7, {"item mean": 0.6})
    assert headline(result, {"item mean": Lift(10.0, math.nan, math.nan)}) == (
        "Coldstream reaches an AUC of 0.7000, 10.00 points above item mean (0.6000), the only baseline."
    )


def with_aucs(model: float, baselines: dict[str, float]) -> BacktestResult:
    def metrics(auc: float) -> Metrics:
        return Metrics(auc, auc, 0.5, 0.01, {}, {"auc": (auc - 0.01, auc + 0.01)})

    result = synthetic(events=20, users=3, baselines=tuple(baselines))
    return dataclasses.replace(
        result, metrics=metrics(model), baselines={name: metrics(auc) for name, auc in baselines.items()}
    )


def test_only_settings_that_differ_are_marked() -> None:
    listed = settings_list(Settings(learner=LearnerSettings(dim=8)))
    changed = {s.name: (s.value, s.default) for s in listed if s.changed}
    assert changed == {"learner.dim": ("8", "16")}


def test_the_lift_over_a_baseline_that_ranks_alike_is_nothing_in_every_draw() -> None:
    scored = synthetic(events=300, users=9, baselines=("twin",)).scored
    twin = dataclasses.replace(scored, baselines={"twin": scored.probability})
    assert paired_lifts(twin, 20) == {"twin": Lift(0.0, 0.0, 0.0)}


def test_without_bootstrap_samples_a_lift_has_no_interval() -> None:
    scored = synthetic(events=300, users=9, baselines=("item mean",)).scored
    lift = paired_lifts(scored, 0)["item mean"]
    model, baseline = (auc(scored.label, p) for p in (scored.probability, scored.baselines["item mean"]))
    assert lift.points == 100 * (model - baseline)
    assert not lift.known


def test_windows_split_the_stream_evenly_and_accumulate() -> None:
    scored = synthetic(events=1_001, users=9, baselines=()).scored
    curve = learning_curve(scored)
    assert curve.window_end.tolist() == [500, 1001]
    whole = evaluate(scored.label, scored.probability, scored.user, scored.index, bootstrap_samples=0).auc
    assert curve.cumulative["coldstream"][-1] == whole
    assert curve.cumulative["coldstream"][0] == curve.windowed["coldstream"][0]


def test_reliability_counts_each_prediction_once_and_keeps_one_in_the_last_bin() -> None:
    curve = reliability(np.array([0, 1, 1, 0], np.int8), np.array([0.05, 0.5, 1.0, 0.96], np.float32), bins=2)
    assert curve.count.tolist() == [1, 3]
    assert curve.observed.tolist() == [0.0, 2 / 3]
    assert curve.predicted == pytest.approx([0.05, 0.82], abs=1e-6)


def test_the_wilson_interval_is_that_of_the_literature() -> None:
    low, high = wilson_interval(np.array([0.5]), np.array([10]))
    assert (low[0], high[0]) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_a_users_gain_is_the_mean_of_the_differences_of_log_loss() -> None:
    stream = ScoredStream(
        ("a", "b", "silent"), ("i",), np.array([0, 0, 1], np.int32), np.zeros(3, np.int32), np.arange(3), np.arange(3),
        np.array([1, 0, 1], np.int8), np.array([0, 1, 0]), np.array([0.5, 0.5, 0.25], np.float32),
        {"base": np.array([0.25, 0.5, 0.5], np.float32)},
    )  # fmt: skip
    gain = user_gain(stream, "base")
    assert gain[:2] == pytest.approx([math.log(2) / 2, -math.log(2)])
    assert math.isnan(gain[2])


def test_labels_that_would_overlap_are_a_line_apart_inside_the_room() -> None:
    assert spread({"low": 1.0, "high": 50.0, "higher": 52.0, "top": 100.0}, 10.0, 100.0) == {
        "low": 1.0, "high": 50.0, "higher": 60.0, "top": 100.0,
    }  # fmt: skip
    assert spread({"a": 98.0, "b": 99.0}, 10.0, 100.0) == {"a": 90.0, "b": 100.0}


def test_a_predictor_looks_the_same_however_many_stand_beside_it_and_no_two_look_alike() -> None:
    names = ("coldstream", *(f"b{k}" for k in range(20)))
    looks = {(s.colour, s.dash, s.marker) for s in series_of(names).values()}
    assert len(looks) == len(names)
    assert series_of(names)["b0"] == series_of(("coldstream", "b0"))["b0"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (12_000, "12k"), (305_268, "305k"), (1_500_000, "1.5M"), (2e9, "2G")]
)
def test_axis_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_sizes_are_decimal_and_long_names_are_cut() -> None:
    assert [byte_size(928), byte_size(1_682_464), byte_size(1e9, digits=0)] == ["928 B", "1.7 MB", "1 GB"]
    assert shortened("item mean") == "item mean"
    assert shortened("non-meta user embedding + the same head") == "non-meta user embed…"
