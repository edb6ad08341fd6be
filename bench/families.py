"""Tiny models of transformers' families under the mode, on the CPU: right, or refused by name. Writes families.json.

    python bench/families.py --out bench/results/cpu [--families Llama Mistral] [--dtypes float32]

Every family runs in fp32 with torch's attention (sdpa) and its own (eager), and in bf16 with torch's. The sequences are
longer than the windows of those that have some. What is asked of each:

    forward, backward   errors of logits and of all gradients against fp64 at most twice torch's in the same dtype; the
                        same bits again on a second run; a row alone has the bits of the row in the batch
    left padding        the same of a batch whose rows are padded on the left, alone under the same padding
    generate            greedy tokens of that batch are torch's, and those of each row alone (sdpa, fp32)
    converted           after `bi_ops.nn.convert`, what it leaves allowed: logits and gradients have the mode's bits

Rows of other families in the file stay. Exit status 1 if something is wrong; refused is not wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ATEN_CPU_CAPABILITY", "default")  # before torch; see docs/limits.md, "Without a GPU"

from record import provenance

import bi_ops  # before triton  # isort: skip
import torch
import transformers
from torch.overrides import TorchFunctionMode

from bi_ops.core.files import write_json
from bi_ops.nn import convert

#: Sizes under their usual names, and what a family adds or calls otherwise. None: not given.
SIZES: dict[str, Any] = {
    **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "initializer_range": 0.2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64, "n_inner": 48}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 2},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Qwen2": ("Qwen2ForCausalLM", {"head_dim": None}),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "Gemma2": ("Gemma2ForCausalLM", {"sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 2}),
    "Gemma3": (
        "Gemma3ForCausalLM",
        {"sliding_window": 4, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "num_hidden_layers": 2},
    ),
    "Phi3": ("Phi3ForCausalLM", {"head_dim": None, "sliding_window": 4}),
    "OLMo2": ("Olmo2ForCausalLM", {"head_dim": None}),
    "Granite": ("GraniteForCausalLM", {"head_dim": None}),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"num_key_value_heads": None, "head_dim": None}),
    "Falcon": ("FalconForCausalLM", {"num_kv_heads": 1, "ffn_hidden_size": 48, "head_dim": None}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {**EXPERTS, **LATENT, "head_dim": None}),
}
#: Families for which transformers has no sdpa.
EAGER_ALONE = ("Gemma2",)
WIDTH, LENGTHS = 9, (8, 5)  # every row has padding: transformers leaves out the mask of a batch without any
NEW_TOKENS = 2
CHECKS = {
    ("float32", "sdpa"): ("forward", "backward", "left padding", "generate", "converted"),
    ("float32", "eager"): ("forward", "backward", "left padding"),
    ("bfloat16", "sdpa"): ("forward", "backward"),
}

Tensors = dict[str, torch.Tensor]


class InFp64(TorchFunctionMode):
    """Models compute norms and softmax in fp32 whatever their dtype; inside this mode, in fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{n: torch.float64 if a is torch.float32 else a for n, a in (kwargs or {}).items()})


class Wrong(AssertionError):
    """A result that is not what it has to be."""


