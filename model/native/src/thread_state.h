// A thread's floating-point state while it computes: round to nearest, keep subnormals, whatever the
// process has set; and AMX tiles if the variant has them.
#pragma once
#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace quire {

class ThreadState {
 public:
  explicit ThreadState(const Kernels& kernels) : kernels_(kernels) {
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    _mm_setcsr(0x1f80);
#endif
    kernels_.thread_begin();
  }
  ~ThreadState() {
    kernels_.thread_end();
#if defined(__x86_64__)
    _mm_setcsr(saved_);
#endif
  }

 private:
  const Kernels& kernels_;
  unsigned saved_ = 0;
};

}  // namespace quire
