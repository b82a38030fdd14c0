"""Output folder of an evaluation: result, report, videos and stills."""

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.evaluation.result import PromptRow
from sparsetune.files import atomic_path, check_replaceable
from sparsetune.video import save_png, side_by_side, write_video

if TYPE_CHECKING:
    from sparsetune.evaluation.prompt import Pair
    from sparsetune.models.runtime import RuntimeDescription

REPORT_TITLE = "# Sparse attention on "
_OURS = re.compile(r"prompt_\d+_((dense|sparse|compare)\.mp4|frame_\d+\.png)")


@dataclass(frozen=True)
class OutputFolder:
    """Names and writes the files of one evaluation; `stem` is the model family's name."""

    folder: Path
    stem: str
    tuned: bool
    fps: int

    @classmethod
    def of(cls, folder: Path | None, runtime: "RuntimeDescription", tuned: bool) -> "OutputFolder | None":
        """Check that files can be written and replaced, before anything is rendered; None without a folder."""
        if folder is None:
            return None
        outputs = cls(folder, runtime.family, tuned, runtime.settings.fps)
        check_replaceable(outputs.report_path, REPORT_TITLE)
        check_replaceable(outputs.result_path, '"schema_version"')
        probe = folder / ".sparsetune-writable"
        with atomic_path(probe):
            pass
        probe.unlink(missing_ok=True)
        return outputs

    @property
    def result_path(self) -> Path:
        return self.folder / f"{self.stem}_accuracy_{'tuned' if self.tuned else 'default'}.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.md"

    def write_videos(self, index: int, pair: "Pair", *, difference: bool) -> dict[str, Path]:
        """Write a prompt's videos `dense`, `sparse` and, side by side, `compare`."""
        paths = {kind: self._video_path(index, kind) for kind in ("dense", "sparse", "compare")}
        compare = side_by_side(pair.dense, pair.sparse, difference=difference)
        with ThreadPoolExecutor(len(paths)) as pool:  # each encoder is a process: three run at once
            videos = zip(paths.values(), (pair.dense, pair.sparse, compare), strict=True)
            encoding = [pool.submit(write_video, path, frames, self.fps) for path, frames in videos]
            for video in encoding:
                video.result()
        return paths

    def keep_videos(self, index: int, videos: Mapping[str, Path | bytes]) -> dict[str, Path]:
        """Return a prompt's video files by kind, after writing those whose contents a worker sent."""
        kept = {}
        for kind, video in videos.items():
            kept[kind] = video if isinstance(video, Path) else self._video_path(index, kind)
            if isinstance(video, bytes):
                with atomic_path(kept[kind]) as temporary:
                    temporary.write_bytes(video)
        return kept

    def _video_path(self, index: int, kind: str) -> Path:
        return self.folder / "videos" / f"prompt_{index}_{kind}.mp4"

    def remove_stale(self, written: Collection[Path]) -> None:
        """Remove stills, and videos where new ones were written, of an earlier evaluation."""
        kinds = {folder for folder in ("videos", "stills") if any(path.parent.name == folder for path in written)}
        for folder in sorted(kinds):
            for path in (self.folder / folder).glob("prompt_*"):
                if path not in written and _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def write_still(self, row: PromptRow, pair: "Pair") -> Path:
        """Write both sides and the difference of a prompt's worst frame, the only one of `pair`, as a PNG."""
        path = self.folder / "stills" / f"prompt_{row.index}_frame_{row.worst_frame}.png"
        save_png(path, side_by_side(pair.dense, pair.sparse, difference=True)[0])
        return path


def worst_and_median(rows: Sequence[PromptRow]) -> tuple[int, ...]:
    """Indices of the worst prompt by PSNR and of the lower median, without repetition; none without a PSNR."""
    ranked = sorted((row.psnr, row.index) for row in rows if row.psnr is not None)
    if not ranked:
        return ()
    return tuple(dict.fromkeys((ranked[0][1], ranked[(len(ranked) - 1) // 2][1])))
