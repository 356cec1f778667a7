// The chat, and a page where other programs say something in a room.   publish [port] [--token T] [--page FILE]
//
//   curl -d 'text=hello' -H 'Authorization: Bearer T' http://127.0.0.1:8888/rooms/tea/messages
//
// Without --token the program makes a token and prints it. The field `name` is the author of the message.
#define WSCHAT_CHAT 1
#include "../wschat.hpp"

#include <fstream>
#include <random>

namespace {

std::string random_token() {
    std::random_device random;
    std::string token;
    for (int i = 0; i < 8; ++i) token += std::to_string(random() % 9000 + 1000);
    return token;
}

}  // namespace

int main(int argc, char** argv) try {
    std::string port = "8888", page = wschat::beside(__FILE__, "rooms.html"), token = random_token();
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--token" && i + 1 < argc) token = argv[++i];
        else if (word == "--page" && i + 1 < argc) page = argv[++i];
        else port = word;
    }

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    const std::string module = wschat::beside(page, "wschat.js");  // a page of your own may have none beside it
    server.file("/wschat.js", std::ifstream(module) ? module : wschat::beside(__FILE__, "wschat.js"));
    server.route<wschat::ChatHandler>("/chat");
    server.route<wschat::ChatHandler>("/chat/{room}");
    // The time to compare two digests tells nothing about the token.
    server.post("/rooms/{room}/messages", [&,
                                           digest = wschat::sha1("Bearer " + token)](const wschat::Request& request) {
        if (wschat::sha1(request.header("authorization")) != digest)
            return wschat::Response(401, "Send the header \"Authorization: Bearer TOKEN\".\n");
        const auto text = request.form("text");
        if (!text || text->empty())
            return wschat::Response(400, "The body must be a form with the field \"text\", as of curl -d text=hi.\n");
        try {
            wschat::ChatHub::of(server).room(request.param("room")).publish(*text, request.form("name").value_or(""));
        } catch (const wschat::Error& error) {
            return wschat::Response(400, std::string(error.what()) + "\n");
        }
        return wschat::Response(204);
    });
    server.listen(port);
    std::printf("publish: %s with the token %s\n", server.url().c_str(), token.c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "publish: %s\nusage: publish [port] [--token T] [--page FILE]\n", error.what());
    return 1;
}
