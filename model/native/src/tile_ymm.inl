// What the tiles with 256-bit registers share: 3 rows x 4 registers of sums. A line of a panel is read
// once for all rows.

constexpr int TILE_ROWS = 3;
constexpr int VECTORS = PANEL / 8;

QUIRE_INLINE __m256i four_bytes(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Two cache lines for each line of a panel.
QUIRE_INLINE void prefetch_line(Ahead& ahead) {
  _mm_prefetch((const char*)ahead.start, _MM_HINT_T0);
  _mm_prefetch((const char*)ahead.start + 64, _MM_HINT_T0);
  ahead.start += ahead.step;
}

template <int ROWS> QUIRE_INLINE void store_sums(const __m256i (&sums)[ROWS][VECTORS], int32_t* acc) {
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) _mm256_storeu_si256((__m256i*)(acc + r * PANEL + v * 8), sums[r][v]);
}

// The variant's own.
template <int ROWS> static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                                              Ahead ahead, int32_t* acc);

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  switch (rows) {
    case 1: return multiply_rows<1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 2: return multiply_rows<2>(codes, stride, panel, inputs_padded, ahead, acc);
    default: return multiply_rows<3>(codes, stride, panel, inputs_padded, ahead, acc);
  }
}
