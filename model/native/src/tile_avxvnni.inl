// multiply_tile with the 256-bit VNNI of processors without AVX-512: dpbusd adds four products of an
// unsigned and a signed byte to a 32-bit sum and does not saturate.

#include "tile_ymm.inl"

template <int ROWS, Hint HINT>
static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded, Ahead ahead,
                          int32_t* acc) {
  __m256i sums[ROWS][VECTORS];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++)
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm256_setzero_si256();
  for (int k = 0; k < inputs_padded; k += 4, panel += PANEL * 4) {
    prefetch_line<HINT>(ahead);
    __m256i x[ROWS];
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) x[r] = four_bytes(codes + r * stride + k);
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      const __m256i w = _mm256_loadu_si256((const __m256i*)(panel + v * 32));
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) sums[r][v] = _mm256_dpbusd_avx_epi32(sums[r][v], x[r], w);
    }
  }
  store_sums(sums, acc);
}

static int64_t peak(int rounds) {
  constexpr int CHAINS = 12;  // more than latency times throughput; opaque, or the compiler keeps one
  __m256i sums[CHAINS] = {}, x = _mm256_set1_epi8(1);
  QUIRE_UNROLL
  for (int c = 0; c < CHAINS; c++) __asm__ volatile("" : "+x"(sums[c]));
  for (int i = 0; i < rounds; i++)
    QUIRE_UNROLL
    for (int c = 0; c < CHAINS; c++) sums[c] = _mm256_dpbusd_avx_epi32(sums[c], x, x);
  QUIRE_UNROLL
  for (int c = 0; c < CHAINS; c++) __asm__ volatile("" : : "x"(sums[c]));
  return (int64_t)rounds * CHAINS * 32;
}
