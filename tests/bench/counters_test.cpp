// The cost of a message: system calls, allocations and bytes held. Nothing is timed. The linker option --wrap
// redirects the counted calls. Counters are thread-local, so the test reads those of the server's thread through its
// loop.
#include "../support.hpp"

using namespace test;
using wschat::Message;
using wschat::Opcode;

namespace {

struct Counters {
    std::uint64_t sends = 0;
    std::uint64_t batches = 0;
    std::uint64_t receives = 0;
    std::uint64_t waits = 0;
    std::uint64_t poll_changes = 0;
    std::uint64_t allocations = 0;
    std::int64_t bytes_held = 0;
};
thread_local Counters counters;
thread_local bool no_memory = false;  // makes allocations fail

// Each block stores its size before the returned memory, which begins `alignment` bytes into the block.
constexpr std::size_t plain = alignof(std::max_align_t);

// The memory that glibc uses for an allocation of this size.
std::int64_t heap_size(std::size_t size) {
    return static_cast<std::int64_t>((size < 24 ? 32 : size + 8 + 15) / 16 * 16);
}

void* counted_new(std::size_t size, std::size_t alignment = plain) {
    const std::size_t whole = (size + 2 * alignment - 1) / alignment * alignment;
    void* block = no_memory ? nullptr : std::aligned_alloc(alignment, whole);
    if (block == nullptr) throw std::bad_alloc();
    char* const memory = static_cast<char*>(block) + alignment;
    std::memcpy(memory - sizeof size, &size, sizeof size);
    ++counters.allocations;
    counters.bytes_held += heap_size(size);
    return memory;
}
void counted_delete(void* memory, std::size_t alignment = plain) {
    if (memory == nullptr) return;
    std::size_t size = 0;
    std::memcpy(&size, static_cast<char*>(memory) - sizeof size, sizeof size);
    counters.bytes_held -= heap_size(size);
    std::free(static_cast<char*>(memory) - alignment);
}

}  // namespace

void* operator new(std::size_t size) { return counted_new(size); }
void* operator new[](std::size_t size) { return counted_new(size); }
void* operator new(std::size_t size, std::align_val_t a) { return counted_new(size, static_cast<std::size_t>(a)); }
void operator delete(void* memory) noexcept { counted_delete(memory); }
void operator delete[](void* memory) noexcept { counted_delete(memory); }
void operator delete(void* memory, std::size_t) noexcept { counted_delete(memory); }
void operator delete[](void* memory, std::size_t) noexcept { counted_delete(memory); }
void operator delete(void* memory, std::align_val_t a) noexcept { counted_delete(memory, static_cast<std::size_t>(a)); }
void operator delete(void* memory, std::size_t, std::align_val_t a) noexcept {
    counted_delete(memory, static_cast<std::size_t>(a));
}

extern "C" {
ssize_t __real_send(int, const void*, size_t, int);
ssize_t __real_sendmsg(int, const msghdr*, int);
int __real_io_uring_submit(void*);
ssize_t __real_recv(int, void*, size_t, int);
int __real_epoll_wait(int, epoll_event*, int, int);
int __real_epoll_ctl(int, int, int, epoll_event*);

ssize_t __wrap_send(int descriptor, const void* data, size_t size, int flags) {
    ++counters.sends;
    return __real_send(descriptor, data, size, flags);
}
ssize_t __wrap_sendmsg(int descriptor, const msghdr* message, int flags) {
    ++counters.sends;
    return __real_sendmsg(descriptor, message, flags);
}
// Called only if WSCHAT_LIBURING is 1.
int __wrap_io_uring_submit(void* ring) {
    ++counters.batches;
    return WSCHAT_LIBURING ? __real_io_uring_submit(ring) : -1;
}
ssize_t __wrap_recv(int descriptor, void* data, size_t size, int flags) {
    ++counters.receives;
    return __real_recv(descriptor, data, size, flags);
}
int __wrap_epoll_wait(int descriptor, epoll_event* events, int count, int timeout) {
    ++counters.waits;
    return __real_epoll_wait(descriptor, events, count, timeout);
}
int __wrap_epoll_ctl(int descriptor, int operation, int target, epoll_event* event) {
    ++counters.poll_changes;
    return __real_epoll_ctl(descriptor, operation, target, event);
}
}

