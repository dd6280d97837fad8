// Matrix units: AMX's tiles of 16 rows of 64 bytes, and a model of them in C++ for tests.
//
//   tiles::add<C, A, B>   tile C, floats (16, 16), += tile A, bfloat16 (16, 32), times tile B, bfloat16 (16, 16 pairs):
//                         B's row p holds, for each column, its elements 2 p and 2 p + 1
//
// A sum of products is computed as the CPU does (Intel, "Architecture instruction set extensions programming
// reference", TDPBF16PS): even and odd products apart, each by FMA; then both sums; then tile C. Rounded to nearest even;
// denormal numbers count as 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && (defined(DISTTRAIN_EMULATE_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#define DISTTRAIN_TILES 1
#endif

#if defined(DISTTRAIN_TILES)

#if !defined(DISTTRAIN_EMULATE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace disttrain {
namespace tiles {

constexpr int64_t ROWS = 16, BYTES = 1024, ROW_BYTES = 64;

#if defined(DISTTRAIN_EMULATE_TILES)

inline thread_local unsigned char held[8][BYTES];

inline bool are_permitted() { return true; }

class Use {};

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float element(const unsigned char* tile, int64_t row, int64_t column) {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, tile + row * ROW_BYTES + column * 2, 2);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
}

template <int T> void zero() { std::memset(held[T], 0, BYTES); }

template <int T> void load(const void* from) { std::memcpy(held[T], from, BYTES); }

template <int T> void store(float* to, int64_t row_bytes) {
    for (int64_t i = 0; i < ROWS; i++)
        std::memcpy(reinterpret_cast<char*>(to) + i * row_bytes, held[T] + i * ROW_BYTES, ROW_BYTES);
}

template <int C, int A, int B> void add() {
    for (int64_t i = 0; i < ROWS; i++) {
        for (int64_t j = 0; j < ROWS; j++) {
            float sums[2] = {0.0f, 0.0f}, so_far;
            for (int64_t p = 0; p < ROWS; p++)
                for (int64_t odd = 0; odd < 2; odd++)
                    sums[odd] = flushed(std::fma(element(held[A], i, 2 * p + odd), element(held[B], p, 2 * j + odd),
                                                 sums[odd]));
            unsigned char* at = held[C] + i * ROW_BYTES + j * 4;
            std::memcpy(&so_far, at, sizeof so_far);
            so_far = flushed(flushed(so_far) + flushed(sums[0] + sums[1]));
            std::memcpy(at, &so_far, sizeof so_far);
        }
    }
}

#else

// Asks Linux, once for the process, to let it use tiles.
inline bool are_permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return permitted;
}

// Eight whole tiles, as long as this lives: other libraries of the process shape tiles as well.
class Use {
  public:
    Use() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof shapes == 64);
        asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() { asm volatile("tilerelease" : : : "memory"); }
};

// In place of the compiler's intrinsics: those of GCC 12 do not say that they read and write memory.
template <int T> void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }

template <int T> void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(ROW_BYTES), "i"(T) : "memory");
}

template <int T> void store(float* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}

template <int C, int A, int B> void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace tiles
}  // namespace disttrain

#endif
