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
QUIRE_INLINE Singles exponentials(Singles x) {
  const Doubles magic = Doubles{} + 6755399441055744.0;  // 1.5 * 2^52
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

// The sum of the weights, which are stored unless `weights` is null.
template <bool PLAIN> static int64_t weigh_as(const float* logits, int count, Tempering t, int64_t* weights) {
  Longs sums = {};
  for (int i = 0; i < count; i += WIDE) {
    Singles x = Singles{} - __builtin_inff();
    const int left = count - i;
    if (left >= WIDE) memcpy(&x, logits + i, sizeof x);
    else memcpy(&x, logits + i, (size_t)left * sizeof(float));
    const Longs w = weights_of<PLAIN>(x, t);
    if (weights) memcpy(weights + i, &w, (size_t)(left < WIDE ? left : WIDE) * sizeof(int64_t));
    sums += w;
  }
  int64_t sum = 0;
  for (int lane = 0; lane < WIDE; lane++) sum += sums[lane];
  return sum;
}

static int64_t weigh(const float* logits, int count, const Tempering* t, int64_t* weights) {
  if (t->temperature == 1.0f && !t->least) return weigh_as<true>(logits, count, *t, weights);
  return weigh_as<false>(logits, count, *t, weights);
}

// The sum of e^x, within NEAR of itself and 2^-40 per logit of what `weigh` gives, times 2^-40, without a
// least weight. At most 1024 logits. `exponential` errs by 2^-22, a sum of 16 + 6 floats by 2^-19.5. A product
// instead of a quotient changes x by 2^-23 |x|, whose mean, by weight, is at most the logarithm of the number of
// logits in the row: by 2^-19.4.
static double weigh_nearly(const float* logits, int count, const Tempering* given) {
#if defined(__FMA__)
  const Lanes largest = splat(given->largest), inverse = splat(1.0f / given->temperature);
  Lanes sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int i = 0;
  for (; i + LANES * 4 <= count; i += LANES * 4)
    for (int j = 0; j < 4; j++)
      sums[j] = sums[j] + exponential((load(logits + i + j * LANES) - largest) * inverse);
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

// Sets logits to minus infinity unless their bit is set.
static void mask_out(const uint32_t* mask, int count, float* logits) {
  const Lanes none = splat(-__builtin_inff());
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    store(logits + i, select(mask[i / 32] >> (i % 32) & 0xffffu, load(logits + i), none));
  for (; i < count; i++)
    if (!(mask[i / 32] >> (i % 32) & 1u)) logits[i] = -__builtin_inff();
}
