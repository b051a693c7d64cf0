// Patches and the windows around them on the CPU: distances of a patch to those of its window, weighted
// sums of patches, and the gradients of both.
//
// A patch is ratio x ratio blocks; a window is `down` x `across` patches. Layouts of an image's blocks
// (those of ops/patches/windows.py):
//   rows     (samples, block_rows, block_cols, padded): the numbers of a block, zeros up to `padded`
//   columns  (samples, block_rows, features, block_cols): one number of all blocks of a row
// The columns may be read up to SLACK floats beyond their end. All memory is the caller's. Plain C
// interface, no dependencies.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDE = 3;  // 7 x WIDE sums and WIDE numbers fit into the registers
#else
constexpr int WIDE = 1;
#endif
constexpr int64_t SLACK = 64, MOST = 4;  // MOST: largest ratio

template <int N>
using Int = std::integral_constant<int, N>;

// Call f(how many, from where) for pieces of at most seven rows.
template <class F>
void in_sevens(int64_t n, F f) {
    int64_t i = 0;
    for (; n - i >= 7; i += 7) f(Int<7>{}, i);
    switch (n - i) {
        case 6: return f(Int<6>{}, i);
        case 5: return f(Int<5>{}, i);
        case 4: return f(Int<4>{}, i);
        case 3: return f(Int<3>{}, i);
        case 2: return f(Int<2>{}, i);
        case 1: return f(Int<1>{}, i);
        default: return;
    }
}

// Call f(how many, from where) for pieces of `Most` vectors, and ever smaller ones for the rest.
template <int Most, class F>
void in_vectors(int64_t n, F f, int64_t i = 0) {
    for (; n - i >= Most; i += Most) f(Int<Most>{}, i);
    if constexpr (Most > 1) in_vectors<Most / 2>(n, f, i);
}

// ------------------------------------------------------------------------------------- threads

struct Scratch {
    const SmallAsZero mode;
    std::vector<float> memory[4];
    float* get(int which, int64_t size) {
        if (static_cast<int64_t>(memory[which].size()) < size) memory[which].resize(size);
        return memory[which].data();
    }
};

// Tasks 0 .. count - 1, each with a thread's scratch; the code of the interface.
template <class Work>
int run_windows(int threads, int64_t count, Work work) {
    return guarded([&] { run_tasks(threads, count, [] { return Scratch(); }, work); });
}

// ------------------------------------------------------------------------------------ geometry

struct Shape {  // in the order of `Windows.sizes`
    int64_t samples, rows, cols, ratio, down, across, channels, side, volumes;
    int64_t height, width, top, left;  // of the image, and of the padding before it

    explicit Shape(const int64_t* sizes) { std::memcpy(this, sizes, sizeof(Shape)); }
    int64_t features() const { return channels * side * side; }
    int64_t padded() const { return (features() + 15) / 16 * 16; }
    int64_t block_rows() const { return rows + ratio - 1; }
    int64_t block_cols() const { return cols + ratio - 1; }
    int64_t candidates() const { return down * across; }
    int64_t vectors() const { return (across + ratio - 1 + VL - 1) / VL; }  // of a row of keys
    int64_t products() const { return (down + ratio - 1) * vectors() * VL; }   // of a block
};

int64_t window_start(int64_t i, int64_t n, int64_t window) {
    return std::min(std::max<int64_t>(i - window / 2, 0), n - window);
}

// Along one axis: the patches low .. high over a block, and the blocks their windows meet it with.
struct Span {
    int64_t low, high, first, size;
    Span(int64_t block, int64_t n, int64_t window, int64_t ratio)
        : low(std::max<int64_t>(0, block - ratio + 1)), high(std::min(n - 1, block)) {
        first = window_start(high, n, window) + block - high;
        size = window_start(low, n, window) + block - low + window - first;
    }
    int64_t patches() const { return high - low + 1; }
};

