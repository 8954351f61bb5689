#include "cpu.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quire {

#if defined(__x86_64__)
namespace {

struct Features {
  bool avx2, avxvnni, avx512, amx;
};

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

// Since 5.16 Linux grants the 8 KiB of tile state only on request.
bool request_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

Features detect() {
  Features f = {};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool has_xsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!has_xsave || !fma || !f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const bool f_dq_bw_vl = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
  f.avx2 = ymm && (b >> 5 & 1);
  f.avx512 = f.avx2 && zmm && f_dq_bw_vl && (c >> 11 & 1);  // bit 11: VNNI
  const bool amx_tile = d >> 24 & 1, amx_int8 = d >> 25 & 1;
#if defined(QUIRE_EMULATE_TILES)
  f.amx = f.avx512;
  (void)tiles, (void)amx_tile, (void)amx_int8;
#else
  f.amx = f.avx512 && tiles && amx_tile && amx_int8 && request_tiles();
#endif
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avxvnni = f.avx2 && (a >> 4 & 1);
  return f;
}

}  // namespace
#endif

int available_variants(const Kernels* list[kMaxVariants]) {
  int count = 0;
#if defined(__x86_64__)
  const Features f = detect();
  if (f.amx) list[count++] = amx_kernels();
  if (f.avx512) list[count++] = avx512_kernels();
  if (f.avxvnni) list[count++] = avxvnni_kernels();
  if (f.avx2) list[count++] = avx2_kernels();
#endif
  list[count++] = portable_kernels();
  return count;
}

const Kernels* find_variant(const char* name) {
  const Kernels* list[kMaxVariants];
  const int count = available_variants(list);
  if (!*name) return list[0];
  for (int i = 0; i < count; i++)
    if (strcmp(list[i]->name, name) == 0) return list[i];
  return nullptr;
}

}  // namespace quire
