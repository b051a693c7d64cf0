"""Several processes that share one run: who writes, who gets which batches, what is summed.

The processes are those of torchrun. Without it every function here answers for one process, and
costs nothing.

Symbols: N processes ("ranks"), B samples in a step over all of them.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import BatchSampler, DataLoader, Sampler

__all__ = [
    "Crew",
    "Shares",
    "SyncedBatchNorm",
    "Totals",
    "agree",
    "broadcast_module",
    "broadcast_object",
    "distributed",
    "every_nth_batch",
    "gather",
    "in_agreement",
    "in_parts",
    "initialised",
    "is_part",
    "leave_together",
    "left_alone",
    "own_part",
    "part_like",
    "rank",
    "shard_parameters",
    "share_batches",
    "synchronise_norms",
    "whole",
    "world_size",
]


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialised() -> bool:
    """Say whether this process has joined others."""
    return dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


@contextlib.contextmanager
def distributed(device: str) -> Iterator[bool]:
    """Join the processes that torchrun started; yield whether this one writes files.

    Args:
        device: "cuda" lets every process take a card of its own, and speak by NCCL.

    Raises:
        ValueError: If there are more processes than cards.
    """
    joins = world_size() > 1 and not dist.is_initialized()
    if joins:
        if device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"torchrun started more processes on this machine than it has CUDA devices "
                    f"({torch.cuda.device_count()}): lower --nproc_per_node, or add --device cpu."
                )
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield rank() == 0
        if joins:
            dist.barrier()  # nobody leaves while others still speak
    finally:
        if joins and dist.is_initialized():
            dist.destroy_process_group()


def left_alone(error: RuntimeError) -> bool:
    """Say whether an error means that another process has ended, or does not answer."""
    signs = ("gloo", "NCCL", "Connection", "peer", "Timed out", "timed out")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def leave_together() -> None:
    """End a process of several that has done its work.

    The threads of gloo may still run when the interpreter ends in its ordinary way, and end it by
    an abort: torchrun would call the run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---------------------------------------------------------------------------------------------
# Agreeing


def gather(item: Any) -> list[Any]:
    """Return what every process passed, in their order."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Any) -> Any:
    """Return what the first process passed."""
    if not dist.is_initialized():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(number: int | None) -> int | None:
    """Return the largest number that any process passed; None if all passed None."""
    if not dist.is_initialized():
        return number
    box = torch.tensor([-1 if number is None else number])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return None if box.item() < 0 else int(box)


@contextlib.contextmanager
def in_agreement() -> Iterator[None]:
    """End all processes if one of them fails in this block; its message is shown once.

    What other processes than the first one print is not shown.

    Raises:
        SystemExit: With the code of the first process that failed.
    """
    if not dist.is_initialized():
        yield
        return
    said, failure = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        failure = (stop.code, said.getvalue())
    outcomes = gather(failure)
    failed = [(number, outcome) for number, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        if rank() == 0:
            sys.stderr.write(said.getvalue())
        return
    number, (code, text) = failed[0]
    if rank() == 0:
        sys.stderr.write(text if number == 0 else f"process {number}: {text}")
        sys.stderr.flush()
    gather(None)  # torchrun ends the others as soon as one ends: let the message out first
    raise SystemExit(code)


@torch.no_grad()
def broadcast_module(module: nn.Module, *, buffers_only: bool = False) -> None:
    """Give a module the values it has in the first process."""
    if not dist.is_initialized():
        return
    for tensor in [*([] if buffers_only else module.parameters()), *module.buffers()]:
        dist.broadcast(tensor, src=0)


# ---------------------------------------------------------------------------------------------
# Batches


class Shares:
    """Which part of every batch is this process's.

    A batch of B samples is the one that a single process would see; the processes take runs of
    equal length of it, the first ones one sample more where it does not divide. A process that gets
    none is handed the first sample of the batch, which does not count.

    Args:
        num_samples: Samples in an epoch.
        batch_size: B.
        whole: Whether the loader hands over whole batches, still to be cut.
    """

    def __init__(self, num_samples: int, batch_size: int, *, whole: bool) -> None:
        self.num_samples, self.batch_size, self.whole = num_samples, batch_size, whole

    def bounds(self, count: int) -> tuple[int, int]:
        """Return where this process's part of a batch of `count` samples begins and ends."""
        number, of = rank(), world_size()
        each, more = divmod(count, of)
        begin = number * each + min(number, more)
        return begin, begin + each + (number < more)

    def share(self, index: int) -> tuple[int, int, int]:
        """Return begin and end of this process's part of batch number `index`, and its size."""
        count = min(self.batch_size, self.num_samples - index * self.batch_size)
        return (*self.bounds(count), count)


