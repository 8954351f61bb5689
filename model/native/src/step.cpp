// The step, top to bottom: what model/transformer.py does, in phases over chunks of work.
// A phase reads only what earlier phases wrote.
#include <algorithm>

#include "model.h"
#include "thread_state.h"

namespace quire {
namespace {

// How the panels of a product are cut into chunks: first one per thread, nearly its share, then ever
// smaller ones, so that the threads end together. A thread streams faster through one large chunk than
// through several small ones, whose beginnings are not prefetched.
class Chunks {
 public:
  Chunks(int panels, int threads, int least) {
    for (int end = 0; end < panels; count_++) {
      const int left = panels - end;
      const int some = threads == 1 || count_ + 1 == kMost ? left : std::max(least, left * 15 / (threads * 16));
      end_[count_] = end = std::min(panels, end + some);
    }
  }

  int count() const { return count_; }
  int first(int chunk) const { return chunk ? end_[chunk - 1] : 0; }
  int end(int chunk) const { return end_[chunk]; }

 private:
  static constexpr int kMost = kHeadChunks;
  int end_[kMost] = {};
  int count_ = 0;
};

// Rows of a step, in rising order: all of them, or those that `index` names.
struct Rows {
  int count;
  const int32_t* index;

  int operator[](int i) const { return index ? index[i] : i; }
  bool have(int first, int end) const {
    if (!index) return true;
    const int32_t* found = std::lower_bound(index, index + count, first);
    return found < index + count && *found < end;
  }
};

class Program {
 public:
  Program(const Task& task, Walker& walker)
      : task_(task), m_(*task.model), step_(task.step), s_(m_.scratch), walker_(walker) {}

  void run() {
    if (step_.rows > 0) {
      embed();
      for (size_t i = 0; i < m_.layers.size(); i++) {
        const Rows rows = i + 1 < m_.layers.size() ? Rows{step_.rows, nullptr} : last_rows();
        layer_ = i;
        attention(m_.layers[i], rows, i + 1);
        mlp(m_.layers[i], rows);
      }
    }
    if (!task_.heads.rows.empty()) head();
  }

 private:
  void embed() {
    each_row(step_.rows, [&](int row) {
      const uint16_t* vector = m_.embedding + static_cast<size_t>(step_.tokens[row]) * s_.residual_stride;
      m_.kernels.embed(vector, static_cast<int>(s_.residual_stride), residual(row));
    });
  }

  // The rows of the last layer that are needed.
  Rows last_rows() const {
    if (task_.cut.only_outputs) return {step_.outputs, step_.output_rows};
    return {step_.rows, nullptr};
  }

  // x += out(attend(qkv(norm(x)))) for some rows; keys and values of all.
  // From its last product on the regions of the next layer are prefetched.
  void attention(const Layer& layer, const Rows& rows, size_t next) {
    norm_rows(layer.qkv, QUIRE_QKV, layer.attention_norm, {step_.rows, nullptr});
    multiply(layer.qkv, step_.rows, Epilogue::STORE, s_.qkv, s_.qkv_stride);
    each_row(step_.rows, [&](int row) { rotate_and_store(layer, row); });
    walker_.phase(static_cast<int>(task_.cut.units.size()), [&](int u) {
      const Tile& tile = task_.cut.tiles[task_.cut.units[u].tile];
      if (rows.have(tile.first_row, tile.first_row + tile.rows)) attend(layer, u);
    });
    start_prefetch(next);
    const Codes codes = codes_for(layer.out);
    each_row(rows.count, [&](int i) {
      float* x = s_.attention + rows[i] * s_.attention_stride;
      if (task_.cut.split) merge(rows[i], x);
      to_codes(layer.out, x, 1.0f, codes, i);
      adapt(QUIRE_OUT, rows[i], x, 1.0f, i);
    });
    add_product(layer.out, rows);
  }

