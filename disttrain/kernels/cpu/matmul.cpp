// The matrix product, float32.
//
//   matmul   c[i, j] = act(sum over p of a[i, p] * b[p, j] + bias[j]), for each matrix of a batch
//
// Blocks of b are copied into panels of 2 vectors, which stay in the L2 cache, and a few rows of a at a time into one
// that stays in L1; a tile keeps PRODUCT_ROWS rows x 2 vectors in registers and walks along both. Whatever way a and b
// lie, copying turns them: it costs a few percent, and reading a transpose in place several times as much.
//
// Each element is the sum, in the order of p, of sums of up to DEPTH products, each of them in the order of p. Where
// those begin follows from k alone.
//
// Source: Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.

#include "matmul.h"

#include <algorithm>
#include <utility>

#include "scratch.h"
#include "transpose.h"
#include "vector.h"

namespace disttrain {
namespace {

constexpr int64_t WIDE = 2 * LANES;  // columns of a panel of b
#ifndef DEP
#define DEP 256
#define COL 512
#endif
constexpr int64_t DEPTH = DEP;       // products summed in registers; the rows of a for them stay in L1
#ifndef GRP
#define GRP 8
#endif
constexpr int64_t GROUP = GRP;
constexpr int64_t COLUMNS = COL;     // of b copied at a time: DEPTH x COLUMNS floats are half of an L2 cache

thread_local Scratch scratch;

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Computes a tile of c of ROWS x `columns` <= VECTORS * LANES elements from `depth` products each.
// Element (i, p) of a is a[i * a_row + p * a_step]; b: (depth, VECTORS * LANES), `b_step` apart.
template <int ROWS, int VECTORS>
void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
          int64_t columns, const Epilogue& epilogue) {
    Vector sums[ROWS][VECTORS] = {};
    const float* rows[(ROWS + 2) / 3];  // every third: an address may add once or twice a distance
    for (int i = 0; i < ROWS; i += 3) rows[i / 3] = a + i * a_row;
    for (int64_t p = 0; p < depth; p++, b += b_step) {
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            Vector left = broadcast(rows[i / 3][i % 3 * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add(left, right[v], sums[i][v]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i += 3) rows[i / 3] += a_step;
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++, c += LANES, columns -= LANES) {
        const int64_t held = std::min(LANES, columns);
        const bool whole = held == LANES;
        if (epilogue.add) {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                const float* held_so_far = c + i * c_row;
                sums[i][v] = (whole ? load(held_so_far) : load_first(held_so_far, held)) + sums[i][v];
            }
        }
        if (epilogue.bias) {
            Vector bias = load_first(epilogue.bias + v * LANES, held);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) sums[i][v] += bias;
        }
        if (epilogue.relu) {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) sums[i][v] = Vector{} > sums[i][v] ? Vector{} : sums[i][v];  // NaN stays
        }
        if (whole) {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) store(c + i * c_row, sums[i][v]);
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) store_first(c + i * c_row, sums[i][v], held);
        }
    }
}

using Tile = decltype(&tile<1, 1>);

template <int VECTORS, int... I> Tile tile_of(int64_t rows, std::integer_sequence<int, I...>) {
    static constexpr Tile TILES[] = {tile<I + 1, VECTORS>...};
    return TILES[rows - 1];
}

Tile tile_of(int64_t rows, int64_t columns) {
    auto all = std::make_integer_sequence<int, PRODUCT_ROWS>();
    return columns > LANES ? tile_of<2>(rows, all) : tile_of<1>(rows, all);
}

// One of the matrices as tiles read it: `lines`, rows of a or columns of b, side by side for each p, in panels.
struct Panels {
    int64_t lines, panel;  // of a panel, but for the last one
    int64_t depth;
    float* data;
    int64_t distance;  // of panels
};

// Copies `lines` x `depth` floats, element (l, p) at from[l * line + p * step], to to[p * width + l] where l < `width`,
// with zeros for lines that are missing, and up to LANES floats behind.
void turn(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to, int64_t width) {
    for (int64_t l = 0; l < width; l += LANES, from += LANES * line, to += LANES) {
        const int64_t held = std::max<int64_t>(0, std::min(LANES, lines - l));
        for (int64_t p = 0; p < depth; p += LANES) {
            const int64_t count = std::min(LANES, depth - p);
            Vector square[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const float* at = from + i * line + p * step;
                if (i >= held) square[i] = Vector{};
                else if (step == 1) square[i] = count == LANES ? load(at) : load_first(at, count);
                else for (int64_t q = 0; q < LANES; q++) square[i][q] = q < count ? at[q * step] : 0.0f;
            }
            transpose(square);
            for (int64_t q = 0; q < count; q++) store(to + (p + q) * width, square[q]);
        }
    }
}

