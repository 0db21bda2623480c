// The server's API. Every refusal is an ApiError with the server's own sentence.

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const memory = new Map(); // where the browser keeps nothing for this page

function keyName(server) {
  return server ? `revox-key ${server}` : "revox-key";
}

// An API key stays in this tab (sessionStorage) and goes to the server that it was given for, to no other.
export function keyFor(server) {
  try {
    return sessionStorage.getItem(keyName(server));
  } catch {
    return memory.get(server) ?? null;
  }
}

export function setKey(server, key) {
  memory.set(server, key);
  try {
    if (key) sessionStorage.setItem(keyName(server), key);
    else sessionStorage.removeItem(keyName(server));
  } catch {
    // It holds until the page is closed.
  }
}

async function sentence(response) {
  try {
    const { error } = await response.json();
    return [String(error.message), error.code ?? null];
  } catch {
    return [`The server answered ${response.status} ${response.statusText}`.trim() + ".", null];
  }
}

// The answer to a request, which is a success. server: "" for the one that sent this page, or another's origin.
export async function request(path, { server = "", method = "GET", json, form, signal } = {}) {
  const headers = {};
  const key = keyFor(server);
  if (key) headers.authorization = `Bearer ${key}`;
  if (json !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(server + path, {
      method,
      headers,
      body: json === undefined ? form : JSON.stringify(json),
      signal,
      credentials: server ? "omit" : "same-origin",
      redirect: "error",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const hint = server
      ? ` It must be running and let this page ask it: revox serve ... --cors-origin ${location.origin}`
      : " Is it still running?";
    throw new ApiError(`${server || "The server"} cannot be reached.${hint}`);
  }
  if (response.ok) return response;
  const [message, code] = await sentence(response);
  if (response.status === 401) {
    document.dispatchEvent(new CustomEvent("revox:key", { detail: { server, message } }));
  }
  throw new ApiError(message, response.status, code);
}

export async function get(path, options) {
  return (await request(path, options)).json();
}

// A whole spoken file, marked: {blob, faults: "", or what the server says is wrong with it}.
export async function speech(fields, { server = "", signal } = {}) {
  const response = await request("/v1/audio/speech", { server, method: "POST", json: fields, signal });
  const cut = response.headers.get("x-revox-truncated") === "true" ? ["it is cut at the longest length"] : [];
  const pieces = response.headers.get("x-revox-warnings");
  const bad = pieces ? [`pieces of the text that were not spoken well (${pieces.replaceAll("_", " ")})`] : [];
  return { blob: await response.blob(), faults: [...cut, ...bad].map((one) => `${one}.`).join(" ") };
}

// The voices of a server: [{name, language, sex, preset, ...what is known of an uploaded one}].
export async function voices(server = "") {
  const listed = await get("/v1/audio/voices", { server });
  const uploaded = new Map((listed.uploaded_voices ?? []).map((voice) => [voice.name, voice]));
  const presets = listed.presets && new Set(listed.presets); // other servers do not tell
  return {
    jobs: listed.jobs ?? [],
    voices: (listed.voices ?? []).map((name) => describe(String(name), uploaded.get(name), presets)),
  };
}

const LANGUAGES = {
  ar: "Arabic",
  de: "German",
  en: "English",
  es: "Spanish",
  fr: "French",
  hi: "Hindi",
  it: "Italian",
  nl: "Dutch",
  pt: "Portuguese",
};

// The names of the release's presets tell language and sex: it_female; casual_male, which is English.
function describe(name, uploaded, presets) {
  const words = name.split(/[_-]/);
  const code = words.find((word) => Object.hasOwn(LANGUAGES, word));
  const english = /^(casual|cheerful|neutral)_(fe)?male$/.test(name);
  return {
    name,
    preset: presets ? presets.has(name) : !uploaded,
    language: code ? LANGUAGES[code] : english && !uploaded ? "English" : "Unknown",
    sex: words.find((word) => word === "female" || word === "male") ?? "unknown",
    uploaded,
  };
}
