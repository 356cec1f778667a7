"""Reads wschat.hpp as C++ tokens: which names each section declares, and which names of other sections it uses.

This is not a compiler. It knows namespaces, classes, functions, and the names that hide others: members, parameters,
locals. A macro of the header that stands for a declaration is not expanded.
"""
import collections
import re

Token = collections.namedtuple("Token", "text line")
# A name at namespace level. path: the namespaces inside of wschat, without detail. defined: not only declared forward.
Name = collections.namedtuple("Name", "path name kind detail defined line")
# One declaration without its nested ones. classes: the names of the classes around it, the outermost first.
Part = collections.namedtuple("Part", "path detail classes tokens")
Use = collections.namedtuple("Use", "path name line detail names")

TOKEN = re.compile(r"""
    (?P<skip> \s+ | //[^\n]* | /\*.*?\*/ | (?<![^\n])[ \t]*\#(?:[^\n]*\\\n)*[^\n]* )
  | (?P<text> (?:u8|u|U|L)?R"(?P<mark>[^\s()\\]*)\(.*?\)(?P=mark)" | (?:u8|u|U|L)?"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)+' )
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
    """The tokens of the header without comments, literals and directives."""
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
    raise SystemExit(f"wschat.hpp:{tokens[at].line}: no bracket closes this one")


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


def opens_before(tokens, at):
    """Whether the > at an index closes the arguments of a template, as in std::vector<int>."""
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
    """names: {(path, name): [Name]}, parts: [Part], members: {class: names}, nested: {class: types}, bases: {class: names}."""

    def __init__(self, text):
        self.tokens = tokens_of(text)
        self.names = collections.defaultdict(list)
        self.parts = []
        self.members = collections.defaultdict(set)
        self.nested = collections.defaultdict(set)
        self.bases = collections.defaultdict(set)
        end = self.read(0, len(self.tokens), None, False, ())
        if end != len(self.tokens):
            raise SystemExit(f"wschat.hpp:{self.tokens[end].line}: this bracket closes nothing")

    # ---- declarations ------------------------------------------------------------------------------------------------

    def read(self, at, end, path, detail, classes):
        """Reads the declarations of a namespace or a class up to the bracket that closes it. path None: outside of wschat."""
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
            raise SystemExit(f"wschat.hpp:{self.tokens[first].line}: an alias of a namespace: this script does not know it")
        for word in (token.text for token in self.tokens[first:at] if is_name(token.text)):
            if word == "wschat":
                path = ()
            elif word == "detail":
                detail = True
            elif path is not None:
                path += (word,)
        return self.read(at + 1, end, path, detail, ()) + 1

    def read_declaration(self, at, end, path, detail, classes):
        """One declaration. Returns the index after it."""
        tokens, first = self.tokens, at
        parameters = set()
        while tokens[at].text == "template":
            after = after_angles(tokens, at + 1)
            parameters |= {tokens[i].text for i in range(at, after)
                           if is_name(tokens[i].text) and tokens[i + 1].text in (",", ">", "=")
                           and tokens[i - 1].text not in ("=", "::")}
            at = after
        while tokens[at].text in ("WSCHAT_COLD", "WSCHAT_NOINLINE") or (tokens[at].text, tokens[at + 1].text) == ("[", "["):
            at = at + 1 if tokens[at].text != "[" else closing(tokens, at) + 1
        kind = tokens[at].text
        if kind in ("class", "struct", "union", "enum") and (after := self.read_type(first, at, end, path, detail, classes)):
            return after
        if kind == "using":
            after = at
            while tokens[after].text != ";":
                after += 1
            alias = tokens[at + 1].text if tokens[at + 2].text == "=" else tokens[after - 1].text
            if tokens[at + 1].text != "namespace":
                self.declare(path, detail, classes, alias, "type", True, tokens[at].line)
            self.add_part(path, detail, classes, first, after, parameters)
            return after + 1
        return self.read_value(first, at, path, detail, classes, parameters)

    def read_type(self, first, at, end, path, detail, classes):
        """A class or an enumeration; 0 if it is a variable or a function of such a type."""
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
            self.add_part(path, detail, classes, first, at, set())
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
        self.add_part(path, detail, classes, first, at, set())
        if kind == "enum":
            after = closing(tokens, at)
            scoped = "class" in (token.text for token in tokens[first:head])
            for index in range(at + 1, after):
                if is_name(tokens[index].text) and tokens[index - 1].text in ("{", ",") and not scoped:
                    self.declare(path, detail, classes, tokens[index].text, "constant", True, tokens[index].line)
            self.add_part(path, detail, (*classes, name), at + 1, after, set())
        else:
            after = self.read(at + 1, end, path, detail, (*classes, name))
        at = after + 1
        while tokens[at].text != ";":  # struct {...} variable;
            if is_name(tokens[at].text):
                self.declare(path, detail, classes, tokens[at].text, "constant", True, tokens[at].line)
            at += 1
        return at + 1

    def read_value(self, first, at, path, detail, classes, parameters):
        """A function, or variables."""
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
        self.add_part(path, detail, classes, first, at, parameters)
        return at + 1

    def owner(self, start, at):
        """The classes before the name at an index: ("Socket",) for Socket::send; () for a free function."""
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
        """From the first member initializer of a constructor to the bracket of its body."""
        tokens = self.tokens
        while True:
            while tokens[at].text not in ("(", "{"):
                at = after_angles(tokens, at) if tokens[at].text == "<" else at + 1
            at = closing(tokens, at) + 1
            if tokens[at].text == ".":  # a pack
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

    def add_part(self, path, detail, classes, first, end, parameters):
        if path is not None:
            self.parts.append((Part(path, detail, classes, self.tokens[first:end + 1]), parameters))

    # ---- uses --------------------------------------------------------------------------------------------------------

    def hidden(self, classes):
        """What the members of the classes around a declaration, and those of their bases, hide: (all names, the types)."""
        todo, seen, members, types = list(classes), set(), set(), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                members |= self.members[name]
                types |= self.nested[name]
                todo += self.bases[name]
        return members, types

    def uses(self):
        """Each use of a name at namespace level: [Use]. names: the declarations that it may mean."""
        spaces = {path[:depth] for path, _ in self.names for depth in range(len(path) + 1)}
        found = []
        for part, parameters in self.parts:
            members, types = self.hidden(part.classes)
            types = types | parameters
            locals_ = self.locals_of(part.tokens)
            for index, token in enumerate(part.tokens):
                before = part.tokens[index - 1].text if index else ""
                if not is_name(token.text) or before in (".", "->"):
                    continue
                if before == "::" and index > 1 and part.tokens[index - 2].text not in KEYWORDS | {
                        "(", ",", "{", "}", ";", "=", "!", "&", "?", ":", "<", "[", "&&", "|", "+", "-"}:
                    continue  # the rest of a chain
                if before == "::":
                    continue  # a global name
                chain = [token.text]
                at = index
                while at + 2 < len(part.tokens) and part.tokens[at + 1].text == "::" and is_name(part.tokens[at + 2].text):
                    chain.append(part.tokens[at + 2].text)
                    at += 2
                found += self.resolve(part, chain, index, at, spaces, members, types, locals_)
        return found

    def resolve(self, part, chain, index, at, spaces, members, types, locals_):
        """The use that a chain of names is: [Use], or [] if it means nothing at namespace level."""
        detail, qualified = False, False
        base, place = (), index
        while chain and chain[0] in ("wschat", "detail") and len(chain) > 1:
            detail = detail or chain[0] == "detail"
            qualified = True
            chain, place = chain[1:], place + 2
        paths = [()] if qualified else [part.path[:depth] for depth in range(len(part.path), -1, -1)]
        for base in paths:
            path, rest, where = base, chain, place
            while len(rest) > 1 and path + (rest[0],) in spaces:
                path, rest, where = path + (rest[0],), rest[1:], where + 2
            names = self.names.get((path, rest[0]), []) if rest else []
            if not names:
                continue
            if not qualified and path == base:
                kinds = {name.kind for name in names}
                after = part.tokens[where + 1].text if where + 1 < len(part.tokens) else ""
                if rest[0] in types:
                    return []
                if "type" not in kinds:
                    if rest[0] in members or rest[0] in locals_ and not (after == "(" and "function" in kinds):
                        return []
                    if "function" in kinds and "constant" not in kinds:
                        if after not in ("(", "<") or self.is_declared_here(part.tokens, where):
                            return []
            return [Use(path, rest[0], part.tokens[where].line, detail, names)]
        return []

    def is_declared_here(self, tokens, at):
        """Whether the name at an index is the one that a declaration introduces."""
        if at == 0:
            return False
        before = tokens[at - 1].text
        if before == ">":
            return opens_before(tokens, at - 1)
        if before in ("&", "*", "&&") and at > 1:
            type_name = tokens[at - 2].text
            return type_name in BUILT_IN or type_name == ">" and opens_before(tokens, at - 2) or (
                is_name(type_name) and (type_name[0].isupper() or at > 2 and tokens[at - 3].text == "::"))
        return is_name(before) or before in BUILT_IN

    def locals_of(self, tokens):
        """The parameters and the locals of a declaration."""
        found = set()
        for at, token in enumerate(tokens[:-1]):
            if not is_name(token.text):
                continue
            after = tokens[at + 1].text
            if after in (";", "=", "{", ",", ")", "(", "[", ":") and self.is_declared_here(tokens, at):
                found.add(token.text)
            elif at and tokens[at - 1].text in ("[", ",") and after in ("=", ",", "]"):  # a capture, a structured binding
                found.add(token.text)
            elif at and tokens[at - 1].text in ("struct", "class", "using", "enum"):
                found.add(token.text)
        return found
