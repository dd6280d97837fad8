// What travels, float32, on n elements that lie together: fewer bytes, and back.
//
//   bfloat16  the upper 16 bits, rounded to nearest, ties to even; NaN stays NaN
//   float16   IEEE 754's binary16, rounded to nearest, ties to even; beyond 65504 infinity; NaN stays NaN
//   int8      blocks of 256: a scale each, s = max|x| / 127, then x / s rounded to nearest, ties to even. The scales
//             lie in front, the numbers behind. A block with NaN or infinity has the scale NaN; one below 127 times
//             the least normal float is 0.
//
// encode_*(n, values, encoded), decode_*(n, encoded, values): values = what was encoded, add_*: values += that.
// To the bit what the definitions in disttrain/comm/encodings.py give. Arrays are aligned to 4 bytes, and do not overlap.
//
// Source of the branch-free casts of float16: F. Giesen, "Float/half conversions", 2012 (public domain).

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "parallel.h"

using namespace disttrain;

constexpr int64_t LEAST = 1 << 15;  // elements of a thread
constexpr int64_t BLOCK = 256;

namespace {

inline uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

inline float number(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

struct BFloat16 {
    static uint16_t encode(float x) {
        uint32_t u = bits(x);
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        uint32_t nan = (u >> 16) | 0x40;
        return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
    }
    static float decode(uint16_t h) { return number(static_cast<uint32_t>(h) << 16); }
};

struct Float16 {
    static uint16_t encode(float x) {
        uint32_t sign = bits(x) & 0x80000000, u = bits(x) ^ sign;
        // small ones become subnormal: the sum with a number whose last bit is theirs rounds them
        constexpr uint32_t magic = ((127 - 15) + (23 - 10) + 1) << 23;
        uint32_t small = bits(number(u) + number(magic)) - magic;
        uint32_t normal = (u - ((127 - 15) << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
        uint32_t large = u > 0x7f800000 ? 0x7e00 : 0x7c00;
        uint32_t half = u >= (143u << 23) ? large : u < (113u << 23) ? small : normal;
        return static_cast<uint16_t>(half | (sign >> 16));
    }
    static float decode(uint16_t h) {
        uint32_t u = (h & 0x7fffu) << 13, exponent = u & (0x7c00u << 13);
        uint32_t normal = u + ((127 - 15) << 23), large = normal + ((128 - 16) << 23);
        uint32_t small = bits(number(normal + (1 << 23)) - number(113u << 23));
        uint32_t value = exponent == (0x7c00u << 13) ? large : exponent == 0 ? small : normal;
        return number(value | (static_cast<uint32_t>(h & 0x8000u) << 16));
    }
};

template <typename Format> void encode(int64_t n, const float* values, uint16_t* __restrict encoded) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) encoded[i] = Format::encode(values[i]);
    });
}

template <typename Format> void decode(int64_t n, const uint16_t* encoded, float* __restrict values) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) values[i] = Format::decode(encoded[i]);
    });
}

template <typename Format> void add(int64_t n, const uint16_t* encoded, float* __restrict values) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) values[i] += Format::decode(encoded[i]);
    });
}

// Calls work(scale, first, last) for each block, in parts that threads share.
template <typename Work> void blocks(int64_t n, const Work& work) {
    parallel((n + BLOCK - 1) / BLOCK, LEAST / BLOCK, [=](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) work(b, b * BLOCK, std::min(n, (b + 1) * BLOCK));
    });
}

inline int8_t* numbers(void* encoded, int64_t n) {
    return static_cast<int8_t*>(encoded) + (n + BLOCK - 1) / BLOCK * static_cast<int64_t>(sizeof(float));
}

}  // namespace

extern "C" {

void disttrain_encode_bfloat16(int64_t n, const float* values, uint16_t* encoded) { encode<BFloat16>(n, values, encoded); }
void disttrain_decode_bfloat16(int64_t n, const uint16_t* encoded, float* values) { decode<BFloat16>(n, encoded, values); }
void disttrain_add_bfloat16(int64_t n, const uint16_t* encoded, float* values) { add<BFloat16>(n, encoded, values); }

void disttrain_encode_float16(int64_t n, const float* values, uint16_t* encoded) { encode<Float16>(n, values, encoded); }
void disttrain_decode_float16(int64_t n, const uint16_t* encoded, float* values) { decode<Float16>(n, encoded, values); }
void disttrain_add_float16(int64_t n, const uint16_t* encoded, float* values) { add<Float16>(n, encoded, values); }

void disttrain_encode_int8(int64_t n, const float* values, void* encoded) {
    float* scales = static_cast<float*>(encoded);
    int8_t* rounded = numbers(encoded, n);
    blocks(n, [=](int64_t block, int64_t first, int64_t last) {
        uint32_t largest = 0;  // the bits of numbers without sign are in the order of the numbers, NaN last
        for (int64_t i = first; i < last; i++) largest = std::max(largest, bits(values[i]) & 0x7fffffff);
        bool is_finite = largest < 0x7f800000;
        float scale = is_finite ? number(largest) / 127.0f : number(0x7fc00000);
        float inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        scales[block] = scale >= FLT_MIN || !is_finite ? scale : 0.0f;
        for (int64_t i = first; i < last; i++) {
            // 1.5 * 2**23: the sum has the rounded number in its last bits
            uint32_t sum = bits(values[i] * inverse + 12582912.0f);
            rounded[i] = is_finite ? static_cast<int8_t>(sum & 0xff) : int8_t{0};
        }
    });
}

void disttrain_decode_int8(int64_t n, void* encoded, float* values) {
    const float* scales = static_cast<const float*>(encoded);
    const int8_t* rounded = numbers(encoded, n);
    blocks(n, [=](int64_t block, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) values[i] = static_cast<float>(rounded[i]) * scales[block];
    });
}

void disttrain_add_int8(int64_t n, void* encoded, float* values) {
    const float* scales = static_cast<const float*>(encoded);
    const int8_t* rounded = numbers(encoded, n);
    blocks(n, [=](int64_t block, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) values[i] += static_cast<float>(rounded[i]) * scales[block];
    });
}

}  // extern "C"
