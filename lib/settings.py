"""
Settings: sections of a file and flags of a command line -> a dict in which every value was checked.

configs.txt holds of every key its default, and so its type, in [DEFAULT]; what it may be in [ranges] (whole numbers
that are not listed there start at 1); and in [stages] whose sections a stage reads before its own. Of the keys this
file knows `inherits` alone, and it executes no value.
"""
import argparse
import ast
import configparser
import difflib
import functools
import math
import os
import re
import sys

from lib.errors import print_error

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs.txt")


class UserError(SystemExit):
    """
    What the user can mend. Making one prints `error: WHAT: HOW TO FIX`, so make none that is to be caught; raising it
    ends the program with status 2 and without a traceback. A program that goes on all the same, such as a server, shows
    its `message`.
    """

    def __init__(self, message):
        print_error(message)
        super().__init__(2)
        self.message = message


@functools.lru_cache(4)
def read_sections(file=CONFIGS):
    """{section: {key: text}} of a file, read once. [DEFAULT] is one like any other: no other has a copy of its keys."""
    parser = configparser.ConfigParser(default_section="", inline_comment_prefixes="#", interpolation=None)
    parser.read(file)
    return {name: dict(section) for name, section in parser.items() if name}


def default_config(file=CONFIGS):
    """The values of [DEFAULT]. A checkpoint older than a key takes them: they must leave a model as it was before."""
    return {key: ast.literal_eval(text) for key, text in read_sections(file)["DEFAULT"].items()}


def config_names(file=CONFIGS):
    """The sections that --config can name."""
    return [name for name in read_sections(file) if "." not in name and name not in ("DEFAULT", "ranges", "stages")]


def load_config(name="toy", stage="pretrain", flags=(), file=CONFIGS):
    """
    Resolve a section of configs.txt into {key: value}. Later wins: [DEFAULT]; what [name] inherits, then [name]; the
    same for each stage that `stage` inherits, as [name.grow], then for `stage`; then flags, a list of (key, text).
    Raises UserError for an unknown name or key, a value of another type than the default's, and one out of range.
    """
    sections, defaults, names = read_sections(file), default_config(file), config_names(file)
    if name not in names:
        raise UserError(f"no config {name!r} in {os.path.basename(file)}: {closest(name, names)}")
    parents = {n: ast.literal_eval(sections[n].get("inherits", "''")).replace(",", " ").split() for n in names}
    configs = lineage(name, parents)                           # [toy], or [toy, small] where small inherits toy
    stages = lineage(stage, {s: text.split() for s, text in sections.get("stages", {}).items()})
    order = configs + [f"{n}.{s}" for s in stages for n in configs]
    pairs = [pair for section in order for pair in sections.get(section, {}).items()]
    config = dict(defaults)
    if any(key == "inherits" for key, _ in flags):
        raise UserError("inherits belongs into configs.txt: name a section by --config")
    for key, text in [*pairs, *flags]:
        if key not in defaults:
            raise UserError(f"unknown key {key!r}: {closest(key, sorted(defaults))}")
        config[key] = parse_value(key, text, defaults[key])
    for key, value in config.items():
        usual = "1.." if type(value) in (int, tuple) else ""   # isinstance would take True for an int
        if allowed := sections.get("ranges", {}).get(key, usual):
            check_range(key, value, allowed)
    return config


def lineage(name, parents, below=()):
    """What `name` inherits by a table {name: its parents}: the first parent's lineage first, and its own name last."""
    names = []
    for parent in parents.get(name, ()):
        if parent not in parents or parent in (*below, name):
            raise UserError(f"config {name!r} inherits {parent!r}: name another one of {', '.join(parents)}")
        names += lineage(parent, parents, (*below, name))
    return [*names, name]


def words_of(key, file=CONFIGS):
    """The words that a key may be, as [ranges] lists them."""
    return [word.strip() for word in read_sections(file)["ranges"][key].split("|")]


def parse_value(key, text, default):
    """The value of `key` written as `text`, with the type of its default: int, float, bool, tuple or str."""
    kind = type(default)
    try:
        value = ast.literal_eval(text)                         # literals alone: a config cannot run code
    except (ValueError, SyntaxError):
        value = text                                           # words need no quotes on the command line
    if kind is str:
        return value if isinstance(value, str) else text       # a folder may be named 2024
    if kind is tuple:
        value = value if isinstance(value, tuple) else (value,)                    # --channels 48 is (48,)
    elif kind is float and type(value) is int:
        value = float(value)
    parts, part = (value, type(default[0])) if kind is tuple else ((value,), kind)
    if any(type(v) is not part or v != v for v in parts):      # NaN alone differs from itself
        raise UserError(f"{key} = {text}: {key} takes a{'n' * (kind is int)} {kind.__name__} such as {default}")
    return value


