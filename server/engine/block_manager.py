"""Blocks of the KV cache: who holds which, and where a prefix is found again. Bookkeeping only: no tensors here.

Memory for keys and values is a number of blocks of `block_size` tokens. A sequence holds the blocks of its
`block_table`; sequences with a common beginning hold the same full blocks (reference counts), so that it is kept once.
A block that is only partly filled belongs to one sequence: another one that begins like it gets a copy of those tokens
(copy-on-write, made before it is written to for the first time).

Blocks that nobody holds keep their content until they are needed, the least recently used are evicted first. A prefix
is found by a chain of hashes, as in vLLM: the hash of a full block covers its tokens, *what steered each of them*, and
the hash of the block before it. What steered a token is the columns themselves and their multipliers, never a name, so
that a prompt under `positions: generated` serves every steering up to its last token, and nothing steered ever serves
an unsteered request.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server.attention.layout import BlockCopy
from server.engine.sequence import Sequence, steering_mask
from steering.types import SequenceSteering

STEERING_BITS = 32  # bits of a token's id below the number of what steers it
KEPT_STEERINGS = 4096
ROOT = b""  # what stands before the first block


@dataclass
class Block:
    """`content`: for each token that has been computed, its id and what steered it; so far `block_size` at most."""

    index: int
    ref_count: int = 0
    parent: bytes = ROOT  # the hash of the prefix before it
    hash: bytes | None = None  # of the prefix up to its end, once it is full
    content: list[int] = field(default_factory=list)
    steered: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class CachedPrefix:
    """What is known of a sequence's beginning: full blocks, and `num_tokens` tokens of another one."""

    blocks: list[Block]
    partial: Block | None = None
    num_tokens: int = 0


