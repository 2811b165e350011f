// Sixteen lanes, written once for every instruction set: GCC lowers these vectors to what the target has.
//
// Included by each isa_*.cpp behind its `#pragma GCC target`, inside a namespace of its own: the same function compiled for
// two instruction sets must not be merged by the linker.
#pragma once

#include "includes.h"

namespace amoe::AMOE_ISA {

using bf16 = uint16_t;
typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

#define AMOE_INLINE inline __attribute__((always_inline))

template <class V>
AMOE_INLINE V load(const void* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(V));
    return v;
}

template <class V>
AMOE_INLINE void store(void* to, V v) {
    __builtin_memcpy(to, &v, sizeof(V));
}

AMOE_INLINE f32x16 splat(float x) { return f32x16{} + x; }
AMOE_INLINE u32x16 splat_u32(uint32_t x) { return u32x16{} + x; }

AMOE_INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even, as the hardware does; NaN stays NaN.
AMOE_INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 16 numbers of memory as floats.
AMOE_INLINE f32x16 load_f32(const bf16* from) {
    const u32x16 wide = __builtin_convertvector(load<u16x16>(from), u32x16) << 16;
    return (f32x16)wide;
}
AMOE_INLINE f32x16 load_f32(const float* from) { return load<f32x16>(from); }

AMOE_INLINE u16x16 round_bf16(f32x16 v) {
#if AMOE_HAS_BF16
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    const u32x16 bits = (u32x16)v;
    const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32x16 is_nan = (u32x16)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan), u16x16);
#endif
}

AMOE_INLINE void store_f32(bf16* to, f32x16 v) { store(to, round_bf16(v)); }
AMOE_INLINE void store_f32(float* to, f32x16 v) { store(to, v); }

AMOE_INLINE float first(bf16 x) { return to_float(x); }
AMOE_INLINE float first(float x) { return x; }
AMOE_INLINE void put(bf16& to, float x) { to = to_bf16(x); }
AMOE_INLINE void put(float& to, float x) { to = x; }

// acc + a.lo * w.lo + a.hi * w.hi, where a and w hold a pair of bf16 in each lane.
AMOE_INLINE f32x16 dot_pairs(f32x16 acc, u32x16 a, u32x16 w) {
#if AMOE_HAS_BF16
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)w);
#else
    acc += (f32x16)(a << 16) * (f32x16)(w << 16);
    return acc + (f32x16)(a & 0xffff0000u) * (f32x16)(w & 0xffff0000u);
#endif
}

AMOE_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }
AMOE_INLINE f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
AMOE_INLINE f32x8 low_half(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
AMOE_INLINE f32x8 high_half(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
AMOE_INLINE f32x4 low_half(f32x8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
AMOE_INLINE f32x4 high_half(f32x8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
#else
AMOE_INLINE f32x8 low_half(f32x16 v) { return load<f32x8>(&v); }
AMOE_INLINE f32x8 high_half(f32x16 v) { return load<f32x8>(reinterpret_cast<const float*>(&v) + 8); }
AMOE_INLINE f32x4 low_half(f32x8 v) { return load<f32x4>(&v); }
AMOE_INLINE f32x4 high_half(f32x8 v) { return load<f32x4>(reinterpret_cast<const float*>(&v) + 4); }
#endif

// A fixed tree, halves onto each other, so that the sum of a row never depends on anything but the row. In registers: an
// accumulator whose address is taken would live in memory during the whole loop before.
template <class F>
AMOE_INLINE float fold(f32x16 v, F&& combine) {
    const f32x8 eight = combine(low_half(v), high_half(v));
    const f32x4 four = combine(low_half(eight), high_half(eight));
    return combine(combine(four[0], four[2]), combine(four[1], four[3]));
}
AMOE_INLINE float sum(f32x16 v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}
AMOE_INLINE float largest(f32x16 v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to 2 ulp: 2^n * p(r), r in [-ln2/2, ln2/2]. 0 below -87.3 (-inf too), capped above 88.
AMOE_INLINE f32x16 exp(f32x16 x) {
    const i32x16 is_zero = x < -87.3f;
    x = select(x > 88.0f, splat(88.0f), x);
    x = select(is_zero, splat(0.0f), x);
    const f32x16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    const f32x16 n = shifted - 12582912.0f;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const i32x16 power = ((i32x16)shifted - 0x4b400000 + 127) << 23;
    return select(is_zero, splat(0.0f), p * (f32x16)power);
}

// 1 / x to 1 ulp, for x in [1, 2^126], and 0 at worst beyond it, which is what silu wants there: a division occupies the unit
// for as long as ten products.
AMOE_INLINE f32x16 reciprocal(f32x16 x) {
#if defined(__AVX512F__)
    const f32x16 rough = (f32x16)_mm512_rcp14_ps((__m512)x);
    return rough * (2.0f - x * rough);
#else
    return 1.0f / x;
#endif
}

AMOE_INLINE f32x16 silu(f32x16 x) { return x * reciprocal(1.0f + exp(-x)); }

}  // namespace amoe::AMOE_ISA
