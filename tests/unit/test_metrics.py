"""The names are an interface: dashboards and alerts are written against them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from amoe.metrics import LOSS_KINDS, EngineMetrics, one_two_five_buckets
from amoe.stats import (
    BATCH_SIZE_EDGES,
    ITERATION_EDGES,
    JOIN_WAIT_EDGES,
    CapacitySnapshot,
    ClusterStats,
    DecisionSnapshot,
    LayerHistograms,
    QueueSnapshot,
    SteeringStats,
    TrafficSnapshot,
    WorkerStats,
)

REQUEST_LABELS = {"model_name", "engine"}
BLOCK_LABELS = {"worker", "block", "layer"}
GOLDEN = {
    "amoe:admission_rejections": ("counter", {"model_name", "reason"}),
    "amoe:block_batch_size": ("histogram", BLOCK_LABELS),
    "amoe:e2e_request_latency_seconds": ("histogram", REQUEST_LABELS),
    "amoe:engine_healthy": ("gauge", {"model_name"}),
    "amoe:event_loop_lag_seconds": ("histogram", set()),
    "amoe:expert_load_imbalance": ("gauge", {"layer"}),
    "amoe:expert_pairs": ("counter", {"layer", "expert", "worker"}),
    "amoe:expert_wait_token_seconds": ("counter", {"worker"}),
    "amoe:generation_tokens": ("counter", REQUEST_LABELS),
    "amoe:home_share": ("gauge", {"worker"}),
    "amoe:http_connections_open": ("gauge", set()),
    "amoe:http_requests_open": ("gauge", set()),
    "amoe:inter_token_latency_seconds": ("histogram", REQUEST_LABELS),
    "amoe:iteration_tokens_total": ("histogram", REQUEST_LABELS),
    "amoe:join_wait_seconds": ("histogram", BLOCK_LABELS),
    "amoe:kv_cache_usage_perc": ("gauge", REQUEST_LABELS),
    "amoe:micro_queue_age_seconds": ("gauge", BLOCK_LABELS),
    "amoe:micro_queue_depth": ("gauge", BLOCK_LABELS),
    "amoe:micro_queue_token_seconds": ("counter", BLOCK_LABELS),
    "amoe:num_preemptions": ("counter", REQUEST_LABELS),
    "amoe:num_requests_running": ("gauge", REQUEST_LABELS),
    "amoe:num_requests_waiting": ("gauge", REQUEST_LABELS),
    "amoe:num_requests_waiting_by_reason": ("gauge", REQUEST_LABELS | {"reason"}),
    "amoe:owner_speed": ("gauge", {"worker"}),
    "amoe:prefix_cache_hits": ("counter", REQUEST_LABELS),
    "amoe:prefix_cache_queries": ("counter", REQUEST_LABELS),
    "amoe:cache_config_info": ("gauge", REQUEST_LABELS | {"block_size", "num_gpu_blocks", "enable_prefix_caching"}),
    "amoe:capacity_gate_mass_lost": ("counter", {"worker"}),
    "amoe:capacity_pairs": ("counter", {"layer", "expert", "action", "reason", "worker"}),
    "amoe:capacity_pairs_over": ("counter", {"worker"}),
    "amoe:capacity_tokens": ("counter", {"worker"}),
    "amoe:prompt_tokens": ("counter", REQUEST_LABELS),
    "amoe:prompt_tokens_cached": ("counter", REQUEST_LABELS),
    "amoe:prompt_tokens_by_source": ("counter", REQUEST_LABELS | {"source"}),
    "amoe:replica_pairs_moved_perc": ("gauge", {"model_name"}),
    "amoe:replica_plans": ("counter", {"model_name"}),
    "amoe:request_decode_time_seconds": ("histogram", REQUEST_LABELS),
    "amoe:request_generation_tokens": ("histogram", REQUEST_LABELS),
    "amoe:request_inference_time_seconds": ("histogram", REQUEST_LABELS),
    "amoe:request_max_num_generation_tokens": ("histogram", REQUEST_LABELS),
    "amoe:request_num_preemptions": ("histogram", REQUEST_LABELS),
    "amoe:request_params_max_tokens": ("histogram", REQUEST_LABELS),
    "amoe:request_params_n": ("histogram", REQUEST_LABELS),
    "amoe:request_prefill_kv_computed_tokens": ("histogram", REQUEST_LABELS),
    "amoe:request_prefill_time_seconds": ("histogram", REQUEST_LABELS),
    "amoe:request_prompt_tokens": ("histogram", REQUEST_LABELS),
    "amoe:request_queue_time_seconds": ("histogram", REQUEST_LABELS),
    "amoe:request_success": ("counter", REQUEST_LABELS | {"finished_reason"}),
    "amoe:request_time_per_output_token_seconds": ("histogram", REQUEST_LABELS),
    "amoe:scheduler_decisions": ("counter", {"worker", "block", "reason"}),
    "amoe:time_to_first_token_seconds": ("histogram", REQUEST_LABELS),
    "amoe:token_slots_used": ("gauge", REQUEST_LABELS),
    "amoe:transport_messages": ("counter", {"worker", "kind", "path"}),
    "amoe:transport_payload_bytes": ("counter", {"worker", "kind", "path"}),
    "amoe:transport_tokens": ("counter", {"worker", "kind", "path"}),
    "amoe:wave_slips": ("counter", {"worker"}),
    "amoe:waves": ("gauge", {"worker"}),
    "amoe:worker_busy_seconds": ("counter", {"worker", "block"}),
    "amoe:worker_heartbeat_timestamp_seconds": ("gauge", {"worker"}),
    "amoe:worker_info": ("gauge", {"worker", "role"}),
    "amoe:worker_load_imbalance": ("gauge", {"layer"}),
    "amoe:worker_loops": ("counter", {"worker"}),
    "amoe:worker_steps": ("counter", {"worker"}),
    "amoe:worker_wait_seconds": ("counter", {"worker", "reason"}),
    "amoe:expert_replicas": ("gauge", {"model_name"}),
    "amoe:expert_workers_max": ("gauge", {"model_name"}),
    "amoe:expert_workers_serving": ("gauge", {"model_name"}),
    "amoe:expert_workers_wanted": ("gauge", {"model_name"}),
    "amoe:experts_missing": ("gauge", {"model_name"}),
    "amoe:experts_moved": ("counter", {"model_name"}),
    "amoe:requests_readmitted": ("counter", REQUEST_LABELS),
    "amoe:tokens_parked": ("gauge", {"worker"}),
    "amoe:tokens_redone": ("counter", {"worker"}),
    "amoe:tokens_resent": ("counter", {"worker"}),
    "amoe:topology_version": ("gauge", {"model_name"}),
    "amoe:worker_losses": ("counter", {"worker", "role", "kind"}),
    "amoe:worker_recovery_seconds": ("histogram", {"role"}),
    "amoe:worker_respawns": ("counter", {"worker", "role"}),
    "amoe:worker_state": ("gauge", {"worker", "role", "state"}),
    "http_request_duration_seconds": ("histogram", {"handler", "method"}),
    "http_requests": ("counter", {"handler", "method", "status"}),
}


@pytest.fixture
def metrics() -> EngineMetrics:
    """Every series, with known values."""
    metrics = EngineMetrics("m", max_model_len=100)
    metrics.prepare([0, 1])
    metrics.steered(SteeringStats({0: 1.0, 1: 0.5}, {0: 0.6, 1: 0.4}, moved=0.1, num_plans=2))
    metrics.first_token(1, 0.03, num_prompt_tokens=7, num_cached_tokens=4)
    metrics.tokens(1, 1, None)
    metrics.tokens(1, 2, 0.2)
    metrics.finished(
        1,
        "length",
        seconds=0.4,
        decode_seconds=0.3,
        num_prompt_tokens=7,
        num_generated_tokens=3,
        num_cached_tokens=4,
        max_tokens=3,
        queue_seconds=0.04,
        prefill_seconds=0.06,
        num_preemptions=2,
    )
    metrics.all_choices_finished(1, 2, 3)
    metrics.finished(0, "abort", seconds=1.0, decode_seconds=None, num_prompt_tokens=5, num_generated_tokens=0)
    metrics.rejected("queue_full")
    metrics.http.began()
    metrics.http.began()
    metrics.http.ended("/v1/completions", "POST", 200, 0.3)
    metrics.http.watch_connections(lambda: 4)
    metrics.http.lagged(0.002)
    batch_sizes, joins = LayerHistograms(2, BATCH_SIZE_EDGES), LayerHistograms(2, JOIN_WAIT_EDGES)
    for size in (1, 2, 3, 5000):
        batch_sizes.observe(1, size)
    iterations = LayerHistograms(1, ITERATION_EDGES)
    iterations.observe(0, 12)
    joins.observe_many(0, np.array([1e-4, 0.02]))
    metrics.worker(WorkerStats(rank=0, role="attention", num_running=9))
    metrics.worker(
        WorkerStats(
            rank=0,
            role="attention",
            num_running=3,
            num_waiting=2,
            kv_blocks_used=5,
            kv_blocks_total=20,
            num_preemptions=1,
            redone_tokens=11,
            resent_tokens=6,
            parked_tokens=2,
            prefix_queries=70,
            prefix_hits=40,
            steps=12,
            num_waves=2,
            num_slips=5,
            num_deferred=1,
            busy_s=1.5,
            busy_by_block={"attention": 1.25, "head": 0.25},
            wait_s={"idle": 3.0, "held": 0.5},
            iteration_tokens=iterations.snapshot("attention")[0],
            decisions=[DecisionSnapshot("attention", "policy", 7), DecisionSnapshot("none", "held", 9)],
            traffic=[
                TrafficSnapshot("dispatch", "remote", 3, 20, 4096),
                TrafficSnapshot("announce", "local", 5, 0, 0),
            ],
            queues=[QueueSnapshot("attention", 1, 4, 0.25, waited_s=7.5)],
            batch_sizes=batch_sizes.snapshot("attention"),
            join_waits=joins.snapshot("experts"),
            capacity=CapacitySnapshot("slack", [[1, 4, 6, 0], [2, 0, 1, 3]], 5, 2.5, 80),
        )
    )
    metrics.worker(WorkerStats(rank=1, role="experts", steps=3, expert_pairs=[[0, 8], [2, 0]], expert_wait_s=3.5))
    states = {0: ("attention", "serving"), 1: ("experts", "serving"), 2: ("experts", "waiting")}
    metrics.clustered(ClusterStats(version=7, states=states, num_wanted=2, num_most=6, num_replicas=3, num_missing=1))
    return metrics


def samples(metrics: EngineMetrics) -> dict[str, float]:
    """`name{label=value,...}` without the model's name, to value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_names_types_and_labels(metrics: EngineMetrics):
    families = list(text_string_to_metric_families(metrics.render().decode()))
    found = {}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        assert family.documentation
        if not family.name.startswith(("process_", "python_")):  # of the client library
            found[family.name] = (family.type, labels)
    assert found == GOLDEN


