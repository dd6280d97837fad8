// All-reduce among the ranks of a node, which see each other's memory: sum, maximum or minimum, float32 or float64.
//
//   out[i] = (..(x_0[i] + x_1[i]) + ..) + x_(p-1)[i]     in place, on every rank, x_r being the array of rank r
//
// A fourth operation, the first, spreads the array of rank 0 in the same ways: out[i] = x_0[i].
//
// The order is that of the ranks, whatever the size and whoever computes: the same bits on all. Each rank announces its
// array in a slot, which it alone writes and all read. Where every array lies where all can reach it, in a window of
// memory that all have mapped, or, when it is not long, as a copy in the slot itself, each rank combines its part of all
// and writes that to all: they meet twice, and each element crosses as often as in a ring. What is short is always in
// the slots, and every rank combines all of it: they meet once. NaN goes through a maximum as through NumPy's.
//
// Where an array is long and lies elsewhere, all ranks pass theirs piece by piece through lanes that all have mapped. A
// piece has a part for each rank, which that combines: a rank puts the others' parts of its piece into its lane, combines
// its own part of what lies in the other lanes, in place there, and takes from its lane what the others have made of their
// parts. Whoever has read a line of a lane last is the next to write to it: then it is in that core's cache already, for
// it alone. A lane holds one piece, which stays in the caches. A rank has one lane: what passes there does so in the order
// of collectives, after all earlier ones have been found to need the lane no more.
//
// Of another dtype only the announcements are compared. They say what is to be combined, and which collectives by
// messages came before: ranks that have come here by different calls differ.
//
// Flags are numbers of collectives, which only grow: an array is there when its slot has the number (release, acquire).
// A slot serves again SLOTS collectives later, when every rank is done with what it held.
//
// Nothing here blocks for longer than it is told: whoever waits comes back to the interpreter for signals and messages.

#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LINE = 64, SLOTS = 8;
constexpr int64_t KIND_BITS = 6, COUNT_BITS = 36;
constexpr int64_t MAIL_BYTES = 1 << 17, SHORT_BYTES = 1 << 11;
constexpr int64_t PIECE_BYTES = 1 << 20;

// As in disttrain/comm/waiting.py, where it was measured.
constexpr int64_t YIELD_NS = 1000000, SLEEP_NS = 50000;

enum Status : int { WAITS, DONE, ELSEWHERE, DIFFERS };
enum Phase : int64_t { NEW, ANNOUNCED, QUEUED, PASSING, WRITTEN, TAKEN };

// What a rank announces: `window` is IN_SLOT for a copy in the slot, NOWHERE where others cannot reach it.
constexpr int64_t IN_SLOT = -1, NOWHERE = -2;
struct Announcement {
    int64_t what, others, window, offset;
};

static_assert(std::atomic<int64_t>::is_always_lock_free, "flags between processes must be plain memory");

struct alignas(LINE) Slot {
    std::atomic<int64_t> announced;  // the last collective that was announced here
    Announcement what;
    int64_t taken;                                // the last one here whose result this rank has: of interest to it alone
    alignas(LINE) std::atomic<int64_t> finished;  // the last one here to which this rank has nothing to add any more
    alignas(LINE) char mail[MAIL_BYTES];
};

// Where pieces of a rank's arrays pass; it lies behind the rank's slots.
struct alignas(LINE) Lane {
    // Over all collectives, two for each piece: the others' parts are here; this rank's is combined, wherever it lies.
    std::atomic<int64_t> steps;
    alignas(LINE) char piece[PIECE_BYTES];
};

// The ranks of a node, as one of them sees them.
struct Node {
    int64_t rank, size, next;
    int64_t others;          // digest of the collectives that were begun without this memory
    int64_t spins;           // looks before the core is offered to others
    int64_t windows;
    Slot* const* slots;      // size: the SLOTS slots of each rank
    char* const* segments;   // windows x size: where each rank's segment of a window lies here; null: given up
    const int64_t* lengths;  // windows: bytes of a segment
    char** arrays;           // size: room for where arrays lie
    int64_t settled;          // all collectives up to this one need the lane no more
    int64_t freed_by[SLOTS];  // the last one in each slot that needs it no more
};

// A collective under way.
struct Collective {
    Node* node;
    int64_t limit_ns;  // how long its start may wait
    int64_t number, what, others, count, kind;
    char* data;
    int64_t phase, ready, waited_ns;  // ready: ranks of which it is known that they have come as far
    int64_t first;                    // the steps in the lane before its own
};

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

inline Slot& slot_of(const Collective& c, int64_t rank) { return c.node->slots[rank][c.number % SLOTS]; }

