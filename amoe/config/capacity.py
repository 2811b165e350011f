"""Which (token, expert) pairs may be dropped or rerouted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amoe.config.checks import require

CapacityMode = Literal["drop", "reroute", "expanded"]
CapacityMetric = Literal["score", "order", "reverse", "random"]
CapacityScope = Literal["expert", "device"]
CapacityPhase = Literal["prefill", "decode", "both"]
CAPACITY_MODES: tuple[str, ...] = get_args(CapacityMode)
CAPACITY_METRICS: tuple[str, ...] = get_args(CapacityMetric)
CAPACITY_SCOPES: tuple[str, ...] = get_args(CapacityScope)
CAPACITY_PHASES: tuple[str, ...] = get_args(CapacityPhase)
TELEMETRY_S = 1.0


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
            require(value in known, f"--capacity-{name} must be one of {', '.join(known)}, not {value!r}")
        require(
            self.factor is None or 0 < self.factor < float("inf"), "--capacity-factor must be greater than 0, as in 1.5"
        )
        require(self.slack_s is None or 0 <= self.slack_s < float("inf"), "--capacity-slack must be at least 0 seconds")
        require(self.telemetry_s > 0, "--capacity-telemetry must be greater than 0 seconds")
        require(
            self.factor is None or self.slack_s is None,
            "--capacity-factor caps a batch, --capacity-slack caps waiting: choose one",
        )
        require(
            self.slack_s is None or self.mode != "expanded",
            "--capacity-slack goes with --capacity-mode drop or reroute: expanded fills experts up to a cap",
        )
        require(
            self.metric == "score" or (self.mode == "drop" and self.slack_s is None),
            "--capacity-metric is for --capacity-mode drop with --capacity-factor: the other ways go by score",
        )
        require(
            self.slack_s is None or self.scope == "expert",
            "--capacity-scope is for --capacity-factor: a slack always looks at workers",
        )
        require(
            self.slack_s is not None or self.telemetry_s == TELEMETRY_S,
            "--capacity-telemetry is for --capacity-slack: a factor needs no telemetry",
        )
        idle = (self.mode, self.phase, self.scope, self.keep_best, self.spread_mass)
        require(
            self.is_on or idle == ("drop", "prefill", "expert", True, True),
            "the --capacity flags do nothing without --capacity-factor X or --capacity-slack SECONDS: add one of them",
        )
        require(
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
        require(
            not self.is_on or top_k > 1 or not self.keep_best,
            "a capacity takes nothing from a model with one expert per token, unless it may take a token's best: "
            "add --no-capacity-keep-best, or leave the capacity away",
        )

    def pairs_per_token(self, top_k: int, num_experts: int) -> int:
        """P: columns of pairs in a dispatch. All have the same: batches meet in one queue."""
        return num_experts if self.is_on and self.exceed_top_k else top_k
