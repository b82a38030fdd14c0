// Everything is started here.

startTheme(repaintCharts);
startSorting();
startTrials();
let stage = null;

function startLate() {
  // Plotly and the videos' bytes stand after this script: tables sort before they are read.
  startPrinting(startCharts(showTrial));
  stage = startStage();
  const table = byId("prompt-table");
  if (stage && table) {
    table.addEventListener("click", (event) => {
      const row = event.target.closest("tbody tr");
      if (!row || !report.prompts.some((prompt) => prompt.key === `after-${row.dataset.key}`)) return;
      stage.choose(`after-${row.dataset.key}`);
      byId("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
      byId("stage").focus({ preventScroll: true });
    });
  }
  document.documentElement.dataset.ready = "yes";
}

if (document.readyState === "loading") addEventListener("DOMContentLoaded", startLate);
else startLate();

if (byId("copy")) {
  byId("copy").addEventListener("click", () => {
    const done = () => { byId("copy").textContent = translate("copied"); };
    if (navigator.clipboard) navigator.clipboard.writeText(byId("command").textContent).then(done, () => selectCommand());
    else selectCommand();
  });
}

function selectCommand() {
  getSelection().selectAllChildren(byId("command"));
}
