"""The mode: plain torch code under the contract, and an error for whatever cannot be."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import matmul, mode, norm
from bi_ops.core import runtime
from bi_ops.verify import rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

HEADS, DIM, VOCAB = (2, 32, 50) if runtime.INTERPRET else (8, 512, 4096)
BATCH, LENGTH = (3, 17) if runtime.INTERPRET else (33, 129)
RERUNS = 2 if runtime.INTERPRET else 100


class Block(nn.Module):
    """A small decoder in plain torch: embedding, attention, a gated MLP, RMS norms, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.norm1, self.norm2 = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(2 * DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        att = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(att.transpose(1, 2).reshape(batch, length, DIM))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return F.log_softmax(self.head(x), -1)


@pytest.fixture
def block(device):
    return Block().to(device)


@pytest.fixture
def ids(device):
    return torch.randint(VOCAB, (BATCH, LENGTH)).to(device)


@pytest.fixture
def on():
    with mode.batch_invariant_backward_mode():
        yield


def grads(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def loss_of(model, ids):
    logp = model(ids[:, :-1])
    return -logp.gather(-1, ids[:, 1:, None]).mean()


# --------------------------------------------------------------------------------------------------------------
# a whole model


def test_rows_of_a_plain_model_do_not_depend_on_the_batch(block, ids, on):
    block.bfloat16()
    full = block(ids)
    for part in (slice(0, 1), slice(1, None)):
        assert bits_equal(block(ids[part]), full[part])
    shorter = block(ids[:1, : LENGTH - 5])
    assert bits_equal(shorter[0], full[0, : LENGTH - 5])


def test_input_gradients_of_a_row_do_not_depend_on_the_batch(block, ids, on):
    block.bfloat16()
    hidden = torch.randn(BATCH, LENGTH, DIM, device=ids.device).bfloat16()

    def grad_rows(x):
        x = x.clone().requires_grad_()
        y = block.down(F.silu(block.up(block.norm2(x)).chunk(2, -1)[0]).softmax(-1))
        return y.detach(), torch.autograd.grad(y.float().pow(2).sum(), x)[0]

    assert row_variant(grad_rows, (hidden,), (1, 2)) == []


def test_gradients_are_the_same_on_every_run_and_close_to_torchs(block, ids):
    plain_loss = loss_of(block, ids)
    plain = grads(block, plain_loss)
    with mode.batch_invariant_backward_mode():
        loss = loss_of(block, ids)
        ours = grads(block, loss)
        assert rerun_variant(lambda: grads(block, loss_of(block, ids)), RERUNS) == []
    torch.testing.assert_close(loss, plain_loss)
    for (name, _), a, b in zip(block.named_parameters(), ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_training_step_runs_under_the_mode(block, ids, on, options):
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, **options)
    before = F.cross_entropy(block(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    before.backward()
    nn.utils.clip_grad_norm_(block.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert loss_of(block, ids) < before


def test_without_the_mode_torch_varies_with_the_batch(device):
    """Negative control: the sweep does see a torch kernel that splits its work by the row count."""
    n, k, m, dtype = (64, 3072, 96, torch.float32) if runtime.INTERPRET else (4096, 12288, 4096, torch.bfloat16)
    weight, rows = torch.randn(n, k, device=device).to(dtype), (torch.randn(m, k, device=device).to(dtype),)

    def product(x):
        return F.linear(x, weight)

    assert row_variant(product, rows, (1, 2, 3, 16, 17, 64))
    with mode.batch_invariant_backward_mode():
        assert row_variant(product, rows, (1, 17)) == []


# --------------------------------------------------------------------------------------------------------------
# single operators: close to torch's, with gradients, and on the operators of bi_ops where they have a name

CASES = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x[None], w.t()),
    "matmul_strided": lambda x, w: torch.matmul(x.view(2, 3, 8).transpose(0, 1), w.t()),
    "mv": lambda x, w: x @ w[0],
    "dot": lambda x, w: torch.dot(x[0], w[0]),
    "einsum": lambda x, w: torch.einsum("bd,nd->nb", x, w),
    "bmm": lambda x, w: torch.bmm(x.view(2, 3, 8), w.view(1, 5, 8).expand(2, 5, 8).mT),
    "baddbmm": lambda x, w: torch.baddbmm(x.view(2, 3, 8)[..., :5], x.view(2, 3, 8), w.t().expand(2, 8, 5), alpha=0.5),
    "addmm": lambda x, w: torch.addmm(w[:, 0], x, w.t(), beta=2),
    "addmv": lambda x, w: torch.addmv(x[:, 0], x, w[0]),
    "softmax": lambda x, w: F.softmax(x, 0) + x.softmax(1),
    "log_softmax": lambda x, w: F.log_softmax(x, 1) + torch.log_softmax(x, 0),
    "logsumexp": lambda x, w: torch.logsumexp(x, 1) + torch.logsumexp(x, (0, 1)),
    "mean": lambda x, w: x.mean(1) + x.mean() + x.mean((0, 1), keepdim=True),
    "sum": lambda x, w: x.sum(0) + x.sum() + x.sum(-1)[:1],
    "broadcast": lambda x, w: x * w[:1] + w[0],
    "rms_norm": lambda x, w: F.rms_norm(x, (8,), w[0], 1e-5) + F.rms_norm(x, (8,)),
    "rms_norm_2d": lambda x, w: F.rms_norm(x.view(2, 3, 8), (3, 8)),
    "embedding": lambda x, w: F.embedding(torch.tensor([[0, 3], [3, 1]], device=x.device), w, padding_idx=1),
    "gather": lambda x, w: x.gather(1, torch.tensor([[1, 1, 0]] * 6, device=x.device)),
    "index": lambda x, w: x[torch.tensor([0, -1, 0], device=x.device)] * 2,
    "index_pairs": lambda x, w: x[torch.arange(6, device=x.device), torch.tensor([1, 0, 2, 3, 3, 1], device=x.device)],
    "index_mask": lambda x, w: x[x.detach() > 0],
    "index_select": lambda x, w: x.index_select(1, torch.tensor([0, 3, 3], device=x.device)),
    "cross_entropy": lambda x, w: F.cross_entropy(
        x, torch.tensor([0, 1, -100, 7, 2, 2], device=x.device), label_smoothing=0.1
    ),
    "nll_sum": lambda x, w: F.nll_loss(x, torch.tensor([0, 1, 3, 7, 2, 2], device=x.device), reduction="sum"),
    "nll_none": lambda x, w: F.nll_loss(x, torch.tensor([0, 1, 3, 7, 2, 2], device=x.device), reduction="none"),
    "mse": lambda x, w: F.mse_loss(x, x.detach() + 1) + F.smooth_l1_loss(x, 2 * x.detach(), reduction="sum"),
    "bce": lambda x, w: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "max": lambda x, w: x.max(1)[0] + x.amax(1) + x.sort(1)[0][:, 2] + x.topk(2, 1)[0][:, 1],
    "gelu_glu_dropout": lambda x, w: F.gelu(x)[:, :4] + F.glu(x) + F.dropout(x, 0.0)[:, :4],
    "chunk_cat_where": lambda x, w: torch.cat([torch.where(c > 0, c, 0.1 * c) for c in x.chunk(2)]),
    "autocast_free_norm": lambda x, w: x / x.norm(),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_and_gradients_are_close_to_torchs(name, device):
    fn = CASES[name]
    x, w = torch.randn(6, 8, device=device).requires_grad_(), torch.randn(5, 8, device=device).requires_grad_()

    def run():
        out = fn(x, w)
        g = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        return out, *torch.autograd.grad(out, (x, w), g, allow_unused=True)

    plain = run()
    with mode.batch_invariant_backward_mode():
        ours = run()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_products_and_norms_have_the_bits_of_the_named_operators(device, on):
    x, w, b = (torch.randn(*s, device=device).bfloat16() for s in ((2, 9, 40), (24, 40), (24,)))
    expected = matmul.linear(x, w, b)
    assert torch.equal(F.linear(x, w, b), expected)
    # However torch takes F.linear apart: addmm for two dimensions, a product and an addition for a strided batch.
    assert torch.equal(F.linear(x[1], w, b), expected[1])
    assert torch.equal(F.linear(x.transpose(0, 1).contiguous().transpose(0, 1), w, b), expected)
    assert torch.equal(F.rms_norm(x, (40,), w[0], 1e-6), norm.rms_norm(x, w[0]))
    out = torch.empty(9, 24, device=device, dtype=x.dtype)
    assert torch.equal(torch.mm(x[0], w.t(), out=out), matmul.mm(x[0], w.t()))


def test_attention_takes_torchs_layouts(device):
    q, k = torch.randn(2, 4, 6, 16, device=device), torch.randn(2, 2, 6, 16, device=device)
    for args in ({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True, "scale": 0.3}):
        plain = F.scaled_dot_product_attention(q, k, k, **args)
        with mode.batch_invariant_backward_mode():
            ours = F.scaled_dot_product_attention(q, k, k, **args)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_autocast_is_served(block, ids, device):
    with torch.autocast(device.type, torch.bfloat16):
        plain = block(ids)
        with mode.batch_invariant_backward_mode():
            ours = block(ids)
            assert bits_equal(block(ids[:1]), ours[:1])
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)


def test_a_missing_eps_is_torchs(device):
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(4, 8, device=device) * 1e-2).to(dtype)
        plain = F.rms_norm(x, (8,))
        with mode.batch_invariant_backward_mode():
            torch.testing.assert_close(F.rms_norm(x, (8,)), plain)


def test_inference_mode_is_served(device, on):
    linear = nn.Linear(8, 5, device=device)
    x = torch.randn(2, 3, 8, device=device)
    with torch.inference_mode():
        assert torch.equal(linear(x), matmul.linear(x, linear.weight, linear.bias))
        torch.testing.assert_close(F.softmax(x, -1).sum(-1), torch.ones(2, 3, device=device))


def test_integers_pass(device, on):
    x = torch.arange(6, device=device)
    assert (x.sum(), x.cumsum(0)[-1], (x > 2).sum()) == (15, 15, 3)
    assert x.sum(dtype=torch.float32) == 15
    assert x.float().mean() == 2.5


# --------------------------------------------------------------------------------------------------------------
# what cannot be served

RAISES = {
    "linalg_inv_ex": lambda x: torch.linalg.inv(x[:, :6]),
    "_linalg_svd": lambda x: torch.linalg.svdvals(x),
    "scatter_reduce": lambda x: x.scatter_reduce(1, torch.zeros(6, 8, dtype=torch.long, device=x.device), x, "prod"),
    "scatter": lambda x: x.scatter(1, torch.zeros(6, 8, dtype=torch.long, device=x.device), x, reduce="multiply"),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, 6, 8), x.view(1, 1, 6, 8), x.view(1, 1, 6, 8), dropout_p=0.5
    ),
    "embedding_dense_backward": lambda x: (
        F.embedding(torch.zeros(3, dtype=torch.long, device=x.device), x, scale_grad_by_freq=True).sum().backward()
    ),
    "mm": lambda x: x.double() @ x.double().t(),
    "fft": lambda x: torch.fft.fft(x),
}


