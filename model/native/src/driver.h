// Driver: launched steps, computed one after another on a thread of its own.
//
// The host plans the next step while one is computed. So that no step waits for the host to read the one
// before, the tokens that only that one will know are copied from its results when it is done.
//
//   launch   host     copies the step; its arrays stay with the caller until it is collected
//   run      driver   fills in unread tokens, computes
//   collect  host     waits for the oldest step
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#include "model.h"

namespace quire {

class Driver {
 public:
  explicit Driver(Model& model) : model_(model), thread_([this] { work(); }) {}
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    launched_.notify_one();
    thread_.join();  // the step that is computed ends; others are dropped
  }

  // Whether a step chooses tokens, which the next one may read: not if its head follows as a step of its own, nor if
  // it is the head alone and scores given tokens.
  static bool chooses(const QuireStep& step) {
    return step.outputs && !step.head_later && !(step.sampling && step.sampling->given);
  }

  // `unread`: [T] outputs of the last step before this one that chooses, or -1 where a token is known; null: all are.
  void launch(const QuireStep& step, const int32_t* unread) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      flights_.push_back({step, unread, {}, 0.0});
      pending_++;
    }
    launched_.notify_one();
  }

  struct Flight {
    QuireStep step;
    const int32_t* unread;
    std::string error;  // why it failed; empty if it did not
    double seconds;     // that it took
  };

  // The oldest step. At least one must have been launched.
  Flight collect() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return flights_.size() > pending_; });
    Flight oldest = std::move(flights_.front());
    flights_.pop_front();
    return oldest;
  }

  bool idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return flights_.empty();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      launched_.wait(lock, [this] { return pending_ > 0 || stopping_; });
      if (stopping_) return;
      Flight& flight = flights_[flights_.size() - pending_];  // others only come behind it or go before it
      lock.unlock();
      const auto start = std::chrono::steady_clock::now();
      try {
        compute(flight);
      } catch (const std::exception& problem) {
        flight.error = problem.what();
      }
      flight.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      lock.lock();
      pending_--;
      done_.notify_one();
    }
  }

  void compute(const Flight& flight) {
    if (flight.unread)
      for (int32_t t = 0; t < flight.step.rows; t++)
        if (flight.unread[t] >= 0) flight.step.tokens[t] = newest_[flight.unread[t]];
    model_.run(flight.step);
    if (!chooses(flight.step)) return;
    const int32_t* const tokens = flight.step.sampling ? flight.step.sampling->tokens : flight.step.argmax;
    newest_.assign(tokens, tokens + flight.step.outputs);
  }

  Model& model_;
  std::mutex mutex_;  // of all but `newest_`, which is the driver's
  std::condition_variable launched_, done_;
  std::deque<Flight> flights_;  // in order of launching, until they are collected
  size_t pending_ = 0;          // the last ones, which are not computed yet
  bool stopping_ = false;
  std::vector<int32_t> newest_;  // the tokens of the newest step that chose any and was computed
  std::thread thread_;           // last: it uses all of the above
};

}  // namespace quire
