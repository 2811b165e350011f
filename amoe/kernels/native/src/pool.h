// The threads of one worker: they share out the tasks of a kernel and meet at its end.
//
// Between kernels of a step they spin for some microseconds, because waking a thread takes longer than most kernels;
// then they park, so that an idle server costs nothing. The calling thread works too.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace amoe {

class ThreadPool {
public:
    // `cpus`: the CPU of each thread, the caller's first; empty: the system decides. The caller's own thread stays where it
    // may run already: threads that it starts later would share its one CPU, and the others leave that one free.
    // Throws std::system_error if the system gives no more threads.
    ThreadPool(int num_threads, std::vector<int> cpus);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls f(task, thread) for every task in [0, num_tasks), each once, and returns when all are done. Each thread begins
    // with a range of neighbouring tasks (they read neighbouring memory) and then helps the others.
    // One caller at a time. An f that throws (out of memory) ends the process: other threads may still be inside it.
    template <class F>
    void run(int64_t num_tasks, F&& f) {
        using Function = std::remove_reference_t<F>;
        run_erased(
            num_tasks, [](void* context, int64_t task, int thread) { (*static_cast<Function*>(context))(task, thread); },
            const_cast<void*>(static_cast<const void*>(&f)));
    }

private:
    using Task = void (*)(void* context, int64_t task, int thread);
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    void run_erased(int64_t num_tasks, Task task, void* context) noexcept;
    void work(int thread) noexcept;
    void live(int thread, int cpu);
    void stop();

    const int num_threads_;
    std::unique_ptr<Range[]> ranges_;
    std::vector<std::thread> threads_;
    Task task_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> num_busy_{0};
    std::atomic<bool> stopped_{false};
};

}  // namespace amoe
