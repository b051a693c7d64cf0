// Work on several threads at once: those of the OpenMP pool that torch's own operations have loaded, where there is one.
// New threads would share a core with those, which go on spinning for a while after each operation.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

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
