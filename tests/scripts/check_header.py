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

# The optional parts and the libraries that they need.
FEATURES = {"WSCHAT_CHAT": [], "WSCHAT_ZLIB": ["-lz"], "WSCHAT_OPENSSL": ["-lssl", "-lcrypto"],
            "WSCHAT_SQLITE": ["-lsqlite3"], "WSCHAT_LIBURING": ["-luring"], "WSCHAT_UTF8PROC": ["-lutf8proc"],
            "WSCHAT_HIREDIS": ["-lhiredis"]}
ALL = [f"-D{feature}=1" for feature in FEATURES]
NONE = []

# Section 8 declares these classes of later sections, because a handler returns them: handler.room("lobby").
DECLARED_EARLY = {8: {"Loop", "Room", "Rooms", "Server"}}
# These sections show that the public names are enough to build a chat. In detail, they use only their own names.
PUBLIC_NAMES_ONLY = {16, 17}
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


def one_command(source, program, *options):
    """Compiles a program with the command that the README promises; the option -O0 saves half of the time. The source
    names its own macros and libraries in a comment "// g++ ...". The compiler must print nothing."""
    comment = re.search(r"^// g\+\+ (.*?)(?: &&.*)?$", pathlib.Path(source).read_text(encoding="utf-8"), re.MULTILINE)
    words = [*(comment[1].split() if comment else []), *options]
    macros_ = [word for word in words if word.startswith("-D")]
    libraries_ = [word for word in words if word.startswith("-l")]
    level = "-O0" if "-O0" in options else "-O2"
    output = run([*COMPILER, "-std=c++17", level, *macros_, source, "-o", program, "-I", ROOT, "-pthread", *libraries_],
                 f"{source} does not compile with the one command")
    require(not output, f"{source} compiles with warnings:\n{output}")


