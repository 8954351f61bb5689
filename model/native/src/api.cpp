// The C interface: checks arguments, and turns exceptions into messages.
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cpu.h"
#include "driver.h"
#include "model.h"
#include "sampler.h"

namespace {

void write_error(char* error, size_t size, const char* text) { std::snprintf(error, size, "%s", text); }

// Why a sequence of a step is invalid, or null. Its rows lie inside the step.
const char* sequence_error(const QuireShape& shape, const QuireStep& step, int32_t s) {
  const int32_t first = step.query_starts[s], last = step.query_starts[s + 1] - 1;
  for (int32_t t = first; t < last; t++)
    if (step.positions[t + 1] != step.positions[t] + 1) return "positions of a sequence must rise one by one";
  const int32_t blocks = step.positions[last] / shape.block_size + 1;
  if (blocks > step.table_width) return "a block table is shorter than its context";
  for (int32_t b = 0; b < blocks; b++) {
    const int32_t block = step.block_table[static_cast<size_t>(s) * step.table_width + b];
    if (block < 0 || block >= shape.num_blocks) return "block number outside the pool";
  }
  return nullptr;
}

// Why a step is invalid, or null: every number that becomes an index is checked.
const char* step_error(const QuireModel& model, const QuireStep& step) {
  const QuireShape& shape = model.shape;
  if (step.rows < 0 || step.rows > shape.max_rows) return "more rows than the runner was built for";
  if (step.outputs < 0 || step.outputs > shape.max_rows) return "more outputs than the runner was built for";
  if (step.sequences < 0 || step.sequences > step.rows || step.table_width < 0)
    return "a step has at most a sequence per row";
  if (step.query_starts[0] != 0 || step.query_starts[step.sequences] != step.rows)
    return "query_starts must rise from 0 to the number of rows";
  for (int32_t s = 0; s < step.sequences; s++)
    if (step.query_starts[s + 1] <= step.query_starts[s] || step.query_starts[s + 1] > step.rows)
      return "query_starts must rise from 0 to the number of rows";
  for (int32_t t = 0; t < step.rows; t++) {
    if (step.tokens[t] < 0 || step.tokens[t] >= shape.vocab) return "token id outside the vocabulary";
    if (step.positions[t] < 0 || step.positions[t] >= shape.max_positions) return "position beyond the rotary table";
  }
  for (int32_t s = 0; s < step.sequences; s++)
    if (const char* problem = sequence_error(shape, step, s)) return problem;
  if (step.adapters)
    for (int32_t s = 0; s < step.sequences; s++)
      if (step.adapters[s] < 0 || static_cast<size_t>(step.adapters[s]) > model.adapters.size())
        return "a sequence has an adapter that is not loaded";
  const int32_t computed = step.rows ? step.rows : model.computed_rows;
  for (int32_t i = 0; i < step.outputs; i++) {
    if (step.output_rows[i] < 0 || step.output_rows[i] >= computed) return "output row outside the step";
    if (step.logits && reinterpret_cast<uintptr_t>(step.logits[i]) % 64) return "logits must begin a cache line";
  }
  return step.sampling ? quire::sampling_error(*step.sampling, step.outputs, shape.vocab) : nullptr;
}

}  // namespace

void quire_variants(char* names, size_t size) {
  const Kernels* list[quire::kMaxVariants];
  const int count = quire::available_variants(list);
  size_t at = 0;
  if (size) names[0] = 0;
  for (int i = 0; i < count && at < size; i++) at += std::snprintf(names + at, size - at, i ? " %s" : "%s", list[i]->name);
}

size_t quire_block_bytes(const QuireShape* shape) {
  return quire::region_bytes(*shape) * shape->kv_heads * shape->layers;
}

QuireModel* quire_create(const QuireShape* shape, const char* variant, char* error, size_t size) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) {
    write_error(error, size, "this machine cannot run the variant");
    return nullptr;
  }
  try {
    return new QuireModel(*shape, *kernels);
  } catch (const std::exception& problem) {
    write_error(error, size, problem.what());
    return nullptr;
  }
}

QuireModel::QuireModel(const QuireShape& given, const Kernels& chosen) : quire::Model(given, chosen) {}
QuireModel::~QuireModel() = default;

void quire_destroy(QuireModel* model) { delete model; }

const char* quire_variant(const QuireModel* model) { return model->kernels.name; }

void quire_rotate(const QuireModel* model, float* w, int64_t rows, int64_t cols, int32_t axis, int32_t power,
                  int32_t odd, const float* signs, const float* mix) {
  model->kernels.rotate(w, rows, cols, axis, power, odd, signs, mix);
}

