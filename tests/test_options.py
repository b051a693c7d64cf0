"""Options: bounds, choices, what they become, and how they share a flag."""

import math
from dataclasses import dataclass

import pytest

from options import Option, OptionError, Options, flagged, merge_options, option, read_texts


@dataclass(frozen=True)
class Both(Options):
    """Two options."""

    size: int = option(3, "how large", least=1, most=9)
    shape: str = option("round", "how", choices=("round", "flat"))
    share: float = option(0.5, "part", above=0, below=1, when={"shape": ("round",)})
    people: list[str] = option(None, "who", several="list")
    counts: int = option(1, "how many", least=1, several="commas")
    fast: bool = option(False, "hurry", trainers=("gradient",))
    path: str = option(None, "where", of_run=True)


def test_defaults_pass():
    assert Both().size == Both.defaults()["size"] == 3
    assert Both.names() == {"size", "shape", "share", "people", "counts", "fast", "path"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, r"^size must lie in \[1, 9\] \(got 0\): how large\.$"),
        ({"size": 10}, r"must lie in \[1, 9\]"),
        ({"shape": "odd"}, r"^shape must be one of round, flat \(got 'odd'\)"),
        ({"share": 0.0}, r"^share must lie in \(0, 1\) \(got 0.0\)"),
        ({"share": math.nan}, r"must lie in \(0, 1\) \(got nan\)"),
        ({"counts": [1, 0]}, r"counts must be at least 1 \(got 0\)"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(OptionError, match=message):
        Both(**values)


def test_words_become_values():
    known = {each.name: each for each in Both.declared()}
    assert known["size"].parse("4") == 4
    assert known["counts"].parse("1,3") == [1, 3]
    assert known["counts"].parse("[2]") == 2
    with pytest.raises(ValueError, match="invalid int value: 'x'"):
        known["size"].parse("x")
    texts = {"size": "7", "people": '["a", "b"]', "fast": "True", "path": "/x", "shape": "flat"}
    read = read_texts(known, texts, "args.txt")
    assert read == {"size": 7, "people": ["a", "b"], "fast": True, "shape": "flat"}
    for texts, message in (
        ({"shape": "odd"}, "args.txt: shape: odd is none of round, flat"),
        ({"size": "70"}, "args.txt: size: 70 cannot be read"),
        ({"fast": "maybe"}, "must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            read_texts(known, texts, "args.txt")


def test_an_unknown_name_is_noted(capsys):
    assert read_texts({}, {"old_flag": "1"}, "args.txt") == {}
    assert "args.txt holds old_flag" in capsys.readouterr().out


def test_keywords_leave_out_what_is_not_read():
    values = Both.defaults() | {"fast": True, "size": 5, "path": "x"}
    assert Both.keywords(values)["fast"] is True
    assert Both.keywords(values, "growth")["fast"] is False
    assert "path" not in Both.keywords(values)
    assert Both.keywords(values)["size"] == 5


def test_what_matters_is_described():
    assert "share=0.5" in Both().describe()
    assert "share" not in Both(shape="flat").describe()
    assert "size" not in Both().describe(leave_out=("size",))


def test_options_of_one_name_share_a_flag():
    a = Option("K", 9, "neighbors", kind=int, least=1, choices=("x",))
    b = Option("K", 1, "several", kind=int, least=0, choices=("y", "x"), several="commas")
    title, merged = merge_options([("A", a), ("B", b)])["K"]
    assert (title, merged.default, merged.least) == ("A", 9, 0)
    assert merged.choices == ("x", "y")
    assert merged.several == "commas"
    assert merged.meaning == "neighbors; several"
    unbounded = Option("K", 1, "free", kind=int)
    assert merge_options([("A", a), ("C", unbounded)])["K"][1].least is None


def test_names_become_flags():
    names = {"batch_size", "sigma", "K"}
    assert flagged(OptionError("sigma 0 is small; raise batch_size."), names) == (
        "--sigma 0 is small; raise --batch_size."
    )
    assert flagged("--batch_size 3, my_batch_size, a/batch_size", names) == (
        "--batch_size 3, my_batch_size, a/batch_size"
    )
