// Attention over the paged cache: decodes and prefill chunks of one batch in one parallel region.
//
// A context is cut into segments of 512 keys at fixed positions. In a segment a row's softmax is taken at once; the segments
// are then joined in their order. Decodes and prompts run the same code on the same cuts, every score and every sum of
// weighted values has one accumulator that runs in order: the bits of a row depend neither on the batch, nor on the number of
// threads, nor on the chunk in which its token came.
//
// bf16: products in bf16 pairs, weights of the values rounded to bf16; softmax and all sums in float32.
#pragma once

#include <atomic>

#include "kv_cache.h"
#include "norm.h"

namespace amoe::AMOE_ISA {

// A tile of rows and columns whose accumulators fill the registers.
constexpr int kTileRows = kMaxRows >= 8 ? 8 : 2;
constexpr int kTileAccumulators = 2 * kTileRows;
constexpr int columns_of(int rows) { return std::min<int>(kTileGroups, kTileAccumulators / rows); }

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kScoreStride = kSegment + 16;  // rows of a tile must not share a set of the cache

// ---- products

// Scores of kRows queries [padded_dim] and kGroups groups of keys, to s (rows kScoreStride apart). A stream, which memory must
// deliver, also fetches the values of these groups.
template <class T, bool kStream, int kRows, int kGroups>
__attribute__((noinline)) void score(
    const T* q, int64_t padded_dim, const T* const* keys, int64_t value_offset, float* s) {
    constexpr int64_t kDepth = Step<T>::kDepth;
    f32x16 acc[kRows][kGroups] = {};
    for (int64_t d = 0; d < padded_dim; d += kDepth) {
        f32x16 k[kGroups];
#pragma GCC unroll 8
        for (int group = 0; group < kGroups; ++group) {
            k[group] = load<f32x16>(keys[group] + d * kGroup);
            if constexpr (kStream) __builtin_prefetch(keys[group] + value_offset + d * kGroup, 0, 3);
        }
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            const auto lane = load<typename Step<T>::Lane>(q + row * padded_dim + d);
#pragma GCC unroll 8
            for (int group = 0; group < kGroups; ++group) acc[row][group] = multiply_add<T>(acc[row][group], lane, k[group]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int group = 0; group < kGroups; ++group) store(s + row * kScoreStride + group * kGroup, acc[row][group]);
    }
}

// All of num_groups groups, and whatever follows up to a whole tile: a few scores too many take no longer than a narrow tile.
template <class T, bool kStream, int kRows>
AMOE_INLINE void score_all(const T* q, int64_t padded_dim, const Segment<T>& segment, int64_t num_groups, float* s) {
    constexpr int kGroups = columns_of(kRows);
    for (int64_t group = 0; group < num_groups; group += kGroups) {
        score<T, kStream, kRows, kGroups>(q, padded_dim, segment.keys + group, segment.value_offset, s + group * kGroup);
    }
}

// out [kRows, padded_dim], kVectors * 16 dimensions from `d` on: values weighted by p (rows kScoreStride apart). A stream also
// fetches what comes next, which is as long.
template <class T, bool kStream, int kRows, int kVectors>
__attribute__((noinline)) void weigh(
    const T* p, const Segment<T>& segment, int64_t num_groups, int64_t padded_dim, int64_t d, float* out) {
    constexpr int64_t kDepth = Step<T>::kDepth;
    f32x16 acc[kRows][kVectors] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
        const T* v = segment.values[group] + d * kDepth;
        const T* ahead = segment.ahead[group] + d * kDepth;
        for (int64_t key = 0; key < kGroup; key += kDepth, v += padded_dim * kDepth, ahead += padded_dim * kDepth) {
            f32x16 lanes[kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                lanes[i] = load<f32x16>(v + i * 16 * kDepth);
                if constexpr (kStream) __builtin_prefetch(ahead + i * 16 * kDepth, 0, 3);
            }
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                const auto weight = load<typename Step<T>::Lane>(p + row * kScoreStride + group * kGroup + key);
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) acc[row][i] = multiply_add<T>(acc[row][i], weight, lanes[i]);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) store(out + row * padded_dim + d + i * 16, acc[row][i]);
    }
}

