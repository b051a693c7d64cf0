"""Several processes: the numbers of one, moving checkpoints, errors that end all."""

import csv
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import main as program
import models
import ranks
from layers import TOKEN_LAYERS, Conv2d_Branching
from layers.dynamic import DynamicNeighbors
from main import main
from models.knn import KNNClassifier
from models.n3net import N3Net
from models.vgg import VGG
from models.vit import ViT
from ops.centers.distances import DistanceKernel
from ops.maps.reduce import edge_max
from options import Options
from ranks import Shares, SyncedBatchNorm, synchronise_norms
from trainers import GradientTrainer

ROOT = Path(program.__file__).parent
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/runs"]
import test_ranks
test_ranks.work(json.loads(sys.argv[1]))
"""
FLAGS = ["--model", "plain", "--layer", "Conv2d", "--dataset", "digits", "--device", "cpu"]
# 21 steps, the last one of a single sample; 7 batches of the test set, the last one shorter.
FLAGS += ["--batch_size", "10", "--limit_train", "201", "--limit_test", "63", "--augment"]
# Plain descent: Adam would blow up the rounding of gradients that are zero (biases before norms).
FLAGS += ["--optimizer", "sgd", "--lr", "0.05", "--sync_bn"]
GROW = ["--model", "dynamic", "--dataset", "digits", "--device", "cpu", "--limit_train", "300"]
GROW += ["--limit_test", "63", "--num_layers", "2", "--splits", "2", "--num_epochs", "2"]
GROW += ["--save_every", "1"]


class PlainNet(nn.Module):
    """Batch norm, a parameter that nothing uses, and nothing random."""

    Options = Options
    family, tasks, training = "Plain", ("classification",), "gradient"
    uses_layer, min_input_size = True, 1

    def __init__(self, *, layer, in_channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            layer(in_channels=in_channels, out_channels=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(32, num_classes)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.classifier(self.features(x))


def die_at(number):
    """Kill the second process at a training step."""
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == number and os.environ["RANK"] == "1":
            Path("died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    GradientTrainer.step = step


# ---------------------------------------------------------------------------------------------
# What every process does


def work(commands):
    """Do commands in one of several processes: words for main(), or the name of a function here."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models.MODELS["plain"] = PlainNet
    for name, *words in commands:
        if name == "losses":
            keep("losses", {net: losses(net) for net in NETS})
        elif name == "done":
            keep("done", True)
        elif name == "sets":
            torch.save({"centers": centers(), "neighbors": neighbors()}, f"sets{ranks.rank()}.pt")
        elif name == "die":
            die_at(int(words[0]))
        elif name == "refused":
            with pytest.raises(SystemExit):
                main(words)
        else:
            main([name, *words])
    dist.barrier()
    ranks.leave_together()


def keep(name, numbers):
    if ranks.rank() == 0:
        Path(f"{name}.json").write_text(json.dumps(numbers))


def n3net():
    return N3Net(
        depth=3,
        features=8,
        block_channels=4,
        num_blocks=1,
        num_volumes=2,
        window=5,
        embed_channels=4,
        embed_features=8,
        embed_depth=2,
    )


