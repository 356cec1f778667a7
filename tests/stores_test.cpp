// section 17: a history in a file, broken and locked files, and a server that is killed.
#define WSCHAT_CHAT 1
#include "store_suite.hpp"

#if WSCHAT_SQLITE

#include <fcntl.h>
#include <sys/wait.h>
#include <csignal>
#include <map>
#include <random>
#include <set>

namespace {

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::contains;
using test::next_with;
using test::RunningServer;
using test::WsClient;

// The path of a database, which is deleted at the end of the scope.
struct DatabaseFile {
    DatabaseFile() {
        static int count = 0;
        path = "/tmp/wschat-" + std::to_string(::getpid()) + "-" + std::to_string(++count) + ".db";
        remove();
    }
    ~DatabaseFile() { remove(); }
    void remove() const {
        for (const char* more : {"", "-wal", "-shm", "-lock"}) ::unlink((path + more).c_str());
    }
    void write(const std::string& bytes, long at = 0) {
        const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        REQUIRE(::pwrite(file, bytes.data(), bytes.size(), at) == static_cast<ssize_t>(bytes.size()));
        ::close(file);
    }
    std::string path;
};

// Another program that uses the same file through SQLite.
struct OtherProgram {
    explicit OtherProgram(const std::string& path) { REQUIRE(::sqlite3_open(path.c_str(), &database) == SQLITE_OK); }
    ~OtherProgram() { ::sqlite3_close(database); }
    void execute(const char* sql) { REQUIRE(::sqlite3_exec(database, sql, nullptr, nullptr, nullptr) == SQLITE_OK); }
    sqlite3* database = nullptr;
};

ChatEntry entry(const std::string& text, const std::string& tag = "", const std::string& room = "tea") {
    ChatEntry made;
    made.room = room;
    made.time = 1234;
    made.name = "Anna";
    made.text = text;
    made.author = "key a";
    made.tag = tag;
    return made;
}
std::uint64_t append(SqliteFile& file, const ChatEntry& one) {
    std::vector<ChatEntry> entries{one};
    file.append(entries);
    return entries[0].id;
}
HistoryPosition at(const SqliteFile& file, std::uint64_t id) { return {file.epoch(), id}; }
std::string summary_of(const HistoryPage& page) {
    std::string all;
    for (const ChatEntry& each : page.entries) all += std::to_string(each.id) + each.text + " ";
    return page.gap ? all + "gap" : all;
}

struct Chat : RunningServer {
    explicit Chat(const std::string& path, const SqliteOptions& options = {}) {
        server.on_log([this](const LogEntry& entry) {
            const std::lock_guard<std::mutex> lock(mutex);
            log += std::string(entry.event) + ";";
        });
        ChatHub::of(server).set_store(SqliteHistory(path, options));
        server.route<ChatHandler>("/chat/{room}");
        start();
    }
    ~Chat() { stop(); }
    std::string logged() {
        const std::lock_guard<std::mutex> lock(mutex);
        return log;
    }
    std::mutex mutex;
    std::string log;
};

}  // namespace

TEST_SUITE_BEGIN("stores");

TEST_CASE("a history in a file passes the tests of every store") {
    std::vector<std::unique_ptr<DatabaseFile>> files;
    const test::StoreFactory make = [&](const HistoryLimits& limits) {
        files.push_back(std::make_unique<DatabaseFile>());
        SqliteOptions options;
        options.limits = limits;
        options.limits.max_age = Duration::zero();
        return std::make_unique<SqliteHistory>(files.back()->path, options);
    };
    test::test_store(make);
}

TEST_CASE("a file keeps messages under ascending ids per room, also after a restart") {
    const DatabaseFile temporary;
    ChatEntry action = entry("waves \xC3\xBC \xF0\x9F\x8D\xB5 '\"");
    action.kind = ChatEntry::Kind::action;
    {
        SqliteFile file(temporary.path, {});
        CHECK(append(file, entry("a")) == 1);
        CHECK(append(file, action) == 2);
        CHECK(append(file, entry("x", "", "coffee")) == 1);
    }
    SqliteFile file(temporary.path, {});
    CHECK(append(file, entry("c", "t")) == 3);
    const HistoryPage page = file.since("tea", std::nullopt, 50);
    REQUIRE(page.entries.size() == 3);
    CHECK(page.last_id == 3);
    CHECK_FALSE(page.gap);
    CHECK(page.entries[1].text == action.text);
    CHECK(page.entries[1].kind == ChatEntry::Kind::action);
    CHECK(page.entries[2].name == "Anna");
    CHECK(page.entries[2].author == "key a");
    CHECK(page.entries[2].tag == "t");
    CHECK(page.entries[2].time == 1234);
}

TEST_CASE("a file returns the entries after an id in order and reports a gap") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.limits.max_entries = 5;
    SqliteFile file(temporary.path, options);
    for (const char* text : {"a", "b", "c", "d", "e", "f", "g"}) append(file, entry(text));
    const struct {
        std::optional<std::uint64_t> id;
        std::size_t limit;
        const char* answer;
    } table[] = {
        {std::nullopt, 2, "6f 7g "},   {2, 50, "3c 4d 5e 6f 7g "}, {7, 50, ""},         {6, 50, "7g "},
        {1, 50, "3c 4d 5e 6f 7g gap"}, {4, 2, "6f 7g gap"},        {8, 2, "6f 7g gap"}, {6, 0, "gap"},
    };
    for (const auto& row : table) {
        CAPTURE(row.id.value_or(0));
        std::optional<HistoryPosition> position;
        if (row.id) position = at(file, *row.id);
        const HistoryPage page = file.since("tea", position, row.limit);
        CHECK(summary_of(page) == row.answer);
        CHECK(page.last_id == 7);
    }
    CHECK(summary_of(file.since("coffee", std::nullopt, 50)) == "");
    CHECK(summary_of(file.since("coffee", at(file, 0), 50)) == "");
    CHECK(summary_of(file.since("coffee", at(file, 3), 50)) == "gap");
}

TEST_CASE("a position of a deleted file is a gap, and the first position of an empty room is none") {
    DatabaseFile temporary;
    HistoryPosition before;
    {
        SqliteFile file(temporary.path, {});
        for (const char* text : {"a", "b", "c"}) before = at(file, append(file, entry(text)));
    }
    temporary.remove();
    SqliteFile file(temporary.path, {});
    const HistoryPosition empty = at(file, file.since("tea", std::nullopt, 50).last_id);
    for (const char* text : {"d", "e", "f", "g"}) append(file, entry(text));
    CHECK(summary_of(file.since("tea", before, 50)) == "1d 2e 3f 4g gap");
    CHECK(summary_of(file.since("tea", empty, 50)) == "1d 2e 3f 4g ");
}

