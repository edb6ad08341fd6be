"""New weights for a vLLM on other GPUs of the host than the trainer's: vLLM's own transfer by NCCL, and checksums.

The trainer and the workers are one NCCL group, in which the trainer broadcasts whole tensors in the checkpoint's names.
Each worker takes its slices by vLLM's loaders, into the tensors that CUDA graphs read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bi_ops.rollout.vllm_weights import named_as_vllm
from bi_ops.rollout.weight_transfer import checksum, checksums, weighted_sum

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

#: vLLM's weight_transfer_config.
CONFIG = {"backend": "nccl"}

#: Seconds that workers have to join, and to take new weights, before they count as lost.
TIMEOUT = 300.0
#: vLLM's names for packs of at least so many bytes, one at a time. With several in flight releases before 0.33 do not
#: order the streams: a layer in two packs could be loaded before the first is there.
PACKING = {"packed_buffer_size_bytes": 1 << 30, "packed_num_buffers": 1}


class TransferFailed(RuntimeError):
    """Some workers may have a part of new weights, or none: the engine cannot go on."""


class Transfer(NamedTuple):
    """What one update took.

    bytes, tensors: sent to each of `workers`. ms: from the first byte until vLLM had loaded all, with the checksums of
    what was sent and received. check_ms: of the comparison that follows.
    """

    bytes: int
    tensors: int
    workers: int
    ms: float
    check_ms: float


def check_devices(
    op: str, devices: Sequence[int], size: int, executor: str | None, sleep_mode: bool, own: int, count: int
) -> None:
    """Raise ValueError unless an engine of `size` ranks can have these GPUs, and the trainer another.

    own: the trainer's GPU. count: how many there are.
    """
    ids = ", ".join(map(str, devices))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or executor == "external_launcher":
        raise ValueError(
            f"{op}: device_ids={ids}: an engine on other GPUs is for one training process; under torchrun "
            "(external_launcher) every rank samples on its own GPU; leave device_ids out"
        )
    if executor not in (None, "mp"):
        raise ValueError(f"{op}: device_ids={ids}: distributed_executor_backend is {executor!r}; it must be 'mp'")
    if sleep_mode:
        raise ValueError(f"{op}: device_ids={ids}: training does not use these GPUs; leave sleep_mode out")
    if len(devices) != size or len(set(devices)) != size:
        raise ValueError(
            f"{op}: device_ids={ids} for tensor_parallel_size={size}; name as many GPUs as ranks, each once"
        )
    absent = [d for d in devices if not 0 <= d < count]
    if absent:
        raise ValueError(f"{op}: device_ids={ids}, but this process sees {count} GPUs, 0 to {count - 1}")
    if own in devices:
        raise ValueError(
            f"{op}: device_ids={ids} has the trainer's own GPU {own}, which NCCL cannot have twice; name others, or "
            "leave device_ids out: weights then go by CUDA IPC or within the process"
        )


def check_library(op: str) -> None:
    """Raise RuntimeError unless vLLM can use NCCL: where it cannot, its communicators send nothing, silently."""
    if importlib.import_module("vllm.envs").VLLM_DISABLE_PYNCCL:
        raise RuntimeError(f"{op}: VLLM_DISABLE_PYNCCL is set, and weights go to other GPUs by NCCL; unset it")
    wrapper = importlib.import_module("vllm.distributed.device_communicators.pynccl_wrapper")
    try:
        wrapper.NCCLLibrary()
    except Exception as error:  # whatever vLLM itself would pass over
        raise RuntimeError(
            f"{op}: weights go to other GPUs by NCCL, which this vLLM cannot use here: {error}; install the "
            "nvidia-nccl that vLLM asks for, or name its library in VLLM_NCCL_SO_PATH"
        ) from error


def watch(model: torch.nn.Module) -> None:
    """Have a worker's model note what it is given to load: a checksum of each tensor, and which parameters it reached.

    Slices of several ranks cannot be compared with the trainer's tensors; what they are cut from can.
    """
    sums: dict[str, torch.Tensor] = {}
    reached: set[str] = set()
    load: Any = model.load_weights

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        weights = list(weights)
        sums.update((name, weighted_sum(t)) for name, t in weights)  # on the device: nothing waits here
        loaded = load(weights, *args, **kwargs)
        reached.update(loaded or ())
        return loaded

    model.load_weights = load_weights  # type: ignore[assignment]
    model.bi_ops_noted = (sums, reached)  # type: ignore[assignment]


def noted(model: Any) -> tuple[dict[str, int], list[str]]:
    """What `watch` noted since the last call: checksums by the checkpoint's names, and parameters not reached."""
    sums, reached = model.bi_ops_noted
    found = {name: int(total) for name, total in sums.items()}
    missing = sorted({name for name, _ in model.named_parameters()} - reached)
    sums.clear()
    reached.clear()
    return found, missing


