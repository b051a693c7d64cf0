"""The scripts around the program: comparing runs, the tables of flags, sweeps."""

import csv
import itertools
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import bench_family
import compare_runs
import flag_tables
import pytest
import study
import torch
from PIL import Image

from main import build_parser

ROOT = Path(__file__).parent.parent


def test_runs_are_compared(run, capsys, tmp_path):
    run("--layer", "Conv2d", "--output_dir", "runs/a")
    run("--layer", "ConvNN", "--output_dir", "runs/b", "--lr", "0.01")
    capsys.readouterr()
    compare_runs.main(["runs/a", "runs/b", "runs", "--picture", "runs/curves.png"])
    header, _, first, second = capsys.readouterr().out.splitlines()[:4]
    assert "best test_top1" in header
    assert header.rstrip(" |").endswith("lr")
    assert {line.split()[1] for line in (first, second)} == {"runs/a", "runs/b"}
    assert Path("runs/curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_every_trainer_are_compared(run, capsys, tmp_path):
    Image.fromarray((torch.rand(12, 12, 3) * 255).byte().numpy()).save("picture.png")
    picture = ("--image_path", "picture.png", "--output_dir", "runs/picture")
    run(*picture, model="dynamic", dataset="image")
    run("--K", "1,3", "--output_dir", "runs/knn", model="knn")
    capsys.readouterr()
    for name, column, counter in (("picture", "test_within", "epoch"), ("knn", "test_top1", "K")):
        compare_runs.main([f"runs/{name}", "--picture", f"runs/{name}.png"])
        header, _, row = capsys.readouterr().out.splitlines()[:3]
        assert f"best {column}" in header
        assert f"| {counter} " in row
        assert Path(f"runs/{name}.png").read_bytes().startswith(b"\x89PNG")


def make_run(folder, values, *, seed=0, layer="Conv2d", higher=True, column="test_top1", **more):
    folder.mkdir(parents=True)
    lines = [f"epoch,{column}", *(f"{i},{value}" for i, value in enumerate(values, start=1))]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "args.txt").write_text(f"# x\nlayer: {layer}\nseed: {seed}\nlr: 0.1\n")
    (folder / "train_eval_results.txt").write_text("Max Accuracy: 1\n")
    best = (max if higher else min)(values)
    summary = {"headline": column, "higher_is_better": higher, "best": best}
    summary |= {"parameters": 1234, "seconds": 2.0, "headline_name": "Accuracy"}
    summary |= {"headline_unit": "%"} | more
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Three seeds of two layers, a run of another metric, a broken one and a file in the way."""
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        make_run(Path(f"runs/a/seed{seed}"), [50, 60 + seed], seed=seed)
        make_run(Path(f"runs/b/seed{seed}"), [70, 9 + seed], seed=seed, layer="Con&v_NN")
    make_run(Path("runs/mse"), [3, 2, 4], higher=False, column="test_mse")
    Path("runs/broken").mkdir()
    Path("runs/broken/metrics.csv").write_text("epoch\n")
    Path("runs/note.txt").write_text("no folder")
    return sorted(map(str, Path("runs").iterdir()))


def test_seeds_become_a_mean(made, capsys):
    compare_runs.main([*made, "--over_seeds", "--table", "csv"])
    out, err = capsys.readouterr()
    assert "runs/broken holds no finished epoch" in err
    first, second = (list(csv.DictReader(text.splitlines())) for text in out.split("\n\n"))
    assert [row["layer"] for row in first] == ["Con&v_NN", "Conv2d"]
    assert first[1]["best test_top1"] == f"61.00 ± {statistics.stdev([60, 61, 62]):.2f}"
    assert first[1]["seeds"] == "3"
    assert second[0]["best test_mse"] == "2.00"
    assert second[0]["seeds"] == "1"


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, seed, value in (("a", 0, 60), ("b", 1, 62), ("copy", 0, 60)):
        make_run(Path(folder), [value], seed=seed)
    compare_runs.main(["a", "b", "copy", "--over_seeds", "--table", "csv"])
    out, err = capsys.readouterr()
    (row,) = csv.DictReader(out.splitlines())
    assert (row["first run"], row["seeds"]) == ("a", "2")
    assert row["best test_top1"] == f"61.00 ± {statistics.stdev([60, 62]):.2f}"
    assert "copy has the flags and the seed of a" in err


def test_tasks_and_data_sets_have_a_table_each(tmp_path, capsys):
    for data in ("digits", "mnist"):
        make_run(tmp_path / data, [60], task="classification", dataset=data)
    compare_runs.main([str(tmp_path)])
    text = capsys.readouterr().out
    for data in ("digits", "mnist"):
        assert f"classification, {data}, test_top1:\n\n| run" in text


def test_the_test_value_decides_where_there_is_one(tmp_path, capsys):
    make_run(tmp_path / "a", [90], column="val_top1", test={"top1": 40.0})
    make_run(tmp_path / "b", [80], column="val_top1", test={"top1": 50.0})
    compare_runs.main([str(tmp_path)])
    header, _, first, second = capsys.readouterr().out.splitlines()
    assert "test top1" in header
    assert "50.00" in first
    assert "40.00" in second


def test_latex_escapes_and_lays_out(made, capsys):
    compare_runs.main(["runs/a", "runs/b", "--over_seeds", "--table", "latex"])
    text = capsys.readouterr().out
    assert r"Con\&v\_NN" in text
    assert r"$\pm$" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {rows[0].count(" & ")}


def test_names_at_the_ends_of_curves_keep_apart():
    places = [0.5, 0.1, 0.52, 0.9, 0.48, 0.93]
    moved = compare_runs.spread_out(places, 0.06)
    order = sorted(range(6), key=lambda i: places[i])
    assert sorted(range(6), key=lambda i: moved[i]) == order
    ends = [moved[i] for i in order]
    assert min(b - a for a, b in itertools.pairwise(ends)) > 0.06 - 1e-9
    assert moved[1] == places[1]  # alone: it stays
    assert sum(moved) == pytest.approx(sum(places))


def test_a_picture_of_two_metrics_is_refused(made, refused):
    code, text = refused(compare_runs.main, ["runs", "--picture", "x.png"])
    assert code == 2
    assert "test_top1; test_mse" in text


def test_curves_are_named_apart():
    folders = [Path("Output/VGG/ConvNN"), Path("Output/ResNet/ConvNN")]
    assert compare_runs.names_apart(folders) == ["VGG/ConvNN", "ResNet/ConvNN"]
    assert compare_runs.names_apart(folders[:1]) == ["ConvNN"]


CLICKS = """
<script>
const wait = () => new Promise(done => setTimeout(done, 0));
(async () => {
  const column = text => [...document.querySelectorAll("th")].find(h => h.textContent == text);
  const shown = name => [...document.querySelectorAll("tbody tr")].filter(r => !r.hidden)
    .map(r => r.cells[column(name).cellIndex].textContent);
  const said = [];
  const say = () => said.push(shown("best test_top1").join(" "));
  say();
  column("best test_top1").click(); await wait(); say();
  column("best test_top1").click(); await wait(); say();
  const box = document.getElementById("filter");
  box.value = "conv2D seed1"; box.dispatchEvent(new Event("input")); await wait(); say();
  said.push(document.getElementById("shown").textContent);
  document.body.setAttribute("data-said", said.join("|"));
})();
</script>
"""


def test_the_page_sorts_and_filters_in_a_browser(made):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here: apt-get install chromium")
    Image.new("RGB", (4, 4)).save("runs/a/seed0/curves.png")
    compare_runs.main(["runs/a", "runs/b", "--html", "page.html"])
    text = Path("page.html").read_text()
    assert "http" not in text
    assert text.count("data:image/png;base64,") == 1
    Path("clicked.html").write_text(text.replace("</body>", CLICKS + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", Path("clicked.html").resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = re.search(r'data-said="([^"]*)"', done.stdout)
    assert said, done.stderr[-2000:]
    assert said[1].split("|") == [
        "70.00 70.00 70.00 62.00 61.00 60.00",
        "60.00 61.00 62.00 70.00 70.00 70.00",
        "70.00 70.00 70.00 62.00 61.00 60.00",
        "61.00",
        "1 of 6",
    ]


def test_no_runs_is_an_error(refused, tmp_path):
    code, text = refused(compare_runs.main, [str(tmp_path)])
    assert code == 2
    assert "none of these folders holds a run" in text


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A study of digits, the program in a temporary tree, one setting that cannot work."""
    base = "--model convnet --dataset digits --device cpu --limit_train 40 --limit_test 20"
    base += " --val_split 0.2 --num_epochs 1 --depth 1 --width 4 --pool_after 1"
    wide = "--layer Conv2d --kernel_size 5"
    settings = {"Conv2d": "--layer Conv2d", "bad": "--K 0", "Conv2d, 5x5": wide}
    table = {"small": study.Study("Does it run?", "nothing", base, settings, seeds=1, curves=1)}
    monkeypatch.setattr(study, "STUDIES", table)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "main.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')\n"
    )
    return tmp_path


