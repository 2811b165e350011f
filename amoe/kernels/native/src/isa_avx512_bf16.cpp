// The kernels for x86 with AVX-512 and bf16 products (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "includes.h"
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define AMOE_ISA avx512_bf16
#define AMOE_MAX_ROWS 12
#define AMOE_HAS_BF16 1
#include "table.h"

namespace amoe {
namespace {
bool is_supported() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"); }
}  // namespace

extern const Kernels avx512_bf16_kernels;
const Kernels avx512_bf16_kernels{
    "avx512_bf16", is_supported, avx512_bf16::kernels_of<avx512_bf16::bf16>(), avx512_bf16::kernels_of<float>(), avx512_bf16::argmax};

}  // namespace amoe
#endif
