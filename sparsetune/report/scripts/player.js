// The players: dense, sparse and difference are all painted from one decoded frame of one video, the side-by-side
// one, so they can't fall out of step.

class Player {
  constructor(canvases, onFrame, onState) {
    this.canvases = canvases;
    this.onFrame = onFrame;
    this.onState = onState;
    this.clip = null;
    this.frame = 0;
    this.painted = null;
    this.wipeAt = 0.5;
    this.wanted = null;
    this.video = element("video", { className: "source", muted: true, loop: true, playsInline: true, preload: "auto" });
    this.video.setAttribute("aria-hidden", "true");
    this.video.tabIndex = -1;
    document.body.append(this.video);
    this.video.addEventListener("seeked", () => this.settled());
    this.video.addEventListener("loadeddata", () => this.settled());
    for (const name of ["play", "pause"]) this.video.addEventListener(name, () => this.onState(!this.video.paused));
    this.follow();
  }

  load(clip, frame) {
    const rate = this.video.playbackRate;
    this.video.pause();
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.clip = clip;
    this.frame = Math.min(frame, clip.count - 1);
    this.painted = null;
    if (!clip.clip) {
      this.video.removeAttribute("src");
      this.onFrame(this.frame);
      return;
    }
    this.wanted = this.frame;
    this.video.src = clip.href || (this.url = inlineVideo(clip.key));
    this.video.playbackRate = rate;
    this.size();
    this.onFrame(this.frame);
  }

  size() {
    const [, , width, height] = this.clip.boxes[0];
    for (const canvas of Object.values(this.canvases)) {
      canvas.width = width;
      canvas.height = height;
    }
  }

  seek(frame) {
    const target = Math.max(0, Math.min(this.clip.count - 1, frame));
    this.video.pause();
    if (!this.clip.clip) {
      this.frame = target;
      this.onFrame(target);
      return;
    }
    this.wanted = target;
    this.frame = target;
    this.onFrame(target);
    // While one seek is on its way only the last wish is kept: a dragged slider asks faster than a decoder answers.
    if (!this.video.seeking && this.video.readyState > 0) this.go();
  }

  go() {
    const time = (this.wanted + 0.5) / this.clip.fps; // the middle of the frame: no rounding lands in its neighbour
    this.going = this.wanted;
    this.video.currentTime = time;
  }

  settled() {
    if (this.wanted === null) return;
    if (this.going !== this.wanted) {
      this.go();
      return;
    }
    this.paint(this.wanted);
    this.wanted = this.going = null;
  }

  toggle() {
    if (!this.clip || !this.clip.clip) return;
    if (this.video.paused) this.video.play().catch(() => this.onState(false));
    else {
      this.video.pause();
      this.seek(this.frame); // stop on the frame that is shown
    }
  }

  follow() {
    // Where the browser tells which frame it presents, that one is painted; elsewhere the clock has to do.
    if ("requestVideoFrameCallback" in HTMLVideoElement.prototype) {
      const onPresented = (_, presented) => {
        this.video.requestVideoFrameCallback(onPresented);
        this.presented(Math.round(presented.mediaTime * this.clip.fps));
      };
      this.video.requestVideoFrameCallback(onPresented);
    } else {
      const onTick = () => {
        requestAnimationFrame(onTick);
        if (this.clip && !this.video.paused) this.presented(Math.floor(this.video.currentTime * this.clip.fps + 1e-3));
      };
      requestAnimationFrame(onTick);
    }
  }

  presented(frame) {
    if (this.video.paused || this.wanted !== null) return;
    this.frame = Math.min(frame, this.clip.count - 1);
    this.paint(this.frame);
    this.onFrame(this.frame);
  }

  paint(frame) {
    const [dense, sparse] = this.clip.boxes;
    const { dense: left, sparse: right, difference, wipe } = this.canvases;
    this.copy(left, dense);
    this.copy(right, sparse);
    paintDifference(difference, left, right, report.gain);
    paintWipe(wipe, left, right, this.wipeAt);
    this.painted = frame;
    for (const canvas of Object.values(this.canvases)) canvas.dataset.frame = frame;
  }

  copy(canvas, [x, y, width, height]) {
    canvas.getContext("2d").drawImage(this.video, x, y, width, height, 0, 0, width, height);
  }

  wipe(at) {
    this.wipeAt = at;
    if (this.painted !== null) paintWipe(this.canvases.wipe, this.canvases.dense, this.canvases.sparse, at);
  }
}

function paintDifference(canvas, dense, sparse, gain) {
  // By blending alone: no pixel is read back, which a page from disk may not do with a video beside it.
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "copy";
  context.drawImage(dense, 0, 0);
  context.globalCompositeOperation = "difference";
  context.drawImage(sparse, 0, 0);
  context.globalCompositeOperation = "lighter";
  for (let times = 1; times < gain; times *= 2) context.drawImage(canvas, 0, 0);
  context.globalCompositeOperation = "source-over";
}

function paintWipe(canvas, dense, sparse, at) {
  const context = canvas.getContext("2d");
  const x = Math.round(at * canvas.width);
  context.drawImage(dense, 0, 0);
  if (x < canvas.width) {
    context.drawImage(sparse, x, 0, canvas.width - x, canvas.height, x, 0, canvas.width - x, canvas.height);
  }
  context.fillStyle = "#fff";
  context.fillRect(x - 1, 0, 2, canvas.height);
}

function inlineVideo(key) {
  const text = atob(byId(`clip-${key}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
  return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
}
