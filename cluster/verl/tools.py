"""The tool of the setting qwen3-4b-tools: verl loads this file in each of its agent-loop workers."""

from verl.tools.function_tool import function_tool

from drpo.environments.arithmetic import calculate


@function_tool
def calculator(expression: str) -> str:
    """Work out sums, differences and products of integers.

    Args:
        expression: The expression, such as "12 * (3 + 4)".
    """
    value = calculate(expression)
    return "Error: write integers with +, - or * between them" if value is None else str(value)
