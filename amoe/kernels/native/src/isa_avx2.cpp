// The kernels for x86 with AVX2 and FMA.
#include "includes.h"
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define AMOE_ISA avx2
#define AMOE_MAX_ROWS 3
#define AMOE_HAS_BF16 0
#include "table.h"

namespace amoe {
namespace {
bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

extern const Kernels avx2_kernels;
const Kernels avx2_kernels{
    "avx2", is_supported, avx2::kernels_of<avx2::bf16>(), avx2::kernels_of<float>(), avx2::argmax};

}  // namespace amoe
#endif
