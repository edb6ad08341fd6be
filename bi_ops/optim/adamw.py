"""AdamW as one pass over all parameters."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bi_ops.core import checks
from bi_ops.core.operators import on_device_of_first
from bi_ops.core.triton_helpers import PINNED
from bi_ops.optim import config as configs
from bi_ops.optim import tables
from bi_ops.optim.config import ElementwiseConfig
from bi_ops.optim.kernels import adamw_kernel
from bi_ops.optim.ops import check_capture, check_dense, is_aligned, is_dense

OP = "AdamW"

#: What torch.optim.AdamW can do besides, and why this one refuses it.
REFUSED = {
    "amsgrad": "the kernel keeps no maximum of exp_avg_sq",
    "maximize": "negate the loss instead",
    "foreach": "one kernel does all parameters already",
    "fused": "one kernel does all parameters already, in the order of torch's foreach=False",
    "capturable": "the step count is kept on the host, and a CUDA graph would replay it",
    "differentiable": "the update is made in place",
}


class Hyper(NamedTuple):
    """The numbers of one launch, as the kernel takes them; fp32 each, rounded where torch rounds them."""

    decay: float
    lerp: float
    beta2: float
    one_minus_beta2: float
    rsqrt_bias2: float
    eps: float
    minus_step: float
    has_decay: bool
    lerp_back: bool

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> Hyper:
        """Those of a parameter group at its `step`-th step, counted from 1."""
        lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
        weight = np.float32(1 - beta1)
        back = not abs(weight) < 0.5
        return cls(
            decay=1 - lr * weight_decay,
            lerp=float(-(np.float32(1) - weight) if back else weight),
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            rsqrt_bias2=float(np.float32(1 / (1 - beta2**step) ** 0.5)),
            eps=group["eps"],
            minus_step=-(lr / (1 - beta1**step)),
            has_decay=weight_decay != 0,
            lerp_back=back,
        )


class Tensors(NamedTuple):
    """What one parameter's update touches: its fp32 values, the gradient, exp_avg, exp_avg_sq, and a bf16 copy."""

    p: torch.Tensor
    g: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    copy: torch.Tensor | None

    def pointers(self) -> tuple[int, ...]:
        copy = 0 if self.copy is None else self.copy.data_ptr()
        return (self.p.data_ptr(), self.g.data_ptr(), self.m.data_ptr(), self.v.data_ptr(), copy)


@on_device_of_first
def launch_adamw(
    first: torch.Tensor,
    tensors: Sequence[Tensors],
    hyper: Hyper,
    scale: torch.Tensor | None,
    zero_grad: bool,
    config: ElementwiseConfig,
) -> None:
    """One step of checked tensors of one device, one or more."""
    groups: dict[bool, list[tuple[Tensors, tuple[int, ...]]]] = {}
    for t in tensors:
        if numel := t.p.numel():
            pointers = t.pointers()
            groups.setdefault(is_aligned(functools.reduce(operator.or_, pointers), numel), []).append((t, pointers))
    for aligned, group in groups.items():
        numels = tuple(t.p.numel() for t, _ in group)
        sizes, tiles = tables.elementwise(numels, config.block * config.blocks, first.device)
        adamw_kernel[(len(tiles),)](
            tables.addresses(tuple(itertools.chain.from_iterable(pointers for _, pointers in group)), first.device),
            sizes,
            tiles,
            scale,
            *hyper[:7],
            BLOCK=config.block,
            BLOCKS=config.blocks,
            ALIGNED=aligned,
            HAS_SCALE=scale is not None,
            HAS_DECAY=hyper.has_decay,
            HAS_COPY=any(t.copy is not None for t, _ in group),
            LERP_BACK=hyper.lerp_back,
            ZERO_GRAD=zero_grad,
            num_warps=config.num_warps,
            **PINNED,
        )


