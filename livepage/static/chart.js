// The chart of reused and evaluated tokens and of model loads over time, drawn by uPlot.

import {clock, short} from "./format.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
let plot, shownIn, wasDark;

// stacked returns uPlot's series for bins [seconds, requests, reused, evaluated, unknown,
// generated, loads].
function stacked(bins, width, from, to) {
  const by = new Map(bins.map(b => [b[0], b]));
  const data = [[], [], [], [], []];
  for (let t = Math.ceil(from / width) * width; t <= to; t += width) {
    const [, , reused, evaluated, unknown, , loads] = by.get(t) || [t, 0, 0, 0, 0, 0, 0];
    data[0].push(t + width / 2);
    data[1].push(reused + evaluated + unknown);
    data[2].push(reused + evaluated);
    data[3].push(reused);
    data[4].push(loads);
  }
  return data;
}

export function chart(element, bins, width, from, to) {
  const data = stacked(bins, width, from, to);
  const size = {width: element.clientWidth, height: 160};
  if (plot && shownIn === element && wasDark === dark.matches) {
    if (plot.width !== size.width) plot.setSize(size);
    plot.setData(data, false);
    plot.setScale("x", {min: from, max: to});
    return;
  }
  if (plot) plot.destroy();
  shownIn = element;
  wasDark = dark.matches;
  const style = getComputedStyle(document.documentElement);
  const tone = name => style.getPropertyValue("--" + name).trim();
  const bars = (label, fill) => ({label, fill, width: 0, points: {show: false}, paths: uPlot.paths.bars({size: [.86, 40]})});
  const axis = {stroke: tone("soft"), grid: {stroke: tone("line"), width: 1}, ticks: {show: false}, font: "12px system-ui, 'DejaVu Sans', sans-serif"};
  plot = new uPlot({
    ...size,
    padding: [14, 8, 0, 0],
    cursor: {show: false},
    legend: {show: false},
    scales: {x: {time: false, auto: false}, y: {range: (u, min, max) => [0, Math.max(max, 100) * 1.05]}},
    axes: [
      {...axis, size: 24, space: 80, values: (u, list) => list.map(t => clock(t * 1000, false)), incrs: [60, 120, 300, 600, 1200]},
      {...axis, size: 46, space: 26, values: (u, list) => list.map(short)},
    ],
    series: [{}, bars("unknown", tone("none")), bars("evaluated", tone("cold")), bars("reused", tone("warm")), {show: false, scale: "loads"}],
    hooks: {
      draw: [u => { // a mark above the time of each load
        const c = u.ctx, scale = devicePixelRatio || 1;
        c.save();
        c.fillStyle = c.strokeStyle = tone("ink");
        c.font = `${11 * scale}px system-ui, 'DejaVu Sans', sans-serif`;
        c.textAlign = "center";
        u.data[4].forEach((n, i) => {
          const t = u.data[0][i];
          if (!n || t < u.scales.x.min || t > u.scales.x.max) return;
          const x = u.valToPos(t, "x", true), top = u.bbox.top;
          c.setLineDash([2 * scale, 3 * scale]);
          c.lineWidth = scale;
          c.beginPath();
          c.moveTo(x, top);
          c.lineTo(x, top + u.bbox.height);
          c.stroke();
          c.fillText("▾" + (n > 1 ? n : ""), x, top - 3 * scale);
        });
        c.restore();
      }],
    },
  }, data, element);
  plot.setScale("x", {min: from, max: to});
}
