#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace amoe {
namespace {

// Longer than the gaps between the kernels of a step, shorter than what another process would miss.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPausesPerLook = 64;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `is_over()`; false: it was not over in time.
template <class F>
bool spin(F&& is_over) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < kPausesPerLook; ++i) {
            if (is_over()) return true;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < until);
    return is_over();
}

void pin_to(int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // refused: it stays where the system puts it
#else
    (void)cpu;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus)
    : num_threads_(std::max(1, num_threads)), ranges_(new Range[std::max(1, num_threads)]) {
    const auto cpu_of = [&](int thread) { return thread < static_cast<int>(cpus.size()) ? cpus[thread] : -1; };
    try {
        for (int thread = 1; thread < num_threads_; ++thread) {
            threads_.emplace_back([this, thread, cpu = cpu_of(thread)] { live(thread, cpu); });
        }
    } catch (...) {  // the system gives no more
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stopped_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run_erased(int64_t num_tasks, Task task, void* context) noexcept {
    if (num_threads_ == 1 || num_tasks <= 1) {
        for (int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
        return;
    }
    for (int thread = 0; thread < num_threads_; ++thread) {
        ranges_[thread].next.store(num_tasks * thread / num_threads_, std::memory_order_relaxed);
        ranges_[thread].end = num_tasks * (thread + 1) / num_threads_;
    }
    task_ = task;
    context_ = context;
    num_busy_.store(num_threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    work(0);
    while (!spin([this] { return num_busy_.load(std::memory_order_acquire) == 0; })) std::this_thread::yield();
}

void ThreadPool::work(int thread) noexcept {
    for (int distance = 0; distance < num_threads_; ++distance) {
        Range& range = ranges_[(thread + distance) % num_threads_];
        for (;;) {
            const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
            if (task >= range.end) break;
            task_(context_, task, thread);
        }
    }
}

void ThreadPool::live(int thread, int cpu) {
    if (cpu >= 0) pin_to(cpu);
    uint32_t seen = 0;
    for (;;) {
        const auto has_work = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
        if (!spin(has_work)) epoch_.wait(seen, std::memory_order_acquire);
        if (!has_work()) continue;
        ++seen;
        if (stopped_.load()) return;
        work(thread);
        num_busy_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace amoe