def _check_hyper(group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for numbers that AdamW is not defined for."""
    lr, betas, eps, weight_decay = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{OP}: betas must be two numbers, got {betas!r}")
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1]), ("eps", eps)):
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a number, got a tensor {list(value.shape)}; use float(...)")
        checks.real(OP, name, value)
    checks.real(OP, "weight_decay", weight_decay)
    for name, ok, value in (
        ("lr", lr >= 0, lr),
        ("eps", eps >= 0, eps),
        ("betas", all(0 <= b < 1 for b in betas), betas),
        ("weight_decay", weight_decay >= 0, weight_decay),
    ):
        if not ok:
            raise ValueError(f"{OP}: {name} is {value}; lr, eps and weight_decay are 0 or more, betas in [0, 1)")


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for what this optimizer does not do."""
    for name, reason in REFUSED.items():
        if (given := options.get(name)) is not None and given is not False:
            raise ValueError(f"{OP}: {name}={options[name]} is not supported: {reason}; use torch.optim.AdamW for it")


class AdamW(torch.optim.Optimizer):
    """AdamW: decoupled weight decay (Loshchilov and Hutter, 2019), all parameters in one kernel.

    `bi_ops.rl.Trainer` uses it. The order is that of ``torch.optim.AdamW(foreach=False, fused=False)`` on a CUDA
    device in fp32 (fma: rounded once)::

        g = g * grad_scale
        p = p * (1 - lr * weight_decay)
        m = fma(1 - beta1, g - m, m)                      # Tensor.lerp_; at beta1 <= 0.5 fma(-beta1, g - m, g)
        v = fma(1 - beta2, g * g, v * beta2)              # Tensor.mul_, Tensor.addcmul_
        d = sqrt(v) * (1 / sqrt(1 - beta2**step)) + eps   # the reciprocal of a number is taken in fp64
        p = fma(-lr / (1 - beta1**step), m / d, p)        # Tensor.addcdiv_

    torch's CPU kernels take other products first in the last three lines, so there the two agree in all but the last
    bits. Every element is computed for itself: no config changes a bit, nor does any split of a parameter.

    `state_dict` is torch's: either optimizer loads the other's. `state` has step (fp32 [] on the CPU), exp_avg and
    exp_avg_sq. The host never waits for the GPU. An update reads 16 bytes a parameter and writes 12, besides 2 for a
    bf16 copy and 4 for a gradient that is zeroed.

    Args:
        params, lr, betas, eps, weight_decay: as torch's; numbers, no tensors. Parameters are fp32 and contiguous.
        bf16_copies: for a parameter the bf16 tensor of its shape that gets its rounded value in the same pass, such as
            the weight an engine computes with. Also an attribute; not part of the state. None: none.
        amsgrad, maximize, foreach, fused, capturable, differentiable: refused unless False or None.

    Raises:
        TypeError, ValueError: options that are refused, numbers out of range, or a copy of no parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bf16_copies: Mapping[Any, torch.Tensor] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if bf16_copies is not None and not isinstance(bf16_copies, Mapping):
            raise TypeError(f"{OP}: bf16_copies must map parameters to tensors, got {type(bf16_copies).__name__}")
        # The keys of torch's groups, so that torch.optim.AdamW reads them, with the one path whose order is kept.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": False if foreach is None else foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": False if fused is None else fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        self.bf16_copies: dict[torch.Tensor, torch.Tensor] = dict(bf16_copies or {})
        self.masters: dict[torch.Tensor, torch.Tensor] = {}
        known = {p for group in self.param_groups for p in group["params"]}
        for t in self.bf16_copies:
            if t not in known:
                raise ValueError(f"{OP}: bf16_copies has a copy for a tensor {list(t.shape)} that is no parameter here")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("masters", {})
        self.__dict__.setdefault("bf16_copies", {})  # of an unpickled or copied optimizer: no engine has its weights

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises TypeError or ValueError for options that are refused, or numbers out of range."""
        group = {**self.defaults, **param_group}
        _check_options(group)
        _check_hyper(group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; takes the state of torch.optim.AdamW too, however that one ran.

        Raises:
            ValueError: a state that needs amsgrad, maximize or differentiable, or another set of parameters.
        """
        for group in state_dict["param_groups"]:
            _check_options({name: group.get(name) for name in ("amsgrad", "maximize", "differentiable")})
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update({name: self.defaults[name] for name in (*REFUSED, "decoupled_weight_decay")})
        for state in self.state.values():
            if torch.is_tensor(state.get("step")):  # fused and capturable optimizers keep it on the GPU
                state["step"] = state["step"].to("cpu", torch.float32)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: torch.Tensor | None = None,
        zero_grad: bool = False,
    ) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: called first, with gradients enabled. grad_scale: fp32 [] on the parameters' device; multiplies
                every gradient before anything else, as `clip_grad_norm_` would. The gradient itself stays as it is.
            zero_grad: fill the gradients with zeros in the same pass.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a parameter, gradient, moment or copy that is not contiguous, of its dtype (fp32; a
                copy bf16), of the parameter's shape and on its device. RuntimeError: while a CUDA graph is captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches: dict[tuple[torch.device, Hyper], list[Tensors]] = {}
        steps: list[torch.Tensor] = []
        for i, group in enumerate(self.param_groups):
            _check_hyper(group)
            hypers: dict[float, Hyper] = {}
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                tensors = self._tensors(p, i, j)
                step = self.state[p]["step"].item() + 1
                if step not in hypers:
                    hypers[step] = Hyper.of(group, step)
                launches.setdefault((p.device, hypers[step]), []).append(tensors)
                steps.append(self.state[p]["step"])
        for device, _ in launches:
            check_capture(OP, device)
            if grad_scale is not None:
                check_dense(OP, lambda: "grad_scale", grad_scale)
                if grad_scale.numel() != 1 or grad_scale.device != device:
                    raise ValueError(
                        f"{OP}: grad_scale is {list(grad_scale.shape)} on {grad_scale.device}; it must be one number "
                        f"on {device}, where the parameters are"
                    )
        # From here on nothing is refused: a step is made by all parameters or by none.
        if steps:
            torch._foreach_add_(steps, 1)
        for (_, hyper), every in launches.items():
            written = [t for entry in every for t in (entry.p, entry.m, entry.v, entry.copy) if t is not None]
            torch.autograd.graph.increment_version(written + [entry.g for entry in every if zero_grad])
            self._launch(every[0].g.device, every, hyper, grad_scale, zero_grad)
        return loss

    def set_state(self, p: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Give `p` a state: step, exp_avg and exp_avg_sq, each put where `step` wants it."""
        self.state[p] = {k: v.to("cpu" if k == "step" else p.device) for k, v in values.items()}

    # What `OffloadedAdamW` does in another way.

    def _new_moment(self, p: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(p)

    def _of(self, p: torch.Tensor) -> Tensors:
        """What the update of `p` touches, where it lies."""
        assert p.grad is not None
        return Tensors(p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], self.bf16_copies.get(p))

    def _on_host(self, p: torch.Tensor) -> list[torch.Tensor]:
        """What of that waits in host memory."""
        return []

    def _launch(
        self,
        device: torch.device,
        every: Sequence[Tensors],
        hyper: Hyper,
        scale: torch.Tensor | None,
        zero_grad: bool,
    ) -> None:
        launch_adamw(every[0].p, every, hyper, scale, zero_grad, configs.elementwise())

    def _tensors(self, p: torch.Tensor, group: int, index: int) -> Tensors:
        """What the update of `p` touches, checked; its state is made where there is none."""
        state = self.state[p]
        if not state:
            if p not in self.masters:
                check_dense(OP, lambda: f"parameter {index} of group {group}", p)
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = self._new_moment(p), self._new_moment(p)
        found = self._of(p)
        for name, t in zip(("", "grad of ", "exp_avg of ", "exp_avg_sq of ", "bf16 copy of "), found, strict=True):
            if t is None:
                continue
            dtype = torch.bfloat16 if t is found.copy else torch.float32
            if is_dense(t, dtype) and t.shape == p.shape and t.device == p.device:
                continue  # nearly always; what follows says what is wrong

            def called(name: str = name) -> str:
                return f"{name}parameter {index} of group {group}"

            device = p.device
            if any(t is waiting for waiting in self._on_host(p)):
                device = torch.device("cpu")
            else:
                check_dense(OP, called, t, dtype)
            if t.shape != p.shape or t.device != device:
                raise ValueError(
                    f"{OP}: {called()} is {list(t.shape)} on {t.device}; it must be {list(p.shape)} on {device}"
                )
        return found
