"""How the engine follows what it measures, what happens when a worker is lost, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amoe.config.checks import require

LossChoice = Literal["wait", "reroute"]
LOSS_CHOICES: tuple[str, ...] = get_args(LossChoice)


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeringConfig:
    """How the engine follows what it measures: shares of replicas, and where new sequences go.

    Attributes:
        interval_s: seconds between plans; 0 is off, and all pairs go to the first replica of their expert then. In
            between each home relieves workers that answer late (`amoe.policy.relief`).
        ridge_tokens: tokens of an expert in one batch below which reading its weights takes longer than computing;
            None: `CPU_RIDGE_TOKENS` or `GPU_RIDGE_TOKENS`, as the device is.
        rebalance_interval_s: seconds between looks at whether experts should move to other workers; 0 is off.
    """

    interval_s: float = 2.0
    ridge_tokens: int | None = None
    rebalance_interval_s: float = 0.0

    def __post_init__(self) -> None:
        require(0.0 <= self.interval_s < float("inf"), "--steer-interval must be at least 0 seconds")
        require(self.ridge_tokens is None or self.ridge_tokens >= 1, "--ridge-tokens must be at least 1")
        require(
            self.rebalance_interval_s == 0.0 or 1.0 <= self.rebalance_interval_s < float("inf"),
            "--rebalance-interval must be 0 (off) or at least 1 second: loads are measured over seconds",
        )


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
        require(0.2 <= self.timeout_s < float("inf"), "--failure-timeout must be at least 0.2 seconds")
        require(
            self.on_expert_loss in LOSS_CHOICES,
            f"--on-expert-loss must be one of {', '.join(LOSS_CHOICES)}, not {self.on_expert_loss!r}",
        )
        require(0 < self.backoff_s <= self.max_backoff_s, "the backoff must be positive and at most its maximum")
        require(self.max_crashes >= 1, "max_crashes must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig:
    """How many expert workers there are, as the load asks for.

    Attributes:
        min_workers, max_workers: bounds of their number.
        queue_age_s: tokens that wait longer for others at an expert worker, at each layer, ask for one more; None: a
            part of the time that a layer takes them, see `amoe.policy.autoscaling`.
    """

    min_workers: int
    max_workers: int
    queue_age_s: float | None = None

    def __post_init__(self) -> None:
        require(
            1 <= self.min_workers < self.max_workers,
            f"--autoscale-experts {self.min_workers}:{self.max_workers} must be MIN:MAX with 1 <= MIN < MAX",
        )
        require(
            self.queue_age_s is None or 0 < self.queue_age_s < float("inf"),
            "--autoscale-queue-age must be greater than 0 seconds",
        )
