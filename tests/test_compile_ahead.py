"""Kernels compiled ahead of time: launches that compile in a pool and do not run."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
from own_process import printed_by, without_a_gpu
from test_cli import call
from tiny import tiny_model
from triton.runtime.errors import OutOfResources

from bi_ops.core import compile_ahead, runtime
from bi_ops.matmul import Warmup
from bi_ops.models import warmup
from bi_ops.models.warmup import compile_step, warmup_step


class Kernel:
    """A kernel as triton's JITFunction.run sees it: compiles through the mode of its thread, or at once.

    loaded: on which GPU, each time that its handle is asked for what launches it.
    """

    def __init__(self, name):
        self.fn = SimpleNamespace(__name__=name)
        self.ran, self.loaded = [], []

    @property
    def run(self):
        self.loaded.append(torch.cuda.current_device())
        if self.fn.__name__ == "too large":
            raise OutOfResources(2, 1, "shared memory")


@pytest.fixture
def compiled(monkeypatch):
    """Names of kernels in the order in which they were compiled; "bad" does not. Each thread begins on GPU 0."""
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    done, current = [], threading.local()

    @contextlib.contextmanager
    def on(device):
        before, current.device = torch.cuda.current_device(), device
        yield
        current.device = before

    def run(self, *args, grid, warmup, **options):
        def compile_it():
            if self.fn.__name__ == "bad":
                raise RuntimeError("bad does not compile")
            done.append((self.fn.__name__, threading.current_thread() is threading.main_thread()))
            return self

        mode = _async_compile.active_mode.get()
        if mode is None:
            compile_it()
        else:
            extra = len(inspect.signature(mode.submit).parameters) - 2  # later releases also clean up
            mode.submit(self.fn.__name__, compile_it, *[lambda kernel: None] * extra)
        if not warmup:
            self.ran.append(args)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(runtime, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "device", on)
    return JITFunction, done


def test_every_launch_compiles_once_in_the_pool_and_none_runs(compiled):
    jit, done = compiled
    a, b, seen = Kernel("a"), Kernel("b"), []

    def launch(kernel):
        jit.run(kernel, 1, grid=(1,), warmup=False)

    with compile_ahead.compile_only(2, lambda *numbers: seen.append(numbers)) as found:
        launch(a)
        thread = threading.Thread(target=launch, args=(b,))  # as the backward's
        thread.start()
        thread.join()
        launch(a)
    assert sorted(done) == [("a", False), ("b", False)]
    assert sorted(found.kernels) == ["a", "b"]
    assert (a.ran, b.ran) == ([], [])
    assert len(seen) == 2
    launch(a)  # negative control: afterwards it runs, and compiles in its own thread
    assert (a.ran, done[-1]) == ([(1,)], ("a", True))


def test_a_kernel_is_loaded_where_it_was_asked_for(compiled):
    """A thread of the pool has a current GPU of its own, the first. What no GPU holds raises in the launch alone."""
    jit, _ = compiled
    first, other, large = Kernel("first"), Kernel("other"), Kernel("too large")
    with compile_ahead.compile_only(1):
        jit.run(first, grid=(1,), warmup=False)
        with torch.cuda.device(3):
            jit.run(other, grid=(1,), warmup=False)
            jit.run(large, grid=(1,), warmup=False)
    assert (first.loaded, other.loaded, large.loaded) == ([0], [3], [3])


def test_a_kernel_that_does_not_compile_raises_and_everything_is_as_before(compiled):
    jit, done = compiled
    before = jit.run
    with pytest.raises(RuntimeError, match="bad does not compile"), compile_ahead.compile_only(1):
        jit.run(Kernel("bad"), grid=(1,), warmup=False)
    assert jit.run is before
    jit.run(Kernel("a"), grid=(1,), warmup=False)
    assert done == [("a", True)]


def test_records_belong_to_gpu_driver_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_ahead.records() == {}
    compile_ahead.remember("qwen3", 31, 4.56)
    compile_ahead.remember("other", 1, 1)
    assert compile_ahead.records() == {
        "qwen3": {"kernels": 31, "seconds": 4.6},
        "other": {"kernels": 1, "seconds": 1},
    }
    monkeypatch.setattr(compile_ahead, "where", lambda: "another driver")
    assert compile_ahead.records() == {}
    compile_ahead.path().write_text("[")
    assert compile_ahead.records() == {}


def test_a_shared_folder_takes_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", triton.knobs.cache.dir)
    compile_ahead.use_cache(tmp_path / "shared")
    assert triton.knobs.cache.dir == str(tmp_path / "shared")
    assert (tmp_path / "shared").is_dir()


def test_the_command_names_what_is_wrong_and_does_nothing_without_a_gpu(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    assert call(capsys, "warmup", tmp_path, "--jobs", 0)[0] == 2
    assert call(capsys, "warmup", tmp_path / "none")[0] == 2
    if runtime.INTERPRET:
        code, out, _ = call(capsys, "warmup", tmp_path)
        assert code == 0
        assert "nothing is to be compiled" in out


def test_an_import_leaves_the_compiler_alone():
    """torch._dynamo takes as long to import as torch. Negative control: naming it imports it."""
    told = "print('torch._dynamo' in set(sys.modules) - old)"
    code = f"import sys, torch; old = set(sys.modules); import bi_ops; {told}; import torch._dynamo; {told}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


@without_a_gpu
def test_the_warmup_compiles_what_first_steps_launch():
    """Packs of many sequences and of one, from graphs and not. Negative control: a warm-up of equal sequences alone.

    One layer of each kind launches what all do, of models whose layers differ. Negative control: the first layer alone.
    """
    found = printed_by("traced_first_steps.py")
    assert found["compiled"] > 20
    assert {name: kernels for name, kernels in found["missing"].items() if kernels} == {}
    assert len(found["missing"]) == 11
    assert "attention_backward_kernel" in found["control"]
    of_each_kind = {"alike": 2, "frozen below": 5, "frozen between": 4, "frozen": 2, "experts in most": 3}
    assert found["left_out"] == {name: [n_layers, []] for name, n_layers in of_each_kind.items()}
    assert "attention_backward_kernel" in found["left_out_control"]["frozen below"]


@without_a_gpu
def test_the_first_step_neither_compiles_nor_loads():
    """More equal layers cost no launch more, and attention's backward first no kernel more.

    Negative control: a pool that compiles alone, as Triton's.
    """
    found = printed_by("warm_first_step.py")
    assert found["loaded"] == found["compiled"] > 20
    assert found["in_step"] == []
    assert found["launches"][0] == found["launches"][1] > 0
    assert found["before_attention"] < 10
    assert found["in_order"] == found["compiled"]
    assert "attention_backward_kernel" in found["control"]


@pytest.mark.gpu
def test_after_a_warmup_a_step_compiles_nothing(tmp_path, monkeypatch, device):
    """And the warm-up has changed no weight."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from bi_ops.matmul import TOKEN_STEP
    from bi_ops.models.packing import pack

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    model = tiny_model(hidden_size=256, intermediate_size=512, max_position_embeddings=1024)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert compile_step(model) > 5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    missing = []
    compile_kernel, load = JITFunction._do_compile, CompiledKernel._init_handles

    def compiles(self, *args, **options):
        missing.append(f"{self.fn.__name__} compiles")
        return compile_kernel(self, *args, **options)

    def loads(self):
        if self.module is None:
            missing.append(f"{self.name} loads")
        load(self)

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    monkeypatch.setattr(CompiledKernel, "_init_handles", loads)
    for lengths in ((200,) * 4, (10, 900, 200)):
        batch = pack([[1] * 8] * len(lengths), [[2] * n for n in lengths], device, TOKEN_STEP, None, model.unit_tokens)
        model.allocate_main_grads()
        model.token_logprobs(batch).sum().backward()
        model.collect_main_grads()
        assert missing == []


@pytest.mark.parametrize("besides", [Warmup(1, ("b",)), Warmup(0, (), "no GEMM has run unverified")])
def test_gemms_that_no_weight_has_are_verified_too(besides, monkeypatch):
    """Layers that ranks share have some of fp32 results; the step has asked for them while it was compiled."""
    model, asked = tiny_model(), []

    def verified(module, *rest):
        asked.append(module)
        return besides if module is None else Warmup(2, ("a",))

    monkeypatch.setattr(warmup.matmul, "warmup", verified)
    found = warmup_step(model).gemms
    assert asked == [model, None]
    assert found == (Warmup(3, ("a", "b")) if not besides.reason else Warmup(2, ("a",)))
