// Loading: rotations folded into weights, and packing; once per tensor. Written in lanes too, so that
// every machine makes the same 8-bit weights from the same checkpoint.

// Sixteen vectors side by side, element by element: scratch[i * LANES + lane].
struct Bundle {
  float* w;
  int64_t step_element, step_lane;
  int lanes;

  void take(int size, float* scratch) const {
    for (int i = 0; i < size; i++)
      for (int lane = 0; lane < LANES; lane++)
        scratch[i * LANES + lane] = lane < lanes ? w[i * step_element + lane * step_lane] : 0.0f;
  }
  void put(int size, const float* scratch) const {
    for (int i = 0; i < size; i++)
      for (int lane = 0; lane < lanes; lane++) w[i * step_element + lane * step_lane] = scratch[i * LANES + lane];
  }
};

// y = (mix (x) H) diag(signs) x, where element o * power + p is (o, p) and H is the normalised
// Hadamard matrix of size `power`, `mix` an orthogonal odd x odd matrix.
static void rotate_bundle(float* x, float* mixed, int power, int odd, const float* signs, const float* mix) {
  const int size = power * odd;
  const Lanes norm = splat(1.0f / __builtin_sqrtf((float)power));
  for (int i = 0; i < size; i++) {
    const Lanes factor = signs ? norm * splat(signs[i]) : norm;
    store(x + i * LANES, load(x + i * LANES) * factor);
  }
  for (int distance = 1; distance < power; distance *= 2)
    for (int i = 0; i < size; i++)
      if (!(i % power & distance)) {
        float *p = x + i * LANES, *q = p + distance * LANES;
        const Lanes a = load(p), b = load(q);
        store(p, a + b);
        store(q, a - b);
      }
  if (odd == 1) return;
  for (int p = 0; p < power; p++)
    for (int to = 0; to < odd; to++) {
      Lanes y = splat(0.0f);
      for (int from = 0; from < odd; from++)
        y = fma(splat(mix[to * odd + from]), load(x + (from * power + p) * LANES), y);
      store(mixed + (to * power + p) * LANES, y);
    }
  memcpy(x, mixed, (size_t)size * LANES * sizeof(float));
}

// In place, on consecutive blocks of power * odd along an axis of w [rows, cols].
static void rotate(float* w, int64_t rows, int64_t cols, int axis, int power, int odd, const float* signs,
                   const float* mix) {
  const int size = power * odd;
  float* scratch = (float*)aligned_alloc(64, (size_t)size * LANES * sizeof(float) * 2);
  float* mixed = scratch + (size_t)size * LANES;
  const int64_t length = axis == 0 ? rows : cols, others = axis == 0 ? cols : rows;
  for (int64_t other = 0; other < others; other += LANES)
    for (int64_t at = 0; at + size <= length; at += size) {
      const int lanes = others - other < LANES ? (int)(others - other) : LANES;
      const Bundle bundle = axis == 0 ? Bundle{w + at * cols + other, cols, 1, lanes}
                                      : Bundle{w + other * cols + at, 1, cols, lanes};
      bundle.take(size, scratch);
      rotate_bundle(scratch, mixed, power, odd, signs, mix);
      bundle.put(size, scratch);
    }
  free(scratch);
}

static float largest_magnitude(const float* x, int count) {
  float most = 0.0f;
  for (int i = 0; i < count; i++) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
  return most;
}

// One output column: 8 bits with one scale, symmetric.
static void pack_column(const float* row, Linear& w, int column) {
  const float most = largest_magnitude(row, w.inputs);
  const float factor = most > 1e-30f ? 127.0f / most : 0.0f;
  int8_t* panel = w.packed + (size_t)(column / PANEL) * w.inputs_padded * PANEL + column % PANEL * 4;
  int32_t total = 0;
  for (int k = 0; k < w.inputs; k++) {
    const int8_t q = (int8_t)(int)__builtin_rintf(row[k] * factor);
    panel[(size_t)(k / 4) * PANEL * 4 + k % 4] = q;
    total += q;
  }
  w.scales[column] = most / 127.0f;
  w.corrections[column] = CODE_BIAS * total;
}

// Where output n goes. Gated: the outputs are gates, then as many ups, and column c of panel p becomes
// gate 16 p + c, or up 16 p + c - 16 for c >= 16. The number of gates is a multiple of LANES, or the
// last panel is not full.
static int packed_column(const Linear& linear, int n, bool gated) {
  if (!gated) return n;
  const int gates = linear.outputs / 2, unit = n < gates ? n : n - gates;
  return unit / LANES * PANEL + unit % LANES + (n < gates ? 0 : LANES);
}

// w [outputs, inputs]; the destination starts as zeros.
static void pack(const float* w, const float* bias, bool gated, Linear* linear) {
  for (int n = 0; n < linear->outputs; n++) {
    const int column = packed_column(*linear, n, gated);
    pack_column(w + (size_t)n * linear->inputs, *linear, column);
    if (bias) linear->bias[column] = bias[n];
  }
}
