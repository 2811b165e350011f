// What the attention kernels are called with: plain structures, the same for every instruction set.
#pragma once

#include <cstdint>

namespace amoe {

enum QKNorm : int { kNoQKNorm = 0, kHeadQKNorm = 1, kFullQKNorm = 2 };  // weights of a head [D], of all heads [heads * D]

// The attention blocks of a model and the KV cache that they read; see kv_cache.h for how a block is laid out.
struct AttentionShape {
    int64_t num_heads, num_kv_heads, head_dim;  // head_dim is even
    int64_t block_size;
    int qk_norm;
    float eps;    // of that norm
    float clip;   // queries, keys and values are clamped to [-clip, clip]; <= 0: they are not
    float scale;  // factor of the scores, > 0
};

// Where the rows of a batch stand: rows [0, num_decodes) are sequences of one new token each, chunks of prompts follow.
// A chunk's last row is the last token of its context.
struct AttentionBatch {
    int64_t num_decodes;
    const int32_t* decode_tables;  // [num_decodes, table_stride] blocks
    int64_t table_stride;
    const int64_t* decode_lens;  // [num_decodes] tokens of context, the new one included
    int64_t num_chunks;
    const int64_t* chunk_start_row;    // [num_chunks]
    const int64_t* chunk_end_row;      // [num_chunks]
    const int64_t* chunk_context;      // [num_chunks] tokens of context up to and including the chunk
    const int32_t* chunk_tables;       // the blocks of the first chunk, of the second, and so on
    const int64_t* chunk_table_start;  // [num_chunks] where each chunk's begin in there
};

}  // namespace amoe