namespace {

struct Member : wschat::WebSocketHandler {
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override { room("all").broadcast(m); }
};
struct Echo : wschat::WebSocketHandler {
    void on_message(const Message& m) override { write_message(m); }
};

// The counters of the server's thread, after all earlier work is done.
Counters counters_of(RunningServer& running) {
    running.on_loop([] {});
    return running.on_loop([] { return counters; });
}

// A server with a room of `size` open members.
struct RunningRoom {
    explicit RunningRoom(std::size_t size) {
        running.server.route<Member>("/room");
        running.server.route<Echo>("/echo");
        running.server.route<Echo>("/dropped").keep_request(false);
        running.start();
        for (std::size_t i = 0; i < size; ++i) members.push_back(std::make_unique<WsClient>(running.port(), "/room"));
        for (const auto& member : members) REQUIRE(member->is_open());
        REQUIRE(running.eventually([&] { return running.server.rooms()["all"].size() == size; }));
    }
    Counters count() { return counters_of(running); }
    // Checks that each member receives the message.
    void expect_all_receive(const std::string& text) {
        for (const auto& member : members) REQUIRE(member->next() == text);
    }

    RunningServer running;
    std::vector<std::unique_ptr<WsClient>> members;
};

}  // namespace

TEST_SUITE("counters") {
    TEST_CASE("a turn sends one or ten broadcasts to N members with N calls of send or one batch") {
        RunningRoom room(40);
        const bool batched = wschat::detail::SendBatch::make() != nullptr;
        for (const int broadcasts : {1, 10}) {
            CAPTURE(broadcasts);
            const Counters before = room.count();
            room.running.on_loop([&] {
                for (int i = 0; i < broadcasts; ++i) room.running.server.rooms()["all"].broadcast("to everybody");
            });
            const Counters after = room.count();
            CHECK(after.sends - before.sends == (batched ? 0 : 40));
            CHECK(after.batches - before.batches == (batched ? 1 : 0));
            CHECK(after.receives == before.receives);
            CHECK(after.poll_changes == before.poll_changes);
            for (int i = 0; i < broadcasts; ++i) room.expect_all_receive("to everybody");
        }
    }

    TEST_CASE("an echo is one receive and one send and does not change the poller") {
        RunningRoom room(0);
        WsClient client(room.running.port(), "/echo");
        client.send("warm");
        REQUIRE(client.next() == "warm");
        const Counters before = room.count();
        for (int i = 0; i < 50; ++i) {
            client.send("once around");
            REQUIRE(client.next() == "once around");
        }
        const Counters after = room.count();
        CHECK(after.receives - before.receives == 50);
        CHECK(after.sends - before.sends == 50);
        CHECK(after.poll_changes == before.poll_changes);
        // One wait per message, and those for reading the counters.
        CHECK(after.waits - before.waits >= 50);
        CHECK(after.waits - before.waits <= 56);
    }

    TEST_CASE("a connection needs few allocations and system calls from the accept to its end") {
        RunningRoom room(0);
        const auto connect_and_close = [&](int connections) {
            for (int i = 0; i < connections; ++i) {
                WsClient client(room.running.port(), "/echo");
                REQUIRE(client.is_open());
                client.close();
                REQUIRE(client.close_code() == wschat::CloseCode::normal);
            }
        };
        const auto count_when_gone = [&] {
            REQUIRE(room.running.eventually([&] { return room.running.server.metrics().connections_open == 0; }));
            return room.count();
        };
        connect_and_close(20);  // the tables have grown
        const Counters before = count_when_gone();
        connect_and_close(50);
        const Counters served = room.count();
        const Counters after = count_when_gone();
        // The request and the handler. The rest is for the counting.
        CHECK(served.allocations - before.allocations <= 50 * 2 + 10);
        CHECK(after.sends - before.sends == 2 * 50);
        CHECK(after.receives - before.receives <= 4 * 50);
        CHECK(after.poll_changes - before.poll_changes == 2 * 50);
        CHECK(after.bytes_held <= before.bytes_held);
    }

    TEST_CASE("in the steady state a delivery allocates nothing") {
        RunningRoom room(20);
        const auto send_messages = [&](int messages) {
            for (int i = 0; i < messages; ++i) {
                room.members[0]->send("some words for everybody in the room");
                room.expect_all_receive("some words for everybody in the room");
            }
        };
        send_messages(10);
        const Counters before = room.count();
        send_messages(50);
        const Counters after = room.count();
        CHECK(after.allocations == before.allocations);
        CHECK(after.bytes_held <= before.bytes_held);  // the counting frees what it posted
    }

    TEST_CASE("a large echo is received and sent in place and leaves no memory behind") {
        RunningRoom room(0);
        WsClient client(room.running.port(), "/echo");
        const std::string large(1024 * 1024, 'x');
        const auto send_messages = [&](int messages) {
            for (int i = 0; i < messages; ++i) {
                client.send(large, Opcode::binary);
                REQUIRE(client.next() == large);
            }
        };
        send_messages(20);
        const Counters before = room.count();
        send_messages(20);
        const Counters after = room.count();
        // A few times, the kernel did not take all bytes at once, and the rest was queued.
        CHECK(after.allocations - before.allocations <= 20 * 8);
        CHECK(after.bytes_held <= before.bytes_held);
    }

    TEST_CASE("a message that arrives whole is passed to the handler in place") {
        wschat::Limits limits;
        wschat::detail::SendArena arena;
        wschat::detail::Connection connection;
        connection.open(wschat::detail::Role::server, limits, arena, wschat::Time());
        std::string input = hex("81 85 37 fa 21 3d 7f 9f 4d 51 58");
        connection.receive(&input[0], input.size(), wschat::Time());
        const wschat::detail::Event event = connection.next_event();
        REQUIRE(event.message.text() == "Hello");
        CHECK(event.message.text().data() == input.data() + 6);
    }

    TEST_CASE("a large message of a server is offered to the transport without a copy") {
        wschat::Limits limits;
        wschat::detail::SendArena arena;
        wschat::detail::Connection connection;
        connection.open(wschat::detail::Role::server, limits, arena, wschat::Time());
        const std::string large(100'000, 'x');
        const char* offered = nullptr;
        connection.send(Opcode::binary, large, [&](const std::string_view* pieces, std::size_t count) {
            offered = pieces[count - 1].data();
            return pieces[0].size() + pieces[1].size();
        });
        CHECK(offered == large.data());
        CHECK(connection.output().empty());
    }

    TEST_CASE("an idle connection holds 704 bytes, 528 if its route does not keep requests, 832 in a room") {
        struct Row {
            const char* target;
            std::int64_t recorded;
        };
        for (const Row& row : {Row{"/echo", 704}, Row{"/dropped", 528}, Row{"/room", 832}}) {
            CAPTURE(row.target);
            RunningRoom room(0);
            std::vector<std::unique_ptr<WsClient>> clients;
            const auto connect = [&](std::size_t count) {
                for (std::size_t i = 0; i < count; ++i) {
                    clients.push_back(std::make_unique<WsClient>(room.running.port(), row.target));
                    REQUIRE(clients.back()->is_open());
                }
            };
            connect(64);  // tables grow by doubling, so both counts are taken at a full table
            const Counters before = room.count();
            connect(64);
            const Counters after = room.count();
            const std::int64_t each = (after.bytes_held - before.bytes_held) / 64;
            CHECK(each <= row.recorded);
            CHECK(each > row.recorded - 32);
        }
    }
}

#if WSCHAT_ZLIB

namespace {

wschat::CompressionOptions all_compressed(bool takeover) {
    wschat::CompressionOptions options;
    options.server_context_takeover = options.client_context_takeover = takeover;
    options.threshold = 0;
    return options;
}

// A room that compresses. Members keep their contexts on the path "/takeover".
struct DeflateMember : wschat::WebSocketHandler {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        return all_compressed(request().raw_path() == "/takeover");
    }
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override { room("all").broadcast(m); }
};

struct DeflateRoom {
    DeflateRoom() {
        running.server.route<DeflateMember>("/shared");
        running.server.route<DeflateMember>("/takeover");
        running.server.route<Echo>("/plain");
        running.start();
    }
    void connect(std::size_t count, const char* target, bool takeover = false) {
        auto& clients = std::string(target) == "/plain" ? others : members;
        for (std::size_t i = 0; i < count; ++i) {
            clients.push_back(std::make_unique<WsClient>(running.port(), target, "", all_compressed(takeover)));
            REQUIRE(clients.back()->is_open());
        }
    }
    void send_messages(WsClient& sender, int messages = 1) {
        const std::string text = "some words for everybody in the room, some words for everybody, and some more";
        for (int i = 0; i < messages; ++i) {
            sender.send(text);
            for (const auto& member : members) REQUIRE(member->next() == text);
        }
    }
    Counters count() { return counters_of(running); }
    template <class Work>
    std::int64_t bytes_held_by(Work&& work) {
        const std::int64_t before = count().bytes_held;
        work();
        return count().bytes_held - before;
    }

    RunningServer running;
    std::vector<std::unique_ptr<WsClient>> members, others;
};

}  // namespace

