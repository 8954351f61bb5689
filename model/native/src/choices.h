// Choices: the logits that a row may choose from, weighed exactly or nearly, and ranked as far as needed.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "ranked.h"
#include "sampler.h"

namespace quire {

constexpr double kOne = 1099511627776.0;  // 2^40, the weight of the most probable token
constexpr int kBlock = 1024;              // logits that are weighed together
constexpr int kMore = 16;  // places that find_between may write behind those that it found
constexpr float kInfinity = __builtin_inff();

constexpr float kDepth = 10.0f;    // below the largest logit by that many temperatures few choices matter
constexpr float kDeepest = 28.0f;  // below the largest logit by that many temperatures a token weighs nothing

// Memory of a thread, kept from row to row.
struct RowScratch {
  std::vector<Ranked> ranked;
  std::vector<float> values, few, maxima;
  std::vector<int64_t> weights, sums;
  std::vector<double> nearly;
  std::vector<int32_t> places, ids;
};

inline RowScratch& scratch() {
  thread_local RowScratch memory;
  return memory;
}

// The drawn share of a mass: 0..mass - 1. A product that rounds up to the mass would be behind it.
inline int64_t point_of(int64_t mass, double draw) {
  return std::max<int64_t>(0, std::min(static_cast<int64_t>(static_cast<double>(mass) * draw), mass - 1));
}

// The true value of what is known approximately.
struct Interval {
  double low, high;
};

// Logits above a bound and not above another, and the sum of their weights.
struct Tier {
  float bound, most;
  int64_t mass;
};

// The logits that a row may choose from: all, or the few that its mask allows.
class Choices {
 public:
  Choices(const Kernels& kernels, const float* logits, int count) : k_(kernels), logits_(logits), count_(count) {}

  static Choices of(const Kernels& kernels, const SampledRow& row, float* logits, int vocab) {
    if (row.mask && row.allowed > kFew) kernels.mask_out(row.mask, vocab, logits);
    Choices choices(kernels, logits, vocab);
    if (row.mask && row.allowed <= kFew) choices.narrow(row.mask);
    return choices;
  }

  int count() const { return count_; }
  int32_t id(int place) const { return ids_ ? ids_[place] : place; }

  // The largest logit, and its first place; minus infinity and 0 if there is none.
  float largest(int* place) const {
    float largest = -kInfinity;
    int at = 0;
    for (int start = 0; start < count_; start += kBlock) {
      const float found = k_.largest_of(logits_ + start, std::min(kBlock, count_ - start));
      if (found > largest) {
        largest = found;
        at = start;
      }
    }
    *place = 0;
    for (int i = at; i < count_ && largest > -kInfinity; i++)
      if (logits_[i] == largest) {
        *place = i;
        break;
      }
    return largest;
  }

  // The mass of all, block by block in `sums`.
  int64_t weigh_all(const Tempering& t) const {
    std::vector<int64_t>& sums = scratch().sums;
    sums.clear();
    int64_t mass = 0;
    for (int start = 0; start < count_; start += kBlock) {
      sums.push_back(k_.weigh(logits_ + start, std::min(kBlock, count_ - start), &t, nullptr));
      mass += sums.back();
    }
    return mass;
  }

  // The first place whose running sum is above the point. `weigh_all` came before.
  int place_of(int64_t point, const Tempering& t) const {
    const std::vector<int64_t>& sums = scratch().sums;
    size_t block = 0;
    for (; block + 1 < sums.size() && sums[block] <= point; block++) point -= sums[block];
    const int start = static_cast<int>(block) * kBlock, size = std::min(kBlock, count_ - start);
    int64_t weights[kBlock];
    k_.weigh(logits_ + start, size, &t, weights);
    int i = 0;
    for (; i + 1 < size && weights[i] <= point; i++) point -= weights[i];
    return start + i;
  }

  // A share of what `weigh_all` would give, times 2^-40, and block by block in `nearly`.
  Interval nearly(const Tempering& t, double share) const {
    std::vector<double>& sums = scratch().nearly;
    sums.clear();
    double mass = 0.0;
    for (int start = 0; start < count_; start += kBlock) {
      const int size = std::min(kBlock, count_ - start);
      sums.push_back(t.least ? static_cast<double>(k_.weigh(logits_ + start, size, &t, nullptr)) / kOne
                             : k_.weigh_nearly(logits_ + start, size, &t));
      mass += sums.back();
    }
    return {share * (mass * (1.0 - NEAR) - slack()) - kRounding, share * mass * (1.0 + NEAR) + kRounding};
  }

