"""What the learner is compared with: five baselines on the same events, each tested, then trained.

Every hyperparameter is chosen inside the offline users; a label of the online stream is never used before the
event, or for ``pooled_finetuned`` the micro-batch, that it belongs to has been predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from learner.baselines.counting import item_mean, item_mean_user_bias
from learner.baselines.non_meta import non_meta_same_head
from learner.baselines.pooled import pooled_predictions
from learner.baselines.problem import Float, Problem, build_problem
from learner.features import Catalogue
from learner.interactions import Interactions
from learner.scan import scan_threads

BASELINES = ("item_mean", "item_mean_user_bias", "pooled", "pooled_finetuned", "non_meta_same_head")

__all__ = ["BASELINES", "Problem", "build_problem", "run_baselines"]


def run_baselines(
    offline: Interactions,
    online: Interactions,
    users: Catalogue,
    items: Catalogue,
    *,
    names: Sequence[str] = BASELINES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Float]:
    """(N,) probabilities of the online events in their order, by baseline name, in the order of ``BASELINES``.

    Both parts must be in stream order. Ids are matched by text; features are the catalogues', or those carried in
    the events under the names of the catalogues' fields. ``progress`` gets a line of text from time to time.
    torch's random state and thread count are left as found. Raises ValueError for an unknown name.
    """
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; the baselines are {', '.join(BASELINES)}")
    tell = progress or (lambda _: None)
    problem = build_problem(offline, online, users, items)
    result: dict[str, Float] = {}
    with torch.random.fork_rng(devices=[]), scan_threads(None):
        if "item_mean" in names:
            result["item_mean"] = item_mean(problem)
        if "item_mean_user_bias" in names:
            result["item_mean_user_bias"] = item_mean_user_bias(problem)
        if "pooled" in names or "pooled_finetuned" in names:
            result |= pooled_predictions(problem, seed, tell, fine_tuned="pooled_finetuned" in names)
        if "non_meta_same_head" in names:
            result["non_meta_same_head"] = non_meta_same_head(problem, seed, tell)
    return {name: result[name] for name in BASELINES if name in names}