def make(family: str, attention: str) -> torch.nn.Module:
    """The tiny model in fp64, its weights drawn anew from one seed, norms included."""
    name, changes = FAMILIES[family]
    model_class = getattr(transformers, name)
    given = {n: v for n, v in (SIZES | changes).items() if v is not None or n.endswith("token_id")}
    config = model_class.config_class(**given)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # grouped GEMMs know no fp64
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:  # or ones and zeros would hide a norm's weight and a bias
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [2, 9], attention_mask): rows of LENGTHS, padded on the left."""
    ids = torch.randint(1, SIZES["vocab_size"], (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(2))
    mask = torch.stack([torch.arange(WIDTH) >= WIDTH - n for n in LENGTHS]).long()
    return ids * mask, mask


def batch(padded: bool) -> Tensors:
    """What the model is called with; without padding, all tokens are tokens."""
    ids, mask = tokens()
    if not padded:
        return {"input_ids": ids.clamp(min=1)}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def forward(model: torch.nn.Module, inputs: Tensors) -> torch.Tensor:
    """Logits [B, T, V]; 0 where a token is padding."""
    logits = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits.where(mask[..., None] > 0, 0.0)


def gradients(model: torch.nn.Module, inputs: Tensors) -> Tensors:
    """Of every parameter that has one, under a cotangent that is the same in every dtype."""
    model.zero_grad()
    logits = forward(model, inputs)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).to(logits)
    (logits * cotangent).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(found: Tensors, exact: Tensors) -> float:
    """The relative Frobenius error of all tensors together."""
    if found.keys() != exact.keys():
        raise Wrong(f"gradients of {sorted(found.keys() ^ exact.keys())} on one side alone")
    off = sum(float((found[n].double() - exact[n]).square().sum()) for n in exact)
    return (off / sum(float(t.square().sum()) for t in exact.values())) ** 0.5


def governed(call: Callable[[], Any]) -> Any:
    with bi_ops.batch_invariant_backward_mode():
        return call()


def require(ok: bool, what: str) -> None:
    if not ok:
        raise Wrong(what)


def check_values(ours: Callable[[], Tensors], plain: Tensors, exact: Tensors) -> Tensors:
    """`ours` under the mode, twice: the same bits, and at most twice the error of `plain`."""
    found, again = governed(ours), governed(ours)
    require(all(torch.equal(found[n], again[n]) for n in found), "other bits on a second run")
    got, bound = error(found, exact), max(2 * error(plain, exact), 2.0**-22)
    require(got <= bound, f"error {got:.2e}, the bound is {bound:.2e}")
    return found


class Case:
    """One family, attention and dtype."""

    def __init__(self, family: str, attention: str, dtype: str) -> None:
        self.exact = make(family, attention)
        self.model = copy.deepcopy(self.exact).to(getattr(torch, dtype))

    def check_forward(self, padded: bool = False) -> None:
        inputs = batch(padded)
        with torch.no_grad():
            plain = {"logits": forward(self.model, inputs)}
            with InFp64():
                exact = {"logits": forward(self.exact, inputs)}
            whole = check_values(lambda: {"logits": forward(self.model, inputs)}, plain, exact)["logits"]
            for i in range(1, len(LENGTHS)):  # the first one's place is what it has alone
                row = {n: t[i : i + 1] for n, t in inputs.items()}
                alone = governed(partial(forward, self.model, row))
                require(torch.equal(alone[0], whole[i]), f"row {i} alone has other bits than in the batch")

    def check_backward(self, padded: bool = False) -> None:
        inputs = batch(padded)
        plain = gradients(self.model, inputs)
        with InFp64():
            exact = gradients(self.exact, inputs)
        check_values(lambda: gradients(self.model, inputs), plain, exact)

    def check_left_padding(self) -> None:
        self.check_forward(padded=True)
        self.check_backward(padded=True)

    def check_generate(self) -> None:
        ids, mask = tokens()

        def generate(rows: slice = slice(None)) -> torch.Tensor:
            inputs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
            return self.model.generate(**inputs, **options)[:, ids.shape[1] :]  # type: ignore[operator]

        expected, found = generate(), governed(generate)
        alone = torch.cat([governed(partial(generate, slice(i, i + 1))) for i in range(len(LENGTHS))])
        require(torch.equal(found, alone), "a row alone goes on with other tokens than in the batch")
        require(torch.equal(found, expected), f"tokens {found.tolist()}, torch's are {expected.tolist()}")

    def check_converted(self) -> None:
        converted, inputs = copy.deepcopy(self.model), batch(False)
        convert(converted, allow=unconverted(converted))
        expected, found = (governed(partial(gradients, m, inputs)) for m in (self.model, converted))
        with torch.no_grad():
            logits = [governed(partial(forward, m, inputs)) for m in (self.model, converted)]
        require(torch.equal(*logits), "logits have other bits than the mode's")
        off = [n for n in expected if not torch.equal(expected[n], found[n])]
        require(not off, f"gradients of {', '.join(off)} have other bits than the mode's")

    def run(self, check: str) -> str:
        """ "right", "refused: ..." or "wrong: ..."; what else is raised goes through."""
        try:
            getattr(self, f"check_{check.replace(' ', '_')}")()
        except NotImplementedError as e:
            return f"refused: {' '.join(str(e).split())}"
        except Wrong as e:
            return f"wrong: {e}"
        return "right"


def unconverted(model: torch.nn.Module) -> list[str]:
    """The classes that `convert` names in its error: the family's own norms, routers and experts."""
    try:
        convert(copy.deepcopy(model))
    except ValueError as e:
        return [line.split(": ")[1] for line in str(e).splitlines() if line.startswith("  ")]
    return []


def measure(family: str, dtypes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for (dtype, attention), checks in CHECKS.items():
        if dtype not in dtypes or (attention == "eager" and family in EAGER_ALONE):
            continue
        used = "eager" if family in EAGER_ALONE else attention
        case = Case(family, used, dtype)
        results = {check: case.run(check) for check in checks}
        rows.append({"family": family, "dtype": dtype, "attention": used, "results": results})
        print(family, dtype, used, *(f"{c}: {r[:150]}" for c, r in results.items()), sep=" | ", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of families.json; without it nothing is written")
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = [row for family in args.families for row in measure(family, args.dtypes)]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "families.json"
        kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
        rows += [row for row in kept if row["family"] not in args.families]
        rows.sort(key=lambda row: list(FAMILIES).index(row["family"]))
        write_json(file, {**provenance(), "rows": rows})
    return int(any(r.startswith("wrong") for row in rows for r in row["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
