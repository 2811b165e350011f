"""Makes the purity of unit tests executable: `core` and `policy` touch no socket and start no process."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

FENCED = tuple(Path(__file__).parent / part for part in ("core", "policy"))


@pytest.fixture(autouse=True)
def no_world_in_core_and_policy(request, monkeypatch):
    """Raise where a test of `core` or `policy` opens a socket, or forks or starts a process."""
    if not any(request.path.is_relative_to(folder) for folder in FENCED):
        return

    def forbidden(*args, **kwargs):
        raise AssertionError("tests of core and policy open no socket and start no process")

    for owner, name in ((socket, "socket"), (socket, "socketpair"), (subprocess, "Popen"), (os, "fork")):
        monkeypatch.setattr(owner, name, forbidden)
