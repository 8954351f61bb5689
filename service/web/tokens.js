// Tokens of an answer and their offsets in its text, in UTF-16 units, as in strings.
//
// A token may have no text (an end, or bytes of a character that later tokens complete): start == end.

/** The tokens of one event, placed in `text`, which begins at `offset`. */
export function place(offset, text, scored, ids = []) {
  let at = 0;
  return scored.map((entry, index) => {
    const last = index === scored.length - 1;
    const fits = text.startsWith(entry.token, at);
    const end = last ? text.length : at + (fits ? entry.token.length : 0);
    const token = {
      start: offset + at,
      end: offset + end,
      id: ids[index],
      token: entry.token,
      bytes: fits ? undefined : entry.bytes,
      logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    };
    at = end;
    return token;
  });
}

/** The index of the first token that ends after `offset`. */
export function firstAfter(tokens, offset) {
  let low = 0;
  let high = tokens.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle].end > offset) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** A token's text with visible spaces and line ends. */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

export const percent = (logprob) => share(Math.exp(logprob));

/** Formats a part of 1 as a percentage. */
export function share(part) {
  const value = part * 100;
  if (value >= 99.95) return "100 %";
  if (value >= 0.1) return `${value.toFixed(1)} %`;
  return "< 0.1 %";
}

/** 0 (likely) to 4 (a surprise): the shade of a token. */
export function surprise(logprob) {
  const probability = Math.exp(logprob);
  return [0.8, 0.5, 0.2, 0.05].filter((bound) => probability < bound).length;
}
