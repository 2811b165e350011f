"""Which workers there are."""

from __future__ import annotations

from dataclasses import dataclass

from amoe.config.checks import require

MAX_RANKS = 1024  # rings, tables and descriptors grow with it, rings with its square


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
        require(self.attention_workers >= 1, "--attention-workers must be at least 1")
        require(self.expert_workers >= 0, "--expert-workers must be at least 0")
        require(self.colocated >= 0, "--colocated must be at least 0")
        require(
            not self.colocated or (self.attention_workers == 1 and self.expert_workers == 0),
            "--colocated excludes --attention-workers and --expert-workers: choose one placement",
        )
        require(
            self.expert_workers > 0 or self.attention_workers == 1,
            "--attention-workers above 1 needs --expert-workers, or use --colocated N",
        )
        require(self.redundant_experts >= 0, "--redundant-experts must be at least 0")
        require(
            self.redundant_experts == 0 or len(self.expert_ranks) > 1,
            "--redundant-experts needs at least two workers that hold experts: replicas live at different ones",
        )
        require(
            self.expert_load is None or self.redundant_experts > 0,
            "--expert-load says where --redundant-experts N go: give both",
        )
        require(
            self.max_expert_workers is None or self.expert_workers > 0,
            "--max-expert-workers goes with --expert-workers N: a worker that holds attention as well is not added or "
            "removed while others serve",
        )
        require(
            self.max_expert_workers is None or self.max_expert_workers >= self.expert_workers,
            f"--max-expert-workers must be at least --expert-workers: {self.max_expert_workers} is less than "
            f"{self.expert_workers}",
        )
        require(
            self.num_ranks <= MAX_RANKS,
            f"there can be at most {MAX_RANKS} workers, those of --max-expert-workers included, not {self.num_ranks}",
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
