// A chat that only members enter: a form, a session in a cookie, and the chat with the member's name.
//   login [port] [--page FILE] [--user NAME:PASSWORD]... [--moderator NAME:PASSWORD]... [--trust PROXY]...
//
// Behind a proxy, --trust 127.0.0.1 is necessary: the cookie is then Secure over https, and each client has attempts of
// its own.
//
// Without members there is "anna" with the password "tea". A moderator may do everything. A real program keeps salted
// hashes of passwords (argon2, scrypt), and sessions in a database, or in the cookie itself, signed by
// wschat::CookieSigner.
#define WSCHAT_CHAT 1
#include "../wschat.hpp"

#include <fstream>
#include <map>
#include <random>
#include <set>

namespace {

constexpr const char* cookie_name = "session";

// The members, and who is logged in.
class Members {
public:
    // Takes "NAME:PASSWORD".
    void add(const std::string& pair, bool is_moderator) {
        const std::size_t colon = pair.find(':');
        if (colon == std::string::npos) throw wschat::Error("\"" + pair + "\" is not NAME:PASSWORD");
        const std::string name = pair.substr(0, colon);
        passwords_[name] = wschat::sha1(pair.substr(colon + 1));
        if (is_moderator) moderators_.insert(name);
    }
    bool empty() const { return passwords_.empty(); }
    bool is_moderator(const std::string& name) const { return moderators_.count(name) != 0; }
    // The id of a new session. Nothing if the name or the password is wrong.
    std::optional<std::string> log_in(const std::string& name, const std::string& password) {
        const auto found = passwords_.find(name);
        if (found == passwords_.end() || found->second != wschat::sha1(password)) return std::nullopt;
        std::string id;
        for (int i = 0; i < 8; ++i) id += std::to_string(random_());
        sessions_[id] = name;
        return id;
    }
    void log_out(const wschat::Request& request) { sessions_.erase(id_of(request)); }
    // The member who sends the request, or nothing.
    std::optional<std::string> member(const wschat::Request& request) const {
        const auto found = sessions_.find(id_of(request));
        if (found == sessions_.end()) return std::nullopt;
        return found->second;
    }

private:
    static std::string id_of(const wschat::Request& request) {
        return std::string(request.cookie(cookie_name).value_or(""));
    }

    std::map<std::string, std::array<unsigned char, 20>> passwords_;
    std::set<std::string> moderators_;
    std::map<std::string, std::string> sessions_;  // the name of the member, by the id of the session
    std::random_device random_;
};

// Allows each address ten attempts at once, and then one in six seconds.
class Attempts {
public:
    bool allow(const std::string& address) {
        if (buckets_.size() > 10'000) buckets_.clear();
        return buckets_[address].take(1, {1.0 / 6, 10}, wschat::Clock::now());
    }

private:
    std::map<std::string, wschat::TokenBucket> buckets_;
};

class MembersChat : public wschat::ChatHandler {
public:
    explicit MembersChat(const Members& members) : members_(members) {}
    std::optional<wschat::ChatUser> authenticate(const wschat::Request& request) override {
        const auto name = members_.member(request);
        if (!name) return std::nullopt;  // a 401
        wschat::ChatUser user;
        user.name = *name;
        user.account = true;
        return user;
    }
    bool may(wschat::ChatAction action) override {
        return ChatHandler::may(action) || members_.is_moderator(user().name);
    }

private:
    const Members& members_;
};

wschat::Response form(const std::string& sentence, int status = 200) {
    const std::string page =
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Log in</title>"
        "<style>body{font:1em system-ui;max-width:20em;margin:4em auto}input,button{font:inherit;width:100%;"
        "margin:.3em 0;padding:.5em;box-sizing:border-box}</style><h1>Log in</h1><p>" +
        sentence +
        "</p><form method=post action=/login><input name=name placeholder=Name autocomplete=username autofocus>"
        "<input name=password type=password placeholder=Password autocomplete=current-password>"
        "<button>Log in</button></form>";
    return wschat::Response(status, page, "text/html; charset=utf-8");
}

}  // namespace

int main(int argc, char** argv) try {
    std::string port = "8888", page = wschat::beside(__FILE__, "rooms.html");
    std::vector<std::string> proxies;
    Members members;
    Attempts attempts;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--page" && i + 1 < argc) page = argv[++i];
        else if (word == "--trust" && i + 1 < argc) proxies.emplace_back(argv[++i]);
        else if (word == "--user" && i + 1 < argc) members.add(argv[++i], false);
        else if (word == "--moderator" && i + 1 < argc) members.add(argv[++i], true);
        else port = word;
    }
    if (members.empty()) members.add("anna:tea", false);

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.trusted_proxies(proxies);
    server.set_default_header("X-Frame-Options", "DENY");
    server.file("/rooms.html", page);
    const std::string module = wschat::beside(page, "wschat.js");  // a page of your own may have none beside it
    server.file("/wschat.js", std::ifstream(module) ? module : wschat::beside(__FILE__, "wschat.js"));
    server.get("/", [&](const wschat::Request& request) {
        return wschat::Response::redirect(members.member(request) ? "/rooms.html" : "/login", 303);
    });
    server.get("/login", [](const wschat::Request&) { return form("Members only."); });
    // The cookie is SameSite=Lax, so pages of other sites cannot send a form in the name of a member.
    server.post("/login", [&](const wschat::Request& request) {
        if (!attempts.allow(request.remote_address())) return form("Too many attempts. Wait a little.", 429);
        const auto id = members.log_in(request.form("name").value_or(""), request.form("password").value_or(""));
        if (!id) return form("The name or the password is wrong.", 401);
        return wschat::Response::redirect("/", 303).set_cookie(cookie_name, *id);
    });
    server.post("/logout", [&](const wschat::Request& request) {
        members.log_out(request);
        return wschat::Response::redirect("/login", 303).clear_cookie(cookie_name);
    });
    server.route<MembersChat>("/chat", std::cref(members));
    server.route<MembersChat>("/chat/{room}", std::cref(members));
    server.listen(port);
    std::printf("login: open %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr,
                 "login: %s\nusage: login [port] [--page FILE] [--user|--moderator NAME:PASSWORD]... "
                 "[--trust PROXY]...\n",
                 error.what());
    return 1;
}
