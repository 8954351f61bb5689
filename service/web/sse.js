// Reads server-sent events from a fetch's body. EventSource can neither POST nor send headers.

/** Yields {id, data}: `id` is null for an event without one. Drops an incomplete event. */
export async function* readEvents(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let pending = "";
  let id = null;
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += decoder.decode(value, { stream: true });
      const lines = pending.split("\n");
      pending = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line === "") {
          if (data.length) yield { id, data: data.join("\n") };
          id = null;
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line.startsWith("id:")) {
          id = line.slice(3).trim();
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // an aborted fetch has nothing left to cancel
  }
}
