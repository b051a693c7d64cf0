// Scores of a query against many keys in 8 bits, with a bound on what that loses: search.cpp finds by them the few keys
// that can be among the best, and scores only those in float32.
//
// A key y becomes low + step u, u in 0 .. 255 with one low and step for a sample; a query x becomes scale q, q in
// -127 .. 127. The products q.u are whole numbers, sums in 32 bits. With d and e what quantising leaves of y and x,
//   x.y = scale step q.u + scale low sum(q) + x.d + e.(y - d),
// the second term is the same for all keys, and the last two are at most |x| |d| + |e| (|y| + |d|).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "vectors.h"

namespace {

// Numbers go in words of 32 bits: GROUP channels of a key, or of a query. Keys come in panels (words, PANEL); a tile
// scores TILE queries against one panel.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int TILE = 8, PANEL = 48, GROUP = 4;
#elif defined(__AVXVNNI__)
constexpr int TILE = 6, PANEL = 16, GROUP = 4;
#elif defined(__AVX2__)
constexpr int TILE = 6, PANEL = 16, GROUP = 2;
#else
constexpr int TILE = 4, PANEL = 16, GROUP = 2;
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) || defined(__AVXVNNI__)
typedef uint8_t KeyNumber;
typedef int8_t QueryNumber;
#else  // products of 16 bits in pairs: 8-bit ones would be cut off at 16 bits here
typedef int16_t KeyNumber;
typedef int16_t QueryNumber;
#endif

// Without such instructions (aarch64 included, for now) the search in float32 is the faster one.
#if defined(__AVX2__)
constexpr bool BYTES_ARE_FAST = true;
#else
constexpr bool BYTES_ARE_FAST = false;
#endif

constexpr int32_t LOWEST = std::numeric_limits<int32_t>::min();
constexpr int32_t PADDING = -(1 << 30);  // the score of a key that is none; those of real ones stay above
constexpr int64_t MOST_CHANNELS = 8192;  // so that sums stay within 2^28, and their bias within 2^29

typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t v8iu __attribute__((vector_size(32), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, v8i{__VA_ARGS__})
#endif

// As multiply_add of vectors.h.
inline v8 multiply_add8(v8 a, v8 b, v8 sum) {
#if defined(__FMA__)
  return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_FEATURE_FMA)
  v8 out;
  for (int l = 0; l < 8; ++l) out[l] = __builtin_fmaf(a[l], b[l], sum[l]);
  return out;
#else
  return sum + a * b;
#endif
}

