// References that several harnesses compare the header with: text, header fields, UTF-8 and close codes. They are
// simple and slow on purpose.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fuzz {

// ---- text ----------------------------------------------------------------------------------------------------------

inline const std::string digits = "0123456789", letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
inline const std::string token_characters = digits + letters + "!#$%&'*+-.^_`|~";

inline bool contains_only(std::string_view s, std::string_view allowed) {
    return s.find_first_not_of(allowed) == std::string_view::npos;
}
inline std::string lower(std::string_view s) {
    std::string result(s);
    for (char& c : result)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    return result;
}
inline std::string trim(std::string_view s) {
    const std::size_t begin = s.find_first_not_of(" \t"), end = s.find_last_not_of(" \t");
    return begin == std::string_view::npos ? std::string() : std::string(s.substr(begin, end - begin + 1));
}
inline std::vector<std::string> split(std::string_view s, char separator) {
    std::vector<std::string> parts(1);
    for (const char c : s)
        if (c == separator) parts.emplace_back();
        else parts.back() += c;
    return parts;
}
// True for 1 to 20 digits whose value is at most max.
inline bool number_up_to(std::string_view s, unsigned long long max) {
    if (s.empty() || s.size() > 20 || !contains_only(s, digits)) return false;
    const std::string text(s.substr((std::min)(s.find_first_not_of('0'), s.size())));
    const std::string greatest = std::to_string(max);
    return text.size() != greatest.size() ? text.size() < greatest.size() : text <= greatest;
}

// A name, an IPv4 address or an IPv6 address in brackets, with an optional port.
inline bool valid_host(std::string_view host) {
    const bool brackets = host.substr(0, 1) == "[";
    const std::size_t end = brackets ? host.find(']') : host.find(':');
    if (brackets && end == std::string_view::npos) return false;
    const std::string_view name = brackets ? host.substr(1, end - 1) : host.substr(0, end);
    const std::string_view rest = end == std::string_view::npos ? "" : host.substr(brackets ? end + 1 : end);
    if (brackets && (name.size() < 2 || !contains_only(name, digits + "abcdefABCDEF:."))) return false;
    if (!brackets && (name.empty() || !contains_only(name, digits + letters + "-._~"))) return false;
    return rest.empty() || (rest[0] == ':' && (rest.size() == 1 || number_up_to(rest.substr(1), 65535)));
}
// The address in what a proxy writes ("[2001:db8::7]:443"), or an empty text if its form is wrong.
inline std::string address_in_hop(std::string hop) {
    if (hop.size() >= 2 && hop.front() == '"' && hop.back() == '"') hop = hop.substr(1, hop.size() - 2);
    std::string address = hop, port = ":0";
    const std::size_t first = hop.find(':'), close = hop.find(']');
    if (hop.substr(0, 1) == "[") {
        if (close == std::string::npos || first > close) return {};
        address = hop.substr(1, close - 1);
        if (close + 1 < hop.size()) port = hop.substr(close + 1);
    } else if (first != std::string::npos && first == hop.rfind(':')) {
        address = hop.substr(0, first);
        port = hop.substr(first);
    }
    const bool hidden = port.substr(0, 2) == ":_" && contains_only(port.substr(1), token_characters);
    return hop.size() <= 64 && port[0] == ':' && (hidden || number_up_to(port.substr(1), 65535)) ? address : "";
}
inline bool valid_escapes(std::string_view path) {
    for (std::size_t at = path.find('%'); at != std::string_view::npos; at = path.find('%', at + 1))
        if (path.size() < at + 3 || !contains_only(path.substr(at + 1, 2), digits + "abcdefABCDEF")) return false;
    return true;
}
// Requires valid escapes.
inline std::string unescaped(std::string_view s, bool plus = false) {
    std::string result;
    for (; !s.empty(); s.remove_prefix(1)) {
        const bool escape = s.front() == '%';
        if (escape) result += static_cast<char>(std::strtoul(std::string(s.substr(1, 2)).c_str(), nullptr, 16));
        else result += plus && s.front() == '+' ? ' ' : s.front();
        if (escape) s.remove_prefix(2);
    }
    return result;
}

