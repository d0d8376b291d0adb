// Requests to the server that this page came from, and the lines of its event streams.

const KEY = "edgellm-key";
let asking = null;

function headers(more) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// Ask the person for the key; several requests that need it share one question.
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    dialog.addEventListener(
      "close",
      () => {
        sessionStorage.setItem(KEY, input.value.trim());
        input.value = "";
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  try {
    const told = await response.json();
    if (told?.error?.message) message = told.error.message;
  } catch {
    // not JSON: the status says it
  }
  return new Refused(message, response.status);
}

// One request; asks for the key where the server wants one. Throws Refused.
export async function request(path, { body, signal, accept = "application/json" } = {}) {
  for (;;) {
    const options = { headers: headers({ Accept: accept }), signal };
    if (body !== undefined) {
      options.method = "POST";
      options.body = JSON.stringify(body);
      options.headers["Content-Type"] = "application/json";
    }
    const response = await fetch(path, options);
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

// The data of each event of a stream, as text, until it ends.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
