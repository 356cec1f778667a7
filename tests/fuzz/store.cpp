// The history file of section 17 on a file system in memory whose calls fail, with memory that runs out, and openings
// again and again. What was stored must be there, once and in order, and nothing else.
//
// Input: a byte for the options, then steps. A step begins with a byte for its kind (see Script::step()); a byte selects
// the room, the author, the tag. In the end all faults stop, and the file must equal the model.
#define WSCHAT_CHAT 1
#define WSCHAT_SQLITE 1
#include "fuzz.hpp"

#include <map>

namespace {

using namespace fuzz;
using wschat::ChatEntry;
using wschat::ChatFact;
using wschat::HistoryPage;
using wschat::HistoryPosition;
using wschat::detail::SqliteFile;
using Kind = ChatEntry::Kind;

// ---- a file system -------------------------------------------------------------------------------------------------

struct Files {
    std::map<std::string, std::string> contents;
    std::map<std::string, std::vector<std::string>> shared;  // the regions that WAL maps
    std::size_t fail_after = 0;                              // the n-th call from now fails; 0: none
    std::size_t failures = 1;                                // so many calls then
    int error = SQLITE_IOERR;
    std::size_t temporary = 0;

    bool fails() {
        if (fail_after == 0 || --fail_after != 0) return false;
        if (--failures != 0) fail_after = 1;
        return true;
    }
};
Files files;

// Calls of SQLite that may fail. The file system itself has memory enough.
template <class Work>
int file_call(Work work) {
    const HarnessAllocations guard;
    return files.fails() ? files.error : work();
}

struct OpenFile {
    sqlite3_file base;
    std::string* name;
    bool temporary;
};
OpenFile& open_file(sqlite3_file* file) { return *reinterpret_cast<OpenFile*>(file); }
std::string& bytes_of(sqlite3_file* file) { return files.contents[*open_file(file).name]; }

int close_file(sqlite3_file* file) {
    const HarnessAllocations guard;
    if (open_file(file).temporary) files.contents.erase(*open_file(file).name);
    delete open_file(file).name;
    return SQLITE_OK;
}
int read_file(sqlite3_file* file, void* data, int size, sqlite3_int64 offset) {
    return file_call([&] {
        const std::string& bytes = bytes_of(file);
        const std::size_t at = (std::min)(static_cast<std::size_t>(offset), bytes.size());
        const std::size_t got = bytes.copy(static_cast<char*>(data), static_cast<std::size_t>(size), at);
        std::memset(static_cast<char*>(data) + got, 0, static_cast<std::size_t>(size) - got);
        return got == static_cast<std::size_t>(size) ? SQLITE_OK : SQLITE_IOERR_SHORT_READ;
    });
}
// A write that fails has written a half.
int write_file(sqlite3_file* file, const void* data, int size, sqlite3_int64 offset) {
    const HarnessAllocations guard;
    const bool failed = files.fails();
    const std::size_t n = static_cast<std::size_t>(size) / (failed ? 2 : 1), at = static_cast<std::size_t>(offset);
    std::string& bytes = bytes_of(file);
    if (bytes.size() < at + n) bytes.resize(at + n);
    if (n != 0) std::memcpy(&bytes[at], data, n);
    return failed ? files.error : SQLITE_OK;
}
int truncate_file(sqlite3_file* file, sqlite3_int64 size) {
    return file_call([&] { return bytes_of(file).resize(static_cast<std::size_t>(size)), SQLITE_OK; });
}
int sync_file(sqlite3_file*, int) {
    return file_call([] { return SQLITE_OK; });
}
int size_of_file(sqlite3_file* file, sqlite3_int64* size) {
    return file_call([&] { return *size = static_cast<sqlite3_int64>(bytes_of(file).size()), SQLITE_OK; });
}
// Each file has one user.
int lock_file(sqlite3_file*, int) {
    const HarnessAllocations guard;
    return files.fails() ? SQLITE_BUSY : SQLITE_OK;
}
int map_shared(sqlite3_file* file, int region, int size, int extend, void volatile** place) {
    return file_call([&] {
        std::vector<std::string>& regions = files.shared[*open_file(file).name];
        const auto index = static_cast<std::size_t>(region);
        *place = nullptr;
        if (index >= regions.size() && extend == 0) return SQLITE_OK;
        while (regions.size() <= index) regions.emplace_back(static_cast<std::size_t>(size), '\0');
        *place = regions[index].data();
        return SQLITE_OK;
    });
}
int unmap_shared(sqlite3_file* file, int) {
    const HarnessAllocations guard;
    files.shared.erase(*open_file(file).name);
    return SQLITE_OK;
}

const sqlite3_io_methods* methods() {
    static const sqlite3_io_methods table = [] {
        sqlite3_io_methods made{};
        made.iVersion = 2;
        made.xClose = &close_file;
        made.xRead = &read_file;
        made.xWrite = &write_file;
        made.xTruncate = &truncate_file;
        made.xSync = &sync_file;
        made.xFileSize = &size_of_file;
        made.xLock = &lock_file;
        made.xUnlock = [](sqlite3_file*, int) { return SQLITE_OK; };
        made.xCheckReservedLock = [](sqlite3_file*, int* held) { return *held = 0, SQLITE_OK; };
        made.xFileControl = [](sqlite3_file*, int, void*) { return SQLITE_NOTFOUND; };
        made.xSectorSize = [](sqlite3_file*) { return 512; };
        made.xDeviceCharacteristics = [](sqlite3_file*) { return 0; };
        made.xShmMap = &map_shared;
        made.xShmLock = [](sqlite3_file* file, int, int, int flags) {
            return (flags & SQLITE_SHM_LOCK) != 0 ? lock_file(file, 0) : SQLITE_OK;
        };
        made.xShmBarrier = [](sqlite3_file*) {};
        made.xShmUnmap = &unmap_shared;
        return made;
    }();
    return &table;
}

int open_in_memory(sqlite3_vfs*, sqlite3_filename name, sqlite3_file* file, int flags, int* out_flags) {
    file->pMethods = nullptr;
    return file_call([&] {
        OpenFile& opened = open_file(file);
        const std::string path = name != nullptr ? name : "temporary " + std::to_string(++files.temporary);
        if ((flags & SQLITE_OPEN_CREATE) == 0 && files.contents.count(path) == 0) return SQLITE_CANTOPEN;
        files.contents[path];
        opened.name = new std::string(path);
        opened.temporary = (flags & SQLITE_OPEN_DELETEONCLOSE) != 0;
        opened.base.pMethods = methods();
        if (out_flags != nullptr) *out_flags = flags;
        return SQLITE_OK;
    });
}

void start_sqlite() {
    static const bool started = [] {
        static const sqlite3_mem_methods memory{
            [](int size) -> void* {
                if (heap.fail_after != 0 && --heap.fail_after == 0) return nullptr;
                return std::malloc(static_cast<std::size_t>(size));
            },
            [](void* block) { std::free(block); },
            [](void* block, int size) -> void* {
                if (heap.fail_after != 0 && --heap.fail_after == 0) return nullptr;
                return std::realloc(block, static_cast<std::size_t>(size));
            },
            [](void* block) { return static_cast<int>(::malloc_usable_size(block)); },
            [](int size) { return (size + 7) / 8 * 8; },
            [](void*) { return SQLITE_OK; },
            [](void*) {},
            nullptr};
        static sqlite3_vfs vfs = [] {
            sqlite3_vfs made{};
            made.iVersion = 2;
            made.szOsFile = sizeof(OpenFile);
            made.mxPathname = 200;
            made.zName = "memory";
            made.xOpen = &open_in_memory;
            made.xDelete = [](sqlite3_vfs*, const char* name, int) {
                return file_call(
                    [&] { return files.contents.erase(name) != 0 ? SQLITE_OK : SQLITE_IOERR_DELETE_NOENT; });
            };
            made.xAccess = [](sqlite3_vfs*, const char* name, int, int* exists) {
                return file_call([&] { return *exists = files.contents.count(name) != 0 ? 1 : 0, SQLITE_OK; });
            };
            made.xFullPathname = [](sqlite3_vfs*, const char* name, int size, char* full) {
                return std::snprintf(full, static_cast<std::size_t>(size), "%s", name), SQLITE_OK;
            };
            made.xRandomness = [](sqlite3_vfs*, int size, char* bytes) {
                static Random random(1);
                for (int i = 0; i < size; ++i) bytes[i] = static_cast<char>(random.below(256));
                return size;
            };
            made.xSleep = [](sqlite3_vfs*, int microseconds) { return microseconds; };
            made.xCurrentTime = [](sqlite3_vfs*, double* days) { return *days = 2461374.0, SQLITE_OK; };
            made.xGetLastError = [](sqlite3_vfs*, int, char*) { return 0; };
            made.xCurrentTimeInt64 = [](sqlite3_vfs*, sqlite3_int64* ms) {
                return *ms = sqlite3_int64{2461374} * 86'400'000, SQLITE_OK;
            };
            return made;
        }();
        return ::sqlite3_config(SQLITE_CONFIG_MALLOC, &memory) == SQLITE_OK &&
               ::sqlite3_config(SQLITE_CONFIG_MEMSTATUS, 0) == SQLITE_OK &&
               ::sqlite3_config(SQLITE_CONFIG_LOOKASIDE, 0, 0) == SQLITE_OK && ::sqlite3_initialize() == SQLITE_OK &&
               ::sqlite3_vfs_register(&vfs, 1) == SQLITE_OK;
    }();
    check(started, "SQLite cannot be prepared");
}

// ---- the model -----------------------------------------------------------------------------------------------------

struct Model {
    std::map<std::string, std::vector<ChatEntry>> rooms;
    std::map<std::string, ChatFact> facts;  // by scope and key
    std::vector<std::pair<std::string, HistoryPosition>> positions;

