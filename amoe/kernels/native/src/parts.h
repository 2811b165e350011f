// The kernels of an attention block one by one, behind `void*`: what tests and benchmarks call.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "norm.h"
#include "rope.h"
#include "router.h"

namespace amoe::AMOE_ISA {

template <class T>
void run_rms_norm(
    ThreadPool& pool, const void* x, int64_t ldx, const void* weight, float eps, void* out, int64_t ldo, int64_t n,
    int64_t width) {
    rms_norm<T>(pool, static_cast<const T*>(x), ldx, static_cast<const T*>(weight), eps, static_cast<T*>(out), ldo, n, width);
}

template <class T>
void run_qk_rope_write(
    ThreadPool& pool, const AttentionShape& shape, const void* q_norm, const void* k_norm, void* qkv, int64_t n,
    const int64_t* positions, const float* rope_table, const int64_t* slots, void* kv_layer) {
    qk_rope_write<T>(
        pool, shape, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), static_cast<T*>(qkv), n, positions,
        rope_table, slots, static_cast<T*>(kv_layer));
}

template <class T>
void run_paged_attention(
    ThreadPool& pool, const AttentionShape& shape, const void* q, int64_t ldq, const void* kv_layer,
    const AttentionBatch& batch, void* out) {
    paged_attention<T>(
        pool, shape, static_cast<const T*>(q), ldq, static_cast<const T*>(kv_layer), batch, static_cast<T*>(out));
}

template <class T>
constexpr PartsOf parts_of() {
    return {run_rms_norm<T>, run_qk_rope_write<T>, run_paged_attention<T>, route<T>};
}

}  // namespace amoe::AMOE_ISA
