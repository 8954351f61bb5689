// Attention of 5 to 16 queries over an 8-bit cache, with tiles of AMX (tile_amx.inl). Each query is a row:
//
//   scores   64 elements of the queries (signed), times 16 keys as they are stored (unsigned)
//   values   the weights' codes of 64 positions, upper and lower bits (unsigned), times 32 elements of their values
//            (signed), which are copied, because a tile's lines are equally far apart and blocks are not
//
// Head dimensions are multiples of K_STEP.

// weights[q] = the scores of all positions of the walk.
static void score_tiles(Walk& walk, int count) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  const auto keys_at = [&](int p) { return cells_at<uint8_t>(item, p < walk.end ? p : walk.begin, 0); };
  // Four groups at once, because a product takes longer than another one waits for the multiplier.
  for (int p = walk.begin; p < walk.end; p += 4 * GROUP) {
    const uint8_t *a = keys_at(p), *b = keys_at(p + GROUP), *c = keys_at(p + 2 * GROUP), *d = keys_at(p + 3 * GROUP);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int i = 0; i < dim; i += K_STEP) {
      TILE_LOAD(4, walk.codes[0] + i, sizeof walk.codes[0]);
      TILE_LOAD(6, a + i * GROUP, 64);
      TILE_MULTIPLY_SIGNED(0, 4, 6);
      TILE_LOAD(7, b + i * GROUP, 64);
      TILE_MULTIPLY_SIGNED(1, 4, 7);
      TILE_LOAD(6, c + i * GROUP, 64);
      TILE_MULTIPLY_SIGNED(2, 4, 6);
      TILE_LOAD(7, d + i * GROUP, 64);
      TILE_MULTIPLY_SIGNED(3, 4, 7);
    }
    float* scores = walk.weights[0] + (p - walk.begin);
    TILE_STORE(0, scores, sizeof walk.weights[0]);
    TILE_STORE(1, scores + GROUP, sizeof walk.weights[0]);
    TILE_STORE(2, scores + 2 * GROUP, sizeof walk.weights[0]);
    TILE_STORE(3, scores + 3 * GROUP, sizeof walk.weights[0]);
  }
  for (int p = walk.begin; walk.is_first && p < walk.end; p += GROUP) {
    const Fetch<uint8_t, 1> fetch(walk, p, 0);
    for (int line = 0; line < dim / 4; line++) fetch.line(line);
  }
  for (int q = 0; q < count; q++)
    for (int at = 0; at < walk.end - walk.begin; at += GROUP)
      store_scores(walk, q, at, {_mm512_loadu_si512(walk.weights[q] + at)});
}

// Copies the values of the walk to [positions / 4][D][4], and fills the last step with zeros, whatever the weights'
// codes are there. Returns how many steps of K_STEP positions these are.
static int copy_values(const Walk& walk, int8_t* values) {
  const int dim = walk.item->shape->dim, positions = (walk.end - walk.begin + GROUP - 1) / GROUP * GROUP;
  for (int p = 0; p < positions; p += GROUP) {
    memcpy(values + (size_t)p * dim, cells_at<int8_t>(*walk.item, walk.begin + p, 1), (size_t)GROUP * dim);
    const Fetch<int8_t, 1> fetch(walk, walk.begin + p, 1);
    for (int line = 0; line < dim / 4; line++) fetch.line(line);
  }
  const int steps = (positions + K_STEP - 1) / K_STEP;
  memset(values + (size_t)positions * dim, 0, (size_t)(steps * K_STEP - positions) * dim);
  return steps;
}

static void gather_tiles(const Walk& walk, int count, float* partials, size_t stride) {
  const int dim = walk.item->shape->dim;
  alignas(64) int8_t values[SPLIT * DIM_MAX];
  alignas(64) int32_t sums[2 * 16 * PANEL];  // by the upper bits of weights, then by the lower ones
  const int steps = copy_values(walk, values);
  const uint8_t* codes = walk.weight_codes[0].bytes;
  for (int d = 0; d < dim; d += PANEL) {
    multiply_halves<2>(codes, codes + SPLIT, sizeof walk.weight_codes[0], values + d * 4, (size_t)dim * 4, steps, sums,
                       [](int) {});
    for (int q = 0; q < count; q++)
      for (int i = 0; i < PANEL; i += LANES) {
        const int32_t* high = sums + q * PANEL + i;
        const ValueSums both = {_mm512_load_si512(high), _mm512_load_si512(high + 16 * PANEL)};
        store(partials + q * stride + 2 + d + i, to_lanes(both) * splat(walk.value_scales[q]));
      }
  }
}

static void attend_tiles(Walk& walk, int count, float* partials, size_t stride) {
  find_bounds(walk, count);
  encode(walk, count);
  score_tiles(walk, count);
  weigh_keys<false>(walk, count, partials, stride);
  gather_tiles(walk, count, partials, stride);
}
