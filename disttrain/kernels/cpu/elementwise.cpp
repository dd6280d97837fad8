// Elementwise functions, float32, on n elements that lie together.
//
//   where_positive  out = g where y > 0, else g * 0: the gradient of relu, in one pass
//
// To the bit what the definition gives. Arrays are aligned to 4 bytes; `out` does not overlap the others.

#include "parallel.h"

using namespace disttrain;

constexpr int64_t LEAST = 1 << 15;  // elements of a thread

extern "C" {

void disttrain_where_positive(int64_t n, const float* g, const float* y, float* __restrict out) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        // a product, not a choice: NaN * 0 is NaN, as in the definition
        for (int64_t i = begin; i < end; i++) out[i] = g[i] * (y[i] > 0.0f ? 1.0f : 0.0f);
    });
}

}  // extern "C"
