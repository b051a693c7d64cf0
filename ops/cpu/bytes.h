// Products of bytes with sums in 32 bits, by what the processor has for them.
//
// Keys come in panels of 48, words of four bytes of a key side by side: (words, 48). They are unsigned, queries signed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

// Four products and their sum in one instruction, of any bytes ...
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) || defined(__AVXVNNI__) && !defined(__AVX512F__)
#define ES_VNNI 1
#else
#define ES_VNNI 0
#endif
// ... or two products and their sum in 16 bits, of bytes small enough for that.
#if defined(__AVX512BW__) || defined(__AVX2__) && !defined(__AVX512F__)
#define ES_AVX2 1
#else
#define ES_AVX2 0
#endif

namespace {

// Whole rows in 8 bits instead of float32: without VNNI hardly faster. Sketches, which are short: any AVX2 will do.
constexpr bool WHOLE_ROWS_ARE_FAST = ES_VNNI, SKETCHES_ARE_FAST = ES_VNNI || ES_AVX2;

constexpr int kPanel = 48;                 // keys per panel: three 16-lane registers, or six of 8 lanes
constexpr int kRows = VL == 16 ? 8 : 4;    // queries per call of a tile

typedef int32_t viu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

inline vi load(const int32_t* p) { return *reinterpret_cast<const viu*>(p); }
inline void store(int32_t* p, vi v) { *reinterpret_cast<viu*>(p) = v; }

// A bit for every lane of a that is at most that of b.
inline uint32_t at_most(vi a, vi b) {
#if defined(__AVX512F__)
  return _mm512_cmple_epi32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return ~_mm256_movemask_ps((__m256)(a > b)) & 0xff;
#else
  uint32_t bits = 0;
  for (int l = 0; l < VL; ++l) bits |= uint32_t(a[l] <= b[l]) << l;
  return bits;
#endif
}
inline uint32_t at_most(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ));
#else
  uint32_t bits = 0;
  for (int l = 0; l < VL; ++l) bits |= uint32_t(a[l] <= b[l]) << l;
  return bits;
#endif
}

// How a tile multiplies. kWords words of a key meet those of a query in one add(); numbers of queries lie in
// -kMost ... kMost, of keys in 0 ... 2 kMost + 1. kWide registers of keys are taken at once.
#if ES_VNNI

struct Whole {
  static constexpr int kMost = 127, kWords = 1, kWide = 3;
  static inline vi add(vi sum, const vi* keys, const vi* query) {
#if defined(__AVX512F__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)keys[0], (__m512i)query[0]);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)keys[0], (__m256i)query[0]);
#endif
  }
};
using Small = Whole;

#else

struct Whole {  // in plain code: right everywhere, fast nowhere
  static constexpr int kMost = 127, kWords = 1, kWide = 1;
  static inline vi add(vi sum, const vi* keys, const vi* query) {
    typedef uint32_t vu __attribute__((vector_size(VL * 4)));
    const vu k = (vu)keys[0];
    const vi q = query[0];
    sum += (vi)(k & 255) * (q << 24 >> 24) + (vi)(k >> 8 & 255) * (q << 16 >> 24);
    return sum + (vi)(k >> 16 & 255) * (q << 8 >> 24) + (vi)(k >> 24) * (q >> 24);
  }
};

#if ES_AVX2

struct Small {  // 2 words x 2 products of at most 127 x 63: below 2^15
  static constexpr int kMost = 63, kWords = 2, kWide = VL == 16 ? 1 : 2;
  static inline vi add(vi sum, const vi* keys, const vi* query) {
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)keys[0], (__m512i)query[0]),
                                           _mm512_maddubs_epi16((__m512i)keys[1], (__m512i)query[1]));
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)keys[0], (__m256i)query[0]),
                                           _mm256_maddubs_epi16((__m256i)keys[1], (__m256i)query[1]));
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
  }
};

#else
using Small = Whole;
#endif
#endif

