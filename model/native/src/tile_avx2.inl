// multiply_tile with AVX2: `maddubs` multiplies unsigned by signed bytes and adds pairs in 16 bits,
// `madd` with ones adds pairs of these in 32 bits. The signs of the codes move to the weights:
//
//   x * w = |x| * (w ^ m) + (x < 0 ? |x| : 0)     m = x < 0 ? -1 : 0, because w ^ -1 = -w - 1
//
// An exclusive or is cheaper than a `sign`, and needs no more than codes that are stored as magnitudes
// and masks. The last term does not depend on w: sums begin with its total of the row. A pair is at most
// 2 * 127 * 128, so 16 bits do not saturate.

// A prefetch to L1 would occupy a miss buffer until the memory answers, and panels come from L2 meanwhile.
#define QUIRE_AHEAD_TO_L2
constexpr int AHEAD_TILES = 2;  // at a cache line per line

#include "tile_ymm.inl"

#define QUIRE_SPLIT_CODES
constexpr int CODE_BYTES = 2, CODE_BIAS = 0;

// Stores 16 codes, as lines of 4 magnitudes and 4 masks; adds the magnitudes of negative ones.
QUIRE_INLINE __m128i store_codes(uint8_t* line, Lanes whole, __m128i negative) {
  const __m128i none = _mm_setzero_si128(), x = to_bytes(whole);
  const __m128i magnitudes = _mm_abs_epi8(x), masks = _mm_cmpgt_epi8(none, x);
  _mm_storeu_si128((__m128i*)line, _mm_unpacklo_epi32(magnitudes, masks));
  _mm_storeu_si128((__m128i*)(line + 16), _mm_unpackhi_epi32(magnitudes, masks));
  return _mm_add_epi64(negative, _mm_sad_epu8(_mm_and_si128(magnitudes, masks), none));
}

// The total of the negative codes' magnitudes lies behind the codes of a row.
QUIRE_INLINE void store_negative(uint8_t* codes, int size, __m128i negative) {
  const int32_t total = _mm_cvtsi128_si32(negative) + _mm_extract_epi32(negative, 2);
  memcpy(codes + (size_t)size * CODE_BYTES, &total, sizeof total);
}

template <int ROWS, Hint HINT>
static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded, Ahead ahead,
                          int32_t* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[ROWS][VECTORS];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const __m256i negative = four_bytes(codes + r * stride + (size_t)inputs_padded * CODE_BYTES);
    QUIRE_UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = negative;
  }
  for (int k = 0; k < inputs_padded; k += 4, codes += 4 * CODE_BYTES, panel += PANEL * 4) {
    prefetch_line<HINT>(ahead);
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const __m256i magnitudes = four_bytes(codes + r * stride), masks = four_bytes(codes + r * stride + 4);
      QUIRE_UNROLL
      for (int v = 0; v < VECTORS; v++) {
        const __m256i w = _mm256_xor_si256(masks, _mm256_loadu_si256((const __m256i*)(panel + v * 32)));
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, w);
        sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  store_sums(sums, acc);
}

// Without the exclusive or: what no exact product of bytes can do without.
static int64_t peak(int rounds) {
  constexpr int CHAINS = 12;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[CHAINS] = {}, x = _mm256_set1_epi8(1);
  for (int i = 0; i < rounds; i++)
    QUIRE_UNROLL
    for (int c = 0; c < CHAINS; c++) {
      __asm__ volatile("" : "+x"(x));  // a new value, for all that the compiler knows
      sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
    }
  QUIRE_UNROLL
  for (int c = 0; c < CHAINS; c++) __asm__ volatile("" : : "x"(sums[c]));
  return (int64_t)rounds * CHAINS * 32;
}
