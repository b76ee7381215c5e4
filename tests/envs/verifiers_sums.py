"""A taskset as a user of verifiers writes it: sums, with an adder as a tool."""

from collections.abc import Iterator

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: int


class SumConfig(vf.TasksetConfig):
    pass


class Adder(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        return float(str(task.answer) in (trace.last_reply or ""))


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self) -> Iterator[SumTask]:
        for i in range(10):
            yield SumTask(SumData(prompt=f"What is {i} + 5?", answer=i + 5), self.config.task)

    @classmethod
    def toolsets(cls, config: SumConfig) -> list[vf.Toolset]:
        return [Adder(vf.SharedToolsetConfig())]


__all__ = ["SumTaskset"]

if __name__ == "__main__":
    Adder.run()
