"""Mistakes that only several processes show, and checkpoints that are not what was written."""

from planted import Bug

T = "tests/test_ranks.py::"
SAME = f"{T}test_two_processes_are_one_run"
MORE = f"{T}test_more_processes_are_one_run"
RESUMED = f"{T}test_stopped_on_two_processes_and_resumed_on[one]"
D = "tests/test_train.py::test_a_damaged_checkpoint_is_passed_over_and_that_is_said"

BUGS = (
    Bug(
        2,
        "gradients are not added up over the processes",
        "ranks.py",
        "        self.add(gradients)\n",
        "",
        (SAME,),
    ),
    Bug(
        2,
        "divided gradients are averaged over the processes",
        "sharding.py",
        "divided.set_gradient_divide_factor(1.0)",
        "divided.set_gradient_divide_factor(float(mesh.size()))",
        (f"{MORE}[2-many-fsdp]",),
    ),
    Bug(
        2,
        "the head's gradient of other processes is lost",
        "sharding.py",
        "local = DTensor.from_local(self._whole_head.grad, self._mesh, [Partial()])",
        "local = DTensor.from_local(self._whole_head.grad, self._mesh, [Partial('max')])",
        (f"{MORE}[2-many-fsdp]",),
    ),
    Bug(
        2,
        "what an idle process repeats counts",
        "train/step.py",
        "idle = [replace(smallest, weight=torch.zeros_like(smallest.weight))] * missing if smallest else []",
        "idle = [smallest] * missing if smallest else []",
        (f"{MORE}[4-few-fsdp]",),
    ),
    Bug(
        19,
        "rows of a divided checkpoint are all taken for the first",
        "train/checkpoint.py",
        "starts = {name: start for name, (_, start) in rows.items() if start}",
        "starts = dict.fromkeys(rows, 0)",
        (RESUMED,),
    ),
    Bug(
        19,
        "a damaged checkpoint is resumed from",
        "train/stored.py",
        "        if wanted != (own if name == STATE else sum_of(path)):\n",
        "        if wanted is None:\n",
        (D,),
    ),
)
