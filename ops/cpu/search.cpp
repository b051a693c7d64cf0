// Neighbor search and aggregation for float32 tensors on a CPU.
//
// Plain C entry points (loaded by ctypes, no torch headers: it compiles in seconds). Nothing here allocates results;
// every function works on contiguous row-major arrays handed in by ops/maps and ops/topk.py, which also hold the PyTorch
// path that gives the same answers. Symbols: B batch, M queries, N keys, C channels, K neighbors, O outputs.
//
// Matrix products are register tiles of MR rows by NV vectors, written with the compiler's vector type so that one
// source serves AVX-512, AVX2 and anything else.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "threads.h"

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, SEARCH_ROWS = 14, GATHER_ROWS = 12;
#elif defined(__AVX2__)
constexpr int VL = 8, SEARCH_ROWS = 6, GATHER_ROWS = 6;
#else
constexpr int VL = 4, SEARCH_ROWS = 4, GATHER_ROWS = 4;
#endif
constexpr int NV = 2, NR = NV * VL;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }  // x + 0 would cost an addition: it is not x for x = -0
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- memory and threads

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

// Run work(slot) on up to `threads` threads, slot = 0 .. threads-1, each exactly once.
template <class F>
void run_threads(int threads, F&& work) {
  std::atomic<int> next{0};
  const bool done = on_threads(threads, [&] {
    for (int slot; (slot = next.fetch_add(1)) < std::max(threads, 1);) work(slot);
  });
  if (!done) throw std::bad_alloc();
}

// Tasks 0 .. count-1 handed out one by one; make() builds a thread's scratch space.
template <class Make, class F>
void run_tasks(int threads, int64_t count, Make&& make, F&& work) {
  std::atomic<int64_t> next{0};
  run_threads(static_cast<int>(std::min<int64_t>(threads, count)), [&](int) {
    auto scratch = make();
    for (int64_t task; (task = next.fetch_add(1)) < count;) work(task, *scratch);
  });
}

// ---------------------------------------------------------------- top-K of a row

struct Scratch {
  Buffer copy, scores, lanes, values, sorted;
  std::vector<int32_t> where, order;
};

// Values at least `floor`, in index order: count of those written to (values, where).
inline int collect(const float* s, int n, float floor, float* values, int32_t* where) {
  int count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 t = _mm512_set1_ps(floor);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i step = _mm512_set1_epi32(16);
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(s + i);
    const __mmask16 hit = _mm512_cmp_ps_mask(v, t, _CMP_GE_OQ);
    if (hit) {
      // Compress in registers and store whole vectors: compressing stores are slow on some processors.
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(hit, v));
      _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(hit, at));
      count += __builtin_popcount(hit);
    }
    at = _mm512_add_epi32(at, step);
  }
#elif defined(__AVX2__)
  const __m256 t = _mm256_set1_ps(floor);
  for (; i + 8 <= n; i += 8) {
    unsigned hit = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + i), t, _CMP_GE_OQ));
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
    count += s[i] >= floor;
  }
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

