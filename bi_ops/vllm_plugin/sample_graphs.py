"""What follows the model in a decoding step of vLLM's v2 runner, in CUDA graphs of its own.

The LM head, the draw of a token, its log-probability and its rank are a dozen launches from Python, and a small model's
step waits for the host. vLLM's own `sample` is captured here as it is, for some numbers of requests, after the model's
graphs were. A batch of fewer fills the first rows of the next larger graph: no row's bits depend on others.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

logger = logging.getLogger("vllm.bi_ops")

#: What `GPUModelRunner.sample` returns: the sampler's output, and how many tokens each request was given and refused.
Sampled = tuple[Any, torch.Tensor, torch.Tensor]
#: Makes of a call one that computes the same again, into the same tensors, and returns them.
Capture = Callable[[Callable[[], Sampled]], Callable[[], Sampled]]

#: What a request asks of the sampler: more than the graphs compute, a token alone, or its log-probability too.
EAGER, TOKEN, SCORED = range(3)


def sizes(most: int) -> list[int]:
    """Numbers of requests that get a graph, up to `most`, which is one of them."""
    found = {1, 2, 4, 8, *range(16, 65, 16), *range(96, 129, 32), *range(192, most, 64), most}
    return sorted(n for n in found if n <= most)


def before_capture(runner: Any) -> None:
    """Have this model runner capture its sampling too, after the graphs of its model, where these are all of a step."""
    if type(runner).__module__ != "vllm.v1.worker.gpu.model_runner":
        return  # the v1 runner computes logits in another way
    # A runner that refers to itself would outlive its engine, and CUDA graphs with it, until Python collects.
    stock = type(runner).capture_model
    runner.capture_model = functools.partial(_capture_model, weakref.ref(runner), stock)


def _capture_model(alive: weakref.ref[Any], stock: Callable[..., int], *args: Any, **options: Any) -> int:
    """vLLM's `capture_model`, and the graphs of what follows."""
    runner = alive()
    assert runner is not None, "its own method runs"
    taken = stock(runner, *args, **options)
    if options.get("profile_only"):
        return taken
    if why := unfit(runner):
        logger.info("bi_ops: sampling runs outside of CUDA graphs: %s", why)
        return taken
    from vllm.v1.worker.gpu.input_batch import InputBatch

    begun, buffers = time.perf_counter(), runner.input_buffers
    forget_warm_up(runner.sampler)
    stock = functools.partial(type(runner).sample, runner)
    graphs = SampleGraphs(runner, stock, lambda n: InputBatch.make_dummy(n, n, buffers), _captured())
    attach(runner, graphs)
    logger.info("bi_ops: %d CUDA graphs of sampling in %.1f s", len(graphs), time.perf_counter() - begun)
    return taken


def forget_warm_up(sampler: Any) -> None:
    """Have every slot of vLLM's sampler ask for a token alone.

    vLLM's warm-up leaves a request of its own in there, with top-k, top-p and penalties. What is captured then would
    filter every batch, by whatever the columns of that time hold.
    """
    from vllm.sampling_params import SamplingParams

    plain = SamplingParams(temperature=1.0, seed=0)
    of_prompt = (1,) if "prompt_len" in inspect.signature(type(sampler).add_request).parameters else ()  # 0.26
    for index in range(sampler.sampling_states.max_num_reqs):
        sampler.add_request(index, *of_prompt, plain)
    sampler.apply_staged_writes()