// Rows become columns.
template <class V>
inline void transpose8(V (&r)[8]) {
  V t[8], u[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = SHUFFLE8(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = SHUFFLE8(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = SHUFFLE8(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = SHUFFLE8(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = SHUFFLE8(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SHUFFLE8(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// scores(TILE, PANEL) = bias + queries keysᵀ over `words`; also updates the lane maxima of each row.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline __attribute__((always_inline)) void products(const int32_t* __restrict queries, const int32_t* __restrict keys,
                                                    int64_t words, const int32_t* bias, __m512i (&acc)[TILE][3]) {
  UNROLL for (int r = 0; r < TILE; ++r) {
    UNROLL for (int v = 0; v < 3; ++v) acc[r][v] = _mm512_loadu_si512(bias + 16 * v);
  }
  for (int64_t w = 0; w < words; ++w, keys += PANEL, ++queries) {
    const __m512i k0 = _mm512_loadu_si512(keys), k1 = _mm512_loadu_si512(keys + 16), k2 = _mm512_loadu_si512(keys + 32);
    // As intrinsics, GCC 12 keeps some of the 24 sums in memory.
    UNROLL for (int r = 0; r < TILE; ++r) {
      const __m512i q = _mm512_set1_epi32(queries[r * words]);
      asm("vpdpbusd %1, %2, %0" : "+v"(acc[r][0]) : "v"(q), "v"(k0));
      asm("vpdpbusd %1, %2, %0" : "+v"(acc[r][1]) : "v"(q), "v"(k1));
      asm("vpdpbusd %1, %2, %0" : "+v"(acc[r][2]) : "v"(q), "v"(k2));
    }
  }
}

__attribute__((noinline)) void score_bytes(const int32_t* __restrict queries, const int32_t* __restrict keys,
                                           int64_t words, const int32_t* bias, int32_t* scores, int64_t ld,
                                           int32_t* lanes, int64_t lane_ld) {
  __m512i acc[TILE][3];
  products(queries, keys, words, bias, acc);
  UNROLL for (int r = 0; r < TILE; ++r) {
    UNROLL for (int v = 0; v < 3; ++v) {
      int32_t* most = lanes + r * lane_ld + 16 * v;
      _mm512_storeu_si512(scores + r * ld + 16 * v, acc[r][v]);
      _mm512_storeu_si512(most, _mm512_max_epi32(acc[r][v], _mm512_loadu_si512(most)));
    }
  }
}

// Only which scores are at least their row's floor: a bit each, row r from bits + r ld on.
__attribute__((noinline)) void compare_bytes(const int32_t* __restrict queries, const int32_t* __restrict keys,
                                             int64_t words, const int32_t* bias, const int32_t* floors, uint16_t* bits,
                                             int64_t ld) {
  __m512i acc[TILE][3];
  products(queries, keys, words, bias, acc);
  UNROLL for (int r = 0; r < TILE; ++r) {
    const __m512i floor = _mm512_set1_epi32(floors[r]);
    UNROLL for (int v = 0; v < 3; ++v) bits[r * ld + v] = _mm512_cmpge_epi32_mask(acc[r][v], floor);
  }
}
constexpr bool COMPARES = true;
#elif defined(__AVX2__)
inline __m256i add_products(__m256i sum, __m256i keys, __m256i queries) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, keys, queries);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(keys, queries));
#endif
}

__attribute__((noinline)) void score_bytes(const int32_t* __restrict queries, const int32_t* __restrict keys,
                                           int64_t words, const int32_t* bias, int32_t* scores, int64_t ld,
                                           int32_t* lanes, int64_t lane_ld) {
  const auto load8 = [](const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const auto store8 = [](int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); };
  __m256i acc[TILE][2];
  UNROLL for (int r = 0; r < TILE; ++r) acc[r][0] = load8(bias), acc[r][1] = load8(bias + 8);
  for (int64_t w = 0; w < words; ++w, keys += PANEL, ++queries) {
    const __m256i k0 = load8(keys), k1 = load8(keys + 8);
    UNROLL for (int r = 0; r < TILE; ++r) {
      const __m256i q = _mm256_set1_epi32(queries[r * words]);
      acc[r][0] = add_products(acc[r][0], k0, q);
      acc[r][1] = add_products(acc[r][1], k1, q);
    }
  }
  UNROLL for (int r = 0; r < TILE; ++r) {
    UNROLL for (int v = 0; v < 2; ++v) {
      int32_t* most = lanes + r * lane_ld + 8 * v;
      store8(scores + r * ld + 8 * v, acc[r][v]);
      store8(most, _mm256_max_epi32(acc[r][v], load8(most)));
    }
  }
}
#else
void score_bytes(const int32_t* __restrict queries, const int32_t* __restrict keys, int64_t words, const int32_t* bias,
                 int32_t* scores, int64_t ld, int32_t* lanes, int64_t lane_ld) {
  for (int r = 0; r < TILE; ++r) {
    int32_t acc[PANEL];
    std::memcpy(acc, bias, sizeof acc);
    for (int64_t w = 0; w < words; ++w) {
      QueryNumber q[GROUP];
      KeyNumber k[GROUP * PANEL];
      std::memcpy(q, queries + r * words + w, sizeof q);
      std::memcpy(k, keys + w * PANEL, sizeof k);
      for (int j = 0; j < PANEL; ++j) acc[j] += int32_t(q[0]) * k[2 * j] + int32_t(q[1]) * k[2 * j + 1];
    }
    for (int j = 0; j < PANEL; ++j) {
      scores[r * ld + j] = acc[j];
      lanes[r * lane_ld + j] = std::max(acc[j], lanes[r * lane_ld + j]);
    }
  }
}
#endif

#if !(defined(__AVX512VNNI__) && defined(__AVX512BW__))
constexpr bool COMPARES = false;
inline void compare_bytes(const int32_t*, const int32_t*, int64_t, const int32_t*, const int32_t*, uint16_t*, int64_t) {}
#endif

// Which of n scores (a multiple of 16) are at least `floor`. `bits` has room for n bits.
inline void compare(const int32_t* s, int64_t n, int32_t floor, uint64_t* bits) {
  uint16_t* part = reinterpret_cast<uint16_t*>(bits);
  int64_t parts = 0;
#if defined(__AVX512F__)
  const __m512i t = _mm512_set1_epi32(floor);
  for (; parts < n / 16; ++parts) part[parts] = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(s + 16 * parts), t);
#elif defined(__AVX2__)
  const __m256i t = _mm256_set1_epi32(floor - 1);
  const auto above = [&](const int32_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, t)));
  };
  for (; parts < n / 16; ++parts) part[parts] = uint16_t(above(s + 16 * parts) | above(s + 16 * parts + 8) << 8);
#else
  for (; parts < n / 16; ++parts) {
    unsigned word = 0;
    for (int j = 0; j < 16; ++j) word |= unsigned(s[16 * parts + j] >= floor) << j;
    part[parts] = uint16_t(word);
  }
#endif
}

