// Attention of heads that lie side by side, and its gradients, float32.
//
//   attention            y = weights(query, key) value, for each sample and head
//   attention_gradients  of query, key and value, given that of y
//
//   weights = softmax(query key^T / sqrt(width) + unseen), along the keys
//
// query: (samples, queries, heads, width), key: (samples, keys, heads, width), value: (samples, keys, heads,
// value_width), y: (samples, queries, heads, value_width); gradients as what they are of. All dense, aligned to 4
// bytes; results do not overlap arguments.
//
// Scores are made for a block of queries and all keys that those may see, in the L2 cache, and never stored: the
// gradients make them again. Where attention is causal, keys after the last query of a block are not looked at, which is
// what weights of 0 come to. A head's bits do not depend on what other heads and samples there are.
//
// Source: Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022, for the
// recomputation; its running softmax is not needed where a block's scores fit into a cache.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "exponential.h"
#include "matmul.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

using namespace disttrain;

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t MOST_ROWS = 32;          // of a block: fewer skip more keys, and make products less efficient
constexpr int64_t SCORES = int64_t(1) << 15;  // of a block: two arrays of so many floats are a quarter of an L2 cache
constexpr int64_t LEAST = int64_t(1) << 19;   // multiplications of a thread, about: ten microseconds

thread_local Scratch scratch;

// As in disttrain/kernels/attention.py.
struct Attention {
    int64_t samples, heads, queries, keys, width, value_width;
    int64_t causal;
    int64_t mask_item;                                      // bytes of an element: 1, 4 or 8; 0: there is no mask
    int64_t mask_sample, mask_head, mask_query, mask_key;  // bytes from one to the next; 0 along what it is broadcast

    int64_t query_row() const { return heads * width; }
    int64_t value_row() const { return heads * value_width; }
    int64_t block() const { return std::clamp<int64_t>(SCORES / score_row(), 1, std::min(MOST_ROWS, queries)); }
    int64_t score_row() const { return (keys + LANES - 1) / LANES * LANES; }

    // Returns how many keys the queries before `end` may see.
    int64_t seen(int64_t end) const { return causal ? std::min(end, keys) : keys; }
};

// Where one head of one sample begins in each array.
struct Head {
    int64_t of_query, of_key, of_value, of_y;
    const char* mask;

    Head(const Attention& a, const char* mask, int64_t sample, int64_t head)
        : of_query(sample * a.queries * a.query_row() + head * a.width),
          of_key(sample * a.keys * a.query_row() + head * a.width),
          of_value(sample * a.keys * a.value_row() + head * a.value_width),
          of_y(sample * a.queries * a.value_row() + head * a.value_width),
          mask(a.mask_item ? mask + sample * a.mask_sample + head * a.mask_head : nullptr) {}
};

// Adds what makes an unseen key's weight 0, the definition's number.
template <typename T> void add_unseen(const char* mask, int64_t step, int64_t count, float* scores) {
    for (int64_t j = 0; j < count; j++)
        scores[j] += (1.0f - static_cast<float>(*reinterpret_cast<const T*>(mask + j * step))) * -1e9f;
}

// Turns `count` scores into weights, and those behind, up to a whole vector after `end`, into 0.
// A NaN among them makes all of them NaN, as do infinite ones.
void softmax(float* scores, int64_t count, int64_t end) {
    Vector most = broadcast(-INFINITE);
    std::fill(scores + count, scores + (end + LANES - 1) / LANES * LANES, -INFINITE);
    for (int64_t j = 0; j < count; j += LANES) most = larger(load(scores + j), most);
    most = broadcast(largest_of(most));
    Vector total{};
    for (int64_t j = 0; j < end; j += LANES) {
        Vector v = exponential(load(scores + j) - most);
        store(scores + j, v);
        total += v;
    }
    const Vector share = broadcast(1.0f / sum_of(total));
    for (int64_t j = 0; j < end; j += LANES) store(scores + j, load(scores + j) * share);
}

// Computes the weights of the queries from `begin` to `end`, of the keys that one of them may see; false where there is
// no memory.
bool make_weights(const Attention& a, const Head& head, const float* query, const float* key, int64_t begin,
                  int64_t end, float* weights) {
    const int64_t seen = a.seen(end), row = a.score_row();
    if (!multiply(end - begin, seen, a.width, {query + head.of_query + begin * a.query_row(), a.query_row(), 1},
                  {key + head.of_key, 1, a.query_row()}, weights, row))
        return false;
    const Vector scale = broadcast(1.0f / std::sqrt(static_cast<float>(a.width)));
    for (int64_t i = begin; i < end; i++, weights += row) {
        const int64_t count = a.seen(i + 1);
        for (int64_t j = 0; j < count; j += LANES) store(weights + j, load(weights + j) * scale);
        const char* mask = head.mask + i * a.mask_query;
        if (a.mask_item == 1) add_unseen<int8_t>(mask, a.mask_key, count, weights);
        if (a.mask_item == 4) add_unseen<int32_t>(mask, a.mask_key, count, weights);
        if (a.mask_item == 8) add_unseen<int64_t>(mask, a.mask_key, count, weights);
        softmax(weights, count, seen);
    }
    return true;
}

