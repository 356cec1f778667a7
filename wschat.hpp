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
// MAP
//
// How a message travels, with the number of the section:
//
//   1. A Session (14) reads bytes from a Socket (10).
//   2. RequestParser (5) reads the request, HttpExchange (14) answers pages, Session::upgrade() opens a WebSocket.
//   3. From then on Connection (7) turns bytes into events: it checks frames (4) and UTF-8 (3), and inflates (6).
//   4. WebSocketDriver (14) calls the WebSocketHandler (8) for each event.
//   5. A Room (9) encodes a broadcast once, as an EncodedFrame (4), and adds it to the SendQueue (3) of each member.
//   6. At the end of the loop's turn (12) the Worker (14) flushes each dirty Session with one gathered write.
//
// A section uses only earlier sections, named in its row under "May use"; a script checks that. You can cut the file at
// any banner, and what is above compiles. Names for users are in wschat, all others in wschat::detail.
//
//   #   Section        Main types                                                       May use
//   1   Configuration  WSCHAT_* macros, version, ABI-tagged inline namespace            -
//   2   Vocabulary     Opcode, CloseCode, Message, Limits, Error, LogEntry, Mailbox     1
//   3   Bytes          SendArena, SendQueue, Utf8Validator, Json, TokenBucket           2
//   4   Frames         FrameHeader, FrameParser, EncodedFrame                           2-3
//   5   HTTP           Request, Response, RequestParser, ResponseParser, BodyParser       2-3
//   6   Compression    CompressionOptions, Deflater, Inflater, CompressionPool          2-5
//   7   Protocol       Connection                                                       2-6
//   8   Handler        WebSocketHandler, Reply, HandlerRef                               2-7
//   9   Rooms          Room, Rooms                                                      2-4, 7-8
//   10  Sockets        IpAddress, Socket, Transport, Poller (epoll, kqueue, poll)       2-3
//   11  TLS            TlsOptions, TlsContext, TlsStream, TlsTransport                  2-3, 10
//   12  Loop           Loop, timers, post(), signals                                    2-3, 10
//   13  Site           Pattern, Route, Page, File, policies on origins and proxies      2-5, 8, 10
//   14  Server         HttpExchange, WebSocketDriver, Session, Worker, Server           all above
//   15  Client         Client, ClientOptions, ResolverPool, ClientLink                  all above
//   16  Chat           ChatHandler, ChatHub, ChatRoom, MemoryHistory     public names of the sections above
//   17  Stores         SqliteHistory                                                    2-3, 12, 16
//
// Where to change what:
//
//   limits, defaults         of a connection: Limits; of a server: ServerLimits (2); of the chat: ChatLimits (16)
//   close codes and causes   CloseCode, CloseCause (2); Connection::close(), fail(), abort() (7)
//   closing                  Connection (7) for frames; Session::finish_websocket() (14) for the socket
//   lingering                Limits (2); Session::linger() (14)
//   keepalive                Connection::tick(), deadline() (7)
//   backpressure             Connection::exceeds_backlog() (7); when reading pauses: WebSocketDriver::high_water() (14)
//   fairness                 one visit's budget: WebSocketDriver::max_events (14), Connection::budget_spent() (7)
//                            who waits: TurnState, Session::may_work(), Worker::continue_waiting() (14)
//   order of flushing        Worker::end_turn(), Session::flush() (14)
//   a method, a body         Page (13), BodyParser (5), HttpExchange::expect_body() (14)
//   answers that come later  Reply (8); HttpExchange::make_reply(), Session::finish_upgrade() (14)
//   a header on each answer  HttpExchange::queue_head() (14); on files alone: file_answer() (13)
//   routing, static files    Pattern, PatternMap, Site; a media type: content_type() (13)
//   origins                  Site::origin_allowed() (13), same_host() (5), WebSocketDriver::check_handshake() (14)
//   hosts, trusted proxies   Site (13)
//   another poller           Poller, SystemPoller, Poller::make() (10)
//   a metric                 Metrics, metric_table (14); it is counted where it happens
//   when a client reconnects ClientLink::retry_delay(), may_retry() (15); its stages: ClientLink (15)
//   a chat command           ChatCommands::commands() (16); in a program: override ChatHandler::on_command()
//   another history          ChatStore (16); SqliteHistory (17) is an example
//
// Public names:
//   Clock, Time, Duration, saturating_add, Error, Opcode, CloseCode, number, CloseCause, to_string, ConnectStage,
//   ConnectError, WriteStatus, Message, BacklogPolicy, Limits, ServerLimits, LogLevel, LogEntry, Mailbox, valid_utf8,
//   truncate_utf8, sha1, base64, random_bytes, Json, escape_for_log, AccessEntry, unix_ms, utc_time, to_json,
//   log_to_stderr, log_json_to_stderr, access_to_stderr, access_json_to_stderr, Rate, TokenBucket, big_endian_key,
//   StringMap, EncodedFrame, Fields, FormPart, Request, CookieOptions, Response, CompressionOptions, Loop, Room, Rooms,
//   Server, WebSocketHandler, Reply, HandlerRef, CookieSigner, CorsOptions, IpAddress, ListenOptions, PollerKind,
//   TlsCertificate, TlsOptions, SymbolicLinks, beside, Route, Metrics, prometheus_text, ServerOptions, HandlerTest,
//   TestServer, TestClient, TestRequest, TestResponse, Client, ClientTls, ReconnectOptions, ClientAttempt,
//   ClientOptions, ChatHandler, ChatHub, ChatEntry, ChatFact, HistoryPosition, HistoryPage, HistoryExport, ChatStore,
//   HistoryLimits, MemoryHistory, chat_fold, ChatEvent, FloodRates, ChatUser, PresenceTable, ChatLimits, ChatAction,
//   ChatReply, ChatRoom, SqliteOptions, SqliteHistory
//   text::all_of, text::concat, text::to_lower, text::is_digit, text::is_alphanumeric, text::equals_ignore_case,
//   text::starts_with, text::trim, text::is_token_char, text::is_token, text::contains, text::consume_until,
//   text::parse_unsigned, text::hex_value, text::percent_decode
//
// Macros that the program may set, the same in each translation unit. Units that were compiled with different values of
// them do not link, because their names are part of the namespace (except WSCHAT_CHAT, which only adds names):
//
//   WSCHAT_CHAT        1: the ready-made chat (sections 16 and 17)
//   WSCHAT_ZLIB        1: compression (section 6) with zlib: link with -lz
//   WSCHAT_OPENSSL     1: TLS (section 11) with OpenSSL 1.1.1 or newer: link with -lssl -lcrypto
//   WSCHAT_LIBURING    1: on Linux, many sends in one system call: link with -luring
//   WSCHAT_SQLITE      1: SqliteHistory (section 17) with SQLite 3: link with -lsqlite3
//   WSCHAT_UTF8PROC    1: chat_fold() (section 16) for all scripts, with utf8proc: link with -lutf8proc
//   WSCHAT_HIREDIS     reserved; 0
//
// Defined here to be read: WSCHAT_VERSION_MAJOR, _MINOR, _PATCH, WSCHAT_VERSION (10000 * major + 100 * minor + patch),
// WSCHAT_VERSION_STRING.
//
// Threads. A server is one loop on one thread, the thread that calls run() or poll(). Any thread may use Loop::post(),
// Loop::mailbox(), Mailbox::post(), HandlerRef (except get()), Reply and Server::shutdown(). Everything else belongs to
// the loop's thread; builds without NDEBUG check that (assert) in each send and close. To use several cores, run
// several servers, one per thread, with ServerOptions::reuse_port.
//
// Lifetime. The server owns handlers. After open(), a handler lives until on_close() returns. If the handshake is
// refused, it is destroyed without on_close(). A Message and a Room& are valid until the callback returns. To refer to
// a handler after a callback, keep its ref(), never a pointer.
//
// Errors. Network failures never throw: you see a WriteStatus, on_close() or a log entry. Mistakes of the caller (an
// illegal close code, a port in use, a missing page) throw a wschat::Error, whose text names the call, the value and
// the cause. An exception that leaves a callback is logged. After open() it closes that connection with 1011; before
// it, and in pages, the answer is 500.
//
// Re-entrancy. A callback may call anything: close any connection, join, leave, broadcast, stop the server. No call
// runs a callback of another connection: output and closing are queued, and the loop acts on them after the callback.

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
#ifndef WSCHAT_UTF8PROC
#define WSCHAT_UTF8PROC 0
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
#error "wschat.hpp needs C++17: compile with -std=c++17 or newer (Visual Studio: /std:c++17)"
#endif
#if !defined(__cpp_exceptions) && !defined(_CPPUNWIND)
#error "wschat.hpp needs exceptions: compile without -fno-exceptions (Visual Studio: with /EHsc)"
#endif
#if defined(_WIN32) && defined(_WINSOCKAPI_) && !defined(_WINSOCK2API_)
#error "wschat.hpp needs winsock2.h: include wschat.hpp before windows.h, or define WIN32_LEAN_AND_MEAN before it"
#endif
#if defined(_WIN32_WINNT) && _WIN32_WINNT < 0x0600
#error "wschat.hpp needs Windows Vista or newer: define _WIN32_WINNT as 0x0600 or more"
#endif
#if !defined(_WIN32) && !__has_include(<sys/socket.h>)
#error "wschat.hpp needs the sockets of POSIX or Windows: this system has no <sys/socket.h>"
#endif
#if WSCHAT_ZLIB && !__has_include(<zlib.h>)
#error "WSCHAT_ZLIB needs zlib: <zlib.h> is not found (Debian: zlib1g-dev)"
#endif
#if WSCHAT_OPENSSL && !__has_include(<openssl/ssl.h>)
#error "WSCHAT_OPENSSL needs OpenSSL: <openssl/ssl.h> is not found (Debian: libssl-dev)"
#endif
#if WSCHAT_SQLITE && !__has_include(<sqlite3.h>)
#error "WSCHAT_SQLITE needs SQLite 3: <sqlite3.h> is not found (Debian: libsqlite3-dev)"
#endif
#if WSCHAT_LIBURING && defined(__linux__) && !__has_include(<liburing.h>)
#error "WSCHAT_LIBURING needs liburing: <liburing.h> is not found (Debian: liburing-dev)"
#endif

#if defined(__GNUC__)
#define WSCHAT_NOINLINE __attribute__((noinline))
#define WSCHAT_COLD __attribute__((cold))  // set-up, pages, refusals, logs: rather small, and soon compiled, than fast
#else
#define WSCHAT_NOINLINE
#define WSCHAT_COLD
#endif

// The two steps let the feature macros expand before they are pasted. All of it is undefined at the end of the file.
#define WSCHAT_ABI_PASTE(major, minor, zlib, openssl, sqlite, hiredis, liburing, utf8proc) \
    v##major##_##minor##_z##zlib##o##openssl##s##sqlite##r##hiredis##u##liburing##p##utf8proc
#define WSCHAT_ABI_NAME(major, minor, zlib, openssl, sqlite, hiredis, liburing, utf8proc) \
    WSCHAT_ABI_PASTE(major, minor, zlib, openssl, sqlite, hiredis, liburing, utf8proc)
#define WSCHAT_ABI                                                                                          \
    WSCHAT_ABI_NAME(WSCHAT_VERSION_MAJOR, WSCHAT_VERSION_MINOR, WSCHAT_ZLIB, WSCHAT_OPENSSL, WSCHAT_SQLITE, \
                    WSCHAT_HIREDIS, WSCHAT_LIBURING, WSCHAT_UTF8PROC)

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
// The plain values that all other sections share: opcodes, close codes, messages, limits, errors and log entries.
// ====================================================================================================================

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

WSCHAT_BEGIN

// All timers use the monotonic clock: a change of the wall clock has no effect.
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Duration = Clock::duration;

// Returns Time::max() instead of overflowing.
constexpr Time saturating_add(Time time, Duration delay) {
    return delay > (Time::max)() - time ? (Time::max)() : time + delay;
}

// A mistake of the caller. The text names the call, the value and the cause.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// RFC 6455 11.8.
enum class Opcode : std::uint8_t { continuation = 0x0, text = 0x1, binary = 0x2, close = 0x8, ping = 0x9, pong = 0xA };

namespace detail {

constexpr bool is_control(Opcode opcode) { return (static_cast<unsigned>(opcode) & 0x8u) != 0; }

}  // namespace detail

// RFC 6455 7.4.1 and the IANA registry. Applications use 3000-4999: CloseCode{4001}.
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

// Whether a Close frame may carry the code (RFC 6455 7.4).
constexpr bool legal_on_wire(CloseCode code) {
    const unsigned n = number(code);
    return (n >= 1000 && n <= 1003) || (n >= 1007 && n <= 1014) || (n >= 3000 && n <= 4999);
}

}  // namespace detail

// Who ended a connection, and why.
enum class CloseCause : std::uint8_t {
    none,               // the connection is not closed
    peer,               // the peer sent a Close frame first
    local,              // this side called close(), and the peer answered
    protocol_error,     // the peer broke the protocol or an input limit; close_code() names the rule
    connection_lost,    // the transport ended or failed without a Close frame
    ping_timeout,       // the peer did not answer a keepalive ping
    closing_timeout,    // the peer did not answer our Close frame
    backlog,            // the peer read too slowly: Limits::max_backlog or ServerLimits::max_total_backlog
    handler_exception,  // an exception left a callback
    shutdown            // the server shut down
};

constexpr std::string_view to_string(CloseCause cause) {
    // clang-format off
    constexpr std::string_view names[] = {
        "none", "peer", "local", "protocol error", "connection lost", "ping timeout", "closing timeout", "backlog",
        "handler exception", "shutdown"};
    // clang-format on
    return names[static_cast<std::size_t>(cause)];
}

// How far an attempt of a client to connect came before it failed.
enum class ConnectStage : std::uint8_t {
    url,      // the URL is none that this build can connect to; never tried again
    resolve,  // the host's name
    connect,  // TCP, or a Unix socket
    proxy,    // the proxy refused
    tls,      // the TLS handshake, with the server's certificate
    http,     // the response is no HTTP, or not a 101
    upgrade   // the 101 breaks RFC 6455 4.1
};

constexpr std::string_view to_string(ConnectStage stage) {
    constexpr std::string_view names[] = {"url", "resolve", "connect", "proxy", "tls", "http", "upgrade"};
    return names[static_cast<std::size_t>(stage)];
}

// Why a client could not connect: WebSocketHandler::on_failure().
struct ConnectError {
    ConnectStage stage;
    int status;                        // of the HTTP response; 0: there was none
    std::string body;                  // of that response, at most 64 KiB
    std::string sentence;              // the cause
    std::optional<Duration> retry_in;  // the client tries again after this time; nothing: it has given up
};

// The result of writing a message.
enum class WriteStatus : std::uint8_t {
    sent,     // the kernel gets the message at the end of the loop's turn
    queued,   // the peer is slow: the message waits behind earlier bytes that the kernel has not taken
    dropped,  // the backlog is full and the policy is BacklogPolicy::drop; counted in dropped_messages()
    closed    // the connection is not open; nothing was written
};

// A received message: a view that is valid until the callback returns.
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
    close,  // the connection is closed with 1008, or aborted if the Close frame cannot be sent
    drop    // the new message is dropped and counted
};

// The limits of one connection. Sizes are in bytes. A duration of zero turns that timer off. ServerOptions::limits is
// the default of all connections; Route::set_limits() replaces it for the connections of a route.
struct Limits {
    // The time from the accept to a complete request. An incomplete request does not extend it. It starts again for
    // each request, and when the client receives a part of a response.
    Duration handshake_timeout = std::chrono::seconds(10);
    // How long a connection may be idle between two requests. Answers announce it in whole seconds.
    Duration keep_alive_timeout = std::chrono::seconds(75);
    std::size_t max_request_line = 8 * 1024;   // 414
    std::size_t max_header_bytes = 16 * 1024;  // 431
    std::size_t max_header_fields = 100;       // 431
    std::size_t max_body = 1024 * 1024;        // of a request for a page; 413
    // A page or a handshake that is answered by a Reply has this time; 503. For a handshake, handshake_timeout counts
    // too.
    Duration reply_timeout = std::chrono::seconds(60);

    std::size_t max_message_size = 1024 * 1024;  // of a complete message, after decompression; 1009
    std::size_t max_fragments = 1024;            // of one message; 1008
    unsigned control_frames_per_second = 100;    // the average rate of pings and pongs; 1008. 0: no limit
    unsigned control_frames_burst = 500;         // the number of pings and pongs that may arrive at once

    // Average rates of a WebSocket's input. 0: no limit. Past them nothing is lost and nothing is closed: reading
    // pauses until the rate is kept again, and TCP slows the peer down.
    unsigned messages_per_second = 0;
    unsigned messages_burst = 0;       // the number of messages that may arrive at once. 0: messages_per_second
    std::size_t bytes_per_second = 0;  // frames and headers, before decompression; this number may arrive at once

    // Bytes that were written and that the kernel has not taken. An empty queue accepts one message of any size.
    std::size_t max_backlog = 1024 * 1024;
    BacklogPolicy backlog_policy = BacklogPolicy::close;
    // Unsent bytes that the kernel may hold for a WebSocket from its first volatile message on (TCP_NOTSENT_LOWAT, or
    // SO_SNDBUF where that is missing). A slow peer would otherwise get volatile messages that have grown old in there:
    // Linux holds up to 4 MB. 0: the system decides.
    std::size_t send_buffer = 64 * 1024;

    Duration ping_interval = std::chrono::seconds(20);  // the server pings a peer that is silent for this time
    Duration ping_timeout = std::chrono::seconds(20);   // the peer has this time to send something after the ping
    // The time for the peer's answer to our Close frame. Each 64 KiB that are queued before the frame add a second.
    Duration closing_timeout = std::chrono::seconds(5);
    // After our last byte, input is read and discarded for this time and up to this size. More input stays unread.
    Duration linger_timeout = std::chrono::seconds(2);
    std::size_t linger_bytes = 256 * 1024;
};

// The limits of a whole server: ServerOptions::server_limits. Sizes are in bytes.
struct ServerLimits {
    // Output and unfinished input of all connections together. Above it, the connections with the most are closed.
    std::size_t max_total_backlog = 256 * 1024 * 1024;
    std::size_t max_connections = 0;              // 503; 0: the descriptor limit of the process minus 64; files count
    std::size_t max_connections_per_address = 0;  // 503; 0: no limit. An IPv6 /64 counts as one address
};

enum class LogLevel : std::uint8_t { debug, info, warning, error };

constexpr std::string_view to_string(LogLevel level) {
    constexpr std::string_view names[] = {"debug", "info", "warning", "error"};
    return names[static_cast<std::size_t>(level)];
}

// One event of the server's log: a short constant name, and fields that may contain data from a peer. A view that is
// valid until the log function returns. to_string(entry) formats it as one safe line.
struct LogEntry {
    LogLevel level;
    std::string_view event;
    const std::vector<std::pair<std::string_view, std::string>>& fields;
};

// One answer to an HTTP request, for an access log: Server::on_access(). A view that is valid until the function
// returns.
struct AccessEntry {
    std::string_view remote_address;  // of the client; behind a trusted proxy, the address that it forwards
    std::string_view method, path;    // the path as received, without the query; both empty if the request is malformed
    int status;                       // 101: a WebSocket
    std::uint64_t size;               // bytes of the body
    Duration duration;                // from the end of the request's head to the answer
};

namespace detail {

// A callable void() of any type. Unlike std::function it also takes callables that can only be moved.
class Task {
public:
    template <class Function, class = std::enable_if_t<!std::is_same_v<std::decay_t<Function>, Task> &&
                                                       std::is_invocable_v<std::decay_t<Function>&>>>
    Task(Function&& function) : callable_(new Holder<std::decay_t<Function>>(std::forward<Function>(function))) {}

    void operator()() { callable_->call(); }

private:
    struct Callable {
        virtual ~Callable() = default;
        virtual void call() = 0;
    };
    template <class Function>
    struct Holder final : Callable {
        template <class Argument>
        explicit Holder(Argument&& argument) : function(std::forward<Argument>(argument)) {}
        void call() override { function(); }
        Function function;
    };

    std::unique_ptr<Callable> callable_;
};

}  // namespace detail

// Runs work on the thread of a loop. Any thread may call post(), also after the end of the loop. `work` is any callable
// without arguments. Returns false if the loop is gone; then the work does not run.
class Mailbox {
public:
    virtual ~Mailbox() = default;
    virtual bool post(detail::Task work) = 0;
};

WSCHAT_END

// ====================================================================================================================
// section 3: Bytes
//
// Buffers for input, output queues and the arena that they share, UTF-8, SHA-1, base64, JSON text, text helpers, log
// lines, the token bucket, maps. Knows nothing of frames or HTTP.
// ====================================================================================================================

#include <algorithm>
#include <array>
#include <cerrno>
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
#if defined(__linux__)
#include <sys/random.h>
#else
#include <random>
#endif

WSCHAT_BEGIN

namespace detail {

// Loads the first `lines` cache lines of 64 bytes of an object that is needed soon. The object may be null.
#if defined(__GNUC__)
inline void prefetch(const void* object, std::uintptr_t lines) {
    const auto begin = reinterpret_cast<std::uintptr_t>(object);
    for (std::uintptr_t i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(begin + 64 * i));
    __asm__ volatile("");  // without it g++ removes the call because it sees no effect
}
#else
inline void prefetch(const void*, std::uintptr_t) {}
#endif

// A large block begins in the middle of a page. The kernel fills its own pages from their beginning, and many
// processors copy slowly between addresses with the same offset in a page (4 KiB aliasing). Gain: the kernel needs half
// the time for a message of 1 MiB.
constexpr std::size_t large_block = 64 * 1024;
constexpr std::size_t page_size = 4096;

inline char* allocate_block(std::size_t size) {
    if (size < large_block) return static_cast<char*>(::operator new(size));
    return static_cast<char*>(::operator new(size + page_size / 2, std::align_val_t(page_size))) + page_size / 2;
}
// Not inlined: g++ 12 would warn about a null pointer.
WSCHAT_NOINLINE inline void free_large_block(char* block) {
    ::operator delete(block - page_size / 2, std::align_val_t(page_size));
}
inline void free_block(char* block, std::size_t size) {
    if (size < large_block) ::operator delete(block);
    else free_large_block(block);
}

// A growable buffer for the received part of an unfinished message. Unlike std::string it does not zero new memory, and
// release() frees all of it. The capacity grows with the appended bytes, to at most twice their number.
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
    std::size_t available() const { return capacity_ - size_; }
    bool empty() const { return size_ == 0; }
    std::string_view view() const { return {data_, size_}; }

    // Makes `more` bytes available behind end(). `last`: no more will follow.
    void reserve(std::size_t more, bool last = false) {
        if (more <= available()) return;
        const std::size_t capacity = last ? size_ + more : (std::max)(size_ + more, 2 * capacity_);
        char* data = allocate_block(capacity);
        if (size_ != 0) std::memcpy(data, data_, size_);
        free_block(data_, capacity_);
        data_ = data;
        capacity_ = capacity;
    }
    // Adds n bytes that the caller has written to end(). At most available().
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

// An append-only block of output bytes with a reference count. The count is not atomic, because a chunk stays on the
// thread of its loop.
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
    std::size_t available() const { return capacity_ - size_; }
    char* data() { return reinterpret_cast<char*>(this + 1); }
    char* end() { return data() + size_; }
    void advance(std::size_t n) { size_ += n; }
    void clear() { size_ = 0; }

private:
    Chunk(std::size_t capacity, bool pooled) : capacity_(capacity), pooled_(pooled) {}
    // Not inlined: g++ 12 would warn that two releases in a row destroy the chunk twice.
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

// Memory for all output of a loop. Frames are written one after another into pooled chunks, and queues hold slices of
// them. A chunk without slices is used again: sending allocates nothing while the peers read. The arena also stores a
// few buffers of large received messages for later messages.
class SendArena {
public:
    SendArena() = default;
    SendArena(const SendArena&) = delete;
    SendArena& operator=(const SendArena&) = delete;

    // The caller fills the n bytes through writable(slice).
    Slice allocate(std::size_t n) {
        ChunkRef chunk = n > max_pooled_slice ? ChunkRef(Chunk::make(n, false)) : pooled_chunk(n);
        const std::size_t begin = chunk->size();
        chunk->advance(n);
        return {std::move(chunk), begin, begin + n};
    }
    static char* writable(const Slice& slice) { return slice.chunk->data() + slice.begin; }

    // Returns a recycled buffer, or an empty one.
    Bytes acquire_buffer() {
        if (buffers_.empty()) return {};
        Bytes buffer = std::move(buffers_.back());
        buffers_.pop_back();
        return buffer;
    }
    void recycle(Bytes&& buffer) {
        buffer.clear();
        const bool fits = buffer.capacity() >= min_buffer && buffer.capacity() <= max_buffer;
        if (fits && buffers_.size() < max_buffers) buffers_.push_back(std::move(buffer));
        else buffer.release();
    }

private:
    static constexpr std::size_t min_buffer = 64 * 1024;
    static constexpr std::size_t max_buffer = 2 * 1024 * 1024;
    static constexpr std::size_t max_buffers = 4;

    // A larger slice gets its own chunk: a queue that holds it holds no other bytes.
    static constexpr std::size_t max_pooled_slice = 64 * 1024;
    static constexpr std::size_t pooled_size = 256 * 1024;
    static constexpr std::size_t max_pooled = 8;

    const ChunkRef& pooled_chunk(std::size_t n) {
        if (current_ < pool_.size()) {
            ChunkRef& current = pool_[current_];
            if (!current->shared()) current->clear();
            if (current->available() >= n) return current;
        }
        for (current_ = 0; current_ < pool_.size(); ++current_) {
            if (pool_[current_]->shared()) continue;
            pool_[current_]->clear();
            return pool_[current_];
        }
        ChunkRef chunk(Chunk::make(pooled_size, true));
        if (pool_.size() < max_pooled) pool_.push_back(std::move(chunk));
        else pool_[current_ = 0] = std::move(chunk);  // the queues that use the old chunk keep it alive
        return pool_[current_];
    }

    std::vector<ChunkRef> pool_;
    std::size_t current_ = 0;
    std::vector<Bytes> buffers_;
};

inline Slice copy(SendArena& arena, std::string_view bytes) {
    Slice slice = arena.allocate(bytes.size());
    if (!bytes.empty()) std::memcpy(SendArena::writable(slice), bytes.data(), bytes.size());
    return slice;
}

// The output of one connection as slices in order. Adjacent slices of a chunk are merged: what a turn of the loop
// writes to a room is one piece in the queue of each member.
class SendQueue {
public:
    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    // The bytes, and the sent part of the oldest chunk, which stays until all of that chunk is sent.
    std::size_t held() const {
        const Slice& oldest = front_ < older_.size() ? older_[front_] : tail_;
        return oldest.chunk && !oldest.chunk->pooled() ? size_ + oldest.begin : size_;
    }

    void append(const Slice& slice) {
        if (slice.size() == 0) return;
        push(slice);
        size_ += slice.size();
    }

    // Writes at most max pieces, the oldest first. Returns their number.
    std::size_t gather(std::string_view* pieces, std::size_t max) const {
        std::size_t count = 0;
        for (std::size_t i = front_; i < older_.size() && count < max; ++i) pieces[count++] = older_[i].view();
        if (count < max && tail_.size() != 0) pieces[count++] = tail_.view();
        return count;
    }

    // Removes the first n bytes.
    void consume(std::size_t n) {
        size_ -= n;
        if (size_ == 0 && older_.empty()) {
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
        if (front_ != 0) erase_sent();
    }

    // Copies slices of pooled chunks into private chunks, because a small slice would keep a complete pooled chunk in
    // use. The session calls it when the kernel accepts no more bytes.
    void detach_from_pool() {
        const std::size_t from = (std::max)(front_, detached_);
        if (from == older_.size() && (!tail_.chunk || !tail_.chunk->pooled())) return;
        SendQueue copies;  // this queue does not change if memory runs out
        for (std::size_t i = from; i < older_.size(); ++i) copies.push_detached(older_[i]);
        copies.push_detached(tail_);
        older_.reserve(from + copies.older_.size());
        older_.erase(older_.begin() + static_cast<std::ptrdiff_t>(from), older_.end());
        for (Slice& slice : copies.older_) older_.push_back(std::move(slice));
        if (older_.capacity() > 2 * older_.size() + 16) older_.shrink_to_fit();
        tail_ = std::move(copies.tail_);
        detached_ = older_.size();
    }

    void clear() { *this = SendQueue(); }

private:
    static constexpr std::size_t private_chunk_size = 16 * 1024;

    void push(const Slice& slice) {
        if (tail_.end == slice.begin && tail_.chunk == slice.chunk) {
            tail_.end = slice.end;
            return;
        }
        if (tail_.size() != 0) older_.push_back(std::move(tail_));
        tail_ = slice;
    }

    // Only a private chunk of this queue is not pooled and has free space. It is filled before another one begins, so
    // that a queue holds little more memory than bytes.
    void push_detached(const Slice& slice) {
        if (!slice.chunk->pooled()) return push(slice);
        std::string_view bytes = slice.view();
        if (tail_.chunk && !tail_.chunk->pooled() && tail_.end == tail_.chunk->size()) {
            const std::size_t fits = (std::min)(tail_.chunk->available(), bytes.size());
            if (fits != 0) push_copy(tail_.chunk, bytes.substr(0, fits));
            bytes.remove_prefix(fits);
        }
        if (bytes.empty()) return;
        const std::size_t capacity = bytes.size() > private_chunk_size ? bytes.size() : private_chunk_size;
        push_copy(ChunkRef(Chunk::make(capacity, false)), bytes);
    }
    void push_copy(ChunkRef chunk, std::string_view bytes) {
        const std::size_t begin = chunk->size();
        std::memcpy(chunk->end(), bytes.data(), bytes.size());
        chunk->advance(bytes.size());
        push({std::move(chunk), begin, begin + bytes.size()});
    }

    // An empty queue also frees the capacity that a long backlog needed.
    void erase_sent() {
        if (front_ == older_.size()) {
            older_.clear();
            if (older_.capacity() > 16) older_.shrink_to_fit();
            front_ = detached_ = 0;
        } else if (front_ >= 64 && front_ * 2 >= older_.size()) {
            older_.erase(older_.begin(), older_.begin() + static_cast<std::ptrdiff_t>(front_));
            detached_ = detached_ > front_ ? detached_ - front_ : 0;
            front_ = 0;
        }
    }

    Slice tail_;  // the newest slice, which may grow
    std::size_t size_ = 0;
    std::vector<Slice> older_;  // the slices before tail_: [0, front_) are sent, [front_, detached_) are detached
    std::size_t front_ = 0;
    std::size_t detached_ = 0;
};

// g++ for Windows does not align the stack to 32 bytes (GCC bug 54412), so that code with AVX2 crashes there.
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(_WIN32) || defined(__clang__))

// Checks 32 bytes at a time with three table look-ups (Keiser and Lemire, "Validating UTF-8 In Less Than One
// Instruction Per Byte", 2021). `p` is the beginning of a character, and the three bytes before it are valid text.
// Returns the beginning of a character near the end or near the first error: all text before it is valid. Gain: text
// that is not ASCII is checked 20 times as fast.
__attribute__((target("avx2"))) inline const unsigned char* skip_utf8_avx2(const unsigned char* p,
                                                                           const unsigned char* end) {
    typedef unsigned char Block __attribute__((vector_size(32)));
    typedef char SignedBlock __attribute__((vector_size(32)));
    // One bit for each error that a pair of bytes can have. The pair is invalid if all three tables agree on a bit.
    constexpr unsigned char too_short = 1, too_long = 2, overlong_3 = 4, too_large = 8, surrogate = 16, overlong_2 = 32,
                            too_large_1000 = 64, overlong_4 = 64, two_continuations = 128;
    constexpr unsigned char any = too_short | too_long | two_continuations;
    constexpr unsigned char large = any | too_large | too_large_1000;
    constexpr unsigned char continuation = too_long | overlong_2 | two_continuations;
    // clang-format off
    constexpr unsigned char first_high[16] = {
        too_long, too_long, too_long, too_long, too_long, too_long, too_long, too_long,
        two_continuations, two_continuations, two_continuations, two_continuations, too_short | overlong_2, too_short,
        too_short | overlong_3 | surrogate, too_short | too_large | too_large_1000 | overlong_4};
    constexpr unsigned char first_low[16] = {
        any | overlong_3 | overlong_2 | overlong_4, any | overlong_2, any, any, any | too_large, large, large, large,
        large, large, large, large, large, large | surrogate, large, large};
    constexpr unsigned char second_high[16] = {
        too_short, too_short, too_short, too_short, too_short, too_short, too_short, too_short,
        continuation | overlong_3 | too_large_1000 | overlong_4, continuation | overlong_3 | too_large,
        continuation | surrogate | too_large, continuation | surrogate | too_large,
        too_short, too_short, too_short, too_short};
    // clang-format on
    SignedBlock tables[3];
    const unsigned char* sources[3] = {first_high, first_low, second_high};
    for (int i = 0; i < 3; ++i) {
        std::memcpy(&tables[i], sources[i], 16);
        std::memcpy(reinterpret_cast<char*>(&tables[i]) + 16, sources[i], 16);
    }
    for (; end - p >= 32; p += 32) {
        Block current, previous[3];
        std::memcpy(&current, p, 32);
        for (int i = 0; i < 3; ++i) std::memcpy(&previous[i], p - 1 - i, 32);
        const Block pairs = reinterpret_cast<Block>(
            __builtin_ia32_pshufb256(tables[0], reinterpret_cast<SignedBlock>(previous[0] >> 4)) &
            __builtin_ia32_pshufb256(tables[1], reinterpret_cast<SignedBlock>(previous[0] & 15)) &
            __builtin_ia32_pshufb256(tables[2], reinterpret_cast<SignedBlock>(current >> 4)));
        // Only the third byte of three, and the third and fourth of four, are continuations after a continuation.
        const Block inner = reinterpret_cast<Block>((previous[1] >= 0xE0) | (previous[2] >= 0xF0)) & 0x80;
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
// __builtin_cpu_supports() needs a symbol of the compiler's runtime library, which some toolchains do not link.
inline bool has_avx2() {
    static const bool supported = [] {
        struct Registers {
            std::uint32_t a, b, c, d;
        };
        const auto cpuid = [](std::uint32_t leaf) {
            Registers r{};
            __asm__("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
            return r;
        };
        constexpr std::uint32_t osxsave_and_avx = 3u << 27, avx2 = 1u << 5, saves_registers = 6;
        if (cpuid(0).a < 7 || (cpuid(1).c & osxsave_and_avx) != osxsave_and_avx) return false;
        std::uint32_t low = 0, high = 0;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return (low & saves_registers) == saves_registers && (cpuid(7).b & avx2) != 0;
    }();
    return supported;
}

#else

inline const unsigned char* skip_utf8_avx2(const unsigned char* p, const unsigned char*) { return p; }
constexpr bool has_avx2() { return false; }

#endif

// Validates UTF-8 (RFC 3629) in pieces. feed() returns false at the first byte that makes the text invalid.
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
            if (*p >= 0x80 && !start_character(*p)) return false;
            ++p;
        }
    }
    // Whether the text may end here: false in the middle of a character.
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
    // RFC 3629 4. The range of the second byte excludes overlong forms, surrogates and code points above U+10FFFF.
    bool start_character(unsigned char c) {
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

WSCHAT_NOINLINE inline bool valid_utf8(std::string_view text) {
    detail::Utf8Validator validator;
    return validator.feed(text.data(), text.size()) && validator.complete();
}

// Returns the longest prefix of at most max bytes that does not end in the middle of a character. `text` is valid
// UTF-8.
inline std::string_view truncate_utf8(std::string_view text, std::size_t max) {
    if (text.size() <= max) return text;
    while (max != 0 && (static_cast<unsigned char>(text[max]) & 0xC0) == 0x80) --max;
    return text.substr(0, max);
}

namespace detail {

inline void sha1_block(std::uint32_t (&state)[5], const unsigned char* p) {
    const auto rotate = [](std::uint32_t x, int n) { return (x << n) | (x >> (32 - n)); };
    std::uint32_t w[80];
    for (std::size_t k = 0; k < 16; ++k, p += 4)
        w[k] = std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | p[3];
    for (std::size_t k = 16; k < 80; ++k) w[k] = rotate(w[k - 3] ^ w[k - 8] ^ w[k - 14] ^ w[k - 16], 1);
    std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
    const auto step = [&](std::uint32_t f) {
        const std::uint32_t next = rotate(a, 5) + f + e;
        e = d;
        d = c;
        c = rotate(b, 30);
        b = a;
        a = next;
    };
    std::size_t i = 0;
    for (; i < 20; ++i) step((d ^ (b & (c ^ d))) + 0x5A827999 + w[i]);
    for (; i < 40; ++i) step((b ^ c ^ d) + 0x6ED9EBA1 + w[i]);
    for (; i < 60; ++i) step(((b & c) | (d & (b | c))) + 0x8F1BBCDC + w[i]);
    for (; i < 80; ++i) step((b ^ c ^ d) + 0xCA62C1D6 + w[i]);
    const std::uint32_t sum[5] = {a, b, c, d, e};
    for (std::size_t k = 0; k < 5; ++k) state[k] += sum[k];
}

}  // namespace detail

// FIPS 180-4, for the opening handshake. SHA-1 gives no security today.
inline std::array<unsigned char, 20> sha1(std::string_view input) {
    std::uint32_t state[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    const auto bytes = reinterpret_cast<const unsigned char*>(input.data());
    std::size_t done = 0;
    for (; input.size() - done >= 64; done += 64) detail::sha1_block(state, bytes + done);
    unsigned char last[128] = {};
    const std::size_t left = input.size() - done;
    if (left != 0) std::memcpy(last, bytes + done, left);
    last[left] = 0x80;
    const std::size_t padded = left < 56 ? 64 : 128;
    const std::uint64_t bits = std::uint64_t{input.size()} * 8;
    for (std::size_t i = 0; i < 8; ++i) last[padded - 1 - i] = static_cast<unsigned char>(bits >> (8 * i));
    for (std::size_t i = 0; i < padded; i += 64) detail::sha1_block(state, last + i);

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

// Bytes that nobody can predict, for keys and tokens: from the system's generator. Throws an Error if it fails.
inline std::string random_bytes(std::size_t size) {
    std::string bytes(size, '\0');
#if defined(__linux__)
    for (std::size_t done = 0; done < size;) {
        const auto n = ::getrandom(&bytes[done], size - done, 0);
        if (n > 0) done += static_cast<std::size_t>(n);
        else if (errno != EINTR) throw Error("random_bytes: getrandom() failed");
    }
#else
    std::random_device device;
    for (char& c : bytes) c = static_cast<char>(device());
#endif
    return bytes;
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
    // A pointer is neither text nor a truth value.
    template <class T, std::enable_if_t<!std::is_same_v<std::remove_cv_t<T>, char>, int> = 0>
    Json(T*) = delete;

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

// ---- text ----------------------------------------------------------------------------------------------------------

namespace text {

// All functions of this namespace know ASCII only and do not depend on the locale.
constexpr char to_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }
constexpr bool is_alphanumeric(char c) { return is_digit(c) || (to_lower(c) >= 'a' && to_lower(c) <= 'z'); }

WSCHAT_NOINLINE inline std::string to_lower(std::string_view s) {
    std::string result(s);
    for (char& c : result) c = to_lower(c);
    return result;
}
WSCHAT_NOINLINE inline bool equals_ignore_case(std::string_view a, std::string_view b) {
    return a.size() == b.size() &&
           std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) { return to_lower(x) == to_lower(y); });
}
inline bool starts_with(std::string_view s, std::string_view prefix) { return s.substr(0, prefix.size()) == prefix; }

// Removes the optional whitespace of RFC 9110 5.6.3: spaces and tabs.
WSCHAT_NOINLINE inline std::string_view trim(std::string_view s) {
    while (!s.empty() && (s.front() == ' ' || s.front() == '\t')) s.remove_prefix(1);
    while (!s.empty() && (s.back() == ' ' || s.back() == '\t')) s.remove_suffix(1);
    return s;
}
// RFC 9110 5.6.2.
constexpr bool is_token_char(char c) {
    // A bit for each character from 0x20 to 0x5F and from 0x60 to 0x9F.
    constexpr std::uint64_t first = 0xC7FF'FFFE'03FF'6CFA, second = 0x0000'0000'57FF'FFFF;
    const unsigned index = static_cast<unsigned char>(c) - 0x20u;
    return index < 128 && ((index < 64 ? first >> index : second >> (index - 64)) & 1) != 0;
}
// The standard algorithms are unrolled for each predicate, which takes long to compile.
template <class Predicate>
bool all_of(std::string_view s, Predicate predicate) {
    for (const char c : s)
        if (!predicate(c)) return false;
    return true;
}
inline bool is_token(std::string_view s) { return !s.empty() && all_of(s, is_token_char); }

inline std::string concat(std::initializer_list<std::string_view> parts) {
    std::size_t size = 0;
    for (const std::string_view part : parts) size += part.size();
    std::string whole;
    whole.reserve(size);
    for (const std::string_view part : parts) whole += part;
    return whole;
}

template <class List>
bool contains(const List& list, std::string_view name) {
    for (const auto& element : list)
        if (element == name) return true;
    return false;
}

// Removes the text up to the first separator, and the separator, from s. Returns the text without the separator.
WSCHAT_NOINLINE inline std::string_view consume_until(std::string_view& s, char separator) {
    const std::size_t at = s.find(separator);
    const std::string_view part = s.substr(0, at);
    s.remove_prefix(at == std::string_view::npos ? s.size() : at + 1);
    return part;
}

// Returns nothing if s has a character that is not a digit, is empty, or is a number above max.
inline std::optional<std::uint64_t> parse_unsigned(std::string_view s, std::uint64_t max) {
    if (s.empty() || s.size() > 20) return std::nullopt;
    std::uint64_t value = 0;
    for (const char c : s) {
        if (!is_digit(c)) return std::nullopt;
        const auto next = static_cast<std::uint64_t>(c - '0');
        if (next > max || value > (max - next) / 10) return std::nullopt;
        value = value * 10 + next;
    }
    return value;
}

// Returns -1 if c is not a hexadecimal digit.
inline int hex_value(char c) {
    if (is_digit(c)) return c - '0';
    return to_lower(c) >= 'a' && to_lower(c) <= 'f' ? to_lower(c) - 'a' + 10 : -1;
}

// RFC 3986 2.1. Returns nothing if an escape is malformed. `plus`: '+' is a space, as in a query.
inline std::optional<std::string> percent_decode(std::string_view s, bool plus = false) {
    std::string result;
    result.reserve(s.size());
    for (std::size_t i = 0; i < s.size(); ++i) {
        if (s[i] != '%') {
            result += plus && s[i] == '+' ? ' ' : s[i];
            continue;
        }
        if (s.size() - i < 3 || hex_value(s[i + 1]) < 0 || hex_value(s[i + 2]) < 0) return std::nullopt;
        result += static_cast<char>(hex_value(s[i + 1]) * 16 + hex_value(s[i + 2]));
        i += 2;
    }
    return result;
}

}  // namespace text

// Makes text from a peer safe for a log line and a terminal: control characters, quotes, backslashes and non-ASCII
// bytes become \xNN, and "..." replaces what follows the first max bytes.
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

// Formats an entry as one escaped line without a line end: `error exception in="on_message" what="..."`.
WSCHAT_COLD inline std::string to_string(const LogEntry& entry) {
    std::string line(to_string(entry.level));
    (line += ' ') += entry.event;
    for (const auto& [name, value] : entry.fields) {
        ((line += ' ') += name) += "=\"";
        (line += escape_for_log(value)) += '"';
    }
    return line;
}

// The wall clock: Unix time in milliseconds.
inline std::int64_t unix_ms() {
    using namespace std::chrono;
    return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

// The time as in RFC 3339, in UTC: "2026-11-29T08:49:37.123Z".
WSCHAT_COLD inline std::string utc_time(std::chrono::system_clock::time_point time = std::chrono::system_clock::now()) {
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count();
    const auto seconds = static_cast<std::time_t>(ms / 1000);
    std::tm utc{};
#if defined(_WIN32)
    ::gmtime_s(&utc, &seconds);
#else
    ::gmtime_r(&seconds, &utc);
#endif
    char text[64];
    const std::size_t size = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    std::snprintf(text + size, sizeof text - size, ".%03dZ", static_cast<int>(ms % 1000));
    return text;
}

// Formats an entry as one line of JSON: {"time":"...","level":"error","event":"exception","in":"on_message"}. Text that
// is not UTF-8 is escaped.
WSCHAT_COLD inline std::string to_json(const LogEntry& entry) {
    std::string line = "{\"time\":" + Json(utc_time()).dump();
    ((line += ",\"level\":\"") += to_string(entry.level)) += "\",\"event\":";
    line += Json(std::string(entry.event)).dump();
    for (const auto& [name, value] : entry.fields) {
        ((line += ',') += Json(std::string(name)).dump()) += ':';
        line += Json(valid_utf8(value) ? value : escape_for_log(value)).dump();
    }
    return line += '}';
}

WSCHAT_COLD inline std::string to_json(const AccessEntry& entry) {
    const auto quoted = [](std::string_view value) {
        return Json(valid_utf8(value) ? std::string(value) : escape_for_log(value)).dump();
    };
    const double ms = std::chrono::duration<double, std::milli>(entry.duration).count();
    char numbers[96];
    std::snprintf(numbers, sizeof numbers, ",\"status\":%d,\"size\":%llu,\"ms\":%.3f}", entry.status,
                  static_cast<unsigned long long>(entry.size), ms);
    return text::concat({"{\"time\":", quoted(utc_time()),
                         ",\"event\":\"access\",\"peer\":", quoted(entry.remote_address),
                         ",\"method\":", quoted(entry.method), ",\"path\":", quoted(entry.path), numbers});
}

// Log functions for Server::on_log(): they write all entries but those of LogLevel::debug to standard error, with the
// time. The first writes lines for people, the second a JSON object per line, for collectors.
WSCHAT_COLD inline void log_to_stderr(const LogEntry& entry) {
    if (entry.level != LogLevel::debug) std::fprintf(stderr, "%s %s\n", utc_time().c_str(), to_string(entry).c_str());
}
WSCHAT_COLD inline void log_json_to_stderr(const LogEntry& entry) {
    if (entry.level != LogLevel::debug) std::fprintf(stderr, "%s\n", to_json(entry).c_str());
}
// The same for Server::on_access(): `2026-11-29T08:49:37.123Z 203.0.113.7 "GET /chat" 101 0 0.213ms`, or "-" in place
// of a malformed request.
WSCHAT_COLD inline void access_to_stderr(const AccessEntry& entry) {
    const double ms = std::chrono::duration<double, std::milli>(entry.duration).count();
    const std::string line = entry.method.empty() ? std::string("-") : text::concat({entry.method, " ", entry.path});
    std::fprintf(stderr, "%s %.*s \"%s\" %d %llu %.3fms\n", utc_time().c_str(),
                 static_cast<int>(entry.remote_address.size()), entry.remote_address.data(), line.c_str(), entry.status,
                 static_cast<unsigned long long>(entry.size), ms);
}
WSCHAT_COLD inline void access_json_to_stderr(const AccessEntry& entry) {
    std::fprintf(stderr, "%s\n", to_json(entry).c_str());
}

// ---- rates ---------------------------------------------------------------------------------------------------------

// A limit: `per_second` tokens on average and `burst` tokens at once.
struct Rate {
    double per_second = 0;  // 0: no limit
    double burst = 0;
};

// Stores only the time at which the bucket is full again: 8 bytes, because each connection has a bucket.
class TokenBucket {
public:
    // Returns false and takes none if the bucket holds fewer tokens. To take more than `burst`, it must be full.
    WSCHAT_NOINLINE bool take(double tokens, const Rate& rate, Time now) {
        if (rate.per_second <= 0) return true;
        if (available_at((std::min)(tokens, rate.burst), rate) > now) return false;
        charge(tokens, rate, now);
        return true;
    }
    // Takes tokens also if the bucket does not hold them; then it owes them. The rate must not be 0.
    void charge(double tokens, const Rate& rate, Time now) {
        full_at_ = saturating_add((std::max)(full_at_, now), time_for(tokens, rate));
    }
    // When the bucket holds this number of tokens again. The rate must not be 0.
    Time available_at(double tokens, const Rate& rate) const {
        return saturating_add(full_at_, -time_for(rate.burst - tokens, rate));
    }
    bool full(Time now) const { return full_at_ <= now; }

private:
    // Rounds down. The product is exact, so that the quotient does not depend on the precision of the processor (x87).
    static Duration time_for(double tokens, const Rate& rate) {
        constexpr double ticks_per_second = static_cast<double>(Duration::period::den) / Duration::period::num;
        constexpr double max_ticks = 1e9 * ticks_per_second;
        const double ticks = (std::min)(max_ticks, tokens * ticks_per_second / rate.per_second);
        return Duration(static_cast<Duration::rep>((std::max)(-max_ticks, ticks)));
    }

    Time full_at_{};
};

// ---- maps ----------------------------------------------------------------------------------------------------------

// A big-endian key that fits the small-string buffer: keys have the order of their numbers.
WSCHAT_NOINLINE inline std::string big_endian_key(std::uint64_t number) {
    std::string name(8, '\0');
    for (std::size_t i = 8; i-- > 0; number >>= 8) name[i] = static_cast<char>(number & 0xFF);
    return name;
}

namespace detail {

// Owns a value of any type. A std::unique_ptr with a deleter takes much longer to compile.
class ErasedPtr {
public:
    ErasedPtr(void* value, void (*destroy)(void*)) : value_(value), destroy_(destroy) {}
    ErasedPtr(ErasedPtr&& other) noexcept : value_(std::exchange(other.value_, nullptr)), destroy_(other.destroy_) {}
    ErasedPtr& operator=(ErasedPtr&& other) noexcept {
        std::swap(value_, other.value_);
        std::swap(destroy_, other.destroy_);
        return *this;
    }
    ~ErasedPtr() {
        if (value_ != nullptr) destroy_(value_);
    }
    void* get() const { return value_; }

private:
    void* value_;
    void (*destroy_)(void*);
};

template <class Value, class... Arguments>
ErasedPtr make_erased(Arguments&&... arguments) {
    return ErasedPtr(new Value{std::forward<Arguments>(arguments)...},
                     [](void* value) { delete static_cast<Value*>(value); });
}

}  // namespace detail

namespace detail {

// The map of StringMap for values of any type. It is compiled once, because one std::map for each value type would be
// the largest part of the compile time.
class ErasedMap {
public:
    using Tree = std::map<std::string, ErasedPtr, std::less<>>;

    const Tree& tree() const { return tree_; }

    // Returns null if the map has no such name.
    WSCHAT_NOINLINE void* find(std::string_view name) const {
        const auto found = tree_.find(name);
        return found == tree_.end() ? nullptr : found->second.get();
    }
    // Adds the value unless the map has the name. Returns the value of that name.
    WSCHAT_NOINLINE void* add(std::string_view name, ErasedPtr value) {
        return tree_.emplace(name, std::move(value)).first->second.get();
    }
    WSCHAT_NOINLINE void rename(std::string_view name, std::string_view new_name) {
        const auto old = tree_.find(name);
        if (old == tree_.end() || find(new_name) != nullptr) return;
        tree_.emplace(new_name, ErasedPtr(nullptr, nullptr)).first->second = std::move(old->second);
        tree_.erase(old);
    }
    WSCHAT_NOINLINE bool erase(std::string_view name) {
        const auto found = tree_.find(name);
        if (found == tree_.end()) return false;
        tree_.erase(found);
        return true;
    }
    WSCHAT_NOINLINE Tree::const_iterator erase(Tree::const_iterator at) { return tree_.erase(at); }
    WSCHAT_NOINLINE void clear() { tree_.clear(); }

private:
    Tree tree_;
};

}  // namespace detail

// An ordered map from string to Value.
template <class Value>
class StringMap {
public:
    struct Entry {
        const std::string& name;
        Value& value;
    };
    struct Iterator : detail::ErasedMap::Tree::const_iterator {
        Entry operator*() const { return {(*this)->first, *static_cast<Value*>((*this)->second.get())}; }
    };

    Value& front() const { return (*begin()).value; }
    Iterator begin() const { return {map_.tree().begin()}; }
    Iterator end() const { return {map_.tree().end()}; }
    std::size_t size() const { return map_.tree().size(); }
    bool empty() const { return map_.tree().empty(); }

    // Returns null if the map has no such name.
    Value* find(std::string_view name) const { return static_cast<Value*>(map_.find(name)); }
    // Makes the value from the arguments if the map has no such name.
    template <class... Arguments>
    Value& find_or_emplace(std::string_view name, Arguments&&... arguments) {
        if (Value* found = find(name)) return *found;
        return *static_cast<Value*>(map_.add(name, detail::make_erased<Value>(std::forward<Arguments>(arguments)...)));
    }
    // Uses size() as the key: the map has the order of the calls. Not for maps that erase.
    template <class... Arguments>
    Value& append(Arguments&&... arguments) {
        return find_or_emplace(big_endian_key(size()), std::forward<Arguments>(arguments)...);
    }
    // Does nothing if the map has the name. Does not own the value.
    void insert_reference(std::string_view name, Value& value) {
        map_.add(name, detail::ErasedPtr(&value, [](void*) {}));
    }
    // Does nothing if the map has no such name, or has the new name.
    void rename(std::string_view name, std::string_view new_name) { map_.rename(name, new_name); }
    // Returns false if the map has no such name.
    bool erase(std::string_view name) { return map_.erase(name); }
    void clear() { map_.clear(); }
    template <class Predicate>
    void erase_if(Predicate&& predicate) {
        for (auto at = map_.tree().begin(); at != map_.tree().end();)
            at = predicate(*static_cast<Value*>(at->second.get())) ? map_.erase(at) : ++at;
    }

private:
    detail::ErasedMap map_;
};

namespace detail {

// Refers to a callable, which must outlive it. A function with this parameter is compiled once for all callables.
template <class... Arguments>
class FunctionRef {
public:
    template <class Function, class = std::enable_if_t<!std::is_same_v<std::decay_t<Function>, FunctionRef>>>
    FunctionRef(Function&& function)
        : function_(&function), call_([](void* target, Arguments... arguments) {
              (*static_cast<std::remove_reference_t<Function>*>(target))(arguments...);
          }) {}
    void operator()(Arguments... arguments) const { call_(function_, arguments...); }

private:
    void* function_;
    void (*call_)(void* target, Arguments... arguments);
};

// Runs the call and passes what it throws to report(what). Returns false if it threw.
WSCHAT_NOINLINE inline bool run_guarded(FunctionRef<> call, FunctionRef<const char*> report) {
    try {
        call();
        return true;
    } catch (const std::exception& error) {
        report(error.what());
    } catch (...) {
        report("not a std::exception");
    }
    return false;
}

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 4: Frames
//
// RFC 6455 5: frame headers are parsed and encoded, payloads are masked in place. Knows of messages only the order of
// their fragments, and nothing of closing.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

// Our end of a connection: a server receives masked frames and sends unmasked ones, a client the reverse.
enum class Role : std::uint8_t { server, client };

// Code and reason of the Close frame that fails a connection.
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

// Masks complete blocks of 64 bytes and returns the number of masked bytes. Sets in `bits` all bits of the masked
// bytes. Gain: masking is 3 to 7 times as fast from 4 KiB on.
__attribute__((target("avx2"))) inline std::size_t mask_blocks_avx2(char* data, std::size_t size, std::uint64_t word,
                                                                    std::uint64_t& bits) {
    typedef std::uint64_t Block __attribute__((vector_size(32)));
    const Block key = {word, word, word, word};
    Block all = {bits, 0, 0, 0}, low, high;
    std::size_t done = 0;
    for (; size - done >= 64; done += 64) {
        std::memcpy(&low, data + done, 32);
        std::memcpy(&high, data + done + 32, 32);
        all |= (low ^= key) | (high ^= key);
        std::memcpy(data + done, &low, 32);
        std::memcpy(data + done + 32, &high, 32);
    }
    bits = all[0] | all[1] | all[2] | all[3];
    return done;
}

#else

inline std::size_t mask_blocks_avx2(char*, std::size_t, std::uint64_t, std::uint64_t&) { return 0; }

#endif

// RFC 6455 5.3: masks or unmasks in place. `offset`: the position of `data` in its payload. Returns whether all bytes
// are ASCII afterwards, which saves a second pass for the UTF-8 check.
inline bool apply_mask(char* data, std::size_t size, const MaskKey& mask, std::size_t offset = 0) {
    MaskKey key = mask;
    if (offset % 4 != 0)
        for (std::size_t i = 0; i < 4; ++i) key[i] = mask[(offset + i) % 4];
    std::uint32_t half;
    std::memcpy(&half, key.data(), 4);
    const std::uint64_t word = half * std::uint64_t{0x0000000100000001};
    std::uint64_t bits = 0;
    std::size_t i = size >= 64 && has_avx2() ? mask_blocks_avx2(data, size, word, bits) : 0;
    for (std::uint64_t next; size - i >= 8; i += 8) {
        std::memcpy(&next, data + i, 8);
        bits |= next ^= word;
        std::memcpy(data + i, &next, 8);
    }
    for (; i < size; ++i) {
        const auto byte = static_cast<unsigned char>(static_cast<unsigned char>(data[i]) ^ key[i % 4]);
        bits |= byte;
        data[i] = static_cast<char>(byte);
    }
    return (bits & 0x8080808080808080u) == 0;
}

constexpr std::size_t encoded_size(const FrameHeader& header) {
    return 2u + (header.length < 126 ? 0u : header.length < 65536 ? 2u : 8u) + (header.masked ? 4u : 0u);
}

// Writes encoded_size(header) bytes, with the length in its shortest form. Returns the end of the header.
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

struct ParsedFrame {
    enum class Outcome : std::uint8_t { need_more, header, failure };

    Outcome outcome = Outcome::need_more;
    std::size_t size = 0;  // of the header
    FrameHeader header{};
    Failure failure{};
};

// Parses the frame headers of one direction of a connection. Its only state is whether a fragmented message is open.
class FrameParser {
public:
    // `role`: our end. `compression`: allows RSV1 in the first frame of a message (RFC 7692 6).
    explicit FrameParser(Role role = Role::server, bool compression = false) : role_(role), compression_(compression) {}

    // Parses the header at the front of `bytes`, not the payload. Fails as soon as a byte breaks a rule, even if the
    // header is incomplete.
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

        // 2. The second byte: MASK, and the length or the form of the length.
        header.masked = (byte(1) & 0x80) != 0;
        const unsigned short_length = byte(1) & 0x7F;
        if (header.masked != (role_ == Role::server))
            return failed(role_ == Role::server ? "frame from a client is not masked"
                                                : "frame from a server is masked");
        if (is_control(header.opcode) && short_length > 125) return failed("control frame is longer than 125 bytes");

        // 3. The length.
        const std::size_t length_bytes = short_length < 126 ? 0 : short_length == 126 ? 2 : 8;
        const std::size_t size = 2 + length_bytes + (header.masked ? 4 : 0);
        if (length_bytes == 8)
            if (const char* reason = long_length_error(bytes.substr(2))) return failed(reason);
        if (bytes.size() < 2 + length_bytes) return parsed;
        header.length = length_bytes == 0 ? short_length : 0;
        for (std::size_t i = 0; i < length_bytes; ++i) header.length = header.length << 8 | byte(2 + i);
        if (length_bytes == 2 && header.length < 126) return failed(not_shortest);

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
        if (header.opcode == Opcode::continuation) return message_open_ ? nullptr : "continuation without a message";
        return message_open_ ? "new message before the end of a fragmented message" : nullptr;
    }
    // RFC 6455 5.2: "the most significant bit MUST be 0", "the minimal number of bytes MUST be used to encode the
    // length". `bytes` is incomplete or longer than the length. Two bytes are enough if the first six are zero.
    static const char* long_length_error(std::string_view bytes) {
        if (!bytes.empty() && (static_cast<unsigned char>(bytes[0]) & 0x80) != 0)
            return "most significant bit of a 64-bit length is set";
        const std::string_view high_bytes = bytes.substr(0, 6);
        return high_bytes.size() == 6 && high_bytes.find_first_not_of('\0') == std::string_view::npos ? not_shortest
                                                                                                      : nullptr;
    }
    static ParsedFrame failed(const char* reason) {
        ParsedFrame parsed;
        parsed.outcome = ParsedFrame::Outcome::failure;
        parsed.failure = {CloseCode::protocol_error, reason};
        return parsed;
    }

    static constexpr const char* not_shortest = "length is not in its shortest form";

    Role role_;
    bool compression_;
    bool message_open_ = false;
};

// Encodes the payload with the header, whose length is set from the payload.
inline Slice encode_frame(SendArena& arena, FrameHeader header, std::string_view payload) {
    header.length = payload.size();
    Slice slice = arena.allocate(encoded_size(header) + payload.size());
    char* out = encode(header, SendArena::writable(slice));
    if (!payload.empty()) std::memcpy(out, payload.data(), payload.size());
    if (header.masked) apply_mask(out, payload.size(), header.mask);
    return slice;
}

// Encodes a frame as a client sends it. Queues cannot share it, because each frame needs a new mask.
inline Slice encode_masked(SendArena& arena, Opcode opcode, std::string_view payload, const MaskKey& mask) {
    FrameHeader header;
    header.opcode = opcode;
    header.masked = true;
    header.mask = mask;
    return encode_frame(arena, header, payload);
}

}  // namespace detail

// A message encoded as a server sends it: once for all queues. The compressed variants are encoded at their first use.
// Belongs to the loop's thread.
class EncodedFrame {
public:
    EncodedFrame(detail::SendArena& arena, Opcode opcode, std::string_view payload)
        : EncodedFrame(&arena, opcode, payload) {
        payload_ = slice().view().substr(size() - payload.size());
    }
    // Does not copy the payload, which must outlive the frame. The plain frame too is encoded at its first use.
    static EncodedFrame borrowed(detail::SendArena& arena, Opcode opcode, std::string_view payload) {
        return EncodedFrame(&arena, opcode, payload);
    }
    template <class T, std::enable_if_t<std::is_same_v<T, std::string>, int> = 0>
    static EncodedFrame borrowed(detail::SendArena&, Opcode, T&&) = delete;

    const detail::Slice& slice() const {
        if (!plain_.chunk) plain_ = detail::encode_frame(*arena_, header(), payload_);
        return plain_;
    }
    // Of the plain frame, header included.
    std::size_t size() const { return size_; }
    Opcode opcode() const { return opcode_; }
    std::string_view payload() const { return payload_; }

    // Returns the variant of that key, which is not null. Calls encode() at the first use of the key.
    template <class Encode>
    const detail::Slice& variant(const void* key, Encode&& encode) const {
        if (variant_.key == nullptr) variant_ = {key, encode()};
        if (variant_.key == key) return variant_.slice;
        for (const Variant& other : other_variants_)
            if (other.key == key) return other.slice;
        other_variants_.push_back({key, encode()});
        return other_variants_.back().slice;
    }

private:
    struct Variant {
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
    mutable Variant variant_;  // usually the only one: it needs no allocation
    mutable std::vector<Variant> other_variants_;
};

WSCHAT_END

// ====================================================================================================================
// section 5: HTTP
//
// The parts of RFC 9112 that pages and upgrades need, and the opening handshake of RFC 6455 4. The parser is strict.
// Knows nothing of sockets, files or routes.
// ====================================================================================================================

WSCHAT_BEGIN

namespace detail {

// RFC 9110 5.6.7: "Sun, 06 Nov 1994 08:49:37 GMT". Not with strftime(), whose names depend on the locale.
// The calendar arithmetic is civil_from_days() by Howard Hinnant.
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

// A view of the header fields of a message, after field_line_error() has accepted each line. Names are compared without
// case. Each look-up reads all lines.
class Fields {
public:
    Fields() = default;
    explicit Fields(std::string_view lines) : lines_(lines) {}
    // The lines must outlive the view, which a temporary string does not.
    template <class T, std::enable_if_t<std::is_same_v<T, std::string>, int> = 0>
    explicit Fields(T&&) = delete;

    // Calls visit(name, value) for each field line until visit() returns false. Skips lines without a colon.
    template <class Visit>
    void each(Visit&& visit) const {
        for (std::string_view rest = lines_; !rest.empty();) {
            std::string_view line = text::consume_until(rest, '\n');
            if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
            if (line.empty()) return;
            if (line.find(':') == std::string_view::npos) continue;
            const std::string_view name = text::consume_until(line, ':');
            if (!visit(name, text::trim(line))) return;
        }
    }
    // Returns the first field of that name.
    std::optional<std::string_view> find(std::string_view name) const {
        std::string_view rest = lines_;
        return next(rest, name);
    }
    std::size_t count(std::string_view name) const {
        std::size_t n = 0;
        for (std::string_view rest = lines_; next(rest, name);) ++n;
        return n;
    }
    // Returns the field of that name if there is exactly one.
    std::optional<std::string_view> only(std::string_view name) const {
        std::string_view rest = lines_;
        const auto found = next(rest, name);
        return next(rest, name) ? std::nullopt : found;
    }
    // Calls visit(element) for each element of the comma-separated lists in all fields of that name (RFC 9110 5.6.1).
    template <class Visit>
    void each_element(std::string_view name, Visit&& visit) const {
        std::string_view rest = lines_;
        while (auto value = next(rest, name))
            while (!value->empty()) {
                const std::string_view element = text::trim(text::consume_until(*value, ','));
                if (!element.empty()) visit(element);
            }
    }
    bool has_element(std::string_view name, std::string_view element) const {
        bool found = false;
        each_element(name, [&](std::string_view e) { found = found || text::equals_ignore_case(e, element); });
        return found;
    }

private:
    // Removes the lines up to the next field of that name, and returns its value. A request is searched for some twenty
    // names, so other lines cost a look at one byte.
    WSCHAT_NOINLINE static std::optional<std::string_view> next(std::string_view& rest, std::string_view name) {
        while (!rest.empty()) {
            const std::size_t end = (std::min)(rest.find('\n'), rest.size() - 1);
            std::string_view line = rest.substr(0, end + 1);
            if (line == "\n" || line == "\r\n") return std::nullopt;
            rest.remove_prefix(line.size());
            if (line.size() <= name.size() || line[name.size()] != ':') continue;
            if (!text::equals_ignore_case(line.substr(0, name.size()), name)) continue;
            line.remove_prefix(name.size() + 1);
            if (!line.empty() && line.back() == '\n') line.remove_suffix(1);
            if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
            return text::trim(line);
        }
        return std::nullopt;
    }

    std::string_view lines_;
};

namespace detail {

inline bool has_control_character(std::string_view value) {
    return !text::all_of(value,
                         [](char c) { return (static_cast<unsigned char>(c) >= 0x20 || c == '\t') && c != 0x7F; });
}

// Returns why a line without its CR LF is not a header field (RFC 9112 5), or null if it is one.
inline const char* field_line_error(std::string_view line) {
    if (line.front() == ' ' || line.front() == '\t') return "A header line is folded.";
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos) return "A header line has no colon.";
    if (colon == 0) return "A header has no name.";
    if (!text::is_token(line.substr(0, colon))) return "A header name has an illegal character.";
    return has_control_character(line.substr(colon + 1)) ? "A header value has a control character." : nullptr;
}

// A name, an IPv4 address, or an IPv6 address in brackets, with or without a port. Stricter than RFC 3986 3.2.2: no
// percent escapes, no sub-delimiters.
inline bool valid_host(std::string_view host) {
    std::string_view name = host, port;
    if (text::starts_with(host, "[")) {
        const std::size_t close = host.find(']');
        if (close == std::string_view::npos || close < 3) return false;
        name = host.substr(1, close - 1);
        for (const char c : name)
            if (text::hex_value(c) < 0 && c != ':' && c != '.') return false;
        port = host.substr(close + 1);
        if (!port.empty() && port.front() != ':') return false;
        if (!port.empty()) port.remove_prefix(1);
    } else {
        port = host;
        name = text::consume_until(port, ':');
        for (const char c : name)
            if (!text::is_alphanumeric(c) && c != '-' && c != '.' && c != '_' && c != '~') return false;
    }
    return !name.empty() && (port.empty() || text::parse_unsigned(port, 65535));
}

class RequestParser;
class RequestAccess;

// Whether percent_decode(encoded, plus) == plain, without the memory for it.
inline bool decodes_to(std::string_view encoded, std::string_view plain, bool plus = false) {
    std::size_t at = 0;
    for (const char expected : plain) {
        if (at == encoded.size()) return false;
        char c = encoded[at++];
        if (plus && c == '+') c = ' ';
        if (c == '%') {
            if (encoded.size() - at < 2 || text::hex_value(encoded[at]) < 0 || text::hex_value(encoded[at + 1]) < 0)
                return false;
            c = static_cast<char>(text::hex_value(encoded[at]) * 16 + text::hex_value(encoded[at + 1]));
            at += 2;
        }
        if (c != expected) return false;
    }
    return at == encoded.size();
}

// Calls visit(value) with the decoded value of each field of that name in "a=1&b=2" until it returns false. A value
// that is malformed is nullopt.
template <class Visit>
void each_urlencoded(std::string_view fields, std::string_view name, Visit&& visit) {
    for (std::string_view rest = fields; !rest.empty();) {
        std::string_view value = text::consume_until(rest, '&');
        if (!decodes_to(text::consume_until(value, '='), name, true)) continue;
        if (!visit(text::percent_decode(value, true))) return;
    }
}

// The value of a parameter of a header value: parameter("form-data; name=\"a\"", "name") is "a". A backslash in quotes
// stays as it is, because browsers send file names so.
inline std::string_view parameter(std::string_view value, std::string_view name) {
    text::consume_until(value, ';');
    while (!value.empty()) {
        const std::string_view key = text::trim(text::consume_until(value, '='));
        value = text::trim(value);
        std::string_view found;
        if (!value.empty() && value.front() == '"') {
            value.remove_prefix(1);
            found = text::consume_until(value, '"');
            text::consume_until(value, ';');
        } else {
            found = text::trim(text::consume_until(value, ';'));
        }
        if (text::equals_ignore_case(key, name)) return found;
    }
    return {};
}

}  // namespace detail

// A part of a form with files (multipart/form-data, RFC 7578). Views of the request's body. A peer chooses all of it:
// never use `filename` as a path.
struct FormPart {
    std::string_view name;
    std::string_view filename;      // empty if the part is not a file
    std::string_view content_type;  // empty if the part has none
    std::string_view data;
};

// A request: its head, and its body for a page. It owns its bytes: all views of it are valid as long as the request.
class Request {
public:
    std::string_view method() const { return std::string_view(bytes_).substr(0, method_size_); }
    // As received: "/chat/tea%20room?name=Anna".
    std::string_view target() const { return part(target_); }
    // Encoded: "/chat/tea%20room". path() is decoded.
    std::string_view raw_path() const { return path_.size == 0 ? "/" : part(path_); }
    std::string path() const { return text::percent_decode(raw_path()).value_or(std::string()); }
    std::string_view query_string() const { return part(query_); }
    // From the Host field or an absolute target.
    std::string_view host() const { return part(host_); }
    bool http_1_0() const { return flags_.http_1_0; }
    bool has_body() const { return flags_.has_body; }
    // The whole body, at most Limits::max_body bytes.
    std::string_view body() const { return std::string_view(bytes_).substr(bytes_.size() - body_size_); }
    // "https" if the client's connection is encrypted, otherwise "http". Server::trusted_proxies() may say so.
    std::string_view scheme() const { return flags_.https ? "https" : "http"; }
    // The client's address as text: "127.0.0.1", "::1" or "unix". Behind a trusted proxy, the address that it forwards.
    const std::string& remote_address() const { return remote_address_; }
    // The subject of the verified client certificate in the form of RFC 2253 ("CN=Anna,O=Tea"), at most 4096 bytes.
    // Empty if the client sent none.
    std::string_view client_certificate() const {
        return std::string_view(bytes_).substr(bytes_.size() - body_size_ - certificate_size_, certificate_size_);
    }

    Fields fields() const { return Fields(std::string_view(bytes_).substr(fields_begin_)); }
    // The first header of that name, compared without case. Empty if the request has none.
    std::string_view header(std::string_view name) const { return fields().find(name).value_or(std::string_view()); }

    // The first query parameter of that name, decoded: "+" is a space. Returns nothing if it is absent or malformed.
    std::optional<std::string> query(std::string_view name) const { return first_urlencoded(query_string(), name); }
    // All query parameters of that name, without malformed ones: "?tag=a&tag=b".
    std::vector<std::string> query_all(std::string_view name) const { return all_urlencoded(query_string(), name); }

    // The first field of that name in the body, if it is a form: application/x-www-form-urlencoded, or
    // multipart/form-data. Returns nothing if it is absent or malformed.
    std::optional<std::string> form(std::string_view name) const {
        if (const auto found = form_part(name)) return std::string(found->data);
        return first_urlencoded(urlencoded_body(), name);
    }
    // All fields of that name, in order.
    std::vector<std::string> form_all(std::string_view name) const {
        std::vector<std::string> all = all_urlencoded(urlencoded_body(), name);
        for (const FormPart& each : form_parts())
            if (each.name == name) all.emplace_back(each.data);
        return all;
    }
    // The parts of a multipart/form-data body: fields and files. Empty if the body has another type or is malformed.
    std::vector<FormPart> form_parts() const {
        std::vector<FormPart> parts;
        const std::string_view type = header("content-type"), boundary = detail::parameter(type, "boundary");
        // RFC 2046 5.1.1: at most 70 characters.
        if (!media_type_is("multipart/form-data") || boundary.empty() || boundary.size() > 70) return parts;
        const std::string delimiter = "\r\n--" + std::string(boundary);
        std::string_view rest = body();
        if (!text::starts_with(rest, std::string_view(delimiter).substr(2))) return {};
        for (rest.remove_prefix(delimiter.size() - 2); !text::starts_with(rest, "--");) {
            const std::size_t blank = rest.find("\r\n\r\n"), end = rest.find(delimiter, blank);
            constexpr std::size_t max_parts = 1000;
            if (!text::starts_with(rest, "\r\n") || end == std::string_view::npos || parts.size() == max_parts)
                return {};
            const Fields fields(rest.substr(2, blank));
            const std::string_view disposition = fields.find("content-disposition").value_or(std::string_view());
            parts.push_back({detail::parameter(disposition, "name"), detail::parameter(disposition, "filename"),
                             fields.find("content-type").value_or(std::string_view()),
                             end < blank + 4 ? std::string_view() : rest.substr(blank + 4, end - blank - 4)});
            rest.remove_prefix(end + delimiter.size());
        }
        return parts;
    }
    // The first part of that name.
    std::optional<FormPart> form_part(std::string_view name) const {
        for (const FormPart& each : form_parts())
            if (each.name == name) return each;
        return std::nullopt;
    }
    // RFC 6265 4.2.1. The value is not decoded; quotes around it are removed.
    std::optional<std::string_view> cookie(std::string_view name) const {
        std::optional<std::string_view> found;
        fields().each([&](std::string_view field, std::string_view value) {
            while (text::equals_ignore_case(field, "cookie") && !value.empty() && !found) {
                std::string_view pair = text::consume_until(value, ';');
                if (text::trim(text::consume_until(pair, '=')) != name) continue;
                pair = text::trim(pair);
                if (pair.size() >= 2 && pair.front() == '"' && pair.back() == '"')
                    pair = pair.substr(1, pair.size() - 2);
                found = pair;
            }
            return !found;
        });
        return found;
    }
    // The part of the path for "{name}" in the route's pattern, decoded. Empty if the pattern has no such parameter.
    std::string_view param(std::string_view name) const {
        for (const auto& [key, value] : params_)
            if (key == name) return value;
        return {};
    }

private:
    friend class detail::RequestParser;
    friend class detail::RequestAccess;

    struct Part {
        std::uint32_t begin = 0;
        std::uint32_t size = 0;
    };
    std::string_view part(Part p) const { return std::string_view(bytes_).substr(p.begin, p.size); }
    Part part_of(std::string_view view) const {
        return {static_cast<std::uint32_t>(view.data() - bytes_.data()), static_cast<std::uint32_t>(view.size())};
    }

    bool media_type_is(std::string_view type) const {
        std::string_view value = header("content-type");
        return text::equals_ignore_case(text::trim(text::consume_until(value, ';')), type);
    }
    std::string_view urlencoded_body() const {
        return media_type_is("application/x-www-form-urlencoded") ? body() : std::string_view();
    }
    static std::optional<std::string> first_urlencoded(std::string_view fields, std::string_view name) {
        std::optional<std::string> first;
        detail::each_urlencoded(fields, name, [&](std::optional<std::string> value) {
            first = std::move(value);
            return false;
        });
        return first;
    }
    static std::vector<std::string> all_urlencoded(std::string_view fields, std::string_view name) {
        std::vector<std::string> all;
        detail::each_urlencoded(fields, name, [&](std::optional<std::string> value) {
            if (value) all.push_back(std::move(*value));
            return true;
        });
        return all;
    }

    // A WebSocket keeps its request, so this is small.
    struct Flags {
        bool http_1_0 : 1, has_body : 1, body_complete : 1, https : 1;
    };

    std::string bytes_;  // the head, the subject of the client's certificate, the body
    Part target_, path_, query_, host_;
    std::uint32_t method_size_ = 0;
    std::uint32_t fields_begin_ = 0;
    std::uint32_t body_size_ = 0;
    std::uint16_t certificate_size_ = 0;
    Flags flags_{};
    std::string remote_address_;
    std::vector<std::pair<std::string, std::string>> params_;
};

namespace detail {

// The members of a request that only the server may set.
class RequestAccess {
public:
    static void set_params(Request& request, std::vector<std::pair<std::string, std::string>> params) {
        request.params_ = std::move(params);
    }
    // The memory of the head and the body.
    static std::size_t held(const Request& request) { return request.bytes_.capacity(); }
    // What the request does not say itself. The certificate may be empty.
    static void set_connection(Request& request, std::string remote_address, bool https,
                               std::string_view client_certificate = {}) {
        request.remote_address_ = std::move(remote_address);
        request.flags_.https = https;
        if (request.certificate_size_ != 0 || client_certificate.empty()) return;
        const std::string_view subject = client_certificate.substr(0, 4096);
        request.bytes_.reserve(request.bytes_.size() + subject.size());
        request.bytes_ += subject;
        request.certificate_size_ = static_cast<std::uint16_t>(subject.size());
    }

    static bool body_complete(const Request& request) { return request.flags_.body_complete; }
    static bool awaits_body(const Request& request) { return request.flags_.has_body && !request.flags_.body_complete; }
    // The body is received into the bytes of the request.
    static std::string& bytes(Request& request) { return request.bytes_; }
    static void end_body(Request& request, std::size_t size) {
        request.body_size_ = static_cast<std::uint32_t>(size);
        request.flags_.body_complete = true;
    }
};

// Parses request heads from bytes in pieces of any size, in linear time. After a failure it accepts no more bytes.
class RequestParser {
public:
    enum class Outcome : std::uint8_t { need_more, request, failure };

    explicit RequestParser(const Limits& limits) : limits_(&limits) {}

    // Consumes at most the bytes up to the end of a head.
    Outcome feed(std::string_view bytes, std::size_t& consumed) {
        consumed = 0;
        while (status_ == 0 && consumed < bytes.size()) {
            const std::size_t end = bytes.find('\n', consumed);
            const bool complete = end != std::string_view::npos;
            const std::string_view piece = bytes.substr(consumed, complete ? end + 1 - consumed : end);
            if (!check_first_byte(piece) || !check_limits(piece)) break;
            request_.bytes_.append(piece);
            consumed += piece.size();
            if (complete && parse_line()) return check_head() ? Outcome::request : Outcome::failure;
        }
        return status_ == 0 ? Outcome::need_more : Outcome::failure;
    }

    // Moves the parsed request out. The parser is then ready for the next head.
    Request take_request() {
        Request request = std::move(request_);
        request.bytes_.shrink_to_fit();
        *this = RequestParser(*limits_);
        return request;
    }
    // Whether an incomplete head has been received.
    bool started() const { return !request_.bytes_.empty(); }
    // The memory of an incomplete head.
    std::size_t buffered() const { return started() ? request_.bytes_.capacity() : 0; }
    // After a failure: the status of the response, and a sentence for its body.
    int status() const { return status_; }
    const std::string& reason() const { return reason_; }

private:
    std::string_view head() const { return request_.bytes_; }

    bool fail(int status, std::string reason) {
        status_ = status;
        reason_ = std::move(reason);
        return false;
    }

    // Rejects a client of another protocol at its first byte instead of after a timeout.
    bool check_first_byte(std::string_view piece) {
        const char first = head().empty() ? piece.front() : head().front();
        if (text::is_token_char(first) || first == '\r' || first == '\n') return true;
        return fail(400, first == '\x16' ? "This port speaks plain HTTP, and the client began with TLS."
                                         : "The request does not begin with a method.");
    }

    // Runs before the bytes are stored. A line end at the end of the bytes does not count.
    bool check_limits(std::string_view piece) {
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

    // Parses the last line of head(). Returns true if the line ends the head.
    bool parse_line() {
        const std::string_view line = head().substr(line_begin_, head().size() - line_begin_ - 1);
        if (line.empty() || line.back() != '\r') return fail(400, "A line does not end with CR LF.");
        const std::string_view content = line.substr(0, line.size() - 1);
        line_begin_ = head().size();
        if (request_.fields_begin_ != 0) return content.empty() || parse_field(content);
        if (content.empty()) {
            // RFC 9112 2.2: "ignore at least one empty line (CRLF) received prior to the request-line".
            if (skipped_empty_line_) return fail(400, "The request line is empty.");
            skipped_empty_line_ = true;
            request_.bytes_.clear();
            line_begin_ = 0;
            return false;
        }
        request_.fields_begin_ = static_cast<std::uint32_t>(line_begin_);
        parse_request_line(content);
        return false;
    }

    // Returns false, because a field does not end the head.
    bool parse_field(std::string_view line) {
        if (++field_count_ > limits_->max_header_fields)
            return fail(431, "There are more than " + std::to_string(limits_->max_header_fields) + " headers.");
        if (const char* error = field_line_error(line)) fail(400, error);
        return false;
    }

    // RFC 9112 3: method SP request-target SP HTTP-version, with single spaces.
    bool parse_request_line(std::string_view line) {
        std::string_view rest = line;
        const std::string_view method = text::consume_until(rest, ' '), target = text::consume_until(rest, ' '),
                               version = rest;
        if (!text::is_token(method)) return fail(400, "The method is malformed.");
        if (target.empty()) return fail(400, "The request line has no target.");
        for (const char c : target)
            if (c <= ' ' || c > '~' || c == '#') return fail(400, "The target has an illegal character.");
        if (version.size() != 8 || !text::starts_with(version, "HTTP/") || !text::is_digit(version[5]) ||
            version[6] != '.' || !text::is_digit(version[7]))
            return fail(400, "The HTTP version is malformed.");
        // RFC 9110 2.5: a higher minor version is treated as the highest known one.
        if (version[5] != '1') return fail(505, "This server speaks HTTP/1.1.");
        request_.flags_.http_1_0 = version[7] == '0';
        request_.method_size_ = static_cast<std::uint32_t>(method.size());  // it is the first word
        request_.target_ = request_.part_of(target);
        return parse_target(target);
    }

    // RFC 9112 3.2: origin-form, absolute-form ("A server MUST accept the absolute-form"), "*".
    bool parse_target(std::string_view target) {
        std::string_view path = target;
        const std::size_t scheme = text::starts_with(text::to_lower(target.substr(0, 7)), "http://")    ? 7
                                   : text::starts_with(text::to_lower(target.substr(0, 8)), "https://") ? 8
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
        path = text::consume_until(query, '?');
        if (!text::percent_decode(path)) return fail(400, "The path has a malformed percent escape.");
        request_.path_ = request_.part_of(path);
        request_.query_ = request_.part_of(query);
        return true;
    }

    // Checks what needs the complete head: Host and the length of the body.
    bool check_head() {
        const Fields fields = request_.fields();
        const std::size_t hosts = fields.count("host");
        if (hosts > 1 || (hosts == 0 && !request_.flags_.http_1_0))
            return fail(400, hosts == 0 ? "There is no Host header." : "There is more than one Host header.");
        const std::string_view host = fields.find("host").value_or(std::string_view());
        if (hosts == 1 && !valid_host(host)) return fail(400, "The Host header is invalid.");
        if (request_.host_.size == 0 && hosts == 1) request_.host_ = request_.part_of(host);
        return check_body(fields);
    }

    // RFC 9112 6.1-6.3. Rejects all on which a proxy might disagree about the end of the request (request smuggling).
    bool check_body(const Fields& fields) {
        const std::size_t lengths = fields.count("content-length"), codings = fields.count("transfer-encoding");
        if (lengths > 0 && codings > 0) return fail(400, "There are both Content-Length and Transfer-Encoding.");
        if (lengths > 1) return fail(400, "There is more than one Content-Length.");
        if (codings > 1) return fail(400, "There is more than one Transfer-Encoding.");
        if (lengths == 1) {
            const auto length = text::parse_unsigned(*fields.find("content-length"), INT64_MAX);
            if (!length) return fail(400, "Content-Length is not a number.");
            request_.flags_.has_body = *length != 0;
        }
        if (codings == 1) {
            if (request_.flags_.http_1_0) return fail(400, "An HTTP/1.0 request has Transfer-Encoding.");
            if (!text::equals_ignore_case(*fields.find("transfer-encoding"), "chunked"))
                return fail(501, "The transfer coding is not implemented.");
            request_.flags_.has_body = true;
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

// Parses response heads from bytes in pieces of any size, in linear time, with the limits of requests. After a failure
// it accepts no more bytes.
class ResponseParser {
public:
    enum class Outcome : std::uint8_t { need_more, response, failure };

    explicit ResponseParser(const Limits& limits) : limits_(&limits) {}

    // Consumes at most the bytes up to the end of a head.
    Outcome feed(std::string_view bytes, std::size_t& consumed) {
        consumed = 0;
        while (reason_.empty() && consumed < bytes.size()) {
            const std::size_t end = bytes.find('\n', consumed);
            const bool complete = end != std::string_view::npos;
            const std::string_view piece = bytes.substr(consumed, complete ? end + 1 - consumed : end);
            if (!within_limits(piece.size())) break;
            head_.append(piece);
            consumed += piece.size();
            if (!check_protocol()) break;
            if (complete && parse_line()) return Outcome::response;
        }
        return reason_.empty() ? Outcome::need_more : Outcome::failure;
    }

    // After Outcome::response: 100-599, and the head with its empty line.
    int status() const { return status_; }
    const std::string& head() const { return head_; }
    Fields fields() const { return Fields(std::string_view(head_).substr(fields_begin_)); }
    // Whether an incomplete head has been received.
    bool started() const { return !head_.empty(); }
    // After a failure: a sentence.
    const std::string& reason() const { return reason_; }

private:
    bool fail(std::string reason) {
        reason_ = std::move(reason);
        return false;
    }
    bool within_limits(std::size_t more) {
        const std::size_t begin = fields_begin_ == 0 ? 0 : fields_begin_;
        const std::size_t max = fields_begin_ == 0 ? limits_->max_request_line : limits_->max_header_bytes;
        if (head_.size() + more <= begin + max + 2) return true;
        return fail(fields_begin_ == 0 ? "The status line is longer than " + std::to_string(max) + " bytes."
                                       : "The headers are longer than " + std::to_string(max) + " bytes.");
    }
    // Rejects another protocol at its first bytes instead of after a timeout.
    bool check_protocol() {
        constexpr std::string_view start = "HTTP/1.";
        if (fields_begin_ != 0) return true;
        const std::size_t size = (std::min)(head_.size(), start.size());
        return head_.compare(0, size, start, 0, size) == 0 || fail("The peer does not speak HTTP/1.");
    }
    // Parses the last line of head_. Returns true if the line ends the head.
    bool parse_line() {
        const std::string_view line = std::string_view(head_).substr(line_begin_);
        line_begin_ = head_.size();
        if (line.size() < 2 || line[line.size() - 2] != '\r') return fail("A line does not end with CR LF.");
        const std::string_view content = line.substr(0, line.size() - 2);
        if (fields_begin_ == 0) {
            fields_begin_ = head_.size();
            return parse_status_line(content);
        }
        if (content.empty()) return true;
        if (++field_count_ > limits_->max_header_fields)
            return fail("There are more than " + std::to_string(limits_->max_header_fields) + " headers.");
        const char* error = field_line_error(content);
        return error != nullptr && fail(error);
    }
    // RFC 9112 4: HTTP-version SP status-code SP [ reason-phrase ]. The last space is often missing. Returns false,
    // because this line does not end the head.
    bool parse_status_line(std::string_view line) {
        const auto digit = [&](std::size_t at) { return line.size() > at && text::is_digit(line[at]); };
        if (line.size() < 12 || !digit(7) || line[8] != ' ' || !digit(9) || !digit(10) || !digit(11) ||
            (line.size() > 12 && line[12] != ' ') || has_control_character(line))
            return fail("The status line is malformed.");
        status_ = (line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0');
        return status_ < 100 || status_ > 599 ? fail("The status is not in 100-599.") : false;
    }

    const Limits* limits_;
    std::string head_;
    std::size_t fields_begin_ = 0;
    std::size_t line_begin_ = 0;
    std::size_t field_count_ = 0;
    int status_ = 0;
    std::string reason_;
};

// Receives the body of a request in pieces of any size, in linear time (RFC 9112 6-7). The head has passed
// RequestParser, so it has either a valid Content-Length or the coding "chunked". After a failure it accepts no more
// bytes.
class BodyParser {
public:
    enum class Outcome : std::uint8_t { need_more, body, failure };

    BodyParser(Request request, const Limits& limits)
        : limits_(&limits),
          request_(std::move(request)),
          body_(&RequestAccess::bytes(request_)),
          body_begin_(body_->size()) {
        const auto length = request_.fields().find("content-length");
        if (length) left_ = text::parse_unsigned(*length, INT64_MAX).value_or(0);
        state_ = length ? State::data : State::size;
        chunked_ = !length;
        if (left_ > limits.max_body) too_large();
    }
    BodyParser(const BodyParser&) = delete;
    BodyParser& operator=(const BodyParser&) = delete;

    // Consumes at most the bytes up to the end of the body.
    Outcome feed(std::string_view bytes, std::size_t& consumed) {
        consumed = 0;
        while (state_ != State::failed && state_ != State::end && consumed < bytes.size()) {
            const std::string_view rest = bytes.substr(consumed);
            consumed += state_ == State::data ? take_data(rest) : take_line(rest);
        }
        if (state_ == State::failed) return Outcome::failure;
        if (state_ != State::end) return Outcome::need_more;
        RequestAccess::end_body(request_, received());
        return Outcome::body;
    }

    // The request with its body, after Outcome::body.
    Request take_request() { return std::move(request_); }
    const Request& request() const { return request_; }
    // What is held for the body now, and what it may become.
    std::size_t received() const { return body_->size() - body_begin_; }
    std::size_t expected() const { return chunked_ ? limits_->max_body : received() + static_cast<std::size_t>(left_); }
    // After a failure, which can be right after the constructor: the status of the response, and a sentence.
    bool failed() const { return state_ == State::failed; }
    int status() const { return status_; }
    const std::string& reason() const { return reason_; }

private:
    enum class State : std::uint8_t { size, data, data_end, trailer, end, failed };

    void fail(int status, std::string reason) {
        state_ = State::failed;
        status_ = status;
        reason_ = std::move(reason);
    }
    void too_large() { fail(413, "The body is larger than " + std::to_string(limits_->max_body) + " bytes."); }

    std::size_t take_data(std::string_view bytes) {
        const auto size = static_cast<std::size_t>((std::min)(left_, std::uint64_t{bytes.size()}));
        body_->append(bytes.data(), size);
        left_ -= size;
        if (left_ == 0) state_ = chunked_ ? State::data_end : State::end;
        return size;
    }

    // The lines between chunks. What is not data is limited, so that framing cannot cost much more than data.
    std::size_t take_line(std::string_view bytes) {
        const std::size_t end = bytes.find('\n');
        const bool complete = end != std::string_view::npos;
        const std::size_t size = complete ? end + 1 : bytes.size();
        overhead_ += size;
        if (overhead_ > limits_->max_header_bytes) {
            fail(431, "The chunk extensions or trailers are too long.");
            return size;
        }
        line_.append(bytes.data(), size);
        if (complete) end_line();
        return size;
    }
    void end_line() {
        std::string line = std::exchange(line_, std::string());
        if (line.size() < 2 || line[line.size() - 2] != '\r')
            return fail(400, "A line of the body does not end with CR LF.");
        line.resize(line.size() - 2);
        if (state_ == State::size) return parse_size(line);
        if (state_ == State::data_end) {
            if (!line.empty()) return fail(400, "A chunk is longer than its size.");
            state_ = State::size;
        } else if (line.empty()) {
            state_ = State::end;
        } else if (const char* error = field_line_error(line)) {
            fail(400, error);  // RFC 9112 7.1.2: a trailer may be discarded, as it is here
        }
    }
    // RFC 9112 7.1: "a recipient MUST anticipate potentially large hexadecimal numerals and prevent parsing errors due
    // to integer conversion overflows". Extensions are ignored (7.1.1).
    void parse_size(std::string_view line) {
        if (has_control_character(line)) return fail(400, "A chunk extension has a control character.");
        std::string_view extension = line;
        const std::string_view digits = text::trim(text::consume_until(extension, ';'));
        // White space is legal only before an extension.
        const bool extended = line.find(';') != std::string_view::npos;
        if (digits.empty() || digits.front() != line.front() || (!extended && digits.size() != line.size()))
            return fail(400, "A chunk size is malformed.");
        std::uint64_t size = 0;
        for (const char c : digits) {
            if (text::hex_value(c) < 0) return fail(400, "A chunk size is malformed.");
            size = size * 16 + static_cast<unsigned>(text::hex_value(c));
            if (size > limits_->max_body) return too_large();
        }
        if (received() + size > limits_->max_body) return too_large();
        left_ = size;
        state_ = size == 0 ? State::trailer : State::data;
        overhead_ -= (std::min)(overhead_, 16 + 2 * static_cast<std::size_t>(size));  // a chunk pays for usual framing
    }

    const Limits* limits_;
    Request request_;
    std::string* body_;
    std::size_t body_begin_;
    std::uint64_t left_ = 0;  // of the body, or of the chunk
    std::size_t overhead_ = 0;
    std::string line_;
    State state_ = State::size;
    bool chunked_ = false;
    int status_ = 0;
    std::string reason_;
};

inline std::string_view reason_phrase(int status) {
    struct Phrase {
        int status;
        std::string_view text;
    };
    // clang-format off
    constexpr Phrase phrases[] = {
        {200, "OK"}, {201, "Created"}, {202, "Accepted"}, {204, "No Content"}, {206, "Partial Content"},
        {301, "Moved Permanently"}, {302, "Found"}, {303, "See Other"}, {304, "Not Modified"},
        {307, "Temporary Redirect"}, {308, "Permanent Redirect"}, {400, "Bad Request"}, {401, "Unauthorized"},
        {403, "Forbidden"}, {404, "Not Found"}, {405, "Method Not Allowed"}, {408, "Request Timeout"},
        {409, "Conflict"}, {410, "Gone"}, {411, "Length Required"}, {413, "Content Too Large"}, {414, "URI Too Long"},
        {415, "Unsupported Media Type"}, {416, "Range Not Satisfiable"}, {417, "Expectation Failed"},
        {421, "Misdirected Request"}, {422, "Unprocessable Content"}, {426, "Upgrade Required"},
        {429, "Too Many Requests"}, {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"},
        {501, "Not Implemented"}, {502, "Bad Gateway"}, {503, "Service Unavailable"}, {504, "Gateway Timeout"},
        {505, "HTTP Version Not Supported"}};
    // clang-format on
    for (const Phrase& phrase : phrases)
        if (phrase.status == status) return phrase.text;
    return status < 300 ? "Success" : status < 400 ? "Redirection" : status < 500 ? "Client Error" : "Server Error";
}

}  // namespace detail

namespace detail {
class ResponseAccess;
}

// The attributes of a cookie (RFC 6265 4.1). The defaults are safe: scripts and foreign sites cannot use the cookie.
struct CookieOptions {
    std::string path = "/";
    std::string domain;                  // empty: only the host that set it
    std::chrono::seconds max_age{-1};    // negative: until the browser ends; zero deletes the cookie
    bool http_only = true;               // hidden from scripts
    bool secure = false;                 // only over https; a request over https gets it so in any case
    std::string_view same_site = "Lax";  // "Strict", "Lax" or "None"
};

// A response with a status of 200-599. The server adds Content-Length, Connection and Date.
class Response {
public:
    explicit Response(int status, std::string body = {}, std::string_view type = "text/plain; charset=utf-8")
        : status_(status), body_(std::move(body)) {
        if (status < 200 || status > 599)
            throw Error("Response: status " + std::to_string(status) + " is not in 200-599");
        if (!body_.empty()) set_header("Content-Type", type);
    }
    // {"a", "b"} is not a body: as an iterator pair it would be undefined behavior.
    template <class T>
    Response(int, std::initializer_list<T>, std::string_view = {}) = delete;
    static Response html(std::string body) { return Response(200, std::move(body), "text/html; charset=utf-8"); }
    static Response json(const Json& body, int status = 200) {
        return Response(status, body.dump(), "application/json");
    }
    static Response redirect(std::string_view location, int status = 302) {
        return std::move(Response(status).set_header("Location", location));
    }

    // Replaces a header of the same name, except Set-Cookie, which may repeat. Throws Error if the value has a control
    // character such as CR or LF: text from a peer cannot split the response.
    Response& set_header(std::string_view name, std::string_view value) {
        if (text::equals_ignore_case(name, "content-length") || text::equals_ignore_case(name, "transfer-encoding"))
            throw Error("Response::set_header: only the server sets " + std::string(name));
        if (!text::is_token(name) || detail::has_control_character(value))
            throw Error("Response::set_header: \"" + escape_for_log(name) + ": " + escape_for_log(value) +
                        "\" is not a header field");
        const auto same = [&](const auto& header) { return text::equals_ignore_case(header.first, name); };
        // RFC 9110 5.3: Set-Cookie is the only field that repeats.
        if (!text::equals_ignore_case(name, "set-cookie"))
            headers_.erase(std::remove_if(headers_.begin(), headers_.end(), same), headers_.end());
        headers_.emplace_back(name, value);
        return *this;
    }

    // Adds a cookie. Throws Error for a name or a value that RFC 6265 4.1.1 does not allow: encode such a value first.
    Response& set_cookie(std::string_view name, std::string_view value, const CookieOptions& options = {}) {
        const auto in_value = [](char c) {
            return c > ' ' && c < 0x7F && c != '"' && c != ',' && c != ';' && c != '\\';
        };
        const auto in_attribute = [](char c) { return c >= ' ' && c < 0x7F && c != ';'; };
        const std::string& path = options.path;
        const std::string& domain = options.domain;
        if (!text::is_token(name) || !std::all_of(value.begin(), value.end(), in_value) ||
            !std::all_of(path.begin(), path.end(), in_attribute) ||
            !std::all_of(domain.begin(), domain.end(), in_attribute) || !text::is_token(options.same_site))
            throw Error("Response::set_cookie: \"" + escape_for_log(name) + "=" + escape_for_log(value) +
                        "\" is not a cookie");
        std::string cookie(name);
        (cookie += '=') += value;
        if (!path.empty()) (cookie += "; Path=") += path;
        if (!domain.empty()) (cookie += "; Domain=") += domain;
        if (options.max_age.count() >= 0) (cookie += "; Max-Age=") += std::to_string(options.max_age.count());
        (cookie += "; SameSite=") += options.same_site;
        if (options.http_only) cookie += "; HttpOnly";
        if (options.secure) cookie += "; Secure";
        cookies_.push_back(std::move(cookie));
        return *this;
    }
    // Deletes a cookie that was set with the same path and domain.
    Response& clear_cookie(std::string_view name, CookieOptions options = {}) {
        options.max_age = std::chrono::seconds(0);
        return set_cookie(name, "", options);
    }

    int status() const { return status_; }
    const std::string& body() const { return body_; }
    const std::vector<std::pair<std::string, std::string>>& headers() const { return headers_; }

private:
    friend class detail::ResponseAccess;

    int status_;
    std::string body_;
    std::vector<std::pair<std::string, std::string>> headers_;
    std::vector<std::string> cookies_;  // the server adds "Secure"
};

namespace detail {

// The members of a response that only the server reads.
class ResponseAccess {
public:
    static const std::vector<std::string>& cookies(const Response& response) { return response.cookies_; }
};

// RFC 6455 4.2.2 / 5.4.
inline std::string accept_key(std::string_view key) {
    const auto digest = sha1(std::string(key) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    return base64(digest.data(), digest.size());
}

// The base64 form of 16 bytes: 22 characters of the alphabet and two of padding.
inline bool valid_key(std::string_view key) {
    const auto in_alphabet = [](char c) { return text::is_alphanumeric(c) || c == '+' || c == '/'; };
    return key.size() == 24 && key.substr(22) == "==" && text::all_of(key.substr(0, 22), in_alphabet);
}

// RFC 6455 4.2.1 / 3-4. Does not check the rest of the handshake.
inline bool wants_upgrade(const Request& request) {
    return request.fields().has_element("upgrade", "websocket") &&
           request.fields().has_element("connection", "upgrade");
}

// The subprotocols that a client offers, in its order of preference.
inline std::vector<std::string_view> offered_subprotocols(const Request& request) {
    std::vector<std::string_view> offered;
    request.fields().each_element("sec-websocket-protocol", [&](std::string_view name) { offered.push_back(name); });
    return offered;
}

inline Response upgrade_required(std::string sentence) {
    return std::move(Response(426, std::move(sentence))
                         .set_header("Upgrade", "websocket")
                         .set_header("Connection", "Upgrade")
                         .set_header("Sec-WebSocket-Version", "13"));
}

// RFC 6455 4.2.1. Returns the response that rejects an invalid upgrade request, or nothing if the request is valid.
inline std::optional<Response> reject_upgrade(const Request& request) {
    const Fields fields = request.fields();
    if (request.method() != "GET") {
        Response rejection(405, "A WebSocket handshake is a GET request.\n");
        rejection.set_header("Allow", "GET");
        return rejection;
    }
    if (request.http_1_0()) return Response(505, "A WebSocket handshake needs HTTP/1.1.\n");
    if (request.has_body()) return Response(400, "A WebSocket handshake has no body.\n");
    if (fields.only("sec-websocket-version") != std::string_view("13"))
        return upgrade_required("This server speaks WebSocket version 13.\n");
    const auto key = fields.only("sec-websocket-key");
    if (!key) return Response(400, "There must be one Sec-WebSocket-Key.\n");
    if (!valid_key(*key)) return Response(400, "Sec-WebSocket-Key is not 16 bytes in base64.\n");
    const std::vector<std::string_view> subprotocols = offered_subprotocols(request);
    if (!std::all_of(subprotocols.begin(), subprotocols.end(), text::is_token))
        return Response(400, "Sec-WebSocket-Protocol is not a list of tokens.\n");
    return std::nullopt;
}

inline void reject_control_characters(const char* call, std::string_view value) {
    if (has_control_character(value))
        throw Error(std::string(call) + ": \"" + escape_for_log(value) + "\" has a control character");
}

// The 101 (RFC 6455 4.2.2 / 5).
inline std::string switching_protocols(std::string_view key, std::string_view subprotocol,
                                       std::string_view extensions = {}, std::string_view more_lines = {}) {
    for (const std::string_view value : {subprotocol, extensions})
        reject_control_characters("switching_protocols", value);
    return text::concat(
        {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
         "Sec-WebSocket-Accept: ",
         accept_key(key), subprotocol.empty() ? "" : "\r\nSec-WebSocket-Protocol: ", subprotocol,
         extensions.empty() ? "" : "\r\nSec-WebSocket-Extensions: ", extensions, "\r\n", more_lines, "\r\n"});
}

// The client's request (RFC 6455 4.1). `key`: 16 random bytes in base64.
inline std::string handshake_request(std::string_view host, std::string_view target, std::string_view key,
                                     std::string_view subprotocols = {}, std::string_view extensions = {}) {
    for (const std::string_view value : {host, target, key, subprotocols, extensions})
        reject_control_characters("handshake_request", value);
    if (target.find(' ') != std::string_view::npos) throw Error("handshake_request: the target has a space");
    std::string head = "GET ";
    ((head += target) += " HTTP/1.1\r\nHost: ") += host;
    (head += "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ") +=
        key;
    if (!subprotocols.empty()) (head += "\r\nSec-WebSocket-Protocol: ") += subprotocols;
    if (!extensions.empty()) (head += "\r\nSec-WebSocket-Extensions: ") += extensions;
    return head += "\r\n\r\n";
}

// Returns why a client must reject the server's response (RFC 6455 4.1, the numbered list at its end), or an empty
// text. `head` includes the empty line. If an extension was offered, section 6 checks the chosen one.
inline std::string handshake_response_error(std::string_view head, std::string_view key,
                                            std::string_view subprotocols = {}, bool extension_offered = false) {
    std::string_view rest = head;
    const std::string_view status_line = text::consume_until(rest, '\n');
    const std::string_view status = status_line.substr(0, status_line.find_first_of(" \r", 9));
    if (status != "HTTP/1.1 101")
        return "the server answered \"" + escape_for_log(text::trim(status_line.substr(0, status_line.find('\r')))) +
               "\"";
    const Fields fields(rest);
    if (!fields.has_element("upgrade", "websocket")) return "the response has no Upgrade: websocket";
    if (!fields.has_element("connection", "upgrade")) return "the response has no Connection: Upgrade";
    if (fields.count("sec-websocket-accept") != 1 || *fields.find("sec-websocket-accept") != accept_key(key))
        return "Sec-WebSocket-Accept does not match the key";
    if (!extension_offered && fields.count("sec-websocket-extensions") != 0)
        return "the server chose an extension that was not offered";
    if (const auto chosen = fields.find("sec-websocket-protocol")) {
        bool offered = false;
        while (!subprotocols.empty() && !offered)
            offered = text::trim(text::consume_until(subprotocols, ',')) == *chosen;
        if (!offered || fields.count("sec-websocket-protocol") != 1)
            return "the server chose a subprotocol that was not offered";
    }
    return {};
}

// RFC 6454 7, and what programs send that contain a browser: lower case, without the default port and without a slash
// at the end: "https://chat.example:8443", "capacitor://localhost", "file://", "null". ws and wss, which some clients
// send, become http and https. Returns nothing for all other texts.
inline std::optional<std::string> normalized_origin(std::string_view origin) {
    std::string normal = text::to_lower(origin);
    if (normal == "null") return normal;
    const std::size_t colon = normal.find("://");
    const auto scheme_char = [](char c) { return text::is_alphanumeric(c) || c == '+' || c == '-' || c == '.'; };
    if (colon == std::string::npos || normal.front() < 'a' || normal.front() > 'z' ||
        !std::all_of(normal.begin(), normal.begin() + static_cast<std::ptrdiff_t>(colon), scheme_char))
        return std::nullopt;
    if (normal.size() > colon + 3 && normal.back() == '/') normal.pop_back();
    if (text::starts_with(normal, "ws://") || text::starts_with(normal, "wss://")) normal.replace(0, 2, "http");
    const std::string_view default_port = text::starts_with(normal, "https://")  ? ":443"
                                          : text::starts_with(normal, "http://") ? ":80"
                                                                                 : "";
    const std::string_view host = std::string_view(normal).substr(normal.find("://") + 3);
    if (host.empty() ? !default_port.empty() : !valid_host(host)) return std::nullopt;
    if (!default_port.empty() && host.size() > default_port.size() &&
        host.substr(host.size() - default_port.size()) == default_port)
        normal.resize(normal.size() - default_port.size());
    return normal;
}

// Whether a page of that origin connects to its own host. `host`: the Host header. The scheme may differ, because a
// proxy may add TLS. `https`: the client's connection is known to be encrypted, so a page over http is foreign: anyone
// on its network could have changed it.
inline bool same_host(std::string_view origin, std::string_view host, bool https = false) {
    const auto normal = normalized_origin(origin);
    if (!normal || !valid_host(host)) return false;
    const bool secure = text::starts_with(*normal, "https://");
    if (!secure && (https || !text::starts_with(*normal, "http://"))) return false;
    return normal == normalized_origin((secure ? "https://" : "http://") + std::string(host));
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
    // After `output_full`: how many bytes at the end of the input are not inflated yet. The caller sets them again
    // later, or an empty input if there are none.
    virtual std::size_t take_unread_input() { return 0; }
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
        const auto available = static_cast<uInt>((std::min)(block.available(), max_zlib_size));
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
    // The rest may be in the tail, which refill() adds.
    std::size_t take_unread_input() {
        if (tail_appended_) return 0;
        const std::size_t unread = input_.size() + std::exchange(stream_.avail_in, 0u);
        input_ = {};
        return unread;
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
    explicit ExtensionReader(std::string_view field) : rest_(text::trim(field)) {}

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
        const auto end = std::find_if_not(rest_.begin(), rest_.end(), text::is_token_char);
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
        return (skip('"') && text::is_token(*value)) || fail();
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
        const auto number = value && value->front() != '0' ? text::parse_unsigned(*value, 15) : std::nullopt;
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
    std::size_t take_unread_input() override { return inflater_->take_unread_input(); }
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
        if (!text::equals_ignore_case(field, "sec-websocket-extensions")) return true;
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
    // paused: the budget is spent within a message. The caller pauses the input, or calls again.
    enum class Kind : std::uint8_t { none, message, ping, pong, close, paused };

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
        metered_ = limits.messages_per_second != 0 || limits.bytes_per_second != 0;
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
        frames_read_ = 0;
        input_ = data;
        input_end_ = data + size;
        record_activity(now);
        if (metered_ && limits_->bytes_per_second != 0)
            cold().bytes.charge(static_cast<double>(size), byte_rate(), now);
    }

    // Limits::messages_per_second and bytes_per_second: when input may continue. The caller pauses it until then.
    Time input_due() const {
        Time due{};
        if (!metered_ || !cold_) return due;
        if (limits_->messages_per_second != 0) due = cold_->messages.available_at(1, message_rate());
        if (limits_->bytes_per_second != 0) due = (std::max)(due, cold_->bytes.available_at(1, byte_rate()));
        return due;
    }
    // The most bytes that the caller may pass to receive() at once.
    std::size_t max_input() const { return limits_->bytes_per_second != 0 ? limits_->bytes_per_second : SIZE_MAX; }

    // The buffer for the next bytes of a large frame, which is the end of its message. Returns {null, 0} if the
    // transport should use its own buffer. The buffer grows with the received bytes, not with the announced length.
    std::pair<char*, std::size_t> receive_buffer() {
        if (!in_payload_ || is_control(frame_.opcode) || frame_left_ < direct_read_size ||
            message_.size() < direct_read_size || inflating_)
            return {nullptr, 0};
        const std::uint64_t wanted = std::min<std::uint64_t>(frame_left_, message_.size());
        if (message_.available() < direct_read_size)
            message_.reserve(static_cast<std::size_t>(wanted), wanted == frame_left_ && frame_.fin);
        return {message_.end(), static_cast<std::size_t>(std::min<std::uint64_t>(frame_left_, message_.available()))};
    }

    // The transport has ended, by a FIN or by an error. The reason says which.
    void receive_eof(std::string_view reason) { abort(CloseCause::connection_lost, reason); }

    // Returns the next event, or `none` if more bytes are needed. The close event is the last one and occurs once.
    Event next_event() {
        if (message_delivered_) {
            arena_->recycle(std::move(message_));
            message_delivered_ = false;
        }
        while (state_ == State::open || state_ == State::closing) {
            if (!in_payload_ && !read_header()) break;
            if (!in_payload_) continue;
            const bool whole = frame_left_ <= static_cast<std::uint64_t>(input_end_ - input_);
            if (!whole && input_ == input_end_) break;
            const Event event = is_control(frame_.opcode) ? read_control() : read_data(whole);
            if (event.kind == Event::Kind::none) {
                if (frames_read_ >= frame_budget && input_ != input_end_) return {Event::Kind::paused};
                continue;
            }
            if (metered_ && event.kind == Event::Kind::message && limits_->messages_per_second != 0)
                cold().messages.charge(1, message_rate(), last_activity_);
            return event;
        }
        if (cold_ && input_ == input_end_) cold_->resumed_input.release();
        if (state_ != State::closed || close_reported_) return {};
        close_reported_ = true;
        message_.release();
        return {Event::Kind::close, Message(std::string_view())};
    }

    // Stores the rest of the input until resume_input(). The caller must not call receive() in between.
    void pause_input() {
        if (input_ == input_end_) return;
        ColdState& state = cold();
        if (!state.resumed_input.empty() && input_end_ == state.resumed_input.end()) {
            state.paused_begin = static_cast<std::size_t>(input_ - state.resumed_input.data());
            state.paused_input.swap(state.resumed_input);
        } else {
            state.paused_begin = 0;
            state.paused_input.append(input_, static_cast<std::size_t>(input_end_ - input_));
        }
        input_ = input_end_ = nullptr;
    }
    void resume_input() {
        if (compression_available && compression_) compression_->inflated_bytes = 0;
        frames_read_ = 0;
        if (!cold_ || cold_->paused_input.empty()) return;
        std::swap(cold_->resumed_input, cold_->paused_input);
        cold_->paused_input.release();
        input_ = cold_->resumed_input.data() + cold_->paused_begin;
        input_end_ = cold_->resumed_input.end();
    }

    // Whether so much was done since receive() or resume_input() that other connections should run first. The caller
    // pauses the input then.
    bool budget_spent() const { return frames_read_ >= frame_budget || inflate_budget_spent(); }
    // One byte can inflate to a thousand.
    bool inflate_budget_spent() const {
        return compression_available && compression_ && compression_->inflated_bytes >= inflate_budget;
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
    // A client must mask each frame with a new key, so only a server shares the frame.
    WriteStatus send(const EncodedFrame& frame) {
        if (mask_source_ != nullptr) return send(frame.opcode(), frame.payload());
        if (!can_send(frame.size())) return reject_write();
        if (!should_compress(frame.payload().size())) return enqueue(frame.slice());
        // Without context takeover, all members share one compressed frame.
        const auto make = [&] { return compressed_frame(frame.opcode(), frame.payload()); };
        const void* key = compression_->sharing_key();
        return enqueue(key != nullptr ? frame.variant(key, make) : make());
    }
    // The same for a message that is useless when it is late. It is dropped if the peer is slow, with either policy.
    WriteStatus send_volatile(const EncodedFrame& frame) {
        sends_volatile_ = true;
        return drops_volatile(frame.size()) ? drop() : send(frame);
    }
    WriteStatus send_volatile(Opcode opcode, std::string_view payload) {
        sends_volatile_ = true;
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
        wait_started_ = saturating_add(now, drain_time(output_.size()));
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
        if (state_ == State::open) enqueue_close(code, truncate_utf8(reason, 123));
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
    // Whether there was a volatile message.
    bool sends_volatile() const { return sends_volatile_; }

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
    static constexpr std::size_t inflate_budget = 64 * 1024;
    static constexpr std::uint32_t frame_budget = 1024;

    static Time deadline_after(Time time, Duration timeout) {
        return timeout == Duration::zero() ? (Time::max)() : saturating_add(time, timeout);
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
        ++frames_read_;
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
    std::optional<std::string_view> read_payload(bool text, std::uint64_t max = UINT64_MAX) {
        const auto size =
            static_cast<std::size_t>((std::min)({frame_left_, static_cast<std::uint64_t>(input_end_ - input_), max}));
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
        if (message_.capacity() == 0 && frame_.length >= direct_read_size) message_ = arena_->acquire_buffer();
        const bool received_in_place = part.data() == message_.end() && part.size() <= message_.available();
        if (received_in_place) message_.advance(part.size());
        else message_.append(part);
    }

    // Inflates each part when it arrives, into a block of the arena, until the budget is spent. A message that fits
    // into one block is delivered from that block. Parts of an unfinished message are copied, because an open message
    // must not hold a whole block.
    Event read_compressed() {
        const std::string_view part = *read_payload(false, cached_block);
        const bool last = !in_payload_ && frame_.fin;
        if (state_ != State::open) return {};  // RFC 6455 1.4, as in read_data()
        compression_->set_input(part, last);
        Compression::Outcome outcome;
        do {
            Bytes block = arena_->acquire_buffer();
            block.reserve(compression_block);
            outcome = inflate_to(block);
            if (state_ != State::open) return {};
            if (message_.empty() && (last || outcome == Compression::Outcome::output_full)) std::swap(message_, block);
            else message_.append(block.view());
            arena_->recycle(std::move(block));
            if (outcome == Compression::Outcome::output_full && inflate_budget_spent()) {
                put_back(compression_->take_unread_input());
                return {Event::Kind::paused};
            }
        } while (outcome == Compression::Outcome::output_full);
        if (!last) return {inflate_budget_spent() ? Event::Kind::paused : Event::Kind::none};
        if (message_opcode_ == Opcode::text && !utf8_.complete()) return fail_invalid_text();
        inflating_ = false;
        message_delivered_ = true;
        return {Event::Kind::message, Message(message_.view(), message_opcode_)};
    }
    // Gives the last n bytes of the payload back to the input, masked as they came. The frame continues, also with 0.
    void put_back(std::size_t n) {
        input_ -= n;
        frame_left_ += n;
        in_payload_ = true;
        if (frame_.masked)
            apply_mask(input_, n, frame_.mask, static_cast<std::size_t>((frame_.length - frame_left_) % 4));
    }
    // Fills the block. The connection fails as soon as the output breaks the size limit or is not UTF-8.
    Compression::Outcome inflate_to(Bytes& block) {
        const std::size_t left = limits_->max_message_size - message_.size();
        const std::size_t capacity = (std::min)(block.available(), compression_block);  // a recycled block is larger
        std::size_t size = 0;
        const Compression::Outcome outcome =
            compression_->inflate(block.data(), left < capacity ? left + 1 : capacity, size);
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

    Rate message_rate() const {
        const double rate = limits_->messages_per_second, burst = limits_->messages_burst;
        return {rate, burst != 0 ? burst : rate};
    }
    Rate byte_rate() const {
        const auto rate = static_cast<double>(limits_->bytes_per_second);
        return {rate, rate};
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
        Bytes block = arena_->acquire_buffer();
        block.reserve(compression_block);
        const std::string_view deflated = compression_->deflate(payload, block);
        Slice slice = deflated.empty() ? frame(opcode, payload) : frame(opcode, deflated, true);
        arena_->recycle(std::move(block));
        return slice;
    }

    // Allocated on demand, which keeps idle connections small.
    struct ColdState {
        Bytes paused_input;
        std::size_t paused_begin = 0;  // its bytes before this were read already
        Bytes resumed_input;           // that next_event() reads
        std::string partial_control;   // the beginning of a control frame's payload
        std::string complete_control;  // the payload of the last event, if it arrived in parts
        std::optional<std::string> pending_pong;
        TokenBucket messages, bytes;  // if the rates of the input are limited
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
    bool metered_ = false;  // the rate of messages or of bytes is limited
    bool sends_volatile_ = false;
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
    std::uint32_t fragments_ = 0;
    std::uint32_t frames_read_ = 0;  // since receive() or resume_input()
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

#include <atomic>
#include <cassert>
#include <thread>

WSCHAT_BEGIN

class Loop;
class Room;
class Rooms;
class Server;
class WebSocketHandler;

namespace detail {

class HandlerAccess;
struct HandlerCore;

// What was given to a Reply.
struct ReplyAnswer {
    std::optional<Response> response;  // nothing: the handshake continues
    // Called before open(). May return a refusal.
    std::function<std::optional<Response>(WebSocketHandler&)> setup;
    bool dropped = false;  // the Reply was destroyed unused
};

// What a handler needs of the session that owns it; section 14 implements it.
class HandlerHost {
public:
    bool dirty = false;  // mark_dirty() was called in this turn

    // What the session has waited for: the answer of a Reply.
    virtual void on_reply(ReplyAnswer answer) = 0;

    // The handler has output, or its connection has changed its state: the session acts on it at the end of the turn.
    virtual void mark_dirty() = 0;
    // Offers what is queued to the kernel now.
    virtual void flush() = 0;
    // Offers pieces to the kernel while nothing is queued. Returns how many bytes it took.
    virtual std::size_t offer(const std::string_view* pieces, std::size_t count) = 0;
    virtual void set_nodelay(bool on) = 0;
    // Logs and counts an exception that left a callback.
    virtual void report_exception(const char* callback, const char* what) noexcept = 0;
    virtual bool origin_allowed(std::string_view origin) const = 0;
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

// The answer to a request that comes later. A page's function or prepare_async() gets it, may keep it, and uses it
// once, on any thread. Only this connection waits for it, at most Limits::reply_timeout. A Reply that is destroyed
// unused answers 500.
class Reply {
public:
    Reply() = default;
    Reply(Reply&&) noexcept = default;
    Reply& operator=(Reply&& other) noexcept {
        if (this != &other) drop();
        state_ = std::move(other.state_);
        return *this;
    }
    ~Reply() { drop(); }

    // Answers the request. In prepare_async() it rejects the handshake. Returns false and has no effect if the Reply
    // was used before, the client has gone, or the server has ended.
    bool send(Response response) const { return answer({std::move(response), {}}); }
    // In prepare_async() only: the handshake continues.
    bool accept() const { return answer({std::nullopt, {}}); }
    // The same. setup(handler) is called on the loop's thread, before open(), if the client is still there: it can give
    // the handler what was looked up. It may return a std::optional<Response>, which rejects the handshake. Both return
    // what send() returns.
    template <class Setup>
    bool accept(Setup setup) const {
        return answer({std::nullopt, [setup = std::move(setup)](WebSocketHandler& handler) -> std::optional<Response> {
                           if constexpr (std::is_void_v<std::invoke_result_t<const Setup&, WebSocketHandler&>>) {
                               setup(handler);
                               return std::nullopt;
                           } else {
                               return setup(handler);
                           }
                       }});
    }
    // False if send() and accept() would return false.
    bool is_open() const { return state_ && state_->open; }

private:
    friend class detail::HandlerAccess;

    struct State {
        std::shared_ptr<Mailbox> mailbox;
        std::thread::id thread;  // of the loop
        std::atomic<bool> open;
        detail::HandlerHost* host;  // only for the loop's thread; null when the session has ended or has given up
    };

    bool answer(detail::ReplyAnswer answer) const {
        if (!state_ || !state_->open.exchange(false)) return false;
        if (std::this_thread::get_id() == state_->thread) return deliver(*state_, std::move(answer));
        return state_->mailbox->post(
            [state = state_, answer = std::move(answer)]() mutable { deliver(*state, std::move(answer)); });
    }
    static bool deliver(State& state, detail::ReplyAnswer answer) {
        detail::HandlerHost* const host = std::exchange(state.host, nullptr);
        if (host != nullptr) host->on_reply(std::move(answer));
        return host != nullptr;
    }
    // If memory runs out, the session waits until its timeout.
    void drop() noexcept {
        if (!is_open()) return;
        detail::run_guarded(
            [&] {
                answer({Response(500, "The server failed to answer.\n"), {}, true});
            },
            [](const char*) {});
    }

    std::shared_ptr<State> state_;
};

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

    // The bytes that were written here and are not with the kernel yet, at the latest flush. A thread that produces
    // much waits while it is large. 0 if the handler is gone.
    std::size_t buffered_amount() const { return cell_ ? cell_->posted.load() + cell_->queued.load() : 0; }

    // Returns null if the handler is gone. Only for the loop's thread.
    WebSocketHandler* get() const { return cell_ ? cell_->handler : nullptr; }

private:
    friend class WebSocketHandler;
    friend class detail::HandlerAccess;

    struct Cell {
        std::shared_ptr<Mailbox> mailbox;
        WebSocketHandler* handler;            // only for the loop's thread
        std::atomic<std::size_t> posted = 0;  // bytes on their way to the loop
        std::atomic<std::size_t> queued = 0;  // bytes of the connection's backlog
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
    std::uint64_t messages_sent = 0;
    Connection connection;
    Request request;
    std::string_view subprotocol;  // a part of the request
    std::vector<Membership> rooms;
    std::unique_ptr<StringMap<std::size_t>> positions;  // positions in `rooms`, by room; null if there never were many
    HandlerRef ref;
};

}  // namespace detail

// One WebSocket connection. The server creates a handler for each request that matches its route, calls check_origin(),
// prepare() and select_subprotocol() before the 101 response, then open(). It destroys the handler after on_close().
//
// A Client uses the same class for its side. It creates a handler for each attempt to connect, and calls either
// on_failure() or open() first; the functions about the request of a server are not called. So a handler has no state
// of an earlier connection, which a program could use by mistake.
class WebSocketHandler {
public:
    WebSocketHandler() = default;
    WebSocketHandler(const WebSocketHandler&) = delete;
    WebSocketHandler& operator=(const WebSocketHandler&) = delete;
    virtual ~WebSocketHandler() {
        if (!core_.ref.cell_) return;
        core_.ref.cell_->handler = nullptr;
        core_.ref.cell_->queued = 0;
    }

    // ---- to override -----------------------------------------------------------------------------------------------

    // Called before the 101. A response from here rejects the handshake (401, 403, a redirect).
    virtual std::optional<Response> prepare(const Request&) { return std::nullopt; }
    // The same if the answer comes later, for example from a database: called after the other checks. Either
    // reply.accept() or reply.send(), which rejects the handshake.
    virtual void prepare_async(const Request&, Reply reply) { reply.accept(); }
    // Adds headers and cookies to the 101: response.set_cookie(...). Its status and body are not used.
    virtual void response_headers(Response& response) { static_cast<void>(response); }
    // Whether a page of this origin may connect. Only called for a request with an Origin header. By default the origin
    // must have the request's host (and be https if request().scheme() is) or be one of Server::allow_origins(). False
    // sends a 403.
    virtual bool check_origin(std::string_view origin) { return core_.host->origin_allowed(origin); }
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
    // Of a client: the attempt to connect has failed. Neither open() nor on_close() is called for this handler.
    virtual void on_failure(const ConnectError& error) { static_cast<void>(error); }
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
    template <class T>
    WriteStatus ping(std::initializer_list<T>) = delete;

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
    // The same as request().remote_address().
    const std::string& remote_address() const { return core_.request.remote_address(); }
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
        if (core_.host != nullptr) core_.host->set_nodelay(on);
    }

    // A reference for other threads and for later use. Empty in the constructor.
    HandlerRef ref() {
        if (core_.ref.cell_ == nullptr && core_.host != nullptr)
            core_.ref.cell_ = std::shared_ptr<HandlerRef::Cell>(new HandlerRef::Cell{core_.host->mailbox(), this});
        return core_.ref;
    }
    // Both throw Error in the constructor.
    Loop& loop() { return host("loop").loop(); }
    Server& server() { return host("server").server(); }

protected:
    // Runs a callback of a derived class. An exception is logged and counted, and closes the connection with 1011 and
    // CloseCause::handler_exception, as one out of on_message() does.
    void run_hook(const char* name, detail::FunctionRef<> hook) {
        detail::run_guarded(hook, [&](const char* what) { fail(name, what); });
    }

private:
    friend class detail::HandlerAccess;

    void fail(const char* callback, const char* what) {
        if (core_.host == nullptr) return;
        core_.host->report_exception(callback, what);
        with_connection([](detail::Connection& connection) {
            connection.fail(CloseCode::internal_error, "internal error", CloseCause::handler_exception);
            return WriteStatus::closed;
        });
    }

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
        if (!core_.host->dirty) core_.host->mark_dirty();
        return status;
    }
    template <class Send>
    WriteStatus send_data(std::size_t size, Send&& function) {
        return with_connection([&](detail::Connection& connection) {
            // Flushes the output of this turn before the limit applies to the peer.
            if (connection.is_open() && connection.exceeds_backlog(size)) core_.host->flush();
            const WriteStatus status = function(connection);
            if (status == WriteStatus::sent || status == WriteStatus::queued) ++core_.messages_sent;
            return status;
        });
    }
    WriteStatus send_payload(Opcode opcode, std::string_view payload) {
        return send_data(payload.size(), [&](detail::Connection& connection) {
            return connection.send(opcode, payload, [this](const std::string_view* pieces, std::size_t count) {
                return core_.host->offer(pieces, count);
            });
        });
    }

    detail::HandlerCore core_;
};

namespace detail {

// Access to the private parts of a handler, for the sections that need it.
class HandlerAccess {
public:
    static HandlerCore& core(WebSocketHandler& handler) { return handler.core_; }
    static const HandlerCore& core(const WebSocketHandler& handler) { return handler.core_; }
    // Fetches the first cache lines of a handler and of its session, which sending needs.
    static void prefetch(const WebSocketHandler* handler) { detail::prefetch(handler, 4); }
    static void prefetch_session(const WebSocketHandler& handler) { detail::prefetch(handler.core_.host, 2); }
    static void check_payload(const char* call, std::string_view payload, Opcode opcode) {
        WebSocketHandler::check_payload(call, payload, opcode);
    }
    static void run_hook(WebSocketHandler& handler, const char* name, FunctionRef<> hook) {
        handler.run_hook(name, hook);
    }

    // For HandlerRef::buffered_amount().
    static void note_queued(WebSocketHandler& handler) {
        const auto& cell = handler.core_.ref.cell_;
        if (cell) cell->queued = handler.core_.connection.output().size();
    }

    // The session's end of a Reply. It gives up by close_reply(); what the Reply is given after that has no effect.
    using ReplyState = std::shared_ptr<Reply::State>;
    static ReplyState open_reply(HandlerHost& host) {
        return ReplyState(new Reply::State{host.mailbox(), std::this_thread::get_id(), {true}, &host});
    }
    static Reply make_reply(const ReplyState& state) {
        Reply reply;
        reply.state_ = state;
        return reply;
    }
    static void close_reply(ReplyState& state) {
        if (!state) return;
        state->open = false;
        state->host = nullptr;
        state.reset();
    }
};

}  // namespace detail

inline bool HandlerRef::write_message(std::string payload, Opcode opcode) const {
    detail::HandlerAccess::check_payload("HandlerRef::write_message", payload, opcode);
    if (!cell_) return false;
    const std::size_t size = payload.size();
    cell_->posted += size;
    const bool posted = cell_->mailbox->post([cell = cell_, payload = std::move(payload), opcode] {
        cell->posted -= payload.size();
        if (cell->handler == nullptr) return;
        cell->handler->write_message(Message(payload, opcode));
        detail::HandlerAccess::note_queued(*cell->handler);
    });
    if (!posted) cell_->posted -= size;
    return posted;
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
//
// On several loops, a room is one Room on each loop that has members in it, and a SharedRoom that they have in common.
// A broadcast is added to the queues of the members on its own loop without a lock. For each other loop with members it
// goes into an outbox, and the outboxes go to the other loops at the end of the turn: one post for each.
// ====================================================================================================================

#include <atomic>
#include <mutex>

WSCHAT_BEGIN

namespace detail {

class RoomsAccess;

// What the loops of a server know of one room.
struct SharedRoom {
    // What one loop has of the room.
    struct Part {
        std::atomic<std::size_t> members{0};  // written by that loop, read by all
        Room* room = nullptr;                 // only that loop may use it
    };

    SharedRoom(std::string its_name, std::size_t loops) : name(std::move(its_name)), parts(loops) {}
    std::size_t members() const {
        std::size_t sum = 0;
        for (const Part& part : parts) sum += part.members.load(std::memory_order_acquire);
        return sum;
    }

    const std::string name;
    std::vector<Part> parts;
    std::size_t users = 0;    // loops with a Room of the name; under the lock of the directory
    bool subscribed = false;  // to the room on other machines; only the first loop uses it
};

// Carries broadcasts to the rooms of other machines. All calls come on the first loop of the server.
class RoomBus {
public:
    virtual ~RoomBus() = default;
    // This process has members in the room from now on, or has none any more.
    virtual void subscribe(const std::string& room) = 0;
    virtual void unsubscribe(const std::string& room) = 0;
    // Never waits. Whether it arrives is not known.
    virtual void publish(const std::string& room, Opcode opcode, std::string_view payload) = 0;
};

// The rooms of all loops of a server, and the way of broadcasts from one loop to another. Not needed by a server with
// one loop and no other machines.
class RoomDirectory {
public:
    // One entry for each loop, the first loop first. `max_backlog`: bytes that wait for one loop.
    RoomDirectory(std::vector<Rooms*> rooms, std::vector<std::shared_ptr<Mailbox>> mailboxes, std::size_t max_backlog)
        : max_backlog_(max_backlog), loops_(rooms.size()) {
        for (std::size_t i = 0; i < loops_.size(); ++i) {
            loops_[i].rooms = rooms[i];
            loops_[i].mailbox = std::move(mailboxes[i]);
            loops_[i].outboxes.resize(loops_.size());
        }
    }
    RoomDirectory(const RoomDirectory&) = delete;
    RoomDirectory& operator=(const RoomDirectory&) = delete;

    // ---- any thread ------------------------------------------------------------------------------------------------

    // Null if no loop has members in a room of that name.
    std::shared_ptr<SharedRoom> find(std::string_view name) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::shared_ptr<SharedRoom>* found = rooms_.find(name);
        return found == nullptr || (*found)->members() == 0 ? nullptr : *found;
    }
    // The rooms with members.
    std::vector<std::string> names() const {
        std::vector<std::string> result;
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& [name, room] : rooms_)
            if (room->members() != 0) result.push_back(name);
        return result;
    }
    std::size_t size() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return rooms_.size();
    }
    // Broadcasts that found too much waiting for a loop, and were not passed on to it.
    std::uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

    // ---- the loop with this number ---------------------------------------------------------------------------------

    // A loop has made a Room of that name, or has destroyed it.
    std::shared_ptr<SharedRoom> attach(std::size_t loop, Room& room, const std::string& name) {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto& shared = rooms_.find_or_emplace(name);
        if (!shared) shared = std::make_shared<SharedRoom>(name, loops_.size());
        shared->parts[loop].room = &room;
        ++shared->users;
        return shared;
    }
    void detach(std::size_t loop, SharedRoom& room) {
        room.parts[loop].room = nullptr;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--room.users == 0) rooms_.erase(room.name);
    }
    void set_members(std::size_t loop, const std::shared_ptr<SharedRoom>& room, std::size_t members) {
        auto& count = room->parts[loop].members;
        const std::size_t before = count.load(std::memory_order_relaxed);
        count.store(members, std::memory_order_release);
        if (bus_ != nullptr && (before == 0) != (members == 0))
            loops_[0].mailbox->post([this, room] { refresh_subscription(*room); });
    }
    // Passes a broadcast on to the other loops with members, and to other machines. Returns how many members there are
    // on the other loops.
    std::size_t publish(std::size_t loop, const std::shared_ptr<SharedRoom>& room, Opcode opcode,
                        std::string_view payload, bool is_volatile) {
        if (bus_ != nullptr && loop == 0) bus_->publish(room->name, opcode, payload);
        const bool by_first = bus_ != nullptr && loop != 0;
        return pass_on(loop, {room, nullptr, opcode, is_volatile, by_first}, payload);
    }
    // At the end of a turn.
    void flush(std::size_t loop) {
        if (!std::exchange(loops_[loop].outboxes_used, false)) return;
        for (std::size_t target = 0; target < loops_.size(); ++target) {
            std::vector<Delivery>& outbox = loops_[loop].outboxes[target];
            if (outbox.empty()) continue;
            loops_[target].mailbox->post(
                [this, target, deliveries = std::exchange(outbox, {})] { deliver_all(target, deliveries); });
        }
    }

    // ---- the first loop --------------------------------------------------------------------------------------------

    // Before the first connection.
    void set_bus(RoomBus* bus) { bus_ = bus; }
    // To the members of all loops: what the bus has received from another machine.
    void deliver_from_bus(std::string_view name, Opcode opcode, std::string_view payload) {
        const std::shared_ptr<SharedRoom> room = find(name);
        if (!room) return;
        deliver(*room, 0, opcode, payload, false);
        pass_on(0, {room, nullptr, opcode, false, false}, payload);
    }

private:
    struct Delivery {
        std::shared_ptr<SharedRoom> room;
        std::shared_ptr<const std::string> payload;
        Opcode opcode;
        bool is_volatile;
        bool by_bus;  // also to other machines
    };
    struct PerLoop {
        Rooms* rooms = nullptr;
        std::shared_ptr<Mailbox> mailbox;
        std::vector<std::vector<Delivery>> outboxes{};  // by target; only this loop uses them
        bool outboxes_used = false;
        std::atomic<std::size_t> waiting{0};  // bytes in the outboxes of all other loops for this one
    };

    static std::size_t cost(const Delivery& delivery) { return delivery.payload->size() + sizeof(Delivery); }

    std::size_t pass_on(std::size_t loop, Delivery delivery, std::string_view payload) {
        std::size_t members = 0;
        for (std::size_t target = 0; target < loops_.size(); ++target) {
            const std::size_t there =
                target == loop ? 0 : delivery.room->parts[target].members.load(std::memory_order_acquire);
            const bool to_bus = delivery.by_bus && target == 0;
            if (there == 0 && !to_bus) continue;
            // One copy for all loops, because a slice of a queue belongs to one loop.
            if (!delivery.payload) delivery.payload = std::make_shared<const std::string>(payload);
            if (loops_[target].waiting.load(std::memory_order_relaxed) > max_backlog_) {
                dropped_.fetch_add(1, std::memory_order_relaxed);
                continue;
            }
            loops_[loop].outboxes[target].push_back(delivery);
            loops_[loop].outboxes[target].back().by_bus = to_bus;
            loops_[loop].outboxes_used = true;
            loops_[target].waiting.fetch_add(cost(delivery), std::memory_order_relaxed);
            members += there;
        }
        return members;
    }
    void deliver_all(std::size_t loop, const std::vector<Delivery>& deliveries) {
        for (const Delivery& delivery : deliveries) {
            loops_[loop].waiting.fetch_sub(cost(delivery), std::memory_order_relaxed);
            if (delivery.by_bus && bus_ != nullptr)
                bus_->publish(delivery.room->name, delivery.opcode, *delivery.payload);
            deliver(*delivery.room, loop, delivery.opcode, *delivery.payload, delivery.is_volatile);
        }
    }
    inline void deliver(SharedRoom& room, std::size_t loop, Opcode opcode, std::string_view payload, bool is_volatile);
    // The counts may have changed several times since the call was posted.
    void refresh_subscription(SharedRoom& room) {
        const bool wanted = room.members() != 0;
        if (bus_ == nullptr || std::exchange(room.subscribed, wanted) == wanted) return;
        if (wanted) bus_->subscribe(room.name);
        else bus_->unsubscribe(room.name);
    }

    const std::size_t max_backlog_;
    mutable std::mutex mutex_;
    StringMap<std::shared_ptr<SharedRoom>> rooms_;
    std::vector<PerLoop> loops_;
    RoomBus* bus_ = nullptr;
    std::atomic<std::uint64_t> dropped_{0};
};

}  // namespace detail

class Room {
    struct Member {
        WebSocketHandler* handler;
        std::size_t slot;  // of this room in the handler's list of rooms
    };

public:
    // Iterates over a copy of the members on this loop and skips those that have left since. The body may therefore
    // close, join and leave.
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
    // The members on all loops of this server. Costs one atomic read for each loop.
    std::size_t size() const { return shared_ ? shared_->members() : members_.size(); }
    bool empty() const { return size() == 0; }
    bool has(const WebSocketHandler& handler) const { return index_of(handler) != npos; }
    Iterator begin() const { return Iterator(*this); }
    std::nullptr_t end() const { return nullptr; }

    // Returns false if the handler is a member already or its connection is not open. A handler leaves automatically
    // when its connection ends.
    bool join(WebSocketHandler& handler) {
        if (!handler.is_open() || has(handler)) return false;
        auto& rooms = detail::HandlerAccess::core(handler).rooms;
        // First all that may run out of memory.
        if (rooms.size() == rooms.capacity()) rooms.reserve(2 * rooms.size() + 4);
        if (members_.size() == members_.capacity()) members_.reserve(2 * members_.size() + 4);
        if (rooms.size() >= few) add_slot(handler);
        members_.push_back({&handler, rooms.size()});
        rooms.push_back({this, members_.size() - 1});
        if (shared_) share_size();
        return true;
    }
    // Returns false if the handler is not a member.
    inline bool leave(WebSocketHandler& handler);

    // Sends to all members except `except`, who is one on this loop. Members on other loops get it when this turn has
    // ended; members on other machines, at most once. What one loop sends to a room arrives in order. Returns the number
    // of members whose WriteStatus is sent or queued, with all members on other loops. Throws Error for text that is not
    // UTF-8; a Message, a Json and an EncodedFrame are not checked again.
    std::size_t broadcast(const Message& message, const WebSocketHandler* except = nullptr);
    std::size_t broadcast(std::string_view payload, const WebSocketHandler* except = nullptr,
                          Opcode opcode = Opcode::text) {
        detail::HandlerAccess::check_payload("broadcast", payload, opcode);
        return broadcast(Message(payload, opcode), except);
    }
    std::size_t broadcast(const EncodedFrame& frame, const WebSocketHandler* except = nullptr);
    std::size_t broadcast_binary(std::string_view bytes, const WebSocketHandler* except = nullptr) {
        return broadcast(Message(bytes, Opcode::binary), except);
    }
    // Json, or any object with .dump(), such as nlohmann::json.
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
    std::size_t broadcast_volatile(const EncodedFrame& frame, const WebSocketHandler* except = nullptr);

    // {"a", "b"} is not a message: as a string_view it would be undefined behavior in C++20. See broadcast_json().
    template <class T, class... Rest>
    std::size_t broadcast(std::initializer_list<T>, Rest...) = delete;
    template <class T, class... Rest>
    std::size_t broadcast_binary(std::initializer_list<T>, Rest...) = delete;
    template <class T, class... Rest>
    std::size_t broadcast_volatile(std::initializer_list<T>, Rest...) = delete;

private:
    friend class Rooms;
    friend class detail::RoomDirectory;

    static constexpr std::size_t npos = static_cast<std::size_t>(-1);
    static constexpr std::size_t few = 16;

    // Searches the shorter list: the members of the room or the rooms of the handler. If both are long, a map.
    std::size_t index_of(const WebSocketHandler& handler) const {
        const detail::HandlerCore& core = detail::HandlerAccess::core(handler);
        const auto index_at = [&](std::size_t slot) {  // on_close() may still see rooms that it has left
            const bool here = slot < core.rooms.size() && core.rooms[slot].room == this;
            const std::size_t index = here ? core.rooms[slot].index : npos;
            return index < members_.size() && members_[index].handler == &handler ? index : npos;
        };
        if (core.positions && members_.size() > few) {
            const std::size_t* slot = core.positions->find(key(*this));
            return slot == nullptr ? npos : index_at(*slot);
        }
        for (std::size_t i = 0; i < (std::min)(core.rooms.size(), members_.size()); ++i) {
            if (members_[i].handler == &handler) return i;
            if (const std::size_t index = index_at(i); index != npos) return index;
        }
        return npos;
    }
    static std::string key(const Room& room) { return big_endian_key(reinterpret_cast<std::uintptr_t>(&room)); }
    // Adds this room, which is not in the list yet, at the end of the list.
    void add_slot(WebSocketHandler& handler) const {
        detail::HandlerCore& core = detail::HandlerAccess::core(handler);
        if (!core.positions) {
            auto positions = std::make_unique<StringMap<std::size_t>>();
            for (std::size_t i = 0; i < core.rooms.size(); ++i) positions->find_or_emplace(key(*core.rooms[i].room), i);
            core.positions = std::move(positions);
        }
        core.positions->find_or_emplace(key(*this)) = core.rooms.size();
    }
    // Moves the last member to this index.
    void remove_at(std::size_t index) {
        members_[index] = members_.back();
        members_.pop_back();
        if (shared_) share_size();
        if (index == members_.size()) return;
        detail::HandlerAccess::core(*members_[index].handler).rooms[members_[index].slot].index = index;
    }

    inline void share_size() const;
    // To the members on this loop.
    std::size_t send_here(const EncodedFrame& frame, const WebSocketHandler* except);
    std::size_t send_volatile_here(const EncodedFrame& frame, const WebSocketHandler* except);
    inline std::size_t publish(Opcode opcode, std::string_view payload, bool is_volatile) const;

    std::string name_;
    Rooms& rooms_;
    std::vector<Member> members_;
    std::shared_ptr<detail::SharedRoom> shared_;  // null on a server with one loop
    Room* next_to_prune_ = nullptr;
    bool prune_pending_ = false;
};

// The rooms of a server, by name. On a server with several loops, each loop has its own Rooms; their names and members
// are those of all loops.
class Rooms {
public:
    explicit Rooms(detail::SendArena& arena) : arena_(arena), root_(this) {}
    // A second set with names of its own. `root` removes its empty rooms and counts them in size().
    explicit Rooms(Rooms* root) : arena_(root->arena_), root_(root) {}
    Rooms(const Rooms&) = delete;
    Rooms& operator=(const Rooms&) = delete;

    // Creates the room on demand. An empty room is removed at the end of the turn.
    Room& operator[](std::string_view name) {
        if (Room* room = rooms_.find(name)) return *room;
        Room& room = rooms_.find_or_emplace(name, std::string(name), *this);
        ++root_->size_;
        prune_later(room);
        if (directory_ != nullptr) room.shared_ = directory_->attach(loop_, room, room.name_);
        return room;
    }
    // Returns null if no room of that name has members. Takes a lock if this loop has none.
    Room* find(std::string_view name) {
        Room* room = rooms_.find(name);
        if (room == nullptr && directory_ != nullptr && directory_->find(name)) room = &(*this)[name];
        return room == nullptr || room->empty() ? nullptr : room;
    }
    std::size_t size() const { return directory_ != nullptr ? directory_->size() : size_; }
    std::vector<std::string> names() const {
        if (directory_ != nullptr) return directory_->names();
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
    friend class detail::RoomDirectory;

    void remove_from_all(WebSocketHandler& handler) {
        for (const auto& membership : detail::HandlerAccess::core(handler).rooms) {
            membership.room->remove_at(membership.index);
            prune_later(*membership.room);
        }
    }
    void prune_later(Room& room) {
        if (!std::exchange(room.prune_pending_, true)) room.next_to_prune_ = std::exchange(root_->prune_list_, &room);
    }
    void prune() {
        while (prune_list_ != nullptr) {
            Room& room = *prune_list_;
            prune_list_ = room.next_to_prune_;
            room.prune_pending_ = false;
            if (!room.members_.empty()) continue;
            if (room.shared_) directory_->detach(loop_, *room.shared_);
            if (room.rooms_.rooms_.erase(room.name())) --size_;
        }
    }

    detail::SendArena& arena_;
    Rooms* root_;
    std::size_t size_ = 0;
    std::uint64_t deliveries_ = 0;
    StringMap<Room> rooms_;
    Room* prune_list_ = nullptr;  // linked through the rooms, because the end of a handler must not allocate
    detail::RoomDirectory* directory_ = nullptr;  // null on a server with one loop
    std::size_t loop_ = 0;                        // its number in the directory
};

namespace detail {

// What only the server calls.
class RoomsAccess {
public:
    // Removes the handler from all rooms when its connection ends. Its own list stays for on_close().
    static void remove_from_all(Rooms& rooms, WebSocketHandler& handler) { rooms.remove_from_all(handler); }
    // Removes empty rooms at the end of a turn.
    static void prune(Rooms& rooms) { rooms.prune(); }
    static SendArena& arena(Rooms& rooms) { return rooms.arena_; }
    // Makes the rooms part of those of several loops. Throws an Error if there is a room already.
    static void share(Rooms& rooms, RoomDirectory* directory, std::size_t loop) {
        if (rooms.size_ != 0) throw Error("rooms exist already; the server cannot share them with other loops now");
        rooms.directory_ = directory;
        rooms.loop_ = loop;
    }
    // How often broadcasts have visited a member, as a measure of work.
    static std::uint64_t deliveries(const Rooms& rooms) { return rooms.deliveries_; }
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
    const auto& positions = detail::HandlerAccess::core(handler).positions;
    if (positions) positions->erase(key(*this));
    if (slot != rooms.size()) {
        rooms[slot].room->members_[rooms[slot].index].slot = slot;
        if (positions) *positions->find(key(*rooms[slot].room)) = slot;
    }
    if (members_.empty()) rooms_.prune_later(*this);
    return true;
}

inline void Room::share_size() const { rooms_.directory_->set_members(rooms_.loop_, shared_, members_.size()); }

inline std::size_t Room::publish(Opcode opcode, std::string_view payload, bool is_volatile) const {
    return rooms_.directory_->publish(rooms_.loop_, shared_, opcode, payload, is_volatile);
}

inline void detail::RoomDirectory::deliver(SharedRoom& room, std::size_t loop, Opcode opcode, std::string_view payload,
                                           bool is_volatile) {
    Room* const here = room.parts[loop].room;
    if (here == nullptr || here->members_.empty()) return;
    const EncodedFrame frame = EncodedFrame::borrowed(loops_[loop].rooms->arena_, opcode, payload);
    if (is_volatile) here->send_volatile_here(frame, nullptr);
    else here->send_here(frame, nullptr);
}

inline std::size_t Room::broadcast(const EncodedFrame& frame, const WebSocketHandler* except) {
    const std::size_t elsewhere = shared_ ? publish(frame.opcode(), frame.payload(), false) : 0;
    return send_here(frame, except) + elsewhere;
}

inline std::size_t Room::send_here(const EncodedFrame& frame, const WebSocketHandler* except) {
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
    rooms_.root_->deliveries_ += members_.size();
    return count;
}

inline std::size_t Room::broadcast(const Message& message, const WebSocketHandler* except) {
    if (members_.empty() && !shared_) return 0;
    return broadcast(EncodedFrame::borrowed(rooms_.arena_, message.opcode(), message.data()), except);
}

inline std::size_t Room::broadcast_volatile(const EncodedFrame& frame, const WebSocketHandler* except) {
    const std::size_t elsewhere = shared_ ? publish(frame.opcode(), frame.payload(), true) : 0;
    return send_volatile_here(frame, except) + elsewhere;
}

inline std::size_t Room::send_volatile_here(const EncodedFrame& frame, const WebSocketHandler* except) {
    std::size_t count = 0;
    for (const Member& member : members_)
        if (member.handler != except && member.handler->write_volatile(frame) == WriteStatus::sent) ++count;
    rooms_.root_->deliveries_ += members_.size();
    return count;
}

inline std::size_t Room::broadcast_volatile(const Message& message, const WebSocketHandler* except) {
    if (members_.empty() && !shared_) return 0;
    return broadcast_volatile(EncodedFrame::borrowed(rooms_.arena_, message.opcode(), message.data()), except);
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
// Addresses, non-blocking sockets, and the poller: one contract over epoll, kqueue and poll. This is the first section
// that includes headers of the OS, and the only one with code per OS. It does not interpret the bytes.
// ====================================================================================================================

#include <cerrno>
#include <cstdlib>
#include <system_error>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#define WSCHAT_UNDEF_NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#define WSCHAT_UNDEF_LEAN_AND_MEAN
#endif
#include <winsock2.h>
// winsock2.h must come before any header that includes windows.h.
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <ws2tcpip.h>
#if defined(_MSC_VER)
#pragma comment(lib, "ws2_32")
#endif
#ifdef WSCHAT_UNDEF_LEAN_AND_MEAN
#undef WIN32_LEAN_AND_MEAN
#undef WSCHAT_UNDEF_LEAN_AND_MEAN
#endif
#ifdef WSCHAT_UNDEF_NOMINMAX
#undef NOMINMAX
#undef WSCHAT_UNDEF_NOMINMAX
#endif
#else
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
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
#if defined(__FreeBSD__) || defined(__DragonFly__) || defined(__NetBSD__)
#include <sys/sysctl.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif
#endif

WSCHAT_BEGIN

namespace detail {

// System calls that differ between the operating systems.
namespace os {

#if defined(_WIN32)

using Descriptor = SOCKET;
using Pollfd = WSAPOLLFD;
constexpr Descriptor no_descriptor = INVALID_SOCKET;

struct Winsock {
    Winsock() {
        WSADATA data;
        WSAStartup(MAKEWORD(2, 2), &data);
    }
};
inline void start_winsock() { static const Winsock winsock; }
// Errors of Winsock, each with its errno.
// clang-format off
constexpr int winsock_errors[][2] = {
    {WSAEACCES, EACCES}, {WSAEADDRINUSE, EADDRINUSE}, {WSAEADDRNOTAVAIL, EADDRNOTAVAIL},
    {WSAEAFNOSUPPORT, EAFNOSUPPORT}, {WSAECONNABORTED, ECONNABORTED}, {WSAECONNREFUSED, ECONNREFUSED},
    {WSAECONNRESET, ECONNRESET}, {WSAEHOSTUNREACH, EHOSTUNREACH}, {WSAEINVAL, EINVAL}, {WSAEMFILE, EMFILE},
    {WSAENETDOWN, ENETDOWN}, {WSAENETRESET, ENETRESET}, {WSAENETUNREACH, ENETUNREACH}, {WSAENOBUFS, ENOBUFS},
    {WSAENOTCONN, ENOTCONN}, {WSAENOTSOCK, ENOTSOCK}, {WSAESHUTDOWN, EPIPE}, {WSAETIMEDOUT, ETIMEDOUT},
    {WSAEWOULDBLOCK, EWOULDBLOCK}};
// clang-format on
// The errno for the last error of Winsock; that error itself if the table does not have it.
inline int last_error() {
    const int error = WSAGetLastError();
    for (const auto& row : winsock_errors)
        if (row[0] == error) return row[1];
    return error;
}
// File names are UTF-8. A text that is not UTF-8 becomes an empty text, which names no file.
inline std::wstring to_wide(std::string_view text) {
    const int size = static_cast<int>((std::min)(text.size(), std::size_t{1} << 20));
    const int wide_size = ::MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.data(), size, nullptr, 0);
    std::wstring wide(static_cast<std::size_t>(wide_size), L'\0');
    ::MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.data(), size, wide.data(), wide_size);
    return wide;
}
inline std::string from_wide(std::wstring_view wide) {
    const int size = static_cast<int>(wide.size());
    const int bytes = ::WideCharToMultiByte(CP_UTF8, 0, wide.data(), size, nullptr, 0, nullptr, nullptr);
    std::string text(static_cast<std::size_t>(bytes), '\0');
    ::WideCharToMultiByte(CP_UTF8, 0, wide.data(), size, text.data(), bytes, nullptr, nullptr);
    return text;
}
// The sentence for an errno or for an error of Winsock.
inline std::string error_message(int error) {
    constexpr int first_of_sockets = 100;  // the C library of Windows has no texts for an errno from here on
    if (error < first_of_sockets) return std::generic_category().message(error);
    for (const auto& row : winsock_errors)
        if (row[1] == error) error = row[0];
    wchar_t text[512];
    DWORD size = ::FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS, nullptr,
                                  static_cast<DWORD>(error), 0, text, 512, nullptr);
    while (size != 0 && (text[size - 1] <= L' ' || text[size - 1] == L'.')) --size;
    return size != 0 ? from_wide({text, size}) : "Winsock error";
}
inline const char* resolver_error_text(int status) { return ::gai_strerrorA(status); }
// The number of a zone of link-local IPv6 addresses. Names of interfaces need another library (iphlpapi). 0: none.
inline std::uint32_t zone_index(const std::string& zone) {
    return static_cast<std::uint32_t>(text::parse_unsigned(zone, UINT32_MAX).value_or(0));
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
// A child process must not hold connections open, so no socket is inheritable.
inline Descriptor open_socket(int family, int type = SOCK_STREAM) {
    start_winsock();
    constexpr DWORD no_inherit = 0x80;  // WSA_FLAG_NO_HANDLE_INHERIT, which older headers do not have
    const Descriptor descriptor = ::WSASocketW(family, type, 0, nullptr, 0, WSA_FLAG_OVERLAPPED | no_inherit);
    if (descriptor != no_descriptor) make_nonblocking(descriptor);
    return descriptor;
}
inline Descriptor accept(Descriptor listener, sockaddr* address, socklen_t* size) {
    const Descriptor descriptor = ::accept(listener, address, size);
    if (descriptor == no_descriptor) return descriptor;
    make_nonblocking(descriptor);
    ::SetHandleInformation(reinterpret_cast<HANDLE>(descriptor), HANDLE_FLAG_INHERIT, 0);
    return descriptor;
}
inline int poll(Pollfd* entries, std::size_t count, int timeout_ms) {
    if (count == 0) return ::Sleep(timeout_ms < 0 ? INFINITE : static_cast<DWORD>(timeout_ms)), 0;
    return ::WSAPoll(entries, static_cast<ULONG>(count), timeout_ms);
}
inline std::ptrdiff_t receive(Descriptor descriptor, char* data, std::size_t size) {
    return ::recv(descriptor, data, static_cast<int>((std::min)(size, std::size_t{1} << 30)), 0);
}
inline std::ptrdiff_t peek(Descriptor descriptor, char* data, std::size_t size) {
    return ::recv(descriptor, data, static_cast<int>((std::min)(size, std::size_t{1} << 30)), MSG_PEEK);
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

struct FileStatus {
    std::int64_t st_size;
    std::int64_t modified_ns;
    bool directory;
};
inline bool handle_status(HANDLE file, FileStatus& status) {
    BY_HANDLE_FILE_INFORMATION found;
    if (::GetFileInformationByHandle(file, &found) == 0) return errno = EIO, false;
    const auto join = [](DWORD high, DWORD low) { return std::int64_t{high} << 32 | std::int64_t{low}; };
    constexpr std::int64_t ticks_to_1970 = 116'444'736'000'000'000;  // of 100 ns, since 1601
    status.st_size = join(found.nFileSizeHigh, found.nFileSizeLow);
    status.modified_ns =
        (join(found.ftLastWriteTime.dwHighDateTime, found.ftLastWriteTime.dwLowDateTime) - ticks_to_1970) * 100;
    status.directory = (found.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
    return true;
}
inline HANDLE open_handle(const std::wstring& path) {
    constexpr DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    // FILE_FLAG_BACKUP_SEMANTICS: opens folders too. Without security attributes, a child process inherits nothing.
    const HANDLE file = path.empty() ? INVALID_HANDLE_VALUE
                                     : ::CreateFileW(path.c_str(), GENERIC_READ, share, nullptr, OPEN_EXISTING,
                                                     FILE_FLAG_BACKUP_SEMANTICS, nullptr);
    if (file != INVALID_HANDLE_VALUE) return file;
    const DWORD error = path.empty() ? ERROR_FILE_NOT_FOUND : ::GetLastError();
    errno = error == ERROR_ACCESS_DENIED || error == ERROR_SHARING_VIOLATION ? EACCES
            : error == ERROR_TOO_MANY_OPEN_FILES                             ? EMFILE
                                                                             : ENOENT;
    return file;
}
// The descriptor of a regular file, which owns the handle, or -1. Folders are EISDIR, devices and pipes ENOENT.
inline int file_of_handle(HANDLE handle) {
    if (handle == INVALID_HANDLE_VALUE) return -1;
    FileStatus status{};
    int file = -1;
    if (::GetFileType(handle) != FILE_TYPE_DISK) errno = ENOENT;
    else if (handle_status(handle, status) && status.directory) errno = EISDIR;
    else file = ::_open_osfhandle(reinterpret_cast<std::intptr_t>(handle), _O_RDONLY | _O_BINARY);
    const int error = errno;
    if (file < 0) ::CloseHandle(handle);
    errno = error;
    return file;
}
inline int open_file(const char* path) {
    std::wstring wide = to_wide(path);
    const auto is_separator = [](wchar_t c) { return c == L'/' || c == L'\\'; };
    while (wide.size() > 1 && is_separator(wide.back()) && wide[wide.size() - 2] != L':') wide.pop_back();
    return file_of_handle(open_handle(wide));
}
inline std::ptrdiff_t read_file(int file, char* data, std::size_t size) {
    return ::_read(file, data, static_cast<unsigned>((std::min)(size, std::size_t{1} << 30)));
}
inline bool seek_file(int file, std::uint64_t offset) {
    return ::_lseeki64(file, static_cast<std::int64_t>(offset), SEEK_SET) >= 0;
}
inline void close_file(int file) { ::_close(file); }
inline bool file_status(int file, FileStatus& status) {
    return handle_status(reinterpret_cast<HANDLE>(::_get_osfhandle(file)), status);
}
inline bool is_file(const FileStatus& status) { return !status.directory; }
inline bool is_directory(const FileStatus& status) { return status.directory; }
inline std::int64_t modified_ns(const FileStatus& status) { return status.modified_ns; }
// The path without links, junctions and short names: "\\?\C:\www\page.html".
inline std::wstring final_path(HANDLE file) {
    std::wstring path(32768, L'\0');
    path.resize(::GetFinalPathNameByHandleW(file, path.data(), 32767, FILE_NAME_NORMALIZED));
    return path;
}
// Opens the file, and then asks the system for its path: what a link, a junction or a short name leads to has another
// path. `follow`: links are followed if what they lead to is below the root. Windows does not look for devices in a
// path that begins as the final one does.
inline int open_file_beneath(const std::string& root, const std::vector<std::string>& names, bool follow) {
    const HANDLE folder = open_handle(to_wide(root));
    if (folder == INVALID_HANDLE_VALUE) return -1;
    const std::wstring prefix = final_path(folder);
    ::CloseHandle(folder);
    std::wstring path = prefix;
    for (const std::string& name : names) {
        if (!path.empty() && path.back() != L'\\') path += L'\\';
        path += to_wide(name);
    }
    const HANDLE handle = prefix.empty() ? INVALID_HANDLE_VALUE : open_handle(path);
    if (handle == INVALID_HANDLE_VALUE) return -1;
    const std::wstring found = final_path(handle);
    const auto same = [](std::wstring_view a, std::wstring_view b) {
        return ::CompareStringOrdinal(a.data(), static_cast<int>(a.size()), b.data(), static_cast<int>(b.size()),
                                      TRUE) == CSTR_EQUAL;
    };
    const bool below = found.size() > prefix.size() &&
                       same(std::wstring_view(found).substr(0, prefix.size()), prefix) &&
                       (prefix.back() == L'\\' || found[prefix.size()] == L'\\');
    if (same(found, path) || (follow && below)) return file_of_handle(handle);
    ::CloseHandle(handle);
    errno = ENOENT;
    return -1;
}
inline std::string absolute_path(const std::string& path) {
    const std::wstring wide = to_wide(path);
    std::wstring resolved(32768, L'\0');
    resolved.resize(::GetFullPathNameW(wide.c_str(), 32767, resolved.data(), nullptr));
    return resolved.empty() || resolved.size() > 32766 ? path : from_wide(resolved);
}
// The value of an environment variable, or nothing.
inline std::optional<std::string> environment(const char* name) {
    std::wstring value(32768, L'\0');
    ::SetLastError(ERROR_SUCCESS);
    value.resize(::GetEnvironmentVariableW(to_wide(name).c_str(), value.data(), 32767));
    if (value.empty() && ::GetLastError() != ERROR_SUCCESS) return std::nullopt;
    return from_wide(value);
}
inline std::string executable_path() {
    std::wstring path(32768, L'\0');
    path.resize(::GetModuleFileNameW(nullptr, path.data(), 32767));
    return from_wide(path);
}

#else

using Descriptor = int;
using Pollfd = pollfd;
constexpr Descriptor no_descriptor = -1;

inline int last_error() { return errno; }
inline std::string error_message(int error) { return std::generic_category().message(error); }
inline const char* resolver_error_text(int status) { return ::gai_strerror(status); }
// The number of a zone of link-local IPv6 addresses: that of an interface ("eth0"). 0: there is no such interface.
inline std::uint32_t zone_index(const std::string& zone) {
    const auto number = text::parse_unsigned(zone, UINT32_MAX);
    return number ? static_cast<std::uint32_t>(*number) : ::if_nametoindex(zone.c_str());
}
inline bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK; }
inline bool interrupted(int error) { return error == EINTR; }
inline bool out_of_descriptors(int error) { return error == EMFILE || error == ENFILE; }
inline void close(Descriptor descriptor) { ::close(descriptor); }
inline void yield() { ::sched_yield(); }
inline bool make_nonblocking(Descriptor descriptor) {
    return ::fcntl(descriptor, F_SETFL, O_NONBLOCK) == 0 && ::fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0;
}
// All descriptors are close-on-exec: a child process must not hold connections open.
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
inline std::ptrdiff_t peek(Descriptor descriptor, char* data, std::size_t size) {
    return ::recv(descriptor, data, size, MSG_PEEK);
}
// MSG_NOSIGNAL suppresses SIGPIPE. Systems without that flag have SO_NOSIGPIPE, which accept() sets.
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
// O_NONBLOCK: opening a pipe or a device must not block.
constexpr int open_file_flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
inline int open_file(const char* path) { return ::open(path, open_file_flags); }
inline std::ptrdiff_t read_file(int file, char* data, std::size_t size) { return ::read(file, data, size); }
inline bool seek_file(int file, std::uint64_t offset) {
    return ::lseek(file, static_cast<off_t>(offset), SEEK_SET) >= 0;
}
inline void close_file(int file) { ::close(file); }
inline bool file_status(int file, FileStatus& status) { return ::fstat(file, &status) == 0; }
inline bool is_file(const FileStatus& status) { return S_ISREG(status.st_mode); }
inline bool is_directory(const FileStatus& status) { return S_ISDIR(status.st_mode); }
inline std::int64_t modified_ns(const FileStatus& status) {
#if defined(__APPLE__)
    const timespec modified = status.st_mtimespec;
#else
    const timespec modified = status.st_mtim;
#endif
    return std::int64_t{modified.tv_sec} * 1'000'000'000 + modified.tv_nsec;
}
// Opens one path component at a time and follows no symbolic link. A path therefore cannot leave the root.
inline int open_file_beneath(const std::string& root, const std::vector<std::string>& names) {
    constexpr int directory_flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
    int parent = ::open(root.c_str(), directory_flags);
    for (std::size_t i = 0; parent >= 0 && i < names.size(); ++i) {
        const bool last = i + 1 == names.size();
        const int next = ::openat(parent, names[i].c_str(), O_NOFOLLOW | (last ? open_file_flags : directory_flags));
        const int error = errno;
        ::close(parent);
        errno = error;
        parent = next;
    }
    return parent;
}
inline std::string absolute_path(const std::string& path) {
    const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(path.c_str(), nullptr), &std::free);
    return resolved ? resolved.get() : path;
}
inline std::optional<std::string> environment(const char* name) {
    const char* value = std::getenv(name);
    if (value == nullptr) return std::nullopt;
    return value;
}
inline std::string executable_path() {
#if defined(__APPLE__)
    char path[4096];
    std::uint32_t size = sizeof path;
    return ::_NSGetExecutablePath(path, &size) == 0 ? absolute_path(path) : std::string();
#elif defined(__FreeBSD__) || defined(__DragonFly__) || defined(__NetBSD__)
#if defined(__NetBSD__)
    const int name[] = {CTL_KERN, KERN_PROC_ARGS, -1, KERN_PROC_PATHNAME};
#else
    const int name[] = {CTL_KERN, KERN_PROC, KERN_PROC_PATHNAME, -1};
#endif
    char path[4096];
    std::size_t size = sizeof path;
    return ::sysctl(name, 4, path, &size, nullptr, 0) == 0 ? absolute_path(path) : std::string();
#else
    const std::string link = "/proc/self/exe";
    const std::string path = absolute_path(link);
    return path == link ? std::string() : path;
#endif
}

#endif

// Returns null for an error that is not in the table.
inline const char* error_name(int error) {
    static constexpr struct {
        int error;
        const char* name;
    } table[] = {
        // clang-format off
        {EACCES, "EACCES"}, {EADDRINUSE, "EADDRINUSE"}, {EADDRNOTAVAIL, "EADDRNOTAVAIL"},
        {EAFNOSUPPORT, "EAFNOSUPPORT"}, {ECONNABORTED, "ECONNABORTED"}, {ECONNRESET, "ECONNRESET"},
        {EINVAL, "EINVAL"}, {EISDIR, "EISDIR"}, {EMFILE, "EMFILE"}, {ENFILE, "ENFILE"}, {ENOBUFS, "ENOBUFS"},
        {ENOENT, "ENOENT"}, {ENOMEM, "ENOMEM"}, {ENOTDIR, "ENOTDIR"}, {EPERM, "EPERM"}, {EPIPE, "EPIPE"},
        {ETIMEDOUT, "ETIMEDOUT"},
        // clang-format on
    };
    for (const auto& row : table)
        if (row.error == error) return row.name;
    return nullptr;
}

// "Address already in use (EADDRINUSE)"
inline std::string error_text(int error) {
    const char* name = error_name(error);
    return error_message(error) + " (" + (name != nullptr ? name : std::to_string(error)) + ")";
}

}  // namespace os

}  // namespace detail

// The address of a peer: IPv4, IPv6, or a Unix socket (which has no address). An IPv4-mapped IPv6 address
// (RFC 4291 2.5.5.2) becomes the IPv4 address.
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
    // Parses the numeric forms only.
    static std::optional<IpAddress> parse(std::string_view text) {
        if (text.find('\0') != std::string_view::npos) return std::nullopt;  // inet_pton() would ignore the rest
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
        if (family_ == Family::ipv4)  // inet_ntop() would print it with sprintf()
            return text::concat({std::to_string(bytes_[0]), ".", std::to_string(bytes_[1]), ".",
                                 std::to_string(bytes_[2]), ".", std::to_string(bytes_[3])});
        char text[64] = "";
        ::inet_ntop(AF_INET6, bytes_.data(), text, sizeof text);
        return text;
    }
    // The first `bits` bits; the others are zero.
    IpAddress prefix(unsigned bits) const {
        IpAddress result = *this;
        for (unsigned i = 0; i < 16; ++i) {
            const unsigned bits_in_byte = bits > i * 8 ? (std::min)(bits - i * 8, 8u) : 0;
            result.bytes_[i] = static_cast<unsigned char>(result.bytes_[i] & (0xFF00u >> bits_in_byte));
        }
        return result;
    }
    // The key for limits per client. All addresses of an IPv6 /64 share one key, because one customer has them all.
    std::string rate_limit_key() const { return (family_ == Family::ipv6 ? prefix(64) : *this).to_string(); }
    // The size of the address: 32, 128, or 0 for a Unix socket.
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

// Options of one listener.
struct ListenOptions {
    // The permissions of a Unix socket, as 0660: a proxy often runs as another user. Empty: those of the umask.
    std::optional<unsigned> unix_mode;
    // Each connection begins with a PROXY header (version 1 or 2), which has the client's address. It is believed only
    // from Server::trusted_proxies(); a connection of any other peer, and one without a valid header, is closed.
    bool proxy_protocol = false;
};

namespace detail {

// A CIDR block ("10.0.0.0/8"), a single address, or "unix" for all Unix sockets.
class Cidr {
public:
    // Throws Error if the text is not a CIDR block.
    explicit Cidr(std::string_view text) {
        if (text == "unix") return;
        std::string_view rest = text;
        const auto address = IpAddress::parse(text::consume_until(rest, '/'));
        const bool single = text.find('/') == std::string_view::npos;
        const auto bits = text::parse_unsigned(rest, address ? address->bits() : 0);
        if (!address || (!single && !bits))
            throw Error("\"" + std::string(text) + "\" is neither an address nor a CIDR block");
        bits_ = single ? address->bits() : static_cast<unsigned>(*bits);
        base_ = address->prefix(bits_);
    }
    WSCHAT_NOINLINE bool contains(const IpAddress& address) const {
        return address.family() == base_.family() && address.prefix(bits_) == base_;
    }

private:
    IpAddress base_;
    unsigned bits_ = 0;
};

// The result of a call on a socket.
struct IoResult {
    enum class Outcome : std::uint8_t { done, would_block, end, error };

    Outcome outcome;
    std::size_t size = 0;
    int error = 0;
};

// Closes its descriptor in the destructor.
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

// A non-blocking stream socket.
class Socket : public OwnedDescriptor {
public:
    using OwnedDescriptor::OwnedDescriptor;

    IoResult receive(char* data, std::size_t size) {
        return result([&] { return os::receive(descriptor(), data, size); });
    }

    // As receive(), but the bytes can be received again.
    IoResult peek(char* data, std::size_t size) {
        return result([&] { return os::peek(descriptor(), data, size); });
    }

    // Sends up to max_pieces pieces, in order, with one system call.
    static constexpr std::size_t max_pieces = 64;
    IoResult send(const std::string_view* pieces, std::size_t count) {
        IoResult sent = result([&] { return os::send(descriptor(), pieces, count); });
        if (sent.outcome == IoResult::Outcome::end) sent.outcome = IoResult::Outcome::would_block;
        return sent;
    }
    // The peer reads the end of the stream. Receiving stays possible.
    void shutdown_send() { os::shutdown_send(descriptor()); }
    void set_nodelay(bool on) { set_option(IPPROTO_TCP, TCP_NODELAY, on ? 1 : 0); }
    // How many bytes the kernel holds that it has not sent yet.
    void set_send_buffer(std::size_t size) {
        const int value = static_cast<int>((std::min)(size, std::size_t{INT32_MAX}));
#if defined(TCP_NOTSENT_LOWAT)
        if (set_option(IPPROTO_TCP, TCP_NOTSENT_LOWAT, value)) return;
#endif
        set_option(SOL_SOCKET, SO_SNDBUF, value);
    }
    bool set_option(int level, int name, int value) {
        return ::setsockopt(descriptor(), level, name, reinterpret_cast<const char*>(&value), sizeof value) == 0;
    }

    // ENOBUFS and ENOMEM count as would_block: the kernel has no memory now, and the socket itself works.
    static IoResult failure(int error) {
        const bool temporary = os::would_block(error) || error == ENOBUFS || error == ENOMEM;
        return {temporary ? IoResult::Outcome::would_block : IoResult::Outcome::error, 0, error};
    }

private:
    template <class Call>
    static IoResult result(Call&& call) {
        for (;;) {
            const std::ptrdiff_t n = call();
            if (n > 0) return {IoResult::Outcome::done, static_cast<std::size_t>(n)};
            if (n == 0) return {IoResult::Outcome::end};
            const int error = os::last_error();
            if (!os::interrupted(error)) return failure(error);
        }
    }
};

// Sends to many sockets with one system call (io_uring), which saves 10 to 20% of the CPU time of a broadcast.
// Optional: the caller uses Socket::send() if there is no batch, and for each item that the batch did not try.
class SendBatch {
public:
    struct Item {
        Socket* socket;
        std::string_view bytes;
        void* owner;
        std::optional<IoResult> sent;  // the result that Socket::send() would return; empty: not tried
    };
    static constexpr std::size_t max_items = 256;
    static constexpr std::size_t min_items = 16;  // for fewer items, single calls are faster

    // Returns null without WSCHAT_LIBURING, and if the kernel does not provide a ring.
    static inline std::unique_ptr<SendBatch> make();
    virtual ~SendBatch() = default;

    void add(Socket& socket, std::string_view bytes, void* owner) { items_[size_++] = {&socket, bytes, owner, {}}; }
    bool full() const { return size_ == max_items; }
    // Sends the items and calls visit(item) for each; does neither if there are fewer than min_items. Then the batch is
    // empty.
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

#if WSCHAT_LIBURING && defined(__linux__)

// MSG_DONTWAIT: each send completes within the call that submits it.
class UringSendBatch final : public SendBatch {
public:
    UringSendBatch() : usable_(::io_uring_queue_init(max_items, &ring_, 0) == 0) {}
    UringSendBatch(const UringSendBatch&) = delete;
    UringSendBatch& operator=(const UringSendBatch&) = delete;
    ~UringSendBatch() override { close_ring(); }
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
        std::size_t completed = 0;
        while (completed != submitted && complete_one()) ++completed;
        // Items without a result fail: it is unknown whether they were sent, and a second send would repeat the bytes.
        for (std::size_t i = 0; i < submitted && completed != submitted; ++i)
            if (!items[i].sent) items[i].sent = Socket::failure(EIO);
        // Close a ring that still has entries: it would send them later, after Socket::send() has sent them.
        if (completed != count) close_ring();
    }
    // Stores the result of one send in its item. Returns false if the ring fails.
    bool complete_one() {
        io_uring_cqe* result = nullptr;
        int status = 0;
        do status = ::io_uring_wait_cqe(&ring_, &result);
        while (status == -EINTR);
        if (status < 0) return false;
        auto& item = *static_cast<Item*>(::io_uring_cqe_get_data(result));
        if (result->res > 0) item.sent = {IoResult::Outcome::done, static_cast<std::size_t>(result->res)};
        else item.sent = Socket::failure(-result->res);
        ::io_uring_cqe_seen(&ring_, result);
        return true;
    }
    void close_ring() {
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

// Bytes that went through sockets.
struct WireCount {
    std::uint64_t received = 0;
    std::uint64_t sent = 0;
};

// The encryption between a connection and its socket. A plain connection has no transport. Each call adds the bytes
// that went through the socket to `wire`.
class Transport {
public:
    virtual ~Transport() = default;
    // As Socket::receive(). If the encryption fails, the error number is 0 and failure() has the cause.
    virtual IoResult receive(Socket& socket, char* data, std::size_t size, WireCount& wire) = 0;
    // As Socket::send(). A byte counts as sent when the kernel has accepted all of its ciphertext. The caller repeats
    // the bytes that were not counted, unchanged, at the start of its next call. With count 0, sends only the pending
    // ciphertext.
    virtual IoResult send(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) = 0;
    // True if receive() may return bytes although the poller reports nothing.
    virtual bool has_input() const = 0;
    // True if ciphertext waits until the socket is writable.
    virtual bool wants_write() const = 0;
    // Bytes that wait in here, in both directions, except the ciphertext of what the caller repeats in send().
    virtual std::size_t buffered() const { return 0; }
    // Call it after each receive(). False: the peer has sent more messages without data (key updates) than the rate
    // allows; the encryption has failed.
    virtual bool check_rate(Socket&, const Rate&, Time, WireCount&) { return true; }
    // True if the handshake is done.
    virtual bool established() const = 0;
    // Sends the end of the stream to the peer (close_notify). False: call it again when the socket is writable.
    virtual bool end(Socket& socket, WireCount& wire) = 0;
    // The cause of a failure, or empty.
    virtual const std::string& failure() const = 0;
    // True if it failed because the peer sent plain text.
    virtual bool plain_text() const = 0;
    // The subject of the peer's certificate, or empty.
    virtual std::string peer_name() const = 0;
    // False if it replaces the socket of a plain connection, for tests.
    virtual bool encrypts() const { return true; }
};

// Makes the transport of each connection of a listener.
class TransportFactory {
public:
    virtual ~TransportFactory() = default;
    virtual std::unique_ptr<Transport> make() = 0;
    // Reads the files again, for new connections. Throws Error and changes nothing if a file cannot be used.
    virtual void reload() = 0;
};

// An address to listen on: "8888" and "127.0.0.1:8888" (this machine only), "0.0.0.0:80", "[::1]:80", "*:80" (all
// addresses, IPv4 and IPv6), "unix:/run/chat.sock", "fd:3" (a listening socket that the process has inherited).
struct ListenAddress {
    std::string host = "127.0.0.1";
    int port = 0;  // 0: the system picks one
    std::string unix_path;
    int inherited = -1;  // a descriptor

    // Throws Error if the text has none of these forms.
    WSCHAT_COLD static ListenAddress parse(std::string_view text) {
        ListenAddress address;
        const std::size_t colon = text.rfind(':');
        if (text::starts_with(text, "unix:")) {
            address.unix_path = text.substr(5);
            if (address.unix_path.empty()) throw Error("listen " + std::string(text) + ": the path is missing");
            return address;
        }
        if (text::starts_with(text, "fd:")) {
            const auto descriptor = text::parse_unsigned(text.substr(3), INT32_MAX);
            if (!descriptor) throw Error("listen " + escape_for_log(text) + ": not a descriptor, as fd:3 is");
            address.inherited = static_cast<int>(*descriptor);
            return address;
        }
        std::string_view host = colon == std::string_view::npos ? std::string_view("127.0.0.1") : text.substr(0, colon);
        const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
        if (brackets) host = host.substr(1, host.size() - 2);
        const auto port = text::parse_unsigned(colon == std::string_view::npos ? text : text.substr(colon + 1), 65535);
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
        if (inherited != -1 && port == 0) return "fd:" + std::to_string(inherited);
        const bool ipv6 = host.find(':') != std::string::npos;
        return (ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
    }
};

// A listening socket. The constructor throws Error with the address and the cause if the system refuses.
class ListenSocket {
public:
    ListenSocket(const ListenAddress& address, bool reuse_port, const ListenOptions& options = {}) : address_(address) {
        const bool makes_path = address.inherited == -1 && !address.unix_path.empty();
        if (options.unix_mode && (!makes_path || *options.unix_mode > 07777))
            throw Error("listen " + address.to_string() + ": " +
                        (makes_path ? "ListenOptions::unix_mode is not a mode, as 0660 is"
                                    : "only a Unix socket that listen() makes can have ListenOptions::unix_mode"));
        if (address.inherited != -1) adopt();
        else if (makes_path) listen_unix(options.unix_mode);
        else listen_tcp(reuse_port);
    }
    ListenSocket(const ListenSocket&) = delete;
    ListenSocket& operator=(const ListenSocket&) = delete;
    ~ListenSocket() {
#if !defined(_WIN32)
        if (socket_ && address_.inherited == -1 && !address_.unix_path.empty()) ::unlink(address_.unix_path.c_str());
#endif
    }

    // For port 0, it has the port that the system picked. For an inherited socket, it has the address of that socket.
    const ListenAddress& address() const { return address_; }
    os::Descriptor descriptor() const { return socket_.descriptor(); }

    // Accepts one connection. Returns an empty socket and sets `error` if there is none.
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
        os::start_winsock();
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
            throw Error("listen " + address_.to_string() + ": the host is unknown: " + os::resolver_error_text(status));
        const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(found, [](addrinfo* list) { ::freeaddrinfo(list); });
        socket_ = Socket(os::open_socket(found->ai_family));
        if (!socket_ && any) {
            // This machine has no IPv6.
            address_.host = "0.0.0.0";
            return listen_tcp(reuse_port);
        }
        if (!socket_) fail(os::last_error(), "socket");
        if (found->ai_family == AF_INET6) socket_.set_option(IPPROTO_IPV6, IPV6_V6ONLY, any ? 0 : 1);
#if !defined(_WIN32)
        // On Windows, SO_REUSEADDR would let two processes share a port.
        socket_.set_option(SOL_SOCKET, SO_REUSEADDR, 1);
#endif
#if defined(SO_REUSEPORT_LB)
        constexpr int share_port = SO_REUSEPORT_LB;  // FreeBSD; its SO_REUSEPORT does not distribute connections
#elif defined(SO_REUSEPORT)
        constexpr int share_port = SO_REUSEPORT;
#endif
#if defined(SO_REUSEPORT)
        if (reuse_port && !socket_.set_option(SOL_SOCKET, share_port, 1))
            fail(os::last_error(), "setsockopt SO_REUSEPORT");
#else
        if (reuse_port) throw Error("listen " + address_.to_string() + ": this system has no SO_REUSEPORT");
#endif
        socket_.set_nodelay(true);  // Linux lets accepted sockets inherit it
        bind_and_listen(found->ai_addr, static_cast<socklen_t>(found->ai_addrlen));
        read_port();
    }

    void read_port() {
        sockaddr_storage bound{};
        socklen_t size = sizeof bound;
        if (::getsockname(socket_.descriptor(), reinterpret_cast<sockaddr*>(&bound), &size) != 0)
            close_and_fail("getsockname");
        sockaddr_in in;
        std::memcpy(&in, &bound, sizeof in);  // the port has the same offset in both families
        address_.port = ntohs(in.sin_port);
    }

    void bind_and_listen(const sockaddr* address, socklen_t size) {
        if (::bind(socket_.descriptor(), address, size) != 0) close_and_fail("bind");
        if (::listen(socket_.descriptor(), SOMAXCONN) != 0) close_and_fail("listen");
    }
    [[noreturn]] void close_and_fail(const char* call) {
        const int error = os::last_error();
        socket_.close();
        fail(error, call);
    }

    // Takes over a listening socket that another process has opened. It stays open if it cannot be used.
    WSCHAT_COLD void adopt() {
#if defined(_WIN32)
        throw Error("listen " + address_.to_string() + ": inherited sockets are not supported on Windows");
#else
        const int descriptor = address_.inherited;
        int type = 0, listens = 0;
        socklen_t size = sizeof type;
        sockaddr_storage bound{};
        socklen_t bound_size = sizeof bound;
        if (::getsockname(descriptor, reinterpret_cast<sockaddr*>(&bound), &bound_size) != 0)
            throw Error("listen " + address_.to_string() + ": " +
                        (errno == EBADF      ? "the process has no such descriptor"
                         : errno == ENOTSOCK ? "the descriptor is not a socket"
                                             : os::error_text(errno)));
        const bool known = ::getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &type, &size) == 0 &&
                           ::getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0;
        const bool family_known =
            bound.ss_family == AF_INET || bound.ss_family == AF_INET6 || bound.ss_family == AF_UNIX;
        if (!known || type != SOCK_STREAM || listens == 0 || !family_known)
            throw Error("listen " + address_.to_string() +
                        ": the descriptor is not a listening stream socket of TCP or Unix");
        if (!os::make_nonblocking(descriptor)) fail(errno, "fcntl");
        socket_ = Socket(descriptor);
        if (bound.ss_family == AF_UNIX) {
            sockaddr_un name{};
            std::memcpy(&name, &bound, (std::min)(sizeof name, static_cast<std::size_t>(bound_size)));
            address_.unix_path.assign(name.sun_path, ::strnlen(name.sun_path, sizeof name.sun_path));
            return;
        }
        socket_.set_nodelay(true);
        address_.host = IpAddress(bound).to_string();
        read_port();
#endif
    }

    WSCHAT_COLD void listen_unix(std::optional<unsigned> mode) {
#if defined(_WIN32)
        static_cast<void>(mode);
        throw Error("listen " + address_.to_string() + ": Unix sockets are not supported on Windows");
#else
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        if (address_.unix_path.size() >= sizeof name.sun_path)
            throw Error("listen " + address_.to_string() + ": the path is longer than " +
                        std::to_string(sizeof name.sun_path - 1) + " bytes");
        std::memcpy(name.sun_path, address_.unix_path.data(), address_.unix_path.size());
        unlink_stale_socket(name);
        socket_ = Socket(os::open_socket(AF_UNIX));
        if (!socket_) fail(os::last_error(), "socket");
        if (::bind(socket_.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0)
            close_and_fail("bind");
        // Before listen(), so that no one can connect with other permissions.
        const bool permitted = !mode || ::chmod(name.sun_path, static_cast<mode_t>(*mode)) == 0;
        if (permitted && ::listen(socket_.descriptor(), SOMAXCONN) == 0) return;
        const int error = os::last_error();
        ::unlink(name.sun_path);
        socket_.close();
        fail(error, permitted ? "listen" : "chmod");
#endif
    }
#if !defined(_WIN32)
    // Unlinks the socket of a dead process: bind() would fail while the path exists.
    static void unlink_stale_socket(const sockaddr_un& name) {
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

// ---- PROXY protocol ------------------------------------------------------------------------------------------------

// Parses the header that a proxy sends before the bytes of a client, version 1 (a line) or 2 (binary):
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt
class ProxyHeader {
public:
    enum class Outcome : std::uint8_t { need_more, done, failure };

    // Consumes at most the bytes of the header.
    Outcome feed(std::string_view bytes, std::size_t& consumed) {
        consumed = 0;
        while (failure_ == nullptr) {
            if (complete_) return Outcome::done;
            if (consumed == bytes.size()) return Outcome::need_more;
            const std::size_t wanted = (std::min)(missing(bytes.substr(consumed)), bytes.size() - consumed);
            header_.append(bytes.substr(consumed, wanted));
            consumed += wanted;
            check_header();
        }
        return Outcome::failure;
    }
    bool started() const { return !header_.empty(); }
    // The client's address. Empty if the header has none: the proxy's own check of the server (LOCAL), UNKNOWN, and
    // families other than TCP over IPv4 and IPv6.
    const std::optional<IpAddress>& client() const { return client_; }
    // After a failure: the cause.
    const char* failure() const { return failure_; }

private:
    static constexpr std::string_view signature{"\r\n\r\n\0\r\nQUIT\n", 12};
    static constexpr std::size_t fixed_size = 16;       // of version 2, before the addresses
    static constexpr std::size_t max_line = 107;        // of version 1, with CR LF
    static constexpr std::size_t max_size = 16 + 4096;  // of version 2; its additional fields are ignored

    bool binary() const { return header_.front() == signature.front(); }
    unsigned byte(std::size_t at) const { return static_cast<unsigned char>(header_[at]); }
    std::size_t announced_size() const { return fixed_size + byte(14) * 256 + byte(15); }

    // How many of the next bytes surely belong to the header; at least one.
    std::size_t missing(std::string_view next) const {
        if (header_.empty()) return 1;
        if (binary()) return (header_.size() < fixed_size ? fixed_size : announced_size()) - header_.size();
        const std::size_t end = next.find('\n');
        return (std::min)(end == std::string_view::npos ? next.size() : end + 1, max_line - header_.size());
    }

    void check_header() {
        if (binary()) check_binary();
        else check_line();
    }

    void check_line() {
        constexpr std::string_view begin = "PROXY ";
        const std::string_view line = header_;
        if (line.substr(0, begin.size()) != begin.substr(0, line.size())) failure_ = "there is no PROXY header";
        else if (line.back() == '\n') parse_line(line.substr(begin.size()));
        else if (line.size() == max_line) failure_ = "the line is longer than 107 bytes";
    }
    void parse_line(std::string_view rest) {
        failure_ = "the line is malformed";
        if (rest.size() < 2 || rest[rest.size() - 2] != '\r') return;
        rest.remove_suffix(2);
        const std::string_view protocol = text::consume_until(rest, ' ');
        if (protocol == "UNKNOWN") return complete(std::nullopt);  // "the receiver must ignore anything presented"
        const std::string_view source = text::consume_until(rest, ' '), destination = text::consume_until(rest, ' '),
                               source_port = text::consume_until(rest, ' '), destination_port = rest;
        const bool v6 = protocol == "TCP6";
        const auto valid_address = [&](std::string_view address) {
            return IpAddress::parse(address) && (address.find(':') != std::string_view::npos) == v6;
        };
        const auto valid_port = [](std::string_view port) {
            return text::parse_unsigned(port, 65535) && (port.size() == 1 || port.front() != '0');
        };
        // Proxies mix the families of the two addresses, and only the source counts here.
        if ((!v6 && protocol != "TCP4") || !valid_address(source) || !IpAddress::parse(destination) ||
            !valid_port(source_port) || !valid_port(destination_port))
            return;
        complete(IpAddress::parse(source));
    }

    void check_binary() {
        const std::size_t known = (std::min)(header_.size(), signature.size());
        if (header_.compare(0, known, signature.substr(0, known)) != 0) failure_ = "there is no PROXY header";
        else if (header_.size() > 12 && (byte(12) >> 4 != 2 || (byte(12) & 0xF) > 1))
            failure_ = "the version or the command is unknown";
        else if (header_.size() >= fixed_size && announced_size() > max_size) failure_ = "the header is too large";
        else if (header_.size() >= fixed_size && header_.size() == announced_size()) parse_binary();
    }
    void parse_binary() {
        const bool local = (byte(12) & 0xF) == 0;
        const unsigned protocol = byte(13);
        sockaddr_storage source{};
        // "LOCAL: ... the receiver must accept this connection as valid and must use the real connection endpoints and
        // discard the protocol block including the family which is ignored."
        if (local || (protocol != 0x11 && protocol != 0x21)) {
            if (!local && (protocol >> 4 > 3 || (protocol & 0xF) > 2)) failure_ = "the family is unknown";
            else complete(std::nullopt);
            return;
        }
        const bool v6 = protocol == 0x21;
        if (header_.size() < fixed_size + (v6 ? 36 : 12)) {
            failure_ = "the addresses are missing";
            return;
        }
        if (v6) {
            sockaddr_in6 in6{};
            in6.sin6_family = AF_INET6;
            std::memcpy(&in6.sin6_addr, &header_[fixed_size], 16);
            std::memcpy(&source, &in6, sizeof in6);
        } else {
            sockaddr_in in{};
            in.sin_family = AF_INET;
            std::memcpy(&in.sin_addr, &header_[fixed_size], 4);
            std::memcpy(&source, &in, sizeof in);
        }
        complete(IpAddress(source));
    }
    void complete(std::optional<IpAddress> client) {
        failure_ = nullptr;
        client_ = client;
        complete_ = true;
    }

    std::string header_;  // grows with what arrives
    std::optional<IpAddress> client_;
    bool complete_ = false;
    const char* failure_ = nullptr;
};

// ---- systemd -------------------------------------------------------------------------------------------------------

// How many listening sockets systemd has passed to this process, from descriptor 3 on. Throws Error if there is none.
// https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html
WSCHAT_COLD inline int inherited_sockets() {
    const std::optional<std::string> count = os::environment("LISTEN_FDS"), process = os::environment("LISTEN_PID");
    if (!count || !process) throw Error("listen_inherited: there is no socket: LISTEN_FDS or LISTEN_PID is not set");
#if !defined(_WIN32)
    const auto id = text::parse_unsigned(*process, INT32_MAX);
    if (!id || static_cast<pid_t>(*id) != ::getpid())
        throw Error("listen_inherited: LISTEN_PID is \"" + escape_for_log(*process) + "\", and this process is " +
                    std::to_string(::getpid()) + ": the sockets are for another process");
#endif
    const auto sockets = text::parse_unsigned(*count, 1024);
    if (!sockets || *sockets == 0)
        throw Error("listen_inherited: LISTEN_FDS is \"" + escape_for_log(*count) + "\", not a number of sockets");
    return static_cast<int>(*sockets);
}

// Tells systemd the state of the service ("READY=1"). Does nothing if NOTIFY_SOCKET is not set, and ignores failures.
// https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
WSCHAT_COLD inline void notify_systemd(std::string_view state) {
#if defined(_WIN32)
    static_cast<void>(state);
#else
    const std::string path = os::environment("NOTIFY_SOCKET").value_or("");
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    const std::size_t size = path.size();
    if (size < 2 || size >= sizeof name.sun_path || (path[0] != '/' && path[0] != '@')) return;
    std::memcpy(name.sun_path, path.data(), size);
    if (path[0] == '@') name.sun_path[0] = '\0';  // the abstract name space of Linux
    const OwnedDescriptor sender(::socket(AF_UNIX, SOCK_DGRAM, 0));
    if (!sender || !os::make_nonblocking(sender.descriptor())) return;
    const auto name_size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + size);
    ::sendto(sender.descriptor(), state.data(), state.size(), 0, reinterpret_cast<const sockaddr*>(&name), name_size);
#endif
}

// A pipe that wakes a poller from another thread or from a signal handler.
class WakeUp {
public:
    WakeUp() {
#if defined(_WIN32)
        // A datagram socket that is connected to itself: WSAPoll() accepts only sockets.
        read_ = write_ = os::open_socket(AF_INET, SOCK_DGRAM);
        sockaddr_in self{};
        self.sin_family = AF_INET;
        self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int size = sizeof self;
        const auto address = reinterpret_cast<sockaddr*>(&self);
        if (read_ == os::no_descriptor || ::bind(read_, address, size) != 0 ||
            ::getsockname(read_, address, &size) != 0 || ::connect(read_, address, size) != 0)
            throw Error("Loop: cannot open the wake-up socket: " + os::error_text(os::last_error()));
#else
        int ends[2];
        if (os::open_pipe(ends) != 0) throw Error("Loop: cannot open the wake-up pipe: " + os::error_text(errno));
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
    // Safe in a signal handler. Ignores a full pipe, because its bytes already wake the poller.
    static void wake(os::Descriptor write_end, char byte) {
#if defined(_WIN32)
        ::send(write_end, &byte, 1, 0);
#else
        const ssize_t written = ::write(write_end, &byte, 1);
        static_cast<void>(written);
#endif
    }
    // Reads all bytes and calls on_byte(byte) for each.
    template <class OnByte>
    void drain(OnByte&& on_byte) {
        char bytes[256];
        for (;;) {
#if defined(_WIN32)
            const std::ptrdiff_t n = ::recv(read_, bytes, sizeof bytes, 0);
#else
            const std::ptrdiff_t n = ::read(read_, bytes, sizeof bytes);
#endif
            if (n < 0 && os::interrupted(os::last_error())) continue;
            if (n <= 0) return;
            for (std::ptrdiff_t i = 0; i < n; ++i) on_byte(bytes[i]);
        }
    }

private:
    os::Descriptor read_;
    os::Descriptor write_;
};

// The owner of a descriptor in a poller.
class Pollable {
public:
    // The arguments are those of Poller::Ready.
    virtual void on_ready(bool readable, bool writable, bool broken) = 0;

protected:
    ~Pollable() = default;
};

}  // namespace detail

// How a loop waits for sockets. automatic: epoll on Linux, kqueue on BSD and macOS, otherwise poll (WSAPoll on
// Windows).
enum class PollerKind : std::uint8_t { automatic, poll };

namespace detail {

// The contract of all pollers:
//
//   add()      Starts watching a descriptor for reading, writing, both or neither. Add a descriptor only once.
//   change()   Replaces what the descriptor is watched for.
//   remove()   Stops watching it. Call remove() before close(). A descriptor that was not added is ignored.
//   wait()     Blocks until a descriptor is ready or the timeout is over (-1: no timeout). Then it replaces `ready`.
//
//   failure    add() and change() return false if the system has no resources for the call.
//   level      Each wait() reports a descriptor for as long as it is readable or writable (level-triggered).
//   batch      One wait() may report a part of the ready descriptors (512); the next calls report the others. A batch
//              may contain an owner twice.
//   broken     Both directions are closed or failed. It is reported even if nothing is watched for. If the peer only
//              ends its sending side, the descriptor is readable and not broken.
//   lifetime   wait() does not report an owner after remove(), but an earlier batch may still contain it. The owner
//              must live until the caller has handled that batch.
//   clock      now() is the time that timers of the loop follow.
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
    virtual bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) = 0;
    virtual bool change(os::Descriptor descriptor, Pollable& owner, bool read, bool write) = 0;
    virtual void remove(os::Descriptor descriptor) = 0;
    virtual void wait(int timeout_ms, std::vector<Ready>& ready) = 0;
    // A descriptor that is readable while wait() has something to report, or os::no_descriptor.
    virtual os::Descriptor descriptor() const { return os::no_descriptor; }
    virtual Time now() const { return Clock::now(); }
};

struct PollSystem {
#if defined(_WIN32)
    static constexpr bool hang_up_is_end_of_input = true;
#else
    static constexpr bool hang_up_is_end_of_input = false;
#endif
    static int poll(os::Pollfd* entries, std::size_t count, int timeout_ms) {
        return os::poll(entries, count, timeout_ms);
    }
};

// WSAPoll() reports POLLHUP also if the peer only ended its sending side, and does so until the end is read. If nobody
// reads it, wait() looks at such an entry every 10 ms instead of spinning.
template <class System>
class BasicPollPoller final : public Poller {
public:
    const char* name() const override { return "poll"; }
    bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        // Reserve first: after that neither insert() can throw, and the two lists stay equal in size.
        if (entries_.size() == entries_.capacity()) entries_.reserve(2 * entries_.size() + 16);
        owners_.reserve(entries_.capacity());
        const std::ptrdiff_t at = position(descriptor);
        entries_.insert(entries_.begin() + at, {descriptor, events(read, write), 0});
        owners_.insert(owners_.begin() + at, &owner);
        return true;
    }
    bool change(os::Descriptor descriptor, Pollable&, bool read, bool write) override {
        entries_.begin()[position(descriptor)].events = events(read, write);
        return true;
    }
    void remove(os::Descriptor descriptor) override {
        const auto entry = entries_.begin() + position(descriptor);
        if (entry == entries_.end() || entry->fd != descriptor) return;
        owners_.erase(owners_.begin() + (entry - entries_.begin()));
        entries_.erase(entry);
    }
    void wait(int timeout_ms, std::vector<Ready>& ready) override {
        ready.clear();
        constexpr int pause_ms = 10;
        while (System::poll(entries_.data(), entries_.size(), timeout_ms) > 0) {
            for (std::size_t i = 0; i < entries_.size(); ++i) report(entries_[i], owners_[i], ready);
            if (!System::hang_up_is_end_of_input || !ready.empty() || timeout_ms == 0) return;
            std::vector<os::Pollfd> others;
            for (const os::Pollfd& entry : entries_)
                if (entry.revents == 0) others.push_back(entry);
            const int pause = timeout_ms < 0 ? pause_ms : (std::min)(timeout_ms, pause_ms);
            System::poll(others.data(), others.size(), pause);
            if (timeout_ms > 0) timeout_ms -= pause;
        }
    }

private:
    static void report(const os::Pollfd& entry, Pollable* owner, std::vector<Ready>& ready) {
        const auto revents = static_cast<unsigned>(entry.revents);
        const bool reads = (entry.events & POLLIN) != 0, hung_up = (revents & POLLHUP) != 0;
        bool broken = (revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
        bool readable = (revents & POLLIN) != 0;
        if (System::hang_up_is_end_of_input && hung_up && (revents & (POLLERR | POLLNVAL)) == 0) {
            char byte;
            broken = os::peek(entry.fd, &byte, 1) < 0 && !os::would_block(os::last_error());
            readable = reads;
        }
        const bool writable = (revents & POLLOUT) != 0;
        if (readable || writable || broken) ready.push_back({owner, readable, writable, broken});
    }
    static short events(bool read, bool write) {
        return static_cast<short>((read ? POLLIN : 0) | (write ? POLLOUT : 0));
    }
    // The index of the descriptor, or the index to insert it at.
    std::ptrdiff_t position(os::Descriptor descriptor) const {
        const auto less = [](const os::Pollfd& entry, os::Descriptor wanted) { return entry.fd < wanted; };
        return std::lower_bound(entries_.begin(), entries_.end(), descriptor, less) - entries_.begin();
    }

    std::vector<os::Pollfd> entries_;  // sorted by descriptor; poll() itself is O(n), so moving entries costs little
    std::vector<Pollable*> owners_;
};
using PollPoller = BasicPollPoller<PollSystem>;

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
            const std::uint32_t events = events_[i].events;
            ready.push_back({static_cast<Pollable*>(events_[i].data.ptr), (events & EPOLLIN) != 0,
                             (events & EPOLLOUT) != 0, (events & (EPOLLHUP | EPOLLERR)) != 0});
        }
    }

    os::Descriptor descriptor() const override { return epoll_.descriptor(); }

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

// Each descriptor always has both filters. What is not watched has an edge-triggered filter with a low-water mark that
// no buffer reaches: it reports the end or an error, once. EV_EOF of the read filter means that the peer ended its
// sending side. EV_EOF of the write filter alone means that this side ended its own.
class KqueuePoller final : public Poller {
public:
    KqueuePoller() : queue_(::kqueue()) {
        if (!queue_) throw Error("Loop: kqueue: " + os::error_text(errno));
        ::fcntl(queue_.descriptor(), F_SETFD, FD_CLOEXEC);
    }
    const char* name() const override { return "kqueue"; }
    bool add(os::Descriptor descriptor, Pollable& owner, bool read, bool write) override {
        const auto index = static_cast<std::size_t>(descriptor);
        if (index >= watched_.size()) watched_.resize(index + 1);
        watched_[index] = {&owner, read, write, false, false, false};
        if (control(descriptor, EVFILT_READ, read, false) && control(descriptor, EVFILT_WRITE, write, false))
            return true;
        const int error = errno;
        remove(descriptor);
        errno = error;
        return false;
    }
    bool change(os::Descriptor descriptor, Pollable&, bool read, bool write) override {
        Watched& watched = watched_[static_cast<std::size_t>(descriptor)];
        const bool changes_read = watched.read != read, changes_write = watched.write != write && !watched.broken;
        watched.read = read;
        watched.write = write;
        return (!changes_read || control(descriptor, EVFILT_READ, read, true)) &&
               (!changes_write || control(descriptor, EVFILT_WRITE, write, true));
    }
    void remove(os::Descriptor descriptor) override {
        for (const int filter : {int{EVFILT_READ}, int{EVFILT_WRITE}}) {
            const struct kevent event = make_event(descriptor, filter, EV_DELETE);
            ::kevent(queue_.descriptor(), &event, 1, nullptr, 0, nullptr);
        }
    }
    void wait(int timeout_ms, std::vector<Ready>& ready) override {
        ready.clear();
        const Time end = Clock::now() + std::chrono::milliseconds(timeout_ms);
        for (;;) {
            const timespec timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1000000L};
            const int count =
                ::kevent(queue_.descriptor(), nullptr, 0, events_, batch, timeout_ms < 0 ? nullptr : &timeout);
            for (int i = 0; i < count; ++i) report(events_[i], ready);
            if (count <= 0 || !ready.empty()) return;
            // All events were of filters that are not watched.
            const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
            if (timeout_ms > 0) timeout_ms = static_cast<int>((std::max)(left, decltype(left){0}));
        }
    }

    os::Descriptor descriptor() const override { return queue_.descriptor(); }

private:
    static constexpr int batch = 512;

    struct Watched {
        Pollable* owner;
        bool read;
        bool write;
        bool input_ended;
        bool output_ended;
        bool broken;  // then the write filter is level-triggered
    };

    static struct kevent make_event(os::Descriptor descriptor, int filter, int flags) {
        struct kevent event {};
        event.ident = static_cast<decltype(event.ident)>(descriptor);
        event.filter = static_cast<decltype(event.filter)>(filter);
        event.flags = static_cast<decltype(event.flags)>(flags);
        return event;
    }
    // `replace`: the filter exists. To add it again would not change whether it is edge-triggered.
    bool control(os::Descriptor descriptor, int filter, bool watch, bool replace) {
        struct kevent changes[] = {make_event(descriptor, filter, EV_DELETE),
                                   make_event(descriptor, filter, watch ? EV_ADD : EV_ADD | EV_CLEAR)};
        if (!watch) {
            changes[1].fflags = NOTE_LOWAT;
            changes[1].data = INT32_MAX;
        }
        const struct kevent* first = replace ? changes : changes + 1;
        return ::kevent(queue_.descriptor(), first, replace ? 2 : 1, nullptr, 0, nullptr) == 0;
    }
    void report(const struct kevent& event, std::vector<Ready>& ready) {
        Watched& watched = watched_[static_cast<std::size_t>(event.ident)];
        const bool of_input = event.filter == EVFILT_READ, ended = (event.flags & EV_EOF) != 0;
        if (ended) (of_input ? watched.input_ended : watched.output_ended) = true;
        const bool failed = ended && event.fflags != 0;  // fflags is the error of the socket
        if (!watched.broken && (failed || (watched.input_ended && watched.output_ended))) {
            watched.broken = true;
            // From now on each wait() reports it, also if memory runs out below.
            if (!watched.write) control(static_cast<os::Descriptor>(event.ident), EVFILT_WRITE, true, true);
        }
        const bool readable = of_input && watched.read, writable = !of_input && watched.write;
        // If reading is not watched, only the write filter reports what is broken.
        const bool broken = watched.broken && (readable || !of_input);
        if (readable || writable || broken) ready.push_back({watched.owner, readable, writable, broken});
    }

    OwnedDescriptor queue_;
    std::vector<Watched> watched_;  // the index is the descriptor
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
// TlsStream: TLS 1.2 and 1.3 with OpenSSL, for servers and clients, as bytes in and bytes out. TlsTransport: a
// TlsStream on a socket. Compiled only with WSCHAT_OPENSSL. It does not know HTTP, WebSocket or loops.
// ====================================================================================================================

#if WSCHAT_OPENSSL

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/hmac.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#if OPENSSL_VERSION_NUMBER < 0x10101000L
#error "wschat.hpp needs OpenSSL 1.1.1 or newer"
#endif

WSCHAT_BEGIN

namespace detail {

template <auto Free>
struct OpensslDeleter {
    template <class Object>
    void operator()(Object* object) const {
        Free(object);
    }
};
template <class Object, auto Free>
using OpensslPtr = std::unique_ptr<Object, OpensslDeleter<Free>>;

// Empties this thread's error queue. Returns the text of the oldest entry, because the first error causes the others.
// If there are entries of `library`, returns the oldest of those.
inline std::string pop_tls_error(int library = 0) {
    unsigned long code = ERR_get_error();
    while (const unsigned long next = ERR_get_error())
        if (ERR_GET_LIB(code) != library && ERR_GET_LIB(next) == library) code = next;
    if (ERR_GET_LIB(code) == ERR_LIB_SYS) return std::generic_category().message(ERR_GET_REASON(code));
    const char* reason = ERR_reason_error_string(code);
    return reason != nullptr ? reason : "unknown error";
}

}  // namespace detail

// The paths of two PEM files.
struct TlsCertificate {
    std::string certificate;  // the certificate, then its intermediate certificates
    std::string key;          // its private key
};

// For Server::listen_tls(). All files are PEM.
struct TlsOptions {
    std::string certificate;     // the certificate, then its intermediate certificates
    std::string key;             // its private key
    std::string key_password{};  // for all encrypted keys
    // Certificates for more host names. The server picks the one for the name that the client sends (SNI), or the
    // first.
    std::vector<TlsCertificate> more{};
    // If set, the server requests a client certificate that an authority in this file has signed. See
    // Request::client_certificate().
    std::string client_authorities{};
    bool require_client_certificate = true;  // false: a client may have no certificate; an invalid one is refused
};

namespace detail {

// For the client side of a TlsStream.
struct TlsClientOptions {
    std::string authorities{};       // a PEM file; empty: the authorities that the system trusts
    std::string revocation_lists{};  // a PEM file; empty: it is not checked whether a certificate was revoked
    std::string certificate{};       // sent if the server requests one
    std::string key{};
    std::string key_password{};
    // Insecure: does not verify the server's certificate. An attacker in the network can read and change all data.
    bool accept_any_certificate = false;
};

// The largest handshake message of a client. Honest ones have less than 2 KiB, or 8 KiB with certificates.
constexpr std::size_t max_tls_message = 16 * 1024;

// The certificates, keys and rules of all streams of a listener. The constructor throws Error with the file's name and
// OpenSSL's reason if a file cannot be used.
class TlsContext {
public:
    explicit TlsContext(const TlsOptions& options) {
        add(TLS_server_method(), {options.certificate, options.key}, options.key_password);
        for (const TlsCertificate& more : options.more) add(TLS_server_method(), more, options.key_password);
        for (const Context& context : contexts_) request_client_certificates(context.get(), options);
        SSL_CTX_set_cert_cb(contexts_.front().get(), &select_certificate, this);
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
        if (!options.revocation_lists.empty()) check_revocation(context, options.revocation_lists);
    }
    TlsContext(const TlsContext&) = delete;
    TlsContext& operator=(const TlsContext&) = delete;

    SSL_CTX* get() const { return contexts_.front().get(); }
    bool verifies() const { return verify_; }

private:
    using Context = OpensslPtr<SSL_CTX, &SSL_CTX_free>;

    [[noreturn]] static void fail(const char* option, const std::string& file) {
        throw Error(std::string("TLS ") + option + " \"" + file + "\": " + pop_tls_error());
    }

    void add(const SSL_METHOD* method, const TlsCertificate& files, const std::string& password) {
        ERR_clear_error();
        Context owned(SSL_CTX_new(method));
        if (!owned) throw Error("TLS: " + pop_tls_error());
        SSL_CTX* context = owned.get();
        SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
        SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
        SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        // TLS 1.2 only with forward secrecy and authenticated encryption. TLS 1.3 always has both.
        SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20");
        // Tickets let a client resume a session. A cache in the server would grow with the number of clients.
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_alpn_select_cb(context, &select_protocol, nullptr);
        if (!files.certificate.empty() || !files.key.empty() || method == TLS_server_method())
            load(context, files, password);
        contexts_.push_back(std::move(owned));
    }

    // RFC 5280 6.3, for the certificate of the peer, not for those of its authorities.
    static void check_revocation(SSL_CTX* context, const std::string& file) {
        X509_STORE* const store = SSL_CTX_get_cert_store(context);
        X509_LOOKUP* const lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
        if (lookup == nullptr || X509_load_crl_file(lookup, file.c_str(), X509_FILETYPE_PEM) <= 0)
            fail("revocation_lists", file);
        X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
    }

    static void load(SSL_CTX* context, const TlsCertificate& files, const std::string& password) {
        if (SSL_CTX_use_certificate_chain_file(context, files.certificate.c_str()) != 1)
            fail("certificate", files.certificate);
        // Without a callback OpenSSL would ask for the password on the terminal.
        SSL_CTX_set_default_passwd_cb(context, &copy_password);
        SSL_CTX_set_default_passwd_cb_userdata(context, const_cast<std::string*>(&password));
        const bool loaded = SSL_CTX_use_PrivateKey_file(context, files.key.c_str(), SSL_FILETYPE_PEM) == 1;
        SSL_CTX_set_default_passwd_cb_userdata(context, nullptr);
        if (!loaded) fail("key", files.key);
        if (SSL_CTX_check_private_key(context) != 1)
            throw Error("TLS key \"" + files.key + "\" does not belong to the certificate \"" + files.certificate +
                        "\": " + pop_tls_error());
    }
    static int copy_password(char* buffer, int size, int, void* password) {
        if (password == nullptr) return 0;
        const std::string& text = *static_cast<const std::string*>(password);
        if (text.size() > static_cast<std::size_t>(size)) return 0;
        std::memcpy(buffer, text.data(), text.size());
        return static_cast<int>(text.size());
    }

    static void request_client_certificates(SSL_CTX* context, const TlsOptions& options) {
        const std::string& file = options.client_authorities;
        if (file.empty()) return;
        STACK_OF(X509_NAME)* names = SSL_load_client_CA_file(file.c_str());
        if (names == nullptr) fail("client_authorities", file);
        SSL_CTX_set_client_CA_list(context, names);
        if (SSL_CTX_load_verify_locations(context, file.c_str(), nullptr) != 1) fail("client_authorities", file);
        const int required = options.require_client_certificate ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0;
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER | required, nullptr);
        SSL_CTX_set_max_cert_list(context, max_tls_message);
        // A ticket proves the client's certificate to this server only.
        const unsigned char id[] = "wschat";
        SSL_CTX_set_session_id_context(context, id, sizeof id - 1);
    }

    // Selects the certificate for the name that the client sends (RFC 6066 3).
    static int select_certificate(SSL* ssl, void* self) {
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

    // RFC 7301 3.2: "In the event that the server supports no protocols that the client advertises, then the server
    // SHALL respond with a fatal 'no_application_protocol' alert."
    static int select_protocol(SSL*, const unsigned char** selected, unsigned char* size, const unsigned char* offered,
                               unsigned offered_size, void*) {
        constexpr std::string_view http = "http/1.1";
        for (unsigned at = 0; at < offered_size; at += 1u + offered[at]) {
            const std::string_view name(reinterpret_cast<const char*>(offered) + at + 1, offered[at]);
            if (name != http) continue;
            *selected = offered + at + 1;
            *size = offered[at];
            return SSL_TLSEXT_ERR_OK;
        }
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    }

    std::vector<Context> contexts_;  // one per certificate
    bool verify_ = false;
};

// The TLS state of one connection, without a socket and without a clock. Ciphertext may come in pieces of any size.
// Outcomes: would_block means that it needs ciphertext from the peer, unless has_input(); end means that the peer has
// sent close_notify. After an error, failure() has the cause and output() may contain an alert for the peer.
//
// OpenSSL gets only whole records, and from a client, while its handshake is not encrypted, only whole messages: it
// would allocate what a header announces. A server has no OpenSSL object before a whole ClientHello has arrived.
class TlsStream {
public:
    // The largest plaintext of one record (RFC 8446 5.1).
    static constexpr std::size_t max_record = 16 * 1024;

    // The server side.
    explicit TlsStream(std::shared_ptr<const TlsContext> context) : context_(std::move(context)), server_(true) {}
    // The client side. The server's certificate must be for `host`, a name or an address.
    TlsStream(std::shared_ptr<const TlsContext> context, std::string_view host) : context_(std::move(context)) {
        initialize();
        set_host(std::string(host));
    }
    TlsStream(const TlsStream&) = delete;
    TlsStream& operator=(const TlsStream&) = delete;

    // ---- input -----------------------------------------------------------------------------------------------------

    // Adds ciphertext from the peer. It must stay valid until read() returns would_block or store_input() returns.
    void receive(std::string_view ciphertext) {
        if (input_.empty()) replace_input(ciphertext);
        else store_with(ciphertext);
    }
    // The input that read() has not used yet: less than a record, unless has_input().
    std::string_view unread() const { return input_; }
    // The same as receive(), for bytes that begin with a copy of unread().
    void replace_input(std::string_view ciphertext) {
        // A TLS record never begins with a letter; an HTTP request or response always does.
        if (!first_byte_seen_ && !ciphertext.empty()) {
            first_byte_seen_ = true;
            plain_text_ = ciphertext.front() >= 'A' && ciphertext.front() <= 'Z';
            if (plain_text_) failure_ = "the peer speaks plain text";
        }
        stored_.release();
        input_ = ciphertext;
    }
    // Decrypts up to `size` bytes out of at most `max_records` records. Continues the handshake first. would_block with
    // has_input(): these records had no data.
    IoResult read(char* data, std::size_t size, std::size_t max_records = static_cast<std::size_t>(-1)) {
        records_left_ = max_records;
        std::size_t done = 0;
        while (done < size) {
            std::size_t part = 0;
            const IoResult step =
                call_openssl([&] { return SSL_read_ex(ssl_.get(), data + done, size - done, &part); });
            if (step.outcome != Outcome::done) {
                if (step.outcome == Outcome::would_block) store_input();
                end_pending_ = step.outcome != Outcome::would_block && done != 0;
                return done != 0 ? IoResult{Outcome::done, done} : step;
            }
            done += part;
        }
        return {Outcome::done, done};
    }
    // Copies the input that read() has not used yet.
    void store_input() {
        if (input_.empty()) stored_.release();
        else if (stored_.empty()) store_with({});
    }
    // True if read() may return bytes, the end or an error without more input.
    bool has_input() const {
        if (end_pending_) return true;
        if (!failure_.empty()) return false;
        return passed_ != 0 || decrypted() != 0 || next_unit().complete();
    }
    // Bytes of input that wait in here.
    std::size_t buffered_input() const { return stored_.size() + decrypted(); }
    // About what OpenSSL holds for a handshake and frees at its end: the messages, their hash, the keys.
    std::size_t handshake_memory() const { return ssl_ && !established_ ? std::size_t{42} * 1024 : 0; }
    // The messages without data that have come after the handshake, since the last call: key updates, and attempts to
    // renegotiate. One costs as much as 16 records with data.
    std::size_t take_control_records() { return std::exchange(control_records_, std::size_t{0}); }

    // ---- output ----------------------------------------------------------------------------------------------------

    // Starts or continues the handshake. For a client, which sends first.
    IoResult handshake() {
        return call_openssl([&] { return SSL_do_handshake(ssl_.get()); });
    }
    // Encrypts at most max_record bytes, all or none.
    IoResult write(std::string_view plaintext) {
        if (plaintext.empty()) return {Outcome::done, 0};
        std::size_t written = 0;
        const IoResult step =
            call_openssl([&] { return SSL_write_ex(ssl_.get(), plaintext.data(), plaintext.size(), &written); });
        return {step.outcome, written};
    }
    // Sends close_notify.
    void shutdown() {
        if (!established_ || shutdown_sent_ || !failure_.empty()) return;
        shutdown_sent_ = true;
        call_openssl([&] { return SSL_shutdown(ssl_.get()) < 0 ? 0 : 1; });
    }
    // Ends the stream because of what the peer does.
    void fail(const char* cause) {
        shutdown();
        if (failure_.empty()) failure_ = cause;
        drop_input();
    }

    // Ciphertext for the peer.
    std::string_view output() const { return output_.view().substr(sent_); }
    void consume(std::size_t n) {
        sent_ += n;
        if (sent_ != output_.size()) return;
        output_.clear();
        sent_ = 0;
    }
    // Uses a buffer of the caller for the output. Call it only if there is no output.
    void borrow_output(Bytes& buffer) { output_.swap(buffer); }
    // Returns that buffer, and copies the rest of the output to a buffer of the right size.
    void return_output(Bytes& buffer) {
        Bytes rest;
        rest.append(output());
        output_.swap(buffer);
        buffer.clear();
        output_.swap(rest);
        sent_ = 0;
    }
    void release_output() { output_.release(); }

    // ---- state -----------------------------------------------------------------------------------------------------

    // The handshake is done and the peer's certificate is accepted.
    bool established() const { return established_; }
    const std::string& failure() const { return failure_; }
    bool plain_text() const { return plain_text_; }
    // "TLSv1.3", "TLS_AES_256_GCM_SHA384", and "http/1.1" or empty.
    std::string_view version() const { return SSL_get_version(ssl_.get()); }
    std::string_view cipher() const { return SSL_get_cipher_name(ssl_.get()); }
    std::string_view protocol() const {
        const unsigned char* name = nullptr;
        unsigned size = 0;
        SSL_get0_alpn_selected(ssl_.get(), &name, &size);
        return {reinterpret_cast<const char*>(name), size};
    }
    // True if the handshake resumed an earlier session.
    bool resumed() const { return SSL_session_reused(ssl_.get()) == 1; }
    // The subject of the peer's certificate in the form of RFC 2253; empty if the peer has no certificate.
    std::string peer_name() const {
        const OpensslPtr<X509, &X509_free> certificate(SSL_get_peer_certificate(ssl_.get()));
        if (!certificate) return {};
        const OpensslPtr<BIO, &BIO_free> text(BIO_new(BIO_s_mem()));
        if (!text) throw std::bad_alloc();
        X509_NAME_print_ex(text.get(), X509_get_subject_name(certificate.get()), 0, XN_FLAG_RFC2253);
        char* data = nullptr;
        const long size = BIO_get_mem_data(text.get(), &data);
        return {data, static_cast<std::size_t>(size)};
    }
    // The SHA-256 of the public key in the peer's certificate, in base64 (RFC 7469 2.4); empty if there is none.
    std::string peer_key_pin() const {
        const OpensslPtr<X509, &X509_free> certificate(SSL_get_peer_certificate(ssl_.get()));
        if (!certificate) return {};
        unsigned char* key = nullptr;
        const int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate.get()), &key);
        if (size <= 0) return {};
        unsigned char digest[EVP_MAX_MD_SIZE];
        unsigned digest_size = 0;
        const bool done =
            EVP_Digest(key, static_cast<std::size_t>(size), digest, &digest_size, EVP_sha256(), nullptr) == 1;
        OPENSSL_free(key);
        return done ? base64(digest, digest_size) : std::string();
    }
    // For OpenSSL functions that this class does not wrap. Null for a server before a whole ClientHello has arrived.
    SSL* native() { return ssl_.get(); }

private:
    using Outcome = IoResult::Outcome;

    // What OpenSSL gets at once, at the front of the input.
    struct Unit {
        std::size_t size = 0;           // 0: more must arrive
        const char* refusal = nullptr;  // OpenSSL gets nothing more
        bool complete() const { return size != 0 || refusal != nullptr; }
    };
    static constexpr std::size_t record_header = 5;
    static constexpr std::size_t max_ciphertext = max_record + 2048;  // RFC 5246 6.2.3; RFC 8446 allows less
    static constexpr std::size_t max_fragments = 16;                  // records of one message of a handshake

    // Follows messages through the records that carry them: a type, three bytes of length, and the body.
    class HandshakeMessages {
    public:
        bool complete() const { return header_ == 0; }
        // False: a message is too large.
        bool read(std::string_view data) {
            while (!data.empty()) {
                if (header_ < header_size) {
                    body_left_ = header_ == 0 ? 0 : body_left_ << 8 | static_cast<unsigned char>(data.front());
                    ++header_;
                    data.remove_prefix(1);
                } else {
                    const std::size_t part = (std::min)(body_left_, data.size());
                    body_left_ -= part;
                    data.remove_prefix(part);
                }
                if (body_left_ > max_tls_message - header_size) return false;
                if (header_ == header_size && body_left_ == 0) header_ = 0;
            }
            return true;
        }

    private:
        static constexpr std::size_t header_size = 4;
        std::size_t header_ = 0;  // bytes that have been read
        std::size_t body_left_ = 0;
    };

    // A peer can request key updates and not read the answers. Honest peers stay far below this limit.
    static constexpr std::size_t max_output = 128 * 1024;

    void initialize() {
        method_.reset(BIO_meth_new(BIO_TYPE_SOURCE_SINK, "wschat"));
        ssl_.reset(SSL_new(context_->get()));
        BIO* bio = method_ && ssl_ ? BIO_new(method_.get()) : nullptr;
        if (bio == nullptr) throw std::bad_alloc();
        BIO_meth_set_read(method_.get(), &read_input);
        BIO_meth_set_write(method_.get(), &write_output);
        BIO_meth_set_ctrl(method_.get(), &control);
        BIO_set_data(bio, this);
        BIO_set_init(bio, 1);
        SSL_set_bio(ssl_.get(), bio, bio);
        SSL_set_msg_callback(ssl_.get(), &note_record);
        SSL_set_msg_callback_arg(ssl_.get(), this);
        if (server_) SSL_set_accept_state(ssl_.get());
        else SSL_set_connect_state(ssl_.get());
    }

    void set_host(const std::string& host) {
        SSL* ssl = ssl_.get();
        const bool address = IpAddress::parse(host).has_value();
        // RFC 6066 3: "Literal IPv4 and IPv6 addresses are not permitted in "HostName"."
        if (!address)
            SSL_ctrl(ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, const_cast<char*>(host.c_str()));
        if (!context_->verifies()) return;
        SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
        const int result = address ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host.c_str())
                                   : SSL_set1_host(ssl, host.c_str());
        if (result != 1 || host.empty())
            throw Error("TLS: \"" + escape_for_log(host) + "\" is not the name of a server");
    }

    void store_with(std::string_view more) {
        Bytes joined;
        joined.reserve(input_.size() + more.size());
        joined.append(input_);
        joined.append(more);
        stored_ = std::move(joined);
        input_ = stored_.view();
    }

    void drop_input() {
        input_ = {};
        passed_ = 0;
    }
    std::size_t decrypted() const { return ssl_ ? static_cast<std::size_t>(SSL_pending(ssl_.get())) : 0; }

    // True if a record of this type has handshake messages that are not encrypted. In TLS 1.2 messages are encrypted
    // after ChangeCipherSpec. In TLS 1.3 that means nothing, and encrypted records have another type.
    bool has_plain_messages(char type) const {
        if (!server_ || type != SSL3_RT_HANDSHAKE) return false;
        return !ssl_ || !change_cipher_spec_seen_ || SSL_version(ssl_.get()) != TLS1_2_VERSION;
    }
    // A record that OpenSSL refuses is complete at once: OpenSSL knows the alert for it.
    Unit next_unit() const {
        if (!ssl_ && !input_.empty() && input_.front() != SSL3_RT_HANDSHAKE) return {0, "the peer does not speak TLS"};
        HandshakeMessages messages;
        std::size_t end = 0;
        for (std::size_t records = 1;; ++records) {
            const std::string_view rest = input_.substr(end);
            if (rest.size() < record_header) return {};
            const std::size_t size = static_cast<unsigned char>(rest[3]) * 256u + static_cast<unsigned char>(rest[4]);
            if (rest[1] != SSL3_VERSION_MAJOR || size > max_ciphertext)
                return ssl_ ? Unit{input_.size()} : Unit{0, "the peer does not speak TLS"};
            if (rest.size() < record_header + size) return {};
            end += record_header + size;
            const bool plain = has_plain_messages(rest.front());
            if (!plain && messages.complete()) return {end};
            // RFC 8446 5.1 forbids other records within a message, and empty ones.
            if (!plain || size == 0) return {0, "a handshake message is interrupted"};
            if (!messages.read(rest.substr(record_header, size))) return {0, "a handshake message is too large"};
            if (messages.complete()) return {end};
            if (records == max_fragments || end > max_tls_message + max_fragments * record_header)
                return {0, "a handshake message has too many fragments"};
        }
    }
    // Bytes of the input that OpenSSL may read now.
    std::size_t readable() {
        if (passed_ != 0 || records_left_ == 0) return passed_;
        const Unit unit = next_unit();
        refusal_ = unit.refusal;
        if (unit.size == 0) return 0;
        --records_left_;
        if (input_.front() == SSL3_RT_CHANGE_CIPHER_SPEC) change_cipher_spec_seen_ = true;
        return passed_ = unit.size;
    }
    // Fails with an alert in plain text: only such handshakes are refused.
    IoResult refuse() {
        failure_ = refusal_;
        drop_input();
        const char alert[] = {SSL3_RT_ALERT, SSL3_VERSION_MAJOR, 3, 0, 2, SSL3_AL_FATAL, SSL3_AD_ILLEGAL_PARAMETER};
        output_.append(alert, sizeof alert);
        return {Outcome::error};
    }

    // Calls a function of OpenSSL that returns 1 for success. Clears the thread's error queue before, because
    // SSL_get_error() also reads errors of earlier calls.
    template <class Call>
    IoResult call_openssl(Call&& call) {
        if (!failure_.empty()) return {Outcome::error};
        if (!ssl_) {
            if (readable() == 0) return refusal_ != nullptr ? refuse() : IoResult{Outcome::would_block};
            initialize();
        }
        ERR_clear_error();
        const int result = call();
        const int error = result == 1 ? SSL_ERROR_NONE : SSL_get_error(ssl_.get(), result);
        if (!established_ && SSL_is_init_finished(ssl_.get()) == 1) established_ = true;
        switch (error) {
            case SSL_ERROR_NONE: return {Outcome::done};
            case SSL_ERROR_WANT_READ: return refusal_ != nullptr ? refuse() : IoResult{Outcome::would_block};
            case SSL_ERROR_ZERO_RETURN: drop_input(); return {Outcome::end};
            default: break;
        }
        failure_ = pop_tls_error(ERR_LIB_SSL);
        if (output_error_ != nullptr) failure_ = output_error_;
        const long verified = SSL_get_verify_result(ssl_.get());
        if (verified != X509_V_OK && !established_) (failure_ += ": ") += X509_verify_cert_error_string(verified);
        drop_input();
        return {Outcome::error};
    }

    static TlsStream& stream_of(BIO* bio) {
        BIO_clear_retry_flags(bio);
        return *static_cast<TlsStream*>(BIO_get_data(bio));
    }
    static int read_input(BIO* bio, char* buffer, int size) {
        TlsStream& stream = stream_of(bio);
        const std::size_t copied = (std::min)(stream.readable(), static_cast<std::size_t>(size));
        if (copied == 0) {
            BIO_set_retry_read(bio);
            return -1;
        }
        std::memcpy(buffer, stream.input_.data(), copied);
        stream.input_.remove_prefix(copied);
        stream.passed_ -= copied;
        return static_cast<int>(copied);
    }
    // Accepts all bytes or fails: OpenSSL never has to repeat a write.
    static int write_output(BIO* bio, const char* data, int size) noexcept {
        TlsStream& stream = stream_of(bio);
        try {
            if (stream.output().size() > max_output) stream.output_error_ = "the peer does not read";
            else stream.output_.append(data, static_cast<std::size_t>(size));
        } catch (const std::bad_alloc&) {  // an exception must not pass through OpenSSL
            stream.output_error_ = "out of memory";
        }
        return stream.output_error_ == nullptr ? size : -1;
    }
    // OpenSSL calls it with the header of each record, with the true type of each record of TLS 1.3, and more.
    static void note_record(int sent, int, int kind, const void* data, std::size_t size, SSL* ssl, void* self) {
        const bool type_follows = kind == SSL3_RT_HEADER || kind == SSL3_RT_INNER_CONTENT_TYPE;
        if (sent != 0 || !type_follows || size == 0 || SSL_is_init_finished(ssl) != 1) return;
        if (*static_cast<const unsigned char*>(data) != SSL3_RT_HANDSHAKE) return;
        constexpr std::size_t cost = 15;  // more than that of another record
        TlsStream& stream = *static_cast<TlsStream*>(self);
        ++stream.control_records_;
        stream.records_left_ -= (std::min)(stream.records_left_, cost);
    }
    static long control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

    std::shared_ptr<const TlsContext> context_;
    OpensslPtr<BIO_METHOD, &BIO_meth_free> method_;
    OpensslPtr<SSL, &SSL_free> ssl_;
    std::string_view input_;         // not decrypted yet; a view of stored_ or of the caller's bytes
    std::size_t passed_ = 0;         // bytes at the front of the input that OpenSSL may read
    std::size_t records_left_ = 64;  // that OpenSSL may read now; read() sets it
    std::size_t control_records_ = 0;
    const char* refusal_ = nullptr;  // why readable() passes nothing more
    Bytes stored_;
    Bytes output_;
    std::size_t sent_ = 0;  // of output_
    std::string failure_;
    const char* output_error_ = nullptr;  // why write_output() failed
    const bool server_ = false;
    bool change_cipher_spec_seen_ = false;
    bool first_byte_seen_ = false;
    bool plain_text_ = false;
    bool established_ = false;
    bool shutdown_sent_ = false;
    bool end_pending_ = false;  // the end or an error came after bytes that read() has returned
};

// Buffers that all connections of a listener share. An idle connection has no buffers of its own.
struct TlsBuffers {
    std::vector<char> received = std::vector<char>(64 * 1024);
    std::vector<char> record = std::vector<char>(TlsStream::max_record);
    Bytes output;
};

// A TlsStream on a socket.
class TlsTransport final : public Transport {
public:
    template <class... StreamArguments>
    explicit TlsTransport(std::shared_ptr<TlsBuffers> buffers, StreamArguments&&... arguments)
        : buffers_(std::move(buffers)), stream_(std::forward<StreamArguments>(arguments)...) {}

    IoResult receive(Socket& socket, char* data, std::size_t size, WireCount& wire) override {
        borrow_output();
        const IoResult received = decrypt(socket, data, size, wire);
        stream_.store_input();
        flush(socket, wire);  // the handshake's answer or an alert
        return_output();
        return received;
    }

    IoResult send(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) override {
        borrow_output();
        const IoResult sent = encrypt(socket, pieces, count, wire);
        return_output();
        return sent;
    }

    bool has_input() const override { return stream_.has_input(); }
    bool wants_write() const override { return !stream_.output().empty(); }
    std::size_t buffered() const override {
        return stream_.buffered_input() + stream_.handshake_memory() + stream_.output().size() - batch_ciphertext_;
    }
    bool check_rate(Socket& socket, const Rate& rate, Time now, WireCount& wire) override {
        const auto records = static_cast<double>(stream_.take_control_records());
        // The bucket alone would allow one at a time if its burst is 0.
        if (records == 0 || rate.per_second <= 0) return true;
        if (rate.burst >= 1 && control_records_.take(records, rate, now)) return true;
        stream_.fail("the peer sends too many key updates");
        flush(socket, wire);
        return false;
    }
    bool established() const override { return stream_.established(); }
    bool end(Socket& socket, WireCount& wire) override {
        stream_.shutdown();
        return flush(socket, wire).outcome != IoResult::Outcome::would_block;
    }
    const std::string& failure() const override { return stream_.failure(); }
    bool plain_text() const override { return stream_.plain_text(); }
    std::string peer_name() const override { return stream_.peer_name(); }
    std::string peer_key_pin() const { return stream_.peer_key_pin(); }

private:
    // The plaintext that is encrypted between two sends.
    static constexpr std::size_t batch = 64 * 1024;
    // The records that one receive() decrypts: small ones cost much more than their bytes.
    static constexpr std::size_t max_records = 64;

    // Uses the shared buffer for the output of one call, unless older output is pending.
    void borrow_output() {
        borrowed_ = !wants_write();
        if (borrowed_) stream_.borrow_output(buffers_->output);
    }
    void return_output() {
        if (borrowed_) stream_.return_output(buffers_->output);
        else if (!wants_write()) stream_.release_output();
    }

    IoResult decrypt(Socket& socket, char* data, std::size_t size, WireCount& wire) {
        const IoResult decrypted = stream_.read(data, size, max_records);
        if (decrypted.outcome != IoResult::Outcome::would_block || stream_.has_input()) return decrypted;
        // The rest of the last input is a part of a record, or of a handshake message.
        const std::string_view rest = stream_.unread();
        char* const begin = buffers_->received.data();
        if (!rest.empty()) std::memcpy(begin, rest.data(), rest.size());
        // Receives little more than `size`, so that store_input() copies little.
        const std::size_t wanted = (std::min)(buffers_->received.size() - rest.size(), size + TlsStream::max_record);
        const IoResult received = socket.receive(begin + rest.size(), wanted);
        if (received.outcome != IoResult::Outcome::done) return received;
        wire.received += received.size;
        stream_.replace_input({begin, rest.size() + received.size});
        return stream_.read(data, size, max_records);
    }

    // Sends the ciphertext. would_block: a part of it waits until the socket is writable.
    IoResult flush(Socket& socket, WireCount& wire) {
        while (wants_write()) {
            const std::string_view output = stream_.output();
            const IoResult sent = socket.send(&output, 1);
            wire.sent += sent.size;
            stream_.consume(sent.size);
            batch_ciphertext_ -= (std::min)(batch_ciphertext_, sent.size);
            if (sent.outcome == IoResult::Outcome::error) return {sent.outcome, 0, sent.error};
            if (sent.size < output.size()) return {IoResult::Outcome::would_block};
        }
        return {IoResult::Outcome::done};
    }

    // Encrypts and sends batch by batch. When the kernel accepts no more, the ciphertext of at most one batch is
    // pending; its plaintext does not count as sent until the ciphertext is sent.
    IoResult encrypt(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount& wire) {
        PieceCursor rest{pieces, count};
        std::size_t done = 0;
        if (!stream_.established()) stream_.handshake();
        for (;;) {
            IoResult flushed = flush(socket, wire);
            if (flushed.outcome == IoResult::Outcome::done && !rest.empty()) {
                rest.skip(encrypted_);
                done += std::exchange(encrypted_, 0u);
            }
            flushed.size = done;
            if (flushed.outcome != IoResult::Outcome::done || rest.empty() || !stream_.established()) return flushed;
            if (!encrypt_batch(rest)) {
                const bool failed = !stream_.failure().empty();
                return {failed ? IoResult::Outcome::error : IoResult::Outcome::would_block, done};
            }
        }
    }

    // A position in a list of pieces.
    struct PieceCursor {
        const std::string_view* pieces;
        std::size_t count;
        std::size_t offset = 0;  // in the first piece

        bool empty() const { return count == 0; }
        std::string_view first() const { return pieces->substr(offset); }
        void skip(std::size_t n) {
            for (; count != 0 && n >= first().size(); ++pieces, --count, offset = 0) n -= first().size();
            offset += n;
        }
    };

    // Returns false if the stream accepts nothing.
    bool encrypt_batch(PieceCursor rest) {
        while (!rest.empty() && encrypted_ < batch) {
            const std::string_view record = next_record(rest);
            if (stream_.write(record).outcome != IoResult::Outcome::done) break;
            rest.skip(record.size());
            encrypted_ += record.size();
        }
        batch_ciphertext_ = stream_.output().size();  // it was empty
        return encrypted_ != 0;
    }
    // Joins small pieces to one record. Copies nothing if the record is a part of one piece.
    std::string_view next_record(PieceCursor rest) {
        const std::string_view first = rest.first().substr(0, TlsStream::max_record);
        if (first.size() == TlsStream::max_record || rest.count == 1) return first;
        char* const record = buffers_->record.data();
        std::size_t size = 0;
        while (!rest.empty() && size < TlsStream::max_record) {
            const std::string_view part = rest.first().substr(0, TlsStream::max_record - size);
            std::memcpy(record + size, part.data(), part.size());
            size += part.size();
            rest.skip(part.size());
        }
        return {record, size};
    }

    std::shared_ptr<TlsBuffers> buffers_;
    TlsStream stream_;
    TokenBucket control_records_;
    std::size_t encrypted_ = 0;         // plaintext bytes whose ciphertext is pending
    std::size_t batch_ciphertext_ = 0;  // of these, at the front of the stream's output
    bool borrowed_ = false;
};

// Makes the TLS transports of one listener.
class TlsListener final : public TransportFactory {
public:
    explicit TlsListener(TlsOptions options)
        : options_(std::move(options)), context_(std::make_shared<const TlsContext>(options_)) {}

    std::unique_ptr<Transport> make() override { return std::make_unique<TlsTransport>(buffers_, context_); }
    void reload() override { context_ = std::make_shared<const TlsContext>(options_); }

private:
    TlsOptions options_;
    std::shared_ptr<const TlsContext> context_;
    std::shared_ptr<TlsBuffers> buffers_ = std::make_shared<TlsBuffers>();
};

}  // namespace detail

WSCHAT_END

#endif  // WSCHAT_OPENSSL

// ====================================================================================================================
// section 12: Loop
//
// The event loop of one thread. Each turn waits for sockets, calls their owners, runs timers and posted work, and ends
// with the server's hook. It does not know what the owners do.
// ====================================================================================================================

#include <atomic>
#include <csignal>
#include <mutex>

WSCHAT_BEGIN

namespace detail {

// A callback that is due at a time. Its owner keeps it alive; a Timers heap contains it at most once.
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
    std::size_t index_ = none;  // in the heap
};

// A binary heap of timers. Each timer stores its index, so that schedule() and cancel() cost O(log n).
class Timers {
public:
    // Sets or moves the timer. Time::max() cancels it.
    void schedule(Timer& timer, Time due) {
        if (due == (Time::max)()) return cancel(timer);
        if (!timer.scheduled()) {
            heap_.push_back(&timer);
            timer.index_ = heap_.size() - 1;
        }
        timer.due_ = due;
        sift(timer.index_);
    }
    WSCHAT_NOINLINE void cancel(Timer& timer) {
        if (!timer.scheduled()) return;
        const std::size_t index = std::exchange(timer.index_, Timer::none);
        Timer* last = heap_.back();
        heap_.pop_back();
        if (last == &timer) return;
        place(index, last);
        sift(index);
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
    void place(std::size_t index, Timer* timer) {
        heap_[index] = timer;
        timer->index_ = index;
    }
    // Moves the timer up or down until the heap is in order.
    WSCHAT_NOINLINE void sift(std::size_t index) {
        Timer* timer = heap_[index];
        for (; index != 0 && timer->due_ < heap_[(index - 1) / 2]->due_; index = (index - 1) / 2)
            place(index, heap_[(index - 1) / 2]);
        for (;;) {
            std::size_t child = 2 * index + 1;
            if (child >= heap_.size()) break;
            if (child + 1 < heap_.size() && heap_[child + 1]->due_ < heap_[child]->due_) ++child;
            if (!(heap_[child]->due_ < timer->due_)) break;
            place(index, heap_[child]);
            index = child;
        }
        place(index, timer);
    }

    std::vector<Timer*> heap_;
};

// While at least one guard exists, SIGINT and SIGTERM (on Windows: Ctrl-C and closing the console) only write their
// number to the wake-up pipe of each guard. The last guard restores what the signals did before.
class SignalGuard {
public:
    explicit SignalGuard(os::Descriptor wake) : wake_(wake) {
        const std::lock_guard<std::mutex> lock(mutex_);
        next_.store(first_.load());
        first_.store(this);
        if (next_.load() == nullptr) install();
    }
    SignalGuard(const SignalGuard&) = delete;
    SignalGuard& operator=(const SignalGuard&) = delete;
    ~SignalGuard() {
        const std::lock_guard<std::mutex> lock(mutex_);
        Link* link = &first_;
        while (link->load() != this) link = &link->load()->next_;
        if (link == &first_ && next_.load() == nullptr) restore();
        link->store(next_.load());
        // A handler on another thread may still use this guard and its descriptor.
        while (running_handlers_.load() != 0) os::yield();
    }

private:
    using Link = std::atomic<SignalGuard*>;

    // Takes no lock: a signal may interrupt a thread that holds it.
    static void wake_all(int signal) {
        ++running_handlers_;
        for (const SignalGuard* guard = first_.load(); guard != nullptr; guard = guard->next_.load())
            WakeUp::wake(guard->wake_, static_cast<char>(signal));
        --running_handlers_;
    }

#if defined(_WIN32)
    static BOOL WINAPI handle(DWORD event) {
        const bool may_return = event == CTRL_C_EVENT || event == CTRL_BREAK_EVENT;
        if (!may_return) closing_.store(true);
        wake_all(SIGINT);
        // The console closes, or the user logs off: Windows ends the process when this function returns, or after some
        // seconds. The program ends it earlier, when it has said goodbye to its clients.
        while (!may_return) ::Sleep(INFINITE);
        return TRUE;
    }
    static void install() { ::SetConsoleCtrlHandler(&handle, TRUE); }
    // The system holds a lock while handle() runs.
    static void restore() {
        if (!closing_.load()) ::SetConsoleCtrlHandler(&handle, FALSE);
    }

    static inline std::atomic<bool> closing_{false};
#else
    static void handle(int signal) {
        const int saved_errno = errno;
        wake_all(signal);
        errno = saved_errno;
    }
    static void install() {
        struct sigaction action {};
        action.sa_handler = &handle;
        action.sa_flags = SA_RESTART;
        sigemptyset(&action.sa_mask);  // a macro on some systems
        ::sigaction(SIGTERM, &action, &saved_sigterm_);
        // An ignored SIGINT stays ignored: a shell ignores it for a program that it starts in the background.
        ::sigaction(SIGINT, nullptr, &saved_sigint_);
        if (saved_sigint_.sa_handler != SIG_IGN) ::sigaction(SIGINT, &action, nullptr);
    }
    static void restore() {
        ::sigaction(SIGINT, &saved_sigint_, nullptr);
        ::sigaction(SIGTERM, &saved_sigterm_, nullptr);
    }

    static inline struct sigaction saved_sigint_ {};
    static inline struct sigaction saved_sigterm_ {};
#endif

    static inline std::mutex mutex_;  // for changes of the list and of the signals
    static inline Link first_{nullptr};
    static inline std::atomic<int> running_handlers_{0};

    os::Descriptor wake_;
    Link next_{nullptr};
};

// Rounds up to the clock's tick. A value outside the range of Duration becomes its minimum or maximum. NaN is an Error.
template <class Rep, class Period>
Duration to_clock_duration(std::chrono::duration<Rep, Period> duration, const char* name) {
    const long double ticks = std::chrono::duration<long double, Duration::period>(duration).count();
    if (!(ticks >= 0 || ticks < 0)) throw Error(std::string(name) + " is not a number");
    if (ticks >= static_cast<long double>((Duration::max)().count())) return (Duration::max)();
    if (ticks <= static_cast<long double>((Duration::min)().count())) return (Duration::min)();
    const Duration truncated(static_cast<Duration::rep>(ticks));
    return static_cast<long double>(truncated.count()) < ticks ? truncated + Duration(1) : truncated;
}

class LoopAccess;

}  // namespace detail

// The event loop of one thread: sockets, timers and posted work. Other threads may call only post(), mailbox() and
// on_loop_thread().
class Loop {
public:
    using TimerId = std::uint64_t;

    WSCHAT_COLD explicit Loop(PollerKind kind = PollerKind::automatic)
        : poller_(detail::Poller::make(kind)),
          mailbox_(std::make_shared<LoopMailbox>()),
          waker_(*this),
          now_(poller_->now()) {
        if (!poller_->add(mailbox_->wake_up.descriptor(), waker_, true, false))
            throw Error("Loop: " + std::string(poller_->name()) + ": " +
                        detail::os::error_text(detail::os::last_error()));
    }
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;
    WSCHAT_COLD ~Loop() { mailbox_->close(); }

    // Runs turns until stop() is called. Throws an Error if the loop is running already.
    void run() {
        const Running running(*this, "run");
        stop_ = false;
        while (!stop_) turn(now_, (Duration::max)());
        stop_ = false;
    }
    // Ends run() after this turn. Call it on the loop's thread; other threads post() the call.
    void stop() { stop_ = true; }

    // ---- in the event loop of another program ----------------------------------------------------------------------

    // Runs one turn, instead of run(). If there is nothing to do, it waits for this time at most, rounded up to a
    // millisecond; a negative time counts as zero. Returns false if stop() was called since the last turn. What
    // callbacks throw does not leave it. Throws an Error if the loop is running already: in a callback.
    bool poll(Duration timeout = Duration::zero()) {
        const Running running(*this, "poll");
        turn((std::max)(now_, timers_.next()), timeout);
        const Time end = clock();
        note_span(now_, now_, end);
        now_ = end;
        return !std::exchange(stop_, false);
    }
    // An epoll or kqueue descriptor that is readable while a socket, posted work or a signal needs poll(). Only wait
    // for it, level-triggered; do not read it. Throws an Error if the poller has none: with PollerKind::poll, and on
    // Windows.
    int descriptor() const {
        const auto descriptor = poller_->descriptor();
        if (descriptor == detail::os::no_descriptor)
            throw Error("descriptor: the poller \"" + std::string(poller_->name()) +
                        "\" has no descriptor to wait for: call poll() at intervals");
        return static_cast<int>(descriptor);
    }
    // The time until poll() has something to do although descriptor() is not readable: until the next timer, or zero if
    // work is left. Duration::max() if there is none. Ask again before each wait, because any call may change it.
    Duration next_timeout() const { return next_timeout(clock()); }

    // ---- work and timers -------------------------------------------------------------------------------------------

    // Runs the work on the loop's thread, in the order of the calls. Any thread may call post(). `work` is any callable
    // without arguments; it may be move-only. The server logs the exceptions that it throws.
    bool post(detail::Task work) { return mailbox_->post(std::move(work)); }
    // A mailbox for threads that may outlive the loop.
    std::shared_ptr<Mailbox> mailbox() const { return mailbox_; }

    // Calls the callback once, after the delay, in a later turn. Delays are rounded up to the clock's tick; a negative
    // delay counts as zero; NaN is an Error. The callback may be move-only.
    template <class Rep, class Period>
    TimerId call_later(std::chrono::duration<Rep, Period> delay, detail::Task callback) {
        return add_call(detail::to_clock_duration(delay, "call_later: the delay"), Duration::zero(),
                        std::move(callback));
    }
    // Calls the callback after each interval. If the loop is late, missed calls are skipped. NaN and an interval that
    // is not positive are Errors.
    template <class Rep, class Period>
    TimerId call_every(std::chrono::duration<Rep, Period> interval, detail::Task callback) {
        const Duration rounded = detail::to_clock_duration(interval, "call_every: the interval");
        if (rounded <= Duration::zero()) throw Error("call_every: the interval is not positive");
        return add_call(rounded, rounded, std::move(callback));
    }
    // Returns false if the call is over or cancelled.
    bool cancel(TimerId id) { return calls_.erase(big_endian_key(id)); }

    // The time at which this turn began. Between turns, the current time.
    Time now() const { return thread_.load(std::memory_order_relaxed) == nullptr ? clock() : now_; }
    // Returns true on the loop's thread. While the loop does not run, returns true on every thread.
    bool on_loop_thread() const {
        const void* thread = thread_.load(std::memory_order_relaxed);
        return thread == nullptr || thread == this_thread();
    }

private:
    friend class detail::LoopAccess;

    class LoopMailbox final : public Mailbox {
    public:
        bool post(detail::Task work) override {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!open_) return false;
            work_.push_back(std::move(work));
            if (!has_work.exchange(true)) detail::WakeUp::wake(wake_up.write_end(), 0);
            return true;
        }
        std::vector<detail::Task> take_all() {
            const std::lock_guard<std::mutex> lock(mutex_);
            has_work.store(false);
            return std::exchange(work_, {});
        }
        void close() {
            std::vector<detail::Task> discarded;  // destroyed after the lock is released
            const std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;
            discarded.swap(work_);
        }

        detail::WakeUp wake_up;
        std::atomic<bool> has_work{false};

    private:
        std::mutex mutex_;
        std::vector<detail::Task> work_;
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

    // The timer of a call_later() or call_every().
    class Call final : public detail::Timer {
    public:
        Call(Loop& loop, TimerId id, Time due, Duration interval, detail::Task callback)
            : loop_(loop), id_(id), interval_(interval), callback_(std::move(callback)) {
            loop_.timers_.schedule(*this, due);
        }
        ~Call() override { loop_.timers_.cancel(*this); }
        void on_timer(Time now) override {
            // The callback may cancel this call, which destroys *this.
            Loop& loop = loop_;
            const std::string id = big_endian_key(id_);
            detail::Task callback = std::move(callback_);
            if (interval_ == Duration::zero()) loop.calls_.erase(id);
            else loop.timers_.schedule(*this, (std::max)(due() + interval_, now + Duration(1)));
            loop.guarded("timer", callback);
            if (Call* call = loop.calls_.find(id)) call->callback_ = std::move(callback);
        }

    private:
        Loop& loop_;
        TimerId id_;
        Duration interval_;  // zero: call once
        detail::Task callback_;
    };

    WSCHAT_NOINLINE Time clock() const { return poller_->now(); }

    // Marks the thread that runs the loop.
    class Running {
    public:
        Running(Loop& loop, const char* call) : loop_(loop) {
            const void* nobody = nullptr;
            if (!loop.thread_.compare_exchange_strong(nobody, this_thread()))
                throw Error(std::string(call) + ": the loop is running already");
        }
        Running(const Running&) = delete;
        Running& operator=(const Running&) = delete;
        ~Running() { loop_.thread_.store(nullptr); }

    private:
        Loop& loop_;
    };

    // The address of a thread_local identifies the thread.
    static const void* this_thread() {
        static thread_local char marker;
        return &marker;
    }

    // `due` is after now_: a callback that schedules itself again without a delay must not run twice in one turn.
    TimerId add_call(Duration delay, Duration interval, detail::Task callback) {
        const TimerId id = ++last_call_;
        const Time due = (std::max)(saturating_add(clock(), (std::max)(delay, Duration::zero())), now_ + Duration(1));
        calls_.find_or_emplace(big_endian_key(id), *this, id, due, interval, std::move(callback));
        return id;
    }

    // The loop expects to begin the turn at `expected` or earlier.
    void turn(Time expected, Duration max_wait) {
        const Time begin = clock();
        note_span(now_, expected, begin);
        const int timeout = timeout_ms((std::min)(next_timeout(begin), max_wait));
        try {
            poller_->wait(timeout, ready_);
        } catch (const std::bad_alloc&) {  // the next wait() reports the missing entries
        }
        now_ = clock();
        if (timeout >= 0) note_span(begin, begin + std::chrono::milliseconds(timeout), now_);
        for (const detail::Poller::Ready& ready : ready_)
            guarded("loop", [&] { ready.owner->on_ready(ready.readable, ready.writable, ready.broken); });
        timers_.run_due(now_);
        if (mailbox_->has_work.load())
            for (detail::Task& work : mailbox_->take_all()) guarded("post", work);
        poll_again_ = at_turn_end_ && at_turn_end_();
    }

    // Work, a wait or a pause of the program that ends more than a second later than expected, for example because the
    // process was stopped, counts as time in which the loop did not poll. Nobody knows when a late wait was stopped, so
    // all of it counts.
    void note_span(Time begin, Time expected, Time end) {
        if (end > saturating_add(expected, std::chrono::seconds(1))) away_ += end - begin;
    }

    Duration next_timeout(Time now) const {
        if (poll_again_ || stop_ || mailbox_->has_work.load()) return Duration::zero();
        if (timers_.next() == (Time::max)()) return (Duration::max)();
        return (std::max)(timers_.next() - now, Duration::zero());
    }
    // Rounds up: rounding down would spin until the timer is due.
    static int timeout_ms(Duration wait) {
        if (wait <= Duration::zero()) return 0;
        if (wait == (Duration::max)()) return -1;
        return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>((std::min)(wait, max_timeout)).count());
    }

    void guarded(const char* where, detail::FunctionRef<> function) {
        detail::run_guarded(function, [&](const char* what) {
            if (on_exception_) on_exception_(where, what);
        });
    }

    static constexpr Duration max_timeout = std::chrono::minutes(1);

    std::unique_ptr<detail::Poller> poller_;
    std::shared_ptr<LoopMailbox> mailbox_;
    Waker waker_;
    detail::Timers timers_;
    StringMap<Call> calls_;  // by TimerId
    TimerId last_call_ = 0;
    std::vector<detail::Poller::Ready> ready_;
    Time now_;
    Duration away_{};  // LoopAccess::away()
    std::atomic<const void*> thread_{nullptr};
    bool stop_ = false;
    bool poll_again_ = false;
    std::function<bool()> at_turn_end_;
    std::function<void(int)> on_signal_;
    std::function<void(const char*, const char*)> on_exception_;
    void* owner_ = nullptr;
};

namespace detail {

// The members of Loop that only the server (and tests) may use.
class LoopAccess {
public:
    static Poller& poller(Loop& loop) { return *loop.poller_; }
    static Timers& timers(Loop& loop) { return loop.timers_; }
    static os::Descriptor wake_descriptor(const Loop& loop) { return loop.mailbox_->wake_up.write_end(); }
    // Replaces the poller before anything is added to it. One that never blocks need not watch the wake-up pipe.
    static void set_poller(Loop& loop, std::unique_ptr<Poller> poller) {
        loop.poller_ = std::move(poller);
        loop.now_ = loop.poller_->now();
    }
    // The sum of all times in which the loop did not poll: it was stopped, or a callback took more than a second. A
    // deadline of a peer can leave it out.
    static Duration away(const Loop& loop) { return loop.away_; }
    // The next turn does not wait.
    static void poll_again(Loop& loop) { loop.poll_again_ = true; }
    // Calls the hook at the end of each turn. If it returns true, the next turn does not wait.
    static void at_turn_end(Loop& loop, std::function<bool()> hook) { loop.at_turn_end_ = std::move(hook); }
    static void on_signal(Loop& loop, std::function<void(int)> handler) { loop.on_signal_ = std::move(handler); }
    // Calls the handler with each exception that leaves posted work or a timer.
    static void on_exception(Loop& loop, std::function<void(const char* where, const char* what)> handler) {
        loop.on_exception_ = std::move(handler);
    }
    // The object whose hooks these are: the worker of a server; null if there is none.
    static void set_owner(Loop& loop, void* owner) { loop.owner_ = owner; }
    static void* owner(const Loop& loop) { return loop.owner_; }
};

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 13: Site
//
// What is served, the same for every loop: routes, pages, files, and the policies on origins, hosts and proxies. Plain
// values that several loops can share. Does not know connections.
// ====================================================================================================================

#include <deque>
#include <tuple>

WSCHAT_BEGIN
namespace detail {

// ---- patterns ------------------------------------------------------------------------------------------------------

// The path of a route or a page: "/chat/{room}" matches "/chat/tea%20room" with room = "tea room". A parameter matches
// one segment that is not empty. "{name...}" at the end matches the rest of the path, which may be empty.
class Pattern {
public:
    // Throws an Error that names `call` if the text is not a pattern.
    WSCHAT_COLD Pattern(const char* call, std::string_view pattern) : text_(pattern) {
        const std::string quoted = std::string(call) + " \"" + std::string(pattern) + "\": ";
        if (!text::starts_with(pattern, "/")) throw Error(quoted + "a path begins with a slash");
        std::string_view rest = pattern.substr(1);
        for (bool more = true; more;) {
            if (open_ended_) throw Error(quoted + "nothing follows a {name...}");
            std::string segment(cut_segment(rest, more));
            const bool param = segment.size() > 2 && segment.front() == '{' && segment.back() == '}';
            if (param) segment = segment.substr(1, segment.size() - 2);
            open_ended_ = param && segment.size() >= 3 && segment.substr(segment.size() - 3) == "...";
            if (open_ended_) segment.resize(segment.size() - 3);
            if (segment.find_first_of("{}?#%") != std::string::npos || (param && segment.empty()))
                throw Error(quoted + "a segment is plain text, one {name} or, at the end, one {name...}");
            segments_.push_back({param, std::move(segment)});
        }
    }

    const std::string& text() const { return text_; }

    // Stops at the first difference and allocates nothing.
    bool matches(std::string_view raw_path) const {
        if (!text::starts_with(raw_path, "/")) return false;
        std::string_view rest = raw_path.substr(1);
        bool more = true;
        for (const Segment& segment : segments_) {
            if (!more) return false;
            if (open_ended_ && &segment == &segments_.back()) return true;
            if (segment.param ? cut_segment(rest, more).empty() : !cut_literal(rest, more, segment.text)) return false;
        }
        return !more;
    }

    // The parameters of a path that matches, decoded.
    std::vector<std::pair<std::string, std::string>> params(std::string_view raw_path) const {
        std::vector<std::pair<std::string, std::string>> result;
        std::string_view rest = raw_path.substr(1);
        bool more = true;
        for (const Segment& segment : segments_) {
            const bool last = open_ended_ && &segment == &segments_.back();
            const std::string_view raw = last ? rest : cut_segment(rest, more);
            if (segment.param) result.emplace_back(segment.text, text::percent_decode(raw).value_or(std::string()));
        }
        return result;
    }

    // The segments that "{name...}" matched, each decoded by itself.
    std::vector<std::string> tail(std::string_view raw_path) const {
        std::vector<std::string> result;
        std::string_view rest = raw_path.substr(1);
        bool more = true;
        for (std::size_t i = 1; i < segments_.size(); ++i) cut_segment(rest, more);
        while (more) result.push_back(text::percent_decode(cut_segment(rest, more)).value_or(std::string()));
        return result;
    }

    // If several patterns match, the one with the highest rank wins: more plain text first, open-ended ones last.
    std::size_t rank() const {
        std::size_t rank = open_ended_ ? 0 : 1000;
        for (const Segment& segment : segments_) rank += segment.param ? 1 : 2;
        return rank;
    }
    // Whether both match the same paths.
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

    // Cuts off the first segment and its slash. `more`: another segment follows, which may be empty.
    static std::string_view cut_segment(std::string_view& path, bool& more) {
        const std::size_t size = path.size();
        const std::string_view segment = text::consume_until(path, '/');
        more = segment.size() != size;
        return segment;
    }
    // The same if the first segment, decoded, is that text.
    static bool cut_literal(std::string_view& path, bool& more, std::string_view literal) {
        std::size_t at = 0;
        for (const char expected : literal) {
            if (at == path.size()) return false;
            char c = path[at++];
            if (c == '%' && path.size() - at >= 2) {
                c = static_cast<char>(text::hex_value(path[at]) * 16 + text::hex_value(path[at + 1]));
                at += 2;
            }
            if (c != expected) return false;
        }
        more = at != path.size();
        if (more && path[at] != '/') return false;
        path.remove_prefix(more ? at + 1 : at);
        return true;
    }

    std::string text_;
    std::vector<Segment> segments_;
    bool open_ended_ = false;
};

// Entries that have a pattern(), the highest rank first.
template <class Entry>
class PatternMap {
public:
    // Throws an Error if an entry matches the same paths already.
    template <class... Arguments>
    Entry& add(const char* what, const Pattern& pattern, Arguments&&... arguments) {
        if (find_same(pattern) != nullptr) throw Error(std::string(what) + " \"" + pattern.text() + "\": given twice");
        const std::string key = big_endian_key(~std::uint64_t{pattern.rank()}) + big_endian_key(entries_.size());
        return entries_.find_or_emplace(key, pattern, std::forward<Arguments>(arguments)...);
    }
    // The entry with an equal pattern, or null.
    Entry* find_same(const Pattern& pattern) {
        for (auto&& [key, entry] : entries_)
            if (entry.pattern() == pattern) return &entry;
        return nullptr;
    }
    // The entry for a path, or null.
    const Entry* find(std::string_view raw_path) const {
        for (const auto& [key, entry] : entries_)
            if (entry.pattern().matches(raw_path)) return &entry;
        return nullptr;
    }

private:
    StringMap<Entry> entries_;
};

// ---- files ---------------------------------------------------------------------------------------------------------

}  // namespace detail

// What static_dir() does with symbolic links below its folder. `inside`: a link is followed if what it leads to is also
// below the folder, as in the volumes of Kubernetes.
enum class SymbolicLinks : std::uint8_t { refuse, inside };

namespace detail {

// Whether Windows reads the name as a device in any folder: CON, NUL, COM1, also "nul.txt" and "NUL .txt".
inline bool is_windows_device(std::string_view name) {
    std::string_view stem = name.substr(0, name.find_first_of(".:"));
    while (!stem.empty() && stem.back() == ' ') stem.remove_suffix(1);
    for (const std::string_view device : {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"})
        if (text::equals_ignore_case(stem, device)) return true;
    const std::string_view port = stem.substr(0, 3), digit = stem.substr(port.size());
    if (!text::equals_ignore_case(port, "COM") && !text::equals_ignore_case(port, "LPT")) return false;
    // The digits 1, 2 and 3 may be superscript.
    return (digit.size() == 1 && text::is_digit(digit.front())) || digit == "\xC2\xB9" || digit == "\xC2\xB2" ||
           digit == "\xC2\xB3";
}

// A regular file, open for reading. Does not open folders, devices or pipes.
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

    // root/names[0]/names[1]/...; never outside of the root, never a hidden file, no symbolic link unless it may be
    // followed.
    static File beneath(const std::string& root, const std::vector<std::string>& names, SymbolicLinks links) {
        for (const std::string& name : names)
            if (!plain_name(name)) return File(-1, ENOENT);
        const bool follow = links == SymbolicLinks::inside;
#if defined(_WIN32)
        for (const std::string& name : names)
            if (is_windows_device(name)) return File(-1, ENOENT);
        return opened(os::open_file_beneath(root, names, follow));
#else
        return follow ? beneath_resolved(root, names) : opened(os::open_file_beneath(root, names));
#endif
    }

    explicit operator bool() const { return file_ >= 0; }
    int error() const { return error_; }  // the errno if it could not be opened
    std::uint64_t size() const { return size_; }
    std::int64_t modified_seconds() const { return modified_ns_ / 1'000'000'000; }
    // RFC 9110 8.8.3: a strong validator from the size and the time in nanoseconds.
    std::string etag() const {
        char text[64];
        std::snprintf(text, sizeof text, "\"%llx-%llx\"", static_cast<unsigned long long>(size_),
                      static_cast<unsigned long long>(modified_ns_));
        return text;
    }
    // False if the system refuses.
    bool seek(std::uint64_t offset) { return os::seek_file(file_, offset); }
    // Returns 0 at the end and on an error.
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
        if (!known || !os::is_file(status)) {
            error_ = !known ? errno : os::is_directory(status) ? EISDIR : ENOENT;
            close();
            return;
        }
        size_ = static_cast<std::uint64_t>(status.st_size);
        modified_ns_ = os::modified_ns(status);
    }

#if !defined(_WIN32)
    // Resolves the links first, and then opens what they lead to without following any: it cannot leave the root, even
    // if links change meanwhile.
    WSCHAT_COLD static File beneath_resolved(const std::string& root, const std::vector<std::string>& names) {
        std::string path = root;
        for (const std::string& name : names) (path += '/') += name;
        path = os::absolute_path(path);
        const std::string real_root = os::absolute_path(root), prefix = real_root + (real_root == "/" ? "" : "/");
        if (!text::starts_with(path, prefix)) return File(-1, ENOENT);
        std::vector<std::string> resolved;
        for (std::string_view rest = std::string_view(path).substr(prefix.size()); !rest.empty();)
            resolved.emplace_back(text::consume_until(rest, '/'));
        return opened(os::open_file_beneath(real_root, resolved));
    }
#endif
    // Refuses "..", hidden files, separators of every system, and names that Windows reads as a device or a stream.
    // RFC 8615: "/.well-known/" is public.
    static bool plain_name(const std::string& name) {
        return !name.empty() && (name.front() != '.' || name == ".well-known") &&
               name.find_first_of(std::string_view("/\\:\0", 4)) == std::string::npos && name.back() != ' ' &&
               name.back() != '.';
    }

    int file_ = -1;
    int error_ = 0;
    std::uint64_t size_ = 0;
    std::int64_t modified_ns_ = 0;
};

// The media type for the extension of a file name.
WSCHAT_COLD inline std::string_view content_type(std::string_view name) {
    // "extension type" in each entry; text types get a charset.
    constexpr std::string_view types[] = {"html text/html",        "htm text/html",
                                          "css text/css",          "js text/javascript",
                                          "mjs text/javascript",   "txt text/plain",
                                          "md text/markdown",      "csv text/csv",
                                          "json application/json", "map application/json",
                                          "yaml application/yaml", "xml application/xml",
                                          "cbor application/cbor", "wasm application/wasm",
                                          "pdf application/pdf",   "webmanifest application/manifest+json",
                                          "svg image/svg+xml",     "png image/png",
                                          "jpg image/jpeg",        "jpeg image/jpeg",
                                          "gif image/gif",         "webp image/webp",
                                          "avif image/avif",       "ico image/x-icon",
                                          "woff2 font/woff2",      "woff font/woff",
                                          "ttf font/ttf",          "mp3 audio/mpeg",
                                          "ogg audio/ogg",         "opus audio/ogg",
                                          "wav audio/wav",         "m4a audio/mp4",
                                          "mp4 video/mp4",         "webm video/webm"};
    const std::size_t dot = name.rfind('.');
    for (const std::string_view entry : types) {
        const std::size_t space = entry.find(' ');
        if (dot != std::string_view::npos && text::equals_ignore_case(name.substr(dot + 1), entry.substr(0, space)))
            return entry.substr(space + 1);
    }
    return "application/octet-stream";
}

// The parts of an HTTP date by the letters of its form: w (weekday, of any length), d, b (month), y, h, m, s.
struct HttpDateParts {
    int d = 0, y = 0, h = 0, m = 0, s = 0;
    std::string b;

    // Returns true if the text has the form. A digit of the day may be a space.
    bool match(std::string_view date, std::string_view form) {
        *this = {};
        const std::string_view letters = "dyhms";
        int* const numbers[] = {&d, &y, &h, &m, &s};
        for (const char kind : form) {
            const std::size_t number = letters.find(kind);
            if (kind == 'w') {
                const std::size_t size = date.find_first_of(", ");
                if (size == 0 || size == std::string_view::npos) return false;
                date.remove_prefix(size);
                continue;
            }
            if (date.empty()) return false;
            const char c = date.front();
            date.remove_prefix(1);
            if (kind == 'b') b += c;
            else if (number == std::string_view::npos ? c != kind : !text::is_digit(c) && (kind != 'd' || c != ' '))
                return false;
            else if (number != std::string_view::npos && c != ' ') *numbers[number] = *numbers[number] * 10 + (c - '0');
        }
        return date.empty();
    }
    bool valid() const { return d >= 1 && d <= 31 && h < 24 && m < 60 && s <= 60; }  // 60: a leap second
};

// The Unix time of an HTTP date in one of the three forms of RFC 9110 5.6.7, or nothing.
WSCHAT_COLD inline std::optional<std::int64_t> parse_http_date(std::string_view date) {
    HttpDateParts parts;
    const bool two_digits = parts.match(date, "w, dd-bbb-yy hh:mm:ss GMT");
    if (!two_digits && !parts.match(date, "w, dd bbb yyyy hh:mm:ss GMT") &&
        !parts.match(date, "w bbb dd hh:mm:ss yyyy"))
        return std::nullopt;
    const int year = two_digits ? parts.y + (parts.y < 70 ? 2000 : 1900) : parts.y;
    const std::size_t index = std::string_view("JanFebMarAprMayJunJulAugSepOctNovDec").find(parts.b);
    if (index == std::string_view::npos || index % 3 != 0 || !parts.valid()) return std::nullopt;
    // Days since 1970-03-01 of a calendar that begins in March, so that the leap day is the last of its year.
    const auto m = static_cast<std::int64_t>(index / 3);
    const std::int64_t y = m < 2 ? year - 1 : year;
    const std::int64_t days =
        365 * y + y / 4 - y / 100 + y / 400 + (153 * (m < 2 ? m + 10 : m - 2) + 2) / 5 + parts.d - 719469;
    return days * 86400 + parts.h * 3600 + parts.m * 60 + parts.s;
}

// Whether the client's copy is current. RFC 9110 13.1.3: "A recipient MUST ignore If-Modified-Since if the request
// contains an If-None-Match header field".
inline bool not_modified(const Request& request, const std::string& etag, std::int64_t modified_seconds) {
    if (request.fields().find("if-none-match")) {
        bool match = false;
        request.fields().each_element("if-none-match", [&](std::string_view tag) {
            if (text::starts_with(tag, "W/")) tag.remove_prefix(2);
            match = match || tag == "*" || tag == etag;
        });
        return match;
    }
    const auto since = parse_http_date(request.header("if-modified-since"));
    return since && *since >= modified_seconds;
}

}  // namespace detail

#if WSCHAT_OPENSSL
// Cookies that a client can read but not change, in the format of Tornado's set_signed_cookie() (version 2): the value,
// its name and the time are signed with HMAC-SHA256. Both programs read the cookies of the other.
class CookieSigner {
public:
    // The first key signs, and each of them is accepted: to replace a key, put a new one before it. Throws an Error for
    // a key of less than 16 bytes. `openssl rand -base64 32` makes a good one.
    explicit CookieSigner(std::vector<std::string> keys) : keys_(std::move(keys)) {
        for (const std::string& key : keys_)
            if (key.size() < 16) throw Error("CookieSigner: a key has less than 16 bytes");
        if (keys_.empty()) throw Error("CookieSigner: there is no key");
    }
    explicit CookieSigner(std::string key) : CookieSigner(std::vector<std::string>{std::move(key)}) {}

    // Sets the cookie. `value` may have any bytes.
    void set(Response& response, std::string_view name, std::string_view value,
             const CookieOptions& options = {}) const {
        response.set_cookie(name, sign(name, value), options);
    }
    // The value of the cookie. Nothing if the request has none, or it is older, forged, or signed for another name.
    std::optional<std::string> get(const Request& request, std::string_view name,
                                   std::chrono::seconds max_age = std::chrono::hours(31 * 24)) const {
        const auto cookie = request.cookie(name);
        return cookie ? decode(name, *cookie, max_age) : std::nullopt;
    }

    std::string sign(std::string_view name, std::string_view value, std::time_t now = std::time(nullptr)) const {
        const std::string encoded = base64(reinterpret_cast<const unsigned char*>(value.data()), value.size());
        const std::string text = "2|1:0|" + field(std::to_string(now)) + field(name) + field(encoded);
        return text + signature(keys_.front(), text);
    }
    std::optional<std::string> decode(std::string_view name, std::string_view text,
                                      std::chrono::seconds max_age = std::chrono::hours(31 * 24),
                                      std::time_t now = std::time(nullptr)) const {
        const std::size_t signed_size = text.rfind('|') + 1;
        const std::string_view signed_text = text.substr(0, signed_size), given = text.substr(signed_size);
        const auto matches = [&](const std::string& key) {
            const std::string expected = signature(key, signed_text);
            return given.size() == expected.size() &&
                   CRYPTO_memcmp(given.data(), expected.data(), expected.size()) == 0;
        };
        if (signed_size == 0 || !std::any_of(keys_.begin(), keys_.end(), matches)) return std::nullopt;
        // Only what was signed with a key comes here, so the fields are well formed, or another program's.
        std::string_view rest = signed_text;
        if (text::consume_until(rest, '|') != "2" || !next_field(rest)) return std::nullopt;
        const auto time = next_field(rest), its_name = next_field(rest), encoded = next_field(rest);
        const auto seconds = time ? text::parse_unsigned(*time, INT64_MAX) : std::nullopt;
        if (!seconds || !encoded || *its_name != name || !rest.empty()) return std::nullopt;
        const auto age = static_cast<std::int64_t>(now) - static_cast<std::int64_t>(*seconds);
        return age > max_age.count() ? std::nullopt : decode_base64(*encoded);
    }

private:
    static std::string field(std::string_view value) {
        return std::to_string(value.size()) + ":" + std::string(value) + "|";
    }
    static std::optional<std::string_view> next_field(std::string_view& rest) {
        const auto size = text::parse_unsigned(text::consume_until(rest, ':'), 4096);
        if (!size || rest.size() <= *size || rest[static_cast<std::size_t>(*size)] != '|') return std::nullopt;
        const std::string_view value = rest.substr(0, static_cast<std::size_t>(*size));
        rest.remove_prefix(value.size() + 1);
        return value;
    }
    static std::string signature(const std::string& key, std::string_view text) {
        unsigned char bytes[EVP_MAX_MD_SIZE];
        unsigned size = 0;
        if (HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
                 reinterpret_cast<const unsigned char*>(text.data()), text.size(), bytes, &size) == nullptr)
            throw std::bad_alloc();
        std::string hex;
        for (unsigned i = 0; i < size; ++i)
            for (const unsigned digit : {unsigned{bytes[i]} >> 4, unsigned{bytes[i]} & 15u})
                hex += "0123456789abcdef"[digit];
        return hex;
    }
    static std::optional<std::string> decode_base64(std::string_view base64_text) {
        std::string bytes(base64_text.size() / 4 * 3 + 3, '\0');
        const int size = EVP_DecodeBlock(reinterpret_cast<unsigned char*>(&bytes[0]),
                                         reinterpret_cast<const unsigned char*>(base64_text.data()),
                                         static_cast<int>(base64_text.size()));
        const auto padding = static_cast<std::size_t>(std::count(base64_text.begin(), base64_text.end(), '='));
        if (size < 0 || padding > 2 || static_cast<std::size_t>(size) < padding) return std::nullopt;
        bytes.resize(static_cast<std::size_t>(size) - padding);
        return bytes;
    }

    std::vector<std::string> keys_;
};
#endif

namespace detail {

inline std::string replace_name(std::string_view path, std::string_view name) {
    const std::size_t slash = path.find_last_of("/\\");
    return text::concat({path.substr(0, slash == std::string_view::npos ? 0 : slash + 1), name});
}

}  // namespace detail

// A path beside a source file: beside(__FILE__, "page.html"). If nothing is there, because the program runs where its
// source is not, the file of this name in the folder of the program.
inline std::string beside(std::string_view source_file, std::string_view name) {
    std::string path = detail::replace_name(source_file, name);
    if (detail::File{path}) return path;
    std::string beside_program = detail::replace_name(detail::os::executable_path(), name);
    return detail::File{beside_program} ? beside_program : path;
}

// ---- routes and pages ----------------------------------------------------------------------------------------------

// A WebSocket route; Server::route() makes it.
class Route {
public:
    using Factory = std::function<std::unique_ptr<WebSocketHandler>()>;

    Route(detail::Pattern pattern, Factory factory) : pattern_(std::move(pattern)), factory_(std::move(factory)) {}

    // Replaces all of ServerOptions::limits for new connections of this route; start from a copy of Server::limits().
    Route& set_limits(const Limits& limits) {
        limits_.push_back(limits);
        return *this;
    }
    // Null if the route has no limits of its own.
    const Limits* limits() const { return limits_.empty() ? nullptr : &limits_.back(); }
    const detail::Pattern& pattern() const { return pattern_; }
    std::unique_ptr<WebSocketHandler> make_handler() const { return factory_(); }

private:
    detail::Pattern pattern_;
    Factory factory_;
    std::deque<Limits> limits_;  // the last is current; open connections keep those that they began with
};

// What pages of other origins may do with the answers of this server: Server::allow_cors().
struct CorsOptions {
    std::string headers = "Content-Type, Authorization";  // that a request may carry
    bool credentials = false;                             // requests may carry cookies
    std::chrono::seconds max_age{600};                    // for which a browser remembers a preflight
};

namespace detail {

// What answers a request for a page: a response whose body is in memory, or a range of a file if that is open.
struct PageAnswer {
    Response response;
    File file{};
    std::uint64_t size = 0;  // of the range, from the file's position on
    int file_error = 0;      // the errno of a file that should be there; it is logged
    bool missing = false;    // there is no such file: Site::not_found answers, if it is set
};

// A request for a page, as the page's function sees it.
struct PageCall {
    const Request& request;
    const Pattern& pattern;
    const std::function<Reply()>& make_reply;  // for an answer that comes later; called at most once
};

// A pattern, and for each method the function that answers it. The function returns nothing if the answer comes later.
class Page {
public:
    using Function = std::function<std::optional<PageAnswer>(const PageCall&)>;

    explicit Page(Pattern pattern, bool folder = false) : pattern_(std::move(pattern)), folder_(folder) {}
    const Pattern& pattern() const { return pattern_; }
    bool folder() const { return folder_; }  // of static_dir()

    // False if the method has a function already.
    bool add(std::string_view method, Function function) {
        if (find_exactly(method) != nullptr) return false;
        methods_.push_back({std::string(method), std::move(function)});
        return true;
    }
    // Null if the page does not answer the method. GET answers HEAD too (RFC 9110 9.3.2).
    const Function* find(std::string_view method) const {
        const Function* found = find_exactly(method);
        return found == nullptr && method == "HEAD" ? find_exactly("GET") : found;
    }
    // For the header Allow.
    std::string allowed() const {
        std::string list;
        for (const auto& [method, function] : methods_) {
            list += method + ", ";
            if (method == "GET" && find_exactly("HEAD") == nullptr) list += "HEAD, ";
        }
        return list + (find_exactly("OPTIONS") == nullptr ? "OPTIONS" : "");
    }

private:
    const Function* find_exactly(std::string_view method) const {
        for (const auto& [known, function] : methods_)
            if (known == method) return &function;
        return nullptr;
    }

    Pattern pattern_;
    std::vector<std::pair<std::string, Function>> methods_;
    bool folder_;
};

// A 404 may be cached, so an error that can pass is a 503.
WSCHAT_COLD inline Response file_refusal(int error) {
    switch (error) {
        case EMFILE:
        case ENFILE: return Response(503, "The server is full.\n");
        case EINTR:
        case EAGAIN:
        case EIO:
        case ENOMEM:
        case EOVERFLOW: return Response(503, "The file cannot be read now.\n");
        default: return Response(404, "There is nothing at this path.\n");
    }
}
WSCHAT_COLD inline PageAnswer missing_file(int error, bool logged) {
    PageAnswer answer{file_refusal(error)};
    answer.file_error = logged ? error : 0;
    answer.missing = answer.response.status() == 404;
    return answer;
}

// RFC 9110 14: the bytes of a file that a request gets, from `first` to before `end`.
struct ByteRange {
    std::uint64_t first, end;
    bool partial;  // the request asks for this range. No byte of the file is in it if it is empty
};
// Several ranges, and ranges that are malformed, are answered with the whole file.
inline ByteRange requested_range(const Request& request, std::uint64_t size) {
    const ByteRange whole{0, size, false};
    std::string_view last = request.header("range");
    if (text::trim(text::consume_until(last, '=')) != "bytes") return whole;
    const std::string_view first = text::trim(text::consume_until(last, '-'));
    last = text::trim(last);
    const auto from = text::parse_unsigned(first, UINT64_MAX - 1), to = text::parse_unsigned(last, UINT64_MAX - 1);
    if ((!from && !first.empty()) || (!to && (!last.empty() || first.empty())) || (from && to && *to < *from))
        return whole;
    if (!from) return {size - (std::min)(size, *to), size, true};
    if (*from >= size) return {0, 0, true};
    return {*from, to ? (std::min)(*to + 1, size) : size, true};
}
// RFC 9110 13.1.5: "If-Range" names the copy that the client has a part of, by a strong tag or the exact date.
inline bool range_applies(const Request& request, const std::string& etag, std::int64_t modified_seconds) {
    const auto condition = request.fields().find("if-range");
    return !condition || *condition == etag || parse_http_date(*condition) == modified_seconds;
}

using Headers = std::vector<std::pair<std::string, std::string>>;

WSCHAT_COLD inline PageAnswer file_answer(File file, std::string_view type, const Request& request,
                                          const Headers& headers) {
    const std::string etag = file.etag();
    const bool unchanged = not_modified(request, etag, file.modified_seconds());
    ByteRange range{0, file.size(), false};
    if (!unchanged && request.method() == "GET" && range_applies(request, etag, file.modified_seconds()))
        range = requested_range(request, file.size());
    const bool satisfiable = range.first < range.end;
    PageAnswer answer{Response(unchanged ? 304 : !range.partial ? 200 : satisfiable ? 206 : 416)};
    answer.response.set_header("ETag", etag)
        .set_header("Last-Modified", http_date(file.modified_seconds()))
        .set_header("Cache-Control", "no-cache")
        .set_header("Accept-Ranges", "bytes");
    for (const auto& [name, value] : headers) answer.response.set_header(name, value);
    if (unchanged) return answer;
    if (range.partial) {
        const std::string bytes =
            satisfiable ? std::to_string(range.first) + "-" + std::to_string(range.end - 1) : std::string("*");
        answer.response.set_header("Content-Range", "bytes " + bytes + "/" + std::to_string(file.size()));
        if (!satisfiable) return answer;
        if (!file.seek(range.first)) return {file_refusal(errno)};
    }
    const bool text = text::starts_with(type, "text/");
    answer.response.set_header("Content-Type", text ? std::string(type) + "; charset=utf-8" : std::string(type));
    answer.size = range.end - range.first;
    answer.file = std::move(file);
    return answer;
}

// ---- origins and proxies -------------------------------------------------------------------------------------------

// Allowed origins: "https://chat.example"; "https://*.chat.example" for its subdomains of any depth, but not for
// itself; "moz-extension://*" for all hosts of a scheme; "null"; "*" for everything.
class OriginList {
public:
    // Throws Error for a text that is none of these.
    WSCHAT_COLD void add(const char* call, const std::vector<std::string>& origins) {
        for (const std::string& origin : origins) {
            auto normal = origin == "*" ? origin : normalized_pattern(origin);
            if (!normal)
                throw Error(std::string(call) + ": \"" + origin +
                            "\" is not an origin, as https://chat.example or https://*.chat.example is");
            list_.push_back(std::move(*normal));
        }
    }
    bool contains(std::string_view origin) const {
        if (text::contains(list_, "*")) return true;
        const auto normal = list_.empty() ? std::nullopt : normalized_origin(origin);
        return normal && std::any_of(list_.begin(), list_.end(),
                                     [&](const std::string& pattern) { return matches(pattern, *normal); });
    }
    const std::vector<std::string>& list() const { return list_; }

private:
    static std::optional<std::string> normalized_pattern(std::string origin) {
        const std::size_t scheme = origin.find("://");
        if (scheme == std::string::npos || origin.compare(scheme + 3, 1, "*") != 0) return normalized_origin(origin);
        const std::size_t star = scheme + 3;
        if (origin.size() > star + 1 && origin[star + 1] != '.' && origin[star + 1] != '/') return std::nullopt;
        origin[star] = 'x';  // any label
        auto normal = normalized_origin(origin);
        if (normal) (*normal)[normal->find("://") + 3] = '*';
        return normal;
    }
    static bool matches(std::string_view pattern, std::string_view origin) {
        const std::size_t star = pattern.find('*');
        if (star == std::string_view::npos) return pattern == origin;
        const std::string_view suffix = pattern.substr(star + 1);
        return origin.size() > star + suffix.size() && text::starts_with(origin, pattern.substr(0, star)) &&
               origin.substr(origin.size() - suffix.size()) == suffix;
    }

    std::vector<std::string> list_;  // normalized
};

inline std::string_view without_quotes(std::string_view s) {
    return s.size() >= 2 && s.front() == '"' && s.back() == '"' ? s.substr(1, s.size() - 2) : s;
}

// An address as proxies write it: "203.0.113.7", "203.0.113.7:51234", "[2001:db8::7]:443", "2001:db8::7", also in
// quotes (RFC 7239 6). Returns nothing for "unknown", for a name that hides the address ("_hidden"), and for other
// texts.
inline std::optional<IpAddress> parse_hop(std::string_view hop) {
    hop = without_quotes(hop);
    if (hop.size() > 64) return std::nullopt;
    std::string_view address = hop, port = "0";
    if (text::starts_with(hop, "[")) {
        const std::size_t close = hop.find(']');
        if (close == std::string_view::npos || hop.find(':') > close) return std::nullopt;
        address = hop.substr(1, close - 1);
        if (close + 1 != hop.size() && hop[close + 1] != ':') return std::nullopt;
        if (close + 1 != hop.size()) port = hop.substr(close + 2);
    } else if (std::count(hop.begin(), hop.end(), ':') == 1) {
        port = hop;
        address = text::consume_until(port, ':');
    }
    // RFC 7239 6.3: a port may be hidden too ("_8f3a").
    if (!text::parse_unsigned(port, 65535) && !(text::starts_with(port, "_") && text::is_token(port)))
        return std::nullopt;
    return IpAddress::parse(address);
}

// Removes the text after the last separator, and the separator, from `list`. Returns the text. A separator in quotes
// does not count. It reads from the right, because only there stands what the nearest proxy wrote: a quote that a
// client has opened further left changes nothing.
inline std::string_view consume_last(std::string_view& list, char separator) {
    bool quoted = false;
    std::size_t at = list.size();
    for (; at > 0 && (quoted || list[at - 1] != separator); --at) {
        if (list[at - 1] != '"') continue;
        std::size_t escapes = 0;  // an odd number of backslashes escapes the quote
        while (quoted && escapes + 1 < at && list[at - 2 - escapes] == '\\') ++escapes;
        if (escapes % 2 == 0) quoted = !quoted;
        at -= escapes;
    }
    const std::string_view part = list.substr(at);
    list = list.substr(0, at == 0 ? 0 : at - 1);
    return part;
}

// The elements of a comma-separated list in all header lines of a name, from the last one to the first one.
class ElementsFromLast {
public:
    ElementsFromLast(const Fields& fields, std::string_view name) {
        fields.each([&](std::string_view field, std::string_view value) {
            if (text::equals_ignore_case(field, name)) lines_.push_back(value);
            return true;
        });
    }
    // Skips empty elements. Empty at the end.
    std::string_view next() {
        std::string_view element;
        while (element.empty() && !lines_.empty()) {
            element = text::trim(consume_last(lines_.back(), ','));
            if (lines_.back().empty()) lines_.pop_back();
        }
        return element;
    }

private:
    std::vector<std::string_view> lines_;
};

// What is known about a client, with the headers of trusted proxies.
struct ForwardedClient {
    IpAddress address;
    std::string_view scheme;  // "http" or "https"
    // What a trusted proxy wrote instead of an address. Not empty: `address` is that of a proxy, and all its clients
    // share the limits for one address. Should be logged.
    std::string_view unreadable{};
};

// The value of a parameter of a Forwarded element ("for=203.0.113.7;proto=https"). Empty if it is absent.
inline std::string_view forwarded_parameter(std::string_view element, std::string_view name) {
    while (!element.empty()) {
        std::string_view value = consume_last(element, ';');
        if (text::equals_ignore_case(text::trim(text::consume_until(value, '=')), name)) return text::trim(value);
    }
    return {};
}

// "https" for https and wss, "http" for http and ws, otherwise `unknown`.
inline std::string_view forwarded_scheme(std::string_view scheme, std::string_view unknown) {
    scheme = without_quotes(scheme);
    if (text::equals_ignore_case(scheme, "https") || text::equals_ignore_case(scheme, "wss")) return "https";
    if (text::equals_ignore_case(scheme, "http") || text::equals_ignore_case(scheme, "ws")) return "http";
    return unknown;
}

// Reads from the right: each trusted proxy says who connected to it, and with which scheme. Stops at the first address
// that is not trusted, because its client can have written what stands left of it. Most proxies write X-Forwarded-For
// and pass on a Forwarded (RFC 7239) that the client wrote. So Forwarded counts only if the request has neither
// X-Forwarded-For nor X-Forwarded-Proto.
template <class Trusted>
void read_forwarded(const Fields& fields, ForwardedClient& client, Trusted&& trusted) {
    const bool legacy = fields.count("x-forwarded-for") + fields.count("x-forwarded-proto") != 0;
    ElementsFromLast hops(fields, legacy ? "x-forwarded-for" : "forwarded"), schemes(fields, "x-forwarded-proto");
    for (bool first = true;; first = false) {
        const std::string_view hop = hops.next();
        if (hop.empty() && !first) return;
        client.scheme = forwarded_scheme(legacy ? schemes.next() : forwarded_parameter(hop, "proto"), client.scheme);
        if (hop.empty()) return;
        const auto address = parse_hop(legacy ? hop : forwarded_parameter(hop, "for"));
        if (!address) {
            client.unreadable = hop;
            return;
        }
        client.address = *address;
        if (!trusted(client.address)) return;
    }
}

// ---- the site ------------------------------------------------------------------------------------------------------

// All that a server serves, and from whom it accepts it.
class Site {
public:
    PatternMap<Route> routes;
    PatternMap<Page> pages;
    std::function<Response(const Request&)> not_found;  // may be empty
    Headers default_headers;                            // of each answer that does not set them itself

    // Throws an Error if the page answers the method already.
    WSCHAT_COLD void add_page(const char* call, std::string_view method, std::string_view pattern,
                              Page::Function function, bool folder = false) {
        if (!text::is_token(method) || method == "CONNECT")
            throw Error("handle: \"" + escape_for_log(method) + "\" is not a method that a page can answer");
        const Pattern parsed(call, pattern);
        Page* page = pages.find_same(parsed);
        if (page == nullptr) page = &pages.add("page", parsed, folder);
        if (!page->add(method, std::move(function)))
            throw Error("page \"" + parsed.text() + "\": given twice for " + std::string(method));
    }
    void add_function_page(const char* call, std::string_view method, std::string_view pattern,
                           std::function<Response(const Request&)> answer) {
        add_page(call, method, pattern, [answer = std::move(answer)](const PageCall& page) {
            return std::optional<PageAnswer>(PageAnswer{answer(page.request)});
        });
    }
    void add_later_page(const char* call, std::string_view method, std::string_view pattern,
                        std::function<void(const Request&, Reply)> answer) {
        add_page(call, method, pattern, [answer = std::move(answer)](const PageCall& page) {
            answer(page.request, page.make_reply());
            return std::optional<PageAnswer>();
        });
    }
    // From "/static" to "/static/" if that is a static folder, for a path that has no page.
    std::optional<Response> folder_redirect(const Request& request) const {
        const Page* page = pages.find(std::string(request.raw_path()) + "/");
        if (page == nullptr || !page->folder()) return std::nullopt;
        return redirect_to_folder(request);
    }

    // One file, opened again for each request, so that a symbolic link on its path may change.
    WSCHAT_COLD void add_file(std::string_view pattern, std::string_view path, Headers headers) {
        check_headers(headers);
        const std::string found = find_file(std::string(pattern), std::string(path));
        add_page("file", "GET", pattern, [found, headers = std::move(headers)](const PageCall& call) {
            File file(found);
            if (!file) return missing_file(file.error(), true);
            return file_answer(std::move(file), content_type(found), call.request, headers);
        });
    }

    WSCHAT_COLD void add_static_dir(std::string_view pattern, std::string_view folder, Headers headers,
                                    SymbolicLinks links) {
        check_headers(headers);
        const std::string root = anchored(std::string(folder));
        const File probe = File(root);
        if (probe || probe.error() != EISDIR)
            throw Error("static_dir \"" + std::string(pattern) + "\": " + std::string(folder) + " is not a folder");
        const bool slash = Pattern("static_dir", pattern).text().back() == '/';
        add_page(
            "static_dir", "GET", std::string(pattern) + (slash ? "" : "/") + "{path...}",
            [root, headers = std::move(headers), links](const PageCall& call) {
                return answer_beneath(root, call.pattern.tail(call.request.raw_path()), call.request, headers, links);
            },
            true);
    }

    // ---- policies --------------------------------------------------------------------------------------------------

    void allow_origins(const std::vector<std::string>& origins) { origins_.add("allow_origins", origins); }
    WSCHAT_COLD void allow_cors(const std::vector<std::string>& origins, const CorsOptions& options) {
        if (options.credentials && text::contains(origins, "*"))
            throw Error("allow_cors: with credentials, each origin must be named");
        cors_origins_.add("allow_cors", origins);
        check_headers({{"Access-Control-Allow-Headers", options.headers}});
        cors_ = options;
    }
    // The headers that let a page of another origin read the answer (the Fetch standard, 3.3). `methods`: those that
    // the path answers, if this is the answer to a preflight, else empty.
    WSCHAT_COLD Headers cors_headers(const Request& request, std::string_view methods) const {
        Headers headers;
        if (cors_origins_.list().empty()) return headers;
        headers.emplace_back("Vary", "Origin");
        const auto origin = request.fields().find("origin");
        if (!origin || !cors_origins_.contains(*origin)) return headers;
        const bool any = text::contains(cors_origins_.list(), "*");
        headers.emplace_back("Access-Control-Allow-Origin", any ? "*" : *origin);
        if (cors_.credentials) headers.emplace_back("Access-Control-Allow-Credentials", "true");
        if (methods.empty()) return headers;
        headers.emplace_back("Access-Control-Allow-Methods", methods);
        headers.emplace_back("Access-Control-Allow-Headers", cors_.headers);
        headers.emplace_back("Access-Control-Max-Age", std::to_string(cors_.max_age.count()));
        return headers;
    }
    void set_default_header(std::string_view name, std::string_view value) {
        Response checked(200);
        checked.set_header(name, value);
        default_headers.emplace_back(name, value);
    }
    void allow_hosts(const std::vector<std::string>& hosts) {
        for (const std::string& host : hosts) hosts_.push_back(text::to_lower(host));
    }
    void trust_proxies(const std::vector<std::string>& proxies) {
        for (const std::string& proxy : proxies) trusted_proxies_.emplace_back(proxy);
    }

    bool origin_allowed(std::string_view origin, const Request& request) const {
        return same_host(origin, request.host(), request.scheme() == "https") || origins_.contains(origin);
    }
    WSCHAT_COLD std::string origin_refusal(std::string_view origin, const Request& request) const {
        const std::string host = escape_for_log(request.host());
        std::string sentence = "The origin \"" + escape_for_log(origin) + "\" is refused; allowed: ";
        (sentence += request.scheme() == "https" ? "https pages of " : "pages of ") += host;
        for (const std::string& allowed : origins_.list()) (sentence += ", ") += allowed;
        if (host_seems_replaced(origin, request.host()))
            sentence += ". The Host is \"" + host +
                        "\", perhaps from a proxy: set \"proxy_set_header Host $http_host;\" in nginx, "
                        "\"ProxyPreserveHost On\" in Apache";
        if (const auto normal = normalized_origin(origin))
            sentence += ". To allow this origin, call allow_origins({\"" + *normal + "\"})";
        return sentence += ".\n";
    }
    // A host that was allowed without a port is served on every port.
    bool serves_host(std::string_view host) const {
        if (hosts_.empty()) return true;
        const std::string whole = text::to_lower(host), name = whole.substr(0, whole.rfind(':'));
        return text::contains(hosts_, whole) || text::contains(hosts_, name);
    }
    bool trusted(const IpAddress& address) const { return contains(trusted_proxies_, address); }
    static bool contains(const std::vector<Cidr>& blocks, const IpAddress& address) {
        for (const Cidr& block : blocks)
            if (block.contains(address)) return true;
        return false;
    }
    // `address`: as Request::remote_address() gives it.
    static bool contains(const std::vector<Cidr>& blocks, const std::string& address) {
        const auto parsed = address == "unix" ? IpAddress() : IpAddress::parse(address);
        return parsed && contains(blocks, *parsed);
    }
    // What the headers of trusted proxies say about the client. Other peers are the client themselves.
    ForwardedClient client(const IpAddress& peer, const Request& request, bool encrypted) const {
        ForwardedClient client{peer, encrypted ? "https" : "http", {}};
        if (trusted(peer))
            read_forwarded(request.fields(), client, [this](const IpAddress& hop) { return trusted(hop); });
        return client;
    }
    IpAddress client_address(const IpAddress& peer, const Request& request) const {
        return client(peer, request, false).address;
    }
    std::string_view client_scheme(const IpAddress& peer, const Request& request, bool encrypted) const {
        return client(peer, request, encrypted).scheme;
    }

private:
    // Throws an Error at set-up, not at the first request.
    static void check_headers(const Headers& headers) {
        Response response(200);
        for (const auto& [name, value] : headers) response.set_header(name, value);
    }
    // A relative path from the working directory at the start. Symbolic links are followed at each request.
    static std::string anchored(const std::string& path) {
#if defined(_WIN32)
        const bool relative = !path.empty() && path.front() != '/' && path.front() != '\\' && path.find(':') != 1;
#else
        const bool relative = !path.empty() && path.front() != '/' && path.find(':') == std::string::npos;
#endif
        return relative ? os::absolute_path(".") + "/" + path : path;
    }
    // The absolute path of a file that exists: relative paths start at the working directory, then at the folder of the
    // program.
    WSCHAT_COLD static std::string find_file(const std::string& pattern, const std::string& path) {
        const std::string found = anchored(path);
        const File file(found);
        if (!file && found != path) {
            const std::string program = os::executable_path(), beside_program = replace_name(program, path);
            if (File{beside_program}) return beside_program;
            throw Error("file \"" + pattern + "\": " + path + ": " + os::error_text(file.error()) + "; looked in " +
                        os::absolute_path(".") + " and in the folder of " + program);
        }
        if (!file) throw Error("file \"" + pattern + "\": " + path + ": " + os::error_text(file.error()));
        return found;
    }

    WSCHAT_COLD static PageAnswer answer_beneath(const std::string& root, std::vector<std::string> names,
                                                 const Request& request, const Headers& headers, SymbolicLinks links) {
        if (names.back().empty()) names.back() = "index.html";
        File file = File::beneath(root, names, links);
        if (!file && file.error() == EISDIR) return {redirect_to_folder(request)};
        if (!file) return missing_file(file.error(), false);
        return file_answer(std::move(file), content_type(names.back()), request, headers);
    }
    // A path that begins with two slashes cannot come here, because File::beneath() refuses its empty first name. So
    // this cannot lead to another host.
    static Response redirect_to_folder(const Request& request) {
        const std::string query = request.query_string().empty() ? "" : "?" + std::string(request.query_string());
        return Response::redirect(std::string(request.raw_path()) + "/" + query, 301);
    }

    // Whether the origin is of a public host, and the Host is not; or the Host has lost its port.
    static bool host_seems_replaced(std::string_view origin, std::string_view host) {
        const auto normal = normalized_origin(origin);
        if (!normal || !text::starts_with(*normal, "http")) return false;
        const std::string_view page = std::string_view(*normal).substr(normal->find("://") + 3);
        const auto internal = [](std::string_view name) {
            const std::string_view plain = name.substr(0, name.find(':'));
            return name.front() == '[' || IpAddress::parse(plain) || plain.find('.') == std::string_view::npos;
        };
        if (host.empty()) return false;
        return internal(host) ? !internal(page) : text::starts_with(page, std::string(host) + ":");
    }

    OriginList origins_;
    OriginList cors_origins_;
    CorsOptions cors_;
    std::vector<std::string> hosts_;
    std::vector<Cidr> trusted_proxies_;
};

}  // namespace detail

WSCHAT_END

// ====================================================================================================================
// section 14: Server
//
// Sessions, listeners, metrics and the server: reads sockets, drives the protocol, calls handlers, flushes. It
// knows all sections above.
//
// A turn of the loop, seen from here: the poller reports sockets -> Session::on_ready() reads, parses and calls
// handlers, which queue output -> at the end of the turn Worker::end_turn() lets sessions with work left from earlier
// turns continue, then flushes every dirty session and removes those that have ended.
// ====================================================================================================================

WSCHAT_BEGIN

// ---- metrics -------------------------------------------------------------------------------------------------------

namespace detail {

// Counts by number, in ascending order. A peer can choose some of these numbers, so past max_keys all others are
// counted under -1.
class Counters {
public:
    struct Entry {
        int key;
        std::uint64_t count;
    };
    static constexpr std::size_t max_keys = 48;

    bool empty() const { return entries_.empty(); }
    std::vector<Entry>::const_iterator begin() const { return entries_.begin(); }
    std::vector<Entry>::const_iterator end() const { return entries_.end(); }

protected:
    std::uint64_t& counter(int key) {
        auto at = lower_bound(key);
        if (at != entries_.end() && at->key == key) return at->count;
        if (entries_.size() >= max_keys && key != -1) return counter(-1);
        return entries_.insert(at, {key, 0})->count;
    }
    std::uint64_t value(int key) const {
        for (const Entry& entry : entries_)
            if (entry.key == key) return entry.count;
        return 0;
    }

private:
    std::vector<Entry>::iterator lower_bound(int key) {
        auto at = entries_.begin();
        while (at != entries_.end() && at->key < key) ++at;
        return at;
    }
    std::vector<Entry> entries_;
};

// Counters whose keys are numbers or enumerators; the bodies are the same for all.
template <class Key>
class CountersOf : public Counters {
public:
    std::uint64_t& operator[](Key key) { return counter(static_cast<int>(key)); }
    // Returns 0 if the key was never counted.
    std::uint64_t at(Key key) const { return value(static_cast<int>(key)); }
};

}  // namespace detail

// Counts since the start, and what is open now. Messages are payloads; bytes are octets on sockets.
struct Metrics {
    std::uint64_t connections_accepted = 0;
    std::uint64_t connections_open = 0;
    std::uint64_t connections_refused = 0;  // 503 at a limit of connections
    std::uint64_t proxy_failures = 0;       // closed because of a missing, malformed or untrusted PROXY header
    std::uint64_t tls_handshakes = 0;       // completed
    std::uint64_t tls_failures = 0;         // failed handshakes, and connections that broke TLS later
    std::uint64_t requests = 0;             // HTTP requests, opening handshakes included
    std::uint64_t websockets_opened = 0;
    std::uint64_t websockets_open = 0;
    std::uint64_t messages_received = 0;
    std::uint64_t messages_sent = 0;     // queued for a peer
    std::uint64_t messages_dropped = 0;  // by BacklogPolicy::drop
    std::uint64_t bytes_received = 0;
    std::uint64_t bytes_sent = 0;
    // Output, unfinished messages and requests, pipelined requests and TLS records: what waits now.
    std::uint64_t backlog_bytes = 0;
    std::uint64_t handler_exceptions = 0;
    std::uint64_t log_entries_suppressed = 0;
    std::uint64_t rooms = 0;
    detail::CountersOf<int> responses;          // by HTTP status
    detail::CountersOf<CloseCause> closed;      // WebSocket connections, by cause
    detail::CountersOf<CloseCode> close_codes;  // and by code
};

namespace detail {

struct MetricInfo {
    const char* name;
    const char* help;
    std::uint64_t Metrics::*value;
};
// A name that ends in "_total" is a counter, any other a gauge.
constexpr MetricInfo metric_table[] = {
    {"connections_accepted_total", "Connections accepted.", &Metrics::connections_accepted},
    {"connections_open", "Connections open now.", &Metrics::connections_open},
    {"connections_refused_total", "Connections refused at a limit.", &Metrics::connections_refused},
    {"proxy_failures_total", "Connections without a valid PROXY header.", &Metrics::proxy_failures},
    {"tls_handshakes_total", "TLS handshakes completed.", &Metrics::tls_handshakes},
    {"tls_failures_total", "TLS connections that failed.", &Metrics::tls_failures},
    {"requests_total", "HTTP requests, handshakes included.", &Metrics::requests},
    {"websockets_opened_total", "WebSocket connections opened.", &Metrics::websockets_opened},
    {"websockets_open", "WebSocket connections open now.", &Metrics::websockets_open},
    {"messages_received_total", "Messages received.", &Metrics::messages_received},
    {"messages_sent_total", "Messages queued for a peer.", &Metrics::messages_sent},
    {"messages_dropped_total", "Messages dropped for slow peers.", &Metrics::messages_dropped},
    {"bytes_received_total", "Bytes received.", &Metrics::bytes_received},
    {"bytes_sent_total", "Bytes sent.", &Metrics::bytes_sent},
    {"backlog_bytes", "Bytes waiting for slow peers now.", &Metrics::backlog_bytes},
    {"handler_exceptions_total", "Exceptions that left a callback.", &Metrics::handler_exceptions},
    {"log_entries_suppressed_total", "Log entries over the rate limit.", &Metrics::log_entries_suppressed},
    {"rooms", "Rooms with members now.", &Metrics::rooms}};

}  // namespace detail

// Metrics in the text format of Prometheus (version 0.0.4).
WSCHAT_COLD inline std::string prometheus_text(const Metrics& metrics) {
    std::string text;
    const auto head = [&](std::string_view name, std::string_view help) {
        const bool counter = name.size() > 6 && name.substr(name.size() - 6) == "_total";
        ((((text += "# HELP wschat_") += name) += ' ') += help) += "\n# TYPE wschat_";
        (text += name) += counter ? " counter\n" : " gauge\n";
    };
    const auto line = [&](std::string_view name, std::uint64_t value) {
        (((text += "wschat_") += name) += ' ') += std::to_string(value) + "\n";
    };
    for (const detail::MetricInfo& info : detail::metric_table) {
        head(info.name, info.help);
        line(info.name, metrics.*info.value);
    }
    const auto labelled = [&](std::string name, const char* label, const detail::Counters& counters, auto&& label_of) {
        name += std::string("{") + label + "=\"";
        for (const auto& [key, count] : counters) line(name + (key < 0 ? "other" : label_of(key)) + "\"}", count);
    };
    const auto number_of = [](int key) { return std::to_string(key); };
    head("responses_total", "HTTP responses, by status.");
    labelled("responses_total", "status", metrics.responses, number_of);
    head("closed_total", "WebSocket connections closed, by cause.");
    labelled("closed_total", "cause", metrics.closed,
             [](int key) { return std::string(to_string(static_cast<CloseCause>(key))); });
    head("close_codes_total", "WebSocket connections closed, by close code.");
    labelled("close_codes_total", "code", metrics.close_codes, number_of);
    return text;
}

// ---- what sessions share -------------------------------------------------------------------------------------------

struct ServerOptions {
    Limits limits;  // of each connection whose route has no limits of its own
    ServerLimits server_limits;
    PollerKind poller = PollerKind::automatic;
    // From listen() to the end of run(), SIGINT and SIGTERM call shutdown(shutdown_deadline). A second signal ends at
    // once.
    bool handle_signals = true;
    Duration shutdown_deadline = std::chrono::seconds(5);
    bool reuse_port = false;      // SO_REUSEPORT: several servers, one per thread or process, share a port
    bool require_origin = false;  // refuse a handshake without an Origin header, which no browser sends
};

namespace detail {

using LogFields = std::vector<std::pair<std::string_view, std::string>>;

// The log of a server. A peer cannot flood it: each level has a bucket of 100 entries that refills with 100 per second,
// so that one level does not use up the entries of another.
class ServerLog {
public:
    explicit ServerLog(Metrics& metrics) : metrics_(metrics) {}

    void set(std::function<void(const LogEntry&)> log) { log_ = std::move(log); }
    // False if nobody reads the log. The caller then does not make the fields of an entry.
    explicit operator bool() const { return static_cast<bool>(log_); }

    void operator()(LogLevel level, std::string_view event, const LogFields& fields) {
        if (!log_) return;
        if (!buckets_[static_cast<std::size_t>(level)].take(1, {100, 100}, Clock::now())) {
            ++metrics_.log_entries_suppressed;
            return;
        }
        run_guarded([&] { log_({level, event, fields}); }, [](const char*) {});
    }
    // Called by catch blocks, so it throws nothing, even if memory runs out. `peer` may be null.
    WSCHAT_COLD void exception(const char* where, const char* what, const IpAddress* peer) noexcept {
        ++metrics_.handler_exceptions;
        run_guarded(
            [&] {
                (*this)(LogLevel::error, "exception",
                        {{"in", where}, {"what", what}, {"peer", peer != nullptr ? peer->to_string() : std::string()}});
            },
            [](const char*) {});
    }

private:
    Metrics& metrics_;
    std::function<void(const LogEntry&)> log_;
    TokenBucket buckets_[4];  // by level
};

// What the lists of a server need of a session.
struct SessionNode : HandlerHost {
    SessionNode* next_dirty = nullptr;    // in the list of dirty sessions
    SessionNode* next_waiting = nullptr;  // in the list of sessions with work left

protected:
    ~SessionNode() = default;
};

// A list of sessions, first in, first out, linked through the sessions, so that adding one needs no memory.
template <SessionNode* SessionNode::*Next>
class SessionList {
public:
    bool empty() const { return first_ == nullptr; }
    SessionNode* first() const { return first_; }
    SessionNode* last() const { return first_ == nullptr ? nullptr : last_; }
    void push(SessionNode& session) {
        session.*Next = nullptr;
        (first_ == nullptr ? first_ : last_->*Next) = &session;
        last_ = &session;
    }
    SessionNode& pop() {
        SessionNode& session = *first_;
        first_ = session.*Next;
        return session;
    }
    // Removes those for which the predicate holds.
    template <class Predicate>
    void remove_if(Predicate&& predicate) {
        for (SessionList all = std::exchange(*this, SessionList()); !all.empty();) {
            SessionNode& session = all.pop();
            if (!predicate(session)) push(session);
        }
    }

private:
    SessionNode* first_ = nullptr;
    SessionNode* last_ = nullptr;
};

// What one turn of the loop has to do, and how much it may do.
struct TurnState {
    static constexpr unsigned max_handshakes = 64;  // steps of TLS handshakes
    static constexpr unsigned max_continued = 16;   // sessions with work left from earlier turns
    static constexpr unsigned max_more_reads = 64;  // from sockets that have been read in this turn

    SessionList<&SessionNode::next_dirty> dirty;      // to flush, or to remove, at the end of this turn
    SessionList<&SessionNode::next_waiting> waiting;  // continue in the next turn: they used up their budget
    std::uint32_t number = 0;
    unsigned handshakes_left = max_handshakes;
    unsigned more_reads_left = max_more_reads;

    // TLS handshakes cost much more than messages, so a turn does a limited number of steps.
    bool take_handshake() {
        if (handshakes_left == 0) return false;
        --handshakes_left;
        return true;
    }
    // A session reads once. Whether it may read again depends on how much the others have read.
    bool take_more() {
        if (more_reads_left == 0) return false;
        --more_reads_left;
        return true;
    }
};

// Open connections by IpAddress::rate_limit_key(), for ServerLimits::max_connections_per_address.
class AddressCounts {
public:
    // False if the address has `max` connections already.
    bool add(const std::string& key, std::size_t max) {
        if (key == "unix") return true;
        std::size_t& connections = counts_.find_or_emplace(key, std::size_t{0});
        if (connections >= max) return false;
        ++connections;
        return true;
    }
    void remove(const std::string& key) {
        std::size_t* connections = counts_.find(key);
        if (connections != nullptr && --*connections == 0) counts_.erase(key);
    }

private:
    StringMap<std::size_t> counts_;
};

class Session;

// What a session needs of the client that has made its connection.
class SessionOwner {
public:
    virtual const Limits& session_limits() const = 0;
    // After on_close().
    virtual void note_close(CloseCode code, CloseCause cause) noexcept = 0;
    // The socket is closed.
    virtual void on_session_end() = 0;

protected:
    ~SessionOwner() = default;
};

// A connection that a client has made, after the opening handshake.
struct ClientHandshake {
    std::shared_ptr<SessionOwner> owner;
    std::unique_ptr<WebSocketHandler> handler;
    Request request;
    std::string subprotocol;  // that the server chose; one of those in the request, or empty
    std::unique_ptr<Compression> compression;
    Connection::MaskSource mask_source;
    std::string_view frames;  // that came with the response
};

// What sessions and listeners need of the worker that serves them: the state that they share, and three calls.
class SessionHost {
public:
    SessionHost(Server& its_server, const ServerOptions& its_options, const Site& its_site)
        : server(its_server), options(its_options), site(its_site), loop(options.poller), rooms(arena), log(metrics) {
        receive_buffer.reserve(receive_size);
        reserve_descriptor();
    }
    SessionHost(const SessionHost&) = delete;
    SessionHost& operator=(const SessionHost&) = delete;

    // `proxied`: the connection begins with a PROXY header.
    virtual void accept(Socket socket, const IpAddress& peer, std::unique_ptr<Transport> transport, bool proxied) = 0;
    // The refusal of a connection over a limit; it is counted and logged.
    virtual Response too_many_connections() = 0;
    // Counts and logs a connection that is closed because of its PROXY header.
    virtual void note_proxy_failure(const IpAddress& peer, std::string_view cause) = 0;
    // Takes the session out of the list of open ones and destroys it at the end of the turn.
    virtual void remove(Session& session) = 0;
    // Whether sessions and the files that they send leave no descriptor but those that are kept.
    virtual bool descriptors_used() const = 0;

    CompressionPool& compression() {
        if (!compression_) compression_ = std::make_unique<CompressionPool>();
        return *compression_;
    }
    void reserve_descriptor() {
#if !defined(_WIN32)
        reserve = OwnedDescriptor(::open("/dev/null", O_RDONLY | O_CLOEXEC));
#endif
    }

    Server& server;
    const ServerOptions& options;
    const Site& site;
    Loop loop;
    SendArena arena;
    Rooms rooms;
    Bytes receive_buffer;                                       // of the session that reads
    std::array<std::string_view, Socket::max_pieces> pieces{};  // of the session that flushes
    WireCount wire;
    std::size_t backlog = 0;     // bytes that all sessions hold
    std::size_t open_files = 0;  // that sessions send
    Metrics metrics;
    ServerLog log;
    std::function<void(const AccessEntry&)> on_access;  // may be empty
    AddressCounts addresses;
    TurnState turn;
    OwnedDescriptor reserve;  // closed to accept one connection when all descriptors are used
    bool draining = false;    // shutdown() was called

protected:
    ~SessionHost() = default;

private:
    static constexpr std::size_t receive_size = 64 * 1024;

    std::unique_ptr<CompressionPool> compression_;  // made when the first connection needs it
};

// ---- the byte stream -----------------------------------------------------------------------------------------------

// A socket, and the encryption over it if there is any.
class Stream {
public:
    Stream(Socket socket, std::unique_ptr<Transport> transport)
        : socket_(std::move(socket)), transport_(std::move(transport)) {}

    Socket& socket() { return socket_; }
    bool has_transport() const { return transport_ != nullptr; }
    bool encrypted() const { return transport_ && transport_->encrypts(); }
    bool established() const { return !transport_ || transport_->established(); }
    // Whether input waits here, which the poller does not report.
    bool has_input() const { return transport_ && transport_->has_input(); }
    // Bytes that wait here and nowhere else, in both directions.
    std::size_t buffered() const { return transport_ ? transport_->buffered() : 0; }
    // Whether the kernel has refused encrypted bytes that are still owed.
    bool wants_write() const { return transport_ && transport_->wants_write(); }
    bool tls_failed() const { return transport_ && !transport_->failure().empty(); }
    const std::string& tls_failure() const { return transport_->failure(); }
    bool peer_speaks_plain_text() const { return transport_->plain_text(); }
    std::string peer_name() const { return transport_->peer_name(); }
    void drop_encryption() {
        if (encrypted()) transport_.reset();
    }

    IoResult receive(char* data, std::size_t size, WireCount& wire) {
        if (transport_) return transport_->receive(socket_, data, size, wire);
        const IoResult got = socket_.receive(data, size);
        wire.received += got.size;
        return got;
    }
    // False: the peer sends more TLS messages without data than pings are allowed. tls_failure() says so.
    bool check_rate(const Limits& limits, Time now, WireCount& wire) {
        const Rate rate{static_cast<double>(limits.control_frames_per_second),
                        static_cast<double>(limits.control_frames_burst)};
        return !transport_ || transport_->check_rate(socket_, rate, now, wire);
    }
    IoResult send(const std::string_view* pieces, std::size_t count, WireCount& wire) {
        if (transport_) return transport_->send(socket_, pieces, count, wire);
        const IoResult sent = socket_.send(pieces, count);
        wire.sent += sent.size;
        return sent;
    }
    // Tells the peer that nothing more comes (TLS close_notify). False: the kernel does not take it yet.
    bool end(WireCount& wire) { return !transport_ || transport_->end(socket_, wire); }
    std::string error_text(const IoResult& result) const {
        return result.error != 0 || !transport_ ? os::error_text(result.error) : transport_->failure();
    }
    void close() {
        socket_.close();
        transport_.reset();
    }

private:
    Socket socket_;
    std::unique_ptr<Transport> transport_;  // null if the connection is plain
};

// ---- HTTP ----------------------------------------------------------------------------------------------------------

inline void add_line(std::string& head, std::string_view name, std::string_view value) {
    (((head += name) += ": ") += value) += "\r\n";
}
// Unless the response has a header of that name.
inline void add_missing_line(std::string& head, const Response& response, std::string_view name,
                             std::string_view value) {
    for (const auto& header : response.headers())
        if (text::equals_ignore_case(header.first, name)) return;
    add_line(head, name, value);
}
inline void add_cookies(std::string& head, const Response& response, const Request& request) {
    for (const std::string& cookie : ResponseAccess::cookies(response)) {
        const bool add_secure = request.scheme() == "https" && cookie.find("; Secure") == std::string::npos;
        add_line(head, "Set-Cookie", cookie + (add_secure ? "; Secure" : ""));
    }
}

// The HTTP part of a connection: requests in, answers out. Lingering, after the last answer or Close frame, uses it
// too; an open WebSocket has none.
class HttpExchange {
public:
    HttpExchange(SessionHost& host, const Limits& limits, const IpAddress& peer)
        : host_(host), limits_(limits), peer_(peer), parser_(limits) {}
    HttpExchange(const HttpExchange&) = delete;
    HttpExchange& operator=(const HttpExchange&) = delete;
    ~HttpExchange() {
        HandlerAccess::close_reply(reply_);
        close_file();
    }

    SendQueue output;
    bool blocked = false;                // the kernel refused output that is still queued
    bool keep_alive = true;              // another request may follow the answer
    bool shut_down = false;              // our side of the stream is shut
    bool answered = false;               // at least one request
    bool idle = false;                   // waits for the next request
    std::size_t discarded = 0;           // bytes that were read while lingering
    Duration away_before{};              // LoopAccess::away() when the deadline was set
    std::unique_ptr<ProxyHeader> proxy;  // null if no PROXY header is due

    // An answer is being sent, or comes later.
    bool busy() const { return output_queued() || awaits_reply(); }
    bool output_queued() const { return !output.empty() || file_left_ != 0; }
    bool has_file() const { return file_left_ != 0; }
    // Part of a request has arrived.
    bool started() const { return parser_.started() || body_; }
    // How much of a body may still arrive before its deadline.
    std::size_t body_expected() const { return body_ ? body_->expected() : 0; }
    bool has_pending() const { return pending_begin_ != pending_.size(); }
    // They begin at `begin`.
    std::string take_pending(std::size_t& begin) {
        begin = std::exchange(pending_begin_, std::size_t{0});
        return std::exchange(pending_, std::string());
    }
    // Memory of input that waits: an incomplete head or body, and pipelined bytes.
    std::size_t buffered_input() const {
        return parser_.buffered() + (body_ ? RequestAccess::held(body_->request()) : 0) +
               (has_pending() ? pending_.capacity() : 0);
    }

    // The next request in the bytes, which are consumed; nothing if more are needed, or if the request is refused. A
    // request whose body is awaited is returned twice: first for expect_body() or an answer, then with its body.
    std::optional<Request> parse(std::string_view& bytes) {
        std::size_t consumed = 0;
        if (body_) return parse_body(bytes);
        const RequestParser::Outcome outcome = parser_.feed(bytes, consumed);
        bytes.remove_prefix(consumed);
        if (outcome == RequestParser::Outcome::need_more) return std::nullopt;
        if (host_.on_access) request_time_ = Clock::now();
        if (outcome == RequestParser::Outcome::request) return parser_.take_request();
        respond(Response(parser_.status(), parser_.reason() + "\n"), nullptr);
        return std::nullopt;
    }
    // Keeps pipelined bytes that wait for the answer before them. After the last answer nothing is a request.
    void keep(std::string_view bytes) {
        if (keep_alive) pending_.append(bytes);
    }
    // Keeps the last `size` bytes of what take_pending() returned, without a copy.
    void keep_rest(std::string bytes, std::size_t size) {
        if (!keep_alive) return;
        pending_begin_ = bytes.size() - size;
        pending_ = std::move(bytes);
    }

    // Queues an answer. The connection ends after it if `request` is null or does not allow another.
    WSCHAT_COLD void respond(const Response& response, const Request* request) {
        const bool has_body = response.status() != 204 && response.status() != 304;
        queue_head(response, request, has_body ? std::optional<std::uint64_t>(response.body().size()) : std::nullopt);
        if (has_body && !head_only_) queue(response.body());
    }
    void respond_last(const Response& response, const Request& request) {
        keep_alive = false;
        respond(response, &request);
    }

    // Answers a request that does not want to become a WebSocket, or waits for its body or its Reply. What a page's
    // function throws passes through.
    WSCHAT_COLD void answer(Request request, HandlerHost& session) {
        const Page* page = host_.site.pages.find(request.raw_path());
        const Page::Function* function = page == nullptr ? nullptr : page->find(request.method());
        if (function != nullptr && RequestAccess::awaits_body(request)) return expect_body(std::move(request));
        request_ = std::make_unique<Request>(std::move(request));
        if (function == nullptr) return answer_without_page(page);
        RequestAccess::set_params(*request_, page->pattern().params(request_->raw_path()));
        auto answer = (*function)({*request_, page->pattern(), [&] { return make_reply(session); }});
        if (answer && answer->missing && host_.site.not_found) answer->response = host_.site.not_found(*request_);
        if (answer) respond(std::move(*answer));
        else if (has_reply()) finish_reply();
    }

    // Counts an answer, and adds it to the access log. `request` may be null.
    void note_answer(int status, const Request* request, std::uint64_t size) {
        ++host_.metrics.responses[status];
        if (!host_.on_access) return;
        const std::string address = request != nullptr ? request->remote_address() : peer_.to_string();
        const AccessEntry entry{address,
                                request != nullptr ? request->method() : std::string_view(),
                                request != nullptr ? request->raw_path() : std::string_view(),
                                status,
                                size,
                                Clock::now() - request_time_};
        run_guarded([&] { host_.on_access(entry); },
                    [&](const char* what) { host_.log.exception("on_access", what, &peer_); });
    }

    // ---- answers that come later -----------------------------------------------------------------------------------

    Reply make_reply(HandlerHost& session) {
        HandlerAccess::close_reply(reply_);
        reply_ = HandlerAccess::open_reply(session);
        return HandlerAccess::make_reply(reply_);
    }
    bool awaits_reply() const { return reply_ != nullptr; }
    void set_reply(ReplyAnswer answer) { answer_ = std::make_unique<ReplyAnswer>(std::move(answer)); }
    bool has_reply() const { return answer_ != nullptr; }
    // Ends the waiting. What the Reply is given from now on has no effect.
    std::unique_ptr<ReplyAnswer> take_reply() {
        HandlerAccess::close_reply(reply_);
        return std::move(answer_);
    }
    // The answer of a page has come.
    void finish_reply() {
        const std::unique_ptr<ReplyAnswer> answer = take_reply();
        if (answer->dropped || !answer->response)
            host_.log.exception(
                "page", answer->dropped ? "a Reply was destroyed unused" : "Reply::accept() is for prepare_async()",
                nullptr);
        const std::unique_ptr<Request> request = std::move(request_);
        respond(answer->response ? *answer->response : Response(500, "The server failed to answer.\n"), request.get());
    }
    // The answer does not come, or the call that should give it failed.
    void give_up_reply(const Response& response) {
        take_reply();
        keep_alive = false;
        respond(response, request_.get());
        request_.reset();
    }

    // Queues the next piece of the file. False: the file has become shorter than its Content-Length.
    bool queue_file_piece() {
        const auto wanted = static_cast<std::size_t>((std::min)(file_left_, max_piece));
        Slice piece = host_.arena.allocate(wanted);
        const std::size_t got = file_.read(SendArena::writable(piece), wanted);
        piece.end = piece.begin + got;
        output.append(piece);
        file_left_ -= got;
        if (file_left_ == 0) close_file();
        return got != 0;
    }
    void drop_output() {
        output.clear();
        file_left_ = 0;
        close_file();
    }
    void queue(std::string_view bytes) {
        if (!bytes.empty()) output.append(copy(host_.arena, bytes));
    }

private:
    std::optional<Request> parse_body(std::string_view& bytes) {
        std::size_t consumed = 0;
        const BodyParser::Outcome outcome = body_->feed(bytes, consumed);
        bytes.remove_prefix(consumed);
        if (outcome == BodyParser::Outcome::need_more) return std::nullopt;
        const std::unique_ptr<BodyParser> body = std::move(body_);
        if (outcome == BodyParser::Outcome::body) return body->take_request();
        respond_last(Response(body->status(), body->reason() + "\n"), body->request());
        return std::nullopt;
    }
    // RFC 9110 10.1.1: a client that expects "100-continue" sends the body after the 100.
    WSCHAT_COLD void expect_body(Request request) {
        const bool expects = request.fields().count("expect") != 0 && !request.http_1_0();
        if (expects && !text::equals_ignore_case(request.header("expect"), "100-continue"))
            return respond_last(Response(417, "The only expectation that is known here is 100-continue.\n"), request);
        body_ = std::make_unique<BodyParser>(std::move(request), limits_);
        if (body_->failed()) {
            const std::unique_ptr<BodyParser> body = std::move(body_);
            return respond_last(Response(body->status(), body->reason() + "\n"), body->request());
        }
        if (expects) queue("HTTP/1.1 100 Continue\r\n\r\n");
    }

    void respond(PageAnswer answer) {
        const std::unique_ptr<Request> request = std::move(request_);
        if (answer.file_error != 0)
            host_.log(LogLevel::warning, "file_missing",
                      {{"path", request->path()}, {"cause", os::error_text(answer.file_error)}});
        if (!answer.file) return respond(answer.response, request.get());
        // A file that is sent piece by piece takes a descriptor until its end. A small one is read at once.
        const bool at_once = answer.size <= max_piece;
        if (!at_once && host_.descriptors_used()) return respond(file_refusal(EMFILE), request.get());
        queue_head(answer.response, request.get(), answer.size);
        if (head_only_ || answer.size == 0) return;
        file_left_ = answer.size;
        file_ = std::move(answer.file);
        ++host_.open_files;
        if (at_once) queue_file_piece();
    }

    // `page` is null, or does not answer the request's method.
    WSCHAT_COLD void answer_without_page(const Page* page) {
        const Response response = response_without_page(*request_, page);
        const std::unique_ptr<Request> request = std::move(request_);
        respond(response, request.get());
    }
    WSCHAT_COLD Response response_without_page(const Request& request, const Page* page) const {
        const bool socket = host_.site.routes.find(request.raw_path()) != nullptr;
        const bool server = request.target() == "*";  // RFC 9110 9.3.7
        const std::string allowed = page != nullptr ? page->allowed()
                                    : server        ? "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
                                                    : "GET, OPTIONS";
        if (request.method() == "OPTIONS" && (page != nullptr || socket || server)) {
            Response options(204);
            for (const auto& [name, value] : host_.site.cors_headers(request, allowed)) options.set_header(name, value);
            return options.set_header("Allow", allowed);
        }
        if (page != nullptr) {
            Response refusal(405, "This path answers " + allowed + ".\n");
            return refusal.set_header("Allow", allowed);
        }
        if (const auto redirect = host_.site.folder_redirect(request)) return *redirect;
        if (socket) return upgrade_required("There is a WebSocket at this path, and no page.\n");
        if (host_.site.not_found) return host_.site.not_found(request);
        return Response(404, "There is nothing at this path.\n");
    }

    // `length` is empty for an answer that has no body by its status.
    WSCHAT_COLD void queue_head(const Response& response, const Request* request, std::optional<std::uint64_t> length) {
        head_only_ = request != nullptr && request->method() == "HEAD";
        keep_alive = keep_alive && request != nullptr && persistent(*request) && !host_.draining;
        std::string head = "HTTP/1.1 " + std::to_string(response.status()) + " ";
        (head += reason_phrase(response.status())) += "\r\nDate: ";
        (head += http_date(static_cast<std::int64_t>(std::time(nullptr)))) += "\r\n";
        const auto idle_seconds =
            std::chrono::duration_cast<std::chrono::seconds>(host_.options.limits.keep_alive_timeout).count();
        std::string connection = !keep_alive ? "close" : idle_seconds != 0 || request->http_1_0() ? "keep-alive" : "";
        for (const auto& [name, value] : response.headers()) {
            if (text::equals_ignore_case(name, "connection"))
                connection = value + (connection.empty() ? "" : ", ") + connection;
            else add_line(head, name, value);
        }
        for (const auto& [name, value] : host_.site.default_headers) add_missing_line(head, response, name, value);
        add_missing_line(head, response, "X-Content-Type-Options", "nosniff");
        if (request != nullptr) {
            for (const auto& [name, value] : host_.site.cors_headers(*request, {}))
                add_missing_line(head, response, name, value);
            add_cookies(head, response, *request);
        }
        if (length) add_line(head, "Content-Length", std::to_string(*length));
        if (!connection.empty()) add_line(head, "Connection", connection);
        if (keep_alive && idle_seconds != 0) add_line(head, "Keep-Alive", "timeout=" + std::to_string(idle_seconds));
        queue(head += "\r\n");
        note_answer(response.status(), request, length.value_or(0));
        if (keep_alive) return;
        pending_.clear();
        pending_begin_ = 0;
    }

    static constexpr std::uint64_t max_piece = 16 * 1024;

    void close_file() {
        if (!file_) return;
        file_.close();
        --host_.open_files;
    }
    // Whether another request may follow the answer to this one (RFC 9112 9.3). The rest of a body that was not read
    // would look like a request.
    static bool persistent(const Request& request) {
        const Fields fields = request.fields();
        return !RequestAccess::awaits_body(request) && !fields.has_element("connection", "close") &&
               (!request.http_1_0() || fields.has_element("connection", "keep-alive"));
    }

    SessionHost& host_;
    const Limits& limits_;
    const IpAddress& peer_;
    Time request_time_{};  // the end of the head, if there is an access log
    RequestParser parser_;
    std::string pending_;
    std::size_t pending_begin_ = 0;
    std::unique_ptr<BodyParser> body_;     // of the request whose body is being received
    std::unique_ptr<Request> request_;     // that a page's function answers
    HandlerAccess::ReplyState reply_;      // null unless an answer comes later
    std::unique_ptr<ReplyAnswer> answer_;  // has come, and is acted on at the end of the turn
    File file_;                            // the body that is being sent
    std::uint64_t file_left_ = 0;
    bool head_only_ = false;
};

// ---- WebSocket -----------------------------------------------------------------------------------------------------

// Drives a handler and its Connection: the checks of the opening handshake, events, pauses, and the end. Session
// derives from it and adds the socket.
class WebSocketDriver : public SessionNode {
public:
    // ---- for the handler -------------------------------------------------------------------------------------------

    bool origin_allowed(std::string_view origin) const override {
        return host_.site.origin_allowed(origin, HandlerAccess::core(*handler_).request);
    }
    Time now() const override { return host_.loop.now(); }
    bool on_loop_thread() const override { return host_.loop.on_loop_thread(); }
    Rooms& rooms() override { return host_.rooms; }
    Loop& loop() override { return host_.loop; }
    Server& server() override { return host_.server; }
    std::shared_ptr<Mailbox> mailbox() override { return host_.loop.mailbox(); }
    void report_exception(const char* callback, const char* what) noexcept override {
        host_.log.exception(callback, what, &peer_);
    }

    WebSocketHandler* handler() const { return handler_.get(); }
    void add_to(Metrics& metrics) const {
        if (!handler_) return;
        const HandlerCore& core = HandlerAccess::core(*handler_);
        metrics.messages_sent += core.messages_sent;
        metrics.messages_dropped += core.connection.dropped_messages();
    }

protected:
    enum class Pause : std::uint8_t {
        none,
        backlog,  // the peer does not read: reading stops until half of the backlog has gone
        budget,   // the messages cost much: the others have their turn first
        rate      // the peer sends more than messages_per_second or bytes_per_second
    };

    WebSocketDriver(SessionHost& host, const IpAddress& peer) : host_(host), peer_(peer) {}
    ~WebSocketDriver() = default;

    HandlerCore& core() { return HandlerAccess::core(*handler_); }
    const HandlerCore& core() const { return HandlerAccess::core(*handler_); }
    Connection& connection() { return core().connection; }
    std::size_t high_water() { return connection().limits().max_backlog / 2; }

    // ---- the opening handshake -------------------------------------------------------------------------------------

    // Makes the handler and calls its checks. Returns the refusal, or nothing if the handshake continues.
    std::optional<Response> start_handler(const Route& route, Request request) {
        handler_ = route.make_handler();
        if (!handler_) throw Error("route \"" + route.pattern().text() + "\": the factory made no handler");
        core().host = this;
        core().request = std::move(request);
        return check_handshake();
    }
    // What is agreed on with a client that offers compression.
    AcceptedCompression accept_compression() {
        const Fields offers = core().request.fields();
        if (!compression_available || offers.count("sec-websocket-extensions") == 0) return {};
        const auto options = handler_->get_compression_options();
        if (!options) return {};
        return host_.compression().accept(offers, *options);
    }
    void open_handler() {
        ++host_.metrics.websockets_opened;
        ++host_.metrics.websockets_open;
        mark_dirty();
        call("open", [this] { handler_->open(); });
        if (host_.log)
            host_.log(LogLevel::debug, "open",
                      {{"peer", core().request.remote_address()}, {"path", std::string(core().request.raw_path())}});
    }

    // ---- events ----------------------------------------------------------------------------------------------------

    // Calls the handler for what has arrived, until nothing is left, the budget is used up, or the peer does not read.
    // True: the connection has closed.
    bool dispatch_events() {
        const std::uint64_t deliveries = RoomsAccess::deliveries(host_.rooms);
        for (unsigned events = 1;; ++events) {
            const Event event = connection().next_event();
            switch (event.kind) {
                case Event::Kind::none:
                    if (connection().is_open() && connection().input_due() > now()) pause_ = Pause::rate;
                    return false;
                case Event::Kind::message:
                    ++host_.metrics.messages_received;
                    call("on_message", [&] { handler_->on_message(event.message); });
                    break;
                case Event::Kind::ping: call("on_ping", [&] { handler_->on_ping(event.message.data()); }); break;
                case Event::Kind::pong: call("on_pong", [&] { handler_->on_pong(event.message.data()); }); break;
                case Event::Kind::close: return true;
                case Event::Kind::paused: break;
            }
            mark_dirty();
            const bool spent = events >= max_events || connection().budget_spent() ||
                               RoomsAccess::deliveries(host_.rooms) - deliveries >= max_deliveries;
            if (connection().is_open() && must_pause(spent)) {
                connection().pause_input();
                return false;
            }
        }
    }
    // Continues with the input that was kept. True: the connection has closed.
    bool resume_input() {
        // The peer has sent what is kept here; its pong may be behind it.
        if (pause_ == Pause::rate) connection().record_activity(now());
        pause_ = Pause::none;
        connection().resume_input();
        return dispatch_events();
    }

    // Calls on_close(), exactly once, and destroys the handler. If memory runs out, only counts and the log entry are
    // missing.
    void close_handler() {
        RoomsAccess::remove_from_all(host_.rooms, *handler_);
        --host_.metrics.websockets_open;
        guarded("session", [this] {
            ++host_.metrics.closed[connection().close_cause()];
            ++host_.metrics.close_codes[connection().close_code()];
            log_close();
        });
        guarded("on_close", [this] { handler_->on_close(); });
        if (owner()) owner()->note_close(connection().close_code(), connection().close_cause());
        add_to(host_.metrics);
        core().rooms.clear();
        handler_.reset();
    }

    // ---- callbacks -------------------------------------------------------------------------------------------------

    // False: it threw, which was logged.
    bool guarded(const char* where, FunctionRef<> call) {
        return run_guarded(call, [&](const char* what) { host_.log.exception(where, what, &peer_); });
    }
    // Runs a callback of the handler. An exception is logged and closes this connection with 1011.
    template <class Callback>
    void call(const char* name, Callback&& callback) {
        HandlerAccess::run_hook(*handler_, name, callback);
    }

    SessionHost& host_;
    std::unique_ptr<WebSocketHandler> handler_;
    IpAddress peer_;
    Pause pause_ = Pause::none;
    bool above_high_water_ = false;  // on_drain() follows when the backlog has fallen
    bool server_closes_first_ = false;
    // What few connections have.
    struct Rare {
        std::string address_key{};              // under which it is counted; empty if it is not
        std::shared_ptr<SessionOwner> owner{};  // null for a server's connection
    };
    std::unique_ptr<Rare> rare_;
    SessionOwner* owner() const { return rare_ ? rare_->owner.get() : nullptr; }

private:
    // The budget of a visit, beside what Connection may inflate.
    static constexpr unsigned max_events = 256;
    static constexpr std::uint64_t max_deliveries = 4096;  // of broadcasts

    std::optional<Response> check_handshake() {
        const Request& request = core().request;
        const std::size_t origins = request.fields().count("origin");
        if (origins > 1) return Response(400, "There is more than one Origin header.\n");
        if (origins == 0 && host_.options.require_origin)
            return Response(403, "A request without an Origin is refused here.\n");
        const std::string_view origin = request.header("origin");
        if (origins == 1 && !handler_->check_origin(origin))
            return Response(403, host_.site.origin_refusal(origin, request));
        if (auto refusal = handler_->prepare(request)) return refusal;
        const std::vector<std::string_view> offered = offered_subprotocols(request);
        if (offered.empty()) return std::nullopt;
        const std::string chosen = handler_->select_subprotocol(offered);
        for (const std::string_view each : offered)
            if (each == chosen) core().subprotocol = each;
        if (core().subprotocol.empty() && !chosen.empty())
            host_.log(LogLevel::warning, "subprotocol_not_offered", {{"subprotocol", chosen}});
        return std::nullopt;
    }

    bool must_pause(bool budget_spent) {
        if (connection().input_due() > now()) {
            pause_ = Pause::rate;
            return true;
        }
        if (budget_spent) {
            pause_ = Pause::budget;
            return true;
        }
        if (connection().output().size() <= high_water()) return false;
        above_high_water_ = true;
        flush();
        if (connection().output().size() <= high_water()) return false;
        pause_ = Pause::backlog;
        return true;
    }

    WSCHAT_COLD void log_close() {
        if (!host_.log) return;
        const CloseCause cause = connection().close_cause();
        const bool notable = cause == CloseCause::protocol_error || cause == CloseCause::backlog;
        host_.log(notable ? LogLevel::info : LogLevel::debug, "closed",
                  {{"peer", core().request.remote_address()},
                   {"code", std::to_string(number(connection().close_code()))},
                   {"cause", std::string(to_string(cause))},
                   {"reason", connection().close_reason()}});
    }
};

// ---- one connection ------------------------------------------------------------------------------------------------

// A connection from accept() to its last byte: first HTTP, then perhaps WebSocket, at last lingering: our last byte is
// sent, and input is only discarded, because closing a socket with unread input makes the kernel send a reset, which
// destroys what the peer has not read.
//
// One way to die: whatever ends a session only changes its state (abort(), `ended_`, or the state of its Connection)
// and marks it dirty. finish_turn() sees that, calls on_close() once, drains what can be drained, and removes the
// session.
class Session final : public WebSocketDriver, public Pollable, public Timer {
public:
    Session(SessionHost& host, Socket socket, const IpAddress& peer, std::unique_ptr<Transport> transport, bool proxied)
        : WebSocketDriver(host, peer),
          stream_(std::move(socket), std::move(transport)),
          http_(std::make_unique<HttpExchange>(host, host.options.limits, peer_)) {
        if (proxied) http_->proxy = std::make_unique<ProxyHeader>();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() override { LoopAccess::timers(host_.loop).cancel(*this); }

    std::size_t index = 0;                  // in the worker's list of sessions
    std::unique_ptr<Session> next_deleted;  // in the worker's list of removed sessions

    bool gone() const { return phase_ == Phase::gone; }
    // Null before open() and after on_close().
    WebSocketHandler* opened_handler() const { return phase_ == Phase::websocket ? handler_.get() : nullptr; }
    std::size_t backlog() const { return counted_backlog_; }
    // Null if it is not counted.
    const std::string* address_key() const {
        return rare_ && !rare_->address_key.empty() ? &rare_->address_key : nullptr;
    }
    // Fetches what finish_turn() needs into the cache. Saves 3% of the server's time in a fan-out to 8,000.
    void prefetch() const {
        HandlerAccess::prefetch(handler_.get());
        if (next_dirty != nullptr) detail::prefetch(next_dirty, 2);
    }

    // `full`: the server has no room for it; it gets a 503.
    void start(bool full) {
        protect([&] {
            schedule(after(limits().handshake_timeout));
            http_->away_before = LoopAccess::away(host_.loop);
            if (!LoopAccess::poller(host_.loop).add(stream_.socket().descriptor(), *this, true, false))
                return abort(CloseCause::connection_lost, "cannot be watched");
            full_ = full;
            if (!http_->proxy) return admit();
            if (!host_.site.trusted(peer_)) fail_proxy("the peer is not one of trusted_proxies()");
        });
    }

    // Instead of start(): a client's connection. The frames must be valid and writable until this returns.
    void start_client(ClientHandshake opened) {
        rare_ = std::make_unique<Rare>();
        rare_->owner = std::move(opened.owner);
        route_limits_ = &owner()->session_limits();
        handshake_done_ = true;
        handler_ = std::move(opened.handler);
        core().host = this;
        protect([&] {
            core().request = std::move(opened.request);
            for (const std::string_view each : offered_subprotocols(core().request))
                if (each == opened.subprotocol) core().subprotocol = each;
            if (!LoopAccess::poller(host_.loop).add(stream_.socket().descriptor(), *this, true, false))
                return abort(CloseCause::connection_lost, "cannot be watched");
            connection().open(Role::client, limits(), host_.arena, now(), opened.mask_source,
                              std::move(opened.compression));
            schedule(connection().deadline());
            phase_ = Phase::websocket;
            http_.reset();
            open_handler();
            if (opened.frames.empty()) return;
            connection().receive(const_cast<char*>(opened.frames.data()), opened.frames.size(), now());
            if (dispatch_events()) finish_websocket();
        });
    }

    // ---- called by the loop and the server -------------------------------------------------------------------------

    void on_ready(bool readable, bool writable, bool broken) override {
        if (gone()) return;
        protect([&] {
            if (writable) resume_output();
            // A session that paused for its budget first handles what has arrived. Then it reads the end.
            if (readable && reading()) read();
            else if (broken && pause_ != Pause::budget) abort(CloseCause::connection_lost, "the connection was reset");
            mark_dirty();
        });
    }

    void on_timer(Time now) override {
        if (gone()) return;
        const Time was_due = due();
        protect([&] {
            if (read_late_input() || extend_handshake(was_due)) {
                // The peer was in time.
            } else if (phase_ == Phase::websocket) {
                connection().tick(now);
                schedule(connection().deadline());
            } else if (phase_ == Phase::http && http_->awaits_reply()) {
                give_up_reply(Response(503, "The server did not answer in time.\n"));
                schedule(after(limits().linger_timeout));
            } else if (phase_ == Phase::http && http_->started() && !http_->busy()) {
                respond(Response(408, "The request did not arrive in time.\n"), nullptr);
                schedule(after(limits().linger_timeout));
            } else if (http_->proxy) {
                fail_proxy("the header did not arrive in time");
            } else if (phase_ == Phase::http && http_->idle) {
                // A request may have crossed the deadline on its way.
                read();
                if (phase_ == Phase::http && http_->idle && !ended_) linger();
            } else {
                ended_ = true;
            }
            mark_dirty();
        });
    }

    // Continues with work that a budget of an earlier turn has left over.
    void continue_work() {
        waiting_ = false;
        if (gone() || ended_) return;
        // After a pause for its backlog or rate it continues in finish_turn(), after a flush: may_work() must be true.
        if (pause_ == Pause::none || pause_ == Pause::budget) work_turn_ = host_.turn.number;
        protect([&] {
            if (phase_ == Phase::websocket && pause_ == Pause::budget && resume_input()) finish_websocket();
            if (reading() && stream_.has_input()) read();
            if (phase_ == Phase::http) continue_http();
            mark_dirty();
        });
    }

    // The end of a turn in which something happened here: flushes, and removes the session if it has ended.
    void finish_turn() {
        dirty = false;
        if (gone()) return;
        protect([&] {
            if (stream_.encrypted()) update_encryption();
            if (phase_ == Phase::websocket) update_websocket();
            else update_http();
            if (!ended_) update_interest();
            if (pause_ == Pause::budget || (reading() && stream_.has_input())) wait_for_next_turn();
        });
        if (ended_) remove();
    }

    // The server shuts down: an open WebSocket gets a Close frame, an answer is finished, anything else ends.
    void shut_down() {
        protect([&] {
            if (phase_ == Phase::websocket)
                connection().close(CloseCode::going_away, "server is shutting down", now(), CloseCause::shutdown);
            else if (phase_ == Phase::http) shut_down_http();
            if (!gone()) mark_dirty();
        });
    }
    // Drops the connection at the end of this turn, without a Close frame. Throws nothing.
    WSCHAT_NOINLINE void abort(CloseCause cause, std::string_view reason) {
        if (gone()) return;
        if (phase_ == Phase::websocket) connection().abort(cause, reason);
        ended_ = true;
        update_backlog();
        mark_dirty();
    }

    // ---- for the handler -------------------------------------------------------------------------------------------

    void mark_dirty() override {
        if (!std::exchange(dirty, true)) host_.turn.dirty.push(*this);
    }
    void set_nodelay(bool on) override { stream_.socket().set_nodelay(on); }
    void on_reply(ReplyAnswer answer) override {
        http_->set_reply(std::move(answer));
        mark_dirty();
    }
    std::size_t offer(const std::string_view* pieces, std::size_t count) override {
        if (blocked() || send_failed_) return 0;
        std::size_t size = 0;
        for (std::size_t i = 0; i < count; ++i) size += pieces[i].size();
        return note_sent(stream_.send(pieces, count, host_.wire), size);
    }
    void flush() override {
        SendQueue& queue = output();
        const std::uint64_t sent_before = host_.wire.sent;
        if (phase_ == Phase::websocket && connection().sends_volatile() && !std::exchange(send_buffer_set_, true) &&
            limits().send_buffer != 0)
            stream_.socket().set_send_buffer(limits().send_buffer);
        if (queue.empty() && stream_.wants_write()) offer(nullptr, 0);
        while (!queue.empty() && !blocked() && !send_failed_) {
            const std::size_t count = queue.gather(host_.pieces.data(), Socket::max_pieces);
            queue.consume(offer(host_.pieces.data(), count));
        }
        if (blocked()) queue.detach_from_pool();
        // A page may take as long as its peer makes progress.
        if (phase_ == Phase::http && host_.wire.sent != sent_before && stream_.established()) schedule_request();
        update_backlog();
    }

    // ---- for a batch of sends --------------------------------------------------------------------------------------

    // All that is queued, if it is one piece that may be sent together with what others send; else empty.
    std::string_view batchable() {
        std::string_view piece;
        if (phase_ != Phase::websocket || stream_.has_transport() || blocked() || send_failed_ ||
            output().gather(&piece, 1) == 0)
            return {};
        return piece.size() == output().size() ? piece : std::string_view();
    }
    Socket& socket() { return stream_.socket(); }
    void note_batched(const SendBatch::Item& item) {
        if (!item.sent) return;
        host_.wire.sent += item.sent->size;
        protect([&] { output().consume(note_sent(*item.sent, item.bytes.size())); });
    }

private:
    enum class Phase : std::uint8_t { http, websocket, lingering, gone };

    // If a shutdown begins, a connection has this time from its accept to send its first request.
    static constexpr Duration drain_grace = std::chrono::milliseconds(100);

    const Limits& limits() const { return route_limits_ != nullptr ? *route_limits_ : host_.options.limits; }
    Time after(Duration timeout) const {
        return timeout == Duration::zero() ? (Time::max)() : saturating_add(now(), timeout);
    }
    void schedule(Time due) { LoopAccess::timers(host_.loop).schedule(*this, due); }
    // The deadline of a request, or of the rest of its body.
    void schedule_request() {
        schedule(saturating_add(after(limits().handshake_timeout), Connection::drain_time(http_->body_expected())));
    }

    // An exception in here means that memory ran out, which costs this connection.
    void protect(FunctionRef<> work) {
        if (!guarded("session", work)) abort(CloseCause::connection_lost, "out of memory");
    }

    // The one place where a session ends.
    void remove() {
        if (phase_ == Phase::websocket) close_handler();
        phase_ = Phase::gone;
        handler_.reset();  // one that was never opened, because memory ran out
        LoopAccess::timers(host_.loop).cancel(*this);
        LoopAccess::poller(host_.loop).remove(stream_.socket().descriptor());
        update_backlog();
        if (!send_failed_) guarded("session", [this] { stream_.end(host_.wire); });
        stream_.close();
        http_.reset();
        host_.remove(*this);
        if (owner()) guarded("client", [this] { owner()->on_session_end(); });
    }

    // Work beyond flushing is done once per turn. False: it continues in the next turn.
    bool may_work() {
        if (work_turn_ == host_.turn.number) {
            wait_for_next_turn();
            return false;
        }
        work_turn_ = host_.turn.number;
        return true;
    }
    void wait_for_next_turn() {
        if (!std::exchange(waiting_, true)) host_.turn.waiting.push(*this);
    }

    // ---- output ----------------------------------------------------------------------------------------------------

    SendQueue& output() { return phase_ == Phase::websocket ? connection().output() : http_->output; }
    bool blocked() { return phase_ == Phase::websocket ? connection().write_blocked() : http_->blocked; }
    void set_blocked(bool blocked) {
        if (phase_ == Phase::websocket) connection().set_write_blocked(blocked);
        else http_->blocked = blocked;
    }

    // Records the result of offering `size` bytes to the kernel. Returns how many bytes the caller removes from the
    // queue: none after an error, because abort() has cleared it.
    std::size_t note_sent(const IoResult& sent, std::size_t size) {
        send_failed_ = sent.outcome == IoResult::Outcome::error;
        set_blocked(!send_failed_ && (sent.size < size || stream_.wants_write()));
        if (!send_failed_) return sent.size;
        if (phase_ == Phase::websocket) connection().abort(CloseCause::connection_lost, stream_.error_text(sent));
        mark_dirty();
        return 0;
    }
    // The kernel takes output again.
    void resume_output() {
        set_blocked(false);
        if (phase_ != Phase::websocket) return flush();
        const std::uint64_t sent_before = host_.wire.sent;
        connection().send_pending_pong();
        flush();
        if (host_.wire.sent != sent_before) connection().record_activity(now());
    }
    // A flush that leaves nothing behind touches no memory but what it needed before.
    void update_backlog() {
        std::size_t held = 0;
        if (phase_ == Phase::websocket && !ended_)
            held = output().held() + connection().buffered_input() + held_request_;
        else if (http_ && !gone() && !ended_) held = output().held() + http_->buffered_input();
        if (!gone() && !ended_) held += stream_.buffered();
        if (held == counted_backlog_) return;
        host_.backlog += held - counted_backlog_;
        counted_backlog_ = held;
        if (phase_ == Phase::websocket) HandlerAccess::note_queued(*handler_);
    }

    // Tells the poller what the session waits for.
    void update_interest() {
        const bool read = reading(), write = stream_.encrypted() ? stream_.wants_write() : blocked();
        if (read == watching_read_ && write == watching_write_) return;
        if (!LoopAccess::poller(host_.loop).change(stream_.socket().descriptor(), *this, read, write))
            return abort(CloseCause::connection_lost, "cannot be watched: " + os::error_text(os::last_error()));
        watching_read_ = read;
        watching_write_ = write;
    }

    // ---- input -----------------------------------------------------------------------------------------------------

    bool reading() const {
        if (ended_ || pause_ != Pause::none || input_ended_) return false;
        switch (phase_) {
            case Phase::http: return !http_->has_pending();
            case Phase::websocket: return true;
            case Phase::lingering: return http_->discarded <= limits().linger_bytes;
            default: return false;
        }
    }

    void read() {
        if (http_ && http_->proxy && !read_proxy_header()) return;
        constexpr int max_reads = 4;  // then other sessions have their turn
        for (int i = 0; i < max_reads && reading(); ++i) {
            if (i != 0 && !host_.turn.take_more()) return;
            if (stream_.encrypted() && !handshake_done_ && !host_.turn.take_handshake()) return;
            std::pair<char*, std::size_t> area{nullptr, 0};
            if (phase_ == Phase::websocket) area = connection().receive_buffer();
            if (area.first == nullptr) area = {host_.receive_buffer.data(), host_.receive_buffer.capacity()};
            if (phase_ == Phase::websocket) area.second = (std::min)(area.second, connection().max_input());
            const IoResult got = stream_.receive(area.first, area.second, host_.wire);
            if (!stream_.check_rate(limits(), now(), host_.wire)) return end_of_input({IoResult::Outcome::error});
            if (got.outcome == IoResult::Outcome::would_block) return;
            if (got.outcome != IoResult::Outcome::done) return end_of_input(got);
            take_input(area.first, got.size);
            if (got.size < area.second && !stream_.has_input()) return;
        }
    }

    // For a timer that is due. After a long turn, input that came in time may still wait in the kernel, behind that of
    // other sessions: it is read first. True: the session has ended, or its timer is set again.
    bool read_late_input() {
        if (phase_ == Phase::lingering || !reading() || (phase_ == Phase::http && http_->busy())) return false;
        read();
        if (ended_ || scheduled()) return true;
        const bool in_time = phase_ == Phase::websocket ? connection().deadline() > now() : http_->busy();
        if (in_time) schedule(phase_ == Phase::websocket ? connection().deadline() : after(limits().handshake_timeout));
        return in_time;
    }

    // The deadline of a TLS handshake, and of the request after it, does not run while the loop is away, and not while
    // the handshakes of others use up the budget of each turn.
    bool extend_handshake(Time was_due) {
        if (ended_ || phase_ != Phase::http || !stream_.encrypted() || http_->answered || !reading()) return false;
        const Duration away = LoopAccess::away(host_.loop);
        const Duration missed = away - std::exchange(http_->away_before, away);
        char byte = 0;
        const bool unread = !stream_.established() && host_.turn.handshakes_left == 0 &&
                            stream_.socket().peek(&byte, 1).outcome == IoResult::Outcome::done;
        if (missed == Duration::zero() && !unread) return false;
        schedule((std::max)(saturating_add(was_due, missed), now() + std::chrono::seconds(1)));
        return true;
    }

    void take_input(char* data, std::size_t size) {
        if (phase_ == Phase::websocket) {
            connection().receive(data, size, now());
            if (dispatch_events()) finish_websocket();
        } else if (phase_ == Phase::http) {
            const std::string_view rest = parse_requests({data, size});
            if (!rest.empty()) http_->keep(rest);
        } else {
            http_->discarded += size;
        }
    }

    void end_of_input(const IoResult& got) {
        const bool tls_failed = stream_.tls_failed();
        if (tls_failed) log_tls_failure();
        if (phase_ == Phase::websocket) {
            connection().receive_eof(got.outcome == IoResult::Outcome::error
                                         ? stream_.error_text(got)
                                         : "the peer hung up without a Close frame");
        } else if (tls_failed) {
            continue_without_tls();
        } else if (got.outcome == IoResult::Outcome::end && http_->busy() && !handler_ && stream_.established()) {
            // The peer has shut its sending side and may still wait for the answer.
            input_ended_ = true;
            http_->keep_alive = false;
        } else {
            ended_ = true;
        }
    }

    // ---- the PROXY header ------------------------------------------------------------------------------------------

    // Receives no more than the header, because the bytes after it may be TLS. True: it is complete and valid.
    bool read_proxy_header() {
        for (;;) {
            char* const data = host_.receive_buffer.data();
            IoResult got = stream_.socket().peek(data, host_.receive_buffer.capacity());
            std::size_t consumed = 0;
            ProxyHeader::Outcome outcome = ProxyHeader::Outcome::need_more;
            if (got.outcome == IoResult::Outcome::done) {
                outcome = http_->proxy->feed({data, got.size}, consumed);
                got = stream_.socket().receive(data, consumed);
                host_.wire.received += got.size;
            }
            if (outcome == ProxyHeader::Outcome::failure) return fail_proxy(http_->proxy->failure());
            if (got.outcome == IoResult::Outcome::would_block) return false;
            if (got.outcome != IoResult::Outcome::done) return fail_proxy("the peer hung up within the header");
            if (outcome == ProxyHeader::Outcome::done) break;
        }
        if (http_->proxy->client()) peer_ = *http_->proxy->client();
        http_->proxy.reset();
        admit();
        return true;
    }
    // A peer that sends nothing is a check of the port, not a failure.
    bool fail_proxy(std::string_view cause) {
        const bool check = !http_->proxy->started() && host_.site.trusted(peer_);
        if (!check) host_.note_proxy_failure(peer_, cause);
        ended_ = true;
        mark_dirty();
        return false;
    }
    // Answers 503 if a limit of connections does not allow this one. That of a proxy applies to its clients.
    void admit() {
        if (full_ || (!host_.site.trusted(peer_) && !count_address(peer_)))
            respond(host_.too_many_connections(), nullptr);
    }

    // ---- encryption ------------------------------------------------------------------------------------------------

    void update_encryption() {
        if (!handshake_done_ && stream_.established()) {
            handshake_done_ = true;
            ++host_.metrics.tls_handshakes;
        }
        if (blocked() && !stream_.wants_write()) resume_output();
    }

    WSCHAT_COLD void log_tls_failure() {
        ++host_.metrics.tls_failures;
        // Anybody can fail a handshake: port scanners and clients of other protocols do.
        if (host_.log)
            host_.log(handshake_done_ ? LogLevel::info : LogLevel::debug, "tls_failed",
                      {{"peer", peer_.to_string()}, {"cause", stream_.tls_failure()}});
    }

    // TLS has failed before there was a WebSocket. A peer that speaks plain HTTP gets a plain answer. Any other peer
    // has got an alert, which a reset would destroy.
    WSCHAT_COLD void continue_without_tls() {
        const bool plain_text = stream_.peer_speaks_plain_text();
        stream_.drop_encryption();
        set_blocked(false);
        if (!plain_text) {
            http_->drop_output();
            return linger();
        }
        if (!http_->busy())
            respond(
                Response(400, "This port speaks TLS, and the client began with plain HTTP: use https:// or wss://.\n"),
                nullptr);
    }

    // ---- HTTP ------------------------------------------------------------------------------------------------------

    void respond(const Response& response, const Request* request) {
        http_->respond(response, request);
        mark_dirty();
    }

    // An answer is finished, and so is a request that waits for it. A request that has arrived is answered.
    void shut_down_http() {
        if (http_->busy() || http_->has_pending()) {
            if (!http_->has_pending()) http_->keep_alive = false;
            return;
        }
        const bool idle = http_->idle;
        if (reading() && !http_->proxy) read();
        if (phase_ != Phase::http || ended_ || http_->busy() || http_->has_pending()) return;
        // A client sends its first request at once: an older connection need not wait for one.
        const Time accepted = scheduled() ? due() - limits().handshake_timeout : now();
        if (idle || accepted + drain_grace <= now()) ended_ = true;
        else schedule(accepted + drain_grace);
    }

    // Returns the bytes that wait for an answer.
    std::string_view parse_requests(std::string_view bytes) {
        if (std::exchange(http_->idle, false)) schedule(after(limits().handshake_timeout));
        while (!bytes.empty() && phase_ == Phase::http && !http_->busy() && http_->keep_alive) {
            std::optional<Request> request = http_->parse(bytes);
            mark_dirty();
            if (!request) return {};
            answer(std::move(*request), bytes);
        }
        return phase_ == Phase::http ? bytes : std::string_view();
    }
    void parse_pending() {
        std::size_t begin = 0;
        std::string pending = http_->take_pending(begin);
        const std::string_view rest = parse_requests({&pending[begin], pending.size() - begin});
        if (!rest.empty()) http_->keep_rest(std::move(pending), rest.size());
    }

    WSCHAT_COLD void answer(Request request, std::string_view& rest) {
        if (!RequestAccess::body_complete(request)) begin_request(request);
        http_->answered = true;
        if (host_.draining && wants_upgrade(request))
            return http_->respond_last(Response(503, "The server is shutting down.\n"), request);
        if (!host_.site.serves_host(request.host())) {
            const std::string host(request.host());
            return http_->respond_last(Response(421, "This server does not serve the host \"" + host + "\".\n"),
                                       request);
        }
        if (wants_upgrade(request)) return upgrade(std::move(request), rest);
        const bool answered = guarded("page", [&] { http_->answer(std::move(request), *this); });
        // Half an answer can neither be taken back nor be followed by another.
        if (!answered && http_->output_queued())
            return abort(CloseCause::connection_lost, "the answer was not finished");
        if (!answered) return give_up_reply(Response(500, "The server failed to answer.\n"));
        if (http_->awaits_reply()) schedule(after(limits().reply_timeout));
        else if (http_->body_expected() != 0) schedule_request();
    }
    void begin_request(Request& request) {
        ++host_.metrics.requests;
        const ForwardedClient client = host_.site.client(peer_, request, stream_.encrypted());
        if (!client.unreadable.empty()) log_unreadable(client);
        const std::string address = client.address.to_string();
        RequestAccess::set_connection(request, address, client.scheme == "https",
                                      stream_.encrypted() ? stream_.peer_name() : std::string());
    }
    void give_up_reply(const Response& response) {
        http_->give_up_reply(response);
        handler_.reset();
        mark_dirty();
    }

    void update_http() {
        if (http_->has_reply()) finish_reply();
        if (phase_ != Phase::http && phase_ != Phase::lingering) return mark_dirty();
        flush();
        if (!blocked() && http_->has_file() && may_work()) send_file();
        if (send_failed_) {
            ended_ = true;
        } else if (http_->busy()) {
            if (!blocked() && !http_->awaits_reply()) wait_for_next_turn();
        } else if (phase_ == Phase::lingering || !http_->keep_alive) {
            linger();
        } else if (http_->has_pending() && may_work()) {
            parse_pending();
        } else if (http_->answered && !http_->idle && !http_->started() && !http_->has_pending()) {
            http_->idle = true;
            schedule(after(limits().keep_alive_timeout));
        }
    }
    // A Reply has been used: by a page, or in prepare_async().
    void finish_reply() {
        if (!handler_) {
            if (!guarded("page", [&] { http_->finish_reply(); }))
                give_up_reply(Response(500, "The server failed to answer.\n"));
            return;
        }
        std::size_t begin = 0;
        std::string pending = http_->take_pending(begin);
        std::string_view rest = std::string_view(pending).substr(begin);
        finish_upgrade(rest);
    }
    void continue_http() {
        if (!blocked() && http_->has_file()) send_file();
        if (http_->busy() || !http_->keep_alive || !http_->has_pending()) return;
        parse_pending();
    }
    void send_file() {
        constexpr int max_pieces = 8;  // then other sessions have their turn
        for (int i = 0; i < max_pieces && http_->has_file() && !blocked() && !send_failed_; ++i) {
            if (!http_->queue_file_piece()) ended_ = true;
            flush();
        }
    }

    // Our last byte is with the kernel: tells the peer so, and discards what still arrives, for a bounded time.
    void linger() {
        if (http_->shut_down) return;
        phase_ = Phase::lingering;
        if (!stream_.end(host_.wire)) return;
        http_->shut_down = true;
        if (input_ended_) {
            ended_ = true;
            return;
        }
        stream_.drop_encryption();  // input is discarded from now on
        // RFC 6455 7.1.1: "the server MUST close the TCP connection first", so that it holds the TIME_WAIT state.
        if (!server_closes_first_) stream_.socket().shutdown_send();
        schedule(after(limits().linger_timeout));
    }

    // ---- WebSocket -------------------------------------------------------------------------------------------------

    // `rest` follows the request; it is consumed if the handshake succeeds.
    void upgrade(Request request, std::string_view& rest) {
        const Route* route = host_.site.routes.find(request.raw_path());
        if (route == nullptr) return refuse(Response(404, "There is no WebSocket at this path.\n"), request);
        if (auto refusal = reject_upgrade(request)) return refuse(*refusal, request);
        if (!count_address(host_.site.client_address(peer_, request)))
            return refuse(host_.too_many_connections(), request);
        RequestAccess::set_params(request, route->pattern().params(request.raw_path()));
        route_limits_ = route->limits();
        std::optional<Response> refusal;
        const bool checked = guarded("handshake", [&] {
            refusal = start_handler(*route, std::move(request));
            if (!refusal) handler_->prepare_async(core().request, http_->make_reply(*this));
        });
        if (!checked) return fail_upgrade();
        if (refusal) return refuse_upgrade(*refusal);
        if (http_->has_reply()) return finish_upgrade(rest);
        const Time latest = after(limits().reply_timeout);
        if (!scheduled() || latest < due()) schedule(latest);
    }
    // prepare_async() has been answered.
    void finish_upgrade(std::string_view& rest) {
        const std::unique_ptr<ReplyAnswer> answer = http_->take_reply();
        if (answer->dropped) host_.log.exception("prepare_async", "the Reply was destroyed unused", &peer_);
        if (answer->response) return refuse_upgrade(*answer->response);
        if (host_.draining) return refuse_upgrade(Response(503, "The server is shutting down.\n"));
        AcceptedCompression compression;
        Response headers(200);
        std::optional<Response> refusal;
        const bool prepared = guarded("handshake", [&] {
            if (answer->setup) refusal = answer->setup(*handler_);
            if (refusal) return;
            handler_->response_headers(headers);
            compression = accept_compression();
        });
        if (!prepared) return fail_upgrade();
        if (refusal) return refuse_upgrade(*refusal);
        open_websocket(std::move(compression), headers, rest);
    }
    void refuse_upgrade(const Response& response) {
        const std::unique_ptr<WebSocketHandler> refused = std::move(handler_);
        refuse(response, HandlerAccess::core(*refused).request);
    }
    void fail_upgrade() {
        http_->take_reply();
        handler_.reset();
        respond(Response(500, "The server failed to open the connection.\n"), nullptr);
    }

    // All clients of this proxy share the limits for one address now.
    WSCHAT_COLD void log_unreadable(const ForwardedClient& forwarded) {
        if (!host_.log) return;
        host_.log(LogLevel::warning, "forwarded_address_unreadable",
                  {{"peer", peer_.to_string()},
                   {"forwarded", std::string(forwarded.unreadable.substr(0, 200))},
                   {"used", forwarded.address.to_string()}});
    }

    WSCHAT_COLD void refuse(const Response& response, const Request& request) {
        if (host_.log)
            host_.log(LogLevel::info, "refused",
                      {{"status", std::to_string(response.status())},
                       {"peer", peer_.to_string()},
                       {"path", std::string(request.raw_path())},
                       {"sentence", response.body().substr(0, response.body().find('\n'))}});
        http_->respond_last(response, request);
    }

    void open_websocket(AcceptedCompression compression, const Response& headers, std::string_view& rest) {
        std::string lines;
        for (const auto& [name, value] : headers.headers()) add_line(lines, name, value);
        add_cookies(lines, headers, core().request);
        http_->queue(switching_protocols(core().request.header("sec-websocket-key"), core().subprotocol,
                                         compression.response, lines));
        http_->note_answer(101, &core().request, 0);
        connection().open(Role::server, limits(), host_.arena, now(), nullptr, std::move(compression.compression));
        schedule(connection().deadline());
        // One of normal size is part of what an idle connection needs.
        const std::size_t size = RequestAccess::held(core().request);
        held_request_ = size > 4 * 1024 ? static_cast<std::uint16_t>((std::min)(size, std::size_t{UINT16_MAX})) : 0;
        // From here to open() nothing throws, so that on_close() comes only after open().
        std::swap(connection().output(), http_->output);
        connection().set_write_blocked(http_->blocked);
        phase_ = Phase::websocket;
        http_.reset();
        open_handler();
        const std::string_view frames = std::exchange(rest, std::string_view());
        if (frames.empty()) return;
        // They lie in the receive buffer or in pipelined input, and both are ours to unmask in place.
        connection().receive(const_cast<char*>(frames.data()), frames.size(), now());
        if (dispatch_events()) finish_websocket();
    }

    void update_websocket() {
        if (output().size() > high_water()) above_high_water_ = true;
        flush();
        if (connection().state() == Connection::State::closed) {
            if (dispatch_events()) finish_websocket();
            return;
        }
        if (may_resume() && may_work() && resume_input()) return finish_websocket();
        if (above_high_water_ && output().size() <= high_water() && connection().is_open()) {
            above_high_water_ = false;
            call("on_drain", [this] { handler_->on_drain(); });
        }
        // Closing may be due before the next ping, and the answer to a ping before the next ping.
        if (!scheduled() || websocket_deadline() < due()) schedule(websocket_deadline());
    }
    // Whether the reason of a pause has ended. A connection that is closing only waits for the peer's Close frame.
    bool may_resume() {
        if (pause_ == Pause::backlog) return !connection().is_open() || output().size() <= high_water();
        return pause_ == Pause::rate && (!connection().is_open() || connection().input_due() <= now());
    }
    Time websocket_deadline() {
        const Time due = connection().deadline();
        return pause_ == Pause::rate ? (std::min)(due, connection().input_due()) : due;
    }

    // The connection has closed: the handler ends. What is queued still goes out, unless nothing can be delivered.
    void finish_websocket() {
        if (connection().aborted()) {
            ended_ = true;
            return mark_dirty();
        }
        auto http = std::make_unique<HttpExchange>(host_, limits(), peer_);
        http->keep_alive = false;
        http->blocked = connection().write_blocked();
        std::swap(http->output, connection().output());
        server_closes_first_ = owner() != nullptr && connection().close_cause() != CloseCause::protocol_error;
        close_handler();
        http_ = std::move(http);
        phase_ = Phase::lingering;
        pause_ = Pause::none;
        schedule(saturating_add(after(limits().closing_timeout), Connection::drain_time(output().size())));
        mark_dirty();
    }

    // False if its address has as many connections as it may have. Counts once.
    bool count_address(const IpAddress& client) {
        const std::size_t max = host_.options.server_limits.max_connections_per_address;
        if (max == 0 || address_key() != nullptr) return true;
        auto rare = std::make_unique<Rare>();
        rare->address_key = client.rate_limit_key();
        if (!host_.addresses.add(rare->address_key, max)) return false;
        rare_ = std::move(rare);
        return true;
    }

    Stream stream_;
    Phase phase_ = Phase::http;
    bool ended_ = false;  // finish_turn() removes the session
    bool full_ = false;   // the server has no room for it
    bool send_buffer_set_ = false;
    bool send_failed_ = false;
    bool input_ended_ = false;     // the peer has shut its sending side
    bool handshake_done_ = false;  // of TLS
    bool waiting_ = false;         // in the list of sessions with work left
    bool watching_read_ = true;
    bool watching_write_ = false;
    std::uint16_t held_request_ = 0;      // bytes of the request that an open WebSocket keeps, if it is a large one
    std::uint32_t work_turn_ = 0;         // the last turn in which it did work beyond flushing
    std::unique_ptr<HttpExchange> http_;  // null while a WebSocket is open
    std::size_t counted_backlog_ = 0;
    const Limits* route_limits_ = nullptr;  // null: those of the server
};

// ---- listening -----------------------------------------------------------------------------------------------------

// Accepts connections for the server.
class Listener final : public Pollable, public Timer {
public:
    Listener(SessionHost& host, const ListenAddress& address, std::shared_ptr<TransportFactory> transports,
             const ListenOptions& options)
        : host_(host),
          socket_(address, host.options.reuse_port, options),
          transports_(std::move(transports)),
          proxied_(options.proxy_protocol) {
        if (!LoopAccess::poller(host_.loop).add(socket_.descriptor(), *this, true, false))
            throw Error("listen " + socket_.address().to_string() + ": " + os::error_text(os::last_error()));
    }
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;
    ~Listener() override {
        LoopAccess::timers(host_.loop).cancel(*this);
        LoopAccess::poller(host_.loop).remove(socket_.descriptor());
    }

    const ListenAddress& address() const { return socket_.address(); }
    bool secure() const { return transports_ != nullptr; }
    void reload() {
        if (transports_) transports_->reload();
    }

    void on_ready(bool, bool, bool) override {
        constexpr int max_accepts = 64;  // then sessions have their turn
        int error = 0;
        for (int i = 0; i < max_accepts && !host_.draining; ++i) {
            IpAddress peer;
            Socket accepted = socket_.accept(peer, error);
            if (accepted) accept(std::move(accepted), peer);
            else if (os::would_block(error)) return;
            else if (os::out_of_descriptors(error)) return reject_one(error);
            else if (error == ENOBUFS || error == ENOMEM) return pause_accept(error);
            // Any other error belongs to one connection that is gone already (ECONNABORTED), unless it does not end
            // (EPERM, ENETDOWN).
        }
        if (error != 0) pause_accept(error);
    }
    void on_timer(Time now) override {
        if (!LoopAccess::poller(host_.loop).change(socket_.descriptor(), *this, true, false)) schedule_retry(now);
    }

private:
    void accept(Socket accepted, const IpAddress& peer) {
        ++host_.metrics.connections_accepted;  // also if memory runs out in make()
        run_guarded(
            [&] { host_.accept(std::move(accepted), peer, transports_ ? transports_->make() : nullptr, proxied_); },
            [&](const char* what) { host_.log.exception("accept", what, &peer); });
    }
    // Without a descriptor the connection can be neither accepted nor rejected, and the poller would report it for
    // ever. The descriptor in reserve serves to accept it and to answer 503.
    void reject_one(int error) {
        host_.reserve.close();
        IpAddress peer;
        int ignored = 0;
        Socket rejected = socket_.accept(peer, ignored);
        if (rejected) {
            constexpr std::string_view answer =
                "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 20\r\n\r\nThe server is "
                "full.\n";
            if (!secure()) rejected.send(&answer, 1);
            rejected.shutdown_send();
            ++host_.metrics.connections_refused;
            rejected.close();
        }
        host_.reserve_descriptor();
        pause_accept(error);
    }
    // Tries again a little later, so that a shortage does not make the loop spin.
    void pause_accept(int error) {
        host_.log(LogLevel::warning, "accept_paused", {{"cause", os::error_text(error)}});
        schedule_retry(host_.loop.now());  // before the change, because it may need memory
        LoopAccess::poller(host_.loop).change(socket_.descriptor(), *this, false, false);
    }
    void schedule_retry(Time now) {
        LoopAccess::timers(host_.loop).schedule(*this, now + std::chrono::milliseconds(50));
    }

    SessionHost& host_;
    ListenSocket socket_;
    std::shared_ptr<TransportFactory> transports_;  // null if the connections are plain
    const bool proxied_;
};

// ---- one loop ------------------------------------------------------------------------------------------------------

// Serves a site on one loop: its listeners, its sessions and their turns.
class Worker final : public SessionHost {
public:
    WSCHAT_COLD Worker(Server& its_server, const ServerOptions& its_options, const Site& its_site)
        : SessionHost(its_server, its_options, its_site) {
        LoopAccess::at_turn_end(loop, [this] { return end_turn(); });
        LoopAccess::set_owner(loop, this);
        LoopAccess::on_exception(loop,
                                 [this](const char* where, const char* what) { log.exception(where, what, nullptr); });
    }

    const StringMap<Listener>& listeners() const { return listeners_; }
    bool idle() const { return sessions_.empty(); }
    // Something is to be done although the poller reports nothing.
    bool has_work() const { return !turn.dirty.empty() || !turn.waiting.empty(); }

    WSCHAT_COLD void listen(std::string_view address, std::shared_ptr<TransportFactory> transports,
                            const ListenOptions& listen_options = {}) {
        if (draining) throw Error("listen " + std::string(address) + ": the server is shutting down");
        const Listener& added =
            listeners_.append(*this, ListenAddress::parse(address), std::move(transports), listen_options);
        log(LogLevel::debug, "listening", {{"address", added.address().to_string()}});
    }

    // ---- shutdown --------------------------------------------------------------------------------------------------

    WSCHAT_COLD void begin_shutdown(Duration deadline) {
        const bool first = !std::exchange(draining, true);
        const std::size_t connections = sessions_.size();
        if (first) notify_systemd("STOPPING=1");
        if (first) std::swap(closed_listeners_, listeners_);
        for (const auto& session : sessions_) session->shut_down();
        // Without a deadline it might never end.
        const auto abort = [this, shutdown = shutdowns_] {
            if (shutdown == shutdowns_) abort_all();
        };
        run_guarded([&] { loop.call_later(deadline, abort); }, [this](const char*) { abort_all(); });
        if (first) log(LogLevel::debug, "shutdown", {{"connections", std::to_string(connections)}});
    }
    // True if a shutdown has finished. The server may listen again.
    bool end_shutdown() {
        if (!draining || !idle()) return false;
        draining = false;
        ++shutdowns_;  // the deadline is for no later connection
        return true;
    }
    // Ends all connections at the end of this turn, without a closing handshake.
    void abort_all() {
        for (const auto& session : sessions_) session->abort(CloseCause::shutdown, "server is shutting down");
    }
    // The same at once.
    WSCHAT_COLD void close() {
        abort_all();
        while (!sessions_.empty()) end_turn();
    }

    void each_handler(FunctionRef<WebSocketHandler&> visit) {
        for (const auto& session : sessions_)
            if (WebSocketHandler* handler = session->opened_handler()) visit(*handler);
    }
    Metrics current_metrics() const {
        Metrics now = metrics;
        now.connections_open = sessions_.size();
        now.rooms = rooms.size();
        now.backlog_bytes = backlog;
        now.bytes_received = wire.received;
        now.bytes_sent = wire.sent;
        for (const auto& session : sessions_) session->add_to(now);
        return now;
    }

    // ---- what sessions and listeners call --------------------------------------------------------------------------

    void accept(Socket socket, const IpAddress& peer, std::unique_ptr<Transport> transport, bool proxied) override {
        const std::size_t max = max_connections();
        // Files take descriptors of connections. Without files only `max` counts, which the program may have raised.
        const std::size_t used = sessions_.size() + open_files;
        const std::size_t usable = open_files == 0 ? max : (std::min)(max + open_files, usable_descriptors());
        if (used >= usable + max_rejections_at_once) {
            ++metrics.connections_refused;
            return;
        }
        const bool full = used >= usable;
        auto made = std::make_unique<Session>(*this, std::move(socket), peer, std::move(transport), proxied);
        Session& session = *made;
        session.index = sessions_.size();
        sessions_.push_back(std::move(made));
        session.start(full);
    }
    // A connection that a client has made. `made_session` is set before callbacks run.
    void adopt(Socket socket, const IpAddress& peer, std::unique_ptr<Transport> transport, ClientHandshake opened,
               Session*& made_session) {
        auto made = std::make_unique<Session>(*this, std::move(socket), peer, std::move(transport), false);
        Session& session = *made;
        session.index = sessions_.size();
        sessions_.push_back(std::move(made));
        made_session = &session;
        session.start_client(std::move(opened));
    }
    bool descriptors_used() const override { return sessions_.size() + open_files >= usable_descriptors(); }
    WSCHAT_COLD Response too_many_connections() override {
        ++metrics.connections_refused;
        log(LogLevel::warning, "refused", {{"status", "503"}, {"sentence", "too many connections"}});
        return std::move(Response(503, "There are too many connections.\n").set_header("Retry-After", "10"));
    }
    WSCHAT_COLD void note_proxy_failure(const IpAddress& peer, std::string_view cause) override {
        ++metrics.proxy_failures;
        // A wrong configuration fails for each connection; one entry per minute says so.
        const bool first = proxy_failure_entries_.take(1, {1.0 / 60, 1}, Clock::now());
        log(first ? LogLevel::warning : LogLevel::debug, "proxy_header_refused",
            {{"peer", peer.to_string()}, {"cause", std::string(cause)}});
    }
    void remove(Session& session) override {
        if (session.address_key() != nullptr) addresses.remove(*session.address_key());
        std::swap(sessions_[session.index], sessions_.back());
        sessions_[session.index]->index = session.index;
        session.next_deleted = std::exchange(deleted_, std::move(sessions_.back()));
        sessions_.pop_back();
    }

private:
    static constexpr std::size_t descriptors_kept = 64;        // for files, pipes and what the program opens itself
    static constexpr std::size_t max_rejections_at_once = 32;  // connections that wait for their 503

    static Session& session_of(SessionNode& node) { return static_cast<Session&>(node); }

    std::size_t max_connections() const {
        const std::size_t max = options.server_limits.max_connections;
        return max != 0 ? max : usable_descriptors();
    }
    static std::size_t usable_descriptors() {
        const std::size_t limit = os::descriptor_limit();
        return limit > 2 * descriptors_kept ? limit - descriptors_kept : limit / 2;
    }

    // ---- turns -----------------------------------------------------------------------------------------------------

    // True: work is left, so the next turn does not wait for the poller.
    bool end_turn() {
        ++turn.number;
        continue_waiting();
        // Flushing calls on_drain() and on_close(), which may queue more for others.
        constexpr int max_rounds = 16;
        for (int round = 0; round < max_rounds && !turn.dirty.empty(); ++round) {
            if (batch_) send_together();
            finish_dirty();
            if (backlog > options.server_limits.max_total_backlog) evict_largest();
        }
        RoomsAccess::prune(rooms);
        reap();
        closed_listeners_.clear();
        turn.handshakes_left = TurnState::max_handshakes;
        turn.more_reads_left = TurnState::max_more_reads;
        if (draining && sessions_.empty()) loop.stop();
        return has_work();
    }
    // Sessions that used up their budget in an earlier turn, in order, a limited number per turn.
    void continue_waiting() {
        const SessionNode* const last = turn.waiting.last();
        for (unsigned i = 0; i < TurnState::max_continued && !turn.waiting.empty(); ++i) {
            Session& session = session_of(turn.waiting.pop());
            session.continue_work();
            if (&session == last) return;
        }
    }
    void finish_dirty() {
        for (auto dirty = std::exchange(turn.dirty, {}); !dirty.empty();) {
            Session& session = session_of(dirty.pop());
            if (!dirty.empty()) session_of(*dirty.first()).prefetch();
            session.finish_turn();
        }
    }
    // io_uring: sends what is queued for many connections in a few system calls; 10 to 20% less CPU per delivery from
    // 200 members on. finish_turn() then finds it sent.
    void send_together() {
        const auto note = [](const SendBatch::Item& item) { static_cast<Session*>(item.owner)->note_batched(item); };
        for (SessionNode* node = turn.dirty.first(); node != nullptr; node = node->next_dirty) {
            Session& session = session_of(*node);
            session.prefetch();
            const std::string_view bytes = session.batchable();
            if (!bytes.empty()) batch_->add(session.socket(), bytes, &session);
            if (batch_->full()) batch_->send(note);
        }
        batch_->send(note);
    }
    // Destroys removed sessions when nothing in this turn can refer to them any more, one by one: the destructor of the
    // chain would need a stack frame for each.
    void reap() {
        if (!deleted_) return;
        const auto gone = [](SessionNode& node) { return session_of(node).gone(); };
        turn.dirty.remove_if(gone);
        turn.waiting.remove_if(gone);
        while (deleted_) deleted_ = std::move(deleted_->next_deleted);
    }
    // Closes the connections with the largest backlog until all together are within the limit.
    // The list of sessions itself is the heap: n sessions of which k are closed cost n + k log n steps, and no memory.
    void evict_largest() {
        const auto smaller = [](const auto& a, const auto& b) { return a->backlog() < b->backlog(); };
        std::make_heap(sessions_.begin(), sessions_.end(), smaller);
        for (auto end = sessions_.end(); end != sessions_.begin();) {
            if (backlog <= options.server_limits.max_total_backlog || sessions_.front()->backlog() == 0) break;
            std::pop_heap(sessions_.begin(), end, smaller);
            (*--end)->abort(CloseCause::backlog, "all backlogs together are over their limit");
        }
        for (std::size_t i = 0; i < sessions_.size(); ++i) sessions_[i]->index = i;
    }

    TokenBucket proxy_failure_entries_;
    std::unique_ptr<SendBatch> batch_ = SendBatch::make();
    StringMap<Listener> listeners_;
    StringMap<Listener> closed_listeners_;  // destroyed at the end of the turn, whose events may name them
    std::vector<std::unique_ptr<Session>> sessions_;
    std::unique_ptr<Session> deleted_;  // the first of a chain; destroyed at the end of the turn
    unsigned shutdowns_ = 0;            // that have finished
};

}  // namespace detail

// ---- the server ----------------------------------------------------------------------------------------------------

class Server {
public:
    WSCHAT_COLD explicit Server(ServerOptions options = {})
        : options_(std::move(options)), worker_(*this, options_, site_) {
        detail::LoopAccess::on_signal(worker_.loop, [this](int) { on_signal(); });
    }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;
    // Connections that are still open end without a closing handshake; their on_close() is called.
    ~Server() { worker_.close(); }

    // ---- routes and pages, before run() or in callbacks ------------------------------------------------------------

    // Each connection to the pattern gets its own handler, made with copies of the arguments (std::ref passes a
    // reference). Throws an Error if the pattern was given before.
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
        return site_.routes.add("route", detail::Pattern("route", pattern), std::move(factory));
    }

    // A page for each request of a method; GET answers HEAD too. The function returns the Response, or it takes a Reply
    // and gives the answer later: void(const Request&, Reply). A body has at most Limits::max_body bytes (413) and is
    // complete when the function is called. If the function throws, the answer is a 500. Throws an Error if the pattern
    // was given before with the same method.
    template <class Function>
    void handle(std::string_view method, std::string_view pattern, Function&& answer) {
        add_page("handle", method, pattern, std::forward<Function>(answer));
    }
    template <class Function>
    void get(std::string_view pattern, Function&& answer) {
        add_page("get", "GET", pattern, std::forward<Function>(answer));
    }
    template <class Function>
    void post(std::string_view pattern, Function&& answer) {
        add_page("post", "POST", pattern, std::forward<Function>(answer));
    }
    template <class Function>
    void put(std::string_view pattern, Function&& answer) {
        add_page("put", "PUT", pattern, std::forward<Function>(answer));
    }
    template <class Function>
    void patch(std::string_view pattern, Function&& answer) {
        add_page("patch", "PATCH", pattern, std::forward<Function>(answer));
    }
    template <class Function>
    void del(std::string_view pattern, Function&& answer) {
        add_page("del", "DELETE", pattern, std::forward<Function>(answer));
    }
    // The answer where there is nothing, also in a folder of static_dir(), in place of a short 404.
    void not_found(std::function<Response(const Request&)> answer) { site_.not_found = std::move(answer); }
    // A header of each answer that does not set it itself: "Strict-Transport-Security", "Content-Security-Policy".
    void set_default_header(std::string_view name, std::string_view value) { site_.set_default_header(name, value); }
    // Pages of these origins may use the answers of this server ("*": of all origins). Preflights of browsers are
    // answered. Throws an Error if one is not an origin, and for "*" with credentials.
    void allow_cors(const std::vector<std::string>& origins, const CorsOptions& options = {}) {
        site_.allow_cors(origins, options);
    }

    // One file, read for each request of a client that has no current copy; with ranges. A relative path starts at the
    // working directory, then at the folder of the program. `headers` replace the default ones, such as
    // "Cache-Control: no-cache". Throws an Error if there is no such file.
    void file(std::string_view pattern, std::string_view path,
              std::vector<std::pair<std::string, std::string>> headers = {}) {
        site_.add_file(pattern, path, std::move(headers));
    }
    // The files in a folder and its subfolders; "index.html" for a folder. No listings, no hidden files except
    // "/.well-known/", no symbolic links unless they stay inside and `links` allows them. Throws an Error if there is
    // no such folder.
    void static_dir(std::string_view pattern, std::string_view folder,
                    std::vector<std::pair<std::string, std::string>> headers = {},
                    SymbolicLinks links = SymbolicLinks::refuse) {
        site_.add_static_dir(pattern, folder, std::move(headers), links);
    }
    void static_dir(std::string_view pattern, std::string_view folder, SymbolicLinks links) {
        site_.add_static_dir(pattern, folder, {}, links);
    }
    // metrics() in the format of Prometheus. `allowed`: the addresses of clients that get it, such as "127.0.0.1",
    // "10.0.0.0/8" or "unix"; all others get a 404. Empty: everybody who can reach the server.
    void metrics_page(std::string_view pattern, const std::vector<std::string>& allowed = {}) {
        const std::vector<detail::Cidr> blocks(allowed.begin(), allowed.end());
        get(pattern, [this, blocks](const Request& request) {
            if (!blocks.empty() && !detail::Site::contains(blocks, request.remote_address()))
                return Response(404, "There is nothing at this path.\n");
            return Response(200, prometheus_text(metrics()), "text/plain; version=0.0.4");
        });
    }

    // Origins that may connect beside the server's own: "https://chat.example", "https://*.chat.example" for its
    // subdomains, "capacitor://localhost", "moz-extension://*", "null", "file://", or "*" for all. Throws an Error if
    // one is not an origin.
    void allow_origins(const std::vector<std::string>& origins) { site_.allow_origins(origins); }
    // If set, a request for another host gets a 421. Protects pages in a private network from DNS rebinding.
    void allow_hosts(const std::vector<std::string>& hosts) { site_.allow_hosts(hosts); }
    // Proxies ("10.0.0.0/8", "unix") that are believed about the client's address and scheme: X-Forwarded-For, read
    // from the right, and X-Forwarded-Proto; or, if the request has neither, Forwarded (RFC 7239). A proxy that only
    // forwards TCP passes on what clients write into these headers: do not trust it.
    void trusted_proxies(const std::vector<std::string>& proxies) { site_.trust_proxies(proxies); }
    // Receives each log entry on the loop's thread, at most 100 per second and level. Without it nothing is logged.
    void on_log(std::function<void(const LogEntry&)> function) { worker_.log.set(std::move(function)); }
    // Receives each answer to an HTTP request on the loop's thread, without a limit: access_to_stderr(),
    // access_json_to_stderr().
    void on_access(std::function<void(const AccessEntry&)> function) { worker_.on_access = std::move(function); }

    // ---- running ---------------------------------------------------------------------------------------------------

    // On 127.0.0.1. Port 0: the system picks one, see port(). Throws an Error if the system refuses.
    void listen(int port, const ListenOptions& options = {}) { listen(std::to_string(port), options); }
    // "8888", "0.0.0.0:8888", "[::1]:80", "*:80", "unix:/run/chat.sock", "fd:3" (a listening socket that the process
    // has inherited; the server closes it).
    void listen(std::string_view address, const ListenOptions& options = {}) {
        add_listener(address, nullptr, options);
    }
    // On each socket that systemd passes (LISTEN_FDS): a socket unit keeps it open, so that a restart of the service
    // refuses no connection. Throws an Error if there is none, or if they are for another process.
    void listen_inherited(const ListenOptions& options = {}) {
        for (int i = 0, count = detail::inherited_sockets(); i < count; ++i)
            listen("fd:" + std::to_string(3 + i), options);
    }
#if WSCHAT_OPENSSL
    // The same with TLS: https and wss. Throws an Error also if a file cannot be read or a key does not match.
    void listen_tls(int port, TlsOptions tls, const ListenOptions& options = {}) {
        listen_tls(std::to_string(port), std::move(tls), options);
    }
    void listen_tls(std::string_view address, TlsOptions tls, const ListenOptions& options = {}) {
        add_listener(address, std::make_shared<detail::TlsListener>(std::move(tls)), options);
    }
#endif
    // Reads the certificates of all listeners again; open connections stay. Throws an Error if a file cannot be used;
    // that listener keeps what it has.
    void reload_certificates() {
        for (const auto& [key, listener] : worker_.listeners()) listener.reload();
    }
    // The port of the first listener, or 0.
    int port() const { return worker_.listeners().empty() ? 0 : worker_.listeners().front().address().port; }
    // The address of the first listener, for a client on this machine: "http://127.0.0.1:8888/" or "https://...". It
    // has a loopback address if the server listens on all addresses.
    std::string url() const {
        if (worker_.listeners().empty()) return {};
        const detail::Listener& first = worker_.listeners().front();
        detail::ListenAddress address = first.address();
        if (!address.unix_path.empty()) return address.to_string();
        const auto any = IpAddress::parse(address.host == "*" || address.host == "0" ? "0.0.0.0" : address.host);
        if (any && *any == any->prefix(0))
            address.host = any->family() == IpAddress::Family::ipv6 ? "::1" : "127.0.0.1";
        return (first.secure() ? "https://" : "http://") + address.to_string() + "/";
    }

    // Serves until shutdown() has finished. Then listen() and run() may be called again. Throws an Error if there is no
    // listener. Tells systemd READY=1, and STOPPING=1 when the shutdown begins, if the environment has NOTIFY_SOCKET.
    void run() {
        if (!serving()) throw Error("run: nothing to serve: call listen() first");
        start_turns();
        if (!worker_.draining) detail::notify_systemd("READY=1");
        worker_.loop.run();
        end_turns();
    }
    // From any thread: stops accepting, closes every WebSocket with 1001, and ends run() when all connections are gone,
    // at the latest after the deadline. Has no effect on what listens after the end.
    void shutdown(Duration deadline) {
        worker_.loop.post([this, deadline, start = starts_.load()] {
            if (start == starts_.load()) worker_.begin_shutdown(deadline);
        });
    }
    void shutdown() { shutdown(options_.shutdown_deadline); }

    // Instead of run(), in the event loop of another program, all on one thread: wait until descriptor() is readable or
    // next_timeout() is over, then call poll(). Loop has the same three functions and describes them.
    //
    // Returns true while the server serves: from listen() until shutdown() has finished or loop().stop() is called.
    bool poll(Duration timeout = Duration::zero()) {
        start_turns();
        if (worker_.loop.poll(timeout)) return serving();
        end_turns();
        return false;
    }
    int descriptor() const { return worker_.loop.descriptor(); }
    // Zero also if output is queued between two turns, such as a broadcast.
    Duration next_timeout() const { return worker_.has_work() ? Duration::zero() : worker_.loop.next_timeout(); }

    // The one object of a type that belongs to this server: made as Extension(server) at the first call, destroyed
    // before the loop and the rooms.
    template <class Extension>
    Extension& extension() {
        static char key;
        const std::string name = big_endian_key(reinterpret_cast<std::uintptr_t>(&key));
        if (void* known = extensions_.find(name)) return *static_cast<Extension*>(known);
        return *static_cast<Extension*>(extensions_.add(name, detail::make_erased<Extension>(*this)));
    }
    // Adds an entry to the log, for what is built on the server.
    void report(LogLevel level, std::string_view event, std::vector<std::pair<std::string_view, std::string>> fields) {
        worker_.log(level, event, fields);
    }

    // Counts and logs an exception that left a callback, for what is built on the server.
    void report_exception(const char* callback, const char* what) noexcept {
        worker_.log.exception(callback, what, nullptr);
    }

    // Calls visit(handler) for each WebSocketHandler that is open, on the loop's thread. visit() may close and write,
    // but not delete.
    template <class Visit>
    void each_handler(Visit&& visit) {
        worker_.each_handler(visit);
    }

    Loop& loop() { return worker_.loop; }
    Rooms& rooms() { return worker_.rooms; }
    const Limits& limits() const { return options_.limits; }
    const ServerLimits& server_limits() const { return options_.server_limits; }
    // On the loop's thread.
    Metrics metrics() const { return worker_.current_metrics(); }

private:
    friend class TestServer;

    template <class Function>
    void add_page(const char* call, std::string_view method, std::string_view pattern, Function&& answer) {
        if constexpr (std::is_invocable_v<Function&, const Request&, Reply>)
            site_.add_later_page(call, method, pattern, std::forward<Function>(answer));
        else site_.add_function_page(call, method, pattern, std::forward<Function>(answer));
    }
    void add_listener(std::string_view address, std::shared_ptr<detail::TransportFactory> transports,
                      const ListenOptions& options) {
        worker_.listen(address, std::move(transports), options);
        if (std::exchange(ended_, false)) ++starts_;
        handle_signals();
    }
    bool serving() const { return !worker_.listeners().empty() || worker_.draining; }
    void start_turns() {
        if (serving()) handle_signals();
        if (worker_.has_work()) detail::LoopAccess::poll_again(worker_.loop);
    }
    void end_turns() {
        if (worker_.end_shutdown()) {
            ended_ = true;
            signalled_ = false;
        }
        signals_.reset();
    }
    // From the first listen() on, because a signal may come before run().
    void handle_signals() {
        if (options_.handle_signals && !signals_)
            signals_ = std::make_unique<detail::SignalGuard>(detail::LoopAccess::wake_descriptor(worker_.loop));
    }
    void on_signal() {
        if (std::exchange(signalled_, true)) worker_.abort_all();
        else worker_.begin_shutdown(options_.shutdown_deadline);
    }

    const ServerOptions options_;
    detail::Site site_;
    detail::Worker worker_;
    bool signalled_ = false;
    bool ended_ = false;                    // a shutdown has finished, and listen() was not called since
    std::atomic<std::uint32_t> starts_{0};  // calls of listen() after a shutdown
    std::unique_ptr<detail::SignalGuard> signals_;
    detail::ErasedMap extensions_;
};

// ---- tests without sockets -----------------------------------------------------------------------------------------

// For the tests of programs that use the library. A TestServer is a Server whose clients are in memory: its sessions,
// rooms and timers are those of any server, but there is no socket, no thread and no waiting, and the clock stands
// still until advance(). What a call of a client causes has happened when it returns.

class TestServer;

// The request of a test client: a target such as "/chat/tea?name=Anna", and what is not usual. By default it comes from
// 127.0.0.1, for the host "localhost", without an Origin.
class TestRequest {
public:
    template <class Text, class = std::enable_if_t<std::is_convertible_v<const Text&, std::string_view>>>
    TestRequest(const Text& target) : target_(std::string_view(target)) {}

    // Adds a header. Throws an Error if it is not a header field.
    TestRequest& header(std::string_view name, std::string_view value) {
        if (!text::is_token(name) || detail::has_control_character(value))
            throw Error("TestRequest::header: \"" + escape_for_log(name) + ": " + escape_for_log(value) +
                        "\" is not a header field");
        ((((headers_ += name) += ": ") += value) += "\r\n");
        return *this;
    }
    TestRequest& origin(std::string_view origin) { return header("Origin", origin); }
    TestRequest& host(std::string_view host) {
        host_ = host;
        return *this;
    }
    // The address that the client connects from, such as "203.0.113.7". Throws an Error if it is not an address.
    TestRequest& address(std::string_view address) {
        const auto parsed = IpAddress::parse(address);
        if (!parsed) throw Error("TestRequest::address: \"" + escape_for_log(address) + "\" is not an IP address");
        address_ = *parsed;
        return *this;
    }
    // Offers a subprotocol after those of earlier calls.
    TestRequest& subprotocol(std::string_view name) {
        (subprotocols_ += subprotocols_.empty() ? "" : ", ") += name;
        return *this;
    }
    // Offers compression, if the program is built with WSCHAT_ZLIB.
    TestRequest& compression(const CompressionOptions& options = {}) {
        compression_ = options;
        return *this;
    }
    // Of a request for a page.
    TestRequest& method(std::string_view method) {
        method_ = method;
        return *this;
    }
    TestRequest& body(std::string body, std::string_view type = "text/plain; charset=utf-8") {
        header("Content-Type", type).header("Content-Length", std::to_string(body.size()));
        body_ = std::move(body);
        return *this;
    }

    // Without the query.
    std::string_view path() const { return std::string_view(target_).substr(0, target_.find('?')); }

private:
    friend class TestServer;

    std::string handshake() const {
        const std::string offer = compression_ ? detail::CompressionPool::offer(*compression_) : std::string();
        constexpr const char* key = "dGhlIHNhbXBsZSBub25jZQ==";  // RFC 6455 1.3
        std::string request = detail::handshake_request(host_, target_, key, subprotocols_, offer);
        return request.insert(request.size() - 2, headers_);
    }
    std::string page_request() const {
        return method_ + " " + target_ + " HTTP/1.1\r\nHost: " + host_ + "\r\n" + headers_ + "\r\n" + body_;
    }

    std::string target_, method_ = "GET", host_ = "localhost", headers_, subprotocols_, body_;
    IpAddress address_ = *IpAddress::parse("127.0.0.1");
    std::optional<CompressionOptions> compression_;
};

// The answer to a test client: that of a page, or of a handshake.
class TestResponse {
public:
    // 0 if there is no complete answer.
    int status() const { return status_; }
    const std::string& body() const { return body_; }
    // The first header of that name, compared without case. Empty if there is none.
    std::string_view header(std::string_view name) const { return fields().find(name).value_or(std::string_view()); }
    Fields fields() const { return Fields(std::string_view(head_).substr(head_.find('\n') + 1)); }

private:
    friend class TestClient;

    // Consumes the answer if it is complete. `ended`: no more bytes follow.
    bool read(std::string& bytes, bool to_head, bool ended) {
        const std::size_t head = bytes.find("\r\n\r\n");
        if (head == std::string::npos) return false;
        head_ = bytes.substr(0, head + 4);
        const int status = std::atoi(head_.c_str() + head_.find(' '));
        std::size_t size = 0;
        if (const auto length = text::parse_unsigned(header("content-length"), bytes.max_size()); length && !to_head)
            size = static_cast<std::size_t>(*length);
        else if (status >= 200 && !to_head) size = bytes.size() - head_.size();  // up to the end
        if (bytes.size() - head_.size() < size && !ended) return false;
        body_ = bytes.substr(head_.size(), size);
        bytes.erase(0, head_.size() + size);
        status_ = status;
        return true;
    }

    std::string head_, body_;
    int status_ = 0;
};

namespace detail {

// A connection in memory.
struct MemoryLink {
    static constexpr std::size_t unlimited = static_cast<std::size_t>(-1);

    std::string to_server, to_client;
    std::size_t window = unlimited;  // how many more bytes the client takes
    bool client_ended = false;       // the client sends nothing more
    bool server_ended = false;       // the server sends nothing more
    bool closed = false;             // the server has closed its end
};

// The server's end of a link, instead of a socket. This and the functions that use it are templates, because GCC emits
// the only Transport of a program without TLS although nothing uses it.
template <class Link>
class MemoryTransport final : public Transport {
public:
    explicit MemoryTransport(std::shared_ptr<Link> link) : link_(std::move(link)) {}
    MemoryTransport(const MemoryTransport&) = delete;
    MemoryTransport& operator=(const MemoryTransport&) = delete;
    ~MemoryTransport() override { link_->server_ended = link_->closed = true; }

    IoResult receive(Socket&, char* data, std::size_t size, WireCount& wire) override {
        std::string& bytes = link_->to_server;
        if (bytes.empty()) return {link_->client_ended ? IoResult::Outcome::end : IoResult::Outcome::would_block};
        const std::size_t n = bytes.copy(data, size);
        bytes.erase(0, n);
        wire.received += n;
        return {IoResult::Outcome::done, n};
    }
    IoResult send(Socket&, const std::string_view* pieces, std::size_t count, WireCount& wire) override {
        std::size_t sent = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const std::string_view taken = pieces[i].substr(0, link_->window);
            link_->to_client += taken;
            if (link_->window != Link::unlimited) link_->window -= taken.size();
            sent += taken.size();
        }
        wire.sent += sent;
        return {sent != 0 || count == 0 ? IoResult::Outcome::done : IoResult::Outcome::would_block, sent};
    }
    bool has_input() const override { return false; }
    bool wants_write() const override { return false; }
    bool established() const override { return true; }
    bool end(Socket&, WireCount&) override {
        link_->server_ended = true;
        return true;
    }
    const std::string& failure() const override { return no_failure_; }
    bool plain_text() const override { return false; }
    std::string peer_name() const override { return {}; }
    bool encrypts() const override { return false; }

private:
    std::shared_ptr<Link> link_;
    std::string no_failure_;
};

// Reports links, which have no descriptors, and never blocks. Its clock stands still.
class MemoryPoller final : public Poller {
public:
    explicit MemoryPoller(Time now) : now_(now) {}

    // The next add() belongs to this link.
    void expect(std::shared_ptr<MemoryLink> link) { expected_ = std::move(link); }
    // The owner of a link that the server has not closed, or null.
    Pollable* owner(const MemoryLink& link) const {
        for (const Entry& entry : entries_)
            if (entry.link.get() == &link && !link.closed) return entry.owner;
        return nullptr;
    }
    bool has_ready() const {
        return std::any_of(entries_.begin(), entries_.end(), [](const Entry& entry) { return entry.ready(); });
    }
    void set_now(Time now) { now_ = now; }

    const char* name() const override { return "memory"; }
    bool add(os::Descriptor, Pollable& owner, bool read, bool write) override {
        if (!expected_) return false;
        entries_.push_back({std::move(expected_), &owner, read, write});
        return true;
    }
    bool change(os::Descriptor, Pollable& owner, bool read, bool write) override {
        for (Entry& entry : entries_) {
            if (entry.owner != &owner || entry.link->closed) continue;
            entry.read = read;
            entry.write = write;
        }
        return true;
    }
    void remove(os::Descriptor) override {}  // a link is closed at the same time
    void wait(int, std::vector<Ready>& ready) override {
        const auto closed = [](const Entry& entry) { return entry.link->closed; };
        entries_.erase(std::remove_if(entries_.begin(), entries_.end(), closed), entries_.end());
        ready.clear();
        for (const Entry& entry : entries_)
            if (entry.ready()) ready.push_back({entry.owner, entry.readable(), entry.writable(), entry.broken()});
    }
    Time now() const override { return now_; }

private:
    struct Entry {
        std::shared_ptr<MemoryLink> link;
        Pollable* owner;
        bool read, write;

        bool readable() const { return read && (!link->to_server.empty() || link->client_ended); }
        bool writable() const { return write && link->window != 0; }
        bool broken() const { return link->client_ended && link->server_ended; }
        bool ready() const { return !link->closed && (readable() || writable() || broken()); }
    };

    std::vector<Entry> entries_;
    std::shared_ptr<MemoryLink> expected_;
    Time now_;
};

}  // namespace detail

// One client of a TestServer. Copies are the same client, which ends with close(), hang_up() or the server.
class TestClient {
public:
    struct Received {
        std::string data;
        bool binary;
    };

    TestClient() = default;

    // ---- what the client has got -----------------------------------------------------------------------------------

    // The answer to the handshake: 101, or that of a refusal. Its status is 0 if the server shuts down.
    const TestResponse& response() const { return state().response; }
    bool is_open() const { return state().connection.is_open(); }
    // The data of the messages that have arrived since the last call.
    std::vector<std::string> received() {
        State& state = this->state();
        std::vector<std::string> data;
        for (; state.taken != state.messages.size(); ++state.taken) data.push_back(state.messages[state.taken].data);
        return data;
    }
    // All messages since the handshake.
    const std::vector<Received>& messages() const { return state().messages; }
    // The payloads of all pings and pongs since the handshake. The client answers pings itself.
    const std::vector<std::string>& pings() const { return state().pings; }
    const std::vector<std::string>& pongs() const { return state().pongs; }
    // From the server's Close frame, or from the client's until it arrives. CloseCode::no_status before both, and
    // CloseCode::abnormal if the connection ended without a Close frame.
    CloseCode close_code() const { return state().connection.close_code(); }
    const std::string& close_reason() const { return state().connection.close_reason(); }
    std::string_view selected_subprotocol() const { return response().header("sec-websocket-protocol"); }

    // The handler of this client, in the server. Throws an Error if it is gone, or not a Handler.
    template <class Handler>
    Handler& handler() const {
        const auto found = dynamic_cast<Handler*>(find_handler());
        if (found == nullptr) throw Error("TestClient::handler: there is no handler of this type");
        return *found;
    }

    // ---- what the client does --------------------------------------------------------------------------------------

    // WriteStatus::closed if the connection is not open. The client sends also text that is not UTF-8.
    WriteStatus send(std::string_view text, Opcode opcode = Opcode::text) {
        return act([&](State& state) { return state.connection.send(opcode, text); });
    }
    WriteStatus send_binary(std::string_view bytes) { return send(bytes, Opcode::binary); }
    WriteStatus send_json(const Json& value) { return send(value.dump()); }
    WriteStatus ping(std::string_view payload = {}) {
        return act([&](State& state) { return state.connection.send_control(Opcode::ping, payload); });
    }
    void close(CloseCode code = CloseCode::normal, std::string_view reason = {}) {
        act([&](State& state) {
            state.connection.close(code, reason, Time());
            return WriteStatus::closed;
        });
    }
    // Ends the connection without a Close frame.
    void hang_up() {
        act([](State& state) {
            state.end("the client hung up");
            return WriteStatus::closed;
        });
    }
    // The client does not read any more, and so it does not answer pings. The server can send this many bytes, then its
    // output waits.
    void pause_reading(std::size_t window = 0) {
        state().paused = true;
        state().link->window = window;
    }
    void resume_reading() {
        act([](State& state) {
            state.paused = false;
            state.link->window = detail::MemoryLink::unlimited;
            return WriteStatus::closed;
        });
    }

private:
    friend class TestServer;

    struct State {
        State(std::shared_ptr<TestServer*> its_server, std::shared_ptr<detail::MemoryLink> its_link)
            : server(std::move(its_server)), link(std::move(its_link)) {
            limits.max_message_size = limits.max_backlog = detail::MemoryLink::unlimited;
            limits.max_fragments = detail::MemoryLink::unlimited;
            limits.control_frames_per_second = 0;
            limits.ping_interval = Duration::zero();
        }

        // Takes what has arrived, and answers. Returns false if nothing has.
        bool read() {
            const bool at_end = link->server_ended && !link->client_ended;
            if (paused || (link->to_client.empty() && !at_end)) return false;
            if (response.status() == 0 && !read_response() && !at_end) return false;
            std::string bytes = std::exchange(link->to_client, std::string());
            connection.receive(&bytes[0], bytes.size(), Time());
            take_events();
            if (at_end) end("the server hung up");
            write();
            return true;
        }
        // Passes on what the connection has queued.
        void write() {
            SendQueue& output = connection.output();
            for (std::string_view piece; output.gather(&piece, 1) != 0; output.consume(piece.size()))
                link->to_server += piece;
        }
        void end(std::string_view reason) {
            connection.receive_eof(reason);
            take_events();
            link->client_ended = true;
        }

        std::shared_ptr<TestServer*> server;  // points to null if the server is gone
        std::shared_ptr<detail::MemoryLink> link;
        TestResponse response;
        bool to_head = false;
        std::optional<CompressionOptions> compression;
        Limits limits;
        detail::SendArena arena;
        detail::CompressionPool compressors;
        detail::Connection connection;
        bool paused = false;
        std::vector<Received> messages;
        std::size_t taken = 0;  // messages that received() has returned
        std::vector<std::string> pings, pongs;

    private:
        using SendQueue = detail::SendQueue;

        bool read_response() {
            if (!response.read(link->to_client, to_head, link->server_ended)) return false;
            if (response.status() != 101) return true;
            std::string error;
            auto agreed = compression ? compressors.read_response(response.fields(), *compression, error) : nullptr;
            const auto mask = [] { return detail::MaskKey{0x37, 0xFA, 0x21, 0x3D}; };
            connection.open(detail::Role::client, limits, arena, Time(), mask, std::move(agreed));
            return true;
        }
        void take_events() {
            using Kind = detail::Event::Kind;
            for (;;) {
                const detail::Event event = connection.next_event();
                const std::string data(event.message.data());
                if (event.kind == Kind::message) messages.push_back({data, event.message.binary()});
                else if (event.kind == Kind::ping) pings.push_back(data);
                else if (event.kind == Kind::pong) pongs.push_back(data);
                else return;
            }
        }
    };

    explicit TestClient(std::shared_ptr<State> state) : state_(std::move(state)) {}

    State& state() const {
        if (!state_) throw Error("TestClient: this is no client; TestServer::connect() makes one");
        return *state_;
    }
    template <class Work>
    WriteStatus act(Work&& work) {
        State& state = this->state();
        const WriteStatus status = work(state);
        state.write();
        settle();
        return status;
    }
    inline void settle() const;
    inline WebSocketHandler* find_handler() const;

    std::shared_ptr<State> state_;
};

// A server whose clients are in memory. It has all functions of a Server except listen() and run().
class TestServer : public Server {
public:
    explicit TestServer(ServerOptions options = {}) : Server(std::move(options)) {
        auto poller = std::make_unique<detail::MemoryPoller>(Clock::now());
        poller_ = poller.get();
        detail::LoopAccess::set_poller(loop(), std::move(poller));
        on_log(nullptr);
    }
    // Open connections end without a closing handshake. The clients keep what they have got.
    ~TestServer() {
        worker_.close();
        deliver();
        *self_ = nullptr;
    }

    // Opens a WebSocket. TestClient::response() has the answer if it is refused.
    template <class Link = detail::MemoryLink>
    TestClient connect(const TestRequest& request) {
        const auto client = start<Link>(request, request.handshake());
        client->compression = request.compression_;
        settle();
        return TestClient(client);
    }
    // Gets a page.
    template <class Link = detail::MemoryLink>
    TestResponse fetch(const TestRequest& request) {
        const auto client = start<Link>(request, request.page_request());
        client->to_head = request.method_ == "HEAD";
        settle();
        TestClient(client).hang_up();
        return client->response;
    }

    // Moves the clock from timer to timer: calls what is due, sends pings, and ends what has a timeout.
    void advance(Duration duration) {
        settle();
        const Time end = saturating_add(poller_->now(), (std::max)(duration, Duration::zero()));
        for (Duration next = next_timeout(); next <= end - poller_->now(); next = next_timeout()) {
            poller_->set_now(poller_->now() + next);
            settle();
        }
        poller_->set_now((std::max)(end, poller_->now()));
    }
    // Runs turns until nothing is left to do. All calls of clients do this; call it after work was posted or a handler
    // was used directly. Throws an Error if there is no end.
    void settle() {
        constexpr int max_turns = 100'000;
        constexpr Duration tick(1);  // the delay of call_later(0s)
        for (int turn = 0; deliver() || poller_->has_ready() || next_timeout() <= tick; ++turn) {
            if (turn == max_turns) throw Error("TestServer::settle: the server always has more work");
            if (next_timeout() <= tick) poller_->set_now(poller_->now() + next_timeout());
            loop().poll();
        }
    }

    // What callbacks and pages have thrown, as "on_message: sentence".
    const std::vector<std::string>& exceptions() const { return *exceptions_; }
    // As Server::on_log(), which would turn off exceptions().
    void on_log(std::function<void(const LogEntry&)> function) {
        Server::on_log([exceptions = exceptions_, function = std::move(function)](const LogEntry& entry) {
            if (entry.event == "exception")
                exceptions->push_back(entry.fields[0].second + ": " + entry.fields[1].second);
            if (function) function(entry);
        });
    }

private:
    friend class TestClient;

    template <class Link>
    std::shared_ptr<TestClient::State> start(const TestRequest& request, std::string bytes) {
        const auto link = std::make_shared<Link>();
        const auto client = std::make_shared<TestClient::State>(self_, link);
        clients_.push_back(client);
        link->to_server = std::move(bytes);
        auto transport = std::make_unique<detail::MemoryTransport<Link>>(link);
        poller_->expect(link);
        ++worker_.metrics.connections_accepted;
        if (!worker_.draining) worker_.accept(detail::Socket(), request.address_, std::move(transport), false);
        poller_->expect(nullptr);  // it was refused
        return client;
    }
    // Lets the clients take what has arrived. Returns false if nothing has.
    bool deliver() {
        bool any = false;
        for (const auto& client : clients_) any = client->read() || any;
        const auto over = [](const auto& client) { return client->link->closed && client->link->client_ended; };
        clients_.erase(std::remove_if(clients_.begin(), clients_.end(), over), clients_.end());
        return any;
    }

    detail::MemoryPoller* poller_;
    std::shared_ptr<TestServer*> self_ = std::make_shared<TestServer*>(this);
    std::vector<std::shared_ptr<TestClient::State>> clients_;  // that have not ended
    std::shared_ptr<std::vector<std::string>> exceptions_ = std::make_shared<std::vector<std::string>>();
};

inline void TestClient::settle() const {
    if (*state().server != nullptr) (*state().server)->settle();
}
inline WebSocketHandler* TestClient::find_handler() const {
    if (*state().server == nullptr) return nullptr;
    detail::Pollable* const owner = (*state().server)->poller_->owner(*state().link);
    return owner == nullptr ? nullptr : static_cast<detail::Session*>(owner)->handler();
}

// A TestServer with one handler and one client, seen from the handler:
//
//   wschat::HandlerTest<Chat> test("/chat?name=Anna");
//   test.receive("hi");
//   test.sent() == std::vector<std::string>{"Anna: hi"};
template <class Handler>
class HandlerTest {
public:
    // The path of the request is the pattern of the route.
    explicit HandlerTest(const TestRequest& request = "/") : HandlerTest(request.path(), request) {}
    // The handler is made with the arguments.
    template <class... Arguments>
    HandlerTest(std::string_view pattern, const TestRequest& request, Arguments&&... arguments) {
        server.route<Handler>(pattern, std::forward<Arguments>(arguments)...);
        client = server.connect(request);
    }
    HandlerTest(const HandlerTest&) = delete;
    HandlerTest& operator=(const HandlerTest&) = delete;

    WriteStatus receive(std::string_view text) { return client.send(text); }
    WriteStatus receive_binary(std::string_view bytes) { return client.send_binary(bytes); }
    // The data of the messages that the handler has sent since the last call.
    std::vector<std::string> sent() { return client.received(); }
    // The client closes.
    void close(CloseCode code = CloseCode::normal, std::string_view reason = {}) { client.close(code, reason); }
    void advance(Duration duration) { server.advance(duration); }
    // Throws an Error if the handler is gone.
    Handler& handler() { return client.handler<Handler>(); }

    TestServer server;
    TestClient client;
};

WSCHAT_END

// ====================================================================================================================
// section 15: Client
//
// Client: connections to other servers, with the handler class of the server and on the same loop. An attempt goes
// through the stages of ConnectStage; then its socket becomes a Session (14) like any other. Names are resolved on
// threads of their own.
// ====================================================================================================================

#include <condition_variable>
#include <deque>
#include <map>
#include <random>

WSCHAT_BEGIN

// How a wss:// server is verified. All files are PEM.
struct ClientTls {
    std::string authorities{};  // a file with the authorities to trust; empty: those that the system trusts
    // A file with revocation lists (CRLs), read once. If set, a certificate is refused if the list of its authority is
    // missing, has expired, or names it. Empty: a revoked certificate is accepted. No authority is asked (OCSP).
    std::string revocation_lists{};
    // Sent if the server requests a certificate.
    std::string certificate{};
    std::string key{};
    std::string key_password{};
    // If set, the server's public key must be one of these: the SHA-256 of its SubjectPublicKeyInfo in base64
    // (RFC 7469 2.4). This comes in addition to the other checks.
    std::vector<std::string> pinned_keys{};
    // Insecure: does not verify the server's certificate. An attacker in the network can read and change all data,
    // unless there are pinned_keys.
    bool insecure_accept_any_certificate = false;
};

// When a client connects again. The delay is random, between zero and a limit that begins at min_delay and doubles with
// each failure up to max_delay, so that the clients of a server that restarts do not come at the same moment.
struct ReconnectOptions {
    Duration min_delay = std::chrono::milliseconds(500);
    Duration max_delay = std::chrono::seconds(30);
    Duration stable = std::chrono::minutes(1);  // a connection that lived so long resets the delay to min_delay
    // Retry-After of a response counts, up to this. After 1012 and 1013 the delay is at least a sixth of max_delay.
    Duration max_retry_after = std::chrono::hours(1);
    bool after_normal_close = false;  // also if the server closed with 1000 or 1008
    bool after_refusal = false;       // also after a response with a status of 200-499
};

// What may differ from attempt to attempt. It begins as what connect() got.
struct ClientAttempt {
    std::string url;
    std::vector<std::pair<std::string, std::string>> headers;
    std::vector<std::pair<std::string, std::string>> cookies;
};

// What is the same for all attempts of one Client::connect().
struct ClientOptions {
    Limits limits;                                        // of the connection; those on requests hold for the response
    Duration connect_timeout = std::chrono::seconds(10);  // from the name to the 101, redirects included
    std::vector<std::pair<std::string, std::string>> headers;
    std::vector<std::pair<std::string, std::string>> cookies;
    std::vector<std::string> subprotocols;          // in the order of preference
    std::string origin;                             // empty: none is sent
    std::optional<CompressionOptions> compression;  // offered if the program is built with WSCHAT_ZLIB
    std::optional<ReconnectOptions> reconnect;      // nothing: one attempt, and no other after the connection
    unsigned max_redirects = 0;  // at most 5 are followed; never from wss to ws, no secrets to another server
    // Called on the loop's thread before each attempt: for a token that expires, or the id of the last message.
    std::function<void(ClientAttempt&)> before_attempt;
    ClientTls tls;
    std::string bind_address;  // a numeric address of this machine to connect from
    std::string unix_path;     // connects to this Unix socket; the URL still gives the host, the path and the scheme
    // "http://user:password@proxy.example:3128": the connection is a tunnel through this proxy (CONNECT).
    std::string proxy;
    // Takes https_proxy (for wss), http_proxy (for ws) and no_proxy from the environment, if `proxy` is empty.
    bool proxy_from_environment = false;
    // Replaces the system's resolver, for tests and for DNS libraries: returns the addresses of a host, best first. It
    // is called on another thread, and may block and throw. It may still run when the client is gone.
    std::function<std::vector<IpAddress>(const std::string& host)> resolver;
};

namespace detail {

// ---- random numbers ------------------------------------------------------------------------------------------------

// RFC 6455 10.3: "The masking key needs to be unpredictable". Each is new from the system's generator, which is asked
// for 64 at a time.
inline MaskKey random_mask() {
    struct Store {
        std::string bytes;
        std::size_t used = 0;
    };
    static thread_local Store store;
    if (store.used == store.bytes.size()) {
        store.bytes = random_bytes(256);
        store.used = 0;
    }
    MaskKey key;
    for (unsigned char& byte : key) byte = static_cast<unsigned char>(store.bytes[store.used++]);
    return key;
}

// Sec-WebSocket-Key: 16 random bytes (RFC 6455 4.1 / 7).
inline std::string random_key() {
    const std::string bytes = random_bytes(16);
    return base64(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

// ---- URLs ----------------------------------------------------------------------------------------------------------

struct ClientUrl {
    bool secure = false;
    std::string host;  // without brackets and zone
    std::string zone;  // of a link-local IPv6 address, "eth0" or "2": it means something on this machine only
    int port = 0;
    std::string target;       // "/chat?name=Anna"
    std::string credentials;  // "user:password", decoded; may be empty

    int default_port() const { return secure ? 443 : 80; }
    // "host:port", with brackets around an IPv6 address.
    std::string host_and_port() const { return bracketed() + ":" + std::to_string(port); }
    // For the Host field.
    std::string authority() const { return port == default_port() ? bracketed() : host_and_port(); }
    bool same_server(const ClientUrl& other) const {
        return secure == other.secure && port == other.port && zone == other.zone &&
               text::equals_ignore_case(host, other.host);
    }

    // "ws://host", "wss://user:password@host:port/path?query"; http and https are the same. Returns nothing and sets
    // `error` to a sentence if the text is none of these. `base` resolves a Location that is relative (RFC 3986 5.2).
    WSCHAT_COLD static std::optional<ClientUrl> parse(std::string_view text, std::string& error,
                                                      const ClientUrl* base = nullptr) {
        ClientUrl url;
        const std::string shown = "\"" + escape_for_log(without_secrets(text)) + "\"";
        const auto printable = [](char c) { return c > ' ' && c < 0x7F; };
        if (text.empty() || !text::all_of(text, printable) || text.size() > 8000) {
            error = shown + " is not a URL: percent-encode what is not printable ASCII.";
            return std::nullopt;
        }
        const std::size_t colon = text.find("://");
        if (base != nullptr && (colon == std::string_view::npos || colon > text.find_first_of("/?#")))
            return base->resolve(text, error);
        const std::string scheme = text::to_lower(text.substr(0, (std::min)(colon, text.size())));
        url.secure = scheme == "wss" || scheme == "https";
        if (colon == std::string_view::npos || (!url.secure && scheme != "ws" && scheme != "http")) {
            error = shown + " is not a URL of a WebSocket: it begins with ws:// or wss://.";
            return std::nullopt;
        }
        std::string_view rest = text.substr(colon + 3);
        const std::string_view authority = rest.substr(0, rest.find_first_of("/?#"));
        rest.remove_prefix(authority.size());
        if (rest.find('#') != std::string_view::npos && base == nullptr) {
            // RFC 6455 3: "Fragment identifiers are meaningless [...] and MUST NOT be used".
            error = shown + " has a fragment (#), which the URL of a WebSocket cannot have.";
            return std::nullopt;
        }
        url.set_target(rest);
        if (!url.set_authority(authority)) {
            error = shown + " has no valid host and port.";
            return std::nullopt;
        }
        return url.with_valid_path(error);
    }
    // For log entries and sentences: without a password and without the query.
    static std::string without_secrets(std::string_view text) {
        std::string shown(text.substr(0, text.find_first_of("?#")));
        const std::size_t begin = shown.find("://"), at = shown.rfind('@');
        if (begin != std::string::npos && at != std::string::npos && at > begin) shown.erase(begin + 3, at - begin - 2);
        return shown;
    }

private:
    std::string bracketed() const { return host.find(':') == std::string::npos ? host : "[" + host + "]"; }

    void set_target(std::string_view rest) {
        rest = rest.substr(0, rest.find('#'));
        target = (rest.empty() || rest.front() != '/' ? "/" : "") + std::string(rest);
    }
    bool set_authority(std::string_view authority) {
        const std::size_t at = authority.rfind('@');
        if (at != std::string_view::npos) {
            const auto decoded = text::percent_decode(authority.substr(0, at));
            if (!decoded || has_control_character(*decoded)) return false;
            credentials = *decoded;
            authority.remove_prefix(at + 1);
        }
        std::string without_zone(authority);
        if (!take_zone(without_zone) || !valid_host(without_zone)) return false;
        authority = without_zone;
        const std::size_t colon = authority.rfind(':');
        const bool has_port = colon != std::string_view::npos && authority.find(']', colon) == std::string_view::npos;
        host = text::to_lower(has_port ? authority.substr(0, colon) : authority);
        if (host.front() == '[') host = host.substr(1, host.size() - 2);
        const std::string_view digits = has_port ? authority.substr(colon + 1) : std::string_view();
        port = digits.empty() ? default_port() : static_cast<int>(text::parse_unsigned(digits, 65535).value_or(0));
        return port != 0;
    }
    // RFC 6874 2: "[fe80::1%25eth0]". Many programs write "[fe80::1%eth0]", so that is accepted too.
    bool take_zone(std::string& authority) {
        zone.clear();
        const std::size_t percent = authority.find('%'), close = authority.find(']');
        if (percent == std::string::npos) return true;
        if (authority.front() != '[' || close == std::string::npos || close < percent) return false;
        zone = authority.substr(percent + 1, close - percent - 1);
        if (text::starts_with(zone, "25") && zone.size() > 2) zone.erase(0, 2);
        authority.erase(percent, close - percent);
        const auto allowed = [](char c) { return text::is_alphanumeric(c) || c == '-' || c == '.' || c == '_'; };
        return !zone.empty() && text::all_of(zone, allowed);
    }
    // RFC 3986 5.2.2, without the removal of dot segments, which the server does.
    std::optional<ClientUrl> resolve(std::string_view reference, std::string& error) const {
        if (text::starts_with(reference, "//"))
            return parse((secure ? "wss:" : "ws:") + std::string(reference), error, this);
        ClientUrl url = *this;
        const std::string path = target.substr(0, target.find('?'));
        if (reference.front() == '/') url.set_target(reference);
        else if (reference.front() == '?') url.set_target(path + std::string(reference));
        else url.set_target(path.substr(0, path.rfind('/') + 1) + std::string(reference));
        return url.with_valid_path(error);
    }
    std::optional<ClientUrl> with_valid_path(std::string& error) const {
        const std::string_view path = std::string_view(target).substr(0, target.find('?'));
        if (text::percent_decode(path)) return *this;
        error = "The path \"" + escape_for_log(path) + "\" has a malformed percent escape.";
        return std::nullopt;
    }
};

inline std::string basic_authorization(std::string_view credentials) {
    return "Basic " + base64(reinterpret_cast<const unsigned char*>(credentials.data()), credentials.size());
}

// Whether no_proxy excludes the host: "*", "example.com" (with its subdomains), ".example.com", "10.0.0.0/8".
WSCHAT_COLD inline bool excluded_from_proxy(std::string_view list, const ClientUrl& url) {
    const auto address = IpAddress::parse(url.host);
    while (!list.empty()) {
        std::string_view entry = text::trim(text::consume_until(list, ','));
        if (entry == "*") return true;
        const std::size_t colon = entry.rfind(':');
        if (colon != std::string_view::npos && entry.find(':') == colon) {
            if (text::parse_unsigned(entry.substr(colon + 1), 65535) != static_cast<std::uint64_t>(url.port)) continue;
            entry = entry.substr(0, colon);
        }
        if (address) {
            bool inside = false;
            run_guarded([&] { inside = Cidr(entry).contains(*address); }, [](const char*) {});
            if (inside) return true;
            continue;
        }
        if (!entry.empty() && entry.front() == '.') entry.remove_prefix(1);
        if (entry.empty() || entry.size() > url.host.size()) continue;
        const std::string_view end = std::string_view(url.host).substr(url.host.size() - entry.size());
        const bool whole = end.size() == url.host.size() || url.host[url.host.size() - end.size() - 1] == '.';
        if (whole && text::equals_ignore_case(end, entry)) return true;
    }
    return false;
}

// ---- resolving names -----------------------------------------------------------------------------------------------

struct ResolverResult {
    std::vector<IpAddress> addresses;
    std::string error;  // a sentence; empty if there are addresses
};

// The system's resolver. Blocks.
inline std::vector<IpAddress> resolve_by_system(const std::string& host) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
#if defined(_WIN32)
    os::start_winsock();
#endif
    const int status = ::getaddrinfo(host.c_str(), nullptr, &hints, &found);
    if (status != 0) throw Error(os::resolver_error_text(status));
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(found, [](addrinfo* list) { ::freeaddrinfo(list); });
    std::vector<IpAddress> addresses;
    for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
        sockaddr_storage storage{};
        std::memcpy(&storage, each->ai_addr, (std::min)(sizeof storage, static_cast<std::size_t>(each->ai_addrlen)));
        const IpAddress address(storage);
        if (address.bits() != 0 && std::find(addresses.begin(), addresses.end(), address) == addresses.end())
            addresses.push_back(address);
    }
    return addresses;
}

// RFC 8305 4: the families take turns, beginning with that of the first address.
inline std::vector<IpAddress> interleave_families(const std::vector<IpAddress>& addresses) {
    std::deque<IpAddress> first, second;
    for (const IpAddress& each : addresses)
        (each.family() == addresses.front().family() ? first : second).push_back(each);
    std::vector<IpAddress> result;
    while (!first.empty() || !second.empty())
        for (auto* family : {&first, &second}) {
            if (family->empty()) continue;
            result.push_back(family->front());
            family->pop_front();
        }
    return result;
}

// A few threads that resolve names, because getaddrinfo() blocks. Nobody waits for them: a thread that hangs in a
// resolver keeps only the state that the threads share.
class ResolverPool {
public:
    using Resolver = std::function<std::vector<IpAddress>(const std::string&)>;
    using Done = std::function<void(ResolverResult)>;

    ResolverPool() = default;
    ResolverPool(const ResolverPool&) = delete;
    ResolverPool& operator=(const ResolverPool&) = delete;
    ~ResolverPool() {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->ended = true;
        state_->jobs.clear();
        state_->changed.notify_all();
    }

    // Calls done(result) by the mailbox. A job that nobody waits for any more (`waiting` has expired) is skipped.
    void resolve(Resolver resolver, std::string host, std::shared_ptr<Mailbox> mailbox, std::weak_ptr<void> waiting,
                 Done done) {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->jobs.push_back(
            {std::move(resolver), std::move(host), std::move(mailbox), std::move(waiting), std::move(done)});
        if (state_->jobs.size() > state_->idle && state_->threads < max_threads) start_thread();
        state_->changed.notify_one();
    }

private:
    static constexpr std::size_t max_threads = 4;

    struct Job {
        Resolver resolver;
        std::string host;
        std::shared_ptr<Mailbox> mailbox;
        std::weak_ptr<void> waiting;
        Done done;
    };
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        std::deque<Job> jobs;
        std::size_t threads = 0, idle = 0;
        bool ended = false;
    };

    void start_thread() {
        try {
            std::thread([state = state_] { work(*state); }).detach();
            ++state_->threads;
        } catch (const std::system_error&) {
            if (state_->threads != 0) return;
            state_->jobs.pop_back();
            throw Error("no thread can be started to resolve the name");
        }
    }
    static void work(State& state) {
        std::unique_lock<std::mutex> lock(state.mutex);
        for (;;) {
            ++state.idle;
            state.changed.wait(lock, [&] { return state.ended || !state.jobs.empty(); });
            --state.idle;
            if (state.ended) return;
            Job job = std::move(state.jobs.front());
            state.jobs.pop_front();
            lock.unlock();
            run(std::move(job));
            lock.lock();
        }
    }
    static void run(Job job) {
        if (job.waiting.expired()) return;
        ResolverResult result;
        run_guarded(
            [&] {
                result.addresses = job.resolver ? job.resolver(job.host) : resolve_by_system(job.host);
                if (result.addresses.empty()) result.error = "it has no address";
            },
            [&](const char* what) { result.error = what; });
        // Only memory that runs out can throw here. The attempt then ends at its deadline.
        run_guarded(
            [&] {
                job.mailbox->post(
                    [done = std::move(job.done), result = std::move(result)]() mutable { done(std::move(result)); });
            },
            [](const char*) {});
    }

    std::shared_ptr<State> state_ = std::make_shared<State>();
};

// ---- sockets -------------------------------------------------------------------------------------------------------

struct SocketAddress {
    sockaddr_storage storage{};
    socklen_t size = 0;

    SocketAddress(const IpAddress& address, int port, std::uint32_t zone = 0) {
        const std::string text = address.to_string();
        if (address.family() == IpAddress::Family::ipv6) {
            sockaddr_in6 in6{};
            in6.sin6_scope_id = zone;
            in6.sin6_family = AF_INET6;
            in6.sin6_port = htons(static_cast<std::uint16_t>(port));
            ::inet_pton(AF_INET6, text.c_str(), &in6.sin6_addr);
            set(in6);
        } else {
            sockaddr_in in{};
            in.sin_family = AF_INET;
            in.sin_port = htons(static_cast<std::uint16_t>(port));
            ::inet_pton(AF_INET, text.c_str(), &in.sin_addr);
            set(in);
        }
    }
#if !defined(_WIN32)
    // The path is shorter than sun_path.
    explicit SocketAddress(const std::string& unix_path) {
        sockaddr_un un{};
        un.sun_family = AF_UNIX;
        unix_path.copy(un.sun_path, sizeof un.sun_path - 1);
        set(un);
    }
#endif
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }

private:
    template <class Address>
    void set(const Address& address) {
        std::memcpy(&storage, &address, sizeof address);
        size = sizeof address;
    }
};

class ClientLink;

// One socket of an attempt, and what the poller knows it by. An earlier batch of the poller may still name it after the
// attempt has dropped it, so it is destroyed later: retire().
class Dial final : public Pollable {
public:
    Dial(ClientLink& link, Socket its_socket, const IpAddress& address)
        : socket(std::move(its_socket)), peer(address), link_(&link) {}
    inline void on_ready(bool readable, bool writable, bool broken) override;
    // Takes the socket away from the poller.
    void unwatch(Loop& loop) {
        if (std::exchange(watched, false)) LoopAccess::poller(loop).remove(socket.descriptor());
    }
    static void retire(std::unique_ptr<Dial> dial, Loop& loop) {
        dial->unwatch(loop);
        dial->link_ = nullptr;
        dial->socket.close();
        loop.post([dead = std::move(dial)] { static_cast<void>(dead); });
    }

    Socket socket;
    IpAddress peer;
    bool watched = false;

private:
    ClientLink* link_;  // null if it is retired
};

// ---- what the connections of a client share ------------------------------------------------------------------------

class ClientCore {
public:
    explicit ClientCore(Worker& its_worker) : worker(its_worker) {
        std::uint64_t seed = 0;
        for (const char byte : random_bytes(8)) seed = seed << 8 | static_cast<unsigned char>(byte);
        random_.seed(seed);
    }
    ClientCore(const ClientCore&) = delete;
    ClientCore& operator=(const ClientCore&) = delete;

    Loop& loop() { return worker.loop; }
    Duration random_up_to(Duration max) {
        return Duration(
            std::uniform_int_distribution<Duration::rep>(0, (std::max)(max, Duration::zero()).count())(random_));
    }
    void remove(std::uint64_t id) {
        links.erase(id);
        if (links.empty() && on_idle) on_idle();
    }

#if WSCHAT_OPENSSL
    // Reading the authorities of the system takes milliseconds, so equal options share a context.
    std::unique_ptr<TlsTransport> make_transport(const ClientTls& tls, const std::string& host) {
        return std::make_unique<TlsTransport>(buffers_, context(tls), host);
    }
    // Throws Error if a file cannot be used.
    std::shared_ptr<const TlsContext> context(const ClientTls& tls) {
        const std::vector<std::string> key{tls.authorities,  tls.revocation_lists,
                                           tls.certificate,  tls.key,
                                           tls.key_password, tls.insecure_accept_any_certificate ? "any" : ""};
        for (const auto& [known, context] : contexts_)
            if (known == key) return context;
        TlsClientOptions options;
        options.authorities = tls.authorities;
        options.revocation_lists = tls.revocation_lists;
        options.certificate = tls.certificate;
        options.key = tls.key;
        options.key_password = tls.key_password;
        options.accept_any_certificate = tls.insecure_accept_any_certificate;
        auto made = std::make_shared<const TlsContext>(options);
        if (contexts_.size() == max_contexts) contexts_.erase(contexts_.begin());
        contexts_.emplace_back(key, made);
        return made;
    }
#endif

    Worker& worker;
    ResolverPool resolvers;
    std::map<std::uint64_t, std::shared_ptr<ClientLink>> links;  // by what connect() returned
    std::function<void()> on_idle;                               // the last link has gone

private:
    std::mt19937_64 random_;
#if WSCHAT_OPENSSL
    static constexpr std::size_t max_contexts = 16;
    std::shared_ptr<TlsBuffers> buffers_ = std::make_shared<TlsBuffers>();
    std::vector<std::pair<std::vector<std::string>, std::shared_ptr<const TlsContext>>> contexts_;
#endif
};

// Calls on_failure() of a handler that gets no connection.
class FailedHandler final : public WebSocketDriver {
public:
    FailedHandler(SessionHost& host, const IpAddress& peer) : WebSocketDriver(host, peer) {}

    void call_on_failure(const Route::Factory& factory, Request request, const ConnectError& error) {
        guarded("handler", [&] { handler_ = factory(); });
        if (!handler_) return;
        core().host = this;
        core().request = std::move(request);
        guarded("on_failure", [&] { handler_->on_failure(error); });
        guarded("handler", [&] {
            RoomsAccess::remove_from_all(host_.rooms, *handler_);
            core().rooms.clear();
            handler_.reset();
        });
    }

    void on_reply(ReplyAnswer) override {}
    void mark_dirty() override {}
    void flush() override {}
    std::size_t offer(const std::string_view*, std::size_t) override { return 0; }
    void set_nodelay(bool) override {}
};

// The body of a response that is not a 101, for ConnectError::body.
class ResponseBody {
public:
    static constexpr std::size_t max_size = 64 * 1024;

    void start(int status, const Fields& fields) {
        chunked_ = fields.has_element("transfer-encoding", "chunked");
        const auto length = fields.find("content-length");
        if (status == 204 || status == 304) left_ = 0;
        else if (length && !chunked_) left_ = text::parse_unsigned(*length, UINT64_MAX).value_or(max_size);
    }
    void feed(std::string_view bytes) { raw_ += bytes.substr(0, max_size + 1 - (std::min)(raw_.size(), max_size)); }
    // Whether more bytes would change nothing.
    bool complete() const {
        return raw_.size() >= (std::min)(left_, std::uint64_t{max_size}) || (chunked_ && decode(nullptr));
    }
    std::string take() {
        std::string body;
        if (chunked_) decode(&body);
        else body = raw_.substr(0, static_cast<std::size_t>((std::min)(left_, std::uint64_t{max_size})));
        return body;
    }

private:
    // RFC 9112 7.1. Returns true if the last chunk has arrived, or if the rest makes no sense.
    bool decode(std::string* body) const {
        std::string_view rest = raw_;
        for (;;) {
            const std::size_t end = rest.find("\r\n");
            if (end == std::string_view::npos) return rest.size() > 256;
            std::size_t size = 0;
            const std::string_view line = rest.substr(0, end);
            for (const char c : line.substr(0, line.find_first_of("; "))) {
                if (text::hex_value(c) < 0 || size > max_size) return true;
                size = size * 16 + static_cast<unsigned>(text::hex_value(c));
            }
            rest.remove_prefix(end + 2);
            if (size == 0) return true;
            if (body != nullptr) body->append(rest.substr(0, size));
            if (rest.size() < size + 2) return false;
            rest.remove_prefix(size + 2);
        }
    }

    std::string raw_;
    std::uint64_t left_ = UINT64_MAX;  // the size of the whole body, if the head has it
    bool chunked_ = false;
};

// Throws Error for what is not a header field or a cookie, or is one that only the client sets.
WSCHAT_COLD inline void check_client_headers(const char* call,
                                             const std::vector<std::pair<std::string, std::string>>& headers,
                                             const std::vector<std::pair<std::string, std::string>>& cookies) {
    static constexpr std::string_view own[] = {"host", "upgrade", "connection", "content-length", "transfer-encoding"};
    const auto bad = [&](const std::string& what) { throw Error(std::string(call) + ": " + what); };
    for (const auto& [name, value] : headers) {
        if (!text::is_token(name) || has_control_character(value))
            bad("\"" + escape_for_log(name) + "\" is not a header field");
        bool reserved = text::starts_with(text::to_lower(name), "sec-websocket-");
        for (const std::string_view each : own) reserved = reserved || text::equals_ignore_case(name, each);
        if (reserved) bad("only the client sets the header " + name);
    }
    const auto cookie_char = [](char c) {
        return c > ' ' && c < 0x7F && c != ';' && c != ',' && c != '\\' && c != '"';
    };
    for (const auto& [name, value] : cookies)
        if (!text::is_token(name) || !text::all_of(value, cookie_char))
            bad("\"" + escape_for_log(name) + "\" is not a cookie");
}

// ---- one connect() -------------------------------------------------------------------------------------------------

// What Client::connect() started: attempt, connection, pause, next attempt. It has at most one connection at a time,
// because the next attempt is scheduled when the socket of the last connection is closed. An attempt ends in one of two
// functions, fail() and open().
class ClientLink final : public SessionOwner, public std::enable_shared_from_this<ClientLink> {
public:
    ClientLink(ClientCore& core, std::uint64_t id, std::string url, ClientOptions options, Route::Factory factory)
        : core_(&core),
          id_(id),
          url_text_(std::move(url)),
          options_(std::move(options)),
          factory_(std::move(factory)),
          parser_(options_.limits) {}
    ClientLink(const ClientLink&) = delete;
    ClientLink& operator=(const ClientLink&) = delete;
    virtual ~ClientLink() = default;

    // Starts an attempt after the delay. The timer counts from now, not from the beginning of the turn.
    void start_later(Duration delay) {
        timer_ = call_later(delay, [](ClientLink& link) { link.start(); });
    }
    // The handle was given to Client::disconnect(): closes what is open, and tries nothing more.
    void disconnect(CloseCode code, std::string_view reason) {
        const auto self = shared_from_this();
        finishing_ = true;
        if (session_ == nullptr) return end();
        if (WebSocketHandler* handler = session_->opened_handler()) handler->close(code, reason);
    }
    void shut_down() {
        const auto self = shared_from_this();
        finishing_ = true;
        if (session_ == nullptr) return end();
        session_->shut_down();
    }
    void abort() {
        finishing_ = true;
        if (session_ != nullptr) session_->abort(CloseCause::shutdown, "client is shutting down");
    }
    // The client is being destroyed.
    void detach() {
        abort();
        stop_attempt();
        cancel(timer_);
        session_ = nullptr;
        core_ = nullptr;
    }

    // ---- called by the session -------------------------------------------------------------------------------------

    const Limits& session_limits() const override { return options_.limits; }
    void note_close(CloseCode code, CloseCause cause) noexcept override {
        close_code_ = code;
        close_cause_ = cause;
    }
    void on_session_end() override {
        if (core_ == nullptr) return;
        const auto self = shared_from_this();
        session_ = nullptr;
        if (options_.reconnect && loop().now() - opened_at_ >= options_.reconnect->stable) failures_ = 0;
        if (!may_reconnect()) return end();
        const bool asked = close_code_ == CloseCode::service_restart || close_code_ == CloseCode::try_again_later;
        start_later(retry_delay(asked ? options_.reconnect->max_delay / 6 : Duration::zero()));
    }

    // ---- called by a Dial ------------------------------------------------------------------------------------------

    void on_ready(Dial& dial, bool readable, bool writable, bool broken) {
        const auto self = shared_from_this();
        run_guarded(
            [&] {
                if (&dial == active_) transfer(readable || broken, writable);
                else finish_dial(dial);
            },
            [&](const char* what) { fail(stage_, what); });
    }

private:
    using LoopTimer = std::optional<Loop::TimerId>;

    Loop& loop() { return core_->loop(); }
    template <class Function>
    LoopTimer call_later(Duration delay, Function function) {
        return loop().call_later(delay, [weak = weak_from_this(), function] {
            const auto self = weak.lock();
            if (self && self->core_ != nullptr)
                run_guarded([&] { function(*self); }, [&](const char* what) { self->fail(self->stage_, what); });
        });
    }
    void cancel(LoopTimer& timer) {
        if (timer) loop().cancel(*std::exchange(timer, std::nullopt));
    }

    // ---- an attempt ------------------------------------------------------------------------------------------------

    void start() {
        timer_.reset();
        if (core_->worker.draining) return end();
        attempt_ = std::make_shared<char>();
        redirects_ = 0;
        stage_ = ConnectStage::url;
        const Duration timeout = options_.connect_timeout;
        if (timeout > Duration::zero()) deadline_ = call_later(timeout, [](ClientLink& link) { link.fail_late(); });
        attempted_ = {url_text_, options_.headers, options_.cookies};
        if (options_.before_attempt) {
            options_.before_attempt(attempted_);
            if (core_ == nullptr || ended_) return;
            check_client_headers("ClientOptions::before_attempt", attempted_.headers, attempted_.cookies);
        }
        std::string error;
        const auto url = ClientUrl::parse(attempted_.url, error);
        if (!url) return fail(stage_, error);
        url_ = *url;
        sends_secrets_ = true;
        start_hop();
    }
    // The server of the URL, or of a redirect.
    void start_hop() {
#if !WSCHAT_OPENSSL
        if (url_.secure)
            return fail(ConnectStage::url, "This program is built without TLS: no wss:// (WSCHAT_OPENSSL).");
#endif
        parser_ = ResponseParser(options_.limits);
        body_ = {};
        output_.clear();
        make_request();
        std::string error;
        if (!choose_proxy(error)) return fail(ConnectStage::proxy, error);
        stage_ = ConnectStage::resolve;
        if (!options_.unix_path.empty()) return dial_unix();
        const std::string& host = proxy_ ? proxy_->host : url_.host;
        if (const auto numeric = IpAddress::parse(host)) return dial_all({*numeric});
        core_->resolvers.resolve(options_.resolver, host, loop().mailbox(), attempt_,
                                 [weak = weak_from_this(), attempt = std::weak_ptr<char>(attempt_)](auto result) {
                                     const auto self = weak.lock();
                                     if (self && !attempt.expired()) self->on_resolved(std::move(result));
                                 });
    }
    // Returns false if the environment has no valid proxy.
    bool choose_proxy(std::string& error) {
        proxy_.reset();
        std::string text = options_.proxy;
        if (text.empty() && options_.proxy_from_environment && options_.unix_path.empty()) {
            const auto variable = [](const char* lower, const char* upper) -> std::string {
                const std::string value = os::environment(lower).value_or("");
                return !value.empty() ? value : os::environment(upper).value_or("");
            };
            // HTTP_PROXY is not read: a CGI server sets it from a header of its client.
            text = url_.secure ? variable("https_proxy", "HTTPS_PROXY") : variable("http_proxy", "http_proxy");
            if (excluded_from_proxy(variable("no_proxy", "NO_PROXY"), url_)) text.clear();
        }
        if (text.empty()) return true;
        proxy_ = ClientUrl::parse(text, error);
        if (proxy_ && !proxy_->secure) return true;
        if (proxy_) error = "The proxy is spoken to in plain HTTP: its URL begins with http://.";
        return false;
    }

    void on_resolved(ResolverResult result) {
        run_guarded(
            [&] {
                const std::string& host = proxy_ ? proxy_->host : url_.host;
                if (result.addresses.empty())
                    fail(stage_, "The host \"" + escape_for_log(host) + "\" cannot be resolved: " + result.error + ".");
                else dial_all(std::move(result.addresses));
            },
            [&](const char* what) { fail(stage_, what); });
    }

    // ---- connecting ------------------------------------------------------------------------------------------------

    void dial_all(std::vector<IpAddress> addresses) {
        stage_ = ConnectStage::connect;
        dial_error_ = "the host has no address";
        if (const auto bound = IpAddress::parse(options_.bind_address)) {
            const auto other = [&](const IpAddress& each) { return each.family() != bound->family(); };
            addresses.erase(std::remove_if(addresses.begin(), addresses.end(), other), addresses.end());
            dial_error_ = "the host has no address of the family of ClientOptions::bind_address";
        }
        if (addresses.empty()) return fail(stage_, "Cannot connect: " + dial_error_ + ".");
        const std::string& zone = proxy_ ? proxy_->zone : url_.zone;
        zone_ = zone.empty() ? 0 : os::zone_index(zone);
        if (!zone.empty() && zone_ == 0)
            return fail(stage_, "Cannot connect: this machine has no network interface \"" + zone + "\".");
        const auto ordered = interleave_families(addresses);
        addresses_.assign(ordered.begin(), ordered.end());
        dial_next();
    }
    // RFC 8305 5: tries the next address at once if the last has failed, otherwise after 250 ms.
    void dial_next() {
        constexpr Duration between = std::chrono::milliseconds(250);
        cancel(timer_);
        while (!addresses_.empty()) {
            const IpAddress address = addresses_.front();
            addresses_.pop_front();
            const int port = proxy_ ? proxy_->port : url_.port;
            if (!dial(address, SocketAddress(address, port, zone_))) continue;
            if (active_ == nullptr && !addresses_.empty() && attempt_)
                timer_ = call_later(between, [](ClientLink& link) { link.dial_next(); });
            return;
        }
        if (dials_.empty()) fail(stage_, "Cannot connect: " + dial_error_ + ".");
    }
    void dial_unix() {
        stage_ = ConnectStage::connect;
#if defined(_WIN32)
        fail(stage_, "There are no Unix sockets on this system.");
#else
        if (!dial(IpAddress(), SocketAddress(options_.unix_path))) fail(stage_, "Cannot connect: " + dial_error_ + ".");
#endif
    }
    // Returns false and sets dial_error_ if the system refuses at once.
    bool dial(const IpAddress& address, const SocketAddress& to) {
        const std::string name = address.bits() == 0 ? options_.unix_path : address.to_string();
        const auto refused = [&] {
            dial_error_ = name + ": " + os::error_text(os::last_error());
            if (zone_ == 0 && text::starts_with(name, "fe80:"))
                dial_error_ += "; a link-local address needs a zone, as in [fe80::1%25eth0]";
            return false;
        };
        Socket socket(os::open_socket(to.get()->sa_family));
        if (!socket) return refused();
        if (const auto bound = IpAddress::parse(options_.bind_address); bound && address.bits() != 0) {
            const SocketAddress from(*bound, 0);
            if (::bind(socket.descriptor(), from.get(), from.size) != 0) return refused();
        }
        const bool connected = ::connect(socket.descriptor(), to.get(), to.size) == 0;
        const bool pending = !connected && connects_later(os::last_error(), address);
        if (!connected && !pending) return refused();
        dials_.push_back(std::make_unique<Dial>(*this, std::move(socket), address));
        Dial& made = *dials_.back();
        if (!LoopAccess::poller(loop()).add(made.socket.descriptor(), made, false, true)) {
            refused();
            drop(made);
            return false;
        }
        made.watched = true;
        return true;
    }
    static bool connects_later(int error, const IpAddress& address) {
        // A Unix socket that is full answers EAGAIN, and the kernel does not connect later.
        return error == EINPROGRESS || os::interrupted(error) || (os::would_block(error) && address.bits() != 0);
    }
    void drop(Dial& dial) {
        const auto at =
            std::find_if(dials_.begin(), dials_.end(), [&](const auto& each) { return each.get() == &dial; });
        std::unique_ptr<Dial> dropped = std::move(*at);
        dials_.erase(at);
        Dial::retire(std::move(dropped), loop());
    }

    // The system has connected a socket, or has given up.
    void finish_dial(Dial& dial) {
        int error = 0;
        socklen_t size = sizeof error;
        if (::getsockopt(dial.socket.descriptor(), SOL_SOCKET, SO_ERROR, reinterpret_cast<char*>(&error), &size) != 0)
            error = os::last_error();
        if (error != 0) {
            dial_error_ =
                (dial.peer.bits() == 0 ? options_.unix_path : dial.peer.to_string()) + ": " + os::error_text(error);
            drop(dial);
            return dial_next();
        }
        cancel(timer_);
        active_ = &dial;
        addresses_.clear();
        while (dials_.size() > 1) drop(*(dials_.front().get() == active_ ? dials_.back() : dials_.front()));
        if (dial.peer.bits() != 0) dial.socket.set_nodelay(true);
        if (proxy_) ask_proxy();
        else start_encryption();
        if (active_ == &dial) transfer(false, true);
    }

    // ---- the stages on one socket ----------------------------------------------------------------------------------

    void ask_proxy() {
        stage_ = ConnectStage::proxy;
        const std::string to = url_.host_and_port();
        output_ = "CONNECT " + to + " HTTP/1.1\r\nHost: " + to + "\r\n";
        if (!proxy_->credentials.empty())
            (output_ += "Proxy-Authorization: ") += basic_authorization(proxy_->credentials) + "\r\n";
        output_ += "\r\n";
    }
    void start_encryption() {
        parser_ = ResponseParser(options_.limits);
        if (!url_.secure) return send_request();
#if WSCHAT_OPENSSL
        stage_ = ConnectStage::tls;
        auto made = core_->make_transport(options_.tls, url_.host);
        tls_ = made.get();
        transport_ = std::move(made);
#endif
    }
    // The handshake is done, and the certificate is accepted.
    void finish_encryption() {
#if WSCHAT_OPENSSL
        const auto& pins = options_.tls.pinned_keys;
        const std::string pin = pins.empty() ? std::string() : tls_->peer_key_pin();
        if (!pins.empty() && std::find(pins.begin(), pins.end(), pin) == pins.end())
            return fail(stage_, "The server's public key is not one of ClientTls::pinned_keys; it is " + pin + ".");
#endif
        send_request();
    }
    void send_request() {
        stage_ = ConnectStage::http;
        output_ = request_;
    }
    // RFC 6455 4.1.
    void make_request() {
        key_ = random_key();
        std::string subprotocols;
        for (const std::string& each : options_.subprotocols)
            (subprotocols += subprotocols.empty() ? "" : ", ") += each;
        offers_compression_ = compression_available && options_.compression;
        const std::string offer = offers_compression_ ? CompressionPool::offer(*options_.compression) : std::string();
        request_ = handshake_request(url_.authority(), url_.target, key_, subprotocols, offer);
        std::string lines;
        if (!options_.origin.empty()) add_line(lines, "Origin", options_.origin);
        bool authorized = false;
        for (const auto& [name, value] : attempted_.headers) {
            const bool secret = is_secret(name);
            authorized = authorized || text::equals_ignore_case(name, "authorization");
            if (sends_secrets_ || !secret) add_line(lines, name, value);
        }
        if (!url_.credentials.empty() && !authorized)
            add_line(lines, "Authorization", basic_authorization(url_.credentials));
        std::string cookies;
        for (const auto& [name, value] : attempted_.cookies)
            cookies += (cookies.empty() ? "" : "; ") + name + "=" + value;
        if (sends_secrets_ && !cookies.empty()) add_line(lines, "Cookie", cookies);
        request_.insert(request_.size() - 2, lines);
    }
    static bool is_secret(std::string_view name) {
        return text::equals_ignore_case(name, "authorization") || text::equals_ignore_case(name, "cookie") ||
               text::equals_ignore_case(name, "proxy-authorization");
    }

    // ---- input and output of an attempt ----------------------------------------------------------------------------

    void transfer(bool readable, bool writable) {
        const Dial* const dial = active_;
        if (readable && !receive()) return;
        static_cast<void>(writable);
        if (active_ == dial && !send()) return;
        if (active_ == dial && dial != nullptr) watch();
    }
    // Returns false if the attempt has ended.
    bool receive() {
        const Dial* const dial = active_;
        constexpr int max_reads = 4;
        for (int i = 0; i < max_reads; ++i) {
            Bytes& buffer = core_->worker.receive_buffer;
            const IoResult got = transport_
                                     ? transport_->receive(active_->socket, buffer.data(), buffer.capacity(), wire())
                                     : active_->socket.receive(buffer.data(), buffer.capacity());
            if (!transport_) wire().received += got.size;
            if (got.outcome == IoResult::Outcome::would_block) return true;
            if (got.outcome != IoResult::Outcome::done) return end_of_input(got);
            take(buffer.data(), got.size);
            if (active_ != dial) return false;
        }
        return true;
    }
    bool end_of_input(const IoResult& got) {
        const bool tls_failed = transport_ && !transport_->failure().empty();
        std::string cause = tls_failed                                ? transport_->failure()
                            : got.outcome == IoResult::Outcome::error ? os::error_text(got.error)
                                                                      : std::string("the server hung up");
        if (reads_body_) fail_response();
        else if (stage_ == ConnectStage::tls) fail(stage_, "The TLS handshake failed: " + cause + ".");
        else fail(stage_, "The connection ended before the response: " + cause + ".");
        return false;
    }
    bool send() {
        if (stage_ == ConnectStage::tls && transport_) {
            const IoResult step = transport_->send(active_->socket, nullptr, 0, wire());
            if (step.outcome == IoResult::Outcome::error) return end_of_input(step);
            if (!transport_->established()) return true;
            finish_encryption();
            if (active_ == nullptr) return false;
        }
        while (!output_.empty() || (transport_ && transport_->wants_write())) {
            const std::string_view piece = output_;
            const std::size_t count = piece.empty() ? 0 : 1;
            const IoResult sent = transport_ ? transport_->send(active_->socket, &piece, count, wire())
                                             : active_->socket.send(&piece, count);
            if (!transport_) wire().sent += sent.size;
            if (sent.outcome == IoResult::Outcome::error) {
                // The response may have arrived before.
                output_.clear();
                return receive() && end_of_input(sent);
            }
            output_.erase(0, sent.size);
            if (sent.outcome != IoResult::Outcome::done || (piece.empty() && sent.size == 0)) break;
        }
        return true;
    }
    void watch() {
        const bool write = !output_.empty() || (transport_ && transport_->wants_write());
        if (!LoopAccess::poller(loop()).change(active_->socket.descriptor(), *active_, true, write))
            return fail(stage_, "The socket cannot be watched: " + os::error_text(os::last_error()) + ".");
        // What TLS has decrypted already, the poller does not report.
        if (transport_ && transport_->has_input())
            loop().post([weak = weak_from_this(), attempt = std::weak_ptr<char>(attempt_)] {
                const auto self = weak.lock();
                if (self && !attempt.expired() && self->active_ != nullptr)
                    self->on_ready(*self->active_, true, false, false);
            });
    }
    WireCount& wire() { return core_->worker.wire; }

    // ---- the response ----------------------------------------------------------------------------------------------

    void take(char* data, std::size_t size) {
        while (size != 0 && !reads_body_) {
            std::size_t consumed = 0;
            const ResponseParser::Outcome outcome = parser_.feed({data, size}, consumed);
            data += consumed;
            size -= consumed;
            if (outcome == ResponseParser::Outcome::failure)
                return fail(stage_, "The response is not HTTP: " + parser_.reason());
            if (outcome == ResponseParser::Outcome::need_more) return;
            if (stage_ == ConnectStage::proxy && parser_.status() / 100 == 2) {
                if (size != 0) return fail(stage_, "The proxy sent bytes before the server could.");
                return start_encryption();
            }
            if (parser_.status() == 101 && stage_ == ConnectStage::http) return finish_handshake({data, size});
            // RFC 9110 15.2: "A client MUST be able to parse one or more 1xx responses received prior to a final one."
            if (parser_.status() / 100 != 1) start_body();
            else if (++interim_ > max_interim) return fail(stage_, "The server sends interim responses only.");
            else parser_ = ResponseParser(options_.limits);
        }
        if (!reads_body_) return;
        body_.feed({data, size});
        if (body_.complete()) fail_response();
    }
    void start_body() {
        reads_body_ = true;
        body_.start(parser_.status(), parser_.fields());
    }
    // The response is complete, and it is not the one that was hoped for.
    void fail_response() {
        const int status = parser_.status();
        if (stage_ == ConnectStage::http && status >= 300 && status < 400 && options_.max_redirects != 0)
            return follow_redirect();
        const std::string phrase = text::concat({std::to_string(status), " ", reason_phrase(status)});
        if (stage_ == ConnectStage::proxy) return fail(stage_, "The proxy answered " + phrase + ".", status);
        fail(stage_, "The server answered " + phrase + " instead of 101.", status);
    }
    void follow_redirect() {
        const int status = parser_.status();
        const auto location = parser_.fields().find("location");
        std::string error;
        if (!location || status == 300 || status == 304 || status == 305 || status == 306)
            return fail(stage_, "The server answered " + std::to_string(status) + ", which leads nowhere.", status);
        const auto next = ClientUrl::parse(*location, error, &url_);
        if (!next) return fail(stage_, "The redirect leads nowhere: " + error, status);
        if (url_.secure && !next->secure)
            return fail(stage_, "A redirect from wss:// to ws:// is not followed: it gives up the encryption.", status);
        if (++redirects_ > (std::min)(options_.max_redirects, 5u))
            return fail(stage_, "There are too many redirects.", status);
        ClientUrl from = std::exchange(url_, *next);
        if (!options_.unix_path.empty() && !from.same_server(url_))
            return fail(stage_, "A redirect to another server is not followed from a Unix socket.", status);
        if (from.same_server(url_)) url_.credentials = from.credentials;
        else sends_secrets_ = false;
        drop_sockets();
        start_hop();
    }
    void finish_handshake(std::string_view frames) {
        stage_ = ConnectStage::upgrade;
        std::string subprotocols;
        for (const std::string& each : options_.subprotocols)
            (subprotocols += subprotocols.empty() ? "" : ", ") += each;
        std::string error = handshake_response_error(parser_.head(), key_, subprotocols, offers_compression_);
        std::unique_ptr<Compression> compression;
        if (error.empty() && offers_compression_)
            compression = core_->worker.compression().read_response(parser_.fields(), *options_.compression, error);
        if (!error.empty()) return fail(stage_, "The response breaks RFC 6455 4.1: " + error + ".", 101);
        open(std::move(compression), frames);
    }

    // ---- the two ends of an attempt --------------------------------------------------------------------------------

    void open(std::unique_ptr<Compression> compression, std::string_view frames) {
        ClientHandshake opened{shared_from_this(),
                               nullptr,
                               current_request(),
                               std::string(parser_.fields().find("sec-websocket-protocol").value_or("")),
                               std::move(compression),
                               &random_mask,
                               frames};
        opened.handler = factory_();
        if (!opened.handler) return fail(stage_, "The factory made no handler.");
        if (core_->worker.draining) return end();
        active_->unwatch(loop());
        Socket socket = std::move(active_->socket);
        std::unique_ptr<Transport> transport = std::move(transport_);
        const IpAddress peer = active_->peer;
        stop_attempt();
        opened_at_ = loop().now();
        close_code_ = CloseCode::abnormal;
        close_cause_ = CloseCause::connection_lost;
        run_guarded(
            [&] { core_->worker.adopt(std::move(socket), peer, std::move(transport), std::move(opened), session_); },
            [](const char*) {});
        if (session_ == nullptr) on_session_end();  // memory ran out
    }

    // `status`: of the response, whose body is in body_.
    WSCHAT_COLD void fail(ConnectStage stage, std::string sentence, int status = 0) {
        if (core_ == nullptr || !attempt_) return;
        const auto self = shared_from_this();
        ConnectError error{stage, status, body_.take(), std::move(sentence), std::nullopt};
        Duration wait = Duration::zero();
        if (status != 0 && options_.reconnect) wait = retry_after();
        const IpAddress peer = active_ != nullptr ? active_->peer : IpAddress();
        stop_attempt();
        if (may_retry(error)) error.retry_in = retry_delay(wait);
        if (core_->worker.log)
            core_->worker.log(LogLevel::info, "connect_failed",
                              {{"url", ClientUrl::without_secrets(url_text_)},
                               {"stage", std::string(to_string(stage))},
                               {"status", std::to_string(status)},
                               {"sentence", error.sentence}});
        FailedHandler(core_->worker, peer).call_on_failure(factory_, current_request(), error);
        if (core_ == nullptr || ended_) return;
        if (error.retry_in && !finishing_) start_later(*error.retry_in);
        else end();
    }
    void fail_late() {
        deadline_.reset();
        // A response whose body does not end is a response.
        if (reads_body_) return fail_response();
        constexpr std::string_view waited_for[] = {
            "valid URL", "answer of the resolver", "connection", "answer of the proxy", "TLS handshake", "response",
            "upgrade"};
        const auto seconds = std::chrono::duration_cast<std::chrono::milliseconds>(options_.connect_timeout).count();
        fail(stage_, "There was no " + std::string(waited_for[static_cast<std::size_t>(stage_)]) + " within " +
                         std::to_string(seconds) + " ms.");
    }
    // The handshake's request, which a handler sees as request().
    Request current_request() {
        RequestParser parser(options_.limits);
        std::size_t consumed = 0;
        if (parser.feed(request_, consumed) != RequestParser::Outcome::request) return {};
        Request request = parser.take_request();
        RequestAccess::set_connection(request, active_ != nullptr ? active_->peer.to_string() : "", url_.secure);
        return request;
    }
    void drop_sockets() {
        active_ = nullptr;
        addresses_.clear();
        while (!dials_.empty()) drop(*dials_.back());
        transport_.reset();
#if WSCHAT_OPENSSL
        tls_ = nullptr;
#endif
        reads_body_ = false;
        interim_ = 0;
    }
    void stop_attempt() {
        cancel(timer_);
        cancel(deadline_);
        drop_sockets();
        output_.clear();
        body_ = {};
        attempt_.reset();
    }
    // No attempt and no connection follows.
    void end() {
        if (std::exchange(ended_, true)) return;
        stop_attempt();
        core_->remove(id_);
    }

    // ---- when to try again -----------------------------------------------------------------------------------------

    bool may_retry(const ConnectError& error) const {
        if (!options_.reconnect || error.stage == ConnectStage::url || finishing_) return false;
        const bool refusal = error.status >= 200 && error.status < 500;
        return !refusal || options_.reconnect->after_refusal;
    }
    bool may_reconnect() const {
        if (!options_.reconnect || finishing_ || core_->worker.draining) return false;
        // This side has ended it.
        if (close_cause_ == CloseCause::local || close_cause_ == CloseCause::shutdown ||
            close_cause_ == CloseCause::closing_timeout)
            return false;
        const bool final = close_cause_ == CloseCause::peer &&
                           (close_code_ == CloseCode::normal || close_code_ == CloseCode::policy_violation);
        return !final || options_.reconnect->after_normal_close;
    }
    // Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    Duration retry_delay(Duration least) {
        const ReconnectOptions& options = *options_.reconnect;
        Duration limit = (std::min)(options.min_delay, options.max_delay);
        for (unsigned i = 0; i < failures_ && limit < options.max_delay; ++i)
            limit = limit > options.max_delay / 2 ? options.max_delay : limit * 2;
        ++failures_;
        return least > Duration::zero() ? saturating_sum(least, core_->random_up_to((std::max)(limit, least)))
                                        : core_->random_up_to(limit);
    }
    static Duration saturating_sum(Duration a, Duration b) {
        return a > (Duration::max)() - b ? (Duration::max)() : a + b;
    }
    // RFC 9110 10.2.3: seconds or a date.
    Duration retry_after() const {
        const auto value = parser_.fields().find("retry-after");
        if (!value) return Duration::zero();
        const Duration max = options_.reconnect->max_retry_after;
        const auto max_seconds = std::chrono::duration_cast<std::chrono::seconds>(max).count();
        std::int64_t seconds = 0;
        if (const auto number = text::parse_unsigned(*value, INT64_MAX)) seconds = static_cast<std::int64_t>(*number);
        else if (const auto date = parse_http_date(*value))
            seconds = *date - static_cast<std::int64_t>(std::time(nullptr));
        return seconds <= 0 ? Duration::zero() : seconds >= max_seconds ? max : Duration(std::chrono::seconds(seconds));
    }

    static constexpr unsigned max_interim = 16;

    ClientCore* core_;  // null if the client is gone
    const std::uint64_t id_;
    const std::string url_text_;
    const ClientOptions options_;
    const Route::Factory factory_;

    ClientAttempt attempted_;
    std::shared_ptr<char> attempt_;  // null between attempts
    ConnectStage stage_ = ConnectStage::url;
    ClientUrl url_;  // of the present hop
    std::optional<ClientUrl> proxy_;
    LoopTimer timer_;     // the next address, or the next attempt
    LoopTimer deadline_;  // of the attempt
    std::deque<IpAddress> addresses_;
    std::uint32_t zone_ = 0;  // of a link-local address
    std::string dial_error_;
    std::vector<std::unique_ptr<Dial>> dials_;
    Dial* active_ = nullptr;  // the one that has connected
    std::unique_ptr<Transport> transport_;
#if WSCHAT_OPENSSL
    TlsTransport* tls_ = nullptr;  // the same
#endif
    std::string key_, request_, output_;
    ResponseParser parser_;
    ResponseBody body_;
    bool offers_compression_ = false;
    bool sends_secrets_ = true;  // false after a redirect to another server
    bool reads_body_ = false;
    unsigned interim_ = 0;
    unsigned redirects_ = 0;

    Session* session_ = nullptr;  // of the open connection
    Time opened_at_{};
    CloseCode close_code_ = CloseCode::abnormal;
    CloseCause close_cause_ = CloseCause::none;
    unsigned failures_ = 0;   // since the last stable connection
    bool finishing_ = false;  // nothing more is tried
    bool ended_ = false;
};

inline void Dial::on_ready(bool readable, bool writable, bool broken) {
    if (link_ != nullptr) link_->on_ready(*this, readable, writable, broken);
}

// Throws Error for what can never work, because the caller made a mistake.
WSCHAT_COLD inline void check_client_options(const ClientOptions& options) {
    const auto bad = [](const std::string& what) { throw Error("Client::connect: " + what); };
    check_client_headers("Client::connect", options.headers, options.cookies);
    for (const std::string& each : options.subprotocols)
        if (!text::is_token(each)) bad("the subprotocol \"" + escape_for_log(each) + "\" is not a token");
    if (has_control_character(options.origin)) bad("the origin has a control character");
    if (!options.bind_address.empty() && !IpAddress::parse(options.bind_address))
        bad("bind_address \"" + escape_for_log(options.bind_address) + "\" is not a numeric address");
#if !defined(_WIN32)
    if (options.unix_path.size() >= sizeof sockaddr_un{}.sun_path) bad("unix_path is too long for a Unix socket");
#endif
    std::string error;
    if (!options.proxy.empty() && !ClientUrl::parse(options.proxy, error)) bad("proxy: " + error);
    if (options.reconnect && options.reconnect->min_delay < Duration::zero()) bad("min_delay is negative");
    if (compression_available && options.compression) CompressionPool::offer(*options.compression);
}

}  // namespace detail

// Connects WebSocketHandlers to other servers:
//
//   wschat::Client client;
//   client.connect<Bot>("wss://chat.example/chat/tea?name=bot");
//   client.run();
//
// A client has a loop and rooms of its own, or those of a server: then handlers of both sides meet in room(), and a
// broadcast reaches them all. Only shutdown() may be called from other threads.
class Client {
public:
    using ConnectionId = std::uint64_t;

    WSCHAT_COLD explicit Client(PollerKind poller = PollerKind::automatic)
        : server_(make_server(poller)), core_(std::make_shared<detail::ClientCore>(*worker_of(server_->loop()))) {
        core_->on_idle = [this] {
            idle_ = true;
            loop().stop();
        };
        detail::LoopAccess::on_signal(loop(), [this](int) { on_signal(); });
    }
    // On the loop of a server or of another client, which must live longer: Client client(server.loop()). Server::run()
    // runs both. Throws an Error for any other loop.
    WSCHAT_COLD explicit Client(Loop& loop) {
        if (worker_of(loop) == nullptr)
            throw Error("Client: the loop is not that of a server: use Client() and its loop()");
        core_ = std::make_shared<detail::ClientCore>(*worker_of(loop));
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    // Connections that are still open end without a closing handshake, after the turn if the loop is a server's; their
    // on_close() is called. Do not destroy a client in a callback of its own handlers.
    WSCHAT_COLD ~Client() {
        core_->on_idle = nullptr;
        for (const auto& [id, link] : std::exchange(core_->links, {})) link->detach();
    }

    // Connects in the loop's next turn. Each attempt gets its own handler, made with copies of the arguments (std::ref
    // passes a reference). Whatever fails is an on_failure(), also a URL that is none. Throws an Error for options that
    // can never work: a header with a line break, a certificate file that cannot be read.
    template <class Handler, class... Arguments>
    ConnectionId connect(std::string_view url, ClientOptions options, Arguments&&... arguments) {
        return add(url, std::move(options),
                   [stored = std::tuple<std::decay_t<Arguments>...>(std::forward<Arguments>(arguments)...)] {
                       return std::apply(
                           [](const auto&... a) -> std::unique_ptr<WebSocketHandler> {
                               return std::make_unique<Handler>(a...);
                           },
                           stored);
                   });
    }
    template <class Handler>
    ConnectionId connect(std::string_view url) {
        return connect<Handler>(url, ClientOptions());
    }
    // Ends what connect() started: closes the connection, or gives up the attempt, and does not try again. No
    // on_failure() follows. Returns false if it is over already.
    bool disconnect(ConnectionId id, CloseCode code = CloseCode::normal, std::string_view reason = {}) {
        detail::Connection::check_close(code, reason);
        const auto found = core_->links.find(id);
        if (found == core_->links.end()) return false;
        const auto link = found->second;
        link->disconnect(code, reason);
        return true;
    }
    // How many calls of connect() are not over: connecting, open, or waiting for the next attempt.
    std::size_t connections() const { return core_->links.size(); }

    // ---- running; only with a loop of its own ----------------------------------------------------------------------

    // Returns when all connections are over and none is tried again, or after loop().stop(). Throws an Error if there
    // was no connect(), and on the loop of a server. SIGINT and SIGTERM call shutdown(); a second one ends at once.
    void run() {
        if (!server_) throw Error("Client::run: the loop is that of a server: call Server::run()");
        if (core_->links.empty()) throw Error("Client::run: nothing to do: call connect() first");
        const detail::SignalGuard guard(detail::LoopAccess::wake_descriptor(loop()));
        do {
            idle_ = false;
            start_turn();
            loop().run();
        } while (idle_ && !core_->links.empty());
    }
    // One turn, instead of run(), in the event loop of another program; see Loop::poll(). Returns false if all
    // connections are over, and after loop().stop().
    bool poll(Duration timeout = Duration::zero()) {
        if (!server_) throw Error("Client::poll: the loop is that of a server: call Server::poll()");
        start_turn();
        return (loop().poll(timeout) || std::exchange(idle_, false)) && !core_->links.empty();
    }
    int descriptor() const { return core_->loop().descriptor(); }
    Duration next_timeout() const { return core_->worker.has_work() ? Duration::zero() : core_->loop().next_timeout(); }

    // From any thread while the client lives: closes every connection with 1001, gives up all attempts, and ends run().
    // What has not closed at the deadline is dropped.
    void shutdown(Duration deadline = std::chrono::seconds(5)) {
        loop().post([weak = std::weak_ptr<detail::ClientCore>(core_), deadline] {
            if (const auto core = weak.lock()) begin_shutdown(core, deadline);
        });
    }

    // Receives the log. Throws an Error on the loop of a server, which has its own.
    void on_log(std::function<void(const LogEntry&)> function) {
        if (!server_) throw Error("Client::on_log: the loop is that of a server: call Server::on_log()");
        server_->on_log(std::move(function));
    }
    Loop& loop() { return core_->loop(); }
    // Those of its handlers' room(): the server's, if the loop is a server's.
    Rooms& rooms() { return core_->worker.rooms; }

private:
    static detail::Worker* worker_of(const Loop& loop) {
        return static_cast<detail::Worker*>(detail::LoopAccess::owner(loop));
    }
    static std::unique_ptr<Server> make_server(PollerKind poller) {
        ServerOptions options;
        options.poller = poller;
        options.handle_signals = false;
        return std::make_unique<Server>(std::move(options));
    }

    WSCHAT_COLD ConnectionId add(std::string_view url, ClientOptions options, Route::Factory factory) {
        detail::check_client_options(options);
#if WSCHAT_OPENSSL
        const ClientTls& tls = options.tls;
        if (!tls.authorities.empty() || !tls.revocation_lists.empty() || !tls.certificate.empty() || !tls.key.empty())
            core_->context(tls);
#endif
        const ConnectionId id = ++last_id_;
        const auto link =
            std::make_shared<detail::ClientLink>(*core_, id, std::string(url), std::move(options), std::move(factory));
        core_->links.emplace(id, link);
        link->start_later(Duration::zero());
        return id;
    }
    void start_turn() {
        if (core_->worker.has_work()) detail::LoopAccess::poll_again(loop());
    }
    static void begin_shutdown(const std::shared_ptr<detail::ClientCore>& core, Duration deadline) {
        for (const auto& [id, link] : std::map(core->links)) link->shut_down();
        if (core->links.empty()) return;
        core->loop().call_later(deadline, [weak = std::weak_ptr<detail::ClientCore>(core)] {
            if (const auto live = weak.lock()) abort_all(*live);
        });
    }
    static void abort_all(detail::ClientCore& core) {
        for (const auto& [id, link] : std::map(core.links)) link->abort();
    }
    void on_signal() {
        if (std::exchange(signalled_, true)) abort_all(*core_);
        else begin_shutdown(core_, std::chrono::seconds(5));
    }

    std::unique_ptr<Server> server_;  // that never listens: its worker runs the sessions. Null on the loop of another
    std::shared_ptr<detail::ClientCore> core_;
    ConnectionId last_id_ = 0;
    bool idle_ = false;
    bool signalled_ = false;
};

WSCHAT_END

// ====================================================================================================================
// section 16: Chat
//
// ChatHandler: a complete chat as one handler, with names, presence, a history, private messages, commands, flood
// limits and moderation. A ChatStore decides where the history is and how servers share it.
// ====================================================================================================================

#if WSCHAT_CHAT

#if WSCHAT_UTF8PROC
#include <utf8proc.h>
#endif

WSCHAT_BEGIN

class ChatHandler;
class ChatHub;

namespace detail {

class ChatCommands;

}  // namespace detail

// ---- entries and stores --------------------------------------------------------------------------------------------

// One event of a room. A store keeps messages (`said` and `action`), amendments of them (`edit`, `remove` and `react`)
// and `topic`, each under an id of its own. It only delivers the other kinds. An entry without a room is for all hubs.
struct ChatEntry {
    // `action` is "/me waves". Files contain the numbers of the first six.
    enum class Kind : std::uint8_t {
        said = 0,
        action = 1,
        edit = 2,
        remove = 3,
        react = 4,
        topic = 5,
        private_message = 32,
        typing,
        join,
        leave,
        rename,
        event,       // of the program, for a room: `text` is its name, `data` its JSON value
        away,        // a user has lost the last connection to a hub; a `leave` or a `join` of that hub follows
        kick,        // closes the connections of the user `to` to the room; `text` is the reason
        ban,         // asks all hubs to ban what they know of the user with a name
        direct,      // the same as `event`, for the user `to_user`
        moderation,  // for moderators: `name` does `text` to `to`; `data` has the seconds
    };
    struct Reaction {
        std::string emoji{};
        std::string user{}, name{};  // of the user who reacts
        std::string author{};        // the identity of that user; clients never get it
    };

    Kind kind = Kind::said;
    std::uint64_t id = 0;      // ascends within a room; 0: not kept
    std::uint64_t target = 0;  // the id of the message that an amendment changes
    std::int64_t time = 0;     // Unix time in milliseconds
    std::string room{};
    std::string name{};     // of the author; empty: the server itself
    std::string user{};     // the public id of the author
    std::string text{};     // edit: the new text; react: the emoji; rename: the new name; join: ChatUser::about
    std::string data{};     // a JSON object of the application, or empty
    std::string to{};       // the receiver of a private message
    std::string to_user{};  // the public id of that receiver
    std::string author{};   // the identity of the author; clients never get it
    std::string tag{};      // chosen by the author; a second entry with the same tag is a duplicate

    // The present state of a message. In a `react` entry, `removed` says that the reaction was taken back.
    std::int64_t edited = 0;  // the time of the last edit; 0: never edited
    bool removed = false;     // its text and data are empty
    std::vector<Reaction> reactions{};

    // Of an amendment that is appended, not kept.
    bool moderator = false;       // may remove the messages of others
    std::int64_t not_before = 0;  // an edit of an older message is refused as "too_late"; Unix time in milliseconds

    std::uint64_t sender = 0;  // a number of the connection that no other hub uses; not kept
    std::string hub{};         // the id of the hub that made the entry; not kept
    bool quiet = false;        // of presence: the user is also connected to another hub, so nobody hears of it

    bool kept() const { return kind <= Kind::topic; }
    bool is_message() const { return kind <= Kind::action; }
    bool is_amendment() const { return kept() && !is_message() && kind != Kind::topic; }
    // Whether it changes who is in a room: see PresenceTable.
    bool is_presence() const {
        return kind == Kind::join || kind == Kind::away || kind == Kind::leave || kind == Kind::rename;
    }

    // The size that counts for HistoryLimits.
    std::size_t bytes() const {
        std::size_t size = name.size() + user.size() + text.size() + data.size() + author.size() + 2 * tag.size() + 256;
        for (const Reaction& each : reactions)
            size += each.emoji.size() + each.user.size() + each.name.size() + each.author.size() + 128;
        return size;
    }
    // Why the amendment of a message is refused: a code of ChatStore::Listener::on_refused(). Empty: it is possible.
    static std::string_view refuse_amendment(const ChatEntry& amendment, const ChatEntry* target) {
        if (target == nullptr || !target->is_message() || target->removed) return "bad_id";
        if (amendment.kind == Kind::react) return {};
        const bool by_moderator = amendment.kind == Kind::remove && amendment.moderator;
        // In older files the author of a guest is only a name, but the public id is that of one connection.
        const bool own = amendment.author == target->author && amendment.user == target->user;
        if (!own && !by_moderator) return "not_yours";
        const bool too_late = amendment.kind == Kind::edit && target->time < amendment.not_before;
        return too_late ? std::string_view("too_late") : std::string_view();
    }
    // A line of ChatStore::export_room().
    inline std::string to_json_line(const std::string& of_room) const;
};

// What a server remembers beside the order of a room: bans, topics, markers and so on.
struct ChatFact {
    std::string scope{}, key{};
    std::string value{};       // empty: the fact is deleted
    std::string author{};      // the identity of the user to whom it belongs; ChatStore::erase_author() deletes it
    std::int64_t expires = 0;  // Unix time in milliseconds; 0: never
    bool if_new = false;       // an older fact stays; on_fact() gets the one that is kept
};

// The newest id that a client has of a room, and the epoch of the store that gave it: "9f86d081884c7d65-105".
struct HistoryPosition {
    std::string epoch{};
    std::uint64_t id = 0;

    // A number without an epoch is a position that no store knows. An id above 10^18 counts as 10^18.
    static std::optional<HistoryPosition> parse(std::string_view text) {
        HistoryPosition position;
        if (text.size() > epoch_size && text[epoch_size] == '-') {
            position.epoch = std::string(text.substr(0, epoch_size));
            text.remove_prefix(epoch_size + 1);
            const auto is_digit = [](char c) { return text::is_digit(c) || (c >= 'a' && c <= 'f'); };
            if (!text::all_of(position.epoch, is_digit)) return std::nullopt;
        }
        if (text.empty() || !text::all_of(text, text::is_digit)) return std::nullopt;
        position.id = text::parse_unsigned(text, max_id).value_or(max_id);
        return position;
    }
    std::string to_string() const { return text::concat({epoch, "-", std::to_string(id)}); }

    static constexpr std::size_t epoch_size = 16;  // lower-case hexadecimal digits
    static constexpr std::uint64_t max_id = 1'000'000'000'000'000'000;
};

// A part of the history of a room, oldest first.
struct HistoryPage {
    std::vector<ChatEntry> entries{};  // ChatEntry::room is empty
    std::uint64_t last_id = 0;         // the newest id of the room
    std::string epoch{};               // of the store, for HistoryPosition
    bool gap = false;     // an entry after the requested position is missing, or the store does not know the position
    bool more = false;    // older messages than these exist
    std::string error{};  // why the history could not be read; empty: it was read
};

// A part of ChatStore::export_room().
struct HistoryExport {
    std::string lines{};  // JSON objects, each with a line feed
    bool end = false;     // the last part
    std::string error{};  // why the export ended early
};

// Stores entries and facts, and delivers them to the hubs that share it. A hub is the chat of one loop: a server has
// one for each of its loops. A hub shows an entry when the store delivers it, so all hubs show the same order. All
// calls are made on the loop's thread. Each is answered on that thread, immediately or later, but never after the
// destruction of the store.
class ChatStore {
public:
    class Listener {
    public:
        // An entry of append() or forward(), from this hub or another. All hubs get the entries of a room in one order,
        // that of their ids.
        virtual void on_entry(const ChatEntry& entry) = 0;
        // The author has sent this tag before. The entry has the id of the first one, and is not delivered again.
        virtual void on_duplicate(const ChatEntry& entry) = 0;
        // An entry that this server appended could not be kept. Nobody received it.
        virtual void on_failure(const ChatEntry& entry, const std::string& cause) = 0;
        // An amendment that this server appended is not possible. The code is "bad_id" (the message is not kept, or is
        // removed), "not_yours", "too_late" or "refused" (the message has too many reactions). Or a `join` or `rename`
        // that this hub forwarded: see PresenceTable::apply().
        virtual void on_refused(const ChatEntry&, std::string_view /*code*/) {}
        // A fact was kept, by this server or another.
        virtual void on_fact(const ChatFact&) {}
        // A fact that this server put could not be kept.
        virtual void on_fact_failure(const ChatFact&, const std::string& /*cause*/) {}
        // Who is in a room: a `join` or an `away` for each user and hub. It follows watch(), and comes again when the
        // store may have lost entries. It replaces what was known; the hub forwards its own users who are missing.
        virtual void on_presence(const std::string& /*room*/, const std::vector<ChatEntry>& /*users*/) {}
        // The time by which a history in memory expires.
        virtual Time now() const { return Clock::now(); }
        // The id of this hub: 16 lower-case hexadecimal digits at random.
        virtual std::string hub() const { return {}; }
        // Whether this hub gets the entries of all rooms, not only of those that it watches.
        virtual bool watches_all() const { return false; }

    protected:
        ~Listener() = default;
    };
    using PageCallback = std::function<void(HistoryPage)>;
    using FactsCallback = std::function<void(std::vector<ChatFact>, std::string error)>;
    using EraseCallback = std::function<void(std::size_t messages, std::string error)>;
    using ExportCallback = std::function<bool(HistoryExport)>;
    // The names of rooms with the numbers of their users.
    using RoomsCallback = std::function<void(std::vector<std::pair<std::string, std::size_t>>, std::string error)>;

    ChatStore() = default;
    ChatStore(const ChatStore&) = delete;
    ChatStore& operator=(const ChatStore&) = delete;
    ChatStore(ChatStore&&) = default;
    ChatStore& operator=(ChatStore&&) = default;
    virtual ~ChatStore() = default;

    // Called once, before all other calls. A store with threads of its own posts its results to the mailbox.
    virtual void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) = 0;
    // Keeps the entry. An amendment also changes its message; `react` adds a reaction, or takes it back if the author
    // has reacted with that emoji before. One call of the listener follows.
    virtual void append(ChatEntry entry) = 0;
    // Delivers the entry without keeping it. A store of several hubs also applies it to a PresenceTable.
    virtual void forward(const ChatEntry& entry) = 0;
    // Reads all entries after a position, if there are at most `limit`. Otherwise, and without a position, the newest
    // messages and topics, at most `limit`; what amendments have changed is in the messages.
    virtual void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
                       PageCallback callback) = 0;
    // Reads the newest messages and topics with ids below this one, at most `limit`.
    virtual void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) = 0;
    // Keeps a fact in place of the one with the same scope and key, unless ChatFact::if_new. on_fact() or
    // on_fact_failure() follows.
    virtual void put(ChatFact fact) = 0;
    // Reads the facts of a scope whose keys begin with the prefix, in order, without those that have expired.
    virtual void facts(const std::string& scope, const std::string& key_prefix, FactsCallback callback) = 0;

    // The words of a search in lower case, at most eight.
    static std::vector<std::string> search_words(std::string_view text) {
        std::vector<std::string> words;
        while (!text.empty() && words.size() < 8) {
            const std::string_view word = text::consume_until(text, ' ');
            if (!word.empty()) words.push_back(text::to_lower(word));
        }
        return words;
    }

    // The rest is optional. By default the answer is the error "this store cannot do that".

    // Reads the newest messages that contain words with these beginnings, at most `limit`.
    virtual void search(const std::string& /*room*/, const std::string& /*words*/, std::size_t /*limit*/,
                        PageCallback callback) {
        HistoryPage page;
        page.error = cannot;
        callback(std::move(page));
    }
    // Removes everything that an author has written, in all rooms, and the facts that belong to the author. The
    // listener gets a `remove` entry for each message, and each fact with an empty value. The callback gets the number
    // of messages.
    virtual void erase_author(const std::string& /*author*/, EraseCallback callback) { callback(0, cannot); }
    // Reads the history of a room in parts, as JSON lines, until the callback returns false.
    virtual void export_room(const std::string& /*room*/, ExportCallback callback) { callback({"", true, cannot}); }

    // A store of several hubs has the next four. By default a store has one hub, which knows its users itself.

    // This hub needs the entries of a room until unwatch(). Conversations (names that begin with a line feed) and
    // entries without a room come to all hubs. True: on_presence() follows, if possible before the answers to later
    // reads of the room. False: this hub alone has users in the room.
    virtual bool watch(const std::string& /*room*/) { return false; }
    virtual void unwatch(const std::string& /*room*/) {}
    // Each hub calls it every two seconds. Of a hub that has not called it for eight seconds, the store removes the
    // users, and all other hubs get a `leave` for each. If that hub lives, it gets on_presence() for its rooms.
    virtual void beat(const std::string& /*hub*/) {}
    // Reads which rooms have users, at most `limit`, in the order of their names. False, and no call: this hub alone
    // has users.
    virtual bool rooms(std::size_t /*limit*/, RoomsCallback /*callback*/) { return false; }

private:
    static constexpr const char* cannot = "this store cannot do that";
};

// The limits of a history. Zero: no limit.
struct HistoryLimits {
    std::size_t max_entries = 1000;                  // of a room
    std::size_t max_bytes = 1024 * 1024;             // of a room
    Duration max_age = std::chrono::hours(168);      // of an entry
    std::size_t max_rooms = 1000;                    // above it, the least recently used room is deleted
    std::size_t max_total_bytes = 64 * 1024 * 1024;  // of all rooms; above it, the same
    std::size_t max_facts = 100'000;                 // above it, a new fact is refused
    std::size_t max_reactions = 500;                 // of a message; above it, a new reaction is refused

    static bool exceeds(std::size_t value, std::size_t limit) { return limit != 0 && value > limit; }
};

namespace detail {

// The history of one room in memory. Its ids have no holes.
class RoomHistory {
public:
    // The first entry gets the id `last_id` + 1.
    explicit RoomHistory(std::uint64_t last_id) : last_id_(last_id) {}

    // The id of the entry with the same author and tag, or 0.
    std::uint64_t find(const ChatEntry& entry) const {
        const Record* record = entry.tag.empty() ? nullptr : tags_.find(tag_key(entry));
        return record == nullptr ? 0 : record->entry.id;
    }
    std::uint64_t append(const ChatEntry& entry, const HistoryLimits& limits, Time now) {
        const std::string key = big_endian_key(last_id_ + 1);
        Record& record = records_.find_or_emplace(key, entry, now);
        try {
            if (!entry.tag.empty()) tags_.insert_reference(tag_key(entry), record);
        } catch (...) {
            records_.erase(key);
            throw;
        }
        record.entry.room.clear();
        record.entry.id = ++last_id_;
        bytes_ += record.bytes = entry.bytes();
        trim(limits, now);
        return last_id_;
    }
    // Changes the message of an amendment that append() keeps next. The result says why it is refused.
    std::string_view amend(ChatEntry& amendment, const HistoryLimits& limits) {
        Record* target = record(amendment.target);
        const auto code = ChatEntry::refuse_amendment(amendment, target == nullptr ? nullptr : &target->entry);
        if (!code.empty()) return code;
        if (amendment.kind == ChatEntry::Kind::edit) edit(*target, amendment);
        else if (amendment.kind == ChatEntry::Kind::remove) remove(*target);
        else if (!react(*target, amendment, limits.max_reactions)) return "refused";
        resize(*target);
        return {};
    }

    // Without an id, or with one of another history, the newest messages.
    HistoryPage since(std::optional<std::uint64_t> id, std::size_t limit, const HistoryLimits& limits, Time now) {
        trim(limits, now);
        const std::uint64_t before_first = last_id_ - records_.size();
        const bool complete = id && *id <= last_id_ && *id >= before_first && last_id_ - *id <= limit;
        HistoryPage page;
        if (complete) {
            for (std::uint64_t next = *id; next != last_id_;) page.entries.push_back(record(++next)->entry);
            page.more = *id != before_first;
        } else {
            page = before(last_id_ + 1, limit, limits, now);
            page.gap = id.has_value();
        }
        page.last_id = last_id_;
        return page;
    }
    HistoryPage before(std::uint64_t id, std::size_t limit, const HistoryLimits& limits, Time now) {
        return select(id, limit, limits, now, [](const ChatEntry& entry) { return !entry.is_amendment(); });
    }
    HistoryPage search(const std::vector<std::string>& words, std::size_t limit, const HistoryLimits& limits,
                       Time now) {
        return select(last_id_ + 1, limit, limits, now, [&](const ChatEntry& entry) {
            if (!entry.is_message() || entry.removed || words.empty()) return false;
            const std::string text = text::to_lower(entry.text);
            return std::all_of(words.begin(), words.end(),
                               [&](const std::string& word) { return text.find(word) != std::string::npos; });
        });
    }
    // Removes everything of an author. The result has the amendments that say so, which are not kept yet.
    std::vector<ChatEntry> erase(const std::string& author) {
        std::vector<ChatEntry> amendments;
        for (const auto& [key, record] : records_) {
            erase_reactions(record, author, amendments);
            if (record.entry.author == author) erase_entry(record, amendments);
            resize(record);
        }
        return amendments;
    }
    template <class Visit>
    void for_each(Visit&& visit) const {
        for (const auto& [key, record] : records_) visit(record.entry);
    }

    std::size_t size() const { return records_.size(); }
    std::size_t bytes() const { return bytes_; }
    std::uint64_t last_id() const { return last_id_; }
    std::string use_key{};  // of the room in the order of use

private:
    struct Record {
        Record(const ChatEntry& kept, Time kept_at) : entry(kept), time(kept_at) {}
        ChatEntry entry;
        Time time;
        std::size_t bytes = 0;
        std::vector<std::uint64_t> edits{};  // the ids of the edits of a message
    };
    static std::string tag_key(const ChatEntry& entry) { return text::concat({entry.author, "\n", entry.tag}); }
    Record* record(std::uint64_t id) const { return records_.find(big_endian_key(id)); }

    void resize(Record& record) {
        const std::size_t bytes = record.entry.bytes() + 8 * record.edits.size();
        bytes_ += bytes - std::exchange(record.bytes, bytes);
    }
    // No entry keeps an older text of the message.
    void edit(Record& target, const ChatEntry& amendment) {
        target.entry.text = amendment.text;
        if (!amendment.data.empty()) target.entry.data = amendment.data;
        target.entry.edited = amendment.time;
        target.edits.push_back(last_id_ + 1);
        for (const std::uint64_t id : target.edits) {
            Record* const older = record(id);
            if (older == nullptr) continue;
            older->entry.text = amendment.text;
            resize(*older);
        }
    }
    void remove(Record& target) {
        target.entry.removed = true;
        target.entry.text.clear();
        target.entry.data.clear();
        target.entry.reactions.clear();
        for (const std::uint64_t id : target.edits) {
            Record* const edit = record(id);
            if (edit == nullptr) continue;
            edit->entry.kind = ChatEntry::Kind::remove;
            edit->entry.text.clear();
            edit->entry.data.clear();
            resize(*edit);
        }
        target.edits.clear();
    }
    // False if the message has too many reactions.
    static bool react(Record& target, ChatEntry& amendment, std::size_t max_reactions) {
        auto& all = target.entry.reactions;
        const auto same = std::find_if(all.begin(), all.end(), [&](const ChatEntry::Reaction& reaction) {
            return reaction.author == amendment.author && reaction.emoji == amendment.text;
        });
        amendment.removed = same != all.end();
        if (amendment.removed) all.erase(same);
        else if (HistoryLimits::exceeds(all.size() + 1, max_reactions)) return false;
        else all.push_back({amendment.text, amendment.user, amendment.name, amendment.author});
        return true;
    }
    static void erase_reactions(Record& record, const std::string& author, std::vector<ChatEntry>& amendments) {
        auto& all = record.entry.reactions;
        for (auto at = all.begin(); at != all.end();) {
            if (at->author != author) {
                ++at;
                continue;
            }
            ChatEntry amendment;
            amendment.kind = ChatEntry::Kind::react;
            amendment.target = record.entry.id;
            amendment.user = at->user;
            amendment.text = at->emoji;
            amendment.removed = true;
            amendments.push_back(std::move(amendment));
            at = all.erase(at);
        }
    }
    void erase_entry(Record& record, std::vector<ChatEntry>& amendments) {
        ChatEntry& entry = record.entry;
        if (!entry.tag.empty()) tags_.erase(tag_key(entry));
        if (entry.is_message() && !entry.removed) {
            remove(record);
            ChatEntry amendment;
            amendment.kind = ChatEntry::Kind::remove;
            amendment.target = entry.id;
            amendments.push_back(std::move(amendment));
        }
        if (entry.kind != ChatEntry::Kind::react) entry.user.clear();  // clients find a reaction by its user
        for (std::string* field : {&entry.name, &entry.author, &entry.tag}) field->clear();
    }

    template <class Predicate>
    HistoryPage select(std::uint64_t id, std::size_t limit, const HistoryLimits& limits, Time now,
                       Predicate&& predicate) {
        trim(limits, now);
        HistoryPage page;
        page.last_id = last_id_;
        const std::uint64_t before_first = last_id_ - records_.size();
        for (std::uint64_t at = (std::min)(id, last_id_ + 1); at > before_first + 1 && !page.more;) {
            const ChatEntry& entry = record(--at)->entry;
            if (!predicate(entry)) continue;
            if (page.entries.size() == limit) page.more = true;
            else page.entries.push_back(entry);
        }
        std::reverse(page.entries.begin(), page.entries.end());
        return page;
    }

    void trim(const HistoryLimits& limits, Time now) {
        while (!records_.empty()) {
            const Record& oldest = records_.front();
            const bool expired =
                limits.max_age != Duration::zero() && saturating_add(oldest.time, limits.max_age) <= now;
            if (!expired && !HistoryLimits::exceeds(records_.size(), limits.max_entries) &&
                !HistoryLimits::exceeds(bytes_, limits.max_bytes))
                return;
            bytes_ -= oldest.bytes;
            if (!oldest.entry.tag.empty()) tags_.erase(tag_key(oldest.entry));
            records_.erase(big_endian_key(oldest.entry.id));
        }
    }

    StringMap<Record> records_;  // by id
    StringMap<Record> tags_;     // by author and tag
    std::uint64_t last_id_;
    std::size_t bytes_ = 0;
};

// A token that no other opening of a store has.
inline std::string new_epoch() {
    static std::atomic<std::uint64_t> openings{0};
    const auto wall = std::chrono::system_clock::now().time_since_epoch().count();
    const auto digest = sha1(
        text::concat({std::to_string(wall), " ", std::to_string(Clock::now().time_since_epoch().count()), " ",
                      std::to_string(reinterpret_cast<std::uintptr_t>(&wall)), " ",
                      std::to_string(reinterpret_cast<std::uintptr_t>(&openings)), " ", std::to_string(++openings)}));
    std::string epoch;
    for (std::size_t i = 0; i < HistoryPosition::epoch_size / 2; ++i)
        for (const unsigned shift : {4u, 0u})
            epoch += "0123456789abcdef"[(static_cast<unsigned>(digest[i]) >> shift) & 15];
    return epoch;
}

}  // namespace detail

// The default store: a history in memory, which ends with the server.
class MemoryHistory final : public ChatStore {
public:
    explicit MemoryHistory(const HistoryLimits& limits = {}) : limits_(limits) {}

    void attach(Listener& listener, std::shared_ptr<Mailbox>) override { listener_ = &listener; }
    void append(ChatEntry entry) override {
        if (!entry.kept()) return listener_->on_entry(entry);
        if (detail::RoomHistory* history = histories_.find(entry.room)) {
            entry.id = history->find(entry);
            if (entry.id != 0) return listener_->on_duplicate(entry);
        }
        if (entry.is_amendment()) {
            const std::string_view code = amend(entry);
            if (!code.empty()) return listener_->on_refused(entry, code);
        }
        keep(entry);
        listener_->on_entry(entry);
    }
    void forward(const ChatEntry& entry) override { listener_->on_entry(entry); }

    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        std::optional<std::uint64_t> id;
        if (position) id = position->epoch == epoch_ ? position->id : HistoryPosition::max_id + 1;
        callback(read(
            room, [&](detail::RoomHistory& history) { return history.since(id, limit, limits_, listener_->now()); }));
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        callback(read(
            room, [&](detail::RoomHistory& history) { return history.before(id, limit, limits_, listener_->now()); }));
    }
    void search(const std::string& room, const std::string& words, std::size_t limit, PageCallback callback) override {
        callback(read(room, [&](detail::RoomHistory& history) {
            return history.search(search_words(words), limit, limits_, listener_->now());
        }));
    }

    void put(ChatFact fact) override {
        const std::string key = text::concat({fact.scope, "\n", fact.key});
        if (const ChatFact* older = facts_.find(key); older != nullptr && fact.if_new) {
            fact = *older;
        } else if (fact.value.empty()) {
            facts_.erase(key);
        } else {
            if (facts_.find(key) == nullptr && HistoryLimits::exceeds(facts_.size() + 1, limits_.max_facts))
                prune_facts();
            if (facts_.find(key) == nullptr && HistoryLimits::exceeds(facts_.size() + 1, limits_.max_facts))
                return listener_->on_fact_failure(fact, "too many facts");
            facts_.find_or_emplace(key) = fact;
        }
        listener_->on_fact(fact);
    }
    void facts(const std::string& scope, const std::string& key_prefix, FactsCallback callback) override {
        const std::string prefix = text::concat({scope, "\n", key_prefix});
        const std::int64_t now = unix_ms();
        std::vector<ChatFact> found;
        for (const auto& [key, fact] : facts_)
            if (text::starts_with(key, prefix) && (fact.expires == 0 || fact.expires > now)) found.push_back(fact);
        callback(std::move(found), "");
    }

    void erase_author(const std::string& author, EraseCallback callback) override {
        if (author.empty()) return callback(0, "");
        std::vector<ChatEntry> amendments;
        for (const auto& [room, history] : histories_) {
            for (ChatEntry& amendment :
                 update(history, [erased = &history, &author] { return erased->erase(author); })) {
                amendment.room = room;
                amendments.push_back(std::move(amendment));
            }
        }
        std::vector<ChatFact> deleted;
        for (const auto& [key, fact] : facts_)
            if (fact.author == author) deleted.push_back(fact);
        facts_.erase_if([&](const ChatFact& fact) { return fact.author == author; });
        std::size_t messages = 0;
        for (ChatEntry& amendment : amendments) {
            amendment.time = unix_ms();
            if (amendment.kind == ChatEntry::Kind::remove) ++messages;
            keep(amendment);
        }
        for (const ChatEntry& amendment : amendments) listener_->on_entry(amendment);
        for (ChatFact& fact : deleted) {
            fact.value.clear();
            listener_->on_fact(fact);
        }
        callback(messages, "");
    }
    void export_room(const std::string& room, ExportCallback callback) override {
        HistoryExport all;
        all.end = true;
        if (const detail::RoomHistory* history = histories_.find(room))
            history->for_each([&](const ChatEntry& entry) { all.lines += entry.to_json_line(room); });
        callback(std::move(all));
    }

private:
    // Runs `work` on the history and updates the total of bytes.
    template <class Work>
    auto update(const detail::RoomHistory& history, Work&& work) -> decltype(work()) {
        const std::size_t before = history.bytes();
        auto result = work();
        bytes_ += history.bytes() - before;
        return result;
    }
    std::string_view amend(ChatEntry& entry) {
        detail::RoomHistory* history = histories_.find(entry.room);
        if (history == nullptr) return "bad_id";
        return update(*history, [&] { return history->amend(entry, limits_); });
    }
    void keep(ChatEntry& entry) {
        if (histories_.find(entry.room) == nullptr && HistoryLimits::exceeds(histories_.size() + 1, limits_.max_rooms))
            evict_oldest();
        detail::RoomHistory& history = histories_.find_or_emplace(entry.room, deleted_id_);
        std::string use_key = big_endian_key(++uses_);
        by_use_.find_or_emplace(use_key, entry.room);
        by_use_.erase(std::exchange(history.use_key, std::move(use_key)));
        entry.id = update(history, [&] { return history.append(entry, limits_, listener_->now()); });
        while (HistoryLimits::exceeds(bytes_, limits_.max_total_bytes) && by_use_.size() > 1) evict_oldest();
    }
    template <class Read>
    HistoryPage read(const std::string& room, Read&& work) {
        detail::RoomHistory no_history(deleted_id_);
        detail::RoomHistory* history = histories_.find(room);
        if (history == nullptr) history = &no_history;
        HistoryPage page = update(*history, [&] { return work(*history); });
        page.epoch = epoch_;
        return page;
    }
    void evict_oldest() {
        if (by_use_.empty()) return;
        const std::string room = by_use_.front();
        const detail::RoomHistory& history = *histories_.find(room);
        bytes_ -= history.bytes();
        deleted_id_ = (std::max)(deleted_id_, history.last_id());
        by_use_.erase(history.use_key);
        histories_.erase(room);
    }
    void prune_facts() {
        facts_.erase_if([now = unix_ms()](const ChatFact& fact) { return fact.expires != 0 && fact.expires <= now; });
    }

    HistoryLimits limits_;
    Listener* listener_ = nullptr;
    std::string epoch_ = detail::new_epoch();
    StringMap<detail::RoomHistory> histories_;  // by room
    StringMap<std::string> by_use_;             // the rooms, in the order of their last entries
    StringMap<ChatFact> facts_;                 // by scope and key
    std::uint64_t uses_ = 0;
    std::size_t bytes_ = 0;
    std::uint64_t deleted_id_ = 0;  // the largest id of all deleted rooms: ids are not used again
};

// ---- text, lines and JSON ------------------------------------------------------------------------------------------

namespace detail {

// Whether a character is invisible: C0, C1 and DEL. With `formats` also characters that join, reverse or hide others,
// and that look like a space or like nothing: Unicode's Default_Ignorable_Code_Point, all spaces except U+0020, line
// separators, the blank Braille pattern, interlinear annotations.
inline bool is_invisible(char32_t c, bool formats) {
    if (c < 0x20 || (c >= 0x7F && c < 0xA0)) return true;
    if (!formats || c < 0xA0) return false;
    constexpr struct {
        char32_t first, last;
    } ranges[] = {{0xA0, 0xA0},      {0xAD, 0xAD},     {0x34F, 0x34F},   {0x61C, 0x61C},     {0x115F, 0x1160},
                  {0x1680, 0x1680},  {0x17B4, 0x17B5}, {0x180B, 0x180F}, {0x2000, 0x200F},   {0x2028, 0x202F},
                  {0x205F, 0x206F},  {0x2800, 0x2800}, {0x3000, 0x3000}, {0x3164, 0x3164},   {0xFE00, 0xFE0F},
                  {0xFEFF, 0xFEFF},  {0xFFA0, 0xFFA0}, {0xFFF0, 0xFFFC}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
                  {0xE0000, 0xE0FFF}};
    for (const auto& range : ranges)
        if (c >= range.first && c <= range.last) return true;
    return false;
}

// Unicode's White_Space, and the zero width space U+200B.
inline bool is_white_space(char32_t c) {
    return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200B) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// Removes the first character of a valid UTF-8 text, which is not empty.
inline char32_t take_character(std::string_view& text) {
    const auto lead = static_cast<unsigned char>(text[0]);
    const std::size_t size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    char32_t c = size == 1 ? lead : lead & (0xFFu >> (size + 1));
    for (std::size_t k = 1; k < size; ++k) c = c << 6 | (static_cast<unsigned char>(text[k]) & 0x3Fu);
    text.remove_prefix(size);
    return c;
}
// Whether the predicate is true for each character of a valid UTF-8 text.
template <class Predicate>
bool all_characters(std::string_view text, Predicate&& predicate) {
    while (!text.empty())
        if (!predicate(take_character(text))) return false;
    return true;
}
WSCHAT_NOINLINE inline void append_character(std::string& text, char32_t c) {
    const auto add = [&text](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (c < 0x80) return add(c);
    if (c >= 0x10000) add(0xF0 | c >> 18);
    if (c >= 0x800) add((c >= 0x10000 ? 0x80 : 0xE0) | (c >> 12 & (c >= 0x10000 ? 0x3F : 0x0F)));
    add((c >= 0x800 ? 0x80 : 0xC0) | (c >> 6 & (c >= 0x800 ? 0x3F : 0x1F)));
    add(0x80 | (c & 0x3F));
}

// Letters with marks, and the letter without the mark. In each range all letters have the same base.
inline char32_t latin_base(char32_t c) {
    constexpr struct {
        char32_t first, last;
        char letter;
    } ranges[] = {{0xC0, 0xC5, 'a'},     {0xC7, 0xC7, 'c'},     {0xC8, 0xCB, 'e'},     {0xCC, 0xCF, 'i'},
                  {0xD1, 0xD1, 'n'},     {0xD2, 0xD6, 'o'},     {0xD8, 0xD8, 'o'},     {0xD9, 0xDC, 'u'},
                  {0xDD, 0xDD, 'y'},     {0xE0, 0xE5, 'a'},     {0xE7, 0xE7, 'c'},     {0xE8, 0xEB, 'e'},
                  {0xEC, 0xEF, 'i'},     {0xF1, 0xF1, 'n'},     {0xF2, 0xF6, 'o'},     {0xF8, 0xF8, 'o'},
                  {0xF9, 0xFC, 'u'},     {0xFD, 0xFD, 'y'},     {0xFF, 0xFF, 'y'},     {0x100, 0x105, 'a'},
                  {0x106, 0x10D, 'c'},   {0x10E, 0x111, 'd'},   {0x112, 0x11B, 'e'},   {0x11C, 0x123, 'g'},
                  {0x124, 0x127, 'h'},   {0x128, 0x131, 'i'},   {0x134, 0x135, 'j'},   {0x136, 0x138, 'k'},
                  {0x139, 0x142, 'l'},   {0x143, 0x149, 'n'},   {0x14C, 0x151, 'o'},   {0x154, 0x159, 'r'},
                  {0x15A, 0x161, 's'},   {0x162, 0x167, 't'},   {0x168, 0x173, 'u'},   {0x174, 0x175, 'w'},
                  {0x176, 0x178, 'y'},   {0x179, 0x17E, 'z'},   {0x17F, 0x17F, 's'},   {0x1A0, 0x1A1, 'o'},
                  {0x1AF, 0x1B0, 'u'},   {0x218, 0x219, 's'},   {0x21A, 0x21B, 't'},   {0x1E00, 0x1E01, 'a'},
                  {0x1E02, 0x1E07, 'b'}, {0x1E08, 0x1E09, 'c'}, {0x1E0A, 0x1E13, 'd'}, {0x1E14, 0x1E1D, 'e'},
                  {0x1E1E, 0x1E1F, 'f'}, {0x1E20, 0x1E21, 'g'}, {0x1E22, 0x1E2B, 'h'}, {0x1E2C, 0x1E2F, 'i'},
                  {0x1E30, 0x1E35, 'k'}, {0x1E36, 0x1E3D, 'l'}, {0x1E3E, 0x1E43, 'm'}, {0x1E44, 0x1E4B, 'n'},
                  {0x1E4C, 0x1E53, 'o'}, {0x1E54, 0x1E57, 'p'}, {0x1E58, 0x1E5F, 'r'}, {0x1E60, 0x1E69, 's'},
                  {0x1E6A, 0x1E71, 't'}, {0x1E72, 0x1E7B, 'u'}, {0x1E7C, 0x1E7F, 'v'}, {0x1E80, 0x1E89, 'w'},
                  {0x1E8A, 0x1E8D, 'x'}, {0x1E8E, 0x1E8F, 'y'}, {0x1E90, 0x1E95, 'z'}, {0x1EA0, 0x1EB7, 'a'},
                  {0x1EB8, 0x1EC7, 'e'}, {0x1EC8, 0x1ECB, 'i'}, {0x1ECC, 0x1EE3, 'o'}, {0x1EE4, 0x1EF1, 'u'},
                  {0x1EF2, 0x1EF9, 'y'}};
    for (const auto& range : ranges)
        if (c >= range.first && c <= range.last) return static_cast<unsigned char>(range.letter);
    return c;
}

// The small letter, for ASCII, Greek and Cyrillic, and for the Latin letters that latin_base() does not know.
inline char32_t small_letter(char32_t c) {
    if ((c >= 'A' && c <= 'Z') || (c >= 0xC0 && c <= 0xDE && c != 0xD7)) return c + 0x20;
    if (c == 0x132 || c == 0x14A || c == 0x152) return c + 1;
    if ((c >= 0x391 && c <= 0x3A9) || (c >= 0x410 && c <= 0x42F)) return c + 0x20;
    if (c >= 0x400 && c <= 0x40F) return c + 0x50;
    if (c >= 0x460 && c <= 0x4BF && c % 2 == 0 && !(c >= 0x482 && c <= 0x489)) return c + 1;
    return c;
}

// The small Latin letter that a small Greek or Cyrillic letter resembles, itself or as a capital. Greek letters and
// some Cyrillic ones lose their marks.
inline char32_t latin_twin(char32_t c) {
    constexpr struct {
        char32_t letter, twin;
    } pairs[] = {{0x3AC, 'a'},   {0x3AD, 'e'},   {0x3AE, 'h'},   {0x3AF, 'i'}, {0x3B1, 'a'}, {0x3B2, 'b'}, {0x3B5, 'e'},
                 {0x3B6, 'z'},   {0x3B7, 'h'},   {0x3B9, 'i'},   {0x3BA, 'k'}, {0x3BC, 'm'}, {0x3BD, 'n'}, {0x3BF, 'o'},
                 {0x3C1, 'p'},   {0x3C4, 't'},   {0x3C5, 'y'},   {0x3C7, 'x'}, {0x3CA, 'i'}, {0x3CB, 'y'}, {0x3CC, 'o'},
                 {0x3CD, 'y'},   {0x3CE, 0x3C9}, {0x3C2, 0x3C3}, {0x386, 'a'}, {0x388, 'e'}, {0x389, 'h'}, {0x38A, 'i'},
                 {0x38C, 'o'},   {0x38E, 'y'},   {0x38F, 0x3C9}, {0x430, 'a'}, {0x432, 'b'}, {0x435, 'e'}, {0x43A, 'k'},
                 {0x43C, 'm'},   {0x43D, 'h'},   {0x43E, 'o'},   {0x440, 'p'}, {0x441, 'c'}, {0x442, 't'}, {0x443, 'y'},
                 {0x445, 'x'},   {0x450, 'e'},   {0x451, 'e'},   {0x455, 's'}, {0x456, 'i'}, {0x457, 'i'}, {0x458, 'j'},
                 {0x439, 0x438}, {0x45D, 0x438}, {0x4CF, 'l'},   {0x501, 'd'}, {0x51B, 'q'}, {0x51D, 'w'}};
    for (const auto& pair : pairs)
        if (pair.letter == c) return pair.twin;
    return c;
}

// Marks that stand over, under or through the letter before them.
inline bool is_combining_mark(char32_t c) {
    return (c >= 0x300 && c <= 0x36F) || (c >= 0x1AB0 && c <= 0x1AFF) || (c >= 0x1DC0 && c <= 0x1DFF) ||
           (c >= 0x20D0 && c <= 0x20FF) || (c >= 0xFE20 && c <= 0xFE2F);
}

#if WSCHAT_UTF8PROC
// Unicode's NFKC with full case folding, without what is ignorable.
inline std::string normal_form(std::string_view text) {
    utf8proc_uint8_t* mapped = nullptr;
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPAT | UTF8PROC_COMPOSE |
                                                        UTF8PROC_CASEFOLD | UTF8PROC_IGNORE);
    const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                   static_cast<utf8proc_ssize_t>(text.size()), &mapped, options);
    const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(mapped, std::free);
    if (size < 0) return std::string(text);
    return std::string(reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(size));
}
#endif

}  // namespace detail

// The form in which the chat compares names: two names that look alike have the same one. Case, marks of Latin letters,
// invisible characters and the width of a letter do not count, and Greek and Cyrillic letters equal the Latin ones that
// they resemble. With WSCHAT_UTF8PROC that holds for the case and the forms of all scripts, and a letter is another one
// with a mark. A text that is not UTF-8 stays as it is.
inline std::string chat_fold(std::string_view name) {
    if (!valid_utf8(name)) return std::string(name);
    std::string folded;
#if WSCHAT_UTF8PROC
    const std::string normal = detail::normal_form(name);
    name = normal;
#endif
    while (!name.empty()) {
        char32_t c = detail::take_character(name);
        if (c >= 0xFF01 && c <= 0xFF5E) c -= 0xFEE0;  // full width
        if (detail::is_white_space(c) && c != 0x200B) c = ' ';
        if (c >= 0x80 && detail::is_invisible(c, true)) continue;
#if !WSCHAT_UTF8PROC
        if (detail::is_combining_mark(c)) continue;
        c = detail::latin_base(c);
#endif
        detail::append_character(folded, detail::latin_twin(detail::small_letter(c)));
    }
    return folded;
}

namespace detail {

// Names of users and rooms: 1 to `max` bytes of visible characters, no space at either end, no two spaces in a row. A
// space is U+0020 or U+3000. Joiners (U+200C, U+200D) stand between two characters, as in Persian names and in emoji,
// and the variation selector U+FE0F after one.
inline bool valid_chat_name(std::string_view name, std::size_t max) {
    if (name.empty() || name.size() > max || !valid_utf8(name)) return false;
    bool expects_visible = true;
    const bool valid = all_characters(name, [&](char32_t c) {
        const bool joins = c == ' ' || c == 0x3000 || c == 0x200C || c == 0x200D;
        if (joins || c == 0xFE0F) return !std::exchange(expects_visible, joins);
        expects_visible = false;
        return !is_invisible(c, true);
    });
    return valid && !expects_visible && !chat_fold(name).empty();
}
// Messages: no control characters except line feeds and tabs.
inline bool valid_chat_text(std::string_view text) {
    return valid_utf8(text) &&
           all_characters(text, [](char32_t c) { return c == '\n' || c == '\t' || !is_invisible(c, false); });
}

// A line of a client. "/me waves" is the command "me"; "hello" and "//hello" are said, the second with one slash. In
// "/tag TAG LINE" the line has a tag, which the answer repeats.
struct ChatLine {
    std::string_view tag;
    std::string_view command;  // empty: the line is said
    std::string_view rest;

    static ChatLine parse(std::string_view line) {
        ChatLine parsed;
        if (text::starts_with(line, "/tag ")) {
            line.remove_prefix(5);
            parsed.tag = text::consume_until(line, ' ');
        }
        const bool is_command = text::starts_with(line, "/") && !text::starts_with(line, "//");
        if (text::starts_with(line, "/")) line.remove_prefix(1);
        if (is_command) parsed.command = text::consume_until(line, ' ');
        if (is_command && parsed.command.empty()) parsed.command = "/";
        parsed.rest = line;
        return parsed;
    }
    // 1 to 64 visible ASCII characters.
    static bool valid_tag(std::string_view tag) {
        return !tag.empty() && tag.size() <= 64 && text::all_of(tag, [](char c) { return c > ' ' && c < 0x7F; });
    }
};

// The bytes of a text in base64url without padding (RFC 4648 5). Empty if it has other characters.
inline std::string base64url_decode(std::string_view text) {
    constexpr std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    std::string bytes;
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const std::size_t value = alphabet.find(text[i]);
        if (value == std::string_view::npos) return {};
        bits = (bits << 6 | static_cast<std::uint32_t>(value)) & 0xFFFFFF;
        // Characters 2, 3 and 4 of a group each complete a byte, with 4, 2 and 0 bits left.
        if (i % 4 != 0) bytes += static_cast<char>(bits >> (6 - i % 4 * 2) & 0xFF);
    }
    return bytes;
}

// Removes a token from the front of the text. False if the text does not begin with it.
WSCHAT_NOINLINE inline bool consume(std::string_view& text, std::string_view token) {
    const bool found = text::starts_with(text, token);
    if (found) text.remove_prefix(token.size());
    return found;
}
// Removes all characters of a set from the front of the text. False if there is none.
WSCHAT_NOINLINE inline bool consume_all(std::string_view& text, std::string_view set) {
    const std::size_t size = (std::min)(text.find_first_not_of(set), text.size());
    text.remove_prefix(size);
    return size != 0;
}

inline bool consume_json_string(std::string_view& text) {
    if (!consume(text, "\"")) return false;
    while (!text.empty() && static_cast<unsigned char>(text.front()) >= 0x20) {
        if (consume(text, "\"")) return true;
        const std::size_t size = text.front() != '\\' ? 1 : text.substr(1, 1) == "u" ? 6 : 2;
        const std::string_view escape = text.substr(0, size).substr(size == 6 ? 2 : 1);
        const char* const allowed = size == 6 ? "0123456789abcdefABCDEF" : "\"\\/bfnrt";
        if (text.size() < size || escape.find_first_not_of(allowed) != std::string_view::npos) return false;
        text.remove_prefix(size);
    }
    return false;
}

// Removes a JSON value (RFC 8259) and the white space around it from the front of the text. False if it is invalid, or
// has more than 32 levels of arrays and objects.
inline bool consume_json(std::string_view& text, unsigned depth = 0) {
    constexpr std::string_view space = " \t\r\n", digits = "0123456789";
    consume_all(text, space);
    if (const bool object = consume(text, "{"); object || consume(text, "[")) {
        const std::string_view end = object ? "}" : "]";
        consume_all(text, space);
        if (depth == 32) return false;
        if (!consume(text, end)) {
            do {
                consume_all(text, space);
                if (object && !(consume_json_string(text) && (consume_all(text, space), consume(text, ":"))))
                    return false;
                if (!consume_json(text, depth + 1)) return false;
            } while (consume(text, ","));
            if (!consume(text, end)) return false;
        }
    } else if (text::starts_with(text, "\"")) {
        if (!consume_json_string(text)) return false;
    } else if (!consume(text, "true") && !consume(text, "false") && !consume(text, "null")) {
        consume(text, "-");
        if (!consume(text, "0") && !consume_all(text, digits)) return false;
        if (consume(text, ".") && !consume_all(text, digits)) return false;
        if (consume(text, "e") || consume(text, "E")) {
            if (!consume(text, "+")) consume(text, "-");
            if (!consume_all(text, digits)) return false;
        }
    }
    consume_all(text, space);
    return true;
}

inline bool valid_json(std::string_view text) { return valid_utf8(text) && consume_json(text) && text.empty(); }

}  // namespace detail

namespace detail {

// RFC 2104 with SHA-1.
inline std::array<unsigned char, 20> hmac_sha1(std::string_view key, std::string_view message) {
    std::string block(key);
    if (key.size() > 64) {
        const auto digest = sha1(key);
        block.assign(digest.begin(), digest.end());
    }
    block.resize(64);
    std::string inner = block, outer = block;
    for (char& c : inner) c = static_cast<char>(c ^ 0x36);
    for (char& c : outer) c = static_cast<char>(c ^ 0x5C);
    const auto digest = sha1(inner.append(message));
    return sha1(outer.append(digest.begin(), digest.end()));
}

}  // namespace detail

// An event for clients: one JSON object, field by field. README.md lists all events.
class ChatEvent {
public:
    WSCHAT_NOINLINE explicit ChatEvent(std::string_view type) { add_text("type", type); }
    ChatEvent& add(std::string_view name, const Json& value) { return add_json(name, value.dump()); }
    // The same as add() with a text, but the caller makes no Json.
    WSCHAT_NOINLINE ChatEvent& add_text(std::string_view name, std::string_view text) {
        return add_json(name, Json(text).dump());
    }
    WSCHAT_NOINLINE ChatEvent& add_json(std::string_view name, std::string_view json) {
        if (text_.size() > 1) text_.back() = ',';
        (((text_ += Json(name).dump()) += ':') += json) += '}';
        return *this;
    }
    ChatEvent& add_unless_empty(std::string_view name, std::string_view value) {
        return value.empty() ? *this : add_text(name, value);
    }
    const std::string& dump() const { return text_; }

private:
    std::string text_ = "{";
};

namespace detail {

// A JSON array, element by element.
class JsonList {
public:
    WSCHAT_NOINLINE void add(std::string_view json) {
        text_.back() = size_++ == 0 ? '[' : ',';
        (text_ += json) += ']';
    }
    std::size_t size() const { return size_; }
    std::string_view dump() const { return size_ == 0 ? "[]" : std::string_view(text_); }

private:
    std::string text_ = "[";
    std::size_t size_ = 0;
};

}  // namespace detail

inline std::string ChatEntry::to_json_line(const std::string& of_room) const {
    static constexpr const char* kinds[] = {"said", "action", "edit", "remove", "react", "topic"};
    ChatEvent line(kept() ? kinds[static_cast<std::size_t>(kind)] : "");
    line.add_text("room", of_room).add("id", id);
    if (target != 0) line.add("target", target);
    line.add("time", time).add_text("name", name).add_unless_empty("user", user);
    line.add_unless_empty("author", author).add_text("text", text);
    if (!data.empty()) line.add_json("data", data);
    if (edited != 0) line.add("edited", edited);
    if (removed) line.add_json("removed", "true");
    detail::JsonList list;
    for (const Reaction& each : reactions)
        list.add(Json{{"emoji", each.emoji}, {"user", each.user}, {"name", each.name}, {"author", each.author}}.dump());
    if (list.size() != 0) line.add_json("reactions", list.dump());
    return line.dump() + "\n";
}

// ---- flood limits --------------------------------------------------------------------------------------------------

// How many messages and bytes a connection or an address may send.
struct FloodRates {
    Rate messages, bytes;
};

namespace detail {

class FloodLimiter {
public:
    // What is refused for its number is not charged for its bytes.
    bool take(std::size_t size, const FloodRates& rates, Time now) {
        return messages_.take(1, rates.messages, now) && bytes_.take(static_cast<double>(size), rates.bytes, now);
    }
    bool full(Time now) const { return messages_.full(now) && bytes_.full(now); }

private:
    TokenBucket messages_, bytes_;
};

// Decides about messages above the limit: a warning for the first, silence for the next ones, and after `patience` of
// them the connection is closed. The count restarts after ten seconds without such a message.
class FloodPolicy {
public:
    enum class Action : std::uint8_t { accept, warn, drop, close };

    Action decide(bool within_limit, unsigned patience, Time now) {
        const bool warned = std::exchange(warned_, !within_limit);
        if (within_limit) return Action::accept;
        if (saturating_add(last_, std::chrono::seconds(10)) <= now) count_ = 0;
        last_ = now;
        if (++count_ > patience) return Action::close;
        return warned ? Action::drop : Action::warn;
    }

private:
    unsigned count_ = 0;
    bool warned_ = false;
    Time last_{};
};

// Bans or mutes by key, with the name that they are known by. One that has ended counts as absent.
class Deadlines {
public:
    struct Deadline {
        Time end{};
        std::string name{};
    };

    bool active(std::string_view key, Time now) const {
        const Deadline* deadline = deadlines_.find(key);
        return deadline != nullptr && deadline->end > now;
    }
    // Zero if it is not active.
    Duration left(std::string_view key, Time now) const {
        const Deadline* deadline = deadlines_.find(key);
        return deadline == nullptr ? Duration::zero() : (std::max)(deadline->end - now, Duration::zero());
    }
    // Zero removes the key.
    WSCHAT_NOINLINE void set(const std::string& key, const std::string& name, Duration duration, Time now) {
        deadlines_.erase_if([now](const Deadline& deadline) { return deadline.end <= now; });
        if (duration > Duration::zero()) deadlines_.find_or_emplace(key) = {saturating_add(now, duration), name};
        else deadlines_.erase(key);
    }
    StringMap<Deadline>::Iterator begin() const { return deadlines_.begin(); }
    StringMap<Deadline>::Iterator end() const { return deadlines_.end(); }

private:
    StringMap<Deadline> deadlines_;
};

}  // namespace detail

// ---- presence ------------------------------------------------------------------------------------------------------

// A user as ChatHandler::authenticate() describes it.
struct ChatUser {
    std::string name{};
    std::string about{};   // a JSON value for everybody in the room, at most ChatLimits::max_about bytes; may be empty
    bool account = false;  // the name cannot be changed, and all connections with it are one user
    // Public. The same for all connections of an account or a key, also later; made by the chat.
    std::string id{};
};

namespace detail {

// The users of a room. A user joins with the first connection, and leaves when the last connection has been gone for
// the grace period. Names are unique in the room, compared by chat_fold().
class Presence {
public:
    struct User {
        ChatUser info;
        std::string identity;                   // connections with the same one are one user; empty: unknown
        std::vector<ChatHandler*> connections;  // empty in the grace period, and for remote users
        Time expires = (Time::max)();           // the end of the grace period
        bool remote = false;                    // connected to another server
        std::vector<std::string> tags{};        // of the latest private messages
    };

    // Null if nobody has the name.
    WSCHAT_NOINLINE User* find(std::string_view name) const { return users_.find(chat_fold(name)); }
    User* find_identity(const std::string& identity) const {
        return identity.empty() ? nullptr : identities_.find(identity);
    }
    // Ordered by name.
    StringMap<User>::Iterator begin() const { return users_.begin(); }
    StringMap<User>::Iterator end() const { return users_.end(); }
    std::vector<ChatUser> users() const {
        std::vector<ChatUser> list;
        for (const auto& [name, user] : users_) list.push_back(user.info);
        return list;
    }
    bool empty() const { return users_.empty(); }
    std::size_t size() const { return users_.size(); }
    std::size_t max_name = 40;  // of the names that free_name() makes

    // Adds a connection to the user with its identity, or to a new user with a free name; then `joined` is true.
    struct Connected {
        User& user;
        bool joined;
    };
    Connected connect(const ChatUser& info, const std::string& identity, ChatHandler* connection) {
        User* user = find_identity(identity);
        const bool joined = user == nullptr;
        if (joined) user = &add(info, identity);
        user->connections.push_back(connection);
        user->expires = (Time::max)();
        return {*user, joined};
    }
    // Adds a user without connections.
    User& add(ChatUser info, const std::string& identity) {
        info.name = free_name(info.name);
        const std::string key = chat_fold(info.name);
        longest_name_ = (std::max)(longest_name_, 3 * info.name.size());
        User& user = users_.find_or_emplace(key);
        try {
            user.identity = identity;
            user.connections.reserve(1);  // connect() must not fail after this
            if (!identity.empty()) identities_.insert_reference(identity, user);
        } catch (...) {
            users_.erase(key);
            throw;
        }
        user.info = std::move(info);
        return user;
    }

    // Removes a connection. After the last one the user is removed and destroyed: immediately if `at_once` (then the
    // result is true), else by expire().
    bool disconnect(User& user, ChatHandler* connection, Time expires, bool at_once) {
        detach(user, connection, expires);
        if (!user.connections.empty()) return false;
        if (at_once) remove(user);
        return at_once;
    }
    // Allocates nothing.
    static void detach(User& user, ChatHandler* connection, Time expires) {
        auto& all = user.connections;
        for (auto at = all.begin(); at != all.end(); ++at) {
            if (*at != connection) continue;
            all.erase(at);
            break;
        }
        if (all.empty()) user.expires = expires;
    }
    // Removes the users whose grace period is over, and returns them. `next` is the end of the next period.
    std::vector<ChatUser> expire(Time now, Time& next) {
        std::vector<ChatUser> expired;
        next = (Time::max)();
        for (const auto& [key, user] : users_) {
            if (user.expires <= now) expired.push_back(user.info);
            else next = (std::min)(next, user.expires);
        }
        for (const ChatUser& user : expired) remove(*find(user.name));
        return expired;
    }
    void remove(User& user) {
        const std::string key = chat_fold(user.info.name);
        if (!user.identity.empty()) identities_.erase(user.identity);
        users_.erase(key);
    }

    // False if another user has the name.
    bool rename(User& user, const std::string& name) {
        const User* holder = find(name);
        if (holder != nullptr && holder != &user) return false;
        longest_name_ = (std::max)(longest_name_, 3 * name.size());
        std::string copy = name;  // allocated first: a failure after users_.rename() would lose the user
        if (holder == nullptr) users_.rename(chat_fold(user.info.name), chat_fold(name));
        user.info.name = std::move(copy);
        return true;
    }
    // The name, with a free number behind it if it is taken. The steps grow, so the tries are few in any room.
    std::string free_name(const std::string& name) const {
        std::string free = name;
        std::size_t step = 1;
        for (std::size_t n = 2; find(free) != nullptr; n += step) {
            if (n == 10) n = (std::max)(n, users_.size());
            if (n >= 10) step *= 2;
            const std::string number = std::to_string(n);
            const std::size_t longest = (std::max)(max_name, name.size());
            free = text::concat({truncate_utf8(name, longest - (std::min)(longest, number.size() + 1)), "-", number});
        }
        return free;
    }
    // Finds the user with whose name the text begins, and removes the name and the space after it from the text. The
    // longest name wins. Null if there is no such user.
    User* consume_user(std::string_view& text) const {
        // A text may be a megabyte of spaces, so only the length of a name is searched.
        std::size_t end = text.size() <= longest_name_ ? text.size() : text.rfind(' ', longest_name_);
        for (; end != std::string_view::npos && end != 0; end = text.rfind(' ', end - 1)) {
            User* user = find(text.substr(0, end));
            if (user == nullptr) continue;
            text.remove_prefix((std::min)(end + 1, text.size()));
            return user;
        }
        return nullptr;
    }

private:
    StringMap<User> users_;  // by chat_fold() of the name
    StringMap<User> identities_;
    std::size_t longest_name_ = 0;  // of all users so far, in the longest form that chat_fold() takes for the same
};

}  // namespace detail

// The rules by which a store of several hubs decides who is in a room: names are unique, and the first one wins. A
// store applies each `join`, `away`, `leave` and `rename` in the order of the room before it delivers it. A store in
// another program does the same with its own means.
class PresenceTable {
public:
    // Empty: the entry is applied, is complete now, and is to be delivered. Otherwise nothing has changed, and the code
    // is for Listener::on_refused(): "name_taken", or "gone" if the hub has no such user.
    //
    //   join    A user who is present keeps the name: the entry gets it, and is quiet. Otherwise the name must be free.
    //           An account also takes the name of a user without one, whom a hub renames after that. A guest (an entry
    //           without author) who is present must be away from all hubs, or it is another guest: "name_taken".
    //   away    The user has no connection to the hub for now.
    //   leave   The hub has no such user any more. It is quiet if other hubs have.
    //   rename  ChatEntry::text is the new name, which must be free. ChatEntry::name becomes the old one.
    std::string_view apply(ChatEntry& entry) {
        if (entry.kind == ChatEntry::Kind::join) return join(entry);
        Room* const room = rooms_.find(entry.room);
        User* const user = room == nullptr ? nullptr : room->users.find(entry.user);
        if (user == nullptr) return "gone";
        entry.name = user->join.name;
        if (entry.kind == ChatEntry::Kind::rename) return rename(*room, *user, entry);
        bool* const away = user->hubs.find(entry.hub);
        if (away == nullptr) return "gone";
        if (entry.kind == ChatEntry::Kind::leave) leave(*room, *user, entry);
        else *away = entry.quiet = true;
        return {};
    }
    // For Listener::on_presence().
    std::vector<ChatEntry> users(const std::string& room) const {
        std::vector<ChatEntry> list;
        const Room* const found = rooms_.find(room);
        if (found == nullptr) return list;
        for (const auto& [id, user] : found->users) {
            for (const auto& [hub, away] : user.hubs) {
                list.push_back(user.join);
                list.back().hub = hub;
                if (away) list.back().kind = ChatEntry::Kind::away;
            }
        }
        return list;
    }
    // The opposite of users().
    void replace(const std::string& room, const std::vector<ChatEntry>& users) {
        rooms_.erase(room);
        for (const ChatEntry& each : users) {
            Room& added = rooms_.find_or_emplace(room);
            User& user = added.users.find_or_emplace(each.user);
            user.join = each;
            user.join.kind = ChatEntry::Kind::join;
            user.hubs.find_or_emplace(each.hub) = each.kind == ChatEntry::Kind::away;
            added.names.find_or_emplace(chat_fold(each.name)) = each.user;
        }
    }
    // Removes all users of a hub. The result has a `leave` for each, to be delivered.
    std::vector<ChatEntry> forget(const std::string& hub) {
        std::vector<ChatEntry> leaves;
        for (const auto& [name, room] : rooms_) {
            for (const auto& [id, user] : room.users) {
                if (user.hubs.find(hub) == nullptr) continue;
                leaves.push_back(user.join);
                leaves.back().kind = ChatEntry::Kind::leave;
                leaves.back().hub = hub;
                leaves.back().time = unix_ms();
            }
        }
        for (ChatEntry& each : leaves) apply(each);
        return leaves;
    }
    // In the order of their names, with the numbers of their users.
    std::vector<std::pair<std::string, std::size_t>> rooms(std::size_t limit) const {
        std::vector<std::pair<std::string, std::size_t>> list;
        for (const auto& [name, room] : rooms_)
            if (list.size() < limit) list.emplace_back(name, room.users.size());
        return list;
    }

private:
    struct User {
        ChatEntry join;        // the first one, with the present name
        StringMap<bool> hubs;  // whether the user is away from the hub
    };
    struct Room {
        StringMap<User> users;         // by their public ids
        StringMap<std::string> names;  // the ids, by chat_fold() of the names
    };

    static bool is_account(const ChatEntry& join) { return text::starts_with(join.author, "account "); }

    std::string_view join(ChatEntry& entry) {
        Room& room = rooms_.find_or_emplace(entry.room);
        User* user = room.users.find(entry.user);
        entry.quiet = user != nullptr;
        if (user == nullptr) {
            const std::string key = chat_fold(entry.name);
            const std::string* const holder = room.names.find(key);
            const bool takes = is_account(entry) && holder != nullptr && !is_account(room.users.find(*holder)->join);
            if (holder != nullptr && !takes) return "name_taken";
            user = &room.users.find_or_emplace(entry.user);
            user->join = entry;
            room.names.find_or_emplace(key) = entry.user;
        } else if (entry.author.empty() && present_elsewhere(*user, entry.hub)) {
            return "name_taken";
        }
        entry.name = user->join.name;
        entry.text = user->join.text;
        user->hubs.find_or_emplace(entry.hub) = false;
        return {};
    }
    static bool present_elsewhere(const User& user, const std::string& than) {
        for (const auto& [hub, away] : user.hubs)
            if (hub != than && !away) return true;
        return false;
    }
    void leave(Room& room, const User& user, ChatEntry& entry) {
        entry.quiet = user.hubs.size() > 1;
        if (entry.quiet) {
            room.users.find(entry.user)->hubs.erase(entry.hub);
            return;
        }
        release(room, user);
        room.users.erase(entry.user);
        if (room.users.empty()) rooms_.erase(entry.room);
    }
    static std::string_view rename(Room& room, User& user, const ChatEntry& entry) {
        const std::string key = chat_fold(entry.text);
        const std::string* const holder = room.names.find(key);
        if (holder != nullptr && *holder != entry.user) return "name_taken";
        release(room, user);
        user.join.name = entry.text;
        room.names.find_or_emplace(key) = entry.user;
        return {};
    }
    // An account may have taken the name.
    static void release(Room& room, const User& user) {
        const std::string key = chat_fold(user.join.name);
        const std::string* const holder = room.names.find(key);
        if (holder != nullptr && *holder == user.join.user) room.names.erase(key);
    }

    StringMap<Room> rooms_;
};

// ---- rooms and the hub ---------------------------------------------------------------------------------------------

// The limits of all chats of a server, in ChatHub::limits. Sizes in bytes.
struct ChatLimits {
    std::size_t max_text = 16 * 1024;
    std::size_t max_name = 40;
    std::size_t max_about = 4 * 1024;           // of ChatUser::about
    std::size_t max_data = 4 * 1024;            // of ChatEntry::data
    std::size_t max_topic = 500;                // of the topic of a room
    std::size_t max_emoji = 64;                 // of a reaction
    Duration edit_for = std::chrono::hours(1);  // how long an author may edit a message; zero: never
    std::size_t max_room_name = 64;
    std::size_t max_rooms_per_connection = 10;
    std::size_t presence_list = 200;  // above so many users, the members of a room hear of their number alone
    std::size_t max_rooms = 10'000;
    std::size_t max_read_markers = 1000;         // of a user
    std::size_t history_on_join = 50;            // entries for a client without an id
    std::size_t history_on_resume = 500;         // entries for a client with an id
    std::size_t max_history_event = 256 * 1024;  // of one "history" event; older entries are left out
    Duration grace = std::chrono::seconds(3);    // how long a user stays in a room after a lost connection
    FloodRates connection{{5, 20}, {16 * 1024, 64 * 1024}};
    FloodRates address{{50, 200}, {128 * 1024, 512 * 1024}};  // of all connections of an address or an IPv6 /64
    unsigned flood_patience = 100;  // a connection is closed after so many messages above these rates
    // Bytes of histories, searches and lists that a connection, and all of an address, may ask for.
    Rate replies{64 * 1024, 2 * 1024 * 1024}, address_replies{1024 * 1024, 64 * 1024 * 1024};
};

// What a user may do: ChatHandler::may(). From `kick` on it is moderation; `remove`: the messages of others.
enum class ChatAction : std::uint8_t { say, private_message, rename, join, list_rooms, kick, ban, mute, remove, topic };

// A room of the chat, independent of the Room of the same name. A reference is valid until the callback returns.
class ChatRoom {
public:
    ChatRoom(std::string name, ChatHub& hub) : name_(std::move(name)), hub_(hub) {}
    ChatRoom(const ChatRoom&) = delete;
    ChatRoom& operator=(const ChatRoom&) = delete;

    const std::string& name() const { return name_; }
    std::vector<ChatUser> users() const { return presence_.users(); }
    // Empty: none, or the store has not delivered it yet.
    const std::string& topic() const { return topic_; }

    // Says a text to all, as the server or under a name. publish() also keeps it in the history. An Error if the text
    // contains control characters or is not UTF-8.
    inline void publish(std::string_view text, std::string_view name = {});
    inline void broadcast(std::string_view text, std::string_view name = {});
    // Changes a text that publish() said, removes a message of anybody, sets the topic; all members hear of it. If the
    // store does not know the message, nothing happens. An Error as for publish(), or if a topic is longer than
    // ChatLimits::max_topic.
    inline void edit(std::uint64_t id, std::string_view text);
    inline void remove(std::uint64_t id);
    inline void set_topic(std::string_view text);
    // Sends {"type":"event","room":...,"name":...,"data":...} to all members, on all servers. It is not kept. An Error
    // if the name is not 1 to 64 bytes of visible text, or the data is longer than ChatLimits::max_data.
    inline void send(std::string_view name, const Json& data = {});
    // Reads the entries after a position, or the newest messages: see ChatStore::since().
    inline void since(std::optional<HistoryPosition> position, std::size_t limit, ChatStore::PageCallback callback);
    // Closes all connections of the user in this room, with 1008. False if there is no such user.
    inline bool kick(std::string_view name, std::string_view reason = {});
    // Refuses all messages of the user for this time; zero ends it. False if there is no such user.
    inline bool mute(std::string_view name, Duration duration);

private:
    friend class ChatHandler;
    friend class ChatHub;
    friend class detail::ChatCommands;

    inline ChatEntry new_text(const char* call, std::string_view text, std::string_view name) const;

    std::string name_;
    ChatHub& hub_;
    detail::Presence presence_;
    std::string topic_;
    std::uint64_t topic_id_ = 0;                 // of the entry that set it; 0: the fact of the store
    std::optional<std::uint64_t> delivered_id_;  // the newest id that the members have received, if it is known
    bool expiry_scheduled_ = false;
    bool counting_ = false;  // the members have no list of users
    bool count_scheduled_ = false;
};

// The chat of a server, shared by its handlers: rooms, the history, bans. All calls on the loop's thread.
class ChatHub final : private ChatStore::Listener {
public:
    explicit ChatHub(Server& server)
        : server_(server),
          members_(&server.rooms()),
          first_number_(static_cast<std::uint64_t>(Clock::now().time_since_epoch().count()) << 16),
          last_number_(first_number_) {
        set_store(MemoryHistory());
    }
    ChatHub(const ChatHub&) = delete;
    ChatHub& operator=(const ChatHub&) = delete;

    static ChatHub& of(Server& server) { return server.extension<ChatHub>(); }

    ChatLimits limits;

    // Replaces the store: set_store(SqliteHistory("chat.db")). An Error after the first connection.
    template <class Store, std::enable_if_t<std::is_base_of_v<ChatStore, Store>, int> = 0>
    void set_store(Store store) {
        set_store(std::unique_ptr<ChatStore>(new Store(std::move(store))));
    }
    void set_store(std::unique_ptr<ChatStore> store) {
        if (!rooms_.empty())
            throw Error("ChatHub::set_store: a connection is open; set the store before the first connection");
        store_ = std::move(store);
        store_->attach(*this, server_.loop().mailbox());
        load_decisions("ban");
        load_decisions("mute");
        load_secret();  // the last one: connections wait for it
    }
    ChatStore& store() { return *store_; }

    // Creates the room if it does not exist.
    ChatRoom& room(std::string_view name) {
        if (ChatRoom* room = find(name)) return *room;
        prune_later();
        ChatRoom& room = rooms_.find_or_emplace(name, std::string(name), *this);
        room.presence_.max_name = limits.max_name;
        load_topic(room.name());
        return room;
    }
    // Null if there is no such room.
    ChatRoom* find(std::string_view name) const { return rooms_.find(name); }
    std::size_t room_count() const { return rooms_.size(); }
    // The names of all rooms, in order, with the number of their users.
    std::vector<std::pair<std::string, std::size_t>> rooms() const {
        std::vector<std::pair<std::string, std::size_t>> list;
        for (const auto& [name, room] : rooms_) list.emplace_back(name, room.presence_.size());
        return list;
    }

    // ---- hooks for bots, webhooks and logs ------------------------------------------------------------------------
    //
    // Set them before run(). They are called on the loop's thread; an exception is logged and changes nothing.

    // What the store delivers, in the order of the room: messages, amendments, topics, joins, leaves, new names and
    // private messages. ChatEntry::room of a kept private message begins with a line feed. Typing is left out.
    std::function<void(const ChatEntry&)> on_event;
    // An entry of this server that the store could not keep, and why.
    std::function<void(const ChatEntry&, const std::string& cause)> on_not_kept;
    // A ban or a mute that begins or ends (an empty value), or a kick: ChatFact::scope is "ban", "mute" or "kick".
    std::function<void(const ChatFact&)> on_decision;

    // Sends {"type":"event","name":...,"data":...} to all connections of a user, by the public id, on all servers.
    // Returns how many of them this server has. An Error as for ChatRoom::send().
    inline std::size_t send(const std::string& user_id, std::string_view name, const Json& data = {});

    // Closes and refuses the connections of a user or an address for this time; zero ends the ban. The name of a user
    // who is in a room is never taken for an address.
    //
    // A ban of a user who is present is one of his name, of his public id if he has a key or an account, and otherwise
    // of his addresses, if nobody else is connected from there. The store keeps bans.
    inline void ban(std::string_view address_or_name, Duration duration);
    // The bans that hold now: what is banned ("name anna", "user ID" or "address 192.0.2.1"), the name that ban() got,
    // and the time that is left.
    struct Ban {
        std::string key, name;
        Duration left;
    };
    std::vector<Ban> bans() const {
        std::vector<Ban> list;
        for (const auto& [key, ban] : bans_)
            if (ban.end > now()) list.push_back({key, ban.name, ban.end - now()});
        return list;
    }

private:
    friend class ChatHandler;
    friend class ChatRoom;
    friend class detail::ChatCommands;
    using User = detail::Presence::User;

    struct AddressUse {
        detail::FloodLimiter limiter;
        TokenBucket replies;
        std::size_t connections = 0;
    };
    // A user who is connected to this server.
    struct UserState {
        std::vector<ChatHandler*> connections{};
        enum class Markers : std::uint8_t { unknown, requested, known } markers = Markers::unknown;
        StringMap<std::uint64_t> read{};               // the read markers: by room, or by "@" and the id of a peer
        std::vector<std::function<void()>> waiting{};  // for the markers
    };
    struct Asked {
        std::uint64_t number;  // of the connection
        std::string tag;
    };

    static std::string rate_limit_key(const std::string& address) {
        const auto parsed = IpAddress::parse(address);
        return parsed ? parsed->rate_limit_key() : address;
    }

    // ---- public ids ------------------------------------------------------------------------------------------------

    // The ids of users depend on a secret of the store, so nobody can find the key of a user by trying keys.
    void load_secret() {
        secret_.clear();
        store_->facts("server", "secret", [this](const std::vector<ChatFact>& facts, const std::string& error) {
            if (!error.empty()) server_.report(LogLevel::error, "chat_not_read", {{"cause", error}});
            if (facts.empty()) {
                const std::string bytes = random_bytes(30);
                secret_ = base64(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
                if (error.empty()) store_->put({"server", "secret", secret_});
            } else secret_ = facts[0].value;
            for (const std::function<void()>& start : std::exchange(waiting_, {})) start();
        });
    }
    // Calls start() when the ids of users are known.
    void when_ready(std::function<void()> start) {
        if (!secret_.empty()) start();
        else waiting_.push_back(std::move(start));
    }
    std::string user_id(const std::string& identity) const {
        const auto digest = detail::hmac_sha1(secret_, identity);
        std::string id = base64(digest.data(), 12);
        for (char& c : id) c = c == '+' ? '-' : c == '/' ? '_' : c;
        return id;
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    std::uint64_t add_connection(ChatHandler& handler) {
        connections_.insert_reference(big_endian_key(++last_number_), handler);
        return last_number_;
    }
    void remove_connection(std::uint64_t number) { connections_.erase(big_endian_key(number)); }
    WSCHAT_NOINLINE ChatHandler* connection(std::uint64_t number) const {
        return connections_.find(big_endian_key(number));
    }

    // The connections of a user, in all rooms.
    std::vector<ChatHandler*> connections_of(const std::string& id) const {
        const UserState* found = users_.find(id);
        return found == nullptr ? std::vector<ChatHandler*>() : found->connections;
    }
    static std::vector<ChatHandler*> connections_in(const ChatRoom& room) {
        std::vector<ChatHandler*> all;
        for (const auto& [name, user] : room.presence_)
            all.insert(all.end(), user.connections.begin(), user.connections.end());
        return all;
    }
    void add_user(const std::string& id, ChatHandler& handler) {
        users_.find_or_emplace(id).connections.push_back(&handler);
    }
    void remove_user(const std::string& id, const ChatHandler& handler) {
        UserState* const user = users_.find(id);
        if (user == nullptr) return;
        auto& all = user->connections;
        all.erase(std::remove(all.begin(), all.end(), &handler), all.end());
        if (all.empty()) users_.erase(id);
    }

    AddressUse& add_address(const std::string& remote_address) {
        if (addresses_.size() >= prune_addresses_at_) prune_addresses();
        AddressUse& use = addresses_.find_or_emplace(rate_limit_key(remote_address));
        ++use.connections;
        return use;
    }
    void prune_addresses() {
        addresses_.erase_if([this](AddressUse& use) {
            return use.connections == 0 && use.limiter.full(now()) && use.replies.full(now());
        });
        prune_addresses_at_ = (std::max)(std::size_t{1024}, 2 * addresses_.size());
    }

    // ---- users -----------------------------------------------------------------------------------------------------

    inline User& connect(ChatRoom& room, const ChatUser& info, const std::string& identity, ChatHandler& handler,
                         std::uint64_t number);
    void disconnect(ChatRoom& room, User& user, ChatHandler& handler, bool at_once) {
        const Time expires = saturating_add(now(), limits.grace);
        detail::Presence::detach(user, &handler, expires);  // first, because the rest may run out of memory
        const ChatUser left = user.info;
        if (room.presence_.disconnect(user, &handler, expires, at_once)) return announce_leave(room, left);
        if (user.connections.empty() && !room.expiry_scheduled_) schedule_expiry(room, limits.grace);
    }
    // `sender` and `tag`: of the line that renames.
    void rename(ChatRoom& room, User& user, const std::string& name, std::uint64_t sender = 0,
                const std::string& tag = {}) {
        ChatEntry entry = new_entry(ChatEntry::Kind::rename, room, user.info);
        entry.text = name;
        entry.sender = tag.empty() ? 0 : sender;
        entry.tag = tag;
        const std::string key = mute_key(room, user);
        room.presence_.rename(user, name);
        move_mute(key, mute_key(room, user), name);
        forward(std::move(entry));
    }
    void announce_leave(ChatRoom& room, const ChatUser& user) {
        forward(new_entry(ChatEntry::Kind::leave, room, user));
        if (room.presence_.empty()) prune_later();
    }
    void schedule_expiry(ChatRoom& room, Duration delay) {
        server_.loop().call_later(delay, [this, name = room.name()] {
            ChatRoom* found = find(name);
            if (found == nullptr) return;
            Time next;
            found->expiry_scheduled_ = false;
            for (const ChatUser& expired : found->presence_.expire(now(), next)) announce_leave(*found, expired);
            // The minimum of 50 ms lets users who leave together share one timer.
            if (next != (Time::max)())
                schedule_expiry(*found, (std::max)(next - now(), Duration(std::chrono::milliseconds(50))));
        });
        room.expiry_scheduled_ = true;
    }
    // In a large room, a list or an event for each user who comes would cost the square of their number. The members
    // hear of the number of users, once a second, and get the list when it is short again.
    bool count_only(ChatRoom& room) {
        if (room.presence_.size() > limits.presence_list) room.counting_ = true;
        if (!room.counting_ || std::exchange(room.count_scheduled_, true)) return room.counting_;
        server_.loop().call_later(std::chrono::seconds(1), [this, name = room.name()] {
            ChatRoom* const found = find(name);
            if (found == nullptr) return;
            found->count_scheduled_ = false;
            found->counting_ = found->presence_.size() > limits.presence_list;
            send_count(*found);
        });
        return true;
    }
    inline void send_count(const ChatRoom& room);
    // Removes rooms without users in the next turn, when no callback has a reference to them.
    void prune_later() {
        if (std::exchange(pruning_, true)) return;
        server_.loop().post([this] {
            pruning_ = false;
            rooms_.erase_if([](ChatRoom& room) { return room.presence_.empty(); });
        });
    }

    // ---- private messages and read markers -------------------------------------------------------------------------

    // The log of a conversation in the store. No room of a user has such a name.
    static std::string conversation(const std::string& one, const std::string& other) {
        return text::concat({"\n", (std::min)(one, other), "\n", (std::max)(one, other)});
    }
    static bool is_conversation(const std::string& room) { return room.size() > 1 && room[0] == '\n'; }
    // The other user of a conversation.
    static std::string peer_in(const std::string& room, const std::string& id) {
        const std::size_t middle = room.find('\n', 1);
        const std::string first = room.substr(1, middle - 1);
        return first == id ? room.substr(middle + 1) : first;
    }
    // Keeps a fact that does not change, once in the life of this server.
    void note(ChatFact fact) {
        const std::string key = text::concat({fact.scope, "\n", fact.key});
        constexpr std::size_t max_noted = 100'000;
        if (noted_.size() >= max_noted) noted_.erase_if([](bool) { return true; });
        if (noted_.find(key) != nullptr) return;
        noted_.find_or_emplace(key) = true;
        store_->put(std::move(fact));
    }
    // The room of an entry, or the other user of its conversation.
    static ChatEvent& add_place(ChatEvent& event, const ChatEntry& entry) {
        return is_conversation(entry.room) ? event.add_text("peer", peer_in(entry.room, entry.user))
                                           : event.add_text("room", entry.room);
    }
    inline void on_conversation(const ChatEntry& entry);

    // Calls then() when the read markers of a user are known. Not if the user has gone before.
    void with_markers(const std::string& id, std::function<void()> then) {
        UserState* const user = users_.find(id);
        if (user == nullptr) return;
        if (user->markers == UserState::Markers::known) return then();
        user->waiting.push_back(std::move(then));
        if (std::exchange(user->markers, UserState::Markers::requested) != UserState::Markers::unknown) return;
        store_->facts("read", id + "\n", [this, id](const std::vector<ChatFact>& facts, const std::string& error) {
            if (!error.empty()) server_.report(LogLevel::error, "chat_not_read", {{"cause", error}});
            on_markers(id, facts);
        });
    }
    void on_markers(const std::string& id, const std::vector<ChatFact>& facts) {
        UserState* const user = users_.find(id);
        if (user == nullptr) return;
        for (const ChatFact& fact : facts) {
            std::uint64_t& marker = user->read.find_or_emplace(fact.key.substr(id.size() + 1), std::uint64_t{0});
            marker = (std::max)(marker, text::parse_unsigned(fact.value, HistoryPosition::max_id).value_or(0));
        }
        user->markers = UserState::Markers::known;
        for (const auto& then : std::exchange(user->waiting, {})) then();
    }
    // 0: nothing was read.
    std::uint64_t marker_of(const std::string& id, const std::string& what) const {
        const UserState* const user = users_.find(id);
        const std::uint64_t* const marker = user == nullptr ? nullptr : user->read.find(what);
        return marker == nullptr ? 0 : *marker;
    }
    inline void on_read(const ChatFact& fact);
    inline std::vector<Asked> take_asked(const ChatFact& fact);
    inline void put_marker(const ChatHandler& handler, const std::string& what, std::uint64_t id,
                           const std::string& tag);

    // ---- bans and mutes --------------------------------------------------------------------------------------------

    static std::string address_key(const std::string& address) {
        return text::concat({"address ", rate_limit_key(address)});
    }
    static std::string name_key(std::string_view name) { return text::concat({"name ", chat_fold(name)}); }
    // To whom the messages and tags of a user belong. A guest is one connection: a later one may have the same name.
    static std::string author_of(const User& user) {
        return user.identity.empty() ? text::concat({"guest ", user.info.id}) : user.identity;
    }

    static std::string user_key(const std::string& id) { return text::concat({"user ", id}); }
    // Users with a key or an account are known by their ids, and all others by their names.
    std::string mute_key(const ChatRoom& room, const User& user) const {
        const std::string who = user.identity.empty() ? name_key(user.info.name) : user_key(user.info.id);
        return text::concat({room.name(), "\n", who});
    }

    // `id`: the public id of a user with a key or an account; empty: unknown.
    bool banned(const std::string& address, const std::string& name, const std::string& id) const {
        return bans_.active(address_key(address), now()) || bans_.active(name_key(name), now()) ||
               (!id.empty() && bans_.active(user_key(id), now()));
    }
    bool muted(const ChatRoom& room, const User& user) const { return mutes_.active(mute_key(room, user), now()); }
    void mute(const ChatRoom& room, const User& user, Duration duration) {
        decide("mute", mute_key(room, user), user.info.name, duration);
    }
    void move_mute(const std::string& key, const std::string& new_key, const std::string& name) {
        const Duration left = mutes_.left(key, now());
        if (key == new_key || left == Duration::zero()) return;
        decide("mute", new_key, name, left);
        decide("mute", key, "", Duration::zero());
    }

    // A decision holds at once, and the store keeps it for restarts and other servers. Zero ends it.
    void decide(const char* scope, const std::string& key, const std::string& name, Duration duration) {
        const bool ending = duration <= Duration::zero();
        constexpr Duration longest = std::chrono::hours(24 * 365 * 10);
        const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>((std::min)(duration, longest)).count();
        ChatFact fact{scope, key, ending ? "" : name.empty() ? "?" : name, {}, ending ? 0 : unix_ms() + ms};
        on_fact(fact);
        tell_decision(fact);
        store_->put(std::move(fact));
    }
    void tell_decision(const ChatFact& fact) {
        if (on_decision) run_hook("ChatHub::on_decision", [&] { on_decision(fact); });
    }
    // Tells the moderators of the room, on all hubs, before it happens. The name of the entry is that of the moderator;
    // empty: the program.
    void report_moderation(ChatEntry entry, std::string_view action, std::string_view name, std::uint64_t seconds) {
        entry.kind = ChatEntry::Kind::moderation;
        entry.text = action;
        entry.to = name;
        entry.data = std::to_string(seconds);
        forward(std::move(entry));
    }
    inline void on_moderation(const ChatEntry& entry);
    inline void on_own_event(const ChatEntry& entry);
    inline ChatEntry new_own_event(const char* call, std::string_view name, const Json& data) const;
    // Closes the connections of a user to a room, on all hubs.
    inline void kick(const ChatRoom& room, const std::string& name, std::string_view reason);
    inline void on_kick(const ChatEntry& entry);
    inline void ban_lone_address(const ChatHandler& handler, const std::string& name, Duration duration);
    inline void on_fact(const ChatFact& fact) override;
    inline void on_fact_failure(const ChatFact& fact, const std::string& cause) override;
    void load_decisions(const char* scope) {
        store_->facts(scope, "", [this](const std::vector<ChatFact>& facts, const std::string& error) {
            if (!error.empty()) server_.report(LogLevel::error, "chat_not_read", {{"cause", error}});
            for (const ChatFact& fact : facts) on_fact(fact);
        });
    }

    // ---- entries ---------------------------------------------------------------------------------------------------

    WSCHAT_NOINLINE static ChatEntry new_entry(ChatEntry::Kind kind, const ChatRoom& room, std::string_view name) {
        ChatEntry entry;
        entry.kind = kind;
        entry.room = room.name();
        entry.name = name;
        return entry;
    }
    static ChatEntry new_entry(ChatEntry::Kind kind, const ChatRoom& room, const ChatUser& user) {
        ChatEntry entry = new_entry(kind, room, user.name);
        entry.user = user.id;
        return entry;
    }
    void append(ChatEntry entry) {
        entry.time = unix_ms();
        store_->append(std::move(entry));
    }
    WSCHAT_NOINLINE void forward(ChatEntry entry) {
        entry.time = unix_ms();
        store_->forward(entry);
    }
    // The store answers before it answers the first member's request for the history.
    void load_topic(const std::string& name) {
        store_->facts("topic", name, [this, name](const std::vector<ChatFact>& facts, const std::string&) {
            ChatRoom* const room = find(name);
            if (room != nullptr && room->topic_id_ == 0 && !facts.empty() && facts[0].key == name)
                room->topic_ = facts[0].value;
        });
    }
    // The topic outlives its entry in the history. The server that appended the entry keeps it as a fact.
    void on_topic(ChatRoom* room, const ChatEntry& entry) {
        if (appended_here(entry)) store_->put({"topic", entry.room, entry.text});
        if (room == nullptr) return;
        room->topic_ = entry.text;
        room->topic_id_ = entry.id;
    }
    bool appended_here(const ChatEntry& entry) const {
        return entry.sender >= first_number_ && entry.sender <= last_number_;
    }
    // Removes entries that the members have not received. A new member receives them together with the members.
    void trim_to_delivered(ChatRoom& room, HistoryPage& page) {
        if (members_.find(room.name()) == nullptr || !room.delivered_id_) {
            room.delivered_id_ = (std::max)(room.delivered_id_.value_or(0), page.last_id);
            return;
        }
        while (!page.entries.empty() && page.entries.back().id > *room.delivered_id_) page.entries.pop_back();
        page.last_id = (std::min)(page.last_id, *room.delivered_id_);
    }

    template <class Hook>
    void run_hook(const char* name, Hook&& hook) {
        try {
            hook();
        } catch (const std::exception& error) {
            server_.report_exception(name, error.what());
        } catch (...) {
            server_.report_exception(name, "not a std::exception");
        }
    }
    inline void on_entry(const ChatEntry& entry) override;
    inline void deliver(const ChatEntry& entry);
    inline void on_duplicate(const ChatEntry& entry) override;
    inline void on_failure(const ChatEntry& entry, const std::string& cause) override;
    inline void on_refused(const ChatEntry& entry, std::string_view code) override;
    Time now() const override { return server_.loop().now(); }
    inline void on_kept(const ChatEntry& entry);
    inline void on_private_message(const ChatEntry& entry);
    inline void on_typing(const ChatEntry& entry);
    inline void on_join(const ChatEntry& entry);
    inline void on_leave(const ChatEntry& entry);
    inline void on_rename(const ChatEntry& entry);
    inline void send_to_others(const ChatEntry& entry, const ChatEvent& event);

    Server& server_;
    Rooms members_;  // the connections in each room that have received its history
    StringMap<ChatRoom> rooms_;
    StringMap<ChatHandler> connections_;  // by number
    StringMap<UserState> users_;          // by public id
    StringMap<std::vector<Asked>> asked_;  // who waits for a read marker, by its key and its value
    StringMap<bool> noted_;             // the facts about users and conversations that the store has
    const std::uint64_t first_number_;  // of what the hub itself says; the connections have the next ones
    std::uint64_t last_number_;
    StringMap<AddressUse> addresses_;
    std::size_t prune_addresses_at_ = 1024;
    detail::Deadlines bans_, mutes_;
    bool pruning_ = false;
    std::string secret_;                          // empty: the store has not answered yet
    std::vector<std::function<void()>> waiting_;  // handshakes, until then
    std::unique_ptr<ChatStore> store_;            // the last member, because its destructor may call the listener
};

// ---- the handler ---------------------------------------------------------------------------------------------------

// The answer to ChatHandler::authenticate_async(): see Reply.
class ChatReply {
public:
    explicit ChatReply(Reply reply) : reply_(std::move(reply)) {}
    // The user enters. Without an argument it is the user of authenticate().
    bool accept() const { return reply_.accept(); }
    inline bool accept(ChatUser user) const;
    // Refuses the handshake.
    bool send(Response response) const { return reply_.send(std::move(response)); }
    bool is_open() const { return reply_.is_open(); }

private:
    Reply reply_;
};

// A chat as one handler: server.route<ChatHandler>("/chat/{room}"). Clients send lines: a line with a slash in front is
// a command, and all others are said to the room. Clients receive events: one JSON object in a message. The query of
// the address may contain `name`, `key` (a secret of the client; connections with the same key are one user) and `last`
// (the newest HistoryPosition of the client), and `join` for each further room. README.md lists the events.
class ChatHandler : public WebSocketHandler {
public:
    ~ChatHandler() override { disconnect(false); }

    // ---- hooks for derived classes; an exception closes the connection with 1011 -----------------------------------

    // Before the 101. A response refuses the handshake, such as a 403 or a redirect.
    virtual std::optional<Response> on_handshake(const Request&) { return std::nullopt; }
    // The user who connects. Without a result the handshake is refused with 401. Default: the name in "?name=Anna".
    virtual std::optional<ChatUser> authenticate(const Request& request) {
        return ChatUser{request.query("name").value_or("")};
    }
    // The same if the answer comes later, for example from a database: reply.accept(user), or reply.send(response),
    // which refuses. Called after authenticate(), whose user it may replace. By default that user is accepted.
    virtual void authenticate_async(const Request&, ChatReply reply) { reply.accept(); }
    // Whether this user may do it. Default: everything except moderation.
    virtual bool may(ChatAction action) { return action < ChatAction::kick; }
    // May change a text that the user says, also in private. False refuses it.
    virtual bool filter(std::string&) { return true; }
    // A pair: after the 101; after the connection has ended and has left its rooms. See close_code() for the reason.
    virtual void on_connect() {}
    virtual void on_disconnect() {}
    // A pair: the connection has received the history of the room; the connection leaves the room.
    virtual void on_join(ChatRoom&) {}
    virtual void on_leave(ChatRoom&) {}
    // What this connection said is in the history, and was delivered.
    virtual void on_said(const ChatEntry&) {}
    // The line "/command rest". False: there is no such command. Default: the commands of /help.
    virtual inline bool on_command(std::string_view command, std::string_view rest);

    // ---- calls -----------------------------------------------------------------------------------------------------

    ChatHub& hub() { return *hub_; }
    // The room in which this connection speaks; null if it is in no room.
    ChatRoom* current_room() { return memberships_.empty() ? nullptr : memberships_[current_].room; }
    // The user in that room. In no room: the user of authenticate(), with the latest name.
    const ChatUser& user() const { return memberships_.empty() ? user_ : memberships_[current_].user->info; }

    // Says it to the current room, as if the user had typed it.
    void say(std::string_view text) { say(ChatEntry::Kind::said, text); }
    // Sends an event to this client alone, with the tag of its line.
    void reply(const ChatEvent& event) { write_message(ChatEvent(event).add_unless_empty("tag", tag_).dump()); }
    void reply_error(std::string_view code, std::string_view sentence) {
        reply(ChatEvent("error").add_text("code", code).add_text("text", sentence));
    }
    // Closes the connection with 1008. The user leaves without a grace period.
    void kick(std::string_view reason) { end_with("kick", reason, Duration::zero()); }

    // ---- WebSocketHandler; the hooks above replace these -----------------------------------------------------------

    std::optional<Response> prepare(const Request& request) final {
        hub_ = &ChatHub::of(server());
        if (auto refusal = on_handshake(request)) return refusal;
        std::optional<ChatUser> user = authenticate(request);
        if (!user) return Response(401, "Log in first.\n");
        return admit(std::move(*user));
    }
    void prepare_async(const Request&, Reply reply) final {
        hub_->when_ready([this, answer = std::make_shared<Reply>(std::move(reply))] {
            // If the client has gone, so may this handler have.
            if (!answer->is_open()) return;
            if (!identity_.empty()) user_.id = hub_->user_id(identity_);
            if (auto refusal = refuse_banned()) {
                answer->send(std::move(*refusal));
                return;
            }
            run_hook("authenticate_async", [&] { authenticate_async(request(), ChatReply(std::move(*answer))); });
        });
    }

    // "wschat", if the client offers it. A browser ends a connection whose offers are all ignored.
    std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
        return text::contains(offered, "wschat") ? "wschat" : "";
    }

    void open() final {
        number_ = hub_->add_connection(*this);
        user_.id = hub_->user_id(identity_.empty() ? text::concat({"guest ", std::to_string(number_)}) : identity_);
        hub_->add_user(user_.id, *this);
        if (!identity_.empty()) hub_->note({"user", user_.id, "1", identity_});
        if (remote_address() != "unix") address_ = &hub_->add_address(remote_address());
        const bool name_accepted =
            user_.account || user_.name.empty() || detail::valid_chat_name(user_.name, hub_->limits.max_name);
        if (!name_accepted || user_.name.empty()) user_.name = "guest";
        const std::string_view param = request().param("room"), wanted = param.empty() ? "lobby" : param;
        const auto refusal = refuse_room(wanted);
        const bool to_lobby = refusal.code == "room_bad" && !refuse_room("lobby");
        if (!refusal || to_lobby) join_room(refusal ? "lobby" : wanted);
        reply(hello_event());
        if (!name_accepted) reply_error("name_bad", name_rule());
        if (refusal) reply_error(refusal);
        connected_ = true;
        run_hook("on_connect", [this] { on_connect(); });
        if (current_room() != nullptr)
            request_history(*current_room(), HistoryPosition::parse(request().query("last").value_or("")));
        join_more_rooms();
        if (!identity_.empty()) request_conversations();
    }

    void on_message(const Message& message) final {
        const detail::ChatLine line = detail::ChatLine::parse(message.binary() ? std::string_view() : message.text());
        tag_ = detail::ChatLine::valid_tag(line.tag) ? line.tag : std::string_view();
        if (within_rates(message.size())) dispatch(message, line);
        tag_.clear();
    }

    void on_close() final {
        // RFC 6455 7.4.1: "1000 indicates a normal closure". A reload or a lost connection has another code.
        disconnect(kicked_ || close_code() == CloseCode::normal);
        if (std::exchange(connected_, false)) run_hook("on_disconnect", [this] { on_disconnect(); });
    }

private:
    friend class ChatReply;

    // Takes the user, unless he is banned. Throws an Error if what authenticate() gave is not valid.
    std::optional<Response> admit(ChatUser user) {
        check_about(user.about);
        user_ = std::move(user);
        const std::string key = key_of(request());
        identity_.clear();
        if (user_.account) identity_ = "account " + user_.name;
        else if (key.size() >= 8 && key.size() <= 128) identity_ = "key " + fingerprint(key);
        user_.id = identity_.empty() ? "" : hub_->user_id(identity_);
        return refuse_banned();
    }
    std::optional<Response> refuse_banned() {
        if (!hub_->banned(remote_address(), user_.name, known_id())) return std::nullopt;
        return Response(403, "You are banned from this chat.\n");
    }
    // Empty for a guest, whose id ends with the connection.
    std::string known_id() const { return identity_.empty() ? "" : user_.id; }
    // The client is told why, so that it does not connect again at once.
    void end_with(std::string_view code, std::string_view reason, Duration ban) {
        if (!is_open()) return;
        kicked_ = true;
        ChatEvent event("kicked");
        event.add_text("code", code).add_text("text", reason);
        if (ban > Duration::zero())
            event.add("seconds", std::chrono::duration_cast<std::chrono::seconds>(ban).count() + 1);
        write_message(event.dump());
        close(CloseCode::policy_violation, truncate_utf8(reason, 123));
    }

    friend class ChatHub;
    friend class detail::ChatCommands;

    struct Membership {
        ChatRoom* room;
        detail::Presence::User* user;
        bool on_join_called = false;
    };
    struct HistoryRequest {
        std::string room;
        std::optional<HistoryPosition> position;
        std::optional<std::uint64_t> delivered_id;  // of the room at the time of the request
        std::string tag{};
    };
    struct Refusal {
        std::string_view code{};  // empty: nothing is refused
        std::string sentence{};
        explicit operator bool() const { return !code.empty(); }
    };

    // Whether it has the form of the public id of a user.
    static bool is_user_id(std::string_view id) {
        return id.size() == 16 &&
               text::all_of(id, [](char c) { return text::is_alphanumeric(c) || c == '-' || c == '_'; });
    }
    // The secret of the client: an offered subprotocol "wschat.key.BASE64URL", or "?key=". An address is in the history
    // of a browser and in the logs of proxies, a subprotocol is not.
    static std::string key_of(const Request& request) {
        std::string_view offered = request.header("sec-websocket-protocol");
        while (!offered.empty()) {
            std::string_view each = text::trim(text::consume_until(offered, ','));
            if (detail::consume(each, "wschat.key.")) return detail::base64url_decode(each);
        }
        return request.query("key").value_or("");
    }
    static std::string fingerprint(const std::string& key) {
        const auto digest = sha1(key);
        return base64(digest.data(), digest.size());
    }
    // Digits only. A larger number becomes 10^18.
    static std::optional<std::uint64_t> to_number(std::string_view digits) {
        if (digits.empty()) return std::nullopt;
        constexpr std::uint64_t max = 1'000'000'000'000'000'000;
        std::uint64_t value = 0;
        for (const char c : digits) {
            if (!text::is_digit(c)) return std::nullopt;
            value = (std::min)(value * 10 + static_cast<std::uint64_t>(c - '0'), max);
        }
        return value;
    }

    // Events for other users contain it, so an invalid text would break these events.
    void check_about(const std::string& about) const {
        const bool too_long = about.size() > hub_->limits.max_about;
        if (!too_long && (about.empty() || detail::valid_json(about))) return;
        throw Error(text::concat(
            {"ChatHandler::authenticate: ChatUser::about \"", escape_for_log(about), "\": it is ",
             too_long ? "longer than ChatLimits::max_about" : "not a JSON value in UTF-8 of at most 32 levels"}));
    }

    ChatEvent hello_event() {
        ChatEvent event("hello");
        event.add("version", 3).add_text("server", "wschat");
        add_room(event).add_text("name", user().name).add_text("user", user().id);
        event.add_json("features", R"(["rooms","names","users","history","before","search","resume","tags","typing",)"
                                   R"("private","edit","delete","react","topic","data","in","read","commands"])");
        event.add_json("may", permissions_json());
        const auto edit_for = std::chrono::duration_cast<std::chrono::seconds>(hub_->limits.edit_for).count();
        event.add("limits", Json{{"text", hub_->limits.max_text},
                                 {"data", hub_->limits.max_data},
                                 {"edit_seconds", edit_for},
                                 {"name", hub_->limits.max_name},
                                 {"room", hub_->limits.max_room_name},
                                 {"per_second", hub_->limits.connection.messages.per_second},
                                 {"burst", hub_->limits.connection.messages.burst}});
        return event;
    }
    // What this user may do, as a JSON array.
    std::string permissions_json() {
        detail::JsonList list;
        const std::pair<ChatAction, const char*> actions[] = {{ChatAction::say, R"("say","edit","react")"},
                                                              {ChatAction::private_message, R"("private")"},
                                                              {ChatAction::rename, R"("rename")"},
                                                              {ChatAction::join, R"("join")"},
                                                              {ChatAction::list_rooms, R"("rooms")"},
                                                              {ChatAction::kick, R"("kick")"},
                                                              {ChatAction::ban, R"("ban")"},
                                                              {ChatAction::mute, R"("mute")"},
                                                              {ChatAction::remove, R"("remove")"},
                                                              {ChatAction::topic, R"("topic")"}};
        for (const auto& [action, name] : actions)
            if (may(action)) list.add(name);
        return std::string(list.dump());
    }
    ChatEvent& add_room(ChatEvent& event) {
        return current_room() == nullptr ? event.add_json("room", "null")
                                         : event.add_text("room", current_room()->name());
    }
    std::string name_rule() const {
        return text::concat({"A name is 1 to ", std::to_string(hub_->limits.max_name), " bytes of visible text."});
    }

    // ---- input -----------------------------------------------------------------------------------------------------

    bool within_rates(std::size_t size) {
        using Action = detail::FloodPolicy::Action;
        const ChatLimits& limits = hub_->limits;
        const Time now = hub_->now();
        // What its own limit refuses is not charged to the neighbours of the address.
        const bool within = limiter_.take(size, limits.connection, now) &&
                            (address_ == nullptr || address_->limiter.take(size, limits.address, now));
        const Action action = flood_policy_.decide(within, limits.flood_patience, now);
        if (action == Action::warn || (action == Action::drop && !tag_.empty()))
            reply_error("flood", "That was too much at once, and was not taken. Wait a little.");
        if (action == Action::close) close(CloseCode::policy_violation, "flooding");
        return action == Action::accept;
    }

    // Whether the client may ask for a history, a search or a list now: the bytes of the earlier answers are charged.
    bool may_read() {
        const ChatLimits& limits = hub_->limits;
        const Time now = hub_->now();
        return replies_.take(1, limits.replies, now) &&
               (address_ == nullptr || address_->replies.take(1, limits.address_replies, now));
    }
    void write_charged(const std::string& event) {
        const auto charge = [&](TokenBucket& bucket, const Rate& rate) {
            if (rate.per_second > 0) bucket.charge(static_cast<double>(event.size()), rate, hub_->now());
        };
        charge(replies_, hub_->limits.replies);
        if (address_ != nullptr) charge(address_->replies, hub_->limits.address_replies);
        write_message(event);
    }

    // "/in ROOM LINE" speaks in a room and stays in the current one. Percent-encoded, a name with spaces is one word.
    void dispatch_in(const Message& message, std::string_view rest) {
        const ChatRoom* const previous = current_room();
        const auto name = text::percent_decode(text::consume_until(rest, ' '), false);
        const std::size_t index = membership_index(name ? hub_->find(*name) : nullptr);
        if (index == memberships_.size()) return reply_error("no_room", "You are not in that room.");
        const detail::ChatLine line = detail::ChatLine::parse(rest);
        if (line.command == "in") return reply_error("bad_command", "/in ROOM LINE");
        if (!line.tag.empty() && !tag_.empty()) return reply_error("bad_tag", "A line has one tag.");
        if (detail::ChatLine::valid_tag(line.tag)) tag_ = line.tag;
        current_ = index;
        dispatch(message, line);
        const std::size_t back = membership_index(previous);
        if (back != memberships_.size()) current_ = back;
    }

    void dispatch(const Message& message, const detail::ChatLine& line) {
        if (message.binary()) return reply_error("bad_line", "This chat is of text.");
        if (!line.tag.empty() && tag_.empty())
            return reply_error("bad_tag", "A tag is 1 to 64 visible ASCII characters.");
        if (line.command.empty()) return say(ChatEntry::Kind::said, line.rest);
        if (line.command == "in") return dispatch_in(message, line.rest);
        if (!detail::valid_chat_text(line.rest)) return reply_error("bad_text", "Control characters are refused.");
        if (!on_command(line.command, line.rest))
            reply_error("unknown_command",
                        text::concat({"There is no command /", line.command.substr(0, 40), "; /help names all."}));
    }

    // Filters the text. The result says why it is refused. A message with data needs no text.
    Refusal refuse_text(std::string& text, bool may_be_empty = false) {
        const auto is_empty = [&] { return !may_be_empty && detail::all_characters(text, detail::is_white_space); };
        const std::size_t max = hub_->limits.max_text;
        if (memberships_.empty()) return Refusal{"no_room", "You are in no room; /join ROOM."};
        if (muted()) return Refusal{"muted", "You are muted for a while."};
        if (text.size() > max)
            return Refusal{"too_long", text::concat({"A message has at most ", std::to_string(max), " bytes."})};
        if (!detail::valid_chat_text(text)) return Refusal{"bad_text", "Control characters are refused."};
        if (is_empty()) return Refusal{"empty", "There is nothing in that message."};
        if (!filter(text)) return Refusal{"refused", "That message is refused here."};
        if (text.size() > max || !detail::valid_chat_text(text) || is_empty())
            throw Error("ChatHandler::filter: the new text is empty, too long, or contains control characters");
        return {};
    }
    bool muted() const { return hub_->muted(*memberships_[current_].room, *memberships_[current_].user); }

    // `data`: a JSON object, or empty.
    void say(ChatEntry::Kind kind, std::string_view said, std::string_view data = {}) {
        std::string text(said);
        if (!may(ChatAction::say)) return reply_forbidden();
        if (const auto refusal = refuse_text(text, !data.empty())) return reply_error(refusal);
        ChatEntry entry = new_kept_entry(kind);
        entry.text = std::move(text);
        entry.data = data;
        hub_->append(std::move(entry));
    }
    // Says something in the conversation with another user.
    void say_to(const std::string& id, const std::string& name, std::string text, const std::string& tag) {
        if (memberships_.empty()) return write_error("no_room", "You are in no room; /join ROOM.", tag);
        ChatEntry entry = new_kept_entry(ChatEntry::Kind::said);
        entry.room = ChatHub::conversation(user_.id, id);
        entry.user = user_.id;
        entry.to = name;
        entry.text = std::move(text);
        entry.tag = tag;
        hub_->note({"talk", text::concat({user_.id, "\n", id}), name.empty() ? "?" : name, identity_});
        hub_->note({"talk", text::concat({id, "\n", user_.id}), user().name, identity_});
        hub_->append(std::move(entry));
    }
    ChatEntry new_kept_entry(ChatEntry::Kind kind, std::uint64_t target = 0) {
        ChatEntry entry = new_entry(kind);
        entry.author = ChatHub::author_of(*memberships_[current_].user);
        entry.tag = tag_;
        entry.target = target;
        return entry;
    }

    WSCHAT_NOINLINE ChatEntry new_entry(ChatEntry::Kind kind) {
        ChatEntry entry = ChatHub::new_entry(kind, *current_room(), user());
        entry.sender = number_;
        return entry;
    }
    void reply_error(const Refusal& refusal) { reply_error(refusal.code, refusal.sentence); }
    // The answer to a line that waited for the store.
    void write_error(std::string_view code, std::string_view sentence, std::string_view tag) {
        ChatEvent event("error");
        event.add_text("code", code).add_text("text", sentence);
        write_message(event.add_unless_empty("tag", tag).dump());
    }
    // The answer to a line with a tag that has no other one.
    void reply_done() {
        ChatEvent event("ack");
        if (!tag_.empty()) reply(add_room(event));
    }
    void reply_forbidden() { reply_error("forbidden", "You may not do that."); }

    // ---- rooms -----------------------------------------------------------------------------------------------------

    // memberships_.size() if there is none.
    std::size_t membership_index(const ChatRoom* room) const {
        std::size_t index = 0;
        while (index != memberships_.size() && memberships_[index].room != room) ++index;
        return index;
    }

    Refusal refuse_room(std::string_view name) {
        const ChatLimits& limits = hub_->limits;
        if (!detail::valid_chat_name(name, limits.max_room_name))
            return Refusal{"room_bad", text::concat({"The name of a room is 1 to ",
                                                     std::to_string(limits.max_room_name), " bytes of visible text."})};
        if (!is_open()) return Refusal{"forbidden", "The connection has ended."};
        if (!may(ChatAction::join)) return Refusal{"forbidden", "You may not join that room."};
        if (memberships_.size() >= limits.max_rooms_per_connection)
            return Refusal{"room_limit", text::concat({"You are in ", std::to_string(memberships_.size()),
                                                       " rooms already; /leave one."})};
        if (hub_->room_count() >= limits.max_rooms && hub_->find(name) == nullptr)
            return Refusal{"room_limit", "There are too many rooms."};
        return {};
    }

    void join_room(std::string_view name) {
        memberships_.reserve(memberships_.size() + 1);  // push_back() must not fail after connect()
        ChatRoom& room = hub_->room(name);
        memberships_.push_back({&room, &hub_->connect(room, user_, identity_, *this, number_)});
        current_ = memberships_.size() - 1;
    }

    void leave_room(std::size_t index, bool at_once) {
        const Membership left = memberships_[index];
        memberships_[index].on_join_called = false;
        if (left.on_join_called) run_hook("on_leave", [&] { on_leave(*left.room); });
        index = membership_index(left.room);
        if (index == memberships_.size()) return;  // the hook has left the room
        memberships_.erase(memberships_.begin() + static_cast<std::ptrdiff_t>(index));
        if (current_ >= index && current_ != 0) --current_;
        if (Room* members = hub_->members_.find(left.room->name())) members->leave(*this);
        hub_->disconnect(*left.room, *left.user, *this, at_once);
    }

    // Leaves all rooms and the hub. The destructor calls it too, so nothing refers to a destroyed handler.
    void disconnect(bool at_once) {
        while (!memberships_.empty()) run_hook("on_close", [&] { leave_room(memberships_.size() - 1, at_once); });
        if (address_ != nullptr) --std::exchange(address_, nullptr)->connections;
        if (number_ == 0) return;
        hub_->remove_user(user_.id, *this);
        hub_->remove_connection(std::exchange(number_, 0));
    }

    // ---- the history -----------------------------------------------------------------------------------------------

    inline void join_more_rooms();

    void request_history(const ChatRoom& room, const std::optional<HistoryPosition>& position,
                         const std::string& tag = {}) {
        const std::size_t wanted = position ? hub_->limits.history_on_resume : hub_->limits.history_on_join;
        const std::size_t limit = may_read() ? wanted : 0;  // a client that reconnects in a loop gets a gap
        const HistoryRequest history_request{room.name(), position, room.delivered_id_, tag};
        hub_->store().since(room.name(), position, limit, [me = ref(), history_request](HistoryPage page) {
            if (auto* self = static_cast<ChatHandler*>(me.get())) self->on_history(history_request, std::move(page));
        });
    }

    // A connection becomes a member of the room when it has everything that the members have. So it misses nothing and
    // gets nothing twice, even if the store answers late.
    void on_history(const HistoryRequest& requested, HistoryPage page) {
        ChatRoom* chat_room = hub_->find(requested.room);
        if (membership_index(chat_room) == memberships_.size() || !is_open()) return;
        Room& members = hub_->members_[requested.room];
        const bool joining = !members.has(*this);
        if (!page.error.empty()) report_unread(requested, page);
        else if (chat_room->delivered_id_) hub_->trim_to_delivered(*chat_room, page);
        else resume_members(*chat_room, members, page);
        if (joining) write_charged(users_event(*chat_room).dump());
        ChatEvent event = history_event(*chat_room, page, requested.position.has_value());
        write_charged(event.add_unless_empty("tag", requested.tag).dump());
        if (!joining) return;
        // The members may have received more since the request. A working store has those entries now.
        const bool behind =
            page.last_id < chat_room->delivered_id_ && requested.delivered_id < chat_room->delivered_id_;
        if (page.error.empty() && behind) return request_history(*chat_room, HistoryPosition{page.epoch, page.last_id});
        members.join(*this);
        request_read_marker(chat_room->name());
        memberships_[membership_index(chat_room)].on_join_called = true;
        run_hook("on_join", [&] { on_join(*chat_room); });
    }
    // The client can ask for the same entries later.
    void report_unread(const HistoryRequest& requested, HistoryPage& page) {
        page.gap = true;
        page.epoch = requested.position ? requested.position->epoch : "";
        page.last_id = requested.position ? requested.position->id : 0;
        server().report(LogLevel::error, "chat_not_read", {{"room", requested.room}, {"cause", page.error}});
    }
    // Every read has failed so far. The members get what this one has found.
    void resume_members(ChatRoom& room, Room& members, HistoryPage page) {
        hub_->trim_to_delivered(room, page);
        page.gap = true;
        for (const auto& [key, user] : room.presence_)
            for (ChatHandler* each : user.connections)
                if (each != this && members.has(*each))
                    each->write_message(each->history_event(room, page, true).dump());
    }

    // ---- conversations ---------------------------------------------------------------------------------------------

    // The conversations of a user, one after the other, so that each is charged before the next one is read.
    struct Conversations {
        HandlerRef handler;
        std::vector<ChatFact> facts{};
        std::size_t next = 0;
        bool calling = false, answered = false;
        std::vector<std::string> read{};  // {"user":...,"name":...,"read":...} of those without anything new
    };
    // The client gets what was said in the conversations of its user: after a position in "?peer=ID%20EPOCH-ID", or
    // after the read marker. A conversation without anything new is only in "peers".
    void request_conversations() {
        hub_->with_markers(user_.id, [me = ref(), hub = hub_, id = user_.id] {
            if (me.get() == nullptr) return;
            hub->store().facts("talk", id + "\n", [me](std::vector<ChatFact> facts, const std::string&) {
                if (me.get() == nullptr || facts.empty()) return;
                auto all = std::make_shared<Conversations>(Conversations{me, std::move(facts)});
                static_cast<ChatHandler*>(me.get())->continue_conversations(all);
            });
        });
    }
    // A store that answers at once must not add a call to the stack for each conversation.
    void continue_conversations(const std::shared_ptr<Conversations>& all) {
        while (is_open() && all->next != all->facts.size()) {
            const ChatFact& fact = all->facts[all->next++];
            all->calling = true;
            all->answered = false;
            request_conversation(all, fact.key.substr(fact.key.find('\n') + 1), fact.value);
            all->calling = false;
            if (!all->answered) return;
        }
        if (!is_open() || all->read.empty()) return;
        detail::JsonList list;
        for (const std::string& each : all->read) list.add(each);
        write_charged(ChatEvent("peers").add_json("peers", list.dump()).dump());
    }
    inline void request_conversation(const std::shared_ptr<Conversations>& all, const std::string& peer,
                                     const std::string& name);
    inline void write_conversation(const std::string& peer, std::string_view name, const HistoryPage& page,
                                   bool resumed, std::uint64_t before, std::string_view tag);
    // False: nothing is newer than the read marker.
    inline bool on_conversation(const std::string& peer, const std::string& name, const HistoryPage& page,
                                bool resumed);
    // Of a room, or of "@" and the id of a peer.
    void request_read_marker(const std::string& what) {
        if (identity_.empty()) return;
        hub_->with_markers(user_.id, [me = ref(), what] {
            if (auto* self = static_cast<ChatHandler*>(me.get())) self->send_read_marker(what, {});
        });
    }
    inline void send_read_marker(const std::string& what, std::string_view tag);
    inline void mark_read(const std::string& what, std::uint64_t id, const std::string& tag);

    // The store's answer to /before and /search becomes the end of this event.
    ChatStore::PageCallback answer_with_page(ChatEvent event) {
        return
            [me = ref(), event = std::move(event), room = current_room()->name(), tag = tag_](const HistoryPage& page) {
                auto* self = static_cast<ChatHandler*>(me.get());
                if (self != nullptr) self->on_page(event, room, tag, page);
            };
    }
    inline void on_page(ChatEvent event, const std::string& room_name, const std::string& tag, const HistoryPage& page);

    template <class MakeEvent>
    detail::JsonList newest_events(const HistoryPage& page, MakeEvent&& make_event) const;
    inline detail::JsonList page_events(const ChatRoom& room, const HistoryPage& page) const;
    inline ChatEvent history_event(const ChatRoom& room, const HistoryPage& page, bool resumed) const;
    static inline ChatEvent users_event(const ChatRoom& room);

    ChatHub* hub_ = nullptr;
    ChatUser user_;
    std::string identity_;
    std::uint64_t number_ = 0;  // in the hub
    ChatHub::AddressUse* address_ = nullptr;
    detail::FloodLimiter limiter_;
    detail::FloodPolicy flood_policy_;
    TokenBucket replies_;
    std::vector<Membership> memberships_;
    std::size_t current_ = 0;
    std::string tag_;  // of the line in progress
    bool connected_ = false;
    bool kicked_ = false;
};

inline bool ChatReply::accept(ChatUser user) const {
    return reply_.accept(
        [user = std::move(user)](WebSocketHandler& handler) { return static_cast<ChatHandler&>(handler).admit(user); });
}

// ---- commands ------------------------------------------------------------------------------------------------------

namespace detail {

// The built-in commands. An object handles one line.
class ChatCommands {
public:
    explicit ChatCommands(ChatHandler& handler) : handler_(handler), room_(handler.current_room()) {}

    // False: there is no such command.
    bool run(std::string_view name, std::string_view rest) {
        for (const Command& command : commands()) {
            if (command.name != name || command.run == nullptr) continue;
            if (command.action && !handler_.may(*command.action)) handler_.reply_forbidden();
            else if (command.reads && !handler_.may_read())
                error("flood", "You have asked for too much. Wait a little.");
            else (this->*command.run)(rest);
            return true;
        }
        return false;
    }

private:
    struct Command {
        std::string_view name, usage, description;
        void (ChatCommands::*run)(std::string_view rest);
        std::optional<ChatAction> action{};  // that the user must be allowed to do
        bool reads = false;                  // the answer may be long
    };

    static const std::array<Command, 25>& commands() {
        static constexpr std::array<Command, 25> all = {{
            {"me", "/me TEXT", "says what you do", &ChatCommands::me},
            {"edit", "/edit ID TEXT", "changes your message with that id", &ChatCommands::edit, ChatAction::say},
            {"delete", "/delete ID", "removes your message with that id", &ChatCommands::remove},
            {"react", "/react ID EMOJI", "reacts to a message; once more takes it back", &ChatCommands::react,
             ChatAction::say},
            {"data", "/data JSON [TEXT]", "says something with a JSON object for programs", &ChatCommands::data},
            {"msg", "/msg NAME|@ID TEXT", "says something to one user alone", &ChatCommands::msg,
             ChatAction::private_message},
            {"read", "/read [@ID] NUMBER", "remembers what you have read", &ChatCommands::read},
            {"who", "/who", "who is in this room", &ChatCommands::who, {}, true},
            {"nick", "/nick NAME", "changes your name in this room", &ChatCommands::nick},
            {"rooms", "/rooms", "which rooms there are", &ChatCommands::rooms, ChatAction::list_rooms, true},
            {"join", "/join ROOM [EPOCH-ID]", "goes to a room, or speaks in it again", &ChatCommands::join, {}, true},
            {"in", "/in ROOM LINE", "speaks in another of your rooms", nullptr},
            {"leave", "/leave [ROOM]", "leaves this room or another", &ChatCommands::leave},
            {"since", "/since EPOCH-ID", "what was said after that position", &ChatCommands::since, {}, true},
            {"before",
             "/before ID [LIMIT]",
             "what was said before the message with that id",
             &ChatCommands::before,
             {},
             true},
            {"search", "/search WORDS", "which messages contain the words", &ChatCommands::search, {}, true},
            {"typing", "/typing [stop]", "shows the others that you write", &ChatCommands::typing},
            {"help", "/help", "this list", &ChatCommands::help},
            {"topic", "/topic [TEXT]", "sets or clears the topic of this room", &ChatCommands::topic,
             ChatAction::topic},
            {"kick", "/kick NAME [REASON]", "ends the connections of a user", &ChatCommands::kick, ChatAction::kick},
            {"ban", "/ban NAME|ADDRESS [SECONDS]", "refuses a user for an hour", &ChatCommands::ban, ChatAction::ban},
            {"unban", "/unban NAME|ADDRESS", "ends a ban", &ChatCommands::unban, ChatAction::ban},
            {"bans", "/bans", "who is banned", &ChatCommands::bans, ChatAction::ban, true},
            {"mute", "/mute NAME [SECONDS]", "silences a user for ten minutes", &ChatCommands::mute, ChatAction::mute},
            {"unmute", "/unmute NAME", "lets a user speak again", &ChatCommands::unmute, ChatAction::mute},
        }};
        return all;
    }

    void me(std::string_view rest) { handler_.say(ChatEntry::Kind::action, rest); }

    void data(std::string_view rest) {
        const std::string_view line = rest;
        const std::size_t max = handler_.hub_->limits.max_data;
        const bool is_json = text::starts_with(rest, "{") && consume_json(rest);
        std::string_view json = line.substr(0, line.size() - rest.size());
        if (!is_json || json.size() > max)
            return error("bad_data", text::concat({"/data JSON [TEXT], with a JSON object of at most ",
                                                   std::to_string(max), " bytes and 32 levels."}));
        handler_.say(ChatEntry::Kind::said, rest, text::trim(json));
    }

    // The store answers: it knows the message and its author.
    void edit(std::string_view rest) {
        ChatHub& hub = *handler_.hub_;
        const auto id = ChatHandler::to_number(text::consume_until(rest, ' '));
        std::string text(rest);
        if (!id) return error("bad_command", "/edit ID TEXT");
        if (const auto refusal = handler_.refuse_text(text)) return handler_.reply_error(refusal);
        if (hub.limits.edit_for == Duration::zero()) return error("too_late", "Messages cannot be changed here.");
        ChatEntry entry = handler_.new_kept_entry(ChatEntry::Kind::edit, *id);
        entry.text = std::move(text);
        const auto age = std::chrono::duration_cast<std::chrono::milliseconds>(hub.limits.edit_for).count();
        entry.not_before = unix_ms() - age;
        hub.append(std::move(entry));
    }
    void remove(std::string_view rest) {
        const auto id = ChatHandler::to_number(rest);
        if (!id) return error("bad_command", "/delete ID");
        if (room_ == nullptr) return reply_no_room();
        ChatEntry entry = handler_.new_kept_entry(ChatEntry::Kind::remove, *id);
        entry.moderator = handler_.may(ChatAction::remove);
        handler_.hub_->append(std::move(entry));
    }
    void react(std::string_view rest) {
        const auto id = ChatHandler::to_number(text::consume_until(rest, ' '));
        const auto is_visible = [](char32_t c) { return c > ' ' && !is_white_space(c); };
        const bool valid = !rest.empty() && rest.size() <= handler_.hub_->limits.max_emoji && valid_chat_text(rest) &&
                           all_characters(rest, is_visible);
        if (!id || !valid) return error("bad_command", "/react ID EMOJI");
        if (room_ == nullptr) return reply_no_room();
        if (handler_.muted()) return error("muted", "You are muted for a while.");
        ChatEntry entry = handler_.new_kept_entry(ChatEntry::Kind::react, *id);
        entry.text = rest;
        handler_.hub_->append(std::move(entry));
    }
    void topic(std::string_view rest) {
        const std::size_t max = handler_.hub_->limits.max_topic;
        if (room_ == nullptr) return reply_no_room();
        if (rest.size() > max)
            return error("too_long", text::concat({"A topic has at most ", std::to_string(max), " bytes."}));
        ChatEntry entry = handler_.new_kept_entry(ChatEntry::Kind::topic);
        entry.text = rest;
        handler_.hub_->append(std::move(entry));
    }

    void msg(std::string_view rest) {
        if (text::starts_with(rest, "@")) return msg_to_id(rest.substr(1));
        const Presence::User* receiver = consume_user(rest);
        std::string text(rest);
        if (room_ != nullptr && receiver == nullptr) return reply_unknown_user();
        if (const auto refusal = handler_.refuse_text(text)) return handler_.reply_error(refusal);
        const bool kept = !handler_.identity_.empty() && !receiver->identity.empty();
        if (kept) return handler_.say_to(receiver->info.id, receiver->info.name, std::move(text), handler_.tag_);
        if (receiver->expires != (Time::max)())
            return error("user_away", text::concat({receiver->info.name, " has lost the connection; try again soon."}));
        if (!handler_.tag_.empty() && is_duplicate())
            return handler_.reply(ChatEvent("ack").add_text("room", room_->name()));
        ChatEntry entry = handler_.new_entry(ChatEntry::Kind::private_message);
        entry.text = std::move(text);
        entry.to = receiver->info.name;
        entry.tag = handler_.tag_;
        handler_.hub_->forward(std::move(entry));
    }
    // A user with a key or an account gets it also later.
    void msg_to_id(std::string_view rest) {
        const std::string id(text::consume_until(rest, ' '));
        std::string text(rest);
        if (const auto refusal = handler_.refuse_text(text)) return handler_.reply_error(refusal);
        if (handler_.identity_.empty())
            return error("forbidden", "Only users with a key or an account write to users by their ids.");
        if (!ChatHandler::is_user_id(id)) return error("unknown_user", "There is no user with that id.");
        handler_.hub_->store().facts(
            "user", id,
            [me = handler_.ref(), id, text = std::move(text), tag = handler_.tag_](const std::vector<ChatFact>& facts,
                                                                                   const std::string&) {
                auto* self = static_cast<ChatHandler*>(me.get());
                if (self == nullptr) return;
                if (!facts.empty() && facts[0].key == id) return self->say_to(id, "", text, tag);
                self->write_error("unknown_user", "There is no user with that id.", tag);
            });
    }
    void read(std::string_view rest) {
        std::string what = room_ == nullptr ? "" : room_->name();
        if (text::starts_with(rest, "@")) what = text::consume_until(rest, ' ');
        const auto id = ChatHandler::to_number(rest);
        if (!id) return error("bad_command", "/read [@ID] NUMBER");
        if (what.empty()) return reply_no_room();
        if (handler_.identity_.empty()) return error("forbidden", "A guest without a key has no read markers.");
        if (what[0] == '@' && !ChatHandler::is_user_id(what.substr(1))) return reply_no_conversation();
        handler_.hub_->with_markers(handler_.user_.id, [me = handler_.ref(), what, id = *id, tag = handler_.tag_] {
            if (auto* self = static_cast<ChatHandler*>(me.get())) self->mark_read(what, id, tag);
        });
    }
    // Remembers the tags of a user's latest private messages, because the store does not keep the messages.
    bool is_duplicate() {
        std::vector<std::string>& tags = membership().user->tags;
        if (text::contains(tags, handler_.tag_)) return true;
        if (tags.size() == 64) tags.erase(tags.begin());
        tags.push_back(std::string(handler_.tag_));
        return false;
    }

    // Pages send it at each change of the input. So an error goes only to a line with a tag.
    void typing(std::string_view rest) {
        const bool tagged = !handler_.tag_.empty();
        if (room_ == nullptr) return tagged ? reply_no_room() : void();
        if (!handler_.may(ChatAction::say)) return tagged ? handler_.reply_forbidden() : void();
        if (handler_.muted()) return tagged ? error("muted", "You are muted for a while.") : void();
        ChatEntry entry = handler_.new_entry(ChatEntry::Kind::typing);
        entry.text = rest == "stop" ? "stop" : "";
        handler_.hub_->forward(std::move(entry));
        handler_.reply_done();
    }

    void who(std::string_view) {
        if (room_ == nullptr) return reply_no_room();
        handler_.write_charged(ChatHandler::users_event(*room_).add_unless_empty("tag", handler_.tag_).dump());
    }

    void rooms(std::string_view) {
        JsonList list;
        for (const auto& [name, room] : handler_.hub_->rooms_)
            if (!room.presence_.empty() && list.size() < 500)
                list.add(Json{{"room", name}, {"users", room.presence_.size()}}.dump());
        ChatEvent event("rooms");
        handler_.write_charged(event.add_json("rooms", list.dump()).add_unless_empty("tag", handler_.tag_).dump());
    }

    void nick(std::string_view rest) {
        const std::string name(rest);
        ChatHub& hub = *handler_.hub_;
        if (handler_.user_.account) return error("name_fixed", "Your name is that of your account.");
        if (!handler_.may(ChatAction::rename)) return handler_.reply_forbidden();
        if (!valid_chat_name(name, hub.limits.max_name)) return error("name_bad", handler_.name_rule());
        if (hub.banned("unix", name, "")) return error("name_banned", "That name is banned.");
        if (room_ == nullptr) return reply_no_room();
        if (name == handler_.user().name) return handler_.reply_done();
        if (handler_.muted()) return error("muted", "You are muted for a while.");
        Presence::User& user = *membership().user;
        const Presence::User* holder = room_->presence_.find(name);
        if (holder != nullptr && holder != &user)
            return error("name_taken",
                         text::concat({"That name is taken; ", room_->presence_.free_name(name), " is free."}));
        handler_.user_.name = name;
        hub.rename(*room_, user, name, handler_.number_, handler_.tag_);
    }

    // "/join ROOM EPOCH-ID" brings what was said after that position.
    void join(std::string_view rest) {
        std::optional<HistoryPosition> position;
        const std::size_t space = rest.rfind(' ');
        if (space != std::string_view::npos) position = HistoryPosition::parse(rest.substr(space + 1));
        if (position && position->epoch.empty()) position.reset();  // the number belongs to the name
        if (position) rest = rest.substr(0, space);
        const std::size_t index = handler_.membership_index(handler_.hub_->find(rest));
        if (index != handler_.memberships_.size()) {
            handler_.current_ = index;
            reply_room();
            if (position) handler_.request_history(*handler_.current_room(), position);
            return;
        }
        if (const auto refusal = handler_.refuse_room(rest)) return handler_.reply_error(refusal);
        handler_.join_room(rest);
        reply_room();
        handler_.request_history(*handler_.current_room(), position);
    }
    void leave(std::string_view rest) {
        const std::size_t index = handler_.membership_index(rest.empty() ? room_ : handler_.hub_->find(rest));
        if (index == handler_.memberships_.size()) return error("no_room", "You are not in that room.");
        handler_.leave_room(index, true);
        reply_room();
    }
    void reply_room() {
        ChatEvent event("room");
        handler_.add_room(event).add_text("name", handler_.user().name);
        if (const ChatRoom* room = handler_.current_room()) event.add_unless_empty("topic", room->topic());
        handler_.reply(event);
    }

    void since(std::string_view rest) {
        if (text::starts_with(rest, "@")) return conversation_since(rest.substr(1));
        const auto position = HistoryPosition::parse(rest);
        if (!position || room_ == nullptr) return error("bad_command", "/since EPOCH-ID, in a room.");
        handler_.request_history(*room_, position, handler_.tag_);
    }
    // In a conversation: "@ID EPOCH-ID".
    void conversation_since(std::string_view rest) {
        const std::string peer(text::consume_until(rest, ' '));
        const auto position = HistoryPosition::parse(rest);
        if (!position) return error("bad_command", "/since @ID EPOCH-ID");
        if (!has_conversations(peer)) return reply_no_conversation();
        handler_.hub_->store().since(ChatHub::conversation(handler_.user_.id, peer), position,
                                     handler_.hub_->limits.history_on_resume, answer_in_conversation(peer, 0));
    }
    // In a conversation: "@ID NUMBER [LIMIT]".
    void conversation_before(std::string_view rest) {
        const std::string peer(text::consume_until(rest, ' '));
        const auto id = ChatHandler::to_number(text::consume_until(rest, ' '));
        const auto limit = page_limit(rest);
        if (!id || !limit) return error("bad_command", "/before @ID NUMBER [LIMIT]");
        if (!has_conversations(peer)) return reply_no_conversation();
        handler_.hub_->store().before(ChatHub::conversation(handler_.user_.id, peer), *id, *limit,
                                      answer_in_conversation(peer, *id));
    }
    bool has_conversations(const std::string& peer) const {
        return !handler_.identity_.empty() && ChatHandler::is_user_id(peer);
    }
    void reply_no_conversation() { error("unknown_user", "You have no conversation with such a user."); }
    ChatStore::PageCallback answer_in_conversation(const std::string& peer, std::uint64_t before) {
        return [me = handler_.ref(), peer, before, tag = handler_.tag_](const HistoryPage& page) {
            if (auto* self = static_cast<ChatHandler*>(me.get()))
                self->write_conversation(peer, {}, page, true, before, tag);
        };
    }
    // How many entries the client wants; nothing if that is no number.
    std::optional<std::size_t> page_limit(std::string_view rest) const {
        const ChatLimits& limits = handler_.hub_->limits;
        if (rest.empty()) return limits.history_on_join;
        const auto wanted = ChatHandler::to_number(rest);
        if (!wanted) return std::nullopt;
        return static_cast<std::size_t>((std::min)(*wanted, std::uint64_t{limits.history_on_resume}));
    }

    void before(std::string_view rest) {
        if (text::starts_with(rest, "@")) return conversation_before(rest.substr(1));
        const auto id = ChatHandler::to_number(text::consume_until(rest, ' '));
        const auto limit = page_limit(rest);
        if (!id || !limit || room_ == nullptr) return error("bad_command", "/before ID [LIMIT], in a room.");
        const std::uint64_t newest = room_->delivered_id_ ? *room_->delivered_id_ + 1 : *id;
        ChatEvent event("history");
        event.add_text("room", room_->name()).add("before", *id).add_json("gap", "false");
        handler_.hub_->store().before(room_->name(), (std::min)(*id, newest), *limit, handler_.answer_with_page(event));
    }
    void search(std::string_view rest) {
        if (room_ == nullptr) return reply_no_room();
        if (ChatStore::search_words(rest).empty()) return error("bad_command", "/search WORDS, in a room.");
        ChatEvent event("search");
        event.add_text("room", room_->name()).add_text("words", rest);
        handler_.hub_->store().search(room_->name(), std::string(rest), handler_.hub_->limits.history_on_join,
                                      handler_.answer_with_page(event));
    }

    void help(std::string_view) {
        JsonList list;
        for (const Command& command : commands())
            if (!command.action || *command.action < ChatAction::kick || handler_.may(*command.action))
                list.add(Json{{"command", command.usage}, {"text", command.description}}.dump());
        handler_.reply(ChatEvent("help").add_json("commands", list.dump()));
    }

    void kick(std::string_view rest) {
        const Presence::User* user = consume_user(rest);
        if (user == nullptr) return reply_unknown_user();
        const std::string name = user->info.name;
        report("kick", name, 0);
        handler_.hub_->kick(*room_, name, rest.empty() ? "You were asked to leave." : rest);
    }

    void ban(std::string_view rest) {
        const std::string_view line = rest;
        if (consume_user(rest) == nullptr) text::consume_until(rest, ' ');
        std::string_view target = line.substr(0, line.size() - rest.size());
        if (!target.empty() && target.back() == ' ') target.remove_suffix(1);
        const auto seconds = rest.empty() ? std::uint64_t{3600} : ChatHandler::to_number(rest);
        if (target.empty() || !seconds) return error("bad_command", "/ban NAME|ADDRESS [SECONDS]");
        report(*seconds == 0 ? "unban" : "ban", target, *seconds);
        handler_.hub_->ban(target, to_duration(*seconds));
    }
    void unban(std::string_view rest) {
        if (rest.empty()) return error("bad_command", "/unban NAME|ADDRESS");
        report("unban", rest, 0);
        handler_.hub_->ban(rest, Duration::zero());
    }
    void bans(std::string_view) {
        JsonList list;
        for (const ChatHub::Ban& each : handler_.hub_->bans()) {
            const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(each.left).count();
            list.add(Json{{"ban", each.key}, {"name", each.name}, {"seconds", seconds}}.dump());
        }
        ChatEvent event("bans");
        handler_.write_charged(event.add_json("bans", list.dump()).add_unless_empty("tag", handler_.tag_).dump());
    }

    void mute(std::string_view rest) {
        const Presence::User* user = consume_user(rest);
        const auto seconds = rest.empty() ? std::uint64_t{600} : ChatHandler::to_number(rest);
        if (user == nullptr) return reply_unknown_user();
        if (!seconds) return error("bad_command", "/mute NAME [SECONDS]");
        report(*seconds == 0 ? "unmute" : "mute", user->info.name, *seconds);
        handler_.hub_->mute(*room_, *user, to_duration(*seconds));
    }
    void unmute(std::string_view rest) {
        const Presence::User* user = consume_user(rest);
        if (user == nullptr || !rest.empty()) return reply_unknown_user();
        report("unmute", user->info.name, 0);
        handler_.hub_->mute(*room_, *user, Duration::zero());
    }
    // Tells the moderators of the room and the log.
    void report(std::string_view action, std::string_view target, std::uint64_t seconds) {
        const std::string name(target), room = room_ == nullptr ? "" : room_->name();
        ChatEntry entry;
        if (room_ != nullptr) entry = handler_.new_entry(ChatEntry::Kind::moderation);
        else entry.name = handler_.user().name;
        entry.sender = handler_.number_;
        entry.tag = handler_.tag_;
        handler_.hub_->report_moderation(std::move(entry), action, name, (std::min)(seconds, max_seconds));
        handler_.server().report(LogLevel::info, "chat_moderation",
                                 {{"action", std::string(action)},
                                  {"room", room},
                                  {"name", name},
                                  {"by", handler_.user().name},
                                  {"seconds", std::to_string(seconds)}});
    }

    static constexpr std::uint64_t max_seconds = 315'360'000;  // ten years
    static Duration to_duration(std::uint64_t seconds) {
        return std::chrono::seconds((std::min)(seconds, max_seconds));
    }
    Presence::User* consume_user(std::string_view& text) const {
        return room_ == nullptr ? nullptr : room_->presence_.consume_user(text);
    }
    ChatHandler::Membership& membership() { return handler_.memberships_[handler_.current_]; }
    void error(std::string_view code, std::string_view sentence) { handler_.reply_error(code, sentence); }
    void reply_no_room() { error("no_room", "You are in no room; /join ROOM."); }
    void reply_unknown_user() { error("unknown_user", "Nobody in this room has that name."); }

    ChatHandler& handler_;
    ChatRoom* room_;  // the current room at the beginning of the line
};

WSCHAT_NOINLINE inline ChatEvent entry_event(std::string_view type, const ChatEntry& entry) {
    ChatEvent event(type);
    event.add_text("room", entry.room).add_text("name", entry.name).add_unless_empty("user", entry.user);
    return event;
}
// The reactions to a message, for the user with this identity.
inline std::string reactions_json(const ChatEntry& entry, const std::string& viewer) {
    constexpr std::size_t max_users = 20;
    JsonList list;
    std::vector<std::string_view> emojis;
    for (const ChatEntry::Reaction& first : entry.reactions) {
        if (text::contains(emojis, first.emoji)) continue;
        emojis.push_back(first.emoji);
        std::size_t count = 0;
        bool own = false;
        JsonList users;
        for (const ChatEntry::Reaction& each : entry.reactions) {
            if (each.emoji != first.emoji) continue;
            if (++count <= max_users) users.add(Json(each.user).dump());
            own = own || (!viewer.empty() && each.author == viewer);
        }
        Json reaction{{"emoji", first.emoji}, {"count", count}};
        std::string event = reaction.dump();
        event.back() = ',';
        event += "\"users\":";
        event += users.dump();
        event += own ? ",\"me\":true}" : "}";
        list.add(event);
    }
    return std::string(list.dump());
}

// A kept private message for the user with this public id.
inline ChatEvent private_event(const ChatEntry& entry, const std::string& id, bool with_tag) {
    ChatEvent event("private");
    const std::size_t middle = entry.room.find('\n', 1);
    const std::string first = entry.room.substr(1, middle - 1);
    event.add_text("peer", first == id ? entry.room.substr(middle + 1) : first).add("id", entry.id);
    event.add_text("user", entry.user).add_text("name", entry.name).add_unless_empty("to", entry.to);
    event.add_text("text", entry.text).add("time", entry.time);
    return with_tag ? event.add_unless_empty("tag", entry.tag) : event;
}
// `what`: a room, or "@" with the id of a peer.
inline ChatEvent read_event(const std::string& what, std::uint64_t id) {
    const bool is_peer = text::starts_with(what, "@");
    ChatEvent event("read");
    return event.add_text(is_peer ? "peer" : "room", is_peer ? what.substr(1) : what).add("id", id);
}

// The event of an entry that is kept, or could be, for the user with this identity. Only the author gets the tag.
inline ChatEvent kept_event(const ChatEntry& entry, const std::string& viewer = {}) {
    using Kind = ChatEntry::Kind;
    const char* const type = entry.is_message()           ? "said"
                             : entry.kind == Kind::edit   ? "edit"
                             : entry.kind == Kind::remove ? "remove"
                             : entry.kind == Kind::react  ? "react"
                                                          : "topic";
    ChatEvent event(type);
    event.add_unless_empty("room", entry.room);
    if (entry.id != 0) event.add("id", entry.id);
    if (entry.target != 0) event.add("target", entry.target);
    if (entry.kind == Kind::react) event.add_text("emoji", entry.text).add_json("on", entry.removed ? "false" : "true");
    event.add_unless_empty("user", entry.user).add_text("name", entry.name);
    if (entry.kind != Kind::react && entry.kind != Kind::remove) event.add_text("text", entry.text);
    event.add("time", entry.time);
    if (entry.kind == Kind::action) event.add_json("me", "true");
    if (!entry.data.empty()) event.add_json("data", entry.data);
    if (entry.edited != 0) event.add("edited", entry.edited);
    if (entry.is_message() && entry.removed) event.add_json("removed", "true");
    if (!entry.reactions.empty()) event.add_json("reactions", reactions_json(entry, viewer));
    if (!viewer.empty() && entry.author == viewer) event.add_unless_empty("tag", entry.tag);
    return event;
}

}  // namespace detail

// ---- members that need all classes ---------------------------------------------------------------------------------

inline bool ChatHandler::on_command(std::string_view command, std::string_view rest) {
    return detail::ChatCommands(*this).run(command, rest);
}

// The newest entries that fit into an event.
template <class MakeEvent>
detail::JsonList ChatHandler::newest_events(const HistoryPage& page, MakeEvent&& make_event) const {
    std::size_t bytes = 0;
    std::vector<std::string> events;
    for (std::size_t i = page.entries.size(); i-- > 0 && bytes <= hub_->limits.max_history_event;) {
        events.push_back(make_event(page.entries[i]));
        bytes += events.back().size();
    }
    detail::JsonList list;
    for (std::size_t i = events.size(); i-- > 0;) list.add(events[i]);
    return list;
}
inline detail::JsonList ChatHandler::page_events(const ChatRoom& room, const HistoryPage& page) const {
    const std::string viewer = ChatHub::author_of(*memberships_[membership_index(&room)].user);
    return newest_events(page, [&](const ChatEntry& entry) { return detail::kept_event(entry, viewer).dump(); });
}

// `resumed`: the client asked with a position, so missing entries are a gap.
inline ChatEvent ChatHandler::history_event(const ChatRoom& room, const HistoryPage& page, bool resumed) const {
    const detail::JsonList list = page_events(room, page);
    const bool cut = list.size() != page.entries.size();
    ChatEvent event("history");
    event.add_text("room", room.name()).add_unless_empty("topic", room.topic());
    event.add_unless_empty("epoch", page.epoch).add("last", page.last_id);
    event.add("gap", page.gap || (cut && resumed)).add("more", page.more || cut);
    return event.add_json("entries", list.dump());
}

inline void ChatHandler::request_conversation(const std::shared_ptr<Conversations>& all, const std::string& peer,
                                              const std::string& name) {
    std::optional<HistoryPosition> position;
    for (const std::string& each : request().query_all("peer")) {
        std::string_view rest = each;
        if (text::consume_until(rest, ' ') == peer) position = HistoryPosition::parse(rest);
    }
    const std::size_t wanted = position ? hub_->limits.history_on_resume : hub_->limits.history_on_join;
    const bool resumed = position.has_value();
    const auto answer = [all, peer, name, resumed](const HistoryPage& page) {
        auto* self = static_cast<ChatHandler*>(all->handler.get());
        if (self == nullptr) return;
        if (!self->on_conversation(peer, name, page, resumed)) {
            const std::uint64_t marker = self->hub_->marker_of(self->user_.id, "@" + peer);
            all->read.push_back(Json{{"user", peer}, {"name", name}, {"read", marker}}.dump());
        }
        all->answered = true;
        if (!all->calling) self->continue_conversations(all);
    };
    hub_->store().since(ChatHub::conversation(user_.id, peer), position, may_read() ? wanted : 0, answer);
}

inline bool ChatHandler::on_conversation(const std::string& peer, const std::string& name, const HistoryPage& page,
                                         bool resumed) {
    if (!is_open()) return true;
    const std::uint64_t marker = hub_->marker_of(user_.id, "@" + peer);
    if (resumed || !page.error.empty()) {
        write_conversation(peer, name, page, resumed, 0, {});
    } else {
        if (page.last_id <= marker) return false;
        HistoryPage rest = page;
        const auto is_read = [marker](const ChatEntry& entry) { return entry.id <= marker; };
        auto& entries = rest.entries;
        entries.erase(std::remove_if(entries.begin(), entries.end(), is_read), entries.end());
        rest.more = rest.more || entries.size() != page.entries.size();
        write_conversation(peer, name, rest, false, 0, {});
    }
    if (marker != 0) send_read_marker("@" + peer, {});
    return true;
}

// `before`: the answer to /before with that id.
inline void ChatHandler::write_conversation(const std::string& peer, std::string_view name, const HistoryPage& page,
                                            bool resumed, std::uint64_t before, std::string_view tag) {
    if (!is_open()) return;
    if (!page.error.empty()) server().report(LogLevel::error, "chat_not_read", {{"cause", page.error}});
    if (!page.error.empty() && !tag.empty())
        return write_error("not_read", "The history cannot be read now. Try again soon.", tag);
    std::size_t messages = 0;
    const std::string log = ChatHub::conversation(user_.id, peer);
    HistoryPage said = page;
    auto& entries = said.entries;
    entries.erase(std::remove_if(entries.begin(), entries.end(), [](const ChatEntry& e) { return !e.is_message(); }),
                  entries.end());
    messages = entries.size();
    const detail::JsonList list = newest_events(said, [&](const ChatEntry& kept) {
        ChatEntry entry = kept;
        entry.room = log;
        return detail::private_event(entry, user_.id, entry.user == user_.id).dump();
    });
    const bool cut = list.size() != messages;
    ChatEvent event("history");
    event.add_text("peer", peer).add_unless_empty("name", name);
    if (before != 0) event.add("before", before);
    else event.add_unless_empty("epoch", page.epoch).add("last", page.last_id);
    event.add("gap", before == 0 && (page.gap || !page.error.empty() || (cut && resumed)));
    event.add("more", page.more || cut).add_json("entries", list.dump());
    write_charged(event.add_unless_empty("tag", tag).dump());
}

inline void ChatHandler::send_read_marker(const std::string& what, std::string_view tag) {
    const std::uint64_t marker = hub_->marker_of(user_.id, what);
    if (marker == 0 && tag.empty()) return;
    ChatEvent event = detail::read_event(what, marker);
    write_message(event.add_unless_empty("tag", tag).dump());
}

// A marker never goes back: another device may have read more.
inline void ChatHandler::mark_read(const std::string& what, std::uint64_t id, const std::string& tag) {
    const ChatHub::UserState* const user = hub_->users_.find(user_.id);
    if (user == nullptr) return;
    const std::uint64_t* const marker = user->read.find(what);
    if (marker != nullptr && *marker >= id) return send_read_marker(what, tag);
    if (marker == nullptr && user->read.size() >= hub_->limits.max_read_markers)
        return write_error("read_limit", "You have too many read markers.", tag);
    if (marker != nullptr || what[0] != '@') return hub_->put_marker(*this, what, id, tag);
    const std::string talk = text::concat({user_.id, "\n", std::string_view(what).substr(1)});
    hub_->store().facts("talk", talk,
                        [me = ref(), what, id, tag, talk](const std::vector<ChatFact>& facts, const std::string&) {
                            auto* self = static_cast<ChatHandler*>(me.get());
                            if (self == nullptr) return;
                            if (!facts.empty() && facts[0].key == talk)
                                return self->hub_->put_marker(*self, what, id, tag);
                            self->write_error("unknown_user", "You have no conversation with such a user.", tag);
                        });
}

inline void ChatHandler::on_page(ChatEvent event, const std::string& room_name, const std::string& tag,
                                 const HistoryPage& page) {
    const ChatRoom* const room = hub_->find(room_name);
    if (membership_index(room) == memberships_.size() || !is_open()) return;
    if (!page.error.empty()) {
        server().report(LogLevel::error, "chat_not_read", {{"room", room_name}, {"cause", page.error}});
        event = ChatEvent("error");
        event.add_text("code", "not_read").add_text("text", "The history cannot be read now. Try again soon.");
        write_message(event.add_text("room", room_name).add_unless_empty("tag", tag).dump());
        return;
    }
    const detail::JsonList list = page_events(*room, page);
    event.add("more", page.more || list.size() != page.entries.size()).add_json("entries", list.dump());
    write_charged(event.add_unless_empty("tag", tag).dump());
}

// "?join=ROOM" or "?join=ROOM%20EPOCH-ID". The room of the path stays the current one.
inline void ChatHandler::join_more_rooms() {
    const std::vector<std::string> lines = request().query_all("join");
    const ChatRoom* const first = current_room();
    for (std::size_t i = 0; i < lines.size() && i < hub_->limits.max_rooms_per_connection && is_open(); ++i)
        detail::ChatCommands(*this).run("join", lines[i]);
    const std::size_t index = membership_index(first);
    if (lines.empty() || current_ == index || index == memberships_.size()) return;
    current_ = index;
    ChatEvent event("room");
    reply(add_room(event).add_text("name", user().name));
}

inline ChatEvent ChatHandler::users_event(const ChatRoom& room) {
    detail::JsonList users;
    const std::size_t count = room.presence_.size();
    ChatEvent event("users");
    event.add_text("room", room.name()).add("count", count);
    if (room.counting_ || count > room.hub_.limits.presence_list) return event;
    for (const auto& [key, user] : room.presence_) {
        std::string text = Json{{"user", user.info.id}, {"name", user.info.name}}.dump();
        if (!user.info.about.empty()) {
            text.back() = ',';
            text += text::concat({"\"about\":", user.info.about, "}"});
        }
        users.add(text);
    }
    return event.add_json("users", users.dump());
}

inline void ChatHub::send_count(const ChatRoom& room) {
    if (Room* members = members_.find(room.name())) members->broadcast(ChatHandler::users_event(room).dump());
}

inline ChatEntry ChatRoom::new_text(const char* call, std::string_view text, std::string_view name) const {
    if (!detail::valid_chat_text(text))
        throw Error(std::string(call) + ": the text holds control characters, or is not UTF-8");
    ChatEntry entry = ChatHub::new_entry(ChatEntry::Kind::said, *this, name);
    entry.text = text;
    return entry;
}
inline void ChatRoom::publish(std::string_view text, std::string_view name) {
    hub_.append(new_text("publish", text, name));
}
inline void ChatRoom::broadcast(std::string_view text, std::string_view name) {
    hub_.forward(new_text("broadcast", text, name));
}
inline void ChatRoom::send(std::string_view name, const Json& data) {
    ChatEntry entry = hub_.new_own_event("ChatRoom::send", name, data);
    entry.room = name_;
    hub_.forward(std::move(entry));
}
inline void ChatRoom::edit(std::uint64_t id, std::string_view text) {
    ChatEntry entry = new_text("edit", text, {});
    entry.kind = ChatEntry::Kind::edit;
    entry.target = id;
    hub_.append(std::move(entry));
}
inline void ChatRoom::remove(std::uint64_t id) {
    ChatEntry entry = ChatHub::new_entry(ChatEntry::Kind::remove, *this, "");
    entry.target = id;
    entry.moderator = true;
    hub_.append(std::move(entry));
}
inline void ChatRoom::set_topic(std::string_view text) {
    if (text.size() > hub_.limits.max_topic)
        throw Error("ChatRoom::set_topic: the topic is longer than ChatLimits::max_topic");
    ChatEntry entry = new_text("set_topic", text, {});
    entry.kind = ChatEntry::Kind::topic;
    entry.sender = hub_.first_number_;
    hub_.append(std::move(entry));
}
inline void ChatRoom::since(std::optional<HistoryPosition> position, std::size_t limit,
                            ChatStore::PageCallback callback) {
    hub_.store().since(name_, std::move(position), limit, std::move(callback));
}
inline bool ChatRoom::kick(std::string_view name, std::string_view reason) {
    const detail::Presence::User* user = presence_.find(name);
    if (user == nullptr) return false;
    const std::string who = user->info.name;
    hub_.report_moderation(ChatHub::new_entry(ChatEntry::Kind::moderation, *this, ""), "kick", who, 0);
    hub_.kick(*this, who, reason);
    return true;
}
inline bool ChatRoom::mute(std::string_view name, Duration duration) {
    const detail::Presence::User* user = presence_.find(name);
    if (user != nullptr) hub_.mute(*this, *user, duration);
    return user != nullptr;
}

inline void ChatHub::ban(std::string_view address_or_name, Duration duration) {
    const std::string target(address_or_name);
    if (duration <= Duration::zero()) {
        const std::string folded = name_key(target), address = address_key(target);
        for (const Ban& each : bans())
            if (each.key == folded || each.key == address || name_key(each.name) == folded)
                decide("ban", each.key, "", Duration::zero());
        return;
    }
    bool is_user = false;
    for (const auto& [name, room] : rooms_) {
        const User* user = room.presence_.find(target);
        if (user == nullptr) continue;
        is_user = true;
        if (!user->identity.empty()) {
            decide("ban", user_key(user->info.id), target, duration);
            continue;
        }
        for (const ChatHandler* each : std::vector<ChatHandler*>(user->connections))
            ban_lone_address(*each, target, duration);
    }
    const bool is_address = target == "unix" || IpAddress::parse(target).has_value();
    decide("ban", is_address && !is_user ? address_key(target) : name_key(target), target, duration);
}
inline void ChatHub::ban_lone_address(const ChatHandler& handler, const std::string& name, Duration duration) {
    const std::string key = address_key(handler.remote_address());
    for (const auto& [number, other] : connections_)
        if (other.user_.id != handler.user_.id && address_key(other.remote_address()) == key) return;
    decide("ban", key, name, duration);
}

// A read marker goes to all connections of its user. Its key is the public id of the user, a line feed, and a room or
// "@" with the id of a peer.
inline void ChatHub::on_read(const ChatFact& fact) {
    const std::size_t end = fact.key.find('\n');
    const std::string id = fact.key.substr(0, end), what = fact.key.substr(end + 1);
    const std::vector<Asked> asked = take_asked(fact);
    UserState* const user = users_.find(id);
    if (user == nullptr) return;
    if (fact.value.empty()) {
        user->read.erase(what);
        return;
    }
    const std::uint64_t value = text::parse_unsigned(fact.value, HistoryPosition::max_id).value_or(0);
    std::uint64_t& marker = user->read.find_or_emplace(what, std::uint64_t{0});
    const bool is_new = value > marker;
    // Another server did not know that this user has read more.
    if (value < marker) store_->put({"read", fact.key, std::to_string(marker), fact.author});
    else marker = value;
    for (ChatHandler* each : connections_of(id)) {
        const auto is_own = [each](const Asked& one) { return one.number == each->number_; };
        const auto own = std::find_if(asked.begin(), asked.end(), is_own);
        if (own != asked.end()) each->send_read_marker(what, own->tag);
        else if (is_new) each->send_read_marker(what, {});
    }
}
inline std::vector<ChatHub::Asked> ChatHub::take_asked(const ChatFact& fact) {
    const std::string key = text::concat({fact.key, "\n", fact.value});
    std::vector<Asked>* const found = asked_.find(key);
    if (found == nullptr) return {};
    std::vector<Asked> asked = std::move(*found);
    asked_.erase(key);
    return asked;
}
inline void ChatHub::put_marker(const ChatHandler& handler, const std::string& what, std::uint64_t id,
                                const std::string& tag) {
    ChatFact fact{"read", text::concat({handler.user_.id, "\n", what}), std::to_string(id), handler.identity_};
    asked_.find_or_emplace(text::concat({fact.key, "\n", fact.value})).push_back({handler.number_, tag});
    store_->put(std::move(fact));
}
inline void ChatHub::on_fact_failure(const ChatFact& fact, const std::string& cause) {
    server_.report(LogLevel::error, "chat_not_kept", {{"fact", fact.scope}, {"cause", cause}});
    if (fact.scope != "read") return;
    for (const Asked& one : take_asked(fact))
        if (ChatHandler* const handler = connection(one.number))
            handler->write_error("not_kept", "That could not be stored. Try again soon.", one.tag);
}

inline void ChatHub::on_fact(const ChatFact& fact) {
    if (fact.scope == "read") return on_read(fact);
    if (fact.value.empty()) noted_.erase(text::concat({fact.scope, "\n", fact.key}));
    const bool is_ban = fact.scope == "ban";
    if (!is_ban && fact.scope != "mute") return;
    const Duration left = fact.value.empty() ? Duration::zero() : std::chrono::milliseconds(fact.expires - unix_ms());
    (is_ban ? bans_ : mutes_).set(fact.key, fact.value, left, now());
    if (!is_ban || left <= Duration::zero()) return;
    for (const auto& [number, handler] : connections_) {
        const std::string address = handler.remote_address();
        bool found = banned(address, "", handler.known_id());
        for (const auto& membership : handler.memberships_)
            found = found || banned(address, membership.user->info.name, "");
        if (found) handler.end_with("ban", "You are banned.", left);
    }
}

inline ChatHub::User& ChatHub::connect(ChatRoom& room, const ChatUser& info, const std::string& identity,
                                       ChatHandler& handler, std::uint64_t number) {
    User* holder = room.presence_.find(info.name);
    // A guest has no key, so this may be another guest. The one who is away leaves now.
    if (holder != nullptr && holder->identity.empty() && holder->connections.empty() && !holder->remote) {
        const ChatUser left = holder->info;
        room.presence_.remove(*std::exchange(holder, nullptr));
        announce_leave(room, left);
    }
    // An account owns its name, so a visitor with that name gets another one.
    if (info.account && holder != nullptr && !holder->info.account)
        rename(room, *holder, room.presence_.free_name(info.name));
    const detail::Presence::Connected connected = room.presence_.connect(info, identity, &handler);
    if (!connected.joined) return connected.user;
    try {
        ChatEntry entry = new_entry(ChatEntry::Kind::join, room, connected.user.info);
        entry.text = info.about;
        entry.sender = number;
        forward(std::move(entry));
    } catch (...) {
        detail::Presence::detach(connected.user, &handler, now());
        throw;
    }
    return connected.user;
}

inline std::size_t ChatHub::send(const std::string& user_id, std::string_view name, const Json& data) {
    ChatEntry entry = new_own_event("ChatHub::send", name, data);
    entry.kind = ChatEntry::Kind::direct;
    entry.to_user = user_id;
    forward(std::move(entry));
    return connections_of(user_id).size();
}
inline ChatEntry ChatHub::new_own_event(const char* call, std::string_view name, const Json& data) const {
    if (!detail::valid_chat_name(name, 64))
        throw Error(std::string(call) + ": the name of an event is 1 to 64 bytes of visible text");
    if (data.dump().size() > limits.max_data || !detail::valid_json(data.dump()))
        throw Error(std::string(call) + ": the data is longer than ChatLimits::max_data, or is no JSON");
    ChatEntry entry;
    entry.kind = ChatEntry::Kind::event;
    entry.text = name;
    entry.data = data.dump();
    return entry;
}
// Its type keeps it apart from the events of the chat.
inline void ChatHub::on_own_event(const ChatEntry& entry) {
    ChatEvent event("event");
    event.add_unless_empty("room", entry.room).add_text("name", entry.text);
    event.add_json("data", entry.data).add("time", entry.time);
    if (entry.kind == ChatEntry::Kind::event) return send_to_others(entry, event);
    for (ChatHandler* each : connections_of(entry.to_user)) each->write_message(event.dump());
}

inline void ChatHub::kick(const ChatRoom& room, const std::string& name, std::string_view reason) {
    const User* const user = room.presence_.find(name);
    if (user == nullptr) return;
    tell_decision({"kick", mute_key(room, *user), user->info.name});
    ChatEntry entry = new_entry(ChatEntry::Kind::kick, room, "");
    entry.to = user->info.name;
    entry.to_user = user->info.id;
    entry.text = reason;
    forward(std::move(entry));
}
inline void ChatHub::on_kick(const ChatEntry& entry) {
    const ChatRoom* const room = find(entry.room);
    const User* const user = room == nullptr ? nullptr : room->presence_.find(entry.to);
    if (user == nullptr || user->info.id != entry.to_user) return;
    for (ChatHandler* each : std::vector<ChatHandler*>(user->connections)) each->kick(entry.text);
}
// The moderators of the room and the one who acts hear of it.
inline void ChatHub::on_moderation(const ChatEntry& entry) {
    ChatEvent event("moderation");
    event.add_unless_empty("room", entry.room).add_text("action", entry.text).add_text("name", entry.to);
    if (entry.data != "0") event.add_json("seconds", entry.data);
    event.add_text("by", entry.name);
    ChatHandler* const sender = connection(entry.sender);
    if (sender != nullptr) sender->write_message(ChatEvent(event).add_unless_empty("tag", entry.tag).dump());
    const ChatRoom* const room = find(entry.room);
    if (room == nullptr) return;
    const auto has = [&](const char* word) { return entry.text.find(word) != std::string::npos; };
    const ChatAction action = has("ban") ? ChatAction::ban : has("mute") ? ChatAction::mute : ChatAction::kick;
    for (ChatHandler* each : connections_in(*room)) {
        bool moderates = false;
        if (each != sender) each->run_hook("may", [&] { moderates = each->may(action); });
        if (moderates) each->write_message(event.dump());
    }
}
inline void ChatHub::on_entry(const ChatEntry& entry) {
    deliver(entry);
    if (on_event && entry.kind != ChatEntry::Kind::typing) run_hook("ChatHub::on_event", [&] { on_event(entry); });
}
inline void ChatHub::deliver(const ChatEntry& entry) {
    switch (entry.kind) {
        case ChatEntry::Kind::said:
        case ChatEntry::Kind::action:
        case ChatEntry::Kind::edit:
        case ChatEntry::Kind::remove:
        case ChatEntry::Kind::react:
        case ChatEntry::Kind::topic: return on_kept(entry);
        case ChatEntry::Kind::private_message: return on_private_message(entry);
        case ChatEntry::Kind::typing: return on_typing(entry);
        case ChatEntry::Kind::join: return on_join(entry);
        case ChatEntry::Kind::leave: return on_leave(entry);
        case ChatEntry::Kind::rename: return on_rename(entry);
        case ChatEntry::Kind::event:
        case ChatEntry::Kind::direct: return on_own_event(entry);
        case ChatEntry::Kind::kick: return on_kick(entry);
        case ChatEntry::Kind::moderation: return on_moderation(entry);
        case ChatEntry::Kind::away:
        case ChatEntry::Kind::ban: return;
    }
}

inline void ChatHub::send_to_others(const ChatEntry& entry, const ChatEvent& event) {
    if (Room* members = members_.find(entry.room)) members->broadcast(event.dump(), connection(entry.sender));
}

inline void ChatHub::on_typing(const ChatEntry& entry) {
    ChatEvent event = detail::entry_event("typing", entry);
    if (!entry.text.empty()) event.add_json("stop", "true");
    if (Room* members = members_.find(entry.room)) members->broadcast_volatile(event.dump(), connection(entry.sender));
}

// Both users get it in all their connections, and later as the history of their conversation.
inline void ChatHub::on_conversation(const ChatEntry& entry) {
    const std::string peer = peer_in(entry.room, entry.user);
    const ChatHandler* const sender = connection(entry.sender);
    for (const std::string* id : {&entry.user, &peer}) {
        for (ChatHandler* each : connections_of(*id))
            each->write_message(detail::private_event(entry, *id, each == sender).dump());
        if (peer == entry.user) return;
    }
}

inline void ChatHub::on_kept(const ChatEntry& entry) {
    if (is_conversation(entry.room)) {
        if (entry.is_message()) on_conversation(entry);
        return;
    }
    ChatHandler* sender = connection(entry.sender);
    ChatRoom* room = find(entry.room);
    if (room != nullptr && entry.id != 0) {
        if (room->delivered_id_ && entry.id <= *room->delivered_id_) return;
        room->delivered_id_ = entry.id;
    }
    if (entry.kind == ChatEntry::Kind::topic) on_topic(room, entry);
    const bool tagged = sender != nullptr && !entry.tag.empty();
    if (Room* members = members_.find(entry.room))
        members->broadcast(detail::kept_event(entry).dump(), tagged ? sender : nullptr);
    if (tagged) sender->write_message(detail::kept_event(entry, entry.author).dump());
    if (sender != nullptr && entry.is_message()) sender->run_hook("on_said", [&] { sender->on_said(entry); });
}

inline void ChatHub::on_private_message(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    const User* author = room->presence_.find(entry.name);
    const User* receiver = room->presence_.find(entry.to);
    for (const User* user : {author, receiver == author ? nullptr : receiver}) {
        if (user == nullptr) continue;
        const User* const peer = user == author ? receiver : author;
        ChatEvent event = detail::entry_event("private", entry);
        if (peer != nullptr) event.add_text("peer", peer->info.id);
        event.add_text("to", entry.to).add_text("text", entry.text).add("time", entry.time);
        const std::string plain = event.dump(), tagged = event.add_unless_empty("tag", entry.tag).dump();
        for (ChatHandler* each : user->connections)
            each->write_message(each == connection(entry.sender) ? tagged : plain);
    }
}

// In the next three, the users of this server are already in the list; those of other servers are not.

inline void ChatHub::on_join(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    if (room->presence_.find(entry.name) == nullptr)
        room->presence_.add(ChatUser{entry.name, entry.text, false, entry.user}, {}).remote = true;
    if (count_only(*room)) return;
    ChatEvent event = detail::entry_event("join", entry).add("time", entry.time);
    if (!entry.text.empty()) event.add_json("about", entry.text);
    send_to_others(entry, event);
}

inline void ChatHub::on_leave(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    User* user = room->presence_.find(entry.name);
    if (user != nullptr && user->remote) room->presence_.remove(*user);
    if (count_only(*room)) return;
    send_to_others(entry, detail::entry_event("leave", entry).add("time", entry.time));
}

inline void ChatHub::on_rename(const ChatEntry& entry) {
    ChatRoom* room = find(entry.room);
    if (room == nullptr) return;
    User* user = room->presence_.find(entry.name);
    if (user != nullptr && user->remote) room->presence_.rename(*user, entry.text);
    ChatEvent event("nick");
    event.add_text("room", entry.room).add_text("old", entry.name).add_text("name", entry.text);
    event.add_unless_empty("user", entry.user).add("time", entry.time);
    send_to_others(entry, event);
    if (ChatHandler* const sender = connection(entry.sender))
        sender->write_message(ChatEvent(event).add_unless_empty("tag", entry.tag).dump());
    // A connection that waits for its history is not a member yet, but it knows its name from "hello".
    const User* renamed = room->presence_.find(entry.text);
    if (renamed == nullptr) return;
    const Room& members = members_[entry.room];
    for (ChatHandler* each : renamed->connections)
        if (!members.has(*each) && each != connection(entry.sender)) each->reply(event);
}

inline void ChatHub::on_duplicate(const ChatEntry& entry) {
    ChatHandler* sender = connection(entry.sender);
    if (sender == nullptr) return;
    ChatEvent event("ack");
    add_place(event, entry).add_text("tag", entry.tag).add("id", entry.id);
    sender->write_message(event.dump());
}

inline void ChatHub::on_refused(const ChatEntry& entry, std::string_view code) {
    ChatHandler* sender = connection(entry.sender);
    if (sender == nullptr) return;
    const char* const sentence = code == "not_yours"  ? "That message is not yours."
                                 : code == "too_late" ? "It is too late to change that message."
                                 : code == "refused"  ? "That message has too many reactions."
                                                      : "There is no such message in this room.";
    ChatEvent event("error");
    event.add_text("code", code).add_text("text", sentence);
    sender->write_message(add_place(event, entry).add_unless_empty("tag", entry.tag).dump());
}

inline void ChatHub::on_failure(const ChatEntry& entry, const std::string& cause) {
    server_.report(LogLevel::error, "chat_not_kept", {{"room", entry.room}, {"cause", cause}});
    if (on_not_kept) run_hook("ChatHub::on_not_kept", [&] { on_not_kept(entry, cause); });
    ChatHandler* sender = connection(entry.sender);
    if (sender == nullptr) return;
    ChatEvent event("error");
    event.add_text("code", "not_kept")
        .add_text("text", "That message could not be stored, and nobody has got it. Try again soon.");
    sender->write_message(add_place(event, entry).add_unless_empty("tag", entry.tag).dump());
}

WSCHAT_END

#endif  // WSCHAT_CHAT

// ====================================================================================================================
// section 17: Stores
//
// SqliteHistory: a history in a file, which a thread of its own reads and writes.
// ====================================================================================================================

#if WSCHAT_CHAT && WSCHAT_SQLITE

#include <sqlite3.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

WSCHAT_BEGIN

struct SqliteOptions {
    // Without a limit of bytes, age and rooms.
    HistoryLimits limits{100'000, 0, Duration::zero(), 0, 0};
    std::size_t max_file_bytes = 0;                   // 0: no limit; a full file refuses new entries
    std::size_t max_queued = 10'000;                  // entries before their commit; more are refused
    Duration busy_timeout = std::chrono::seconds(2);  // how long to wait for a lock of another program
    // How long to wait for a server that still uses the file. At a restart, it must be longer than the
    // ServerOptions::shutdown_deadline of the old server.
    Duration lock_timeout = std::chrono::seconds(10);
    bool survive_power_loss = false;  // true: each commit waits for the disk. false: a crash of the program loses
                                      // nothing, a crash of the machine loses the last seconds
};

namespace detail {

inline std::int64_t sqlite_milliseconds(Duration duration) {
    const auto count = std::chrono::duration_cast<std::chrono::milliseconds>(duration).count();
    return (std::min)(static_cast<std::int64_t>(count), std::int64_t{1'000'000'000});
}
// A connection to a database. For one thread at a time. Failures are an Error that names `path`.
class SqliteDatabase {
public:
    SqliteDatabase(const std::string& file, std::string path) : path_(std::move(path)) {
        const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
        const int result = ::sqlite3_open_v2(file.c_str(), &database_, flags, nullptr);
        try {
            check_result(result);
        } catch (...) {
            ::sqlite3_close_v2(database_);
            throw;
        }
    }
    SqliteDatabase(const SqliteDatabase&) = delete;
    SqliteDatabase& operator=(const SqliteDatabase&) = delete;
    ~SqliteDatabase() {
        for (const auto& [sql, statement] : statements_) ::sqlite3_finalize(statement);
        ::sqlite3_close_v2(database_);
    }

    // One execution of a prepared statement. The destructor resets it.
    class Query {
    public:
        Query(SqliteDatabase& database, const std::string& sql) : database_(database) {
            sqlite3_stmt*& prepared = database.statements_[sql];
            if (prepared == nullptr)
                database.check_result(::sqlite3_prepare_v3(database.database_, sql.c_str(), -1,
                                                           SQLITE_PREPARE_PERSISTENT, &prepared, nullptr));
            statement_ = prepared;
        }
        Query(const Query&) = delete;
        Query& operator=(const Query&) = delete;
        ~Query() {
            ::sqlite3_reset(statement_);
            ::sqlite3_clear_bindings(statement_);
        }
        // Binds the next parameter.
        Query& bind(std::int64_t value) {
            database_.check_result(::sqlite3_bind_int64(statement_, ++bound_, value));
            return *this;
        }
        Query& bind(std::uint64_t value) { return bind(static_cast<std::int64_t>(value)); }
        Query& bind(bool value) { return bind(std::int64_t{value}); }
        // The text must outlive the query.
        Query& bind(const std::string& value) {
            database_.check_result(
                ::sqlite3_bind_text64(statement_, ++bound_, value.data(), value.size(), nullptr, SQLITE_UTF8));
            return *this;
        }
        // False after the last row.
        bool next_row() {
            const int result = ::sqlite3_step(statement_);
            if (result != SQLITE_ROW && result != SQLITE_DONE) database_.check_result(result);
            return result == SQLITE_ROW;
        }
        std::int64_t number(int column) const { return ::sqlite3_column_int64(statement_, column); }
        std::uint64_t id(int column) const { return static_cast<std::uint64_t>(number(column)); }
        std::string text(int column) const {
            const auto* bytes = static_cast<const char*>(::sqlite3_column_blob(statement_, column));
            return bytes == nullptr
                       ? ""
                       : std::string(bytes, static_cast<std::size_t>(::sqlite3_column_bytes(statement_, column)));
        }

    private:
        SqliteDatabase& database_;
        sqlite3_stmt* statement_;
        int bound_ = 0;
    };

    // Runs a statement without a result.
    template <class... Values>
    void run(const char* sql, const Values&... values) {
        Query query(*this, sql);
        (query.bind(values), ...);
        query.next_row();
    }
    // The first number of the result; 0 if there is none.
    template <class... Values>
    std::int64_t number(const char* sql, const Values&... values) {
        Query query(*this, sql);
        (query.bind(values), ...);
        return query.next_row() ? query.number(0) : 0;
    }
    std::int64_t inserted_row() const { return ::sqlite3_last_insert_rowid(database_); }

    [[noreturn]] void fail(const std::string& cause) const { throw Error("SqliteHistory \"" + path_ + "\": " + cause); }
    void execute(const std::string& sql) {
        check_result(::sqlite3_exec(database_, sql.c_str(), nullptr, nullptr, nullptr));
    }
    // False if another program holds the lock until the timeout.
    bool try_execute(const char* sql) {
        const int result = ::sqlite3_exec(database_, sql, nullptr, nullptr, nullptr);
        if (result != SQLITE_OK && result != SQLITE_BUSY) check_result(result);
        return result == SQLITE_OK;
    }
    void wait_for_locks(Duration timeout) {
        ::sqlite3_busy_timeout(database_, static_cast<int>(sqlite_milliseconds(timeout)));
    }
    bool read_only() const { return ::sqlite3_db_readonly(database_, "main") == 1; }
    template <class Work>
    void transaction(const char* begin, Work&& work) {
        // Entries in a deleted file would be lost.
        int moved = 0;
        ::sqlite3_file_control(database_, "main", SQLITE_FCNTL_HAS_MOVED, &moved);
        if (moved != 0) fail("the file was moved or deleted");
        execute(begin);
        try {
            work();
            execute("COMMIT");
        } catch (...) {
            // After some errors SQLite has already rolled back.
            if (::sqlite3_get_autocommit(database_) == 0)
                ::sqlite3_exec(database_, "ROLLBACK", nullptr, nullptr, nullptr);
            throw;
        }
    }

private:
    void check_result(int result) const {
        if (result == SQLITE_OK) return;
        const std::string cause = database_ == nullptr ? ::sqlite3_errstr(result) : ::sqlite3_errmsg(database_);
        fail(cause + " (" + std::to_string(result) + ")");
    }

    std::string path_;
    sqlite3* database_ = nullptr;
    std::map<std::string, sqlite3_stmt*> statements_;  // by their text
};

// Keeps other servers from the same file: a transaction in the file PATH-lock, open as long as this object lives. The
// system ends it with the process. The file says which process that is.
class SqliteLock {
public:
    SqliteLock(const std::string& path, Duration timeout) : lock_(path + "-lock", path) {
        const Time deadline = saturating_add(Clock::now(), timeout);
        do {
            lock_.wait_for_locks((std::max)(deadline - Clock::now(), Duration::zero()));
            if (!lock_.try_execute("BEGIN IMMEDIATE")) break;
            lock_.execute("CREATE TABLE IF NOT EXISTS holder(process, host, time); DELETE FROM holder");
            lock_.run("INSERT INTO holder VALUES(?1, ?2, ?3)", process_id(), host_name(), unix_ms());
            if (!lock_.try_execute("COMMIT")) {
                lock_.execute("ROLLBACK");
                break;
            }
            lock_.wait_for_locks(Duration::zero());
            if (lock_.try_execute("BEGIN IMMEDIATE")) return;
        } while (Clock::now() < deadline);
        lock_.fail(holder());
    }

private:
    static std::int64_t process_id() {
#if defined(_WIN32)
        return static_cast<std::int64_t>(::GetCurrentProcessId());
#else
        return static_cast<std::int64_t>(::getpid());
#endif
    }
    static std::string host_name() {
        char name[256] = {};
        return ::gethostname(name, sizeof name - 1) == 0 ? name : "";
    }
    std::string holder() {
        try {
            SqliteDatabase::Query query(lock_, "SELECT process, host FROM holder");
            if (query.next_row())
                return "another server uses it: process " + std::to_string(query.number(0)) + " on \"" +
                       escape_for_log(query.text(1)) + "\"";
        } catch (const Error&) {  // nothing is known about it
        }
        return "another server uses it";
    }

    SqliteDatabase lock_;
};

// The database file: rooms with their newest ids, entries and facts. For one thread at a time. Failures are an Error.
class SqliteFile {
public:
    SqliteFile(const std::string& path, const SqliteOptions& options)
        : database_(path, path), lock_(path, options.lock_timeout), limits_(options.limits) {
        prepare_file(options);
        open_epoch();
        prepare_search();
        while (sweep()) {
        }
        swept_ = true;
    }

    const std::string& epoch() const { return epoch_; }

    // Stores all entries or none, in one transaction, and sets their ids. The results: empty for an entry that is
    // stored; "duplicate" if its author has sent the tag before, then its id is that of the first entry; otherwise the
    // code with which an amendment is refused.
    std::vector<std::string_view> append(std::vector<ChatEntry>& entries) {
        std::vector<std::string_view> results;
        database_.transaction("BEGIN IMMEDIATE", [&] {
            for (ChatEntry& entry : entries) results.push_back(append_one(entry));
            delete_rooms_above_bytes();
        });
        return results;
    }

    HistoryPage since(const std::string& room, const std::optional<HistoryPosition>& position, std::size_t limit) {
        HistoryPage page;
        read(page, [&] {
            const RoomRow row = find_room(room);
            page.last_id = row.last_id;
            if (position && known(row, *position)) {
                if (row.last_id - position->id <= limit) read_after(page, row, position->id, limit);
                if (page.entries.size() == row.last_id - position->id) {
                    page.more = database_.number("SELECT 1 FROM entry WHERE room = ?1 AND id <= ?2 LIMIT 1", row.number,
                                                 position->id) != 0;
                    return;
                }
            }
            page.entries.clear();
            page.gap = position.has_value();
            read_before(page, row, HistoryPosition::max_id + 1, limit);
        });
        return page;
    }
    HistoryPage before(const std::string& room, std::uint64_t id, std::size_t limit) {
        HistoryPage page;
        read(page, [&] {
            const RoomRow row = find_room(room);
            page.last_id = row.last_id;
            read_before(page, row, (std::min)(id, HistoryPosition::max_id + 1), limit);
        });
        return page;
    }
    HistoryPage search(const std::string& room, const std::string& text, std::size_t limit) {
        HistoryPage page;
        read(page, [&] {
            const RoomRow row = find_room(room);
            page.last_id = row.last_id;
            const std::vector<std::string> words = ChatStore::search_words(text);
            if (words.empty()) return;
            if (indexed_) search_index(page, row, words, limit);
            else search_rows(page, row, words, limit);
        });
        return page;
    }
    // The entries with ids above this one, in order; fewer than `limit` only at the end.
    std::vector<ChatEntry> entries_after(const std::string& room, std::uint64_t id, std::size_t limit) {
        std::vector<ChatEntry> entries;
        database_.transaction("BEGIN", [&] {
            Query query(database_, select(" WHERE room = ?1 AND id > ?2 ORDER BY id LIMIT ?3"));
            query.bind(find_room(room).number).bind(id).bind(std::uint64_t{limit});
            while (query.next_row()) entries.push_back(read_entry(query));
        });
        return entries;
    }

    // Removes everything of an author, at most `limit` messages and reactions at once. The result has the amendments
    // and the deleted facts, with empty values. It has no amendments when nothing is left.
    struct Erased {
        std::vector<ChatEntry> amendments{};
        std::vector<ChatFact> facts{};
    };
    Erased erase(const std::string& author, std::size_t limit) {
        Erased erased;
        if (author.empty()) return erased;
        database_.execute("PRAGMA secure_delete = ON");
        database_.transaction("BEGIN IMMEDIATE", [&] {
            erased.facts = erase_facts(author);
            erased.amendments = erase_reactions(author, limit);
            for (ChatEntry& amendment : erase_messages(author, limit))
                erased.amendments.push_back(std::move(amendment));
            for (ChatEntry& amendment : erased.amendments) add_entry(amendment, find_room(amendment.room));
            if (!erased.amendments.empty()) return;
            database_.run(
                "UPDATE entry SET name = '', author = '', tag = '', user = CASE kind WHEN 4 THEN user ELSE ''"
                " END WHERE author = ?1 AND author <> ''",
                author);
        });
        database_.execute("PRAGMA secure_delete = OFF");
        return erased;
    }

    // Returns the fact that is kept.
    ChatFact put(const ChatFact& fact) {
        ChatFact kept = fact;
        database_.transaction("BEGIN IMMEDIATE", [&] {
            if (fact.if_new) {
                Query query(database_, "SELECT value, author, expires FROM fact WHERE scope = ?1 AND key = ?2");
                query.bind(fact.scope).bind(fact.key);
                if (query.next_row()) {
                    kept = {fact.scope, fact.key, query.text(0), query.text(1), query.number(2)};
                    return;
                }
            }
            database_.run("DELETE FROM fact WHERE scope = ?1 AND key = ?2", fact.scope, fact.key);
            if (fact.value.empty()) return;
            if (too_many_facts()) delete_expired_facts();
            if (too_many_facts()) database_.fail("too many facts");
            database_.run("INSERT INTO fact(scope, key, value, author, expires) VALUES(?1, ?2, ?3, ?4, ?5)", fact.scope,
                          fact.key, fact.value, fact.author, fact.expires);
        });
        return kept;
    }
    std::vector<ChatFact> facts(const std::string& scope, const std::string& key_prefix) {
        std::vector<ChatFact> facts;
        database_.transaction("BEGIN", [&] {
            Query query(database_,
                        "SELECT scope, key, value, author, expires FROM fact WHERE scope = ?1"
                        " AND substr(CAST(key AS BLOB), 1, length(CAST(?2 AS BLOB))) = CAST(?2 AS BLOB)"
                        " AND (expires = 0 OR expires > ?3) ORDER BY key");
            query.bind(scope).bind(key_prefix).bind(unix_ms());
            while (query.next_row())
                facts.push_back({query.text(0), query.text(1), query.text(2), query.text(3), query.number(4)});
        });
        return facts;
    }

    // Deletes expired facts, and the expired entries of some rooms. True: another call has more to do.
    bool sweep() {
        bool more = false;
        database_.transaction("BEGIN IMMEDIATE", [&] {
            delete_expired_facts();
            if (swept_ && limits_.max_age == Duration::zero()) return;  // appends delete what is above other limits
            std::vector<std::int64_t> rooms;
            {
                Query query(database_, "SELECT id FROM room WHERE id >= ?1 ORDER BY id LIMIT 20");
                query.bind(sweep_from_);
                while (query.next_row()) rooms.push_back(query.number(0));
            }
            for (const std::int64_t room : rooms) {
                more = prune(room);
                sweep_from_ = more ? room : room + 1;
                if (more) return;
            }
            more = rooms.size() == 20;
            if (!more) sweep_from_ = 0;
        });
        return more;
    }

private:
    using Query = SqliteDatabase::Query;

    // migrations[N] changes a file of version N into version N + 1. A new file has version 0.
    static constexpr const char* migrations[] = {
        "CREATE TABLE room(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last INTEGER NOT NULL);"
        "CREATE TABLE entry(room INTEGER NOT NULL, id INTEGER NOT NULL, time INTEGER NOT NULL, kind INTEGER NOT NULL,"
        " name TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY(room, id)) WITHOUT ROWID;",
        "ALTER TABLE entry ADD COLUMN author TEXT NOT NULL DEFAULT '';"
        "ALTER TABLE entry ADD COLUMN tag TEXT NOT NULL DEFAULT '';"
        "CREATE UNIQUE INDEX entry_tag ON entry(room, author, tag) WHERE tag <> '';",
        ("CREATE TABLE start(id INTEGER NOT NULL);"
         "INSERT INTO start VALUES(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER));"),
        // Epochs tell other files apart, so ids start at 1. `start` is the largest id of all deleted rooms. `first` has
        // the first id that a room got in an opening.
        ("UPDATE start SET id = 0 WHERE NOT EXISTS(SELECT 1 FROM room);"
         "CREATE TABLE opening(number INTEGER PRIMARY KEY AUTOINCREMENT, epoch TEXT NOT NULL UNIQUE);"
         "CREATE TABLE first(room INTEGER NOT NULL, opening INTEGER NOT NULL, id INTEGER NOT NULL,"
         " PRIMARY KEY(room, opening)) WITHOUT ROWID;"
         "ALTER TABLE room ADD COLUMN opening INTEGER NOT NULL DEFAULT 0;"
         "ALTER TABLE room ADD COLUMN used INTEGER NOT NULL DEFAULT 0;"
         "ALTER TABLE room ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;"
         "CREATE INDEX room_used ON room(used);"
         "DROP INDEX entry_tag;"
         "ALTER TABLE entry RENAME TO old_entry;"
         "CREATE TABLE entry(row INTEGER PRIMARY KEY, room INTEGER NOT NULL, id INTEGER NOT NULL,"
         " target INTEGER NOT NULL DEFAULT 0, time INTEGER NOT NULL, kind INTEGER NOT NULL, name TEXT NOT NULL,"
         " user TEXT NOT NULL DEFAULT '', text TEXT NOT NULL, data TEXT NOT NULL DEFAULT '', author TEXT NOT NULL,"
         " tag TEXT NOT NULL, edited INTEGER NOT NULL DEFAULT 0, removed INTEGER NOT NULL DEFAULT 0,"
         " bytes INTEGER NOT NULL DEFAULT 0);"
         "INSERT INTO entry(room, id, time, kind, name, text, author, tag, bytes)"
         " SELECT room, id, time, kind, name, text, author, tag, 256 + length(CAST(text AS BLOB)) FROM old_entry"
         " ORDER BY time, room, id;"
         "DROP TABLE old_entry;"
         "CREATE UNIQUE INDEX entry_id ON entry(room, id);"
         "CREATE UNIQUE INDEX entry_tag ON entry(room, author, tag) WHERE tag <> '';"
         "CREATE INDEX entry_target ON entry(room, target) WHERE target <> 0;"
         "CREATE INDEX entry_author ON entry(author) WHERE author <> '';"
         "UPDATE room SET bytes = ifnull((SELECT sum(bytes) FROM entry WHERE room = room.id), 0),"
         " used = ifnull((SELECT max(row) FROM entry WHERE room = room.id), 0);"
         "CREATE TABLE reaction(number INTEGER PRIMARY KEY, entry INTEGER NOT NULL, emoji TEXT NOT NULL,"
         " author TEXT NOT NULL, user TEXT NOT NULL, name TEXT NOT NULL);"
         "CREATE UNIQUE INDEX reaction_entry ON reaction(entry, emoji, author);"
         "CREATE INDEX reaction_author ON reaction(author);"
         "CREATE TABLE fact(scope TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, author TEXT NOT NULL,"
         " expires INTEGER NOT NULL, PRIMARY KEY(scope, key)) WITHOUT ROWID;"
         "CREATE INDEX fact_author ON fact(author) WHERE author <> '';"),
    };
    static constexpr int version = sizeof migrations / sizeof migrations[0];
    static constexpr int application_id = 0x77736368;  // "wsch"
    // A page stops after about so much text, because a client can ask for pages at no cost.
    static constexpr std::size_t max_page_bytes = 1024 * 1024;

    // ---- the file --------------------------------------------------------------------------------------------------

    void prepare_file(const SqliteOptions& options) {
        database_.wait_for_locks(options.busy_timeout);
        const std::int64_t owner = database_.number("PRAGMA application_id");
        const std::int64_t found = database_.number("PRAGMA user_version");
        if (owner != application_id &&
            (owner != 0 || found != 0 || database_.number("SELECT count(*) FROM sqlite_master") != 0))
            database_.fail("it is a database of another program");
        if (found > version)
            database_.fail("it is of version " + std::to_string(found) + ", and this program knows " +
                           std::to_string(version));
        if (database_.read_only()) database_.fail("it may only be read");
        database_.execute("PRAGMA journal_mode = WAL");
        database_.execute(options.survive_power_loss ? "PRAGMA synchronous = FULL" : "PRAGMA synchronous = NORMAL");
        if (options.max_file_bytes != 0) {
            const auto pages = static_cast<std::int64_t>(options.max_file_bytes) / database_.number("PRAGMA page_size");
            database_.execute("PRAGMA max_page_count = " + std::to_string((std::max)(pages, std::int64_t{1})));
        }
        if (found < version) migrate();
    }
    void migrate() {
        database_.transaction("BEGIN IMMEDIATE", [this] {
            for (auto at = database_.number("PRAGMA user_version"); at < version; ++at)
                database_.execute(migrations[at]);
            database_.execute("PRAGMA application_id = " + std::to_string(application_id));
            database_.execute("PRAGMA user_version = " + std::to_string(version));
        });
    }
    // Every opening has a number and a random token. Rows of `first` that no kept position needs are deleted.
    void open_epoch() {
        database_.transaction("BEGIN IMMEDIATE", [this] {
            database_.run("INSERT INTO opening(epoch) VALUES(lower(hex(randomblob(8))))");
            opening_ = database_.inserted_row();
            Query query(database_, "SELECT epoch FROM opening WHERE number = ?1");
            query.bind(opening_).next_row();
            epoch_ = query.text(0);
            database_.run(
                "DELETE FROM first WHERE EXISTS(SELECT 1 FROM first AS later WHERE later.room = first.room"
                " AND later.opening > first.opening AND later.id <"
                " (SELECT min(id) FROM entry WHERE entry.room = first.room))");
        });
    }
    // The index of FTS5, if this SQLite has it. The triggers keep it up to date.
    void prepare_search() {
        indexed_ = database_.number("SELECT 1 FROM pragma_compile_options WHERE compile_options = 'ENABLE_FTS5'") != 0;
        database_.transaction("BEGIN IMMEDIATE", [this] {
            const bool complete =
                database_.number(
                    "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'search_%'") == 3;
            if (!indexed_)
                database_.execute(
                    "DROP TRIGGER IF EXISTS search_insert; DROP TRIGGER IF EXISTS search_delete;"
                    "DROP TRIGGER IF EXISTS search_update;");
            else if (!complete) database_.execute(search_schema);
        });
    }
    static constexpr const char* search_schema =
        ("DROP TABLE IF EXISTS search;"
         "CREATE VIRTUAL TABLE search USING fts5(text, room, content = 'entry', content_rowid = 'row',"
         " tokenize = 'unicode61 remove_diacritics 2');"
         "INSERT INTO search(rowid, text, room) SELECT row, text, room FROM entry WHERE kind < 2;"
         "CREATE TRIGGER search_insert AFTER INSERT ON entry WHEN new.kind < 2 BEGIN"
         " INSERT INTO search(rowid, text, room) VALUES(new.row, new.text, new.room); END;"
         "CREATE TRIGGER search_delete AFTER DELETE ON entry WHEN old.kind < 2 BEGIN"
         " INSERT INTO search(search, rowid, text, room) VALUES('delete', old.row, old.text, old.room); END;"
         "CREATE TRIGGER search_update AFTER UPDATE OF text ON entry WHEN old.kind < 2 BEGIN"
         " INSERT INTO search(search, rowid, text, room) VALUES('delete', old.row, old.text, old.room);"
         " INSERT INTO search(rowid, text, room) VALUES(new.row, new.text, new.room); END;");

    // ---- rooms and entries -----------------------------------------------------------------------------------------

    struct RoomRow {
        std::int64_t number = 0;  // 0: the room has no row yet
        std::uint64_t last_id = 0;
        std::int64_t opening = 0;  // in which the last id was given
    };
    RoomRow find_room(const std::string& name) {
        Query query(database_, "SELECT id, last, opening FROM room WHERE name = ?1");
        query.bind(name);
        if (query.next_row()) return {query.number(0), query.id(1), query.number(2)};
        return {0, static_cast<std::uint64_t>(database_.number("SELECT id FROM start")), 0};
    }
    RoomRow add_room(const std::string& name) {
        const auto count = static_cast<std::size_t>(database_.number("SELECT count(*) FROM room"));
        if (HistoryLimits::exceeds(count + 1, limits_.max_rooms)) delete_oldest_room();
        RoomRow room = find_room(name);
        database_.run("INSERT INTO room(name, last) VALUES(?1, ?2)", name, room.last_id);
        room.number = database_.inserted_row();
        return room;
    }
    void delete_oldest_room() {
        const std::int64_t room = database_.number("SELECT id FROM room ORDER BY used LIMIT 1");
        database_.run("UPDATE start SET id = max(id, ifnull((SELECT last FROM room WHERE id = ?1), 0))", room);
        database_.run("DELETE FROM reaction WHERE entry IN (SELECT row FROM entry WHERE room = ?1)", room);
        database_.run("DELETE FROM entry WHERE room = ?1", room);
        database_.run("DELETE FROM first WHERE room = ?1", room);
        database_.run("DELETE FROM room WHERE id = ?1", room);
    }
    void delete_rooms_above_bytes() {
        if (limits_.max_total_bytes == 0) return;
        while (HistoryLimits::exceeds(static_cast<std::size_t>(database_.number("SELECT sum(bytes) FROM room")),
                                      limits_.max_total_bytes) &&
               database_.number("SELECT count(*) FROM room") > 1)
            delete_oldest_room();
    }

    std::string_view append_one(ChatEntry& entry) {
        RoomRow room = find_room(entry.room);
        if (!entry.tag.empty() && room.number != 0) {
            const std::int64_t id =
                database_.number("SELECT id FROM entry WHERE room = ?1 AND author = ?2 AND tag = ?3 AND tag <> ''",
                                 room.number, entry.author, entry.tag);
            if (id != 0) {
                entry.id = static_cast<std::uint64_t>(id);
                return "duplicate";
            }
        }
        if (entry.is_amendment()) {
            const std::string_view code = amend(entry, room);
            if (!code.empty()) return code;
        }
        if (room.number == 0) room = add_room(entry.room);
        add_entry(entry, room);
        prune(room.number);
        return {};
    }
    void add_entry(ChatEntry& entry, const RoomRow& room) {
        entry.id = room.last_id + 1;
        const auto bytes = std::uint64_t{entry.bytes()};
        Query add(
            database_,
            "INSERT INTO entry(room, id, target, time, kind, name, user, text, data, author, tag, edited, removed,"
            " bytes) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)");
        add.bind(room.number).bind(entry.id).bind(entry.target).bind(entry.time);
        add.bind(static_cast<std::int64_t>(entry.kind)).bind(entry.name).bind(entry.user).bind(entry.text);
        add.bind(entry.data).bind(entry.author).bind(entry.tag).bind(entry.edited).bind(entry.removed).bind(bytes);
        add.next_row();
        const std::int64_t row = database_.inserted_row();
        database_.run("UPDATE room SET last = ?2, opening = ?3, used = ?4, bytes = bytes + ?5 WHERE id = ?1",
                      room.number, entry.id, opening_, row, bytes);
        if (room.opening != opening_)
            database_.run("INSERT OR IGNORE INTO first(room, opening, id) VALUES(?1, ?2, ?3)", room.number, opening_,
                          entry.id);
    }

    // ---- amendments ------------------------------------------------------------------------------------------------

    // Changes the message. The result says why that is refused.
    std::string_view amend(ChatEntry& amendment, const RoomRow& room) {
        const std::int64_t row =
            database_.number("SELECT row FROM entry WHERE room = ?1 AND id = ?2", room.number, amendment.target);
        std::optional<ChatEntry> target;
        if (row != 0) {
            Query query(database_, select(" WHERE row = ?1"));
            query.bind(row).next_row();
            target = read_entry(query, false);
        }
        const auto code = ChatEntry::refuse_amendment(amendment, target ? &*target : nullptr);
        if (!code.empty()) return code;
        if (amendment.kind == ChatEntry::Kind::edit) edit(amendment, room, row);
        else if (amendment.kind == ChatEntry::Kind::remove) remove(row, room.number, amendment.target);
        else if (!react(amendment, row)) return "refused";
        return {};
    }
    // No entry keeps an older text of the message.
    void edit(const ChatEntry& amendment, const RoomRow& room, std::int64_t row) {
        database_.run(
            "UPDATE entry SET text = ?2, data = CASE ?3 WHEN '' THEN data ELSE ?3 END, edited = ?4"
            " WHERE row = ?1",
            row, amendment.text, amendment.data, amendment.time);
        database_.run("UPDATE entry SET text = ?3 WHERE room = ?1 AND target = ?2 AND target <> 0 AND kind = 2",
                      room.number, amendment.target, amendment.text);
    }
    void remove(std::int64_t row, std::int64_t room, std::uint64_t id) {
        database_.run("UPDATE entry SET text = '', data = '', removed = 1 WHERE row = ?1", row);
        database_.run(
            "UPDATE entry SET text = '', data = '', kind = 3"
            " WHERE room = ?1 AND target = ?2 AND target <> 0 AND kind = 2",
            room, id);
        database_.run("DELETE FROM reaction WHERE entry = ?1", row);
    }
    // False if the message has too many reactions.
    bool react(ChatEntry& amendment, std::int64_t row) {
        const std::int64_t same =
            database_.number("SELECT number FROM reaction WHERE entry = ?1 AND emoji = ?2 AND author = ?3", row,
                             amendment.text, amendment.author);
        amendment.removed = same != 0;
        if (amendment.removed) {
            database_.run("DELETE FROM reaction WHERE number = ?1", same);
            return true;
        }
        const auto count =
            static_cast<std::size_t>(database_.number("SELECT count(*) FROM reaction WHERE entry = ?1", row));
        if (HistoryLimits::exceeds(count + 1, limits_.max_reactions)) return false;
        database_.run("INSERT INTO reaction(entry, emoji, author, user, name) VALUES(?1, ?2, ?3, ?4, ?5)", row,
                      amendment.text, amendment.author, amendment.user, amendment.name);
        return true;
    }

    std::vector<ChatFact> erase_facts(const std::string& author) {
        std::vector<ChatFact> facts;
        {
            Query query(database_, "SELECT scope, key FROM fact WHERE author = ?1 AND author <> ''");
            query.bind(author);
            while (query.next_row()) facts.push_back({query.text(0), query.text(1), "", author, 0});
        }
        database_.run("DELETE FROM fact WHERE author = ?1 AND author <> ''", author);
        return facts;
    }
    std::vector<ChatEntry> erase_reactions(const std::string& author, std::size_t limit) {
        std::vector<ChatEntry> amendments;
        std::vector<std::int64_t> numbers;
        {
            Query query(database_,
                        "SELECT reaction.number, reaction.user, reaction.emoji, entry.id, room.name FROM reaction"
                        " JOIN entry ON entry.row = reaction.entry JOIN room ON room.id = entry.room"
                        " WHERE reaction.author = ?1 AND reaction.author <> '' LIMIT ?2");
            query.bind(author).bind(std::uint64_t{limit});
            while (query.next_row()) {
                numbers.push_back(query.number(0));
                ChatEntry amendment = new_amendment(ChatEntry::Kind::react, query.text(4), query.id(3));
                amendment.user = query.text(1);
                amendment.text = query.text(2);
                amendment.removed = true;
                amendments.push_back(std::move(amendment));
            }
        }
        for (const std::int64_t number : numbers) database_.run("DELETE FROM reaction WHERE number = ?1", number);
        return amendments;
    }
    std::vector<ChatEntry> erase_messages(const std::string& author, std::size_t limit) {
        struct Message {
            std::int64_t row, room;
            std::uint64_t id;
        };
        std::vector<ChatEntry> amendments;
        std::vector<Message> messages;
        {
            Query query(database_,
                        "SELECT entry.row, entry.room, entry.id, room.name FROM entry JOIN room ON room.id = entry.room"
                        " WHERE author = ?1 AND author <> '' AND kind < 2 AND removed = 0 LIMIT ?2");
            query.bind(author).bind(std::uint64_t{limit});
            while (query.next_row()) {
                messages.push_back({query.number(0), query.number(1), query.id(2)});
                amendments.push_back(new_amendment(ChatEntry::Kind::remove, query.text(3), query.id(2)));
            }
        }
        for (const Message& message : messages) remove(message.row, message.room, message.id);
        return amendments;
    }
    static ChatEntry new_amendment(ChatEntry::Kind kind, std::string room, std::uint64_t target) {
        ChatEntry amendment;
        amendment.kind = kind;
        amendment.room = std::move(room);
        amendment.target = target;
        amendment.time = unix_ms();
        return amendment;
    }

    // Deletes the oldest entries above the limits, at most 1,000. True: there are more.
    bool prune(std::int64_t room) {
        const std::int64_t now = unix_ms();
        const std::int64_t age = limits_.max_age == Duration::zero() ? 0 : sqlite_age();
        std::uint64_t last = 0, until = 0;
        std::size_t bytes = 0, freed = 0, count = 0;
        {
            Query query(database_, "SELECT last, bytes FROM room WHERE id = ?1");
            query.bind(room);
            if (!query.next_row()) return false;
            last = query.id(0);
            bytes = static_cast<std::size_t>(query.number(1));
        }
        {
            Query query(database_, "SELECT id, time, bytes FROM entry WHERE room = ?1 ORDER BY id LIMIT 1000");
            for (query.bind(room); query.next_row(); ++count) {
                const bool expired = age != 0 && query.number(1) <= now - age;
                if (!expired &&
                    !HistoryLimits::exceeds(static_cast<std::size_t>(last - query.id(0) + 1), limits_.max_entries) &&
                    !HistoryLimits::exceeds(bytes - (std::min)(bytes, freed), limits_.max_bytes))
                    break;
                until = query.id(0);
                freed += static_cast<std::size_t>(query.number(2));
            }
        }
        if (count == 0) return false;
        database_.run("DELETE FROM reaction WHERE entry IN (SELECT row FROM entry WHERE room = ?1 AND id <= ?2)", room,
                      until);
        database_.run("DELETE FROM entry WHERE room = ?1 AND id <= ?2", room, until);
        database_.run("UPDATE room SET bytes = max(0, bytes - ?2) WHERE id = ?1", room, std::uint64_t{freed});
        return count == 1000;
    }
    std::int64_t sqlite_age() const {
        return std::chrono::duration_cast<std::chrono::milliseconds>(limits_.max_age).count();
    }

    bool too_many_facts() {
        const auto count = static_cast<std::size_t>(database_.number("SELECT count(*) FROM fact"));
        return HistoryLimits::exceeds(count + 1, limits_.max_facts);
    }
    void delete_expired_facts() { database_.run("DELETE FROM fact WHERE expires <> 0 AND expires <= ?1", unix_ms()); }

    // ---- reading ---------------------------------------------------------------------------------------------------

    template <class Work>
    void read(HistoryPage& page, Work&& work) {
        database_.transaction("BEGIN", work);
        page.epoch = epoch_;
    }
    // Whether the id was given in that opening or an earlier one, and not again since, for example because the file
    // was restored from a copy.
    bool known(const RoomRow& room, const HistoryPosition& position) {
        const std::int64_t opening = database_.number("SELECT number FROM opening WHERE epoch = ?1", position.epoch);
        if (opening == 0 || position.id > room.last_id) return false;
        return database_.number("SELECT 1 FROM first WHERE room = ?1 AND opening > ?2 AND id <= ?3 LIMIT 1",
                                room.number, opening, position.id) == 0;
    }

    // The columns of read_entry().
    static std::string select(const char* rest) {
        return std::string(
                   "SELECT entry.row, entry.id, target, time, kind, name, user, entry.text, data, author, tag,"
                   " edited, removed FROM entry") +
               rest;
    }
    ChatEntry read_entry(const Query& query, bool with_reactions = true) {
        ChatEntry entry;
        entry.id = query.id(1);
        entry.target = query.id(2);
        entry.time = query.number(3);
        entry.kind = static_cast<ChatEntry::Kind>(query.number(4));
        entry.name = query.text(5);
        entry.user = query.text(6);
        entry.text = query.text(7);
        entry.data = query.text(8);
        entry.author = query.text(9);
        entry.tag = query.text(10);
        entry.edited = query.number(11);
        entry.removed = query.number(12) != 0;
        if (!with_reactions || !entry.is_message()) return entry;
        Query reactions(database_, "SELECT emoji, user, name, author FROM reaction WHERE entry = ?1 ORDER BY number");
        reactions.bind(query.number(0));
        while (reactions.next_row())
            entry.reactions.push_back({reactions.text(0), reactions.text(1), reactions.text(2), reactions.text(3)});
        return entry;
    }
    // The rows are newest first. One more row than `limit` says that there are more.
    void read_rows(HistoryPage& page, Query& query, std::size_t limit) {
        for (std::size_t bytes = 0; query.next_row(); bytes += page.entries.back().bytes()) {
            page.more = page.entries.size() == limit || bytes > max_page_bytes;
            if (page.more) break;
            page.entries.push_back(read_entry(query));
        }
        std::reverse(page.entries.begin(), page.entries.end());
    }
    void read_after(HistoryPage& page, const RoomRow& room, std::uint64_t id, std::size_t limit) {
        Query query(database_, select(" WHERE room = ?1 AND id > ?2 ORDER BY id DESC"));
        query.bind(room.number).bind(id);
        read_rows(page, query, limit);
    }
    void read_before(HistoryPage& page, const RoomRow& room, std::uint64_t id, std::size_t limit) {
        Query query(database_, select(" WHERE room = ?1 AND id < ?2 AND kind IN (0, 1, 5) ORDER BY id DESC"));
        query.bind(room.number).bind(id);
        read_rows(page, query, limit);
    }
    void search_index(HistoryPage& page, const RoomRow& room, const std::vector<std::string>& words,
                      std::size_t limit) {
        std::string match = "{room} : \"" + std::to_string(room.number) + "\" AND {text} : (";
        for (const std::string& word : words) {
            match += &word == &words.front() ? "\"" : " AND \"";
            for (const char c : word) match.append(c == '"' ? 2 : 1, c);
            match += "\"*";
        }
        match += ")";
        Query query(database_, select(" JOIN search ON search.rowid = entry.row WHERE search MATCH ?1 AND kind < 2 AND "
                                      "removed = 0 ORDER BY search.rowid DESC"));
        query.bind(match);
        read_rows(page, query, limit);
    }
    void search_rows(HistoryPage& page, const RoomRow& room, const std::vector<std::string>& words, std::size_t limit) {
        Query query(database_, select(" WHERE room = ?1 AND kind < 2 AND removed = 0 ORDER BY id DESC"));
        query.bind(room.number);
        while (query.next_row() && !page.more) {
            const std::string text = text::to_lower(query.text(7));
            const auto found = [&](const std::string& word) { return text.find(word) != std::string::npos; };
            if (!std::all_of(words.begin(), words.end(), found)) continue;
            page.more = page.entries.size() == limit;
            if (!page.more) page.entries.push_back(read_entry(query));
        }
        std::reverse(page.entries.begin(), page.entries.end());
    }

    SqliteDatabase database_;
    SqliteLock lock_;
    HistoryLimits limits_;
    std::int64_t opening_ = 0;
    std::string epoch_;
    bool indexed_ = false;  // with FTS5
    std::int64_t sweep_from_ = 0;
    bool swept_ = false;  // all rooms since the opening
};

}  // namespace detail

// A history in a file: ChatHub::of(server).set_store(SqliteHistory("chat.db")). A thread writes all queued entries in
// one transaction, and delivers them after the commit. An Error if the file cannot be opened, or if another server
// uses it; the file PATH-lock says which one. If a later write fails because the file is full, locked or damaged, each
// sender gets an error event.
class SqliteHistory final : public ChatStore {
public:
    explicit SqliteHistory(const std::string& path, const SqliteOptions& options = {})
        : worker_(std::make_unique<Worker>(path, options)) {}

    void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
        worker_->start(listener, std::move(mailbox));
    }
    void append(ChatEntry entry) override {
        if (!entry.kept()) return forward(entry);
        if (worker_->has_space()) return worker_->add({std::move(entry), nullptr});
        worker_->listener().on_failure(entry, "too many messages wait to be written");
    }
    void forward(const ChatEntry& entry) override { worker_->listener().on_entry(entry); }
    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        read(std::move(callback), [room, position = std::move(position), limit](detail::SqliteFile& file) {
            return file.since(room, position, limit);
        });
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        read(std::move(callback), [room, id, limit](detail::SqliteFile& file) { return file.before(room, id, limit); });
    }
    void search(const std::string& room, const std::string& words, std::size_t limit, PageCallback callback) override {
        read(std::move(callback),
             [room, words, limit](detail::SqliteFile& file) { return file.search(room, words, limit); });
    }
    void put(ChatFact fact) override {
        if (!worker_->has_space()) return worker_->listener().on_fact_failure(fact, "too many facts wait");
        worker_->add_write([worker = worker_.get(), fact = std::move(fact)](detail::SqliteFile& file) {
            ChatFact kept;
            const std::string cause = error_of([&] { kept = file.put(fact); });
            worker->post([fact, kept, cause](Listener& listener) {
                if (cause.empty()) listener.on_fact(kept);
                else listener.on_fact_failure(fact, cause);
            });
        });
    }
    void facts(const std::string& scope, const std::string& key_prefix, FactsCallback callback) override {
        worker_->add_read(
            [worker = worker_.get(), scope, key_prefix, callback = std::move(callback)](detail::SqliteFile& file) {
                std::vector<ChatFact> facts;
                const std::string cause = error_of([&] { facts = file.facts(scope, key_prefix); });
                worker->post([callback, facts = std::move(facts), cause](Listener&) { callback(facts, cause); });
            });
    }
    void erase_author(const std::string& author, EraseCallback callback) override {
        worker_->add_write(EraseJob{worker_.get(), author, std::move(callback), 0});
    }
    void export_room(const std::string& room, ExportCallback callback) override {
        worker_->add_read(ExportJob{worker_.get(), room, std::move(callback), 0});
    }

private:
    // Appends the entry, or runs the work.
    struct Job {
        ChatEntry entry{};
        std::function<void(detail::SqliteFile&)> work{};
        bool is_read = false;  // useless when the store ends
    };

    // What the exception of the call says; empty: there is none.
    template <class Call>
    static std::string error_of(Call&& call) {
        try {
            call();
            return "";
        } catch (const std::exception& error) {
            return *error.what() == '\0' ? "failed" : error.what();
        }
    }
    template <class Read>
    void read(PageCallback callback, Read&& work) {
        worker_->add_read([worker = worker_.get(), callback = std::move(callback),
                           work = std::forward<Read>(work)](detail::SqliteFile& file) {
            HistoryPage page;
            const std::string cause = error_of([&] { page = work(file); });
            if (!cause.empty()) page = HistoryPage();
            page.error = cause;
            worker->post([callback, page = std::move(page)](Listener&) mutable { callback(std::move(page)); });
        });
    }

    class Worker {
    public:
        Worker(const std::string& path, const SqliteOptions& options)
            : file_(path, options), max_queued_(options.max_queued) {}
        Worker(const Worker&) = delete;
        Worker& operator=(const Worker&) = delete;
        // Writes the queued entries first.
        ~Worker() {
            if (!thread_.joinable()) return;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                stop_ = true;
            }
            changed_.notify_one();
            thread_.join();
            *listener_ = nullptr;
        }

        void start(Listener& listener, std::shared_ptr<Mailbox> mailbox) {
            *listener_ = &listener;
            mailbox_ = std::move(mailbox);
            try {
                thread_ = std::thread([this] { run(); });
            } catch (const std::system_error& error) {
                throw Error(std::string("SqliteHistory: the system refuses a thread: ") + error.what());
            }
        }
        void add(Job job) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                jobs_.push_back(std::move(job));
                ++queued_;
            }
            changed_.notify_one();
        }
        void add_write(std::function<void(detail::SqliteFile&)> work) { add({{}, std::move(work), false}); }
        void add_read(std::function<void(detail::SqliteFile&)> work) { add({{}, std::move(work), true}); }
        bool has_space() const { return queued_.load() < max_queued_; }
        Listener& listener() const { return **listener_; }
        template <class Work>
        void post(Work&& work) {
            mailbox_->post([listener = listener_, work = std::forward<Work>(work)]() mutable {
                if (*listener != nullptr) work(**listener);
            });
        }

    private:
        void run() {
            for (bool stop = false; !stop;) {
                std::vector<Job> jobs;
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    changed_.wait_for(lock, (std::max)(next_sweep_ - Clock::now(), Duration::zero()),
                                      [this] { return stop_ || !jobs_.empty(); });
                    jobs.swap(jobs_);
                    stop = stop_;
                }
                run_all(jobs, stop);
                queued_ -= jobs.size();
                if (Clock::now() >= next_sweep_) sweep();
            }
        }
        // In their order, so a page contains exactly what was delivered before it.
        void run_all(std::vector<Job>& jobs, bool stop) {
            for (std::size_t i = 0; i < jobs.size();) {
                const std::size_t begin = i;
                while (i < jobs.size() && !jobs[i].work) ++i;
                try {
                    if (i != begin) write(jobs, begin, i);
                    else if (!stop || !jobs[i].is_read) jobs[i].work(file_);
                } catch (const std::bad_alloc&) {  // the result is lost; clients send and ask again
                }
                if (i == begin) ++i;
            }
        }
        void write(std::vector<Job>& jobs, std::size_t begin, std::size_t end) {
            std::vector<ChatEntry> entries;
            for (; begin != end; ++begin) entries.push_back(std::move(jobs[begin].entry));
            std::vector<std::string_view> results;
            const std::string cause = error_of([&] { results = file_.append(entries); });
            post([entries = std::move(entries), results = std::move(results), cause](Listener& listener) {
                for (std::size_t i = 0; i < entries.size(); ++i) {
                    if (!cause.empty()) listener.on_failure(entries[i], cause);
                    else if (results[i].empty()) listener.on_entry(entries[i]);
                    else if (results[i] == "duplicate") listener.on_duplicate(entries[i]);
                    else listener.on_refused(entries[i], results[i]);
                }
            });
        }
        void sweep() {
            bool more = false;
            error_of([&] { more = file_.sweep(); });  // the next append reports the failure
            next_sweep_ = saturating_add(Clock::now(), more ? Duration::zero() : Duration(sweep_interval));
        }

        static constexpr std::chrono::seconds sweep_interval{60};
        detail::SqliteFile file_;
        std::size_t max_queued_;
        Time next_sweep_ = saturating_add(Clock::now(), sweep_interval);
        std::shared_ptr<Mailbox> mailbox_;
        // Shared with posted work, for which it becomes null. Only the loop's thread uses the listener.
        const std::shared_ptr<Listener*> listener_ = std::make_shared<Listener*>(nullptr);
        std::mutex mutex_;
        std::condition_variable changed_;
        std::vector<Job> jobs_;
        std::atomic<std::size_t> queued_{0};  // jobs in the queue and in progress
        bool stop_ = false;
        std::thread thread_;
    };

    // Erases 200 messages and reactions, and adds itself to the queue until nothing is left, so others can write.
    struct EraseJob {
        void operator()(detail::SqliteFile& file) {
            detail::SqliteFile::Erased erased;
            const std::string cause = error_of([&] { erased = file.erase(author, 200); });
            for (const ChatEntry& each : erased.amendments)
                if (each.kind == ChatEntry::Kind::remove) ++messages;
            const bool end = erased.amendments.empty();
            worker->post([erased = std::move(erased)](Listener& listener) {
                for (const ChatEntry& each : erased.amendments) listener.on_entry(each);
                for (const ChatFact& each : erased.facts) listener.on_fact(each);
            });
            if (!end) return worker->add_write(*this);
            worker->post([callback = callback, count = messages, cause](Listener&) { callback(count, cause); });
        }
        Worker* worker;
        std::string author;
        EraseCallback callback;
        std::size_t messages;
    };

    // Reads 500 entries, and adds itself to the queue when the callback has taken them.
    struct ExportJob {
        void operator()(detail::SqliteFile& file) {
            HistoryExport part;
            std::vector<ChatEntry> entries;
            part.error = error_of([&] { entries = file.entries_after(room, id, limit); });
            part.end = entries.size() < limit;
            for (const ChatEntry& each : entries) part.lines += each.to_json_line(room);
            if (!entries.empty()) id = entries.back().id;
            worker->post([job = *this, part = std::move(part)](Listener&) mutable {
                const bool end = part.end;
                if (job.callback(std::move(part)) && !end) job.worker->add_read(job);
            });
        }
        static constexpr std::size_t limit = 500;
        Worker* worker;
        std::string room;
        ExportCallback callback;
        std::uint64_t id;
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
