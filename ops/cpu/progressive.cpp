// Progressive exact search (the method and its bounds are told in ops/sets/progressive.py).
//
// Plain C entry points for ctypes, no torch headers. A row is sketched, twice, by a few 8-bit numbers and a bound on
// what they lose, all in units of one scale:
//   |x - y| >= unit (|p - q| - slip_x - slip_y),      p, q: sketches, |p - q|^2 an exact integer.
// Keys whose bound exceeds the K-th best distance found so far are done with; the others see the second, longer sketch,
// and those it leaves are evaluated in float64, the most promising first.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "pairs.h"
#include "panels.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t kTile = 128;          // queries that go over the keys together
constexpr int32_t kFar = 1 << 30;       // beyond every distance of sketches: where a panel holds no key
constexpr int32_t kShift = Small::kMost + 1;  // added to the numbers of keys of the first stage
constexpr double kUnit = 6.0e-8;        // at least the unit roundoff of float32

constexpr int64_t kTurnRows = 12;       // rows that are rotated together in registers
constexpr int64_t kTurned = 4 * kTurnRows;

// z[r][0 .. NR) (+)= sum_c x[r][c] axes[c][0 .. NR), of `rows` of kTurnRows rows.
__attribute__((noinline)) void turn_tile(const float* x, int64_t stride, const float* axes, int64_t count, float* z,
                                         int64_t zstride, int64_t rows, bool add) {
  vf sum[kTurnRows][NV] = {};
  for (int64_t c = 0; c < count; ++c, axes += NR) {
    const vf a0 = load(axes), a1 = load(axes + VL);
    UNROLL for (int r = 0; r < kTurnRows; ++r) {
      const vf b = splat(x[r * stride + c]);
      sum[r][0] += b * a0;
      sum[r][1] += b * a1;
    }
  }
  UNROLL for (int r = 0; r < kTurnRows; ++r)
    if (r < rows) {
      float* out = z + r * zstride;
      store(out, add ? load(out) + sum[r][0] : sum[r][0]);
      store(out + VL, add ? load(out + VL) + sum[r][1] : sum[r][1]);
    }
}

struct Row {  // what sketching needs beside the leading coordinates
  double square;  // squared length of the (centered) row
  float extra;    // its coordinate on an axis of its own
};

// x -> H x with the Hadamard matrix of n = 2^k rows, not scaled.
void hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t i = 0; i < n; i += 2 * half)
#pragma omp simd
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
}

struct Sketch {
  int64_t axes, width;   // coordinates of the row; numbers of the sketch, a power of two
  bool extra;            // whether there is an axis beside the rotated ones
  float extra_center, rest_center;  // subtracted, of keys and queries alike
  double unit;           // of the distances of sketches
  double lost, least;    // coordinates are within lost * length + least of those of an orthonormal rotation
  float largest;         // of the numbers of the sketch

  // Writes `width` numbers; returns the slip in units, rounded up. work: width floats.
  float write(const float* z, Row row, int8_t* out, int32_t* square, float* work) const {
    double caught = 0;
    for (int64_t a = 0; a < axes; ++a) caught += double(z[a]) * double(z[a]);
    const double length = std::sqrt(row.square), held = std::sqrt(caught);
    const double error = lost * length + least;
    // The length outside the axes, between bounds: of nearly equal squares the difference is uncertain.
    const double rest = std::sqrt(std::max(0.0, row.square - caught));
    const double down = std::max(0.0, held - error), up = held + error;
    const double most = std::sqrt(std::max(0.0, row.square * (1 + 1e-12) - down * down));
    const double fewest = std::sqrt(std::max(0.0, row.square * (1 - 1e-12) - up * up));
    const double doubt = std::max(most - rest, rest - fewest);
    std::memcpy(work, z, size_t(axes) * 4);
    int64_t at = axes;
    if (extra) work[at++] = row.extra - extra_center;
    work[at++] = float(rest) - rest_center;
    std::fill(work + at, work + width, 0.0f);
    double size = std::fabs(double(row.extra)) + std::fabs(double(extra_center)) + std::fabs(double(rest_center));
    size += length + error;  // at least the length of the sketched point, and of what it was made of
    hadamard(work, width);
    const double root = std::sqrt(double(width));
    const float step = float(unit * root), inverse = 1.0f / step;
    float residual = 0;
    int32_t total = 0;
#pragma omp simd reduction(+ : residual, total)
    for (int64_t a = 0; a < width; ++a) {
      const float p = std::min(largest, std::max(-largest, work[a] * inverse));
      const int32_t q = int32_t(p + std::copysign(0.5f, p));
      const float t = work[a] - float(q) * step;
      residual += t * t;
      total += q * q;
      out[a] = int8_t(q);
    }
    *square = total;
    // Rounding: of the sum above, of each of its terms, of Hadamard's log2(width) additions, of the centers, of `step`.
    double slip = std::sqrt(double(residual)) * (1 + kUnit * double(width + 8)) / root;
    slip += (20 + std::log2(double(width))) * kUnit * size + double(largest) * root * kUnit * unit;
    slip += error + doubt + 1.3e-7 * length;  // the last: of centering the row
    return round_up(slip / unit * (1 + 1e-7));
  }
};