template <class T, bool kStream, int kRows, int kVectors = columns_of(kRows)>
AMOE_INLINE void weigh_all(const T* p, const Segment<T>& segment, int64_t num_groups, int64_t padded_dim, int64_t d, float* out) {
    for (; d + 16 * kVectors <= padded_dim; d += 16 * kVectors) {
        weigh<T, kStream, kRows, kVectors>(p, segment, num_groups, padded_dim, d, out);
    }
    if constexpr (kVectors > 1) weigh_all<T, kStream, kRows, kVectors / 2>(p, segment, num_groups, padded_dim, d, out);
}

// ---- softmax

// 2^x to 2 ulp, for x of at most 0 (or hardly more); not less than 2^-126. NaN stays NaN.
AMOE_INLINE f32x16 exp2(f32x16 x) {
    x = splat(-126.0f) > x ? splat(-126.0f) : x;
    const f32x16 shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the exponent, biased, stands in the low bits
    const f32x16 r = x - (shifted - 12583039.0f);
    f32x16 p = splat(1.3264727e-3f);
    p = p * r + 9.671513e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.93147e-1f;
    p = p * r + 1.0f;
    return p * (f32x16)((i32x16)shifted << 23);
}

// What a row has seen of its context: largest score, sum of 2^(score - largest), values weighted alike.
struct Part {
    float top, total;
    float* acc;  // [padded_dim]
};

// Weights 2^(s * scale - top) of the first `visible` scores of a row, zeros up to num_groups groups; gives top and total.
template <class T>
__attribute__((noinline)) Part soften(const float* s, int64_t visible, int64_t num_groups, float scale, T* p) {
    const int64_t whole = visible / kGroup * kGroup, num_keys = num_groups * kGroup;
    const i32x16 is_last = kLanes < static_cast<int32_t>(visible - whole);
    f32x16 tops = splat(-INFINITY);
    for (int64_t key = 0; key < whole; key += kGroup) tops = max(load<f32x16>(s + key), tops);
    if (whole < visible) tops = max(select(is_last, load<f32x16>(s + whole), splat(-INFINITY)), tops);
    const float top = largest(tops) * scale;
    f32x16 totals = {};
    const auto weights = [&](int64_t key) { return exp2(load<f32x16>(s + key) * scale - top); };
    for (int64_t key = 0; key < whole; key += kGroup) {
        const f32x16 e = weights(key);
        totals += e;
        store_f32(p + key, e);
    }
    if (whole < visible) {
        const f32x16 e = select(is_last, weights(whole), f32x16{});
        totals += e;
        store_f32(p + whole, e);
    }
    for (int64_t key = (visible + kGroup - 1) / kGroup * kGroup; key < num_keys; key += kGroup) store_f32(p + key, f32x16{});
    return {top, sum(totals), nullptr};
}

AMOE_INLINE float exp2_of(float x) { return exp2(splat(x))[0]; }

// Joins a row's next segment to those before it.
__attribute__((noinline)) inline void join(Part& whole, const Part& next, int64_t padded_dim) {
    const float top = next.top > whole.top ? next.top : whole.top;
    const float keep = exp2_of(whole.top - top), add = exp2_of(next.top - top);
    whole.total = whole.total * keep + next.total * add;
    whole.top = top;
    for (int64_t d = 0; d < padded_dim; d += 16) {
        store(whole.acc + d, load<f32x16>(whole.acc + d) * keep + load<f32x16>(next.acc + d) * add);
    }
}

template <class T>
__attribute__((noinline)) void put_row(const Part& whole, T* out, int64_t dim) {
    const float scale = 1.0f / whole.total;
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) store_f32(out + d, load<f32x16>(whole.acc + d) * scale);
    if (d < dim) store_part(out + d, load<f32x16>(whole.acc + d) * scale, dim - d);
}

