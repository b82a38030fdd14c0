// The stage: the players with their one play bar, and the PSNR of every frame under them.

function startStage() {
  const stage = byId("stage");
  if (!stage || report.prompts.length === 0) return null;
  stage.hidden = false;
  const clips = new Map(report.prompts.map((prompt) => [prompt.key, prompt]));
  const canvases = Object.fromEntries(
    ["dense", "sparse", "difference", "wipe"].map((name) => [name, byId(`pane-${name}`)]));
  const player = new Player(canvases, onFrame, (playing) => {
    byId("play").textContent = playing ? "❚❚" : "▶";
    byId("play").setAttribute("aria-label", translate(playing ? "pause" : "play"));
  });
  let ready = false;

  function onFrame(frame) {
    const value = player.clip.frames[frame];
    byId("frame").value = frame;
    const label = value === undefined
      ? translate("frame", { frame, last: player.clip.count - 1 })
      : translate("frame_psnr", { frame, last: player.clip.count - 1, psnr: value.toFixed(2) });
    byId("frame-label").textContent = label;
    byId("frame").setAttribute("aria-valuetext", label);
    if (ready) markFrame(frame);
  }

  function choose(key, frame) {
    const clip = clips.get(key);
    if (!clip) return;
    byId("prompt").value = key;
    byId("frame").max = clip.count - 1;
    byId("panes").classList.toggle("hidden", !clip.clip);
    player.load(clip, frame ?? clip.worst ?? 0);
    if (ready) drawFrames(clip, player);
    markRow(clip);
  }

  listPrompts();
  bindBar(player);
  bindWipe(player);
  bindKeys(stage, player);
  byId("prompt").addEventListener("change", () => choose(byId("prompt").value));
  const worst = report.prompts.filter((one) => one.side === report.prompts[0].side)
    .reduce((low, one) => ((one.psnr ?? 0) < (low.psnr ?? 0) ? one : low));
  onView(stage, () => {
    choose(worst.key);
    later(() => {
      ready = true;
      drawFrames(player.clip, player);
    });
  });
  return { player, choose };
}

function listPrompts() {
  const sides = [...new Set(report.prompts.map((prompt) => prompt.side))];
  for (const side of sides) {
    const prompts = report.prompts.filter((prompt) => prompt.side === side);
    const options = prompts.map((prompt) => element("option", {
      value: prompt.key,
      textContent: `${prompt.index + 1}: ${prompt.prompt}` + (prompt.psnr === null ? "" : ` (${prompt.psnr.toFixed(2)} dB)`),
    }));
    if (sides.length > 1) byId("prompt").append(element("optgroup", { label: translate(side) }, ...options));
    else byId("prompt").append(...options);
  }
}

function bindBar(player) {
  byId("play").addEventListener("click", () => player.toggle());
  byId("previous").addEventListener("click", () => player.seek(player.frame - 1));
  byId("next").addEventListener("click", () => player.seek(player.frame + 1));
  byId("worst").addEventListener("click", () => player.seek(player.clip.worst ?? 0));
  byId("frame").addEventListener("input", () => player.seek(Number(byId("frame").value)));
  byId("speed").addEventListener("change", () => { player.video.playbackRate = Number(byId("speed").value); });
}

function bindWipe(player) {
  const slider = byId("wipe-at");
  const set = (mode) => {
    byId("panes").hidden = mode === "wipe";
    byId("wipe").hidden = mode !== "wipe";
    byId("mode-panes").setAttribute("aria-pressed", String(mode !== "wipe"));
    byId("mode-wipe").setAttribute("aria-pressed", String(mode === "wipe"));
  };
  byId("mode-panes").addEventListener("click", () => set("panes"));
  byId("mode-wipe").addEventListener("click", () => set("wipe"));
  slider.addEventListener("input", () => player.wipe(Number(slider.value) / 1000));
  const canvas = byId("pane-wipe");
  const drag = (event) => {
    if (event.type === "pointermove" && event.buttons === 0) return;
    const box = canvas.getBoundingClientRect();
    slider.value = Math.round(1000 * (event.clientX - box.left) / box.width);
    player.wipe(Number(slider.value) / 1000);
  };
  canvas.addEventListener("pointerdown", drag);
  canvas.addEventListener("pointermove", drag);
}

function bindKeys(stage, player) {
  const keys = {
    " ": () => player.toggle(),
    ArrowLeft: () => player.seek(player.frame - 1),
    ArrowRight: () => player.seek(player.frame + 1),
    Home: () => player.seek(0),
    End: () => player.seek(player.clip.count - 1),
    w: () => player.seek(player.clip.worst ?? 0),
  };
  stage.addEventListener("keydown", (event) => {
    // Lists and sliders have these keys for themselves, a button its space.
    const own = event.target.matches("select, input") || (event.key === " " && event.target.matches("button"));
    if (own || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  stage.tabIndex = 0;
}

function drawFrames(clip, player) {
  const target = byId("frames");
  if (clip.frames.length === 0) {
    target.parentElement.hidden = true;
    return;
  }
  target.parentElement.hidden = false;
  const hover = `${translate("frame_axis")} %{x}: %{y:.2f} dB<extra></extra>`;
  const line = {
    type: "scatter", mode: "lines+markers", meta: "main", name: translate("psnr_axis"), hovertemplate: hover,
    x: clip.frames.map((_, frame) => frame), y: clip.frames, marker: { size: 6 },
  };
  const worst = {
    type: "scatter", mode: "markers+text", meta: "bad", name: translate("worst_frame"), hovertemplate: hover,
    x: [clip.worst], y: [clip.frames[clip.worst]], text: [translate("worst_at", { frame: clip.worst })],
    // Beside the dotted line of the shown frame, towards the middle.
    textposition: clip.worst < clip.count / 2 ? "bottom right" : "bottom left", cliponaxis: false,
  };
  const low = clip.frames[clip.worst], high = Math.max(...clip.frames);
  const room = Math.max(high - low, 0.1); // for the worst frame's label under its mark
  const layout = {
    xaxis: { title: { text: translate("frame_axis") }, automargin: true, zeroline: false, range: [-0.5, clip.count - 0.5] },
    yaxis: {
      title: { text: translate("psnr_axis") }, automargin: true, zeroline: false, range: [low - 0.3 * room, high + 0.1 * room],
    },
    margin: { l: 64, r: 16, t: 8, b: 48 }, height: 220, showlegend: false, hovermode: "closest",
  };
  target.setAttribute("aria-label", translate("frames_alt", {
    count: clip.count, worst: clip.worst, low: low.toFixed(2), high: high.toFixed(2),
  }));
  const first = !drawn.has(target);
  draw(target, { data: [line, worst], layout });
  if (first) target.on("plotly_click", (event) => player.seek(event.points[0].x));
  markFrame(player.frame);
}

let marking = null;

function markFrame(frame) {
  // At most once a repaint of the screen: moving the mark costs Plotly some milliseconds.
  if (marking === null) {
    requestAnimationFrame(() => {
      const target = byId("frames");
      if (drawn.has(target)) {
        const line = { color: colour("accent"), width: 2, dash: "dot" };
        const shapes = [{ type: "line", x0: marking, x1: marking, yref: "paper", y0: 0, y1: 1, line }];
        drawn.get(target).layout.shapes = shapes; // so that a change of theme keeps it
        plotly().relayout(target, { shapes });
      }
      marking = null;
    });
  }
  marking = frame;
}

function markRow(clip) {
  for (const row of document.querySelectorAll("#prompt-table tbody tr")) {
    row.setAttribute("aria-selected", String(clip.side === "after" && Number(row.dataset.key) === clip.index));
  }
}
