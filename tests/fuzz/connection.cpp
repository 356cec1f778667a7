// Connection in both roles: a conversation of bytes and calls, given whole, byte by byte and in random pieces. All three
// must come to the same, and to what a model says that takes each byte by itself.
//
// Input: a byte for the role and the limits, one for how the bytes are cut, then steps; each begins with a byte whose
// rest by 8 says what it is: 0 bytes as they come (a count, the bytes), 1 a frame of ours to be masked (its first byte,
// the mask, a count, the payload), 2 a large one (its first byte, a size, what it is filled with), 3-5 a call (which,
// an amount, and for some a count and a text), 6-7 the same within the next event's callback.
#include "fuzz.hpp"
#include "reference.hpp"

#include <deque>

namespace {

using namespace fuzz;
using namespace std::chrono_literals;
using wschat::CloseCause;
using wschat::CloseCode;
using wschat::detail::Connection;
using wschat::Duration;
using wschat::detail::Event;
using wschat::Limits;
using wschat::Opcode;
using wschat::detail::Role;
using wschat::Time;
using wschat::WriteStatus;

// ---- the conversation -----------------------------------------------------------------------------------------------

enum class What {
    send_text,
    send_binary,
    send_encoded,
    send_offered,
    ping,
    pong,
    close,
    fail,
    abort,
    hang_up,
    wait,
    tick,
    alive,
    drain,
    block,
    unblock,
    pause,
    resume,
    end
};

struct Call {
    What what = What::end;
    unsigned amount = 0;
    std::string text;
};

// Bytes from the peer, or a call now, or a call that the next event's callback makes.
struct Step {
    std::string bytes;
    std::optional<Call> now, later;
};

struct Conversation {
    Role role = Role::server;
    Limits limits;
    unsigned seed = 0;
    std::vector<Step> steps;
};

std::size_t size_of(unsigned amount) {
    constexpr std::size_t sizes[] = {16383, 16384, 16385, 33000, 40000, 65535, 65536, 0};
    return amount < 248 ? amount : sizes[amount - 248];
}
std::string filled(std::size_t size, unsigned pattern) {
    constexpr std::string_view patterns[] = {"a", "\xE2\x82\xAC", "\xF0\x9F\x98\x80z", "\xFF"};
    std::string text;
    while (text.size() < size) text += patterns[pattern % 4];
    text.resize(size);
    if (pattern >= 128 && size != 0) text[size / 2] = static_cast<char>(pattern);
    return text;
}

// What a call sends. That text is UTF-8 is the caller's to see to.
std::string payload_of(const Call& call) {
    const std::string payload = filled(size_of(call.amount), call.amount);
    return call.what != What::send_text || slow_utf8(payload) ? payload : std::string(payload.size(), '.');
}

// RFC 6455 5.2, the length in its shortest form. No mask: a frame of a server.
std::string frame(unsigned first, std::string_view payload, const std::string& mask) {
    std::string bytes(1, static_cast<char>(first));
    const std::size_t size = payload.size();
    const int length_bytes = size < 126 ? 0 : size < 65536 ? 2 : 8;
    bytes += static_cast<char>((mask.empty() ? 0u : 0x80u) | (length_bytes == 0   ? size
                                                              : length_bytes == 2 ? 126u
                                                                                  : 127u));
    for (int i = length_bytes; i-- > 0;) bytes += static_cast<char>(size >> (8 * i) & 0xFF);
    bytes += mask;
    for (std::size_t i = 0; i < size; ++i)
        bytes += mask.empty() ? payload[i] : static_cast<char>(payload[i] ^ mask[i % 4]);
    return bytes;
}
std::string mask_of(Role reader, unsigned choice) {
    if (reader == Role::client) return {};
    return {static_cast<char>(choice), static_cast<char>(choice * 3), static_cast<char>(choice * 7),
            static_cast<char>(choice / 2)};
}

Limits limits_of(unsigned choice) {
    Limits limits;
    limits.backlog_policy = choice % 2 == 0 ? wschat::BacklogPolicy::close : wschat::BacklogPolicy::drop;
    switch (choice / 2 % 4) {
        case 0: break;
        case 1:
            limits.max_message_size = 60;
            limits.max_fragments = 3;
            limits.max_backlog = 300;
            limits.ping_interval = limits.ping_timeout = 1s;
            limits.closing_timeout = 500ms;
            break;
        case 2:
            limits.max_message_size = 40'000;
            limits.control_frames_per_second = 2;
            limits.control_frames_burst = 3;
            limits.ping_timeout = 0s;
            break;
        case 3:
            limits.max_message_size = 150'000;
            limits.max_backlog = 30'000;
            limits.control_frames_per_second = 0;
            limits.ping_interval = limits.closing_timeout = 0s;
            break;
    }
    return limits;
}

Call call_of(Choices& choices) {
    Call call;
    call.what = static_cast<What>(choices.byte() % static_cast<unsigned>(What::end));
    call.amount = choices.byte();
    if (call.what == What::ping || call.what == What::pong || call.what == What::close || call.what == What::fail)
        call.text = choices.counted_bytes();
    return call;
}

Conversation conversation_of(Choices choices) {
    Conversation made;
    const unsigned set_up = choices.byte();
    made.role = set_up % 2 == 0 ? Role::server : Role::client;
    made.limits = limits_of(set_up / 2);
    made.seed = choices.byte();
    std::size_t size = 0;
    while (!choices.over() && size < 100'000 && made.steps.size() < 200) {
        const unsigned kind = choices.byte() % 8;
        Step step;
        if (kind == 0) {
            step.bytes = choices.counted_bytes();
        } else if (kind == 1) {
            const unsigned first = choices.byte(), mask = choices.byte();
            step.bytes = frame(first, choices.counted_bytes(), mask_of(made.role, mask));
        } else if (kind == 2) {
            const unsigned first = choices.byte(), amount = choices.byte();
            step.bytes = frame(first, filled(size_of(amount), choices.byte()), mask_of(made.role, amount));
        } else {
            const Call call = call_of(choices);
            // Within a callback the time stands still.
            const bool clock = call.what == What::wait || call.what == What::tick || call.what == What::alive;
            if (kind < 6) step.now = call;
            else if (!clock) step.later = call;
        }
        size += step.bytes.size();
        const bool goes_on = kind < 3 && !made.steps.empty() && !made.steps.back().now && !made.steps.back().later;
        if (goes_on) made.steps.back().bytes += step.bytes;
        else made.steps.push_back(std::move(step));
    }
    return made;
}

std::string described(const Event& event) {
    constexpr const char* names[] = {"none", "message", "ping", "pong", "close"};
    std::string text = names[static_cast<std::size_t>(event.kind)];
    if (event.kind == Event::Kind::message) text += event.message.binary() ? " binary" : " text";
    return text + " [" + std::string(event.message.data()) + "]\n";
}
std::string described(WriteStatus status) {
    constexpr const char* names[] = {"sent", "queued", "dropped", "closed"};
    return std::string(names[static_cast<std::size_t>(status)]) + "\n";
}

unsigned code_of(const Call& call) { return call.amount < 200 ? 900 + call.amount : 2990 + (call.amount - 200) * 40; }
bool may_close(const Call& call) {
    return may_be_sent(code_of(call)) && call.text.size() <= 123 && slow_utf8(call.text);
}

// ---- the connection -------------------------------------------------------------------------------------------------

class Real {
public:
    Real(const Conversation& conversation, Cutter cutter)
        : role_(conversation.role), limits_(conversation.limits), cutter_(cutter) {
        masks_made = 0;
        connection.open(role_, limits_, arena_, now_, role_ == Role::client ? &next_mask : nullptr);
    }
    Real(const Real&) = delete;
    Real& operator=(const Real&) = delete;

