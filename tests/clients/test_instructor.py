"""instructor: pydantic objects out of the small model, because the grammar leaves it no choice."""

from __future__ import annotations

from enum import StrEnum

import instructor
import openai
import pytest
from pydantic import BaseModel

from tests.served import ServedModel


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


class Car(BaseModel):
    """What shall come out."""

    colour: Colour
    is_new: bool


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_an_object_comes_out(served: ServedModel, mode: instructor.Mode) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0), mode=mode
    )
    car = client.chat.completions.create(
        model="amoe-builtin",
        response_model=Car,
        messages=[{"role": "user", "content": "The new car is green."}],
        max_tokens=100,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(car, Car)


async def test_async(served: ServedModel) -> None:
    client = instructor.from_openai(
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0), mode=instructor.Mode.TOOLS
    )
    car = await client.chat.completions.create(
        model="amoe-builtin",
        response_model=Car,
        messages=[{"role": "user", "content": "The old car is red."}],
        max_tokens=100,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(car, Car)