inline Lane& lane_of(const Collective& c, int64_t rank) {
    return *reinterpret_cast<Lane*>(c.node->slots[rank] + SLOTS);
}

// Returns where the array of `rank` is here, which every rank has announced.
inline char* array_of(const Collective& c, int64_t rank) {
    Slot& slot = slot_of(c, rank);
    if (slot.what.window == IN_SLOT) return slot.mail;
    return c.node->segments[slot.what.window * c.node->size + rank] + slot.what.offset;
}

// Returns whether is_ready(slot) holds for every rank's slot; waits for that for about limit_ns.
template <typename IsReady> bool all_are(Collective& c, int64_t limit_ns, const IsReady& is_ready) {
    auto look = [&] {
        while (c.ready < c.node->size && is_ready(slot_of(c, c.ready))) c.ready++;
        return c.ready == c.node->size;
    };
    bool is_so = look();
    if (!is_so && limit_ns > 0) {
        for (int64_t spin = c.waited_ns ? c.node->spins : 0; !is_so && spin < c.node->spins; spin++) {
            pause();
            is_so = look();
        }
        for (int64_t begin = now_ns(), waited = 0; !is_so && waited < limit_ns; waited = now_ns() - begin) {
            if (c.waited_ns + waited < YIELD_NS) {
                sched_yield();
            } else {
                timespec nap = {0, SLEEP_NS};
                nanosleep(&nap, nullptr);
            }
            is_so = look();
        }
        if (!is_so) c.waited_ns += limit_ns;
    }
    if (is_so) c.ready = c.waited_ns = 0;
    return is_so;
}

// The ranks' operations, of single elements and of vectors of them.
struct Sum {
    template <typename T> static T of(T a, T b) { return a + b; }
};
struct Maximum {
    template <typename T> static T of(T a, T b) { return (a >= b) | (a != a) ? a : b; }
};
struct Minimum {
    template <typename T> static T of(T a, T b) { return (a <= b) | (a != a) ? a : b; }
};
struct First {
    template <typename T> static T of(T a, T) { return a; }
};

// Combines elements [begin, end) of all ranks' arrays x, in the order of ranks, and writes them to the arrays y, which
// may be the same. Line after line: what is read is written at once, and stays in registers between.
template <typename T, typename Op>
inline void combine(T* const* x, int64_t size, T* const* y, int64_t targets, int64_t begin, int64_t end) {
    typedef T Line __attribute__((vector_size(LINE)));
    constexpr int64_t PER_LINE = LINE / sizeof(T);
    int64_t at = begin;
    for (; at + PER_LINE <= end; at += PER_LINE) {
        Line line, next;
        std::memcpy(&line, x[0] + at, LINE);
        for (int64_t rank = 1; rank < size; rank++) {
            std::memcpy(&next, x[rank] + at, LINE);
            line = Op::of(line, next);
        }
        for (int64_t t = 0; t < targets; t++) std::memcpy(y[t] + at, &line, LINE);
    }
    for (; at < end; at++) {  // copied as well: an array that is not in a window may begin anywhere
        T value, next;
        std::memcpy(&value, x[0] + at, sizeof(T));
        for (int64_t rank = 1; rank < size; rank++) {
            std::memcpy(&next, x[rank] + at, sizeof(T));
            value = Op::of(value, next);
        }
        for (int64_t t = 0; t < targets; t++) std::memcpy(y[t] + at, &value, sizeof(T));
    }
}

template <typename T> T* const* arrays_of(const Collective& c) {
    for (int64_t rank = 0; rank < c.node->size; rank++) c.node->arrays[rank] = array_of(c, rank);
    return reinterpret_cast<T* const*>(c.node->arrays);
}

template <typename T, typename Op> void combine_all(const Collective& c) {
    combine<T, Op>(arrays_of<T>(c), c.node->size, reinterpret_cast<T* const*>(&c.data), 1, 0, c.count);
}

// Combines elements [begin, end) of all ranks' arrays where they are. Of two ranks with addresses in registers: a tenth
// faster where arrays lie in the caches.
template <typename T, typename Op> inline void combine_here(T* const* x, int64_t size, int64_t begin, int64_t end) {
    if (size == 2) {
        T* const both[] = {x[0], x[1]};
        combine<T, Op>(both, 2, both, 2, begin, end);
    } else {
        combine<T, Op>(x, size, x, size, begin, end);
    }
}

