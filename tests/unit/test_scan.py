"""The hand-written scans against the same equations under plain autograd."""

from __future__ import annotations

import pytest
import torch

from learner.scan import gradient_scan, kalman_scan

STARTS = torch.tensor([0, 1, 8, 20])


def kalman_reference(psi, base, target, weight, m0, cov, kappa, drift, starts):
    logits = []
    for u in range(len(starts) - 1):
        m, S = m0[u], torch.diag(cov) if cov.dim() == 1 else cov
        for t in range(starts[u], starts[u + 1]):
            a = S @ psi[t]
            v = a @ psi[t]
            z = (base[t] + m @ psi[t]) / torch.sqrt(1 + kappa * v)
            p = torch.sigmoid(z)
            w = p * (1 - p) * weight[t]
            gain = 1 / (1 + w * v)
            m = m + a * (target[t] - p) * weight[t] * gain
            S = S - w * gain * torch.outer(a, a) + torch.diag(drift)
            if cov.dim() == 1:
                S = torch.diag(torch.diag(S))
            logits.append(z)
    return torch.stack(logits)


def gradient_reference(psi, base, target, weight, m0, rate, starts):
    logits = []
    for u in range(len(starts) - 1):
        m = m0[u]
        for t in range(starts[u], starts[u + 1]):
            z = base[t] + m @ psi[t]
            m = m + rate * psi[t] * (target[t] - torch.sigmoid(z)) * weight[t]
            logits.append(z)
    return torch.stack(logits)


def event_inputs(d):
    torch.manual_seed(d)
    return [torch.randn(20, d), torch.randn(20), torch.rand(20), torch.rand(20) + 0.5, torch.randn(3, d) * 0.3]


def gradients(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    z = function(*leaves, STARTS)
    (z * torch.linspace(-1, 1, 20) + 0.3 * z**2).sum().backward()
    return [z.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("d", [2, 5, 8, 16])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_kalman_scan_and_its_gradients_equal_autograd(d, kind):
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(1)) * 0.4
    cov = A @ A.T + 0.1 * torch.eye(d) if kind == "full" else torch.rand(d) + 0.1
    inputs = [*event_inputs(d), cov, torch.tensor(0.4), torch.rand(d) * 0.05]
    expected = gradients(kalman_reference, inputs)
    for k, (ours, theirs) in enumerate(zip(gradients(kalman_scan, inputs), expected, strict=True)):
        if kind == "full" and k == 6:
            theirs = (theirs + theirs.T) / 2  # S_0 is symmetric: only the symmetric part is defined
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("d", [2, 16])
def test_gradient_scan_and_its_gradients_equal_autograd(d):
    inputs = [*event_inputs(d), torch.rand(d) * 0.3]
    expected = gradients(gradient_reference, inputs)
    for ours, theirs in zip(gradients(gradient_scan, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_bits_do_not_depend_on_the_users_batched_together():
    inputs = [*event_inputs(8), torch.eye(8) * 0.3, torch.tensor(0.4), torch.full((8,), 0.01)]
    together = kalman_scan(*inputs, STARTS)
    psi, base, target, weight, m0, *shared = inputs
    alone = kalman_scan(psi[1:8], base[1:8], target[1:8], weight[1:8], m0[1:2], *shared, torch.tensor([0, 7]))
    assert torch.equal(together[1:8], alone)
