/** Announcements for screen readers: changes of state, not the passing of time. */

import { $, now, state } from "./page.js";

const QUIET_MS = 2500;
const MOST_AT_ONCE = 4;

const news = [];
let newsTimer = null;

/** Announces the datasets whose state has changed since the last call, except new ones. */
export function announceChanges() {
  for (const [name, dataset] of state.datasets) {
    if (!dataset.told) continue;
    const said = dataset.at(now()).words;
    if (dataset.said !== undefined && dataset.said !== said) announce(`${name} is ${said}.`);
    dataset.said = said;
  }
}

/** Announces a text soon, coalesced with other announcements until then. */
export function announce(text) {
  news.push(text);
  newsTimer ??= setTimeout(() => {
    newsTimer = null;
    const said = news.length > MOST_AT_ONCE ? [...news.slice(0, MOST_AT_ONCE), `And ${news.length - MOST_AT_ONCE} more changes.`] : [...news];
    news.length = 0;
    $("announcer").textContent = said.join(" ");
  }, QUIET_MS);
}