// ------------------------------------------------------------------------------------- kernels

// R rows, `step` apart, of V vectors.
template <int R, int V>
inline __attribute__((always_inline)) void load_all(const float* from, int64_t step, vf (&x)[R][V]) {
#pragma GCC unroll 7
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[i][v] = load(from + i * step + v * VL);
}

template <int R, int V>
inline __attribute__((always_inline)) void store_all(const vf (&x)[R][V], int64_t step, float* to) {
#pragma GCC unroll 7
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(to + i * step + v * VL, x[i][v]);
}

// out (R, V vectors), plus what is there if `more`: sum over keys of a (R, rows * keys) times
// x (rows, keys, V vectors of `padded`).
template <int R, int V>
void weigh(const float* a, int64_t step, const float* x, int64_t rows, int64_t row_step, int64_t keys,
           int64_t padded, bool more, float* out) {
    vf sum[R][V] = {};
    if (more) load_all(out, padded, sum);
    for (int64_t r = 0; r < rows; ++r, x += row_step, a += keys)
        for (int64_t c = 0; c < keys; ++c) {
            vf b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = load(x + c * padded + v * VL);
#pragma GCC unroll 7
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) sum[i][v] += a[i * step + c] * b[v];
        }
    store_all(sum, padded, out);
}

// Its adjoint for x: x (rows, keys, V vectors of `padded`) += a (R, rows * keys) times g (R, V vectors).
template <int R, int V>
void give(const float* a, int64_t step, float* x, int64_t rows, int64_t row_step, int64_t keys,
          int64_t padded, bool, const float* g) {
    vf from[R][V];
    load_all(g, padded, from);
    for (int64_t r = 0; r < rows; ++r, x += row_step, a += keys)
        for (int64_t c = 0; c < keys; ++c) {
            vf b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = load(x + c * padded + v * VL);
#pragma GCC unroll 7
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) b[v] += a[i * step + c] * from[i][v];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) store(x + c * padded + v * VL, b[v]);
        }
}

// out (R, V vectors), plus what is there if `more`: products over `features` of q (R) with V vectors of
// keys.
template <int R, int V>
void compare(const float* q, int64_t step, int64_t stride, const float* const* keys, int64_t key_step,
             int64_t features, bool more, float* out, int64_t out_step) {
    vf sum[R][V] = {};
    if (more) load_all(out, out_step, sum);
    const float* from[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) from[v] = keys[v];
    for (int64_t f = 0; f < features; ++f, q += stride) {
        vf b[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) b[v] = load(from[v] + f * key_step);
#pragma GCC unroll 7
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[i][v] += q[i * step] * b[v];
    }
    store_all(sum, out_step, out);
}

// ------------------------------------------------------------------- some blocks of a row at a time
//
// The blocks `begin` .. `end` - 1 of row `down`, at most TILE: their windows overlap, so what they have
// in common is taken in pieces of CACHE floats, each for all of these blocks.

constexpr int64_t TILE = 16, CACHE = 8192;

struct Tile {
    const Shape& s;
    const Span& down;
    int64_t begin, end, volumes;
    Span across(int64_t b) const { return Span(b, s.cols, s.across, s.ratio); }
    int64_t size() const { return volumes * s.products(); }  // of the numbers of a block
};

