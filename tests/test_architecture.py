"""Who may import whom: docs/architecture.md's rules, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = frozenset(p.parent.name for p in (ROOT / "bi_ops").glob("*/ops.py"))

#: Part of bi_ops to the parts that it may import besides itself.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "gluon": frozenset({"core"}),
    **dict.fromkeys(FAMILIES, frozenset({"core", "gluon"})),
    "nn": FAMILIES | {"core"},
    "mode": FAMILIES | {"core"},
    "vllm_plugin": FAMILIES | {"core", "models", "parallel"},
    "models": FAMILIES | {"core", "nn"},
    "verify": FAMILIES | {"", "core", "models", "nn"},
    "rollout": FAMILIES | {"core", "nn", "models", "vllm_plugin"},
    "parallel": frozenset({"core", "nn", "optim"}),
    "rl": frozenset({"core", "models", "optim", "parallel", "rollout", "verify"}),
    "commands": FAMILIES | {"", "core", "models", "nn", "parallel", "rollout", "rl", "verify"},
    "cli": frozenset({"", "commands"}),
    "__main__": frozenset({"cli"}),
    "": FAMILIES | {"core", "nn", "mode"},  # bi_ops/__init__.py
}

#: What an order may depend on: sizes along which is summed, and the dtype. Never a count of rows, tokens or sequences.
ORDER_MAY_TAKE = frozenset(
    {
        "k",
        "n",
        "head_dim",
        "hidden_size",
        "vocab_size",
        "dtype",
        "features",
        "paged",
        "over_tokens",
        "bias",
        "num_experts",
        "segments",
    }
)

#: Kernels, and the constants of each that shape a sum. A launch takes them from an order.
FROM_ORDER: dict[str, frozenset[str]] = {
    "matmul_kernel": frozenset({"BLOCK_K"}),
    "matmul_segments_kernel": frozenset({"BLOCK_K", "SEGMENTS"}),
    "matmul_segments_hopper_kernel": frozenset({"SEGMENTS"}),  # and the tensor cores' step of 16 elements
    "rms_norm_kernel": frozenset({"BLOCK", "num_warps"}),
    "rms_norm_dx_kernel": frozenset({"BLOCK", "num_warps"}),
    "rms_norm_dweight_kernel": frozenset({"CHUNK"}),
    "rms_norm_backward_kernel": frozenset({"BLOCK", "CHUNK", "num_warps"}),
    "qk_norm_rope_kernel": frozenset({"BLOCK", "num_warps"}),
    "qk_norm_rope_backward_kernel": frozenset({"BLOCK", "CHUNK", "SEGMENTS", "num_warps"}),
    "softmax_kernel": frozenset({"BLOCK", "num_warps"}),
    "softmax_dx_kernel": frozenset({"BLOCK", "num_warps"}),
    "token_logprobs_kernel": frozenset({"BLOCK", "num_warps"}),
    "row_token_logprobs_kernel": frozenset({"BLOCK", "num_warps"}),
    "shard_sums_kernel": frozenset({"BLOCK", "num_warps"}),
    "sampled_logprobs_kernel": frozenset({"FRACTION_BITS"}),
    "attention_kernel": frozenset({"BLOCK_N"}),
    "attention_forward_kernel": frozenset({"BLOCK_N"}),
    "attention_decode_kernel": frozenset({"BLOCK_N"}),
    "attention_delta_kernel": frozenset({"ROWS", "num_warps"}),
    "attention_dsinks_kernel": frozenset({"CHUNK"}),
    "attention_dq_kernel": frozenset({"BLOCK_N"}),
    "attention_dkv_kernel": frozenset({"BLOCK_R"}),
    "attention_prepare_kernel": frozenset({"BLOCK_M", "BLOCK_N"}),
    "attention_backward_kernel": frozenset({"BLOCK_M", "BLOCK_N"}),
    "sum_kernel": frozenset({"LANES", "LOG2_LANES", "SPAN"}),
    "square_sums_kernel": frozenset({"LANES", "LOG2_LANES", "SPAN"}),
    "grouped_matmul_kernel": frozenset({"BLOCK_K"}),
    "grouped_wgrad_kernel": frozenset({"BLOCK_T"}),
    "router_kernel": frozenset({"VECTOR", "LANES", "LOG2_LANES"}),
    "router_backward_kernel": frozenset({"VECTOR", "LANES", "LOG2_LANES"}),
    "expert_activation_backward_kernel": frozenset({"LANES", "LOG2_LANES"}),
}

#: Kernels that sum nothing, or one element after another whatever their constants.
NO_CONSTANT_SHAPES_A_SUM = frozenset(
    {
        *("rope_kernel", "embedding_kernel", "token_logprobs_dx_kernel", "sampled_logprobs_dx_kernel"),
        *("silu_and_mul_kernel", "silu_and_mul_backward_kernel", "write_cache_kernel"),
        *("pairwise_sum_kernel", "scale_kernel", "adamw_kernel"),
        *(
            "wgrad_kernel",
            "wgrad_tile_kernel",
            "decode_matmul_kernel",
        ),  # the tensor cores' step of 16 elements, whatever the tile
        *("attention_dq_hopper_kernel", "attention_dkv_hopper_kernel"),  # of one order, which `check_order` compares
        *("attention_add_chunks_kernel", "attention_clear_kernel", "lpt_order_kernel"),
        "tile_list_kernel",
        *("row_part_max_kernel", "shard_max_kernel"),
        "add_shards_kernel",  # chunks front to back, which are the whole row's however many shards there are
        *("embedding_backward_kernel", "add_touched_rows_kernel", "add_chunks_kernel", "qk_add_chunks_kernel"),
        *(
            "count_expert_kernel",
            "place_expert_kernel",
            "count_pairs_kernel",
            "chunk_starts_kernel",
            "expert_offsets_kernel",
            "place_pairs_kernel",
        ),
        *("gather_rows_kernel", "combine_rows_kernel", "expert_activation_kernel", "tile_table_kernel"),
        *("grouped_matmul_hopper_kernel", "grouped_wgrad_hopper_kernel"),
        "ordered_sum_kernel",  # a tree over ranks, which are subtrees of one whatever their number
        "gather_kernel",  # adds nothing
    }
)

#: Files of an operator folder that are nobody else's.
INNER = ("ops", "kernels", "schedule", "order", "config", "reference")

#: Imported inside the functions that need them.
OPTIONAL = frozenset({"vllm", "transformers", "flash_attn", "flash_attn_interface"})


@dataclass(frozen=True)
class Import:
    """One imported name. at_import: when the module itself is imported. checking: for the type checker only."""

    line: int
    name: str
    at_import: bool
    checking: bool


def imports(source: str, package: str = "") -> list[Import]:
    """Every import of a module, `from a import b` as a.b. package: what relative imports start from."""

    def walk(node: ast.AST, at_import: bool, checking: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, at_import, checking)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(child.lineno, f"{base}.{alias.name}", at_import, checking)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, False, checking)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(child, at_import, True)
            else:
                yield from walk(child, at_import, checking)

    return list(walk(ast.parse(source), True, False))


def part_of(name: str) -> str:
    """``bi_ops.matmul.ops.mm`` -> ``matmul``; "" for what bi_ops itself holds."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def broken_rules(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the root) imports against the rules."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    part = part_of(module)
    found = []
    for i in imports(source, package):
        where = f"{path}:{i.line} imports {i.name}"
        top = i.name.split(".")[0]
        if path.endswith("/reference.py") and top not in ("torch", "__future__", "math", "collections", "typing"):
            found.append(f"{where}: a reference imports torch alone")
        if i.at_import and not i.checking and top in OPTIONAL:
            found.append(f"{where}: import it inside the function that needs it")
        if top != "bi_ops" or i.checking:
            continue
        other = part_of(i.name)
        if other != part and other not in MAY_IMPORT[part]:
            found.append(f"{where}: {part or 'bi_ops'} may not import {other or 'bi_ops'}")
        inner = len(i.name.split(".")) > 3 or i.name.split(".")[-1] in INNER
        if other in FAMILIES and other != part and inner:
            found.append(f"{where}: outside its folder a family is known by its public names")
        if module.split(".")[2:3] == ["kernels"] and other == part and not i.name.startswith(f"bi_ops.{part}.kernels"):
            found.append(f"{where}: kernels know nothing of their launchers")
        own = {"schedule": ("schedule",), "order": ("order",), "config": ("order", "config")}.get(Path(path).stem)
        if part in FAMILIES and own and other == part and i.name.split(".")[2] not in own:
            found.append(f"{where}: orders and configs are pure choices")
    return found


