// Lanes: sixteen floats with the same results on every instruction set.
//
// All float arithmetic of the step is written once, in terms of these lanes. An operation rounds
// each lane by IEEE 754, `fma` rounds once, and `sum` adds in one fixed tree, so a result does not
// depend on the width of the machine's registers. The compiler never fuses a product and a sum
// (-ffp-contract=off); `fma` is written out.
//
// Included by each variant's translation unit. Everything has internal linkage: the linker must not
// keep a copy compiled for AVX-512 for the portable variant.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define QUIRE_INLINE inline __attribute__((always_inline))

// Before a loop over an array of sums, which live in registers only if it is unrolled.
#if defined(__clang__)
#define QUIRE_UNROLL _Pragma("unroll")
#else
#define QUIRE_UNROLL _Pragma("GCC unroll 32")
#endif

constexpr int LANES = 16;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct Lanes { __m512 v; };

QUIRE_INLINE Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
QUIRE_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
// Past the caches, which p, a multiple of the size of Lanes, would displace. `drain` before another thread reads.
QUIRE_INLINE void stream(float* p, Lanes a) { _mm512_stream_ps(p, a.v); }
QUIRE_INLINE void drain() { _mm_sfence(); }
QUIRE_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; the second operand if either is NaN.
QUIRE_INLINE Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
QUIRE_INLINE Lanes magnitude(Lanes a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
// p - q, exactly, and then as floats.
QUIRE_INLINE Lanes from_difference(const int32_t* p, const int32_t* q) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_loadu_si512(q)))};
}
QUIRE_INLINE Lanes from_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// Lane i of the result is lane i ^ distance; distance is 1, 2, 4 or 8.
template <int DISTANCE> QUIRE_INLINE Lanes exchange(Lanes a) {
  if constexpr (DISTANCE == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
  if constexpr (DISTANCE == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  if constexpr (DISTANCE == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  return {_mm512_permute_ps(a.v, 0xb1)};
}
// Negates lane i if i & bit; bit is 1, 2, 4 or 8.
template <int BIT> QUIRE_INLINE Lanes flip_signs(Lanes a) {
  constexpr uint16_t mask = BIT == 8 ? 0xff00 : BIT == 4 ? 0xf0f0 : BIT == 2 ? 0xcccc : 0xaaaa;
  const __m512i bits = _mm512_castps_si512(a.v);
  return {_mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, mask, bits, _mm512_set1_epi32(INT32_MIN)))};
}
// Lanes from..to - 1 of a, the others of b.
QUIRE_INLINE Lanes between(int from, int to, Lanes a, Lanes b) {
  const uint32_t mask = ((1u << to) - 1u) & ~((1u << from) - 1u);
  return {_mm512_mask_blend_ps((__mmask16)mask, b.v, a.v)};
}
// Bit i: whether lane i of a is above that of b.
QUIRE_INLINE uint32_t above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// Lane i of a if bit i is set, of b otherwise.
QUIRE_INLINE Lanes select(uint32_t bits, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps((__mmask16)bits, b.v, a.v)};
}
// a * 2^k; the low bits of `shifter` hold k (see `exponential`).
QUIRE_INLINE Lanes scale_by_power(Lanes a, Lanes shifter) {
  const __m512i k = _mm512_slli_epi32(_mm512_castps_si512(shifter.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), k))};
}
// Whole values in -127..127 as bytes.
QUIRE_INLINE void store_signed(int8_t* p, Lanes whole) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole.v)));
}
// Bytes 128 + value, for whole values in -127..127.
QUIRE_INLINE void store_biased(uint8_t* p, Lanes whole) {
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(whole.v), _mm512_set1_epi32(128));
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(q));
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Lanes { __m256 lo, hi; };

