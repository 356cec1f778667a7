// A chat with rooms, names and a roster, in JSON events.   rooms [port] [--page FILE]
//
// ws://127.0.0.1:8888/chat/tea?name=Anna is the room "tea"; /chat is the lobby. A line that begins with a slash is a
// command (/nick NAME), anything else is said to the room. chat.html speaks this, and so does anybody who can type.
#include "../wschat.hpp"

#include <ctime>

namespace {

std::int64_t unix_ms() {
    using namespace std::chrono;
    return duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
}

// What may be a name: 1 to 40 bytes of text without control characters.
bool good_name(const std::string& name) {
    if (name.empty() || name.size() > 40 || !wschat::valid_utf8(name) || name.front() == ' ' || name.back() == ' ') return false;
    for (const char c : name)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) return false;
    return true;
}

class Member : public wschat::WebSocketHandler {
    void open() override {
        const std::string asked = request().query("name").value_or("");
        name_ = free_name(good_name(asked) ? asked : "guest");
        here().join(*this);
        write_json({{"type", "hello"}, {"version", 1}, {"server", "rooms"}, {"room", here_name()}, {"name", name_},
                    {"features", wschat::Json::array(std::vector<std::string>{"rooms", "names", "users"})}});
        here().broadcast_json({{"type", "join"}, {"name", name_}, {"time", unix_ms()}}, this);
        tell_users();
    }

    void on_message(const wschat::Message& message) override {
        const std::string line(message.text());
        if (message.binary()) error("bad_line", "This chat is of text.");
        else if (line.rfind("/nick ", 0) == 0) rename(line.substr(6));
        else if (line.rfind("/", 0) == 0) error("unknown_command", "There is one command: /nick NAME");
        else here().broadcast_json({{"type", "said"}, {"name", name_}, {"text", line}, {"time", unix_ms()}});
    }

    void on_close() override {
        here().broadcast_json({{"type", "leave"}, {"name", name_}, {"time", unix_ms()}});
        tell_users();
    }

    void rename(const std::string& name) {
        if (!good_name(name)) return error("name_bad", "A name is 1 to 40 bytes of text.");
        if (name == name_) return;
        if (free_name(name) != name) return error("name_taken", "That name is taken in this room.");
        here().broadcast_json({{"type", "nick"}, {"old", name_}, {"name", name}, {"time", unix_ms()}});
        name_ = name;
        tell_users();
    }

    void error(const char* code, const char* sentence) { write_json({{"type", "error"}, {"code", code}, {"text", sentence}}); }

    std::string here_name() const {
        const std::string room(request().param("room"));
        return good_name(room) ? room : "lobby";
    }
    wschat::Room& here() { return room(here_name()); }

    std::vector<std::string> names() {
        std::vector<std::string> names;
        for (wschat::WebSocketHandler& member : here()) names.push_back(static_cast<Member&>(member).name_);
        std::sort(names.begin(), names.end());
        return names;
    }
    void tell_users() { here().broadcast_json({{"type", "users"}, {"users", wschat::Json::array(names())}}); }

    // The name itself or, where it is taken, the name with the first number that makes it free.
    std::string free_name(const std::string& name) {
        const std::vector<std::string> taken = names();
        std::string free = name;
        for (int n = 2; std::find(taken.begin(), taken.end(), free) != taken.end(); ++n) free = name + "-" + std::to_string(n);
        return free;
    }

    std::string name_;
};

}  // namespace

int main(int argc, char** argv) try {
    std::string port = "8888", page = wschat::beside(__FILE__, "chat.html");
    for (int i = 1; i < argc; ++i) (std::string(argv[i]) == "--page" && i + 1 < argc ? page = argv[++i] : port = argv[i]);

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    server.route<Member>("/chat");
    server.route<Member>("/chat/{room}");
    server.metrics_page("/metrics");
    server.listen(port);
    std::printf("rooms: open %s in two windows\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "rooms: %s\n", error.what());
    return 1;
}