class _ShardedBatches(Sampler):
    def __init__(self, sampler: Sampler, shares: Shares) -> None:
        self.sampler, self.shares = sampler, shares

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.shares.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in BatchSampler(self.sampler, self.shares.batch_size, drop_last=False):
            begin, end = self.shares.bounds(len(batch))
            yield batch[begin:end] or batch[:1]


class _EveryNth(Sampler):
    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(range(rank(), len(self.batches), world_size()))

    def __iter__(self) -> Iterator[list[int]]:
        for index, batch in enumerate(self.batches):
            if index % world_size() == rank():
                yield batch


def _with_batches(loader: DataLoader, batches: Sampler) -> DataLoader:
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )


def share_batches(loader: DataLoader) -> tuple[DataLoader, Shares | None]:
    """Return a loader for this process, and what part of its batches counts; None: all of it.

    What is loaded in this very process is loaded whole, with the same random numbers everywhere,
    and cut afterwards: augmentation and noise are then those of a single process. Where loading has
    processes of its own, every rank loads its part alone.
    """
    if not dist.is_initialized():
        return loader, None
    whole = loader.num_workers == 0
    shares = Shares(len(loader.sampler), loader.batch_size, whole=whole)
    if whole:
        return loader, shares
    return _with_batches(loader, _ShardedBatches(loader.sampler, shares)), shares


def every_nth_batch(loader: DataLoader) -> DataLoader:
    """Return a loader of whole batches, every Nth for this process; the same if it is alone."""
    return _with_batches(loader, _EveryNth(loader.batch_sampler))


# ---------------------------------------------------------------------------------------------
# Rows


class Crew:
    """Chunks of rows, each worked on by one process and known to all of them afterwards."""

    def mine(self, chunks: list[slice]) -> list[slice]:
        """Return the chunks that are this process's: every Nth."""
        return chunks[rank() :: world_size()]

    def complete(self, rows: Tensor, chunks: list[slice]) -> None:
        """Fill in, in place, the rows that other processes have worked on."""
        for number, chunk in enumerate(chunks):
            part = rows[chunk].contiguous()
            dist.broadcast(part, src=number % world_size())
            rows[chunk] = part


# ---------------------------------------------------------------------------------------------
# Parameters in parts

_SMALLEST_PART = 1024  # parameters of a module that is gathered by itself


def shard_parameters(model: nn.Module) -> None:
    """Let every process hold a part of each parameter, of its gradient and optimizer states.

    A block of layers is gathered while it runs. This is PyTorch's `fully_shard`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    blocks = [
        child
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for child in parent
        if not isinstance(child, nn.ModuleList | nn.ModuleDict)
        and sum(p.numel() for p in child.parameters()) >= _SMALLEST_PART
    ]
    for block in reversed(list(dict.fromkeys(blocks))):  # inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def in_parts(model: nn.Module) -> bool:
    """Say whether processes hold parts of the parameters: all of them must run it together."""
    return hasattr(model, "set_requires_gradient_sync")


def is_part(value: Tensor) -> bool:
    """Say whether processes hold parts of a tensor."""
    return hasattr(value, "to_local")


def own_part(value: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return value.to_local() if is_part(value) else value


def whole(state: Any) -> Any:
    """Return a state (tensors in dictionaries and lists) with whole tensors; all must ask."""
    if isinstance(state, Tensor) and is_part(state):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor if `like` is in parts, else the tensor."""
    if not is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


# ---------------------------------------------------------------------------------------------
# Batch normalisation over all processes


