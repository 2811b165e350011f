"""Models as the cost model sees them: sizes only, no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from amoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Sizes of one MoE model.

    Attributes:
        num_layers: all of them, the dense ones included.
        num_dense_layers: the first ones, whose MLP of `dense_intermediate_size` runs in the attention block.
        attention_params: weights of one layer's attention projections.
        attention_flops: floating-point operations per (query token, context token) pair of one layer.
        kv_bytes: KV cache of one token in one layer, bytes.
        shared_intermediate_size: of the shared experts together, which run in the attention block; 0: none.
        weight_bytes, expert_weight_bytes: per parameter, outside and inside routed experts.
        activation_bytes: per element of a hidden state, in memory and on the wire.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    vocab_size: int
    attention_params: int
    attention_flops: int
    kv_bytes: float
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    weight_bytes: float = 2.0
    expert_weight_bytes: float = 2.0
    activation_bytes: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"model {self.name}: top_k must be between 1 and {self.num_experts}")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ConfigError(f"model {self.name}: num_dense_layers must be less than num_layers")

    @property
    def num_sparse_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """[L], True where the layer has experts."""
        return (False,) * self.num_dense_layers + (True,) * self.num_sparse_layers

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def row_bytes(self) -> float:
        """One hidden state on the wire."""
        return self.hidden_size * self.activation_bytes

    def block_params(self, layer: int) -> int:
        """Weights that an attention block multiplies with: attention, router, shared experts or the dense MLP."""
        if layer < self.num_dense_layers:
            return self.attention_params + 3 * self.hidden_size * self.dense_intermediate_size
        shared = 3 * self.hidden_size * self.shared_intermediate_size
        return self.attention_params + self.hidden_size * self.num_experts + shared

    @property
    def attention_bytes(self) -> float:
        """Weights that every attention worker holds: all attention blocks, embedding and head."""
        blocks = sum(self.block_params(layer) for layer in range(self.num_layers))
        return (blocks + 2 * self.vocab_size * self.hidden_size) * self.weight_bytes

    @property
    def expert_bytes(self) -> float:
        """Weights of one routed expert."""
        return self.expert_params * self.expert_weight_bytes


def grouped_query_attention(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Sizes of a layer with grouped-query attention in 16 bits, as keyword arguments of `ModelSizes`."""
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    return {
        "attention_params": hidden_size * (2 * q_size + 2 * kv_size),
        "attention_flops": 4 * q_size,
        "kv_bytes": 4 * kv_size,
    }


def _latent_attention(
    hidden: int, heads: int, q_rank: int, kv_rank: int, rope: int, nope: int, value: int
) -> dict[str, int]:
    """Multi-head latent attention with absorbed projections: queries meet the latent, and the latent is summed."""
    params = (
        hidden * q_rank
        + q_rank * heads * (nope + rope)
        + hidden * (kv_rank + rope)
        + kv_rank * heads * (nope + value)
        + heads * value * hidden
    )
    return {
        "attention_params": params,
        "attention_flops": 2 * heads * (2 * kv_rank + rope),
        "kv_bytes": 2 * (kv_rank + rope),
    }


_MIXTRAL = ModelSizes(
    name="mixtral-8x7b",
    num_layers=32,
    hidden_size=4096,
    num_experts=8,
    top_k=2,
    moe_intermediate_size=14336,
    vocab_size=32000,
    **grouped_query_attention(4096, 32, 8, 128),
)

_MQA = grouped_query_attention(4096, 32, 1, 128)

MODELS = {
    sizes.name: sizes
    for sizes in (
        _MIXTRAL,
        replace(_MIXTRAL, name="mixtral-8x7b-top1", top_k=1),
        # With one KV head, as AMoE (arXiv 2505.08944) evaluates it, so that experts rather than KV set the pace.
        replace(_MIXTRAL, name="mixtral-8x7b-mqa", **_MQA),
        replace(_MIXTRAL, name="mixtral-8x7b-mqa-top1", top_k=1, **_MQA),
        replace(_MIXTRAL, name="mixtral-16x7b-mqa-top1", num_experts=16, top_k=1, **_MQA),
        ModelSizes(
            name="qwen3-30b-a3b",
            num_layers=48,
            hidden_size=2048,
            num_experts=128,
            top_k=8,
            moe_intermediate_size=768,
            vocab_size=151936,
            **grouped_query_attention(2048, 32, 4, 128),
        ),
        ModelSizes(
            name="olmoe-1b-7b",
            num_layers=16,
            hidden_size=2048,
            num_experts=64,
            top_k=8,
            moe_intermediate_size=1024,
            vocab_size=50304,
            **grouped_query_attention(2048, 16, 16, 128),
        ),
        ModelSizes(  # fp8 weights, as released
            name="deepseek-v3",
            num_layers=61,
            hidden_size=7168,
            num_experts=256,
            top_k=8,
            moe_intermediate_size=2048,
            vocab_size=129280,
            num_dense_layers=3,
            dense_intermediate_size=18432,
            shared_intermediate_size=2048,
            weight_bytes=1.0,
            expert_weight_bytes=1.0,
            **_latent_attention(7168, 128, 1536, 512, 64, 128, 128),
        ),
        ModelSizes(  # MXFP4 experts: 4 bits and a scale of 8 bits per 32; half of the layers see a window only
            name="gpt-oss-120b",
            num_layers=36,
            hidden_size=2880,
            num_experts=128,
            top_k=4,
            moe_intermediate_size=2880,
            vocab_size=201088,
            expert_weight_bytes=0.53125,
            **grouped_query_attention(2880, 64, 8, 64),
        ),
    )
}


def model_sizes(name: str) -> ModelSizes:
    """Sizes of a named model.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in MODELS:
        raise ConfigError(f"there are no sizes of a model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]