def orders(source: str) -> dict[str, set[str]]:
    """The functions of a module that return an order, and what each takes; of `Problem`, its fields."""
    body = ast.parse(source).body
    functions = [n for n in body if isinstance(n, ast.FunctionDef)]
    problems = [n for n in body if isinstance(n, ast.ClassDef) and n.name == "Problem"]
    return {
        f.name: {a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)}
        for f in functions
        if f.returns is not None and ast.unparse(f.returns).endswith("Order")
    } | {c.name: {ast.unparse(n.target) for n in c.body if isinstance(n, ast.AnnAssign)} for c in problems}


def launches(source: str) -> list[tuple[str, dict[str | None, ast.expr]]]:
    """Every launch ``a_kernel[grid](...)``: the kernel, and the keywords; None for those that are unpacked.

    Whatever is indexed and called is one, but for a look-up in a TABLE of functions; ``recorded(k)`` is the kernel k.
    """
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    called = [(ast.unparse(c.func.value), c) for c in calls if isinstance(c.func, ast.Subscript)]
    called = [(name.removeprefix("recorded(").removesuffix(")"), c) for name, c in called]
    return [(name, {k.arg: k.value for k in c.keywords}) for name, c in called if not name.isupper()]


#: The functions that give a problem its order.
ORDER_FUNCTIONS = frozenset({"order", "order_of", "_order", "sampled_order", "segmented_order"})


