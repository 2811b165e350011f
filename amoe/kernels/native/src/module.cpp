// The Python module `amoe.kernels.native._native`. Addresses of tensors come as integers: no torch in here, so one build fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "kernels.h"
#include "pack.h"

namespace py = pybind11;

namespace amoe {
namespace {

using Address = uintptr_t;

// Of what Python calls here; raise it with every change of a name or an argument, and the one in __init__.py with it.
constexpr int kInterface = 2;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Fastest last.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found{&generic_kernels};
#if defined(__x86_64__)
    for (const Kernels* kernels : {&avx2_kernels, &avx512_kernels, &avx512_bf16_kernels}) {
        if (kernels->is_supported()) found.push_back(kernels);
    }
#endif
    return found;
}

// Kernels of one instruction set with the threads and the memory that they use. Not for several callers at a time.
class Context {
public:
    Context(const std::string& isa, int num_threads, std::vector<int> cpus, bool is_bf16)
        : is_bf16_(is_bf16),
          kernels_(find(isa)),
          of_(is_bf16 ? kernels_.of_bf16 : kernels_.of_float),
          pool_(num_threads, std::move(cpus)) {}

    int num_threads() const { return pool_.num_threads(); }

    // Layers that `forward` has gone through since the beginning. For any thread at any time.
    int64_t progress() const { return progress_.load(std::memory_order_relaxed); }

    void linear(
        Address x, int64_t x_stride, int64_t n, Address norm, float eps, const Weights& weights, Address bias,
        Address residual, Address out, int64_t out_stride, bool is_float_out) {
        of_.linear(
            pool_, scratch_,
            {at<void>(x), x_stride, n, at<void>(norm), eps, weights, at<void>(bias), at<void>(residual), at<void>(out),
             out_stride, is_float_out});
    }

    void attention(
        const AttentionLayer& layer, const AttentionBatch& batch, Address residual, int64_t n, Address positions, Address slots,
        Address kv_layer, Address out, Address normed, Address ids, Address weights, Address scores) {
        of_.attention(
            pool_, scratch_, layer,
            {at<void>(residual), n, at<int64_t>(positions), at<int64_t>(slots), at<void>(kv_layer), batch, at<void>(out),
             at<void>(normed), at<int64_t>(ids), at<float>(weights), at<float>(scores)});
    }

    void rms_norm(
        Address x, int64_t ldx, Address weight, float eps, Address out, int64_t ldo, int64_t n, int64_t width) {
        of_.parts.rms_norm(pool_, at<void>(x), ldx, at<void>(weight), eps, at<void>(out), ldo, n, width);
    }

    void qk_rope_write(
        const AttentionShape& shape, Address q_norm, Address k_norm, Address qkv, int64_t n, Address positions,
        Address rope_table, Address slots, Address kv_layer) {
        of_.parts.qk_rope_write(
            pool_, shape, at<void>(q_norm), at<void>(k_norm), at<void>(qkv), n, at<int64_t>(positions), at<float>(rope_table),
            at<int64_t>(slots), at<void>(kv_layer));
    }

    void paged_attention(
        const AttentionShape& shape, Address q, int64_t ldq, Address kv_layer, const AttentionBatch& batch, Address out) {
        of_.parts.paged_attention(pool_, shape, at<void>(q), ldq, at<void>(kv_layer), batch, at<void>(out));
    }

    void route(
        Address logits, int64_t n, int64_t num_experts, int64_t top_k, bool normalise, bool round_to_t, Address ids,
        Address weights, Address scores) {
        of_.parts.route(
            pool_, at<float>(logits), n, num_experts, top_k, normalise, round_to_t, at<int64_t>(ids), at<float>(weights),
            at<float>(scores));
    }

    void forward(
        const std::vector<const LayerBlocks*>& layers, const AttentionBatch& batch, Address residual, int64_t n,
        Address positions, Address slots, Address wanted, int64_t num_wanted, Address out, Address ids, Address seconds) {
        amoe::forward(
            of_, pool_, scratch_, layers, is_bf16_ ? 2 : 4,
            {at<void>(residual), n, at<int64_t>(positions), at<int64_t>(slots), batch, at<int64_t>(wanted), num_wanted,
             at<void>(out), at<int64_t>(ids), at<double>(seconds)},
            progress_);
    }

    void argmax(Address logits, int64_t n, int64_t vocab_size, Address ids) {
        kernels_.argmax(pool_, at<float>(logits), n, vocab_size, at<int64_t>(ids));
    }

    void experts(
        const Experts& experts, Address x, Address rows, int64_t n, Address ids, Address weights, int64_t top_k,
        Address local_index, Address residual, Address out) {
        of_.experts(
            pool_, scratch_, experts,
            {at<void>(x), at<int64_t>(rows), n, at<int64_t>(ids), at<float>(weights), top_k, at<int64_t>(local_index),
             at<void>(residual), at<void>(out)});
    }

private:
    static const Kernels& find(const std::string& isa) {
        for (const Kernels* kernels : supported()) {
            if (isa == kernels->name) return *kernels;
        }
        throw std::invalid_argument("this processor has no instruction set " + isa);
    }

