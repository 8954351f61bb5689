// Parses the Markdown that models write into blocks of source ranges. It creates no elements.
//
//   text -> blocks(text): [{kind, start, end, lines | items, ...}]    line: [start, end)
//   line -> inline(text, start, end): [{start, end, style}]           style: "", code, strong, em, del
//
// Supported: paragraphs, headings, lists, quotes, fenced code, rules; everything else stays plain
// text. Text only grows, so a block with the same kind and range is the same block.

const FENCE = /^ {0,3}(```+|~~~+) *([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6}) +/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +/;

/** The lines of a text as ranges, without their line ends. */
function linesOf(text) {
  const lines = [];
  for (let start = 0; start <= text.length; ) {
    const found = text.indexOf("\n", start);
    const end = found < 0 ? text.length : found;
    lines.push([start, end]);
    start = end + 1;
  }
  return lines;
}

export function blocks(text) {
  const found = [];
  const lines = linesOf(text);
  let index = 0;
  while (index < lines.length) {
    const line = text.slice(...lines[index]);
    const taken = line.trim() === "" ? 1 : takeBlock(text, lines, index, found);
    index += taken;
  }
  return found;
}

/** Appends the block that begins at a line; returns how many lines it takes. */
function takeBlock(text, lines, first, found) {
  const [start, end] = lines[first];
  const line = text.slice(start, end);
  const fence = FENCE.exec(line);
  if (fence) return takeFence(text, lines, first, found, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const content = [start + heading[0].length, end];
    found.push({ kind: "heading", level: heading[1].length, start, end, lines: [content] });
    return 1;
  }
  if (RULE.test(line)) {
    found.push({ kind: "rule", start, end, lines: [] });
    return 1;
  }
  if (ITEM.test(line)) return takeList(text, lines, first, found);
  const quoted = QUOTE.test(line);
  return takeProse(text, lines, first, found, quoted);
}

function takeFence(text, lines, first, found, fence) {
  let next = first + 1;
  const closes = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},} *$`);
  while (next < lines.length && !closes.test(text.slice(...lines[next]))) next += 1;
  const closed = next < lines.length;
  const content = lines.slice(first + 1, next);
  const end = closed ? lines[next][1] : text.length;
  found.push({ kind: "code", language: fence[2], start: lines[first][0], end, lines: content });
  return next - first + (closed ? 1 : 0);
}

function takeProse(text, lines, first, found, quoted) {
  const content = [];
  let next = first;
  for (; next < lines.length; next += 1) {
    const line = text.slice(...lines[next]);
    const mark = QUOTE.exec(line);
    if (line.trim() === "" || (quoted ? !mark : mark)) break;
    if (next > first && !quoted && [FENCE, HEADING, RULE, ITEM].some((rule) => rule.test(line))) break;
    content.push([lines[next][0] + (quoted ? mark[0].length : 0), lines[next][1]]);
  }
  const kind = quoted ? "quote" : "paragraph";
  found.push({ kind, start: lines[first][0], end: lines[next - 1][1], lines: content });
  return next - first;
}

function takeList(text, lines, first, found) {
  const items = [];
  let next = first;
  for (; next < lines.length; next += 1) {
    const [start, end] = lines[next];
    const line = text.slice(start, end);
    const mark = ITEM.exec(line);
    if (mark && !RULE.test(line)) {
      items.push({ depth: mark[1].length, mark: mark[2], lines: [[start + mark[0].length, end]] });
    } else if (line.trim() === "") {
      const after = next + 1 < lines.length ? text.slice(...lines[next + 1]) : "";
      if (!ITEM.test(after) && !/^ {2,}\S/.test(after)) break;
    } else if (/^ {2,}\S/.test(line)) {
      items.at(-1).lines.push([start + line.search(/\S/), end]);
    } else break;
  }
  const last = items.at(-1).lines.at(-1);
  found.push({ kind: "list", start: lines[first][0], end: last[1], items: nest(items) });
  return next - first;
}

/** Items with `depth` by their indent -> a tree by `children`. */
function nest(items) {
  const root = { depth: -1, children: [] };
  const open = [root];
  for (const item of items) {
    while (open.at(-1).depth >= item.depth) open.pop();
    item.children = [];
    open.at(-1).children.push(item);
    open.push(item);
  }
  return root.children;
}

const SPANS = [
  { style: "code", pattern: /(`+)([^`]|[^`].*?[^`])\1(?!`)/y },
  { style: "strong", pattern: /(\*\*|__)(?=\S)(.+?)(?<=\S)\1/y },
  { style: "del", pattern: /(~~)(?=\S)(.+?)(?<=\S)\1/y },
  { style: "em", pattern: /(\*)(?=[^\s*])([^*]+?)(?<=\S)\1(?!\*)/y },
  { style: "em", pattern: /(?<!\w)(_)(?=[^\s_])([^_]+?)(?<=\S)\1(?!\w)/y },
];

/** The styled parts of a line in order, without the marks around them. */
export function inline(text, start, end) {
  const line = text.slice(start, end);
  const parts = [];
  let plain = 0;
  for (let at = 0; at < line.length; at += 1) {
    if (!"`*_~".includes(line[at])) continue;
    const hit = match(line, at);
    if (!hit) continue;
    parts.push({ start: start + plain, end: start + at, style: "" });
    const inner = at + hit.mark;
    parts.push({ start: start + inner, end: start + inner + hit.length, style: hit.style });
    plain = inner + hit.length + hit.mark;
    at = plain - 1;
  }
  parts.push({ start: start + plain, end, style: "" });
  return parts.filter((part) => part.start < part.end);
}

function match(line, at) {
  for (const { style, pattern } of SPANS) {
    pattern.lastIndex = at;
    const found = pattern.exec(line);
    if (found) return { style, mark: found[1].length, length: found[2].length };
  }
  return null;
}
