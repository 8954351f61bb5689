// The C interface of the native step. library.py mirrors these structures field by field.
// Pointers are borrowed for the call only. Functions that can fail write a message and return null or a
// number that is not 0.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define QUIRE_API extern "C" __attribute__((visibility("default")))

struct QuireShape {
  int32_t vocab, hidden, layers, heads, kv_heads, dim, width;  // width: F, of the MLP
  int32_t block_size, num_blocks;
  int32_t max_rows;  // the largest T
  int32_t hadamard;  // block of the transform before the last product of an MLP; 1: none
  int32_t qkv_bias, qk_norm, wide_cache;
  int32_t spreads;  // keys and queries by a Hadamard transform, before they are rounded to 8 bits; dim: a power of two
  int32_t four_bit;  // matrices of the layers in blocks of 4 bits, not rotated
  int32_t threads;          // of a small step, which is memory-bound
  int32_t compute_threads;  // of a step of `compute_rows` rows or more, which is compute-bound
  int32_t compute_rows;
  float norm_eps;
  const int32_t* windows;     // [layers], INT32_MAX: all
  const uint8_t* has_rotary;  // [layers]
  const float* cosines;       // [max_positions, dim / 2]
  const float* sines;
  int32_t max_positions;  // rows of the rotary tables
};

// How the rows of R choose their tokens: SamplingBatch of model/batch.py, column by column, and where the
// results go. Rows of the lists never fall.
struct QuireSampling {
  int32_t penalties, biases, masks;  // P, E, M
  int32_t num_top;                   // N
  const uint64_t* seeds;             // [R], as are those that follow
  const int32_t* choices;
  const int32_t* indices;
  const float* temperatures;
  const int32_t* top_ks;
  const float* top_ps;
  const float* min_ps;
  const float* presence;
  const float* frequency;
  const float* repetition;
  const uint8_t* wants_logprobs;
  const int32_t* penalty_rows;  // [P]
  const int32_t* penalty_ids;
  const int32_t* penalty_counts;
  const int32_t* bias_rows;  // [E]
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* mask_rows;    // [M]
  const uint32_t* mask_words;  // [M, V / 32 rounded up]
  const int32_t* given;        // [R] tokens that are scored instead of chosen, or null
  int32_t* tokens;             // [R] out
  float* logprobs;             // [R] out, of rows that request them
  int32_t* top_ids;            // [R, N] out
  float* top_logprobs;         // [R, N] out
};

struct QuireStep {
  int32_t rows;         // T; 0: no layers, only the head over rows of the step before
  int32_t sequences;    // S
  int32_t table_width;  // B
  int32_t outputs;      // R: rows that go through the head
  int32_t head_later;   // 1: in a step of the head alone, which follows
  int32_t keeps_rows;   // 1: a step of the head alone follows, over other rows than these; 0: of the
                        // others the last layer computes only keys and values
  int32_t* tokens;              // [T]; unread ones are written by the library
  const int32_t* positions;     // [T]
  const int32_t* query_starts;  // [S + 1]
  const int32_t* block_table;   // [S, B]
  const int32_t* output_rows;   // [R] rows of T
  float* const* logits;         // [R] where to write the V logits of a row that takes the argmax, at the beginning of
                                // a cache line, or null; null: of none
  int32_t* argmax;              // [R] out, without `sampling`
  const QuireSampling* sampling;  // null: each row takes the argmax
  const int32_t* adapters;      // [S] number of the sequence's adapter, from 1; 0: none; null: all 0
};

enum QuireLinear { QUIRE_QKV = 0, QUIRE_OUT = 1, QUIRE_GATE_UP = 2, QUIRE_DOWN = 3, QUIRE_HEAD = 4 };

struct QuireModel;

// Writes the names of the variants that this machine can run, best first, separated by spaces.
QUIRE_API void quire_variants(char* names, size_t size);
// Bytes of KV per block, all layers.
QUIRE_API size_t quire_block_bytes(const QuireShape* shape);
// variant: a name, or "" for the best.
QUIRE_API QuireModel* quire_create(const QuireShape* shape, const char* variant, char* error, size_t size);
QUIRE_API void quire_destroy(QuireModel* model);
QUIRE_API const char* quire_variant(const QuireModel* model);

