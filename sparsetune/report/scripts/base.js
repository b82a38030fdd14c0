// What every other script uses: the report's data, its words, and short names for the document.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);

function byId(id) {
  return document.getElementById(id);
}

function translate(key, values) {
  return report.words[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const waiting = [];

function later(work) {
  // One piece of heavy work at a time, when the page has nothing to answer: reading Plotly in and drawing with it.
  waiting.push(work);
  if (waiting.length === 1) soon(nextWork);
}

function nextWork() {
  try {
    waiting[0]();
  } finally {
    waiting.shift();
    if (waiting.length > 0) soon(nextWork);
  }
}

function soon(work) {
  if ("requestIdleCallback" in window) requestIdleCallback(work, { timeout: 400 });
  else setTimeout(work, 30);
}

function onView(target, work) {
  // Work that costs something is done when it is about to be seen.
  if (!("IntersectionObserver" in window)) {
    setTimeout(work, 0);
    return;
  }
  const observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      observer.disconnect();
      work();
    }
  }, { rootMargin: "300px" });
  observer.observe(target);
}
