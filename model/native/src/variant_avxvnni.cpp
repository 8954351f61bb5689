// The avxvnni variant; see build.py for its compiler flags.
#include <stdlib.h>

#include "kernels.h"
#include "lanes.h"

#if defined(__x86_64__)

#define QUIRE_VARIANT avxvnni
#define QUIRE_TABLE avxvnni_kernels

namespace {

#include "tile_avxvnni.inl"

static void tiles_begin() {}
static void tiles_end() {}

#include "variant.inl"

#endif
