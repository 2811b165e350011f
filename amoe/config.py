"""Configuration: frozen, keyword-only, validated at construction. Every wrong value is a `ConfigError`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from amoe.errors import ConfigError

ScheduleName = Literal["fcfs", "flfs", "mtfs", "defrag", "progress", "waves", "lockstep"]
DTypeName = Literal["auto", "float32", "bfloat16"]
SchedulingPolicy = Literal["fcfs", "priority"]
CapacityMode = Literal["drop", "reroute", "expanded"]
CapacityMetric = Literal["score", "order", "reverse", "random"]
CapacityScope = Literal["expert", "device"]
CapacityPhase = Literal["prefill", "decode", "both"]
TransportName = Literal["shm", "tcp", "distributed"]
LossChoice = Literal["wait", "reroute"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
DTYPES: tuple[str, ...] = get_args(DTypeName)
SCHEDULING_POLICIES: tuple[str, ...] = get_args(SchedulingPolicy)
CAPACITY_MODES: tuple[str, ...] = get_args(CapacityMode)
CAPACITY_METRICS: tuple[str, ...] = get_args(CapacityMetric)
CAPACITY_SCOPES: tuple[str, ...] = get_args(CapacityScope)
CAPACITY_PHASES: tuple[str, ...] = get_args(CapacityPhase)
TRANSPORTS: tuple[str, ...] = get_args(TransportName)
LOSS_CHOICES: tuple[str, ...] = get_args(LossChoice)
CPU_RIDGE_TOKENS, GPU_RIDGE_TOKENS = 32, 222
MAX_WAVES = 16
TELEMETRY_S = 1.0
MAX_NUM_SEQS = 65_536
MAX_BATCHED_TOKENS = 262_144


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Which workers there are.

    Ranks: attention workers first, then expert workers; a colocated worker is both.

    Attributes:
        attention_workers: A >= 1 (ignored if `colocated`).
        expert_workers: E >= 0; 0 means that the one attention worker holds the experts too.
        colocated: N >= 1 workers that hold attention (data-parallel) and a share of the experts; 0 is off.
        redundant_experts: experts of each layer that an expert worker holds beside its share, as replicas of hot ones.
        expert_load: path of a JSON file that says which are hot: [num_layers][num_experts] pairs; None: nobody knows.
        max_expert_workers: expert workers that there may be once others have been added to a running server; None: no
            more than at the start. Ranks, rings and tables are laid out for so many.
    """

    attention_workers: int = 1
    expert_workers: int = 0
    colocated: int = 0
    redundant_experts: int = 0
    expert_load: str | None = None
    max_expert_workers: int | None = None

    def __post_init__(self) -> None:
        _require(self.attention_workers >= 1, "--attention-workers must be at least 1")
        _require(self.expert_workers >= 0, "--expert-workers must be at least 0")
        _require(self.colocated >= 0, "--colocated must be at least 0")
        _require(
            not self.colocated or (self.attention_workers == 1 and self.expert_workers == 0),
            "--colocated excludes --attention-workers and --expert-workers: choose one placement",
        )
        _require(
            self.expert_workers > 0 or self.attention_workers == 1,
            "--attention-workers above 1 needs --expert-workers, or use --colocated N",
        )
        _require(self.redundant_experts >= 0, "--redundant-experts must be at least 0")
        _require(
            self.redundant_experts == 0 or len(self.expert_ranks) > 1,
            "--redundant-experts needs at least two workers that hold experts: replicas live at different ones",
        )
        _require(
            self.expert_load is None or self.redundant_experts > 0,
            "--expert-load says where --redundant-experts N go: give both",
        )
        _require(
            self.max_expert_workers is None or self.max_expert_workers >= self.expert_workers > 0,
            "--max-expert-workers must be at least --expert-workers, and goes with --expert-workers: a worker that "
            "holds attention as well is not added or removed while others serve",
        )

    @property
    def attention_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.colocated or self.attention_workers))

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        if self.colocated:
            return tuple(range(self.colocated))
        if self.expert_workers == 0:
            return (0,)
        return tuple(range(self.attention_workers, self.attention_workers + self.expert_workers))

    @property
    def num_workers(self) -> int:
        """Workers at the start."""
        return max(self.attention_ranks[-1], self.expert_ranks[-1]) + 1

    @property
    def owner_ranks(self) -> tuple[int, ...]:
        """Ranks that may ever hold experts: those of `expert_ranks`, and those of workers that may be added. The index
        of an *owner* is an index into them."""
        num_spare = (self.max_expert_workers or self.expert_workers) - self.expert_workers
        return self.expert_ranks + tuple(range(self.num_workers, self.num_workers + num_spare))

    @property
    def num_ranks(self) -> int:
        """Ranks that there may ever be."""
        return max(self.attention_ranks[-1], self.owner_ranks[-1]) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """What runs next, and how many sequences and tokens are in flight at one attention worker.

    Attributes:
        schedule: see `amoe.policy.scheduler`.
        defrag_decay, defrag_lookahead: δ and K of AMoE's Algorithm 1.
        max_wait_s: a block whose oldest token has waited longer runs next, whatever the policy says.
        max_hold_s: in `waves`, tokens that have waited longer for others go on without them. It is for workers that
            have stopped or died: far above the time of a step, or large batches are torn apart.
        num_waves: fixed number of `waves`; None: chosen by load and skew, up to `max_waves`.
        max_waves: of an automatic choice.
        micro_batches: 1 to 3, ping-pong micro-batches of `lockstep`.
        max_num_seqs: running sequences.
        max_num_batched_tokens: prompt tokens in flight, and so the largest prefill chunk.
        scheduling_policy: order in which waiting sequences are admitted, see `amoe.policy.admission.place_in_line`.
    """

    schedule: ScheduleName = "waves"
    defrag_decay: float = 0.8
    defrag_lookahead: int = 4
    max_wait_s: float = 0.5
    max_hold_s: float = 1.0
    num_waves: int | None = None
    max_waves: int = 8
    micro_batches: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    scheduling_policy: SchedulingPolicy = "fcfs"

    def __post_init__(self) -> None:
        _require(self.schedule in SCHEDULES, f"--schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        _require(0.0 <= self.defrag_decay <= 1.0, "--defrag-decay must be in [0, 1]")
        _require(self.defrag_lookahead >= 0, "--defrag-lookahead must be at least 0")
        _require(self.max_wait_s > 0, "--max-wait must be greater than 0 seconds")
        _require(self.max_hold_s > 0, "--max-hold must be greater than 0 seconds")
        _require(
            self.num_waves is None or 1 <= self.num_waves <= MAX_WAVES,
            f"--waves must be auto or a number from 1 to {MAX_WAVES}",
        )
        _require(self.num_waves is None or self.schedule == "waves", "--waves N is for --schedule waves")
        _require(1 <= self.max_waves <= MAX_WAVES, f"--max-waves must be from 1 to {MAX_WAVES}")
        _require(1 <= self.micro_batches <= 3, "--micro-batches must be 1, 2 or 3")
        _require(
            self.micro_batches == 1 or self.schedule == "lockstep",
            "--micro-batches above 1 is for --schedule lockstep: the other schedules have no barrier to overlap",
        )
        # Every buffer is allocated for the worst case, so an absurd size would fail far from its cause.
        _require(1 <= self.max_num_seqs <= MAX_NUM_SEQS, f"--max-num-seqs must be between 1 and {MAX_NUM_SEQS}")
        _require(
            1 <= self.max_num_batched_tokens <= MAX_BATCHED_TOKENS,
            f"--max-num-batched-tokens must be between 1 and {MAX_BATCHED_TOKENS}",
        )
        _require(
            self.scheduling_policy in SCHEDULING_POLICIES,
            f"--scheduling-policy must be one of {', '.join(SCHEDULING_POLICIES)}, not {self.scheduling_policy!r}",
        )

    @property
    def num_lanes(self) -> int:
        """Sets of μ-queues of a worker: one per wave, and in `waves` a last one for tokens that march alone."""
        if self.schedule == "waves":
            return (self.num_waves or self.max_waves) + 1
        return self.micro_batches if self.schedule == "lockstep" else 1

    @property
    def num_token_slots(self) -> int:
        """Tokens in flight at one attention worker: bounds every queue and every buffer."""
        return self.max_num_seqs + self.max_num_batched_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache of one attention worker.

    Attributes:
        block_size: tokens per block.
        num_blocks: blocks per attention worker; None derives it from `kv_cache_bytes`.
        kv_cache_bytes: bytes of KV cache per attention worker; None: a share of what is free, see
            `amoe.engine.memory`.
        enable_prefix_caching: full blocks of finished prompts are found again by their content.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "--block-size must be at least 1")
        _require(self.num_blocks is None or self.num_blocks >= 1, "--num-kv-blocks must be at least 1")
        _require(self.kv_cache_bytes is None or self.kv_cache_bytes >= 1, "--kv-cache-memory-bytes must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeringConfig:
    """How the engine follows what it measures: shares of replicas, and where new sequences go.

    Attributes:
        interval_s: seconds between plans; 0 is off.
        ridge_tokens: tokens of an expert in one batch below which reading its weights takes longer than computing;
            None: `CPU_RIDGE_TOKENS` or `GPU_RIDGE_TOKENS`, as the device is.
        rebalance_interval_s: seconds between looks at whether experts should move to other workers; 0 is off.
    """

    interval_s: float = 2.0
    ridge_tokens: int | None = None
    rebalance_interval_s: float = 0.0

    def __post_init__(self) -> None:
        _require(0.0 <= self.interval_s < float("inf"), "--steer-interval must be at least 0 seconds")
        _require(self.ridge_tokens is None or self.ridge_tokens >= 1, "--ridge-tokens must be at least 1")
        _require(
            self.rebalance_interval_s == 0.0 or 1.0 <= self.rebalance_interval_s < float("inf"),
            "--rebalance-interval must be 0 (off) or at least 1 second: loads are measured over seconds",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityConfig:
    """Whether, and how, (token, expert) pairs are dropped or rerouted; off by default, which is lossless.

    On as soon as there is a `factor` (a cap per micro-batch, `amoe.policy.capacity`) or a `slack_s` (a cap on waiting,
    `amoe.policy.backlog`).

    Attributes:
        factor: γ: an expert takes at most γ times its even share of a micro-batch's pairs.
        slack_s: a pair is touched where its worker is expected to answer later than all others of the token by more
            than this many seconds.
        mode: `drop`, `reroute` or `expanded`, see `amoe.policy.capacity`.
        metric: of `drop`: who stays.
        scope: the cap is each expert's, or on the sum of all experts of a worker.
        phase: prompt tokens, generated tokens, or both.
        keep_best: a token's best pair is never touched.
        exceed_top_k: of `expanded`: a token may end with more pairs than the model's top-k.
        spread_mass: where the model's router gives weights that sum to one, those of what a token keeps do again;
            otherwise each pair keeps its own, and what is lost stays lost.
        telemetry_s: what an expert worker told of its backlog is forgotten after so many seconds.
    """

    factor: float | None = None
    slack_s: float | None = None
    mode: CapacityMode = "drop"
    metric: CapacityMetric = "score"
    scope: CapacityScope = "expert"
    phase: CapacityPhase = "prefill"
    keep_best: bool = True
    exceed_top_k: bool = False
    spread_mass: bool = True
    telemetry_s: float = TELEMETRY_S

    def __post_init__(self) -> None:
        choices = {
            "mode": CAPACITY_MODES,
            "metric": CAPACITY_METRICS,
            "scope": CAPACITY_SCOPES,
            "phase": CAPACITY_PHASES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            _require(value in known, f"--capacity-{name} must be one of {', '.join(known)}, not {value!r}")
        _require(
            self.factor is None or 0 < self.factor < float("inf"), "--capacity-factor must be greater than 0, as in 1.5"
        )
        _require(
            self.slack_s is None or 0 <= self.slack_s < float("inf"), "--capacity-slack must be at least 0 seconds"
        )
        _require(self.telemetry_s > 0, "--capacity-telemetry must be greater than 0 seconds")
        _require(
            self.factor is None or self.slack_s is None,
            "--capacity-factor caps a batch, --capacity-slack caps waiting: choose one",
        )
        _require(
            self.slack_s is None or self.mode != "expanded",
            "--capacity-slack goes with --capacity-mode drop or reroute: expanded fills experts up to a cap",
        )
        _require(
            self.metric == "score" or (self.mode == "drop" and self.slack_s is None),
            "--capacity-metric is for --capacity-mode drop with --capacity-factor: the other ways go by score",
        )
        _require(
            self.slack_s is None or self.scope == "expert",
            "--capacity-scope is for --capacity-factor: a slack always looks at workers",
        )
        _require(
            self.slack_s is not None or self.telemetry_s == TELEMETRY_S,
            "--capacity-telemetry is for --capacity-slack: a factor needs no telemetry",
        )
        idle = (self.mode, self.phase, self.scope, self.keep_best, self.spread_mass)
        _require(
            self.is_on or idle == ("drop", "prefill", "expert", True, True),
            "the --capacity flags do nothing without --capacity-factor X or --capacity-slack SECONDS: add one of them",
        )
        _require(
            not self.exceed_top_k or self.mode == "expanded",
            "--capacity-exceed-top-k is for --capacity-mode expanded: the other modes add no pair",
        )

    @property
    def is_on(self) -> bool:
        return self.factor is not None or self.slack_s is not None

    def require_effect(self, top_k: int) -> None:
        """Refuse a capacity that could never take anything.

        Raises:
            ConfigError: the model gives each token one expert, which is its best.
        """
        _require(
            not self.is_on or top_k > 1 or not self.keep_best,
            "a capacity takes nothing from a model with one expert per token, unless it may take a token's best: "
            "add --no-capacity-keep-best, or leave the capacity away",
        )

    def pairs_per_token(self, top_k: int, num_experts: int) -> int:
        """P: columns of pairs in a dispatch. All have the same: batches meet in one queue."""
        return num_experts if self.is_on and self.exceed_top_k else top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureConfig:
    """What happens when a worker dies, hangs or is cut off.

    Attributes:
        timeout_s: a worker that gives no sign of life for so long is taken for dead, and so is one that answers nobody
            while it has nothing to do: its link is cut.
        on_expert_loss: tokens whose expert nobody holds at the moment `wait` until it is back, which costs time and
            nothing else; or they go on at once without it, as if it had no capacity (`reroute`): the pair goes to the
            token's best expert that is there, or is dropped, and the usage of the response says so.
        backoff_s, max_backoff_s: wait before a worker that has died again is started anew: doubled each time that it
            dies before it has lived for `max_backoff_s`.
        max_crashes: after so many deaths in a row the server is unhealthy; it goes on trying.
        warm_spare: keep a process that has imported everything and waits to take the place of a worker that dies.
    """

    timeout_s: float = 2.0
    on_expert_loss: LossChoice = "wait"
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_crashes: int = 5
    warm_spare: bool = False

    def __post_init__(self) -> None:
        _require(0.2 <= self.timeout_s < float("inf"), "--failure-timeout must be at least 0.2 seconds")
        _require(
            self.on_expert_loss in LOSS_CHOICES,
            f"--on-expert-loss must be one of {', '.join(LOSS_CHOICES)}, not {self.on_expert_loss!r}",
        )
        _require(0 < self.backoff_s <= self.max_backoff_s, "the backoff must be positive and at most its maximum")
        _require(self.max_crashes >= 1, "max_crashes must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig:
    """How many expert workers there are, as the load asks for.

    Attributes:
        min_workers, max_workers: bounds of their number.
        queue_age_s: tokens that wait longer for experts, for some time, ask for one more worker.
    """

    min_workers: int
    max_workers: int
    queue_age_s: float = 0.2

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_workers < self.max_workers,
            f"--autoscale-experts {self.min_workers}:{self.max_workers} must be MIN:MAX with 1 <= MIN < MAX",
        )
        _require(0 < self.queue_age_s < float("inf"), "--autoscale-queue-age must be greater than 0 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All that a worker needs to know to serve a model.

    Attributes:
        model: directory of a checkpoint in Hugging Face format.
        dtype: `auto` is the checkpoint's.
        device: a torch device, `cpu`, `cuda` or `cuda:1`; plain `cuda` spreads workers over the GPUs there are.
            `emulated:...` has no kernels, see `amoe.engine.emulated_device`.
        max_model_len: prompt + generated tokens of a sequence; None: what the model was trained for.
        threads_per_worker: intra-op threads; None: the cores divided by the workers, at least one.
        max_waiting: requests that may wait beside the running ones before the engine refuses.
        max_waiting_tokens: prompt tokens that may wait for their first answer; None: any number.
        max_queue_s: who would probably wait longer than this to be computed is refused; 0: nobody is for that.
        seed: base of the seeds of requests that bring none, and of random drops.
        transport: how workers exchange tokens: `shm` on one host, `tcp` (ZeroMQ) between hosts, `distributed`
            (torch.distributed point to point: NCCL between GPUs, gloo between CPUs).
        autoscale: None: the number of expert workers changes only when somebody asks for it.
    """

    model: str
    dtype: DTypeName = "auto"
    device: str = "cpu"
    max_model_len: int | None = None
    threads_per_worker: int | None = None
    max_waiting: int = 1024
    max_waiting_tokens: int | None = None
    max_queue_s: float = 60.0
    seed: int = 0
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    transport: TransportName = "shm"
    autoscale: AutoscaleConfig | None = None

    def __post_init__(self) -> None:
        _require(bool(self.model), "MODEL must name a checkpoint directory")
        _require(self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        _require(self.max_model_len is None or self.max_model_len >= 2, "--max-model-len must be at least 2")
        _require(
            self.threads_per_worker is None or self.threads_per_worker >= 1, "--threads-per-worker must be at least 1"
        )
        _require(self.max_waiting >= 0, "--max-waiting must be at least 0")
        _require(0 <= self.max_queue_s < float("inf"), "--max-queue-time must be a finite number of at least 0")
        _require(
            self.max_waiting_tokens is None or self.max_waiting_tokens >= 1, "--max-waiting-tokens must be at least 1"
        )
        _require(
            self.transport in TRANSPORTS,
            f"--transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}",
        )
        _require(
            not self.failure.warm_spare or self.survives_losses,
            "--warm-spare is for schedules that go on without a worker: lockstep does not",
        )
        self._check_lockstep()
        self._check_autoscale()

    def _check_lockstep(self) -> None:
        """In lockstep all wait for all: nobody can be missed, replaced or added while the others go on."""
        if self.survives_losses:
            return
        placement = self.placement
        for is_free, flag in (
            (self.failure.on_expert_loss == "wait", "--on-expert-loss reroute"),
            (placement.max_expert_workers in (None, placement.expert_workers), "--max-expert-workers"),
            (self.steering.rebalance_interval_s == 0.0, "--rebalance-interval"),
            (self.autoscale is None, "--autoscale-experts"),
        ):
            _require(is_free, f"{flag} needs workers that do not wait for each other: not --schedule lockstep")

    def _check_autoscale(self) -> None:
        scale, placement = self.autoscale, self.placement
        if scale is None:
            return
        _require(
            placement.expert_workers > 0,
            "--autoscale-experts goes with --expert-workers: a worker that holds attention as well is not added or "
            "removed while others serve",
        )
        most = placement.max_expert_workers or placement.expert_workers
        _require(
            scale.max_workers <= most,
            f"--autoscale-experts: up to {scale.max_workers} workers need --max-expert-workers {scale.max_workers} "
            f"(it is {most})",
        )
        _require(
            scale.min_workers <= placement.expert_workers <= scale.max_workers,
            f"--autoscale-experts: --expert-workers {placement.expert_workers}, with which the server starts, is not "
            f"between {scale.min_workers} and {scale.max_workers}",
        )

    @property
    def survives_losses(self) -> bool:
        """A worker may die and be replaced while the others go on. In lockstep they could not: all wait for all."""
        return self.scheduler.schedule != "lockstep"

    @property
    def may_degrade(self) -> bool:
        """Tokens may lose experts, by capacity or because nobody holds them."""
        return self.capacity.is_on or self.failure.on_expert_loss == "reroute"

    @property
    def ridge_tokens(self) -> int:
        """As configured, or what is usual on such a device."""
        is_cpu = self.device == "cpu" or ".json" in self.device  # an emulated one that was measured on a CPU
        usual = CPU_RIDGE_TOKENS if is_cpu else GPU_RIDGE_TOKENS
        return self.steering.ridge_tokens or usual
