// Vercel's AI SDK over its providers for OpenAI-compatible servers, for OpenAI's responses and for
// Anthropic's messages.
// `node ai_sdk.mjs ABILITY URL MODEL` shows one ability, or fails.

import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [ability, url, name] = process.argv.slice(2);
const compatible = createOpenAICompatible({
  name: "quire",
  baseURL: `${url}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const own = { baseURL: `${url}/v1`, apiKey: "none" };
const anthropic = createAnthropic(own);
const providers = [compatible, createOpenAI(own).responses, anthropic];

const city = z.enum(["Paris", "Rome"]);
const getWeather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city }),
  execute: async (input) => `Sunny in ${input.city}.`,
});

const abilities = {
  async streams(common) {
    const asked = { ...common, prompt: "Name three colours.", maxOutputTokens: 40 };
    const whole = await generateText(asked);
    const stream = streamText(asked);
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.ok(text);
    assert.equal(text, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
    assert.equal(await stream.finishReason, whole.finishReason);
  },

  async tools(common) {
    const asked = {
      ...common,
      prompt: "What is the weather in Paris?",
      tools: { getWeather },
      toolChoice: "required",
      providerOptions: { quire: { parallel_tool_calls: false } },
      stopWhen: stepCountIs(1),
    };
    const whole = await generateText(asked);
    const [call] = whole.toolCalls;
    assert.equal(call.toolName, "getWeather");
    city.parse(call.input.city);
    assert.equal(whole.toolResults[0].output, `Sunny in ${call.input.city}.`);
    const [streamed] = await streamText(asked).toolCalls;
    assert.deepEqual(streamed.input, call.input);
  },

  async structured(common) {
    const schema = z.object({ name: city, capital: z.boolean() });
    const { output } = await generateText({
      ...common,
      prompt: "Tell me of the city of Paris, as JSON.",
      output: Output.object({ schema }),
    });
    schema.parse(output);
  },

  async turns(common) {
    const messages = [{ role: "user", content: "What is the weather in Paris?" }];
    const forced = { tools: { getWeather }, toolChoice: { type: "tool", toolName: "getWeather" } };
    const first = await generateText({ ...common, messages, ...forced, stopWhen: stepCountIs(1) });
    messages.push(...first.response.messages, { role: "user", content: "Thank you." });
    const second = await generateText({ ...common, messages, maxOutputTokens: 20 });
    assert.ok(second.text);
    messages.push(...second.response.messages, { role: "user", content: "Goodbye." });
    assert.ok((await generateText({ ...common, messages, maxOutputTokens: 20 })).text);
  },

  async aborts(common) {
    const controller = new AbortController();
    const stream = streamText({
      ...common,
      prompt: "Tell me a very long story.",
      maxOutputTokens: 4000,
      abortSignal: controller.signal,
      onError() {},
    });
    for await (const _ of stream.textStream) controller.abort();
  },

  async errors(common, provider) {
    const refused = (status) => (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, status);
      return true;
    };
    const hello = { ...common, prompt: "hello" };
    await assert.rejects(generateText({ ...hello, model: provider("nope") }), refused(404));
    if (provider !== anthropic) // it limits the temperature itself
      await assert.rejects(generateText({ ...hello, temperature: 9 }), refused(400));
  },
};

for (const provider of providers) {
  const common = { model: provider(name), temperature: 0, maxRetries: 0 };
  await abilities[ability](common, provider);
}
