// Neighbor search for float32 tensors on a CPU: nearest_neighbors of ops/maps/search.py, topk_rows of ops/topk.py.
//
// Plain C entry points (loaded by ctypes, no torch headers: it compiles in seconds). Nothing here allocates results;
// every function works on contiguous row-major arrays of the caller, whose PyTorch path gives the same answers.
// Symbols: B batch, M queries, N keys, C channels, K neighbors.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "eightbit.h"
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

constexpr int TASK_ROWS = 8 * MR;  // queries a thread takes at a time
static_assert(TASK_ROWS % TILE == 0, "tasks are whole tiles in float32 and in 8 bits");

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
      acc[i][0] = multiply_add(x, b0, acc[i][0]);
      acc[i][1] = multiply_add(x, b1, acc[i][1]);
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

inline float inverse_of(float square) { return 1.f / std::max(std::sqrt(square), 1e-12f); }
inline float inverse_norm(const float* a, int64_t n) { return inverse_of(dot(a, a, n)); }

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

  // Where each key of sample b stands among the candidates, -1 for those that are none.
  void find_places(int64_t b, int32_t* at) const {
    std::fill(at, at + N, -1);
    for (int64_t j = count - 1; j >= 0; --j) at[names(b)[j]] = static_cast<int32_t>(j);
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

  int64_t row_tasks() const { return ceil_div(M, TASK_ROWS); }

  // The search in float32, of the tasks that `done` does not mark.
  void run_floats(const std::vector<uint8_t>& done) {
    std::vector<int64_t> samples;
    for (int64_t b = 0; b < B; ++b) {
      const auto mine = done.begin() + b * row_tasks();
      if (std::find(mine, mine + row_tasks(), 0) != mine + row_tasks()) samples.push_back(b);
    }
    if (samples.empty()) return;
    const int64_t left = static_cast<int64_t>(samples.size());
    const int found = static_cast<int>(K) - own_places();
    const int64_t key_bytes = C * 4;
    const int64_t panels_all = ceil_div(count, NR);
    // Sizes: a chunk stays in a core's own cache, a span of packed keys in the shared one.
    const int64_t chunk = std::max<int64_t>(2, std::min<int64_t>(2048 / NR, (400 << 10) / (key_bytes * NR)));
    const int64_t span = std::min(panels_all, ceil_div(std::max<int64_t>(chunk, (8 << 20) / (key_bytes * NR)), chunk) * chunk);
    const int64_t group = std::min(left, std::max<int64_t>(threads, (4 << 20) / (span * NR * key_bytes)));
    const int num_lanes = lane_count(found);
    Buffer packed, bias;
    packed.get(static_cast<size_t>(group * span) * NR * C);
    bias.get(static_cast<size_t>(group * span) * NR);
    std::vector<int32_t> place;  // where a key stands among the candidates
    if (self && candidates) place.resize(group * N);

    for (int64_t b0 = 0; b0 < left; b0 += group) {
      const int64_t images = std::min(group, left - b0);
      for (int64_t p0 = 0; p0 < panels_all; p0 += span) {
        const int64_t panels = std::min(span, panels_all - p0);
        const int64_t pieces = ceil_div(panels, 8);
        run_tasks(threads, images * pieces, [&](int64_t task) {
          const int64_t i = task / pieces, b = samples[b0 + i], first = task % pieces * 8;
          for (int64_t p = first; p < std::min(panels, first + 8); ++p) {
            const int64_t key0 = (p0 + p) * NR;
            pack_keys(b, key0, std::min<int64_t>(NR, count - key0), packed.data + (i * span + p) * NR * C,
                      bias.data + (i * span + p) * NR);
          }
          if (!place.empty() && first == 0 && p0 == 0) find_places(b, place.data() + i * N);
        });
        run_tasks(threads, images * row_tasks(), [] { return Scratch(); }, [&](int64_t task, Scratch& w) {
          const int64_t i = task / row_tasks(), b = samples[b0 + i], m0 = task % row_tasks() * TASK_ROWS;
          const int64_t rows = std::min<int64_t>(TASK_ROWS, M - m0);
          if (done[b * row_tasks() + task % row_tasks()]) return;
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
      if (is_first) begin_row(b, m0 + r, x, scale);
    }
  }

  // An empty list for query m, which is x, or one with the query itself at its head.
  void begin_row(int64_t b, int64_t m, const float* x, float scale) const {
    float* best = values + (b * M + m) * K;
    int64_t* index = indices + (b * M + m) * K;
    std::fill(best, best + K, -INF);
    std::fill(index, index + K, -1);
    if (own_places()) {
      const float* y = keys + (b * N + own(b, m)) * C;
      index[0] = own(b, m);
      best[0] = dot(x, y, C) * (metric == COSINE ? scale * (x == y ? scale : inverse_norm(y, C)) : 1.f);
      if (metric == EUCLIDEAN) best[0] -= 0.5f * dot(y, y, C);
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

// The search through 8-bit scores (eightbit.h), with the answers of the one in float32: whatever bound and threshold
// cannot rule out is scored in float32 in the same order of operations. Tasks that it does not suit (numbers that are
// not finite or bounds too wide for the sums, many keys that cannot be ruled out) are left for the float32 search.
struct ByteSearch {
  const Search& s;
  const int found = static_cast<int>(s.K) - s.own_places();
  const int64_t words = ceil_div(s.C, GROUP), panels = ceil_div(s.count, PANEL);
  // A chunk of keys and a tile's scores of it stay in a core's own cache.
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(4416, (300 << 10) / (4 * words)) / PANEL);
  const int num_lanes = byte_lanes(found);

  // What is known of a sample, and of the keys in its panels.
  struct Sample {
    float low, high, most, left, step, query_step;  // of the keys: range, longest, most lost
    bool fits;
    std::atomic<int64_t> rows{0}, kept{0};  // queries searched, keys scored in float32 for them
  };
  struct Part {  // of a sample, before it is quantised
    float low = INF, high = -INF, most = 0, query = 0;
    bool finite = true;
  };
  struct Work : Scratch {
    Buffer queries, numbers, scores, lanes, exact, scale, bias;
    std::vector<int32_t> where;
    std::vector<uint64_t> bits;
    std::vector<const float*> rows;
  };

  // Whether packing can pay, and packed keys stay within what the float32 search packs at a time.
  bool pays() const {
    return BYTES_ARE_FAST && found > 0 && s.C >= 16 && s.C <= MOST_CHANNELS && s.count >= 256 && s.M >= 64 &&
           panels * PANEL * words * 4 <= (8 << 20);
  }

  // Keys a query may have scored in float32 on average: each costs several times what 8 bits save on one.
  int64_t most_kept() const { return s.count / 8; }

  void run(std::vector<uint8_t>& done) {
    constexpr int64_t PIECE = 480;  // keys: whole panels
    const int64_t size = panels * PANEL * words, pieces = ceil_div(s.count, PIECE), tasks = s.row_tasks();
    const int64_t group = std::min(s.B, std::max<int64_t>(s.threads, (2 << 20) / (size * 4)));
    Buffer packed, factors, biases, rounded;
    packed.get(group * size);
    factors.get(group * s.count);
    biases.get(group * s.count);
    rounded.get(group * panels * PANEL);
    std::vector<Part> parts(group * pieces);
    std::vector<float> left(group * pieces);
    std::unique_ptr<Sample[]> samples(new Sample[group]);
    std::vector<int32_t> place;
    if (s.self && s.candidates) place.resize(group * s.N);
    for (int64_t b0 = 0, images; b0 < s.B; b0 += images) {
      if (2 * std::count(done.begin(), done.begin() + b0 * tasks, 0) > b0 * tasks) return;  // others will be no better
      images = std::min(b0 ? group : std::min<int64_t>(group, s.threads), s.B - b0);
      run_tasks(s.threads, images * pieces, [&](int64_t task) {
        const int64_t i = task / pieces, first = task % pieces * PIECE;
        parts[task] = look_at(b0 + i, first, std::min(PIECE, s.count - first), task % pieces, pieces,
                              factors.data + i * s.count, biases.data + i * s.count);
        if (!place.empty() && first == 0) s.find_places(b0 + i, place.data() + i * s.N);
      });
      for (int64_t i = 0; i < images; ++i) settle(samples[i], parts.data() + i * pieces, pieces);
      run_tasks(s.threads, images * pieces, [&](int64_t task) {
        const int64_t i = task / pieces, first = task % pieces * PIECE;
        if (samples[i].fits)
          left[task] = pack(b0 + i, first, std::min(PIECE, s.count - first), samples[i],
                            factors.data + i * s.count, biases.data + i * s.count,
                            reinterpret_cast<int32_t*>(packed.data) + i * size,
                            reinterpret_cast<int32_t*>(rounded.data) + i * panels * PANEL);
      });
      for (int64_t i = 0; i < images; ++i)
        samples[i].left = *std::max_element(&left[i * pieces], &left[i * pieces] + pieces);
      run_tasks(s.threads, images * tasks, [] { return Work(); }, [&](int64_t task, Work& w) {
        const int64_t i = task / tasks, m0 = task % tasks * TASK_ROWS;
        Sample& sample = samples[i];
        if (!sample.fits || sample.kept > most_kept() * (sample.rows + TILE)) return;
        done[(b0 + i) * tasks + task % tasks] = search_rows(
            b0 + i, m0, std::min<int64_t>(TASK_ROWS, s.M - m0), sample, factors.data + i * s.count,
            biases.data + i * s.count, reinterpret_cast<const int32_t*>(packed.data) + i * size,
            reinterpret_cast<const int32_t*>(rounded.data) + i * panels * PANEL,
            place.empty() ? nullptr : place.data() + i * s.N, w);
      });
    }
  }

  // The factor and bias of some keys, their range and length; for distances also that of a share of the queries.
  Part look_at(int64_t b, int64_t first, int64_t rows, int64_t part, int64_t parts, float* factor, float* bias) const {
    Part p;
    vf least = splat(INF), most = splat(-INF);
    const auto range = [&](const float* x, float f) {
      int64_t c = 0;
      for (; c + VL <= s.C; c += VL) {
        const vf v = load(x + c) * f;
        least = v < least ? v : least;
        most = vmax(v, most);
      }
      for (; c < s.C; ++c) {
        p.low = std::min(p.low, x[c] * f);
        p.high = std::max(p.high, x[c] * f);
      }
    };
    const auto reduce = [&] {
      for (int l = 0; l < VL; ++l) p.low = std::min(p.low, least[l]), p.high = std::max(p.high, most[l]);
    };
    if (s.metric == EUCLIDEAN) {  // all queries of a sample share one scale, so that biases are the same for all
      for (int64_t m = s.M * part / parts; m < s.M * (part + 1) / parts; ++m) range(s.query(b, m), 1.f);
      reduce();
      p.query = std::max(-p.low, p.high);
      p.low = INF, p.high = -INF, least = splat(INF), most = splat(-INF);
    }
    for (int64_t j = first; j < first + rows; ++j) {
      const float* y = s.key(b, j);
      const float square = dot(y, y, s.C);
      if (!(square < 1e30f)) p.finite = false;
      factor[j] = s.metric == COSINE ? inverse_of(square) : 1.f;
      bias[j] = s.metric == EUCLIDEAN ? -0.5f * square : 0.f;
      p.most = std::max(p.most, s.metric == COSINE ? 1.f : square);
      range(y, factor[j]);
    }
    reduce();
    return p;
  }

  void settle(Sample& sample, const Part* parts, int64_t count) const {
    Part all;
    for (int64_t i = 0; i < count; ++i) {
      all.low = std::min(all.low, parts[i].low);
      all.high = std::max(all.high, parts[i].high);
      all.most = std::max(all.most, parts[i].most);
      all.query = std::max(all.query, parts[i].query);
      all.finite = all.finite && parts[i].finite;
    }
    sample.low = all.low, sample.high = all.high, sample.most = std::sqrt(all.most);
    sample.step = (all.high - all.low) / 255.f;
    sample.query_step = all.query / 127.f;
    sample.rows = sample.kept = 0;
    sample.left = 0;
    sample.fits = all.finite && sample.step > 1e-15f;
    if (s.metric == EUCLIDEAN)
      sample.fits = sample.fits && sample.query_step > 1e-15f && sample.query_step < 1e15f &&
                    0.5 * all.most < double(1 << 29) * sample.step * sample.query_step;
  }

  // Some keys as panels; returns the most that one of them loses.
  float pack(int64_t b, int64_t first, int64_t rows, const Sample& sample, const float* factor, const float* bias,
             int32_t* packed, int32_t* rounded) const {
    std::vector<int32_t> row(words + VL);
    const double unit = double(sample.step) * sample.query_step;
    float most = 0;
    for (int64_t j = first; j < ceil_div(first + rows, PANEL) * PANEL; ++j) {
      int32_t* to = packed + j / PANEL * PANEL * words + j % PANEL;
      if (j >= first + rows) {
        rounded[j] = PADDING;
        for (int64_t w = 0; w < words; ++w) to[w * PANEL] = 0;
        continue;
      }
      const Quantised q = quantise(s.key(b, j), factor[j], s.C, sample.low, sample.step, 0, 255,
                                   reinterpret_cast<KeyNumber*>(row.data()));
      most = std::max(most, q.left);
      rounded[j] = s.metric == EUCLIDEAN ? static_cast<int32_t>(std::lrint(bias[j] / unit)) : 0;
      for (int64_t w = 0; w < words; ++w) to[w * PANEL] = row[w];
    }
    // What float32 may have rounded away from it.
    return most * 1.001f + std::sqrt(float(s.C)) * 5e-7f * (std::fabs(sample.low) + std::fabs(sample.high));
  }

  // How far a query's 8-bit scores may be off, a little more, in their own unit; and what they lack beside `unit`.
  struct Bound {
    double unit, lack;
    int32_t error;
    bool zero;
  };

  // Quantises a query: x, already scaled, to `numbers`. False if its bound is too wide.
  bool bound(const float* x, const Sample& sample, QueryNumber* numbers, Bound& out) const {
    vf largest = {}, squares = {};
    int64_t c = 0;
    for (; c + VL <= s.C; c += VL) {
      const vf v = load(x + c);
      largest = vmax(vmax(v, -v), largest);
      squares += v * v;
    }
    float most = 0, square = sum_of(squares);
    for (int l = 0; l < VL; ++l) most = std::max(most, largest[l]);
    for (; c < s.C; ++c) most = std::max(most, std::fabs(x[c])), square += x[c] * x[c];
    const float length = std::sqrt(square);
    std::fill(numbers, numbers + words * GROUP, QueryNumber(0));
    out = {1, 0, 1, most == 0.f};
    if (!(length < 1e15f)) return false;  // or not a number
    if (out.zero) return true;
    const float step = s.metric == EUCLIDEAN ? sample.query_step : most / 127.f;
    if (!(step > 1e-15f)) return false;
    const Quantised q = quantise(x, 1.f, s.C, 0.f, step, -127, 127, numbers);
    const double lost = q.left + 3e-7 * length, longest = sample.most + sample.left;
    const double rounding = (2 * s.C + 16) * 6e-8 * (length * longest + sample.most * sample.most);
    out.unit = double(step) * sample.step;
    out.lack = double(step) * sample.low * q.sum;
    const double error = 1.001 * (length * sample.left + lost * longest + rounding) / out.unit + 2;
    if (!(error < 1 << 27)) return false;
    out.error = static_cast<int32_t>(error) + 1;
    return true;
  }

  // False if it gave up: the rows are then to be searched in float32.
  bool search_rows(int64_t b, int64_t m0, int64_t rows, Sample& sample, const float* factor, const float* bias,
                   const int32_t* packed, const int32_t* rounded, const int32_t* place, Work& w) const {
    const int64_t tiles = ceil_div(rows, TILE), C = s.C;
    float* queries = w.queries.get(tiles * TILE * C);
    int32_t* numbers = reinterpret_cast<int32_t*>(w.numbers.get(tiles * TILE * words));
    Bound bounds[TASK_ROWS];
    std::memset(numbers, 0, tiles * TILE * words * 4);
    const bool known = !s.queries && !s.candidates;  // the query's factor, as that of a key
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = s.query(b, m0 + r);
      const float scale = s.metric != COSINE ? 1.f : known ? factor[s.own(b, m0 + r)] : inverse_norm(x, C);
      s.begin_row(b, m0 + r, x, scale);
      for (int64_t c = 0; c < C; ++c) queries[r * C + c] = x[c] * scale;
      if (!bound(queries + r * C, sample, reinterpret_cast<QueryNumber*>(numbers + r * words), bounds[r])) return false;
      if (bounds[r].zero && s.metric != EUCLIDEAN) first_places(b, m0 + r);
    }
    const int64_t ld = std::min(chunk, panels) * PANEL, bits_ld = ld / 64 + 9;
    int32_t* scores = reinterpret_cast<int32_t*>(w.scores.get(TILE * ld));
    int32_t* lanes = reinterpret_cast<int32_t*>(w.lanes.get(TILE * num_lanes));
    if (w.where.size() < size_t(ld)) w.where.resize(ld), w.rows.resize(ld + 8), w.bits.resize(TILE * bits_ld);
    const int turns = num_lanes / PANEL;
    int64_t kept = 0, before = 0;
    for (int64_t p0 = 0; p0 < panels; p0 += chunk) {
      const int64_t width = std::min(chunk, panels - p0), key0 = p0 * PANEL;
      // Once lists are full and few keys pass their last places, those alone are looked for.
      const bool compares = COMPARES && p0 > 0 && kept - before < 24 * rows;
      before = kept;
      for (int64_t t = 0; t < tiles; ++t) {
        if (compares) {
          int32_t floors[TILE];
          for (int64_t r = 0; r < TILE; ++r)
            floors[r] = t * TILE + r < rows ? floor_of_list(b, m0 + t * TILE + r, bounds[t * TILE + r]) : 1 << 30;
          for (int64_t p = 0; p < width; ++p)
            compare_bytes(numbers + t * TILE * words, packed + (p0 + p) * PANEL * words, words,
                          rounded + (p0 + p) * PANEL, floors,
                          reinterpret_cast<uint16_t*>(w.bits.data()) + p * (PANEL / 16), 4 * bits_ld);
          for (int64_t r = t * TILE; r < std::min(rows, (t + 1) * TILE); ++r) {
            if (bounds[r].zero && s.metric != EUCLIDEAN) continue;
            uint64_t* bits = w.bits.data() + r % TILE * bits_ld;
            if (s.self) {
              const int64_t at = own_place(b, m0 + r, place) - key0;
              if (at >= 0 && at < width * PANEL) bits[at / 64] &= ~(1ull << at % 64);
            }
            kept += decide(b, m0 + r, bits, width, key0, queries + r * C, factor, bias, w);
          }
          continue;
        }
        std::fill(lanes, lanes + TILE * num_lanes, LOWEST);
        for (int64_t p = 0; p < width; ++p)
          score_bytes(numbers + t * TILE * words, packed + (p0 + p) * PANEL * words, words, rounded + (p0 + p) * PANEL,
                      scores + p * PANEL, ld, lanes + p % turns * PANEL, num_lanes);
        int32_t floors[8], with_own[8];
        thresholds(lanes, bounds + t * TILE, std::min<int64_t>(TILE, rows - t * TILE), floors, with_own);
        for (int64_t r = t * TILE; r < std::min(rows, (t + 1) * TILE); ++r) {
          if (bounds[r].zero && s.metric != EUCLIDEAN) continue;
          int32_t* row = scores + r % TILE * ld;
          int32_t floor = floors[r % TILE];
          if (s.self) {
            const int64_t at = own_place(b, m0 + r, place) - key0;
            if (at >= 0 && at < width * PANEL) row[at] = LOWEST, floor = with_own[r % TILE];
          }
          floor = std::max(floor, floor_of_list(b, m0 + r, bounds[r]));
          compare(row, width * PANEL, floor, w.bits.data());
          kept += decide(b, m0 + r, w.bits.data(), width, key0, queries + r * C, factor, bias, w);
        }
        if (p0 == 0 && kept > most_kept() * (t + 2) * TILE) {
          sample.kept += kept, sample.rows += (t + 1) * TILE;
          return false;
        }
      }
      if (kept > most_kept() * (rows + TILE)) {
        sample.kept += kept, sample.rows += rows;
        return false;
      }
    }
    sample.kept += kept, sample.rows += rows;
    s.finish_rows(b, m0, rows, found);
    return true;
  }

  // A query of zeros is equally near to all keys: the first ones are taken.
  void first_places(int64_t b, int64_t m) const {
    const int64_t own = s.own(b, m), at = (b * s.M + m) * s.K + s.own_places();
    for (int64_t j = 0, taken = 0; taken < found; ++j) {
      const int64_t name = s.candidates ? s.names(b)[j] : j;
      if (s.self && name == own) continue;
      s.values[at + taken] = 0.f;
      s.indices[at + taken++] = name;
    }
  }

  // For each row the least score of a key that may be among the best of this chunk, without and with the query's own
  // among the lanes: the `found` best lanes are scores of as many keys.
  void thresholds(const int32_t* lanes, const Bound* bounds, int64_t rows, int32_t* floors, int32_t* with_own) const {
    v8i kth, next;
    const bool short_lists = found <= 16;
    if (short_lists) {
      for (int64_t first = 0; first < rows; first += 8) {
        const int32_t* at[8];
        for (int64_t r = 0; r < 8; ++r) at[r] = lanes + std::min(r, rows - 1) * num_lanes;
        if (found <= 4) kth_of_rows<5>(at, num_lanes, found, kth, next);
        else if (found <= 8) kth_of_rows<9>(at, num_lanes, found, kth, next);
        else kth_of_rows<17>(at, num_lanes, found, kth, next);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t error = bounds[r].error, *mine = lanes + r * num_lanes;
      const auto floor = [&](int64_t k) {
        return static_cast<int32_t>(std::max<int64_t>(PADDING + 1, k - 2 * int64_t(error)));
      };
      floors[r] = floor(short_lists ? kth[r] : about_kth(mine, num_lanes, found, error / 8));
      with_own[r] = s.self ? floor(short_lists ? next[r] : about_kth(mine, num_lanes, found + 1, error / 8)) : floors[r];
    }
  }

  // Where the query itself stands among those that compete, -1 if it does not.
  int64_t own_place(int64_t b, int64_t m, const int32_t* place) const {
    return place ? place[s.own(b, m)] : s.own(b, m);
  }

  int64_t list(int64_t b, int64_t m) const { return (b * s.M + m) * s.K + s.own_places(); }

  // The least 8-bit score of a key that may come before the last of a full list.
  int32_t floor_of_list(int64_t b, int64_t m, const Bound& bound) const {
    const int64_t last = list(b, m) + found - 1;
    if (s.indices[last] < 0) return PADDING + 1;
    const double floor = (s.values[last] - bound.lack) / bound.unit - bound.error - 1;
    return static_cast<int32_t>(std::min<double>(std::max<double>(floor, PADDING + 1), 1 << 30));
  }

  // Scores the keys in `bits` in float32 and puts them in the query's list; returns how many those were.
  int decide(int64_t b, int64_t m, uint64_t* bits, int64_t width, int64_t key0, const float* x, const float* factor,
             const float* bias, Work& w) const {
    float* best = s.values + list(b, m);
    int64_t* index = s.indices + list(b, m);
    int32_t* where = w.where.data();
    const int count = survivors(bits, width * PANEL, where);
    if (!count) return 0;
    const int64_t* names = s.names(b);
    const float** rows = w.rows.data();
    const int filled = (count + 7) / 8 * 8;  // by the last one again
    float* scales = w.scale.get(filled);
    float* biases = w.bias.get(filled);
    float* exact = w.exact.get(filled);
    for (int i = 0; i < filled; ++i) {
      const int64_t j = key0 + where[std::min(i, count - 1)];
      rows[i] = s.key(b, j);
      for (int64_t c = 0; c < s.C; c += 16) __builtin_prefetch(rows[i] + c);
      scales[i] = factor[j];
      biases[i] = bias[j];
    }
    if (s.metric == COSINE) exact_scores<true>(x, rows, scales, biases, s.C, filled, exact);
    else exact_scores<false>(x, rows, scales, biases, s.C, filled, exact);
    float least = index[found - 1] >= 0 ? std::nextafter(best[found - 1], INF) : -INF;
    if (count > 48) {
      float* most = w.Scratch::lanes.get(lane_count(found));
      const int lanes = lane_count(found);
      std::fill(most, most + lanes, -INF);
      for (int i = 0, l = 0; i < count; ++i, l = l + 1 == lanes ? 0 : l + 1) most[l] = std::max(most[l], exact[i]);
      least = std::max(least, kth_largest(most, lanes, found, w.copy));
    }
    float* taken = w.Scratch::values.get(count + 2 * VL);
    if (w.Scratch::where.size() < size_t(count + 2 * VL)) w.Scratch::where.resize(count + 2 * VL);
    int passed = 0;
    for (int i = 0; i < count; ++i) {
      taken[passed] = exact[i];
      w.Scratch::where[passed] = where[i];
      passed += exact[i] >= least;
    }
    if (passed) merge(passed, found, key0, names, w, best, index);
    return count;
  }
};

void search(Search s) {
  std::vector<uint8_t> done(s.B * s.row_tasks(), 0);
  ByteSearch bytes{s};
  if (bytes.pays()) bytes.run(done);
  s.run_floats(done);
}

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
    search(Search{queries, keys, B, M, N, C, K, metric, self, self_step, exclude, candidates, candidate_step, count,
                  values, indices, threads});
  });
}

}  // extern "C"
