// Charts: drawn by Plotly, which is read in when the first one is about to be seen.

const SYMBOLS = { main: "circle", second: "square", third: "circle", best: "star", muted: "x-thin-open", bad: "triangle-down" };
const SIZES = { best: 16, bad: 12, muted: 7 };
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"], displayModeBar: false };
const drawn = new Map();

function plotly() {
  if (!window.Plotly) {
    document.head.append(element("script", { textContent: byId("plotly-source").textContent }));
  }
  return window.Plotly;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function dressedTrace(trace) {
  if (!trace.meta) return trace;
  const paint = colour(`role-${trace.meta}`);
  if (trace.type === "bar") return { ...trace, marker: { color: paint } };
  const width = trace.meta === "muted" ? 1 : 2;
  const marker = { color: paint, symbol: SYMBOLS[trace.meta], size: SIZES[trace.meta] || 9, ...trace.marker };
  if (trace.meta === "muted") marker.line = { color: paint, width: 1.5 };
  return { ...trace, marker, line: { ...trace.line, color: paint, width } };
}

function dressedLayout(layout) {
  const grid = { gridcolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line") };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...layout.xaxis, ...grid },
    yaxis: { ...layout.yaxis, ...grid },
  };
}

function draw(target, figure) {
  drawn.set(target, figure);
  return plotly().react(target, figure.data.map(dressedTrace), dressedLayout(figure.layout), CONFIG);
}

function repaintCharts() {
  for (const [target, figure] of drawn) draw(target, figure);
}

function startCharts(onTrial) {
  const targets = [...document.querySelectorAll("[data-chart]")];
  const show = (target) => {
    if (drawn.has(target)) return;
    draw(target, report.charts[target.dataset.chart]);
    target.on("plotly_click", (event) => {
      const number = event.points[0].customdata;
      if (number !== undefined) onTrial(number);
    });
  };
  for (const target of targets) onView(target, () => later(() => show(target)));
  setTimeout(() => targets.forEach((target) => later(() => show(target))), 1500);  // none is empty when it is reached
  return () => targets.forEach(show);
}

function startPrinting(drawAll) {
  // Paper has one column and is light; charts keep the width they were drawn with unless resized.
  addEventListener("beforeprint", () => {
    drawAll();
    document.documentElement.dataset.screen = document.documentElement.dataset.theme || "auto";
    document.documentElement.dataset.theme = "light";
    repaintCharts();
    for (const target of drawn.keys()) plotly().relayout(target, { width: 680 });
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  addEventListener("afterprint", () => {
    setTheme(document.documentElement.dataset.screen || "auto");
    repaintCharts();
    for (const target of drawn.keys()) plotly().relayout(target, { autosize: true, width: null });
  });
}