// Merge the `count` collected (value, index) pairs, in index order, into the sorted list of a row.
void merge(int count, int K, int64_t base, const int64_t* names, Scratch& w, float* best, int64_t* index) {
  float* v = w.values.data;
  int32_t* at = w.where.data();
  float* sorted = w.sorted.get(K + VL);
  w.order.resize(K + VL);
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
      const int end = std::min(VL, count - i);
      for (int l = 0; l < end; ++l)
        if (rank[l] < take) {
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
  const int count = collect(s, n, floor, w.values.data, w.where.data());
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

// ---------------------------------------------------------------- register tiles

#define UNROLL _Pragma("GCC unroll 16")

// scores(MR, NR) = bias + A Bᵀ with A packed (C, MR) and B packed (C, NR); also updates each row's lane maxima.
template <int MR>
void score_tile(const float* __restrict a, const float* __restrict b, int C, const float* bias, float* scores,
                int64_t ld, float* lanes, int64_t lane_ld) {
  vf acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
  }
  for (int c = 0; c < C; ++c, a += MR, b += NR) {
    const vf b0 = load(b), b1 = load(b + VL);
    UNROLL for (int i = 0; i < MR; ++i) {
      const vf x = splat(a[i]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  const vf bias0 = load(bias), bias1 = load(bias + VL);
  UNROLL for (int i = 0; i < MR; ++i) {
    const vf s0 = acc[i][0] + bias0, s1 = acc[i][1] + bias1;
    store(scores + i * ld, s0);
    store(scores + i * ld + VL, s1);
    store(lanes + i * lane_ld, vmax(s0, load(lanes + i * lane_ld)));
    store(lanes + i * lane_ld + VL, vmax(s1, load(lanes + i * lane_ld + VL)));
  }
}

// acc(MR, width) += rows · b, rows given by pointers, b packed (C, NW * VL).
template <int MR, int NW>
inline void row_product(const float* const* rows, const float* __restrict b, int C, vf (&acc)[MR][NW]) {
  const float* r[MR];
  UNROLL for (int i = 0; i < MR; ++i) r[i] = rows[i];
  for (int64_t c = 0; c < C; ++c, b += NW * VL) {
    vf y[NW];
    UNROLL for (int j = 0; j < NW; ++j) y[j] = load(b + j * VL);
    UNROLL for (int i = 0; i < MR; ++i) {
      const vf x = splat(r[i][c]);
      UNROLL for (int j = 0; j < NW; ++j) acc[i][j] += x * y[j];
    }
  }
}

inline void store_some(float* p, const vf* v, int width) {
  alignas(64) float tmp[NR];
  for (int j = 0; j * VL < width; ++j) store(tmp + j * VL, v[j]);
  std::memcpy(p, tmp, width * 4);
}

// Matrices src[k] (rows, width) as panels of NR columns (the last one of VL where that is enough), zero-filled; a
// panel holds its columns of src[0], src[1], ... one after the other. Element (k, r, c) is src[k sk + r sr + c sc].
struct Panels {
  int64_t K, rows;
  int width, count;
  Buffer buffer;
  Panels(const float* src, int64_t K, int64_t sk, int64_t rows, int64_t sr, int width, int64_t sc)
      : K(K), rows(rows), width(width), count(static_cast<int>(ceil_div(width, NR))) {
    buffer.get(static_cast<size_t>(K * rows) * count * NR);
    for (int p = 0; p < count; ++p) {
      const int cols = columns(p), padded = vectors(p) * VL;
      float* to = buffer.data + p * K * rows * NR;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t r = 0; r < rows; ++r, to += padded) {
          const float* from = src + k * sk + r * sr + static_cast<int64_t>(p) * NR * sc;
          for (int c = 0; c < padded; ++c) to[c] = c < cols ? from[c * sc] : 0.f;
        }
    }
  }
  int columns(int p) const { return std::min(NR, width - p * NR); }
  int vectors(int p) const { return columns(p) > VL ? NV : 1; }
  const float* panel(int p, int64_t k = 0) const {
    return buffer.data + p * K * rows * NR + k * rows * vectors(p) * VL;
  }
};

// Whether all of count indices lie in [0, n).
bool in_range(const int64_t* index, int64_t count, int64_t n) {
  uint64_t worst = 0;
  for (int64_t i = 0; i < count; ++i) worst = std::max(worst, static_cast<uint64_t>(index[i]));
  return count == 0 || worst < static_cast<uint64_t>(n);
}

// ---------------------------------------------------------------- search

enum Metric { COSINE = 0, EUCLIDEAN = 1, DOT = 2 };

inline float dot(const float* a, const float* b, int64_t n) {
  vf acc = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) acc += load(a + i) * load(b + i);
  float sum = 0;
  for (int l = 0; l < VL; ++l) sum += acc[l];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline float inverse_norm(const float* a, int64_t n) { return 1.f / std::max(std::sqrt(dot(a, a, n)), 1e-12f); }

struct Search {
  const float *queries, *keys;
  int64_t B, M, N, C, K;
  int metric;
  const int64_t* self;
  int64_t self_step;
  int exclude;
  const int64_t* candidates;
  int64_t candidate_step, count;  // count: competitors per sample (N without candidates)
  float* values;
  int64_t* indices;
  int threads;

  int own_places() const { return self && !exclude ? 1 : 0; }
  const int64_t* names(int64_t b) const { return candidates ? candidates + b * candidate_step : nullptr; }
  const float* key(int64_t b, int64_t j) const { return keys + (b * N + (candidates ? names(b)[j] : j)) * C; }
  int64_t own(int64_t b, int64_t m) const { return self ? self[b * self_step + m] : -1; }
  const float* query(int64_t b, int64_t m) const {
    return queries ? queries + (b * M + m) * C : keys + (b * N + own(b, m)) * C;
  }

  // Keys first .. first + rows of sample b as one panel (C, NR), and what is added to each of their scores.
  void pack_keys(int64_t b, int64_t first, int64_t rows, float* panel, float* bias) const {
    for (int j = 0; j < NR; ++j) {
      if (j >= rows) {
        for (int64_t c = 0; c < C; ++c) panel[c * NR + j] = 0;
        bias[j] = -INF;
        continue;
      }
      const float* x = key(b, first + j);
      const float scale = metric == COSINE ? inverse_norm(x, C) : 1.f;
      bias[j] = metric == EUCLIDEAN ? -0.5f * dot(x, x, C) : 0.f;
      for (int64_t c = 0; c < C; ++c) panel[c * NR + j] = x[c] * scale;
    }
  }

  void run() {
    constexpr int MR = SEARCH_ROWS, BLOCKS = 8;
    const int found = static_cast<int>(K) - own_places();
    const int64_t key_bytes = C * 4;
    const int64_t panels_all = ceil_div(count, NR);
    // Sizes: a chunk stays in a core's own cache, a span of packed keys in the shared one.
    const int64_t chunk = std::max<int64_t>(2, std::min<int64_t>(2048 / NR, (400 << 10) / (key_bytes * NR)));
    const int64_t span = std::min(panels_all, ceil_div(std::max<int64_t>(chunk, (8 << 20) / (key_bytes * NR)), chunk) * chunk);
    const int64_t group = std::min(B, std::max<int64_t>(threads, (4 << 20) / (span * NR * key_bytes)));
    const int num_lanes = lane_count(found);
    Buffer packed, bias;
    packed.get(static_cast<size_t>(group * span) * NR * C);
    bias.get(static_cast<size_t>(group * span) * NR);
    std::vector<int32_t> place;  // where a key stands among the candidates
    if (self && candidates) place.resize(group * N);
    auto make = [] { return std::make_unique<Scratch>(); };

    for (int64_t b0 = 0; b0 < B; b0 += group) {
      const int64_t images = std::min(group, B - b0);
      for (int64_t p0 = 0; p0 < panels_all; p0 += span) {
        const int64_t panels = std::min(span, panels_all - p0);
        const int64_t pieces = ceil_div(panels, 8);
        run_tasks(threads, images * pieces, make, [&](int64_t task, Scratch&) {
          const int64_t i = task / pieces, b = b0 + i, first = task % pieces * 8;
          for (int64_t p = first; p < std::min(panels, first + 8); ++p) {
            const int64_t key0 = (p0 + p) * NR;
            pack_keys(b, key0, std::min<int64_t>(NR, count - key0), packed.data + (i * span + p) * NR * C,
                      bias.data + (i * span + p) * NR);
          }
          if (!place.empty() && first == 0 && p0 == 0) {
            int32_t* at = place.data() + i * N;
            std::fill(at, at + N, -1);
            for (int64_t j = count - 1; j >= 0; --j) at[names(b)[j]] = static_cast<int32_t>(j);
          }
        });
        const int64_t row_tasks = ceil_div(M, MR * BLOCKS);
        run_tasks(threads, images * row_tasks, make, [&](int64_t task, Scratch& w) {
          const int64_t i = task / row_tasks, b = b0 + i, m0 = task % row_tasks * MR * BLOCKS;
          const int64_t rows = std::min<int64_t>(MR * BLOCKS, M - m0);
          search_rows(b, m0, rows, p0, panels, chunk, found, num_lanes, packed.data + i * span * NR * C,
                      bias.data + i * span * NR, place.empty() ? nullptr : place.data() + i * N, w,
                      p0 == 0, p0 + panels == panels_all);
        });
      }
    }
  }

  void search_rows(int64_t b, int64_t m0, int64_t rows, int64_t p0, int64_t panels, int64_t chunk, int found,
                   int num_lanes, const float* packed, const float* bias, const int32_t* place, Scratch& w,
                   bool is_first, bool is_last) const {
    constexpr int MR = SEARCH_ROWS;
    const int64_t blocks = ceil_div(rows, MR);
    const int shift = own_places();
    Buffer a_buffer;
    float* a = a_buffer.get(blocks * MR * C);
    for (int64_t r = 0; r < blocks * MR; ++r) {
      float* to = a + r / MR * MR * C + r % MR;
      if (r >= rows) {
        for (int64_t c = 0; c < C; ++c) to[c * MR] = 0;
        continue;
      }
      const float* x = query(b, m0 + r);
      const float scale = metric == COSINE ? inverse_norm(x, C) : 1.f;
      for (int64_t c = 0; c < C; ++c) to[c * MR] = x[c] * scale;
      if (is_first) {
        float* best = values + (b * M + m0 + r) * K;
        int64_t* index = indices + (b * M + m0 + r) * K;
        std::fill(best, best + K, -INF);
        std::fill(index, index + K, -1);
        if (shift) {
          const float* y = keys + (b * N + own(b, m0 + r)) * C;
          index[0] = own(b, m0 + r);
          best[0] = dot(x, y, C) * (metric == COSINE ? scale * inverse_norm(y, C) : 1.f);
          if (metric == EUCLIDEAN) best[0] -= 0.5f * dot(y, y, C);
        }
      }
    }
    if (found) {
      const int64_t ld = std::min(chunk, panels) * NR;
      float* s = w.scores.get(MR * ld);
      float* lanes = w.lanes.get(static_cast<size_t>(MR) * num_lanes);
      const int turns = num_lanes / NR;
      for (int64_t q0 = 0; q0 < panels; q0 += chunk) {
        const int64_t width = std::min(chunk, panels - q0);
        const int64_t key0 = (p0 + q0) * NR;
        const int n = static_cast<int>(std::min(width * NR, count - key0));
        for (int64_t block = 0; block < blocks; ++block) {
          std::fill(lanes, lanes + MR * num_lanes, -INF);
          for (int64_t p = 0; p < width; ++p)
            score_tile<MR>(a + block * MR * C, packed + (q0 + p) * NR * C, static_cast<int>(C), bias + (q0 + p) * NR,
                           s + p * NR, ld, lanes + p % turns * NR, num_lanes);
          for (int64_t r = block * MR; r < std::min(rows, (block + 1) * MR); ++r) {
            float* row = s + r % MR * ld;
            int spare = 0;
            if (self) {
              const int64_t name = own(b, m0 + r), at = (place ? place[name] : name) - key0;
              if ((!place || place[name] >= 0) && at >= 0 && at < n) row[at] = -INF, spare = 1;
            }
            update_row(row, n, lanes + r % MR * num_lanes, num_lanes, found, spare, key0, names(b), w,
                       values + (b * M + m0 + r) * K + shift, indices + (b * M + m0 + r) * K + shift);
          }
        }
      }
    }
    if (!is_last) return;
    for (int64_t r = 0; r < rows; ++r) {
      float* best = values + (b * M + m0 + r) * K;
      int64_t* index = indices + (b * M + m0 + r) * K;
      if (found && index[K - 1] < 0) fill_row(count, found, own(b, m0 + r), names(b), best + shift, index + shift);
      if (metric == EUCLIDEAN) {
        const float* x = query(b, m0 + r);
        const float square = dot(x, x, C);
        for (int64_t j = 0; j < K; ++j) best[j] = std::max(0.f, square - 2 * best[j]);
      }
    }
  }
};

// ---------------------------------------------------------------- aggregation

struct Aggregate {
  const float* x;          // (B, N, C)
  const int64_t* indices;  // (B, M, K), or (M, K) with index_step 0
  int64_t index_step, B, M, N, C, O, K;
  int threads;

  bool valid() const { return in_range(indices, (index_step ? B : 1) * M * K, N); }
  const int64_t* taps(int64_t b, int64_t m) const { return indices + b * index_step + m * K; }

  template <int NW>
  void forward_panel(int64_t b, int64_t m0, int64_t rows, const Panels& w, int p, const float* bias, float* y,
                     float* gathered) const {
    constexpr int MR = GATHER_ROWS;
    const int cols = w.columns(p);
    alignas(64) float start[NR] = {};
    if (bias) std::memcpy(start, bias + p * NR, cols * 4);
    for (int64_t r0 = 0; r0 < rows; r0 += MR) {
      vf acc[MR][NW];
      UNROLL for (int i = 0; i < MR; ++i) {
        UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = load(start + j * VL);
      }
      const float* from[MR];
      if (gathered) {
        for (int i = 0; i < MR; ++i) from[i] = gathered + std::min<int64_t>(r0 + i, rows - 1) * K * C;
        row_product<MR, NW>(from, w.panel(p), static_cast<int>(K * C), acc);
      } else {
        for (int64_t k = 0; k < K; ++k) {
          for (int i = 0; i < MR; ++i)
            from[i] = x + (b * N + taps(b, m0 + std::min<int64_t>(r0 + i, rows - 1))[k]) * C;
          row_product<MR, NW>(from, w.panel(p, k), static_cast<int>(C), acc);
        }
      }
      for (int i = 0; i < std::min<int64_t>(MR, rows - r0); ++i) {
        float* to = y + (b * M + m0 + r0 + i) * O + p * NR;
        if (cols == NW * VL) {
          UNROLL for (int j = 0; j < NW; ++j) store(to + j * VL, acc[i][j]);
        } else {
          store_some(to, acc[i], cols);
        }
      }
    }
  }

  void gather(int64_t b, int64_t m0, int64_t rows, int64_t ld, float* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t* at = taps(b, m0 + r);
      float* row = to + r * ld;
      for (int64_t k = 0; k < K; ++k) std::memcpy(row + k * C, x + (b * N + at[k]) * C, C * 4);
      for (int64_t c = K * C; c < ld; ++c) row[c] = 0;
    }
  }

  void forward(const float* weight, const float* bias, float* y) const {
    const Panels w(weight, K, 1, C, K, static_cast<int>(O), C * K);
    const int64_t step = GATHER_ROWS * 12, tasks = ceil_div(M, step);
    run_tasks(threads, B * tasks, [] { return std::make_unique<Buffer>(); }, [&](int64_t task, Buffer& scratch) {
      const int64_t b = task / tasks, m0 = task % tasks * step, rows = std::min(step, M - m0);
      float* gathered = nullptr;
      if (C < 16) gather(b, m0, rows, K * C, gathered = scratch.get(rows * K * C));
      for (int p = 0; p < w.count; ++p) {
        if (w.vectors(p) == NV) forward_panel<NV>(b, m0, rows, w, p, bias, y, gathered);
        else forward_panel<1>(b, m0, rows, w, p, bias, y, gathered);
      }
    });
  }

  template <int NW>
  void input_panel(int64_t b, const Panels& w, int p, const float* gy, float* gx) const {
    constexpr int MR = GATHER_ROWS;
    const int cols = w.columns(p);
    for (int64_t m0 = 0; m0 < M; m0 += MR) {
      const int rows = static_cast<int>(std::min<int64_t>(MR, M - m0));
      const float* from[MR];
      for (int i = 0; i < MR; ++i) from[i] = gy + (b * M + m0 + std::min(i, rows - 1)) * O;
      for (int64_t k = 0; k < K; ++k) {
        vf acc[MR][NW];
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = vf{};
        }
        row_product<MR, NW>(from, w.panel(p, k), static_cast<int>(O), acc);
        UNROLL for (int i = 0; i < MR; ++i) {
          if (i < rows) {
            float* to = gx + (b * N + taps(b, m0 + i)[k]) * C + p * NR;
            if (cols == NW * VL) {
              UNROLL for (int j = 0; j < NW; ++j) store(to + j * VL, load(to + j * VL) + acc[i][j]);
            } else {
              alignas(64) float sum[NW * VL];
              UNROLL for (int j = 0; j < NW; ++j) store(sum + j * VL, acc[i][j]);
              for (int c = 0; c < cols; ++c) to[c] += sum[c];
            }
          }
        }
      }
    }
  }

  // gx must be zero. Threads share out samples, or columns where samples are few, so sums have one fixed order.
  void grad_input(const float* weight, const float* gy, float* gx) const {
    const Panels w(weight, K, 1, O, C * K, static_cast<int>(C), K);
    const int64_t splits = B < 2 * threads ? w.count : 1;
    run_tasks(threads, B * splits, [] { return std::make_unique<int>(0); }, [&](int64_t task, int&) {
      const int64_t b = task / splits;
      const int first = splits > 1 ? static_cast<int>(task % splits) : 0;
      for (int p = first; p < (splits > 1 ? first + 1 : w.count); ++p) {
        if (w.vectors(p) == NV) input_panel<NV>(b, w, p, gy, gx);
        else input_panel<1>(b, w, p, gy, gx);
      }
    });
  }

  // sum(MR, NW vectors) += Σ_r g[r, :MR]ᵀ rows[r][:NW vectors]
  template <int MR, int NW>
  static void outer_tile(const float* g, int64_t ld, const float* const* rows, int64_t column, int64_t count,
                         float* sum, int64_t sum_ld) {
    vf acc[MR][NW];
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = load(sum + i * sum_ld + j * VL);
    }
    for (int64_t r = 0; r < count; ++r, g += ld) {
      const float* row = rows[r] + column;
      vf y[NW];
      UNROLL for (int j = 0; j < NW; ++j) y[j] = load(row + j * VL);
      UNROLL for (int i = 0; i < MR; ++i) {
        const vf v = splat(g[i]);
        UNROLL for (int j = 0; j < NW; ++j) acc[i][j] += v * y[j];
      }
    }
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NW; ++j) store(sum + i * sum_ld + j * VL, acc[i][j]);
    }
  }

  template <int NW>
  static void outer(int height, const float* g, int64_t ld, const float* const* rows, int64_t column, int64_t count,
                    float* sum, int64_t sum_ld) {
    switch (height) {
#define TILE(H) \
  case H: return outer_tile<H, NW>(g, ld, rows, column, count, sum, sum_ld);
      TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if defined(__AVX512F__)
      TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13)
#endif
#undef TILE
    }
  }

  // Rows are split into as many fixed parts as there are threads, summed in order at the end.
  void grad_weight(const float* gy, float* gw) const {
#if defined(__AVX512F__)
    constexpr int64_t MAX_HEIGHT = 13;
#elif defined(__AVX2__)
    constexpr int64_t MAX_HEIGHT = 6;
#else
    constexpr int64_t MAX_HEIGHT = 4;
#endif
    const bool copy = C % VL != 0;  // rows that do not fill whole vectors are gathered first
    const int64_t width = copy ? ceil_div(K * C, VL) * VL : C, taps_apart = copy ? 1 : K;
    const int64_t heights = ceil_div(O, MAX_HEIGHT), height = ceil_div(O, heights);
    const int64_t step = 512, total = B * M, units = ceil_div(total, step);
    const int parts = static_cast<int>(std::min<int64_t>(threads, units));
    const int64_t size = taps_apart * O * width;
    Buffer sums;
    sums.get(parts * size);
    run_threads(parts, [&](int part) {
      float* sum = sums.data + part * size;
      std::memset(sum, 0, size * 4);
      Buffer gathered;
      std::vector<const float*> rows(taps_apart * step);
      for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
        const int64_t r0 = unit * step, count = std::min(step, total - r0);
        if (copy) {
          float* to = gathered.get(step * width);
          for (int64_t r = 0; r < count; ++r) {
            gather((r0 + r) / M, (r0 + r) % M, 1, width, to + r * width);
            rows[r] = to + r * width;
          }
        } else {
          for (int64_t r = 0; r < count; ++r) {
            const int64_t b = (r0 + r) / M;
            const int64_t* at = taps(b, (r0 + r) % M);
            for (int64_t k = 0; k < K; ++k) rows[k * step + r] = x + (b * N + at[k]) * C;
          }
        }
        for (int64_t k = 0; k < taps_apart; ++k)
          for (int64_t c = 0; c < width; c += NR)
            for (int64_t o = 0; o < O; o += height) {
              const int high = static_cast<int>(std::min(height, O - o));
              float* to = sum + (k * O + o) * width + c;
              if (width - c >= NR) outer<NV>(high, gy + r0 * O + o, O, &rows[k * step], c, count, to, width);
              else outer<1>(high, gy + r0 * O + o, O, &rows[k * step], c, count, to, width);
            }
      }
    });
    for (int64_t o = 0; o < O; ++o)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = copy ? o * width + k * C + c : (k * O + o) * width + c;
          float sum = 0;
          for (int part = 0; part < parts; ++part) sum += sums.data[part * size + at];
          gw[(o * C + c) * K + k] = sum;
        }
  }
};

