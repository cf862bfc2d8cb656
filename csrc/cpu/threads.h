// Work in chunks over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ql::cpu {

// Calls work(0), ..., work(chunks - 1); chunks go to threads as these become free. Threads live for one call: nothing
// survives a fork, nothing spins beside the caller's own pool, and starting one costs less than the work it gets.
template <class Work>
void for_chunks(std::int64_t chunks, int num_threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto run = [&] {
    for (std::int64_t i; (i = next.fetch_add(1)) < chunks;) work(i);
  };
  std::vector<std::thread> threads;
  for (std::int64_t i = 1; i < std::min<std::int64_t>(num_threads, chunks); ++i) {
    try {
      threads.emplace_back(run);
    } catch (const std::system_error&) {  // the system has no thread to give: the others do its work
      break;
    }
  }
  run();
  for (auto& thread : threads) thread.join();
}

}  // namespace ql::cpu
