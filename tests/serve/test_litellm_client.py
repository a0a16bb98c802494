"""litellm against the real server with the demo model."""

import os
from typing import Any

import pytest

# It asks a web site for prices when it is imported, unless told not to.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]

# pydantic warns of litellm's own models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Item .* on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_(computed_)?fields':DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]


def lite(server: Any, **fields: Any) -> Any:
    return litellm.completion(
        **{
            "model": "openai/demo",
            "api_base": server.url + "/v1",
            "api_key": "any",
            "messages": MESSAGES,
            "max_tokens": 16,
            "max_retries": 0,
            **fields,
        }
    )


def test_litellm_chats_and_streams_with_the_same_usage(live_server: Any) -> None:
    lite(live_server, temperature=0)
    whole = lite(live_server, temperature=0)
    assert whole.choices[0].message.content
    *chunks, last = list(lite(live_server, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [*chunks, last] if chunk.choices)
    assert text == whole.choices[0].message.content
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens_details.cached_tokens


def test_litellm_gets_all_choices_with_logprobs(live_server: Any) -> None:
    answer = lite(live_server, n=2, logprobs=True, top_logprobs=2, seed=1)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "openai/other"}, "NotFoundError"),
        ({"max_tokens": 10**6}, "ContextWindowExceededError"),
        ({"temperature": 3}, "BadRequestError"),
        ({"logit_bias": {"5": 1}}, "BadRequestError"),
        ({"response_format": {"type": "json_object"}}, "BadRequestError"),
    ],
)
def test_litellm_raises_the_right_class(live_server: Any, fields: dict[str, Any], error: str) -> None:
    with pytest.raises(getattr(litellm, error)):
        lite(live_server, **fields)


def test_litellm_raises_what_authentication_and_overload_are(serve: Any, scripted: Any) -> None:
    with pytest.raises(litellm.AuthenticationError):
        lite(serve(api_key="right"), model="openai/scripted")
    with pytest.raises(litellm.RateLimitError):
        lite(serve(scripted(overloaded=True)), model="openai/scripted")
