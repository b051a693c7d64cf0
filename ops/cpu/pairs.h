// Pairs of a query and a key: their cost in float64, the K best so far, and tiles of 8-bit dot products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define ES_VNNI 1
#else
#define ES_VNNI 0
#endif

namespace {

constexpr int kPanel = 48;     // keys per panel: three 16-lane registers
constexpr int kRows = 8;       // queries per micro-kernel call

enum Type { kF32 = 0, kF64 = 1, kU8 = 2, kI8 = 3 };  // in the order of TYPE_CODES in ops/sets/keys.py

// Sums of squared differences (EUCLIDEAN) or of products of two rows, in float64 and 32 lanes: enough independent
// additions to hide their latency.
#if ES_VNNI

inline __m512d load8(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
inline __m512d load8(const double* x) { return _mm512_loadu_pd(x); }
inline __m512d load8(const uint8_t* x) {
  return _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
inline __m512d load8(const int8_t* x) {
  return _mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

template <bool kDifference, class T>
inline double sum_pairs(const T* x, const T* y, int64_t d) {
  __m512d lanes[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
  int64_t c = 0;
  for (; c + 32 <= d; c += 32)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const __m512d a = load8(x + c + 8 * l), b = load8(y + c + 8 * l);
      const __m512d t = _mm512_sub_pd(a, b);
      lanes[l] = kDifference ? _mm512_fmadd_pd(t, t, lanes[l]) : _mm512_fmadd_pd(a, b, lanes[l]);
    }
  for (; c + 8 <= d; c += 8) {
    const __m512d a = load8(x + c), b = load8(y + c), t = _mm512_sub_pd(a, b);
    lanes[0] = kDifference ? _mm512_fmadd_pd(t, t, lanes[0]) : _mm512_fmadd_pd(a, b, lanes[0]);
  }
  double s = _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(lanes[0], lanes[1]), _mm512_add_pd(lanes[2], lanes[3])));
  for (; c < d; ++c) {
    const double a = double(x[c]), b = double(y[c]);
    s += kDifference ? (a - b) * (a - b) : a * b;
  }
  return s;
}

#else

template <bool kDifference, class T>
inline double sum_pairs(const T* x, const T* y, int64_t d) {
  const auto term = [x, y](int64_t c) {
    const double a = double(x[c]), b = double(y[c]);
    return kDifference ? (a - b) * (a - b) : a * b;
  };
  double lanes[32] = {};
  int64_t c = 0;
  for (; c + 32 <= d; c += 32)
    for (int l = 0; l < 32; ++l) lanes[l] += term(c + l);
  double s = 0;
  for (int l = 0; l < 32; ++l) s += lanes[l];
  for (; c < d; ++c) s += term(c);
  return s;
}

#endif

// The same of bytes, in integers: exact.
template <bool kDifference, class T>
inline int64_t sum_bytes(const T* x, const T* y, int64_t d) {
  int64_t sum = 0;
  int64_t c = 0;
#if ES_VNNI
  const auto wide = [](const T* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return std::is_same<T, uint8_t>::value ? _mm512_cvtepu8_epi16(v) : _mm512_cvtepi8_epi16(v);
  };
  while (c + 32 <= d) {
    __m512i lanes[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    const int64_t end = std::min(d, c + 16384);  // a lane's sum stays below 2^31
    for (int l = 0; c + 32 <= end; c += 32, l ^= 1) {
      const __m512i a = wide(x + c), b = wide(y + c), t = _mm512_sub_epi16(a, b);
      lanes[l] = _mm512_dpwssd_epi32(lanes[l], kDifference ? t : a, kDifference ? t : b);
    }
    sum += _mm512_reduce_add_epi32(_mm512_add_epi32(lanes[0], lanes[1]));
  }
#endif
  for (; c < d;) {
    int32_t part = 0;
    const int64_t end = std::min(d, c + 16384);
    for (; c < end; ++c) {
      const int32_t a = x[c], b = y[c];
      part += kDifference ? (a - b) * (a - b) : a * b;
    }
    sum += part;
  }
  return sum;
}

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

#if ES_VNNI

// (8 queries) x (one panel): out[r][j] = start[r] + sum_c keys[c][j] * q[r][c]. Twenty-four accumulators stay in
// registers; they go through memory once at the end (kept apart from the scan, or the compiler spills them inside).
__attribute__((noinline)) void dot_tile(const uint8_t* keys, const int8_t* q, int64_t qstride, int64_t d4,
                                        const int32_t* start, int32_t* out) {
  __m512i acc[kRows][3];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = acc[r][2] = _mm512_set1_epi32(start[r]);
  for (int64_t c = 0; c < d4; ++c) {
    const __m512i k0 = _mm512_loadu_si512(keys), k1 = _mm512_loadu_si512(keys + 64),
                  k2 = _mm512_loadu_si512(keys + 128);
    keys += 4 * kPanel;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t word;
      std::memcpy(&word, q + r * qstride + 4 * c, 4);
      const __m512i b = _mm512_set1_epi32(word);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], k0, b);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], k1, b);
      acc[r][2] = _mm512_dpbusd_epi32(acc[r][2], k2, b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) _mm512_store_si512(out + r * kPanel + v * 16, acc[r][v]);
}

#else

inline void dot_tile(const uint8_t* keys, const int8_t* q, int64_t qstride, int64_t d4, const int32_t* start,
                     int32_t* out) {
  for (int r = 0; r < kRows; ++r) {
    int32_t* sum = out + r * kPanel;
    for (int j = 0; j < kPanel; ++j) sum[j] = start[r];
    for (int64_t c = 0; c < d4; ++c)
      for (int j = 0; j < kPanel; ++j) {
        const uint8_t* k = keys + (c * kPanel + j) * 4;
        const int8_t* v = q + r * qstride + 4 * c;
        sum[j] += k[0] * v[0] + k[1] * v[1] + k[2] * v[2] + k[3] * v[3];
      }
  }
}

#endif

}  // namespace
