// section 18: the history in Redis, and a Redis that is wrong, late, away or empty.
#define WSCHAT_CHAT 1
#include "store_suite.hpp"

#if WSCHAT_HIREDIS

#include "redis.hpp"

namespace {

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;
using test::RedisServer;
using test::StoreFixture;

// Stores in one test have a Redis in common, and keys of their own.
RedisOptions options_with(const std::string& prefix) {
    RedisOptions options;
    options.prefix = prefix;
    return options;
}

}  // namespace

TEST_SUITE_BEGIN("cluster");

TEST_CASE("a history in Redis does what every store must do") {
    const RedisServer redis;
    int stores = 0;
    const test::StoreFactory make = [&](const HistoryLimits& limits) {
        return std::make_unique<RedisHistory>(redis.url(), options_with("test" + std::to_string(++stores) + ":"), limits);
    };
    test::test_store(make);
}

TEST_SUITE_END();

#endif  // WSCHAT_HIREDIS
