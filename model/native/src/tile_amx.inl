// multiply_tile with AMX: tiles of 16 rows x 64 bytes. (narrow_amx.inl attends with them.)
//
//   tiles 4, 5   activations: 16 rows each, 64 inputs                    (unsigned)
//   tiles 6, 7   weights: 16 columns each, 64 inputs as 16 lines of 16 columns x 4 inputs (signed)
//   tiles 0..3   sums: rows 0-15 x left, right; rows 16-31 x left, right (32 bits)
//
// A panel line holds 32 columns x 4 inputs = 128 bytes, so a weight tile is 16 lines, 128 bytes apart.
// The tile shapes never change: rows beyond `rows` are computed from whatever the buffer holds (it is
// long enough, see Codes) and discarded. That keeps the configuration out of the hot loop.
//
// QUIRE_EMULATE_TILES replaces the instructions by loops that do what Intel's manual specifies, so that
// this file is tested on machines without AMX. An instruction names its tiles by literals,
// hence macros: an argument of a function is no literal.

#define QUIRE_TILES_FILL
constexpr int TILE_ROWS = 32;
constexpr int FEW_ROWS = 2;  // up to which other instructions wait less for memory

#include "tile_zmm.inl"

#if defined(QUIRE_EMULATE_TILES)

struct EmulatedTile { uint8_t bytes[16][64]; };
static thread_local EmulatedTile emulated[8];
static thread_local bool configured;

static void tiles_begin() { configured = true; }
static void tiles_end() { configured = false; }
static void emulate_zero(int t) {
  if (!configured) __builtin_trap();  // the processor would raise #UD
  memset(&emulated[t], 0, sizeof(EmulatedTile));
}
static void emulate_load(int t, const void* p, size_t stride) {
  if (!configured) __builtin_trap();
  for (int r = 0; r < 16; r++) memcpy(emulated[t].bytes[r], (const uint8_t*)p + r * stride, 64);
}
static void emulate_store(int t, void* p, size_t stride) {
  for (int r = 0; r < 16; r++) memcpy((uint8_t*)p + r * stride, emulated[t].bytes[r], 64);
}
// TDPBUSD, TDPBSUD: bytes of x times bytes of w, X the type of the former, four to a 32-bit sum.
template <typename X, typename W> static void emulate_multiply(int sums, int x, int w) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        int32_t total;
        memcpy(&total, emulated[sums].bytes[m] + 4 * n, 4);
        for (int i = 0; i < 4; i++)
          total += (int32_t)(X)emulated[x].bytes[m][4 * k + i] * (W)emulated[w].bytes[k][4 * n + i];
        memcpy(emulated[sums].bytes[m] + 4 * n, &total, 4);
      }
}
#define TILE_ZERO(T) emulate_zero(T)
#define TILE_LOAD(T, p, stride) emulate_load(T, p, stride)
#define TILE_STORE(T, p, stride) emulate_store(T, p, stride)
#define TILE_MULTIPLY(SUMS, X, W) emulate_multiply<uint8_t, int8_t>(SUMS, X, W)
#define TILE_MULTIPLY_SIGNED(SUMS, X, W) emulate_multiply<int8_t, uint8_t>(SUMS, X, W)

#else

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64, "the processor prefetch 64 bytes");

static void tiles_begin() {
  TileConfiguration configuration;
  for (int t = 0; t < 8; t++) {
    configuration.bytes_a_row[t] = 64;
    configuration.rows[t] = 16;
  }
  // GCC's intrinsic declares the first 8 bytes only: force all 64 to be written before it.
  __asm__ volatile("" : : "r"(&configuration) : "memory");
  _tile_loadconfig(&configuration);
}
static void tiles_end() { _tile_release(); }
#define TILE_ZERO(T) _tile_zero(T)
#define TILE_LOAD(T, p, stride) _tile_loadd(T, p, stride)
#define TILE_STORE(T, p, stride) _tile_stored(T, p, stride)
#define TILE_MULTIPLY(SUMS, X, W) _tile_dpbusd(SUMS, X, W)
#define TILE_MULTIPLY_SIGNED(SUMS, X, W) _tile_dpbsud(SUMS, X, W)

#endif

constexpr size_t LINE_BYTES = PANEL * 4;
constexpr size_t SUM_STRIDE = PANEL * sizeof(int32_t);

// acc[16 HALVES][32] = the products of 16 rows of `upper`, then of `lower`, with 32 columns of `lines`, each
// `line_bytes` behind the last one. `beside(step)` does other work while the tiles of a step are multiplied.
template <int HALVES, typename Beside>
static void multiply_halves(const uint8_t* upper, const uint8_t* lower, size_t stride, const int8_t* lines,
                            size_t line_bytes, int steps, int32_t* acc, Beside beside) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (HALVES == 2) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int step = 0; step < steps; step++, lines += K_STEP / 4 * line_bytes) {
    TILE_LOAD(4, upper + step * K_STEP, stride);
    TILE_LOAD(6, lines, line_bytes);
    TILE_LOAD(7, lines + 64, line_bytes);
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    if constexpr (HALVES == 2) {
      TILE_LOAD(5, lower + step * K_STEP, stride);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
    beside(step);
  }
  TILE_STORE(0, acc, SUM_STRIDE);
  TILE_STORE(1, acc + 16, SUM_STRIDE);
  if constexpr (HALVES == 2) {
    TILE_STORE(2, acc + 16 * PANEL, SUM_STRIDE);
    TILE_STORE(3, acc + 16 * PANEL + 16, SUM_STRIDE);
  }
}

// Beside it finishes other rows in equal parts: `finish(part, parts)`.
template <typename Finish>
static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc, Finish finish) {
  if (rows <= FEW_ROWS) {
    finish(0, 1);
    return multiply_zmm(codes, stride, rows, panel, inputs_padded, ahead, acc);
  }
  const int steps = inputs_padded / K_STEP;
  const auto prefetch = [&] {  // the share of the lines of one step
    for (size_t i = 0; i < K_STEP / 4 * ahead.step; i += 64) __builtin_prefetch(ahead.start + i);
    ahead.start += K_STEP / 4 * ahead.step;
  };
  if (rows <= 16)
    return multiply_halves<1>(codes, codes, stride, panel, LINE_BYTES, steps, acc, [&](int step) {
      prefetch();
      if (!step) finish(0, 1);
    });
  multiply_halves<2>(codes, codes + 16 * stride, stride, panel, LINE_BYTES, steps, acc, [&](int step) {
    prefetch();
    finish(step, steps);
  });
}

static int64_t peak(int rounds) {
  alignas(64) static const uint8_t zeros[16 * 64] = {};
  TILE_LOAD(4, zeros, 64);
  TILE_LOAD(5, zeros, 64);
  TILE_LOAD(6, zeros, 64);
  TILE_LOAD(7, zeros, 64);
  for (int i = 0; i < rounds; i++) {
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
  }
  return (int64_t)rounds * 4 * 16 * 16 * 64;
}
