/** The dialog of one dataset: the service's own sentences, charts of the last hour, and the limits. */

import { details } from "./charts.js";
import { $, now, sentence, setHidden, setShape, setText, state } from "./page.js";
import { ask } from "./stream.js";
import * as words from "./words.js";

export function openDetails(dataset) {
  state.opened = dataset;
  $("details-name").textContent = dataset.name;
  $("details-why").replaceChildren(paragraph("…"));
  $("details-said").textContent = "";
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
    sentences = [`The reasons cannot be asked for now: ${sentence(error.message)}`];
  }
  if (state.opened !== dataset) return;
  $("details-why").replaceChildren(...sentences.map(paragraph));
  showFacts(dataset);
}

export function showDetailsHead() {
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