// ---- rows and a segment

// A thread's memory.
template <class T>
struct Room {
    Buffer scores_buffer, weights_buffer, parts_buffer, segment_buffer, queries_buffer, state_buffer, stats_buffer;
    float* scores;  // [kTileRows, kScoreStride]
    T* weights;     // likewise
    float* parts;   // [kTileRows, padded_dim]
    T* segment;
    T* queries;    // [rows, padded_dim]
    float* state;  // [rows, padded_dim]
    Part* whole;   // [rows]

    void prepare(const AttentionShape& shape, int64_t rows, int64_t padded_dim) {
        scores = scores_buffer.get<float>(kTileRows * kScoreStride);
        weights = weights_buffer.get<T>(kTileRows * kScoreStride);
        parts = parts_buffer.get<float>(kTileRows * padded_dim);
        segment = segment_buffer.get<T>(segment_room(shape, padded_dim));
        queries = queries_buffer.get<T>(rows * padded_dim);
        state = state_buffer.get<float>(rows * padded_dim);
        whole = stats_buffer.get<Part>(rows);
    }
};

// Queries [rows, padded_dim] of one head of keys; row r sees the first first_visible + r / group keys of the context.
template <class T>
struct Rows {
    const T* queries;
    int64_t count, group, first_visible, padded_dim;
    float scale;  // of the scores, as exponents of 2

    int64_t visible(int64_t row) const { return first_visible + row / group; }
};

// kRows rows from `row` on, and the segment that begins at key `begin`; `sink(row, part)` takes what each of them sees.
template <class T, bool kStream, int kRows, class Sink>
AMOE_INLINE void attend_tile(
    const Rows<T>& rows, int64_t row, const Segment<T>& segment, int64_t begin, Room<T>& room, Sink&& sink) {
    const int64_t seen = std::min(kSegment, rows.visible(row + kRows - 1) - begin);
    if (seen <= 0) return;
    const int64_t num_groups = (seen + kGroup - 1) / kGroup;
    score_all<T, kStream, kRows>(rows.queries + row * rows.padded_dim, rows.padded_dim, segment, num_groups, room.scores);
    Part parts[kRows];
    for (int i = 0; i < kRows; ++i) {
        const int64_t visible = std::max<int64_t>(0, std::min(kSegment, rows.visible(row + i) - begin));
        T* weights = room.weights + i * kScoreStride;
        if (visible > 0) parts[i] = soften(room.scores + i * kScoreStride, visible, num_groups, rows.scale, weights);
        else std::memset(weights, 0, num_groups * kGroup * sizeof(T));
    }
    weigh_all<T, kStream, kRows>(room.weights, segment, num_groups, rows.padded_dim, 0, room.parts);
    for (int i = 0; i < kRows; ++i) {
        parts[i].acc = room.parts + i * rows.padded_dim;
        if (rows.visible(row + i) > begin) sink(row + i, parts[i]);
    }
}

// All rows and one segment, in tiles of kRows rows and then of fewer.
template <class T, bool kStream, int kRows = kTileRows, class Sink>
AMOE_INLINE void attend(
    const Rows<T>& rows, int64_t row, const Segment<T>& segment, int64_t begin, Room<T>& room, Sink&& sink) {
    for (; row + kRows <= rows.count; row += kRows) attend_tile<T, kStream, kRows>(rows, row, segment, begin, room, sink);
    if constexpr (kRows > 1) attend<T, kStream, kRows / 2>(rows, row, segment, begin, room, sink);
}

// ---- the batch

constexpr int64_t kTileQueries = 64;  // rows of a prefill task, so that its segment of keys is read from the cache

inline int64_t num_segments(int64_t context) { return (context + kSegment - 1) / kSegment; }

