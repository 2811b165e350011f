"""What a virtual cluster is asked to do: all that a run depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from amoe.config import CacheConfig, CapacityConfig, FailureConfig, PlacementConfig, SchedulerConfig
from amoe.policy.placement import place_experts, replicate_experts
from amoe.types import SamplingParams
from tests.unit.core.fake_model import ModelSpec

PATIENT = 1e9  # seconds that no run lasts: whoever waits so long waits for ever


@dataclass(frozen=True)
class Request:
    """One request of a scenario; `arrive` and `abort` are turns of the adversary.

    Attributes:
        exact: its tokens must be the oracle's. Others may lose pairs where the scenario has a capacity.
        scored: the log-probabilities of its prompt are wanted.
        routed: the experts of its tokens are wanted.
        sibling_of: an earlier request with the same prompt at the same home.
    """

    request_id: int
    home: int
    prompt: tuple[int, ...]
    max_tokens: int
    arrive: int = 0
    abort: int | None = None
    exact: bool = True
    scored: bool = False
    routed: bool = False
    priority: int = 0
    salt: str = ""
    sibling_of: int | None = None

    @property
    def params(self) -> SamplingParams:
        spans = () if self.exact or len(self.prompt) < 3 else ((1, 3),)
        choice = "exact" if self.exact else "best_effort"
        return SamplingParams(
            max_tokens=self.max_tokens,
            prompt_logprobs=0 if self.scored else None,
            capacity=choice,
            droppable_spans=spans,
            priority=self.priority,
            cache_salt=self.salt,
            return_routed_experts=self.routed,
        )


@dataclass(frozen=True)
class Scenario:
    """All that a run depends on: the same scenario gives the same run.

    Attributes:
        spare_blocks: KV blocks beyond those that the longest request needs.
        duplicates: share of DISPATCH and RESULT batches between workers that are delivered twice.
        restless: the number of waves changes after every iteration.
        spare_slots: experts of each layer that an expert worker holds as replicas.
        fickle: the shares of the replicas change at any time, and each home has its own.
        stopped: (rank, turn) of a worker that stops as a process does.
        resumes: turn at which it goes on; None: when nothing else moves any more.
        capacity: what may be taken from requests that are not exact.
        failure: what becomes of tokens whose worker is gone.
        faults: (turn, what, number) of what befalls the cluster, see `tests.unit.core.chaos`.
        loss: share of DISPATCH and RESULT batches between workers that are lost on their way.
    """

    requests: tuple[Request, ...]
    spec: ModelSpec = field(default_factory=lambda: ModelSpec((True, True), 2, (0,) * 4))
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(block_size=4))
    spare_blocks: int = 100
    duplicates: float = 0.0
    restless: bool = False
    spare_slots: int = 0
    fickle: bool = False
    stopped: tuple[int, int] | None = None
    resumes: int | None = None
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    faults: tuple[tuple[int, str, int], ...] = ()
    loss: float = 0.0
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        return max(len(request.prompt) + request.max_tokens for request in self.requests)

    @property
    def admits_in_order(self) -> bool:
        """Nobody who waits is overtaken."""
        # Who has lost his home goes first at the next one.
        by_arrival = self.scheduler.scheduling_policy == "fcfs" and not self.faults
        return by_arrival and all(request.sibling_of is None for request in self.requests)

    @property
    def num_blocks(self) -> int:
        return -(-self.max_model_len // self.cache.block_size) + self.spare_blocks

    def owners(self):
        """[L, E, R] where experts and replicas live: replicas of the experts to which the router leans."""
        num_owners, num_experts = len(self.placement.expert_ranks), self.spec.num_experts
        if self.spare_slots == 0:
            return place_experts(self.spec.num_layers, num_experts, num_owners)
        load = np.tile(np.asarray(self.spec.bias, np.float64) + 1, (self.spec.num_layers, 1))
        return replicate_experts(load, num_owners, -(-num_experts // num_owners) + self.spare_slots)


def random_shares(owners, rng):
    """[L, E, R]: all at one replica, at some, or at all of them, by halves and by odd numbers."""
    exists = owners >= 0
    shares = np.where(exists, rng.choice([0.0, 0.0, 1.0, 1.0, 0.1, rng.random()], owners.shape), 0.0)
    shares[..., 0] += shares.sum(axis=-1) == 0
    return shares / shares.sum(axis=-1, keepdims=True)
