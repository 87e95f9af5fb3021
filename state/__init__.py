"""Users' state: rows on disk, and reading them."""
