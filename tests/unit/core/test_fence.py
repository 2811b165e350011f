"""The fence around these tests holds."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest


def test_sockets_are_forbidden():
    with pytest.raises(AssertionError, match="open no socket"):
        socket.create_connection(("127.0.0.1", 9))


def test_processes_are_forbidden():
    with pytest.raises(AssertionError, match="start no process"):
        subprocess.run([sys.executable, "-c", ""], check=False)
