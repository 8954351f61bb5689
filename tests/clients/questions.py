"""What the tests ask all clients: a city as a schema, its weather as a tool."""

from typing import Any, Literal

from pydantic import BaseModel

COLOURS = "Name three colours."
HELLO = "Say hello."
CITY = "Tell me of the city of Paris, as JSON."
WEATHER = "What is the weather in Paris?"
NAME = "My name is Ada."
ASK_NAME = "What is my name?"
STORY = "Tell me a very long story."

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    capital: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


def user(content: Any) -> Any:
    """One message."""
    return {"role": "user", "content": content}
