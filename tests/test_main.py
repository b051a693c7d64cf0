"""The command line: flags, checks, run folders, resuming, replaying, testing only."""

import csv
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import main as program
import train_eval
from dataset import Data, DataError, FeatureArray
from layers import LAYERS
from main import build_parser, main
from models import MODELS
from tasks import DATASETS, TASKS
from tasks.inspection import inspect_data
from trainers.gradient import has_cpp_compiler

PUBLISHED_DEFAULTS = {
    "model": "vgg11",
    "layer": "ConvNN",
    "kernel_size": 3,
    "padding": 1,
    "K": 9,
    "sampling_type": "all",
    "num_samples": -1,
    "sample_padding": 0,
    "magnitude_type": "cosine",
    "similarity_type": "Col",
    "aggregation_type": "Col",
    "lambda_param": 0.5,
    "shuffle_pattern": "NA",
    "shuffle_scale": 0,
    "branch_ratio": 0.5,
    "attention_dropout": 0.1,
    "dataset": "cifar10",
    "data_path": "./Data",
    "noise": 0.0,
    "batch_size": 256,
    "num_epochs": 150,
    "compile_mode": "default",
    "clip_grad_norm": 1.0,
    "criterion": "CrossEntropy",
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "momentum": 0.9,
    "scheduler": "none",
    "lr_step": 20,
    "lr_gamma": 0.1,
    "device": "cuda",
    "seed": 0,
    "output_dir": "./Output/VGG/ConvNN",
}


