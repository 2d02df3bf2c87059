"""What is sent to the model, as the two APIs want it: Chat Completions and Responses. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .choices_decoder import ChoicesDecoder
from .decoder import ChatDecoder, StreamDecoder
from .responses_decoder import ResponsesDecoder


@dataclass(frozen=True)
class Prompt:
    """The messages as Chat Completions has them, the model, and parameters by our names."""

    messages: Sequence[Any]
    model: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Api:
    """One way to ask: where, with what body, and how the answer to a prompt is read. `body` takes the prompt, the
    longest answer in tokens, and the host that is asked."""

    path: str
    body: Callable[[Prompt, int, str], dict[str, Any]]
    decoder: Callable[[Prompt], StreamDecoder]


def chat_body(prompt: Prompt, longest: int, host: str) -> dict[str, Any]:
    return {
        "model": prompt.model,
        "messages": list(prompt.messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        _limit_name(host): prompt.params.get("max_output_tokens", longest),
        **_without_limit(prompt.params),
    }


def chat_decoder(prompt: Prompt) -> StreamDecoder:
    choices, logprobs = prompt.params.get("n", 1), prompt.params.get("logprobs", False)
    return ChoicesDecoder(choices, logprobs) if choices > 1 or logprobs else ChatDecoder()


def _limit_name(host: str) -> str:
    """OpenAI's newer models refuse max_tokens; other servers often know only that, and would not stop."""
    return "max_completion_tokens" if host.endswith((".openai.com", ".azure.com")) else "max_tokens"


def _without_limit(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != "max_output_tokens"}


def responses_body(prompt: Prompt, longest: int, host: str) -> dict[str, Any]:
    return {
        "model": prompt.model,
        "input": [item for message in prompt.messages for item in _input_items(message)],
        "stream": True,
        "store": False,  # the provider keeps answers for 30 days otherwise
        "max_output_tokens": prompt.params.get("max_output_tokens", longest),
        **_responses_params(_without_limit(prompt.params)),
    }


def _input_items(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message of Chat Completions as items of Responses: a tool's call and its result are items of their own."""
    if message["role"] == "tool":
        yield {"type": "function_call_output", "call_id": message.get("tool_call_id"), "output": _words(message)}
        return
    if _words(message):
        yield {"role": message["role"], "content": _words(message)}
    for call in message.get("tool_calls") or ():
        yield {"type": "function_call", "call_id": call.get("id"), **call.get("function", {})}


def _words(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in content)


def _responses_params(params: dict[str, Any]) -> dict[str, Any]:
    """Names and shapes that differ between the two APIs; what Responses does not have is refused by the provider."""
    renamed = dict(params)
    if "tools" in renamed:
        renamed["tools"] = [{"type": "function", **tool.get("function", {})} for tool in renamed["tools"]]
    if isinstance(renamed.get("tool_choice"), dict):
        renamed["tool_choice"] = {"type": "function", **renamed["tool_choice"].get("function", {})}
    if "reasoning_effort" in renamed:
        renamed["reasoning"] = {"effort": renamed.pop("reasoning_effort")}
    if "response_format" in renamed:
        renamed["text"] = {"format": _text_format(renamed.pop("response_format"))}
    return renamed


def _text_format(response_format: dict[str, Any]) -> dict[str, Any]:
    return {"type": response_format.get("type"), **response_format.get("json_schema", {})}


APIS = {
    "chat": Api("/chat/completions", chat_body, chat_decoder),
    "responses": Api("/responses", responses_body, lambda prompt: ResponsesDecoder()),
}
