"""An endless taskset of verifiers whose environment plays the user: guess the task's number."""

import itertools
from collections.abc import Iterator

import verifiers.v1 as vf


class RiddleConfig(vf.TasksetConfig):
    fault: str = ""


class RiddleData(vf.TaskData):
    number: int
    fault: str


class RiddleTask(vf.Task[RiddleData, vf.State, vf.TaskConfig]):
    @vf.intercept
    async def rewritten(self, response: vf.Response) -> vf.Response | None:
        if self.data.fault != "answer":
            return None
        said = response.message.model_copy(update={"content": "something else"})
        return response.model_copy(update={"message": said})


class RiddleTaskset(vf.Taskset[RiddleTask, RiddleConfig]):
    INFINITE = True

    def load(self) -> Iterator[RiddleTask]:
        for i in itertools.count():
            data = RiddleData(
                prompt="Guess my number.", system_prompt="Say a number.", number=i % 7, fault=self.config.fault
            )
            yield RiddleTask(data, self.config.task)


class RiddleEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class RiddleEnv(vf.Env[RiddleEnvConfig]):
    async def run(self, task: RiddleTask, agents: vf.Agents) -> None:
        if task.data.fault == "raise":
            raise OSError("no riddle\ntoday")
        reward = 0.0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                digits = [c for c in segment.last_reply if c.isdigit()]
                if digits and int(digits[-1]) == task.data.number:
                    reward = 1.0
                    break
                hint = "say a digit" if not digits else "lower" if int(digits[-1]) > task.data.number else "higher"
                segment = await interaction.turn(hint)
                if task.data.fault == "second":
                    await agents.player.run(task)  # a second conversation of the same episode
        interaction.trace.record_reward("guessed", reward)


__all__ = ["RiddleEnv", "RiddleTaskset"]