// For all blocks of the tile, in pieces of some window rows and vectors of a block's numbers: calls
// f(volumes, vectors, weights, count, rows, height, line, width, padded, more, sums) with what the piece
// has of the weights (volumes `count` apart), of the rows of the image it meets (`height` of them, `line`
// apart, `width` blocks in each) and of the block's sums (volumes `padded` apart); `more` after the first.
template <int MOST_VECTORS, class Rows, class Sums, class F>
inline __attribute__((always_inline)) void walk_tile(const Tile& t, const float* weights, Rows* rows,
                                                     Sums* sums, F f) {
    const int64_t padded = t.s.padded(), line = t.s.block_cols() * padded;
    in_vectors<MOST_VECTORS>(padded / VL, [&](auto v, int64_t i) {
        const int64_t step = std::max<int64_t>(1, CACHE / (v.value * VL * TILE));
        for (int64_t r = 0; r < t.down.size; r += step)
            for (int64_t b = t.begin; b < t.end; ++b) {
                const Span across = t.across(b);
                const int64_t count = t.down.size * across.size, height = std::min(step, t.down.size - r);
                const float* from = weights + (b - t.begin) * t.size() + r * across.size;
                Rows* x = rows + (t.down.first + r) * line + across.first * padded + i * VL;
                Sums* sum = sums + (b - t.begin) * t.volumes * padded + i * VL;
                in_sevens(t.volumes, [&](auto n, int64_t k) {
                    f(n, v, from + k * count, count, x, height, line, across.size, padded, r > 0,
                      sum + k * padded);
                });
            }
    });
}

// sums (TILE, volumes, padded) of `rows` of a sample under weights (TILE, volumes, keys of the block).
template <int MOST_VECTORS>
void weigh_tile(const Tile& t, const float* weights, const float* rows, float* sums) {
    walk_tile<MOST_VECTORS>(t, weights, rows, sums, [](auto n, auto v, auto... piece) {
        weigh<n.value, v.value>(piece...);
    });
}

// Adjoint for the rows: adds to `rows` what weights (TILE, volumes, keys of the block) take of g
// (TILE, volumes, padded).
template <int MOST_VECTORS>
void give_tile(const Tile& t, const float* weights, const float* g, float* rows) {
    walk_tile<MOST_VECTORS>(t, weights, rows, g, [](auto n, auto v, auto... piece) {
        give<n.value, v.value>(piece...);
    });
}

// Products (block_cols, volumes, down + ratio - 1, vectors) of q with the keys of each block, for the
// blocks of the tile. The q of a block are q_step apart, its volumes `volume_step`, its numbers `stride`.
template <int MOST_VECTORS>
void compare_tile(const Tile& t, const float* q, int64_t q_step, int64_t volume_step, int64_t stride,
                  const float* columns, float* out) {
    const Shape& s = t.s;
    const int64_t line = s.block_cols(), vectors = s.vectors(), features = s.features();
    in_vectors<MOST_VECTORS>(t.down.size * vectors, [&](auto v, int64_t i) {
        int64_t offset[v.value];
        for (int n = 0; n < v.value; ++n)
            offset[n] = (t.down.first + (i + n) / vectors) * features * line + (i + n) % vectors * VL;
        const int64_t width = v.value * std::min(line, TILE + s.across);
        const int64_t pieces = (features * width + CACHE - 1) / CACHE;
        const int64_t step = (features + pieces - 1) / pieces;
        for (int64_t f = 0; f < features; f += step)
            for (int64_t b = t.begin; b < t.end; ++b) {
                const float* keys[v.value];
                for (int n = 0; n < v.value; ++n)
                    keys[n] = columns + offset[n] + f * line + t.across(b).first;
                in_sevens(t.volumes, [&](auto n, int64_t k) {
                    compare<n.value, v.value>(q + (b - t.begin) * q_step + k * volume_step + f * stride, volume_step,
                                              stride, keys, line, std::min(step, features - f), f > 0,
                                              out + b * t.size() + k * s.products() + i * VL,
                                              s.products());
                });
            }
    });
}

