"""Processes on loopback for the tests: started once per file, every scenario runs in them one after the other.

Four processes form the default group. Cut in two halves they are also two worlds of two processes, which train the
same thing at the same time, so that one start serves both sizes.
"""

import contextlib
import importlib.util
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from curvopt import GritKFAC

SIZES = (2, 4)
WAIT = 600  # seconds after which something has hung


class World:
    """What one process needs to know of its world of ``size`` processes."""

    def __init__(self, everybody: DeviceMesh, size: int) -> None:
        self.size = size
        self.mesh = everybody["half"] if size == 2 else init_device_mesh("cpu", (4,))
        self.group = self.mesh.get_group()
        self.statistics = self.group if size == 2 else None  # the default group is the other way to say it
        self.rank = dist.get_rank(self.group)


def _enter(file: str, name: str, rank: int, folder: str, args: tuple[Any, ...]) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)  # test files are in no package
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job = getattr(module, name)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    try:
        everybody = init_device_mesh("cpu", (2, 2), mesh_dim_names=("world", "half"))
        result = job({size: World(everybody, size) for size in SIZES}, everybody, *args)
        torch.save(result, f"{folder}/{rank}.pt")
    except BaseException:  # pytest's failures are no Exceptions
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def run(job: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return what ``job(worlds, mesh, *args)`` returns in each of four processes; fail with the first traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers"])  # imported once, not four times
    folder.mkdir(parents=True, exist_ok=True)
    what = (job.__code__.co_filename, job.__name__)
    started = [context.Process(target=_enter, args=(*what, rank, str(folder), args)) for rank in range(4)]
    for process in started:
        process.start()
    deadline = time.monotonic() + WAIT
    try:
        while any(p.is_alive() for p in started) and not list(folder.glob("*.error")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job.__name__} has not ended after {WAIT} s")
            for process in started:
                process.join(0.05)
    finally:
        for process in started:
            process.kill()
            process.join()
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)  # the others lost a peer
    if errors:
        raise RuntimeError(f"process {errors[0].stem}: {errors[0].read_text(encoding='utf-8')}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


# ---------------------------------------------------------------------------------------------- wrapping


def whole(t: Any) -> Any:
    """Return all of a DTensor in every process; anything else as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def placed(value: Tensor, p: Tensor) -> Tensor:
    """Return a tensor, the same in every process, sharded as a parameter is; as it is for a plain one."""
    return distribute_tensor(value, p.device_mesh, p.placements) if hasattr(p, "placements") else value


def shard(model: nn.Module, mesh: DeviceMesh, **kwargs: Any) -> nn.Module:
    """Put FSDP2 on a model: each block is a unit of its own, the rest is another."""
    blocks = [m for m in model.modules() if isinstance(m, models.LoraLinear) or type(m).__name__ == "LlamaDecoderLayer"]
    for block in blocks if len(blocks) > 1 else []:
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def ddp(model: nn.Module, world: World) -> DistributedDataParallel:
    """Put DDP on a model, some of whose layers are never called."""
    return DistributedDataParallel(model, process_group=world.group, find_unused_parameters=True)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Return `models.snapshot` with every tensor whole and every name as without wrappers."""
    found = models.snapshot(model, optimizer)
    return {name.removeprefix("module."): whole(t) for name, t in found.items()}


# ---------------------------------------------------------------------------------------------- batches


def loss(model: nn.Module, i: int, rank: int = 0, size: int = 1, cuts: tuple[int, ...] | None = None) -> Tensor:
    """Return the loss of process ``rank`` on its share of the rows of batch i; of one process on all of them.

    Args:
        model: one of `models`, wrapped or not.
        i: number of the batch.
        rank: the process.
        size: how many there are.
        cuts: rows of each process; None for equal shares of eight.
    """
    inner = getattr(model, "module", model)
    cuts = cuts or (8 // size,) * size
    rows = slice(sum(cuts[:rank]), sum(cuts[: rank + 1]))
    if hasattr(inner, "peft_config"):
        ids = models.llama_ids(i, sum(cuts))[rows]
        return model(input_ids=ids, labels=ids).loss
    if isinstance(inner, models.Mixed):
        ids = torch.randint(20, (sum(cuts), 16), generator=torch.Generator().manual_seed(3000 + i))[rows]
        return nn.functional.cross_entropy(model(ids), ids[:, 0] % 4)
    x, y = models.batch(inner, i, sum(cuts))
    return nn.functional.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten())


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *share: Any) -> None:
    """Train on the batches ``steps``, each process on its share."""
    for i in steps:
        optimizer.zero_grad()
        loss(model, i, *share).backward()
        optimizer.step()


@contextlib.contextmanager
def counted(monkeypatch: Any) -> Any:
    """Count, by the name of the collective, the bytes that this process hands to ``torch.distributed`` to send."""
    sent = {"all_reduce": 0, "all_to_all_single": 0}
    reduce, exchange = dist.all_reduce, dist.all_to_all_single

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["all_reduce"] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = args[1][dist.get_rank(kwargs["group"])]
        sent["all_to_all_single"] += (input.numel() - own) * input.element_size()
        return exchange(output, input, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_to_all_single", all_to_all_single)
        yield sent


# ---------------------------------------------------------------------------------------------- what is sharded

# masks fall, grow back, and everything changes its basis within a dozen steps
ALL = {"factor_every": 1, "inverse_every": 3, "reproject_every": 4, "rank_threshold": 0.9, "min_rank": 1,
       "weight_decay": 0.1}  # fmt: skip


def odd(dtype):
    """A rank that four processes cannot share equally, and a width that they cannot either."""
    return models.mlp(dtype, width=10, r=6)


def odd32():
    return odd(torch.float32)


def odd64():
    return odd(torch.float64)


def grit(params, **kwargs):
    return GritKFAC(params, lr=3e-3, **kwargs)


def made(build, kwargs, before, wrap):
    """Return a model and an optimizer of it, sharded by ``wrap`` in between or first."""
    model = build()
    if not before:
        wrap(model)
    optimizer = grit(model, **kwargs)
    if before:
        wrap(model)
    return model, optimizer


def plain(world, build, **kwargs):
    """Return a sharded model and its optimizer."""
    kwargs["process_group"] = world.statistics
    return made(build, kwargs, False, lambda model: shard(model, world.mesh))


def bytes_by_step(model, optimizer, world, patch):
    """Return what each of four steps on this process's share of the batches sent."""
    counts = []
    for i in range(4):
        optimizer.zero_grad()
        loss(model, i, world.rank, world.size).backward()
        with counted(patch) as sent:
            optimizer.step()
        counts.append(sum(sent.values()))
    return counts


def assert_agree_to_the_bit(found, scenarios):
    """Assert of every (scenario, size) among what processes found that the first ``size`` of them have one snapshot."""
    runs = [key for key in found[0] if key[0] in scenarios]
    assert runs
    for key in runs:
        for process in found[1 : key[1]]:
            models.assert_same(found[0][key][0], process[key][0])