struct Candidate {
  int32_t distance, place;  // squared, of the first sketches
  Candidate() {}            // unset: a list that grows is written at once
  Candidate(int32_t distance, int32_t place) : distance(distance), place(place) {}
};

struct Side {  // sketches of some rows
  const int8_t* data;    // (n, width)
  const int32_t* square;
  const float* slip;
};

struct Scan {
  Pairs pairs;
  int64_t m, n, K, base, step, width[2], seeds;
  double unit[2];
  Side query[2], key[2];        // key[0]: panels as pg_pack leaves them; key[1].data null: one stage
  const double* offset;         // squared distance = offset of the query + factor * cost
  double factor;
  double* costs;
  int64_t* indices;             // (m, K) running best, in no order; -1 where there is none
  uint8_t* open;                // queries given up
  int64_t most;                 // candidates a query may have before it is given up
  std::atomic<int64_t> patience;  // queries with too many that are compared with all keys instead
  std::atomic<int64_t> first{0}, second{0}, evaluated{0};

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t index_of(int64_t place) const { return int64_t(uint64_t(place) * uint64_t(step) % uint64_t(n)); }
};

// One query on its way.
struct Hunt {
  std::vector<Candidate> list;
  std::vector<Best> best;
  double reach;  // no neighbor is farther
  float base;    // (reach + slip of the query) in units of the first sketch

  // (reach + slip of query i) in units of a stage.
  float span(const Scan& s, int64_t i, int stage) const {
    return round_up((reach / s.unit[stage] + double(s.query[stage].slip[i])) * (1 + 1e-7));
  }
  void aim(const Scan& s, int64_t i, double worst) {
    const double square = s.offset[i] + s.factor * worst + 1e-12 * (s.offset[i] + std::fabs(s.factor * worst));
    reach = std::min(reach, std::sqrt(std::max(0.0, square)) * (1 + 1e-7));
    base = span(s, i, 0);
  }
  void aim(const Scan& s, int64_t i) {
    if (int64_t(best.size()) == s.K) aim(s, i, best.front().first);
  }
};

// The largest squared distance of sketches that reaches a key of this slip, with `base` as of Hunt.
inline int32_t bound(float base, float slip) {
  const float t = base + slip;
  return int32_t(std::min(t * t * 1.000001f + 1.0f, float(kFar / 2)));
}

// Squared distance of the second sketches of a query and a key.
int64_t sketch_distance(const Scan& s, int64_t i, int64_t j) {
  return sum_bytes<true>(s.query[1].data + i * s.width[1], s.key[1].data + j * s.width[1], s.width[1]);
}

// The largest distance of the `count` smallest of a list, or a little more.
int32_t about_kth(const std::vector<Candidate>& list, int64_t count) {
  int32_t low = list[0].distance, high = low;
  for (const Candidate& c : list) low = std::min(low, c.distance), high = std::max(high, c.distance);
  for (int64_t below = int64_t(list.size()); low < high && below > count + count / 8;) {
    const int32_t middle = low + (high - low) / 2;
    int32_t fewer = 0;
    for (const Candidate& c : list) fewer += c.distance <= middle;
    if (fewer >= count) {
      high = middle;
      below = fewer;
    } else {
      low = middle + 1;
    }
  }
  return high;
}

// Evaluates key j for query i; false if it cannot be among the K best.
inline bool evaluate(const Scan& s, Hunt& h, int64_t i, int64_t j) {
  if (int64_t(h.best.size()) == s.K && s.pairs.beyond(i, j, h.best.front().first)) return false;
  offer(h.best, size_t(s.K), {s.pairs.cost(i, j), s.base + j});
  return true;
}

