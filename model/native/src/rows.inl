// Rows: the operations on one row at a time, in one fixed order of lanes.
// Sizes of rows are padded to a multiple of K_STEP with zeros, which change no sum and no maximum.

static void embed(const uint16_t* row, int size, float* out) {
  for (int i = 0; i < size; i += LANES) store(out + i, from_bf16(row + i));
}

// 0 if all of x is finite, else NaN: an invalid row must not look valid after rounding.
QUIRE_INLINE float finite_or_nan(Lanes poison) { return sum(poison); }

// `factor` is 127 / the largest magnitude, or 0.
static void write_codes(const float* x, int size, Lanes factor, uint8_t* codes) {
#if defined(QUIRE_SPLIT_CODES)
  __m128i negative = _mm_setzero_si128();
  for (int i = 0; i < size; i += LANES)
    negative = store_codes(codes + i * CODE_BYTES, nearest(load(x + i) * factor), negative);
  store_negative(codes, size, negative);
#else
  for (int i = 0; i < size; i += LANES) store_biased(codes + i, nearest(load(x + i) * factor));
#endif
}

static void write_zero_codes(int size, uint8_t* codes) {
  memset(codes, CODE_BIAS, code_stride(size, CODE_BYTES));
}

// codes * scale is x * factor, rounded to 8 bits. `size` is a multiple of K_STEP.
static void to_codes(const float* x, int size, float factor, uint8_t* codes, float* scale) {
  // Neither result depends on the order, so four chains of operations run side by side.
  constexpr int CHAINS = K_STEP / LANES;
  Lanes top[CHAINS], poison[CHAINS];
  for (int c = 0; c < CHAINS; c++) top[c] = poison[c] = splat(0.0f);
  for (int i = 0; i < size; i += K_STEP)
    QUIRE_UNROLL
    for (int c = 0; c < CHAINS; c++) {
      const Lanes v = load(x + i + c * LANES);
      top[c] = larger(magnitude(v), top[c]);
      poison[c] = fma(v, splat(0.0f), poison[c]);
    }
  const float most = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  const float bad = finite_or_nan((poison[0] + poison[1]) + (poison[2] + poison[3]));
  *scale = most * (factor / 127.0f) + bad;
  // Below this the reciprocal overflows or loses precision: such a row counts as zero.
  if (bad != bad || most < 1e-30f) {
    write_zero_codes(size, codes);
    return;
  }
  write_codes(x, size, splat(127.0f / most), codes);
}

