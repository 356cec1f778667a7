// Connection in both roles: a conversation of bytes and calls. The bytes are given whole, one by one and in random
// chunks. All three runs must give the same result, and the same as a model that reads each byte by itself.
//
// Input: a byte for the role and the limits, a byte for the chunks, then steps. A step begins with a byte whose value
// modulo 8 is its kind: 0 raw bytes (a count, the bytes), 1 a frame that the harness masks (its first byte, the mask,
// a count, the payload), 2 a large frame (its first byte, a size, the filler), 3-5 a call (the function, an amount,
// and for some a count and a text), 6-7 such a call from within the callback of the next event.
#include "fuzz.hpp"
#include "reference.hpp"

#include <deque>

namespace {

using namespace fuzz;
using namespace std::chrono_literals;

// ---- the conversation ----------------------------------------------------------------------------------------------

enum class Function {
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
    count
};

struct Call {
    Function function = Function::count;
    unsigned amount = 0;
    std::string text;
};

// Bytes from the peer, a call now, or a call from the callback of the next event.
struct Step {
    std::string bytes;
    std::optional<Call> now, in_callback;
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
std::string filler(std::size_t size, unsigned kind) {
    constexpr std::string_view units[] = {"a", "\xE2\x82\xAC", "\xF0\x9F\x98\x80z", "\xFF"};
    std::string text;
    while (text.size() < size) text += units[kind % 4];
    text.resize(size);
    if (kind >= 128 && size != 0) text[size / 2] = static_cast<char>(kind);
    return text;
}

// The payload that a call sends. The caller is responsible for valid UTF-8.
std::string payload_of(const Call& call) {
    const std::string payload = filler(size_of(call.amount), call.amount);
    return call.function != Function::send_text || reference_utf8(payload) ? payload : std::string(payload.size(), '.');
}

// RFC 6455 5.2: a frame with the shortest length. Without a mask it is a frame of a server.
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

Call call_of(InputReader& input) {
    Call call;
    call.function = static_cast<Function>(input.byte() % static_cast<unsigned>(Function::count));
    call.amount = input.byte();
    if (call.function == Function::ping || call.function == Function::pong || call.function == Function::close ||
        call.function == Function::fail)
        call.text = input.counted_bytes();
    return call;
}

Conversation conversation_of(InputReader input) {
    Conversation conversation;
    const unsigned set_up = input.byte();
    conversation.role = set_up % 2 == 0 ? Role::server : Role::client;
    conversation.limits = limits_of(set_up / 2);
    conversation.seed = input.byte();
    std::size_t size = 0;
    while (!input.empty() && size < 100'000 && conversation.steps.size() < 200) {
        const unsigned kind = input.byte() % 8;
        Step step;
        if (kind == 0) {
            step.bytes = input.counted_bytes();
        } else if (kind == 1) {
            const unsigned first = input.byte(), mask = input.byte();
            step.bytes = frame(first, input.counted_bytes(), mask_of(conversation.role, mask));
        } else if (kind == 2) {
            const unsigned first = input.byte(), amount = input.byte();
            step.bytes = frame(first, filler(size_of(amount), input.byte()), mask_of(conversation.role, amount));
        } else {
            const Call call = call_of(input);
            // The clock stands still within a callback.
            const bool clock =
                call.function == Function::wait || call.function == Function::tick || call.function == Function::alive;
            if (kind < 6) step.now = call;
            else if (!clock) step.in_callback = call;
        }
        size += step.bytes.size();
        const bool appends = kind < 3 && !conversation.steps.empty() && !conversation.steps.back().now &&
                             !conversation.steps.back().in_callback;
        if (appends) conversation.steps.back().bytes += step.bytes;
        else conversation.steps.push_back(std::move(step));
    }
    return conversation;
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
bool valid_close(const Call& call) {
    return sendable_close_code(code_of(call)) && call.text.size() <= 123 && reference_utf8(call.text);
}

// ---- the connection ------------------------------------------------------------------------------------------------

class RealConnection {
public:
    RealConnection(const Conversation& conversation, Chunker chunker)
        : role_(conversation.role), limits_(conversation.limits), chunker_(chunker) {
        masks_made = 0;
        connection.open(role_, limits_, arena_, now_, role_ == Role::client ? &next_mask : nullptr);
    }
    RealConnection(const RealConnection&) = delete;
    RealConnection& operator=(const RealConnection&) = delete;

    void run_step(const Step& step) {
        if (step.in_callback) callback_calls_.push_back(*step.in_callback);
        input_ += step.bytes;
        received_ += step.bytes.size();
        feed();
        if (step.now) {
            perform(*step.now);
            // A closing connection does not stay paused.
            if (paused_ && !connection.is_open()) resume();
            read_events();
            feed();
        }
        check_memory();
        log_state();
    }

    Connection connection;
    std::string log;
    std::string sent;
    std::size_t offered = 0;  // bytes of the last message that the transport took at once
    int closes = 0;

private:
    static wschat::detail::MaskKey next_mask() {
        ++masks_made;
        return {static_cast<unsigned char>(masks_made), 0x12, static_cast<unsigned char>(masks_made * 5), 0xF1};
    }

    // Passes the bytes in a copy that is freed afterwards, or in the connection's own receive area.
    void feed() {
        while (!paused_ && input_read_ != input_.size()) {
            const auto [area, area_size] = connection.receive_buffer();
            std::size_t size = chunker_.next_size(input_.size() - input_read_);
            const std::string_view piece(input_.data() + input_read_, size);
            if (area != nullptr && chunker_.flip()) {
                check(area_size != 0, "receive_buffer() is empty");
                size = (std::min)(size, area_size);
                std::memcpy(area, piece.data(), size);
                input_read_ += size;
                connection.receive(area, size, now_);
                read_events();
            } else {
                ExactCopy copy(piece);
                input_read_ += size;
                connection.receive(copy.data(), size, now_);
                read_events();
            }
        }
        if (input_read_ == input_.size()) {
            input_.clear();
            input_read_ = 0;
        }
    }

    void read_events() {
        while (!paused_) {
            const Event event = connection.next_event();
            if (event.kind == Event::Kind::none) return;
            if (event.kind == Event::Kind::paused) continue;
            log += described(event);
            if (event.kind == Event::Kind::close) ++closes;
            if (callback_calls_.empty()) continue;
            const Call call = callback_calls_.front();
            callback_calls_.pop_front();
            perform(call);
        }
    }

    void perform(const Call& call) {
        const std::string payload = payload_of(call);
        switch (call.function) {
            case Function::send_text: log += described(connection.send(Opcode::text, payload)); break;
            case Function::send_binary: log += described(connection.send(Opcode::binary, payload)); break;
            case Function::send_encoded:
                if (role_ == Role::server)
                    log += described(connection.send(wschat::EncodedFrame(arena_, Opcode::binary, payload)));
                break;
            case Function::send_offered: send_offered(call.amount); break;
            case Function::ping: send_control(Opcode::ping, call.text); break;
            case Function::pong: send_control(Opcode::pong, call.text); break;
            case Function::close: close(call); break;
            case Function::fail:
                if (reference_utf8(call.text))
                    connection.fail(CloseCode::internal_error, call.text, CloseCause::handler_exception);
                break;
            case Function::abort: connection.abort(CloseCause::backlog, "too much"); break;
            case Function::hang_up: connection.receive_eof("gone"); break;
            case Function::wait: now_ += call.amount * 250ms; break;
            case Function::tick:
                now_ += call.amount * 250ms;
                connection.tick(now_);
                check(connection.deadline() > now_ || connection.state() == Connection::State::closed,
                      "the deadline is not later than the tick");
                break;
            case Function::alive: connection.record_activity(now_); break;
            case Function::drain: drain(call.amount); break;
            case Function::block:
                connection.set_write_blocked(true);
                connection.output().detach_from_pool();
                break;
            case Function::unblock: connection.set_write_blocked(false); break;
            case Function::pause:
                if (paused_ || !connection.is_open()) break;
                connection.pause_input();
                paused_ = true;
                break;
            case Function::resume: resume(); break;
            case Function::count: break;
        }
    }

    void send_control(Opcode opcode, const std::string& text) {
        try {
            log += described(connection.send_control(opcode, text));
            check(text.size() <= 125, "a control frame of more than 125 bytes is accepted");
        } catch (const wschat::Error&) {
            check(text.size() > 125, "a valid control frame is rejected");
        }
    }
    void close(const Call& call) {
        try {
            connection.close(static_cast<CloseCode>(code_of(call)), call.text, now_);
            check(valid_close(call), "close() accepts an invalid code or reason");
        } catch (const wschat::Error&) {
            check(!valid_close(call), "close() rejects a valid code and reason");
        }
    }
    // Offers a message to a transport that takes a part of it, takes all of it, or fails.
    void send_offered(unsigned amount) {
        offered = 0;
        const std::string payload = filler(20'000, amount);
        const auto offer = [&](const std::string_view* pieces, std::size_t count) -> std::size_t {
            check(connection.is_open() && connection.output().empty() && !connection.write_blocked(),
                  "a message is offered while others are queued or the transport is blocked");
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

    // The transport takes some bytes. After the last one, a waiting pong is sent.
    void drain(unsigned amount) {
        std::size_t left = (std::min)(amount == 255 ? std::size_t(-1) : size_of(amount), connection.output().size());
        while (left != 0) {
            std::string_view pieces[3];
            const std::size_t count = connection.output().gather(pieces, 1 + amount % 3);
            check(count != 0, "the queue has bytes but gather() returns none");
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
        read_events();
        feed();
    }

    // The connection may hold four times the received bytes, but at most two messages, plus the unread input.
    void check_memory() {
        const std::size_t held = connection.buffered_input(), message = 2 * limits_.max_message_size;
        check(held <= (std::min)(4 * received_, message) + received_, "the connection holds too much memory",
              std::to_string(held));
    }
    void log_state() {
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
    Chunker chunker_;
    Time now_ = Time() + 1h;
    std::deque<Call> callback_calls_;
    std::string input_;
    std::size_t input_read_ = 0;
    std::size_t received_ = 0;
    bool paused_ = false;
};

// ---- the model -----------------------------------------------------------------------------------------------------

std::string cut(std::string reason) {
    while (reason.size() > 123 || !reference_utf8(reason)) reason.pop_back();
    return reason;
}
std::string close_body(unsigned code, const std::string& reason) {
    if (code == 1005) return {};
    return std::string{static_cast<char>(code >> 8), static_cast<char>(code & 0xFF)} + reason;
}

// A connection as RFC 6455 and the comments of the header describe it. Copies only the text of a close reason from the
// real connection.
class Model {
public:
    Model(const Conversation& conversation, const RealConnection& real)
        : server_(conversation.role == Role::server),
          limits_(conversation.limits),
          real_(real),
          tokens_(limits_.control_frames_burst) {}

    void run_step(const Step& step) {
        if (step.in_callback) callback_calls_.push_back(*step.in_callback);
        input_.erase(0, std::exchange(at_, 0u)).append(step.bytes);
        feed();
        if (step.now) {
            perform(*step.now);
            if (paused_ && state_ != State::open) resume();
            feed();
        }
        log_state();
    }

    struct Frame {
        unsigned opcode;
        std::string payload;
    };
    std::string log;
    std::vector<Frame> frames;   // sent or queued
    std::size_t bytes_sent = 0;  // bytes of them that the transport has taken

private:
    using State = Connection::State;

    // ---- input -----------------------------------------------------------------------------------------------------

    void feed() {
        while (!paused_) {
            if (state_ == State::closed && !std::exchange(reported_, true)) {
                event("close []");
            } else if (at_ == input_.size()) {
                return;
            } else {
                on_byte(input_[at_++]);
            }
        }
    }

    void on_byte(char c) {
        last_receive_ = now_;
        ping_sent_ = false;
        if (state_ == State::closed) return;
        if (!in_payload_) {
            header_ += c;
            if (!check_header()) return;
        } else {
            payload_ += static_cast<char>(c ^ (server_ ? header_[header_.size() - 4 + payload_.size() % 4] : 0));
            if (!control_ && text_ && !utf8_.feed(payload_.back())) return fail_protocol(1007);
        }
        in_payload_ = payload_.size() != length_;
        if (in_payload_) return;
        const std::string header = std::exchange(header_, ""), payload = std::exchange(payload_, "");
        if (control_) on_control_frame(header[0] & 0x0F, payload);
        else on_data_frame(header[0] < 0, payload);
    }

    // True if the header is complete and valid. An error is reported at the first byte that proves it.
    bool check_header() {
        const auto byte = [this](std::size_t i) { return static_cast<unsigned char>(header_[i]); };
        const std::size_t size = header_.size();
        const unsigned opcode = byte(0) & 0x0F;
        control_ = opcode >= 8;
        if ((byte(0) & 0x70) != 0) return fail_protocol(1002), false;
        if (opcode != 0 && opcode != 1 && opcode != 2 && opcode != 8 && opcode != 9 && opcode != 10)
            return fail_protocol(1002), false;
        if (control_ && (byte(0) & 0x80) == 0) return fail_protocol(1002), false;
        if (!control_ && (opcode == 0) != message_open_) return fail_protocol(1002), false;
        if (size < 2) return false;
        const unsigned form = byte(1) & 0x7F;
        if (((byte(1) & 0x80) != 0) != server_) return fail_protocol(1002), false;
        if (control_ && form > 125) return fail_protocol(1002), false;
        const std::size_t bytes = form == 126 ? 2 : form == 127 ? 8 : 0;
        std::uint64_t length = bytes == 0 ? form : 0;
        for (std::size_t i = 0; i < bytes && 2 + i < size; ++i) length = length << 8 | byte(2 + i);
        if (bytes == 2 && size >= 4 && length < 126) return fail_protocol(1002), false;
        if (bytes == 8 && size >= 3 && (byte(2) & 0x80) != 0) return fail_protocol(1002), false;
        if (bytes == 8 && size == 8 && length == 0) return fail_protocol(1002), false;
        if (size < 2 + bytes + (server_ ? 4 : 0)) return false;
        length_ = length;
        return control_ || check_size(opcode);
    }
    bool check_size(unsigned opcode) {
        if (opcode != 0) {
            message_.clear();
            fragments_ = 0;
            text_ = opcode == 1;
            utf8_ = Utf8Reference();
        }
        if (++fragments_ > limits_.max_fragments) return fail_protocol(1008), false;
        if (length_ > limits_.max_message_size - message_.size()) return fail_protocol(1009), false;
        return true;
    }

    void on_data_frame(bool last, const std::string& payload) {
        message_ += payload;
        message_open_ = !last;
        if (!last) return;
        if (text_ && !utf8_.complete()) return fail_protocol(1007);
        if (state_ == State::open) event((text_ ? "message text [" : "message binary [") + message_ + "]");
    }

    void on_control_frame(int opcode, const std::string& payload) {
        if (opcode == 8) return on_close_frame(payload);
        if (!take_token()) return fail_protocol(1008);
        if (opcode == 9 && blocked_) pong_ = payload;
        else if (opcode == 9) queue(10, payload);
        event((opcode == 9 ? "ping [" : "pong [") + payload + "]");
    }
    bool take_token() {
        if (limits_.control_frames_per_second == 0) return true;
        const double seconds = std::chrono::duration<double>(last_receive_ - tokens_updated_).count();
        tokens_updated_ = last_receive_;
        tokens_ = (std::min)(static_cast<double>(limits_.control_frames_burst),
                             tokens_ + seconds * limits_.control_frames_per_second) -
                  1;
        return tokens_ >= 0;
    }

    void on_close_frame(const std::string& payload) {
        if (payload.size() == 1) return fail_protocol(1002);
        const unsigned code =
            payload.empty() ? 1005
                            : static_cast<unsigned char>(payload[0]) * 256u + static_cast<unsigned char>(payload[1]);
        if (!payload.empty() && !sendable_close_code(code)) return fail_protocol(1002);
        if (!payload.empty() && !reference_utf8(payload.substr(2))) return fail_protocol(1007);
        if (state_ == State::open) queue(8, close_body(code, ""));
        end(state_ == State::closing ? cause_ : CloseCause::peer, code);
    }

    void event(const std::string& described) {
        log += described + "\n";
        if (callback_calls_.empty()) return;
        const Call call = callback_calls_.front();
        callback_calls_.pop_front();
        perform(call);
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    void fail_protocol(unsigned code) { fail(CloseCause::protocol_error, code, real_.connection.close_reason()); }
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
        const std::string payload = filler(20'000, amount);
        if (!server_ || queued_ != 0 || blocked_ || state_ != State::open) return send(2, payload);
        if (amount == 255) return abort(CloseCause::connection_lost), status(WriteStatus::closed);
        queue(2, payload);
        const std::size_t size = (std::min)(queued_, amount * std::size_t{100});
        bytes_sent += size;
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
        bytes_sent += size;
        queued_ -= size;
        if (queued_ == 0 && !blocked_ && pong_) {
            queue(10, *pong_);
            pong_.reset();
        }
    }

    // ---- calls -----------------------------------------------------------------------------------------------------

    void perform(const Call& call) {
        const std::string payload = payload_of(call);
        switch (call.function) {
            case Function::send_text: return send(1, payload);
            case Function::send_binary: return send(2, payload);
            case Function::send_encoded: return server_ ? send(2, payload) : void();
            case Function::send_offered: return send_offered(call.amount);
            case Function::ping: return send_control(9, call.text);
            case Function::pong: return send_control(10, call.text);
            case Function::close: return close(call);
            case Function::fail:
                return reference_utf8(call.text) ? fail(CloseCause::handler_exception, 1011, call.text) : void();
            case Function::abort: return abort(CloseCause::backlog);
            case Function::hang_up: return abort(CloseCause::connection_lost);
            case Function::wait: now_ += call.amount * 250ms; return;
            case Function::tick: now_ += call.amount * 250ms; return tick();
            case Function::alive: last_receive_ = now_, ping_sent_ = false; return;
            case Function::drain: return drain(call.amount);
            case Function::block: blocked_ = true; return;
            case Function::unblock: blocked_ = false; return;
            case Function::pause: paused_ = paused_ || state_ == State::open; return;
            case Function::resume: return resume();
            case Function::count: return;
        }
    }
    void close(const Call& call) {
        if (!valid_close(call) || state_ != State::open) return;
        queue(8, close_body(code_of(call), call.text));
        state_ = State::closing;
        cause_ = CloseCause::local;
        code_ = code_of(call);
        deadline_start_ = now_ + std::chrono::seconds(queued_ / 65536);
    }
    void resume() {
        if (!std::exchange(paused_, false)) return;
        last_receive_ = now_, ping_sent_ = false;
        feed();
    }

    Time deadline() const {
        const auto after = [](Time time, Duration timeout) { return timeout == 0s ? (Time::max)() : time + timeout; };
        if (state_ == State::closing) return after(deadline_start_, limits_.closing_timeout);
        if (state_ == State::closed || limits_.ping_interval == 0s) return (Time::max)();
        return ping_sent_ ? after(deadline_start_, limits_.ping_timeout) : after(last_receive_, limits_.ping_interval);
    }
    void tick() {
        if (now_ < deadline()) return;
        if (state_ == State::closing) return abort(CloseCause::closing_timeout);
        if (ping_sent_) return abort(CloseCause::ping_timeout);
        queue(9, "");
        ping_sent_ = true;
        deadline_start_ = now_;
    }

    void log_state() {
        log += "state " + std::to_string(static_cast<int>(state_)) + " code " + std::to_string(code_) + " cause " +
               std::string(to_string(cause_)) + " queued " + std::to_string(queued_) + " dropped " +
               std::to_string(dropped_) + " due " + std::to_string(deadline().time_since_epoch().count()) + "\n";
    }

    bool server_;
    Limits limits_;
    const RealConnection& real_;
    State state_ = State::open;
    CloseCause cause_ = CloseCause::none;
    unsigned code_ = 1005;
    bool reported_ = false, paused_ = false, blocked_ = false, ping_sent_ = false;
    Time now_ = Time() + 1h, last_receive_ = now_, deadline_start_{}, tokens_updated_ = now_;
    double tokens_;
    std::deque<Call> callback_calls_;
    std::string input_;
    std::size_t at_ = 0;
    std::string header_, payload_, message_;
    std::uint64_t length_ = 0;
    std::size_t fragments_ = 0, queued_ = 0, dropped_ = 0;
    bool in_payload_ = false, control_ = false, message_open_ = false, text_ = false;
    Utf8Reference utf8_;
    std::optional<std::string> pong_;
};

// ---- the checks ----------------------------------------------------------------------------------------------------

// The sent bytes are a prefix of the expected frames: unfragmented, masked only by a client, with the shortest length.
// After a Close frame only a pong may follow.
void check_sent(std::string_view sent, const Model& model, bool server) {
    check(sent.size() == model.bytes_sent, "the number of sent bytes differs from the model");
    bool closed = false;
    for (const Model::Frame& expected : model.frames) {
        const std::size_t mask_at = expected.payload.size() < 126 ? 2 : expected.payload.size() < 65536 ? 4 : 10;
        const std::string mask(server || sent.size() < mask_at + 4 ? "" : sent.substr(mask_at, 4));
        const std::string bytes = frame(0x80 | expected.opcode, expected.payload, mask);
        const std::size_t size = (std::min)(bytes.size(), sent.size());
        if (!server && sent.size() < mask_at + 4) return;  // the bytes end within the mask
        check_equal(sent.substr(0, size), std::string_view(bytes).substr(0, size),
                    "a sent frame differs from the model");
        check(!closed || expected.opcode == 10, "a frame follows the Close frame");
        closed = closed || expected.opcode == 8;
        sent.remove_prefix(size);
    }
    check(sent.empty(), "unexpected bytes were sent");
}

// The other role can read all sent bytes.
void check_readable(std::string_view sent, Role other) {
    Limits limits;
    limits.control_frames_per_second = 0;
    wschat::detail::SendArena arena;
    Connection peer;
    peer.open(other, limits, arena, {}, other == Role::client ? +[] { return wschat::detail::MaskKey{}; } : nullptr);
    ExactCopy bytes(sent);
    peer.receive(bytes.data(), bytes.size(), {});
    while (peer.next_event().kind != Event::Kind::none) {
    }
    check(peer.close_cause() != CloseCause::protocol_error, "the other role cannot read the sent bytes",
          peer.close_reason());
}

void finish(RealConnection& real) {
    Step drain, hang_up;
    drain.now = Call{Function::drain, 255, {}};
    hang_up.now = Call{Function::hang_up, 0, {}};
    real.run_step(drain);
    real.run_step(hang_up);
    check(real.closes == 1, "the number of close events is not 1", std::to_string(real.closes));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const Conversation conversation = conversation_of(InputReader(data, size));
    const bool server = conversation.role == Role::server;
    RealConnection whole(conversation, Chunker(Chunker::Kind::whole));
    Model model(conversation, whole);
    for (const Step& step : conversation.steps) {
        const std::size_t at = whole.log.size();
        whole.run_step(step);
        model.run_step(step);
        check_equal(std::string_view(whole.log).substr(at),
                    std::string_view(model.log).substr((std::min)(at, model.log.size())),
                    "the connection differs from the model");
    }
    check_sent(whole.sent, model, server);
    check_readable(whole.sent, server ? Role::client : Role::server);
    finish(whole);

    std::size_t bytes = 0;
    for (const Step& step : conversation.steps) bytes += step.bytes.size();
    for (const Chunker::Kind kind : {Chunker::Kind::bytes, Chunker::Kind::random}) {
        if (kind == Chunker::Kind::bytes && bytes > 4000) continue;
        RealConnection cut(conversation, Chunker(kind, conversation.seed));
        for (const Step& step : conversation.steps) cut.run_step(step);
        finish(cut);
        check_equal(cut.log, whole.log, "the chunks change the events");
        check_equal(cut.sent, whole.sent, "the chunks change the sent bytes");
        check(cut.connection.close_reason() == whole.connection.close_reason(), "the chunks change the close reason");
    }
    return 0;
}