TEST_CASE("a second message with the same tag is not kept, in one transaction and after a restart") {
    const DatabaseFile temporary;
    for (int run = 0; run < 2; ++run) {
        SqliteFile file(temporary.path, {});
        std::vector<ChatEntry> entries = {entry("a", "t"), entry("a", "t"), entry("b"), entry("b")};
        ChatEntry other = entry("c", "t");
        other.author = "key b";
        entries.push_back(other);
        const std::vector<std::string_view> results = file.append(entries);
        const std::string_view duplicate = "duplicate";
        CHECK(results == (run == 0 ? std::vector<std::string_view>{"", duplicate, "", "", ""}
                                   : std::vector<std::string_view>{duplicate, duplicate, "", "", duplicate}));
        CHECK(entries[1].id == 1);
        CHECK(entries[4].id == 4);
    }
}

TEST_CASE("a file of the first version is migrated and keeps its entries") {
    const DatabaseFile temporary;
    {
        OtherProgram other(temporary.path);
        other.execute(
            "CREATE TABLE room(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last INTEGER NOT NULL);"
            "CREATE TABLE entry(room INTEGER NOT NULL, id INTEGER NOT NULL, time INTEGER NOT NULL, kind INTEGER NOT "
            "NULL,"
            " name TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY(room, id)) WITHOUT ROWID;"
            "INSERT INTO room VALUES(1, 'tea', 7); INSERT INTO entry VALUES(1, 7, 99, 0, 'Old', 'from then');"
            "PRAGMA application_id = 2004050792; PRAGMA user_version = 1");
    }
    SqliteFile file(temporary.path, {});
    CHECK(append(file, entry("new", "t")) == 8);
    CHECK(append(file, entry("new", "t")) == 8);
    CHECK(summary_of(file.since("tea", std::nullopt, 50)) == "7from then 8new ");
    CHECK(summary_of(file.search("tea", "FROM", 50)) == "7from then ");
    CHECK(summary_of(file.since("tea", HistoryPosition{"", 7}, 50)) == "7from then 8new gap");
}

TEST_CASE("a file of the third version is migrated and keeps its entries, tags and ids") {
    const DatabaseFile temporary;
    {
        OtherProgram other(temporary.path);
        other.execute(
            "CREATE TABLE room(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last INTEGER NOT NULL);"
            "CREATE TABLE entry(room INTEGER NOT NULL, id INTEGER NOT NULL, time INTEGER NOT NULL, kind INTEGER NOT "
            "NULL, name TEXT NOT NULL, text TEXT NOT NULL, author TEXT NOT NULL DEFAULT '',"
            " tag TEXT NOT NULL DEFAULT '', PRIMARY KEY(room, id)) WITHOUT ROWID;"
            "CREATE UNIQUE INDEX entry_tag ON entry(room, author, tag) WHERE tag <> '';"
            "CREATE TABLE start(id INTEGER NOT NULL); INSERT INTO start VALUES(1700000000000000);"
            "INSERT INTO room VALUES(1, 'tea', 1700000000000002), (2, 'Coffee', 1700000000000001);"
            "INSERT INTO entry VALUES(1, 1700000000000001, 99, 0, 'Anna', 'one', 'key a', 't1'),"
            " (1, 1700000000000002, 98, 1, 'Bert', 'waves', 'key b', ''),"
            " (2, 1700000000000001, 97, 0, 'Carl', 'bean', 'key c', 't1');"
            "PRAGMA application_id = 2004050792; PRAGMA user_version = 3");
    }
    for (int opening = 0; opening < 2; ++opening) {
        SqliteFile file(temporary.path, {});
        CHECK(append(file, entry("one", "t1")) == 1700000000000001);
        const HistoryPage page = file.since("tea", std::nullopt, 50);
        REQUIRE(page.entries.size() == 2);
        CHECK(page.entries[0].author == "key a");
        CHECK(page.entries[1].kind == ChatEntry::Kind::action);
        CHECK(file.since("coffee", std::nullopt, 50).entries.at(0).name == "Carl");  // chat_fold() of the old name
    }
    CHECK(append(*std::make_unique<SqliteFile>(temporary.path, SqliteOptions()), entry("x")) == 1700000000000003);
}

TEST_CASE("a file of the fifth version is migrated, and its facts about rooms have the folded names") {
    const DatabaseFile temporary;
    {
        SqliteFile file(temporary.path, {});
        append(file, entry("one", "", "tea room"));
        append(file, entry("lost", "", "Hall"));  // another room has this name, folded
        append(file, entry("found", "", "hall"));
        for (const auto& [scope, key] :
             std::vector<std::pair<std::string, std::string>>{{"mute", "Tea Room\nname anna"},
                                                              {"read", "ID\nTea Room"},
                                                              {"read", "ID\n@Peer"},
                                                              {"read", "ID\nHall"},
                                                              {"room", "Tea Room"},
                                                              {"invite", "tea room\nID"},
                                                              {"topic", "TEA"}})
            file.put({scope, key, "1", "", 0});
    }
    OtherProgram(temporary.path)
        .execute(
            "ALTER TABLE room DROP COLUMN max_entries; ALTER TABLE room DROP COLUMN max_age;"
            "ALTER TABLE entry DROP COLUMN mentions; PRAGMA user_version = 5");
    SqliteFile file(temporary.path, {});
    const auto keys = [&](const std::string& scope) {
        std::string all;
        for (const ChatFact& each : file.facts(scope, "")) all += each.key + ";";
        return all;
    };
    CHECK(keys("mute") == "tea room\nname anna;");
    CHECK(keys("read") == "ID\n@Peer;ID\nHall;ID\ntea room;");
    CHECK(keys("room") == "tea room;");
    CHECK(keys("invite") == "tea room\nID;");
    CHECK(keys("topic") == "tea;");
    CHECK(summary_of(file.since("tea room", std::nullopt, 50)) == "1one ");
}

TEST_CASE("entries of a room with a shorter age expire while nobody writes, also after a restart") {
    const DatabaseFile temporary;
    ChatEntry first = entry("old"), other = entry("stays", "", "hall");
    first.retention = ChatEntry::Retention{std::nullopt, 1h};
    first.time = other.time = unix_ms() - 2 * 3600 * 1000;
    for (const bool restart : {false, true}) {
        CAPTURE(restart);
        SqliteFile file(temporary.path, {});
        if (!restart) {
            CHECK(append(file, first) == 1);
            append(file, other);
        }
        while (file.sweep()) {
        }
        CHECK(summary_of(file.since("tea", std::nullopt, 50)) == "");
        CHECK(summary_of(file.since("hall", std::nullopt, 50)) == "1stays ");
    }
}

