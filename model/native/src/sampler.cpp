// The order of operations, and what each means, is in model/sampler.py.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "choices.h"

namespace quire {
namespace {

// The natural logarithm by elementary operations, as `_log` of model/sampler.py computes it.
double logarithm(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.7071067811865476) {
    m *= 2.0;
    exponent -= 1;
  }
  const double r = (m - 1.0) / (m + 1.0), s = r * r;
  double p = 1.0 / 23.0;
  for (int odd = 21; odd > 1; odd -= 2) p = p * s + 1.0 / odd;
  return (p * s * r + r) * 2.0 + exponent * 0.6931471805599453;
}

// Philox4x32-10 as in model/philox.py: a number in [0, 1) of 53 bits.
double uniform(uint64_t seed, int32_t choice, int32_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = 0, c2 = static_cast<uint32_t>(choice), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) * 0x1p-53;
}

// The last of `ranked` whose running sum without itself is accepted.
template <typename Keeps> Last last_ranked(int64_t before, Keeps keeps) {
  const std::vector<Ranked>& ranked = scratch().ranked;
  return last_of(ranked.data(), ranked.data() + ranked.size(), before, keeps);
}

// Accepts what is before the point of a mass that a draw falls on.
auto up_to(int64_t mass, double draw) {
  return [point = point_of(mass, draw)](int64_t before) { return before <= point; };
}

// Accepts what top-p keeps; the first entry stays even if top_p is 0.
auto below(double wanted) {
  return [wanted](int64_t before) { return before == 0 || static_cast<double>(before) < wanted; };
}

int draw_top_k(const Choices& choices, const Tempering& t, int top_k, float top_p, double draw) {
  choices.find_top(top_k);
  const double mass = static_cast<double>(choices.weigh_ranked(t));
  return last_ranked(0, up_to(last_ranked(0, below(mass * top_p)).mass(), draw)).entry.place();
}

// The choices from the most probable on, tier by tier, of which only those are ranked that are looked into.
class Tiers {
 public:
  Tiers(const Choices& choices, const Tempering& t) : choices_(choices), t_(t) {}

  // Adds tiers down to a depth; returns their mass.
  int64_t hold_until(float depth) {
    for (float next = 1.0f; next < depth; next += next < 4.0f ? 1.0f : 2.0f) add(next);
    add(depth);
    return mass_;
  }

  // What the choice weighs at most with which the running sum comes to a mass.
  int64_t heaviest_at(double mass) const {
    float most = t_.largest;
    int64_t sum = 0;
    for (const Tier& tier : tiers_) {
      sum += tier.mass;
      if (static_cast<double>(sum) >= mass) break;
      most = tier.bound;
    }
    return choices_.weight_of(most, t_);
  }

  // Adds tiers until they hold a mass for sure. Few choices often hold it; if not, the depth is estimated, perhaps
  // too low, and the last tier is small.
  void hold(double mass) {
    constexpr float kShallow = 3.0f, kLast = 0.75f, kAgain = 2.0f;
    add(kShallow);
    if (static_cast<double>(mass_) >= mass) return;
    float depth = std::max(choices_.depth_of(t_, mass), kShallow + kLast);
    if (depth - kLast > kShallow) add(depth - kLast);
    for (; static_cast<double>(mass_) < mass && tiers_.back().bound > -kInfinity; depth += kAgain) add(depth);
  }

  // The last whose running sum without itself is accepted.
  template <typename Keeps> Last last(Keeps keeps) const {
    const Tier* found = &tiers_.back();
    int64_t before = 0, sum = 0;
    for (const Tier& tier : tiers_) {
      if (tier.mass && keeps(sum)) {
        found = &tier;
        before = sum;
      }
      sum += tier.mass;
    }
    choices_.rank(*found, t_);
    return last_ranked(before, keeps);
  }

