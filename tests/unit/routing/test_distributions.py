"""Distributions of coordinates: range, moments, what each mutation does, names in configs, the unit box."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.routing.distributions import (
    DISTRIBUTIONS,
    Cluster,
    Compression,
    Distribution,
    Expansion,
    Explosion,
    GaussianMixture,
    Grid,
    Implosion,
    Mixed,
    MixtureFile,
    Rotation,
    Uniform,
    make_distribution,
    uniform_noise,
    unit_box,
)

UNIFORM_STD = 1 / math.sqrt(12)


def draw(distribution: Distribution, count: int = 400, nodes: int = 50, seed: int = 3) -> torch.Tensor:
    return distribution.sample(count, nodes, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 5), nodes=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_any_shape_is_in_the_unit_square_and_repeatable(name, count, nodes, seed):
    one, two = (draw(make_distribution(name), count, nodes, seed) for _ in range(2))
    assert one.shape == (count, nodes, 2)
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    assert bool(((one >= 0) & (one <= 1)).all())  # NaN would fail


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_seeds_and_instances_differ(name):
    one, two = (draw(make_distribution(name), seed=seed) for seed in (1, 2))
    assert not torch.equal(one, two)
    assert len(torch.unique(one.flatten(1), dim=0)) == len(one)


# the lines of expansion and compression favour an axis (slopes are drawn, not angles), a mixture file node numbers
@pytest.mark.parametrize("name", sorted({*DISTRIBUTIONS} - {"expansion", "compression", "mixture_file"}))
def test_both_axes_have_the_same_law_and_node_numbers_too(name):
    locs = draw(make_distribution(name), 4000, 20).double()
    # instances are independent; nodes of one are not, so errors are judged by instance means
    axes = locs[..., 0].mean(1) - locs[..., 1].mean(1)
    assert abs(float(axes.mean())) < 5 * float(axes.std()) / math.sqrt(len(axes))
    halves = locs[:, :10].mean((1, 2)) - locs[:, 10:].mean((1, 2))
    assert abs(float(halves.mean())) < 5 * float(halves.std()) / math.sqrt(len(halves))


def test_noise_is_uniform_in_the_open_interval():
    noise = uniform_noise(1000, 100, torch.Generator().manual_seed(0))
    assert 0 < float(noise.min()) < float(noise.max()) < 1
    assert abs(float(noise.double().mean()) - 0.5) < 5 * UNIFORM_STD / math.sqrt(noise.numel())
    assert float(noise.std()) == pytest.approx(UNIFORM_STD, rel=0.01)
    assert torch.equal(Uniform()(noise, torch.Generator()), noise)


def test_gaussian_mixture_fills_the_box_and_shows_its_clusters():
    locs = draw(GaussianMixture(clusters=2, spread=50.0))
    assert torch.equal(locs.amin(1), torch.zeros(400, 2))
    assert torch.allclose(locs.amax(1), torch.ones(400, 2))
    nearest = torch.cdist(locs, locs).add(2 * torch.eye(50)).amin(-1).mean()
    spread_out = torch.cdist(draw(Uniform()), draw(Uniform())).add(2 * torch.eye(50)).amin(-1).mean()
    assert nearest < 0.6 * spread_out
    # one cluster: a scaled normal, so half of the nodes lie within 0.674 standard deviations of the mean
    single = draw(GaussianMixture(clusters=1), nodes=200)
    z = (single - single.mean(1, keepdim=True)) / single.std(1, keepdim=True)
    assert float((z.abs() < 0.6745).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_cluster_has_tight_clusters_and_background():
    locs = draw(Cluster(clusters=1, std=0.01, background=0.25), 1000)
    median = locs.median(1, keepdim=True).values
    near = ((locs - median).norm(dim=-1) < 0.06).float().mean()
    disc = math.pi * 0.06**2
    assert float(near) == pytest.approx(0.75 + 0.25 * disc, abs=0.01)
    assert bool(((median > 0.15) & (median < 0.85)).all())
    assert torch.equal(draw(Cluster(background=1.0)), draw(Uniform()))


def test_explosion_leaves_a_hole():
    generator = torch.Generator().manual_seed(3)
    noise = uniform_noise(500, 100, generator)
    locs = Explosion(rounds=1, smallest=0.3, largest=0.3)(noise, generator)
    moved = (locs != noise).any(-1)
    assert 0 < int(moved.sum()) < moved.numel()
    # the centre is the first draw after the noise
    again = torch.Generator().manual_seed(3)
    uniform_noise(500, 100, again)
    centre = torch.rand(500, 1, 2, generator=again)
    before, after = ((points - centre).norm(dim=-1) for points in (noise, locs))
    assert torch.equal(moved, before < 0.3)
    thrown = moved & (after >= 0.3 - 1e-6)
    ray = ((noise - centre) / before.unsqueeze(-1) * after.unsqueeze(-1) + centre - locs).norm(dim=-1)
    along = thrown & (ray < 1e-5)
    assert float(along.sum() / moved.sum()) > 0.5  # the others left the square and were put anywhere
    assert 0.3 < float(after[along].mean()) < 0.45


def test_implosion_draws_in():
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    noise = uniform_noise(500, 100, generator)
    locs = Implosion(rounds=1, smallest=0.3, largest=0.3)(noise, generator)
    uniform_noise(500, 100, again)
    centre = torch.rand(500, 1, 2, generator=again)
    before, after = ((points - centre).norm(dim=-1) for points in (noise, locs))
    inside = before < 0.3
    assert torch.equal(locs[~inside], noise[~inside])
    share = 1 - after[inside] / before[inside]
    assert -1e-5 < float(share.min()) < float(share.max()) < 0.3 + 1e-5
    # min(|N(0,1)|, 0.3) is 0.3 with probability P(|N| > 0.3)
    assert float((share > 0.299).float().mean()) == pytest.approx(math.erfc(0.3 / math.sqrt(2)), abs=0.03)
    assert int((Implosion(1, pull=1.0)(noise, generator) != noise).any(-1).sum()) > 0


def _tube(kind: type[Expansion] | type[Compression]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances to the line before and after [500, 100], and whether nodes were moved."""
    generator, again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noise = uniform_noise(500, 100, generator)
    locs = kind(rounds=1, smallest=0.2, largest=0.2)(noise, generator)
    uniform_noise(500, 100, again)
    torch.rand(500, 1, 1, generator=again)  # the width
    intercept, slope = torch.rand(500, 1, 2, generator=again).unbind(-1)
    slope = 3 * slope * torch.where(intercept < 0.5, 1.0, -1.0)
    before, after = (
        (slope * points[..., 0] - points[..., 1] + intercept).abs() / (slope**2 + 1).sqrt() for points in (noise, locs)
    )
    return before, after, (locs != noise).any(-1)