TEST_CASE("a position is known after restarts, and unknown after a copy of the file was restored") {
    const DatabaseFile live, copy;
    const auto take_copy = [](const DatabaseFile& from, const DatabaseFile& to) {
        OtherProgram(from.path).execute(("VACUUM INTO '" + to.path + "'").c_str());
    };
    HistoryPosition early, late;
    {
        SqliteFile file(live.path, {});
        for (const char* text : {"a", "b"}) early = at(file, append(file, entry(text)));
        take_copy(live, copy);
        for (const char* text : {"c", "d"}) late = at(file, append(file, entry(text)));
    }
    {
        SqliteFile file(live.path, {});
        CHECK(summary_of(file.since("tea", late, 50)) == "");
        CHECK(summary_of(file.since("tea", early, 50)) == "3c 4d ");
    }
    SqliteFile file(copy.path, {});
    CHECK(summary_of(file.since("tea", early, 50)) == "");
    CHECK(summary_of(file.since("tea", late, 50)) == "1a 2b gap");
    for (const char* text : {"C", "D", "E"}) append(file, entry(text));  // the same ids again
    CHECK(summary_of(file.since("tea", late, 50)) == "1a 2b 3C 4D 5E gap");
    CHECK(summary_of(file.since("tea", early, 50)) == "3C 4D 5E ");
    CHECK(summary_of(file.since("tea", at(file, 4), 50)) == "5E ");
}

TEST_CASE("positions stay correct while a file is restored from copies many times") {
    // A model: what each position has seen. The file has had everything that the position has, or it says gap.
    std::mt19937 random(7);
    const DatabaseFile live;
    std::vector<std::unique_ptr<DatabaseFile>> copies;
    std::vector<std::pair<HistoryPosition, std::string>> clients;  // and all texts of the room at that time
    int said = 0, resumed = 0;
    for (int opening = 0; opening < 40; ++opening) {
        {
            SqliteFile file(live.path, {});
            for (int step = 0; step < 8; ++step) {
                const auto action = random() % 4;
                if (action <= 1) append(file, entry("<" + std::to_string(++said) + ">"));
                if (action == 2) {
                    const HistoryPage all = file.since("tea", std::nullopt, 1000);
                    clients.emplace_back(at(file, all.last_id), "");
                    for (const ChatEntry& each : all.entries) clients.back().second += each.text;
                }
                if (action == 3 && copies.size() < 20) {
                    copies.push_back(std::make_unique<DatabaseFile>());
                    OtherProgram(live.path).execute(("VACUUM INTO '" + copies.back()->path + "'").c_str());
                }
            }
            std::string all;
            for (const ChatEntry& each : file.since("tea", std::nullopt, 1000).entries) all += each.text;
            for (const auto& [position, seen] : clients) {
                const HistoryPage page = file.since("tea", position, 1000);
                std::string after = page.gap ? "" : seen;
                for (const ChatEntry& each : page.entries) after += each.text;
                CHECK(after == all);
                const bool same_past = all.compare(0, seen.size(), seen) == 0;
                if (!same_past) CHECK(page.gap);
                if (!page.gap) ++resumed;
            }
        }
        if (opening % 3 != 2 || copies.empty()) continue;
        live.remove();
        OtherProgram(copies[random() % copies.size()]->path).execute(("VACUUM INTO '" + live.path + "'").c_str());
    }
    CHECK(clients.size() > 40);
    CHECK(resumed > 100);
}

TEST_CASE("a second server on a file waits for the first one, and then gets an Error that names it") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.lock_timeout = Duration::zero();
    auto first = std::make_unique<SqliteHistory>(temporary.path, options);
    const std::string error = test::error_of([&] { SqliteHistory(temporary.path, options); });
    CHECK(contains(error, "SqliteHistory \"" + temporary.path + "\": another server uses it: process " +
                              std::to_string(::getpid()) + " on \""));
    options.lock_timeout = test::deadline;
    std::thread ends([&] {
        std::this_thread::yield();
        first.reset();
    });
    SqliteHistory second(temporary.path, options);
    ends.join();
    CHECK(first == nullptr);
}

TEST_CASE("a lock ends with its process") {
    const DatabaseFile temporary;
    {
        int ready[2];
        REQUIRE(::pipe(ready) == 0);
        const pid_t child = ::fork();
        if (child == 0) {
            const SqliteHistory history(temporary.path);
            if (::write(ready[1], "x", 1) == 1) ::pause();
            ::_exit(0);
        }
        char byte = 0;
        REQUIRE(::read(ready[0], &byte, 1) == 1);
        SqliteOptions options;
        options.lock_timeout = Duration::zero();
        CHECK(contains(test::error_of([&] { SqliteHistory(temporary.path, options); }),
                       "another server uses it: process " + std::to_string(child)));
        ::kill(child, SIGKILL);
        ::waitpid(child, nullptr, 0);
        ::close(ready[0]);
        ::close(ready[1]);
    }
    SqliteHistory history(temporary.path);
}

TEST_CASE("old entries are deleted when the file is opened") {
    const DatabaseFile temporary;
    const std::int64_t now = unix_ms();
    SqliteOptions options;
    {
        SqliteFile file(temporary.path, options);
        for (const char* room : {"tea", "coffee"}) {
            append(file, entry("old", "", room));
            ChatEntry fresh = entry("new", "", room);
            fresh.time = now;
            append(file, fresh);
        }
        std::vector<ChatEntry> many(5000, entry("old", "", "many"));
        file.append(many);
    }
    options.limits.max_age = std::chrono::hours(1);
    SqliteFile file(temporary.path, options);
    for (const char* room : {"tea", "coffee"}) CHECK(summary_of(file.since(room, std::nullopt, 50)) == "2new ");
    CHECK(summary_of(file.since("many", std::nullopt, 50)) == "");
    CHECK(file.since("many", std::nullopt, 50).last_id == 5000);
}

TEST_CASE("the index for the search is built again when a program without FTS5 has used the file") {
    const DatabaseFile temporary;
    {
        SqliteFile file(temporary.path, {});
        append(file, entry("green tea"));
    }
    {
        OtherProgram other(temporary.path);  // as prepare_search() does without FTS5
        other.execute(
            "DROP TRIGGER search_insert; DROP TRIGGER search_delete; DROP TRIGGER search_update;"
            "INSERT INTO entry(room, id, time, kind, name, text, author, tag)"
            " VALUES(1, 2, 1, 0, 'Anna', 'black tea', '', ''); UPDATE room SET last = 2");
    }
    SqliteFile file(temporary.path, {});
    CHECK(summary_of(file.search("tea", "tea", 50)) == "1green tea 2black tea ");
    append(file, entry("red tea"));
    CHECK(summary_of(file.search("tea", "tea", 50)) == "1green tea 2black tea 3red tea ");
}

