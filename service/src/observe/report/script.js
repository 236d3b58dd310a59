"use strict";
// Shows the figures under the pointer, or under the arrow keys. The plots are complete without it.
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const tip = document.getElementById("tip");
  const node = (svg, name, attributes) => {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const time = (us) =>
    us < 1e3 ? us + " µs" : us < 1e6 ? (us / 1e3).toFixed(1) + " ms" : (us / 1e6).toFixed(2) + " s";
  const figure = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
  // The last moment that is not behind `at`.
  const before = (times, at) => {
    let low = 0, high = times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= at) low = middle + 1; else high = middle;
    }
    return Math.max(low - 1, 0);
  };
  const nearest = (times, at) => {
    const index = before(times, at);
    const next = times[index + 1];
    return next !== undefined && next - at < at - times[index] ? index + 1 : index;
  };
  let ready = 0;
  for (const plot of plots) {
    const svg = document.querySelector('svg[data-plot="' + plot.id + '"]');
    if (!svg) continue;
    const cursor = node(svg, "g", { class: "cursor", visibility: "hidden" });
    const line = node(svg, "line", { y1: plot.top, y2: plot.bottom });
    cursor.append(line);
    svg.append(cursor);
    const guide = plot.series.reduce((a, b) => (b.times.length > a.times.length ? b : a)).times;
    let index = 0;
    const hide = () => {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    };
    const show = (at, clientX, clientY) => {
      index = nearest(guide, at);
      const moment = guide[index];
      const x = plot.left + (moment / plot.end) * (plot.right - plot.left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = "after " + time(moment);
      tip.append(head);
      for (const [number, series] of plot.series.entries()) {
        const row = document.createElement("div");
        const label = document.createElement("span");
        const value = document.createElement("span");
        const swatch = document.createElement("i");
        swatch.className = "swatch c" + (number % 8);
        label.append(swatch, series.label);
        value.textContent = figure(series.values[nearest(series.times, moment)]) + " " + plot.unit;
        row.append(label, value);
        tip.append(row);
      }
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      const left = clientX + 16 + box.width > innerWidth ? clientX - box.width - 16 : clientX + 16;
      tip.style.left = Math.max(left, 4) + "px";
      tip.style.top = Math.min(Math.max(clientY + 16, 4), innerHeight - box.height - 4) + "px";
    };
    const atPointer = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const share = Math.min(Math.max((x - plot.left) / (plot.right - plot.left), 0), 1);
      show(share * plot.end, event.clientX, event.clientY);
    };
    const atIndex = () => {
      const box = svg.getBoundingClientRect();
      const moment = guide[index];
      const x = plot.left + (moment / plot.end) * (plot.right - plot.left);
      show(moment, box.left + (x / svg.viewBox.baseVal.width) * box.width, box.top + 20);
    };
    svg.addEventListener("pointermove", atPointer);
    svg.addEventListener("pointerdown", atPointer);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") return hide();
      if (step === undefined) return;
      event.preventDefault();
      index = Math.min(Math.max(index + step, 0), guide.length - 1);
      atIndex();
    });
    ready += 1;
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  // Paper cannot be opened.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((box) => { box.open = true; }));
  document.documentElement.dataset.plots = String(ready);
})();
