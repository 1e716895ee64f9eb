/** The list of datasets: one row each, problems first. All external data are inserted as text, never as HTML. */

import { Hour, spark } from "./charts.js";
import { setHidden, setShape, setText } from "./page.js";
import * as words from "./words.js";

const LABELS = { why: "Why? The state of", refresh: "Refresh", accept: "Accept … the next result of" };
const RANK = { alarm: 0, warning: 1, waiting: 2, fine: 3 };

/** The last event of one dataset, and its state since then by the clock. */
export class Dataset {
  constructor(name) {
    this.name = name;
    this.hour = new Hour();
    this.hourIsWhole = false;
  }

  take(latest) {
    this.latest = latest;
    if (latest.newest_point) this.hour.add(latest.newest_point, latest.told_at_s);
  }

  /** Returns its state at `now` on the service's clock, in seconds. */
  at(now) {
    const { latest } = this;
    const since = Math.max(0, now - latest.told_at_s);
    const on = (value) => (value === null || value === undefined ? null : value + since);
    const age = on(latest.age_s);
    return {
      age,
      since: latest.held ? Math.max(0, (Date.now() - Date.parse(latest.held.since)) / 1000) : 0, // whether to show the day
      nextIn: latest.next_refresh_in_s === null ? null : Math.max(0, latest.next_refresh_in_s - since),
      endedAgo: on(latest.newest_point?.ago_s) ?? 0,
      behind: on(latest.behind_s),
      state: words.stateOf(latest, age),
      level: words.levelOf(latest, age),
      shape: words.shapeOf(latest, age),
      words: words.stateWords(latest, age),
    };
  }
}

/** Sets the content to pieces of text; `{ strong }` pieces are emphasized. */
function setPieces(element, pieces) {
  const isStrong = (piece) => typeof piece !== "string";
  const fits = pieces.length === element.childElementCount && pieces.every((piece, i) => isStrong(piece) === (element.children[i].tagName === "STRONG"));
  if (!fits) element.replaceChildren(...pieces.map((piece) => document.createElement(isStrong(piece) ? "strong" : "span")));
  pieces.forEach((piece, i) => setText(element.children[i], isStrong(piece) ? piece.strong : piece));
}

class Row {
  constructor(template, dataset, actions) {
    this.dataset = dataset;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.id = `dataset-${dataset.name}`;
    const find = (selector) => this.element.querySelector(selector);
    this.use = find("use");
    this.parts = Object.fromEntries(
      ["name", "state", "age-now", "age-limit", "fill", "notch", "rows", "bytes", "generation", "next", "change",
        "chart", "sentence", "loading", "why", "refresh", "accept"].map((part) => [part, find(`.${part}`)]),
    );
    this.caption = find("figcaption");
    this.progress = find("progress");
    this.progressWords = find(".loading span");
    this.parts.name.textContent = dataset.name;
    for (const action of ["why", "refresh", "accept"]) {
      this.parts[action].addEventListener("click", () => actions[action](dataset));
      this.parts[action].setAttribute("aria-label", `${LABELS[action]} ${dataset.name}`);
    }
  }

  /** Updates the parts that change only with an event. */
  update(isAdmin) {
    const { latest } = this.dataset;
    const { parts } = this;
    setText(parts.rows, latest.generation ? words.count(latest.rows) : "–");
    setText(parts.bytes, latest.generation ? words.bytes(latest.bytes) : "–");
    setText(parts.generation, latest.generation ? words.count(latest.generation) : "–");
    setText(parts.change, words.changeWords(latest.last_change));
    const notch = (latest.interval_s + latest.timeout_s) / latest.max_age_s;
    setHidden(parts.notch, notch >= 1);
    parts.notch.style.left = `${notch * 100}%`;
    setText(parts["age-limit"], latest.age_s === null ? "" : `of ${words.duration(latest.max_age_s)}`);
    setHidden(parts.refresh, !isAdmin);
    setHidden(parts.accept, !isAdmin || !latest.held);
    setHidden(parts.loading, !latest.progress?.rows); // before the first row, the service may still be connecting
    if (latest.progress) {
      const { rows, expected_rows: expected } = latest.progress;
      // Without an expected number of rows, the bar is indeterminate.
      if (expected) this.progress.value = Math.min(1, rows / expected);
      else this.progress.removeAttribute("value");
      const of = expected ? ` of about ${words.count(expected)}` : "";
      setText(this.progressWords, `reading: ${words.count(rows)}${of} rows`);
      this.progress.setAttribute("aria-label", `${this.dataset.name} is being read`);
    }
  }

