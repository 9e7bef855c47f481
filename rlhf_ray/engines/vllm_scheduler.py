"""vLLM's scheduler, with samples of one prompt that compute it once.

vLLM's prefix cache knows whole blocks, of 32 tokens on a CPU, and never the last token: eight samples of a prompt of
256 tokens compute 32 of them eight times. Here the samples after the first wait for the step that computes their
prompt, then take a copy of its last block; copying a shared block before it is written to is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus


class SiblingScheduler(Scheduler):  # type: ignore[misc]
    """Schedules for one process and whole prompts, as vLLM works on a CPU (`scheduler_cls`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        # A sliding window's last block may be gone while the sample that computed it goes on.
        self._shares = self.cache_config.enable_prefix_caching and [type(one) for one in managers] == [
            FullAttentionManager
        ]
        self._first: WeakValueDictionary[Hashable, Request] = WeakValueDictionary()

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting sample may begin: not in the step that computes its prompt for another."""
        ready: bool = super()._handle_blocked_waiting_request(request)
        if ready and self._may_copy(request):
            first = self._first.setdefault(_prompt(request), request)
            if first.status == RequestStatus.RUNNING:
                return _has_computed_prompt(first)
            self._first[_prompt(request)] = request
        return ready

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """The blocks that hold the beginning of a sample's prompt, and how many of its tokens they hold."""
        blocks, count, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        if self._may_copy(request):
            first = self._first[_prompt(request)]
            known = request.num_prompt_tokens - 1
            place = known // self.block_size
            if first is not request and count == place * self.block_size:
                (theirs,) = self.kv_cache_manager.get_blocks(first.request_id).blocks
                blocks, count = KVCacheBlocks(([*blocks.blocks[0], theirs[place]],)), known
        return blocks, count, boundary, diverged

    def _may_copy(self, request: Request) -> bool:
        """Whether another sample's last block would spare this one any work."""
        fresh = request.num_tokens == request.num_prompt_tokens and not request.skip_reading_prefix_cache
        return self._shares and fresh and (request.num_prompt_tokens - 1) % self.block_size > 0


def _prompt(request: Request) -> Hashable:
    """What samples of one prompt have in common: its tokens and the adapter."""
    return tuple(request.prompt_token_ids), request.lora_request and request.lora_request.lora_int_id


def _has_computed_prompt(request: Request) -> bool:
    """Whether all of its prompt was computed in an earlier step."""
    computed: bool = request.num_computed_tokens >= request.num_prompt_tokens
    return computed
