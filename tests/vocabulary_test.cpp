// Section 2 of the header: the plain values that all other sections share.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;

TEST_SUITE_BEGIN("vocabulary");

TEST_CASE("the close codes that may be on the wire are 1000-1003, 1007-1014 and 3000-4999") {
    // RFC 6455 7.4 and IANA's registry: 1004 is reserved, 1005, 1006 and 1015 are never sent, 1016-2999 are unassigned.
    struct Range {
        unsigned first, last;
        bool legal;
    };
    unsigned next = 0;
    for (const Range range :
         {Range{0, 999, false}, Range{1000, 1003, true}, Range{1004, 1006, false}, Range{1007, 1014, true},
          Range{1015, 2999, false}, Range{3000, 4999, true}, Range{5000, 65535, false}}) {
        REQUIRE(range.first == next);
        for (unsigned code = range.first; code <= range.last; ++code)
            if (legal_on_wire(static_cast<CloseCode>(code)) != range.legal) FAIL_CHECK("code ", code);
        next = range.last + 1;
    }
    CHECK(next == 65536);
}

TEST_CASE("the named close codes have the numbers of RFC 6455 7.4.1 and of the registry") {
    unsigned expected = 1000;
    for (const CloseCode code :
         {CloseCode::normal, CloseCode::going_away, CloseCode::protocol_error, CloseCode::unsupported_data,
          CloseCode{1004}, CloseCode::no_status, CloseCode::abnormal, CloseCode::invalid_payload,
          CloseCode::policy_violation, CloseCode::message_too_big, CloseCode::mandatory_extension,
          CloseCode::internal_error, CloseCode::service_restart, CloseCode::try_again_later, CloseCode::bad_gateway,
          CloseCode::tls_handshake})
        CHECK(number(code) == expected++);
    CHECK(number(CloseCode{4001}) == 4001);
}

TEST_CASE("the opcodes from 8 on are control frames") {
    CHECK_FALSE(is_control(Opcode::continuation));
    CHECK_FALSE(is_control(Opcode::text));
    CHECK_FALSE(is_control(Opcode::binary));
    CHECK(is_control(Opcode::close));
    CHECK(is_control(Opcode::ping));
    CHECK(is_control(Opcode::pong));
}

TEST_CASE("each close cause and each log level has its own name") {
    struct Row {
        CloseCause cause;
        std::string name;
    };
    const Row rows[] = {{CloseCause::none, "none"},
                        {CloseCause::peer, "peer"},
                        {CloseCause::local, "local"},
                        {CloseCause::protocol_error, "protocol error"},
                        {CloseCause::connection_lost, "connection lost"},
                        {CloseCause::ping_timeout, "ping timeout"},
                        {CloseCause::closing_timeout, "closing timeout"},
                        {CloseCause::backlog, "backlog"},
                        {CloseCause::handler_exception, "handler exception"},
                        {CloseCause::shutdown, "shutdown"}};
    for (const Row& row : rows) CHECK(to_string(row.cause) == row.name);

    CHECK(to_string(LogLevel::debug) == "debug");
    CHECK(to_string(LogLevel::info) == "info");
    CHECK(to_string(LogLevel::warning) == "warning");
    CHECK(to_string(LogLevel::error) == "error");
}

TEST_CASE("a message is a view of its payload with an opcode") {
    const std::string payload = "hello";
    const Message text(payload);
    CHECK(text.text().data() == payload.data());
    CHECK(text.data() == "hello");
    CHECK(text.size() == 5);
    CHECK(text.opcode() == Opcode::text);
    CHECK_FALSE(text.binary());

    const Message binary(payload, Opcode::binary);
    CHECK(binary.binary());
    CHECK(binary.opcode() == Opcode::binary);
}

TEST_CASE("a time never passes the end of time") {
    const Time now = Clock::now();
    CHECK(saturating_add(now, std::chrono::seconds(1)) == now + std::chrono::seconds(1));
    CHECK(saturating_add(now, (Duration::max)()) == (Time::max)());
    CHECK(saturating_add((Time::max)(), Duration(1)) == (Time::max)());
}

TEST_CASE("the default limits have the documented values") {
    using namespace std::chrono;
    const Limits limits;
    const Duration timers[] = {limits.handshake_timeout, limits.ping_interval, limits.ping_timeout,
                               limits.closing_timeout, limits.linger_timeout};
    const int in_seconds[] = {10, 20, 20, 5, 2};
    for (std::size_t i = 0; i < std::size(timers); ++i) CHECK(timers[i] == seconds(in_seconds[i]));
    const std::size_t sizes[] = {limits.max_request_line, limits.max_header_bytes, limits.max_message_size,
                                 limits.max_backlog, limits.linger_bytes};
    const std::size_t in_kib[] = {8, 16, 1024, 1024, 256};
    for (std::size_t i = 0; i < std::size(sizes); ++i) CHECK(sizes[i] == 1024 * in_kib[i]);
    CHECK(limits.keep_alive_timeout == seconds(75));
    CHECK(limits.send_buffer == 65536);
    CHECK(limits.messages_per_second == 0);  // no limit
    CHECK(limits.messages_burst == 0);       // as messages_per_second
    CHECK(limits.bytes_per_second == 0);     // no limit
    CHECK(limits.max_header_fields == 100);
    CHECK(limits.max_fragments == 1024);
    CHECK(limits.control_frames_per_second == 100);
    CHECK(limits.control_frames_burst == 500);
    CHECK(limits.backlog_policy == BacklogPolicy::close);
    const ServerLimits server_limits;
    CHECK(server_limits.max_total_backlog == 268435456);
    CHECK(server_limits.max_connections == 0);  // the descriptor limit minus 64
    CHECK(server_limits.max_connections_per_address == 0);
}

TEST_SUITE_END();
