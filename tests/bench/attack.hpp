// What attackers send, for attacked.cpp and fairness_test.cpp.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace attack {

// A frame of at most 65,535 bytes, masked with zeros.
inline std::string frame(std::string_view first_byte, std::string_view payload) {
    std::string bytes(first_byte);
    if (payload.size() < 126) {
        bytes += static_cast<char>(0x80 | payload.size());
    } else {
        bytes += '\xfe';
        bytes += static_cast<char>(payload.size() >> 8);
        bytes += static_cast<char>(payload.size() & 0xFF);
    }
    return bytes + std::string(4, '\0') + std::string(payload);
}

inline std::string repeated(std::string_view text, std::size_t size) {
    std::string all;
    while (all.size() + text.size() <= size) all += text;
    return all;
}

}  // namespace attack