// ---------------------------------------------------------------- attention over chosen neighbors

// Scores are dot products, or minus squared distances; cosine comes as the dot product of unit rows.
struct Attend {
  const float *q, *k, *v;  // (B, N, C), (B, M, C), (B, N, C)
  const int64_t* indices;
  int64_t index_step, B, M, N, C, K;
  int euclidean, fixed;    // fixed: the first score is self_score
  float self_score;
  const float* keep;       // factors of dropout (B, M, K), or null
  const float* weight;     // (K, C)
  int threads;

  bool valid() const { return in_range(indices, (index_step ? B : 1) * M * K, N); }
  const int64_t* taps(int64_t b, int64_t m) const { return indices + b * index_step + m * K; }

  static float square_distance(const float* a, const float* b, int64_t n) {
    vf acc = {};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
      const vf d = load(a + i) - load(b + i);
      acc += d * d;
    }
    float sum = 0;
    for (int l = 0; l < VL; ++l) sum += acc[l];
    for (; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
  }

  // attention (B, M, K) before dropout, y (B, M, C)
  void forward(const float* bias, float* attention, float* y) const {
    const int64_t step = 64, tasks = ceil_div(M, step);
    run_tasks(threads, B * tasks, [] { return std::make_unique<int>(0); }, [&](int64_t task, int&) {
      const int64_t b = task / tasks, m0 = task % tasks * step;
      for (int64_t m = m0; m < std::min(M, m0 + step); ++m) {
        const int64_t* at = taps(b, m);
        float* a = attention + (b * M + m) * K;
        const float* row = k + (b * M + m) * C;
        float most = -INF, sum = 0;
        for (int64_t j = 0; j < K; ++j) {
          const float* other = q + (b * N + at[j]) * C;
          a[j] = fixed && j == 0 ? self_score : euclidean ? -square_distance(row, other, C) : dot(row, other, C);
          most = std::max(most, a[j]);
        }
        for (int64_t j = 0; j < K; ++j) sum += a[j] = std::exp(a[j] - most);
        float* to = y + (b * M + m) * C;
        if (bias) std::memcpy(to, bias, C * 4);
        else std::memset(to, 0, C * 4);
        for (int64_t j = 0; j < K; ++j) {
          a[j] /= sum;
          const float share = keep ? a[j] * keep[(b * M + m) * K + j] : a[j];
          const float *from = v + (b * N + at[j]) * C, *w = weight + j * C;
          for (int64_t c = 0; c < C; ++c) to[c] += share * w[c] * from[c];
        }
      }
    });
  }

