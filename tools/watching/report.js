// What a reader can do with the charts: point at them for figures, and look closer at a part of the run.
// The page is whole without this script.
"use strict";

const SIZE = 1000; // of a chart's own coordinates, as charts.py has it
const formats = {
  plain: { value: (v) => v.toPrecision(5), tick: (v) => String(Number(v.toPrecision(6))) },
  lr: { value: (v) => v.toExponential(2), tick: (v) => Number(v.toPrecision(3)).toExponential() },
  percent: { value: (v) => (100 * v).toFixed(1) + " %", tick: (v) => Number((100 * v).toPrecision(4)) + " %" },
  tokens: { value: shorten, tick: shorten },
};
const charts = [];

function shorten(value) {
  for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= scale) return Number((value / scale).toPrecision(5)) + suffix;
  }
  return String(Number(value.toPrecision(5)));
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function niceTicks([low, high], count = 5) {
  const scale = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = [1, 2, 5, 10].map((factor) => factor * scale).find((size) => size >= (high - low) / count * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high * (1 + 1e-12); index++) ticks.push(index * step);
  return ticks;
}

function element(name, className, parent) {
  const made = document.createElement(name);
  made.className = className;
  parent.append(made);
  return made;
}

// Every chart shows the same part of the run; null is all of it.
function zoomTo(interval) {
  for (const chart of charts) chart.zoom(interval);
  wholeButton.hidden = interval === null;
}

const wholeButton = element("button", "whole", document.querySelector(".charts") || document.body);
wholeButton.type = "button";
wholeButton.textContent = "Show the whole run";
wholeButton.hidden = true;
wholeButton.addEventListener("click", () => zoomTo(null));

