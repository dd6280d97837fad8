// A row of floats of any length, a vector at a time; what lies behind its end is neither read nor written.
#pragma once

#include "parallel.h"
#include "vector.h"

namespace disttrain {

typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

// The larger and the smaller of two; b where one is NaN.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// LANES floats of a row.
struct Whole {
    Vector get(const float* p, float) const { return load(p); }
    void put(float* p, Vector v) const { store(p, v); }
};

// Its last `count` < LANES; in place of those behind them `get` gives `rest`.
struct Tail {
    int64_t count;

    Vector get(const float* p, float rest) const {
        Integers number;
        for (int i = 0; i < LANES; i++) number[i] = i;
        return number < static_cast<int32_t>(count) ? load_first(p, count) : broadcast(rest);
    }
    void put(float* p, Vector v) const { store_first(p, v, count); }
};

// Calls `each` with 0, LANES, 2 * LANES ... below n, and what reads and writes there: a Whole, at the end a Tail.
template <typename Each> inline void for_vectors(int64_t n, Each each) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) each(i, Whole());
    if (i < n) each(i, Tail{n - i});
}

// Calls work(row) for all rows of n > 0, divided among threads.
template <typename Work> inline void for_rows(int64_t rows, int64_t n, const Work& work) {
    constexpr int64_t LEAST = 1 << 14;  // elements of a thread
    parallel(rows, LEAST / n + 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) work(row);
    });
}

// Returns all lanes made one by `join`, in halves.
template <typename Join> inline float joined(Vector v, Join join) {
    float lanes[LANES];
    store(lanes, v);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) lanes[i] = join(lanes[i], lanes[i + half]);
    return lanes[0];
}

inline float sum_of(Vector v) {
    return joined(v, [](float a, float b) { return a + b; });
}

inline float largest_of(Vector v) {
    return joined(v, [](float a, float b) { return a > b ? a : b; });
}

}  // namespace disttrain