def test_a_study_runs_reports_and_goes_on(small_study, capsys, monkeypatch):
    docs = small_study / "docs"
    with pytest.raises(SystemExit):
        study.main(["small", "--docs", str(docs)])
    out = capsys.readouterr().out
    assert "bad, seed 0: error: --K: must be at least 1 (got 0)" in out
    text = (docs / "small.md").read_text()
    assert "| bad | `--K 0` | | not run" in text
    assert text.count("reference") == 1
    for picture in ("small.png", "small_curves.png"):
        assert (docs / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in text
    rows = list(csv.DictReader((docs / "small.csv").read_text().splitlines()))
    assert [row["setting"] for row in rows] == ["Conv2d", "Conv2d, 5x5"]
    assert all(float(row["chosen_test_top1"]) >= 0 for row in rows)
    study.main(["small", "--cost", "--rounds", "2", "--docs", str(docs)])
    assert "bad cannot be measured" in capsys.readouterr().out
    costs = list(csv.DictReader((docs / "small_cost.csv").read_text().splitlines()))
    assert [row["setting"] for row in costs] == ["Conv2d", "Conv2d, 5x5"]
    assert float(costs[1]["mflops"]) > float(costs[0]["mflops"]) > 0
    assert "MiB a step" in (docs / "small.md").read_text()
    assert (docs / "small_cost.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("DRY_RUN", "1")
    study.main(["small"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, "finished runs are kept"
    assert "--K 0 --seed 0 --output_dir Output/studies/small/bad/seed0" in lines[0]


def test_a_study_shows_further_measures_of_the_test_samples(small_study, monkeypatch):
    base = "--model cnnet --depth 2 --features 8 --num_matches 32 --outliers 0.5 --batch_size 4"
    base += " --test_outliers 0.5 --num_scenes 4 --test_scenes 3 --num_epochs 1 --device cpu"
    # A table of every pair is written where something is asked for that takes one.
    settings = {"none": "--nonlocal_block none --save_images"}
    measures = {"share found": "recall", "F1": "f1"}
    table = study.Study("?", "nothing", base, settings, 1, "per_pair.csv", measures)
    monkeypatch.setattr(study, "STUDIES", {"small": table})
    study.main(["small", "--docs", str(small_study)])
    run = study.folder_of("small", "none", 0)
    rows = list(csv.DictReader((run / "per_pair.csv").read_text().splitlines()))
    recall = sum(float(row["recall"]) for row in rows) / 3
    assert len(rows) == 3
    text = (small_study / "small.md").read_text()
    assert "| measure | none |" in text
    assert f"| share found | {recall:.1f} |" in text


def test_a_study_averages_a_measure_for_every_folder(tmp_path, monkeypatch):
    (tmp_path / "per_image.csv").write_text("image,psnr\na/1.png,30\na/2.png,31\nb/1.png,20\n")
    measures = {"PSNR": "psnr"}
    table = study.Study("?", "", "", {}, 1, "per_image.csv", measures, "image", digits=2)
    monkeypatch.setattr(study, "STUDIES", {"small": table})
    found = study.read_measures("small", tmp_path)
    assert found == {"a: PSNR": 30.5, "b: PSNR": 20.0}
    text = "\n".join(study.measure_lines({"net": [{"measures": found}]}, table.digits))
    assert "| a: PSNR | 30.50 |" in text


def test_verdicts_need_three_seeds_and_two_deviations():
    assert study.verdict([1, 2], [5, 6, 7], higher=True) == "fewer than 3 seeds"
    assert study.verdict([1, 2, 3], [11, 12, 13], higher=False) == "better"
    assert study.verdict([11, 12, 13], [1, 2, 3], higher=True) == "better"
    assert study.verdict([1, 2, 3], [11, 12, 13], higher=True) == "worse"
    assert study.verdict([1, 2, 3], [2, 3, 4], higher=True) == "within the noise"


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_setting_of_every_study_is_a_command_line(name):
    parser = build_parser()
    for setting, flags in study.STUDIES[name].settings.items():
        parser.parse_args(f"{study.STUDIES[name].base} {flags}".split())
        assert study.slug(setting)
    slugs = {study.slug(setting) for setting in study.STUDIES[name].settings}
    assert len(slugs) == len(study.STUDIES[name].settings)


def test_the_page_of_flags_is_that_of_the_program():
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert flag_tables.flag_tables() in page, "run: python scripts/flag_tables.py --write"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_explain_themselves(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert not stop.value.code
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("sweep_*.sh")), ids=lambda p: p.name
)
def test_sweeps_explain_themselves(script):
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "OUT" in done.stdout
    assert "#" not in done.stdout


@pytest.mark.parametrize("name", bench_family.PLAIN)
def test_both_sides_of_the_family_benchmark_compute_the_same(name):
    plain, ours = (bench_family.make_step(name, side, 64)() for side in (True, False))
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
