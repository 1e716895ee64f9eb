/** The dashboard: takes the service's events, keeps their state, and shows it; ages go on by this machine's clock. */

import { details, window_s } from "./charts.js";
import { Dataset, Rows, setHidden, setShape, setText } from "./rows.js";
import { Stream, ask } from "./stream.js";
import * as words from "./words.js";

const TOKEN = "cacheservice.token"; // where sessionStorage keeps it, for this tab alone
const QUIET_MS = 2500;
const NAMED = 4;

const $ = (id) => document.getElementById(id);

const state = {
  stream: null,
  token: sessionStorage.getItem(TOKEN) ?? "",
  access: "read",
  admin: false,
  service: null,
  postgres: null,
  rejected: null,
  datasets: new Map(),
  levels: new Map(),
  /** The service's uptime at a moment of performance.now(); no wall clock, which somebody may set. */
  clock: { uptime: 0, at: performance.now() },
  lost: null,
  opened: null,
};

const now = () => state.clock.uptime + (performance.now() - state.clock.at) / 1000;

const rows = new Rows($("list"), $("row"), { why: openDetails, refresh, accept: confirmAccept, now, isDown, isLost }, fetchHour);

/** Whether the database is down, and that is why a dataset was not read. */
function isDown(told) {
  return state.postgres?.state === "down" && told.last_attempt?.error === state.postgres.error;
}

function isLost() {
  return state.lost !== null;
}

// Events

function connect() {
  state.stream?.stop();
  state.stream = new Stream({ token: state.token, event: take, lost, refused });
}

function take(name, data) {
  if (name === "hello") {
    connected(data);
  } else if (name === "state") {
    takeState(data);
  }
}

function connected({ access, admin }) {
  if (state.operatorPending && access !== "admin") {
    refused(401, "this is not the token of http.admin_token");
    return;
  }
  state.access = access;
  state.admin = admin;
  state.isNew = true;
  if (state.operatorPending) {
    state.operatorPending = null;
    $("operator-dialog").close();
  }
  if (state.token) sessionStorage.setItem(TOKEN, state.token);
  setHidden($("ask"), true);
  setHidden($("operator"), !admin || access === "admin");
  setHidden($("forget"), !state.token);
  document.body.toggleAttribute("data-admin", access === "admin");
  rows.setAdmin(access === "admin");
}

function takeState({ service, postgres, configuration_rejected: rejected, datasets, names }) {
  const isFirst = state.isNew;
  state.isNew = false;
  setClock(service.uptime_s, isFirst);
  Object.assign(state, { service, postgres, rejected });
  if (isFirst) {
    // Whatever was missed meanwhile is fetched with the hours.
    for (const dataset of state.datasets.values()) dataset.hourIsWhole = false;
    if (state.lost) {
      state.lost = null;
      announce("The connection to the service is back.");
    }
  }
  if (names) {
    state.datasets = new Map(names.map((name) => [name, state.datasets.get(name) ?? new Dataset(name)]));
    rows.declare(state.datasets);
  }
  for (const [name, told] of Object.entries(datasets)) state.datasets.get(name)?.take(told);
  if (names) {
    for (const row of rows.rows.values()) row.told(rows.isAdmin);
    setHidden($("datasets"), false);
  }
  update();
  for (const name of Object.keys(datasets)) if (rows.rows.has(name)) rows.told(name, now());
  if (isFirst) for (const row of rows.seen) fetchHour(row.dataset);
  if (state.opened && datasets[state.opened.name]) refreshDetails();
}

/** Takes over the service's clock. An event that was on its way for long must not turn ages back. */
function setClock(uptime, isFirst) {
  const behind = now() - uptime;
  if (isFirst || behind < 0 || behind > 2) state.clock = { uptime, at: performance.now() };
}

function lost(why, retryAt) {
  if (!state.lost) {
    state.lost = { at: performance.now(), on: new Date() };
    announce("The connection to the service is lost.");
  }
  Object.assign(state.lost, { why, retryAt });
  update();
}

