"""Users' rows. Which file owns what:

the layout      ``codec`` (bytes of a row and of a partition's progress), ``keys`` (where they lie)
the disk        ``store`` (one RocksDB per topic partition), ``rocksdb`` (options, memory, locks, errors),
                ``log_check``, ``syncing`` (power loss), ``walk``; ``memory_store``: its twin without a disk
the memory      ``hot_rows`` (rows at hand, shared by all partitions)
copies          ``changelog`` (records), ``snapshots`` (directories and URLs)
the audit       ``audit`` (checksums, ledgers, totals)
the end         ``expiry`` and ``sweep`` (who stays away), ``erasure`` and ``receipt`` (who asks to go)
the reading     ``query``, and its parts in ``reading``
what goes wrong ``exceptions``
"""