void quire_load_linear(QuireModel* model, int32_t layer, int32_t which, const float* w, const float* bias) {
  model->kernels.pack(w, bias, which == QUIRE_GATE_UP, &model->linear(layer, which));
}

void quire_load_blocks(QuireModel* model, int32_t layer, int32_t which, const uint8_t* w, const float* bias) {
  model->kernels.pack_blocks(w, bias, which == QUIRE_GATE_UP, &model->linear(layer, which));
}

void quire_load_norms(QuireModel* model, int32_t layer, const float* attention, const float* mlp) {
  quire::Layer& l = model->layers[static_cast<size_t>(layer)];
  std::memcpy(l.attention_norm, attention, model->shape.hidden * sizeof(float));
  std::memcpy(l.mlp_norm, mlp, model->shape.hidden * sizeof(float));
}

void quire_load_rotation(QuireModel* model, const float* signs, const float* mix) {
  const Rotation& own = model->head_rotation;
  std::memcpy(own.signs, signs, static_cast<size_t>(own.power) * own.odd * sizeof(float));
  std::memcpy(own.mix, mix, static_cast<size_t>(own.odd) * own.odd * sizeof(float));
}

void quire_load_embedding(QuireModel* model, int32_t first, int32_t count, const float* w) {
  const size_t stride = model->scratch.residual_stride;
  for (int32_t row = 0; row < count; row++)
    for (int32_t c = 0; c < model->shape.hidden; c++) {
      uint32_t bits;
      std::memcpy(&bits, w + static_cast<size_t>(row) * model->shape.hidden + c, 4);
      bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
      model->embedding[static_cast<size_t>(first + row) * stride + c] = static_cast<uint16_t>(bits >> 16);
    }
}

void quire_load_head_norms(QuireModel* model, int32_t layer, const float* query, const float* key) {
  quire::Layer& l = model->layers[static_cast<size_t>(layer)];
  std::memcpy(l.query_norm, query, model->shape.dim * sizeof(float));
  std::memcpy(l.key_norm, key, model->shape.dim * sizeof(float));
}

int32_t quire_load_adapter(QuireModel* model, int32_t adapter, int32_t layer, int32_t which, int32_t rank,
                           const float* a, const float* b, char* error, size_t size) {
  if (rank < 1 || rank > LOW_RANK_MAX) {
    write_error(error, size, "the ranks of an adapter's fused products must add up to at most 1024");
    return 1;
  }
  try {
    model->load_adapter(adapter, layer, which, rank, a, b);
    return 0;
  } catch (const std::exception& problem) {
    write_error(error, size, problem.what());
    return 1;
  }
}

int32_t quire_weights(const QuireModel* model, int32_t index, uint8_t** start, size_t* bytes) {
  const std::vector<quire::Memory::Range>& ranges = model->weights.ranges();
  if (index < 0 || static_cast<size_t>(index) >= ranges.size()) return 0;
  *start = ranges[static_cast<size_t>(index)].start;
  *bytes = ranges[static_cast<size_t>(index)].bytes;
  return 1;
}

int32_t quire_step(QuireModel* model, const QuireStep* step, char* error, size_t size) {
  const char* problem = step_error(*model, *step);
  if (!problem && model->driver && !model->driver->idle()) problem = "launched steps must be collected first";
  if (problem) {
    write_error(error, size, problem);
    return 1;
  }
  try {
    if (step->rows) model->computed_rows = step->rows;
    model->run(*step);
    return 0;
  } catch (const std::exception& thrown) {
    write_error(error, size, thrown.what());
    return 1;
  }
}

int32_t quire_launch(QuireModel* model, const QuireStep* step, const int32_t* unread, char* error, size_t size) {
  const char* problem = step_error(*model, *step);
  for (int32_t t = 0; unread && !problem && t < step->rows; t++)
    if (unread[t] >= model->launched_outputs) problem = "an unread token is none of the step before";
  if (problem) {
    write_error(error, size, problem);
    return 1;
  }
  if (step->rows) model->computed_rows = step->rows;
  if (quire::Driver::chooses(*step)) model->launched_outputs = step->outputs;
  if (!model->driver) model->driver = std::make_unique<quire::Driver>(*model);
  model->driver->launch(*step, unread);
  return 0;
}

int32_t quire_collect(QuireModel* model, double* seconds, char* error, size_t size) {
  if (!model->driver || model->driver->idle()) {
    write_error(error, size, "no step was launched");
    return 1;
  }
  const quire::Driver::Flight flight = model->driver->collect();
  *seconds = flight.seconds;
  write_error(error, size, flight.error.c_str());
  return flight.error.empty() ? 0 : 1;
}

namespace {

// x [rows, inputs], padded, as activations of a product; y [rows, outputs] without the padding.
struct Trial {
  const Kernels& kernels;
  Linear linear;
  quire::Memory memory;

