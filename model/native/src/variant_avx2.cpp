// The avx2 variant; see build.py for its compiler flags.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#if defined(__x86_64__)

#define QUIRE_VARIANT avx2
#define QUIRE_TABLE avx2_kernels

namespace {

#include "tile_avx2.inl"

static void tiles_begin() {}
static void tiles_end() {}

#include "variant.inl"

#endif
