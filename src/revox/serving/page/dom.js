// Elements without HTML: every text that comes from outside is put in as text.

export const $ = (id) => document.getElementById(id);

// element("button", { class: "quiet", type: "button", onclick: f }, "Play", other)
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function options(select, names, chosen) {
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

// What goes wrong is shown where it was asked for, and read out.
export function tell(place, error) {
  if (error?.name === "AbortError") return;
  place.textContent = error ? (error.message ?? String(error)) : "";
  place.hidden = !place.textContent;
}

export function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// A player of a file, whose address is given back with the next one.
export function load(audio, blob) {
  if (audio.src) URL.revokeObjectURL(audio.src);
  if (blob) audio.src = URL.createObjectURL(blob);
  else {
    audio.removeAttribute("src");
    audio.load(); // else it keeps what it has
  }
}

// What is typed into fields named the same as the server's: whole numbers and numbers, or a sentence.
export function number(field, what, whole = false) {
  const value = Number(field.value);
  if (field.value.trim() === "" || !Number.isFinite(value) || (whole && !Number.isSafeInteger(value))) {
    field.focus();
    throw new Error(`${what} is a ${whole ? "whole " : ""}number.`);
  }
  return value;
}