template <typename T, typename Op> void combine_part(const Collective& c) {
    // Whole lines: no two ranks write to the same one, where arrays begin at one.
    constexpr int64_t PER_LINE = LINE / sizeof(T);
    int64_t lines = (c.count + PER_LINE - 1) / PER_LINE, rank = c.node->rank, size = c.node->size;
    int64_t begin = lines * rank / size * PER_LINE, end = lines * (rank + 1) / size * PER_LINE;
    combine_here<T, Op>(arrays_of<T>(c), size, begin, end < c.count ? end : c.count);
}

// Combines bytes [begin, end) of a piece: the others' in their lanes, and this rank's, which begins at `data`.
template <typename T, typename Op> void combine_piece(const Collective& c, char* data, int64_t begin, int64_t end) {
    char** x = c.node->arrays;
    for (int64_t rank = 0; rank < c.node->size; rank++) x[rank] = lane_of(c, rank).piece;
    x[c.node->rank] = data;
    combine_here<T, Op>(reinterpret_cast<T* const*>(x), c.node->size, begin / sizeof(T), end / sizeof(T));
}

struct Work {
    void (*all)(const Collective&);
    void (*part)(const Collective&);
    void (*piece)(const Collective&, char* data, int64_t begin, int64_t end);
};

template <typename T, typename Op> constexpr Work OF = {combine_all<T, Op>, combine_part<T, Op>, combine_piece<T, Op>};

// By kind: float32, float64; of each sum, maximum, minimum, first.
constexpr Work WORK[] = {OF<float, Sum>,  OF<float, Maximum>,  OF<float, Minimum>,  OF<float, First>,
                         OF<double, Sum>, OF<double, Maximum>, OF<double, Minimum>, OF<double, First>};

constexpr int64_t KINDS = sizeof WORK / sizeof *WORK, OPS = 4;

inline int64_t element_bytes(const Collective& c) { return c.kind < OPS ? sizeof(float) : sizeof(double); }

inline int64_t bytes_of(const Collective& c) { return c.count * element_bytes(c); }

inline bool is_short(const Collective& c) { return bytes_of(c) <= SHORT_BYTES; }

void find(const Collective& c, Announcement& what) {
    int64_t bytes = bytes_of(c);
    bool is_aligned = reinterpret_cast<uintptr_t>(c.data) % element_bytes(c) == 0;
    for (int64_t w = 0; w < c.node->windows && is_aligned && !is_short(c); w++) {
        const char* segment = c.node->segments[w * c.node->size + c.node->rank];
        if (segment && c.data >= segment && c.data + bytes <= segment + c.node->lengths[w]) {
            what.window = w;
            what.offset = c.data - segment;
            return;
        }
    }
    if (bytes <= MAIL_BYTES) what.window = IN_SLOT;
}

void announce(const Collective& c) {
    Slot& own = slot_of(c, c.node->rank);
    own.what = {c.what, c.others, NOWHERE, 0};
    if (c.kind < KINDS) find(c, own.what);
    if (own.what.window == IN_SLOT) std::memcpy(own.mail, c.data, bytes_of(c));
    own.announced.store(c.number, std::memory_order_release);
}

// Notes that the collective needs the lane no more.
void settle(const Collective& c) {
    Node& node = *c.node;
    node.freed_by[c.number % SLOTS] = c.number;
    while (node.freed_by[(node.settled + 1) % SLOTS] > node.settled) node.settled++;
}

// Passes the array through the lane; returns whether that is done. Waits for about limit_ns, at each step, at most.
bool pass(Collective& c, int64_t limit_ns) {
    Lane& own = lane_of(c, c.node->rank);
    const int64_t rank = c.node->rank, size = c.node->size, total = bytes_of(c);
    int64_t steps = own.steps.load(std::memory_order_relaxed);
    auto at = [&] { return (steps - c.first) / 2 * PIECE_BYTES; };
    // Where a rank's part of the piece at byte `at` begins, in whole lines; that of rank `size` is the piece's end.
    auto part = [&](int64_t at, int64_t of) {
        int64_t bytes = total - at < PIECE_BYTES ? total - at : PIECE_BYTES;
        return of < size ? bytes / LINE * of / size * LINE : bytes;
    };
    auto copy_others = [&](char* to, const char* from, int64_t at) {
        int64_t begin = part(at, rank), after = part(at, rank + 1);
        std::memcpy(to, from, begin);
        std::memcpy(to + after, from + after, part(at, size) - after);
    };
    auto are_as_far = [&](Slot&) { return lane_of(c, c.ready).steps.load(std::memory_order_acquire) >= steps; };
    for (;; own.steps.store(++steps, std::memory_order_release)) {
        if (!all_are(c, limit_ns, are_as_far)) return false;
        char* data = c.data + at();
        if ((steps - c.first) % 2) {
            WORK[c.kind].piece(c, data, part(at(), rank), part(at(), rank + 1));
        } else {
            if (at() > 0) copy_others(data - PIECE_BYTES, own.piece, at() - PIECE_BYTES);
            if (at() >= total) return true;
            copy_others(own.piece, data, at());
        }
    }
}

