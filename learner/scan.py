"""The unrolled test-then-train scan over users' whole sequences, with a backward pass written by hand.

Autograd through a thousand unrolled Kalman updates builds millions of nodes; here each head's scan is one
compiled loop forward and one backward, wrapped as a ``torch.autograd.Function``. The gradients are checked
against plain autograd in the tests. Equations: ``learner.serving.FirstFilter``.

Symbols: B users, T events of all of them, packed (user j owns events ``starts[j] .. starts[j+1] − 1``), d width.
Only one user's history is kept at a time: the backward pass runs that user's forward pass again. Each user's
share of the shared gradients is kept apart and summed in order, so threads never change a bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float32]


@njit(fastmath=True, inline="always")
def _sigmoid(z):  # type: ignore[no-untyped-def]
    return np.float32(1) / (np.float32(1) + np.exp(-z))


@njit
def _longest(first, last, starts):  # type: ignore[no-untyped-def]
    longest = 0
    for u in range(first, last):
        longest = max(longest, starts[u + 1] - starts[u])
    return longest


# --- full covariance ------------------------------------------------------------------------------------------


@njit(fastmath=True)
def _full_forward(lanes, psi, base, target, weight, m, S, kappa, drift, z, history):  # type: ignore[no-untyped-def]
    """One user: adapts (m, S) in place, writes z, and each event's (m, S) before it into ``history`` if it has rows."""
    one = np.float32(1)
    d = len(lanes)
    a = np.empty(d, np.float32)
    keep = len(history) > 0
    for t in range(len(psi)):
        if keep:
            for i in range(d):
                history[t, i] = m[i]
            for j in range(d):
                for i in range(d):
                    history[t, d + j * d + i] = S[j, i]
        for i in range(d):
            a[i] = 0
        for j in range(d):
            x = psi[t, j]
            for i in range(d):
                a[i] += S[j, i] * x
        v = np.float32(0)
        raw = base[t]
        for i in range(d):
            v += a[i] * psi[t, i]
            raw += m[i] * psi[t, i]
        z[t] = raw / np.sqrt(one + kappa * v)
        p = _sigmoid(z[t])
        w = p * (one - p) * weight[t]
        gain = one / (one + w * v)
        step = (target[t] - p) * weight[t] * gain
        shrink = w * gain
        for i in range(d):
            m[i] += a[i] * step
        for j in range(d):
            h = shrink * a[j]
            for i in range(d):
                S[j, i] -= h * a[i]
            S[j, j] += drift[j]


