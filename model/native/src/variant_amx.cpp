// The amx variant; see build.py for its compiler flags.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#if defined(__x86_64__)

#define QUIRE_VARIANT amx
#define QUIRE_TABLE amx_kernels

namespace {

#include "tile_amx.inl"

#include "variant.inl"

#endif
