// Ranks as threads that all-reduce in shared memory, under sanitizers: see test_all_reduce.py.
//
// Arguments: the number of ranks, of rounds. In each round every rank starts as many collectives as the round says, of
// arrays in windows, beside them, or some of each, and moves them on in an order of its own. All sums are exact.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

struct Node {
    int64_t rank, size, next, others, spins, windows;
    char* const* slots;
    char* const* segments;
    const int64_t* lengths;
    char** arrays;
    int64_t settled, freed_by[8];
};

struct Collective {
    Node* node;
    int64_t limit_ns, number, what, others, count, kind;
    char* data;
    int64_t phase, ready, waited_ns, first;
};

extern "C" {
int disttrain_slots_bytes();
int disttrain_start_all_reduce(Collective*, char*, int64_t);
int disttrain_continue_all_reduce(Collective*, int64_t);
}

enum { WAITS, DONE, ELSEWHERE, DIFFERS };

// More than there are slots, and longer than a slot's copy, of several pieces; before that a whole number of pieces.
constexpr int64_t FLIGHT = 11, LONGEST = 140003;
constexpr int64_t COUNTS[] = {0, 1, 15, 16, 17, 255, 256, 257, 511, 513, 1009, 16384, 32769, 131072, LONGEST};

static char* zeros(int64_t bytes) {
    char* memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::memset(memory, 0, bytes);
    return memory;
}

static int64_t value(int64_t rank, int64_t i, int64_t round) { return (i * 7 + rank * 11 + round) % 13 - 6; }

template <typename T> static bool is_right(const char* data, int64_t count, int64_t op, int64_t size, int64_t round) {
    for (int64_t i = 0; i < count; i++) {
        int64_t expected = value(0, i, round);
        for (int64_t rank = 1; rank < size; rank++) {
            int64_t other = value(rank, i, round);
            expected = op == 3 ? expected : op == 0 ? expected + other : (op == 1) == (other > expected) ? other : expected;
        }
        if (reinterpret_cast<const T*>(data)[i] != static_cast<T>(expected)) return false;
    }
    return true;
}

static int run(int64_t rank, int64_t size, char* const* slots, char* const* segments, int64_t rounds) {
    int64_t length = FLIGHT * (LONGEST + 8) * 8;
    std::vector<char*> arrays(size);
    Node node = {rank, size, 0, 0, 20, 1, slots, segments, &length, arrays.data(), 0, {}};
    std::mt19937 own(rank), common(1);  // what all ranks decide alike comes from the second
    char* beside = zeros(length);
    for (int64_t round = 0; round < rounds; round++) {
        Collective flight[FLIGHT] = {};
        int status[FLIGHT];
        char* at = segments[rank];
        char* at_beside = beside;
        int64_t many = 1 + common() % FLIGHT;
        for (int64_t n = 0; n < many; n++) {
            int64_t count = COUNTS[common() % (sizeof COUNTS / sizeof *COUNTS)], kind = common() % 8, who = common() % 3;
            int64_t bytes = count * (kind < 4 ? 4 : 8);
            bool in_window = who == 0 || (who == 1 && own() % 2 == 0) || (who == 2 && rank != 0);
            char*& place = in_window ? at : at_beside;
            for (int64_t i = 0; i < count; i++) {
                if (kind < 4) reinterpret_cast<float*>(place)[i] = value(rank, i, round);
                else reinterpret_cast<double*>(place)[i] = value(rank, i, round);
            }
            flight[n].node = &node;
            flight[n].limit_ns = own() % 2 * 100000;
            status[n] = disttrain_start_all_reduce(&flight[n], place, count * 64 + kind);
            place += (bytes + 7) / 8 * 8;  // close to the next: who writes too much spoils that
        }
        for (int64_t left = many; left;) {
            left = 0;
            for (int64_t turn = 0, n = own() % many; turn < many; turn++, n = (n + 1) % many) {
                if (status[n] == WAITS) status[n] = disttrain_continue_all_reduce(&flight[n], own() % 3 ? 0 : 100000);
                left += status[n] == WAITS;
            }
        }
        for (int64_t n = 0; n < many; n++) {
            const Collective& c = flight[n];
            if (status[n] != DONE) return 1;
            bool right = c.kind < 4 ? is_right<float>(c.data, c.count, c.kind, size, round)
                                    : is_right<double>(c.data, c.count, c.kind - 4, size, round);
            if (!right) return 1;
        }
    }
    std::free(beside);
    return 0;
}

int main(int, char** arguments) {
    int64_t size = std::atoll(arguments[1]), rounds = std::atoll(arguments[2]);
    std::vector<char*> slots, segments;
    for (int64_t rank = 0; rank < size; rank++) {
        slots.push_back(zeros(disttrain_slots_bytes()));
        segments.push_back(zeros(FLIGHT * (LONGEST + 8) * 8));
    }
    std::vector<int> failed(size);
    std::vector<std::thread> ranks;
    for (int64_t rank = 0; rank < size; rank++)
        ranks.emplace_back([&, rank] { failed[rank] = run(rank, size, slots.data(), segments.data(), rounds); });
    for (std::thread& rank : ranks) rank.join();
    int total = 0;
    for (int64_t rank = 0; rank < size; rank++) {
        total += failed[rank];
        std::free(slots[rank]);
        std::free(segments[rank]);
    }
    std::printf("%d failed\n", total);
    return total != 0;
}
