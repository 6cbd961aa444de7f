// Tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

namespace accumloss {
namespace cpu {

constexpr int64_t kSerialElements = 32768;  // below, the threads cost more than they save

// Consecutive tasks that begin on one thread.
struct alignas(64) TaskRange {
  std::atomic<int64_t> next;
  int64_t end;
};

// Runs task(i, local) for every i in [0, num_tasks) on torch's threads: each takes the next one of a range of its own,
// so that what it fetches ahead is its own, and then what others have left; local is what make_local() returned for
// the thread.
template <typename MakeLocal, typename Task>
void run_tasks(int64_t num_tasks, int64_t elements, const MakeLocal& make_local, const Task& task) {
  const int64_t threads = elements <= kSerialElements ? 1 : torch::stable::get_num_threads();
  if (threads == 1 || num_tasks <= 1) {
    const auto local = make_local();
    for (int64_t i = 0; i < num_tasks; ++i) task(i, local);
    return;
  }
  const int64_t workers = std::min(threads, num_tasks);
  const std::unique_ptr<TaskRange[]> ranges(new TaskRange[static_cast<size_t>(workers)]);
  for (int64_t worker = 0; worker < workers; ++worker) {
    ranges[worker].next = worker * num_tasks / workers;
    ranges[worker].end = (worker + 1) * num_tasks / workers;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // an exception must not cross torch's C interface: it would lose its message
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        const auto local = make_local();
        for (int64_t turn = 0; turn < workers; ++turn) {
          TaskRange& range = ranges[(worker + turn) % workers];
          for (int64_t i = range.next++; i < range.end; i = range.next++) task(i, local);
        }
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

struct Nothing {};
inline Nothing no_local() { return {}; }

}  // namespace cpu
}  // namespace accumloss
