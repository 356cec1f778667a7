// micro: the work per byte, compared with memcpy: GB/s of unmasking, of UTF-8 validation, and of parsing whole frames
// into messages. It uses Google Benchmark and takes its options: micro --benchmark_filter=utf8
#include "../../wschat.hpp"

#include <benchmark/benchmark.h>

namespace {

void sizes(benchmark::internal::Benchmark* b) { b->Arg(64)->Arg(1024)->Arg(16 * 1024)->Arg(1024 * 1024); }

void count_bytes(benchmark::State& state) { state.SetBytesProcessed(state.iterations() * state.range(0)); }

std::string repeated(std::string_view piece, std::size_t size) {
    std::string text;
    while (text.size() + piece.size() <= size) text += piece;
    return text.append(size - text.size(), 'x');
}
constexpr std::string_view mixed = "Grüße, 你好, привет, 👋! ";

void copy(benchmark::State& state) {
    const std::string from(static_cast<std::size_t>(state.range(0)), 'x');
    std::string to = from;
    for (auto _ : state) {
        std::memcpy(&to[0], from.data(), from.size());
        benchmark::DoNotOptimize(to.data());
        benchmark::ClobberMemory();
    }
    count_bytes(state);
}
BENCHMARK(copy)->Apply(sizes);

void unmask(benchmark::State& state) {
    std::string bytes(static_cast<std::size_t>(state.range(0)), 'x');
    for (auto _ : state)
        benchmark::DoNotOptimize(wschat::detail::apply_mask(&bytes[0], bytes.size(), {0x37, 0xfa, 0x21, 0x3d}));
    count_bytes(state);
}
BENCHMARK(unmask)->Apply(sizes);

void utf8(benchmark::State& state, std::string_view piece) {
    const std::string text = repeated(piece, static_cast<std::size_t>(state.range(0)));
    for (auto _ : state) {
        wschat::detail::Utf8Validator validator;
        if (!validator.feed(text.data(), text.size()) || !validator.complete()) state.SkipWithError("not valid");
    }
    count_bytes(state);
}
BENCHMARK_CAPTURE(utf8, ascii, "x")->Apply(sizes);
BENCHMARK_CAPTURE(utf8, mixed, mixed)->Apply(sizes);

// Masked frames, received 64 KiB at a time. Each round needs a copy, because unmasking works in place.
void frames(benchmark::State& state, std::string_view piece) {
    wschat::detail::SendArena arena;
    const wschat::Limits limits;
    const std::string payload = repeated(piece, static_cast<std::size_t>(state.range(0)));
    std::string stream;
    std::size_t count = 0;
    for (; stream.size() < 1024 * 1024; ++count)
        stream += encode_masked(arena, wschat::Opcode::text, payload, {0x37, 0xfa, 0x21, 0x3d}).view();

    wschat::detail::Connection connection;
    connection.open(wschat::detail::Role::server, limits, arena, wschat::Time());
    std::string input(64 * 1024, '\0');
    std::size_t messages = 0;
    for (auto _ : state) {
        for (std::size_t at = 0; at < stream.size(); at += input.size()) {
            const std::size_t size = (std::min)(input.size(), stream.size() - at);
            std::memcpy(&input[0], stream.data() + at, size);
            connection.receive(&input[0], size, wschat::Time());
            while (connection.next_event().kind == wschat::detail::Event::Kind::message) ++messages;
        }
    }
    if (messages != count * static_cast<std::size_t>(state.iterations()))
        state.SkipWithError("wrong number of messages");
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(stream.size()));
    state.SetItemsProcessed(static_cast<std::int64_t>(messages));
}
BENCHMARK_CAPTURE(frames, ascii, "x")->Apply(sizes);
BENCHMARK_CAPTURE(frames, mixed, mixed)->Apply(sizes);

}  // namespace

BENCHMARK_MAIN();
