"""Reads wschat.hpp as C++ tokens, and finds the names that it declares and the names that it uses.

This is not a compiler. It knows namespaces, classes and functions, and the names that hide others: members, parameters
and local variables. It does not expand macros, and it reads both branches of an #if.
"""
import collections
import re

Token = collections.namedtuple("Token", "text line")
# A name at namespace level. kind: "type", "function" or "constant". path: the namespaces inside wschat, without detail.
# defined: false for a forward declaration of a class.
Name = collections.namedtuple("Name", "path name kind detail defined line")
# A declaration without the declarations inside it. classes: the classes around it, the outermost first. parameters: the
# parameters of its templates.
Part = collections.namedtuple("Part", "path classes tokens parameters")
# A use of a name at namespace level. detail: whether it is written with detail::. names: the declarations it may mean.
Use = collections.namedtuple("Use", "path name line detail names")

TOKEN = re.compile(r"""
    (?P<skip> \s+ | //[^\n]* | /\*.*?\*/ | (?<![^\n])[ \t]*\#(?:[^\n]*\\\n)*[^\n]* )
  | (?P<text> (?:u8|u|U|L)?R"(?P<mark>[^\s()\\]*)\(.*?\)(?P=mark)"
            | (?:u8|u|U|L)?"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)+' )
  | (?P<word> [A-Za-z_]\w* )
  | (?P<number> \.?\d(?:[\w.]|'\w|(?<=[eEpP])[+-])* )
  | (?P<sign> :: | -> | && | . )
""", re.VERBOSE | re.DOTALL)
WORD = re.compile(r"[A-Za-z_]\w*")

KEYWORDS = frozenset("""
    alignas alignof and asm auto bool break case catch char class const constexpr const_cast continue decltype default
    delete do double dynamic_cast else enum explicit extern false final float for friend goto if inline int long mutable
    namespace new noexcept not nullptr operator or override private protected public register reinterpret_cast return
    short signed sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef
    typeid typename union unsigned using virtual void volatile wchar_t while""".split())
BUILT_IN = frozenset("auto bool char const constexpr double float int long short signed unsigned void wchar_t".split())
CLOSING = {"(": ")", "[": "]", "{": "}"}


def tokens_of(text):
    """The tokens without comments and directives. A literal is the token 0."""
    found, line, at = [], 1, 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match["word"] or match["sign"]:
            found.append(Token(match[0], line))
        elif match["text"] or match["number"]:
            found.append(Token("0", line))
        line += match[0].count("\n")
        at = match.end()
    return found


def is_name(text):
    return WORD.fullmatch(text) is not None and text not in KEYWORDS


def closing(tokens, at):
    """The index of the bracket that closes the one at an index."""
    depth = 0
    for index in range(at, len(tokens)):
        if tokens[index].text in CLOSING:
            depth += 1
        elif tokens[index].text in CLOSING.values():
            depth -= 1
            if depth == 0:
                return index
    raise SystemExit(f"wschat.hpp:{tokens[at].line}: this bracket is not closed")


def after_angles(tokens, at):
    """The index after the > that closes the < at an index."""
    depth = 0
    while at < len(tokens):
        text = tokens[at].text
        if text in CLOSING:
            at = closing(tokens, at)
        elif text == "<":
            depth += 1
        elif text == ">":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return at


def ends_template(tokens, at):
    """Whether the > at an index ends the arguments of a template. If not, it compares."""
    depth = 0
    for index in range(at, -1, -1):
        text = tokens[index].text
        if text == ">":
            depth += 1
        elif text == "<":
            depth -= 1
            if depth == 0:
                return index > 0 and WORD.fullmatch(tokens[index - 1].text) is not None
        elif text in (";", "{", "}", "&&"):
            return False
    return False