// The places of n bits that are set: their count. There is room for 512 bits more, which are overwritten.
inline int survivors(uint64_t* bits, int64_t n, int32_t* where) {
  std::memset(reinterpret_cast<uint16_t*>(bits) + n / 16, 0, 64);
  int count = 0;
  const int64_t words = (n / 16 + 3) / 4;
  for (int64_t w0 = 0; w0 < words; w0 += 64) {
    uint64_t some = 0;  // which words have any: a loop over those alone has little to mispredict
    for (int64_t w = w0; w < std::min(words, w0 + 64); w += 8) {
#if defined(__AVX512F__)
      const uint64_t eight = _mm512_test_epi64_mask(_mm512_loadu_si512(bits + w), _mm512_loadu_si512(bits + w));
#else
      uint64_t eight = 0;
      for (int i = 0; i < 8; ++i) eight |= uint64_t(bits[w + i] != 0) << i;
#endif
      some |= eight << (w - w0);
    }
    for (; some; some &= some - 1) {
      const int64_t w = w0 + __builtin_ctzll(some);
      uint64_t word = bits[w];
      do {
        where[count++] = static_cast<int32_t>(64 * w) + __builtin_ctzll(word);
      } while (word &= word - 1);
    }
  }
  return count;
}

// The `rank`-th and the following largest of each of 8 rows of n lanes (n a multiple of 8), by N registers.
template <int N>
inline void kth_of_rows(const int32_t* const* rows, int n, int rank, v8i& kth, v8i& next) {
  v8i best[N];
  UNROLL for (int k = 0; k < N; ++k) best[k] = v8i{} + LOWEST;
  for (int i = 0; i < n; i += 8) {
    v8i column[8];
    UNROLL for (int r = 0; r < 8; ++r) column[r] = *reinterpret_cast<const v8iu*>(rows[r] + i);
    transpose8(column);
    UNROLL for (int c = 0; c < 8; ++c) {
      v8i v = column[c];
      UNROLL for (int k = 0; k < N; ++k) {
        const v8i more = best[k] > v ? best[k] : v;
        v = best[k] > v ? v : best[k];
        best[k] = more;
      }
    }
  }
  kth = best[rank - 1];
  next = best[rank];
}

// A number that at least `rank` of n lanes reach, less than `slack` below the largest such one.
inline int32_t about_kth(const int32_t* lanes, int n, int rank, int32_t slack) {
  int32_t low = lanes[0], high = lanes[0];
  for (int i = 1; i < n; ++i) low = std::min(low, lanes[i]), high = std::max(high, lanes[i]);
  if (rank > n) return LOWEST;
  while (int64_t(high) - low > slack) {
    const int32_t middle = static_cast<int32_t>((int64_t(low) + high + 1) >> 1);
    int reach = 0;
    for (int i = 0; i < n; ++i) reach += lanes[i] >= middle;
    if (reach >= rank) low = middle;
    else high = middle - 1;
  }
  return low;
}

inline int byte_lanes(int K) { return static_cast<int>(ceil_div(2 * K + 2, PANEL)) * PANEL; }

