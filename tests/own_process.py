"""Scripts in a process of their own, for what would change the test's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bi_ops.core import runtime

#: For a script that takes itself for a GPU's process: `fake_gpu`, `traced_first_steps`.
without_a_gpu = pytest.mark.skipif(not runtime.INTERPRET, reason="it takes itself for a GPU's process")


def printed_by(script: str, **environment: str) -> Any:
    """The JSON in the last line that it prints; script: from here. It is not told that kernels are interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / script)]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