def test_request_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["amoe:prompt_tokens_total{engine=1}"] == 7
    assert found["amoe:prompt_tokens_cached_total{engine=1}"] == 4
    assert found["amoe:generation_tokens_total{engine=1}"] == 3
    assert found["amoe:generation_tokens_total{engine=0}"] == 0
    assert found["amoe:request_success_total{engine=1,finished_reason=length}"] == 1
    assert found["amoe:request_success_total{engine=0,finished_reason=abort}"] == 1
    assert found["amoe:time_to_first_token_seconds_sum{engine=1}"] == 0.03
    assert found["amoe:time_to_first_token_seconds_bucket{engine=1,le=0.02}"] == 0
    assert found["amoe:time_to_first_token_seconds_bucket{engine=1,le=0.04}"] == 1
    assert found["amoe:inter_token_latency_seconds_count{engine=1}"] == 1
    assert found["amoe:request_time_per_output_token_seconds_sum{engine=1}"] == pytest.approx(0.15)
    assert found["amoe:request_decode_time_seconds_count{engine=0}"] == 0
    assert found["amoe:e2e_request_latency_seconds_count{engine=0}"] == 1
    assert found["amoe:admission_rejections_total{reason=queue_full}"] == 1
    assert found["amoe:admission_rejections_total{reason=shutdown}"] == 0
    assert found["amoe:prompt_tokens_by_source_total{engine=1,source=local_compute}"] == 3
    assert found["amoe:prompt_tokens_by_source_total{engine=1,source=local_cache_hit}"] == 4
    assert found["amoe:request_queue_time_seconds_sum{engine=1}"] == 0.04
    assert found["amoe:request_inference_time_seconds_sum{engine=1}"] == pytest.approx(0.36)
    assert found["amoe:request_prefill_kv_computed_tokens_sum{engine=1}"] == 3
    assert found["amoe:request_num_preemptions_sum{engine=1}"] == 2
    assert found["amoe:request_params_n_sum{engine=1}"] == 2
    assert found["amoe:request_max_num_generation_tokens_sum{engine=1}"] == 3
    assert found["amoe:request_queue_time_seconds_count{engine=0}"] == 0, "aborted in the queue: not known"


