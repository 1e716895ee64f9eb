/** The dialog of one dataset: the service's own sentences, charts of the last hour, and the limits. */

import { details } from "./charts.js";
import { $, now, sentence, setHidden, setShape, setText, state } from "./page.js";
import { ask } from "./stream.js";
import * as words from "./words.js";

export function openDetails(dataset) {
  state.opened = dataset;
  $("details-name").textContent = dataset.name;
  $("details-why").replaceChildren(paragraph("…"));
  $("details-result").textContent = "";
  $("details").showModal();
  refreshDetails();
  drawDetails();
}

const paragraph = (text) => Object.assign(document.createElement("p"), { textContent: text });

export async function refreshDetails() {
  const dataset = state.opened;
  showDetailsHead();
  let sentences;
  try {
    ({ sentences } = await ask(`v1/datasets/${encodeURIComponent(dataset.name)}/why`, { token: state.token }));
  } catch (error) {
    sentences = [`The reasons are not available now: ${sentence(error.message)}`];
  }
  if (state.opened !== dataset) return;
  $("details-why").replaceChildren(...sentences.map(paragraph));
  showFacts(dataset);
}

export function showDetailsHead() {
  const { latest } = state.opened;
  const at = state.opened.at(now());
  $("details").dataset.level = at.level;
  setShape($("details-shape"), at.shape);
  setText($("details-state"), `${at.words}${at.age === null ? "" : `, age ${words.duration(at.age)} of ${words.duration(latest.max_age_s)}`}`);
  setHidden($("details-refresh"), state.access !== "admin");
  setHidden($("details-accept"), state.access !== "admin" || !latest.held);
}

function showFacts({ latest }) {
  const attempt = latest.last_attempt;
  const facts = {
    rows: words.count(latest.rows),
    size: words.bytes(latest.bytes),
    generation: words.count(latest.generation),
    "as of": latest.as_of ? words.moment(latest.as_of, latest.age_s) : "–",
    "last change": words.changeWords(latest.last_change),
    interval: words.duration(latest.interval_s),
    "time limit of a refresh": words.duration(latest.timeout_s),
    "greatest age": words.duration(latest.max_age_s),
    "once expired": latest.on_expired === "refuse" ? "readers get an error" : "still served",
    required: latest.required ? "yes" : "no",
    group: latest.group || "none",
    source: latest.source ?? "–",
    ...(latest.cluster ? { "in the fleet": words.roleWords(latest.cluster) } : {}),
    "last attempt": attempt ? `${attempt.outcome} in ${words.took(attempt.took_s)}, by ${attempt.trigger}` : "none yet",
    "consecutive failures": words.count(latest.consecutive_failures),
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

export function drawDetails() {
  const dataset = state.opened;
  if (!dataset || !dataset.hourIsWhole) return;
  if (state.plots) state.plots.draw(now());
  else state.plots = details($("details-ages"), $("details-times"), dataset, now());
}

export function forgetDetails() {
  state.opened = null;
  state.plots?.destroy();
  state.plots = null;
}