    const bool is_bf16_;
    const Kernels& kernels_;
    const KernelsOf& of_;
    ThreadPool pool_;
    Scratch scratch_;
    std::atomic<int64_t> progress_{0};
};

Weights make_weights(Address data, Address scales, int64_t rows, int64_t depth, bool is_int8) {
    return {at<void>(data), at<float>(scales), rows, depth, is_int8};
}

Experts make_experts(
    const Weights& w13, const Weights& w2, int64_t count, int64_t hidden, int64_t intermediate, int64_t w13_bytes,
    int64_t w2_bytes, int64_t w13_scales, int64_t w2_scales) {
    return {w13, w2, count, hidden, intermediate, w13_bytes, w2_bytes, w13_scales, w2_scales};
}

AttentionShape make_shape(
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int qk_norm, float eps, float clip,
    float scale) {
    return {num_heads, num_kv_heads, head_dim, block_size, qk_norm, eps, clip, scale};
}

AttentionLayer make_layer(
    const AttentionShape& shape, float eps, Address input_norm, Address post_norm, Address qkv_bias, Address q_norm,
    Address k_norm, Address rope_table, const Weights& qkv, const Weights& out, const Weights* router, int64_t top_k,
    bool normalises, bool rounds, const Experts* mlp, Address mlp_gate) {
    return {shape, eps, at<void>(input_norm), at<void>(post_norm), at<void>(qkv_bias), at<void>(q_norm), at<void>(k_norm),
            at<float>(rope_table), qkv, out, router == nullptr ? Weights{} : *router, top_k, normalises, rounds,
            mlp == nullptr ? Experts{} : *mlp, at<void>(mlp_gate)};
}

LayerBlocks make_blocks(const AttentionLayer& attention, const Experts* experts, Address local_index, Address kv_layer) {
    return {attention, experts == nullptr ? Experts{} : *experts, at<int64_t>(local_index), at<void>(kv_layer)};
}

AttentionBatch make_batch(
    int64_t num_decodes, Address decode_tables, int64_t table_stride, Address decode_lens, int64_t num_chunks,
    Address chunk_start_row, Address chunk_end_row, Address chunk_context, Address chunk_tables, Address chunk_table_start) {
    return {num_decodes, at<int32_t>(decode_tables), table_stride, at<int64_t>(decode_lens), num_chunks,
            at<int64_t>(chunk_start_row), at<int64_t>(chunk_end_row), at<int64_t>(chunk_context), at<int32_t>(chunk_tables),
            at<int64_t>(chunk_table_start)};
}

void pack(
    Address low, int64_t low_rows, Address high, int64_t high_rows, int64_t rows_per_panel, int64_t steps, int64_t num_panels,
    Address out, int64_t lane_bytes) {
    const auto run = [&](auto lane) {
        using Lane = decltype(lane);
        pack_panels<Lane>(at<Lane>(low), low_rows, at<Lane>(high), high_rows, rows_per_panel, steps, num_panels, at<Lane>(out));
    };
    lane_bytes == 4 ? run(uint32_t{}) : run(uint16_t{});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    m.attr("INTERFACE") = kInterface;
    m.def("supported", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : supported()) names.push_back(kernels->name);
        return names;
    });
    m.def("pack", &pack, Unlocked());
    py::class_<Weights>(m, "Weights").def(py::init(&make_weights));
    py::class_<Experts>(m, "Experts").def(py::init(&make_experts));
    py::class_<AttentionShape>(m, "AttentionShape").def(py::init(&make_shape));
    py::class_<AttentionLayer>(m, "AttentionLayer").def(py::init(&make_layer));
    py::class_<LayerBlocks>(m, "LayerBlocks").def(py::init(&make_blocks));
    py::class_<AttentionBatch>(m, "AttentionBatch").def(py::init(&make_batch));
    py::class_<Context>(m, "Context")
        .def(py::init<const std::string&, int, std::vector<int>, bool>())
        .def_property_readonly("num_threads", &Context::num_threads)
        .def_property_readonly("progress", &Context::progress)
        .def("linear", &Context::linear, Unlocked())
        .def("experts", &Context::experts, Unlocked())
        .def("attention", &Context::attention, Unlocked())
        .def("forward", &Context::forward, Unlocked())
        .def("rms_norm", &Context::rms_norm, Unlocked())
        .def("qk_rope_write", &Context::qk_rope_write, Unlocked())
        .def("paged_attention", &Context::paged_attention, Unlocked())
        .def("route", &Context::route, Unlocked())
        .def("argmax", &Context::argmax, Unlocked());
}

}  // namespace amoe
