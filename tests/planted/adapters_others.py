"""Mistakes in the adapters of frameworks that their tests play by stand-ins: NeMo-RL and slime."""

from planted import Bug

N = "tests/adapters/test_nemo_rl.py::"
S = "tests/adapters/test_slime.py::"
NEMO, SLIME = "adapters/nemo_rl.py", "adapters/slime.py"
GRADIENT = "test_the_frameworks_loss_has_the_objectives_gradient"

BUGS = (
    Bug(
        7,
        "NeMo-RL's ratio is to the previous policy",
        NEMO,
        '            "prev_logprobs": sampler,\n',
        "",
        (f"{N}{GRADIENT}",),
    ),
    Bug(
        8,
        "NeMo-RL clips beside the objective",
        NEMO,
        'unclipped.ratio_clip_min, unclipped.ratio_clip_max = 1.0, float("inf")',
        "pass",
        (f"{N}{GRADIENT}[True-True-drpo(12.5)]",),
    ),
    Bug(
        16,
        "NeMo-RL's columns are one token off",
        NEMO,
        "changed[:, 1:] = rest",
        "changed[:, :-1] = rest",
        (f"{N}{GRADIENT}[True-True-none]",),
    ),
    Bug(
        3,
        "samples that NeMo-RL leaves out are counted in its figures",
        NEMO,
        'data["token_mask"][:, 1:].bool() & data["sample_mask"].bool().unsqueeze(1)',
        'data["token_mask"][:, 1:].bool()',
        (f"{N}test_figures_add_up_over_micro_batches",),
    ),
    Bug(
        19,
        "NeMo-RL adds up means of micro-batches",
        NEMO,
        "(found[name] * share).item()",
        "found[name].item()",
        (f"{N}test_figures_add_up_over_micro_batches",),
    ),
    Bug(
        9,
        "a token that the sampler could not score spoils NeMo-RL's loss",
        NEMO,
        "_after_first(generated, behavior_or_policy(next_token_logprobs, generated[:, 1:], keep))",
        "generated",
        (f"{N}test_a_filtered_token_has_no_gradient_and_an_unscored_one_is_on_policy",),
    ),
    Bug(
        20,
        "NeMo-RL's own loss is changed",
        NEMO,
        "unclipped = copy.copy(framework)",
        "unclipped = framework",
        (f"{N}test_neither_the_loss_nor_the_batch_that_is_handed_in_changes",),
    ),
    Bug(
        20,
        "NeMo-RL's loss does not survive the way to a worker",
        NEMO,
        'if name.startswith("_"):',
        'if name == "_":',
        (f"{N}test_it_reaches_a_worker_and_answers_for_the_frameworks_loss",),
    ),
    Bug(
        7,
        "NeMo-RL may pretend to be on-policy",
        NEMO,
        '    "force_on_policy_ratio": (False, "the ratio to the sampler is what the objective is about"),\n',
        "",
        (f"{N}test_refused_settings[force_on_policy_ratio-True-must be false, since]",),
    ),
    Bug(
        7,
        "slime may take its own recomputed log-probabilities for the sampler's",
        SLIME,
        'if not getattr(args, "use_rollout_logprobs", False):',
        "if False:",
        (f"{S}test_refusals",),
    ),
    Bug(
        8,
        "slime's log-ratio is taken the wrong way round",
        SLIME,
        "logp = behavior_logp - ppo_kl",
        "logp = behavior_logp + ppo_kl",
        (f"{S}{GRADIENT}",),
    ),
    Bug(
        17,
        "slime's samples are one sequence",
        SLIME,
        "torch.full_like(one, i, dtype=torch.long)",
        "torch.zeros_like(one, dtype=torch.long)",
        (f"{S}{GRADIENT}[True-gspo(0.2, 0.3)]",),
    ),
    Bug(
        3,
        "GSPO in slime averages over tokens that are not trained",
        SLIME,
        "keep = torch.cat(list(masks)).bool()",
        "keep = torch.cat(list(masks)) >= 0",
        (f"{S}{GRADIENT}[True-gspo(0.2, 0.3)]",),
    ),
    Bug(
        20,
        "slime keeps the exchanged function after an error",
        SLIME,
        "    try:\n        total, metrics = framework.policy_loss_function(args, batch, logits, sum_of_sample_mean)\n"
        "    finally:\n        framework.compute_policy_loss = original\n",
        "    total, metrics = framework.policy_loss_function(args, batch, logits, sum_of_sample_mean)\n"
        "    framework.compute_policy_loss = original\n",
        (f"{S}test_slime_is_as_it_was_afterwards",),
    ),
    Bug(
        8,
        "slime trains its own loss without a word",
        SLIME,
        "if len(seen) != 1:",
        "if len(seen) > 1:",
        (f"{S}test_a_policy_loss_that_goes_another_way_is_noticed",),
    ),
    Bug(
        17,
        "slime's whole masks meet a rank's part of the tokens",
        SLIME,
        'batch["loss_masks"] if whole_sequences else [torch.ones_like(one) for one in behavior]',
        'batch["loss_masks"]',
        (f"{S}test_masks_of_other_lengths_than_this_ranks_tokens_are_left_to_slime",),
    ),
)
