// What a message costs, counted and not timed: calls of the system, allocations, bytes held. The executable is linked
// with --wrap for each call that is counted; counters belong to a thread, so that those of the server's thread are read
// through its loop.
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
thread_local bool no_memory = false;  // for the test that sets it

// The size stands before what is handed out, which begins `alignment` bytes into its block.
constexpr std::size_t plain = alignof(std::max_align_t);

// What glibc takes for so many bytes.
std::int64_t held(std::size_t size) { return static_cast<std::int64_t>((size < 24 ? 32 : size + 8 + 15) / 16 * 16); }

void* counted_new(std::size_t size, std::size_t alignment = plain) {
    const std::size_t whole = (size + 2 * alignment - 1) / alignment * alignment;
    void* block = no_memory ? nullptr : std::aligned_alloc(alignment, whole);
    if (block == nullptr) throw std::bad_alloc();
    char* const place = static_cast<char*>(block) + alignment;
    std::memcpy(place - sizeof size, &size, sizeof size);
    ++counters.allocations;
    counters.bytes_held += held(size);
    return place;
}
void counted_delete(void* place, std::size_t alignment = plain) {
    if (place == nullptr) return;
    std::size_t size = 0;
    std::memcpy(&size, static_cast<char*>(place) - sizeof size, sizeof size);
    counters.bytes_held -= held(size);
    std::free(static_cast<char*>(place) - alignment);
}

}  // namespace

void* operator new(std::size_t size) { return counted_new(size); }
void* operator new[](std::size_t size) { return counted_new(size); }
void* operator new(std::size_t size, std::align_val_t a) { return counted_new(size, static_cast<std::size_t>(a)); }
void operator delete(void* place) noexcept { counted_delete(place); }
void operator delete[](void* place) noexcept { counted_delete(place); }
void operator delete(void* place, std::size_t) noexcept { counted_delete(place); }
void operator delete[](void* place, std::size_t) noexcept { counted_delete(place); }
void operator delete(void* place, std::align_val_t a) noexcept { counted_delete(place, static_cast<std::size_t>(a)); }
void operator delete(void* place, std::size_t, std::align_val_t a) noexcept {
    counted_delete(place, static_cast<std::size_t>(a));
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
// Called only where the header is compiled for it.
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

// A server with a room of `size` members, all of which are open.
struct Party {
    explicit Party(std::size_t size) {
        running.server.route<Member>("/room");
        running.server.route<Echo>("/echo");
        running.start();
        for (std::size_t i = 0; i < size; ++i) members.push_back(std::make_unique<Client>(running.port(), "/room"));
        for (const auto& member : members) REQUIRE(member->is_open());
        REQUIRE(running.eventually([&] { return running.server.rooms()["all"].size() == size; }));
    }
    // The counters of the server's thread, when all that came before is done.
    Counters count() {
        running.on_loop([] {});
        return running.on_loop([] { return counters; });
    }
    // Each member sees the message.
    void all_receive(const std::string& text) {
        for (const auto& member : members) REQUIRE(member->next() == text);
    }

    RunningServer running;
    std::vector<std::unique_ptr<Client>> members;
};

}  // namespace

