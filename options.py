"""What an option is: declared once, beside what it configures.

A class that users configure has an `Options`: a frozen dataclass whose fields are made by
:func:`option`. From these fields come the command line with its help, the tables of docs/flags.md,
bounds and choices, what has no effect in a run, what a checkpoint fixes, and what `model.txt`
shows. Constructors keep explicit keywords and check them by building their `Options`.

This file imports nothing of ours.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NoReturn

__all__ = [
    "FlagParser",
    "HelpFormatter",
    "Option",
    "OptionError",
    "Options",
    "add_flag",
    "check_at_least",
    "check_choice",
    "check_fraction",
    "check_range",
    "check_stored",
    "did_you_mean",
    "flagged",
    "merge_options",
    "option",
    "read_texts",
    "whole_numbers",
]


class OptionError(ValueError):
    """A value that cannot be used; the message is a sentence that begins with the option's name."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Its name, also that of the flag.
        default: Its default.
        meaning: What it does, in a few words; unit and range where they are not obvious.
        kind: bool, int, float or str.
        least: Smallest value.
        most: Largest value.
        above: All values are larger than this.
        below: All values are smaller than this.
        choices: The values there are; a mapping of them may hold others that it does not list.
        several: "list": one or more values (``--name a b``); "commas": one value, or several in
            one word (``1,3,5``); "range": one value, or the two ends of a range (``--name a b``).
        metavar: What stands for the value in help texts.
        bare: The value of a flag that stands without one; None: it needs one.
        argument: Name of the constructor's keyword, if it is another one.
        trainers: The ways of training that read it; empty: all.
        when: Other options and the values of theirs that it belongs to, e.g.
            ``{"sampling_type": ("spatial",)}``: elsewhere it is not shown.
        fixed: Whether it decides what the weights of a checkpoint mean; None: options of models and
            layers do, others do not.
        resumable: Whether a resumed run may change it: it alters how long and where a run goes,
            not what is computed.
        of_run: Whether it says what kind of run it is: never taken over from a former one.
    """

    name: str
    default: Any
    meaning: str
    kind: type = str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] | None = None
    several: str | None = None
    metavar: str | None = None
    bare: Any = None
    argument: str | None = None
    trainers: tuple[str, ...] = ()
    when: Mapping[str, tuple] = field(default_factory=dict)
    fixed: bool | None = None
    resumable: bool = False
    of_run: bool = False

    def is_read_by(self, trainer: str | None) -> bool:
        """Say whether a way of training reads it."""
        return trainer is None or not self.trainers or trainer in self.trainers

    def parse(self, text: str) -> Any:
        """Read a value from a word of the command line or of an args.txt.

        Raises:
            ValueError: If it is no number, or out of bounds.
        """
        if self.several == "commas":
            values = [self._parse(part) for part in text.strip("[]").split(",")]
            return values[0] if len(values) == 1 else values
        return self._parse(text)

    def _parse(self, text: str) -> Any:
        if self.kind is bool:
            if text not in ("True", "False"):
                raise ValueError(f"must be True or False (got {text})")
            return text == "True"
        try:
            value = self.kind(text)
        except ValueError as error:
            raise ValueError(f"invalid {self.kind.__name__} value: {text!r}") from error
        if (problem := self.out_of_bounds(value)) is not None:
            raise ValueError(f"{problem} (got {text})")
        return value

    def out_of_bounds(self, value: Any) -> str | None:
        """Say which bound a number breaks: "must be at least 1"; None if it keeps them all."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not math.isfinite(value):
            return "must be a finite number"
        kept = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )  # comparisons with NaN are false
        if kept:
            return None
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None and high - low <= 10:
            brackets = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"must lie in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
        if low is not None and value <= low:  # a far bound is no help against the near one
            return f"must be {'at least' if self.above is None else 'above'} {low:.12g}"
        return f"must be {'at most' if self.below is None else 'below'} {high:.12g}"

    def check(self, value: Any) -> None:
        """Refuse a value that is out of bounds or none of the choices.

        Raises:
            OptionError: A sentence with the value, the bound or the choices, and the meaning.
        """
        if value is None and self.default is None:
            return
        many = isinstance(value, list | tuple)
        if many and self.several is None:
            raise OptionError(f"{self.name} takes one value (got {value}): {self.meaning}.")
        for item in value if many else [value]:
            if self.choices is not None:
                check_choice(self.name, item, self.choices)
            if (problem := self.out_of_bounds(item)) is not None:
                raise OptionError(f"{self.name} {problem} (got {item}): {self.meaning}.")
        if self.several == "range" and isinstance(value, list | tuple):
            check_range(self.name, value)