TEST_CASE("an index for the search that does not match the entries is built again by the next change") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.limits.max_entries = 2;
    SqliteFile file(temporary.path, options);
    const auto damage = [&] {
        OtherProgram(temporary.path).execute("INSERT INTO search(search) VALUES('delete-all')");
    };
    append(file, entry("green tea"));
    damage();
    ChatEntry edit = entry("black tea");
    edit.kind = ChatEntry::Kind::edit;
    edit.target = 1;
    CHECK(append(file, edit) == 2);
    CHECK(summary_of(file.search("tea", "tea", 50)) == "1black tea ");
    damage();
    CHECK(append(file, entry("red tea")) == 3);  // the first one is above the limit
    CHECK(append(file, entry("white tea")) == 4);
    CHECK(summary_of(file.search("tea", "tea", 50)) == "3red tea 4white tea ");
    damage();
    file.erase("key a", 100);
    CHECK(summary_of(file.search("tea", "tea", 50)) == "");
}

TEST_CASE("a file that cannot be used is an Error with the reason") {
    DatabaseFile garbage, newer, foreign, unmarked;
    garbage.write(std::string(8192, 'x'));
    { SqliteFile file(newer.path, {}); }
    OtherProgram(newer.path).execute("PRAGMA user_version = 9");
    OtherProgram(foreign.path).execute("PRAGMA application_id = 1; CREATE TABLE a(b)");
    OtherProgram(unmarked.path).execute("CREATE TABLE a(b)");
    const struct {
        std::string path, sentence;
    } table[] = {
        {garbage.path, "file is not a database (26)"},
        {newer.path, "it is of version 9, and this program knows 6"},
        {foreign.path, "it is a database of another program"},
        {unmarked.path, "it is a database of another program"},
        {"/nowhere/at/all.db", "unable to open database file (14)"},
        {"/tmp", "unable to open database file (14)"},
    };
    for (const auto& row : table)
        CHECK_THROWS_WITH_AS(SqliteHistory{row.path}, ("SqliteHistory \"" + row.path + "\": " + row.sentence).c_str(),
                             Error);
}

