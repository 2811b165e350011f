"""The `openai` package for Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.served import ServedModel

SCRIPT = Path(__file__).parent / "node" / "client.mjs"
PACKAGES = Path(sys.prefix) / "node"


@pytest.mark.skipif(
    shutil.which("node") is None or not (PACKAGES / "node_modules" / "openai").is_dir(),
    reason="needs node and npm (`make venv` installs the package where it finds npm)",
)
def test_the_openai_package(served: ServedModel, tmp_path: Path) -> None:
    # Node looks for packages beside the script.
    script = tmp_path / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    os.symlink(PACKAGES / "node_modules", tmp_path / "node_modules")
    run = subprocess.run(["node", str(script), served.url], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(run.stdout)
    assert seen["content"]
    assert seen["finish_reason"] in ("tool_calls", "stop")
    assert seen["last_event"] in ("response.completed", "response.incomplete")
    assert served.works()