// 1 / the root mean square.
static float norm_factor(const float* x, int size, float eps) {
  Lanes squares = splat(0.0f);
  for (int i = 0; i < size; i += LANES) {
    const Lanes v = load(x + i);
    squares = fma(v, v, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
}

// RMSNorm without its weight (folded into the next product): x / sqrt(mean(x^2) + eps).
// Codes do not depend on the norm, which scales the whole row; only the row's scale does.
static void norm_to_codes(const float* x, int size, float eps, uint8_t* codes, float* scale) {
  const int padded = (size + K_STEP - 1) / K_STEP * K_STEP;
  to_codes(x, padded, norm_factor(x, size, eps), codes, scale);
}

// One block of a row for 4-bit weights; returns its sum of codes times its scale.
QUIRE_INLINE float block_to_codes(Lanes a, Lanes b, int8_t* codes, float* scale) {
  const Lanes zero = splat(0.0f);
  const float most = largest(larger(magnitude(a), larger(magnitude(b), zero)));
  const float bad = finite_or_nan(fma(a, zero, b * zero));
  *scale = most * (1.0f / 127.0f) + bad;
  const bool valid = bad == bad && most >= 1e-30f;
  if (!valid) a = b = zero;
  const Lanes factor = splat(valid ? 127.0f / most : 0.0f);
  a = nearest(a * factor);
  b = nearest(b * factor);
  store_signed(codes, a);
  store_signed(codes + LANES, b);
  return *scale * sum(a + b);  // whole numbers: their sum is exact
}

// Codes, scales and totals of a row; `value(i)` gives 16 of its elements from i on.
template <typename Value> QUIRE_INLINE void write_blocks(int size, uint8_t* row, Value value) {
  float* scales = (float*)(row + size);
  float* totals = scales + size / BLOCK_INPUTS;
  for (int i = 0, b = 0; i < size; i += BLOCK_INPUTS, b++)
    totals[b] = block_to_codes(value(i), value(i + LANES), (int8_t*)row + i, scales + b);
}

static void to_blocks(const float* x, int size, uint8_t* row) {
  write_blocks(size, row, [&](int i) { return load(x + i); });
}

// RMSNorm: x / sqrt(mean(x^2) + eps) * weight.
static void norm_to_blocks(const float* x, const float* weight, int size, float eps, uint8_t* row) {
  const Lanes factor = splat(norm_factor(x, size, eps));
  write_blocks(size, row, [&](int i) { return load(x + i) * factor * load(weight + i); });
}

// One butterfly stage inside the lanes: (a, b) -> (a + b, a - b) for lanes that differ in BIT.
template <int BIT> QUIRE_INLINE Lanes butterfly(Lanes a) { return exchange<BIT>(a) + flip_signs<BIT>(a); }

// The stages between COUNT vectors, APART vectors from one another. Few enough for the registers.
template <int COUNT, int APART, bool INSIDE> QUIRE_INLINE void hadamard_stages(float* x) {
  Lanes v[COUNT];
  QUIRE_UNROLL
  for (int i = 0; i < COUNT; i++) {
    v[i] = load(x + i * APART * LANES);
    if constexpr (INSIDE) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
  }
  QUIRE_UNROLL
  for (int distance = 1; distance < COUNT; distance *= 2)
    QUIRE_UNROLL
    for (int i = 0; i < COUNT; i++)
      if (!(i & distance)) {
        const Lanes a = v[i], b = v[i + distance];
        v[i] = a + b;
        v[i + distance] = a - b;
      }
  QUIRE_UNROLL
  for (int i = 0; i < COUNT; i++) store(x + i * APART * LANES, v[i]);
}

// Hadamard transform of one block of SIZE * LANES floats, not normalised.
template <int SIZE> static void hadamard_block(float* x) {
  constexpr int NEAR = SIZE < 8 ? SIZE : 8;
  for (int i = 0; i < SIZE; i += NEAR) hadamard_stages<NEAR, 1, true>(x + i * LANES);
  if constexpr (SIZE > NEAR)
    for (int i = 0; i < NEAR; i++) hadamard_stages<SIZE / NEAR, NEAR, false>(x + i * LANES);
}

static void hadamard_small(float* x, int block) {
  for (int distance = 1; distance < block; distance *= 2)
    for (int i = 0; i < block; i++)
      if (!(i & distance)) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
}

// Every block of a row; block is a power of two, fast up to 512. Not normalised.
static void hadamard(float* x, int size, int block) {
  for (int i = 0; i < size; i += block) {
    switch (block) {
      case 512: hadamard_block<32>(x + i); break;
      case 256: hadamard_block<16>(x + i); break;
      case 128: hadamard_block<8>(x + i); break;
      case 64: hadamard_block<4>(x + i); break;
      default: hadamard_small(x + i, block);
    }
  }
}

// y = (mix (x) H) diag(signs) x: what rotate_bundle does to a weight.
static void rotate_row(const Rotation* rotation, const float* x, float* spread, float* out) {
  const int power = rotation->power, odd = rotation->odd, size = power * odd;
  const float norm = 1.0f / __builtin_sqrtf((float)power);
  if (odd == 1) spread = out;
  for (int i = 0; i < size; i++) spread[i] = x[i] * (norm * rotation->signs[i]);
  hadamard(spread, size, power);
  if (odd == 1) return;
  for (int to = 0; to < odd; to++) {
    float* y = out + to * power;
    for (int p = 0; p < power; p++) y[p] = 0.0f;
    for (int from = 0; from < odd; from++) {
      const float weight = rotation->mix[to * odd + from];
      const float* s = spread + from * power;
      for (int p = 0; p < power; p++) y[p] = y[p] + weight * s[p];
    }
  }
}

static void norm_head(float* x, int dim, const float* weight, float eps) {
  const Lanes factor = splat(norm_factor(x, dim, eps));
  for (int d = 0; d < dim; d += LANES) store(x + d, load(x + d) * factor * load(weight + d));
}

// Rotates the pairs (d, d + D / 2) by the angle of this position.
static void rotate_head(float* x, int dim, const float* cosines, const float* sines, float scale) {
  const int half = dim / 2;
  int d = 0;
  for (; d + LANES <= half; d += LANES) {
    const Lanes a = load(x + d), b = load(x + d + half), c = load(cosines + d), s = load(sines + d);
    store(x + d, (a * c - b * s) * splat(scale));
    store(x + d + half, (b * c + a * s) * splat(scale));
  }
  for (; d < half; d++) {
    const float a = x[d], b = x[d + half];
    x[d] = (a * cosines[d] - b * sines[d]) * scale;
    x[d + half] = (b * cosines[d] + a * sines[d]) * scale;
  }
}

static void scale_head(float* x, int dim, float scale) {
  for (int d = 0; d < dim; d++) x[d] *= scale;
}

static void store_wide(const HeadShape& shape, uint8_t* region, int offset, const float* k, const float* v) {
  uint16_t* keys = (uint16_t*)region + (size_t)(offset / GROUP) * shape.dim * GROUP + offset % GROUP;
  uint16_t* values = (uint16_t*)region + (size_t)shape.block_size * shape.dim + (size_t)offset * shape.dim;
  uint16_t rounded[DIM_MAX];
  for (int d = 0; d < shape.dim; d++) rounded[d] = to_bf16(k[d]);
  for (int d = 0; d < shape.dim; d++) keys[d * GROUP] = rounded[d];
  for (int d = 0; d < shape.dim; d++) values[d] = to_bf16(v[d]);
}

// Codes of a key or a value; returns their scale, NaN if any of it is not finite.
static float narrow_codes(const float* x, int dim, int8_t* codes) {
  const Lanes none = splat(0.0f);
  Lanes top = none, poison = none;
  for (int d = 0; d < dim; d += LANES) {
    const Lanes v = load(x + d);
    top = larger(magnitude(v), top);
    poison = fma(v, none, poison);
  }
  const float most = largest(top), bad = finite_or_nan(poison);
  const bool valid = bad == bad && most >= 1e-30f;
  const Lanes factor = splat(valid ? 127.0f / most : 0.0f);
  for (int d = 0; d < dim; d += LANES) store_signed(codes + d, valid ? nearest(load(x + d) * factor) : none);
  return most * (1.0f / 127.0f) + bad;
}

static void store_narrow(const HeadShape& shape, uint8_t* region, int offset, const float* k, const float* v) {
  const size_t cells = (size_t)shape.block_size * shape.dim;
  uint8_t* keys = region + (size_t)(offset / GROUP) * shape.dim * GROUP + offset % GROUP * 4;
  int8_t* values = (int8_t*)region + cells + (size_t)(offset / 4) * shape.dim * 4 + offset % 4;
  float* scales = (float*)(region + 2 * cells);
  int8_t codes[DIM_MAX];
  const float key_scale = narrow_codes(k, shape.dim, codes);
  for (int d = 0; d < shape.dim; d++) keys[d / 4 * GROUP * 4 + d % 4] = (uint8_t)(codes[d] + 128);
  const float value_scale = narrow_codes(v, shape.dim, codes);
  for (int d = 0; d < shape.dim; d++) values[4 * d] = codes[d];
  scales[offset] = key_scale + value_scale * 0.0f;  // an invalid value shows in the scores
  scales[shape.block_size + offset] = value_scale;
}

// One row of [H queries | K keys | K values]: rotates queries in place, stores keys and values.
// regions: [K], this row's block for each KV head; offset: the row's place in the block.
static void rotate_and_store(const Rotary* rotary, float* qkv, uint8_t* const* regions, int offset) {
  const HeadShape& shape = *rotary->shape;
  const int dim = shape.dim;
  float* keys = qkv + (size_t)shape.heads * dim;
  const float* values = keys + (size_t)shape.kv_heads * dim;
  for (int h = 0; h < shape.heads + shape.kv_heads; h++) {
    const bool is_query = h < shape.heads;
    float* x = qkv + (size_t)h * dim;
    const float* norm = is_query ? rotary->query_norm : rotary->key_norm;
    const float scale = is_query ? rotary->query_scale : 1.0f;
    if (norm) norm_head(x, dim, norm, shape.eps);
    if (rotary->cosines) rotate_head(x, dim, rotary->cosines, rotary->sines, scale);
    else scale_head(x, dim, scale);
    // The same transform of queries and keys keeps their products (times D, which query_scale undoes),
    // and spreads outlier channels of the keys, which would cost the others their 8 bits.
    if (rotary->spread) hadamard(x, dim, dim);
  }
  for (int h = 0; h < shape.kv_heads; h++) {
    const float* k = keys + (size_t)h * dim;
    const float* v = values + (size_t)h * dim;
    if (shape.wide_cache) store_wide(shape, regions[h], offset, k, v);
    else store_narrow(shape, regions[h], offset, k, v);
  }
}
