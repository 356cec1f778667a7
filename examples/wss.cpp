// The chat over TLS, at https:// and wss://.   wss [port] [--page FILE] [--cert FILE --key FILE]
//
// g++ -std=c++17 -O2 -DWSCHAT_ZLIB=1 -DWSCHAT_OPENSSL=1 examples/wss.cpp -o wss -pthread -lz -lssl -lcrypto && ./wss
//
// Without --cert it makes a certificate for this machine, once; browsers warn of it. SIGHUP reads the files anew, as
// after a renewal.
#include "../wschat.hpp"

#include <csignal>
#include <fstream>

struct Chat : wschat::WebSocketHandler {
    void open() override                               { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
};

namespace {

volatile std::sig_atomic_t renewed = 0;

// The key is for its owner alone.
void write_file(const std::string& path, const std::string& text, unsigned mode) {
    std::ofstream file(path, std::ios::trunc);
#if !defined(_WIN32)
    ::chmod(path.c_str(), mode);
#else
    static_cast<void>(mode);
#endif
    if (!(file << text).flush()) throw wschat::Error("can not write " + path);
}

bool exists(const std::string& path) { return static_cast<bool>(std::ifstream(path)); }

void make_certificate(const std::string& certificate, const std::string& key) {
    if (exists(certificate) || exists(key)) return;
    const auto made = wschat::make_self_signed_certificate({"localhost", "127.0.0.1", "::1"});
    write_file(key, made.key, 0600);
    write_file(certificate, made.certificate, 0644);
    std::fprintf(stderr, "wss: made %s and %s for localhost; browsers warn of what nobody else has signed\n",
                 certificate.c_str(), key.c_str());
}

}  // namespace

int main(int argc, char** argv) try {
    std::string port = "8443", page = wschat::beside(__FILE__, "chat.html");
    wschat::TlsOptions tls{"wss-cert.pem", "wss-key.pem"};
    bool own = true;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool more = i + 1 < argc;
        if (word == "--page" && more) page = argv[++i];
        else if (word == "--cert" && more) tls.certificate = argv[++i], own = false;
        else if (word == "--key" && more) tls.key = argv[++i], own = false;
        else port = word;
    }
    if (own) make_certificate(tls.certificate, tls.key);

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    server.route<Chat>("/chat");
    server.listen_tls(port, tls);
#if defined(SIGHUP)
    std::signal(SIGHUP, [](int) { renewed = 1; });
    server.loop().call_every(std::chrono::seconds(1), [&server] {
        if (renewed == 0) return;
        renewed = 0;
        server.reload_certificates();
        std::fprintf(stderr, "wss: the certificate was read anew\n");
    });
#endif
    std::printf("wss: open %s in two windows\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "wss: %s\n", error.what());
    return 1;
}
