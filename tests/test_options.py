"""Options: bounds, choices, what they become, and how they share a flag."""

import math
import re
from dataclasses import dataclass

import pytest

from builders import all_options
from main import main
from models import model_class
from options import (
    Option,
    OptionError,
    Options,
    check_stored,
    flagged,
    merge_options,
    option,
    read_texts,
)


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
        ({"share": math.nan}, r"must be a finite number \(got nan\)"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "expected a list of words"),
        ("[]", "expected a list of words"),
        ('[["a"]]', "expected a list of words"),
        ('{"a": 1}', "expected a list of words"),
        ("folder", "cannot be read"),
    ],
)
def test_what_is_no_list_is_refused(text, message):
    known = {"people": Option("people", None, "who", kind=str, several="list")}
    with pytest.raises(ValueError, match=message):
        read_texts(known, {"people": text}, "args.txt")


def test_none_is_refused_where_it_is_no_value():
    known = {each.name: each for each in Both.declared()}
    with pytest.raises(ValueError, match=r"args\.txt: size: None is no value of it: how large"):
        read_texts(known, {"size": "None"}, "args.txt")
    assert read_texts(known, {"people": "None"}, "args.txt") == {"people": None}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {"size": "7"},
            r"run\.pt cannot be used: its argument size should be int \(got '7', str\)",
        ),
        ({"size": True}, "size should be int"),
        ({"size": 2.5}, "size should be int"),
        ({"size": None}, "size should be int"),
        ({"size": 10}, r"its argument size must lie in \[1, 9\]"),
        ({"size": [1]}, "size should be int"),
        ({"shape": 3}, "shape should be str"),
        ({"shape": "odd"}, "shape must be one of round, flat"),
        ({"shape": {"round": 1}}, "shape should be str"),
        ({"share": math.nan}, "share must"),
        ({"share": "0.5"}, "share should be float"),
        ({"people": "a"}, "people should be a list of str"),
        ({"people": [1]}, "people should be a list of str"),
        ({"people": []}, "people should be a list of str"),
        ({"counts": ["1"]}, "counts should be int"),
        ({"counts": []}, "counts should be int"),
        ({"counts": [1, 0]}, "counts must be at least 1"),
        ({"fast": 1}, "fast should be bool"),
    ],
)
def test_stored_values_of_another_form_are_refused(stored, message):
    known = {each.name: each for each in Both.declared()}
    with pytest.raises(ValueError, match=message):
        check_stored(known, stored, "run.pt")


def test_stored_values_are_taken():
    known = {each.name: each for each in Both.declared()}
    check_stored(known, {**Both.defaults(), "counts": [1, 3], "other": object(), 3: 4}, "run.pt")
    check_stored(known, {"people": ["a"], "share": 0.25, "path": None}, "run.pt")


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


def test_every_number_has_a_largest_sensible_value():
    for name, (_, each) in all_options().items():
        if each.kind is int:
            assert each.most is not None or each.below is not None, name
            high = each.most if each.below is None else each.below
            for beyond in (10**9, 10**20) if high < 10**9 else (10**20,):
                assert each.out_of_bounds(beyond) is not None, name
        if each.kind is float:
            for text in ("inf", "-inf", "nan"):
                with pytest.raises(ValueError, match="must"):
                    each.parse(text)


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", 2 * 10**13),
        ("--num_workers", 10**9),
        ("--resize", 10**9),
        ("--padding", 10**20),
        ("--depth", 10**9, "--model", "dncnn", "--dataset", "photos"),
        ("--num_blocks", 10**9, "--model", "n3net", "--dataset", "photos"),
        ("--features", 10**20, "--model", "dncnn", "--dataset", "photos"),
        ("--num_layers", 10**9, "--model", "dynamic"),
        ("--splits", 10**20, "--model", "dynamic"),
        ("--num_features", 10**9, "--model", "dynamic", "--dataset", "text"),
        ("--lr", "inf"),
        ("--weight_decay", "nan"),
    ],
)
def test_numbers_beyond_sense_are_refused_by_name(refused, flags):
    argv = [*("--model", "vgg11", "--dataset", "digits", "--device", "cpu"), *map(str, flags)]
    code, text = refused(main, argv)
    assert code == 2
    assert re.search(rf"{flags[0]}:? must", text), text
    assert str(flags[1]) in text


def test_the_largest_sizes_are_refused_before_anything_is_allocated(refused):
    """Built by shapes alone, and refused for their memory."""
    argv = ["--model", "n3net", "--dataset", "photos", "--device", "cpu"]
    for each in model_class("n3net").Options.declared():
        if each.name in ("num_blocks", "features", "embed_features", "block_channels"):
            argv += [f"--{each.name}", str(int(each.most))]
    code, text = refused(main, argv)
    assert code == 2
    assert re.search("GB|cannot be built on any machine", text), text
