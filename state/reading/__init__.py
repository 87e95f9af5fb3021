"""Parts of ``state.query``: the model view, going back in time, explanations, scores, reports."""
