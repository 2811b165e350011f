// A whole attention block: norm, projections, rotary embedding, attention, residual, norm, router.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "norm.h"
#include "rope.h"
#include "router.h"

namespace amoe::AMOE_ISA {

// Norms rows of x [n, width] (a null weight: does not) and packs them in tiles; keeps the normed rows in `out` unless it is null.
template <class T>
typename Step<T>::Lane* pack_normed(
    ThreadPool& pool, Buffer& buffer, const T* x, int64_t ldx, int64_t n, int64_t width, const T* norm, float eps, T* out) {
    using Lane = typename Step<T>::Lane;
    const Tiles tiles(n);
    const int64_t steps = width / Step<T>::kDepth;
    Lane* packed = buffer.get<Lane>(n * steps);
    pool.run(tiles.count, [&](int64_t tile, int) {
        static thread_local Buffer room;
        const int64_t begin = tiles.begin(tile);
        const int size = tiles.size(tile);
        T* normed = out == nullptr ? room.get<T>(kMaxRows * width) : out + begin * width;
        for (int row = 0; row < size; ++row) {
            rms_norm_row(x + (begin + row) * ldx, norm, eps, normed + row * width, width);
        }
        pack_tile<T>([&](int row) { return normed + row * width; }, size, width, packed + begin * steps);
    });
    return packed;
}

// See LinearArgs.
template <class T, class Out>
void run_linear_to(ThreadPool& pool, Scratch& scratch, const LinearArgs& a) {
    if (a.n == 0) return;
    const Target<T, Out> target{
        static_cast<Out*>(a.out), a.out_stride, static_cast<const T*>(a.bias), static_cast<const T*>(a.residual)};
    const T* x = static_cast<const T*>(a.x);
    const auto* packed =
        a.norm == nullptr
            ? pack_rows<T>(pool, scratch.rows, x, a.x_stride, a.n, a.weights.depth)
            : pack_normed<T>(
                  pool, scratch.rows, x, a.x_stride, a.n, a.weights.depth, static_cast<const T*>(a.norm), a.eps, nullptr);
    multiply_packed<T, Out>(pool, a.weights, packed, a.n, target);
}

// See AttentionLayer and AttentionArgs.
template <class T>
void run_attention(ThreadPool& pool, Scratch& scratch, const AttentionLayer& layer, const AttentionArgs& a) {
    const AttentionShape& shape = layer.shape;
    const int64_t hidden = layer.qkv.depth, q_size = shape.num_heads * shape.head_dim;
    const T* residual = static_cast<const T*>(a.residual);
    const auto weight = [](const void* address) { return static_cast<const T*>(address); };

    T* qkv = scratch.hidden.get<T>(a.n * layer.qkv.rows);
    const auto* packed = pack_normed<T>(
        pool, scratch.rows, residual, hidden, a.n, hidden, weight(layer.input_norm), layer.eps, nullptr);
    multiply_packed<T, T>(pool, layer.qkv, packed, a.n, {qkv, layer.qkv.rows, weight(layer.qkv_bias), nullptr});
    T* kv = static_cast<T*>(a.kv_layer);
    qk_rope_write<T>(
        pool, shape, weight(layer.q_norm), weight(layer.k_norm), qkv, a.n, a.positions, layer.rope_table, a.slots, kv);

    T* attended = scratch.attended.get<T>(a.n * q_size);
    paged_attention<T>(pool, shape, qkv, layer.qkv.rows, kv, a.batch, attended);
    T* out = static_cast<T*>(a.out);
    packed = pack_rows<T>(pool, scratch.rows, attended, q_size, a.n, q_size);
    multiply_packed<T, T>(pool, layer.out, packed, a.n, {out, hidden, nullptr, residual});

    T* normed = static_cast<T*>(a.normed);
    packed = pack_normed<T>(pool, scratch.rows, out, hidden, a.n, hidden, weight(layer.post_norm), layer.eps, normed);
    if (layer.router.data == nullptr) return;
    float* logits = scratch.logits.get<float>(a.n * layer.router.rows);
    multiply_packed<T, float>(pool, layer.router, packed, a.n, {logits, layer.router.rows, nullptr, nullptr});
    route<T>(
        pool, logits, a.n, layer.router.rows, layer.top_k, layer.normalises, layer.rounds, a.ids, a.weights, a.scores);
}

}  // namespace amoe::AMOE_ISA
