// A chat with rooms, names, presence and a history.
//
//   rooms [port] [--page FILE] [--db FILE] [--redis URL]... [--threads N] [--trust PROXY]...
//
// ws://127.0.0.1:8888/chat/tea?name=Anna is the room "tea"; /chat is the lobby. Clients send lines of text. A line with
// a slash in front is a command (/help lists them), and all other lines are said to the room. rooms.html is one client,
// over the module wschat.js.
//
// With -DWSCHAT_SQLITE=1 and -lsqlite3, --db keeps the history in a file. With -DWSCHAT_HIREDIS=1 and -lhiredis,
// --redis redis://127.0.0.1:6379 keeps it in Redis, and all servers with the same Redis are one chat; --redis again adds
// a Redis that takes a share of the rooms. --threads 4: four loops share the connections; 0: one for each core.
// --trust 127.0.0.1: the address of a client is what the proxy at this address reports.
#define WSCHAT_CHAT 1
#include "../wschat.hpp"

#include <fstream>

unsigned thread_count(const std::string& text) {
    const auto count = wschat::text::parse_unsigned(text, 256);
    if (!count) throw wschat::Error("--threads \"" + text + "\": not a number from 0 to 256");
    return static_cast<unsigned>(*count);
}

int main(int argc, char** argv) try {
    std::string port = "8888", page = wschat::beside(__FILE__, "rooms.html"), db;
    std::vector<std::string> proxies, redis;
    wschat::ServerOptions options;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--page" && i + 1 < argc) page = argv[++i];
        else if (argument == "--db" && i + 1 < argc) db = argv[++i];
        else if (argument == "--redis" && i + 1 < argc) redis.emplace_back(argv[++i]);
        else if (argument == "--threads" && i + 1 < argc) options.threads = thread_count(argv[++i]);
        else if (argument == "--trust" && i + 1 < argc) proxies.emplace_back(argv[++i]);
        else port = argument;
    }

    wschat::Server server(options);
#if WSCHAT_SQLITE
    if (!db.empty()) wschat::ChatHub::of(server).set_store(wschat::SqliteHistory(db));
#else
    if (!db.empty()) throw wschat::Error("--db: this program was built without WSCHAT_SQLITE");
#endif
#if WSCHAT_HIREDIS
    if (!redis.empty()) wschat::ChatHub::of(server).set_store(wschat::RedisHistory(redis));
#else
    if (!redis.empty()) throw wschat::Error("--redis: this program was built without WSCHAT_HIREDIS");
#endif
    server.on_log(wschat::log_to_stderr);
    server.trusted_proxies(proxies);
    server.file("/", page);
    const std::string module = wschat::beside(page, "wschat.js");  // a page of your own may have none beside it
    server.file("/wschat.js", std::ifstream(module) ? module : wschat::beside(__FILE__, "wschat.js"));
    server.route<wschat::ChatHandler>("/chat");
    server.route<wschat::ChatHandler>("/chat/{room}");
    server.metrics_page("/metrics", {"127.0.0.1", "::1"});  // for this machine, not for the internet
    server.listen(port);
    std::printf("rooms: open %s in two windows\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr,
                 "rooms: %s\nusage: rooms [port] [--page FILE] [--db FILE] [--redis URL]... [--threads N] "
                 "[--trust PROXY]...\n",
                 error.what());
    return 1;
}
