#!/usr/bin/env python3
"""What xchat.c promises about its own form, checked.

The source is read as text: chapters by their banners, functions by what stands at the left
margin. Each check is a function that returns what is wrong, one short text a fault; it is
printed as "ok shape.NAME" or "FAIL shape.NAME: first faults". The status is 1 if one failed.

    python3 test/shape.py [NAME...]
"""

import collections
import os
import re
import sys
import unicodedata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS = 120
LONG, TOO_LONG, LONG_SHARE = 60, 100, 0.03   # lines of a function; share that may be long
COMMENTS = 1 / 5                             # share of lines that carry comment

# Functions and structs that are declared before they are defined, and why.
FORWARD = {
    "conn": "struct proto and struct conn point at each other",
    "member": "a connection points at its rooms, which are a later chapter",
}

# State that another chapter may name, and why. Chapter 13 is main(), which sets all up.
SHARED = {
    "opt": ("*", "limits: set by Main before anything runs, read everywhere"),
    "now": ("*", "the clock: written by clock_read() alone, read everywhere"),
    "tables": (["Main"], "main() fills in the random key"),
    "http": (["Main"], "main() sets the key function of a table"),
    "rooms": (["Main"], "main() sets the key function of a table"),
    "loop": (["Main"], "main() hands rooms_flush() to the loop, and asks for the port it got"),
}

TOP = {"xchat.c", "Makefile", "README.md", "LICENSE", "test"}
BANNED = r"strcpy|stpcpy|strcat|sprintf|vsprintf|gets|atoi|atol|atoll|strtok|alloca"


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def blank(text):
    return re.sub(r"[^\n]", " ", text)


class Source:
    """The text, and the same without comments, and without comments and literals: with
    blanks in their place, so that positions are the same in all."""

    LEXEMES = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.S)
    BANNER = re.compile(r"^/\* =+\n \* (\d+)\. ([^\n]+)\n \* =+(.*?)\*/", re.M | re.S)
    FUNCTION = re.compile(r"^(?:PRINTF\([^)]*\) )?(?:static )?[a-z_][\w ]*?[ *](\w+)\(([^;{}=]*)\) \{", re.M)

    def __init__(self, text):
        self.text = text
        self.lines = text.split("\n")[:-1]
        comment = lambda m: blank(m[0]) if m[0][0] == "/" else m[0]
        self.no_literals = self.LEXEMES.sub(lambda m: m[0] if m[0][0] == "/" else blank(m[0]), text)
        self.no_comments = self.LEXEMES.sub(comment, text)
        self.code = self.LEXEMES.sub(lambda m: blank(m[0]), text)
        self.banners = list(self.BANNER.finditer(text))
        self.chapters = [(int(b[1]), b[2]) for b in self.banners]
        self.functions = {}   # name: where it starts, where it ends
        for m in self.FUNCTION.finditer(self.code):
            last = "\n}" if self.code[m.end()] == "\n" else "}\n"   # a body on the same line
            self.functions[m[1]] = m.start(), self.code.index(last, m.end()) + len(last)

    def line(self, position):
        return self.text.count("\n", 0, position) + 1

    def chapter(self, position):
        """The name of the chapter at this position; "" is what stands before the first."""
        names = [b[2] for b in self.banners if b.start() <= position]
        return names[-1] if names else ""

    def uses(self, name):
        """Where this identifier stands, but as a member of something."""
        return [m.start() for m in re.finditer(r"(?<![\w.])(?<!->)%s\b" % re.escape(name), self.code)]


SRC = Source(read("xchat.c"))


def contents():
    """The table of contents in the opening comment is the list of banners."""
    opening = SRC.text[:SRC.text.index("*/")]
    table = re.findall(r"^ \* +(\d+)\. (\S.*?)  +(\S.*)$", opening, re.M)
    found = [(int(number), name) for number, name, clause in table]
    if found != SRC.chapters:
        yield "contents %s, banners %s" % (found, SRC.chapters)
    if SRC.chapters != sorted(SRC.chapters):
        yield "banners are not in order"
    life = opening[opening.find("life of one message"):]
    for name in re.findall(r"\b[a-z]+_[a-z_]+\b", life):
        if name not in SRC.functions:
            yield "%s() of the opening comment does not exist" % name


def bottom_up():
    """Nothing is named before it is defined (the compiler sees to that) or declared: and
    there are only few declarations."""
    declared = re.findall(r"^(?:static )?[a-z_][\w ]*?[ *](\w+)\([^;{}=]*\);", SRC.code, re.M)
    declared += re.findall(r"^struct (\w+);", SRC.code, re.M)
    for name in sorted(set(declared) ^ set(FORWARD)):
        yield "%s is %s" % (name, "declared ahead" if name in declared else "listed here, but not declared ahead")


