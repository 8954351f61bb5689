// Team: a few threads that walk through the same program of phases.
//
// A phase is a number of chunks of work; threads claim them one by one, and a phase is over when its
// last chunk is done. No thread waits for another *thread*: one that is not scheduled, or is late,
// finds the chunks claimed and goes on. So a step advances at the speed of the threads that run, which
// keeps it fast if an API process and a client share the cores.
//
// Waiting is a short spin, then a futex: never an endless spin.
//
//   run slot     0 1 0 1 ...   step n uses slot n % 2, so a late thread still walks through finished
//                              phases of step n - 1 while step n is under way
//   users        threads inside a slot; the slot is written again only when it is 0
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace quire {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
inline void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Threads wait on an event until a condition holds.
class Event {
 public:
  // The condition must become true before `notify` is called.
  template <typename Condition> void wait(Condition holds) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 32; i++) {
        if (holds()) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    sleepers_.fetch_add(1);
    while (true) {
      const uint32_t seen = word_.load();
      if (holds()) break;
      futex_wait(word_, seen);
    }
    sleepers_.fetch_sub(1);
  }

  void notify() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (sleepers_.load() == 0) return;
    word_.fetch_add(1);
    futex_wake_all(word_);
  }

 private:
  static constexpr std::chrono::microseconds kSpin{40};
  std::atomic<uint32_t> word_{0};
  std::atomic<int> sleepers_{0};
};

struct alignas(64) Phase {
  std::atomic<int> next{0};
  alignas(64) std::atomic<int> done{0};
};

// One thread's place in a program.
class Walker {
 public:
  Walker(Phase* phases, Event& event, int threads) : phase_(phases), event_(event), threads_(threads) {}

  int threads() const { return threads_; }

  // Runs work(c) for c = 0..chunks - 1, each once, on any thread. Returns when all are done.
  template <typename Work> void phase(int chunks, Work work) {
    Phase& phase = *phase_++;
    while (phase.next.load(std::memory_order_relaxed) < chunks) {
      const int chunk = phase.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) break;
      work(chunk);
      if (phase.done.fetch_add(1) + 1 == chunks) event_.notify();
    }
    if (phase.done.load(std::memory_order_acquire) == chunks) return;
    event_.wait([&] { return phase.done.load() == chunks; });
  }

 private:
  Phase* phase_;
  Event& event_;
  int threads_;
};

// Task: copyable; `void operator()(Walker&) const` is the program. It must touch data only inside
// chunks, and the numbers of chunks must follow from the task alone: a late thread reads both.
template <typename Task> class Team {
 public:
  Team(int threads, int phases) {
    for (Slot& slot : slots_) slot.phases = std::vector<Phase>(static_cast<size_t>(phases));
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    stopping_.store(true);
    epoch_.fetch_add(1);
    start_.notify();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // The calling thread is one of the team. `threads`: how many participate at most.
  void run(const Task& task, int threads) {
    const uint32_t epoch = epoch_.load() + 1;
    Slot& slot = slots_[epoch % 2];
    done_.wait([&] { return slot.users.load() == 0; });
    for (Phase& phase : slot.phases) {
      phase.next.store(0, std::memory_order_relaxed);
      phase.done.store(0, std::memory_order_relaxed);
    }
    slot.task = task;
    slot.threads = threads < size() ? threads : size();
    epoch_.store(epoch);
    if (slot.threads > 1) start_.notify();
    walk(slot);
  }

 private:
  struct Slot {
    std::vector<Phase> phases;
    Task task;
    int threads = 0;
    std::atomic<int> users{0};
  };

  void walk(Slot& slot) {
    Walker walker(slot.phases.data(), finished_, slot.threads);
    slot.task(walker);
  }

  void serve(int index) {
    uint32_t seen = 0;
    while (true) {
      start_.wait([&] { return epoch_.load() != seen; });
      seen = epoch_.load();
      if (stopping_.load()) return;
      Slot& slot = slots_[seen % 2];
      slot.users.fetch_add(1);
      // Unless the next step began in between: then this slot may be about to be rewritten.
      if (epoch_.load() == seen && index < slot.threads) walk(slot);
      slot.users.fetch_sub(1);
      done_.notify();
    }
  }

  Slot slots_[2];
  std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  Event start_, finished_, done_;
  std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace quire
