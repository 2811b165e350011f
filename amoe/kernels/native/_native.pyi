"""The compiled module. Addresses are `tensor.data_ptr()`, 0 for what there is not; `src/args.h` says what they mean."""

INTERFACE: int

def supported() -> list[str]: ...
def pack(
    low: int,
    low_rows: int,
    high: int,
    high_rows: int,
    rows_per_panel: int,
    steps: int,
    num_panels: int,
    out: int,
    lane_bytes: int,
) -> None: ...

class Weights:
    def __init__(self, data: int, scales: int, rows: int, depth: int, is_int8: bool) -> None: ...

class Experts:
    def __init__(
        self,
        w13: Weights,
        w2: Weights,
        count: int,
        hidden: int,
        intermediate: int,
        w13_bytes: int,
        w2_bytes: int,
        w13_scales: int,
        w2_scales: int,
    ) -> None: ...

class AttentionShape:
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        qk_norm: int,
        eps: float,
        clip: float,
        scale: float,
    ) -> None: ...

class AttentionLayer:
    def __init__(
        self,
        shape: AttentionShape,
        eps: float,
        input_norm: int,
        post_norm: int,
        qkv_bias: int,
        q_norm: int,
        k_norm: int,
        rope_table: int,
        qkv: Weights,
        out: Weights,
        router: Weights | None,
        top_k: int,
        normalises: bool,
        rounds: bool,
        mlp: Experts | None,
        mlp_gate: int,
    ) -> None: ...

class LayerBlocks:
    def __init__(self, attention: AttentionLayer, experts: Experts | None, local_index: int, kv_layer: int) -> None: ...

class AttentionBatch:
    def __init__(
        self,
        num_decodes: int,
        decode_tables: int,
        table_stride: int,
        decode_lens: int,
        num_chunks: int,
        chunk_start_row: int,
        chunk_end_row: int,
        chunk_context: int,
        chunk_tables: int,
        chunk_table_start: int,
    ) -> None: ...

class Context:
    def __init__(self, isa: str, num_threads: int, cpus: list[int], is_bf16: bool) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def progress(self) -> int: ...
    def linear(
        self,
        x: int,
        x_stride: int,
        n: int,
        norm: int,
        eps: float,
        weights: Weights,
        bias: int,
        residual: int,
        out: int,
        out_stride: int,
        is_float_out: bool,
    ) -> None: ...
    def experts(
        self,
        experts: Experts,
        x: int,
        rows: int,
        n: int,
        ids: int,
        weights: int,
        top_k: int,
        local_index: int,
        residual: int,
        out: int,
    ) -> None: ...
    def attention(
        self,
        layer: AttentionLayer,
        batch: AttentionBatch,
        residual: int,
        n: int,
        positions: int,
        slots: int,
        kv_layer: int,
        out: int,
        normed: int,
        ids: int,
        weights: int,
        scores: int,
    ) -> None: ...
    def rms_norm(self, x: int, ldx: int, weight: int, eps: float, out: int, ldo: int, n: int, width: int) -> None: ...
    def qk_rope_write(
        self,
        shape: AttentionShape,
        q_norm: int,
        k_norm: int,
        qkv: int,
        n: int,
        positions: int,
        rope_table: int,
        slots: int,
        kv_layer: int,
    ) -> None: ...
    def paged_attention(
        self, shape: AttentionShape, q: int, ldq: int, kv_layer: int, batch: AttentionBatch, out: int
    ) -> None: ...
    def route(
        self,
        logits: int,
        n: int,
        num_experts: int,
        top_k: int,
        normalise: bool,
        round_to_t: bool,
        ids: int,
        weights: int,
        scores: int,
    ) -> None: ...
    def forward(
        self,
        layers: list[LayerBlocks],
        batch: AttentionBatch,
        residual: int,
        n: int,
        positions: int,
        slots: int,
        wanted: int,
        num_wanted: int,
        out: int,
        ids: int,
        seconds: int,
    ) -> None: ...
    def argmax(self, logits: int, n: int, vocab_size: int, ids: int) -> None: ...