    void take(const Step& step) {
        if (step.later) later_.push_back(*step.later);
        waiting_ += step.bytes;
        arrived_ += step.bytes.size();
        feed();
        if (step.now) {
            perform(*step.now);
            // A connection that closes is not kept waiting.
            if (paused_ && !connection.is_open()) resume();
            take_events();
            feed();
        }
        check_memory();
        note();
    }

    Connection connection;
    std::string log;
    std::string sent;
    std::size_t offered = 0;  // bytes that the transport took of the last message at once
    int closes = 0;

private:
    static wschat::detail::MaskKey next_mask() {
        ++masks_made;
        return {static_cast<unsigned char>(masks_made), 0x12, static_cast<unsigned char>(masks_made * 5), 0xF1};
    }

    // In memory that is gone afterwards, or where the connection wants it.
    void feed() {
        while (!paused_ && fed_ != waiting_.size()) {
            const auto [area, room] = connection.receive_buffer();
            std::size_t size = cutter_.next(waiting_.size() - fed_);
            const std::string_view piece(waiting_.data() + fed_, size);
            if (area != nullptr && cutter_.flip()) {
                check(room != 0, "there is no room where the next bytes would lie best");
                size = (std::min)(size, room);
                std::memcpy(area, piece.data(), size);
                fed_ += size;
                connection.receive(area, size, now_);
                take_events();
            } else {
                Exact copy(piece);
                fed_ += size;
                connection.receive(copy.data(), size, now_);
                take_events();
            }
        }
        if (fed_ == waiting_.size()) {
            waiting_.clear();
            fed_ = 0;
        }
    }