def test_worker_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["amoe:num_requests_running{engine=0}"] == 3
    assert found["amoe:num_requests_waiting{engine=0}"] == 2
    assert found["amoe:kv_cache_usage_perc{engine=0}"] == 0.25
    assert found["amoe:num_preemptions_total{engine=0}"] == 1
    assert found["amoe:prefix_cache_hits_total{engine=0}"] == 40
    assert found["amoe:micro_queue_depth{block=attention,layer=1,worker=0}"] == 4
    assert found["amoe:micro_queue_age_seconds{block=attention,layer=1,worker=0}"] == 0.25
    assert found["amoe:micro_queue_token_seconds_total{block=attention,layer=1,worker=0}"] == 7.5
    assert found["amoe:expert_wait_token_seconds_total{worker=1}"] == 3.5
    assert "amoe:expert_wait_token_seconds_total{worker=0}" not in found, "no expert worker"
    assert found["amoe:worker_steps_total{worker=1}"] == 3
    assert (found["amoe:waves{worker=0}"], found["amoe:wave_slips_total{worker=0}"]) == (2, 5)
    assert "amoe:waves{worker=1}" not in found, "a schedule without waves"
    assert found["amoe:worker_busy_seconds_total{block=attention,worker=0}"] == 1.25
    assert found["amoe:worker_wait_seconds_total{reason=held,worker=0}"] == 0.5
    assert found["amoe:num_requests_waiting_by_reason{engine=0,reason=capacity}"] == 1
    assert found["amoe:num_requests_waiting_by_reason{engine=0,reason=deferred}"] == 1
    assert found["amoe:iteration_tokens_total_bucket{engine=0,le=8.0}"] == 0
    assert found["amoe:iteration_tokens_total_bucket{engine=0,le=16.0}"] == 1
    assert found["amoe:cache_config_info{block_size=16,enable_prefix_caching=True,engine=0,num_gpu_blocks=20}"] == 1
    assert found["amoe:worker_info{role=experts,worker=1}"] == 1
    assert found["amoe:worker_heartbeat_timestamp_seconds{worker=0}"] == pytest.approx(time.time(), abs=60)
    assert found["amoe:scheduler_decisions_total{block=none,reason=held,worker=0}"] == 9
    assert found["amoe:transport_payload_bytes_total{kind=dispatch,path=remote,worker=0}"] == 4096
    assert found["amoe:transport_messages_total{kind=announce,path=local,worker=0}"] == 5
    assert "amoe:transport_tokens_total{kind=announce,path=local,worker=0}" not in found, "it brings none"
    assert found["amoe:expert_pairs_total{expert=1,layer=0,worker=1}"] == 8
    assert "amoe:num_requests_running{engine=1}" not in found  # an expert worker has no requests
    assert "amoe:expert_pairs_total{expert=0,layer=0,worker=1}" not in found


