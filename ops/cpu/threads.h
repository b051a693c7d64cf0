// Work on several threads at once: those of the OpenMP pool that torch's own operations have loaded, where there is one.
// New threads would share a core with those, which go on spinning for a while after each operation.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

// The version of all entry points together, which build.py compares with its table of their arguments.
extern "C" int kernels_abi() { return 7; }

// What an entry point returns; build.py turns these into errors.
enum Code { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2, OUT_OF_RANGE = 3 };

typedef void (*gomp_parallel_t)(void (*)(void*), void*, unsigned, unsigned);

inline gomp_parallel_t find_gomp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<gomp_parallel_t>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// Calls body() once on each of up to `threads` threads (a nested or limited pool may bring fewer): bodies take their
// work from a shared counter. False if any of them threw, which is to say that memory ran out.
template <class Body>
bool on_threads(int threads, Body&& body) {
  static const gomp_parallel_t gomp = find_gomp();
  struct Job {
    Body* body;
    std::atomic<bool> failed{false};
    static void main(void* p) {
      Job* job = static_cast<Job*>(p);
      try {
        (*job->body)();
      } catch (...) {
        job->failed = true;
      }
    }
  } job;
  job.body = &body;
  if (threads > 1 && gomp) {
    gomp(&Job::main, &job, static_cast<unsigned>(threads), 0);
    return !job.failed;
  }
  std::vector<std::thread> pool;
  try {
    for (int i = 1; i < threads; ++i) pool.emplace_back(&Job::main, &job);
  } catch (...) {  // no more threads to be had: the ones there are do the work
  }
  Job::main(&job);
  for (auto& thread : pool) thread.join();
  return !job.failed;
}

// Hands out tasks 0 .. count - 1 one by one: work(task, scratch), with a scratch that make() builds for each thread.
template <class Make, class Work>
void run_tasks(int threads, int64_t count, Make&& make, Work&& work) {
  std::atomic<int64_t> next{0};
  const bool done = on_threads(static_cast<int>(std::min<int64_t>(threads, count)), [&] {
    auto scratch = make();
    for (int64_t task; (task = next.fetch_add(1)) < count;) work(task, scratch);
  });
  if (!done) throw std::bad_alloc();
}

// The same without scratch: work(task).
template <class Work>
void run_tasks(int threads, int64_t count, Work&& work) {
  run_tasks(threads, count, [] { return 0; }, [&](int64_t task, int) { work(task); });
}

// Makes an entry point's code of f().
template <class F>
int guarded(F&& f) {
  try {
    f();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