def test_expansion_empties_a_tube():
    before, after, moved = _tube(Expansion)
    assert float((moved == (before < 0.2)).float().mean()) > 0.9999
    assert float((after[moved] >= 0.2 - 1e-5).float().mean()) > 0.7  # the others left the square and were put anywhere


def test_compression_draws_to_a_line():
    before, after, moved = _tube(Compression)
    assert bool((before[moved] < 0.2 + 1e-5).all())
    stayed_inside = moved & (after <= before + 1e-5)
    assert float(stayed_inside.sum() / moved.sum()) > 0.9
    on_line = float((after[moved] < 1e-5).float().mean())
    assert on_line == pytest.approx(math.erfc(1 / math.sqrt(2)), abs=0.03)  # P(|N| > 1)


def test_rotation_turns_its_share_as_one_body():
    generator = torch.Generator().manual_seed(3)
    noise = uniform_noise(300, 40, generator)
    locs = Rotation(rounds=1, share=0.5)(noise, generator)
    moved = (locs != noise).any(-1)
    assert float(moved.float().mean()) == pytest.approx(0.5, abs=0.02)
    # for a rigid motion without reflection, w = e^(i angle) z + shift: differences of w over those of z are one number
    z, w = (torch.complex(*points.double().unbind(-1)) for points in (noise, locs))
    ratio = (w[:, :, None] - w[:, None]) / (z[:, :, None] - z[:, None] + torch.eye(40) * 9)
    pairs = moved[:, :, None] & moved[:, None] & ~torch.eye(40, dtype=torch.bool)
    turned = pairs & ((ratio.abs() - 1).abs() < 1e-4)
    assert 0.05 < float(turned.sum() / pairs.sum()) < 0.5  # the others left the square and were put anywhere
    angles = ratio.angle()
    for row, chosen in zip(angles, turned, strict=True):
        if int(chosen.sum()) > 20:  # a few pairs keep their distance by chance
            values = row[chosen]
            near = (torch.polar(torch.ones_like(values), values - values.median()).real > 0.999).double()
            assert float(near.mean()) > 0.8


def test_grid_fills_a_box_evenly():
    generator = torch.Generator().manual_seed(3)
    noise = uniform_noise(300, 200, generator)
    locs = Grid(rounds=1, smallest=0.3, largest=0.3)(noise, generator)
    moved = (locs != noise).any(-1)
    for points, rows in zip(locs, moved, strict=True):
        side = math.isqrt(int(rows.sum()))
        assert side**2 == int(rows.sum()) > 0
        for axis in (0, 1):
            values = points[rows][:, axis].sort().values.view(side, side)  # each of `side` lines holds `side` nodes
            assert torch.allclose(values, values[:, :1].expand_as(values), atol=1e-6)
            steps = values[1:, 0] - values[:-1, 0]
            assert torch.allclose(steps, torch.full_like(steps, 0.3 / (side - 1)), atol=1e-5)


def test_mutations_with_less_than_two_nodes_near_change_nothing():
    for kind in (Explosion, Implosion, Expansion, Compression, Rotation, Grid):
        assert torch.equal(draw(kind(), nodes=1), draw(Uniform(), nodes=1))


