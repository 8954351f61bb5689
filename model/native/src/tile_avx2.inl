// multiply_tile with AVX2. `maddubs` would saturate at 16 bits (255 * 127 * 2 does not fit), so bytes
// are widened and multiplied as 16-bit pairs: each product pair fits 32 bits, and nothing saturates.

constexpr int TILE_ROWS = 4;

// A quarter of a panel line: 8 columns x 4 inputs are two registers of 16 words. A register holds 4
// columns x 2 pairs; the two sums of a column are added at the end.
template <int ROWS> static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                                              int32_t* acc) {
  for (int columns = 0; columns < PANEL; columns += 8) {
    __m256i low[ROWS], high[ROWS];
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm256_setzero_si256();
    const int8_t* w = panel + columns * 4;
    for (int k = 0; k < inputs_padded; k += 4, w += PANEL * 4) {
      const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
      const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)));
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) {
        int32_t four;
        memcpy(&four, codes + r * stride + k, 4);
        const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(x, w_low));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(x, w_high));
      }
    }
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      // hadd works within halves: columns 0 1 4 5 | 2 3 6 7.
      const __m256i mixed = _mm256_hadd_epi32(low[r], high[r]);
      _mm256_storeu_si256((__m256i*)(acc + r * PANEL + columns), _mm256_permute4x64_epi64(mixed, 0xd8));
    }
  }
}

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  (void)ahead;  // this variant is compute-bound
  switch (rows) {
    case 1: return multiply_rows<1>(codes, stride, panel, inputs_padded, acc);
    case 2: return multiply_rows<2>(codes, stride, panel, inputs_padded, acc);
    case 3: return multiply_rows<3>(codes, stride, panel, inputs_padded, acc);
    default: return multiply_rows<4>(codes, stride, panel, inputs_padded, acc);
  }
}
