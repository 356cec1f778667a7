// section 17: a history in a file, broken and locked files, and a server that is killed.
#define WSCHAT_CHAT 1
#include "support.hpp"

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
using test::Client;
using test::contains;
using test::next_with;
using test::RunningServer;

// The path of a database, which is deleted at the end of the scope.
struct DatabaseFile {
    DatabaseFile() {
        static int count = 0;
        path = "/tmp/wschat-" + std::to_string(::getpid()) + "-" + std::to_string(++count) + ".db";
        remove();
    }
    ~DatabaseFile() { remove(); }
    void remove() {
        for (const char* more : {"", "-wal", "-shm"}) ::unlink((path + more).c_str());
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

// A database whose ids start at 1.
struct FileFromOne : DatabaseFile {
    FileFromOne() {
        { SqliteFile file(path, {}); }
        OtherProgram(path).execute("UPDATE start SET id = 0");
    }
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

TEST_CASE("a file keeps messages under ascending ids per room, also after a restart") {
    const FileFromOne temporary;
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
    const FileFromOne temporary;
    SqliteOptions options;
    options.max_entries = 5;
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
        const HistoryPage page = file.since("tea", row.id, row.limit);
        CHECK(summary_of(page) == row.answer);
        CHECK(page.last_id == 7);
    }
    CHECK(summary_of(file.since("coffee", std::nullopt, 50)) == "");
    CHECK(summary_of(file.since("coffee", 0, 50)) == "");
    CHECK(summary_of(file.since("coffee", 3, 50)) == "gap");
}

TEST_CASE("an id of a deleted file is a gap, and the first id of an empty room is none") {
    DatabaseFile temporary;
    std::uint64_t before = 0;
    {
        SqliteFile file(temporary.path, {});
        for (const char* text : {"a", "b", "c"}) before = append(file, entry(text));
    }
    temporary.remove();
    SqliteFile file(temporary.path, {});
    const std::uint64_t empty = file.since("tea", std::nullopt, 50).last_id;
    append(file, entry("d"));
    append(file, entry("e"));
    CHECK(file.since("tea", before, 50).gap);
    CHECK(file.since("tea", before, 50).entries.size() == 2);
    CHECK_FALSE(file.since("tea", empty, 50).gap);
    CHECK(file.since("tea", empty, 50).entries.size() == 2);
}

TEST_CASE("a second message with the same tag is not kept, in one transaction and after a restart") {
    const FileFromOne temporary;
    for (int run = 0; run < 2; ++run) {
        SqliteFile file(temporary.path, {});
        std::vector<ChatEntry> entries = {entry("a", "t"), entry("a", "t"), entry("b"), entry("b")};
        ChatEntry other = entry("c", "t");
        other.author = "key b";
        entries.push_back(other);
        const std::vector<bool> duplicates = file.append(entries);
        CHECK(duplicates == (run == 0 ? std::vector<bool>{false, true, false, false, false}
                                      : std::vector<bool>{true, true, false, false, true}));
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
        {newer.path, "it is of version 9, and this program knows 3"},
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
    const FileFromOne temporary;
    SqliteOptions options;
    options.max_file_bytes = 64 * 1024;
    SqliteFile file(temporary.path, options);
    append(file, entry("a"));
    std::vector<ChatEntry> entries = {entry("b"), entry(std::string(200'000, 'x'))};
    CHECK_THROWS_WITH_AS(file.append(entries),
                         ("SqliteHistory \"" + temporary.path + "\": database or disk is full (13)").c_str(), Error);
    CHECK(summary_of(file.since("tea", std::nullopt, 50)) == "1a ");
    CHECK(append(file, entry("c")) == 2);
}

TEST_CASE("a page stops after a mebibyte of text and reports a gap") {
    const FileFromOne temporary;
    SqliteFile file(temporary.path, {});
    for (int i = 0; i < 100; ++i) append(file, entry(std::string(16 * 1024, 'x')));
    const HistoryPage page = file.since("tea", 1, 500);
    CHECK(page.gap);
    CHECK(page.entries.size() == 65);
    CHECK(page.entries.back().id == page.last_id);
    CHECK_FALSE(file.since("tea", page.entries.front().id, 500).gap);
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
    FileFromOne temporary;
    {
        SqliteFile file(temporary.path, {});
        for (int i = 0; i < 300; ++i) append(file, entry(std::string(500, 'x')));
    }
    temporary.write(std::string(100'000, 'z'), 20'000);
    SqliteFile file(temporary.path, {});
    CHECK_THROWS_AS(file.since("tea", std::nullopt, 300), Error);
    CHECK_THROWS_AS(file.since("tea", std::nullopt, 300), Error);
}

TEST_CASE("a message is acknowledged after the commit, and a client can resume after a restart") {
    const FileFromOne temporary;
    std::string last;
    {
        Chat chat(temporary.path);
        Client anna(chat.port(), "/chat/tea?name=Anna"), bert(chat.port(), "/chat/tea?name=Bert");
        next_with(anna, "\"type\":\"history\"");
        next_with(bert, "\"type\":\"history\"");
        anna.send("/tag t1 hello");
        CHECK(contains(next_with(anna, "\"said\""), "\"id\":1,\"name\":\"Anna\",\"text\":\"hello\""));
        CHECK(contains(next_with(bert, "\"said\""), "\"id\":1"));
        bert.send("hello, Anna");
        CHECK(contains(next_with(anna, "\"said\""), "\"id\":2"));
        bert.send("are you there?");
        next_with(bert, "are you there?");
    }
    Chat chat(temporary.path);
    Client anna(chat.port(), "/chat/tea?name=Anna&last=1");
    const std::string history = next_with(anna, "\"type\":\"history\"");
    CHECK(contains(history, "\"gap\":false,\"last\":3"));
    CHECK_FALSE(contains(history, "\"text\":\"hello\""));
    CHECK(history.find("hello, Anna") < history.find("are you there?"));
    anna.send("/tag t1 hello");
    CHECK(next_with(anna, "\"t1\"") == "{\"type\":\"ack\",\"room\":\"tea\",\"tag\":\"t1\",\"id\":1}");
}

TEST_CASE("a full file is an error for the sender and a log entry, and the chat continues") {
    const FileFromOne temporary;
    SqliteOptions options;
    options.max_file_bytes = 64 * 1024;
    Chat chat(temporary.path, options);
    Client anna(chat.port(), "/chat/tea?name=Anna"), bert(chat.port(), "/chat/tea?name=Bert");
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
    const FileFromOne temporary;
    SqliteOptions options;
    options.busy_timeout = 2s;
    Chat chat(temporary.path, options);
    Client anna(chat.port(), "/chat/tea?name=Anna");
    next_with(anna, "\"entries\"");  // after it only the join of Bert arrives
    Client bert(chat.port(), "/chat/tea?name=Bert");
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
    const FileFromOne temporary;
    SqliteOptions options;
    options.max_queued = 5;
    options.busy_timeout = 10s;
    Chat chat(temporary.path, options);
    Client anna(chat.port(), "/chat/tea?name=Anna");
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
                        file.since("tea", 0, 50);
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
            for (const ChatEntry& each : again.since("tea", 0, 50).entries) CHECK(found.insert(each.tag).second);
            for (const std::string& tag : kept) CHECK(found.count(tag) == 1);
            append(again, entry("again", "again"));
        } while (files.faults != 0 && n < 300);
        CHECK(n < 300);
        if (operation != Operation::truncate) CHECK(n > 1);
    }
}

// ---- kill -9 -------------------------------------------------------------------------------------------------------

namespace {

// A server with a database in a process of its own, which the destructor kills.
class KilledServer {
public:
    explicit KilledServer(const std::string& path) {
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
    static void serve(const std::string& path, int ports) {
        ServerOptions options;
        options.handle_signals = false;
        Server server(options);
        ChatHub::of(server).set_store(SqliteHistory(path));
        ChatHub::of(server).limits.connection = ChatHub::of(server).limits.address = FloodRates();
        server.route<ChatHandler>("/chat/{room}");
        server.listen(0);
        const int own = server.port();
        if (::write(ports, &own, sizeof own) == sizeof own) server.run();
    }
    pid_t pid_ = -1;
};

}  // namespace

TEST_CASE("a server that is killed fifty times loses no acknowledged message and keeps none twice") {
    const FileFromOne temporary;
    std::mt19937 random(5);
    std::map<std::string, std::uint64_t> acknowledged;  // by tag
    std::vector<std::string> pending;                   // sent, not acknowledged
    std::uint64_t last = 0;
    int made = 0;
    for (int round = 0; round < 50; ++round) {
        KilledServer server(temporary.path);
        Client client(server.port, "/chat/tea?name=Anna&key=anna-secret&last=" + std::to_string(last));
        const std::string history = next_with(client, "\"type\":\"history\"");
        REQUIRE(contains(history, "\"gap\":false"));
        last = std::stoull(test::field_of(history, "last"));
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
    const HistoryPage page = file.since("tea", 0, 100'000);
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
