"""A packed batch scores the completion tokens, each by the token that predicts it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.packing import pack

# Few examples and no deadline: the suite shares its cores.
few = settings(max_examples=40, deadline=None)


@st.composite
def scored_sequences(draw):
    sequences = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=8))
    return sequences, [draw(st.integers(1, len(sequence))) for sequence in sequences]


@few
@given(scored_sequences(), st.booleans())
def test_every_completion_token_has_its_predictor(sequences_and_starts, share_prefixes):
    sequences, starts = sequences_and_starts
    batch = pack(sequences, starts, share_prefixes=share_prefixes)
    expected = [
        (i, sequence[p], p - 1, sequence[p - 1])
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True))
        for p in range(start, len(sequence))
    ]
    scored = zip(
        batch.rollout.tolist(),
        batch.targets.tolist(),
        batch.position_ids[batch.predictor].tolist(),
        batch.input_ids[batch.predictor].tolist(),
        strict=True,
    )
    assert list(scored) == expected


@few
@given(scored_sequences())
def test_the_computed_tokens_are_the_distinct_ones_but_the_last(sequences_and_starts):
    sequences, starts = sequences_and_starts
    scored = [sequence for sequence, start in zip(sequences, starts, strict=True) if start < len(sequence)]
    prefixes = {tuple(sequence[:end]) for sequence in scored for end in range(1, len(sequence))}
    batch = pack(sequences, starts)
    assert batch.token_count == len(prefixes)
    assert batch.is_empty == (not scored)
    assert batch.padded_token_count == len(sequences) * max(map(len, sequences), default=0)


@few
@given(scored_sequences())
def test_rows_are_the_sequences_but_the_last_token(sequences_and_starts):
    sequences, starts = sequences_and_starts
    batch = pack(sequences, starts, share_prefixes=False)
    scored = [sequence for sequence, start in zip(sequences, starts, strict=True) if start < len(sequence)]
    assert [row.input_ids[0].tolist() for row in batch.rows()] == [sequence[:-1] for sequence in scored]
    assert all(row.position_ids[0].tolist() == list(range(row.stop - row.start)) for row in batch.rows())


@few
@given(st.integers(200, 300), st.integers(1, 40), st.booleans())
def test_a_batch_is_filled_up_to_a_multiple_where_that_is_little(prompt, completion, keeps_keys):
    """The added tokens belong to no sequence, stand at the end, and are not counted."""
    tokens = list(range(5, 5 + prompt + 2 * completion))
    sequences = [tokens[: prompt + completion], tokens[:prompt] + tokens[prompt + completion :]]
    batch = pack(sequences, [prompt, prompt], keeps_keys=keeps_keys)
    needed = prompt + 2 * (completion - 1)
    assert batch.token_count == needed
    length = batch.input_ids.numel()
    assert length == batch.position_ids.numel() == batch.layout.token_count
    assert (length == needed) if needed < 256 else (length % 16 == 0 and 0 <= length - needed == batch.padding < 16)
    assert batch.input_ids[:needed].tolist() == [*sequences[0][:-1], *sequences[1][prompt:-1]]
    assert not batch.input_ids[needed:].any()
    assert int(batch.predictor.max()) < needed
    assert pack(sequences, [prompt, prompt], share_prefixes=False).padding == 0


def test_a_batch_conditioned_on_another_fills_up_the_tokens_that_the_other_lacks():
    prompt, feedback, completion = list(range(300)), list(range(300, 570)), list(range(600, 610))
    first = pack([prompt + completion], [300], keeps_keys=True)
    assert (first.token_count, first.padding) == (309, 11)
    conditioned = pack([prompt + feedback + completion], [570], conditioned_on=first)
    assert (conditioned.token_count, conditioned.padding) == (279, 9)
    assert conditioned.layout.token_count == 288
    # None of its padding is taken from the first batch.
    assert not conditioned.layout._known.mask[-9:].any()
    assert conditioned.layout._known.mask.sum() == 300


def test_no_sequences_make_an_empty_batch():
    batch = pack([], [])
    assert batch.is_empty
    assert batch.to("cpu").input_ids.shape == (0,)
    assert batch.targets.shape == batch.predictor.shape == batch.rollout.shape == (0,)


@pytest.mark.parametrize("start", [0, 4])
def test_a_completion_outside_its_sequence_is_refused(start):
    with pytest.raises(ValueError, match="must start between 1"):
        pack([[1, 2, 3]], [start])


def test_a_shared_batch_has_no_rows():
    with pytest.raises(ValueError, match="share_prefixes=False"):
        next(pack([[1, 2, 3]], [1]).rows())