@njit(fastmath=True)
def _full_backward(lanes, psi, base, target, weight, kappa, drift, z, history, z_bar, out_psi, out_base, out_target, out_weight, out_m, out_S, out_drift):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    """One user, last event first; out_m, out_S, out_drift get the gradients of the start. Returns kappa's.

    All that is read and written in the inner loops is local: the compiler then knows that nothing overlaps.
    """
    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    d = len(lanes)
    a, a_bar, Sa = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(d, np.float32)
    x, x_bar, m = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(d, np.float32)
    S, S_bar = np.empty((d, d), np.float32), np.zeros((d, d), np.float32)
    m_bar, drift_bar = np.zeros(d, np.float32), np.zeros(d, np.float32)
    kappa_bar = np.float32(0)
    for t in range(len(psi) - 1, -1, -1):
        for i in range(d):
            x[i] = psi[t, i]
            m[i] = history[t, i]
            a[i] = 0
            Sa[i] = 0
        for j in range(d):
            for i in range(d):
                S[j, i] = history[t, d + j * d + i]
                a[i] += S[j, i] * x[j]
        v = np.float32(0)
        raw = base[t]
        for i in range(d):
            v += a[i] * x[i]
            raw += m[i] * x[i]
        scale = one / np.sqrt(one + kappa * v)
        p = _sigmoid(z[t])
        r = weight[t]
        w = p * (one - p) * r
        gain = one / (one + w * v)
        error = target[t] - p
        step = error * r * gain
        shrink = w * gain
        # through S' = S − shrink·aa' + diag(drift) and m' = m + step·a
        for j in range(d):
            drift_bar[j] += S_bar[j, j]
            for i in range(d):
                Sa[i] += S_bar[j, i] * a[j]
        step_bar = np.float32(0)
        shrink_bar = np.float32(0)
        for i in range(d):
            step_bar += a[i] * m_bar[i]
            shrink_bar -= a[i] * Sa[i]
        gain_bar = error * r * step_bar + w * shrink_bar
        w_bar = gain * shrink_bar - gain * gain * v * gain_bar
        p_bar = (one - two * p) * r * w_bar - r * gain * step_bar
        out_target[t] = r * gain * step_bar
        out_weight[t] = error * gain * step_bar + p * (one - p) * w_bar
        # through z = raw·scale
        total = z_bar[t] + p * (one - p) * p_bar
        raw_bar = scale * total
        scale3 = half * scale * scale * scale * raw * total
        v_bar = -gain * gain * w * gain_bar - kappa * scale3
        kappa_bar -= v * scale3
        out_base[t] = raw_bar
        for i in range(d):
            a_bar[i] = step * m_bar[i] - two * shrink * Sa[i] + x[i] * v_bar
            x_bar[i] = m[i] * raw_bar + a[i] * v_bar
            m_bar[i] += x[i] * raw_bar
        # through a = Sψ, with S_bar kept symmetric
        for j in range(d):
            left, right, above = half * a_bar[j], half * x[j], a_bar[j]
            for i in range(d):
                S_bar[j, i] += left * x[i] + right * a_bar[i]
                x_bar[i] += S[j, i] * above
        for i in range(d):
            out_psi[t, i] = x_bar[i]
    out_m[:] = m_bar
    out_S[:] = S_bar
    out_drift[:] = drift_bar
    return kappa_bar


@njit(fastmath=True, nogil=True, cache=True)
def _full_scan(first, last, lanes, starts, psi, base, target, weight, m0, S0, kappa, drift, z):  # type: ignore[no-untyped-def]
    nothing = np.empty((0, 0), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        m, S = m0[u].copy(), S0.copy()
        _full_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m, S, kappa, drift, z[a:e], nothing)


@njit(fastmath=True, nogil=True, cache=True)
def _full_scan_backward(first, last, lanes, starts, psi, base, target, weight, m0, S0, kappa, drift, z_bar, psi_bar, base_bar, target_bar, weight_bar, m0_bar, S0_bar, kappa_bar, drift_bar):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    d = len(lanes)
    longest = _longest(first, last, starts)
    logits = np.empty(longest, np.float32)
    histories = np.empty((longest, d + d * d), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        m, S = m0[u].copy(), S0.copy()
        z, history = logits[: e - a], histories[: e - a]
        _full_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m, S, kappa, drift, z, history)
        kappa_bar[u] = _full_backward(
            lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], kappa, drift, z, history, z_bar[a:e],
            psi_bar[a:e], base_bar[a:e], target_bar[a:e], weight_bar[a:e], m0_bar[u], S0_bar[u], drift_bar[u],
        )  # fmt: skip


# --- diagonal covariance --------------------------------------------------------------------------------------


@njit(fastmath=True)
def _diagonal_forward(lanes, psi, base, target, weight, m, s, kappa, drift, z, history):  # type: ignore[no-untyped-def]
    one = np.float32(1)
    d = len(lanes)
    keep = len(history) > 0
    for t in range(len(psi)):
        v = np.float32(0)
        raw = base[t]
        for i in range(d):
            v += s[i] * psi[t, i] * psi[t, i]
            raw += m[i] * psi[t, i]
            if keep:
                history[t, i] = m[i]
                history[t, d + i] = s[i]
        z[t] = raw / np.sqrt(one + kappa * v)
        p = _sigmoid(z[t])
        w = p * (one - p) * weight[t]
        gain = one / (one + w * v)
        step = (target[t] - p) * weight[t] * gain
        for i in range(d):
            a = s[i] * psi[t, i]
            m[i] += a * step
            s[i] += drift[i] - w * gain * a * a


