// Matrix products with packed weights: out[m, n] = sum over k of x[m, k] * w[n, k].
//
// Weights lie in panels of 32 columns (values of n), k ascending, so that a product reads them as one stream. bf16 and int8
// panels keep two neighbouring k of a column together, as the bf16 dot product wants them: [N / 32][K / 2][32][2]; float32
// panels are [N / 32][K][32]. Rows of x are packed in tiles of at most kMaxRows: [K / 2][rows] pairs, or [K][rows] floats.
//
// Every element has one accumulator that runs over k in order. So the bits of a row depend on nothing but that row: not on the
// batch, not on the number of threads.
#pragma once

#include "args.h"
#include "vec.h"

namespace amoe::AMOE_ISA {

constexpr int kPanel = 32;
constexpr int kMaxRows = AMOE_MAX_ROWS;  // a tile's accumulators fill the registers
constexpr int64_t kRowsPerTask = 8 * kMaxRows;  // its rows stay in the second-level cache beside a panel

// Per activation type: what a lane of x holds, and how many k it covers.
template <class T>
struct Step;
template <>
struct Step<bf16> {
    using Lane = uint32_t;
    static constexpr int kDepth = 2;
};
template <>
struct Step<float> {
    using Lane = float;
    static constexpr int kDepth = 1;
};

AMOE_INLINE int64_t num_panels(const Weights& w) { return (w.rows + kPanel - 1) / kPanel; }

template <class T>
AMOE_INLINE int64_t panel_bytes(const Weights& w) {
    return w.depth * kPanel * static_cast<int64_t>(w.is_int8 ? 1 : sizeof(T));
}

template <class T>
AMOE_INLINE const char* panel_at(const Weights& w, int64_t index) {
    return static_cast<const char*>(w.data) + index * panel_bytes<T>(w);
}

// ---- the inner product of a tile

struct Columns {
    f32x16 low, high;  // columns 0..15 and 16..31 of one step of k, as lanes
};

// Sixteen pairs of int8 as floats: the first of each, and the second.
AMOE_INLINE Columns split_pairs(const char* from) {
    const u32x16 pairs = __builtin_convertvector(load<u16x16>(from), u32x16);
    const i32x16 even = (i32x16)(pairs << 24) >> 24, odd = (i32x16)(pairs << 16) >> 24;
    return {__builtin_convertvector(even, f32x16), __builtin_convertvector(odd, f32x16)};
}

// Sixteen pairs of int8 as pairs of bf16: small integers are exact in it.
AMOE_INLINE f32x16 bf16_pairs(const char* from) {
#if AMOE_HAS_BF16
    const auto widen = [&](int half) {  // no __builtin_convertvector: GCC would do int8 number by number
        const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from + 16 * half));
        return (__m512)__builtin_convertvector((i32x16)wide, f32x16);
    };
    return (f32x16)_mm512_cvtne2ps_pbh(widen(1), widen(0));
#else
    const Columns pairs = split_pairs(from);  // the upper half of a float's bits are those of the bf16
    return (f32x16)(((u32x16)pairs.low >> 16) | ((u32x16)pairs.high & 0xffff0000u));
#endif
}

template <class T, bool kInt8>
AMOE_INLINE Columns columns(const char* panel, int64_t step) {
    if constexpr (kInt8) {
        static_assert(Step<T>::kDepth == 2);
        const char* at = panel + step * 2 * kPanel;
        return {bf16_pairs(at), bf16_pairs(at + kPanel)};
    } else {
        constexpr int64_t kBytes = kPanel * sizeof(typename Step<T>::Lane);
        const char* at = panel + step * kBytes;
        return {load<f32x16>(at), load<f32x16>(at + 64)};
    }
}

template <class T>
AMOE_INLINE f32x16 multiply_add(f32x16 acc, typename Step<T>::Lane a, f32x16 w) {
    if constexpr (Step<T>::kDepth == 2) {
        return dot_pairs(acc, splat_u32(a), (u32x16)w);
    } else {
        return acc + splat(a) * w;
    }
}

