// The kernels for x86 with AVX-512 but without bf16 products (Skylake, Ice Lake).
#include "includes.h"
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#define AMOE_ISA avx512
#define AMOE_MAX_ROWS 12
#define AMOE_HAS_BF16 0
#include "table.h"

namespace amoe {
namespace {
bool is_supported() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); }
}  // namespace

extern const Kernels avx512_kernels;
const Kernels avx512_kernels{
    "avx512", is_supported, avx512::kernels_of<avx512::bf16>(), avx512::kernels_of<float>(), avx512::argmax};

}  // namespace amoe
#endif
