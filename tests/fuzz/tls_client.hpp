// The TLS of the simulated peers: OpenSSL with two BIOs in memory, and random numbers that are the same in each run.
// OpenSSL's allocations fail as those of the server do.
#pragma once

#include "kernel.hpp"

#include <openssl/pem.h>
#include <openssl/rand.h>

namespace fuzz {

using wschat::detail::OpensslPtr;

// ---- the same numbers in each run ----------------------------------------------------------------------------------

inline std::uint64_t random_state = 0;

inline int random_bytes(unsigned char* bytes, int size) {
    for (int i = 0; i < size; ++i) {
        random_state = random_state * 6364136223846793005u + 1442695040888963407u;
        bytes[i] = static_cast<unsigned char>(random_state >> 56);
    }
    return 1;
}

inline void* allocate_for_openssl(std::size_t size, const char*, int) {
    if (heap.fail_after != 0 && --heap.fail_after == 0) return nullptr;
    return std::malloc(size);
}
inline void* reallocate_for_openssl(void* block, std::size_t size, const char*, int) {
    if (heap.fail_after != 0 && --heap.fail_after == 0) return nullptr;
    return std::realloc(block, size);
}
inline void free_for_openssl(void* block, const char*, int) { std::free(block); }

// The certificate of the server, in a file that is removed at exit.
class CertificateFile {
public:
    CertificateFile() {
        path += std::to_string(::getpid()) + ".pem";
        std::FILE* const file = std::fopen(path.c_str(), "we");
        check(file != nullptr && std::fputs(text, file) > 0 && std::fclose(file) == 0, "cannot write", path);
    }
    CertificateFile(const CertificateFile&) = delete;
    CertificateFile& operator=(const CertificateFile&) = delete;
    ~CertificateFile() { ::unlink(path.c_str()); }

    std::string path = "/tmp/wschat-fuzz-";

private:
    static constexpr const char* text =
        "-----BEGIN PRIVATE KEY-----\n"
        "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgtCMY+BmcH4ggiDoR\n"
        "12Jr9LvxzFcC6gAWKGZDGxEjbqWhRANCAASYB8Iu5jviyWcaNZebgkTOMK+eWqnV\n"
        "dlK2V2N04STFiP4wrgnkpyASbikiY5xw8I5WwIOqvxoTLhTOHi4mOErf\n"
        "-----END PRIVATE KEY-----\n"
        "-----BEGIN CERTIFICATE-----\n"
        "MIIBgDCCASWgAwIBAgIUENV4lXacYe4Z8P+XuCVajU4MR5cwCgYIKoZIzj0EAwIw\n"
        "FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTAxMDU0MFoYDzIxMjYxMTA1\n"
        "MDEwNTQwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO\n"
        "PQMBBwNCAASYB8Iu5jviyWcaNZebgkTOMK+eWqnVdlK2V2N04STFiP4wrgnkpyAS\n"
        "bikiY5xw8I5WwIOqvxoTLhTOHi4mOErfo1MwUTAdBgNVHQ4EFgQURxngv9gPLHZc\n"
        "peSGXWxM/zPEBAEwHwYDVR0jBBgwFoAURxngv9gPLHZcpeSGXWxM/zPEBAEwDwYD\n"
        "VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEArj7148dYMJn7CPzT/cSW\n"
        "WlVpO2ZqkkGGmxuvLlLyehYCIQC22Dj4tmmRew7aZFk+DU3pKrSbkAoTPkbisIPj\n"
        "cUlO5Q==\n"
        "-----END CERTIFICATE-----\n";
};

// ---- one client ----------------------------------------------------------------------------------------------------

class TlsClient {
public:
    TlsClient(Peer& peer, bool old_version) : peer_(peer), ssl_(SSL_new(context())) {
        in_ = BIO_new(BIO_s_mem());
        out_ = BIO_new(BIO_s_mem());
        SSL_set_bio(ssl_.get(), in_, out_);
        SSL_set_connect_state(ssl_.get());
        if (old_version) SSL_set_max_proto_version(ssl_.get(), TLS1_2_VERSION);
    }

    bool hold = false;                      // reads nothing and answers nothing
    std::size_t tiny = 0;                   // so many of the next bytes get a record of their own
    std::size_t release = Peer::unlimited;  // bytes that it still passes to the kernel
    std::string received;                   // what the server has sent, decrypted
    bool established() const { return SSL_is_init_finished(ssl_.get()) == 1; }
    // True if it can neither send nor receive any more, or has sent raw bytes.
    bool broken = false;

