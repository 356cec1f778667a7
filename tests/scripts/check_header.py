#!/usr/bin/env python3
"""check_header.py CHECK COMPILER FLAG...: checks of wschat.hpp, its examples and its README that no unit test can make.

Ends with status 0, or prints what is wrong and ends with status 1.
"""
import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import header_names

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER = (ROOT / "wschat.hpp").read_text(encoding="utf-8")
LINES = HEADER.split("\n")
COMPILER, FLAGS = sys.argv[2:3], sys.argv[3:]
WORK = pathlib.Path(tempfile.mkdtemp(prefix="wschat-check-"))

# The optional parts that exist, with the libraries that each one needs. WSCHAT_HIREDIS is reserved and switches on nothing.
FEATURES = {"WSCHAT_CHAT": [], "WSCHAT_ZLIB": ["-lz"], "WSCHAT_OPENSSL": ["-lssl", "-lcrypto"],
            "WSCHAT_SQLITE": ["-lsqlite3"], "WSCHAT_LIBURING": ["-luring"]}
ALL = [f"-D{feature}=1" for feature in FEATURES]
NONE = []

# Section 8 declares these public classes, because a handler returns them: handler.room("lobby"). No other section may
# declare or use a class of a later section.
DECLARED_EARLY = {8: {"Loop", "Room", "Rooms", "Server"}}
# These sections show that the public names are enough to build a chat: they use nothing of detail but their own.
PUBLIC_NAMES_ONLY = {16, 17, 18}
WAIT = 60  # seconds for one step of a program, on a machine that may be busy


def require(condition, sentence):
    if not condition:
        raise SystemExit(sentence)


def in_parallel(check, *lists):
    """Calls check with the first elements of the lists, then with the second ones, and so on: two calls at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(check, *lists))


def run(command, what, **more):
    """Runs a command that must succeed. Returns its output."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **more)
    first_lines = "\n".join(done.stdout.splitlines()[:20])
    require(done.returncode == 0, f"{what}:\n$ {' '.join(str(word) for word in command)}\n{first_lines}")
    return done.stdout


def write(name, text):
    """Writes a file below WORK. Returns its path."""
    (WORK / name).parent.mkdir(parents=True, exist_ok=True)
    (WORK / name).write_text(text, encoding="utf-8")
    return WORK / name


def sections():
    """(line of the banner's frame, number, name) for each section."""
    found = [(at - 1, int(match[1]), match[2]) for at, line in enumerate(LINES)
             if (match := re.fullmatch(r"// section (\d+): (\S.*)", line)) and LINES[at - 1].startswith("// ====")]
    require(found, "wschat.hpp has no section banner")
    return found


def map_lines():
    """The lines of the map: all above the banner of section 1."""
    return LINES[:sections()[0][0]]


def map_rows():
    """(number, name, text of the column "May use") for each row of the table of contents."""
    return [(int(match[1]), match[2], match[3]) for line in map_lines()
            if (match := re.fullmatch(r"//\s{2,}(\d+)\s+(\S.*?)\s{2,}\S.*?\s{2,}(\S.*?)\s*", line))]


def prefix(line):
    """The header up to a line, as a complete header."""
    return "\n".join(LINES[:line]) + "\n"


def set_name(features):
    return " ".join(features) if features else "no features"


def libraries(features):
    """The linker's options for a list of -DWSCHAT_...=1."""
    return [library for feature in features for library in FEATURES[feature[2:-2]]]


def includes(features):
    """The headers that wschat.hpp itself includes with these features, in its order."""
    output = run([*COMPILER, "-std=c++17", *features, "-E", "-dI", "-I", ROOT,
                  write("includes.cpp", '#include "wschat.hpp"\n')], "wschat.hpp does not preprocess")
    found, inside = [], False
    for line in output.splitlines():
        if marker := re.match(r'# \d+ "(.*?)"', line):
            inside = marker[1].endswith("wschat.hpp")
        elif inside and re.match(r"#\s*include\s*<", line):
            found.append(line)
    require(found, "wschat.hpp includes nothing")
    return "\n".join(found) + "\n"


def one_command(source, program, *features):
    """Compiles a program with the command that the README promises. The source names its own macros and libraries in a
    comment "// g++ ...". The compiler must print nothing."""
    comment = re.search(r"^// g\+\+ (.*?)(?: &&.*)?$", pathlib.Path(source).read_text(encoding="utf-8"), re.MULTILINE)
    words = [*(comment[1].split() if comment else []), *features]
    output = run([*COMPILER, "-std=c++17", "-O2", *(word for word in words if word.startswith("-D")), source, "-o", program,
                  "-I", ROOT, "-pthread", *(word for word in words if word.startswith("-l"))],
                 f"{source} does not compile with the one command")
    require(not output, f"{source} compiles with warnings:\n{output}")


def serves(code, name):
    """Compiles and runs a program that listens on port 8888, here on a free port: it serves a page at /, and ends with
    status 0 on SIGTERM."""
    require("listen(8888)" in code, f"{name} does not listen on port 8888")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = write(f"{name}.cpp", code.replace("listen(8888)", f"listen({port})"))
    one_command(source, WORK / name)
    shutil.copy(ROOT / "examples" / "chat.html", WORK)
    server = subprocess.Popen([WORK / name], cwd=WORK, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=WAIT) as answer:
                    require(answer.status == 200, f"{name} answers {answer.status} on /")
                break
            except (urllib.error.URLError, ConnectionError) as error:
                require(time.monotonic() < deadline and server.poll() is None,
                        f"{name} does not serve its page: {error}")
                time.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        require(server.wait(WAIT) == 0, f"{name} ends with status {server.returncode} on SIGTERM")
    finally:
        server.kill()


# ---- the checks ------------------------------------------------------------------------------------------------------


