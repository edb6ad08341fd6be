"""Patch points as vLLM's sources have them, read without importing vLLM: what is unlike the releases that are known."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from bi_ops.core.vllm import RELEASES, Release
from bi_ops.vllm_plugin.layers import kernels_of
from bi_ops.vllm_plugin.patches import patches_of


def installed_root() -> Path | None:
    """The folder that holds the package `vllm` which Python would import; None without one."""
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).parent if places else None


def statements(root: Path, module: str) -> list[ast.stmt]:
    """The statements of a module or of a package's own; none where it is missing."""
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []


def parameters(root: Path, module: str, attribute: str) -> tuple[str, ...] | None:
    """The parameters of a function or Class.method as the sources under `root` have it; None: there is none.

    A name that the module imports from another one is followed there, as is a package's `from .module import *`.
    """
    body = statements(root, module)
    owner, _, name = attribute.rpartition(".")
    if owner:
        body = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == owner), [])
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [a.asname or a.name for a in node.names]
            origin = f"{module}.{node.module}" if node.level else node.module  # in a package's own statements
            if name in names:
                return parameters(root, origin, name)
            if names == ["*"] and (found := parameters(root, origin, name)) is not None:
                return found
    return None


def differences(release: Release, root: Path) -> list[str]:
    """Every patch point of `release` that the sources under `root` do not have as it had it."""
    out = []
    for point in (*patches_of(release), *kernels_of(release)):
        difference = point.difference(parameters(root, point.module, point.attribute))
        if difference is not None:
            out.append(difference)
    return out


def unlike(root: Path) -> str:
    """For people: where the vLLM under `root` is unlike the known release that it is most like, the newest of such."""
    nearest = min(reversed(list(RELEASES.values())), key=lambda r: len(differences(r, root)))
    found = differences(nearest, root)
    if not found:
        return f"its patch points look like those of {nearest.version}, but its other parts were not read"
    return f"unlike in {nearest.version}, {'; '.join(found)}"
