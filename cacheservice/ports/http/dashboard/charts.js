/** The last hour of a dataset as charts. uPlot's script defines the global uPlot. */

import { duration, took } from "./words.js";

const HOUR_S = 3600;
const STEP_S = 300;
const uPlot = window.uPlot;

/** The time span of all charts: the service's uptime in steps of five minutes, at most an hour. */
export const window_s = (now) => Math.min(HOUR_S, Math.max(STEP_S, Math.ceil(now / STEP_S) * STEP_S));

/** The points of one dataset's last hour, by time slot: first from /history, then one by one from events. */
export class Hour {
  constructor() {
    this.points = [];
  }

  /** Loads the columns of /history, as of `now` on the service's clock. */
  load(history, now) {
    this.points = history.slot.map((slot, i) => ({
      slot,
      at: now - history.ago_s[i],
      took: history.took_s[i],
      age: history.age_s[i],
      outcome: history.outcome[i],
    }));
  }

  /** Adds the newest point, which replaces the previous point of its slot. */
  add(point, reportedAt) {
    while (this.points.length && this.points.at(-1).slot >= point.slot) this.points.pop();
    while (this.points.length && this.points[0].at < reportedAt - HOUR_S) this.points.shift();
    this.points.push({
      slot: point.slot,
      at: reportedAt - point.ago_s,
      took: point.took_s,
      age: point.age_s,
      outcome: point.outcome,
    });
  }

  /** Returns columns for uPlot and their description in words, at `now` with the current `age` (or null). */
  at(now, age) {
    const points = this.points.filter((point) => point.at > now - window_s(now));
    const failed = (point) => point.outcome === "failed" || point.outcome === "held";
    return {
      // The age continues to grow after the last attempt.
      data: [
        [...points.map((point) => point.at), now],
        [...points.map((point) => point.age), age],
        [...points.map((point) => (failed(point) ? null : point.took)), null],
        [...points.map((point) => (failed(point) ? point.took : null)), null],
      ],
      words: wordsOf(points, failed, age, window_s(now)),
    };
  }
}

function wordsOf(points, failed, ageNow, shown) {
  const span = duration(shown);
  if (!points.length) return { short: "no refresh yet", long: `No refresh has ended in the last ${span}.` };
  const ages = [...points.map((point) => point.age), ageNow].filter((age) => age !== null);
  const age = ages.length ? duration(Math.ceil(Math.max(...ages))) : null;
  const slowest = took(Math.max(...points.map((point) => point.took)));
  const bad = points.filter(failed).length;
  return {
    short: `${age === null ? "" : `age ≤ ${age}, `}took ≤ ${slowest}`,
    long:
      `In the last ${span} readers got ${age === null ? "no data" : `data at most ${age} old`}; the slowest attempt took ${slowest}` +
      (bad ? `; attempts failed or were held in ${bad} of ${points.length} spans of 10 seconds.` : "; none failed or was held."),
  };
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return {
    age: of("--chart-age"),
    area: of("--chart-area"),
    time: of("--chart-time"),
    alarm: of("--alarm"),
    quiet: of("--quiet"),
    line: of("--line"),
  };
}

const bars = () => uPlot.paths.bars({ size: [0.6, 5, 2], gap: 0 });

const BARE = { cursor: { show: false }, legend: { show: false }, select: { show: false } };

const span = (now) => [now - window_s(now), now];

/** The small chart of a row: a line of ages over bars of refresh times, without axes. */
export function spark(element, dataset, now) {
  const c = colours();
  const hourAt = (moment) => dataset.hour.at(moment, dataset.at(moment).age);
  const { data, words } = hourAt(now);
  let at = now;
  element.setAttribute("aria-label", words.long);
  const plot = new uPlot(
    {
      ...BARE,
      width: element.clientWidth,
      height: element.clientHeight,
      padding: [2, 0, 1, 0],
      scales: {
        x: { time: false, range: () => span(at) },
        age: { range: (_, __, max) => [0, Math.max(max ?? 0, 1) * 1.05] },
        took: { range: (_, __, max) => [0, Math.max(max ?? 0, 0.001) * 2.4] },
      },
      axes: [{ show: false }, { show: false }],
      series: [
        {},
        { scale: "age", stroke: c.age, fill: c.area, width: 1.5, spanGaps: true, points: { size: 3 } },
        { scale: "took", fill: c.time, stroke: c.time, width: 0, paths: bars(), points: { show: false } },
        { scale: "took", stroke: c.alarm, width: 1, paths: bars(), points: { show: false } },
      ],
    },
    data,
    element,
  );
  return {
    words,
    draw(later) {
      at = later;
      const next = hourAt(later);
      element.setAttribute("aria-label", next.words.long);
      plot.setData(next.data);
      return next.words;
    },
    destroy() {
      plot.destroy();
    },
  };
}

