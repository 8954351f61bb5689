// Float32 kernels of encoders; see encoder_kernels.h.

// Rows of a tile: as many sums as the registers hold, with two vectors of LANES per row.
#if defined(__AVX512F__)
constexpr int DENSE_ROWS = 12;
#else
constexpr int DENSE_ROWS = 3;
#endif

// Sums of ROWS rows with one panel. Rows by threes: an address is then one of few pointers plus 0, 1 or 2
// strides, and all of them fit the registers.
template <int ROWS>
QUIRE_INLINE void multiply_rows(const float* x, size_t stride, const float* w, int inputs, Lanes (*sums)[2]) {
  const float* thirds[(ROWS + 2) / 3];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r += 3) thirds[r / 3] = x + r * stride;
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = splat(0.0f);
  for (int k = 0; k < inputs; k++, w += PANEL) {
    const Lanes left = load(w), right = load(w + LANES);
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const Lanes one = splat(thirds[r / 3][r % 3 * stride]);
      sums[r][0] = fma(one, left, sums[r][0]);
      sums[r][1] = fma(one, right, sums[r][1]);
    }
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r += 3) thirds[r / 3]++;
  }
}

// put(row, left, right) receives the sums of each of `rows` rows.
template <int ROWS, typename Put>
static void multiply_some(const float* x, size_t stride, const float* w, int inputs, int rows, Put put) {
  if (rows == ROWS) {
    Lanes sums[ROWS][2];
    multiply_rows<ROWS>(x, stride, w, inputs, sums);
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) put(r, sums[r][0], sums[r][1]);
    return;
  }
  if constexpr (ROWS > 1) multiply_some<ROWS - 1>(x, stride, w, inputs, rows, put);
}

// The same in tiles of nearly equal size.
template <typename Put>
static void multiply_panel(const float* x, size_t stride, const float* w, int inputs, int rows, Put put) {
  int tiles = (rows + DENSE_ROWS - 1) / DENSE_ROWS;
  for (int row = 0; row < rows; tiles--) {
    const int count = (rows - row + tiles - 1) / tiles;
    multiply_some<DENSE_ROWS>(x + row * stride, stride, w, inputs, count,
                              [&](int r, Lanes left, Lanes right) { put(row + r, left, right); });
    row += count;
  }
}

QUIRE_INLINE Lanes logistic(Lanes x) { return splat(1.0f) / (splat(1.0f) + exponential(splat(0.0f) - x)); }

// x Phi(x). Phi(-|x|) = (1 - erf(|x| / sqrt 2)) / 2 by Abramowitz and Stegun, Handbook of Mathematical
// Functions, 7.1.26: within 1e-7.
QUIRE_INLINE Lanes gelu(Lanes x) {
  const Lanes z = magnitude(x) * splat(0.70710678f);
  const Lanes t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
  Lanes p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const Lanes tail = p * t * exponential(splat(0.0f) - z * z) * splat(0.5f);
  return x * select(above(x, splat(0.0f)), splat(1.0f) - tail, tail);
}

QUIRE_INLINE Lanes activated(Lanes x, Activation activation) {
  switch (activation) {
    case Activation::SILU: return x * logistic(x);
    case Activation::GELU: return gelu(x);
    case Activation::GELU_TANH:
      return x * logistic(fma(x * x, splat(0.0713548163f), splat(1.5957691216f)) * x);
    case Activation::TANH: return fma(logistic(x + x), splat(2.0f), splat(-1.0f));
    case Activation::RELU: return larger(x, splat(0.0f));
    default: return x;
  }
}

static void multiply(const Dense* weight, int panel, const float* x, size_t x_stride, int rows, Activation activation,
                     float* out, size_t out_stride) {
  const float* w = weight->packed + (size_t)panel * weight->inputs * PANEL;
  const Lanes left_bias = load(weight->bias + panel * PANEL), right_bias = load(weight->bias + panel * PANEL + LANES);
  float* first = out + panel * PANEL;
  multiply_panel(x, x_stride, w, weight->inputs, rows, [&](int r, Lanes left, Lanes right) {
    store(first + r * out_stride, left + left_bias);
    store(first + r * out_stride + LANES, right + right_bias);
  });
  if (activation == Activation::NONE) return;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < PANEL; i += LANES) {
      float* at = first + r * out_stride + i;
      store(at, activated(load(at), activation));
    }
}

static void add(const float* x, int size, float* sum) {
  for (int i = 0; i < size; i += LANES) store(sum + i, load(sum + i) + load(x + i));
}

// (x - mean) / sqrt(variance + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight.
static void norm(const NormShape* shape, const float* x, const float* weight, const float* bias, float* out) {
  const int size = shape->size;
  float mean = 0.0f;
  if (!shape->is_rms) {
    Lanes total = splat(0.0f);
    for (int i = 0; i < size; i += LANES) total = total + load(x + i);
    mean = sum(total) / (float)size;
  }
  const Lanes shift = splat(mean);
  Lanes squares = splat(0.0f);
  for (int i = 0; i < size; i += LANES) {
    const Lanes v = load(x + i) - shift;
    squares = fma(v, v, squares);
  }
  const Lanes factor = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)size + shape->eps));
  for (int i = 0; i < size; i += LANES) {
    const Lanes y = (load(x + i) - shift) * factor * load(weight + i);
    store(out + i, bias ? y + load(bias + i) : y);
  }
}

