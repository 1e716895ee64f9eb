/** Announcements for screen readers: changes of state, not the passing of time. */

import { $, now, state } from "./page.js";

const QUIET_MS = 2500;
const MOST_AT_ONCE = 4;

const news = [];
let newsTimer = null;

/** Announces the datasets whose state has changed since the last call, except new ones. */
export function announceChanges() {
  for (const [name, dataset] of state.datasets) {
    if (!dataset.latest) continue;
    const { words } = dataset.at(now());
    if (dataset.announced !== undefined && dataset.announced !== words) announce(`${name} is ${words}.`);
    dataset.announced = words;
  }
}

/** Announces a text soon, coalesced with other announcements until then. */
export function announce(text) {
  news.push(text);
  newsTimer ??= setTimeout(() => {
    newsTimer = null;
    const texts = news.length > MOST_AT_ONCE ? [...news.slice(0, MOST_AT_ONCE), `And ${news.length - MOST_AT_ONCE} more changes.`] : [...news];
    news.length = 0;
    $("announcer").textContent = texts.join(" ");
  }, QUIET_MS);
}
