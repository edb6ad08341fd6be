"""vLLM's Python of each step, as far as the plugin replaces it: functions that nobody calls here."""

from __future__ import annotations


def nobody_calls(*args, **options):
    raise AssertionError("nobody takes a step here")


class KVCacheManager:
    def allocate_slots(self, request, num_new_tokens, num_new_computed_tokens=0, *, num_lookahead_tokens=0):
        nobody_calls()


class Scheduler:
    def schedule(self):
        nobody_calls()

    def update_from_output(self, scheduler_output, model_runner_output):
        nobody_calls()


class LogprobsLists:
    def slice_request(self, req_idx, num_positions):
        nobody_calls()


class MsgpackEncoder:
    def encode_into(self, obj, buf):
        nobody_calls()


class MsgpackDecoder:
    def decode(self, bufs):
        nobody_calls()


class LogprobsProcessor:
    def _update_sample_logprobs(self, logprobs_lists):
        nobody_calls()


#: Where vLLM has them.
PLACES = {
    "vllm.v1.core.kv_cache_manager": [KVCacheManager],
    "vllm.v1.core.sched.scheduler": [Scheduler],
    "vllm.v1.outputs": [LogprobsLists],
    "vllm.v1.serial_utils": [MsgpackEncoder, MsgpackDecoder],
    "vllm.v1.engine.logprobs": [LogprobsProcessor],
}