  // Samples are summed by one thread each, and the weight's parts in order: one fixed order of sums.
  void backward(const float* gy, const float* attention, float* gq, float* gk, float* gv, float* gw) const {
    const int parts = static_cast<int>(std::min<int64_t>(threads, B));
    Buffer sums;
    sums.get(static_cast<size_t>(parts) * K * C);
    run_threads(parts, [&](int part) {
      float* sum = sums.data + static_cast<size_t>(part) * K * C;
      std::memset(sum, 0, K * C * 4);
      std::vector<float> ga(K);
      for (int64_t b = B * part / parts; b < B * (part + 1) / parts; ++b)
        for (int64_t m = 0; m < M; ++m) {
          const int64_t at = (b * M + m);
          const float* g = gy + at * C;
          float mean = 0;
          for (int64_t j = 0; j < K; ++j) {
            const float a = attention[at * K + j], factor = keep ? keep[at * K + j] : 1.f;
            const int64_t place = (b * N + taps(b, m)[j]) * C;
            ga[j] = factor * value_row(g, v + place, weight + j * C, a * factor, gv + place, sum + j * C);
            mean += a * ga[j];
          }
          const float* row = k + at * C;
          float* g_row = gk + at * C;
          std::memset(g_row, 0, C * 4);
          for (int64_t j = fixed; j < K; ++j) {
            const float gs = attention[at * K + j] * (ga[j] - mean);
            const int64_t place = (b * N + taps(b, m)[j]) * C;
            score_row(gs, row, q + place, g_row, gq + place);
          }
        }
    });
    for (int64_t i = 0; i < K * C; ++i) {
      gw[i] = 0;
      for (int part = 0; part < parts; ++part) gw[i] += sums.data[static_cast<size_t>(part) * K * C + i];
    }
  }

