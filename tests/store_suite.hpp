// What every ChatStore must do. A suite calls test_store() with a function that makes a store.
#pragma once

#include "support.hpp"

namespace test {

// A store with a loop, which records what the store says. Calls wait for their answers.
class StoreFixture final : private wschat::ChatStore::Listener {
public:
    explicit StoreFixture(std::unique_ptr<wschat::ChatStore> made) : store_(std::move(made)) {
        store_->attach(*this, loop_.mailbox());
    }
    wschat::ChatStore& store() { return *store_; }

    // Returns the id, or the code of what went wrong.
    std::string append(wschat::ChatEntry entry) {
        result_.reset();
        store_->append(std::move(entry));
        return wait(result_);
    }
    std::string say(const std::string& text, const std::string& author = "anna", const std::string& tag = "") {
        return append(entry(wschat::ChatEntry::Kind::said, text, author, tag));
    }
    std::string amend(wschat::ChatEntry::Kind kind, std::uint64_t target, const std::string& text,
                      const std::string& author = "anna", const std::string& tag = "") {
        wschat::ChatEntry made = entry(kind, text, author, tag);
        made.target = target;
        return append(std::move(made));
    }
    static wschat::ChatEntry entry(wschat::ChatEntry::Kind kind, const std::string& text,
                                   const std::string& author = "anna", const std::string& tag = "") {
        wschat::ChatEntry made;
        made.kind = kind;
        made.room = "tea";
        made.time = 1'000'000;
        made.name = "name of " + author;
        made.user = "user of " + author;
        made.text = text;
        made.author = author;
        made.tag = tag;
        return made;
    }

    wschat::HistoryPage since(std::optional<wschat::HistoryPosition> position = {}, std::size_t limit = 100,
                              const std::string& room = "tea") {
        return page([&](auto then) { store_->since(room, position, limit, then); });
    }
    // After an id of the present opening.
    wschat::HistoryPage after(std::uint64_t id, std::size_t limit = 100) {
        return since(wschat::HistoryPosition{since({}, 0).epoch, id}, limit);
    }
    wschat::HistoryPage before(std::uint64_t id, std::size_t limit) {
        return page([&](auto then) { store_->before("tea", id, limit, then); });
    }
    wschat::HistoryPage search(const std::string& words, std::size_t limit = 100, const std::string& room = "tea") {
        return page([&](auto then) { store_->search(room, words, limit, then); });
    }
    std::string put(const wschat::ChatFact& fact) {
        result_.reset();
        store_->put(fact);
        return wait(result_);
    }
    // "a=1 b=2"
    std::string facts(const std::string& scope, const std::string& prefix = "") {
        std::optional<std::string> all;
        store_->facts(scope, prefix, [&](const std::vector<wschat::ChatFact>& found, const std::string& error) {
            all = error;
            for (const auto& fact : found) *all += (all->empty() ? "" : " ") + fact.key + "=" + fact.value;
        });
        return wait(all);
    }
    std::size_t erase(const std::string& author) {
        std::optional<std::size_t> erased;
        store_->erase_author(author, [&](std::size_t count, const std::string& error) {
            CHECK(error == "");
            erased = count;
        });
        return wait(erased);
    }
    // The lines of all parts; the export ends after `max_parts`.
    std::string export_room(int max_parts = 1000, std::uint64_t after = 0) {
        std::string lines;
        std::optional<bool> ended;
        int parts = 0;
        const auto take = [&](const wschat::HistoryExport& part) {
            CHECK(part.error == "");
            CHECK(std::count(part.lines.begin(), part.lines.end(), '\n') <= 500);
            lines += part.lines;
            exported = part.last;
            if (part.end || ++parts == max_parts) ended = true;
            return !ended;
        };
        store_->export_room("tea", take, after);
        wait(ended);
        return lines;
    }

