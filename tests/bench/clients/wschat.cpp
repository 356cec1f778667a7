// The client of wschat, see measure.h.
#include "measure.h"

#include "../../../wschat.hpp"

struct Echo : wschat::WebSocketHandler {
    void open() override {
        measure_open();
        write_message(std::string(measure_size, 'x'));
    }
    void on_message(const wschat::Message& m) override {
        measure_messages = measure_messages + 1;
        write_message(m);
    }
    void on_close() override { measure_fail("wschat: a connection was lost"); }
    void on_failure(const wschat::ConnectError& error) override { measure_fail(error.sentence.c_str()); }
};

int main(int argc, char** argv) {
    measure_begin(argc, argv);
    wschat::ClientOptions options;
    options.limits.max_message_size = options.limits.max_backlog = 64 * 1024 * 1024;
    wschat::Client client;
    for (int i = 0; i < measure_connections; ++i)
        client.connect<Echo>("ws://127.0.0.1:" + std::to_string(measure_port) + "/", options);
    client.run();
}
