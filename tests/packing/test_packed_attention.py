"""A packed batch gives what separate sequences give: hidden states, loss, and gradients of every parameter."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_models import attention_configs, build, grouped_sequences
from torch import Tensor
from transformers import PreTrainedModel

from vpd.packing import IMPLEMENTATIONS, PackedBatch, enable_packed_attention, hidden_states, pack
from vpd.packing.kernels import blocks

CONFIGS = attention_configs()
# float32 sums in another order: a few hundred roundings of 1e-7 in a network of this size.
RELATIVE = 1e-5


def loss_and_gradients(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The predicting hidden states [S, H], the mean cross-entropy, and the gradient of each parameter."""
    model.zero_grad()
    hidden = hidden_states(model.model, batch)[batch.predictor]
    loss = F.cross_entropy(model.lm_head(hidden), batch.targets)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return hidden.detach(), loss.detach(), gradients


def assert_close(packed: Tensor, separate: Tensor) -> None:
    assert (packed - separate).abs().max() <= RELATIVE * separate.abs().max()


@pytest.mark.parametrize(("checkpointing", "divided"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate(name, checkpointing, divided, monkeypatch):
    if divided:
        monkeypatch.setattr(blocks, "KEY_COST", 0)
        monkeypatch.setattr(blocks, "CALL_COST", 1)
        monkeypatch.setattr(blocks, "CHAIN_ROWS", 4)
    sequences, starts = grouped_sequences()
    model = build(CONFIGS[name]).train()
    separate = loss_and_gradients(model, pack(sequences, starts, share_prefixes=False))

    enable_packed_attention(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    packed = loss_and_gradients(model, pack(sequences, starts))

    assert_close(packed[0], separate[0])
    assert_close(packed[1], separate[1])
    for parameter, gradient in separate[2].items():
        assert gradient.abs().max() > 0, parameter
        assert_close(packed[2][parameter], gradient)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_that_fill_a_batch_up_change_nothing(name, monkeypatch):
    sequences, starts = grouped_sequences()
    model = build(CONFIGS[name])
    enable_packed_attention(model)
    longer = [[*tokens[:start], 7, 8, 9, *tokens[start:]] for tokens, start in zip(sequences, starts, strict=True)]
    found = []
    for multiple in (1, 6):
        monkeypatch.setattr("vpd.packing.batch.PAD_TO_MULTIPLE_OF", multiple)
        first = pack(sequences, starts, keeps_keys=True)
        loss, states, gradients = loss_and_gradients(model, first)
        conditioned = pack(longer, [start + 3 for start in starts], conditioned_on=first)
        assert all(batch.padding > 0 for batch in (first, conditioned)) is (multiple == 6)
        with torch.no_grad():
            found.append((loss, states, hidden_states(model.model, conditioned)[conditioned.predictor], gradients))
    for plain, filled in zip(*(values[:3] for values in found), strict=True):
        assert_close(filled, plain)
    for parameter, gradient in found[0][3].items():
        assert_close(found[1][3][parameter], gradient)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_conditioned_on_another_gives_what_it_gives_alone(name, divided, monkeypatch):
    if divided:
        monkeypatch.setattr(blocks, "KEY_COST", 0)
        monkeypatch.setattr(blocks, "CALL_COST", 1)
        monkeypatch.setattr(blocks, "CHAIN_ROWS", 4)
    sequences, starts = grouped_sequences()
    pairs = list(zip(sequences, starts, strict=True))
    inserted = [[*tokens[: start - 2], 7, 8, 9, *tokens[start - 2 :]] for tokens, start in pairs]
    # Nothing is added to one prompt, so that all of it is known except for the token that predicts the completion.
    inserted[0] = sequences[0]
    inserted_starts = [start + len(new) - len(old) for new, (old, start) in zip(inserted, pairs, strict=True)]
    model = build(CONFIGS[name])
    enable_packed_attention(model)
    first = pack(sequences, starts, keeps_keys=True)
    hidden_states(model.model, first)
    # Both groups are tried, and then the second alone, whose beginning the first batch has in two pieces.
    for begin, fewest in ((0, 15), (4, 12)):
        given = inserted[begin:], inserted_starts[begin:]
        alone, conditioned = pack(*given), pack(*given, conditioned_on=first)
        assert conditioned.token_count <= alone.token_count - fewest
        assert conditioned.targets.tolist() == alone.targets.tolist()
        with torch.no_grad():
            expected = hidden_states(model.model, alone)[alone.predictor]
            assert_close(hidden_states(model.model, conditioned)[conditioned.predictor], expected)
    with torch.no_grad():
        # A batch may also be conditioned on one that is itself conditioned on another.
        middle = pack(inserted, inserted_starts, conditioned_on=first, keeps_keys=True)
        hidden_states(model.model, middle)
        last = pack(*given, conditioned_on=middle)
        assert last.token_count < conditioned.token_count
        assert_close(hidden_states(model.model, last)[last.predictor], expected)
        first.layout.forget()
        with pytest.raises(ValueError, match="told to forget"):
            hidden_states(model.model, conditioned)


def test_a_batch_without_shared_prefixes_has_no_kv_reuse():
    sequences, starts = grouped_sequences()
    for settings in ({"keeps_keys": True}, {"conditioned_on": pack(sequences, starts, keeps_keys=True)}):
        with pytest.raises(ValueError, match="without shared prefixes"):
            pack(sequences, starts, share_prefixes=False, **settings)


def test_an_unshared_batch_may_be_run_packed_too():
    sequences, starts = grouped_sequences()
    model = build(CONFIGS["olmo3"])
    enable_packed_attention(model)
    batch = pack(sequences, starts, share_prefixes=False)
    with torch.no_grad():
        assert_close(model.model(**batch.model_inputs()).last_hidden_state[0], hidden_states(model.model, batch))


def test_bfloat16_autocast_stays_near_separate():
    sequences, starts = grouped_sequences()
    model = build(CONFIGS["llama"])
    enable_packed_attention(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed, separate = (
            hidden_states(model.model, batch)[batch.predictor]
            for batch in (pack(sequences, starts, share_prefixes=share) for share in (True, False))
        )
    # bfloat16 keeps 8 bits; three layers round a handful of times each.
    assert (packed - separate).abs().max() <= 0.03 * separate.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_layout_it_is_sdpa(name):
    model = build(CONFIGS[name])
    torch.manual_seed(3)
    input_ids = torch.randint(3, model.config.vocab_size, (3, 12))
    # Left padding, as in generation.
    attention_mask = (torch.arange(12) >= torch.tensor([[0], [2], [5]])).long()
    arguments = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    expected = model.generate(input_ids, **arguments, return_dict_in_generate=True)
    enable_packed_attention(model)
    assert model.config._attn_implementation == IMPLEMENTATIONS["blocks"]
    generated = model.generate(input_ids, **arguments, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, expected.sequences)
    assert all(torch.equal(new, old) for new, old in zip(generated.logits, expected.logits, strict=True))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"softcap": 30.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_is_not_computed_is_refused(extra, message):
    model = build(CONFIGS["llama"])
    enable_packed_attention(model)
    with pytest.raises(ValueError, match=message):
        model.model(**pack([[3, 4, 5]], [1]).model_inputs(), **extra)


def test_a_layout_of_another_batch_is_refused():
    model = build(CONFIGS["llama"])
    enable_packed_attention(model)
    inputs = pack([[3, 4, 5]], [1]).model_inputs() | {"packed": pack([[3, 4, 5, 6]], [1]).layout}
    with pytest.raises(ValueError, match="packed batch of 3 tokens"):
        model.model(**inputs)


def test_a_layout_lost_on_the_way_is_noticed():
    model = build(CONFIGS["llama"])
    enable_packed_attention(model)
    inputs = pack([[3, 4, 5]], [1]).model_inputs()
    del inputs["packed"]
    with pytest.raises(ValueError, match="did not hand the keyword"):
        model.model(**inputs)


def test_an_empty_batch_is_not_run():
    with pytest.raises(ValueError, match="is empty"):
        hidden_states(build(CONFIGS["llama"]).model, pack([], []))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_a_batch_needed_is_freed_with_it():
    sequences, starts = grouped_sequences()
    model = build(CONFIGS["llama"])
    for kernel in ("blocks", "flex"):
        enable_packed_attention(model, kernel)
        gc.collect()
        gc.disable()
        try:
            first = pack(sequences, starts, keeps_keys=kernel == "blocks")
            with torch.set_grad_enabled(kernel == "blocks"):
                hidden_states(model.model, first)
            batches = [first]
            if kernel == "blocks":
                longer = [[*x[:-1], 7, *x[-1:]] for x in sequences]
                batches.append(pack(longer, starts, conditioned_on=first))
                with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                    hidden_states(model.model, batches[1])
            held = [weakref.ref(batch.layout) for batch in batches]
            held += [weakref.ref(made) for batch in batches for made in batch.layout._prepared.values()]
            assert len(held) >= 2
            del first, batches
            assert not any(reference() for reference in held), kernel
        finally:
            gc.enable()
