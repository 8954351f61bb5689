// Products of 8-bit activations with 4-bit weights, both with a scale per block of 32 inputs: the
// blocks of a GGUF file as they are.
//
//   weight = scale * q + minimum, q in 0..15        activation = scale * code, code in -127..127
//
// The sum of q * code over a block is an exact integer. Blocks are then added in float32, in rising
// order, by the same operations on every machine:
//
//   sum = fma(float(integer) * weight's scale, activation's scale, sum)
//   sum = fma(minimum, activation's scale * the sum of its codes, sum)
//
// For the layout of a row of activations see block_row_stride.
//
// A panel holds for each block of its 32 columns
//   [4 lines][32 columns][4 bytes]   byte i of line j: input 4 j + i, and input 16 + 4 j + i above it
//   [32] scales, [32] minima         half precision

constexpr size_t BLOCK_CODES = (size_t)BLOCK_LINES * PANEL * 4;  // where the scales begin

// Cache lines to prefetch while a tile is computed: as many for each block of the panel.
struct BlockAhead {
  const uint8_t* start;
  int lines;
};

QUIRE_INLINE void prefetch_lines(BlockAhead& ahead) {
  for (int i = 0; i < ahead.lines; i++) __builtin_prefetch(ahead.start + i * 64);
  ahead.start += ahead.lines * 64;
}

// What a tile needs of some rows.
struct BlockRows {
  const uint8_t* first;
  size_t stride;
  int inputs;

  QUIRE_INLINE const int8_t* codes(int row, int block) const {
    return (const int8_t*)(first + row * stride) + (size_t)block * BLOCK_INPUTS;
  }
  QUIRE_INLINE float scale(int row, int block) const { return floats(row)[block]; }
  QUIRE_INLINE float total(int row, int block) const { return floats(row)[inputs / BLOCK_INPUTS + block]; }

 private:
  QUIRE_INLINE const float* floats(int row) const { return (const float*)(first + row * stride + inputs); }
};

#include QUIRE_BLOCK_TILE

// acc[row][column] = the products of some rows with a panel.
template <int ROWS>
static void multiply_block_tile(const BlockRows& rows, int count, const uint8_t* blocks, BlockAhead ahead, float* acc) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return multiply_block_tile<ROWS - 1>(rows, count, blocks, ahead, acc);
  multiply_block_rows<ROWS>(rows, blocks, ahead, acc);
}

// One tile: prefetches a little ahead in the same stream. Several: each a share of the next panel.
static BlockAhead block_ahead(const uint8_t* panel, size_t panel_bytes, int tile, int tiles) {
  constexpr int lines = BLOCK_BYTES / 64;
  if (tiles == 1) return {panel + 8192, lines};
  const int share = (lines + tiles - 1) / tiles;
  const size_t start = panel_bytes / lines * share * tile;
  if (start >= panel_bytes) return {panel, 0};
  return {panel + panel_bytes + start, share};
}

template <Epilogue EPILOGUE>
static void finish_blocks(const Product& p, int panel, int first, int count, const float* acc) {
  const Linear& w = *p.weight;
  const int column = panel * PANEL;
  for (int row = first; row < first + count; row++, acc += PANEL) {
    Lanes a = load(acc), b = load(acc + LANES);
    if (w.bias) {
      a = a + load(w.bias + column);
      b = b + load(w.bias + column + LANES);
    }
    put_row<EPILOGUE>(p, panel, row, a, b);
  }
}

static void multiply_blocks(const Product* product, int first, int end) {
  const Product& p = *product;
  const Linear& w = *p.weight;
  const size_t bytes = (size_t)w.inputs / BLOCK_INPUTS * BLOCK_BYTES;
  const int tiles = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  alignas(64) float acc[BLOCK_ROWS * PANEL];
  for (int panel = first; panel < end; panel++) {
    const uint8_t* blocks = w.blocks + panel * bytes;
    for (int row = 0, tile = 0; row < p.rows; tile++) {
      const int count = (p.rows - row + tiles - tile - 1) / (tiles - tile);
      const BlockRows rows = {p.codes.rows + (size_t)row * p.codes.stride, p.codes.stride, w.inputs};
      multiply_block_tile<BLOCK_ROWS>(rows, count, blocks, block_ahead(blocks, bytes, tile, tiles), acc);
      switch (p.epilogue) {
        case Epilogue::STORE: finish_blocks<Epilogue::STORE>(p, panel, row, count, acc); break;
        case Epilogue::ADD: finish_blocks<Epilogue::ADD>(p, panel, row, count, acc); break;
        case Epilogue::GATED: finish_blocks<Epilogue::GATED>(p, panel, row, count, acc); break;
        case Epilogue::HEAD: break;  // it has 8 bits
      }
      row += count;
    }
  }
}

// Places one block of a GGUF file, of type Q4_1: scale, minimum, 16 bytes with inputs i and i + 16.
static void pack_block(const uint8_t* source, uint8_t* block, int column) {
  uint16_t* scales = (uint16_t*)(block + BLOCK_CODES);
  memcpy(scales + column, source, 2);
  memcpy(scales + PANEL + column, source + 2, 2);
  for (int i = 0; i < BLOCK_INPUTS / 2; i++) block[i / 4 * PANEL * 4 + column * 4 + i % 4] = source[4 + i];
}

// w [outputs, inputs / 32] such blocks; the destination starts as zeros. Gated: as `pack`.
static void pack_blocks(const uint8_t* w, const float* bias, bool gated, Linear* linear) {
  constexpr size_t source_bytes = 4 + BLOCK_INPUTS / 2;
  const int blocks = linear->inputs / BLOCK_INPUTS;
  for (int n = 0; n < linear->outputs; n++) {
    const int column = packed_column(*linear, n, gated);
    uint8_t* panel = linear->blocks + (size_t)(column / PANEL) * blocks * BLOCK_BYTES;
    for (int b = 0; b < blocks; b++)
      pack_block(w + ((size_t)n * blocks + b) * source_bytes, panel + b * BLOCK_BYTES, column % PANEL);
    if (bias) linear->bias[column] = bias[n];
  }
}