def serves(code, name, *options):
    """Compiles and runs a program that listens on port 8888, here on a free port: it serves a page at /, and ends with
    status 0 on SIGTERM."""
    require("listen(8888)" in code, f"{name} does not listen on port 8888")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = write(f"{name}.cpp", code.replace("listen(8888)", f"listen({port})"))
    one_command(source, WORK / name, *options)
    for page in ("chat.html", "rooms.html", "wschat.js"):
        shutil.copy(ROOT / "examples" / page, WORK)
    server = subprocess.Popen([WORK / name], cwd=WORK, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
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
    found = [f"wschat.hpp:{at}: {len(line)} columns, more than 120" for at, line in enumerate(LINES, 1)
             if len(line) > 120]
    require(not found, "\n".join(found))


# Words that readers stumble over, with what to write instead.
AVOIDED = {"anew": "again", "for want of": "because there is no ...", "whoever": "any user, the caller, the peer",
           "can not": "cannot", "be seen to": "say who sees what", "what is no": "say what it is"}


def style():
    """No text has a word of AVOIDED. A phrase may span two lines."""
    gap = r"\s+(?:(?://|#|\*)\s*)?"
    patterns = {phrase: re.compile(rf"\b{phrase.replace(' ', gap)}\b", re.IGNORECASE) for phrase in AVOIDED}
    text_files = (".cpp", ".hpp", ".html", ".js", ".md", ".mjs", ".py", ".sh", ".txt", ".go", ".json", ".build")
    files = [path for folder in (ROOT / "tests", ROOT / "examples") for path in folder.rglob("*")]
    files += [ROOT / name for name in ("wschat.hpp", "README.md", "CHANGELOG.md", "CMakeLists.txt", "meson.build")]
    found = []
    for path in files:
        if path.suffix not in text_files or path == pathlib.Path(__file__).resolve() or "node_modules" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [(str(path.relative_to(ROOT)), text.count("\n", 0, match.start()) + 1, phrase)
                  for phrase, pattern in patterns.items() for match in pattern.finditer(text)]
    require(not found, "\n".join(f'{path}:{line}: avoid "{phrase}" (instead: {AVOIDED[phrase]})'
                                 for path, line, phrase in sorted(found)))


def contents():
    """The map's table of contents and the banners agree."""
    banners = [(number, name) for _, number, name in sections()]
    table = [(number, name) for number, name, _ in map_rows()]
    require(table == banners, "the table of contents and the banners differ in "
            f"{[f'{number} {name}' for number, name in sorted({*table} ^ {*banners})] or 'their order'}")
    numbers = [number for number, _ in banners]
    require(numbers == sorted(set(numbers)), f"the sections are out of order: {numbers}")


def may_use(number, column):
    """The sections that a section may use. The map's column "May use" is "-", "2-4, 7", "all above" or "public names of
    the sections above". Each section may use itself and section 1."""
    if column in ("all above", "public names of the sections above"):
        return {*range(1, number + 1)}
    allowed = {1, number}
    for entry in column.split(",") if column != "-" else ():
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", entry)
        require(match, f'the map, section {number}: "{column}" is not understood in the column "May use"')
        first, last = int(match[1]), int(match[2] or match[1])
        require(last < number, f'the map, section {number}: "{column}" allows a section that is not above it')
        allowed |= {*range(first, last + 1)}
    return allowed


def section_finder(text):
    """A function from a line's number to its section's number, for a text with the banners of wschat.hpp."""
    lines = text.split("\n")
    starts = {number: lines.index(LINES[line + 1]) for line, number, _ in sections()}
    return lambda line: max((number for number, start in starts.items() if start < line), default=0)


def violations(text):
    """The uses of names that the map does not allow: {sentence: [line]}."""
    section_of = section_finder(text)
    may_use_of = {number: column for number, _, column in map_rows()}
    found = {}
    for use in header_names.Header(text).uses():
        user = section_of(use.line)
        require(user in may_use_of, f"section {user} is not in the map")
        column = may_use_of[user]
        allowed = may_use(user, column)
        defined = {section_of(name.line) for name in use.names if name.defined}
        places = defined or {section_of(name.line) for name in use.names}
        name = "::".join((*use.path, use.name))
        sentence = ""
        if not places & allowed:
            if name not in DECLARED_EARLY.get(user, ()):
                sentence = f'section {user} uses {name} (section {min(places)}), but the map allows "{column}"'
        elif user not in places and (user in PUBLIC_NAMES_ONLY or column.startswith("public names")):
            if use.detail or all(found.detail for found in use.names if section_of(found.line) in allowed):
                sentence = f"section {user} uses detail::{name} (section {min(places)}), but may use only public names"
        if sentence:
            found.setdefault(sentence, []).append(use.line)
    return found


def uses():
    """Each section uses only names of the sections that the map allows it."""
    found = violations(HEADER)
    require(not found, "\n".join(
        f"wschat.hpp:{lines[0]}: {sentence}" + (f" ({len(lines)} times)" if len(lines) > 1 else "")
        for sentence, lines in sorted(found.items(), key=lambda item: item[1])) +
        "\nMove the name to a section that may be used, or move the code that uses it to a later section.")


def uses_finds():
    """A test of the check "uses": in a copy of the header, each section uses a class of a later section."""
    section_of = section_finder(HEADER)
    classes = {}  # of each section, one that no other section declares
    for (path, name), found in header_names.Header(HEADER).names.items():
        places = {section_of(one.line) for one in found}
        if len(places) == 1 and found[0].kind == "type":
            classes.setdefault(places.pop(), "::".join((*path, name)))
    copy, expected = LINES[:], []
    for start, number, _ in reversed(sections()[1:-1]):
        later = min(other for other in classes if other > number)
        copy.insert(LINES.index("WSCHAT_BEGIN", start) + 1, f"using Planted{number} = detail::{classes[later]};")
        expected.append(f"section {number} uses {classes[later]} (section {later}), ")
    found = violations("\n".join(copy))
    missed = [start for start in expected if not any(sentence.startswith(start) for sentence in found)]
    require(not missed, f"the check \"uses\" does not find these: {missed}")


def public_names():
    """The names that wschat:: declares outside of detail are those of the map's block "Public names". The block ends at
    an empty comment line."""
    block = re.search(r"^// Public names[^:\n]*:(.*?)^//$", "\n".join(map_lines()) + "\n", re.MULTILINE | re.DOTALL)
    require(block, 'the map has no block that begins with "// Public names ...:" and ends at a line with only "//"')
    listed = re.findall(r"[A-Za-z_]\w*(?:::\w+)*", re.sub(r"section \d+", "", block[1]))
    names = header_names.Header(HEADER).names.items()
    lines = {"::".join((*path, name)): found[0].line for (path, name), found in names
             if not all(one.detail for one in found)}
    problems = [f"the map lists {name} twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    problems += [f"the map lists {name}, but the header does not declare wschat::{name}"
                 for name in sorted(set(listed) - set(lines))]
    problems += [f"wschat.hpp:{line}: wschat::{name} is public. Add it to the map's public names, or move it to detail"
                 for name, line in sorted(lines.items(), key=lambda item: item[1]) if name not in listed]
    require(not problems, "\n".join(problems))


def prefixes():
    """Each prefix of the header that ends at a banner compiles without warnings, with all features and with none. So
    does the whole header, and also with each feature alone."""
    jobs = [(features, line, f"what stands above section {number} {name}") for features in (ALL, NONE)
            for line, number, name in sections()[1:]]
    jobs += [(features, len(LINES), "wschat.hpp") for features in (ALL, NONE, *([feature] for feature in ALL))]

    def compiles(index):
        features, line, what = jobs[index]
        write(f"{index}/wschat.hpp", prefix(line))
        unit = write(f"{index}/unit.cpp", '#include "wschat.hpp"\n')
        run([*COMPILER, *FLAGS, *features, "-Werror", "-fsyntax-only", unit],
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
        require(ours <= documented, f"left defined, but not named in the map: {sorted(ours - documented)}")
        require(documented <= ours, f"named in the map, but not left defined: {sorted(documented - ours)}")


def hostile_macros():
    """The header compiles after the macros of hostile_macros.h. They stand after the standard headers, because these do
    not survive all of them; those of the first part stand before the standard headers too."""
    text = (ROOT / "tests" / "scripts" / "hostile_macros.h").read_text(encoding="utf-8")
    parts = re.findall(r"^// ---- (.*)\n((?:#define .*\n)+)", text, re.MULTILINE)
    require(len(parts) == text.count("// ---- ") > 1, "hostile_macros.h is not understood")
    parts = [(owner, re.sub(r"^#define (\w+)", r"#undef \1\n\g<0>", defines, flags=re.MULTILINE))
             for owner, defines in parts]
    jobs = [(parts[0][0], features, parts[0][1]) for features in (ALL, NONE)]
    for features in (ALL, NONE):
        before = includes(features)
        jobs += [(owner, features, before + defines) for owner, defines in parts]

    def compiles(index):
        owner, features, defines = jobs[index]
        unit = write(f"hostile{index}.cpp", defines + '#include "wschat.hpp"\n')
        run([*COMPILER, *FLAGS, *features, "-fsyntax-only", "-I", ROOT, unit],
            f"wschat.hpp does not compile with {set_name(features)} after the macros of hostile_macros.h, {owner}")
    in_parallel(compiles, range(len(jobs)))


def bits32():
    """The header compiles for 32 bits without warnings. If there is no 32-bit standard library, the 64-bit one is good
    enough for a syntax check."""
    probe = write("probe.cpp", "#include <vector>\nstatic_assert(sizeof(void*) == 4);\n")
    folders = re.findall(r"^ (/\S+)$", run([*COMPILER, "-E", "-v", probe], "the search for headers"), re.MULTILINE)
    write("stubs/gnu/stubs-32.h", "")
    unit = write("bits32.cpp", '#include "wschat.hpp"\n')
    borrowed = [word for folder in (WORK / "stubs", *folders) for word in ("-isystem", folder)]
    for options in (["-m32"], ["-m32", *borrowed]):
        probing = subprocess.run([*COMPILER, "-std=c++17", *options, "-fsyntax-only", probe], capture_output=True)
        if probing.returncode == 0:
            break
    else:
        print(f"SKIPPED: {COMPILER[0]} cannot compile for 32 bits")
        raise SystemExit(77)

    def compiles(features):
        run([*COMPILER, *FLAGS, *options, *features, "-Werror", "-fsyntax-only", "-I", ROOT, unit],
            f"wschat.hpp does not compile for 32 bits with {set_name(features)}")
    in_parallel(compiles, (ALL, NONE))


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
    features = [feature for feature in re.findall(r"^#ifndef (WSCHAT_[A-Z0-9]+)\n#define \1 0\b", HEADER, re.MULTILINE)
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
        done = subprocess.run([*COMPILER, WORK / "use.o", make_object, "-o", WORK / feature], capture_output=True,
                              text=True)
        return done.stderr if done.returncode != 0 else None
    for feature in features:
        errors = link(feature)
        require(errors and "f(wschat::" in errors, f"a translation unit with {feature}=1 links with one without it")
    require(link("WSCHAT_CHAT") is None, "a translation unit with WSCHAT_CHAT=1 does not link with one without it")
    run([*COMPILER, "-std=c++17", use, make, "-o", WORK / "abi"], "two translation units that agree do not link")


def unsupported():
    """An unsupported compiler, option or system gets one #error with a sentence. So does a feature whose library is
    missing, and the sentence names the package. Preprocesses section 1, which includes nothing."""
    end = next(line for line, number, _ in sections() if number == 2)
    unit = write("section1.cpp", prefix(end))
    write("posix/sys/socket.h", "")
    posix = ["-I", WORK / "posix"]
    cases = [(["-std=c++14", *posix], "needs C++17: compile with -std=c++17 or newer"),
             (["-std=c++17", "-fno-exceptions", *posix], "needs exceptions: compile without -fno-exceptions"),
             (["-std=c++17", "-D_WIN32", "-D_WINSOCKAPI_"], "needs winsock2.h: include wschat.hpp before windows.h"),
             (["-std=c++17", "-D_WIN32", "-D_WIN32_WINNT=0x0501"], "needs Windows Vista or newer"),
             (["-std=c++17", "-D_WIN32", "-D__MINGW32__", "-U__clang__", "-U__GNUC__", "-D__GNUC__=9"],
              "needs g++ 10 or newer with MinGW"),
             (["-std=c++17"], "needs the sockets of POSIX or Windows")]
    packages = {"WSCHAT_ZLIB": "zlib1g-dev", "WSCHAT_OPENSSL": "libssl-dev", "WSCHAT_SQLITE": "libsqlite3-dev",
                "WSCHAT_LIBURING": "liburing-dev", "WSCHAT_UTF8PROC": "libutf8proc-dev",
                "WSCHAT_HIREDIS": "libhiredis-dev"}
    require({*packages, "WSCHAT_CHAT"} == {*FEATURES}, "the check does not know the package of each feature")
    cases += [(["-std=c++17", f"-D{feature}=1", *posix], f"is not found (Debian: {package})")
              for feature, package in packages.items()]
    for options, sentence in cases:
        done = subprocess.run([*COMPILER, "-E", "-nostdinc", "-I", WORK, *options, unit], capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        require(done.returncode != 0 and len(errors) == 1 and sentence in errors[0],
                f"{options}: not one error with the sentence \"{sentence}\":\n{done.stderr}")


def features():
    """Each example that speaks of features compiles without warnings with zlib alone and with OpenSSL alone. The build
    compiles all of them with the features that are on, and the check "examples" with those that they name."""
    texts = {source: source.read_text(encoding="utf-8") for source in sorted((ROOT / "examples").glob("*.cpp"))}
    jobs = [(zlib, openssl, source) for zlib, openssl in ((0, 1), (1, 0)) for source, text in texts.items()
            if "WSCHAT_" in text and (openssl or "TlsOptions" not in text)]

    def compiles(job):
        zlib, openssl, source = job
        run([*COMPILER, *FLAGS, "-Werror", "-fsyntax-only", f"-DWSCHAT_ZLIB={zlib}", f"-DWSCHAT_OPENSSL={openssl}",
             source], f"{source} does not compile with WSCHAT_ZLIB={zlib} and WSCHAT_OPENSSL={openssl}")
    in_parallel(compiles, jobs)


def examples():
    """Each example compiles with the one command. The build compiles them with -O2."""
    sources = sorted((ROOT / "examples").glob("*.cpp"))
    in_parallel(lambda source: one_command(source, WORK / source.stem, "-O0"), sources)
    one_command(ROOT / "examples" / "echo.cpp", WORK / "echo", "-DWSCHAT_ZLIB=1", "-lz")


def any_directory():
    """An example finds its page when it runs in another directory than the one where it was compiled. Where it cannot,
    its error says what to do."""
    tree, elsewhere = WORK / "tree", WORK / "elsewhere"
    elsewhere.mkdir()
    (tree / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "wschat.hpp", tree)
    for name in ("chat.cpp", "chat.html"):
        shutil.copy(ROOT / "examples" / name, tree / "examples")
    # The directory of the compiler, the source and the program.
    commands = ((tree, "examples/chat.cpp", tree / "chat"), (tree / "examples", "chat.cpp", tree / "examples" / "chat"),
                (elsewhere, "../tree/examples/chat.cpp", elsewhere / "chat"),
                (elsewhere, tree / "examples" / "chat.cpp", WORK / "by-absolute-path"))

    def compiles(folder, source, program):
        run([*COMPILER, "-std=c++17", "-O0", source, "-o", program, "-pthread"], "the example chat", cwd=folder)
    in_parallel(compiles, *zip(*commands))
    moved = WORK / "moved"
    moved.mkdir()
    for path in (tree / "chat", tree / "examples" / "chat.html"):
        shutil.copy(path, moved)

    def serves_page(program):
        with subprocess.Popen([program, "0"], cwd="/", stdout=subprocess.PIPE, text=True) as server:
            try:
                address = re.search(r"http://\S+", server.stdout.readline())
                require(address, f"{program} does not start in another directory")
                with urllib.request.urlopen(address[0], timeout=WAIT) as page:
                    require(b"WebSocket" in page.read(), f"{program} does not serve its page")
            finally:
                server.kill()
    for *_, program in (*commands, (moved / "chat",)):
        serves_page(program)
    shutil.copy(tree / "chat", WORK / "alone")
    alone = subprocess.run([WORK / "alone", "0"], cwd="/", capture_output=True, text=True, timeout=WAIT)
    sentence = (f"chat: file \"/\": examples/chat.html: No such file or directory (ENOENT); looked in / and in the "
                f"folder of {WORK / 'alone'}\nusage: chat [port] [--page FILE]\n")
    require((alone.returncode, alone.stderr) == (1, sentence), f"a chat without its page prints {alone.stderr!r}")


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
    serves("\n".join(program) + "\n", "map", "-O0")


def readme():
    """README.md: the first ```cpp block is a program that serves its page, and the others compile. A ```sh block after
    the comment <!-- run --> runs in a copy of the repository, and a ```cpp block ends with status 0."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(<!-- run -->\n+)?```(cpp|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = [code for _, language, code in blocks if language == "cpp"]
    to_run = {code for marked, language, code in blocks if marked and language == "cpp"}
    require(programs, "README.md shows no program")
    serves(programs[0], "readme")

    def compiles(number):
        code = programs[number - 1]
        if "int main(" in code:
            one_command(write(f"block{number}.cpp", code), WORK / f"block{number}", "-O0")
            if code in to_run:
                run([WORK / f"block{number}"], f"README.md: block {number} does not end with status 0")
        else:
            include = "" if '#include "wschat.hpp"' in code else '#include "wschat.hpp"\n'
            run([*COMPILER, "-std=c++17", "-fsyntax-only", "-I", ROOT, write(f"block{number}.cpp", include + code)],
                f"README.md: block {number} does not compile")
    in_parallel(compiles, range(2, len(programs) + 1))
    shutil.copytree(ROOT, WORK / "copy", ignore=shutil.ignore_patterns("build", ".git", "node_modules"))
    for marked, language, code in blocks:
        if marked and language == "sh":
            run(["sh", "-e", "-c", code], "README.md: a block that is to be run fails", cwd=WORK / "copy")


CHECKS = (version, ascii, columns, style, contents, uses, uses_finds, public_names, prefixes, macros, hostile_macros,
          bits32, two_units, abi, unsupported, features, examples, any_directory, map_program, readme)

if __name__ == "__main__":
    os.environ["LC_ALL"] = "C.UTF-8"
    os.environ.pop("CPATH", None)
    try:
        {check.__name__: check for check in CHECKS}[sys.argv[1]]()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