    const ChatEntry* tagged(const ChatEntry& entry) const {
        const auto room = rooms.find(entry.room);
        if (room == rooms.end() || entry.tag.empty()) return nullptr;
        for (const ChatEntry& each : room->second)
            if (each.author == entry.author && each.tag == entry.tag) return &each;
        return nullptr;
    }
    void apply(const ChatEntry& entry) {
        std::vector<ChatEntry>& room = rooms[entry.room];
        check(entry.id == (room.empty() ? 0 : room.back().id) + 1, "an id is not the next one");
        const bool edit = entry.kind == Kind::edit, removal = entry.kind == Kind::remove;
        for (ChatEntry& each : room)
            if ((edit || removal) && each.id == entry.target) {
                each.text = edit ? entry.text : "";
                each.removed = removal;
            }
        room.push_back(entry);
    }
};

// ---- the script ----------------------------------------------------------------------------------------------------

constexpr const char* words[] = {"tea", "milk", "sugar", "a \"quoted\" word", "\xc3\xa9", "NEAR(", "", "tea milk"};
constexpr const char* rooms[] = {"lobby", "tea", "a'b"};
constexpr const char* authors[] = {"anna", "bert", "cleo"};

class Script {
public:
    explicit Script(InputReader& input) : input_(input) {}
    ~Script() {
        stop_faults();
        file_.reset();
    }
    Script(const Script&) = delete;
    Script& operator=(const Script&) = delete;