def check_range(key, value, allowed=""):
    """
    UserError unless a value, or each of a tuple, is allowed: words, "0..1", "2..", "above 0", or several with |;
    without `allowed` by what configs.txt says in [ranges].
    """
    allowed = allowed or read_sections()["ranges"][key]
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(any(is_allowed(v, choice.strip()) for choice in allowed.split("|")) for v in values):
        words = re.sub(r"(\S+)\.\.(\S+)", r"a value in [\1, \2]", allowed)
        words = re.sub(r"(\S+)\.\.", r"at least \1", words).replace(" |", ",")
        raise UserError(f"{key} = {value}: take {'one of ' * ('|' in allowed)}{words}")


def is_allowed(value, choice):
    """Is a value one of check_range's choices?"""
    low, dots, high = choice.removeprefix("above ").partition("..")
    if dots:
        return float(low) <= value <= float(high or "inf")
    return value > float(low) if choice.startswith("above ") else str(value) == choice


def closest(word, known):
    """A hint: what is close to `word`, or else all that is known. Initials count: learning_rate is close to lr."""
    initials = "".join(part[0] for part in word.split("_") if part)
    close = difflib.get_close_matches(word, known, 1, 0.5) or [k for k in known if k == initials]
    return f"did you mean {close[0]!r}?" if close else "the known ones are " + ", ".join(known)


class Parser(argparse.ArgumentParser):
    """
    A command line: flags of its own (add_argument), and keys of configs.txt as --KEY VALUE or --KEY=VALUE; `keys` are
    those that it takes, all by default. A flag of on and off takes nothing, True or False. Other words stand anywhere.
    """

    def __init__(self, doc, keys=None):
        self.known, self.switches, defaults = set(), set(), default_config()       # --lr ...; those of on and off
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         conflict_handler="resolve")           # a flag of its own wins over a key of that name
        silent = dict(nargs="?", const="True", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for key in defaults if keys is None else keys:
            self.add_argument("--" + key, dest="key " + key, **silent)
            self.switches |= {"--" + key} if type(defaults[key]) is bool else set()

    def add_argument(self, *names, **options):
        if options.get("action") == "store_true":
            self.switches |= set(names)
            options |= {"action": "store", "type": parse_switch, "default": False, "metavar": "True|False"}
        self.known |= set(names)
        return super().add_argument(*names, **options)

    def error(self, message):
        missing = "required" in message                        # words without dashes, such as a folder
        raise UserError(f"{message}: " + ("--help shows examples" if missing else "write --KEY VALUE, as --help tells"))

    def parse_keys(self, words=None):
        """(own flags as argparse has them, [(key, text)] for load_config). UserError for one unknown or given twice."""
        spelled, flags = [], []
        for word in sys.argv[1:] if words is None else words:
            if spelled and spelled[-1] in self.switches and word in ("True", "False"):
                spelled[-1] += "=" + word                      # --fresh False as --fresh=False
                continue
            spelled.append(word)
            if word.startswith("--"):
                flags.append(word.partition("=")[0])
                if flags[-1] not in self.known:
                    raise UserError(f"unknown key {flags[-1][2:]!r}: {closest(flags[-1][2:], self.names())}")
                if flags[-1] in flags[:-1]:
                    raise UserError(f"{flags[-1]} is given twice: give it once")
        # --fresh alone as --fresh=True
        args = self.parse_intermixed_args([word + "=True" * (word in self.switches) for word in spelled])
        keys = [name for name in vars(args) if name.startswith("key ")]
        return args, [(name.removeprefix("key "), vars(args).pop(name)) for name in keys]

    def parse_values(self):
        """(own flags, {key: value} of the keys that were given), each value checked as load_config checks it."""
        args, flags = self.parse_keys()
        config = load_config(flags=flags)
        return args, {key: config[key] for key, _ in flags}

    def answer(self, name):
        """In a script that is run: --help and unknown words are answered here, before what takes seconds to import."""
        if name == "__main__":
            self.parse_keys()

    def names(self):
        """All flags without their dashes, in alphabetic order."""
        return sorted(name[2:] for name in self.known if name.startswith("--"))


def parse_switch(text):
    """The value of a flag of on and off."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError("takes nothing, True or False")
    return text == "True"


def parse_words(text, known, flag):
    """The words of a comma-separated flag. UserError unless all are known, and at least one is there."""
    words = [word for word in text.split(",") if word]
    if not words or not set(words) <= set(known):
        raise UserError(f"{flag} {text}: take some of {','.join(known)}")
    return words


def parse_numbers(text, flag):
    """The numbers of a comma-separated flag. UserError for what is none, or not finite."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):                   # float() takes "nan" and "inf" as well
        raise UserError(f"{flag} {text}: give numbers, such as 1,2,4")
    return numbers
