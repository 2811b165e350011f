// What the kernels are called with: plain structures, the same for every instruction set. Addresses are the caller's; `void*` points
// to the activation type, bf16 or float32.
#pragma once

#include <cstdint>

#include "attention_args.h"
#include "pool.h"
#include "scratch.h"

namespace amoe {

// One matrix [rows, depth], packed; see gemm.h. `scales` [rows rounded up to 32] of int8 weights, else null.
struct Weights {
    const void* data = nullptr;
    const float* scales = nullptr;
    int64_t rows = 0;
    int64_t depth = 0;
    bool is_int8 = false;
};

// out [n, rows] = x [n, depth] w^T (+ bias) (+ residual), rows of x `x_stride` apart, of out and residual `out_stride`.
struct LinearArgs {
    const void* x;
    int64_t x_stride, n;
    const void* norm;  // [depth] x is RMS-normed first; null: it is not
    float eps;
    Weights weights;
    const void* bias;
    const void* residual;
    void* out;
    int64_t out_stride;
    bool is_float_out;  // float32 whatever the activation type
};

// The experts of a layer that are here, stacked; `w13` and `w2` are those of the first one.
struct Experts {
    Weights w13, w2;
    int64_t count = 0, hidden = 0, intermediate = 0;
    int64_t w13_bytes = 0, w2_bytes = 0;    // from one expert to the next
    int64_t w13_scales = 0, w2_scales = 0;  // likewise, numbers of their scales
};

// See experts.h. `out` is of the activation type with a residual, float32 without one.
struct ExpertsArgs {
    const void* x;
    const int64_t* rows;
    int64_t n;
    const int64_t* ids;
    const float* weights;
    int64_t top_k;
    const int64_t* local_index;
    const void* residual;
    void* out;
};

// The weights of one attention block. Null or empty is what the model does not have.
struct AttentionLayer {
    AttentionShape shape{};
    float eps = 0;
    const void *input_norm = nullptr, *post_norm = nullptr;  // [H]
    const void *qkv_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;
    const float* rope_table = nullptr;  // [max_position, 2, D / 2]
    Weights qkv, out, router;           // no router in a dense layer
    int64_t top_k = 0;
    bool normalises = false, rounds = false;  // the weights of the chosen experts
    Experts mlp;                              // of a dense layer, or the shared expert: a single one; else none
    const void* mlp_gate = nullptr;           // [H] its output is times sigmoid(gate . x); null: as it is
};

// One attention block on n tokens. H hidden size, K experts per token, E experts.
struct AttentionArgs {
    const void* residual;  // [n, H]
    int64_t n;
    const int64_t* positions;  // [n]
    const int64_t* slots;      // [n] where keys and values go
    void* kv_layer;
    AttentionBatch batch;
    void* out;       // [n, H] residual behind attention
    void* normed;    // [n, H] what the experts get
    int64_t* ids;    // [n, K]
    float* weights;  // [n, K]
    float* scores;   // [n, E], or null
};

// A whole layer: what `forward` marches through.
struct LayerBlocks {
    AttentionLayer attention;
    Experts experts;             // none in a dense layer
    const int64_t* local_index;  // see ExpertsArgs
    void* kv_layer;
};

// All layers on n tokens. L layers.
struct ForwardArgs {
    void* residual;  // [n, H]; overwritten
    int64_t n;
    const int64_t* positions;
    const int64_t* slots;
    AttentionBatch batch;
    const int64_t* wanted;  // [num_wanted] ascending rows that pass the last layer's experts; null: all
    int64_t num_wanted;
    void* out;        // [num_wanted, H] residuals behind the last layer
    int64_t* ids;     // [L, n, K], of the last layer only [num_wanted, K]; of a dense layer nothing is written
    double* seconds;  // [L, 2] that attention and experts have taken
};

}  // namespace amoe
