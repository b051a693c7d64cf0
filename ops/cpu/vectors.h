// Vectors of floats in the compiler's own type, so that one source serves AVX-512, AVX and anything else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr int NV = 2, NR = NV * VL;  // a panel is NV vectors wide
constexpr float INF = std::numeric_limits<float>::infinity();

enum Metric { COSINE = 0, EUCLIDEAN = 1, DOT = 2 };  // in the order of ops.METRICS

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }  // x + 0 would cost an addition: it is not x for x = -0
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// sum + a b, in one rounding where the processor has that. Compilers choose by themselves where a chain of sums is
// short: this is for two places whose results must be equal.
inline vf multiply_add(vf a, vf b, vf sum) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_FEATURE_FMA)
  vf out;
  for (int l = 0; l < VL; ++l) out[l] = __builtin_fmaf(a[l], b[l], sum[l]);
  return out;
#else
  return sum + a * b;
#endif
}

// Some neighboring lanes of a vector. A load by them leaves zeros in the others; no other number is read or written.
#if defined(__AVX512F__)
struct Lanes {
  __mmask16 mask;
  Lanes() = default;
  Lanes(int64_t begin, int64_t end) {
    const auto below = [](int64_t n) { return (1u << std::min<int64_t>(n, VL)) - 1; };
    mask = static_cast<__mmask16>(below(end) & ~below(begin));
  }
};
inline vf load(const float* p, Lanes lanes) { return (vf)_mm512_maskz_loadu_ps(lanes.mask, p); }
inline void store(float* p, vf x, Lanes lanes) { _mm512_mask_storeu_ps(p, lanes.mask, (__m512)x); }
#elif defined(__AVX__)
struct Lanes {
  __m256i mask;
  Lanes() = default;
  Lanes(int64_t begin, int64_t end) {
    int32_t lane[VL];
    for (int i = 0; i < VL; ++i) lane[i] = begin <= i && i < end ? -1 : 0;
    std::memcpy(&mask, lane, sizeof mask);
  }
};
inline vf load(const float* p, Lanes lanes) { return (vf)_mm256_maskload_ps(p, lanes.mask); }
inline void store(float* p, vf x, Lanes lanes) { _mm256_maskstore_ps(p, lanes.mask, (__m256)x); }
#else
struct Lanes {
  int64_t begin, end;
  Lanes() = default;
  Lanes(int64_t from, int64_t to) : begin(from), end(std::min<int64_t>(to, VL)) {}
};
inline vf load(const float* p, Lanes lanes) {
  vf x = {};
  for (int64_t i = lanes.begin; i < lanes.end; ++i) x[i] = p[i];
  return x;
}
inline void store(float* p, vf x, Lanes lanes) {
  for (int64_t i = lanes.begin; i < lanes.end; ++i) p[i] = x[i];
}
#endif

#define UNROLL _Pragma("GCC unroll 16")

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float dot(const float* a, const float* b, int64_t n) {
  vf acc = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) acc += load(a + i) * load(b + i);
  float sum = 0;
  for (int l = 0; l < VL; ++l) sum += acc[l];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Whether all of count indices lie in [0, n).
inline bool in_range(const int64_t* index, int64_t count, int64_t n) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < count; ++i) worst = std::max(worst, static_cast<uint64_t>(index[i]));
  return count == 0 || worst < static_cast<uint64_t>(n);
}

struct Buffer {  // 64-byte aligned scratch that only grows within one call
  float* data = nullptr;
  size_t size = 0;
  float* get(size_t n) {
    if (n > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (n * 4 + 127) / 64 * 64));
      if (!data) throw std::bad_alloc();
      size = n;
    }
    return data;
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

// While one lives, a thread counts numbers too small for the usual form as 0: weights die out through them, they are a
// hundred times slower and change nothing.
#if defined(__SSE__)
struct SmallAsZero {
  const unsigned before = _mm_getcsr();
  SmallAsZero() { _mm_setcsr(before | 0x8040); }  // of results and of operands
  SmallAsZero(const SmallAsZero&) = delete;
  ~SmallAsZero() { _mm_setcsr(before); }
};
#else
struct SmallAsZero {};
#endif

}  // namespace
