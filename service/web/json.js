// JSON for people to read.

const PARTS = /"(?:[^"\\]+|\\[^]?)*"?|[{}[\],:]|[^\s"{}[\],:]+/g;  // strings, brackets, other values
const DEEPEST = 20;  // levels of indentation: brackets of a model may nest without end

/** Indents a JSON text or the beginning of one. Strings and numbers stay as they are. */
export function indented(text) {
  let shown = "";
  let depth = 0;
  let last = "";
  const newLine = () => `\n${"  ".repeat(Math.max(0, Math.min(depth, DEEPEST)))}`;
  for (const [part] of text.matchAll(PARTS)) {
    const closes = part === "}" || part === "]";
    if (closes) depth -= 1;
    if (last === "," || (/^[{[]$/.test(last) ? !closes : closes)) shown += newLine();
    shown += part === ":" ? ": " : part;
    if (part === "{" || part === "[") depth += 1;
    last = part;
  }
  return shown;
}
