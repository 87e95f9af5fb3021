"""Settings: what a run needs, validated once."""