function refused(status, detail) {
  if (state.operatorPending) {
    setText($("operator-problem"), sentence(detail));
    state.token = state.operatorPending.before;
    state.operatorPending = null;
    connect();
    return;
  }
  const given = state.token;
  state.token = "";
  sessionStorage.removeItem(TOKEN);
  setHidden($("datasets"), true);
  setHidden($("ask"), false);
  setText($("ask-problem"), given || status !== 401 ? sentence(detail) : "");
  setText($("headline"), "Who is there?");
  setText($("summary"), "");
  setHidden($("vitals"), true);
  $("ask-token").value = "";
  $("ask-token").focus();
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

async function fetchHour(dataset) {
  if (dataset.hourIsWhole || dataset.hourIsComing || state.lost) return;
  dataset.hourIsComing = true;
  try {
    const history = await ask(`v1/datasets/${encodeURIComponent(dataset.name)}/history`, { token: state.token });
    dataset.hour.load(history, now());
    dataset.hourIsWhole = true;
  } catch {
    return; // asked again when it is seen again, or after the next connection
  } finally {
    dataset.hourIsComing = false;
  }
  const row = rows.rows.get(dataset.name);
  if (row && rows.seen.has(row)) row.draw(now());
  if (state.opened === dataset) drawDetails();
}

// The head

function update() {
  const at = now();
  const levels = new Map();
  const problems = { expired: [], stale: [], "never loaded": [], held: [], failing: [], other: [] };
  const counts = { fine: 0, warning: 0, alarm: 0, waiting: 0, held: 0 };
  let newest = null;
  for (const [name, dataset] of state.datasets) {
    if (!dataset.told) continue;
    const { age, level, state: word } = dataset.at(at);
    const { told } = dataset;
    levels.set(name, level);
    counts[level] += 1;
    if (told.held) counts.held += 1;
    if (age !== null && told.source === "postgres") newest = Math.min(newest ?? Infinity, age);
    if (level !== "alarm" && level !== "warning") continue;
    if (word === "expired" || word === "stale") problems[word].push(name);
    else if (word === "never_loaded") problems["never loaded"].push(name);
    else if (told.held) problems.held.push(name);
    else if (told.consecutive_failures) problems.failing.push(name);
    else problems.other.push(name);
  }
  announceChanges(levels);
  state.levels = levels;
  if (state.datasets.size && levels.size === state.datasets.size) rows.sort(levels);
  showHead(problems, counts, newest);
  showCounts(counts);
  showConnection();
  filter();
}

function showHead(problems, counts, newest) {
  const { service, postgres } = state;
  if (!service) return;
  setHidden($("vitals"), false);
  const down = postgres.state === "down";
  const isDeaf = postgres.listening_wanted && !postgres.listening && postgres.listening_problem !== null;
  const number = Object.values(problems).reduce((sum, names) => sum + names.length, 0) + down + isDeaf + (state.rejected !== null);
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
  const icon = `assets/icon-${level}.svg`;
  if ($("icon").getAttribute("href") !== icon) $("icon").setAttribute("href", icon);
  document.title = `${headline} – cacheservice`;
  setText($("summary"), state.lost ? "What is below is as it was told last; ages go on counting." : summary(problems, counts, newest, down, isDeaf));

  vital("postgres", down ? "alarm" : postgres.state === "up" ? "fine" : "waiting", postgres.state === "unknown" ? "not asked yet" : postgres.state);
  if (!postgres.listening_wanted) vital("listening", "waiting", "not needed");
  else if (postgres.listening) vital("listening", "fine", "yes");
  else vital("listening", isDeaf ? "warning" : "waiting", isDeaf ? "NO" : "not yet");
  const unready = Object.keys(service.not_ready);
  const because = unready.length > 2 ? words.plural(unready.length, "dataset") : unready.join(", ");
  vital("service", service.ready ? "fine" : "alarm", service.ready ? "ready" : `not ready because of ${because}`);
  setText($("span"), words.duration(window_s(now())));
  setText($("footer"), `cacheservice ${service.version}, up ${words.duration(now())}, process ${service.pid}`);
}

function summary(problems, counts, newest, down, isDeaf) {
  const said = [];
  if (down) {
    const read = newest === null ? "" : ` The newest data were read ${words.duration(newest)} ago.`;
    said.push(`${sentence(state.postgres.error ?? "PostgreSQL does not answer")}${read} ${nextTry()}`);
  }
  const labels = { expired: "Expired", stale: "Stale", "never loaded": "Never loaded", held: "Held back", failing: "Failing", other: "To look at" };
  for (const [kind, names] of Object.entries(problems)) if (names.length) said.push(`${labels[kind]}: ${listed(names)}.`);
  if (isDeaf) said.push(`Changes are not heard at once: ${sentence(state.postgres.listening_problem)}`);
  if (state.rejected !== null) said.push(`The newest configuration is not in effect: ${sentence(state.rejected)}`);
  if (said.length) return said.join(" ");
  if (counts.waiting) return `${words.plural(counts.fine, "dataset")} of ${counts.fine + counts.waiting} are loaded and within their limits.`;
  return counts.fine === 1 ? "The one dataset is within its limits." : `All ${words.count(counts.fine)} datasets are within their limits.`;
}

/** When the database is tried again, by whichever dataset comes first. */
function nextTry() {
  const waits = [...state.datasets.values()].map((dataset) => (dataset.told.progress ? 0 : dataset.at(now()).nextIn ?? Infinity));
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

const COUNTED = { alarm: "expired or never loaded", warning: "stale, held or failing", waiting: "loading or pinned", fine: "fresh" };

function showCounts(counts) {
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

function showConnection() {
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

// Filter

function filter() {
  const text = $("filter").value.trim().toLowerCase();
  const only = $("only-problems").checked;
  const at = now();
  const wanted = (name) => {
    const level = state.levels.get(name);
    if (only && level !== "alarm" && level !== "warning") return false;
    if (!text || name.includes(text)) return true;
    const dataset = state.datasets.get(name);
    return Boolean(dataset?.told) && dataset.at(at).words.includes(text);
  };
  const shown = rows.filter(wanted);
  setText($("shown"), text || only ? `${words.count(shown)} of ${words.plural(rows.rows.size, "dataset")} shown` : "");
}

// What is said to a screen reader: changes of state, not the passing of time

const news = [];
let newsTimer = null;

function announceChanges(levels) {
  for (const [name, level] of levels) {
    const dataset = state.datasets.get(name);
    const said = dataset.at(now()).words;
    if (dataset.said !== undefined && dataset.said !== said) announce(`${name} is ${said}.`);
    dataset.said = said;
    dataset.level = level;
  }
}

function announce(text) {
  news.push(text);
  newsTimer ??= setTimeout(() => {
    newsTimer = null;
    const said = news.length > NAMED ? [...news.slice(0, NAMED), `And ${news.length - NAMED} more changes.`] : [...news];
    news.length = 0;
    $("announcer").textContent = said.join(" ");
  }, QUIET_MS);
}

// One dataset in full

function openDetails(dataset) {
  state.opened = dataset;
  $("details-name").textContent = dataset.name;
  $("details-why").replaceChildren(paragraph("…"));
  $("details-said").textContent = "";
  $("details").showModal();
  refreshDetails();
  fetchHour(dataset);
  drawDetails();
}

const paragraph = (text) => Object.assign(document.createElement("p"), { textContent: text });

async function refreshDetails() {
  const dataset = state.opened;
  showDetailsHead();
  let sentences;
  try {
    ({ sentences } = await ask(`v1/datasets/${encodeURIComponent(dataset.name)}/why`, { token: state.token }));
  } catch (error) {
    sentences = [`The reasons cannot be asked for now: ${sentence(error.message)}`];
  }
  if (state.opened !== dataset) return;
  $("details-why").replaceChildren(...sentences.map(paragraph));
  showFacts(dataset);
}

function showDetailsHead() {
  const { told } = state.opened;
  const at = state.opened.at(now());
  $("details").dataset.level = at.level;
  setShape($("details-shape"), at.shape);
  setText($("details-state"), `${at.words}${at.age === null ? "" : `, age ${words.duration(at.age)} of ${words.duration(told.max_age_s)}`}`);
  setHidden($("details-refresh"), state.access !== "admin");
  setHidden($("details-accept"), state.access !== "admin" || !told.held);
}

function showFacts({ told }) {
  const attempt = told.last_attempt;
  const facts = {
    rows: words.count(told.rows),
    size: words.bytes(told.bytes),
    generation: words.count(told.generation),
    "as of": told.as_of ? words.moment(told.as_of, told.age_s) : "–",
    "last change": words.changeWords(told.last_change),
    interval: words.duration(told.interval_s),
    "time limit of a refresh": words.duration(told.timeout_s),
    "greatest age": words.duration(told.max_age_s),
    "once expired": told.on_expired === "refuse" ? "readers get an error" : "still served",
    required: told.required ? "yes" : "no",
    group: told.group || "none",
    "came from": told.source ?? "–",
    "last attempt": attempt ? `${attempt.outcome} in ${words.took(attempt.took_s)}, by ${attempt.trigger}` : "none yet",
    "failed in a row": words.count(told.consecutive_failures),
  };
  $("details-facts").replaceChildren(
    ...Object.entries(facts).map(([term, fact]) => {
      const pair = document.createElement("div");
      pair.append(
        Object.assign(document.createElement("dt"), { textContent: term }),
        Object.assign(document.createElement("dd"), { textContent: fact }),
      );
      return pair;
    }),
  );
}

function drawDetails() {
  const dataset = state.opened;
  if (!dataset || !dataset.hourIsWhole) return;
  if (state.plots) state.plots.draw(now());
  else state.plots = details($("details-ages"), $("details-times"), dataset, now());
}

function forgetDetails() {
  state.opened = null;
  state.plots?.destroy();
  state.plots = null;
}

// Commands

async function send(dataset, command, said) {
  const path = `v1/datasets/${encodeURIComponent(dataset.name)}/${command}`;
  const answer = await ask(path, { token: state.token, method: "POST" });
  say(dataset, said(answer));
}

function say(dataset, text) {
  if (state.opened === dataset) $("details-said").textContent = text;
  else announce(`${dataset.name}: ${text}`);
}

async function refresh(dataset) {
  try {
    await send(dataset, "refresh", (answer) => `Refresh ${answer.refresh}.`);
  } catch (error) {
    failed(dataset, error);
  }
}

function confirmAccept(dataset) {
  const { held } = dataset.told;
  $("confirm-title").textContent = `Accept the next result of ${dataset.name}?`;
  $("confirm-text").textContent = held
    ? `The newest one, with ${words.plural(held.rows, "row")}, is held back: it ${sentence(held.reason).toLowerCase()[0]}${sentence(held.reason).slice(1)}`
    : "Nothing is held back any more.";
  const dialog = $("confirm");
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "accept") return;
    try {
      await send(dataset, "accept", () => "The next result is accepted.");
      await send(dataset, "refresh", (answer) => `Accepted; refresh ${answer.refresh}.`);
    } catch (error) {
      failed(dataset, error);
    }
  };
  dialog.showModal();
}

function failed(dataset, error) {
  say(dataset, sentence(error.message));
  if (state.opened !== dataset) {
    openDetails(dataset);
    $("details-said").textContent = sentence(error.message);
  }
}

// What a person does

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("ask-token").value.trim();
  setText($("ask-problem"), "");
  connect();
});
$("operator").addEventListener("click", () => {
  $("operator-token").value = "";
  $("operator-problem").textContent = "";
  $("operator-dialog").showModal();
});
$("operator-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setText($("operator-problem"), "");
  state.operatorPending = { before: state.token };
  state.token = $("operator-token").value.trim();
  connect();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  state.token = "";
  connect();
});
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
}
$("details").addEventListener("close", forgetDetails);
$("details-refresh").addEventListener("click", () => refresh(state.opened));
$("details-accept").addEventListener("click", () => confirmAccept(state.opened));
$("retry").addEventListener("click", () => state.stream.retryNow());
$("filter").addEventListener("input", filter);
$("only-problems").addEventListener("change", filter);
window.addEventListener("online", () => state.stream.retryNow());
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") state.stream.retryNow();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
let resized = null;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(redrawAll, 200);
});

function redrawAll() {
  rows.redraw(now(), true);
  if (state.plots) {
    state.plots.destroy();
    state.plots = null;
    drawDetails();
  }
}

setInterval(() => {
  if (state.service) update();
  else showConnection();
  rows.tick(now());
  if (state.opened) showDetailsHead();
}, 1000);
setInterval(() => {
  if (state.service) rows.tick(now(), true);
  rows.redraw(now());
  if (state.plots) drawDetails();
}, 15_000);

connect();
