// Memory: allocations that live as long as the model. Zeroed, aligned to cache lines, in huge pages if
// the system has them: a step reads all weights once, and with 4 KiB pages it would wait for the TLB.
// What it holds can be stored and read again, range by range: equal calls of `take` make equal ranges.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace quire {

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (const Mapping& m : mappings_) munmap(m.start, m.bytes);
  }

  struct Range {
    uint8_t* start;
    size_t bytes;
  };

  // The allocations so far: what was taken lies inside, in the order of the calls.
  const std::vector<Range>& ranges() const { return ranges_; }

  // Throws std::bad_alloc. Pages become resident when they are touched.
  template <typename T> T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > left_ || ranges_.empty()) map(bytes > kChunk ? bytes : kChunk);
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    ranges_.back().bytes += bytes;
    return result;
  }

 private:
  struct Mapping {
    void* start;
    size_t bytes;
  };
  static constexpr size_t kLine = 64, kHuge = size_t{2} << 20, kChunk = size_t{64} << 20;

  void map(size_t bytes) {
    const size_t whole = (bytes + kHuge - 1) / kHuge * kHuge + kHuge;  // room to align the start
    void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    mappings_.push_back({start, whole});
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(start) + kHuge - 1) / kHuge * kHuge;
    next_ = reinterpret_cast<uint8_t*>(aligned);
    left_ = whole - kHuge;
    ranges_.push_back({next_, 0});
    madvise(next_, left_, MADV_HUGEPAGE);  // a hint: without it slower, not wrong
  }

  std::vector<Mapping> mappings_;
  std::vector<Range> ranges_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace quire