function prepare(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const logChoice = figure.querySelector(".log-choice");
  const views = [...plot.querySelectorAll(".view")].map((view) => ({
    view, scale: view.classList.contains("log") ? "log" : "linear", whole: view.innerHTML,
  }));
  const selection = element("div", "selection", plot);
  const cursor = element("div", "cursor", plot);
  const box = element("div", "tooltip", plot);
  box.setAttribute("role", "status");
  const told = data.series.filter((series) => series.x.length);
  const guide = told.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  const dots = told.map((series) => {
    const dot = element("i", "dot", plot);
    dot.style.background = `var(--series-${series.color})`;
    return dot;
  });
  let across = data.x; // the part of the run that is shown
  let scales = data.scales; // and the span of values that is shown of it
  let at = null; // where the cursor stands
  let dragFrom = null;

  const share = (value, [low, high], scale) => scale === "log"
    ? (value > 0 ? Math.log(value / low) / Math.log(high / low) : -1)
    : (value - low) / (high - low);
  const scaleNow = () => (logChoice && logChoice.checked ? "log" : "linear");
  const left = (x) => share(x, across, "linear");

  // The span of values in the part shown; its rarest hundredth at either end is not worth the room.
  function valuesShown(part) {
    const all = [], certain = [];
    for (const series of told) {
      series.x.forEach((x, index) => {
        const y = series.y[index];
        if (x < part[0] || x > part[1] || y === null) return;
        all.push(y);
        if (series.look !== "faint") certain.push(y);
      });
    }
    if (all.length < 2) return null;
    all.sort((a, b) => a - b);
    const rare = Math.floor(all.length / 100);
    const low = Math.min(all[rare], ...certain), high = Math.max(all[all.length - 1 - rare], ...certain);
    const margin = 0.06 * (high - low) || Math.abs(high) * 0.05 || 1;
    return [low - margin, high + margin];
  }

  function zoom(interval) {
    const values = interval && valuesShown(interval);
    across = interval || data.x;
    scales = { ...data.scales };
    hide();
    for (const { view, scale, whole } of views) {
      view.innerHTML = whole;
      if (!interval) continue;
      const shown = values && (scale === "linear" || values[0] > 0) ? values : data.scales[scale];
      scales[scale] = shown;
      redraw(view, scale, shown);
    }
  }

  function redraw(view, scale, shown) {
    const x = (value) => SIZE * share(value, data.x, "linear");
    const y = (value) => SIZE - SIZE * share(value, data.scales[scale], scale);
    const svg = view.querySelector("svg");
    svg.setAttribute("viewBox", [x(across[0]), y(shown[1]), x(across[1]) - x(across[0]), y(shown[0]) - y(shown[1])].join(" "));
    for (const old of view.querySelectorAll(".x, .y")) old.remove();
    const ticks = niceTicks(shown);
    svg.querySelector(".grid").setAttribute("d", ticks.map((tick) => `M${x(across[0])} ${y(tick)}H${x(across[1])}`).join(""));
    for (const tick of ticks) {
      const label = element("span", "y", view);
      label.style.top = 100 - 100 * share(tick, shown, scale) + "%";
      label.textContent = formats[data.format].tick(tick);
    }
    for (const tick of niceTicks(across)) {
      const label = element("span", "x", view);
      label.style.left = 100 * left(tick) + "%";
      label.textContent = shorten(tick);
    }
  }

  function hide() {
    at = null;
    plot.classList.remove("pointed");
  }

  function show(x) {
    at = x;
    const place = left(x), scale = scaleNow();
    plot.classList.add("pointed");
    cursor.style.left = 100 * place + "%";
    let iteration = "-";
    const lines = [];
    told.forEach((series, number) => {
      const index = nearest(series.x, x), value = series.y[index];
      // A curve that has no point near the cursor has nothing to say here.
      const far = Math.abs(series.x[index] - x) > (across[1] - across[0]) * (series.look === "points" ? 0.03 : 0.06);
      const up = value === null ? -1 : share(value, scales[scale], scale);
      dots[number].hidden = far || up < 0 || up > 1 || series.look === "faint";
      if (series === guide) iteration = series.iteration[index].toLocaleString("en");
      if (far || value === null) return;
      dots[number].style.left = 100 * left(series.x[index]) + "%";
      dots[number].style.top = 100 - 100 * up + "%";
      lines.push([series, formats[data.format].value(value)]);
    });
    box.replaceChildren();
    const tokens = data.xLabel === "iteration" ? "" : `${shorten(x)} tokens, `;
    element("b", "", box).textContent = `${tokens}iteration ${iteration}`;
    for (const [series, text] of lines) {
      const line = element("span", "", box);
      element("i", "", line).style.background = `var(--series-${series.color})`;
      line.append(`${series.label} ${text}`);
    }
    box.style.left = place > 0.5 ? "auto" : `calc(${100 * place}% + 12px)`;
    box.style.right = place > 0.5 ? `calc(${100 - 100 * place}% + 12px)` : "auto";
  }

  function valueUnder(event) {
    const frame = plot.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width));
    return across[0] + place * (across[1] - across[0]);
  }

  function closer(factor) {
    const width = (across[1] - across[0]) * factor;
    const middle = at === null ? (across[0] + across[1]) / 2 : at;
    const low = Math.max(data.x[0], Math.min(middle - width / 2, data.x[1] - width));
    zoomTo(width >= data.x[1] - data.x[0] ? null : [low, low + width]);
  }

  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return; // a finger reads, and scrolls the page
    dragFrom = valueUnder(event);
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    const x = valueUnder(event);
    show(guide.x[nearest(guide.x, x)]);
    if (dragFrom === null) return;
    const [low, high] = [Math.min(dragFrom, x), Math.max(dragFrom, x)];
    selection.style.left = 100 * left(low) + "%";
    selection.style.width = 100 * (left(high) - left(low)) + "%";
    plot.classList.add("selecting");
  });
  plot.addEventListener("pointerup", (event) => {
    const x = valueUnder(event);
    if (dragFrom !== null && Math.abs(left(x) - left(dragFrom)) > 0.01) {
      zoomTo([Math.min(dragFrom, x), Math.max(dragFrom, x)]);
    }
    dragFrom = null;
    plot.classList.remove("selecting");
  });
  plot.addEventListener("pointercancel", () => {
    dragFrom = null;
    plot.classList.remove("selecting");
  });
  plot.addEventListener("dblclick", () => zoomTo(null));
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const kept = guide.x.filter((x) => x >= across[0] && x <= across[1]);
    const last = kept.length - 1;
    if (event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    const index = at === null ? last : nearest(kept, at);
    const stride = event.shiftKey ? Math.ceil(last / 20) : 1;
    const next = { ArrowLeft: index - stride, ArrowRight: index + stride, Home: 0, End: last }[event.key];
    if (next !== undefined) show(kept[Math.min(last, Math.max(0, next))]);
    else if (event.key === "+" || event.key === "=") closer(0.5);
    else if (event.key === "-") closer(2);
    else if (event.key === "Escape") zoomTo(null);
    else return;
    event.preventDefault();
  });
  if (logChoice) logChoice.addEventListener("change", () => at !== null && show(at));
  charts.push({ zoom });
}

document.querySelectorAll("figure.chart").forEach(prepare);