  // Inverse CDF in order of ids. Nearly all draws fall so far from the border of a
  // token that an approximate mass shows which one it is; the others are made from the exact mass.
  int draw_by_id(const Tempering& t, double draw) const {
    const Interval point = nearly(t, draw);
    const std::vector<double>& sums = scratch().nearly;
    size_t block = 0;
    double before = 0.0;
    for (; block + 1 < sums.size() && before + sums[block] <= point.low; block++) before += sums[block];
    const double low = (point.low - before * (1.0 + NEAR)) * kOne;
    const double high = (point.high - before * (1.0 - NEAR) + (block ? slack() : 0.0)) * kOne;
    const int start = static_cast<int>(block) * kBlock, size = std::min(kBlock, count_ - start);
    int64_t weights[kBlock];
    k_.weigh(logits_ + start, size, &t, weights);
    int64_t sum = 0;
    for (int i = 0; i < size && static_cast<double>(sum) <= low; i++) {
      sum += weights[i];
      if (static_cast<double>(sum) > high) return start + i;
    }
    return place_of(point_of(weigh_all(t), draw), t);
  }

  // How far the choices that hold a mass lie below the largest, in temperatures: estimated by some of them.
  // `nearly` came before.
  float depth_of(const Tempering& t, double mass) const {
    constexpr int kApart = 256, kTogether = 16, kSteps = 4;  // steps per unit of depth
    RowScratch& s = scratch();
    s.values.clear();
    for (int start = 0; start < count_; start += kApart)
      s.values.insert(s.values.end(), logits_ + start, logits_ + std::min(start + kTogether, count_));
    const int size = static_cast<int>(s.values.size());
    s.weights.resize(s.values.size());
    k_.weigh(s.values.data(), size, &t, s.weights.data());
    constexpr int kLast = static_cast<int>(kDeepest) * kSteps;
    int64_t masses[kLast + 1] = {};
    for (int i = 0; i < size; i++) {
      const float steps = (t.largest - s.values[static_cast<size_t>(i)]) / t.temperature * kSteps;
      masses[steps < kLast ? static_cast<int>(steps) : kLast] += s.weights[static_cast<size_t>(i)];
    }
    double rest = -mass / kOne;
    for (const double block : s.nearly) rest += block;
    rest *= 0.8 * kOne * size / count_;  // a little deeper
    int step = kLast;
    for (int64_t beyond = 0; step > 0 && static_cast<double>(beyond) <= rest; step--) beyond += masses[step];
    return static_cast<float>(step + 2) / kSteps;
  }

  Tier weigh_between(float bound, float most, const Tempering& t) const {
    int32_t places[kBlock + kMore];
    float values[kBlock];
    Tier tier = {bound, most, 0};
    for (int start = 0; start < count_; start += kBlock) {
      const int found = k_.find_between(logits_ + start, std::min(kBlock, count_ - start), bound, most, places);
      for (int i = 0; i < found; i++) values[i] = logits_[start + places[i]];
      tier.mass += k_.weigh(values, found, &t, nullptr);
    }
    return tier;
  }

  // Fills `ranked` with the logits of a tier, in any order, weighed.
  void rank(const Tier& tier, const Tempering& t) const {
    scratch().ranked.clear();
    for (int start = 0; start < count_; start += kBlock) append_between(start, tier.bound, tier.most);
    weigh_ranked(t);
  }

  // Fills `ranked` with the `most` of highest rank, in any order, not weighed. A later logit that equals
  // the lowest of those found ranks behind it, because its place is higher.
  void find_top(int most) const {
    std::vector<Ranked>& ranked = scratch().ranked;
    const size_t keep = static_cast<size_t>(most);
    ranked.clear();
    float bound = bound_of_top(most);
    bool full = bound > -kInfinity;
    for (int start = 0; start < count_; start += kBlock) {
      if (full) append_between(start, bound, kInfinity);
      else append_all(start);
      if (ranked.size() < 2 * keep + kBlock / 4 && start + kBlock < count_) continue;
      if (ranked.size() <= keep) continue;
      std::nth_element(ranked.begin(), ranked.begin() + most - 1, ranked.end(), ranks_before);
      ranked.resize(keep);
      full = true;
      bound = logits_[ranked.back().place()];
    }
  }

  // Leaves the logits within a depth, in temperatures, of the largest, if the others can be weighed nearly: then
  // in `rest`.
  bool narrow_to_depth(const Tempering& t, float depth, Bounds* rest) {
    const float bound = t.largest - depth * t.temperature;
    const bool is_deep = (t.largest - bound) / t.temperature > depth - 0.25f && t.largest < kInfinity;
    if (t.least || ids_ || count_ <= 2 * kBlock || !is_deep) return false;
    RowScratch& s = scratch();
    s.places.resize(static_cast<size_t>(count_ + kMore));
    const int found = k_.partition(logits_, count_, &t, bound, s.places.data(), rest);
    s.few.resize(std::max(s.few.size(), static_cast<size_t>(found)));
    for (int i = 0; i < found; i++) s.few[static_cast<size_t>(i)] = logits_[s.places[static_cast<size_t>(i)]];
    ids_ = s.places.data();
    logits_ = s.few.data();
    count_ = found;
    return true;
  }

