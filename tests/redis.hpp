// A real Redis for tests: redis-server on a free port, or on a Unix socket, with a folder of its own.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>
#include <vector>

#include "support.hpp"

namespace test {

class RedisServer {
public:
    explicit RedisServer(std::vector<std::string> options = {}) : options_(std::move(options)) {
        char folder[] = "/tmp/wschat-redis-XXXXXX";
        REQUIRE(::mkdtemp(folder) != nullptr);
        folder_ = folder;
        port_ = free_port();
        start();
    }
    RedisServer(const RedisServer&) = delete;
    RedisServer& operator=(const RedisServer&) = delete;
    ~RedisServer() {
        kill();
        erase();
        ::rmdir(folder_.c_str());
    }

    std::string url(const std::string& user = "") const {
        return "redis://" + user + "127.0.0.1:" + std::to_string(port_);
    }
    std::string socket() const { return folder_ + "/redis.sock"; }
    void start() {
        std::vector<std::string> words{"redis-server",
                                       "--port",
                                       std::to_string(port_),
                                       "--bind",
                                       "127.0.0.1",
                                       "--unixsocket",
                                       socket(),
                                       "--dir",
                                       folder_,
                                       "--save",
                                       "",
                                       "--appendonly",
                                       "yes",
                                       "--appendfsync",
                                       "always",
                                       "--daemonize",
                                       "no",
                                       "--loglevel",
                                       "warning"};
        words.insert(words.end(), options_.begin(), options_.end());
        process_ = ::fork();
        REQUIRE(process_ >= 0);
        if (process_ == 0) execute(words);
        const auto until = wschat::Clock::now() + deadline;
        while (!answers() && wschat::Clock::now() < until) std::this_thread::sleep_for(10ms);
        REQUIRE(answers());
    }
    void signal(int number) const { ::kill(process_, number); }
    void kill() {
        if (process_ <= 0) return;
        ::kill(process_, SIGKILL);
        ::waitpid(process_, nullptr, 0);
        process_ = 0;
    }
    // Removes the data. Only while it does not run.
    void erase() const { remove_all(folder_); }
    // The answer of redis-cli.
    std::string cli(const std::string& command) const {
        FILE* pipe = ::popen(("redis-cli -p " + std::to_string(port_) + " " + command + " 2>&1").c_str(), "r");
        REQUIRE(pipe != nullptr);
        std::string output;
        for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output += static_cast<char>(c);
        ::pclose(pipe);
        return output;
    }
    static int free_port() {
        const int descriptor = ::socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof address;
        REQUIRE(::bind(descriptor, reinterpret_cast<sockaddr*>(&address), size) == 0);
        REQUIRE(::getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size) == 0);
        ::close(descriptor);
        return ntohs(address.sin_port);
    }

private:
    [[noreturn]] static void execute(std::vector<std::string>& words) {
        std::vector<char*> arguments;
        for (std::string& each : words) arguments.push_back(each.data());
        arguments.push_back(nullptr);
        const int nothing = ::open("/dev/null", O_RDWR);
        for (const int descriptor : {0, 1, 2}) ::dup2(nothing, descriptor);
        for (int descriptor = 3; descriptor < 1024; ++descriptor) ::close(descriptor);
        ::execvp(arguments[0], arguments.data());
        ::_exit(127);
    }
    // Whether it has opened its socket.
    bool answers() const {
        const int descriptor = ::socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.sin_port = htons(static_cast<std::uint16_t>(port_));
        const bool connected = ::connect(descriptor, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
        ::close(descriptor);
        return connected;
    }
    static void remove_all(const std::string& folder) {
        DIR* const directory = ::opendir(folder.c_str());
        if (directory == nullptr) return;
        for (const dirent* entry = ::readdir(directory); entry != nullptr; entry = ::readdir(directory)) {
            const std::string name = entry->d_name;
            if (name == "." || name == "..") continue;
            remove_all(folder + "/" + name);
            ::rmdir((folder + "/" + name).c_str());
            ::unlink((folder + "/" + name).c_str());
        }
        ::closedir(directory);
    }

    std::vector<std::string> options_;
    std::string folder_;
    int port_ = 0;
    pid_t process_ = 0;
};

}  // namespace test