@njit(fastmath=True)
def _diagonal_backward(lanes, psi, base, target, weight, kappa, z, history, z_bar, out_psi, out_base, out_target, out_weight, m_bar, s_bar, drift_bar):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    d = len(lanes)
    kappa_bar = np.float32(0)
    m_bar[:] = 0
    s_bar[:] = 0
    drift_bar[:] = 0
    for t in range(len(psi) - 1, -1, -1):
        m, s, x = history[t, :d], history[t, d:], psi[t]
        v = np.float32(0)
        raw = base[t]
        step_bar = np.float32(0)
        shrink_bar = np.float32(0)
        for i in range(d):
            a = s[i] * x[i]
            v += a * x[i]
            raw += m[i] * x[i]
            drift_bar[i] += s_bar[i]
            step_bar += a * m_bar[i]
            shrink_bar -= a * a * s_bar[i]
        scale = one / np.sqrt(one + kappa * v)
        p = _sigmoid(z[t])
        r = weight[t]
        w = p * (one - p) * r
        gain = one / (one + w * v)
        error = target[t] - p
        step = error * r * gain
        shrink = w * gain
        gain_bar = error * r * step_bar + w * shrink_bar
        p_bar = -r * gain * step_bar
        out_target[t] = r * gain * step_bar
        w_bar = gain * shrink_bar - gain * gain * v * gain_bar
        v_bar = -gain * gain * w * gain_bar
        p_bar += (one - two * p) * r * w_bar
        out_weight[t] = error * gain * step_bar + p * (one - p) * w_bar
        total = z_bar[t] + p * (one - p) * p_bar
        raw_bar = scale * total
        scale3 = half * scale * scale * scale * raw * total
        v_bar -= kappa * scale3
        kappa_bar -= v * scale3
        out_base[t] = raw_bar
        for i in range(d):
            a = s[i] * x[i]
            a_bar = step * m_bar[i] - two * shrink * a * s_bar[i]
            out_psi[t, i] = m[i] * raw_bar + two * a * v_bar + a_bar * s[i]
            m_bar[i] += x[i] * raw_bar
            s_bar[i] += a_bar * x[i] + x[i] * x[i] * v_bar
    return kappa_bar


@njit(fastmath=True, nogil=True, cache=True)
def _diagonal_scan(first, last, lanes, starts, psi, base, target, weight, m0, s0, kappa, drift, z):  # type: ignore[no-untyped-def]
    nothing = np.empty((0, 0), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        m, s = m0[u].copy(), s0.copy()
        _diagonal_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m, s, kappa, drift, z[a:e], nothing)


@njit(fastmath=True, nogil=True, cache=True)
def _diagonal_scan_backward(first, last, lanes, starts, psi, base, target, weight, m0, s0, kappa, drift, z_bar, psi_bar, base_bar, target_bar, weight_bar, m0_bar, s0_bar, kappa_bar, drift_bar):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    d = len(lanes)
    longest = _longest(first, last, starts)
    logits = np.empty(longest, np.float32)
    histories = np.empty((longest, 2 * d), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        m, s = m0[u].copy(), s0.copy()
        z, history = logits[: e - a], histories[: e - a]
        _diagonal_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m, s, kappa, drift, z, history)
        kappa_bar[u] = _diagonal_backward(
            lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], kappa, z, history, z_bar[a:e],
            psi_bar[a:e], base_bar[a:e], target_bar[a:e], weight_bar[a:e], m0_bar[u], s0_bar[u], drift_bar[u],
        )  # fmt: skip


# --- gradient steps -------------------------------------------------------------------------------------------