// For patch (i, j), the sums of its blocks' products along the diagonal, into out (volumes, down, across).
// products[row % ratio] holds a row of blocks: (block_cols, volumes, down + ratio - 1, vectors).
void sum_patch(const Shape& s, float* const* products, int64_t volumes, int64_t i, int64_t j, float* out) {
    const int64_t top = window_start(i, s.rows, s.down), left = window_start(j, s.cols, s.across);
    const int64_t line = s.vectors() * VL;
    const float* from[MOST * MOST];
    int parts = 0;
    for (int64_t a = i; a < i + s.ratio; ++a)
        for (int64_t b = j; b < j + s.ratio; ++b) {
            const int64_t row = top + a - i - Span(a, s.rows, s.down, s.ratio).first;
            const int64_t col = left + b - j - Span(b, s.cols, s.across, s.ratio).first;
            from[parts++] = products[a % s.ratio] + b * volumes * s.products() + row * line + col;
        }
    for (int64_t v = 0; v < s.across; v += VL) {
        const Lanes lanes(0, s.across - v);
        for (int64_t k = 0; k < volumes; ++k)
            for (int64_t u = 0; u < s.down; ++u) {
                const int64_t at = k * s.products() + u * line + v;
                vf sum = load(from[0] + at);
                for (int p = 1; p < parts; ++p) sum += load(from[p] + at);
                store(out + (k * s.down + u) * s.across + v, sum, lanes);
            }
    }
}

// Its adjoint, for one block: what the patches over block (a, b) give its keys, out (volumes, down.size,
// across.size). `weights` (patch rows from `begin` on, cols, volumes, down, across).
void spread_block(const Shape& s, const float* weights, int64_t begin, int64_t volumes, const Span& down,
                  int64_t a, int64_t b, float* out) {
    const Span across(b, s.cols, s.across, s.ratio);
    const int64_t size = down.size, rows = s.down, line = s.across;
    const float* from[MOST * MOST];  // where the number for key (0, 0) would be
    int64_t row[MOST * MOST], col[MOST * MOST];
    int parts = 0;
    for (int64_t i = down.low; i <= down.high; ++i)
        for (int64_t j = across.low; j <= across.high; ++j, ++parts) {
            row[parts] = window_start(i, s.rows, s.down) + a - i - down.first;
            col[parts] = window_start(j, s.cols, s.across) + b - j - across.first;
            from[parts] = weights + ((i - begin) * s.cols + j) * volumes * s.candidates() -
                          row[parts] * line - col[parts];
        }
    for (int64_t v = 0; v < across.size; v += VL) {
        Lanes lanes[MOST * MOST];
        for (int p = 0; p < parts; ++p)
            lanes[p] = Lanes(std::max<int64_t>(0, col[p] - v), std::max<int64_t>(0, col[p] + line - v));
        const Lanes all(0, across.size - v);
        for (int64_t k = 0; k < volumes; ++k)
            for (int64_t r = 0; r < size; ++r) {
                vf sum = {};
                for (int p = 0; p < parts; ++p)
                    if (r >= row[p] && r < row[p] + rows)
                        sum += load(from[p] + (k * rows + r) * line + v, lanes[p]);
                store(out + (k * size + r) * across.size + v, sum, all);
            }
    }
}

// Between the images (volumes * channels, height, width) of a sample, of which `top` rows and `left`
// columns are cut off, and the numbers of block (a, b), values (volumes, padded), times `scale`: write
// the images, or with `BACK` the values, with zeros for what is cut off.
template <bool BACK>
void move_block(const Shape& s, int64_t a, int64_t b, float scale, float* images, float* values) {
    const int64_t side = s.side, y0 = a * side - s.top, x0 = b * side - s.left;
    const int64_t first = std::max<int64_t>(0, -y0), last = std::min(side, s.height - y0);
    const int64_t plane = s.height * s.width, width = s.width, channels = s.channels;
    if (BACK) std::fill(values, values + s.volumes * s.padded(), 0.f);
    for (int64_t x = 0; x < side; x += VL) {
        const Lanes lanes(std::max<int64_t>(0, -x0 - x), std::max<int64_t>(0, std::min(side, width - x0) - x));
        for (int64_t k = 0; k < s.volumes; ++k) {
            float* value = values + k * s.padded() + x;
            for (int64_t c = 0; c < channels; ++c, value += side * side) {
                float* image = images + (k * channels + c) * plane + y0 * width + x0 + x;
                for (int64_t y = first; y < last; ++y)
                    if (BACK)
                        store(value + y * side, load(image + y * width, lanes) * scale, lanes);
                    else
                        store(image + y * width, load(value + y * side, lanes) * scale, lanes);
            }
        }
    }
}