// The sum of all lanes, in no particular order.
inline float sum_of(vf v) {
  float part[4] = {};
  UNROLL for (int l = 0; l < VL; ++l) part[l % 4] += v[l];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// What quantising a row gave: the sum of its numbers, and the length of what it left.
struct Quantised {
  int64_t sum;
  float left;
};

// out = round((x factor - low) / step) kept in [least, most]. All numbers in float32; `left` is what those miss.
template <class T>
inline Quantised quantise(const float* x, float factor, int64_t C, float low, float step, int least, int most, T* out) {
  typedef T vt __attribute__((vector_size(VL * sizeof(T))));
  typedef T vtu __attribute__((vector_size(VL * sizeof(T)), aligned(1), may_alias));
  const float inverse = 1.f / step, shift = 0.5f - least;  // whole numbers from 0 on: cutting off rounds
  vf left = {};
  vi sum = {};
  const auto some = [&](vf v) {
    vf t = (v * factor - low) * inverse + shift;
    t = t < 0.f ? vf{} : t;
    vi n = __builtin_convertvector(t, vi) + least;
    n = n > most ? vi{} + most : n;
    const vf rest = v * factor - low - __builtin_convertvector(n, vf) * step;
    left += rest * rest;
    sum += n;
    return n;
  };
  int64_t c = 0;
  for (; c + VL <= C; c += VL) *reinterpret_cast<vtu*>(out + c) = __builtin_convertvector(some(load(x + c)), vt);
  float squares = sum_of(left);
  int64_t total = 0;
  for (int l = 0; l < VL; ++l) total += sum[l];
  if (c < C) {
    vf tail = splat(0.f);
    for (int64_t l = 0; c + l < C; ++l) tail[l] = x[c + l];
    left = vf{}, sum = vi{};
    const vi n = some(tail);
    for (int64_t l = 0; c + l < C; ++l) {
      const float rest = tail[l] * factor - low - static_cast<float>(n[l]) * step;
      out[c + l] = static_cast<T>(n[l]), squares += rest * rest, total += n[l];
    }
  }
  return {total, std::sqrt(squares)};
}

// The float32 scores of 8 W keys as score_tile computes them: channel by channel in one sum, then the bias.
template <bool kScaled, int W>
inline void exact_block(const float* x, const float* const* rows, const float* scales, const float* biases, int64_t C,
                        float* out) {
  v8 scale[W], acc[W];
  UNROLL for (int w = 0; w < W; ++w) {
    acc[w] = v8{};
    scale[w] = *reinterpret_cast<const v8u*>(scales + 8 * w);
  }
  int64_t c = 0;
  for (; c + 8 <= C; c += 8) {
    UNROLL for (int w = 0; w < W; ++w) {
      v8 column[8];
      UNROLL for (int r = 0; r < 8; ++r) column[r] = *reinterpret_cast<const v8u*>(rows[8 * w + r] + c);
      transpose8(column);
      UNROLL for (int j = 0; j < 8; ++j)
        acc[w] = multiply_add8(x[c + j] - v8{}, kScaled ? column[j] * scale[w] : column[j], acc[w]);
    }
  }
  for (; c < C; ++c) {
    UNROLL for (int w = 0; w < W; ++w) {
      v8 y;
      UNROLL for (int j = 0; j < 8; ++j) y[j] = rows[8 * w + j][c];
      acc[w] = multiply_add8(x[c] - v8{}, kScaled ? y * scale[w] : y, acc[w]);
    }
  }
  UNROLL for (int w = 0; w < W; ++w)
    *reinterpret_cast<v8u*>(out + 8 * w) = acc[w] + *reinterpret_cast<const v8u*>(biases + 8 * w);
}

// The same for `count` keys, a multiple of 8: several sums at a time hide their latency.
template <bool kScaled>
void exact_scores(const float* x, const float* const* rows, const float* scales, const float* biases, int64_t C,
                  int count, float* out) {
  for (int i = 0; i < count;) {
    const auto some = [&](auto width) {
      exact_block<kScaled, width()>(x, rows + i, scales + i, biases + i, C, out + i);
      i += 8 * width();
    };
    if (count - i >= 32) some(std::integral_constant<int, 4>());
    else if (count - i == 24) some(std::integral_constant<int, 3>());
    else if (count - i == 16) some(std::integral_constant<int, 2>());
    else some(std::integral_constant<int, 1>());
  }
}

}  // namespace
