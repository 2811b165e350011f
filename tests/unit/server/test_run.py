"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from amoe.cluster.process import DEFAULT_ENTRY
from amoe.config import EngineConfig
from amoe.errors import ConfigError
from amoe.logs import LogOptions
from amoe.server.options import ServerOptions
from amoe.server.run import _serve


async def test_a_directory_in_which_others_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("no JSON")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="PROMETHEUS_MULTIPROC_DIR is set"):
        await _serve(
            EngineConfig(model=str(tmp_path)), ServerOptions(model_names=("m",), port=0), LogOptions(), DEFAULT_ENTRY
        )
