"""The online stage on the stream: what partitions contribute, how versions come about, and a backtest's own loop."""
