"""How long drafts may be: for the KV slots they take, and for the tokens that are left. Pure."""

from __future__ import annotations

from math import ceil


def draft_room(
    max_draft_length: int,
    *,
    num_free_blocks: int,
    block_size: int,
    num_running_reqs: int,
    num_waiting_tokens: int,
) -> int:
    """``max_draft_length`` if there is room for it whatever happens, else 0.

    A request's slots for drafts are its own next slots: blocks it holds for them are held early,
    and used once it has grown by the drafts of two steps. If there are free blocks now for every
    running request to hold those, for every one to grow by as many tokens meanwhile, and for the
    first waiting request to be let in, then a preemption that comes later is one that plain
    decoding would have had.

    Args:
        num_waiting_tokens: prompt of the first waiting request; 0 if there is none.
    """
    drafts = 2 * max_draft_length  # those to verify and those to make
    held, growth = ceil((1 + drafts) / block_size), ceil(drafts / block_size)
    needed = num_running_reqs * (held + growth) + ceil(num_waiting_tokens / block_size)
    return max_draft_length if num_free_blocks >= needed else 0


def useful_draft_length(max_draft_length: int, most_tokens_left: int) -> int:
    """Nobody needs more drafts than tokens are left to the request that has most of them left.

    The step that drafts gives one token at least, and the next one more than it verifies drafts.
    One draft is left even then: whether to draft at all is not decided here.
    """
    return min(max(most_tokens_left - 2, 1), max_draft_length)