// What averages over the patches that cover a block.
float average(const Span& down, const Span& across) {
    return 1.f / static_cast<float>(down.patches() * across.patches());
}

// Into how many pieces to cut the rows of each sample, so that every thread gets as many.
int64_t pieces(int64_t samples, int64_t rows, int threads) {
    return std::min<int64_t>(rows, threads / std::gcd<int64_t>(samples, threads));
}

}  // namespace

extern "C" {

// Rows of blocks from images (samples, channels, block_rows * side, block_cols * side); `sizes` are those
// of such images. With `back`, images from rows.
int window_rows(const int64_t* sizes, float* images, float* rows, int back, int threads) {
    const Shape s(sizes);
    const int64_t line = s.block_cols(), padded = s.padded();
    return run_windows(threads, s.samples * s.block_rows(), [=](int64_t task, Scratch&) {
        const int64_t a = task % s.block_rows();
        float* image = images + task / s.block_rows() * s.channels * s.height * s.width;
        for (int64_t b = 0; b < line; ++b)
            if (back)
                move_block<false>(s, a, b, 1.f, image, rows + (task * line + b) * padded);
            else
                move_block<true>(s, a, b, 1.f, image, rows + (task * line + b) * padded);
    });
}

// Columns of blocks from such images.
int window_columns(const int64_t* sizes, const float* images, float* columns, int threads) {
    const Shape s(sizes);
    const int64_t line = s.block_cols(), side = s.side;
    return run_windows(threads, s.samples * s.block_rows(), [=](int64_t task, Scratch&) {
        const int64_t sample = task / s.block_rows(), a = task % s.block_rows();
        float* out = columns + task * s.features() * line;
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t y = 0; y < side; ++y) {
                const float* from = images + ((sample * s.channels + c) * s.height + a * side + y) * s.width;
                for (int64_t x = 0; x < side; ++x, out += line)
                    for (int64_t b = 0; b < line; ++b) out[b] = from[b * side + x];
            }
    });
}

// Squared distances (samples, end - begin, cols, candidates) of the patches in rows begin .. end - 1 and
// the patches of their windows; norms (samples, rows, cols) are the squared norms of all patches.
int window_distances(const int64_t* sizes, const float* columns, const float* norms, float* out,
                     int64_t begin, int64_t end, int threads) {
    const Shape s(sizes);
    const int64_t parts = pieces(s.samples, end - begin, threads), line = s.block_cols();
    return run_windows(threads, s.samples * parts, [=](int64_t task, Scratch& scratch) {
        const int64_t sample = task / parts, part = task % parts;
        const int64_t first = begin + (end - begin) * part / parts;
        const int64_t last = begin + (end - begin) * (part + 1) / parts;
        const float* keys = columns + sample * s.block_rows() * s.features() * line;
        const float* norm = norms + sample * s.rows * s.cols;
        float* to = out + (sample * (end - begin) + first - begin) * s.cols * s.candidates();
        const int64_t row_size = line * s.products();
        float* ring[MOST];
        for (int64_t i = 0; i < s.ratio; ++i) ring[i] = scratch.get(0, s.ratio * row_size + SLACK) + i * row_size;
        for (int64_t a = first; a < last + s.ratio - 1; ++a) {
            const Span down(a, s.rows, s.down, s.ratio);
            for (int64_t b = 0; b < line; b += TILE) {
                const Tile tile{s, down, b, std::min(b + TILE, line), 1};
                compare_tile<4>(tile, keys + a * s.features() * line + b, 1, 0, line, keys,
                                ring[a % s.ratio]);
            }
            const int64_t i = a - s.ratio + 1;
            if (i < first) continue;
            const int64_t top = window_start(i, s.rows, s.down);
            for (int64_t j = 0; j < s.cols; ++j) {
                sum_patch(s, ring, 1, i, j, to);
                const int64_t left = window_start(j, s.cols, s.across);
                const float own = norm[i * s.cols + j];
                for (int64_t u = 0; u < s.down; ++u, to += s.across)
                    for (int64_t v = 0; v < s.across; ++v)
                        to[v] = std::max(0.f, own + norm[(top + u) * s.cols + left + v] - 2 * to[v]);
            }
        }
    });
}

