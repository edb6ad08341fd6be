"""bench/conditions.py without vLLM or a GPU: its rows, its verdicts, and a server that is killed."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import textwrap
import threading
import urllib.error
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import conditions
import conditions_worker
import engine_processes
import record
from conditions_server import Answer, Server, ask_all, read_answer

from bi_ops.core import runtime
from bi_ops.models import load_model

SMALL = {
    **conditions.MODEL,
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16 if runtime.INTERPRET else 128, "vocab_size": 64},
}
GOOD = {"tokens": conditions.LEAST, "different": 0, "inconclusive": ""}


def test_every_condition_of_the_contract_has_a_row():
    text = " ".join(conditions.CONDITIONS)
    for part in (
        *("eager", "full CUDA graphs", "piecewise", "defaults", "v1 model runner", "v2 model runner", "prefix caching"),
        *(
            "256 tokens",
            "2048 tokens",
            "8192 tokens",
            "preemption",
            "asynchronous",
            "64 clients",
            "killed and restarted",
        ),
        *(f"max_num_seqs {n}" for n in (1, 7, 64, 256)),
        *("several engines", "LoRA", "speculative", "temperature 0.7, top-p 0.9, top-k 50", "replayed"),
    ):
        assert part in text, part
    refused = {name for name, c in conditions.CONDITIONS.items() if c.refused}
    assert refused == {"Inductor", "speculative decoding", "LoRA"}
    assert conditions_worker.PROMPTS * conditions_worker.NEW_TOKENS >= conditions.LEAST


@pytest.mark.parametrize(
    ("condition", "found", "wrong"),
    [
        ("eager", GOOD, ""),
        ("eager", GOOD | {"different": 3}, "3 of 10000 different"),
        ("eager", GOOD | {"tokens": 10}, "only 10 tokens"),
        ("eager", GOOD | {"inconclusive": "all NaN"}, "all NaN"),
        ("eager", {"failed": "no memory"}, "no memory"),
        ("eager", {"refused": "vllm_plugin: no"}, "it was refused: vllm_plugin: no"),
        ("preemption", GOOD | {"counted": 0}, "num_preemptions counted nothing"),
        ("preemption", GOOD | {"counted": 5}, ""),
        ("vllm serve, 64 clients, killed and restarted", GOOD | {"asked_again_different": 1}, "1 answers differ"),
        ("LoRA", {"refused": "vllm_plugin: LoRA was asked for"}, ""),
        ("LoRA", {"refused": "CUDA is missing"}, "not refused by name"),
        ("LoRA", GOOD, "not refused by name"),
    ],
)
def test_verdicts(condition, found, wrong):
    reason = conditions.verdict(conditions.CONDITIONS[condition], found)
    assert wrong in reason
    assert bool(reason) is bool(wrong)


def test_what_is_done_is_not_run_again_and_a_failure_is():
    rows: list = []
    for name, found in (("eager", GOOD), ("LoRA", {"failed": "no"}), ("preemption", GOOD | {"different": 1})):
        rows = conditions.merged(rows, {"release": "0.26.0", "condition": name, "plugin": found, "stock": GOOD})
    wanted = ["eager", "LoRA", "preemption", "Inductor"]
    assert conditions.missing(rows, "0.26.0", wanted, False) == ["LoRA", "Inductor"]
    assert conditions.missing(rows, "0.26.0", wanted, True) == wanted
    assert conditions.missing(rows, "0.33.0", wanted, False) == wanted
    rows[0]["stock"] = {"failed": "KeyboardInterrupt"}
    assert conditions.missing(rows, "0.26.0", wanted, False) == ["eager", "LoRA", "Inductor"]
    assert conditions.missing(rows, "0.26.0", wanted, False, control=False) == ["LoRA", "Inductor"]
    again = conditions.merged(rows, {"release": "0.26.0", "condition": "LoRA", "plugin": GOOD})
    assert [r["condition"] for r in again] == ["eager", "preemption", "LoRA"]
    assert again[2]["plugin"] == GOOD


def test_requests_differ_and_mixed_ones_have_other_distributions():
    plain = conditions_worker.requests(conditions.CONDITIONS["eager"])
    assert len({p.seed for p in plain}) == len(plain)
    assert len({p.distribution for p in plain}) == 1
    mixed = conditions_worker.requests(conditions.CONDITIONS["mixed temperatures and filters"])
    assert len({p.distribution for p in mixed}) == 5  # greedy has the logits' own
    lengths = {len(p) for p in conditions_worker.prompts()}
    assert min(lengths) < 16
    assert max(lengths) > 512


def test_the_attention_is_read_off_the_log():
    line = "INFO bi_ops: reduction orders 0123abcd on sm_90, attention triton"
    assert conditions_worker.attention_in(f"x\n(EngineCore pid=3) {line}\ny") == "triton"
    assert conditions_worker.attention_in("stock") == "vllm"


def test_the_checkpoint_is_one_and_its_tokenizer_knows_every_id(tmp_path):
    conditions.write_checkpoint(tmp_path, SMALL)
    assert load_model(tmp_path).config.vocab_size == 64
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([3, 63]).split() == ["t3", "t63"]


def test_jobs_take_the_gpus_in_turn_and_no_more_at_a_time(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    together, lock = threading.Barrier(3), threading.Lock()
    running: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    def work_on(name, gpu):
        with lock:
            running.append(gpu)
            seen.append((name, sorted(running)))
        together.wait(60)  # until three run at once
        with lock:
            running.remove(gpu)

    engine_processes.each("abcdef", work_on, jobs=3, what="jobs")
    assert sorted(name for name, _ in seen) == list("abcdef")
    assert max((gpus for _, gpus in seen), key=len) == ["4", "4", "7"]
    with pytest.raises(ZeroDivisionError):
        engine_processes.each("a", lambda name, gpu: print(1 / 0), jobs=1, what="jobs")


def test_a_process_finds_the_plugin_of_a_checkout(tmp_path):
    folder = record.offer_plugin(tmp_path / "plugin")
    [found] = importlib.metadata.distributions(path=[str(folder)])
    [entry] = found.entry_points
    assert (entry.group, entry.name) == ("vllm.general_plugins", "bi_ops")
    env = engine_processes.environment(conditions.CONDITIONS["v1 model runner"].env, False, folder)
    assert (env["VLLM_BATCH_INVARIANT"], env["VLLM_PLUGINS"], env["VLLM_USE_V2_MODEL_RUNNER"]) == ("1", "none", "0")
    code = "import importlib.metadata as m; print([e.name for e in m.entry_points(group='vllm.general_plugins')])"
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "bi_ops" in shown


SERVER = """
import argparse, http.server, json, os, time
parser = argparse.ArgumentParser()
parser.add_argument("--host"); parser.add_argument("--port", type=int); parser.add_argument("--drift")
args = parser.parse_args()
offset = 0.0
if args.drift:  # another life, other bits
    offset = 1e-7 * os.path.exists(args.drift)
    open(args.drift, "w").close()
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [13]:
            self.send_error(400); return
        time.sleep(0.02)
        tokens = [f"token_id:{body['prompt'][0] + i}" for i in range(3)]
        scores = [-0.5 - i - offset for i in range(3)]
        self.reply({"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": scores}}]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    return [sys.executable, str(script)]