  // Returns Σ_c g w v; adds g w share to gv and g v share to gw.
  float value_row(const float* g, const float* v, const float* w, float share, float* gv, float* gw) const {
    vf acc = {};
    int64_t c = 0;
    for (; c + VL <= C; c += VL) {
      const vf gc = load(g + c), vc = load(v + c), wc = load(w + c);
      acc += gc * wc * vc;
      store(gv + c, load(gv + c) + gc * wc * share);
      store(gw + c, load(gw + c) + gc * vc * share);
    }
    float sum = 0;
    for (int l = 0; l < VL; ++l) sum += acc[l];
    for (; c < C; ++c) {
      sum += g[c] * w[c] * v[c];
      gv[c] += g[c] * w[c] * share;
      gw[c] += g[c] * v[c] * share;
    }
    return sum;
  }

  void score_row(float gs, const float* __restrict row, const float* __restrict other, float* __restrict g_row,
                 float* __restrict g_other) const {
    if (euclidean) {
      for (int64_t c = 0; c < C; ++c) {
        const float d = 2 * gs * (row[c] - other[c]);
        g_row[c] -= d;
        g_other[c] += d;
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        g_row[c] += gs * other[c];
        g_other[c] += gs * row[c];
      }
    }
  }
};

template <class F>
int guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// ---------------------------------------------------------------- entry points (0 done, 1 no memory, 2 bad index)

