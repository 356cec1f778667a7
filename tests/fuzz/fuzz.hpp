// Shared by all harnesses: reading choices from the input, checks, and a heap that counts and can fail. Each harness
// is one translation unit that defines LLVMFuzzerTestOneInput().
#pragma once

#include "../../wschat.hpp"

#include <malloc.h>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

using wschat::CloseCause;
using wschat::CloseCode;
using wschat::Duration;
using wschat::IpAddress;
using wschat::Json;
using wschat::Limits;
using wschat::Message;
using wschat::Opcode;
using wschat::Request;
using wschat::Response;
using wschat::Server;
using wschat::Time;
using wschat::WriteStatus;
using wschat::detail::Cidr;
using wschat::detail::Connection;
using wschat::detail::Event;
using wschat::detail::ListenAddress;
using wschat::detail::Pattern;
using wschat::detail::RequestParser;
using wschat::detail::Role;
using wschat::detail::Utf8Validator;
using wschat::detail::wants_upgrade;

// ---- checks --------------------------------------------------------------------------------------------------------

// Aborts the program. libFuzzer saves the input.
[[noreturn]] inline void fail(std::string_view failure, std::string_view detail = {}) {
    std::fprintf(stderr, "\nCHECK FAILED: %s\n", std::string(failure).c_str());
    if (!detail.empty()) std::fprintf(stderr, "  %s\n", wschat::escape_for_log(detail, 4000).c_str());
    std::abort();
}
inline void check(bool condition, std::string_view failure, std::string_view detail = {}) {
    if (!condition) fail(failure, detail);
}
inline void check_equal(std::string_view actual, std::string_view expected, std::string_view failure) {
    if (actual == expected) return;
    const std::size_t shorter = (std::min)(actual.size(), expected.size());
    std::size_t at = 0;
    while (at < shorter && actual[at] == expected[at]) ++at;
    const std::size_t from = at - (std::min)(at, std::size_t{300});
    std::fprintf(stderr, "\n  actual:   ...%s\n  expected: ...%s\n",
                 wschat::escape_for_log(actual.substr(from), 600).c_str(),
                 wschat::escape_for_log(expected.substr(from), 600).c_str());
    fail(failure, "they differ at byte " + std::to_string(at));
}

// ---- the input -----------------------------------------------------------------------------------------------------

// Reads the fuzzer's bytes from the front. Returns 0 past the end, so every input is valid.
class InputReader {
public:
    InputReader(const std::uint8_t* data, std::size_t size) : remaining_(reinterpret_cast<const char*>(data), size) {}

    bool empty() const { return remaining_.empty(); }
    unsigned byte() {
        const std::string_view next = bytes(1);
        return next.empty() ? 0 : static_cast<unsigned char>(next.front());
    }
    // Returns at most n of the remaining bytes.
    std::string_view bytes(std::size_t n) {
        const std::string_view taken = remaining_.substr(0, n);
        remaining_.remove_prefix(taken.size());
        return taken;
    }
    // Returns as many bytes as the next byte says.
    std::string_view counted_bytes() { return bytes(byte()); }
    std::string_view remaining_bytes() { return bytes(remaining_.size()); }

private:
    std::string_view remaining_;
};

// A xorshift32 generator.
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

// Splits a stream into chunks: one chunk, single bytes, or random sizes. Short and long random chunks are equally
// likely.
class Chunker {
public:
    enum class Kind { whole, bytes, random };

    explicit Chunker(Kind kind, unsigned seed = 0) : kind_(kind), random_(seed) {}
    std::size_t next_size(std::size_t remaining) {
        if (kind_ == Kind::whole || remaining < 2) return remaining;
        if (kind_ == Kind::bytes) return 1;
        return 1 + random_.below((std::min)(remaining, std::size_t{1} << random_.below(17)));
    }
    bool flip() { return kind_ == Kind::random && random_.below(2) == 0; }

private:
    Kind kind_;
    Random random_;
};

// A heap copy of some bytes, at an offset in its block. The block ends with the bytes, so AddressSanitizer reports any
// access past them.
class ExactCopy {
public:
    explicit ExactCopy(std::string_view bytes, std::size_t offset = 0)
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

// ---- the heap ------------------------------------------------------------------------------------------------------

struct Heap {
    std::size_t live = 0;
    std::size_t peak = 0;
    std::size_t fail_after = 0;  // the n-th allocation from now throws bad_alloc; 0: none
};
inline Heap heap;

// Allocations in this scope belong to the harness and never fail.
class HarnessAllocations {
public:
    HarnessAllocations() : fail_after_(std::exchange(heap.fail_after, 0u)) {}
    HarnessAllocations(const HarnessAllocations&) = delete;
    HarnessAllocations& operator=(const HarnessAllocations&) = delete;
    ~HarnessAllocations() { heap.fail_after = fail_after_; }

private:
    std::size_t fail_after_;
};

inline void* allocate(std::size_t size) {
    if (heap.fail_after != 0 && --heap.fail_after == 0) throw std::bad_alloc();
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
// std::stable_sort uses this one.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    const fuzz::HarnessAllocations guard;
    return fuzz::allocate(size);
}
void operator delete(void* block) noexcept { fuzz::release(block); }
void operator delete[](void* block) noexcept { fuzz::release(block); }
void operator delete(void* block, std::size_t) noexcept { fuzz::release(block); }
void operator delete[](void* block, std::size_t) noexcept { fuzz::release(block); }
