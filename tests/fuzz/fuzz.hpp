// What the harnesses share: an input that is read as choices, checks that end the program, a heap that is counted. A
// harness is one translation unit, and defines LLVMFuzzerTestOneInput().
#pragma once

#include "../../wschat.hpp"

#include <malloc.h>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

// ---- checks ---------------------------------------------------------------------------------------------------------

// Ends the program; libFuzzer keeps the input.
[[noreturn]] inline void fail(std::string_view what, std::string_view detail = {}) {
    std::fprintf(stderr, "\nNOT SO: %s\n", std::string(what).c_str());
    if (!detail.empty()) std::fprintf(stderr, "  %s\n", wschat::escape_for_log(detail, 4000).c_str());
    std::abort();
}
inline void check(bool holds, std::string_view what, std::string_view detail = {}) {
    if (!holds) fail(what, detail);
}
inline void check_same(std::string_view a, std::string_view b, std::string_view what) {
    if (a == b) return;
    const std::size_t shorter = (std::min)(a.size(), b.size());
    const auto differ = std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(shorter), b.begin());
    const auto at = static_cast<std::size_t>(differ.first - a.begin()), from = at - (std::min)(at, std::size_t{300});
    std::fprintf(stderr, "\n  one:   ...%s\n  other: ...%s\n", wschat::escape_for_log(a.substr(from), 600).c_str(),
                 wschat::escape_for_log(b.substr(from), 600).c_str());
    fail(what, "they differ at byte " + std::to_string(at));
}

// ---- the input ------------------------------------------------------------------------------------------------------

// The fuzzer's bytes from the front. Past their end all choices are 0, so that every input means something.
class Choices {
public:
    Choices(const std::uint8_t* data, std::size_t size) : left_(reinterpret_cast<const char*>(data), size) {}

    bool over() const { return left_.empty(); }
    unsigned byte() {
        const std::string_view one = bytes(1);
        return one.empty() ? 0 : static_cast<unsigned char>(one.front());
    }
    // At most n of the bytes that are left.
    std::string_view bytes(std::size_t n) {
        const std::string_view taken = left_.substr(0, n);
        left_.remove_prefix(taken.size());
        return taken;
    }
    // As many bytes as the next byte says.
    std::string_view counted_bytes() { return bytes(byte()); }
    std::string_view rest() { return bytes(left_.size()); }

private:
    std::string_view left_;
};

// xorshift32: how a stream is cut, from a seed.
class Random {
public:
    explicit Random(unsigned seed) : state_(seed * 2654435761u + 88172645u) {}
    std::size_t below(std::size_t n) {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 17;
        state_ ^= state_ << 5;
        return state_ % n;
    }

private:
    std::uint32_t state_;
};

// How a stream is cut into pieces: not at all, into single bytes, or at random, with short pieces as likely as long ones.
class Cutter {
public:
    enum class Kind { whole, bytes, random };

    explicit Cutter(Kind kind, unsigned seed = 0) : kind_(kind), random_(seed) {}
    std::size_t next(std::size_t left) {
        if (kind_ == Kind::whole || left < 2) return left;
        if (kind_ == Kind::bytes) return 1;
        return 1 + random_.below((std::min)(left, std::size_t{1} << random_.below(17)));
    }
    bool flip() { return kind_ == Kind::random && random_.below(2) == 0; }

private:
    Kind kind_;
    Random random_;
};

// A copy in memory of its own, which ends where the bytes end, so that AddressSanitizer sees each byte that is read or
// written beyond. They begin `offset` bytes into the block.
class Exact {
public:
    explicit Exact(std::string_view bytes, std::size_t offset = 0)
        : block_(new char[offset + bytes.size()]), data_(block_.get() + offset), size_(bytes.size()) {
        if (!bytes.empty()) std::memcpy(data_, bytes.data(), bytes.size());
    }
    char* data() { return data_; }
    std::size_t size() const { return size_; }
    std::string_view view() const { return {data_, size_}; }

private:
    std::unique_ptr<char[]> block_;
    char* data_;
    std::size_t size_;
};

inline bool within(std::string_view part, std::string_view whole) {
    return part.empty() || (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

// ---- the heap -------------------------------------------------------------------------------------------------------

struct Heap {
    std::size_t live = 0;
    std::size_t peak = 0;
    std::size_t fail_in = 0;  // that many allocations from now one throws bad_alloc; 0: none
};
inline Heap heap;

// Memory that is of the harness, which never runs out.
class Spared {
public:
    Spared() : fail_in_(std::exchange(heap.fail_in, 0u)) {}
    Spared(const Spared&) = delete;
    Spared& operator=(const Spared&) = delete;
    ~Spared() { heap.fail_in = fail_in_; }

private:
    std::size_t fail_in_;
};

inline void* allocate(std::size_t size) {
    if (heap.fail_in != 0 && --heap.fail_in == 0) throw std::bad_alloc();
    void* block = std::malloc(size);
    if (block == nullptr) throw std::bad_alloc();
    heap.live += ::malloc_usable_size(block);
    heap.peak = (std::max)(heap.peak, heap.live);
    return block;
}
inline void release(void* block) {
    if (block != nullptr) heap.live -= ::malloc_usable_size(block);
    std::free(block);
}

}  // namespace fuzz

void* operator new(std::size_t size) { return fuzz::allocate(size); }
void* operator new[](std::size_t size) { return fuzz::allocate(size); }
// What the standard library uses to sort.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    const fuzz::Spared spared;
    return fuzz::allocate(size);
}
void operator delete(void* block) noexcept { fuzz::release(block); }
void operator delete[](void* block) noexcept { fuzz::release(block); }
void operator delete(void* block, std::size_t) noexcept { fuzz::release(block); }
void operator delete[](void* block, std::size_t) noexcept { fuzz::release(block); }