TEST_SUITE("counters") {
    TEST_CASE("a broadcast to N members is N calls of send or one of a batch, and so are ten of one turn") {
        Party party(40);
        const bool batched = wschat::detail::SendBatch::make() != nullptr;
        for (const int broadcasts : {1, 10}) {
            CAPTURE(broadcasts);
            const Counters before = party.count();
            party.running.on_loop([&] {
                for (int i = 0; i < broadcasts; ++i) party.running.server.rooms()["all"].broadcast("to everybody");
            });
            const Counters after = party.count();
            CHECK(after.sends - before.sends == (batched ? 0 : 40));
            CHECK(after.batches - before.batches == (batched ? 1 : 0));
            CHECK(after.receives == before.receives);
            CHECK(after.poll_changes == before.poll_changes);
            for (int i = 0; i < broadcasts; ++i) party.all_receive("to everybody");
        }
    }

    TEST_CASE("an echo is one receive and one send, and the poller is told nothing") {
        Party party(0);
        Client client(party.running.port(), "/echo");
        client.send("warm");
        REQUIRE(client.next() == "warm");
        const Counters before = party.count();
        for (int i = 0; i < 50; ++i) {
            client.send("once around");
            REQUIRE(client.next() == "once around");
        }
        const Counters after = party.count();
        CHECK(after.receives - before.receives == 50);
        CHECK(after.sends - before.sends == 50);
        CHECK(after.poll_changes == before.poll_changes);
        // One for each message, and those that wake it to be asked for its counters.
        CHECK(after.waits - before.waits >= 50);
        CHECK(after.waits - before.waits <= 56);
    }

    TEST_CASE("in the steady state a delivery allocates nothing") {
        Party party(20);
        const auto talk = [&](int messages) {
            for (int i = 0; i < messages; ++i) {
                party.members[0]->send("some words for everybody in the room");
                party.all_receive("some words for everybody in the room");
            }
        };
        talk(10);
        const Counters before = party.count();
        talk(50);
        const Counters after = party.count();
        CHECK(after.allocations == before.allocations);
        CHECK(after.bytes_held <= before.bytes_held);  // what the counting posted is freed here
    }

    TEST_CASE("a large echo is received in place and sent from there: nothing of it stays") {
        Party party(0);
        Client client(party.running.port(), "/echo");
        const std::string large(1024 * 1024, 'x');
        const auto talk = [&](int messages) {
            for (int i = 0; i < messages; ++i) {
                client.send(large, Opcode::binary);
                REQUIRE(client.next() == large);
            }
        };
        talk(20);
        const Counters before = party.count();
        talk(20);
        const Counters after = party.count();
        // What the kernel did not take at once was queued, a few times.
        CHECK(after.allocations - before.allocations <= 20 * 8);
        CHECK(after.bytes_held <= before.bytes_held);
    }

    TEST_CASE("a message that arrives whole is handed on where it was received") {
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

    TEST_CASE("a large message of a server is offered to the transport where it lies") {
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

    TEST_CASE("an idle connection holds less than a kibibyte") {
        Party party(0);
        std::vector<std::unique_ptr<Client>> clients;
        const auto arrive = [&](std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) {
                clients.push_back(std::make_unique<Client>(party.running.port(), "/echo"));
                REQUIRE(clients.back()->is_open());
            }
        };
        arrive(64);  // the tables grow by doubling: from one full size to the next
        const Counters before = party.count();
        arrive(64);
        const Counters after = party.count();
        CHECK((after.bytes_held - before.bytes_held) / 64 <= 912);  // of the kibibyte the rest is between the blocks
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

// A room and an echo that compress; "takeover" is in the path where they keep contexts.
struct DeflateMember : wschat::WebSocketHandler {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        return all_compressed(request().raw_path() == "/takeover");
    }
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override { room("all").broadcast(m); }
};

struct DeflateParty {
    DeflateParty() {
        running.server.route<DeflateMember>("/shared");
        running.server.route<DeflateMember>("/takeover");
        running.server.route<Echo>("/plain");
        running.start();
    }
    void arrive(std::size_t count, const char* target, bool takeover = false) {
        auto& clients = std::string(target) == "/plain" ? others : members;
        for (std::size_t i = 0; i < count; ++i) {
            clients.push_back(std::make_unique<Client>(running.port(), target, "", all_compressed(takeover)));
            REQUIRE(clients.back()->is_open());
        }
    }
    void talk(Client& speaker, int messages = 1) {
        const std::string text = "some words for everybody in the room, some words for everybody, and some more";
        for (int i = 0; i < messages; ++i) {
            speaker.send(text);
            for (const auto& member : members) REQUIRE(member->next() == text);
        }
    }
    Counters count() {
        running.on_loop([] {});
        return running.on_loop([] { return counters; });
    }
    template <class Work>
    std::int64_t bytes_for(Work&& work) {
        const std::int64_t before = count().bytes_held;
        work();
        return count().bytes_held - before;
    }

    RunningServer running;
    std::vector<std::unique_ptr<Client>> members, others;
};

}  // namespace

TEST_SUITE("counters") {
    TEST_CASE("with the shared compressor a delivery allocates nothing either") {
        DeflateParty party;
        party.arrive(20, "/shared");
        party.talk(*party.members[0], 10);
        const Counters before = party.count();
        party.talk(*party.members[0], 50);
        const Counters after = party.count();
        CHECK(after.allocations == before.allocations);
        CHECK(after.bytes_held <= before.bytes_held);
    }

    TEST_CASE("a connection that keeps no context holds next to nothing for compression, also when it has talked") {
        DeflateParty party;
        party.arrive(2, "/shared");
        party.talk(*party.members[0], 10);
        const std::int64_t plain = party.bytes_for([&] { party.arrive(64, "/plain"); }) / 64;
        const std::int64_t compressed = party.bytes_for([&] { party.arrive(64, "/shared"); }) / 64;
        CHECK(compressed - plain < 256);  // the words of the offer among them
        const std::int64_t talking = party.bytes_for([&] {
            for (const auto& member : party.members) party.talk(*member);
        });
        CHECK(talking < 64 * 16);
    }

    TEST_CASE("a message that could not be compressed for want of memory leaves nothing in the next") {
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

    TEST_CASE("a context costs what CompressionOptions says, from the first message on") {
        DeflateParty party;
        party.arrive(1, "/takeover", true);
        party.talk(*party.members[0], 10);
        party.arrive(1, "/takeover", true);
        const std::int64_t compressor = party.bytes_for([&] { party.talk(*party.members[0]); });
        CHECK(compressor > 258 * 1024);
        CHECK(compressor < 266 * 1024);
        const std::int64_t decompressor = party.bytes_for([&] { party.talk(*party.members[1]); });
        CHECK(decompressor > 36 * 1024);
        CHECK(decompressor < 42 * 1024);
        CHECK(party.bytes_for([&] { party.talk(*party.members[1], 10); }) <= 0);
    }
}

#endif
