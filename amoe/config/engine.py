"""All that a worker needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from amoe.config.capacity import CapacityConfig
from amoe.config.checks import require
from amoe.config.cluster import AutoscaleConfig, FailureConfig, SteeringConfig
from amoe.config.placement import PlacementConfig
from amoe.config.scheduling import CacheConfig, ScheduleName, SchedulerConfig

DTypeName = Literal["auto", "float32", "bfloat16"]
TransportName = Literal["shm", "tcp", "distributed"]
KernelsName = Literal["auto", "native", "torch"]
QuantizationName = Literal["int8"]
DTYPES: tuple[str, ...] = get_args(DTypeName)
TRANSPORTS: tuple[str, ...] = get_args(TransportName)
KERNELS: tuple[str, ...] = get_args(KernelsName)
QUANTIZATIONS: tuple[str, ...] = get_args(QuantizationName)
CPU_RIDGE_TOKENS, GPU_RIDGE_TOKENS = 32, 222


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All that a worker needs to know to serve a model.

    Attributes:
        model: directory of a checkpoint in Hugging Face format.
        dtype: `auto` is the checkpoint's.
        device: a torch device, `cpu`, `cuda` or `cuda:1`; plain `cuda` spreads workers over the GPUs there are.
            `emulated:...` has no kernels, see `amoe.engine.emulated_device`.
        kernels: `native` are our own for CPUs, `torch` run anywhere; `auto`: native where they serve.
        quantization: `int8` keeps the weights of experts, projections and LM head in 8 bits; native kernels only.
        max_model_len: prompt + generated tokens of a sequence; None: what the model was trained for.
        threads_per_worker: intra-op threads; None: the cores divided by the workers, at least one.
        cpu_sets: the CPUs that each worker keeps to, by rank; those that are not named run on any.
        max_waiting: requests that may wait beside the running ones before the engine refuses.
        max_waiting_tokens: prompt tokens that may wait for their first answer; None: any number.
        max_queue_s: who would probably wait longer than this to be computed is refused; 0: nobody is for that.
        seed: base of the seeds of requests that bring none, and of random drops.
        scheduler: as given, but for the schedule `auto`, in the place of which stands what it has come to.
        transport: how workers exchange tokens: `shm` on one host, `tcp` (ZeroMQ) between hosts, `distributed`
            (torch.distributed point to point: NCCL between GPUs, gloo between CPUs).
        autoscale: None: the number of expert workers changes only when somebody asks for it.
    """

    model: str
    dtype: DTypeName = "auto"
    device: str = "cpu"
    kernels: KernelsName = "auto"
    quantization: QuantizationName | None = None
    max_model_len: int | None = None
    threads_per_worker: int | None = None
    cpu_sets: tuple[tuple[int, ...], ...] = ()
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
        require(bool(self.model), "MODEL must name a checkpoint directory")
        require(self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        require(self.kernels in KERNELS, f"--kernels must be one of {', '.join(KERNELS)}, not {self.kernels!r}")
        require(
            self.quantization is None or self.quantization in QUANTIZATIONS,
            f"--quantization must be {' or '.join(QUANTIZATIONS)}, not {self.quantization!r}",
        )
        require(
            self.quantization is None or self.kernels != "torch",
            "--quantization needs the native kernels: not --kernels torch",
        )
        require(
            self.quantization is None or self.device == "cpu",
            f"--quantization {self.quantization} is for --device cpu, not {self.device}",
        )
        require(self.max_model_len is None or self.max_model_len >= 2, "--max-model-len must be at least 2")
        require(
            self.threads_per_worker is None or self.threads_per_worker >= 1, "--threads-per-worker must be at least 1"
        )
        require(self.max_waiting >= 0, "--max-waiting must be at least 0")
        require(0 <= self.max_queue_s < float("inf"), "--max-queue-time must be a finite number of at least 0")
        require(
            self.max_waiting_tokens is None or self.max_waiting_tokens >= 1, "--max-waiting-tokens must be at least 1"
        )
        require(
            self.transport in TRANSPORTS,
            f"--transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}",
        )
        require(
            not self.failure.warm_spare or self.survives_losses,
            "--warm-spare is for schedules that go on without a worker: lockstep does not",
        )
        self._check_lockstep()
        self._check_autoscale()
        self._settle_schedule()

    def _settle_schedule(self) -> None:
        """Put what `auto` comes to in its place, once: everybody who reads the configuration sees the same schedule."""
        if self.scheduler.schedule == "auto":
            chosen: ScheduleName = "waves" if self._hindrance or self.scheduler.num_waves is not None else "forward"
            object.__setattr__(self, "scheduler", replace(self.scheduler, schedule=chosen))
        elif self.scheduler.schedule == "forward":
            require(not self._hindrance, f"--schedule forward {self._hindrance}; leave --schedule away, or use waves")

    @property
    def _hindrance(self) -> str:
        """Why an iteration cannot be one step; "" if it can."""
        if self.placement.num_ranks > 1:
            return "is for one worker that holds the whole model"
        if self.device.startswith("emulated:"):
            return "is not emulated: an emulated device takes the time of single blocks"
        if self.capacity.is_on:
            return "drops and reroutes nothing, and so goes without --capacity-factor and --capacity-slack"
        if self.failure.on_expert_loss == "reroute":
            return "knows no expert that is missing, and so goes without --on-expert-loss reroute"
        return ""

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
            require(is_free, f"{flag} needs workers that do not wait for each other: not --schedule lockstep")

    def _check_autoscale(self) -> None:
        scale, placement = self.autoscale, self.placement
        if scale is None:
            return
        require(
            placement.expert_workers > 0,
            "--autoscale-experts goes with --expert-workers: a worker that holds attention as well is not added or "
            "removed while others serve",
        )
        most = placement.max_expert_workers or placement.expert_workers
        require(
            scale.max_workers <= most,
            f"--autoscale-experts: up to {scale.max_workers} workers need --max-expert-workers {scale.max_workers} "
            f"(it is {most})",
        )
        require(
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
