"""The engine alone: decoding, prompts, steering, arms, waiting, memory."""

import statistics
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.drive import in_turn, median_step, prompts, step_beside, step_seconds, streamed
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World
from benchmarks.workload import SHAPES, Request, requests
from server.bench import percentiles

SHARE = 0.8  # of the requests a second that the engine can answer
LEAD_S = 0.02  # of a long prompt before the short ones: its first step has begun
STEERING_COSTS, CONFIGURATIONS_COST = 2, 3  # per cent, at most
GAPS = 4  # times a decoding step, at most: one step in a hundred reads four or five of the prompts
GENERATIONS = 4  # requests of each client


def decode(world: World) -> Iterator[Figure]:
    """The floor is the time in which the device copies the weights that a step reads, and its keys and values."""
    sizes, ours = world.sizes, world.steered
    for rows, context, wanted in sizes.decode:
        work = prompts(sizes.shape, rows, context - sizes.new // 2, sizes.new)
        seconds = median_step(ours, work, sizes.rounds)
        floor = (ours.weight_bytes + rows * context * ours.token_bytes) / world.copy_rate
        note = f"{1000 * seconds:.2f} ms a step, floor {1000 * floor:.2f}, {rows / seconds:,.0f} tokens/s"
        yield Figure(f"{rows} x {context}, of the floor", 100 * floor / seconds, "%", note, at_least=wanted)


def prefill(world: World) -> Iterator[Figure]:
    """Operations: two for each weight and token, and those of causal attention."""
    sizes, ours = world.sizes, world.steered
    width, layers = SHAPES[sizes.shape]["hidden_size"], SHAPES[sizes.shape]["num_hidden_layers"]
    # The logits are those of one token.
    weights = ours.weight_bytes // world.dtype.itemsize - SHAPES[sizes.shape]["vocab_size"] * width
    for tokens, wanted in sizes.prompts:
        work = prompts(sizes.shape, 1, tokens, 1)
        times = [ours.answers(work)[0].timing.total_ms / 1000 for _ in range(1 + sizes.rounds)][1:]
        seconds = statistics.median(times)
        rate = (2 * weights * tokens + 2 * tokens**2 * width * layers) / seconds
        note = f"{tokens / seconds:,.0f} tokens/s, {1000 * seconds:.0f} ms"
        share = 100 * rate / world.matrix_rate
        yield Figure(f"{tokens} tokens in one step, of the matrix rate", share, "%", note, at_least=wanted)


def steering(world: World) -> Iterator[Figure]:
    """Against an engine that has never had a column; all rows steered alike against each in its own way."""
    sizes, ours, plain = world.sizes, world.steered, world.plain
    for rows in sizes.steered_rows:
        work = prompts(sizes.shape, rows, 128 - sizes.new // 2, sizes.new)
        none, steered, ratio = in_turn(
            partial(step_seconds, plain, work), partial(step_seconds, ours, work), sizes.rounds
        )
        note = f"{1000 * steered:.2f} ms a step, {1000 * none:.2f} without"
        yield Figure(f"{rows} rows steered, against no column", 100 * (ratio - 1), "%", note, at_most=STEERING_COSTS)
    one = ours.steering
    many = ours.steered_by((1.0, 0.5, -0.5 - index / 1000) for index in range(sizes.rows))
    work = prompts(sizes.shape, sizes.rows, 128 - sizes.new // 2, sizes.new)

    def step(mixes: list[object]) -> float:
        ours.steering = mixes  # type: ignore[assignment]
        return step_seconds(ours, work)

    alike, differently, ratio = in_turn(partial(step, [*one]), partial(step, [*many]), sizes.rounds)
    ours.steering = one
    note = f"{1000 * differently:.2f} ms a step, {1000 * alike:.2f} with one"
    yield Figure(f"{sizes.rows} configurations against 1", 100 * (ratio - 1), "%", note, at_most=CONFIGURATIONS_COST)


def arms(world: World) -> Iterator[Figure]:
    """A step of both arms of some A/Bs against one of one arm; many arms over one long prompt."""
    sizes, ours = world.sizes, world.steered
    steered = ours.steering
    for pairs, wanted in sizes.pairs:
        single = prompts(sizes.shape, pairs, 128 - sizes.new // 2, sizes.new)
        double = [one for one in single for _ in range(2)]

        def step(work: list[Request], two: bool) -> float:
            ours.steering = [*steered, *ours.unsteered] if two else steered
            return step_seconds(ours, work)

        alone, both, ratio = in_turn(partial(step, single, False), partial(step, double, True), sizes.rounds)
        note = f"{1000 * both:.2f} ms a step of {2 * pairs} rows, {1000 * alone:.2f} of {pairs}"
        yield Figure(f"a second arm beside one, {pairs} A/B", 100 * (ratio - 1), "%", note, at_most=wanted)
    ours.steering = ours.steered_by((index / sizes.arms, 0.0, 0.0) for index in range(sizes.arms))
    long = prompts(sizes.shape, 1, sizes.arm_prompt, sizes.new)
    for work in (long * sizes.arms, long, long * sizes.arms):  # the first one warms up
        start = time.perf_counter()
        answers = ours.answers(work)
        seconds = time.perf_counter() - start
        if len(work) == 1:
            first, alone = answers[0].timing.ttft_ms, seconds
    ours.steering = steered
    name = f"{sizes.arms} arms over {sizes.arm_prompt} tokens"
    note = f"{seconds:.2f} s for {sizes.new} tokens of each, {alone:.2f} s for one arm"
    yield Figure(f"{name}, against one", seconds / alone, "x", note)
    last = max(one.timing.ttft_ms for one in answers)
    yield Figure(f"{name}, the last one's first token", last, "ms", f"{first:.0f} ms for one arm")


def waiting(world: World) -> Iterator[Figure]:
    sizes, ours = world.sizes, world.steered
    long = prompts(sizes.shape, 1, sizes.long, 2)
    shorts: list[float] = []
    for number in range(1 + sizes.rounds):
        work = long + prompts(sizes.shape, 8, 32, 8, seed=number)
        seen = streamed(ours, work, lead=LEAD_S)
        if number:
            shorts += seen.first[1:]
            own = seen.first[0]
    told = percentiles(shorts)
    note = f"p99 {told['p99']:.0f} ms; the long one's own: {1000 * own:.0f} ms"
    yield Figure(f"first token behind {sizes.long} tokens, p50", told["p50"], "ms", note)


def mixed(world: World) -> Iterator[Figure]:
    """Steps of as many rows without and with a prompt beside them, round by round. The first round warms up."""
    sizes, ours, tokens = world.sizes, world.steered, world.sizes.beside_prompt
    for rows, context, wanted in sizes.beside_rows:
        work = prompts(sizes.shape, rows, context - sizes.new // 2, sizes.new)
        costs = []
        for number in range(1 + sizes.rounds):
            alone = step_seconds(ours, work)
            with_some, share = step_beside(ours, work, prompts(sizes.shape, sizes.new, tokens, 1, seed=1 + number))
            costs.append((with_some / alone - 1) / share)
        note = f"{1000 * alone:.2f} ms a step alone; {share:.0%} of the steps read a prompt"
        name = f"{rows} x {context} beside a prompt of {tokens} tokens, against alone"
        yield Figure(name, 100 * statistics.median(costs[1:]), "%", note, at_most=wanted)


def arrivals(world: World) -> Iterator[Figure]:
    """Steps that read prompts and decode beside each other. What the engine can do is told by the second half of the
    requests of a closed loop: by then they begin at different times, and all clients still have one."""
    sizes, ours = world.sizes, world.steered
    count, longest = GENERATIONS * sizes.rows, sizes.longest
    work = requests(count, SHAPES[sizes.shape]["vocab_size"], shortest=longest // 8, longest=longest)
    streamed(ours, work[: sizes.rows])  # warms up
    most = streamed(ours, work, clients=sizes.rows)
    can = (count - count // 2) / (most.asked[-1] - most.asked[count // 2 - 1])
    yield Figure("requests at once", most.tokens / most.seconds, "tokens/s", f"{can:.1f} requests/s")
    seen = streamed(ours, work, rate=SHARE * can)
    first, gaps = percentiles(seen.first), percentiles(seen.gaps)
    name = f"at {SHARE:.0%} of that"
    note = f"{SHARE * can:.1f} requests/s"
    yield Figure(f"{name}, first token, p50", first["p50"], "ms", note)
    yield Figure(f"{name}, first token, p99", first["p99"], "ms")
    yield Figure(f"{name}, between tokens, p50", gaps["p50"], "ms")
    yield Figure(f"{name}, between tokens, p99", gaps["p99"], "ms")
    rows = max(1, round(sum(seen.gaps) / seen.seconds))  # that ran at a time
    step = 1000 * median_step(ours, prompts(sizes.shape, rows, 128 - sizes.new // 2, sizes.new), sizes.rounds)
    note = f"{step:.2f} ms a step of {rows} rows, as many as ran at a time"
    yield Figure(f"{name}, between tokens, p99 against a step", gaps["p99"] / step, "x", note, at_most=GAPS)


def memory(world: World) -> Iterator[Figure]:
    """What the blocks of running texts take, beside their keys and values alone."""
    sizes, ours = world.sizes, world.steered
    ours.blocks.reset_prefix_cache()
    asked = requests(32, SHAPES[sizes.shape]["vocab_size"], shortest=8, longest=min(128, sizes.cache // 128))
    sequences = [ours.sequence(index, one) for index, one in enumerate(asked)]
    tokens = sum(len(one.prompt) + one.new for one in asked)
    for sequence, one in zip(sequences, asked, strict=True):
        assert ours.blocks.allocate(sequence, len(one.prompt) + one.new), "the cache is too small"
    block = ours.cache_bytes / (1 + ours.blocks.num_blocks)
    held = sum(len(sequence.block_table) for sequence in sequences) * block
    for sequence in sequences:
        ours.blocks.free(sequence, keep=False)
    note = f"{ours.token_bytes:,} bytes of keys and values; texts of {tokens // len(asked)} tokens on average"
    yield Figure("a token held in the cache", held / tokens, "bytes", note)
