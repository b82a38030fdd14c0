// The stage: the players, a list of prompts to choose from, and the PSNR of every frame under them.

function startStage() {
  const stage = byId("stage");
  if (!stage || report.prompts.length === 0) return null;
  stage.hidden = false;
  const clips = new Map(report.prompts.map((prompt) => [prompt.key, prompt]));
  let ready = false;
  const player = startPlayer((frame) => { if (ready) markFrame(frame); });

  function choose(key, frame) {
    const clip = clips.get(key);
    if (!clip) return;
    byId("prompt").value = key;
    loadClip(player, clip, frame);
    if (ready) drawFrames(clip, player);
    markRow(clip);
  }

  listPrompts();
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
