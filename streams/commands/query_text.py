"""What ``coldstream query`` prints for a human: a few aligned lines, and small tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from state.reading.explain import ExplainedEvent, Explanation
from state.reading.point import time_text
from state.reading.reports import DiffReport, PointReport, UserReport
from state.reading.scores import Change, Score

MOVERS = 10
"""Events that are shown, those that moved the user most; JSON has all"""


def user_text(report: UserReport) -> str:
    """A user's report."""
    lines = _head(report)
    if report.known or report.scores or report.top:
        lines += _part(report)
    if report.explanation is not None and report.explanation.events:
        lines += ["", *_events(report.explanation.events, _how(report.explanation))]
    for title, scores in (("asked for", report.scores), ("best for this user", report.top)):
        if scores:
            lines += ["", *_scores(title, scores)]
    return "\n".join(lines)


def diff_text(report: DiffReport) -> str:
    """The difference between two points."""
    moved = f"moved {report.moved:.4f}"
    if report.moved_prior_sd is not None:
        moved += f", {report.moved_prior_sd:.3f} standard deviations of the prior"
    lines = [
        f"user {shown(report.user_id)} from {report.before.asked} to {report.after.asked}",
        f"before        {report.events_before:,} events, {_source(report.before)}",
        *_moved("before        ", report.before),
        f"after         {report.events_after:,} events, {_source(report.after)}",
        *_moved("after         ", report.after),
        moved + ("; the user started anew in between" if report.anew else ""),
        _numbers("mean by      ", report.change.mean, "+.3f"),
        _numbers("variance by  ", report.change.variance, "+.4f"),
        _numbers("second by    ", report.change.second_mean, "+.3f"),
    ]
    lines = [line for line in lines if line]
    if report.between or report.between_unknown:
        title = f"{len(report.between) + report.between_unknown:,} events between"
        if report.between_unknown:
            title += f", {report.between_unknown:,} of them no longer in the ring"
        lines += ["", *_events(report.between, title)]
    for title, changes in (("rose most", report.risen), ("fell most", report.fallen)):
        if changes:
            lines += ["", *_changes(title, changes)]
    return "\n".join(lines)


def shown(text: str, width: int = 60) -> str:
    """An id on one line of a terminal, in letters that can do it no harm; a long one is cut."""
    safe = text if text.isprintable() else ascii(text)[1:-1]
    return safe if len(safe) <= width else f"{safe[:width]}… ({len(text):,} characters)"


def _head(report: UserReport) -> list[str]:
    if not report.known:
        start = "no event was learned, a prediction starts from the shared initialization"
        lines = [f"unknown user {shown(report.user_id)!r}: {start}"]
        if report.at.asked == "now":
            return lines
        return [*lines, f"at {report.at.asked}: {_source(report.at)}", *_moved("", report.at)]
    lines = [f"user {shown(report.user_id)}: {report.events:,} events{_span(report)}"]
    facts = [
        f"last offset {report.last_offset}" if report.last_offset is not None else "",
        f"ledger {report.ledger}" if report.ledger is not None else "",
        f"meta version {report.meta_version}{_canary(report)}" if report.meta_version is not None else "",
        f"{report.guarded:,} updates refused" if report.guarded else "",
    ]
    lines += [", ".join(fact for fact in facts if fact)] if any(facts) else []
    if report.at.asked != "now":
        lines.append(f"at {report.at.asked}: {_source(report.at)}")
    lines += _moved("", report.at)
    if report.expired:
        days = "" if report.model is None else f" for {report.model.expire_after_days:g} days or more"
        lines.append(f"expired: away{days}, the next event and a prediction now start anew")
    return lines


def _span(report: UserReport) -> str:
    first, last = (None if time is None else time_text(time) for time in (report.first_event_ms, report.last_event_ms))
    return (f" from {first}" if first else "") + (f" to {last}" if last else "")


def _part(report: UserReport) -> list[str]:
    lines = [
        _numbers("adaptive part", report.mean, "+.3f"),
        _numbers("variance     ", report.variance, ".4f"),
        _numbers("second filter", report.second_mean, "+.3f"),
        f"latest labels {''.join(map(str, report.recent_labels))}" if report.recent_labels else "",
    ]
    away = report.distance
    if away is not None and away.l2 > 0:
        sd = "" if away.prior_sd is None else f", {away.prior_sd:.3f} standard deviations of the prior"
        lines.append(f"{away.l2:.4f} from the shared initialization{sd}")
        lines.append(_numbers("shift        ", away.shift, "+.3f"))
        lines.append(_numbers("shift in sd  ", away.shift_sd or (), "+.2f"))
    return [line for line in lines if line]


def _how(explanation: Explanation) -> str:
    events = len(explanation.events)
    estimated = sum(event.method == "influence" for event in explanation.events)
    title = f"the latest {events:,} events, those that moved the user most first" if events > 1 else "the only event"
    if explanation.replayed_from is None:
        return f"{title} (influence: an estimate of what is owed to each now)"
    replayed = f"replayed from {explanation.replayed_from}: what each did when it came"
    return f"{title} ({replayed}{f'; the oldest {estimated} by influence' if estimated else ''})"


def _events(events: Sequence[ExplainedEvent], title: str) -> list[str]:
    rows = [("moved", "event", "item", "label", "grade", "time", "probability", "method")]
    for event in sorted(events, key=lambda each: -each.moved)[:MOVERS]:
        before, after = event.probability_before, event.probability_after
        rows.append(
            (
                f"{event.moved:.4f}",
                str(event.number),
                f"unknown item {event.item_hash}" if event.item is None else shown(event.item, 30),
                str(event.label),
                "" if event.grade is None else f"{event.grade:g}",
                ("" if event.earliest_ms == event.latest_ms else "~") + time_text(event.earliest_ms),
                "" if before is None or after is None else f"{before:.3f} → {after:.3f}",
                event.method + (", refused" if event.guarded else ""),
            )
        )
    left = len(events) - MOVERS
    return [title, *_table(rows), *([f"… and {left:,} more, see --json"] if left > 0 else [])] if events else [title]


def _scores(title: str, scores: Iterable[Score]) -> list[str]:
    rows = [(title, "probability", "logit", "")]
    for score in scores:
        notes = [text for text, said in (("unknown item", not score.known), ("recent", score.recent)) if said]
        rows.append((shown(score.item_id, 40), f"{score.probability:.4f}", f"{score.logit:+.4f}", ", ".join(notes)))
    return _table(rows)


def _changes(title: str, changes: Iterable[Change]) -> list[str]:
    rows = [(title, "before", "after", "by")]
    rows += [(shown(c.item_id, 40), f"{c.before:.4f}", f"{c.after:.4f}", f"{c.after - c.before:+.4f}") for c in changes]
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _moved(title: str, point: PointReport) -> list[str]:
    return [] if point.moved is None else [f"{title}{point.moved.text}"]


def _canary(report: UserReport) -> str:
    return ", a canary" if report.model is not None and report.model.canary else ""


def _source(point: PointReport) -> str:
    return f"{point.source}, {'exact' if point.exact else 'not exact'}{f' ({point.note})' if point.note else ''}"


def _numbers(title: str, values: Sequence[float], form: str) -> str:
    return f"{title} {' '.join(format(value, form) for value in values)}" if values else ""
