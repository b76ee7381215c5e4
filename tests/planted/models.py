"""Mistakes in what leaves the trainer, and in how far a model's positions reach."""

from contextlib import nullcontext
from typing import Any

from planted import Replacement

F, P, S = "tests/test_families.py::", "tests/test_positions.py::", "tests/test_saving.py::"


def _load_without_buffers(right: Any) -> Any:
    def load(self: Any, state: Any, version: int) -> None:
        self._takers = {name: take for name, take in self._takers.items() if "e_score" not in name}
        right(self, state, version)

    return load


REPLACEMENTS = (
    Replacement(
        "a saved model keeps the buffers that its configuration gives",
        "drpo.model.policy:fill",
        lambda right: (
            lambda model, state: model.load_state_dict(
                {n: t for n, t in state.items() if n in dict(model.named_parameters())}, strict=False
            )
        ),
        (
            f"{S}test_the_state_and_the_plain_model_hold_persistent_buffers",
            f"{F}test_a_handful_are_as_documented[deepseek_v3]",
        ),
    ),
    Replacement(
        "the engine keeps the buffers that it began with",
        "drpo.rollout.transformers:TransformersEngine.load_weights",
        _load_without_buffers,
        (f"{S}test_engines_take_buffers_as_they_are_now",),
    ),
    Replacement(
        "a checkpoint leaves buffers out",
        "drpo.model.policy:Policy.checkpointed",
        lambda right: lambda self: self.trainable(),
        (f"{S}test_a_checkpoint_holds_buffers_and_an_older_one_leaves_them",),
    ),
    Replacement(
        "what was saved is not read back",
        "drpo.model.saving:_unlike",
        lambda right: lambda *arguments: None,
        (f"{S}test_a_folder_that_is_not_the_trained_model_is_kept_aside",),
    ),
    Replacement(
        "a folder is compared with logits on a grid",
        "drpo.model.policy:unrounded",
        lambda right: nullcontext,
        (f"{S}test_a_sound_folder_appears_with_ordinary_modes",),
    ),
    Replacement(
        "a weight of two modules is adapted twice and merged once",
        "drpo.model.policy:_share_adapters",
        lambda right: lambda model: None,
        (f"{S}test_layers_that_share_a_weight_share_its_adapter",),
    ),
    Replacement(
        "tensors that share memory show at the end",
        "drpo.model.saving:remove_tied_weights_from_state_dict",
        lambda right: lambda state, model: state,
        (f"{S}test_a_model_that_could_not_be_saved_is_refused_in_one_line",),
    ),
    Replacement(
        "weights are readable by their owner alone",
        "drpo.model.saving:_level_modes",
        lambda right: lambda folder: None,
        (f"{S}test_a_sound_folder_appears_with_ordinary_modes",),
    ),
    Replacement(
        "checkpoints are readable by their owner alone",
        "drpo.train.tensor_files:set_usual_mode",
        lambda right: lambda path: None,
        ("tests/test_folders.py::test_files_and_folders_of_a_run_have_the_modes_of_the_umask",),
    ),
    Replacement(
        "16 bits for what a family keeps in float32",
        "drpo.model.saving:cast",
        lambda right: lambda model, dtype: model.to(dtype),
        (f"{S}test_bfloat16_spares_what_the_family_keeps_in_float32",),
    ),
    Replacement(
        "generation defaults that cannot be written stay",
        "drpo.model.loading:_require_savable_generation",
        lambda right: lambda model, name: None,
        (f"{S}test_generation_defaults_that_cannot_be_written_are_left_out",),
    ),
    Replacement(
        "whether a model can be saved shows at the end",
        "drpo.model.saving:require_savable",
        lambda right: lambda model, tokenizer: None,
        (f"{S}test_a_model_that_could_not_be_saved_is_refused_in_one_line",),
    ),
    Replacement(
        "sequences may pass the limit of a rotary embedding",
        "drpo.model.positions:Limit.require",
        lambda right: lambda self, tokens, what="": None,
        (f"{P}test_the_trainer_refuses_what_is_longer",),
    ),
    Replacement(
        "the sampler's prompts may pass the limit of a rotary embedding",
        "drpo.rollout.prompts:PromptLimits.too_long",
        lambda right: lambda self, prompt_ids, sampling: False,
        (f"{P}test_the_sampler_refuses_what_may_become_longer",),
    ),
    Replacement(
        "prompts are not looked at before the first step",
        "drpo.train.setup:_require_room",
        lambda right: lambda *arguments: None,
        (f"{P}test_a_run_is_refused_before_its_first_step",),
    ),
    Replacement(
        "an unknown rotary embedding is taken for an ordinary one",
        "drpo.model.positions:_depends_on_the_longest",
        lambda right: lambda model: False,
        (f"{P}test_an_unknown_dependence_is_refused",),
    ),
    Replacement(
        "packing is checked within the window",
        "drpo.model.packed_attention:narrowed",
        lambda right: lambda model: nullcontext(),
        (f"{P}test_packing_is_checked_past_a_window_that_no_check_could_fill",),
    ),
    Replacement(
        "a sampler's cache is trusted",
        "drpo.rollout.trial:_gap",
        lambda right: lambda a, b: 0.0,
        (f"{P}test_a_cache_that_gives_other_logits_is_not_used",),
    ),
)
