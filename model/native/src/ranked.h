// Ranked: tokens in order of probability, and selection among them by running sums of their weights.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace quire {

// A token in an order in which no two are equal: larger logits first, of equals the lower id.
struct Ranked {
  uint64_t key;
  int64_t weight;

  int32_t place() const { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }
};

inline bool ranks_before(const Ranked& a, const Ranked& b) { return a.key > b.key; }

// The float's bits in an order that integers have, then the place.
inline uint64_t key_of(float logit, int32_t place) {
  const float value = logit + 0.0f;  // minus zero equals zero
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(place));
}

// The last entry, in order of rank, whose running sum without itself is accepted; and that sum.
struct Last {
  Ranked entry;
  int64_t before;

  int64_t mass() const { return before + entry.weight; }
};

// Of at least one entry, behind others with a mass of `before`. `keeps` accepts `before` and, if any sum, all
// smaller ones. Entries are put into buckets by their keys, and those of one bucket again, until a few are left
// to sort: in linear time.
template <typename Keeps> Last last_of(const Ranked* first, const Ranked* end, int64_t before, Keeps keeps) {
  constexpr int kBuckets = 256;
  std::vector<Ranked> some;
  while (end - first > 64) {
    uint64_t most = 0, least = ~uint64_t{0};
    for (const Ranked* r = first; r < end; r++) {
      most = std::max(most, r->key);
      least = std::min(least, r->key);
    }
    int shift = 0;
    while ((most - least) >> shift >= kBuckets) shift++;
    const auto bucket_of = [&](const Ranked& r) { return static_cast<int>((most - r.key) >> shift); };
    int64_t mass[kBuckets] = {};
    int32_t count[kBuckets] = {};
    for (const Ranked* r = first; r < end; r++) {
      const int b = bucket_of(*r);
      mass[b] += r->weight;
      count[b]++;
    }
    int bucket = 0;
    int64_t next = before;
    for (int b = 0; b < kBuckets && keeps(next); next += mass[b++])
      if (count[b]) {
        bucket = b;
        before = next;
      }
    std::vector<Ranked> found;
    found.reserve(static_cast<size_t>(count[bucket]));
    for (const Ranked* r = first; r < end; r++)
      if (bucket_of(*r) == bucket) found.push_back(*r);
    some.swap(found);
    first = some.data();
    end = first + some.size();
  }
  std::vector<Ranked> sorted(first, end);
  std::sort(sorted.begin(), sorted.end(), ranks_before);
  size_t i = 0;
  for (; i + 1 < sorted.size() && keeps(before + sorted[i].weight); i++) before += sorted[i].weight;
  return {sorted[i], before};
}

}  // namespace quire
