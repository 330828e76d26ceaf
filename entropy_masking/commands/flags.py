"""The flags of the command lines: declared, parsed, read from a YAML file, and shown in groups by --help."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from entropy_masking import storage
from entropy_masking.errors import UsageError, one_line

Number = TypeVar("Number", int, float)

# (condition, allowed, sentence): if the condition is true, each flag in ``allowed`` may only have the value given there
# (None: it may not be given); otherwise ``sentence`` is the error
Rule = tuple[bool, Mapping[str, object], str]
# ~/… or file://… at the start of an argument, or after = or a comma
PLACE = re.compile(r"(?<![^=,])(?:file://|~(?=/|,|$))[^,]*")
# a URI with user:password@, or with a key or a signature in its query
SECRET = re.compile(
    r"://([^/?#@]*:(?![0-9]+(/|$))[^ ]*@"
    r"|[^ ]*[?&][^=&]*(key|secret|token|sig|auth(?!or)|credential|password|pwd)[^=&]*=)",
    re.IGNORECASE,
)


def flag(name: str) -> str:
    """``--mask-ratio`` of ``mask_ratio``."""
    return f"--{name.replace('_', '-')}"


def check_rules(given: Mapping[str, object], rules: Sequence[Rule], flag_of: Callable[[str], str] = flag) -> None:
    """Refuse flags that contradict others or have no effect with them. A flag that was not given is None.

    Raises UsageError with the sentence of the first rule that the flags break.
    """
    for holds, allowed, sentence in rules:
        for name, value in allowed.items():
            if holds and given.get(name) not in (None, value):
                raise UsageError(sentence.format(flag=flag_of(name), given=given[name], value=value))


def option(help: str, default: object = None) -> Any:
    """A field of a dataclass of flags. It is None if the flag is not given and has no default."""
    return dataclasses.field(default=default, metadata={"help": help})


class Parser(argparse.ArgumentParser):
    """A parser with --help and --config. Errors raise UsageError. --help keeps the line breaks of the description.

    Args:
        groups: titles and the names of their flags, which --help shows in this order; --help-all shows the others too.
            Without groups, --help shows all flags.
    """

    def __init__(self, prog: str, description: str | None, groups: Mapping[str, str] | None = None) -> None:
        super().__init__(prog, description=description, add_help=False, allow_abbrev=False, formatter_class=_Help)
        self.groups = {title: names.split() for title, names in (groups or {}).items()}
        self.argv: list[str] = []  # of the last ``parse_args``, with the flags of --config
        self.add_argument("--help", action=_ShowHelp, help="show this help")
        if groups:
            self.add_argument("--help-all", action=_ShowHelp, help="show all flags")
        self.add_argument("--config", metavar="FILE", help="YAML file of flags; those of the command line win")

    def add_fields(self, options: type) -> None:
        """Add the flags that a dataclass declares with ``option``."""
        kinds = get_type_hints(options)
        for field in dataclasses.fields(options):
            if field.init:
                required = field.default is dataclasses.MISSING
                settings = {"required": True} if required else {"default": field.default}
                settings |= {"help": field.metadata["help"]} | _by_type(field.name, kinds[field.name])
                self.add_argument(flag(field.name), **settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse flags, after those of --config. Raises UsageError."""
        texts = list(sys.argv[1:] if args is None else args)
        # file URIs and ~ become plain paths, also in --flag=~/a, name=~/a and b,~/a
        self.argv = [
            PLACE.sub(lambda place: storage.local_path(place[0]), text) for text in [*self.configured(texts), *texts]
        ]
        for before, text in pairwise(["", *self.argv]):
            named = text if text[:2] == "--" else before
            name = named.partition("=")[0] if named[:2] == "--" else "an argument"
            if not text or (text[:2] == "--" and text.find("=") == len(text) - 1):
                raise UsageError(f"{name} is empty; give it a value, or leave it out")
            if SECRET.search(text):  # outputs would repeat it
                fix = "give credentials in environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                raise UsageError(f"{name} is a URI with a password, a key or a signature; {fix}")
        flags, unknown = self.parse_known_args(self.argv)
        if unknown:
            raise UsageError(self.unknown(unknown[0]))
        del flags.config
        return flags

    def configured(self, texts: list[str]) -> list[str]:
        """Remove --config from ``texts``, and return the flags of its file. Raises UsageError."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error  # type: ignore[method-assign]
        given, texts[:] = finder.parse_known_args(texts)
        if given.config is None:
            return []
        import yaml

        try:
            with open(storage.local_path(given.config), encoding="utf-8") as file:
                values = yaml.load(file, yaml.BaseLoader) or {}  # all values are text, also no and 1e-3
        except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
            raise UsageError(f"--config {given.config} cannot be read: {one_line(error)}") from None
        if not isinstance(values, dict):
            raise UsageError(f"--config {given.config} is not a mapping of flags to values, such as top-k: 16")
        return [text for name, value in values.items() for text in self._texts(given.config, str(name), value)]

    def _texts(self, file: str, name: str, value: object) -> list[str]:
        """An entry of a YAML file as on a command line."""
        own = {action.dest: action for action in self._actions}.get(name.replace("-", "_"))
        if own is None or name == "config":
            raise UsageError(f"--config {file}: {self.unknown(flag(name))}")
        values: list[Any] = value if isinstance(value, list) else [value]
        several = isinstance(own, argparse._AppendAction) or own.nargs
        if not all(isinstance(text, str) for text in values) or (len(values) != 1 and not several):
            raise UsageError(f"--config {file}: {name} is not {'a list of values' if several else 'a value'}")
        if own.nargs == 0:  # a switch
            if values[0].lower() not in ("true", "false"):
                raise UsageError(f"--config {file}: {name} is {values[0]!r}; use true or false")
            return [flag(name)] * (values[0].lower() == "true")
        if own.nargs is None and own.option_strings:  # one value each time
            return [f"{flag(name)}={text}" for text in values]
        return [*own.option_strings[:1], *values]

    def to_yaml(self) -> str:
        """The flags of the last ``parse_args`` as a file for --config.

        Without --overwrite, so that the file repeats or resumes the run.
        """
        import yaml

        entries: dict[str, list[str]] = {}
        for text in self.argv:
            first, equals, value = text.partition("=")
            if action := self._option_string_actions.get(first):
                values = entries.setdefault(first[2:], [])
                if not isinstance(action, argparse._AppendAction):
                    values.clear()  # the last one wins
                values += [value] if equals else []
            else:
                values.append(text)
        entries.pop("overwrite", None)
        single = {name: values[0] if len(values) == 1 else values or True for name, values in entries.items()}
        return yaml.safe_dump(single, sort_keys=False, allow_unicode=True)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def unknown(self, text: str) -> str:
        """A sentence about a flag that does not exist."""
        name = text.partition("=")[0]
        known = [text for action in self._actions for text in action.option_strings]
        near = difflib.get_close_matches(name, known, 1)
        all_flags = "--help-all" if self.groups else "--help"
        hint = f"the nearest is {near[0]}, and {all_flags} lists all" if near else f"{all_flags} lists its flags"
        return f"{name} is not a flag of {self.prog}; {hint}"

    def help_text(self, everything: bool) -> str:
        """The help; without groups it always shows everything."""
        actions = {action.dest: action for action in self._actions}
        groups = {title: [actions.pop(name) for name in names] for title, names in self.groups.items()}
        if everything or not groups:
            groups["other flags" if groups else "flags"] = list(actions.values())
        else:
            groups["help"] = [actions[name] for name in ("config", "help", "help_all")]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions if not self.groups else [], [])
        formatter.add_text(self.description)
        for title, own in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(own)
            formatter.end_section()
        return formatter.format_help()


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        columns = os.get_terminal_size().columns if sys.stdout.isatty() else 120
        super().__init__(prog, max_help_position=36, width=min(columns, 120) - 2)


class _ShowHelp(argparse.Action):
    """Prints the help, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        print(parser.help_text(everything=self.dest == "help_all"), end="")
        parser.exit()


def _by_type(name: str, kind: Any) -> dict[str, Any]:
    """The settings of argparse for a field of a type, which may be ``| None``."""
    kinds = [one for one in get_args(kind) if one is not NoneType] if NoneType in get_args(kind) else [kind]
    if get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0])}
    if kinds[0] is bool:
        return {"nargs": "?", "const": True, "type": boolean, "metavar": "true|false"}
    return {"type": kinds[0], "metavar": {int: "N", float: "X"}.get(kinds[0], name.split("_")[-1].upper())}


def boolean(text: str) -> bool:
    """argparse type of true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _number(kind: type[Number], allowed: Callable[[Number], bool], wanted: str) -> Callable[[str], Number]:
    """The argparse type of a number."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


positive = _number(int, lambda value: value > 0, "a whole number above 0")
not_negative = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
