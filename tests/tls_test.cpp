// section 11: streams in memory with the ciphertext in pieces of any size, then the server over sockets. With
// WSCHAT_TEST_TLS=1 the server's suites also run over TLS.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;

#if !WSCHAT_OPENSSL

TEST_SUITE("tls") {
    TEST_CASE("without WSCHAT_OPENSSL the header does not include OpenSSL") {
#if defined(OPENSSL_VERSION_NUMBER)
        CHECK(false);
#else
        CHECK(WSCHAT_OPENSSL == 0);
#endif
    }
}

#else

#include <csignal>

#include <malloc.h>
#include <openssl/hmac.h>

using test::CertificateFiles;
using test::contains;
using test::Echo;
using test::error_of;
using test::RawClient;
using test::RunningServer;
using test::WsClient;

namespace {

// The memory of OpenSSL, in bytes. It can be made to run out.
struct OpensslMemory {
    OpensslMemory() { installed = CRYPTO_set_mem_functions(&allocate, &reallocate, &release) == 1; }
    static void* allocate(std::size_t size, const char*, int) { return fails() ? nullptr : add(std::malloc(size)); }
    static void* reallocate(void* block, std::size_t size, const char*, int) {
        if (fails()) return nullptr;
        const std::size_t before = block == nullptr ? 0 : ::malloc_usable_size(block);
        void* const larger = std::realloc(block, size);
        if (larger != nullptr || size == 0) held -= before;
        return add(larger);
    }
    static void release(void* block, const char*, int) {
        if (block != nullptr) held -= ::malloc_usable_size(block);
        std::free(block);
    }
    static void* add(void* block) {
        if (block != nullptr) held += ::malloc_usable_size(block);
        return block;
    }
    static bool fails() { return fail_after != 0 && --fail_after == 0; }

    static inline std::atomic<std::size_t> held{0};
    static inline thread_local std::size_t fail_after = 0;  // the n-th allocation of this thread fails; 0: none
    bool installed = false;
};
const OpensslMemory openssl_memory;

std::shared_ptr<const TlsContext> server_context(const TlsOptions& options) {
    return std::make_shared<const TlsContext>(options);
}
std::shared_ptr<const TlsContext> client_context(const std::string& authorities, const TlsOptions& own = {"", ""}) {
    ClientTls options;
    options.authorities = authorities;
    options.certificate = own.certificate;
    options.key = own.key;
    return std::make_shared<const TlsContext>(options);
}
std::shared_ptr<const TlsContext> insecure_client_context() {
    ClientTls options;
    options.insecure_accept_any_certificate = true;
    return std::make_shared<const TlsContext>(options);
}

// Takes all ciphertext out of the stream.
std::string take_output(TlsStream& stream) {
    std::string bytes(stream.output());
    stream.consume(bytes.size());
    return bytes;
}

// Feeds ciphertext in pieces of the given size, and returns the plaintext.
std::string feed(TlsStream& stream, const std::string& bytes, std::size_t piece = std::string::npos) {
    std::string text;
    std::vector<char> buffer(50'000);
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
        const std::string part = bytes.substr(at, piece);
        stream.receive(part);
        for (;;) {
            const IoResult result = stream.read(buffer.data(), buffer.size());
            if (result.outcome != IoResult::Outcome::done) break;
            text.append(buffer.data(), result.size);
        }
        stream.store_input();  // also after an error: `part` ends here
    }
    return text;
}

// Exchanges ciphertext until neither side has more.
void exchange(TlsStream& client, TlsStream& server, std::size_t piece = std::string::npos) {
    client.handshake();
    for (;;) {
        const std::string up = take_output(client), down = take_output(server);
        if (up.empty() && down.empty()) return;
        feed(server, up, piece);
        feed(client, down, piece);
    }
}

// The ciphertext of a text of any size.
std::string encrypt(TlsStream& stream, std::string_view text) {
    std::string bytes;
    for (; !text.empty(); text.remove_prefix((std::min)(text.size(), TlsStream::max_record))) {
        REQUIRE(stream.write(text.substr(0, TlsStream::max_record)).outcome == IoResult::Outcome::done);
        bytes += take_output(stream);
    }
    return bytes;
}

IoResult::Outcome read_outcome(TlsStream& stream) {
    char buffer[100];
    return stream.read(buffer, sizeof buffer).outcome;
}

std::string pattern(std::size_t size) {
    std::string text(size, '\0');
    for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 31 + i / 255);
    return text;
}

// The version that the client limits itself to.
constexpr int versions[] = {TLS1_2_VERSION, TLS1_3_VERSION};

// A client and a server in memory.
struct Pair {
    explicit Pair(int version = TLS1_3_VERSION)
        : client(insecure_client_context(), "localhost"), server(server_context(files.options())) {
        SSL_set_max_proto_version(client.native(), version);
    }
    Pair& connect(std::size_t piece = std::string::npos) {
        exchange(client, server, piece);
        REQUIRE(client.established());
        REQUIRE(server.established());
        return *this;
    }
    CertificateFiles files{"pair"};
    TlsStream client, server;
};

// An echo server that listens with TLS and runs.
struct TlsServer : RunningServer {
    explicit TlsServer(const std::string& name, ServerOptions options = {})
        : RunningServer(std::move(options)), files(name) {
        server.route<Echo>("/");
        server.listen_tls(0, files.options());
        run();
    }
    const CertificateFiles files;
};

const std::string hello_masked = test::hex("81 85 37 fa 21 3d 7f 9f 4d 51 58");
const std::string hello_plain = test::hex("81 05 48 65 6c 6c 6f");
std::string upgrade() { return handshake_request("localhost", "/", WsClient::key); }

// A client with a stream and a socket that the test controls separately.
struct ManualClient {
    ManualClient(int port, std::shared_ptr<const TlsContext> context = insecure_client_context(),
                 const std::string& host = "localhost")
        : raw(RawClient::plain(port)), stream(std::move(context), host) {}
    // Completes the handshake. False: it failed.
    bool handshake() {
        stream.handshake();
        while (!stream.established() && stream.failure().empty()) {
            raw.send(take_output(stream));
            if (!read_some()) return false;
        }
        raw.send(take_output(stream));
        return stream.established();
    }
    // Completes the handshake and opens a WebSocket.
    bool open() {
        if (!handshake()) return false;
        send(upgrade());
        const bool opened = read_until("\r\n\r\n");
        text.clear();
        return opened;
    }
    bool read_some() {
        if (!raw.read_some()) return false;
        text += feed(stream, raw.received);
        raw.received.clear();
        return true;
    }
    bool read_until(std::string_view part) {
        while (!contains(text, part))
            if (!read_some()) return false;
        return true;
    }
    void send(std::string_view plain) { raw.send(encrypt(stream, plain)); }

    RawClient raw;
    TlsStream stream;
    std::string text;
};

// Encrypts records of TLS 1.3 as a client that OpenSSL cannot be: with any type and any content. It must see all
// records that the client encrypts after its handshake.
class RecordForge {
public:
    // Call it before the handshake.
    static void prepare(TlsStream& client) {
        REQUIRE(SSL_set_ciphersuites(client.native(), "TLS_AES_128_GCM_SHA256") == 1);
        secret().clear();
        SSL_CTX_set_keylog_callback(SSL_get_SSL_CTX(client.native()), [](const SSL*, const char* line) {
            const std::string text = line;
            if (text.rfind("CLIENT_TRAFFIC_SECRET_0 ", 0) != 0) return;
            std::string spaced;
            for (std::size_t i = text.rfind(' ') + 1; i < text.size(); i += 2) spaced += text.substr(i, 2) + " ";
            secret() = test::hex(spaced);
        });
    }
    std::string record(std::string_view content, char type = SSL3_RT_APPLICATION_DATA) {
        std::string plain = std::string(content) + type;
        const std::size_t size = plain.size() + 16;
        const std::string header = test::hex("17 03 03") + static_cast<char>(size >> 8) + static_cast<char>(size & 255);
        const std::string key = expand("key", 16);
        std::string nonce = expand("iv", 12);
        for (unsigned i = 0; i < 8; ++i) nonce[11 - i] ^= static_cast<char>(number_ >> 8 * i & 255);
        ++number_;
        std::string result = header + std::string(size, '\0');
        const OpensslPtr<EVP_CIPHER_CTX, &EVP_CIPHER_CTX_free> context(EVP_CIPHER_CTX_new());
        int done = 0;
        EVP_EncryptInit_ex(context.get(), EVP_aes_128_gcm(), nullptr, bytes(key), bytes(nonce));
        EVP_EncryptUpdate(context.get(), nullptr, &done, bytes(header), 5);
        auto* const out = reinterpret_cast<unsigned char*>(&result[5]);
        EVP_EncryptUpdate(context.get(), out, &done, bytes(plain), static_cast<int>(plain.size()));
        EVP_EncryptFinal_ex(context.get(), out + done, &done);
        EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_GET_TAG, 16, out + plain.size());
        return result;
    }