def attach(runner: Any, graphs: SampleGraphs) -> None:
    """Have `runner.sample` replay `graphs` where they compute a batch."""
    requests = Requests(runner.sampler)
    runner.sampler.add_request, runner.sampler.apply_staged_writes = requests.add_request, requests.apply_staged_writes
    alive, stock, copies = weakref.ref(runner), type(runner).sample, runner.output_copy_stream

    def sample(hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Sampled:
        if grammar_output is None:
            asked = requests.asked[input_batch.idx_mapping_np]
            found = graphs.run(input_batch, hidden_states, asked, copies)
            if found is not None:
                return found
        return stock(alive(), hidden_states, input_batch, grammar_output)

    runner.sample = sample


def unfit(runner: Any) -> str | None:
    """Why the runner's steps can't have such graphs; None: they can."""
    sampler, parallel = runner.sampler, runner.vllm_config.parallel_config
    hidden = getattr(runner.cudagraph_manager, "hidden_states", None)
    custom = len(getattr(sampler, "logits_processors", ())) > 3  # vLLM's own are three
    reasons = {
        "the model has no full CUDA graphs": hidden is None,
        "stages on several GPUs compute a step": parallel.pipeline_parallel_size > 1,
        "a draft model proposes tokens": runner.speculator is not None,
        "adapters may change the LM head": runner.lora_config is not None,
        "the batch is spread over ranks": any(getattr(runner, n, None) for n in ("batch_sharder", "pcp_manager")),
        "its sampler is not vLLM's": type(sampler).__name__ != "Sampler" or custom,
        "log-probabilities are not of the raw logits": getattr(sampler, "logprobs_mode", None) != "raw_logprobs",
        "the sampler reports more than tokens and scores": any(
            getattr(sampler, n, None) for n in ("compute_nans", "return_sampling_mask", "trace_replay_state")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _captured() -> Capture:
    """Captures in CUDA graphs that share memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Callable[[], Sampled]) -> Callable[[], Sampled]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # kernels are compiled and loaded outside of a capture
            stream.synchronize()
            # Not torch.cuda.graph, which collects garbage each time: seconds in a process of vLLM's.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                outputs = call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Sampled:
            graph.replay()
            return outputs

        return replay

    return capture


class Column(NamedTuple):
    """A column of vLLM's that requests write on the CPU, whose GPU tensor is another one after each write.

    copy: what graphs read. seen: the tensor that was copied last, in a list of one.
    """

    column: Any
    copy: torch.Tensor
    seen: list[torch.Tensor | None]

    def refresh(self) -> None:
        now = self.column.gpu
        if now is not self.seen[0]:
            self.copy.copy_(now)
            self.seen[0] = now


class SampleGraphs:
    """The graphs of a model runner, and the tensors that they read.

    runner: vLLM's, whose model has full CUDA graphs; it is not kept. sample: its own `sample`. dummy: makes a batch of
    vLLM's of so many requests. capture: makes a replay of a call.

    Raises:
        RuntimeError: a slot asks for more than the graphs compute, which would be captured for all.
    """

    def __init__(
        self, runner: Any, sample: Callable[..., Sampled], dummy: Callable[[int], Any], capture: Capture
    ) -> None:
        hidden = runner.cudagraph_manager.hidden_states
        self._hidden = hidden.data_ptr()
        self._sizes = sizes(min(runner.input_buffers.max_num_reqs, hidden.shape[0]))
        if more := [i for i in range(self._sizes[-1]) if asked_of(runner.sampler, i) == EAGER]:
            raise RuntimeError(
                f"vllm_plugin: {len(more)} slots of vLLM's sampler ask for filters or penalties while sampling is "
                "captured, and every request would get them; please report it, with vLLM's version"
            )
        self._calls: dict[tuple[int, bool], Callable[[], Sampled]] = {}
        self._views: dict[tuple[int, bool, int], Sampled] = {}
        self._parts: list[Any] = []
        sampling, requests = runner.sampler.sampling_states, runner.req_states
        columns = (sampling.temperature, sampling.seeds, requests.prefill_len)
        self._columns = [Column(column, column.gpu.clone(), [None]) for column in columns]
        batch = dummy(self._sizes[-1])
        self._requests, self._rows = batch.idx_mapping.clone(), batch.logits_indices.long()
        self._first_rows = self._rows.clone()
        self._held: np.ndarray | None = None  # the requests that the inputs hold; None: of no batch
        self._holds_first = True
        with torch.inference_mode(), self._read_copies(sampling):
            for size in reversed(self._sizes):  # the largest first: smaller ones fit into its memory
                for scored in (True, False):
                    sampling.num_logprobs[:size] = 0 if scored else -1
                    part = self._part(dummy(size), runner.input_buffers)
                    self._parts.append(part)  # the graph reads its tensors
                    self._calls[size, scored] = capture(functools.partial(sample, hidden, part, None))

    def __len__(self) -> int:
        return len(self._calls)

    def _part(self, batch: Any, buffers: Any) -> Any:
        """A dummy batch, but of tensors that stay: the runner's buffers, and the first rows of these graphs' inputs."""
        requests, rows = self._requests[: batch.num_reqs], self._rows[: batch.num_reqs]
        return dataclasses.replace(
            batch,
            **{"idx_mapping": requests, "expanded_idx_mapping": requests, "logits_indices": rows},
            **{"input_ids": buffers.input_ids, "positions": buffers.positions},
        )

    @contextlib.contextmanager
    def _read_copies(self, sampling: Any) -> Iterator[None]:
        """While it lasts vLLM's columns are the copies. Logprobs asked for are put back, too."""
        stock, asked = [c.column.gpu for c in self._columns], sampling.num_logprobs.copy()
        for c in self._columns:
            c.column.gpu = c.copy
        try:
            yield
        finally:
            for c, gpu in zip(self._columns, stock, strict=True):
                c.column.gpu = gpu
            sampling.num_logprobs[:] = asked

    def run(self, batch: Any, hidden: torch.Tensor, asked: np.ndarray, copies: Any) -> Sampled | None:
        """What vLLM's `sample` returns of a batch without grammars, from a graph; None where none computes it.

        asked: what each of its requests asks for. copies: the stream on which earlier results may still be read.
        """
        n = batch.num_reqs
        computed = hidden.data_ptr() == self._hidden and n <= self._sizes[-1] and asked.min() != EAGER
        if not computed or batch.num_draft_tokens or batch.logits_indices.shape[0] != n:
            return None
        size, scored = self._sizes[bisect.bisect_left(self._sizes, n)], bool(asked.max() == SCORED)
        torch.cuda.current_stream().wait_stream(copies)
        for column in self._columns:
            column.refresh()
        self._hold(batch, n)
        replay, view = self._calls[size, scored], (size, scored, n)
        found = replay()
        if view not in self._views:
            self._views[view] = first(found, n)
        return self._views[view]

    def _hold(self, batch: Any, n: int) -> None:
        """Have the inputs hold what this batch's are. A decoding step's are mostly those of the step before."""
        if self._held is None or not np.array_equal(self._held, batch.idx_mapping_np):
            self._requests[:n].copy_(batch.idx_mapping)
            self._held = batch.idx_mapping_np.copy()
        if batch.num_tokens != n:  # some of its requests have several tokens
            self._rows[:n].copy_(batch.logits_indices)
            self._holds_first = False
        elif not self._holds_first:
            self._rows.copy_(self._first_rows)
            self._holds_first = True


def first(found: Sampled, n: int) -> Sampled:
    """The first `n` requests of what vLLM's `sample` returned."""
    output, given, refused = found
    scores = output.logprobs_tensors
    if scores is not None:
        scores = scores._replace(**{f: v[:n] for f, v in scores._asdict().items() if isinstance(v, torch.Tensor)})
    changed = {"sampled_token_ids": output.sampled_token_ids[:n], "logprobs_tensors": scores}
    changed |= {"num_sampled": given[:n], "num_rejected": refused[:n]}
    return dataclasses.replace(output, **changed), changed["num_sampled"], changed["num_rejected"]


class Requests:
    """What the requests of a sampler ask for, and when its columns were written.

    Stock vLLM hands a dozen columns to the GPU in every step; they change when a request is added, and only then.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = weakref.ref(sampler)
        self.asked = np.full(sampler.sampling_states.max_num_reqs, EAGER, dtype=np.int8)
        self._added = True
        self._stock_add, self._stock_write = type(sampler).add_request, type(sampler).apply_staged_writes

    def add_request(self, index: int, *args: Any, **options: Any) -> None:
        """`Sampler.add_request`."""
        sampler = self._sampler()
        self._stock_add(sampler, index, *args, **options)
        self.asked[index] = asked_of(sampler, index)
        self._added = True

    def apply_staged_writes(self) -> None:
        """`Sampler.apply_staged_writes`."""
        if self._added:
            self._stock_write(self._sampler())
            self._added = False


def asked_of(sampler: Any, index: int) -> int:
    """What the request in slot `index` of vLLM's sampler asks for."""
    of = sampler.sampling_states
    changed = of.temperature.np[index] not in (0.0, 1.0) or of.min_p.np[index] != 0.0
    changed = changed or of.top_p.np[index] != 1.0 or of.top_k.np[index] != of.vocab_size
    if hasattr(sampler, "needs_logits_processing"):
        changed = changed or sampler.needs_logits_processing[index]
    else:  # 0.26
        changed = changed or sampler.logit_bias_state.use_logit_bias[index]
        changed = changed or sampler.penalties_state.use_penalty[index]
        changed = changed or sampler.bad_words_state.num_bad_words.np[index] != 0
    others = of.num_logprobs[index] > 0 or sampler.logprob_token_ids_state.num_token_ids.np[index] != 0
    return EAGER if changed or others else SCORED if of.num_logprobs[index] == 0 else TOKEN
