// Sends requests to the server with the API key, and reads its stream of changes.

const STORED = "wanfast-api-key"; // in sessionStorage, which ends with the tab
const SILENT_MS = 40000; // the server sends an empty line every 15 seconds

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: value => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

export class Refused extends Error {
  constructor(status, { message, param }) {
    super(message);
    Object.assign(this, { status, param });
  }
}

// Returns the answer of a request. Throws Refused, or another error if the server cannot be reached.
export async function ask(path, { headers = {}, ...options } = {}) {
  const bearer = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...headers, ...bearer } });
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, document.error ?? { message: `The server answered ${answer.status}.` });
}

// Yields the JSON of each line of an answer that does not end. Throws an error if the server is silent.
export async function* lines(path) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  try {
    const answer = await ask(path, { signal: silence.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      for (const line of whole) if (line) yield JSON.parse(line);
    }
  } finally {
    clearTimeout(timer);
    silence.abort();
  }
}