extern "C" {

int nn_abi() { return 2; }
int nn_vector_length() { return VL; }

// The K best of each row of scores (rows, n), row r at scores + r * ld. sign -1: the smallest.
int nn_topk(const float* scores, int64_t rows, int64_t n, int64_t ld, int64_t K, float sign, float* values,
            int64_t* indices, int threads) {
  return guarded([&] {
    const int64_t chunk = 4096, step = std::max<int64_t>(1, 16384 / n);
    const int num_lanes = lane_count(static_cast<int>(K));
    run_tasks(threads, ceil_div(rows, step), [] { return std::make_unique<Scratch>(); }, [&](int64_t task, Scratch& w) {
      float* lanes = w.lanes.get(num_lanes);
      float* copy = w.scores.get(chunk + NR);
      for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
        float* best = values + r * K;
        int64_t* index = indices + r * K;
        std::fill(best, best + K, -INF);
        std::fill(index, index + K, -1);
        for (int64_t j0 = 0; j0 < n; j0 += chunk) {
          const int count = static_cast<int>(std::min(chunk, n - j0));
          const float* s = scores + r * ld + j0;
          if (sign < 0) {
            for (int j = 0; j < count; ++j) copy[j] = -s[j];
            s = copy;
          }
          std::fill(lanes, lanes + num_lanes, -INF);
          int j = 0;
          for (int lane = 0; j + VL <= count; j += VL) {
            store(lanes + lane, vmax(load(s + j), load(lanes + lane)));
            lane = lane + VL == num_lanes ? 0 : lane + VL;
          }
          for (; j < count; ++j) lanes[j % VL] = s[j] > lanes[j % VL] ? s[j] : lanes[j % VL];
          update_row(s, count, lanes, num_lanes, static_cast<int>(K), 0, j0, nullptr, w, best, index);
        }
        if (index[K - 1] < 0) fill_row(n, static_cast<int>(K), -1, nullptr, best, index);
        if (sign < 0)
          for (int64_t j = 0; j < K; ++j) best[j] = -best[j];
      }
    });
    return 0;
  });
}

