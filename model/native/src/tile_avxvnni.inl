// multiply_tile with the 256-bit VNNI of processors without AVX-512: dpbusd adds four products of an
// unsigned and a signed byte to a 32-bit sum and does not saturate.

constexpr int TILE_ROWS = 3;
constexpr int VECTORS = PANEL / 8;

template <int ROWS> static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                                              Ahead ahead, int32_t* acc) {
  __m256i sums[ROWS][VECTORS];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm256_setzero_si256();
  for (int k = 0; k < inputs_padded; k += 4, panel += PANEL * 4) {
    _mm_prefetch((const char*)ahead.start, _MM_HINT_T0);
    _mm_prefetch((const char*)ahead.start + 64, _MM_HINT_T0);
    ahead.start += ahead.step;
    __m256i x[ROWS];
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      int32_t four;
      memcpy(&four, codes + r * stride + k, 4);
      x[r] = _mm256_set1_epi32(four);
    }
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      const __m256i w = _mm256_loadu_si256((const __m256i*)(panel + v * 32));
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) sums[r][v] = _mm256_dpbusd_avx_epi32(sums[r][v], x[r], w);
    }
  }
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) _mm256_storeu_si256((__m256i*)(acc + r * PANEL + v * 8), sums[r][v]);
}

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  switch (rows) {
    case 1: return multiply_rows<1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 2: return multiply_rows<2>(codes, stride, panel, inputs_padded, ahead, acc);
    default: return multiply_rows<3>(codes, stride, panel, inputs_padded, ahead, acc);
  }
}