// c [kRows, 32] = tile times panel. Prefetches `ahead`, which is as long as the panel, at the same pace.
template <class T, bool kInt8, int kRows>
__attribute__((noinline)) void multiply(
    const typename Step<T>::Lane* tile, const char* panel, int64_t steps, float* c, const char* ahead) {
    f32x16 acc[kRows][2] = {};
    constexpr int64_t kBytes = kInt8 ? 2 * kPanel : kPanel * sizeof(typename Step<T>::Lane);
    for (int64_t step = 0; step < steps; ++step) {
        for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + step * kBytes + line, 0, 2);
        const Columns w = columns<T, kInt8>(panel, step);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            acc[row][0] = multiply_add<T>(acc[row][0], tile[step * kRows + row], w.low);
            acc[row][1] = multiply_add<T>(acc[row][1], tile[step * kRows + row], w.high);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
        store(c + row * kPanel, acc[row][0]);
        store(c + row * kPanel + 16, acc[row][1]);
    }
}

template <class T, bool kInt8, int kRows = kMaxRows>
AMOE_INLINE void multiply_rows(
    int rows, const typename Step<T>::Lane* tile, const char* panel, int64_t steps, float* c, const char* ahead) {
    if constexpr (kRows == 1) {
        multiply<T, kInt8, 1>(tile, panel, steps, c, ahead);
    } else {
        if (rows == kRows) return multiply<T, kInt8, kRows>(tile, panel, steps, c, ahead);
        multiply_rows<T, kInt8, kRows - 1>(rows, tile, panel, steps, c, ahead);
    }
}

// ---- rows in tiles

// `rows` rows in tiles of nearly equal size.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t num_rows) : rows(num_rows), count((num_rows + kMaxRows - 1) / kMaxRows) {}
    int64_t begin(int64_t tile) const { return tile * (rows / count) + std::min(tile, rows % count); }
    int size(int64_t tile) const { return static_cast<int>(rows / count + (tile < rows % count ? 1 : 0)); }
};

// Packs rows [0, rows) of `row_at(i)`, each `depth` numbers, as one tile.
template <class T, class RowAt>
AMOE_INLINE void pack_tile(RowAt&& row_at, int rows, int64_t depth, typename Step<T>::Lane* tile) {
    using Lane = typename Step<T>::Lane;
    const int64_t steps = depth / Step<T>::kDepth;
    if (rows == 1) {
        std::memcpy(tile, row_at(0), steps * sizeof(Lane));
        return;
    }
    for (int row = 0; row < rows; ++row) {
        const char* from = reinterpret_cast<const char*>(row_at(row));
        for (int64_t step = 0; step < steps; ++step) {
            std::memcpy(tile + step * rows + row, from + step * sizeof(Lane), sizeof(Lane));
        }
    }
}

// Packs x [rows, depth] (rows ldx apart); returns the tiles: tile t begins at begin(t) * depth numbers.
template <class T>
typename Step<T>::Lane* pack_rows(ThreadPool& pool, Buffer& buffer, const T* x, int64_t ldx, int64_t rows, int64_t depth) {
    using Lane = typename Step<T>::Lane;
    const Tiles tiles(rows);
    const int64_t steps = depth / Step<T>::kDepth;
    Lane* packed = buffer.get<Lane>(rows * steps);
    pool.run(tiles.count, [&](int64_t tile, int) {
        const T* first = x + tiles.begin(tile) * ldx;
        pack_tile<T>([&](int row) { return first + row * ldx; }, tiles.size(tile), depth, packed + tiles.begin(tile) * steps);
    });
    return packed;
}

// ---- a whole product

// Where the elements of a product go: (c * scale + bias + residual), rounded once.
template <class T, class Out>
struct Target {
    Out* out;
    int64_t stride;
    const T* bias = nullptr;      // [N]
    const T* residual = nullptr;  // rows like `out`'s

    AMOE_INLINE void put_row(const float* c, const float* scales, int64_t row, int64_t column, int count) const {
        Out* to = out + row * stride + column;
        const T* add = residual == nullptr ? nullptr : residual + row * stride + column;
        if (count == kPanel && bias == nullptr) {
            for (int half = 0; half < kPanel; half += 16) {
                f32x16 value = load_f32(c + half);
                if (scales != nullptr) value = value * load_f32(scales + half);
                if (add != nullptr) value = value + load_f32(add + half);
                store_f32(to + half, value);
            }
            return;
        }
        for (int i = 0; i < count; ++i) {
            float value = scales == nullptr ? c[i] : c[i] * scales[i];
            if (bias != nullptr) value += first(bias[column + i]);
            if (add != nullptr) value += first(add[i]);
            put(to[i], value);
        }
    }
};