 private:
  void add(float depth) {
    const float most = tiers_.empty() ? kInfinity : tiers_.back().bound;
    const float bound = depth < kDeepest ? t_.largest - depth * t_.temperature : -kInfinity;
    tiers_.push_back(choices_.weigh_between(bound, most, t_));
    mass_ += tiers_.back().mass;
  }

  const Choices& choices_;
  const Tempering& t_;
  std::vector<Tier> tiers_;
  int64_t mass_ = 0;
};

// The token that top-p draws, if the choices near the largest show for sure which one it is; else -1.
int32_t draw_top_p_of_few(Choices choices, const Tempering& t, float top_p, double draw) {
  Bounds rest;
  if (!choices.narrow_to_depth(t, kDepth, &rest)) return -1;
  Tiers tiers(choices, t);
  const int64_t mass = tiers.hold_until(kDepth);
  const double low = static_cast<double>(mass + rest.low) * top_p, high = static_cast<double>(mass + rest.high) * top_p;
  // What is kept weighs at least what is wanted, and without its last choice less.
  Bounds kept = {static_cast<int64_t>(low), static_cast<int64_t>(high) + 1 + tiers.heaviest_at(low)};
  for (const bool exactly : {false, true}) {
    if (exactly) {
      if (static_cast<double>(mass) < high) return -1;
      const Last last = tiers.last(below(high));
      if (last.before && !(static_cast<double>(last.before) < low)) return -1;
      kept = {last.mass(), last.mass()};
    }
    const int64_t end = point_of(kept.high, draw);
    if (end >= mass) continue;
    const Last last = tiers.last(up_to(kept.low, draw));
    if (end < last.mass()) return choices.id(last.entry.place());
  }
  return -1;
}

int draw_top_p(const Choices& choices, const Tempering& t, float top_p, double draw) {
  const auto exactly = [&] { return static_cast<double>(choices.weigh_all(t)) * top_p; };
  Interval wanted = choices.nearly(t, top_p);
  wanted = {wanted.low * kOne, wanted.high * kOne};
  if (!(wanted.low <= wanted.high)) wanted.low = wanted.high = exactly();  // not a number
  Tiers tiers(choices, t);
  tiers.hold(wanted.high);
  Last last = tiers.last(below(wanted.high));
  if (last.before && !(static_cast<double>(last.before) < wanted.low)) last = tiers.last(below(exactly()));
  return tiers.last(up_to(last.mass(), draw)).entry.place();
}

// Of an unmodified row, what its log probabilities need: the logarithm of its mass, first nearly. This nearly
// always shows to which float a log probability is rounded.
class Scores {
 public:
  Scores(const Choices& all, float largest) : all_(all), t_{largest, 1.0f, 0} {}

  // The alternatives. `settle`: the logits are about to be overwritten.
  void begin(int num, bool settle, int32_t* ids, float* logprobs) {
    Choices few = all_;
    Bounds rest;
    if (settle || !few.narrow_to_depth(t_, kDepth, &rest)) {
      make_exact();
      return write_top(all_, num, ids, logprobs);
    }
    const int64_t mass = few.weigh_all(t_);
    // The logarithm errs by less than 2^-45.
    low_ = logarithm_of(mass + rest.low) - 0x1p-45;
    high_ = logarithm_of(mass + rest.high) + 0x1p-45;
    write_top(num <= few.count() ? few : all_, num, ids, logprobs);
  }

  // Of a token whose unmodified logit this is. `all` is unmodified.
  float of(float logit) {
    const double depth = static_cast<double>(logit - t_.largest);
    const float value = static_cast<float>(depth - low_);
    if (value == static_cast<float>(depth - high_)) return value;
    make_exact();
    return static_cast<float>(depth - low_);
  }

 private:
  static double logarithm_of(int64_t mass) { return logarithm(static_cast<double>(mass) / kOne); }

  void make_exact() { low_ = high_ = logarithm_of(all_.weigh_all(t_)); }