class EdgeNet(nn.Module):
    """An edge convolution, whose batch norm sees edges."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 8), nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, 2)
        self.register_buffer("indices", torch.randint(64, (64, 3)))

    def forward(self, x):
        x, indices = x.view(len(x), 64, 16), self.indices.expand(len(x), -1, -1)
        return self.classifier(edge_max(self.a(x), self.b(x), indices, self.norm).relu().mean(1))


def vgg():
    return VGG(layer=Conv2d_Branching, width=1 / 16, classifier="gap", in_channels=1)


def vit(name):
    layer = functools.partial(TOKEN_LAYERS[name], attention_dropout=0.0)
    sizes = {"num_layers": 2, "num_heads": 2, "d_hidden": 32, "d_mlp": 64}
    return ViT(layer=layer, image_size=(32, 32), patch_size=8, in_channels=1, dropout=0, **sizes)


# A hard choice of neighbors flips where two are alike to the last digit: float32 networks part at
# the first flip, whatever rounds differently. In float64 nothing is as alike as that. N3Net chooses
# softly; its rectifiers have kinks, and twenty steps make 1e-8 of rounding 1e-6 to 5e-5 of loss.
NETS = {
    "n3net": (n3net, torch.float64, False),
    "edges": (EdgeNet, torch.float32, False),
    "vit": (functools.partial(vit, "Attention"), torch.float32, False),
    "vit_fsdp": (functools.partial(vit, "Attention"), torch.float32, True),
    "vit_neighbors": (functools.partial(vit, "ConvNNAttention"), torch.float64, False),
    "vgg_branching": (vgg, torch.float64, False),
}


class Squares:
    """A picture's own pixels, or one class a picture: a loss in full precision."""

    prepare = staticmethod(lambda batch, device: batch)

    @staticmethod
    def loss(outputs, targets):
        if outputs.dim() == 2:
            return F.cross_entropy(outputs, targets.flatten(1).sum(1).gt(0).long())
        return (outputs - targets).square().mean()

    objective = loss

    @staticmethod
    def metrics(outputs, targets):
        return {"none": outputs.flatten(1)[:, 0]}


def losses(net):
    """Losses of 20 steps of 7 samples, which neither 2 nor 3 divides."""
    build, dtype, fsdp = NETS[net]
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    options = {"num_epochs": 1, "optimizer": "sgd", "lr": 0.01, "sync_bn": True, "fsdp": fsdp}
    found = []
    try:
        trainer = GradientTrainer(build(), Squares(), device=torch.device("cpu"), **options)
        trainer.model.train()
        shares = Shares(20 * 7, 7, whole=True)
        for step in range(20):
            pictures = torch.randn(7, 1, 32, 32)
            share = shares.share(step) if dist.is_initialized() else None
            loss = trainer.step((pictures + 0.1 * torch.randn_like(pictures), pictures), share)
            found.append(sum(sum(part) for part in ranks.gather(loss["loss"].tolist())) / 7)
    finally:
        torch.set_default_dtype(usual)
    return found


KINDS = [
    ("interp", "cosine", 16),
    ("interp", "dot", 16),
    ("interp", "euclidean", 3),
    ("interp", "euclidean_pyramid", 24),
    ("interp", "influence_cone", 20),
    ("knn", "euclidean", 40),
    ("nearest", "cosine", 8),
]


def centers():
    """Centers, and predictions while they are learnt, of all kinds of votes."""
    found = []
    for predictor, kernel, features in KINDS:
        torch.manual_seed(0)
        layer = DynamicNeighbors(
            num_features=features, num_classes=3, predictor=predictor, K=3,
            kernel=DistanceKernel(kernel),
        )  # fmt: skip
        layer.crew = ranks.Crew() if dist.is_initialized() else None
        for size in (150, 300, 257):
            x = torch.randn(size, features)
            events, outputs = layer.grow(x, (x[:, 0] * 2).long().clamp(0, 2), 50)
            found += [torch.tensor(events), outputs]
        found += [layer.centers, layer.targets]
    return found


def neighbors():
    """Neighbors among samples that processes share, equal values included."""
    torch.manual_seed(0)
    samples, queries = torch.randint(3, (100, 6)).float(), torch.randint(3, (20, 6)).float()
    labels, found = torch.arange(100) % 4, []
    for metric in ("cosine", "euclidean"):
        model = KNNClassifier(K=(1, 60), metric=metric)
        model.fit(samples, labels, shard=dist.is_initialized())
        found += model.kneighbors(queries)
    return found


# ---------------------------------------------------------------------------------------------


def start(processes, folder, *commands):
    """Start processes as torchrun does; return their exit codes and what they said."""
    script = folder / "start.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    words = [str(script), json.dumps([[str(word) for word in words] for words in commands])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common = {**os.environ, **place, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    said = [process.communicate(timeout=200)[1] for process in started]
    return [process.returncode for process in started], "".join(said)