    void run() {
        open();
        for (int steps = 0; !input_.empty() && steps < 200; ++steps) step();
        stop_faults();
        if (!file_) open();
        check(file_ != nullptr, "the file cannot be opened although nothing fails", last_error_);
        check_all();
        open();
        check(file_ != nullptr, "the file cannot be opened again", last_error_);
        check_all();
    }

private:
    void step() {
        const unsigned kind = input_.byte() % 12;
        if (kind == 10) return fail_calls();
        if (kind == 11) {
            fail_memory_ = 1 + input_.byte();
            return;
        }
        if (!file_ || kind == 9) return open();
        switch (kind) {
            case 0:
            case 1: append(1); break;
            case 2: append(1 + input_.byte() % 4); break;
            case 3: since(); break;
            case 4: before(); break;
            case 5: search(); break;
            case 6: put(); break;
            case 7: attempt([&] { check_facts(); }); break;
            case 8: attempt([&] { file_->sweep(); }); break;
        }
    }
    void stop_faults() { files.fail_after = fail_memory_ = 0; }
    void fail_calls() {
        // What file systems answer. SQLite takes only these for failures of the file.
        constexpr int errors[] = {SQLITE_IOERR,      SQLITE_FULL,        SQLITE_IOERR_WRITE,
                                  SQLITE_IOERR_READ, SQLITE_IOERR_FSYNC, SQLITE_IOERR_NOMEM};
        const unsigned choice = input_.byte();
        files.fail_after = 1 + input_.byte();
        files.failures = choice / 8 % 4 == 3 ? 20 : 1 + choice / 8 % 4;
        files.error = errors[choice % 6];
    }
    // False if the call has failed, which needs a fault. Only within it memory runs out.
    template <class Work>
    bool attempt(Work work) {
        const bool faulty = files.fail_after != 0 || fail_memory_ != 0;
        bool done = true;
        heap.fail_after = fail_memory_;
        try {
            work();
        } catch (const wschat::Error& error) {
            const HarnessAllocations guard;
            last_error_ = error.what();
            done = false;
        } catch (const std::bad_alloc&) {
            const HarnessAllocations guard;
            last_error_ = "bad_alloc";
            done = false;
        }
        fail_memory_ = std::exchange(heap.fail_after, 0u);
        check(done || faulty, "a call fails although nothing is wrong", last_error_);
        return done;
    }
    void open() {
        file_.reset();
        attempt([&] {
            wschat::SqliteOptions options;
            options.lock_timeout = options.busy_timeout = Duration::zero();
            file_ = std::make_unique<SqliteFile>("chat.db", options);
        });
    }

