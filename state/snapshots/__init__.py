"""Snapshots of a state directory: ``snapshot`` takes, lists, restores and rewrites them; the others are its parts."""