// The same where line is 1, for all `panels` of up to `width` lines: reads whole rows, one after the other.
void copy(const float* from, int64_t step, int64_t lines, int64_t depth, float* to, int64_t width, int64_t distance) {
    for (int64_t p = 0; p < depth; p++, from += step, to += width) {
        float* panel = to;
        for (int64_t l = 0; l < lines; l += width, panel += distance) {
            for (int64_t v = 0; v < width; v += LANES) {
                int64_t held = std::min(width, lines - l) - v;
                if (held >= LANES) store(panel + v, load(from + l + v));
                else if (held > 0) store(panel + v, load_first(from + l + v, held));
            }
        }
    }
}

}  // namespace

bool multiply(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row, const Epilogue& epilogue) {
    if (m == 0 || n == 0) return true;
    const int64_t blocks = std::max<int64_t>(1, divided_up(k, DEPTH)), deep = divided_up(k, blocks);
    const int64_t widest = std::min(divided_up(n, LANES) * LANES, COLUMNS);
    const int64_t tiles = divided_up(m, PRODUCT_ROWS), rows = divided_up(m, tiles);
    const int64_t group = std::min(tiles, GROUP);
    // rows of a that lie far apart by a multiple of 4096 bytes share a set of the L1 cache
    const bool direct = n <= WIDE || (a.column == 1 && a.row % 512 != 0);
    const int64_t panel = deep * rows + LANES;
    if (!scratch.reserve(Scratch::rounded((deep * widest + LANES) * sizeof(float)) +
                         Scratch::rounded(direct ? 0 : group * panel * sizeof(float))))
        return false;
    float* right = scratch.take<float>(deep * widest + LANES);
    float* left = scratch.take<float>(direct ? 0 : group * panel);
    for (int64_t j = 0; j < n; j += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, n - j);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = std::min(block * deep, k), depth = std::min(deep, k - first);
            const float* of_b = b.data + first * b.row + j * b.column;
            const bool direct_b = b.column == 1 && tiles == 1;
            const int64_t whole = direct_b ? columns / LANES * LANES : 0;
            const int64_t last = columns % WIDE, even = columns - last;
            if (b.column == 1) {
                if (!direct_b) copy(of_b, b.row, even, depth, right, WIDE, WIDE * depth);
                if (last) copy(of_b + even, b.row, last, depth, right + even * depth, last > LANES ? WIDE : LANES, 0);
            } else {
                for (int64_t v = 0; v < columns; v += WIDE) {
                    int64_t held = std::min(WIDE, columns - v), width = held > LANES ? WIDE : LANES;
                    turn(of_b + v * b.column, b.column, b.row, held, depth, right + v * depth, width);
                }
            }
            Epilogue now = epilogue;
            now.add = epilogue.add || block > 0;
            if (block + 1 < blocks) now.bias = nullptr, now.relu = false;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t i = t * rows, height = std::min(rows, m - i);
                const float* of_a = a.data + i * a.row + first * a.column;
                const float* at = of_a;
                int64_t row = a.row, step = a.column;
                if (!direct) {
                    at = left + t % group * panel, row = 1, step = rows;
                    if (a.row != 1) turn(of_a, a.row, a.column, height, depth, left + t % group * panel, rows);
                    else if (t % group == 0) copy(of_a, a.column, std::min(group * rows, m - i), depth, left, rows, panel);
                }
                for (int64_t v = 0; v < columns; v += WIDE) {
                    int64_t held = std::min(WIDE, columns - v), width = held > LANES ? WIDE : LANES;
                    if (now.bias) now.bias = epilogue.bias + j + v;
                    bool here = v + width <= whole;
                    tile_of(height, held)(depth, at, row, step, here ? of_b + v : right + v * depth, here ? b.row : width,
                                        c + i * c_row + j + v, c_row, held, now);
                }
            }
        }
    }
    return true;
}

}  // namespace disttrain

using namespace disttrain;

extern "C" {

constexpr int AXES = 4;

// A batch of products. As in disttrain/kernels/matmul.py.
struct Products {
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column;
    int64_t relu;
    int64_t counts[AXES], a_steps[AXES], b_steps[AXES];  // of the batch's axes; unused ones have a count of 1
};

// c: dense, (counts..., m, n), written; bias: (n) or null. Returns 0; 1 where there is no memory.
int disttrain_matmul(const Products* p, const float* a, const float* b, const float* bias, float* c) {
    Epilogue epilogue{bias, p->relu != 0, false};
    int64_t all = 1, at[AXES] = {};
    for (int64_t count : p->counts) all *= count;
    for (int64_t number = 0; number < all; number++, c += p->m * p->n) {
        const float *left = a, *right = b;
        for (int x = 0; x < AXES; x++) left += at[x] * p->a_steps[x], right += at[x] * p->b_steps[x];
        if (!multiply(p->m, p->n, p->k, {left, p->a_row, p->a_column}, {right, p->b_row, p->b_column}, c, p->n,
                      epilogue))
            return 1;
        for (int x = AXES - 1; x >= 0 && ++at[x] == p->counts[x]; x--) at[x] = 0;
    }
    return 0;
}

}  // extern "C"
