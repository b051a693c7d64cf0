// Exact K-nearest-neighbor search through 8-bit dot products (the method is told in ops/sets/index.py).
//
// Plain C entry points for ctypes, no torch headers. Keys are packed in panels of 48; one call of a tile scores some
// queries against one panel (unsigned keys x signed queries, bytes.h). Scores never reach memory in bulk: each is
// compared with the query's running bound, and only survivors are kept. `es_supported` tells whether the machine this
// was compiled on multiplies bytes faster than float32 (`vpdpbusd`); elsewhere it is right, and slow.
//
// cost of a pair, smaller is better:   euclidean |x - y|^2,   dot -x.y,   cosine -x.y / (|x| |y|)
// computed as                          bias_j - c sx_i sy_j acc_ij + const_i     (acc: integer dot product; c = 2 or 1)
// 8-bit data give exact integer costs. For everything else the computed cost carries a bound,
//   |true - computed| <= E = err_norm_i A + err_resid_i B + err_add_i + R,       (A, B, R: one value per panel)
// and every key whose lower bound does not exceed the K-th smallest upper bound is evaluated in float64.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "panels.h"
#include "threads.h"
#include "vectors.h"

namespace {

struct Candidate {
  float lower, upper;
  int32_t index;
};

struct IntCandidate {
  int32_t cost, index;
  bool operator<(const IntCandidate& o) const { return cost != o.cost ? cost < o.cost : index < o.index; }
};

// ---- scanning -----------------------------------------------------------------------------------------------------

// Floats as integers of the same order, and back.
inline int32_t ordered(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float unordered(int32_t bits) {
  bits ^= (bits >> 31) & 0x7fffffff;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Survivors of one query against a stretch of keys, in the order of the keys.
struct FloatList {
  std::vector<Candidate> items;
  size_t limit;
  float base;  // upper bound on the K-th best cost, without const_i
  void reset(size_t K, double bound) {
    items.clear();
    limit = 4 * K + 64;
    base = round_up(bound);
  }
  void drop_above_base() {
    const float b = base;
    items.erase(std::remove_if(items.begin(), items.end(), [b](const Candidate& c) { return c.lower > b; }),
                items.end());
  }
  // At least the K-th smallest of one field, and only a few more than K are as small; infinity if there are no more.
  template <class F>
  float about_kth(size_t K, std::vector<int32_t>& scratch, F field) const {
    const size_t count = items.size();
    if (count <= K) return INF;
    scratch.resize(count);
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (size_t c = 0; c < count; ++c) {
      scratch[c] = ordered(field(items[c]));
      low = std::min(low, scratch[c]);
      high = std::max(high, scratch[c]);
    }
    for (size_t below = count; low < high && below > K + K / 16;) {
      const int32_t middle = int32_t((int64_t(low) + high) >> 1);
      int32_t fewer = 0;
      for (size_t c = 0; c < count; ++c) fewer += scratch[c] <= middle;
      if (size_t(fewer) >= K) {
        high = middle;
        below = size_t(fewer);
      } else {
        low = middle + 1;
      }
    }
    return unordered(high);
  }
  void prune(size_t K, std::vector<int32_t>& scratch) {
    base = std::min(base, about_kth(K, scratch, [](const Candidate& c) { return c.upper; }));
    drop_above_base();
    if (2 * items.size() > limit) limit = 2 * limit;
  }
};

constexpr size_t kMostWaiting = 1 << 14;  // survivors a query may hold before they are evaluated: bounds the memory

// The K-th exact cost found so far, in computed units and without const_i, rounded away from zero risk.
double exact_bound(const Search& h, int64_t i) {
  const auto& best = h.best[i];
  if (best.size() < size_t(h.K)) return std::numeric_limits<double>::infinity();
  const double worst = best.front().first * h.unit[i];
  return worst - h.shift[i] + (std::fabs(worst) + std::fabs(h.shift[i])) * 1e-13;
}

// Evaluates the survivors of queries q0 ... q0 + count - 1 whose lower bound is at most their `cut`, and removes them.
// Stretches of keys are taken one after the other by all queries, so that a row serves several while it is in cache.
int64_t evaluate(Search& h, FloatList* lists, const float* cut, int64_t q0, int64_t count, const void* rows, int type,
                 int64_t n, int64_t base_index) {
  size_t waiting = 0;
  for (int64_t i = 0; i < count; ++i) waiting += lists[i].items.size();
  const int64_t stretch = std::max<int64_t>(kPanel, 2 * n * count / int64_t(waiting + 1));  // about two a query
  std::vector<size_t> next(size_t(count), 0), kept(size_t(count), 0);
  const Pairs pairs{h.queries, rows, type, h.metric, h.d, h.norm.data()};
  int64_t evaluated = 0;
  for (int64_t end = stretch; waiting; end += stretch)
    for (int64_t i = 0; i < count; ++i) {
      auto& items = lists[i].items;
      size_t c = next[i];
      for (; c < items.size() && items[c].index < end; ++c, --waiting) {
        if (items[c].lower > cut[i]) {
          items[kept[i]++] = items[c];
          continue;
        }
        auto& best = h.best[q0 + i];
        ++evaluated;
        if (best.size() == size_t(h.K) && pairs.beyond(q0 + i, items[c].index, best.front().first)) continue;
        offer(best, size_t(h.K), {pairs.cost(q0 + i, items[c].index), base_index + items[c].index});
      }
      next[i] = c;
    }
  for (int64_t i = 0; i < count; ++i) lists[i].items.resize(kept[i]);
  return evaluated;
}

// Decides the survivors of some queries: the K most promising of each are evaluated first, then, unless `early`, all
// whose lower bound still reaches the K-th exact cost.
int64_t settle(Search& h, FloatList* lists, int64_t q0, int64_t count, const void* rows, int type, int64_t n,
               int64_t base_index, bool early, std::vector<int32_t>& scratch) {
  const size_t K = size_t(h.K);
  std::vector<float> cut(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    lists[i].prune(K, scratch);
    cut[i] = lists[i].about_kth(K, scratch, [](const Candidate& c) { return c.lower; });
  }
  int64_t evaluated = evaluate(h, lists, cut.data(), q0, count, rows, type, n, base_index);
  for (int64_t i = 0; i < count; ++i) {
    lists[i].base = std::min(lists[i].base, round_up(exact_bound(h, q0 + i)));
    lists[i].drop_above_base();
    lists[i].limit = 4 * K + 64 + 2 * lists[i].items.size();
    cut[i] = INF;
  }
  if (early) return evaluated;
  evaluated += evaluate(h, lists, cut.data(), q0, count, rows, type, n, base_index);
  for (int64_t i = 0; i < count; ++i)
    lists[i].reset(K, std::min<double>(lists[i].base, exact_bound(h, q0 + i)));
  return evaluated;
}

void scan_float(Search& h, const uint8_t* packed, const float* meta, const void* rows, int type, int64_t n,
                int64_t base_index, int64_t q0, int64_t q1) {
  const int64_t panels = (n + kPanel - 1) / kPanel, d4 = h.dpad / 4;
  const size_t K = size_t(h.K);
  const int64_t tile = q1 - q0;
  std::vector<FloatList> lists(size_t(tile + kRows));
  for (int64_t i = 0; i < tile; ++i) lists[i].reset(K, exact_bound(h, q0 + i));
  std::vector<int32_t> scratch;
  int64_t evaluated = 0;
  alignas(64) float score[kPanel];
  alignas(64) int32_t dots[kRows * kPanel];
  // A K-th best among exact costs bounds by one error where one among upper bounds takes two: get it early on.
  const int64_t early = panels >= 64 + 4 * int64_t(K) ? panels / 8 : -1;
  for (int64_t p = 0; p < panels; ++p) {
    if (p == early) evaluated += settle(h, lists.data(), q0, tile, rows, type, n, base_index, true, scratch);
    const float* mt = meta + p * kMeta;
    const float A = mt[2 * kPanel], B = mt[2 * kPanel + 1], R = mt[2 * kPanel + 2];
    const uint8_t* keys = packed + p * h.dpad * kPanel;
    const int32_t first = int32_t(p * kPanel);
    for (int64_t i = 0; i < tile; i += kRows) {
      const int64_t q = q0 + i;
      dot_tile<Whole>(keys, h.packed.data() + q * h.dpad, h.dpad, d4, h.start.data() + q, dots);
      for (int r = 0; r < kRows; ++r) {
        const float E = h.err_norm[q + r] * A + h.err_resid[q + r] * B + h.err_add[q + r] + R;
        const float sx = h.scale[q + r];
        const vf scale = splat(sx), bar = splat(lists[i + r].base + E);
        vf t[kPanel / VL];
        uint64_t hit = 0;
        UNROLL for (int v = 0; v < kPanel / VL; ++v) {
          const vf product = __builtin_convertvector(load(dots + r * kPanel + VL * v), vf) * load(mt + VL * v);
          t[v] = load(mt + kPanel + VL * v) - product * scale;
          hit |= uint64_t(at_most(t[v], bar)) << (VL * v);
        }
        if (__builtin_expect(hit != 0, 0)) {
          if (q + r >= q1) continue;
          FloatList& list = lists[i + r];
          UNROLL for (int v = 0; v < kPanel / VL; ++v) store(score + VL * v, t[v]);
          for (; hit; hit &= hit - 1) {
            const int j = __builtin_ctzll(hit);
            if (!(score[j] < INF)) continue;  // padding
            const float lower = score[j] - E;
            if (lower > list.base) continue;
            list.items.push_back({lower, score[j] + E, first + j});
            if (list.items.size() >= list.limit) {
              list.prune(K, scratch);
              if (list.items.size() >= kMostWaiting)
                evaluated += settle(h, &list, q + r, 1, rows, type, n, base_index, false, scratch);
            }
          }
        }
      }
    }
  }
  evaluated += settle(h, lists.data(), q0, tile, rows, type, n, base_index, false, scratch);
  h.evaluated += evaluated;
}

struct IntList {
  std::vector<IntCandidate> items;
  size_t limit;
  int32_t base;  // a key must cost less than this; equal ones with a higher index lose
  void prune(size_t K) {
    if (items.size() > K) {
      std::nth_element(items.begin(), items.begin() + (K - 1), items.end());
      items.resize(K);
    }
    if (items.size() == K) base = std::min(base, std::max_element(items.begin(), items.end())->cost);
  }
};

void scan_integer(Search& h, const uint8_t* packed, const float* meta, int64_t n, int64_t base_index, int64_t q0,
                  int64_t q1) {
  const int64_t panels = (n + kPanel - 1) / kPanel, d4 = h.dpad / 4;
  const size_t K = size_t(h.K);
  const int64_t tile = q1 - q0;
  std::vector<IntList> lists(size_t(tile + kRows));
  for (int64_t i = 0; i < tile; ++i) {
    lists[i].limit = 2 * K + 64;
    lists[i].base = std::numeric_limits<int32_t>::max();
    if (h.best[q0 + i].size() == K) lists[i].base = int32_t(h.best[q0 + i].front().first - h.shift[q0 + i]);
  }
  const int shift = h.metric == EUCLIDEAN ? 1 : 0;
  alignas(64) int32_t score[kPanel], dots[kRows * kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    const float* mt = meta + p * kMeta;
    const int32_t* bias = reinterpret_cast<const int32_t*>(mt + kPanel);
    const uint8_t* keys = packed + p * h.dpad * kPanel;
    const int32_t first = int32_t(p * kPanel);
    for (int64_t i = 0; i < tile; i += kRows) {
      const int64_t q = q0 + i;
      dot_tile<Whole>(keys, h.packed.data() + q * h.dpad, h.dpad, d4, h.start.data() + q, dots);
      for (int r = 0; r < kRows; ++r) {
        const vi bar = vi{} + (lists[i + r].base - 1);
        vi t[kPanel / VL];
        uint64_t hit = 0;
        UNROLL for (int v = 0; v < kPanel / VL; ++v) {
          t[v] = load(bias + VL * v) - (load(dots + r * kPanel + VL * v) << shift);
          hit |= uint64_t(at_most(t[v], bar)) << (VL * v);
        }
        if (__builtin_expect(hit != 0, 0)) {
          if (q + r >= q1) continue;
          IntList& list = lists[i + r];
          UNROLL for (int v = 0; v < kPanel / VL; ++v) store(score + VL * v, t[v]);
          for (; hit; hit &= hit - 1) {
            const int j = __builtin_ctzll(hit);
            if (first + j >= n || score[j] >= list.base) continue;
            list.items.push_back({score[j], first + j});
            if (list.items.size() >= list.limit) list.prune(K);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < tile; ++i) {
    lists[i].prune(K);
    for (const IntCandidate& c : lists[i].items)
      offer(h.best[q0 + i], K, {double(c.cost) + h.shift[q0 + i], base_index + c.index});
  }
}

// Keeps the `length` smallest of cost_j = bias_j - factor * row_j in a heap, largest first, with labels start + j.
void select_row(const float* row, int64_t n, const float* bias, float factor, int64_t start, float* heap,
                int64_t* label, int64_t length) {
  constexpr int kBlock = 64;
  float cost[kBlock];
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, n - j0));
    const float bound = heap[0];
    int below = 0;
    for (int j = 0; j < count; ++j) {
      cost[j] = bias[j0 + j] - factor * row[j0 + j];
      below += cost[j] < bound;
    }
    if (below == 0) continue;
    for (int j = 0; j < count; ++j) {
      const float c = cost[j];
      if (!(c < heap[0])) continue;
      int64_t hole = 0;  // replace the largest, sift down
      for (int64_t child; (child = 2 * hole + 1) < length; hole = child) {
        if (child + 1 < length && heap[child + 1] > heap[child]) ++child;
        if (!(heap[child] > c)) break;
        heap[hole] = heap[child];
        label[hole] = label[child];
      }
      heap[hole] = c;
      label[hole] = start + j0 + j;
    }
  }
}

}  // namespace

extern "C" {

int es_supported() { return WHOLE_ROWS_ARE_FAST; }
int64_t es_panel() { return kPanel; }
int64_t es_meta() { return kMeta; }

// Begins a search. queries: (m, d) rows of `type`, which must outlive the search; mean (d); integers: exact integer
// costs (8-bit types, not cosine). Null: NaN, overflow, or no memory.
void* es_new(const void* queries, int type, int64_t m, int64_t d, int64_t K, int metric, int integers,
             const float* mean, int threads) {
  try {
    std::unique_ptr<Search> h(new Search());
    h->m = m;
    h->d = d;
    h->dpad = (d + 3) / 4 * 4;
    h->K = K;
    h->metric = metric;
    h->type = type;
    h->threads = threads;
    h->integers = integers != 0;
    h->queries = queries;
    const int64_t padded = (m + kRows - 1) / kRows * kRows;
    h->packed.assign(size_t(padded * h->dpad), 0);
    h->start.assign(padded, 0);
    for (auto* v : {&h->scale, &h->err_norm, &h->err_resid, &h->err_add}) v->assign(padded, 0.0f);
    h->shift.assign(padded, 0.0);
    h->norm.assign(padded, 0.0);
    h->unit.assign(padded, 1.0);
    h->best.resize(m);
    std::atomic<bool> fine{true};
    run_tasks(threads, (m + 63) / 64, [&](int64_t job) {
      std::vector<float> row(d);
      std::vector<int32_t> q(d);
      for (int64_t i = job * 64; i < std::min(m, job * 64 + 64); ++i) {
        bool ok = true;
        switch (type) {
          case kF32: ok = pack_float_query<float>(*h, i, mean, row.data(), q.data()); break;
          case kF64: ok = pack_float_query<double>(*h, i, mean, row.data(), q.data()); break;
          case kU8: pack_byte_query<uint8_t>(*h, i); break;
          default: pack_byte_query<int8_t>(*h, i);
        }
        if (!ok) fine = false;
      }
    });
    return fine ? h.release() : nullptr;
  } catch (...) {
    return nullptr;
  }
}

void es_free(void* handle) { delete static_cast<Search*>(handle); }

// Packs n keys into packed (panels, dpad, 48) bytes and meta (panels, es_meta()) floats.
// OUT_OF_RANGE: NaN or overflow.
int es_pack(const void* rows, int type, int64_t n, int64_t d, int metric, int integers, const float* mean,
            uint8_t* packed, float* meta, int threads) {
  const int64_t panels = (n + kPanel - 1) / kPanel, dpad = (d + 3) / 4 * 4;
  std::atomic<bool> fine{true};
  const auto pack = [&](int64_t job) {
    std::vector<float> row(d);
    std::vector<int32_t> q(d);
    for (int64_t p = job * 16; p < std::min(panels, job * 16 + 16); ++p) {
      const int64_t first = p * kPanel * d, count = std::min<int64_t>(kPanel, n - p * kPanel);
      uint8_t* out = packed + p * dpad * kPanel;
      float* mt = meta + p * kMeta;
      bool ok = true;
      if (integers)
        pack_integer_panel((const uint8_t*)rows + first, type == kI8 ? 128 : 0, count, d, dpad, metric, type == kU8,
                           out, mt);
      else if (type == kU8)
        pack_byte_cosine_panel((const uint8_t*)rows + first, 0, count, d, dpad, out, mt);
      else if (type == kI8)
        pack_byte_cosine_panel((const int8_t*)rows + first, 128, count, d, dpad, out, mt);
      else if (type == kF32)
        ok = pack_float_panel((const float*)rows + first, mean, count, d, dpad, metric, out, mt, row.data(), q.data());
      else
        ok = pack_float_panel((const double*)rows + first, mean, count, d, dpad, metric, out, mt, row.data(),
                              q.data());
      if (!ok) fine = false;
    }
  };
  const int code = guarded([&] { run_tasks(threads, (panels + 15) / 16, pack); });
  return code ? code : fine ? DONE : OUT_OF_RANGE;
}

// Adds n packed keys to the running best K; `rows` are the same keys as they were, of the queries' type. Stretches of
// keys must come in ascending order: on equal cost the lower index stays.
int es_scan(void* handle, const uint8_t* packed, const float* meta, const void* rows, int64_t n, int64_t base_index) {
  Search& h = *static_cast<Search*>(handle);
  int64_t tile = (h.m + 2 * h.threads - 1) / (2 * h.threads);
  tile = std::min<int64_t>(256, (tile + kRows - 1) / kRows * kRows);
  return guarded([&] {
    run_tasks(h.threads, (h.m + tile - 1) / tile, [&](int64_t job) {
      const int64_t q0 = job * tile, q1 = std::min(h.m, q0 + tile);
      if (h.integers)
        scan_integer(h, packed, meta, n, base_index, q0, q1);
      else
        scan_float(h, packed, meta, rows, h.type, n, base_index, q0, q1);
    });
  });
}

// Keeps the `length` smallest of cost_ij = bias_j - factor * products_ij over stretches of keys, in portable code.
// products (m, n) with rows `stride` apart; values (m, length): heaps, largest first, infinite where empty;
// labels (m, length): start + j.
int es_select(const float* products, int64_t m, int64_t n, int64_t stride, const float* bias, float factor,
              int64_t start, float* values, int64_t* labels, int64_t length, int threads) {
  return guarded([&] {
    run_tasks(threads, (m + 15) / 16, [&](int64_t job) {
      for (int64_t i = job * 16; i < std::min(m, job * 16 + 16); ++i)
        select_row(products + i * stride, n, bias, factor, start, values + i * length, labels + i * length, length);
    });
  });
}

// Costs in float64 of the keys named by labels (m, length) of rows (n, d); all of the queries' type.
int es_costs(const void* queries, int type, int64_t m, int64_t d, const void* rows, const int64_t* labels,
             int64_t length, int metric, double* out, int threads) {
  Search h;
  h.m = m;
  h.d = d;
  h.metric = metric;
  h.queries = queries;
  const auto evaluate = [&](int64_t job) {
    const Pairs pairs{queries, rows, type, metric, d, h.norm.data()};
    for (int64_t i = job * 16; i < std::min(m, job * 16 + 16); ++i) {
      switch (type) {
        case kF32: h.norm[i] = std::sqrt(squared_norm((const float*)queries + i * d, d)); break;
        case kF64: h.norm[i] = std::sqrt(squared_norm((const double*)queries + i * d, d)); break;
        case kU8: h.norm[i] = std::sqrt(squared_norm((const uint8_t*)queries + i * d, d)); break;
        default: h.norm[i] = std::sqrt(squared_norm((const int8_t*)queries + i * d, d));
      }
      for (int64_t l = 0; l < length; ++l) {
        if (l + 1 < length) pairs.prefetch(labels[i * length + l + 1]);
        out[i * length + l] = pairs.cost(i, labels[i * length + l]);
      }
    }
  };
  return guarded([&] {
    h.norm.assign(m, 0.0);
    run_tasks(threads, (m + 15) / 16, evaluate);
  });
}

// How many pairs have been evaluated in float64 so far.
int64_t es_evaluated(void* handle) { return static_cast<Search*>(handle)->evaluated; }

// Writes costs (m, K) float64 and indices (m, K), best first, equal costs by index.
int es_finish(void* handle, double* costs, int64_t* indices) {
  Search& h = *static_cast<Search*>(handle);
  return guarded([&] {
    run_tasks(h.threads, (h.m + 255) / 256, [&](int64_t job) {
      for (int64_t i = job * 256; i < std::min(h.m, job * 256 + 256); ++i) {
        auto& b = h.best[i];
        std::sort(b.begin(), b.end());
        for (size_t j = 0; j < b.size(); ++j) {
          costs[i * h.K + j] = b[j].first;
          indices[i * h.K + j] = b[j].second;
        }
      }
    });
  });
}

}  // extern "C"