    void take_events() {
        while (!paused_) {
            const Event event = connection.next_event();
            if (event.kind == Event::Kind::none) return;
            log += described(event);
            if (event.kind == Event::Kind::close) ++closes;
            if (later_.empty()) continue;
            const Call call = later_.front();
            later_.pop_front();
            perform(call);
        }
    }

    void perform(const Call& call) {
        const std::string payload = payload_of(call);
        switch (call.what) {
            case What::send_text: log += described(connection.send(Opcode::text, payload)); break;
            case What::send_binary: log += described(connection.send(Opcode::binary, payload)); break;
            case What::send_encoded:
                if (role_ == Role::server)
                    log += described(connection.send(wschat::EncodedFrame(arena_, Opcode::binary, payload)));
                break;
            case What::send_offered: send_offered(call.amount); break;
            case What::ping: send_control(Opcode::ping, call.text); break;
            case What::pong: send_control(Opcode::pong, call.text); break;
            case What::close: close(call); break;
            case What::fail:
                if (slow_utf8(call.text))
                    connection.fail(CloseCode::internal_error, call.text, CloseCause::handler_exception);
                break;
            case What::abort: connection.abort(CloseCause::backlog, "too much"); break;
            case What::hang_up: connection.receive_eof("gone"); break;
            case What::wait: now_ += call.amount * 250ms; break;
            case What::tick:
                now_ += call.amount * 250ms;
                connection.tick(now_);
                check(connection.deadline() > now_ || connection.state() == Connection::State::closed,
                      "tick() leaves something to do at once");
                break;
            case What::alive: connection.record_activity(now_); break;
            case What::drain: drain(call.amount); break;
            case What::block:
                connection.set_write_blocked(true);
                connection.output().keep();
                break;
            case What::unblock: connection.set_write_blocked(false); break;
            case What::pause:
                if (paused_ || !connection.is_open()) break;
                connection.pause_input();
                paused_ = true;
                break;
            case What::resume: resume(); break;
            case What::end: break;
        }
    }

