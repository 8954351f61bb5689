// Loading of encoders, and their C interface.
#include "encoder.h"

#include <cstdio>
#include <cstring>
#include <string>

namespace quire {
namespace {

constexpr int kPhases = 16;  // of a layer, at most

// The kernels of encoders for a variant: integer instructions make no difference to them.
const EncoderKernels* encoder_kernels_of(const Kernels& kernels) {
#if defined(__x86_64__)
  const std::string name = kernels.name;
  if (name == "amx" || name == "avx512") return avx512_encoder_kernels();
  if (name == "avxvnni" || name == "avx2") return avx2_encoder_kernels();
#endif
  (void)kernels;
  return portable_encoder_kernels();
}

}  // namespace

Encoder::Encoder(const QuireEncoderShape& given, const Kernels& chosen, const EncoderKernels& float_kernels)
    : shape(given), kernels(chosen), floats(float_kernels), layers(static_cast<size_t>(given.layers)) {
  for (size_t i = 0; i < layers.size(); i++) layers[i].window = shape.windows[i];
  shape.windows = nullptr;
  team = std::make_unique<Team<EncoderTask>>(shape.threads, kPhases * shape.layers + 4);
}

Matrix& Encoder::matrix(int layer, int which) {
  if (which == QUIRE_M_HEAD_DENSE) return head_dense;
  if (which == QUIRE_M_HEAD_OUT) return head_out;
  EncoderLayer& l = layers[static_cast<size_t>(layer)];
  Matrix* const of_layer[] = {&l.qkv, &l.out, &l.up, &l.down};
  return *of_layer[which];
}

void Encoder::load_matrix(int layer, int which, const float* weight, const float* bias) {
  const int hidden = shape.hidden, up = shape.gated ? 2 * shape.width : shape.width;
  const int sizes[][2] = {{query_size() + 2 * kv_size(), hidden}, {hidden, query_size()}, {up, hidden},
                          {hidden, shape.width},                  {hidden, hidden},       {shape.labels, hidden}};
  Matrix& to = matrix(layer, which);
  const int outputs = sizes[which][0], inputs = sizes[which][1];
  const bool of_mlp = which == QUIRE_M_UP || which == QUIRE_M_DOWN;
  if (shape.eight_bit && of_mlp) return pack_coded(to, outputs, inputs, weight, bias);
  to.dense = {outputs, inputs, (outputs + PANEL - 1) / PANEL, nullptr, nullptr};
  pack_dense(to.dense, weight, bias);
}

void Encoder::pack_dense(Dense& dense, const float* weight, const float* bias) {
  const size_t columns = static_cast<size_t>(dense.panels) * PANEL, inputs = static_cast<size_t>(dense.inputs);
  dense.packed = weights.take<float>(columns * inputs);
  dense.bias = weights.take<float>(columns);
  for (size_t n = 0; n < static_cast<size_t>(dense.outputs); n++) {
    float* panel = dense.packed + n / PANEL * inputs * PANEL + n % PANEL;
    for (size_t k = 0; k < inputs; k++) panel[k * PANEL] = weight[n * inputs + k];
    if (bias) dense.bias[n] = bias[n];
  }
}

void Encoder::pack_coded(Matrix& matrix, int outputs, int inputs, const float* weight, const float* bias) {
  Linear& linear = matrix.coded;
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.inputs_padded = (inputs + K_STEP - 1) / K_STEP * K_STEP;
  linear.panels = (outputs + PANEL - 1) / PANEL;
  const size_t columns = static_cast<size_t>(linear.panels) * PANEL;
  linear.packed = weights.take<int8_t>(columns * linear.inputs_padded);
  linear.scales = weights.take<float>(columns);
  linear.corrections = weights.take<int32_t>(columns);
  linear.bias = bias ? weights.take<float>(columns) : nullptr;
  matrix.block = inputs & -inputs;
  if (matrix.block > 512) matrix.block = 512;
  std::vector<float> rotated(weight, weight + static_cast<size_t>(outputs) * inputs);
  kernels.rotate(rotated.data(), outputs, inputs, 1, matrix.block, 1, nullptr, nullptr);
  kernels.pack(rotated.data(), bias, false, &linear);
}

const float* Encoder::copy(const float* values, int count) {
  if (!values) return nullptr;
  float* own = weights.take<float>(static_cast<size_t>(count));
  std::memcpy(own, values, static_cast<size_t>(count) * sizeof(float));
  return own;
}

void Encoder::load_vector(int layer, int which, const float* weight, const float* bias) {
  EncoderLayer& l = layers[static_cast<size_t>(layer)];
  if (which == QUIRE_V_QUERY) {
    l.query_norm = copy(weight, shape.dim);
  } else if (which == QUIRE_V_KEY) {
    l.key_norm = copy(weight, shape.dim);
  } else {
    Vector* const places[] = {&embed_norm, &final_norm, &head_norm, &l.attention_norm, &l.mlp_norm};
    *places[which] = {copy(weight, shape.hidden), copy(bias, shape.hidden)};
  }
}

}  // namespace quire

QuireEncoder* quire_encoder_create(const QuireEncoderShape* shape, const char* variant, char* error, size_t size) {
  const Kernels* kernels = quire::find_variant(variant);
  if (!kernels) {
    std::snprintf(error, size, "this machine cannot run this variant");
    return nullptr;
  }
  try {
    return new QuireEncoder(*shape, *kernels, *quire::encoder_kernels_of(*kernels));
  } catch (const std::exception& failure) {
    std::snprintf(error, size, "not enough memory or threads: %s", failure.what());
    return nullptr;
  }
}

void quire_encoder_destroy(QuireEncoder* encoder) { delete encoder; }
const char* quire_encoder_variant(const QuireEncoder* encoder) { return encoder->kernels.name; }

void quire_encoder_matrix(QuireEncoder* encoder, int32_t layer, int32_t which, const float* weight, const float* bias) {
  encoder->load_matrix(layer, which, weight, bias);
}
void quire_encoder_vector(QuireEncoder* encoder, int32_t layer, int32_t which, const float* weight, const float* bias) {
  encoder->load_vector(layer, which, weight, bias);
}
void quire_encoder_table(QuireEncoder* encoder, int32_t which, const float* table) { encoder->tables[which] = table; }

int32_t quire_encode(QuireEncoder* encoder, const QuireEncoding* step) {
  try {
    encoder->run(*step);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
