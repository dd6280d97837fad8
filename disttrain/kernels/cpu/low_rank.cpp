// A sum of few outer products, float32: p (rows, rank), q (rank, columns), in C order without gaps.
//
//   low_rank       out = p q
//   low_rank_rest  out = m - p q
//
// Term by term, each product and sum rounded: to the bit what the definition in data_parallel/compression/power_sgd.py
// gives, on any instruction set. Arrays are aligned to 4 bytes; `out` does not overlap the others.

#include <algorithm>

#include "parallel.h"

using namespace disttrain;

constexpr int64_t LEAST = 1 << 15;  // elements of a thread
constexpr int64_t COLUMNS = 1 << 11;  // at a time: those of q and out stay in the L1 cache

namespace {

template <bool is_rest>
void compute(int64_t rows, int64_t columns, int64_t rank, const float* p, const float* q, const float* m, float* out) {
    parallel(rows, std::max<int64_t>(1, LEAST / std::max<int64_t>(columns, 1)), [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t first = 0; first < columns; first += COLUMNS) {
                const int64_t count = std::min(COLUMNS, columns - first);
                float* __restrict row = out + r * columns + first;
                const float* __restrict terms = q + first;
                const float weight = p[r * rank];
                for (int64_t c = 0; c < count; c++) row[c] = weight * terms[c];
                for (int64_t k = 1; k < rank; k++) {
                    const float* __restrict next = terms + k * columns;
                    const float its = p[r * rank + k];
                    for (int64_t c = 0; c < count; c++) row[c] += its * next[c];
                }
                if (is_rest) {
                    const float* __restrict whole = m + r * columns + first;
                    for (int64_t c = 0; c < count; c++) row[c] = whole[c] - row[c];
                }
            }
        }
    });
}

}  // namespace

extern "C" {

void disttrain_low_rank(int64_t rows, int64_t columns, int64_t rank, const float* p, const float* q, float* out) {
    compute<false>(rows, columns, rank, p, q, nullptr, out);
}

void disttrain_low_rank_rest(int64_t rows, int64_t columns, int64_t rank, const float* p, const float* q,
                             const float* m, float* out) {
    compute<true>(rows, columns, rank, p, q, m, out);
}

}  // extern "C"
