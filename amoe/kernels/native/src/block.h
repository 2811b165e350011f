// A whole attention block: norm, projections, rotary embedding, attention, residual, norm, router.
#pragma once

#include "attention.h"
#include "experts.h"
#include "gemm.h"
#include "norm.h"
#include "rope.h"
#include "router.h"

namespace amoe::AMOE_ISA {

// Norms rows of x [n, width] and packs them in tiles; keeps the normed rows in `out` unless it is null.
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

// sigmoid(x . gate) for x [width].
template <class T>
float gate_of(const T* x, const T* gate, int64_t width) {
    f32x16 total = {};
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t count = std::min<int64_t>(16, width - i);
        total += count == 16 ? load_f32(x + i) * load_f32(gate + i) : load_part(x + i, count) * load_part(gate + i, count);
    }
    return 1.0f / (1.0f + std::exp(-sum(total)));
}

// Adds the layer's MLP of x [n, H] to out [n, H].
template <class T>
void add_mlp(ThreadPool& pool, Scratch& scratch, const AttentionLayer& layer, const T* x, int64_t n, T* out) {
    constexpr int64_t kRows = 16;
    const T* gate = static_cast<const T*>(layer.mlp_gate);
    int64_t* ids = scratch.factors.get<int64_t>(2 * n);  // everybody goes to the one expert: 0
    float* factors = reinterpret_cast<float*>(ids + n);
    std::fill(ids, ids + n, 0);
    pool.run((n + kRows - 1) / kRows, [&](int64_t task, int) {
        for (int64_t row = task * kRows; row < std::min(n, (task + 1) * kRows); ++row) {
            factors[row] = gate == nullptr ? 1.0f : gate_of(x + row * layer.mlp.hidden, gate, layer.mlp.hidden);
        }
    });
    experts<T, T>(pool, scratch, layer.mlp, x, nullptr, n, ids, factors, 1, nullptr, out, out);
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
    if (layer.router.data != nullptr) {
        float* logits = scratch.logits.get<float>(a.n * layer.router.rows);
        multiply_packed<T, float>(pool, layer.router, packed, a.n, {logits, layer.router.rows, nullptr, nullptr});
        route<T>(
            pool, logits, a.n, layer.router.rows, layer.top_k, layer.normalises, layer.rounds, a.ids, a.weights, a.scores);
    }
    if (layer.mlp.count > 0) add_mlp<T>(pool, scratch, layer, normed, a.n, out);
}

}  // namespace amoe::AMOE_ISA