QUIRE_INLINE Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QUIRE_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QUIRE_INLINE void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
QUIRE_INLINE void stream(float* p, Lanes a) { _mm256_stream_ps(p, a.lo); _mm256_stream_ps(p + 8, a.hi); }
QUIRE_INLINE void drain() { _mm_sfence(); }
QUIRE_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
QUIRE_INLINE Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes smaller(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
QUIRE_INLINE Lanes magnitude(Lanes a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
QUIRE_INLINE __m256 half_from_difference(const int32_t* p, const int32_t* q) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)q);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b));
}
QUIRE_INLINE Lanes from_difference(const int32_t* p, const int32_t* q) {
  return {half_from_difference(p, q), half_from_difference(p + 8, q + 8)};
}
QUIRE_INLINE __m256 half_from_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
QUIRE_INLINE Lanes from_bf16(const uint16_t* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }
template <int DISTANCE> QUIRE_INLINE Lanes exchange(Lanes a) {
  if constexpr (DISTANCE == 8) return {a.hi, a.lo};
  if constexpr (DISTANCE == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  if constexpr (DISTANCE == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
  return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
}
template <int BIT> QUIRE_INLINE Lanes flip_signs(Lanes a) {
  const __m256 all = _mm256_set1_ps(-0.0f);
  if constexpr (BIT == 8) return {a.lo, _mm256_xor_ps(a.hi, all)};
  constexpr uint8_t mask = BIT == 4 ? 0xf0 : BIT == 2 ? 0xcc : 0xaa;
  const __m256 some = _mm256_blend_ps(_mm256_setzero_ps(), all, mask);
  return {_mm256_xor_ps(a.lo, some), _mm256_xor_ps(a.hi, some)};
}
QUIRE_INLINE Lanes between(int from, int to, Lanes a, Lanes b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i eight = _mm256_set1_epi32(8);
  const __m256i first = _mm256_set1_epi32(from - 1), end = _mm256_set1_epi32(to);
  const __m256i upper = _mm256_add_epi32(lane, eight);
  const __m256i in_lo = _mm256_and_si256(_mm256_cmpgt_epi32(lane, first), _mm256_cmpgt_epi32(end, lane));
  const __m256i in_hi = _mm256_and_si256(_mm256_cmpgt_epi32(upper, first), _mm256_cmpgt_epi32(end, upper));
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(in_lo)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(in_hi))};
}
QUIRE_INLINE uint32_t above(Lanes a, Lanes b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
  return (uint32_t)lo | (uint32_t)hi << 8;
}
QUIRE_INLINE __m256 half_select(uint32_t bits, __m256 a, __m256 b) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}
QUIRE_INLINE Lanes select(uint32_t bits, Lanes a, Lanes b) {
  return {half_select(bits, a.lo, b.lo), half_select(bits >> 8, a.hi, b.hi)};
}
QUIRE_INLINE __m256 half_scale(__m256 a, __m256 shifter) {
  const __m256i k = _mm256_slli_epi32(_mm256_castps_si256(shifter), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), k));
}
QUIRE_INLINE Lanes scale_by_power(Lanes a, Lanes shifter) {
  return {half_scale(a.lo, shifter.lo), half_scale(a.hi, shifter.hi)};
}
QUIRE_INLINE __m128i to_bytes(Lanes whole) {
  const __m256i lo = _mm256_cvtps_epi32(whole.lo), hi = _mm256_cvtps_epi32(whole.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
QUIRE_INLINE void store_signed(int8_t* p, Lanes whole) { _mm_storeu_si128((__m128i*)p, to_bytes(whole)); }
QUIRE_INLINE void store_biased(uint8_t* p, Lanes whole) {
  _mm_storeu_si128((__m128i*)p, _mm_xor_si128(to_bytes(whole), _mm_set1_epi8(-128)));
}

#else

struct Lanes { float v[LANES]; };

#define QUIRE_EACH for (int i = 0; i < LANES; i++)
QUIRE_INLINE Lanes splat(float x) { Lanes r; QUIRE_EACH r.v[i] = x; return r; }
QUIRE_INLINE Lanes load(const float* p) { Lanes r; memcpy(r.v, p, sizeof r.v); return r; }
QUIRE_INLINE void store(float* p, Lanes a) { memcpy(p, a.v, sizeof a.v); }
QUIRE_INLINE void stream(float* p, Lanes a) { store(p, a); }
QUIRE_INLINE void drain() {}
QUIRE_INLINE Lanes operator+(Lanes a, Lanes b) { QUIRE_EACH a.v[i] += b.v[i]; return a; }
QUIRE_INLINE Lanes operator-(Lanes a, Lanes b) { QUIRE_EACH a.v[i] -= b.v[i]; return a; }
QUIRE_INLINE Lanes operator*(Lanes a, Lanes b) { QUIRE_EACH a.v[i] *= b.v[i]; return a; }
QUIRE_INLINE Lanes operator/(Lanes a, Lanes b) { QUIRE_EACH a.v[i] /= b.v[i]; return a; }
QUIRE_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { QUIRE_EACH a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return a; }
QUIRE_INLINE Lanes larger(Lanes a, Lanes b) { QUIRE_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
QUIRE_INLINE Lanes smaller(Lanes a, Lanes b) { QUIRE_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
QUIRE_INLINE Lanes magnitude(Lanes a) { QUIRE_EACH a.v[i] = __builtin_fabsf(a.v[i]); return a; }
QUIRE_INLINE Lanes from_difference(const int32_t* p, const int32_t* q) { Lanes r; QUIRE_EACH r.v[i] = (float)(p[i] - q[i]); return r; }
QUIRE_INLINE Lanes from_bf16(const uint16_t* p) {
  Lanes r;
  QUIRE_EACH { const uint32_t bits = (uint32_t)p[i] << 16; memcpy(&r.v[i], &bits, 4); }
  return r;
}
template <int DISTANCE> QUIRE_INLINE Lanes exchange(Lanes a) { Lanes r; QUIRE_EACH r.v[i] = a.v[i ^ DISTANCE]; return r; }
template <int BIT> QUIRE_INLINE Lanes flip_signs(Lanes a) { QUIRE_EACH if (i & BIT) a.v[i] = -a.v[i]; return a; }
QUIRE_INLINE Lanes between(int from, int to, Lanes a, Lanes b) { QUIRE_EACH if (i >= from && i < to) b.v[i] = a.v[i]; return b; }
QUIRE_INLINE uint32_t above(Lanes a, Lanes b) { uint32_t bits = 0; QUIRE_EACH bits |= (uint32_t)(a.v[i] > b.v[i]) << i; return bits; }
QUIRE_INLINE Lanes select(uint32_t bits, Lanes a, Lanes b) { QUIRE_EACH if (bits >> i & 1u) b.v[i] = a.v[i]; return b; }
QUIRE_INLINE Lanes scale_by_power(Lanes a, Lanes shifter) {
  QUIRE_EACH {
    uint32_t value, k;
    memcpy(&value, &a.v[i], 4);
    memcpy(&k, &shifter.v[i], 4);
    value += k << 23;
    memcpy(&a.v[i], &value, 4);
  }
  return a;
}
// Numbers, subnormal ones too; the exponent of infinities and NaNs becomes 16, and is in no weight.
QUIRE_INLINE Lanes from_half(const uint16_t* p) {
  Lanes r;
  QUIRE_EACH {
    const uint32_t bits = (uint32_t)(p[i] & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 5192296858534827628530496329220096.0f;  // 2^112: the difference of the biases
    r.v[i] = p[i] & 0x8000 ? -value : value;
  }
  return r;
}
QUIRE_INLINE void store_signed(int8_t* p, Lanes whole) { QUIRE_EACH p[i] = (int8_t)whole.v[i]; }
QUIRE_INLINE void store_biased(uint8_t* p, Lanes whole) { QUIRE_EACH p[i] = (uint8_t)((int)whole.v[i] + 128); }
#undef QUIRE_EACH

#endif

// Ties to even, for |x| < 2^22: after adding 1.5 * 2^23 no fraction bits are left.
QUIRE_INLINE Lanes nearest(Lanes x) {
  const Lanes magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// The same tree on every machine: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
QUIRE_INLINE float sum(Lanes a) {
  a = a + exchange<8>(a);
  a = a + exchange<4>(a);
  a = a + exchange<2>(a);
  a = a + exchange<1>(a);
  float all[LANES];
  store(all, a);
  return all[0];
}

QUIRE_INLINE float largest(Lanes a) {
  a = larger(a, exchange<8>(a));
  a = larger(a, exchange<4>(a));
  a = larger(a, exchange<2>(a));
  a = larger(a, exchange<1>(a));
  float all[LANES];
  store(all, a);
  return all[0];
}

// e^x within 2 units in the last place, for x in [-87, 88], where e^x is a normal number.
// x = k ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite); e^r by a polynomial.
QUIRE_INLINE Lanes exponential_of(Lanes x) {
  const Lanes magic = splat(12582912.0f);
  const Lanes shifter = fma(x, splat(1.44269504f), magic);  // k is in the low bits
  const Lanes k = shifter - magic;
  Lanes r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  Lanes p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r);
  return scale_by_power(p + splat(1.0f), shifter);
}

// The same; other x are clamped.
QUIRE_INLINE Lanes exponential(Lanes x) {
  return exponential_of(smaller(splat(88.0f), larger(splat(-87.0f), x)));  // a NaN stays, as the second operand
}

// To nearest, ties to even. A NaN stays one.
QUIRE_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

QUIRE_INLINE float of_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace
