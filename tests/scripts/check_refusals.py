#!/usr/bin/env python3
"""check_refusals.py COMPILER FLAG...: mistakes that must not compile, each beside its correction, which must.

Each is checked in C++17, C++20 and C++23, as far as the compiler knows them. The header itself, its examples and
all its optional parts compile without warnings in each of them.
"""
import concurrent.futures
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPILER, FLAGS = sys.argv[1], [flag for flag in sys.argv[2:] if not flag.startswith("-std=")]
WORK = pathlib.Path(tempfile.mkdtemp(prefix="wschat-refusals-"))
ALL = ["-DWSCHAT_CHAT=1", "-DWSCHAT_ZLIB=1", "-DWSCHAT_OPENSSL=1", "-DWSCHAT_SQLITE=1", "-DWSCHAT_LIBURING=1",
       "-DWSCHAT_HIREDIS=1"]

NO_ERROR_LIMIT = "-ferror-limit=0" if "clang" in COMPILER else "-fmax-errors=0"

HANDLER = """
    using namespace wschat;
    struct Handler : WebSocketHandler {
        void on_message(const Message& m) override { (void)m; %s }
    };
    void use(Server& server) { server.route<Handler>("/"); }
"""
FUNCTION = """
    using namespace wschat;
    %s
    void use(Server& server, Room& members, HandlerRef ref, detail::SendArena& arena, int* pointer) {
        (void)server, (void)members, (void)ref, (void)arena, (void)pointer;
        %s
    }
"""


def handler(wrong, right):
    return HANDLER % wrong, HANDLER % right


def function(wrong, right, before=""):
    return FUNCTION % (before, wrong), FUNCTION % (before, right)


SOME = "struct Some : WebSocketHandler { void on_message(const Message&) override {} };"

# Pairs of a mistake and its correction.
PAIRS = {
    "a list as a message": handler('write_message({"type", "hello"});', 'write_json({{"type", "hello"}});'),
    "a list of one": handler('write_message({"hello"});', 'write_message("hello");'),
    "a list with an opcode": handler('write_message({"a", "b"}, Opcode::binary);',
                                     'write_message("a", Opcode::binary);'),
    "a list as bytes": handler('write_binary({"a", "b"});', 'write_binary("ab");'),
    "a list as a volatile message": handler('write_volatile({"a", "b"});', 'write_volatile("ab");'),
    "a list as a ping": handler('ping({"a", "b"});', 'ping("ab");'),
    "a number as a message": handler("write_message(42);", "write_message(std::to_string(42));"),
    "a broadcast of a list": handler('room("all").broadcast({"type", "hello"});',
                                     'room("all").broadcast_json({{"type", "hello"}});'),
    "a broadcast of a list of bytes": handler('room("all").broadcast_binary({"a", "b"});',
                                              'room("all").broadcast_binary("ab");'),
    "a volatile broadcast of a list": handler('room("all").broadcast_volatile({"a", "b"});',
                                              'room("all").broadcast_volatile("ab");'),
    "an encoded list": handler('server().rooms().encode({"a", "b"});', 'server().rooms().encode("ab");'),
    "a list through a reference": function('ref.write_message({"type", "hello"});',
                                           'ref.write_json({{"type", "hello"}});'),
    "a list of bytes through a reference": function('ref.write_binary({"a", "b"});', 'ref.write_binary("ab");'),
    "a list as a page": function('Response(200, {"a", "b"});', 'Response(200, "ab");'),
    "JSON of a pointer": function("Json text(pointer);", "Json text(*pointer);"),
    "JSON of a pointer in an object": function('members.broadcast_json({{"a", pointer}});',
                                               'members.broadcast_json({{"a", *pointer}});'),
    "JSON of a wide text": function('Json text(L"wide");', 'Json text("narrow");'),
    "JSON of a function": function("Json text(&std::abort);", "Json text(true);"),
    "JSON of any object": function("struct Any {}; Json text{Any()};",
                                   "struct Any { std::string dump() const { return {}; } }; Json text{Any()};"),
    "JSON of char pointers": function("Json text(static_cast<void*>(nullptr));",
                                      'char text[] = "a"; char* p = text; const char* q = p; Json a(p), b(q), c(text);'),
    "fields of a temporary": function('Fields fields(std::string("A: b\\r\\n"));',
                                      'std::string lines = "A: b\\r\\n"; Fields fields(lines), literal("A: b\\r\\n");'),
    "a frame of a temporary": function('EncodedFrame::borrowed(arena, Opcode::text, std::string("a"));',
                                       'std::string a; EncodedFrame::borrowed(arena, Opcode::text, a);'),
    "a route without on_message": function('server.route<None>("/");', 'server.route<Some>("/");',
                                           "struct None : WebSocketHandler {};" + SOME),
    "a route of something else": function('server.route<std::string>("/");', 'server.route<Some>("/");',
                                          SOME),
    "a handler without its arguments": function(
        'server.route<Some>("/");', 'server.route<Some>("/", 1);',
        "struct Some : WebSocketHandler { Some(int) {} void on_message(const Message&) override {} };"),
    "a copied handler": handler("Handler copy(*this);", "HandlerRef copy = ref();"),
    "a copied server": function("Server copy(server);", "Server& same = server; (void)same;"),
    "a copied room": function("Room copy(members);", "Room& same = members; (void)same;"),
    "a number as a close code": handler("CloseCode code = 4001; close(code);", "CloseCode code{4001}; close(code);"),
    "a delay without a unit": function("server.loop().call_later(5, [] {});",
                                       "server.loop().call_later(std::chrono::seconds(5), [] {});"),
    "work with arguments": function("server.loop().post([](int) {});", "server.loop().post([] {});"),
    "a chat handler with its own on_message": function(
        'server.route<Chat>("/");', 'server.route<Chat>("/");',
        "struct Chat : ChatHandler { void on_message(const Message&) override {} };"),
}
# The correction of the last one is another class.
PAIRS["a chat handler with its own on_message"] = (
    PAIRS["a chat handler with its own on_message"][0],
    FUNCTION % ("struct Chat : ChatHandler { void on_said(const ChatEntry&) override {} };", 'server.route<Chat>("/");'))


