// One variant's table of kernels. build.py compiles this file once per variant, with
// -DQUIRE_VARIANT=<name> and the compiler flags of its instruction set.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#define QUIRE_TEXT_(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_(x)
#define QUIRE_JOIN_(a, b) a##b
#define QUIRE_JOIN(a, b) QUIRE_JOIN_(a, b)

namespace {

#include QUIRE_TEXT(QUIRE_JOIN(tile_, QUIRE_VARIANT).inl)

#if defined(__AVX512VNNI__)
#define QUIRE_BLOCK_TILE "blocks_zmm.inl"
#define QUIRE_WHOLE "whole_zmm.inl"
#elif defined(__AVX2__)
#define QUIRE_BLOCK_TILE "blocks_ymm.inl"
#define QUIRE_WHOLE "whole_ymm.inl"
#else
#define QUIRE_BLOCK_TILE "blocks_portable.inl"
#define QUIRE_WHOLE "whole_portable.inl"
#endif

#if !defined(QUIRE_SPLIT_CODES)
constexpr int CODE_BYTES = 1, CODE_BIAS = 128;
#endif

#if !defined(QUIRE_AHEAD_TO_L2)
constexpr int AHEAD_TILES = INT32_MAX;
#endif

#if !defined(QUIRE_TILES_FILL)  // only AMX has tiles to configure
static void tiles_begin() {}
static void tiles_end() {}
#endif

#include "rows.inl"
#include "gemm.inl"
#include "attention.inl"
#include "sampling.inl"
#include "load.inl"
#include "blocks.inl"
#include "lowrank.inl"

static const Kernels table = {
    QUIRE_TEXT(QUIRE_VARIANT), TILE_ROWS, CODE_BYTES, tiles_begin, tiles_end,
    embed, norm_to_codes, to_codes, hadamard, norm_to_blocks, to_blocks, rotate_row, rotate_and_store,
    multiply, multiply_blocks,
    norm_factor, low_rank,
    attend_rows, attend_split, merge_splits,
    weigh, largest_of, weigh_nearly, find_between, partition, maxima_of, mask_out,
    rotate, pack, pack_blocks, pack_low_rank,
    peak,
};

}  // namespace

const Kernels* QUIRE_JOIN(QUIRE_VARIANT, _kernels)() { return &table; }
