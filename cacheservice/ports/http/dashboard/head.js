/** The head of the page: the overall state, a summary in sentences, and the connection to the service. */

import { window_s } from "./charts.js";
import { $, now, sentence, setHidden, setShape, setText, state } from "./page.js";
import * as words from "./words.js";

const NAMED = 4;
const COUNTED = { alarm: "expired or never loaded", warning: "stale, held or failing", waiting: "loading or pinned", fine: "fresh" };

let lostIcon = null;

/** Fetches the icon for a lost connection while there still is one. */
export async function keepLostIcon() {
  const answer = await fetch("assets/icon-lost.svg");
  if (answer.ok) lostIcon = URL.createObjectURL(await answer.blob());
}

export function showHead(problems, counts, newest) {
  const { service, postgres } = state;
  if (!service) return;
  setHidden($("vitals"), false);
  const down = postgres.state === "down";
  const isDeaf = postgres.listening_wanted && !postgres.listening && postgres.listening_problem !== null && !postgres.standby;
  const isCapped = service.connection_cap !== null;
  const isMissed = captureProblem() !== null;
  const number = Object.values(problems).reduce((sum, names) => sum + names.length, 0) + down + isDeaf + isMissed + isCapped + (state.rejected !== null) + downWorkers().length;
  let level = counts.alarm ? "alarm" : number ? "warning" : counts.waiting && !counts.fine ? "waiting" : "fine";
  let headline = number ? words.plural(number, "problem") : level === "waiting" ? "Loading …" : "All well";
  if (down) headline = number > 1 ? `${headline}: PostgreSQL is down` : "PostgreSQL is down";
  if (state.lost) {
    level = "lost";
    headline = "No connection";
  }
  document.body.dataset.level = level;
  setShape($("head-shape"), level);
  setText($("headline"), headline);
  const icon = level === "lost" && lostIcon ? lostIcon : `assets/icon-${level}.svg`;
  if ($("icon").getAttribute("href") !== icon) $("icon").setAttribute("href", icon);
  document.title = `${headline} – cacheservice`;
  setText($("summary"), state.lost ? "The list below is as of the last event; ages keep counting." : summary(problems, counts, newest, down, isDeaf));

  const answers = postgres.state === "unknown" ? "not asked yet" : postgres.state;
  const lags = postgres.standby !== null && postgres.standby.problem !== "";
  vital("postgres", down ? "alarm" : lags ? "warning" : postgres.state === "up" ? "fine" : "waiting", postgres.standby ? `${answers}, ${standby()}` : answers);
  if (!postgres.listening_wanted) vital("listening", "waiting", "not needed");
  else if (postgres.listening) vital("listening", "fine", "yes");
  else if (postgres.standby) vital("listening", "waiting", "not possible on a standby");
  else vital("listening", isDeaf ? "warning" : "waiting", isDeaf ? "NO" : "not yet");
  showCapture(isMissed);
  const unready = Object.keys(service.not_ready);
  const because = unready.length > 2 ? words.plural(unready.length, "dataset") : unready.join(", ");
  vital("service", service.ready ? "fine" : "alarm", service.ready ? "ready" : `not ready because of ${because}`);
  setText($("span"), words.duration(window_s(now())));
  setText($("footer"), `cacheservice ${service.version}, up ${words.duration(now())}, process ${service.pid}${workers()}`);
}

function summary(problems, counts, newest, down, isDeaf) {
  const sentences = [];
  if (down) {
    const read = newest === null ? "" : ` The newest data were read ${words.duration(newest)} ago.`;
    sentences.push(`${sentence(state.postgres.error ?? "PostgreSQL does not answer")}${read} ${nextTry()}`);
  }
  const labels = { expired: "Expired", stale: "Stale", "never loaded": "Never loaded", held: "Held back", failing: "Failing", other: "Other problems" };
  for (const [kind, names] of Object.entries(problems)) if (names.length) sentences.push(`${labels[kind]}: ${listed(names)}.`);
  if (isDeaf) sentences.push(`Notifications of changes do not arrive: ${sentence(state.postgres.listening_problem)}`);
  if (captureProblem() !== null) sentences.push(`Changes are not captured from the log: ${sentence(captureProblem())}`);
  if (state.postgres.standby?.problem) sentences.push(`PostgreSQL is ${standby()}: ${sentence(state.postgres.standby.problem)}`);
  if (state.service.connection_cap) sentences.push(capped(state.service.connection_cap));
  for (const { number } of downWorkers()) sentences.push(`Worker ${number} is down; the service starts it again.`);
  if (state.rejected !== null) sentences.push(`The newest configuration is not in effect: ${sentence(state.rejected)}`);
  if (sentences.length) return sentences.join(" ");
  if (counts.waiting) return `${words.plural(counts.fine, "dataset")} of ${counts.fine + counts.waiting} are loaded and within their limits.`;
  return counts.fine === 1 ? "The one dataset is within its limits." : `All ${words.count(counts.fine)} datasets are within their limits.`;
}

