// Memory of a worker's kernels between their steps: each buffer grows to what was needed most, and stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace amoe {

class Buffer {
public:
    Buffer() = default;
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Room for `count` T; what was in it is lost when it has to grow.
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(kAlign, bytes);
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

private:
    static constexpr size_t kAlign = 64;
    void* data_ = nullptr;
    size_t size_ = 0;
};

// One per pool: kernels that share a pool run one after the other.
struct Scratch {
    Buffer rows;       // packed rows of a product
    Buffer hidden;     // normalised rows, queries, keys and values
    Buffer attended;   // what attention gives
    Buffer activated;  // packed activations between gate-up and down
    Buffer products;   // [pairs, H] weighted outputs of the experts
    Buffer logits;     // of the router
    Buffer order;      // pairs sorted by expert
    Buffer factors;    // of the tokens of an MLP
    Buffer residual;   // between the blocks of a layer
    Buffer normed;     // what its experts get
    Buffer weights;    // of its chosen experts
};

}  // namespace amoe
