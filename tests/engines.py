"""Helpers for rollout engines."""

from __future__ import annotations

from vpd.rollout import RolloutEngine, Sample, SamplingParameters
from vpd.seeds import mix


def generate(engine: RolloutEngine, prompts, *, seed=0, as_teacher=False, **parameters):
    """Sample with the parameters given as keywords."""
    return engine.generate(prompts, SamplingParameters(**parameters), seed=seed, as_teacher=as_teacher)


class ScriptedEngine:
    """An engine without a network: completions are letters that the seed, the place and the number decide.

    Attributes:
        calls: What each call was: the number of its prompts, its parameters, its seed, and whether the teacher answers.
    """

    def __init__(self, tokenizer, letters="abcdefgh"):
        self.calls = []
        self._tokenizer = tokenizer
        self._letters = letters

    def generate(self, prompts, parameters, *, seed, as_teacher=False):
        self.calls.append((len(prompts), parameters, seed, as_teacher))
        numbers = range(parameters.num_generations)
        return [[self._sample(mix(seed, place, number)) for number in numbers] for place in range(len(prompts))]

    def sync(self):
        pass

    def release(self):
        pass

    def _sample(self, drawn):
        text = self._letters[drawn % len(self._letters)] * (1 + drawn % 3)
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Sample(token_ids, [-1.0] * len(token_ids), truncated=False)
