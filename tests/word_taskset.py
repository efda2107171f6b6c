"""A taskset of verifiers, as a package of its own would bring it."""

import verifiers.v1 as vf


class WordData(vf.TaskData):
    answer: str = ""


class WordState(vf.State):
    seen: int = 0


class WordTask(vf.Task[WordData, WordState]):
    @vf.reward
    async def reversed_right(self, trace) -> float:
        trace.state.seen += 1
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 20)

    @vf.metric
    async def length(self, trace) -> float:
        if "why" in trace.last_reply:
            trace.info["feedback"] = "Nobody asked why."
        return len(trace.last_reply)


class WordConfig(vf.TasksetConfig):
    letters: str = "abc"
    container: bool = False
    runtime: bool = False


class InContainer(WordTask):
    NEEDS_CONTAINER = True


class InRuntime(WordTask):
    @vf.reward
    async def files(self, trace, runtime) -> float:
        return 0.0


class WordTaskset(vf.Taskset[WordTask, WordConfig]):
    INFINITE = True

    def load(self):
        index = 0
        kind = InContainer if self.config.container else InRuntime if self.config.runtime else WordTask
        while True:
            word = f"{self.config.letters}{index}"
            data = WordData(prompt=f"Reverse {word}.", system_prompt="Give the word alone.", answer=word[::-1])
            yield kind(data, self.config.task)
            index += 1


__all__ = ["WordTaskset"]