    void send_control(Opcode opcode, const std::string& text) {
        try {
            log += described(connection.send_control(opcode, text));
            check(text.size() <= 125, "a control frame of more than 125 bytes is taken");
        } catch (const wschat::Error&) {
            check(text.size() > 125, "a control frame is refused");
        }
    }
    void close(const Call& call) {
        try {
            connection.close(static_cast<CloseCode>(code_of(call)), call.text, now_);
            check(may_close(call), "close() takes what must not be sent");
        } catch (const wschat::Error&) {
            check(!may_close(call), "close() refuses what may be sent");
        }
    }
    // The transport takes some of it, all of it, or fails.
    void send_offered(unsigned amount) {
        offered = 0;
        const std::string payload = filled(20'000, amount);
        const auto offer = [&](const std::string_view* pieces, std::size_t count) -> std::size_t {
            check(connection.is_open() && connection.output().empty() && !connection.write_blocked(),
                  "a message is offered out of its turn");
            if (amount == 255) return connection.abort(CloseCause::connection_lost, "reset"), 0;
            std::string all;
            for (std::size_t i = 0; i < count; ++i) all += pieces[i];
            offered = (std::min)(all.size(), amount * std::size_t{100});
            if (offered != all.size()) connection.set_write_blocked(true);
            sent += all.substr(0, offered);
            return offered;
        };
        log += described(connection.send(Opcode::binary, payload, offer));
    }

    // The kernel takes some bytes; a pong that waited follows when it has taken all.
    void drain(unsigned amount) {
        std::size_t left = (std::min)(amount == 255 ? std::size_t(-1) : size_of(amount), connection.output().size());
        while (left != 0) {
            std::string_view pieces[3];
            const std::size_t count = connection.output().gather(pieces, 1 + amount % 3);
            check(count != 0, "the queue has bytes and no pieces");
            std::size_t size = 0;
            for (std::size_t i = 0; i < count && size < left; ++i) {
                sent += pieces[i].substr(0, left - size);
                size += (std::min)(pieces[i].size(), left - size);
            }
            connection.output().consume(size);
            left -= size;
        }
        if (connection.output().empty() && !connection.write_blocked()) connection.send_pending_pong();
    }

    void resume() {
        if (!std::exchange(paused_, false)) return;
        connection.record_activity(now_);
        connection.resume_input();
        take_events();
        feed();
    }

    // Four times what has come, and twice of a message; what waits is what came.
    void check_memory() {
        const std::size_t held = connection.buffered_input(), message = 2 * limits_.max_message_size;
        check(held <= (std::min)(4 * arrived_, message) + arrived_, "more is held than has come", std::to_string(held));
    }
    void note() {
        log += "state " + std::to_string(static_cast<int>(connection.state())) + " code " +
               std::to_string(number(connection.close_code())) + " cause " +
               std::string(to_string(connection.close_cause())) + " queued " +
               std::to_string(connection.output().size()) + " dropped " +
               std::to_string(connection.dropped_messages()) + " due " +
               std::to_string(connection.deadline().time_since_epoch().count()) + "\n";
    }

    static inline unsigned masks_made = 0;
    Role role_;
    Limits limits_;
    wschat::detail::SendArena arena_;
    Cutter cutter_;
    Time now_ = Time() + 1h;
    std::deque<Call> later_;
    std::string waiting_;
    std::size_t fed_ = 0;
    std::size_t arrived_ = 0;
    bool paused_ = false;
};

// ---- the model ------------------------------------------------------------------------------------------------------

std::string cut(std::string reason) {
    while (reason.size() > 123 || !slow_utf8(reason)) reason.pop_back();
    return reason;
}
std::string close_body(unsigned code, const std::string& reason) {
    if (code == 1005) return {};
    return std::string{static_cast<char>(code >> 8), static_cast<char>(code & 0xFF)} + reason;
}

// What RFC 6455 and the header's comments say that a connection does. It takes the words of a reason from the real one.
class Model {
public:
    Model(const Conversation& conversation, const Real& real)
        : server_(conversation.role == Role::server),
          limits_(conversation.limits),
          real_(real),
          tokens_(limits_.control_frames_burst) {}

    void take(const Step& step) {
        if (step.later) later_.push_back(*step.later);
        waiting_.erase(0, std::exchange(at_, 0u)).append(step.bytes);
        feed();
        if (step.now) {
            perform(*step.now);
            if (paused_ && state_ != State::open) resume();
            feed();
        }
        note();
    }

    struct Frame {
        unsigned opcode;
        std::string payload;
    };
    std::string log;
    std::vector<Frame> frames;  // that were sent, or queued
    std::size_t taken = 0;      // how much of them the transport has taken

private:
    using State = Connection::State;

    // ---- input -----------------------------------------------------------------------------------------------------

    void feed() {
        while (!paused_) {
            if (state_ == State::closed && !std::exchange(reported_, true)) {
                event("close []");
            } else if (at_ == waiting_.size()) {
                return;
            } else {
                take(waiting_[at_++]);
            }
        }
    }

    void take(char c) {
        alive_ = now_;
        ping_sent_ = false;
        if (state_ == State::closed) return;
        if (!in_payload_) {
            header_ += c;
            if (!judge_header()) return;
        } else {
            payload_ += static_cast<char>(c ^ (server_ ? header_[header_.size() - 4 + payload_.size() % 4] : 0));
            if (!control_ && text_ && !utf8_.take(payload_.back())) return broken(1007);
        }
        in_payload_ = payload_.size() != length_;
        if (in_payload_) return;
        const std::string header = std::exchange(header_, ""), payload = std::exchange(payload_, "");
        if (control_) take_control(header[0] & 0x0F, payload);
        else take_data(header[0] < 0, payload);
    }

