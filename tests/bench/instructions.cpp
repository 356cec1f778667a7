// Work for callgrind, repeated N times:   instructions receive|echo|broadcast N
//
// receive: parses a masked text frame of 64 bytes into a message. echo: the same, then queues the reply and removes it
// from the queue. broadcast: encodes a frame of 64 bytes, queues it for 100 connections and removes it; N counts
// deliveries.
#include "../../wschat.hpp"

#include <deque>

namespace {

using wschat::Opcode;

std::string masked_frame() {
    wschat::detail::SendArena arena;
    const wschat::detail::MaskKey mask = {0x37, 0xfa, 0x21, 0x3d};
    return std::string(wschat::detail::encode_masked(arena, Opcode::text, std::string(64, 'x'), mask).view());
}

void drain_output(wschat::detail::Connection& connection) {
    std::string_view piece;
    connection.output().gather(&piece, 1);
    connection.output().consume(piece.size());
}

void receive(long count, bool echo) {
    wschat::Limits limits;
    wschat::detail::SendArena arena;
    wschat::detail::Connection connection;
    connection.open(wschat::detail::Role::server, limits, arena, wschat::Time());
    const std::string frame = masked_frame();
    std::string input;
    for (long i = 0; i < count; ++i) {
        input = frame;  // unmasking changes it
        connection.receive(&input[0], input.size(), wschat::Time());
        for (wschat::detail::Event event = connection.next_event(); event.kind != wschat::detail::Event::Kind::none;
             event = connection.next_event())
            if (echo) connection.send(event.message.opcode(), event.message.data());
        if (echo) drain_output(connection);
    }
}

void broadcast(long count) {
    wschat::Limits limits;
    wschat::detail::SendArena arena;
    std::deque<wschat::detail::Connection> members(100);
    for (wschat::detail::Connection& member : members)
        member.open(wschat::detail::Role::server, limits, arena, wschat::Time());
    const std::string payload(64, 'x');
    for (long i = 0; i < count; i += 100) {
        const wschat::EncodedFrame frame(arena, Opcode::text, payload);
        for (wschat::detail::Connection& member : members) member.send(frame);
        for (wschat::detail::Connection& member : members) drain_output(member);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const long count = argc > 2 ? std::atol(argv[2]) : 0;
    if (mode == "receive" || mode == "echo") receive(count, mode == "echo");
    else if (mode == "broadcast") broadcast(count);
    else return std::fprintf(stderr, "usage: instructions receive|echo|broadcast N\n"), 1;
}
