from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lightning import Trainer

from datamodules.run_points_data import RunPointsDataModule
from modules.rlhf.proxy_points import fit_proxy_points, gaussian_kde
from modules.rlhf.proxy_study import ProxyPointStudy


def cloud(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, 1.0, (count, dimensions))


def peak(points: np.ndarray, at: tuple[float, ...], curvature: float = 1.0) -> np.ndarray:
    return 0.6 - curvature * np.square(points - np.array(at)).sum(-1)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_density_equals_scipys(dimensions):
    stats = pytest.importorskip("scipy.stats")
    points = np.random.default_rng(1).normal(size=(60, dimensions)) @ np.random.default_rng(2).normal(
        size=(dimensions, dimensions)
    )
    where = np.random.default_rng(3).normal(size=(500, dimensions))
    np.testing.assert_allclose(gaussian_kde(points)(where), stats.gaussian_kde(points.T)(where.T), rtol=1e-9)


def test_density_in_the_result_is_that_of_the_unscaled_points():
    stats = pytest.importorskip("scipy.stats")
    points = cloud(40, 2) * np.array([0.2, 30.0]) + np.array([0.1, -5.0])
    fit = fit_proxy_points(points, points[:, 0])
    np.testing.assert_allclose(fit.density, stats.gaussian_kde(points.T)(points.T), rtol=1e-9)


@pytest.mark.parametrize(("dimensions", "at"), [(1, (0.4,)), (2, (0.35, 0.6)), (3, (0.3, 0.5, 0.7))])
@pytest.mark.parametrize("weights", ["kde", "uniform"])
def test_the_peak_of_a_polynomial_is_found(dimensions, at, weights):
    points = cloud(150, dimensions)
    fit = fit_proxy_points(points, peak(points, at), degree=2, ridge=0.0, weights=weights, reach=0.6)
    np.testing.assert_allclose(fit.theta, at, atol=2e-5)
    assert fit.score == pytest.approx(0.6, abs=1e-8)
    assert fit.error < 1e-8
    np.testing.assert_allclose(fit.surface(points), peak(points, at), atol=1e-8)
    assert fit.degree == 2


def test_the_surface_is_weighted_least_squares():
    """Against numpy's polyfit, whose weights multiply residuals before they are squared."""
    points, generator = cloud(50, 1), np.random.default_rng(4)
    scores = np.sin(5 * points[:, 0]) + 0.1 * generator.normal(size=50)
    fit = fit_proxy_points(points, scores, degree=4, ridge=0.0)
    expected = np.polynomial.Polynomial.fit(points[:, 0], scores, 4, w=np.sqrt(fit.density))
    where = np.linspace(points.min(), points.max(), 30)
    np.testing.assert_allclose(fit.surface(where[:, None]), expected(where), atol=1e-9)
    uniform = fit_proxy_points(points, scores, degree=4, ridge=0.0, weights="uniform")
    assert np.abs(uniform.surface(where[:, None]) - expected(where)).max() > 1e-4


def test_leave_one_out_error_by_leaving_out():
    points, generator = cloud(30, 2), np.random.default_rng(5)
    scores = peak(points, (0.3, 0.4)) + 0.05 * generator.normal(size=30)
    fit = fit_proxy_points(points, scores, degree=2, ridge=0.0, weights="uniform")

    def design(where: np.ndarray) -> np.ndarray:
        x, y = where.T
        return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)

    residuals = []
    for left_out in range(30):
        rest = np.arange(30) != left_out
        coefficients = np.linalg.lstsq(design(points[rest]), scores[rest], rcond=None)[0]
        residuals.append(scores[left_out] - design(points[left_out][None]) @ coefficients)
    assert fit.error == pytest.approx(float(np.sqrt(np.mean(np.square(residuals)))), rel=1e-9)


def test_the_degree_follows_the_data():
    points = cloud(200, 2)
    noise = 0.02 * np.random.default_rng(6).normal(size=200)
    assert fit_proxy_points(points, peak(points, (0.3, 0.4)) + noise, weights="uniform").degree <= 3
    wavy = np.sin(7 * points[:, 0]) * np.cos(5 * points[:, 1])
    assert fit_proxy_points(points, wavy).degree >= 7
    few = cloud(13, 2)
    assert fit_proxy_points(few, peak(few, (0.3, 0.4))).degree == 2  # 6 coefficients, two points each
    assert fit_proxy_points(cloud(60, 1), cloud(60, 1)[:, 0] ** 2).degree <= 10


def test_the_paper_degree_fits_and_a_ridge_tames_it():
    points = cloud(150, 2)
    scores = peak(points, (0.4, 0.5)) + 0.02 * np.random.default_rng(7).normal(size=150)
    fit = fit_proxy_points(points, scores, degree=10)
    assert fit.degree == 10
    assert np.abs(fit_proxy_points(points, scores, degree=10, ridge=0.1).theta - [0.4, 0.5]).max() < 0.15
    assert np.isfinite(fit.theta).all()


