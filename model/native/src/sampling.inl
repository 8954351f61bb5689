// Dense passes over the logits of a row; what is chosen from them is decided in sampler.cpp.
//
// A token weighs floor(2^40 * e^x), where x = (logit - largest) / temperature and e^x is rounded to
// float correctly. So a weight does not depend on how e^x is computed, and the sums are integers, which
// do not depend on their order: the number of lanes is free. `exponentials` is correct for every float
// in -43..0, which a test proves one by one; below -28 a token weighs 0.

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int WIDE = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif

typedef float Singles __attribute__((vector_size(4 * WIDE)));
typedef double Doubles __attribute__((vector_size(8 * WIDE)));
typedef int64_t Longs __attribute__((vector_size(8 * WIDE)));

// Rounds once or twice; both are exact enough here.
QUIRE_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The integers below numbers in 0..2^50.
QUIRE_INLINE Longs floors(Singles x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Longs)_mm512_cvttps_epi64((__m256)x);
#elif defined(__AVX2__)
  const Doubles magic = Doubles{} + 4503599627370496.0;  // 2^52: the integer is then in the low bits
  return (Longs)(__builtin_convertvector((Singles)_mm_floor_ps((__m128)x), Doubles) + magic) - (Longs)magic;
#else
  return __builtin_convertvector(x, Longs);
#endif
}

// 2^40 e^x for x in -43..0: x = k ln 2 + r, ln 2 in two parts (Cody and Waite), e^r by its Taylor series.
// With AVX-512, x = (8 k + j) ln 2 / 8 + r: eight powers of two fit a register, and fewer terms are enough.
QUIRE_INLINE Singles exponentials(Singles x) {
  const Doubles magic = Doubles{} + 6755399441055744.0;  // 1.5 * 2^52
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const Doubles wide = (Doubles)_mm512_cvtps_pd((__m256)x);  // gcc converts halves
  const Doubles powers = {0x1p40,                 0x1.172b83c7d517bp+40, 0x1.306fe0a31b715p+40, 0x1.4bfdad5362a27p+40,
                          0x1.6a09e667f3bcdp+40, 0x1.8ace5422aa0dbp+40, 0x1.ae89f995ad3adp+40, 0x1.d5818dcfba487p+40};
  const Doubles shifter = multiply_add(wide, Doubles{} + 8 * 1.4426950408889634, magic);  // 8 k + j is in the low bits
  const Doubles steps = shifter - magic;
  Doubles r = multiply_add(steps, Doubles{} - 0x1.62e42fefap-4, wide);
  r = multiply_add(steps, Doubles{} - 0x1.cf79abc9e3b39p-43, r);
  const Doubles power = (Doubles)_mm512_permutexvar_pd((__m512i)shifter, (__m512d)powers), square = r * r;
  Doubles p = multiply_add(r, Doubles{} + 1.0 / 40320, Doubles{} + 1.0 / 5040);
  const Doubles q = multiply_add(r, Doubles{} + 1.0 / 720, Doubles{} + 1.0 / 120);
  const Doubles o = multiply_add(r, Doubles{} + 1.0 / 24, Doubles{} + 1.0 / 6);
  p = multiply_add(multiply_add(p, square, q), square, o);
  p = multiply_add(multiply_add(p, r, Doubles{} + 0.5), square, r);
  const Doubles y = multiply_add(power, p, power);
  return __builtin_convertvector((Doubles)((Longs)y + (((Longs)shifter >> 3) << 52)), Singles);
#else
  const Doubles wide = __builtin_convertvector(x, Doubles), one = Doubles{} + 1099511627776.0;
  const Doubles shifter = multiply_add(wide, Doubles{} + 1.4426950408889634, magic);  // k is in the low bits
  const Doubles k = shifter - magic;
  Doubles r = multiply_add(k, Doubles{} - 0x1.62e42fefap-1, wide);
  r = multiply_add(k, Doubles{} - 0x1.cf79abc9e3b39p-40, r);
  constexpr double inverse_factorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                           1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                           1.0 / 24,        1.0 / 6,        1.0 / 2};
  Doubles p = Doubles{} + 1.0 / 6227020800;
  QUIRE_UNROLL
  for (const double coefficient : inverse_factorials) p = multiply_add(p, r, Doubles{} + coefficient);
  const Doubles y = multiply_add(multiply_add(p, r * r, r), one, one);
  return __builtin_convertvector((Doubles)((Longs)y + ((Longs)shifter << 52)), Singles);
