"""Mistakes in the rewards and the tasks."""

from planted import Bug

REWARDS = "tests/test_rewards.py::"
TASKS = "tests/test_tasks.py::"

DISJOINT = f"{TASKS}test_training_and_held_out_problems_are_disjoint"
PURE = f"{TASKS}test_sampling_is_a_pure_function_with_unique_ids"
EPOCHS = f"{TASKS}test_records_go_through_every_epoch_once"
COLLAPSE = f"{TASKS}test_collapse_keeps_one_of_each_question_that_has_one_answer"

BUGS = (
    Bug(
        20,
        "an unreadable answer marks everything wrong",
        "rewards/math.py",
        "    if not gold:\n",
        "    if False:\n",
        (f"{REWARDS}test_math_verify_refuses_an_answer_that_it_cannot_read",),
    ),
    Bug(
        20,
        "a scorer's exception on bad text is a failure",
        "rewards/gym.py",
        "            return 0.0\n",
        "            raise\n",
        (f"{REWARDS}test_gym_score_marks_a_text_that_its_scorer_chokes_on_as_wrong_and_reports_a_broken_entry",),
    ),
    Bug(
        20,
        "every exception of a scorer is a wrong answer",
        "rewards/gym.py",
        '            self._dataset.score_answer(problem.data["answer"], problem.data)\n',
        "",
        (f"{REWARDS}test_gym_score_marks_a_text_that_its_scorer_chokes_on_as_wrong_and_reports_a_broken_entry",),
    ),
    Bug(20, "held-out sums are trained on", "tasks/addition.py", " in self._held_out:", " in ():", (DISJOINT,)),
    Bug(
        20,
        "held-out questions of a gym are trained on",
        "tasks/reasoning_gym.py",
        "useless = useless + 1 if _is_held_out(entry) else 0",
        "useless = 0",
        (DISJOINT,),
    ),
    Bug(
        20,
        "held-out questions repeat",
        "tasks/reasoning_gym.py",
        '    for entry in _stream(task, "held out"):\n        if len(found) == n',
        '    for entry in _stream(task, "held out"):\n        if len(found) == n + 1',
        (f"{TASKS}test_held_out_problems_are_the_same_and_a_prefix",),
    ),
    Bug(
        20,
        "the step does not move the stream",
        "tasks/reasoning_gym.py",
        '_stream(task, "train", seed, step)',
        '_stream(task, "train", seed)',
        (PURE,),
    ),
    Bug(
        20,
        "the run's seed is ignored",
        "tasks/records.py",
        "_order(len(train), seed, epoch)",
        "_order(len(train), 0, epoch)",
        (PURE, f"{TASKS}test_records_take_another_order_every_epoch_and_seed"),
    ),
    Bug(
        20,
        "an epoch begins anew with every rollout",
        "tasks/records.py",
        "divmod(step * n + slot, len(train))",
        "divmod(step * n + slot % len(train), len(train))",
        (EPOCHS,),
    ),
    Bug(
        20,
        "every epoch has the same order",
        "tasks/records.py",
        "_order(len(train), seed, epoch)",
        "_order(len(train), seed, 0)",
        (f"{TASKS}test_records_take_another_order_every_epoch_and_seed",),
    ),
    Bug(
        20,
        "training keeps what stands in the held-out set",
        "tasks/records.py",
        "train = without(questions, held_out, self.overlap_prefix)",
        "train = questions",
        (DISJOINT, f"{TASKS}test_dapo_math_is_cleaned"),
    ),
    Bug(
        20,
        "the prefix is ignored",
        "tasks/cleaning.py",
        ".casefold()[:prefix]",
        ".casefold()",
        (f"{TASKS}test_without_drops_what_agrees_with_the_held_out_set",),
    ),
    Bug(
        20,
        "questions with conflicting answers are kept",
        "tasks/cleaning.py",
        "                conflicting.add(key)",
        "                pass",
        (COLLAPSE,),
    ),
    Bug(
        20,
        "white space makes a question new",
        "tasks/cleaning.py",
        '    return "".join(text.split())',
        "    return text",
        (COLLAPSE, f"{TASKS}test_dapo_math_is_cleaned"),
    ),
    Bug(
        20,
        "braces in a template are filled in",
        "tasks/records.py",
        'self.template.replace("{prompt}", question.text)',
        "self.template.format(prompt=question.text)",
        (f"{TASKS}test_records_ask_through_the_template_and_take_the_answer_after_the_mark",),
    ),
    Bug(
        20,
        "the first mark ends the working",
        "tasks/records.py",
        "answer.rpartition(self.answer_after)",
        "answer.partition(self.answer_after)",
        (f"{TASKS}test_records_ask_through_the_template_and_take_the_answer_after_the_mark",),
    ),
    Bug(
        20,
        "a line separator inside a string ends the line",
        "tasks/rows.py",
        'text.split("\\n")',
        "text.splitlines()",
        (f"{TASKS}test_every_kind_of_file_holds_the_same_rows",),
    ),
)