def test_the_maximum_stays_near_the_data():
    """A rising surface has its greatest value in a corner where no run has been."""
    along = np.linspace(0, 1, 60)
    points = np.stack([along, 1 - along], -1) + 0.05 * cloud(60, 2)
    for weights in ("kde", "uniform"):
        fit = fit_proxy_points(points, points.sum(-1) ** 2, degree=2, weights=weights, reach=0.2)
        half = np.ptp(points, axis=0) / 2
        assert np.linalg.norm((points - fit.theta) / half, axis=-1).min() <= 0.2 + 1e-6
        assert fit.eligible(fit.theta[None]).all()
        assert not fit.eligible(np.array([[1.0, 1.0], [0.0, 0.0], [5.0, 5.0]])).any()
    alone = fit_proxy_points(points, points.sum(-1) ** 2, degree=2, weights="uniform", reach=3.0)
    assert alone.theta.tolist() == pytest.approx(points.max(0).tolist())  # without the limit: the corner


def test_thin_regions_are_left_out():
    crowd = 0.3 + 0.2 * cloud(100, 1)
    points = np.concatenate([crowd, [[1.0]]])  # a single run went far, with a lucky score
    scores = np.append(peak(crowd, (0.4,)), 2.0)
    assert fit_proxy_points(points, scores, degree=3, density_floor=0.05).theta[0] < 0.6
    assert fit_proxy_points(points, scores, degree=3, density_floor=0.0).theta[0] > 0.9


def test_correlated_rewards_move_the_joint_maximum_from_the_single_ones():
    generator = np.random.default_rng(8)
    first = generator.uniform(0, 1, 200)
    points = np.stack([first, 0.8 * first + 0.4 * generator.uniform(0, 1, 200)], -1)
    fit = fit_proxy_points(points, peak(points, (0.5, 0.8)), degree=2, ridge=0.0)
    np.testing.assert_allclose(fit.theta, [0.5, 0.8], atol=1e-3)
    assert abs(fit.alone[0] - 0.5) > 0.05
    single = fit_proxy_points(points[:, :1], peak(points, (0.5, 0.8)), degree=2, ridge=0.0)
    np.testing.assert_allclose(fit.alone[0], single.theta[0], atol=1e-4)
    assert single.alone.tolist() == single.theta.tolist()


def test_the_bootstrap_covers_the_peak_and_draws_whole_runs():
    points = cloud(120, 2)
    scores = peak(points, (0.4, 0.5)) + 0.05 * np.random.default_rng(9).normal(size=120)
    fit = fit_proxy_points(points, scores, degree=2, bootstrap=40, seed=1)
    assert (fit.low < [0.4, 0.5]).all()
    assert (fit.high > [0.4, 0.5]).all()
    assert (fit.high - fit.low < 0.3).all()
    again = fit_proxy_points(points, scores, degree=2, bootstrap=40, seed=1)
    assert again.low.tolist() == fit.low.tolist()
    runs = np.repeat(np.arange(6), 20)
    shifted = scores + 0.2 * (runs % 2) * (points[:, 0] - 0.5)  # runs disagree
    by_run = fit_proxy_points(points, shifted, degree=2, bootstrap=40, groups=runs)
    by_point = fit_proxy_points(points, shifted, degree=2, bootstrap=40)
    assert by_run.high[0] - by_run.low[0] > by_point.high[0] - by_point.low[0]


def test_what_a_file_holds():
    points = cloud(40, 2)
    fit = fit_proxy_points(points, peak(points, (0.4, 0.5)), degree=2, bootstrap=10)
    content = json.loads(json.dumps(fit.plain(["meteor", "intent"])))
    assert content["thresholds"]["intent"] == pytest.approx(0.5, abs=1e-2)
    assert content["points"] == 40
    assert content["degree"] == 2
    assert set(content) == {"thresholds", "score", "points", "degree", "error", "alone", "interval"}
    assert "interval" not in fit_proxy_points(points, peak(points, (0.4, 0.5))).plain(["a", "b"])


GOOD = cloud(20, 2)


@pytest.mark.parametrize(
    ("points", "scores", "options", "message"),
    [
        (GOOD[:5], GOOD[:5, 0], {}, "5 points are too few for 2 rewards"),
        (GOOD, GOOD[:, :1], {}, "want points"),
        (cloud(40, 4), cloud(40, 1)[:, 0], {}, "1 to 3 rewards"),
        (GOOD, np.full(20, np.nan), {}, "finite"),
        (GOOD * [1.0, 0.0], GOOD[:, 0], {}, "reward 1 has one value, 0, in all points"),
        (GOOD[:, :1] * [1.0, 2.0], GOOD[:, 0], {}, "exactly together"),
        (GOOD, GOOD[:, 0], {"degree": 5}, "21 coefficients for 20 points"),
        (GOOD, GOOD[:, 0], {"degree": 0}, "degree >= 1"),
        (GOOD, GOOD[:, 0], {"weights": "density"}, "weights: must be kde or uniform"),
        (GOOD, GOOD[:, 0], {"ridge": -1.0}, "ridge"),
        (GOOD, GOOD[:, 0], {"reach": 0.0}, "reach"),
    ],
)
def test_bad_data_are_named(points, scores, options, message):
    with pytest.raises(ValueError, match=message):
        fit_proxy_points(points, scores, **options)


