/** What all parts of the page share: its state, the service's clock, and how an element is changed. */

export const $ = (id) => document.getElementById(id);

/** What the service told, and what became of the connection to it. */
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
  /** The service's uptime at a moment of performance.now(); no wall clock, which somebody may set. */
  clock: { uptime: 0, at: performance.now() },
  lost: null,
  opened: null,
};

/** The service's uptime, in seconds; it goes on while the service is out of reach. */
export const now = () => state.clock.uptime + (performance.now() - state.clock.at) / 1000;

/** Whether the database is down, and that is why a dataset was not read. */
export function isDown(told) {
  return state.postgres?.state === "down" && told.last_attempt?.error === state.postgres.error;
}

export function isLost() {
  return state.lost !== null;
}

/** A problem's detail as a sentence. */
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
