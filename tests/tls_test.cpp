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

using test::CertificateFiles;
using test::Client;
using test::contains;
using test::Echo;
using test::error_of;
using test::RawClient;
using test::RunningServer;

namespace {

std::shared_ptr<const TlsContext> server_context(const TlsOptions& options) {
    return std::make_shared<const TlsContext>(options);
}
std::shared_ptr<const TlsContext> client_context(const std::string& authorities, const TlsOptions& own = {"", ""}) {
    TlsClientOptions options;
    options.authorities = authorities;
    options.certificate = own.certificate;
    options.key = own.key;
    return std::make_shared<const TlsContext>(options);
}
std::shared_ptr<const TlsContext> insecure_client_context() {
    TlsClientOptions options;
    options.accept_any_certificate = true;
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
std::string upgrade() { return handshake_request("localhost", "/", Client::key); }

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

TEST_CASE("a peer may update its keys, but the unread answers are bounded") {
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
    TlsServer running("flood");
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

TEST_SUITE_END();

#endif