@njit(fastmath=True)
def _gradient_forward(lanes, psi, base, target, weight, m, rate, z, history):  # type: ignore[no-untyped-def]
    d = len(lanes)
    keep = len(history) > 0
    for t in range(len(psi)):
        raw = base[t]
        for i in range(d):
            raw += m[i] * psi[t, i]
            if keep:
                history[t, i] = m[i]
        z[t] = raw
        step = (target[t] - _sigmoid(raw)) * weight[t]
        for i in range(d):
            m[i] += rate[i] * psi[t, i] * step


@njit(fastmath=True)
def _gradient_backward(lanes, psi, target, weight, rate, z, history, z_bar, out_psi, out_base, out_target, out_weight, m_bar, rate_bar):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    one = np.float32(1)
    d = len(lanes)
    m_bar[:] = 0
    rate_bar[:] = 0
    for t in range(len(psi) - 1, -1, -1):
        p = _sigmoid(z[t])
        step = (target[t] - p) * weight[t]
        step_bar = np.float32(0)
        for i in range(d):
            step_bar += rate[i] * psi[t, i] * m_bar[i]
        out_target[t] = weight[t] * step_bar
        out_weight[t] = (target[t] - p) * step_bar
        total = z_bar[t] - p * (one - p) * weight[t] * step_bar
        out_base[t] = total
        for i in range(d):
            rate_bar[i] += psi[t, i] * step * m_bar[i]
            out_psi[t, i] = history[t, i] * total + rate[i] * step * m_bar[i]
            m_bar[i] += psi[t, i] * total


@njit(fastmath=True, nogil=True, cache=True)
def _gradient_scan(first, last, lanes, starts, psi, base, target, weight, m0, rate, z):  # type: ignore[no-untyped-def]
    nothing = np.empty((0, 0), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        _gradient_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m0[u].copy(), rate, z[a:e], nothing)


@njit(fastmath=True, nogil=True, cache=True)
def _gradient_scan_backward(first, last, lanes, starts, psi, base, target, weight, m0, rate, z_bar, psi_bar, base_bar, target_bar, weight_bar, m0_bar, rate_bar):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    d = len(lanes)
    longest = _longest(first, last, starts)
    logits = np.empty(longest, np.float32)
    histories = np.empty((longest, d), np.float32)
    for u in range(first, last):
        a, e = starts[u], starts[u + 1]
        z, history = logits[: e - a], histories[: e - a]
        _gradient_forward(lanes, psi[a:e], base[a:e], target[a:e], weight[a:e], m0[u].copy(), rate, z, history)
        _gradient_backward(
            lanes, psi[a:e], target[a:e], weight[a:e], rate, z, history, z_bar[a:e],
            psi_bar[a:e], base_bar[a:e], target_bar[a:e], weight_bar[a:e], m0_bar[u], rate_bar[u],
        )  # fmt: skip


# --- torch ----------------------------------------------------------------------------------------------------

MIN_EVENTS_PER_THREAD = 1_000
"""Less is one or two milliseconds of work at d = 16, too short to hand to another thread."""

_threads: ContextVar[int] = ContextVar("scan_threads", default=1)


