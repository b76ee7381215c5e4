"""Mistakes in what vLLM is asked, in how its answers are read, and in what happens when a server fails."""

from planted import Bug

CLIENT = "tests/test_vllm_client.py::"
SENT = f"{CLIENT}test_what_is_sent_is_the_law_and_nothing_is_left_to_a_generation_config"
CANARY = f"{CLIENT}test_sync_canary"
LAW = f"{CLIENT}test_log_probabilities_are_those_of_the_law"
LIKELIEST = f"{CLIENT}test_the_likeliest_tokens_are_those_of_the_law"
UNUSABLE = f"{CLIENT}test_an_answer_that_cannot_be_used_ends_in_one_line"
SEEDS = f"{CLIENT}test_every_completion_has_a_seed_of_its_own"
PASSES = f"{CLIENT}test_what_passes_is_tried_again"
DEAD = f"{CLIENT}test_a_dead_server_ends_in_one_line_after_so_many_attempts"
DIES = f"{CLIENT}test_a_server_that_dies_loses_no_finished_step"
RESTARTED = f"{CLIENT}test_a_server_restarted_between_two_rollouts_gets_the_weights_again"
OTHERS = f"{CLIENT}test_answers_drawn_with_other_weights_are_never_used"
TIED = f"{CLIENT}test_a_tied_head_is_packed_again"
STALE = f"{CLIENT}test_a_head_that_stays_stale_is_an_error"
WORLD = f"{CLIENT}test_the_trainers_world_outlives_the_engine"
PLACE = f"{CLIENT}test_of_several_processes_each_has_an_engine_on_the_one_device_that_it_sees"
FAILS = f"{CLIENT}test_an_engine_that_fails_in_process_ends_in_one_line_and_loses_no_finished_step"
REFUSED = f"{CLIENT}test_an_engine_is_closed_where_what_it_was_made_for_is_refused"
STOPS = f"{CLIENT}test_the_first_stop_token_ends_and_is_kept"

BUGS = (
    Bug(
        2,
        "an engine that ends takes the trainer's processes apart",
        "rollout/vllm.py",
        "    _spare_world()\n    return vllm",
        "    return vllm",
        (f"{WORLD}[2-closed]", f"{WORLD}[2-collected]"),
    ),
    Bug(
        2,
        "the world that vLLM made for itself stays behind",
        "rollout/vllm.py",
        "        if _world_size() > 1:\n            dist.destroy",
        "        if dist.is_initialized():\n            dist.destroy",
        (f"{WORLD}[1-closed]",),
    ),
    Bug(
        2,
        "after an engine's end the processes can no longer part",
        "rollout/vllm.py",
        "            dist.destroy_process_group = destroy_group\n",
        "            pass\n",
        (f"{WORLD}[2-closed]",),
    ),
    Bug(
        2,
        "vLLM takes the launcher's local rank for an index into the devices that a process sees",
        "rollout/vllm.py",
        '"LOCAL_RANK": str(device.index or 0)}',
        '"LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}',
        (PLACE,),
    ),
    Bug(
        2,
        "an engine whose run is refused is left to be collected when the processes have parted",
        "train/setup.py",
        "        engine.close()  # while the processes are still together\n",
        "",
        (REFUSED,),
    ),
    Bug(
        5,
        "the temperature is not sent",
        "rollout/vllm_request.py",
        '        "temperature": sampling.temperature,\n',
        '        "temperature": 1.0,\n',
        (SENT, LAW),
    ),
    Bug(
        6,
        "top_k is left to the model's generation_config.json",
        "rollout/vllm_request.py",
        '        "top_k": sampling.top_k,\n',
        "",
        (SENT, f"{CLIENT}test_a_models_generation_config_changes_nothing_but_the_stop_words"),
    ),
    Bug(
        6,
        "vLLM reads the generation config",
        "rollout/vllm.py",
        'generation_config="vllm",',
        'generation_config="auto",',
        (f"{CLIENT}test_a_models_generation_config_changes_nothing_but_the_stop_words",),
    ),
    Bug(
        9,
        "the server's number for a broken log-probability is taken for one",
        "rollout/server.py",
        'float(place["logprob"]) if place["logprob"] > FLOOR else math.nan',
        'float(place["logprob"])',
        (f"{UNUSABLE}[broken]",),
    ),
    Bug(
        14,
        "the prefix cache outlives the weights, in process",
        "rollout/vllm.py",
        "if not self._llm.reset_prefix_cache():",
        "if self._llm is None:",
        (f"{CANARY}[in process]",),
    ),
    Bug(
        14,
        "the prefix cache outlives the weights, on a server",
        "rollout/server.py",
        """if not self._post("/reset_prefix_cache?reset_running_requests=true").get("success"):""",
        "if label is None:",
        (f"{CANARY}[server]",),
    ),
    Bug(
        14,
        "a tied head is not packed again",
        "rollout/vllm_worker.py",
        "        layer.quant_method.process_weights_after_loading(layer)\n",
        "",
        (TIED,),
    ),
    Bug(
        14,
        "a stale head goes unnoticed",
        "rollout/vllm_worker.py",
        "        _check_packed(layer)\n",
        "",
        (STALE,),
    ),
    Bug(
        14,
        "a restarted server is not noticed",
        "rollout/server.py",
        "if labels != {label}:",
        "if not labels:",
        (RESTARTED, OTHERS),
    ),
    Bug(
        14,
        "a restarted server is not sent the weights",
        "rollout/server.py",
        "if any(isinstance(failure, OtherWeightsError) for failure in failures):",
        "if any(isinstance(failure, Answer) for failure in failures):",
        (RESTARTED, OTHERS),
    ),
    Bug(
        14,
        "new weights are not stamped",
        "rollout/vllm.py",
        '"vLLM kept its prefix cache, whose keys are those of the old weights")\n        self.version = version',
        '"vLLM kept its prefix cache, whose keys are those of the old weights")',
        (f"{CANARY}[in process]",),
    ),
    Bug(
        20,
        "what fails is not tried again",
        "rollout/server.py",
        "for attempt in range(self._patience.attempts):",
        "for attempt in range(1):",
        (PASSES, DEAD),
    ),
    Bug(
        20,
        "a server that died during the update ends the run before the step is recorded",
        "rollout/server.py",
        """        try:
            self._send()
        except UnreachableError as problem:
            log.warning(
""",
        """        self._send()
        try:
            pass
        except UnreachableError as problem:
            log.warning(
""",
        (f"{DIES}[update]",),
    ),
    Bug(
        20,
        "an engine that fails in process ends in its own traceback",
        "rollout/vllm.py",
        '            self._failed = _broken("sampled", error)\n            raise self._failed from error\n',
        "            raise\n",
        (FAILS,),
    ),
    Bug(
        20,
        "an engine that failed in the background takes new weights",
        "rollout/vllm.py",
        '            self._failed = _broken("sampled", error)\n            raise self._failed from error\n',
        '            raise _broken("sampled", error) from error\n',
        (f"{CLIENT}test_new_weights_for_an_engine_that_failed_say_why_it_failed",),
    ),
)
