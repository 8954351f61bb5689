// multiply_tile on any machine. acc[row][column] = sum of codes * weights: exact in 32 bits, since
// 255 * 127 * K stays below 2^31 for K < 66,000.

constexpr int TILE_ROWS = 4;

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  (void)ahead;  // this variant is compute-bound
  for (int row = 0; row < rows; row++) {
    int32_t* sums = acc + row * PANEL;
    const uint8_t* x = codes + row * stride;
    for (int n = 0; n < PANEL; n++) sums[n] = 0;
    for (int k = 0; k < inputs_padded; k += 4) {
      const int8_t* w = panel + (size_t)k * PANEL;
      for (int n = 0; n < PANEL; n++)
        sums[n] += x[k] * w[4 * n] + x[k + 1] * w[4 * n + 1] + x[k + 2] * w[4 * n + 2] + x[k + 3] * w[4 * n + 3];
    }
  }
}

// Sums of pairs of 16-bit products, which compilers have an instruction for on most machines.
static int64_t peak(int rounds) {
  constexpr int PAIRS = 64;
  int16_t x[2 * PAIRS];
  int32_t sums[4] = {};
  for (int n = 0; n < 2 * PAIRS; n++) x[n] = (int16_t)n;
  for (int i = 0; i < rounds; i++) {
    __asm__ volatile("" : : "r"(x) : "memory");
    for (int n = 0; n < 2 * PAIRS; n++) sums[i % 4] += x[n] * x[n];
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  return (int64_t)rounds * 2 * PAIRS;
}