def rows(folder, name="metrics.csv"):
    with open(Path(folder, name), newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# Flags


def test_published_defaults():
    args = vars(build_parser().parse_args([]))
    assert {k: args[k] for k in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_every_flag_is_explained():
    for action in build_parser()._actions:
        assert action.help, action.dest
        assert len(action.help) > 5, action.dest


def helped(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_by_itself_is_short_and_names_the_rows(capsys):
    for flag in ("--help", "-h"):
        text = helped(capsys, flag)
        assert len(text.splitlines()) < 70
        assert "--num_epochs" in text
        assert "--shuffle_scale" not in text
        for table in (MODELS, LAYERS, DATASETS, TASKS):
            assert all(name in text for name in table)


def test_help_all_prints_every_flag(capsys):
    text = helped(capsys, "--help", "all")
    assert all(f"--{name}" in text for name in PUBLISHED_DEFAULTS)


@pytest.mark.parametrize(
    ("topic", "shown", "hidden"),
    [
        ("convnet", "--pool_after", "--K "),
        ("dncnn", "--dataset photos", "--K "),
        ("ConvNN", "--lambda_param", "--lr"),
        ("recall", "--distractors", "--data_path"),
        ("classification", "--criterion", "--lr"),
        ("gradient", "--clip_grad_norm", "--K "),
        ("knn", "--vote", "--lr"),
        ("K", "number of neighbors", "--lr"),
        ("lr_step", "in epochs", "--K "),
        ("vgg11", "two hidden layers of 4096", "--K "),
    ],
)
def test_help_of_a_topic(capsys, topic, shown, hidden):
    text = " ".join(helped(capsys, "--help", topic).split())
    assert shown in text
    assert hidden not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--modle", "vgg11"), "there is no flag --modle. Did you mean --model?"),
        (("--epochs", "3"), "there is no flag --epochs. Did you mean --num_epochs?"),
        (("--layer", "convnn"), "invalid choice: 'convnn'. Did you mean ConvNN? There is: Conv2d,"),
        (("--K", "100"), "K=100 is larger than the number of candidates"),
        (("--test_only", "--output_dir", "nowhere"), "there is none at nowhere/best.pt"),
        (("--help", "convnett"), "no such topic. Did you mean convnet?"),
        (("--lr", "fast"), "--lr: invalid float value: 'fast'"),
        (("3",), "'3' belongs to no flag"),
    ],
)
def test_an_error_is_a_message_and_the_flag(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--device", "cpu"])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "usage" not in text
    first, *rest = text.splitlines()
    assert first.startswith("error: ")
    assert len(rest) == 1
    assert rest[0].startswith("  --")


def test_first_and_last_lines(run, capsys):
    run("--output_dir", "run", "--layer", "Conv2d", "--val_split", "0.2", "--num_epochs", 1)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Model: --model tiny --layer Conv2d, [\d,]+ parameters", lines[0])
    assert lines[1] == "Data: digits, 40 training, 10 validation, 30 test samples of 1x8x8"
    assert re.fullmatch(r"Device: cpu, \d+ threads?; 1 epoch of batches of 20", lines[2])
    assert lines[3] == "Run folder: run"
    size = r"\d+\.\d [kM]B"
    kept = rf"\({size}; last\.pt {size}, best\.pt {size}, --save keeps fewer\)"
    assert re.fullmatch(rf"All of it is in run {kept}\.", lines[-3])
    assert lines[-2:] == [
        "Test it:    python main.py --test_only --output_dir run",
        "Compare it: python scripts/compare_runs.py run  # and other folders",
    ]


def test_arguments_that_apply_come_first(run):
    folder = Path(run("--layer", "Conv2d", "--num_epochs", 1)["output_dir"])
    first, rest = (folder / "args.txt").read_text().split("# no effect in this run:\n")
    assert "\nkernel_size: 3\n" in first
    assert "\nlr: 0.001\n" in first
    assert "\nbranch_ratio: 0.5\n" in rest
    assert "lr: 0.001" not in rest


def test_options_are_constructor_arguments_with_the_same_defaults():
    import inspect

    for table in (LAYERS, MODELS):
        for name, builder in table.items():
            owner = builder.func if isinstance(builder, partial) else builder
            taken = inspect.signature(builder).parameters
            for each in owner.Options.declared():
                argument = taken[each.argument or each.name]
                # None: a constructor that subclasses share takes the default of their own options.
                assert argument.default in (each.default, None), (name, each.name)


# ---------------------------------------------------------------------------------------------
# A run and its folder


def test_run_leaves_a_complete_folder(run, tmp_path):
    result = run()
    folder = tmp_path / "Output/Tiny/ConvNN"
    assert Path(result["output_dir"]).resolve() == folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "args.txt",
        "model.txt",
        "train_eval_results.txt",
        "metrics.csv",
        "timing.csv",
        "last.pt",
        "best.pt",
        "curves.png",
        "summary.json",
        "environment.json",
    }
    text = (folder / "train_eval_results.txt").read_text()
    line = (
        r"\[Epoch 001\] \d+\.\d\ds \| "
        r"\[Train\] Loss: \d+\.\d{4} Top1: \d+\.\d\d% Top5: \d+\.\d\d% \| "
        r"\[Test\] Loss: \d+\.\d{4} Top1: \d+\.\d\d% Top5: \d+\.\d\d%"
    )
    assert re.search(line, text)
    assert max(len(line) for line in text.splitlines() if line.startswith("[Epoch")) < 120
    pace = r"\(training (\d+\.\d+)s, (\d+) samples/s\)"
    seconds, rate = re.search(rf"Average Epoch Time: \d+\.\d+s {pace}\n", text).groups()
    assert float(seconds) * int(rate) == pytest.approx(50, rel=0.01)
    for row in rows(folder, "timing.csv"):
        product = float(row["train_seconds"]) * float(row["train_samples_per_second"])
        assert product == pytest.approx(50)
        assert float(row["train_seconds"]) < float(row["seconds"])
    assert re.search(r"Max Accuracy: \d+\.\d+% at Epoch [12]\n", text)
    assert "chosen on the test set" in text
    assert [row["epoch"] for row in rows(folder)] == ["1", "2"]
    assert float(rows(folder)[1]["train_loss"]) == result["history"][1]["train_loss"]
    model_text = (folder / "model.txt").read_text()
    assert "Conv2d_NN" in model_text
    assert "FLOPs of one forward pass" in model_text
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert checkpoint["args"]["K"] == 9
    assert checkpoint["progress"]["epoch"] == 2


def test_loss_falls(run):
    history = run("--layer", "ConvNN", "--num_epochs", 12, "--lr", 0.01)["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_same_seed_same_numbers_and_config_replays(run, tmp_path):
    first = Path(run("--layer", "ConvNN_Attn", "--augment")["output_dir"])
    second = Path(run("--layer", "ConvNN_Attn", "--augment")["output_dir"])
    assert second.name == "ConvNN_Attn_2"
    replay = Path(main(["--config", str(first / "args.txt"), "--device", "cpu"])["output_dir"])
    assert len({first, second, replay}) == 3
    other = Path(run("--layer", "ConvNN_Attn", "--augment", "--seed", 1)["output_dir"])
    texts = [(f / "metrics.csv").read_text() for f in (first, second, replay, other)]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_command_line_wins_over_config(run, tmp_path):
    first = run("--K", 4)["output_dir"]
    replay = main(["--config", f"{first}/args.txt", "--K", "3", "--device", "cpu"])
    text = Path(replay["output_dir"], "args.txt").read_text()
    assert "\nK: 3\n" in text
    assert "\nbatch_size: 20\n" in text


@pytest.mark.parametrize(
    "flags",
    [
        ("--scheduler", "none", "--augment"),
        ("--scheduler", "step", "--lr_step", "1", "--optimizer", "sgd"),
        ("--scheduler", "cosine", "--sampling_type", "random", "--num_samples", "12"),
        ("--scheduler", "plateau", "--lr_step", "1", "--layer", "ConvNN_Attn"),
        ("--val_split", "0.2", "--noise", "0.1", "--use_amp"),
    ],
)
def test_resume_gives_the_numbers_of_an_unbroken_run(run, monkeypatch, capsys, flags):
    whole = run(*flags, "--num_epochs", 4, "--output_dir", "whole")
    original = train_eval.train_one_epoch

    def interrupted(trainer, loader, *, epoch, **options):
        if epoch == 3:
            raise KeyboardInterrupt
        return original(trainer, loader, epoch=epoch, **options)

    monkeypatch.setattr(train_eval, "train_one_epoch", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--num_epochs", 4, "--output_dir", "broken")
    assert stop.value.code == 130
    assert "--resume --output_dir broken" in capsys.readouterr().err
    assert len(rows("broken")) == 2
    monkeypatch.setattr(train_eval, "train_one_epoch", original)
    resumed = main(["--resume", "--output_dir", "broken", "--device", "cpu"])
    assert Path("broken/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert resumed["best"] == whole["best"]
    assert resumed.get("test") == whole.get("test")


def test_resume_for_more_epochs(run):
    run("--output_dir", "whole", "--num_epochs", 3)
    run("--output_dir", "part", "--num_epochs", 2)
    main(["--resume", "--output_dir", "part", "--num_epochs", "3", "--device", "cpu"])
    assert Path("part/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    lines = Path("part/train_eval_results.txt").read_text().splitlines()
    assert sum(line.startswith("[Epoch") for line in lines) == 3


@pytest.mark.parametrize("flags", [(), ("--noise", "0.2", "--val_split", "0.2")])
def test_test_only_reproduces_the_best_epoch(run, flags):
    result = run("--output_dir", "run", "--num_epochs", 3, *flags)
    again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    expected = result.get("test", {"top1": result["best"]})
    assert again["test"]["top1"] == expected["top1"]
    text = Path("run/test_results.txt").read_text()
    assert f"Top1: {expected['top1']:.4f}%" in text
    main(["--test_only", "--checkpoint", "run/best.pt", "--output_dir", "run", "--device", "cpu"])
    assert Path("run/test_results.txt").read_text().count("[Test]") == 2


def test_val_split_is_said(run):
    run("--output_dir", "run", "--val_split", "0.2")
    text = Path("run/train_eval_results.txt").read_text()
    assert "[Val] Loss" in text
    assert "held-out training samples" in text


def test_what_a_compiler_said_stays_out_of_the_arguments(run, monkeypatch):
    monkeypatch.setattr(program.native, "status", lambda: "absent: g++ x\nneighbors.cpp:1: error")
    folder = Path(run("--num_epochs", 1)["output_dir"])
    lines = (folder / "args.txt").read_text().splitlines()
    assert lines[1].endswith("neighbor kernels absent: g++ x")
    assert lines[2].startswith("model: ")


def test_dry_run_writes_nothing(run, tmp_path):
    result = run("--dry_run")
    assert set(result["test"]) == {"loss", "top1", "top5"}
    assert list(tmp_path.iterdir()) == []


def test_checked_data_are_counted_and_nothing_is_written(run, tmp_path, capsys):
    result = run("--check_data", "--val_split", 0.2, "--limit_train", 50, "--limit_test", 30)
    assert {name: sum(counts) for name, counts in result["counts"].items()} == {
        "train": 40,
        "val": 10,
        "test": 30,
    }
    labels = load_digits().target
    first = [labels[i] for i in range(len(labels)) if i % 5 == 4][:30]
    assert result["counts"]["test"] == np.bincount(first, minlength=10).tolist()
    text = capsys.readouterr().out
    assert "test: 30 samples of 10 classes: 0: " in text
    assert list(tmp_path.iterdir()) == []


def write_class_folders(names, count=3):
    for part in ("train", "test"):
        for name in names:
            Path(part, name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20)).save(Path(part, name, f"{i}.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_names_every_broken_image(run, refused, tmp_path, workers):
    write_class_folders(["cat", "dog"])
    flags = ("--data_path", ".", "--resize", 16, "--check_data", "--num_workers", workers)
    assert run(*flags, dataset="imagefolder")["counts"]["train"] == [3, 3]
    Path("train/cat/1.png").write_bytes(b"no image")
    Path("test/dog/0.png").unlink()
    os.mkfifo("test/dog/0.png")
    code, text = refused(run, *flags, dataset="imagefolder")
    assert code == 2
    assert text.count("error:") == 1
    assert "2 of 12 samples cannot be used" in text
    assert "train/cat/1.png cannot be read as an image" in text
    assert "test/dog/0.png cannot be read as an image: it is no regular file" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("model", "dataset"), [("dncnn", "photos"), ("dynamic", "text"), ("knn", "digits")]
)
def test_data_of_every_task_can_be_checked(run, capsys, model, dataset):
    result = run("--check_data", "--limit_train", 9, model=model, dataset=dataset)
    assert result["output_dir"] is None
    assert "train: 9 samples" in capsys.readouterr().out


def test_labels_out_of_range_and_strange_numbers_are_found():
    x = torch.zeros(4, 2)
    x[1, 0] = float("nan")
    array = FeatureArray(x, torch.tensor([0, 1, 2, -1]))
    data = Data("made", "classification", array, array, (2,), 2)
    with pytest.raises(DataError, match="6 of 8 samples cannot be used") as failure:
        inspect_data(data)
    assert "sample 1 of train holds numbers that are not finite" in str(failure.value)
    assert "sample 2 of test has the label 2, and there are 2 classes" in str(failure.value)


def test_overwrite_replaces(run):
    run("--output_dir", "run", "--num_epochs", 2)
    run("--output_dir", "run", "--num_epochs", 1, "--overwrite")
    assert len(rows("run")) == 1


@pytest.mark.parametrize("flags", [("--use_amp",), ("--criterion", "MSE"), ("--resize", "12")])
def test_options_run(run, flags):
    assert np.isfinite(run(*flags)["history"][-1]["train_loss"])


def test_compiled_equals_eager(run, monkeypatch):
    if not has_cpp_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    # Compiled code draws its own dropout: compare without.
    monkeypatch.setitem(MODELS, "tiny", partial(MODELS["tiny"], dropout=0))
    flags = ("--layer", "Conv2d", "--num_epochs", 1, "--output_dir")
    eager = run(*flags, "eager")["history"][0]
    compiled = run(*flags, "compiled", "--use_compiled")["history"][0]
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], abs=1e-4)
    assert "features.0.weight" in torch.load("compiled/last.pt", weights_only=True)["model"]


def test_reduce_memory_names_options_that_exist():
    known = torch._inductor.list_options()
    assert "memory_planning" in known or "reorder_for_peak_memory" in known


@pytest.mark.parametrize("layer", list(LAYERS))
def test_resnet_with_every_layer(run, layer):
    flags = ("--layer", layer, "--dry_run", "--batch_size", 4)
    assert np.isfinite(run(*flags, model="resnet18")["train"]["loss"])


def test_vgg_resizes_small_images_and_says_so(run, capsys):
    run("--layer", "Conv2d", "--dry_run", "--batch_size", 2, "--limit_test", 2, model="vgg11")
    assert "needs at least 32x32" in capsys.readouterr().out


def test_notes_flags_without_effect(run, capsys):
    run("--layer", "Conv2d", "--K", 5, "--branch_ratio", 0.3, "--dry_run")
    assert "no effect with --model tiny --layer Conv2d: --K, --branch_ratio" in (
        capsys.readouterr().out
    )


# ---------------------------------------------------------------------------------------------
# Bad input: exit code 2, a sentence that helps, and nothing written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layer", "Conv3d"), "invalid choice: 'Conv3d'"),
        (("--K", 0), "K"),
        (("--K", "1,3"), "--K takes one number for --model tiny"),
        (("--K", 500), r"500.*100"),
        (("--num_samples", 8), "num_samples"),
        (("--sampling_type", "spatial"), "num_samples"),
        (("--sampling_type", "random"), "num_samples"),
        (("--sampling_type", "spatial", "--num_samples", 2), r"9.*4|4.*9"),
        (("--layer", "Branching", "--branch_ratio", 1.5), r"branch_ratio: must lie in \[0, 1\]"),
        (("--lambda_param", -0.1), r"lambda_param: must lie in \[0, 1\]"),
        (("--shuffle_pattern", "BA", "--shuffle_scale", 3), "shuffle"),
        (("--shuffle_pattern", "BA"), "shuffle_scale"),
        (("--layer", "Conv2d", "--kernel_size", 2), "kernel_size"),
        (("--layer", "Conv2d", "--kernel_size", 0), "kernel_size: must be at least 1"),
        (("--val_split", 1), r"--val_split: must lie in \[0, 1\)"),
        (("--val_split", 0.001), "held|validation"),
        (("--device", "cuda"), "--device cuda: there is none here"),
        (("--test_only",), "needs a checkpoint, and there is none"),
        (("--resume",), "needs a checkpoint, and there is none"),
        (("--resume", "--test_only"), "give one of them"),
        (("--checkpoint", "x.pt"), "--checkpoint is read by"),
        (("--config", "nowhere.txt"), "--config nowhere.txt cannot be read"),
        (("--output_dir", "/dev/null/x"), "cannot be written"),
        (("--lr", "fast"), "invalid float value: 'fast'"),
        (("--num_epochs", 0), "must be at least 1"),
    ],
)
def test_bad_flags_are_refused(run, refused, tmp_path, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    code, text = refused(run, *flags)
    assert code == 2
    assert re.search(message, text), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--features", "60000"),
            r"486,002,940,001 parameters.*7,776.0 GB.*the device has [\d.]+ GB",
        ),
        (("--features", "4000000000"), "cannot be built on any machine"),
    ],
)
def test_more_parameters_than_memory_are_refused(refused, flags, message):
    code, text = refused(main, ["--model", "dncnn", "--device", "cpu", *flags])
    assert code == 2
    assert re.search(message, text), text