// An int8 panel as one of T, in memory of this thread.
template <class T>
AMOE_INLINE const char* widen_panel(const char* panel, int64_t depth) {
    using Lane = typename Step<T>::Lane;
    static thread_local Buffer room;
    Lane* wide = room.get<Lane>(depth / Step<T>::kDepth * kPanel);
    for (int64_t pair = 0; pair < depth / 2; ++pair) {
        if constexpr (Step<T>::kDepth == 2) {
            const Columns pairs = columns<T, true>(panel, pair);
            store(wide + pair * kPanel, pairs.low);
            store(wide + pair * kPanel + 16, pairs.high);
        } else {
            for (int half = 0; half < kPanel; half += 16) {
                const Columns pairs = split_pairs(panel + (pair * kPanel + half) * 2);
                store(wide + 2 * pair * kPanel + half, pairs.low);
                store(wide + (2 * pair + 1) * kPanel + half, pairs.high);
            }
        }
    }
    return reinterpret_cast<const char*>(wide);
}

// One panel times rows [begin, end) of tiles; `sink(c, tile)` takes the [size, 32] products.
template <class T, class Sink>
AMOE_INLINE void multiply_panel(
    const Weights& w, const char* panel, const char* next_panel, const Tiles& tiles, int64_t begin, int64_t end,
    const typename Step<T>::Lane* packed, Sink&& sink) {
    alignas(64) float c[kMaxRows * kPanel];
    const int64_t steps = w.depth / Step<T>::kDepth;
    // int8 weights are widened as they are multiplied, or once for several tiles; only pairs can be widened on the way.
    const bool is_widened = w.is_int8 && (end - begin > 1 || Step<T>::kDepth == 1);
    if (is_widened) panel = widen_panel<T>(panel, w.depth);
    for (int64_t tile = begin; tile < end; ++tile) {
        // The last pass over a panel fetches the next one; the passes before it read the caches.
        const char* ahead = tile + 1 == end ? next_panel : panel;
        const auto* rows = packed + tiles.begin(tile) * steps;
        if constexpr (Step<T>::kDepth == 2) {
            if (w.is_int8 && !is_widened) {
                multiply_rows<T, true>(tiles.size(tile), rows, panel, steps, c, ahead);
                sink(c, tile);
                continue;
            }
        }
        multiply_rows<T, false>(tiles.size(tile), rows, panel, steps, c, ahead);
        sink(c, tile);
    }
}

// Product of packed rows (see pack_rows) with w.
template <class T, class Out>
void multiply_packed(
    ThreadPool& pool, const Weights& w, const typename Step<T>::Lane* packed, int64_t rows, const Target<T, Out>& target) {
    const Tiles tiles(rows);
    const int64_t tiles_per_task = kRowsPerTask / kMaxRows, num_panels = amoe::AMOE_ISA::num_panels(w);
    const int64_t num_blocks = (tiles.count + tiles_per_task - 1) / tiles_per_task;
    pool.run(num_blocks * num_panels, [&](int64_t task, int) {
        const int64_t block = task / num_panels, index = task % num_panels;
        const int64_t column = index * kPanel, next = index + 1 < num_panels ? index + 1 : 0;
        const int count = static_cast<int>(std::min<int64_t>(kPanel, w.rows - column));
        const float* scales = w.scales == nullptr ? nullptr : w.scales + column;
        multiply_panel<T>(
            w, panel_at<T>(w, index), panel_at<T>(w, next), tiles, block * tiles_per_task,
            std::min(tiles.count, (block + 1) * tiles_per_task), packed, [&](const float* c, int64_t tile) {
                for (int row = 0; row < tiles.size(tile); ++row) {
                    target.put_row(c + row * kPanel, scales, tiles.begin(tile) + row, column, count);
                }
            });
    });
}

}  // namespace amoe::AMOE_ISA