def is_made_by_order(value: ast.expr) -> bool:
    """Is it what a function of a problem returns, or, where there is one, an order that the caller gave?"""
    if isinstance(value, ast.BoolOp | ast.IfExp):
        parts = value.values if isinstance(value, ast.BoolOp) else [value.body, value.orelse]
        return all((isinstance(p, ast.Name) and p.id == "order") or is_made_by_order(p) for p in parts)
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in ORDER_FUNCTIONS


def rebound_orders(source: str) -> list[str]:
    """Assignments to a name `order` of anything else than what a function of a problem returns."""
    found, pairs = [], list[tuple[ast.expr, ast.expr]]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.NamedExpr | ast.AnnAssign | ast.AugAssign):
            pairs = [(node.target, node.value)] if node.value is not None else []
        elif isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        else:
            continue
        while pairs:
            target, value = pairs.pop()
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
            elif any(isinstance(n, ast.Name) and n.id == "order" for n in ast.walk(target)):
                found += [] if is_made_by_order(value) else [f"{ast.unparse(node)}: no order"]
    return found


def constants(source: str) -> dict[str, set[str]]:
    """What each kernel of a module is compiled for: its arguments annotated as constexpr."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and "kernel" in n.name]
    return {
        f.name: {a.arg for a in f.args.args if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)}
        for f in functions
    }


def is_of_order(value: ast.expr) -> bool:
    """Is it an attribute of a name `order`, or what a method of one returns?"""
    value = value.func if isinstance(value, ast.Call) else value
    while isinstance(value, ast.Attribute):
        value = value.value
        if isinstance(value, ast.Name):
            return value.id == "order"
    return False


def broken_launches(source: str) -> list[str]:
    """What the launches of a module take from elsewhere than an order, or leave to Triton's default."""
    launched = launches(source)
    found = rebound_orders(source) if launched else []
    for kernel, keywords in launched:
        if kernel not in FROM_ORDER and kernel not in NO_CONSTANT_SHAPES_A_SUM:
            found.append(f"{kernel}: say in FROM_ORDER what shapes its sums")
        for name in FROM_ORDER.get(kernel, ()):
            if name not in keywords or not is_of_order(keywords[name]):
                found.append(f"{kernel}: {name} must come from an order")
        if ast.unparse(keywords.get(None, ast.Constant(None))) != "PINNED":
            found.append(f"{kernel}: pass **PINNED")
    return found


FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "bi_ops").rglob("*.py"))


def test_every_part_has_a_rule():
    parts = {Path(f).parts[1].removesuffix(".py") for f in FILES} - {"__init__"}
    assert parts <= MAY_IMPORT.keys()
    assert set(MAY_IMPORT) - {""} <= parts
    assert {"matmul", "norm", "attention", "logprob"} <= FAMILIES


def test_every_folder_is_a_package():
    """Or it would be missing from the wheel."""
    assert {Path(f).parent for f in FILES} == {Path(f).parent for f in FILES if f.endswith("__init__.py")}


def test_every_file_that_is_no_module_is_package_data():
    """Or it would be missing from the wheel. csrc/ is carried by setup.py: tests/test_matmul_build.py."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = declared["tool"]["setuptools"]["package-data"]["bi_ops"]
    package = ROOT / "bi_ops"
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so")}
    assert others == {p for pattern in patterns for p in package.glob(pattern)}
    assert package / "py.typed" in others


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_operator_folder_has_its_rooms(family):
    rooms = {p.stem for p in (ROOT / "bi_ops" / family).iterdir()}  # kernels.py, or kernels/ where they are long
    assert {"__init__", "kernels", "ops", "reference"} <= rooms
    assert {"order", "config"} <= rooms
    assert "schedule" not in rooms


def test_imports_keep_the_rules():
    assert [rule for f in FILES for rule in broken_rules(f, (ROOT / f).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("bi_ops/norm/ops.py", "from bi_ops.matmul import mm", "norm may not import matmul"),
        ("bi_ops/norm/ops.py", "from ..matmul import mm", "norm may not import matmul"),
        ("bi_ops/core/checks.py", "from bi_ops import norm", "core may not import norm"),
        ("bi_ops/core/checks.py", "from bi_ops.gluon import tma", "core may not import gluon"),
        ("bi_ops/gluon/tma.py", "from bi_ops.attention import launch", "gluon may not import attention"),
        ("bi_ops/norm/reference.py", "import triton", "a reference imports torch alone"),
        ("bi_ops/norm/reference.py", "from bi_ops.core import checks", "a reference imports torch alone"),
        ("bi_ops/rollout/base.py", "try:\n    import vllm\nexcept ImportError: pass", "inside the function"),
        ("bi_ops/rollout/base.py", "class A:\n    from transformers import AutoModel", "inside the function"),
        ("bi_ops/models/packing.py", "def f():\n    from bi_ops.rl import run", "models may not import rl"),
        ("bi_ops/nn/layers.py", "from bi_ops.matmul.kernels import matmul_kernel", "by its public names"),
        ("bi_ops/nn/layers.py", "from bi_ops.matmul import ops", "by its public names"),
        ("bi_ops/mode/functions.py", "from bi_ops.norm.ops import rms_norm", "by its public names"),
        ("bi_ops/norm/kernels.py", "from bi_ops.norm import ops", "kernels know nothing"),
        ("bi_ops/attention/kernels/forward.py", "from bi_ops.attention import launch", "kernels know nothing"),
        ("bi_ops/attention/kernels/forward.py", "from ..launch import forward", "kernels know nothing"),
        ("bi_ops/nn/layers.py", "from bi_ops.attention.kernels.forward import attention_kernel", "by its public names"),
        ("bi_ops/norm/order.py", "from bi_ops.norm.config import RowConfig", "pure choice"),
        ("bi_ops/norm/config.py", "from bi_ops.norm.kernels import rms_norm_kernel", "pure choice"),
        ("bi_ops/nn/layers.py", "from bi_ops.norm import order", "by its public names"),
    ],
)
def test_a_broken_rule_is_caught(path, source, rule):
    """Negative control: one import against each rule."""
    assert any(rule in broken for broken in broken_rules(path, source))


def test_what_is_allowed_passes():
    allowed = {
        "bi_ops/rollout/base.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm",
        "bi_ops/rollout/vllm_engine.py": "def start():\n    import vllm",
        "bi_ops/norm/ops.py": "from bi_ops.norm.kernels import rms_norm_kernel\nfrom bi_ops.core import checks",
        "bi_ops/attention/kernels/forward.py": "from bi_ops.attention.kernels.common import seqlen_info",
        "bi_ops/nn/layers.py": "from bi_ops import matmul\nfrom bi_ops.norm import rms_norm",
    }
    assert [rule for path, source in allowed.items() for rule in broken_rules(path, source)] == []


def test_an_order_takes_no_batch_size():
    files = [f for f in FILES if part_of(f.replace("/", ".")) in FAMILIES and f.endswith(("/order.py", "/schedule.py"))]
    found = {f: orders((ROOT / f).read_text(encoding="utf-8")) for f in files}
    assert all("Problem" in found[f] and "order" in found[f] for f in files if f.endswith("/order.py"))
    taken = {f"{f}: {name}": names for f, functions in found.items() for name, names in functions.items()}
    assert {name: names for name, names in taken.items() if not names <= ORDER_MAY_TAKE | {"problem", "arch"}} == {}


def test_an_order_by_row_count_is_caught():
    """Negative control."""
    assert orders("def order(m: int, k: int) -> Order: ...") == {"order": {"m", "k"}}
    assert orders("class Problem(NamedTuple):\n    m: int\n    k: int") == {"Problem": {"m", "k"}}
    assert "m" not in ORDER_MAY_TAKE


def test_kernels_take_what_shapes_a_sum_from_an_order():
    sources = {f: (ROOT / f).read_text(encoding="utf-8") for f in FILES}
    assert {f: broken for f, s in sources.items() if (broken := broken_launches(s))} == {}
    assert {
        kernel for s in sources.values() for kernel, _ in launches(s)
    } == FROM_ORDER.keys() | NO_CONSTANT_SHAPES_A_SUM
    taken = {name: arguments for s in sources.values() for name, arguments in constants(s).items()}
    assert {k: missing for k, names in FROM_ORDER.items() if (missing := names - taken[k] - {"num_warps"})} == {}


@pytest.mark.parametrize(
    ("launch", "broken"),
    [
        ("softmax_kernel[g](x, BLOCK=order.block, num_warps=order.num_warps, **PINNED)", []),
        ("softmax_kernel[g](x, BLOCK=order.rows.tile(n), num_warps=order.num_warps, **PINNED)", []),
        ("softmax_kernel[g](x, BLOCK=c.block, num_warps=order.num_warps, **PINNED)", ["BLOCK must come from an order"]),
        (
            "recorded(softmax_kernel)[g](x, BLOCK=c.block, num_warps=order.num_warps, **PINNED)",
            ["BLOCK must come from an order"],
        ),
        ("softmax_kernel[g](x, BLOCK=order.block, num_warps=4, **PINNED)", ["num_warps must come from an order"]),
        ("softmax_kernel[g](x, BLOCK=order.block, **PINNED)", ["num_warps must come from an order"]),
        ("softmax_kernel[g](x, BLOCK=order.block, num_warps=order.num_warps)", ["pass **PINNED"]),
        ("new_kernel[g](x, **PINNED)", ["say in FROM_ORDER what shapes its sums"]),
        ("self.launcher[g](x, **PINNED)", ["say in FROM_ORDER what shapes its sums"]),
        ("TABLE[name](x)", []),
        *(
            (f"{line}\nsum_kernel[g](x, LANES=order.lanes, LOG2_LANES=order.log2, SPAN=order.span, **PINNED)", broken)
            for line, broken in (
                ("order = order_of(n)", []),
                ("order = order or orders.order(Problem(n), arch)", []),
                ("x, order = y, _order(x)", []),
                ("order = order_of() if order is None else order", []),
                ("order = SumOrder(config.lanes, 64)", ["no order"]),
                ("order = replace(order_of(n), lanes=config.lanes)", ["no order"]),
                ("x, order = y, config", ["no order"]),
                ("order.lanes = 4", ["no order"]),
            )
        ),
    ],
)
def test_a_launch_that_chooses_its_order_is_caught(launch, broken):
    """Negative control."""
    assert [b.partition(": ")[2] for b in broken_launches(launch)] == broken


def order_classes(source: str) -> set[str]:
    """The classes of orders that a module defines."""
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    return {c.name for c in classes if any(ast.unparse(b) == "Order" for b in c.bases)}


def orders_made(source: str, classes: set[str]) -> set[str]:
    """The orders that a module makes itself; comparing with one is none."""
    tree = ast.parse(source)
    compared = {id(part) for n in ast.walk(tree) if isinstance(n, ast.Compare) for part in (n.left, *n.comparators)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and id(n) not in compared]
    return {name for c in calls if (name := ast.unparse(c.func).rpartition(".")[2]) in classes}


#: Files besides order.py that may make an order: those of other libraries, which have no order.py.
MAKES_ORDERS = {"bi_ops/attention/backends.py"}


def test_orders_are_made_where_orders_are_chosen():
    """A launch that made its own would pass the check above."""
    sources = {f: (ROOT / f).read_text(encoding="utf-8") for f in FILES}
    classes = set().union(*(order_classes(s) for f, s in sources.items() if f.endswith("/order.py")))
    assert classes >= {"RowOrder", "SumOrder", "GemmOrder", "KeySteps", "TwoPass", "OnePass", "AttentionOrder"}
    made = {f: found for f, s in sources.items() if not f.endswith("/order.py") and (found := orders_made(s, classes))}
    assert made.keys() == MAKES_ORDERS, made


def test_an_order_made_in_a_launch_is_caught():
    """Negative control."""
    assert orders_made("launch(q, order=order.KeySteps(config.block))", {"KeySteps"}) == {"KeySteps"}
    assert orders_made("if order == OnePass(64, 128): pass", {"OnePass"}) == set()


def test_operators_run_on_the_gpu_of_their_tensors():
    """torch's own decorator leaves that to the caller."""
    assert [f for f in FILES if "library.custom_op(" in (ROOT / f).read_text()] == ["bi_ops/core/operators.py"]


