// A blind comparison of two voices, or of two servers.

import { speech, voices as voicesOf } from "./api.js";
import { $, element, load, number, options, save, tell } from "./dom.js";
import { csv, plan, readable, summary } from "./trials.js";

const KEPT = "revox-ratings";
const HERE = "this server";

export function startCompare() {
  const other = otherServer();
  const names = new Map([["", []], [other ?? "none", []]]);
  let ratings = [];
  let unsaved = false; // the browser stores no more: what is here is all there is
  let test = null; // {sides, trials, at, seed, abort}

  // ------------------------------------------------------------------------------------------------ servers

  function otherServer() {
    const given = new URLSearchParams(location.search).get("with");
    if (!given) return null;
    const origin = asOrigin(given);
    if (origin && origin !== given) location.replace(`/?with=${encodeURIComponent(origin)}#compare`);
    $("other").value = origin ?? given;
    $("other-details").open = true;
    if (!origin) tell($("other-error"), "That is not a server's address, such as http://127.0.0.1:8001.");
    return origin;
  }

  function asOrigin(text) {
    try {
      const url = new URL(text);
      // A browser's policy cannot name IPv6 addresses.
      return /^https?:$/.test(url.protocol) && !url.host.startsWith("[") && url.origin !== location.origin ? url.origin : null;
    } catch {
      return null;
    }
  }

  function place(side) {
    return $(`server-${side}`).value === HERE ? "" : other;
  }

  function fill(side) {
    const listed = names.get(place(side)) ?? [];
    options($(`voice-${side}`), listed, $(`voice-${side}`).value);
  }

  async function askOther() {
    if (!other) return;
    tell($("other-error"));
    try {
      names.set(other, (await voicesOf(other)).voices.map((voice) => voice.name));
      ["a", "b"].forEach(fill);
    } catch (error) {
      tell($("other-error"), error);
    }
  }

  // ------------------------------------------------------------------------------------------------- trials

  function setup() {
    const sides = {};
    for (const side of ["a", "b"]) {
      sides[side] = { server: place(side), voice: $(`voice-${side}`).value };
      if (!sides[side].voice) throw new Error(`There is no voice for ${side.toUpperCase()}; choose one.`);
    }
    if (sides.a.server === sides.b.server && sides.a.voice === sides.b.voice) {
      $("voice-b").focus();
      throw new Error("A and B are the same; choose another voice for one of them.");
    }
    const phrases = $("phrases").value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (!phrases.length) {
      $("phrases").focus();
      throw new Error("There are no phrases; write at least one.");
    }
    const rounds = number($("rounds"), "Repetitions", true);
    if (rounds < 1 || rounds > 20) throw new Error("Repetitions is 1 to 20.");
    const seed = number($("compare-seed"), "The seed", true);
    return { sides, trials: plan(phrases, rounds), at: 0, seed, heard: new Map(), abort: new AbortController() };
  }

  function begin() {
    tell($("setup-error"));
    try {
      test = setup();
    } catch (error) {
      tell($("setup-error"), error);
      return;
    }
    $("setup").hidden = true;
    // What is known of the pair so far could sway who listens.
    $("results").hidden = true;
    $("trial").hidden = false;
    show();
  }

  // Both are fetched before either can be played, so that no waiting tells which is which.
  async function show() {
    const mine = test;
    const { phrase, first } = mine.trials[mine.at];
    const order = { first, second: first === "a" ? "b" : "a" };
    mine.ready = false;
    mine.heard = new Map();
    tell($("trial-error"));
    $("trial-title").textContent = `Pair ${mine.at + 1} of ${mine.trials.length}`;
    $("trial-phrase").textContent = `“${phrase}”`;
    $("next").textContent = mine.at + 1 === mine.trials.length ? "Finish" : "Next";
    for (const which of ["first", "second"]) player(which, mine);
    $("trial-title").focus();
    $("trial-status").textContent = "Generating both.";
    try {
      const both = await Promise.all(
        ["first", "second"].map((which) => {
          const { server, voice } = mine.sides[order[which]];
          const { signal } = mine.abort;
          return speech({ input: phrase, voice, seed: mine.seed, response_format: "wav" }, { server, signal });
        }),
      );
      if (mine !== test) return;
      ["first", "second"].forEach((which, i) => load($(`${which}-audio`), both[i].blob));
      mine.ready = true;
      $("trial-status").textContent = "Listen to both, and rate each.";
    } catch (error) {
      $("trial-status").textContent = "";
      $("next").textContent = "Try again";
      tell($("trial-error"), error);
    }
  }

  function player(which, mine) {
    const title = which === "first" ? "First" : "Second";
    const audio = element("audio", { id: `${which}-audio`, controls: true, "aria-label": title });
    audio.addEventListener("play", () => {
      mine.heard.set(which, true);
      const other = $(which === "first" ? "second-audio" : "first-audio");
      other?.pause();
    });
    load($(`${which}-audio`) ?? audio, null); // the last pair's file is given back
    const stars = [1, 2, 3, 4, 5].map((value) =>
      element("label", {}, element("input", { type: "radio", name: `rating-${which}`, value, "aria-label": `${title}: ${value} of 5` }), String(value)),
    );
    $(which).replaceChildren(element("legend", {}, title), audio, element("div", { class: "stars" }, ...stars));
  }

  const rating = (which) => Number($(which).querySelector("input:checked")?.value ?? 0);

  function next() {
    if (!test.ready) {
      // Both are being spoken still, or could not be.
      if (!$("trial-error").hidden) show();
      return;
    }
    const unheard = ["first", "second"].find((which) => !test.heard.get(which));
    const unrated = ["first", "second"].find((which) => !rating(which));
    if (unheard || unrated) {
      tell($("trial-error"), unheard ? `Listen to the ${unheard} too.` : `Rate the ${unrated} too, from 1 to 5.`);
      $(unheard ?? unrated).querySelector(unheard ? "audio" : "input").focus();
      return;
    }
    const { phrase, first } = test.trials[test.at];
    const { a, b } = test.sides;
    const [ratingA, ratingB] = first === "a" ? [rating("first"), rating("second")] : [rating("second"), rating("first")];
    ratings = [
      ...kept(), // another tab may have rated too
      {
        time: new Date().toISOString(), phrase, seed: test.seed, first: first.toUpperCase(),
        server_a: a.server, voice_a: a.voice, rating_a: ratingA,
        server_b: b.server, voice_b: b.voice, rating_b: ratingB,
      },
    ];
    keep();
    test.at += 1;
    if (test.at < test.trials.length) show();
    else end();
  }

  function end() {
    test.abort.abort();
    for (const which of ["first", "second"]) {
      if ($(`${which}-audio`)) load($(`${which}-audio`), null);
      $(which).replaceChildren();
    }
    test = null;
    $("trial").hidden = true;
    $("setup").hidden = false;
    $("results").hidden = false;
    results();
    $("results-title").focus();
  }

  // ------------------------------------------------------------------------------------------------ results

  function kept() {
    if (unsaved) return ratings;
    try {
      return readable(localStorage.getItem(KEPT));
    } catch {
      return ratings;
    }
  }

  function keep() {
    try {
      localStorage.setItem(KEPT, JSON.stringify(ratings));
      unsaved = false;
    } catch {
      unsaved = true;
    }
    const why = "The browser does not store the ratings: save the results as CSV before you close this page.";
    tell($("compare-problem"), unsaved ? why : null);
  }

  function results() {
    const none = element("p", { class: "status" }, "No ratings yet.");
    $("tables").replaceChildren(...(ratings.length ? summary(ratings).map(table) : [none]));
    $("csv").disabled = $("clear").disabled = !ratings.length;
  }

  function table({ rows: rated, a, b, better }) {
    const head = ["", "n", "Mean", "1", "2", "3", "4", "5"].map((name) => element("th", { scope: "col" }, name));
    const rows = [a, b].map((one) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, one.name),
        ...[one.n, one.mean.toFixed(2), ...one.counts].map((value) => element("td", {}, String(value))),
      ),
    );
    const summary = `Rated higher: ${a.name} ${better.a}, ${b.name} ${better.b}, the same ${better.same}.`;
    const made = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
    const label = `Save ${a.name} and ${b.name} as CSV`;
    const button = element("button", { type: "button", "aria-label": label, onclick: () => store(rated) }, "Save as CSV");
    return element("div", { class: "scroll" }, made, element("p", { class: "hint" }, summary), button);
  }

  function store(rows) {
    save(new Blob([csv(rows)], { type: "text/csv" }), "revox-ratings.csv");
  }

  function clear() {
    if (!confirm("Delete all results in this browser?")) return;
    ratings = [];
    keep();
    results();
  }

  $("setup").addEventListener("submit", (event) => {
    event.preventDefault();
    begin();
  });
  $("trial").addEventListener("submit", (event) => {
    event.preventDefault();
    next();
  });
  $("end").addEventListener("click", end);
  $("csv").addEventListener("click", () => store(ratings));
  $("clear").addEventListener("click", clear);
  $("other-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tell($("other-error"));
    const origin = asOrigin($("other").value.trim());
    if (!$("other").value.trim()) location.assign("/#compare");
    else if (origin) location.assign(`/?with=${encodeURIComponent(origin)}#compare`);
    else tell($("other-error"), "That is not another server's address, such as http://127.0.0.1:8001.");
  });
  document.addEventListener("revox:other", askOther);
  for (const side of ["a", "b"]) {
    options($(`server-${side}`), other ? [HERE, other] : [HERE], HERE);
    $(`server-${side}`).addEventListener("change", () => fill(side));
  }
  if (other) $("server-b").value = other;
  ratings = kept();
  results();
  askOther();

  return {
    listed({ voices }) {
      const untouched = !$("voice-a").value;
      names.set("", voices.map((voice) => voice.name));
      ["a", "b"].forEach(fill);
      if (untouched && !other && voices.length > 1) $("voice-b").value = voices[1].name;
    },
  };
}