def version():
    """The version string and the integers agree."""
    numbers = re.findall(r"^#define WSCHAT_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER, re.MULTILINE)
    require(f'#define WSCHAT_VERSION_STRING "{".".join(numbers)}"' in LINES,
            f"WSCHAT_VERSION_STRING is not {'.'.join(numbers)}, which the integer macros say")


def ascii():
    """The header is ASCII: some compilers warn about other characters, even in comments."""
    found = [f"wschat.hpp:{at}: {char!r} is not ASCII" for at, line in enumerate(LINES, 1) for char in line
             if not (" " <= char <= "~")]
    require(not found, "\n".join(found))


def columns():
    """No line of the header is longer than 120 columns."""
    found = [f"wschat.hpp:{at}: {len(line)} columns, more than 120" for at, line in enumerate(LINES, 1) if len(line) > 120]
    require(not found, "\n".join(found))


def style():
    """No text has the words that the project avoids, because readers stumble over them. A phrase may span two lines."""
    gap = r"\s+(?:(?://|#|\*)\s*)?"
    words = {re.compile(r"\b" + phrase.replace(" ", gap) + r"\b", re.IGNORECASE): (phrase, instead) for phrase, instead in (
        ("anew", "again"), ("for want of", "because there is no ..."), ("whoever", "the one who, any user, the caller"),
        ("can not", "cannot"), ("be seen to", "say who sees what"), ("what is no", "say what it is"))}
    texts = (".cpp", ".hpp", ".html", ".js", ".md", ".mjs", ".py", ".sh", ".txt", ".go", ".json")
    files = [ROOT / "wschat.hpp", ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CMakeLists.txt", ROOT / "meson.build",
             *sorted(path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*")
                     if path.suffix in texts or path.name == "meson.build")]
    found = []
    for path in files:
        if path == pathlib.Path(__file__).resolve() or "node_modules" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [(path.relative_to(ROOT), text.count("\n", 0, match.start()) + 1, phrase, instead)
                  for pattern, (phrase, instead) in words.items() for match in pattern.finditer(text)]
    require(not found, "\n".join(f'{path}:{line}: avoid "{phrase}" (instead: {instead})'
                                 for path, line, phrase, instead in sorted(found)))


def contents():
    """The map's table of contents and the banners agree."""
    banners = [(number, name) for _, number, name in sections()]
    table = [(number, name) for number, name, _ in map_rows()]
    require(table == banners, "the table of contents and the banners differ in "
            f"{[f'{number} {name}' for number, name in sorted({*table} ^ {*banners})] or 'their order'}")
    numbers = [number for number, _ in banners]
    require(numbers == sorted(set(numbers)), f"the sections are out of order: {numbers}")


def may_use(number, column):
    """The sections that the map's column "May use" allows a section: "-", "2-4, 7", "all above", "public names of ..."."""
    if column == "-":
        return set()
    if column in ("all above", "public names of the sections above"):
        return set(range(1, number))
    allowed = set()
    for entry in column.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", entry)
        require(match, f'the map, section {number}: this script does not understand "{column}" in the column "May use"')
        allowed |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    require(max(allowed) < number, f'the map, section {number}: "{column}" allows a section that is not above it')
    return allowed


def uses():
    """Each section uses only names of the sections that the map allows it, and of itself."""
    starts = [(line, number) for line, number, _ in sections()]
    columns_ = {number: column for number, _, column in map_rows()}

    def section_of(line):
        return max((number for start, number in starts if start < line), default=0)

    header = header_names.Header(HEADER)
    problems = {}
    for use in header.uses():
        user = section_of(use.line)
        require(user in columns_, f"wschat.hpp:{use.line}: section {user} is not in the map")
        column = columns_[user]
        places = {section_of(name.line) for name in use.names if name.defined} or {section_of(name.line) for name in use.names}
        reachable = may_use(user, column) | {1, user}
        name = "::".join((*use.path, use.name))
        if not places & reachable:
            if name in DECLARED_EARLY.get(user, ()):
                continue
            verb = "declares or uses" if min(places) > user else "uses"
            problem = f'section {user} {verb} {name} (section {min(places)}), but the map allows "{column}"'
        elif user not in places and (user in PUBLIC_NAMES_ONLY or column.startswith("public names")) and (
                use.detail or all(found.detail for found in use.names if section_of(found.line) in reachable)):
            problem = f"section {user} uses detail::{name} (section {min(places)}), but it may use only public names"
        else:
            continue
        problems.setdefault(problem, []).append(use.line)
    require(not problems, "\n".join(
        f"wschat.hpp:{lines[0]}: {problem}" + (f", {len(lines)} times" if len(lines) > 1 else "")
        for problem, lines in sorted(problems.items(), key=lambda found: found[1])) +
        "\nMove the name to a section that may be used, or the code that uses it to a later section.")


def public_names():
    """The names that wschat:: declares outside of detail are those of the map's block "Public names", which ends at an
    empty comment line."""
    block = re.search(r"^// Public names(.*?)^//$", "\n".join(map_lines()) + "\n", re.MULTILINE | re.DOTALL)
    require(block, 'the map has no block that begins with "// Public names" and ends at a line with only "//"')
    require(":" in block[1], 'the map: a colon must stand before the names in the block "Public names"')
    listed = re.findall(r"[A-Za-z_]\w*(?:::\w+)*", re.sub(r"section \d+", "", block[1].split(":", 1)[1]))
    declared = {"::".join((*path, name)): found for (path, name), found in header_names.Header(HEADER).names.items()
                if not all(one.detail for one in found)}
    problems = [f'{name} stands twice in the map\'s block "Public names"' for name in sorted(set(listed)) if listed.count(name) > 1]
    problems += [f'the map\'s block "Public names" has {name}, but wschat::{name} is not declared'
                 for name in sorted(set(listed) - set(declared))]
    problems += [f'wschat.hpp:{declared[name][0].line}: wschat::{name} is public, but the map\'s block "Public names" does not '
                 "have it. Add it, or move it to namespace detail" for name in sorted(set(declared) - set(listed))]
    require(not problems, "\n".join(problems))


def prefixes():
    """Each prefix of the header that ends at a banner compiles without warnings, with all features and with none. The whole
    header compiles with each feature alone too."""
    jobs = [(features, line, f"what stands above section {number} {name}") for features in (ALL, NONE)
            for line, number, name in sections()[1:]]
    jobs += [(features, len(LINES), "wschat.hpp") for features in (ALL, NONE, *([feature] for feature in ALL))]

    def compiles(index):
        features, line, what = jobs[index]
        write(f"{index}/wschat.hpp", prefix(line))
        run([*COMPILER, *FLAGS, *features, "-Werror", "-fsyntax-only", write(f"{index}/unit.cpp", '#include "wschat.hpp"\n')],
            f"{what} does not compile with {set_name(features)}")
    in_parallel(compiles, reversed(range(len(jobs))))  # the long ones first


def documented_macros():
    """The macros that the map names. "WSCHAT_A_B, _C" are WSCHAT_A_B and WSCHAT_A_C."""
    found = set()
    for first, others in re.findall(r"(WSCHAT_\w+)((?:, _[A-Z]+)*)", "\n".join(map_lines())):
        found |= {first, *(first.rpartition("_")[0] + other for other in others.split(", ")[1:])}
    return found


def macros():
    """No macro of other headers is changed. Of ours, those that the map names are left defined, and no others."""
    def defined(text, features):
        return set(run([*COMPILER, "-std=c++17", *features, "-dM", "-E", "-I", ROOT, write("macros.cpp", text)],
                       "macros").splitlines())
    documented = documented_macros()
    for features in (ALL, NONE):
        before, after = defined(includes(features), features), defined('#include "wschat.hpp"\n', features)
        foreign = [line for line in sorted(before ^ after) if not line.startswith("#define WSCHAT_")]
        require(not foreign, "wschat.hpp defines, changes or removes:\n" + "\n".join(foreign))
        ours = set(re.findall(r"^#define (WSCHAT_\w+)", "\n".join(after), re.MULTILINE))
        require(ours <= documented, f"these macros are left defined, but the map does not name them: {sorted(ours - documented)}")
        require(documented <= ours, f"the map names these macros, but they are not defined: {sorted(documented - ours)}")


# What other headers define. A name with parameters is tested as such a macro.
HOSTILE = {
    "Windows": """min(a, b) (((a) < (b)) ? (a) : (b))
        max(a, b) (((a) > (b)) ? (a) : (b))
        small char|hyper long long|near|far|pascal|cdecl|interface struct|IN|OUT|OPTIONAL|CONST const|VOID void|TRUE 1|FALSE 0
        ERROR 0|NO_ERROR 0|DELETE (0x00010000L)|STRICT 1|THIS void|PURE = 0|DOMAIN 1|OVERFLOW 3|UNDERFLOW 4|IGNORE 0
        GetMessage GetMessageW|SendMessage SendMessageW|PostMessage PostMessageW|CreateWindow CreateWindowW
        CreateEvent CreateEventW|CreateFile CreateFileW|DeleteFile DeleteFileW|GetObject GetObjectW|LoadString LoadStringW
        DrawText DrawTextW|ReportEvent ReportEventW|Yield()|GetCurrentTime() 0|s_addr S_un""",
    "X11": """None 0L|Bool int|Status int|Success 0|Always 2|True 1|False 0|CursorShape 0|KeyPress 2|KeyRelease 3
        FocusIn 9|FocusOut 10|Expose 12|FontChange 255|Unsorted 0|Complex 0|Nonconvex 1|Convex 2|Above 0|Below 1|GrayScale 1""",
    "Qt": """slots|signals public|emit|foreach(variable, container) for (variable : container)|forever for (;;)
        Q_OBJECT|Q_SIGNALS public|Q_SLOTS|Q_EMIT|Q_FOREVER for (;;)|Q_FOREACH(variable, container) for (variable : container)
        Q_UNUSED(x) (void)x""",
    "Apple": """check(assertion) do {} while (0)|verify(assertion) do {} while (0)|require(assertion, label) do {} while (0)
        check_noerr(error) do {} while (0)|verify_noerr(error) do {} while (0)
        nil nullptr|Nil nullptr|YES ((signed char)1)|NO ((signed char)0)""",
    "Arduino": """F(literal) (literal)|B0 0|B1 1|B11 3|bit(b) (1UL << (b))|_BV(b) (1 << (b))|abs(x) ((x) > 0 ? (x) : -(x))
        round(x) ((x) >= 0 ? (long)((x) + 0.5) : (long)((x)-0.5))|sq(x) ((x) * (x))|word(x) (x)|radians(x) (x)|degrees(x) (x)
        constrain(x, low, high) (x)|lowByte(w) (w)|highByte(w) (w)|bitRead(value, bit) (value)|interrupts() 0
        HIGH 0x1|LOW 0x0|INPUT 0x0|OUTPUT 0x1|DEFAULT 1|PI 3.14|SERIAL 0x0|DISPLAY 0x1""",
    "Unix": "unix 1|linux 1|major(device) (device)|minor(device) (device)|OK 0|ERR (-1)",
}
# Those that the standard library's headers survive as well.
HOSTILE_BEFORE_ALL = """min(a, b) ((a) < (b) ? (a) : (b))|max(a, b) ((a) > (b) ? (a) : (b))|ERROR 0|DELETE (0x00010000L)
    OK 0|True 1|False 0|Bool int|None 0L"""


def hostile_macros():
    """The macros of other headers do not get in the way. HOSTILE stands between the headers that wschat.hpp includes and
    wschat.hpp; HOSTILE_BEFORE_ALL also stands before all headers."""
    def define(text):
        return "".join(f"#undef {re.match(r'[A-Za-z_]+[0-9]*', entry)[0]}\n#define {entry}\n"
                       for entry in map(str.strip, re.split(r"[|\n]", text)) if entry)
    jobs = [("none", features, define(HOSTILE_BEFORE_ALL)) for features in (ALL, NONE)]
    jobs += [(owner, features, includes(features) + define(text)) for features in (ALL, NONE)
             for owner, text in HOSTILE.items()]

    def compiles(index):
        owner, features, text = jobs[index]
        run([*COMPILER, *FLAGS, *features, "-fsyntax-only", "-I", ROOT,
             write(f"hostile{index}.cpp", text + '#include "wschat.hpp"\n')],
            "wschat.hpp does not compile after " + (f"the macros of {owner}" if owner != "none" else
                                                    "#define min, max, ERROR and the like before all headers"))
    in_parallel(compiles, range(len(jobs)))


def two_units():
    """Two translation units that include the header link, and the program runs, with all features and with none."""
    handler = '#include "wschat.hpp"\nstruct %s : wschat::WebSocketHandler {\n' \
              '    void on_message(const wschat::Message& m) override { write_message(m.text()); }\n};\n'
    one = write("one.cpp", handler % "One" + 'void add(wschat::Server& server) { server.route<One>("/one"); }\n')
    two = write("two.cpp", handler % "Two" + "void add(wschat::Server& server);\n"
                'int main() {\n    wschat::Server server;\n    add(server);\n    server.route<Two>("/two");\n}\n')

    def links(name, features):
        run([*COMPILER, *FLAGS, *features, "-I", ROOT, one, two, "-o", WORK / name, "-pthread", *libraries(features)],
            f"two translation units do not link with {set_name(features)}")
        run([WORK / name], f"two translation units do not run with {set_name(features)}")
    in_parallel(links, ("all", "none"), (ALL, NONE))


def abi():
    """Two translation units with different features do not link: the features are in the name of an inline namespace.
    WSCHAT_CHAT is not, because it adds names and changes none. Compiles the header up to section 2, which needs no
    library."""
    features = [feature for feature in re.findall(r"^#ifndef (WSCHAT_[A-Z]+)\n#define \1 0\b", HEADER, re.MULTILINE)
                if feature != "WSCHAT_CHAT"]
    require({*FEATURES} - {"WSCHAT_CHAT"} <= {*features}, f"not all feature macros default to 0, only {features}")
    write("wschat.hpp", prefix(next(line for line, number, _ in sections() if number == 3)))
    use = write("use.cpp", '#include "wschat.hpp"\nvoid f(const wschat::Message&);\n'
                'int main() { f(wschat::Message("x")); }\n')
    make = write("make.cpp", '#include "wschat.hpp"\nvoid f(const wschat::Message&) {}\n')
    run([*COMPILER, "-std=c++17", "-c", use, "-o", WORK / "use.o"], "the ABI check")

    def link(feature):
        """The linker's output; None if it links."""
        make_object = WORK / f"{feature}.o"
        run([*COMPILER, "-std=c++17", f"-D{feature}=1", "-c", make, "-o", make_object], "the ABI check")
        done = subprocess.run([*COMPILER, WORK / "use.o", make_object, "-o", WORK / feature], capture_output=True, text=True)
        return done.stderr if done.returncode != 0 else None
    for feature in features:
        errors = link(feature)
        require(errors and "f(wschat::" in errors, f"a translation unit with {feature}=1 links with one without it")
    require(link("WSCHAT_CHAT") is None, "a translation unit with WSCHAT_CHAT=1 does not link with one without it")
    run([*COMPILER, "-std=c++17", use, make, "-o", WORK / "abi"], "two translation units that agree do not link")


def features():
    """Each example compiles without warnings with zlib alone and with OpenSSL alone. Other tests compile the examples with
    all features, and with none."""
    jobs = [(zlib, openssl, source) for zlib, openssl in ((0, 1), (1, 0))
            for source in sorted((ROOT / "examples").glob("*.cpp"))
            if openssl or "TlsOptions" not in source.read_text(encoding="utf-8")]

    def compiles(job):
        zlib, openssl, source = job
        run([*COMPILER, *FLAGS, "-Werror", "-fsyntax-only", f"-DWSCHAT_ZLIB={zlib}", f"-DWSCHAT_OPENSSL={openssl}",
             source], f"{source} does not compile with WSCHAT_ZLIB={zlib} and WSCHAT_OPENSSL={openssl}")
    in_parallel(compiles, jobs)


def examples():
    """Each example compiles with the one command."""
    sources = sorted((ROOT / "examples").glob("*.cpp"))
    in_parallel(one_command, sources, [WORK / source.stem for source in sources])
    one_command(ROOT / "examples" / "echo.cpp", WORK / "echo", "-DWSCHAT_ZLIB=1", "-lz")


def map_program():
    """The program in the header's map compiles and serves its page."""
    first = next((at for at, line in enumerate(LINES) if re.fullmatch(r'//\s+#include "wschat.hpp"', line)), None)
    require(first is not None and first < sections()[0][0], "the map of wschat.hpp shows no program")
    indent = LINES[first].index("#")
    program = []
    for line in LINES[first:]:
        program.append(line[indent:])
        if line[indent:] == "}":
            break
    serves("\n".join(program) + "\n", "map")


def readme():
    """README.md: the first ```cpp block is a program that serves its page, and the others compile. A ```sh block after the
    comment <!-- run --> runs in a copy of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(<!-- run -->\n+)?```(cpp|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = [code for _, language, code in blocks if language == "cpp"]
    require(programs, "README.md shows no program")
    serves(programs[0], "readme")

    def compiles(number):
        code = programs[number - 1]
        if "int main(" in code:
            one_command(write(f"block{number}.cpp", code), WORK / f"block{number}")
        else:
            include = "" if '#include "wschat.hpp"' in code else '#include "wschat.hpp"\n'
            run([*COMPILER, "-std=c++17", "-fsyntax-only", "-I", ROOT, write(f"block{number}.cpp", include + code)],
                f"README.md: block {number} does not compile")
    in_parallel(compiles, range(2, len(programs) + 1))
    shutil.copytree(ROOT, WORK / "copy", ignore=shutil.ignore_patterns("build", ".git", "node_modules"))
    for marked, language, code in blocks:
        if marked:
            run(["sh", "-e", "-c", code], "README.md: a block that is to be run fails", cwd=WORK / "copy")


CHECKS = (version, ascii, columns, style, contents, uses, public_names, prefixes, macros, hostile_macros, two_units, abi,
          features, examples, map_program, readme)

if __name__ == "__main__":
    os.environ["LC_ALL"] = "C.UTF-8"
    os.environ.pop("CPATH", None)
    try:
        {check.__name__: check for check in CHECKS}[sys.argv[1]]()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
