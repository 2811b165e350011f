// The kernels as a table of functions, one table per instruction set.
#pragma once

#include "args.h"

namespace amoe {

// The kernels of an attention block one by one; see norm.h, rope.h, attention.h, router.h.
struct PartsOf {
    void (*rms_norm)(
        ThreadPool&, const void* x, int64_t ldx, const void* weight, float eps, void* out, int64_t ldo, int64_t n,
        int64_t width);
    void (*qk_rope_write)(
        ThreadPool&, const AttentionShape&, const void* q_norm, const void* k_norm, void* qkv, int64_t n,
        const int64_t* positions, const float* rope_table, const int64_t* slots, void* kv_layer);
    void (*paged_attention)(
        ThreadPool&, const AttentionShape&, const void* q, int64_t ldq, const void* kv_layer, const AttentionBatch&, void* out);
    void (*route)(
        ThreadPool&, const float* logits, int64_t n, int64_t num_experts, int64_t top_k, bool normalise, bool round_to_t,
        int64_t* ids, float* weights, float* scores);
};

// For one activation type.
struct KernelsOf {
    void (*linear)(ThreadPool&, Scratch&, const LinearArgs&);
    void (*experts)(ThreadPool&, Scratch&, const Experts&, const ExpertsArgs&);
    void (*attention)(ThreadPool&, Scratch&, const AttentionLayer&, const AttentionArgs&);
    PartsOf parts;
};

struct Kernels {
    const char* name;
    bool (*is_supported)();  // by this processor
    KernelsOf of_bf16, of_float;
    void (*argmax)(ThreadPool&, const float* logits, int64_t n, int64_t vocab_size, int64_t* ids);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace amoe