// Evaluates about the `count` most promising candidates, and drops those that are out of reach then.
void tighten(Scan& s, Hunt& h, int64_t i, int64_t count, int64_t& evaluated) {
  auto& list = h.list;
  if (list.empty()) return;
  const int32_t cut = about_kth(list, std::min<int64_t>(count, int64_t(list.size())));
  size_t kept = 0, taken = 0;
  Candidate first[64];
  const auto look = [&] {
    for (size_t c = 0; c < taken; ++c) evaluate(s, h, i, s.index_of(first[c].place));
    evaluated += int64_t(taken);
    taken = 0;
  };
  int64_t left = count;  // of equal ones no more than that: the others keep their place
  for (const Candidate& c : list) {
    if (c.distance > cut || left == 0) {
      list[kept++] = c;
      continue;
    }
    s.pairs.prefetch(s.index_of(c.place));
    first[taken++] = c, --left;
    if (taken == 64) look();
  }
  look();
  h.aim(s, i);
  size_t still = 0;
  for (size_t c = 0; c < kept; ++c) {  // without a branch: one would be mispredicted
    const Candidate one = list[c];
    list[still] = one;
    still += one.distance <= bound(h.base, s.key[0].slip[uint32_t(one.place) / kPanel]);
  }
  list.resize(still);
}

// Takes a query back to where it was before these keys.
void begin(const Scan& s, Hunt& h, int64_t i) {
  h.list.clear();
  h.best.clear();
  for (int64_t k = 0; k < s.K && s.indices[i * s.K + k] >= 0; ++k)
    offer(h.best, size_t(s.K), {s.costs[i * s.K + k], s.indices[i * s.K + k]});
}

// Too many candidates: a few such queries meet all keys here, more of them are left to the caller.
void give_up(Scan& s, Hunt& h, int64_t i, int64_t& evaluated) {
  if (s.patience.fetch_sub(1) <= 0) {
    s.open[i] = 1;
    return;
  }
  begin(s, h, i);
  for (int64_t j = 0; j < s.n; ++j) evaluate(s, h, i, j);
  evaluated += s.n;
}

struct Scratch {
  std::vector<Hunt> hunts;
  std::vector<float> base;           // of the hunts; -1: no longer looked for here
  std::vector<int32_t> own, limit;   // squares of the sketches; what a score may be
  std::vector<std::pair<float, int64_t>> order;
  std::vector<int8_t> packed;
  std::vector<int32_t> start;
};

// Decides what is left of one query.
void finish(Scan& s, Hunt& h, int64_t i, Scratch& w, int64_t& second, int64_t& evaluated) {
  auto& order = w.order;
  order.clear();
  const double unit = s.unit[s.key[1].data ? 1 : 0];
  if (s.key[1].data) {
    second += int64_t(h.list.size());
    const double mine = s.query[1].slip[i];
    for (Candidate& c : h.list) c.place = int32_t(s.index_of(c.place));
    const int8_t* sketches = s.key[1].data;
    const float base = h.span(s, i, 1);
    for (size_t c = 0; c < h.list.size(); ++c) {
      if (c + 8 < h.list.size()) {
        const int64_t next = h.list[c + 8].place;
        for (int64_t b = 0; b < s.width[1]; b += 64) __builtin_prefetch(sketches + next * s.width[1] + b);
        __builtin_prefetch(s.key[1].slip + next);
      }
      const int64_t j = h.list[c].place;
      const int64_t distance = sketch_distance(s, i, j);
      if (distance > bound(base, s.key[1].slip[j])) continue;
      const double near = std::sqrt(double(distance)) * (1 - 1e-12) - mine - double(s.key[1].slip[j]);
      order.push_back({float(near * (near > 0 ? 1 - 1e-7 : 1 + 1e-7)), j});
    }
  } else {
    const double mine = s.query[0].slip[i];
    for (const Candidate& c : h.list) {
      const double near = std::sqrt(double(c.distance)) * (1 - 1e-12) - mine - double(s.key[0].slip[c.place / kPanel]);
      order.push_back({float(near * (near > 0 ? 1 - 1e-7 : 1 + 1e-7)), s.index_of(c.place)});
    }
  }
  // Sorted a stretch at a time: mostly it ends early.
  size_t sorted = 0;
  for (size_t c = 0; c < order.size(); ++c) {
    if (c == sorted) {
      sorted = std::min(order.size(), std::max<size_t>(2 * sorted, 64));
      if (sorted < order.size()) std::nth_element(order.begin() + c, order.begin() + sorted, order.end());
      std::sort(order.begin() + c, order.begin() + sorted);
    }
    if (double(order[c].first) * unit > h.reach) break;
    if (c + 3 < sorted) s.pairs.prefetch(order[c + 3].second);
    ++evaluated;
    if (evaluate(s, h, i, order[c].second)) h.aim(s, i);
  }
}

