"""The dashboards are what the code makes, follow the rules of Grafana's dashboard linter, and ask for what there is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from deploy.grafana.generate import DASHBOARDS, FOLDER, render
from tests.dashboards import NAMES, PanelQuery, load, panels_of, queries, substituted
from tests.unit.test_metrics import GOLDEN

QUERIES = list(queries())
DATASOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
OF_PROMETHEUS = {"instance", "job"}  # labels that the scrape adds
OF_THE_PROCESS = {"process_cpu_seconds_total": "counter", "process_resident_memory_bytes": "gauge"}


def sample_names() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of everything that a query may name."""
    found = {name: (kind, set()) for name, kind in OF_THE_PROCESS.items()}
    for family, (kind, labels) in GOLDEN.items():
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[kind]
        for suffix in suffixes:
            found[family + suffix] = (kind, labels | ({"le"} if suffix == "_bucket" else set()))
    return found


def parts_of(node: Any) -> Iterator[Any]:
    """A parsed expression and all that is in it."""
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
        inner = getattr(node, name, None)
        for part in inner if isinstance(inner, list) else [inner]:
            if part is not None:
                yield from parts_of(part)


def selectors(query: PanelQuery) -> list[Any]:
    nodes = parts_of(promql_parser.parse(substituted(query.expr)))
    return [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_what_is_committed_is_what_the_code_makes(name: str):
    assert (FOLDER / name).read_text(encoding="utf-8") == render(name), "run python -m deploy.grafana.generate"


def test_every_file_is_made_by_code():
    assert sorted(DASHBOARDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
class TestDashboard:
    def test_it_can_be_provisioned(self, name: str):
        dashboard = load(name)
        assert dashboard["id"] is None
        assert re.fullmatch(r"amoe-[a-z]+", dashboard["uid"])
        assert dashboard["title"] and dashboard["description"] and dashboard["tags"] == ["amoe"]
        assert dashboard["timezone"] == "browser"
        assert "__inputs" not in dashboard

    def test_its_variables(self, name: str):
        variables = load(name)["templating"]["list"]
        assert variables[0]["name"] == "DS_PROMETHEUS" and variables[0]["type"] == "datasource"
        assert {"instance"} < {variable["name"] for variable in variables}
        for variable in variables[1:]:
            assert variable["datasource"] == DATASOURCE
            assert variable["refresh"] == 2, "with the time range, so that new workers are found"
            assert variable["multi"] and variable["includeAll"] and variable["label"]
            metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]).groups()
            assert label == variable["name"]
            assert label in sample_names()[metric][1] | OF_PROMETHEUS

    def test_every_variable_is_used(self, name: str):
        names = {variable["name"] for variable in load(name)["templating"]["list"][1:]}
        used = {found for query in QUERIES if query.dashboard == name for found in re.findall(r"\$(\w+)", query.expr)}
        assert names <= used <= names | {"__rate_interval", "1"}

    def test_panels_are_labelled(self, name: str):
        panels = panels_of(load(name))
        titles = [panel["title"] for panel in panels]
        assert all(titles) and len(set(titles)) == len(titles)
        ids = [panel["id"] for panel in load(name)["panels"]]
        assert len(set(ids)) == len(ids) and all(ids)
        for panel in panels:
            assert panel["description"].endswith("."), panel["title"]
            options = panel.get("options", {})
            unit = panel["fieldConfig"]["defaults"].get("unit") or options.get("yAxis", {}).get("unit")
            assert unit, panel["title"]

    def test_panels_have_queries_that_can_be_told_apart(self, name: str):
        for panel in panels_of(load(name)):
            assert panel["datasource"] == DATASOURCE
            targets = panel["targets"]
            assert targets and all(target["datasource"] == DATASOURCE for target in targets)
            assert len({target["refId"] for target in targets}) == len(targets)
            if panel["type"] == "timeseries":
                legends = [target["legendFormat"] for target in targets]
                assert all(legends) and len(set(legends)) == len(legends), panel["title"]

    def test_panels_do_not_overlap(self, name: str):
        places = [panel["gridPos"] for panel in load(name)["panels"]]
        for place in places:
            assert place["x"] + place["w"] <= 24
        for a, b in itertools.combinations(places, 2):
            apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.id)
class TestQuery:
    def test_it_asks_for_series_and_labels_that_there_are(self, query: PanelQuery):
        known = sample_names()
        found = selectors(query)
        assert found
        for selector in found:
            assert selector.name in known
            labels = {matcher.name for matcher in selector.matchers.matchers}
            assert labels <= known[selector.name][1] | OF_PROMETHEUS, selector.name
            assert "instance" in labels, "a Prometheus may scrape many servers"

    def test_it_groups_by_labels_that_there_are(self, query: PanelQuery):
        known = sample_names()
        for node in parts_of(promql_parser.parse(substituted(query.expr))):
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                inner = [part for part in parts_of(node.expr) if isinstance(part, promql_parser.VectorSelector)]
                for selector in inner:
                    assert set(node.modifier.labels) <= known[selector.name][1] | OF_PROMETHEUS, selector.name

    def test_counters_are_rates_over_the_interval_of_the_graph(self, query: PanelQuery):
        ranges = re.findall(r"\[(.*?)\]", re.sub(r'"[^"]*"', "", query.expr))
        assert set(ranges) <= {"$__rate_interval"}
        in_rates = re.findall(r"(?:rate|increase)\(([\w:]+)\{", query.expr)
        for selector in selectors(query):
            kind = sample_names()[selector.name][0]
            assert (selector.name in in_rates) == (kind != "gauge"), selector.name


def test_the_provider_and_the_source_are_found_by_grafana():
    root = FOLDER.parent / "provisioning"
    (source,) = yaml.safe_load((root / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["type"], source["isDefault"]) == ("prometheus", "prometheus", True)
    (provider,) = yaml.safe_load((root / "dashboards" / "amoe.yml").read_text())["providers"]
    assert provider["folder"] == "amoe"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert json.loads((FOLDER / NAMES[0]).read_text())["uid"]
