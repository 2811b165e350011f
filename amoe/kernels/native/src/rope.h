// What stands between the product that gives queries, keys and values and attention itself: norm, clip, rotary embedding, and
// the write into the cache. In float32, rounded once.
#pragma once

#include "kv_cache.h"
#include "norm.h"

namespace amoe::AMOE_ISA {

AMOE_INLINE f32x16 clamp(f32x16 v, float bound) {
    v = select(v > bound, splat(bound), v);
    return select(v < -bound, splat(-bound), v);
}

// How a head is prepared before it is turned: x * scale * weight, clamped. Null weights are ones.
template <class T>
struct Prepare {
    float scale;
    const T* weight;
    float clip;

    AMOE_INLINE f32x16 at(const T* x, int64_t d, int64_t count) const {
        f32x16 v = (count == 16 ? load_f32(x + d) : load_part(x + d, count)) * scale;
        if (weight != nullptr) v = v * (count == 16 ? load_f32(weight + d) : load_part(weight + d, count));
        return clip > 0 ? clamp(v, clip) : v;
    }
};

// Turns dimension d with d + dim / 2 by the row `turn` of the table: dim / 2 cosines, then sines. out may be x.
template <class T>
__attribute__((noinline)) void rotate_head(const T* x, const Prepare<T>& prepare, const float* turn, T* out, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d += 16) {
        const int64_t count = std::min<int64_t>(16, half - d);
        const f32x16 low = prepare.at(x, d, count), high = prepare.at(x, half + d, count);
        const bool whole = count == 16;
        const f32x16 cos = whole ? load_f32(turn + d) : load_part(turn + d, count);
        const f32x16 sin = whole ? load_f32(turn + half + d) : load_part(turn + half + d, count);
        const f32x16 turned_low = low * cos - high * sin, turned_high = high * cos + low * sin;
        if (whole) {
            store_f32(out + d, turned_low);
            store_f32(out + half + d, turned_high);
        } else {
            store_part(out + d, turned_low, count);
            store_part(out + half + d, turned_high, count);
        }
    }
}

template <class T>
AMOE_INLINE void clip_head(T* x, float clip, int64_t dim) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) store_f32(x + d, clamp(load_f32(x + d), clip));
    if (d < dim) store_part(x + d, clamp(load_part(x + d, dim - d), clip), dim - d);
}

// Norm, clip and rotation of `num_heads` heads side by side, in place.
template <class T>
AMOE_INLINE void prepare_heads(
    const AttentionShape& shape, T* heads, int64_t num_heads, const T* weight, const float* turn) {
    const int64_t dim = shape.head_dim;
    float scale = shape.qk_norm == kFullQKNorm ? inverse_rms(heads, shape.eps, num_heads * dim) : 1.0f;
    for (int64_t head = 0; head < num_heads; ++head) {
        T* x = heads + head * dim;
        if (shape.qk_norm == kHeadQKNorm) scale = inverse_rms(x, shape.eps, dim);
        const T* own = shape.qk_norm == kFullQKNorm ? weight + head * dim : shape.qk_norm == kHeadQKNorm ? weight : nullptr;
        rotate_head(x, Prepare<T>{scale, own, shape.clip}, turn, x, dim);
    }
}

// qkv [n, (Hq + 2 Hkv) D] becomes what attention takes, in place; keys and values are written to their slots of the cache too.
//
// q_norm, k_norm: weights as shape.qk_norm says, else unused. rope_table: [max_position, 2, D / 2] cosines and sines.
// slots: [n] block * block_size + offset.
template <class T>
void qk_rope_write(
    ThreadPool& pool, const AttentionShape& shape, const T* q_norm, const T* k_norm, T* qkv, int64_t n,
    const int64_t* positions, const float* rope_table, const int64_t* slots, T* kv_layer) {
    const int64_t dim = shape.head_dim, width = (shape.num_heads + 2 * shape.num_kv_heads) * dim;
    const auto one_token = [&](int64_t row) {
        T* queries = qkv + row * width;
        T* keys = queries + shape.num_heads * dim;
        T* values = keys + shape.num_kv_heads * dim;
        const float* turn = rope_table + positions[row] * dim;
        prepare_heads(shape, queries, shape.num_heads, q_norm, turn);
        prepare_heads(shape, keys, shape.num_kv_heads, k_norm, turn);
        for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
            if (shape.clip > 0) clip_head(values + head * dim, shape.clip, dim);
            write_token(shape, kv_layer, slots[row], head, keys + head * dim, values + head * dim);
        }
    };
    // Neighbouring tokens of a prompt write to the same cache lines: one thread takes them together.
    const int64_t per_task = n >= 4 * kGroup * pool.num_threads() ? kGroup : 1;
    pool.run((n + per_task - 1) / per_task, [&](int64_t task, int) {
        for (int64_t row = task * per_task; row < std::min(n, (task + 1) * per_task); ++row) one_token(row);
    });
}

}  // namespace amoe::AMOE_ISA
