// The portable variant; see build.py for its compiler flags.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#define QUIRE_VARIANT portable
#define QUIRE_TABLE portable_kernels

namespace {

#include "tile_portable.inl"

static void tiles_begin() {}
static void tiles_end() {}

#include "variant.inl"