class _SumOverRanks(torch.autograd.Function):
    """A sum over the processes; so is its gradient, as every process's result depends on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class Totals:
    """Sums over the samples of all processes that count.

    Attributes:
        weighs: Whether this process's samples count; a process without a part of a batch runs a
            sample that does not.
    """

    weighs: bool = True

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes, with gradients."""
        return _SumOverRanks.apply(x if self.weighs else x * 0.0)

    def pool(self, number: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool number, mean and (biased) variance of the processes' values; any shapes, with grads.

        Reference: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances", 1979.
        """
        kind, wide = mean.dtype, torch.float64
        number, mean, variance = number.to(wide), mean.to(wide), variance.to(wide)
        total = self.sum(number.detach())
        middle = self.sum(number * mean) / total
        spread = self.sum(number * (variance + (mean - middle).square())) / total
        return total.to(kind), middle.to(kind), spread.to(kind)


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation · weight + bias by channel; returns mean, variance and number too.

    Sums are taken in float64, as PyTorch's kernel for one process does: they come out the same
    wherever the samples lie.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, totals: Totals):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        local = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        sums = totals.sum(torch.cat((x.double().sum(dims), local)))
        number = sums[-1]
        mean = sums[:-1] / number
        centered = x - mean.to(x.dtype).view(shape)
        variance = totals.sum(centered.double().square().sum(dims)) / number
        inverse = (1 / (variance + eps).sqrt()).to(x.dtype)
        gain = inverse * weight
        shift = bias - mean.to(x.dtype) * gain
        ctx.save_for_backward(x, weight, mean, inverse, number)
        ctx.totals, ctx.dims, ctx.shape = totals, dims, shape
        ctx.mark_non_differentiable(mean, variance, number)
        return torch.addcmul(shift.view(shape), x, gain.view(shape)), mean, variance, number

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):
        x, weight, mean, inverse, number = ctx.saved_tensors
        dims, shape, totals = ctx.dims, ctx.shape, ctx.totals
        centered = x - mean.to(x.dtype).view(shape)
        local = torch.stack((grad.double().sum(dims), (grad * centered).double().sum(dims)))
        of_bias, of_centered = totals.sum(local)
        of_gain = local[1] * inverse
        slope = (of_centered * inverse.double().square() / number).to(x.dtype)
        level = (of_bias / number).to(x.dtype)
        of_x = (grad - level.view(shape)).sub_(centered.mul_(slope.view(shape)))
        of_x.mul_((inverse * weight).view(shape))
        if not totals.weighs:
            of_x.zero_()  # what does not count changes nothing
        return of_x, of_gain.to(weight.dtype), local[0].to(weight.dtype), None, None


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the statistics of all processes' samples, on any device.

    PyTorch's SyncBatchNorm runs on CUDA alone. Names and values in the state dict are those of the
    batch normalisation that it replaces.

    Attributes:
        totals: What it sums with; shared by all norms of a network.
    """

    totals: Totals

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least two dimensions (got {x.dim()})")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) per channel."""
        self._check_input_dim(x)
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        weight = wide.new_ones(x.shape[1]) if self.weight is None else self.weight
        bias = wide.new_zeros(x.shape[1]) if self.bias is None else self.bias
        y, mean, variance, number = _Normalise.apply(wide, weight, bias, self.eps, self.totals)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, variance * (number / (number - 1).clamp_min(1)))
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / float(self.num_batches_tracked)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)


def synchronise_norms(module: nn.Module) -> Totals:
    """Replace batch normalisation by :class:`SyncedBatchNorm`, in place; return what they share.

    A layer that takes statistics of a batch itself says so by an attribute `pool_statistics`, which
    becomes :meth:`Totals.pool`.
    """
    totals = Totals()
    for parent in list(module.modules()):
        if hasattr(parent, "pool_statistics"):
            parent.pool_statistics = totals.pool
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, _synced(child, totals))
    return totals


def _synced(norm: nn.modules.batchnorm._BatchNorm, totals: Totals) -> SyncedBatchNorm:
    synced = SyncedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    synced.weight, synced.bias = norm.weight, norm.bias
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(synced, buffer, getattr(norm, buffer))
    synced.totals = totals
    return synced.train(norm.training)
