// Attention over an 8-bit cache, in whole numbers: queries are rounded to 8 bits as keys are, and the weights
// of values, with the values' scales in them, to 14 bits, which hold the products of a split exactly. The sums
// do not depend on their order, so the variants differ in instructions and not in results.

constexpr float MOST_WEIGHT = 16383.0f;

// The scores of a query and a group of keys, `at` behind the first one, from the sums of their codes' products.
QUIRE_INLINE void store_scores(Walk& walk, int q, int at, KeySums sums) {
  const Lanes scale = load(walk.scales_of_keys + at) * splat(walk.scales[q]);
  store(walk.weights[q] + at, (to_lanes(sums) - splat(walk.biases[q])) * scale);
}

template <int COUNT, int WIDTH> static void score_narrow_groups(Walk& walk, int position) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  const uint8_t* keys[WIDTH];
  KeySums sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++) keys[g] = cells_at<uint8_t>(item, position + g * GROUP, 0);
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) sums[q][g] = no_keys();
  const Fetch<uint8_t, WIDTH> fetch(walk, position, 0);
  for (int d = 0; d < dim; d += 4) {
    fetch.line(d / 4);
    KeyCells k[WIDTH];
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) k[g] = key_cells(keys[g] + d * GROUP);
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) {
      const Four x = four_of(walk.codes[q] + d);
      QUIRE_UNROLL
      for (int g = 0; g < WIDTH; g++) add_keys(sums[q][g], k[g], x);
    }
  }
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++)
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) store_scores(walk, q, position + g * GROUP - walk.begin, sums[q][g]);
}

// codes * scale is the query; bias is what the variant's products of codes and keys have too much.
static void encode_query(Walk& walk, int q) {
  const int dim = walk.item->shape->dim;
  walk.scales[q] = narrow_codes(walk.queries[q], dim, walk.codes[q]);
  int total = 0;
  for (int d = 0; d < dim; d++) total += walk.codes[q][d];
  walk.biases[q] = KEY_BIAS * (float)total;
}

static void encode(Walk& walk, int count) {
  for (int q = 0; q < count; q++) encode_query(walk, q);
  for (int p = walk.begin; p < walk.end; p += GROUP) {
    store(walk.scales_of_keys + (p - walk.begin), load(scales_at(*walk.item, p, 0)));
    store(walk.scales_of_values + (p - walk.begin), load(scales_at(*walk.item, p, 1)));
  }
}

// Weights -> their codes: codes * value_scale is what values are multiplied by. `valid`: none is NaN.
static void encode_weights(Walk& walk, int q, float most, bool valid) {
  const float* weights = walk.weights[q];
  walk.value_scales[q] = most * (1.0f / MOST_WEIGHT);
  valid = valid && most >= 1e-30f;
  const Lanes factor = splat(valid ? MOST_WEIGHT / most : 0.0f);
  for (int at = 0; at < walk.end - walk.begin; at += GROUP)
    store_weights(walk.weight_codes[q], at, valid ? load(weights + at) * factor : splat(0.0f));
}

// Queries first_query.. of a walk, WIDTH lanes of D.
template <int COUNT, int WIDTH>
static void gather_narrow(const Walk& walk, int first_query, int first, int last, int d, float* partials, size_t stride) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  ValueSums sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++) sums[q][i] = no_values();
  for (int p = first / 4 * 4; p < last;) {
    const int stop = (p / GROUP + 1) * GROUP < last ? (p / GROUP + 1) * GROUP : last;
    const int8_t* values = cells_at<int8_t>(item, p, 1) + d * 4;
    const Fetch<int8_t, 1> fetch(walk, p / GROUP * GROUP, 1);
    for (; p < stop; p += 4, values += dim * 4) {
      if (!d && !first_query)
        for (int line = 0; line < dim / 16; line++) fetch.line(p % GROUP * dim / 64 + line);
      ValueCells v[WIDTH];
      QUIRE_UNROLL
      for (int i = 0; i < WIDTH; i++) v[i] = value_cells(values + i * LANES * 4);
      QUIRE_UNROLL
      for (int q = 0; q < COUNT; q++) {
        const Weights w = weights_of(walk.weight_codes[first_query + q], p - walk.begin);
        QUIRE_UNROLL
        for (int i = 0; i < WIDTH; i++) add_values(sums[q][i], v[i], w);
      }
    }
  }
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++) {
    const Lanes scale = splat(walk.value_scales[first_query + q]);
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++)
      store(partials + (first_query + q) * stride + 2 + d + i * LANES, to_lanes(sums[q][i]) * scale);
  }
}

// As many queries at once as there are registers for.
template <int COUNT, int FIRST>
static void gather_all_narrow(const Walk& walk, int first, int last, float* partials, size_t stride) {
  constexpr int SOME = COUNT - FIRST < NARROW_QUERIES ? COUNT - FIRST : NARROW_QUERIES;
  constexpr int WIDTH = NARROW_SUMS / VALUE_REGISTERS / SOME < 4 ? NARROW_SUMS / VALUE_REGISTERS / SOME : 4;
  const int dim = walk.item->shape->dim;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES)
    gather_narrow<SOME, WIDTH>(walk, FIRST, first, last, d, partials, stride);
  for (; d < dim; d += LANES) gather_narrow<SOME, 1>(walk, FIRST, first, last, d, partials, stride);
  if constexpr (FIRST + SOME < COUNT) gather_all_narrow<COUNT, FIRST + SOME>(walk, first, last, partials, stride);
}
