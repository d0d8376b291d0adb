"""``langchain-openai`` against a server: the client that builds chains and agents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr

from edgellm.answer import LoadOptions
from tests.serving import Server, served

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    named = {"edgellm-demo": str(demo_model)}
    options = LoadOptions(grammars=True, sequences=4)
    with served(tmp_path_factory.mktemp("home"), named, options=options) as made:
        yield made


@pytest.fixture
def chat(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        model="edgellm-demo",
        base_url=server.base,
        api_key=SecretStr("none"),
        temperature=0,
        max_retries=0,
        use_responses_api=False,
    )


class Pet(BaseModel):
    """A pet."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=30)


def test_an_answer_with_its_usage(chat: ChatOpenAI) -> None:
    made = chat.invoke([SystemMessage("Be brief."), HumanMessage(FRANCE)])
    assert made.content == PARIS
    assert made.usage_metadata is not None
    assert made.usage_metadata["output_tokens"] > 3
    assert made.response_metadata["finish_reason"] == "stop"


def test_a_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(FRANCE, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == PARIS
    assert len(chunks) > 4
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usages) == 1


async def test_an_asynchronous_stream(chat: ChatOpenAI) -> None:
    text = "".join([str(chunk.content) async for chunk in chat.astream(FRANCE)])
    assert text == PARIS


def test_a_batch(chat: ChatOpenAI) -> None:
    made = chat.batch([FRANCE, "What is 7 + 6?", FRANCE])
    assert [each.content for each in made] == [PARIS, "7 + 6 = 13.", PARIS]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any) -> None:
    made = chat.with_structured_output(Pet, method=method).invoke("Describe a pet.")
    assert isinstance(made, Pet)


def test_bound_tools_are_called_and_answered(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Pet], tool_choice="Pet")
    made = bound.invoke("Describe a pet.")
    assert isinstance(made, AIMessage)
    assert [call["name"] for call in made.tool_calls] == ["Pet"]
    assert not made.invalid_tool_calls
    answered = ToolMessage("done", tool_call_id=str(made.tool_calls[0]["id"]))
    assert chat.invoke([HumanMessage("Describe a pet."), made, answered]).content


def test_streamed_tool_calls_add_up(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Pet], tool_choice="Pet")
    whole: Any = None
    for chunk in bound.stream("Describe a pet."):
        whole = chunk if whole is None else whole + chunk
    assert len(whole.tool_calls) == 1
    Pet.model_validate(whole.tool_calls[0]["args"])


def test_stop_and_logprobs(chat: ChatOpenAI) -> None:
    made = chat.bind(stop=[" is"], logprobs=True).invoke(FRANCE)
    assert made.content == "The capital of France"
    assert made.response_metadata["logprobs"]["content"]


def test_a_plain_completion(server: Server) -> None:
    llm = OpenAI(
        model="edgellm-demo", base_url=server.base, api_key=SecretStr("none"), max_tokens=4
    )
    assert isinstance(llm.invoke("The capital of France is"), str)