def test_capacity_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["amoe:capacity_pairs_total{action=dropped,expert=4,layer=1,reason=slack,worker=0}"] == 6
    assert found["amoe:capacity_pairs_total{action=rerouted,expert=0,layer=2,reason=slack,worker=0}"] == 3
    assert "amoe:capacity_pairs_total{action=rerouted,expert=4,layer=1,reason=slack,worker=0}" not in found
    assert found["amoe:capacity_pairs_over_total{worker=0}"] == 5
    assert found["amoe:capacity_gate_mass_lost_total{worker=0}"] == 2.5
    assert found["amoe:capacity_tokens_total{worker=0}"] == 80
    assert "amoe:capacity_tokens_total{worker=1}" not in found, "where capacity is off nothing is told"


def test_steering_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["amoe:owner_speed{worker=1}"] == 0.5
    assert found["amoe:home_share{worker=0}"] == 0.6
    assert found["amoe:replica_pairs_moved_perc{}"] == 0.1
    assert found["amoe:replica_plans_total{}"] == 2


def test_histograms_of_workers_are_cumulative(metrics: EngineMetrics):
    found = samples(metrics)
    bucket = "amoe:block_batch_size_bucket{{block=attention,layer=1,le={},worker=0}}"
    assert [found[bucket.format(le)] for le in ("1.0", "2.0", "4.0", "2048.0", "+Inf")] == [1, 2, 3, 3, 4]
    assert found["amoe:block_batch_size_count{block=attention,layer=1,worker=0}"] == 4
    assert found["amoe:block_batch_size_sum{block=attention,layer=1,worker=0}"] == 5006
    bucket = "amoe:join_wait_seconds_bucket{{block=experts,layer=0,le={},worker=0}}"
    assert [found[bucket.format(le)] for le in ("0.0001", "0.01", "0.025", "+Inf")] == [1, 1, 2, 2]