/** Returns the ticks of the time axis, whole minutes apart. */
function minutes(now, width) {
  const shown = window_s(now) / 60;
  const step = ([[5, 1], [10, 2], [20, 5], [40, 10]].find(([limit]) => shown <= limit)?.[1] ?? 15) * (width < 480 ? 2 : 1);
  return Array.from({ length: Math.floor(shown / step) + 1 }, (_, i) => now - i * step * 60).reverse();
}

const ago = (now) => (_, splits) => splits.map((at) => (now() - at < 1 ? "now" : `−${Math.round((now() - at) / 60)} min`));

function large(element, data, { height, now, scale, values, series, hooks = {}, least = 0.001 }) {
  const c = colours();
  const axis = { stroke: c.quiet, grid: { stroke: c.line, width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  return new uPlot(
    {
      ...BARE,
      width: element.clientWidth,
      height,
      padding: [8, 26, 0, 0],
      scales: {
        x: { time: false, range: () => span(now()) },
        [scale]: { range: (_, __, max) => [0, Math.max(max ?? 0, least) * 1.1] },
      },
      axes: [
        { ...axis, splits: (plot) => minutes(now(), plot.width), values: ago(now), size: 26 },
        { ...axis, scale, size: 70, values: (_, splits) => splits.map(values) },
      ],
      series,
      hooks,
    },
    data,
    element,
  );
}

/** The two charts of the dialog: ages with their limit, and refresh times. */
export function details(agesElement, timesElement, dataset, now) {
  const c = colours();
  const hourAt = (moment) => dataset.hour.at(moment, dataset.at(moment).age);
  const maxAge = dataset.latest.max_age_s;
  let at = now;
  const clock = () => at;
  const first = hourAt(now);
  const limit = (plot) => {
    const y = plot.valToPos(maxAge, "age", true);
    if (y < plot.bbox.top) return;
    const context = plot.ctx;
    context.save();
    context.strokeStyle = c.alarm;
    context.lineWidth = window.devicePixelRatio;
    context.setLineDash([6, 4]);
    context.beginPath();
    context.moveTo(plot.bbox.left, y);
    context.lineTo(plot.bbox.left + plot.bbox.width, y);
    context.stroke();
    context.restore();
  };
  const label = (words) => {
    agesElement.setAttribute("aria-label", words.long);
    timesElement.setAttribute("aria-label", words.long);
  };
  const agesData = ({ data }) => [data[0], data[1]];
  const timesData = ({ data }) => [data[0], data[2], data[3]];
  const ages = large(agesElement, agesData(first), {
    height: 150,
    now: clock,
    scale: "age",
    values: duration,
    series: [{}, { scale: "age", stroke: c.age, fill: c.area, width: 1.5, spanGaps: true, points: { size: 4 } }],
    hooks: { draw: [limit] },
    least: maxAge,
  });
  const timesPlot = large(timesElement, timesData(first), {
    height: 130,
    now: clock,
    scale: "took",
    values: took,
    series: [
      {},
      { scale: "took", fill: c.time, stroke: c.time, width: 0, paths: bars(), points: { show: false } },
      { scale: "took", stroke: c.alarm, width: 1.2, paths: bars(), points: { show: false } },
    ],
  });
  label(first.words);
  return {
    draw(later) {
      at = later;
      const next = hourAt(later);
      ages.setData(agesData(next));
      timesPlot.setData(timesData(next));
      label(next.words);
    },
    destroy() {
      ages.destroy();
      timesPlot.destroy();
    },
  };
}
