// The C interface of encoders; model/native/encoder.py mirrors these structures field by field.
#pragma once
#include "quire.h"

struct QuireEncoderShape {
  int32_t hidden, width, layers, heads, kv_heads, dim;
  int32_t activation, gated;  // of the MLP; activations as in encoder_kernels.h
  int32_t causal, post_norm, rms, rotary, has_types;
  int32_t position_offset;
  int32_t pooling;    // 0: mean, 1: first, 2: last
  int32_t normalised;
  int32_t labels;     // of the classifier; 0: none
  int32_t head_dense, head_activation;
  int32_t eight_bit;  // matrices of the MLPs; else float32
  int32_t threads;
  float norm_eps;
  const int32_t* windows;  // [layers], INT32_MAX: all
};

enum QuireMatrix { QUIRE_M_QKV, QUIRE_M_OUT, QUIRE_M_UP, QUIRE_M_DOWN, QUIRE_M_HEAD_DENSE, QUIRE_M_HEAD_OUT };
enum QuireVector {
  QUIRE_V_EMBED, QUIRE_V_FINAL, QUIRE_V_HEAD, QUIRE_V_ATTENTION, QUIRE_V_MLP, QUIRE_V_QUERY, QUIRE_V_KEY
};
// Rotary tables are [positions, dim / 2]; the local ones are those of layers with a window.
enum QuireTable {
  QUIRE_T_EMBED, QUIRE_T_POSITION, QUIRE_T_TYPE, QUIRE_T_COS, QUIRE_T_SIN, QUIRE_T_LOCAL_COS, QUIRE_T_LOCAL_SIN,
  QUIRE_TABLES
};

struct QuireEncoding {
  int32_t sequences;      // S
  const int32_t* starts;  // [S + 1] rows of T
  const int32_t* tokens;  // [T]
  const int32_t* types;   // [T]
  float* out;             // [S, hidden or labels]
};

struct QuireEncoder;

QUIRE_API QuireEncoder* quire_encoder_create(const QuireEncoderShape* shape, const char* variant, char* error,
                                             size_t size);
QUIRE_API void quire_encoder_destroy(QuireEncoder* encoder);
QUIRE_API const char* quire_encoder_variant(const QuireEncoder* encoder);
QUIRE_API void quire_encoder_matrix(QuireEncoder* encoder, int32_t layer, int32_t which, const float* weight,
                                    const float* bias);
QUIRE_API void quire_encoder_vector(QuireEncoder* encoder, int32_t layer, int32_t which, const float* weight,
                                    const float* bias);
// The table is borrowed until the encoder is destroyed.
QUIRE_API void quire_encoder_table(QuireEncoder* encoder, int32_t which, const float* table);
// Tokens, types and lengths must fit the tables. Returns 0, or 1 if there is no memory.
QUIRE_API int32_t quire_encode(QuireEncoder* encoder, const QuireEncoding* step);
