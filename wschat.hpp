// wschat.hpp: a real-time WebSocket chat server in one C++17 header, with the verbs of Tornado's WebSocketHandler.
// SPDX-License-Identifier: MIT
//
//   #include "wschat.hpp"
//
//   struct Chat : wschat::WebSocketHandler {
//       void open() override                               { room("lobby").join(*this); }
//       void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
//   };
//
//   int main() {
//       wschat::Server server;
//       server.file("/", "chat.html");
//       server.route<Chat>("/chat");
//       server.listen(8888);
//       server.run();
//   }
//
//   g++ -std=c++17 -O2 chat.cpp -o chat -pthread && ./chat
//
// THE HOUSE
//
// Bytes go one way: a socket (section 10) is read by a session of the server (section 14) -> RequestParser (section 5), once -> Connection
// (section 7: frames, UTF-8, control frames, closing; section 6 inflates) -> event -> WebSocketHandler (section 8) -> Room (section 9) -> one shared
// EncodedFrame (section 4) -> each member's SendQueue (section 3) -> one gathered write for each connection at the end of the
// loop's turn (section 12, section 14) -> socket.
//
// The sections stand strictly bottom-up; a section uses only sections above it, and each prefix of this file that ends
// at a banner compiles.
//
//   #   Section         Main types                                                        May use
//   1    Configuration   WSCHAT_* macros, version, ABI-tagged inline namespace             -
//   2    Vocabulary      Opcode, CloseCode, Message, Limits, Error, LogEntry               1
//   3    Bytes           Bytes, SendArena, SendQueue, Utf8Validator, sha1, Json, Named     2
//   4    Frames          FrameHeader, FrameParser, EncodedFrame                            2-3
//   5    HTTP            Request, Response, RequestParser, the upgrade check               2-3
//   6    Compression     CompressionOptions, Deflater, Inflater, CompressionPool           2-5
//   7    Protocol        Connection                                                        2-6
//   8    Handler         WebSocketHandler, HandlerRef                                      2-7
//   9    Rooms           Room, Rooms                                                       2, 3, 4, 7, 8
//   10  Sockets         IpAddress, Socket, SendBatch, Transport, Poller (epoll, kqueue)   2-3
//   11  TLS             TlsOptions, TlsContext, TlsStream, TlsTransport                   2, 3, 10
//   12  Loop            Loop, Timer, post(), signals                                      2, 10
//   13  Site            Route, Pattern, File                                              2-9
//   14  Server          Server, ServerOptions, Metrics                                    all above
//   16  Chat            ChatHandler, ChatHub, ChatRoom, MemoryHistory                     all above
//   17  Stores          SqliteHistory                                                     12, 16
//
// Macros. To be set by whoever compiles, the same in every translation unit (they are part of the ABI tag, so that
// translation units which disagree do not link):
//
//   WSCHAT_ZLIB        1: compression (section 6), with zlib: link with -lz
//   WSCHAT_OPENSSL     1: TLS (section 11), with OpenSSL 1.1.1 or newer: link with -lssl -lcrypto
//   WSCHAT_LIBURING    1: on Linux what a turn sends to many goes to the kernel in one call: link with -luring
//   WSCHAT_SQLITE      1: SqliteHistory (section 17), with SQLite 3: link with -lsqlite3
//   WSCHAT_HIREDIS     reserved; 0
//
// Defined here to be read: WSCHAT_VERSION_MAJOR, _MINOR, _PATCH, WSCHAT_VERSION (10000 * major + 100 * minor + patch),
// WSCHAT_VERSION_STRING.
//
// Threads. A server is one loop on one thread, the one that calls run(). Loop::post(), what is built on it
// (HandlerRef), and Server::shutdown() may be called from any thread; everything else belongs to the loop's thread,
// and builds without NDEBUG assert it where something is sent or closed. More cores: several servers, one a thread.
//
// Lifetime. The server owns handlers; a handler lives until its on_close() has returned. A Message is a view that is
// valid until the callback returns. A Room& is valid until the callback returns. A reference to a handler that
// outlives a callback is ref(), never a pointer.
//
// Errors. What the network does is a status, an event and a log entry, never an exception. What the caller does wrong
// (an illegal close code, a port in use, a missing page) is a wschat::Error whose sentence names the call, the value
// and the cause. An exception that leaves a callback is logged and costs that one connection (1011).
//
// Re-entrancy. A callback may call anything: close any connection, join, leave, broadcast, stop the server. Nothing
// that it calls runs another callback: output and closing are queued, and the loop acts on them when it has returned.

#pragma once

// ====================================================================================================================
// section 1: Configuration
//
// Version, feature macros, and the inline namespace whose name carries both. Knows nothing of the rest.
// ====================================================================================================================

#define WSCHAT_VERSION_MAJOR 0
#define WSCHAT_VERSION_MINOR 1
#define WSCHAT_VERSION_PATCH 0
#define WSCHAT_VERSION (10000 * WSCHAT_VERSION_MAJOR + 100 * WSCHAT_VERSION_MINOR + WSCHAT_VERSION_PATCH)
#define WSCHAT_VERSION_STRING "0.1.0"

#ifndef WSCHAT_ZLIB
#define WSCHAT_ZLIB 0
#endif
#ifndef WSCHAT_OPENSSL
#define WSCHAT_OPENSSL 0
#endif
#ifndef WSCHAT_SQLITE
#define WSCHAT_SQLITE 0
#endif
#ifndef WSCHAT_CHAT
#define WSCHAT_CHAT 0  // not in the ABI tag: it adds names and changes none
#endif
#ifndef WSCHAT_HIREDIS
#define WSCHAT_HIREDIS 0
#endif
#ifndef WSCHAT_LIBURING
#define WSCHAT_LIBURING 0
#endif

#if defined(_MSVC_LANG) ? _MSVC_LANG < 201703L : __cplusplus < 201703L
#error "wschat.hpp needs C++17: compile with -std=c++17 or newer"
#endif

#if defined(__GNUC__)
#define WSCHAT_NOINLINE __attribute__((noinline))
#define WSCHAT_COLD __attribute__((cold))  // set-up, pages, refusals, logs: rather small, and soon compiled, than fast
#else
#define WSCHAT_NOINLINE
#define WSCHAT_COLD
#endif

// The two steps let the feature macros expand before they are pasted. All of it is undefined at the end of the file.
#define WSCHAT_ABI_PASTE(major, minor, zlib, openssl, sqlite, hiredis, liburing) \
    v##major##_##minor##_z##zlib##o##openssl##s##sqlite##r##hiredis##u##liburing
#define WSCHAT_ABI_NAME(major, minor, zlib, openssl, sqlite, hiredis, liburing) \
    WSCHAT_ABI_PASTE(major, minor, zlib, openssl, sqlite, hiredis, liburing)
#define WSCHAT_ABI                                                                                          \
    WSCHAT_ABI_NAME(WSCHAT_VERSION_MAJOR, WSCHAT_VERSION_MINOR, WSCHAT_ZLIB, WSCHAT_OPENSSL, WSCHAT_SQLITE, \
                    WSCHAT_HIREDIS, WSCHAT_LIBURING)

// Every section opens and closes the library's namespace with these two.
#define WSCHAT_BEGIN   \
    namespace wschat { \
    inline namespace WSCHAT_ABI {
#define WSCHAT_END \
    }              \
    }

// ====================================================================================================================
// section 2: Vocabulary
//
// The words that all other sections share: opcodes, close codes, messages, limits, errors and log entries. Plain
// values; knows nothing of bytes on a wire.
// ====================================================================================================================

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

WSCHAT_BEGIN

// The monotonic clock is the only clock that decides anything; a jump of the wall clock changes nothing.
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Duration = Clock::duration;

// A delay after a time; one that passes the end of time is never over.
constexpr Time later(Time time, Duration delay) { return delay > (Time::max)() - time ? (Time::max)() : time + delay; }

// What a caller did wrong: the sentence names the call, the value and the cause.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// RFC 6455 11.8.
enum class Opcode : std::uint8_t { continuation = 0x0, text = 0x1, binary = 0x2, close = 0x8, ping = 0x9, pong = 0xA };

namespace detail {

constexpr bool is_control(Opcode opcode) { return (static_cast<unsigned>(opcode) & 0x8u) != 0; }

}  // namespace detail

// RFC 6455 7.4.1 and IANA's registry. An application's own codes are 3000-4999: CloseCode{4001}.
enum class CloseCode : std::uint16_t {
    normal = 1000,
    going_away = 1001,
    protocol_error = 1002,
    unsupported_data = 1003,
    no_status = 1005,  // never on the wire: the peer's Close frame had no code
    abnormal = 1006,   // never on the wire: the connection ended without a Close frame
    invalid_payload = 1007,
    policy_violation = 1008,
    message_too_big = 1009,
    mandatory_extension = 1010,
    internal_error = 1011,
    service_restart = 1012,
    try_again_later = 1013,
    bad_gateway = 1014,
    tls_handshake = 1015  // never on the wire
};

constexpr unsigned number(CloseCode code) { return static_cast<unsigned>(code); }

namespace detail {

// Whether a Close frame may carry the code, from either side: 1000-1003, 1007-1014, 3000-4999 (RFC 6455 7.4).
constexpr bool legal_on_wire(CloseCode code) {
    const unsigned n = number(code);
    return (n >= 1000 && n <= 1003) || (n >= 1007 && n <= 1014) || (n >= 3000 && n <= 4999);
}

}  // namespace detail

// Who ended a connection and why, so that a 1006 is never a riddle.
enum class CloseCause : std::uint8_t {
    none,               // it is not closed
    peer,               // the peer sent a Close frame first
    local,              // close() was called here, and the peer answered
    protocol_error,     // the peer broke the protocol or a limit on input; close_code() says which rule
    connection_lost,    // the transport ended or failed without a Close frame
    ping_timeout,       // the peer did not answer a keepalive ping
    closing_timeout,    // the peer did not answer our Close frame
    backlog,            // the peer read too slowly: Limits::max_backlog or ServerLimits::max_total_backlog
    handler_exception,  // an exception left a callback
    shutdown            // the server shut down
};

constexpr std::string_view to_string(CloseCause cause) {
    constexpr std::string_view names[] = {"none",
                                          "peer",
                                          "local",
                                          "protocol error",
                                          "connection lost",
                                          "ping timeout",
                                          "closing timeout",
                                          "backlog",
                                          "handler exception",
                                          "shutdown"};
    return names[static_cast<std::size_t>(cause)];
}

// What became of a message that was written.
enum class WriteStatus : std::uint8_t {
    sent,     // leaves for the kernel at the end of the loop's turn
    queued,   // the peer is slow: it waits behind what the kernel has not taken yet
    dropped,  // the backlog limit is reached and the policy is to drop; counted in dropped_messages()
    closed    // the connection is not open (any more); nothing was written
};

// A message as it was received: a view that is valid until the callback returns.
class Message {
public:
    explicit Message(std::string_view payload, Opcode opcode = Opcode::text) : payload_(payload), opcode_(opcode) {}

    std::string_view text() const { return payload_; }
    std::string_view data() const { return payload_; }
    std::size_t size() const { return payload_.size(); }
    bool binary() const { return opcode_ == Opcode::binary; }
    Opcode opcode() const { return opcode_; }

private:
    std::string_view payload_;
    Opcode opcode_;
};

// What happens to a message for a peer whose backlog is full.
enum class BacklogPolicy : std::uint8_t {
    close,  // the connection is closed with 1008 (or aborted where that can not be delivered)
    drop    // the new message is dropped and counted
};

// The bounds of one connection. Sizes in bytes; a duration of zero turns that timer off. ServerOptions::limits is the
// default of all connections; Route::set_limits() replaces it for the connections of a route.
struct Limits {
    // Absolute, from the accept to the whole request of a 101 or a page; anew for each request, and while an answer moves.
    Duration handshake_timeout = std::chrono::seconds(10);
    std::size_t max_request_line = 8 * 1024;   // 414
    std::size_t max_header_bytes = 16 * 1024;  // 431
    std::size_t max_header_fields = 100;       // 431

    std::size_t max_message_size = 1024 * 1024;  // of a whole message, after inflating; 1009
    std::size_t max_fragments = 1024;            // of one message; 1008
    unsigned control_frames_per_second = 100;    // a sustained rate of pings, pongs; 1008. 0: no limit
    unsigned control_frames_burst = 500;         // and as many may come at once

    std::size_t max_backlog = 1024 * 1024;  // written but not yet taken by the kernel; one message may always wait
    BacklogPolicy backlog_policy = BacklogPolicy::close;

    Duration ping_interval = std::chrono::seconds(20);   // a silent peer is pinged
    Duration ping_timeout = std::chrono::seconds(20);    // and gone when it stays silent for so long after it
    Duration closing_timeout = std::chrono::seconds(5);  // for the peer's answer to our Close frame, and a second more
                                                         // for each 64 KiB that are queued before it
    Duration linger_timeout = std::chrono::seconds(2);   // after our last byte, input is read and discarded for so long
    std::size_t linger_bytes = 256 * 1024;               // and up to so many bytes; past them it waits unread
};

// The bounds of a server as a whole: ServerOptions::server_limits. Sizes in bytes.
struct ServerLimits {
    std::size_t max_total_backlog = 256 * 1024 * 1024;  // output and unfinished input of all connections together; past
                                                        // it the connections with the largest backlog are closed
    std::size_t max_connections = 0;                    // 503; 0: the descriptor limit of the process minus 64
    std::size_t max_connections_per_address = 0;        // 503; 0: no limit. An IPv6 /64 counts as one address
};

enum class LogLevel : std::uint8_t { debug, info, warning, error };

constexpr std::string_view to_string(LogLevel level) {
    constexpr std::string_view names[] = {"debug", "info", "warning", "error"};
    return names[static_cast<std::size_t>(level)];
}

// One event of the server's log: a short constant name, and fields that may hold what a peer sent. A view that is
// valid until the log function returns. to_string(entry) makes one safe line of it.
struct LogEntry {
    LogLevel level;
    std::string_view event;
    const std::vector<std::pair<std::string_view, std::string>>& fields;
};

// Where any thread may leave work for the loop's thread. False: the loop is gone, and the work will not be done.
class Mailbox {
public:
    virtual ~Mailbox() = default;
    virtual bool post(std::function<void()> work) = 0;
};

WSCHAT_END

// ====================================================================================================================
// section 3: Bytes
//
// What holds, checks and rewrites bytes: the buffer for an unfinished message, the output queues and the arena that
// they share, UTF-8, SHA-1, base64, JSON text, log lines. Knows nothing of frames or of HTTP.
// ====================================================================================================================

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

WSCHAT_BEGIN

namespace detail {

// The first lines of an object, 64 bytes each, will be needed soon. It may be null.
#if defined(__GNUC__)
inline void prefetch(const void* object, std::uintptr_t lines) {
    const auto begin = reinterpret_cast<std::uintptr_t>(object);
    for (std::uintptr_t i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(begin + 64 * i));
    __asm__ volatile("");  // g++ leaves out a call of what it believes to have no effect
}
#else
inline void prefetch(const void*, std::uintptr_t) {}
#endif

// Memory for bytes. A large block begins in the middle of a page: the kernel fills its own pages from their beginning,
// and a copy between two places that are about equally far into their pages is slow on many processors (4 KiB aliasing).
// It doubled what the kernel takes for a message of 1 MiB.
constexpr std::size_t large_block = 64 * 1024;
constexpr std::size_t page_size = 4096;

inline char* allocate_block(std::size_t size) {
    if (size < large_block) return static_cast<char*>(::operator new(size));
    return static_cast<char*>(::operator new(size + page_size / 2, std::align_val_t(page_size))) + page_size / 2;
}
// Not inlined: where it is, g++ 12 believes that it may come to a null pointer.
WSCHAT_NOINLINE inline void free_large_block(char* block) {
    ::operator delete(block - page_size / 2, std::align_val_t(page_size));
}
inline void free_block(char* block, std::size_t size) {
    if (size < large_block) ::operator delete(block);
    else free_large_block(block);
}

// A growable block of bytes for what has arrived of an unfinished message. Unlike std::string it does not clear what
// it grows by, and release() gives its memory back. Grows with what is appended, at most to twice of it.
class Bytes {
public:
    Bytes() = default;
    Bytes(Bytes&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0u)),
          capacity_(std::exchange(other.capacity_, 0u)) {}
    Bytes& operator=(Bytes&& other) noexcept {
        swap(other);
        return *this;
    }
    void swap(Bytes& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }
    ~Bytes() { free_block(data_, capacity_); }

    char* data() { return data_; }
    char* end() { return data_ + size_; }
    std::size_t size() const { return size_; }
    std::size_t capacity() const { return capacity_; }
    std::size_t room() const { return capacity_ - size_; }
    bool empty() const { return size_ == 0; }
    std::string_view view() const { return {data_, size_}; }

    void reserve(std::size_t more) {
        if (more <= room()) return;
        const std::size_t wanted = size_ + more > 2 * capacity_ ? size_ + more : 2 * capacity_;
        char* grown = allocate_block(wanted);
        if (size_ != 0) std::memcpy(grown, data_, size_);
        free_block(data_, capacity_);
        data_ = grown;
        capacity_ = wanted;
    }
    // Bytes that were written behind end() by somebody else, within room().
    void advance(std::size_t n) { size_ += n; }
    void append(const char* bytes, std::size_t n) {
        if (n == 0) return;
        reserve(n);
        std::memcpy(end(), bytes, n);
        size_ += n;
    }
    void append(std::string_view bytes) { append(bytes.data(), bytes.size()); }
    void clear() { size_ = 0; }
    void release() {
        free_block(data_, capacity_);
        data_ = nullptr;
        size_ = capacity_ = 0;
    }

private:
    char* data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t capacity_ = 0;
};

// A block of output bytes that is only ever appended to, and shared by reference count. The count is not atomic: a
// chunk never leaves the thread of its loop.
class Chunk {
public:
    static Chunk* make(std::size_t capacity, bool pooled) {
        return new (allocate_block(sizeof(Chunk) + capacity)) Chunk(capacity, pooled);
    }
    void acquire() { ++references_; }
    void release() {
        if (--references_ == 0) destroy(this);
    }
    bool shared() const { return references_ > 1; }
    bool pooled() const { return pooled_; }
    std::size_t size() const { return size_; }
    std::size_t room() const { return capacity_ - size_; }
    char* data() { return reinterpret_cast<char*>(this + 1); }
    char* end() { return data() + size_; }
    void advance(std::size_t n) { size_ += n; }
    void clear() { size_ = 0; }

private:
    Chunk(std::size_t capacity, bool pooled) : capacity_(capacity), pooled_(pooled) {}
    // Not inlined: where it is, g++ 12 believes that two references in a row both were the last.
    WSCHAT_NOINLINE static void destroy(Chunk* chunk) {
        free_block(reinterpret_cast<char*>(chunk), sizeof(Chunk) + chunk->capacity_);
    }

    std::size_t size_ = 0;
    std::size_t capacity_;
    std::uint32_t references_ = 0;
    bool pooled_;
};

class ChunkRef {
public:
    ChunkRef() = default;
    explicit ChunkRef(Chunk* chunk) : chunk_(chunk) {
        if (chunk_ != nullptr) chunk_->acquire();
    }
    ChunkRef(const ChunkRef& other) : ChunkRef(other.chunk_) {}
    ChunkRef(ChunkRef&& other) noexcept : chunk_(std::exchange(other.chunk_, nullptr)) {}
    ChunkRef& operator=(ChunkRef other) noexcept {
        std::swap(chunk_, other.chunk_);
        return *this;
    }
    ~ChunkRef() {
        if (chunk_ != nullptr) chunk_->release();
    }
    Chunk* operator->() const { return chunk_; }
    explicit operator bool() const { return chunk_ != nullptr; }
    friend bool operator==(const ChunkRef& a, const ChunkRef& b) { return a.chunk_ == b.chunk_; }

private:
    Chunk* chunk_ = nullptr;
};

// A range of a chunk's bytes.
struct Slice {
    ChunkRef chunk;
    std::size_t begin = 0;
    std::size_t end = 0;

    std::size_t size() const { return end - begin; }
    const char* data() const { return chunk->data() + begin; }
    std::string_view view() const { return {data(), size()}; }
};

// Where all output of a loop is written, once: frames lie behind one another in pooled chunks, and queues hold slices
// of them. A chunk of which no queue holds a slice any more is used again, so a healthy server allocates nothing for
// its output. And where a few blocks of large messages that have been read rest until the next one comes.
class SendArena {
public:
    SendArena() = default;
    SendArena(const SendArena&) = delete;
    SendArena& operator=(const SendArena&) = delete;

    // A slice of n bytes for the caller to write, by writable(slice).
    Slice allocate(std::size_t n) {
        ChunkRef chunk = n > large ? ChunkRef(Chunk::make(n, false)) : pooled_with_room(n);
        const std::size_t begin = chunk->size();
        chunk->advance(n);
        return {std::move(chunk), begin, begin + n};
    }
    static char* writable(const Slice& slice) { return slice.chunk->data() + slice.begin; }

    // A block that was given back, or an empty one.
    Bytes take_block() {
        if (blocks_.empty()) return {};
        Bytes block = std::move(blocks_.back());
        blocks_.pop_back();
        return block;
    }
    void give_back(Bytes&& block) {
        block.clear();
        const bool keep = block.capacity() >= min_block && block.capacity() <= max_block && blocks_.size() < max_blocks;
        if (keep) blocks_.push_back(std::move(block));
        else block.release();
    }

private:
    static constexpr std::size_t min_block = 64 * 1024;
    static constexpr std::size_t max_block = 2 * 1024 * 1024;
    static constexpr std::size_t max_blocks = 4;

    // More than that has a chunk of its own, which a queue may keep without keeping anybody else's bytes.
    static constexpr std::size_t large = 64 * 1024;
    static constexpr std::size_t pooled_size = 256 * 1024;
    static constexpr std::size_t max_pooled = 8;

    const ChunkRef& pooled_with_room(std::size_t n) {
        if (current_ < pool_.size()) {
            ChunkRef& current = pool_[current_];
            if (!current->shared()) current->clear();
            if (current->room() >= n) return current;
        }
        for (current_ = 0; current_ < pool_.size(); ++current_) {
            if (pool_[current_]->shared()) continue;
            pool_[current_]->clear();
            return pool_[current_];
        }
        ChunkRef fresh(Chunk::make(pooled_size, true));
        if (pool_.size() < max_pooled) pool_.push_back(std::move(fresh));
        else pool_[current_ = 0] = std::move(fresh);  // the old one lives on in the queues that hold it
        return pool_[current_];
    }

    std::vector<ChunkRef> pool_;
    std::size_t current_ = 0;
    std::vector<Bytes> blocks_;
};

inline Slice copy(SendArena& arena, std::string_view bytes) {
    Slice slice = arena.allocate(bytes.size());
    if (!bytes.empty()) std::memcpy(SendArena::writable(slice), bytes.data(), bytes.size());
    return slice;
}

// What one connection has yet to send: slices in order. Slices that follow one another in a chunk become one, so what
// a turn of the loop wrote for a room is a single piece in each member's queue.
class SendQueue {
public:
    std::size_t size() const { return bytes_; }
    bool empty() const { return bytes_ == 0; }

    void append(const Slice& slice) {
        if (slice.size() == 0) return;
        push(slice);
        bytes_ += slice.size();
    }

    // The first pieces in order, at most max of them; returns how many.
    std::size_t gather(std::string_view* pieces, std::size_t max) const {
        std::size_t count = 0;
        for (std::size_t i = front_; i < older_.size() && count < max; ++i) pieces[count++] = older_[i].view();
        if (count < max && tail_.size() != 0) pieces[count++] = tail_.view();
        return count;
    }

    // The first n bytes have been sent.
    void consume(std::size_t n) {
        bytes_ -= n;
        if (bytes_ == 0 && older_.empty()) {
            tail_ = Slice();
            return;
        }
        while (n != 0 && front_ < older_.size()) {
            Slice& slice = older_[front_];
            const std::size_t part = n < slice.size() ? n : slice.size();
            slice.begin += part;
            n -= part;
            if (slice.size() == 0) {
                slice = Slice();
                ++front_;
            }
        }
        tail_.begin += n;
        if (tail_.chunk && tail_.size() == 0) tail_ = Slice();
        if (front_ != 0) drop_sent();
    }

    // Moves what lies in the arena's pooled chunks into chunks of this queue alone, so that a peer that does not read
    // keeps no more memory than its own backlog. Called when the kernel takes no more.
    void keep() {
        const std::size_t from = front_ > kept_ ? front_ : kept_;
        if (from == older_.size() && (!tail_.chunk || !tail_.chunk->pooled())) return;
        SendQueue own;  // made aside, so that a want of memory leaves this queue as it was
        for (std::size_t i = from; i < older_.size(); ++i) own.push_own(older_[i]);
        own.push_own(tail_);
        older_.reserve(from + own.older_.size());
        older_.erase(older_.begin() + static_cast<std::ptrdiff_t>(from), older_.end());
        for (Slice& slice : own.older_) older_.push_back(std::move(slice));
        if (older_.capacity() > 2 * older_.size() + 16) older_.shrink_to_fit();
        tail_ = std::move(own.tail_);
        kept_ = older_.size();
    }

    void clear() { *this = SendQueue(); }

private:
    static constexpr std::size_t own_size = 16 * 1024;

    void push(const Slice& slice) {
        if (tail_.end == slice.begin && tail_.chunk == slice.chunk) {
            tail_.end = slice.end;
            return;
        }
        if (tail_.size() != 0) older_.push_back(std::move(tail_));
        tail_ = slice;
    }

    // A chunk that is not pooled has room only where it is this queue's own.
    void push_own(const Slice& slice) {
        if (!slice.chunk->pooled()) return push(slice);
        const std::string_view bytes = slice.view();
        const bool fits = tail_.chunk && !tail_.chunk->pooled() && tail_.end == tail_.chunk->size() &&
                          tail_.chunk->room() >= bytes.size();
        ChunkRef chunk =
            fits ? tail_.chunk : ChunkRef(Chunk::make(bytes.size() > own_size ? bytes.size() : own_size, false));
        const std::size_t begin = chunk->size();
        std::memcpy(chunk->end(), bytes.data(), bytes.size());
        chunk->advance(bytes.size());
        push({std::move(chunk), begin, begin + bytes.size()});
    }

    // Forgets the sent slices at the front; an empty queue gives back what a long backlog made it grow by.
    void drop_sent() {
        if (front_ == older_.size()) {
            older_.clear();
            if (older_.capacity() > 16) older_.shrink_to_fit();
            front_ = kept_ = 0;
        } else if (front_ >= 64 && front_ * 2 >= older_.size()) {
            older_.erase(older_.begin(), older_.begin() + static_cast<std::ptrdiff_t>(front_));
            kept_ = kept_ > front_ ? kept_ - front_ : 0;
            front_ = 0;
        }
    }

    Slice tail_;  // the last slice, the one that may grow
    std::size_t bytes_ = 0;
    std::vector<Slice> older_;  // those before it; [0, front_) are sent, [front_, kept_) lie in chunks of our own
    std::size_t front_ = 0;
    std::size_t kept_ = 0;
};

#if defined(__x86_64__) && defined(__GNUC__)

// Checks 32 bytes at a time with three table look-ups (Keiser and Lemire, "Validating UTF-8 In Less Than One
// Instruction Per Byte", 2021). `p` is at the beginning of a character, with three bytes of valid text before it. Returns
// the beginning of a character up to which all is valid, near the end or near the first error.
__attribute__((target("avx2"))) inline const unsigned char* skip_utf8_avx2(const unsigned char* p,
                                                                           const unsigned char* end) {
    typedef unsigned char Block __attribute__((vector_size(32)));
    typedef char Signed __attribute__((vector_size(32)));
    // What a pair of bytes may be guilty of; the pair is invalid where all three tables agree on it.
    constexpr unsigned char too_short = 1, too_long = 2, overlong_3 = 4, too_large = 8, surrogate = 16, overlong_2 = 32,
                            too_large_1000 = 64, overlong_4 = 64, two_continuations = 128;
    constexpr unsigned char any = too_short | too_long | two_continuations;
    constexpr unsigned char large = any | too_large | too_large_1000;
    constexpr unsigned char first_high[16] = {too_long,
                                              too_long,
                                              too_long,
                                              too_long,
                                              too_long,
                                              too_long,
                                              too_long,
                                              too_long,
                                              two_continuations,
                                              two_continuations,
                                              two_continuations,
                                              two_continuations,
                                              too_short | overlong_2,
                                              too_short,
                                              too_short | overlong_3 | surrogate,
                                              too_short | too_large | too_large_1000 | overlong_4};
    constexpr unsigned char first_low[16] = {any | overlong_3 | overlong_2 | overlong_4,
                                             any | overlong_2,
                                             any,
                                             any,
                                             any | too_large,
                                             large,
                                             large,
                                             large,
                                             large,
                                             large,
                                             large,
                                             large,
                                             large,
                                             large | surrogate,
                                             large,
                                             large};
    constexpr unsigned char continuation = too_long | overlong_2 | two_continuations;
    constexpr unsigned char second_high[16] = {too_short,
                                               too_short,
                                               too_short,
                                               too_short,
                                               too_short,
                                               too_short,
                                               too_short,
                                               too_short,
                                               continuation | overlong_3 | too_large_1000 | overlong_4,
                                               continuation | overlong_3 | too_large,
                                               continuation | surrogate | too_large,
                                               continuation | surrogate | too_large,
                                               too_short,
                                               too_short,
                                               too_short,
                                               too_short};
    Signed tables[3];
    const unsigned char* sources[3] = {first_high, first_low, second_high};
    for (int i = 0; i < 3; ++i) {
        std::memcpy(&tables[i], sources[i], 16);
        std::memcpy(reinterpret_cast<char*>(&tables[i]) + 16, sources[i], 16);
    }
    for (; end - p >= 32; p += 32) {
        Block now, before[3];
        std::memcpy(&now, p, 32);
        for (int i = 0; i < 3; ++i) std::memcpy(&before[i], p - 1 - i, 32);
        const Block pairs =
            reinterpret_cast<Block>(__builtin_ia32_pshufb256(tables[0], reinterpret_cast<Signed>(before[0] >> 4)) &
                                    __builtin_ia32_pshufb256(tables[1], reinterpret_cast<Signed>(before[0] & 15)) &
                                    __builtin_ia32_pshufb256(tables[2], reinterpret_cast<Signed>(now >> 4)));
        // The third byte of three and the third and fourth of four must be continuations after a continuation.
        const Block inner = reinterpret_cast<Block>((before[1] >= 0xE0) | (before[2] >= 0xF0)) & 0x80;
        typedef long long Words __attribute__((vector_size(32)));
        const Words errors = reinterpret_cast<Words>(pairs ^ inner);
        if ((errors[0] | errors[1] | errors[2] | errors[3]) != 0) break;
    }
    for (int back = 1; back <= 3; ++back) {
        const unsigned char c = p[-back];
        if (c < 0x80) break;
        const int length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 0;
        if (length > back) return p - back;
    }
    return p;
}
inline bool has_avx2() {
    static const bool answer = __builtin_cpu_supports("avx2") != 0;
    return answer;
}

#else

inline const unsigned char* skip_utf8_avx2(const unsigned char* p, const unsigned char*) { return p; }
constexpr bool has_avx2() { return false; }

#endif

// RFC 3629, as the bytes arrive: feed() answers false as soon as no continuation could make the text valid.
class Utf8Validator {
public:
    bool feed(const char* data, std::size_t size) {
        const auto begin = reinterpret_cast<const unsigned char*>(data);
        const unsigned char* p = begin;
        const unsigned char* const end = p + size;
        for (;;) {
            for (; needed_ != 0; --needed_) {
                if (p == end) return true;
                if (*p < low_ || *p > high_) return false;
                low_ = 0x80;
                high_ = 0xBF;
                ++p;
            }
            p = skip_ascii(p, end);
            if (end - p >= 64 && p - begin >= 3 && has_avx2()) p = skip_utf8_avx2(p, end);
            if (p == end) return true;
            if (*p >= 0x80 && !lead(*p)) return false;
            ++p;
        }
    }
    // Whether the text may end here, not within a character.
    bool complete() const { return needed_ == 0; }
    void reset() { *this = Utf8Validator(); }

private:
    static const unsigned char* skip_ascii(const unsigned char* p, const unsigned char* end) {
        constexpr std::uint64_t high_bits = 0x8080808080808080u;
        for (std::uint64_t words[4]; end - p >= 32; p += 32) {
            std::memcpy(words, p, 32);
            if (((words[0] | words[1] | words[2] | words[3]) & high_bits) != 0) break;
        }
        while (p != end && *p < 0x80) ++p;
        return p;
    }
    // RFC 3629 4: how many bytes follow, and what the first of them may be: no overlong forms, no surrogates, nothing
    // above U+10FFFF.
    bool lead(unsigned char c) {
        if (c < 0xC2 || c > 0xF4) return false;
        needed_ = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
        if (c == 0xE0) low_ = 0xA0;
        if (c == 0xED) high_ = 0x9F;
        if (c == 0xF0) low_ = 0x90;
        if (c == 0xF4) high_ = 0x8F;
        return true;
    }

    std::uint8_t needed_ = 0;
    std::uint8_t low_ = 0x80;
    std::uint8_t high_ = 0xBF;
};

}  // namespace detail

inline bool valid_utf8(std::string_view text) {
    detail::Utf8Validator validator;
    return validator.feed(text.data(), text.size()) && validator.complete();
}

// The longest beginning of a valid UTF-8 text that has at most max bytes and does not end within a character.
inline std::string_view cut_utf8(std::string_view text, std::size_t max) {
    if (text.size() <= max) return text;
    while (max != 0 && (static_cast<unsigned char>(text[max]) & 0xC0) == 0x80) --max;
    return text.substr(0, max);
}

// FIPS 180-4. Not for security: the opening handshake asks for it.
inline std::array<unsigned char, 20> sha1(std::string_view input) {
    std::uint32_t state[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    const auto rotate = [](std::uint32_t x, int n) { return (x << n) | (x >> (32 - n)); };
    const auto block = [&](const unsigned char* p) {
        std::uint32_t w[80];
        for (std::size_t i = 0; i < 16; ++i, p += 4)
            w[i] = std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | p[3];
        for (std::size_t i = 16; i < 80; ++i) w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
        for (std::size_t i = 0; i < 80; ++i) {
            const std::uint32_t f = i < 20   ? ((b & c) | (~b & d)) + 0x5A827999
                                    : i < 40 ? (b ^ c ^ d) + 0x6ED9EBA1
                                    : i < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8F1BBCDC
                                             : (b ^ c ^ d) + 0xCA62C1D6;
            const std::uint32_t next = rotate(a, 5) + f + e + w[i];
            e = d;
            d = c;
            c = rotate(b, 30);
            b = a;
            a = next;
        }
        const std::uint32_t sum[5] = {a, b, c, d, e};
        for (std::size_t i = 0; i < 5; ++i) state[i] += sum[i];
    };

    const auto bytes = reinterpret_cast<const unsigned char*>(input.data());
    std::size_t done = 0;
    for (; input.size() - done >= 64; done += 64) block(bytes + done);
    unsigned char last[128] = {};
    const std::size_t left = input.size() - done;
    if (left != 0) std::memcpy(last, bytes + done, left);
    last[left] = 0x80;
    const std::size_t padded = left < 56 ? 64 : 128;
    const std::uint64_t bits = std::uint64_t{input.size()} * 8;
    for (std::size_t i = 0; i < 8; ++i) last[padded - 1 - i] = static_cast<unsigned char>(bits >> (8 * i));
    for (std::size_t i = 0; i < padded; i += 64) block(last + i);

    std::array<unsigned char, 20> digest{};
    for (std::size_t i = 0; i < 20; ++i) digest[i] = static_cast<unsigned char>(state[i / 4] >> (24 - 8 * (i % 4)));
    return digest;
}

// RFC 4648 4, with padding.
inline std::string base64(const unsigned char* data, std::size_t size) {
    constexpr char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    text.reserve((size + 2) / 3 * 4);
    for (std::size_t i = 0; i < size; i += 3) {
        const std::size_t left = size - i;
        const unsigned bits = (unsigned{data[i]} << 16) | (left > 1 ? unsigned{data[i + 1]} << 8 : 0u) |
                              (left > 2 ? unsigned{data[i + 2]} : 0u);
        text += alphabet[bits >> 18];
        text += alphabet[(bits >> 12) & 63];
        text += left > 1 ? alphabet[(bits >> 6) & 63] : '=';
        text += left > 2 ? alphabet[bits & 63] : '=';
    }
    return text;
}

namespace detail {

// The JSON text of an object that has .dump(), such as nlohmann::json.
template <class Object>
auto json_text(const Object& object) -> decltype(std::string(object.dump())) {
    return std::string(object.dump());
}

}  // namespace detail

// Builds JSON text (RFC 8259). Objects are braces of pairs:
// Json{{"type", "join"}, {"name", name}, {"users", Json::array(names)}}.
// An object of a JSON library converts to Json if it has .dump(). It is an Error if dump() returns invalid UTF-8.
class Json {
public:
    struct Member;

    Json(std::nullptr_t = nullptr) : text_("null") {}
    Json(bool value) : text_(value ? "true" : "false") {}
    Json(const char* value) { quote(value); }
    Json(const std::string& value) { quote(value); }
    Json(std::string_view value) { quote(value); }
    template <class Object, class = decltype(detail::json_text(std::declval<const Object&>()))>
    Json(const Object& object) : text_(detail::json_text(object)) {
        if (!valid_utf8(text_)) throw Error("Json: dump() returned text that is not UTF-8");
    }
    Json(double value) {
        // The shortest text that converts back to the same number.
        char digits[32];
        for (int precision = 15; precision <= 17; ++precision) {
            std::snprintf(digits, sizeof digits, "%.*g", precision, value);
            if (std::strtod(digits, nullptr) >= value && std::strtod(digits, nullptr) <= value) break;
        }
        for (char& c : digits)
            if (c == ',') c = '.';  // some locales use a decimal comma
        text_ = std::isfinite(value) ? digits : "null";
    }
    template <class Integer, std::enable_if_t<std::is_integral_v<Integer> && !std::is_same_v<Integer, bool>, int> = 0>
    Json(Integer value) : text_(std::to_string(value)) {}
    Json(std::initializer_list<Member> members);

    template <class Range>
    static Json array(const Range& items) {
        Json list;
        list.text_ = "[";
        for (const auto& item : items) {
            if (list.text_.size() > 1) list.text_ += ',';
            list.text_ += Json(item).text_;
        }
        list.text_ += ']';
        return list;
    }

    const std::string& dump() const { return text_; }

private:
    // Invalid UTF-8 becomes U+FFFD, because a text message must be valid.
    void quote(std::string_view value) {
        text_ += '"';
        while (!value.empty()) {
            const std::size_t size = character(value);
            if (size == 0) text_ += "\xEF\xBF\xBD";
            else if (size == 1) escape(value.front());
            else text_ += value.substr(0, size);
            value.remove_prefix(size == 0 ? 1 : size);
        }
        text_ += '"';
    }
    // The size of the first character, or 0 if it is invalid.
    static std::size_t character(std::string_view value) {
        for (std::size_t size = 1; size <= 4 && size <= value.size(); ++size)
            if (valid_utf8(value.substr(0, size))) return size;
        return 0;
    }
    void escape(char c) {
        char code[8];
        if (c == '"' || c == '\\') (text_ += '\\') += c;
        else if (c == '\n') text_ += "\\n";
        else if (static_cast<unsigned char>(c) >= 0x20) text_ += c;
        else text_.append(code, static_cast<std::size_t>(std::snprintf(code, sizeof code, "\\u%04x", unsigned(c))));
    }

    std::string text_;
};

struct Json::Member {
    std::string_view name;
    Json value;
};

inline Json::Json(std::initializer_list<Member> members) : text_("{") {
    for (const Member& member : members) {
        if (text_.size() > 1) text_ += ',';
        quote(member.name);
        text_ += ':';
        text_ += member.value.text_;
    }
    text_ += '}';
}

// ---- text ------------------------------------------------------------------------------------------------------------

namespace text {

constexpr char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
constexpr bool digit(char c) { return c >= '0' && c <= '9'; }
constexpr bool alphanumeric(char c) { return digit(c) || (lower(c) >= 'a' && lower(c) <= 'z'); }

inline std::string lowered(std::string_view s) {
    std::string result(s);
    for (char& c : result) c = lower(c);
    return result;
}
inline bool same_ignoring_case(std::string_view a, std::string_view b) {
    return a.size() == b.size() &&
           std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) { return lower(x) == lower(y); });
}
inline bool starts_with(std::string_view s, std::string_view start) { return s.substr(0, start.size()) == start; }

// RFC 9110 5.6.3: optional white space is space and tab, nothing else.
inline std::string_view trimmed(std::string_view s) {
    while (!s.empty() && (s.front() == ' ' || s.front() == '\t')) s.remove_prefix(1);
    while (!s.empty() && (s.back() == ' ' || s.back() == '\t')) s.remove_suffix(1);
    return s;
}
// RFC 9110 5.6.2.
inline bool token_char(char c) {
    return alphanumeric(c) || (c != '\0' && std::strchr("!#$%&'*+-.^_`|~", c) != nullptr);
}
// Whether one of the list is of that name.
template <class List>
bool contains(const List& list, std::string_view name) {
    for (const auto& each : list)
        if (each == name) return true;
    return false;
}
inline bool token(std::string_view s) { return !s.empty() && std::all_of(s.begin(), s.end(), token_char); }

// What precedes the first separator; the rest, without it, stays in s.
inline std::string_view cut_at(std::string_view& s, char separator) {
    const std::size_t at = s.find(separator);
    const std::string_view part = s.substr(0, at);
    s.remove_prefix(at == std::string_view::npos ? s.size() : at + 1);
    return part;
}

// Digits only; nothing where it is not a number or is over max.
inline std::optional<std::uint64_t> unsigned_number(std::string_view s, std::uint64_t max) {
    if (s.empty() || s.size() > 20) return std::nullopt;
    std::uint64_t value = 0;
    for (const char c : s) {
        if (!digit(c)) return std::nullopt;
        const auto next = static_cast<std::uint64_t>(c - '0');
        if (next > max || value > (max - next) / 10) return std::nullopt;
        value = value * 10 + next;
    }
    return value;
}

inline int hex_digit(char c) {
    if (digit(c)) return c - '0';
    return lower(c) >= 'a' && lower(c) <= 'f' ? lower(c) - 'a' + 10 : -1;
}

// RFC 3986 2.1; nothing where an escape is malformed. `plus`: '+' is a space, as in a query.
inline std::optional<std::string> percent_decoded(std::string_view s, bool plus = false) {
    std::string result;
    result.reserve(s.size());
    for (std::size_t i = 0; i < s.size(); ++i) {
        if (s[i] != '%') {
            result += plus && s[i] == '+' ? ' ' : s[i];
            continue;
        }
        if (s.size() - i < 3 || hex_digit(s[i + 1]) < 0 || hex_digit(s[i + 2]) < 0) return std::nullopt;
        result += static_cast<char>(hex_digit(s[i + 1]) * 16 + hex_digit(s[i + 2]));
        i += 2;
    }
    return result;
}

}  // namespace text

// What a peer chose, made fit for a log line: control characters, quotes and backslashes as \xNN, the rest cut at max
// bytes, so that nobody forges a line or moves the cursor of a terminal.
inline std::string escape_for_log(std::string_view value, std::size_t max = 200) {
    std::string text;
    for (const char c : value.substr(0, max)) {
        char code[8];
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte >= 0x7F || c == '"' || c == '\\')
            text.append(code, static_cast<std::size_t>(std::snprintf(code, sizeof code, "\\x%02x", unsigned{byte})));
        else text += c;
    }
    if (value.size() > max) text += "...";
    return text;
}

// `warning handler_exception peer="127.0.0.1" what="..."`: one line, escaped, without a line end.
WSCHAT_COLD inline std::string to_string(const LogEntry& entry) {
    std::string line(to_string(entry.level));
    (line += ' ') += entry.event;
    for (const auto& [name, value] : entry.fields) {
        ((line += ' ') += name) += "=\"";
        (line += escape_for_log(value)) += '"';
    }
    return line;
}

// A log for a terminal: Server::on_log(log_to_stderr). Leaves out what is for debugging only.
inline void log_to_stderr(const LogEntry& entry) {
    if (entry.level != LogLevel::debug) std::fprintf(stderr, "%s\n", to_string(entry).c_str());
}

// ---- rates ------------------------------------------------------------------------------------------------------------

struct Rate {
    double per_second = 0;  // 0: no limit
    double burst = 0;       // so many at once
};

class TokenBucket {
public:
    // Takes so many tokens, or none and answers false. One that is larger than the burst needs a full bucket.
    bool take(double tokens, const Rate& rate, Time now) {
        if (rate.per_second <= 0) return true;
        drain(rate, now);
        if (used_ + (std::min)(tokens, rate.burst) > rate.burst) return false;
        used_ += tokens;
        return true;
    }
    bool full(const Rate& rate, Time now) {
        drain(rate, now);
        return used_ <= 0;
    }

private:
    void drain(const Rate& rate, Time now) {
        used_ = (std::max)(0.0, used_ - std::chrono::duration<double>(now - at_).count() * rate.per_second);
        at_ = now;
    }
    double used_ = 0;
    Time at_{};
};

// ---- things by name ------------------------------------------------------------------------------------------------

// A number as a name: eight bytes, which no string needs memory for, the highest first.
inline std::string big_endian_key(std::uint64_t number) {
    std::string name(8, '\0');
    for (std::size_t i = 8; i-- > 0; number >>= 8) name[i] = static_cast<char>(number & 0xFF);
    return name;
}

namespace detail {

// A value of any type, and what destroys it.
using Owned = std::unique_ptr<void, void (*)(void*)>;

template <class Value, class... Arguments>
Owned make_owned(Arguments&&... arguments) {
    return Owned(new Value{std::forward<Arguments>(arguments)...}, [](void* it) { delete static_cast<Value*>(it); });
}

}  // namespace detail

// Things of one kind by their names, in the order of these. All kinds share one kind of tree: a std::map of each would be
// what compiling this file costs most.
template <class Value>
class StringMap {
    using Tree = std::map<std::string, detail::Owned, std::less<>>;

public:
    struct Entry {
        const std::string& name;
        Value& value;
    };
    class Iterator {
    public:
        explicit Iterator(Tree::const_iterator at) : at_(at) {}
        Entry operator*() const { return {at_->first, to_value(at_->second)}; }
        Iterator& operator++() {
            ++at_;
            return *this;
        }
        friend bool operator!=(const Iterator& a, const Iterator& b) { return a.at_ != b.at_; }

    private:
        Tree::const_iterator at_;
    };

    Value& front() const { return to_value(tree_.begin()->second); }
    Iterator begin() const { return Iterator(tree_.begin()); }
    Iterator end() const { return Iterator(tree_.end()); }
    std::size_t size() const { return tree_.size(); }
    bool empty() const { return tree_.empty(); }

    // Null where there is none.
    Value* find(std::string_view name) const {
        const auto found = tree_.find(name);
        return found == tree_.end() ? nullptr : &to_value(found->second);
    }
    // The one of that name, made of the arguments where there is none.
    template <class... Arguments>
    Value& find_or_emplace(std::string_view name, Arguments&&... arguments) {
        if (Value* known = find(name)) return *known;
        detail::Owned made = detail::make_owned<Value>(std::forward<Arguments>(arguments)...);
        return to_value(tree_.emplace(name, std::move(made)).first->second);
    }
    // One more, by its number: where none is erased, things stand in the order in which they were added.
    template <class... Arguments>
    Value& append(Arguments&&... arguments) {
        return find_or_emplace(big_endian_key(size()), std::forward<Arguments>(arguments)...);
    }
    // One that somebody else owns.
    void insert_reference(std::string_view name, Value& value) {
        tree_.emplace(name, detail::Owned(&value, [](void*) {}));
    }
    // Nothing where there is none of that name, or the new one is taken.
    void rename(std::string_view name, std::string_view new_name) {
        const auto old = tree_.find(name);
        if (old == tree_.end() || find(new_name) != nullptr) return;
        tree_.emplace(new_name, detail::Owned(nullptr, nullptr)).first->second.swap(old->second);
        tree_.erase(old);
    }
    // False where there was none.
    bool erase(std::string_view name) {
        const auto found = tree_.find(name);
        if (found == tree_.end()) return false;
        tree_.erase(found);
        return true;
    }
    void clear() { tree_.clear(); }
    template <class Predicate>
    void erase_if(Predicate&& predicate) {
        for (auto it = tree_.begin(); it != tree_.end();) it = predicate(to_value(it->second)) ? tree_.erase(it) : ++it;
    }

private:
    static Value& to_value(const detail::Owned& owned) { return *static_cast<Value*>(owned.get()); }

    Tree tree_;
};

WSCHAT_END

// ====================================================================================================================
// section 4: Frames
//
// RFC 6455 5 as plain values: a header is parsed from bytes or encoded to bytes, a payload is masked in place. Knows
// nothing of messages beyond the order of their fragments, and nothing of closing.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

// Which end of a connection we are: a server reads masked frames and sends plain ones, a client the reverse.
enum class Role : std::uint8_t { server, client };

// Why a connection must fail: the code for the Close frame and a reason in a few words.
struct Failure {
    CloseCode code;
    std::string_view reason;
};

using MaskKey = std::array<unsigned char, 4>;

// RFC 6455 5.2.
struct FrameHeader {
    static constexpr std::size_t max_size = 14;

    bool fin = true;
    bool rsv1 = false;
    Opcode opcode = Opcode::text;
    bool masked = false;
    MaskKey mask{};
    std::uint64_t length = 0;
};

#if defined(__x86_64__) && defined(__GNUC__)

// Masks whole blocks of 64 bytes and answers how many bytes these were; the bits that they have now are or'ed to `seen`.
__attribute__((target("avx2"))) inline std::size_t mask_blocks_avx2(char* data, std::size_t size, std::uint64_t word,
                                                                    std::uint64_t& seen) {
    typedef std::uint64_t Block __attribute__((vector_size(32)));
    const Block key = {word, word, word, word};
    Block bits = {seen, 0, 0, 0}, low, high;
    std::size_t done = 0;
    for (; size - done >= 64; done += 64) {
        std::memcpy(&low, data + done, 32);
        std::memcpy(&high, data + done + 32, 32);
        bits |= (low ^= key) | (high ^= key);
        std::memcpy(data + done, &low, 32);
        std::memcpy(data + done + 32, &high, 32);
    }
    seen = bits[0] | bits[1] | bits[2] | bits[3];
    return done;
}

#else

inline std::size_t mask_blocks_avx2(char*, std::size_t, std::uint64_t, std::uint64_t&) { return 0; }

#endif

// RFC 6455 5.3: byte i of the payload is xored with mask[(offset + i) % 4]. In place; doing it twice undoes it. Answers
// whether all bytes are ASCII now, which costs next to nothing while they pass.
inline bool apply_mask(char* data, std::size_t size, const MaskKey& mask, std::size_t offset = 0) {
    MaskKey key = mask;
    if (offset % 4 != 0)
        for (std::size_t i = 0; i < 4; ++i) key[i] = mask[(offset + i) % 4];
    std::uint32_t half;
    std::memcpy(&half, key.data(), 4);
    const std::uint64_t word = half * std::uint64_t{0x0000000100000001};
    std::uint64_t seen = 0;
    std::size_t i = size >= 64 && has_avx2() ? mask_blocks_avx2(data, size, word, seen) : 0;
    for (std::uint64_t next; size - i >= 8; i += 8) {
        std::memcpy(&next, data + i, 8);
        seen |= next ^= word;
        std::memcpy(data + i, &next, 8);
    }
    for (; i < size; ++i) {
        const auto byte = static_cast<unsigned char>(static_cast<unsigned char>(data[i]) ^ key[i % 4]);
        seen |= byte;
        data[i] = static_cast<char>(byte);
    }
    return (seen & 0x8080808080808080u) == 0;
}

constexpr std::size_t encoded_size(const FrameHeader& header) {
    return 2u + (header.length < 126 ? 0u : header.length < 65536 ? 2u : 8u) + (header.masked ? 4u : 0u);
}

// Writes encoded_size(header) bytes, the length in its shortest form; returns the place behind them.
inline char* encode(const FrameHeader& header, char* out) {
    const auto put = [&out](std::uint64_t byte) { *out++ = static_cast<char>(byte & 0xFF); };
    put((header.fin ? 0x80u : 0u) | (header.rsv1 ? 0x40u : 0u) | static_cast<unsigned>(header.opcode));
    const unsigned mask_bit = header.masked ? 0x80u : 0u;
    const int length_bytes = header.length < 126 ? 0 : header.length < 65536 ? 2 : 8;
    put(mask_bit | (length_bytes == 0 ? header.length : length_bytes == 2 ? 126u : 127u));
    for (int i = length_bytes; i-- > 0;) put(header.length >> (8 * i));
    if (header.masked)
        for (const unsigned char byte : header.mask) put(byte);
    return out;
}

// The three outcomes of parsing a header: more bytes are needed, a header that took `size` bytes, or a failure.
struct ParsedFrame {
    enum class Outcome : std::uint8_t { need_more, header, failure };

    Outcome outcome = Outcome::need_more;
    std::size_t size = 0;
    FrameHeader header{};
    Failure failure{};
};

// Parses the headers of one direction of a connection, and keeps the one bit of state that their order needs: whether
// a fragmented message is open.
class FrameParser {
public:
    // `role` is ours: a server's parser demands masks, a client's refuses them. `compression`: it was negotiated, and
    // RSV1 may stand in the first frame of a message (RFC 7692 6).
    explicit FrameParser(Role role = Role::server, bool compression = false) : role_(role), compression_(compression) {}

    // Parses the header at the front of `bytes`. A rule that the first bytes already break fails before the rest has
    // come. The payload is the caller's to take.
    ParsedFrame parse(std::string_view bytes) {
        ParsedFrame parsed;
        const auto byte = [bytes](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
        if (bytes.empty()) return parsed;
        FrameHeader& header = parsed.header;

        // 1. The first byte: FIN, RSV1-3, opcode.
        header.fin = (byte(0) & 0x80) != 0;
        header.rsv1 = (byte(0) & 0x40) != 0;
        header.opcode = static_cast<Opcode>(byte(0) & 0x0F);
        if (const char* reason = first_byte_error(byte(0), header)) return failed(reason);
        if (bytes.size() < 2) return parsed;

        // 2. The second byte: MASK and the length, or which form of length follows.
        header.masked = (byte(1) & 0x80) != 0;
        const unsigned short_length = byte(1) & 0x7F;
        if (header.masked != (role_ == Role::server))
            return failed(role_ == Role::server ? "frame from a client is not masked"
                                                : "frame from a server is masked");
        if (is_control(header.opcode) && short_length > 125) return failed("control frame is longer than 125 bytes");

        // 3. The length in its three forms. RFC 6455 5.2: "the minimal number of bytes MUST be used to encode the
        // length", and of a 64-bit length "the most significant bit MUST be 0".
        const std::size_t length_bytes = short_length < 126 ? 0 : short_length == 126 ? 2 : 8;
        const std::size_t size = 2 + length_bytes + (header.masked ? 4 : 0);
        if (length_bytes == 8 && bytes.size() > 2 && (byte(2) & 0x80) != 0)
            return failed("most significant bit of a 64-bit length is set");
        // Six zero bytes at the front of eight already tell that two would have done.
        if (length_bytes == 8 && bytes.size() >= 8 &&
            bytes.substr(2, 6).find_first_not_of('\0') == std::string_view::npos)
            return failed("length is not in its shortest form");
        if (bytes.size() < 2 + length_bytes) return parsed;
        header.length = length_bytes == 0 ? short_length : 0;
        for (std::size_t i = 0; i < length_bytes; ++i) header.length = header.length << 8 | byte(2 + i);
        if (length_bytes == 2 && header.length < 126) return failed("length is not in its shortest form");

        // 4. The mask.
        if (bytes.size() < size) return parsed;
        if (header.masked) std::memcpy(header.mask.data(), bytes.data() + size - 4, 4);
        if (!is_control(header.opcode)) message_open_ = !header.fin;
        parsed.outcome = ParsedFrame::Outcome::header;
        parsed.size = size;
        return parsed;
    }

private:
    const char* first_byte_error(unsigned char byte, const FrameHeader& header) const {
        if ((byte & 0x70) != 0 && ((byte & 0x30) != 0 || !compression_))
            return "reserved bit is set and no extension was negotiated";
        const unsigned opcode = byte & 0x0F;
        if ((opcode > 0x2 && opcode < 0x8) || opcode > 0xA) return "opcode is reserved";
        // RFC 7692 6.1: "An endpoint MUST NOT set the "Per-Message Compressed" bit of control frames and non-first
        // fragments of a data message."
        if (header.rsv1 && header.opcode != Opcode::text && header.opcode != Opcode::binary)
            return "frame is marked as compressed and does not begin a message";
        if (is_control(header.opcode)) return header.fin ? nullptr : "control frame is fragmented";
        if (header.opcode == Opcode::continuation) return message_open_ ? nullptr : "continuation of nothing";
        return message_open_ ? "new message within a fragmented message" : nullptr;
    }
    static ParsedFrame failed(const char* reason) {
        ParsedFrame parsed;
        parsed.outcome = ParsedFrame::Outcome::failure;
        parsed.failure = {CloseCode::protocol_error, reason};
        return parsed;
    }

    Role role_;
    bool compression_;
    bool message_open_ = false;
};

// The whole frame of a payload, whose length the header takes over.
inline Slice encode_frame(SendArena& arena, FrameHeader header, std::string_view payload) {
    header.length = payload.size();
    Slice slice = arena.allocate(encoded_size(header) + payload.size());
    char* out = encode(header, SendArena::writable(slice));
    if (!payload.empty()) std::memcpy(out, payload.data(), payload.size());
    if (header.masked) apply_mask(out, payload.size(), header.mask);
    return slice;
}

}  // namespace detail

// A message as a server sends it, encoded once and shared by all queues that it is in: plain, and in compressed forms
// for those who negotiated them, each made when the first of them asks. Belongs to the loop's thread.
class EncodedFrame {
public:
    EncodedFrame(detail::SendArena& arena, Opcode opcode, std::string_view payload)
        : EncodedFrame(&arena, opcode, payload) {
        payload_ = slice().view().substr(size() - payload.size());
    }
    // The same of a payload that outlives it: not even the plain form is made before somebody asks.
    static EncodedFrame of_lasting(detail::SendArena& arena, Opcode opcode, std::string_view payload) {
        return EncodedFrame(&arena, opcode, payload);
    }

    const detail::Slice& slice() const {
        if (!plain_.chunk) plain_ = detail::encode_frame(*arena_, header(), payload_);
        return plain_;
    }
    // Of the plain form.
    std::size_t size() const { return size_; }
    Opcode opcode() const { return opcode_; }
    std::string_view payload() const { return payload_; }

    // The form of that key, which make() encodes where it is new.
    template <class Make>
    const detail::Slice& form(const void* key, Make&& make) const {
        if (form_.key == nullptr) form_ = {key, make()};
        if (form_.key == key) return form_.slice;
        for (const Form& other : other_forms_)
            if (other.key == key) return other.slice;
        other_forms_.push_back({key, make()});
        return other_forms_.back().slice;
    }

private:
    struct Form {
        const void* key = nullptr;
        detail::Slice slice;
    };

    EncodedFrame(detail::SendArena* arena, Opcode opcode, std::string_view payload)
        : arena_(arena), payload_(payload), opcode_(opcode), size_(detail::encoded_size(header()) + payload.size()) {}
    detail::FrameHeader header() const {
        detail::FrameHeader header;
        header.opcode = opcode_;
        header.length = payload_.size();
        return header;
    }

    detail::SendArena* arena_;
    std::string_view payload_;
    Opcode opcode_;
    std::size_t size_;
    mutable detail::Slice plain_;
    mutable Form form_;  // nearly always there is one at most
    mutable std::vector<Form> other_forms_;
};

namespace detail {

// A frame as a client sends it: masked, and so never shared.
inline Slice encode_masked(SendArena& arena, Opcode opcode, std::string_view payload, const MaskKey& mask) {
    FrameHeader header;
    header.opcode = opcode;
    header.masked = true;
    header.mask = mask;
    return encode_frame(arena, header, payload);
}

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 5: HTTP
//
// RFC 9112 as far as pages and upgrades need it, and the opening handshake of RFC 6455 4: requests are parsed strictly,
// answers are complete. Knows nothing of sockets, of files or of what a path means.
// ====================================================================================================================

#include <ctime>
#include <deque>

WSCHAT_BEGIN

namespace detail {

// RFC 9110 5.6.7: "Sun, 06 Nov 1994 08:49:37 GMT". Days are counted by hand because strftime() follows the locale.
inline std::string http_date(std::int64_t unix_seconds) {
    const std::int64_t days = unix_seconds / 86400 - (unix_seconds % 86400 < 0 ? 1 : 0);
    const std::int64_t second = unix_seconds - days * 86400;
    const std::int64_t z = days + 719468, era = z / 146097, of_era = z % 146097;
    const std::int64_t year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    const std::int64_t of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const std::int64_t mp = (5 * of_year + 2) / 153, day = of_year - (153 * mp + 2) / 5 + 1;
    const std::int64_t month = mp < 10 ? mp + 3 : mp - 9, year = year_of_era + era * 400 + (month <= 2 ? 1 : 0);
    constexpr const char* days_of_week[] = {"Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"};
    constexpr const char* months[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                      "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    char text[64];
    std::snprintf(text, sizeof text, "%s, %02d %s %04d %02d:%02d:%02d GMT", days_of_week[(days % 7 + 7) % 7],
                  static_cast<int>(day), months[month - 1], static_cast<int>(year), static_cast<int>(second / 3600),
                  static_cast<int>(second / 60 % 60), static_cast<int>(second % 60));
    return text;
}

}  // namespace detail

// The header fields of a message: a view of their lines, each of which has passed field_line_error(). Names are found
// without regard to case; every look-up reads the lines once.
class Fields {
public:
    Fields() = default;
    explicit Fields(std::string_view lines) : lines_(lines) {}

    // Calls visit(name, value) for each field line, until it answers false.
    template <class Visit>
    void each(Visit&& visit) const {
        for (std::string_view rest = lines_; !rest.empty();) {
            std::string_view line = text::cut_at(rest, '\n');
            if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
            if (line.empty()) return;
            const std::string_view name = text::cut_at(line, ':');
            if (!visit(name, text::trimmed(line))) return;
        }
    }
    // The first field of that name, or nothing.
    std::optional<std::string_view> find(std::string_view name) const {
        std::optional<std::string_view> found;
        each([&](std::string_view n, std::string_view value) {
            if (text::same_ignoring_case(n, name)) found = value;
            return !found;
        });
        return found;
    }
    std::size_t count(std::string_view name) const {
        std::size_t n = 0;
        each([&](std::string_view field, std::string_view) {
            if (text::same_ignoring_case(field, name)) ++n;
            return true;
        });
        return n;
    }
    // Calls visit(element) for each element of a comma-separated list, over all fields of that name (RFC 9110 5.6.1).
    template <class Visit>
    void each_element(std::string_view name, Visit&& visit) const {
        each([&](std::string_view n, std::string_view value) {
            while (text::same_ignoring_case(n, name) && !value.empty()) {
                const std::string_view element = text::trimmed(text::cut_at(value, ','));
                if (!element.empty()) visit(element);
            }
            return true;
        });
    }
    bool has_element(std::string_view name, std::string_view element) const {
        bool found = false;
        each_element(name, [&](std::string_view e) { found = found || text::same_ignoring_case(e, element); });
        return found;
    }

private:
    std::string_view lines_;
};

namespace detail {

// Why a line (without its CRLF) is no header field (RFC 9112 5); null where it is one.
inline const char* field_line_error(std::string_view line) {
    if (line.front() == ' ' || line.front() == '\t') return "a header line is folded";
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos) return "a header line has no colon";
    if (colon == 0) return "a header has no name";
    if (!text::token(line.substr(0, colon))) return "a header name has a character that it must not have";
    for (const char c : line.substr(colon + 1)) {
        const auto byte = static_cast<unsigned char>(c);
        if ((byte < 0x20 && c != '\t') || byte == 0x7F) return "a header value has a control character";
    }
    return nullptr;
}

// A host and, where there is one, a port: a name, an IPv4 address, or an IPv6 address in brackets (RFC 3986 3.2.2, less
// what no host on the web has).
inline bool valid_host(std::string_view host) {
    std::string_view name = host, port;
    if (text::starts_with(host, "[")) {
        const std::size_t close = host.find(']');
        if (close == std::string_view::npos || close < 3) return false;
        name = host.substr(1, close - 1);
        for (const char c : name)
            if (text::hex_digit(c) < 0 && c != ':' && c != '.') return false;
        port = host.substr(close + 1);
        if (!port.empty() && port.front() != ':') return false;
        if (!port.empty()) port.remove_prefix(1);
    } else {
        port = host;
        name = text::cut_at(port, ':');
        for (const char c : name)
            if (!text::alphanumeric(c) && c != '-' && c != '.' && c != '_' && c != '~') return false;
    }
    return !name.empty() && (port.empty() || text::unsigned_number(port, 65535));
}

}  // namespace detail

namespace detail {
class RequestParser;
}

// A request's head. As a parser hands it out it owns its bytes; all views of it live as long as it does.
class Request {
public:
    std::string_view method() const { return part(method_); }
    // As it was sent: "/chat/tea%20room?name=Anna".
    std::string_view target() const { return part(target_); }
    // "/chat/tea%20room", still encoded; path() is decoded.
    std::string_view raw_path() const { return path_.size == 0 ? "/" : part(path_); }
    std::string path() const { return text::percent_decoded(raw_path()).value_or(std::string()); }
    std::string_view query_string() const { return part(query_); }
    // Of the Host field, or of an absolute target.
    std::string_view host() const { return part(host_); }
    bool http_1_0() const { return http_1_0_; }
    bool has_body() const { return has_body_; }
    // "https" where the connection to this server is encrypted, else "http"; what a proxy in front says is not asked.
    std::string_view scheme() const { return tls_ != 0 ? "https" : "http"; }
    // The subject of the certificate that the client has proved to have, as RFC 2253 writes it ("CN=Anna,O=Tea"); empty
    // where it showed none.
    std::string_view client_certificate() const {
        return tls_ == 0 ? std::string_view() : std::string_view(head_).substr(head_.size() - (tls_ - 1u));
    }

    Fields fields() const { return Fields(std::string_view(head_).substr(fields_begin_)); }
    // The first header of that name, whatever its case; empty where there is none.
    std::string_view header(std::string_view name) const { return fields().find(name).value_or(std::string_view()); }

    // A parameter of the query, decoded ("+" is a space); nothing where it is absent or malformed.
    std::optional<std::string> query(std::string_view name) const {
        for (std::string_view rest = query_string(); !rest.empty();) {
            std::string_view value = text::cut_at(rest, '&');
            const std::string_view key = text::cut_at(value, '=');
            if (text::percent_decoded(key, true) == std::string(name)) return text::percent_decoded(value, true);
        }
        return std::nullopt;
    }
    // RFC 6265 4.2.1; the value as it was sent, without the quotes that it may stand in.
    std::optional<std::string_view> cookie(std::string_view name) const {
        std::optional<std::string_view> found;
        fields().each([&](std::string_view field, std::string_view value) {
            while (text::same_ignoring_case(field, "cookie") && !value.empty() && !found) {
                std::string_view pair = text::cut_at(value, ';');
                if (text::trimmed(text::cut_at(pair, '=')) != name) continue;
                pair = text::trimmed(pair);
                if (pair.size() >= 2 && pair.front() == '"' && pair.back() == '"')
                    pair = pair.substr(1, pair.size() - 2);
                found = pair;
            }
            return !found;
        });
        return found;
    }
    // What stood in the path for "{name}" of the route, decoded; empty where the route has no such parameter.
    std::string_view param(std::string_view name) const {
        for (const auto& [key, value] : params_)
            if (key == name) return value;
        return {};
    }
    void set_params(std::vector<std::pair<std::string, std::string>> params) { params_ = std::move(params); }
    // It came over TLS, from a client with that certificate or with none.
    void set_secure(std::string_view client_certificate) {
        constexpr std::size_t max = 4096;
        const std::string_view kept = client_certificate.substr(0, max);
        head_.reserve(head_.size() + kept.size());
        head_ += kept;
        tls_ = static_cast<std::uint16_t>(kept.size() + 1);
    }

private:
    friend class detail::RequestParser;

    struct Part {
        std::uint32_t begin = 0;
        std::uint32_t size = 0;
    };
    std::string_view part(Part p) const { return std::string_view(head_).substr(p.begin, p.size); }
    Part part_of(std::string_view view) const {
        return {static_cast<std::uint32_t>(view.data() - head_.data()), static_cast<std::uint32_t>(view.size())};
    }

    std::string head_;
    Part method_, target_, path_, query_, host_;
    std::uint32_t fields_begin_ = 0;
    bool http_1_0_ = false;
    bool has_body_ = false;
    std::uint16_t tls_ = 0;  // over TLS one more than the size of client_certificate(), which ends head_
    std::vector<std::pair<std::string, std::string>> params_;
};

namespace detail {

// Parses one request head after another from bytes in any pieces, in time linear in their number. The outcome of a
// feed() is one of three; after a failure the parser takes nothing more.
class RequestParser {
public:
    enum class Outcome : std::uint8_t { need_more, request, failure };

    explicit RequestParser(const Limits& limits) : limits_(&limits) {}

    // Takes bytes up to the end of a head; `consumed` says how many.
    Outcome feed(std::string_view bytes, std::size_t& consumed) {
        consumed = 0;
        while (status_ == 0 && consumed < bytes.size()) {
            const std::size_t end = bytes.find('\n', consumed);
            const bool whole = end != std::string_view::npos;
            const std::string_view piece = bytes.substr(consumed, whole ? end + 1 - consumed : std::string_view::npos);
            if (!plausible_start(piece) || !within_limits(piece)) break;
            request_.head_.append(piece);
            consumed += piece.size();
            if (whole && take_line()) return check_head() ? Outcome::request : Outcome::failure;
        }
        return status_ == 0 ? Outcome::need_more : Outcome::failure;
    }

    // The request of the outcome, to be taken once; the parser is then ready for the next.
    Request take_request() {
        Request request = std::move(request_);
        request.head_.shrink_to_fit();
        *this = RequestParser(*limits_);
        return request;
    }
    // Whether bytes of an unfinished head have come.
    bool started() const { return !request_.head_.empty(); }
    // After a failure: the status of the answer, and a sentence for its body.
    int status() const { return status_; }
    const std::string& reason() const { return reason_; }

private:
    std::string_view head() const { return request_.head_; }

    bool fail(int status, std::string reason) {
        status_ = status;
        reason_ = std::move(reason);
        return false;
    }

    // What can not become a request line is refused at its first byte, not after a deadline.
    bool plausible_start(std::string_view piece) {
        const char first = head().empty() ? piece.front() : head().front();
        if (text::token_char(first) || first == '\r' || first == '\n') return true;
        return fail(400, first == '\x16' ? "This port speaks plain HTTP, and the client began with TLS."
                                         : "The request does not begin with a method.");
    }

    // Counted before the bytes are kept, with the line end that they may end in given for free.
    bool within_limits(std::string_view piece) {
        std::size_t size = head().size() + piece.size();
        const auto ends_with = [&](char c) {
            return size != 0 && (size > head().size() ? piece[size - head().size() - 1] : head().back()) == c;
        };
        if (ends_with('\n')) --size;
        if (ends_with('\r')) --size;
        if (request_.fields_begin_ == 0 && size > limits_->max_request_line)
            return fail(414,
                        "The request line is longer than " + std::to_string(limits_->max_request_line) + " bytes.");
        if (request_.fields_begin_ != 0 && size > request_.fields_begin_ + limits_->max_header_bytes)
            return fail(431, "The headers are longer than " + std::to_string(limits_->max_header_bytes) + " bytes.");
        return true;
    }

    // Judges the line that has just been completed; true where it ends the head.
    bool take_line() {
        const std::string_view line = head().substr(line_begin_, head().size() - line_begin_ - 1);
        if (line.empty() || line.back() != '\r') return fail(400, "A line does not end with CR LF.");
        const std::string_view content = line.substr(0, line.size() - 1);
        line_begin_ = head().size();
        if (request_.fields_begin_ != 0) return content.empty() || take_field(content);
        if (content.empty()) {
            // RFC 9112 2.2: "ignore at least one empty line (CRLF) received prior to the request-line".
            if (skipped_empty_line_) return fail(400, "The request line is empty.");
            skipped_empty_line_ = true;
            request_.head_.clear();
            line_begin_ = 0;
            return false;
        }
        request_.fields_begin_ = static_cast<std::uint32_t>(line_begin_);
        take_request_line(content);
        return false;
    }

    // Never ends the head, and so answers false.
    bool take_field(std::string_view line) {
        if (++field_count_ > limits_->max_header_fields)
            return fail(431, "There are more than " + std::to_string(limits_->max_header_fields) + " headers.");
        if (const char* error = field_line_error(line)) fail(400, std::string("In the headers, ") + error + ".");
        return false;
    }

    // RFC 9112 3: method SP request-target SP HTTP-version, with single spaces.
    bool take_request_line(std::string_view line) {
        std::string_view rest = line;
        const std::string_view method = text::cut_at(rest, ' '), target = text::cut_at(rest, ' '), version = rest;
        if (!text::token(method)) return fail(400, "The method is malformed.");
        if (target.empty()) return fail(400, "The request line has no target.");
        for (const char c : target)
            if (c <= ' ' || c > '~' || c == '#') return fail(400, "The target has a character that it must not have.");
        if (version.size() != 8 || !text::starts_with(version, "HTTP/") || !text::digit(version[5]) ||
            version[6] != '.' || !text::digit(version[7]))
            return fail(400, "The HTTP version is malformed.");
        // RFC 9110 2.5: a higher minor version is treated as the highest that is known.
        if (version[5] != '1') return fail(505, "This server speaks HTTP/1.1.");
        request_.http_1_0_ = version[7] == '0';
        request_.method_ = request_.part_of(method);
        request_.target_ = request_.part_of(target);
        return take_target(target);
    }

    // RFC 9112 3.2: origin-form, absolute-form ("A server MUST accept the absolute-form"), "*".
    bool take_target(std::string_view target) {
        std::string_view path = target;
        const std::size_t scheme = text::starts_with(text::lowered(target.substr(0, 7)), "http://")    ? 7
                                   : text::starts_with(text::lowered(target.substr(0, 8)), "https://") ? 8
                                                                                                       : 0;
        if (scheme != 0) {
            const std::size_t end = (std::min)(target.find_first_of("/?", scheme), target.size());
            const std::string_view authority = target.substr(scheme, end - scheme);
            if (!valid_host(authority)) return fail(400, "The host of the target is invalid.");
            request_.host_ = request_.part_of(authority);
            path = target.substr(end);
        } else if (target.front() != '/' && target != "*" && request_.method() != "CONNECT") {
            return fail(400, "The target does not begin with a slash.");
        }
        std::string_view query = path;
        path = text::cut_at(query, '?');
        if (!text::percent_decoded(path)) return fail(400, "The path has a malformed percent escape.");
        request_.path_ = request_.part_of(path);
        request_.query_ = request_.part_of(query);
        return true;
    }

    // What only the whole head can tell: Host and the length of a body.
    bool check_head() {
        const Fields fields = request_.fields();
        const std::size_t hosts = fields.count("host");
        if (hosts > 1 || (hosts == 0 && !request_.http_1_0_))
            return fail(400, hosts == 0 ? "There is no Host header." : "There is more than one Host header.");
        const std::string_view host = fields.find("host").value_or(std::string_view());
        if (hosts == 1 && !valid_host(host)) return fail(400, "The Host header is invalid.");
        if (request_.host_.size == 0 && hosts == 1) request_.host_ = request_.part_of(host);
        return check_body(fields);
    }

    // RFC 9112 6.1-6.3, read so that no two servers in a row can disagree where the request ends.
    bool check_body(const Fields& fields) {
        const std::size_t lengths = fields.count("content-length"), codings = fields.count("transfer-encoding");
        if (lengths > 0 && codings > 0) return fail(400, "Content-Length stands beside Transfer-Encoding.");
        if (lengths > 1) return fail(400, "There is more than one Content-Length.");
        if (codings > 1) return fail(400, "There is more than one Transfer-Encoding.");
        if (lengths == 1) {
            const auto length = text::unsigned_number(*fields.find("content-length"), INT64_MAX);
            if (!length) return fail(400, "Content-Length is not a number.");
            request_.has_body_ = *length != 0;
        }
        if (codings == 1) {
            if (request_.http_1_0_) return fail(400, "Transfer-Encoding stands in an HTTP/1.0 request.");
            if (!text::same_ignoring_case(*fields.find("transfer-encoding"), "chunked"))
                return fail(501, "The transfer coding is not implemented.");
            request_.has_body_ = true;
        }
        return true;
    }

    const Limits* limits_;
    Request request_;
    std::size_t line_begin_ = 0;
    std::size_t field_count_ = 0;
    bool skipped_empty_line_ = false;
    int status_ = 0;
    std::string reason_;
};

inline std::string_view reason_phrase(int status) {
    switch (status) {
        case 200: return "OK";
        case 204: return "No Content";
        case 301: return "Moved Permanently";
        case 302: return "Found";
        case 303: return "See Other";
        case 304: return "Not Modified";
        case 307: return "Temporary Redirect";
        case 308: return "Permanent Redirect";
        case 400: return "Bad Request";
        case 401: return "Unauthorized";
        case 403: return "Forbidden";
        case 404: return "Not Found";
        case 405: return "Method Not Allowed";
        case 408: return "Request Timeout";
        case 409: return "Conflict";
        case 413: return "Content Too Large";
        case 414: return "URI Too Long";
        case 421: return "Misdirected Request";
        case 426: return "Upgrade Required";
        case 429: return "Too Many Requests";
        case 431: return "Request Header Fields Too Large";
        case 500: return "Internal Server Error";
        case 501: return "Not Implemented";
        case 503: return "Service Unavailable";
        case 505: return "HTTP Version Not Supported";
        default:
            return status < 300   ? "Success"
                   : status < 400 ? "Redirection"
                   : status < 500 ? "Client Error"
                                  : "Server Error";
    }
}

}  // namespace detail

// An answer to a request. Statuses are 200-599. Content-Length, Connection and Date are the server's to add.
class Response {
public:
    explicit Response(int status, std::string body = {}, std::string_view type = "text/plain; charset=utf-8")
        : status_(status), body_(std::move(body)) {
        if (status < 200 || status > 599)
            throw Error("Response: status " + std::to_string(status) + " is not in 200-599");
        if (!body_.empty()) set_header("Content-Type", type);
    }
    static Response html(std::string body) { return Response(200, std::move(body), "text/html; charset=utf-8"); }
    static Response json(const Json& body, int status = 200) {
        return Response(status, body.dump(), "application/json");
    }
    static Response redirect(std::string_view location, int status = 302) {
        return std::move(Response(status).set_header("Location", location));
    }

    // Adds a header, in place of one of the same name. CR, LF, NUL and other control characters are an Error: what a
    // peer sent can not split an answer.
    Response& set_header(std::string_view name, std::string_view value) {
        if (text::same_ignoring_case(name, "content-length") || text::same_ignoring_case(name, "transfer-encoding"))
            throw Error("Response::set_header: " + std::string(name) + " is the server's to set");
        if (detail::field_line_error(std::string(name) + ": " + std::string(value)) != nullptr || !text::token(name))
            throw Error("Response::set_header: \"" + escape_for_log(name) + ": " + escape_for_log(value) +
                        "\" is not a header field");
        const auto same = [&](const auto& header) { return text::same_ignoring_case(header.first, name); };
        // Set-Cookie is the one field that repeats (RFC 9110 5.3).
        if (!text::same_ignoring_case(name, "set-cookie"))
            headers_.erase(std::remove_if(headers_.begin(), headers_.end(), same), headers_.end());
        headers_.emplace_back(name, value);
        return *this;
    }

    int status() const { return status_; }
    const std::string& body() const { return body_; }
    const std::vector<std::pair<std::string, std::string>>& headers() const { return headers_; }

private:
    int status_;
    std::string body_;
    std::vector<std::pair<std::string, std::string>> headers_;
};

namespace detail {

// RFC 6455 4.2.2 / 5.4: the proof that the server has read the key.
inline std::string accept_key(std::string_view key) {
    const auto digest = sha1(std::string(key) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    return base64(digest.data(), digest.size());
}

// 16 bytes in base64: 22 characters of the alphabet and two of padding.
inline bool valid_key(std::string_view key) {
    const auto in_alphabet = [](char c) { return text::alphanumeric(c) || c == '+' || c == '/'; };
    return key.size() == 24 && key.substr(22) == "==" && std::all_of(key.begin(), key.begin() + 22, in_alphabet);
}

// Whether the client asks to leave HTTP for WebSocket at all (RFC 6455 4.2.1 / 3-4).
inline bool wants_upgrade(const Request& request) {
    return request.fields().has_element("upgrade", "websocket") &&
           request.fields().has_element("connection", "upgrade");
}

inline Response upgrade_required(std::string sentence) {
    return std::move(Response(426, std::move(sentence))
                         .set_header("Upgrade", "websocket")
                         .set_header("Connection", "Upgrade")
                         .set_header("Sec-WebSocket-Version", "13"));
}

// RFC 6455 4.2.1: the refusal of a request that wants an upgrade and may not have it, or nothing.
WSCHAT_COLD inline std::optional<Response> refuse_upgrade(const Request& request) {
    const Fields fields = request.fields();
    if (request.method() != "GET") {
        Response refusal(405, "A WebSocket handshake is a GET request.\n");
        refusal.set_header("Allow", "GET");
        return refusal;
    }
    if (request.http_1_0()) return Response(505, "A WebSocket handshake needs HTTP/1.1.\n");
    if (request.has_body()) return Response(400, "A WebSocket handshake has no body.\n");
    if (fields.count("sec-websocket-version") != 1 || *fields.find("sec-websocket-version") != "13")
        return upgrade_required("This server speaks WebSocket version 13.\n");
    if (fields.count("sec-websocket-key") != 1) return Response(400, "There must be one Sec-WebSocket-Key.\n");
    if (!valid_key(*fields.find("sec-websocket-key")))
        return Response(400, "Sec-WebSocket-Key is not 16 bytes in base64.\n");
    bool tokens = true;
    fields.each_element("sec-websocket-protocol", [&](std::string_view name) { tokens = tokens && text::token(name); });
    if (!tokens) return Response(400, "Sec-WebSocket-Protocol is not a list of tokens.\n");
    return std::nullopt;
}

// The subprotocols that a client offers, in its order of preference.
inline std::vector<std::string_view> offered_subprotocols(const Request& request) {
    std::vector<std::string_view> offered;
    request.fields().each_element("sec-websocket-protocol", [&](std::string_view name) { offered.push_back(name); });
    return offered;
}

// What is put into a handshake begins no other line.
inline void require_one_line(const char* call, std::string_view value) {
    for (const char c : value)
        if ((static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7F)
            throw Error(std::string(call) + ": \"" + escape_for_log(value) + "\" has a control character");
}

// The 101 (RFC 6455 4.2.2 / 5).
inline std::string switching_protocols(std::string_view key, std::string_view subprotocol,
                                       std::string_view extensions = {}) {
    for (const std::string_view value : {subprotocol, extensions}) require_one_line("switching_protocols", value);
    std::string head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    ((head += "Sec-WebSocket-Accept: ") += accept_key(key)) += "\r\n";
    if (!subprotocol.empty()) ((head += "Sec-WebSocket-Protocol: ") += subprotocol) += "\r\n";
    if (!extensions.empty()) ((head += "Sec-WebSocket-Extensions: ") += extensions) += "\r\n";
    return head += "\r\n";
}

// A client's opening handshake (RFC 6455 4.1). `key`: 16 random bytes in base64.
inline std::string opening_request(std::string_view host, std::string_view target, std::string_view key,
                                   std::string_view subprotocols = {}, std::string_view extensions = {}) {
    for (const std::string_view value : {host, target, key, subprotocols, extensions})
        require_one_line("opening_request", value);
    if (target.find(' ') != std::string_view::npos) throw Error("opening_request: the target has a space");
    std::string head = "GET ";
    ((head += target) += " HTTP/1.1\r\nHost: ") += host;
    (head += "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ") +=
        key;
    if (!subprotocols.empty()) (head += "\r\nSec-WebSocket-Protocol: ") += subprotocols;
    if (!extensions.empty()) (head += "\r\nSec-WebSocket-Extensions: ") += extensions;
    return head += "\r\n\r\n";
}

// Why a client must not take the server's answer for a handshake (RFC 6455 4.1, the numbered list at its end); empty
// may. `head` ends with the empty line. Where an extension was offered, what was chosen is for section 6 to judge.
inline std::string opening_answer_error(std::string_view head, std::string_view key, std::string_view subprotocols = {},
                                        bool extension_offered = false) {
    std::string_view rest = head;
    const std::string_view status_line = text::cut_at(rest, '\n');
    const std::string_view status = status_line.substr(0, status_line.find_first_of(" \r", 9));
    if (status != "HTTP/1.1 101")
        return "the server answered \"" + escape_for_log(text::trimmed(status_line.substr(0, status_line.find('\r')))) +
               "\"";
    const Fields fields(rest);
    if (!fields.has_element("upgrade", "websocket")) return "the answer has no Upgrade: websocket";
    if (!fields.has_element("connection", "upgrade")) return "the answer has no Connection: Upgrade";
    if (fields.count("sec-websocket-accept") != 1 || *fields.find("sec-websocket-accept") != accept_key(key))
        return "Sec-WebSocket-Accept does not match the key";
    if (!extension_offered && fields.count("sec-websocket-extensions") != 0)
        return "the server chose an extension that was not offered";
    if (const auto chosen = fields.find("sec-websocket-protocol")) {
        bool offered = false;
        while (!subprotocols.empty() && !offered) offered = text::trimmed(text::cut_at(subprotocols, ',')) == *chosen;
        if (!offered || fields.count("sec-websocket-protocol") != 1)
            return "the server chose a subprotocol that was not offered";
    }
    return {};
}

// RFC 6454 7: an origin as "https://chat.example:8443", scheme and host in lower case and the scheme's own port left
// out; nothing for "null" and whatever else is not a web origin.
inline std::optional<std::string> normalized_origin(std::string_view origin) {
    std::string normal = text::lowered(origin);
    const std::string_view default_port = text::starts_with(normal, "https://")  ? ":443"
                                          : text::starts_with(normal, "http://") ? ":80"
                                                                                 : "";
    if (default_port.empty()) return std::nullopt;
    if (!valid_host(std::string_view(normal).substr(normal.find("//") + 2))) return std::nullopt;
    if (normal.size() > default_port.size() && normal.substr(normal.size() - default_port.size()) == default_port)
        normal.resize(normal.size() - default_port.size());
    return normal;
}

// Whether a page of that origin lies on the host that it connects to, as the Host header names it. The scheme is not
// compared: a proxy in front may speak TLS for a server that does not.
inline bool same_host(std::string_view origin, std::string_view host) {
    const auto normal = normalized_origin(origin);
    if (!normal) return false;
    const std::string scheme = normal->substr(0, normal->find("//") + 2);
    return normal == normalized_origin(scheme + std::string(host));
}

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 6: Compression
//
// permessage-deflate (RFC 7692): the negotiation, and DEFLATE for the payloads of messages. Knows nothing of frames.
// Without WSCHAT_ZLIB only the declarations that later sections need remain.
// ====================================================================================================================

#if WSCHAT_ZLIB
#include <zlib.h>
#endif

WSCHAT_BEGIN

namespace detail {

constexpr bool compression_available = WSCHAT_ZLIB != 0;

}  // namespace detail

// The result of WebSocketHandler::get_compression_options(), and what a client offers. By default a connection needs
// less than 100 bytes for compression: each message is compressed by itself, all connections of a loop share one
// compressor, and a broadcast is compressed once.
//
// With context takeover a message can refer back to earlier messages. Small messages that resemble one another become
// much smaller. The cost is memory for each connection, from its first compressed message until its end:
//
//   server_context_takeover    a compressor of 2^(window bits + 2) + 2^(memory level + 9) bytes and 6 KiB: 262 KiB for
//                              15 and 8, 22 KiB for 11 and 4. Each such member compresses each broadcast again.
//   client_context_takeover    a decompressor of 2^(window bits) bytes and 7 KiB: 39 KiB for 15, 9 KiB for 11
//
// Do not compress a secret together with data that an attacker controls, in one message or in one context: the
// compressed size then reveals the secret (CRIME, BREACH).
struct CompressionOptions {
    int level = 6;         // 1 (fastest) to 9 (smallest)
    int memory_level = 8;  // 1 to 9: a higher level is faster and compresses slightly better
    // log2 of the window of each sender: 8 to 15 for 256 bytes to 32 KiB. The peer can ask for less. A server limits
    // only clients that offer client_max_window_bits (RFC 7692 7.1.2.2).
    int server_max_window_bits = 15;
    int client_max_window_bits = 15;
    bool server_context_takeover = false;
    bool client_context_takeover = false;
    std::size_t threshold = 1024;  // bytes; smaller messages are not compressed: they fit into one packet already
};

namespace detail {

// The compression of one connection.
class Compression {
public:
    enum class Outcome : std::uint8_t {
        output_full,  // the output buffer is full; there may be more output
        done,         // all input is inflated
        corrupt       // the input is not a DEFLATE stream, or the message ends within a block
    };

    Compression(const Compression&) = delete;
    Compression& operator=(const Compression&) = delete;
    virtual ~Compression() = default;

    // ---- input -----------------------------------------------------------------------------------------------------

    void begin_message() {
        compressed_size_ = 0;
        message_started_ = false;
    }
    // Adds a frame to the size of the message. Returns false if no message within the limit can need so many bytes:
    // fixed codes take at most nine bits a byte, and the end of each block takes some more. This stops endless input
    // that inflates to nothing.
    bool compressed_size_allowed(std::uint64_t frame_size, std::uint64_t max_message) {
        compressed_size_ += frame_size;
        return compressed_size_ <= max_message || compressed_size_ - max_message <= max_message / 8 + 64 * 1024;
    }
    // Sets the next part of a message. The bytes must stay valid until inflate() returns `done`.
    virtual void set_input(std::string_view compressed, bool last) = 0;
    virtual Outcome inflate(char* out, std::size_t capacity, std::size_t& size) = 0;
    // Bytes that an unfinished message holds here. A finished message holds none.
    virtual std::size_t buffered_input() const = 0;
    // Bytes of output since the connection last set this to 0.
    std::size_t inflated_bytes = 0;

    // ---- output ----------------------------------------------------------------------------------------------------

    bool should_compress(std::size_t size) const { return size >= threshold_ && size != 0; }
    // The compressed payload, in `block`. Empty if it is not smaller than the payload.
    virtual std::string_view deflate(std::string_view payload, Bytes& block) = 0;
    // Connections with the same key compress a message to the same bytes. Null with context takeover.
    const void* sharing_key() const { return sharing_key_; }

protected:
    Compression(std::size_t threshold, const void* sharing_key) : threshold_(threshold), sharing_key_(sharing_key) {}

    bool message_started_ = false;

private:
    std::size_t threshold_;
    const void* sharing_key_;
    std::uint64_t compressed_size_ = 0;  // the sum of the message's frame lengths
};

// The result of a server's negotiation. Both members are empty if it declines all offers.
struct AcceptedCompression {
    std::unique_ptr<Compression> compression;
    std::string response;
};

#if WSCHAT_ZLIB

// ---- DEFLATE -------------------------------------------------------------------------------------------------------

// A stream that uses the program's allocator.
inline z_stream make_zlib_stream() {
    z_stream stream{};
    stream.zalloc = [](void*, unsigned count, unsigned size) {
        return ::operator new(static_cast<std::size_t>(count) * size, std::nothrow);
    };
    stream.zfree = [](void*, void* block) { ::operator delete(block); };
    return stream;
}

constexpr std::size_t max_zlib_size = std::size_t{1} << 30;  // zlib counts in unsigned int

class Deflater {
public:
    // Levels 1 to 9, window bits 8 to 15. zlib cannot make a raw stream with 8 window bits. With 9 it refers back 250
    // bytes at most (the window less its lookahead of 262), which is valid for 8 too.
    Deflater(int level, int memory_level, int window_bits) {
        const int bits = (std::max)(window_bits, 9);
        if (deflateInit2(&stream_, level, Z_DEFLATED, -bits, memory_level, Z_DEFAULT_STRATEGY) != Z_OK)
            throw std::bad_alloc();
    }
    Deflater(const Deflater&) = delete;
    Deflater& operator=(const Deflater&) = delete;
    ~Deflater() { deflateEnd(&stream_); }

    // RFC 7692 7.2.1: compresses up to an empty stored block without its last four bytes. Appends to the block. Without
    // context takeover the result is empty if it is not smaller than the payload.
    std::string_view deflate(std::string_view payload, Bytes& block, bool context_takeover) {
        if (payload.empty()) return {};
        // Resets before the message and not after it, because an exception can leave the last message unfinished.
        if (!context_takeover) deflateReset(&stream_);
        const std::size_t begin = block.size();
        const std::size_t limit = context_takeover ? static_cast<std::size_t>(-1) : payload.size();
        for (std::string_view rest = payload; !rest.empty();) {
            const std::string_view part = rest.substr(0, max_zlib_size);
            rest.remove_prefix(part.size());
            stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(part.data()));
            stream_.avail_in = static_cast<uInt>(part.size());
            do deflate_some(block, rest.empty() ? Z_SYNC_FLUSH : Z_NO_FLUSH);
            while (stream_.avail_out == 0 && block.size() - begin - tail_size < limit);
        }
        const std::size_t size = block.size() - begin - tail_size;
        return size < limit ? std::string_view(block.data() + begin, size) : std::string_view();
    }

private:
    static constexpr std::size_t tail_size = 4;

    void deflate_some(Bytes& block, int flush) {
        block.reserve(64);  // more than a flush writes at once
        const auto available = static_cast<uInt>((std::min)(block.room(), max_zlib_size));
        stream_.next_out = reinterpret_cast<Bytef*>(block.end());
        stream_.avail_out = available;
        ::deflate(&stream_, flush);
        block.advance(available - stream_.avail_out);
    }

    z_stream stream_ = make_zlib_stream();
};

// Inflates messages that arrive in parts of any size.
class Inflater {
public:
    explicit Inflater(int window_bits) : window_bits_(window_bits) {
        if (inflateInit2(&stream_, -window_bits) != Z_OK) throw std::bad_alloc();
    }
    Inflater(const Inflater&) = delete;
    Inflater& operator=(const Inflater&) = delete;
    ~Inflater() { inflateEnd(&stream_); }

    void begin_message() { has_input_ = tail_appended_ = stream_ended_ = false; }
    void set_input(std::string_view compressed, bool last) {
        input_ = compressed;
        last_ = last;
        has_input_ = has_input_ || !compressed.empty();
    }
    Compression::Outcome inflate(char* out, std::size_t capacity, std::size_t& size) {
        for (size = 0;;) {
            if (stream_.avail_in == 0 && !output_pending_ && !refill()) return outcome_at_end();
            if (size == capacity) return Compression::Outcome::output_full;
            const auto available = static_cast<uInt>((std::min)(capacity - size, max_zlib_size));
            stream_.next_out = reinterpret_cast<Bytef*>(out + size);
            stream_.avail_out = available;
            const int result = ::inflate(&stream_, Z_SYNC_FLUSH);
            size += available - stream_.avail_out;
            if (result == Z_MEM_ERROR) throw std::bad_alloc();
            stream_ended_ = result == Z_STREAM_END;
            // RFC 7692 7.2.3.4: more blocks can follow a block with BFINAL set. They use the same window.
            if (stream_ended_) inflateResetKeep(&stream_);
            else if (result != Z_OK && result != Z_BUF_ERROR) return Compression::Outcome::corrupt;
            output_pending_ = stream_.avail_out == 0 && !stream_ended_ && !between_blocks();
        }
    }
    // Clears the window.
    void reset() {
        inflateReset(&stream_);
        stream_.avail_in = 0;
        output_pending_ = false;
    }
    // The approximate memory of zlib after the first output.
    std::size_t memory_usage() const { return (std::size_t{1} << window_bits_) + 8 * 1024; }

private:
    // RFC 7692 7.2.2: "Append 4 octets of 0x00 0x00 0xff 0xff to the tail end of the payload of the message." Some
    // senders also omit the octet before them, after a final block or for an empty message. That is accepted.
    bool refill() {
        static constexpr char tail[] = {0x00, 0x00, '\xff', '\xff'};
        if (input_.empty() && last_ && has_input_ && !stream_ended_ && !tail_appended_) {
            tail_appended_ = true;
            input_ = {tail, sizeof tail};
        }
        const std::string_view part = input_.substr(0, max_zlib_size);
        input_.remove_prefix(part.size());
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(part.data()));
        stream_.avail_in = static_cast<uInt>(part.size());
        return !part.empty();
    }
    Compression::Outcome outcome_at_end() const {
        const bool complete = !last_ || !has_input_ || stream_ended_ || between_blocks();
        return complete ? Compression::Outcome::done : Compression::Outcome::corrupt;
    }
    // zlib.h, inflate(): data_type is the number of unused bits in the last byte, "plus 128 if inflate() returned
    // immediately after decoding an end-of-block code".
    bool between_blocks() const { return (stream_.data_type & 128) != 0 && (stream_.data_type & 63) == 0; }

    z_stream stream_ = make_zlib_stream();
    std::string_view input_;  // not passed to zlib yet
    int window_bits_;
    bool last_ = false;
    bool has_input_ = false;
    bool tail_appended_ = false;
    bool stream_ended_ = false;    // the last block was a final one
    bool output_pending_ = false;  // zlib has output that did not fit
};

// ---- negotiation ---------------------------------------------------------------------------------------------------

// Reads one Sec-WebSocket-Extensions field (RFC 6455 9.1): next() for an extension, parameter() until it returns false,
// then next() again. Both return false if the field is malformed.
class ExtensionReader {
public:
    explicit ExtensionReader(std::string_view field) : rest_(text::trimmed(field)) {}

    bool next(std::string_view& name) {
        while (skip(',')) continue;  // RFC 9110 5.6.1: a recipient ignores empty list elements
        return !rest_.empty() && read_token(name);
    }
    bool parameter(std::string_view& name, std::optional<std::string>& value) {
        value.reset();
        if (!skip(';')) return rest_.empty() || rest_.front() == ',' ? false : fail();
        return read_token(name) && (!skip('=') || read_value(value));
    }
    bool well_formed() const { return well_formed_; }

private:
    bool fail() {
        rest_ = {};
        return well_formed_ = false;
    }
    void skip_space() { rest_.remove_prefix((std::min)(rest_.find_first_not_of(" \t"), rest_.size())); }
    bool skip(char c) {
        if (rest_.empty() || rest_.front() != c) return false;
        rest_.remove_prefix(1);
        skip_space();
        return true;
    }
    bool read_token(std::string_view& token) {
        const auto end = std::find_if_not(rest_.begin(), rest_.end(), text::token_char);
        token = rest_.substr(0, static_cast<std::size_t>(end - rest_.begin()));
        rest_.remove_prefix(token.size());
        skip_space();
        return !token.empty() || fail();
    }
    // RFC 6455 9.1: a token, or a quoted string whose value is a token.
    bool read_value(std::optional<std::string>& value) {
        if (rest_.empty() || rest_.front() != '"') {
            std::string_view plain;
            if (!read_token(plain)) return false;
            value = plain;
            return true;
        }
        value.emplace();
        rest_.remove_prefix(1);
        while (!rest_.empty() && rest_.front() != '"') {
            if (rest_.front() == '\\') rest_.remove_prefix(1);
            if (rest_.empty()) break;
            *value += rest_.front();
            rest_.remove_prefix(1);
        }
        return (skip('"') && text::token(*value)) || fail();
    }

    std::string_view rest_;
    bool well_formed_ = true;
};

// How one side of a connection compresses.
struct DeflateDirection {
    bool context_takeover;
    int window_bits;
};

// The parameters of permessage-deflate (RFC 7692 7.1) in an offer or in a response.
struct DeflateParameters {
    enum class Kind : std::uint8_t { offer, response };

    bool server_no_context_takeover = false;
    bool client_no_context_takeover = false;
    std::optional<int> server_max_window_bits;
    std::optional<int> client_max_window_bits;

    DeflateDirection from_server() const { return {!server_no_context_takeover, server_max_window_bits.value_or(15)}; }
    DeflateDirection from_client() const { return {!client_no_context_takeover, client_max_window_bits.value_or(15)}; }

    // Returns nothing if a parameter is unknown, repeated or has an illegal value.
    static std::optional<DeflateParameters> read(ExtensionReader& reader, Kind kind) {
        DeflateParameters parameters;
        bool valid = true;
        std::string_view name;
        for (std::optional<std::string> value; reader.parameter(name, value);)
            valid = parameters.set(name, value, kind) && valid;
        if (!valid || !reader.well_formed()) return std::nullopt;
        return parameters;
    }

    std::string to_string(Kind kind) const {
        std::string text = "permessage-deflate";
        if (server_no_context_takeover) text += "; server_no_context_takeover";
        if (client_no_context_takeover) text += "; client_no_context_takeover";
        if (server_max_window_bits) text += "; server_max_window_bits=" + std::to_string(*server_max_window_bits);
        if (client_max_window_bits) text += "; client_max_window_bits";
        if (client_max_window_bits && (kind == Kind::response || *client_max_window_bits < 15))
            text += "=" + std::to_string(*client_max_window_bits);
        return text;
    }

private:
    bool set(std::string_view name, const std::optional<std::string>& value, Kind kind) {
        if (name == "server_no_context_takeover") return set_flag(server_no_context_takeover, value);
        if (name == "client_no_context_takeover") return set_flag(client_no_context_takeover, value);
        if (name == "server_max_window_bits") return set_bits(server_max_window_bits, value);
        if (name != "client_max_window_bits") return false;
        // 7.1.2.2: without a value in an offer, the client accepts any limit.
        return set_bits(client_max_window_bits, value || kind == Kind::response ? value : "15");
    }
    static bool set_flag(bool& flag, const std::optional<std::string>& value) {
        return !std::exchange(flag, true) && !value;
    }
    // 7.1.2.1: "a decimal integer value without leading zeroes between 8 to 15".
    static bool set_bits(std::optional<int>& bits, const std::optional<std::string>& value) {
        const auto number = value && value->front() != '0' ? text::unsigned_number(*value, 15) : std::nullopt;
        if (bits || !number || *number < 8) return false;
        bits = static_cast<int>(*number);
        return true;
    }
};

// What the connections of a loop share: one compressor for each set of parameters, and a few decompressors. Must
// outlive the connections.
class CompressionPool {
public:
    CompressionPool() { idle_inflaters_.reserve(max_idle); }
    CompressionPool(const CompressionPool&) = delete;
    CompressionPool& operator=(const CompressionPool&) = delete;

    // For a server: accepts the first offer that the options allow. Throws Error on illegal options.
    AcceptedCompression accept(const Fields& fields, const CompressionOptions& options);

    // For a client: its offer, and then the server's response. Returns null if the server declined. Sets `error` if the
    // response does not match the offer; the connection must fail then (RFC 7692 7.1).
    static std::string offer(const CompressionOptions& options) {
        return parameters_of(options).to_string(DeflateParameters::Kind::offer);
    }
    std::unique_ptr<Compression> read_response(const Fields& fields, const CompressionOptions& options,
                                               std::string& error);

    // ---- for the connections ---------------------------------------------------------------------------------------

    struct SharedDeflater {
        int level, memory_level, window_bits;
        std::unique_ptr<Deflater> deflater;  // created for the first message
    };
    SharedDeflater& shared_deflater(const CompressionOptions& options, int window_bits) {
        for (const auto& shared : shared_deflaters_)
            if (shared->level == options.level && shared->memory_level == options.memory_level &&
                shared->window_bits == window_bits)
                return *shared;
        shared_deflaters_.push_back(std::make_unique<SharedDeflater>(
            SharedDeflater{options.level, options.memory_level, window_bits, nullptr}));
        return *shared_deflaters_.back();
    }

    // An inflater with the largest window, which is valid for every peer.
    std::unique_ptr<Inflater> acquire_inflater() {
        if (idle_inflaters_.empty()) return std::make_unique<Inflater>(15);
        std::unique_ptr<Inflater> inflater = std::move(idle_inflaters_.back());
        idle_inflaters_.pop_back();
        return inflater;
    }
    void release_inflater(std::unique_ptr<Inflater> inflater) {
        inflater->reset();
        if (idle_inflaters_.size() < max_idle) idle_inflaters_.push_back(std::move(inflater));
    }

private:
    static constexpr std::size_t max_idle = 4;

    static void check_options(const CompressionOptions& options) {
        const auto check_range = [](const char* name, int value, int min, int max) {
            if (value < min || value > max)
                throw Error(std::string("CompressionOptions: ") + name + " " + std::to_string(value) + " is not in " +
                            std::to_string(min) + "-" + std::to_string(max));
        };
        check_range("level", options.level, 1, 9);
        check_range("memory_level", options.memory_level, 1, 9);
        check_range("server_max_window_bits", options.server_max_window_bits, 8, 15);
        check_range("client_max_window_bits", options.client_max_window_bits, 8, 15);
    }
    // A client's offer, and a server's response to an offer without parameters.
    static DeflateParameters parameters_of(const CompressionOptions& options) {
        check_options(options);
        DeflateParameters parameters;
        parameters.server_no_context_takeover = !options.server_context_takeover;
        parameters.client_no_context_takeover = !options.client_context_takeover;
        if (options.server_max_window_bits < 15) parameters.server_max_window_bits = options.server_max_window_bits;
        parameters.client_max_window_bits = options.client_max_window_bits;
        return parameters;
    }
    // RFC 7692 7.1.
    static DeflateParameters response_to(const DeflateParameters& offer, const CompressionOptions& options) {
        DeflateParameters response = parameters_of(options);
        if (offer.server_no_context_takeover) response.server_no_context_takeover = true;
        if (offer.client_no_context_takeover) response.client_no_context_takeover = true;
        if (offer.server_max_window_bits)
            response.server_max_window_bits = (std::min)(options.server_max_window_bits, *offer.server_max_window_bits);
        // 7.1.2.2: without client_max_window_bits in the offer, the response "MUST NOT" have it.
        const int client_bits = (std::min)(options.client_max_window_bits, offer.client_max_window_bits.value_or(15));
        response.client_max_window_bits.reset();
        if (offer.client_max_window_bits && client_bits < 15) response.client_max_window_bits = client_bits;
        return response;
    }

    std::vector<std::unique_ptr<SharedDeflater>> shared_deflaters_;
    std::vector<std::unique_ptr<Inflater>> idle_inflaters_;
};

// Owns a compressor or a decompressor only with context takeover, or while a message is unfinished.
class PerMessageDeflate final : public Compression {
public:
    PerMessageDeflate(CompressionPool& pool, const CompressionOptions& options, DeflateDirection sent,
                      DeflateDirection received)
        : Compression(options.threshold,
                      sent.context_takeover ? nullptr : &pool.shared_deflater(options, sent.window_bits)),
          pool_(pool),
          shared_(pool.shared_deflater(options, sent.window_bits)),
          sent_(sent),
          received_(received) {}

    void set_input(std::string_view compressed, bool last) override {
        if (!inflater_)
            inflater_ = received_.context_takeover ? std::make_unique<Inflater>(received_.window_bits)
                                                   : pool_.acquire_inflater();
        if (!std::exchange(message_started_, true)) inflater_->begin_message();
        inflater_->set_input(compressed, last);
        last_ = last;
    }
    Outcome inflate(char* out, std::size_t capacity, std::size_t& size) override {
        const Outcome outcome = inflater_->inflate(out, capacity, size);
        if (outcome == Outcome::done && last_ && !received_.context_takeover)
            pool_.release_inflater(std::move(inflater_));
        return outcome;
    }
    std::size_t buffered_input() const override {
        return inflater_ && !received_.context_takeover ? inflater_->memory_usage() : 0;
    }

    std::string_view deflate(std::string_view payload, Bytes& block) override {
        auto& deflater = sent_.context_takeover ? deflater_ : shared_.deflater;
        if (!deflater) deflater = std::make_unique<Deflater>(shared_.level, shared_.memory_level, shared_.window_bits);
        return deflater->deflate(payload, block, sent_.context_takeover);
    }

private:
    CompressionPool& pool_;
    CompressionPool::SharedDeflater& shared_;  // also has the parameters for deflater_
    std::unique_ptr<Deflater> deflater_;
    std::unique_ptr<Inflater> inflater_;
    DeflateDirection sent_, received_;
    bool last_ = false;
};

// Calls f(name, parameters) for each extension until it returns false. The parameters are empty if they are illegal for
// permessage-deflate. Returns false if a field is malformed.
template <class Function>
bool for_each_extension(const Fields& fields, DeflateParameters::Kind kind, Function&& f) {
    bool well_formed = true;
    fields.each([&](std::string_view field, std::string_view value) {
        if (!text::same_ignoring_case(field, "sec-websocket-extensions")) return true;
        ExtensionReader reader(value);
        for (std::string_view name; reader.next(name);)
            if (!f(name, DeflateParameters::read(reader, kind))) return false;
        well_formed = well_formed && reader.well_formed();
        return true;
    });
    return well_formed;
}

inline AcceptedCompression CompressionPool::accept(const Fields& fields, const CompressionOptions& options) {
    AcceptedCompression accepted;
    check_options(options);
    for_each_extension(fields, DeflateParameters::Kind::offer, [&](std::string_view name, const auto& offer) {
        if (name != "permessage-deflate" || !offer) return true;
        const DeflateParameters response = response_to(*offer, options);
        accepted.compression =
            std::make_unique<PerMessageDeflate>(*this, options, response.from_server(), response.from_client());
        accepted.response = response.to_string(DeflateParameters::Kind::response);
        return false;
    });
    return accepted;
}

inline std::unique_ptr<Compression> CompressionPool::read_response(const Fields& fields,
                                                                   const CompressionOptions& options,
                                                                   std::string& error) {
    const DeflateParameters offer = parameters_of(options);
    std::optional<DeflateParameters> response;
    std::size_t extensions = 0;
    const auto read = [&](std::string_view name, const std::optional<DeflateParameters>& parameters) {
        ++extensions;
        response = name == "permessage-deflate" ? parameters : std::nullopt;
        return true;
    };
    const bool well_formed = for_each_extension(fields, DeflateParameters::Kind::response, read);
    if (extensions == 0 && well_formed) return nullptr;
    if (extensions != 1 || !well_formed || !response)
        error = "the server's Sec-WebSocket-Extensions is not one valid response to permessage-deflate";
    else if (offer.server_no_context_takeover && !response->server_no_context_takeover)
        error = "the server did not accept server_no_context_takeover";
    else if (response->from_server().window_bits > offer.from_server().window_bits)
        error = "the server's server_max_window_bits is larger than the offer";
    else if (response->client_max_window_bits.value_or(0) > *offer.client_max_window_bits)
        error = "the server's client_max_window_bits is larger than the offer";
    if (!error.empty()) return nullptr;
    const DeflateDirection sent{options.client_context_takeover && !response->client_no_context_takeover,
                                response->client_max_window_bits.value_or(options.client_max_window_bits)};
    return std::make_unique<PerMessageDeflate>(*this, options, sent, response->from_server());
}

#else

class CompressionPool {
public:
    AcceptedCompression accept(const Fields&, const CompressionOptions&) { return {}; }
    static std::string offer(const CompressionOptions&) { return {}; }
    std::unique_ptr<Compression> read_response(const Fields&, const CompressionOptions&, std::string&) {
        return nullptr;
    }
};

#endif

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 7: Protocol
//
// Connection: RFC 6455 after the opening handshake, as a state machine. Bytes go in, events and bytes come out, and the
// time is an argument. Knows nothing of sockets, clocks or handlers.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

struct Event {
    enum class Kind : std::uint8_t { none, message, ping, pong, close };

    Kind kind = Kind::none;
    Message message{std::string_view()};  // of a message, a ping or a pong; valid until the next call of next_event()
};

// A connection ends in one function, set_closed(). It is called by fail() with a Close frame, by abort() without one,
// and when the peer's Close frame arrives. After that, next_event() returns the close event once.
class Connection {
public:
    // closing: our Close frame is queued and the peer's has not arrived. closed: input is ignored, but queued output is
    // still sent. Only an open connection accepts messages to send.
    enum class State : std::uint8_t { connecting, open, closing, closed };

    // Makes a client's mask keys, which must be unpredictable (RFC 6455 10.3).
    using MaskSource = MaskKey (*)();

    Connection() = default;
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;

    // Called after the opening handshake. `limits` and `arena` must outlive the connection. A client needs a mask
    // source. `compression` is null if none was negotiated.
    void open(Role role, const Limits& limits, SendArena& arena, Time now, MaskSource mask_source = nullptr,
              std::unique_ptr<Compression> compression = nullptr) {
        if (role == Role::client && mask_source == nullptr)
            throw Error("Connection::open: a client needs a mask source");
        parser_ = FrameParser(role, compression != nullptr);
        limits_ = &limits;
        arena_ = &arena;
        mask_source_ = role == Role::client ? mask_source : nullptr;
        compression_ = std::move(compression);
        state_ = State::open;
        last_activity_ = now;
    }

    const Limits& limits() const { return *limits_; }
    State state() const { return state_; }
    bool is_open() const { return state_ == State::open; }
    CloseCode close_code() const { return close_code_; }
    const std::string& close_reason() const { return close_reason_; }
    CloseCause close_cause() const { return cause_; }
    // Closed by abort(): the caller drops the transport at once.
    bool aborted() const { return state_ == State::closed && close_code_ == CloseCode::abnormal; }

    // ---- input -----------------------------------------------------------------------------------------------------

    // Bytes from the peer. They are unmasked in place, and must stay valid until next_event() returns `none` or
    // pause_input() is called. Bytes in receive_buffer() are not copied.
    void receive(char* data, std::size_t size, Time now) {
        if (cold_) cold_->resumed_input.release();
        if (compression_available && compression_) compression_->inflated_bytes = 0;
        input_ = data;
        input_end_ = data + size;
        record_activity(now);
    }

    // The buffer for the next bytes of a large frame, which is the end of its message. Returns {null, 0} if the
    // transport should use its own buffer. The buffer grows with the received bytes, not with the announced length.
    std::pair<char*, std::size_t> receive_buffer() {
        if (!in_payload_ || is_control(frame_.opcode) || frame_left_ < direct_read_size ||
            message_.size() < direct_read_size || inflating_)
            return {nullptr, 0};
        const std::uint64_t wanted = std::min<std::uint64_t>(frame_left_, message_.size());
        if (message_.room() < direct_read_size) message_.reserve(static_cast<std::size_t>(wanted));
        return {message_.end(), static_cast<std::size_t>(std::min<std::uint64_t>(frame_left_, message_.room()))};
    }

    // The transport has ended, by a FIN or by an error. The reason says which.
    void receive_eof(std::string_view reason) { abort(CloseCause::connection_lost, reason); }

    // Returns the next event, or `none` if more bytes are needed. The close event is the last one and occurs once.
    Event next_event() {
        if (message_delivered_) {
            arena_->give_back(std::move(message_));
            message_delivered_ = false;
        }
        while (state_ == State::open || state_ == State::closing) {
            if (!in_payload_ && !read_header()) break;
            if (!in_payload_) continue;
            const bool whole = frame_left_ <= static_cast<std::uint64_t>(input_end_ - input_);
            if (!whole && input_ == input_end_) break;
            const Event event = is_control(frame_.opcode) ? read_control() : read_data(whole);
            if (event.kind != Event::Kind::none) return event;
        }
        if (state_ != State::closed || close_reported_) return {};
        close_reported_ = true;
        message_.release();
        return {Event::Kind::close, Message(std::string_view())};
    }

    // Stores the rest of the input until resume_input(). The caller must not call receive() in between.
    void pause_input() {
        if (input_ == input_end_) return;
        Bytes rest;
        rest.append(input_, static_cast<std::size_t>(input_end_ - input_));
        cold().paused_input = std::move(rest);
        input_ = input_end_ = nullptr;
    }
    void resume_input() {
        if (compression_available && compression_) compression_->inflated_bytes = 0;
        if (!cold_ || cold_->paused_input.empty()) return;
        std::swap(cold_->resumed_input, cold_->paused_input);
        cold_->paused_input.release();
        input_ = cold_->resumed_input.data();
        input_end_ = cold_->resumed_input.end();
    }

    // Whether so much was inflated since receive() or resume_input() that other connections should run first. The
    // caller pauses the input then. One byte can inflate to a thousand.
    bool inflate_budget_spent() const {
        return compression_available && compression_ && compression_->inflated_bytes > inflate_budget;
    }

    // Bytes of an unfinished message and of paused input.
    std::size_t buffered_input() const {
        const std::size_t size = message_.capacity() + (cold_ ? cold_->paused_input.capacity() : 0);
        return compression_available && compression_ ? size + compression_->buffered_input() : size;
    }

    // ---- output ----------------------------------------------------------------------------------------------------

    SendQueue& output() { return output_; }
    const SendQueue& output() const { return output_; }

    // Whether a message of this size exceeds Limits::max_backlog. An empty queue accepts one message of any size.
    bool exceeds_backlog(std::size_t size) const {
        return !output_.empty() && output_.size() + size > limits_->max_backlog;
    }

    WriteStatus send(Opcode opcode, std::string_view payload) {
        if (!can_send(frame_size(payload.size()))) return reject_write();
        return enqueue(should_compress(payload.size()) ? compressed_frame(opcode, payload) : frame(opcode, payload));
    }
    // The same, but a server passes a large message to the transport without a copy while the queue is empty:
    // `offer(pieces, count)` returns how many bytes the transport takes. Only the rest is copied.
    template <class Offer>
    WriteStatus send(Opcode opcode, std::string_view payload, Offer&& offer) {
        if (payload.size() < direct_send_size || mask_source_ != nullptr || !output_.empty() || write_blocked_ ||
            state_ != State::open || should_compress(payload.size()))
            return send(opcode, payload);
        FrameHeader header;
        header.opcode = opcode;
        header.length = payload.size();
        char head[FrameHeader::max_size];
        const std::string_view pieces[2] = {{head, static_cast<std::size_t>(encode(header, head) - head)}, payload};
        std::size_t sent = offer(pieces, 2);
        if (state_ != State::open) return WriteStatus::closed;  // the transport has failed
        for (std::string_view piece : pieces) {
            const std::size_t skip = (std::min)(sent, piece.size());
            sent -= skip;
            if (skip != piece.size()) output_.append(copy(*arena_, piece.substr(skip)));
        }
        return write_blocked_ ? WriteStatus::queued : WriteStatus::sent;
    }
    // Only for a server: a client must mask each frame with a new key.
    WriteStatus send(const EncodedFrame& frame) {
        if (!can_send(frame.size())) return reject_write();
        if (!should_compress(frame.payload().size())) return enqueue(frame.slice());
        // Without context takeover, all members share one compressed frame.
        const auto make = [&] { return compressed_frame(frame.opcode(), frame.payload()); };
        const void* key = compression_->sharing_key();
        return enqueue(key != nullptr ? frame.form(key, make) : make());
    }
    // The same for a message that is useless when it is late. It is dropped if the peer is slow, with either policy.
    WriteStatus send_volatile(const EncodedFrame& frame) { return drops_volatile(frame.size()) ? drop() : send(frame); }
    WriteStatus send_volatile(Opcode opcode, std::string_view payload) {
        return drops_volatile(frame_size(payload.size())) ? drop() : send(opcode, payload);
    }

    // An unsolicited ping or pong (RFC 6455 5.5.2, 5.5.3). Throws Error for over 125 bytes. Ignores the backlog limit.
    WriteStatus send_control(Opcode opcode, std::string_view payload) {
        if (payload.size() > 125)
            throw Error("ping: a payload of " + std::to_string(payload.size()) + " bytes is over 125");
        if (state_ != State::open) return WriteStatus::closed;
        return enqueue(frame(opcode, payload));
    }

    // Starts the closing handshake; later calls have no effect. Throws Error for an illegal code, and for a reason that
    // is over 123 bytes or not UTF-8.
    void close(CloseCode code, std::string_view reason, Time now, CloseCause cause = CloseCause::local) {
        check_close(code, reason);
        if (state_ != State::open) return;
        enqueue_close(code, reason);
        state_ = State::closing;
        cause_ = cause;
        close_code_ = code;
        close_reason_ = reason;
        wait_started_ = later(now, drain_time(output_.size()));
    }
    static void check_close(CloseCode code, std::string_view reason) {
        if (!legal_on_wire(code))
            throw Error("close: " + std::to_string(number(code)) + " is not a code that may be sent");
        if (reason.size() > 123)
            throw Error("close: a reason of " + std::to_string(reason.size()) + " bytes is over 123");
        if (!valid_utf8(reason)) throw Error("close: the reason is not UTF-8");
    }

    // RFC 6455 7.1.7, "Fail the WebSocket Connection": queues a Close frame with the code and ignores further input.
    void fail(CloseCode code, std::string_view reason, CloseCause cause = CloseCause::protocol_error) {
        if (state_ == State::closed) return;
        if (state_ == State::open) enqueue_close(code, cut_utf8(reason, 123));
        set_closed(cause, code, reason);
    }

    // Ends the connection without a Close frame, because the peer is unreachable. Drops the output.
    void abort(CloseCause cause, std::string_view reason) {
        if (state_ == State::closed) return;
        // A peer that hangs up after our Close frame does not change the cause.
        const bool keep_cause = state_ == State::closing && cause == CloseCause::connection_lost;
        set_closed(keep_cause ? cause_ : cause, CloseCode::abnormal, reason);
        output_.clear();
    }

    // Whether the kernel refuses output. Pongs wait meanwhile, and only the latest is kept. The caller calls
    // send_pending_pong() when the kernel accepts output again.
    void set_write_blocked(bool blocked) { write_blocked_ = blocked; }
    bool write_blocked() const { return write_blocked_; }
    void send_pending_pong() {
        if (!cold_ || !cold_->pending_pong) return;
        const auto payload = std::exchange(cold_->pending_pong, std::nullopt);
        enqueue(frame(Opcode::pong, *payload));
    }

    std::uint64_t dropped_messages() const { return dropped_; }

    // ---- time ------------------------------------------------------------------------------------------------------

    // The peer is alive.
    void record_activity(Time now) { last_activity_ = now; }
    // The extra time for a peer to read queued output before a timeout: one second for each 64 KiB.
    static Duration drain_time(std::size_t backlog) { return std::chrono::seconds(backlog / (64 * 1024)); }

    // When to call tick(). Time::max() for never. Input moves it to a later time.
    Time deadline() const {
        if (state_ == State::closing) return deadline_after(wait_started_, limits_->closing_timeout);
        if (state_ != State::open || limits_->ping_interval == Duration::zero()) return (Time::max)();
        return ping_unanswered() ? deadline_after(wait_started_, limits_->ping_timeout)
                                 : deadline_after(last_activity_, limits_->ping_interval);
    }

    void tick(Time now) {
        if (now < deadline()) return;
        if (state_ == State::closing)
            return abort(CloseCause::closing_timeout, "the peer did not answer our Close frame");
        if (ping_unanswered()) return abort(CloseCause::ping_timeout, "the peer did not answer a ping");
        enqueue(frame(Opcode::ping, {}));
        wait_started_ = now;
    }

private:
    // Frames of this size and above are received directly into their message, which saves a copy.
    static constexpr std::size_t direct_read_size = 16 * 1024;
    // Messages of this size and above are passed to the transport without a copy.
    static constexpr std::size_t direct_send_size = 16 * 1024;
    // Bytes that are unmasked and then checked while they are in the cache.
    static constexpr std::size_t cached_block = 16 * 1024;
    // The smallest buffer for inflating and deflating.
    static constexpr std::size_t compression_block = 64 * 1024;
    static constexpr std::size_t inflate_budget = 256 * 1024;

    static Time deadline_after(Time time, Duration timeout) {
        return timeout == Duration::zero() ? (Time::max)() : later(time, timeout);
    }
    // Any input answers a ping.
    bool ping_unanswered() const { return wait_started_ > last_activity_; }

    // ---- frames ----------------------------------------------------------------------------------------------------

    // Parses the next header. Returns false if more bytes are needed. If the header is invalid or breaks a limit, the
    // connection fails, and in_payload_ stays false.
    bool read_header() {
        const auto available = static_cast<std::size_t>(input_end_ - input_);
        if (available == 0) return false;

        // 1. If the header began in earlier input, continue it in header_bytes_.
        const std::size_t before = header_size_;
        std::string_view bytes(input_, available);
        if (before != 0) {
            const std::size_t more = (std::min)(available, FrameHeader::max_size - before);
            std::memcpy(header_bytes_ + before, input_, more);
            bytes = {header_bytes_, before + more};
        }

        // 2. Parse. Keep the bytes of an incomplete header.
        const ParsedFrame parsed = parser_.parse(bytes);
        if (parsed.outcome == ParsedFrame::Outcome::failure) {
            fail(parsed.failure.code, parsed.failure.reason);
            return true;
        }
        if (parsed.outcome == ParsedFrame::Outcome::need_more) {
            if (before == 0) std::memcpy(header_bytes_, input_, available);
            header_size_ = static_cast<std::uint8_t>(bytes.size());
            input_ = input_end_;
            return false;
        }

        // 3. Consume the header and check its limits.
        input_ += parsed.size - before;
        header_size_ = 0;
        frame_ = parsed.header;
        frame_left_ = frame_.length;
        in_payload_ = is_control(frame_.opcode) || begin_data_frame();
        return true;
    }

    // Checks the limits on sizes and fragments before the payload arrives.
    bool begin_data_frame() {
        if (frame_.opcode != Opcode::continuation) {
            message_opcode_ = frame_.opcode;
            fragments_ = 0;
            utf8_.reset();
            inflating_ = compression_available && frame_.rsv1;
            if (inflating_) compression_->begin_message();
        }
        if (++fragments_ > limits_->max_fragments) {
            fail(CloseCode::policy_violation,
                 "message has more than " + std::to_string(limits_->max_fragments) + " fragments");
            return false;
        }
        const std::size_t max = limits_->max_message_size;
        const bool fits = inflating_ ? compression_->compressed_size_allowed(frame_.length, max)
                                     : frame_.length <= max && message_.size() + frame_.length <= max;
        if (!fits) fail_too_big();
        return fits;
    }
    void fail_too_big() {
        fail(CloseCode::message_too_big,
             "message is larger than " + std::to_string(limits_->max_message_size) + " bytes");
    }
    Event fail_invalid_text() {
        fail(CloseCode::invalid_payload, "text is not UTF-8");
        return {};
    }

    // Consumes the available part of the payload: unmasks it in place and checks text, block by block while a block is
    // in the cache. Returns nothing if the text is invalid.
    std::optional<std::string_view> read_payload(bool text) {
        const auto size = static_cast<std::size_t>(
            std::min<std::uint64_t>(frame_left_, static_cast<std::uint64_t>(input_end_ - input_)));
        const std::string_view part(input_, size);
        for (std::size_t done = 0; done < size;) {
            const std::size_t block = (std::min)(size - done, cached_block);
            const bool ascii = frame_.masked && apply_mask(input_ + done, block, frame_.mask,
                                                           static_cast<std::size_t>((frame_.length - frame_left_) % 4));
            if (text && !(ascii && utf8_.complete()) && !utf8_.feed(input_ + done, block)) return std::nullopt;
            done += block;
            frame_left_ -= block;
        }
        input_ += size;
        if (frame_left_ == 0) in_payload_ = false;
        return part;
    }

    // ---- messages --------------------------------------------------------------------------------------------------

    Event read_data(bool whole) {
        if (inflating_) return read_compressed();

        // 1. Consume the input, and store it unless this frame is a whole message: that is delivered in place.
        const bool text = message_opcode_ == Opcode::text;
        const bool in_place = whole && frame_.fin && fragments_ == 1 && frame_left_ == frame_.length;
        const auto part = read_payload(text);
        if (!part) return fail_invalid_text();
        if (!in_place) store(*part);

        // 2. Deliver the message if it is complete.
        if (in_payload_ || !frame_.fin) return {};
        if (text && !utf8_.complete()) return fail_invalid_text();
        // RFC 6455 1.4: after our Close frame, the application gets no more messages.
        if (state_ != State::open) {
            message_.release();
            return {};
        }
        message_delivered_ = !in_place;
        return {Event::Kind::message, Message(in_place ? *part : message_.view(), message_opcode_)};
    }
    void store(std::string_view part) {
        if (message_.capacity() == 0 && frame_.length >= direct_read_size) message_ = arena_->take_block();
        const bool received_in_place = part.data() == message_.end() && part.size() <= message_.room();
        if (received_in_place) message_.advance(part.size());
        else message_.append(part);
    }

    // Inflates each part when it arrives, into a block of the arena. A message that fits into one block is delivered
    // from that block. Parts of an unfinished message are copied, because an open message must not hold a whole block.
    Event read_compressed() {
        const std::string_view part = *read_payload(false);
        const bool last = !in_payload_ && frame_.fin;
        if (state_ != State::open) return {};  // RFC 6455 1.4, as in read_data()
        compression_->set_input(part, last);
        Compression::Outcome outcome;
        do {
            Bytes block = arena_->take_block();
            block.reserve(compression_block);
            outcome = inflate_to(block);
            if (state_ != State::open) return {};
            if (message_.empty() && (last || outcome == Compression::Outcome::output_full)) std::swap(message_, block);
            else message_.append(block.view());
            arena_->give_back(std::move(block));
        } while (outcome == Compression::Outcome::output_full);
        if (!last) return {};
        if (message_opcode_ == Opcode::text && !utf8_.complete()) return fail_invalid_text();
        inflating_ = false;
        message_delivered_ = true;
        return {Event::Kind::message, Message(message_.view(), message_opcode_)};
    }
    // Fills the block. The connection fails as soon as the output breaks the size limit or is not UTF-8.
    Compression::Outcome inflate_to(Bytes& block) {
        const std::size_t left = limits_->max_message_size - message_.size();
        std::size_t size = 0;
        const Compression::Outcome outcome =
            compression_->inflate(block.data(), left < block.room() ? left + 1 : block.room(), size);
        block.advance(size);
        compression_->inflated_bytes += size;
        // RFC 7692 names no code. RFC 6455 7.4.1: 1007 is for "data within a message that was not consistent with the
        // type of the message".
        if (outcome == Compression::Outcome::corrupt)
            fail(CloseCode::invalid_payload, "message is not valid DEFLATE data (RFC 7692)");
        else if (size > left) fail_too_big();
        else if (message_opcode_ == Opcode::text && !utf8_.feed(block.data(), size)) fail_invalid_text();
        return outcome;
    }

    // ---- control frames --------------------------------------------------------------------------------------------

    Event read_control() {
        std::string_view payload = *read_payload(false);
        if (in_payload_ || (cold_ && !cold_->partial_control.empty())) {
            cold().partial_control.append(payload);
            if (in_payload_) return {};
            payload = cold_->complete_control = std::exchange(cold_->partial_control, std::string());
        }
        if (frame_.opcode == Opcode::close) {
            read_close(payload);
            return {};
        }
        if (!control_frame_allowed()) {
            fail(CloseCode::policy_violation, "too many control frames");
            return {};
        }
        const Message message(payload, frame_.opcode);
        if (frame_.opcode == Opcode::pong) return {Event::Kind::pong, message};
        answer_ping(payload);
        return {Event::Kind::ping, message};
    }

    // RFC 6455 5.5.3: "If an endpoint receives a Ping frame and has not yet sent Pong frame(s) in response to previous
    // Ping frame(s), the endpoint MAY elect to send a Pong frame for only the most recently processed Ping frame."
    void answer_ping(std::string_view payload) {
        if (write_blocked_) cold().pending_pong = payload;
        else enqueue(frame(Opcode::pong, payload));
    }

    bool control_frame_allowed() {
        const double rate = limits_->control_frames_per_second, burst = limits_->control_frames_burst;
        // A burst of 0 allows no control frame. TokenBucket alone would allow one at a time.
        return rate <= 0 || (burst >= 1 && control_frames_.take(1, {rate, burst}, last_activity_));
    }

    // RFC 6455 5.5.1, 7.1.5, 7.1.6.
    void read_close(std::string_view payload) {
        if (payload.size() == 1) return fail(CloseCode::protocol_error, "Close frame with a body of one byte");
        CloseCode code = CloseCode::no_status;
        std::string_view reason;
        if (!payload.empty()) {
            code = static_cast<CloseCode>(static_cast<unsigned char>(payload[0]) << 8 |
                                          static_cast<unsigned char>(payload[1]));
            reason = payload.substr(2);
            if (!legal_on_wire(code)) return fail(CloseCode::protocol_error, "Close frame with an illegal code");
            if (!valid_utf8(reason))
                return fail(CloseCode::invalid_payload, "Close frame with a reason that is not UTF-8");
        }
        // "When sending a Close frame in response, the endpoint typically echos the status code it received."
        if (state_ == State::open) enqueue_close(code, {});
        set_closed(state_ == State::closing ? cause_ : CloseCause::peer, code, reason);
    }

    void set_closed(CloseCause cause, CloseCode code, std::string_view reason) {
        state_ = State::closed;
        cause_ = cause;
        close_code_ = code;
        in_payload_ = false;
        input_ = input_end_ = nullptr;
        if (cold_) cold_->pending_pong.reset();
        try {
            close_reason_ = reason;
        } catch (const std::bad_alloc&) {  // closing must not fail
            close_reason_.clear();
        }
    }

    // ---- frames to send --------------------------------------------------------------------------------------------

    bool can_send(std::size_t size) const { return state_ == State::open && !exceeds_backlog(size); }
    bool drops_volatile(std::size_t size) const {
        return state_ == State::open && (write_blocked_ || exceeds_backlog(size));
    }

    WriteStatus drop() {
        ++dropped_;
        return WriteStatus::dropped;
    }
    WriteStatus reject_write() {
        if (state_ != State::open) return WriteStatus::closed;
        if (limits_->backlog_policy == BacklogPolicy::drop) return drop();
        fail(CloseCode::policy_violation, "the peer reads too slowly", CloseCause::backlog);
        return WriteStatus::closed;
    }

    WriteStatus enqueue(const Slice& slice) {
        output_.append(slice);
        return write_blocked_ ? WriteStatus::queued : WriteStatus::sent;
    }
    void enqueue_close(CloseCode code, std::string_view reason) {
        std::string body;
        if (code != CloseCode::no_status) {
            body += static_cast<char>(number(code) >> 8);
            body += static_cast<char>(number(code) & 0xFF);
            body += reason;
        }
        enqueue(frame(Opcode::close, body));
    }

    // The size of an uncompressed frame.
    std::size_t frame_size(std::size_t payload_size) const {
        FrameHeader header;
        header.masked = mask_source_ != nullptr;
        header.length = payload_size;
        return encoded_size(header) + payload_size;
    }
    Slice frame(Opcode opcode, std::string_view payload, bool rsv1 = false) {
        FrameHeader header;
        header.opcode = opcode;
        header.rsv1 = rsv1;
        header.masked = mask_source_ != nullptr;
        if (header.masked) header.mask = mask_source_();
        return encode_frame(*arena_, header, payload);
    }

    bool should_compress(std::size_t size) const {
        return compression_available && compression_ != nullptr && compression_->should_compress(size);
    }
    // Returns a plain frame if compression does not make it smaller.
    Slice compressed_frame(Opcode opcode, std::string_view payload) {
        Bytes block = arena_->take_block();
        block.reserve(compression_block);
        const std::string_view deflated = compression_->deflate(payload, block);
        Slice slice = deflated.empty() ? frame(opcode, payload) : frame(opcode, deflated, true);
        arena_->give_back(std::move(block));
        return slice;
    }

    // Allocated on demand, which keeps idle connections small.
    struct ColdState {
        Bytes paused_input;
        Bytes resumed_input;           // that next_event() reads
        std::string partial_control;   // the beginning of a control frame's payload
        std::string complete_control;  // the payload of the last event, if it arrived in parts
        std::optional<std::string> pending_pong;
    };
    ColdState& cold() {
        if (!cold_) cold_ = std::make_unique<ColdState>();
        return *cold_;
    }

    // The members that each send and each flush use come first, to share cache lines.
    const Limits* limits_ = nullptr;
    MaskSource mask_source_ = nullptr;  // null for a server
    State state_ = State::connecting;
    CloseCause cause_ = CloseCause::none;
    CloseCode close_code_ = CloseCode::no_status;
    bool write_blocked_ = false;
    bool close_reported_ = false;
    SendQueue output_;
    Time last_activity_{};
    Time wait_started_{};  // for the answer to our ping or to our Close frame
    Bytes message_;        // an unfinished message, or the one that was delivered
    std::unique_ptr<ColdState> cold_;
    std::unique_ptr<Compression> compression_;  // null if it was not negotiated
    TokenBucket control_frames_;

    // The input, its current frame and its current message.
    FrameParser parser_;
    std::uint8_t header_size_ = 0;
    bool in_payload_ = false;
    bool message_delivered_ = false;  // the next next_event() releases message_
    bool inflating_ = false;          // the current message is compressed
    Opcode message_opcode_ = Opcode::text;
    Utf8Validator utf8_;
    char* input_ = nullptr;
    char* input_end_ = nullptr;
    FrameHeader frame_;
    std::uint64_t frame_left_ = 0;
    std::size_t fragments_ = 0;
    char header_bytes_[FrameHeader::max_size];

    SendArena* arena_ = nullptr;
    std::uint64_t dropped_ = 0;
    std::string close_reason_;
};

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 8: Handler
//
// WebSocketHandler: the functions that a user overrides and calls, and HandlerRef, a weak reference to a handler. A
// handler appends to its connection's queue and marks it dirty. Knows nothing of sockets, loops or flushing.
// ====================================================================================================================

#include <cassert>

WSCHAT_BEGIN

class Loop;
class Room;
class Rooms;
class Server;
class WebSocketHandler;

namespace detail {

class HandlerAccess;
struct HandlerCore;

// What a handler needs of the server that owns it; section 14 implements it.
class HandlerHost {
public:
    // The handler has output, or its connection has changed its state: to be seen to at the end of the turn.
    virtual void mark_dirty(HandlerCore& core) = 0;
    // Offers what is queued to the kernel now.
    virtual void flush_now(HandlerCore& core) = 0;
    // Offers to the kernel what is not queued, while nothing is; answers how many bytes it took.
    virtual std::size_t offer(HandlerCore& core, const std::string_view* pieces, std::size_t count) = 0;
    virtual void set_nodelay(HandlerCore& core, bool on) = 0;
    virtual bool origin_allowed(std::string_view origin, const Request& request) const = 0;
    virtual Time now() const = 0;
    virtual bool on_loop_thread() const = 0;
    virtual Rooms& rooms() = 0;
    virtual Loop& loop() = 0;
    virtual Server& server() = 0;
    virtual std::shared_ptr<Mailbox> mailbox() = 0;

protected:
    ~HandlerHost() = default;
};

}  // namespace detail

// A weak reference to a handler that any thread may use. If the handler is gone, a call has no effect. A call returns
// false if the server is gone too. Illegal arguments throw Error on the calling thread, as in WebSocketHandler.
class HandlerRef {
public:
    HandlerRef() = default;

    // Runs work(handler) on the loop's thread if the handler still exists. `work` is any callable.
    template <class Work>
    bool post(Work work) const {
        if (!cell_) return false;
        return cell_->mailbox->post([cell = cell_, work = std::move(work)]() mutable {
            if (cell->handler != nullptr) work(*cell->handler);
        });
    }
    inline bool write_message(std::string payload, Opcode opcode = Opcode::text) const;
    bool write_binary(std::string bytes) const { return write_message(std::move(bytes), Opcode::binary); }
    bool write_json(const Json& value) const { return write_message(value.dump()); }
    inline bool close(CloseCode code = CloseCode::normal, std::string reason = {}) const;

    // {"a", "b"} is not a message: as an iterator pair it would be undefined behavior.
    template <class T>
    bool write_message(std::initializer_list<T>, Opcode = Opcode::text) const = delete;
    template <class T>
    bool write_binary(std::initializer_list<T>) const = delete;

    // Returns null if the handler is gone. Only for the loop's thread.
    WebSocketHandler* get() const { return cell_ ? cell_->handler : nullptr; }

private:
    friend class WebSocketHandler;
    friend class detail::HandlerAccess;

    struct Cell {
        std::shared_ptr<Mailbox> mailbox;
        WebSocketHandler* handler;  // only for the loop's thread
    };

    std::shared_ptr<Cell> cell_;
};

namespace detail {

// What the server and the rooms keep for a handler.
struct HandlerCore {
    struct Membership {
        Room* room;
        std::size_t index;  // of the handler among the room's members
    };

    HandlerHost* host = nullptr;
    void* session = nullptr;  // the host's
    bool dirty = false;       // mark_dirty() was called in this turn
    std::uint64_t messages_sent = 0;
    Connection connection;
    Request request;
    std::string remote_address;
    std::string_view subprotocol;  // a part of the request
    std::vector<Membership> rooms;
    HandlerRef ref;
};

}  // namespace detail

// One WebSocket connection. The server creates a handler for each request that matches its route, calls check_origin(),
// prepare() and select_subprotocol() before the 101 response, then open(). It destroys the handler after on_close().
class WebSocketHandler {
public:
    WebSocketHandler() = default;
    WebSocketHandler(const WebSocketHandler&) = delete;
    WebSocketHandler& operator=(const WebSocketHandler&) = delete;
    virtual ~WebSocketHandler() {
        if (core_.ref.cell_) core_.ref.cell_->handler = nullptr;
    }

    // ---- to override -----------------------------------------------------------------------------------------------

    // Called before the 101. A response from here rejects the handshake (401, 403, a redirect).
    virtual std::optional<Response> prepare(const Request&) { return std::nullopt; }
    // Whether a page of this origin may connect. Only called for a request with an Origin header. By default the origin
    // must have the request's host or be one of Server::allow_origins(). False sends a 403.
    virtual bool check_origin(std::string_view origin) { return core_.host->origin_allowed(origin, request()); }
    // Returns one of the subprotocols that the client offers, or nothing. The server sends no other (RFC 6455 4.2.2).
    virtual std::string select_subprotocol(const std::vector<std::string_view>& offered) {
        static_cast<void>(offered);
        return {};
    }
    // The options of permessage-deflate (RFC 7692) for a client that offers it. By default there is no compression.
    // Only called if the program is built with WSCHAT_ZLIB.
    virtual std::optional<CompressionOptions> get_compression_options() { return std::nullopt; }
    // Each connection that gets a 101 gets exactly one open() and one on_close(), even if open() throws.
    virtual void open() {}
    virtual void on_message(const Message& message) = 0;
    // The rooms no longer contain this handler, but rooms() still returns them.
    virtual void on_close() {}
    virtual void on_ping(std::string_view payload) { static_cast<void>(payload); }  // the pong is queued already
    virtual void on_pong(std::string_view payload) { static_cast<void>(payload); }
    // The backlog was above half of Limits::max_backlog and is below it again.
    virtual void on_drain() {}

    // ---- to call, on the loop's thread -----------------------------------------------------------------------------

    // Queues a message, which is sent at the end of the loop's turn. A slow or closed peer is a status, not an error.
    // Throws Error for text that is not UTF-8 (RFC 6455 8.1: the peer would have to fail the connection).
    WriteStatus write_message(std::string_view payload, Opcode opcode = Opcode::text) {
        check_payload("write_message", payload, opcode);
        return send_payload(opcode, payload);
    }
    // A received message; not checked again.
    WriteStatus write_message(const Message& message) { return send_payload(message.opcode(), message.data()); }
    // A frame for many handlers: Rooms::encode().
    WriteStatus write_message(const EncodedFrame& frame) {
        return send_data(frame.size(), [&](detail::Connection& connection) { return connection.send(frame); });
    }
    WriteStatus write_binary(std::string_view bytes) { return send_payload(Opcode::binary, bytes); }
    // Takes braces as in {{"type", "join"}}, a Json, and any object with .dump(), such as nlohmann::json.
    WriteStatus write_json(const Json& value) { return send_payload(Opcode::text, value.dump()); }
    // For a message that is useless when it is late (who is typing, a pointer's position): it is dropped and counted if
    // it would wait behind output that the kernel refuses.
    WriteStatus write_volatile(std::string_view payload, Opcode opcode = Opcode::text) {
        check_payload("write_volatile", payload, opcode);
        return send_data(payload.size(),
                         [&](detail::Connection& connection) { return connection.send_volatile(opcode, payload); });
    }
    WriteStatus write_volatile(const EncodedFrame& frame) {
        return send_data(frame.size(), [&](detail::Connection& connection) { return connection.send_volatile(frame); });
    }

    // {"a", "b"} is not a message: as a string_view it would be undefined behavior in C++20. See write_json().
    template <class T>
    WriteStatus write_message(std::initializer_list<T>, Opcode = Opcode::text) = delete;
    template <class T>
    WriteStatus write_binary(std::initializer_list<T>) = delete;
    template <class T>
    WriteStatus write_volatile(std::initializer_list<T>, Opcode = Opcode::text) = delete;

    // Throws Error for over 125 bytes (RFC 6455 5.5).
    WriteStatus ping(std::string_view payload = {}) {
        return with_connection(
            [&](detail::Connection& connection) { return connection.send_control(Opcode::ping, payload); });
    }
    // Starts the closing handshake. on_close() is called when the peer has answered, or after Limits::closing_timeout.
    // Throws Error for an illegal code (RFC 6455 7.4), and for a reason that is over 123 bytes or not UTF-8.
    void close(CloseCode code = CloseCode::normal, std::string_view reason = {}) {
        detail::Connection::check_close(code, reason);
        with_connection([&](detail::Connection& connection) {
            if (connection.is_open()) connection.close(code, reason, core_.host->now());
            return WriteStatus::closed;
        });
    }
    void close(int code, std::string_view reason = {}) {
        if (code < 0 || code > 0xFFFF)
            throw Error("close: " + std::to_string(code) + " is not a code that may be sent");
        close(static_cast<CloseCode>(code), reason);
    }

    // From the peer's Close frame, or from ours until it arrives. CloseCode::no_status before both.
    CloseCode close_code() const { return core_.connection.close_code(); }
    const std::string& close_reason() const { return core_.connection.close_reason(); }
    CloseCause close_cause() const { return core_.connection.close_cause(); }
    bool is_open() const { return core_.connection.is_open(); }

    // The request of the opening handshake; valid as long as the handler.
    const Request& request() const { return core_.request; }
    // The client's address as text: "127.0.0.1", "::1" or "unix". Behind a trusted proxy, the address that it forwards.
    const std::string& remote_address() const { return core_.remote_address; }
    // The result of select_subprotocol(); empty if it chose none.
    std::string_view selected_subprotocol() const { return core_.subprotocol; }

    // The room of that name, created on demand. An empty room is removed at the end of the turn. Throws Error in the
    // constructor, before the handler has a server.
    inline Room& room(std::string_view name);
    // The rooms that contain this handler.
    inline std::vector<Room*> rooms() const;

    // Bytes that are queued and not taken by the kernel yet.
    std::size_t buffered_amount() const { return core_.connection.output().size(); }
    // How many messages were dropped, by BacklogPolicy::drop or write_volatile().
    std::uint64_t dropped_messages() const { return core_.connection.dropped_messages(); }
    // TCP_NODELAY; on by default.
    void set_nodelay(bool on) {
        if (core_.host != nullptr) core_.host->set_nodelay(core_, on);
    }

    // A reference for other threads and for later use. Empty in the constructor.
    HandlerRef ref() {
        if (core_.ref.cell_ == nullptr && core_.host != nullptr)
            core_.ref.cell_ = std::make_shared<HandlerRef::Cell>(HandlerRef::Cell{core_.host->mailbox(), this});
        return core_.ref;
    }
    // Both throw Error in the constructor.
    Loop& loop() { return host("loop").loop(); }
    Server& server() { return host("server").server(); }

private:
    friend class detail::HandlerAccess;

    detail::HandlerHost& host(const char* call) {
        if (core_.host == nullptr) throw Error(std::string(call) + ": a handler has no server in its constructor");
        return *core_.host;
    }

    static void check_payload(const char* call, std::string_view payload, Opcode opcode) {
        if (opcode != Opcode::text && opcode != Opcode::binary)
            throw Error(std::string(call) + ": the opcode is neither text nor binary");
        if (opcode == Opcode::text && !valid_utf8(payload))
            throw Error(std::string(call) + ": the text is not UTF-8; send it as Opcode::binary");
    }

    template <class Send>
    WriteStatus with_connection(Send&& function) {
        if (core_.host == nullptr) return WriteStatus::closed;
        assert(core_.host->on_loop_thread() && "a handler belongs to the loop's thread: use ref()");
        WriteStatus status = WriteStatus::closed;
        try {
            status = function(core_.connection);
        } catch (const std::bad_alloc&) {
            // Only this connection ends, not the one that broadcasts to it.
            core_.connection.abort(CloseCause::connection_lost, "out of memory");
        }
        if (!core_.dirty) core_.host->mark_dirty(core_);
        return status;
    }
    template <class Send>
    WriteStatus send_data(std::size_t size, Send&& function) {
        return with_connection([&](detail::Connection& connection) {
            // Flushes the output of this turn before the limit applies to the peer.
            if (connection.is_open() && connection.exceeds_backlog(size)) core_.host->flush_now(core_);
            const WriteStatus status = function(connection);
            if (status == WriteStatus::sent || status == WriteStatus::queued) ++core_.messages_sent;
            return status;
        });
    }
    WriteStatus send_payload(Opcode opcode, std::string_view payload) {
        return send_data(payload.size(), [&](detail::Connection& connection) {
            return connection.send(opcode, payload, [this](const std::string_view* pieces, std::size_t count) {
                return core_.host->offer(core_, pieces, count);
            });
        });
    }

    detail::HandlerCore core_;
};

namespace detail {

// The one door to what a handler keeps inside, for the sections that need it.
class HandlerAccess {
public:
    static HandlerCore& core(WebSocketHandler& handler) { return handler.core_; }
    static const HandlerCore& core(const WebSocketHandler& handler) { return handler.core_; }
    // What sending needs, which stands at the beginning of both.
    static void prefetch(const WebSocketHandler* handler) { detail::prefetch(handler, 4); }
    static void prefetch_session(const WebSocketHandler& handler) { detail::prefetch(handler.core_.session, 2); }
    static void check_payload(const char* call, std::string_view payload, Opcode opcode) {
        WebSocketHandler::check_payload(call, payload, opcode);
    }
};

}  // namespace detail

inline bool HandlerRef::write_message(std::string payload, Opcode opcode) const {
    detail::HandlerAccess::check_payload("HandlerRef::write_message", payload, opcode);
    return post([payload = std::move(payload), opcode](WebSocketHandler& handler) {
        handler.write_message(Message(payload, opcode));
    });
}

inline bool HandlerRef::close(CloseCode code, std::string reason) const {
    detail::Connection::check_close(code, reason);
    return post([code, reason = std::move(reason)](WebSocketHandler& handler) { handler.close(code, reason); });
}

WSCHAT_END

// ====================================================================================================================
// section 9: Rooms
//
// Named sets of handlers that broadcast: a message is encoded once, and each member's queue holds a slice of it. Knows
// nothing of what members send.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

class RoomsAccess;

}  // namespace detail

class Room {
    struct Member {
        WebSocketHandler* handler;
        std::size_t slot;  // of this room in the handler's list of rooms
    };

public:
    // Iterates over a copy of the members and skips those that have left since. The body of a loop may therefore close,
    // join and leave.
    class Iterator {
    public:
        explicit Iterator(const Room& room) : room_(&room), members_(room.members_) { skip(); }
        WebSocketHandler& operator*() const { return *members_[index_].handler; }
        WebSocketHandler* operator->() const { return members_[index_].handler; }
        Iterator& operator++() {
            ++index_;
            skip();
            return *this;
        }
        friend bool operator!=(const Iterator& it, std::nullptr_t) { return it.index_ != it.members_.size(); }

    private:
        void skip() {
            while (index_ != members_.size() && !room_->has(*members_[index_].handler)) ++index_;
        }
        const Room* room_;
        std::vector<Member> members_;
        std::size_t index_ = 0;
    };

    explicit Room(std::string name, Rooms& rooms) : name_(std::move(name)), rooms_(rooms) {}
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;

    const std::string& name() const { return name_; }
    std::size_t size() const { return members_.size(); }
    bool empty() const { return members_.empty(); }
    bool has(const WebSocketHandler& handler) const { return index_of(handler) != npos; }
    Iterator begin() const { return Iterator(*this); }
    std::nullptr_t end() const { return nullptr; }

    // Returns false if the handler is a member already or its connection is not open. A handler leaves automatically
    // when its connection ends.
    bool join(WebSocketHandler& handler) {
        if (!handler.is_open() || has(handler)) return false;
        auto& rooms = detail::HandlerAccess::core(handler).rooms;
        if (rooms.size() == rooms.capacity()) rooms.reserve(2 * rooms.size() + 4);  // the second push_back cannot throw
        members_.push_back({&handler, rooms.size()});
        rooms.push_back({this, members_.size() - 1});
        return true;
    }
    // Returns false if the handler is not a member.
    inline bool leave(WebSocketHandler& handler);

    // Sends to all members except `except`. Returns the number of members whose WriteStatus is sent or queued. Throws
    // Error for text that is not UTF-8; a Message, a Json and an EncodedFrame are not checked again.
    std::size_t broadcast(const Message& message, const WebSocketHandler* except = nullptr);
    std::size_t broadcast(std::string_view payload, const WebSocketHandler* except = nullptr,
                          Opcode opcode = Opcode::text) {
        detail::HandlerAccess::check_payload("broadcast", payload, opcode);
        return broadcast(Message(payload, opcode), except);
    }
    std::size_t broadcast(const EncodedFrame& frame, const WebSocketHandler* except = nullptr) {
        constexpr std::size_t ahead = 4;  // the prefetch hides cache misses, which dominate a large fan-out
        std::size_t count = 0;
        for (std::size_t i = 0; i < members_.size(); ++i) {
            if (members_.size() - i > 2 * ahead) {
                detail::HandlerAccess::prefetch(members_[i + 2 * ahead].handler);
                detail::HandlerAccess::prefetch_session(*members_[i + ahead].handler);
            }
            if (members_[i].handler == except) continue;
            const WriteStatus status = members_[i].handler->write_message(frame);
            if (status == WriteStatus::sent || status == WriteStatus::queued) ++count;
        }
        return count;
    }
    std::size_t broadcast_binary(std::string_view bytes, const WebSocketHandler* except = nullptr) {
        return broadcast(Message(bytes, Opcode::binary), except);
    }
    std::size_t broadcast_json(const Json& value, const WebSocketHandler* except = nullptr) {
        return broadcast(Message(value.dump()), except);
    }
    // Skips slow members, as WebSocketHandler::write_volatile() does.
    std::size_t broadcast_volatile(const Message& message, const WebSocketHandler* except = nullptr);
    std::size_t broadcast_volatile(std::string_view payload, const WebSocketHandler* except = nullptr,
                                   Opcode opcode = Opcode::text) {
        detail::HandlerAccess::check_payload("broadcast_volatile", payload, opcode);
        return broadcast_volatile(Message(payload, opcode), except);
    }
    std::size_t broadcast_volatile(const EncodedFrame& frame, const WebSocketHandler* except = nullptr) {
        std::size_t count = 0;
        for (const Member& member : members_)
            if (member.handler != except && member.handler->write_volatile(frame) == WriteStatus::sent) ++count;
        return count;
    }

    // {"a", "b"} is not a message: as a string_view it would be undefined behavior in C++20. See broadcast_json().
    template <class T, class... Rest>
    std::size_t broadcast(std::initializer_list<T>, Rest...) = delete;
    template <class T, class... Rest>
    std::size_t broadcast_binary(std::initializer_list<T>, Rest...) = delete;
    template <class T, class... Rest>
    std::size_t broadcast_volatile(std::initializer_list<T>, Rest...) = delete;

private:
    friend class Rooms;

    static constexpr std::size_t npos = static_cast<std::size_t>(-1);

    // Searches the shorter list: the members of the room or the rooms of the handler.
    std::size_t index_of(const WebSocketHandler& handler) const {
        const auto& rooms = detail::HandlerAccess::core(handler).rooms;
        for (std::size_t i = 0; i < (std::min)(rooms.size(), members_.size()); ++i) {
            if (members_[i].handler == &handler) return i;
            const std::size_t index = rooms[i].index;
            if (rooms[i].room == this && index < members_.size() && members_[index].handler == &handler) return index;
        }
        return npos;
    }
    // Moves the last member to this index.
    void remove_at(std::size_t index) {
        members_[index] = members_.back();
        members_.pop_back();
        if (index == members_.size()) return;
        detail::HandlerAccess::core(*members_[index].handler).rooms[members_[index].slot].index = index;
    }

    std::string name_;
    Rooms& rooms_;
    std::vector<Member> members_;
    Room* next_to_prune_ = nullptr;
    bool prune_pending_ = false;
};

// The rooms of a server, by name.
class Rooms {
public:
    explicit Rooms(detail::SendArena& arena) : arena_(arena) {}
    Rooms(const Rooms&) = delete;
    Rooms& operator=(const Rooms&) = delete;

    // Creates the room on demand. An empty room is removed at the end of the turn.
    Room& operator[](std::string_view name) {
        if (Room* room = rooms_.find(name)) return *room;
        Room& room = rooms_.find_or_emplace(name, std::string(name), *this);
        prune_later(room);
        return room;
    }
    // Returns null if no room of that name has members.
    Room* find(std::string_view name) const {
        Room* room = rooms_.find(name);
        return room == nullptr || room->empty() ? nullptr : room;
    }
    std::size_t size() const { return rooms_.size(); }
    std::vector<std::string> names() const {
        std::vector<std::string> result;
        for (const auto& [name, room] : rooms_) result.push_back(name);
        return result;
    }

    // Encodes a message once for many calls of broadcast(), write_message() and write_volatile(). The frame copies the
    // payload. Only the loop's thread may use it, and it must be destroyed before the server. Throws Error for text
    // that is not UTF-8.
    EncodedFrame encode(std::string_view payload, Opcode opcode = Opcode::text) {
        detail::HandlerAccess::check_payload("encode", payload, opcode);
        return EncodedFrame(arena_, opcode, payload);
    }
    template <class T>
    EncodedFrame encode(std::initializer_list<T>, Opcode = Opcode::text) = delete;

private:
    friend class Room;
    friend class detail::RoomsAccess;

    void remove_from_all(WebSocketHandler& handler) {
        for (const auto& membership : detail::HandlerAccess::core(handler).rooms) {
            membership.room->remove_at(membership.index);
            prune_later(*membership.room);
        }
    }
    void prune_later(Room& room) {
        if (!std::exchange(room.prune_pending_, true)) room.next_to_prune_ = std::exchange(prune_list_, &room);
    }
    void prune() {
        while (prune_list_ != nullptr) {
            Room& room = *prune_list_;
            prune_list_ = room.next_to_prune_;
            room.prune_pending_ = false;
            if (room.empty()) rooms_.erase(room.name());
        }
    }

    detail::SendArena& arena_;
    StringMap<Room> rooms_;
    Room* prune_list_ = nullptr;  // linked through the rooms, because the end of a handler must not allocate
};

namespace detail {

// What only the server calls.
class RoomsAccess {
public:
    // Removes the handler from all rooms when its connection ends. Its own list stays for on_close().
    static void remove_from_all(Rooms& rooms, WebSocketHandler& handler) { rooms.remove_from_all(handler); }
    // Removes empty rooms at the end of a turn.
    static void prune(Rooms& rooms) { rooms.prune(); }
};

}  // namespace detail

inline bool Room::leave(WebSocketHandler& handler) {
    const std::size_t index = index_of(handler);
    if (index == npos) return false;
    auto& rooms = detail::HandlerAccess::core(handler).rooms;
    const std::size_t slot = members_[index].slot;
    remove_at(index);
    rooms[slot] = rooms.back();
    rooms.pop_back();
    if (slot != rooms.size()) rooms[slot].room->members_[rooms[slot].index].slot = slot;
    if (empty()) rooms_.prune_later(*this);
    return true;
}

inline std::size_t Room::broadcast(const Message& message, const WebSocketHandler* except) {
    if (empty()) return 0;
    return broadcast(EncodedFrame::of_lasting(rooms_.arena_, message.opcode(), message.data()), except);
}

inline std::size_t Room::broadcast_volatile(const Message& message, const WebSocketHandler* except) {
    if (empty()) return 0;
    return broadcast_volatile(EncodedFrame::of_lasting(rooms_.arena_, message.opcode(), message.data()), except);
}

inline Room& WebSocketHandler::room(std::string_view name) { return host("room").rooms()[name]; }

inline std::vector<Room*> WebSocketHandler::rooms() const {
    std::vector<Room*> result;
    for (const auto& membership : core_.rooms) result.push_back(membership.room);
    return result;
}

WSCHAT_END

// ====================================================================================================================
// section 10: Sockets
//
// Addresses, sockets that never block, and the poller: one small contract over epoll, kqueue and poll. The first
// section that includes an OS header, and the one place where systems differ. Knows nothing of what the bytes mean.
// ====================================================================================================================

#include <cerrno>
#include <cstdlib>
#include <system_error>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#define WSCHAT_UNDEF_NOMINMAX
#endif
#include <winsock2.h>
// winsock2.h stands before what includes windows.h.
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#include <windows.h>
#include <ws2tcpip.h>
#ifdef WSCHAT_UNDEF_NOMINMAX
#undef NOMINMAX
#undef WSCHAT_UNDEF_NOMINMAX
#endif
#else
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/epoll.h>
#if WSCHAT_LIBURING
#include <liburing.h>
#endif
#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)
#include <sys/event.h>
#endif
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#endif
#endif

WSCHAT_BEGIN

namespace detail {

// What a call of the system is named and does differently from one to the other.
namespace os {

#if defined(_WIN32)

using Descriptor = SOCKET;
using Pollfd = WSAPOLLFD;
constexpr Descriptor no_descriptor = INVALID_SOCKET;

struct Startup {
    Startup() {
        WSADATA data;
        WSAStartup(MAKEWORD(2, 2), &data);
    }
};
inline void start() { static const Startup startup; }
// As an errno, where there is one that this file knows.
inline int last_error() {
    switch (const int error = WSAGetLastError()) {
        case WSAEADDRINUSE: return EADDRINUSE;
        case WSAEADDRNOTAVAIL: return EADDRNOTAVAIL;
        case WSAEACCES: return EACCES;
        case WSAECONNABORTED: return ECONNABORTED;
        case WSAECONNRESET: return ECONNRESET;
        case WSAEMFILE: return EMFILE;
        case WSAENOBUFS: return ENOBUFS;
        case WSAEWOULDBLOCK: return EWOULDBLOCK;
        default: return error;
    }
}
inline bool would_block(int error) { return error == EWOULDBLOCK; }
inline bool interrupted(int) { return false; }
inline bool out_of_descriptors(int error) { return error == EMFILE; }
inline void close(Descriptor descriptor) { ::closesocket(descriptor); }
inline void yield() { ::SwitchToThread(); }
inline bool make_nonblocking(Descriptor descriptor) {
    u_long on = 1;
    return ::ioctlsocket(descriptor, static_cast<long>(FIONBIO), &on) == 0;
}
inline Descriptor open_socket(int family) {
    start();
    const Descriptor descriptor = ::socket(family, SOCK_STREAM, 0);
    if (descriptor != no_descriptor) make_nonblocking(descriptor);
    return descriptor;
}
inline Descriptor accept(Descriptor listener, sockaddr* address, socklen_t* size) {
    const Descriptor descriptor = ::accept(listener, address, size);
    if (descriptor != no_descriptor) make_nonblocking(descriptor);
    return descriptor;
}
inline int poll(Pollfd* entries, std::size_t count, int timeout_ms) {
    if (count == 0) return ::Sleep(timeout_ms < 0 ? INFINITE : static_cast<DWORD>(timeout_ms)), 0;
    return ::WSAPoll(entries, static_cast<ULONG>(count), timeout_ms);
}
inline std::ptrdiff_t receive(Descriptor descriptor, char* data, std::size_t size) {
    return ::recv(descriptor, data, static_cast<int>((std::min)(size, std::size_t{1} << 30)), 0);
}
inline std::ptrdiff_t send(Descriptor descriptor, const std::string_view* pieces, std::size_t count) {
    WSABUF buffers[64];
    for (std::size_t i = 0; i < count; ++i)
        buffers[i] = {static_cast<ULONG>(pieces[i].size()), const_cast<char*>(pieces[i].data())};
    DWORD sent = 0;
    return ::WSASend(descriptor, buffers, static_cast<DWORD>(count), &sent, 0, nullptr, nullptr) == 0
               ? static_cast<std::ptrdiff_t>(sent)
               : -1;
}
inline void shutdown_send(Descriptor descriptor) { ::shutdown(descriptor, SD_SEND); }
inline std::size_t descriptor_limit() { return 16384; }

using FileStatus = struct _stat64;
// Windows opens no folder and calls that EACCES.
inline int open_file(const char* path) {
    const int file = ::_open(path, _O_RDONLY | _O_BINARY | _O_NOINHERIT);
    FileStatus status{};
    if (file < 0 && errno == EACCES)
        errno = ::_stat64(path, &status) == 0 && (status.st_mode & _S_IFDIR) != 0 ? EISDIR : EACCES;
    return file;
}
inline std::ptrdiff_t read_file(int file, char* data, std::size_t size) {
    return ::_read(file, data, static_cast<unsigned>((std::min)(size, std::size_t{1} << 30)));
}
inline void close_file(int file) { ::_close(file); }
inline bool file_status(int file, FileStatus& status) { return ::_fstat64(file, &status) == 0; }
inline bool regular(const FileStatus& status) { return (status.st_mode & _S_IFMT) == _S_IFREG; }
inline bool folder(const FileStatus& status) { return (status.st_mode & _S_IFMT) == _S_IFDIR; }
inline std::int64_t modified_ns(const FileStatus& status) { return std::int64_t{status.st_mtime} * 1'000'000'000; }
// Names are checked before: no way up, no device, no stream.
inline int open_file_beneath(const std::string& root, const std::vector<std::string>& names) {
    std::string path = root;
    for (const std::string& name : names) path += "\\" + name;
    return open_file(path.c_str());
}
inline std::string absolute_path(const std::string& path) {
    char resolved[_MAX_PATH];
    return ::_fullpath(resolved, path.c_str(), sizeof resolved) != nullptr ? resolved : path;
}
inline std::string executable_path() {
    char path[MAX_PATH];
    const DWORD size = ::GetModuleFileNameA(nullptr, path, sizeof path);
    return std::string(path, size);
}

#else

using Descriptor = int;
using Pollfd = pollfd;
constexpr Descriptor no_descriptor = -1;

inline int last_error() { return errno; }
inline bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK; }
inline bool interrupted(int error) { return error == EINTR; }
inline bool out_of_descriptors(int error) { return error == EMFILE || error == ENFILE; }
inline void close(Descriptor descriptor) { ::close(descriptor); }
inline void yield() { ::sched_yield(); }
inline bool make_nonblocking(Descriptor descriptor) {
    return ::fcntl(descriptor, F_SETFL, O_NONBLOCK) == 0 && ::fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0;
}
// Everything is close-on-exec, so that a child process keeps no connection open.
#if defined(SOCK_CLOEXEC) && defined(SOCK_NONBLOCK)
inline Descriptor open_socket(int family) { return ::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }
inline Descriptor accept(Descriptor listener, sockaddr* address, socklen_t* size) {
    return ::accept4(listener, address, size, SOCK_NONBLOCK | SOCK_CLOEXEC);
}
inline int open_pipe(int (&ends)[2]) { return ::pipe2(ends, O_NONBLOCK | O_CLOEXEC); }
#else
inline Descriptor open_socket(int family) {
    const Descriptor descriptor = ::socket(family, SOCK_STREAM, 0);
    if (descriptor >= 0) make_nonblocking(descriptor);
    return descriptor;
}
inline Descriptor accept(Descriptor listener, sockaddr* address, socklen_t* size) {
    const Descriptor descriptor = ::accept(listener, address, size);
    if (descriptor >= 0) make_nonblocking(descriptor);
#if defined(SO_NOSIGPIPE)
    const int on = 1;
    if (descriptor >= 0) ::setsockopt(descriptor, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    return descriptor;
}
inline int open_pipe(int (&ends)[2]) {
    if (::pipe(ends) != 0) return -1;
    return make_nonblocking(ends[0]) && make_nonblocking(ends[1]) ? 0 : -1;
}
#endif
inline int poll(Pollfd* entries, std::size_t count, int timeout_ms) {
    return ::poll(entries, static_cast<nfds_t>(count), timeout_ms);
}
inline std::ptrdiff_t receive(Descriptor descriptor, char* data, std::size_t size) {
    return ::recv(descriptor, data, size, 0);
}
// SIGPIPE is never raised: by a flag here, or by SO_NOSIGPIPE where there is no such flag.
inline std::ptrdiff_t send(Descriptor descriptor, const std::string_view* pieces, std::size_t count) {
#if defined(MSG_NOSIGNAL)
    constexpr int flags = MSG_NOSIGNAL;
#else
    constexpr int flags = 0;
#endif
    if (count == 1) return ::send(descriptor, pieces[0].data(), pieces[0].size(), flags);
    iovec vectors[64];
    for (std::size_t i = 0; i < count; ++i) vectors[i] = {const_cast<char*>(pieces[i].data()), pieces[i].size()};
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(count);
    return ::sendmsg(descriptor, &message, flags);
}
inline void shutdown_send(Descriptor descriptor) { ::shutdown(descriptor, SHUT_WR); }
inline std::size_t descriptor_limit() {
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return 1024 * 1024;
    return static_cast<std::size_t>(limit.rlim_cur);
}

using FileStatus = struct stat;
// A pipe or a device does not make it wait.
constexpr int open_file_flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
inline int open_file(const char* path) { return ::open(path, open_file_flags); }
inline std::ptrdiff_t read_file(int file, char* data, std::size_t size) { return ::read(file, data, size); }
inline void close_file(int file) { ::close(file); }
inline bool file_status(int file, FileStatus& status) { return ::fstat(file, &status) == 0; }
inline bool regular(const FileStatus& status) { return S_ISREG(status.st_mode); }
inline bool folder(const FileStatus& status) { return S_ISDIR(status.st_mode); }
inline std::int64_t modified_ns(const FileStatus& status) {
#if defined(__APPLE__)
    const timespec modified = status.st_mtimespec;
#else
    const timespec modified = status.st_mtim;
#endif
    return std::int64_t{modified.tv_sec} * 1'000'000'000 + modified.tv_nsec;
}
// Step by step and following no symbolic link, so that nothing outside of the root can be reached.
inline int open_file_beneath(const std::string& root, const std::vector<std::string>& names) {
    int folder = ::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (std::size_t i = 0; folder >= 0 && i < names.size(); ++i) {
        const bool last = i + 1 == names.size();
        const int next = ::openat(folder, names[i].c_str(),
                                  O_NOFOLLOW | (last ? open_file_flags : O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        const int error = errno;
        ::close(folder);
        errno = error;
        folder = next;
    }
    return folder;
}
inline std::string absolute_path(const std::string& path) {
    const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(path.c_str(), nullptr), &std::free);
    return resolved ? resolved.get() : path;
}
inline std::string executable_path() {
#if defined(__APPLE__)
    char path[4096];
    std::uint32_t size = sizeof path;
    return ::_NSGetExecutablePath(path, &size) == 0 ? absolute_path(path) : std::string();
#else
    const std::string link = "/proc/self/exe";
    const std::string path = absolute_path(link);
    return path == link ? std::string() : path;
#endif
}

#endif

inline const char* error_name(int error) {
    switch (error) {
        case EACCES: return "EACCES";
        case EADDRINUSE: return "EADDRINUSE";
        case EADDRNOTAVAIL: return "EADDRNOTAVAIL";
        case EAFNOSUPPORT: return "EAFNOSUPPORT";
        case ECONNABORTED: return "ECONNABORTED";
        case ECONNRESET: return "ECONNRESET";
        case EINVAL: return "EINVAL";
        case EISDIR: return "EISDIR";
        case EMFILE: return "EMFILE";
        case ENFILE: return "ENFILE";
        case ENOBUFS: return "ENOBUFS";
        case ENOENT: return "ENOENT";
        case ENOMEM: return "ENOMEM";
        case ENOTDIR: return "ENOTDIR";
        case EPERM: return "EPERM";
        case EPIPE: return "EPIPE";
        case ETIMEDOUT: return "ETIMEDOUT";
        default: return nullptr;
    }
}

// "Address already in use (EADDRINUSE)"
inline std::string error_text(int error) {
    const char* name = error_name(error);
    return std::generic_category().message(error) + " (" + (name != nullptr ? name : std::to_string(error)) + ")";
}

}  // namespace os

}  // namespace detail

// An IPv4 or IPv6 address, or that of a Unix socket, which has none. IPv4 is kept as IPv4 also where it came mapped
// into IPv6 (RFC 4291 2.5.5.2).
class IpAddress {
public:
    enum class Family : std::uint8_t { unix_socket, ipv4, ipv6 };

    IpAddress() = default;
    explicit IpAddress(const sockaddr_storage& address) {
        if (address.ss_family == AF_INET) {
            sockaddr_in in;
            std::memcpy(&in, &address, sizeof in);
            set(Family::ipv4, &in.sin_addr);
        } else if (address.ss_family == AF_INET6) {
            sockaddr_in6 in6;
            std::memcpy(&in6, &address, sizeof in6);
            set(Family::ipv6, &in6.sin6_addr);
        }
    }
    // Numeric forms only; nothing where it is not an address.
    static std::optional<IpAddress> parse(std::string_view text) {
        if (text.find('\0') != std::string_view::npos) return std::nullopt;  // inet_pton() would stop there
        const std::string copy(text);
        unsigned char bytes[16];
        IpAddress address;
        if (::inet_pton(AF_INET, copy.c_str(), bytes) == 1) address.set(Family::ipv4, bytes);
        else if (::inet_pton(AF_INET6, copy.c_str(), bytes) == 1) address.set(Family::ipv6, bytes);
        else return std::nullopt;
        return address;
    }

    Family family() const { return family_; }
    std::string to_string() const {
        if (family_ == Family::unix_socket) return "unix";
        char text[64] = "";
        ::inet_ntop(family_ == Family::ipv4 ? AF_INET : AF_INET6, bytes_.data(), text, sizeof text);
        return text;
    }
    // The first bits, the rest zero: what a CIDR block or a limit for each /64 goes by.
    IpAddress prefix(unsigned bits) const {
        IpAddress result = *this;
        for (unsigned i = 0; i < 16; ++i) {
            const unsigned keep = bits > i * 8 ? (std::min)(bits - i * 8, 8u) : 0;
            result.bytes_[i] = static_cast<unsigned char>(result.bytes_[i] & (0xFF00u >> keep));
        }
        return result;
    }
    // By what limits know a client: an IPv6 address is one of a /64, which is one customer's.
    std::string rate_limit_key() const { return (family_ == Family::ipv6 ? prefix(64) : *this).to_string(); }
    unsigned bits() const { return family_ == Family::ipv4 ? 32 : family_ == Family::ipv6 ? 128 : 0; }

    friend bool operator==(const IpAddress& a, const IpAddress& b) {
        return a.family_ == b.family_ && a.bytes_ == b.bytes_;
    }

private:
    void set(Family family, const void* bytes) {
        family_ = family;
        std::memcpy(bytes_.data(), bytes, family == Family::ipv4 ? 4 : 16);
        static constexpr unsigned char mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};
        if (family != Family::ipv6 || std::memcmp(bytes_.data(), mapped, 12) != 0) return;
        family_ = Family::ipv4;
        std::memmove(bytes_.data(), bytes_.data() + 12, 4);
        std::fill(bytes_.begin() + 4, bytes_.end(), static_cast<unsigned char>(0));
    }

    Family family_ = Family::unix_socket;
    std::array<unsigned char, 16> bytes_{};
};

namespace detail {

// A block of addresses, "10.0.0.0/8" or a single address. "unix" stands for every Unix socket.
class Cidr {
public:
    // An Error where the text is none.
    explicit Cidr(std::string_view text) {
        if (text == "unix") return;
        std::string_view rest = text;
        const auto address = IpAddress::parse(text::cut_at(rest, '/'));
        const bool single = text.find('/') == std::string_view::npos;
        const auto bits = text::unsigned_number(rest, address ? address->bits() : 0);
        if (!address || (!single && !bits))
            throw Error("\"" + std::string(text) + "\" is neither an address nor a CIDR block");
        bits_ = single ? address->bits() : static_cast<unsigned>(*bits);
        base_ = address->prefix(bits_);
    }
    bool contains(const IpAddress& address) const {
        return address.family() == base_.family() && address.prefix(bits_) == base_;
    }

private:
    IpAddress base_;
    unsigned bits_ = 0;
};

// What a call on a socket came to.
struct IoResult {
    enum class Outcome : std::uint8_t { done, would_block, end, error };

    Outcome outcome;
    std::size_t size = 0;
    int error = 0;
};

// A descriptor that is closed with its owner.
class OwnedDescriptor {
public:
    OwnedDescriptor() = default;
    explicit OwnedDescriptor(os::Descriptor descriptor) : descriptor_(descriptor) {}
    OwnedDescriptor(OwnedDescriptor&& other) noexcept
        : descriptor_(std::exchange(other.descriptor_, os::no_descriptor)) {}
    OwnedDescriptor& operator=(OwnedDescriptor&& other) noexcept {
        std::swap(descriptor_, other.descriptor_);
        return *this;
    }
    ~OwnedDescriptor() { close(); }

    explicit operator bool() const { return descriptor_ != os::no_descriptor; }
    os::Descriptor descriptor() const { return descriptor_; }
    void close() {
        if (*this) os::close(std::exchange(descriptor_, os::no_descriptor));
    }

private:
    os::Descriptor descriptor_ = os::no_descriptor;
};

// A stream socket that never blocks.
class Socket : public OwnedDescriptor {
public:
    using OwnedDescriptor::OwnedDescriptor;

    IoResult receive(char* data, std::size_t size) {
        return result([&] { return os::receive(descriptor(), data, size); });
    }

    // Sends the pieces in order with one call of the system; at most max_pieces of them.
    static constexpr std::size_t max_pieces = 64;
    IoResult send(const std::string_view* pieces, std::size_t count) {
        IoResult sent = result([&] { return os::send(descriptor(), pieces, count); });
        if (sent.outcome == IoResult::Outcome::end) sent.outcome = IoResult::Outcome::would_block;
        return sent;
    }
    // The peer reads the end of the stream; we may still read.
    void shutdown_send() { os::shutdown_send(descriptor()); }
    void set_nodelay(bool on) { set_option(IPPROTO_TCP, TCP_NODELAY, on ? 1 : 0); }
    bool set_option(int level, int name, int value) {
        return ::setsockopt(descriptor(), level, name, reinterpret_cast<const char*>(&value), sizeof value) == 0;
    }

    // What an error of the system means. Where the kernel is short of memory for a moment, the socket is not at fault.
    static IoResult failure(int error) {
        const bool later = os::would_block(error) || error == ENOBUFS || error == ENOMEM;
        return {later ? IoResult::Outcome::would_block : IoResult::Outcome::error, 0, error};
    }

private:
    template <class Call>
    static IoResult result(Call&& call) {
        for (;;) {
            const std::ptrdiff_t n = call();
            if (n > 0) return {IoResult::Outcome::done, static_cast<std::size_t>(n), 0};
            if (n == 0) return {IoResult::Outcome::end, 0, 0};
            const int error = os::last_error();
            if (!os::interrupted(error)) return failure(error);
        }
    }
};

// Sends, each to a socket of its own, that go to the kernel in one call of the system. Optional: where there is none, and
// for whatever it leaves undone, there is Socket::send().
class SendBatch {
public:
    struct Item {
        Socket* socket;
        std::string_view bytes;
        void* owner;
        std::optional<IoResult> sent;  // as Socket::send() would have answered; nothing where it was not tried
    };
    static constexpr std::size_t max_items = 256;
    // Fewer are cheaper one by one.
    static constexpr std::size_t min_items = 16;

    // Null without WSCHAT_LIBURING, and where the kernel refuses a ring.
    static inline std::unique_ptr<SendBatch> make();
    virtual ~SendBatch() = default;

    void add(Socket& socket, std::string_view bytes, void* owner) { items_[size_++] = {&socket, bytes, owner, {}}; }
    bool full() const { return size_ == max_items; }
    // Sends what was added, where it is worth it, and forgets it after `visit(item)` for each.
    template <class Visit>
    void send(Visit&& visit) {
        const std::size_t count = std::exchange(size_, 0u);
        if (count < min_items) return;
        submit(items_.data(), count);
        for (std::size_t i = 0; i < count; ++i) visit(items_[i]);
    }

private:
    virtual void submit(Item* items, std::size_t count) = 0;

    std::array<Item, max_items> items_{};
    std::size_t size_ = 0;
};

#if WSCHAT_LIBURING

// MSG_DONTWAIT makes every send end within the call that submits it.
class UringSendBatch final : public SendBatch {
public:
    UringSendBatch() : usable_(::io_uring_queue_init(max_items, &ring_, 0) == 0) {}
    UringSendBatch(const UringSendBatch&) = delete;
    UringSendBatch& operator=(const UringSendBatch&) = delete;
    ~UringSendBatch() override { end(); }
    explicit operator bool() const { return usable_; }

private:
    void submit(Item* items, std::size_t count) override {
        if (!usable_) return;
        for (std::size_t i = 0; i < count; ++i) {
            io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
            ::io_uring_prep_send(entry, items[i].socket->descriptor(), items[i].bytes.data(), items[i].bytes.size(),
                                 MSG_NOSIGNAL | MSG_DONTWAIT);
            ::io_uring_sqe_set_data(entry, &items[i]);
        }
        std::size_t submitted = 0;
        while (submitted != count) {
            const int n = ::io_uring_submit(&ring_);
            if (n == -EINTR) continue;
            if (n <= 0) break;
            submitted += static_cast<std::size_t>(n);
        }
        std::size_t known = 0;
        while (known != submitted && take_result()) ++known;
        // Whether the others were sent nobody can know, and nothing may be sent a second time.
        for (std::size_t i = 0; i < submitted && known != submitted; ++i)
            if (!items[i].sent) items[i].sent = Socket::failure(EIO);
        // What a ring has not taken it would send later, a second time.
        if (known != count) end();
    }
    // False where the result can not be had.
    bool take_result() {
        io_uring_cqe* result = nullptr;
        int status = 0;
        do status = ::io_uring_wait_cqe(&ring_, &result);
        while (status == -EINTR);
        if (status < 0) return false;
        auto& item = *static_cast<Item*>(::io_uring_cqe_get_data(result));
        if (result->res > 0) item.sent = {IoResult::Outcome::done, static_cast<std::size_t>(result->res), 0};
        else item.sent = Socket::failure(-result->res);
        ::io_uring_cqe_seen(&ring_, result);
        return true;
    }
    void end() {
        if (std::exchange(usable_, false)) ::io_uring_queue_exit(&ring_);
    }

    io_uring ring_;
    bool usable_;
};
inline std::unique_ptr<SendBatch> SendBatch::make() {
    auto batch = std::make_unique<UringSendBatch>();
    if (!*batch) return nullptr;
    return batch;
}

#else

inline std::unique_ptr<SendBatch> SendBatch::make() { return nullptr; }

#endif

// Octets that went through sockets.
struct WireCount {
    std::uint64_t received = 0;
    std::uint64_t sent = 0;
};

// What may stand between a connection and its socket: encryption. A plain connection has none. The octets of each call
// are added to `wire`.
class Transport {
public:
    virtual ~Transport() = default;
    // As Socket::receive(). An error that is not the socket's has no number, and failure() tells it.
    virtual IoResult receive(Socket& socket, char* data, std::size_t size, WireCount& wire) = 0;
    // As Socket::send(): a byte counts as sent when the kernel has all that was made of it. What was not counted is
    // offered again, first and unchanged. With no pieces: sends what is still owed.
    virtual IoResult send(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) = 0;
    // Whether bytes wait here that the poller does not know of.
    virtual bool has_input() const = 0;
    // Whether the kernel has refused something that is still owed.
    virtual bool wants_write() const = 0;
    // Whether the peer is known and bytes may be exchanged.
    virtual bool established() const = 0;
    // Tells the peer that nothing more comes. False: the kernel does not take it yet; to be called again then.
    virtual bool end(Socket& socket, WireCount& wire) = 0;
    // Why it has failed; empty where it has not.
    virtual const std::string& failure() const = 0;
    // Whether it has failed because the peer began with plain text.
    virtual bool plain_text() const = 0;
    // Who the peer has proved to be; empty where it was not asked.
    virtual std::string peer_name() const = 0;
};

// What makes a transport for each connection of a listener.
class TransportFactory {
public:
    virtual ~TransportFactory() = default;
    virtual std::unique_ptr<Transport> make() = 0;
    // Reads its files anew, for the connections to come; where that is an Error, all stays as it was.
    virtual void reload() = 0;
};

// Where to listen: "8888" and "127.0.0.1:8888" (this machine only), "0.0.0.0:80", "[::1]:80", "*:80" (every address of
// both families), "unix:/run/chat.sock".
struct ListenAddress {
    std::string host = "127.0.0.1";
    int port = 0;  // 0: the system picks one
    std::string unix_path;

    // An Error where the text is none of the forms above.
    WSCHAT_COLD static ListenAddress parse(std::string_view text) {
        ListenAddress address;
        const std::size_t colon = text.rfind(':');
        if (text::starts_with(text, "unix:")) {
            address.unix_path = text.substr(5);
            if (address.unix_path.empty()) throw Error("listen " + std::string(text) + ": the path is missing");
            return address;
        }
        std::string_view host = colon == std::string_view::npos ? std::string_view("127.0.0.1") : text.substr(0, colon);
        const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
        if (brackets) host = host.substr(1, host.size() - 2);
        const auto port = text::unsigned_number(colon == std::string_view::npos ? text : text.substr(colon + 1), 65535);
        if (!port || host.empty() || host.find_first_of("[]") != std::string_view::npos ||
            brackets != (host.find(':') != std::string_view::npos))
            throw Error("listen " + escape_for_log(text) +
                        ": not an address; a port is 0-65535, as in 8888, 127.0.0.1:8888 or [::1]:8888");
        address.host = host;
        address.port = static_cast<int>(*port);
        return address;
    }
    std::string to_string() const {
        if (!unix_path.empty()) return "unix:" + unix_path;
        const bool ipv6 = host.find(':') != std::string::npos;
        return (ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
    }
};

// A socket that listens. Making one is an Error where the system refuses, with the address and the cause.
class ListenSocket {
public:
    ListenSocket(const ListenAddress& address, bool reuse_port) : address_(address) {
        if (!address.unix_path.empty()) listen_unix();
        else listen_tcp(reuse_port);
    }
    ListenSocket(const ListenSocket&) = delete;
    ListenSocket& operator=(const ListenSocket&) = delete;
    ~ListenSocket() {
#if !defined(_WIN32)
        if (socket_ && !address_.unix_path.empty()) ::unlink(address_.unix_path.c_str());
#endif
    }

    // With the port that the system picked.
    const ListenAddress& address() const { return address_; }
    os::Descriptor descriptor() const { return socket_.descriptor(); }

    // The next connection; where there is none, `error` says why.
    Socket accept(IpAddress& peer, int& error) {
        sockaddr_storage from{};
        socklen_t size = sizeof from;
        Socket accepted(os::accept(socket_.descriptor(), reinterpret_cast<sockaddr*>(&from), &size));
        error = accepted ? 0 : os::last_error();
        if (accepted) peer = IpAddress(from);
#if !defined(__linux__)
        if (accepted && address_.unix_path.empty()) accepted.set_nodelay(true);
#endif
        return accepted;
    }

private:
    [[noreturn]] void fail(int error, const char* call) const {
        std::string sentence = "listen " + address_.to_string() + ": " + os::error_text(error);
        if (error == EADDRINUSE) sentence += ": another process has it";
        else if (error == EACCES && address_.port != 0 && address_.port < 1024)
            sentence += ": ports below 1024 need permission";
        else if (error == EADDRNOTAVAIL) sentence += ": this machine has no such address";
        else sentence += std::string(" from ") + call;
        throw Error(sentence);
    }

    WSCHAT_COLD void listen_tcp(bool reuse_port) {
#if defined(_WIN32)
        os::start();
#endif
        const bool any = address_.host == "*";
        addrinfo hints{};
        hints.ai_family = AF_UNSPEC;
        hints.ai_socktype = SOCK_STREAM;
        hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
        addrinfo* found = nullptr;
        const std::string service = std::to_string(address_.port);
        const int status = ::getaddrinfo(any ? "::" : address_.host.c_str(), service.c_str(), &hints, &found);
        if (status != 0)
            throw Error("listen " + address_.to_string() + ": the host is unknown: " + ::gai_strerror(status));
        const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(found, [](addrinfo* list) { ::freeaddrinfo(list); });
        socket_ = Socket(os::open_socket(found->ai_family));
        if (!socket_ && any) {
            // A machine without IPv6 has one family less.
            address_.host = "0.0.0.0";
            return listen_tcp(reuse_port);
        }
        if (!socket_) fail(os::last_error(), "socket");
        if (found->ai_family == AF_INET6) socket_.set_option(IPPROTO_IPV6, IPV6_V6ONLY, any ? 0 : 1);
#if !defined(_WIN32)
        // On Windows it would let two processes share a port.
        socket_.set_option(SOL_SOCKET, SO_REUSEADDR, 1);
#endif
#if defined(SO_REUSEPORT)
        if (reuse_port && !socket_.set_option(SOL_SOCKET, SO_REUSEPORT, 1))
            fail(os::last_error(), "setsockopt SO_REUSEPORT");
#else
        if (reuse_port) throw Error("listen " + address_.to_string() + ": this system has no SO_REUSEPORT");
#endif
        socket_.set_nodelay(true);  // Linux lets accepted sockets inherit it
        bind_and_listen(found->ai_addr, static_cast<socklen_t>(found->ai_addrlen));
        learn_port();
    }

    void learn_port() {
        sockaddr_storage bound{};
        socklen_t size = sizeof bound;
        if (::getsockname(socket_.descriptor(), reinterpret_cast<sockaddr*>(&bound), &size) != 0)
            fail_closed("getsockname");
        sockaddr_in in;
        std::memcpy(&in, &bound, sizeof in);  // the port lies at the same place in both families
        address_.port = ntohs(in.sin_port);
    }

    void bind_and_listen(const sockaddr* address, socklen_t size) {
        if (::bind(socket_.descriptor(), address, size) != 0) fail_closed("bind");
        if (::listen(socket_.descriptor(), SOMAXCONN) != 0) fail_closed("listen");
    }
    [[noreturn]] void fail_closed(const char* call) {
        const int error = os::last_error();
        socket_.close();
        fail(error, call);
    }

    WSCHAT_COLD void listen_unix() {
#if defined(_WIN32)
        throw Error("listen " + address_.to_string() + ": Unix sockets are not supported on Windows");
#else
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        if (address_.unix_path.size() >= sizeof name.sun_path)
            throw Error("listen " + address_.to_string() + ": the path is longer than " +
                        std::to_string(sizeof name.sun_path - 1) + " bytes");
        std::memcpy(name.sun_path, address_.unix_path.data(), address_.unix_path.size());
        remove_stale(name);
        socket_ = Socket(os::open_socket(AF_UNIX));
        if (!socket_) fail(os::last_error(), "socket");
        bind_and_listen(reinterpret_cast<const sockaddr*>(&name), sizeof name);
#endif
    }
#if !defined(_WIN32)
    // A socket that a dead process left behind would keep its path taken for ever.
    static void remove_stale(const sockaddr_un& name) {
        struct stat status {};
        if (::lstat(name.sun_path, &status) != 0 || !S_ISSOCK(status.st_mode)) return;
        const Socket probe(os::open_socket(AF_UNIX));
        if (!probe) return;
        const int result = ::connect(probe.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name);
        if (result != 0 && os::last_error() == ECONNREFUSED) ::unlink(name.sun_path);
    }
#endif

    ListenAddress address_;
    Socket socket_;
};

// Wakes a poller from another thread or from a signal handler.
class WakeUp {
public:
    WakeUp() {
#if defined(_WIN32)
        // A datagram socket that is connected to itself: Windows polls sockets only.
        os::start();
        read_ = write_ = ::socket(AF_INET, SOCK_DGRAM, 0);
        sockaddr_in self{};
        self.sin_family = AF_INET;
        self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int size = sizeof self;
        const auto address = reinterpret_cast<sockaddr*>(&self);
        if (read_ == os::no_descriptor || ::bind(read_, address, size) != 0 ||
            ::getsockname(read_, address, &size) != 0 || ::connect(read_, address, size) != 0 ||
            !os::make_nonblocking(read_))
            throw Error("Loop: no socket to wake it: " + os::error_text(os::last_error()));
#else
        int ends[2];
        if (os::open_pipe(ends) != 0) throw Error("Loop: no pipe to wake it: " + os::error_text(errno));
        read_ = ends[0];
        write_ = ends[1];
#endif
    }
    WakeUp(const WakeUp&) = delete;
    WakeUp& operator=(const WakeUp&) = delete;
    ~WakeUp() {
        os::close(read_);
        if (write_ != read_) os::close(write_);
    }

    os::Descriptor descriptor() const { return read_; }
    os::Descriptor write_end() const { return write_; }
    // A full pipe wakes as well as one byte more would. Safe in a signal handler.
    static void wake(os::Descriptor write_end, char byte) {
#if defined(_WIN32)
        ::send(write_end, &byte, 1, 0);
#else
        const ssize_t written = ::write(write_end, &byte, 1);
        static_cast<void>(written);
#endif
    }
    // Calls take(byte) for each byte that came.
    template <class Take>
    void drain(Take&& take) {
        char bytes[256];
        for (;;) {
#if defined(_WIN32)
            const std::ptrdiff_t n = ::recv(read_, bytes, sizeof bytes, 0);
#else
            const std::ptrdiff_t n = ::read(read_, bytes, sizeof bytes);
#endif
            if (n < 0 && os::interrupted(os::last_error())) continue;
            if (n <= 0) return;
            for (std::ptrdiff_t i = 0; i < n; ++i) take(bytes[i]);
        }
    }

private:
    os::Descriptor read_;
    os::Descriptor write_;
};

// What a poller watches a descriptor for.
class Pollable {
public:
    // `broken`: both directions are gone; reported also where nothing is being waited for.
    virtual void on_ready(bool readable, bool writable, bool broken) = 0;

protected:
    ~Pollable() = default;
};

}  // namespace detail

// How a loop waits: automatic is epoll or kqueue where the system has it, else poll (WSAPoll on Windows).
enum class PollerKind : std::uint8_t { automatic, poll };

namespace detail {

// The contract over the three: level-triggered; after remove(), wait() reports the owner no more, but a batch that was
// handed out already may still name it, so an owner lives until the batch is done.
class Poller {
public:
    struct Ready {
        Pollable* owner;
        bool readable;
        bool writable;
        bool broken;
    };

    static inline std::unique_ptr<Poller> make(PollerKind kind);
    virtual ~Poller() = default;
    virtual const char* name() const = 0;
    // Each false where the system refuses for want of resources.
    virtual bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) = 0;
    virtual bool change(os::Descriptor descriptor, Pollable& owner, bool read, bool write) = 0;
    virtual void remove(os::Descriptor descriptor) = 0;
    // Waits until something is ready or the timeout is over (-1: never) and fills `ready` anew.
    virtual void wait(int timeout_ms, std::vector<Ready>& ready) = 0;
};

class PollPoller final : public Poller {
public:
    const char* name() const override { return "poll"; }
    bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        // Both lists take it, or neither.
        if (entries_.size() == entries_.capacity()) entries_.reserve(2 * entries_.size() + 16);
        owners_.reserve(entries_.capacity());
        const std::ptrdiff_t at = place(descriptor);
        entries_.insert(entries_.begin() + at, {descriptor, events(read, write), 0});
        owners_.insert(owners_.begin() + at, &owner);
        return true;
    }
    bool change(os::Descriptor descriptor, Pollable&, bool read, bool write) override {
        entries_.begin()[place(descriptor)].events = events(read, write);
        return true;
    }
    void remove(os::Descriptor descriptor) override {
        const auto entry = entries_.begin() + place(descriptor);
        if (entry == entries_.end() || entry->fd != descriptor) return;  // add() has failed
        owners_.erase(owners_.begin() + (entry - entries_.begin()));
        entries_.erase(entry);
    }
    void wait(int timeout_ms, std::vector<Ready>& ready) override {
        ready.clear();
        if (os::poll(entries_.data(), entries_.size(), timeout_ms) <= 0) return;
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const auto got = static_cast<unsigned>(entries_[i].revents);
            if (got == 0) continue;
            const bool broken = (got & (POLLHUP | POLLERR | POLLNVAL)) != 0;
            ready.push_back({owners_[i], (got & POLLIN) != 0, (got & POLLOUT) != 0, broken});
        }
    }

private:
    static short events(bool read, bool write) {
        return static_cast<short>((read ? POLLIN : 0) | (write ? POLLOUT : 0));
    }
    // Where it stands or belongs.
    std::ptrdiff_t place(os::Descriptor descriptor) const {
        const auto before = [](const os::Pollfd& entry, os::Descriptor sought) { return entry.fd < sought; };
        return std::lower_bound(entries_.begin(), entries_.end(), descriptor, before) - entries_.begin();
    }

    std::vector<os::Pollfd> entries_;  // by descriptor: every call of poll() costs more than moving them
    std::vector<Pollable*> owners_;
};

#if defined(__linux__)

class EpollPoller final : public Poller {
public:
    EpollPoller() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
        if (!epoll_) throw Error("Loop: epoll_create1: " + os::error_text(errno));
    }
    const char* name() const override { return "epoll"; }
    bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        return control(EPOLL_CTL_ADD, descriptor, &owner, read, write);
    }
    bool change(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        return control(EPOLL_CTL_MOD, descriptor, &owner, read, write);
    }
    void remove(os::Descriptor descriptor) override { control(EPOLL_CTL_DEL, descriptor, nullptr, false, false); }
    void wait(int timeout_ms, std::vector<Ready>& ready) override {
        ready.clear();
        const int count = ::epoll_wait(epoll_.descriptor(), events_, batch, timeout_ms);
        for (int i = 0; i < count; ++i) {
            const std::uint32_t got = events_[i].events;
            ready.push_back({static_cast<Pollable*>(events_[i].data.ptr), (got & EPOLLIN) != 0, (got & EPOLLOUT) != 0,
                             (got & (EPOLLHUP | EPOLLERR)) != 0});
        }
    }

private:
    static constexpr int batch = 512;

    bool control(int operation, os::Descriptor descriptor, Pollable* owner, bool read, bool write) {
        epoll_event event{};
        event.events = (read ? std::uint32_t{EPOLLIN} : 0u) | (write ? std::uint32_t{EPOLLOUT} : 0u);
        event.data.ptr = owner;
        return ::epoll_ctl(epoll_.descriptor(), operation, descriptor, &event) == 0;
    }

    OwnedDescriptor epoll_;
    epoll_event events_[batch];
};
using SystemPoller = EpollPoller;

#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) || \
    defined(__DragonFly__)

class KqueuePoller final : public Poller {
public:
    KqueuePoller() : queue_(::kqueue()) {
        if (!queue_) throw Error("Loop: kqueue: " + os::error_text(errno));
        ::fcntl(queue_.descriptor(), F_SETFD, FD_CLOEXEC);
    }
    const char* name() const override { return "kqueue"; }
    bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        return control(descriptor, &owner, EVFILT_READ, EV_ADD | (read ? EV_ENABLE : EV_DISABLE)) &&
               control(descriptor, &owner, EVFILT_WRITE, EV_ADD | (write ? EV_ENABLE : EV_DISABLE));
    }
    bool change(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        return add(descriptor, owner, read, write);
    }
    void remove(os::Descriptor descriptor) override {
        control(descriptor, nullptr, EVFILT_READ, EV_DELETE);
        control(descriptor, nullptr, EVFILT_WRITE, EV_DELETE);
    }
    void wait(int timeout_ms, std::vector<Ready>& ready) override {
        ready.clear();
        timespec timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1000000L};
        const int count =
            ::kevent(queue_.descriptor(), nullptr, 0, events_, batch, timeout_ms < 0 ? nullptr : &timeout);
        for (int i = 0; i < count; ++i) {
            const struct kevent& event = events_[i];
            // The end of the stream is read as such; only where nobody reads is it news.
            const bool broken = event.filter == EVFILT_WRITE && (event.flags & EV_EOF) != 0;
            ready.push_back({static_cast<Pollable*>(event.udata), event.filter == EVFILT_READ,
                             event.filter == EVFILT_WRITE, broken});
        }
    }

private:
    static constexpr int batch = 512;

    bool control(os::Descriptor descriptor, Pollable* owner, int filter, int flags) {
        struct kevent event;
        EV_SET(&event, static_cast<uintptr_t>(descriptor), static_cast<short>(filter),
               static_cast<unsigned short>(flags), 0, 0, owner);
        return ::kevent(queue_.descriptor(), &event, 1, nullptr, 0, nullptr) == 0;
    }

    OwnedDescriptor queue_;
    struct kevent events_[batch];
};
using SystemPoller = KqueuePoller;

#else
using SystemPoller = PollPoller;
#endif

inline std::unique_ptr<Poller> Poller::make(PollerKind kind) {
    if (kind == PollerKind::poll) return std::make_unique<PollPoller>();
    return std::make_unique<SystemPoller>();
}

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 11: TLS
//
// TlsStream: TLS 1.2 and 1.3 by OpenSSL, as bytes in and bytes out, for either side; and what puts one between a socket
// and the server's session. Compiled with WSCHAT_OPENSSL only. Knows nothing of HTTP, of WebSocket or of loops.
// ====================================================================================================================

#if WSCHAT_OPENSSL

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#if OPENSSL_VERSION_NUMBER < 0x10101000L
#error "wschat.hpp needs OpenSSL 1.1.1 or newer"
#endif

WSCHAT_BEGIN

namespace detail {

// What OpenSSL gives and takes back.
template <auto Free>
struct TlsFree {
    template <class Object>
    void operator()(Object* object) const {
        Free(object);
    }
};
template <class Object, auto Free>
using TlsOwned = std::unique_ptr<Object, TlsFree<Free>>;

// Of this thread's error queue the oldest entry, which is the cause of the others, or the oldest of that library; the
// queue is empty afterwards.
inline std::string take_tls_error(int library = 0) {
    unsigned long code = ERR_get_error();
    while (const unsigned long next = ERR_get_error())
        if (ERR_GET_LIB(code) != library && ERR_GET_LIB(next) == library) code = next;
    if (ERR_GET_LIB(code) == ERR_LIB_SYS) return std::generic_category().message(ERR_GET_REASON(code));
    const char* reason = ERR_reason_error_string(code);
    return reason != nullptr ? reason : "unknown error";
}

}  // namespace detail

// PEM files: a certificate, with those that lead to a root after it, and its private key.
struct TlsCertificate {
    std::string certificate;
    std::string key;
};

// For Server::listen_tls(). All files are PEM.
struct TlsOptions {
    std::string certificate;     // with those that lead to a root after it
    std::string key;             // its private key
    std::string key_password{};  // of every key that is encrypted
    // For further hosts: a client gets the one that is for the name it asks for (SNI), the first where none is.
    std::vector<TlsCertificate> more{};
    // Where it is set, clients are asked for a certificate that one of the authorities in this file has signed; see
    // Request::client_certificate().
    std::string client_authorities{};
    bool require_client_certificate = true;  // false: a client may have none; a wrong one is refused all the same
};

namespace detail {

// For the client's side of a TlsStream.
struct TlsClientOptions {
    std::string authorities{};  // a PEM file; empty: those that the system trusts
    std::string certificate{};  // where the server asks for one
    std::string key{};
    std::string key_password{};
    // Neither who signed the server's certificate nor its name is looked at: whoever stands between can read and change
    // everything.
    bool accept_any_certificate = false;
};

// Certificates, keys and rules: what the streams of a listener have in common. Making one is an Error where a file can
// not be used, with its name and OpenSSL's reason.
class TlsContext {
public:
    explicit TlsContext(const TlsOptions& options) {
        add(TLS_server_method(), {options.certificate, options.key}, options.key_password);
        for (const TlsCertificate& more : options.more) add(TLS_server_method(), more, options.key_password);
        for (const Context& context : contexts_) ask_for_certificates(context.get(), options);
        SSL_CTX_set_cert_cb(contexts_.front().get(), &choose, this);
    }
    explicit TlsContext(const TlsClientOptions& options) : verify_(!options.accept_any_certificate) {
        add(TLS_client_method(), {options.certificate, options.key}, options.key_password);
        SSL_CTX* context = contexts_.front().get();
        const unsigned char http[] = "\x08http/1.1";
        SSL_CTX_set_alpn_protos(context, http, sizeof http - 1);
        if (!verify_) return;
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER, nullptr);
        const std::string& file = options.authorities;
        if (file.empty()) SSL_CTX_set_default_verify_paths(context);
        else if (SSL_CTX_load_verify_locations(context, file.c_str(), nullptr) != 1) fail("authorities", file);
    }
    TlsContext(const TlsContext&) = delete;
    TlsContext& operator=(const TlsContext&) = delete;

    SSL_CTX* get() const { return contexts_.front().get(); }
    bool verifies() const { return verify_; }

private:
    using Context = TlsOwned<SSL_CTX, &SSL_CTX_free>;

    [[noreturn]] static void fail(const char* what, const std::string& file) {
        throw Error(std::string("TLS ") + what + " \"" + file + "\": " + take_tls_error());
    }

    void add(const SSL_METHOD* method, const TlsCertificate& files, const std::string& password) {
        ERR_clear_error();
        Context made(SSL_CTX_new(method));
        if (!made) throw Error("TLS: " + take_tls_error());
        SSL_CTX* context = made.get();
        SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
        SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
        SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        // Of TLS 1.2 only what has forward secrecy and authenticated encryption; TLS 1.3 has nothing else.
        SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20");
        // Tickets let a client resume without a table here that grows with those who have been.
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_alpn_select_cb(context, &choose_protocol, nullptr);
        if (!files.certificate.empty() || !files.key.empty() || method == TLS_server_method())
            load(context, files, password);
        contexts_.push_back(std::move(made));
    }

    static void load(SSL_CTX* context, const TlsCertificate& files, const std::string& password) {
        if (SSL_CTX_use_certificate_chain_file(context, files.certificate.c_str()) != 1)
            fail("certificate", files.certificate);
        // Without a callback OpenSSL would ask at the terminal.
        SSL_CTX_set_default_passwd_cb(context, &give_password);
        SSL_CTX_set_default_passwd_cb_userdata(context, const_cast<std::string*>(&password));
        const bool loaded = SSL_CTX_use_PrivateKey_file(context, files.key.c_str(), SSL_FILETYPE_PEM) == 1;
        SSL_CTX_set_default_passwd_cb_userdata(context, nullptr);
        if (!loaded) fail("key", files.key);
        if (SSL_CTX_check_private_key(context) != 1)
            throw Error("TLS key \"" + files.key + "\" does not belong to the certificate \"" + files.certificate +
                        "\": " + take_tls_error());
    }
    static int give_password(char* place, int room, int, void* password) {
        if (password == nullptr) return 0;
        const std::string& text = *static_cast<const std::string*>(password);
        if (text.size() > static_cast<std::size_t>(room)) return 0;
        std::memcpy(place, text.data(), text.size());
        return static_cast<int>(text.size());
    }

    static void ask_for_certificates(SSL_CTX* context, const TlsOptions& options) {
        const std::string& file = options.client_authorities;
        if (file.empty()) return;
        STACK_OF(X509_NAME)* names = SSL_load_client_CA_file(file.c_str());
        if (names == nullptr) fail("client_authorities", file);
        SSL_CTX_set_client_CA_list(context, names);
        if (SSL_CTX_load_verify_locations(context, file.c_str(), nullptr) != 1) fail("client_authorities", file);
        const int required = options.require_client_certificate ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0;
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER | required, nullptr);
        // What a ticket proves holds for this server alone.
        const unsigned char id[] = "wschat";
        SSL_CTX_set_session_id_context(context, id, sizeof id - 1);
    }

    // RFC 6066 3: the certificate for the name that the client asks for.
    static int choose(SSL* ssl, void* self) {
        const char* name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
        if (name == nullptr) return 1;
        for (const Context& context : static_cast<TlsContext*>(self)->contexts_) {
            X509* certificate = SSL_CTX_get0_certificate(context.get());
            if (X509_check_host(certificate, name, 0, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS, nullptr) != 1) continue;
            SSL_set_SSL_CTX(ssl, context.get());
            break;
        }
        return 1;
    }

    // RFC 7301 3.2: "In the event that the server supports no protocols that the client advertises, then the server SHALL
    // respond with a fatal 'no_application_protocol' alert."
    static int choose_protocol(SSL*, const unsigned char** chosen, unsigned char* size, const unsigned char* offered,
                               unsigned offered_size, void*) {
        constexpr std::string_view http = "http/1.1";
        for (unsigned at = 0; at < offered_size; at += 1u + offered[at]) {
            const std::string_view name(reinterpret_cast<const char*>(offered) + at + 1, offered[at]);
            if (name != http) continue;
            *chosen = offered + at + 1;
            *size = offered[at];
            return SSL_TLSEXT_ERR_OK;
        }
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    }

    std::vector<Context> contexts_;  // one for each certificate
    bool verify_ = false;
};

// One connection's encryption: ciphertext goes in and out as bytes, in any pieces. Calls no socket and keeps no time.
class TlsStream {
public:
    enum class Outcome : std::uint8_t {
        done,
        need_more,  // ciphertext from the peer
        end,        // the peer has said that nothing more comes (close_notify)
        failure     // failure() says why; an alert that tells the peer may lie in output()
    };
    struct Result {
        Outcome outcome;
        std::size_t size = 0;
    };
    // What one record holds at most (RFC 8446 5.1).
    static constexpr std::size_t max_record = 16 * 1024;

    // A server's side.
    explicit TlsStream(std::shared_ptr<const TlsContext> context) : context_(std::move(context)) {
        make();
        SSL_set_accept_state(ssl_.get());
    }
    // A client's side; `host` is the name or the address that the server's certificate must be for.
    TlsStream(std::shared_ptr<const TlsContext> context, std::string_view host) : context_(std::move(context)) {
        make();
        SSL_set_connect_state(ssl_.get());
        expect(std::string(host));
    }
    TlsStream(const TlsStream&) = delete;
    TlsStream& operator=(const TlsStream&) = delete;

    // ---- input -----------------------------------------------------------------------------------------------------

    // Ciphertext from the peer; it must stay until read() has answered need_more, or keep_input() was called.
    void receive(std::string_view ciphertext) {
        // No record begins with a letter, and every HTTP method and answer does.
        if (!begun_ && !ciphertext.empty()) {
            begun_ = true;
            plain_text_ = ciphertext.front() >= 'A' && ciphertext.front() <= 'Z';
            if (plain_text_) failure_ = "the peer speaks plain text";
        }
        if (input_.empty()) {
            kept_.release();
            input_ = ciphertext;
        } else {
            hold(ciphertext);
        }
    }
    // Decrypts, as much as there is room for and input. Makes the handshake on the way.
    Result read(char* data, std::size_t size) {
        std::size_t done = 0;
        while (done < size) {
            std::size_t part = 0;
            const Result step = run([&] { return SSL_read_ex(ssl_.get(), data + done, size - done, &part); });
            if (step.outcome != Outcome::done) return done != 0 ? Result{Outcome::done, done} : step;
            done += part;
        }
        return {Outcome::done, done};
    }
    // Puts aside what read() has not come to.
    void keep_input() {
        if (input_.empty()) kept_.release();
        else if (kept_.empty()) hold({});
    }
    // Whether read() may have more without further input.
    bool has_input() const { return failure_.empty() && (!input_.empty() || SSL_pending(ssl_.get()) != 0); }

    // ---- output ----------------------------------------------------------------------------------------------------

    // Begins or goes on with the handshake, for a client that has nothing to read yet.
    Result handshake() {
        return run([&] { return SSL_do_handshake(ssl_.get()); });
    }
    // Encrypts all of it, at most max_record bytes.
    Result write(std::string_view plaintext) {
        if (plaintext.empty()) return {Outcome::done, 0};
        std::size_t written = 0;
        const Result step = run([&] { return SSL_write_ex(ssl_.get(), plaintext.data(), plaintext.size(), &written); });
        return {step.outcome, written};
    }
    // Tells the peer that nothing more comes (close_notify).
    void shutdown() {
        if (!established_ || shut_ || !failure_.empty()) return;
        shut_ = true;
        run([&] { return SSL_shutdown(ssl_.get()) < 0 ? 0 : 1; });
    }

    // Ciphertext for the peer.
    std::string_view output() const { return output_.view().substr(sent_); }
    void consume(std::size_t n) {
        sent_ += n;
        if (sent_ != output_.size()) return;
        output_.clear();
        sent_ = 0;
    }
    // While there is no output, a block of somebody else may serve for it.
    void borrow(Bytes& block) { output_.swap(block); }
    // Gives the block back; what is still to be sent is kept in one of its size.
    void give_back(Bytes& block) {
        Bytes own;
        own.append(output());
        output_.swap(block);
        block.clear();
        output_.swap(own);
        sent_ = 0;
    }
    void release_output() { output_.release(); }

    // ---- state -----------------------------------------------------------------------------------------------------

    // The handshake is done, and the peer is who it must be.
    bool established() const { return established_; }
    const std::string& failure() const { return failure_; }
    bool plain_text() const { return plain_text_; }
    // "TLSv1.3", "TLS_AES_256_GCM_SHA384", "http/1.1" or nothing.
    std::string_view version() const { return SSL_get_version(ssl_.get()); }
    std::string_view cipher() const { return SSL_get_cipher_name(ssl_.get()); }
    std::string_view protocol() const {
        const unsigned char* name = nullptr;
        unsigned size = 0;
        SSL_get0_alpn_selected(ssl_.get(), &name, &size);
        return {reinterpret_cast<const char*>(name), size};
    }
    // Whether keys of an earlier connection were used again.
    bool resumed() const { return SSL_session_reused(ssl_.get()) == 1; }
    // The subject of the peer's certificate as RFC 2253 writes it; empty where it showed none.
    std::string peer_name() const {
        const TlsOwned<X509, &X509_free> certificate(SSL_get_peer_certificate(ssl_.get()));
        if (!certificate) return {};
        const TlsOwned<BIO, &BIO_free> text(BIO_new(BIO_s_mem()));
        if (!text) throw std::bad_alloc();
        X509_NAME_print_ex(text.get(), X509_get_subject_name(certificate.get()), 0, XN_FLAG_RFC2253);
        char* data = nullptr;
        const long size = BIO_get_mem_data(text.get(), &data);
        return {data, static_cast<std::size_t>(size)};
    }
    // For what is not offered here.
    SSL* native() { return ssl_.get(); }

private:
    // A peer may cause output and not read it (changes of keys); no honest one comes near that.
    static constexpr std::size_t max_output = 128 * 1024;

    void make() {
        ERR_clear_error();
        method_.reset(BIO_meth_new(BIO_TYPE_SOURCE_SINK, "wschat"));
        ssl_.reset(SSL_new(context_->get()));
        BIO* bio = method_ && ssl_ ? BIO_new(method_.get()) : nullptr;
        if (bio == nullptr) throw std::bad_alloc();
        BIO_meth_set_read(method_.get(), &give);
        BIO_meth_set_write(method_.get(), &take);
        BIO_meth_set_ctrl(method_.get(), &control);
        BIO_set_data(bio, this);
        BIO_set_init(bio, 1);
        SSL_set_bio(ssl_.get(), bio, bio);
    }

    void expect(const std::string& host) {
        SSL* ssl = ssl_.get();
        const bool address = IpAddress::parse(host).has_value();
        // RFC 6066 3: "Literal IPv4 and IPv6 addresses are not permitted in "HostName"."
        if (!address)
            SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, const_cast<char*>(host.c_str()));
        if (!context_->verifies()) return;
        SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        const int set = address ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host.c_str())
                                : SSL_set1_host(ssl, host.c_str());
        if (set != 1 || host.empty()) throw Error("TLS: \"" + escape_for_log(host) + "\" is no name of a server");
    }

    void hold(std::string_view more) {
        Bytes joined;
        joined.reserve(input_.size() + more.size());
        joined.append(input_);
        joined.append(more);
        kept_ = std::move(joined);
        input_ = kept_.view();
    }

    // Makes one call of OpenSSL, which answers 1 for success. What other calls have left in the thread's error queue
    // does not decide, and what this one leaves is taken out.
    template <class Call>
    Result run(Call&& call) {
        if (!failure_.empty()) return {Outcome::failure};
        ERR_clear_error();
        const int answer = call();
        const int error = answer == 1 ? SSL_ERROR_NONE : SSL_get_error(ssl_.get(), answer);
        if (!established_ && SSL_is_init_finished(ssl_.get()) == 1) established_ = true;
        switch (error) {
            case SSL_ERROR_NONE: return {Outcome::done};
            case SSL_ERROR_WANT_READ: return {Outcome::need_more};
            case SSL_ERROR_ZERO_RETURN: input_ = {}; return {Outcome::end};
            default: break;
        }
        failure_ = take_tls_error(ERR_LIB_SSL);
        if (refusal_ != nullptr) failure_ = refusal_;
        const long verdict = SSL_get_verify_result(ssl_.get());
        if (verdict != X509_V_OK && !established_) (failure_ += ": ") += X509_verify_cert_error_string(verdict);
        input_ = {};
        return {Outcome::failure};
    }

    static TlsStream& of(BIO* bio) {
        BIO_clear_retry_flags(bio);
        return *static_cast<TlsStream*>(BIO_get_data(bio));
    }
    static int give(BIO* bio, char* place, int room) {
        std::string_view& input = of(bio).input_;
        const std::size_t size = (std::min)(input.size(), static_cast<std::size_t>(room));
        if (size == 0) {
            BIO_set_retry_read(bio);
            return -1;
        }
        std::memcpy(place, input.data(), size);
        input.remove_prefix(size);
        return static_cast<int>(size);
    }
    // Everything is taken, so that nothing has to be written again.
    static int take(BIO* bio, const char* data, int size) noexcept {
        TlsStream& stream = of(bio);
        try {
            if (stream.output().size() > max_output) stream.refusal_ = "the peer does not read";
            else stream.output_.append(data, static_cast<std::size_t>(size));
        } catch (const std::bad_alloc&) {  // nothing is thrown through OpenSSL
            stream.refusal_ = "out of memory";
        }
        return stream.refusal_ == nullptr ? size : -1;
    }
    static long control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

    std::shared_ptr<const TlsContext> context_;
    TlsOwned<BIO_METHOD, &BIO_meth_free> method_;
    TlsOwned<SSL, &SSL_free> ssl_;
    std::string_view input_;
    Bytes kept_;  // what input_ is a part of, where it was put aside
    Bytes output_;
    std::size_t sent_ = 0;  // of the output
    std::string failure_;
    const char* refusal_ = nullptr;  // why output was not taken
    bool begun_ = false;
    bool plain_text_ = false;
    bool established_ = false;
    bool shut_ = false;
};

// The blocks that all TLS connections of a listener share, so that an idle one holds none.
struct TlsBlocks {
    std::vector<char> received = std::vector<char>(64 * 1024);
    std::vector<char> record = std::vector<char>(TlsStream::max_record);
    Bytes output;
};

// A TlsStream between a connection and its socket.
class TlsTransport final : public Transport {
public:
    template <class... StreamArguments>
    explicit TlsTransport(std::shared_ptr<TlsBlocks> blocks, StreamArguments&&... arguments)
        : blocks_(std::move(blocks)), stream_(std::forward<StreamArguments>(arguments)...) {}

    IoResult receive(Socket& socket, char* data, std::size_t size, WireCount& wire) override {
        borrow();
        const IoResult got = decrypt(socket, data, size, wire);
        stream_.keep_input();
        // A handshake's answer or an alert. Where it can not be sent now, the poller is asked.
        push(socket, wire);
        give_back();
        return got;
    }

    IoResult send(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) override {
        borrow();
        const IoResult sent = encrypt(socket, pieces, count, wire);
        give_back();
        return sent;
    }

    bool has_input() const override { return stream_.has_input(); }
    bool wants_write() const override { return !stream_.output().empty(); }
    bool established() const override { return stream_.established(); }
    bool end(Socket& socket, WireCount& wire) override {
        stream_.shutdown();
        return push(socket, wire).outcome != IoResult::Outcome::would_block;
    }
    const std::string& failure() const override { return stream_.failure(); }
    bool plain_text() const override { return stream_.plain_text(); }
    std::string peer_name() const override { return stream_.peer_name(); }

private:
    // What is encrypted before the kernel is asked to take it.
    static constexpr std::size_t batch = 64 * 1024;

    // While nothing is owed, the block of all serves for the output.
    void borrow() {
        borrowed_ = !wants_write();
        if (borrowed_) stream_.borrow(blocks_->output);
    }
    void give_back() {
        if (borrowed_) stream_.give_back(blocks_->output);
        else if (!wants_write()) stream_.release_output();
    }

    IoResult decrypt(Socket& socket, char* data, std::size_t size, WireCount& wire) {
        TlsStream::Result got = stream_.read(data, size);
        if (got.outcome == TlsStream::Outcome::need_more) {
            // Little more than there is room for, so that little has to be put aside.
            const std::size_t wanted = (std::min)(blocks_->received.size(), size + TlsStream::max_record);
            const IoResult raw = socket.receive(blocks_->received.data(), wanted);
            if (raw.outcome != IoResult::Outcome::done) return raw;
            wire.received += raw.size;
            stream_.receive({blocks_->received.data(), raw.size});
            got = stream_.read(data, size);
        }
        switch (got.outcome) {
            case TlsStream::Outcome::done: return {IoResult::Outcome::done, got.size, 0};
            case TlsStream::Outcome::need_more: return {IoResult::Outcome::would_block, 0, 0};
            case TlsStream::Outcome::end: return {IoResult::Outcome::end, 0, 0};
            default: return {IoResult::Outcome::error, 0, 0};
        }
    }

    // Sends what is owed. would_block: the kernel does not take all of it now.
    IoResult push(Socket& socket, WireCount& wire) {
        while (wants_write()) {
            const std::string_view owed = stream_.output();
            const IoResult sent = socket.send(&owed, 1);
            wire.sent += sent.size;
            stream_.consume(sent.size);
            if (sent.outcome == IoResult::Outcome::error) return {sent.outcome, 0, sent.error};
            if (sent.size < owed.size()) return {IoResult::Outcome::would_block, 0, 0};
        }
        return {IoResult::Outcome::done, 0, 0};
    }

    // Encrypts only what the kernel takes, but for the last batch: that is owed, and its bytes are not counted as sent
    // before it has gone.
    IoResult encrypt(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) {
        Rest rest{pieces, count};
        std::size_t done = 0;
        if (!stream_.established()) stream_.handshake();
        for (;;) {
            IoResult pushed = push(socket, wire);
            if (pushed.outcome == IoResult::Outcome::done && !rest.empty()) {
                rest.skip(sealed_);
                done += std::exchange(sealed_, 0u);
            }
            pushed.size = done;
            if (pushed.outcome != IoResult::Outcome::done || rest.empty() || !stream_.established()) return pushed;
            if (!seal(rest)) {
                const bool failed = !stream_.failure().empty();
                return {failed ? IoResult::Outcome::error : IoResult::Outcome::would_block, done, 0};
            }
        }
    }

    // What is left of the pieces.
    struct Rest {
        const std::string_view* pieces;
        std::size_t count;
        std::size_t begin = 0;  // in the first of them

        bool empty() const { return count == 0; }
        std::string_view first() const { return pieces->substr(begin); }
        void skip(std::size_t n) {
            for (; count != 0 && n >= first().size(); ++pieces, --count, begin = 0) n -= first().size();
            begin += n;
        }
    };

    // Encrypts the next batch; nothing is owed before. False: the stream takes none of it.
    bool seal(Rest rest) {
        while (!rest.empty() && sealed_ < batch) {
            const std::string_view record = next_record(rest);
            if (stream_.write(record).outcome != TlsStream::Outcome::done) break;
            rest.skip(record.size());
            sealed_ += record.size();
        }
        return sealed_ != 0;
    }
    // As much as a record holds, so that small messages share one: in place where that is one piece.
    std::string_view next_record(Rest rest) {
        const std::string_view first = rest.first().substr(0, TlsStream::max_record);
        if (first.size() == TlsStream::max_record || rest.count == 1) return first;
        char* const joined = blocks_->record.data();
        std::size_t size = 0;
        while (!rest.empty() && size < TlsStream::max_record) {
            const std::string_view part = rest.first().substr(0, TlsStream::max_record - size);
            std::memcpy(joined + size, part.data(), part.size());
            size += part.size();
            rest.skip(part.size());
        }
        return {joined, size};
    }

    std::shared_ptr<TlsBlocks> blocks_;
    TlsStream stream_;
    std::size_t sealed_ = 0;  // bytes that are encrypted, and not counted as sent while output is owed
    bool borrowed_ = false;
};

// The TLS of one listener.
class TlsListener final : public TransportFactory {
public:
    explicit TlsListener(TlsOptions options)
        : options_(std::move(options)), context_(std::make_shared<const TlsContext>(options_)) {}

    std::unique_ptr<Transport> make() override { return std::make_unique<TlsTransport>(blocks_, context_); }
    void reload() override { context_ = std::make_shared<const TlsContext>(options_); }

private:
    TlsOptions options_;
    std::shared_ptr<const TlsContext> context_;
    std::shared_ptr<TlsBlocks> blocks_ = std::make_shared<TlsBlocks>();
};

}  // namespace detail

// A certificate for trials, of EC P-256 and signed with its own key, of which browsers warn; the texts of its PEM files.
// For host names and addresses: {"localhost", "127.0.0.1"}.
inline TlsCertificate make_self_signed_certificate(const std::vector<std::string>& hosts, int days = 365) {
    const auto require = [](bool good) {
        if (!good) throw Error("make_self_signed_certificate: " + detail::take_tls_error());
    };
    ERR_clear_error();
    EVP_PKEY* generated = nullptr;
    const detail::TlsOwned<EVP_PKEY_CTX, &EVP_PKEY_CTX_free> generator(EVP_PKEY_CTX_new_id(EVP_PKEY_EC, nullptr));
    require(generator && EVP_PKEY_keygen_init(generator.get()) == 1 &&
            EVP_PKEY_CTX_set_ec_paramgen_curve_nid(generator.get(), NID_X9_62_prime256v1) == 1 &&
            EVP_PKEY_keygen(generator.get(), &generated) == 1);
    const detail::TlsOwned<EVP_PKEY, &EVP_PKEY_free> key(generated);
    const detail::TlsOwned<X509, &X509_free> made(X509_new());
    X509* const certificate = made.get();
    const detail::TlsOwned<BIGNUM, &BN_free> serial(BN_new());
    require(made && serial && BN_rand(serial.get(), 127, BN_RAND_TOP_ANY, BN_RAND_BOTTOM_ANY) == 1 &&
            BN_to_ASN1_INTEGER(serial.get(), X509_get_serialNumber(certificate)) != nullptr);
    X509_set_version(certificate, 2);
    X509_time_adj_ex(X509_getm_notBefore(certificate), -1, 0, nullptr);
    X509_time_adj_ex(X509_getm_notAfter(certificate), days, 0, nullptr);

    std::string names;
    for (const std::string& host : hosts)
        names += (names.empty() ? "" : ",") + std::string(IpAddress::parse(host) ? "IP:" : "DNS:") + host;
    X509_NAME* subject = X509_get_subject_name(certificate);
    const std::string common = hosts.empty() ? "" : hosts.front();
    require(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8,
                                       reinterpret_cast<const unsigned char*>(common.c_str()), -1, -1, 0) == 1 &&
            X509_set_issuer_name(certificate, subject) == 1 && X509_set_pubkey(certificate, key.get()) == 1);
    const std::pair<int, const char*> extensions[] = {{NID_subject_alt_name, names.c_str()},
                                                      {NID_basic_constraints, "critical,CA:FALSE"},
                                                      {NID_key_usage, "critical,digitalSignature"},
                                                      {NID_ext_key_usage, "serverAuth"}};
    for (const auto& [name, value] : extensions) {
        X509V3_CTX context{};
        X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
        const detail::TlsOwned<X509_EXTENSION, &X509_EXTENSION_free> extension(
            X509V3_EXT_nconf_nid(nullptr, &context, name, value));
        require(extension && X509_add_ext(certificate, extension.get(), -1) == 1);
    }
    require(X509_sign(certificate, key.get(), EVP_sha256()) != 0);

    const auto text = [&](auto&& write) {
        const detail::TlsOwned<BIO, &BIO_free> pem(BIO_new(BIO_s_mem()));
        require(pem && write(pem.get()) == 1);
        char* data = nullptr;
        const long size = BIO_get_mem_data(pem.get(), &data);
        return std::string(data, static_cast<std::size_t>(size));
    };
    return {text([&](BIO* pem) { return PEM_write_bio_X509(pem, certificate); }), text([&](BIO* pem) {
                return PEM_write_bio_PrivateKey(pem, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
            })};
}

WSCHAT_END

#endif  // WSCHAT_OPENSSL

// ====================================================================================================================
// section 12: Loop
//
// One thread's turns: wait for sockets, call their owners, run timers and what other threads have posted, then the
// hooks that end a turn. Knows nothing of what the owners do.
// ====================================================================================================================

#include <atomic>
#include <csignal>
#include <mutex>

WSCHAT_BEGIN

namespace detail {

// Something that happens at a time. It stands in the heap of its loop at most once, and is not owned by it.
class Timer {
public:
    Timer() = default;
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    virtual ~Timer() = default;
    virtual void on_timer(Time now) = 0;
    bool scheduled() const { return index_ != none; }
    Time due() const { return due_; }

private:
    friend class Timers;
    static constexpr std::size_t none = static_cast<std::size_t>(-1);

    Time due_{};
    std::size_t index_ = none;
};

// A binary heap whose entries know their places: every operation costs O(log n), and none allocates in the long run.
class Timers {
public:
    // Sets or moves the timer; Time::max() cancels it.
    void schedule(Timer& timer, Time due) {
        if (due == (Time::max)()) return cancel(timer);
        if (!timer.scheduled()) {
            heap_.push_back(&timer);
            timer.index_ = heap_.size() - 1;
        }
        timer.due_ = due;
        settle(timer.index_);
    }
    void cancel(Timer& timer) {
        if (!timer.scheduled()) return;
        const std::size_t hole = std::exchange(timer.index_, Timer::none);
        Timer* last = heap_.back();
        heap_.pop_back();
        if (last == &timer) return;
        put(hole, last);
        settle(hole);
    }
    Time next() const { return heap_.empty() ? (Time::max)() : heap_.front()->due_; }
    void run_due(Time now) {
        while (next() <= now) {
            Timer& timer = *heap_.front();
            cancel(timer);
            timer.on_timer(now);
        }
    }

private:
    void put(std::size_t at, Timer* timer) {
        heap_[at] = timer;
        timer->index_ = at;
    }
    // Moves the entry up or down to where it belongs.
    void settle(std::size_t at) {
        Timer* timer = heap_[at];
        for (; at != 0 && timer->due_ < heap_[(at - 1) / 2]->due_; at = (at - 1) / 2) put(at, heap_[(at - 1) / 2]);
        for (;;) {
            std::size_t child = 2 * at + 1;
            if (child >= heap_.size()) break;
            if (child + 1 < heap_.size() && heap_[child + 1]->due_ < heap_[child]->due_) ++child;
            if (!(heap_[child]->due_ < timer->due_)) break;
            put(at, heap_[child]);
            at = child;
        }
        put(at, timer);
    }

    std::vector<Timer*> heap_;
};

// While one lives, SIGINT and SIGTERM wake the loops that asked for them, and do nothing else; afterwards they do what
// they did before. On Windows the same for Ctrl-C and the closing of the console.
class SignalGuard {
public:
    explicit SignalGuard(os::Descriptor wake) : slot_(take_slot(wake)) {
        const std::lock_guard<std::mutex> lock(mutex());
        if (users()++ == 0) install();
    }
    SignalGuard(const SignalGuard&) = delete;
    SignalGuard& operator=(const SignalGuard&) = delete;
    ~SignalGuard() {
        const std::lock_guard<std::mutex> lock(mutex());
        if (--users() == 0) restore();
        slot_->store(os::no_descriptor);
        // Another thread may be at waking this loop; afterwards its descriptor may be closed, and be something else.
        while (slots().handlers.load() != 0) os::yield();
    }

private:
    using Slot = std::atomic<os::Descriptor>;
    static constexpr std::size_t max_loops = 64;

    struct Slots {
        Slots() {
            for (Slot& slot : list) slot.store(os::no_descriptor);
        }
        Slot list[max_loops];
        std::atomic<int> handlers{0};  // that run just now
    };
    static Slots& slots() {
        static Slots all;
        return all;
    }
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }
    static int& users() {
        static int count = 0;
        return count;
    }
    static Slot* take_slot(os::Descriptor wake) {
        for (Slot& slot : slots().list) {
            os::Descriptor empty = os::no_descriptor;
            if (slot.compare_exchange_strong(empty, wake)) return &slot;
        }
        throw Error("Loop: more than " + std::to_string(max_loops) + " loops handle signals");
    }
    static void wake_all(int signal) {
        ++slots().handlers;
        for (Slot& slot : slots().list) {
            const os::Descriptor wake = slot.load();
            if (wake != os::no_descriptor) WakeUp::wake(wake, static_cast<char>(signal));
        }
        --slots().handlers;
    }

#if defined(_WIN32)
    static BOOL WINAPI handle(DWORD) {
        wake_all(SIGINT);
        return TRUE;
    }
    static void install() { ::SetConsoleCtrlHandler(&handle, TRUE); }
    static void restore() { ::SetConsoleCtrlHandler(&handle, FALSE); }
#else
    static void handle(int signal) {
        const int saved = errno;
        wake_all(signal);
        errno = saved;
    }
    static struct sigaction* before() {
        static struct sigaction actions[2];
        return actions;
    }
    static void install() {
        struct sigaction action {};
        action.sa_handler = &handle;
        action.sa_flags = SA_RESTART;
        ::sigemptyset(&action.sa_mask);
        ::sigaction(SIGINT, &action, &before()[0]);
        ::sigaction(SIGTERM, &action, &before()[1]);
    }
    static void restore() {
        ::sigaction(SIGINT, &before()[0], nullptr);
        ::sigaction(SIGTERM, &before()[1], nullptr);
    }
#endif

    Slot* slot_;
};

}  // namespace detail

class Loop {
public:
    using TimerId = std::uint64_t;

    WSCHAT_COLD explicit Loop(PollerKind kind = PollerKind::automatic)
        : poller_(detail::Poller::make(kind)),
          mailbox_(std::make_shared<LoopMailbox>()),
          waker_(*this),
          now_(Clock::now()) {
        if (!poller_->add(mailbox_->wake_up.descriptor(), waker_, true, false))
            throw Error("Loop: " + std::string(poller_->name()) + ": " +
                        detail::os::error_text(detail::os::last_error()));
    }
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;
    WSCHAT_COLD ~Loop() { mailbox_->close(); }

    // Runs turns until stop().
    void run() {
        stop_ = false;
        thread_.store(this_thread());
        while (!stop_) turn();
        thread_.store(nullptr);
    }
    // Ends run() after this turn.
    void stop() { stop_ = true; }

    // Runs the work on the loop's thread, in the order of the calls. The one call that any thread may make. False: the
    // loop is gone. An exception that leaves the work is logged.
    bool post(std::function<void()> work) { return mailbox_->post(std::move(work)); }
    // For threads that may outlive the loop.
    std::shared_ptr<Mailbox> mailbox() const { return mailbox_; }

    // Calls once, after the delay.
    TimerId call_later(Duration delay, std::function<void()> call) {
        return add_call(delay, Duration::zero(), std::move(call));
    }
    // Calls again and again, the first time after one interval. Calls that were missed are not made up for. An
    // interval of zero or less is an Error.
    TimerId call_every(Duration interval, std::function<void()> call) {
        if (interval <= Duration::zero()) throw Error("call_every: the interval is not positive");
        return add_call(interval, interval, std::move(call));
    }
    // False where the call was made or cancelled already.
    bool cancel(TimerId id) { return calls_.erase(big_endian_key(id)); }

    // The time of this turn.
    Time now() const { return now_; }
    // True on the loop's thread, and as long as the loop does not run.
    bool on_loop_thread() const {
        const void* thread = thread_.load(std::memory_order_relaxed);
        return thread == nullptr || thread == this_thread();
    }

    // ---- for servers -----------------------------------------------------------------------------------------------

    detail::Poller& poller() { return *poller_; }
    detail::Timers& timers() { return timers_; }
    detail::os::Descriptor wake_descriptor() const { return mailbox_->wake_up.write_end(); }
    // Called at the end of each turn; true: it has left something to do, and the next turn is not to wait.
    void at_turn_end(std::function<bool()> hook) { turn_end_ = std::move(hook); }
    void on_signal(std::function<void(int)> handler) { on_signal_ = std::move(handler); }
    // Told of what leaves posted work and timers.
    void on_exception(std::function<void(const char* where, const char* what)> handler) {
        on_exception_ = std::move(handler);
    }

private:
    class LoopMailbox final : public Mailbox {
    public:
        bool post(std::function<void()> work) override {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!open_) return false;
            work_.push_back(std::move(work));
            if (!has_work.exchange(true)) detail::WakeUp::wake(wake_up.write_end(), 0);
            return true;
        }
        std::vector<std::function<void()>> take() {
            const std::lock_guard<std::mutex> lock(mutex_);
            has_work.store(false);
            return std::exchange(work_, {});
        }
        void close() {
            std::vector<std::function<void()>> undone;  // destroyed without the lock
            const std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;
            undone.swap(work_);
        }

        detail::WakeUp wake_up;
        std::atomic<bool> has_work{false};

    private:
        std::mutex mutex_;
        std::vector<std::function<void()>> work_;
        bool open_ = true;
    };

    class Waker final : public detail::Pollable {
    public:
        explicit Waker(Loop& loop) : loop_(loop) {}
        void on_ready(bool, bool, bool) override {
            loop_.mailbox_->wake_up.drain([this](char byte) {
                if (byte != 0 && loop_.on_signal_) loop_.on_signal_(byte);
            });
        }

    private:
        Loop& loop_;
    };

    // A call that a user asked for.
    class Call final : public detail::Timer {
    public:
        Call(Loop& loop, TimerId id, Time due, Duration interval, std::function<void()> call)
            : loop_(loop), id_(id), interval_(interval), call_(std::move(call)) {
            loop_.timers_.schedule(*this, due);
        }
        ~Call() override { loop_.timers_.cancel(*this); }
        void on_timer(Time now) override {
            // The call may cancel itself, and this is no more then.
            Loop& loop = loop_;
            const std::string id = big_endian_key(id_);
            std::function<void()> call = std::move(call_);
            if (interval_ == Duration::zero()) loop.calls_.erase(id);
            else loop.timers_.schedule(*this, (std::max)(due() + interval_, now + Duration(1)));
            loop.guarded("timer", call);
            if (Call* still = loop.calls_.find(id)) still->call_ = std::move(call);
        }

    private:
        Loop& loop_;
        TimerId id_;
        Duration interval_;
        std::function<void()> call_;
    };

    // An address that only this thread has.
    static const void* this_thread() {
        static thread_local char marker;
        return &marker;
    }

    TimerId add_call(Duration delay, Duration interval, std::function<void()> call) {
        const TimerId id = ++last_call_;
        calls_.find_or_emplace(big_endian_key(id), *this, id, later(Clock::now(), delay), interval, std::move(call));
        return id;
    }

    void turn() {
        try {
            poller_->wait(timeout_ms(), ready_);
        } catch (const std::bad_alloc&) {  // what was left out is reported again
        }
        now_ = Clock::now();
        for (const detail::Poller::Ready& ready : ready_)
            guarded("loop", [&] { ready.owner->on_ready(ready.readable, ready.writable, ready.broken); });
        timers_.run_due(now_);
        if (mailbox_->has_work.load())
            for (const auto& work : mailbox_->take()) guarded("post", work);
        again_ = turn_end_ && turn_end_();
    }

    // Rounded up, so that a timer that is nearly due does not spin.
    int timeout_ms() const {
        if (again_ || stop_ || mailbox_->has_work.load()) return 0;
        if (timers_.next() == (Time::max)()) return -1;
        const auto left = timers_.next() - Clock::now();
        if (left <= Duration::zero()) return 0;
        const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left).count() + 1;
        return ms > 60'000 ? 60'000 : static_cast<int>(ms);
    }

    template <class Call>
    void guarded(const char* where, Call&& call) {
        try {
            call();
        } catch (const std::exception& error) {
            if (on_exception_) on_exception_(where, error.what());
        } catch (...) {
            if (on_exception_) on_exception_(where, "not a std::exception");
        }
    }

    std::unique_ptr<detail::Poller> poller_;
    std::shared_ptr<LoopMailbox> mailbox_;
    Waker waker_;
    detail::Timers timers_;
    StringMap<Call> calls_;  // by number
    TimerId last_call_ = 0;
    std::vector<detail::Poller::Ready> ready_;
    Time now_;
    std::atomic<const void*> thread_{nullptr};
    bool stop_ = false;
    bool again_ = false;
    std::function<bool()> turn_end_;
    std::function<void(int)> on_signal_;
    std::function<void(const char*, const char*)> on_exception_;
};

WSCHAT_END

// ====================================================================================================================
// section 13: Site
//
// What is served, the same for every loop: patterns, routes, pages, files, and policies on origins, hosts and proxies.
// Plain values. Does not know sockets or loops.
// ====================================================================================================================

#include <tuple>

WSCHAT_BEGIN

namespace detail {

// ---- what a path means ---------------------------------------------------------------------------------------------

// The pattern of a route: "/chat/{room}" matches "/chat/tea%20room" with room = "tea room". A parameter matches one
// segment that is not empty; "{name...}" at the end matches all that is left, slashes and nothing included.
class Pattern {
public:
    struct Match {
        std::vector<std::pair<std::string, std::string>> params;
        std::vector<std::string> rest;  // the segments, decoded one by one, that "{name...}" matched
    };

    // An Error where the text is no pattern; `call` is named in it.
    WSCHAT_COLD Pattern(const char* call, std::string_view pattern) : text_(pattern) {
        const std::string quoted = std::string(call) + " \"" + std::string(pattern) + "\": ";
        if (!text::starts_with(pattern, "/")) throw Error(quoted + "a path begins with a slash");
        for (std::string& text : split(pattern)) {
            if (open_ended_) throw Error(quoted + "nothing follows a {name...}");
            const bool param = text.size() > 2 && text.front() == '{' && text.back() == '}';
            if (param) text = text.substr(1, text.size() - 2);
            open_ended_ = param && text.size() >= 3 && text.substr(text.size() - 3) == "...";
            if (open_ended_) text.resize(text.size() - 3);
            if (text.find_first_of("{}?#%") != std::string::npos || (param && text.empty()))
                throw Error(quoted + "a segment is plain text, one {name} or, at the end, one {name...}");
            segments_.push_back({param, std::move(text)});
        }
    }

    const std::string& text() const { return text_; }

    std::optional<Match> match(std::string_view raw_path) const {
        Match match;
        if (!text::starts_with(raw_path, "/")) return std::nullopt;
        std::vector<std::string> parts = split(raw_path);
        if (open_ended_ ? parts.size() < segments_.size() : parts.size() != segments_.size()) return std::nullopt;
        for (std::size_t i = 0; i < parts.size(); ++i) {
            std::string part = text::percent_decoded(parts[i]).value_or(std::string());
            if (open_ended_ && i + 1 >= segments_.size()) match.rest.push_back(std::move(part));
            else if (segments_[i].param ? part.empty() : part != segments_[i].text) return std::nullopt;
            else if (segments_[i].param) match.params.emplace_back(segments_[i].text, std::move(part));
        }
        if (open_ended_) match.params.emplace_back(segments_.back().text, joined(match.rest));
        return match;
    }

    // Of two patterns that match, the one with the higher rank is meant: open-ended ones last, more text first.
    std::size_t rank() const {
        std::size_t rank = open_ended_ ? 0 : 1000;
        for (const Segment& segment : segments_) rank += segment.param ? 1 : 2;
        return rank;
    }
    // Whether no path could tell the two apart.
    friend bool operator==(const Pattern& a, const Pattern& b) {
        const auto same = [](const Segment& x, const Segment& y) {
            return x.param == y.param && (x.param || x.text == y.text);
        };
        return a.open_ended_ == b.open_ended_ && a.segments_.size() == b.segments_.size() &&
               std::equal(a.segments_.begin(), a.segments_.end(), b.segments_.begin(), same);
    }

private:
    struct Segment {
        bool param;
        std::string text;
    };
    static std::vector<std::string> split(std::string_view path) {
        std::vector<std::string> parts;
        path.remove_prefix(1);
        for (bool more = true; more;) {
            more = path.find('/') != std::string_view::npos;
            parts.emplace_back(text::cut_at(path, '/'));
        }
        return parts;
    }
    static std::string joined(const std::vector<std::string>& parts) {
        std::string path;
        for (const std::string& part : parts) (path += &part == &parts.front() ? "" : "/") += part;
        return path;
    }

    std::string text_;
    std::vector<Segment> segments_;
    bool open_ended_ = false;
};

// ---- files ---------------------------------------------------------------------------------------------------------

// A regular file, open for reading. Folders, devices and pipes are not opened.
class File {
public:
    File() = default;
    explicit File(const std::string& path) : File(opened(os::open_file(path.c_str()))) {}
    File(File&& other) noexcept
        : file_(std::exchange(other.file_, -1)),
          error_(other.error_),
          size_(other.size_),
          modified_ns_(other.modified_ns_) {}
    File& operator=(File&& other) noexcept {
        std::swap(file_, other.file_);
        error_ = other.error_;
        size_ = other.size_;
        modified_ns_ = other.modified_ns_;
        return *this;
    }
    ~File() { close(); }

    // root/names[0]/names[1]/...: never anything outside of the root, a hidden file or what a link points to.
    static File beneath(const std::string& root, const std::vector<std::string>& names) {
        for (const std::string& name : names)
            if (!plain_name(name)) return File(-1, ENOENT);
        return opened(os::open_file_beneath(root, names));
    }

    explicit operator bool() const { return file_ >= 0; }
    int error() const { return error_; }  // why there is none
    std::uint64_t size() const { return size_; }
    std::int64_t modified_seconds() const { return modified_ns_ / 1'000'000'000; }
    // RFC 9110 8.8.3. What was written anew differs in its size or its time.
    std::string etag() const {
        char text[64];
        std::snprintf(text, sizeof text, "\"%llx-%llx\"", static_cast<unsigned long long>(size_),
                      static_cast<unsigned long long>(modified_ns_));
        return text;
    }
    // 0 at the end and on an error.
    std::size_t read(char* data, std::size_t size) {
        const std::ptrdiff_t n = os::read_file(file_, data, size);
        return n > 0 ? static_cast<std::size_t>(n) : 0;
    }
    void close() {
        if (file_ >= 0) os::close_file(std::exchange(file_, -1));
    }

private:
    static File opened(int file) { return File(file, errno); }
    File(int file, int error) : file_(file), error_(file < 0 ? error : 0) {
        os::FileStatus status{};
        if (file_ < 0) return;
        const bool known = os::file_status(file_, status);
        if (!known || !os::regular(status)) {
            error_ = !known ? errno : os::folder(status) ? EISDIR : ENOENT;
            close();
            return;
        }
        size_ = static_cast<std::uint64_t>(status.st_size);
        modified_ns_ = os::modified_ns(status);
    }

    // No way up, no hidden file, no separator of any system, nothing that Windows reads as a device or a stream.
    static bool plain_name(const std::string& name) {
        return !name.empty() && name.front() != '.' &&
               name.find_first_of(std::string_view("/\\:\0", 4)) == std::string::npos && name.back() != ' ' &&
               name.back() != '.';
    }

    int file_ = -1;
    int error_ = 0;
    std::uint64_t size_ = 0;
    std::int64_t modified_ns_ = 0;
};

WSCHAT_COLD inline std::string_view content_type(std::string_view name) {
    constexpr std::pair<std::string_view, std::string_view> types[] = {
        {"html", "text/html; charset=utf-8"},
        {"htm", "text/html; charset=utf-8"},
        {"css", "text/css; charset=utf-8"},
        {"js", "text/javascript; charset=utf-8"},
        {"mjs", "text/javascript; charset=utf-8"},
        {"json", "application/json"},
        {"map", "application/json"},
        {"txt", "text/plain; charset=utf-8"},
        {"md", "text/markdown; charset=utf-8"},
        {"csv", "text/csv; charset=utf-8"},
        {"xml", "application/xml"},
        {"svg", "image/svg+xml"},
        {"png", "image/png"},
        {"jpg", "image/jpeg"},
        {"jpeg", "image/jpeg"},
        {"gif", "image/gif"},
        {"webp", "image/webp"},
        {"avif", "image/avif"},
        {"ico", "image/x-icon"},
        {"woff2", "font/woff2"},
        {"woff", "font/woff"},
        {"wasm", "application/wasm"},
        {"pdf", "application/pdf"},
        {"mp3", "audio/mpeg"},
        {"ogg", "audio/ogg"},
        {"mp4", "video/mp4"},
        {"webm", "video/webm"},
        {"webmanifest", "application/manifest+json"},
    };
    const std::size_t dot = name.rfind('.');
    if (dot == std::string_view::npos) return "application/octet-stream";
    for (const auto& [extension, type] : types)
        if (text::same_ignoring_case(name.substr(dot + 1), extension)) return type;
    return "application/octet-stream";
}

// Whether the client's copy is still good (RFC 9110 13.1.2, 13.1.3: If-None-Match before If-Modified-Since). A date is
// compared as text: what clients send back is the Last-Modified that they were given.
inline bool not_modified(const Request& request, const std::string& etag, const std::string& last_modified) {
    if (request.fields().find("if-none-match")) {
        bool match = false;
        request.fields().each_element("if-none-match", [&](std::string_view tag) {
            if (text::starts_with(tag, "W/")) tag.remove_prefix(2);
            match = match || tag == "*" || tag == etag;
        });
        return match;
    }
    return request.header("if-modified-since") == last_modified;
}

}  // namespace detail

// "page.html" of a source file's folder: beside(__FILE__, "page.html").
inline std::string beside(std::string_view source_file, std::string_view name) {
    const std::size_t slash = source_file.find_last_of("/\\");
    return std::string(source_file.substr(0, slash == std::string_view::npos ? 0 : slash + 1)) + std::string(name);
}

WSCHAT_END

// ====================================================================================================================
// section 14: Server
//
// Sessions, listeners, metrics and the server: reads sockets, drives the protocol, calls handlers, flushes. The one
// section that knows everything above.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

// How often each of some numbers has come, in their order. Keys are ints and enumerators of all kinds, and the bodies the
// same for all.
class Counters {
public:
    struct Entry {
        int key;
        std::uint64_t count;
    };

    bool empty() const { return entries_.empty(); }
    std::vector<Entry>::const_iterator begin() const { return entries_.begin(); }
    std::vector<Entry>::const_iterator end() const { return entries_.end(); }

protected:
    std::uint64_t& counter(int key) {
        auto at = entries_.begin();
        while (at != entries_.end() && at->key < key) ++at;
        if (at == entries_.end() || at->key != key) at = entries_.insert(at, {key, 0});
        return at->count;
    }
    std::uint64_t value(int key) const {
        for (const Entry& entry : entries_)
            if (entry.key == key) return entry.count;
        return 0;
    }

private:
    std::vector<Entry> entries_;
};

template <class Key>
class CountersOf : public Counters {
public:
    std::uint64_t& operator[](Key key) { return counter(static_cast<int>(key)); }
    // 0 where it has not come yet.
    std::uint64_t at(Key key) const { return value(static_cast<int>(key)); }
};

}  // namespace detail

// Counters since the start, and what is open now. Messages and bytes are payloads and octets on sockets.
struct Metrics {
    std::uint64_t connections_accepted = 0;
    std::uint64_t connections_open = 0;
    std::uint64_t connections_refused = 0;  // 503 at the limit of connections, in all or of one address
    std::uint64_t tls_handshakes = 0;       // that were completed
    std::uint64_t tls_failures = 0;         // handshakes that failed, and connections that broke the protocol later
    std::uint64_t requests = 0;
    std::uint64_t websockets_opened = 0;
    std::uint64_t websockets_open = 0;
    std::uint64_t messages_received = 0;
    std::uint64_t messages_sent = 0;
    std::uint64_t messages_dropped = 0;  // by BacklogPolicy::drop
    std::uint64_t bytes_received = 0;
    std::uint64_t bytes_sent = 0;
    std::uint64_t backlog_bytes = 0;  // waiting for slow peers now
    std::uint64_t handler_exceptions = 0;
    std::uint64_t log_entries_suppressed = 0;
    std::uint64_t rooms = 0;
    detail::CountersOf<int> responses;          // by HTTP status
    detail::CountersOf<CloseCause> closed;      // WebSocket connections, by cause
    detail::CountersOf<CloseCode> close_codes;  // and by code
};

// Metrics in the text format that Prometheus reads (version 0.0.4).
WSCHAT_COLD inline std::string prometheus_text(const Metrics& metrics) {
    std::string text;
    const auto head = [&](const char* name, const char* type, const char* help) {
        ((((text += "# HELP wschat_") += name) += ' ') += help) += '\n';
        ((((text += "# TYPE wschat_") += name) += ' ') += type) += '\n';
    };
    const auto line = [&](const std::string& name, std::uint64_t value) {
        (((text += "wschat_") += name) += ' ') += std::to_string(value);
        text += '\n';
    };
    const auto single = [&](const char* name, const char* type, const char* help, std::uint64_t value) {
        head(name, type, help);
        line(name, value);
    };
    single("connections_accepted_total", "counter", "Connections accepted.", metrics.connections_accepted);
    single("connections_open", "gauge", "Connections open now.", metrics.connections_open);
    single("connections_refused_total", "counter", "Connections refused at a limit.", metrics.connections_refused);
    single("tls_handshakes_total", "counter", "TLS handshakes completed.", metrics.tls_handshakes);
    single("tls_failures_total", "counter", "TLS connections that failed.", metrics.tls_failures);
    single("requests_total", "counter", "HTTP requests, handshakes included.", metrics.requests);
    single("websockets_opened_total", "counter", "WebSocket connections opened.", metrics.websockets_opened);
    single("websockets_open", "gauge", "WebSocket connections open now.", metrics.websockets_open);
    single("messages_received_total", "counter", "Messages received.", metrics.messages_received);
    single("messages_sent_total", "counter", "Messages queued for a peer.", metrics.messages_sent);
    single("messages_dropped_total", "counter", "Messages dropped for slow peers.", metrics.messages_dropped);
    single("bytes_received_total", "counter", "Bytes received.", metrics.bytes_received);
    single("bytes_sent_total", "counter", "Bytes sent.", metrics.bytes_sent);
    single("backlog_bytes", "gauge", "Bytes waiting for slow peers now.", metrics.backlog_bytes);
    single("handler_exceptions_total", "counter", "Exceptions that left a callback.", metrics.handler_exceptions);
    single("log_entries_suppressed_total", "counter", "Log entries over the rate limit.",
           metrics.log_entries_suppressed);
    single("rooms", "gauge", "Rooms with members now.", metrics.rooms);
    head("responses_total", "counter", "HTTP responses, by status.");
    for (const auto& [status, count] : metrics.responses)
        line("responses_total{status=\"" + std::to_string(status) + "\"}", count);
    head("closed_total", "counter", "WebSocket connections closed, by cause.");
    for (const auto& [cause, count] : metrics.closed)
        line("closed_total{cause=\"" + std::string(to_string(static_cast<CloseCause>(cause))) + "\"}", count);
    head("close_codes_total", "counter", "WebSocket connections closed, by close code.");
    for (const auto& [code, count] : metrics.close_codes)
        line("close_codes_total{code=\"" + std::to_string(code) + "\"}", count);
    return text;
}

struct ServerOptions {
    Limits limits;  // of each connection whose route has no limits of its own
    ServerLimits server_limits;
    PollerKind poller = PollerKind::automatic;
    // From listen() to the end of run(), SIGINT and SIGTERM mean shutdown(); a second one ends at once.
    bool handle_signals = true;
    bool reuse_port = false;      // SO_REUSEPORT: several servers, one a thread or a process, share a port
    bool require_origin = false;  // refuse a handshake without an Origin header, from what is no browser
};

// A WebSocket route. Server::route() makes it.
class Route {
public:
    using Factory = std::function<std::unique_ptr<WebSocketHandler>()>;

    Route(detail::Pattern pattern, Factory factory) : pattern_(std::move(pattern)), factory_(std::move(factory)) {}

    // Replaces all of ServerOptions::limits for the connections of this route; start from a copy of Server::limits().
    Route& set_limits(const Limits& limits) {
        limits_ = limits;
        return *this;
    }
    const Limits& limits(const Limits& servers) const { return limits_ ? *limits_ : servers; }
    const detail::Pattern& pattern() const { return pattern_; }
    std::unique_ptr<WebSocketHandler> make_handler() const { return factory_(); }

private:
    detail::Pattern pattern_;
    Factory factory_;
    std::optional<Limits> limits_;
};

class Server final : private detail::HandlerHost {
public:
    WSCHAT_COLD explicit Server(ServerOptions options = {})
        : options_(std::move(options)), loop_(options_.poller), rooms_(arena_) {
        receive_buffer_.reserve(receive_size);
        loop_.at_turn_end([this] { return end_turn(); });
        loop_.on_signal([this](int) { on_signal(); });
        loop_.on_exception([this](const char* where, const char* what) { report_exception(where, what, nullptr); });
        reserve_descriptor();
    }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;
    // Connections that are still open end without a closing handshake; their on_close() is called.
    WSCHAT_COLD ~Server() {
        drop_all();
        dig();
    }

    // ---- routes and pages, before run() or in callbacks ------------------------------------------------------------

    // Each connection to the pattern gets a handler of its own, made with copies of the arguments (std::ref passes a
    // reference). A pattern that was given before is an Error.
    template <class Handler, class... Arguments>
    Route& route(std::string_view pattern, Arguments&&... arguments) {
        return add_route(pattern, [stored =
                                       std::tuple<std::decay_t<Arguments>...>(std::forward<Arguments>(arguments)...)] {
            return std::apply(
                [](const auto&... a) -> std::unique_ptr<WebSocketHandler> { return std::make_unique<Handler>(a...); },
                stored);
        });
    }
    Route& add_route(std::string_view pattern, Route::Factory factory) {
        detail::Pattern parsed("route", pattern);
        for (const auto& [number, route] : routes_)
            if (route.pattern() == parsed) throw Error("route \"" + std::string(pattern) + "\": given twice");
        return routes_.append(std::move(parsed), std::move(factory));
    }

    // A small answer, made by a function for each GET or HEAD. An exception out of it is a 500.
    void get(std::string_view pattern, std::function<Response(const Request&)> answer) {
        add_page(detail::Pattern("get", pattern),
                 [answer = std::move(answer)](Session& session, const Request& request, const detail::Pattern::Match&) {
                     session.respond(answer(request), &request);
                 });
    }
    // One file, read anew for each request that does not have it yet. A relative path is looked up from the working
    // directory, then from the program's own folder. A file that is not there is an Error.
    void file(std::string_view pattern, std::string_view path) {
        const std::string found = find_file(std::string(pattern), std::string(path));
        add_page(detail::Pattern("file", pattern),
                 [found](Session& session, const Request& request, const detail::Pattern::Match&) {
                     session.respond_file(detail::File(found), detail::content_type(found), request);
                 });
    }
    // The files below a folder; "index.html" for a folder. No listings, no hidden files, no symbolic links, no way out.
    // A folder that is not there is an Error.
    void static_dir(std::string_view pattern, std::string_view folder) {
        const std::string root = detail::os::absolute_path(std::string(folder));
        const detail::File probe = detail::File(root);
        if (probe || probe.error() != EISDIR)
            throw Error("static_dir \"" + std::string(pattern) + "\": " + std::string(folder) + " is not a folder");
        const bool slash = detail::Pattern("static_dir", pattern).text().back() == '/';
        const std::string below = std::string(pattern) + (slash ? "" : "/") + "{path...}";
        add_page(detail::Pattern("static_dir", below),
                 [root](Session& session, const Request& request, const detail::Pattern::Match& match) {
                     session.respond_below(root, match.rest, request);
                 });
    }
    // metrics() as Prometheus reads it. It is for everybody who can reach the server.
    void metrics_page(std::string_view pattern) {
        get(pattern,
            [this](const Request&) { return Response(200, prometheus_text(metrics()), "text/plain; version=0.0.4"); });
    }

    // Origins that may connect beside the server's own: "https://chat.example", or "*" for all. An Error where one is
    // no origin.
    void allow_origins(const std::vector<std::string>& origins) {
        for (const std::string& origin : origins) {
            const auto normal = detail::normalized_origin(origin);
            if (origin != "*" && !normal)
                throw Error("allow_origins: \"" + origin + "\" is not an origin, as https://chat.example is");
            origins_.push_back(normal.value_or("*"));
        }
    }
    // Where it is set, a request for another host is a 421; this defends pages in a private network from DNS rebinding.
    void allow_hosts(const std::vector<std::string>& hosts) {
        for (const std::string& host : hosts) hosts_.push_back(text::lowered(host));
    }
    // Proxies ("10.0.0.0/8", "unix") whose X-Forwarded-For is believed, read from the right.
    void trusted_proxies(const std::vector<std::string>& proxies) {
        for (const std::string& proxy : proxies) trusted_proxies_.emplace_back(proxy);
    }
    // Gets every log entry, on the loop's thread; entries that peers cause are limited to 100 a second. Silent without.
    void on_log(std::function<void(const LogEntry&)> log) { log_ = std::move(log); }

    // ---- running ---------------------------------------------------------------------------------------------------

    // On 127.0.0.1; 0: the system picks a port, see port(). An Error where the system refuses.
    void listen(int port) { listen(std::to_string(port)); }
    // "8888", "0.0.0.0:8888", "[::1]:80", "*:80", "unix:/run/chat.sock".
    void listen(std::string_view address) { add_listener(address, nullptr); }
#if WSCHAT_OPENSSL
    // The same with TLS: https and wss. An Error too where a file can not be read or a key does not match.
    void listen_tls(int port, TlsOptions tls) { listen_tls(std::to_string(port), std::move(tls)); }
    void listen_tls(std::string_view address, TlsOptions tls) {
        add_listener(address, std::make_shared<detail::TlsListener>(std::move(tls)));
    }
#endif
    // Reads the certificates of all listeners anew; who is connected stays so. An Error where a file is not right; that
    // listener then keeps what it has.
    void reload_certificates() {
        for (const auto& [number, listener] : listeners_) listener.reload();
    }
    // Of the first listener.
    int port() const { return listeners_.empty() ? 0 : listeners_.front().address().port; }
    // "http://127.0.0.1:8888/" or "https://...", of the first listener.
    std::string url() const {
        if (listeners_.empty()) return {};
        const detail::ListenAddress& address = listeners_.front().address();
        const std::string scheme = listeners_.front().secure() ? "https://" : "http://";
        return address.unix_path.empty() ? scheme + address.to_string() + "/" : address.to_string();
    }

    // Serves until shutdown() has ended it.
    void run() {
        if (draining_ && sessions_.empty()) return;
        if (listeners_.empty() && !draining_) throw Error("run: nothing to serve: call listen() first");
        handle_signals();
        loop_.run();
        signals_.reset();
    }
    // From any thread: stops accepting, closes every connection with 1001, and ends run() when all are gone, at the
    // latest after the deadline.
    void shutdown(Duration deadline = std::chrono::seconds(5)) {
        loop_.post([this, deadline] { begin_shutdown(deadline); });
    }

    // The one object of a type that belongs to this server: made as Extension(server) when it is first asked for, and
    // destroyed before the loop and the rooms are.
    template <class Extension>
    Extension& extension() {
        static char key;
        for (const auto& [known, object] : extensions_)
            if (known == &key) return *static_cast<Extension*>(object.get());
        extensions_.emplace_back(&key, detail::make_owned<Extension>(*this));
        return *static_cast<Extension*>(extensions_.back().second.get());
    }
    // A log entry of what is built on the server.
    void report(LogLevel level, std::string_view event, std::vector<std::pair<std::string_view, std::string>> fields) {
        log(level, event, std::move(fields));
    }

    Loop& loop() override { return loop_; }
    Rooms& rooms() override { return rooms_; }
    const Limits& limits() const { return options_.limits; }
    const ServerLimits& server_limits() const { return options_.server_limits; }
    detail::SendArena& arena() { return arena_; }

    // On the loop's thread.
    Metrics metrics() const {
        Metrics now = metrics_;
        now.connections_open = sessions_.size();
        now.rooms = rooms_.size();
        now.backlog_bytes = backlog_;
        now.bytes_received = wire_.received;
        now.bytes_sent = wire_.sent;
        for (const auto& session : sessions_) session->add_to(now);
        return now;
    }

private:
    class Listener;
    class Session;
    using Page = std::function<void(Session&, const Request&, const detail::Pattern::Match&)>;
    using LogFields = std::vector<std::pair<std::string_view, std::string>>;

    static constexpr std::size_t receive_size = 64 * 1024;
    static constexpr std::size_t descriptors_kept = 64;  // for files, pipes and whatever the program opens itself
    static constexpr std::size_t turned_away_at_once = 32;
    static constexpr unsigned handshakes_at_once = 64;  // steps of TLS handshakes in one turn

    // ---- one connection --------------------------------------------------------------------------------------------

    // From the accept to the last byte: first HTTP, then perhaps WebSocket, at last lingering, when our last byte is
    // sent and input is only discarded, because closing with unread input would destroy what the peer has not read.
    class Session final : public detail::Pollable, public detail::Timer {
    public:
        Session(Server& server, detail::Socket socket, const IpAddress& peer,
                std::unique_ptr<detail::Transport> transport)
            : server_(server),
              socket_(std::move(socket)),
              transport_(std::move(transport)),
              http_(std::make_unique<Http>(server.limits())),
              peer_(peer) {}
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
        ~Session() override { server_.loop_.timers().cancel(*this); }

        // The server's lists, linked through the sessions so that none is forgotten for want of memory.
        std::size_t index = 0;
        Session* next_dirty = nullptr;
        std::unique_ptr<Session> next_buried;

        // Its end of a turn comes next.
        void prefetch() const {
            detail::HandlerAccess::prefetch(handler_.get());
            if (next_dirty != nullptr) detail::prefetch(next_dirty, 2);
        }

        bool gone() const { return phase_ == Phase::gone; }
        std::size_t backlog() const { return counted_backlog_; }

        // `full`: only to be told so.
        void start(bool full) {
            protect([&] {
                schedule(after(limits().handshake_timeout));
                if (!server_.loop_.poller().add(socket_.descriptor(), *this, true, false)) return remove();
                if (full || (!server_.trusted(peer_) && !count_address(peer_))) respond(server_.too_many(), nullptr);
            });
        }

        // ---- called by the loop and the server ---------------------------------------------------------------------

        void on_ready(bool readable, bool writable, bool broken) override {
            if (gone()) return;
            protect([&] {
                if (writable) {
                    blocked_ = false;
                    flush();
                }
                if (readable && reading()) read();
                else if (broken && !gone()) lose("the connection was reset");
                mark_dirty();
            });
        }

        void on_timer(Time now) override {
            protect([&] {
                if (phase_ == Phase::websocket) {
                    connection().tick(now);
                    schedule(connection().deadline());
                    mark_dirty();
                } else if (phase_ == Phase::http && http_->parser.started() && !busy()) {
                    respond(Response(408, "The request did not arrive in time.\n"), nullptr);
                    schedule(after(limits().linger_timeout));
                } else {
                    remove();
                }
            });
        }

        // The end of a turn in which something happened here.
        void settle() {
            dirty_ = false;
            if (handler_) core().dirty = false;
            if (gone()) return;
            protect([&] {
                if (transport_) settle_transport();
                if (phase_ == Phase::websocket) settle_websocket();
                else if (!gone()) settle_http();
                if (!gone()) watch();
            });
        }

        void mark_dirty() {
            if (!std::exchange(dirty_, true)) server_.dirty_.push(*this);
        }

        // The server shuts down: an upgraded connection gets a Close frame, an answer is finished, the rest ends.
        void shut_down() {
            if (phase_ == Phase::websocket)
                protect([this] {
                    connection().close(CloseCode::going_away, "server is shutting down", server_.now(),
                                       CloseCause::shutdown);
                });
            else if (phase_ == Phase::http && !busy()) return remove();
            else if (phase_ == Phase::http) http_->keep_alive = false;
            if (!gone()) mark_dirty();
        }
        // Ends it at once, as far as it has not ended.
        void abort(CloseCause cause, std::string_view reason) {
            if (gone()) return;
            if (phase_ == Phase::websocket) {
                connection().abort(cause, reason);
                end_handler();
            }
            remove();
        }

        // One call of the system; answers how many bytes it took.
        std::size_t offer(const std::string_view* pieces, std::size_t count) {
            std::size_t size = 0;
            for (std::size_t i = 0; i < count; ++i) size += pieces[i].size();
            if (blocked_ || lost_) return 0;
            return note_sent(transport_ ? transport_->send(socket_, pieces, count, server_.wire_)
                                        : count_sent(socket_.send(pieces, count)),
                             size);
        }
        // What came of offering so many bytes.
        std::size_t note_sent(const detail::IoResult& sent, std::size_t size) {
            lost_ = sent.outcome == detail::IoResult::Outcome::error;
            blocked_ = !lost_ && (sent.size < size || (transport_ && transport_->wants_write()));
            if (phase_ == Phase::websocket) {
                connection().set_write_blocked(blocked_);
                if (lost_) connection().abort(CloseCause::connection_lost, error_text(sent));
            }
            return sent.size;
        }

        // What may be sent together with what others send: all that is queued, where it is one piece. Empty: nothing.
        std::string_view batchable() {
            std::string_view piece;
            if (phase_ != Phase::websocket || transport_ || blocked_ || lost_ || output().gather(&piece, 1) == 0)
                return {};
            return piece.size() == output().size() ? piece : std::string_view();
        }
        detail::Socket& socket() { return socket_; }
        void note_batched(const detail::SendBatch::Item& item) {
            if (item.sent) output().consume(note_sent(count_sent(*item.sent), item.bytes.size()));
        }

        // Offers what is queued to the kernel.
        void flush() {
            detail::SendQueue& queue = output();
            const bool was_blocked = phase_ == Phase::websocket && connection().write_blocked();
            if (was_blocked && !blocked_) connection().send_pending_pong();
            const std::uint64_t sent_before = server_.wire_.sent;
            if (queue.empty() && transport_ && transport_->wants_write()) offer(nullptr, 0);
            while (!queue.empty() && !blocked_ && !lost_) {
                const std::size_t count = queue.gather(server_.pieces_.data(), detail::Socket::max_pieces);
                queue.consume(offer(server_.pieces_.data(), count));
            }
            const bool progress = server_.wire_.sent != sent_before;
            if (blocked_ && !lost_) queue.keep();
            if (phase_ == Phase::websocket) {
                connection().set_write_blocked(blocked_);
                if (was_blocked && progress) connection().record_activity(server_.now());
            } else if (progress && phase_ == Phase::http && (!transport_ || transport_->established())) {
                schedule(after(limits().handshake_timeout));
            }
            if (lost_) mark_dirty();
            const std::size_t held = queue.size() + (phase_ == Phase::websocket ? connection().buffered_input() : 0);
            server_.backlog_ += held - counted_backlog_;
            counted_backlog_ = held;
        }
        void set_nodelay(bool on) { socket_.set_nodelay(on); }
        void add_to(Metrics& metrics) const {
            if (!handler_) return;
            const detail::HandlerCore& core = detail::HandlerAccess::core(*handler_);
            metrics.messages_sent += core.messages_sent;
            metrics.messages_dropped += core.connection.dropped_messages();
        }

        // ---- answers, for pages ------------------------------------------------------------------------------------

        // Queues an answer. Where there is no request, or one that asks for it, the connection ends after it.
        WSCHAT_COLD void respond(const Response& response, const Request* request) {
            const bool body_allowed = response.status() != 204 && response.status() != 304;
            begin_response(response, request,
                           body_allowed ? std::optional<std::uint64_t>(response.body().size()) : std::nullopt);
            if (body_allowed && !http_->head_only) append(response.body());
        }

        // The same, and the connection ends after it.
        void respond_last(const Response& response, const Request& request) {
            http_->keep_alive = false;
            respond(response, &request);
        }

        WSCHAT_COLD void respond_file(detail::File file, std::string_view type, const Request& request) {
            if (!file) {
                server_.log(LogLevel::warning, "file_missing",
                            {{"path", request.path()}, {"cause", detail::os::error_text(file.error())}});
                return respond(no_file(file), &request);
            }
            const std::string etag = file.etag(), modified = detail::http_date(file.modified_seconds());
            const bool unchanged = detail::not_modified(request, etag, modified);
            Response response(unchanged ? 304 : 200);
            response.set_header("ETag", etag)
                .set_header("Last-Modified", modified)
                .set_header("Cache-Control", "no-cache");
            if (unchanged) return respond(response, &request);
            response.set_header("Content-Type", type);
            begin_response(response, &request, file.size());
            if (http_->head_only) return;
            http_->file_left = file.size();
            if (file.size() != 0) http_->file = std::move(file);
        }

        // Caches may keep a 404, so it is only for what will not be different a moment later.
        static Response no_file(const detail::File& file) {
            switch (file.error()) {
                case EMFILE:
                case ENFILE: return Response(503, "The server is full.\n");
                case EINTR:
                case EAGAIN:
                case EIO:
                case ENOMEM:
                case EOVERFLOW: return Response(503, "The file can not be read now.\n");
                default: return Response(404, "There is nothing at this path.\n");
            }
        }

        WSCHAT_COLD void respond_below(const std::string& root, std::vector<std::string> names,
                                       const Request& request) {
            if (names.back().empty()) names.back() = "index.html";
            detail::File file = detail::File::beneath(root, names);
            // No path that begins with two slashes comes so far, so this leads nowhere else.
            const std::string query = request.query_string().empty() ? "" : "?" + std::string(request.query_string());
            if (!file && file.error() == EISDIR)
                return respond(Response::redirect(std::string(request.raw_path()) + "/" + query, 301), &request);
            const std::string_view type = detail::content_type(names.back());
            if (!file) return respond(no_file(file), &request);
            respond_file(std::move(file), type, request);
        }

    private:
        enum class Phase : std::uint8_t { http, websocket, lingering, gone };

        // What only HTTP and lingering need; an upgraded connection has none.
        struct Http {
            explicit Http(const Limits& limits) : parser(limits) {}

            detail::RequestParser parser;
            detail::SendQueue output;
            std::string pending;  // pipelined bytes that wait for the answer before them
            detail::File file;    // the body that is being sent
            std::uint64_t file_left = 0;
            std::size_t discarded = 0;
            bool keep_alive = true;
            bool head_only = false;
            bool shut = false;  // our side of the stream is shut
        };

        detail::HandlerCore& core() { return detail::HandlerAccess::core(*handler_); }
        detail::Connection& connection() { return core().connection; }
        detail::SendQueue& output() { return phase_ == Phase::websocket ? connection().output() : http_->output; }
        const Limits& limits() const { return route_ != nullptr ? route_->limits(server_.limits()) : server_.limits(); }
        Time after(Duration timeout) const {
            return timeout == Duration::zero() ? (Time::max)() : later(server_.now(), timeout);
        }
        void schedule(Time due) { server_.loop_.timers().schedule(*this, due); }
        bool busy() const { return !http_->output.empty() || http_->file_left != 0; }
        bool reading() const {
            if (paused_ || input_ended_) return false;
            if (phase_ == Phase::lingering) return http_->discarded <= limits().linger_bytes;
            return phase_ != Phase::http || http_->pending.empty();
        }

        // Runs what may throw; what leaves it is logged. False: something has left it.
        template <class Work>
        bool attempt(const char* where, Work&& work) {
            try {
                work();
                return true;
            } catch (const std::exception& error) {
                server_.report_exception(where, error.what(), &peer_);
            } catch (...) {
                server_.report_exception(where, "not a std::exception", &peer_);
            }
            return false;
        }
        // What is thrown here, for want of memory, costs this connection.
        template <class Work>
        void protect(Work&& work) {
            if (!attempt("session", work)) abort(CloseCause::connection_lost, "out of memory");
        }

        detail::IoResult count_sent(const detail::IoResult& sent) {
            server_.wire_.sent += sent.size;
            return sent;
        }
        detail::IoResult receive(char* data, std::size_t size) {
            if (transport_) return transport_->receive(socket_, data, size, server_.wire_);
            const detail::IoResult got = socket_.receive(data, size);
            server_.wire_.received += got.size;
            return got;
        }
        std::string error_text(const detail::IoResult& result) const {
            return result.error != 0 || !transport_ ? detail::os::error_text(result.error) : transport_->failure();
        }

        // Tells the poller what is being waited for.
        void watch() {
            const bool read = reading(), write = transport_ ? transport_->wants_write() : blocked_;
            if (read == watching_read_ && write == watching_write_) return;
            // Unwatched it would wait for ever, and watched for what it does not want it would spin.
            if (!server_.loop_.poller().change(socket_.descriptor(), *this, read, write))
                return lose("can not be watched: " + detail::os::error_text(detail::os::last_error()));
            watching_read_ = read;
            watching_write_ = write;
        }

        void lose(std::string_view reason) { abort(CloseCause::connection_lost, reason); }

        void remove() {
            if (gone()) return;
            handler_.reset();
            phase_ = Phase::gone;
            server_.loop_.timers().cancel(*this);
            server_.loop_.poller().remove(socket_.descriptor());
            server_.backlog_ -= counted_backlog_;
            counted_backlog_ = 0;
            if (transport_ && !lost_) transport_->end(socket_, server_.wire_);
            socket_.close();
            transport_.reset();
            http_.reset();
            server_.bury(*this);
        }

        // ---- reading -----------------------------------------------------------------------------------------------

        void read() {
            // A peer that sends without a pause must leave the others their turn.
            for (int round = 0; round < 4 && !gone() && reading(); ++round) {
                if (transport_ && !secured_ && !server_.may_shake_hands()) return;
                char* place = server_.receive_buffer_.data();
                std::size_t room = server_.receive_buffer_.capacity();
                if (phase_ == Phase::websocket) {
                    const auto [area, area_size] = connection().receive_buffer();
                    if (area != nullptr) {
                        place = area;
                        room = area_size;
                    }
                }
                const detail::IoResult got = receive(place, room);
                if (got.outcome == detail::IoResult::Outcome::would_block) return;
                if (got.outcome != detail::IoResult::Outcome::done) return end_of_input(got);
                take(place, got.size);
                if (got.size < room && !(transport_ && transport_->has_input())) return;
            }
        }

        void take(char* data, std::size_t size) {
            if (phase_ == Phase::websocket) {
                connection().receive(data, size, server_.now());
                pump();
            } else if (phase_ == Phase::http) {
                feed({data, size});
            } else {
                http_->discarded += size;
            }
        }

        void end_of_input(const detail::IoResult& got) {
            const bool failed = transport_ && !transport_->failure().empty();
            if (failed) log_failure();
            if (phase_ == Phase::websocket) {
                connection().receive_eof(got.outcome == detail::IoResult::Outcome::error
                                             ? error_text(got)
                                             : "the peer hung up without a Close frame");
                pump();
            } else if (failed) {
                go_on_plainly();
            } else if (got.outcome == detail::IoResult::Outcome::end && busy()) {
                // The peer has shut its sending side, and may still wait for what is queued.
                input_ended_ = true;
                http_->keep_alive = false;
            } else {
                remove();
            }
        }

        // ---- encryption --------------------------------------------------------------------------------------------

        // What the poller does not tell: the handshake is done, or more has come than could be taken.
        void settle_transport() {
            if (!secured_ && transport_->established()) {
                secured_ = true;
                ++server_.metrics_.tls_handshakes;
            }
            if (blocked_ && !transport_->wants_write()) blocked_ = false;
            if (!transport_->has_input() || !reading()) return;
            read();
            mark_dirty();
        }

        WSCHAT_COLD void log_failure() {
            ++server_.metrics_.tls_failures;
            if (server_.log_)
                server_.log(LogLevel::info, "tls_failed",
                            {{"peer", peer_.to_string()}, {"cause", transport_->failure()}});
        }

        // The encryption has failed before there was a WebSocket. Whoever began in plain text is answered so; anybody
        // else has got an alert, which is not to be destroyed by a reset.
        WSCHAT_COLD void go_on_plainly() {
            const bool plain_text = transport_->plain_text();
            transport_.reset();
            blocked_ = false;
            if (plain_text) {
                if (!busy())
                    respond(Response(400,
                                     "This port speaks TLS, and the client began with plain HTTP: use https:// "
                                     "or wss://.\n"),
                            nullptr);
                return mark_dirty();
            }
            http_->output.clear();
            http_->file_left = 0;
            linger();
        }

        // ---- HTTP --------------------------------------------------------------------------------------------------

        void feed(std::string_view bytes) {
            while (!bytes.empty() && phase_ == Phase::http && !busy()) {
                std::size_t consumed = 0;
                const detail::RequestParser::Outcome outcome = http_->parser.feed(bytes, consumed);
                bytes.remove_prefix(consumed);
                if (outcome == detail::RequestParser::Outcome::need_more) return;
                if (outcome == detail::RequestParser::Outcome::failure)
                    return respond(Response(http_->parser.status(), http_->parser.reason() + "\n"), nullptr);
                answer(http_->parser.take_request(), bytes);
                if (phase_ == Phase::websocket) return;
            }
            // What comes after the last answer of a connection is not a request.
            if (!bytes.empty() && phase_ == Phase::http && http_->keep_alive) http_->pending.append(bytes);
        }

        WSCHAT_COLD void answer(Request request, std::string_view rest) {
            ++server_.metrics_.requests;
            if (transport_) request.set_secure(transport_->peer_name());
            if (server_.draining_) return respond_last(Response(503, "The server is shutting down.\n"), request);
            if (!server_.serves_host(request.host())) {
                const std::string host(request.host());
                return respond_last(Response(421, "This server does not serve the host \"" + host + "\".\n"), request);
            }
            if (detail::wants_upgrade(request)) return upgrade(std::move(request), rest);
            std::optional<detail::Pattern::Match> match;
            const PageEntry* page = best(server_.pages_, request.raw_path(), match);
            if (page == nullptr && best_route(request, match) != nullptr)
                return respond(detail::upgrade_required("There is a WebSocket at this path, and no page.\n"), &request);
            if (page == nullptr) return respond(Response(404, "There is nothing at this path.\n"), &request);
            if (request.method() != "GET" && request.method() != "HEAD") {
                Response refusal(405, "This path answers GET and HEAD.\n");
                return respond(refusal.set_header("Allow", "GET, HEAD"), &request);
            }
            if (request.has_body())
                return respond_last(Response(413, "A request to this server has no body.\n"), request);
            request.set_params(std::move(match->params));
            if (attempt("get", [&] { page->answer(*this, request, *match); })) return;
            // Half an answer can neither be taken back nor be followed by another.
            if (busy()) return lose("the answer was not finished");
            respond_last(Response(500, "The server failed to answer.\n"), request);
        }

        // Of a list of entries with patterns the one that is meant by the path, or null.
        template <class Entry>
        static const Entry* best(const StringMap<Entry>& entries, std::string_view path,
                                 std::optional<detail::Pattern::Match>& match) {
            const Entry* found = nullptr;
            for (const auto& [number, entry] : entries) {
                if (found != nullptr && found->pattern().rank() >= entry.pattern().rank()) continue;
                if (auto matched = entry.pattern().match(path)) {
                    found = &entry;
                    match = std::move(matched);
                }
            }
            return found;
        }
        const Route* best_route(const Request& request, std::optional<detail::Pattern::Match>& match) const {
            return best(server_.routes_, request.raw_path(), match);
        }

        // Queues the head of an answer; a length of nothing is that of an answer which has no body by its status.
        void begin_response(const Response& response, const Request* request, std::optional<std::uint64_t> length) {
            Http& http = *http_;
            http.head_only = request != nullptr && request->method() == "HEAD";
            http.keep_alive = http.keep_alive && request != nullptr && !request->http_1_0() && !request->has_body() &&
                              !server_.draining_ && !request->fields().has_element("connection", "close");
            std::string head = "HTTP/1.1 " + std::to_string(response.status()) + " ";
            (head += detail::reason_phrase(response.status())) += "\r\nDate: ";
            (head += detail::http_date(static_cast<std::int64_t>(std::time(nullptr)))) += "\r\n";
            std::string connection = http.keep_alive ? "" : "close";
            for (const auto& [name, value] : response.headers()) {
                if (text::same_ignoring_case(name, "connection"))
                    connection = value + (connection.empty() ? "" : ", ") + connection;
                else (((head += name) += ": ") += value) += "\r\n";
            }
            if (length) ((head += "Content-Length: ") += std::to_string(*length)) += "\r\n";
            if (!connection.empty()) ((head += "Connection: ") += connection) += "\r\n";
            head += "X-Content-Type-Options: nosniff\r\n\r\n";
            append(head);
            ++server_.metrics_.responses[response.status()];
            if (!http.keep_alive) http.pending.clear();
            mark_dirty();
        }

        void append(std::string_view bytes) {
            if (!bytes.empty()) output().append(detail::copy(server_.arena_, bytes));
        }

        void settle_http() {
            flush();
            // A file goes out piece by piece, as the peer takes it.
            for (int piece = 0; piece < 8 && http_->file_left != 0 && !blocked_ && !lost_; ++piece) {
                append_file_piece();
                flush();
            }
            if (lost_) return remove();
            if (busy()) return blocked_ ? void() : mark_dirty();
            if (phase_ == Phase::lingering || !http_->keep_alive) return linger();
            if (http_->pending.empty()) return;
            std::string pending = std::exchange(http_->pending, std::string());
            feed(pending);
        }

        void append_file_piece() {
            char piece[16 * 1024];
            const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(http_->file_left, sizeof piece));
            const std::size_t got = http_->file.read(piece, wanted);
            // A file that has become shorter can not keep the promise of its Content-Length.
            if (got == 0) lost_ = true;
            append({piece, got});
            http_->file_left -= got;
            if (http_->file_left == 0) http_->file.close();
        }

        // Our last byte is with the kernel: tells the peer so, and discards what still comes, for a bounded time.
        void linger() {
            if (http_->shut) return;
            phase_ = Phase::lingering;
            if (transport_ && !transport_->end(socket_, server_.wire_)) return;
            http_->shut = true;
            if (input_ended_) return remove();
            transport_.reset();  // what still comes is not looked at
            socket_.shutdown_send();
            schedule(after(limits().linger_timeout));
        }

        // ---- the opening handshake ---------------------------------------------------------------------------------

        void upgrade(Request request, std::string_view rest) {
            std::optional<detail::Pattern::Match> match;
            const Route* route = best_route(request, match);
            if (route == nullptr) return refuse(Response(404, "There is no WebSocket at this path.\n"), request);
            if (auto refusal = detail::refuse_upgrade(request)) return refuse(*refusal, request);
            const IpAddress client = server_.client_address(peer_, request);
            if (!count_address(client)) return refuse(server_.too_many(), request);
            request.set_params(std::move(match->params));
            route_ = route;
            std::optional<Response> refusal;
            detail::AcceptedCompression compression;
            const bool judged = attempt("handshake", [&] {
                handler_ = route->make_handler();
                if (!handler_) throw Error("route \"" + route->pattern().text() + "\": the factory made no handler");
                core().host = &server_;
                core().session = this;
                core().request = std::move(request);
                core().remote_address = client.to_string();
                refusal = judge_handshake();
                if (!refusal) compression = accept_compression();
            });
            if (judged && !refusal) return open_websocket(std::move(compression), rest);
            const std::unique_ptr<WebSocketHandler> refused = std::move(handler_);
            if (judged) return refuse(*refusal, detail::HandlerAccess::core(*refused).request);
            respond(Response(500, "The server failed to open the connection.\n"), nullptr);
        }

        // What the handler says of the request.
        std::optional<Response> judge_handshake() {
            const Request& request = core().request;
            const std::size_t origins = request.fields().count("origin");
            if (origins > 1) return Response(400, "There is more than one Origin header.\n");
            if (origins == 0 && server_.options_.require_origin)
                return Response(403, "A request without an Origin is refused here.\n");
            const std::string_view origin = request.header("origin");
            if (origins == 1 && !handler_->check_origin(origin))
                return Response(403, "The origin \"" + escape_for_log(origin) +
                                         "\" is refused; allowed: " + server_.allowed_origins(request) + ".\n");
            if (auto refusal = handler_->prepare(request)) return refusal;
            const std::vector<std::string_view> offered = detail::offered_subprotocols(request);
            if (offered.empty()) return std::nullopt;
            const std::string chosen = handler_->select_subprotocol(offered);
            for (const std::string_view each : offered)
                if (each == chosen) core().subprotocol = each;
            if (core().subprotocol.empty() && !chosen.empty())
                server_.log(LogLevel::warning, "subprotocol_not_offered", {{"subprotocol", chosen}});
            return std::nullopt;
        }

        detail::AcceptedCompression accept_compression() {
            const Fields offers = core().request.fields();
            if (!detail::compression_available || offers.count("sec-websocket-extensions") == 0) return {};
            const auto options = handler_->get_compression_options();
            if (!options) return {};
            if (!server_.compression_pool_) server_.compression_pool_ = std::make_unique<detail::CompressionPool>();
            return server_.compression_pool_->accept(offers, *options);
        }

        WSCHAT_COLD void refuse(const Response& response, const Request& request) {
            if (server_.log_)
                server_.log(LogLevel::info, "refused",
                            {{"status", std::to_string(response.status())},
                             {"peer", peer_.to_string()},
                             {"target", std::string(request.target())},
                             {"sentence", response.body().substr(0, response.body().find('\n'))}});
            respond_last(response, request);
        }

        void open_websocket(detail::AcceptedCompression compression, std::string_view rest) {
            append(detail::switching_protocols(core().request.header("sec-websocket-key"), core().subprotocol,
                                               compression.response));
            ++server_.metrics_.responses[101];
            connection().open(detail::Role::server, limits(), server_.arena_, server_.now(), nullptr,
                              std::move(compression.compression));
            schedule(connection().deadline());
            // From here to open() nothing throws, so that on_close() never comes without it.
            std::swap(connection().output(), http_->output);
            phase_ = Phase::websocket;
            http_.reset();
            ++server_.metrics_.websockets_opened;
            ++server_.metrics_.websockets_open;
            mark_dirty();
            call("open", [this] { handler_->open(); });
            if (server_.log_)
                server_.log(LogLevel::debug, "open",
                            {{"peer", core().remote_address}, {"target", std::string(core().request.target())}});
            if (rest.empty()) return;
            // They lie in the loop's receive buffer or in what was pipelined, and both are ours to write to.
            connection().receive(const_cast<char*>(rest.data()), rest.size(), server_.now());
            pump();
        }

        // ---- WebSocket ---------------------------------------------------------------------------------------------

        // Runs a callback. What leaves it is logged and costs this connection.
        template <class Callback>
        void call(const char* name, Callback&& callback) {
            if (attempt(name, callback)) return;
            connection().fail(CloseCode::internal_error, "internal error", CloseCause::handler_exception);
            mark_dirty();
        }

        // Gives the handler what has happened, until there is no more, or it can take no more.
        void pump() {
            for (;;) {
                const detail::Event event = connection().next_event();
                switch (event.kind) {
                    case detail::Event::Kind::none: return;
                    case detail::Event::Kind::message:
                        ++server_.metrics_.messages_received;
                        call("on_message", [&] { handler_->on_message(event.message); });
                        break;
                    case detail::Event::Kind::ping:
                        call("on_ping", [&] { handler_->on_ping(event.message.data()); });
                        break;
                    case detail::Event::Kind::pong:
                        call("on_pong", [&] { handler_->on_pong(event.message.data()); });
                        break;
                    case detail::Event::Kind::close: return finish();
                }
                mark_dirty();
                if (pause()) return;
            }
        }

        std::size_t half_backlog() { return connection().limits().max_backlog / 2; }

        // A peer that does not read what it asked for is not read either, until it does; nor is one whose input is much
        // work, until the others had their turn.
        bool pause() {
            if (connection().is_open() && connection().inflate_budget_spent()) {
                connection().pause_input();
                return paused_ = true;
            }
            if (!connection().is_open() || output().size() <= half_backlog()) return false;
            high_ = true;
            flush();
            if (output().size() <= half_backlog()) return false;
            connection().pause_input();
            return paused_ = true;
        }

        void settle_websocket() {
            if (output().size() > half_backlog()) high_ = true;
            flush();
            const auto low = [this] { return output().size() <= half_backlog(); };
            if (paused_ && (low() || !connection().is_open())) {
                paused_ = false;
                connection().resume_input();
                pump();
            } else if (connection().state() == detail::Connection::State::closed) {
                pump();
            }
            if (phase_ != Phase::websocket) return;
            if (high_ && low() && connection().is_open()) {
                high_ = false;
                call("on_drain", [this] { handler_->on_drain(); });
            }
            // Closing may be due before the next ping was, and the next ping before the answer to the last one.
            if (!scheduled() || connection().deadline() < due()) schedule(connection().deadline());
        }

        // The connection has closed: the handler ends, what is queued still goes out.
        void finish() {
            if (connection().aborted()) {
                end_handler();
                return remove();
            }
            auto http = std::make_unique<Http>(limits());
            http->keep_alive = false;
            std::swap(http->output, connection().output());
            end_handler();
            http_ = std::move(http);
            phase_ = Phase::lingering;
            paused_ = false;
            schedule(later(after(limits().closing_timeout), detail::Connection::drain_time(output().size())));
            mark_dirty();
        }

        // on_close(), exactly once, and the end of the handler.
        void end_handler() {
            detail::RoomsAccess::remove_from_all(server_.rooms_, *handler_);
            --server_.metrics_.websockets_open;
            attempt("session", [this] {
                ++server_.metrics_.closed[connection().close_cause()];
                ++server_.metrics_.close_codes[connection().close_code()];
                log_close();
            });
            attempt("on_close", [this] { handler_->on_close(); });
            add_to(server_.metrics_);
            core().rooms.clear();
            handler_.reset();
        }

        WSCHAT_COLD void log_close() {
            if (!server_.log_) return;
            const CloseCause cause = connection().close_cause();
            const bool news = cause == CloseCause::protocol_error || cause == CloseCause::backlog;
            server_.log(news ? LogLevel::info : LogLevel::debug, "closed",
                        {{"peer", core().remote_address},
                         {"code", std::to_string(number(connection().close_code()))},
                         {"cause", std::string(to_string(cause))},
                         {"reason", connection().close_reason()}});
        }

        bool count_address(const IpAddress& client) {
            if (server_.options_.server_limits.max_connections_per_address == 0 || share_) return true;
            auto share = std::make_unique<std::string>(client.rate_limit_key());
            if (!server_.count(*share)) return false;
            share_ = std::move(share);
            return true;
        }

        // What the end of each turn needs stands first and together.
        Server& server_;
        detail::Socket socket_;
        std::unique_ptr<detail::Transport> transport_;  // null where the connection is plain
        Phase phase_ = Phase::http;
        bool dirty_ = false;
        bool blocked_ = false;  // the kernel takes no more output for now
        bool paused_ = false;   // reading waits until the peer reads
        bool input_ended_ = false;
        bool high_ = false;     // the backlog has passed its half, on_drain() is owed
        bool lost_ = false;     // sending failed
        bool secured_ = false;  // the transport is established
        bool watching_read_ = true;
        bool watching_write_ = false;
        std::unique_ptr<WebSocketHandler> handler_;
        std::unique_ptr<Http> http_;
        std::size_t counted_backlog_ = 0;
        const Route* route_ = nullptr;
        IpAddress peer_;
        std::unique_ptr<std::string> share_;  // what of the addresses it is counted for; null where it is not

        friend class Server;
    };

    // ---- listening -------------------------------------------------------------------------------------------------

    class Listener final : public detail::Pollable, public detail::Timer {
    public:
        Listener(Server& server, const detail::ListenAddress& address, bool reuse_port,
                 std::shared_ptr<detail::TransportFactory> transports)
            : server_(server), socket_(address, reuse_port), transports_(std::move(transports)) {
            if (!server_.loop_.poller().add(socket_.descriptor(), *this, true, false))
                throw Error("listen " + socket_.address().to_string() + ": " +
                            detail::os::error_text(detail::os::last_error()));
        }
        Listener(const Listener&) = delete;
        Listener& operator=(const Listener&) = delete;
        ~Listener() override {
            server_.loop_.timers().cancel(*this);
            server_.loop_.poller().remove(socket_.descriptor());
        }

        const detail::ListenAddress& address() const { return socket_.address(); }
        bool secure() const { return transports_ != nullptr; }
        void reload() {
            if (transports_) transports_->reload();
        }

        void on_ready(bool, bool, bool) override {
            // A flood of connections must leave the others their turn.
            int error = 0;
            for (int i = 0; i < 64 && !server_.draining_; ++i) {
                IpAddress peer;
                detail::Socket accepted = socket_.accept(peer, error);
                if (accepted) take_in(std::move(accepted), peer);
                else if (detail::os::would_block(error)) return;
                else if (detail::os::out_of_descriptors(error)) return shed(error);
                else if (error == ENOBUFS || error == ENOMEM) return rest(error);
                // Any other error is of that one connection, which is gone already (ECONNABORTED and kin).
            }
            // Unless there is no end of it (EPERM, ENETDOWN).
            if (error != 0) rest(error);
        }
        void on_timer(Time now) override {
            if (!server_.loop_.poller().change(socket_.descriptor(), *this, true, false)) pause(now);
        }

    private:
        void take_in(detail::Socket accepted, const IpAddress& peer) {
            try {
                server_.welcome(std::move(accepted), peer, transports_ ? transports_->make() : nullptr);
            } catch (const std::exception& error) {  // for want of memory: it is closed
                server_.report_exception("accept", error.what(), &peer);
            }
        }
        // Without a descriptor the connection can be neither taken nor refused, and the poller would report it for
        // ever: the one that is kept in reserve serves to tell it so.
        void shed(int error) {
            server_.reserve_.close();
            IpAddress peer;
            int ignored = 0;
            detail::Socket refused = socket_.accept(peer, ignored);
            if (refused) {
                constexpr std::string_view answer =
                    "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 20\r\n\r\nThe server is "
                    "full.\n";
                if (!secure()) refused.send(&answer, 1);
                refused.shutdown_send();
                ++server_.metrics_.connections_refused;
                refused.close();
            }
            server_.reserve_descriptor();
            rest(error);
        }
        // Accepting goes on a little later, so that a shortage costs no time.
        void rest(int error) {
            server_.log(LogLevel::warning, "accept_paused", {{"cause", detail::os::error_text(error)}});
            pause(server_.now());  // first, because it may want memory
            server_.loop_.poller().change(socket_.descriptor(), *this, false, false);
        }
        void pause(Time now) { server_.loop_.timers().schedule(*this, now + std::chrono::milliseconds(50)); }

        Server& server_;
        detail::ListenSocket socket_;
        std::shared_ptr<detail::TransportFactory> transports_;  // null where the connections are plain
    };

    WSCHAT_COLD void add_listener(std::string_view address, std::shared_ptr<detail::TransportFactory> transports) {
        const Listener& added =
            listeners_.append(*this, detail::ListenAddress::parse(address), options_.reuse_port, std::move(transports));
        handle_signals();
        log(LogLevel::debug, "listening", {{"address", added.address().to_string()}});
    }

    // Takes a connection in, or turns it away with a 503.
    void welcome(detail::Socket socket, const IpAddress& peer, std::unique_ptr<detail::Transport> transport) {
        ++metrics_.connections_accepted;
        if (sessions_.size() >= max_connections() + turned_away_at_once) {
            ++metrics_.connections_refused;
            return;
        }
        const bool full = sessions_.size() >= max_connections();
        auto made = std::make_unique<Session>(*this, std::move(socket), peer, std::move(transport));
        Session& session = *made;
        session.index = sessions_.size();
        sessions_.push_back(std::move(made));
        session.start(full);
    }
    WSCHAT_COLD Response too_many() {
        ++metrics_.connections_refused;
        log(LogLevel::warning, "refused", {{"status", "503"}, {"sentence", "too many connections"}});
        return std::move(Response(503, "There are too many connections.\n").set_header("Retry-After", "10"));
    }
    std::size_t max_connections() const {
        if (options_.server_limits.max_connections != 0) return options_.server_limits.max_connections;
        const std::size_t limit = detail::os::descriptor_limit();
        return limit > 2 * descriptors_kept ? limit - descriptors_kept : limit / 2;
    }

    // ---- who the peer is -------------------------------------------------------------------------------------------

    bool trusted(const IpAddress& address) const {
        return std::any_of(trusted_proxies_.begin(), trusted_proxies_.end(),
                           [&](const detail::Cidr& c) { return c.contains(address); });
    }
    // From the right, the first address that is not of a trusted proxy: what stands left of it anybody may have written.
    IpAddress client_address(const IpAddress& peer, const Request& request) const {
        if (!trusted(peer)) return peer;
        std::vector<std::string_view> hops;
        request.fields().each_element("x-forwarded-for", [&](std::string_view hop) { hops.push_back(hop); });
        IpAddress client = peer;
        for (; !hops.empty() && trusted(client); hops.pop_back()) {
            const auto address = IpAddress::parse(hops.back());
            if (!address) break;
            client = *address;
        }
        return client;
    }
    // False where it has as many connections as it may have.
    bool count(const std::string& share) {
        if (share == "unix") return true;
        std::size_t& connections = connections_of_.find_or_emplace(share, std::size_t{0});
        if (connections >= options_.server_limits.max_connections_per_address) return false;
        ++connections;
        return true;
    }
    void uncount(const std::string& share) {
        std::size_t* connections = connections_of_.find(share);
        if (connections != nullptr && --*connections == 0) connections_of_.erase(share);
    }

    // A host that was allowed without a port is served on every port.
    bool serves_host(std::string_view host) const {
        const std::string whole = text::lowered(host), name = whole.substr(0, whole.rfind(':'));
        return hosts_.empty() || text::contains(hosts_, whole) || text::contains(hosts_, name);
    }
    bool origin_allowed(std::string_view origin, const Request& request) const override {
        if (text::contains(origins_, "*")) return true;
        const auto normal = detail::normalized_origin(origin);
        return detail::same_host(origin, request.host()) || (normal && text::contains(origins_, *normal));
    }
    std::string allowed_origins(const Request& request) const {
        std::string list = "pages of " + escape_for_log(request.host());
        for (const std::string& origin : origins_) (list += ", ") += origin;
        return list;
    }

    // ---- HandlerHost -----------------------------------------------------------------------------------------------

    static Session& session_of(detail::HandlerCore& core) { return *static_cast<Session*>(core.session); }
    void mark_dirty(detail::HandlerCore& core) override {
        core.dirty = true;
        session_of(core).mark_dirty();
    }
    void flush_now(detail::HandlerCore& core) override { session_of(core).flush(); }
    std::size_t offer(detail::HandlerCore& core, const std::string_view* pieces, std::size_t count) override {
        return session_of(core).offer(pieces, count);
    }
    void set_nodelay(detail::HandlerCore& core, bool on) override { session_of(core).set_nodelay(on); }
    Time now() const override { return loop_.now(); }
    bool on_loop_thread() const override { return loop_.on_loop_thread(); }
    Server& server() override { return *this; }
    std::shared_ptr<Mailbox> mailbox() override { return loop_.mailbox(); }

    // ---- turns -----------------------------------------------------------------------------------------------------

    // Sessions to settle at the end of the turn, first come, first served.
    class DirtyList {
    public:
        bool empty() const { return first_ == nullptr; }
        Session* first() const { return first_; }
        void push(Session& session) {
            session.next_dirty = nullptr;
            (first_ == nullptr ? first_ : last_->next_dirty) = &session;
            last_ = &session;
        }
        // Empties the list and visits what was in it; the visit may push again.
        template <class Visit>
        void take_each(Visit&& visit) {
            for (Session* session = std::exchange(first_, nullptr); session != nullptr;) {
                Session& visited = *std::exchange(session, session->next_dirty);
                if (session != nullptr) session->prefetch();
                visit(visited);
            }
        }

    private:
        Session* first_ = nullptr;
        Session* last_ = nullptr;
    };

    // Flushes what the callbacks have queued and reports what has closed; that calls on_close() and on_drain(), which
    // may queue more. True: there is more to do than a turn should take.
    bool end_turn() {
        for (int round = 0; round < 16 && !dirty_.empty(); ++round) {
            if (batch_) send_together();
            dirty_.take_each([](Session& session) { session.settle(); });
            if (backlog_ > options_.server_limits.max_total_backlog) relieve();
        }
        detail::RoomsAccess::prune(rooms_);
        if (buried_) {
            dirty_.take_each([this](Session& session) {
                if (!session.gone()) dirty_.push(session);
            });
            dig();
        }
        closed_listeners_.clear();
        handshakes_left_ = handshakes_at_once;
        if (draining_ && sessions_.empty()) loop_.stop();
        return !dirty_.empty();
    }

    // Sends what is queued for many in a few calls of the system; settling then finds it sent.
    void send_together() {
        const auto note = [](const detail::SendBatch::Item& item) {
            static_cast<Session*>(item.owner)->note_batched(item);
        };
        for (Session* session = dirty_.first(); session != nullptr; session = session->next_dirty) {
            session->prefetch();
            const std::string_view bytes = session->batchable();
            if (!bytes.empty()) batch_->add(session->socket(), bytes, session);
            if (batch_->full()) batch_->send(note);
        }
        batch_->send(note);
    }

    // Handshakes cost much more than messages: a flood of them must leave the others their turn.
    bool may_shake_hands() {
        if (handshakes_left_ == 0) return false;
        --handshakes_left_;
        return true;
    }

    // Destroys what is buried, one by one: the chain's own destructor would take a stack frame for each.
    void dig() {
        while (buried_) buried_ = std::move(buried_->next_buried);
    }

    // All backlogs together are over their limit: the largest go.
    void relieve() {
        while (backlog_ > options_.server_limits.max_total_backlog) {
            const auto larger = [](const auto& a, const auto& b) { return a->backlog() < b->backlog(); };
            const auto largest = std::max_element(sessions_.begin(), sessions_.end(), larger);
            if (largest == sessions_.end() || (*largest)->backlog() == 0) return;
            (*largest)->abort(CloseCause::backlog, "all backlogs together are over their limit");
        }
    }

    // Takes a session from the list; it is destroyed when nothing in this turn can refer to it any more.
    void bury(Session& session) {
        if (session.share_) uncount(*session.share_);
        std::swap(sessions_[session.index], sessions_.back());
        sessions_[session.index]->index = session.index;
        session.next_buried = std::exchange(buried_, std::move(sessions_.back()));
        sessions_.pop_back();
    }

    // From the first listen() on, because whoever reads the address that was printed may send one before run().
    void handle_signals() {
        if (options_.handle_signals && !signals_)
            signals_ = std::make_unique<detail::SignalGuard>(loop_.wake_descriptor());
    }
    void on_signal() {
        if (std::exchange(signalled_, true)) drop_all();
        else begin_shutdown(std::chrono::seconds(5));
    }

    WSCHAT_COLD void begin_shutdown(Duration deadline) {
        const bool first = !std::exchange(draining_, true);
        const std::size_t connections = sessions_.size();
        if (first) std::swap(closed_listeners_, listeners_);
        for (std::size_t i = sessions_.size(); i-- > 0;)
            if (i < sessions_.size()) sessions_[i]->shut_down();
        try {
            loop_.call_later(deadline, [this] { drop_all(); });
        } catch (const std::bad_alloc&) {  // without a deadline it might never end
            drop_all();
        }
        if (first) log(LogLevel::debug, "shutdown", {{"connections", std::to_string(connections)}});
    }
    void drop_all() {
        while (!sessions_.empty()) sessions_.back()->abort(CloseCause::shutdown, "server is shutting down");
    }

    // ---- logging ---------------------------------------------------------------------------------------------------

    void log(LogLevel level, std::string_view event, LogFields fields) {
        if (!log_ || !may_log(level)) return;
        try {
            log_({level, event, fields});
        } catch (...) {  // there is nobody left to tell
        }
    }
    // A peer can not flood the log: for each level a bucket of 100 entries that fills with 100 a second, so that what
    // is told of every connection does not drown what went wrong.
    bool may_log(LogLevel level) {
        LogBucket& bucket = log_buckets_[static_cast<std::size_t>(level)];
        const Time now = Clock::now();
        const double filled = std::chrono::duration<double>(now - bucket.filled).count() * 100;
        bucket.tokens = (std::min)(100.0, bucket.tokens + filled);
        bucket.filled = now;
        if (bucket.tokens < 1) {
            ++metrics_.log_entries_suppressed;
            return false;
        }
        bucket.tokens -= 1;
        return true;
    }
    // Throws nothing: it is what catch blocks call, for want of memory too.
    WSCHAT_COLD void report_exception(const char* where, const char* what, const IpAddress* peer) noexcept {
        ++metrics_.handler_exceptions;
        try {
            log(LogLevel::error, "exception", {{"in", where}, {"what", what}, {"peer", peer ? peer->to_string() : ""}});
        } catch (...) {  // no memory is left to tell it with
        }
    }

    // ---- set-up ----------------------------------------------------------------------------------------------------

    struct PageEntry {
        detail::Pattern path;
        Page answer;
        const detail::Pattern& pattern() const { return path; }
    };
    WSCHAT_COLD void add_page(detail::Pattern pattern, Page answer) {
        for (const auto& [number, page] : pages_)
            if (page.path == pattern) throw Error("page \"" + pattern.text() + "\": given twice");
        pages_.append(std::move(pattern), std::move(answer));
    }

    WSCHAT_COLD static std::string find_file(const std::string& pattern, const std::string& path) {
        detail::File file(path);
        std::string found = path;
        const bool relative = !path.empty() && path.front() != '/' && path.find(':') == std::string::npos;
        if (!file && relative) {
            found = beside(detail::os::executable_path(), path);
            if (detail::File here{found}) return detail::os::absolute_path(found);
        }
        if (!file) throw Error("file \"" + pattern + "\": " + path + ": " + detail::os::error_text(file.error()));
        return detail::os::absolute_path(path);
    }

    void reserve_descriptor() {
#if !defined(_WIN32)
        reserve_ = detail::OwnedDescriptor(::open("/dev/null", O_RDONLY | O_CLOEXEC));
#endif
    }

    ServerOptions options_;
    Loop loop_;
    detail::SendArena arena_;
    Rooms rooms_;
    std::unique_ptr<detail::CompressionPool> compression_pool_;  // made when the first connection needs it
    // One of each serves all connections.
    detail::Bytes receive_buffer_;
    std::array<std::string_view, detail::Socket::max_pieces> pieces_;
    std::unique_ptr<detail::SendBatch> batch_ = detail::SendBatch::make();
    StringMap<Route> routes_;
    StringMap<PageEntry> pages_;
    std::vector<std::string> origins_;
    std::vector<std::string> hosts_;
    std::vector<detail::Cidr> trusted_proxies_;
    std::function<void(const LogEntry&)> log_;
    struct LogBucket {
        double tokens = 100;
        Time filled{};
    };
    LogBucket log_buckets_[4];  // by level

    StringMap<Listener> listeners_;
    StringMap<Listener> closed_listeners_;  // destroyed at the end of the turn, which may know them
    std::vector<std::unique_ptr<Session>> sessions_;
    DirtyList dirty_;
    std::unique_ptr<Session> buried_;  // the first of those that are destroyed at the end of the turn
    StringMap<std::size_t> connections_of_;
    detail::OwnedDescriptor reserve_;
    std::size_t backlog_ = 0;
    unsigned handshakes_left_ = handshakes_at_once;
    bool draining_ = false;
    bool signalled_ = false;
    std::unique_ptr<detail::SignalGuard> signals_;
    detail::WireCount wire_;
    Metrics metrics_;
    std::vector<std::pair<const void*, detail::Owned>> extensions_;
};

WSCHAT_END

// ====================================================================================================================
// section 16: Chat
//
// ChatHandler: a whole chat as one handler: names and presence, a history that is caught up with, private messages,
// commands, floods and moderation. Knows nothing of how a history is kept or shared: that is a ChatStore's.
// ====================================================================================================================

#if WSCHAT_CHAT

WSCHAT_BEGIN

class ChatHandler;
class ChatHub;

// ---- what is said, and where it is kept ----------------------------------------------------------------------------

// One value that somebody did in a room. What is said is kept under an id; the rest is passed on and forgotten.
struct ChatEntry {
    // said and action ("/me waves") are kept; a file may hold their numbers. come, go and rename are of users.
    enum class Kind : std::uint8_t { said = 0, action = 1, whisper, typing, come, go, rename };

    Kind kind = Kind::said;
    std::uint64_t id = 0;   // grows within its room; 0: not kept
    std::int64_t time = 0;  // Unix time in milliseconds
    std::string room{};
    std::string name{};        // whose it is; empty: the server's own
    std::string text{};        // of a rename the new name, of a come what the user is about
    std::string to{};          // of a whisper
    std::string author{};      // who is behind the name, told to nobody; a tag counts for its author
    std::string tag{};         // the sender's own, by which a message that comes again is known
    std::uint64_t sender = 0;  // the connection, by a number that no other server gives; not kept
};

// What a room has kept after an id, oldest first.
struct HistoryPage {
    std::vector<ChatEntry> entries{};  // without the name of the room
    std::uint64_t last = 0;            // the newest id of the room, 0 where it has none
    bool gap = false;     // something after the id is not among the entries, or the id is of another history
    std::string error{};  // why it could not be read
};

// Keeps what is said and delivers it, to this server and perhaps to others: an entry is delivered when it comes back
// from the store, so that all see one order. Everything here is called on the loop's thread.
class ChatStore {
public:
    class Listener {
    public:
        // An entry that was appended or passed, here or elsewhere. Those with ids come in the order of their room. A
        // server that is new is told of everybody who is there by entries of the kind `come`.
        virtual void on_entry(const ChatEntry& entry) = 0;
        // The author has sent the tag before; the entry has the id of then, and is not delivered again.
        virtual void on_repeat(const ChatEntry& entry) = 0;
        // What was appended here is not kept, and nobody was told of it.
        virtual void on_failure(const ChatEntry& entry, const std::string& cause) = 0;

    protected:
        ~Listener() = default;
    };
    using PageCall = std::function<void(HistoryPage)>;

    ChatStore() = default;
    ChatStore(const ChatStore&) = delete;
    ChatStore& operator=(const ChatStore&) = delete;
    ChatStore(ChatStore&&) = default;
    ChatStore& operator=(ChatStore&&) = default;
    virtual ~ChatStore() = default;

    // Once, before all else. What comes from another thread is posted to the mailbox.
    virtual void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) = 0;
    // Keeps the entry: one of the listener's calls follows, at once or later.
    virtual void append(ChatEntry entry) = 0;
    // Passes on what is not kept.
    virtual void pass(const ChatEntry& entry) = 0;
    // The newest entries after the id, at most `limit`; without an id the newest of all. `then` is called at once or
    // later; not at all once the store is gone.
    virtual void since(const std::string& room, std::optional<std::uint64_t> id, std::size_t limit, PageCall then) = 0;
};

struct HistoryLimits {
    std::size_t max_entries = 1000;                  // of a room
    std::size_t max_bytes = 1024 * 1024;             // of a room
    Duration max_age = std::chrono::hours(168);      // zero: no limit
    std::size_t max_rooms = 1000;                    // past it the room that was silent for longest is forgotten
    std::size_t max_total_bytes = 64 * 1024 * 1024;  // of all rooms; past it the same
};

namespace detail {

// The history of one room in memory, and its tags.
class HistoryRing {
public:
    // Ids begin after `last`.
    explicit HistoryRing(std::uint64_t last) : last_(last) {}

    // The id under which the author's tag is known, or 0.
    std::uint64_t find(const ChatEntry& entry) const {
        const Kept* kept = entry.tag.empty() ? nullptr : tags_.find(tag_key(entry));
        return kept == nullptr ? 0 : kept->entry.id;
    }
    std::uint64_t append(const ChatEntry& entry, const HistoryLimits& limits, Time now) {
        Kept kept{entry, now, entry.name.size() + entry.text.size() + entry.author.size() + 2 * entry.tag.size() + 256};
        kept.entry.room.clear();
        kept.entry.id = last_ + 1;
        entries_.push_back(std::move(kept));
        ++last_;
        bytes_ += entries_.back().bytes;
        if (!entry.tag.empty()) tags_.insert_reference(tag_key(entry), entries_.back());
        touched_ = now;
        trim(limits, now);
        return last_;
    }
    HistoryPage since(std::optional<std::uint64_t> id, std::size_t limit, const HistoryLimits& limits, Time now) {
        trim(limits, now);
        HistoryPage page;
        page.last = last_;
        const bool known = id && *id <= last_;
        const std::uint64_t newest = last_ > limit ? last_ - limit : 0;
        const std::uint64_t forgotten = last_ - entries_.size();  // ids are without holes
        for (std::uint64_t i = (std::max)({known ? *id : 0, newest, forgotten}); i != last_; ++i)
            page.entries.push_back(entries_[i - forgotten].entry);
        page.gap = id && (!known || last_ - *id > page.entries.size());
        return page;
    }
    std::size_t size() const { return entries_.size(); }
    std::size_t bytes() const { return bytes_; }
    std::uint64_t last() const { return last_; }
    Time touched() const { return touched_; }

private:
    struct Kept {
        ChatEntry entry;
        Time at;
        std::size_t bytes;
    };
    static std::string tag_key(const ChatEntry& entry) { return entry.author + '\n' + entry.tag; }

    void trim(const HistoryLimits& limits, Time now) {
        while (!entries_.empty()) {
            const Kept& oldest = entries_.front();
            const bool old = limits.max_age != Duration::zero() && later(oldest.at, limits.max_age) <= now;
            if (!old && entries_.size() <= limits.max_entries && bytes_ <= limits.max_bytes) return;
            bytes_ -= oldest.bytes;
            if (!oldest.entry.tag.empty()) tags_.erase(tag_key(oldest.entry));
            entries_.pop_front();
        }
    }

    std::deque<Kept> entries_;
    StringMap<Kept> tags_;
    std::uint64_t last_;
    std::size_t bytes_ = 0;
    Time touched_{};
};

}  // namespace detail

// The history that every chat has without being asked for one: in memory, gone with the server.
class MemoryHistory final : public ChatStore {
public:
    explicit MemoryHistory(const HistoryLimits& limits = {}) : limits_(limits) {}

    void attach(Listener& listener, std::shared_ptr<Mailbox>) override { listener_ = &listener; }
    void append(ChatEntry entry) override {
        detail::HistoryRing& ring = *ring_of(entry.room, true);
        entry.id = ring.find(entry);
        if (entry.id != 0) return listener_->on_repeat(entry);
        entry.id = counted(ring, [&] { return ring.append(entry, limits_, Clock::now()); });
        while (bytes_ > limits_.max_total_bytes && rings_.size() > 1) forget(silent());
        listener_->on_entry(entry);
    }
    void pass(const ChatEntry& entry) override { listener_->on_entry(entry); }
    void since(const std::string& room, std::optional<std::uint64_t> id, std::size_t limit, PageCall then) override {
        detail::HistoryRing nothing(fresh_id());
        detail::HistoryRing* ring = ring_of(room, false);
        if (ring == nullptr) ring = &nothing;
        then(counted(*ring, [&] { return ring->since(id, limit, limits_, Clock::now()); }));
    }

private:
    // What is done to a ring, with the bytes of all kept true.
    template <class Work>
    auto counted(const detail::HistoryRing& ring, Work&& work) -> decltype(work()) {
        const std::size_t before = ring.bytes();
        auto result = work();
        bytes_ += ring.bytes() - before;
        return result;
    }
    // Ids begin at the microseconds of the wall clock, so that one of an earlier run is known to be none of this; and
    // after those of what was forgotten, whatever the clock says.
    std::uint64_t fresh_id() {
        using namespace std::chrono;
        const auto now = duration_cast<microseconds>(system_clock::now().time_since_epoch()).count();
        return forgotten_ = (std::max)(forgotten_ + 1, static_cast<std::uint64_t>(now));
    }
    // Null where there are too many rooms, all with something to keep, and this one has nothing yet.
    detail::HistoryRing* ring_of(const std::string& room, bool to_write) {
        if (detail::HistoryRing* known = rings_.find(room)) return known;
        if (rings_.size() >= (std::max)(limits_.max_rooms, std::size_t{1})) {
            const std::string oldest = silent();
            if (!to_write && rings_.find(oldest)->touched() != Time()) return nullptr;
            forget(oldest);
        }
        return &rings_.find_or_emplace(room, fresh_id());
    }
    // The room that was silent for longest.
    std::string silent() const {
        const std::string* oldest = nullptr;
        Time touched{};
        for (const auto& [name, ring] : rings_) {
            if (oldest != nullptr && ring.touched() >= touched) continue;
            oldest = &name;
            touched = ring.touched();
        }
        return *oldest;
    }
    void forget(const std::string& room) {
        const detail::HistoryRing& ring = *rings_.find(room);
        bytes_ -= ring.bytes();
        forgotten_ = (std::max)(forgotten_, ring.last());
        rings_.erase(room);
    }

    HistoryLimits limits_;
    Listener* listener_ = nullptr;
    StringMap<detail::HistoryRing> rings_;
    std::size_t bytes_ = 0;
    std::uint64_t forgotten_ = 0;  // the newest id that was given out elsewhere than in the rings
};

// ---- what may be written -------------------------------------------------------------------------------------------

namespace text {

// Whether a character does something other than being seen: C0, C1 and DEL, and where `formats` is set also what
// joins, reverses or hides its neighbours, and what looks like a space or like nothing at all (Unicode's property
// Default_Ignorable_Code_Point, its spaces but U+0020, separators of lines, the blank of Braille, notes between lines).
inline bool invisible(char32_t c, bool formats) {
    if (c < 0x20 || (c >= 0x7F && c < 0xA0)) return true;
    if (!formats || c < 0xA0) return false;
    constexpr struct {
        char32_t first, last;
    } ranges[] = {{0xA0, 0xA0},      {0xAD, 0xAD},     {0x34F, 0x34F},   {0x61C, 0x61C},     {0x115F, 0x1160},
                  {0x1680, 0x1680},  {0x17B4, 0x17B5}, {0x180B, 0x180F}, {0x2000, 0x200F},   {0x2028, 0x202F},
                  {0x205F, 0x206F},  {0x2800, 0x2800}, {0x3000, 0x3000}, {0x3164, 0x3164},   {0xFE00, 0xFE0F},
                  {0xFEFF, 0xFEFF},  {0xFFA0, 0xFFA0}, {0xFFF0, 0xFFFB}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
                  {0xE0000, 0xE0FFF}};
    for (const auto& range : ranges)
        if (c >= range.first && c <= range.last) return true;
    return false;
}

// Calls visit(character) for each one of a text that is valid UTF-8, until it answers false; answers the last answer.
template <class Visit>
bool each_character(std::string_view text, Visit&& visit) {
    for (std::size_t i = 0; i < text.size();) {
        const auto lead = static_cast<unsigned char>(text[i]);
        const std::size_t size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        char32_t c = size == 1 ? lead : lead & (0xFFu >> (size + 1));
        for (std::size_t k = 1; k < size; ++k) c = c << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3Fu);
        if (!visit(c)) return false;
        i += size;
    }
    return true;
}

// What may be the name of a user or of a room: 1 to max bytes that are seen, without a space at either end or two in
// a row.
inline bool good_name(std::string_view name, std::size_t max) {
    if (name.empty() || name.size() > max || !valid_utf8(name) || name.front() == ' ' || name.back() == ' ')
        return false;
    return name.find("  ") == std::string_view::npos &&
           each_character(name, [](char32_t c) { return !invisible(c, true); });
}
// What may be said: anything but control characters; line ends and tabs are none.
inline bool good_text(std::string_view text) {
    return valid_utf8(text) &&
           each_character(text, [](char32_t c) { return c == '\n' || c == '\t' || !invisible(c, false); });
}

}  // namespace text

namespace detail {

// A line of a client. "/me waves" is the command "me"; "hello" and "//hello" are said, the latter with one slash. A line
// behind "/tag TAG " is the same line with a tag, which comes back with the answer.
struct ChatLine {
    std::string_view tag;
    std::string_view command;  // empty: it is said
    std::string_view rest;

    static ChatLine parse(std::string_view line) {
        ChatLine parsed;
        if (text::starts_with(line, "/tag ")) {
            line.remove_prefix(5);
            parsed.tag = text::cut_at(line, ' ');
        }
        const bool command = text::starts_with(line, "/") && !text::starts_with(line, "//");
        if (text::starts_with(line, "/")) line.remove_prefix(1);
        if (command) parsed.command = text::cut_at(line, ' ');
        if (command && parsed.command.empty()) parsed.command = "/";
        parsed.rest = line;
        return parsed;
    }
    // 1 to 64 visible ASCII characters.
    static bool good_tag(std::string_view tag) {
        return !tag.empty() && tag.size() <= 64 &&
               std::all_of(tag.begin(), tag.end(), [](char c) { return c > ' ' && c < 0x7F; });
    }
};

}  // namespace detail

// An event as the clients get it: one JSON object, built field by field. README.md has the table of all.
class ChatEvent {
public:
    explicit ChatEvent(std::string_view type) { add("type", type); }
    ChatEvent& add(std::string_view name, const Json& value) { return add_json(name, value.dump()); }
    ChatEvent& add_json(std::string_view name, std::string_view json) {
        text_ += text_.empty() ? '{' : ',';
        ((text_ += Json(name).dump()) += ':') += json;
        return *this;
    }
    ChatEvent& add_unless_empty(std::string_view name, std::string_view value) {
        return value.empty() ? *this : add(name, value);
    }
    std::string dump() const { return text_ + '}'; }

private:
    std::string text_;
};

// ---- floods --------------------------------------------------------------------------------------------------------

// What one connection, or all of one address, may send.
struct FloodRates {
    Rate messages, bytes;
};

namespace detail {

class FloodMeter {
public:
    bool take(std::size_t size, const FloodRates& rates, Time now) {
        const bool messages = messages_.take(1, rates.messages, now);
        return bytes_.take(static_cast<double>(size), rates.bytes, now) && messages;
    }
    bool full(const FloodRates& rates, Time now) {
        return messages_.full(rates.messages, now) && bytes_.full(rates.bytes, now);
    }

private:
    TokenBucket messages_, bytes_;
};

// What happens to a message over the limit: the first is answered, those that follow it are dropped, and past
// `patience` of them the connection is closed. Ten seconds without one, and all is forgotten.
class FloodJudge {
public:
    enum class Verdict : std::uint8_t { pass, tell, drop, close };

    Verdict judge(bool within, unsigned patience, Time now) {
        const bool told = std::exchange(told_, !within);
        if (within) return Verdict::pass;
        if (later(last_, std::chrono::seconds(10)) <= now) count_ = 0;
        last_ = now;
        if (++count_ > patience) return Verdict::close;
        return told ? Verdict::drop : Verdict::tell;
    }

private:
    unsigned count_ = 0;
    bool told_ = false;
    Time last_{};
};

}  // namespace detail

// ---- presence ------------------------------------------------------------------------------------------------------

// A user as the application knows it.
struct ChatUser {
    std::string name{};
    std::string about{};  // JSON text that everybody in the room is shown, or nothing
    bool fixed = false;   // of an account: it can not be changed, and all connections with it are one user
};

namespace detail {

// Who is in a room. A user has any number of connections, comes with the first, and leaves when the last has been
// gone for the time of grace. Names are unique in their room, whatever the case of their ASCII letters.
class Presence {
public:
    struct User {
        ChatUser who;
        std::string identity;                   // two connections with the same are one user; empty: none is known
        std::vector<ChatHandler*> connections;  // none in the time of grace, and none of a user elsewhere
        Time leaves = (Time::max)();            // the end of the time of grace
        bool elsewhere = false;                 // connected to another server
        std::vector<std::string> tags{};        // of the latest whispers
    };

    static std::string folded(std::string_view name) { return text::lowered(name); }

    // By name; null where nobody has it.
    User* find(std::string_view name) const { return users_.find(folded(name)); }
    User* with_identity(const std::string& identity) const {
        return identity.empty() ? nullptr : identities_.find(identity);
    }
    bool empty() const { return users_.empty(); }
    std::size_t size() const { return users_.size(); }
    // Of a name that is made free.
    std::size_t max_name = 40;

    // By name.
    std::vector<ChatUser> users() const {
        std::vector<ChatUser> list;
        for (const auto& [name, user] : users_) list.push_back(user.who);
        return list;
    }

    // A connection comes. It belongs to the user with its identity; without one, to a user of that name who is away
    // and had none either; else to a new user, whose name is made free if it is not. `first`: the user has come.
    struct Arrival {
        User& user;
        bool first;
    };
    Arrival arrive(const ChatUser& who, const std::string& identity, ChatHandler* connection) {
        User* user = with_identity(identity);
        if (user == nullptr && identity.empty()) {
            user = find(who.name);
            if (user != nullptr && (!user->identity.empty() || user->leaves == (Time::max)())) user = nullptr;
        }
        const bool first = user == nullptr;
        if (first) user = &add(who, identity);
        user->connections.push_back(connection);
        user->leaves = (Time::max)();
        return {*user, first};
    }
    // Somebody who is connected elsewhere, or one whose connections follow.
    User& add(ChatUser who, const std::string& identity) {
        who.name = free_name(who.name);
        const std::string key = folded(who.name);
        longest_ = (std::max)(longest_, key.size());
        User& user = users_.find_or_emplace(key);
        try {
            user.identity = identity;
            user.connections.reserve(1);  // who is in the list can be connected
            if (!identity.empty()) identities_.insert_reference(identity, user);
        } catch (...) {
            users_.erase(key);
            throw;
        }
        user.who = std::move(who);
        return user;
    }

    // A connection goes. True: the user has left, and is destroyed. Else, after the last one, expire() says so later.
    bool depart(User& user, ChatHandler* connection, Time leaves, bool at_once) {
        detach(user, connection, leaves);
        if (!user.connections.empty()) return false;
        if (at_once) remove(user);
        return at_once;
    }
    // A connection is forgotten, which takes no memory.
    static void detach(User& user, ChatHandler* connection, Time leaves) {
        auto& all = user.connections;
        all.erase(std::remove(all.begin(), all.end(), connection), all.end());
        if (all.empty()) user.leaves = leaves;
    }
    // Those whose time of grace is over; `next` is when it is for another one.
    std::vector<std::string> expire(Time now, Time& next) {
        std::vector<std::string> gone;
        next = (Time::max)();
        for (const auto& [key, user] : users_) {
            if (user.leaves <= now) gone.push_back(user.who.name);
            else next = (std::min)(next, user.leaves);
        }
        for (const std::string& name : gone) remove(*find(name));
        return gone;
    }
    void remove(User& user) {
        const std::string key = folded(user.who.name);
        if (!user.identity.empty()) identities_.erase(user.identity);
        users_.erase(key);
    }

    // False where somebody else has that name.
    bool rename(User& user, const std::string& name) {
        const User* holder = find(name);
        if (holder != nullptr && holder != &user) return false;
        longest_ = (std::max)(longest_, name.size());
        std::string copy = name;  // whatever wants memory comes first: a user who is half renamed would be gone
        if (holder == nullptr) users_.rename(folded(user.who.name), folded(name));
        user.who.name = std::move(copy);
        return true;
    }
    // The name itself or, where it is taken, the name with the first number that makes it free.
    std::string free_name(const std::string& name) const {
        std::string free = name;
        for (std::size_t n = 2; find(free) != nullptr; ++n) {
            if (n == 10 && users_.size() > n) n = users_.size();  // a hundred guests need no hundred tries
            const std::string number = "-" + std::to_string(n);
            const std::size_t longest = (std::max)(max_name, name.size());
            free = std::string(cut_utf8(name, longest - (std::min)(longest, number.size()))) + number;
        }
        return free;
    }
    // The user whose name the text begins with, the longest if there are several; it is cut off with the space after it.
    User* cut_user(std::string_view& text) const {
        // A line may be of a megabyte of spaces; names are short.
        std::size_t end = text.size() <= longest_ ? text.size() : text.rfind(' ', longest_);
        for (; end != std::string_view::npos && end != 0; end = text.rfind(' ', end - 1)) {
            User* user = find(text.substr(0, end));
            if (user == nullptr) continue;
            text.remove_prefix((std::min)(end + 1, text.size()));
            return user;
        }
        return nullptr;
    }

private:
    StringMap<User> users_;  // by folded name
    StringMap<User> identities_;
    std::size_t longest_ = 0;  // of all names that there have been
};

}  // namespace detail

// ---- rooms and the hub ---------------------------------------------------------------------------------------------

// The bounds of all chats of a server: ChatHub::of(server).limits. Sizes in bytes.
struct ChatLimits {
    std::size_t max_text = 16 * 1024;
    std::size_t max_name = 40;
    std::size_t max_room_name = 64;
    std::size_t max_rooms_per_connection = 10;
    std::size_t max_rooms = 10'000;
    std::size_t history_on_join = 50;            // entries for who comes without an id
    std::size_t history_on_resume = 500;         // and with one
    std::size_t max_history_event = 256 * 1024;  // of one event with entries; older ones are left out
    Duration grace = std::chrono::seconds(3);    // for who comes back after a lost connection
    FloodRates connection{{5, 20}, {16 * 1024, 64 * 1024}};
    FloodRates address{{50, 200}, {128 * 1024, 512 * 1024}};  // of all its connections; IPv6 counts by /64
    unsigned flood_patience = 100;  // messages over these limits, past which a connection is closed
};

// What a user may do: ChatHandler::may().
enum class ChatAction : std::uint8_t { say, whisper, rename, join, list_rooms, kick, ban, mute };

// A room of the chat. Valid until the callback returns, as a Room is; its members are those of Rooms[name()].
class ChatRoom {
public:
    ChatRoom(std::string name, ChatHub& hub) : name_(std::move(name)), hub_(hub) {}
    ChatRoom(const ChatRoom&) = delete;
    ChatRoom& operator=(const ChatRoom&) = delete;

    const std::string& name() const { return name_; }
    std::vector<ChatUser> users() const { return presence_.users(); }

    // Says something to all, as the server or under a name; published it is kept and has an id. An Error where the
    // text holds control characters or is not UTF-8.
    inline void publish(std::string_view text, std::string_view name = {});
    inline void broadcast(std::string_view text, std::string_view name = {});
    // The newest entries after an id, at most `limit`, and whether something is missing; `then` is called at once, or
    // later where the history is in a file.
    inline void since(std::optional<std::uint64_t> id, std::size_t limit, ChatStore::PageCall then);
    // Ends all connections of the user who are in this room, with 1008. False: there is no such user.
    inline bool kick(std::string_view name, std::string_view reason = {});
    // For so long nothing that the user says is passed on; zero: it is again. False: there is no such user.
    inline bool mute(std::string_view name, Duration duration);

    // ---- for handlers and the hub ----------------------------------------------------------------------------------

    detail::Presence& presence() { return presence_; }
    // The newest id of which the members were told.
    std::uint64_t told() const { return told_; }
    void set_told(std::uint64_t id) { told_ = (std::max)(told_, id); }
    bool expiring = false;  // a timer waits for the end of somebody's time of grace

private:
    std::string name_;
    ChatHub& hub_;
    detail::Presence presence_;
    std::uint64_t told_ = 0;
};

// The chat of a server, which its handlers share: rooms, the history, bans. On the loop's thread.
class ChatHub final : private ChatStore::Listener {
public:
    explicit ChatHub(Server& server)
        : server_(server), serial_(static_cast<std::uint64_t>(Clock::now().time_since_epoch().count()) << 16) {
        set_store(MemoryHistory());
    }
    ChatHub(const ChatHub&) = delete;
    ChatHub& operator=(const ChatHub&) = delete;

    static ChatHub& of(Server& server) { return server.extension<ChatHub>(); }

    ChatLimits limits;

    // Keeps the history in this store: set_store(SqliteHistory("chat.db")). An Error after the first connection.
    template <class Store, std::enable_if_t<std::is_base_of_v<ChatStore, Store>, int> = 0>
    void set_store(Store store) {
        set_store(std::unique_ptr<ChatStore>(std::make_unique<Store>(std::move(store))));
    }
    void set_store(std::unique_ptr<ChatStore> store) {
        if (!rooms_.empty())
            throw Error("ChatHub::set_store: a connection is open; set the store before the first connection");
        store_ = std::move(store);
        store_->attach(*this, server_.loop().mailbox());
    }
    ChatStore& store() { return *store_; }

    // The room of that name, which is made by being named.
    ChatRoom& room(std::string_view name) {
        if (ChatRoom* known = find(name)) return *known;
        tidy_later();
        ChatRoom& made = rooms_.find_or_emplace(name, std::string(name), *this);
        made.presence().max_name = limits.max_name;
        return made;
    }
    // Null where nobody is in such a room.
    ChatRoom* find(std::string_view name) const { return rooms_.find(name); }
    std::size_t room_count() const { return rooms_.size(); }
    // By name, with how many users each has.
    std::vector<std::pair<std::string, std::size_t>> rooms() const {
        std::vector<std::pair<std::string, std::size_t>> list;
        for (const auto& [name, room] : rooms_) list.emplace_back(name, room.presence().size());
        return list;
    }

    // Refuses and ends the connections of an address, or of users with that name, for so long; zero: no more.
    inline void ban(std::string_view address_or_name, Duration duration);
    bool banned(const std::string& address, const std::string& name, const std::string& identity) {
        if (holds(bans_, "address " + share_of(address)) || holds(bans_, name_key(name))) return true;
        const std::string* as = banned_as_.find(identity);
        if (as == nullptr) return false;
        if (holds(bans_, *as)) return true;
        banned_as_.erase(identity);
        return false;
    }

    // ---- for handlers and rooms ------------------------------------------------------------------------------------

    // Says it in the room, or has it kept by the store, which calls back.
    void append(ChatEntry entry) {
        entry.time = unix_ms();
        store_->append(std::move(entry));
    }
    void pass(ChatEntry entry) {
        entry.time = unix_ms();
        store_->pass(entry);
    }
    Time now() const { return server_.loop().now(); }
    // Calls a hook; what leaves it ends its own connection, and keeps nothing from the others.
    template <class Hook>
    void call(ChatHandler& handler, const char* name, Hook&& hook) {
        try {
            hook();
        } catch (const std::exception& error) {
            hook_failed(handler, name, error.what());
        } catch (...) {
            hook_failed(handler, name, "not a std::exception");
        }
    }

    // A connection's number and what its address has sent, from open() to on_close().
    struct Address {
        detail::FloodMeter meter;
        std::size_t connections = 0;
    };
    std::uint64_t opened(ChatHandler& handler) {
        connections_.insert_reference(big_endian_key(++serial_), handler);
        return serial_;
    }
    void closed(std::uint64_t serial) { connections_.erase(big_endian_key(serial)); }
    Address& address(const std::string& remote_address) {
        if (addresses_.size() >= forget_at_) forget_addresses();
        Address& found = addresses_.find_or_emplace(share_of(remote_address));
        ++found.connections;
        return found;
    }

    inline detail::Presence::User& arrive(ChatRoom& room, const ChatUser& who, const std::string& identity,
                                          ChatHandler& handler, std::uint64_t serial);
    void depart(ChatRoom& room, detail::Presence::User& user, ChatHandler& handler, bool at_once) {
        const Time leaves = later(now(), limits.grace);
        detail::Presence::detach(user, &handler, leaves);  // whatever fails after it
        const std::string name = user.who.name;
        if (room.presence().depart(user, &handler, leaves, at_once)) return left(room, name);
        if (user.connections.empty() && !room.expiring) expire_later(room, limits.grace);
    }
    // A mute goes with the user.
    void rename(ChatRoom& room, detail::Presence::User& user, const std::string& name) {
        ChatEntry entry = entry_of(ChatEntry::Kind::rename, room, user.who.name);
        entry.text = name;
        const std::string muted = mute_key(room, author_of(user));
        const Time* mute = mutes_.find(muted);
        const Time until = mute == nullptr ? Time() : *mute;
        mutes_.erase(muted);
        room.presence().rename(user, name);
        if (until > now()) mutes_.find_or_emplace(mute_key(room, author_of(user))) = until;
        pass(std::move(entry));
    }

    // What of a page may be shown: if there are members, what they have not been told yet comes to all in its turn.
    void settle(ChatRoom& room, HistoryPage& page) {
        if (server_.rooms().find(room.name()) == nullptr) return room.set_told(page.last);
        while (!page.entries.empty() && page.entries.back().id > room.told()) page.entries.pop_back();
        page.last = (std::min)(page.last, room.told());
    }

    bool muted(const ChatRoom& room, const detail::Presence::User& user) {
        return holds(mutes_, mute_key(room, author_of(user)));
    }
    void mute(const ChatRoom& room, const detail::Presence::User& user, Duration duration) {
        set(mutes_, mute_key(room, author_of(user)), duration);
    }

    static ChatEntry entry_of(ChatEntry::Kind kind, const ChatRoom& room, std::string_view name) {
        ChatEntry entry;
        entry.kind = kind;
        entry.room = room.name();
        entry.name = name;
        return entry;
    }
    // By what an author is known to the tags: an identity, or else the name.
    static std::string author_of(const detail::Presence::User& user) {
        return user.identity.empty() ? "name " + detail::Presence::folded(user.who.name) : user.identity;
    }
    static std::string said_event(const ChatEntry& entry, bool with_tag) {
        ChatEvent event("said");
        event.add_unless_empty("room", entry.room);
        if (entry.id != 0) event.add("id", entry.id);
        event.add("name", entry.name).add("text", entry.text).add("time", entry.time);
        if (entry.kind == ChatEntry::Kind::action) event.add("me", true);
        if (with_tag) event.add_unless_empty("tag", entry.tag);
        return event.dump();
    }

private:
    using Deadlines = StringMap<Time>;

    static std::int64_t unix_ms() {
        using namespace std::chrono;
        return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
    }
    static std::string share_of(const std::string& address) {
        const auto parsed = IpAddress::parse(address);
        return parsed ? parsed->rate_limit_key() : address;
    }

    static std::string name_key(std::string_view name) { return "name " + detail::Presence::folded(name); }
    static std::string mute_key(const ChatRoom& room, const std::string& author) { return room.name() + '\n' + author; }
    bool holds(Deadlines& deadlines, const std::string& key) {
        const Time* deadline = deadlines.find(key);
        return deadline != nullptr && *deadline > now();
    }
    void set(Deadlines& deadlines, const std::string& key, Duration duration) {
        deadlines.erase_if([this](Time deadline) { return deadline <= now(); });
        if (duration > Duration::zero()) deadlines.find_or_emplace(key) = later(now(), duration);
        else deadlines.erase(key);
    }

    void expire_later(ChatRoom& room, Duration delay) {
        server_.loop().call_later(delay, [this, name = room.name()] {
            ChatRoom* found = find(name);
            if (found == nullptr) return;
            Time next;
            found->expiring = false;
            for (const std::string& gone : found->presence().expire(now(), next)) left(*found, gone);
            // Not one by one where many go one after another.
            if (next != (Time::max)())
                expire_later(*found, (std::max)(next - now(), Duration(std::chrono::milliseconds(50))));
        });
        room.expiring = true;
    }
    void left(ChatRoom& room, const std::string& name) {
        pass(entry_of(ChatEntry::Kind::go, room, name));
        if (room.presence().empty()) tidy_later();
    }
    // Rooms without users go when no callback can refer to them any more.
    void tidy_later() {
        if (std::exchange(tidying_, true)) return;
        server_.loop().post([this] {
            tidying_ = false;
            rooms_.erase_if([](ChatRoom& room) { return room.presence().empty(); });
        });
    }
    void forget_addresses() {
        addresses_.erase_if(
            [this](Address& address) { return address.connections == 0 && address.meter.full(limits.address, now()); });
        forget_at_ = (std::max)(std::size_t{1024}, 2 * addresses_.size());
    }

    inline void hook_failed(ChatHandler& handler, const char* name, const char* what);
    inline void on_entry(const ChatEntry& entry) override;
    inline void on_repeat(const ChatEntry& entry) override;
    inline void on_failure(const ChatEntry& entry, const std::string& cause) override;
    inline void deliver(const ChatEntry& entry, const ChatEvent& event, bool fleeting = false);
    inline void on_said(const ChatEntry& entry);
    inline void on_whisper(const ChatEntry& entry);
    inline void on_user(const ChatEntry& entry);
    ChatHandler* handler(std::uint64_t serial) const { return connections_.find(big_endian_key(serial)); }

    Server& server_;
    StringMap<ChatRoom> rooms_;
    StringMap<ChatHandler> connections_;  // by number
    std::uint64_t serial_;
    StringMap<Address> addresses_;
    std::size_t forget_at_ = 1024;
    Deadlines bans_, mutes_;
    StringMap<std::string> banned_as_;  // the identities that go with a banned name
    bool tidying_ = false;
    std::unique_ptr<ChatStore> store_;  // the first to go: it may call back
};

// ---- the handler ---------------------------------------------------------------------------------------------------

// A chat as one handler: server.route<ChatHandler>("/chat/{room}"). Clients send lines; a line that begins with a slash
// is a command, anything else is said to the room. They get JSON events, one a message. The query of the address may
// have `name`, `key` (a secret of the client's own, by which its connections are one user) and `last` (the id up to
// which it has the history). README.md has the tables of commands and events.
class ChatHandler : public WebSocketHandler {
public:
    // ---- to be overridden; whoever does calls ChatHandler's for the rest ---------------------------------------------

    // Who it is, asked before the 101; nothing refuses with 401. Default: whoever it says, "?name=Anna".
    virtual std::optional<ChatUser> authenticate(const Request& request) {
        return ChatUser{request.query("name").value_or("")};
    }
    // Default: anything but to moderate.
    virtual bool may(ChatAction action) {
        return action != ChatAction::kick && action != ChatAction::ban && action != ChatAction::mute;
    }
    // May change what is about to be said, also to somebody alone; false refuses it.
    virtual bool filter(std::string& text) {
        static_cast<void>(text);
        return true;
    }
    // This connection is in the room and has its history; leaves the room that it was told to be in.
    virtual void on_join(ChatRoom& room) { static_cast<void>(room); }
    virtual void on_leave(ChatRoom& room) { static_cast<void>(room); }
    // What this connection said is kept and was delivered.
    virtual void on_said(const ChatEntry& entry) { static_cast<void>(entry); }
    // A line "/command rest". False: there is no such command. Default: those of /help.
    virtual bool on_command(std::string_view command, std::string_view rest) {
        for (const Command& known : commands()) {
            if (known.name != command) continue;
            (this->*known.run)(rest);
            return true;
        }
        return false;
    }

    // ---- to be called ----------------------------------------------------------------------------------------------

    ChatHub& hub() { return *hub_; }
    // The room that this connection speaks in; null where it is in none.
    ChatRoom* here() { return places_.empty() ? nullptr : places_[current_].room; }
    // The user in that room; as authenticate() said where it is in none.
    const ChatUser& user() const { return places_.empty() ? who_ : places_[current_].user->who; }

    // Says it to the room that this connection speaks in, as its user would.
    void say(std::string_view text) { speak(ChatEntry::Kind::said, text); }
    // Answers this client alone.
    void tell(ChatEvent event) { write_message(event.add_unless_empty("tag", tag_).dump()); }
    void error(std::string_view code, std::string_view sentence) {
        tell(ChatEvent("error").add("code", code).add("text", sentence));
    }
    // As an address, as a user, or by a name that it has in a room.
    bool banned() const {
        const auto barred = [this](const std::string& name) { return hub_->banned(remote_address(), name, identity_); };
        return barred({}) ||
               std::any_of(places_.begin(), places_.end(), [&](const Place& at) { return barred(at.user->who.name); });
    }
    // Ends the connection, and its user's presence without a time of grace.
    void dismiss(std::string_view reason) {
        if (!is_open()) return;
        dismissed_ = true;
        write_message(ChatEvent("kicked").add("text", reason).dump());
        close(CloseCode::policy_violation, cut_utf8(reason, 123));
    }

    // ---- of a WebSocketHandler -------------------------------------------------------------------------------------

    std::optional<Response> prepare(const Request& request) override {
        hub_ = &ChatHub::of(server());
        std::optional<ChatUser> who = authenticate(request);
        if (!who) return Response(401, "Log in first.\n");
        who_ = std::move(*who);
        const std::string key = request.query("key").value_or("");
        if (who_.fixed) identity_ = "account " + who_.name;
        else if (key.size() >= 8 && key.size() <= 128) identity_ = "key " + fingerprint(key);
        if (hub_->banned(remote_address(), who_.name, identity_))
            return Response(403, "You are banned from this chat.\n");
        return std::nullopt;
    }

    void open() override {
        if (hub_ == nullptr) throw Error("ChatHandler::prepare: whoever overrides it must call it");
        serial_ = hub_->opened(*this);
        if (remote_address() != "unix") address_ = &hub_->address(remote_address());
        const ChatLimits& limits = hub_->limits;
        const bool named = who_.fixed || who_.name.empty() || text::good_name(who_.name, limits.max_name);
        if (!named || who_.name.empty()) who_.name = "guest";
        const std::string_view param = request().param("room"), wanted = param.empty() ? "lobby" : param;
        auto refusal = refuse_room(wanted);
        const bool elsewhere = refusal && refusal->code == "room_bad" && !refuse_room("lobby");
        if (!refusal || elsewhere) enter(refusal ? "lobby" : wanted);
        tell(hello());
        if (!named) error("name_bad", name_rule());
        if (refusal) error(refusal->code, refusal->sentence);
        if (here() != nullptr) ask(*here(), number_of(request().query("last").value_or("")));
    }

    void on_message(const Message& message) override {
        const detail::ChatLine line = detail::ChatLine::parse(message.binary() ? std::string_view() : message.text());
        tag_ = detail::ChatLine::good_tag(line.tag) ? line.tag : std::string_view();
        if (!flooding(message.size())) obey(message, line);
        tag_.clear();
    }

    void on_close() override {
        if (hub_ == nullptr) return;
        // RFC 6455 7.4.1: 1000 is an end on purpose; a page that is reloaded or a lost connection gives another.
        const bool at_once = dismissed_ || close_code() == CloseCode::normal;
        while (!places_.empty()) hub_->call(*this, "on_close", [&] { leave(places_.size() - 1, at_once); });
        if (address_ != nullptr) --address_->connections;
        hub_->closed(serial_);
    }

private:
    struct Place {
        ChatRoom* room;
        detail::Presence::User* user;
        bool joined = false;  // on_join() was called
    };
    struct Question {
        std::string room;
        std::optional<std::uint64_t> id;
        std::uint64_t told;  // the newest id of which the members were told when it was asked
    };
    struct Refusal {
        std::string_view code;
        std::string sentence;
    };
    struct Command {
        std::string_view name, usage, what;
        void (ChatHandler::*run)(std::string_view rest);
        bool moderation = false;
    };

    static std::string fingerprint(const std::string& key) {
        const auto digest = sha1(key);
        return base64(digest.data(), digest.size());
    }
    // A number that is too large is a large one: an id of no history, or for ever.
    static std::optional<std::uint64_t> number_of(std::string_view digits) {
        if (digits.empty()) return std::nullopt;
        constexpr std::uint64_t enough = 1'000'000'000'000'000'000;
        std::uint64_t value = 0;
        for (const char c : digits) {
            if (c < '0' || c > '9') return std::nullopt;
            value = (std::min)(value * 10 + static_cast<std::uint64_t>(c - '0'), enough);
        }
        return value;
    }

    ChatEvent hello() {
        ChatEvent event("hello");
        event.add("version", 2).add("server", "wschat");
        event.add("room", here() == nullptr ? Json() : Json(here()->name())).add("name", user().name);
        event.add("features", Json::array(std::vector<std::string_view>{"rooms", "names", "users", "history", "resume",
                                                                        "tags", "typing", "private", "commands"}));
        event.add("limits", Json{{"text", hub_->limits.max_text},
                                 {"name", hub_->limits.max_name},
                                 {"room", hub_->limits.max_room_name}});
        return event;
    }
    std::string name_rule() const {
        return "A name is 1 to " + std::to_string(hub_->limits.max_name) + " bytes of visible text.";
    }

    // ---- what comes in ---------------------------------------------------------------------------------------------

    bool flooding(std::size_t size) {
        const ChatLimits& limits = hub_->limits;
        const Time now = hub_->now();
        bool within = meter_.take(size, limits.connection, now);
        if (address_ != nullptr) within = address_->meter.take(size, limits.address, now) && within;
        const detail::FloodJudge::Verdict verdict = judge_.judge(within, limits.flood_patience, now);
        if (verdict == detail::FloodJudge::Verdict::tell)
            error("flood", "That was too much at once, and was not taken. Wait a little.");
        if (verdict == detail::FloodJudge::Verdict::close) close(CloseCode::policy_violation, "flooding");
        return verdict != detail::FloodJudge::Verdict::pass;
    }

    void obey(const Message& message, const detail::ChatLine& line) {
        if (message.binary()) return error("bad_line", "This chat is of text.");
        if (!line.tag.empty() && tag_.empty()) return error("bad_tag", "A tag is 1 to 64 visible ASCII characters.");
        if (line.command.empty()) return speak(ChatEntry::Kind::said, line.rest);
        if (!text::good_text(line.rest)) return error("bad_text", "Control characters are refused.");
        if (!on_command(line.command, line.rest))
            error("unknown_command",
                  "There is no command /" + std::string(line.command.substr(0, 40)) + "; /help names all.");
    }

    // Why the text may not be passed on; the filter has been asked.
    std::optional<Refusal> refuse_text(std::string& text) {
        const std::size_t max = hub_->limits.max_text;
        if (places_.empty()) return Refusal{"no_room", "You are in no room; /join ROOM."};
        if (hub_->muted(*here(), *places_[current_].user)) return Refusal{"muted", "You are muted for a while."};
        if (text.empty()) return Refusal{"empty", "There is nothing in that message."};
        if (text.size() > max) return Refusal{"too_long", "A message has at most " + std::to_string(max) + " bytes."};
        if (!text::good_text(text)) return Refusal{"bad_text", "Control characters are refused."};
        if (!filter(text)) return Refusal{"refused", "That message is refused here."};
        if (text.empty() || text.size() > max || !text::good_text(text))
            throw Error("filter: made a text that is refused");
        return std::nullopt;
    }

    void speak(ChatEntry::Kind kind, std::string_view said) {
        std::string text(said);
        if (!may(ChatAction::say)) return forbidden();
        if (const auto refusal = refuse_text(text)) return error(refusal->code, refusal->sentence);
        ChatEntry entry = entry_of(kind);
        entry.text = std::move(text);
        entry.author = ChatHub::author_of(*places_[current_].user);
        entry.tag = tag_;
        hub_->append(std::move(entry));
    }

    ChatEntry entry_of(ChatEntry::Kind kind) {
        ChatEntry entry = ChatHub::entry_of(kind, *here(), user().name);
        entry.sender = serial_;
        return entry;
    }
    void forbidden() { error("forbidden", "You may not do that."); }

    // ---- rooms -----------------------------------------------------------------------------------------------------

    std::size_t place_of(const ChatRoom& room) const {
        std::size_t at = 0;
        while (at != places_.size() && places_[at].room != &room) ++at;
        return at;
    }

    std::optional<Refusal> refuse_room(std::string_view name) {
        const ChatLimits& limits = hub_->limits;
        if (!text::good_name(name, limits.max_room_name))
            return Refusal{"room_bad", "The name of a room is 1 to " + std::to_string(limits.max_room_name) +
                                           " bytes of visible text."};
        if (!is_open()) return Refusal{"forbidden", "The connection has ended."};
        if (!may(ChatAction::join)) return Refusal{"forbidden", "You may not join that room."};
        if (places_.size() >= limits.max_rooms_per_connection)
            return Refusal{"room_limit",
                           "You are in " + std::to_string(places_.size()) + " rooms already; /leave one."};
        if (hub_->room_count() >= limits.max_rooms && hub_->find(std::string(name)) == nullptr)
            return Refusal{"room_limit", "There are too many rooms."};
        return std::nullopt;
    }

    void enter(std::string_view name) {
        places_.reserve(places_.size() + 1);  // who has arrived has a place
        ChatRoom& entered = hub_->room(name);
        places_.push_back({&entered, &hub_->arrive(entered, who_, identity_, *this, serial_), false});
        current_ = places_.size() - 1;
    }

    void leave(std::size_t at, bool at_once) {
        const Place place = places_[at];
        if (place.joined) hub_->call(*this, "on_leave", [&] { on_leave(*place.room); });
        places_.erase(places_.begin() + static_cast<std::ptrdiff_t>(at));
        if (current_ >= at && current_ != 0) --current_;
        if (Room* members = server().rooms().find(place.room->name())) members->leave(*this);
        hub_->depart(*place.room, *place.user, *this, at_once);
    }

    // ---- the history -----------------------------------------------------------------------------------------------

    void ask(const ChatRoom& room, std::optional<std::uint64_t> id) {
        const std::size_t limit = id ? hub_->limits.history_on_resume : hub_->limits.history_on_join;
        const Question question{room.name(), id, room.told()};
        hub_->store().since(room.name(), id, limit, [me = ref(), question](HistoryPage page) {
            if (auto* self = static_cast<ChatHandler*>(me.get())) self->on_page(question, std::move(page));
        });
    }

    // A connection becomes a member when it has all that the members were told; so it misses nothing, and gets nothing
    // twice, however long a page takes and whatever is said in the meantime.
    void on_page(const Question& question, HistoryPage page) {
        ChatRoom* chat_room = hub_->find(question.room);
        if (chat_room == nullptr || place_of(*chat_room) == places_.size() || !is_open()) return;
        Room& members = room(question.room);
        const bool joining = !members.has(*this);
        if (!page.error.empty()) {  // who comes back asks for the same again
            page.gap = true;
            page.last = question.id.value_or(chat_room->told());
        }
        if (page.error.empty()) hub_->settle(*chat_room, page);
        else server().report(LogLevel::error, "chat_not_read", {{"room", question.room}, {"cause", page.error}});
        if (joining) write_message(users_event(*chat_room));
        write_message(history_event(*chat_room, page, question.id.has_value()));
        if (!joining) return;
        // What the members were told since the question is asked for anew; the answer has it, unless the store is broken.
        const bool behind = page.last < chat_room->told() && question.told < chat_room->told();
        if (page.error.empty() && behind) return ask(*chat_room, page.last);
        members.join(*this);
        places_[place_of(*chat_room)].joined = true;
        hub_->call(*this, "on_join", [&] { on_join(*chat_room); });
    }

    std::string history_event(const ChatRoom& room, const HistoryPage& page, bool resumed) const {
        const std::string author = ChatHub::author_of(*places_[place_of(room)].user);
        std::size_t bytes = 0;
        std::vector<std::string> events;
        for (std::size_t i = page.entries.size(); i-- > 0 && bytes <= hub_->limits.max_history_event;) {
            const ChatEntry& entry = page.entries[i];
            events.push_back(ChatHub::said_event(entry, entry.author == author));
            bytes += events.back().size();
        }
        const bool cut = events.size() != page.entries.size() && resumed;
        std::string list = "[";
        for (std::size_t i = events.size(); i-- > 0;) list += events[i] + (i == 0 ? "" : ",");
        ChatEvent event("history");
        return event.add("room", room.name())
            .add("gap", page.gap || cut)
            .add("last", page.last)
            .add_json("entries", list + "]")
            .dump();
    }

    static std::string users_event(ChatRoom& room) {
        std::vector<std::string> names;
        std::string about;
        for (const ChatUser& user : room.users()) {
            names.push_back(user.name);
            if (!user.about.empty()) about += (about.empty() ? "{" : ",") + Json(user.name).dump() + ":" + user.about;
        }
        ChatEvent event("users");
        event.add("room", room.name()).add("users", Json::array(names));
        if (!about.empty()) event.add_json("about", about + "}");
        return event.dump();
    }

    // ---- commands --------------------------------------------------------------------------------------------------

    static const std::vector<Command>& commands() {
        static const std::vector<Command> all = {
            {"me", "/me TEXT", "says what you do", &ChatHandler::command_me},
            {"msg", "/msg NAME TEXT", "says something to one user alone", &ChatHandler::command_msg},
            {"who", "/who", "who is in this room", &ChatHandler::command_who},
            {"nick", "/nick NAME", "changes your name in this room", &ChatHandler::command_nick},
            {"rooms", "/rooms", "which rooms there are", &ChatHandler::command_rooms},
            {"join", "/join ROOM", "goes to a room, or speaks in it again", &ChatHandler::command_join},
            {"leave", "/leave [ROOM]", "leaves this room or another", &ChatHandler::command_leave},
            {"since", "/since ID", "what was said after the message with that id", &ChatHandler::command_since},
            {"typing", "/typing [stop]", "shows the others that you write", &ChatHandler::command_typing},
            {"help", "/help", "this list", &ChatHandler::command_help},
            {"kick", "/kick NAME [REASON]", "ends the connections of a user", &ChatHandler::command_kick, true},
            {"ban", "/ban NAME|ADDRESS [SECONDS]", "refuses a user for an hour", &ChatHandler::command_ban, true},
            {"mute", "/mute NAME [SECONDS]", "silences a user for ten minutes", &ChatHandler::command_mute, true},
        };
        return all;
    }

    void command_me(std::string_view rest) { speak(ChatEntry::Kind::action, rest); }

    void command_msg(std::string_view rest) {
        if (!may(ChatAction::whisper)) return forbidden();
        detail::Presence::User* to = here() == nullptr ? nullptr : here()->presence().cut_user(rest);
        std::string text(rest);
        if (here() != nullptr && to == nullptr) return error("unknown_user", "Nobody in this room has that name.");
        if (const auto refusal = refuse_text(text)) return error(refusal->code, refusal->sentence);
        if (to->leaves != (Time::max)())
            return error("user_away", to->who.name + " has lost the connection; try again soon.");
        if (!tag_.empty() && repeats(places_[current_].user->tags))
            return tell(ChatEvent("ack").add("room", here()->name()));
        ChatEntry entry = entry_of(ChatEntry::Kind::whisper);
        entry.text = std::move(text);
        entry.to = to->who.name;
        entry.tag = tag_;
        hub_->pass(std::move(entry));
    }
    // The tags of a user's latest private messages are kept, since the messages themselves are not.
    bool repeats(std::vector<std::string>& tags) const {
        if (text::contains(tags, tag_)) return true;
        if (tags.size() == 64) tags.erase(tags.begin());
        tags.push_back(tag_);
        return false;
    }

    void command_typing(std::string_view rest) {
        if (here() == nullptr || !may(ChatAction::say) || hub_->muted(*here(), *places_[current_].user)) return;
        ChatEntry entry = entry_of(ChatEntry::Kind::typing);
        entry.text = rest == "stop" ? "stop" : "";
        hub_->pass(std::move(entry));
    }

    void command_who(std::string_view) {
        if (here() == nullptr) return error("no_room", "You are in no room; /join ROOM.");
        write_message(users_event(*here()));
    }

    void command_rooms(std::string_view) {
        if (!may(ChatAction::list_rooms)) return forbidden();
        std::vector<Json> list;
        for (const auto& [name, users] : hub_->rooms())
            if (users != 0 && list.size() < 500) list.push_back(Json{{"room", name}, {"users", users}});
        tell(ChatEvent("rooms").add("rooms", Json::array(list)));
    }

    void command_nick(std::string_view rest) {
        const std::string name(rest);
        if (who_.fixed) return error("name_fixed", "Your name is that of your account.");
        if (!may(ChatAction::rename)) return forbidden();
        if (!text::good_name(name, hub_->limits.max_name)) return error("name_bad", name_rule());
        if (hub_->banned("", name, "")) return error("name_banned", "That name is banned.");
        if (here() == nullptr) return error("no_room", "You are in no room; /join ROOM.");
        if (name == user().name) return;
        detail::Presence::User& user = *places_[current_].user;
        if (hub_->muted(*here(), user)) return error("muted", "You are muted for a while.");
        const detail::Presence::User* holder = here()->presence().find(name);
        if (holder != nullptr && holder != &user)
            return error("name_taken", "That name is taken; " + here()->presence().free_name(name) + " is free.");
        who_.name = name;
        hub_->rename(*here(), user, name);
    }

    void command_join(std::string_view rest) {
        const ChatRoom* found = hub_->find(std::string(rest));
        const std::size_t at = found == nullptr ? places_.size() : place_of(*found);
        if (at != places_.size()) {
            current_ = at;
            return tell_room();
        }
        if (const auto refusal = refuse_room(rest)) return error(refusal->code, refusal->sentence);
        enter(rest);
        tell_room();
        ask(*here(), std::nullopt);
    }

    void command_leave(std::string_view rest) {
        const ChatRoom* found = rest.empty() ? here() : hub_->find(std::string(rest));
        const std::size_t at = found == nullptr ? places_.size() : place_of(*found);
        if (at == places_.size()) return error("no_room", "You are not in that room.");
        leave(at, true);
        tell_room();
    }
    void tell_room() {
        ChatEvent event("room");
        tell(event.add("room", here() == nullptr ? Json() : Json(here()->name())).add("name", user().name));
    }

    void command_since(std::string_view rest) {
        const auto id = number_of(rest);
        if (!id || here() == nullptr) return error("bad_command", "/since ID, in a room.");
        ask(*here(), id);
    }

    void command_help(std::string_view) {
        std::vector<Json> list;
        for (const Command& command : commands())
            if (!command.moderation || may(ChatAction::kick) || may(ChatAction::ban) || may(ChatAction::mute))
                list.push_back(Json{{"command", command.usage}, {"text", command.what}});
        tell(ChatEvent("help").add("commands", Json::array(list)));
    }

    void command_kick(std::string_view rest) {
        if (!may(ChatAction::kick)) return forbidden();
        const detail::Presence::User* user = here() == nullptr ? nullptr : here()->presence().cut_user(rest);
        if (user == nullptr) return error("unknown_user", "Nobody in this room has that name.");
        here()->kick(user->who.name, rest.empty() ? "You were asked to leave." : rest);
    }

    void command_ban(std::string_view rest) {
        if (!may(ChatAction::ban)) return forbidden();
        const std::string_view all = rest;
        const bool known = here() != nullptr && here()->presence().cut_user(rest) != nullptr;
        if (!known) text::cut_at(rest, ' ');
        const std::string_view whom = all.substr(0, all.size() - rest.size());
        const auto seconds = rest.empty() ? std::uint64_t{3600} : number_of(rest);
        if (whom.empty() || !seconds) return error("bad_command", "/ban NAME|ADDRESS [SECONDS]");
        hub_->ban(whom.back() == ' ' ? whom.substr(0, whom.size() - 1) : whom, seconds_of(*seconds));
    }

    void command_mute(std::string_view rest) {
        if (!may(ChatAction::mute)) return forbidden();
        const detail::Presence::User* user = here() == nullptr ? nullptr : here()->presence().cut_user(rest);
        const auto seconds = rest.empty() ? std::uint64_t{600} : number_of(rest);
        if (user == nullptr) return error("unknown_user", "Nobody in this room has that name.");
        if (!seconds) return error("bad_command", "/mute NAME [SECONDS]");
        hub_->mute(*here(), *user, seconds_of(*seconds));
    }
    // At most ten years.
    static Duration seconds_of(std::uint64_t seconds) {
        return std::chrono::seconds((std::min)(seconds, std::uint64_t{315'360'000}));
    }

    ChatHub* hub_ = nullptr;
    ChatUser who_;
    std::string identity_;
    std::uint64_t serial_ = 0;
    ChatHub::Address* address_ = nullptr;
    detail::FloodMeter meter_;
    detail::FloodJudge judge_;
    std::vector<Place> places_;
    std::size_t current_ = 0;
    std::string tag_;  // of the line that is being obeyed
    bool dismissed_ = false;
};

// ---- what the rooms and the hub do with handlers ---------------------------------------------------------------------

inline void ChatRoom::publish(std::string_view said, std::string_view name) {
    if (!text::good_text(said)) throw Error("publish: the text holds control characters, or is not UTF-8");
    ChatEntry entry = ChatHub::entry_of(ChatEntry::Kind::said, *this, name);
    entry.text = said;
    hub_.append(std::move(entry));
}
inline void ChatRoom::broadcast(std::string_view said, std::string_view name) {
    if (!text::good_text(said)) throw Error("broadcast: the text holds control characters, or is not UTF-8");
    ChatEntry entry = ChatHub::entry_of(ChatEntry::Kind::said, *this, name);
    entry.text = said;
    hub_.pass(std::move(entry));
}
inline void ChatRoom::since(std::optional<std::uint64_t> id, std::size_t limit, ChatStore::PageCall then) {
    hub_.store().since(name_, id, limit, std::move(then));
}
inline bool ChatRoom::kick(std::string_view name, std::string_view reason) {
    const detail::Presence::User* user = presence_.find(name);
    if (user == nullptr) return false;
    for (ChatHandler* connection : std::vector<ChatHandler*>(user->connections)) connection->dismiss(reason);
    return true;
}
inline bool ChatRoom::mute(std::string_view name, Duration duration) {
    const detail::Presence::User* user = presence_.find(name);
    if (user != nullptr) hub_.mute(*this, *user, duration);
    return user != nullptr;
}

inline void ChatHub::ban(std::string_view address_or_name, Duration duration) {
    const std::string whom(address_or_name);
    const bool address = whom == "unix" || IpAddress::parse(whom).has_value();
    set(bans_, address ? "address " + share_of(whom) : name_key(whom), duration);
    if (duration <= Duration::zero()) return;
    for (const auto& [name, room] : rooms_) {
        const detail::Presence::User* user = address ? nullptr : room.presence().find(whom);
        if (user != nullptr && !user->identity.empty()) banned_as_.find_or_emplace(user->identity) = name_key(whom);
    }
    for (const auto& [number, handler] : connections_)
        if (handler.banned()) handler.dismiss("You are banned.");
}

inline detail::Presence::User& ChatHub::arrive(ChatRoom& room, const ChatUser& who, const std::string& identity,
                                               ChatHandler& handler, std::uint64_t serial) {
    // The name of an account is its own: a visitor who has it gets another.
    detail::Presence::User* holder = who.fixed ? room.presence().find(who.name) : nullptr;
    if (holder != nullptr && !holder->who.fixed) rename(room, *holder, room.presence().free_name(who.name));
    const detail::Presence::Arrival arrival = room.presence().arrive(who, identity, &handler);
    if (!arrival.first) return arrival.user;
    try {
        ChatEntry entry = entry_of(ChatEntry::Kind::come, room, arrival.user.who.name);
        entry.text = who.about;
        entry.sender = serial;
        pass(std::move(entry));
    } catch (...) {
        detail::Presence::detach(arrival.user, &handler, now());
        throw;
    }
    return arrival.user;
}

inline void ChatHub::hook_failed(ChatHandler& handler, const char* name, const char* what) {
    try {
        server_.report(LogLevel::error, "exception",
                       {{"in", name}, {"what", what}, {"peer", handler.remote_address()}});
    } catch (const std::bad_alloc&) {  // there is no memory to tell it
    }
    handler.close(CloseCode::internal_error, "internal error");
}

inline void ChatHub::on_entry(const ChatEntry& entry) {
    switch (entry.kind) {
        case ChatEntry::Kind::said:
        case ChatEntry::Kind::action: return on_said(entry);
        case ChatEntry::Kind::whisper: return on_whisper(entry);
        case ChatEntry::Kind::typing: {
            ChatEvent event("typing");
            event.add("room", entry.room).add("name", entry.name);
            if (!entry.text.empty()) event.add("stop", true);
            return deliver(entry, event, true);
        }
        case ChatEntry::Kind::come:
        case ChatEntry::Kind::go:
        case ChatEntry::Kind::rename: return on_user(entry);
    }
}

// To all members but the sender.
inline void ChatHub::deliver(const ChatEntry& entry, const ChatEvent& event, bool fleeting) {
    Room* members = server_.rooms().find(entry.room);
    if (members == nullptr) return;
    if (fleeting) members->broadcast_volatile(event.dump(), handler(entry.sender));
    else members->broadcast(event.dump(), handler(entry.sender));
}

inline void ChatHub::on_said(const ChatEntry& entry) {
    ChatHandler* sender = handler(entry.sender);
    ChatRoom* room = find(entry.room);
    Room* members = server_.rooms().find(entry.room);
    if (room != nullptr && entry.id != 0) {
        if (entry.id <= room->told()) return;
        room->set_told(entry.id);
    }
    const bool apart = sender != nullptr && !entry.tag.empty();  // the tag is the sender's alone
    if (members != nullptr) members->broadcast(said_event(entry, false), apart ? sender : nullptr);
    if (apart) sender->write_message(said_event(entry, true));
    if (sender != nullptr) call(*sender, "on_said", [&] { sender->on_said(entry); });
}

inline void ChatHub::on_whisper(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    ChatEvent event("private");
    event.add("room", entry.room)
        .add("name", entry.name)
        .add("to", entry.to)
        .add("text", entry.text)
        .add("time", entry.time);
    const std::string plain = event.dump(), tagged = event.add_unless_empty("tag", entry.tag).dump();
    const detail::Presence::User* from = room->presence().find(entry.name);
    const detail::Presence::User* to = room->presence().find(entry.to);
    for (const detail::Presence::User* user : {from, to == from ? nullptr : to}) {
        if (user == nullptr) continue;
        for (ChatHandler* connection : user->connections)
            connection->write_message(connection == handler(entry.sender) ? tagged : plain);
    }
}

// Users of this server are in their list already; those of others are put there and taken from it.
inline void ChatHub::on_user(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    detail::Presence& presence = room->presence();
    detail::Presence::User* user = presence.find(entry.name);
    if (entry.kind == ChatEntry::Kind::come) {
        if (user == nullptr) presence.add(ChatUser{entry.name, entry.text}, {}).elsewhere = true;
        ChatEvent event("join");
        event.add("room", entry.room).add("name", entry.name).add("time", entry.time);
        if (!entry.text.empty()) event.add_json("about", entry.text);
        deliver(entry, event);
    } else if (entry.kind == ChatEntry::Kind::go) {
        if (user != nullptr && user->elsewhere) presence.remove(*user);
        deliver(entry, ChatEvent("leave").add("room", entry.room).add("name", entry.name).add("time", entry.time));
    } else {
        if (user != nullptr && user->elsewhere) presence.rename(*user, entry.text);
        ChatEvent event("nick");
        event.add("room", entry.room).add("old", entry.name).add("name", entry.text).add("time", entry.time);
        deliver(entry, event);
        // Who has no history yet is no member yet, but has been told a name.
        const detail::Presence::User* renamed = presence.find(entry.text);
        const Room& members = server_.rooms()[entry.room];
        for (ChatHandler* connection : renamed == nullptr ? std::vector<ChatHandler*>() : renamed->connections)
            if (!members.has(*connection)) connection->tell(event);
    }
}

inline void ChatHub::on_repeat(const ChatEntry& entry) {
    ChatHandler* sender = handler(entry.sender);
    if (sender == nullptr) return;
    ChatEvent event("ack");
    sender->write_message(event.add("room", entry.room).add("tag", entry.tag).add("id", entry.id).dump());
}

inline void ChatHub::on_failure(const ChatEntry& entry, const std::string& cause) {
    server_.report(LogLevel::error, "chat_not_kept", {{"room", entry.room}, {"cause", cause}});
    ChatHandler* sender = handler(entry.sender);
    if (sender == nullptr) return;
    ChatEvent event("error");
    event.add("code", "not_kept")
        .add("text", "That message could not be stored, and nobody has got it. Try again soon.");
    sender->write_message(event.add("room", entry.room).add_unless_empty("tag", entry.tag).dump());
}

WSCHAT_END

#endif  // WSCHAT_CHAT

// ====================================================================================================================
// section 17: Stores
//
// SqliteHistory: a history in a file, kept by a thread of its own. Knows of a chat only what ChatStore says.
// ====================================================================================================================

#if WSCHAT_CHAT && WSCHAT_SQLITE

#include <sqlite3.h>

#include <condition_variable>
#include <thread>

WSCHAT_BEGIN

struct SqliteOptions {
    std::size_t max_entries = 100'000;                // of a room; older ones are deleted. 0: no limit
    std::size_t max_file_bytes = 0;                   // a file of that size is full; 0: as large as the disk lets it be
    std::size_t max_waiting = 10'000;                 // entries before their commit; past it senders are told to wait
    Duration busy_timeout = std::chrono::seconds(2);  // for a lock that another program holds on the file
    bool survive_power_loss = false;                  // wait for the disk at each commit; without, the end of the
                                                      // process loses nothing, that of the machine the last seconds
};

namespace detail {

// The file: rooms with their newest ids, and entries. For one thread at a time; what fails throws an Error.
class SqliteFile {
public:
    SqliteFile(const std::string& path, const SqliteOptions& options) : path_(path), max_entries_(options.max_entries) {
        const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
        const int result = ::sqlite3_open_v2(path.c_str(), &database_, flags, nullptr);
        try {
            check(result);
            prepare_file(options);
        } catch (...) {
            ::sqlite3_close_v2(database_);
            throw;
        }
    }
    SqliteFile(const SqliteFile&) = delete;
    SqliteFile& operator=(const SqliteFile&) = delete;
    ~SqliteFile() {
        for (sqlite3_stmt* statement : statements_) ::sqlite3_finalize(statement);
        ::sqlite3_close_v2(database_);
    }

    // Gives each entry its id, in one transaction: all are kept, or none. True at each one whose author had sent the
    // tag before; its id is that of then.
    std::vector<bool> append(std::vector<ChatEntry>& entries) {
        std::vector<bool> repeated;
        transaction("BEGIN IMMEDIATE", [&] {
            for (ChatEntry& entry : entries) repeated.push_back(!append_one(entry));
        });
        return repeated;
    }

    HistoryPage since(const std::string& room, std::optional<std::uint64_t> id, std::size_t limit) {
        HistoryPage page;
        transaction("BEGIN", [&] {
            const auto [number, last] = find_room(room);
            const bool known = id && *id <= last;
            Query query(*this, Statement::since);
            query.bind(1, number)
                .bind(2, static_cast<std::int64_t>(known ? *id : 0))
                .bind(3, static_cast<std::int64_t>(limit));
            for (std::size_t bytes = 0; bytes <= max_page_bytes && query.row();
                 bytes += page.entries.back().text.size())
                page.entries.push_back(entry_of(query));
            std::reverse(page.entries.begin(), page.entries.end());
            page.last = last;
            page.gap = id && (!known || last - *id > page.entries.size());
        });
        return page;
    }

private:
    enum class Statement : std::size_t {
        find_start,
        find_room,
        add_room,
        find_tag,
        add,
        set_last,
        prune,
        since,
        count
    };

    // What changes a file of version N into one of version N + 1; a new file is of version 0.
    static constexpr const char* steps[] = {
        "CREATE TABLE room(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last INTEGER NOT NULL);"
        "CREATE TABLE entry(room INTEGER NOT NULL, id INTEGER NOT NULL, time INTEGER NOT NULL, kind INTEGER NOT NULL,"
        " name TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY(room, id)) WITHOUT ROWID;",
        "ALTER TABLE entry ADD COLUMN author TEXT NOT NULL DEFAULT '';"
        "ALTER TABLE entry ADD COLUMN tag TEXT NOT NULL DEFAULT '';"
        "CREATE UNIQUE INDEX entry_tag ON entry(room, author, tag) WHERE tag <> '';",
        // The ids of a room begin at the microseconds of the wall clock, so that one of a file that is gone is known to
        // be none of this.
        ("CREATE TABLE start(id INTEGER NOT NULL);"
         "INSERT INTO start VALUES(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER));"),
    };
    static constexpr int version = sizeof steps / sizeof steps[0];
    static constexpr int application = 0x77736368;  // "wsch"
    // About so much text is read at once: what asks for it is cheap.
    static constexpr std::size_t max_page_bytes = 1024 * 1024;

    static const char* text_of(Statement statement) {
        constexpr const char* texts[] = {
            "SELECT id FROM start",
            "SELECT id, last FROM room WHERE name = ?1",
            "INSERT INTO room(name, last) VALUES(?1, ?2)",
            "SELECT id FROM entry WHERE room = ?1 AND author = ?2 AND tag = ?3 AND tag <> ''",
            "INSERT INTO entry(room, id, time, kind, name, text, author, tag) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            "UPDATE room SET last = ?2 WHERE id = ?1",
            "DELETE FROM entry WHERE room = ?1 AND id <= ?2",
            ("SELECT id, time, kind, name, text, author, tag FROM entry WHERE room = ?1 AND id > ?2"
             " ORDER BY id DESC LIMIT ?3")};
        return texts[static_cast<std::size_t>(statement)];
    }

    // One use of a prepared statement, which is reset at its end.
    class Query {
    public:
        Query(SqliteFile& file, Statement which)
            : file_(file), statement_(file.statements_[static_cast<std::size_t>(which)]) {
            if (statement_ == nullptr) {
                file.check(::sqlite3_prepare_v3(file.database_, text_of(which), -1, SQLITE_PREPARE_PERSISTENT,
                                                &statement_, nullptr));
                file.statements_[static_cast<std::size_t>(which)] = statement_;
            }
        }
        Query(const Query&) = delete;
        Query& operator=(const Query&) = delete;
        ~Query() {
            ::sqlite3_reset(statement_);
            ::sqlite3_clear_bindings(statement_);
        }
        Query& bind(int at, std::int64_t value) {
            file_.check(::sqlite3_bind_int64(statement_, at, value));
            return *this;
        }
        // The text must outlive the query.
        Query& bind(int at, const std::string& value) {
            file_.check(::sqlite3_bind_text64(statement_, at, value.data(), value.size(), nullptr, SQLITE_UTF8));
            return *this;
        }
        bool row() {
            const int result = ::sqlite3_step(statement_);
            if (result != SQLITE_ROW && result != SQLITE_DONE) file_.check(result);
            return result == SQLITE_ROW;
        }
        std::int64_t number(int column) const { return ::sqlite3_column_int64(statement_, column); }
        std::string text(int column) const {
            const auto* bytes = static_cast<const char*>(::sqlite3_column_blob(statement_, column));
            return bytes == nullptr
                       ? ""
                       : std::string(bytes, static_cast<std::size_t>(::sqlite3_column_bytes(statement_, column)));
        }

    private:
        SqliteFile& file_;
        sqlite3_stmt* statement_;
    };

    void check(int result) const {
        if (result == SQLITE_OK) return;
        const char* why = database_ == nullptr ? ::sqlite3_errstr(result) : ::sqlite3_errmsg(database_);
        throw Error("SqliteHistory \"" + path_ + "\": " + why + " (" + std::to_string(result) + ")");
    }
    void execute(const std::string& sql) { check(::sqlite3_exec(database_, sql.c_str(), nullptr, nullptr, nullptr)); }
    std::int64_t value_of(const char* sql) {
        sqlite3_stmt* statement = nullptr;
        check(::sqlite3_prepare_v2(database_, sql, -1, &statement, nullptr));
        const int result = ::sqlite3_step(statement);
        const std::int64_t value = result == SQLITE_ROW ? ::sqlite3_column_int64(statement, 0) : 0;
        ::sqlite3_finalize(statement);
        if (result != SQLITE_ROW && result != SQLITE_DONE) check(result);
        return value;
    }
    template <class Work>
    void transaction(const char* begin, Work&& work) {
        // What is written to a file without a name is lost with this program.
        int moved = 0;
        ::sqlite3_file_control(database_, "main", SQLITE_FCNTL_HAS_MOVED, &moved);
        if (moved != 0) throw Error("SqliteHistory \"" + path_ + "\": the file was moved or deleted");
        execute(begin);
        try {
            work();
            execute("COMMIT");
        } catch (...) {
            // After some errors SQLite has rolled back itself.
            if (::sqlite3_get_autocommit(database_) == 0)
                ::sqlite3_exec(database_, "ROLLBACK", nullptr, nullptr, nullptr);
            throw;
        }
    }

    void prepare_file(const SqliteOptions& options) {
        const auto timeout = std::chrono::duration_cast<std::chrono::milliseconds>(options.busy_timeout).count();
        ::sqlite3_busy_timeout(database_, static_cast<int>(timeout));
        const std::string quoted = "SqliteHistory \"" + path_ + "\": ";
        const std::int64_t owner = value_of("PRAGMA application_id"), found = value_of("PRAGMA user_version");
        if (owner != application && (owner != 0 || found != 0 || value_of("SELECT count(*) FROM sqlite_master") != 0))
            throw Error(quoted + "it is a database of another program");
        if (found > version)
            throw Error(quoted + "it is of version " + std::to_string(found) + ", and this program knows " +
                        std::to_string(version));
        if (::sqlite3_db_readonly(database_, "main") == 1) throw Error(quoted + "it may only be read");
        execute("PRAGMA journal_mode = WAL");
        execute(options.survive_power_loss ? "PRAGMA synchronous = FULL" : "PRAGMA synchronous = NORMAL");
        if (options.max_file_bytes != 0) {
            const auto pages = static_cast<std::int64_t>(options.max_file_bytes) / value_of("PRAGMA page_size");
            execute("PRAGMA max_page_count = " + std::to_string((std::max)(pages, std::int64_t{1})));
        }
        if (found < version) migrate();
    }
    void migrate() {
        transaction("BEGIN IMMEDIATE", [this] {
            // Another program may have done it since we looked.
            for (auto at = value_of("PRAGMA user_version"); at < version; ++at) execute(steps[at]);
            execute("PRAGMA application_id = " + std::to_string(application));
            execute("PRAGMA user_version = " + std::to_string(version));
        });
    }

    struct RoomRow {
        std::int64_t number;
        std::uint64_t last;
    };
    RoomRow find_room(const std::string& name) {
        Query query(*this, Statement::find_room);
        query.bind(1, name);
        if (query.row()) return {query.number(0), static_cast<std::uint64_t>(query.number(1))};
        Query start(*this, Statement::find_start);
        return {0, start.row() ? static_cast<std::uint64_t>(start.number(0)) : 0};
    }
    // False where its author had sent the tag before.
    bool append_one(ChatEntry& entry) {
        RoomRow room = find_room(entry.room);
        if (room.number == 0) {
            Query(*this, Statement::add_room).bind(1, entry.room).bind(2, static_cast<std::int64_t>(room.last)).row();
            room.number = ::sqlite3_last_insert_rowid(database_);
        }
        if (!entry.tag.empty()) {
            Query known(*this, Statement::find_tag);
            known.bind(1, room.number).bind(2, entry.author).bind(3, entry.tag);
            if (known.row()) {
                entry.id = static_cast<std::uint64_t>(known.number(0));
                return false;
            }
        }
        const auto id = static_cast<std::int64_t>(room.last + 1);
        entry.id = room.last + 1;
        Query add(*this, Statement::add);
        add.bind(1, room.number).bind(2, id).bind(3, entry.time).bind(4, static_cast<std::int64_t>(entry.kind));
        add.bind(5, entry.name).bind(6, entry.text).bind(7, entry.author).bind(8, entry.tag).row();
        Query(*this, Statement::set_last).bind(1, room.number).bind(2, id).row();
        const auto old = id - static_cast<std::int64_t>(max_entries_);
        if (max_entries_ != 0 && old > 0) Query(*this, Statement::prune).bind(1, room.number).bind(2, old).row();
        return true;
    }
    static ChatEntry entry_of(const Query& query) {
        ChatEntry entry;
        entry.id = static_cast<std::uint64_t>(query.number(0));
        entry.time = query.number(1);
        entry.kind = query.number(2) == 1 ? ChatEntry::Kind::action : ChatEntry::Kind::said;
        entry.name = query.text(3);
        entry.text = query.text(4);
        entry.author = query.text(5);
        entry.tag = query.text(6);
        return entry;
    }

    std::string path_;
    std::size_t max_entries_;
    sqlite3* database_ = nullptr;
    sqlite3_stmt* statements_[static_cast<std::size_t>(Statement::count)] = {};
};

}  // namespace detail

// A history that outlives the server: server.history(SqliteHistory("chat.db")). What waits is written in one transaction
// by a thread of its own, and delivered and acknowledged after the commit. A file that can not be opened is an Error;
// one that can not be written later (full, locked, damaged) costs what was to be written, and its senders are told.
class SqliteHistory final : public ChatStore {
public:
    explicit SqliteHistory(const std::string& path, const SqliteOptions& options = {})
        : worker_(std::make_unique<Worker>(path, options)) {}

    void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
        worker_->start(listener, std::move(mailbox));
    }
    void append(ChatEntry entry) override {
        if (worker_->waiting() < worker_->max_waiting()) return worker_->add({std::move(entry), {}, 0, nullptr});
        worker_->target->listener->on_failure(entry, "too many messages wait to be written");
    }
    void pass(const ChatEntry& entry) override { worker_->target->listener->on_entry(entry); }
    void since(const std::string& room, std::optional<std::uint64_t> id, std::size_t limit, PageCall then) override {
        ChatEntry entry;
        entry.room = room;
        worker_->add({std::move(entry), id, limit, std::move(then)});
    }

private:
    // To append the entry or, where there is somebody to call, to read its room.
    struct Job {
        ChatEntry entry;
        std::optional<std::uint64_t> id;
        std::size_t limit;
        PageCall then;
    };
    // Whom posted work talks to; null when the store is gone. For the loop's thread.
    struct Target {
        Listener* listener = nullptr;
    };

    class Worker {
    public:
        Worker(const std::string& path, const SqliteOptions& options)
            : file_(path, options), max_waiting_(options.max_waiting) {}
        Worker(const Worker&) = delete;
        Worker& operator=(const Worker&) = delete;
        // What was added is written before.
        ~Worker() {
            if (!thread_.joinable()) return;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                stop_ = true;
            }
            changed_.notify_one();
            thread_.join();
            target->listener = nullptr;
        }

        void start(Listener& listener, std::shared_ptr<Mailbox> mailbox) {
            target->listener = &listener;
            mailbox_ = std::move(mailbox);
            try {
                thread_ = std::thread([this] { run(); });
            } catch (const std::system_error& error) {
                throw Error(std::string("SqliteHistory: no thread can be had: ") + error.what());
            }
        }
        void add(Job job) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                jobs_.push_back(std::move(job));
                ++waiting_;
            }
            changed_.notify_one();
        }
        std::size_t waiting() const { return waiting_.load(); }
        std::size_t max_waiting() const { return max_waiting_; }

        const std::shared_ptr<Target> target = std::make_shared<Target>();

    private:
        void run() {
            for (;;) {
                std::vector<Job> jobs;
                bool stop;
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    changed_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
                    jobs.swap(jobs_);
                    stop = stop_;
                }
                // In their order, so that a page has all that was delivered before it and nothing that comes after it.
                for (std::size_t i = 0; i < jobs.size();) {
                    const std::size_t begin = i;
                    while (i < jobs.size() && !jobs[i].then) ++i;
                    const bool reads = i == begin;
                    if (reads) ++i;
                    try {
                        if (!reads) write(jobs, begin, i);
                        else if (!stop) read(jobs[begin]);
                    } catch (const std::bad_alloc&) {  // there is no memory to tell it; who asked will ask again
                    }
                }
                waiting_ -= jobs.size();
                if (stop) return;
            }
        }
        void write(std::vector<Job>& jobs, std::size_t begin, std::size_t end) {
            std::vector<ChatEntry> entries;
            for (; begin != end; ++begin) entries.push_back(std::move(jobs[begin].entry));
            std::vector<bool> repeated;
            std::string cause;
            try {
                repeated = file_.append(entries);
            } catch (const std::exception& error) {
                cause = error.what();
            }
            post([entries = std::move(entries), repeated = std::move(repeated),
                  cause = std::move(cause)](Listener& listener) {
                for (std::size_t i = 0; i < entries.size(); ++i) {
                    if (!cause.empty()) listener.on_failure(entries[i], cause);
                    else if (repeated[i]) listener.on_repeat(entries[i]);
                    else listener.on_entry(entries[i]);
                }
            });
        }
        void read(Job& job) {
            HistoryPage page;
            try {
                page = file_.since(job.entry.room, job.id, job.limit);
            } catch (const std::exception& error) {
                page = HistoryPage();
                page.error = error.what();
            }
            post([then = std::move(job.then), page = std::move(page)](Listener&) mutable { then(std::move(page)); });
        }
        template <class Work>
        void post(Work&& work) {
            mailbox_->post([target = target, work = std::forward<Work>(work)]() mutable {
                if (target->listener != nullptr) work(*target->listener);
            });
        }

        detail::SqliteFile file_;
        std::size_t max_waiting_;
        std::shared_ptr<Mailbox> mailbox_;
        std::mutex mutex_;
        std::condition_variable changed_;
        std::vector<Job> jobs_;
        std::atomic<std::size_t> waiting_{0};  // jobs that are not done
        bool stop_ = false;
        std::thread thread_;
    };

    std::unique_ptr<Worker> worker_;
};

WSCHAT_END

#endif  // WSCHAT_CHAT && WSCHAT_SQLITE

#undef WSCHAT_NOINLINE
#undef WSCHAT_COLD
#undef WSCHAT_BEGIN
#undef WSCHAT_END
#undef WSCHAT_ABI
#undef WSCHAT_ABI_NAME
#undef WSCHAT_ABI_PASTE
