"use strict";
// Read values off the curves: a line at the step nearest to the pointer, and what each curve says there.
const readings = JSON.parse(document.getElementById("readings").textContent);
const tip = document.getElementById("tip");
const hidden = (run) => document.getElementById("show-" + run)?.checked === false;

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function write(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : value.toLocaleString("en", { maximumSignificantDigits: 6 });
}

function row(className, run, ...cells) {
  const line = tip.appendChild(document.createElement("div"));
  line.className = className;
  if (run !== null) line.style.setProperty("--own", "var(--run-" + (run % Number(tip.dataset.colours)) + ")");
  for (const cell of cells) line.appendChild(document.createElement("span")).textContent = cell;
}

for (const plot of document.querySelectorAll(".plot")) {
  const data = readings[plot.id], line = plot.querySelector(".at");
  const leave = () => { tip.hidden = line.hidden = true; };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const part = ((event.clientX - box.left) / box.width - data.left) / (data.right - data.left);
    const curves = data.series.filter((each) => !hidden(each.run));
    if (part < 0 || part > 1 || curves.length === 0) return leave();
    const wanted = data.from + part * (data.to - data.from);
    const found = curves.map((each) => nearest(each.x, wanted));
    const at = curves.map((each, i) => each.x[found[i]]);
    const x = at.reduce((best, each) => Math.abs(each - wanted) < Math.abs(best - wanted) ? each : best);
    line.hidden = tip.hidden = false;
    line.style.left = 100 * (data.left + (x - data.from) / (data.to - data.from) * (data.right - data.left)) + "%";
    tip.replaceChildren();
    row("head", null, data.unit + " " + Math.round(x).toLocaleString("en"));
    const near = (data.to - data.from) / 60;
    curves.forEach((each, i) => {
      const far = Math.abs(at[i] - x) > near ? " (at " + Math.round(at[i]).toLocaleString("en") + ")" : "";
      row("value", each.run, each.name + far, write(each.y[found[i]]));
    });
    for (const mark of data.marks) if (Math.abs(mark.x - wanted) < near && !hidden(mark.run)) row("mark", mark.run, mark.text);
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
  });
}
