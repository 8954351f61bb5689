// Measures the roof of this machine, which a step is compared with. Not used in serving.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu.h"
#include "memory.h"
#include "quire.h"

namespace {

constexpr int kRounds = 100000;  // about 1 ms

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// All threads at once; the time until the last is done.
template <typename Work> double timed(int threads, Work work) {
  const auto start = Clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  return seconds_since(start);
}

}  // namespace

double quire_probe_memory(int32_t threads, int64_t bytes, int32_t repeats) {
  quire::Memory memory;
  const size_t words = static_cast<size_t>(bytes) / sizeof(uint64_t);
  uint64_t* data = memory.take<uint64_t>(words);
  std::fill(data, data + words, 1);
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  double best = 0;
  for (int32_t r = 0; r < repeats; r++) {
    const double time = timed(threads, [&](int t) {
      const size_t first = words * t / threads, end = words * (t + 1) / threads;
      uint64_t total[8] = {};  // one per word of a line: no chain of additions
      for (size_t i = first / 8 * 8; i + 8 <= end; i += 8) {
        __builtin_prefetch(data + i + 512);
        for (size_t w = 0; w < 8; w++) total[w] += data[i + w];
      }
      for (uint64_t part : total) sums[static_cast<size_t>(t)] += part;
    });
    best = std::max(best, static_cast<double>(bytes) / time);
  }
  return sums[0] ? best : 0.0;
}

double quire_probe_products(const char* variant, int32_t threads, int32_t repeats) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return 0.0;
  double best = 0;
  for (int32_t r = 0; r < repeats; r++) {
    std::vector<int64_t> products(static_cast<size_t>(threads));
    const double time = timed(threads, [&](int t) {
      kernels->thread_begin();
      products[static_cast<size_t>(t)] = kernels->peak(kRounds);
      kernels->thread_end();
    });
    best = std::max(best, static_cast<double>(std::accumulate(products.begin(), products.end(), int64_t{0})) / time);
  }
  return best;
}
