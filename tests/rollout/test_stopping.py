import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vpd.rollout.stopping import StopCondition


def end(condition, token_ids):
    """The number of tokens after which the condition ends the completion."""
    return next((n for n in range(1, len(token_ids) + 1) if condition(token_ids[:n])), None)


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("the answer is 4\n\nNext", ["\n\n"], "the answer is 4\n\n"),
        ("a STOP b END", ["END", "STOP"], "a STOP"),
        ("ST STO STOP", ["STOP"], "ST STO STOP"),
        ("word and", [" "], "word "),
        ("voilà, été ok", ["été"], "voilà, été"),
        ("nothing here", ["STOP"], None),
    ],
)
def test_ends_with_the_first_token_after_which_the_text_contains_a_stop_string(tokenizer, text, stops, kept):
    token_ids = tokenizer.encode(text)
    length = end(StopCondition(tokenizer, [], stops), token_ids)
    assert (None if length is None else tokenizer.decode(token_ids[:length])) == kept


def test_a_space_that_the_decoder_drops_at_the_beginning_still_ends():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert end(StopCondition(tokenizer, [], [" "]), [0, 2, 2, 1, 0]) == 4


def test_a_stop_string_may_begin_far_before_the_window_of_short_ones(tokenizer):
    stop = "a rather long stop string, spanning many tokens"
    token_ids = tokenizer.encode("x" * 30 + stop + "y")
    assert end(StopCondition(tokenizer, [], ["!", stop]), token_ids) == len(token_ids) - 1


def test_every_end_of_sequence_token_ends(tokenizer):
    condition = StopCondition(tokenizer, {2, 50}, [])
    assert [end(condition, [7, token, 8]) for token in (2, 50, 51)] == [2, 2, None]


def test_few_tokens_are_decoded(tokenizer, monkeypatch):
    condition = StopCondition(tokenizer, [], ["#"])
    token_ids = tokenizer.encode("abc" * 50)
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **kwargs: decoded.append(len(ids)) or decode(ids, **kwargs)
    )
    assert end(condition, token_ids) is None
    assert sum(decoded) <= 2 * len(set(token_ids))
