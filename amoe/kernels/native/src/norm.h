// RMSNorm: in float32, rounded once.
#pragma once

#include "vec.h"

namespace amoe::AMOE_ISA {

constexpr i32x16 kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The first `count` < 16 numbers, then zeros.
template <class T>
AMOE_INLINE f32x16 load_part(const T* from, int64_t count) {
    float lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = first(from[i]);
    return load<f32x16>(lanes);
}

template <class T>
AMOE_INLINE void store_part(T* to, f32x16 v, int64_t count) {
    float lanes[16];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) put(to[i], lanes[i]);
}

// 1 / sqrt(mean(x^2) + eps) of x [width].
template <class T>
__attribute__((noinline)) float inverse_rms(const T* x, float eps, int64_t width) {
    f32x16 squares[4] = {};
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const f32x16 v = load_f32(x + i + 16 * part);
            squares[part] += v * v;
        }
    }
    for (; i < width; i += 16) {
        const f32x16 v = width - i >= 16 ? load_f32(x + i) : load_part(x + i, width - i);
        squares[0] += v * v;
    }
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

// out = x / rms(x) * weight for one row [width]; a null weight is all ones. out may be x.
template <class T>
__attribute__((noinline)) void rms_norm_row(const T* x, const T* weight, float eps, T* out, int64_t width) {
    const float scale = inverse_rms(x, eps, width);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        f32x16 v = load_f32(x + i) * scale;
        if (weight != nullptr) v = v * load_f32(weight + i);
        store_f32(out + i, v);
    }
    if (i == width) return;
    f32x16 v = load_part(x + i, width - i) * scale;
    if (weight != nullptr) v = v * load_part(weight + i, width - i);
    store_part(out + i, v, width - i);
}

// rms_norm_row of n rows, ldx and ldo apart.
template <class T>
void rms_norm(
    ThreadPool& pool, const T* x, int64_t ldx, const T* weight, float eps, T* out, int64_t ldo, int64_t n, int64_t width) {
    constexpr int64_t kNumbersPerTask = 8192;  // a microsecond: less is not worth waking a thread for
    const int64_t rows = std::max<int64_t>(1, kNumbersPerTask / width);
    pool.run((n + rows - 1) / rows, [&](int64_t task, int) {
        for (int64_t row = task * rows; row < std::min(n, (task + 1) * rows); ++row) {
            rms_norm_row(x + row * ldx, weight, eps, out + row * ldo, width);
        }
    });
}

}  // namespace amoe::AMOE_ISA
