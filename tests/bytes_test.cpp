// Section 3 of the header: buffers, output queues, UTF-8, SHA-1, base64, log lines, maps, Json, text helpers, rates.
#include "support.hpp"

#include <limits>
#include <random>
#include <set>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono;

// ---- this program counts all allocations ----------------------------------------------------------------------------

namespace {

struct Heap {
    std::size_t allocations = 0;  // calls of operator new
    std::size_t live = 0;         // allocated bytes
};
thread_local Heap heap;

constexpr std::size_t size_field = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

WSCHAT_TEST_NOINLINE void* operator new(std::size_t size) {
    void* block = std::malloc(size_field + size);
    if (block == nullptr) throw std::bad_alloc();
    std::memcpy(block, &size, sizeof size);
    ++heap.allocations;
    heap.live += size;
    return static_cast<char*>(block) + size_field;
}
// Replaces the version of AddressSanitizer.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    try {
        return ::operator new(size);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
WSCHAT_TEST_NOINLINE void operator delete(void* memory) noexcept {
    if (memory == nullptr) return;
    void* block = static_cast<char*>(memory) - size_field;
    std::size_t size = 0;
    std::memcpy(&size, block, sizeof size);
    heap.live -= size;
    std::free(block);
}
void operator delete(void* memory, std::size_t) noexcept { ::operator delete(memory); }

namespace {

// The distributions of the standard library are not the same on every platform.
class Random {
public:
    std::size_t below(std::size_t end) { return static_cast<std::size_t>(engine_()) % end; }
    std::size_t from_to(std::size_t first, std::size_t last) { return first + below(last - first + 1); }
    std::string bytes(std::size_t size) {
        std::string result(size, '\0');
        for (char& c : result) c = static_cast<char>(engine_());
        return result;
    }

private:
    std::mt19937 engine_{20240229};
};

using Pieces = std::vector<std::string_view>;

Pieces pieces_of(const SendQueue& queue, std::size_t max) {
    Pieces pieces(max);
    pieces.resize(queue.gather(pieces.data(), max));
    return pieces;
}

std::string content_of(const SendQueue& queue) {
    std::string content;
    for (const std::string_view piece : pieces_of(queue, 10'000)) content += piece;
    return content;
}

}  // namespace

TEST_SUITE_BEGIN("bytes");

// ---- Bytes ----------------------------------------------------------------------------------------------------------

TEST_CASE("a pool uses the blocks of destroyed objects again, also that of an object whose constructor threw") {
    struct Object {
        Object(BlockPool& its_pool, bool fails) : pool_(its_pool) {
            if (fails) throw std::runtime_error("no object");
        }
        BlockPool& pool() const { return pool_; }
        BlockPool& pool_;
        char more[100] = {};
    };
    const std::size_t before = heap.live;
    {
        BlockPool blocks;
        std::vector<PooledPtr<Object>> objects;
        objects.reserve(100);
        for (int round = 0; round < 3; ++round) {
            const std::size_t allocations = heap.allocations;
            for (int i = 0; i < 100; ++i) objects.push_back(make_pooled<Object>(blocks, blocks, false));
            CHECK(heap.allocations - allocations == (round == 0 ? 100 : 100 - BlockPool::max_kept));
            for (std::size_t i = 0; i < 100; ++i)
                for (std::size_t k = 0; k < i; ++k) REQUIRE(objects[i] != objects[k]);
            objects.clear();
            CHECK_THROWS(make_pooled<Object>(blocks, blocks, true));
        }
    }
    CHECK(heap.live == before);
}

TEST_CASE("a buffer contains all appended bytes, for pieces of any size") {
    Random random;
    Bytes bytes;
    std::string expected;
    for (int i = 0; i < 200; ++i) {
        const std::string piece = random.bytes(random.below(300));
        if (i % 3 == 0) {
            bytes.reserve(piece.size());
            REQUIRE(bytes.available() >= piece.size());
            if (!piece.empty()) std::memcpy(bytes.end(), piece.data(), piece.size());
            bytes.advance(piece.size());
        } else {
            bytes.append(piece);
        }
        expected += piece;
        REQUIRE(bytes.view() == expected);
    }
    CHECK(bytes.size() == expected.size());
    CHECK(std::string(bytes.data(), bytes.size()) == expected);
}

TEST_CASE("a buffer grows to at most twice its size, with few allocations") {
    Bytes bytes;
    const std::size_t before = heap.allocations;
    for (int i = 0; i < 100'000; ++i) {
        bytes.append("x", 1);
        if (bytes.capacity() > 2 * bytes.size()) FAIL_CHECK("capacity ", bytes.capacity(), ", size ", bytes.size());
    }
    CHECK(heap.allocations - before < 20);
}

TEST_CASE("clear() keeps the memory of a buffer and release() frees it") {
    const std::size_t before = heap.live;
    Bytes bytes;
    CHECK(bytes.empty());
    bytes.append("something");
    const std::size_t grown = heap.live;
    CHECK(grown > before);
    bytes.clear();
    CHECK(bytes.empty());
    CHECK(heap.live == grown);
    bytes.release();
    CHECK(bytes.available() == 0);
    CHECK(heap.live == before);
    bytes.append("again");
    CHECK(bytes.view() == "again");
}

TEST_CASE("a buffer can be moved and swapped") {
    Bytes a, b;
    a.append("first");
    b.append("second");
    std::swap(a, b);
    CHECK(a.view() == "second");
    CHECK(b.view() == "first");
    const Bytes c(std::move(a));
    CHECK(c.view() == "second");
}

// ---- SendArena and SendQueue ----------------------------------------------------------------------------------------

TEST_CASE("live slices of an arena never overlap") {
    Random random;
    SendArena arena;
    std::vector<std::pair<Slice, std::string>> live;
    for (int i = 0; i < 600; ++i) {
        // Sizes below and above a frame, a page and a chunk.
        const std::size_t size = i % 100 == 99 ? random.from_to(60'000, 300'000) : random.from_to(1, 4'000);
        const std::string bytes = random.bytes(size);
        const Slice slice = copy(arena, bytes);
        REQUIRE(slice.size() == bytes.size());
        live.emplace_back(slice, bytes);
        if (i % 7 == 0) live.erase(live.begin() + static_cast<std::ptrdiff_t>(random.below(live.size())));
    }
    for (const auto& [slice, bytes] : live) REQUIRE(slice.view() == bytes);
}

TEST_CASE("adjacent slices are one piece in a queue") {
    SendArena arena;
    SendQueue queue;
    queue.append(copy(arena, "one "));
    queue.append(copy(arena, "two "));
    queue.append(copy(arena, "three"));
    CHECK(queue.size() == 13);
    CHECK(pieces_of(queue, 8) == Pieces{"one two three"});
}

TEST_CASE("slices that are not adjacent stay separate and in order") {
    SendArena arena;
    SendQueue queue, other;
    queue.append(copy(arena, "one "));
    other.append(copy(arena, "other"));
    queue.append(copy(arena, "two "));
    queue.append(copy(arena, "three"));
    CHECK(pieces_of(queue, 8) == Pieces{"one ", "two three"});
    CHECK(pieces_of(queue, 1) == Pieces{"one "});
    CHECK(pieces_of(other, 8) == Pieces{"other"});
}

TEST_CASE("a slice may be in many queues, and several times in one queue") {
    SendArena arena;
    std::vector<SendQueue> members(3);
    const Slice slice = copy(arena, "hello ");
    for (SendQueue& queue : members) queue.append(slice);
    members[0].append(slice);
    members[1].consume(6);
    CHECK(content_of(members[0]) == "hello hello ");
    CHECK(members[1].empty());
    CHECK(content_of(members[2]) == "hello ");
}

TEST_CASE("a queue returns its bytes in order for every step size") {
    for (std::size_t step = 1; step <= 14; ++step) {
        SendArena arena;
        SendQueue queue;
        std::string expected;
        for (const std::string_view word : {"one", "three", "five", "x", "seven"}) {
            queue.append(copy(arena, word));
            expected += word;
            if (word.size() > 3) copy(arena, "between");
        }
        std::string taken;
        while (!queue.empty()) {
            const std::string rest = content_of(queue);
            REQUIRE(rest.size() == queue.size());
            const std::size_t size = std::min(step, queue.size());
            taken += rest.substr(0, size);
            queue.consume(size);
        }
        CHECK(taken == expected);
        CHECK(pieces_of(queue, 8).empty());
    }
}

TEST_CASE("a partly sent queue can be detached from the pool") {
    // Three pieces that are not adjacent. The kernel takes one and a half of them.
    SendArena arena;
    SendQueue queue;
    for (const std::string_view word : {"first ", "second ", "third"}) {
        queue.append(copy(arena, word));
        copy(arena, "between");
    }
    queue.consume(9);
    queue.detach_from_pool();
    CHECK(queue.size() == 9);
    CHECK(content_of(queue) == "ond third");
}

TEST_CASE("an empty slice does not change a queue") {
    SendArena arena;
    SendQueue queue;
    queue.append(copy(arena, ""));
    CHECK(queue.empty());
    CHECK(pieces_of(queue, 8).empty());
    queue.append(copy(arena, "one "));
    copy(arena, "between");
    queue.append(copy(arena, "two"));
    queue.append(copy(arena, ""));
    queue.consume(1);
    queue.detach_from_pool();
    CHECK(content_of(queue) == "ne two");
    queue.consume(6);
    CHECK(queue.empty());
}

TEST_CASE("a queue behaves like a string in any sequence of append, consume and detach") {
    struct Member {
        SendQueue queue;
        std::string expected;
    };
    Random random;
    SendArena arena;
    std::vector<Member> members(6);
    const auto agrees = [](const Member& member, std::size_t max) {
        std::string gathered;
        const Pieces pieces = pieces_of(member.queue, max);
        for (const std::string_view piece : pieces) {
            if (piece.empty()) return false;
            gathered += piece;
        }
        const bool all = pieces.size() < max;
        return member.queue.size() == member.expected.size() && member.queue.empty() == member.expected.empty() &&
               (all ? gathered == member.expected : member.expected.compare(0, gathered.size(), gathered) == 0);
    };
    for (int step = 0; step < 20'000; ++step) {
        const bool large = random.below(1'000) == 0;
        const std::string bytes = random.bytes(large ? random.from_to(60'000, 300'000) : random.from_to(1, 200));
        const Slice slice = copy(arena, bytes);
        for (Member& member : members) {
            const std::size_t dice = random.below(1'000);
            if (dice < 420) {
                member.queue.append(slice);
                member.expected += bytes;
            } else if (dice < 750) {
                const std::size_t some = member.expected.size() > 30'000 ? 30'000 : 225;
                const std::size_t size = random.below(std::min(member.expected.size(), some) + 1);
                member.queue.consume(size);
                member.expected.erase(0, size);
            } else if (dice < 754) {
                member.queue.detach_from_pool();
            } else if (dice == 754) {
                member.queue.consume(member.expected.size());
                member.expected.clear();
            } else if (dice == 755 && random.below(5) == 0) {
                member.queue.clear();
                member.expected.clear();
            }
            if (!agrees(member, random.from_to(1, 8))) FAIL("after step ", step);
        }
    }
    for (const Member& member : members) CHECK(agrees(member, 10'000));
}

TEST_CASE("the arena allocates nothing while the peers read") {
    SendArena arena;
    std::vector<SendQueue> members(40);
    std::vector<std::string_view> pieces(64);
    const std::string payload(20'000, 'x');
    std::size_t sent = 0;
    const auto turn = [&] {
        // Four rooms with ten members each, twenty messages of many sizes, and a short message to one member.
        for (std::size_t room = 0; room < 4; ++room) {
            for (std::size_t i = 0; i < 20; ++i) {
                const Slice slice = copy(arena, std::string_view(payload).substr(0, 1 + 1000 * i));
                for (std::size_t m = room; m < members.size(); m += 4) members[m].append(slice);
            }
        }
        members[7].append(copy(arena, "ping"));
        for (SendQueue& queue : members) {
            while (!queue.empty()) {
                const std::size_t count = queue.gather(pieces.data(), pieces.size());
                std::size_t size = 0;
                for (std::size_t i = 0; i < count; ++i) size += pieces[i].size();
                queue.consume(size);
                sent += size;
            }
        }
    };
    for (int i = 0; i < 10; ++i) turn();
    const std::size_t before = heap.allocations;
    sent = 0;
    for (int i = 0; i < 100; ++i) turn();
    CHECK(heap.allocations == before);
    CHECK(sent == 100 * (40 * (20 + 1000 * 190) + 4));
}

TEST_CASE("a stalled queue that is detached holds no chunks of the arena") {
    Random random;
    SendArena arena;
    SendQueue stalled, healthy;
    const std::string payload = random.bytes(1000);
    std::string expected;
    const auto turn = [&](std::size_t bytes) {
        for (std::size_t written = 0; written < bytes; written += payload.size()) {
            const Slice slice = copy(arena, payload);
            healthy.append(slice);
            // The stalled peer gets one message of a hundred: without detaching it would hold every chunk.
            if (random.below(100) == 0) {
                stalled.append(slice);
                expected += payload;
            }
        }
        healthy.consume(healthy.size());
        stalled.detach_from_pool();
    };
    turn(4'000'000);
    REQUIRE(stalled.size() > 16'000);
    const std::size_t live = heap.live, backlog = stalled.size();
    for (int i = 0; i < 200; ++i) turn(100'000);
    // The heap grows by the bytes of the stalled queue, in blocks of some KiB.
    CHECK(heap.live - live < 2 * (stalled.size() - backlog) + expected.capacity() + 65'536);
    CHECK(content_of(stalled) == expected);
    const std::size_t before = heap.allocations;
    for (int i = 0; i < 200'000; ++i) {
        healthy.append(copy(arena, payload));
        healthy.consume(payload.size());
    }
    CHECK(heap.allocations == before);
    CHECK(content_of(stalled) == expected);
}

TEST_CASE("a stalled queue of small pieces uses at most twice the memory of its bytes") {
    SendArena arena;
    SendQueue stalled;
    copy(arena, "the arena has its first chunk");
    const std::size_t before = heap.live;
    for (int turn = 0; turn < 100; ++turn) {
        for (int i = 0; i < 100; ++i) {
            stalled.append(copy(arena, "small piece"));
            copy(arena, "-");
        }
        stalled.detach_from_pool();
    }
    CHECK(stalled.size() == 110'000);
    CHECK(heap.live - before < 2 * stalled.size());
    stalled.consume(stalled.size());
    CHECK(heap.live - before < 4'096);
}

TEST_CASE("queues share a large slice instead of copying it") {
    SendArena arena;
    const std::string payload(1'000'000, 'x');
    const Slice before = copy(arena, "before"), large = copy(arena, payload), after = copy(arena, "after");
    std::vector<SendQueue> members(20);
    for (SendQueue& queue : members)
        for (const Slice& slice : {before, large, after}) queue.append(slice);
    const std::size_t live = heap.live;
    for (SendQueue& queue : members) queue.detach_from_pool();
    CHECK(heap.live - live < payload.size());
    for (const SendQueue& queue : members) CHECK(content_of(queue) == "before" + payload + "after");
}

TEST_CASE("a large slice reuses the memory of an earlier one") {
    SendArena arena;
    const std::size_t size = 1'000'000;
    std::vector<Slice> held;
    std::set<const char*> memory;
    for (int i = 0; i < 4; ++i) {
        held.push_back(copy(arena, std::string(size, static_cast<char>('a' + i))));
        memory.insert(held.back().data());
    }
    CHECK(memory.size() == 4);
    SUBCASE("but not memory that is in use") {
        const Slice fifth = copy(arena, std::string(size, 'x'));
        CHECK(memory.count(fifth.data()) == 0);
        for (int i = 0; i < 4; ++i)
            CHECK(held[static_cast<std::size_t>(i)].view() == std::string(size, static_cast<char>('a' + i)));
    }
    SUBCASE("if it has nearly the same size") {
        held.clear();
        for (const std::size_t other : {size, size - size / 10}) {
            SendQueue queue;
            queue.append(copy(arena, std::string(other, 'y')));
            queue.append(copy(arena, "next"));
            CHECK(memory.count(pieces_of(queue, 1)[0].data()) == 1);
            CHECK(content_of(queue) == std::string(other, 'y') + "next");
            queue.detach_from_pool();
            CHECK(content_of(queue) == std::string(other, 'y') + "next");
        }
        for (const std::size_t other : {size + 1, size / 2}) CHECK(copy(arena, std::string(other, 'z')).size() == other);
    }
}

TEST_CASE("an empty queue frees the memory of a long backlog") {
    SendArena arena;
    SendQueue queue;
    copy(arena, "the arena has its first chunk");
    const std::size_t before = heap.live;
    for (int i = 0; i < 10'000; ++i) {
        queue.append(copy(arena, "piece"));
        copy(arena, "-");
    }
    CHECK(heap.live > before);
    queue.consume(queue.size());
    CHECK(heap.live - before < 1'024);
}

TEST_CASE("a cleared queue holds no memory") {
    SendArena arena;
    SendQueue queue;
    const std::size_t before = heap.live;
    queue.append(copy(arena, std::string(1'000'000, 'x')));
    queue.clear();
    CHECK(queue.empty());
    CHECK(queue.size() == 0);
    CHECK(pieces_of(queue, 8).empty());
    CHECK(heap.live == before);
    queue.append(copy(arena, "again"));
    CHECK(content_of(queue) == "again");
}

TEST_CASE("the arena returns a recycled buffer empty") {
    SendArena arena;
    CHECK(arena.acquire_buffer().available() == 0);
    Bytes buffer;
    buffer.append(std::string(100'000, 'x'));
    const char* memory = buffer.data();
    arena.recycle(std::move(buffer));
    const std::size_t before = heap.allocations;
    Bytes again = arena.acquire_buffer();
    CHECK(again.empty());
    CHECK(again.data() == memory);
    CHECK(again.available() >= 100'000);
    CHECK(heap.allocations == before);
    CHECK(arena.acquire_buffer().available() == 0);
}

TEST_CASE("the arena limits the number and size of recycled buffers") {
    SendArena arena;
    const std::size_t before = heap.live;
    std::vector<Bytes> buffers(100);
    for (std::size_t i = 0; i < buffers.size(); ++i) buffers[i].reserve(std::size_t{10} << i % 22);  // up to 20 MiB
    for (Bytes& buffer : buffers) arena.recycle(std::move(buffer));
    for (Bytes& buffer : buffers) buffer.reserve(1'000'000);
    for (Bytes& buffer : buffers) arena.recycle(std::move(buffer));
    buffers.clear();
    CHECK(heap.live - before < 16'000'000);
}

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

namespace {

// The table of RFC 3629 3.
std::string encoded(std::uint32_t c) {
    const auto byte = [](std::uint32_t value) { return static_cast<char>(static_cast<unsigned char>(value)); };
    if (c < 0x80) return {byte(c)};
    if (c < 0x800) return {byte(0xC0 | c >> 6), byte(0x80 | (c & 0x3F))};
    if (c < 0x10000) return {byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F))};
    return {byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F)), byte(0x80 | (c >> 6 & 0x3F)), byte(0x80 | (c & 0x3F))};
}

bool is_character(std::uint32_t c) { return c <= 0x10FFFF && !(c >= 0xD800 && c <= 0xDFFF); }

// A simple reference: returns the size of the first character, or 0 if it is invalid. Decodes one to four bytes and
// compares them with the encoded result.
std::size_t first_character(std::string_view text) {
    for (std::size_t size = 1; size <= 4 && size <= text.size(); ++size) {
        constexpr unsigned char payload_of_lead[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
        std::uint32_t c = static_cast<unsigned char>(text[0]) & payload_of_lead[size];
        for (std::size_t i = 1; i < size; ++i) c = c << 6 | (static_cast<unsigned char>(text[i]) & 0x3F);
        if (is_character(c) && encoded(c) == text.substr(0, size)) return size;
    }
    return 0;
}

bool reference_valid(std::string_view text) {
    while (!text.empty()) {
        const std::size_t size = first_character(text);
        if (size == 0) return false;
        text.remove_prefix(size);
    }
    return true;
}

// Whether up to three more bytes can make the text valid.
bool can_become_valid(std::string_view text, int more = 3) {
    if (reference_valid(text)) return true;
    if (more == 0) return false;
    for (const char next : {'\x80', '\x8F', '\x90', '\x9F', '\xA0', '\xBF'})
        if (can_become_valid(std::string(text) + next, more - 1)) return true;
    return false;
}

// The size of the shortest prefix that no text can make valid, or npos.
std::size_t certainly_invalid_at(std::string_view text) {
    std::size_t valid = 0;  // complete characters are skipped to save time
    for (std::size_t size = 1; size <= text.size(); ++size) {
        if (!can_become_valid(text.substr(valid, size - valid))) return size;
        if (first_character(text.substr(valid, size - valid)) == size - valid) valid = size;
    }
    return std::string_view::npos;
}

// Feeds the text in two pieces at every split, and byte by byte. Returns the first wrong result, or an empty text.
std::string wrong_about(std::string_view text) {
    const std::size_t invalid_at = certainly_invalid_at(text);
    const bool valid = reference_valid(text);
    const auto fault = [&](const char* check, std::size_t at) {
        return test::to_hex(text) + ": " + check + " at " + std::to_string(at) + "\n";
    };
    for (std::size_t split = 0; split <= text.size(); ++split) {
        Utf8Validator validator;
        if (validator.feed(text.data(), split) != (split < invalid_at)) return fault("first piece", split);
        if (split >= invalid_at) continue;
        if (validator.feed(text.data() + split, text.size() - split) != (text.size() < invalid_at))
            return fault("second piece", split);
        if (text.size() < invalid_at && validator.complete() != valid) return fault("completeness", split);
    }
    Utf8Validator bytewise;
    for (std::size_t i = 0; i < text.size() && i < invalid_at; ++i)
        if (bytewise.feed(&text[i], 1) != (i + 1 < invalid_at)) return fault("byte", i);
    if (valid_utf8(text) != valid) return fault("the whole text", 0);
    return {};
}

}  // namespace

TEST_CASE("the UTF-8 reference of this suite agrees with RFC 3629") {
    CHECK(reference_valid("\xEF\xBB\xBF\xF0\xA3\x8E\xB4"));  // RFC 3629 7
    CHECK_FALSE(reference_valid("\xC0\x80"));  // RFC 3629 3: "the overlong encodings of the NUL character"
    CHECK_FALSE(reference_valid("\xED\xA1\x8C\xED\xBE\xB4"));
    CHECK(certainly_invalid_at("\xC0\x80") == 1);
    CHECK(certainly_invalid_at("\xED\xA1\x8C\xED\xBE\xB4") == 2);
    CHECK(certainly_invalid_at("a\xF4\x90\x80\x80") == 3);
    CHECK(certainly_invalid_at("a\xF4\x8F\xBF") == std::string_view::npos);
}

TEST_CASE("every code point is valid UTF-8 except the surrogates") {
    for (std::uint32_t c = 0; c <= 0x10FFFF; ++c)
        if (valid_utf8(encoded(c)) != is_character(c)) FAIL_CHECK("character ", c);
    CHECK_FALSE(valid_utf8(encoded(0x110000)));
    CHECK(valid_utf8(""));
}

TEST_CASE("all sequences of one and two bytes agree with the reference at every split") {
    std::string wrong;
    for (unsigned a = 0; a < 256; ++a) {
        wrong += wrong_about(std::string(1, static_cast<char>(a)));
        for (unsigned b = 0; b < 256; ++b)
            wrong += wrong_about(std::string{static_cast<char>(a), static_cast<char>(b)});
    }
    CHECK(wrong == "");
}

TEST_CASE("all boundaries of three and four bytes agree with the reference at every split") {
    const std::string leads = test::hex("00 7f 80 bf c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 f8 ff");
    const std::string others = test::hex("7f 80 8f 90 9f a0 bf c0 c2");
    std::string wrong;
    for (const char a : leads)
        for (const char b : others)
            for (const char c : others) {
                wrong += wrong_about(std::string{a, b, c});
                for (const char d : others) wrong += wrong_about(std::string{a, b, c, d});
            }
    CHECK(wrong == "");
}

TEST_CASE("an invalid byte is found at every position of a long text") {
    for (std::size_t size = 1; size <= 140; ++size) {
        std::string text(size, 'x');
        for (std::size_t at = 0; at < size; ++at) {
            for (const char invalid : {'\x80', '\xC3', '\xFF'}) {
                text[at] = invalid;
                Utf8Validator validator;
                // A lead byte becomes invalid when the next byte is not a continuation.
                const bool certain = invalid != '\xC3' || at + 1 < size;
                if (validator.feed(text.data(), size) == certain || valid_utf8(text))
                    FAIL_CHECK("size ", size, ", byte ", at);
            }
            text[at] = 'x';
        }
        if (!valid_utf8(text)) FAIL_CHECK("size ", size);
    }
}

TEST_CASE("all boundaries of up to four bytes agree with the reference at every position of a long text") {
    // The validator checks long texts in blocks: the sequence has valid text on both sides.
    const std::string leads = test::hex("80 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 f8 ff");
    const std::string others = test::hex("79 80 8f 90 9f a0 bf c2 e1");
    std::vector<std::string> sequences;
    for (const char a : leads) {
        sequences.push_back({a});
        for (const char b : others) {
            sequences.push_back({a, b});
            for (const char c : others) {
                sequences.push_back({a, b, c});
                for (const char d : others) sequences.push_back({a, b, c, d});
            }
        }
    }
    const std::string umlauts = "\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4\xC3\xA4";
    std::string wrong;
    for (const std::string& sequence : sequences) {
        const bool valid = reference_valid(sequence);
        for (std::size_t at = 0; at < 64; ++at) {
            std::string text = "xxx" + umlauts.substr(0, at % 2 == 0 ? 2 : 20) + std::string(at, 'x') + sequence;
            for (int i = 0; i < 4; ++i) text += umlauts;
            Utf8Validator validator;
            const bool accepted = validator.feed(text.data(), text.size());
            if (accepted != valid || (accepted && !validator.complete())) wrong += test::to_hex(sequence) + "\n";
        }
        if (wrong.size() > 500) break;
    }
    CHECK(wrong == "");
}

TEST_CASE("a character is valid at every position of a long text") {
    for (const std::string character : {"\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x98\x80"}) {
        for (std::size_t before = 0; before <= 70; ++before) {
            const std::string text = std::string(before, 'x') + character + std::string(70, 'y') + character;
            if (!valid_utf8(text)) FAIL_CHECK(before, " bytes before");
            if (valid_utf8(std::string_view(text).substr(0, text.size() - 1)))
                FAIL_CHECK(before, " bytes before, truncated");
        }
    }
}

TEST_CASE("a text in random pieces gives the same result as the whole text") {
    Random random;
    std::string wrong;
    for (int round = 0; round < 1'500; ++round) {
        std::string text;
        for (const std::size_t size = random.from_to(1, 400); text.size() < size;) {
            constexpr std::uint32_t ends[] = {0x80, 0x800, 0xD800, 0x110000};
            const std::uint32_t end = ends[random.below(std::size(ends))];
            text += encoded(static_cast<std::uint32_t>(random.below(end)));  // a few are surrogates
        }
        if (round % 2 == 0) text[random.below(text.size())] = static_cast<char>(random.below(256));
        const std::size_t invalid_at = certainly_invalid_at(text);
        Utf8Validator validator;
        for (std::size_t from = 0; from < text.size() && from < invalid_at;) {
            const std::size_t size = std::min(random.from_to(0, 200), text.size() - from);
            if (validator.feed(text.data() + from, size) != (from + size < invalid_at))
                wrong += test::to_hex(text) + "\n";
            from += size;
        }
        if (invalid_at == std::string_view::npos && validator.complete() != reference_valid(text))
            wrong += test::to_hex(text) + "\n";
    }
    CHECK(wrong == "");
}

TEST_CASE("reset() begins a new text") {
    Utf8Validator validator;
    CHECK(validator.complete());
    CHECK(validator.feed("\xF0\x9F", 2));
    CHECK_FALSE(validator.complete());
    validator.reset();
    CHECK(validator.complete());
    CHECK(validator.feed("a", 1));
}

TEST_CASE("a text is truncated after the last character that fits") {
    const std::string text = "a\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80z\xF4\x8F\xBF\xBF";
    for (std::size_t max = 0; max <= text.size() + 2; ++max) {
        std::size_t longest = std::min(max, text.size());
        while (!reference_valid(std::string_view(text).substr(0, longest))) --longest;
        CHECK(truncate_utf8(text, max) == text.substr(0, longest));
    }
    CHECK(truncate_utf8("", 5) == "");
    CHECK(truncate_utf8("abc", 2) == "ab");
}

// ---- SHA-1 and base64 -----------------------------------------------------------------------------------------------

static std::string sha1_hex(std::string_view text) {
    const auto digest = sha1(text);
    std::string hex = test::to_hex({reinterpret_cast<const char*>(digest.data()), digest.size()});
    hex.erase(std::remove(hex.begin(), hex.end(), ' '), hex.end());
    return hex;
}

TEST_CASE("random bytes have the wanted size and differ") {
    CHECK(random_bytes(0).empty());
    CHECK(random_bytes(300).size() == 300);
    CHECK(random_bytes(16) != random_bytes(16));
}

TEST_CASE("SHA-1 agrees with the examples of FIPS 180 and RFC 3174") {
    CHECK(sha1_hex("") == "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    CHECK(sha1_hex("abc") == "a9993e364706816aba3e25717850c26c9cd0d89d");
    CHECK(sha1_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
    CHECK(sha1_hex("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrs"
                   "mnopqrstnopqrstu") == "a49b2446a02c645bf419f995b67091253a04a259");
    CHECK(sha1_hex(std::string(1'000'000, 'a')) == "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
    std::string eighty;
    for (int i = 0; i < 80; ++i) eighty += "01234567";
    CHECK(sha1_hex(eighty) == "dea356a2cddd90c7a7ecedc5ebb563934f460452");
}

TEST_CASE("SHA-1 pads inputs correctly at the lengths around a block") {
    // Computed by Python's hashlib from 'a' * n.
    CHECK(sha1_hex(std::string(55, 'a')) == "c1c8bbdc22796e28c0e15163d20899b65621d65a");
    CHECK(sha1_hex(std::string(56, 'a')) == "c2db330f6083854c99d4b5bfb6e8f29f201be699");
    CHECK(sha1_hex(std::string(57, 'a')) == "f08f24908d682555111be7ff6f004e78283d989a");
    CHECK(sha1_hex(std::string(63, 'a')) == "03f09f5b158a7a8cdad920bddc29b81c18a551f5");
    CHECK(sha1_hex(std::string(64, 'a')) == "0098ba824b5c16427bd7a1122a5a442a25ec644d");
    CHECK(sha1_hex(std::string(65, 'a')) == "11655326c708d70319be2610e8a57d9a5b959d3b");
    CHECK(sha1_hex(std::string(119, 'a')) == "ee971065aaa017e0632a8ca6c77bb3bf8b1dfc56");
    CHECK(sha1_hex(std::string(120, 'a')) == "f34c1488385346a55709ba056ddd08280dd4c6d6");
    CHECK(sha1_hex(std::string(127, 'a')) == "89d95fa32ed44a7c610b7ee38517ddf57e0bb975");
    CHECK(sha1_hex(std::string(128, 'a')) == "ad5b3fdbcb526778c2839d2f151ea753995e26a0");
}

static std::string base64_of(std::string_view bytes) {
    return base64(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

TEST_CASE("base64 agrees with the examples of RFC 4648 10") {
    CHECK(base64_of("") == "");
    CHECK(base64_of("f") == "Zg==");
    CHECK(base64_of("fo") == "Zm8=");
    CHECK(base64_of("foo") == "Zm9v");
    CHECK(base64_of("foob") == "Zm9vYg==");
    CHECK(base64_of("fooba") == "Zm9vYmE=");
    CHECK(base64_of("foobar") == "Zm9vYmFy");
}

TEST_CASE("base64 uses each character of its alphabet for its value") {
    CHECK(base64_of(test::hex("00 10 83 10 51 87 20 92 8b 30 d3 8f 41 14 93 51 55 97 61 96 9b 71 d7 9f "
                              "82 18 a3 92 59 a7 a2 9a ab b2 db af c3 1c b3 d3 5d b7 e3 9e bb f3 df bf")) ==
          "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
    CHECK(base64_of(test::hex("ff ff ff")) == "////");
    CHECK(base64_of(test::hex("ff")) == "/w==");
}

// ---- log lines ------------------------------------------------------------------------------------------------------

TEST_CASE("a log entry is one line of text or one object of JSON, also with bytes from a peer") {
    const std::vector<std::pair<std::string_view, std::string>> fields = {{"peer", "::1"}, {"what", "a\"b\n\xff"}};
    const LogEntry entry{LogLevel::warning, "refused", fields};
    CHECK(to_string(entry) == R"(warning refused peer="::1" what="a\x22b\x0a\xff")");
    const std::string json = to_json(entry);
    CHECK(json.substr(0, 9) == "{\"time\":\"");
    CHECK(json.substr(34) == R"(,"level":"warning","event":"refused","peer":"::1","what":"a\\x22b\\x0a\\xff"})");
    CHECK(valid_utf8(json));
}

TEST_CASE("an entry of the access log is one object of JSON, also with bytes from a peer") {
    const wschat::AccessEntry entry{"::1", "GET", "/a\"\xff", 404, 31, std::chrono::microseconds(1250)};
    const std::string json = to_json(entry);
    CHECK(json.substr(0, 9) == "{\"time\":\"");
    CHECK(json.substr(34) ==
          R"(,"event":"access","peer":"::1","method":"GET","path":"/a\\x22\\xff","status":404,"size":31,"ms":1.250})");
    CHECK(valid_utf8(json));
}

TEST_CASE("a time of the log is UTC with milliseconds") {
    const auto at = [](long long ms) {
        return wschat::utc_time(std::chrono::system_clock::time_point(std::chrono::milliseconds(ms)));
    };
    CHECK(at(0) == "1970-01-01T00:00:00.000Z");
    CHECK(at(951782400007) == "2000-02-29T00:00:00.007Z");
    CHECK(at(4102444799999) == "2099-12-31T23:59:59.999Z");
}

TEST_CASE("text from a peer cannot forge a log line") {
    CHECK(escape_for_log("plain text, 100% ~") == "plain text, 100% ~");
    CHECK(escape_for_log("a\r\nb") == R"(a\x0d\x0ab)");
    CHECK(escape_for_log("\x1b[2J") == R"(\x1b[2J)");
    CHECK(escape_for_log("a\"b\\c") == R"(a\x22b\x5cc)");
    CHECK(escape_for_log(std::string_view("\0\t\x7f", 3)) == R"(\x00\x09\x7f)");
    CHECK(escape_for_log("\xC2\x9B") == R"(\xc2\x9b)");  // CSI as one C1 control character
    CHECK(escape_for_log("") == "");
}

TEST_CASE("escaped texts are printable ASCII, and different texts stay different") {
    std::vector<std::string> escaped;
    for (unsigned a = 0; a < 256; ++a) {
        escaped.push_back(escape_for_log(std::string(1, static_cast<char>(a))));
        for (unsigned b = 0; b < 256; ++b)
            escaped.push_back(escape_for_log(std::string{static_cast<char>(a), static_cast<char>(b)}));
    }
    for (const std::string& text : escaped)
        if (!std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~' && c != '"'; }))
            FAIL_CHECK(text);
    std::sort(escaped.begin(), escaped.end());
    CHECK(std::adjacent_find(escaped.begin(), escaped.end()) == escaped.end());
}

TEST_CASE("a long text ends with three dots in the log") {
    CHECK(escape_for_log("abcdef", 6) == "abcdef");
    CHECK(escape_for_log("abcdef", 5) == "abcde...");
    CHECK(escape_for_log(std::string(200, 'x')) == std::string(200, 'x'));
    CHECK(escape_for_log(std::string(100'000, '\n')).size() < 1'000);
}

TEST_CASE("a log entry is one line with its fields in quotes") {
    const std::vector<std::pair<std::string_view, std::string>> fields = {{"peer", "127.0.0.1"},
                                                                          {"what", "it said \"no\"\nerror x=\"y\""}};
    CHECK(to_string(LogEntry{LogLevel::warning, "handler_exception", fields}) ==
          R"(warning handler_exception peer="127.0.0.1" what="it said \x22no\x22\x0aerror x=\x22y\x22")");
    CHECK(to_string(LogEntry{LogLevel::info, "listening", {}}) == "info listening");
}

TEST_CASE("a default slice can be copied, and a copy of no bytes is empty") {
    const Slice slice;
    const Slice same = slice;
    CHECK_FALSE(same.chunk);
    CHECK(same.size() == 0);
    SendArena arena;
    CHECK(copy(arena, "").size() == 0);
    CHECK(copy(arena, "a").view() == "a");
}

TEST_CASE("a map finds values by name and iterates in the order of names") {
    StringMap<int> ages;
    CHECK(ages.find_or_emplace("Berta", 30) == 30);
    CHECK(ages.find_or_emplace("Anna", 20) == 20);
    CHECK(ages.find_or_emplace("Anna", 99) == 20);  // the existing value
    REQUIRE(ages.find("Berta") != nullptr);
    CHECK(*ages.find("Berta") == 30);
    CHECK(ages.find("berta") == nullptr);
    std::string names;
    for (const auto& [name, age] : ages) names += name + "=" + std::to_string(age) + " ";
    CHECK(names == "Anna=20 Berta=30 ");
    CHECK(ages.erase("Anna"));
    CHECK_FALSE(ages.erase("Anna"));
    CHECK(ages.size() == 1);
    ages.erase_if([](int age) { return age == 30; });
    CHECK(ages.empty());
}

TEST_CASE("rename() changes a name unless the new name exists") {
    StringMap<int> ages;
    ages.find_or_emplace("Anna", 20);
    ages.find_or_emplace("Berta", 30);
    ages.rename("Anna", "Berta");
    ages.rename("nobody", "Clara");
    CHECK(ages.size() == 2);
    CHECK(*ages.find("Berta") == 30);
    int* anna = ages.find("Anna");
    ages.rename("Anna", "Clara");
    CHECK(ages.find("Anna") == nullptr);
    CHECK(ages.find("Clara") == anna);
}

TEST_CASE("a map destroys its values but not its references") {
    auto owned = std::make_shared<int>(1);
    const std::weak_ptr<int> observer = owned;
    {
        StringMap<std::shared_ptr<int>> values, references;
        references.insert_reference("name", values.find_or_emplace("name", std::move(owned)));
        references.clear();
        CHECK_FALSE(observer.expired());
    }
    CHECK(observer.expired());
}

TEST_CASE("big-endian keys have the order of their numbers") {
    StringMap<std::string> values;
    for (const char* text : {"a", "b", "c"}) values.append(text);
    CHECK(values.front() == "a");
    const std::uint64_t rising[] = {0, 1, 127, 128, 255, 256, 65'536, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF};
    for (std::size_t i = 0; i + 1 < std::size(rising); ++i) {
        CAPTURE(rising[i]);
        CHECK(big_endian_key(rising[i]) < big_endian_key(rising[i + 1]));
        CHECK(big_endian_key(rising[i]).size() == 8);
    }
}

// ---- Json -----------------------------------------------------------------------------------------------------------

namespace {

// Decodes a JSON string (RFC 8259 7) in a simple way. Returns nothing if it is malformed.
std::optional<std::string> unquoted(std::string_view json) {
    if (json.size() < 2 || json.front() != '"' || json.back() != '"') return std::nullopt;
    json = json.substr(1, json.size() - 2);
    std::string characters;
    for (std::size_t i = 0; i < json.size(); ++i) {
        if (static_cast<unsigned char>(json[i]) < 0x20 || json[i] == '"') return std::nullopt;
        if (json[i] != '\\') {
            characters += json[i];
            continue;
        }
        if (++i == json.size()) return std::nullopt;
        const std::string_view escapes = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        if (const std::size_t at = escapes.find(json[i]); at != std::string_view::npos) {
            characters += meanings[at];
        } else if (json[i] == 'u' && json.substr(i + 1, 2) == "00" && json.size() - i > 4) {
            characters += test::hex(json.substr(i + 3, 2));
            i += 4;
        } else {
            return std::nullopt;
        }
    }
    return characters;
}

}  // namespace

TEST_CASE("a C++ value becomes the JSON value of the same type") {
    const std::string string = "string";
    CHECK(Json().dump() == "null");
    CHECK(Json(nullptr).dump() == "null");
    CHECK(Json(true).dump() == "true");
    CHECK(Json(false).dump() == "false");
    CHECK(Json(0).dump() == "0");
    CHECK(Json(-1).dump() == "-1");
    CHECK(Json(std::uint8_t{7}).dump() == "7");
    CHECK(Json(std::numeric_limits<std::int64_t>::min()).dump() == "-9223372036854775808");
    CHECK(Json(std::numeric_limits<std::uint64_t>::max()).dump() == "18446744073709551615");
    CHECK(Json(1.5).dump() == "1.5");
    CHECK(Json("literal").dump() == R"("literal")");
    CHECK(Json(string).dump() == R"("string")");
    CHECK(Json(std::string_view(string).substr(0, 3)).dump() == R"("str")");
    CHECK(Json("").dump() == R"("")");
}

TEST_CASE("a double converts to text that converts back to the same double") {
    using Double = std::numeric_limits<double>;
    for (const double value : {0.0, -0.0, 0.1, -0.25, 1.0 / 3, 1e22, 123456789.125, Double::max(), Double::lowest(),
                               Double::min(), Double::denorm_min(), Double::epsilon()}) {
        const std::string text = Json(value).dump();
        CAPTURE(text);
        // RFC 8259 6: "number = [ minus ] int [ frac ] [ exp ]".
        CHECK(text.find_first_not_of("-+0123456789.e") == std::string::npos);
        char* end = nullptr;
        const double back = std::strtod(text.c_str(), &end);
        CHECK(end == text.c_str() + text.size());
        CHECK(std::memcmp(&back, &value, sizeof value) == 0);
    }
}

TEST_CASE("infinity and NaN become null") {
    // RFC 8259 6: "Numeric values that cannot be represented in the grammar below (such as Infinity and NaN) are not
    // permitted."
    CHECK(Json(std::numeric_limits<double>::infinity()).dump() == "null");
    CHECK(Json(-std::numeric_limits<double>::infinity()).dump() == "null");
    CHECK(Json(std::numeric_limits<double>::quiet_NaN()).dump() == "null");
}

TEST_CASE("braces of pairs become objects, in order and nested") {
    const std::string name = "Anna";
    CHECK(Json{{"type", "join"}, {"name", name}}.dump() == R"({"type":"join","name":"Anna"})");
    CHECK(Json{{"only", 1}}.dump() == R"({"only":1})");
    CHECK(Json{{"a", {{"b", {{"c", nullptr}}}}}, {"d", Json{{"e", true}}}}.dump() ==
          R"({"a":{"b":{"c":null}},"d":{"e":true}})");
}

TEST_CASE("ranges become arrays") {
    const std::vector<std::string> names = {"Anna", "Ben \"B\""};
    CHECK(Json::array(names).dump() == R"(["Anna","Ben \"B\""])");
    CHECK(Json::array(std::vector<int>{}).dump() == "[]");
    CHECK(Json::array(std::vector<int>{1, 2, 3}).dump() == "[1,2,3]");
    CHECK(Json::array(std::vector<bool>{true, false}).dump() == "[true,false]");
    const std::vector<Json> mixed = {1, "two", nullptr, Json{{"three", 3}}, Json::array(std::vector<int>{4})};
    CHECK(Json::array(mixed).dump() == R"([1,"two",null,{"three":3},[4]])");
    CHECK(Json{{"users", Json::array(names)}}.dump() == R"({"users":["Anna","Ben \"B\""]})");
}

TEST_CASE("quotes, backslashes and control characters are escaped") {
    CHECK(Json("say \"hi\"").dump() == R"("say \"hi\"")");
    CHECK(Json("C:\\temp").dump() == R"("C:\\temp")");
    CHECK(Json("one\ntwo").dump() == R"("one\ntwo")");
    CHECK(Json("\x1b[2J").dump() == R"("\u001b[2J")");
    CHECK(Json(std::string_view("a\0b", 3)).dump() == R"("a\u0000b")");
    // RFC 8259 7: only the quotation mark, the reverse solidus and U+0000 to U+001F must be escaped.
    for (int c = 0; c < 0x80; ++c) {
        const std::string text = "<" + std::string(1, static_cast<char>(c)) + ">";
        if (unquoted(Json(text).dump()) != text) FAIL_CHECK("character ", c, " becomes ", Json(text).dump());
    }
}

TEST_CASE("names of members are escaped like values") {
    CHECK(Json{{"a\"b\n", 1}}.dump() == R"({"a\"b\n":1})");
    CHECK(Json{{std::string_view("\0", 1), 1}}.dump() == R"({"\u0000":1})");
}

TEST_CASE("valid UTF-8 stays unchanged in JSON") {
    for (const std::string text : {"\xC3\xA4", "\xE2\x82\xAC", "\xED\x9F\xBF", "\xEF\xBF\xBF", "\xF0\x9F\x98\x80",
                                   "\xF4\x8F\xBF\xBF", "gr\xC3\xBC\xC3\x9F \xF0\x9F\x98\x80!"})
        CHECK(Json(text).dump() == '"' + text + '"');
}

TEST_CASE("invalid UTF-8 becomes U+FFFD and the text around it stays") {
    const std::string replacement = "\xEF\xBF\xBD";
    CHECK(Json("\xFF").dump() == '"' + replacement + '"');
    CHECK(Json("\x80z").dump() == '"' + replacement + "z\"");
    // An incomplete sequence, an overlong form, a surrogate, a code point above U+10FFFF, a lead byte at the end.
    for (const std::string broken : {"\xE2\x82", "\xF0\x9F\x98", "\xC0\xAF", "\xE0\x80\xAF", "\xED\xA0\x80",
                                     "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80", "\xC3"}) {
        for (const std::string before : {"", "x", "\xC3\xA4"}) {
            for (const std::string after : {"", "\"", "y", "\xE2\x82\xAC"}) {
                const auto text = unquoted(Json(before + broken + after).dump());
                CAPTURE(test::to_hex(before + broken + after));
                REQUIRE(text);
                CHECK(valid_utf8(*text));
                REQUIRE(text->size() >= before.size() + replacement.size() + after.size());
                const std::string_view middle =
                    std::string_view(*text).substr(before.size(), text->size() - before.size() - after.size());
                CHECK(*text == before + std::string(middle) + after);
                // Only replacement characters stand for the invalid bytes.
                for (std::size_t i = 0; i < middle.size(); i += 3) CHECK(middle.substr(i, 3) == replacement);
            }
        }
    }
}

TEST_CASE("an object with dump() becomes the JSON text that dump() returns") {
    struct Library {
        std::string dump() const { return "{\"x\":[1]}"; }
    };
    struct ViewLibrary {
        std::string_view dump() const { return "[2]"; }
    };
    CHECK(Json(ViewLibrary()).dump() == "[2]");
    const Library object;
    CHECK(Json(object).dump() == R"({"x":[1]})");
    CHECK(Json{{"object", object}, {"n", 1}}.dump() == R"({"object":{"x":[1]},"n":1})");
    CHECK(Json::array(std::vector<Library>(2)).dump() == R"([{"x":[1]},{"x":[1]}])");

    struct Invalid {
        std::string dump() const { return "\"\xFF\""; }
    };
    CHECK(test::error_of([] { Json{{"object", Invalid()}}; }) == "Json: dump() returned text that is not UTF-8");
}

// ---- text and rates ----------------------------------------------------------------------------------------------

TEST_CASE("percent escapes are decoded, and malformed ones give no text") {
    using text::percent_decode;
    CHECK(percent_decode("") == "");
    CHECK(percent_decode("plain") == "plain");
    CHECK(percent_decode("%41%62%2f") == "Ab/");
    CHECK(percent_decode("%e2%82%AC") == "\xE2\x82\xAC");
    CHECK(percent_decode("%2541") == "%41");  // once, not twice
    CHECK(percent_decode("a%00b") == std::string_view("a\0b", 3));
    CHECK(percent_decode("a+b") == "a+b");
    CHECK(percent_decode("a+b%2B", true) == "a b+");
    for (const std::string malformed : {"%", "a%", "%4", "%4g", "%g4", "%%41", "% 41", "%+4", "%u0041"}) {
        CAPTURE(malformed);
        CHECK_FALSE(percent_decode(malformed));
    }
}

TEST_CASE("a number has only digits and is at most the maximum") {
    using text::parse_unsigned;
    CHECK(parse_unsigned("0", 10) == 0u);
    CHECK(parse_unsigned("10", 10) == 10u);
    CHECK(parse_unsigned("007", 10) == 7u);
    CHECK(parse_unsigned("18446744073709551615", UINT64_MAX) == UINT64_MAX);
    CHECK_FALSE(parse_unsigned("11", 10));
    CHECK_FALSE(parse_unsigned("9", 5));
    CHECK_FALSE(parse_unsigned("1", 0));
    CHECK_FALSE(parse_unsigned("18446744073709551616", UINT64_MAX));
    CHECK_FALSE(parse_unsigned("99999999999999999999", UINT64_MAX));
    for (const std::string text : {"", " 1", "1 ", "-1", "+1", "1a", "0x1", "1.0"})
        CHECK_FALSE(parse_unsigned(text, 100));
}

TEST_CASE("a bucket allows its burst at once, and then its rate") {
    TokenBucket bucket;
    const Rate rate{2, 3};
    const Time start = Clock::now();
    for (int i = 0; i < 3; ++i) CHECK(bucket.take(1, rate, start));
    CHECK_FALSE(bucket.take(1, rate, start));
    CHECK_FALSE(bucket.take(1, rate, start + milliseconds(499)));
    CHECK(bucket.take(1, rate, start + milliseconds(500)));
    CHECK_FALSE(bucket.take(1, rate, start + milliseconds(500)));
    CHECK_FALSE(bucket.full(start + milliseconds(1999)));
    CHECK(bucket.full(start + milliseconds(2000)));
    for (int i = 0; i < 3; ++i) CHECK(bucket.take(1, rate, start + hours(1)));
    CHECK_FALSE(bucket.take(1, rate, start + hours(1)));
}

TEST_CASE("a bucket of any rate allows its whole burst, one by one, and is exact to the nanosecond") {
    const Time start = Clock::now();
    for (int per_second = 1; per_second <= 1000; ++per_second) {
        CAPTURE(per_second);
        TokenBucket bucket;
        const Rate rate{static_cast<double>(per_second), static_cast<double>(per_second)};
        int taken = 0;
        while (taken <= per_second && bucket.take(1, rate, start)) ++taken;
        REQUIRE(taken == per_second);
        const Time next = start + nanoseconds(1'000'000'000 / per_second);
        REQUIRE_FALSE(bucket.take(1, rate, next - nanoseconds(per_second + 1)));
        REQUIRE(bucket.take(1, rate, next));
    }
}

TEST_CASE("a full bucket allows more than its burst and takes longer to refill") {
    TokenBucket bucket;
    const Rate rate{10, 100};
    const Time start = Clock::now();
    CHECK(bucket.take(1000, rate, start));
    CHECK_FALSE(bucket.take(1, rate, start + seconds(89)));
    CHECK(bucket.take(1, rate, start + seconds(91)));
    CHECK_FALSE(bucket.take(1000, rate, start + seconds(91)));
}

TEST_CASE("a bucket can owe tokens, and knows when it has some again") {
    TokenBucket bucket;
    const Rate rate{10, 5};
    const Time start = Clock::now();
    const auto since_start = [&](double tokens) {
        return std::chrono::duration<double>(bucket.available_at(tokens, rate) - start).count();
    };
    bucket.charge(5, rate, start);
    CHECK(since_start(0) == doctest::Approx(0));
    CHECK(since_start(1) == doctest::Approx(0.1));
    CHECK(since_start(5) == doctest::Approx(0.5));
    bucket.charge(25, rate, start);
    CHECK(since_start(0) == doctest::Approx(2.5));
    CHECK_FALSE(bucket.take(1, rate, start + milliseconds(2590)));
    CHECK(bucket.take(1, rate, start + milliseconds(2610)));
}

TEST_CASE("a rate of zero does not limit") {
    TokenBucket bucket;
    for (int i = 0; i < 1000; ++i) CHECK(bucket.take(1e9, Rate{}, Clock::now()));
}

TEST_CASE("a bucket with a tiny rate does not overflow") {
    TokenBucket bucket;
    const Rate rate{1e-300, 2};
    const Time start = Clock::now();
    CHECK(bucket.take(1, rate, start));
    CHECK_FALSE(bucket.full(start + hours(24 * 365)));
    CHECK(bucket.take(1e300, Rate{1e-300, 1e300}, (Time::max)()));
    CHECK(bucket.full((Time::max)()));
}

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
TEST_CASE("the header and Linux agree whether the CPU has AVX2") {
    std::ifstream file("/proc/cpuinfo");
    const std::string cpus{std::istreambuf_iterator<char>(file), {}};
    REQUIRE(cpus.find("\nflags") != std::string::npos);
    CHECK(wschat::detail::has_avx2() == (cpus.find(" avx2") != std::string::npos));
}
#endif

TEST_SUITE_END();
