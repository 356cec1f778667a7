// One server of a cluster, for run.py.   cluster_node PORT REDIS room|chat
//
// room: every message goes to every connection of all nodes, through RedisCluster. chat: the ready-made chat with its
// history in Redis, without its limits of rates.
#define WSCHAT_CHAT 1
#include "../../../wschat.hpp"

namespace {

struct Member : wschat::WebSocketHandler {
    void open() override { room("all").join(*this); }
    void on_message(const wschat::Message& m) override { room("all").broadcast(m); }
};

void serve_chat(wschat::Server& server, const std::string& redis) {
    wschat::ChatHub& hub = wschat::ChatHub::of(server);
    wschat::HistoryLimits history{0, 0, wschat::Duration::zero(), 0, 0};  // keeps everything
    hub.set_store(wschat::RedisHistory(redis, {}, history));
    hub.limits.connection = hub.limits.address = wschat::FloodRates();
    hub.limits.replies = hub.limits.address_replies = wschat::Rate();
    hub.limits.fan_out = hub.limits.address_fan_out = wschat::Rate();
    hub.limits.room_creations = hub.limits.address_room_creations = wschat::Rate();
    server.route<wschat::ChatHandler>("/{room}");
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string mode = argc == 4 ? argv[3] : "";
    if (mode != "room" && mode != "chat") throw wschat::Error("usage: cluster_node PORT REDIS room|chat");
    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    if (mode == "chat") serve_chat(server, argv[2]);
    else server.join_cluster(wschat::RedisCluster(argv[2]));
    if (mode == "room") server.route<Member>("/");
    server.listen(argv[1]);
    std::printf("cluster_node: %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "cluster_node: %s\n", error.what());
    return 1;
}
