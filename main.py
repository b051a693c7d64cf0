"""Train, evaluate and compare nearest-neighbor neural networks: ``python main.py --flags``.

Every flag of the program is declared here, checked here, and turned into keyword arguments here;
nothing below this file knows a flag's name. ``main(argv) -> dict`` may be imported.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Subset

from dataset import (
    DATASETS,
    Data,
    DataError,
    build_loader,
    encode_data,
    limit,
    load_data,
    read_image,
    split_train,
)
from layers import LAYERS
from layers.dynamic import PREDICTORS
from models import MODELS, model_class
from models.features import PCA, penultimate_features
from models.knn import VOTES
from models.n3net import PRESETS, load_pretrained
from models.tiling import check_tiles, forward_in_tiles
from ops.centers.distances import KERNELS
from ops.cpu import build as native
from train_eval import (
    ApproximationTask,
    ClassificationTask,
    DenoisingTask,
    GradientTrainer,
    GrowthTrainer,
    ImageReport,
    LanguageTask,
    NeighborReport,
    Progress,
    RunFolder,
    Task,
    Trainer,
    TrainingError,
    build_optimizer,
    build_scheduler,
    evaluate,
    evaluate_neighbors,
    fit,
    generate_text,
    load_checkpoint,
    mse_to_psnr,
    read_weights,
    restore,
    train_one_epoch,
)
from utils import (
    atomic_path,
    describe_model,
    format_args,
    get_random_state,
    parse_args_text,
    plot_confusion,
    plot_neighbors,
    save_checkpoint,
    save_panels,
    seed_everything,
    write_text,
)

__all__ = ["build_parser", "main"]


# ---------------------------------------------------------------------------------------------
# Flags


def whole_numbers(text: str) -> int | list[int]:
    """Parse ``9`` or, for several at once, ``1,3,5``."""
    numbers = [int(part) for part in text.strip("[]").split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1] (got {text})")
    return value


def at_least(minimum: float, kind: type = int) -> Callable[[str], Any]:
    """Make a parser of numbers that are not below ``minimum``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum} (got {text})")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every flag, in groups."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train, evaluate and compare nearest-neighbor neural networks.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for add in (add_model_flags, add_layer_flags, add_data_flags, add_training_flags):
        add(parser)
    for add in (add_denoising_flags, add_dynamic_flags, add_knn_flags, add_optimizer_flags):
        add(parser)
    for add in (add_system_flags, add_output_flags):
        add(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add which network is built."""
    group = parser.add_argument_group("Model")
    add = group.add_argument
    add("--model", default="vgg11", choices=list(MODELS), help="network")
    add(
        "--layer",
        default="ConvNN",
        choices=list(LAYERS),
        help="what takes the place of every convolution (VGG, ResNet, DnCNN)",
    )
    add(
        "--kernel_size",
        type=at_least(1),
        default=3,
        help="side of the window of Conv2d, Conv2d_New and the convolution branch; odd",
    )
    add(
        "--padding",
        type=at_least(0),
        default=1,
        help="width of the border of zeros whose positions are candidates too (neighbor layers); "
        "convolutions always keep the size of the map",
    )
    add(
        "--downsample",
        default="stride",
        choices=["stride", "none"],
        help="ResNet: halve the resolution where the classic network does, "
        "or keep it (the published networks)",
    )


def add_layer_flags(parser: argparse.ArgumentParser) -> None:
    """Add how neighbors are found and combined."""
    group = parser.add_argument_group("Neighbor layers (ConvNN, ConvNN_Attn, Branching, ...)")
    add = group.add_argument
    add(
        "--K",
        type=whole_numbers,
        default=9,
        help="number of neighbors, the position itself included; "
        "--model knn takes several at once: 1,3,5",
    )
    add(
        "--sampling_type",
        default="all",
        choices=["all", "random", "spatial"],
        help="which positions are candidates: all, --num_samples drawn at random in every forward "
        "pass, or a regular grid of --num_samples x --num_samples",
    )
    add(
        "--num_samples",
        type=int,
        default=-1,
        help="candidates of random sampling, or side of the grid of spatial sampling; "
        "-1 with --sampling_type all",
    )
    add(
        "--sample_padding",
        type=at_least(0),
        default=0,
        help="distance of the spatial grid from the border, in positions",
    )
    add(
        "--magnitude_type",
        default="cosine",
        choices=["cosine", "euclidean", "dot"],
        help="similarity of two positions; also the metric of --model knn (dot is for knn only)",
    )
    add(
        "--similarity_type",
        default="Col",
        choices=["Loc", "Col", "Loc_Col"],
        help="what is compared: coordinates, features, or both (ConvNN, Branching)",
    )
    add(
        "--aggregation_type",
        default="Col",
        choices=["Col", "Loc_Col"],
        help="what is combined: features, or features and coordinates",
    )
    add(
        "--lambda_param",
        type=fraction,
        default=0.5,
        help="weight of features against coordinates in --similarity_type Loc_Col, in [0, 1]",
    )
    add(
        "--shuffle_pattern",
        default="NA",
        choices=["BA", "NA", "B", "A"],
        help="pixel-unshuffle before (B) and pixel-shuffle after (A) the layer, or neither (NA)",
    )
    add(
        "--shuffle_scale",
        type=at_least(0),
        default=0,
        help="factor of the shuffle; 0 is off",
    )
    add(
        "--branch_ratio",
        type=fraction,
        default=0.5,
        help="part of the output channels made by the neighbor branch (Branching layers), "
        "in [0, 1]",
    )
    add(
        "--attention_dropout",
        type=fraction,
        default=0.1,
        help="dropout on attention weights (ConvNN_Attn, Branching_Attn), in [0, 1]",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is learnt from."""
    group = parser.add_argument_group("Data")
    add = group.add_argument
    add("--dataset", default="cifar10", choices=list(DATASETS), help="dataset")
    add(
        "--data_path",
        default="./Data",
        help="folder of the data (downloads go there), or the file of --dataset npz",
    )
    add("--resize", type=at_least(1), default=None, help="side of the square images are resized to")
    add(
        "--augment",
        action="store_true",
        help="random crops, and flips where a mirrored image is still of its class",
    )
    add(
        "--noise",
        type=at_least(0, float),
        default=0.0,
        help="standard deviation of Gaussian noise on images in [0, 1], in training and testing",
    )
    add(
        "--val_split",
        type=at_least(0, float),
        default=0.0,
        help="part of the training set held out to choose the best checkpoint; "
        "0 chooses on the test set, as the published runs do",
    )
    add("--limit_train", type=at_least(1), default=None, help="use the first N training samples")
    add("--limit_test", type=at_least(1), default=None, help="use the first N test samples")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add how training runs."""
    group = parser.add_argument_group("Training")
    add = group.add_argument
    add("--batch_size", type=at_least(1), default=256, help="samples per step")
    add("--num_epochs", type=at_least(1), default=150, help="passes over the training set")
    add(
        "--use_amp",
        action="store_true",
        help="mixed precision: float16 with loss scaling on CUDA, bfloat16 on the CPU",
    )
    add("--use_compiled", action="store_true", help="torch.compile (needs a C++ compiler)")
    add(
        "--compile_mode",
        default="default",
        choices=["default", "reduce-overhead", "reduce-memory", "max-autotune"],
        help="mode of torch.compile; it knows no reduce-memory: the default mode with memory "
        "planning and reordering for a low peak stands for it",
    )
    add(
        "--clip_grad_norm",
        type=at_least(0, float),
        default=1.0,
        help="largest norm of the gradients; 0 does not clip",
    )
    add(
        "--criterion",
        default="CrossEntropy",
        choices=["CrossEntropy", "MSE"],
        help="classification loss; MSE is taken against the one-hot class",
    )


def add_denoising_flags(parser: argparse.ArgumentParser) -> None:
    """Add the denoisers (DnCNN, N3Net), their data and their evaluation."""
    group = parser.add_argument_group("Denoising networks (dncnn, n3net)")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    add(
        "--preset",
        default=None,
        choices=list(PRESETS),
        help="a row of the N3Net paper's table: sets --model and the flags below",
    )
    add("--depth", type=at_least(2), default=6, help="convolutions of (each) DnCNN; dncnn: 17")
    add("--features", type=at_least(1), default=64, help="channels inside a DnCNN")
    add("--batch_norm", action=yes_no, default=True, help="batch norm in the DnCNNs")
    add("--residual", action=yes_no, default=True, help="add the input of a DnCNN to its output")
    add(
        "--bn_momentum",
        type=at_least(0, float),
        default=None,
        help="weight of a new batch in the running statistics; not given: 20 / steps of the run, "
        "but from 0.001 (published) to 0.1",
    )
    add("--num_blocks", type=at_least(0), default=2, help="n3net: nonlocal blocks; 1 is light")
    add("--block_channels", type=at_least(1), default=8, help="n3net: channels into a block")
    add(
        "--nonlocal_block",
        default="n3",
        choices=["n3", "knn", "concrete", "none"],
        help="n3net: neural, hard or stochastic nearest neighbors, or nothing, between the DnCNNs",
    )
    add(
        "--match_on",
        default=None,
        choices=["embedding", "input", "dncnn"],
        help="n3net: compare patches by a learned embedding (not knn), by the noisy input or by "
        "the output of the DnCNN before; not given: embedding, for knn dncnn",
    )
    add("--num_volumes", type=at_least(1), default=7, help="n3net: neighbors of a patch")
    add("--patch_size", type=at_least(1), default=10, help="n3net: side of a patch, in pixels")
    add("--patch_stride", type=at_least(1), default=5, help="n3net: step between patches")
    add("--window", type=at_least(1), default=15, help="n3net: side of the window, in patches; odd")
    add("--embed_channels", type=at_least(1), default=8, help="n3net: channels of the embedding")
    add("--embed_features", type=at_least(1), default=64, help="n3net: channels on the way there")
    add("--embed_depth", type=at_least(1), default=3, help="n3net: convolutions on the way there")
    add(
        "--temperature",
        default="image",
        choices=["image", "learned", "fixed"],
        help="n3net: temperature of n3 blocks: a network's for every patch, one number, or fixed",
    )
    add(
        "--temp_bias",
        type=at_least(0, float),
        default=0.1,
        help="n3net: its logarithm is added to the log temperature; 0 adds nothing",
    )
    add(
        "--temp_pool",
        default="average",
        choices=["average", "center"],
        help="n3net: temperature of a patch: average over it (published code) or center pixel",
    )
    add("--distance_bn", action=yes_no, default=True, help="n3net: batch norm of distances")
    add(
        "--pad_mode",
        default="zeros",
        choices=["zeros", "reflect"],
        help="n3net: what the grid of patches sees beyond the border; zeros is published",
    )

    group = parser.add_argument_group("Denoising: data, loss, evaluation")
    add = group.add_argument
    add("--train_dir", nargs="+", default=None, metavar="DIR", help="folders of clean images")
    add("--test_dir", nargs="+", default=None, metavar="DIR", help="folders of clean images")
    add("--color", action="store_true", help="three channels; without it gray (luma)")
    add("--sigma", type=float, default=25.0, help="standard deviation of noise, on 0-255; > 0")
    add("--crop_size", type=at_least(1), default=80, help="side of training crops, in pixels")
    add(
        "--crops_per_image",
        type=at_least(1),
        default=128,
        help="crops of each training image in an epoch, flipped and turned by 90 degrees at random",
    )
    add(
        "--loss_reduction",
        default="sum",
        choices=["sum", "mean"],
        help="squared error: half the sum over an image times --loss_scale (published), or mean",
    )
    add("--loss_scale", type=at_least(0, float), default=0.25, help="see --loss_reduction")
    add("--tile", type=at_least(0), default=0, help="evaluate by tiles of this side; 0: whole")
    add(
        "--tile_overlap",
        type=at_least(0),
        default=None,
        help="pixels that tiles share; not given: 64, or half a small tile",
    )
    add(
        "--save_images",
        action="store_true",
        help="draw noisy, denoised and clean test images side by side",
    )
    add("--pretrained", default=None, metavar="FILE", help="weights to start from or to evaluate")
    add("--input", default=None, metavar="FILE", help="with --test_only: denoise this picture")
    add("--output", default=None, metavar="FILE", help="where the denoised --input goes")


def add_dynamic_flags(parser: argparse.ArgumentParser) -> None:
    """Add growing networks, and the picture and the text that they learn."""
    group = parser.add_argument_group("Growing networks (--model dynamic)")
    add = group.add_argument
    add(
        "--kernel_type",
        default="cosine",
        choices=KERNELS,
        help="what weight a center has at a distance; cosine and dot compare directions, "
        "influence_cone sees only centers near the nearest one",
    )
    add("--epsilon", type=float, default=1e-6, help="added to every distance, > 0")
    add(
        "--exponent",
        type=float,
        default=-4.0,
        help="the weight is distance to this power, < 0 (all kernels but influence_cone)",
    )
    add("--scales", type=int, default=4, help="levels of euclidean_pyramid")
    add(
        "--influence_cone_factor",
        type=float,
        default=2.0,
        help="reach of influence_cone in distances of the nearest center, > 1",
    )
    add(
        "--predictor",
        default="interp",
        choices=PREDICTORS,
        help="who votes: all centers, the nearest one, or the --K nearest",
    )
    add(
        "--target_accuracy",
        type=float,
        default=0.9,
        help="share of a batch, in (0, 1], from which on it is not gone over again",
    )
    add("--max_count", type=int, default=3, help="times a batch is gone over at most")
    add("--max_neighbors", type=int, default=100_000, help="most centers of each layer")
    add(
        "--tolerance",
        type=float,
        default=0.05,
        help="--dataset image: distance in RGB, [0, 1], from which on a pixel counts as wrong",
    )
    add("--num_layers", type=int, default=1, help="layers, grown one after the other")
    add(
        "--splits",
        type=int,
        default=1,
        help="parts of a layer's centers whose class scores the next layer sees",
    )
    add(
        "--dynamic_features",
        default="raw",
        metavar="raw|pca:N|FILE",
        help="what is compared (classification): pixels, their N principal components, or what "
        "the last layer of a network trained here sees (its best.pt)",
    )
    add(
        "--balanced_first_batch",
        action="store_true",
        help="the first batch holds all classes equally often",
    )
    add(
        "--prune",
        action="store_true",
        help="afterwards drop centers without which every training sample is predicted the same, "
        "into pruned.pt",
    )
    add(
        "--eval_train",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure training accuracy after each pass, not while growing (default: yes)",
    )
    add("--image_path", default=None, help="--dataset image: the picture (default: a photograph)")
    add("--text_path", default=None, help="--dataset text: training text (default: Python's help)")
    add("--test_text_path", default=None, help="test text (default: last tenth of --text_path)")
    add("--num_features", type=at_least(1), default=10, help="characters that are looked at")
    add(
        "--text_encoding",
        default="ascii",
        choices=["ascii", "onehot"],
        help="a character is its code (published), or a column of its own",
    )
    add(
        "--text_decay",
        type=fraction,
        default=1.0,
        help="onehot: a character counts by this factor less than the one after it",
    )
    add("--text_prompt", default=None, help="text to go on with, after training or --test_only")
    add("--text_prediction_length", type=at_least(0), default=100, help="characters to add to it")
    add(
        "--text_temperature",
        type=at_least(0, float),
        default=1.0,
        help="below 1 more certain, above 1 more varied; 0 takes the best character",
    )


def add_knn_flags(parser: argparse.ArgumentParser) -> None:
    """Add K-nearest-neighbor classification."""
    group = parser.add_argument_group(
        "K nearest neighbors (--model knn; --K and --magnitude_type are above)"
    )
    add = group.add_argument
    add(
        "--vote",
        default="majority",
        choices=VOTES,
        help="neighbors count the same and ties go to the nearer (majority) or to the lowest class "
        "(majority_lowest, as in scikit-learn), or they count by 1 / distance",
    )
    add(
        "--knn_features",
        default="raw",
        metavar="raw|pca:N|FILE",
        help="what is compared: pixels, their N principal components, or what the last layer of "
        "a network trained here sees (its best.pt)",
    )
    add(
        "--knn_precision",
        default="auto",
        choices=["auto", "float32"],
        help="products in 8 bits where that is faster, or in float32; the neighbors are exact "
        "either way",
    )
    add(
        "--leave_one_out",
        action="store_true",
        help="choose among several --K by classifying every training sample by the others",
    )


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add optimizer and schedule."""
    group = parser.add_argument_group("Optimizer and schedule")
    add = group.add_argument
    add("--optimizer", default="adamw", choices=["adam", "sgd", "adamw"], help="optimizer")
    add("--lr", type=at_least(0, float), default=1e-3, help="learning rate")
    add("--weight_decay", type=at_least(0, float), default=1e-6, help="weight decay")
    add("--momentum", type=at_least(0, float), default=0.9, help="momentum of sgd")
    add(
        "--scheduler",
        default="none",
        choices=["step", "cosine", "plateau", "exponential", "none"],
        help="learning rate over epochs: times --lr_gamma every --lr_step epochs, cosine to 0, "
        "times --lr_gamma when --lr_step epochs brought no better result, exponentially down to "
        "times --lr_final, or constant",
    )
    add("--lr_final", type=at_least(0, float), default=1e-3, help="see --scheduler exponential")
    add(
        "--decay_bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weight decay on biases too (not in denoisers, as published)",
    )
    add("--lr_step", type=at_least(1), default=20, help="see --scheduler, in epochs")
    add("--lr_gamma", type=at_least(0, float), default=0.1, help="see --scheduler")


def add_system_flags(parser: argparse.ArgumentParser) -> None:
    """Add where it runs."""
    group = parser.add_argument_group("System")
    add = group.add_argument
    add(
        "--device",
        default="cuda",
        choices=["cpu", "cuda", "mps", "auto"],
        help="without this flag: cuda where there is one, else the CPU; auto: the best there is",
    )
    add("--seed", type=at_least(0), default=0, help="seed of everything drawn at random")
    add(
        "--num_workers",
        type=at_least(-1),
        default=-1,
        help="loading processes; -1: none for data in memory, else up to 4",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is written, and what kind of run it is."""
    group = parser.add_argument_group("Output and kind of run")
    add = group.add_argument
    add(
        "--output_dir",
        default="./Output/VGG/ConvNN",
        help="run folder; not given: ./Output/<family>/<layer>, numbered where a run is already "
        "there (the default shown is that of vgg11 and ConvNN)",
    )
    add(
        "--test_only",
        action="store_true",
        help="evaluate best.pt of --output_dir (or --checkpoint) on the test set",
    )
    add("--resume", action="store_true", help="go on from last.pt of --output_dir")
    add("--overwrite", action="store_true", help="replace the run in --output_dir")
    add("--checkpoint", default=None, help="checkpoint file for --test_only and --resume")
    add(
        "--config",
        default=None,
        help="args.txt of a former run; flags on the command line win over it",
    )
    add(
        "--dry_run",
        action="store_true",
        help="build everything, take two steps, evaluate two batches, write nothing",
    )


# Which flags each layer takes; the layer's constructor takes them under the same names.
_NEIGHBORS = (
    "K",
    "padding",
    "sampling_type",
    "num_samples",
    "sample_padding",
    "shuffle_pattern",
    "shuffle_scale",
    "magnitude_type",
    "aggregation_type",
)
LAYER_FLAGS: dict[str, tuple[str, ...]] = {
    "Conv2d": ("kernel_size",),
    "Conv2d_New": ("kernel_size", "shuffle_pattern", "shuffle_scale", "aggregation_type"),
    "ConvNN": (*_NEIGHBORS, "similarity_type", "lambda_param"),
    "ConvNN_Attn": (*_NEIGHBORS, "attention_dropout"),
    "Branching": (
        *_NEIGHBORS,
        "similarity_type",
        "lambda_param",
        "kernel_size",
        "branch_ratio",
    ),
    "Branching_Attn": (*_NEIGHBORS, "attention_dropout", "kernel_size", "branch_ratio"),
}
# Flags that only gradient descent reads.
GRADIENT_FLAGS = (
    "use_amp",
    "use_compiled",
    "compile_mode",
    "clip_grad_norm",
    "criterion",
    "optimizer",
    "lr",
    "weight_decay",
    "momentum",
    "scheduler",
    "lr_step",
    "lr_gamma",
    "lr_final",
    "decay_bias",
)
_DNCNN = ("depth", "features", "batch_norm", "residual", "bn_momentum")
# Flags that only the denoising task reads.
DENOISING_FLAGS = (
    "train_dir",
    "test_dir",
    "color",
    "sigma",
    "crop_size",
    "crops_per_image",
    "loss_reduction",
    "loss_scale",
    "tile",
    "tile_overlap",
    "save_images",
    "pretrained",
    "input",
    "output",
)
# Flags each model takes besides those of its layer, under the same names.
MODEL_FLAGS: dict[str, tuple[str, ...]] = {
    "resnet18": ("downsample",),
    "resnet34": ("downsample",),
    "dncnn": _DNCNN,
    "n3net": (
        *_DNCNN,
        "num_blocks",
        "block_channels",
        "nonlocal_block",
        "match_on",
        "num_volumes",
        "patch_size",
        "patch_stride",
        "window",
        "embed_channels",
        "embed_features",
        "embed_depth",
        "temperature",
        "temp_bias",
        "temp_pool",
        "distance_bn",
        "pad_mode",
    ),
    "dynamic": (
        "K",
        "kernel_type",
        "epsilon",
        "exponent",
        "scales",
        "influence_cone_factor",
        "predictor",
        "target_accuracy",
        "max_count",
        "max_neighbors",
        "tolerance",
        "num_layers",
        "splits",
    ),
}
# Flags that only one dataset reads.
DATASET_FLAGS: dict[str, tuple[str, ...]] = {
    "image": ("image_path", "tolerance"),
    "text": (
        "text_path",
        "test_text_path",
        "num_features",
        "text_encoding",
        "text_decay",
        "text_prompt",
        "text_prediction_length",
        "text_temperature",
    ),
}
# Flags of --model dynamic that its constructor does not take.
DYNAMIC_FLAGS = ("dynamic_features", "balanced_first_batch", "prune", "eval_train")
KNN_FLAGS = ("vote", "knn_features", "knn_precision", "leave_one_out")
# Defaults that differ from the parser's for one model; flags of the user win.
_DENOISER = {
    "dataset": "photos",
    "layer": "Conv2d",
    "batch_size": 32,
    "num_epochs": 51,
    "clip_grad_norm": 0.0,
    "optimizer": "adam",
    "weight_decay": 1e-4,
    "decay_bias": False,
    "scheduler": "exponential",
}
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "dncnn": {**_DENOISER, "depth": 17},
    "n3net": _DENOISER,
    "dynamic": {"batch_size": 64, "num_epochs": 1},
    "knn": {"K": 1, "batch_size": 4096, "num_epochs": 1},
}
# The same for one model on one dataset.
DATASET_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("dynamic", "image"): {
        "kernel_type": "euclidean",
        "tolerance": 0.2,
        "target_accuracy": 0.8,
        "batch_size": 256,
    },
}
# What kind of run it is: never taken over from a former run's arguments.
RUN_FLAGS = (
    "test_only",
    "resume",
    "overwrite",
    "checkpoint",
    "config",
    "dry_run",
    "preset",
    "input",
    "output",
)
# What may change when a run is resumed: it alters how long and where, not what is computed.
RESUME_FLAGS = (
    "num_epochs",
    "device",
    "num_workers",
    "data_path",
    "train_dir",
    "test_dir",
    "output_dir",
)


# ---------------------------------------------------------------------------------------------
# From the command line to checked arguments


def read_values(
    parser: argparse.ArgumentParser, values: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Turn the strings of an args.txt into values, as the parser would read them."""
    actions = {action.dest: action for action in parser._actions}
    parsed = {}
    for name, text in values.items():
        action = actions.get(name)
        if action is None:
            print(f"note: {source} holds {name}, which is no flag of this version: ignored.")
            continue
        if name in RUN_FLAGS:
            continue
        if text == "None":
            parsed[name] = None
        elif isinstance(action.default, bool):
            parsed[name] = text == "True"
        else:
            convert = action.type or str
            try:
                if action.nargs in ("+", "*"):
                    parsed[name] = [convert(str(item)) for item in json.loads(text)]
                else:
                    parsed[name] = convert(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                parser.error(f"{source}: {name}: {text} cannot be read ({error}).")
            if action.choices is not None and parsed[name] not in action.choices:
                parser.error(f"{source}: {name}: {text} is none of {', '.join(action.choices)}.")
    return parsed


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Return the names of the flags that stand on the command line."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {k for k, v in vars(parser.parse_args(argv, blank)).items() if v is not absent}


def default_output_dir(args: argparse.Namespace) -> str:
    """Return ./Output/<family>/<layer>, or <dataset> for models that take no layer."""
    model_type = model_class(args.model)
    return f"./Output/{model_type.family}/{args.layer if model_type.uses_layer else args.dataset}"


def next_free(path: str) -> str:
    """Return ``path``, or the first of ``path_2``, ``path_3``, … that holds no run."""
    candidate, number = path, 2
    while RunFolder(candidate).holds_run():
        candidate, number = f"{path}_{number}", number + 1
    return candidate


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, set[str], dict[str, Any] | None]:
    """Parse flags, then fill in what was not given.

    The order is: the command line, then the checkpoint of --resume or --test_only, or the --config
    file, then the model's defaults, then the parser's.

    Returns:
        The arguments, the names of those the user gave, and the checkpoint, if one is used.
    """
    args = parser.parse_args(argv)
    given = given_flags(parser, argv)
    if args.resume and args.test_only:
        parser.error("--resume trains on and --test_only does not train: give one of them.")
    if args.checkpoint and not (args.resume or args.test_only):
        parser.error("--checkpoint is read by --test_only and --resume: give one of them too.")

    former: dict[str, Any] = {}
    if args.config:
        try:
            text = Path(args.config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--config {args.config} cannot be read: {error}")
        former = read_values(parser, parse_args_text(text), args.config)

    if "model" not in given and "model" in former:
        args.model = former["model"]
    preset: dict[str, Any] = {}
    if args.preset:
        model, preset = PRESETS[args.preset]
        if "model" in given and args.model != model:
            parser.error(f"--preset {args.preset} is a {model}, not a {args.model}: leave one out.")
        args.model = model
    defaults = MODEL_DEFAULTS.get(args.model, {})
    for source in (defaults, former, preset):
        if "dataset" not in given:
            args.dataset = source.get("dataset", args.dataset)
    defaults = defaults | DATASET_DEFAULTS.get((args.model, args.dataset), {})
    for source in (defaults, former, preset):
        for name, value in source.items():
            if name not in given:
                setattr(args, name, value)
    given |= set(preset)
    if args.pretrained and not args.resume:
        adopt_pretrained(parser, args, given)
    base = args.output_dir if "output_dir" in given | set(former) else default_output_dir(args)

    checkpoint = None
    if args.resume or (args.test_only and "pretrained" not in given):
        args.output_dir = base
        checkpoint = read_checkpoint(parser, args, given)
    elif args.test_only and "output_dir" in given:
        args.output_dir = base
    elif "output_dir" in given:
        if RunFolder(base).holds_run() and not (args.overwrite or args.dry_run):
            parser.error(
                f"--output_dir {base} already holds a run. Add --resume to go on with it, "
                "--test_only to evaluate it, --overwrite to replace it, or name another folder."
            )
    else:
        args.output_dir = base if args.overwrite else next_free(base)
    return args, given | set(former), checkpoint


def differing_flags(
    names: Iterable[str], stored: Mapping[str, Any], args: argparse.Namespace
) -> str:
    """Say which of these flags a stored run has otherwise; empty if none."""
    return "; ".join(
        f"--{name} is {stored[name]} there and {getattr(args, name)} here"
        for name in sorted(names)
        if name in stored and stored[name] != getattr(args, name)
    )


def read_checkpoint(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> dict[str, Any]:
    """Load the checkpoint of --resume or --test_only and take its arguments over into ``args``."""
    name = RunFolder.LAST if args.resume else RunFolder.BEST
    path = args.checkpoint or str(Path(args.output_dir, name))
    flag = "--resume" if args.resume else "--test_only"
    if not Path(path).is_file():
        parser.error(
            f"{flag} needs a checkpoint, and there is none at {path}. Train first, or name the "
            "run folder by --output_dir, or the file by --checkpoint."
        )
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as error:
        parser.error(f"{flag}: {error}")
    stored = checkpoint["args"]
    if args.resume:
        fixed = set(stored) - set(RESUME_FLAGS) - set(RUN_FLAGS)
    else:
        model = stored.get("model", args.model)
        fixed = {"model", *MODEL_FLAGS.get(model, ())}
        if model in MODELS and model_class(model).uses_layer:
            fixed |= {"layer", *LAYER_FLAGS.get(stored.get("layer"), ())}
    if differing := differing_flags(fixed & given, stored, args):
        parser.error(
            f"{flag}: {path} was made by another "
            f"{'run' if args.resume else 'architecture'}: {differing}. Leave these "
            "flags out (they are taken from the checkpoint), or choose another checkpoint."
        )
    for name, value in stored.items():
        if name not in given and name not in (*RUN_FLAGS, "output_dir", "device"):
            setattr(args, name, value)
    return checkpoint


def adopt_pretrained(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """Take the architecture from --pretrained, where that file holds the arguments of a run."""
    try:
        _, stored = read_weights(args.pretrained)
    except ValueError as error:
        parser.error(f"--pretrained: {error}")
    fixed = {"model", *MODEL_FLAGS.get(stored.get("model", ""), ()), "layer", "color"}
    fixed |= set(LAYER_FLAGS.get(stored.get("layer", ""), ()))
    fixed = (fixed & set(stored)) - {"bn_momentum"}
    if differing := differing_flags(fixed & given, stored, args):
        parser.error(f"--pretrained {args.pretrained} was made with other options: {differing}.")
    for name in fixed:
        setattr(args, name, stored[name])


def resolve_device(parser: argparse.ArgumentParser, wanted: str, asked: bool) -> str:
    """Choose the device, or refuse one that was asked for and is not there."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if wanted == "auto":
        return there[0]
    if wanted in there:
        return wanted
    if asked:
        parser.error(f"--device {wanted}: there is none here. There is: {', '.join(there)}.")
    print(f"No {wanted} device here: using the {there[0]}.")
    return there[0]


def has_cpp_compiler() -> bool:
    """Say whether torch.compile will find a C++ compiler."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return any(name and shutil.which(name.split()[0]) for name in names)


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """Refuse combinations that cannot work; note flags that have no effect."""
    model_type = model_class(args.model)
    task = DATASETS[args.dataset].task
    if task not in model_type.tasks:
        fits = [name for name, row in DATASETS.items() if row.task in model_type.tasks]
        able = [name for name in MODELS if task in model_class(name).tasks]
        parser.error(
            f"--model {args.model} cannot do {task}, the task of --dataset {args.dataset}. "
            f"Datasets for {args.model}: {', '.join(fits)}. "
            f"Models for {args.dataset}: {', '.join(able) or 'none'}."
        )
    if isinstance(args.K, list) and args.model != "knn":
        parser.error(f"--K takes one number for --model {args.model} (got {args.K}).")
    if args.val_split >= 1:
        parser.error(f"--val_split must lie in [0, 1) (got {args.val_split}).")
    if args.resize is not None and args.resize < model_type.min_input_size:
        parser.error(
            f"--resize {args.resize} is too small for {args.model}, which would shrink it to "
            f"nothing: it needs at least {model_type.min_input_size}."
        )
    if args.use_compiled and not has_cpp_compiler():
        parser.error(
            "--use_compiled needs a C++ compiler and found none (g++, clang++, or $CXX). "
            "Install one (Debian: apt-get install g++), or leave the flag out."
        )
    if model_type.uses_layer:
        try:
            build_layer(args)(in_channels=16, out_channels=16)
        except ValueError as error:
            parser.error(f"--layer {args.layer}: {error}")

    if task == "denoising":
        check_denoising(parser, args, given)
    if args.model == "dynamic":
        check_dynamic(parser, args, given)
    if args.model == "knn":
        check_knn(parser, args)

    # Flags without effect are said, not refused.
    used = set(LAYER_FLAGS[args.layer]) if model_type.uses_layer else set()
    used |= set(MODEL_FLAGS.get(args.model, ()))
    used |= {"K", "magnitude_type"} if args.model == "knn" else set()
    of_layers = {flag for flags in LAYER_FLAGS.values() for flag in flags} | {"layer"}
    of_models = {flag for flags in MODEL_FLAGS.values() for flag in flags}
    idle = (
        ((of_layers | of_models) & given) - used - ({"layer"} if model_type.uses_layer else set())
    )
    if model_type.training != "gradient":
        idle |= set(GRADIENT_FLAGS) & given - used
    if model_type.training == "memory":
        idle |= {"num_epochs", "augment"} & given
    else:
        idle |= set(KNN_FLAGS) & given
    if task != "denoising":
        idle |= set(DENOISING_FLAGS) & given - used
    if args.model != "dynamic":
        idle |= set(DYNAMIC_FLAGS) & given
    for dataset, flags in DATASET_FLAGS.items():
        if args.dataset != dataset:
            idle |= set(flags) & given
    if idle:
        where = f"--model {args.model}" + (
            f" --layer {args.layer}" if model_type.uses_layer else ""
        )
        print(f"note: no effect with {where}: {', '.join(f'--{name}' for name in sorted(idle))}.")

    folder = Path(args.output_dir)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"--output_dir {args.output_dir} cannot be written: {existing} is in the way.")


def check_denoising(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """Refuse denoising runs that cannot work."""
    if not args.sigma > 0:
        parser.error(
            f"--sigma {args.sigma:g}: the standard deviation of the noise must be above 0 "
            "(on the 0-255 scale; 25 is usual)."
        )
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together: the noisy picture and the denoised one.")
    if args.input is not None and not args.test_only:
        parser.error("--input needs --test_only, and --pretrained or the folder of a trained run.")
    if args.input is not None and not Path(args.input).is_file():
        parser.error(f"--input {args.input}: there is no such file.")
    if args.dataset == "denoise" and args.input is None:
        if not args.test_dir:
            parser.error("--dataset denoise needs --test_dir: folders of clean images.")
        if not args.train_dir and not args.test_only:
            parser.error("--dataset denoise needs --train_dir: folders of clean images.")
    if args.model == "n3net" and args.window % 2 == 0:
        parser.error(
            f"--window {args.window} is even: a query sits in the middle of its window. "
            f"Try {args.window - 1} or {args.window + 1}."
        )
    try:
        model = build_denoiser(args, 1)
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")
    try:
        if args.tile:
            check_tiles(model, args.tile, tile_overlap(args))
    except ValueError as error:
        parser.error(f"--tile {args.tile} --tile_overlap {tile_overlap(args)}: {error}")


def check_dynamic(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """Refuse growing networks that cannot work."""
    task = DATASETS[args.dataset].task
    outputs = {"num_outputs": 3} if task == "approximation" else {"num_classes": 2}
    options = {name: getattr(args, name) for name in MODEL_FLAGS["dynamic"]}
    try:
        MODELS["dynamic"](num_inputs=1, **outputs, **options)
    except ValueError as error:
        parser.error(f"--model dynamic: {error}")
    if args.max_neighbors < args.batch_size:
        parser.error(
            f"--max_neighbors {args.max_neighbors} is less than the first batch, all of which "
            f"becomes centers (--batch_size {args.batch_size}). Raise the one or lower the other."
        )
    if args.prune and (args.predictor != "interp" or args.kernel_type == "influence_cone"):
        parser.error(
            "--prune works with --predictor interp and an inverse kernel: other votes do not add "
            f"up (got --predictor {args.predictor} --kernel_type {args.kernel_type})."
        )
    if args.balanced_first_batch and task == "approximation":
        parser.error(
            f"--balanced_first_batch needs classes, and --dataset {args.dataset} has none."
        )
    if args.dynamic_features != "raw" and task != "classification":
        parser.error(
            f"--dynamic_features {args.dynamic_features} is for classification: --dataset "
            f"{args.dataset} is learnt as it is."
        )
    check_features(parser, "--dynamic_features", args.dynamic_features)
    if args.text_prompt is not None and args.dataset == "text":
        strange = sorted({c for c in args.text_prompt if not c.isascii()})
        if strange:
            parser.error(
                f"--text_prompt holds characters outside the alphabet, which is ASCII: "
                f"{' '.join(strange)}. Replace them."
            )
        if len(args.text_prompt) < args.num_features:
            print(
                f"note: --text_prompt has {len(args.text_prompt)} characters and "
                f"{args.num_features} are looked at (--num_features): blanks are put before it."
            )


def check_knn(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse K-nearest-neighbor runs that cannot work."""
    try:
        build_classifier(args)
    except ValueError as error:
        parser.error(f"--model knn: {error}")
    if args.resume:
        parser.error(
            "--resume: --model knn stores the training set in one go, there is nothing to go on "
            "with. --test_only evaluates the run; --overwrite does it anew."
        )
    if args.leave_one_out and args.val_split > 0:
        parser.error(
            "--leave_one_out and --val_split are two ways to choose --K: give one of them."
        )
    if args.leave_one_out and world_size() > 1:
        parser.error(
            "--leave_one_out needs all samples in one process, and torchrun started "
            f"{world_size()}. Try --val_split."
        )
    check_features(parser, "--knn_features", args.knn_features)


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_features(parser: argparse.ArgumentParser, flag: str, spec: str) -> None:
    """Refuse what is no feature: raw, pca:N, or the checkpoint of a network."""
    if spec == "raw":
        return
    if spec.startswith("pca:"):
        number = spec.removeprefix("pca:")
        if not number.isdecimal() or int(number) < 1:
            parser.error(f"{flag} {spec}: after pca: comes the number of components, e.g. pca:50.")
    elif not Path(spec).is_file():
        parser.error(
            f"{flag} {spec} is neither raw, pca:N nor an existing checkpoint file (the best.pt of "
            "a VGG or ResNet trained here)."
        )


# ---------------------------------------------------------------------------------------------
# From arguments to objects


def build_layer(args: argparse.Namespace) -> Callable[..., nn.Module]:
    """Return the configured layer, still to be told its channels."""
    options = {name: getattr(args, name) for name in LAYER_FLAGS[args.layer]}
    return partial(LAYERS[args.layer], **options)


def build_data(args: argparse.Namespace, model_type: type[nn.Module]) -> Data:
    """Load the dataset with its splits."""
    task = DATASETS[args.dataset].task
    if task == "denoising":
        options: dict[str, Any] = {
            "train_dirs": None if args.test_only else args.train_dir,
            "test_dirs": args.test_dir,
            "color": args.color,
            "sigma": args.sigma,
            "crop_size": args.crop_size,
            "repeat": args.crops_per_image,
        }
    elif task == "approximation":
        options = {"image_path": args.image_path}
    elif task == "language":
        options = {
            "text_path": args.text_path,
            "test_text_path": args.test_text_path,
            "num_features": args.num_features,
            "encoding": args.text_encoding,
            "decay": args.text_decay,
        }
    else:
        options = {
            "data_path": args.data_path,
            "resize": args.resize,
            "min_side": model_type.min_input_size,
            "augment": args.augment and model_type.training != "memory",
            "noise": args.noise,
            "normalize": model_type.training == "gradient",
        }
    data = load_data(args.dataset, seed=args.seed, **options)
    data.train, data.test = limit(data.train, args.limit_train), limit(data.test, args.limit_test)
    if args.val_split > 0:
        data = split_train(data, args.val_split, args.seed)
    return data


def with_features(
    args: argparse.Namespace, spec: str, model_type: type[nn.Module], device: torch.device
) -> Data:
    """Load classification data in which every sample is replaced by its features.

    Args:
        args: The arguments.
        spec: "raw", "pca:N", or the checkpoint of a network trained here.
        model_type: The model that will see the features.
        device: Where features are computed.
    """
    if spec == "raw":
        return build_data(args, model_type)
    if spec.startswith("pca:"):
        flat = encode_data(build_data(args, model_type), partial(torch.flatten, start_dim=1))
        pca = PCA.fit(flat.train.features, int(spec.removeprefix("pca:")))
        return encode_data(flat, pca)
    checkpoint = load_checkpoint(spec)
    stored = argparse.Namespace(**(vars(args) | checkpoint["args"]))
    source = model_class(stored.model)
    if source.training != "gradient" or "classification" not in source.tasks:
        raise DataError(f"{spec} holds a {stored.model}, which is no VGG or ResNet.")
    mine = argparse.Namespace(**(vars(args) | {"resize": args.resize or stored.resize}))
    data = build_data(mine, source)  # normalised and sized as that network wants it
    classifier = [v for k, v in checkpoint["model"].items() if k.startswith("classifier")]
    num_classes = classifier[-1].shape[0]
    network = build_model(stored, source, replace(data, num_outputs=num_classes))
    try:
        load_weights(network, checkpoint)
    except ValueError as error:
        raise DataError(f"{spec} does not fit --dataset {args.dataset}: {error}") from error
    network.to(device).eval()
    features = encode_data(data, partial(penultimate_features, network), device=device)
    features.notes.append(
        f"Features: {features.sample_shape[0]} numbers a sample from the {stored.model} in {spec}."
    )
    return features


def build_model(args: argparse.Namespace, model_type: type[nn.Module], data: Data) -> nn.Module:
    """Build the network for the data's shape."""
    if data.task == "denoising":
        steps = 0
        if data.train is not None:
            steps = args.num_epochs * -(-len(data.train) // args.batch_size)
        return build_denoiser(args, data.sample_shape[0], steps)
    if args.model == "knn":
        return build_classifier(args)
    options = {name: getattr(args, name) for name in MODEL_FLAGS.get(args.model, ())}
    if args.model == "dynamic":
        outputs = "num_outputs" if data.task == "approximation" else "num_classes"
        return MODELS[args.model](
            num_inputs=math.prod(data.sample_shape),
            num_passes=args.num_epochs,
            batch_size=args.batch_size,
            **{outputs: data.num_outputs},
            **options,
        )
    if model_type.uses_layer:
        options["layer"] = build_layer(args)
    if data.task == "classification":
        options |= {"in_channels": data.sample_shape[0], "num_classes": data.num_outputs}
    return MODELS[args.model](**options)


def build_classifier(args: argparse.Namespace) -> nn.Module:
    """Build a K-nearest-neighbor classifier without samples."""
    return MODELS["knn"](
        K=args.K, metric=args.magnitude_type, vote=args.vote, precision=args.knn_precision
    )


def build_denoiser(args: argparse.Namespace, channels: int, steps: int = 0) -> nn.Module:
    """Build a DnCNN or N3Net.

    Args:
        args: The arguments.
        channels: Channels of the images.
        steps: Training steps of the run, which decide on --bn_momentum if it is not given.
    """
    options = {name: getattr(args, name) for name in MODEL_FLAGS[args.model]}
    if options["bn_momentum"] is None:
        options["bn_momentum"] = min(0.1, max(0.001, 20 / steps)) if steps else 0.001
    # The published convolutions have no bias before a batch norm, which --layer Conv2d does.
    if args.layer != "Conv2d" or args.kernel_size != 3:
        options["layer"] = build_layer(args)
    return MODELS[args.model](in_channels=channels, **options)


def build_task(args: argparse.Namespace, model_type: type[nn.Module], data: Data) -> Task:
    """Build the task that the dataset names."""
    if data.task == "denoising":
        return DenoisingTask(args.loss_reduction, args.loss_scale, tiled_prediction(args))
    if data.task == "approximation":
        return ApproximationTask(args.tolerance)
    if data.task == "language":
        return LanguageTask(data.num_outputs)
    criterion = args.criterion if model_type.training == "gradient" else None
    return ClassificationTask(data.num_outputs, criterion)


def tile_overlap(args: argparse.Namespace) -> int:
    """Return --tile_overlap, or its default for the size of the tiles."""
    return min(64, args.tile // 2) if args.tile_overlap is None else args.tile_overlap


def tiled_prediction(args: argparse.Namespace) -> Callable[..., torch.Tensor] | None:
    """Return how --tile runs a denoiser, or None for whole images."""
    if not args.tile:
        return None
    return partial(forward_in_tiles, tile=args.tile, overlap=tile_overlap(args))


def build_trainer(
    args: argparse.Namespace,
    model_type: type[nn.Module],
    model: nn.Module,
    task: Task,
    device: torch.device,
) -> Trainer:
    """Build how the model learns."""
    if model_type.training == "growth":
        return GrowthTrainer(model, task, device=device)
    optimizer = build_optimizer(
        model,
        args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        decay_bias=args.decay_bias,
    )
    scheduler = build_scheduler(
        optimizer,
        args.scheduler,
        num_epochs=args.num_epochs,
        lr_step=args.lr_step,
        lr_gamma=args.lr_gamma,
        lr_final=args.lr_final,
    )
    return GradientTrainer(
        model,
        task,
        optimizer,
        scheduler,
        device=device,
        amp=args.use_amp,
        clip_grad_norm=args.clip_grad_norm,
    )


def compile_model(model: nn.Module, mode: str) -> None:
    """Compile in place, so that parameter names stay as they are."""
    if mode != "reduce-memory":
        model.compile(mode=mode)
        return
    known = torch._inductor.list_options()
    wanted = {"memory_planning": True, "reorder_for_peak_memory": True}
    model.compile(options={k: v for k, v in wanted.items() if k in known})


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return all arguments in types that a checkpoint can hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


# ---------------------------------------------------------------------------------------------
# The run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line.

    Args:
        argv: Flags; None takes those of the process.

    Returns:
        The run's results: ``output_dir``, and the metrics of what was done.

    Raises:
        SystemExit: With code 2 for bad input, 1 for a failed and 130 for an interrupted run.
    """
    parser = build_parser()
    args, given, checkpoint = parse_arguments(parser, argv)
    args.device = resolve_device(parser, args.device, "device" in given)
    check_arguments(parser, args, given)
    model_type, device = model_class(args.model), torch.device(args.device)

    seed_everything(args.seed)
    weights = None
    if args.pretrained and checkpoint is None:
        weights, _ = read_weights(args.pretrained)
    if args.input:
        return denoise_file(parser, args, device, checkpoint, weights)
    try:
        features = {"dynamic": args.dynamic_features, "knn": args.knn_features}
        spec = features.get(args.model, "raw")
        data = with_features(args, spec, model_type, device)
        model = build_model(args, model_type, data).to(device)
        model_text = probe(model, model_type, data, device)
        if checkpoint is not None:
            load_weights(model, checkpoint)
        if weights is not None:
            load_pretrained(model, weights)
    except ValueError as error:  # DataError, and what layers and models refuse
        parser.error(str(error))
    for note in data.notes:
        print(note)
    if args.use_compiled:
        compile_model(model, args.compile_mode)
    task = build_task(args, model_type, data)
    run = RunFolder(args.output_dir)
    command = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if model_type.training == "memory":
            try:
                if args.test_only:
                    return test(args, data, model, task, device, run, checkpoint)
                return classify(args, data, model, task, device, run, command)
            except ValueError as error:  # fewer samples than --K, or of another size
                parser.error(f"--model knn: {error}")
        if args.test_only:
            return test(args, data, model, task, device, run, checkpoint)
        trainer = build_trainer(args, model_type, model, task, device)
        if args.dry_run:
            return dry_run(args, data, trainer, task, device)
        return train(args, data, trainer, task, device, run, checkpoint, command, model_text)
    except (TrainingError, DataError) as error:
        print(f"error: {error}{resume_hint(run)}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print(f"\nInterrupted.{resume_hint(run)}", file=sys.stderr)
        raise SystemExit(130) from error


def describe_run(command: str) -> str:
    """Return the comment lines above the arguments in args.txt."""
    return (
        f"# {command}\n"
        f"# torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"neighbor kernels {native.status().splitlines()[0]}\n"
    )


def resume_hint(run: RunFolder) -> str:
    """Say what is saved and how to go on."""
    if not (run.path / run.LAST).exists():
        return " Nothing was saved yet."
    return (
        f" The last finished epoch is in {run.path / run.LAST}; go on with: "
        f"python main.py --resume --output_dir {shlex.quote(str(run.path))}"
    )


def probe(model: nn.Module, model_type: type[nn.Module], data: Data, device: torch.device) -> str:
    """Describe the model by a forward pass of a blank sample: shapes that cannot work fail here."""
    if model_type.training != "gradient":
        return f"{model}\n"
    return describe_model(model, torch.zeros(1, *data.sample_shape, device=device))


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights; a mismatch becomes a ValueError that lists the names."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error


def loader_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what all loaders share."""
    batch_size = args.batch_size
    if args.model == "dynamic":  # the network goes over it batch by batch
        batch_size *= max(1, 1024 // batch_size)
    return {
        "batch_size": batch_size,
        "seed": args.seed,
        "num_workers": args.num_workers,
        "pin_memory": device.type == "cuda",
    }


def train(
    args: argparse.Namespace,
    data: Data,
    trainer: Trainer,
    task: Task,
    device: torch.device,
    run: RunFolder,
    checkpoint: Mapping[str, Any] | None,
    command: str,
    model_text: str,
) -> dict[str, Any]:
    """Train, and evaluate every epoch."""
    arguments = plain_arguments(args)
    options = loader_options(args, device)
    balanced = args.batch_size if args.model == "dynamic" and args.balanced_first_batch else 0
    train_loader = build_loader(data.train, shuffle=True, balanced=balanced, **options)
    train_eval_loader = None
    if args.model == "dynamic" and args.eval_train and data.train is not data.test:
        train_eval_loader = build_loader(data.train, **options)
    num_epochs = getattr(trainer.model, "num_stages", args.num_epochs)
    eval_loader = build_loader(data.val or data.test, **options)
    seed_everything(args.seed)
    progress = Progress() if checkpoint is None else restore(trainer, checkpoint)
    if progress.epoch >= num_epochs:
        print(f"Epoch {progress.epoch} of {num_epochs} is done: nothing to resume.")
    run.start(describe_run(command) + format_args(arguments), model_text, progress)
    print(f"Run folder: {run.path}")
    eval_name = "test" if data.val is None else "val"
    fit(
        trainer,
        task,
        train_loader,
        eval_loader,
        run,
        progress,
        num_epochs=num_epochs,
        args=arguments,
        device=device,
        amp=args.use_amp,
        eval_name=eval_name,
        train_eval_loader=train_eval_loader,
    )
    results = {
        "output_dir": str(run.path),
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best": progress.best_value,
    }
    if data.val is None:
        run.write_line(
            "The best epoch was chosen on the test set, as in the published runs; "
            "--val_split chooses it on held-out training data."
        )
    else:
        load_weights(trainer.model, load_checkpoint(run.path / run.BEST))
        results["test"] = evaluate(
            trainer.model,
            task,
            build_loader(data.test, **options),
            device=device,
            amp=args.use_amp,
        )
        run.write_line(
            f"The best epoch was chosen on {len(data.val)} held-out training samples. "
            f"[Test at Epoch {progress.best_epoch}] {task.line(results['test'])}"
        )
    if args.save_images and data.task == "denoising":
        load_weights(trainer.model, load_checkpoint(run.path / run.BEST))
        results["test"], lines = examine(args, data, trainer.model, task, device, run)
        for line in (f"Test images with the weights of epoch {progress.best_epoch}:", *lines):
            run.write_line(line)
    if args.model == "dynamic":
        finish_growth(args, data, trainer.model, task, device, run, results)
    return results


def classify(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    task: Task,
    device: torch.device,
    run: RunFolder,
    command: str,
) -> dict[str, Any]:
    """Store the training set, classify by K nearest neighbors, and choose among several K.

    Under torchrun every process stores its part of the training set, and the first one writes.
    """
    distributed = world_size() > 1 and not dist.is_initialized()
    if distributed:
        dist.init_process_group("gloo")
    leader = not dist.is_initialized() or dist.get_rank() == 0
    try:
        options = loader_options(args, device)
        limits = {"test": data.test, "val": data.val}
        train = data.train
        if args.dry_run:
            train = limit(train, 2 * args.batch_size)
            limits = {name: limit(part, 2 * args.batch_size) for name, part in limits.items()}
        start = time.perf_counter()
        batches = build_loader(train, **options)
        model.fit_batches(batches, data.num_outputs, shard=world_size() > 1).to(device)
        seconds = time.perf_counter() - start
        if leader and not args.dry_run:
            run.start(
                describe_run(command) + format_args(plain_arguments(args)), f"{model}\n", Progress()
            )
            print(f"Run folder: {run.path}")

        reports: dict[str, NeighborReport] = {}
        if limits["val"] is not None:
            loader = build_loader(limits["val"], **options)
            reports["val"] = evaluate_neighbors(model, loader, device=device)
        if args.leave_one_out:
            own = [(None, model.labels)]
            reports["leave-one-out"] = evaluate_neighbors(model, own, device=device)
        loader = build_loader(limits["test"], **options)
        reports["test"] = evaluate_neighbors(model, loader, device=device)

        judge = next(iter(reports))  # the test set only if there is nothing else
        accuracy = {K: reports[judge].metrics[K]["top1"] for K in model.K}
        model.chosen = max(model.K, key=lambda K: (accuracy[K], -K))
        lines = neighbor_lines(model, task, reports)
        lines[0] = f"Stored {len(model.labels)} training samples in {seconds:.4f}s. {lines[0]}"
        lines.append(f"Max Accuracy: {accuracy[model.chosen]:.4f}% at K {model.chosen}")
        if len(model.K) > 1:
            chosen_on = {
                "val": f"on {len(reports[judge].labels)} held-out training samples",
                "leave-one-out": "by leaving out one training sample at a time",
                "test": "on the test set, as in published tables; --val_split or --leave_one_out "
                "choose it on training data",
            }
            lines.append(f"K was chosen {chosen_on[judge]}.")
        result = reports["test"].metrics[model.chosen]
        results: dict[str, Any] = {
            "output_dir": str(run.path),
            "K": model.chosen,
            "test": result,
            "accuracy": {K: row["top1"] for K, row in reports["test"].metrics.items()},
            "queries_per_second": reports["test"].queries_per_second,
        }
        if args.dry_run:
            print(*lines, sep="\n")
            return results | {"output_dir": None}
        if leader:
            record_neighbors(args, data, model, reports, run, lines)
        return results
    finally:
        if distributed:
            dist.destroy_process_group()


def neighbor_lines(
    model: nn.Module, task: Task, reports: Mapping[str, NeighborReport]
) -> list[str]:
    """Word what K-nearest-neighbor classification measured: speed, then a line for every K."""
    test = reports["test"]
    lines = [
        f"Classified {len(test.labels)} test samples in {test.seconds:.4f}s "
        f"({test.queries_per_second:.0f} queries/s; {model.metric}, {model.vote} vote; "
        f"{model.search_path}; K up to {max(model.K)} from one search)."
    ]
    for K in model.K:
        parts = [
            f"[{name.capitalize()}] {task.line(report.metrics[K])}"
            for name, report in reports.items()
        ]
        lines.append(f"[K {K:03d}] " + " | ".join(parts))
    return lines


def record_neighbors(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    reports: Mapping[str, NeighborReport],
    run: RunFolder,
    lines: Sequence[str],
) -> None:
    """Write what :func:`classify` found: results, table, checkpoint and pictures."""
    for line in lines:
        run.write_line(line)
    for K in model.K:
        row: dict[str, float] = {"K": K}
        for name, report in reports.items():
            prefix = name.replace("-", "_")
            row |= {f"{prefix}_{metric}": value for metric, value in report.metrics[K].items()}
        run.metrics.append(row)
    for name, report in reports.items():
        run.timing.append(
            {
                "set": name,
                "queries": len(report.labels),
                "seconds": report.seconds,
                "queries_per_second": report.queries_per_second,
            }
        )
    if model.sharded:
        run.write_line("No checkpoint: every process holds its own part of the samples.")
    else:
        accuracy = reports["test"].metrics[model.chosen]["top1"]
        progress = Progress(epoch=1, best_epoch=1, best_value=accuracy)
        checkpoint = {
            "format": 1,
            "model": model.state_dict(),
            "trainer": {},
            "progress": vars(progress),
            "random_state": get_random_state(),
            "args": plain_arguments(args),
        }
        run.save(checkpoint, best=True)
    show_neighbors(args, data, model, reports["test"], run)


def show_neighbors(
    args: argparse.Namespace, data: Data, model: nn.Module, report: NeighborReport, run: RunFolder
) -> None:
    """Draw the confusion matrix, and some queries with their neighbors: right ones and wrong."""
    run.path.mkdir(parents=True, exist_ok=True)
    K, names = model.chosen, data.class_names or tuple(map(str, range(data.num_outputs)))
    plot_confusion(report.confusion(K, data.num_outputs), names, run.path / "confusion.png")
    if args.knn_features != "raw":  # the same samples as pictures
        data = build_data(args, model_class(args.model))
    if len(data.sample_shape) != 3:
        return
    predictions = report.predictions[K]
    right = predictions == report.labels
    chosen = [part.nonzero().flatten()[:5].tolist() for part in (right, ~right)]
    rows = []
    for query in chosen[0] + chosen[1]:
        image, label = data.test[query]
        row = [(image, f"{names[int(label)]}", None)]
        for neighbor in report.indices[query, :8].tolist():
            image, other = data.train[neighbor]
            row.append((image, names[int(other)], int(other) == int(label)))
        rows.append(row)
    plot_neighbors(rows, run.path / "neighbors.png")


def finish_growth(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    task: Task,
    device: torch.device,
    run: RunFolder,
    results: dict[str, Any],
) -> None:
    """Show what a growing network has learnt, and prune it if that was asked for."""
    results["centers"] = [layer.num_centers for layer in model.layers]
    if args.prune:
        loader = build_loader(data.train, **loader_options(args, device))
        batches = [task.prepare(batch, device) for batch in loader]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        before, after = model.prune(x.flatten(1), y)
        loader = build_loader(data.test, **loader_options(args, device))
        measured = evaluate(model, task, loader, device=device)
        run.write_line(
            f"Pruned: {before} -> {after} centers ({100 * after / before:.1f}%) that predict every "
            f"training sample the same. [Test] {task.line(measured)}"
        )
        pruned = dict(load_checkpoint(run.path / run.LAST), model=model.state_dict())
        save_checkpoint(run.path / "pruned.pt", pruned)
        results |= {"pruned": after, "pruned_test": measured}
    for line in show_growth(args, data, model, device, run, results):
        run.write_line(line)


def show_growth(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    device: torch.device,
    run: RunFolder,
    results: dict[str, Any],
) -> list[str]:
    """Draw a learnt picture, or go on with a text; return lines for the results file."""
    run.path.mkdir(parents=True, exist_ok=True)
    if data.task == "approximation":
        image, positions = data.extra["image"], data.extra["positions"]
        parts = [model(part.to(device)).cpu() for part in positions.split(4096)]
        learnt = torch.cat(parts).t().reshape(image.shape).clamp(0, 1)
        layer = model.layers[0]
        centers = torch.ones_like(image)
        row, column = layer.centers.long().cpu().unbind(1)
        centers[:, row, column] = layer.targets.t().cpu()
        share = 100 * layer.num_centers / len(positions)
        quality = mse_to_psnr((learnt - image).square().mean().item())
        panels = {
            "picture": image,
            f"{layer.num_centers} centers ({share:.1f}%)": centers,
            f"reconstruction {quality:.2f} dB": learnt,
        }
        save_panels(run.path / "image.png", panels)
        results |= {"psnr": quality, "share": share}
        return [
            f"{layer.num_centers} centers, {share:.2f}% of {len(positions)} pixels; PSNR of the "
            f"picture {quality:.4f} dB; see image.png."
        ]
    if data.task == "language" and args.text_prompt is not None:
        text = generate_text(
            model,
            data.extra["encoder"],
            args.text_prompt,
            args.text_prediction_length,
            temperature=args.text_temperature,
            seed=args.seed,
            device=device,
        )
        write_text(run.path / "generated.txt", text)
        results["generated"] = text
        return [f"Generated: {text!r}"]
    return []


def examine(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    task: Task,
    device: torch.device,
    run: RunFolder,
) -> tuple[dict[str, float], list[str]]:
    """Evaluate on the test set; return metrics, and what else the task has to say of it."""
    loader = build_loader(data.test, **loader_options(args, device))
    options = {"device": device, "amp": args.use_amp}
    if data.task != "denoising":
        if args.model == "knn":
            report = evaluate_neighbors(model, loader, device=device)
            lines = neighbor_lines(model, task, {"test": report})
            show_neighbors(args, data, model, report, run)
            return report.metrics[model.chosen], lines
        metrics = evaluate(model, task, loader, **options)
        if args.model == "dynamic":
            return metrics, show_growth(args, data, model, device, run, {})
        return metrics, []
    base = data.test.dataset if isinstance(data.test, Subset) else data.test
    report = ImageReport(base.names, run.path, pictures=args.save_images)
    metrics = evaluate(model, task, loader, observe=report.add, **options)
    tiles = f"tiles of {args.tile}, overlap {tile_overlap(args)}" if args.tile else "whole images"
    colors = "color" if args.color else "gray"
    protocol = (
        f"Protocol: noise of sigma {args.sigma:g} on the 0-255 scale, seed {args.seed} and "
        f"position in the set; {colors} images in [0, 1], float32, {tiles}, no border cropped; "
        "neither noisy nor denoised images clipped; PSNR and SSIM per image, then averaged; SSIM "
        "with a Gaussian window of 11x11, sigma 1.5, zeros beyond the border."
    )
    return metrics, [protocol, *report.lines()]


def test(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    task: Task,
    device: torch.device,
    run: RunFolder,
    checkpoint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or --pretrained weights, on the test set."""
    metrics, lines = examine(args, data, model, task, device, run)
    if checkpoint is None:
        source = args.pretrained
    else:
        epoch = checkpoint.get("progress", {}).get("epoch", "?")
        source = f"{args.checkpoint or run.path / run.BEST} (epoch {epoch})"
    text = (
        f"Checkpoint: {source}\n"
        f"Data: {args.dataset}, {len(data.test)} test samples\n"
        + "".join(f"{line}\n" for line in lines)
        + f"[Test] {task.line(metrics)}\n"
    )
    print(text, end="")
    run.path.mkdir(parents=True, exist_ok=True)
    path = run.path / run.TEST
    before = path.read_text(encoding="utf-8") + "\n" if path.exists() else ""
    write_text(path, before + text)
    return {"output_dir": str(run.path), "test": metrics}


def denoise_file(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Denoise --input into --output; no noise is added."""
    from PIL import Image

    model = build_denoiser(args, 3 if args.color else 1).to(device).eval()
    try:
        load_pretrained(model, checkpoint["model"] if weights is None else weights)
        image, converted = read_image(args.input, args.color)
    except ValueError as error:
        parser.error(f"--input {args.input}: {error}")
    if converted:
        print(f"{args.input} is converted to {'color' if args.color else 'gray'}.")
    task = DenoisingTask(predict=tiled_prediction(args))
    try:
        with torch.no_grad():
            out = task.predict(model, image[None].to(device).float() / 255)[0]
    except ValueError as error:  # too small for the window, say
        parser.error(f"--input {args.input}: {error}")
    pixels = (out.clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(args.output) as temporary:
            Image.fromarray(pixels if args.color else pixels[:, :, 0]).save(temporary)
    except ValueError as error:  # a suffix that names no format
        parser.error(f"--output {args.output}: {error}")
    print(f"Denoised {args.input} ({image.shape[1]}x{image.shape[2]}) into {args.output}.")
    return {"output_dir": None, "output": args.output}


def dry_run(
    args: argparse.Namespace, data: Data, trainer: Trainer, task: Task, device: torch.device
) -> dict[str, Any]:
    """Take two steps and evaluate two batches; write nothing."""
    options = loader_options(args, device)
    loader = build_loader(data.train, shuffle=True, **options)
    trained = train_one_epoch(trainer, loader, epoch=1, max_steps=2)
    loader = build_loader(data.val or data.test, **options)
    measured = evaluate(trainer.model, task, loader, device=device, amp=args.use_amp, max_batches=2)
    print(f"[Dry run, two steps] {task.line(trained)}")
    print(f"[Dry run, two batches] {task.line(measured)}")
    return {"output_dir": None, "train": trained, "test": measured}


if __name__ == "__main__":
    main()
