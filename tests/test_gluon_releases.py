"""The names that Gluon gave up between Triton 3.6 and 3.8: bi_ops.gluon takes those of either release."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import bi_ops

gl = pytest.importorskip("triton.experimental.gluon.language")
tma = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper").tma

#: Name in bi_ops.gluon to (its module, Gluon's module, the name of Triton 3.6, the name of 3.8 and 3.9).
RENAMED = {
    "async_load": ("tma", tma, "async_copy_global_to_shared", "async_load"),
    "async_store": ("tma", tma, "async_copy_shared_to_global", "async_store"),
    "barrier": ("pipeline", gl, "thread_barrier", "barrier"),
}


def read_again(module: str) -> ModuleType:
    """A copy of a module of bi_ops.gluon, imported now."""
    path = Path(bi_ops.__file__).parent / "gluon" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"copy_of_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("release", ["3.6", "3.8"])
@pytest.mark.parametrize("name", RENAMED)
def test_either_releases_name_is_taken(name, release, monkeypatch):
    module, gluon, old, new = RENAMED[name]
    present, absent = (old, new) if release == "3.6" else (new, old)
    real = getattr(gluon, new, None) or getattr(gluon, old)
    monkeypatch.delattr(gluon, absent, raising=False)
    monkeypatch.setattr(gluon, present, real, raising=False)
    assert getattr(read_again(module), name) is real


@pytest.mark.parametrize("name", RENAMED)
def test_a_release_with_neither_name_is_an_error(name, monkeypatch):
    """Negative control: nothing else is taken in its place."""
    module, gluon, old, new = RENAMED[name]
    for gone in (old, new):
        monkeypatch.delattr(gluon, gone, raising=False)
    with pytest.raises(AttributeError, match=old):
        read_again(module)


def test_kernels_take_renamed_names_from_this_layer_alone():
    folder = Path(bi_ops.__file__).parent
    others = {p: p.read_text(encoding="utf-8") for p in folder.rglob("*.py") if p.parent.name != "gluon"}
    past = re.compile(r"from triton\S* import .*\btma\b|\bgl\.(thread_)?barrier\b|hopper\.tma\.")
    assert [str(p) for p, source in others.items() if past.search(source)] == []
    assert past.search("from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma")
    assert past.search("    gl.barrier()")


def test_each_thread_has_the_gpus_context_before_a_descriptor(monkeypatch):
    """Once, and never while a graph is captured, nor where there is no GPU."""
    import threading

    import torch

    from bi_ops.gluon import tma as ours

    asked, state = [], {"is_initialized": True, "is_current_stream_capturing": False}
    monkeypatch.setattr(ours, "_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(threading.get_ident()))
    for name in state:
        monkeypatch.setattr(torch.cuda, name, lambda name=name: state[name])

    def twice():
        ours.bind_context()
        ours.bind_context()

    for name, value in (("is_initialized", False), ("is_current_stream_capturing", True)):
        before, state[name] = state[name], value
        twice()
        state[name] = before
    assert asked == []
    threads = [threading.Thread(target=twice) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    twice()
    assert len(asked) == 3