/** Returns true if triggers do what logical decoding cannot: then nobody has set it up. `starting` is each new look. */
function isByTriggers() {
  const ways = [...state.datasets.values()].map((dataset) => dataset.latest?.capture ?? null);
  return ["impossible", "starting"].includes(state.postgres.capture.state) && ways.every((way) => way === null || way === "triggers");
}

/** Returns why changes are not captured from the log, or null if that is not a problem. */
function captureProblem() {
  const { capture } = state.postgres;
  return capture === null || capture.state === "streaming" || isByTriggers() ? null : capture.problem;
}

function showCapture(isMissed) {
  const { capture } = state.postgres;
  setHidden($("capture"), capture === null);
  if (capture === null) return;
  if (capture.state === "streaming") vital("capture", "fine", "from the log");
  else if (isMissed) vital("capture", "warning", "NOT from the log");
  else vital("capture", "waiting", capture.problem !== null && isByTriggers() ? "by triggers" : "not yet");
}

function standby() {
  const { lag_s, known, problem } = state.postgres.standby;
  return problem ? `a standby ${known ? "" : "perhaps "}up to ${words.duration(lag_s)} behind` : "a standby";
}

/** The workers that do not run; a service that serves its clients itself has no workers. */
const downWorkers = () => (state.service.workers ?? []).filter((worker) => worker.state === "down");

/** Describes the workers for the footer. */
function workers() {
  const all = state.service.workers ?? [];
  const serving = all.filter((worker) => worker.state === "serving").length;
  return all.length ? `, ${words.count(serving)} of ${words.plural(all.length, "worker")} serving` : "";
}

const capped = ({ limit, configured, open_files }) =>
  `Clients are capped at ${words.count(limit)} of ${words.count(configured)} by the limit of ${words.count(open_files)} open files.`;

/** Describes the next attempt to reach the database, by the first dataset that is due. */
function nextTry() {
  const waits = [...state.datasets.values()].map((dataset) => (dataset.latest.progress ? 0 : dataset.at(now()).nextIn ?? Infinity));
  const first = Math.min(...waits);
  return first === 0 ? "It is tried again right now." : first < Infinity ? `It is tried again in ${words.duration(Math.ceil(first))}.` : "";
}

const listed = (names) =>
  names.length > NAMED + 1 ? `${names.slice(0, NAMED).join(", ")} and ${words.count(names.length - NAMED)} more` : names.join(", ");

function vital(which, level, text) {
  const element = $(`vital-${which}`);
  setText(element, text);
  element.dataset.level = level;
}

export function showCounts(counts) {
  const list = $("counts");
  if (!list.childElementCount) {
    for (const level of Object.keys(COUNTED)) {
      const item = document.createElement("li");
      item.dataset.level = level;
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("class", "shape");
      svg.setAttribute("aria-hidden", "true");
      const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
      use.setAttribute("href", `#shape-${level}`);
      svg.append(use);
      item.append(svg, document.createElement("span"));
      list.append(item);
    }
  }
  for (const item of list.children) {
    const { level } = item.dataset;
    setHidden(item, !counts[level]);
    setText(item.lastElementChild, `${words.count(counts[level])} ${COUNTED[level]}`);
  }
}

export function showConnection() {
  setHidden($("lost"), !state.lost);
  if (!state.lost) {
    if (state.service) vital("page", "fine", "live");
    return;
  }
  const { at, on, why, retryAt } = state.lost;
  const passed = (performance.now() - at) / 1000;
  const wait = Math.ceil((retryAt - performance.now()) / 1000);
  const next = wait > 0 ? `Next try in ${wait} s.` : "Trying now …";
  const since = words.moment(on, passed);
  setText($("lost-since"), `since ${since}, for ${words.duration(passed)}: ${sentence(why)} ${next}`);
  vital("page", "warning", `not live since ${since}`);
  if (!state.service) {
    document.body.dataset.level = "lost";
    setShape($("head-shape"), "lost");
    setText($("headline"), "No connection");
  }
}