    ChatEntry entry() {
        const HarnessAllocations guard;
        const unsigned choice = input_.byte(), more = input_.byte();
        ChatEntry made;
        made.room = rooms[choice % 3];
        made.author = made.name = authors[choice / 3 % 3];
        made.kind = static_cast<Kind>(more % 8 < 4 ? more % 2 : more % 8 - 3);
        made.text = words[choice / 9 % 8];
        made.time = 1000;
        if (more / 8 % 4 != 0) made.tag = "t" + std::to_string(more / 8 % 4);
        if (more >= 192) made.text += std::string(more * std::size_t{40}, 'x');
        if (made.is_amendment()) {
            made.target = 1 + input_.byte() % 16;
            made.moderator = choice >= 128;
        }
        return made;
    }
    void append(unsigned count) {
        std::vector<ChatEntry> entries;
        for (unsigned i = 0; i < count; ++i) entries.push_back(entry());
        std::vector<std::string_view> results;
        if (!attempt([&] { results = file_->append(entries); })) return;
        const HarnessAllocations guard;
        check(results.size() == entries.size(), "an entry has no result");
        for (std::size_t i = 0; i < results.size(); ++i) {
            const ChatEntry* const first = model_.tagged(entries[i]);
            check((results[i] == "duplicate") == (first != nullptr), "a duplicate is not found, or is none");
            if (first != nullptr) check(entries[i].id == first->id, "a duplicate has another id");
            if (results[i].empty()) model_.apply(entries[i]);
        }
        for (const ChatEntry& each : entries)
            if (!model_.rooms[each.room].empty())
                model_.positions.push_back({each.room, {file_->epoch(), model_.rooms[each.room].back().id}});
    }
    void since() {
        const unsigned choice = input_.byte();
        std::string room = rooms[choice % 3];
        std::optional<HistoryPosition> position;
        if (choice >= 60 && !model_.positions.empty())
            std::tie(room, position) = model_.positions[choice % model_.positions.size()];
        const std::size_t limit = choice % 2 == 0 ? 1000 : 3;
        HistoryPage page;
        if (!attempt([&] { page = file_->since(room, position, limit); })) return;
        const HarnessAllocations guard;
        check_page(page, room, limit);
        check(page.epoch == file_->epoch(), "a page has another epoch");
        if (!position || page.gap) {
            const std::uint64_t behind = position ? page.last_id - position->id : 0;
            check(!position || behind > limit, "a page has a gap although nothing is missing");
            return;
        }
        check(page.entries.size() == page.last_id - position->id, "entries after a position are missing");
        for (std::size_t i = 0; i < page.entries.size(); ++i)
            check(page.entries[i].id == position->id + 1 + i, "entries after a position have holes");
    }
    void before() {
        const std::string room = rooms[input_.byte() % 3];
        const std::uint64_t id = input_.byte() % 20;
        HistoryPage page;
        if (!attempt([&] { page = file_->before(room, id, 5); })) return;
        const HarnessAllocations guard;
        check_page(page, room, 5);
        for (const ChatEntry& each : page.entries) check(each.id < id, "an entry is not before the id");
    }
    void search() {
        const unsigned choice = input_.byte();
        const std::string room = rooms[choice % 3], word = words[choice / 3 % 8];
        HistoryPage page;
        if (!attempt([&] { page = file_->search(room, word, 1000); })) return;
        const HarnessAllocations guard;
        check_page(page, room, 1000);
        if (word != "tea") return;
        std::size_t expected = 0;
        for (const ChatEntry& each : model_.rooms[room])
            expected += each.is_message() && !each.removed && each.text.substr(0, 3) == "tea" ? 1u : 0u;
        check(page.entries.size() == expected, "a search does not find each message");
    }
    void put() {
        const unsigned choice = input_.byte();
        const ChatFact fact = [&] {
            const HarnessAllocations guard;
            return ChatFact{choice % 2 == 0 ? "ban" : "mute",
                            authors[choice / 2 % 3],
                            words[choice / 6 % 8],
                            authors[choice / 48 % 3],
                            0,
                            choice >= 144};
        }();
        const std::string key = fact.scope + " " + fact.key;
        ChatFact kept;
        if (!attempt([&] { kept = file_->put(fact); })) return;
        const HarnessAllocations guard;
        const auto old = model_.facts.find(key);
        if (fact.if_new && old != model_.facts.end())
            return check(kept.value == old->second.value, "a fact has replaced an older one");
        if (fact.value.empty()) model_.facts.erase(key);
        else model_.facts[key] = fact;
    }

