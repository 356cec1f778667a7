// Section 6 and its use in sections 4, 7, 9 and 14: negotiation, messages compared with zlib itself, decompression bombs
// and memory. Without WSCHAT_ZLIB: the server declines every offer.
#include "support.hpp"

#include <random>

using namespace wschat;
using namespace wschat::detail;
using test::contains;
using test::hex;
using test::RunningServer;
using test::to_hex;
using test::WsClient;
using namespace std::chrono_literals;

namespace {

// Echoes messages and uses the options that a test sets.
struct Echo : WebSocketHandler {
    explicit Echo(CompressionOptions options) : options_(options) {}
    std::optional<CompressionOptions> get_compression_options() override { return options_; }
    void on_message(const Message& m) override { write_message(m); }
    CompressionOptions options_;
};

CompressionOptions options_of(int server_bits, int client_bits, bool server_takeover, bool client_takeover) {
    CompressionOptions options;
    options.server_max_window_bits = server_bits;
    options.client_max_window_bits = client_bits;
    options.server_context_takeover = server_takeover;
    options.client_context_takeover = client_takeover;
    options.threshold = 0;
    return options;
}
const CompressionOptions no_takeover = options_of(15, 15, false, false);

}  // namespace

#if WSCHAT_ZLIB

namespace {

const Time start = Time() + 1h;
constexpr std::size_t whole = std::string_view::npos;

// ---- zlib, used directly -------------------------------------------------------------------------------------------

class Zlib {
public:
    Zlib(bool deflates, int window_bits, int level = 6, int strategy = Z_DEFAULT_STRATEGY) : deflates_(deflates) {
        const int outcome = deflates ? deflateInit2(&stream_, level, Z_DEFLATED, -window_bits, 8, strategy)
                                     : inflateInit2(&stream_, -window_bits);
        REQUIRE(outcome == Z_OK);
    }
    Zlib(const Zlib&) = delete;
    Zlib& operator=(const Zlib&) = delete;
    ~Zlib() { deflates_ ? deflateEnd(&stream_) : inflateEnd(&stream_); }

    // Returns the output for all of the input. Z_FINISH also resets the stream.
    std::string run(std::string_view input, int flush = Z_SYNC_FLUSH) {
        std::string output;
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(input.data()));
        stream_.avail_in = static_cast<uInt>(input.size());
        char piece[16 * 1024];
        do {
            stream_.next_out = reinterpret_cast<Bytef*>(piece);
            stream_.avail_out = sizeof piece;
            last = deflates_ ? ::deflate(&stream_, flush) : ::inflate(&stream_, flush);
            output.append(piece, sizeof piece - stream_.avail_out);
        } while (stream_.avail_out == 0);
        if (deflates_ && flush == Z_FINISH) deflateReset(&stream_);
        return output;
    }
    // RFC 7692 7.2.1 and 7.2.2.
    std::string message_out(std::string_view payload) {
        const std::string output = run(payload);
        return output.substr(0, output.size() - 4);
    }
    std::string message_in(std::string payload) { return run(payload + hex("00 00 ff ff")); }

    int last = Z_OK;  // the result of the last call

private:
    bool deflates_;
    z_stream stream_{};
};

// ---- frames and an end of a connection -----------------------------------------------------------------------------

// A frame without a mask or with a mask of zeros.
std::string frame(unsigned first_byte, std::string_view payload, bool masked) {
    FrameHeader header;
    header.masked = masked;
    header.length = payload.size();
    char head[FrameHeader::max_size];
    const char* end = encode(header, head);
    head[0] = static_cast<char>(first_byte);
    return std::string(head, static_cast<std::size_t>(end - head)).append(payload);
}

struct End {
    End(Role end_role, std::unique_ptr<Compression> compression, std::size_t max_message = 1024 * 1024)
        : role(end_role) {
        limits.max_message_size = max_message;
        limits.max_backlog = 256 * 1024 * 1024;
        connection.open(role, limits, arena, start, role == Role::client ? &test::test_mask : nullptr,
                        std::move(compression));
    }
    End(const End&) = delete;
    End& operator=(const End&) = delete;

    // Receives a frame of the peer in pieces. Each piece is freed afterwards.
    End& receive(unsigned first_byte, std::string_view payload, std::size_t piece = whole) {
        return receive(frame(first_byte, payload, role == Role::server), piece);
    }
    End& receive(std::string_view bytes, std::size_t piece = whole) {
        for (; !bytes.empty(); bytes.remove_prefix(std::min(piece, bytes.size()))) {
            std::string part(bytes.substr(0, piece));
            connection.receive(&part[0], part.size(), start);
            read_events();
        }
        return *this;
    }
    void read_events() {
        for (;;) {
            const Event event = connection.next_event();
            if (event.kind == Event::Kind::none) return;
            if (event.kind == Event::Kind::close) closed = number(connection.close_code());
            else if (event.kind == Event::Kind::message) messages.emplace_back(event.message.data());
            else if (event.kind != Event::Kind::paused) others += event.kind == Event::Kind::ping ? "ping " : "pong ";
        }
    }
    // The frames sent since the last call: the first byte and the payload of each.
    std::vector<std::pair<unsigned, std::string>> sent() {
        std::vector<std::pair<unsigned, std::string>> frames;
        std::string bytes = test::take_output(connection);
        FrameParser parser(role == Role::client ? Role::server : Role::client, true);
        for (std::size_t at = 0; at < bytes.size();) {
            FrameHeader header;
            const ParsedFrame parsed = parser.parse(std::string_view(bytes).substr(at), header);
            REQUIRE(parsed.outcome == ParsedFrame::Outcome::header);
            const auto size = static_cast<std::size_t>(header.length);
            if (header.masked) apply_mask(&bytes[at + parsed.size], size, header.mask);
            frames.emplace_back(static_cast<unsigned char>(bytes[at]), bytes.substr(at + parsed.size, size));
            at += parsed.size + size;
        }
        return frames;
    }

    Role role;
    Limits limits;
    SendArena arena;
    Connection connection;
    std::vector<std::string> messages;
    std::string others;
    unsigned closed = 0;  // the close code
};

Fields extensions(std::string& lines, std::string_view value) {
    lines = "Sec-WebSocket-Extensions: " + std::string(value) + "\r\n";
    return Fields(lines);
}

// A server's end after a common offer.
std::unique_ptr<Compression> server_end(CompressionPool& pool, const CompressionOptions& options,
                                        std::string_view offer = "permessage-deflate; client_max_window_bits") {
    std::string lines;
    auto accepted = pool.accept(extensions(lines, offer), options);
    REQUIRE(accepted.compression);
    return std::move(accepted.compression);
}

// A client's end after the response of a server with the same options.
std::unique_ptr<Compression> client_end(CompressionPool& pool, const CompressionOptions& options) {
    std::string lines, error;
    const std::string response = pool.accept(extensions(lines, pool.offer(options)), options).response;
    auto compression = pool.read_response(extensions(lines, response), options, error);
    REQUIRE(compression);
    REQUIRE(error == "");
    return compression;
}

