"""The dashboard *Experts*: where tokens wait, which experts are hot, and what workers do about it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as dashboard_builders

from deploy.grafana import failures
from deploy.grafana.panels import (
    Choice,
    Panel,
    Query,
    graph,
    matrix,
    new_dashboard,
    number,
    per_second,
    quantiles,
    rows_over_time,
)

SERVER = 'instance=~"$instance"'
WORKER = f'{SERVER}, worker=~"$worker"'
LAYER = f'{SERVER}, layer=~"$layer"'
BLOCK = f'{WORKER}, layer=~"$layer"'


def build() -> dashboard_builders.Dashboard:
    """The dashboard."""
    board = (
        new_dashboard(
            "amoe-experts", "amoe / Experts", "μ-queues, skew of experts, and what the workers of amoe servers do."
        )
        .with_variable(Choice("worker", "Worker", "amoe:worker_info"))
        .with_variable(Choice("layer", "Layer", "amoe:micro_queue_depth"))
    )
    for title, panels in (
        ("Now", _now()),
        ("Skew", _skew()),
        ("μ-queues", _queues()),
        ("Workers", _workers()),
        ("Waves and transport", _waves()),
        ("Capacity and steering", _capacity()),
        ("Failures and elasticity", failures.panels()),
    ):
        board = board.with_row(dashboard_builders.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def padded(expr: str, label: str) -> str:
    """`expr` with numbers in `label` of three digits, so that text sorts as numbers do."""
    two = f'label_replace({expr}, "{label}", "0$1", "{label}", "([0-9]{{2}})")'
    return f'label_replace({two}, "{label}", "00$1", "{label}", "([0-9])")'


def _now() -> list[Panel]:
    busy = f"sum by (worker) (rate(amoe:worker_busy_seconds_total{{{WORKER}}}[$__rate_interval]))"
    return [
        number(
            "Worst layer",
            "Pairs of the busiest expert over those of the mean expert, in the layer where that is greatest.",
            "short",
            Query(f"max(amoe:expert_load_imbalance{{{LAYER}}})", "max / mean"),
            warn=4,
        ),
        number(
            "Mean layer",
            "Pairs of the busiest expert over those of the mean expert, averaged over the layers.",
            "short",
            Query(f"avg(amoe:expert_load_imbalance{{{LAYER}}})", "max / mean"),
        ),
        number(
            "Worst layer, by worker",
            "Pairs at the busiest expert worker over those at the mean one, in the layer where that is greatest: what "
            "a barrier would wait for.",
            "short",
            Query(f"max(amoe:worker_load_imbalance{{{LAYER}}})", "max / mean"),
            warn=1.5,
        ),
        number("Busiest worker", "Part of the time in which it ran blocks.", "percentunit", Query(f"max({busy})", "")),
        number("Idlest worker", "Part of the time in which it ran blocks.", "percentunit", Query(f"min({busy})", "")),
        number(
            "Waves now",
            "W: into so many waves sequences are split.",
            "short",
            Query(f"max(amoe:waves{{{WORKER}}})", "W"),
        ),
    ]


def _skew() -> list[Panel]:
    pairs = f"sum by (layer, expert) (rate(amoe:expert_pairs_total{{{BLOCK}}}[$__rate_interval]))"
    per_layer = f"sum by (layer) (rate(amoe:expert_pairs_total{{{BLOCK}}}[$__rate_interval]))"
    return [
        matrix(
            "Skew: layer × expert",
            "Part of the (token, expert) pairs of a layer that each expert got, in percent: experts down, layers "
            "across. An expert without pairs is 0.",
            "percent",
            padded(padded(f"100 * {pairs} / on (layer) group_left () {per_layer}", "layer"), "expert"),
            row="expert",
            column="layer",
        ),
        rows_over_time(
            "Imbalance of experts by layer",
            "Pairs of the busiest expert over those of the mean expert, in the last ten seconds.",
            "short",
            Query(f"max by (layer) (amoe:expert_load_imbalance{{{LAYER}}})", "{{layer}}"),
        ),
        graph(
            "Imbalance of workers by layer",
            "Pairs at the busiest expert worker over those at the mean one, in the last ten seconds.",
            "short",
            Query(f"max by (layer) (amoe:worker_load_imbalance{{{LAYER}}})", "layer {{layer}}"),
            span=12,
            minimum=1,
        ),
        graph(
            "Pairs by worker",
            "(token, expert) pairs computed per second.",
            "short",
            per_second("amoe:expert_pairs_total", BLOCK, "worker", "worker {{worker}}"),
            span=12,
            is_stacked=True,
        ),
        graph(
            "Hottest experts",
            "The ten experts with the most pairs per second.",
            "short",
            Query(f"topk(10, {pairs})", "layer {{layer}} expert {{expert}}"),
            span=12,
        ),
    ]


def _queues() -> list[Panel]:
    waited = f"sum by (block, layer) (rate(amoe:micro_queue_token_seconds_total{{{BLOCK}}}[$__rate_interval]))"
    return [
        rows_over_time(
            "Queue depth by block and layer",
            "Mean number of tokens that waited for a block.",
            "short",
            Query(waited, "{{block}} {{layer}}"),
        ),
        rows_over_time(
            "Queue age by block and layer",
            "How long the oldest token has waited for a block, at the last heartbeat.",
            "s",
            Query(f"max by (block, layer) (amoe:micro_queue_age_seconds{{{BLOCK}}})", "{{block}} {{layer}}"),
        ),
        graph(
            "Queue depth by kind of block",
            "Mean number of tokens that waited: for attention, experts or the head.",
            "short",
            per_second("amoe:micro_queue_token_seconds_total", BLOCK, "block"),
            is_stacked=True,
        ),
        graph(
            "Queue depth at the last heartbeat",
            "Tokens that waited just then, by worker.",
            "short",
            Query(f"sum by (worker) (amoe:micro_queue_depth{{{BLOCK}}})", "worker {{worker}}"),
        ),
        graph(
            "Join wait",
            "From a token's dispatch to experts to the last of their answers.",
            "s",
            *quantiles("amoe:join_wait_seconds", BLOCK),
        ),
        graph(
            "Batch size by kind of block",
            "Mean tokens per run of a block.",
            "short",
            Query(
                f"sum by (block) (rate(amoe:block_batch_size_sum{{{BLOCK}}}[$__rate_interval])) / "
                f"sum by (block) (rate(amoe:block_batch_size_count{{{BLOCK}}}[$__rate_interval]))",
                "{{block}}",
            ),
        ),
        graph(
            "Batch size by layer: experts",
            "Mean tokens per run of an experts block.",
            "short",
            Query(
                f'sum by (layer) (rate(amoe:block_batch_size_sum{{{BLOCK}, block="experts"}}[$__rate_interval])) / '
                f'sum by (layer) (rate(amoe:block_batch_size_count{{{BLOCK}, block="experts"}}[$__rate_interval]))',
                "layer {{layer}}",
            ),
        ),
        graph(
            "Tokens in flight",
            "Token slots in use, by attention worker: what bounds all queues.",
            "short",
            Query(f"sum by (engine) (amoe:token_slots_used{{{SERVER}}})", "engine {{engine}}"),
        ),
    ]


def _workers() -> list[Panel]:
    return [
        graph(
            "Busy time by worker",
            "Part of the time in which a worker ran blocks.",
            "percentunit",
            per_second("amoe:worker_busy_seconds_total", WORKER, "worker", "worker {{worker}}"),
            maximum=1,
        ),
        graph(
            "Busy time by kind of block",
            "Workers' worth of time in attention, experts and head.",
            "short",
            per_second("amoe:worker_busy_seconds_total", WORKER, "block"),
            is_stacked=True,
        ),
        graph(
            "Waiting time by worker",
            "Part of the time in which a worker slept: without tokens (idle), with all of them at experts elsewhere "
            "(away), or with tokens that waited for those (held). The rest is spent on queues and messages.",
            "percentunit",
            per_second("amoe:worker_wait_seconds_total", WORKER, "worker, reason", "worker {{worker}} {{reason}}"),
            maximum=1,
        ),
        graph(
            "Scheduler decisions",
            "Blocks that ran per second, by what decided: it was the only one ready, the schedule's order, a token "
            "that had waited too long (overdue), a wave that went on without somebody (slip).",
            "short",
            per_second("amoe:scheduler_decisions_total", f'{WORKER}, block!="none"', "reason"),
            is_stacked=True,
        ),
        graph(
            "Blocks run",
            "Per second, by worker.",
            "short",
            per_second("amoe:worker_steps_total", WORKER, "worker", "worker {{worker}}"),
        ),
        graph(
            "Age of heartbeats",
            "Since a worker has last spoken; twice a second is usual.",
            "s",
            Query(
                f"time() - max by (worker) (amoe:worker_heartbeat_timestamp_seconds{{{WORKER}}})", "worker {{worker}}"
            ),
        ),
    ]


def _waves() -> list[Panel]:
    return [
        graph(
            "Waves",
            "W: into so many waves sequences are split, by worker.",
            "short",
            Query(f"max by (worker) (amoe:waves{{{WORKER}}})", "worker {{worker}}"),
            span=6,
        ),
        graph(
            "Slips",
            "Waves per second that went on without somebody for whom they had waited too long.",
            "short",
            per_second("amoe:wave_slips_total", WORKER, "worker", "worker {{worker}}"),
            span=6,
        ),
        graph(
            "Messages between workers",
            "Batches per second, markers included, by kind and path.",
            "short",
            per_second("amoe:transport_messages_total", WORKER, "kind, path"),
            span=6,
        ),
        graph(
            "Hidden states between workers",
            "Bytes per second that are dispatched to experts and come back from them.",
            "Bps",
            per_second("amoe:transport_payload_bytes_total", f'{WORKER}, path="remote"', "kind"),
            span=6,
        ),
    ]


def _capacity() -> list[Panel]:
    mass, tokens = (
        f"sum (rate(amoe:capacity_{name}_total{{{WORKER}}}[$__rate_interval]))" for name in ("gate_mass_lost", "tokens")
    )
    return [
        graph(
            "Pairs dropped and rerouted",
            "By capacity, per second; nothing where capacity is off.",
            "short",
            per_second("amoe:capacity_pairs_total", BLOCK, "action, reason"),
            is_stacked=True,
        ),
        graph(
            "Router weight lost to capacity",
            "Part of a token's weight, on average over tokens and layers.",
            "percentunit",
            Query(f"{mass} / {tokens}", "lost"),
        ),
        graph(
            "Pairs beyond capacity",
            "Computed all the same, per second: of exact requests, or a token's best expert.",
            "short",
            per_second("amoe:capacity_pairs_over_total", WORKER, "worker", "worker {{worker}}"),
        ),
        graph(
            "Speed of expert workers",
            "Relative to the median one, as steering has measured it.",
            "short",
            Query(f"max by (worker) (amoe:owner_speed{{{WORKER}}})", "worker {{worker}}"),
        ),
        graph(
            "Share of new sequences",
            "That steering gives each attention worker.",
            "percentunit",
            Query(f"max by (worker) (amoe:home_share{{{WORKER}}})", "worker {{worker}}"),
            is_stacked=True,
            maximum=1,
        ),
        graph(
            "Pairs at replicas",
            "Part of the pairs that goes to another replica than the primary.",
            "percentunit",
            Query(f"max(amoe:replica_pairs_moved_perc{{{SERVER}}})", "moved"),
            maximum=1,
        ),
    ]
