// A blind review: one prompt after the other, then what is going to be stored, and storing it.

const count = report.prompts.length;
const saved = `sparsetune-review-${location.pathname}`;
let answers = report.prompts.map(() => ({ preferred: null, worse: {}, answered: false }));
let shown = 0;

function startReview() {
  startTheme(() => {});
  try {
    answers = JSON.parse(sessionStorage.getItem(saved)) ?? answers; // a page that was loaded again goes on
  } catch {
    // Nothing was kept.
  }
  const player = startPlayer(() => {});
  const show = (index) => {
    shown = index;
    byId("question").hidden = index === count;
    byId("summary").hidden = index !== count;
    if (index === count) showSummary(show);
    else {
      loadClip(player, report.prompts[index]);
      showQuestion();
      byId("stage").focus({ preventScroll: true });
    }
    scrollTo(0, 0);
  };
  byId("answers").addEventListener("change", keep);
  byId("answers").addEventListener("submit", (event) => {
    event.preventDefault();
    if (answers[shown].answered) show(shown + 1);
    else answer();
  });
  byId("rest").addEventListener("click", () => {
    for (const item of report.items) if (!answers[shown].worse[item]) choose(item, "none");
    keep();
  });
  byId("back").addEventListener("click", () => show(shown - 1));
  byId("skip").addEventListener("click", () => show(shown + 1));
  byId("to-prompts").addEventListener("click", () => show(count - 1));
  byId("submission").addEventListener("submit", (event) => {
    event.preventDefault();
    store();
  });
  bindKeysOfAnswers();
  show(0);
  document.documentElement.dataset.ready = "yes";
}

function bindKeysOfAnswers() {
  const keys = { a: "a", b: "b", n: "none" };
  document.addEventListener("keydown", (event) => {
    const isText = event.target.matches("input:not([type=radio], [type=range]), select");
    if (isText || byId("question").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in keys && !answers[shown].answered) {
      choose("preferred", keys[event.key]);
      keep();
    }
    // Within the form, and on a button, Enter does this or what the button says by itself.
    if (event.key === "Enter" && !event.target.closest("form, button, a")) byId("answers").requestSubmit();
  });
}

function choose(name, value) {
  const form = byId("answers");
  if (value) form.elements[name].value = value;
  else for (const radio of form.elements[name]) radio.checked = false;
}

function keep() {
  const form = byId("answers"), mine = answers[shown];
  mine.preferred = form.elements.preferred.value || null;
  for (const item of report.items) mine.worse[item] = form.elements[item].value || null;
  byId("missing").textContent = "";
  save();
}

function save() {
  try {
    sessionStorage.setItem(saved, JSON.stringify(answers));
  } catch {
    // Not kept, then.
  }
}

function answer() {
  const mine = answers[shown];
  if (!mine.preferred || report.items.some((item) => !mine.worse[item])) {
    byId("missing").textContent = translate("review_missing");
    return;
  }
  mine.answered = true;
  save();
  showQuestion();
  byId("go").focus();
}

function showQuestion() {
  const prompt = report.prompts[shown], mine = answers[shown];
  byId("progress").textContent = translate("review_progress", { number: shown + 1, count });
  byId("prompt-text").textContent = prompt.prompt;
  choose("preferred", mine.preferred);
  for (const item of report.items) choose(item, mine.worse[item]);
  byId("missing").textContent = "";
  byId("preference").disabled = mine.answered;
  byId("back").disabled = shown === 0;
  byId("skip").hidden = mine.answered;
  byId("rest").hidden = mine.answered;
  byId("go").textContent = translate(mine.answered ? "review_next" : "review_answer");
  byId("reveal").textContent = mine.answered ? translate(`review_sparse_${prompt.sparse}`) : "";
  for (const [pane, letter] of [["dense", "a"], ["sparse", "b"]]) { // the left pane and the right one
    const name = letter.toUpperCase() + (mine.answered ? ` (${sideOf(prompt, letter)})` : "");
    byId(`pane-${pane}`).setAttribute("aria-label", name);
    byId(`pane-${pane}`).nextElementSibling.textContent = name;
  }
}

function sideOf(prompt, letter) {
  // What an answer means once A and B are known.
  if (letter === "none") return translate("review_none");
  return translate(letter === prompt.sparse ? "review_sparse" : "review_dense");
}

function worseItems(index) {
  return report.items.filter((item) => answers[index].worse[item] === report.prompts[index].sparse);
}

function showSummary(show) {
  byId("rows").replaceChildren(...report.prompts.map((prompt, index) => {
    const button = element("button", { type: "button", textContent: String(index + 1) });
    button.addEventListener("click", () => show(index));
    const mine = answers[index];
    const worse = worseItems(index).map((item) => translate(`item.${item}`));
    const cells = mine.answered
      ? [sideOf(prompt, mine.preferred), worse.join(", ") || translate("review_nothing")]
      : [translate("review_skipped"), "–"];
    return element("tr", {}, element("td", {}, button, prompt.prompt),
      ...cells.map((textContent) => element("td", { textContent })));
  }));
  byId("verdict-text").textContent = verdict();
  byId("submit").disabled = !answers.some((one) => one.answered);
  byId("error").textContent = "";
  byId("summary").querySelector("h2").focus({ preventScroll: true });
}

function verdict() {
  const skipped = answers.filter((one) => !one.answered).length;
  if (skipped === count) return translate("review_unanswered");
  if (answers.some((one, index) => one.answered && worseItems(index).length > 0)) return translate("review_rejected");
  return skipped ? translate("review_incomplete", { skipped, count }) : translate("review_ok");
}

async function store() {
  const given = answers.map((one) => (one.answered ? { preferred: one.preferred, worse: one.worse } : null));
  const body = JSON.stringify({ reviewer: byId("reviewer").value, note: byId("note").value, answers: given });
  byId("submit").disabled = true;
  let problem;
  try {
    const response = await fetch("review", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    problem = response.ok ? "" : await response.text();
  } catch {
    problem = translate("review_gone");
  }
  byId("submit").disabled = false;
  byId("error").textContent = problem;
  if (problem) return;
  byId("summary").hidden = true;
  byId("stored").hidden = false;
  byId("stored-text").textContent = verdict();
  byId("stored").querySelector("h2").focus();
}

startReview();
