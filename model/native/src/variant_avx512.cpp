// The avx512 variant; see build.py for its compiler flags.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#if defined(__x86_64__)

#define QUIRE_VARIANT avx512
#define QUIRE_TABLE avx512_kernels

namespace {

#include "tile_avx512.inl"

static void tiles_begin() {}
static void tiles_end() {}

#include "variant.inl"

#endif
