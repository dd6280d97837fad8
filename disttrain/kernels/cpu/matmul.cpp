// The matrix product, float32.
//
//   matmul   c[i, j] = act(sum over p of a[i, p] * b[p, j] + bias[j]), for each matrix of a batch
//
// Blocks of b are copied into panels of 2 vectors, which stay in the L2 cache; a tile keeps PRODUCT_ROWS rows x 2 vectors
// in registers and walks along a panel and along rows of a, which are read where they lie, whatever way, unless they
// crowd in the L1 cache. Few columns are computed as a transpose.
//
// Each element is the sum, in the order of p, of sums of up to DEPTH products, each of them in the order of p. Where
// those begin follows from k alone.
//
// Source: Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.

#include "matmul.h"

#include <algorithm>
#include <atomic>

#include "epilogue.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"
#include "tiles.h"
#include "transpose.h"

namespace disttrain {
namespace {

constexpr int64_t DEPTH = 384;       // products summed in registers; the rows of a for them stay in L1
constexpr int64_t COLUMNS = 512;     // of b copied at a time: 768 KiB, which stay in L2
constexpr int64_t TERMS = 1 << 19;   // of a thread, at least: ten microseconds
constexpr int64_t FEW = 4;           // tiles, one below the other
constexpr int64_t FLOATS_OF_LINE = 16;

static_assert(PRODUCT_ROWS <= LANES && COLUMNS % WIDE == 0);

thread_local Scratch scratch, narrow;

// Returns of how many rows, columns or products a thread should compute at least, each of `count` sums of k terms.
int64_t least(int64_t count, int64_t k) { return std::max<int64_t>(1, TERMS / std::max<int64_t>(1, count * k)); }

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

// The same where line is 1, into panels of WIDE lines, `distance` apart, the last one of LANES where that is enough:
// row after row, as they lie.
void copy(const float* from, int64_t step, int64_t lines, int64_t depth, float* to, int64_t distance) {
    const int64_t last = lines % WIDE, whole = lines - last, width = last > LANES ? WIDE : LANES;
    for (int64_t p = 0; p < depth; p++, from += step) {
        float* at = to + p * WIDE;
        for (int64_t l = 0; l < whole; l += WIDE, at += distance)
            for (int64_t v = 0; v < WIDE; v += LANES) store(at + v, load(from + l + v));
        if (last == 0) continue;
        at += p * (width - WIDE);
        if (last >= LANES) store(at, load(from + whole)), at += LANES;
        if (last % LANES) store(at, load_first(from + lines - last % LANES, last % LANES));
    }
}

// multiply_by_vectors() for few columns: c is computed as a transpose, so that the rows of a, which are many, share vectors.
bool multiply_narrow(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                     const Epilogue& epilogue) {
    if (!narrow.reserve(n * COLUMNS * sizeof(float))) return false;
    float* turned = narrow.take<float>(n * COLUMNS);
    for (int64_t first = 0; first < m; first += COLUMNS) {
        const int64_t rows = std::min(COLUMNS, m - first);
        if (!multiply_by_vectors(n, rows, k, {b.data, b.column, b.row}, {a.data + first * a.row, a.column, a.row}, turned,
                                 COLUMNS, {}))
            return false;
        for (int64_t i = 0; i < rows; i += LANES) {
            Vector square[LANES] = {};
            for (int64_t j = 0; j < n; j++) square[j] = load(turned + j * COLUMNS + i);
            transpose(square);
            for (int64_t q = 0; q < std::min(LANES, rows - i); q++, c += c_row)
                finish(square[q], c, n, epilogue.bias, epilogue);
        }
    }
    return true;
}

}  // namespace

bool multiply_by_vectors(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                         const Epilogue& epilogue) {
    if (m == 0 || n == 0) return true;
    // rows that lie apart by a multiple of 2048 bytes share a few sets of the L1 cache
    const bool slow = a.column != 1 || a.row % 512 == 0;
    if (slow && n <= PRODUCT_ROWS && m > LANES) return multiply_narrow(m, n, k, a, b, c, c_row, epilogue);
    const int64_t blocks = std::max<int64_t>(1, divided_up(k, DEPTH)), deep = divided_up(k, blocks);
    const int64_t panels = divided_up(std::min(n, COLUMNS), WIDE), distance = (deep + 1) * WIDE;
    const int64_t tiles = divided_up(m, PRODUCT_ROWS), rows = divided_up(m, tiles);
    const bool turned = slow && a.row != 1 && n > WIDE;
    const bool straight = tiles == 1 && b.column == 1;
    if (!scratch.reserve(Scratch::rounded(panels * distance * sizeof(float)) +
                         Scratch::rounded((deep * rows + LANES) * sizeof(float))))
        return false;
    float* right = scratch.take<float>(panels * distance);
    float* left = scratch.take<float>(deep * rows + LANES);
    // For few rows of a, to wait for b takes half as long as to compute: then the next block is fetched with each tile.
    const bool fetches = tiles <= FEW;
    const int64_t wide = fetches ? COLUMNS / 2 : COLUMNS;
    for (int64_t j = 0; j < n; j += wide) {
        const int64_t columns = std::min(wide, n - j), whole = straight ? columns - columns % WIDE : 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = std::min(block * deep, k), depth = std::min(deep, k - first);
            const float* of_b = b.data + first * b.row + j * b.column;
            if (b.column == 1) {
                copy(of_b + whole, b.row, columns - whole, depth, right + whole / WIDE * distance, distance);
            } else {
                for (int64_t v = 0; v < columns; v += WIDE) {
                    const int64_t held = std::min(WIDE, columns - v);
                    turn(of_b + v * b.column, b.column, b.row, held, depth, right + v / WIDE * distance,
                         held > LANES ? WIDE : LANES);
                }
            }
            Epilogue now = epilogue;
            now.add = epilogue.add || block > 0;
            if (block + 1 < blocks) now.bias = nullptr, now.relu = false;
            const bool below = block + 1 < blocks;
            const float* ahead = b.data + (below ? first + deep : 0) * b.row + (below ? j : j + wide) * b.column;
            int64_t lines = fetches && (below || j + wide < n) ? (b.column == 1 ? wide : deep) / FLOATS_OF_LINE : 0;
            for (int64_t i = 0; i < m; i += rows) {
                const int64_t height = std::min(rows, m - i);
                Matrix part{a.data + i * a.row + first * a.column, a.row, a.column};
                if (turned) {
                    turn(part.data, a.row, a.column, height, depth, left, rows);
                    part = {left, 1, rows};
                }
                for (int64_t v = 0; v < columns; v += WIDE) {
                    const int64_t held = std::min(WIDE, columns - v);
                    if (now.bias) now.bias = epilogue.bias + j + v;
                    const bool here = v < whole;
                    now.ahead = lines > 0 ? ahead : nullptr;
                    now.ahead_step = lines > 0 ? b.column == 1 ? b.row : b.column : 0;
                    ahead += FLOATS_OF_LINE, lines--;
                    tile_of(height, held)(depth, part, here ? of_b + v : right + v / WIDE * distance,
                                          here ? b.row : held > LANES ? WIDE : LANES, c + i * c_row + j + v, c_row,
                                          held, now);
                }
            }
        }
    }
    return true;
}

