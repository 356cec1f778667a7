// An echo server with Boost.Beast, in the shape of its example of an asynchronous server, for client_test.py: prints its
// port. See client_servers.mjs for its commands.
//
//   client_server_beast [deflate]

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/websocket.hpp>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

namespace {

namespace beast = boost::beast;
namespace http = beast::http;
namespace websocket = beast::websocket;
namespace net = boost::asio;
using net::ip::tcp;

bool deflate = false;

class Session : public std::enable_shared_from_this<Session> {
public:
    explicit Session(tcp::socket&& socket) : ws_(std::move(socket)) {}

    void start() {
        http::async_read(ws_.next_layer(), buffer_, request_,
                         [self = shared_from_this()](beast::error_code error, std::size_t) {
                             if (!error) self->accept();
                         });
    }

private:
    void accept() {
        websocket::permessage_deflate options;
        options.server_enable = deflate;
        ws_.set_option(options);
        ws_.read_message_max(std::size_t{1} << 26);
        if (std::string(request_[http::field::sec_websocket_protocol]).find("two") != std::string::npos)
            protocol_ = "two";
        ws_.set_option(websocket::stream_base::decorator([this](websocket::response_type& response) {
            if (!protocol_.empty()) response.set(http::field::sec_websocket_protocol, protocol_);
            compressed_ = response.count(http::field::sec_websocket_extensions) != 0;
        }));
        ws_.control_callback([this](websocket::frame_type kind, beast::string_view data) {
            if (kind == websocket::frame_type::pong) pong_ = "pong " + std::string(data);
            if (kind == websocket::frame_type::pong) answer(pong_, true);
        });
        ws_.async_accept(request_, [self = shared_from_this()](beast::error_code error) {
            if (!error) self->read();
        });
    }
    void read() {
        ws_.async_read(buffer_, [self = shared_from_this()](beast::error_code error, std::size_t) {
            if (!error) self->take();
        });
    }
    void take() {
        const std::string text = beast::buffers_to_string(buffer_.data());
        const bool is_text = ws_.got_text();
        buffer_.consume(buffer_.size());
        if (text.rfind("close ", 0) == 0) {
            const auto code = static_cast<websocket::close_code>(std::atoi(text.c_str() + 6));
            const websocket::close_reason reason(code, text.substr(text.rfind(' ') + 1));
            return ws_.async_close(reason, [self = shared_from_this()](beast::error_code) {});
        }
        if (text == "ping") ws_.async_ping("payload", [self = shared_from_this()](beast::error_code) {});
        else if (text == "extensions")
            answer(std::string("extensions: ") + (compressed_ ? "permessage-deflate" : "") + " protocol: " + protocol_,
                   true);
        else return answer(text, is_text, true);
        read();
    }
    void answer(const std::string& text, bool is_text, bool then_read = false) {
        const auto kept = std::make_shared<const std::string>(text);
        ws_.text(is_text);
        ws_.async_write(net::buffer(*kept),
                        [self = shared_from_this(), kept, then_read](beast::error_code error, std::size_t) {
                            if (!error && then_read) self->read();
                        });
    }

    websocket::stream<tcp::socket> ws_;
    beast::flat_buffer buffer_;
    http::request<http::string_body> request_;
    std::string protocol_, pong_;
    bool compressed_ = false;
};

void accept(tcp::acceptor& acceptor) {
    acceptor.async_accept([&acceptor](beast::error_code error, tcp::socket socket) {
        if (!error) std::make_shared<Session>(std::move(socket))->start();
        accept(acceptor);
    });
}

}  // namespace

int main(int argc, char** argv) {
    deflate = argc > 1 && std::string(argv[1]) == "deflate";
    net::io_context loop{1};
    tcp::acceptor acceptor{loop, {net::ip::make_address("127.0.0.1"), 0}};
    accept(acceptor);
    std::printf("%d\n", acceptor.local_endpoint().port());
    std::fflush(stdout);
    loop.run();
}
