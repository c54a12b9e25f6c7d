"""Says which code makes a run, for its config.json: the commit, changes to it, and versions."""

import hashlib
import platform
import subprocess
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent


def describe_code() -> dict[str, str | None]:
    """Returns the commit of this project, a hash of changes that are not committed ("": none), and versions.

    Without git, or outside of a repository, the first two are None.
    """
    changes = run_git("diff", "HEAD", "--", ".")
    return {
        "commit": run_git("rev-parse", "HEAD"),
        "changes": changes and hashlib.sha256(changes.encode()).hexdigest()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_git(*arguments: str) -> str | None:
    """Returns what git prints about this project; None if there is no git, or no repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def compare_code(before: dict, now: dict) -> str:
    """Returns in words what differs between two answers of `describe_code`; "" if nothing does."""
    told = []
    for name, value in now.items():
        was = before.get(name)
        if was != value and name == "changes":
            told.append("other changes that are not committed")
        elif was != value:
            told.append(f"{name} {str(was)[:12]} -> {str(value)[:12]}")
    return ", ".join(told)