def test_vgg_refuses_a_small_resize(run, refused):
    code, text = refused(run, "--resize", 16, model="vgg11")
    assert code == 2
    assert "it needs at least 32" in text


def test_compile_without_compiler_is_refused(run, refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    code, text = refused(run, "--use_compiled")
    assert code == 2
    assert "needs a C++ compiler" in text


def test_a_folder_with_a_run_is_not_written_over(run, refused):
    run("--output_dir", "run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    code, text = refused(run, "--output_dir", "run")
    assert code == 2
    assert "--overwrite to replace it" in text
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--test_only", "--K", "4"), "another architecture: --K is 9 there and 4 here"),
        (("--test_only", "--layer", "Conv2d"), "--layer is ConvNN there and Conv2d here"),
        (("--resume", "--lr", "0.5"), "another run: --lr is 0.001 there and 0.5 here"),
    ],
)
def test_a_checkpoint_of_other_flags_is_refused(run, refused, flags, message):
    run("--output_dir", "run")
    code, text = refused(main, [*flags, "--output_dir", "run", "--device", "cpu"])
    assert code == 2
    assert message in text


def test_a_damaged_checkpoint_is_refused(run, refused):
    run("--output_dir", "run")
    Path("run/best.pt").write_bytes(b"no checkpoint")
    code, text = refused(main, ["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert code == 2
    assert "cannot be read as a checkpoint" in text
    torch.save({"weights": torch.zeros(1)}, "other.pt")
    argv = ["--test_only", "--checkpoint", "other.pt", "--device", "cpu"]
    assert "no checkpoint of this program" in refused(main, argv)[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"K": "9"},
        {"layer": 5},
        {"model": ["tiny"]},
        {"dataset": None},
        {"task": 3},
        {"batch_size": 0},
        {"batch_size": None},
        {"lr": "fast"},
        {"seed": 10**20},
        {"augment": "yes"},
        {"val_split": float("nan")},
    ],
)
@pytest.mark.parametrize("flag", ["--test_only", "--resume", "--pretrained"])
def test_wrong_arguments_in_a_checkpoint_are_refused(run, refused, flag, changes, tmp_path):
    names = ("model", "layer", "dataset", "K")
    stored = dict(zip(names, ("tiny", "Conv2d", "digits", 9), strict=True)) | changes
    weights = {"classifier.bias": torch.zeros(10)}
    torch.save({"format": 1, "model": weights, "args": stored}, "a.pt")
    files = ["a.pt"] if flag == "--pretrained" else ["--checkpoint", "a.pt"]
    code, text = refused(main, [flag, *files, "--device", "cpu"])
    assert code == 2
    assert text.count("error:") == 1
    assert "a.pt cannot be used: its argument" in text
    assert next(iter(changes)) in text


