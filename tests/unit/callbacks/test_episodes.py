"""EpisodeReport: rates with intervals, film strips, transcripts that nothing can hide mark-up in, several loggers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from callbacks.episodes import EpisodeReport, _any_glyph, draw_rates, film_strip, plain_text
from callbacks.text_samples import plain_markdown
from modules.assurance.intervals import wilson_interval
from modules.contracts.episodes import EpisodeSample, ReportsEpisodes

image = pytest.importorskip("matplotlib.image", reason="needs the extra 'rci'")

RATES = {"click-test": {"direct": (4, 10), "rci": (10, 10)}, "enter-text": {"direct": (0, 10)}}
EVIL = "<script>alert(1)</script>\n# head\n[x](javascript:1) ![i](http://a/b.png)\n\n    code\n| a | b |\n|---|---|\n"


def png(height: int, width: int, colour: tuple[float, float, float]) -> bytes:
    stream = io.BytesIO()
    image.imsave(stream, np.full((height, width, 3), colour, dtype=np.float32), format="png")
    return stream.getvalue()


RED, BLUE = png(21, 16, (1.0, 0.0, 0.0)), png(21, 16, (0.0, 0.0, 1.0))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(image.imread(io.BytesIO(data), format="png"))[..., :3]


class Clicker(LightningModule):
    """Reports what it is given."""

    def __init__(self, samples: Sequence[EpisodeSample], rates: Any = RATES) -> None:
        super().__init__()
        self.samples, self.rates, self.asked = list(samples), rates, 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def episode_rates(self) -> Any:
        return self.rates

    def episode_samples(self) -> Sequence[EpisodeSample]:
        self.asked += 1
        return self.samples


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, Any, int]]]:
    """What TensorBoard writers get: by kind, (tag, value, step)."""
    found: dict[str, list[tuple[str, Any, int]]] = {"image": [], "text": [], "figure": []}

    def recorder(kind: str) -> Any:
        return lambda self, tag, value, step, **options: found[kind].append((tag, value, step))

    for kind in found:
        monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.add_{kind}", recorder(kind))
    return found


def quiet(folder: Path, callback: EpisodeReport, **options: Any) -> Trainer:
    options = {"logger": TensorBoardLogger(folder, name="", version=""), **options}
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, callbacks=[callback], **options,
    )  # fmt: skip


def loader() -> Any:
    return DataLoader(torch.zeros(1, 1))  # pyright: ignore[reportArgumentType]


def evaluate(folder: Path, module: Clicker, callback: EpisodeReport, **options: Any) -> None:
    quiet(folder, callback, **options).test(module, loader(), verbose=False)


def test_a_test_writes_rates_films_and_transcripts(tmp_path, shown):
    samples = [
        EpisodeSample("click-test: solved", "goal: <b>\nclickxpath //a[1]", (RED, BLUE)),
        EpisodeSample("no film", "nothing"),
        EpisodeSample("second film", "b", (BLUE,)),
        EpisodeSample("third film", "c", (RED,)),
    ]
    module = Clicker(samples)
    assert isinstance(module, ReportsEpisodes)
    evaluate(tmp_path, module, EpisodeReport(films=2, transcripts=3, frame_height=42))
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert pictures == {"test_success.png", "test_film_1.png", "test_film_2.png"}
    texts = {path.name: path.read_text() for path in (tmp_path / "transcripts").iterdir()}
    assert texts == {
        "1.txt": "click-test: solved\n\ngoal: <b>\nclickxpath //a[1]\n",
        "2.txt": "no film\n\nnothing\n",
        "3.txt": "second film\n\nb\n",
    }
    assert [tag for tag, _, _ in shown["figure"]] == ["test/success"]
    assert [tag for tag, _, _ in shown["image"]] == ["test/film_1", "test/film_2"]
    assert np.array_equal(shown["image"][0][1], pixels((tmp_path / "figures" / "test_film_1.png").read_bytes()))
    assert [tag for tag, _, _ in shown["text"]] == [f"test/transcript_{n}" for n in (1, 2, 3)]
    assert shown["text"][0][1] == plain_markdown("click-test: solved\n\ngoal: <b>\nclickxpath //a[1]")


def test_validations_report_at_their_steps_and_not_in_the_sanity_check(tmp_path, shown):
    module = Clicker([EpisodeSample("t", "x", (RED,))])
    trainer = quiet(
        tmp_path, EpisodeReport(), max_steps=2, val_check_interval=1, num_sanity_val_steps=1, log_every_n_steps=1
    )
    batches = DataLoader(torch.zeros(2, 1))  # pyright: ignore[reportArgumentType]
    trainer.fit(module, batches, loader())
    assert [(tag, step) for tag, _, step in shown["image"]] == [("val/film_1", 1), ("val/film_1", 2)]
    assert [(tag, step) for tag, _, step in shown["text"]] == [("val/transcript_1", 1), ("val/transcript_1", 2)]
    assert module.asked == 2
    assert (tmp_path / "figures" / "val_success.png").is_file()


def test_real_writers_take_everything_from_several_loggers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path / name, name="", version="") for name in ("a", "b")]
    loggers.insert(1, CSVLogger(tmp_path / "c", name="", version=""))  # pyright: ignore[reportArgumentType]
    evaluate(tmp_path, Clicker([EpisodeSample("t", EVIL, (RED,))]), EpisodeReport(), logger=loggers)
    for name in ("a", "b"):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert set(events.Tags()["images"]) == {"test/success", "test/film_1"}
        tag = "test/transcript_1/text_summary"
        assert events.Tensors(tag)[0].tensor_proto.string_val[0].decode() == plain_markdown(f"t\n\n{EVIL}")
    assert (tmp_path / "a" / "transcripts" / "1.txt").is_file()  # the run's folder is the first logger's


@pytest.mark.parametrize("rates", [{}, {"a": {}}, {"a": {"direct": (0, 0)}}])
def test_nothing_to_report_writes_nothing(tmp_path, rates, shown):
    evaluate(tmp_path, Clicker([], rates), EpisodeReport(), logger=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert shown == {"image": [], "text": [], "figure": []}


def test_zero_counts_switch_parts_off(tmp_path):
    evaluate(tmp_path, Clicker([EpisodeSample("t", "x", (RED,))]), EpisodeReport(0, 0), logger=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["test_success.png"]


def test_a_later_evaluation_leaves_no_older_episode_behind(tmp_path):
    module = Clicker([EpisodeSample(str(n), "x", (RED,)) for n in range(3)])
    evaluate(tmp_path, module, EpisodeReport(films=3), logger=False)
    (tmp_path / "transcripts" / "mine.txt").write_text("kept")
    module.samples = module.samples[:1]
    evaluate(tmp_path, module, EpisodeReport(films=3), logger=False)
    assert {path.name for path in (tmp_path / "transcripts").iterdir()} == {"1.txt", "mine.txt"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"test_success.png", "test_film_1.png"}


def test_other_ranks_are_asked_and_write_nothing(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    module = Clicker([EpisodeSample("t", "x", (RED,))])
    evaluate(tmp_path, module, EpisodeReport(), logger=False)
    assert module.asked == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="films and transcripts must be >= 0, got -1 and 8"):
        EpisodeReport(-1)
    with pytest.raises(ValueError, match="frame_height must be >= 16, got 15"):
        EpisodeReport(frame_height=15)

    class Mute(Clicker):
        episode_samples = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="EpisodeReport: Mute reports no episodes"):
        evaluate(tmp_path, Mute([]), EpisodeReport(), logger=False)


# -- drawing --
def test_bars_and_whiskers_stand_at_the_rates_and_their_intervals():
    from matplotlib.container import BarContainer

    axes = draw_rates(RATES).axes[0]
    widths = [[bar.get_width() for bar in series] for series in axes.containers if isinstance(series, BarContainer)]
    assert widths == [[0.4, 0.0], [1.0]]
    found = [segment[:, 0].tolist() for line in axes.collections for segment in line.get_segments()]
    for (low, high), pair in zip(found, ((4, 10), (0, 10), (10, 10)), strict=True):
        assert (low, high) == pytest.approx(wilson_interval(*pair), abs=1e-12)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["click-test", "enter-text"]
    assert [t.get_text() for t in axes.figure.legends[0].get_texts()] == ["direct (4 of 20)", "rci (10 of 10)"]


def test_more_successes_than_episodes_is_an_error():
    with pytest.raises(ValueError, match="got 3 of 2"):
        draw_rates({"a": {"direct": (3, 2)}})


@pytest.mark.parametrize("name", [r"$\frac{$", "$x$ $", "漢字", "a\nb", "_hidden"])
def test_names_are_not_read_as_formulas(name):
    figure = draw_rates({name: {name: (1, 2)}})
    assert film_strip(EpisodeSample(name * 50, "", (RED,)), 32).startswith(b"\x89PNG")
    with _any_glyph():
        figure.savefig(io.BytesIO(), format="png")


def share(strip: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(strip - np.array(colour)).max(-1) < 0.02).sum())


def test_a_strip_shows_every_frame_in_order_at_its_height():
    strip = pixels(film_strip(EpisodeSample("t", "", (RED, BLUE, RED)), 84))
    inside = strip[strip.shape[0] - 40]  # a row through the only row of frames
    red, blue = (np.flatnonzero((inside == colour).all(-1)) for colour in ((1, 0, 0), (0, 0, 1)))
    assert len(blue) == pytest.approx(64, abs=3)
    assert len(red) == pytest.approx(128, abs=6)
    assert red[0] < blue[0] < blue[-1] < red[-1]
    column = strip[:, red[len(red) // 4]]
    assert (column == (1, 0, 0)).all(-1).sum() == pytest.approx(84, abs=3)


def test_long_episodes_go_on_in_the_next_row():
    one, two = (pixels(film_strip(EpisodeSample("t", "", (RED,) * count), 42)) for count in (6, 7))
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] - one.shape[0] == pytest.approx(42 + 22, abs=2)
    assert share(two, (1, 0, 0)) == pytest.approx(share(one, (1, 0, 0)) * 7 / 6, rel=0.1)


@pytest.mark.parametrize("broken", [b"", b"GIF89a", RED[:40], RED[:-60]])
def test_a_frame_that_is_no_image_leaves_its_place_empty(broken):
    alone = share(pixels(film_strip(EpisodeSample("t", "", (RED, RED)), 42)), (1, 0, 0))
    with_gap = share(pixels(film_strip(EpisodeSample("t", "", (RED, broken)), 42)), (1, 0, 0))
    assert with_gap == pytest.approx(alone / 2, rel=0.05)
    assert film_strip(EpisodeSample("t", "", (broken,)), 42).startswith(b"\x89PNG")


def test_grey_images_and_images_with_an_alpha_channel_are_drawn():
    pil = pytest.importorskip("PIL.Image")
    for mode, colour, expected in (("L", 0, (0, 0, 0)), ("RGBA", (0, 0, 255, 255), (0, 0, 1))):
        stream = io.BytesIO()
        pil.new(mode, (16, 21), colour).save(stream, format="png")
        strip = pixels(film_strip(EpisodeSample("t", "", (stream.getvalue(),)), 42))
        assert share(strip, expected) > 0.8 * 42 * 32


# -- untrusted text --
class Seen(HTMLParser):
    """What a browser shows of HTML, and the tags in it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", set[str]()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")  # inside TensorBoard, at import
