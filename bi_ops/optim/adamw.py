"""AdamW as one pass over all parameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bi_ops.core import checks, rounding
from bi_ops.core.operators import on_device_of_first
from bi_ops.core.triton_helpers import PINNED
from bi_ops.optim import config as configs
from bi_ops.optim import tables
from bi_ops.optim.config import ElementwiseConfig
from bi_ops.optim.kernels import adamw_kernel
from bi_ops.optim.ops import Checked, by_alignment, check_capture, check_dense, is_dense, pointers

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


class Columns(NamedTuple):
    """`Tensors` of many parameters, a list of each, which Python handles much sooner than a tuple per parameter."""

    p: list[torch.Tensor]
    g: list[torch.Tensor]
    m: list[torch.Tensor]
    v: list[torch.Tensor]
    copy: list[torch.Tensor | None]

    @classmethod
    def of(cls, each: Iterable[Tensors]) -> Columns:
        """Of one or more."""
        p, g, m, v, copy = zip(*each, strict=True)
        return cls(list(p), list(g), list(m), list(v), list(copy))

    def copies(self) -> list[torch.Tensor]:
        """Those that there are."""
        return [copy for copy in self.copy if copy is not None]

    def to_check(self) -> tuple[list[list[torch.Tensor]], list[bool]]:
        """All tensors, and which parameters have a copy; nothing where none has."""
        copies = self.copies()
        has = [copy is not None for copy in self.copy] if copies else []
        return [self.p, self.g, self.m, self.v, copies], has

    def chosen(self, which: Sequence[bool]) -> Columns:
        """Of some of the parameters, one or more."""
        return Columns.of(map(Tensors._make, itertools.compress(zip(*self, strict=True), which)))


@on_device_of_first
def launch_adamw(
    first: torch.Tensor,
    tensors: Columns,
    hyper: Hyper,
    scale: torch.Tensor | None,
    zero_grad: bool,
    config: ElementwiseConfig,
) -> None:
    """One step of checked tensors of one device, one or more."""
    table = np.zeros((len(tensors), len(tensors.p)), np.int64)
    table[:-1] = [pointers(column) for column in (tensors.p, tensors.g, tensors.m, tensors.v)]
    if copies := tensors.copies():
        table[-1, [copy is not None for copy in tensors.copy]] = pointers(copies)
    for aligned, addresses, numels in by_alignment(table, tensors.p):
        sizes, tiles = tables.elementwise(numels, config.block * config.blocks, first.device)
        adamw_kernel[(len(tiles),)](
            tables.addresses(addresses, first.device),
            sizes,
            tiles,
            scale,
            *hyper[:7],
            BLOCK=config.block,
            BLOCKS=config.blocks,
            ALIGNED=aligned,
            HAS_SCALE=scale is not None,
            HAS_DECAY=hyper.has_decay,
            HAS_COPY=bool(addresses[:, -1].any()),
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
            the weight an engine computes with, or those of `bi_ops.nn.keep_rounded_weights`. Also an attribute; not
            part of the state. None: none.
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
        self._checked: dict[int, Checked] = {}  # by group, the last tensors
        known = {p for group in self.param_groups for p in group["params"]}
        for t in self.bf16_copies:
            if t not in known:
                raise ValueError(f"{OP}: bf16_copies has a copy for a tensor {list(t.shape)} that is no parameter here")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("masters", {})
        self.__dict__.setdefault("_checked", {})
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
        launches: dict[tuple[torch.device, Hyper], Columns] = {}
        steps: list[torch.Tensor] = []
        for i, group in enumerate(self.param_groups):
            _check_hyper(group)
            params = group["params"]
            grads = [g for p in params if (g := p.grad) is not None]
            if not grads:
                continue
            if len(grads) < len(params):
                params = [p for p in params if p.grad is not None]
            states = self._states(params)
            tensors, devices = self._tensors_of(params, grads, states, i)
            counted = [state["step"] for state in states]
            counts = list(map(torch.Tensor.item, counted))
            steps += counted
            for device, count in itertools.product(devices, dict.fromkeys(counts)):
                part = tensors
                if len(devices) > 1 or counts.count(count) < len(counts):  # seldom
                    which = [p.device == device and c == count for p, c in zip(params, counts, strict=True)]
                    if not any(which):
                        continue
                    part = tensors.chosen(which)
                key = device, Hyper.of(group, count + 1)
                launches[key] = Columns(*map(operator.add, launches[key], part)) if key in launches else part
        for device, _ in launches:
            check_capture(OP, device)
            if grad_scale is not None:
                check_dense(OP, lambda: "grad_scale", grad_scale)
                if grad_scale.numel() != 1 or grad_scale.device != device:
                    raise ValueError(
                        f"{OP}: grad_scale is {list(grad_scale.shape)} on {grad_scale.device}; it must be one number "
                        f"on {device}, where the parameters are"
                    )
        # From here on nothing is refused: a step is made by all parameters or by none. First what the GPU waits for.
        if zero_grad:
            torch.autograd.graph.increment_version([g for part in launches.values() for g in part.g])
        for (device, hyper), part in launches.items():
            self._launch(device, part, hyper, grad_scale, zero_grad)
        for part in launches.values():
            torch.autograd.graph.increment_version(part.p + part.m + part.v + part.copies())
            for p, copy in zip(part.p, part.copy, strict=True):
                if copy is not None:
                    rounding.written(p, copy)
        if steps:
            torch._foreach_add_(steps, 1)
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

    def _states(self, params: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The state of each. Nearly always all are there, in this order; a tensor's hash is Python, one call each."""
        if len(self.state) == len(params) and all(map(operator.is_, self.state, params)):
            return list(self.state.values())
        return [self.state[p] for p in params]

    def _of_each(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: Sequence[dict[str, torch.Tensor]]
    ) -> Columns:
        """`_of` each, sooner."""
        moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        known = self.bf16_copies
        return Columns(params, grads, *moments, [known.get(p) for p in params] if known else [None] * len(params))

    def _on_host(self, p: torch.Tensor) -> list[torch.Tensor]:
        """What of that waits in host memory."""
        return []

    def _launch(
        self,
        device: torch.device,
        every: Columns,
        hyper: Hyper,
        scale: torch.Tensor | None,
        zero_grad: bool,
    ) -> None:
        launch_adamw(every.p[0], every, hyper, scale, zero_grad, configs.elementwise())

    def _tensors_of(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        group: int,
    ) -> tuple[Columns, list[torch.device]]:
        """What the updates of parameters of a group touch, checked, and their devices; empty states are filled."""
        checked = self._checked.get(group)
        if checked is not None and all(states):
            tensors = self._of_each(params, grads, states)
            if checked.passes(*tensors.to_check()):
                return tensors, checked.shared
        numbers = {p: i for i, p in enumerate(self.param_groups[group]["params"])}
        tensors = Columns.of(self._tensors(p, group, numbers[p]) for p in params)
        devices = list(dict.fromkeys(p.device for p in params))
        self._checked[group] = Checked(*tensors.to_check(), shared=devices)
        return tensors, devices

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
            if t is not found.g and t.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{OP}: {name}parameter {index} of group {group} {list(t.shape)} is an inference tensor, which "
                    "nothing may write outside of torch.inference_mode(); use .clone()"
                )
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
