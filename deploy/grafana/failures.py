"""The row *Failures and elasticity* of the dashboard *Experts*: who is lost, who came back, and how many there are."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, buckets_over_time, graph, per_second, rows_over_time

SERVER = 'instance=~"$instance"'
WORKER = f'{SERVER}, worker=~"$worker"'


def panels() -> list[Panel]:
    """Of the row."""
    return [*_workers(), *_tokens(), *_experts()]


def _workers() -> list[Panel]:
    return [
        rows_over_time(
            "Workers that serve",
            "1 while a worker serves; 0 while it is lost, waits for its next life, is being started or drained.",
            "short",
            Query(f'max by (worker) (amoe:worker_state{{{WORKER}, state="serving"}})', "{{worker}}"),
        ),
        graph(
            "Workers lost",
            "By how that showed: the process ended (exit), gave no sign of life (silent), hung in a step (hung), could "
            "not be reached by others (cut), or ended while it was started anew (start).",
            "short",
            Query(
                f"sum by (worker, kind) (increase(amoe:worker_losses_total{{{WORKER}}}[$__rate_interval]))",
                "worker {{worker}} {{kind}}",
            ),
            span=6,
        ),
        buckets_over_time(
            "Time to recover",
            "From the loss of a worker until it serves again.",
            "s",
            "amoe:worker_recovery_seconds",
            SERVER,
            span=6,
        ),
        graph(
            "Workers back",
            "Workers that serve again after they were lost.",
            "short",
            Query(
                f"sum by (worker) (increase(amoe:worker_respawns_total{{{WORKER}}}[$__rate_interval]))",
                "worker {{worker}}",
            ),
        ),
    ]


def _tokens() -> list[Panel]:
    return [
        graph(
            "Sequences re-admitted",
            "Of a lost attention worker: they went on elsewhere, or at its next life.",
            "short",
            Query(
                f"sum by (engine) (increase(amoe:requests_readmitted_total{{{SERVER}}}[$__rate_interval]))",
                "engine {{engine}}",
            ),
        ),
        graph(
            "Dispatches done again",
            "Per second: begun again because a worker was lost, or sent again because no answer came.",
            "short",
            per_second("amoe:tokens_redone_total", WORKER, "worker", "redone by worker {{worker}}"),
            per_second("amoe:tokens_resent_total", WORKER, "worker", "sent again by worker {{worker}}"),
        ),
        graph(
            "Tokens parked",
            "Tokens that wait for an expert that nobody holds.",
            "short",
            Query(f"sum by (worker) (amoe:tokens_parked{{{WORKER}}})", "worker {{worker}}"),
        ),
        graph(
            "Experts that nobody holds",
            "(layer, expert) pairs; their tokens wait, or go on without them.",
            "short",
            Query(f"max(amoe:experts_missing{{{SERVER}}})", "missing"),
        ),
    ]


def _experts() -> list[Panel]:
    return [
        graph(
            "Workers with experts",
            "That serve, that there ought to be, and that there may be.",
            "short",
            *(Query(f"sum(amoe:expert_workers_{name}{{{SERVER}}})", name) for name in ("serving", "wanted", "max")),
        ),
        graph(
            "Replicas",
            "(layer, expert) copies beyond one each.",
            "short",
            Query(f"sum(amoe:expert_replicas{{{SERVER}}})", "replicas"),
        ),
        graph(
            "Experts moved",
            "(layer, expert) copies that workers loaded while they served, and changes of the topology.",
            "short",
            Query(f"sum(increase(amoe:experts_moved_total{{{SERVER}}}[$__rate_interval]))", "experts"),
            Query(f"sum(changes(amoe:topology_version{{{SERVER}}}[$__rate_interval]))", "topologies"),
        ),
    ]
