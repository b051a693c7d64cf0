// Largest value and sum over chosen neighbors, by channel, for float32 tensors on a CPU: ops/maps/reduce.py.
//
// Plain C entry points; every function works on contiguous row-major arrays of the caller. Symbols: B batch, M queries,
// N keys, C channels, K neighbors.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t STEP = 64;  // queries a thread takes at a time; channels, where it adds to keys

struct Reduce {
  const int64_t* indices;  // (B, M, K)
  int64_t B, M, N, C, K;
  int threads;

  bool valid() const { return in_range(indices, B * M * K, N); }

  // work(b, row, taps) for all queries; row counts through all samples.
  template <class Work>
  int queries(Work work) const {
    if (!valid()) return BAD_INDEX;
    return guarded([&] {
      run_tasks(threads, ceil_div(B * M, STEP), [&](int64_t task) {
        for (int64_t row = task * STEP; row < std::min(B * M, (task + 1) * STEP); ++row)
          work(row / M, row, indices + row * K);
      });
    });
  }

  // work(b, first, last) for the channels of all samples: what is added to keys has one fixed order.
  template <class Work>
  int channels(Work work) const {
    return guarded([&] {
      const int64_t parts = B < 2 * threads ? ceil_div(C, STEP) : 1, width = parts > 1 ? STEP : C;
      run_tasks(threads, B * parts, [&](int64_t task) {
        const int64_t first = task % parts * width;
        work(task / parts, first, std::min(C, first + width));
      });
    });
  }
};

}  // namespace

extern "C" {

// y (B, M, C): the largest values; origin (B, M, C): the keys they are of, of equal ones the first. NaN is largest.
int nn_max_rows(const float* x, const int64_t* indices, float* y, int32_t* origin, int64_t B, int64_t M, int64_t N,
                int64_t C, int64_t K, int threads) {
  const Reduce reduce{indices, B, M, N, C, K, threads};
  return reduce.queries([&](int64_t b, int64_t row, const int64_t* taps) {
    const float* sample = x + b * N * C;
    float* best = y + row * C;
    int32_t* at = origin + row * C;
    int64_t c = 0;
    for (; c + VL <= C; c += VL) {
      vf top = load(sample + taps[0] * C + c);
      vi from = static_cast<int32_t>(taps[0]) - vi{};
      for (int64_t k = 1; k < K; ++k) {
        const vf v = load(sample + taps[k] * C + c);
        const vi more = (v > top) | ((v != v) & (top == top));
        top = more ? v : top;
        from = more ? static_cast<int32_t>(taps[k]) - vi{} : from;
      }
      store(best + c, top);
      std::memcpy(at + c, &from, sizeof from);
    }
    for (; c < C; ++c) {
      best[c] = sample[taps[0] * C + c];
      at[c] = static_cast<int32_t>(taps[0]);
      for (int64_t k = 1; k < K; ++k) {
        const float v = sample[taps[k] * C + c];
        if (v > best[c] || (v != v && best[c] == best[c])) {
          best[c] = v;
          at[c] = static_cast<int32_t>(taps[k]);
        }
      }
    }
  });
}

// gx (B, N, C), zeros before: every key gets the gradients of the maxima it made.
int nn_max_rows_backward(const float* gy, const int32_t* origin, float* gx, int64_t B, int64_t M, int64_t N, int64_t C,
                         int threads) {
  const Reduce reduce{nullptr, B, M, N, C, 0, threads};
  return reduce.channels([&](int64_t b, int64_t first, int64_t last) {
    float* sample = gx + b * N * C;
    for (int64_t m = b * M; m < (b + 1) * M; ++m)
      for (int64_t c = first; c < last; ++c) sample[origin[m * C + c] * C + c] += gy[m * C + c];
  });
}

// y (B, M, C): sums over the neighbors.
int nn_sum_rows(const float* x, const int64_t* indices, float* y, int64_t B, int64_t M, int64_t N, int64_t C, int64_t K,
                int threads) {
  const Reduce reduce{indices, B, M, N, C, K, threads};
  return reduce.queries([&](int64_t b, int64_t row, const int64_t* taps) {
    const float* sample = x + b * N * C;
    float* sum = y + row * C;
    std::memcpy(sum, sample + taps[0] * C, C * 4);
    for (int64_t k = 1; k < K; ++k) {
      const float* from = sample + taps[k] * C;
      for (int64_t c = 0; c < C; ++c) sum[c] += from[c];
    }
  });
}

// gx (B, N, C), zeros before: every key gets the gradients of the queries it serves.
int nn_sum_rows_backward(const float* gy, const int64_t* indices, float* gx, int64_t B, int64_t M, int64_t N, int64_t C,
                         int64_t K, int threads) {
  const Reduce reduce{indices, B, M, N, C, K, threads};
  if (!reduce.valid()) return BAD_INDEX;
  return reduce.channels([&](int64_t b, int64_t first, int64_t last) {
    for (int64_t m = b * M; m < (b + 1) * M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        float* to = gx + (b * N + indices[m * K + k]) * C;
        for (int64_t c = first; c < last; ++c) to[c] += gy[m * C + c];
      }
  });
}

}  // extern "C"