def test_a_worker_in_a_long_step_is_alive(metrics: EngineMetrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "time", lambda: 5e9)
    metrics.alive(1)
    found = samples(metrics)
    assert found["amoe:worker_heartbeat_timestamp_seconds{worker=1}"] == 5e9
    assert found["amoe:worker_heartbeat_timestamp_seconds{worker=0}"] < 5e9


def test_http_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["http_requests_total{handler=/v1/completions,method=POST,status=2xx}"] == 1
    assert found["http_request_duration_seconds_bucket{handler=/v1/completions,le=0.5,method=POST}"] == 1
    assert (found["amoe:http_requests_open{}"], found["amoe:http_connections_open{}"]) == (1, 4)
    assert found["amoe:event_loop_lag_seconds_bucket{le=0.0025}"] == 1


def test_no_client_can_add_http_series(metrics: EngineMetrics):
    """Paths and methods are the client's; series are ours."""
    for method in ("BREW", "PROPFIND", "get"):
        metrics.http.began()
        metrics.http.ended(None, method, 404, 0.1)
    assert samples(metrics)["http_requests_total{handler=none,method=other,status=4xx}"] == 3


def test_the_client_library_counts_the_process(metrics: EngineMetrics):
    assert samples(metrics)["process_cpu_seconds_total{}"] > 0


def test_engines_do_not_share_series():
    EngineMetrics("a", 10).rejected("queue_full")
    assert samples(EngineMetrics("a", 10))["amoe:admission_rejections_total{reason=queue_full}"] == 0