def compile_unit(name, code, standard, *flags):
    unit = WORK / f"{name}.cpp"
    unit.write_text(code)
    done = subprocess.run([COMPILER, f"-std={standard}", *flags, "-I", ROOT, "-fsyntax-only", unit],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0, done.stderr


def known(standard):
    return compile_unit(f"known_{standard}", "", standard)[0]


def unit_of(kind, snippets):
    """One unit with all snippets. Errors name the snippet, as if each had a file of its own."""
    parts = [f'#line 1 "{kind}{i}"\nnamespace {kind}{i} {{ {code} }}\n' for i, code in enumerate(snippets)]
    return '#include "wschat.hpp"\n' + "".join(parts)


def unit_of_examples():
    """One unit with all examples: their headers first, then each in a namespace of its own."""
    sources = sorted((ROOT / "examples").glob("*.cpp"))
    headers = sorted({line for source in sources for line in source.read_text().splitlines()
                      if line.startswith("#include <")})
    parts = [f'namespace example_{source.stem} {{\n#define main example_main\n#include "{source}"\n#undef main\n}}\n'
             for source in sources]
    return '#include "wschat.hpp"\n' + "\n".join(headers) + "\n" + "".join(parts)


def check_mistakes(standard):
    code = unit_of("mistake", [mistake for mistake, _ in PAIRS.values()])
    _, errors = compile_unit(f"mistakes_{standard}", code, standard, "-DWSCHAT_CHAT=1", "-w", NO_ERROR_LIMIT)
    return [f"{standard}: {name} compiles" for i, name in enumerate(PAIRS) if f"mistake{i}:" not in errors]


def check_clean(standard, name, code, flags):
    clean, errors = compile_unit(f"{name}_{standard}", code, standard, *flags)
    return [] if clean else [f"{standard}: {name} must compile without warnings:\n{errors[:2000]}"]


def check(standard):
    strict = [*FLAGS, "-Werror"]
    problems = check_mistakes(standard)
    corrections = unit_of("correction", [correction for _, correction in PAIRS.values()])
    problems += check_clean(standard, "corrections", corrections, ["-DWSCHAT_CHAT=1"])
    problems += check_clean(standard, "header", '#include "wschat.hpp"\n', strict)
    problems += check_clean(standard, "header_with_all", '#include "wschat.hpp"\n', [*strict, *ALL])
    return problems + check_clean(standard, "examples", unit_of_examples(), [*strict, *ALL])


with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = list(pool.map(check, [s for s in ("c++17", "c++20", "c++23") if known(s)]))
sys.exit("\n".join(problem for problems in found for problem in problems) or 0)
