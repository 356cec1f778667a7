#!/usr/bin/env python3
"""check_header.py CHECK COMPILER FLAG...: what no unit test can say of wschat.hpp, its examples and its README."""
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER = (ROOT / "wschat.hpp").read_text(encoding="utf-8")
LINES = HEADER.split("\n")
COMPILER, FLAGS = sys.argv[2:3], sys.argv[3:]
WORK = pathlib.Path(tempfile.mkdtemp(prefix="wschat-check-"))
FEATURES = ["WSCHAT_ZLIB"]  # those that the header has already


def require(condition, sentence):
    if not condition:
        raise SystemExit(sentence)


def run(command, what, **more):
    """The output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **more)
    first_lines = "\n".join(done.stdout.splitlines()[:20])
    require(done.returncode == 0, f"{what}:\n$ {' '.join(str(word) for word in command)}\n{first_lines}")
    return done.stdout


def write(name, text):
    (WORK / name).write_text(text, encoding="utf-8")
    return WORK / name


def sections():
    """(line of the banner's frame, number, name) for each section."""
    found = [(at - 1, match[1], match[2]) for at, line in enumerate(LINES)
             if (match := re.fullmatch(r"// section (\d+): (\S.*)", line)) and LINES[at - 1].startswith("// ====")]
    require(found, "wschat.hpp has no section banner")
    return found


def prefix(line):
    """The header up to a line, as a header that is whole."""
    return "\n".join(LINES[:line]) + ("\n" if "#pragma once" in HEADER else "\n#endif\n")


def feature_sets():
    """The options that build the header without features, and with each of them."""
    return [[], *([f"-D{feature}=1"] for feature in FEATURES)]


def includes(features):
    """The headers that wschat.hpp itself includes here, in its order."""
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
    """The command that the README promises, with the macros and the libraries that the source itself asks for in a
    comment "// g++ ..."; not one line of output."""
    asked = re.search(r"^// g\+\+ (.*?)(?: &&.*)?$", pathlib.Path(source).read_text(encoding="utf-8"), re.MULTILINE)
    words = [*(asked[1].split() if asked else []), *features]
    output = run([*COMPILER, "-std=c++17", "-O2", *(word for word in words if word.startswith("-D")), source, "-o", program,
                  "-I", ROOT, "-pthread", *(word for word in words if word.startswith("-l"))],
                 f"{source} does not compile with the one command")
    require(not output, f"{source} compiles with warnings:\n{output}")


def serves(code, name):
    """A whole program on port 8888: it compiles, answers on a free port, and ends with status 0 on SIGTERM."""
    require("listen(8888)" in code, f"{name} does not listen on port 8888")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = write(f"{name}.cpp", code.replace("listen(8888)", f"listen({port})"))
    one_command(source, WORK / name)
    shutil.copy(ROOT / "examples" / "chat.html", WORK)
    server = subprocess.Popen([WORK / name], cwd=WORK, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                    require(answer.status == 200, f"{name} answers {answer.status} on /")
                break
            except (urllib.error.URLError, ConnectionError) as error:
                require(time.monotonic() < deadline and server.poll() is None,
                        f"{name} does not serve its page: {error}")
                time.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        require(server.wait(20) == 0, f"{name} ends with status {server.returncode} on SIGTERM")
    finally:
        server.kill()


# ---- the checks ------------------------------------------------------------------------------------------------------


def version():
    """The string and the integers say the same."""
    numbers = re.findall(r"^#define WSCHAT_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER, re.MULTILINE)
    require(f'#define WSCHAT_VERSION_STRING "{".".join(numbers)}"' in LINES,
            f"WSCHAT_VERSION_STRING is not {'.'.join(numbers)}, which the integer macros say")


def contents():
    """The table of contents and the banners agree."""
    banners = [(number, name) for _, number, name in sections()]
    table = [match.groups() for line in LINES[:sections()[0][0]]
             if (match := re.match(r"//\s{2,}(\d+)\s+(\S.*?)\s{2,}\S", line))]
    require(table == banners, "the table of contents and the banners differ in "
            f"{[' '.join(entry) for entry in sorted({*table} ^ {*banners})] or 'their order'}")
    numbers = [int(number) for number, _ in banners]
    require(numbers == sorted(set(numbers)), f"the sections are out of order: {numbers}")


def prefixes():
    """Every prefix of the header that ends at a banner compiles, and so does the whole, with each feature and without."""
    unit = write("unit.cpp", '#include "wschat.hpp"\n')
    for features in feature_sets():
        compiles = [*COMPILER, *FLAGS, *features, "-Werror", "-fsyntax-only", unit]
        for line, number, name in sections():
            write("wschat.hpp", prefix(line))
            run(compiles, f"what stands above section {number} {name} does not compile")
        write("wschat.hpp", HEADER)
        run(compiles, "wschat.hpp does not compile")


def macros():
    """Only WSCHAT_ macros leak, and no macro of somebody else is changed."""
    def defined(text, features):
        return set(run([*COMPILER, "-std=c++17", *features, "-dM", "-E", "-I", ROOT, write("macros.cpp", text)],
                       "macros").splitlines())
    for features in feature_sets():
        before, after = defined(includes(features), features), defined('#include "wschat.hpp"\n', features)
        leaked = [line for line in sorted(before ^ after) if not line.startswith("#define WSCHAT_")]
        require(not leaked, "wschat.hpp defines, changes or removes:\n" + "\n".join(leaked))


def hostile_macros():
    """What windows.h, X11 and curses define does not get in the way, be it before all else or just before us."""
    hostile = "".join(f"#define {macro}\n" for macro in (
        "min(a, b) ((a) < (b) ? (a) : (b))", "max(a, b) ((a) > (b) ? (a) : (b))", "ERROR 0", "DELETE (0x00010000L)",
        "OK 0", "True 1", "False 0", "Bool int", "None 0L"))
    for features in feature_sets():
        for text in (hostile, includes(features) + hostile):
            run([*COMPILER, *FLAGS, *features, "-fsyntax-only", "-I", ROOT,
                 write("hostile.cpp", text + '#include "wschat.hpp"\n')],
                "wschat.hpp does not compile after #define min, max, ERROR and the like")


def two_units():
    """Two translation units that include the header link, and the program runs."""
    handler = '#include "wschat.hpp"\nstruct %s : wschat::WebSocketHandler {\n' \
              '    void on_message(const wschat::Message& m) override { write_message(m.text()); }\n};\n'
    one = write("one.cpp", handler % "One" + 'void add(wschat::Server& server) { server.route<One>("/one"); }\n')
    two = write("two.cpp", handler % "Two" + "void add(wschat::Server& server);\n"
                'int main() {\n    wschat::Server server;\n    add(server);\n    server.route<Two>("/two");\n}\n')
    program = WORK / "two_units"
    run([*COMPILER, *FLAGS, "-I", ROOT, one, two, "-o", program, "-pthread"], "two translation units do not link")
    run([program], "two translation units do not run")


def abi():
    """Two translation units with different features do not link. Up to section 2, so that no feature's library is needed."""
    features = re.findall(r"^#ifndef (WSCHAT_[A-Z]+)\n#define \1 0$", HEADER, re.MULTILINE)
    require("WSCHAT_ZLIB" in features, "wschat.hpp has no feature macros that default to 0")
    write("wschat.hpp", prefix(next(line for line, number, _ in sections() if number == "3")))
    use = write("use.cpp", '#include "wschat.hpp"\nvoid f(const wschat::Message&);\n'
                'int main() { f(wschat::Message("x")); }\n')
    make = write("make.cpp", '#include "wschat.hpp"\nvoid f(const wschat::Message&) {}\n')
    run([*COMPILER, "-std=c++17", "-c", use, "-o", WORK / "use.o"], "the ABI check")
    for feature in features:
        run([*COMPILER, "-std=c++17", f"-D{feature}=1", "-c", make, "-o", WORK / "make.o"], "the ABI check")
        link = [*COMPILER, WORK / "use.o", WORK / "make.o", "-o", WORK / "abi"]
        done = subprocess.run(link, capture_output=True, text=True)
        require(done.returncode != 0 and "f(wschat::" in done.stderr,
                f"a translation unit with {feature}=1 links with one without it")
    run([*COMPILER, "-std=c++17", use, make, "-o", WORK / "abi"], "two translation units that agree do not link")


def features():
    """Each example compiles with one of the features alone; with all of them and with none others compile them."""
    for zlib, openssl in ((0, 1), (1, 0)):
        for source in sorted((ROOT / "examples").glob("*.cpp")):
            if "TlsOptions" in source.read_text(encoding="utf-8") and not openssl:
                continue
            run([*COMPILER, *FLAGS, "-Werror", "-fsyntax-only", f"-DWSCHAT_ZLIB={zlib}", f"-DWSCHAT_OPENSSL={openssl}",
                 source], f"{source} does not compile with WSCHAT_ZLIB={zlib} and WSCHAT_OPENSSL={openssl}")


def examples():
    """Each example compiles with the one command."""
    for source in sorted((ROOT / "examples").glob("*.cpp")):
        one_command(source, WORK / source.stem)
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
    """README.md: the first ```cpp block is a program that serves its page, the others compile; a ```sh block behind
    the comment <!-- run --> runs in a copy of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(<!-- run -->\n+)?```(cpp|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = [code for _, language, code in blocks if language == "cpp"]
    require(programs, "README.md shows no program")
    serves(programs[0], "readme")
    for number, code in enumerate(programs[1:], 2):
        if "int main(" in code:
            one_command(write(f"block{number}.cpp", code), WORK / f"block{number}")
        else:
            source = write(f"block{number}.cpp", '#include "wschat.hpp"\n' + code)
            run([*COMPILER, "-std=c++17", "-fsyntax-only", "-I", ROOT, source],
                f"README.md: block {number} does not compile")
    shutil.copytree(ROOT, WORK / "copy", ignore=shutil.ignore_patterns("build", ".git", "node_modules"))
    for marked, language, code in blocks:
        if marked:
            run(["sh", "-e", "-c", code], "README.md: a block that is to be run fails", cwd=WORK / "copy")


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C.UTF-8"
    os.environ.pop("CPATH", None)
    try:
        {check.__name__: check for check in (version, contents, prefixes, macros, hostile_macros, two_units, abi,
                                             features, examples, map_program, readme)}[sys.argv[1]]()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
