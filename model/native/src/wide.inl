// Attention over a cache in bfloat16, in float32.

template <int COUNT, int WIDTH> static void score_wide_groups(Walk& walk, int position) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  const uint16_t* keys[WIDTH];
  Lanes sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++) keys[g] = cells_at<uint16_t>(item, position + g * GROUP, 0);
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) sums[q][g] = splat(0.0f);
  const Fetch<uint16_t, WIDTH> fetch(walk, position, 0);
  for (int d = 0; d < dim; d++) {
    if (d % 2 == 0) fetch.line(d / 2);
    Lanes k[WIDTH];
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) k[g] = from_bf16(keys[g] + d * GROUP);
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) {
      const Lanes x = splat(walk.queries[q][d]);
      QUIRE_UNROLL
      for (int g = 0; g < WIDTH; g++) sums[q][g] = fma(x, k[g], sums[q][g]);
    }
  }
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++)
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) store(walk.weights[q] + (position + g * GROUP - walk.begin), sums[q][g]);
}

// Weighted values, WIDTH lanes of D at a time. Positions that no query of the walk sees are not read:
// a slot beyond a sequence may hold anything, and 0 * NaN is NaN.
template <int COUNT, int WIDTH>
static void gather_wide(const Walk& walk, int first, int last, int d, float* partials, size_t stride) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  Lanes sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++) sums[q][i] = splat(0.0f);
  for (int p = first; p < last;) {
    const int stop = (p / GROUP + 1) * GROUP < last ? (p / GROUP + 1) * GROUP : last;
    const uint16_t* values = cells_at<uint16_t>(item, p, 1) + d;
    const Fetch<uint16_t, 1> fetch(walk, p / GROUP * GROUP, 1);
    for (; p < stop; p++, values += dim) {
      if (!d)
        for (int line = 0; line < dim / 32; line++) fetch.line(p % GROUP * dim / 32 + line);
      Lanes v[WIDTH];
      QUIRE_UNROLL
      for (int i = 0; i < WIDTH; i++) v[i] = from_bf16(values + i * LANES);
      QUIRE_UNROLL
      for (int q = 0; q < COUNT; q++) {
        const Lanes w = splat(walk.weights[q][p - walk.begin]);
        QUIRE_UNROLL
        for (int i = 0; i < WIDTH; i++) sums[q][i] = fma(w, v[i], sums[q][i]);
      }
    }
  }
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++) store(partials + q * stride + 2 + d + i * LANES, sums[q][i]);
}
