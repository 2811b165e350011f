"""The cases of the token-exactness tests, and transformers' answers to them."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoe.builtin import builtin_model_path
from amoe.config import BLOCK_SCHEDULES, CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.kernels import native
from amoe.types import SamplingParams
from tests.checkpoints import ARCHES, Greedy, hf_greedy, make_checkpoint
from tests.pairwise import all_combinations

BUILTIN = "builtin"
PLACEMENTS = {
    "1": PlacementConfig(),
    "colocated2": PlacementConfig(colocated=2),
    "1A1E": PlacementConfig(expert_workers=1),
    "2A2E": PlacementConfig(attention_workers=2, expert_workers=2),
}
# Micro-batches of lockstep, or waves (0: automatic); other schedules have one case only.
COUNTS = (0, 2, 3, 1)
# `cached` runs every prompt twice, `preempted` leaves too few KV blocks for all of them.
FEATURES = ("plain", "cached", "preempted", "cached+preempted")
# Odd sizes; every variant has its own seed. Dense layers where the architecture knows them.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{}, {"num_local_experts": 5, "num_experts_per_tok": 1}, {"num_hidden_layers": 3}],
    "olmoe": [{}, {"num_experts": 9, "num_experts_per_tok": 4}, {"norm_topk_prob": True, "clip_qkv": 1.5}],
    "qwen2_moe": [{}, {"num_hidden_layers": 3, "decoder_sparse_step": 2}, {"num_experts_per_tok": 2}],
    "qwen3_moe": [{}, {"num_hidden_layers": 3, "mlp_only_layers": [1]}, {"norm_topk_prob": True}],
    BUILTIN: [{}, {}, {}],
}
# Spare slots of each expert worker, and shares that change all the time; none where one worker holds all experts.
REPLICAS = (2, 0)
# On a processor whose vectors the native ones do not know they are slow, and have to be right all the same.
KERNELS = ("native", "torch") if native.is_available() else ("torch",)
NUM_PROMPTS = 10
NUM_NEW = 12
BLOCK_SIZE = 4

FACTORS: dict[str, Any] = {
    "schedule": BLOCK_SCHEDULES,
    "count": COUNTS,
    "arch": [*ARCHES, BUILTIN],
    "placement": list(PLACEMENTS),
    "feature": FEATURES,
    "variant": [0, 1, 2],
    "replicas": REPLICAS,
    "kernels": KERNELS,
}
# The schedule of one worker that holds the whole model.
FORWARD: dict[str, Any] = {**FACTORS, "schedule": ("forward",), "count": (1,), "placement": ("1",), "replicas": (0,)}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    schedule: str
    count: int
    arch: str
    placement: str
    feature: str
    variant: int
    replicas: int = 0
    kernels: str = "auto"

    def __str__(self) -> str:
        replicas = f"-r{self.replicas}" if self.replicas else ""
        model = f"{self.arch}{self.variant}-{self.kernels}"
        return f"{model}-{self.schedule}{self.count}-{self.placement}-{self.feature}{replicas}"

    def config(self, path: Path) -> EngineConfig:
        """Small budgets, so that prompts are chunked and sequences wait for each other."""
        longest = max(len(prompt) for prompt in self.prompts) + NUM_NEW
        homes = len(PLACEMENTS[self.placement].attention_ranks)
        num_blocks = 400
        if "preempted" in self.feature:  # the longest sequence fits, all sequences of a home do not
            blocks = sum(-(-(len(prompt) + NUM_NEW) // BLOCK_SIZE) for prompt in self.prompts)
            num_blocks = max(-(-longest // BLOCK_SIZE), blocks // homes // 3)
        return EngineConfig(
            model=str(path),
            dtype="float32",
            kernels=self.kernels,
            threads_per_worker=1,
            max_model_len=longest,
            placement=replace(PLACEMENTS[self.placement], redundant_experts=self.replicas),
            scheduler=SchedulerConfig(
                schedule=self.schedule,
                micro_batches=self.count if self.schedule == "lockstep" else 1,
                num_waves=(self.count or None) if self.schedule == "waves" else None,
                max_num_seqs=6,
                max_num_batched_tokens=24,
            ),
            cache=CacheConfig(
                block_size=BLOCK_SIZE, num_blocks=num_blocks, enable_prefix_caching="cached" in self.feature
            ),
        )

    @property
    def has_several_owners(self) -> bool:
        """More than one worker holds experts."""
        return len(PLACEMENTS[self.placement].expert_ranks) > 1

    @property
    def prompts(self) -> list[list[int]]:
        """Mixed lengths, some with a common beginning."""
        return make_prompts(self.arch, self.variant)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=1)


def make_cases(rows: list[dict[str, Any]]) -> list[Case]:
    """The cases of rows of the matrix, each once."""
    least = {"waves": 0, "lockstep": 1}
    counts = [max(row["count"], least[row["schedule"]]) if row["schedule"] in least else 1 for row in rows]
    cases = [Case(**{**row, "count": count}) for row, count in zip(rows, counts, strict=True)]
    return list(dict.fromkeys(case if case.has_several_owners else replace(case, replicas=0) for case in cases))


def whole_matrix() -> list[Case]:
    """All combinations, every other one with replicas, and of each two of these one with either kernels."""
    rows = all_combinations({name: values for name, values in FACTORS.items() if name not in ("replicas", "kernels")})
    blocks = [
        {**row, "replicas": REPLICAS[index % 2], "kernels": KERNELS[index // 2 % len(KERNELS)]}
        for index, row in enumerate(rows)
    ]
    return make_cases([*blocks, *all_combinations(FORWARD)])


@functools.cache
def make_prompts(arch: str, variant: int) -> list[list[int]]:
    rng = random.Random(f"{arch}{variant}")
    if arch == BUILTIN:
        return _source_prompts(rng)
    common = [rng.randrange(3, 101) for _ in range(11)]
    lengths = [1, 2, 5, 9, 17, 23, 31, 40, 12, 13]
    bodies = [[rng.randrange(3, 101) for _ in range(length)] for length in lengths]
    return [common + body if index % 3 == 0 else body for index, body in enumerate(bodies)]


def _source_prompts(rng: random.Random) -> list[list[int]]:
    from tokenizers import Tokenizer

    text = Path(random.__file__).read_text()
    tokenizer = Tokenizer.from_file(str(builtin_model_path() / "tokenizer.json"))
    starts = [rng.randrange(len(text) - 400) for _ in range(NUM_PROMPTS)]
    prompts = [tokenizer.encode(text[start : start + rng.randrange(10, 150)]).ids for start in starts]
    prompts[4] = prompts[3] + prompts[4]
    return prompts


@functools.cache
def checkpoint(root: Path, arch: str, variant: int) -> Path:
    """The checkpoint of a case, made once."""
    if arch == BUILTIN:
        return builtin_model_path()
    return make_checkpoint(root / f"{arch}{variant}", arch, seed=variant, **VARIANTS[arch][variant])


@functools.cache
def expected(root: Path, arch: str, variant: int) -> list[Greedy]:
    """transformers' greedy continuations of the case's prompts, each alone, in float32."""
    return hf_greedy(checkpoint(root, arch, variant), make_prompts(arch, variant), NUM_NEW)


def assert_exact(case: Case, root: Path, token_ids: list[list[int]], logprobs: list[list[float]]) -> None:
    """Tokens equal transformers' one for one, log-probabilities within 1e-4."""
    for number, reference in enumerate(expected(root, case.arch, case.variant)):
        assert token_ids[number] == reference.token_ids, f"{case}, prompt {number}"
        worst = max(abs(a - b) for a, b in zip(logprobs[number], reference.logprobs, strict=True))
        assert worst < 1e-4, f"{case}, prompt {number}: log-probabilities differ by {worst}"