  Trial(const Kernels& chosen, int32_t outputs, int32_t inputs, bool bias) : kernels(chosen), linear{} {
    linear.outputs = outputs;
    linear.inputs = inputs;
    linear.inputs_padded = quire::round_up(inputs, K_STEP);
    linear.panels = quire::round_up(outputs, PANEL) / PANEL;
    if (bias) linear.bias = memory.take<float>(columns());
  }

  size_t columns() const { return static_cast<size_t>(linear.panels) * PANEL; }

  void run(const float* x, int32_t rows, float* y) {
    const bool blocks = linear.blocks != nullptr;
    const size_t stride = blocks ? block_row_stride(linear.inputs) : code_stride(linear.inputs_padded, kernels.code_bytes);
    const Codes codes = {memory.take<uint8_t>((rows + TILE_ROWS_MAX) * stride), stride, memory.take<float>(rows)};
    float* padded = memory.take<float>(static_cast<size_t>(linear.inputs_padded));
    float* wide = memory.take<float>(rows * columns());
    for (int32_t row = 0; row < rows; row++) {
      std::memcpy(padded, x + static_cast<size_t>(row) * linear.inputs, linear.inputs * sizeof(float));
      if (blocks) kernels.to_blocks(padded, linear.inputs, codes.rows + row * stride);
      else kernels.to_codes(padded, linear.inputs_padded, 1.0f, codes.rows + row * stride, codes.scales + row);
    }
    const Product product = {&linear, codes, rows, Epilogue::STORE, wide, columns()};
    kernels.thread_begin();
    if (blocks) kernels.multiply_blocks(&product, 0, linear.panels);
    else kernels.multiply(&product, 0, linear.panels, nullptr);
    kernels.thread_end();
    for (int32_t row = 0; row < rows; row++)
      std::memcpy(y + static_cast<size_t>(row) * linear.outputs, wide + row * columns(), linear.outputs * sizeof(float));
  }
};

}  // namespace

int32_t quire_product(const char* variant, const float* w, const float* bias, int32_t outputs, int32_t inputs,
                      const float* x, int32_t rows, float* y) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return 1;
  Trial trial(*kernels, outputs, inputs, bias != nullptr);
  trial.linear.packed = trial.memory.take<int8_t>(trial.linear.inputs_padded * trial.columns());
  trial.linear.scales = trial.memory.take<float>(trial.columns());
  trial.linear.corrections = trial.memory.take<int32_t>(trial.columns());
  kernels->pack(w, bias, false, &trial.linear);
  trial.run(x, rows, y);
  return 0;
}

int32_t quire_block_product(const char* variant, const uint8_t* w, const float* bias, int32_t outputs, int32_t inputs,
                            const float* x, int32_t rows, float* y) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return 1;
  Trial trial(*kernels, outputs, inputs, bias != nullptr);
  trial.linear.blocks = trial.memory.take<uint8_t>(static_cast<size_t>(inputs) / BLOCK_INPUTS * BLOCK_BYTES * trial.linear.panels);
  kernels->pack_blocks(w, bias, false, &trial.linear);
  trial.run(x, rows, y);
  return 0;
}

int32_t quire_sample(const char* variant, float* logits, int32_t rows, int32_t vocab, const QuireSampling* sampling) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return 1;
  if (quire::sampling_error(*sampling, rows, vocab)) return 2;
  for (const quire::SampledRow& row : quire::rows_of(*sampling, rows, vocab)) {
    float* const x = logits + static_cast<size_t>(row.row) * vocab;
    Argmax argmax = {-__builtin_inff(), 0};
    for (int32_t i = 0; i < vocab; i++)
      if (x[i] > argmax.value) argmax = {x[i], i};
    const int32_t forced = quire::forced_token(*sampling, row);
    if (forced >= 0) sampling->tokens[row.row] = forced;
    else if (quire::is_plain(*sampling, row)) sampling->tokens[row.row] = argmax.id;
    else quire::sample_row(*kernels, *sampling, row, argmax, x, vocab);
  }
  return 0;
}

int32_t quire_partition(const char* variant, const float* x, int32_t count, float temperature, float bound,
                        int32_t* places, int64_t* bounds) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return -1;
  const Tempering tempering = {0.0f, temperature, 0};
  Bounds rest;
  const int32_t found = kernels->partition(x, count, &tempering, bound, places, &rest);
  bounds[0] = rest.low;
  bounds[1] = rest.high;
  return found;
}

int32_t quire_weigh(const char* variant, const float* x, int32_t count, int64_t* weights) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) return 1;
  const Tempering tempering = {0.0f, 1.0f, 0};
  kernels->weigh(x, count, &tempering, weights);
  return 0;
}
