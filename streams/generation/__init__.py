"""A deterministic stream with a planted truth, in small rooms: settings, population, events, best AUC, files."""