// See nearest_neighbors. queries may be null: query m is then the key at self[m].
int nn_search(const float* queries, const float* keys, int64_t B, int64_t M, int64_t N, int64_t C, int64_t K,
              int metric, const int64_t* self, int64_t self_step, int exclude, const int64_t* candidates,
              int64_t candidate_step, int64_t count, float* values, int64_t* indices, int threads) {
  if (self && !in_range(self, self_step ? B * M : M, N)) return 2;
  if (candidates && !in_range(candidates, candidate_step ? B * count : count, N)) return 2;
  return guarded([&] {
    Search{queries, keys, B, M, N, C, K, metric, self, self_step, exclude, candidates, candidate_step, count, values,
           indices, threads}
        .run();
    return 0;
  });
}

// See aggregate_neighbors. weight (O, C, K); bias may be null.
int nn_aggregate(const float* x, const int64_t* indices, int64_t index_step, const float* weight, const float* bias,
                 float* y, int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K, int threads) {
  const Aggregate a{x, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return 2;
  return guarded([&] { return a.forward(weight, bias, y), 0; });
}

int nn_aggregate_grad_input(const float* gy, const int64_t* indices, int64_t index_step, const float* weight,
                            float* gx, int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K,
                            int threads) {
  const Aggregate a{nullptr, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return 2;
  return guarded([&] { return a.grad_input(weight, gy, gx), 0; });
}

int nn_aggregate_grad_weight(const float* gy, const float* x, const int64_t* indices, int64_t index_step, float* gw,
                             int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K, int threads) {
  const Aggregate a{x, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return 2;
  return guarded([&] { return a.grad_weight(gy, gw), 0; });
}

// See attend_neighbors. weight (K, C); keep and bias may be null.
int nn_attend(const float* q, const float* k, const float* v, const int64_t* indices, int64_t index_step,
              const float* weight, const float* bias, const float* keep, int euclidean, int fixed, float self_score,
              float* attention, float* y, int64_t B, int64_t M, int64_t N, int64_t C, int64_t K, int threads) {
  const Attend a{q, k, v, indices, index_step, B, M, N, C, K, euclidean, fixed, self_score, keep, weight, threads};
  if (!a.valid()) return 2;
  return guarded([&] { return a.forward(bias, attention, y), 0; });
}

// gq and gv must be zero; gk and gw (K, C) are overwritten.
int nn_attend_backward(const float* gy, const float* attention, const float* q, const float* k, const float* v,
                       const int64_t* indices, int64_t index_step, const float* weight, const float* keep,
                       int euclidean, int fixed, float* gq, float* gk, float* gv, float* gw, int64_t B, int64_t M,
                       int64_t N, int64_t C, int64_t K, int threads) {
  const Attend a{q, k, v, indices, index_step, B, M, N, C, K, euclidean, fixed, 0.f, keep, weight, threads};
  if (!a.valid()) return 2;
  return guarded([&] { return a.backward(gy, attention, gq, gk, gv, gw), 0; });
}

}  // extern "C"