static void activate(float* x, int size, Activation activation) {
  for (int i = 0; i < size; i += LANES) store(x + i, activated(load(x + i), activation));
}

static void gate(const float* gates, const float* ups, int size, Activation activation, float* out) {
  for (int i = 0; i < size; i += LANES) store(out + i, activated(load(gates + i), activation) * load(ups + i));
}

// Turns the pairs (d, d + D / 2) by the angle of this position.
static void rotate(float* head, int dim, const float* cosines, const float* sines) {
  const int half = dim / 2;
  for (int d = 0; d < half; d++) {
    const float a = head[d], b = head[d + half];
    head[d] = a * cosines[d] - b * sines[d];
    head[d + half] = b * cosines[d] + a * sines[d];
  }
}

// Keys and values of one head as the panels of a product each. k, v: [tokens, stride].
static void pack_head(const float* k, const float* v, size_t stride, int tokens, int dim, float* keys, float* values) {
  for (int first = 0; first < tokens; first += PANEL, keys += dim * PANEL)
    for (int i = 0; i < PANEL; i++)
      for (int d = 0; d < dim; d++) keys[d * PANEL + i] = first + i < tokens ? k[(first + i) * stride + d] : 0.0f;
  for (int first = 0; first < dim; first += PANEL, values += (size_t)tokens * PANEL)
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < PANEL; i++) values[t * PANEL + i] = first + i < dim ? v[t * stride + first + i] : 0.0f;
}

// Scores of a query from `scores` on, whose first is of key `begin` -> weights, 0 for keys that it does not
// see, low <= key < high; returns 1 / their sum.
static float soften(float* scores, int begin, int end, int low, int high, float scale) {
  const Lanes least = splat(-__builtin_inff()), none = splat(0.0f);
  const auto seen = [&](int key, Lanes s, Lanes otherwise) {
    if (low <= key && high >= key + LANES) return s;
    const int from = low - key < 0 ? 0 : low - key, to = high - key > LANES ? LANES : high - key;
    return from < to ? between(from, to, s, otherwise) : otherwise;
  };
  Lanes top = least, total = none;
  for (int key = begin; key < end; key += LANES) top = larger(seen(key, load(scores + key - begin), least), top);
  const Lanes shift = splat(largest(top)), factor = splat(scale);
  for (int key = begin; key < end; key += LANES) {
    const Lanes weight = seen(key, exponential((load(scores + key - begin) - shift) * factor), none);
    total = total + weight;
    store(scores + key - begin, weight);
  }
  return 1.0f / sum(total);
}

// Some rows, whose keys begin at a multiple of PANEL: the order of a row's sums is that of all keys, since a
// weight of 0 adds nothing.
static void attend_tile(const HeadAttention& head, int first, int rows) {
  const int row = head.first_row + first, last = row + rows - 1, tokens = head.tokens;
  const auto low_of = [&](int r) { return head.window > r ? 0 : r - head.window + 1; };
  const auto high_of = [&](int r) {
    if (head.is_causal) return r + 1;
    return head.window >= tokens - r ? tokens : r + head.window;
  };
  const int begin = low_of(row) / PANEL * PANEL, end = high_of(last);
  const size_t stride = (size_t)(end - begin + PANEL - 1) / PANEL * PANEL;
  float* scores = head.scratch;
  for (int key = begin; key < end; key += PANEL) {
    float* to = scores + (key - begin);
    multiply_panel(head.queries + first * head.query_stride, head.query_stride, head.keys + (size_t)key * head.dim,
                   head.dim, rows, [&](int r, Lanes left, Lanes right) {
                     store(to + r * stride, left);
                     store(to + r * stride + LANES, right);
                   });
  }
  float factors[ATTENTION_ROWS];
  for (int r = 0; r < rows; r++)
    factors[r] = soften(scores + r * stride, begin, end, low_of(row + r), high_of(row + r), head.scale);
  for (int d = 0; d < head.dim; d += PANEL) {
    const float* values = head.values + ((size_t)d * tokens) + (size_t)begin * PANEL;
    const int wide = head.dim - d < PANEL ? head.dim - d : PANEL;
    multiply_panel(scores, stride, values, end - begin, rows, [&](int r, Lanes left, Lanes right) {
      float both[PANEL];
      store(both, left * splat(factors[r]));
      store(both + LANES, right * splat(factors[r]));
      memcpy(head.out + (first + r) * head.out_stride + d, both, (size_t)wide * sizeof(float));
    });
  }
}

static void attend(const HeadAttention* head) {
  for (int first = 0; first < head->rows; first += ATTENTION_ROWS) {
    const int left = head->rows - first;
    attend_tile(*head, first, left < ATTENTION_ROWS ? left : ATTENTION_ROWS);
  }
}

static void mean(const float* x, size_t stride, int rows, int size, float* out) {
  const Lanes count = splat((float)rows);
  for (int i = 0; i < size; i += LANES) {
    Lanes total = splat(0.0f);
    for (int r = 0; r < rows; r++) total = total + load(x + r * stride + i);
    store(out + i, total / count);
  }
}

static void normalise(float* x, int size) {
  Lanes squares = splat(0.0f);
  for (int i = 0; i < size; i += LANES) {
    const Lanes v = load(x + i);
    squares = fma(v, v, squares);
  }
  const float length = __builtin_sqrtf(sum(squares));
  const Lanes divisor = splat(length > 1e-12f ? length : 1e-12f);
  for (int i = 0; i < size; i += LANES) store(x + i, load(x + i) / divisor);
}
