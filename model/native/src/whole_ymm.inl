// Whole numbers of attention over an 8-bit cache (narrow.inl), with 256-bit registers.

struct KeySums { __m256i lo, hi; };
struct KeyCells { __m256i lo, hi; };  // 4 elements of 16 keys

QUIRE_INLINE KeySums no_keys() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

#if defined(__AVXVNNI__)

// dpbusd multiplies unsigned by signed bytes: each sum has 128 times the sum of the query's codes too much.
constexpr float KEY_BIAS = 128.0f;
using Four = __m256i;  // of a query

QUIRE_INLINE KeyCells key_cells(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
QUIRE_INLINE Four four_of(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}
QUIRE_INLINE void add_keys(KeySums& sums, const KeyCells& keys, const Four& x) {
  sums.lo = _mm256_dpbusd_avx_epi32(sums.lo, keys.lo, x);
  sums.hi = _mm256_dpbusd_avx_epi32(sums.hi, keys.hi, x);
}
QUIRE_INLINE __m256i add_pairs(__m256i sums, __m256i values, __m256i weights) {
  return _mm256_dpwssd_avx_epi32(sums, values, weights);
}

#else

// The signs of the query move to the keys, as in tile_avx2.inl: a pair of products is at most 2 * 127 * 127.
constexpr float KEY_BIAS = 0.0f;
struct Four { __m256i magnitudes, codes; };

QUIRE_INLINE KeyCells key_cells(const uint8_t* p) {
  const __m256i bias = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), bias),
          _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), bias)};
}
QUIRE_INLINE Four four_of(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  const __m256i x = _mm256_set1_epi32(four);
  return {_mm256_abs_epi8(x), x};
}
QUIRE_INLINE __m256i add_eight(__m256i sums, __m256i keys, const Four& x) {
  const __m256i pairs = _mm256_maddubs_epi16(x.magnitudes, _mm256_sign_epi8(keys, x.codes));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
QUIRE_INLINE void add_keys(KeySums& sums, const KeyCells& keys, const Four& x) {
  sums.lo = add_eight(sums.lo, keys.lo, x);
  sums.hi = add_eight(sums.hi, keys.hi, x);
}
QUIRE_INLINE __m256i add_pairs(__m256i sums, __m256i values, __m256i weights) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(values, weights));
}

#endif

QUIRE_INLINE Lanes to_lanes(const KeySums& sums) { return {_mm256_cvtepi32_ps(sums.lo), _mm256_cvtepi32_ps(sums.hi)}; }

// Sixteen elements: the weighted sum of values, of which each element has two, for two pairs of values.
constexpr int VALUE_REGISTERS = 4;
struct ValueSums { __m256i v[4]; };
struct ValueCells { __m256i v[4]; };  // 16 elements of 4 values
using Weights = __m256i;              // of 4 values, in 16 bits

QUIRE_INLINE ValueSums no_values() {
  const __m256i none = _mm256_setzero_si256();
  return {{none, none, none, none}};
}
QUIRE_INLINE ValueCells value_cells(const int8_t* p) {
  ValueCells cells;
  QUIRE_UNROLL
  for (int i = 0; i < 4; i++) cells.v[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + i * 16)));
  return cells;
}
QUIRE_INLINE Weights weights_of(const WeightCodes& codes, int at) {
  int64_t four;
  memcpy(&four, codes.words + at, 8);
  return _mm256_set1_epi64x(four);
}
QUIRE_INLINE void add_values(ValueSums& sums, const ValueCells& values, Weights w) {
  QUIRE_UNROLL
  for (int i = 0; i < 4; i++) sums.v[i] = add_pairs(sums.v[i], values.v[i], w);
}
QUIRE_INLINE Lanes to_lanes(const ValueSums& sums) {
  const __m256i lo = _mm256_hadd_epi32(sums.v[0], sums.v[1]), hi = _mm256_hadd_epi32(sums.v[2], sums.v[3]);
  return {_mm256_cvtepi32_ps(_mm256_permute4x64_epi64(lo, 0xd8)), _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(hi, 0xd8))};
}
QUIRE_INLINE void store_weights(WeightCodes& codes, int at, Lanes weights) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(weights.lo), _mm256_cvtps_epi32(weights.hi));
  _mm256_storeu_si256((__m256i*)(codes.words + at), _mm256_permute4x64_epi64(words, 0xd8));
}