def state():
    """A chapter's state is one struct, and nobody else names it."""
    names = re.findall(r"^(static struct \{.*?^\} (\w+);)", SRC.code, re.M | re.S)
    owners = collections.Counter()
    for body, name in names:
        start = SRC.code.index(body)
        home = SRC.chapter(start)
        owners[home] += 1
        guests, _ = SHARED.get(name, ([], ""))
        for position in SRC.uses(name):
            guest = SRC.chapter(position)
            if guest != home and guests != "*" and guest not in guests:
                yield "%s of %s in %s, line %d" % (name, home, guest, SRC.line(position))
    for chapter, count in owners.items():
        if count > 1:
            yield "%s has %d structs of state" % (chapter, count)
    for name in SHARED:
        if name not in [n for _, n in names]:
            yield "%s is shared, but does not exist" % name
    for m in re.finditer(r"^static (?!const\b|struct \{|inline\b)[\w ]+?[ *]+(\w+)(?:\[[^]]*\])*(?: = |;)", SRC.code, re.M):
        yield "%s is a loose global, line %d" % (m[1], SRC.line(m.start()))


def lengths():
    """Functions are short."""
    long = []
    for name, (start, end) in SRC.functions.items():
        n = SRC.text[start:end].strip().count("\n") + 1
        if n > LONG:
            long.append("%s() has %d lines" % (name, n))
        if n > TOO_LONG:
            yield long[-1]
    if len(long) > LONG_SHARE * len(SRC.functions):
        yield "over %d lines: %s" % (LONG, ", ".join(long))


def columns():
    """No line is too wide on the screen, tabs and blank ends there are none."""
    for number, line in enumerate(SRC.lines, 1):
        width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)
        if width > COLUMNS:
            yield "line %d has %d columns" % (number, width)
        if "\t" in line or line != line.rstrip():
            yield "line %d has a tab, or blanks at its end" % number


def ascii_only():
    """Only the page, and literals, may hold other characters."""
    for m in re.finditer(r"[^\x00-\x7f]", SRC.no_literals):
        yield "%r in line %d" % (m[0], SRC.line(m.start()))


def banned():
    """Functions that do not know how much room there is; arrays of a length that is not constant."""
    for m in re.finditer(r"\b(%s)\s*\(" % BANNED, SRC.code):
        yield "%s() in line %d" % (m[1], SRC.line(m.start()))
    for m in re.finditer(r"^ +(?:static |const )*(?!return|else|case)(?:unsigned |struct )?[a-z_]\w* [^;={}()?>]*?\w+\[([^]]+)\]", SRC.code, re.M):
        size = re.sub(r"sizeof *(\([^()]*\)|[\w.>-]+)|\b0x\w+|\b[A-Z][A-Z0-9_]*\b", "", m[1])
        if re.search(r"[a-z]", size):
            yield "the array in line %d has the length %s" % (SRC.line(m.start()), m[1])


def comments():
    """A reader is told why: enough lines carry comment."""
    with_comment = sum(a != b for a, b in zip(SRC.lines, SRC.no_comments.split("\n")))
    if with_comment < COMMENTS * len(SRC.lines):
        yield "%d of %d lines carry comment" % (with_comment, len(SRC.lines))


def essays():
    """Each chapter opens with an essay, which ends with what it owns, whom it calls, and
    who calls it: chapters by number and name, and those that really do."""
    calls = collections.defaultdict(set)   # chapter -> those it calls
    for name, (start, end) in SRC.functions.items():
        for position in SRC.uses(name):
            calls[SRC.chapter(position)].add(SRC.chapter(start))
    order = [name for _, name in SRC.chapters]
    for banner in SRC.banners:
        name, essay = banner[2], re.sub(r"\n \*", "\n", banner[3])
        if essay.count("\n") < 10:
            yield "%s: an essay of %d lines" % (name, essay.count("\n"))
        room = {key: re.sub(r"\s+", " ", text).strip(" .") for key, text in re.findall(
            r"\b(Owns|Calls|Called by|Promises): +(.*?)(?=\.?\s+(?:Owns|Calls|Called by|Promises):|\s*\Z)", essay, re.S)}
        for key in "Owns", "Calls", "Called by":
            if not room.get(key):
                yield "%s: no %s" % (name, key)
        near = {
            "Calls": (calls[name] - {name}, order[:order.index(name)]),
            "Called by": ({other for other in order if name in calls[other]} - {name}, order[order.index(name) + 1:]),
        }
        for key, (really, possible) in near.items():
            said = room.get(key, "")
            if re.match(r"all above|all below|everybody", said):
                continue
            named = set(re.findall(r"\d+ ([^,]+)", said))
            for wrong in named - {n for n in order if "%d %s" % (dict(map(reversed, SRC.chapters))[n], n) in said}:
                yield "%s: %s: no chapter is named %s" % (name, key, wrong)
            for missing in sorted(really - named):
                yield "%s: %s: %s is missing" % (name, key, missing)
            for wrong in sorted(named - set(possible)):
                yield "%s: %s: %s is on the other side" % (name, key, wrong)


