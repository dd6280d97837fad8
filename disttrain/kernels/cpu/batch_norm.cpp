// Batch normalization, float32, and what its gradients need; statistics are sums in float64, for others to be added to.
//
//   batch_norm        y = (x - mean) * (gamma / sqrt(variance + epsilon)) + beta
//   channel_sums      sum of x, then the count of rows
//   square_sums       sum of (x - mean)^2, then the count of rows
//   cotangent_sums    sum of g, sum of g * (x - mean), then the count of rows
//   batch_norm_input  (g - a / n - (x - mean) * b / n / (variance + epsilon)) * gamma / sqrt(variance + epsilon), where
//                     sums = (a, b, n) are those of cotangent_sums over the whole batch
//
// Shapes: x, y, g (rows, channels); mean, variance, gamma, beta (channels), sums (channels + 1) or (2 * channels + 1)
// of double; dense in C order, aligned to their elements' size; what is written overlaps nothing.
//
// Channels are divided among threads, and each sum has one order. Up to four vectors of channels are summed at a time,
// so that registers hold the sums and a cache line is read whole.
//
// Source: Ioffe & Szegedy, "Batch normalization", 2015; the gradient follows by the chain rule.

#include <cmath>
#include <type_traits>

#include "row.h"

using namespace disttrain;

namespace {

typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));

constexpr int64_t LEAST = 1 << 14;  // elements of a thread

Doubles wide(Vector v) { return __builtin_convertvector(v, Doubles); }

// Calls work(channel, at, count) for all channels, divided among threads: `count`, a constant, vectors begin there,
// which `at` reads and writes.
template <int MOST, typename Work> void for_channels(int64_t rows, int64_t channels, const Work& work) {
    parallel(channels, LEAST / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
        int64_t c = begin;
        for (; c + MOST * LANES <= end; c += MOST * LANES) work(c, Whole(), std::integral_constant<int, MOST>());
        for_vectors(end - c, [&](int64_t i, auto at) { work(c + i, at, std::integral_constant<int, 1>()); });
    });
}

void put(const Whole&, double* to, Doubles v) { std::memcpy(to, &v, sizeof v); }
void put(const Tail& at, double* to, Doubles v) { std::memcpy(to, &v, at.count * sizeof(double)); }

// Returns 1 / sqrt(variance + epsilon).
template <typename At> Vector rate(At at, const float* variance, float epsilon) {
    Vector v = at.get(variance, 1.0f) + epsilon;
    for (int64_t i = 0; i < LANES; i++) v[i] = std::sqrt(v[i]);
    return 1.0f / v;
}

}  // namespace

extern "C" {

void disttrain_channel_sums(int64_t rows, int64_t channels, const float* x, double* sums) {
    for_channels<4>(rows, channels, [=](int64_t c, auto at, auto vectors) {
        constexpr int COUNT = decltype(vectors)::value;
        Doubles sum[COUNT]{};
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < COUNT; i++) sum[i] += wide(at.get(x + row * channels + c + i * LANES, 0.0f));
        for (int i = 0; i < COUNT; i++) put(at, sums + c + i * LANES, sum[i]);
    });
    sums[channels] = static_cast<double>(rows);
}

void disttrain_square_sums(int64_t rows, int64_t channels, const float* x, const float* mean, double* sums) {
    for_channels<4>(rows, channels, [=](int64_t c, auto at, auto vectors) {
        constexpr int COUNT = decltype(vectors)::value;
        Doubles sum[COUNT]{};
        Vector center[COUNT];
        for (int i = 0; i < COUNT; i++) center[i] = at.get(mean + c + i * LANES, 0.0f);
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < COUNT; i++) {
                Doubles centered = wide(at.get(x + row * channels + c + i * LANES, 0.0f) - center[i]);
                sum[i] += centered * centered;
            }
        for (int i = 0; i < COUNT; i++) put(at, sums + c + i * LANES, sum[i]);
    });
    sums[channels] = static_cast<double>(rows);
}

void disttrain_cotangent_sums(int64_t rows, int64_t channels, const float* g, const float* x, const float* mean,
                              double* sums) {
    for_channels<2>(rows, channels, [=](int64_t c, auto at, auto vectors) {
        constexpr int COUNT = decltype(vectors)::value;
        Doubles sum[COUNT]{}, along[COUNT]{};
        Vector center[COUNT];
        for (int i = 0; i < COUNT; i++) center[i] = at.get(mean + c + i * LANES, 0.0f);
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < COUNT; i++) {
                const int64_t place = row * channels + c + i * LANES;
                Doubles own = wide(at.get(g + place, 0.0f));
                sum[i] += own;
                along[i] += own * wide(at.get(x + place, 0.0f) - center[i]);
            }
        for (int i = 0; i < COUNT; i++) {
            put(at, sums + c + i * LANES, sum[i]);
            put(at, sums + channels + c + i * LANES, along[i]);
        }
    });
    sums[2 * channels] = static_cast<double>(rows);
}

void disttrain_batch_norm(int64_t rows, int64_t channels, const float* x, const float* mean, const float* variance,
                          const float* gamma, const float* beta, float epsilon, float* y) {
    for_channels<4>(rows, channels, [=](int64_t c, auto at, auto vectors) {
        constexpr int COUNT = decltype(vectors)::value;
        Vector center[COUNT], scale[COUNT], offset[COUNT];
        for (int i = 0; i < COUNT; i++) {
            const int64_t from = c + i * LANES;
            center[i] = at.get(mean + from, 0.0f);
            scale[i] = at.get(gamma + from, 0.0f) * rate(at, variance + from, epsilon);
            offset[i] = at.get(beta + from, 0.0f);
        }
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < COUNT; i++) {
                const int64_t place = row * channels + c + i * LANES;
                at.put(y + place, multiply_add(at.get(x + place, 0.0f) - center[i], scale[i], offset[i]));
            }
    });
}

void disttrain_batch_norm_input(int64_t rows, int64_t channels, const float* g, const float* x, const float* mean,
                                const float* variance, const float* gamma, const double* sums, float epsilon,
                                float* out) {
    const double n = sums[2 * channels];
    for_channels<4>(rows, channels, [=](int64_t c, auto at, auto vectors) {
        constexpr int COUNT = decltype(vectors)::value;
        Vector center[COUNT], scale[COUNT], constant[COUNT], slope[COUNT];
        for (int i = 0; i < COUNT; i++) {
            const int64_t from = c + i * LANES;
            const Vector own = rate(at, variance + from, epsilon);
            center[i] = at.get(mean + from, 0.0f);
            scale[i] = at.get(gamma + from, 0.0f) * own;
            for (int64_t lane = 0; lane < LANES; lane++) {
                const bool there = from + lane < channels;
                constant[i][lane] = there ? static_cast<float>(sums[from + lane] / n) : 0.0f;
                slope[i][lane] = there ? static_cast<float>(sums[channels + from + lane] / n) : 0.0f;
            }
            slope[i] *= own * own;
        }
        for (int64_t row = 0; row < rows; row++)
            for (int i = 0; i < COUNT; i++) {
                const int64_t place = row * channels + c + i * LANES;
                Vector centered = at.get(x + place, 0.0f) - center[i];
                at.put(out + place, (at.get(g + place, 0.0f) - constant[i] - centered * slope[i]) * scale[i]);
            }
    });
}

}  // extern "C"
