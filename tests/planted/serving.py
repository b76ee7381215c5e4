"""Mistakes in what is shown, streamed and served of a model's answers."""

from dataclasses import replace
from typing import Any

from planted import Replacement

CHAT = "tests/test_chat.py::"
EXPORT = "tests/test_export.py::"
SERVE = "tests/test_serve.py::"
PIECES = f"{CHAT}test_the_pieces_are_the_whole"


def _untempered(right: Any) -> Any:
    """The token is drawn at the temperature; the probability that is shown is that at 1."""

    def draw(logits: Any, u: Any, sampling: Any) -> Any:
        token, _ = right(logits, u, sampling)
        return token, logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]

    return draw


def _forgetting(right: Any) -> Any:
    """What was held back at the end of an answer is lost."""

    def end(self: Any, finish_reason: Any) -> Any:
        return replace(right(self, finish_reason), text="", tokens=())

    return end


def _again(right: Any) -> Any:
    """A piece begins where the one before it began."""

    def piece(self: Any, *arguments: Any) -> Any:
        before = self._sent
        made = right(self, *arguments)
        self._sent = before
        return made

    return piece


def _one_seed(right: Any) -> Any:
    return lambda self, ids, sampling, key, stop=(): right(self, ids, sampling, key[:2], stop)


def _as_queries(right: Any) -> Any:
    def values(name: str, tensor: Any, config: Any) -> Any:
        from drpo.model.gguf_file import interleaved

        if config.model_type != "llama" or ".k_proj." not in name:
            return right(name, tensor, config)
        return interleaved(tensor.float().numpy(), config.num_attention_heads)

    return values