#endif
}

// PLAIN: the temperature is 1, and there is no least weight.
template <bool PLAIN> QUIRE_INLINE Longs weights_of(Singles logits, const Tempering& t) {
  const Singles least = Singles{} - 43.0f;
  Singles x = logits - t.largest;
  if (!PLAIN) x /= t.temperature;
  x = x > least ? x : least;  // a NaN weighs nothing
  const Longs weights = floors(exponentials(x));
  return PLAIN ? weights : weights & (weights >= t.least);
}

// The sum of the weights, which are stored if STORED.
template <bool PLAIN, bool STORED>
static int64_t weigh_as(const float* logits, int count, Tempering t, int64_t* weights) {
  Longs sums = {};
  int i = 0;
  for (; i + WIDE <= count; i += WIDE) {
    Singles x;
    memcpy(&x, logits + i, sizeof x);
    const Longs w = weights_of<PLAIN>(x, t);
    if (STORED) memcpy(weights + i, &w, sizeof w);
    sums += w;
  }
  if (i < count) {
    Singles x = Singles{} - __builtin_inff();
    for (int j = 0; i + j < count; j++) x[j] = logits[i + j];
    const Longs w = weights_of<PLAIN>(x, t);
    for (int j = 0; STORED && i + j < count; j++) weights[i + j] = w[j];
    sums += w;
  }
  int64_t sum = 0;
  for (int lane = 0; lane < WIDE; lane++) sum += sums[lane];
  return sum;
}

static int64_t weigh(const float* logits, int count, const Tempering* t, int64_t* weights) {
  const bool plain = t->temperature == 1.0f && !t->least;
  if (plain && weights) return weigh_as<true, true>(logits, count, *t, weights);
  if (plain) return weigh_as<true, false>(logits, count, *t, nullptr);
  if (weights) return weigh_as<false, true>(logits, count, *t, weights);
  return weigh_as<false, false>(logits, count, *t, nullptr);
}

#if defined(__AVX2__) && defined(__FMA__)
// e^x within 2^-23.05 of itself, measured for every float in -29..-2^-30; x in -87..0. With AVX-512, 2^(j / 16) is in
// a register, and r so small that four terms are enough: x = (16 k + j) ln 2 / 16 + r.
QUIRE_INLINE Lanes near_exponential(Lanes x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                       1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                       1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const Lanes magic = splat(12582912.0f);
  const Lanes shifter = fma(x, splat(16.0f * 1.44269504f), magic);
  const Lanes steps = shifter - magic;
  Lanes r = fma(steps, splat(-0.693359375f / 16.0f), x);
  r = fma(steps, splat(2.12194440e-4f / 16.0f), r);
  const __m512i bits = _mm512_castps_si512(shifter.v);
  const Lanes power = {_mm512_permutexvar_ps(bits, powers)};
  const Lanes y = fma(power, fma(fma(r, splat(1.0f / 6.0f), splat(0.5f)), r * r, r), power);
  const __m512i k = _mm512_slli_epi32(_mm512_srai_epi32(bits, 4), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y.v), k))};
#else
  return exponential_of(x);
#endif
}
#endif

