// The experts of one layer on the pairs of a batch: gate and up in one product, SiLU in registers, down, weighted sum per token.
//
// Each weighted output is rounded to the activation type before it is added up. Sums of a few bf16 numbers are exact in float32 unless
// one of them is some 2^13 times smaller than another, and then nearly so: so it does not matter in which order they are added, nor
// which workers add up which of them.
#pragma once

#include "gemm.h"

namespace amoe::AMOE_ISA {

AMOE_INLINE Weights of_expert(const Weights& first, int64_t bytes, int64_t scales, int64_t expert) {
    Weights w = first;
    w.data = static_cast<const char*>(first.data) + expert * bytes;
    if (first.scales != nullptr) w.scales = first.scales + expert * scales;
    return w;
}

// Pairs in the order in which they are multiplied: by expert, tokens ascending.
struct PairOrder {
    int64_t count = 0;
    int64_t* pair = nullptr;      // [P] of each place: token * K + k
    int64_t* place = nullptr;     // [n * K] of each pair, -1: it is not here
    int64_t* experts = nullptr;   // local experts that have pairs
    int64_t* begin = nullptr;     // where theirs begin, and the end
    int64_t num_experts = 0;
};

inline PairOrder order_pairs(
    Buffer& buffer, const int64_t* ids, int64_t n, int64_t top_k, const int64_t* local_index, int64_t count) {
    PairOrder order;
    int64_t* memory = buffer.get<int64_t>(2 * n * top_k + 3 * (count + 1));
    order.pair = memory;
    order.place = order.pair + n * top_k;
    order.experts = order.place + n * top_k;
    order.begin = order.experts + count + 1;
    int64_t* next = order.begin + count + 1;
    std::fill(next, next + count, 0);
    const auto local = [&](int64_t id) { return id < 0 ? -1 : local_index == nullptr ? id : local_index[id]; };
    for (int64_t pair = 0; pair < n * top_k; ++pair) {
        const int64_t expert = local(ids[pair]);
        if (expert >= 0) ++next[expert];
    }
    for (int64_t expert = 0; expert < count; ++expert) {
        if (next[expert] == 0) continue;
        order.experts[order.num_experts] = expert;
        order.begin[order.num_experts++] = order.count;
        const int64_t size = next[expert];
        next[expert] = order.count;
        order.count += size;
    }
    order.begin[order.num_experts] = order.count;
    for (int64_t pair = 0; pair < n * top_k; ++pair) {
        const int64_t expert = local(ids[pair]);
        order.place[pair] = expert < 0 ? -1 : next[expert]++;
        if (expert >= 0) order.pair[order.place[pair]] = pair;
    }
    return order;
}

// A tile of activations: silu(gate) * up of c [size, 32], into columns [column, column + 16) of a packed tile.
template <class T>
AMOE_INLINE void activate(
    const float* c, const float* scales, int size, int64_t column, int count, typename Step<T>::Lane* tile) {
    using Lane = typename Step<T>::Lane;
    constexpr int kDepth = Step<T>::kDepth;
    for (int row = 0; row < size; ++row) {
        f32x16 gate = load_f32(c + row * kPanel), up = load_f32(c + row * kPanel + 16);
        if (scales != nullptr) {
            gate = gate * load_f32(scales);
            up = up * load_f32(scales + 16);
        }
        alignas(64) T activated[16];
        store_f32(activated, silu(gate) * up);
        Lane lanes[16 / kDepth];
        std::memcpy(lanes, activated, sizeof(lanes));
        Lane* to = tile + column / kDepth * size + row;
        if (count == 16) {  // a length known here: as a loop it would be vectorised, badly
#pragma GCC unroll 16
            for (int i = 0; i < 16 / kDepth; ++i) to[i * size] = lanes[i];
        } else {
            for (int i = 0; i < count / kDepth; ++i) to[i * size] = lanes[i];
        }
    }
}

// to [count] = factor * c (* scales), rounded to T.
template <class T>
AMOE_INLINE void put_weighted(const float* c, const float* scales, float factor, int count, T* to) {
    if (count == kPanel) {
        for (int half = 0; half < kPanel; half += 16) {
            f32x16 value = load_f32(c + half);
            if (scales != nullptr) value = value * load_f32(scales + half);
            store_f32(to + half, factor * value);
        }
        return;
    }
    for (int i = 0; i < count; ++i) put(to[i], factor * (scales == nullptr ? c[i] : c[i] * scales[i]));
}

// See `experts`, for so few tokens that their products fit the scratch memory.
template <class T, class Out>
void experts_of_slice(
    ThreadPool& pool, Scratch& scratch, const Experts& e, const T* x, const int64_t* rows, int64_t n, const int64_t* ids,
    const float* weights, int64_t top_k, const int64_t* local_index, const T* residual, Out* out) {
    using Lane = typename Step<T>::Lane;
    const PairOrder order = order_pairs(scratch.order, ids, n, top_k, local_index, e.count);
    const int64_t hidden_steps = e.hidden / Step<T>::kDepth, inner_steps = e.intermediate / Step<T>::kDepth;
    Lane* packed = scratch.rows.get<Lane>(order.count * hidden_steps);
    Lane* activated = scratch.activated.get<Lane>(order.count * inner_steps);
    // Rows a power of two apart would fall into the same few places of the first-level cache.
    const int64_t product_stride = e.hidden + 16;
    T* products = scratch.products.get<T>(order.count * product_stride);

    pool.run(order.num_experts, [&](int64_t index, int) {
        const Tiles tiles(order.begin[index + 1] - order.begin[index]);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t first = order.begin[index] + tiles.begin(tile);
            const auto row_at = [&](int row) {
                const int64_t token = order.pair[first + row] / top_k;
                return x + (rows == nullptr ? token : rows[token]) * e.hidden;
            };
            pack_tile<T>(row_at, tiles.size(tile), e.hidden, packed + first * hidden_steps);
        }
    });

