// Working memory that a thread keeps between calls: memory touched for the first time costs more than it holds.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace disttrain {

constexpr int64_t CACHE_LINE = 64;

// Memory in parts, each aligned to 64 bytes. Ask for all parts' sizes first, then take them in any order.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    static int64_t rounded(int64_t bytes) { return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

    // Makes `bytes` available, counted with `rounded` for each part; false where there is no memory.
    bool reserve(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        std::free(memory_);
        memory_ = static_cast<char*>(std::aligned_alloc(CACHE_LINE, rounded(bytes)));
        size_ = memory_ ? bytes : 0;
        return memory_ != nullptr;
    }

    // Returns `count` elements, not initialized, aligned to 64 bytes.
    template <typename T> T* take(int64_t count) {
        char* at = memory_ + used_;
        used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
        return reinterpret_cast<T*>(at);
    }

  private:
    char* memory_ = nullptr;
    int64_t size_ = 0;
    int64_t used_ = 0;
};

}  // namespace disttrain
