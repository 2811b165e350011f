"""What runs next, and how much is in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amoe.config.checks import require

ScheduleName = Literal["auto", "forward", "fcfs", "flfs", "mtfs", "defrag", "progress", "waves", "lockstep"]
SchedulingPolicy = Literal["fcfs", "priority"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
# Those in which blocks run one by one, on tokens from μ-queues.
BLOCK_SCHEDULES: tuple[str, ...] = tuple(name for name in SCHEDULES if name not in ("auto", "forward"))
SCHEDULING_POLICIES: tuple[str, ...] = get_args(SchedulingPolicy)
MAX_WAVES = 16
MAX_NUM_SEQS = 65_536
MAX_BATCHED_TOKENS = 262_144


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """What runs next, and how many sequences and tokens are in flight at one attention worker.

    Attributes:
        schedule: `forward`: one worker holds the whole model, and an iteration is one step through all its layers. The
            others run block by block, see `amoe.policy.scheduler`. `auto`: `forward` where that can be, else `waves`;
            an `EngineConfig` never has it, because it chooses.
        defrag_decay, defrag_lookahead: δ and K of AMoE's Algorithm 1.
        max_wait_s: a block whose oldest token has waited longer runs next, whatever the policy says.
        max_hold_s: in `waves`, tokens that have waited longer for others go on without them. It is for workers that
            have stopped or died: far above the time of a step, or large batches are torn apart.
        num_waves: fixed number of `waves`; None: chosen by load and skew, up to `max_waves`.
        max_waves: of an automatic choice.
        micro_batches: 1 to 3, ping-pong micro-batches of `lockstep`.
        max_num_seqs: running sequences.
        max_num_batched_tokens: prompt tokens in flight, and so the largest prefill chunk; in `forward`, fewer where
            others decode, see `amoe.policy.prompt_budget`.
        scheduling_policy: order in which waiting sequences are admitted, see `amoe.policy.admission.place_in_line`.
    """

    schedule: ScheduleName = "auto"
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
        require(self.schedule in SCHEDULES, f"--schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        require(0.0 <= self.defrag_decay <= 1.0, "--defrag-decay must be in [0, 1]")
        require(self.defrag_lookahead >= 0, "--defrag-lookahead must be at least 0")
        require(self.max_wait_s > 0, "--max-wait must be greater than 0 seconds")
        require(self.max_hold_s > 0, "--max-hold must be greater than 0 seconds")
        require(
            self.num_waves is None or 1 <= self.num_waves <= MAX_WAVES,
            f"--waves must be auto or a number from 1 to {MAX_WAVES}",
        )
        require(self.num_waves is None or self.schedule in ("auto", "waves"), "--waves N is for --schedule waves")
        require(1 <= self.max_waves <= MAX_WAVES, f"--max-waves must be from 1 to {MAX_WAVES}")
        require(1 <= self.micro_batches <= 3, "--micro-batches must be 1, 2 or 3")
        require(
            self.micro_batches == 1 or self.schedule == "lockstep",
            "--micro-batches above 1 is for --schedule lockstep: the other schedules have no barrier to overlap",
        )
        # Every buffer is allocated for the worst case, so an absurd size would fail far from its cause.
        require(1 <= self.max_num_seqs <= MAX_NUM_SEQS, f"--max-num-seqs must be between 1 and {MAX_NUM_SEQS}")
        require(
            1 <= self.max_num_batched_tokens <= MAX_BATCHED_TOKENS,
            f"--max-num-batched-tokens must be between 1 and {MAX_BATCHED_TOKENS}",
        )
        require(
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
        require(self.block_size >= 1, "--block-size must be at least 1")
        require(self.num_blocks is None or self.num_blocks >= 1, "--num-kv-blocks must be at least 1")
        require(self.kv_cache_bytes is None or self.kv_cache_bytes >= 1, "--kv-cache-memory-bytes must be positive")
