// The kernels for any processor.
#include "includes.h"
#include "kernels.h"

#define AMOE_ISA generic
#define AMOE_MAX_ROWS 2
#define AMOE_HAS_BF16 0
#include "table.h"

namespace amoe {
namespace {
bool is_supported() { return true; }
}  // namespace

extern const Kernels generic_kernels;
const Kernels generic_kernels{
    "generic", is_supported, generic::kernels_of<generic::bf16>(), generic::kernels_of<float>(), generic::argmax};

}  // namespace amoe

