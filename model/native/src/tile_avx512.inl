// multiply_tile with AVX-512 VNNI.

// A prefetch to L1 would occupy a miss buffer until the memory answers, and panels come from L2 meanwhile.
#define QUIRE_AHEAD_TO_L2
constexpr int AHEAD_TILES = 2;  // at a cache line per line

#include "tile_zmm.inl"

constexpr int TILE_ROWS = ZMM_ROWS;

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  multiply_zmm(codes, stride, rows, panel, inputs_padded, ahead, acc);
}

static int64_t peak(int rounds) {
  constexpr int CHAINS = 16;  // more than latency times throughput; opaque, or the compiler keeps one
  __m512i sums[CHAINS] = {}, x = _mm512_set1_epi8(1);
  QUIRE_UNROLL
  for (int c = 0; c < CHAINS; c++) __asm__ volatile("" : "+v"(sums[c]));
  for (int i = 0; i < rounds; i++)
    QUIRE_UNROLL
    for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_dpbusd_epi32(sums[c], x, x);
  QUIRE_UNROLL
  for (int c = 0; c < CHAINS; c++) __asm__ volatile("" : : "v"(sums[c]));
  return (int64_t)rounds * CHAINS * 64;
}
