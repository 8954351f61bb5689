// multiply_block_rows with 256-bit registers. The float sums are in memory, in the L1 cache; the integer
// sums of a block are in registers, for some of the panel's columns at a time.
//
// AVX2: `maddubs` adds pairs of products in 16 bits. A lane meets 8 pairs in a block: at most 8 * 2 * 15 *
// 127 = 30,480 in magnitude, so one `madd` at the end of the block suffices for 32 bits.

constexpr int BLOCK_ROWS = 5;

#if defined(__AVXVNNI__)
QUIRE_INLINE void add_products(__m256i& sums, __m256i q, __m256i codes) { sums = _mm256_dpbusd_avx_epi32(sums, q, codes); }
QUIRE_INLINE __m256i totals(__m256i sums) { return sums; }
#else
QUIRE_INLINE void add_products(__m256i& sums, __m256i q, __m256i codes) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(q, codes));
  __asm__("" : "+x"(sums));  // or GCC adds in another order, which needs far more registers
}
QUIRE_INLINE __m256i totals(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

QUIRE_INLINE __m256 eight_halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// Columns first..first + 8 * WIDTH - 1 of one block.
template <int ROWS, int WIDTH>
QUIRE_INLINE void add_columns(const BlockRows& rows, int b, const uint8_t* block, int first, float* acc) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sums[ROWS][WIDTH];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < WIDTH; v++) sums[r][v] = _mm256_setzero_si256();
  QUIRE_UNROLL
  for (int j = 0; j < 2 * BLOCK_LINES; j++) {
    __m256i q[WIDTH];
    QUIRE_UNROLL
    for (int v = 0; v < WIDTH; v++) {
      const __m256i line = _mm256_loadu_si256((const __m256i*)(block + (j / 2 * PANEL + first + v * 8) * 4));
      q[v] = _mm256_and_si256(j % 2 ? _mm256_srli_epi16(line, 4) : line, low);
    }
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const __m256i x = four_bytes((const uint8_t*)rows.codes(r, b) + j / 2 * 4 + j % 2 * 16);
      QUIRE_UNROLL
      for (int v = 0; v < WIDTH; v++) add_products(sums[r][v], q[v], x);
    }
  }
  QUIRE_UNROLL
  for (int v = 0; v < WIDTH; v++) {
    const int column = first + v * 8;
    const __m256 scale = eight_halves(block + BLOCK_CODES + column * 2);
    const __m256 minimum = eight_halves(block + BLOCK_CODES + (PANEL + column) * 2);
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float* sum = acc + r * PANEL + column;
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(totals(sums[r][v])), scale);
      const __m256 more = _mm256_fmadd_ps(scaled, _mm256_set1_ps(rows.scale(r, b)), _mm256_loadu_ps(sum));
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(minimum, _mm256_set1_ps(rows.total(r, b)), more));
    }
  }
}

template <int ROWS>
static void multiply_block_rows(const BlockRows rows, const uint8_t* block, BlockAhead ahead, float* acc) {
  constexpr int WIDTH = ROWS <= 2 ? 4 : 2;
  for (int i = 0; i < ROWS * PANEL; i++) acc[i] = 0.0f;
  for (int b = 0; b < rows.inputs / BLOCK_INPUTS; b++, block += BLOCK_BYTES) {
    prefetch_lines(ahead);
    for (int first = 0; first < PANEL; first += 8 * WIDTH) {
      __asm__ volatile("" : : : "memory");  // or GCC loads all codes before the loop, and spills them
      add_columns<ROWS, WIDTH>(rows, b, block, first, acc);
    }
  }
}