// One call of paged_attention: what its tasks share.
template <class T>
struct Attention {
    const AttentionShape& shape;
    const AttentionBatch& batch;
    const T* q;
    int64_t ldq;
    const T* kv_layer;
    T* out;
    int64_t group = shape.num_heads / shape.num_kv_heads;
    int64_t padded_dim = (shape.head_dim + 15) / 16 * 16;
    int64_t tokens_per_tile = std::max<int64_t>(1, kTileQueries / group);
    int64_t* first_task = nullptr;              // [num_decodes + num_chunks + 1] of each sequence
    float* parts = nullptr;                     // [decode tasks, group, padded_dim + 16]: acc, top, total
    std::atomic<int32_t>* num_done = nullptr;   // [num_decodes, Hkv] segments

    int64_t part_size() const { return padded_dim + 16; }

    int64_t num_tasks(int64_t sequence) const {
        if (sequence < batch.num_decodes) return shape.num_kv_heads * num_segments(batch.decode_lens[sequence]);
        const int64_t chunk = sequence - batch.num_decodes;
        const int64_t tokens = batch.chunk_end_row[chunk] - batch.chunk_start_row[chunk];
        return shape.num_kv_heads * ((tokens + tokens_per_tile - 1) / tokens_per_tile);
    }

    // Queries of a head of keys, of `tokens` rows of the batch, side by side.
    Rows<T> gather(int64_t first_row, int64_t tokens, int64_t head, int64_t first_visible, Room<T>& room) const {
        room.prepare(shape, tokens * group, padded_dim);
        for (int64_t i = 0; i < tokens * group; ++i) {
            const T* from = q + (first_row + i / group) * ldq + (head * group + i % group) * shape.head_dim;
            T* to = room.queries + i * padded_dim;
            std::memcpy(to, from, shape.head_dim * sizeof(T));
            std::memset(to + shape.head_dim, 0, (padded_dim - shape.head_dim) * sizeof(T));
        }
        return {room.queries, tokens * group, group, first_visible, padded_dim, shape.scale * kLog2E};
    }

    T* out_row(int64_t first_row, int64_t row, int64_t head) const {
        return out + ((first_row + row / group) * shape.num_heads + head * group + row % group) * shape.head_dim;
    }

    void decode(int64_t sequence, int64_t index, int64_t task, Room<T>& room) const {
        const int64_t context = batch.decode_lens[sequence], segments = num_segments(context);
        const int64_t head = index / segments, begin = index % segments * kSegment;
        const Rows<T> rows = gather(sequence, 1, head, context, room);
        Segment<T> segment;
        const int32_t* table = batch.decode_tables + sequence * batch.table_stride;
        find_segment(
            shape, kv_layer, table, head, begin, std::min(context, begin + kSegment), padded_dim, room.segment, segment);
        look_ahead(sequence, task + 1, segment);
        attend<T, true>(rows, 0, segment, begin, room, [&](int64_t row, const Part& part) {
            if (segments == 1) return put_row(part, out_row(sequence, row, head), shape.head_dim);
            float* to = parts + (task * group + row) * part_size();
            std::memcpy(to, part.acc, padded_dim * sizeof(float));
            to[padded_dim] = part.top;
            to[padded_dim + 1] = part.total;
        });
        if (segments == 1) return;
        const int32_t before = num_done[sequence * shape.num_kv_heads + head].fetch_add(1, std::memory_order_acq_rel);
        if (before + 1 == segments) join_segments(sequence, head, task - index % segments, segments);
    }

    // The keys of decode task `task`, if there is one, are what this thread probably reads next; it belongs to `sequence` or to
    // the one behind it.
    void look_ahead(int64_t sequence, int64_t task, Segment<T>& segment) const {
        if (task >= first_task[batch.num_decodes] || !is_grouped(shape)) return;
        if (task == first_task[sequence + 1]) ++sequence;
        const int64_t context = batch.decode_lens[sequence], segments = num_segments(context);
        const int64_t index = task - first_task[sequence], begin = index % segments * kSegment;
        const int32_t* table = batch.decode_tables + sequence * batch.table_stride;
        find_keys(
            shape, kv_layer, table, index / segments, begin, std::min(context, begin + kSegment), segment.ahead);
    }