  /** Updates the parts that change with time. */
  tick(now, { isDown, isLost }) {
    const at = this.dataset.at(now);
    if (isLost()) at.nextIn = undefined; // the current activity of the service is unknown
    const { latest } = this.dataset;
    const { parts } = this;
    if (this.element.dataset.level !== at.level) this.element.dataset.level = at.level;
    this.element.dataset.state = at.state;
    setShape(this.use, at.shape);
    setText(parts.state, at.words);
    setText(parts["age-now"], at.age === null ? "none yet" : words.duration(at.age));
    setText(parts.next, words.nextWords(latest, at.nextIn));
    const share = at.age === null ? 0 : Math.min(1, at.age / latest.max_age_s);
    parts.fill.style.transform = `scaleX(${share.toFixed(3)})`;
    const isProblem = at.level === "alarm" || at.level === "warning";
    setHidden(parts.sentence, !isProblem && !latest.pinned);
    if (!parts.sentence.hidden) setPieces(parts.sentence, words.problem(latest, at, isDown(latest)));
  }

  draw(now) {
    if (!this.dataset.hourIsWhole) return;
    if (this.plot) {
      setText(this.caption, this.plot.draw(now).short);
    } else if (this.parts.chart.clientWidth) {
      this.plot = spark(this.parts.chart, this.dataset, now);
      setText(this.caption, this.plot.words.short);
    }
  }

  forgetPlot() {
    this.plot?.destroy();
    this.plot = null;
  }
}

/** All rows. `actions` has the buttons' handlers; `needsHour(dataset)` fetches its history once its row is visible. */
export class Rows {
  constructor(list, template, actions, needsHour) {
    this.list = list;
    this.template = template;
    this.actions = actions;
    this.needsHour = needsHour;
    this.rows = new Map();
    this.order = [];
    this.seen = new Set();
    this.observer = new IntersectionObserver((entries) => this.#observed(entries), { rootMargin: "150px" });
    this.isAdmin = false;
    this.wanted = () => true;
  }

  /** Replaces the datasets; rows of unchanged datasets stay. */
  declare(datasets) {
    for (const [name, row] of this.rows) {
      if (datasets.get(name) === row.dataset) continue;
      this.observer.unobserve(row.element);
      this.seen.delete(row);
      row.forgetPlot();
      row.element.remove();
      this.rows.delete(name);
    }
    for (const [name, dataset] of datasets) {
      if (this.rows.has(name)) continue;
      const row = new Row(this.template, dataset, this.actions);
      row.element.dataset.name = name;
      this.rows.set(name, row);
    }
    this.names = [...datasets.keys()];
    this.order = [];
  }

  /** Shows the last event of a dataset. */
  update(name, now) {
    const row = this.rows.get(name);
    row.update(this.isAdmin);
    row.tick(now, this.actions);
    if (this.seen.has(row)) row.draw(now);
  }

  setAdmin(isAdmin) {
    this.isAdmin = isAdmin;
    for (const row of this.rows.values()) row.update(isAdmin);
  }

  /** Sorts problems first; within a level by the configuration's order, so that rows do not move as they age. */
  sort(levels) {
    const place = new Map(this.names.map((name, index) => [name, index]));
    const order = [...this.names].sort((a, b) => RANK[levels.get(a)] - RANK[levels.get(b)] || place.get(a) - place.get(b));
    if (order.every((name, index) => name === this.order[index]) && order.length === this.order.length) return;
    this.order = order;
    const focused = document.activeElement;
    let next = this.list.firstElementChild;
    for (const name of order) {
      const { element } = this.rows.get(name);
      if (element === next) {
        next = next.nextElementSibling;
        continue;
      }
      const isNew = !element.isConnected;
      this.list.insertBefore(element, next);
      if (isNew) this.observer.observe(element);
    }
    if (focused instanceof HTMLElement && this.list.contains(focused)) focused.focus({ preventScroll: true });
  }

  /** Shows only the rows for which `wanted(name)` is true; returns their number. */
  filter(wanted) {
    this.wanted = wanted;
    let shown = 0;
    for (const [name, row] of this.rows) {
      const hidden = !wanted(name);
      setHidden(row.element, hidden);
      if (!hidden) shown += 1;
    }
    return shown;
  }

  /** Updates the visible rows; `all` includes the others, which screen readers can reach. */
  tick(now, all = false) {
    for (const row of all ? this.rows.values() : this.seen) row.tick(now, this.actions);
  }

  /** Redraws the visible charts; with `fromScratch` as new charts, after colours or sizes have changed. */
  redraw(now, fromScratch = false) {
    for (const row of this.rows.values()) if (fromScratch) row.forgetPlot();
    for (const row of this.seen) row.draw(now);
  }

  #observed(entries) {
    for (const entry of entries) {
      const row = this.rows.get(entry.target.dataset.name);
      if (!row || row.element !== entry.target) continue;
      if (entry.isIntersecting) {
        this.seen.add(row);
        row.tick(this.actions.now(), this.actions);
        this.needsHour(row.dataset);
        row.draw(this.actions.now());
      } else {
        this.seen.delete(row);
        row.forgetPlot();
      }
    }
  }
}