def test_one_two_five_buckets():
    assert one_two_five_buckets(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five_buckets(2048)[-1] == 2000


def test_cluster_values(metrics: EngineMetrics):
    found = samples(metrics)
    assert found["amoe:topology_version{}"] == 7
    assert found["amoe:experts_missing{}"] == 1
    assert found["amoe:expert_replicas{}"] == 3
    workers = ("wanted", "serving", "max")
    assert [found[f"amoe:expert_workers_{name}{{}}"] for name in workers] == [2, 1, 6]
    assert found["amoe:worker_state{role=experts,state=waiting,worker=2}"] == 1
    assert found["amoe:worker_state{role=experts,state=serving,worker=2}"] == 0
    assert found["amoe:tokens_redone_total{worker=0}"] == 11
    assert found["amoe:tokens_resent_total{worker=0}"] == 6
    assert found["amoe:tokens_parked{worker=0}"] == 2
    assert "amoe:tokens_redone_total{worker=1}" not in found, "experts have no tokens of their own"


def test_losses_are_told_from_the_start(metrics: EngineMetrics):
    found = samples(metrics)
    for kind in LOSS_KINDS:
        assert found[f"amoe:worker_losses_total{{kind={kind},role=experts,worker=1}}"] == 0
    assert found["amoe:worker_respawns_total{role=experts,worker=1}"] == 0
    assert found["amoe:worker_recovery_seconds_count{role=experts}"] == 0
    assert found["amoe:requests_readmitted_total{engine=0}"] == 0
    assert "amoe:requests_readmitted_total{engine=1}" not in found
    assert found["amoe:experts_moved_total{}"] == 0


def test_a_worker_that_dies_and_comes_back(metrics: EngineMetrics):
    metrics.worker_lost(0, "attention", "silent")
    metrics.readmitted(0, 3)
    found = samples(metrics)
    assert found["amoe:worker_losses_total{kind=silent,role=attention,worker=0}"] == 1
    assert found["amoe:requests_readmitted_total{engine=0}"] == 3
    assert found["amoe:num_requests_running{engine=0}"] == 0
    assert found["amoe:micro_queue_depth{block=attention,layer=1,worker=0}"] == 0
    assert found["amoe:worker_steps_total{worker=0}"] == 12, "a counter never falls"
    assert "amoe:worker_heartbeat_timestamp_seconds{worker=0}" not in found, "the dead are lost, not silent"
    metrics.worker(WorkerStats(rank=0, role="attention", steps=30, loops=0))  # on its way while the worker died
    metrics.alive(0)
    assert samples(metrics)["amoe:worker_steps_total{worker=0}"] == 12
    metrics.worker_back(0, "attention", 2.5)
    metrics.worker(WorkerStats(rank=0, role="attention", steps=1, num_running=3))
    found = samples(metrics)
    assert found["amoe:worker_respawns_total{role=attention,worker=0}"] == 1
    assert found["amoe:worker_recovery_seconds_bucket{le=3.0,role=attention}"] == 1
    assert found["amoe:worker_recovery_seconds_bucket{le=2.0,role=attention}"] == 0
    assert found["amoe:worker_steps_total{worker=0}"] == 13
    assert found["amoe:num_requests_running{engine=0}"] == 3
    assert "amoe:worker_heartbeat_timestamp_seconds{worker=0}" in found


def test_a_worker_that_was_removed_is_told_of_no_more(metrics: EngineMetrics):
    metrics.worker_removed(1)
    metrics.experts_moved(8)
    metrics.clustered(ClusterStats(version=8, states={0: ("attention", "serving")}))
    found = samples(metrics)
    assert found["amoe:experts_moved_total{}"] == 8
    of_workers = [name for name in found if "worker=1" in name]
    assert all(
        "losses" in name or "respawns" in name or "owner_speed" in name or "home_share" in name for name in of_workers
    )


def test_without_a_supervisor_who_speaks_serves():
    metrics = EngineMetrics("m", 10)
    metrics.worker(WorkerStats(rank=0, role="colocated"))
    found = samples(metrics)
    assert found["amoe:worker_state{role=colocated,state=serving,worker=0}"] == 1
    assert "amoe:topology_version{}" not in found


def test_imbalance_is_measured_while_the_first_owner_is_gone():
    metrics = EngineMetrics("m", 10)
    for rank in (0, 1):
        metrics.worker(WorkerStats(rank=rank, role="experts", expert_pairs=[[0, 0]]))
    metrics.worker_lost(0, "experts", "exit")
    for turn in range(1, 9):
        metrics.worker(WorkerStats(rank=1, role="experts", loops=turn, expert_pairs=[[turn, 3 * turn]]))
    assert samples(metrics)["amoe:expert_load_imbalance{layer=0}"] == 1.5