    void join_segments(int64_t sequence, int64_t head, int64_t first, int64_t segments) const {
        for (int64_t row = 0; row < group; ++row) {
            const auto part = [&](int64_t segment) {
                float* acc = parts + ((first + segment) * group + row) * part_size();
                return Part{acc[padded_dim], acc[padded_dim + 1], acc};
            };
            Part whole = part(0);
            for (int64_t segment = 1; segment < segments; ++segment) join(whole, part(segment), padded_dim);
            put_row(whole, out_row(sequence, row, head), shape.head_dim);
        }
    }

    void prefill(int64_t chunk, int64_t index, Room<T>& room) const {
        const int64_t start = batch.chunk_start_row[chunk], end = batch.chunk_end_row[chunk];
        const int64_t tiles = (end - start + tokens_per_tile - 1) / tokens_per_tile;
        const int64_t head = index / tiles, first_row = start + index % tiles * tokens_per_tile;
        const int64_t tokens = std::min(tokens_per_tile, end - first_row);
        const int64_t first_visible = batch.chunk_context[chunk] - (end - first_row) + 1;
        const int64_t context = first_visible + tokens - 1;
        const Rows<T> rows = gather(first_row, tokens, head, first_visible, room);
        const int32_t* table = batch.chunk_tables + batch.chunk_table_start[chunk];
        for (int64_t begin = 0; begin < context; begin += kSegment) {
            Segment<T> segment;
            find_segment(
                shape, kv_layer, table, head, begin, std::min(context, begin + kSegment), padded_dim, room.segment, segment);
            attend<T, false>(rows, 0, segment, begin, room, [&](int64_t row, const Part& part) {
                if (begin > 0) return join(room.whole[row], part, padded_dim);
                room.whole[row] = {part.top, part.total, room.state + row * padded_dim};
                std::memcpy(room.whole[row].acc, part.acc, padded_dim * sizeof(float));
            });
        }
        for (int64_t row = 0; row < rows.count; ++row) {
            put_row(room.whole[row], out_row(first_row, row, head), shape.head_dim);
        }
    }
};

// out [n, Hq * D] = causal attention of q (rows ldq apart, Hq * D numbers each) over each row's context, whose keys and values
// (the rows' own too) are in kv_layer.
template <class T>
void paged_attention(
    ThreadPool& pool, const AttentionShape& shape, const T* q, int64_t ldq, const T* kv_layer, const AttentionBatch& batch,
    T* out) {
    static thread_local Buffer first_task, parts, num_done;
    const int64_t decodes = batch.num_decodes, sequences = decodes + batch.num_chunks;
    Attention<T> attention{shape, batch, q, ldq, kv_layer, out};
    int64_t* first = first_task.get<int64_t>(sequences + 1);
    attention.first_task = first;
    first[0] = 0;
    for (int64_t i = 0; i < sequences; ++i) first[i + 1] = first[i] + attention.num_tasks(i);
    if (first[decodes] > decodes * shape.num_kv_heads) {  // some context has several segments
        attention.parts = parts.get<float>(first[decodes] * attention.group * attention.part_size());
        attention.num_done = num_done.get<std::atomic<int32_t>>(decodes * shape.num_kv_heads);
        for (int64_t i = 0; i < decodes * shape.num_kv_heads; ++i) attention.num_done[i].store(0, std::memory_order_relaxed);
    }
    pool.run(first[sequences], [&](int64_t task, int) {
        static thread_local Room<T> room;
        const int64_t sequence = std::upper_bound(first, first + sequences + 1, task) - first - 1;
        const int64_t index = task - first[sequence];
        if (sequence < decodes) attention.decode(sequence, index, task, room);
        else attention.prefill(sequence - decodes, index, room);
    });
}

}  // namespace amoe::AMOE_ISA
