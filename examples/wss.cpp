// The chat over TLS, at https:// and wss://.   wss [port] [--page FILE] [--cert FILE --key FILE]
//
// g++ -std=c++17 -O2 -DWSCHAT_ZLIB=1 -DWSCHAT_OPENSSL=1 examples/wss.cpp -o wss -pthread -lz -lssl -lcrypto && ./wss
//
// It also compiles without -DWSCHAT_ZLIB=1 and -lz, and then does not compress. Without --cert and --key, the program
// makes a self-signed certificate at its first start. Browsers warn about it. SIGHUP reads the files again, for example
// after a renewal.
#include "../wschat.hpp"

#if !WSCHAT_OPENSSL
#error "wss.cpp needs TLS: compile it with -DWSCHAT_OPENSSL=1 and link with -lssl -lcrypto, as the command above does"
#endif

#include <openssl/evp.h>
#include <openssl/pem.h>

#include <csignal>
#include <fstream>

struct Chat : wschat::WebSocketHandler {
    void open() override                               { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
    std::optional<wschat::CompressionOptions> get_compression_options() override { return wschat::CompressionOptions(); }
};

namespace {

volatile std::sig_atomic_t reload_requested = 0;

template <auto Free>
struct Deleter {
    template <class Object>
    void operator()(Object* object) const { Free(object); }
};
template <class Object, auto Free>
using Owned = std::unique_ptr<Object, Deleter<Free>>;

void require(bool ok) {
    if (!ok) throw wschat::Error("OpenSSL cannot make a certificate");
}

Owned<EVP_PKEY, &EVP_PKEY_free> make_key() {
    const Owned<EVP_PKEY_CTX, &EVP_PKEY_CTX_free> generator(EVP_PKEY_CTX_new_id(EVP_PKEY_EC, nullptr));
    EVP_PKEY* key = nullptr;
    require(generator && EVP_PKEY_keygen_init(generator.get()) == 1 &&
            EVP_PKEY_CTX_set_ec_paramgen_curve_nid(generator.get(), NID_X9_62_prime256v1) == 1 &&
            EVP_PKEY_keygen(generator.get(), &key) == 1);
    return Owned<EVP_PKEY, &EVP_PKEY_free>(key);
}

// A certificate for localhost, valid for a year and signed with its own key.
Owned<X509, &X509_free> make_certificate(EVP_PKEY* key) {
    Owned<X509, &X509_free> owned(X509_new());
    X509* const certificate = owned.get();
    const Owned<BIGNUM, &BN_free> serial(BN_new());
    require(owned && serial && BN_rand(serial.get(), 127, BN_RAND_TOP_ANY, BN_RAND_BOTTOM_ANY) == 1 &&
            BN_to_ASN1_INTEGER(serial.get(), X509_get_serialNumber(certificate)) != nullptr);
    X509_set_version(certificate, 2);
    X509_time_adj_ex(X509_getm_notBefore(certificate), -1, 0, nullptr);
    X509_time_adj_ex(X509_getm_notAfter(certificate), 365, 0, nullptr);
    X509_NAME* const subject = X509_get_subject_name(certificate);
    const unsigned char name[] = "localhost";
    require(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, name, -1, -1, 0) == 1 &&
            X509_set_issuer_name(certificate, subject) == 1 && X509_set_pubkey(certificate, key) == 1);
    const std::pair<int, const char*> extensions[] = {
        {NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1,IP:::1"},
        {NID_basic_constraints, "critical,CA:FALSE"},
        {NID_key_usage, "critical,digitalSignature"},
        {NID_ext_key_usage, "serverAuth"},
    };
    for (const auto& [id, value] : extensions) {
        X509V3_CTX context{};
        X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
        const Owned<X509_EXTENSION, &X509_EXTENSION_free> extension(X509V3_EXT_nconf_nid(nullptr, &context, id, value));
        require(extension && X509_add_ext(certificate, extension.get(), -1) == 1);
    }
    require(X509_sign(certificate, key, EVP_sha256()) != 0);
    return owned;
}

template <class Write>
void write_pem(const std::string& path, [[maybe_unused]] unsigned mode, Write write) {
    const Owned<BIO, &BIO_free> file(BIO_new_file(path.c_str(), "w"));
#if !defined(_WIN32)
    ::chmod(path.c_str(), mode);
#endif
    if (!file || write(file.get()) != 1 || BIO_flush(file.get()) != 1) throw wschat::Error("cannot write " + path);
}

bool exists(const std::string& path) { return static_cast<bool>(std::ifstream(path)); }

void make_missing_files(const std::string& certificate_path, const std::string& key_path) {
    if (exists(certificate_path) || exists(key_path)) return;
    const auto key = make_key();
    const auto certificate = make_certificate(key.get());
    write_pem(key_path, 0600, [&](BIO* file) {
        return PEM_write_bio_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
    write_pem(certificate_path, 0644, [&](BIO* file) { return PEM_write_bio_X509(file, certificate.get()); });
    std::fprintf(stderr, "wss: made %s and %s for localhost; browsers warn because the certificate is self-signed\n",
                 certificate_path.c_str(), key_path.c_str());
}

}  // namespace

int main(int argc, char** argv) try {
    std::string port = "8443", page = wschat::beside(__FILE__, "chat.html");
    wschat::TlsOptions tls{"wss-cert.pem", "wss-key.pem"};
    bool self_signed = true;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool has_value = i + 1 < argc;
        if (word == "--page" && has_value) page = argv[++i];
        else if (word == "--cert" && has_value) tls.certificate = argv[++i], self_signed = false;
        else if (word == "--key" && has_value) tls.key = argv[++i], self_signed = false;
        else port = word;
    }
    if (self_signed) make_missing_files(tls.certificate, tls.key);

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    server.route<Chat>("/chat");
    server.listen_tls(port, tls);
#if defined(SIGHUP)
    std::signal(SIGHUP, [](int) { reload_requested = 1; });
    server.loop().call_every(std::chrono::seconds(1), [&server] {
        if (reload_requested == 0) return;
        reload_requested = 0;
        server.reload_certificates();
        std::fprintf(stderr, "wss: reloaded the certificate\n");
    });
#endif
    std::printf("wss: open %s in two windows\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "wss: %s\nusage: wss [port] [--page FILE] [--cert FILE --key FILE]\n", error.what());
    return 1;
}