// Sums of kRows queries and kWide registers of keys over `words`, a multiple of Product::kWords: acc[r][v] becomes
// start[r] + sum of keys[.][v] * q[r][.]. Queries are qstride bytes apart.
template <class Product>
inline __attribute__((always_inline)) void sum_words(const uint8_t* keys, const int8_t* q, int64_t qstride,
                                                     int64_t words, const int32_t* start,
                                                     vi (&acc)[kRows][Product::kWide]) {
  constexpr int kWords = Product::kWords, kWide = Product::kWide;
  static_assert(kPanel % (kWide * VL) == 0, "a panel is whole steps");
  UNROLL for (int r = 0; r < kRows; ++r)
    UNROLL for (int v = 0; v < kWide; ++v) acc[r][v] = vi{} + start[r];
  for (int64_t c = 0; c < words; c += kWords, keys += 4 * kPanel * kWords) {
    vi key[kWide][kWords];
    UNROLL for (int v = 0; v < kWide; ++v)
      UNROLL for (int w = 0; w < kWords; ++w) std::memcpy(&key[v][w], keys + 4 * (kPanel * w + VL * v), sizeof(vi));
    UNROLL for (int r = 0; r < kRows; ++r) {
      vi query[kWords];
      UNROLL for (int w = 0; w < kWords; ++w) {
        int32_t word;
        std::memcpy(&word, q + r * qstride + 4 * (c + w), 4);
        query[w] = vi{} + word;
      }
      UNROLL for (int v = 0; v < kWide; ++v) acc[r][v] = Product::add(acc[r][v], key[v], query);
    }
  }
}

// (kRows queries) x (one panel): out[r][j] = start[r] + keys[j].q[r]. Sums stay in registers; they go through memory once
// at the end (kept apart from the scan, or the compiler spills them inside).
template <class Product>
__attribute__((noinline)) void dot_tile(const uint8_t* keys, const int8_t* q, int64_t qstride, int64_t words,
                                        const int32_t* start, int32_t* out) {
  for (int j = 0; j < kPanel; j += Product::kWide * VL) {
    vi acc[kRows][Product::kWide];
    sum_words<Product>(keys + 4 * j, q, qstride, words, start, acc);
    UNROLL for (int r = 0; r < kRows; ++r)
      UNROLL for (int v = 0; v < Product::kWide; ++v) store(out + r * kPanel + j + VL * v, acc[r][v]);
  }
}

// The same, as out[r][j] = squares[j] - 2 (start[r] + keys[j].q[r]); hit[r] gets a bit for every j where that is at most
// limit[r].
template <class Product>
__attribute__((noinline)) void near_tile(const uint8_t* keys, const int8_t* q, int64_t qstride, int64_t words,
                                         const int32_t* start, const int32_t* squares, const int32_t* limit,
                                         int32_t* out, uint64_t* hit) {
  for (int r = 0; r < kRows; ++r) hit[r] = 0;
  for (int j = 0; j < kPanel; j += Product::kWide * VL) {
    vi acc[kRows][Product::kWide];
    sum_words<Product>(keys + 4 * j, q, qstride, words, start, acc);
    UNROLL for (int r = 0; r < kRows; ++r)
      UNROLL for (int v = 0; v < Product::kWide; ++v) {
        const vi score = load(squares + j + VL * v) - 2 * acc[r][v];
        store(out + r * kPanel + j + VL * v, score);
        hit[r] |= uint64_t(at_most(score, vi{} + limit[r])) << (j + VL * v);
      }
  }
}

#if ES_AVX2
// 2 VL bytes as numbers of 16 bits (compilers take such a conversion apart into halves).
typedef int16_t vs __attribute__((vector_size(VL * 4)));
#if defined(__AVX512F__)
inline vs widen(const uint8_t* p) { return (vs)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i_u*)p)); }
inline vs widen(const int8_t* p) { return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i_u*)p)); }
#else
inline vs widen(const uint8_t* p) { return (vs)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i_u*)p)); }
inline vs widen(const int8_t* p) { return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i_u*)p)); }
#endif
#endif

// The sum of squared differences, or of products, of two rows of bytes of the same type.
template <bool kDifference, class T>
inline int64_t sum_bytes(const T* x, const T* y, int64_t d) {
  int64_t sum = 0;
  int64_t c = 0;
#if ES_AVX2
  const auto add = [x, y](vi s, int64_t at) {
    const vs a = widen(x + at), b = widen(y + at);
    const vs t = kDifference ? a - b : a, u = kDifference ? t : b;
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)s, (__m512i)t, (__m512i)u);
#elif defined(__AVX512F__)
    return s + (vi)_mm512_madd_epi16((__m512i)t, (__m512i)u);
#else
    return s + (vi)_mm256_madd_epi16((__m256i)t, (__m256i)u);
#endif
  };
  while (c + 2 * VL <= d) {
    vi sums[2] = {};
    const int64_t end = std::min(d, c + 16384);  // a lane's sum stays below 2^31
    for (; c + 4 * VL <= end; c += 4 * VL) sums[0] = add(sums[0], c), sums[1] = add(sums[1], c + 2 * VL);
    for (; c + 2 * VL <= end; c += 2 * VL) sums[0] = add(sums[0], c);
    sums[0] += sums[1];
    int64_t part = 0;
    for (int l = 0; l < VL; ++l) part += sums[0][l];
    sum += part;
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

}  // namespace
