// Windows: files, half-closed clients, inheritance, texts of errors, the chat on two loops, and the end of the console.
// tests/platforms.sh builds this program with MinGW and runs it under Wine.
//
//   windows_test FOLDER         the tests; the program may fill the folder
//   windows_test FOLDER serve   a chat with two loops for foreign clients; it prints its port, and ends after Ctrl-C
#define WSCHAT_CHAT 1
#include "../../wschat.hpp"

#include <cstdio>
#include <thread>

namespace {

using namespace std::chrono_literals;
using wschat::detail::File;
namespace os = wschat::detail::os;

int failures = 0;
void expect(bool holds, const std::string& sentence) {
    std::printf("%s: %s\n", holds ? "passed" : "FAILED", sentence.c_str());
    std::fflush(stdout);
    if (!holds) ++failures;
}

void write_file(const std::string& path, const std::string& content) {
    const HANDLE file = ::CreateFileW(os::to_wide(path).c_str(), GENERIC_WRITE, 0, nullptr, CREATE_ALWAYS, 0, nullptr);
    DWORD written = 0;
    ::WriteFile(file, content.data(), static_cast<DWORD>(content.size()), &written, nullptr);
    ::CloseHandle(file);
}

// A blocking client.
class Client {
public:
    explicit Client(int port) : socket_(::WSASocketW(AF_INET, SOCK_STREAM, 0, nullptr, 0, WSA_FLAG_OVERLAPPED)) {
        sockaddr_in in{};
        in.sin_family = AF_INET;
        in.sin_port = htons(static_cast<std::uint16_t>(port));
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (::connect(socket_, reinterpret_cast<sockaddr*>(&in), sizeof in) != 0) std::abort();
        const DWORD timeout = 30'000;
        ::setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, reinterpret_cast<const char*>(&timeout), sizeof timeout);
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    ~Client() { ::closesocket(socket_); }
    void send(const std::string& bytes) { ::send(socket_, bytes.data(), static_cast<int>(bytes.size()), 0); }
    void get(const std::string& path) { send("GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); }
    void shutdown_send() { ::shutdown(socket_, SD_SEND); }
    // Returns what arrives up to the end of the text; all that arrived if the text does not.
    std::string read_until(const std::string& text) {
        while (received_.find(text) == std::string::npos)
            if (!receive()) return std::exchange(received_, {});
        const std::size_t end = received_.find(text) + text.size();
        const std::string found = received_.substr(0, end);
        received_.erase(0, end);
        return found;
    }
    std::string read_all() {
        while (receive()) {
        }
        return std::exchange(received_, {});
    }
    void upgrade(const std::string& path) {
        send("GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
             "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n");
        expect(read_until("\r\n\r\n").find(" 101 ") != std::string::npos, "a client gets 101");
    }
    // A text frame, masked with zeros. At most 125 bytes.
    void say(const std::string& text) {
        send(std::string{'\x81', static_cast<char>(0x80u | text.size()), '\0', '\0', '\0', '\0'} + text);
    }

private:
    bool receive() {
        char buffer[65536];
        const int n = ::recv(socket_, buffer, sizeof buffer, 0);
        if (n > 0) received_.append(buffer, static_cast<std::size_t>(n));
        return n > 0;
    }

    SOCKET socket_;
    std::string received_;  // and not yet returned
};

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& message) override { write_message(message.text()); }
};

bool inheritable(os::Descriptor descriptor) {
    DWORD flags = 0;
    return ::GetHandleInformation(reinterpret_cast<HANDLE>(descriptor), &flags) == 0 ||
           (flags & HANDLE_FLAG_INHERIT) != 0;
}

void test_descriptors() {
    const wschat::detail::Socket socket(os::open_socket(AF_INET));
    const wschat::detail::WakeUp wake_up;
    expect(!inheritable(socket.descriptor()), "a socket is not inheritable");
    expect(!inheritable(wake_up.descriptor()), "the wake-up socket is not inheritable");
    expect(os::error_text(WSAEPFNOSUPPORT).find("nknown") == std::string::npos, "a number of Winsock has a text");
    WSASetLastError(WSAECONNREFUSED);
    expect(os::error_text(os::last_error()).find("refused") != std::string::npos, "a refused connection has its text");
}

void test_files(const std::string& folder) {
    // U+00E9 and U+4E2D, which no ANSI code page has together.
    const std::string name = "caf\xC3\xA9\xE4\xB8\xAD.txt";
    write_file(folder + "/" + name, "unicode");
    write_file(folder + "/page.html", "page");
    ::CreateDirectoryW(os::to_wide(folder + "/sub folder with a long name").c_str(), nullptr);
    write_file(folder + "/sub folder with a long name/inner.txt", "inner");
    expect(static_cast<bool>(File(folder + "/" + name)), "a name in UTF-8 opens");
    expect(File(folder + "/").error() == EISDIR, "a folder with a slash at its end is a folder");
    expect(File(folder + "/none").error() == ENOENT, "a missing file is ENOENT");
    expect(File("\xFF.txt").error() == ENOENT, "a name that is not UTF-8 is ENOENT");
    expect(File("NUL").error() == ENOENT, "a device is ENOENT");
    const auto opens = [&](const std::vector<std::string>& names) {
        return static_cast<bool>(File::beneath(folder, names, wschat::SymbolicLinks::refuse));
    };
    expect(opens({"page.html"}), "a file of the folder opens");
    expect(opens({"sub folder with a long name", "inner.txt"}), "a file of a folder below opens");
    for (const char* device : {"NUL", "con", "COM1", "nul.txt", "AUX .html", "CONIN$"})
        expect(!opens({device}), std::string("no device below a folder: ") + device);
    wchar_t short_name[512];
    const std::wstring long_name = os::to_wide(folder + "/sub folder with a long name");
    const DWORD size = ::GetShortPathNameW(long_name.c_str(), short_name, 512);
    std::string short_text = os::from_wide({short_name, size});
    short_text.erase(0, short_text.find_last_of("/\\") + 1);
    expect(short_text.find('~') == std::string::npos || !opens({short_text, "inner.txt"}), "a short name is refused");
    expect(os::executable_path().find(".exe") != std::string::npos, "the program knows its path");
}

// Raises a control event as the system does: on a thread of its own that runs kernelbase's routine. Returns the thread.
// (Wine 8 ends a program without an event if the window of its console is closed.)
HANDLE raise_console_event(DWORD event) {
    const HMODULE kernel = ::GetModuleHandleA("kernelbase.dll");
    void* const routine = reinterpret_cast<void*>(::GetProcAddress(kernel, "CtrlRoutine"));
    expect(routine != nullptr, "kernelbase has CtrlRoutine");
    if (routine == nullptr) return nullptr;
    LPTHREAD_START_ROUTINE start = nullptr;
    std::memcpy(&start, &routine, sizeof start);
    void* const argument = reinterpret_cast<void*>(static_cast<std::uintptr_t>(event));
    return ::CreateThread(nullptr, 0, start, argument, 0, nullptr);
}

// A message reaches the users of a room on both loops.
void test_chat(int port) {
    std::vector<std::unique_ptr<Client>> users;
    for (int i = 0; i < 6; ++i) {
        users.push_back(std::make_unique<Client>(port));
        users.back()->upgrade("/chat/tea?name=user" + std::to_string(i));
        const std::string joined = users.back()->read_until("\"type\":\"history\"");
        expect(joined.find("\"type\":\"hello\"") != std::string::npos, "a user joins the room");
    }
    users.front()->say("Is there tea?");
    for (const auto& user : users)
        expect(user->read_until("Is there tea?").find("\"said\"") != std::string::npos, "each user gets the message");
}

void test_server(const std::string& folder) {
    constexpr std::size_t large = 30 * 1024 * 1024;
    write_file(folder + "/large.bin", std::string(large, 'x'));
    for (const DWORD event : {DWORD{CTRL_C_EVENT}, DWORD{CTRL_CLOSE_EVENT}}) {
        wschat::ServerOptions options;
        options.threads = 2;
        wschat::Server server(options);
        server.static_dir("/files/", folder + "/");
        server.route<Echo>("/echo");
        server.route<wschat::ChatHandler>("/chat/{room}");
        server.listen(0);
        std::thread loop([&] { server.run(); });
        Client half(server.port());
        half.get("/files/large.bin");
        half.shutdown_send();
        const std::string answer = half.read_all();
        const std::size_t head = answer.find("\r\n\r\n") + 4;
        expect(answer.size() - head == large, "a client that ended its sending side gets 30 MB");
        Client page(server.port());
        page.get("/files/caf%C3%A9%E4%B8%AD.txt");
        expect(page.read_all().find("unicode") != std::string::npos, "a path in UTF-8 is served");
        std::vector<std::unique_ptr<Client>> crowd;
        for (int i = 0; i < 200; ++i) crowd.push_back(std::make_unique<Client>(server.port()));
        Client echo(server.port());
        echo.upgrade("/echo");
        echo.say("hi");
        expect(echo.read_until("hi") == "\x81\x02hi", "with 200 other connections, a message is echoed");
        crowd.clear();
        test_chat(server.port());
        const HANDLE raised = raise_console_event(event);
        expect(echo.read_until("\x03\xE9").find("\x03\xE9") != std::string::npos,
               "at the end of the console, clients get 1001");
        echo.send({"\x88\x82\0\0\0\0\x03\xE9", 8});
        loop.join();
        expect(true, "run() returns");
        if (event == CTRL_C_EVENT)
            expect(::WaitForSingleObject(raised, 60'000) == WAIT_OBJECT_0, "the handler of Ctrl-C returns");
        else
            expect(::WaitForSingleObject(raised, 0) == WAIT_TIMEOUT, "Windows does not end a program that says goodbye");
        ::CloseHandle(raised);
    }
}

int serve() {
    wschat::ServerOptions options;
    options.threads = 2;
    wschat::Server server(options);
    server.on_log(wschat::log_to_stderr);
    server.route<wschat::ChatHandler>("/chat/{room}");
    server.listen(0);
    std::printf("port %d\n", server.port());
    std::fflush(stdout);
    server.run();
    std::printf("run() returned\n");
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string folder = os::absolute_path(count > 1 ? arguments[1] : "windows_test_files");
    ::CreateDirectoryW(os::to_wide(folder).c_str(), nullptr);
    if (count > 2 && std::string(arguments[2]) == "serve") return serve();
    test_descriptors();
    test_files(folder);
    test_server(folder);
    std::printf("%d failed\n", failures);
    return failures == 0 ? 0 : 1;
}
