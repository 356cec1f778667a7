// The client of Boost.Beast, in the shape of its asynchronous example; see measure.h.
#include "measure.h"

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/websocket.hpp>

#include <memory>
#include <string>
#include <vector>

namespace {

namespace beast = boost::beast;
namespace websocket = beast::websocket;
namespace net = boost::asio;
using net::ip::tcp;

class Session {
public:
    explicit Session(net::io_context& loop) : ws_(loop), first_(measure_size, 'x') {}

    void start(const tcp::endpoint& server) {
        ws_.next_layer().async_connect(server, [this](beast::error_code error) {
            if (error) measure_fail("beast: cannot connect");
            ws_.next_layer().set_option(tcp::no_delay(true));
            ws_.auto_fragment(false);
            ws_.read_message_max(64 * 1024 * 1024);
            ws_.async_handshake("127.0.0.1", "/", [this](beast::error_code refused) {
                if (refused) measure_fail("beast: no handshake");
                measure_open();
                ws_.text(true);
                ws_.async_write(net::buffer(first_), [this](beast::error_code lost, std::size_t) { next(lost); });
            });
        });
    }

private:
    void next(beast::error_code error) {
        if (error) measure_fail("beast: a connection was lost");
        ws_.async_read(buffer_, [this](beast::error_code lost, std::size_t) { write_back(lost); });
    }
    void write_back(beast::error_code error) {
        if (error) measure_fail("beast: a connection was lost");
        measure_messages = measure_messages + 1;
        ws_.text(ws_.got_text());
        ws_.async_write(buffer_.data(), [this](beast::error_code lost, std::size_t) {
            buffer_.consume(buffer_.size());
            next(lost);
        });
    }

    websocket::stream<tcp::socket> ws_;
    beast::flat_buffer buffer_;
    std::string first_;
};

}  // namespace

int main(int argc, char** argv) {
    measure_begin(argc, argv);
    net::io_context loop{1};
    const tcp::endpoint server{net::ip::make_address("127.0.0.1"), static_cast<unsigned short>(measure_port)};
    std::vector<std::unique_ptr<Session>> sessions;
    for (int i = 0; i < measure_connections; ++i) {
        sessions.push_back(std::make_unique<Session>(loop));
        sessions.back()->start(server);
    }
    loop.run();
}