TEST_CASE("a transaction that does not fit into the file changes nothing") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.max_file_bytes = 192 * 1024;
    SqliteFile file(temporary.path, options);
    append(file, entry("a"));
    std::vector<ChatEntry> entries = {entry("b"), entry(std::string(200'000, 'x'))};
    CHECK_THROWS_WITH_AS(file.append(entries),
                         ("SqliteHistory \"" + temporary.path + "\": database or disk is full (13)").c_str(), Error);
    CHECK(summary_of(file.since("tea", std::nullopt, 50)) == "1a ");
    CHECK(append(file, entry("c")) == 2);
}

TEST_CASE("a page stops after a mebibyte of text and reports a gap") {
    const DatabaseFile temporary;
    SqliteFile file(temporary.path, {});
    for (int i = 0; i < 100; ++i) append(file, entry(std::string(16 * 1024, 'x')));
    const HistoryPage page = file.since("tea", at(file, 1), 500);
    CHECK(page.gap);
    CHECK(page.more);
    CHECK(page.entries.size() == 63);
    CHECK(page.entries.back().id == page.last_id);
    CHECK_FALSE(file.since("tea", at(file, page.entries.front().id), 500).gap);
}

TEST_CASE("a file that is deleted or moved while it is open is an Error") {
    for (const bool moved : {false, true}) {
        const DatabaseFile temporary, elsewhere;
        SqliteFile file(temporary.path, {});
        append(file, entry("a"));
        if (moved) ::rename(temporary.path.c_str(), elsewhere.path.c_str());
        else ::unlink(temporary.path.c_str());
        CHECK_THROWS_WITH_AS(append(file, entry("b")), doctest::Contains("the file was moved or deleted"), Error);
        CHECK_THROWS_AS(file.since("tea", std::nullopt, 50), Error);
    }
}

TEST_CASE("a damaged page is an Error, not a crash") {
    DatabaseFile temporary;
    {
        SqliteFile file(temporary.path, {});
        for (int i = 0; i < 300; ++i) append(file, entry(std::string(500, 'x')));
    }
    temporary.write(std::string(100'000, 'z'), 20'000);
    for (int i = 0; i < 2; ++i)
        CHECK_THROWS_WITH_AS(SqliteFile(temporary.path, {}).since("tea", std::nullopt, 300),
                             doctest::Contains("database disk image is malformed (11)"), Error);
}

TEST_CASE("a message is acknowledged after the commit, and a client can resume after a restart") {
    const DatabaseFile temporary;
    std::string last;
    {
        Chat chat(temporary.path);
        WsClient anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret"), bert(chat.port(), "/chat/tea?name=Bert");
        last = test::field_of(next_with(anna, "\"type\":\"history\""), "epoch") + "-1";
        next_with(bert, "\"type\":\"history\"");
        anna.send("/tag t1 hello");
        const std::string said = next_with(anna, "\"said\"");
        CHECK(contains(said, "\"id\":1,"));
        CHECK(contains(said, "\"name\":\"Anna\",\"text\":\"hello\""));
        CHECK(contains(next_with(bert, "\"said\""), "\"id\":1"));
        bert.send("hello, Anna");
        CHECK(contains(next_with(anna, "\"said\""), "\"id\":2"));
        bert.send("are you there?");
        next_with(bert, "are you there?");
    }
    Chat chat(temporary.path);
    WsClient anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret&last=" + last);
    const std::string history = next_with(anna, "\"type\":\"history\"");
    CHECK(contains(history, "\"last\":3,\"gap\":false"));
    CHECK_FALSE(contains(history, "\"text\":\"hello\""));
    CHECK(history.find("hello, Anna") < history.find("are you there?"));
    anna.send("/tag t1 hello");
    CHECK(next_with(anna, "\"t1\"") == "{\"type\":\"ack\",\"room\":\"tea\",\"tag\":\"t1\",\"id\":1}");
}

TEST_CASE("decisions of moderators, read markers and waiting private messages survive a restart") {
    const DatabaseFile temporary;
    const std::string history = "\"type\":\"history\"", bert_key = "/chat/tea?name=Bert&key=bert-secret";
    {
        Chat chat(temporary.path);
        std::string anna_id;
        WsClient bert(chat.port(), bert_key);
        next_with(bert, history);
        {
            WsClient anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret");
            anna_id = test::field_of(next_with(anna, "\"hello\""), "user");
            next_with(anna, history);
            anna.send("hello");
            next_with(anna, "\"said\"");
        }
        next_with(bert, "\"said\"");
        bert.send("/read 1");
        next_with(bert, "\"read\"");
        bert.send("/msg @" + anna_id + " psst");
        next_with(bert, "\"private\"");
        chat.on_loop([&] {
            ChatHub& hub = ChatHub::of(chat.server);
            hub.ban("Zed", 1h);
            hub.room("tea").mute("Bert", 1h);
            hub.room("tea").set_topic("Scones");
        });
        next_with(bert, "Scones");
    }
    Chat chat(temporary.path);
    const WsClient zed(chat.port(), "/chat/tea?name=Zed");
    CHECK(contains(zed.head, " 403 "));
    WsClient bert(chat.port(), bert_key);
    CHECK(contains(next_with(bert, history), "\"topic\":\"Scones\""));
    CHECK(contains(next_with(bert, "\"read\""), "\"id\":1"));
    bert.send("hello");
    CHECK(contains(next_with(bert, "\"error\""), "\"muted\""));
    WsClient anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret");
    CHECK(contains(next_with(anna, "\"peer\""), "psst"));
}

TEST_CASE("a full file is an error for the sender and a log entry, and the chat continues") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.max_file_bytes = 192 * 1024;
    Chat chat(temporary.path, options);
    WsClient anna(chat.port(), "/chat/tea?name=Anna"), bert(chat.port(), "/chat/tea?name=Bert");
    next_with(bert, "\"type\":\"history\"");
    std::string answer;
    for (int i = 0; i < 15 && !contains(answer, "\"error\""); ++i) {
        anna.send("/tag t" + std::to_string(i) + " " + std::string(12'000, 'x'));
        answer = next_with(anna, "\"tag\":\"t");
        if (i == 4) std::this_thread::sleep_for(1ms);
    }
    CHECK(contains(answer, "\"code\":\"not_kept\""));
    CHECK(contains(chat.logged(), "chat_not_kept;"));
    bert.send("/msg Anna are you well?");
    CHECK(contains(next_with(anna, "\"private\""), "are you well?"));
    CHECK(chat.metrics().handler_exceptions == 0);
}

TEST_CASE("a locked file is an error for the sender, and private messages do not wait for the lock") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.busy_timeout = 2s;
    Chat chat(temporary.path, options);
    WsClient anna(chat.port(), "/chat/tea?name=Anna");
    next_with(anna, "\"entries\"");  // after it only the join of Bert arrives
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    next_with(anna, "\"Bert\"");
    OtherProgram other(temporary.path);
    other.execute("BEGIN IMMEDIATE");
    anna.send("/tag t1 hello");
    bert.send("/msg Anna psst");
    CHECK(contains(next_with(anna, "\"private\""), "psst"));  // the other message still waits for the lock
    CHECK(contains(next_with(anna, "\"t1\""), "\"code\":\"not_kept\""));
    other.execute("COMMIT");
    anna.send("/tag t1 hello");
    CHECK(contains(next_with(anna, "\"t1\""), "\"type\":\"said\""));
}

TEST_CASE("the queue of a file has a limit, above which the sender gets an error") {
    const DatabaseFile temporary;
    SqliteOptions options;
    options.max_queued = 5;
    options.busy_timeout = 10s;
    Chat chat(temporary.path, options);
    WsClient anna(chat.port(), "/chat/tea?name=Anna");
    next_with(anna, "\"type\":\"history\"");
    OtherProgram other(temporary.path);
    other.execute("BEGIN IMMEDIATE");
    for (int i = 0; i < 10; ++i) anna.send("/tag t" + std::to_string(i) + " x");
    CHECK(contains(next_with(anna, "\"tag\""), "\"code\":\"not_kept\""));
    other.execute("COMMIT");
    CHECK(contains(next_with(anna, "\"said\""), "\"tag\":\"t0\""));
}

// ---- faults of the file system -------------------------------------------------------------------------------------

namespace {

// The operations of SQLite on its files, of which the n-th of one kind fails, and all later ones until disarm().
class FaultyFiles {
public:
    enum class Operation { none, open, read, write, truncate, sync, lock, shared_memory };

    FaultyFiles() : real_(::sqlite3_vfs_find(nullptr)), vfs_(*real_) {
        instance() = this;
        vfs_.zName = "faulty";
        vfs_.szOsFile = static_cast<int>(sizeof(File)) + real_->szOsFile;
        vfs_.xOpen = &open;
        REQUIRE(::sqlite3_vfs_register(&vfs_, 1) == SQLITE_OK);
    }
    FaultyFiles(const FaultyFiles&) = delete;
    FaultyFiles& operator=(const FaultyFiles&) = delete;
    ~FaultyFiles() {
        ::sqlite3_vfs_unregister(&vfs_);
        ::sqlite3_vfs_register(real_, 1);
    }
    void arm(Operation operation, long n) {
        operation_ = operation;
        left_ = n;
        faults = 0;
    }
    void disarm() { operation_ = Operation::none; }
    long faults = 0;

private:
    struct File {
        sqlite3_file base;
        sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
    };
    static FaultyFiles*& instance() {
        static FaultyFiles* one = nullptr;
        return one;
    }
    static bool fails(Operation operation) {
        FaultyFiles& self = *instance();
        if (self.operation_ != operation || (self.left_ > 1 && self.left_-- > 1)) return false;
        ++self.faults;
        return true;
    }
    static sqlite3_file* real(sqlite3_file* file) { return reinterpret_cast<File*>(file)->real(); }

    static int open(sqlite3_vfs*, const char* name, sqlite3_file* file, int flags, int* result_flags) {
        file->pMethods = nullptr;
        if (fails(Operation::open)) return SQLITE_CANTOPEN;
        real(file)->pMethods = nullptr;
        const int result = instance()->real_->xOpen(instance()->real_, name, real(file), flags, result_flags);
        if (real(file)->pMethods != nullptr) file->pMethods = methods();
        return result;
    }
    static const sqlite3_io_methods* methods() {
        static const sqlite3_io_methods table = [] {
            sqlite3_io_methods m{};
            m.iVersion = 2;
            m.xClose = [](sqlite3_file* f) { return real(f)->pMethods->xClose(real(f)); };
            m.xRead = [](sqlite3_file* f, void* to, int size, sqlite3_int64 at) {
                return fails(Operation::read) ? SQLITE_IOERR_READ : real(f)->pMethods->xRead(real(f), to, size, at);
            };
            m.xWrite = [](sqlite3_file* f, const void* from, int size, sqlite3_int64 at) {
                return fails(Operation::write) ? SQLITE_FULL : real(f)->pMethods->xWrite(real(f), from, size, at);
            };
            m.xTruncate = [](sqlite3_file* f, sqlite3_int64 size) {
                return fails(Operation::truncate) ? SQLITE_IOERR_TRUNCATE : real(f)->pMethods->xTruncate(real(f), size);
            };
            m.xSync = [](sqlite3_file* f, int flags) {
                return fails(Operation::sync) ? SQLITE_IOERR_FSYNC : real(f)->pMethods->xSync(real(f), flags);
            };
            m.xFileSize = [](sqlite3_file* f, sqlite3_int64* size) {
                return real(f)->pMethods->xFileSize(real(f), size);
            };
            m.xLock = [](sqlite3_file* f, int kind) {
                return fails(Operation::lock) ? SQLITE_IOERR_LOCK : real(f)->pMethods->xLock(real(f), kind);
            };
            m.xUnlock = [](sqlite3_file* f, int kind) { return real(f)->pMethods->xUnlock(real(f), kind); };
            m.xCheckReservedLock = [](sqlite3_file* f, int* result) {
                return real(f)->pMethods->xCheckReservedLock(real(f), result);
            };
            m.xFileControl = [](sqlite3_file* f, int operation, void* argument) {
                return real(f)->pMethods->xFileControl(real(f), operation, argument);
            };
            m.xSectorSize = [](sqlite3_file* f) { return real(f)->pMethods->xSectorSize(real(f)); };
            m.xDeviceCharacteristics = [](sqlite3_file* f) {
                return real(f)->pMethods->xDeviceCharacteristics(real(f));
            };
            m.xShmMap = [](sqlite3_file* f, int page, int size, int extend, void volatile** memory) {
                return fails(Operation::shared_memory)
                           ? SQLITE_IOERR_SHMMAP
                           : real(f)->pMethods->xShmMap(real(f), page, size, extend, memory);
            };
            m.xShmLock = [](sqlite3_file* f, int offset, int n, int flags) {
                const bool locks = (flags & SQLITE_SHM_LOCK) != 0;
                return locks && fails(Operation::shared_memory)
                           ? SQLITE_IOERR_SHMLOCK
                           : real(f)->pMethods->xShmLock(real(f), offset, n, flags);
            };
            m.xShmBarrier = [](sqlite3_file* f) { real(f)->pMethods->xShmBarrier(real(f)); };
            m.xShmUnmap = [](sqlite3_file* f, int remove) { return real(f)->pMethods->xShmUnmap(real(f), remove); };
            return m;
        }();
        return &table;
    }

    sqlite3_vfs* real_;
    sqlite3_vfs vfs_;
    Operation operation_ = Operation::none;
    long left_ = 0;
};

}  // namespace

TEST_CASE("a file whose operations fail from the n-th on is an Error, loses no entry that it kept, and works later") {
    using Operation = FaultyFiles::Operation;
    FaultyFiles files;
    SqliteOptions options;
    options.survive_power_loss = true;
    options.busy_timeout = 0s;
    for (const Operation operation : {Operation::open, Operation::read, Operation::write, Operation::truncate,
                                      Operation::sync, Operation::lock, Operation::shared_memory}) {
        long n = 0;
        do {
            CAPTURE(static_cast<int>(operation));
            ++n;
            CAPTURE(n);
            const DatabaseFile temporary;
            std::vector<std::string> kept;
            files.arm(operation, n);
            try {
                SqliteFile file(temporary.path, options);
                for (int i = 0; i < 6; ++i) {
                    const std::string tag = "t" + std::to_string(i);
                    try {
                        append(file, entry(std::string(3000, 'x'), tag));
                        kept.push_back(tag);
                        file.since("tea", std::nullopt, 50);
                    } catch (const Error&) {
                    }
                }
                files.disarm();
                append(file, entry("later", "later"));
                kept.push_back("later");
            } catch (const Error&) {
            }
            files.disarm();
            SqliteFile again(temporary.path, options);
            std::set<std::string> found;
            for (const ChatEntry& each : again.since("tea", std::nullopt, 50).entries)
                CHECK(found.insert(each.tag).second);
            for (const std::string& tag : kept) CHECK(found.count(tag) == 1);
            append(again, entry("again", "again"));
        } while (files.faults != 0 && n < 300);
        CHECK(n < 300);
        if (operation != Operation::truncate) CHECK(n > 1);
    }
}

// ---- kill -9 -------------------------------------------------------------------------------------------------------

namespace {

// A file whose first reads of each room fail, as if the disk were broken.
class FailingReads final : public ChatStore {
public:
    FailingReads(const std::string& path, unsigned failures) : file_(path), failures_(failures) {}
    void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
        file_.attach(listener, std::move(mailbox));
    }
    void append(ChatEntry entry) override { file_.append(std::move(entry)); }
    void forward(const ChatEntry& entry) override { file_.forward(entry); }
    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        if (failures_ == 0) return file_.since(room, std::move(position), limit, std::move(callback));
        --failures_;
        HistoryPage page;
        page.error = "disk I/O error";
        callback(std::move(page));
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        file_.before(room, id, limit, std::move(callback));
    }
    void put(ChatFact fact) override { file_.put(std::move(fact)); }
    void facts(const std::string& scope, const std::string& prefix, FactsCallback callback) override {
        file_.facts(scope, prefix, std::move(callback));
    }

private:
    SqliteHistory file_;
    unsigned failures_;
};

// A server with a database in a process of its own, which the destructor kills.
class KilledServer {
public:
    explicit KilledServer(const std::string& path, unsigned failing_reads = 0) : failing_reads_(failing_reads) {
        int ports[2];
        REQUIRE(::pipe(ports) == 0);
        pid_ = ::fork();
        if (pid_ == 0) {
            serve(path, ports[1]);
            ::_exit(0);
        }
        ::close(ports[1]);
        REQUIRE(::read(ports[0], &port, sizeof port) == sizeof port);
        ::close(ports[0]);
    }
    ~KilledServer() {
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }
    int port = 0;

private:
    void serve(const std::string& path, int ports) const {
        ServerOptions options;
        options.handle_signals = false;
        Server server(options);
        ChatHub::of(server).set_store(std::make_unique<FailingReads>(path, failing_reads_));
        ChatHub::of(server).limits.connection = ChatHub::of(server).limits.address = FloodRates();
        server.route<ChatHandler>("/chat/{room}");
        server.listen(0);
        const int own = server.port();
        if (::write(ports, &own, sizeof own) == sizeof own) server.run();
    }
    unsigned failing_reads_;
    pid_t pid_ = -1;
};

// What a file contains.
struct Kept {
    std::map<std::uint64_t, std::string> texts;           // of messages, by id; removed ones are empty
    std::map<std::uint64_t, std::uint64_t> last_changes;  // the newest amendment of a message
};
Kept kept_in(const std::string& path) {
    Kept kept;
    const OtherProgram program(path);
    const auto add = [](void* all, int, char** values, char**) {
        const std::uint64_t id = std::stoull(values[0]), target = std::stoull(values[1]);
        if (target == 0) static_cast<Kept*>(all)->texts[id] = values[2];
        else static_cast<Kept*>(all)->last_changes[target] = id;
        return 0;
    };
    REQUIRE(::sqlite3_exec(program.database, "SELECT id, target, text FROM entry ORDER BY id", add, &kept, nullptr) ==
            SQLITE_OK);
    return kept;
}

// A client that resumes, as a page does it. It knows what it has seen since the last gap.
class Reader {
public:
    void connect(int port) {
        client_.emplace(port, "/chat/tea?name=Reader" + (position_.empty() ? "" : "&last=" + position_));
        for (bool joined = false; !joined;) joined = contains(read(), "\"type\":\"history\"");
    }
    void disconnect() {
        if (client_) client_->raw.reset();
        client_.reset();
    }
    // Reads all that the server has sent.
    void catch_up() {
        client_->send("/who");
        while (!contains(read(), "\"type\":\"users\"")) {
        }
    }
    // Everything between the first and the last message that it has seen, with all changes that it has seen.
    void check_against(const Kept& kept) const {
        if (seen.empty() || !seen_of_this_file) return;
        const auto begin = kept.texts.lower_bound(seen.begin()->first),
                   end = kept.texts.upper_bound(seen.rbegin()->first);
        CHECK(static_cast<std::size_t>(std::distance(begin, end)) == seen.size());
        for (const auto& message : seen) {
            const std::uint64_t id = message.first;
            CAPTURE(id);
            REQUIRE(kept.texts.count(id) == 1);
            const auto change = kept.last_changes.find(id);
            if (change == kept.last_changes.end() || change->second <= last_id_)
                CHECK(kept.texts.at(id) == message.second);
        }
    }

    std::map<std::uint64_t, std::string> seen;
    bool seen_of_this_file = true;  // false: the file was restored, and the client has not resumed yet
    int resumed = 0;                // without a gap

private:
    std::string read() {
        const auto next = client_->next();
        REQUIRE(next.has_value());
        const std::string& event = *next;
        if (contains(event, "\"type\":\"history\"")) {
            if (contains(event, "\"gap\":true") || position_.empty()) {
                seen.clear();
                last_id_ = 0;
            } else if (!seen.empty()) ++resumed;
            seen_of_this_file = true;
            add_all(event);
            const std::string epoch = test::field_of(event, "epoch");
            if (!epoch.empty()) epoch_ = epoch;
            position_ = epoch.empty() ? "" : epoch_ + "-" + test::field_of(event, "last");
        } else if (contains(event, "\"id\":")) {
            add_all(event);
            if (!position_.empty()) position_ = epoch_ + "-" + test::field_of(event, "id");
        }
        return event;
    }
    // All entries of a "history" event, or another event.
    void add_all(std::string events) {
        for (std::size_t at; (at = events.find("\"id\":")) != std::string::npos;) {
            const std::size_t type_at = events.rfind("\"type\":", at);
            const std::string type = test::field_of(events.substr(type_at), "type");
            events.erase(0, at);
            const std::uint64_t id = std::stoull(test::field_of(events, "id"));
            CHECK(last_id_ < id);  // in order, and nothing twice
            last_id_ = id;
            if (type == "said") seen[id] = test::field_of(events, "text");
            const auto target = type == "said" ? seen.end() : seen.find(std::stoull(test::field_of(events, "target")));
            if (target != seen.end()) target->second = type == "edit" ? test::field_of(events, "text") : "";
            events.erase(0, 1);
        }
    }
    std::optional<WsClient> client_;
    std::string epoch_, position_;
    std::uint64_t last_id_ = 0;  // since the last gap
};

// A client that sends each line until it is acknowledged.
class Writer {
public:
    void connect(int port) {
        client_.emplace(port, "/chat/tea?name=Writer&key=writer-secret");
        next_with(*client_, "\"type\":\"history\"");
        for (const auto& [tag, line] : pending_) send(tag, line);
    }
    void write(unsigned count) {
        for (; count != 0; --count) add("t", "text-");
    }
    // Edits or removes one of its messages.
    void change(unsigned choice) {
        if (acknowledged.empty()) return;
        const auto message = std::next(acknowledged.begin(), static_cast<int>(choice % acknowledged.size()));
        const std::string id = std::to_string(message->second);
        if (choice % 3 == 0) add("c", "/delete " + id + " ");
        else add("c", "/edit " + id + " text-" + message->first + "-");
    }
    void read(std::size_t count) {
        for (; count != 0 && !pending_.empty(); --count) {
            std::string event = next_with(*client_, "\"tag\"");
            while (contains(event, "\"type\":\"history\"")) event = next_with(*client_, "\"tag\"");
            const std::string tag = test::field_of(event, "tag");
            if (tag[0] == 't') acknowledged[tag] = std::stoull(test::field_of(event, "id"));
            REQUIRE(pending_.erase(tag) == 1);
        }
    }
    void read_all() { read(pending_.size()); }
    void disconnect() {
        if (client_) client_->raw.reset();
        client_.reset();
    }
    void check_against(const Kept& kept) const {
        std::map<std::string, int> copies;
        for (const auto& [id, text] : kept.texts) ++copies[original(text)];
        for (const auto& [text, count] : copies) CHECK((text.empty() || count == 1));
        for (const auto& [tag, id] : acknowledged) {
            const std::string text = original(kept.texts.at(id));
            CHECK((text.empty() || text == "text-" + tag));
        }
    }
    // The file has lost what it had after a copy. Lines with ids would change other messages now.
    void forget(const Kept& kept) {
        for (auto at = acknowledged.begin(); at != acknowledged.end();)
            at = kept.texts.count(at->second) == 1 ? std::next(at) : acknowledged.erase(at);
        for (auto at = pending_.begin(); at != pending_.end();)
            at = at->first[0] == 't' ? std::next(at) : pending_.erase(at);
    }

    std::map<std::string, std::uint64_t> acknowledged;  // messages by tag

private:
    // "text-t1" of "text-t1-c7", which is an edit.
    static std::string original(const std::string& text) { return text.substr(0, text.find('-', 5)); }
    void add(const std::string& kind, const std::string& line) {
        const std::string tag = kind + std::to_string(++made_);
        send(tag, pending_[tag] = line + tag);
    }
    void send(const std::string& tag, const std::string& line) { client_->send("/tag " + tag + " " + line); }

    std::optional<WsClient> client_;
    std::map<std::string, std::string> pending_;  // lines by tag
    int made_ = 0;
};

}  // namespace

TEST_CASE("if servers are killed and files restored or unreadable, a client gets every message once or a gap") {
    for (const unsigned seed : {1u, 2u, 3u}) {
        CAPTURE(seed);
        std::mt19937 random(seed);
        const auto pick = [&](unsigned below) { return static_cast<unsigned>(random() % below); };
        const DatabaseFile file, copy;
        Reader reader;
        Writer writer;
        bool has_copy = false;
        for (int round = 0; round < 25; ++round) {
            CAPTURE(round);
            {
                const KilledServer server(file.path, pick(4) == 0 ? pick(3) : 0);
                if (pick(2) == 0) reader.connect(server.port);
                else reader.disconnect();
                writer.connect(server.port);
                for (int step = 0; step < 6; ++step) {
                    writer.write(pick(5));
                    writer.change(pick(1000));
                    writer.read(pick(5));
                    switch (pick(5)) {
                        case 0: reader.disconnect(); break;
                        case 1: reader.disconnect(); [[fallthrough]];
                        case 2: reader.disconnect(), reader.connect(server.port); break;
                        case 3: writer.disconnect(), writer.connect(server.port); break;
                        default: reader.disconnect(), reader.connect(server.port), reader.catch_up();
                    }
                }
            }
            reader.disconnect();
            writer.disconnect();
            const auto kept = kept_in(file.path);
            reader.check_against(kept);
            writer.check_against(kept);
            const auto disaster = pick(6);
            if (disaster == 0) {
                copy.remove();
                OtherProgram(file.path).execute(("VACUUM INTO '" + copy.path + "'").c_str());
                has_copy = true;
            } else if (disaster == 1 && has_copy) {
                file.remove();
                OtherProgram(copy.path).execute(("VACUUM INTO '" + file.path + "'").c_str());
                writer.forget(kept_in(file.path));
                reader.seen_of_this_file = false;
            }
        }
        const KilledServer server(file.path);
        reader.connect(server.port);
        writer.connect(server.port);
        writer.read_all();
        reader.catch_up();
        reader.check_against(kept_in(file.path));
        CHECK(writer.acknowledged.size() > 50);
        CHECK(reader.resumed > 10);
    }
}

// What outlives the connections of a Returning client.
struct Returns {
    std::string epoch;
    std::uint64_t last = 0;
    std::vector<std::string> texts;  // of all messages that have arrived
    std::vector<int> unconfirmed;    // own messages that the chat has not acknowledged
    int sent = 0, repeated = 0;
};

std::string value_of(std::string_view event, const std::string& name) {
    const std::size_t at = event.find("\"" + name + "\":");
    if (at == std::string_view::npos) return {};
    std::string_view rest = event.substr(at + name.size() + 3);
    const bool quoted = rest.front() == '"';
    if (quoted) rest.remove_prefix(1);
    return std::string(rest.substr(0, rest.find_first_of(quoted ? "\"" : ",}")));
}

struct Returning : WebSocketHandler {
    explicit Returning(Returns& its_memory) : memory(its_memory) {}
    void on_message(const Message& message) override {
        const std::string_view event = message.text();
        const std::string tag = value_of(event, "tag"), type = value_of(event, "type");
        const std::string_view said = "{\"type\":\"said\"";
        for (std::size_t at = event.find(said); at != std::string_view::npos; at = event.find(said, at + 1)) {
            const std::uint64_t id = std::stoull(value_of(event.substr(at), "id"));
            if (id <= memory.last) ++memory.repeated;
            memory.last = id;
            memory.texts.push_back(value_of(event.substr(at), "text"));
        }
        if ((type == "said" || type == "ack") && !tag.empty()) {
            auto& all = memory.unconfirmed;
            all.erase(std::remove(all.begin(), all.end(), std::stoi(tag.substr(1))), all.end());
        }
        if (type != "history") return;
        memory.epoch = value_of(event, "epoch");
        for (const int number : memory.unconfirmed) {
            const std::string text = std::to_string(number);
            write_message("/tag t" + text + " message " + text);
            memory.sent = (std::max)(memory.sent, number + 1);
        }
    }
    Returns& memory;
};

TEST_CASE("a client that connects again over fifty restarts sends and gets each message once") {
    const DatabaseFile temporary;
    Client client(test::poller_kind());
    Returns memory;
    int port = 0;
    constexpr int restarts = 50;
    for (int i = 0; i < restarts; ++i) {
        CAPTURE(i);
        ServerOptions options;
        options.handle_signals = false;
        options.poller = test::poller_kind();
        Server server(options);
        ChatHub::of(server).set_store(SqliteHistory(temporary.path));
        server.route<ChatHandler>("/chat/{room}");
        server.listen(port);
        memory.unconfirmed.push_back(i);
        if (port == 0) {
            port = server.port();
            ClientOptions with;
            with.reconnect.emplace();
            with.reconnect->min_delay = 1ms;
            with.reconnect->max_delay = 5ms;
            with.before_attempt = [&](ClientAttempt& attempt) {
                if (!memory.epoch.empty()) attempt.url += "&last=" + memory.epoch + "-" + std::to_string(memory.last);
            };
            client.connect<Returning>("ws://127.0.0.1:" + std::to_string(port) + "/chat/tea?name=Anna&key=anna-secret",
                                      with, std::ref(memory));
        }
        // The server ends when a message is acknowledged, or while it is on its way.
        const bool acknowledged = i % 3 == 0 || i == restarts - 1;
        REQUIRE(test::eventually([&] {
            server.poll(1ms);
            client.poll();
            return acknowledged ? memory.unconfirmed.empty() : memory.sent == i + 1;
        }));
        if (i % 2 == 0) continue;  // without a closing handshake
        server.shutdown(1s);
        while (server.poll(1ms)) client.poll();
    }
    CHECK(memory.repeated == 0);
    CHECK(memory.texts.size() == restarts);
    for (int i = 0; i < restarts; ++i)
        CHECK(std::count(memory.texts.begin(), memory.texts.end(), "message " + std::to_string(i)) == 1);
}

TEST_CASE("a server that is killed fifty times loses no acknowledged message and keeps none twice") {
    const DatabaseFile temporary;
    std::mt19937 random(5);
    std::map<std::string, std::uint64_t> acknowledged;  // by tag
    std::vector<std::string> pending;                   // sent, not acknowledged
    std::uint64_t last = 0;
    std::string epoch;
    int made = 0;
    for (int round = 0; round < 50; ++round) {
        KilledServer server(temporary.path);
        WsClient client(server.port, "/chat/tea?name=Anna&key=anna-secret" +
                                         (epoch.empty() ? "" : "&last=" + epoch + "-" + std::to_string(last)));
        const std::string history = next_with(client, "\"type\":\"history\"");
        REQUIRE(contains(history, "\"gap\":false"));
        last = std::stoull(test::field_of(history, "last"));
        epoch = test::field_of(history, "epoch");
        for (const std::string& tag : pending) client.send("/tag " + tag + " text-" + tag);
        for (int i = 0; i < 10; ++i) {
            pending.push_back("t" + std::to_string(++made));
            client.send("/tag " + pending.back() + " text-" + pending.back());
        }
        for (int left = static_cast<int>(random() % 12); left > 0 && !pending.empty(); --left) {
            const std::string event = next_with(client, "\"tag\"");
            const std::string tag = test::field_of(event, "tag");
            const std::uint64_t id = std::stoull(test::field_of(event, "id"));
            REQUIRE(id != 0);
            CHECK(acknowledged.emplace(tag, id).second);
            last = (std::max)(last, id);
            pending.erase(std::find(pending.begin(), pending.end(), tag));
        }
    }
    SqliteFile file(temporary.path, {});
    const HistoryPage page = file.since("tea", at(file, 0), 100'000);
    CHECK_FALSE(page.gap);
    std::map<std::string, std::uint64_t> kept;
    for (const ChatEntry& each : page.entries) {
        CHECK(kept.emplace(each.tag, each.id).second);
        CHECK(each.text == "text-" + each.tag);
    }
    CHECK(acknowledged.size() > 100);
    for (const auto& [tag, id] : acknowledged) CHECK(kept[tag] == id);
}

TEST_SUITE_END();

#endif
