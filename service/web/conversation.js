// The conversation as the API's messages, and the request of its last answer.

import { parsed } from "./store.js";

/** The API's messages. An answer that failed may be empty: it is left out. */
export function toApi(messages, system) {
  const opening = system ? [{ role: "system", content: system }] : [];
  return [...opening, ...messages.flatMap((message) => toMessage(message) ?? [])];
}

function toMessage({ role, text, call, calls }) {
  if (role === "tool") return { role, tool_call_id: call, content: text };
  const complete = (calls ?? []).filter(({ type, input }) => type === "custom" || parsed(input));
  if (!complete.length) return text ? { role, content: text } : null;
  return { role, content: text || null, tool_calls: complete.map(toCall) };
}

function toCall({ id, type, name, input }) {
  return { id, type, [type]: { name, [type === "custom" ? "input" : "arguments"]: input } };
}

/** The body that requests the last answer again or, without one, the next; not streamed. */
export function lastRequest(messages, model, next) {
  const at = messages.findLastIndex(({ role }) => role === "assistant");
  const { system, fields } = messages[at]?.request ?? next;
  const before = at < 0 ? messages : messages.slice(0, at);
  return { model: messages[at]?.model ?? model, messages: toApi(before, system), ...fields };
}