@pytest.mark.parametrize(("nodes", "side"), [(20, 0.35), (50, 0.46), (100, 0.57)])
def test_mixture_file_shrinks_as_measured(nodes, side):
    # methods/asp.md, section 4: coordinate std 0.07 to 0.13, mean side per instance 0.35 (n=20) to 0.57 (n=100)
    files = [draw(MixtureFile(), 10_000, nodes, seed) for seed in range(3)]
    for locs in files:
        assert (float(locs.min()), float(locs.max())) == (0, pytest.approx(1))  # over the whole set
        assert 0.06 < float(locs.std()) < 0.14
    sides = [float((locs.amax(1) - locs.amin(1)).amax(-1).mean()) for locs in files]
    assert sum(sides) / 3 == pytest.approx(side, abs=0.1)


def test_mixture_file_gives_each_node_number_one_component():
    locs = draw(MixtureFile(), 4000, 40, seed=1)
    by_number, error = locs.mean((0, 2)), locs.std((0, 2))
    assert float(by_number.std()) > 3 * float(error.max()) / math.sqrt(8000)  # means differ by node number
    assert float(error.max() / error.min()) > 1.2  # and so do deviations
    single = draw(MixtureFile(components=1), 4000, 40, seed=1)
    assert float(single.mean((0, 2)).std()) < 2 * float(single.std()) / math.sqrt(8000)


def test_mixed_draws_by_weight_per_instance():
    mixed = make_distribution({"uniform": 1, "gaussian_mixture(clusters=1)": 3})
    assert isinstance(mixed, Mixed)
    locs = draw(mixed, 4000)
    boxed = ((locs.amin(1) == 0).all(-1)).float().mean()  # Gaussian mixtures touch the box
    assert float(boxed) == pytest.approx(0.75, abs=0.03)
    assert str(mixed) == "0.25 uniform + 0.75 gaussian_mixture(clusters=1, spread=10.0)"


def test_unit_box():
    locs = draw(MixtureFile(), 50, 20).double() * 7 - 3
    boxed = unit_box(locs)
    assert boxed.dtype == torch.float64
    assert torch.allclose(boxed.amin(1), torch.zeros(50, 2, dtype=torch.float64))
    assert torch.allclose(boxed.amax((1, 2)), torch.ones(50, dtype=torch.float64))
    ratio = torch.cdist(locs, locs)[:, 0, 1:] / torch.cdist(boxed, boxed)[:, 0, 1:]  # shapes stay
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    assert torch.allclose(unit_box(boxed), boxed)
    assert torch.equal(unit_box(torch.full((2, 5, 2), 0.3)), torch.zeros(2, 5, 2))


def test_names_with_parameters():
    assert make_distribution(" gaussian_mixture( clusters = 5 , spread=3 ) ") == GaussianMixture(5, 3.0)
    assert make_distribution("uniform()") == Uniform()
    assert make_distribution("implosion(pull=None, rounds=2)") == Implosion(2)
    given_one = Grid(rounds=2)
    assert make_distribution(given_one) is given_one
    for name in DISTRIBUTIONS:
        distribution = make_distribution(name)
        assert distribution.name == name
        assert make_distribution(str(distribution)) == distribution


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "unknown name 'unifrom'; nearest: uniform"),
        ("", "must look like"),
        ("uniform(", "must look like"),
        (3, "must be a name or a mapping"),
        ({}, "one weight per part"),
        ({"uniform": 0.0}, "weight of uniform must be a finite number > 0"),
        ({"uniform": math.nan}, "weight of uniform must be a finite number > 0"),
        ("uniform(clusters=3)", "uniform has no parameter 'clusters'; known: none"),
        ("cluster(3)", "cluster has no parameter '3'; known: clusters, std, background"),
        ("cluster(clusters=2.5)", "clusters must be a whole number, got '2.5'"),
        ("cluster(std=__import__)", "std must be a number"),
        ("cluster(std=True)", "std must be a number"),
        ("cluster(clusters=0)", "cluster: clusters must be >= 1, got 0"),
        ("cluster(std=0)", "cluster: std must be > 0"),
        ("cluster(background=2)", "background must be >= 0 and <= 1, got 2"),
        ("gaussian_mixture(spread=-1)", "spread must be >= 0"),
        ("gaussian_mixture(clusters=0)", "clusters must be >= 1"),
        ("mixture_file(components=0)", "components must be >= 1"),
        ("explosion(rounds=0)", "rounds must be >= 1"),
        ("explosion(rate=0)", "rate must be > 0"),
        ("explosion(smallest=0.6)", "smallest must be > 0 and <= 0.5"),
        ("expansion(rate=-1)", "rate must be > 0"),
        ("grid(smallest=0.4)", "grid: smallest must be <= largest"),
        ("implosion(pull=2)", "pull must be > 0 and <= 1"),
        ("rotation(share=0)", "share must be > 0 and <= 1"),
    ],
)  # fmt: skip
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_distribution(spec)


def test_wrong_counts():
    for count, nodes in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="uniform: count and nodes must be >= 1"):
            draw(Uniform(), count, nodes)
