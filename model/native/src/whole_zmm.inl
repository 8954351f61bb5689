// Whole numbers of attention over an 8-bit cache (narrow.inl), with AVX-512 VNNI.

// Keys are stored as 128 + code, because dpbusd multiplies unsigned by signed bytes: each sum has 128 times
// the sum of the query's codes too much.
constexpr float KEY_BIAS = 128.0f;

// Sixteen keys: the sum of the products with a query.
struct KeySums { __m512i v; };
using KeyCells = __m512i;  // 4 elements of 16 keys
using Four = __m512i;      // of a query

QUIRE_INLINE KeySums no_keys() { return {_mm512_setzero_si512()}; }
QUIRE_INLINE KeyCells key_cells(const uint8_t* p) { return _mm512_loadu_si512(p); }
QUIRE_INLINE Four four_of(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}
QUIRE_INLINE void add_keys(KeySums& sums, KeyCells keys, Four x) { sums.v = _mm512_dpbusd_epi32(sums.v, keys, x); }
QUIRE_INLINE Lanes to_lanes(KeySums sums) { return {_mm512_cvtepi32_ps(sums.v)}; }

// Sixteen elements: the weighted sum of values. A weight is 128 * high + low, in a byte each.
constexpr int VALUE_REGISTERS = 2;
struct ValueSums { __m512i high, low; };
using ValueCells = __m512i;  // 16 elements of 4 values
struct Weights { __m512i high, low; };

QUIRE_INLINE ValueSums no_values() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
QUIRE_INLINE ValueCells value_cells(const int8_t* p) { return _mm512_loadu_si512(p); }
QUIRE_INLINE Weights weights_of(const WeightCodes& codes, int at) {
  return {four_of((const int8_t*)codes.bytes + at), four_of((const int8_t*)codes.bytes + SPLIT + at)};
}
QUIRE_INLINE void add_values(ValueSums& sums, ValueCells values, Weights w) {
  sums.high = _mm512_dpbusd_epi32(sums.high, w.high, values);
  sums.low = _mm512_dpbusd_epi32(sums.low, w.low, values);
}
QUIRE_INLINE Lanes to_lanes(ValueSums sums) {
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums.high, 7), sums.low))};
}
QUIRE_INLINE void store_weights(WeightCodes& codes, int at, Lanes weights) {
  const __m512i w = _mm512_cvtps_epi32(weights.v);
  _mm_storeu_si128((__m128i*)(codes.bytes + at), _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 7)));
  const __m512i low = _mm512_and_si512(w, _mm512_set1_epi32(127));
  _mm_storeu_si128((__m128i*)(codes.bytes + SPLIT + at), _mm512_cvtepi32_epi8(low));
}
