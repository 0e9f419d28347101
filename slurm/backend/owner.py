"""Whose job it is: the token in its comment, its user, its name and its output, as SLURM reports them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

TOKEN_NAME = "hpcssl"
"""Name of a job's token in its comment (``identity``)."""
TOKEN_PATTERN = rf"\b{TOKEN_NAME}=([0-9a-f]{{16}})\b"
TOKEN_VARIABLE = "HPCSSL_JOB_TOKEN"
"""Environment variable with the token of the job that a process belongs to."""


@dataclass(frozen=True)
class JobOwner:
    """Whose job SLURM has under an id.

    Attributes:
        token: The token in its comment (``identity``); empty if there is none.
        user: Name of its user.
        job_name: Its name.
        output: Path of the standard output of its batch script.
    """

    token: str
    user: str
    job_name: str
    output: str


def find_token(comment: str) -> str:
    """Return the token in a job's comment; empty if there is none. The user's own text comes before it."""
    return next(reversed(re.findall(TOKEN_PATTERN, comment)), "")


def current_token() -> str:
    """Return the token of the job that this process runs in; empty if it has none."""
    return os.environ.get(TOKEN_VARIABLE, "")


def is_possibly_own(job: str, owner: JobOwner) -> bool:
    """Return False if this process belongs to a job with this id, and SLURM has another one under it.

    Args:
        job: The job id.
        owner: Whose job SLURM has under it.
    """
    token = current_token()
    if not token or job != os.environ.get("SLURM_JOB_ID"):
        return True
    if owner.token:
        return owner.token == token
    own = (os.environ.get("SLURM_JOB_USER", owner.user), os.environ.get("SLURM_JOB_NAME", owner.job_name))
    return own == (owner.user, owner.job_name)


def parse_owner(text: str) -> JobOwner:
    """Parse one line of ``scontrol show job -o``."""

    def find(pattern: str) -> str:
        match = re.search(pattern, text)
        return match[1] if match else ""

    comment = find(r"\sComment=(.*?)(?:\sStdErr=|$)")
    return JobOwner(
        token=find_token(comment),
        user=find(r"\sUserId=([^\s(]*)"),
        job_name=find(r"\sJobName=(.*?)\sUserId="),
        output=find(r"\sStdOut=(.*?)(?:\s[A-Z]\w*=|\s*$)"),
    )