// The sum of e^x, within NEAR of itself and 2^-40 per logit of what `weigh` gives, times 2^-40, without a
// least weight. At most 1024 logits. `near_exponential` errs by 2^-23, a sum of 16 + 6 floats by 2^-19.5. A product
// instead of a quotient changes x by 2^-23 |x|, whose mean, by weight, is at most the logarithm of the number of
// logits in the row: by 2^-19.4.
static double weigh_nearly(const float* logits, int count, const Tempering* given) {
#if defined(__AVX2__) && defined(__FMA__)
  const Lanes largest = splat(given->largest), inverse = splat(1.0f / given->temperature), least = splat(-87.0f);
  Lanes sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int i = 0;
  for (; i + LANES * 4 <= count; i += LANES * 4)
    for (int j = 0; j < 4; j++)
      sums[j] = sums[j] + near_exponential(larger((load(logits + i + j * LANES) - largest) * inverse, least));
  const double rest = i < count ? (double)weigh(logits + i, count - i, given, nullptr) * 0x1p-40 : 0.0;
  return (double)sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
#else
  return (double)weigh(logits, count, given, nullptr) * 0x1p-40;
#endif
}

// The largest number; minus infinity if all are NaN.
static float largest_of(const float* x, int count) {
  float found = -__builtin_inff();
  int i = 0;
  if (count >= LANES * 4) {
    Lanes top[4] = {splat(found), splat(found), splat(found), splat(found)};
    for (; i + LANES * 4 <= count; i += LANES * 4)
      for (int j = 0; j < 4; j++) top[j] = larger(load(x + i + j * LANES), top[j]);
    found = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  }
  for (; i < count; i++)
    if (x[i] > found) found = x[i];
  return found;
}

// Writes the places of set bits, `first` on, in rising order; returns how many. May write LANES in any case.
QUIRE_INLINE int put_places(uint32_t bits, int first, int32_t* places) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi32((__mmask16)bits, all));
  return __builtin_popcount(bits);
#else
  int found = 0;
  for (; bits; bits &= bits - 1) places[found++] = first + __builtin_ctz(bits);
  return found;
#endif
}

// Writes the places of numbers above one bound and not above another, in rising order; returns how many. Behind
// these it may write LANES - 1 more.
static int find_between(const float* x, int count, float bound, float most, int32_t* places) {
  int found = 0, i = 0;
  const Lanes low = splat(bound), high = splat(most);
  for (; i + LANES <= count; i += LANES) {
    const Lanes some = load(x + i);
    const uint32_t bits = above(some, low) & ~above(some, high);
    if (bits) found += put_places(bits, i, places + found);
  }
  for (; i < count; i++)
    if (x[i] > bound && !(x[i] > most)) places[found++] = i;
  return found;
}

// Sums of floats in 0..2^31 that are rounded down, lane by lane: in 32 bits, which `carry` adds to the 64 of others.
// The portable variant has none, because it weighs exactly.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
struct Wholes {
  __m512i few = _mm512_setzero_si512(), all = _mm512_setzero_si512();