private:
    static std::string& secret() {
        static std::string bytes;
        return bytes;
    }
    static const unsigned char* bytes(const std::string& text) {
        return reinterpret_cast<const unsigned char*>(text.data());
    }
    // RFC 8446 7.1, HKDF-Expand-Label.
    static std::string expand(const std::string& label, std::size_t size) {
        const std::string full = "tls13 " + label;
        const std::string info = std::string(1, '\0') + static_cast<char>(size) + static_cast<char>(full.size()) +
                                 full + std::string(1, '\0') + '\1';
        unsigned char digest[32];
        HMAC(EVP_sha256(), secret().data(), static_cast<int>(secret().size()), bytes(info), info.size(), digest,
             nullptr);
        return {reinterpret_cast<const char*>(digest), size};
    }

    std::uint64_t number_ = 0;
};

// One end of a pair of connected sockets, with TLS, and what comes out at the other end.
struct TransportPair {
    explicit TransportPair(int version = TLS1_3_VERSION) : client(insecure_client_context(), "localhost") {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        for (const int end : ends) os::make_nonblocking(end);
        near = Socket(ends[0]);
        far = Socket(ends[1]);
        transport = std::make_unique<TlsTransport>(std::make_shared<TlsBuffers>(), server_context(files.options()));
        SSL_set_max_proto_version(client.native(), version);
        RecordForge::prepare(client);
        client.handshake();
        for (int i = 0; i < 5; ++i) {
            send(take_output(client));
            CHECK(receive(100).outcome == IoResult::Outcome::would_block);
            feed(client, read_all());
        }
        REQUIRE(transport->established());
        REQUIRE(client.established());
    }
    IoResult receive(std::size_t size) {
        received.resize(size);
        const IoResult got = transport->receive(near, &received[0], size, wire);
        received.resize(got.size);
        return got;
    }
    void send(std::string_view bytes) {
        while (!bytes.empty()) {
            const IoResult sent = far.send(&bytes, 1);
            REQUIRE(sent.size != 0);
            bytes.remove_prefix(sent.size);
        }
    }
    std::string read_all() {
        std::string all;
        std::vector<char> buffer(100'000);
        for (;;) {
            const IoResult got = far.receive(buffer.data(), buffer.size());
            if (got.outcome != IoResult::Outcome::done) return all;
            all.append(buffer.data(), got.size);
        }
    }

    CertificateFiles files{"transport"};
    Socket near, far;
    std::unique_ptr<TlsTransport> transport;
    TlsStream client;
    std::string received;
    WireCount wire;
};

// A record with a part of a handshake message that is not encrypted.
std::string plain_record(std::string_view content) {
    return test::hex("16 03 01") + static_cast<char>(content.size() >> 8) + static_cast<char>(content.size() & 255) +
           std::string(content);
}
// The same records, but each has one more message byte than the last, until `count` records are made.
std::string fragmented(std::string_view message, std::size_t count) {
    std::string records;
    for (std::size_t i = 1; i < count; ++i) {
        records += plain_record(message.substr(0, i));
        message.remove_prefix(i);
    }
    return records + plain_record(message);
}
// A ClientHello of about this size, without the header of its record.
std::string client_hello(std::size_t size) {
    const auto context = insecure_client_context();
    static std::string extension;
    extension.assign(size - 250, 'x');
    const auto add = [](SSL*, unsigned, unsigned, const unsigned char** out, std::size_t* out_size, X509*, std::size_t,
                        int*, void*) {
        *out = reinterpret_cast<const unsigned char*>(extension.data());
        *out_size = extension.size();
        return 1;
    };
    REQUIRE(SSL_CTX_add_custom_ext(context->get(), 65'000, SSL_EXT_CLIENT_HELLO, add, nullptr, nullptr, nullptr,
                                   nullptr) == 1);
    TlsStream client(context, "localhost");
    client.handshake();
    std::string message, records = take_output(client);
    for (std::string_view rest = records; !rest.empty();) {
        const std::size_t part = static_cast<unsigned char>(rest[3]) * 256u + static_cast<unsigned char>(rest[4]);
        message += rest.substr(5, part);
        rest.remove_prefix(5 + part);
    }
    return message;
}

std::string key_updates(TlsStream& client, int count) {
    std::string bytes;
    for (int i = 0; i < count; ++i) {
        REQUIRE(SSL_key_update(client.native(), SSL_KEY_UPDATE_REQUESTED) == 1);
        REQUIRE(SSL_do_handshake(client.native()) == 1);
        bytes += take_output(client);
    }
    return bytes;
}

std::string serial_of(TlsStream& stream) {
    const OpensslPtr<X509, &X509_free> certificate(SSL_get_peer_certificate(stream.native()));
    REQUIRE(certificate);
    const OpensslPtr<BIGNUM, &BN_free> number(ASN1_INTEGER_to_BN(X509_get_serialNumber(certificate.get()), nullptr));
    std::string bytes(64, '\0');
    bytes.resize(static_cast<std::size_t>(BN_bn2bin(number.get(), reinterpret_cast<unsigned char*>(&bytes[0]))));
    return test::to_hex(bytes);
}

// Replaces the certificate by an expired one.
void expire(const CertificateFiles& files) {
    const auto open = [](const std::string& path, const char* mode) {
        return OpensslPtr<BIO, &BIO_free>(BIO_new_file(path.c_str(), mode));
    };
    const OpensslPtr<X509, &X509_free> certificate(
        PEM_read_bio_X509(open(files.certificate, "r").get(), nullptr, nullptr, nullptr));
    const OpensslPtr<EVP_PKEY, &EVP_PKEY_free> key(
        PEM_read_bio_PrivateKey(open(files.key, "r").get(), nullptr, nullptr, nullptr));
    REQUIRE(certificate);
    REQUIRE(key);
    X509_time_adj_ex(X509_getm_notBefore(certificate.get()), -2, 0, nullptr);
    X509_time_adj_ex(X509_getm_notAfter(certificate.get()), -1, 0, nullptr);
    REQUIRE(X509_sign(certificate.get(), key.get(), EVP_sha256()) != 0);
    REQUIRE(PEM_write_bio_X509(open(files.certificate, "w").get(), certificate.get()) == 1);
}

}  // namespace

TEST_SUITE_BEGIN("tls");

// ---- streams --------------------------------------------------------------------------------------------------------

