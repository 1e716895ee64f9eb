/** Numbers, times and states in words: pure functions of a dataset's last event and of ages in seconds. */

const whole = new Intl.NumberFormat("en");
const clockTime = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const dayAndTime = new Intl.DateTimeFormat([], {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});

export const count = (number) => whole.format(number);

/** Formats seconds for a person: 7 s, 3 min 20 s, 5 h 2 min, 3 d 4 h. */
export function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const two = (size, unit, smaller, smallerUnit) => {
    const rest = Math.floor((s % size) / smaller);
    return `${Math.floor(s / size)} ${unit}${rest ? ` ${rest} ${smallerUnit}` : ""}`;
  };
  if (s < 120) return `${s} s`;
  if (s < 7200) return two(60, "min", 1, "s");
  if (s < 172800) return two(3600, "h", 60, "min");
  return two(86400, "d", 3600, "h");
}

/** Formats the time of a refresh: 4 ms, 0.25 s, 3.1 s, longer ones as `duration`. */
export function took(seconds) {
  if (seconds < 0.1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  return duration(seconds);
}

export function bytes(size) {
  for (const [limit, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (size >= limit) return `${(size / limit).toFixed(size < 10 * limit ? 1 : 0)} ${unit}`;
  }
  return `${size} B`;
}

/** Formats a time of the database or the service in this browser's zone, with the day if it is long ago. */
export function moment(iso, age = 0) {
  const at = new Date(iso);
  return (age > 43200 ? dayAndTime : clockTime).format(at);
}

export const times = (number) => ({ 1: "once", 2: "twice" })[number] ?? `${count(number)} times`;

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** Computes the state by the limits in docs/freshness.md, as the service does, also while it is unreachable. */
export function stateOf(dataset, age) {
  if (age === null) return "never_loaded";
  if (age > dataset.max_age_s) return "expired";
  return age > dataset.interval_s + dataset.timeout_s ? "stale" : "fresh";
}

/** The urgency of a dataset: "alarm", "warning", "waiting" or "fine". */
export function levelOf(dataset, age) {
  const state = stateOf(dataset, age);
  const failing = dataset.consecutive_failures > 0;
  if (state === "expired" || (state === "never_loaded" && failing)) return "alarm";
  if (state === "stale" || failing || dataset.held || dataset.save_problem || dataset.differences || dataset.age_uncertain || dataset.cluster?.role === "alone") return "warning";
  return state === "never_loaded" || dataset.pinned ? "waiting" : "fine";
}

export function shapeOf(dataset, age) {
  const level = levelOf(dataset, age);
  if (dataset.held && level !== "alarm") return "held";
  return dataset.pinned && level === "waiting" ? "pinned" : level;
}

/** Returns the state and further conditions in words: "stale, held, failing". */
export function stateWords(dataset, age) {
  const words = [stateOf(dataset, age).replace("_", " ")];
  if (dataset.held) words.push("held");
  if (dataset.pinned) words.push("pinned");
  if (dataset.consecutive_failures) words.push("failing");
  if (dataset.age_uncertain) words.push("of uncertain age");
  if (dataset.save_problem) words.push("not saved");
  if (dataset.differences) words.push("differs");
  if (dataset.cluster?.role === "alone") words.push("alone");
  return words.join(", ");
}

/** Describes the part of this process in a fleet: "leader, epoch 17", "replica of cache-1, epoch 17". */
export function roleWords({ role, leader, epoch, lag_generations }) {
  const of = role === "replica" && leader !== null ? ` of ${leader}` : "";
  const behind = lag_generations ? `, ${plural(lag_generations, "generation")} behind` : "";
  return `${role}${of}${epoch === null || role === "alone" ? "" : `, epoch ${epoch}`}${behind}`;
}

export function changeWords(change) {
  if (!change) return "–";
  const parts = ["added", "changed", "removed"].filter((what) => change[what]).map((what) => `${count(change[what])} ${what}`);
  return parts.join(", ") || "nothing";
}

/** Describes the next refresh; `nextIn` is undefined while the service is unreachable, null if none is planned. */
export function nextWords(dataset, nextIn) {
  if (nextIn === undefined) return "not known";
  if (dataset.progress) return dataset.consecutive_failures ? "trying now" : "reading now";
  if (dataset.behind_s !== null) return "put off";
  if (dataset.refreshing) return "queued";
  return nextIn === null ? "not planned" : `in ${duration(Math.ceil(nextIn))}`;
}

/**
 * Describes a dataset's problem to a newcomer: the age, the start, the cause and the next step.
 *
 * Returns pieces of text, the most important ones as `{ strong }`. `isDown`: the database is down, and the head of the
 * page shows the cause.
 */
export function problem(dataset, { age, since, nextIn, endedAgo, behind }, isDown) {
  const state = stateOf(dataset, age);
  const pieces = [];
  if (age === null) {
    pieces.push({ strong: "Nothing has been loaded yet" }, ", so readers get an error.");
  } else {
    pieces.push("The data are ", { strong: `from ${moment(dataset.as_of, age)}, ${duration(age)} ago` });
    const limit = `the limit is ${duration(dataset.max_age_s)}`;
    if (state === "expired") {
      pieces.push(`; ${limit}, and readers ${dataset.on_expired === "refuse" ? "get an error" : "still get them"}.`);
    } else if (state === "stale") {
      pieces.push(`, and should be read every ${duration(dataset.interval_s)}; ${limit}.`);
    } else {
      pieces.push(", which is within the limits.");
    }
  }
  const number = dataset.consecutive_failures;
  if (number) {
    pieces.push(` ${number > 1 ? `The last ${count(number)} refreshes` : "The last refresh"} failed, ${duration(endedAgo)} ago`);
    pieces.push(isDown ? ", because PostgreSQL is down." : `: ${sentenceEnd(dataset.last_attempt?.error ?? "no reason is known")}`);
  }
  if (dataset.held) {
    const rows = plural(dataset.held.rows, "row");
    pieces.push(` The newest result, with ${rows}, is `, { strong: `held back since ${moment(dataset.held.since, since)}` });
    pieces.push(`: it ${sentenceEnd(dataset.held.reason)}`);
  }
  if (dataset.pinned) pieces.push(" An operator has pinned it, so nothing newer is served.");
  if (dataset.accepts_next) pieces.push(" An operator has accepted the next result, even if a gate refuses it.");
  if (dataset.age_uncertain) pieces.push(` Their age is uncertain until the next refresh: ${sentenceEnd(dataset.age_uncertain)}`);
  if (dataset.save_problem) pieces.push(` It cannot be saved: ${sentenceEnd(dataset.save_problem)}`);
  if (dataset.differences) pieces.push(` Checks have corrected ${plural(dataset.differences, "row")} whose change no trigger recorded.`);
  if (dataset.cluster?.role === "alone") pieces.push(" No results of a leader have come, so this process of the fleet refreshes alone, less often.");
  if (dataset.cluster?.valkey_problem) pieces.push(` The Valkey cannot be used: ${sentenceEnd(dataset.cluster.valkey_problem)}`);
  pieces.push(" ", { strong: nextSentence(dataset, nextIn, behind) });
  return pieces;
}

function nextSentence(dataset, nextIn, behind) {
  if (nextIn === undefined) return "The current activity of the service is unknown.";
  if (dataset.progress) return dataset.consecutive_failures ? "It is tried again right now." : "It is being read right now.";
  if (dataset.behind_s !== null) return `A refresh has been due for ${duration(behind)}, and waits for postgres.max_load.`;
  if (dataset.refreshing) return "A refresh is due now, and waits for a connection.";
  return nextIn === null ? "No refresh is planned." : `It tries again in ${duration(Math.ceil(nextIn))}.`;
}

const sentenceEnd = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);
