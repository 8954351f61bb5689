// multiply_block_rows on any machine.

constexpr int BLOCK_ROWS = 4;

template <int ROWS>
static void multiply_block_rows(const BlockRows rows, const uint8_t* blocks, BlockAhead ahead, float* acc) {
  (void)ahead;  // this variant is compute-bound
  static const int32_t none[PANEL] = {};
  for (int i = 0; i < ROWS * PANEL; i++) acc[i] = 0.0f;
  for (int b = 0; b < rows.inputs / BLOCK_INPUTS; b++, blocks += BLOCK_BYTES) {
    const uint16_t* scales = (const uint16_t*)(blocks + BLOCK_CODES);
    for (int row = 0; row < ROWS; row++) {
      const int8_t* codes = rows.codes(row, b);
      int32_t sums[PANEL] = {};
      for (int i = 0; i < BLOCK_INPUTS / 2; i++)
        for (int n = 0; n < PANEL; n++) {
          const int pair = blocks[i / 4 * PANEL * 4 + n * 4 + i % 4];
          sums[n] += (pair & 15) * codes[i] + (pair >> 4) * codes[i + 16];
        }
      for (int n = 0; n < PANEL; n += LANES) {
        float* sum = acc + row * PANEL + n;
        const Lanes scaled = from_difference(sums + n, none) * from_half(scales + n);
        const Lanes more = fma(scaled, splat(rows.scale(row, b)), load(sum));
        store(sum, fma(from_half(scales + PANEL + n), splat(rows.total(row, b)), more));
      }
    }
  }
}
