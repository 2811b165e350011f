// Rows of a matrix into the panels of gemm.h. For no instruction set in particular: it is bound by memory.
#pragma once

#include <algorithm>
#include <cstdint>

namespace amoe {

// Panels of lanes 0..15 from `low` and 16..31 from `high`, `rows_per_panel` rows further on in each panel.
//
// Lane is what one lane of a product takes in one step: two bf16, two int8, or a float. `low` and `high` have `low_rows` and
// `high_rows` rows of `steps` lanes; what lies behind them becomes zero.
template <class Lane>
void pack_panels(
    const Lane* low, int64_t low_rows, const Lane* high, int64_t high_rows, int64_t rows_per_panel, int64_t steps,
    int64_t num_panels, Lane* out) {
    constexpr int64_t kHalf = 16, kBlock = 64 / sizeof(Lane);  // a cache line of each row at a time
    for (int64_t panel = 0; panel < num_panels; ++panel) {
        Lane* to = out + panel * steps * 2 * kHalf;
        for (int64_t begin = 0; begin < steps; begin += kBlock) {
            const int64_t end = std::min(steps, begin + kBlock);
            for (int64_t lane = 0; lane < 2 * kHalf; ++lane) {
                const bool is_low = lane < kHalf;
                const int64_t row = panel * rows_per_panel + lane % kHalf;
                const bool exists = row < (is_low ? low_rows : high_rows);
                const Lane* from = (is_low ? low : high) + row * steps;
                for (int64_t step = begin; step < end; ++step) to[step * 2 * kHalf + lane] = exists ? from[step] : Lane{};
            }
        }
    }
}

}  // namespace amoe