class BlockManager:
    """Hands out blocks to sequences. `pending_copies` are to be made, in order, before the next forward pass."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cached_tokens = 0  # found instead of computed, since the start
        self.queried_tokens = 0  # looked for
        self.pending_copies: list[BlockCopy] = []
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._full: dict[bytes, Block] = {}  # by hash
        # Every block with content, by the hash of the prefix before it and its first token: for matches within a block.
        self._by_first_token: dict[tuple[bytes, int], dict[int, None]] = {}
        self._steerings: dict[bytes, int] = {}  # by `SequenceSteering.digest`
        self._next_steering = 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, those that keep something included."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """How many tokens there is room for."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_tokens: int, *, spare: int = 0) -> bool:
        """Allocates blocks for the first `num_tokens` tokens. Leading tokens that are cached are shared, or copied
        within a block (copy-on-write), and count as computed. False, with nothing changed, where fewer than `spare`
        blocks would stay free."""
        prefix = self._find_longest_prefix(sequence)
        kept = [block for block in prefix.blocks if not block.ref_count]
        # A partly filled block that nobody holds is taken over where it ends with what is common.
        partial = prefix.partial
        taken_over = partial is not None and not partial.ref_count and len(partial.content) == prefix.num_tokens
        if taken_over and partial is not None:
            kept.append(partial)
        new = self.blocks_for(num_tokens) - len(prefix.blocks) - taken_over
        if new > len(self._free) - len(kept) - spare:
            return False
        for block in kept:
            del self._free[block.index]
        for block in prefix.blocks:
            block.ref_count += 1
        table = list(prefix.blocks)
        if taken_over and partial is not None:
            partial.ref_count = 1
            table.append(partial)
        # Read before `_take`, which may evict the block that is copied from.
        steered = [count for block in prefix.blocks for count in block.steered]
        steered += partial.steered[: prefix.num_tokens] if partial else []
        content = partial.content[: prefix.num_tokens] if partial else []
        for _ in range(new):
            table.append(self._take())
        if partial is not None and not taken_over:  # copy-on-write: the first tokens of a block that goes on otherwise
            target = table[len(prefix.blocks)]
            self.pending_copies.append(BlockCopy(partial.index, target.index))
            target.parent = self._parent(prefix.blocks)
            self._extend(target, content, steered[len(prefix.blocks) * self.block_size :])
        sequence.block_table = [block.index for block in table]
        sequence.num_computed_tokens = len(steered)
        sequence.steered = steered
        self.cached_tokens += len(steered)
        self.queried_tokens += sequence.num_shareable
        return True

    def grow_to(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes the blocks of a sequence hold so many tokens; False, with nothing changed: there is no free block."""
        new = self.blocks_for(num_tokens) - len(sequence.block_table)
        if new > len(self._free):
            return False
        for _ in range(new):
            sequence.block_table.append(self._take().index)
        return True

    def commit(self, sequence: Sequence, stop: int, steered: list[int]) -> None:
        """The tokens of a sequence up to `stop` have been computed; `steered`: for each new one whether it was."""
        start = sequence.num_computed_tokens
        content = self._content_of(sequence, start, stop)
        sequence.num_computed_tokens = stop
        sequence.steered += steered
        at = 0
        while at < len(content):
            number, offset = divmod(start + at, self.block_size)
            block = self._blocks[sequence.block_table[number]]
            before = self._blocks[sequence.block_table[number - 1]].hash if number else ROOT
            count = min(self.block_size - offset, len(content) - at)
            # Where an earlier block has left the prefix cache (hash None), this one cannot be hashed.
            if len(block.content) == offset and before is not None:
                block.parent = before
                self._extend(block, content[at : at + count], steered[at : at + count])
            at += count

    def free(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Takes the blocks of a sequence back. `keep`: their content serves others until they are needed; otherwise it
        is forgotten, also where others hold the same blocks."""
        for index in reversed(sequence.block_table):  # the end of a text is evicted before its beginning
            block = self._blocks[index]
            block.ref_count -= 1
            if not keep:
                self._forget(block)
            if not block.ref_count:
                self._release(block)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def reset_prefix_cache(self) -> None:
        """Forgets all content, also of blocks that sequences hold: nobody shares it any more."""
        for block in self._blocks:
            self._forget(block)

    def num_cached(self, sequence: Sequence) -> int:
        """How many leading tokens are cached."""
        prefix = self._find_longest_prefix(sequence)
        return len(prefix.blocks) * self.block_size + prefix.num_tokens

    def num_coming(self, sequence: Sequence, others: Iterable[Sequence]) -> int:
        """How many leading tokens will be cached once those of the running `others` that are in prefill have computed
        theirs. What the rest of them has computed is cached already, or was forgotten and will not come again."""
        self._update_block_hashes(sequence)
        common = (_common(one.cache_keys, sequence.cache_keys) for one in others if one.num_uncomputed > 1)
        return min(max(common, default=0), sequence.num_shareable)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError where an invariant is broken. `sequences`: all that hold blocks. Slow: for tests."""
        held: dict[int, int] = {}
        for sequence in sequences:
            assert len(sequence.block_table) == len(set(sequence.block_table)), "a block stands twice in a table"
            assert sequence.num_computed_tokens <= len(sequence.block_table) * self.block_size, "a table is too short"
            assert len(sequence.steered) == sequence.num_computed_tokens, "a token has no count"
            for index in sequence.block_table:
                held[index] = held.get(index, 0) + 1
        for block in self._blocks:
            assert block.ref_count == held.get(block.index, 0), f"block {block.index} has the wrong reference count"
            assert (block.ref_count == 0) == (block.index in self._free), f"block {block.index} is lost, or given twice"
            assert len(block.content) == len(block.steered) <= self.block_size, "a block holds more than fits"
            full = len(block.content) == self.block_size
            assert (block.hash is not None) == full, "a full block has no hash, or another one has"
            assert full or block.ref_count <= 1 or not block.content, "a block that is still written to is shared"
            if block.content:
                assert block.index in self._by_first_token[block.parent, block.content[0]], "a block cannot be found"
        for found in self._by_first_token.values():
            assert found, "an empty entry stays behind"
            assert all(self._blocks[index].content for index in found), "an empty block can be found"
        for key, block in self._full.items():
            assert block.hash == key == self._hash(block.parent, block.content), "a block is found by another content"
        order = [bool(self._blocks[index].content) for index in self._free]
        assert order == sorted(order), "content is evicted while empty blocks are free"

    # --- inside ---------------------------------------------------------------------------------

    def _take(self) -> Block:
        """A free block, the least recently used one; what it keeps is lost."""
        index, _ = self._free.popitem(last=False)
        block = self._blocks[index]
        self._forget(block)
        block.ref_count = 1
        return block

    def _release(self, block: Block) -> None:
        self._free[block.index] = None
        if not block.content:
            self._free.move_to_end(block.index, last=False)

    def _extend(self, block: Block, content: list[int], steered: list[int]) -> None:
        """Notes what a block holds, from its beginning or after what it holds already."""
        if not block.content:
            self._by_first_token.setdefault((block.parent, content[0]), {})[block.index] = None
        block.content += content
        block.steered += steered
        if len(block.content) == self.block_size:
            block.hash = self._hash(block.parent, block.content)
            self._full.setdefault(block.hash, block)

    def _forget(self, block: Block) -> None:
        """Nobody finds what a block holds any more."""
        if not block.content:
            return
        key = block.parent, block.content[0]
        del self._by_first_token[key][block.index]
        if not self._by_first_token[key]:
            del self._by_first_token[key]
        if block.hash is not None and self._full.get(block.hash) is block:
            del self._full[block.hash]
        block.content, block.steered, block.hash, block.parent = [], [], None, ROOT
        if not block.ref_count and block.index in self._free:
            self._free.move_to_end(block.index, last=False)

    def _find_longest_prefix(self, sequence: Sequence) -> CachedPrefix:
        """The longest beginning of a sequence that is known."""
        self._update_block_hashes(sequence)
        most, size = sequence.num_shareable, self.block_size
        blocks: list[Block] = []
        for key in sequence.block_hashes[: most // size]:
            block = self._full.get(key)
            if block is None:
                break
            blocks.append(block)
        rest = sequence.cache_keys[len(blocks) * size : min(most, (len(blocks) + 1) * size)].tolist()
        best, longest = None, 0
        for index in self._by_first_token.get((self._parent(blocks), rest[0]), ()) if rest else ():
            block = self._blocks[index]
            length = _common_list(block.content, rest)
            if length > longest:
                best, longest = block, length
        return CachedPrefix(blocks, best, longest)

    @staticmethod
    def _parent(blocks: list[Block]) -> bytes:
        return (blocks[-1].hash or ROOT) if blocks else ROOT

    def _update_block_hashes(self, sequence: Sequence) -> None:
        """Brings `cache_keys` and `block_hashes` of a sequence up to date."""
        if len(sequence.cache_keys) == len(sequence.token_ids):
            return
        content = np.array(sequence.token_ids, dtype=np.int64)
        steering = sequence.steering_params
        if steering.columns.slots:
            acting = steering_mask(steering.positions, 0, len(content), sequence.num_prompt_tokens)
            content[acting] |= self._number(steering.columns) << STEERING_BITS
        sequence.cache_keys = content
        size, parent = self.block_size, ROOT
        sequence.block_hashes = []
        for start in range(0, len(content) - size + 1, size):
            parent = self._hash(parent, content[start : start + size])
            sequence.block_hashes.append(parent)

    def _content_of(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        if stop <= len(sequence.cache_keys):
            part: list[int] = sequence.cache_keys[start:stop].tolist()
            return part
        steering = sequence.steering_params
        tokens = sequence.token_ids[start:stop]
        if not steering.columns.slots:
            return tokens
        number = self._number(steering.columns) << STEERING_BITS
        if start >= sequence.num_prompt_tokens:  # generated: the usual case, without masks
            return tokens if steering.positions == "prompt" else [token | number for token in tokens]
        acting = steering_mask(steering.positions, start, stop, sequence.num_prompt_tokens).tolist()
        return [token | number if acts else token for token, acts in zip(tokens, acting, strict=True)]

    def _number(self, steering: SequenceSteering) -> int:
        """A number for equal steerings, never given twice. A checkpoint that is loaded again gets a new one."""
        number = self._steerings.get(steering.digest)
        if number is None:
            if len(self._steerings) >= KEPT_STEERINGS:
                self._steerings.clear()
            number = self._steerings[steering.digest] = self._next_steering
            self._next_steering += 1
        return number

    @staticmethod
    def _hash(parent: bytes, content: NDArray[np.int64] | list[int]) -> bytes:
        return hashlib.blake2b(parent + np.asarray(content, dtype=np.int64).tobytes(), digest_size=16).digest()


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How long the common beginning is."""
    length = min(len(one), len(other))
    if not length or one[0] != other[0]:
        return 0
    differ = one[:length] != other[:length]
    first = int(differ.argmax())
    return first if differ[first] else length


def _common_list(one: list[int], other: list[int]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