def option(default: Any, meaning: str, *, kind: type | None = None, **details: Any) -> Any:
    """Make a field of an :class:`Options` dataclass; the rest as in :class:`Option`.

    Args:
        default: The default; its type is the option's unless `kind` says otherwise.
        meaning: What it does.
        kind: Type of the value.
        **details: Further attributes of :class:`Option`.
    """
    kind = kind or (str if default is None else type(default))
    if details.get("choices") is not None:
        details["choices"] = tuple(details["choices"])
    made = Option("", default, meaning, kind=kind, **details)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"option": made})
    return field(default=default, metadata={"option": made})


@dataclass(frozen=True)
class Options:
    """Options of one class; a subclass adds fields made by :func:`option`.

    Building one checks every field by itself. A subclass that has rules among its fields adds
    them to `__post_init__`.

    Attributes:
        title: Heading of the options in help texts and tables.
    """

    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field."""
        for each in self.declared():
            each.check(getattr(self, each.name))

    @classmethod
    def declared(cls) -> tuple[Option, ...]:
        """Return the options, in the order in which they are declared."""
        return tuple(
            dataclasses.replace(f.metadata["option"], name=f.name) for f in dataclasses.fields(cls)
        )

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of the options."""
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the defaults by name."""
        return {
            f.name: f.default if f.default is not MISSING else f.default_factory()
            for f in dataclasses.fields(cls)
        }

    @classmethod
    def keywords(cls, values: Mapping[str, Any], trainer: str | None = None) -> dict[str, Any]:
        """Pick the values of these options, by the names of the constructor's keywords.

        Options that say what kind of run it is are left out: they are the command line's.

        Args:
            values: The values of all options by name.
            trainer: Way of training; options that it does not read keep their defaults.
        """
        return {
            each.argument or each.name: (
                values[each.name] if each.is_read_by(trainer) else each.default
            )
            for each in cls.declared()
            if not each.of_run
        }

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse what cannot work with the other options of a run; before any work is done.

        Args:
            values: The values of all options of the run by name.

        Raises:
            ValueError: What is wrong, why, and what to try.
        """

    def describe(self, leave_out: Iterable[str] = ()) -> str:
        """Word the options that matter: ``K=9, padding=1``."""
        shown = (each.name for each in self._shown() if each.name not in leave_out)
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)

    def _shown(self) -> Iterator[Option]:
        for each in self.declared():
            if all(getattr(self, name) in values for name, values in each.when.items()):
                yield each


# ---------------------------------------------------------------------------------------------
# Flags


def merge_options(pairs: Iterable[tuple[str, Option]]) -> dict[str, tuple[str, Option]]:
    """Let options of one name share a flag, which takes what any of them takes.

    Args:
        pairs: Headings and options; of one name the first one's default and heading are shown.
    """
    merged: dict[str, tuple[str, Option]] = {}
    for title, each in pairs:
        if each.name not in merged:
            merged[each.name] = (title, each)
            continue
        title, first = merged[each.name]
        changes: dict[str, Any] = {"several": first.several or each.several}
        if first.choices is not None:
            changes["choices"] = tuple(dict.fromkeys((*first.choices, *(each.choices or ()))))
        for bound, loosest in (("least", min), ("most", max), ("above", min), ("below", max)):
            pair = (getattr(first, bound), getattr(each, bound))
            changes[bound] = None if None in pair else loosest(pair)
        if {first.kind, each.kind} == {int, float}:
            changes["kind"] = float  # whole numbers are taken too, see `whole_numbers`
        if each.meaning not in first.meaning:
            changes["meaning"] = f"{first.meaning}; {each.meaning}"
        merged[each.name] = (title, dataclasses.replace(first, **changes))
    return merged


