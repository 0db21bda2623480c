// The arithmetic of a blind comparison: its order, its results, its table as CSV.

function below(limit) {
  // Without the bias of a remainder.
  const top = 2 ** 32 - (2 ** 32 % limit);
  for (;;) {
    const [value] = crypto.getRandomValues(new Uint32Array(1));
    if (value < top) return value % limit;
  }
}

function shuffled(items) {
  const mixed = [...items];
  for (let i = mixed.length - 1; i > 0; i--) {
    const j = below(i + 1);
    [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
  }
  return mixed;
}

// Every phrase `rounds` times, in random order: {phrase, first: "a" or "b"}. As often A is first as B; of an
// odd number chance has the last.
export function plan(phrases, rounds) {
  const all = shuffled(Array.from({ length: rounds }, () => phrases).flat());
  const firsts = all.map((_, i) => (i % 2 ? "b" : "a"));
  if (all.length % 2) firsts[firsts.length - 1] = below(2) ? "a" : "b";
  const order = shuffled(firsts);
  return all.map((phrase, i) => ({ phrase, first: order[i] }));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function side(values) {
  return { n: values.length, mean: mean(values), counts: [1, 2, 3, 4, 5].map((r) => values.filter((v) => v === r).length) };
}

const nameOf = (server, voice) => (server ? `${voice} at ${server}` : voice);

// A rating with A and B the other way about.
function turned(one) {
  const { server_a, voice_a, rating_a, server_b, voice_b, rating_b } = one;
  return {
    ...one, first: one.first === "A" ? "B" : "A",
    server_a: server_b, voice_a: voice_b, rating_a: rating_b, server_b: server_a, voice_b: voice_a, rating_b: rating_a,
  };
}

// Ratings -> for each pair that was compared {rows, a, b: {name, n, mean, counts}, better: {a, b, same}}. Which of
// the two was A counts for nothing.
export function summary(ratings) {
  const pairs = new Map();
  for (const one of ratings) {
    const a = nameOf(one.server_a, one.voice_a);
    const b = nameOf(one.server_b, one.voice_b);
    const [key, other] = [JSON.stringify([a, b]), JSON.stringify([b, a])];
    if (pairs.has(other)) {
      pairs.get(other).rows.push(turned(one));
      continue;
    }
    if (!pairs.has(key)) pairs.set(key, { a, b, rows: [] });
    pairs.get(key).rows.push(one);
  }
  return [...pairs.values()].map(({ a, b, rows }) => ({
    rows,
    a: { name: a, ...side(rows.map((row) => row.rating_a)) },
    b: { name: b, ...side(rows.map((row) => row.rating_b)) },
    better: {
      a: rows.filter((row) => row.rating_a > row.rating_b).length,
      b: rows.filter((row) => row.rating_b > row.rating_a).length,
      same: rows.filter((row) => row.rating_a === row.rating_b).length,
    },
  }));
}

export const COLUMNS = [
  "time", "phrase", "seed", "first", "server_a", "voice_a", "rating_a", "server_b", "voice_b", "rating_b",
];

function cell(value) {
  // What begins like a formula would be one to a spreadsheet; numbers are numbers.
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// RFC 4180.
export function csv(ratings) {
  const rows = [COLUMNS, ...ratings.map((one) => COLUMNS.map((name) => one[name]))];
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

// Results as they were kept: what is not one is left out.
export function readable(text) {
  let kept;
  try {
    kept = JSON.parse(text ?? "[]");
  } catch {
    return [];
  }
  const fits = (rating) => Number.isInteger(rating) && rating >= 1 && rating <= 5;
  return Array.isArray(kept) ? kept.filter((one) => one && fits(one.rating_a) && fits(one.rating_b)) : [];
}
