// Encoder: the weights and the threads of a network that computes whole sequences without a KV cache.
#pragma once
#include <memory>
#include <vector>

#include "cpu.h"
#include "encoder_kernels.h"
#include "memory.h"
#include "quire_encoder.h"
#include "team.h"

namespace quire {

struct Vector {  // of a norm; null: there is none
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// A matrix in float32 or in 8 bits, whose inputs are then spread by a Hadamard transform of `block`.
struct Matrix {
  Dense dense{};
  Linear coded{};
  int block = 0;
  bool is_coded() const { return coded.packed != nullptr; }
  int outputs() const { return is_coded() ? coded.outputs : dense.outputs; }
  int inputs() const { return is_coded() ? coded.inputs : dense.inputs; }
};

struct EncoderLayer {
  Matrix qkv, out, up, down;  // up: gates, then ups, if the MLP is gated
  Vector attention_norm, mlp_norm;
  const float* query_norm = nullptr;
  const float* key_norm = nullptr;
  int window = INT32_MAX;
};

// Buffers of a step, [T, stride] each; the strides are multiples of K_STEP, and the padding stays zero.
struct EncoderBuffers {
  float *stream, *input, *sums, *qkv, *mixed, *wide, *gated, *keys, *values, *scales;
  uint8_t* codes;
};

struct EncoderScratch {
  std::vector<float> stream, input, sums, qkv, mixed, wide, gated, keys, values, scales;
  std::vector<uint8_t> codes;
};

// Where the packed heads of each sequence begin, in rows of PANEL.
struct Places {
  std::vector<size_t> keys, values;  // [S]
};

struct Encoder;

struct EncoderTask {
  Encoder* model = nullptr;
  QuireEncoding step{};
  EncoderBuffers buffers{};
  int rows = 0;  // T
  size_t key_rows = 0, value_rows = 0;  // of PANEL, of all packed heads
  Places places;
  std::vector<int> sequence_of_row;  // [T]
  std::vector<int32_t> tiles;  // (sequence, first row) of each tile of attention
  void operator()(Walker& walker) const;
};

constexpr int kAttentionRows = 4 * ATTENTION_ROWS;  // of a tile

struct Encoder {
  Encoder(const QuireEncoderShape& given, const Kernels& chosen, const EncoderKernels& kernels);

  QuireEncoderShape shape;
  const Kernels& kernels;
  const EncoderKernels& floats;
  Memory weights;
  std::vector<EncoderLayer> layers;
  Vector embed_norm, final_norm, head_norm;
  Matrix head_dense, head_out;
  const float* tables[QUIRE_TABLES] = {};  // borrowed
  EncoderScratch scratch;
  std::unique_ptr<Team<EncoderTask>> team;  // last: threads use all of the above

  int query_size() const { return shape.heads * shape.dim; }
  int kv_size() const { return shape.kv_heads * shape.dim; }
  void load_matrix(int layer, int which, const float* weight, const float* bias);
  void load_vector(int layer, int which, const float* weight, const float* bias);
  void run(const QuireEncoding& step);

 private:
  EncoderBuffers make_room(const EncoderTask& task);
  Matrix& matrix(int layer, int which);
  void pack_dense(Dense& dense, const float* weight, const float* bias);
  void pack_coded(Matrix& matrix, int outputs, int inputs, const float* weight, const float* bias);
  const float* copy(const float* values, int count);
};

}  // namespace quire

struct QuireEncoder : quire::Encoder {
  using quire::Encoder::Encoder;
};