  int64_t weight_of(float logit, const Tempering& t) const { return k_.weigh(&logit, 1, &t, nullptr); }

  // Weighs `ranked`; returns its mass.
  int64_t weigh_ranked(const Tempering& t) const {
    RowScratch& s = scratch();
    const size_t size = s.ranked.size();
    s.values.resize(size);
    s.weights.resize(size);
    for (size_t i = 0; i < size; i++) s.values[i] = logits_[s.ranked[i].place()];
    const int64_t mass = k_.weigh(s.values.data(), static_cast<int>(size), &t, s.weights.data());
    for (size_t i = 0; i < size; i++) s.ranked[i].weight = s.weights[i];
    return mass;
  }

  // Leaves the logits that min-p may keep, and perhaps a few more.
  void narrow_to(const Tempering& t, float min_p) {
    RowScratch& s = scratch();
    const double bound = t.largest + static_cast<double>(t.temperature) * (std::log(static_cast<double>(min_p)) - 0.01);
    const float below = std::nextafter(std::nextafter(static_cast<float>(bound), -kInfinity), -kInfinity);
    s.places.resize(static_cast<size_t>(count_ + kMore));
    const int found = k_.find_between(logits_, count_, below, kInfinity, s.places.data());
    // In place: each is read before its own place is written.
    s.ids.resize(std::max(s.ids.size(), static_cast<size_t>(found)));
    s.few.resize(std::max(s.few.size(), static_cast<size_t>(found)));
    for (int i = 0; i < found; i++) {
      const int32_t place = s.places[static_cast<size_t>(i)];
      s.ids[static_cast<size_t>(i)] = id(place);
      s.few[static_cast<size_t>(i)] = logits_[place];
    }
    ids_ = s.ids.data();
    logits_ = s.few.data();
    count_ = found;
  }

  float operator[](int place) const { return logits_[place]; }

 private:
  void narrow(const uint32_t* mask) {
    RowScratch& s = scratch();
    s.ids.clear();
    s.few.clear();
    for (int word = 0; word * 32 < count_; word++)
      for (uint32_t bits = mask[word]; bits; bits &= bits - 1) {
        const int32_t id = word * 32 + __builtin_ctz(bits);
        if (id >= count_) break;
        s.ids.push_back(id);
        s.few.push_back(logits_[id]);
      }
    ids_ = s.ids.data();
    logits_ = s.few.data();
    count_ = static_cast<int>(s.ids.size());
  }

  // A logit that is below at least `most` others, near the lowest of these; minus infinity if none was found.
  float bound_of_top(int most) const {
    std::vector<float>& maxima = scratch().maxima;
    maxima.clear();
    for (int start = 0; start < count_; start += kBlock) {
      maxima.resize(maxima.size() + MAXIMA);
      k_.maxima_of(logits_ + start, std::min(kBlock, count_ - start), maxima.data() + maxima.size() - MAXIMA);
    }
    if (static_cast<size_t>(most) > maxima.size() / 2) return -kInfinity;
    std::nth_element(maxima.begin(), maxima.begin() + most - 1, maxima.end(), std::greater<float>());
    return std::nextafter(maxima[static_cast<size_t>(most - 1)], -kInfinity);
  }

  void append_all(int start) const {
    const int end = std::min(start + kBlock, count_);
    for (int place = start; place < end; place++) scratch().ranked.push_back({key_of(logits_[place], place), 0});
  }

  void append_between(int start, float bound, float most) const {
    int32_t places[kBlock + kMore];
    const int found = k_.find_between(logits_ + start, std::min(kBlock, count_ - start), bound, most, places);
    std::vector<Ranked>& ranked = scratch().ranked;
    const size_t first = ranked.size();
    ranked.resize(first + static_cast<size_t>(found));
    for (int i = 0; i < found; i++) {
      const int32_t place = start + places[i];
      ranked[first + static_cast<size_t>(i)] = {key_of(logits_[place], place), 0};
    }
  }

  double slack() const { return count_ / kOne; }  // weights are rounded down
  static constexpr double kRounding = 0x1p-30;     // of products with the mass, generously

  const Kernels& k_;
  const float* logits_;
  int count_;
  const int32_t* ids_ = nullptr;
};

}  // namespace quire