// Gradient of the rows of blocks from that of the distances between all patches; out (parts, samples,
// block_rows, block_cols, padded) holds zeros at first, and one summand of the gradient for each part.
int window_distances_backward(const int64_t* sizes, const float* rows, const float* grad, float* out,
                              int64_t parts, int threads) {
    const Shape s(sizes);
    const int64_t line = s.block_cols(), blocks = s.block_rows() * line, padded = s.padded();
    return run_windows(threads, s.samples * parts, [=](int64_t task, Scratch& scratch) {
        const int64_t sample = task / parts, part = task % parts;
        const float* x = rows + sample * blocks * padded;
        const float* from = grad + sample * s.rows * s.cols * s.candidates();
        float* to = out + (part * s.samples + sample) * blocks * padded;
        float* spread = scratch.get(0, TILE * s.products() + SLACK);
        float* sums = scratch.get(1, TILE * padded);
        float* norms = scratch.get(2, blocks);  // gradient of the squared norms
        std::fill(norms, norms + blocks, 0.f);
        for (int64_t a = s.block_rows() * part / parts; a < s.block_rows() * (part + 1) / parts; ++a) {
            const Span down(a, s.rows, s.down, s.ratio);
            for (int64_t begin = 0; begin < line; begin += TILE) {
                const Tile tile{s, down, begin, std::min(begin + TILE, line), 1};
                const int64_t count = tile.end - begin;
                for (int64_t b = begin; b < tile.end; ++b) {
                    const Span across = tile.across(b);
                    float* one = spread + (b - begin) * tile.size();
                    spread_block(s, from, 0, 1, down, a, b, one);
                    float total = 0;
                    for (int64_t r = 0; r < down.size; ++r, one += across.size) {
                        float* of_keys = norms + (down.first + r) * line + across.first;
                        for (int64_t c = 0; c < across.size; ++c) {
                            total += one[c];
                            of_keys[c] += one[c];
                        }
                    }
                    norms[a * line + b] += total;
                }
                weigh_tile<8>(tile, spread, x, sums);
                const int64_t place = (a * line + begin) * padded;
                for (int64_t f = 0; f < count * padded; ++f) {
                    to[place + f] -= 2 * sums[f];
                    sums[f] = -2 * x[place + f];
                }
                give_tile<8>(tile, spread, sums, to);
            }
        }
        for (int64_t g = 0; g < blocks; ++g)
            for (int64_t f = 0; f < padded; ++f) to[g * padded + f] += 2 * norms[g] * x[g * padded + f];
    });
}