@settings(deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("<>&#[]()!*_`|\\-+=~:./\"' \n\t1a;"), st.characters()), max_size=60))
@example(EVIL)
@example("&lt;b&gt; &#60;i&#62; <!-- x --> <?php ?> <![CDATA[x]]>")
@example("1. a\n2. b\n- c\n> d\n===\n---\n```\nx\n```\n[a]: http://b\n<http://c>\n\n    indented")
@example("a\r<script>\rb\x0b<b>\x0c<i>\x85\u2028# x\x02\x03klzzwxh:0000")
def test_tensorboard_shows_a_transcript_as_it_is(text):
    from tensorboard.plugin_util import markdown_to_safe_html

    seen = Seen()
    seen.feed(markdown_to_safe_html("x" + plain_markdown(text) + "x"))
    seen.close()
    assert seen.tags <= {"p", "br"}
    want = text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    want = "".join("\ufffd" if (c < " " and c != "\n") or "\x7f" <= c <= "\x9f" else c for c in want)
    assert seen.text.strip("\n").replace("\xa0", " ") == f"x{want}x".replace("\xa0", " ")


@settings(deadline=None)
@given(st.text())
@example("\x1b[2Jred\x07\x9b1m\ttab\r\nline\rend\ud800")
def test_files_hold_no_control_characters(text):
    plain = plain_text(text)
    assert all(c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") for c in plain)
    assert plain.encode("utf-8").decode() == plain
    assert plain_text(plain) == plain


def test_a_very_long_transcript_is_cut_in_tensorboard_alone(tmp_path, shown):
    evaluate(tmp_path, Clicker([EpisodeSample("t", "y" * 50_000)]), EpisodeReport())
    assert (tmp_path / "transcripts" / "1.txt").read_text() == "t\n\n" + "y" * 50_000 + "\n"
    text = shown["text"][0][1]
    assert 19_000 < text.count("y") < 20_001
    assert "cut here" in text