TEST_SUITE("counters") {
    TEST_CASE("with the shared compressor a delivery allocates nothing") {
        DeflateRoom room;
        room.connect(20, "/shared");
        room.send_messages(*room.members[0], 10);
        const Counters before = room.count();
        room.send_messages(*room.members[0], 50);
        const Counters after = room.count();
        CHECK(after.allocations == before.allocations);
        CHECK(after.bytes_held <= before.bytes_held);
    }

    TEST_CASE("a connection without context takeover holds less than 256 bytes for compression, also after messages") {
        DeflateRoom room;
        room.connect(2, "/shared");
        room.send_messages(*room.members[0], 10);
        const std::int64_t plain = room.bytes_held_by([&] { room.connect(64, "/plain"); }) / 64;
        const std::int64_t compressed = room.bytes_held_by([&] { room.connect(64, "/shared"); }) / 64;
        CHECK(compressed - plain < 256);  // this includes the text of the offer
        const std::int64_t talking = room.bytes_held_by([&] {
            for (const auto& member : room.members) room.send_messages(*member);
        });
        CHECK(talking < 64 * 16);
    }

    TEST_CASE("a message that failed to compress because memory ran out leaves nothing in the next") {
        wschat::detail::Deflater deflater(6, 8, 15);
        std::string noise;
        for (unsigned i = 0, random = 1; i < 1'000'000; ++i)
            noise += static_cast<char>((random = random * 69069 + 1) >> 24);
        const auto deflated = [&](std::string_view payload) {
            wschat::detail::Bytes block;
            block.reserve(64 * 1024);
            no_memory = payload.size() == noise.size();
            std::string result;
            try {
                const std::string_view bytes = deflater.deflate(payload, block, false);
                no_memory = false;
                result = bytes;
            } catch (const std::bad_alloc&) {
                no_memory = false;
                result = "no memory";
            }
            return result;
        };
        const std::string words = deflated("again and again and again and again");
        CHECK(deflated(noise) == "no memory");
        CHECK(deflated("again and again and again and again") == words);
    }

    TEST_CASE("a context costs the documented memory from the first message") {
        DeflateRoom room;
        room.connect(1, "/takeover", true);
        room.send_messages(*room.members[0], 10);
        room.connect(1, "/takeover", true);
        const std::int64_t compressor = room.bytes_held_by([&] { room.send_messages(*room.members[0]); });
        CHECK(compressor > 258 * 1024);
        CHECK(compressor < 266 * 1024);
        const std::int64_t decompressor = room.bytes_held_by([&] { room.send_messages(*room.members[1]); });
        CHECK(decompressor > 36 * 1024);
        CHECK(decompressor < 42 * 1024);
        CHECK(room.bytes_held_by([&] { room.send_messages(*room.members[1], 10); }) <= 0);
    }
}

#endif
