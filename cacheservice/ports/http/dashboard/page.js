/** Shared by all parts of the page: its state, the service's clock, and helpers that change elements. */

export const $ = (id) => document.getElementById(id);

/** The service's last state, and the state of the connection. */
export const state = {
  stream: null,
  token: "",
  access: "read",
  admin: false,
  service: null,
  postgres: null,
  rejected: null,
  datasets: new Map(),
  levels: new Map(),
  /** The service's uptime at a time of performance.now(), because a wall clock may be set. */
  clock: { uptime: 0, at: performance.now() },
  lost: null,
  opened: null,
};

/** The service's uptime, in seconds; it continues while the service is unreachable. */
export const now = () => state.clock.uptime + (performance.now() - state.clock.at) / 1000;

/** Returns true if a dataset was not read because the database is down. */
export function isDown(latest) {
  return state.postgres?.state === "down" && latest.last_attempt?.error === state.postgres.error;
}

export function isLost() {
  return state.lost !== null;
}

/** Returns a problem's detail as a sentence. */
export const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setShape(svgUse, shape) {
  const href = `#shape-${shape}`;
  if (svgUse.getAttribute("href") !== href) svgUse.setAttribute("href", href);
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}