  // x += down(hadamard(silu(gate) * up)); the weights of down are rotated against the transform, unless
  // they have 4 bits
  void mlp(const Layer& layer, const Rows& rows) {
    norm_rows(layer.gate_up, QUIRE_GATE_UP, layer.mlp_norm, rows);
    multiply(layer.gate_up, rows.count, Epilogue::GATED, s_.gated, s_.gated_stride);
    const Codes codes = codes_for(layer.down);
    const float normal = 1.0f / __builtin_sqrtf(static_cast<float>(m_.shape.hadamard));
    each_row(rows.count, [&](int i) {
      float* x = s_.gated + i * s_.gated_stride;
      if (!layer.down.blocks) m_.kernels.hadamard(x, m_.shape.width, m_.shape.hadamard);
      to_codes(layer.down, x, normal, codes, i);
      adapt(QUIRE_DOWN, rows[i], x, layer.down.blocks ? 1.0f : normal, i);
    });
    add_product(layer.down, rows);
  }

  void head() {
    const Heads& heads = task_.heads;
    const Codes codes = codes_for(m_.head);
    const int rows = static_cast<int>(heads.rows.size());
    each_row(rows, [&](int i) { norm_row(head_input(step_.output_rows[heads.rows[i]]), codes, i); });
    Product product = product_of(m_.head, rows, Epilogue::HEAD, nullptr, 0);
    product.logits = heads.logits.data();
    const Chunks chunks = chunks_of(m_.head, rows);
    walker_.phase(chunks.count(), [&](int c) {
      Argmax* argmax = s_.argmax + static_cast<size_t>(c) * m_.shape.max_rows;
      for (int i = 0; i < rows; i++) argmax[i] = {-__builtin_inff(), 0};
      m_.kernels.multiply(&product, chunks.first(c), chunks.end(c), argmax);
    });
    walker_.phase(rows, [&](int i) { choose(heads, i, argmax_of(chunks.count(), i)); });
  }

  void choose(const Heads& heads, int i, Argmax argmax) const {
    const int row = heads.rows[i];
    if (!step_.sampling) {
      step_.argmax[row] = argmax.id;
    } else if (!heads.logits[i]) {
      step_.sampling->tokens[row] = argmax.id;
    } else {
      sample_row(m_.kernels, *step_.sampling, heads.sampled[row], argmax, heads.logits[i], m_.shape.vocab);
    }
  }

  // Chunks in order of ids, so that the lowest of equal tokens wins.
  Argmax argmax_of(int chunks, int row) const {
    Argmax argmax = s_.argmax[row];
    for (int c = 1; c < chunks; c++) {
      const Argmax& other = s_.argmax[static_cast<size_t>(c) * m_.shape.max_rows + row];
      if (other.value > argmax.value) argmax = other;
    }
    return argmax;
  }

  float* residual(int row) const { return s_.residual + static_cast<size_t>(row) * s_.residual_stride; }

  Codes codes_for(const Linear& linear) const {
    if (linear.blocks) return {s_.codes, block_row_stride(linear.inputs), s_.scales};
    return {s_.codes, code_stride(linear.inputs_padded, m_.kernels.code_bytes), s_.scales};
  }

  // A row of the residual stream as the head takes it: rotated.
  const float* head_input(int row) const {
    if (!s_.rotated) return residual(row);
    float* out = s_.rotated + static_cast<size_t>(row) * 2 * s_.residual_stride;
    m_.kernels.rotate_row(&m_.head_rotation, residual(row), out + s_.residual_stride, out);
    return out;
  }

  void norm_row(const float* x, const Codes& codes, int to) const {
    m_.kernels.norm_to_codes(x, m_.shape.hidden, m_.shape.norm_eps, codes.rows + to * codes.stride, codes.scales + to);
  }

  // `weight`: of the norm, if it is not part of `next`.
  void norm_rows(const Linear& next, QuireLinear which, const float* weight, const Rows& rows) {
    const Codes codes = codes_for(next);
    each_row(rows.count, [&](int i) {
      const float* x = residual(rows[i]);
      if (next.blocks)
        m_.kernels.norm_to_blocks(x, weight, m_.shape.hidden, m_.shape.norm_eps, codes.rows + i * codes.stride);
      else norm_row(x, codes, i);
      if (adapter_of(which, rows[i]))
        adapt(which, rows[i], x, m_.kernels.norm_factor(x, m_.shape.hidden, m_.shape.norm_eps), i);
      else if (step_.adapters) s_.addends[i] = nullptr;
    });
  }

