"""Mistakes about rewards that wait: async ones, and those of endpoints."""

from planted import Replacement

ENDPOINTS = "tests/test_endpoints.py::test_"
ALL = f"{ENDPOINTS}scores_come_back_in_order_and_what_fails_is_counted_and_costs_its_own_score_only"
ASYNC = "tests/test_async_rewards.py::test_"


def _first(right):
    def wrong(text, low, high):
        return right(text[: text.find("}", text.find('"score"')) + 1], low, high)

    return wrong


def _forgetful(right):
    return lambda: type(right())()


CLASSIFIER = "tests/test_classifier.py::test_"


def _always_padded(right):
    def wrong(self, texts):
        places = sorted(texts)
        return (places[i : i + self._config.batch] for i in range(0, len(places), self._config.batch))

    return wrong


REPLACEMENTS = (
    Replacement(
        "padding hides the end of a text from a reward model",
        "drpo.rewards.classifier_model:LoadedClassifier._batches",
        _always_padded,
        (f"{CLASSIFIER}scores_are_the_models_one_by_one_however_they_are_batched",),
    ),
    Replacement(
        "a reward model travels to processes",
        "drpo.rewards.classifier:Classifier.__getstate__",
        lambda right: lambda self: dict(vars(self)),
        (f"{CLASSIFIER}it_is_written_as_a_spec_and_travels_without_its_model",),
    ),
    Replacement(
        "text and true are scores of a service",
        "drpo.rewards.judge:number",
        lambda right: lambda value, name: float(value) if isinstance(value, str | bool) else right(value, name),
        (ALL,),
    ),
    Replacement(
        "the first object with a score is the judge's",
        "drpo.rewards.judge:read_score",
        _first,
        (ALL, f"{ENDPOINTS}the_last_object_with_a_score_counts"),
    ),
    Replacement(
        "a service's answer may be of any size", "drpo.rewards.endpoint:MOST_BYTES", lambda right: 2**40, (ALL,)
    ),
    Replacement(
        "a service that never answers is asked for every score",
        "drpo.rewards.pool:_require_one",
        lambda right: lambda reward, scores: None,
        (f"{ENDPOINTS}a_service_that_never_answers_is_left_after_its_first_scores",),
    ),
    Replacement("a service that is busy is not asked again", "drpo.rewards.endpoint:_AGAIN", lambda right: (), (ALL,)),
    Replacement(
        "a wait that no time is left for is waited out",
        "drpo.rewards.endpoint:Endpoint._require_time",
        lambda right: lambda self, again, limit: None,
        (f"{ENDPOINTS}a_longer_wait_than_the_time_left_fails_at_once_and_the_line_says_so",),
    ),
    Replacement(
        "an equal request is sent again",
        "drpo.rewards.endpoint:_service",
        _forgetful,
        (f"{ENDPOINTS}an_equal_request_is_sent_once_also_while_it_is_in_flight",),
    ),
    Replacement(
        "a key is in the text of a failure",
        "drpo.rewards.endpoint:Endpoint._quoted",
        lambda right: lambda self, text: text[:100],
        (f"{ENDPOINTS}a_key_is_sent_and_neither_recorded_nor_quoted",),
    ),
    Replacement(
        "an address that a folder names is asked",
        "drpo.train.config.saved:contacts",
        lambda right: lambda text: False,
        (f"{ENDPOINTS}an_address_that_a_folder_names_is_not_asked",),
    ),
    Replacement(
        "an address that a folder names is nothing to refuse",
        "drpo.cli.folder:contacts",
        lambda right: lambda text: False,
        (f"{ENDPOINTS}an_address_that_a_folder_names_is_not_asked",),
    ),
    Replacement(
        "what an evaluation and a step ask of a service is not counted",
        "drpo.train.score:total_usage",
        lambda right: lambda usages: {},
        (f"{ENDPOINTS}a_run_counts_what_its_judge_was_asked",),
    ),
    Replacement(
        "async rewards are awaited one after the other",
        "drpo.rewards.scoring:concurrency",
        lambda right: lambda reward: 1,
        (f"{ASYNC}as_many_calls_are_awaited_at_once_as_the_reward_allows",),
    ),
    Replacement(
        "a process that dies takes the scores of all calls that it awaits",
        "drpo.rewards.pool:_answers",
        lambda right: lambda answer, places: True,
        (f"{ASYNC}calls_beside_one_that_ends_or_blocks_their_process_are_scored",),
    ),
    Replacement(
        "an async reward's own TimeoutError is a missed deadline",
        "drpo.rewards.scoring:_failure_of",
        lambda right: lambda error: right(error) if not isinstance(error, TimeoutError) else None,
        (f"{ASYNC}a_call_that_fails_or_is_late_costs_its_own_score_only_and_order_is_kept",),
    ),
)