// Loading. May be called from several threads, for different tensors.
QUIRE_API void quire_rotate(const QuireModel* model, float* w, int64_t rows, int64_t cols, int32_t axis,
                            int32_t power, int32_t odd, const float* signs, const float* mix);
QUIRE_API void quire_load_linear(QuireModel* model, int32_t layer, int32_t which, const float* w, const float* bias);
// 4 bits: blocks [outputs, inputs / 32] of 20 bytes, which are GGUF's Q4_1: scale and minimum in half
// precision, then 16 bytes with inputs i and i + 16. Not for the head, which always has 8 bits.
QUIRE_API void quire_load_blocks(QuireModel* model, int32_t layer, int32_t which, const uint8_t* w, const float* bias);
// 4 bits: the weights of a layer's norms, and the rotation of the head's inputs.
QUIRE_API void quire_load_norms(QuireModel* model, int32_t layer, const float* attention, const float* mlp);
QUIRE_API void quire_load_rotation(QuireModel* model, const float* signs, const float* mix);
QUIRE_API void quire_load_embedding(QuireModel* model, int32_t first, int32_t count, const float* w);
QUIRE_API void quire_load_head_norms(QuireModel* model, int32_t layer, const float* query, const float* key);

// What an adapter, counted from 0, adds to a matrix of a layer: b [outputs, rank] a [rank, inputs], which are
// copied. After loading, before the first step. Returns 0, or 1 with a message.
QUIRE_API int32_t quire_load_adapter(QuireModel* model, int32_t adapter, int32_t layer, int32_t which, int32_t rank,
                                     const float* a, const float* b, char* error, size_t size);

// The memory of all loaded weights, in ranges of equal sizes for equal shapes: its content can be stored,
// and written back in place of loading. Returns 0 if there is no range of this index.
QUIRE_API int32_t quire_weights(const QuireModel* model, int32_t index, uint8_t** start, size_t* bytes);

// Runs one step. Returns 0, or 1 with a message if the step does not fit the model.
QUIRE_API int32_t quire_step(QuireModel* model, const QuireStep* step, char* error, size_t size);

// The same in two parts: launch returns at once, and the step is computed when those launched before it are;
// collect waits for the oldest one and writes the seconds that it took. `step` is copied, but what it and
// `unread` point to must stay until it is collected. `unread`: [T] which output of the last step that chooses
// tokens, of those launched before, is the row's token, or -1; null: all tokens are known. Return 0, or 1 with
// a message. Between launches and collects, no step runs alone.
QUIRE_API int32_t quire_launch(QuireModel* model, const QuireStep* step, const int32_t* unread, char* error,
                               size_t size);
QUIRE_API int32_t quire_collect(QuireModel* model, double* seconds, char* error, size_t size);

// Parts, for tests: y = codes x packed w, dequantised, with bias or null. 1: no such variant.
QUIRE_API int32_t quire_product(const char* variant, const float* w, const float* bias, int32_t outputs,
                                int32_t inputs, const float* x, int32_t rows, float* y);
QUIRE_API int32_t quire_block_product(const char* variant, const uint8_t* w, const float* bias, int32_t outputs,
                                      int32_t inputs, const float* x, int32_t rows, float* y);

// y = the tokens and log probabilities that the rows of `logits` [R, vocab] yield, as in a step. The logits
// are overwritten. 1: no such variant; 2: the sampling is invalid.
QUIRE_API int32_t quire_sample(const char* variant, float* logits, int32_t rows, int32_t vocab,
                               const QuireSampling* sampling);
// Integer weights of numbers: floor(2^40 e^x) for x <= 0. 1: no such variant.
QUIRE_API int32_t quire_weigh(const char* variant, const float* x, int32_t count, int64_t* weights);

// Writes the places of numbers above a bound, which is at least 8 temperatures below the largest, 0; returns how
// many. `places` has room for count + 16. `bounds`: what the others weigh at least and at most, together.
// -1: no such variant.
QUIRE_API int32_t quire_partition(const char* variant, const float* x, int32_t count, float temperature, float bound,
                                  int32_t* places, int64_t* bounds);

// Roof of this machine, measured without the code of the step: bytes read from memory per second, and
// 8-bit products per second of the variant's best instructions on registers.
QUIRE_API double quire_probe_memory(int32_t threads, int64_t bytes, int32_t repeats);
QUIRE_API double quire_probe_products(const char* variant, int32_t threads, int32_t repeats);
