"""The edge: sources, the stream path, backtests, reports, the command line."""