// Returns DONE where every rank means the same, by arrays that all can reach.
Status compare(const Collective& c) {
    Status status = DONE;
    for (int64_t rank = 0; rank < c.node->size; rank++) {
        const Announcement& what = slot_of(c, rank).what;
        if (what.what != c.what || what.others != c.others) return DIFFERS;
        if (what.window == NOWHERE) status = ELSEWHERE;
    }
    return status;
}

}  // namespace

extern "C" {

// Returns the bytes of each rank's slots and lane: zeroed, aligned to 64 bytes, mapped by all.
int disttrain_slots_bytes() { return SLOTS * sizeof(Slot) + sizeof(Lane); }

// Moves on, waiting for about limit_ns at most where it must wait, and returns a Status. After ELSEWHERE, on all ranks,
// the array is as it was: it is of another dtype. After DIFFERS nothing can be started any more.
int disttrain_continue_all_reduce(Collective* c, int64_t limit_ns) {
    Slot& own = slot_of(*c, c->node->rank);
    if (c->phase == NEW) {
        int64_t before = c->number - SLOTS;
        auto is_free = [&](Slot& slot) { return slot.finished.load(std::memory_order_acquire) >= before; };
        if (before > 0 && (own.taken < before || !all_are(*c, limit_ns, is_free))) return WAITS;
        announce(*c);
        c->phase = ANNOUNCED;
    }
    Status status = DONE;
    if (c->phase == ANNOUNCED) {
        auto is_there = [&](Slot& slot) { return slot.announced.load(std::memory_order_acquire) >= c->number; };
        if (!all_are(*c, limit_ns, is_there)) return WAITS;
        status = compare(*c);
        if (status == DIFFERS) return DIFFERS;
        if (status == ELSEWHERE && c->kind < KINDS) {
            c->phase = QUEUED;
        } else {
            settle(*c);
            bool is_whole = status == ELSEWHERE || is_short(*c);  // others write nothing of it
            if (status == DONE) (is_whole ? WORK[c->kind].all : WORK[c->kind].part)(*c);
            own.finished.store(c->number, std::memory_order_release);
            c->phase = is_whole ? TAKEN : WRITTEN;
        }
    }
    if (c->phase == QUEUED) {
        if (c->node->settled != c->number - 1) return WAITS;  // who waits, waits for an earlier one
        c->first = lane_of(*c, c->node->rank).steps.load(std::memory_order_relaxed);
        c->phase = PASSING;
    }
    if (c->phase == PASSING) {
        if (!pass(*c, limit_ns)) return WAITS;
        settle(*c);
        own.finished.store(c->number, std::memory_order_release);
        c->phase = TAKEN;
        status = DONE;
    }
    if (c->phase == WRITTEN) {
        auto is_written = [&](Slot& slot) { return slot.finished.load(std::memory_order_acquire) >= c->number; };
        if (!all_are(*c, limit_ns, is_written)) return WAITS;
        if (own.what.window == IN_SLOT) std::memcpy(c->data, own.mail, bytes_of(*c));
    }
    own.taken = c->number;
    return status;
}

// Starts to combine elements at `data`, and goes on as above. All ranks start the same, in the same order. `what` is
// the kind in 6 bits, the count in 36, and above them a digest of what else must be equal. A kind is 0 to 3 for the sum,
// maximum, minimum and first of float32, 4 to 7 of float64, more for anything else, which ends with ELSEWHERE. c->node
// and c->limit_ns are set, c->node->size is at least 2. Few arguments: from Python each costs 0.1 us.
int disttrain_start_all_reduce(Collective* c, char* data, int64_t what) {
    int64_t count = what >> KIND_BITS & ((int64_t(1) << COUNT_BITS) - 1), kind = what & ((1 << KIND_BITS) - 1);
    Node* node = c->node;
    *c = {node, c->limit_ns, ++node->next, what, node->others, count, kind, data, NEW, 0, 0, 0};
    return disttrain_continue_all_reduce(c, c->limit_ns);
}

// After DIFFERS, sets `out` to what `rank` has announced.
void disttrain_announced(const Collective* c, int64_t rank, int64_t* out) { *out = slot_of(*c, rank).what.what; }

// What was written before this is seen before what is written after it.
void disttrain_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

}  // extern "C"