def test_a_prompt_of_two_lines_is_repeated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prompt = " He said:\nK: 3\n# or\n"
    argv = ["--model", "dynamic", "--dataset", "text", "--limit_train", "300", "--device", "cpu"]
    argv += ["--limit_test", "20", "--text_prediction_length", "5"]
    first = main([*argv, "--text_prompt", prompt])
    again = main(["--config", f"{first['output_dir']}/args.txt", "--device", "cpu"])
    assert again["generated"] == first["generated"]
    assert first["generated"].startswith(prompt)


def test_a_checkpoint_of_rows_that_are_gone_is_refused(run, refused):
    run("--output_dir", "run", "--num_epochs", 1)
    checkpoint = torch.load("run/best.pt", weights_only=True)
    checkpoint["args"]["model"] = "gone"
    del checkpoint["digest"]
    torch.save({**checkpoint, "format": 1}, "gone.pt")
    argv = ["--test_only", "--checkpoint", "gone.pt", "--device", "cpu"]
    code, text = refused(main, argv)
    assert code == 2
    assert "made with gone, ConvNN, digits, classification, one of which this version" in text


def test_config_with_a_bad_value_is_refused(refused, tmp_path):
    path = tmp_path / "args.txt"
    path.write_text("K: many\n")
    assert "K: many cannot be read" in refused(main, ["--config", str(path)])[1]
    path.write_text("layer: Conv9d\n")
    assert "layer: Conv9d is none of" in refused(main, ["--config", str(path)])[1]


def test_a_loss_that_is_not_finite_stops_the_run(run, refused):
    flags = ("--optimizer", "sgd", "--lr", "1e30", "--clip_grad_norm", "0", "--layer", "Conv2d")
    code, text = refused(run, *flags)
    assert code == 1
    assert re.search(r"the loss is not finite in epoch 1, step \d", text)


def test_without_cuda_the_cpu_is_used_and_said(run, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    main(["--model", "tiny", "--dataset", "digits", "--limit_train", "8", "--dry_run"])
    assert "No cuda device here: using the cpu." in capsys.readouterr().out