  // What the adapter of a row, if it has one, adds to a product; null: nothing.
  const LowRank* adapter_of(QuireLinear which, int row) const {
    if (!step_.adapters) return nullptr;
    const int number = step_.adapters[task_.cut.tiles[task_.cut.tile_of_row[row]].sequence];
    if (!number) return nullptr;
    const LowRank& pair = m_.adapters[static_cast<size_t>(number) - 1][layer_][which];
    return pair.rank ? &pair : nullptr;
  }

  // Computes it, for row `to` of the next product, whose input is factor * x.
  void adapt(QuireLinear which, int row, const float* x, float factor, int to) const {
    if (!step_.adapters) return;
    const LowRank* pair = adapter_of(which, row);
    float* delta = s_.deltas + static_cast<size_t>(to) * s_.deltas_stride;
    if (pair) m_.kernels.low_rank(pair, x, factor, delta);
    s_.addends[to] = pair ? delta : nullptr;
  }

  void to_codes(const Linear& next, const float* x, float factor, const Codes& codes, int to) const {
    uint8_t* row = codes.rows + to * codes.stride;
    if (next.blocks) m_.kernels.to_blocks(x, next.inputs, row);
    else m_.kernels.to_codes(x, next.inputs_padded, factor, row, codes.scales + to);
  }

  Product product_of(const Linear& weight, int rows, Epilogue epilogue, float* out, size_t stride) const {
    return {&weight, codes_for(weight), rows, epilogue, out, stride, nullptr, nullptr,
            prefetch_.count ? &prefetch_ : nullptr, segment_,
            epilogue != Epilogue::HEAD && step_.adapters ? s_.addends : nullptr};
  }

  void multiply(const Linear& weight, int rows, Epilogue epilogue, float* out, size_t stride) {
    run_product(product_of(weight, rows, epilogue, out, stride));
  }

  // To the residual stream of some rows.
  void add_product(const Linear& weight, const Rows& rows) {
    Product product = product_of(weight, rows.count, Epilogue::ADD, s_.residual, s_.residual_stride);
    product.out_rows = rows.index;
    run_product(product);
  }

  void run_product(const Product& product) {
    const Linear& weight = *product.weight;
    const int rows = product.rows;
    if (!rows) return;  // a chunk of a prompt that chooses no token ends with its keys and values
    segment_ += weight.panels * ((rows + m_.kernels.tile_rows - 1) / m_.kernels.tile_rows) * segments_of(weight);
    const Chunks chunks = chunks_of(weight, rows);
    walker_.phase(chunks.count(), [&](int c) {
      if (weight.blocks) m_.kernels.multiply_blocks(&product, chunks.first(c), chunks.end(c));
      else m_.kernels.multiply(&product, chunks.first(c), chunks.end(c), nullptr);
    });
  }

  // The smallest chunk takes about 2 us, since claiming it costs 0.1 us. With few rows a panel costs the
  // time to read it: as much as its products with kFewRows.
  Chunks chunks_of(const Linear& weight, int rows) const {
    constexpr int64_t kFewRows = 20, kLeastProducts = 700000;
    const int64_t panel = static_cast<int64_t>(weight.inputs_padded) * PANEL * std::max<int64_t>(rows, kFewRows);
    return Chunks(weight.panels, walker_.threads(), static_cast<int>(std::max<int64_t>(1, kLeastProducts / panel)));
  }

  // Rows are cheap, and a thread waits for cache lines that another one wrote: few, large groups.
  template <typename Work> void each_row(int rows, Work work) {
    const int threads = walker_.threads();
    const int group = std::max(1, threads == 1 ? rows : rows / (threads * 2));
    walker_.phase((rows + group - 1) / group, [&](int c) {
      for (int row = c * group; row < std::min((c + 1) * group, rows); row++) work(row);
    });
  }

  const int32_t* blocks_of(const Tile& tile) const {
    return step_.block_table + static_cast<size_t>(tile.sequence) * step_.table_width;
  }