    void check_facts() const {
        for (const char* scope : {"ban", "mute"}) {
            const std::vector<ChatFact> found = file_->facts(scope, "");
            const HarnessAllocations guard;
            std::size_t expected = 0;
            for (const auto& [key, fact] : model_.facts) expected += fact.scope == scope ? 1u : 0u;
            check(found.size() == expected, "a fact is missing, or there is one too many");
            for (const ChatFact& each : found)
                check(each.value == model_.facts.at(each.scope + " " + each.key).value, "a fact has another value");
        }
    }
    // Each entry of the page is in the model.
    void check_page(const HistoryPage& page, const std::string& room, std::size_t limit) {
        const std::vector<ChatEntry>& entries = model_.rooms[room];
        check(page.entries.size() <= limit, "a page has too many entries");
        check(page.last_id == (entries.empty() ? 0 : entries.back().id), "the newest id of a room is wrong");
        for (const ChatEntry& each : page.entries) {
            check(each.id != 0 && each.id <= entries.size(), "an entry was never stored");
            const ChatEntry& expected = entries[static_cast<std::size_t>(each.id - 1)];
            check(each.author == expected.author && each.tag == expected.tag, "an entry has another author or tag");
            if (!expected.is_message()) continue;
            check(each.kind == expected.kind && each.removed == expected.removed, "a message has another state");
            check_equal(each.text, expected.text, "a message has another text");
        }
    }
    void check_all() {
        for (const char* room : rooms) {
            const std::vector<ChatEntry> stored = file_->entries_after(room, 0, 100'000);
            check(stored.size() == model_.rooms[room].size(), "an entry is missing, or there is one too many");
            HistoryPage page;
            page.entries = stored;
            page.last_id = stored.empty() ? 0 : stored.back().id;
            check_page(page, room, 100'000);
        }
        check_facts();
    }

    InputReader& input_;
    Model model_;
    std::unique_ptr<SqliteFile> file_;
    std::size_t fail_memory_ = 0;  // heap.fail_after of the next call
    std::string last_error_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    start_sqlite();
    files = {};
    InputReader input(data, size);
    Script(input).run();
    return 0;
}