@pytest.mark.filterwarnings("ignore:The reduce argument")
@pytest.mark.parametrize("name", RAISES)
def test_what_cannot_be_served_raises(name, device):
    x = torch.randn(6, 8, device=device).requires_grad_()
    with (
        mode.batch_invariant_backward_mode(),
        pytest.raises(NotImplementedError, match=r"batch-invariant mode: .* on "),
    ):
        RAISES[name](x)
    with mode.batch_invariant_backward_mode(), mode.batch_invariant_backward_mode(enabled=False):
        RAISES[name](x)  # the way out that the message names


def test_the_error_names_operator_shapes_and_way_out(device, on):
    with pytest.raises(NotImplementedError) as error:
        torch.linalg.inv(torch.randn(8, 8, device=device))
    for part in ("aten::linalg_inv_ex", "float32[8, 8]", "allow_operator", "enabled=False"):
        assert part in str(error.value)


def test_a_foreign_operator_raises_until_it_is_vouched_for(device, on, monkeypatch):
    @torch.library.custom_op("bi_ops_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.ones(3, device=device)
    with pytest.raises(NotImplementedError, match=r"bi_ops_test::double.*allow_operator"):
        double(x)
    monkeypatch.setattr("bi_ops.mode.allowlist.trusted_operators", set())
    mode.allow_operator("bi_ops_test::double")
    assert torch.equal(double(x), 2 * x)
    with pytest.raises(ValueError, match="namespace::operator"):
        mode.allow_operator("double")


def test_the_parts_of_a_tensor_subclass_are_seen(device, on):
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

        def __init__(self, inner):
            self.whole = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
            return func(*(a.whole if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))

    a, b = torch.randn(4, 8, device=device), torch.randn(8, 5, device=device)
    assert torch.equal(torch.mm(Wrapped(a), b), matmul.mm(a, b))
    with pytest.raises(NotImplementedError, match="fft"):
        torch.fft.fft(Wrapped(a))


def test_other_devices_pass(on):
    x = torch.randn(4, 8, device="meta")
    assert F.layer_norm(x, (8,)).shape == (4, 8)


# --------------------------------------------------------------------------------------------------------------
# switching


def test_nesting_is_counted():
    enabled = mode.is_batch_invariant_backward_mode_enabled
    assert not enabled()
    mode.enable_batch_invariant_backward_mode()
    with mode.batch_invariant_backward_mode():
        assert enabled()
        with mode.batch_invariant_backward_mode(enabled=False):
            assert not enabled()
            with mode.batch_invariant_backward_mode():
                assert enabled()
            assert not enabled()
    assert enabled()
    mode.disable_batch_invariant_backward_mode()
    assert not enabled()
    with pytest.raises(RuntimeError, match="without a matching enable"):
        mode.disable_batch_invariant_backward_mode()


def test_an_exception_leaves_no_mode_behind(device):
    with pytest.raises(NotImplementedError), mode.batch_invariant_backward_mode():
        torch.fft.fft(torch.ones(3, device=device))
    assert not mode.is_batch_invariant_backward_mode_enabled()
    torch.fft.fft(torch.ones(3, device=device))


def test_disabling_under_another_mode_raises(device):
    mode.enable_batch_invariant_backward_mode()
    with (
        torch.device(device),
        pytest.raises(RuntimeError, match="entered after"),
        torch.overrides.BaseTorchFunctionMode(),
    ):
        mode.disable_batch_invariant_backward_mode()
    mode.disable_batch_invariant_backward_mode()


def test_the_mode_belongs_to_one_thread(device, on):
    seen = []

    def other():
        seen.append(mode.is_batch_invariant_backward_mode_enabled())
        torch.fft.fft(torch.ones(3, device=device))
        with mode.batch_invariant_backward_mode():
            seen.append(mode.is_batch_invariant_backward_mode_enabled())
        seen.append(torch.bmm is torch._C._VariableFunctions.bmm)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [False, True, True]
    assert mode.is_batch_invariant_backward_mode_enabled()


def test_autograds_thread_runs_under_the_mode(device):
    """On a GPU backward runs in a thread of autograd's own; it inherits the mode."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append((threading.get_ident(), mode.is_batch_invariant_backward_mode_enabled()))
            with pytest.raises(NotImplementedError):
                torch.fft.fft(g)
            return g

    x = torch.ones(3, device=device).requires_grad_()
    with mode.batch_invariant_backward_mode():
        Spy.apply(x).sum().backward()
    assert [on for _, on in seen] == [True]
    if not runtime.INTERPRET:
        assert seen[0][0] != threading.get_ident()


def test_checkpointed_code_is_recomputed_under_the_mode(block, ids, on):
    block.bfloat16()
    x = torch.randn(BATCH, DIM, device=ids.device).bfloat16().requires_grad_()

    def fn(x):
        q = block.norm1(x).view(BATCH, 1, HEADS, -1).transpose(1, 2)
        return block.out(F.scaled_dot_product_attention(q, q, q).reshape(BATCH, DIM))

    plain = torch.autograd.grad(fn(x).float().sum(), x)
    for reentrant in (False, True):
        again = torch.utils.checkpoint.checkpoint(fn, x, use_reentrant=reentrant).float().sum()
        x.grad = None
        again.backward()
        assert x.grad is not None
        assert torch.equal(x.grad, plain[0])


# --------------------------------------------------------------------------------------------------------------
# beside vLLM: its init_batch_invariance replaces torch.bmm and registers aten kernels


def vllm_bmm(a, b, *, out=None):
    assert a.ndim == 3
    return torch.empty(a.shape[0], a.shape[1], b.shape[2], device=a.device).zero_()


def vllm_softmax(input, dim, dtype=None):
    top = torch.amax(input, dim=dim, keepdim=True)
    e = torch.exp(input - top)
    return e / torch.sum(e, dim=dim, keepdim=True)


@pytest.fixture
def vllm_init(monkeypatch):
    """Does what vLLM's init_batch_invariance does to torch; undone after the test."""
    monkeypatch.setattr(torch, "bmm", torch.bmm)
    library = torch.library.Library("aten", "IMPL")

    def init():
        key = "CPU" if runtime.INTERPRET else "CUDA"
        library.impl("softmax.int", vllm_softmax, key)
        library.impl("_log_softmax", lambda x, dim, half: vllm_softmax(x, dim).log(), key)
        monkeypatch.setattr(torch, "bmm", vllm_bmm)

    yield init
    library._destroy()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.*[Oo]verrid.*")
def test_works_with_vllms_patches_in_either_order(vllm_init, order, device):
    a = torch.randn(2, 3, 8, device=device).requires_grad_()
    expected = (matmul.bmm(a.detach(), a.detach().mT), torch.softmax(a.detach(), -1))
    if order == "before":
        vllm_init()
    mode.enable_batch_invariant_backward_mode()
    if order == "after":
        vllm_init()
        torch.zeros(1, device=device)
    try:
        product, soft = torch.bmm(a, a.mT), F.softmax(a, -1)
        assert torch.equal(product, expected[0])
        torch.testing.assert_close(soft, expected[1])
        (grad,) = torch.autograd.grad(product.sum() + soft.pow(2).sum() + F.log_softmax(a, -1).sum(), a)
        assert grad.abs().sum() > 0
        assert torch.bmm is torch._C._VariableFunctions.bmm
        # What reaches aten::softmax past F.softmax has lost its gradient: that is an error, not a wrong number.
        with pytest.raises(NotImplementedError, match="without a gradient"):
            F.softmin(a, -1)
    finally:
        mode.disable_batch_invariant_backward_mode()
    assert torch.bmm is vllm_bmm


def test_the_first_call_of_a_replaced_bmm_raises(vllm_init, device, on):
    a = torch.randn(2, 3, 8, device=device)
    vllm_init()
    with pytest.raises(RuntimeError, match=r"call torch\.bmm again"):
        torch.bmm(a, a.mT)  # looked up before a.mT lets the mode see that it was replaced
    assert torch.equal(torch.bmm(a, a.mT), matmul.bmm(a, a.mT))


REAL_VLLM = """
import bi_ops, torch
from bi_ops import matmul, mode
from bi_ops.core import vllm
batch_invariant, stock = vllm.batch_invariant_module(), torch.bmm
theirs = batch_invariant.bmm_batch_invariant if vllm.require("the test").replaces_bmm else stock
if {first}:
    batch_invariant.enable_batch_invariant_mode()
    assert torch.bmm is theirs
mode.enable_batch_invariant_backward_mode()
if not {first}:
    batch_invariant.enable_batch_invariant_mode()
a = torch.randn(2, 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
out = torch.bmm(a, a.mT)
assert torch.equal(out, matmul.bmm(a, a.mT))
soft = torch.nn.functional.softmax(out, -1) + torch.log_softmax(out, -1) + out.mean(-1, keepdim=True)
(grad,) = torch.autograd.grad((soft * torch.arange(16, device="cuda")).float().sum(), a)
assert grad.isfinite().all() and grad.abs().sum() > 0
mode.disable_batch_invariant_backward_mode()
assert torch.bmm is theirs
"""


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("first", [True, False])
def test_works_with_the_real_vllm_in_either_order(first):
    """In a process of its own: what vLLM registers cannot be taken back."""
    done = subprocess.run(
        [sys.executable, "-c", REAL_VLLM.format(first=first)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------------------
# torch.compile


def softmax_sum(x):
    return F.softmax(x, -1).pow(2).sum(-1)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_function_runs_eagerly_under_the_mode(warm, device):
    torch._dynamo.reset()
    compiled = torch.compile(softmax_sum, backend="aot_eager")
    x = torch.randn(4, 8, device=device).requires_grad_()
    if warm:
        compiled(x)
    with mode.batch_invariant_backward_mode():
        assert torch.equal(compiled(x), softmax_sum(x))
        ours, theirs = torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(softmax_sum(x).sum(), x)
        assert torch.equal(ours[0], theirs[0])
        with pytest.raises(NotImplementedError):
            torch.compile(lambda x: torch.fft.fft(x), backend="aot_eager")(x)


def test_a_fullgraph_function_never_runs_outside_the_contract(device):
    """Newer torch refuses it; older torch runs it eagerly, where every operator is seen."""
    torch._dynamo.reset()
    x = torch.randn(40, 3000, device=device)
    with mode.batch_invariant_backward_mode():
        expected = softmax_sum(x)
        try:
            assert torch.equal(torch.compile(softmax_sum, backend="aot_eager", fullgraph=True)(x), expected)
        except RuntimeError as error:
            assert "fullgraph" in str(error)  # noqa: PT017
        with pytest.raises(RuntimeError):
            torch.compile(lambda x: torch.fft.fft(x), backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_the_backward_of_a_compiled_forward_raises(device):
    torch._dynamo.reset()
    x = torch.randn(4, 8, device=device).requires_grad_()
    loss = torch.compile(softmax_sum, backend="aot_eager")(x).sum()
    with mode.batch_invariant_backward_mode():
        calls = [lambda: loss.backward(), lambda: torch.autograd.grad(loss, x)]
        if "has_torch_function" in inspect.getsource(torch.autograd.backward):  # older torch hides it from modes
            calls.append(lambda: torch.autograd.backward(loss))
        for call in calls:
            with pytest.raises(NotImplementedError, match="compiled before"):
                call()
    loss.backward()