  QUIRE_INLINE void add(Lanes x) { few = _mm512_add_epi32(few, _mm512_cvttps_epi32(x.v)); }
  QUIRE_INLINE void carry() {
    const __m512i even = _mm512_and_si512(few, _mm512_set1_epi64(0xffffffff));
    all = _mm512_add_epi64(all, _mm512_add_epi64(even, _mm512_srli_epi64(few, 32)));
    few = _mm512_setzero_si512();
  }
  QUIRE_INLINE int64_t sum() const { return _mm512_reduce_add_epi64(all); }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Wholes {
  __m256i lo = _mm256_setzero_si256(), hi = _mm256_setzero_si256(), all = _mm256_setzero_si256();

  QUIRE_INLINE void add(Lanes x) {
    lo = _mm256_add_epi32(lo, _mm256_cvttps_epi32(x.lo));
    hi = _mm256_add_epi32(hi, _mm256_cvttps_epi32(x.hi));
  }
  QUIRE_INLINE void carry() {
    all = _mm256_add_epi64(all, _mm256_add_epi64(wide(lo), wide(hi)));
    lo = hi = _mm256_setzero_si256();
  }
  QUIRE_INLINE static __m256i wide(__m256i few) {
    return _mm256_add_epi64(_mm256_and_si256(few, _mm256_set1_epi64x(0xffffffff)), _mm256_srli_epi64(few, 32));
  }
  QUIRE_INLINE int64_t sum() const {
    int64_t each[4];
    _mm256_storeu_si256((__m256i*)each, all);
    return each[0] + each[1] + each[2] + each[3];
  }
};
#endif

template <bool PLAIN> static int partition_as(const float* x, int count, const Tempering& t, float bound, int32_t* places,
                                              Bounds* rest) {
  int found = 0, i = 0;
  *rest = {0, 0};
#if defined(__AVX2__) && defined(__FMA__)
  constexpr float error = PLAIN ? 0x1p-22f : 0x1p-17f;
  const Lanes largest = splat(t.largest), inverse = splat(1.0f / t.temperature), border = splat(bound);
  const Lanes less = splat(0x1p40f * (1.0f - error)), more = splat(0x1p40f * (1.0f + error)), none = splat(0.0f);
  Wholes lows, highs;
  while (i + LANES * 8 <= count) {
    uint32_t chosen[8], any = 0;
    QUIRE_UNROLL
    for (int j = 0; j < 8; j++) {
      const Lanes some = load(x + i + j * LANES);
      const uint32_t bits = above(some, border);
      chosen[j] = bits;
      any |= bits;
      const Lanes depth = PLAIN ? some - largest : (some - largest) * inverse;
      const Lanes y = select(bits, none, near_exponential(larger(depth, splat(-87.0f))));  // of a NaN as well
      lows.add(y * less);
      highs.add(y * more);
    }
    lows.carry();
    highs.carry();
    if (any)
      for (int j = 0; j < 8; j++) found += put_places(chosen[j], i + j * LANES, places + found);
    i += LANES * 8;
  }
  rest->low = lows.sum();
  rest->high = highs.sum();
#endif
  float others[LANES * 8];
  while (i < count) {
    int num_others = 0;
    for (const int end = i + LANES * 8 < count ? i + LANES * 8 : count; i < end; i++) {
      if (x[i] > bound) places[found++] = i;
      else others[num_others++] = x[i];
    }
    const int64_t exact = weigh(others, num_others, &t, nullptr);
    rest->low += exact;
    rest->high += exact;
  }
  return found;
}

// Writes the places of logits above a bound, in rising order; returns how many. Behind them it may write LANES - 1
// more. The others are weighed nearly, without a least weight: the bound must be at least 8 temperatures below the
// largest, so that 8 weights fit 32 bits. `near_exponential` errs by 2^-23.05; rounding the true weight to float and
// the product with `less` or `more` add 2^-24 each. A product instead of a quotient changes the exponent, of at most
// 28, by 2^-22.4 of itself.
static int partition(const float* x, int count, const Tempering* t, float bound, int32_t* places, Bounds* rest) {
  if (t->temperature == 1.0f) return partition_as<true>(x, count, *t, bound, places, rest);
  return partition_as<false>(x, count, *t, bound, places, rest);
}

// The largest numbers of MAXIMA groups that share `count` numbers evenly; minus infinity for a group without any.
static_assert(MAXIMA == LANES, "a group is a lane");
static void maxima_of(const float* x, int count, float* maxima) {
  const Lanes least = splat(-__builtin_inff());
  Lanes top[4] = {least, least, least, least};
  int i = 0;
  for (; i + LANES * 4 <= count; i += LANES * 4)
    for (int j = 0; j < 4; j++) top[j] = larger(load(x + i + j * LANES), top[j]);
  store(maxima, larger(larger(top[0], top[1]), larger(top[2], top[3])));
  for (; i < count; i++)
    if (x[i] > maxima[i % LANES]) maxima[i % LANES] = x[i];
}

// Sets logits to minus infinity unless their bit is set.
static void mask_out(const uint32_t* mask, int count, float* logits) {
  const Lanes none = splat(-__builtin_inff());
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    store(logits + i, select(mask[i / 32] >> (i % 32) & 0xffffu, load(logits + i), none));
  for (; i < count; i++)
    if (!(mask[i / 32] >> (i % 32) & 1u)) logits[i] = -__builtin_inff();
}