  void rotate_and_store(const Layer& layer, int row) const {
    const Tile& tile = task_.cut.tiles[task_.cut.tile_of_row[row]];
    const int position = step_.positions[row], half = m_.shape.dim / 2;
    const size_t block = blocks_of(tile)[position / m_.shape.block_size];
    uint8_t* regions[kMaxHeads];
    for (int h = 0; h < m_.shape.kv_heads; h++)
      regions[h] = layer.pool.base + block * layer.pool.block_bytes + h * layer.pool.region_bytes;
    const size_t angles = static_cast<size_t>(position) * half;
    const Rotary rotary = {&m_.heads,
                           layer.has_rotary ? m_.cosines + angles : nullptr,
                           layer.has_rotary ? m_.sines + angles : nullptr,
                           layer.query_norm,
                           layer.key_norm,
                           query_scale(),
                           m_.shape.spreads != 0};
    float* qkv = s_.qkv + static_cast<size_t>(row) * s_.qkv_stride;
    m_.kernels.rotate_and_store(&rotary, qkv, regions, position % m_.shape.block_size);
  }

  // The transform is not normalised: it multiplies the product of a query and a key by D.
  float query_scale() const {
    const float dim = static_cast<float>(m_.shape.dim);
    return 1.0f / __builtin_sqrtf(dim) / (m_.shape.spreads ? dim : 1.0f);
  }

  AttentionItem item_of(const Layer& layer, const Unit& unit) const {
    const Tile& tile = task_.cut.tiles[unit.tile];
    return {&m_.heads,     layer.pool,   blocks_of(tile),     unit.head, tile.first_row, tile.rows, tile.first_position,
            layer.window,  s_.qkv,       s_.qkv_stride,       s_.attention, s_.attention_stride, nullptr, 0, false};
  }

  // Units are claimed in order: the next one of this thread is probably as far away as there are threads.
  void attend(const Layer& layer, int u) const {
    const std::vector<Unit>& units = task_.cut.units;
    const Unit& unit = units[u];
    const Tile& tile = task_.cut.tiles[unit.tile];
    AttentionItem item = item_of(layer, unit), next;
    const size_t following = static_cast<size_t>(u + walker_.threads());
    if (following < units.size()) {
      next = item_of(layer, units[following]);
      item.next = &next;
      item.next_split = units[following].split;
    }
    item.is_cold = u < walker_.threads();
    if (unit.split < 0) m_.kernels.attend_rows(&item);
    else m_.kernels.attend_split(&item, unit.split, partials_of(tile, unit.head) + unit.split * split_stride(tile));
  }

  int shared() const { return m_.shape.heads / m_.shape.kv_heads; }
  size_t result_size() const { return static_cast<size_t>(2 + m_.shape.dim); }
  size_t split_stride(const Tile& tile) const { return static_cast<size_t>(tile.rows) * shared() * result_size(); }
  float* partials_of(const Tile& tile, int head) const {
    return task_.partials + tile.partials + static_cast<size_t>(head) * tile.splits * split_stride(tile);
  }

  void merge(int row, float* out) const {
    const Tile& tile = task_.cut.tiles[task_.cut.tile_of_row[row]];
    for (int h = 0; h < m_.shape.heads; h++) {
      const int query = (row - tile.first_row) * shared() + h % shared();
      const float* first = partials_of(tile, h / shared()) + query * result_size();
      m_.kernels.merge_splits(first, tile.splits, split_stride(tile), m_.shape.dim, out + h * m_.shape.dim);
    }
  }

  void start_prefetch(size_t layer) {
    prefetch_ = {};
    segment_ = 0;
    if (layer == m_.layers.size() || m_.layers[layer].window != INT32_MAX) return;
    prefetch_ = {m_.layers[layer].pool.base, task_.cut.prefetch.data(), static_cast<int>(task_.cut.prefetch.size())};
  }

  static constexpr int kMaxHeads = 256;

  const Task& task_;
  const Model& m_;
  const QuireStep& step_;
  const Scratch& s_;
  Walker& walker_;
  Prefetch prefetch_ = {};  // of the next layer
  size_t layer_ = 0;
  int segment_ = 0;   // of the products since they are being fetched
};

}  // namespace

void Task::operator()(Walker& walker) const {
  const ThreadState state(model->kernels);
  Program(*this, walker).run();
}

}  // namespace quire
