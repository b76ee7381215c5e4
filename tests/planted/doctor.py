"""A doctor that overlooks something: each check must be able to fail."""

from planted import Bug

FAULT = "tests/test_doctor.py::test_every_fault_is_found_and_named"
SOUND = "tests/test_doctor.py::test_a_sound_set_up_passes"
TRACE = "tests/test_doctor.py::test_it_leaves_no_trace"
FIGURES = "tests/test_doctor.py::test_figures_are_there_for_programs"
LAW, SYNC, TOKENS, MARKING = "doctor/law.py", "doctor/sync.py", "doctor/tokens.py", "doctor/marking.py"

BUGS = (
    Bug(
        5,
        "the doctor holds the raw law for the law at the temperature",
        LAW,
        "wrong = [name for name, (right, raw) in sides.items() if raw < right / 2]",
        "wrong = [name for name, (right, raw) in sides.items() if right < raw / 2]",
        (f"{FAULT}[log-probabilities are not at the temperature]", f"{SOUND}[0.7-0]"),
    ),
    Bug(
        5,
        "the doctor asks the trainer at temperature 1 only",
        "doctor/evidence.py",
        "own, policy.temperature = policy.temperature, temperature",
        "own = policy.temperature",
        (f"{SOUND}[1.0-0]",),
    ),
    Bug(
        6,
        "the doctor measures truncation by log-probabilities alone",
        LAW,
        "        evidence[cut] <= SURE,",
        "        evidence[cut] <= SURE or abs(float((e.logp - e.behavior_logp).mean())) < 0.01,",
        (f"{FAULT}[top-p 0.9, unconfessed]", f"{FAULT}[top-k 20, unconfessed]"),
    ),
    Bug(
        6,
        "the doctor counts the mass above a token, not below",
        "doctor/evidence.py",
        "(p * (p < own)).sum(-1)",
        "(p * (p > own)).sum(-1)",
        (f"{FAULT}[top-p 0.9]",),
    ),
    Bug(
        6,
        "the doctor asks whether tokens are likely, not whether they are as likely as they should be",
        LAW,
        'surprise, entropy = float(-e.plain.double().mean()), float(e.entropy.double().mean())',
        'surprise, entropy = float(-e.plain.double().mean()), float(-e.behavior_logp.double().mean())',
        (f"{FAULT}[the same, and it says otherwise]",),
    ),
    Bug(
        14,
        "the canary changes nothing",
        SYNC,
        "p.add_(share * size * torch.randn(p.shape, generator=generator).to(p.device))",
        "p.add_(0 * share * size * torch.randn(p.shape, generator=generator).to(p.device))",
        (f"{FAULT}[stale weights]", f"{FAULT}[a warm prefix cache]"),
    ),
    Bug(
        14,
        "the canary's head hardly moves",
        SYNC,
        "CHANGE, HEAD_CHANGE = 0.1, 0.5",
        "CHANGE, HEAD_CHANGE = 0.1, 0.01",
        (f"{FAULT}[a stale head]",),
    ),
    Bug(
        14,
        "the canary leaves its changes behind",
        SYNC,
        "                p.copy_(before[name])",
        "                p.copy_(before[name]).add_(1e-6)",
        (TRACE,),
    ),
    Bug(
        4,
        "an EOS within a completion does not matter",
        TOKENS,
        "if any(t in stop for t in inner):",
        "if any(t in stop for t in inner[:0]):",
        ("tests/test_doctor.py::test_ends_that_are_wrong",),
    ),
    Bug(
        20,
        "a reward of 1 for no answer is fine where right answers get 1 too",
        MARKING,
        "    for (_, text), m in zip(empty, none, strict=True):\n        if _right(m):",
        "    for (_, text), m in zip(empty, none, strict=True):\n        if _right(m) and not any(map(_right, gold)):",
        (f"{FAULT}[a reward of 1 for what cannot be read]",),
    ),
    Bug(
        20,
        "answers of other problems are not tried",
        MARKING,
        "    if any(map(_right, wrong)):",
        "    if any(map(_right, wrong[:0])):",
        (f"{FAULT}[a reward of 1 for any number]",),
    ),
    Bug(
        20,
        "one right answer is enough",
        MARKING,
        "        if not _right(m):\n            said",
        "        if not any(map(_right, gold)):\n            said",
        (f"{FAULT}[a reward that misses right answers]",),
    ),
    Bug(
        20,
        "a graph that is counted keeps itself alive",
        "doctor/machine.py",
        "return tensor.detach()  # a node",
        "return tensor  # a node",
        ("tests/test_doctor.py::test_counting_memory_keeps_none",),
    ),
    Bug(
        20,
        "a critic needs no memory",
        "doctor/machine.py",
        "critic=0 if critic is None else _optimiser_bytes(critic),",
        "critic=0,",
        ("tests/test_doctor.py::test_memory_counts_the_gradients_and_moments_of_a_critic",),
    ),
    Bug(
        19,
        "k3 is without its log",
        "train/metrics.py",
        '"k3": float((shift(tokens, power=1.0) - moved_by).double().mean()),',
        '"k3": float(shift(tokens, power=1.0).double().mean().abs()) + 0.01,',
        (FIGURES,),
    ),
)  # fmt: skip
