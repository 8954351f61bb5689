// Browser storage for the conversation, its settings and the colour theme. If the browser refuses
// storage, the page works without it.

const CHAT = "quire.chat.1";
const SETTINGS = "quire.settings.1";
const MODEL = { chat: "quire.model", similarity: "quire.model.similarity" };
const THEME = "quire.theme";
const KEY = "quire.key";

export function loadChat() {
  const chat = parsed(load("local", CHAT));
  return Array.isArray(chat?.messages) ? chat.messages : [];
}

/** If the storage is full, drops the token probabilities of the oldest answers first. */
export function saveChat(messages) {
  let kept = messages;
  for (let dropped = 0; dropped <= messages.length; dropped += 1) {
    if (save("local", CHAT, JSON.stringify({ messages: kept }))) return;
    kept = messages.map((message, at) => (at <= dropped ? { ...message, tokens: [] } : message));
  }
}

export const loadSettings = () => parsed(load("local", SETTINGS)) ?? {};
export const saveSettings = (settings) => save("local", SETTINGS, JSON.stringify(settings));
export const loadModel = (use) => load("local", MODEL[use]) ?? "";
export const saveModel = (use, name) => save("local", MODEL[use], name);
export const saveTheme = (name) => save("local", THEME, name);

/** The key is stored until the tab closes. */
export const loadKey = () => load("session", KEY) ?? "";
export const saveKey = (key) => save("session", KEY, key);

/** The value of a JSON text; null if it is none. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function load(area, name) {
  try {
    return window[`${area}Storage`].getItem(name);
  } catch {
    return null;
  }
}

/** Returns whether it was stored. */
function save(area, name, value) {
  try {
    window[`${area}Storage`].setItem(name, value);
    return true;
  } catch {
    return false;
  }
}
