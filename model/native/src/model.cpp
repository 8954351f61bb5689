// Builds a model: sizes, memory, and the units of work of attention.
#include "model.h"

#include <algorithm>
#include <functional>
#include <cstring>

namespace quire {
namespace {

constexpr size_t kLine = 16;  // of a cache line
constexpr int kRowsOfTile = 16;
constexpr int kQueriesOfTile = 64;  // ITEM_QUERIES of attention.inl
constexpr int kRowsToPrefetch = 24;  // with fewer a step is memory-bound
constexpr int kUnitsPerThread = 4;  // with fewer, attention is split along the context too

}  // namespace

size_t region_bytes(const QuireShape& shape) {
  const size_t cells = static_cast<size_t>(shape.block_size) * shape.dim * 2;
  return shape.wide_cache ? cells * 2 : cells + static_cast<size_t>(shape.block_size) * 2 * sizeof(float);
}

Linear Model::make_linear(int outputs, int inputs, bool bias, bool four_bit) {
  Linear linear{};
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.inputs_padded = round_up(inputs, K_STEP);
  linear.panels = round_up(outputs, PANEL) / PANEL;
  const size_t columns = static_cast<size_t>(linear.panels) * PANEL;
  linear.bias = bias ? weights.take<float>(columns) : nullptr;
  if (four_bit) {
    linear.blocks = weights.take<uint8_t>(static_cast<size_t>(linear.panels) * (inputs / BLOCK_INPUTS) * BLOCK_BYTES);
    return linear;
  }
  linear.packed = weights.take<int8_t>(columns * linear.inputs_padded);
  linear.scales = weights.take<float>(columns);
  linear.corrections = weights.take<int32_t>(columns);
  return linear;
}

Model::Model(const QuireShape& given, const Kernels& chosen) : shape(given), kernels(chosen) {
  const int width = shape.heads * shape.dim, kv_width = shape.kv_heads * shape.dim;
  const bool four_bit = shape.four_bit != 0;
  heads = {shape.heads, shape.kv_heads, shape.dim, shape.block_size, shape.norm_eps, shape.wide_cache != 0};
  for (int i = 0; i < shape.layers; i++) {
    Layer layer{};
    layer.qkv = make_linear(width + 2 * kv_width, shape.hidden, shape.qkv_bias != 0, four_bit);
    layer.out = make_linear(shape.hidden, width, false, four_bit);
    layer.gate_up = make_linear(2 * shape.width, shape.hidden, false, four_bit);
    layer.down = make_linear(shape.hidden, shape.width, false, four_bit);
    if (shape.qk_norm) {
      layer.query_norm = weights.take<float>(shape.dim);
      layer.key_norm = weights.take<float>(shape.dim);
    }
    if (four_bit) {
      layer.attention_norm = weights.take<float>(shape.hidden);
      layer.mlp_norm = weights.take<float>(shape.hidden);
    }
    layer.window = shape.windows[i];
    layer.has_rotary = shape.has_rotary[i] != 0;
    layers.push_back(layer);
  }
  head = make_linear(shape.vocab, shape.hidden, false, false);
  if (four_bit) {
    const int power = shape.hidden & -shape.hidden, odd = shape.hidden / power;
    head_rotation = {power, odd, weights.take<float>(shape.hidden), weights.take<float>(static_cast<size_t>(odd) * odd)};
  }
  embedding = weights.take<uint16_t>(static_cast<size_t>(shape.vocab) * round_up(shape.hidden, K_STEP));
  // All layers of a block lie together, so that the system zeroes fresh memory block by block as they
  // come into use, and not for all layers in the first step.
  const size_t region = region_bytes(shape), layer_bytes = region * shape.kv_heads;
  uint8_t* pool = memory.take<uint8_t>(layer_bytes * shape.layers * shape.num_blocks);
  for (size_t i = 0; i < layers.size(); i++)
    layers[i].pool = {pool + i * layer_bytes, region, layer_bytes * shape.layers};
  const size_t angles = static_cast<size_t>(shape.max_positions) * (shape.dim / 2);
  cosines = memory.take<float>(angles);
  sines = memory.take<float>(angles);
  std::memcpy(cosines, shape.cosines, angles * sizeof(float));
  std::memcpy(sines, shape.sines, angles * sizeof(float));
  shape.windows = nullptr;
  shape.has_rotary = nullptr;
  shape.cosines = shape.sines = nullptr;
  make_scratch();
  const int threads = std::max(shape.threads, shape.compute_threads);
  team = std::make_unique<Team<Task>>(threads, 11 * shape.layers + 8);
}

void Model::make_scratch() {
  const int inputs = round_up(shape.hidden, K_STEP), width = round_up(shape.heads * shape.dim, K_STEP);
  const int gated = round_up(shape.width, K_STEP);
  const int qkv = round_up((shape.heads + 2 * shape.kv_heads) * shape.dim, PANEL);
  const size_t rows = static_cast<size_t>(shape.max_rows);
  const int most_inputs = std::max({inputs, width, gated});
  const size_t widest = std::max(code_stride(most_inputs, kernels.code_bytes), block_row_stride(most_inputs));
  scratch.residual_stride = inputs;
  scratch.qkv_stride = qkv;
  scratch.attention_stride = width;
  scratch.gated_stride = gated;
  scratch.residual = memory.take<float>(rows * inputs);
  scratch.rotated = shape.four_bit ? memory.take<float>(rows * 2 * inputs) : nullptr;
  scratch.qkv = memory.take<float>(rows * qkv);
  scratch.attention = memory.take<float>(rows * width);
  scratch.gated = memory.take<float>(rows * gated);
  scratch.codes = memory.take<uint8_t>((rows + TILE_ROWS_MAX) * widest);
  scratch.scales = memory.take<float>(rows + TILE_ROWS_MAX);
  scratch.argmax = memory.take<Argmax>(rows * kHeadChunks);
  scratch.logits_stride = (static_cast<size_t>(shape.vocab) / kLine | 1) * kLine + kLine * 2;
  scratch.logits = memory.take<float>(rows * scratch.logits_stride);
}

Linear& Model::linear(int layer, int which) {
  if (which == QUIRE_HEAD) return head;
  Layer& l = layers[static_cast<size_t>(layer)];
  switch (which) {
    case QUIRE_QKV: return l.qkv;
    case QUIRE_OUT: return l.out;
    case QUIRE_GATE_UP: return l.gate_up;
    default: return l.down;
  }
}

void Model::load_adapter(int adapter, int layer, int which, int rank, const float* a, const float* b) {
  if (!scratch.deltas) {
    int panels = 0;
    for (const Linear& each : {layers[0].qkv, layers[0].out, layers[0].gate_up, layers[0].down})
      panels = std::max(panels, each.panels);
    scratch.deltas_stride = static_cast<size_t>(panels) * PANEL;
    scratch.deltas = memory.take<float>(static_cast<size_t>(shape.max_rows) * scratch.deltas_stride);
    scratch.addends = memory.take<const float*>(static_cast<size_t>(shape.max_rows));
  }
  const size_t count = static_cast<size_t>(adapter) + 1;
  if (adapters.size() < count) adapters.resize(count, Adapter(layers.size()));
  const Linear& own = linear(layer, which);
  const size_t inputs = static_cast<size_t>(own.inputs_padded), columns = static_cast<size_t>(own.panels) * PANEL;
  float* down = memory.take<float>(rank * inputs);
  float* up = memory.take<float>(rank * columns);
  for (int r = 0; r < rank; r++) std::memcpy(down + r * inputs, a + static_cast<size_t>(r) * own.inputs, own.inputs * sizeof(float));
  kernels.pack_low_rank(b, &own, which == QUIRE_GATE_UP, rank, up);
  adapters[static_cast<size_t>(adapter)][static_cast<size_t>(layer)][static_cast<size_t>(which)] = {
      rank, own.inputs_padded, static_cast<int>(columns), down, up};
}

// Every region that attention reads, by offsets from a layer's pool. A block that sequences share is
// listed more than once, which costs little: it is in a cache by then.
static std::vector<size_t> find_regions(const QuireShape& shape, const QuireStep& step) {
  std::vector<size_t> prefetch;
  const size_t region = region_bytes(shape), block_bytes = region * shape.kv_heads * shape.layers;
  for (int s = step.sequences - 1; s >= 0; s--) {
    const int32_t* table = step.block_table + static_cast<size_t>(s) * step.table_width;
    const int blocks = step.positions[step.query_starts[s + 1] - 1] / shape.block_size + 1;
    for (int b = 0; b < blocks; b++)
      for (int h = 0; h < shape.kv_heads; h++) prefetch.push_back(static_cast<size_t>(table[b]) * block_bytes + h * region);
  }
  return prefetch;
}

Cut cut_step(const QuireShape& shape, const QuireStep& step, int threads) {
  Cut cut;
  const int shared = shape.heads / shape.kv_heads;
  const int rows_of_tile = std::clamp(kQueriesOfTile / shared, 1, kRowsOfTile);
  cut.tile_of_row.resize(static_cast<size_t>(step.rows));
  size_t partials = 0;
  int most_splits = 1;
  for (int s = 0; s < step.sequences; s++)
    for (int row = step.query_starts[s]; row < step.query_starts[s + 1]; row += rows_of_tile) {
      const int rows = std::min(rows_of_tile, step.query_starts[s + 1] - row);
      const int splits = (step.positions[row] + rows - 1) / SPLIT + 1;
      for (int i = 0; i < rows; i++) cut.tile_of_row[static_cast<size_t>(row + i)] = static_cast<int>(cut.tiles.size());
      cut.tiles.push_back({s, row, rows, step.positions[row], partials, splits});
      partials += static_cast<size_t>(shape.kv_heads) * splits * rows * shared * (2 + shape.dim);
      most_splits = std::max(most_splits, splits);
    }
  const int tiles = static_cast<int>(cut.tiles.size());
  cut.split = most_splits > 1 && threads > 1 && tiles * shape.kv_heads < kUnitsPerThread * threads;
  // Longest first, for balance: late tiles of a prompt are the longest.
  for (int t = tiles - 1; t >= 0; t--)
    for (int h = 0; h < shape.kv_heads; h++) {
      if (!cut.split) cut.units.push_back({t, h, -1});
      else
        for (int split = 0; split < cut.tiles[static_cast<size_t>(t)].splits; split++) cut.units.push_back({t, h, split});
    }
  const int32_t* end = step.output_rows + step.outputs;
  const bool rises = std::adjacent_find(step.output_rows, end, std::greater_equal<int32_t>()) == end;
  cut.only_outputs = !step.keeps_rows && rises && step.outputs < step.rows;
  if (step.rows >= kRowsToPrefetch) cut.prefetch = find_regions(shape, step);
  return cut;
}

// All rows but those whose token needs no logits: these are written here.
Heads Model::heads_of(const QuireStep& step) const {
  Heads found;
  if (step.head_later) return found;
  if (step.sampling) found.sampled = rows_of(*step.sampling, step.outputs, shape.vocab);
  float* next = scratch.logits;
  for (int32_t i = 0; i < step.outputs; i++) {
    float* logits = step.logits ? step.logits[i] : nullptr;
    if (step.sampling) {
      const SampledRow& row = found.sampled[static_cast<size_t>(i)];
      const int32_t forced = forced_token(*step.sampling, row);
      if (forced >= 0) {
        step.sampling->tokens[i] = forced;
        continue;
      }
      if (!is_plain(*step.sampling, row)) {
        logits = next;
        next += scratch.logits_stride;
      }
    }
    found.rows.push_back(i);
    found.logits.push_back(logits);
  }
  return found;
}

void Model::run(const QuireStep& step) {
  const int rows = std::max(step.rows, step.outputs);
  const int threads = rows >= shape.compute_rows ? shape.compute_threads : shape.threads;
  Task task;
  task.model = this;
  task.step = step;
  task.cut = cut_step(shape, step, threads);
  task.heads = heads_of(step);
  if (task.cut.split) {
    const Tile& last = task.cut.tiles.back();
    const int shared = shape.heads / shape.kv_heads;
    const size_t size = static_cast<size_t>(shape.kv_heads) * last.splits * last.rows * shared * (2 + shape.dim);
    partials.resize(std::max(partials.size(), last.partials + size));
    task.partials = partials.data();
  }
  team->run(task, threads);
}

}  // namespace quire
