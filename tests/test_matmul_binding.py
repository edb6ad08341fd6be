"""csrc/cublaslt.cpp on the CPU, with a stand-in for cuBLASLt: operands, plans, tuning, linear and its gradient."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.matmul import backends, cublaslt, linear, recipe, tuning
from bi_ops.matmul.backends import CublasLt
from bi_ops.matmul.linear import through_binding

TESTS = Path(__file__).resolve().parent
BF16 = torch.bfloat16
CPU = 1  # DLPack's name of the device

pytestmark = pytest.mark.skipif(bool(recipe.unsupported_reason(cublaslt._SOURCES)), reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(the module that is compiled from csrc/, the stand-in for cuBLASLt)."""
    folder = tmp_path_factory.mktemp("binding")
    recipe.compile_library(cublaslt._SOURCES, folder / recipe.FILE)
    library, why_not = cublaslt._import_library(folder / recipe.FILE)
    assert library is not None, why_not
    fake = folder / "libfake.so"
    command = [*recipe.compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", str(TESTS / "fake_cublaslt.cpp")]
    subprocess.run([*command, "-o", str(fake)], check=True)
    return library, fake


@pytest.fixture
def fake(compiled):
    """The stand-in, and the binding open on it."""
    library, path = compiled
    lt = ctypes.CDLL(str(path))
    lt.fake_last_algorithm.restype = ctypes.c_uint64
    api = torch.Tensor.__dlpack_c_exchange_api__
    library.open(str(path), api, CPU, lambda: 0, lambda: 1)
    return SimpleNamespace(lt=lt, binding=cublaslt.Binding(library), library=library, path=path, api=api)


def numbers(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Small integers, whose sums are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


OPERANDS = {
    "row-major": lambda: (numbers(5, 16), numbers(16, 8)),
    "a transposed": lambda: (numbers(16, 5).t(), numbers(16, 8)),
    "b transposed": lambda: (numbers(5, 16), numbers(8, 16).t()),
    "both transposed": lambda: (numbers(16, 5).t(), numbers(8, 16).t()),
    "rows of a wider matrix": lambda: (numbers(5, 24)[:, 8:], numbers(8, 40)[:, :16].t()),
    "one row": lambda: (numbers(3, 16)[1:2], numbers(8, 16).t()),
    "one column": lambda: (numbers(5, 16), numbers(16, 2)[:, :1]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32])
@pytest.mark.parametrize("layout", OPERANDS)
def test_every_layout_gives_the_gemm(layout, out_dtype, bias, fake):
    a, b = OPERANDS[layout]()
    added = numbers(b.shape[1], dtype=out_dtype) if bias else None
    out = torch.full((a.shape[0], b.shape[1] + 2), torch.nan, dtype=out_dtype)[:, : b.shape[1]]
    assert fake.binding.run(a, b, out, added, -1, True) is True
    expected = a.float() @ b.float() + (0 if added is None else added.float())
    assert torch.equal(out, expected.to(out_dtype))
    assert not torch.equal(out, (expected + 1).to(out_dtype))


def test_algorithms_that_split_k_are_the_negative_controls_alone(fake):
    a, b, out = numbers(5, 16), numbers(16, 8), torch.empty(5, 8, dtype=BF16)
    ran = []
    for restricted in (True, False):
        for i in range(5):
            if fake.binding.run(a, b, out, None, i, restricted):
                ran.append((restricted, fake.lt.fake_last_algorithm()))
    assert ran == [(True, i) for i in (10, 12, 13)] + [(False, i) for i in (10, 11, 12, 13)]
    none = torch.empty(7, 8, dtype=BF16)
    assert fake.binding.run(numbers(7, 16), b, none, None, -1, True) is False


@pytest.mark.parametrize(
    ("message", "operands"),
    [
        ("both be bf16 or both fp16", lambda: (numbers(5, 16).float(), numbers(16, 8).float(), torch.empty(5, 8))),
        ("both be bf16 or both fp16", lambda: (numbers(5, 16), numbers(16, 8).half(), torch.empty(5, 8))),
        (r"shapes \[5, 16\] @ \[15, 8\] -> \[5, 8\]", lambda: (numbers(5, 16), numbers(15, 8), torch.empty(5, 8))),
        (r"b has strides \[32, 2\]", lambda: (numbers(5, 16), numbers(16, 32)[:, ::2][:, :8], torch.empty(5, 8))),
        ("out must be row-major", lambda: (numbers(5, 16), numbers(16, 8), torch.empty(8, 5).t())),
        ("a has 3 dimensions", lambda: (numbers(1, 5, 16), numbers(16, 8), torch.empty(5, 8))),
        ("dtype other than", lambda: (numbers(5, 16), numbers(16, 8), torch.empty(5, 8, dtype=torch.float64))),
    ],
)
def test_what_it_cannot_compute_raises(message, operands, fake):
    with pytest.raises(RuntimeError, match=f"bi_ops cublaslt: .*{message}"):
        fake.binding.run(*operands(), None, -1, True)


def test_another_gpu_than_the_current_one_is_refused(fake):
    fake.library.open(str(fake.path), fake.api, CPU, lambda: 1, lambda: 1)
    x, weight = numbers(5, 16), numbers(8, 16)
    fake.binding.allow(0, BF16, 8, 16)
    with pytest.raises(RuntimeError, match="not the current one"):
        fake.binding.run(x, weight.t(), torch.empty(5, 8, dtype=BF16), None, -1, True)
    assert fake.binding.linear(x, weight) is None


@pytest.mark.parametrize(("version", "ok"), [(110900, False), (120103, True), (130100, True), (140000, False)])
def test_cublaslt_of_another_release_is_refused(version, ok, fake):
    known = ctypes.c_size_t.in_dll(fake.lt, "fake_version")
    before, known.value = known.value, version
    try:
        if ok:
            fake.library.open(str(fake.path), fake.api, CPU, lambda: 0, lambda: 1)
        else:
            with pytest.raises(RuntimeError, match=f"cuBLASLt {version // 10000}; the binding knows 12 to 13"):
                fake.library.open(str(fake.path), fake.api, CPU, lambda: 0, lambda: 1)
    finally:
        known.value = before


def test_a_library_that_torch_has_not_loaded_is_not_loaded(fake, tmp_path):
    shutil.copy(fake.path, tmp_path / "other.so")
    with pytest.raises(RuntimeError, match=r"torch has loaded no .*other\.so"):
        fake.library.open(str(tmp_path / "other.so"), fake.api, CPU, lambda: 0, lambda: 1)


def test_a_large_gemm_is_timed_once_for_its_size_class(fake, monkeypatch):
    """The fastest is the last of three; a graph that is captured before runs the first and times nothing."""
    timed, capturing = [], True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def fastest(launch, count):
        timed.append(count)
        launch(1)
        assert fake.lt.fake_last_algorithm() == 12
        return count - 1

    monkeypatch.setattr(tuning, "fastest", fastest)

    memory = [torch.empty(2048 * 2048 + 128, dtype=BF16) for _ in range(3)]
    memory = [m[-m.data_ptr() % 256 // 2 :] for m in memory]  # one alignment, which the size class has

    def ran(rows, index=-1):
        sizes = (rows, 1024), (1024, 2048), (rows, 2048)
        a, b, out = (m[: r * c].view(r, c) for m, (r, c) in zip(memory, sizes, strict=True))
        assert fake.binding.run(a, b, out, None, index, True)
        return fake.lt.fake_last_algorithm()

    assert (ran(1000), timed) == (10, [])
    capturing = False
    assert (ran(1000), timed) == (13, [3])
    assert (ran(1000), ran(600), timed) == (13, 13, [3])
    assert (ran(1000, 0), timed) == (10, [3])
    assert (ran(2000), timed) == (13, [3, 3])
    assert (ran(16), timed) == (10, [3, 3])  # too small to be timed


@pytest.fixture
def selected(fake, monkeypatch):
    """The binding as what `linear` selects."""

    class Chosen(CublasLt):
        def available(self):
            return Support(True)

        def gemm(self, *_):
            return False

    monkeypatch.setattr(cublaslt, "loaded", lambda: fake.binding)
    backends.register(Chosen(), first=True)
    yield fake
    backends.register(CublasLt(), first=True)


def test_linear_serves_verified_weights_in_the_verified_layout(fake):
    x, weight = numbers(2, 3, 24), numbers(40, 24)
    assert fake.binding.linear(x, weight) is None
    assert fake.binding.serves(x, weight) is False
    fake.binding.allow(0, BF16, 40, 24)
    out = fake.binding.linear(x, weight)
    assert torch.equal(out, (x.float() @ weight.float().t()).to(BF16))
    assert fake.binding.serves(x, weight) is True
    assert torch.equal(fake.binding.linear(x[0, 0], weight), out[0, 0])
    others = {
        "no rows": (x[:, :0], weight),
        "a strided x": (x.transpose(0, 1), weight),
        "an unaligned x": (numbers(6 * 24 + 1)[1:].view(6, 24), weight),
        "a transposed weight": (x, numbers(24, 40).t()),
        "another dtype": (x.float(), weight.float()),
        "two dtypes": (x.half(), weight),
        "another width": (numbers(3, 16), weight),
        "another weight": (x, numbers(41, 24)),
        "a scalar": (x[0, 0, 0], weight),
    }
    assert [what for what, given in others.items() if fake.binding.serves(*given)] == []
    assert [what for what, given in others.items() if fake.binding.linear(*given) is not None] == []
    assert fake.binding.linear(numbers(7, 24), weight) is None  # no algorithm


@pytest.mark.skipif(not runtime.INTERPRET, reason="its gradients are Triton's, of tensors on the CPU")
@pytest.mark.parametrize("rows", [5, 7])  # 7: no algorithm, so that another backend serves inside the node
def test_linear_is_differentiable_twice(rows, selected):
    if not runtime.INTERPRET:
        pytest.skip("the stand-in for cuBLASLt computes on the CPU")
    selected.binding.allow(0, BF16, 48, 32)
    x, weight = numbers(2, rows, 32)[:1].requires_grad_(), numbers(48, 32).requires_grad_()
    out = linear(x, weight)
    assert type(out.grad_fn).__name__ == "_ServedBackward"
    assert torch.equal(out, (x.float() @ weight.float().t()).to(BF16))
    g = numbers(1, rows, 48)
    found = torch.autograd.grad(out, (x, weight), g.requires_grad_(), create_graph=True)
    expected = (g.float() @ weight.float()), (g.float().mT @ x.float())[0]
    assert all(torch.equal(f, e.to(BF16)) for f, e in zip(found, expected, strict=True))
    [second] = torch.autograd.grad(found[0].sum(), g)
    assert torch.equal(second, weight.float().sum(1).to(BF16).expand(1, rows, 48))
    [only] = torch.autograd.grad(linear(x.detach(), weight), weight, g.detach())
    assert torch.equal(only, found[1])
    with torch.no_grad():
        assert linear(x, weight).grad_fn is None
    assert through_binding(x, torch.nn.Parameter(numbers(47, 32))) is None
