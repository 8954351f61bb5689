// The step of an encoder, top to bottom: what `states` of model/transformer.py does, then pooling and the
// classifier, in phases over chunks of work. A phase reads only what earlier phases wrote.
#include <algorithm>

#include "encoder.h"
#include "thread_state.h"

namespace quire {
namespace {

constexpr int kRowsOfBlock = 96;  // of a product, so that its inputs stay in the L2 cache

size_t stride_of(int size) { return static_cast<size_t>((size + K_STEP - 1) / K_STEP * K_STEP); }

class EncoderProgram {
 public:
  EncoderProgram(const EncoderTask& task, Walker& walker)
      : task_(task), m_(*task.model), s_(task.buffers), walker_(walker), rows_(task.rows) {}

  void run() {
    embed();
    for (const EncoderLayer& layer : m_.layers) {
      attention(layer);
      mlp(layer);
    }
    walker_.phase(task_.step.sequences, [&](int s) { finish(s); });
  }

 private:
  float* input() const { return m_.shape.post_norm ? s_.stream : s_.input; }
  float* at(float* buffer, int row, int size) const { return buffer + static_cast<size_t>(row) * stride_of(size); }

  void norm(const Vector& vector, const float* x, float* out) const {
    const NormShape shape = {m_.shape.hidden, m_.shape.rms != 0, m_.shape.norm_eps};
    m_.floats.norm(&shape, x, vector.weight, vector.bias, out);
  }

  void embed() {
    each_row([&](int row) {
      const int hidden = m_.shape.hidden, position = position_of(row);
      float* x = at(s_.stream, row, hidden);
      const auto vector = [&](int table, int64_t index) { return m_.tables[table] + index * hidden; };
      std::copy_n(vector(QUIRE_T_EMBED, task_.step.tokens[row]), hidden, x);
      if (m_.tables[QUIRE_T_POSITION]) {
        m_.floats.add(vector(QUIRE_T_POSITION, position + m_.shape.position_offset), hidden, x);
      }
      if (m_.tables[QUIRE_T_TYPE]) m_.floats.add(vector(QUIRE_T_TYPE, task_.step.types[row]), hidden, x);
      if (m_.embed_norm.weight) norm(m_.embed_norm, x, x);
      if (!m_.shape.post_norm) next_input(m_.layers[0].attention_norm, row);
    });
  }

  // Of networks with norms before the sublayers: the input of the next one.
  void next_input(const Vector& vector, int row) const {
    const float* x = at(s_.stream, row, m_.shape.hidden);
    float* to = at(s_.input, row, m_.shape.hidden);
    if (vector.weight) norm(vector, x, to);
    else std::copy_n(x, m_.shape.hidden, to);
  }

  // stream += sums, with the norm behind it; or in front of what follows.
  void add_sublayer(const Vector& own, const Vector& next) {
    each_row([&](int row) {
      float* x = at(s_.stream, row, m_.shape.hidden);
      m_.floats.add(at(s_.sums, row, m_.shape.hidden), m_.shape.hidden, x);
      if (m_.shape.post_norm) norm(own, x, x);
      else next_input(next, row);
    });
  }

  void attention(const EncoderLayer& layer) {
    const int width = m_.query_size() + 2 * m_.kv_size();
    multiply(layer.qkv, input(), m_.shape.hidden, s_.qkv, width, Activation::NONE);
    if (m_.shape.rotary || layer.query_norm) each_row([&](int row) { place(layer, row); });
    const int heads = m_.shape.kv_heads;
    walker_.phase(task_.step.sequences * heads, [&](int i) { pack(i / heads, i % heads); });
    const int tiles = static_cast<int>(task_.tiles.size() / 2);
    walker_.phase(tiles * m_.shape.heads, [&](int i) { attend(layer, i / m_.shape.heads, i % m_.shape.heads); });
    multiply(layer.out, s_.mixed, m_.query_size(), s_.sums, m_.shape.hidden, Activation::NONE);
    add_sublayer(layer.attention_norm, layer.mlp_norm);
  }

