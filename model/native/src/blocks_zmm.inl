// multiply_block_rows with AVX-512 VNNI: up to 6 rows share a panel, with 12 integer sums of the block
// and 12 float sums in registers.

constexpr int BLOCK_ROWS = 6;

// Adds the products of 4 inputs of 32 columns to the sums of a row.
QUIRE_INLINE void add_four(__m512i* sums, const int8_t* codes, __m512i left, __m512i right) {
  int32_t four;
  memcpy(&four, codes, 4);
  const __m512i x = _mm512_set1_epi32(four);
  sums[0] = _mm512_dpbusd_epi32(sums[0], left, x);
  sums[1] = _mm512_dpbusd_epi32(sums[1], right, x);
}

template <int ROWS>
static void multiply_block_rows(const BlockRows rows, const uint8_t* block, BlockAhead ahead, float* acc) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[ROWS][2];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int b = 0; b < rows.inputs / BLOCK_INPUTS; b++, block += BLOCK_BYTES) {
    prefetch_lines(ahead);
    __m512i whole[ROWS][2];
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) whole[r][0] = whole[r][1] = _mm512_setzero_si512();
    QUIRE_UNROLL
    for (int j = 0; j < BLOCK_LINES; j++) {
      const __m512i left = _mm512_loadu_si512(block + j * PANEL * 4), right = _mm512_loadu_si512(block + j * PANEL * 4 + 64);
      const __m512i left_low = _mm512_and_si512(left, low), right_low = _mm512_and_si512(right, low);
      const __m512i left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), low);
      const __m512i right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), low);
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) {
        add_four(whole[r], rows.codes(r, b) + 4 * j, left_low, right_low);
        add_four(whole[r], rows.codes(r, b) + 16 + 4 * j, left_high, right_high);
      }
    }
    const __m256i* scales = (const __m256i*)(block + BLOCK_CODES);
    QUIRE_UNROLL
    for (int half = 0; half < 2; half++) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales + half));
      const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256(scales + 2 + half));
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(whole[r][half]), scale);
        sums[r][half] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(rows.scale(r, b)), sums[r][half]);
        sums[r][half] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(rows.total(r, b)), sums[r][half]);
      }
    }
  }
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++) {
    _mm512_storeu_ps(acc + r * PANEL, sums[r][0]);
    _mm512_storeu_ps(acc + r * PANEL + 16, sums[r][1]);
  }
}
