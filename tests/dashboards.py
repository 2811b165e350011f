"""The committed dashboards, as data: their panels, and the queries behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
NAMES = sorted(path.name for path in FOLDER.glob("*.json"))


class PanelQuery(NamedTuple):
    """One expression of a panel."""

    dashboard: str
    panel: str
    expr: str

    @property
    def id(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.expr}"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def panels_of(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All panels but the rows."""
    found = []
    for panel in dashboard["panels"]:
        found += panel["panels"] if panel["type"] == "row" and panel.get("panels") else [panel]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> Iterator[PanelQuery]:
    """Of all panels of all dashboards."""
    for name in NAMES:
        for panel in panels_of(load(name)):
            for target in panel["targets"]:
                yield PanelQuery(name, panel["title"], target["expr"])


def substituted(expr: str, interval: str = "5m", instance: str = ".*") -> str:
    """`expr` with Grafana's variables replaced: all workers, layers and models."""
    values = {"__rate_interval": interval, "instance": instance, "model_name": ".*", "worker": ".*", "layer": ".*"}
    # Not $1 and the like, which are of `label_replace`.
    return re.sub(r"\$([A-Za-z_]\w*)", lambda match: values[match[1]], expr)
