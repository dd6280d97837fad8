// The two products that convolutions are made of: a tile of results in registers, its operands where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matmul.h"
#include "vector.h"

namespace disttrain {

constexpr int64_t WIDE = 2 * LANES;  // filters of a tile

// Stores the first `count` <= VECTORS * LANES of the sums `v`, once the epilogue has been applied to them.
template <int VECTORS>
void store_first(float* to, const Vector* v, int64_t count, const Epilogue& epilogue) {
    for (int i = 0; i < VECTORS; i++) {
        const int64_t held = std::min(LANES, count - i * LANES);
        Vector sum = v[i];
        if (epilogue.bias) sum += load_first(epilogue.bias + i * LANES, held);
        if (epilogue.relu) sum = Vector{} > sum ? Vector{} : sum;  // in this order NaN stays
        if (held == LANES) store(to + i * LANES, sum);
        else store_first(to + i * LANES, sum, held);
    }
}

// Computes `count` <= ROWS rows of a product: row m is the sum over runs of from[m][...] * packed[...].
// The runs of a row are `line` floats apart. packed: (runs * run, VECTORS * LANES), aligned to 64 bytes.
// to[m]: `filters` <= VECTORS * LANES floats.
template <int ROWS, int VECTORS>
[[gnu::noinline]] void tile(const float* const* from, int64_t runs, int64_t run, int64_t line, const float* packed, float* const* to,
          int count, int64_t filters, const Epilogue& epilogue) {
    Vector sums[ROWS][VECTORS] = {};
    const float* rows[ROWS];
    for (int m = 0; m < ROWS; m++) rows[m] = from[m];
    for (int64_t i = 0; i < runs; i++) {
        for (int64_t k = 0; k < run; k++, packed += VECTORS * LANES) {
            Vector right[VECTORS];
            for (int v = 0; v < VECTORS; v++) right[v] = load(packed + v * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; m++) {
                Vector left = broadcast(rows[m][k]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[m][v] = multiply_add(left, right[v], sums[m][v]);
            }
        }
        for (int m = 0; m < ROWS; m++) rows[m] += line;
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        if (m >= count) break;
        store_first<VECTORS>(to[m], sums[m], filters, epilogue);
    }
}

// Adds to `sums`, (ROWS, step) floats of which `rows` x `filters` are used, the products of `count` places.
// x + begins[p]: ROWS floats are read. g: VECTORS * LANES floats are read for each place, `line` apart.
template <int ROWS, int VECTORS>
[[gnu::noinline]] void deep_tile(const float* x, const int64_t* begins, const float* g, int64_t line, int64_t count, float* sums,
               int64_t step, int64_t rows, int64_t filters) {
    Vector held[ROWS][VECTORS] = {};
    for (int64_t p = 0; p < count; p++, g += line) {
        const float* left = x + begins[p];
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(g + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            Vector each = broadcast(left[m]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) held[m][v] = multiply_add(each, right[v], held[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        if (m >= rows) break;
        for (int v = 0; v < VECTORS; v++) {
            float* to = sums + m * step + v * LANES;
            const int64_t left = std::min(LANES, filters - v * LANES);
            if (left == LANES) store(to, load(to) + held[m][v]);
            else store_first(to, load_first(to, left) + held[m][v], left);
        }
    }
}

// deep_tile() for a run of any length: `run` rows of `sums`. SLACK floats behind a run may be read.
template <int VECTORS>
void deep_run(const float* x, int64_t run, const int64_t* begins, const float* g, int64_t line, int64_t count,
              float* sums, int64_t step, int64_t filters) {
    for (int64_t k = 0; k < run;) {
        int64_t left = run - k;
        if (left > 2 * DEEP_REST) {
            deep_tile<DEEP_ROWS, VECTORS>(x + k, begins, g, line, count, sums + k * step, step, left, filters);
            k += DEEP_ROWS;
        } else {
            deep_tile<DEEP_REST, VECTORS>(x + k, begins, g, line, count, sums + k * step, step, left, filters);
            k += DEEP_REST;
        }
    }
}

}  // namespace disttrain
