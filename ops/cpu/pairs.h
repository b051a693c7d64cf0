// Pairs of a query and a key: their cost in float64, and the K best so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "bytes.h"
#include "vectors.h"

namespace {

enum Type { kF32 = 0, kF64 = 1, kU8 = 2, kI8 = 3 };  // in the order of TYPE_CODES in ops/sets/keys.py

// Sums of squared differences (EUCLIDEAN) or of products of two rows, in float64 and several vectors: enough
// independent additions to hide their latency.
template <bool kDifference, class T>
inline double sum_pairs(const T* x, const T* y, int64_t d) {
  constexpr int kDoubles = VL / 2, kSums = 4;
  typedef double vd __attribute__((vector_size(kDoubles * 8)));
  typedef T vt __attribute__((vector_size(kDoubles * sizeof(T)), aligned(sizeof(T)), may_alias));
  const auto add = [x, y](vd sum, int64_t c) {
    const vd a = __builtin_convertvector(*reinterpret_cast<const vt*>(x + c), vd);
    const vd b = __builtin_convertvector(*reinterpret_cast<const vt*>(y + c), vd);
    const vd t = a - b;
    return sum + (kDifference ? t * t : a * b);
  };
  vd sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kDoubles <= d; c += kSums * kDoubles)
    UNROLL for (int l = 0; l < kSums; ++l) sums[l] = add(sums[l], c + l * kDoubles);
  for (; c + kDoubles <= d; c += kDoubles) sums[0] = add(sums[0], c);
  const vd all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int l = 0; l < kDoubles; ++l) sum += all[l];
  for (; c < d; ++c) {
    const double a = double(x[c]), b = double(y[c]);
    sum += kDifference ? (a - b) * (a - b) : a * b;
  }
  return sum;
}

// Of bytes in integers, which is exact.
template <bool kDifference>
inline double sum_pairs(const uint8_t* x, const uint8_t* y, int64_t d) {
  return double(sum_bytes<kDifference>(x, y, d));
}
template <bool kDifference>
inline double sum_pairs(const int8_t* x, const int8_t* y, int64_t d) {
  return double(sum_bytes<kDifference>(x, y, d));
}

template <class T>
double squared_norm(const T* x, int64_t d) {
  return sum_pairs<false>(x, x, d);
}

float round_up(double v) {
  float f = static_cast<float>(v);
  return f < v ? std::nextafterf(f, INF) : f;
}

// Cost of one pair in float64. For cosine `qnorm` is |x|; a zero vector has similarity 0 to everything.
template <class T>
double exact_cost(const T* x, const T* y, int64_t d, int metric, double qnorm) {
  if (metric == EUCLIDEAN) return sum_pairs<true>(x, y, d);
  const double s = sum_pairs<false>(x, y, d);
  if (metric == DOT) return -s;
  const double n = qnorm * std::sqrt(squared_norm(y, d));
  return n > 0 ? -s / n : 0.0;
}

// Rows of queries and of keys, of one type, and the norms of the queries (for cosine).
struct Pairs {
  const void *queries, *keys;
  int type, metric;
  int64_t d;
  const double* norm;

  template <class T>
  double cost_as(int64_t i, int64_t j) const {
    return exact_cost(static_cast<const T*>(queries) + i * d, static_cast<const T*>(keys) + j * d, d, metric, norm[i]);
  }
  double cost(int64_t i, int64_t j) const {
    switch (type) {
      case kF32: return cost_as<float>(i, j);
      case kF64: return cost_as<double>(i, j);
      case kU8: return cost_as<uint8_t>(i, j);
      default: return cost_as<int8_t>(i, j);
    }
  }
  // Whether the cost of a pair is certainly above `bound`, as float32 can tell: the sum of d squared differences is
  // within (d + 8) 2^-24 of itself, in whatever order it is taken, unless it over- or underflows.
  bool beyond(int64_t i, int64_t j, double bound) const {
    if (type != kF32 || metric != EUCLIDEAN) return false;
    const float *x = static_cast<const float*>(queries) + i * d, *y = static_cast<const float*>(keys) + j * d;
    vf lanes[4] = {};
    int64_t c = 0;
    for (; c + 4 * VL <= d; c += 4 * VL)
      UNROLL for (int l = 0; l < 4; ++l) {
        const vf t = load(x + c + l * VL) - load(y + c + l * VL);
        lanes[l] += t * t;
      }
    lanes[0] += lanes[1];
    lanes[2] += lanes[3];
    lanes[0] += lanes[2];
    float sum = 0;
    for (; c < d; ++c) sum += (x[c] - y[c]) * (x[c] - y[c]);
    for (int l = 0; l < VL; ++l) sum += lanes[0][l];
    return sum < 1e37f && double(sum) * (1 - 6e-8 * double(d + 8)) - 1e-36 > bound;
  }
  void prefetch(int64_t j) const {
    const int64_t bytes = d * (type == kF32 ? 4 : type == kF64 ? 8 : 1);
    const char* p = static_cast<const char*>(keys) + j * bytes;
    for (int64_t b = 0; b < std::min<int64_t>(bytes, 4096); b += 64) __builtin_prefetch(p + b);
  }
};

using Best = std::pair<double, int64_t>;  // (cost, index): the order that puts the lower index first on ties

// Keeps the K best: a heap once there are K.
void offer(std::vector<Best>& heap, size_t K, Best b) {
  if (heap.size() < K) {
    heap.push_back(b);
    if (heap.size() == K) std::make_heap(heap.begin(), heap.end());
  } else if (b < heap.front()) {
    std::pop_heap(heap.begin(), heap.end());
    heap.back() = b;
    std::push_heap(heap.begin(), heap.end());
  }
}

}  // namespace
