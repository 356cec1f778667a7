// websocketpp PORT room|echo: the peer for websocketpp, with the Asio transport, no logs and no locks (one thread).
// The library's own processor prepares a broadcast once; its example would encode it per member.

#include "../websocketpp.hpp"

#include <websocketpp/config/asio_no_tls.hpp>
#include <websocketpp/server.hpp>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

namespace {

using Config = OneThread<websocketpp::config::asio>;
using Server = websocketpp::server<Config>;
using Processor = websocketpp::processor::hybi13<Config>;

std::unordered_set<Server::connection_type*> room;

void broadcast(Processor& processor, const Server::message_ptr& message) {
    const auto prepared = std::make_shared<Config::message_type>(nullptr);
    if (processor.prepare_data_frame(message, prepared)) return;
    for (Server::connection_type* each : room) each->send(prepared);
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 3) return std::fputs("usage: websocketpp PORT room|echo\n", stderr), 1;
    const bool echo = std::strcmp(argv[2], "echo") == 0;
    Server server;
    Config::rng_type random;
    Processor processor(false, true, std::make_shared<Config::con_msg_manager_type>(), random);
    server.clear_access_channels(websocketpp::log::alevel::all);
    server.clear_error_channels(websocketpp::log::elevel::all);
    server.init_asio();
    server.set_reuse_addr(true);
    server.set_listen_backlog(4096);
    server.set_tcp_post_init_handler([&](websocketpp::connection_hdl h) {
        websocketpp::lib::asio::error_code ignored;
        server.get_con_from_hdl(h)->get_raw_socket().set_option(websocketpp::lib::asio::ip::tcp::no_delay(true),
                                                                ignored);
    });
    server.set_open_handler([&](websocketpp::connection_hdl h) { room.insert(server.get_con_from_hdl(h).get()); });
    server.set_close_handler([&](websocketpp::connection_hdl h) { room.erase(server.get_con_from_hdl(h).get()); });
    server.set_message_handler([&](websocketpp::connection_hdl h, const Server::message_ptr& message) {
        if (echo) server.get_con_from_hdl(h)->send(message);
        else broadcast(processor, message);
    });
    server.listen(websocketpp::lib::asio::ip::address::from_string("127.0.0.1"),
                  static_cast<uint16_t>(std::atoi(argv[1])));
    server.start_accept();
    std::signal(SIGTERM, [](int) { std::_Exit(0); });
    std::signal(SIGINT, [](int) { std::_Exit(0); });
    std::printf("websocketpp: listening on 127.0.0.1:%s\n", argv[1]);
    std::fflush(stdout);
    server.run();
} catch (const std::exception& e) {
    return std::fprintf(stderr, "websocketpp: %s\n", e.what()), 1;
}