def whole_numbers(owners: Iterable[type[Options]], values: dict[str, Any]) -> None:
    """Make numbers whole again that share a flag with numbers that need not be.

    Args:
        owners: The options of a run.
        values: Their values, changed in place.

    Raises:
        OptionError: If a number must be whole and is not.
    """
    for owner in owners:
        for each in owner.declared():
            value = values.get(each.name)
            if each.kind is not int or not isinstance(value, float):
                continue
            if not value.is_integer():
                raise OptionError(
                    f"{each.name} must be a whole number (got {value}): {each.meaning}."
                )
            values[each.name] = int(value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the name that is most like a word; empty if none is."""
    known = list(known)
    small = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), small, n=1, cutoff=0.6)
    return f" Did you mean {small[close[0]]}?" if close else ""


_LONGEST_MEANING = 90  # of a flag, in an error


class FlagParser(argparse.ArgumentParser):
    """A parser that answers an error by its message and the help line of the flag alone.

    Args:
        explain: Writes the help text of a topic, None for the short one; raises ValueError for a
            topic that is not there. It serves ``-h`` and ``--help [TOPIC]``.
        **details: As for `argparse.ArgumentParser`.
    """

    def __init__(self, *, explain: Callable[[str | None], str], **details: Any) -> None:
        super().__init__(
            **details, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
        )
        parser = self

        class Explain(argparse.Action):
            def __call__(self, _: Any, __: Any, topic: Any, ___: str | None = None) -> None:
                try:
                    text = explain(topic)
                except ValueError as error:
                    parser.error(str(error))
                print(text, end="")
                parser.exit()

        self.add_argument(
            *("-h", "--help"),
            action=Explain,
            nargs="?",
            metavar="TOPIC",
            default=argparse.SUPPRESS,
            help="the common flags; of a model, layer, dataset, task or flag; or all",
        )
        self.words: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse; a flag that is not there is answered by the one most like it."""
        self.words = list(sys.argv[1:] if args is None else args)
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{word!r} belongs to no flag: values follow their flag, as in --K 9.")
            self.error(f"there is no flag {word}.{self._nearest(word)}")
        return found

    def _nearest(self, word: str) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        parts = word.lstrip("-").split("_")
        inside = [f for f in flags if len(word) > 4 and set(parts) <= set(f[2:].split("_"))]
        return did_you_mean(word, flags if len(inside) != 1 else inside)

    def error(self, message: str) -> NoReturn:
        """Print the message, and what the flag in it means; exit with code 2."""
        message = re.sub(r"^argument (-\S+):", r"\1:", message)
        bad = re.search(r"^--(\w+): invalid choice: '(.*?)' \(choose from", message)
        if bad is not None:
            choices = self._option_string_actions[f"--{bad[1]}"].choices
            message = (
                f"--{bad[1]}: invalid choice: {bad[2]!r}.{did_you_mean(bad[2], choices)} "
                f"There is: {', '.join(choices)}."
            )
        lines = [f"error: {message}"]
        if (action := self._flag_of(message)) is not None and action.help:
            meaning = " ".join(self._get_formatter()._expand_help(action).split())
            said, default, value = meaning.partition(" (default")
            while len(said) > _LONGEST_MEANING and "; " in said:  # what else it means elsewhere
                said = said.rpartition("; ")[0]
            if said not in message:
                lines.append(f"  --{action.dest}: {said}{default}{value}")
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(2)

    def _flag_of(self, message: str) -> argparse.Action | None:
        """Find the flag that a message is about: of those named, rather one that was given."""
        named = [a or b for a, b in re.findall(r"--(\w+)|\b(\w+)=", message)]
        named += re.findall(r"\b(\w+)\b", message)[:1]
        known = [f"--{name}" for name in named if f"--{name}" in self._option_string_actions]
        given = [name for name in known if name in self.words and name != "--model"]
        chosen = (given or known or [None])[0]
        return None if chosen is None else self._option_string_actions[chosen]


class _StoreRange(argparse.Action):
    """Store one value as it is, and two as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if len(values) > 2:
            parser.error(
                f"{option_string} takes one value or the two ends of a range (got {len(values)}: "
                f"{' '.join(map(str, values))})."
            )
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_flag(group: Any, each: Option) -> None:
    """Add the flag of an option to a group of the parser."""

    def parse(text: str) -> Any:
        try:
            return each.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    details: dict[str, Any] = {"default": each.default, "help": each.meaning.replace("%", "%%")}
    if each.kind is bool:
        action = argparse.BooleanOptionalAction if each.default else "store_true"
        group.add_argument(f"--{each.name}", action=action, **details)
        return
    if each.several in ("list", "range"):
        details["nargs"] = "+"
    if each.several == "range":
        details["action"] = _StoreRange
    if each.metavar is not None:
        details["metavar"] = each.metavar
    if each.bare is not None:
        details |= {"nargs": "?", "const": each.bare}
    group.add_argument(f"--{each.name}", type=parse, choices=each.choices, **details)


def _read_list(text: str) -> list[str]:
    """Read a JSON list of words."""
    items = json.loads(text)
    if not isinstance(items, list) or not items or any(isinstance(i, list | dict) for i in items):
        raise ValueError('expected a list of words, ["a", "b"]')
    return [item if isinstance(item, str) else str(item) for item in items]


def _unquoted(each: Option, text: str) -> str:
    """Return a word; in quotes it is a JSON string. Older files hold words as they are."""
    if each.kind is not str or not text.startswith('"'):
        return text
    try:
        word = json.loads(text)
    except ValueError:  # a quote that older files did not escape
        return text
    return word if isinstance(word, str) else text


def check_stored(known: Mapping[str, Option], stored: Mapping[str, Any], source: str) -> None:
    """Refuse arguments of a stored run that no run of this program can have had.

    Args:
        known: The options there are; others are left alone.
        stored: Values by name, as a checkpoint holds them.
        source: Where they come from, for messages.

    Raises:
        ValueError: Which one, and what it should be.
    """
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    for name, value in stored.items():
        if name not in known:
            continue
        each = known[name]
        if value is None and (each.default is None or each.of_run):
            continue
        many = isinstance(value, list | tuple) and each.several is not None and len(value) > 0
        items = value if many else [value]
        right = many or each.several != "list"
        for item in items:
            right &= isinstance(item, kinds.get(each.kind, (int, float, str))) and (
                each.kind is bool or not isinstance(item, bool)
            )
        if not right:
            wanted = f"{'a list of ' if each.several == 'list' else ''}{each.kind.__name__}"
            raise ValueError(
                f"{source} cannot be used: its argument {name} should be {wanted} "
                f"(got {str(value)[:40]!r}, {type(value).__name__})."
            )
        try:
            each.check(value)
        except OptionError as error:
            raise ValueError(f"{source} cannot be used: its argument {error}") from error


def read_texts(
    known: Mapping[str, Option], texts: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Turn the strings of an args.txt into values; what says the kind of run is left out.

    Args:
        known: The options there are.
        texts: Strings by name.
        source: Where they come from, for messages.

    Raises:
        ValueError: If one cannot be read.
    """
    parsed = {}
    for name, text in texts.items():
        if name not in known:
            print(f"note: {source} holds {name}, which is no flag of this version: ignored.")
            continue
        each = known[name]
        if each.of_run:
            continue
        if text == "None":
            if each.default is not None:
                raise ValueError(f"{source}: {name}: None is no value of it: {each.meaning}.")
            parsed[name] = None
            continue
        listed = each.several == "list" or (each.several == "range" and text.startswith("["))
        try:
            items = _read_list(text) if listed else [_unquoted(each, text)]
            read = [each.parse(item) for item in items]
        except ValueError as error:
            raise ValueError(f"{source}: {name}: {text} cannot be read ({error}).") from error
        parsed[name] = read if listed else read[0]
        for item in read:
            if each.choices is not None and item not in each.choices:
                raise ValueError(f"{source}: {name}: {text} is none of {', '.join(each.choices)}.")
    return parsed


# ---------------------------------------------------------------------------------------------
# Checks


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)} (got {value!r}).")


