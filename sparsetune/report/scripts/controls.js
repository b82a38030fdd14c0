// What the players are controlled with: one play bar, a divider to drag, and keys.

function startPlayer(onFrame) {
  const canvases = Object.fromEntries(
    ["dense", "sparse", "difference", "wipe"].map((name) => [name, byId(`pane-${name}`)]));
  const player = new Player(canvases, (frame) => {
    showFrame(player.clip, frame);
    onFrame(frame);
  }, (playing) => {
    byId("play").textContent = playing ? "❚❚" : "▶";
    byId("play").setAttribute("aria-label", translate(playing ? "pause" : "play"));
  });
  bindBar(player);
  bindWipe(player);
  bindKeys(byId("stage"), player);
  return player;
}

function loadClip(player, clip, frame) {
  byId("frame").max = clip.count - 1;
  byId("panes").classList.toggle("hidden", !clip.clip);
  player.load(clip, frame ?? clip.worst ?? 0);
}

function showFrame(clip, frame) {
  const value = clip.frames[frame];
  const label = value === undefined
    ? translate("frame", { frame, last: clip.count - 1 })
    : translate("frame_psnr", { frame, last: clip.count - 1, psnr: value.toFixed(2) });
  byId("frame").value = frame;
  byId("frame-label").textContent = label;
  byId("frame").setAttribute("aria-valuetext", label);
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