// Weighted sums of patches, averaged where they overlap, into block rows first .. last - 1 of the images
// (samples, volumes * channels, height, width). weights (samples, last_row - first_row, cols, volumes,
// candidates) are those of patch rows first_row .. last_row - 1, among them all over these blocks.
int window_aggregate(const int64_t* sizes, const float* rows, const float* weights, float* images,
                     int64_t first_row, int64_t last_row, int64_t first, int64_t last, int threads) {
    const Shape s(sizes);
    const int64_t line = s.block_cols(), padded = s.padded();
    return run_windows(threads, s.samples * (last - first), [=](int64_t task, Scratch& scratch) {
        const int64_t sample = task / (last - first), a = first + task % (last - first);
        const float* x = rows + sample * s.block_rows() * line * padded;
        const float* from = weights + sample * (last_row - first_row) * s.cols * s.volumes * s.candidates();
        float* image = images + sample * s.volumes * s.channels * s.height * s.width;
        float* spread = scratch.get(0, TILE * s.volumes * s.products() + SLACK);
        float* sums = scratch.get(1, TILE * s.volumes * padded);
        const Span down(a, s.rows, s.down, s.ratio);
        for (int64_t begin = 0; begin < line; begin += TILE) {
            const Tile tile{s, down, begin, std::min(begin + TILE, line), s.volumes};
            for (int64_t b = begin; b < tile.end; ++b)
                spread_block(s, from, first_row, s.volumes, down, a, b, spread + (b - begin) * tile.size());
            weigh_tile<WIDE>(tile, spread, x, sums);
            for (int64_t b = begin; b < tile.end; ++b)
                move_block<false>(s, a, b, average(down, tile.across(b)), image,
                                  sums + (b - begin) * s.volumes * padded);
        }
    });
}

// Gradients of that for all rows: of the weights, and of the rows of blocks as in
// window_distances_backward; a null pointer stands for one that is not wanted.
int window_aggregate_backward(const int64_t* sizes, const float* columns, const float* weights,
                              const float* images, float* grad_weights, float* grad_rows, int64_t parts,
                              int threads) {
    const Shape s(sizes);
    const int64_t line = s.block_cols(), padded = s.padded(), volumes = s.volumes;
    return run_windows(threads, s.samples * parts, [=](int64_t task, Scratch& scratch) {
        const int64_t sample = task / parts, part = task % parts;
        const int64_t first = s.rows * part / parts, last = s.rows * (part + 1) / parts;
        const int64_t size = volumes * s.candidates(), row_size = line * volumes * s.products();
        const float* keys = columns + sample * s.block_rows() * s.features() * line;
        const float* from = weights + sample * s.rows * s.cols * size;
        // Images are only read here.
        float* image = const_cast<float*>(images) + sample * volumes * s.channels * s.height * s.width;
        float* spread = scratch.get(0, TILE * volumes * s.products() + SLACK);
        float* here = scratch.get(1, TILE * volumes * padded);
        float* to = grad_rows + (part * s.samples + sample) * s.block_rows() * line * padded;
        float* ring[MOST];
        for (int64_t i = 0; grad_weights && i < s.ratio; ++i)
            ring[i] = scratch.get(2, s.ratio * row_size + SLACK) + i * row_size;
        for (int64_t a = first; a < last + s.ratio - 1; ++a) {
            const Span down(a, s.rows, s.down, s.ratio);
            const bool own = a < last || last == s.rows;  // others belong to the next part
            for (int64_t begin = 0; begin < line; begin += TILE) {
                const Tile tile{s, down, begin, std::min(begin + TILE, line), volumes};
                for (int64_t b = begin; b < tile.end; ++b)
                    move_block<true>(s, a, b, average(down, tile.across(b)), image,
                                     here + (b - begin) * volumes * padded);
                if (grad_weights)
                    compare_tile<WIDE>(tile, here, volumes * padded, padded, 1, keys, ring[a % s.ratio]);
                if (!grad_rows || !own) continue;
                for (int64_t b = begin; b < tile.end; ++b)
                    spread_block(s, from, 0, volumes, down, a, b, spread + (b - begin) * tile.size());
                give_tile<WIDE>(tile, spread, here, to);
            }
            const int64_t i = a - s.ratio + 1;
            if (!grad_weights || i < first) continue;
            for (int64_t j = 0; j < s.cols; ++j)
                sum_patch(s, ring, volumes, i, j, grad_weights + ((sample * s.rows + i) * s.cols + j) * size);
        }
    });
}
}