    // Panels of all experts that have pairs, one after the other; `ahead` is what this thread probably reads next.
    const auto for_panels = [&](const Weights& first, int64_t bytes, int64_t scales, const Lane* from, auto&& sink) {
        const int64_t num_panels = amoe::AMOE_ISA::num_panels(first);
        pool.run(order.num_experts * num_panels, [&](int64_t task, int) {
            const int64_t index = task / num_panels, panel = task % num_panels;
            const Weights w = of_expert(first, bytes, scales, order.experts[index]);
            const int64_t next_index = std::min((task + 1) / num_panels, order.num_experts - 1);
            const Weights next = of_expert(first, bytes, scales, order.experts[next_index]);
            const Tiles tiles(order.begin[index + 1] - order.begin[index]);
            const Lane* tile_rows = from + order.begin[index] * (w.depth / Step<T>::kDepth);
            multiply_panel<T>(
                w, panel_at<T>(w, panel), panel_at<T>(next, (task + 1) % num_panels), tiles, 0, tiles.count, tile_rows,
                [&](const float* c, int64_t tile) {
                    sink(c, w.scales == nullptr ? nullptr : w.scales + panel * kPanel, panel,
                         order.begin[index] + tiles.begin(tile), tiles.size(tile));
                });
        });
    };
    for_panels(e.w13, e.w13_bytes, e.w13_scales, packed,
               [&](const float* c, const float* scales, int64_t panel, int64_t place, int size) {
                   const int64_t column = panel * 16;
                   const int count = static_cast<int>(std::min<int64_t>(16, e.intermediate - column));
                   activate<T>(c, scales, size, column, count, activated + place * inner_steps);
               });
    for_panels(e.w2, e.w2_bytes, e.w2_scales, activated,
               [&](const float* c, const float* scales, int64_t panel, int64_t place, int size) {
                   const int64_t column = panel * kPanel;
                   const int count = static_cast<int>(std::min<int64_t>(kPanel, e.hidden - column));
                   for (int row = 0; row < size; ++row) {
                       T* to = products + (place + row) * product_stride + column;
                       put_weighted<T>(c + row * kPanel, scales, weights[order.pair[place + row]], count, to);
                   }
               });

    constexpr int64_t kTokensPerTask = 4;
    pool.run((n + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
        for (int64_t token = task * kTokensPerTask; token < std::min(n, (task + 1) * kTokensPerTask); ++token) {
            const T* start = residual == nullptr ? nullptr : residual + token * e.hidden;
            Out* to = out + token * e.hidden;
            const auto pair_row = [&](int64_t k) -> const T* {
                const int64_t place = order.place[token * top_k + k];
                return place < 0 ? nullptr : products + place * product_stride;
            };
            int64_t column = 0;
            for (; column + 16 <= e.hidden; column += 16) {
                f32x16 total = {};
                for (int64_t k = 0; k < top_k; ++k) {
                    const T* product = pair_row(k);
                    if (product != nullptr) total += load_f32(product + column);
                }
                if (start != nullptr) total += load_f32(start + column);
                store_f32(to + column, total);
            }
            for (; column < e.hidden; ++column) {
                float total = 0;
                for (int64_t k = 0; k < top_k; ++k) {
                    const T* product = pair_row(k);
                    if (product != nullptr) total += first(product[column]);
                }
                if (start != nullptr) total += first(start[column]);
                put(to[column], total);
            }
        }
    });
}

// Pairs at a time: enough for each expert to be bound by its operations, and few enough for the memory of their products.
constexpr int64_t kPairsPerSlice = 8192;

// out [n, H] = (residual +) the weighted sum over the experts here of each token's x, summed in float32 in the order of k. Out is T or,
// for a sum that is to be added to those of others, float32.
//
// rows: [n] which rows of x the tokens are, null: in order. ids, weights: [n, K]; local_index: local expert of each id, -1 if
// it is not here; null: ids are local.
template <class T, class Out>
void experts(
    ThreadPool& pool, Scratch& scratch, const Experts& e, const T* x, const int64_t* rows, int64_t n, const int64_t* ids,
    const float* weights, int64_t top_k, const int64_t* local_index, const T* residual, Out* out) {
    const int64_t num_slices = (n * top_k + kPairsPerSlice - 1) / kPairsPerSlice;
    for (int64_t slice = 0; slice < num_slices; ++slice) {
        const int64_t begin = n * slice / num_slices, end = n * (slice + 1) / num_slices;
        experts_of_slice<T, Out>(
            pool, scratch, e, rows == nullptr ? x + begin * e.hidden : x, rows == nullptr ? nullptr : rows + begin, end - begin,
            ids + begin * top_k, weights + begin * top_k, top_k, local_index,
            residual == nullptr ? nullptr : residual + begin * e.hidden, out + begin * e.hidden);
    }
}

}  // namespace amoe::AMOE_ISA
