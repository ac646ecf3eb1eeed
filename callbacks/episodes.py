"""How the episodes of an evaluation went: success rates with intervals, film strips and transcripts."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.figures import write_figure
from callbacks.text_samples import plain_markdown
from modules.assurance.intervals import wilson_interval
from modules.contracts.episodes import EpisodeSample, ReportsEpisodes
from modules.files import atomic_write
from modules.optional import require

_EXTRA = "rci"
_DPI = 100
_ACROSS = 6  # frames in a row of a film strip
_SHOWN = 20_000  # characters of a transcript in TensorBoard; the file holds all
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class EpisodeReport(Callback):
    """Reports the episodes of a module after each validation and test, on rank 0.

    Written to the run folder and to every TensorBoard logger: ``figures/<val|test>_success.png``, the share of
    successes of each group and series with 95 % Wilson intervals; ``figures/<val|test>_film_<n>.png``, the images of an
    episode side by side; ``transcripts/<n>.txt``, of the last evaluation. Transcripts are untrusted, so that
    TensorBoard gets them without any Markdown or HTML and files without control characters.

    Args:
        films: episodes to draw, at most.
        transcripts: episodes to write out, at most.
        frame_height: height of an image in a film strip, pixels.

    Raises:
        ValueError: a number out of range; at ``setup``: a module without episodes.
    """

    def __init__(self, films: int = 2, transcripts: int = 8, frame_height: int = 210) -> None:
        if films < 0 or transcripts < 0:
            raise ValueError(f"EpisodeReport: films and transcripts must be >= 0, got {films} and {transcripts}")
        if frame_height < 16:
            raise ValueError(f"EpisodeReport: frame_height must be >= 16, got {frame_height}")
        self.films, self.transcripts, self.frame_height = films, transcripts, frame_height
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ReportsEpisodes):
            raise ValueError(
                f"EpisodeReport: {type(pl_module).__name__} reports no episodes "
                "(it has no episode_rates and episode_samples); leave the callback out"
            )
        require("matplotlib.figure", extra=_EXTRA)  # not after hours of episodes
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf"):
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: Any, stage: str) -> None:
        reporting = cast(ReportsEpisodes, module)
        rates, samples = reporting.episode_rates(), list(reporting.episode_samples())  # may join ranks: on all of them
        if not trainer.is_global_zero:
            return
        figures = self._folder / "figures"
        if any(episodes for series in rates.values() for _, episodes in series.values()):
            figures.mkdir(parents=True, exist_ok=True)
            with _any_glyph():
                write_figure(trainer, figures, f"{stage}/success", draw_rates(rates))
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        step = trainer.global_step
        films = [sample for sample in samples if sample.frames][: self.films]
        for number, sample in enumerate(films, 1):
            png = film_strip(sample, self.frame_height)
            _write(figures / f"{stage}_film_{number}.png", png)
            for writer in writers:
                writer.add_image(f"{stage}/film_{number}", _decoded(png), step, dataformats="HWC")
        _forget(figures, f"{stage}_film_", ".png", len(films))
        for number, sample in enumerate(samples[: self.transcripts], 1):
            text = f"{_one_line(sample.title)}\n\n{plain_text(sample.transcript)}"
            _write(self._folder / "transcripts" / f"{number}.txt", (text.rstrip("\n") + "\n").encode())
            shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "\n(cut here; the file holds the rest)"
            for writer in writers:
                writer.add_text(f"{stage}/transcript_{number}", plain_markdown(shown), step)
        _forget(self._folder / "transcripts", "", ".txt", min(len(samples), self.transcripts))


# -- drawing --
def draw_rates(rates: Mapping[str, Mapping[str, tuple[int, int]]]) -> Any:
    """Share of successes as bars, a group of bars for each group and a colour for each series, with 95 % Wilson
    intervals.

    Args:
        rates: group -> series -> (successes, episodes); without episodes there is no bar.

    Returns:
        A matplotlib ``Figure``.

    Raises:
        ValueError: more successes than episodes.
    """
    groups, names = list(rates), list(dict.fromkeys(name for series in rates.values() for name in series))
    height = 0.8 / max(1, len(names))
    size = (7, 1.4 + max(1.0, 0.22 * len(groups) * (len(names) + 0.5)))
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    bars, labels = [], []
    for place, name in enumerate(names):
        found = [(row, *rates[group][name]) for row, group in enumerate(groups) if rates[group].get(name, (0, 0))[1]]
        if not found:
            continue
        rows = [row + (place - (len(names) - 1) / 2) * height for row, _, _ in found]
        shares = np.array([successes / episodes for _, successes, episodes in found])
        ends = np.array([wilson_interval(successes, episodes) for _, successes, episodes in found])
        # An interval's end may miss the rate by a rounding error, at 0 and 1.
        errors = np.maximum(0.0, np.stack([shares - ends[:, 0], ends[:, 1] - shares]))
        bars.append(
            axes.barh(rows, shares, height * 0.9, xerr=errors, ecolor="black", capsize=2, color=f"C{place % 10}")
        )
        total = [sum(column) for column in zip(*(pair[1:] for pair in found), strict=True)]
        labels.append(f"{_one_line(name)} ({total[0]} of {total[1]})")
    axes.set_yticks(range(len(groups)), [_one_line(group) for group in groups], parse_math=False)
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first group on top
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("success rate, 95 % interval")
    axes.grid(alpha=0.3, axis="x")
    legend = figure.legend(bars, labels, loc="outside upper center", ncols=min(3, max(1, len(bars))), fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def film_strip(sample: EpisodeSample, frame_height: int) -> bytes:
    """The frames of an episode side by side in rows, numbered from 0, as one PNG.

    A frame that is no PNG is an empty place. Frames are scaled to ``frame_height`` pixels, in the shape of the widest.
    """
    frames = [_decoded(frame) for frame in sample.frames]
    wide = max((one.shape[1] / one.shape[0] for one in frames if one is not None), default=1.0)
    across, down = min(_ACROSS, len(frames)), math.ceil(len(frames) / _ACROSS)
    frame, gap, head = (frame_height * wide / _DPI, frame_height / _DPI), 0.08, 0.22
    size = (across * (frame[0] + gap) + gap, down * (frame[1] + head) + head + gap)
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=size, dpi=_DPI)
    for number, picture in enumerate(frames):
        row, column = divmod(number, across)
        left, top = gap + column * (frame[0] + gap), head + row * (frame[1] + head) + head
        axes = figure.add_axes(
            (left / size[0], 1 - (top + frame[1]) / size[1], frame[0] / size[0], frame[1] / size[1]),
            xticks=[], yticks=[],
        )  # fmt: skip
        axes.set_title(f"{number}" if picture is not None else f"{number}: no image", fontsize=8, pad=2)
        if picture is not None:
            axes.imshow(picture)
    room = max(12, int(size[0] * 14))  # about as many small letters fit
    title = _one_line(sample.title)
    title = title if len(title) <= room else title[: room - 3] + "..."
    figure.text(gap / size[0], 1 - 0.04 / size[1], title, fontsize=8, va="top", parse_math=False)
    stream = io.BytesIO()
    with _any_glyph():
        figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def _decoded(png: bytes) -> Any:
    """``[height, width, 3]`` float32 in [0, 1], or ``None``: not a PNG."""
    image = require("matplotlib.image", extra=_EXTRA)
    try:
        pixels = np.asarray(image.imread(io.BytesIO(png), format="png"))
    except (OSError, SyntaxError, ValueError):  # what PIL raises on broken files
        return None
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255)
    return pixels[..., :3].astype(np.float32)


@contextlib.contextmanager
def _any_glyph() -> Iterator[None]:
    """Titles hold what pages wrote: a character that the font lacks is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


# -- text and files --
def plain_text(text: str) -> str:
    """Lines ended by ``\\n``, other control characters replaced (a terminal may act on them), tabs kept."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _one_line(text: str) -> str:
    return " ".join(plain_text(text).split())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(content)


def _forget(folder: Path, prefix: str, suffix: str, kept: int) -> None:
    """Remove what an earlier evaluation numbered higher than this one."""
    for path in folder.glob(f"{prefix}*{suffix}"):
        number = path.name.removeprefix(prefix).removesuffix(suffix)
        if number.isdecimal() and int(number) > kept:
            path.unlink()
