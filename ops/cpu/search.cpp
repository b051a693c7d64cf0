// Neighbor search for float32 tensors on a CPU: nearest_neighbors of ops/maps/search.py, topk_rows of ops/topk.py.
//
// Plain C entry points (loaded by ctypes, no torch headers: it compiles in seconds). Nothing here allocates results;
// every function works on contiguous row-major arrays of the caller, whose PyTorch path gives the same answers.
// Symbols: B batch, M queries, N keys, C channels, K neighbors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "topk.h"
#include "vectors.h"

namespace {

// Matrix products are register tiles of MR rows by NV vectors.
#if defined(__AVX512F__)
constexpr int MR = 14;
#elif defined(__AVX__)
constexpr int MR = 6;
#else
constexpr int MR = 4;
#endif

// scores(MR, NR) = bias + A Bᵀ with A packed (C, MR) and B packed (C, NR); also updates each row's lane maxima.
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
    constexpr int BLOCKS = 8;
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

    for (int64_t b0 = 0; b0 < B; b0 += group) {
      const int64_t images = std::min(group, B - b0);
      for (int64_t p0 = 0; p0 < panels_all; p0 += span) {
        const int64_t panels = std::min(span, panels_all - p0);
        const int64_t pieces = ceil_div(panels, 8);
        run_tasks(threads, images * pieces, [&](int64_t task) {
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
        run_tasks(threads, images * row_tasks, [] { return Scratch(); }, [&](int64_t task, Scratch& w) {
          const int64_t i = task / row_tasks, b = b0 + i, m0 = task % row_tasks * MR * BLOCKS;
          const int64_t rows = std::min<int64_t>(MR * BLOCKS, M - m0);
          search_rows(b, m0, rows, p0, panels, chunk, found, num_lanes, packed.data + i * span * NR * C,
                      bias.data + i * span * NR, place.empty() ? nullptr : place.data() + i * N, w,
                      p0 == 0, p0 + panels == panels_all);
        });
      }
    }
  }

  // Queries m0 .. m0 + rows of sample b as tiles (C, MR), zeros beyond them; with `is_first`, their lists are begun.
  void pack_queries(int64_t b, int64_t m0, int64_t rows, bool is_first, float* tiles) const {
    for (int64_t r = 0; r < ceil_div(rows, MR) * MR; ++r) {
      float* to = tiles + r / MR * MR * C + r % MR;
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
        if (own_places()) {
          const float* y = keys + (b * N + own(b, m0 + r)) * C;
          index[0] = own(b, m0 + r);
          best[0] = dot(x, y, C) * (metric == COSINE ? scale * inverse_norm(y, C) : 1.f);
          if (metric == EUCLIDEAN) best[0] -= 0.5f * dot(y, y, C);
        }
      }
    }
  }

  // Fills places that NaN left empty, and turns scores into values.
  void finish_rows(int64_t b, int64_t m0, int64_t rows, int found) const {
    const int shift = own_places();
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

  void search_rows(int64_t b, int64_t m0, int64_t rows, int64_t p0, int64_t panels, int64_t chunk, int found,
                   int num_lanes, const float* packed, const float* bias, const int32_t* place, Scratch& w,
                   bool is_first, bool is_last) const {
    const int64_t blocks = ceil_div(rows, MR);
    const int shift = own_places();
    Buffer a_buffer;
    float* a = a_buffer.get(blocks * MR * C);
    pack_queries(b, m0, rows, is_first, a);
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
            score_tile(a + block * MR * C, packed + (q0 + p) * NR * C, static_cast<int>(C), bias + (q0 + p) * NR,
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
    if (is_last) finish_rows(b, m0, rows, found);
  }
};

}  // namespace

extern "C" {

int nn_vector_length() { return VL; }

// The K best of each row of scores (rows, n), row r at scores + r * ld. sign -1: the smallest.
int nn_topk(const float* scores, int64_t rows, int64_t n, int64_t ld, int64_t K, float sign, float* values,
            int64_t* indices, int threads) {
  return guarded([&] {
    const int64_t chunk = 4096, step = std::max<int64_t>(1, 16384 / n);
    const int num_lanes = lane_count(static_cast<int>(K));
    run_tasks(threads, ceil_div(rows, step), [] { return Scratch(); }, [&](int64_t task, Scratch& w) {
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
  });
}

// See nearest_neighbors. queries may be null: query m is then the key at self[m].
int nn_search(const float* queries, const float* keys, int64_t B, int64_t M, int64_t N, int64_t C, int64_t K,
              int metric, const int64_t* self, int64_t self_step, int exclude, const int64_t* candidates,
              int64_t candidate_step, int64_t count, float* values, int64_t* indices, int threads) {
  if (self && !in_range(self, self_step ? B * M : M, N)) return BAD_INDEX;
  if (candidates && !in_range(candidates, candidate_step ? B * count : count, N)) return BAD_INDEX;
  return guarded([&] {
    Search{queries, keys, B, M, N, C, K, metric, self, self_step, exclude, candidates, candidate_step, count, values,
           indices, threads}
        .run();
  });
}


}  // extern "C"
