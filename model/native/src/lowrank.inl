// Low-rank products of adapters, in float32, row by row: out = B (factor * A x). The order of every sum is
// fixed, so the bits of a row depend on the row and its adapter alone.

static void low_rank(const LowRank* pair, const float* x, float factor, float* out) {
  constexpr int CHAINS = K_STEP / LANES;
  float inner[LOW_RANK_MAX];
  for (int r = 0; r < pair->rank; r++) {
    const float* a = pair->a + (size_t)r * pair->inputs;
    Lanes acc[CHAINS];
    for (int c = 0; c < CHAINS; c++) acc[c] = splat(0.0f);
    for (int i = 0; i < pair->inputs; i += K_STEP)
      QUIRE_UNROLL
      for (int c = 0; c < CHAINS; c++) acc[c] = fma(load(a + i + c * LANES), load(x + i + c * LANES), acc[c]);
    inner[r] = factor * sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  for (int column = 0; column < pair->columns; column += LANES) {
    Lanes acc = splat(0.0f);
    for (int r = 0; r < pair->rank; r++)
      acc = fma(splat(inner[r]), load(pair->b + (size_t)r * pair->columns + column), acc);
    store(out + column, acc);
  }
}

// b [outputs, rank] as columns in the order of the packed weights; the destination starts as zeros.
static void pack_low_rank(const float* b, const Linear* linear, bool gated, int rank, float* packed) {
  const size_t columns = (size_t)linear->panels * PANEL;
  for (int n = 0; n < linear->outputs; n++)
    for (int r = 0; r < rank; r++) packed[r * columns + packed_column(*linear, n, gated)] = b[(size_t)n * rank + r];
}