  void mlp(const EncoderLayer& layer) {
    const int width = m_.shape.width;
    const auto kind = static_cast<Activation>(m_.shape.activation);
    if (m_.shape.gated) {
      multiply(layer.up, input(), m_.shape.hidden, s_.wide, 2 * width, Activation::NONE);
      each_row([&](int row) {
        const float* gates = at(s_.wide, row, 2 * width);
        m_.floats.gate(gates, gates + width, width, kind, at(s_.gated, row, width));
      });
      multiply(layer.down, s_.gated, width, s_.sums, m_.shape.hidden, Activation::NONE);
    } else {
      multiply(layer.up, input(), m_.shape.hidden, s_.wide, width, kind);
      multiply(layer.down, s_.wide, width, s_.sums, m_.shape.hidden, Activation::NONE);
    }
    const size_t index = static_cast<size_t>(&layer - m_.layers.data()) + 1;
    add_sublayer(layer.mlp_norm, index < m_.layers.size() ? m_.layers[index].attention_norm : m_.final_norm);
  }

  // Norms and rotary positions of a row's queries and keys.
  void place(const EncoderLayer& layer, int row) const {
    const int dim = m_.shape.dim, heads = m_.shape.heads;
    const NormShape shape = {dim, true, m_.shape.norm_eps};
    const bool local = layer.window != INT32_MAX;
    const size_t angles = static_cast<size_t>(position_of(row)) * (dim / 2);
    for (int h = 0; h < heads + m_.shape.kv_heads; h++) {
      float* x = at(s_.qkv, row, m_.query_size() + 2 * m_.kv_size()) + h * dim;
      const float* weight = h < heads ? layer.query_norm : layer.key_norm;
      if (weight) m_.floats.norm(&shape, x, weight, nullptr, x);
      if (m_.shape.rotary)
        m_.floats.rotate(x, dim, m_.tables[local ? QUIRE_T_LOCAL_COS : QUIRE_T_COS] + angles,
                         m_.tables[local ? QUIRE_T_LOCAL_SIN : QUIRE_T_SIN] + angles);
    }
  }

  int position_of(int row) const {
    return row - task_.step.starts[task_.sequence_of_row[static_cast<size_t>(row)]];
  }
  int length_of(int s) const { return task_.step.starts[s + 1] - task_.step.starts[s]; }

  float* keys_of(int s, int head) const {
    const size_t own = static_cast<size_t>((length_of(s) + PANEL - 1) / PANEL) * m_.shape.dim;
    return s_.keys + (task_.places.keys[static_cast<size_t>(s)] + head * own) * PANEL;
  }
  float* values_of(int s, int head) const {
    const size_t own = static_cast<size_t>((m_.shape.dim + PANEL - 1) / PANEL) * length_of(s);
    return s_.values + (task_.places.values[static_cast<size_t>(s)] + head * own) * PANEL;
  }

  void pack(int s, int head) const {
    const int width = m_.query_size() + 2 * m_.kv_size(), dim = m_.shape.dim;
    const float* k = at(s_.qkv, task_.step.starts[s], width) + m_.query_size() + head * dim;
    m_.floats.pack_head(k, k + m_.kv_size(), stride_of(width), length_of(s), dim, keys_of(s, head), values_of(s, head));
  }