def nccl_environment(model: torch.nn.Module) -> dict[str, str]:
    """The NCCL_* variables under which a worker makes communicators with other processes.

    vLLM's batch-invariant mode sets some; releases that can undo it do so for such a communicator.
    """
    library = importlib.import_module("vllm.utils.nccl")
    with getattr(library, "unpinned_nccl_env", contextlib.nullcontext)():
        return _nccl_variables()


def _nccl_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These NCCL_* variables, and no others."""

    def put(own: Mapping[str, str]) -> None:
        for name in _nccl_variables():
            del os.environ[name]
        os.environ.update(own)

    before = _nccl_variables()
    put(variables)
    try:
        yield
    finally:
        put(before)


def together(what: str, timeout: float, *steps: Callable[[], object]) -> None:
    """Run the steps at once, each in a thread, until all have ended.

    Raises:
        TransferFailed: one has failed, or some have not ended in `timeout` seconds; these are left behind.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(step: Callable[[], object]) -> None:
        try:
            step()
        except BaseException as error:  # whatever it is, the other steps may wait for this one for ever
            ended.put(error)
        else:
            ended.put(None)

    for step in steps:
        threading.Thread(target=run, args=(step,), daemon=True).start()
    deadline = time.monotonic() + timeout
    for _ in steps:
        try:
            error = ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TransferFailed(
                f"{what}: no answer from vLLM's workers in {timeout:.0f} s; close the engine and make a new one"
            ) from None
        if error is not None:
            raise TransferFailed(
                f"{what}: {type(error).__name__}: {error}; close the engine and make a new one"
            ) from error


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class NcclTransfer:
    """The NCCL group of the trainer, rank 0, and the workers of an engine, made once.

    Args:
        llm: vLLM's `LLM`, made with `CONFIG` behind `check_library`; its workers are processes on other GPUs.
        workers: how many. timeout: None: `TIMEOUT`.

    Raises:
        TransferFailed: a worker failed or did not join.
    """

    def __init__(self, llm: Any, workers: int, timeout: float | None = None) -> None:
        common = importlib.import_module("vllm.distributed.weight_transfer.nccl_common")
        stateless = importlib.import_module("vllm.distributed.utils").StatelessProcessGroup
        communicator = importlib.import_module("vllm.distributed.device_communicators.pynccl").PyNcclCommunicator
        self._llm, self.workers, self.timeout = llm, workers, timeout or TIMEOUT
        self._device = torch.cuda.current_device()
        #: vLLM's communicator; whatever `broadcast(tensor, src=0)` of this is called with goes over the wire.
        self.group: Any = None
        # Some releases are told at the start how tensors are packed, others with each update.
        at_start = "packed" in {f.name for f in dataclasses.fields(common.NCCLWeightTransferInitInfo)}
        packing = {"packed": True, **PACKING}
        self._with_update: dict[str, Any] = {} if at_start else packing
        host, port = "127.0.0.1", _free_port()
        told = {"master_address": host, "master_port": port, "world_size": workers + 1, "rank_offset": 1}
        told |= packing if at_start else {}
        theirs: list[dict[str, str]] = []

        def join() -> None:
            torch.cuda.set_device(self._device)  # a thread begins on the first GPU
            meeting = stateless.create(host=host, port=port, rank=0, world_size=workers + 1)
            with _environment(theirs[0]):  # under other settings than its peers' NCCL would hang
                self.group = communicator(meeting, device=self._device)

        what = "VllmEngine: the transfer of weights to other GPUs did not start"
        together(what, self.timeout, lambda: theirs.extend(llm.apply_model(nccl_environment)))
        together(what, self.timeout, lambda: llm.init_weight_transfer_engine({"init_info": told}), join)
        #: The NCCL_* variables of the communicator, on both sides.
        self.environment = theirs[0]
        llm.apply_model(watch)

    def update(self, model: CausalLM, dtype: torch.dtype) -> Transfer:
        """Send the model's weights, rounded to `dtype`, and compare checksums on both sides.

        Compared are, for every worker, each tensor as it was received with the same tensor as it was sent; then each
        parameter that the worker has whole, all of them if it is the only one, with the trainer's. So a bit that
        changes on the wire is found in any number of ranks, and one that changes while vLLM loads it in the
        parameters that are not cut. What slices are loaded from is what was received, by the loaders vLLM starts with.

        Raises:
            TransferFailed: a worker failed, or the time was over. RuntimeError: other bits, or weights that are
                missing; all are listed, by rank.
        """
        what = "update_weights: vLLM's workers did not take the weights"
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        stored = [(w.name, w.of(parameters[w.parameter])) for w in model.weight_slices()]
        sent: dict[str, torch.Tensor] = {}
        received: list[tuple[dict[str, int], list[str]]] = []
        info = {
            "names": [name for name, _ in stored],
            "dtype_names": [str(dtype).removeprefix("torch.")] * len(stored),
            "shapes": [list(t.shape) for _, t in stored],
            **self._with_update,
        }

        def receive() -> None:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": info})
            self._llm.finish_weight_update()
            received.extend(self._llm.apply_model(noted))

        torch.cuda.synchronize()  # the weights were written on other streams than they are read on
        began = time.perf_counter()
        together(what, self.timeout, receive, lambda: self._send(stored, dtype, sent))
        ms = 1e3 * (time.perf_counter() - began)

        began = time.perf_counter()
        named = {n: p.detach() for n, p in named_as_vllm(model).items()}
        kept: list[dict[str, int]] = []
        ask = functools.partial(checksums, shapes={n: tuple(p.shape) for n, p in named.items()})
        together(what, self.timeout, lambda: kept.extend(self._llm.apply_model(ask)))
        self._compare({n: int(t) for n, t in sent.items()}, received, kept, named, dtype)
        check_ms = 1e3 * (time.perf_counter() - began)
        size = sum(t.numel() for _, t in stored) * dtype.itemsize
        return Transfer(size, len(stored), self.workers, ms, check_ms)

    def _send(self, stored: Sequence[tuple[str, torch.Tensor]], dtype: torch.dtype, sums: dict[str, Any]) -> None:
        """Broadcast copies in `dtype`, and leave their checksums in `sums`."""
        packed = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
        torch.cuda.set_device(self._device)

        def copies() -> Iterator[tuple[str, torch.Tensor]]:
            for name, t in stored:
                copy = t.to(dtype).contiguous()
                sums[name] = weighted_sum(copy)
                yield name, copy

        packed.packed_nccl_broadcast_producer(
            iterator=copies(),
            group=self.group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=PACKING["packed_buffer_size_bytes"],
            num_buffers=PACKING["packed_num_buffers"],
        )
        torch.cuda.synchronize()

    def _compare(
        self,
        sent: dict[str, int],
        received: list[tuple[dict[str, int], list[str]]],
        kept: list[dict[str, int]],
        named: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Raise RuntimeError listing what differs."""
        problems = []
        if len(received) != self.workers or len(kept) != self.workers:
            problems.append(f"{len(received)} and {len(kept)} of {self.workers} workers answered")
        known: dict[str, int] = {}
        for rank, ((theirs, missing), own) in enumerate(zip(received, kept, strict=False)):
            whole = named.keys() if self.workers == 1 else own.keys()
            known |= {n: checksum(named[n].to(dtype)) for n in whole if n not in known}
            for names, fault in (
                ([n for n in sent if theirs.get(n) != sent[n]], "received other bits than were sent of"),
                (missing, "got no weights for"),
                ([n for n in whole if own.get(n) != known[n]], "has other bits than the trainer in"),
            ):
                if names:
                    problems.append(f"rank {rank} {fault} {', '.join(sorted(names))}")
        if problems:
            raise RuntimeError(
                "update_weights: vLLM's weights are not the trainer's; send them again, or close the engine:\n  "
                + "\n  ".join(problems)
            )

    def close(self) -> None:
        """Leave the group, also while a broadcast waits in it. Closing twice is fine."""
        if self.group is not None:
            self.group.destroy()
        self.group = None
