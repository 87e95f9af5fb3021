"""A reader that stays open beside a live writer and follows it: RocksDB's secondary instance."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rocksdict import Rdict

from state.rocksdb import open_following, unreadable
from state.store import RocksReader


class FollowingReader(RocksReader):
    """Rows as they stood at the last ``catch_up``; nothing is ever written to the store.

    RocksDB keeps notes of its own in a temporary directory, which goes at ``close``. Raises StoreUnreadable.
    """

    def __init__(self, path: Path) -> None:
        self._notes = Path(tempfile.mkdtemp(prefix="coldstream-follower-"))
        super().__init__(path)

    def catch_up(self) -> None:
        """Takes in what the writer has written since."""
        try:
            self._open_db().try_catch_up_with_primary()
        except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
            raise unreadable(self.path, error) from error

    def close(self) -> None:
        """See ``RocksReader``."""
        super().close()
        shutil.rmtree(self._notes, ignore_errors=True)

    def _opened(self) -> Rdict:
        try:
            return open_following(self.path, self._notes)
        except BaseException:
            shutil.rmtree(self._notes, ignore_errors=True)
            raise
