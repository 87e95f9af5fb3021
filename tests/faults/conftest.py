"""Small disks of their own for stores, and the right to make them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1 << 20


class Disk:
    """A file system in memory that can be filled to the page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, free: int) -> None:
        """Fills it until so many bytes are free, to the page; files that go in the meantime are waited for."""
        self.clear()
        with self._filler.open("wb", buffering=0) as file:
            for _ in range(100):
                try:
                    os.posix_fallocate(file.fileno(), 0, max(self.free() - free, 1))
                    return
                except OSError:
                    os.ftruncate(file.fileno(), 0)
            raise RuntimeError(f"the space on {self.path} does not come to rest")

    def clear(self) -> None:
        """Frees what ``leave`` took."""
        self._filler.unlink(missing_ok=True)

    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_bsize

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 4 MiB. Without the right to mount one a test is skipped, and in CI it fails."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * MIB}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        message = f"no right to mount a small tmpfs (run as root with CAP_SYS_ADMIN): {mounted.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    try:
        yield Disk(path)
    finally:
        if subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
            pytest.fail(f"a file on {path} is still open")
