"""LUTHIER_HOME: the folder that holds the token cache and what else outlives a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def luthier_home() -> Path:
    """The folder named by LUTHIER_HOME, else the user's data folder. It is made when something is first written."""
    if named := os.environ.get("LUTHIER_HOME"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "luthier"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "luthier"


def token_home() -> Path:
    """The folder whose `tokens` hold the token cache: LUTHIER_TOKENS, else LUTHIER_HOME.

    A server gives each job one of its own, so that a job's rows go from the disk with the job.
    """
    named = os.environ.get("LUTHIER_TOKENS")
    return Path(named).expanduser() if named else luthier_home()