@contextmanager
def scan_threads(count: int | None) -> Iterator[None]:
    """How many threads the scans use within the block; None takes every core this process may use.

    Torch gets one thread meanwhile: its operations are small here, and its threads spin at every one of them,
    which on a busy machine made a step seven times slower (docs/decisions/0003).
    """
    token = _threads.set(count or len(os.sched_getaffinity(0)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads.reset(token)


def _over_users(scan: Any, starts: Array, psi: Array, *arrays: Any) -> None:
    """Runs ``scan`` over all users in the threads of ``scan_threads``; users do not touch each other.

    The compiled scans get d as the length of a tuple: it is part of the type, so that every loop is unrolled.
    """
    users = len(starts) - 1
    lanes = (0,) * psi.shape[1]
    threads = max(1, min(_threads.get(), users, len(psi) // MIN_EVENTS_PER_THREAD))
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], threads + 1)[1:-1]).tolist()
    edges = [0, *cuts, users]
    others = [_helpers(threads).submit(scan, a, e, lanes, starts, psi, *arrays) for a, e in pairwise(edges[1:])]
    scan(0, edges[1], lanes, starts, psi, *arrays)
    for other in others:
        other.result()


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Threads beside the caller's own, kept: starting one takes longer than a short scan."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="coldstream-scan")


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [t.detach().to("cpu", torch.float32).contiguous().numpy() for t in tensors]


def _tensors(like: torch.Tensor, *arrays: NDArray[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(a).to(like.device) for a in arrays]


class _KalmanScan(torch.autograd.Function):
    """(psi (T, d), base, target, weight (T,), m0 (B, d), cov, kappa (), drift (d,), starts) -> logits (T,).

    ``cov`` is S_0 (d, d) symmetric for the full head, (d,) for the diagonal one.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        *tensors, starts = inputs
        psi, base, target, weight, m0, cov, kappa, drift = _arrays(*tensors)
        z = np.empty(len(psi), np.float32)
        scan = _full_scan if cov.ndim == 2 else _diagonal_scan
        _over_users(scan, starts.numpy(), psi, base, target, weight, m0, cov, np.float32(kappa), drift, z)
        ctx.save_for_backward(*inputs)
        return _tensors(tensors[0], z)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        psi, base, target, weight, m0, cov, kappa, drift = _arrays(*tensors)
        users = len(m0)
        per_event = [np.empty_like(a) for a in (psi, base, target, weight)]
        m0_bar, drift_bar = np.empty_like(m0), np.empty_like(m0)
        cov_bar, kappa_bar = np.empty((users, *cov.shape), np.float32), np.empty(users, np.float32)
        scan = _full_scan_backward if cov.ndim == 2 else _diagonal_scan_backward
        _over_users(
            scan, starts.numpy(), psi, base, target, weight, m0, cov, np.float32(kappa), drift,
            *_arrays(*grad_outputs), *per_event, m0_bar, cov_bar, kappa_bar, drift_bar,
        )  # fmt: skip
        shared = (cov_bar.sum(0), np.asarray(kappa_bar.sum(dtype=np.float32)), drift_bar.sum(0))
        return (*_tensors(tensors[0], *per_event, m0_bar, *shared), None)


class _GradientScan(torch.autograd.Function):
    """(psi (T, d), base, target, weight (T,), m0 (B, d), rate (d,), starts) -> logits (T,)."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        *tensors, starts = inputs
        arrays = _arrays(*tensors)
        z = np.empty(len(arrays[0]), np.float32)
        _over_users(_gradient_scan, starts.numpy(), *arrays, z)
        ctx.save_for_backward(*inputs)
        return _tensors(tensors[0], z)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        arrays = _arrays(*tensors)
        per_event = [np.empty_like(a) for a in arrays[:4]]
        m0_bar, rate_bar = np.empty_like(arrays[4]), np.empty_like(arrays[4])
        _over_users(
            _gradient_scan_backward, starts.numpy(), *arrays, *_arrays(*grad_outputs), *per_event, m0_bar, rate_bar
        )
        return (*_tensors(tensors[0], *per_event, m0_bar, rate_bar.sum(0)), None)


def kalman_scan(
    psi: torch.Tensor,
    base: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    m0: torch.Tensor,
    covariance: torch.Tensor,
    kappa: torch.Tensor,
    drift: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """(T,) logits, each before its own label was used.

    psi (T, d); base, target, weight (T,); m0 (B, d); covariance (d, d) symmetric or (d,); kappa () with π/8
    multiplied in; drift (d,); starts (B + 1,) int64 on the CPU.
    """
    return _KalmanScan.apply(psi, base, target, weight, m0, covariance, kappa, drift, starts)  # type: ignore[no-any-return]


def gradient_scan(
    psi: torch.Tensor,
    base: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    m0: torch.Tensor,
    rate: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """(T,) logits of the gradient head; ``weight`` carries the event's decay (1 + n/τ)^−α as well."""
    return _GradientScan.apply(psi, base, target, weight, m0, rate, starts)  # type: ignore[no-any-return]
