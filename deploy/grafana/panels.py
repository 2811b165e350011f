"""What the dashboards are made of: panels in one style, with the queries that fill them."""

from __future__ import annotations

from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboard_builders
from grafana_foundation_sdk.builders import heatmap as heatmap_builders
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard, heatmap
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${DS_PROMETHEUS}")
HEIGHT = 8  # of a panel, in rows of Grafana's grid
WIDTH = 24  # of that grid

Panel = Builder[dashboard.Panel]


class Query(NamedTuple):
    """An expression, and the name of the series that it gives."""

    expr: str
    legend: str


def quantiles(histogram: str, selector: str, by: str = "") -> list[Query]:
    """The usual percentiles of a histogram, and its mean."""
    labels, suffix = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    buckets = f"sum by ({labels}) (rate({histogram}_bucket{{{selector}}}[$__rate_interval]))"
    queries = [Query(f"histogram_quantile({q}, {buckets})", f"p{int(q * 100)}{suffix}") for q in (0.5, 0.9, 0.99)]
    return [*queries, mean(histogram, selector, by)]


def mean(histogram: str, selector: str, by: str = "") -> Query:
    """The mean of what a histogram has observed."""
    group = f"sum by ({by})" if by else "sum"
    parts = [f"{group} (rate({histogram}_{part}{{{selector}}}[$__rate_interval]))" for part in ("sum", "count")]
    return Query(" / ".join(parts), " ".join(["mean", *([f"{{{{{by}}}}}"] if by else [])]))


def per_second(counter: str, selector: str, by: str, legend: str | None = None) -> Query:
    """How fast a counter grows."""
    expr = f"sum by ({by}) (rate({counter}{{{selector}}}[$__rate_interval]))"
    return Query(expr, legend or " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",")))


def _target(query: Query, index: int) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(DATASOURCE).ref_id(chr(ord("A") + index))
    return target.expr(query.expr).legend_format(query.legend)


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    is_stacked: bool = False,
    minimum: float | None = 0,
    maximum: float | None = None,
) -> Panel:
    """Lines over time.

    Args:
        unit: Grafana's id of it.
        span: width in 24ths.
        is_stacked: the series are parts of a whole.
        minimum, maximum: of the axis; None: as the data have it.
    """
    stacking = common.StackingMode.NORMAL if is_stacked else common.StackingMode.NONE
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(HEIGHT)
        .line_width(1)
        .fill_opacity(30 if is_stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        .stacking(common_builders.StackingConfig().mode(stacking))
        .legend(legend.display_mode(common.LegendDisplayMode.LIST))
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )
    if minimum is not None:
        panel = panel.min(minimum)
    if maximum is not None:
        panel = panel.max(maximum)
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index))
    return panel


def number(title: str, description: str, unit: str, query: Query, *, warn: float | None = None, span: int = 4) -> Panel:
    """One figure, as it is now. It turns from green to orange at `warn`."""
    steps = [dashboard.Threshold(color="green", value=None)]
    if warn is not None:
        steps.append(dashboard.Threshold(color="orange", value=warn))
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(4)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard_builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_target(query, 0))
    )


def buckets_over_time(title: str, description: str, unit: str, histogram: str, selector: str, span: int = 8) -> Panel:
    """A histogram over time: colour says how many observations fell into a bucket."""
    expr = f"sum by (le) (increase({histogram}_bucket{{{selector}}}[$__rate_interval]))"
    target = _target(Query(expr, "{{le}}"), 0).format(PromQueryFormat.HEATMAP)
    return _heatmap(title, description, unit, span).with_target(target)


def rows_over_time(title: str, description: str, unit: str, query: Query, span: int = 12) -> Panel:
    """One row per series over time: colour is the value."""
    panel = _heatmap(title, description, "short", span).with_target(_target(query, 0))
    return panel.cell_values(heatmap_builders.CellValues().unit(unit))


def _heatmap(title: str, description: str, unit: str, span: int) -> heatmap_builders.Panel:
    color = heatmap_builders.HeatmapColorOptions().mode(heatmap.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return (
        heatmap_builders.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(span)
        .height(HEIGHT)
        .calculate(False)
        .color(color.fill("dark-orange").exponent(0.5))
        .y_axis(heatmap_builders.YAxisConfig().unit(unit))
        .show_legend()
        .show_tooltip()
    )


def matrix(title: str, description: str, unit: str, expr: str, *, row: str, column: str, height: int = 16) -> Panel:
    """A table of one value by two labels, as it is now: colour is the value.

    Args:
        expr: gives series with exactly the labels `row` and `column`; they are sorted as text.
    """
    target = _target(Query(expr, ""), 0).format(PromQueryFormat.TABLE).instant()
    color = dashboard_builders.FieldColor().mode(dashboard.FieldColorModeId.CONTINUOUS_BLUES)
    cells = dashboard.DynamicConfigValue(
        id_val="custom.cellOptions", value={"type": "color-background", "mode": "basic"}
    )
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .decimals(1)
        .span(WIDTH)
        .height(height)
        .min(0)
        .color_scheme(color)
        .override_by_field_type("number", [cells])
        .with_target(target)
    )
    for transformation in (
        # Twice: the second sort keeps the order of the first among equals; columns come as the first row has them.
        dashboard.DataTransformerConfig(id_val="sortBy", options={"fields": {}, "sort": [{"field": column}]}),
        dashboard.DataTransformerConfig(id_val="sortBy", options={"fields": {}, "sort": [{"field": row}]}),
        dashboard.DataTransformerConfig(
            id_val="groupingToMatrix",
            options={"columnField": column, "rowField": row, "valueField": "Value", "emptyValue": "zero"},
        ),
    ):
        panel = panel.with_transformation(transformation)
    return panel


class Choice(dashboard_builders.QueryVariable):
    """A variable: several, or all, values of the label `name` of `metric`.

    Args:
        all_value: a pattern for all of them; None: they are enumerated.
    """

    def __init__(self, name: str, label: str, metric: str, all_value: str | None = ".*") -> None:
        super().__init__(name)
        self._all_value = all_value
        self.label(label).datasource(DATASOURCE).query(f"label_values({metric}, {name})").multi(True)
        self.current(dashboard.VariableOption(text=["All"], value=["$__all"], selected=True))

    def build(self) -> dashboard.VariableModel:
        model = super().build()
        # The builder of this version of the SDK knows nothing of these.
        model.include_all, model.all_value = True, self._all_value
        model.refresh = dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED
        model.sort = dashboard.VariableSort.NUMERICAL_ASC
        return model


def new_dashboard(uid: str, title: str, description: str) -> dashboard_builders.Dashboard:
    """A dashboard without panels, with the variables that both have."""
    source = dashboard_builders.DatasourceVariable("DS_PROMETHEUS").label("Prometheus").type("prometheus")
    return (
        dashboard_builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["amoe"])
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-15m", "now")
        .editable()
        .with_variable(source)
        # Enumerated: some series have names that other programs have too.
        .with_variable(Choice("instance", "Server", "amoe:engine_healthy", all_value=None))
    )