// ---- header fields -------------------------------------------------------------------------------------------------

using FieldList = std::vector<std::pair<std::string, std::string>>;

inline std::vector<std::string> values_of(const FieldList& fields, std::string_view name) {
    std::vector<std::string> values;
    for (const auto& [field, value] : fields)
        if (lower(field) == name) values.push_back(value);
    return values;
}
// RFC 9110 5.6.1: the elements of a list. Empty elements are ignored.
inline std::vector<std::string> elements_of(const FieldList& fields, std::string_view name) {
    std::vector<std::string> elements;
    for (const std::string& value : values_of(fields, name))
        for (const std::string& part : split(value, ','))
            if (!trim(part).empty()) elements.push_back(trim(part));
    return elements;
}
inline bool has_element(const FieldList& fields, std::string_view name, std::string_view element) {
    for (const std::string& each : elements_of(fields, name))
        if (lower(each) == element) return true;
    return false;
}

// ---- UTF-8 ---------------------------------------------------------------------------------------------------------

// RFC 3629 3, byte by byte. After each byte, compares the code points that are still possible with the valid ranges.
class Utf8Reference {
public:
    // Returns false if no continuation makes the text valid.
    bool feed(char c) {
        if (partial_.empty() && c >= 0) return true;
        partial_ += c;
        const auto lead = static_cast<unsigned char>(partial_[0]);
        const unsigned length = lead < 0x80             ? 1
                                : (lead & 0xE0) == 0xC0 ? 2
                                : (lead & 0xF0) == 0xE0 ? 3
                                : (lead & 0xF8) == 0xF0 ? 4
                                                        : 0;
        if (length == 0) return false;
        constexpr unsigned lead_bits[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
        std::uint32_t least = lead & lead_bits[length], greatest = least;
        for (unsigned i = 1; i < length; ++i) {
            const bool present = i < partial_.size();
            const auto byte = present ? static_cast<unsigned char>(partial_[i]) : 0u;
            if (present && (byte & 0xC0) != 0x80) return false;
            least = least << 6 | (present ? byte & 0x3F : 0);
            greatest = greatest << 6 | (present ? byte & 0x3F : 0x3F);
        }
        struct Range {
            unsigned length;
            std::uint32_t first, last;
        };
        constexpr Range ranges[] = {
            {1, 0, 0x7F}, {2, 0x80, 0x7FF}, {3, 0x800, 0xD7FF}, {3, 0xE000, 0xFFFF}, {4, 0x10000, 0x10FFFF}};
        bool possible = false;
        for (const Range& range : ranges)
            possible = possible || (range.length == length && least <= range.last && greatest >= range.first);
        if (partial_.size() == length) partial_.clear();
        return possible;
    }
    bool complete() const { return partial_.empty(); }

private:
    std::string partial_;  // the bytes of the incomplete character
};

// The number of bytes before the first one that makes the text invalid, or the size of the text.
inline std::size_t reference_utf8_prefix(std::string_view text, bool* complete = nullptr) {
    Utf8Reference utf8;
    std::size_t n = 0;
    while (n < text.size() && utf8.feed(text[n])) ++n;
    if (complete != nullptr) *complete = n == text.size() && utf8.complete();
    return n;
}
inline bool reference_utf8(std::string_view text) {
    bool complete = false;
    reference_utf8_prefix(text, &complete);
    return complete;
}

// ---- close codes ---------------------------------------------------------------------------------------------------

// RFC 6455 7.4 and the IANA registry of close codes.
inline bool sendable_close_code(unsigned code) {
    for (const unsigned registered :
         {1000u, 1001u, 1002u, 1003u, 1007u, 1008u, 1009u, 1010u, 1011u, 1012u, 1013u, 1014u})
        if (code == registered) return true;
    return code >= 3000 && code < 5000;
}

}  // namespace fuzz
