// One variant's table of kernels. A variant's .cpp includes its tile routine, then this.
// QUIRE_VARIANT: its name; QUIRE_TABLE: the function that gives the table.

#include "rows.inl"
#include "gemm.inl"
#include "attention.inl"
#include "load.inl"

#define QUIRE_TEXT_(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_(x)

static const Kernels table = {
    QUIRE_TEXT(QUIRE_VARIANT), TILE_ROWS, tiles_begin, tiles_end,
    embed, norm_to_codes, to_codes, hadamard, rotate_and_store,
    multiply,
    attend_rows, attend_split, merge_splits,
    rotate, pack,
    multiply_tile,
};

}  // namespace

const Kernels* QUIRE_TABLE() { return &table; }
