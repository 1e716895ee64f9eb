/** The dashboard: receives the service's events, and keeps and shows its state. Ages grow by this machine's clock. */

import { drawDetails, forgetDetails, openDetails, refreshDetails, showDetailsHead } from "./details.js";
import { keepLostIcon, showConnection, showCounts, showHead } from "./head.js";
import { announce, announceChanges } from "./news.js";
import { $, isDown, isLost, now, sentence, setHidden, setShape, setText, state } from "./page.js";
import { Dataset, Rows } from "./rows.js";
import { Stream, ask } from "./stream.js";
import * as words from "./words.js";

const TOKEN = "cacheservice.token"; // its key in sessionStorage, which belongs to this tab only

const rows = new Rows($("list"), $("row"), { why: open, refresh, accept: confirmAccept, now, isDown, isLost }, fetchHour);

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
    // Points missed during the interruption are fetched with the history.
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
  for (const [name, description] of Object.entries(datasets)) state.datasets.get(name)?.take(description);
  if (names) {
    for (const row of rows.rows.values()) row.update(rows.isAdmin);
    setHidden($("datasets"), false);
  }
  update();
  for (const name of Object.keys(datasets)) if (rows.rows.has(name)) rows.update(name, now());
  if (isFirst) for (const row of rows.seen) fetchHour(row.dataset);
  if (state.opened && datasets[state.opened.name]) refreshDetails();
}

/** Adopts the service's clock. A delayed event must not set ages back. */
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
  const sentToken = state.token;
  // A client without access must not see the state any more.
  Object.assign(state, { token: "", lost: null, service: null });
  showConnection();
  document.body.dataset.level = "waiting";
  setShape($("head-shape"), "waiting");
  sessionStorage.removeItem(TOKEN);
  setHidden($("datasets"), true);
  setHidden($("ask"), false);
  setText($("ask-problem"), sentToken || status !== 401 ? sentence(detail) : "");
  setText($("headline"), "Locked");
  setText($("summary"), "");
  setHidden($("vitals"), true);
  $("ask-token").value = "";
  $("ask-token").focus();
}

async function fetchHour(dataset) {
  if (dataset.hourIsWhole || dataset.hourIsComing || state.lost) return;
  dataset.hourIsComing = true;
  try {
    const history = await ask(`v1/datasets/${encodeURIComponent(dataset.name)}/history`, { token: state.token });
    dataset.hour.load(history, now());
    dataset.hourIsWhole = true;
  } catch {
    return; // retried when the row is visible again, or after the next connection
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
    if (!dataset.latest) continue;
    const { age, level, state: word } = dataset.at(at);
    const { latest } = dataset;
    levels.set(name, level);
    counts[level] += 1;
    if (latest.held) counts.held += 1;
    if (age !== null && latest.source === "postgres") newest = Math.min(newest ?? Infinity, age);
    if (level !== "alarm" && level !== "warning") continue;
    if (word === "expired" || word === "stale") problems[word].push(name);
    else if (word === "never_loaded") problems["never loaded"].push(name);
    else if (latest.held) problems.held.push(name);
    else if (latest.consecutive_failures) problems.failing.push(name);
    else problems.other.push(name);
  }
  announceChanges();
  state.levels = levels;
  if (state.datasets.size && levels.size === state.datasets.size) rows.sort(levels);
  showHead(problems, counts, newest);
  showCounts(counts);
  showConnection();
  filter();
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
    return Boolean(dataset?.latest) && dataset.at(at).words.includes(text);
  };
  const shown = rows.filter(wanted);
  setText($("shown"), text || only ? `${words.count(shown)} of ${words.plural(rows.rows.size, "dataset")} shown` : "");
}

// Commands

function open(dataset) {
  openDetails(dataset);
  fetchHour(dataset);
}

async function send(dataset, command, describe) {
  const path = `v1/datasets/${encodeURIComponent(dataset.name)}/${command}`;
  const answer = await ask(path, { token: state.token, method: "POST" });
  showResult(dataset, describe(answer));
}

function showResult(dataset, text) {
  if (state.opened === dataset) $("details-result").textContent = text;
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
  const { held } = dataset.latest;
  $("confirm-title").textContent = `Accept the next result of ${dataset.name}?`;
  $("confirm-text").textContent = held
    ? `The newest result, with ${words.plural(held.rows, "row")}, is held back: it ${sentence(held.reason).toLowerCase()[0]}${sentence(held.reason).slice(1)}`
    : "No result is held back any more.";
  const dialog = $("confirm");
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "accept") return;
    try {
      await send(dataset, "accept", () => "The next result is accepted.");
      await send(dataset, "refresh", (answer) => `The next result is accepted. Refresh ${answer.refresh}.`);
    } catch (error) {
      failed(dataset, error);
    }
  };
  dialog.showModal();
}

function failed(dataset, error) {
  showResult(dataset, sentence(error.message));
  if (state.opened !== dataset) {
    open(dataset);
    $("details-result").textContent = sentence(error.message);
  }
}

// User input

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
    if (event.target === dialog) dialog.close(); // a click outside the dialog
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

state.token = sessionStorage.getItem(TOKEN) ?? "";
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

keepLostIcon().catch(() => {}); // the browser then tries to fetch it when it is needed
connect();