  void write_top(const Choices& choices, int num, int32_t* ids, float* logprobs) {
    if (!num) return;
    std::vector<Ranked>& ranked = scratch().ranked;
    choices.find_top(num);
    std::sort(ranked.begin(), ranked.end(), ranks_before);
    for (int i = 0; i < num; i++) {
      const int place = ranked[static_cast<size_t>(i)].place();
      ids[i] = choices.id(place);
      logprobs[i] = of(choices[place]);
    }
  }

  const Choices& all_;
  Tempering t_;
  double low_ = 0.0, high_ = 0.0;  // the logarithm lies between them
};

// Biases and penalties of a row, undone by `undo`.
class Edits {
 public:
  explicit Edits(float* logits) : logits_(logits) {}

  void make(const QuireSampling& s, const SampledRow& row) {
    float* const logits = logits_;
    for (int e = row.first_bias; e < row.end_bias; e++) set(s.bias_ids[e], logits[s.bias_ids[e]] + s.bias_values[e]);
    const double frequency = s.frequency[row.row], presence = s.presence[row.row];
    const float repetition = s.repetition[row.row];
    for (int e = row.first_penalty; e < row.end_penalty; e++) {
      const int32_t id = s.penalty_ids[e], count = s.penalty_counts[e];
      const float taken = static_cast<float>(frequency * count + (count > 0 ? presence : 0.0));
      set(id, (logits[id] > 0.0f ? logits[id] / repetition : logits[id] * repetition) - taken);
    }
  }

  void undo() {
    for (; !old_.empty(); old_.pop_back()) logits_[old_.back().first] = old_.back().second;
  }

  // The logit of a token before its edits.
  float before(int32_t id) const {
    for (const auto& [edited, value] : old_)
      if (edited == id) return value;
    return logits_[id];
  }

 private:
  void set(int32_t id, float value) {
    old_.push_back({id, logits_[id]});
    logits_[id] = value;
  }

  float* logits_;
  std::vector<std::pair<int32_t, float>> old_;
};

int32_t choose(Choices choices, const QuireSampling& s, int row, int vocab, float largest, int argmax) {
  const float temperature = s.temperatures[row], min_p = s.min_ps[row], top_p = s.top_ps[row];
  if (temperature == 0.0f) return choices.id(argmax);
  const double draw = uniform(s.seeds[row], s.choices[row], s.indices[row]);
  const Tempering t = {largest, temperature, static_cast<int64_t>(std::ceil(static_cast<double>(min_p) * kOne))};
  if (s.top_ks[row] < vocab) return choices.id(draw_top_k(choices, t, s.top_ks[row], top_p, draw));
  if (min_p > 0.0f) choices.narrow_to(t, min_p);
  if (top_p < 1.0f) {
    const int32_t id = draw_top_p_of_few(choices, t, top_p, draw);
    return id < 0 ? choices.id(draw_top_p(choices, t, top_p, draw)) : id;
  }
  return choices.id(choices.draw_by_id(t, draw));
}

int32_t choose_token(const Kernels& kernels, const QuireSampling& s, const SampledRow& row, Argmax raw, Edits& edits,
                     float* logits, int vocab) {
  if (s.given) return s.given[row.row];
  if (!row.mask && !row.adjusts()) {
    if (!(raw.value > -kInfinity)) return raw.id;  // all are NaN
    return choose(Choices(kernels, logits, vocab), s, row.row, vocab, raw.value, raw.id);
  }
  const bool may_be_argmax = !row.adjusts() && s.temperatures[row.row] == 0.0f && raw.value > -kInfinity;
  if (may_be_argmax && row.allows(raw.id)) return raw.id;
  edits.make(s, row);
  for (const bool edited : {true, false}) {
    if (!edited) edits.undo();  // they forbid every token
    const Choices choices = Choices::of(kernels, row, logits, vocab);
    int argmax;
    const float largest = choices.largest(&argmax);
    if (!(largest > -kInfinity)) continue;
    return edited ? choose(choices, s, row.row, vocab, largest, argmax) : choices.id(argmax);
  }
  return 0;  // all are NaN
}