class Header:
    """names has the declarations at namespace level, by (path, name); uses() finds the uses."""

    def __init__(self, text):
        self.tokens = tokens_of(text)
        self.parts = []
        self.names = collections.defaultdict(list)
        self.members = collections.defaultdict(set)  # the members of a class
        self.nested = collections.defaultdict(set)   # the types among them
        self.bases = collections.defaultdict(set)    # the base classes of a class
        end = self.read(0, len(self.tokens), None, False, ())
        if end != len(self.tokens):
            raise SystemExit(f"wschat.hpp:{self.tokens[end].line}: this bracket closes nothing")

    # ---- declarations ------------------------------------------------------------------------------------------------

    def read(self, at, end, path, detail, classes):
        """Reads the declarations in a namespace or a class. Returns the index of the bracket that closes it. Outside of
        wschat, path is None."""
        tokens = self.tokens
        while at < end:
            text = tokens[at].text
            if text in ("}", "WSCHAT_END"):
                return at
            if text == "WSCHAT_BEGIN":
                at = self.read(at + 1, end, (), False, ()) + 1
            elif text == "namespace" or (text == "inline" and tokens[at + 1].text == "namespace"):
                at = self.read_namespace(at, end, path, detail)
            elif text in ("public", "private", "protected") and tokens[at + 1].text == ":":
                at += 2
            elif text == ";":
                at += 1
            elif text == "extern" and tokens[at + 2].text == "{":
                at = self.read(at + 3, end, None, detail, ()) + 1
            else:
                at = self.read_declaration(at, end, path, detail, classes)
        return at

    def read_namespace(self, at, end, path, detail):
        first = at
        while self.tokens[at].text not in ("{", ";", "="):
            at += 1
        if self.tokens[at].text != "{":
            raise SystemExit(f"wschat.hpp:{self.tokens[first].line}: header_names.py cannot read a namespace alias")
        for word in (token.text for token in self.tokens[first:at] if is_name(token.text)):
            if word == "wschat":
                path = ()
            elif word == "detail":
                detail = True
            elif path is not None:
                path += (word,)
        return self.read(at + 1, end, path, detail, ()) + 1

    def read_declaration(self, at, end, path, detail, classes):
        """Reads one declaration. Returns the index after it."""
        tokens, first = self.tokens, at
        parameters = set()
        while tokens[at].text == "template":
            after = after_angles(tokens, at + 1)
            parameters |= {tokens[i].text for i in range(at, after)
                           if is_name(tokens[i].text) and tokens[i + 1].text in (",", ">", "=")
                           and tokens[i - 1].text not in ("=", "::")}
            at = after
        while tokens[at].text == "[" or tokens[at].text.startswith("WSCHAT_"):  # attributes
            at = closing(tokens, at) + 1 if tokens[at].text == "[" else at + 1
        kind = tokens[at].text
        if kind in ("class", "struct", "union", "enum"):
            after = self.read_type(first, at, end, path, detail, classes, parameters)
            if after:
                return after
        if kind == "using":
            after = at
            while tokens[after].text != ";":
                after += 1
            alias = tokens[at + 1].text if tokens[at + 2].text == "=" else tokens[after - 1].text
            if tokens[at + 1].text != "namespace":
                self.declare(path, detail, classes, alias, "type", True, tokens[at].line)
            self.add_part(path, classes, first, after, parameters)
            return after + 1
        return self.read_value(first, at, path, detail, classes, parameters)

    def read_type(self, first, at, end, path, detail, classes, parameters):
        """Reads a class or an enumeration. Returns the index after it; 0 if this declares a variable or a function."""
        tokens, kind = self.tokens, self.tokens[at].text
        at += 1
        while tokens[at].text in ("class", "struct", "alignas", "__attribute__", "["):
            at = closing(tokens, at) if tokens[at].text == "[" else at
            at = closing(tokens, at + 1) if tokens[at + 1].text == "(" else at
            at += 1
        name = ""
        if is_name(tokens[at].text):
            name, at = tokens[at].text, at + 1
        while tokens[at].text == "::":  # a nested class that is defined outside of its own
            classes, name, at = (*classes, name), tokens[at + 1].text, at + 2
        if tokens[at].text == "<":
            at = after_angles(tokens, at)
        line = tokens[at].line
        if tokens[at].text == ";":
            self.declare(path, detail, classes, name, "type", False, line)
            self.add_part(path, classes, first, at, parameters)
            return at + 1
        if tokens[at].text not in ("{", ":", "final"):
            return 0
        head = at
        while tokens[at].text != "{":
            at += 1
        if kind != "enum":
            self.bases[name] |= {token.text for token in tokens[head:at] if is_name(token.text)}
        if name:
            self.declare(path, detail, classes, name, "type", True, line)
        self.nested[name] |= parameters
        self.add_part(path, (*classes, name), first, at, set())
        if kind == "enum":
            after = closing(tokens, at)
            scoped = "class" in (token.text for token in tokens[first:head])
            for index in range(at + 1, after):
                if is_name(tokens[index].text) and tokens[index - 1].text in ("{", ",") and not scoped:
                    self.declare(path, detail, classes, tokens[index].text, "constant", True, tokens[index].line)
            self.add_part(path, (*classes, name), at + 1, after, set())
        else:
            after = self.read(at + 1, end, path, detail, (*classes, name))
        at = after + 1
        while tokens[at].text != ";":  # struct {...} variable;
            if is_name(tokens[at].text):
                self.declare(path, detail, classes, tokens[at].text, "constant", True, tokens[at].line)
            at += 1
        return at + 1

    def read_value(self, first, at, path, detail, classes, parameters):
        """Reads a function, or one or more variables. Returns the index after it."""
        tokens, start = self.tokens, at
        is_function = is_friend = False
        while True:
            text = tokens[at].text
            before = tokens[at - 1].text
            if text == "operator":
                at += 1
                while tokens[at].text != "(" or tokens[at + 1].text == ")" and tokens[at + 2].text == "(":
                    at += 2 if tokens[at].text == "(" else 1
                is_function, at = True, closing(tokens, at)
            elif text == "friend":
                is_friend = True
            elif text == "<" and WORD.fullmatch(before):
                at = after_angles(tokens, at) - 1
            elif text == "[":
                if is_name(before):
                    self.declare(path, detail, classes, before, "constant", True, tokens[at].line)
                at = closing(tokens, at)
            elif text == "(":
                if not is_function and is_name(before) and before not in ("__attribute__", "static_assert"):
                    is_function = True
                    owner = self.owner(start, at - 1)
                    if owner:
                        classes = (*classes, *owner)
                    elif not is_friend:
                        self.declare(path, detail, classes, before, "function", True, tokens[at].line)
                at = closing(tokens, at)
            elif text == ":" and is_function:
                at = self.after_initializers(at + 1)
                continue
            elif text == "{":
                if not is_function and is_name(before):
                    self.declare(path, detail, classes, before, "constant", True, tokens[at].line)
                at = closing(tokens, at)
                if is_function:
                    break
            elif text in ("=", ";", ",", ":"):
                if not is_function and is_name(before) and not is_friend:
                    self.declare(path, detail, classes, before, "constant", True, tokens[at].line)
                while text == "=" and tokens[at].text not in (";", ","):
                    at = closing(tokens, at) + 1 if tokens[at].text in CLOSING else at + 1
                if tokens[at].text == ";":
                    break
            at += 1
        self.add_part(path, classes, first, at, parameters)
        return at + 1

    def owner(self, start, at):
        """The classes before the name at an index: ["Socket"] for Socket::send, [] for a free function."""
        found = []
        tokens = self.tokens
        while at - 1 >= start and tokens[at - 1].text == "::":
            at -= 2
            if tokens[at].text == ">":
                depth = 1
                while depth:
                    at -= 1
                    depth += {">": 1, "<": -1}.get(tokens[at].text, 0)
                at -= 1
            found.insert(0, tokens[at].text)
        return [name for name in found if name not in ("wschat", "detail")]

    def after_initializers(self, at):
        """Skips the member initializers of a constructor. Returns the index of the bracket that opens its body."""
        tokens = self.tokens
        while True:
            while tokens[at].text not in ("(", "{"):
                at = after_angles(tokens, at) if tokens[at].text == "<" else at + 1
            at = closing(tokens, at) + 1
            if tokens[at].text == ".":  # the three dots of a pack
                at += 3
            if tokens[at].text != ",":
                return at
            at += 1

    def declare(self, path, detail, classes, name, kind, defined, line):
        if classes:
            self.members[classes[-1]].add(name)
            if kind == "type":
                self.nested[classes[-1]].add(name)
        elif path is not None:
            self.names[path, name].append(Name(path, name, kind, detail, defined, line))

    def add_part(self, path, classes, first, end, parameters):
        if path is not None:
            self.parts.append(Part(path, classes, self.tokens[first:end + 1], parameters))

    # ---- uses --------------------------------------------------------------------------------------------------------

    def hidden(self, classes):
        """The members of classes and of their bases, which hide names at namespace level, and the types among them."""
        to_do, seen, members, types = list(classes), set(), set(), set()
        while to_do:
            name = to_do.pop()
            if name not in seen:
                seen.add(name)
                members |= self.members[name]
                types |= self.nested[name]
                to_do += self.bases[name]
        return members, types

    def uses(self):
        """Each use of a name at namespace level, as a list of Use."""
        spaces = {path[:depth] for path, _ in self.names for depth in range(len(path) + 1)}
        found = []
        for part in self.parts:
            tokens = part.tokens
            members, types = self.hidden(part.classes)
            hiding = members, types | part.parameters, self.locals_of(tokens)
            for index, token in enumerate(tokens):
                before = tokens[index - 1].text if index else ""
                if not is_name(token.text) or before in (".", "->") or before == "::" and token.text != "wschat":
                    continue
                chain, at = [token.text], index + 1
                while at + 1 < len(tokens) and tokens[at].text == "::" and is_name(tokens[at + 1].text):
                    chain.append(tokens[at + 1].text)
                    at += 2
                use = self.resolve(part, chain, index, spaces, hiding)
                if use:
                    found.append(use)
        return found

    def resolve(self, part, chain, at, spaces, hiding):
        """The use that names joined by :: are, or None. The first name is at an index."""
        bases = [part.path[:depth] for depth in range(len(part.path), -1, -1)]
        detail = qualified = False
        while len(chain) > 1 and chain[0] in ("wschat", "detail"):
            detail = detail or chain[0] == "detail"
            bases, qualified, chain, at = [()], True, chain[1:], at + 2
        for base in bases:
            path, rest = base, chain
            while len(rest) > 1 and path + (rest[0],) in spaces:
                path, rest = path + (rest[0],), rest[1:]
            names = self.names.get((path, rest[0]))
            if names:
                at += 2 * (len(path) - len(base))
                kinds = {name.kind for name in names}
                if not qualified and path == base and self.is_hidden(part.tokens, at, kinds, hiding):
                    return None
                return Use(path, rest[0], part.tokens[at].line, detail, names)
        return None

    def is_hidden(self, tokens, at, kinds, hiding):
        """Whether the unqualified name at an index means something other than the declarations at namespace level."""
        members, types, variables = hiding
        name = tokens[at].text
        after = tokens[at + 1].text if at + 1 < len(tokens) else ""
        if "type" in kinds:
            return name in types
        called = "function" in kinds and after in ("(", "<")
        if name in members or name in types or name in variables and not called:
            return True
        return "constant" not in kinds and (not called or self.is_declared_here(tokens, at))

    def is_declared_here(self, tokens, at):
        """Whether the name at an index is the one that a declaration declares: what is before it ends a type."""
        if at == 0:
            return False
        before = tokens[at - 1].text
        if before == ">":
            return ends_template(tokens, at - 1)
        if before in ("&", "*", "&&") and at > 1:
            type_name = tokens[at - 2].text
            return type_name in BUILT_IN or type_name == ">" and ends_template(tokens, at - 2) or (
                is_name(type_name) and (type_name[0].isupper() or at > 2 and tokens[at - 3].text == "::"))
        return is_name(before) or before in BUILT_IN

    def locals_of(self, tokens):
        """The parameters and the local variables and types of a function."""
        found = set()
        for at, token in enumerate(tokens[:-1]):
            if not is_name(token.text):
                continue
            after = tokens[at + 1].text
            if after in (";", "=", "{", ",", ")", "(", "[", ":") and self.is_declared_here(tokens, at):
                found.add(token.text)
            elif at and tokens[at - 1].text in ("[", ",") and after in ("=", ",", "]"):  # a capture or a binding
                found.add(token.text)
            elif at and tokens[at - 1].text in ("struct", "class", "using", "enum"):
                found.add(token.text)
        return found
