// Work divided among the threads of one worker: one by default, and then nothing here costs anything.
//
// What a thread computes must not depend on how many there are: a range is divided where results are independent of
// each other, never within a sum. So the bits are the same for any number of threads.
#pragma once

#include <cstdint>

namespace disttrain {

typedef void (*Part)(const void* work, int64_t begin, int64_t end);

// Calls part(work, begin, end) for ranges that make up [0, count), at once; returns when all have returned.
void divide(int64_t count, int64_t least, Part part, const void* work);

// Calls work(begin, end) for ranges that make up [0, count), each of at least `least`, and returns when all are done.
// Within a part of such work, or beside another thread's, there is only the calling thread.
template <typename Work> void parallel(int64_t count, int64_t least, const Work& work) {
    divide(count, least, [](const void* w, int64_t begin, int64_t end) { (*static_cast<const Work*>(w))(begin, end); },
           &work);
}

}  // namespace disttrain