void scan_tile(Scan& s, int64_t q0, int64_t q1, Scratch& w) {
  const int64_t count = q1 - q0, padded = (count + kRows - 1) / kRows * kRows, panels = s.panels();
  const int64_t width = s.width[0];
  alignas(64) int32_t scores[kRows * kPanel];
  uint64_t hits[kRows];
  w.hunts.resize(size_t(kTile));
  w.base.assign(size_t(padded), -1.0f);
  w.own.assign(size_t(padded), 0);
  w.limit.assign(size_t(padded), kFar / 2);
  w.packed.assign(size_t(padded * width), 0);
  w.start.assign(size_t(padded), 0);
  std::memcpy(w.packed.data(), s.query[0].data + q0 * width, size_t(count * width));
  int64_t first = 0, second = 0, evaluated = 0;
  bool known = true;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = q0 + r;
    Hunt& h = w.hunts[r];
    begin(s, h, i);
    h.reach = std::numeric_limits<double>::infinity();
    h.base = INF;
    h.aim(s, i);
    known = known && (s.open[i] || int64_t(h.best.size()) == s.K);
    int32_t sum = 0;
    for (int64_t c = 0; c < width; ++c) sum += w.packed[r * width + c];
    w.start[r] = -kShift * sum;
    w.own[r] = s.query[0].square[i];
  }
  const auto score = [&](int64_t p, int64_t g) {
    near_tile<Small>(reinterpret_cast<const uint8_t*>(s.key[0].data) + p * kPanel * width, w.packed.data() + g * width,
                     width, width / 4, w.start.data() + g, s.key[0].square + p * kPanel, w.limit.data() + g, scores,
                     hits);
  };
  // Seeds: the best of the first panels, by their sketches, say how far neighbors can be.
  if (!known) {
    const auto keep = [&](int64_t r) {
      Hunt& h = w.hunts[r];
      const auto less = [](const Candidate& a, const Candidate& b) { return a.distance < b.distance; };
      if (int64_t(h.list.size()) <= s.K) return;
      std::nth_element(h.list.begin(), h.list.begin() + (s.K - 1), h.list.end(), less);
      h.list.resize(size_t(s.K));
      w.limit[r] = h.list.back().distance - 1;
    };
    for (int64_t p = 0; p < s.seeds; ++p)
      for (int64_t g = 0; g < count; g += kRows) {
        score(p, g);
        for (int64_t r = g; r < std::min(count, g + kRows); ++r) {
          Hunt& h = w.hunts[r];
          const int32_t* mine = scores + (r - g) * kPanel;
          for (uint64_t hit = hits[r - g]; hit; hit &= hit - 1) {
            const int j = __builtin_ctzll(hit);
            if (mine[j] > w.limit[r]) continue;
            h.list.push_back({mine[j], int32_t(p * kPanel + j)});
            if (int64_t(h.list.size()) >= 3 * s.K + 32) keep(r);
          }
        }
      }
    for (int64_t r = 0; r < count; ++r) {
      Hunt& h = w.hunts[r];
      keep(r);
      if (int64_t(h.best.size()) < s.K && int64_t(h.list.size()) == s.K) {
        double worst = -std::numeric_limits<double>::infinity();
        for (const Candidate& c : h.list) s.pairs.prefetch(s.index_of(c.place));
        for (const Candidate& c : h.list) worst = std::max(worst, s.pairs.cost(q0 + r, s.index_of(c.place)));
        evaluated += s.K;
        h.aim(s, q0 + r, worst);
      }
      h.list.clear();
    }
  }
  const auto aimed = [&](int64_t r) { w.base[r] = w.hunts[r].base; };
  for (int64_t r = 0; r < count; ++r)
    if (!s.open[q0 + r]) aimed(r);
  const int64_t stops[2] = {panels / 4, panels / 2};
  for (int64_t p = 0; p < panels; ++p) {
    if (p > 0 && (p == stops[0] || p == stops[1]))
      for (int64_t r = 0; r < count; ++r)
        if (w.base[r] >= 0) tighten(s, w.hunts[r], q0 + r, s.K, evaluated), aimed(r);
    const float slip = s.key[0].slip[p];
#pragma omp simd
    for (int64_t r = 0; r < padded; ++r) w.limit[r] = w.base[r] < 0 ? -kFar : bound(w.base[r], slip) - w.own[r];
    for (int64_t g = 0; g < count; g += kRows) {
      score(p, g);
      for (int64_t r = g; r < std::min(count, g + kRows); ++r) {
        uint64_t hit = hits[r - g];
        if (!hit) continue;
        Hunt& h = w.hunts[r];
        const int32_t* mine = scores + (r - g) * kPanel;
        const int32_t own = w.own[r], place = int32_t(p * kPanel);
        size_t at = h.list.size();
        h.list.resize(at + size_t(__builtin_popcountll(hit)));
        for (Candidate* to = h.list.data() + at; hit; hit &= hit - 1) {
          const int j = __builtin_ctzll(hit);
          *to++ = {mine[j] + own, place + j};
        }
        if (int64_t(h.list.size()) > s.most) {
          tighten(s, h, q0 + r, s.K, evaluated);
          aimed(r);
          if (2 * int64_t(h.list.size()) > s.most) give_up(s, h, q0 + r, evaluated), w.base[r] = -1.0f;
        }
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = q0 + r;
    Hunt& h = w.hunts[r];
    first += int64_t(h.list.size());
    if (s.open[i]) continue;
    tighten(s, h, i, s.K, evaluated);
    finish(s, h, i, w, second, evaluated);
    for (int64_t k = 0; k < s.K; ++k) {
      const bool there = k < int64_t(h.best.size());
      s.costs[i * s.K + k] = there ? h.best[k].first : 0;
      s.indices[i * s.K + k] = there ? h.best[k].second : -1;
    }
  }
  s.first += first;
  s.second += second;
  s.evaluated += evaluated;
}

}  // namespace

