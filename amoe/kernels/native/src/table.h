// Fills the table of one instruction set. The last thing that an isa_*.cpp includes.
#pragma once

#include "block.h"
#include "experts.h"
#include "kernels.h"
#include "parts.h"

namespace amoe::AMOE_ISA {

template <class T>
void run_linear(ThreadPool& pool, Scratch& scratch, const LinearArgs& args) {
    args.is_float_out ? run_linear_to<T, float>(pool, scratch, args) : run_linear_to<T, T>(pool, scratch, args);
}

template <class T, class Out>
void run_experts_to(ThreadPool& pool, Scratch& scratch, const Experts& e, const ExpertsArgs& a) {
    experts<T, Out>(
        pool, scratch, e, static_cast<const T*>(a.x), a.rows, a.n, a.ids, a.weights, a.top_k, a.local_index,
        static_cast<const T*>(a.residual), static_cast<Out*>(a.out));
}

template <class T>
void run_experts(ThreadPool& pool, Scratch& scratch, const Experts& e, const ExpertsArgs& a) {
    a.residual == nullptr ? run_experts_to<T, float>(pool, scratch, e, a) : run_experts_to<T, T>(pool, scratch, e, a);
}

template <class T>
constexpr KernelsOf kernels_of() {
    return {run_linear<T>, run_experts<T>, run_attention<T>, parts_of<T>()};
}

}  // namespace amoe::AMOE_ISA
