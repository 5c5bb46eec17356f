"""What sequences have in common is computed once and kept once."""

from server.engine.sequence import SamplingParams, SteeringParams
from steering.types import SequenceSteering
from tests.server.conftest import columns, tiny_llama
from tests.server.desk import Desk, sequence

PROMPT = tuple(range(100, 160))


def test_thirty_two_arms_of_a_prompt_hold_it_once_and_compute_it_once() -> None:
    desk = Desk(tiny_llama(320), num_blocks=100, block_size=8, max_num_seqs=32, max_num_batched_tokens=128)
    handle = desk.bank.add(columns(32, seed=1))
    params = SamplingParams(max_new_tokens=4, temperature=0)
    arms = [
        sequence(
            PROMPT,
            index=index,
            request_id="arms",
            sampling_params=params,
            steering_params=SteeringParams(SequenceSteering.of([(handle, (index / 16 - 1, 0.5, 0.0))])),
        )
        for index in range(32)
    ]
    desk.engine.submit(arms, desk.take)
    used = []
    while not all(arm in desk.finished for arm in arms):
        desk.step()
        used.append(desk.engine.status.used_blocks)
    full, own = len(PROMPT) // 8, 1  # each arm writes into a copy of the block that the prompt has begun
    assert max(used) == full + 32 * own
    assert used[-1] == 0
    assert sum(desk.computed) == len(PROMPT) + 31 + 32 * 3, "the prompt once, its last token and the answer for each"
    assert len({desk.finished[arm].token_ids for arm in arms}) > 4, "they are not all the same text"
    assert [desk.steered(arm) for arm in arms] == [4] * 32


def test_both_arms_of_a_comparison_cost_one_prefill() -> None:
    desk = Desk(tiny_llama(320))
    handle = desk.bank.add(columns(32, seed=1))
    params = SamplingParams(max_new_tokens=3, temperature=0)
    steering = SteeringParams(SequenceSteering.of([(handle, (1.0, 0.0, 0.0))]))
    arms = [sequence(PROMPT, sampling_params=params, steering_params=one) for one in (steering, SteeringParams())]
    desk.run(arms)
    assert sum(desk.computed) == len(PROMPT) + 1 + 2 * 2


def test_a_conversation_that_goes_on_computes_its_new_turn_alone() -> None:
    desk = Desk(tiny_llama(320))
    params = SamplingParams(max_new_tokens=6, temperature=0)
    first = sequence(PROMPT[:30], sampling_params=params)
    answer = desk.run([first])[first]
    before = sum(desk.computed)
    turn = tuple(range(200, 210))
    second = sequence((*PROMPT[:30], *answer, *turn), sampling_params=params)
    desk.run([second])
    # The answer's last token was sampled and never computed.
    assert sum(desk.computed) - before == 1 + len(turn) + 5
