/** What is said to a screen reader: changes of state, not the passing of time. */

import { $, now, state } from "./page.js";

const QUIET_MS = 2500;
const MOST_AT_ONCE = 4;

const news = [];
let newsTimer = null;

/** Says which datasets have another state than when it was called last; nothing of those that are new. */
export function announceChanges() {
  for (const [name, dataset] of state.datasets) {
    if (!dataset.told) continue;
    const said = dataset.at(now()).words;
    if (dataset.said !== undefined && dataset.said !== said) announce(`${name} is ${said}.`);
    dataset.said = said;
  }
}

/** Says something soon, together with what else there is to say then. */
export function announce(text) {
  news.push(text);
  newsTimer ??= setTimeout(() => {
    newsTimer = null;
    const said = news.length > MOST_AT_ONCE ? [...news.slice(0, MOST_AT_ONCE), `And ${news.length - MOST_AT_ONCE} more changes.`] : [...news];
    news.length = 0;
    $("announcer").textContent = said.join(" ");
  }, QUIET_MS);
}
