// The router's choice of experts, and the greedy choice of a token.
#pragma once

#include "norm.h"

namespace amoe::AMOE_ISA {

struct Best {
    float value;
    int64_t index;
};

// The largest of v [count] above `floor`, the lowest index of equals; {floor, 0} if none is: NaN is above nothing.
AMOE_INLINE Best best_of(const float* v, int64_t count, float floor) {
    f32x16 top = splat(floor);
    i32x16 where = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 here = load<f32x16>(v + i);
        const i32x16 is_better = here > top;
        top = select(is_better, here, top);
        where = (is_better & (kLanes + static_cast<int32_t>(i))) | (~is_better & where);
    }
    Best best{floor, 0};
    for (int k = 0; k < 16; ++k) {
        const bool ties = top[k] == best.value && best.value > floor && where[k] < best.index;
        if (top[k] > best.value || ties) best = {top[k], where[k]};
    }
    for (; i < count; ++i) {
        if (v[i] > best.value) best = {v[i], i};
    }
    return best;
}

// Softmax of logits [count] in float32.
AMOE_INLINE void softmax(const float* logits, int64_t count, float* out) {
    f32x16 tops = splat(-INFINITY);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) tops = max(load<f32x16>(logits + i), tops);
    float top = largest(tops);
    for (; i < count; ++i) top = logits[i] > top ? logits[i] : top;
    f32x16 totals = {};
    for (i = 0; i < count; i += 16) {
        const int64_t size = std::min<int64_t>(16, count - i);
        const f32x16 e = exp((size == 16 ? load<f32x16>(logits + i) : load_part(logits + i, size)) - top);
        const f32x16 real = select(kLanes < static_cast<int32_t>(size), e, f32x16{});
        totals += real;
        size == 16 ? store_f32(out + i, real) : store_part(out + i, real, size);
    }
    const float total = sum(totals);
    for (i = 0; i < count; ++i) out[i] /= total;
}

// The experts of one token: ids [K], weights [K], best first; `left` [E] is scratch. NaN counts as nothing.
AMOE_INLINE void choose(
    const float* probabilities, int64_t num_experts, int64_t top_k, float* left, int64_t* ids, float* weights) {
    for (int64_t i = 0; i < num_experts; ++i) left[i] = probabilities[i] >= 0 ? probabilities[i] : 0;
    for (int64_t k = 0; k < top_k; ++k) {
        ids[k] = best_of(left, num_experts, -0.5f).index;
        weights[k] = probabilities[ids[k]];
        left[ids[k]] = -1;
    }
}

// Softmax over all E experts, then the best K of them, best first; of equals the lowest id.
//
// logits: [n, E]. normalise: weights of a token sum to 1. round_to_t: then rounded to T. scores: [n, E] the softmax; may be null.
template <class T>
void route(
    ThreadPool& pool, const float* logits, int64_t n, int64_t num_experts, int64_t top_k, bool normalise, bool round_to_t,
    int64_t* ids, float* weights, float* scores) {
    constexpr int64_t kRowsPerTask = 8;
    pool.run((n + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
        static thread_local Buffer memory;
        float* left = memory.get<float>(2 * num_experts);
        for (int64_t row = task * kRowsPerTask; row < std::min(n, (task + 1) * kRowsPerTask); ++row) {
            float* probabilities = scores == nullptr ? left + num_experts : scores + row * num_experts;
            float* own = weights + row * top_k;
            softmax(logits + row * num_experts, num_experts, probabilities);
            choose(probabilities, num_experts, top_k, left, ids + row * top_k, own);
            float total = 0;
            for (int64_t k = 0; k < top_k; ++k) total += own[k];
            for (int64_t k = 0; k < top_k; ++k) {
                if (normalise) own[k] /= total;
                if (!round_to_t) continue;
                T rounded;
                put(rounded, own[k]);
                own[k] = first(rounded);
            }
        }
    });
}

// ids [n]: the index of each row's largest logit, the lowest of equals; a row of NaN gives 0. logits: [n, V].
inline void argmax(ThreadPool& pool, const float* logits, int64_t n, int64_t vocab_size, int64_t* ids) {
    constexpr int64_t kPart = 8192;  // so that one row keeps several threads busy
    static thread_local Buffer memory;
    const int64_t num_parts = (vocab_size + kPart - 1) / kPart;
    Best* best = memory.get<Best>(n * num_parts);
    pool.run(n * num_parts, [&](int64_t task, int) {
        const int64_t begin = task % num_parts * kPart;
        const float* row = logits + task / num_parts * vocab_size;
        best[task] = best_of(row + begin, std::min(kPart, vocab_size - begin), -INFINITY);
        best[task].index += begin;
    });
    for (int64_t row = 0; row < n; ++row) {
        Best top = best[row * num_parts];
        for (int64_t part = 1; part < num_parts; ++part) {
            if (best[row * num_parts + part].value > top.value) top = best[row * num_parts + part];
        }
        ids[row] = top.index;
    }
}

}  // namespace amoe::AMOE_ISA
