"""Addresses of remote shard folders: which strings are addresses, and which of them may be opened.

An address ends up in ``config.yaml``, in logs and on the command line of curl or gsutil. It must therefore hold no
secret and nothing that a shell would interpret.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

from hpcssl.errors import ConfigError

SCHEMES = ("http", "https", "ftps", "sftp", "gs", "file")
"""Schemes that webdataset opens with a list of arguments. It passes ``pipe:`` to a shell instead, so that scheme needs
explicit permission."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# Characters that no address needs: blanks, what a shell would interpret, and what curl or gsutil would expand
_SHELL = re.compile(r"[\s\x00-\x1f\x7f\"'`<>|;\\^*{}\[\]]|\$\(")
_LOGIN = re.compile(r"://[^/\s]*@")
_BRACKETED_IPV6 = re.compile(r"^\w+://\[[0-9A-Fa-f:.]+\]")


def is_remote(address: str) -> bool:
    """Whether the string is an address rather than a folder on this machine.

    A folder whose name contains a colon must be written with a leading ``./``, such as ``./NAME:X``.
    """
    return _SCHEME.match(address) is not None


def check_address(address: str, *, allow_pipe: bool, key: str = "data.train") -> None:
    """Refuse an address that must not be opened. An address that may contain a secret is not repeated in the error.

    Args:
        address: The address of a shard folder.
        allow_pipe: Whether ``pipe:COMMAND`` is allowed. The command must print the file whose name replaces ``{}``.
            Recipes alone must not be able to run commands, so this permission comes from the command line.
        key: Recipe key or option to name in the error.

    Raises:
        ConfigError: If the address has credentials, a query, a fragment, an unknown scheme or characters that a shell
            would interpret, or if it is a shell command without permission.
    """
    if _LOGIN.search(address):
        raise ConfigError(
            key,
            got="an address with a user name or a password in it",
            expected="an address without credentials, because it is written to config.yaml and to logs",
            fix="put `machine HOST login USER password WORD` into ~/.netrc and `netrc` into ~/.curlrc, "
            "both readable by you alone",
        )
    scheme = address.partition(":")[0].lower() if is_remote(address) else "no scheme"
    if scheme == "pipe":
        _check_pipe(address, allow_pipe, key)
        return
    if scheme not in SCHEMES:
        raise ConfigError(
            key,
            got=f"{address!r} ({scheme})",
            expected="an address with one of the schemes " + ", ".join(f"{s}:" for s in SCHEMES),
            fix="check the spelling; write a folder on this machine as its path",
        )
    _check_parts(address, key)


def check_stage_dir(stage_dir: str, key: str) -> None:
    """Raise ``ConfigError`` if there is no folder to which the shards of an address can be downloaded.

    Args:
        stage_dir: The value of ``data.stage_dir``.
        key: Recipe key or option that names the address, for the error.
    """
    if not stage_dir:
        raise ConfigError(
            "data.stage_dir",
            got=f"no folder, with {key} at an address",
            expected="a folder on a disk of each node, for the downloaded shards",
            fix="add data.stage_dir=FOLDER, such as /tmp; to `hpcssl eval`, --stage-dir FOLDER",
        )


def _check_pipe(address: str, allow_pipe: bool, key: str) -> None:
    if not allow_pipe:
        is_train = key.startswith("data.train")
        raise ConfigError(
            key,
            got=f"{address!r}, a shell command",
            expected="an address",
            fix="add --allow-pipe if you trust this shell command" if is_train else "name a folder or another address",
        )
    if "{}" not in address:
        raise ConfigError(
            key,
            got=repr(address),
            expected="a command with {} in place of the file name",
            fix="write it like pipe:cat /archive/train/{}",
        )


def _check_parts(address: str, key: str) -> None:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(
            key,
            got=f"{address!r} ({error})",
            expected="the address of a folder",
            fix="write it as SCHEME://HOST/FOLDER",
        ) from error
    if parts.query or parts.fragment or "?" in address:
        raise ConfigError(
            key,
            got="an address with a query, which may contain a token",
            expected="the address of a folder",
            fix="name the folder that holds index.json, and store credentials in ~/.netrc",
        )
    if match := _SHELL.search(_BRACKETED_IPV6.sub("", address)):
        raise ConfigError(
            key,
            got=f"{address!r}, which contains {match.group()!r}",
            expected="an address without blanks, brackets and shell syntax",
            fix="write such a character as %XX; to run a command, use pipe:COMMAND with --allow-pipe",
        )


# -- failed transfers -------------------------------------------------------------------------------------------

_CURL_ERRORS = {
    6: "host not found",
    7: "connection refused",
    18: "transfer cut short",
    22: "HTTP error",
    28: "timeout",
    35: "TLS handshake failed",
    52: "empty answer",
    56: "connection lost",
    60: "unknown certificate",
}


class TransferError(Exception):
    """A transfer that failed.

    Args:
        message: What arrived instead of the file.
        final: Whether a retry cannot succeed.
    """

    def __init__(self, message: str, *, final: bool = False):
        super().__init__(message)
        self.final = final


def exit_error(code: int, address: str) -> TransferError:
    """Make the error for a program that ended a transfer with an exit code."""
    program = {"pipe": "the command", "gs": "gsutil"}.get(address.partition(":")[0], "curl")
    meaning = f" ({_CURL_ERRORS[code]})" if program == "curl" and code in _CURL_ERRORS else ""
    answer, final = probe_server(address)
    return TransferError(f"exit code {code} of {program}{meaning}{answer}", final=final and code == 22)


def probe_server(address: str) -> tuple[str, bool]:
    """Request one byte from an http server to find out why a transfer failed; curl and webdataset do not report it.

    Returns:
        A clause for the error message, empty where there is nothing to add, and whether a retry cannot succeed.
    """
    from webdataset.gopen import rewrite_url

    address = rewrite_url(address)
    if not address.startswith(("http:", "https:")):
        return "", False
    try:
        request = urllib.request.Request(address, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (OSError, ValueError, HTTPException):
        return "; a second request got no answer", False
    if code < 400:
        return "", False
    return f"; a second request got HTTP {code}", code < 500 and code not in (408, 425, 429)
