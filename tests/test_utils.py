"""Files that survive interruption, argument files, random states, counts, pictures."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import save_checkpoint
from options import Option, read_texts
from run_folder import RunFolder
from utils import (
    CsvLog,
    atomic_path,
    compute_flops,
    count_parameters,
    describe_model,
    format_args,
    get_random_state,
    layer_rows,
    parse_args_text,
    plot_learning_curves,
    read_text_file,
    seed_everything,
    set_random_state,
    write_text,
)


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_args_round_trip():
    args = {
        "lr": 1e-3,
        "layer": "NA",
        "K": [1, 3],
        "paths": ["a: b", "c"],
        "none": None,
        "on": True,
    }
    text = "# a comment: not an argument\n" + format_args(args)
    assert parse_args_text(text) == {
        "lr": "0.001",
        "layer": "NA",
        "K": "[1, 3]",
        "paths": '["a: b", "c"]',
        "none": "None",
        "on": "True",
    }


STRANGE = [
    "two\nlines: K: 3",
    " blanks ",
    "None",
    '"quoted"',
    '"half',
    "ünïcödé → 日本",
    "",
    "\t",
    "a: b",
    "# no comment",
    "\u2028",
    "\x00\x1b[31m",
    "\udcff",
    "[1, 2]",
    "\\n",
    "True",
    "5",
    "nul",
    "\r",
    "'single'",
    '"a"b"',
    "\xa0x",
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_every_string_survives_an_args_file(tmp_path, text):
    known = {
        "prompt": Option("prompt", None, "text", kind=str),
        "folders": Option("folders", None, "paths", kind=str, several="list"),
        "K": Option("K", 1, "number", kind=int),
    }
    args = {"K": 2, "prompt": text, "folders": [text, "x"]}
    write_text(tmp_path / "args.txt", "# comment\n" + format_args(args))
    read = parse_args_text((tmp_path / "args.txt").read_text(encoding="utf-8"))
    assert read_texts(known, read, "args.txt") == args


def test_older_args_files_are_read():
    known = {"prompt": Option("prompt", None, "text", kind=str)}
    for text in ("plain words", '"Well", he said', "a: b", "'x'"):
        assert read_texts(known, parse_args_text(f"prompt: {text}\n"), "") == {"prompt": text}


def test_only_regular_files_are_read_as_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe cannot be read: it is no regular file"):
        read_text_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"/dev/zero cannot be read: it is no regular file"):
        read_text_file("/dev/zero")
    with pytest.raises(ValueError, match=r"cannot be read: .*No such file"):
        read_text_file(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read"):
        read_text_file("a\0b")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        read_text_file(tmp_path / "latin")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**32)
    with pytest.raises(ValueError, match=r"4,294,967,296 bytes, and texts of up to"):
        read_text_file(tmp_path / "large")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfx\r\ny")
    assert read_text_file(tmp_path / "bom") == "x\ny"


def draw():
    return [random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()]  # noqa: NPY002


def test_random_state_round_trip_through_a_checkpoint(tmp_path):
    seed_everything(5)
    draw()
    save_checkpoint(tmp_path / "a.pt", {"state": get_random_state()})
    first = draw()
    set_random_state(torch.load(tmp_path / "a.pt", weights_only=True)["state"])
    assert draw() == first
    seed_everything(5)
    again = draw()
    seed_everything(5)
    assert draw() == again


def test_csv_log_rewrites_what_is_known(tmp_path):
    log = CsvLog(tmp_path / "a.csv")
    log.append({"epoch": 1, "x": 0.1})
    log.append({"epoch": 2, "x": 0.2})
    text = (tmp_path / "a.csv").read_text()
    assert text == "epoch,x\n1,0.1\n2,0.2\n"
    again = CsvLog(tmp_path / "a.csv", [{"epoch": 1, "x": 0.1}])
    again.append({"epoch": 2, "x": 0.2})
    assert (tmp_path / "a.csv").read_text() == text
    CsvLog(tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_counts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 2))
    model[0].bias.requires_grad_(False)
    weights = 3 * 4 * 9 + 4 + 200 + 2
    assert count_parameters(model) == (weights, weights - 4)
    flops = 2 * (3 * 4 * 9 * 25 + 200)
    inputs = torch.zeros(1, 3, 5, 5)
    assert compute_flops(model, inputs) == flops
    model.train()
    text = describe_model(model, inputs)
    assert model.training
    assert f"FLOPs of one forward pass on (1, 3, 5, 5): {flops:,}" in text
    assert f"Parameters: {weights:,}" in text


class Shared(nn.Module):
    """A convolution under two names, a weight without a module, and a product of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.again = nn.Sequential(self.first, nn.ReLU())
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.again(self.first(x)).flatten(2).mT @ self.weight


def test_the_table_of_layers_adds_up():
    model, inputs = Shared().eval(), torch.zeros(1, 2, 3, 3)
    rows = layer_rows(model, inputs)
    assert [row[:2] for row in rows] == [("(itself)", "Shared"), ("first", "Conv2d")]
    assert [row[3:] for row in rows] == [(4, 2 * 9 * 4), (6, 2 * 2 * 9 * 4)]
    assert rows[1][2] == "(1, 2, 3, 3)"
    assert sum(row[3] for row in rows) == count_parameters(model)[0]
    assert sum(row[4] for row in rows) == compute_flops(model, inputs)
    assert not model.first._forward_hooks


def test_learning_curves_are_a_picture(tmp_path):
    history = [
        {"epoch": e, "lr": 0.1, "train_loss": 1 / e, "val_loss": 2 / e, "val_psnr": e}
        for e in (1, 2, 3)
    ]
    plot_learning_curves(history, tmp_path / "a.png", eval_name="val")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_best_is_the_same_file_as_last_where_nothing_is_left_out(tmp_path):
    run = RunFolder(tmp_path)
    run.save({"model": {}, "trainer": {}, "x": 1}, best=True)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    run.save({"model": {}, "trainer": {}, "x": 2}, best=False)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["x"] == 1
    assert torch.load(tmp_path / "last.pt", weights_only=True)["x"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "last.pt"}
