// OpenAI's client for Node. `node openai.mjs ABILITY URL MODEL` shows one ability, or fails.

import assert from "node:assert/strict";
import OpenAI, { APIError, BadRequestError, NotFoundError } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [ability, url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ask = (content) => [{ role: "user", content }];

const City = z.object({ name: z.enum(["Paris", "Rome"]), capital: z.boolean() });
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

const abilities = {
  async streams() {
    const asked = { model, messages: ask("Name three colours."), max_tokens: 40, temperature: 0 };
    const whole = await client.chat.completions.create(asked);
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    assert.ok(text);
    assert.equal(text, whole.choices[0].message.content);
    const summed = await client.chat.completions.stream(asked).finalChatCompletion();
    assert.equal(summed.choices[0].message.content, text);
    const response = client.responses.stream({ model, input: "Name a colour.", max_output_tokens: 9 });
    assert.ok((await response.finalResponse()).output_text);
  },

  async tools() {
    const messages = ask("What is the weather in Paris?");
    const forced = { tools: [weather], tool_choice: "required", parallel_tool_calls: false };
    const asked = { model, messages, ...forced, temperature: 0 };
    const whole = await client.chat.completions.create(asked);
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    const call = whole.choices[0].message.tool_calls[0].function;
    assert.equal(call.name, "get_weather");
    assert.deepEqual(Object.keys(JSON.parse(call.arguments)), ["city"]);
    const summed = await client.chat.completions.stream(asked).finalChatCompletion();
    assert.equal(summed.choices[0].message.tool_calls[0].function.arguments, call.arguments);
  },

  async structured() {
    const parsed = await client.chat.completions.parse({
      model,
      messages: ask("Tell me of the city of Paris, as JSON."),
      response_format: zodResponseFormat(City, "city"),
      temperature: 0,
    });
    City.parse(parsed.choices[0].message.parsed);
  },

  async turns() {
    const chat = ask("What is the weather in Paris?");
    const forced = { tools: [weather], tool_choice: { type: "function", function: { name: "get_weather" } } };
    const first = await client.chat.completions.create({ model, messages: chat, ...forced, temperature: 0 });
    const [call] = first.choices[0].message.tool_calls;
    chat.push(first.choices[0].message, { role: "tool", tool_call_id: call.id, content: "Sunny." });
    const second = await client.chat.completions.create({ model, messages: chat, max_tokens: 20 });
    assert.ok(second.choices[0].message.content);

    const asked = { model, temperature: 0, max_output_tokens: 20 };
    const name = await client.responses.create({ ...asked, input: "My name is Ada." });
    const again = { ...asked, input: "What is my name?", previous_response_id: name.id };
    assert.ok((await client.responses.create(again)).output_text);
  },

  async aborts() {
    const messages = ask("Tell me a story.");
    const asked = { model, messages, max_tokens: 4000, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(asked);
    for await (const _ of stream) {
      stream.controller.abort();
    }
  },

  async errors() {
    const create = (fields) =>
      client.chat.completions.create({ model, messages: ask("hello"), ...fields });
    await assert.rejects(create({ model: "nope" }), (error) => {
      assert.ok(error instanceof NotFoundError && error instanceof APIError);
      assert.equal(error.code, "model_not_found");
      assert.ok(error.requestID);
      return true;
    });
    await assert.rejects(create({ temperature: 9 }), (error) => {
      assert.ok(error instanceof BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
  },
};

await abilities[ability]();
