// beast PORT room|echo: the peer for Boost.Beast, based on its chat example (asynchronous, one thread, a queue of
// shared strings per session).

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/websocket.hpp>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>

namespace {

namespace beast = boost::beast;
namespace websocket = beast::websocket;
namespace net = boost::asio;
using net::ip::tcp;

struct Outgoing {
    std::string payload;
    bool text;
};

class Session;
std::unordered_set<Session*> room;
bool echo = false;

class Session : public std::enable_shared_from_this<Session> {
public:
    explicit Session(tcp::socket&& socket) : ws_(std::move(socket)) {}
    ~Session() { room.erase(this); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void start() {
        beast::get_lowest_layer(ws_).socket().set_option(tcp::no_delay(true));
        ws_.set_option(websocket::stream_base::timeout::suggested(beast::role_type::server));
        ws_.auto_fragment(false);
        ws_.async_accept([self = shared_from_this()](beast::error_code error) {
            if (error) return;
            room.insert(self.get());
            self->read();
        });
    }

    void send(std::shared_ptr<const Outgoing> message) {
        queue_.push_back(std::move(message));
        if (queue_.size() == 1) write();
    }

private:
    void read() {
        ws_.async_read(buffer_, [self = shared_from_this()](beast::error_code error, std::size_t) {
            if (error) return;
            if (echo) self->write_back();
            else self->broadcast();
        });
    }
    void write_back() {  // reads and writes use the same buffer
        ws_.text(ws_.got_text());
        ws_.async_write(buffer_.data(), [self = shared_from_this()](beast::error_code error, std::size_t) {
            if (error) return;
            self->buffer_.consume(self->buffer_.size());
            self->read();
        });
    }
    void broadcast() {
        const auto message =
            std::make_shared<const Outgoing>(Outgoing{beast::buffers_to_string(buffer_.data()), ws_.got_text()});
        buffer_.consume(buffer_.size());
        for (Session* each : room) each->send(message);
        read();
    }
    void write() {
        ws_.text(queue_.front()->text);
        ws_.async_write(net::buffer(queue_.front()->payload),
                        [self = shared_from_this()](beast::error_code error, std::size_t) {
                            if (error) return;
                            self->queue_.pop_front();
                            if (!self->queue_.empty()) self->write();
                        });
    }

    websocket::stream<beast::tcp_stream> ws_;
    beast::flat_buffer buffer_;
    std::deque<std::shared_ptr<const Outgoing>> queue_;
};

void accept(tcp::acceptor& acceptor) {
    acceptor.async_accept([&acceptor](beast::error_code error, tcp::socket socket) {
        if (!error) std::make_shared<Session>(std::move(socket))->start();
        accept(acceptor);
    });
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 3) return std::fputs("usage: beast PORT room|echo\n", stderr), 1;
    echo = std::strcmp(argv[2], "echo") == 0;
    net::io_context loop{1};
    tcp::acceptor acceptor{loop, {net::ip::make_address("127.0.0.1"), static_cast<unsigned short>(std::atoi(argv[1]))}};
    acceptor.listen(4096);
    accept(acceptor);
    net::signal_set signals{loop, SIGINT, SIGTERM};
    signals.async_wait([](beast::error_code, int) { std::_Exit(0); });
    std::printf("beast: listening on 127.0.0.1:%s\n", argv[1]);
    std::fflush(stdout);
    loop.run();
} catch (const std::exception& e) {
    return std::fprintf(stderr, "beast: %s\n", e.what()), 1;
}
