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
constexpr int64_t DEPTH = 256;       // products summed in registers; the rows of a for them stay in L1
constexpr int64_t COLUMNS = 512;     // of b copied at a time: DEPTH x COLUMNS floats are half of an L2 cache

thread_local Scratch scratch;

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Computes a tile of c of ROWS x `columns` <= VECTORS * LANES elements from `depth` products each.
// a: (depth, ROWS), `a_step` apart; b: (depth, VECTORS * LANES), `b_step` apart.
template <int ROWS, int VECTORS>
void tile(int64_t depth, const float* a, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
          int64_t columns, const Epilogue& epilogue) {
    Vector sums[ROWS][VECTORS] = {};
    for (int64_t p = 0; p < depth; p++, a += a_step, b += b_step) {
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            Vector left = broadcast(a[i]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add(left, right[v], sums[i][v]);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        int64_t held = std::min(LANES, columns - v * LANES);
        Vector bias{};
        if (epilogue.bias) bias = load_first(epilogue.bias + v * LANES, held);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            float* to = c + i * c_row + v * LANES;
            Vector sum = sums[i][v];
            if (epilogue.add) sum = (held == LANES ? load(to) : load_first(to, held)) + sum;
            if (epilogue.bias) sum += bias;
            if (epilogue.relu) sum = Vector{} > sum ? Vector{} : sum;  // in this order NaN stays
            if (held == LANES) store(to, sum);
            else store_first(to, sum, held);
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

// Copies `lines` <= `width` by `depth` floats, element (l, p) at from[l * line + p * step], to to[p * width + l], with
// zeros for the lines that are missing. Up to LANES floats are written behind.
void turn(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to, int64_t width) {
    for (int64_t l = 0; l < width; l += LANES, from += LANES * line, to += LANES) {
        const int64_t held = std::max<int64_t>(0, std::min(LANES, lines - l));
        if (line == 1 && held == LANES) {
            for (int64_t p = 0; p < depth; p++) store(to + p * width, load(from + p * step));
        } else if (line == 1) {
            for (int64_t p = 0; p < depth; p++) store(to + p * width, load_first(from + p * step, held));
        } else {
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
}

}  // namespace

bool multiply(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row, const Epilogue& epilogue) {
    if (m == 0 || n == 0) return true;
    const int64_t blocks = std::max<int64_t>(1, divided_up(k, DEPTH)), deep = divided_up(k, blocks);
    const int64_t widest = std::min(divided_up(n, LANES) * LANES, COLUMNS);
    const int64_t tiles = divided_up(m, PRODUCT_ROWS);
    if (!scratch.reserve(Scratch::rounded(deep * widest * sizeof(float)) +
                         Scratch::rounded((deep * PRODUCT_ROWS + LANES) * sizeof(float))))
        return false;
    float* right = scratch.take<float>(deep * widest);
    float* left = scratch.take<float>(deep * PRODUCT_ROWS + LANES);
    for (int64_t j = 0; j < n; j += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, n - j);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = std::min(block * deep, k), depth = std::min(deep, k - first);
            for (int64_t v = 0; v < columns; v += WIDE) {
                int64_t held = std::min(WIDE, columns - v), width = held > LANES ? WIDE : LANES;
                turn(b.data + first * b.row + (j + v) * b.column, b.column, b.row, held, depth, right + v * depth, width);
            }
            Epilogue now = epilogue;
            now.add = epilogue.add || block > 0;
            if (block + 1 < blocks) now.bias = nullptr, now.relu = false;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t i = m * t / tiles, rows = m * (t + 1) / tiles - i;  // all of them nearly equal
                turn(a.data + i * a.row + first * a.column, a.row, a.column, rows, depth, left, rows);
                for (int64_t v = 0; v < columns; v += WIDE) {
                    int64_t held = std::min(WIDE, columns - v);
                    if (now.bias) now.bias = epilogue.bias + j + v;
                    tile_of(rows, held)(depth, left, rows, right + v * depth, held > LANES ? WIDE : LANES,
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
