// What the tiles with 256-bit registers share: 3 rows x 4 registers of sums. A line of a panel is read
// once for all rows.

constexpr int TILE_ROWS = 3;
constexpr int VECTORS = PANEL / 8;
using Hint = decltype(_MM_HINT_T0);  // GCC's is an enum, clang's an int

QUIRE_INLINE __m256i four_bytes(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Two cache lines for each line of a panel.
template <Hint HINT> QUIRE_INLINE void prefetch_line(Ahead& ahead) {
  _mm_prefetch((const char*)ahead.start, HINT);
  _mm_prefetch((const char*)ahead.start + 64, HINT);
  ahead.start += ahead.step;
}

template <int ROWS> QUIRE_INLINE void store_sums(const __m256i (&sums)[ROWS][VECTORS], int32_t* acc) {
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) _mm256_storeu_si256((__m256i*)(acc + r * PANEL + v * 8), sums[r][v]);
}

// The variant's own.
template <int ROWS, Hint HINT>
static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded, Ahead ahead,
                          int32_t* acc);

#if defined(QUIRE_AHEAD_TO_L2)
constexpr Hint HINT = _MM_HINT_T1;
#else
constexpr Hint HINT = _MM_HINT_T0;
#endif

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  // A single tile of three rows has just enough time to wait for L1.
  if (rows == 3 && ahead.step > 64) return multiply_rows<3, _MM_HINT_T0>(codes, stride, panel, inputs_padded, ahead, acc);
  switch (rows) {
    case 1: return multiply_rows<1, HINT>(codes, stride, panel, inputs_padded, ahead, acc);
    case 2: return multiply_rows<2, HINT>(codes, stride, panel, inputs_padded, ahead, acc);
    default: return multiply_rows<3, HINT>(codes, stride, panel, inputs_padded, ahead, acc);
  }
}