const char* entries_error(int count, const int32_t* rows, const int32_t* ids, int num_rows, int vocab) {
  for (int e = 0; e < count; e++) {
    if (rows[e] < (e ? rows[e - 1] : 0) || rows[e] >= num_rows) return "rows of penalties and biases must rise";
    if (ids[e] < 0 || ids[e] >= vocab) return "token id outside the vocabulary";
  }
  return nullptr;
}

int count_allowed(const uint32_t* mask, int vocab) {
  int allowed = 0;
  for (int word = 0; word * 32 < vocab && allowed <= kFew; word++) {
    if (!mask[word]) continue;
    const int left = vocab - word * 32;
    allowed += __builtin_popcount(left < 32 ? mask[word] & ((1u << left) - 1u) : mask[word]);
  }
  return allowed;
}

}  // namespace

const char* sampling_error(const QuireSampling& s, int rows, int vocab) {
  if (const char* problem = entries_error(s.penalties, s.penalty_rows, s.penalty_ids, rows, vocab)) return problem;
  if (const char* problem = entries_error(s.biases, s.bias_rows, s.bias_ids, rows, vocab)) return problem;
  for (int m = 0; m < s.masks; m++)
    if (s.mask_rows[m] <= (m ? s.mask_rows[m - 1] : -1) || s.mask_rows[m] >= rows) return "rows of masks must rise";
  for (int row = 0; row < rows; row++) {
    if (s.top_ks[row] < 1) return "top_k must be at least 1";
    if (s.given && (s.given[row] < 0 || s.given[row] >= vocab)) return "token id outside the vocabulary";
  }
  return s.num_top < 0 || s.num_top > vocab ? "more alternatives than tokens" : nullptr;
}

std::vector<SampledRow> rows_of(const QuireSampling& s, int rows, int vocab) {
  std::vector<SampledRow> found(static_cast<size_t>(rows));
  const size_t words = (static_cast<size_t>(vocab) + 31) / 32;
  int penalty = 0, bias = 0, mask = 0;
  for (int i = 0; i < rows; i++) {
    SampledRow& row = found[static_cast<size_t>(i)];
    row.row = i;
    row.first_penalty = penalty;
    while (penalty < s.penalties && s.penalty_rows[penalty] == i) penalty++;
    row.end_penalty = penalty;
    row.first_bias = bias;
    while (bias < s.biases && s.bias_rows[bias] == i) bias++;
    row.end_bias = bias;
    if (mask == s.masks || s.mask_rows[mask] != i) continue;
    row.mask = s.mask_words + words * mask++;
    row.allowed = count_allowed(row.mask, vocab);
  }
  return found;
}

int32_t forced_token(const QuireSampling& s, const SampledRow& row) {
  if (!row.mask || row.allowed != 1 || s.wants_logprobs[row.row] || s.given) return -1;
  int word = 0;
  while (!row.mask[word]) word++;
  return word * 32 + __builtin_ctz(row.mask[word]);
}

bool is_plain(const QuireSampling& s, const SampledRow& row) {
  return !s.given && s.temperatures[row.row] == 0.0f && !s.wants_logprobs[row.row] && !row.mask && !row.adjusts();
}

void sample_row(const Kernels& kernels, const QuireSampling& s, const SampledRow& row, Argmax raw, float* logits,
                int vocab) {
  Edits edits(logits);
  const Choices all(kernels, logits, vocab);
  if (!s.wants_logprobs[row.row]) {
    s.tokens[row.row] = choose_token(kernels, s, row, raw, edits, logits, vocab);
    return;
  }
  const size_t top = static_cast<size_t>(row.row) * s.num_top;
  Scores scores(all, raw.value);
  scores.begin(s.num_top, row.mask && row.allowed > kFew, s.top_ids + top, s.top_logprobs + top);
  const int32_t token = choose_token(kernels, s, row, raw, edits, logits, vocab);
  s.tokens[row.row] = token;
  const float logit = edits.before(token);
  edits.undo();
  s.logprobs[row.row] = scores.of(logit);
}

}  // namespace quire
