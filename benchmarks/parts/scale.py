"""How large the cases are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """What the sizes of all cases follow from.

    Args:
        quick: everything small enough to be over in seconds; the figures mean nothing.
        repeats: rounds of each case.
        cuda: a GPU does the work.
        memory_bytes: of the main memory, or of the GPU.
        fast_bf16: the processor multiplies bf16 itself, so that bf16 is measured.
    """

    quick: bool
    repeats: int
    cuda: bool
    memory_bytes: int
    fast_bf16: bool

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that are worth a measurement here; emulated bf16 is slower than fp32 for everyone."""
        return ("bf16", "fp32") if self.fast_bf16 else ("fp32",)
