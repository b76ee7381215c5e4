"""A taskset as a user of verifiers writes it: sums, with a calculator as a tool."""

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: int


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, task, trace) -> float:
        return float(str(task.answer) in (trace.last_reply or ""))


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for i in range(10):
            yield SumTask(SumData(prompt=f"What is {i} + 5?", answer=i + 5), self.config.task)


__all__ = ["SumTaskset"]

if __name__ == "__main__":
    Adder.run()
