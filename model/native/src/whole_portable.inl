// Whole numbers of attention over an 8-bit cache (narrow.inl), on any machine.

constexpr float KEY_BIAS = 0.0f;

struct KeySums { int32_t v[LANES]; };
using KeyCells = const uint8_t*;  // 4 elements of 16 keys
using Four = const int8_t*;       // of a query

QUIRE_INLINE KeySums no_keys() { return {}; }
QUIRE_INLINE KeyCells key_cells(const uint8_t* p) { return p; }
QUIRE_INLINE Four four_of(const int8_t* codes) { return codes; }
QUIRE_INLINE void add_keys(KeySums& sums, KeyCells keys, Four x) {
  for (int i = 0; i < LANES; i++)
    for (int d = 0; d < 4; d++) sums.v[i] += (keys[4 * i + d] - 128) * x[d];
}
QUIRE_INLINE Lanes to_lanes(const KeySums& sums) {
  Lanes r;
  for (int i = 0; i < LANES; i++) r.v[i] = (float)sums.v[i];
  return r;
}

constexpr int VALUE_REGISTERS = 4;
using ValueSums = KeySums;         // of 16 elements
using ValueCells = const int8_t*;  // 16 elements of 4 values
using Weights = const int16_t*;    // of 4 values

QUIRE_INLINE ValueSums no_values() { return {}; }
QUIRE_INLINE ValueCells value_cells(const int8_t* p) { return p; }
QUIRE_INLINE Weights weights_of(const WeightCodes& codes, int at) { return codes.words + at; }
QUIRE_INLINE void add_values(ValueSums& sums, ValueCells values, Weights w) {
  for (int i = 0; i < LANES; i++)
    for (int p = 0; p < 4; p++) sums.v[i] += values[4 * i + p] * w[p];
}
QUIRE_INLINE void store_weights(WeightCodes& codes, int at, Lanes weights) {
  const Lanes whole = nearest(weights);
  for (int i = 0; i < LANES; i++) codes.words[at + i] = (int16_t)whole.v[i];
}
