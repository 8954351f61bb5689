// One variant's table of the kernels of encoders; compiled as variant.cpp is.
#include "encoder_kernels.h"
#include "lanes.h"

#define QUIRE_TEXT_(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_(x)
#define QUIRE_JOIN_(a, b) a##b
#define QUIRE_JOIN(a, b) QUIRE_JOIN_(a, b)

namespace {

#include "encoder.inl"

static const EncoderKernels table = {
    QUIRE_TEXT(QUIRE_VARIANT), multiply, add, norm, activate, gate, rotate, pack_head, attend, mean, normalise,
};

}  // namespace

const EncoderKernels* QUIRE_JOIN(QUIRE_VARIANT, _encoder_kernels)() { return &table; }