extern "C" {

// Rotates rows (n, d) of `type`, for cosine at length 1, less `mean`: z (n, axes in whole panels of pg_axes()) float32 from
// axes (panels, d, pg_axes()), summed over `block` features at once; and the squared lengths of the rows before and after
// all that. OUT_OF_RANGE: NaN or overflow.
int pg_rotate(const void* rows, int type, int64_t n, int64_t d, int normalise, const float* mean, const float* axes,
              int64_t panels, int64_t block, float* z, double* before, double* after, int threads) {
  std::atomic<bool> fine{true};
  const auto center = [&](auto* x, int64_t i, float* out) {
    bool ok = true;
    const double norm = center_row(x + i * d, mean, d, normalise != 0, out, &ok);
    before[i] = squared_norm(x + i * d, d);
    after[i] = norm * norm;
    if (!ok || !(before[i] < 1e300)) fine = false;
  };
  const int code = guarded([&] {
    run_tasks(threads, ceil_div(n, kTurned), [] { return Buffer(); }, [&](int64_t job, Buffer& work) {
      const int64_t first = job * kTurned, count = std::min(n - first, kTurned);
      float* x = work.get(size_t(kTurned * d));
      for (int64_t r = 0; r < count; ++r) switch (type) {
          case kF32: center((const float*)rows, first + r, x + r * d); break;
          case kF64: center((const double*)rows, first + r, x + r * d); break;
          case kU8: center((const uint8_t*)rows, first + r, x + r * d); break;
          default: center((const int8_t*)rows, first + r, x + r * d);
        }
      std::fill(x + count * d, x + kTurned * d, 0.0f);
      for (int64_t c = 0; c < d; c += block)
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t r = 0; r < count; r += kTurnRows)
            turn_tile(x + r * d + c, d, axes + (p * d + c) * NR, std::min(block, d - c),
                      z + (first + r) * panels * NR + p * NR, panels * NR, std::min<int64_t>(kTurnRows, count - r),
                      c > 0);
    });
  });
  return code ? code : fine ? DONE : OUT_OF_RANGE;
}

int64_t pg_axes() { return NR; }
int pg_supported() { return SKETCHES_ARE_FAST; }
int64_t pg_most() { return Small::kMost; }

