// The K best of rows of scores that come piece by piece: a row's sorted list, updated with what passes its last place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

struct Scratch {
  Buffer copy, scores, lanes, values, sorted;
  std::vector<int32_t> where, order;
};

// Values above `floor`, in index order: count of those written to (values, where).
inline int collect(const float* s, int n, float floor, float* values, int32_t* where) {
  int count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 t = _mm512_set1_ps(floor);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i step = _mm512_set1_epi32(16);
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(s + i);
    const __mmask16 hit = _mm512_cmp_ps_mask(v, t, _CMP_GT_OQ);
    if (hit) {
      // Compress in registers and store whole vectors: compressing stores are slow on some processors.
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(hit, v));
      _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(hit, at));
      count += __builtin_popcount(hit);
    }
    at = _mm512_add_epi32(at, step);
  }
#elif defined(__AVX__)
  const __m256 t = _mm256_set1_ps(floor);
  for (; i + 8 <= n; i += 8) {
    unsigned hit = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + i), t, _CMP_GT_OQ));
    for (; hit; hit &= hit - 1) {
      const int j = i + __builtin_ctz(hit);
      values[count] = s[j];
      where[count++] = j;
    }
  }
#endif
  for (; i < n; ++i) {
    values[count] = s[i];
    where[count] = i;
    count += s[i] > floor;
  }
  return count;
}

// Where x first stands from place i on; n if nowhere.
inline int find_equal(const float* s, int i, int n, float x) {
#if defined(__AVX512F__)
  for (const __m512 all = _mm512_set1_ps(x); i + 16 <= n; i += 16)
    if (const __mmask16 hit = _mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), all, _CMP_EQ_OQ)) return i + __builtin_ctz(hit);
#elif defined(__AVX__)
  for (const __m256 all = _mm256_set1_ps(x); i + 8 <= n; i += 8)
    if (const int hit = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + i), all, _CMP_EQ_OQ)))
      return i + __builtin_ctz(hit);
#endif
  while (i < n && s[i] != x) ++i;
  return i;
}

// What can be among the K best of n scores, if as many reach `floor`: all above it, then the first that equal it. (Maps
// with a plain background have hundreds of equal scores a row.)
inline int collect_best(const float* s, int n, float floor, int K, float* values, int32_t* where) {
  int count = collect(s, n, floor, values, where);
  for (int i = -1; count < K && (i = find_equal(s, i + 1, n, floor)) < n; ++count) values[count] = floor, where[count] = i;
  return count;
}

// The K-th largest of n numbers (n a multiple of VL); -inf if there are fewer than K.
inline float kth_largest(const float* x, int n, int K, Buffer& copy) {
  if (K > n) return -INF;
  if (n <= 8 * VL) {  // count for each how many are greater: no branches to mispredict
    vf best = splat(INF);
    for (int i = 0; i < n; i += VL) {
      const vf v = load(x + i);
      vi greater = {};
      for (int j = 0; j < n; ++j) greater -= (splat(x[j]) > v);
      best = (greater < K) & (v < best) ? v : best;
    }
    float out = best[0];
    for (int i = 1; i < VL; ++i) out = std::min(out, best[i]);
    return out;
  }
  float* y = copy.get(n);
  std::memcpy(y, x, n * 4);
  std::nth_element(y, y + K - 1, y + n, std::greater<float>());
  return y[K - 1];
}

inline int lane_count(int K) { return static_cast<int>(ceil_div(2 * K + 2, NR)) * NR; }