def rows(folder):
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def plain(monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shares_cover_every_batch(monkeypatch):
    for world in (1, 2, 3, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        shares = Shares(23, 7, whole=True)
        for index, size in enumerate((7, 7, 7, 2)):
            seen = []
            for number in range(world):
                monkeypatch.setenv("RANK", str(number))
                begin, end, count = shares.share(index)
                assert count == size
                seen += range(begin, end)
            assert seen == list(range(size))


def test_synced_norm_alone_is_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    other = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    other.load_state_dict(model.state_dict())
    synchronise_norms(other)
    assert isinstance(other[1], SyncedBatchNorm)
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(other(x), model(x))


def test_parts_of_a_batch_add_up():
    from tasks.classification import ClassificationTask

    def learn(parts):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        trainer = GradientTrainer(
            *(model, ClassificationTask()),
            device=torch.device("cpu"),
            num_epochs=1,
            accum_steps=parts,
        )
        found = trainer.step((torch.randn(7, 4), torch.randint(3, (7,))))
        return model.weight.detach(), found

    whole, parts = learn(1), learn(3)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1]["loss"], whole[1]["loss"])
    assert parts[1]["top1"].tolist() == whole[1]["top1"].tolist()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, with the threads of each of several: products of matrices round
    by the rows that a thread has.
    """
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "plain", PlainNet)
        patch.chdir(folder)
        plain = main([*FLAGS, "--num_epochs", "2", "--output_dir", "one"])
        main([*GROW, "--output_dir", "growth"])
        net = {name: losses(name) for name in NETS}
        sets = {"centers": centers(), "neighbors": neighbors()}
    torch.set_num_threads(threads)
    return {"folder": folder, "plain": plain, "losses": net, "sets": sets}


LAST = {
    2: [  # goes on from parts of parameters; errors, of which the last ends the processes
        ["--resume", "--output_dir", "parts", "--num_epochs", 2, "--device", "cpu"],
        ["refused", *FLAGS, "--val_split", "0.001", "--output_dir", "no"],
        ["refused", *FLAGS, "--fsdp", "--use_amp", "--output_dir", "no"],
        ["refused", *FLAGS, "--accum_steps", "2", "--output_dir", "no"],
        ["refused", *GROW, "--fsdp", "--output_dir", "no"],
        [*FLAGS, "--lr", "1e39", "--batch_size", 201, "--output_dir", "ruined"],
    ],
    3: [  # the second process is killed
        ["die", 30],
        [*FLAGS, "--num_epochs", 2, "--output_dir", "killed", "--save_every", 5],
    ],
}


@pytest.fixture(scope="module", params=[2, 3])
def several(request, alone, tmp_path_factory):
    """The folder in which several processes have done the same, and then failed."""
    folder = tmp_path_factory.mktemp(f"several{request.param}")
    one = alone["folder"] / "one"
    codes, said = start(
        request.param,
        folder,
        [*FLAGS, "--num_epochs", 1, "--output_dir", "several"],
        ["--resume", "--output_dir", "several", "--num_epochs", 2, "--device", "cpu"],
        ["--test_only", "--checkpoint", one / "last.pt", "--output_dir", "t", "--device", "cpu"],
        [*GROW, "--output_dir", "growth"],
        ["losses"],
        ["sets"],
        [*FLAGS, "--fsdp", "--num_epochs", 1, "--output_dir", "parts"],
        ["done"],
        *LAST[request.param],
    )
    assert (folder / "done.json").exists(), said[-3000:]
    (folder / "said").write_text(f"{codes} {time.time()}\n{said}")
    return folder


def test_the_numbers_of_one_process(alone, several):
    one = alone["plain"]
    found = rows(several / "several")
    assert len(found) == 2  # one writer
    for mine, theirs in zip(one["history"], found, strict=True):
        for name in ("train_loss", "test_loss"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)
        assert theirs["train_top1"] == mine["train_top1"]
    # The same weights give the same numbers to the last digit.
    line = f"Loss: {one['history'][-1]['test_loss']:.8f} Accuracy: Top1: "
    assert line in (several / "t" / "test_results.txt").read_text()


@pytest.mark.parametrize("net", NETS)
def test_losses_of_20_steps(alone, several, net):
    found = json.loads((several / "losses.json").read_text())[net]
    assert found == pytest.approx(alone["losses"][net], rel=1e-5)
    assert found[-1] != pytest.approx(found[0], rel=1e-3)  # something was learnt


def test_the_same_centers_and_neighbors(alone, several):
    for path in several.glob("sets*.pt"):
        found = torch.load(path)
        for name, mine in alone["sets"].items():
            for one, other in zip(mine, found[name], strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_the_same_growth(alone, several):
    for name in ("growth.csv", "metrics.csv"):
        theirs = (several / "growth" / name).read_bytes()
        assert theirs == (alone["folder"] / "growth" / name).read_bytes()
    one, other = (torch.load(f / "growth" / "last.pt") for f in (alone["folder"], several))
    torch.testing.assert_close(other["model"], one["model"], rtol=0, atol=0)


def test_parts_of_parameters_make_whole_checkpoints(alone, several, monkeypatch):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    one = alone["plain"]["history"]
    found = rows(several / "parts")
    for mine, theirs in zip(one, found, strict=False):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-5)
        assert theirs["test_loss"] == pytest.approx(mine["test_loss"], rel=1e-5)
    if len(found) < 2:
        words = ["--resume", "--output_dir", str(several / "parts"), "--num_epochs", "2"]
        resumed = main([*words, "--device", "cpu"])["history"]
        assert resumed[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=1e-5)


def test_one_process_goes_on_where_several_were(alone, several, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    words = ["--resume", "--num_epochs", "3", "--device", "cpu", "--output_dir"]
    for folder in (several / "several", alone["folder"] / "one"):
        shutil.copytree(folder, tmp_path / folder.name)
    resumed = main([*words, str(tmp_path / "several")])
    longer = main([*words, str(tmp_path / "one")])
    assert resumed["history"][2]["train_loss"] == pytest.approx(
        longer["history"][2]["train_loss"], rel=1e-5
    )


@pytest.mark.parametrize("several", [2], indirect=True)
def test_an_error_ends_all_with_one_message(several):
    said = (several / "said").read_text()
    assert said.startswith("[1, 1] ")
    assert said.count("the weights are ruined") == 1
    assert said.count("validation samples of 201") == 1
    assert said.count("--fsdp with --use_amp: ") == 1
    assert said.count("--sync_bn and --accum_steps 2 with 2 processes: ") == 1
    assert said.count("and --model dynamic has none") == 1
    assert not (several / "no").exists()


@pytest.mark.parametrize("several", [3], indirect=True)
def test_a_killed_process_ends_the_others_and_the_folder_resumes(alone, several, monkeypatch):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    first, *said = (several / "said").read_text().splitlines()
    assert first.startswith("[1, -9, 1] ")
    died = float((several / "died").read_text())
    assert float(first.split()[-1]) - died < 60
    assert "cannot go on without the others" in "".join(said)
    resumed = main(["--resume", "--output_dir", str(several / "killed"), "--device", "cpu"])
    expected = alone["plain"]["history"][1]["train_loss"]
    assert resumed["history"][1]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_one_process_has_nothing_to_share_out(plain, refused):
    code, text = refused(main, [*FLAGS, "--fsdp"])
    assert code == 2
    assert "over several processes, and there is one" in text


def test_memory_that_is_full_in_one_process_ends_the_run(monkeypatch):
    from models.dynamic import DynamicNetwork
    from tasks.classification import ClassificationTask
    from trainers import GrowthTrainer, TrainingError

    model = DynamicNetwork(num_inputs=2, num_classes=2)
    trainer = GrowthTrainer(model, ClassificationTask(), device=torch.device("cpu"))
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "no memory"])
    with pytest.raises(TrainingError, match="full in process 1 of 2"):
        trainer.step((torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, [(9, 1.0)]])
    with pytest.raises(TrainingError, match="grown different centers"):
        trainer.end_batches()
