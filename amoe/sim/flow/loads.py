"""How many tokens go where in each iteration, and how long every block then takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from amoe.policy.replicas import even_shares, level, owner_seconds, plan_layers, primary_shares, split_counts
from amoe.sim.flow.deployment import Deployment
from amoe.types import Int16Array, Int64Array

FloatArray = npt.NDArray[np.float64]

ReplicaMode = Literal["primary", "even", "plan", "level-batch", "level-home"]
"""How tokens are divided among replicas.

    primary      no replicas
    even         the same share for each: EPLB
    plan         shares planned from the load as measured (`policy.replicas.plan_layers`)
    level-batch  water-filled for each batch with everybody's counts known at no cost: as LLEP, and better
    level-home   water-filled by each home for its own tokens alone
"""


@dataclass(frozen=True)
class LayerLoad:
    """One MoE layer in one iteration.

    Attributes:
        rows: [A, W, D] rows that travel from a home to an owner, and back.
        seconds: [W, D] time of the experts block.
        active: [W, D] the owner has anything to do.
    """

    rows: FloatArray
    seconds: FloatArray
    active: npt.NDArray[np.bool_]


class Loads:
    """Draws of `num_draws` iterations, which repeat; computed when first asked for.

    A home's wave sends multinomial counts of pairs by the popularity of experts. Against a draw without replacement
    per token this has the same mean and a little more variance for the hottest experts.

    Args:
        popularity: [L, E] what is drawn from; rows sum to one.
        owners: [L, E, R] the placement.
        measured: [L, E] popularity that `plan` believes in; None: the true one.
        tokens: [A, W] of `Deployment.tokens`.
        coupling: of layers, see `plan_layers`.
        shares: [L, E, R] planned before; None: to be planned.
    """

    def __init__(
        self,
        deployment: Deployment,
        popularity: FloatArray,
        owners: Int16Array,
        mode: ReplicaMode,
        tokens: Int64Array,
        *,
        num_draws: int = 6,
        seed: int = 0,
        measured: FloatArray | None = None,
        coupling: float = 0.0,
        shares: FloatArray | None = None,
    ) -> None:
        self.deployment = deployment
        self.tokens = tokens
        self.num_draws = num_draws
        self._popularity = popularity
        self._measured = popularity if measured is None else measured
        self._owners = owners
        self._mode = mode
        self._seed = seed
        self._costs = deployment.costs()
        self._slow = deployment.slowdown
        self._coupling = coupling
        self._layers: dict[tuple[int, int], LayerLoad] = {}
        sizes, device = deployment.sizes, deployment.device
        self._per_token_s = 2 * sizes.expert_params / device.flops
        self._reading_s = sizes.expert_bytes / device.bandwidth
        self.shares = self._plan() if shares is None else shares

    def redrawn(self, seed: int) -> Loads:
        """The same with other draws."""
        return Loads(
            self.deployment,
            self._popularity,
            self._owners,
            self._mode,
            self.tokens,
            num_draws=self.num_draws,
            seed=seed,
            shares=self.shares,
        )

    def attention(self) -> FloatArray:
        """[L, A, W] seconds of attention blocks, without any for a wave that has no tokens."""
        deployment, homes = self.deployment, list(self.deployment.homes)
        times = np.zeros((deployment.sizes.num_layers, *self.tokens.shape))
        known: dict[tuple[int, int], float] = {}
        for layer in range(deployment.sizes.num_layers):
            kind = min(layer, deployment.sizes.num_dense_layers)
            for home, wave in np.ndindex(*self.tokens.shape):
                count = int(self.tokens[home, wave])
                if (kind, count) not in known:
                    known[kind, count] = self._costs.attention(layer, count, count * deployment.context)
                times[layer, home, wave] = known[kind, count]
        return times * self._slow[homes][None, :, None]

    def head(self) -> FloatArray:
        """[A, W] seconds."""
        times = np.array([[self._costs.head(int(count)) for count in home] for home in self.tokens])
        return times * self._slow[list(self.deployment.homes)][:, None]

    def layer(self, iteration: int, layer: int) -> LayerLoad:
        """An MoE layer in an iteration."""
        key = (iteration % self.num_draws, layer)
        if key not in self._layers:
            self._layers[key] = self._draw(*key)
        return self._layers[key]

    def _draw(self, draw: int, layer: int) -> LayerLoad:
        top_k = self.deployment.sizes.top_k
        rng = np.random.default_rng((self._seed, draw, layer))
        counts = rng.multinomial(self.tokens * top_k, self._popularity[layer])  # [A, W, E]
        parts = self._split(counts, layer, rng)  # [A, W, E, R]
        total = parts.sum(axis=0)
        num_owners = len(self.deployment.owners)
        held = np.zeros((*total.shape[:1], num_owners, counts.shape[-1]))  # [W, D, E]
        pairs = np.zeros((*counts.shape[:2], num_owners))
        for replica in range(self._owners.shape[-1]):
            places = self._owners[layer, :, replica]
            experts = np.flatnonzero(places >= 0)
            held[:, places[experts], experts] += total[:, experts, replica]
            np.add.at(pairs, np.s_[:, :, places[experts]], parts[:, :, experts, replica])  # type: ignore[arg-type]
        slow = self._slow[list(self.deployment.owners)]
        seconds = self._costs.experts(layer, held) * slow
        return LayerLoad(self._rows(pairs), seconds, held.sum(axis=-1) > 0)

    def _rows(self, pairs: FloatArray) -> FloatArray:
        """[A, W, D] rows: a token with several experts at one owner travels once. Expected, for independent experts."""
        top_k = self.deployment.sizes.top_k
        if top_k == 1:
            return pairs
        tokens = np.maximum(self.tokens, 1)[..., None]
        share = np.minimum(pairs / (tokens * top_k), 1.0)
        return np.minimum(tokens * (1 - (1 - share) ** top_k), pairs)

    def _split(self, counts: Int64Array, layer: int, rng: np.random.Generator) -> FloatArray:
        owners = self._owners[layer]
        if self._mode.startswith("level"):
            return self._level(counts, owners)
        return split_counts(counts, self.shares[layer], rng.random(counts.shape)).astype(np.float64)

    def _expected(self) -> FloatArray:
        """[L, E] pairs of one wave of all homes together."""
        per_wave = self.deployment.num_sequences * self.deployment.sizes.top_k / self.tokens.shape[1]
        return self._measured * per_wave

    def _plan(self) -> FloatArray:
        """[L, E, R]."""
        if self._mode == "primary":
            return primary_shares(self._owners)
        if self._mode != "plan":
            return even_shares(self._owners)
        speed = self.deployment.owner_speed
        times = (self._per_token_s, self._reading_s)
        return plan_layers(self._expected(), self._owners, *times, speed, self._coupling)

    def expected_seconds(self) -> FloatArray:
        """[L, D] of the expert blocks of one wave, by the shares (zero at dense layers)."""
        speed, load = self.deployment.owner_speed, self._expected()
        seconds = np.zeros((len(load), len(speed)))
        for layer in range(self.deployment.sizes.num_dense_layers, len(load)):
            seconds[layer] = owner_seconds(
                load[layer], self._owners[layer], self.shares[layer], self._per_token_s, self._reading_s, speed
            )
        return np.where(seconds > 0, seconds + self.deployment.device.launch_s / speed, 0.0)

    def _level(self, counts: Int64Array, owners: Int16Array) -> FloatArray:
        speed = self.deployment.owner_speed if self._mode == "level-home" else np.ones(len(self.deployment.owners))
        waiting = np.zeros(len(speed))
        if self._mode == "level-home":
            return level(counts.astype(np.float64), owners, waiting, self._per_token_s, speed)
        total = counts.sum(axis=0).astype(np.float64)
        parts = level(total, owners, waiting, self._per_token_s, speed)
        share = parts / np.maximum(total, 1.0)[..., None]
        return counts[..., None] * share
