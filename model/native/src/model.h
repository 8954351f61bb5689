// Model: packed weights, the KV pool and the scratch arena of one network.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "quire.h"
#include "sampler.h"
#include "team.h"

namespace quire {

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Layer {
  Linear qkv, out, gate_up, down;
  float* query_norm = nullptr;  // [D] or null
  float* key_norm = nullptr;
  float* attention_norm = nullptr;  // [C] if weights have 4 bits; else part of the next product
  float* mlp_norm = nullptr;
  Pool pool;
  int window;
  bool has_rotary;
};

// Buffers of a step. T = max_rows; strides are padded sizes, and the padding stays zero.
struct Scratch {
  float* residual;   // [T, residual_stride]
  float* qkv;        // [T, qkv_stride]
  float* attention;  // [T, attention_stride]
  float* gated;      // [T, gated_stride]
  float* rotated;    // [T, 2, residual_stride], or null: inputs of the head
  size_t residual_stride, qkv_stride, attention_stride, gated_stride;
  uint8_t* codes;  // [T + TILE_ROWS_MAX, the widest]
  float* scales;   // [T + TILE_ROWS_MAX]
  Argmax* argmax;      // [chunks of the head, T]
  // [T, logits_stride] of rows that are sampled, touched as far as needed. An odd number of cache lines,
  // so that rows do not share few sets of the caches.
  float* logits;
  size_t logits_stride;
  // What adapters add to the rows of the present product; null without adapters.
  float* deltas = nullptr;          // [T, deltas_stride]
  const float** addends = nullptr;  // [T] rows of `deltas`, or null
  size_t deltas_stride;
};

// An adapter's products by layer and QuireLinear; rank 0: none.
using Adapter = std::vector<std::array<LowRank, QUIRE_HEAD>>;

// Rows of one sequence that attend together: an AttentionItem per head.
struct Tile {
  int sequence, first_row, rows, first_position;
  size_t partials;  // offset of its partial results, with splits
  int splits;
};

struct Unit {
  int tile, head, split;  // split < 0: all of them, merged at once
};

// How the work of a step is cut, which changes no result. It is part of the task, because a late thread
// reads it when the arrays of the step may be gone.
struct Cut {
  std::vector<Tile> tiles;
  std::vector<int> tile_of_row;
  std::vector<Unit> units;
  std::vector<size_t> prefetch;  // regions, in the order of `units`; empty if prefetch does not pay
  bool split = false;
  bool only_outputs = false;  // whether no other rows of the last layer are needed
};

// Rows of R that go through the head, how they are sampled (empty: argmax), and where their logits go.
struct Heads {
  std::vector<int32_t> rows;
  std::vector<SampledRow> sampled;
  std::vector<float*> logits;
};

struct Model;

// The program of one step; see Team.
struct Task {
  const Model* model = nullptr;
  QuireStep step{};
  Cut cut;
  Heads heads;
  float* partials = nullptr;
  void operator()(Walker& walker) const;
};

struct Model {
  Model(const QuireShape& given, const Kernels& chosen);

  QuireShape shape;  // its pointers are null after construction
  const Kernels& kernels;
  Memory weights;  // all that loading writes, and nothing else: linears, norms, embedding
  Memory memory;
  std::vector<Layer> layers;
  Linear head;
  Rotation head_rotation{};  // of its inputs, if the residual stream is not rotated
  uint16_t* embedding;  // [V, residual_stride] bfloat16
  float* cosines;       // [max_positions, D / 2]
  float* sines;
  HeadShape heads;
  Scratch scratch;
  std::vector<Adapter> adapters;
  std::vector<float> partials;
  int32_t computed_rows = 0;  // T of the newest step with layers: rows that the head may read
  std::unique_ptr<Team<Task>> team;  // last: threads use all of the above

  Linear& linear(int layer, int which);
  void load_adapter(int adapter, int layer, int which, int rank, const float* a, const float* b);
  void run(const QuireStep& step);

 private:
  Linear make_linear(int outputs, int inputs, bool bias, bool four_bit);
  Heads heads_of(const QuireStep& step) const;
  void make_scratch();
};

size_t region_bytes(const QuireShape& shape);
Cut cut_step(const QuireShape& shape, const QuireStep& step, int threads);
constexpr int kHeadChunks = 64;  // of the head, at most

}  // namespace quire

namespace quire {
class Driver;
}

struct QuireModel : quire::Model {
  QuireModel(const QuireShape& given, const Kernels& chosen);
  ~QuireModel();

  int32_t launched_outputs = 0;           // of the newest launched step, whose tokens the next may name
  std::unique_ptr<quire::Driver> driver;  // from the first launch on; last: its thread uses the model
};