    // True where the header is whole and breaks no rule. What is broken is broken as soon as that is certain.
    bool judge_header() {
        const auto byte = [this](std::size_t i) { return static_cast<unsigned char>(header_[i]); };
        const std::size_t size = header_.size();
        const unsigned opcode = byte(0) & 0x0F;
        control_ = opcode >= 8;
        if ((byte(0) & 0x70) != 0) return broken(1002), false;
        if (opcode != 0 && opcode != 1 && opcode != 2 && opcode != 8 && opcode != 9 && opcode != 10)
            return broken(1002), false;
        if (control_ && (byte(0) & 0x80) == 0) return broken(1002), false;
        if (!control_ && (opcode == 0) != message_open_) return broken(1002), false;
        if (size < 2) return false;
        const unsigned form = byte(1) & 0x7F;
        if (((byte(1) & 0x80) != 0) != server_) return broken(1002), false;
        if (control_ && form > 125) return broken(1002), false;
        const std::size_t bytes = form == 126 ? 2 : form == 127 ? 8 : 0;
        std::uint64_t length = bytes == 0 ? form : 0;
        for (std::size_t i = 0; i < bytes && 2 + i < size; ++i) length = length << 8 | byte(2 + i);
        if (bytes == 2 && size >= 4 && length < 126) return broken(1002), false;
        if (bytes == 8 && size >= 3 && (byte(2) & 0x80) != 0) return broken(1002), false;
        if (bytes == 8 && size == 8 && length == 0) return broken(1002), false;
        if (size < 2 + bytes + (server_ ? 4 : 0)) return false;
        length_ = length;
        return control_ || judge_size(opcode);
    }
    bool judge_size(unsigned opcode) {
        if (opcode != 0) {
            message_.clear();
            fragments_ = 0;
            text_ = opcode == 1;
            utf8_ = SlowUtf8();
        }
        if (++fragments_ > limits_.max_fragments) return broken(1008), false;
        if (length_ > limits_.max_message_size - message_.size()) return broken(1009), false;
        return true;
    }

    void take_data(bool last, const std::string& payload) {
        message_ += payload;
        message_open_ = !last;
        if (!last) return;
        if (text_ && !utf8_.complete()) return broken(1007);
        if (state_ == State::open) event((text_ ? "message text [" : "message binary [") + message_ + "]");
    }

    void take_control(int opcode, const std::string& payload) {
        if (opcode == 8) return take_close(payload);
        if (!allowed()) return broken(1008);
        if (opcode == 9 && blocked_) pong_ = payload;
        else if (opcode == 9) queue(10, payload);
        event((opcode == 9 ? "ping [" : "pong [") + payload + "]");
    }
    bool allowed() {
        if (limits_.control_frames_per_second == 0) return true;
        const double seconds = std::chrono::duration<double>(alive_ - counted_).count();
        counted_ = alive_;
        tokens_ = (std::min)(static_cast<double>(limits_.control_frames_burst),
                             tokens_ + seconds * limits_.control_frames_per_second) -
                  1;
        return tokens_ >= 0;
    }

    void take_close(const std::string& payload) {
        if (payload.size() == 1) return broken(1002);
        const unsigned code =
            payload.empty() ? 1005
                            : static_cast<unsigned char>(payload[0]) * 256u + static_cast<unsigned char>(payload[1]);
        if (!payload.empty() && !may_be_sent(code)) return broken(1002);
        if (!payload.empty() && !slow_utf8(payload.substr(2))) return broken(1007);
        if (state_ == State::open) queue(8, close_body(code, ""));
        end(state_ == State::closing ? cause_ : CloseCause::peer, code);
    }

