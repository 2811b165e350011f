"""What the server knows of the model that its workers have loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What the front must know of the loaded model.

    Attributes:
        name: as users see it.
        max_model_len: tokens of one sequence at most, as the workers that loaded it say.
        vocab_size: rows of the embedding.
        num_moe_layers, pairs_per_token: shape of what is told of a token's experts.
    """

    name: str
    max_model_len: int
    vocab_size: int
    num_moe_layers: int = 1
    pairs_per_token: int = 1

    @property
    def routed_bytes(self) -> int:
        """Of what is told of one token's experts."""
        return 2 * self.num_moe_layers * self.pairs_per_token