def check_fraction(name: str, value: float, meaning: str) -> None:
    """Refuse a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise OptionError(f"{name} must lie in [0, 1] (got {value}): it is the {meaning}.")


def check_range(name: str, ends: Sequence[float]) -> None:
    """Refuse a range that has no two ends, or the larger one first."""
    if len(ends) != 2:
        raise OptionError(f"{name} takes one value or the two ends of a range (got {len(ends)}).")
    low, high = ends
    if not low < high:
        raise OptionError(
            f"{name} {low:g} {high:g} is the wrong way round: the smaller end of a range comes "
            f"first. Try {high:g} {low:g}, or one value."
            if low > high
            else f"{name} {low:g} {high:g} is no range: its ends are equal. Give the value once."
        )


def check_at_least(name: str, value: int, least: int, meaning: str) -> None:
    """Refuse a count below its least sensible value."""
    if value < least:
        raise OptionError(f"{name} must be at least {least} (got {value}): it is the {meaning}.")


def flagged(error: str | ValueError, names: Iterable[str]) -> str:
    """Write the options named in a message as flags: ``batch_size`` becomes ``--batch_size``.

    Only names that no sentence uses as a word are changed: those with an underscore, and the one
    that the message of an :class:`OptionError` begins with.

    Args:
        error: The error, or a sentence.
        names: The options there are.
    """
    names, message = set(names), str(error)
    first, gap, rest = message.partition(" ")
    if first in names and isinstance(error, OptionError):
        message = f"--{first}{gap}{rest}"
    words = "|".join(sorted((n for n in names if "_" in n), key=len, reverse=True))
    return re.sub(rf"(?<![-\w/.])({words})(?!\w|\.\w)", r"--\1", message) if words else message