// Sketches n rows from their leading coordinates z (n, stride), squared lengths and extra coordinates (may be null).
// numbers: axes, width, unit, lost, least, center of the extra coordinate, center of the rest, largest of a sketch.
// out (n, width), square (n), slip (n).
int pg_sketch(const float* z, int64_t stride, const double* squares, const float* extra, int64_t n,
              const double* numbers, int8_t* out, int32_t* square, float* slip, int threads) {
  const Sketch sketch{int64_t(numbers[0]), int64_t(numbers[1]), extra != nullptr, float(numbers[5]), float(numbers[6]),
                      numbers[2], numbers[3], numbers[4], float(numbers[7])};
  return guarded([&] {
    run_tasks(threads, (n + 63) / 64, [&](int64_t job) {
      std::vector<float> work(size_t(sketch.width));
      for (int64_t i = job * 64; i < std::min(n, job * 64 + 64); ++i)
        slip[i] = sketch.write(z + i * stride, {squares[i], extra ? extra[i] : 0.0f}, out + i * sketch.width,
                               square + i, work.data());
    });
  });
}

// Packs sketches of all n keys, numbers in -pg_most() .. pg_most(), for the first stage: at place t the key
// t * step mod n. panels (panels, width, 48) bytes, squares by place, one slip a panel.
int pg_pack(const int8_t* data, const int32_t* square, const float* slip, int64_t n, int64_t width, int64_t step,
            uint8_t* packed, int32_t* squares, float* slips, int threads) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  return guarded([&] {
    run_tasks(threads, (panels + 15) / 16, [&](int64_t job) {
      for (int64_t p = job * 16; p < std::min(panels, job * 16 + 16); ++p) {
        uint8_t* out = packed + p * kPanel * width;
        slips[p] = 0;
        for (int64_t j = 0; j < kPanel; ++j) {
          const int64_t place = p * kPanel + j;
          if (place >= n) {
            squares[place] = kFar;
            for (int64_t c = 0; c < width; c += 4) std::memset(out + c * kPanel + 4 * j, kShift, 4);
            continue;
          }
          const int64_t key = int64_t(uint64_t(place) * uint64_t(step) % uint64_t(n));
          squares[place] = square[key];
          slips[p] = std::max(slips[p], slip[key]);
          for (int64_t c = 0; c < width; c += 4) {
            uint32_t word;
            std::memcpy(&word, data + key * width + c, 4);
            word = (word ^ 0x80808080u) - 0x01010101u * (128 - kShift);  // no byte borrows from the next
            std::memcpy(out + c * kPanel + 4 * j, &word, 4);
          }
        }
      }
    });
  });
}

// Counts n keys in the best K of m queries. sketches: addresses of (query data, squares, slips, key data, squares,
// slips) of the first stage and of the second, whose key data may be null; keys of the first as pg_pack leaves them, of
// the second in order. sizes: m, n, d, K, base index, step, widths (2), seed panels, most candidates, queries beyond
// that which may be compared with all keys. numbers: units (2), factor. norms: of the queries. costs, indices (m, K):
// the running best, -1 where there is none; open (m): set where a query has too many candidates, its best is then void.
// counts (3): what was left by the first stage, seen by the second, evaluated.
int pg_scan(const void* queries, const void* keys, int type, int metric, const int64_t* sketches, const int64_t* sizes,
            const double* numbers, const double* norms, const double* offset, double* costs, int64_t* indices,
            uint8_t* open, int64_t* counts, int threads) {
  Scan s;
  s.pairs = {queries, keys, type, metric, sizes[2], norms};
  s.m = sizes[0], s.n = sizes[1], s.K = sizes[3], s.base = sizes[4], s.step = sizes[5];
  s.width[0] = sizes[6], s.width[1] = sizes[7];
  s.seeds = std::min(sizes[8], s.panels());
  s.most = sizes[9];
  s.patience = sizes[10];
  s.unit[0] = numbers[0], s.unit[1] = numbers[1], s.factor = numbers[2];
  for (int stage = 0; stage < 2; ++stage) {
    const int64_t* at = sketches + 6 * stage;
    s.query[stage] = {(const int8_t*)at[0], (const int32_t*)at[1], (const float*)at[2]};
    s.key[stage] = {(const int8_t*)at[3], (const int32_t*)at[4], (const float*)at[5]};
  }
  s.offset = offset;
  s.costs = costs, s.indices = indices, s.open = open;
  const int64_t tile = std::max<int64_t>(kRows, std::min<int64_t>(kTile, (s.m + 2 * threads - 1) / (2 * threads)));
  const int code = guarded([&] {
    run_tasks(threads, (s.m + tile - 1) / tile, [] { return Scratch(); }, [&](int64_t job, Scratch& w) {
      scan_tile(s, job * tile, std::min(s.m, job * tile + tile), w);
    });
  });
  counts[0] += s.first, counts[1] += s.second, counts[2] += s.evaluated;
  return code;
}

}  // extern "C"
