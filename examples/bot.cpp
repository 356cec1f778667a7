// A bot in the chat of rooms.cpp that answers "!time".   bot URL [--key SECRET] [--state FILE]
//
// g++ -std=c++17 -O2 examples/bot.cpp -o bot -pthread && ./bot 'ws://127.0.0.1:8888/chat/tea?name=clock'
//
// It answers each question once, whatever restarts: the server, the bot, or the network between them. The chat gives
// each message an id, and the bot asks for all after the last one that it has done ("last"). An answer has the tag of
// its question, and the chat keeps only one message with the same tag and key. So the bot may answer again when it is
// not sure. --state keeps the last id in a file; --key is the same after a restart of the bot.
#include "../wschat.hpp"

#include <ctime>
#include <filesystem>
#include <fstream>
#include <set>

namespace {

// The value of a field of a flat JSON object, without the quotes of a string. The quotes inside of strings are escaped,
// so that "name": is always a field.
std::string_view field(std::string_view object, const std::string& name) {
    const std::size_t at = object.find("\"" + name + "\":");
    if (at == std::string_view::npos) return {};
    std::string_view value = object.substr(at + name.size() + 3);
    if (value.empty() || value.front() != '"') return value.substr(0, value.find_first_of(",}]"));
    for (std::size_t end = 1; end < value.size(); ++end) {
        if (value[end] == '\\') ++end;
        else if (value[end] == '"') return value.substr(1, end - 1);
    }
    return {};
}

// What outlives a connection.
struct Memory {
    std::string file;
    std::string epoch;              // of the history whose ids these are; empty before the first start
    std::uint64_t last = 0;         // all messages up to this one are done
    std::uint64_t newest = 0;       // the last one that has arrived
    std::set<std::uint64_t> asked;  // questions whose answers the chat has not taken

    void load() {
        if (!file.empty()) std::ifstream(file) >> epoch >> last;
    }
    // A question that is not done must come again after a restart.
    void note(std::uint64_t id) {
        const std::uint64_t done = asked.empty() ? id : (std::min)(id, *asked.begin() - 1);
        if (done <= last) return;
        last = done;
        save();
    }
    // The old file stays until the new one is complete, because the bot may be killed at any time.
    void save() const {
        if (file.empty()) return;
        std::ofstream(file + ".new") << epoch << ' ' << last << '\n';
        std::error_code error;
        std::filesystem::rename(file + ".new", file, error);
        if (error) std::fprintf(stderr, "bot: %s: %s\n", file.c_str(), error.message().c_str());
    }
    // Another history has begun, with ids of its own.
    void begin(std::string_view its_epoch) {
        epoch = its_epoch;
        last = newest = 0;
        asked.clear();
        save();
    }
};

std::string now() {
    const std::time_t time = std::time(nullptr);
    char text[64];
    std::strftime(text, sizeof text, "It is %H:%M:%S UTC.", std::gmtime(&time));
    return text;
}

struct Bot : wschat::WebSocketHandler {
    explicit Bot(Memory& its_memory) : memory(its_memory) {}

    void open() override { std::fprintf(stderr, "bot: connected\n"); }
    void on_message(const wschat::Message& message) override {
        const std::string_view event = message.text(), type = field(event, "type");
        if (type == "history" && field(event, "epoch") != memory.epoch) {
            const bool first_start = memory.epoch.empty();
            memory.begin(field(event, "epoch"));
            // What was asked before the first start of the bot is not for it.
            if (first_start) {
                memory.newest = wschat::text::parse_unsigned(field(event, "last"), UINT64_MAX).value_or(0);
                return memory.note(memory.newest);
            }
        }
        if (type == "error") {
            std::fprintf(stderr, "bot: the chat says: %s\n", wschat::escape_for_log(event).c_str());
        }
        if (wschat::text::starts_with(field(event, "tag"), "time-")) confirm(event);
        // A history contains what was said while there was no connection.
        const std::string_view said = "{\"type\":\"said\"";
        for (std::size_t at = event.find(said); at != std::string_view::npos; at = event.find(said, at + 1))
            read(event.substr(at));
        answer();
    }
    void on_close() override {
        std::fprintf(stderr, "bot: closed: %u (%s)\n", number(close_code()),
                     std::string(to_string(close_cause())).c_str());
    }
    void on_failure(const wschat::ConnectError& error) override {
        std::fprintf(stderr, "bot: %s\n", error.sentence.c_str());
    }

    void read(std::string_view said) {
        const std::uint64_t id = wschat::text::parse_unsigned(field(said, "id"), UINT64_MAX).value_or(0);
        if (id <= memory.last) return;
        memory.newest = (std::max)(memory.newest, id);
        if (field(said, "text") == "!time") memory.asked.insert(id);
        memory.note(memory.newest);
    }
    // One answer at a time: the chat refuses a flood, as after a long time without a connection.
    void answer() {
        if (waiting || memory.asked.empty()) return;
        waiting = true;
        write_message("/tag time-" + std::to_string(*memory.asked.begin()) + " " + now());
    }
    void confirm(std::string_view event) {
        const std::string_view code = field(event, "code");
        const bool refused_now = code == "flood" || code == "slow" || code == "not_kept";
        if (!refused_now) {
            memory.asked.erase(wschat::text::parse_unsigned(field(event, "tag").substr(5), UINT64_MAX).value_or(0));
            memory.note(memory.newest);
        }
        loop().call_later(std::chrono::milliseconds(refused_now ? 2000 : 250), [me = ref()] {
            Bot* const bot = static_cast<Bot*>(me.get());
            if (bot == nullptr) return;
            bot->waiting = false;
            bot->answer();
        });
    }

    Memory& memory;
    bool waiting = false;  // for what the chat says about the last answer
};

}  // namespace

int main(int argc, char** argv) try {
    std::string url, key = "bot-" + std::to_string(std::time(nullptr));
    Memory memory;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--key" && i + 1 < argc) key = argv[++i];
        else if (word == "--state" && i + 1 < argc) memory.file = argv[++i];
        else if (url.empty() && word.front() != '-') url = word;
        else throw wschat::Error("\"" + word + "\" is not an option");
    }
    if (url.empty()) throw wschat::Error("the URL is missing, as in 'ws://127.0.0.1:8888/chat/tea?name=clock'");
    memory.load();

    wschat::ClientOptions options;
    options.reconnect.emplace();
    options.before_attempt = [&](wschat::ClientAttempt& attempt) {
        attempt.url += (attempt.url.find('?') == std::string::npos ? "?key=" : "&key=") + key;
        if (!memory.epoch.empty()) attempt.url += "&last=" + memory.epoch + "-" + std::to_string(memory.last);
    };
    wschat::Client client;
    client.connect<Bot>(url, options, std::ref(memory));
    client.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "bot: %s\nusage: bot URL [--key SECRET] [--state FILE]\n", error.what());
    return 1;
}
