#include "forward.h"

#include <chrono>
#include <cstring>
#include <utility>

namespace amoe {
namespace {

// Moves rows `wanted` (ascending) of `table` to its beginning.
void compact(void* table, const int64_t* wanted, int64_t count, int64_t row_bytes) {
    char* rows = static_cast<char*>(table);
    for (int64_t i = 0; i < count; ++i) std::memmove(rows + i * row_bytes, rows + wanted[i] * row_bytes, row_bytes);
}

class Stopwatch {
public:
    double lap() {
        const auto now = std::chrono::steady_clock::now();
        const double seconds = std::chrono::duration<double>(now - since_).count();
        since_ = now;
        return seconds;
    }

private:
    std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

}  // namespace

void forward(
    const KernelsOf& kernels, ThreadPool& pool, Scratch& scratch, const std::vector<const LayerBlocks*>& layers,
    int64_t number_bytes, const ForwardArgs& a, std::atomic<int64_t>& progress) {
    const int64_t row_bytes = layers[0]->attention.qkv.depth * number_bytes, num_layers = static_cast<int64_t>(layers.size());
    void* before = a.residual;
    void* behind = scratch.residual.get<char>(a.n * row_bytes);
    void* normed = scratch.normed.get<char>(a.n * row_bytes);
    Stopwatch watch;
    for (int64_t index = 0; index < num_layers; ++index) {
        const LayerBlocks& layer = *layers[index];
        const bool is_last = index + 1 == num_layers;
        const int64_t top_k = layer.attention.top_k, n = is_last ? a.num_wanted : a.n;
        int64_t* ids = a.ids + index * a.n * top_k;
        float* weights = scratch.weights.get<float>(a.n * top_k);
        kernels.attention(
            pool, scratch, layer.attention,
            {before, a.n, a.positions, a.slots, layer.kv_layer, a.batch, behind, normed, ids, weights, nullptr});
        if (is_last && a.wanted != nullptr) {
            compact(behind, a.wanted, n, row_bytes);
            compact(normed, a.wanted, n, row_bytes);
            compact(weights, a.wanted, n, top_k * sizeof(float));
            compact(ids, a.wanted, n, top_k * sizeof(int64_t));
        }
        a.seconds[2 * index] = watch.lap();
        void* to = is_last ? a.out : before;
        if (layer.experts.count > 0) {
            kernels.experts(
                pool, scratch, layer.experts,
                {normed, nullptr, n, ids, weights, top_k, layer.local_index, behind, to});
        } else if (is_last) {
            std::memcpy(to, behind, n * row_bytes);
        } else {
            std::swap(before, behind);
        }
        a.seconds[2 * index + 1] = watch.lap();
        progress.fetch_add(1, std::memory_order_relaxed);
    }
}

}  // namespace amoe
