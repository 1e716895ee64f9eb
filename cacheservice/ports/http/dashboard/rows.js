/** The list of datasets: one row each, problems first. All external data are inserted as text, never as HTML. */

import { Hour, spark } from "./charts.js";
import { setHidden, setShape, setText } from "./page.js";
import * as words from "./words.js";

const RANK = { alarm: 0, warning: 1, waiting: 2, fine: 3 };

/** The last event of one dataset, and its state since then by the clock. */
export class Dataset {
  constructor(name) {
    this.name = name;
    this.hour = new Hour();
    this.hourIsWhole = false;
  }

  take(told) {
    this.told = told;
    if (told.newest_point) this.hour.add(told.newest_point, told.told_at_s);
  }

  /** Returns its state at `now` on the service's clock, in seconds. */
  at(now) {
    const { told } = this;
    const since = Math.max(0, now - told.told_at_s);
    const on = (value) => (value === null || value === undefined ? null : value + since);
    const age = on(told.age_s);
    return {
      age,
      since: told.held ? Math.max(0, (Date.now() - Date.parse(told.held.since)) / 1000) : 0, // whether to show the day
      nextIn: told.next_refresh_in_s === null ? null : Math.max(0, told.next_refresh_in_s - since),
      endedAgo: on(told.newest_point?.ago_s) ?? 0,
      behind: on(told.behind_s),
      state: words.stateOf(told, age),
      level: words.levelOf(told, age),
      shape: words.shapeOf(told, age),
      words: words.stateWords(told, age),
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
      this.parts[action].setAttribute("aria-label", `${{ why: "Why is it so:", refresh: "Refresh", accept: "Accept the next result of" }[action]} ${dataset.name}`);
    }
  }

  /** Updates the parts that change only with an event. */
  told(isAdmin) {
    const { told } = this.dataset;
    const { parts } = this;
    setText(parts.rows, told.generation ? words.count(told.rows) : "–");
    setText(parts.bytes, told.generation ? words.bytes(told.bytes) : "–");
    setText(parts.generation, told.generation ? words.count(told.generation) : "–");
    setText(parts.change, words.changeWords(told.last_change));
    const notch = (told.interval_s + told.timeout_s) / told.max_age_s;
    setHidden(parts.notch, notch >= 1);
    parts.notch.style.left = `${notch * 100}%`;
    setText(parts["age-limit"], told.age_s === null ? "" : `of ${words.duration(told.max_age_s)}`);
    setHidden(parts.refresh, !isAdmin);
    setHidden(parts.accept, !isAdmin || !told.held);
    setHidden(parts.loading, !told.progress?.rows); // before the first row, the service may still be connecting
    if (told.progress) {
      const { rows, expected_rows: expected } = told.progress;
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
    const { told } = this.dataset;
    const { parts } = this;
    if (this.element.dataset.level !== at.level) this.element.dataset.level = at.level;
    this.element.dataset.state = at.state;
    setShape(this.use, at.shape);
    setText(parts.state, at.words);
    setText(parts["age-now"], at.age === null ? "none yet" : words.duration(at.age));
    setText(parts.next, words.nextWords(told, at.nextIn));
    const share = at.age === null ? 0 : Math.min(1, at.age / told.max_age_s);
    parts.fill.style.transform = `scaleX(${share.toFixed(3)})`;
    const isProblem = at.level === "alarm" || at.level === "warning";
    setHidden(parts.sentence, !isProblem && !told.pinned);
    if (!parts.sentence.hidden) setPieces(parts.sentence, words.problem(told, at, isDown(told)));
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

  told(name, now) {
    const row = this.rows.get(name);
    row.told(this.isAdmin);
    row.tick(now, this.actions);
    if (this.seen.has(row)) row.draw(now);
  }

  setAdmin(isAdmin) {
    this.isAdmin = isAdmin;
    for (const row of this.rows.values()) row.told(isAdmin);
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

  /** Redraws the visible charts; with `anew` from scratch, after colours or sizes have changed. */
  redraw(now, anew = false) {
    for (const row of this.rows.values()) if (anew) row.forgetPlot();
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
