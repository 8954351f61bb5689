// OpenAI's Agents SDK, over chat completions and over responses.
// `node agents.mjs ABILITY URL MODEL` shows one ability, or fails.

import assert from "node:assert/strict";
import {
  Agent,
  MemorySession,
  OpenAIChatCompletionsModel,
  OpenAIResponsesModel,
  Runner,
  setTracingDisabled,
  tool,
} from "@openai/agents";
import OpenAI, { BadRequestError } from "openai";
import { z } from "zod";

const [ability, url, name] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
setTracingDisabled(true); // it would send traces to OpenAI
const runner = new Runner({ tracingDisabled: true });

const city = z.enum(["Paris", "Rome"]);
const getWeather = tool({
  name: "get_weather",
  description: "The weather of a city.",
  parameters: z.object({ city }),
  execute: async (input) => `Sunny in ${input.city}.`,
});

const abilities = {
  async streams(model) {
    const agent = new Agent({ name: "agent", model, modelSettings: { temperature: 0 } });
    const whole = await runner.run(agent, "Say hello.");
    const stream = await runner.run(agent, "Say hello.", { stream: true });
    let text = "";
    for await (const piece of stream.toTextStream()) text += piece;
    await stream.completed;
    assert.ok(text);
    assert.equal(text, whole.finalOutput);
    assert.equal(stream.finalOutput, text);
  },

  async tools(model) {
    const modelSettings = { temperature: 0, toolChoice: "required", parallelToolCalls: false };
    const agent = new Agent({ name: "agent", model, modelSettings, tools: [getWeather] });
    const run = await runner.run(agent, "What is the weather in Paris?");
    const kinds = run.newItems.map((item) => item.type);
    assert.deepEqual(kinds.slice(0, 2), ["tool_call_item", "tool_call_output_item"]);
    assert.match(run.newItems[1].output, /^Sunny in /);
    assert.equal(kinds.at(-1), "message_output_item");
  },

  async structured(model) {
    const outputType = z.object({ name: city, capital: z.boolean() });
    const modelSettings = { temperature: 0 };
    const agent = new Agent({ name: "agent", model, modelSettings, outputType });
    outputType.parse((await runner.run(agent, "Tell me of Paris.")).finalOutput);
  },

  async turns(model) {
    const agent = new Agent({ name: "agent", model, modelSettings: { temperature: 0 } });
    const session = new MemorySession();
    await runner.run(agent, "My name is Ada.", { session });
    const run = await runner.run(agent, "What is my name?", { session });
    assert.ok(run.finalOutput);
    assert.equal((await session.getItems()).length, 4);
  },

  async errors(model) {
    const agent = new Agent({ name: "agent", model, modelSettings: { temperature: 9 } });
    await assert.rejects(runner.run(agent, "hello"), (error) => {
      assert.ok(error instanceof BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
  },
};

for (const Model of [OpenAIChatCompletionsModel, OpenAIResponsesModel]) {
  await abilities[ability](new Model(client, name));
}