    void event(const std::string& described) {
        log += described + "\n";
        if (later_.empty()) return;
        const Call call = later_.front();
        later_.pop_front();
        perform(call);
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    void broken(unsigned code) { fail(CloseCause::protocol_error, code, real_.connection.close_reason()); }
    void fail(CloseCause cause, unsigned code, const std::string& reason) {
        if (state_ == State::closed) return;
        if (state_ == State::open) queue(8, close_body(code, cut(reason)));
        end(cause, code);
    }
    void abort(CloseCause cause) {
        if (state_ == State::closed) return;
        queued_ = 0;
        end(state_ == State::closing && cause == CloseCause::connection_lost ? cause_ : cause, 1006);
    }
    void end(CloseCause cause, unsigned code) {
        state_ = State::closed;
        cause_ = cause;
        code_ = code;
        pong_.reset();
    }

    // ---- output ----------------------------------------------------------------------------------------------------

    std::size_t frame_size(std::size_t payload) const {
        return payload + 2 + (payload < 126 ? 0 : payload < 65536 ? 2 : 8) + (server_ ? 0 : 4);
    }
    void queue(unsigned opcode, const std::string& payload) {
        frames.push_back({opcode, payload});
        queued_ += frame_size(payload.size());
    }
    void status(WriteStatus status) { log += described(status); }
    void queued() { status(blocked_ ? WriteStatus::queued : WriteStatus::sent); }

    void send(unsigned opcode, const std::string& payload) {
        if (state_ != State::open) return status(WriteStatus::closed);
        if (queued_ != 0 && queued_ + frame_size(payload.size()) > limits_.max_backlog) {
            const bool drop = limits_.backlog_policy == wschat::BacklogPolicy::drop;
            if (drop) ++dropped_;
            else fail(CloseCause::backlog, 1008, real_.connection.close_reason());
            return status(drop ? WriteStatus::dropped : WriteStatus::closed);
        }
        queue(opcode, payload);
        queued();
    }
    void send_offered(unsigned amount) {
        const std::string payload = filled(20'000, amount);
        if (!server_ || queued_ != 0 || blocked_ || state_ != State::open) return send(2, payload);
        if (amount == 255) return abort(CloseCause::connection_lost), status(WriteStatus::closed);
        queue(2, payload);
        const std::size_t size = (std::min)(queued_, amount * std::size_t{100});
        taken += size;
        queued_ -= size;
        blocked_ = queued_ != 0;
        queued();
    }
    void send_control(unsigned opcode, const std::string& payload) {
        if (payload.size() > 125) return;
        if (state_ != State::open) return status(WriteStatus::closed);
        queue(opcode, payload);
        queued();
    }
    void drain(unsigned amount) {
        const std::size_t size = amount == 255 ? queued_ : (std::min)(size_of(amount), queued_);
        taken += size;
        queued_ -= size;
        if (queued_ == 0 && !blocked_ && pong_) {
            queue(10, *pong_);
            pong_.reset();
        }
    }

    // ---- calls -----------------------------------------------------------------------------------------------------

    void perform(const Call& call) {
        const std::string payload = payload_of(call);
        switch (call.what) {
            case What::send_text: return send(1, payload);
            case What::send_binary: return send(2, payload);
            case What::send_encoded: return server_ ? send(2, payload) : void();
            case What::send_offered: return send_offered(call.amount);
            case What::ping: return send_control(9, call.text);
            case What::pong: return send_control(10, call.text);
            case What::close: return close(call);
            case What::fail:
                return slow_utf8(call.text) ? fail(CloseCause::handler_exception, 1011, call.text) : void();
            case What::abort: return abort(CloseCause::backlog);
            case What::hang_up: return abort(CloseCause::connection_lost);
            case What::wait: now_ += call.amount * 250ms; return;
            case What::tick: now_ += call.amount * 250ms; return tick();
            case What::alive: alive_ = now_, ping_sent_ = false; return;
            case What::drain: return drain(call.amount);
            case What::block: blocked_ = true; return;
            case What::unblock: blocked_ = false; return;
            case What::pause: paused_ = paused_ || state_ == State::open; return;
            case What::resume: return resume();
            case What::end: return;
        }
    }
    void close(const Call& call) {
        if (!may_close(call) || state_ != State::open) return;
        queue(8, close_body(code_of(call), call.text));
        state_ = State::closing;
        cause_ = CloseCause::local;
        code_ = code_of(call);
        since_ = now_ + std::chrono::seconds(queued_ / 65536);
    }
    void resume() {
        if (!std::exchange(paused_, false)) return;
        alive_ = now_, ping_sent_ = false;
        feed();
    }

    Time due() const {
        const auto after = [](Time time, Duration timeout) { return timeout == 0s ? (Time::max)() : time + timeout; };
        if (state_ == State::closing) return after(since_, limits_.closing_timeout);
        if (state_ == State::closed || limits_.ping_interval == 0s) return (Time::max)();
        return ping_sent_ ? after(since_, limits_.ping_timeout) : after(alive_, limits_.ping_interval);
    }
    void tick() {
        if (now_ < due()) return;
        if (state_ == State::closing) return abort(CloseCause::closing_timeout);
        if (ping_sent_) return abort(CloseCause::ping_timeout);
        queue(9, "");
        ping_sent_ = true;
        since_ = now_;
    }

    void note() {
        log += "state " + std::to_string(static_cast<int>(state_)) + " code " + std::to_string(code_) + " cause " +
               std::string(to_string(cause_)) + " queued " + std::to_string(queued_) + " dropped " +
               std::to_string(dropped_) + " due " + std::to_string(due().time_since_epoch().count()) + "\n";
    }

    bool server_;
    Limits limits_;
    const Real& real_;
    State state_ = State::open;
    CloseCause cause_ = CloseCause::none;
    unsigned code_ = 1005;
    bool reported_ = false, paused_ = false, blocked_ = false, ping_sent_ = false;
    Time now_ = Time() + 1h, alive_ = now_, since_{}, counted_ = now_;
    double tokens_;
    std::deque<Call> later_;
    std::string waiting_;
    std::size_t at_ = 0;
    std::string header_, payload_, message_;
    std::uint64_t length_ = 0;
    std::size_t fragments_ = 0, queued_ = 0, dropped_ = 0;
    bool in_payload_ = false, control_ = false, message_open_ = false, text_ = false;
    SlowUtf8 utf8_;
    std::optional<std::string> pong_;
};

// ---- what is held against it ----------------------------------------------------------------------------------------

// What has left is the beginning of the frames that were to be sent: unfragmented, masked by a client only, each length
// in its shortest form, and of a Close frame's successors none but a pong.
void check_sent(std::string_view sent, const Model& model, bool server) {
    check(sent.size() == model.taken, "more or less was sent than the transport took");
    bool closed = false;
    for (const Model::Frame& expected : model.frames) {
        const std::size_t mask_at = expected.payload.size() < 126 ? 2 : expected.payload.size() < 65536 ? 4 : 10;
        const std::string mask(server || sent.size() < mask_at + 4 ? "" : sent.substr(mask_at, 4));
        const std::string bytes = frame(0x80 | expected.opcode, expected.payload, mask);
        const std::size_t size = (std::min)(bytes.size(), sent.size());
        if (!server && sent.size() < mask_at + 4) return;  // cut within the mask
        check_same(sent.substr(0, size), std::string_view(bytes).substr(0, size), "a frame that was sent is another");
        check(!closed || expected.opcode == 10, "something follows our Close frame");
        closed = closed || expected.opcode == 8;
        sent.remove_prefix(size);
    }
    check(sent.empty(), "something was sent that should not be");
}

// The other end understands all of it.
void check_understood(std::string_view sent, Role other) {
    Limits limits;
    limits.control_frames_per_second = 0;
    wschat::detail::SendArena arena;
    Connection peer;
    peer.open(other, limits, arena, {}, other == Role::client ? +[] { return wschat::detail::MaskKey{}; } : nullptr);
    Exact bytes(sent);
    peer.receive(bytes.data(), bytes.size(), {});
    while (peer.next_event().kind != Event::Kind::none) {
    }
    check(peer.close_cause() != CloseCause::protocol_error, "the other end does not understand what was sent",
          peer.close_reason());
}

void finish(Real& real) {
    Step drain, hang_up;
    drain.now = Call{What::drain, 255, {}};
    hang_up.now = Call{What::hang_up, 0, {}};
    real.take(drain);
    real.take(hang_up);
    check(real.closes == 1, "there is not one close event", std::to_string(real.closes));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const Conversation conversation = conversation_of(Choices(data, size));
    const bool server = conversation.role == Role::server;
    Real whole(conversation, Cutter(Cutter::Kind::whole));
    Model model(conversation, whole);
    for (const Step& step : conversation.steps) {
        const std::size_t at = whole.log.size();
        whole.take(step);
        model.take(step);
        check_same(std::string_view(whole.log).substr(at),
                   std::string_view(model.log).substr((std::min)(at, model.log.size())),
                   "the connection does something else than the model");
    }
    check_sent(whole.sent, model, server);
    check_understood(whole.sent, server ? Role::client : Role::server);
    finish(whole);

    std::size_t bytes = 0;
    for (const Step& step : conversation.steps) bytes += step.bytes.size();
    for (const Cutter::Kind kind : {Cutter::Kind::bytes, Cutter::Kind::random}) {
        if (kind == Cutter::Kind::bytes && bytes > 4000) continue;
        Real cut(conversation, Cutter(kind, conversation.seed));
        for (const Step& step : conversation.steps) cut.take(step);
        finish(cut);
        check_same(cut.log, whole.log, "how the bytes are cut changes what happens");
        check_same(cut.sent, whole.sent, "how the bytes are cut changes what is sent");
        check(cut.connection.close_reason() == whole.connection.close_reason(),
              "how the bytes are cut changes the reason");
    }
    return 0;
}