def test_rewards_that_move_together_can_be_fitted_without_a_density():
    points = GOOD[:, :1] * [1.0, 2.0]
    fit = fit_proxy_points(points, peak(points[:, :1], (0.5,)), degree=2, weights="uniform")
    assert fit.theta[0] == pytest.approx(0.5, abs=0.15)


# -- from run folders to a file of thresholds --
def write_runs(folder: Path, runs: int = 3, evaluations: int = 30) -> None:
    """Runs with validation rows among training rows, the last line cut short."""
    generator = np.random.default_rng(11)
    for run in range(runs):
        path = folder / f"ppo-{run}" / "run-001" / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        rows = []
        for step in range(evaluations):
            x, y = generator.uniform(0, 1, 2)
            rows.append({"step": step, "reward/met": 0.0, "val/reward/met": 9.0, "val/reward/int": 9.0})  # no score
            score = float(peak(np.array([x, y]), (0.35, 0.6)))
            rows.append({"step": step, "val/score": score, "val/reward/met": x, "val/reward/int": y})
        rows.append(dict(rows[-1]))  # a flushed row, repeated
        rows.append({"step": 99, "val/score": float("nan"), "val/reward/met": 1.0, "val/reward/int": 1.0})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 100, "val/sc', encoding="utf-8")


def points_of(folder: Path, **options) -> RunPointsDataModule:
    given = {"runs": [str(folder / "ppo-*" / "run-*")], "components": ["met", "int"]}
    return RunPointsDataModule(**{**given, **options})


def test_points_are_read_from_metrics_files(tmp_path):
    write_runs(tmp_path)
    data = points_of(tmp_path, components=["int", "met"])
    data.setup("test")
    (batch,) = list(data.test_dataloader())
    assert batch["points"].shape == (90, 2)
    assert batch["components"] == ["int", "met"]
    assert batch["run"].bincount().tolist() == [30, 30, 30]
    expected = peak(batch["points"].flip(-1).numpy(), (0.35, 0.6))
    np.testing.assert_allclose(batch["scores"].numpy(), expected)
    later = points_of(tmp_path, skip=10)
    later.setup("test")
    (batch,) = list(later.test_dataloader())
    assert batch["run"].bincount().tolist() == [20, 20, 20]


@pytest.mark.parametrize("columns", [["met", "int"], ["met"]], ids=["surface", "curve"])
def test_a_study_writes_thresholds_figures_and_metrics(tmp_path, columns):
    write_runs(tmp_path)
    out = tmp_path / "found" / "thresholds.json"
    study = ProxyPointStudy(out=str(out), degree=2, bootstrap=5)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path / "run",
    )
    (figures,) = trainer.test(study, datamodule=points_of(tmp_path, components=columns), verbose=False)
    content = json.loads(out.read_text())
    assert list(content["thresholds"]) == sorted(columns)
    assert content["points"] == 90
    assert content["score"] == pytest.approx(figures["test/score"], rel=1e-6)
    for name in columns:
        assert content["thresholds"][name] == pytest.approx(figures[f"test/theta_{name}"], rel=1e-6)
    if len(columns) == 2:
        assert content["thresholds"]["met"] == pytest.approx(0.35, abs=1e-3)
        assert content["thresholds"]["int"] == pytest.approx(0.6, abs=1e-3)
    picture = (tmp_path / "run" / "proxy_points.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_study_does_not_train(tmp_path):
    with pytest.raises(ValueError, match="use the verb test"):
        ProxyPointStudy().setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": ["nowhere/*"]}, r"'nowhere/\*' matches no folder"),
        ({"components": ["met", "intent"]}, "has no metric 'val/reward/intent'; the nearest is 'val/reward/int'"),
        ({"score": "reward/met"}, "has no row with all of"),
        ({"skip": 500}, "skip: 500 leaves no point"),
    ],
)
def test_missing_runs_and_metrics_are_named(tmp_path, options, message):
    write_runs(tmp_path)
    if options.get("runs") is None and "score" in options:
        for path in tmp_path.glob("*/*/metrics.jsonl"):
            path.write_text('{"step": 1, "reward/met": 1.0}\n{"val/reward/met": 1.0, "val/reward/int": 2.0}\n')
    with pytest.raises(ValueError, match=message):
        points_of(tmp_path, **options).setup("test")


def test_bad_lines_and_settings_are_named(tmp_path):
    write_runs(tmp_path)
    (tmp_path / "ppo-1" / "run-001" / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match="line 2 must be a JSON object"):
        points_of(tmp_path).setup("test")
    for options in ({"runs": []}, {"components": []}, {"components": ["a", "a"]}, {"skip": -1}):
        with pytest.raises(ValueError, match="RunPointsDataModule"):
            points_of(tmp_path, **options)