#: Numbers that a kernel may be compiled for: sizes of the model, or always a multiple of 16 (C, chunks of norm). In
#: `reduction` N is what the caller sums over, tokens too, and C follows from it.
SIZES = {"C", "D", "E", "H", "K", "K_0", "K_1", "K_2", "N", "P", "V", "eps", "scale", "softcap"}


def specialised(source: str) -> dict[str, set[str]]:
    """The numbers for which each kernel is compiled anew: when they are 1, and when 16 divides them."""
    found = {}
    for f in ast.walk(ast.parse(source)):
        if isinstance(f, ast.FunctionDef) and f.name.endswith("_kernel"):
            plain = {
                a.arg for a in f.args.args if a.annotation is None and not a.arg.startswith(("p_", "d_", "stride"))
            }
            named = {n.value for d in f.decorator_list for n in ast.walk(d) if isinstance(n, ast.Constant)}
            found[f.name] = plain - named
    return found


def test_a_batch_compiles_nothing_anew():
    """A kernel of its own for 16 rows would be another one to prove the bits of, and a wait in the middle of a run."""
    found = {f"{f} {name}": left - SIZES for f in FILES for name, left in specialised((ROOT / f).read_text()).items()}
    assert len(found) > 20
    assert {name: left for name, left in found.items() if left} == {}


def test_a_kernel_compiled_for_a_row_count_is_caught():
    """Negative control."""
    kernel = "def a_kernel(p_x, R, D, stride, B: tl.constexpr): pass"
    assert specialised(f"@triton.jit\n{kernel}") == {"a_kernel": {"R", "D"}}
    assert specialised(f'@triton.jit(do_not_specialize=["R"])\n{kernel}') == {"a_kernel": {"D"}}