    void send(std::string_view bytes) { plain_ += bytes; }
    void update_keys(bool request) {
        if (!established() || broken) return;
        SSL_key_update(ssl_.get(), request ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED);
        SSL_do_handshake(ssl_.get());
        take_output();
    }
    void renegotiate() {
        if (!established() || broken) return;
        SSL_clear_options(ssl_.get(), SSL_OP_NO_RENEGOTIATION);
        if (SSL_renegotiate(ssl_.get()) == 1) SSL_do_handshake(ssl_.get());
        take_output();
        broken = true;
    }
    void close() {
        if (!established() || broken) return;
        SSL_shutdown(ssl_.get());
        take_output();
        broken = true;
    }
    void corrupt(unsigned at) {
        take_output();
        if (!ciphertext_.empty()) ciphertext_[at % ciphertext_.size()] ^= 1;
        broken = true;
    }
    // Reads what has arrived, and sends. Returns true if that changed anything.
    bool run() {
        if (hold) return false;
        const std::size_t before = peer_.sent.size() + received.size();
        const std::string_view arrived = std::string_view(peer_.received).substr(read_);
        read_ += arrived.size();
        if (!arrived.empty()) BIO_write(in_, arrived.data(), static_cast<int>(arrived.size()));
        ERR_clear_error();
        char buffer[16 * 1024];
        for (int n = 1; n > 0;) {
            n = SSL_read(ssl_.get(), buffer, sizeof buffer);
            if (n > 0) received.append(buffer, static_cast<std::size_t>(n));
            else if (SSL_get_error(ssl_.get(), n) != SSL_ERROR_WANT_READ) broken = true;
        }
        if (established() && !broken) encrypt();
        take_output();
        const std::size_t part = (std::min)(release, ciphertext_.size());
        peer_.sent.append(ciphertext_, 0, part);
        ciphertext_.erase(0, part);
        if (release != Peer::unlimited) release -= part;
        return peer_.sent.size() + received.size() != before;
    }

private:
    static SSL_CTX* context() {
        static const OpensslPtr<SSL_CTX, &SSL_CTX_free> context(SSL_CTX_new(TLS_client_method()));
        return context.get();
    }
    void encrypt() {
        for (std::string_view rest = plain_; !rest.empty() && !broken;) {
            const std::string_view part = rest.substr(0, tiny != 0 ? 1 : 16 * 1024);
            if (tiny != 0) --tiny;
            if (SSL_write(ssl_.get(), part.data(), static_cast<int>(part.size())) <= 0) broken = true;
            rest.remove_prefix(part.size());
        }
        plain_.clear();
    }
    void take_output() {
        char* bytes = nullptr;
        const long size = BIO_get_mem_data(out_, &bytes);
        if (size > 0) ciphertext_.append(bytes, static_cast<std::size_t>(size));
        (void)BIO_reset(out_);
    }

    Peer& peer_;
    OpensslPtr<SSL, &SSL_free> ssl_;
    BIO* in_;
    BIO* out_;
    std::string plain_, ciphertext_;  // not sent yet
    std::size_t read_ = 0;            // of the bytes that the server has sent
};

// A handshake without a server's kernel: OpenSSL makes what it keeps for ever, before allocations fail.
inline void warm_up(const std::string& certificate) {
    const wschat::TlsOptions options{certificate, certificate};
    const auto context = std::make_shared<const wschat::detail::TlsContext>(options);
    for (const bool old_version : {false, true}) {
        Peer peer;
        TlsClient client(peer, old_version);
        wschat::detail::TlsStream server(context);
        client.send("words");
        char buffer[100];
        while (client.run()) {
            const std::string sent = std::exchange(peer.sent, std::string());
            server.receive(sent);
            while (server.read(buffer, sizeof buffer).outcome == wschat::detail::IoResult::Outcome::done)
                server.write("words");
            peer.received += server.output();
            server.consume(server.output().size());
        }
        check(client.received == "words", "TLS does not work");
    }
}

// Prepares OpenSSL once, and its random numbers for each run. Returns the path of the certificate and its key.
inline const std::string& start_tls() {
    static const bool prepared = [] {
        static const RAND_METHOD method{nullptr, &random_bytes, nullptr, nullptr, &random_bytes, [] { return 1; }};
        return CRYPTO_set_mem_functions(&allocate_for_openssl, &reallocate_for_openssl, &free_for_openssl) == 1 &&
               RAND_set_rand_method(&method) == 1;
    }();
    check(prepared, "OpenSSL cannot be prepared");
    static const CertificateFile certificate;
    static const bool warm = (warm_up(certificate.path), true);
    random_state = warm ? 1 : 0;
    return certificate.path;
}

}  // namespace fuzz
