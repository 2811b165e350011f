"""Writes the dashboards: `python -m deploy.grafana.generate`, from the root of the repository.

`grafana-foundation-sdk` (in the extra `dev`) makes them; Grafana 10.1 and later show them.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import experts, serving

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"serving.json": serving.build, "experts.json": experts.build}


def render(name: str) -> str:
    """The text of a dashboard's file."""
    model = DASHBOARDS[name]().build()
    for number, panel in enumerate(model.panels or [], start=1):
        panel.id_val = number
    document = json.loads(JSONEncoder().encode(model))
    document["id"] = None  # Grafana's own
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all of them."""
    for name in DASHBOARDS:
        path = FOLDER / name
        path.write_text(render(name), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