def readme():
    """The README has the options that --help prints, and its examples."""
    rows = re.findall(r'\{"([a-z-]+)", (?:"([^"]+)"|NULL), (?:\'(.)\'|0), ([^,]+), ([^,]+), ([^,]+), ([^,]+),',
                      SRC.no_comments[SRC.text.index("} options[] = {"):])
    program = []
    for name, arg, letter, target, _, _, default in rows:
        base, _, shift = default.partition(" << ")
        program.append((name, letter, arg, str(int(base) << int(shift or 0)) if target != "NULL" and arg else None))
    found = re.findall(r"^\| `--([a-z-]+)`(?:, `-(.)`)?(?: ([A-Z]+))? \| (.*?) ?\| ", read("README.md"), re.M)
    documented = [(name, letter, arg, default) for name, letter, arg, default in found]
    if [row[:3] for row in program] != [row[:3] for row in documented]:
        yield "rows: %s" % sorted(set(row[:3] for row in program) ^ set(row[:3] for row in documented))
    for (name, _, _, default), row in zip(program, documented):
        if default is not None and default != row[3]:
            yield "--%s: default %s, in the README %s" % (name, default, row[3])
    if not program:
        yield "the options are not found in the source"
    for example in re.findall(r'\\n  (xchat [^"\\]*)', SRC.text):
        if not re.search("^    %s$" % re.escape(example), read("README.md"), re.M):
            yield "example of --help: %s: not in the README" % example


def attacks():
    """The table of test/attacks.py names cases that exist, and all of its own."""
    text = read("test/attacks.py")
    table = text.split('"""')[1].partition("What is tried")[2].partition("\n")[2]
    names = {name for line in table.split("\n") for name in line[55:].split()}
    for name in sorted(names):
        file, _, case = name.rpartition(".")
        file = "unit.c" if file == "unit" else (file or "attacks") + ".py"
        wanted = r"^(static void|def) %s\(|^# %s:" % (case, case.removeprefix("scene_"))
        if not re.search(wanted, read("test/" + file), re.M):
            yield "there is no " + name
    for name in re.findall(r"^@(?:attack|case)\([^@]*?\ndef (\w+)", text, re.M):
        if name not in names:
            yield name + " is not in the table"


def notes():
    """No notes to ourselves in what we hand out."""
    word = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    names = ["xchat.c", "README.md", "Makefile"]
    names += ["test/" + name for name in os.listdir(os.path.join(ROOT, "test"))]
    for name in sorted(names):
        if os.path.isfile(os.path.join(ROOT, name)):
            for number, line in enumerate(read(name).split("\n"), 1):
                if word.search(line):
                    yield "%s:%d" % (name, number)


def top():
    """One source, and what belongs to it."""
    ignored = {line.strip().strip("/") for line in read(".gitignore").split("\n")}
    names = {name for name in os.listdir(ROOT) if not name.startswith(".")} - ignored
    for name in sorted(names ^ TOP):
        yield "%s is %s" % (name, "there" if name in names else "missing")


def main():
    failed = False
    checks = [contents, bottom_up, state, lengths, columns, ascii_only, banned, comments, essays, readme, attacks, notes, top]
    for check in checks:
        if sys.argv[1:] and check.__name__ not in sys.argv[1:]:
            continue
        faults = list(check())
        failed = failed or bool(faults)
        more = ["and %d more" % (len(faults) - 5)] if len(faults) > 5 and not sys.argv[1:] else []
        shown = [fault[:300] for fault in faults[:5] + more] if more else faults
        print("FAIL shape.%s: %s" % (check.__name__, "; ".join(shown)) if faults else "ok shape." + check.__name__)
    return failed


if __name__ == "__main__":
    sys.exit(main())
