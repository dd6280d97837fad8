// A tile of a matrix product in registers: what products, and kernels made of products, come down to.
#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "matmul.h"
#include "vector.h"

namespace disttrain {

constexpr int64_t WIDE = 2 * LANES;  // columns of a tile

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Computes a tile of c of ROWS x `columns` <= VECTORS * LANES elements from `depth` products each.
// a: (ROWS, depth) of any distances; b: (depth, VECTORS * LANES), rows `b_row` apart.
template <int ROWS, int VECTORS>
void tile(int64_t depth, const Matrix& a, const float* b, int64_t b_row, float* c, int64_t c_row,
          int64_t columns, const Epilogue& epilogue) {
    Vector sums[ROWS][VECTORS] = {};
    const float* rows[(ROWS + 2) / 3];  // every third: an address may add once or twice a distance
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i += 3) rows[i / 3] = a.data + i * a.row;
    const float* ahead = epilogue.ahead ? epilogue.ahead : b;  // an address that is none would be looked up each time
    for (int64_t p = 0; p < depth; p++, b += b_row, ahead += epilogue.ahead_step) {
        __builtin_prefetch(ahead, 0, 2);  // into L2
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            Vector left = broadcast(rows[i / 3][i % 3 * a.row]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add(left, right[v], sums[i][v]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i += 3) rows[i / 3] += a.column;
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
            for (int i = 0; i < ROWS; i++) sums[i][v] = relu(sums[i][v]);
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

// Returns the function for a tile of `rows` <= PRODUCT_ROWS and `columns` <= WIDE.
inline Tile tile_of(int64_t rows, int64_t columns) {
    auto all = std::make_integer_sequence<int, PRODUCT_ROWS>();
    return columns > LANES ? tile_of<2>(rows, all) : tile_of<1>(rows, all);
}

}  // namespace disttrain
