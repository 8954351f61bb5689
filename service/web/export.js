// A request as a command of curl or as a Python program, for any text: characters that a terminal, a
// shell or a reader could take for something else are escaped in JSON's and Python's own notation.

import { copyText } from "./view.js";

const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]/gu;  // control and format characters, line separators
const OPENAI = new Set([
  "model", "messages", "temperature", "top_p", "seed", "max_tokens", "tools", "tool_choice",
  "parallel_tool_calls", "response_format", "stop", "reasoning_effort",
]);  // parameters of its client; others go into extra_body

/** A command for sh, bash and zsh. A single quote would end the body: it has none. */
export function curl(origin, body, { keyed }) {
  const escape = (unseen) => (unseen === "\n" ? unseen : unseen.replace(/[^]/g, (unit) => hex(unit, "u", 4)));
  const data = JSON.stringify(body, null, 2).replace(UNSEEN, escape).replaceAll("'", "\\u0027");
  const key = keyed ? ['-H "Authorization: Bearer $OPENAI_API_KEY"'] : [];
  const options = [...key, "-H 'Content-Type: application/json'", `--data-raw '${data}'`];
  return [`curl '${origin}/v1/chat/completions'`, ...options].join(" \\\n  ") + "\n";
}

/** A program for OpenAI's client. */
export function python(origin, body, { keyed }) {
  const { own, others } = Object.groupBy(Object.entries(body), ([name]) => (OPENAI.has(name) ? "own" : "others"));
  if (others) own.push(["extra_body", Object.fromEntries(others)]);
  const parameters = own.map(([name, value]) => `        ${name}=${literal(value, "        ")},\n`).join("");
  return `${keyed ? "import os\n\n" : ""}from openai import OpenAI

with OpenAI(base_url="${origin}/v1", api_key=${keyed ? 'os.environ["OPENAI_API_KEY"]' : '"none"'}) as client:
    completion = client.chat.completions.create(
${parameters}    )
message = completion.choices[0].message
print(message.tool_calls or message.content)
`;
}

/** A value in Python's notation, whose strings may have JSON's escapes. */
function literal(value, margin) {
  if (value === null || value === Infinity || value === -Infinity) return "None";  // as in JSON
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string") {
    return JSON.stringify(value).replace(UNSEEN, (unseen) => (unseen.length > 1 ? hex(unseen, "U", 8) : hex(unseen, "u", 4)));
  }
  if (typeof value !== "object") return String(value);
  const inner = `${margin}    `;
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, inner))
    : Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (!items.length) return open + close;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${margin}${close}`;
}

const hex = (character, mark, digits) => `\\${mark}${character.codePointAt(0).toString(16).padStart(digits, "0")}`;

const LANGUAGES = { curl, python };
const $ = (id) => document.getElementById(id);

/** The dialog that shows the text. `request()` returns the body, `keyed()` whether it needs a key. */
export class ExportDialog {
  constructor({ request, keyed }) {
    const show = () => {
      $("export-code").textContent = LANGUAGES[$("export-language").value](location.origin, request(), { keyed: keyed() });
    };
    $("export-language").addEventListener("change", show);
    $("export-copy").addEventListener("click", () => copyText($("export-code").textContent, $("export-copy")));
    $("export-close").addEventListener("click", () => $("export").close());
    $("export-open").addEventListener("click", () => {
      show();
      $("export").showModal();
    });
  }
}
