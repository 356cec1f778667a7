// The client of websocketpp, with the Asio transport, no logs and no locks (one thread); see measure.h.
#include "../websocketpp.hpp"
#include "measure.h"

#include <websocketpp/client.hpp>
#include <websocketpp/config/asio_no_tls_client.hpp>

#include <string>

namespace {

using Config = OneThread<websocketpp::config::asio_client>;
using Client = websocketpp::client<Config>;

}  // namespace

int main(int argc, char** argv) {
    measure_begin(argc, argv);
    Client client;
    client.clear_access_channels(websocketpp::log::alevel::all);
    client.clear_error_channels(websocketpp::log::elevel::all);
    client.init_asio();
    client.set_tcp_post_init_handler([&](websocketpp::connection_hdl h) {
        websocketpp::lib::asio::error_code ignored;
        client.get_con_from_hdl(h)->get_raw_socket().set_option(websocketpp::lib::asio::ip::tcp::no_delay(true),
                                                                ignored);
    });
    client.set_open_handler([&](websocketpp::connection_hdl h) {
        measure_open();
        client.get_con_from_hdl(h)->send(std::string(measure_size, 'x'), websocketpp::frame::opcode::text);
    });
    client.set_message_handler([&](websocketpp::connection_hdl h, const Client::message_ptr& message) {
        measure_messages = measure_messages + 1;
        client.get_con_from_hdl(h)->send(message->get_payload(), message->get_opcode());
    });
    client.set_fail_handler([](websocketpp::connection_hdl) { measure_fail("websocketpp: cannot connect"); });
    client.set_close_handler([](websocketpp::connection_hdl) { measure_fail("websocketpp: a connection was lost"); });
    for (int i = 0; i < measure_connections; ++i) {
        websocketpp::lib::error_code error;
        client.connect(client.get_connection("ws://127.0.0.1:" + std::to_string(measure_port) + "/", error));
    }
    client.run();
}