// Text of this size that compresses like a chat, and bytes that do not compress.
std::string words(std::size_t size, unsigned seed = 1) {
    static const char* const some[] = {
        "the ",  "quick ", "br\xc3\xb6wn ", "fox ", "\xe2\x82\xac ", "jumps ", "\xf0\x9f\x98\x80 ",
        "over ", "a ",     "lazy dog. "};
    std::mt19937 random(seed);
    std::string text;
    while (text.size() < size) text += some[random() % 10];
    text = truncate_utf8(text, size);
    return text.append(size - text.size(), '.');
}
std::string noise(std::size_t size, unsigned seed = 1) {
    std::mt19937 random(seed);
    std::string bytes;
    while (bytes.size() < size) bytes += static_cast<char>(random());
    return bytes;
}

constexpr unsigned plain_text = 0x81, plain_binary = 0x82, compressed_text = 0xC1, compressed_binary = 0xC2;

}  // namespace

TEST_SUITE("compression") {
    // ---- negotiation -----------------------------------------------------------------------------------------------

    TEST_CASE("a server accepts the first valid offer within its options and declines invalid offers") {
        const CompressionOptions usual, small = options_of(10, 11, false, false),
                                        takeover = options_of(15, 15, true, true),
                                        small_takeover = options_of(12, 9, true, true);
        const std::string none = "; server_no_context_takeover; client_no_context_takeover";
        struct Row {
            CompressionOptions options;
            std::string offer;
            std::string response;  // without the name; "-": declined
        };
        const Row rows[] = {
            {usual, "permessage-deflate", none},
            {usual, "permessage-deflate; client_max_window_bits", none},
            {usual, "permessage-deflate; client_no_context_takeover; server_no_context_takeover", none},
            {usual, "permessage-deflate; server_max_window_bits=15", none + "; server_max_window_bits=15"},
            {usual, "permessage-deflate; server_max_window_bits=10", none + "; server_max_window_bits=10"},
            {usual, "permessage-deflate; server_max_window_bits=8", none + "; server_max_window_bits=8"},
            {usual, "permessage-deflate; client_max_window_bits=15", none},
            {usual, "permessage-deflate; client_max_window_bits=8", none + "; client_max_window_bits=8"},
            {takeover, "permessage-deflate", ""},
            {takeover, "permessage-deflate; server_no_context_takeover", "; server_no_context_takeover"},
            {takeover, "permessage-deflate; client_no_context_takeover", "; client_no_context_takeover"},
            {takeover, "permessage-deflate; client_max_window_bits; server_max_window_bits=9",
             "; server_max_window_bits=9"},
            {small, "permessage-deflate", none + "; server_max_window_bits=10"},
            {small, "permessage-deflate; server_max_window_bits=12", none + "; server_max_window_bits=10"},
            {small, "permessage-deflate; server_max_window_bits=9", none + "; server_max_window_bits=9"},
            {small, "permessage-deflate; client_max_window_bits",
             none + "; server_max_window_bits=10; client_max_window_bits=11"},
            {small_takeover, "permessage-deflate; client_max_window_bits=10",
             "; server_max_window_bits=12; client_max_window_bits=9"},
            // Quoted values (RFC 6455 9.1) and optional white space.
            {usual, "permessage-deflate;server_max_window_bits=\"10\"", none + "; server_max_window_bits=10"},
            {usual, "permessage-deflate ;\tserver_max_window_bits = \"1\\0\" ", none + "; server_max_window_bits=10"},
            // Several offers in order of preference.
            {takeover, "permessage-deflate; server_max_window_bits=10, permessage-deflate",
             "; server_max_window_bits=10"},
            {takeover, "x-webkit-deflate-frame, permessage-deflate; server_no_context_takeover, permessage-deflate",
             "; server_no_context_takeover"},
            {takeover, "permessage-deflate; mux=1, permessage-deflate; client_max_window_bits=11",
             "; client_max_window_bits=11"},
            {takeover, "foo; x=\"a, permessage_deflate; b\", permessage-deflate", "-"},
            {takeover, ",, permessage-deflate ,", ""},
            // Unknown, repeated or invalid parameters, unexpected values and missing values.
            {usual, "permessage-deflate; mux", "-"},
            {usual, "permessage-deflate; server_no_context_takeover; server_no_context_takeover", "-"},
            {usual, "permessage-deflate; client_max_window_bits; client_max_window_bits=10", "-"},
            {usual, "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10", "-"},
            {usual, "permessage-deflate; server_no_context_takeover=true", "-"},
            {usual, "permessage-deflate; client_no_context_takeover=\"\"", "-"},
            {usual, "permessage-deflate; server_max_window_bits", "-"},
            {usual, "permessage-deflate; server_max_window_bits=", "-"},
            {usual, "permessage-deflate; server_max_window_bits=7", "-"},
            {usual, "permessage-deflate; server_max_window_bits=16", "-"},
            {usual, "permessage-deflate; server_max_window_bits=08", "-"},
            {usual, "permessage-deflate; server_max_window_bits=+9", "-"},
            {usual, "permessage-deflate; server_max_window_bits=99999999999999999999999", "-"},
            {usual, "permessage-deflate; client_max_window_bits=7", "-"},
            {usual, "permessage-deflate; client_max_window_bits=0", "-"},
            {usual, "permessage-deflate; client_max_window_bits=\" 10\"", "-"},
            {usual, "permessage-deflate; Client_Max_Window_Bits", "-"},
            // Malformed lists of extensions.
            {usual, "", "-"},
            {usual, "permessage-deflate permessage-deflate", "-"},
            {usual, "permessage-deflate;", "-"},
            {usual, "permessage-deflate; =10", "-"},
            {usual, "permessage-deflate; server_max_window_bits=\"10", "-"},
            {usual, "permessage-deflate=1", "-"},
            {usual, "\"permessage-deflate\"", "-"},
            {usual, "; permessage-deflate", "-"},
            {usual, "permessage-deflated", "-"},
            {usual, "deflate-frame", "-"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.offer);
            CompressionPool pool;
            std::string lines;
            const AcceptedCompression accepted = pool.accept(extensions(lines, row.offer), row.options);
            CHECK(accepted.response == (row.response == "-" ? "" : "permessage-deflate" + row.response));
            CHECK((accepted.compression != nullptr) == (row.response != "-"));
        }
    }

    TEST_CASE("several header fields can hold offers") {
        CompressionPool pool;
        const Fields fields(
            "Sec-WebSocket-Extensions: permessage-deflate; mux\r\nHost: x\r\n"
            "sec-websocket-extensions: permessage-deflate; server_max_window_bits=9\r\n");
        CHECK(pool.accept(fields, options_of(15, 15, true, true)).response ==
              "permessage-deflate; server_max_window_bits=9");
    }

    TEST_CASE("the offer of a client follows its options") {
        CHECK(CompressionPool::offer({}) ==
              "permessage-deflate; server_no_context_takeover; client_no_context_takeover; client_max_window_bits");
        CHECK(CompressionPool::offer(options_of(15, 15, true, true)) == "permessage-deflate; client_max_window_bits");
        CHECK(CompressionPool::offer(options_of(9, 10, true, false)) ==
              "permessage-deflate; client_no_context_takeover; server_max_window_bits=9; client_max_window_bits=10");
    }

    TEST_CASE("a client accepts only responses that match its offer") {
        const CompressionOptions takeover = options_of(15, 15, true, true), small = options_of(10, 11, true, true);
        struct Row {
            CompressionOptions options;
            std::string response;
            std::string outcome;  // "yes", "no", or a part of the error
        };
        const Row rows[] = {
            {takeover, "permessage-deflate", "yes"},
            {takeover, "permessage-deflate; server_no_context_takeover; client_no_context_takeover", "yes"},
            {takeover, "permessage-deflate; server_max_window_bits=8; client_max_window_bits=8", "yes"},
            {no_takeover, "permessage-deflate; server_no_context_takeover", "yes"},
            {small, "permessage-deflate; server_max_window_bits=10; client_max_window_bits=11", "yes"},
            {small, "permessage-deflate; server_max_window_bits=9", "yes"},
            {takeover, "", "no"},
            {takeover, "permessage-deflate, permessage-deflate", "not one valid response"},
            {takeover, "permessage-deflate, foo", "not one valid response"},
            {takeover, "foo", "not one valid response"},
            {takeover, "permessage-deflate; foo", "not one valid response"},
            {takeover, "permessage-deflate; client_max_window_bits", "not one valid response"},
            {takeover, "permessage-deflate; server_max_window_bits=7", "not one valid response"},
            {takeover, "permessage-deflate; server_no_context_takeover=1", "not one valid response"},
            {takeover, "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
             "not one valid response"},
            {takeover, "permessage-deflate;", "not one valid response"},
            {takeover, "=", "not one valid response"},
            {no_takeover, "permessage-deflate", "context_takeover"},
            {small, "permessage-deflate", "server_max_window_bits"},
            {small, "permessage-deflate; server_max_window_bits=11", "server_max_window_bits"},
            {small, "permessage-deflate; server_max_window_bits=10; client_max_window_bits=12",
             "client_max_window_bits"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.response);
            CompressionPool pool;
            std::string lines, error;
            const auto compression = pool.read_response(extensions(lines, row.response), row.options, error);
            CHECK((compression != nullptr) == (row.outcome == "yes"));
            if (row.outcome == "yes" || row.outcome == "no") CHECK(error == "");
            else CHECK(contains(error, row.outcome));
        }
    }

    TEST_CASE("illegal options are an Error that names the value") {
        CompressionPool pool;
        std::string lines;
        const auto error_of = [&](auto change) {
            CompressionOptions options;
            change(options);
            const std::string error =
                test::error_of([&] { pool.accept(extensions(lines, "permessage-deflate"), options); });
            CHECK(test::error_of([&] { CompressionPool::offer(options); }) == error);
            return error;
        };
        CHECK(error_of([](auto& o) { o.level = 0; }) == "CompressionOptions: level 0 is not in 1-9");
        CHECK(error_of([](auto& o) { o.level = 10; }) == "CompressionOptions: level 10 is not in 1-9");
        CHECK(error_of([](auto& o) { o.memory_level = 0; }) == "CompressionOptions: memory_level 0 is not in 1-9");
        CHECK(error_of([](auto& o) { o.server_max_window_bits = 7; }) ==
              "CompressionOptions: server_max_window_bits 7 is not in 8-15");
        CHECK(error_of([](auto& o) { o.client_max_window_bits = 16; }) ==
              "CompressionOptions: client_max_window_bits 16 is not in 8-15");
        CHECK(error_of([](auto&) {}) == "");
    }

    TEST_CASE("reading a very long offer takes linear time") {
        CompressionPool pool;
        for (const std::string_view part :
             {"a;", "a,", "permessage-deflate;mux,", "x=\"", "\\\"", ";;;", ",,,,", "a;b=c;"}) {
            CAPTURE(part);
            std::string lines, offer;
            while (offer.size() < 4 * 1024 * 1024) offer += part;
            CHECK(pool.accept(extensions(lines, offer), {}).response == "");
        }
    }

    // ---- the examples of RFC 7692 -----------------------------------------------------------------------------------

    TEST_CASE("the examples of RFC 7692 7.2.3 are inflated in pieces of any size") {
        struct Row {
            const char* bytes;
            std::vector<std::string> messages;
        };
        const Row rows[] = {
            {"c1 07 f2 48 cd c9 c9 07 00", {"Hello"}},
            {"41 03 f2 48 cd 80 04 c9 c9 07 00", {"Hello"}},
            {"c1 07 f2 48 cd c9 c9 07 00 c1 07 f2 48 cd c9 c9 07 00", {"Hello", "Hello"}},
            {"c1 07 f2 48 cd c9 c9 07 00 c1 05 f2 00 11 00 00", {"Hello", "Hello"}},
            {"c1 0b 00 05 00 fa ff 48 65 6c 6c 6f 00", {"Hello"}},
            {"c1 08 f3 48 cd c9 c9 07 00 00", {"Hello"}},
            {"c1 08 f3 48 cd c9 c9 07 00 00 c1 05 f2 00 11 00 00", {"Hello", "Hello"}},
            {"c1 0d f2 48 05 00 00 00 ff ff ca c9 c9 07 00", {"Hello"}},
            {"c1 01 00", {""}},
            {"41 01 00 00 00 80 00", {""}},
            // Other implementations send an empty payload, or a final block without the octet after it.
            {"c1 00", {""}},
            {"c1 00 c1 07 f2 48 cd c9 c9 07 00", {"", "Hello"}},
            {"c1 07 f3 48 cd c9 c9 07 00", {"Hello"}},
            {"41 07 f3 48 cd c9 c9 07 00 80 00 c1 07 f2 48 cd c9 c9 07 00", {"Hello", "Hello"}},
            // A plain message does not change the context.
            {"c1 07 f2 48 cd c9 c9 07 00 81 03 61 62 63 c1 05 f2 00 11 00 00", {"Hello", "abc", "Hello"}},
        };
        for (const Row& row : rows) {
            CAPTURE(row.bytes);
            for (const std::size_t piece : {whole, std::size_t{1}, std::size_t{2}, std::size_t{3}, std::size_t{5}}) {
                CAPTURE(piece);
                CompressionPool pool;
                End end(Role::client, client_end(pool, options_of(15, 15, true, true)));
                end.receive(hex(row.bytes), piece);
                CHECK(end.messages == row.messages);
                CHECK(end.closed == 0);
            }
        }
    }

    TEST_CASE("the examples of RFC 7692 7.2.3 are sent") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, options_of(15, 15, true, true)));
        for (int i = 0; i < 2; ++i) CHECK(end.connection.send(Opcode::text, "Hello") == WriteStatus::sent);
        CHECK(to_hex(test::take_output(end.connection)) == "c1 07 f2 48 cd c9 c9 07 00 c1 05 f2 00 11 00 00");
    }

    TEST_CASE("without context takeover no message refers to an earlier one") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, no_takeover));
        const std::string message = words(500);
        for (int i = 0; i < 3; ++i) end.connection.send(Opcode::text, message);
        const auto sent = end.sent();
        REQUIRE(sent.size() == 3);
        for (const auto& [first_byte, payload] : sent) {
            CHECK(first_byte == compressed_text);
            CHECK(payload == sent[0].second);
            CHECK(Zlib(false, 15).message_in(payload) == message);
        }
        // A received message that refers to an earlier one is corrupt.
        end.receive(compressed_text, hex("f2 48 cd c9 c9 07 00")).receive(compressed_text, hex("f2 00 11 00 00"));
        CHECK(end.messages == std::vector<std::string>{"Hello"});
        CHECK(end.closed == 1007);
    }

    // ---- the grid --------------------------------------------------------------------------------------------------

    TEST_CASE("zlib inflates sent messages with the negotiated window") {
        const std::size_t sizes[] = {1, 2, 100, 255, 256, 257, 1000, 5000, 40'000, 70'000, 200'000};
        for (int bits = 8; bits <= 15; ++bits)
            for (const bool takeover : {false, true})
                for (const Role role : {Role::server, Role::client}) {
                    CAPTURE(bits);
                    CAPTURE(takeover);
                    CompressionPool pool;
                    const CompressionOptions options = options_of(bits, bits, takeover, takeover);
                    End end(role, role == Role::server ? server_end(pool, options) : client_end(pool, options));
                    auto reader = std::make_unique<Zlib>(false, bits);
                    for (const std::size_t size : sizes)
                        for (const bool compressible : {true, false}) {
                            CAPTURE(size);
                            const std::string message = compressible ? words(size) : noise(size);
                            CHECK(end.connection.send(Opcode::binary, message) == WriteStatus::sent);
                            const auto sent = end.sent();
                            REQUIRE(sent.size() == 1);
                            const bool compressed = sent[0].first == compressed_binary;
                            CHECK((compressed || (sent[0].first == plain_binary && !takeover)));
                            // Without takeover, a message that does not become smaller is sent plain.
                            if (!takeover) CHECK((sent[0].second.size() < size) == compressed);
                            if (compressible && size > 1000) CHECK(sent[0].second.size() < size / 2);
                            if (!takeover) reader = std::make_unique<Zlib>(false, bits);
                            CHECK((compressed ? reader->message_in(sent[0].second) == message
                                              : sent[0].second == message));
                        }
                }
    }

    TEST_CASE("messages that zlib deflated are inflated in any fragments and pieces") {
        const std::size_t sizes[] = {0, 1, 100, 5000, 70'000, 200'000};
        std::mt19937 random(7692);
        for (int bits = 9; bits <= 15; bits += 2)
            for (const bool takeover : {false, true})
                for (const Role role : {Role::server, Role::client})
                    for (const int strategy : {Z_DEFAULT_STRATEGY, Z_HUFFMAN_ONLY, Z_FIXED, Z_RLE}) {
                        CAPTURE(bits);
                        CAPTURE(takeover);
                        CompressionPool pool;
                        const CompressionOptions options = options_of(bits, bits, takeover, takeover);
                        End end(role, role == Role::server ? server_end(pool, options) : client_end(pool, options));
                        auto writer = std::make_unique<Zlib>(true, bits, 6, strategy);
                        for (const std::size_t size : sizes) {
                            CAPTURE(size);
                            const std::string message =
                                size % 3 == 0 ? noise(size) : words(size, static_cast<unsigned>(bits));
                            if (!takeover)
                                writer = std::make_unique<Zlib>(true, bits, static_cast<int>(size % 10), strategy);
                            const std::string payload = writer->message_out(message);
                            std::string frames;
                            std::size_t at = 0;
                            for (bool first = true; first || at < payload.size(); first = false) {
                                const std::size_t part = random() % 4 == 0 ? 0 : random() % (payload.size() + 1);
                                const std::string_view fragment = std::string_view(payload).substr(at, part);
                                at += fragment.size();
                                frames += frame((first ? 0x42u : 0u) | (at == payload.size() ? 0x80u : 0u), fragment,
                                                role == Role::server);
                                if (random() % 3 == 0 && at < payload.size())
                                    frames += frame(0x89, "", role == Role::server);
                                if (at == payload.size()) break;
                            }
                            const std::size_t pieces[] = {whole, 1, 7, 1000, 65536};
                            end.receive(frames, pieces[random() % (size > 5000 ? 1 : 2) + (size > 5000 ? 3 : 0)]);
                            REQUIRE(end.closed == 0);
                            REQUIRE(end.messages.size() == 1);
                            CHECK(end.messages[0] == message);
                            end.messages.clear();
                        }
                    }
    }

    TEST_CASE("both ends of a connection exchange messages with any negotiated parameters") {
        for (const int server_bits : {8, 9, 12, 15})
            for (const int client_bits : {8, 10, 15})
                for (const int takeover : {0, 1, 2, 3}) {
                    CAPTURE(server_bits);
                    CAPTURE(client_bits);
                    CAPTURE(takeover);
                    CompressionPool server_pool, client_pool;
                    const CompressionOptions options =
                        options_of(server_bits, client_bits, (takeover & 1) != 0, (takeover & 2) != 0);
                    std::string lines, error;
                    auto accepted = server_pool.accept(extensions(lines, CompressionPool::offer(options)), options);
                    auto client_compression =
                        client_pool.read_response(extensions(lines, accepted.response), options, error);
                    REQUIRE(error == "");
                    End server(Role::server, std::move(accepted.compression));
                    End client(Role::client, std::move(client_compression));
                    for (const unsigned size : {300u, 3000u, 100'000u, 100u, 70'000u}) {
                        const std::string message = words(size, size);
                        client.connection.send(Opcode::text, message);
                        server.receive(test::take_output(client.connection), 10'000);
                        server.connection.send(Opcode::text, message);
                        client.receive(test::take_output(server.connection), 10'000);
                    }
                    CHECK(server.messages.size() == 5);
                    CHECK(server.messages == client.messages);
                }
    }

    TEST_CASE("with context takeover a repeated message takes few bytes") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, options_of(15, 15, true, false)));
        const std::string message = words(1000);
        for (int i = 0; i < 2; ++i) end.connection.send(Opcode::text, message);
        const auto sent = end.sent();
        CHECK(sent[0].second.size() > 200);
        CHECK(sent[1].second.size() < 30);
    }

    TEST_CASE("small messages, empty messages and control frames are not compressed") {
        CompressionPool pool;
        CompressionOptions options = no_takeover;
        options.threshold = 100;
        End end(Role::server, server_end(pool, options));
        end.connection.send(Opcode::text, words(99));
        end.connection.send(Opcode::text, words(100));
        end.connection.send_control(Opcode::ping, words(120));
        end.receive(0x89, "are you there");
        end.connection.close(CloseCode::normal, words(120), start);
        const auto sent = end.sent();
        REQUIRE(sent.size() == 5);
        const unsigned first_bytes[] = {plain_text, compressed_text, 0x89, 0x8A, 0x88};
        for (std::size_t i = 0; i < 5; ++i) CHECK(sent[i].first == first_bytes[i]);

        End all(Role::server, server_end(pool, options_of(15, 15, true, false)));
        all.connection.send(Opcode::text, "");
        all.connection.send(Opcode::text, "a");
        all.connection.send(Opcode::text, "");
        CHECK(to_hex(test::take_output(all.connection)) == "81 00 c1 03 4a 04 00 81 00");
    }

    // ---- RSV1 ------------------------------------------------------------------------------------------------------

    TEST_CASE("RSV1 is legal only in the first frame of a message and only with negotiated compression") {
        struct Row {
            const char* bytes;
            bool negotiated;
            unsigned closed;
        };
        const Row rows[] = {
            {"c1 07 f2 48 cd c9 c9 07 00", false, 1002},
            {"c2 00", false, 1002},
            {"c1 07 f2 48 cd c9 c9 07 00", true, 0},
            {"c2 07 f2 48 cd c9 c9 07 00", true, 0},
            {"41 03 f2 48 cd 80 04 c9 c9 07 00", true, 0},
            {"41 03 f2 48 cd c0 04 c9 c9 07 00", true, 1002},  // on the last fragment too
            {"41 03 f2 48 cd 40 00", true, 1002},              // on a middle fragment too
            {"01 01 61 c0 01 62", true, 1002},                 // only on a later fragment
            {"c9 00", true, 1002},
            {"ca 00", true, 1002},
            {"c8 02 03 e8", true, 1002},
            {"41 03 f2 48 cd c9 00", true, 1002},  // on a fragment that interrupts nothing
            {"41 03 f2 48 cd 89 00 80 04 c9 c9 07 00", true, 0},
            {"a1 00", true, 1002},  // RSV2, RSV3
            {"91 00", true, 1002},
            {"e1 00", true, 1002},
            {"d1 00", true, 1002},
            {"c3 00", true, 1002},  // reserved opcodes
            {"cb 00", true, 1002},
        };
        for (const Row& row : rows) {
            CAPTURE(row.bytes);
            CompressionPool pool;
            End end(Role::client, row.negotiated ? client_end(pool, options_of(15, 15, true, true)) : nullptr);
            CHECK(end.receive(hex(row.bytes)).closed == row.closed);
        }
    }

    // ---- invalid messages ------------------------------------------------------------------------------------

    TEST_CASE("an invalid DEFLATE stream and an unfinished block close with 1007") {
        const char* const payloads[] = {
            "ff ff ff ff",              // a reserved type of block
            "06",                       // the same in a message of one byte
            "00 05 00 00 00 48",        // a stored block whose length does not match its complement
            "f2 48 cd c9",              // the beginning of "Hello"
            "00 05 00 fa ff 48 65",     // the beginning of a stored block
            "f2 00 11 00 00",           // a reference to before the first message
            "05 00 00 00 00 00 00 00",  // invalid dynamic codes
            "f3 48 cd c9 c9 07 00 ff",  // invalid data after a final block
        };
        for (const char* payload : payloads) {
            CAPTURE(payload);
            for (const bool takeover : {false, true})
                for (const std::size_t piece : {whole, std::size_t{1}}) {
                    CompressionPool pool;
                    End end(Role::server, server_end(pool, options_of(15, 15, takeover, takeover)));
                    end.receive(compressed_binary, hex(payload), piece);
                    CHECK(end.messages.empty());
                    CHECK(end.closed == 1007);
                    CHECK(end.connection.close_reason() == "message is not valid DEFLATE data (RFC 7692)");
                }
        }
    }

    TEST_CASE("a corrupt stream and invalid UTF-8 close the connection before the message ends") {
        CompressionPool pool;
        const CompressionOptions options = no_takeover;
        End corrupt(Role::server, server_end(pool, options));
        CHECK(corrupt.receive(0x42, hex("ff")).closed == 1007);  // not a last fragment

        // The first fragment has the invalid byte. The rest of the message has not arrived.
        std::string bad = words(3000) + "\xff" + words(3000);
        const std::string payload = Zlib(true, 15, 0).message_out(bad);
        End invalid(Role::server, server_end(pool, options));
        invalid.receive(0x41, std::string_view(payload).substr(0, 2900));
        CHECK(invalid.closed == 0);
        invalid.receive(0x00, std::string_view(payload).substr(2900, 300));
        CHECK(invalid.closed == 1007);
        CHECK(invalid.connection.close_reason() == "text is not UTF-8");

        End unfinished(Role::server, server_end(pool, options));
        unfinished.receive(compressed_text, Zlib(true, 15).message_out("caf\xc3"));
        CHECK(unfinished.closed == 1007);
        CHECK(unfinished.connection.close_reason() == "text is not UTF-8");

        End bytes(Role::server, server_end(pool, options));
        CHECK(bytes.receive(compressed_binary, Zlib(true, 15).message_out(bad)).closed == 0);
        CHECK(bytes.messages == std::vector<std::string>{bad});
    }

    TEST_CASE("a changed bit results in a message, 1007 or 1009") {
        CompressionPool pool;
        std::mt19937 random(11);
        const std::string payload = Zlib(true, 15).message_out(words(3000));
        for (std::size_t at = 0; at < payload.size(); ++at)
            for (int i = 0; i < 4; ++i) {
                std::string changed = payload;
                changed[at] = static_cast<char>(changed[at] ^ (1 << (random() % 8)));
                End end(Role::server, server_end(pool, options_of(15, 15, false, random() % 2 == 0)), 64 * 1024);
                end.receive(compressed_binary, changed, random() % 2 == 0 ? whole : 1 + random() % 100);
                CHECK((end.messages.size() == 1 || end.closed == 1007 || end.closed == 1009));
            }
    }

    // ---- bombs -----------------------------------------------------------------------------------------------------

    TEST_CASE("the size limit applies to the inflated message") {
        CompressionPool pool;
        for (const unsigned size : {9'999u, 10'000u, 10'001u, 70'000u}) {
            CAPTURE(size);
            for (const std::size_t piece : {whole, std::size_t{10}}) {
                End end(Role::server, server_end(pool, no_takeover), 10'000);
                end.receive(compressed_binary, Zlib(true, 15).message_out(std::string(size, 'x')), piece);
                CHECK(end.messages.size() == (size <= 10'000 ? 1 : 0));
                CHECK(end.closed == (size <= 10'000 ? 0 : 1009));
            }
            // A message that does not compress can be longer on the wire than the limit.
            End end(Role::server, server_end(pool, no_takeover), size);
            end.receive(compressed_binary, Zlib(true, 15, 6, Z_FIXED).message_out(noise(size)));
            CHECK(end.messages.size() == 1);
        }
    }

    TEST_CASE("a decompression bomb takes about as much memory as the limit and closes with 1009") {
        constexpr std::size_t limit = 1024 * 1024;
        const std::string zeros(16 * limit, '\0');
        Zlib deflate(true, 15, 9), finish(true, 15, 9);
        std::string nested;
        for (int i = 0; i < 16; ++i) nested += finish.run(std::string_view(zeros).substr(0, limit), Z_FINISH);
        struct Bomb {
            const char* name;
            std::string payload;
        };
        const Bomb bombs[] = {
            {"a thousand to one", deflate.message_out(zeros)},
            {"many final blocks", nested},
        };
        for (const Bomb& bomb : bombs) {
            CAPTURE(bomb.name);
            CHECK(bomb.payload.size() * 900 < zeros.size());
            for (const std::size_t piece : {whole, std::size_t{100}}) {
                CompressionPool pool;
                End end(Role::server, server_end(pool, no_takeover), limit);
                const std::string bytes = frame(compressed_binary, bomb.payload, true);
                std::size_t buffered = 0;
                for (std::size_t at = 0; at < bytes.size(); at += std::min(piece, bytes.size())) {
                    end.receive(std::string_view(bytes).substr(at, piece));
                    buffered = std::max(buffered, end.connection.buffered_input());
                }
                CHECK(end.closed == 1009);
                CHECK(end.messages.empty());
                CHECK(buffered <= 2 * limit + 64 * 1024);
            }
        }
    }

    TEST_CASE("an endless message that inflates to nothing closes with 1009") {
        CompressionPool pool;
        const std::string stored = hex("00 00 00 ff ff"), final_block = hex("03 00");
        for (const std::string& block : {stored, final_block}) {
            CAPTURE(to_hex(block));
            std::string blocks;
            while (blocks.size() < 1000 * block.size()) blocks += block;
            End end(Role::server, server_end(pool, no_takeover), 100'000);
            end.limits.max_fragments = 1'000'000;
            end.receive(0x42, blocks);
            std::size_t sent = blocks.size();
            for (; end.closed == 0 && sent < 10'000'000; sent += blocks.size()) end.receive(0x00, blocks);
            CHECK(end.closed == 1009);
            CHECK(sent < 200'000);
        }
        // The announced length is enough to fail.
        End end(Role::server, server_end(pool, no_takeover), 100'000);
        end.receive(hex("c2 ff 00 00 00 00 00 0f 00 00 00 00 00 00"));
        CHECK(end.closed == 1009);
        End huge(Role::server, server_end(pool, no_takeover), 100'000);
        huge.receive(hex("c2 ff 7f ff ff ff ff ff ff ff 00 00 00 00"));
        CHECK(huge.closed == 1009);
    }

    TEST_CASE("input that inflates to much more is processed in several turns without loss") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, no_takeover));
        std::string bytes;
        for (int i = 0; i < 20; ++i)
            bytes +=
                frame(compressed_binary, Zlib(true, 15).message_out(std::string(100'000, static_cast<char>(i))), true);
        end.connection.receive(&bytes[0], bytes.size(), start);
        std::size_t messages = 0, turns = 1;
        for (;;) {
            const Event event = end.connection.next_event();
            if (event.kind == Event::Kind::none) break;
            if (event.kind == Event::Kind::message)
                CHECK((event.message.data() == std::string(100'000, static_cast<char>(messages++))));
            if (!end.connection.inflate_budget_spent()) continue;
            end.connection.pause_input();
            bytes.assign(bytes.size(), '!');
            end.connection.resume_input();
            CHECK_FALSE(end.connection.inflate_budget_spent());
            ++turns;
        }
        CHECK(messages == 20);
        CHECK(turns >= 20);  // each message is more than the budget of a turn
    }

    TEST_CASE("one message that inflates to megabytes is processed in several turns without loss") {
        std::string text;
        for (int i = 0; text.size() < 3'000'000; ++i)
            text += std::to_string(i * 7919) + std::string(i % 5000 == 0 ? 90'000 : 9, 'x');
        for (const bool takeover : {false, true})
            for (const std::size_t piece : {std::size_t{1}, std::size_t{1000}, std::size_t{64 * 1024}, whole}) {
                CAPTURE(takeover);
                CAPTURE(piece);
                CompressionPool pool;
                End end(Role::server, server_end(pool, options_of(15, 15, takeover, takeover)), 4 * 1024 * 1024);
                std::optional<Zlib> zlib;
                std::string bytes;
                for (int i = 0; i < 2; ++i) {
                    if (!zlib || !takeover) zlib.emplace(true, 15);
                    const std::string payload = zlib->message_out(text);
                    FrameHeader header;
                    header.rsv1 = header.masked = true;
                    header.mask = test::test_mask();
                    header.length = payload.size();
                    wschat::detail::SendArena arena;
                    bytes += wschat::detail::encode_frame(arena, header, payload).view();
                }
                std::size_t messages = 0, pauses = 0;
                for (std::size_t at = 0; at < bytes.size(); at += std::min(piece, bytes.size())) {
                    std::string part = bytes.substr(at, piece);
                    end.connection.receive(&part[0], part.size(), start);
                    for (;;) {
                        const Event event = end.connection.next_event();
                        if (event.kind == Event::Kind::none) break;
                        REQUIRE(event.kind != Event::Kind::close);
                        if (event.kind == Event::Kind::message) CHECK((event.message.data() == text));
                        messages += event.kind == Event::Kind::message ? 1u : 0u;
                        if (!end.connection.budget_spent()) continue;
                        end.connection.pause_input();
                        part.assign(part.size(), '!');
                        end.connection.resume_input();
                        ++pauses;
                    }
                }
                CHECK(messages == 2);
                if (piece >= 64 * 1024) CHECK(pauses > 10);
            }
    }

    TEST_CASE("a message of many frames is processed in several turns") {
        End end(Role::server, nullptr);
        end.limits.max_fragments = 10'000;
        std::string bytes = frame(0x01, "a", true);
        for (int i = 0; i < 5000; ++i) bytes += frame(0x00, i % 2 == 0 ? "b" : "", true);
        bytes += frame(0x80, "c", true);
        end.connection.receive(&bytes[0], bytes.size(), start);
        std::size_t pauses = 0;
        Event event = end.connection.next_event();
        for (; event.kind == Event::Kind::paused; event = end.connection.next_event()) {
            CHECK(end.connection.budget_spent());
            end.connection.pause_input();
            bytes.assign(bytes.size(), '!');
            end.connection.resume_input();
            ++pauses;
        }
        REQUIRE(event.kind == Event::Kind::message);
        CHECK((event.message.data() == "a" + std::string(2500, 'b') + "c"));
        CHECK(pauses == 4);
    }

    TEST_CASE("an unfinished message takes the memory of its inflated part and a finished one takes none") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, no_takeover));
        const std::string payload = Zlib(true, 15).message_out(words(300'000));
        end.receive(0x42, std::string_view(payload).substr(0, 1));
        CHECK(end.connection.buffered_input() > 30'000);  // the decompressor
        CHECK(end.connection.buffered_input() < 50'000);
        end.receive(0x00, std::string_view(payload).substr(1, payload.size() / 2));
        CHECK(end.connection.buffered_input() > 100'000);
        CHECK(end.connection.buffered_input() < 450'000);
        end.receive(0x80, std::string_view(payload).substr(1 + payload.size() / 2));
        CHECK(end.messages.size() == 1);
        CHECK(end.connection.buffered_input() == 0);
    }

    // ---- sending -----------------------------------------------------------------------------------------------

    TEST_CASE("a dropped message does not change the context") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, options_of(15, 15, true, false)));
        end.limits.max_backlog = 4000;
        end.limits.backlog_policy = BacklogPolicy::drop;
        Zlib reader(false, 15);
        std::size_t dropped = 0;
        for (unsigned i = 0; i < 50; ++i) {
            const std::string message = words(2000, i % 5);
            if (end.connection.send(Opcode::text, message) == WriteStatus::dropped) {
                ++dropped;
                for (const auto& [first_byte, payload] : end.sent()) {
                    CHECK(first_byte == compressed_text);
                    CHECK(reader.message_in(payload).size() == 2000);
                }
            }
        }
        CHECK(dropped > 0);
        CHECK(reader.last == Z_OK);
    }

    TEST_CASE("a connection that is not open compresses and inflates nothing") {
        CompressionPool pool;
        End end(Role::server, server_end(pool, no_takeover));
        end.connection.close(CloseCode::normal, "", start);
        CHECK(end.connection.send(Opcode::text, words(5000)) == WriteStatus::closed);
        CHECK(end.connection.send(EncodedFrame(end.arena, Opcode::text, words(5000))) == WriteStatus::closed);
        CHECK(end.sent().size() == 1);
        // Later input is not inflated, and the closing handshake continues.
        end.receive(compressed_text, hex("ff ff ff"));
        CHECK(end.closed == 0);
        end.receive(0x88, hex("03 e8"));
        CHECK(end.closed == 1000);
        CHECK(end.messages.empty());
    }
}

namespace {

// Counts compressed messages.
class Counting final : public Compression {
public:
    Counting(const void* key, int& count) : Compression(0, key), count_(count) {}
    void set_input(std::string_view, bool) override {}
    Outcome inflate(char*, std::size_t, std::size_t&) override { return Outcome::done; }
    std::size_t buffered_input() const override { return 0; }
    std::string_view deflate(std::string_view, Bytes& block) override {
        ++count_;
        block.append("smaller");
        return block.view();
    }

private:
    int& count_;
};

}  // namespace

TEST_SUITE("compression") {
    TEST_CASE("members with the same parameters share one compressed frame") {
        SendArena arena;
        Limits limits;
        int count = 0, own = 0;
        const int keys[3] = {};
        std::vector<std::unique_ptr<Connection>> members;
        const auto add = [&](std::unique_ptr<Compression> compression) {
            members.push_back(std::make_unique<Connection>());
            members.back()->open(Role::server, limits, arena, start, nullptr, std::move(compression));
        };
        for (int i = 0; i < 100; ++i) add(std::make_unique<Counting>(&keys[0], count));
        for (int i = 0; i < 100; ++i) add(std::make_unique<Counting>(&keys[i % 3], count));
        for (int i = 0; i < 5; ++i) add(std::make_unique<Counting>(nullptr, own));
        for (int i = 0; i < 100; ++i) add(nullptr);

        const std::string payload = words(1000);
        const EncodedFrame frame(arena, Opcode::text, payload);
        for (const auto& member : members) CHECK(member->send(frame) == WriteStatus::sent);
        CHECK(count == 3);
        CHECK(own == 5);
        for (std::size_t i = 0; i < members.size(); ++i)
            CHECK(test::take_output(*members[i]) ==
                  (i < 205 ? hex("c1 07") + "smaller" : hex("81 7e 03 e8") + payload));
    }

    TEST_CASE("compressed frames of one turn are contiguous") {
        SendArena arena;
        Limits limits;
        int count = 0;
        Connection member;
        member.open(Role::server, limits, arena, start, nullptr, std::make_unique<Counting>(&count, count));
        for (int i = 0; i < 10; ++i)
            member.send(EncodedFrame::borrowed(arena, Opcode::text, "much longer than it will be"));
        std::string_view pieces[20];
        CHECK(member.output().gather(pieces, 20) == 1);
        CHECK(count == 10);
    }
}

// ---- over sockets --------------------------------------------------------------------------------------------------

namespace {

struct Member : WebSocketHandler {
    explicit Member(CompressionOptions options) : options_(options) {}
    std::optional<CompressionOptions> get_compression_options() override {
        if (request().query("plain")) return std::nullopt;
        CompressionOptions options = options_;
        if (request().query("context")) options.server_context_takeover = true;
        return options;
    }
    void open() override { room("lobby").join(*this); }
    void on_message(const Message& m) override { room("lobby").broadcast(m); }
    CompressionOptions options_;
};

}  // namespace

TEST_SUITE("compression") {
    TEST_CASE("a server and a client exchange compressed messages over a socket") {
        RunningServer running;
        running.server.route<Echo>("/", no_takeover);
        running.server.route<Echo>("/context", options_of(12, 11, true, true));
        running.start();
        for (const char* target : {"/", "/context"})
            for (const bool takeover : {false, true}) {
                CAPTURE(target);
                WsClient client(running.port(), target, "", options_of(15, 15, takeover, takeover));
                REQUIRE(client.is_open());
                CHECK(client.compressed);
                for (const unsigned size : {1u, 500u, 70'000u, 1'000'000u}) {
                    const std::string message = words(size);
                    client.send(message);
                    CHECK((client.next() == message));
                }
                const std::uint64_t before = running.metrics().bytes_sent;
                client.send(std::string(1'000'000, 'x'));
                CHECK(client.next()->size() == 1'000'000);
                CHECK(running.metrics().bytes_sent - before < 5000);
                client.close();
                CHECK(client.close_code() == CloseCode::normal);
            }
    }

    TEST_CASE("compression needs an offer and options of the handler") {
        struct Plain : WebSocketHandler {
            void on_message(const Message& m) override { write_message(m); }
        };
        RunningServer running;
        running.server.route<Plain>("/");
        running.server.route<Echo>("/deflate", CompressionOptions());
        running.start();
        WsClient declined(running.port(), "/", "", CompressionOptions());
        CHECK(declined.is_open());
        CHECK_FALSE(declined.compressed);
        CHECK(!contains(declined.head, "Extensions"));
        WsClient silent(running.port(), "/deflate");
        CHECK(silent.is_open());
        CHECK(!contains(silent.head, "Extensions"));
        silent.send(words(5000));
        CHECK(silent.next() == words(5000));
        WsClient wrong(running.port(), "/deflate", "Sec-WebSocket-Extensions: permessage-deflate; mux\r\n");
        CHECK(wrong.is_open());
        WsClient agreed(running.port(), "/deflate", "", CompressionOptions());
        CHECK(agreed.compressed);
        CHECK(contains(agreed.head,
                       "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; "
                       "client_no_context_takeover\r\n"));
    }

    TEST_CASE("illegal options send a 500 and log the Error") {
        std::string log;
        RunningServer running;
        running.server.on_log([&](const LogEntry& entry) { log += to_string(entry); });
        CompressionOptions options;
        options.level = 77;
        running.server.route<Echo>("/", options);
        running.start();
        WsClient client(running.port(), "/", "", CompressionOptions());
        CHECK(client.head.find("HTTP/1.1 500") == 0);
        running.stop();
        CHECK(contains(log, "CompressionOptions: level 77 is not in 1-9"));
    }

    TEST_CASE("a broadcast reaches members with all kinds of compression") {
        RunningServer running;
        running.server.route<Member>("/", options_of(15, 15, false, true));
        running.start();
        std::vector<std::unique_ptr<WsClient>> clients;
        for (const char* target : {"/", "/?plain=1", "/?context=1"})
            for (const int bits : {8, 11, 15}) {
                clients.push_back(
                    std::make_unique<WsClient>(running.port(), target, "", options_of(bits, bits, true, true)));
                clients.push_back(std::make_unique<WsClient>(running.port(), target));
            }
        for (const auto& client : clients) REQUIRE(client->is_open());
        REQUIRE(running.eventually([&] { return running.server.rooms()["lobby"].size() == clients.size(); }));
        for (unsigned round = 0; round < 5; ++round) {
            const std::string message = words(round * 30'000 + 10, round);
            clients[round]->send(message);
            for (const auto& client : clients) CHECK((client->next() == message));
        }
    }

    TEST_CASE("a compressed message stays valid while its callback writes and broadcasts") {
        struct Busy : WebSocketHandler {
            std::optional<CompressionOptions> get_compression_options() override { return no_takeover; }
            void open() override { room("lobby").join(*this); }
            void on_message(const Message& m) override {
                const std::string before(m.data());
                for (int i = 0; i < 3; ++i) {
                    room("lobby").broadcast(m);
                    write_message(m);
                    write_message(noise(100'000), Opcode::binary);
                }
                intact = intact && m.data() == before;
                if (m.size() < 1000) close(CloseCode{4000}, "enough");
            }
            bool intact = true;
            void on_close() override {
                if (!intact) write_message("changed");  // closed: dropped
                CHECK(intact);
            }
        };
        RunningServer running;
        running.server.route<Busy>("/");
        running.start();
        WsClient client(running.port(), "/", "", no_takeover);
        for (const unsigned size : {200'000u, 5000u, 500u}) {
            const std::string message = words(size);
            client.send(message);
            for (int i = 0; i < 3; ++i) {
                CHECK((client.next() == message));
                CHECK((client.next() == message));
                CHECK((client.next() == noise(100'000)));
            }
        }
        CHECK(client.close_code() == CloseCode{4000});
    }

    TEST_CASE("after a bomb and after a corrupt message the Close frame arrives and the server continues") {
        RunningServer running;
        running.server.route<Echo>("/", no_takeover);
        running.start();
        const std::string bomb = Zlib(true, 15, 9).message_out(std::string(64 * 1024 * 1024, '\0'));
        for (const auto& [payload, code] : {std::pair<std::string, CloseCode>(bomb, CloseCode::message_too_big),
                                            {hex("ff ff ff"), CloseCode::invalid_payload}}) {
            WsClient client(running.port(), "/", "", no_takeover);
            REQUIRE(client.is_open());
            client.raw.send(frame(compressed_binary, payload, true));
            CHECK(client.close_code() == code);
        }
        WsClient client(running.port(), "/", "", no_takeover);
        client.send(words(5000));
        CHECK(client.next() == words(5000));
    }

    TEST_CASE("hundreds of large compressed messages from one client do not delay another client") {
        RunningServer running;
        running.server.route<Echo>("/", no_takeover);
        running.start();
        WsClient heavy(running.port(), "/", "", no_takeover);
        WsClient light(running.port(), "/", "", no_takeover);
        const std::string large =
            frame(compressed_binary, Zlib(true, 15, 9).message_out(std::string(1'000'000, '\0')), true);
        std::string all;
        for (int i = 0; i < 300; ++i) all += large;
        heavy.raw.send(all);
        light.send("hello");
        CHECK(light.next() == "hello");
        for (int i = 0; i < 300; ++i) REQUIRE(heavy.next()->size() == 1'000'000);
    }

    TEST_CASE("unfinished compressed messages count towards max_total_backlog") {
        ServerOptions options;
        options.server_limits.max_total_backlog = 500'000;
        RunningServer running(options);
        running.server.route<Echo>("/", no_takeover);
        running.start();
        std::vector<std::unique_ptr<WsClient>> clients;
        for (int i = 0; i < 30; ++i) {
            clients.push_back(std::make_unique<WsClient>(running.port(), "/", "", no_takeover));
            REQUIRE(clients.back()->is_open());
        }
        for (const auto& client : clients) client->raw.send(frame(0x41, hex("f2 48 cd"), true));
        CHECK(running.eventually([&] {
            const Metrics metrics = running.server.metrics();
            return metrics.closed.at(CloseCause::backlog) >= 17 && metrics.backlog_bytes <= 500'000;
        }));
        CHECK(running.metrics().websockets_open >= 10);
    }

    TEST_CASE("compressed messages of all sizes around the buffers come back to a peer that reads late") {
        for (const bool takeover : {false, true}) {
            struct Late : test::LateEcho {
                explicit Late(bool with_takeover) : takeover(with_takeover) {}
                std::optional<CompressionOptions> get_compression_options() override {
                    return options_of(15, 15, takeover, takeover);
                }
                bool takeover;
            };
            CAPTURE(takeover);
            RunningServer running(test::without_pings());
            running.server.route<Late>("/", takeover);
            running.start();
            WsClient client(running.port(), "/", {}, options_of(15, 15, takeover, takeover));
            CHECK(client.compressed);
            CHECK(test::complaint_of_late_reader(running, client) == "");
        }
    }
}

#else

TEST_SUITE("compression") {
    TEST_CASE("a server without zlib declines every offer") {
        static_assert(!compression_available);
        RunningServer running;
        running.server.route<Echo>("/", options_of(15, 15, true, true));
        running.start();
        WsClient client(running.port(), "/",
                        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n");
        REQUIRE(client.is_open());
        CHECK(!contains(client.head, "Extensions"));
        client.send("plain");
        CHECK(client.next() == "plain");
        client.raw.send(hex("c1 80 00 00 00 00"));
        CHECK(client.close_code() == CloseCode::protocol_error);
    }
}

#endif