bool multiply(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row, const Epilogue& epilogue,
              [[maybe_unused]] Precision precision) {
    const bool by_rows = m >= n;
    std::atomic<bool> done{true};
    parallel(by_rows ? m : n, least(by_rows ? n : m, k), [&](int64_t begin, int64_t end) {
        const int64_t i = by_rows ? begin : 0, j = by_rows ? 0 : begin;
        const int64_t rows = by_rows ? end - begin : m, columns = by_rows ? n : end - begin;
        const Matrix left{a.data + i * a.row, a.row, a.column}, right{b.data + j * b.column, b.row, b.column};
        float* part = c + i * c_row + j;
        Epilogue of_part = epilogue;
        if (epilogue.bias) of_part.bias += j;
#if defined(DISTTRAIN_TILES)
        if (tiles_work()) {
            if (!multiply_by_tiles(rows, columns, k, left, right, part, c_row, of_part, precision)) done = false;
            return;
        }
#endif
        if (!multiply_by_vectors(rows, columns, k, left, right, part, c_row, of_part)) done = false;
    });
    return done;
}

}  // namespace disttrain

using namespace disttrain;

extern "C" {

constexpr int AXES = 4;

// A batch of products. As in disttrain/kernels/matmul.py.
struct Products {
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column;
    int64_t relu, precision;
    int64_t counts[AXES], a_steps[AXES], b_steps[AXES];  // of the batch's axes; unused ones have a count of 1
};

// c: dense, (counts..., m, n), written; bias: (n) or null. Returns 0; 1 where there is no memory.
int disttrain_matmul(const Products* p, const float* a, const float* b, const float* bias, float* c) {
    const Epilogue epilogue{bias, p->relu != 0, false};
    const Precision precision = static_cast<Precision>(p->precision);
    int64_t all = 1;
    for (int64_t count : p->counts) all *= count;
    std::atomic<bool> done{true};
    parallel(all, least(p->m * p->n, p->k), [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; number++) {
            Matrix left{a, p->a_row, p->a_column}, right{b, p->b_row, p->b_column};
            for (int64_t x = AXES - 1, rest = number; x >= 0; rest /= p->counts[x--]) {
                left.data += rest % p->counts[x] * p->a_steps[x];
                right.data += rest % p->counts[x] * p->b_steps[x];
            }
            float* product = c + number * p->m * p->n;
            if (!multiply(p->m, p->n, p->k, left, right, product, p->n, epilogue, precision)) done = false;
        }
    });
    return done ? 0 : 1;
}

}  // extern "C"
