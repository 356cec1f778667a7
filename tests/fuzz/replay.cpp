// Runs a harness over saved inputs without libFuzzer: replay FILE... A file is one input, or one input per line if its
// name ends in .hex. Prints the input and ends with status 1 if a check fails.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

std::string current;

void on_fatal_signal(int) {
    std::fprintf(stderr, "replay: %s fails\n", current.c_str());
    std::_Exit(1);
}

void run(const std::string& name, const std::string& input) {
    current = name;
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
}

std::string unhex(const std::string& line) {
    std::string bytes;
    for (std::size_t i = 0; i + 1 < line.size(); i += 2)
        bytes += static_cast<char>(std::stoi(line.substr(i, 2), nullptr, 16));
    return bytes;
}

}  // namespace

int main(int argc, char** argv) {
    for (const int signal : {SIGABRT, SIGSEGV, SIGFPE, SIGILL, SIGBUS, SIGALRM}) std::signal(signal, &on_fatal_signal);
    int inputs = 0;
    for (int i = 1; i < argc; ++i) {
        const std::string path = argv[i];
        std::ifstream file(path, std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "replay: cannot open %s", argv[i]);
            return 1;
        }
        if (path.size() < 4 || path.substr(path.size() - 4) != ".hex") {
            run(path, std::string(std::istreambuf_iterator<char>(file), {}));
            ++inputs;
            continue;
        }
        int number = 0;
        for (std::string line; std::getline(file, line);) {
            ++number;
            if (line.empty() || line.front() == '#') continue;
            run(path + ":" + std::to_string(number), unhex(line));
            ++inputs;
        }
    }
    std::printf("%d inputs passed", inputs);
    return inputs != 0 ? 0 : 1;
}