TEST_CASE("two streams exchange texts of all sizes with ciphertext in pieces of any size") {
    for (const int version : versions) {
        for (const std::size_t piece :
             {std::size_t{1}, std::size_t{7}, std::size_t{1000}, std::size_t{16'500}, std::string::npos}) {
            CAPTURE(version);
            CAPTURE(piece);
            Pair pair(version);
            pair.connect(piece);
            for (const std::size_t size : {1u, 100u, 16'384u, 16'385u, 200'000u}) {
                const std::string text = pattern(size);
                CHECK((feed(pair.server, encrypt(pair.client, text), piece) == text));
                CHECK((feed(pair.client, encrypt(pair.server, text), piece) == text));
            }
            CHECK_FALSE(pair.server.has_input());
        }
    }
}

TEST_CASE("TLS 1.2 and 1.3 use forward secrecy, and ALPN selects http/1.1") {
    for (const int version : versions) {
        Pair pair(version);
        pair.connect();
        CHECK(pair.server.version() == (version == TLS1_2_VERSION ? "TLSv1.2" : "TLSv1.3"));
        CHECK(contains(pair.server.cipher(), version == TLS1_2_VERSION ? "ECDHE-ECDSA-" : "TLS_"));
        CHECK(pair.server.protocol() == "http/1.1");
        CHECK(pair.client.protocol() == "http/1.1");
        CHECK(pair.server.peer_name() == "");
        CHECK(pair.client.peer_name() == "CN=localhost");
    }
}

TEST_CASE("TLS 1.1 and ciphers without forward secrecy are refused with an alert") {
    const struct {
        int version;
        std::string ciphers, server, client;
    } table[] = {
        {TLS1_1_VERSION, "DEFAULT:@SECLEVEL=0", "unsupported protocol", "tlsv1 alert protocol version"},
        {TLS1_2_VERSION, "AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA", "no shared cipher",
         "sslv3 alert handshake failure"},
    };
    for (const auto& row : table) {
        CAPTURE(row.server);
        Pair pair;
        SSL_set_min_proto_version(pair.client.native(), TLS1_VERSION);
        SSL_set_max_proto_version(pair.client.native(), row.version);
        REQUIRE(SSL_set_cipher_list(pair.client.native(), row.ciphers.c_str()) == 1);
        exchange(pair.client, pair.server);
        CHECK(pair.server.failure() == row.server);
        CHECK(pair.client.failure() == row.client);
        CHECK_FALSE(pair.server.established());
    }
}

TEST_CASE("a client without a common ALPN protocol is refused as RFC 7301 requires") {
    Pair pair;
    const unsigned char h2[] = "\x02h2";
    SSL_set_alpn_protos(pair.client.native(), h2, 3);
    exchange(pair.client, pair.server);
    CHECK(pair.server.failure() == "no application protocol");
    CHECK(pair.client.failure() == "tlsv1 alert no application protocol");
}

TEST_CASE("a client verifies the name and the authority of a certificate unless it accepts any certificate") {
    const CertificateFiles good("good", {"chat.example", "*.wild.example", "127.0.0.1", "::1"}), other("other");
    const struct {
        std::string host, authorities, failure;
    } table[] = {
        {"chat.example", good.certificate, ""},
        {"CHAT.example", good.certificate, ""},
        {"a.wild.example", good.certificate, ""},
        {"127.0.0.1", good.certificate, ""},
        {"::1", good.certificate, ""},
        {"evil.example", good.certificate, "certificate verify failed: hostname mismatch"},
        {"wild.example", good.certificate, "certificate verify failed: hostname mismatch"},
        {"a.b.wild.example", good.certificate, "certificate verify failed: hostname mismatch"},
        {"127.0.0.2", good.certificate, "certificate verify failed: IP address mismatch"},
        {"chat.example", other.certificate, "certificate verify failed: self-signed certificate"},
        {"chat.example", "", "certificate verify failed: self-signed certificate"},
    };
    for (const auto& row : table) {
        CAPTURE(row.host);
        CAPTURE(row.authorities);
        TlsStream client(client_context(row.authorities), row.host), server(server_context(good.options()));
        exchange(client, server);
        CHECK(client.failure() == row.failure);
        CHECK(client.established() == row.failure.empty());
        if (!row.failure.empty()) CHECK(contains(server.failure(), "alert"));
    }
    TlsStream insecure(insecure_client_context(), "evil.example"), server(server_context(good.options()));
    exchange(insecure, server);
    CHECK(insecure.established());
    CHECK(server.established());
}

TEST_CASE("an expired certificate is refused") {
    const CertificateFiles old("expired");
    expire(old);
    TlsStream client(client_context(old.certificate), "localhost"), server(server_context(old.options()));
    exchange(client, server);
    CHECK(client.failure() == "certificate verify failed: certificate has expired");
}

TEST_CASE("an empty host name is an Error") {
    const auto context = client_context("");
    CHECK(contains(error_of([&] { TlsStream client(context, ""); }), "TLS: \"\" is not the name of a server"));
}

TEST_CASE("the server selects the certificate by SNI, and the first one if no name matches") {
    const CertificateFiles first("first", {"one.example"}), second("second", {"two.example", "*.two.example"});
    TlsOptions options = first.options();
    options.more.push_back({second.certificate, second.key});
    const auto context = server_context(options);
    for (const int version : versions) {
        const struct {
            std::string host, name;
        } table[] = {
            {"one.example", "CN=one.example"},   {"two.example", "CN=two.example"}, {"a.two.example", "CN=two.example"},
            {"three.example", "CN=one.example"}, {"127.0.0.1", "CN=one.example"},
        };
        for (const auto& row : table) {
            CAPTURE(row.host);
            TlsStream client(insecure_client_context(), row.host), server(context);
            SSL_set_max_proto_version(client.native(), version);
            exchange(client, server);
            CHECK(client.established());
            CHECK(client.peer_name() == row.name);
        }
    }
}

TEST_CASE("close_notify ends only one direction") {
    for (const int version : versions) {
        Pair pair(version);
        pair.connect();
        std::string bytes = encrypt(pair.client, "last words");
        pair.client.shutdown();
        bytes += take_output(pair.client);
        char buffer[100];
        pair.server.receive(bytes);
        REQUIRE(pair.server.read(buffer, sizeof buffer).size == 10);
        CHECK(read_outcome(pair.server) == IoResult::Outcome::end);
        CHECK(read_outcome(pair.server) == IoResult::Outcome::end);
        CHECK(feed(pair.client, encrypt(pair.server, "the answer")) == "the answer");
        pair.server.shutdown();
        pair.server.shutdown();
        const std::string notify = take_output(pair.server);
        CHECK_FALSE(notify.empty());
        pair.client.receive(notify);
        CHECK(read_outcome(pair.client) == IoResult::Outcome::end);
        CHECK(pair.server.failure() == "");
    }
}

TEST_CASE("bytes after close_notify are ignored") {
    Pair pair;
    pair.connect();
    pair.client.shutdown();
    CHECK(feed(pair.server, take_output(pair.client) + "GET / HTTP/1.1\r\n\r\n") == "");
    CHECK(pair.server.failure() == "");
}

TEST_CASE("without close_notify a stream does not report the end") {
    Pair pair;
    pair.connect();
    const std::string bytes = encrypt(pair.client, pattern(5000));
    pair.server.receive(std::string_view(bytes).substr(0, bytes.size() - 1));
    CHECK(read_outcome(pair.server) == IoResult::Outcome::would_block);
}

TEST_CASE("a changed byte fails the stream with an alert for the peer") {
    for (const int version : versions) {
        Pair pair(version);
        pair.connect();
        std::string bytes = encrypt(pair.client, "some words");
        bytes[bytes.size() - 3] = static_cast<char>(bytes[bytes.size() - 3] ^ 1);
        CHECK(feed(pair.server, bytes) == "");
        CHECK(pair.server.failure() == "decryption failed or bad record mac");
        const std::string alert = take_output(pair.server);
        feed(pair.client, alert);
        CHECK(pair.client.failure() == "sslv3 alert bad record mac");
        // A failed stream stays failed.
        CHECK(read_outcome(pair.server) == IoResult::Outcome::error);
        CHECK(pair.server.write("words").outcome == IoResult::Outcome::error);
        pair.server.shutdown();
        CHECK(take_output(pair.server) == "");
    }
}

TEST_CASE("the first byte reveals a peer that sends plain text") {
    for (const std::string text : {"GET / HTTP/1.1\r\n", "P", "HTTP/1.1 400 Bad Request\r\n"}) {
        Pair pair;
        pair.server.receive(text);
        CHECK(read_outcome(pair.server) == IoResult::Outcome::error);
        CHECK(pair.server.plain_text());
        CHECK(take_output(pair.server) == "");
    }
    Pair pair;
    feed(pair.server, test::hex("00 01 02 03 04 05 06 07 08 09 0a"));
    CHECK_FALSE(pair.server.plain_text());
    CHECK_FALSE(pair.server.failure().empty());
}

TEST_CASE("a client cannot renegotiate") {
    Pair pair(TLS1_2_VERSION);
    pair.connect();
    SSL_clear_options(pair.client.native(), SSL_OP_NO_RENEGOTIATION);
    REQUIRE(SSL_renegotiate(pair.client.native()) == 1);
    exchange(pair.client, pair.server);
    // RFC 5246 7.2.2: the server answers with a warning, and this client ends the connection.
    CHECK(pair.client.failure() == "no renegotiation");
    CHECK(pair.server.failure() == "sslv3 alert handshake failure");
}

TEST_CASE("a peer may update its keys, but the number of unread answers is limited") {
    Pair pair;
    pair.connect();
    const auto change_keys = [&] {
        REQUIRE(SSL_key_update(pair.client.native(), SSL_KEY_UPDATE_REQUESTED) == 1);
        feed(pair.server, encrypt(pair.client, "x"));
    };
    for (int i = 0; i < 10; ++i) change_keys();
    CHECK(feed(pair.client, encrypt(pair.server, "words")) == "words");
    std::size_t largest = 0;
    for (int i = 0; i < 20'000 && pair.server.failure().empty(); ++i) {
        change_keys();
        largest = (std::max)(largest, pair.server.output().size());
    }
    CHECK(pair.server.failure() == "the peer does not read");
    CHECK(largest < 140'000);
}

TEST_CASE("a stream ignores old entries of the thread's error queue and leaves none") {
    Pair pair;
    const auto disturb = [] { ERR_put_error(ERR_LIB_SSL, 0, SSL_R_BAD_PACKET, __FILE__, __LINE__); };
    disturb();
    exchange(pair.client, pair.server);
    REQUIRE(pair.server.established());
    disturb();
    CHECK(feed(pair.server, encrypt(pair.client, "words")) == "words");
    disturb();
    CHECK(pair.server.write("words").outcome == IoResult::Outcome::done);
    std::string bad = encrypt(pair.client, "words");
    bad.back() = static_cast<char>(bad.back() ^ 1);
    feed(pair.server, bad);
    CHECK_FALSE(pair.server.failure().empty());
    CHECK(ERR_peek_error() == 0);
}

TEST_CASE("stored input is read later, and output is consumed in parts of any size") {
    Pair pair;
    pair.connect();
    const std::string text = pattern(60'000);
    std::string got;
    {
        const std::string bytes = encrypt(pair.client, text);
        pair.server.receive(bytes);
        char buffer[10'000];
        got.append(buffer, pair.server.read(buffer, sizeof buffer).size);
        pair.server.store_input();
    }
    CHECK(pair.server.has_input());
    pair.server.receive(encrypt(pair.client, "more"));
    std::vector<char> buffer(100'000);
    got.append(buffer.data(), pair.server.read(buffer.data(), buffer.size()).size);
    CHECK((got == text + "more"));
    CHECK_FALSE(pair.server.has_input());

    pair.client.write(std::string_view(text).substr(0, 16'000));
    std::string parts;
    while (!pair.client.output().empty()) {
        const std::size_t part = (std::min)(pair.client.output().size(), std::size_t{777});
        parts += pair.client.output().substr(0, part);
        pair.client.consume(part);
    }
    CHECK((feed(pair.server, parts) == text.substr(0, 16'000)));
}

TEST_CASE("a client resumes a session with a ticket") {
    for (const int version : versions) {
        const CertificateFiles files("ticket");
        const auto context = server_context(files.options());
        TlsStream first(insecure_client_context(), "localhost"), server(context);
        SSL_set_max_proto_version(first.native(), version);
        exchange(first, server);
        const OpensslPtr<SSL_SESSION, &SSL_SESSION_free> session(SSL_get1_session(first.native()));
        TlsStream second(insecure_client_context(), "localhost"), again(context);
        SSL_set_max_proto_version(second.native(), version);
        REQUIRE(SSL_set_session(second.native(), session.get()) == 1);
        exchange(second, again);
        CHECK(second.resumed());
        CHECK(again.resumed());
        CHECK(feed(again, encrypt(second, "words")) == "words");
    }
}

TEST_CASE("an error after data is reported without more input") {
    for (const int version : versions) {
        Pair pair(version);
        pair.connect();
        std::string bytes = encrypt(pair.client, "good");
        bytes += encrypt(pair.client, "bad");
        bytes.back() = static_cast<char>(bytes.back() ^ 1);
        char buffer[100];
        pair.server.receive(bytes);
        CHECK(pair.server.read(buffer, sizeof buffer).size == 4);
        CHECK(pair.server.has_input());
        CHECK(read_outcome(pair.server) == IoResult::Outcome::error);
        CHECK_FALSE(pair.server.has_input());
    }
}

// ---- what a peer can cost -------------------------------------------------------------------------------------------

TEST_CASE("before a whole ClientHello a stream needs memory only for the received bytes") {
    REQUIRE(openssl_memory.installed);
    const CertificateFiles files("announced");
    const auto context = server_context(files.options());
    const std::string whole = plain_record(client_hello(10'000));
    for (const std::string& bytes :
         {std::string("\x16"), test::hex("16 03 01 40 00 01 00 3f fc"), test::hex("16 03 01 00 04 01 00 3f fc"),
          whole.substr(0, 5000), whole.substr(0, whole.size() - 1)}) {
        CAPTURE(bytes.size());
        const std::size_t before = OpensslMemory::held;
        TlsStream stream(context);
        feed(stream, bytes);
        CHECK(OpensslMemory::held == before);
        CHECK(stream.buffered_input() == bytes.size());
        CHECK_FALSE(stream.has_input());
        CHECK(stream.failure() == "");
    }
}

TEST_CASE("an established stream needs memory only for the received bytes of a record") {
    for (const int version : versions) {
        Pair pair(version);
        pair.connect();
        const std::string record = encrypt(pair.client, pattern(16'000));
        const std::size_t before = OpensslMemory::held;
        for (const std::size_t size : {std::size_t{1}, std::size_t{5}, std::size_t{6}, record.size() - 1}) {
            feed(pair.server, record.substr(pair.server.buffered_input(), size - pair.server.buffered_input()));
            CHECK(OpensslMemory::held == before);
            CHECK(pair.server.buffered_input() == size);
            CHECK_FALSE(pair.server.has_input());
        }
        CHECK((feed(pair.server, record.substr(record.size() - 1)) == pattern(16'000)));
        CHECK(pair.server.buffered_input() == 0);
    }
}

TEST_CASE("a ClientHello of at most 16 KiB is accepted, in up to 16 records of any size") {
    const CertificateFiles files("hellos");
    const auto context = server_context(files.options());
    const std::string small = client_hello(500), large = client_hello(16'000), oversized = client_hello(16'700);
    const std::string too_large = "a handshake message is too large";
    const std::string limit = test::hex("01 00 3f fc"), over = test::hex("01 00 3f fd");
    const struct {
        std::string name, bytes, failure;
    } table[] = {
        {"small", plain_record(small), ""},
        {"large", plain_record(large), ""},
        {"16 records", fragmented(small, 16), ""},
        {"17 records", fragmented(small, 17), "a handshake message has too many fragments"},
        {"large, 16 records", fragmented(large, 16), ""},
        {"oversized", plain_record(oversized.substr(0, 16'384)) + plain_record(oversized.substr(16'384)), too_large},
        {"over the limit", plain_record(over), too_large},
        {"at the limit", plain_record(limit + std::string(16'380, 'x')), "*"},
        {"a second message that is too large", plain_record(test::hex("01 00 00 00") + over), too_large},
        {"many messages before one that is not complete",
         plain_record(test::repeated(4095, test::hex("01 00 00 00")) + "\1") +
             plain_record(test::repeated(4095, test::hex("00 00 00 01"))),
         "a handshake message has too many fragments"},
        {"an empty record", plain_record(""), "a handshake message is interrupted"},
        {"a warning within", plain_record(small.substr(0, 9)) + test::hex("15 03 01 00 02 01 5a"),
         "a handshake message is interrupted"},
        {"an alert", test::hex("15 03 01 00 02 01 5a"), "the peer does not speak TLS"},
        {"SSL 2", test::hex("80 2e 01 03 03"), "the peer does not speak TLS"},
        {"another version", test::hex("16 02 00 00 10"), "the peer does not speak TLS"},
        {"a record that is too large", test::hex("16 03 01 48 01"), "the peer does not speak TLS"},
    };
    for (const auto& row : table) {
        for (const std::size_t piece : {std::size_t{1}, std::string::npos}) {
            CAPTURE(row.name);
            TlsStream server(context);
            feed(server, row.bytes, piece);
            if (row.failure == "*") CHECK_FALSE(server.failure().empty());
            else CHECK(server.failure() == row.failure);
            // A ServerHello or an alert.
            CHECK(server.output().substr(0, 1) == test::hex(row.failure.empty() ? "16" : "15"));
            CHECK_FALSE(server.has_input());
            if (!row.failure.empty()) CHECK(read_outcome(server) == IoResult::Outcome::error);
        }
    }
}

TEST_CASE("a second ClientHello has the same limits as the first") {
    const CertificateFiles files("retry");
    for (const bool too_large : {false, true}) {
        const auto context = server_context(files.options());
        REQUIRE(SSL_CTX_set1_groups_list(context->get(), "P-256") == 1);
        TlsStream client(insecure_client_context(), "localhost"), server(context);
        REQUIRE(SSL_set1_groups_list(client.native(), "X25519:P-256") == 1);
        client.handshake();
        feed(server, take_output(client));
        REQUIRE_FALSE(server.output().empty());  // HelloRetryRequest
        feed(client, take_output(server));
        const std::size_t before = OpensslMemory::held;
        feed(server, test::hex("14 03 03 00 01 01"));
        if (too_large) {
            feed(server, plain_record(test::hex("01 01 ff ff")));
            CHECK(server.failure() == "a handshake message is too large");
            CHECK(OpensslMemory::held <= before);
            continue;
        }
        std::string hello = take_output(client);
        hello.erase(0, 6);  // its own ChangeCipherSpec
        feed(server, hello, 1);
        feed(client, take_output(server));
        feed(server, take_output(client), 1);
        CHECK(client.established());
        CHECK(server.established());
    }
}

TEST_CASE("one receive() decrypts a limited number of records") {
    TransportPair pair;
    RecordForge forge;
    std::string bytes;
    for (int i = 0; i < 1000; ++i) bytes += forge.record("x");
    pair.send(bytes);
    std::string all;
    for (int calls = 1; all.size() < 1000; ++calls) {
        REQUIRE(pair.receive(10'000).outcome == IoResult::Outcome::done);
        REQUIRE(pair.received.size() <= 64);
        all += pair.received;
        REQUIRE(calls < 100);
    }
    CHECK_FALSE(pair.transport->has_input());
}

TEST_CASE("one receive() handles few key updates, and reports that more input waits") {
    TransportPair pair;
    pair.send(key_updates(pair.client, 100));
    pair.send(encrypt(pair.client, "words"));
    int calls = 0;
    while (pair.receive(1000).outcome == IoResult::Outcome::would_block) {
        REQUIRE(pair.transport->has_input());
        REQUIRE(++calls < 1000);
    }
    CHECK(pair.received == "words");
    CHECK(calls >= 20);
    CHECK_FALSE(pair.transport->has_input());
    CHECK(feed(pair.client, pair.read_all()) == "");
    CHECK(pair.client.failure() == "");
}

TEST_CASE("key updates above the rate of control frames fail the transport with close_notify") {
    TransportPair pair;
    const auto send = [&](int count) {
        pair.send(key_updates(pair.client, count));
        do {
            CHECK(pair.receive(1000).outcome == IoResult::Outcome::would_block);
        } while (pair.transport->has_input());
    };
    const auto allowed = [&](const Rate& rate) {
        return pair.transport->check_rate(pair.near, rate, Time(std::chrono::hours(1)), pair.wire);
    };
    send(10);
    CHECK(allowed({0, 0}));
    send(10);
    CHECK(allowed({1, 10}));
    pair.send(encrypt(pair.client, "data is free"));
    CHECK(pair.receive(1000).outcome == IoResult::Outcome::done);
    CHECK(allowed({1, 10}));
    feed(pair.client, pair.read_all());
    send(1);
    CHECK_FALSE(allowed({1, 10}));
    CHECK(pair.transport->failure() == "the peer sends too many key updates");
    CHECK(pair.receive(1000).outcome == IoResult::Outcome::error);
    feed(pair.client, pair.read_all());
    CHECK(read_outcome(pair.client) == IoResult::Outcome::end);
}

TEST_CASE("a burst of 0 allows no key update") {
    TransportPair pair;
    pair.send(key_updates(pair.client, 1));
    pair.receive(1000);
    CHECK_FALSE(pair.transport->check_rate(pair.near, {100, 0}, Time(std::chrono::hours(1)), pair.wire));
}

TEST_CASE("an attempt to renegotiate counts as a key update") {
    Pair pair(TLS1_2_VERSION);
    pair.connect();
    SSL_clear_options(pair.client.native(), SSL_OP_NO_RENEGOTIATION);
    CHECK(pair.server.take_control_records() == 0);
    REQUIRE(SSL_renegotiate(pair.client.native()) == 1);
    pair.client.handshake();
    feed(pair.server, take_output(pair.client));
    CHECK(pair.server.take_control_records() == 1);
    CHECK(pair.server.take_control_records() == 0);
}

TEST_CASE("records without data end the stream, or are limited or counted") {
    const auto forged = [](TlsStream& server, std::string_view content, char type, int count) {
        RecordForge forge;
        for (int i = 0; i < count && server.failure().empty(); ++i) feed(server, forge.record(content, type));
    };
    const struct {
        std::string name, content;
        char type;
        int count;
        std::string failure;
        std::size_t counted;
    } table[] = {
        {"few empty records", "", SSL3_RT_APPLICATION_DATA, 30, "", 0},
        {"many empty records", "", SSL3_RT_APPLICATION_DATA, 100, "record too small", 0},
        {"one byte", "x", SSL3_RT_APPLICATION_DATA, 1000, "", 0},
        {"a part of a key update", test::hex("18"), SSL3_RT_HANDSHAKE, 1, "", 1},
        {"a message that nobody expects", test::hex("01 00 00 00"), SSL3_RT_HANDSHAKE, 1, "unexpected message", 1},
        {"a certificate that is announced", test::hex("0b 01 00 00"), SSL3_RT_HANDSHAKE, 1, "unexpected message", 1},
        {"an update that is announced large", test::hex("18 01 00 00"), SSL3_RT_HANDSHAKE, 1, "excessive message size",
         1},
        {"warnings", test::hex("01 5a"), SSL3_RT_ALERT, 100, "*", 0},
        {"an unknown type", "x", 25, 1, "*", 0},
    };
    for (const auto& row : table) {
        CAPTURE(row.name);
        Pair pair;
        RecordForge::prepare(pair.client);
        pair.connect();
        const std::size_t before = OpensslMemory::held;
        forged(pair.server, row.content, row.type, row.count);
        if (row.failure == "*") CHECK_FALSE(pair.server.failure().empty());
        else CHECK(pair.server.failure() == row.failure);
        CHECK(pair.server.take_control_records() == row.counted);
        CHECK(OpensslMemory::held < before + 70'000);
    }
}

TEST_CASE("bytes that wait in a transport are counted, in both directions") {
    TransportPair pair;
    CHECK(pair.transport->buffered() == 0);
    const std::string text = pattern(40'000);
    const std::string bytes = encrypt(pair.client, text);
    pair.send(bytes);
    REQUIRE(pair.receive(100).size == 100);
    CHECK(pair.transport->buffered() >= 16'000);
    std::string all = pair.received;
    while (all.size() < text.size()) {
        REQUIRE(pair.receive(9000).outcome == IoResult::Outcome::done);
        all += pair.received;
    }
    CHECK((all == text));
    CHECK(pair.transport->buffered() == 0);

    const std::string_view piece = text;
    std::size_t sent = 0;
    for (int i = 0; i < 1000 && !pair.transport->wants_write(); ++i) {
        const std::string_view rest = piece.substr(sent % piece.size());
        sent += pair.transport->send(pair.near, &rest, 1, pair.wire).size;
    }
    REQUIRE(pair.transport->wants_write());
    CHECK(pair.transport->buffered() == 0);  // the caller has the text
    for (int i = 0; i < 20; ++i) {           // the answers of these key updates wait too
        pair.send(key_updates(pair.client, 50));
        do {
            pair.receive(1000);
        } while (pair.transport->has_input());
    }
    CHECK(pair.transport->buffered() > 10'000);
    while (pair.transport->wants_write()) {
        feed(pair.client, pair.read_all());
        pair.transport->send(pair.near, nullptr, 0, pair.wire);
    }
    CHECK(pair.transport->buffered() == 0);
}

TEST_CASE("each allocation of OpenSSL in a connection may fail") {
    const CertificateFiles files("failing");
    const auto context = server_context(files.options());
    const auto run = [&](int version, std::size_t fail_after) {
        TlsStream client(insecure_client_context(), "localhost"), server(context);
        SSL_set_max_proto_version(client.native(), version);
        client.handshake();
        bool failed = false;
        // Only the server's allocations fail.
        const auto serve = [&](const std::string& bytes) {
            OpensslMemory::fail_after = fail_after;
            try {
                const std::string got = feed(server, bytes);
                if (!got.empty()) server.write(got);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
            fail_after = std::exchange(OpensslMemory::fail_after, 0u);
        };
        std::string echoed;
        for (int i = 0; i < 4 && !failed; ++i) {
            serve(take_output(client));
            echoed += feed(client, take_output(server));
            if (client.established() && i == 1) encrypt(client, "");
            if (client.established() && client.failure().empty() && i == 1) client.write("words");
        }
        if (!failed && server.failure().empty()) CHECK(echoed == "words");
        if (!server.failure().empty() || failed) CHECK(echoed == "");
        return fail_after != 0;  // all allocations were made
    };
    for (const int version : versions) {
        CAPTURE(version);
        run(version, 0);
        const std::size_t before = OpensslMemory::held;
        std::size_t n = 1;
        while (!run(version, n) && n < 10'000) ++n;
        CAPTURE(n);
        CHECK(n > 100);
        CHECK(n < 10'000);
        CHECK(OpensslMemory::held < before + 10'000);
    }
}

// ---- files ----------------------------------------------------------------------------------------------------------

TEST_CASE("a file that cannot be used is an Error with its name and OpenSSL's reason") {
    const CertificateFiles good("right"), other("wrong");
    const std::string nonsense = good.certificate + ".txt", locked = good.key + ".locked", rsa = good.key + ".rsa";
    CertificateFiles::write(nonsense, "nonsense\n");
    REQUIRE(std::system(("openssl ec -aes128 -passout pass:tea -in " + good.key + " -out " + locked + " 2>/dev/null")
                            .c_str()) == 0);
    REQUIRE(std::system(("openssl genrsa -out " + rsa + " 2048 2>/dev/null").c_str()) == 0);
    const struct {
        std::string certificate, key, password, error;
    } table[] = {
        {good.certificate, good.key, "", ""},
        {good.certificate, locked, "tea", ""},
        {"/nowhere/cert.pem", good.key, "", "TLS certificate \"/nowhere/cert.pem\": No such file or directory"},
        {nonsense, good.key, "", "TLS certificate \"" + nonsense + "\": no start line"},
        {"", "", "", "TLS certificate \"\": No such file or directory"},
        {good.certificate, "/nowhere/key.pem", "", "TLS key \"/nowhere/key.pem\": No such file or directory"},
        // OpenSSL 1.1.1 has a different reason.
        {good.certificate, good.certificate, "", "TLS key \"" + good.certificate + "\": "},
        {good.certificate, nonsense, "", "TLS key \"" + nonsense + "\": "},
        {good.certificate, other.key, "", "TLS key \"" + other.key + "\": key values mismatch"},
        {good.certificate, rsa, "",
         "TLS key \"" + rsa + "\" does not belong to the certificate \"" + good.certificate + "\""},
        {good.certificate, locked, "", "TLS key \"" + locked + "\": "},
        {good.certificate, locked, "coffee", "TLS key \"" + locked + "\": bad decrypt"},
    };
    for (const auto& row : table) {
        CAPTURE(row.error);
        TlsOptions options{row.certificate, row.key};
        options.key_password = row.password;
        Server server;
        const std::string error = error_of([&] { server.listen_tls(0, options); });
        CHECK(error.substr(0, row.error.empty() ? std::string::npos : row.error.size()) == row.error);
        CHECK(server.port() == (row.error.empty() ? server.port() : 0));
    }
    TlsOptions options = good.options();
    options.client_authorities = nonsense;
    CHECK(contains(error_of([&] { server_context(options); }), "TLS client_authorities \"" + nonsense + "\": "));
    options = good.options();
    options.more.push_back({"/nowhere/more.pem", good.key});
    CHECK(contains(error_of([&] { server_context(options); }), "TLS certificate \"/nowhere/more.pem\": "));
    CHECK(contains(error_of([&] { client_context("/nowhere/ca.pem"); }), "TLS authorities \"/nowhere/ca.pem\": "));
    for (const std::string& path : {nonsense, locked, rsa}) ::unlink(path.c_str());
}

// ---- the server -----------------------------------------------------------------------------------------------------

TEST_CASE("one server listens with TLS and without, and each request knows its scheme") {
    struct Scheme : WebSocketHandler {
        void open() override { write_message(request().scheme()); }
        void on_message(const Message&) override {}
    };
    const CertificateFiles files("both");
    RunningServer running;
    running.server.route<Scheme>("/");
    running.server.get("/scheme", [](const Request& r) { return Response(200, std::string(r.scheme()) + r.path()); });
    running.server.listen_tls(0, files.options());
    const std::string unix_path = files.certificate + ".sock";
    running.server.listen("unix:" + unix_path);
    CHECK(running.server.url() == "https://127.0.0.1:" + std::to_string(running.server.port()) + "/");
    const int tls_port = running.server.port();
    running.run();
    const auto plain_port = running.on_loop([&] {
        const ListenSocket probe(ListenAddress::parse("0"), false);
        return probe.address().port;
    });
    running.on_loop([&] { running.server.listen(plain_port); });
    const std::string page = "GET /scheme HTTP/1.1\r\nHost: x\r\nX-Forwarded-Proto: gopher\r\n\r\n";
    ManualClient tls(tls_port);
    REQUIRE(tls.handshake());
    tls.send(page + upgrade());
    CHECK(tls.read_until("https/scheme"));
    CHECK(tls.read_until(test::hex("81 05") + "https"));
    RawClient plain = RawClient::plain(plain_port);
    plain.send(page + upgrade());
    CHECK(plain.read_until("http/scheme"));
    CHECK(plain.read_until(test::hex("81 04") + "http"));
}

TEST_CASE("a plain HTTP client on a TLS port gets an answer in plain HTTP, and a TLS client detects a plain port") {
    TlsServer running("plain");
    RunningServer other;
    for (const std::string& request : {std::string("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), std::string("P"),
                                       "POST / HTTP/1.1\r\n\r\n" + std::string(100'000, 'x')}) {
        RawClient plain = RawClient::plain(running.port());
        plain.send(request);
        CHECK(plain.read_to_end());
        CHECK_FALSE(plain.reset_by_peer);
        CHECK(contains(plain.received, "HTTP/1.1 400 Bad Request\r\n"));
        CHECK(contains(plain.received, "\r\n\r\nThis port speaks TLS, and the client began with plain HTTP"));
    }
    CHECK(running.metrics().tls_failures == 3);
    other.server.listen(0);
    other.run();
    ManualClient tls(other.port());
    CHECK_FALSE(tls.handshake());
    CHECK(tls.stream.plain_text());
}

TEST_CASE("a refused handshake ends with an alert and is logged with its reason") {
    const CertificateFiles files("refused");
    std::vector<std::string> log;
    RunningServer running;
    running.server.on_log([&](const LogEntry& entry) { log.push_back(to_string(entry)); });
    running.server.listen_tls(0, files.options());
    running.run();
    ManualClient old(running.port());
    SSL_set_min_proto_version(old.stream.native(), TLS1_VERSION);
    SSL_set_max_proto_version(old.stream.native(), TLS1_1_VERSION);
    SSL_set_cipher_list(old.stream.native(), "DEFAULT:@SECLEVEL=0");
    CHECK_FALSE(old.handshake());
    CHECK(old.stream.failure() == "tlsv1 alert protocol version");
    RawClient noise = RawClient::plain(running.port());
    noise.send(test::hex("16 03 01 40 00 01") + std::string(40'000, 'x'));
    CHECK(noise.read_to_end());
    CHECK_FALSE(noise.reset_by_peer);
    CHECK(noise.received.substr(0, 1) == test::hex("15"));
    CHECK(running.metrics().tls_failures == 2);
    CHECK(running.metrics().tls_handshakes == 0);
    old.raw.close();
    noise.close();
    running.stop();
    CHECK(std::any_of(log.begin(), log.end(), [](const std::string& line) {
        return line == "debug tls_failed peer=\"127.0.0.1\" cause=\"unsupported protocol\"";
    }));
}

TEST_CASE("an unfinished handshake is a connection until its deadline") {
    ServerOptions options;
    options.limits.handshake_timeout = 50ms;
    TlsServer running("middle", options);
    ManualClient half(running.port()), stopped(running.port());
    half.stream.handshake();
    const std::string hello = take_output(half.stream);
    half.raw.send(hello.substr(0, hello.size() / 2));
    stopped.stream.handshake();
    stopped.raw.send(take_output(stopped.stream));
    CHECK(half.raw.read_to_end());
    CHECK(stopped.raw.read_to_end());
    CHECK(half.raw.received == "");
    CHECK_FALSE(stopped.raw.received.empty());
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().tls_handshakes == 0);
}

TEST_CASE("a client may send one byte at a time over TLS") {
    TlsServer running("drip");
    ManualClient client(running.port());
    client.raw.socket().set_nodelay(true);
    const auto drip = [&](const std::string& bytes) {
        for (const char byte : bytes) client.raw.send({&byte, 1});
    };
    client.stream.handshake();
    while (!client.stream.established()) {
        drip(take_output(client.stream));
        REQUIRE(client.read_some());
    }
    drip(take_output(client.stream) + encrypt(client.stream, upgrade() + hello_masked));
    CHECK(client.read_until("\r\n\r\n" + hello_plain));
}

TEST_CASE("decrypted bytes that one turn does not handle do not wait for the socket") {
    TlsServer running("stall");
    ManualClient client(running.port());
    REQUIRE(client.open());
    // Small messages, each in its own record, then large messages that end in the middle of a record.
    std::string bytes;
    for (int i = 0; i < 3000; ++i) bytes += encrypt(client.stream, hello_masked);
    const std::string large = test::hex("82 ff 00 00 00 00 00 04 00 05 00 00 00 00") + std::string(0x40005, 'x');
    for (int i = 0; i < 5; ++i) bytes += encrypt(client.stream, large + hello_masked);
    client.raw.send(bytes);
    std::string wanted;
    for (int i = 0; i < 3000; ++i) wanted += hello_plain;
    for (int i = 0; i < 5; ++i)
        wanted += test::hex("82 7f 00 00 00 00 00 04 00 05") + std::string(0x40005, 'x') + hello_plain;
    while (client.text.size() < wanted.size() && client.read_some()) continue;
    CHECK((client.text == wanted));
}

TEST_CASE("a stream that ends without a Close frame is 1006, with or without close_notify") {
    struct CloseRecorder : WebSocketHandler {
        explicit CloseRecorder(std::vector<std::string>& closes) : closes_(closes) {}
        void on_message(const Message&) override {}
        void on_close() override {
            closes_.push_back(std::to_string(number(close_code())) + " " + std::string(to_string(close_cause())) +
                              ": " + close_reason());
        }
        std::vector<std::string>& closes_;
    };
    const CertificateFiles files("cut");
    std::vector<std::string> closes;
    RunningServer running;
    running.server.route<CloseRecorder>("/", std::ref(closes));
    running.server.listen_tls(0, files.options());
    running.run();
    for (int kind = 0; kind < 3; ++kind) {
        ManualClient client(running.port());
        REQUIRE(client.open());
        if (kind == 1) client.stream.shutdown();
        if (kind == 2) client.stream.write("words");
        std::string bytes = take_output(client.stream);
        if (kind == 2) bytes.back() = static_cast<char>(bytes.back() ^ 1);
        client.raw.send(bytes);
        if (kind != 2) client.raw.shutdown_send();
        client.raw.read_to_end();
        feed(client.stream, client.raw.received);
        // RFC 8446 6.1: "Each party MUST send a "close_notify" alert before closing its write side".
        CHECK(read_outcome(client.stream) == (kind == 2 ? IoResult::Outcome::error : IoResult::Outcome::end));
        REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    }
    running.stop();
    CHECK(closes == std::vector<std::string>{"1006 connection lost: the peer hung up without a Close frame",
                                             "1006 connection lost: the peer hung up without a Close frame",
                                             "1006 connection lost: decryption failed or bad record mac"});
}

TEST_CASE("after the closing handshake the server sends close_notify") {
    TlsServer running("bye");
    ManualClient client(running.port());
    REQUIRE(client.handshake());
    client.send(upgrade() + test::hex("88 80 00 00 00 00"));
    CHECK(client.read_until(test::hex("88 00")));
    while (client.read_some()) continue;
    CHECK(read_outcome(client.stream) == IoResult::Outcome::end);
    CHECK_FALSE(client.raw.reset_by_peer);
}

TEST_CASE("reload_certificates works under load and keeps open connections") {
    TlsServer running("reload");
    ManualClient open_client(running.port());
    REQUIRE(open_client.open());
    std::atomic<bool> done{false};
    std::atomic<int> served{0};
    std::thread load([&] {
        while (!done) {
            ManualClient client(running.port());
            if (!client.handshake()) return;
            client.send(upgrade() + hello_masked);
            if (!client.read_until(hello_plain)) return;
            ++served;
        }
    });
    std::string last = serial_of(open_client.stream);
    for (int i = 0; i < 20; ++i) {
        running.files.renew({"localhost"}, "/CN=localhost");
        running.on_loop([&] { running.server.reload_certificates(); });
        ManualClient client(running.port());
        REQUIRE(client.handshake());
        CHECK(serial_of(client.stream) != last);
        last = serial_of(client.stream);
    }
    const int before = served;
    CHECK(running.eventually([&] { return served > before; }));
    done = true;
    load.join();
    open_client.send(hello_masked);
    CHECK(open_client.read_until(hello_plain));
    // A file that cannot be used changes nothing.
    CertificateFiles::write(running.files.key, "nonsense");
    const std::string error = running.on_loop([&] { return error_of([&] { running.server.reload_certificates(); }); });
    CHECK(contains(error, "TLS key \"" + running.files.key + "\": "));
    ManualClient after(running.port());
    REQUIRE(after.handshake());
    CHECK(serial_of(after.stream) == last);
}

TEST_CASE("a server may request client certificates, and a handler sees the subject") {
    struct Who : WebSocketHandler {
        void open() override { write_message("you are " + std::string(request().client_certificate()) + "."); }
        void on_message(const Message&) override {}
    };
    const CertificateFiles files("asking");
    const CertificateFiles anna("anna", {"localhost"}, "/O=Tea/CN=Anna"),
        stranger("stranger", {"localhost"}, "/O=Tea/CN=Stranger");
    for (const bool required : {true, false}) {
        for (const int version : versions) {
            TlsOptions options = files.options();
            options.client_authorities = anna.certificate;
            options.require_client_certificate = required;
            RunningServer running;
            running.server.route<Who>("/");
            running.server.listen_tls(0, options);
            running.run();
            const auto answer_to = [&](const std::shared_ptr<const TlsContext>& context) {
                ManualClient client(running.port(), context);
                SSL_set_max_proto_version(client.stream.native(), version);
                client.handshake();
                if (client.stream.failure().empty()) client.send(upgrade());
                while (!contains(client.text, ".") && client.read_some()) continue;
                if (!client.stream.failure().empty()) return client.stream.failure();
                return client.text.substr((std::min)(client.text.size(), client.text.find("you are ")));
            };
            CAPTURE(required);
            CAPTURE(version);
            CHECK(answer_to(client_context(files.certificate, anna.options())) == "you are CN=Anna,O=Tea.");
            CHECK(contains(answer_to(client_context(files.certificate, stranger.options())), "alert unknown ca"));
            const std::string nobody = answer_to(client_context(files.certificate));
            if (required) CHECK(contains(nobody, "alert"));
            else CHECK(nobody == "you are .");
        }
    }
}

TEST_CASE("a flood of handshakes is spread over many turns of the loop") {
    TlsServer running("flood", test::with_handshake_timeout(0s));
    std::vector<std::unique_ptr<ManualClient>> clients;
    for (int i = 0; i < 200; ++i) {
        clients.push_back(std::make_unique<ManualClient>(running.port()));
        clients.back()->stream.handshake();
    }
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 200; }));
    // All clients start the handshake while the loop is blocked. Then each turn records the bytes sent.
    std::atomic<bool> blocked{false}, released{false};
    running.server.loop().post([&] {
        blocked = true;
        while (!released) std::this_thread::yield();
    });
    while (!blocked) std::this_thread::yield();
    for (const auto& client : clients) client->raw.send(take_output(client->stream));
    std::vector<std::uint64_t> sent;
    std::function<void()> record = [&] {
        sent.push_back(running.server.metrics().bytes_sent);
        if (sent.size() < 50) running.server.loop().post(record);
    };
    running.server.loop().post(record);
    released = true;
    REQUIRE(running.eventually([&] { return sent.size() == 50; }));
    std::uint64_t largest = 0;
    for (std::size_t i = 1; i < sent.size(); ++i) largest = (std::max)(largest, sent[i] - sent[i - 1]);
    for (const auto& client : clients) CHECK(client->handshake());
    CHECK(largest > 0);
    CHECK(largest < sent.back() / 2);
}

TEST_CASE("a flood of key updates ends the connection, and few of them do not") {
    const CertificateFiles files("updates");
    test::LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.route<Echo>("/");
    running.server.listen_tls(0, files.options());
    running.run();
    for (const bool websocket : {false, true}) {
        CAPTURE(websocket);
        ManualClient client(running.port());
        REQUIRE((websocket ? client.open() : client.handshake()));
        client.raw.send(key_updates(client.stream, 400));
        client.send(websocket ? hello_masked : upgrade());
        CHECK(client.read_until(websocket ? hello_plain : "\r\n\r\n"));
        client.raw.send(key_updates(client.stream, 20'000));
        while (client.read_some()) continue;
        CHECK(client.raw.ended);
    }
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().tls_failures == 2);
    CHECK(running.metrics().bytes_received < 200'000);
    running.stop();
    CHECK(log.has("info tls_failed peer=\"127.0.0.1\" cause=\"the peer sends too many key updates\""));
    CHECK(log.has("code=\"1006\" cause=\"connection lost\" reason=\"the peer sends too many key updates\""));
}

TEST_CASE("key updates and tiny records of one peer are spread over many turns of the loop") {
    ServerOptions options;
    options.limits.control_frames_per_second = 0;
    TlsServer running("spread", options);
    for (const bool updates : {true, false}) {
        CAPTURE(updates);
        ManualClient client(running.port());
        REQUIRE(client.open());
        std::string bytes, wanted;
        if (updates) bytes = key_updates(client.stream, 2000);
        for (int i = 0; i < (updates ? 1 : 2000); ++i, wanted += hello_plain) {
            const std::string masked = hello_masked;
            for (const char byte : masked) bytes += encrypt(client.stream, {&byte, 1});
        }
        // Counts the turns in which the server has sent something.
        std::atomic<bool> stop{false};
        std::uint64_t before = running.metrics().bytes_sent;
        std::size_t turns = 0, most = 0;
        std::function<void()> record = [&] {
            const std::uint64_t sent = running.server.metrics().bytes_sent;
            turns += sent != before;
            most = (std::max)(most, static_cast<std::size_t>(sent - before));
            before = sent;
            if (!stop) running.server.loop().post(record);
        };
        test::BlockedLoop blocked(running.server);
        running.server.loop().post(record);
        client.raw.send(bytes);
        blocked.release();
        while (client.text.size() < wanted.size() && client.read_some()) continue;
        stop = true;
        running.on_loop([] {});
        running.on_loop([] {});
        CHECK((client.text == wanted));
        // At most 512 records in a turn.
        CHECK(turns >= 20);
        CHECK(most < 4000);
    }
}

TEST_CASE("a part of a record and output that waits are in backlog_bytes, until the connection ends") {
    TlsServer running("counted");
    ManualClient client(running.port());
    REQUIRE(client.open());
    const std::string frame = test::hex("82 fe 3a 98 00 00 00 00") + pattern(15'000);
    const std::string record = encrypt(client.stream, frame);
    client.raw.send(record.substr(0, 10'000));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 10'000; }));
    client.raw.send(record.substr(10'000));
    CHECK(client.read_until(frame.substr(8)));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 0; }));
    ManualClient silent(running.port());
    silent.raw.send(test::hex("16 03 01 40 00 01"));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 6; }));
    client.raw.send(record.substr(0, 7));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 13; }));
    client.raw.close();
    silent.raw.close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().backlog_bytes == 0);
}

namespace {

// Answers each message with itself, and records what it still holds.
struct Recording : WebSocketHandler {
    struct Seen {
        std::size_t largest = 0, closes = 0;
    };
    explicit Recording(Seen& its_seen) : seen(its_seen) {}
    void on_message(const Message& m) override {
        write_message(m);
        note();
    }
    void on_drain() override { note(); }
    void on_close() override {
        note();
        CHECK(buffered_amount() == 0);
        ++seen.closes;
    }
    void note() const { seen.largest = (std::max)(seen.largest, buffered_amount()); }
    Seen& seen;
};

// A server without timers: what gets stuck stays stuck.
ServerOptions without_timers(std::size_t max_backlog) {
    ServerOptions options;
    options.limits.ping_interval = options.limits.handshake_timeout = 0s;
    options.limits.max_backlog = max_backlog;
    options.limits.max_message_size = 2 * 1024 * 1024;
    return options;
}

std::string large_frame(std::size_t size, bool masked) {
    std::string frame = test::hex("82");
    const char mask = masked ? '\x80' : '\0';
    const int bytes = size < 126 ? 0 : size < 65'536 ? 2 : 8;
    frame += static_cast<char>(mask | static_cast<char>(bytes == 0 ? size : bytes == 2 ? 126u : 127u));
    for (int i = bytes - 1; i >= 0; --i) frame += static_cast<char>(size >> 8 * i & 255);
    return frame + std::string(masked ? 4 : 0, '\0') + pattern(size);
}

std::vector<std::size_t> sizes_around(const std::vector<std::size_t>& limits) {
    std::vector<std::size_t> sizes;
    for (const std::size_t limit : limits) {
        for (const std::size_t less : {40u, 20u, 15u, 14u, 13u, 9u, 8u, 7u, 5u, 4u, 2u, 1u, 0u})
            sizes.push_back(limit - less);
        sizes.push_back(limit + 1);
    }
    return sizes;
}
// Small enough that the kernel holds a known part of the output.
void set_receive_buffer(RawClient& client) {
    const int size = 256 * 1024;
    ::setsockopt(client.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
}

}  // namespace

TEST_CASE("messages of all sizes pass a peer that reads late, and nothing is lost or stuck") {
    constexpr std::size_t max_backlog = 64 * 1024;
    TlsServer running("sweep", without_timers(max_backlog));
    ManualClient client(running.port());
    set_receive_buffer(client.raw);
    REQUIRE(client.open());
    for (const std::size_t size : sizes_around({126, 16'384, 32'768, 65'536, 81'920})) {
        CAPTURE(size);
        // Large messages fill the buffers of the kernel and the backlog, so that the server pauses.
        const std::size_t count = size < 1000 ? 3000 : (4'000'000 + 4 * max_backlog) / size;
        const std::string wanted = test::repeated(count, large_frame(size, false));
        const std::string bytes = encrypt(client.stream, test::repeated(count, large_frame(size, true)));
        const std::uint64_t all = running.metrics().messages_received + count;
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(running.eventually([&] {
            const Metrics now = running.server.metrics();
            return now.backlog_bytes > max_backlog / 2 || now.messages_received == all;
        }));
        while (client.text.size() < wanted.size() && client.read_some()) continue;
        sender.join();
        REQUIRE((client.text == wanted));
        client.text.clear();
    }
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 0; }));
}

TEST_CASE("after a message of any size that pauses a connection, the input that waits in TLS is handled") {
    const test::OneLoop one_loop;
    // Answers each large message with more than the buffers of the kernel hold.
    struct Amplifier : WebSocketHandler {
        void on_message(const Message& m) override {
            if (m.size() > 1000) write_binary(std::string(8'000'000, 'x'));
            else write_message(m);
        }
    };
    const CertificateFiles files("amplified");
    RunningServer running(without_timers(64 * 1024));
    running.server.route<Amplifier>("/");
    running.server.listen_tls(0, files.options());
    running.run();
    ManualClient client(running.port());
    set_receive_buffer(client.raw);
    REQUIRE(client.open());
    // The first of these messages makes the connection pause when the session or the TLS stream holds all others.
    for (const std::size_t size : sizes_around({1100, 16'384, 49'152, 65'536, 81'920, 98'304, 131'072})) {
        CAPTURE(size);
        client.send(large_frame(1001, true) + large_frame(size, true) + hello_masked);
        CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes > 64 * 1024; }));
        std::size_t got = 0;
        const std::size_t wanted = 2 * (10 + 8'000'000) + hello_plain.size();
        std::string last;
        while (got < wanted && client.read_some()) {
            got += client.text.size();
            last = client.text;
            client.text.clear();
        }
        REQUIRE(got == wanted);
        CHECK(last.substr(last.size() - (std::min)(last.size(), std::size_t{5})) == "Hello");
    }
}

TEST_CASE("a reset in the middle of a large flush leaves no backlog") {
    Recording::Seen seen;
    const CertificateFiles files("reset");
    RunningServer running(without_timers(1024 * 1024));
    running.server.route<Recording>("/", std::ref(seen));
    running.server.listen_tls(0, files.options());
    running.run();
    std::size_t closes = 0;
    for (const std::size_t size : {100u, 16'384u, 70'000u, 500'000u, 1'500'000u}) {
        for (const std::size_t read : {0u, 1000u, 100'000u}) {
            CAPTURE(size);
            CAPTURE(read);
            ManualClient client(running.port());
            set_receive_buffer(client.raw);
            REQUIRE(client.open());
            const std::size_t count = size < 1000 ? 100 : 8'000'000 / size;
            const std::string bytes = encrypt(client.stream, test::repeated(count, large_frame(size, true)));
            const std::uint64_t all = running.metrics().messages_received + count;
            std::thread sender([&] { client.raw.send(bytes); });
            CHECK(running.eventually([&] {
                const Metrics now = running.server.metrics();
                return now.backlog_bytes > 500'000 || now.messages_received == all;
            }));
            while (client.text.size() < (std::min)(read, size) && client.read_some()) continue;
            ::shutdown(client.raw.socket().descriptor(), SHUT_WR);  // the sender ends
            sender.join();
            client.raw.reset();
            ++closes;
            CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
            CHECK(running.metrics().backlog_bytes == 0);
        }
    }
    running.stop();
    CHECK(seen.closes == closes);
    CHECK(seen.largest <= 4 * 1024 * 1024);
}

TEST_SUITE_END();

#endif
