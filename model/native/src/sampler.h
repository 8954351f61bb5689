// Sampler: what model/sampler.py does, row by row, with the same bits: tokens and log probabilities.
#pragma once
#include <vector>

#include "kernels.h"
#include "quire.h"

namespace quire {

constexpr int kFew = 1024;  // tokens that a mask allows: up to that many are read alone

// One row of R to sample, and its entries in the lists of QuireSampling.
struct SampledRow {
  int row;
  int first_penalty = 0, end_penalty = 0;
  int first_bias = 0, end_bias = 0;
  const uint32_t* mask = nullptr;  // or null
  int allowed = 0;                 // tokens that the mask allows, as far as they were counted: see kFew

  bool allows(int32_t id) const { return mask[id / 32] >> (id % 32) & 1u; }
  bool adjusts() const { return end_penalty > first_penalty || end_bias > first_bias; }
};

// Why a sampling is invalid, or null: every number that becomes an index is checked.
const char* sampling_error(const QuireSampling& sampling, int rows, int vocab);

// The entries of each row.
std::vector<SampledRow> rows_of(const QuireSampling& sampling, int rows, int vocab);

// The token of a row that depends on no logits; -1 if it does.
int32_t forced_token(const QuireSampling& sampling, const SampledRow& row);
// Whether the row's token is the argmax of its unmodified logits, and these are not read.
bool is_plain(const QuireSampling& sampling, const SampledRow& row);

// Chooses the token of a row, or takes the given one, and computes log probabilities if requested.
// `argmax` is that of the unmodified `logits` [vocab], which are overwritten.
void sample_row(const Kernels& kernels, const QuireSampling& sampling, const SampledRow& row, Argmax argmax,
                float* logits, int vocab);

}  // namespace quire
