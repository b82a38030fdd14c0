// A trial's parameters, opened from any chart's point or from the list.

function showTrial(number) {
  const trial = report.trials[number];
  const panel = byId("trial");
  if (!trial || !panel) return;
  const list = (pairs) => element("dl", {}, ...pairs.map(([name, text]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text }))));
  panel.replaceChildren(
    element("h3", { textContent: trial.title }),
    list(trial.figures),
    element("h4", { textContent: translate("parameters") }),
    list(trial.params),
  );
  panel.dataset.number = number;
  for (const row of document.querySelectorAll("#trial-table tbody tr")) {
    row.setAttribute("aria-selected", String(row.dataset.key === String(number)));
  }
}

function startTrials() {
  const table = byId("trial-table");
  if (!table) return;
  table.addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (row) showTrial(Number(row.dataset.key));
  });
  if (report.best !== null) showTrial(report.best);
}