// Merge the `count` collected (value, index) pairs, equal values in index order, into the sorted list of a row.
void merge(int count, int K, int64_t base, const int64_t* names, Scratch& w, float* best, int64_t* index) {
  float* v = w.values.data;
  int32_t* at = w.where.data();
  float* sorted = w.sorted.get(std::max(count, K) + 2 * VL);
  if (w.order.size() < static_cast<size_t>(std::max(count, K) + 2 * VL)) w.order.resize(std::max(count, K) + 2 * VL);
  int32_t* order = w.order.data();
  const int take = std::min(count, K);
  if (count <= 8 * VL) {  // rank = how many come before; equal values in index order
    vi lane;
    for (int i = 0; i < VL; ++i) lane[i] = i;
    for (int i = count; i % VL; ++i) v[i] = -INF;
    for (int i = 0; i < count; i += VL) {
      const vf mine = load(v + i);
      vi rank = {};
      for (int j = 0; j < count; ++j) {
        const vf other = splat(v[j]);
        rank -= (other > mine) | ((other == mine) & (lane > j - i));
      }
      UNROLL for (int l = 0; l < VL; ++l) {  // what comes after the last place, and fillings, end up behind it
        sorted[rank[l]] = mine[l];
        order[rank[l]] = at[i + l];
      }
    }
  } else {
    std::vector<std::pair<float, int32_t>> pairs(count);
    for (int i = 0; i < count; ++i) pairs[i] = {v[i], at[i]};
    std::partial_sort(pairs.begin(), pairs.begin() + take, pairs.end(), [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    for (int i = 0; i < take; ++i) sorted[i] = pairs[i].first, order[i] = pairs[i].second;
  }
  auto name = [&](int32_t j) { return names ? names[base + j] : base + j; };
  if (index[0] < 0) {  // nothing found so far
    for (int i = 0; i < take; ++i) best[i] = sorted[i], index[i] = name(order[i]);
    return;
  }
  // Both lists are sorted; the old one wins ties. Count how many of the new survive, then merge from the back.
  int fresh = 0, kept = 0;
  for (int i = 0; i < K; ++i) {
    const bool old_left = kept < K && index[kept] >= 0;
    if (fresh < take && (!old_left || sorted[fresh] > best[kept])) ++fresh;
    else if (old_left) ++kept;
    else break;
  }
  for (int i = kept + fresh - 1, o = kept - 1, f = fresh - 1; f >= 0; --i) {
    if (o >= 0 && best[o] < sorted[f]) {
      best[i] = best[o], index[i] = index[o--];
    } else {
      best[i] = sorted[f], index[i] = name(order[f--]);
    }
  }
}

// Update a row's sorted list with n scores whose lane maxima are known. `spare` more lanes are asked for when an
// entry counted in the maxima has been masked out of the scores since.
inline void update_row(const float* s, int n, const float* lanes, int num_lanes, int K, int spare, int64_t base,
                       const int64_t* names, Scratch& w, float* best, int64_t* index) {
  float floor = kth_largest(lanes, num_lanes, K + spare, w.copy);
  if (spare) floor = std::max(floor, -std::numeric_limits<float>::max());  // not what is masked out
  if (index[K - 1] >= 0) {
    vf top = load(lanes);
    for (int i = VL; i < num_lanes; i += VL) top = vmax(load(lanes + i), top);
    float most = top[0];
    for (int i = 1; i < VL; ++i) most = std::max(most, top[i]);
    if (!(most > best[K - 1])) return;
    floor = std::max(floor, std::nextafter(best[K - 1], INF));
  }
  w.values.get(n + 2 * VL);
  if (w.where.size() < static_cast<size_t>(n + 2 * VL)) w.where.resize(n + 2 * VL);
  const int count = collect_best(s, n, floor, K, w.values.data, w.where.data());
  if (count) merge(count, K, base, names, w, best, index);
}

// Rows with NaN can end with empty places: give them the lowest unused indices, so that every index is valid.
inline void fill_row(int64_t n, int K, int64_t skip, const int64_t* names, float* best, int64_t* index) {
  int found = K;
  while (found > 0 && index[found - 1] < 0) --found;
  for (int64_t j = 0; found < K && j < n; ++j) {
    const int64_t name = names ? names[j] : j;
    if (name == skip || std::find(index, index + found, name) != index + found) continue;
    best[found] = std::numeric_limits<float>::quiet_NaN();
    index[found++] = name;
  }
}

}  // namespace
