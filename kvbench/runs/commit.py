"""Which commit of kvbench's own code is running."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

CODE = ("kvbench", "strategies", "indexes", "analysis")
"""Folders of the repository whose code makes the numbers."""


@functools.cache
def commit() -> dict[str, str | bool] | None:
    """The commit that kvbench's source is checked out at, and whether its code was `modified` since.

    `KVBENCH_COMMIT` states the commit of a copy without git's own files. None for an installed package.
    """
    stated = os.environ.get("KVBENCH_COMMIT")
    if stated:
        return {"id": stated, "stated": True, "modified": False}
    here = Path(__file__).resolve()
    root = next((folder for folder in here.parents if (folder / ".git").exists()), None)
    if root is None or not (root / "strategies").is_dir():
        return None
    known = git(root, "rev-parse", "HEAD")
    if known is None:
        return None
    return {"id": known, "modified": git(root, "status", "--porcelain", "--", *CODE) != ""}


def git(root: Path, *arguments: str) -> str | None:
    """What git answers in a repository; None where there is no git or it refuses."""
    program = shutil.which("git")
    if program is None:
        return None
    done = subprocess.run(  # noqa: S603 - no shell
        [program, "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip() if done.returncode == 0 else None


def standing(root: Path, run: dict[str, object] | None) -> str:
    """How a run's commit stands to a repository's: empty for its code as it is, else what differs, in words."""
    if not run or not run.get("id"):
        return "of no known commit"
    name, short = str(run["id"]), str(run["id"])[:10]
    if run.get("modified"):
        return f"of code changed after {short}"
    if git(root, "merge-base", "--is-ancestor", name, "HEAD") is None:
        return f"of {short}, which is no commit of this repository"
    if git(root, "diff", "--quiet", name, "HEAD", "--", *CODE) is None:
        return f"of the earlier code of {short}"
    return ""