    std::vector<wschat::ChatEntry> delivered;
    std::string told;            // facts
    std::uint64_t exported = 0;  // HistoryExport::last of the newest part

private:
    void on_entry(const wschat::ChatEntry& entry) override {
        delivered.push_back(entry);
        result_ = std::to_string(entry.id);
    }
    void on_duplicate(const wschat::ChatEntry& entry) override { result_ = "duplicate " + std::to_string(entry.id); }
    void on_failure(const wschat::ChatEntry&, const std::string& cause) override { result_ = cause; }
    void on_refused(const wschat::ChatEntry&, std::string_view code) override { result_ = std::string(code); }
    void on_fact(const wschat::ChatFact& fact) override {
        result_ = fact.key;
        told += fact.key + "=" + fact.value + ";";
    }
    void on_fact_failure(const wschat::ChatFact&, const std::string& cause) override { result_ = cause; }

    template <class Value>
    Value wait(std::optional<Value>& value) {
        const auto until = wschat::Clock::now() + deadline;
        while (!value && wschat::Clock::now() < until) loop_.poll(10ms);
        REQUIRE(value.has_value());
        return *value;
    }
    template <class Call>
    wschat::HistoryPage page(Call&& call) {
        std::optional<wschat::HistoryPage> result;
        call([&](const wschat::HistoryPage& found) { result = found; });
        wait(result);
        CHECK(result->error == "");
        CHECK(result->epoch.size() == wschat::HistoryPosition::epoch_size);
        return *result;
    }

