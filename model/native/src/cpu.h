// Which variants this machine can run.
#pragma once
#include "kernels.h"

namespace quire {

constexpr int kMaxVariants = 8;

// Best first. Returns how many.
int available_variants(const Kernels* list[kMaxVariants]);

// Null if the machine cannot run the variant; "" is the best one.
const Kernels* find_variant(const char* name);

}  // namespace quire
