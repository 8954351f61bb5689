// Kernels of encoders in float32, as a table of one instruction-set variant. The same source
// (encoder.inl) is compiled once per variant; results are equal bit by bit, because all arithmetic is that
// of lanes.h: a product's sum is one chain of `fma` per output, in the order of the inputs.
//
// Legend as in kernels.h. A row of a result depends on its own sequence alone: neither on the rows
// beside it, nor on how rows are cut into tiles, nor on the number of threads.
//
// Translation units of different instruction sets include this header: plain data only.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

// y[M, N] = x[M, K] W[N, K]^T + bias. Columns are padded to whole panels with zeros.
struct Dense {
  int outputs, inputs, panels;
  float* packed;  // [panels][inputs][PANEL]
  float* bias;    // [panels * PANEL]; zeros if there is none
};

// Applied to each element; the values are those of quire.h.
enum class Activation : int32_t { NONE, SILU, GELU, GELU_TANH, TANH, RELU };

struct NormShape {
  int size;      // a multiple of LANES
  bool is_rms;   // RMSNorm; false: LayerNorm
  float eps;
};

// Attention of one head over one sequence, by some of its rows.
struct HeadAttention {
  const float* queries;  // [rows, stride]: of the first row
  size_t query_stride;
  const float* keys;    // [tokens / PANEL][dim][PANEL], padded with zeros
  const float* values;  // [dim / PANEL][tokens][PANEL], padded with zeros
  int tokens, dim;
  int first_row, rows;  // of the sequence
  int window;           // a query sees keys less than this apart; INT32_MAX: all
  bool is_causal;       // of those, none behind it
  float scale;
  float* out;  // [rows, stride]: of the first row
  size_t out_stride;
  float* scratch;  // [attention_scratch(tokens, dim)]
};

constexpr int ATTENTION_ROWS = 12;

static inline size_t attention_scratch(int tokens, int dim) {
  return (size_t)ATTENTION_ROWS * (size_t)(tokens + dim + 2 * PANEL);
}

struct EncoderKernels {
  const char* name;
  // One panel of a product, all rows.
  void (*multiply)(const Dense* weight, int panel, const float* x, size_t x_stride, int rows, Activation activation,
                   float* out, size_t out_stride);
  void (*add)(const float* x, int size, float* sum);  // sum += x
  void (*norm)(const NormShape* shape, const float* x, const float* weight, const float* bias, float* out);
  void (*activate)(float* x, int size, Activation activation);
  void (*gate)(const float* gates, const float* ups, int size, Activation activation, float* out);
  void (*rotate)(float* head, int dim, const float* cosines, const float* sines);
  void (*pack_head)(const float* k, const float* v, size_t stride, int tokens, int dim, float* keys, float* values);
  void (*attend)(const HeadAttention* head);
  void (*mean)(const float* x, size_t stride, int rows, int size, float* out);
  void (*normalise)(float* x, int size);
};

const EncoderKernels* portable_encoder_kernels();
#if defined(__x86_64__)
const EncoderKernels* avx2_encoder_kernels();
const EncoderKernels* avx512_encoder_kernels();
#endif
