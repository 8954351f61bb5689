// Kernels: the functions of one instruction-set variant, as a table.
//
// The same sources (rows.inl, gemm.inl, blocks.inl, lowrank.inl, attention.inl, wide.inl, narrow.inl, sampling.inl,
// load.inl) are compiled once per variant; the variants differ in the width of `Lanes` and in the integer
// sums of tiles (tile_*.inl, blocks_*.inl) and of attention (whole_*.inl). Results are equal bit by bit:
// integer sums are exact, and float arithmetic is that of lanes.h.
//
// Legend, as in model/batch.py:  T rows of a step, C hidden size, H query heads, K KV heads, D head
// dimension, F width of the MLP, V vocabulary. Padded rows have a stride.
//
// Translation units of different instruction sets include this header: plain data only.
#pragma once
#include <stddef.h>
#include <stdint.h>

constexpr int PANEL = 32;          // output columns that are packed together
constexpr int K_STEP = 64;         // inner dimensions are padded to this: one AMX tile row
constexpr int TILE_ROWS_MAX = 32;  // maximum rows of activations of a tile routine
constexpr int GROUP = 16;          // keys that are stored together, one per lane
constexpr int DIM_MAX = 256;       // of a head
constexpr int SPLIT = 256;         // positions of one partial attention; at multiples of itself
constexpr int SEGMENT = 32;        // lines of 4 inputs, during whose product as many cache lines
                                   // of keys or values are prefetched: see Prefetch

// 4-bit weights: blocks of inputs of a column share a scale and a minimum; activations, a scale.
constexpr int BLOCK_INPUTS = 32;
constexpr int BLOCK_LINES = 4;  // of 4 inputs in the low halves of bytes, and 4 in the high ones
constexpr size_t BLOCK_BYTES = (size_t)BLOCK_LINES * PANEL * 4 + PANEL * 2 * sizeof(uint16_t);

// y[M, N] = x[M, K] W[N, K]^T with 8-bit W, one scale per output column, or with 4-bit W in blocks.
struct Linear {
  int outputs;           // N
  int inputs;            // K
  int inputs_padded;     // K rounded up to a multiple of K_STEP; the padding is 0
  int panels;            // N / PANEL rounded up; the padding is 0
  int8_t* packed;        // [panels][inputs_padded / 4][PANEL][4]
  float* scales;         // [panels * PANEL]
  int32_t* corrections;  // [panels * PANEL]: CODE_BIAS * the sum of a column's weights, see Codes
  float* bias;           // [panels * PANEL], or null
  uint8_t* blocks;       // instead of packed, scales and corrections, or null: see blocks.inl
};

// Activations in 8 bits: round(x / scale), in -127..127, as the variant's instructions take them, which
// multiply unsigned by signed bytes. Behind the last row TILE_ROWS_MAX more rows must be readable.
//   CODE_BIAS = 128  a byte, 128 + round(x / scale); what that adds to a sum is in `corrections`
//   CODE_BIAS = 0    two bytes, see tile_avx2.inl
struct Codes {
  uint8_t* rows;
  size_t stride;  // code_stride(inputs_padded, code_bytes)
  float* scales;  // one per row
};

// An odd number of cache lines, so that rows do not share few sets of the L1 cache; at least 4 bytes
// more than the codes.
static inline size_t code_stride(int inputs_padded, int code_bytes) {
  return (((size_t)inputs_padded * code_bytes / 64 + 1) | 1) * 64;
}

// A row of activations for 4-bit weights: K codes of 8 bits, then for each block a scale, then for each
// block scale * the sum of its codes.
static inline size_t block_row_stride(int inputs) {
  return ((((size_t)inputs + (size_t)inputs / BLOCK_INPUTS * 2 * sizeof(float)) / 64 + 1) | 1) * 64;
}

enum class Epilogue {
  STORE,  // out[m, n] = y
  ADD,    // out[m, n] += y: the residual stream
  GATED,  // columns of a panel are 16 gates and their 16 ups: out[m, 16] = silu(gate) * up
  HEAD,   // logits of the rows that request them, and the argmax of each row
};

// Segments of one tile of rows with one panel.
static inline int segments_of(const Linear& weight) { return (weight.inputs_padded / 4 + SEGMENT - 1) / SEGMENT; }

struct Prefetch;

struct Product {
  const Linear* weight;
  Codes codes;
  int rows;  // M
  Epilogue epilogue;
  float* out;
  size_t out_stride;
  const int32_t* out_rows;   // ADD: [M] rows of `out`, or null: 0..M - 1
  float* const* logits;      // HEAD: [M], null for a row without
  const Prefetch* prefetch;  // or null
  int first_segment;         // its index among the segments of all products that share `prefetch`
  const float* const* addends;  // [M] what is added to a row's columns before the epilogue, or null for
                                // none; null: of no row. Not for HEAD
};

// What an adapter adds to a Linear: B (A x), in float32. See lowrank.inl.
struct LowRank {
  int rank;
  int inputs;       // padded as the Linear's; the padding is 0
  int columns;      // panels * PANEL
  const float* a;   // [rank][inputs]
  const float* b;   // [rank][columns], in the order of the packed weights
};
constexpr int LOW_RANK_MAX = 1024;  // of the products that are fused into one

// The argmax of a row over some panels: the lowest id among equals; 0 if all are NaN.
struct Argmax {
  float value;
  int32_t id;
};

// Weights to prefetch while a tile is computed: at each line of 4 inputs, 128 bytes from `start`, which
// then advances by `step`. Only a hint: it may point behind the weights.
struct Ahead {
  const int8_t* start;
  size_t step;
  const Prefetch* prefetch;  // or null
  int segment;               // the first one of this tile
};

