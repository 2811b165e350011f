// This server: where it is, and the API key of a guarded one, which is kept for this tab only and sent to nobody else.

const NAME = "amoe-key";
// Not document.baseURI: it may hold a password, and then nothing can be fetched.
const BASE = new URL(".", location.origin + location.pathname);
let memory = "";

export function key() {
  try {
    return sessionStorage.getItem(NAME) ?? memory;
  } catch {
    return memory; // a browser may forbid storage
  }
}

export function setKey(value) {
  memory = value;
  try {
    sessionStorage.setItem(NAME, value);
  } catch {
    // It lasts as long as the page.
  }
}

/** fetch, of a path of this server. */
export function request(path, { headers = {}, ...options } = {}) {
  const all = key() ? { ...headers, Authorization: `Bearer ${key()}` } : headers;
  return fetch(new URL(path, BASE), { ...options, headers: all });
}
