"""openai 3: decisions, alone and by its runner of tools."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.lib.decisions_tool_runner import DecisionsToolRunner

CLIENT = "openai 3 (Python)"
TEXT = "I was charged twice for one order. Give me my money back!"
QUESTIONS: Any = [
    {"type": "predicate", "name": "refund", "instructions": "The customer wants a refund."},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "What is it about?"}],
        "choices": [{"value": "billing", "description": "Money"}, {"value": True}],
    },
    {
        "type": "score",
        "instructions": "How angry is the customer?",
        "levels": [{"label": "calm"}, {"label": "furious"}],
    },
]


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0)


@pytest.mark.proves(CLIENT)
def test_questions_are_answered_by_probabilities(client: Any, server: Any) -> None:
    asked = {"model": server.model, "input": TEXT, "questions": QUESTIONS}
    decision = client.decisions.create(**asked, safety_identifier="me")
    refund, topic, anger = decision.answers
    assert (refund.type, refund.name) == ("predicate", "refund")
    assert 0 < refund.probability < 1
    assert {each.value for each in topic.probabilities} == {"billing", True}
    for answer in (topic, anger):
        probs = [each.probability for each in answer.probabilities]
        assert sum(probs) == pytest.approx(1)
        assert answer.confidence == max(probs)
    assert anger.score == pytest.approx(anger.probabilities[1].probability)
    assert decision.usage.input_tokens > 50
    assert client.decisions.create(**asked).answers == decision.answers


@pytest.mark.proves(CLIENT, "errors")
def test_an_error_names_the_question(client: Any, server: Any) -> None:
    once: Any = {"type": "choice", "instructions": "?", "choices": [{"value": "a"}]}
    with pytest.raises(openai.BadRequestError, match="2 or more") as raised:
        client.decisions.create(model=server.model, input=TEXT, questions=[once])
    assert raised.value.param == "questions[0].choices"


@pytest.mark.proves(CLIENT, "tools")
def test_its_runner_takes_the_action_that_is_chosen(client: Any, server: Any) -> None:
    """Whichever the model chooses: the run ends when it is done, or with its steps."""
    taken: list[str] = []

    def candidates(_observed: Any) -> Any:
        if taken:
            return [{"id": "done", "description": "The task is complete.", "done": True}]
        look: Any = {"description": "Look for the door.", "execute": lambda: taken.append("look")}
        walk: Any = {"description": "Walk on.", "execute": lambda: taken.append("walk")}
        done: Any = {"id": "done", "description": "The task is complete.", "done": True}
        return [{"id": "look", **look}, {"id": "walk", **walk}, done]

    runner = DecisionsToolRunner(observe=lambda: "A long dark room.", candidates=candidates)
    params: Any = {"model": server.model, "input": "Find the door."}
    result = runner.run(client, params, max_steps=4)
    assert result["status"] == "unverified"
    assert result["completed_candidate_ids"] == taken
    assert len(result["decisions"]) == 1
