"""Files that the processes of a node hold in memory once: read by one of them, mapped by the others.

The memory has no name in any file system, and ends with the last process that maps it. It is sealed before it is
offered: nobody can write to it or shrink it, so that a mapped page is always there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK if hasattr(fcntl, "F_SEAL_WRITE") else 0


class NodeMemory:
    """Bytes that other processes of this user on this node can map while ``close`` was not called.

    Args:
        content: The bytes; they are copied once.

    Attributes:
        mapped: The copy.
        address: What ``attach`` needs to find it.

    Raises:
        OSError: This system has no such memory, or not enough of it.
    """

    def __init__(self, content: bytes):
        if not _SEALS or not content:
            raise OSError("no sealed memory on this system, or nothing to share")
        self._descriptor = os.memfd_create("hpcssl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self.mapped = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.address = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Offer the memory no longer. Who has mapped it keeps it."""
        os.close(self._descriptor)


def attach(address: str) -> mmap.mmap | None:
    """Map the memory of another process.

    Args:
        address: ``NodeMemory.address`` there.

    Returns:
        The bytes, read-only; None where they cannot be reached, as from another container. Processes of two containers
        may have the same number, so compare the content with what is expected.
    """
    try:
        descriptor = os.open(address, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        is_sealed = stat.S_ISREG(os.fstat(descriptor).st_mode)
        is_sealed = is_sealed and fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) if is_sealed else None
    except (OSError, ValueError):  # another kind of file, which has no seals, or an empty one
        return None
    finally:
        os.close(descriptor)
