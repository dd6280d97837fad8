// The matrix product by matrix units, which multiply bfloat16 and add in float32.
//
// A float is split into parts, each the bfloat16 that is nearest to what the parts before it leave:
//
//   medium    1 part,  1 product    a1 b1
//   high      2 parts, 3 products   a1 b1 + a1 b2 + a2 b1
//   highest   3 parts, 6 products   and a2 b2 + a1 b3 + a3 b1
//
// What is left is up to 2^-8 of what there was. Three parts are the float (24 bits), so that "highest" leaves out up to
// 2^-23 |a| |b| of a product, what two roundings to float32 may; "high" leaves out up to 3 * 2^-16, "medium" 2 * 2^-8.
// What comes out infinite or NaN is computed again with vectors: the parts of infinity are infinity and NaN. Denormal
// parts count as 0, so of numbers below 2^-110 fewer bits count.
//
// Each element is one sum, in the order of 32 terms by 32, whatever is computed with it.
//
// Source: Henry, Tang & Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019. This has been run with the model of tiles.h only.

#include "tiles.h"

#if defined(DISTTRAIN_TILES)

#include <algorithm>

#include "epilogue.h"
#include "matmul.h"
#include "scratch.h"
#include "transpose.h"
#include "vector.h"

namespace disttrain {
namespace {

constexpr int64_t PANEL = 32;           // rows of a or columns of b: two tiles
constexpr int64_t STEP = 32;            // terms of a tile
constexpr int64_t ROWS_BYTES = 1 << 20;     // of rows of a copied at a time: half of an L2 cache
constexpr int64_t COLUMNS_BYTES = 4 << 20;  // of columns of b

static_assert(LANES == tiles::ROWS);

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

thread_local Scratch scratch;

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Takes from each float the nearest bfloat16, and returns its bits in the upper halves.
Bits take_part(Vector& x) {
    Bits bits = (Bits)x, part = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    part = x == x ? part : (bits | 0x00400000) & 0xffff0000;
    x -= (Vector)part;
    return part;
}

// Reads the LANES x LANES elements from (i, j) on, of which `rows` x `columns` are there; the others are 0.
void read(const Matrix& from, int64_t i, int64_t j, int64_t rows, int64_t columns, Vector* square) {
    const float* at = from.data + i * from.row + j * from.column;
    const bool turned = from.column != 1 && from.row == 1;
    Vector lines[LANES];
    for (int64_t l = 0; l < LANES; l++) {
        lines[l] = Vector{};
        if (from.column == 1 && l < rows) lines[l] = load_first(at + l * from.row, columns);
        else if (turned && l < columns) lines[l] = load_first(at + l * from.column, rows);
        else if (!turned && l < rows)
            for (int64_t q = 0; q < columns; q++) lines[l][q] = at[l * from.row + q * from.column];
    }
    if (turned) transpose(lines);
    std::copy(lines, lines + LANES, square);
}

int64_t within(int64_t count) { return std::min(LANES, std::max<int64_t>(0, count)); }

// Copies PANEL rows of `a` from row i on: for each STEP of terms, for each part, two tiles.
template <int PARTS> void copy_rows(const Matrix& a, int64_t i, int64_t m, int64_t k, char* to) {
    for (int64_t p = 0; p < k; p += STEP, to += PARTS * 2 * tiles::BYTES) {
        for (int64_t half = 0; half < 2; half++) {
            const int64_t first = i + half * LANES, rows = within(m - first);
            Vector left[LANES], right[LANES];
            read(a, first, p, rows, within(k - p), left);
            read(a, first, p + LANES, rows, within(k - p - LANES), right);
            for (int64_t r = 0; r < LANES; r++) {
                for (int64_t part = 0; part < PARTS; part++) {
                    Halves halves[2] = {__builtin_convertvector(take_part(left[r]) >> 16, Halves),
                                        __builtin_convertvector(take_part(right[r]) >> 16, Halves)};
                    std::memcpy(to + (part * 2 + half) * tiles::BYTES + r * tiles::ROW_BYTES, halves, sizeof halves);
                }
            }
        }
    }
}

// Copies PANEL columns of `b` from column j on, in the same order.
template <int PARTS> void copy_columns(const Matrix& b, int64_t j, int64_t n, int64_t k, char* to) {
    for (int64_t p = 0; p < k; p += STEP, to += PARTS * 2 * tiles::BYTES) {
        for (int64_t half = 0; half < 2; half++) {
            const int64_t first = j + half * LANES, columns = within(n - first);
            Vector terms[2 * LANES];
            read(b, p, first, within(k - p), columns, terms);
            read(b, p + LANES, first, within(k - p - LANES), columns, terms + LANES);
            for (int64_t r = 0; r < LANES; r++) {
                for (int64_t part = 0; part < PARTS; part++) {
                    Bits pairs = take_part(terms[2 * r]) >> 16;
                    pairs |= take_part(terms[2 * r + 1]);
                    std::memcpy(to + (part * 2 + half) * tiles::BYTES + r * tiles::ROW_BYTES, &pairs, sizeof pairs);
                }
            }
        }
    }
}

template <int FIRST> void load_pair(const char* from, int64_t part) {
    tiles::load<FIRST>(from + part * 2 * tiles::BYTES);
    tiles::load<FIRST + 1>(from + (part * 2 + 1) * tiles::BYTES);
}

void add_products() {
    tiles::add<0, 4, 6>();
    tiles::add<1, 4, 7>();
    tiles::add<2, 5, 6>();
    tiles::add<3, 5, 7>();
}

// Multiplies a panel of rows by a panel of columns; sums: (PANEL, PANEL).
template <int PARTS> void multiply_panels(int64_t steps, const char* rows, const char* columns, float* sums) {
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (int64_t s = 0; s < steps; s++, rows += PARTS * 2 * tiles::BYTES, columns += PARTS * 2 * tiles::BYTES) {
        // from one product to the next one of the pairs stays
        load_pair<4>(rows, PARTS - 1), load_pair<6>(columns, 0), add_products();
        if constexpr (PARTS == 3) {
            load_pair<4>(rows, 1), add_products();
            load_pair<6>(columns, 1), add_products();
            load_pair<4>(rows, 0), add_products();
            load_pair<6>(columns, 2), add_products();
            load_pair<6>(columns, 0), add_products();
        } else if constexpr (PARTS == 2) {
            load_pair<4>(rows, 0), load_pair<6>(columns, 1), add_products();
            load_pair<6>(columns, 0), add_products();
        }
    }
    constexpr int64_t ROW = PANEL * sizeof(float);
    tiles::store<0>(sums, ROW), tiles::store<1>(sums + LANES, ROW);
    tiles::store<2>(sums + LANES * PANEL, ROW), tiles::store<3>(sums + LANES * PANEL + LANES, ROW);
}

// Computes with vectors those of rows x columns sums that are infinite or NaN.
bool mend(int64_t rows, int64_t columns, int64_t k, const Matrix& a, const Matrix& b, float* sums) {
    Vector zero{};  // NaN where it is not
    for (int64_t i = 0; i < PANEL * PANEL; i += LANES) zero += load(sums + i) - load(sums + i);
    bool finite = true;
    for (int64_t l = 0; l < LANES; l++) finite = finite && zero[l] == 0.0f;
    if (finite) return true;
    float again[PANEL * PANEL];
    if (!multiply_by_vectors(rows, columns, k, a, b, again, PANEL, {})) return false;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            if (!std::isfinite(sums[i * PANEL + j])) sums[i * PANEL + j] = again[i * PANEL + j];
    return true;
}

template <int PARTS>
bool multiply_parts(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                    const Epilogue& epilogue) {
    const int64_t steps = divided_up(k, STEP), bytes = std::max<int64_t>(1, steps) * PARTS * 2 * tiles::BYTES;
    const int64_t rows = PANEL * std::min(divided_up(m, PANEL), std::max<int64_t>(1, ROWS_BYTES / bytes));
    const int64_t columns = PANEL * std::min(divided_up(n, PANEL), std::max<int64_t>(1, COLUMNS_BYTES / bytes));
    if (!scratch.reserve((rows + columns) / PANEL * bytes)) return false;
    char* left = scratch.take<char>(rows / PANEL * bytes);
    char* right = scratch.take<char>(columns / PANEL * bytes);
    alignas(CACHE_LINE) float sums[PANEL * PANEL];
    [[maybe_unused]] const tiles::Use use;
    for (int64_t first_j = 0; first_j < n; first_j += columns) {
        const int64_t last_j = std::min(n, first_j + columns);
        for (int64_t j = first_j; j < last_j; j += PANEL)
            copy_columns<PARTS>(b, j, n, k, right + (j - first_j) / PANEL * bytes);
        for (int64_t first_i = 0; first_i < m; first_i += rows) {
            const int64_t last_i = std::min(m, first_i + rows);
            for (int64_t i = first_i; i < last_i; i += PANEL)
                copy_rows<PARTS>(a, i, m, k, left + (i - first_i) / PANEL * bytes);
            for (int64_t j = first_j; j < last_j; j += PANEL) {
                for (int64_t i = first_i; i < last_i; i += PANEL) {
                    multiply_panels<PARTS>(steps, left + (i - first_i) / PANEL * bytes,
                                           right + (j - first_j) / PANEL * bytes, sums);
                    const int64_t high = std::min(PANEL, m - i), wide = std::min(PANEL, n - j);
                    const Matrix of_a{a.data + i * a.row, a.row, a.column};
                    const Matrix of_b{b.data + j * b.column, b.row, b.column};
                    if (!mend(high, wide, k, of_a, of_b, sums)) return false;
                    for (int64_t r = 0; r < high; r++)
                        for (int64_t q = 0; q < wide; q += LANES)
                            finish(load(sums + r * PANEL + q), c + (i + r) * c_row + j + q, std::min(LANES, wide - q),
                                   epilogue.bias ? epilogue.bias + j + q : nullptr, epilogue);
                }
            }
        }
    }
    return true;
}

// Returns whether tiles multiply small integers, which bfloat16 holds, as loops do.
bool count_right() {
    constexpr int64_t M = 17, N = 33, K = 35;
    float a[M * K], b[K * N], c[M * N];
    for (int64_t i = 0; i < M * K; i++) a[i] = static_cast<float>(i % 11 - 5);
    for (int64_t i = 0; i < K * N; i++) b[i] = static_cast<float>(i % 13 - 6);
    if (!multiply_parts<1>(M, N, K, {a, K, 1}, {b, N, 1}, c, N, {})) return false;
    for (int64_t i = 0; i < M; i++) {
        for (int64_t j = 0; j < N; j++) {
            float sum = 0;
            for (int64_t p = 0; p < K; p++) sum += a[i * K + p] * b[p * N + j];
            if (c[i * N + j] != sum) return false;
        }
    }
    return true;
}

}  // namespace

bool tiles_work() {
    static const bool right = tiles::are_permitted() && count_right();
    return right;
}

bool multiply_by_tiles(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                       const Epilogue& epilogue, Precision precision) {
    if (m == 0 || n == 0) return true;
    auto compute = precision == Precision::highest ? multiply_parts<3>
                   : precision == Precision::high  ? multiply_parts<2>
                                                   : multiply_parts<1>;
    return compute(m, n, k, a, b, c, c_row, epilogue);
}

}  // namespace disttrain

#endif