struct HeadShape {
  int heads, kv_heads, dim;  // H, K, D
  int block_size;            // tokens per block, a multiple of GROUP
  float eps;                 // of the norms of queries and keys
  bool wide_cache;           // K and V in bfloat16; false: 8 bits, a scale per token and head
};

// The KV pool as one layer sees it: region of block b and head h at base + b * block_bytes + h *
// region_bytes. A region holds one block of one KV head:
//   keys    [block_size / GROUP][D][GROUP]     transposed, so that 16 scores are 16 lanes
//   values  [block_size][D]
// In 8 bits instructions add products of four:
//   keys    [block_size / GROUP][D / 4][GROUP][4], 128 + code
//   values  [block_size / 4][D][4]
//   scales of keys [block_size], scales of values [block_size], as floats
struct Pool {
  uint8_t* base;
  size_t region_bytes, block_bytes;
};

// What the attention of the next layer will read: prefetched during products of many rows, which are
// compute-bound and leave the memory idle.
struct Prefetch {
  const uint8_t* base;    // of its pool
  const size_t* regions;  // offsets, in the order in which attention reads them
  int count;
};

// How a row of QKV is rotated and stored.
struct Rotary {
  const HeadShape* shape;
  const float* cosines;  // [D / 2] of this position; null in a layer without rotary positions
  const float* sines;
  const float* query_norm;  // [D], or null
  const float* key_norm;
  float query_scale;
  bool spread;  // a Hadamard transform of queries and keys, before keys are rounded to 8 bits
};

// y = (mix (x) H) diag(signs) x; see rotate_bundle.
struct Rotation {
  int power, odd;
  float* signs;  // [power * odd]
  float* mix;    // [odd, odd]
};

// Some rows of one sequence, one KV head, some splits.
struct AttentionItem {
  const HeadShape* shape;
  Pool pool;
  const int32_t* blocks;  // the block table of the sequence
  int head;               // KV head
  int first_row, rows;    // of T; consecutive positions
  int first_position;
  int window;             // positions that a query sees, itself included; INT32_MAX: all
  const float* queries;   // [T, stride], rotated and scaled
  size_t query_stride;
  float* out;             // [T, stride]
  size_t out_stride;
  const AttentionItem* next;  // what the same thread probably attends to next, or null: prefetched meanwhile
  int next_split;             // of `next`; < 0: all of them, the first one first
  bool is_cold;               // nothing was attended to before, so nothing is prefetched
};

// A partial result of one query: largest score, sum of weights, weighted values. sum = 0: no keys.
// In memory: [largest, sum, values[D]].

// How logits become weights, see sampling.inl: lighter ones than `least` become 0.
struct Tempering {
  float largest, temperature;
  int64_t least;
};

constexpr double NEAR = 0x1p-18;  // relative error of weigh_nearly

constexpr int MAXIMA = 16;  // groups of maxima_of

// What the true sum of some weights is at least, and at most.
struct Bounds {
  int64_t low, high;
};

struct Kernels {
  const char* name;
  int tile_rows;  // preferred rows of multiply_tile
  int code_bytes;  // per input of a row of Codes

  void (*thread_begin)(void);  // before and after a thread computes (AMX tiles)
  void (*thread_end)(void);

  // rows.inl
  void (*embed)(const uint16_t* row, int size, float* out);
  void (*norm_to_codes)(const float* x, int size, float eps, uint8_t* codes, float* scale);
  void (*to_codes)(const float* x, int size, float factor, uint8_t* codes, float* scale);
  void (*hadamard)(float* x, int size, int block);
  void (*norm_to_blocks)(const float* x, const float* weight, int size, float eps, uint8_t* row);
  void (*to_blocks)(const float* x, int size, uint8_t* row);
  void (*rotate_row)(const Rotation* rotation, const float* x, float* spread, float* out);
  void (*rotate_and_store)(const Rotary* rotary, float* qkv, uint8_t* const* regions, int offset);

  // gemm.inl: panels first..end - 1, all rows; `argmax` [M] is for HEAD
  void (*multiply)(const Product* product, int first, int end, Argmax* argmax);

  void (*multiply_blocks)(const Product* product, int first, int end);  // blocks.inl; not for HEAD

  // lowrank.inl
  float (*norm_factor)(const float* x, int size, float eps);
  void (*low_rank)(const LowRank* pair, const float* x, float factor, float* out);

  // attention.inl
  void (*attend_rows)(const AttentionItem* item);
  void (*attend_split)(const AttentionItem* item, int split, float* partials);
  void (*merge_splits)(const float* partials, int splits, size_t stride, int dim, float* out);

  // sampling.inl
  int64_t (*weigh)(const float* logits, int count, const Tempering* tempering, int64_t* weights);
  float (*largest_of)(const float* x, int count);
  double (*weigh_nearly)(const float* logits, int count, const Tempering* tempering);
  int (*find_between)(const float* x, int count, float bound, float most, int32_t* places);
  int (*partition)(const float* x, int count, const Tempering* tempering, float bound, int32_t* places, Bounds* rest);
  void (*maxima_of)(const float* x, int count, float* maxima);
  void (*mask_out)(const uint32_t* mask, int count, float* logits);

  // load.inl
  void (*rotate)(float* w, int64_t rows, int64_t cols, int axis, int power, int odd,
                 const float* signs, const float* mix);
  void (*pack)(const float* w, const float* bias, bool gated, Linear* linear);
  void (*pack_blocks)(const uint8_t* w, const float* bias, bool gated, Linear* linear);
  void (*pack_low_rank)(const float* b, const Linear* linear, bool gated, int rank, float* packed);

  // For probe.cpp: the variant's best instructions for 8-bit products, on registers alone. Returns how
  // many products it computed.
  int64_t (*peak)(int rounds);
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
#endif
