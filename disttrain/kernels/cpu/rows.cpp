// Rows of float32 that are copied, added up by number, or added up altogether.
//
//   take_rows  out[i] = table[indices[i]]
//   add_rows   table = 0, then table[indices[i]] += g[i], i in order
//   sum_rows   out = sum of x[i] over i, 8 rows at a time
//
// Shapes: table (rows, width), indices (count) of int64, out and g of the first two (count, width); x (count, width)
// and out (width) of the last; dense in C order, aligned to their elements' size; what is written overlaps nothing.
//
// The first two are to the bit what the definitions in disttrain/autodiff/ops/embedding.py give.

#include <algorithm>

#include "row.h"

using namespace disttrain;

namespace {

constexpr int64_t BLOCK = 8;         // rows that are read side by side
constexpr int64_t LEAST = 1 << 14;  // elements of a thread

bool all_within(int64_t count, int64_t rows, const int64_t* indices) {
    return std::all_of(indices, indices + count, [=](int64_t index) { return index >= 0 && index < rows; });
}

// Adds columns `begin` to `end` of `count` rows to `sums`. ROWS: the count where that is a constant, else 0.
template <int64_t ROWS>
void add(int64_t count, int64_t width, int64_t begin, int64_t end, const float* x, float* sums) {
    for_vectors(end - begin, [&](int64_t offset, auto at) {
        const int64_t i = begin + offset;
        Vector sum = at.get(x + i, 0.0f);
        for (int64_t row = 1; row < (ROWS ? ROWS : count); row++) sum += at.get(x + row * width + i, 0.0f);
        at.put(sums + i, at.get(sums + i, 0.0f) + sum);
    });
}

}  // namespace

extern "C" {

// Returns whether an index is none of the table's rows; then nothing is written.
int disttrain_take_rows(int64_t count, int64_t rows, int64_t width, const int64_t* indices, const float* table,
                        float* out) {
    if (!all_within(count, rows, indices)) return 1;
    parallel(count, LEAST / (width + 1) + 1, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) std::copy_n(table + indices[i] * width, width, out + i * width);
    });
    return 0;
}

// Returns whether an index is none of the table's rows, as above.
int disttrain_add_rows(int64_t count, int64_t rows, int64_t width, const int64_t* indices, const float* g,
                       float* table) {
    if (!all_within(count, rows, indices)) return 1;
    parallel(width, LEAST / (count + rows + 1) + 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = 0; row < rows; row++) std::fill(table + row * width + begin, table + row * width + end, 0.0f);
        for (int64_t i = 0; i < count; i++)
            add<1>(1, width, begin, end, g + i * width, table + indices[i] * width);
    });
    return 0;
}

void disttrain_sum_rows(int64_t count, int64_t width, const float* x, float* out) {
    parallel(width, LEAST / (count + 1) + 1, [=](int64_t begin, int64_t end) {
        std::fill(out + begin, out + end, 0.0f);
        int64_t row = 0;
        for (; row + BLOCK <= count; row += BLOCK) add<BLOCK>(BLOCK, width, begin, end, x + row * width, out);
        if (row < count) add<0>(count - row, width, begin, end, x + row * width, out);
    });
}

}  // extern "C"
