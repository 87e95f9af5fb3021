"""Baselines that count: the item's click rate, alone and with the user's running bias, both online."""

from __future__ import annotations

from itertools import product

import numba
import numpy as np

from learner.baselines.problem import Float, Problem, mean_log_loss, smoothed_rate

ITEM_PRIOR = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Candidate weights of the overall click rate in an item's rate, in events."""

USER_PRECISION = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Candidate prior precisions of a user's bias; 1 expects biases of about one logit, 4 of half a logit."""


def item_mean(problem: Problem) -> Float:
    """(N,) the item's click rate before the event, offline counts included, smoothed towards the overall rate."""
    trial = problem.holdout()
    best = min(ITEM_PRIOR, key=lambda prior: _loss(trial, prior, np.inf))
    return counted(problem, best, np.inf)


def item_mean_user_bias(problem: Problem) -> Float:
    """(N,) the item's click rate shifted by the user's running bias, in logits."""
    trial = problem.holdout()
    best = min(product(ITEM_PRIOR, USER_PRECISION), key=lambda priors: _loss(trial, *priors))
    return counted(problem, *best)


def counted(problem: Problem, item_prior: float, user_precision: float) -> Float:
    """(N,) predictions of the online events in order; an infinite ``user_precision`` leaves the user out.

    rate_i = (clicks_i + k·overall) / (events_i + k);  p = σ(logit(rate_i) + b_u); after each event a Newton step
    on the user's logistic bias: h_u += p(1 − p), b_u += (y − p)/h_u, with h_u the prior precision at first.
    """
    offline, online = problem.offline, problem.online
    p = _count(
        np.concatenate([offline.user, online.user]),
        np.concatenate([offline.item, online.item]),
        np.concatenate([offline.label, online.label]),
        len(problem.users), len(problem.items), smoothed_rate(problem), item_prior, user_precision,
    )  # fmt: skip
    return p[len(offline) :].astype(np.float32)  # type: ignore[no-any-return]


def _loss(trial: Problem, item_prior: float, user_precision: float) -> float:
    return mean_log_loss(trial.online, counted(trial, item_prior, user_precision)) if len(trial.online) else 0.0


@numba.njit(nogil=True, cache=True)
def _count(user, item, label, users, items, overall, item_prior, user_precision):  # type: ignore[no-untyped-def]
    clicks, shown = np.zeros(items), np.zeros(items)
    bias, precision = np.zeros(users), np.full(users, user_precision)
    p = np.empty(len(user))
    for t in range(len(user)):
        u, i = user[t], item[t]
        rate = (clicks[i] + item_prior * overall) / (shown[i] + item_prior)
        p[t] = 1 / (1 + np.exp(-np.log(rate / (1 - rate)) - bias[u]))
        precision[u] += p[t] * (1 - p[t])
        bias[u] += (label[t] - p[t]) / precision[u]
        clicks[i] += label[t]
        shown[i] += 1
    return p