  void attend(const EncoderLayer& layer, int tile, int head) const {
    const int s = task_.tiles[static_cast<size_t>(2 * tile)], first = task_.tiles[static_cast<size_t>(2 * tile + 1)];
    const int width = m_.query_size() + 2 * m_.kv_size(), dim = m_.shape.dim, tokens = length_of(s);
    const int shared = m_.shape.heads / m_.shape.kv_heads, row = task_.step.starts[s] + first;
    thread_local std::vector<float> scratch;  // of any encoder in this thread
    scratch.resize(std::max(scratch.size(), attention_scratch(tokens, dim)));
    const HeadAttention item = {at(s_.qkv, row, width) + head * dim,
                                stride_of(width),
                                keys_of(s, head / shared),
                                values_of(s, head / shared),
                                tokens,
                                dim,
                                first,
                                std::min(kAttentionRows, tokens - first),
                                layer.window,
                                m_.shape.causal != 0,
                                1.0f / __builtin_sqrtf(static_cast<float>(dim)),
                                at(s_.mixed, row, m_.query_size()) + head * dim,
                                stride_of(m_.query_size()),
                                scratch.data()};
    m_.floats.attend(&item);
  }

  // One vector of a sequence: pooled, then scored or normalised.
  void finish(int s) const {
    const int first = task_.step.starts[s], hidden = m_.shape.hidden, labels = m_.shape.labels;
    const float* states = at(m_.shape.post_norm ? s_.stream : s_.input, first, hidden);
    const size_t stride = stride_of(hidden);
    std::vector<float> pooled(stride), scored(stride_of(std::max(hidden, labels)));
    if (m_.shape.pooling == 0) m_.floats.mean(states, stride, length_of(s), hidden, pooled.data());
    else std::copy_n(states + (m_.shape.pooling == 1 ? 0 : length_of(s) - 1) * stride, hidden, pooled.data());
    if (labels) {
      if (m_.shape.head_dense) {
        row_product(m_.head_dense, pooled.data(), static_cast<Activation>(m_.shape.head_activation), scored.data());
        std::copy_n(scored.data(), hidden, pooled.data());
      }
      if (m_.head_norm.weight) norm(m_.head_norm, pooled.data(), pooled.data());
      row_product(m_.head_out, pooled.data(), Activation::NONE, scored.data());
      std::copy_n(scored.data(), labels, task_.step.out + static_cast<size_t>(s) * labels);
    } else {
      if (m_.shape.normalised) m_.floats.normalise(pooled.data(), hidden);
      std::copy_n(pooled.data(), hidden, task_.step.out + static_cast<size_t>(s) * hidden);
    }
  }

  void row_product(const Matrix& matrix, const float* x, Activation activation, float* out) const {
    for (int panel = 0; panel < matrix.dense.panels; panel++)
      m_.floats.multiply(&matrix.dense, panel, x, 0, 1, activation, out, 0);
  }

  // out = activation(x W^T + bias), for all rows.
  void multiply(const Matrix& weight, const float* x, int inputs, float* out, int outputs, Activation activation) {
    if (weight.is_coded()) return multiply_coded(weight, x, inputs, out, outputs, activation);
    const size_t from = stride_of(inputs), to = stride_of(outputs);
    const int blocks = (rows_ + kRowsOfBlock - 1) / kRowsOfBlock, panels = weight.dense.panels;
    units(blocks * panels, [&](int unit) {
      const int first = unit / panels * kRowsOfBlock, rows = std::min(kRowsOfBlock, rows_ - first);
      m_.floats.multiply(&weight.dense, unit % panels, x + first * from, from, rows, activation, out + first * to, to);
    });
  }

  // The same in 8 bits: inputs are spread, then rounded.
  void multiply_coded(const Matrix& weight, const float* x, int inputs, float* out, int outputs, Activation kind) {
    const size_t from = stride_of(inputs), to = stride_of(outputs);
    const size_t stride = code_stride(weight.coded.inputs_padded, m_.kernels.code_bytes);
    const Codes codes = {s_.codes, stride, s_.scales};
    const float normal = 1.0f / __builtin_sqrtf(static_cast<float>(weight.block));
    each_row([&](int row) {
      thread_local std::vector<float> spread;
      spread.assign(x + row * from, x + (row + 1) * from);
      m_.kernels.hadamard(spread.data(), inputs, weight.block);
      m_.kernels.to_codes(spread.data(), weight.coded.inputs_padded, normal, codes.rows + row * stride, codes.scales + row);
    });
    const Product product = {&weight.coded, codes, rows_, Epilogue::STORE, out, to, nullptr, nullptr, nullptr, 0};
    units(weight.coded.panels, [&](int panel) { m_.kernels.multiply(&product, panel, panel + 1, nullptr); });
    if (kind == Activation::NONE) return;
    each_row([&](int row) { m_.floats.activate(out + row * to, outputs, kind); });
  }

