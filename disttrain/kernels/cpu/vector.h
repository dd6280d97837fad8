// One vector of floats, as wide as the instruction set that the compiler's flags allow.
//
// The same sources are compiled once for each instruction set; what differs is here: the width, how a product
// is added, and how many accumulators the registers hold.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace disttrain {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int TILE_ROWS = 8;    // 8 x 2 accumulators of 32 registers; more rows need more pointers than there are
constexpr int DEEP_ROWS = 12;   // 12 x 2 accumulators, where one pointer serves all rows
constexpr int DEEP_REST = 4;
constexpr int PRODUCT_ROWS = 14;  // 14 x 2 accumulators
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
constexpr int TILE_ROWS = 6;    // 6 x 2 accumulators of 16 registers
constexpr int DEEP_ROWS = 6;
constexpr int DEEP_REST = 2;
constexpr int PRODUCT_ROWS = 6;
#else
constexpr int64_t LANES = 4;
constexpr int TILE_ROWS = 6;
constexpr int DEEP_ROWS = 6;
constexpr int DEEP_REST = 2;
constexpr int PRODUCT_ROWS = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

// No alignment is asked of `p`; LANES floats are read.
inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// No alignment is asked of `p`; LANES floats are written.
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Reads `count` <= LANES floats and nothing behind them; the others are 0.
inline Vector load_first(const float* p, int64_t count) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__AVX2__)
    return (Vector)_mm256_maskload_ps(p, first(count));
#else
    Vector v{};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
#endif
}

// Writes the first `count` <= LANES floats and nothing behind them.
inline void store_first(float* p, Vector v, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, first(count), (__m256)v);
#else
    std::memcpy(p, &v, count * sizeof(float));
#endif
}

inline Vector broadcast(float value) { return value - Vector{}; }

// Returns a * b + c: rounded once where the instruction set has that, else twice.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

}  // namespace disttrain
