"""Tar headers of 512 bytes that depend on the name and the size of a member and on nothing else.

``tarfile`` and the writer of webdataset put the time and the user into every header, so two writes of the same data
differ; they also spend most of their time there. Names of up to 255 bytes fit into POSIX ustar. Longer ones get a pax
record in front, which every reader of the last twenty years understands.
"""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)  # two zero blocks; without them a reader knows that the archive was truncated


def padded_size(size: int) -> int:
    """Return ``size`` in bytes, rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def header_size(name: str) -> int:
    """Return the number of bytes of a member's header, without building it for a short name."""
    return (
        BLOCK if len(name) <= 25 or len(name.encode("utf-8", "surrogateescape")) <= 100 else len(make_header(name, 0))
    )


def make_header(name: str, size: int) -> bytes:
    """Build the header of a regular file.

    Args:
        name: Name of the member. Bytes that are not UTF-8, as surrogate escapes, pass through unchanged.
        size: Number of bytes of its content.

    Returns:
        One block; three or more for a long name.
    """
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) <= 100:
        return _block(raw, b"", size, b"0")
    cut = raw.rfind(b"/", len(raw) - 101, 156)
    if cut > 0:
        return _block(raw[cut + 1 :], raw[:cut], size, b"0")
    record = _pax_records(raw)
    body = record + bytes(padded_size(len(record)) - len(record))
    return _block(b"././@PaxHeader", b"", len(record), b"x") + body + _block(raw[:100], b"", size, b"0")


def _block(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    digits = b"%011o" % size
    # Everything but name, prefix, kind and size is constant, so only these are summed (sum() over the whole
    # block would cost more than the write). The checksum field itself counts as eight blanks.
    total = _CONSTANT + sum(name) + sum(prefix) + sum(digits) + kind[0]
    return b"".join(
        (
            name.ljust(100, b"\0"),
            _OWNER,
            digits,
            b"\0",
            _TIME,
            b"%06o\0 " % total,
            kind,
            bytes(100),
            _MAGIC,
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )


_OWNER = b"0000644\0" + b"0000000\0" * 2  # mode, user and group number
_TIME = b"%011o\0" % 0
_MAGIC = b"ustar\x0000" + bytes(64) + b"0000000\0" * 2  # no user and group names; device numbers
_CONSTANT = sum(_OWNER) + sum(_TIME) + sum(_MAGIC) + 8 * ord(" ")


def _pax_records(raw: bytes) -> bytes:
    """Build the pax records of a long name; the standard requires a record of its charset if it is not UTF-8."""
    try:
        raw.decode("utf-8")
        charset = b""
    except UnicodeDecodeError:
        charset = b"21 hdrcharset=BINARY\n"
    rest = b" path=" + raw + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:  # a record states its own length, digits included
        length = len(b"%d" % length) + len(rest)
    return charset + b"%d" % length + rest