BODIES = [{"prompt": [100 * i]} for i in range(40)]


def test_a_server_that_is_killed_answers_as_before(command, tmp_path):
    with Server(command, tmp_path / "log", patience=30) as server:
        answers, again = ask_all(server, BODIES, clients=8, kill_after=15)
    assert answers == [
        Answer((b["prompt"][0], b["prompt"][0] + 1, b["prompt"][0] + 2), (-0.5, -1.5, -2.5)) for b in BODIES
    ]
    assert len(again) >= 15
    assert all(answers[i] == a for i, a in again.items())


def test_a_server_with_other_bits_after_the_restart_is_seen(command, tmp_path):
    """Negative control."""
    with Server([*command, f"--drift={tmp_path / 'mark'}"], tmp_path / "log", patience=30) as server:
        answers, again = ask_all(server, BODIES, clients=8, kill_after=15)
    assert all(answers[i] != a for i, a in again.items())


def test_what_a_server_refuses_and_a_server_that_ends_are_named(command, tmp_path):
    with Server(command, tmp_path / "log", patience=30) as server:
        assert ask_all(server, BODIES[:2], clients=2)[1] == {}
        with pytest.raises(RuntimeError, match="the server answered 400"):
            ask_all(server, [{"prompt": [13]}], clients=1)
    with pytest.raises(urllib.error.URLError):
        server.ask(BODIES[0])
    with pytest.raises(RuntimeError, match="the server ended with 3"):
        Server([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", patience=30).start()


def test_an_answer_is_read():
    reply = {"choices": [{"logprobs": {"tokens": ["token_id:7"], "token_logprobs": [-0.25]}}]}
    assert read_answer(json.loads(json.dumps(reply))) == Answer((7,), (-0.25,))