  // Units of work in chunks: a few for each thread, so that threads end together.
  template <typename Work> void units(int count, Work work) {
    const int chunk = std::max(1, count / (walker_.threads() * 8));
    walker_.phase((count + chunk - 1) / chunk, [&](int c) {
      for (int unit = c * chunk; unit < std::min((c + 1) * chunk, count); unit++) work(unit);
    });
  }

  template <typename Work> void each_row(Work work) {
    const int group = std::max(1, walker_.threads() == 1 ? rows_ : rows_ / (walker_.threads() * 2));
    walker_.phase((rows_ + group - 1) / group, [&](int c) {
      for (int row = c * group; row < std::min((c + 1) * group, rows_); row++) work(row);
    });
  }

  const EncoderTask& task_;
  Encoder& m_;
  const EncoderBuffers& s_;
  Walker& walker_;
  const int rows_;
};

}  // namespace

void EncoderTask::operator()(Walker& walker) const {
  const ThreadState state(model->kernels);
  EncoderProgram(*this, walker).run();
}

void Encoder::run(const QuireEncoding& step) {
  EncoderTask task;
  task.model = this;
  task.step = step;
  const int rows = step.starts[step.sequences];
  task.rows = rows;
  for (int s = 0; s < step.sequences; s++) {
    const int tokens = step.starts[s + 1] - step.starts[s];
    task.places.keys.push_back(task.key_rows);
    task.places.values.push_back(task.value_rows);
    task.key_rows += static_cast<size_t>((tokens + PANEL - 1) / PANEL) * kv_size();
    task.value_rows += static_cast<size_t>((shape.dim + PANEL - 1) / PANEL) * tokens * shape.kv_heads;
    task.sequence_of_row.insert(task.sequence_of_row.end(), static_cast<size_t>(tokens), s);
    for (int first = 0; first < tokens; first += kAttentionRows) task.tiles.insert(task.tiles.end(), {s, first});
  }
  task.buffers = make_room(task);
  team->run(task, shape.threads);
}

EncoderBuffers Encoder::make_room(const EncoderTask& task) {
  const auto grow = [](auto& buffer, size_t size) { if (buffer.size() < size) buffer.resize(size); };
  const size_t rows = static_cast<size_t>(task.rows), hidden = rows * stride_of(shape.hidden);
  const int wide = shape.gated ? 2 * shape.width : shape.width;
  for (auto* buffer : {&scratch.stream, &scratch.input, &scratch.sums}) grow(*buffer, hidden);
  grow(scratch.qkv, rows * stride_of(query_size() + 2 * kv_size()));
  grow(scratch.mixed, rows * stride_of(query_size()));
  grow(scratch.wide, rows * stride_of(wide));
  if (shape.gated) grow(scratch.gated, rows * stride_of(shape.width));
  grow(scratch.keys, task.key_rows * PANEL);
  grow(scratch.values, task.value_rows * PANEL);
  if (shape.eight_bit) {
    const int most = std::max(shape.hidden, shape.width);
    grow(scratch.codes, (rows + TILE_ROWS_MAX) * code_stride(static_cast<int>(stride_of(most)), kernels.code_bytes));
    grow(scratch.scales, rows + TILE_ROWS_MAX);
  }
  return {scratch.stream.data(), scratch.input.data(), scratch.sums.data(),   scratch.qkv.data(),
          scratch.mixed.data(),  scratch.wide.data(),  scratch.gated.data(),  scratch.keys.data(),
          scratch.values.data(), scratch.scales.data(), scratch.codes.data()};
}

}  // namespace quire
