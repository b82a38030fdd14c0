"""What a checkpoint was made with: package versions and the source's commit."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("sparsetune", "torch", "diffusers", "transformers", "optuna", "mlflow", "spas-sage-attn", "triton")
"""Packages whose versions can change what a policy does to a video, or how it was found."""


def versions() -> dict[str, str]:
    """Return the installed version of Python and of each of `PACKAGES`; those not installed are left out.

    Only package metadata is read: nothing is imported.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """Return the commit of sparsetune's own checkout, with `-dirty` when files differ from it.

    None where sparsetune isn't run from a checkout of its own (an installed wheel), or git is missing.
    """
    package = Path(__file__).resolve().parent
    # Site-packages may lie inside somebody else's repository, whose commit would say nothing about this code.
    if _git(package, "ls-files", "--error-unmatch", "--", Path(__file__).name) is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