// Turns the cotangents of `count` weights into those of the products of query and key, in place, and those behind, up to
// a whole vector after `end`, into 0.
void through_softmax(const float* weights, int64_t count, int64_t end, float scale, float* g) {
    std::fill(g + count, g + (end + LANES - 1) / LANES * LANES, 0.0f);
    Vector total{};
    for (int64_t j = 0; j < count; j += LANES) total = multiply_add(load(weights + j), load(g + j), total);
    const Vector mean = broadcast(sum_of(total));
    for (int64_t j = 0; j < count; j += LANES) store(g + j, load(weights + j) * (load(g + j) - mean) * scale);
}

bool value_of_head(const Attention& a, const Head& head, const float* query, const float* key, const float* value,
                   float* y, float* weights) {
    const int64_t block = a.block();
    const Matrix values{value + head.of_value, a.value_row(), 1};
    for (int64_t begin = 0; begin < a.queries; begin += block) {
        const int64_t end = std::min(begin + block, a.queries);
        if (!make_weights(a, head, query, key, begin, end, weights) ||
            !multiply(end - begin, a.value_width, a.seen(end), {weights, a.score_row(), 1}, values,
                      y + head.of_y + begin * a.value_row(), a.value_row()))
            return false;
    }
    return true;
}

bool gradients_of_head(const Attention& a, const Head& head, const float* g, const float* query, const float* key,
                       const float* value, float* query_g, float* key_g, float* value_g, float* weights,
                       float* weights_g) {
    const int64_t row = a.score_row(), block = a.block();
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.width));
    const Matrix keys{key + head.of_key, a.query_row(), 1}, values{value + head.of_value, 1, a.value_row()};
    for (int64_t j = a.seen(a.queries); j < a.keys; j++) {  // keys that no query sees
        std::fill_n(key_g + head.of_key + j * a.query_row(), a.width, 0.0f);
        std::fill_n(value_g + head.of_value + j * a.value_row(), a.value_width, 0.0f);
    }
    Epilogue sums;  // the last block sees all keys that are seen, and writes; the others add
    for (int64_t begin = (a.queries - 1) / block * block; begin >= 0; begin -= block, sums.add = true) {
        const int64_t end = std::min(begin + block, a.queries), rows = end - begin, seen = a.seen(end);
        const Matrix queries{query + head.of_query + begin * a.query_row(), a.query_row(), 1};
        const Matrix gs{g + head.of_y + begin * a.value_row(), a.value_row(), 1};
        if (!make_weights(a, head, query, key, begin, end, weights) ||
            !multiply(seen, a.value_width, rows, {weights, 1, row}, gs, value_g + head.of_value, a.value_row(), sums) ||
            !multiply(rows, seen, a.value_width, gs, values, weights_g, row))
            return false;
        for (int64_t i = 0; i < rows; i++)
            through_softmax(weights + i * row, a.seen(begin + i + 1), seen, scale, weights_g + i * row);
        if (!multiply(rows, a.width, seen, {weights_g, row, 1}, keys, query_g + head.of_query + begin * a.query_row(),
                      a.query_row()) ||
            !multiply(seen, a.width, rows, {weights_g, 1, row}, queries, key_g + head.of_key, a.query_row(), sums))
            return false;
    }
    return true;
}

// Calls work(head, memory of `floats`) for each head, divided among threads; false where there is no memory.
template <typename Work> bool for_heads(const Attention& a, const char* mask, int64_t floats, const Work& work) {
    std::atomic<bool> done{true};
    const int64_t of_one = a.queries * a.keys * (a.width + a.value_width);
    parallel(a.samples * a.heads, LEAST / of_one + 1, [&](int64_t begin, int64_t end) {
        if (!scratch.reserve(Scratch::rounded(floats * static_cast<int64_t>(sizeof(float))))) {
            done = false;
            return;
        }
        float* memory = scratch.take<float>(floats);
        for (int64_t each = begin; each < end && done; each++)
            if (!work(Head(a, mask, each / a.heads, each % a.heads), memory)) done = false;
    });
    return done;
}

}  // namespace

extern "C" {

// Returns 0; 1 where there is no memory. There are a key and a query.
int disttrain_attention(const Attention* a, const float* query, const float* key, const float* value, const char* mask,
                        float* y) {
    return !for_heads(*a, mask, a->block() * a->score_row(), [&](const Head& head, float* weights) {
        return value_of_head(*a, head, query, key, value, y, weights);
    });
}

// Returns 0; 1 where there is no memory. There are a key and a query.
int disttrain_attention_gradients(const Attention* a, const float* g, const float* query, const float* key,
                                  const float* value, const char* mask, float* query_g, float* key_g, float* value_g) {
    const int64_t size = a->block() * a->score_row();
    return !for_heads(*a, mask, 2 * size, [&](const Head& head, float* weights) {
        return gradients_of_head(*a, head, g, query, key, value, query_g, key_g, value_g, weights, weights + size);
    });
}

}  // extern "C"
