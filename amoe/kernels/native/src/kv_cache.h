// How keys and values lie in a layer of the paged cache: [num_blocks, Hkv, 2, block_size * D], keys before values.
//
// Attention reads 16 keys at a time, one per lane. So they are stored that way when they are written, once, instead of being
// turned at every step that reads them: a group of 16 keys is [D / depth][16][depth], a group of 16 values is
// [16 / depth][D][depth], where depth is what a lane covers: 2 bf16 or 1 float32. Blocks that are no multiple of 16, and heads
// that are none, lie in plain rows [block_size, D] and are regrouped when they are read: correct, not fast.
#pragma once

#include "attention_args.h"
#include "gemm.h"

namespace amoe::AMOE_ISA {

constexpr int64_t kGroup = 16;  // keys, a lane each

AMOE_INLINE bool is_grouped(const AttentionShape& shape) {
    return shape.block_size % kGroup == 0 && shape.head_dim % kGroup == 0;
}

// Numbers of the keys of a head in a block; as many values follow.
AMOE_INLINE int64_t slab_size(const AttentionShape& shape) { return shape.block_size * shape.head_dim; }

// The keys of a head in a block.
template <class T>
AMOE_INLINE T* keys_at(const AttentionShape& shape, T* layer, int64_t block, int64_t head) {
    return layer + (block * shape.num_kv_heads + head) * 2 * slab_size(shape);
}

template <class T>
AMOE_INLINE void put_grouped_key(T* group, int64_t lane, const T* key, int64_t dim) {
    constexpr int64_t kDepth = Step<T>::kDepth;
    for (int64_t d = 0; d < dim; d += kDepth) {
        std::memcpy(group + d * kGroup + lane * kDepth, key + d, kDepth * sizeof(T));
    }
}

template <class T>
AMOE_INLINE void put_grouped_value(T* group, int64_t lane, const T* value, int64_t dim, int64_t padded_dim) {
    constexpr int64_t kDepth = Step<T>::kDepth;
    T* to = group + lane / kDepth * padded_dim * kDepth + lane % kDepth;
    for (int64_t d = 0; d < dim; ++d) to[d * kDepth] = value[d];
}

// Writes a token's key and value [D] of one head.
template <class T>
AMOE_INLINE void write_token(
    const AttentionShape& shape, T* layer, int64_t slot, int64_t head, const T* key, const T* value) {
    const int64_t dim = shape.head_dim, offset = slot % shape.block_size;
    T* keys = keys_at(shape, layer, slot / shape.block_size, head);
    T* values = keys + slab_size(shape);
    if (is_grouped(shape)) {
        const int64_t group = offset / kGroup * kGroup * dim;
        put_grouped_key(keys + group, offset % kGroup, key, dim);
        put_grouped_value(values + group, offset % kGroup, value, dim, dim);
    } else {
        std::memcpy(keys + offset * dim, key, dim * sizeof(T));
        std::memcpy(values + offset * dim, value, dim * sizeof(T));
    }
}

constexpr int64_t kSegment = 512;  // keys whose softmax is taken together; a segment begins at a multiple of it
constexpr int64_t kSegmentGroups = kSegment / kGroup;
constexpr int64_t kTileGroups = 8;  // the most that are taken at once

// The groups of one segment of a sequence's keys and values, wherever they lie. Values behind the end are zeros: whatever a
// former user left in the block, a weight of zero makes nothing of it.
template <class T>
struct Segment {
    const T* keys[kSegmentGroups];  // behind the last group, it again, up to a multiple of kTileGroups
    const T* values[kSegmentGroups];
    const T* ahead[kSegmentGroups];  // keys that this thread probably reads next
    int64_t value_offset;            // from the keys of a group to its values
};

// Room that a Segment needs: numbers.
AMOE_INLINE int64_t segment_room(const AttentionShape& shape, int64_t padded_dim) {
    return is_grouped(shape) ? kGroup * padded_dim : 2 * kSegment * padded_dim;
}

// A group of which `count` values exist, with zeros for the others.
template <class T>
AMOE_INLINE void copy_part_of_values(const T* group, int64_t count, int64_t dim, T* to) {
    constexpr int64_t kDepth = Step<T>::kDepth;
    const int64_t whole = count / kDepth * kDepth * dim;
    std::memcpy(to, group, whole * sizeof(T));
    std::memset(to + whole, 0, (kGroup * dim - whole) * sizeof(T));
    if (count % kDepth == 0) return;
    for (int64_t d = 0; d < dim; ++d) to[whole + d * kDepth] = group[whole + d * kDepth];
}

// Where the groups of keys [begin, end) lie in grouped blocks.
template <class T>
AMOE_INLINE void find_keys(
    const AttentionShape& shape, const T* layer, const int32_t* table, int64_t head, int64_t begin, int64_t end,
    const T** keys) {
    int64_t index = begin / shape.block_size, offset = begin % shape.block_size;
    for (int64_t position = begin; position < end; ++index, offset = 0) {
        const T* block = keys_at(shape, layer, table[index], head);
        for (; offset < shape.block_size && position < end; offset += kGroup, position += kGroup) {
            *keys++ = block + offset * shape.head_dim;
        }
    }
}

// Keys and values [begin, end) of plain rows, put in groups in `room`.
template <class T>
inline void regroup(
    const AttentionShape& shape, const T* layer, const int32_t* table, int64_t head, int64_t begin, int64_t end,
    int64_t padded_dim, T* room, Segment<T>& segment) {
    const int64_t dim = shape.head_dim, block_size = shape.block_size;
    segment.value_offset = kSegment * padded_dim;
    std::memset(room, 0, 2 * segment.value_offset * sizeof(T));
    for (int64_t position = begin; position < end; ++position) {
        const T* key = keys_at(shape, layer, table[position / block_size], head) + position % block_size * dim;
        T* group = room + (position - begin) / kGroup * kGroup * padded_dim;
        put_grouped_key(group, position % kGroup, key, dim);
        put_grouped_value(group + segment.value_offset, position % kGroup, key + slab_size(shape), dim, padded_dim);
    }
    for (int64_t index = 0; index < kSegmentGroups; ++index) {
        segment.keys[index] = segment.ahead[index] = room + index * kGroup * padded_dim;
        segment.values[index] = segment.keys[index] + segment.value_offset;
    }
}

// Keys and values [begin, end) of a sequence, begin a multiple of kSegment, end - begin at most kSegment. Nothing ahead.
template <class T>
AMOE_INLINE void find_segment(
    const AttentionShape& shape, const T* layer, const int32_t* table, int64_t head, int64_t begin, int64_t end,
    int64_t padded_dim, T* room, Segment<T>& segment) {
    if (!is_grouped(shape)) return regroup(shape, layer, table, head, begin, end, padded_dim, room, segment);
    find_keys(shape, layer, table, head, begin, end, segment.keys);
    segment.value_offset = slab_size(shape);
    const int64_t num_groups = (end - begin + kGroup - 1) / kGroup;
    for (int64_t index = 0; index < num_groups; ++index) {
        segment.values[index] = segment.keys[index] + segment.value_offset;
        segment.ahead[index] = segment.keys[index];
    }
    for (int64_t index = num_groups; index % kTileGroups != 0; ++index) segment.keys[index] = segment.keys[num_groups - 1];
    if ((end - begin) % kGroup == 0) return;
    copy_part_of_values(segment.values[num_groups - 1], (end - begin) % kGroup, shape.head_dim, room);
    segment.values[num_groups - 1] = room;
}

}  // namespace amoe::AMOE_ISA
