// The threads of one worker: started when first needed, then waiting for work until the process ends.

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

using namespace disttrain;

namespace {

std::atomic<int64_t> wanted{1};     // threads, the caller's among them
thread_local bool inside = false;  // a part of some work

// The others, and what they are to do. A process that was forked has none of its parent's: it makes its own.
struct Pool {
    const pid_t process = getpid();
    std::mutex owner;  // held by whose work it is
    std::mutex lock;   // of all below
    std::condition_variable begun, ended;
    int64_t threads = 0, round = 0, parts = 0, next = 0, left = 0, count = 0;
    Part part = nullptr;
    const void* work = nullptr;

    void do_parts(std::unique_lock<std::mutex>& held) {
        while (next < parts) {
            int64_t i = next++;
            held.unlock();
            part(work, count * i / parts, count * (i + 1) / parts);
            held.lock();
            if (--left == 0) ended.notify_one();
        }
    }

    void serve() {
        inside = true;
        std::unique_lock<std::mutex> held(lock);
        for (int64_t seen = 0;;) {
            begun.wait(held, [&] { return round != seen; });
            seen = round;
            do_parts(held);
        }
    }

    // Makes sure that there are `number` threads beside the caller's, or as many as the system gives.
    void grow(int64_t number) {
        while (threads < number) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;
            }
            threads++;
        }
    }

    void run(int64_t number, int64_t total, Part of_work, const void* what) {
        std::unique_lock<std::mutex> held(lock);
        grow(number - 1);
        round++, parts = number, next = 0, left = number, count = total, part = of_work, work = what;
        begun.notify_all();
        do_parts(held);
        ended.wait(held, [&] { return left == 0; });
    }
};

// Never freed: its threads wait on it until the process ends.
Pool* pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* held = current.load();
    while (!held || held->process != getpid()) {
        Pool* made = new Pool;
        if (current.compare_exchange_strong(held, made)) return made;
        delete made;
    }
    return held;
}

}  // namespace

void disttrain::divide(int64_t count, int64_t least, Part part, const void* work) {
    int64_t number = std::min(wanted.load(std::memory_order_relaxed), count / std::max<int64_t>(least, 1));
    if (number <= 1 || inside) {
        if (count > 0) part(work, 0, count);
        return;
    }
    Pool* threads = pool();
    std::unique_lock<std::mutex> mine(threads->owner, std::try_to_lock);
    if (!mine.owns_lock()) {  // another thread of the program divides its work: each does its own
        part(work, 0, count);
        return;
    }
    inside = true;
    threads->run(number, count, part, work);
    inside = false;
}

extern "C" {

// Sets how many threads compute; they are started when they are needed.
void disttrain_set_threads(int64_t number) { wanted = std::max<int64_t>(number, 1); }

}  // extern "C"
