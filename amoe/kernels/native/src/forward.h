// All layers of a model in one call, for a worker that holds it whole.
#pragma once

#include <atomic>
#include <vector>

#include "args.h"
#include "kernels.h"

namespace amoe {

// See ForwardArgs. `number_bytes`: of an activation. `progress` goes up by one with each layer that is through.
void forward(
    const KernelsOf& kernels, ThreadPool& pool, Scratch& scratch, const std::vector<const LayerBlocks*>& layers,
    int64_t number_bytes, const ForwardArgs& args, std::atomic<int64_t>& progress);

}  // namespace amoe
