"""The dashboard *Serving*: what users of the server feel, with the panels that vLLM's dashboards have."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as dashboard_builders

from deploy.grafana.panels import (
    Choice,
    Panel,
    Query,
    buckets_over_time,
    graph,
    mean,
    new_dashboard,
    number,
    per_second,
    quantiles,
)

SERVER = 'instance=~"$instance"'
MODEL = f'model_name=~"$model_name", {SERVER}'


def build() -> dashboard_builders.Dashboard:
    """The dashboard."""
    board = new_dashboard(
        "amoe-serving", "amoe / Serving", "Latency, throughput, queue and cache of amoe servers, as vLLM's dashboards."
    ).with_variable(Choice("model_name", "Model", "amoe:engine_healthy"))
    for title, panels in (
        ("Now", _now()),
        ("Latency", _latency()),
        ("Work", _work()),
        ("Requests", _requests()),
        ("HTTP", _http()),
    ):
        board = board.with_row(dashboard_builders.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def _now() -> list[Panel]:
    tokens = f"sum (rate(amoe:generation_tokens_total{{{MODEL}}}[$__rate_interval]))"
    ttft = f"sum by (le) (rate(amoe:time_to_first_token_seconds_bucket{{{MODEL}}}[$__rate_interval]))"
    itl = f"sum by (le) (rate(amoe:inter_token_latency_seconds_bucket{{{MODEL}}}[$__rate_interval]))"
    return [
        number(
            "Engines not healthy",
            "Servers with a worker that makes no progress.",
            "short",
            Query(f"count(amoe:engine_healthy{{{MODEL}}}) - sum(amoe:engine_healthy{{{MODEL}}})", "not healthy"),
            warn=1,
        ),
        number(
            "Running",
            "Sequences being computed.",
            "short",
            Query(f"sum(amoe:num_requests_running{{{MODEL}}})", "running"),
        ),
        number(
            "Waiting",
            "Sequences waiting to be computed.",
            "short",
            Query(f"sum(amoe:num_requests_waiting{{{MODEL}}})", "waiting"),
            warn=1,
        ),
        number("Generated tokens", "Tokens generated per second.", "short", Query(tokens, "tokens/s")),
        number(
            "TTFT p99",
            "99 % of the requests got their first token within this time.",
            "s",
            Query(f"histogram_quantile(0.99, {ttft})", "p99"),
        ),
        number(
            "ITL p99",
            "99 % of the tokens came within this time after the one before.",
            "s",
            Query(f"histogram_quantile(0.99, {itl})", "p99"),
        ),
    ]


def _latency() -> list[Panel]:
    return [
        graph(title, description, "s", *quantiles(f"amoe:{name}", MODEL))
        for title, description, name in (
            ("E2E request latency", "From a request's arrival to its end.", "e2e_request_latency_seconds"),
            ("Time to first token", "From a request's arrival to its first token.", "time_to_first_token_seconds"),
            ("Inter-token latency", "Between two tokens of a request.", "inter_token_latency_seconds"),
            (
                "Time per output token",
                "A request's mean time per token after the first.",
                "request_time_per_output_token_seconds",
            ),
            (
                "Queue time",
                "In which a request waited for room at its attention worker.",
                "request_queue_time_seconds",
            ),
        )
    ] + [
        graph(
            "Prefill and decode time",
            "Means per request: from its first computation to its first token, and from there to its last.",
            "s",
            mean("amoe:request_prefill_time_seconds", MODEL)._replace(legend="prefill"),
            mean("amoe:request_decode_time_seconds", MODEL)._replace(legend="decode"),
            is_stacked=True,
        )
    ]


def _work() -> list[Panel]:
    hits, queries = (
        f"sum by (engine) (rate(amoe:prefix_cache_{name}_total{{{MODEL}}}[$__rate_interval]))"
        for name in ("hits", "queries")
    )
    return [
        graph(
            "Token throughput",
            "Tokens per second: of prompts (counted with the first token), those of them that had to be computed, and "
            "generated ones.",
            "short",
            per_second("amoe:prompt_tokens_total", MODEL, "model_name", "prompt"),
            per_second(
                "amoe:prompt_tokens_by_source_total", MODEL + ', source="local_compute"', "source", "prompt, computed"
            ),
            per_second("amoe:generation_tokens_total", MODEL, "model_name", "generated"),
        ),
        graph(
            "Scheduler state",
            "Sequences that are computed, that wait for room, and that wait for another sequence.",
            "short",
            Query(f"sum(amoe:num_requests_running{{{MODEL}}})", "running"),
            Query(f"sum by (reason) (amoe:num_requests_waiting_by_reason{{{MODEL}}})", "waiting: {{reason}}"),
        ),
        graph(
            "Cache utilisation",
            "KV cache blocks in use, by attention worker.",
            "percentunit",
            Query(f"max by (engine) (amoe:kv_cache_usage_perc{{{MODEL}}})", "engine {{engine}}"),
            maximum=1,
        ),
        graph(
            "Prefix cache hit rate",
            "Part of the prompt tokens looked up in the prefix cache that were found.",
            "percentunit",
            Query(f"{hits} / {queries}", "engine {{engine}}"),
            maximum=1,
        ),
        graph(
            "Tokens per iteration",
            "Tokens, of prompts and decodes, that enter the model at one time at an attention worker.",
            "short",
            *quantiles("amoe:iteration_tokens_total", MODEL),
        ),
        graph(
            "Preemptions",
            "Sequences that lost their KV cache to earlier ones and are computed again, per second.",
            "short",
            per_second("amoe:num_preemptions_total", MODEL, "engine", "engine {{engine}}"),
        ),
    ]


def _requests() -> list[Panel]:
    return [
        buckets_over_time(
            "Prompt length", "Requests by tokens of their prompt.", "short", "amoe:request_prompt_tokens", MODEL
        ),
        buckets_over_time(
            "Generation length", "Requests by tokens generated.", "short", "amoe:request_generation_tokens", MODEL
        ),
        buckets_over_time(
            "Max generation tokens",
            "Requests by tokens of their longest choice.",
            "short",
            "amoe:request_max_num_generation_tokens",
            MODEL,
        ),
        graph(
            "Finish reason",
            "Requests that ended, per second.",
            "reqps",
            per_second("amoe:request_success_total", MODEL, "finished_reason"),
            is_stacked=True,
        ),
        graph(
            "Rejections",
            "Requests refused with 503, per second: the queue is full, or the server is going.",
            "reqps",
            per_second("amoe:admission_rejections_total", MODEL, "reason"),
            is_stacked=True,
        ),
        graph(
            "Asked for and got",
            "Mean tokens per request: max_tokens, and those that were generated.",
            "short",
            mean("amoe:request_params_max_tokens", MODEL)._replace(legend="max_tokens"),
            mean("amoe:request_generation_tokens", MODEL)._replace(legend="generated"),
        ),
    ]


def _http() -> list[Panel]:
    lag = f"sum by (le) (rate(amoe:event_loop_lag_seconds_bucket{{{SERVER}}}[$__rate_interval]))"
    return [
        graph(
            "HTTP requests",
            "Answers per second by class of status; none: the client went before one.",
            "reqps",
            per_second("http_requests_total", SERVER, "status"),
            is_stacked=True,
        ),
        graph(
            "HTTP duration p99 by route",
            "99 % of the answers were complete within this time, streams included.",
            "s",
            Query(
                "histogram_quantile(0.99, sum by (le, handler) (rate(http_request_duration_seconds_bucket{"
                f"{SERVER}}}[$__rate_interval])))",
                "{{handler}}",
            ),
        ),
        graph(
            "Open requests and connections",
            "At the HTTP server.",
            "short",
            Query(f"sum(amoe:http_requests_open{{{SERVER}}})", "requests"),
            Query(f"sum(amoe:http_connections_open{{{SERVER}}})", "connections"),
        ),
        graph(
            "Event loop lag",
            "By how much timers of the API's event loop are late: it grows when the front end has more to do than one "
            "core can.",
            "s",
            Query(f"histogram_quantile(0.5, {lag})", "p50"),
            Query(f"histogram_quantile(0.99, {lag})", "p99"),
            mean("amoe:event_loop_lag_seconds", SERVER),
        ),
        graph(
            "Server CPU",
            "Cores that the API process keeps busy; workers are not counted.",
            "short",
            Query(
                f"sum by (instance) (rate(process_cpu_seconds_total{{{SERVER}}}[$__rate_interval]))",
                "{{instance}}",
            ),
        ),
        graph(
            "Server memory",
            "Resident memory of the API process; workers are not counted.",
            "bytes",
            Query(
                f"sum by (instance) (process_resident_memory_bytes{{{SERVER}}})",
                "{{instance}}",
            ),
        ),
    ]