REPLACEMENTS = (
    Replacement(
        "the probability that a chat shows is not that of the distribution sampled from",
        "drpo.rollout.stream:draw",
        _untempered,
        (f"{CHAT}test_the_probability_shown_is_that_of_the_model", f"{CHAT}test_what_is_streamed_is_what_is_generated"),
    ),
    Replacement(
        "a streamed answer loses its last tokens",
        "drpo.serving.text:TextStream.end",
        _forgetting,
        (PIECES,),
    ),
    Replacement(
        "a streamed answer repeats its tokens",
        "drpo.serving.text:TextStream._piece",
        _again,
        (PIECES, f"{CHAT}test_the_text_is_that_of_a_rollout"),
    ),
    Replacement(
        "a streamed text goes on after a text that ends it",
        "drpo.serving.text:TextStream._held",
        lambda right: lambda self: 0,
        (PIECES,),
    ),
    Replacement(
        "a chat encodes anew what the model said",
        "drpo.serving.dialogue:glue",
        lambda right: lambda *arguments, **options: None,
        (f"{CHAT}test_a_conversation_goes_on_as_in_training",),
    ),
    Replacement(
        "every question of a chat has the same random numbers",
        "drpo.serving.sampler:Request",
        lambda right: lambda ids, sampling, stop, key, name: right(ids, sampling, stop, key[:2], name),
        (f"{CHAT}test_reset_begins_anew_and_other_commands_are_no_questions",),
    ),
    Replacement(
        "a chat leaves out the run's system message",
        "drpo.cli.chat:opening",
        lambda right: lambda tokenizer, observation, system: right(tokenizer, None, system),
        (f"{CHAT}test_a_run_is_read_as_it_was_trained",),
    ),
    Replacement(
        "a run that has not finished speaks with its initial weights",
        "drpo.train.checkpoint:restore",
        lambda right: lambda *arguments: None,
        (f"{CHAT}test_a_run_that_has_not_finished",),
    ),
    Replacement(
        "the answers to one request share their random numbers",
        "drpo.serving.sampler:Sampler.stream",
        _one_seed,
        (f"{SERVE}test_answers_of_one_request_differ_and_are_those_of_the_seed",),
    ),
    Replacement(
        "a server that speaks OpenAI's API answers everybody",
        "drpo.serving.http:Service.knows",
        lambda right: lambda self, authorization: True,
        (f"{SERVE}test_nobody_is_answered_without_the_key",),
    ),
    Replacement(
        "a key is enough that begins as the token does",
        "drpo.serving.http:Service.knows",
        lambda right: lambda self, authorization: f"Bearer {self.token}".startswith(authorization or "-"),
        (f"{SERVE}test_nobody_is_answered_without_the_key",),
    ),
    Replacement(
        "a request may be of any size",
        "drpo.serving.http:MOST_BYTES",
        lambda right: 10**11,
        (f"{SERVE}test_a_request_is_of_bounded_size",),
    ),
    Replacement(
        "a request that never arrives is waited for",
        "drpo.serving.http:Handler._hang_up",
        lambda right: lambda self: None,
        (f"{SERVE}test_a_request_that_does_not_arrive_is_given_up",),
    ),
    Replacement(
        "a server that closes leaves its answers to the end of Python",
        "drpo.serving.http:Server.close",
        lambda right: lambda self: self.server_close() is None,
        (f"{SERVE}test_a_server_that_closes_ends_its_answers",),
    ),
    Replacement(
        "a prompt that cannot fit is tokenised first",
        "drpo.serving.requests:_require_short",
        lambda right: lambda *arguments: None,
        (f"{SERVE}test_what_is_refused_is_not_tokenised_first",),
    ),
    Replacement(
        "a client that has hung up is answered to the end",
        "drpo.serving.http:Handler._while_heard",
        lambda right: lambda self, pieces: pieces,
        (f"{SERVE}test_a_client_that_hangs_up_ends_its_answer",),
    ),
    Replacement(
        "a request that asks what is not supported is answered without it",
        "drpo.serving.requests:_refuse",
        lambda right: lambda name, value, why: None,
        (f"{SERVE}test_what_cannot_be_done_is_refused_in_the_shape_of_the_api",),
    ),
    Replacement(
        "a stream has the log-probabilities of half its tokens",
        "drpo.serving.text:TextStream._piece",
        lambda right: lambda self, *rest: replace((p := right(self, *rest)), tokens=p.tokens[: len(self._ids) % 2]),
        (f"{SERVE}test_log_probabilities_are_those_of_the_model", PIECES),
    ),
    Replacement(
        "queries and keys in a GGUF file have the order of transformers' rotation",
        "drpo.model.gguf_file:interleaved",
        lambda right: lambda values, heads: values,
        (f"{EXPORT}test_transformers_reads_the_same_model_from_the_file",),
    ),
    Replacement(
        "keys in a GGUF file are ordered as if there were as many heads as of queries",
        "drpo.model.gguf_file:_values",
        _as_queries,
        (f"{EXPORT}test_transformers_reads_the_same_model_from_the_file",),
    ),
    Replacement(
        "matrices in a GGUF file are transposed",
        "drpo.model.gguf_file:_values",
        lambda right: lambda name, tensor, config: __import__("numpy").ascontiguousarray(right(name, tensor, config).T),
        (f"{EXPORT}test_transformers_reads_the_same_model_from_the_file",),
    ),
    Replacement(
        "a GGUF file lacks the frequencies of a stretched rotation",
        "drpo.model.gguf_file:_rope_factors",
        lambda right: lambda model: right(model) * 0 + 1,
        (f"{EXPORT}test_the_file_has_what_a_reader_asks_for",),
    ),
    Replacement(
        "an exported adapter has twice the scale",
        "drpo.model.adapter_folder:_require_same",
        lambda right: lambda *arguments: None,
        (f"{EXPORT}test_an_adapter_of_another_function_is_refused",),
    ),
    Replacement(
        "an upload replaces files of a repository unasked",
        "drpo.cli.hub:_HARMLESS",
        lambda right: type("All", (), {"__rsub__": lambda self, files: set()})(),
        (f"{EXPORT}test_an_upload_that_cannot_work_is_refused_before_anything_is_written",),
    ),
)