    wschat::Loop loop_;
    std::unique_ptr<wschat::ChatStore> store_;
    std::optional<std::string> result_;
};

// "1:one 2:two* 3/1:edit", with "gap" and "more" at the end. A star: edited or taken back; a minus: removed.
inline std::string summary(const wschat::HistoryPage& page) {
    std::string all;
    for (const wschat::ChatEntry& each : page.entries) {
        all += std::to_string(each.id);
        if (each.target != 0) all += "/" + std::to_string(each.target);
        all += (each.kind == wschat::ChatEntry::Kind::remove ? ":removed" : ":" + each.text);
        if (each.edited != 0) all += "*";
        if (each.removed) all += "-";
        all += " ";
    }
    return all + (page.gap ? "gap" : "") + (page.more ? "more" : "");
}

// "+1 anna bert, -1 carl" of a message.
inline std::string reactions_of(const wschat::ChatEntry& entry) {
    std::string all;
    for (const auto& each : entry.reactions) all += each.emoji + " " + each.author + ",";
    return all;
}

using StoreFactory = std::function<std::unique_ptr<wschat::ChatStore>(const wschat::HistoryLimits&)>;

inline void test_pages(const StoreFactory& make) {
    StoreFixture fixture(make({}));
    CHECK(summary(fixture.since()) == "");
    CHECK(summary(fixture.after(0)) == "");
    for (const char* text : {"a", "b", "c", "d", "e"}) fixture.say(text);
    fixture.append(StoreFixture::entry(wschat::ChatEntry::Kind::topic, "topic"));
    CHECK(summary(fixture.since()) == "1:a 2:b 3:c 4:d 5:e 6:topic ");
    CHECK(summary(fixture.since({}, 2)) == "5:e 6:topic more");
    CHECK(summary(fixture.after(4)) == "5:e 6:topic more");
    CHECK(summary(fixture.after(6)) == "more");
    CHECK(summary(fixture.after(4, 1)) == "6:topic gapmore");
    CHECK(summary(fixture.after(0)) == "1:a 2:b 3:c 4:d 5:e 6:topic ");
    CHECK(summary(fixture.after(7)) == "1:a 2:b 3:c 4:d 5:e 6:topic gap");
    CHECK(summary(fixture.since(wschat::HistoryPosition{"0123456789abcdef", 6}, 1)) == "6:topic gapmore");
    CHECK(summary(fixture.since(wschat::HistoryPosition{"", 6}, 1)) == "6:topic gapmore");
    CHECK(summary(fixture.before(3, 10)) == "1:a 2:b ");
    CHECK(summary(fixture.before(5, 2)) == "3:c 4:d more");
    CHECK(summary(fixture.before(1, 2)) == "");
    CHECK(summary(fixture.before(wschat::HistoryPosition::max_id, 1)) == "6:topic more");
    CHECK(fixture.since().last_id == 6);
    CHECK(summary(fixture.since({}, 100, "coffee")) == "");
}

inline void test_amendments(const StoreFactory& make) {
    using Kind = wschat::ChatEntry::Kind;
    StoreFixture fixture(make({}));
    fixture.say("helo");
    fixture.say("from bert", "bert");
    CHECK(fixture.amend(Kind::edit, 1, "hell", "anna", "t1") == "3");
    CHECK(fixture.amend(Kind::edit, 1, "hell", "anna", "t1") == "duplicate 3");
    CHECK(fixture.amend(Kind::edit, 1, "hello") == "4");
    CHECK(fixture.amend(Kind::edit, 2, "mine") == "not_yours");
    CHECK(fixture.amend(Kind::remove, 2, "") == "not_yours");
    CHECK(fixture.amend(Kind::edit, 99, "x") == "bad_id");
    CHECK(fixture.amend(Kind::edit, 3, "x") == "bad_id");  // it is an amendment itself
    CHECK(fixture.amend(Kind::edit, 0, "x") == "bad_id");
    wschat::ChatEntry late = StoreFixture::entry(Kind::edit, "late");
    late.target = 1;
    late.not_before = 1'000'001;
    CHECK(fixture.append(late) == "too_late");
    CHECK(summary(fixture.since()) == "1:hello* 2:from bert ");
    CHECK(summary(fixture.after(2)) == "3/1:hello 4/1:hello more");  // no older text is kept
    CHECK(fixture.since().entries[0].edited == 1'000'000);
    CHECK(fixture.since().last_id == 4);
    CHECK(summary(fixture.search("helo")) == "");
    CHECK(summary(fixture.search("hello")) == "1:hello* ");

    CHECK(fixture.amend(Kind::remove, 1, "") == "5");
    CHECK(fixture.amend(Kind::remove, 1, "") == "bad_id");
    CHECK(fixture.amend(Kind::edit, 1, "again") == "bad_id");
    CHECK(fixture.amend(Kind::react, 1, "+1") == "bad_id");
    CHECK(summary(fixture.since()) == "1:*- 2:from bert ");
    CHECK(summary(fixture.after(2)) == "3/1:removed 4/1:removed 5/1:removed more");
    CHECK(summary(fixture.search("hello")) == "");
    wschat::ChatEntry moderated = StoreFixture::entry(Kind::remove, "");
    moderated.target = 2;
    moderated.moderator = true;
    CHECK(fixture.append(moderated) == "6");
    CHECK(summary(fixture.since()) == "1:*- 2:- ");
}

inline void test_mentions(const StoreFactory& make) {
    using Kind = wschat::ChatEntry::Kind;
    StoreFixture fixture(make({}));
    const auto append = [&](Kind kind, const std::string& mentions) {
        wschat::ChatEntry made = StoreFixture::entry(kind, "text");
        made.mentions = mentions;
        made.target = kind == Kind::said ? 0 : 1;
        return fixture.append(made);
    };
    const auto mentions = [&] { return fixture.since().entries.at(0).mentions; };
    append(Kind::said, "one two");
    CHECK(fixture.delivered.back().mentions == "one two");
    fixture.amend(Kind::react, 1, "+1", "bert");
    CHECK(mentions() == "one two");
    CHECK(append(Kind::edit, "three") == "3");
    CHECK(append(Kind::edit, "four") == "4");
    CHECK(mentions() == "four");
    CHECK(reactions_of(fixture.since().entries.at(0)) == "+1 bert,");
    for (const wschat::ChatEntry& edit : fixture.after(2).entries) CHECK(edit.mentions == "four");
    fixture.amend(Kind::remove, 1, "");
    CHECK(mentions() == "");
    for (const wschat::ChatEntry& edit : fixture.after(2).entries) CHECK(edit.mentions == "");
}

inline void test_reactions(const StoreFactory& make) {
    using Kind = wschat::ChatEntry::Kind;
    wschat::HistoryLimits limits;
    limits.max_reactions = 3;
    StoreFixture fixture(make(limits));
    fixture.say("hello");
    CHECK(fixture.amend(Kind::react, 1, "+1") == "2");
    CHECK_FALSE(fixture.delivered.back().removed);
    CHECK(fixture.amend(Kind::react, 1, "+1", "bert") == "3");
    CHECK(fixture.amend(Kind::react, 1, "-1", "bert", "t1") == "4");
    CHECK(fixture.amend(Kind::react, 1, "-1", "bert", "t1") == "duplicate 4");  // it is not taken back
    CHECK(fixture.amend(Kind::react, 1, "?", "carl") == "refused");
    CHECK(reactions_of(fixture.since().entries[0]) == "+1 anna,+1 bert,-1 bert,");
    CHECK(fixture.since().entries[0].reactions[1].user == "user of bert");
    CHECK(fixture.since().entries[0].reactions[1].name == "name of bert");
    CHECK(fixture.amend(Kind::react, 1, "+1") == "5");
    CHECK(fixture.delivered.back().removed);
    CHECK(reactions_of(fixture.since().entries[0]) == "+1 bert,-1 bert,");
    CHECK(summary(fixture.after(1)) == "2/1:+1 3/1:+1 4/1:-1 5/1:+1- more");
    fixture.amend(Kind::remove, 1, "");
    CHECK(reactions_of(fixture.since().entries[0]) == "");
}

inline void test_search(const StoreFactory& make) {
    StoreFixture fixture(make({}));
    for (const char* text : {"green tea", "BLACK Tea please", "te\"a 100%", "coffee"}) fixture.say(text);
    wschat::ChatEntry other = StoreFixture::entry(wschat::ChatEntry::Kind::said, "tea elsewhere");
    other.room = "kitchen";
    fixture.append(other);
    CHECK(summary(fixture.search("tea")) == "1:green tea 2:BLACK Tea please ");
    CHECK(summary(fixture.search("TEA gree")) == "1:green tea ");
    CHECK(summary(fixture.search("tea", 1)) == "2:BLACK Tea please more");
    CHECK(summary(fixture.search("tea coffee")) == "");
    CHECK(summary(fixture.search("")) == "");
    CHECK(summary(fixture.search("te\"a")) == "3:te\"a 100% ");
    CHECK(summary(fixture.search("coffee OR")) == "");
    CHECK(summary(fixture.search("tea", 100, "kitchen")) == "1:tea elsewhere ");
    CHECK(summary(fixture.search("tea", 100, "nowhere")) == "");
}

inline void test_facts(const StoreFactory& make) {
    wschat::HistoryLimits limits;
    limits.max_facts = 3;
    StoreFixture fixture(make(limits));
    CHECK(fixture.facts("ban") == "");
    fixture.put({"ban", "name anna", "1", "", 0});
    fixture.put({"ban", "address", "2", "", 0});
    fixture.put({"mute", "name anna", "3", "", 0});
    CHECK(fixture.facts("ban") == "address=2 name anna=1");
    CHECK(fixture.facts("ban", "name ") == "name anna=1");
    CHECK(fixture.facts("ba") == "");
    CHECK(contains(fixture.put({"ban", "more", "x", "", 0}), "too many facts"));
    fixture.put({"ban", "address", "22", "", 0});
    CHECK(fixture.facts("ban") == "address=22 name anna=1");
    fixture.put({"ban", "address", "", "", 0});
    CHECK(fixture.facts("ban") == "name anna=1");
    fixture.put({"ban", "expired", "4", "", 1});
    CHECK(fixture.facts("ban") == "name anna=1");
    fixture.put({"ban", "later", "5", "", 9'000'000'000'000});  // takes the place of the expired one
    CHECK(fixture.facts("ban") == "later=5 name anna=1");
    fixture.put({"ban", "later", "", "", 0});
    wschat::ChatFact first{"server", "token", "one", "", 0, true};
    fixture.told.clear();
    fixture.put(first);
    first.value = "two";
    fixture.put(first);
    CHECK(fixture.told == "token=one;token=one;");
    CHECK(fixture.facts("server") == "token=one");
    for (const char* key : {"a", "a\n1", "ab"}) fixture.put({"user", key, "1", "", 0});
    CHECK(fixture.facts("user", "a\n") == "a\n1=1");
    // A key with a line feed may be on another endpoint, which has its own limit.
    fixture.put({"user", "a\n1", "", "", 0});
    fixture.put({"user", "ac", "1", "", 0});
    CHECK(contains(fixture.put({"user", "b", "1", "", 0}), "too many facts"));
    CHECK(contains(fixture.put({"read", "b", "1", "", 0}), "too many facts"));
    // Facts of users leave the space for decisions.
    fixture.put({"mute", "name anna", "", "", 0});
    fixture.put({"ban", "name bert", "6", "", 0});
    CHECK(fixture.facts("ban") == "name anna=1 name bert=6");
    CHECK(contains(fixture.put({"mute", "name carl", "7", "", 0}), "too many facts"));
    fixture.put({"user", "ab", "", "", 0});
    fixture.put({"read", "b", "8", "", 0});
    CHECK(fixture.facts("read") == "b=8");
}

inline void test_erasure(const StoreFactory& make) {
    using Kind = wschat::ChatEntry::Kind;
    StoreFixture fixture(make({}));
    fixture.say("secret one");
    fixture.say("from bert", "bert");
    fixture.amend(Kind::edit, 1, "secret two");
    fixture.amend(Kind::react, 2, "+1");
    fixture.amend(Kind::react, 1, "+1", "bert");
    fixture.put({"read", "anna", "7", "anna", 0});
    fixture.put({"read", "bert", "8", "bert", 0});
    fixture.delivered.clear();
    fixture.told.clear();
    CHECK(fixture.erase("anna") == 1);
    CHECK(fixture.told == "anna=;");
    REQUIRE(fixture.delivered.size() == 2);
    for (const wschat::ChatEntry& each : fixture.delivered) {
        CHECK(each.room == "tea");
        CHECK(each.id > 5);
        CHECK(each.kind == (each.target == 1 ? Kind::remove : Kind::react));
        if (each.target == 2) CHECK(each.user == "user of anna");
    }
    CHECK(summary(fixture.since()) == "1:*- 2:from bert ");
    CHECK(reactions_of(fixture.since().entries[1]) == "");
    const std::string lines = fixture.export_room();
    CHECK_FALSE(contains(lines, "secret"));
    CHECK_FALSE(contains(lines, "name of anna"));
    CHECK_FALSE(contains(lines, "\"author\":\"anna\""));
    CHECK(contains(lines, "name of bert"));
    CHECK(summary(fixture.search("secret")) == "");
    CHECK(fixture.facts("read") == "bert=8");
    CHECK(fixture.erase("anna") == 0);
    CHECK(fixture.erase("") == 0);
    for (int i = 0; i < 500; ++i) fixture.say("x");
    CHECK(fixture.erase("anna") == 500);
}

inline void test_export(const StoreFactory& make) {
    StoreFixture fixture(make({}));
    CHECK(fixture.export_room() == "");
    fixture.say("hello \"you\"");
    fixture.amend(wschat::ChatEntry::Kind::react, 1, "+1", "bert");
    CHECK(fixture.export_room() ==
          "{\"type\":\"said\",\"room\":\"tea\",\"id\":1,\"time\":1000000,\"name\":\"name of anna\",\"user\":\"user of "
          "anna\",\"author\":\"anna\",\"text\":\"hello \\\"you\\\"\",\"reactions\":[{\"emoji\":\"+1\",\"user\":\"user "
          "of bert\",\"name\":\"name of bert\",\"author\":\"bert\"}]}\n"
          "{\"type\":\"react\",\"room\":\"tea\",\"id\":2,\"target\":1,\"time\":1000000,\"name\":\"name of bert\","
          "\"user\":\"user of bert\",\"author\":\"bert\",\"text\":\"+1\"}\n");
    for (int i = 0; i < 900; ++i) fixture.say("x");
    const std::string lines = fixture.export_room();
    CHECK(std::count(lines.begin(), lines.end(), '\n') == 902);
    // The callback ends it, and it goes on from there.
    std::string parts = fixture.export_room(1);
    CHECK(contains(parts, "hello"));
    CHECK(parts.size() < lines.size());
    for (int i = 0; i < 5 && parts.size() < lines.size(); ++i) parts += fixture.export_room(1, fixture.exported);
    CHECK(parts == lines);
    CHECK(fixture.export_room(1, 902) == "");
    CHECK(fixture.export_room(1, wschat::HistoryPosition::max_id) == "");
}

inline void test_retention(const StoreFactory& make) {
    wschat::HistoryLimits limits;
    limits.max_entries = 3;
    {
        StoreFixture fixture(make(limits));
        for (const char* text : {"a", "b", "c", "d", "e"}) fixture.say(text);
        CHECK(summary(fixture.since()) == "3:c 4:d 5:e ");
        CHECK(summary(fixture.after(2)) == "3:c 4:d 5:e ");
        CHECK(summary(fixture.after(1)) == "3:c 4:d 5:e gap");
        CHECK(fixture.amend(wschat::ChatEntry::Kind::edit, 2, "x") == "bad_id");
    }
    limits.max_entries = 0;
    limits.max_bytes = 3000;
    {
        StoreFixture fixture(make(limits));
        for (int i = 0; i < 10; ++i) fixture.say(std::string(700, 'x'));
        const std::size_t kept = fixture.since().entries.size();
        CHECK(kept >= 2);
        CHECK(kept <= 4);
    }
    limits.max_bytes = 0;
    limits.max_rooms = 2;
    {
        StoreFixture fixture(make(limits));
        const auto say_in = [&](const std::string& room) {
            wschat::ChatEntry made = StoreFixture::entry(wschat::ChatEntry::Kind::said, room);
            made.room = room;
            return fixture.append(made);
        };
        for (const char* room : {"one", "two", "one", "three"}) say_in(room);
        CHECK(summary(fixture.since({}, 100, "two")) == "");
        CHECK(fixture.since({}, 100, "one").entries.size() == 2);
        CHECK(summary(fixture.since({}, 100, "nowhere")) == "");
        CHECK(fixture.since({}, 100, "three").entries.size() == 1);
        CHECK(say_in("two") == "3");  // ids are not used again
    }
    limits.max_rooms = 0;
    {
        // A room has limits of its own, more or less than the store, from the entry on that says so.
        limits.max_entries = 3;
        StoreFixture fixture(make(limits));
        const auto say = [&](std::optional<std::size_t> entries, std::optional<wschat::Duration> age = {}) {
            wschat::ChatEntry made = StoreFixture::entry(wschat::ChatEntry::Kind::said, "x");
            made.time = wschat::unix_ms();
            made.retention = wschat::ChatEntry::Retention{entries, age};
            fixture.append(made);
            return fixture.since().entries.size();
        };
        for (const std::size_t kept : {1u, 2u, 3u, 4u, 5u}) CHECK(say(5) == kept);
        CHECK(say(5) == 5);
        fixture.say("as before");
        CHECK(fixture.since().entries.size() == 5);
        CHECK(say(0) == 6);
        CHECK(say(2) == 2);
        CHECK(say({}) == 3);
        CHECK(say({}) == 3);
        CHECK(say({}, 1h) == 3);
        limits.max_entries = 0;
    }
    limits.max_total_bytes = 3000;
    {
        StoreFixture fixture(make(limits));
        for (const char* room : {"one", "two", "three", "four"}) {
            wschat::ChatEntry made = StoreFixture::entry(wschat::ChatEntry::Kind::said, std::string(700, 'x'));
            made.room = room;
            fixture.append(made);
        }
        CHECK(summary(fixture.since({}, 100, "one")) == "");
        CHECK(fixture.since({}, 100, "four").entries.size() == 1);
    }
}

// All of the above, in a test case.
inline void test_store(const StoreFactory& make) {
    SUBCASE("pages") { test_pages(make); }
    SUBCASE("amendments") { test_amendments(make); }
    SUBCASE("mentions") { test_mentions(make); }
    SUBCASE("reactions") { test_reactions(make); }
    SUBCASE("search") { test_search(make); }
    SUBCASE("facts") { test_facts(make); }
    SUBCASE("erasure") { test_erasure(make); }
    SUBCASE("export") { test_export(make); }
    SUBCASE("retention") { test_retention(make); }
}

}  // namespace test
