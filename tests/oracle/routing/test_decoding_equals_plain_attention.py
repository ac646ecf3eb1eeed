"""The fused decoder and its written-out gradient against the attention model's equations in plain autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict

from datamodules.routing.problems import make_problem
from modules.networks.attention_solver import AttentionSolver, BatchNorm, InstanceNorm
from modules.routing import decoding
from modules.routing.decoding import Choice, beam_search, decode, rollout_seeds, uniforms
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings, exact_cost

PROBLEMS = ["tsp", "cvrp", "pctsp", "spctsp", "op", "sdvrp"]
SIZES = {"dim": 16, "heads": 4, "layers": 2, "hidden": 32}


def instances_of(problem, count=3, size=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    locs = torch.rand(count, problem.nodes(size), 2, generator=generator)
    made = problem.generate(locs, generator)
    made["index"] = torch.arange(count)
    return made.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)


def solver_of(problem, graph=True, norm="instance", dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return RoutingSolver(problem.spec, SolverSettings(**SIZES, norm=norm, graph_context=graph)).to(dtype)


def plain_log_likelihood(solver, problem, instances, routes):
    """Kool et al. 2019, appendix A, equation by equation, one instance and one rollout at a time."""
    net, heads = solver.network, solver.network.heads
    nodes = net.encode(instances["locs"], problem.customer_features(instances).to(instances["locs"].dtype))
    dim, width = nodes.shape[-1], nodes.shape[-1] // heads
    totals = []
    for b in range(nodes.shape[0]):
        h = nodes[b]
        keys, values, logit_keys = h @ net.keys.weight.T, h @ net.values.weight.T, h @ net.logit_keys.weight.T
        for p in range(routes.shape[1]):
            state = problem.begin(instances[b : b + 1], 1)
            total = h.new_zeros(())
            for step in range(routes.shape[2]):
                if not problem.spec.closed and bool(problem.finished(state).all()):
                    break
                if problem.spec.closed and step == 0:
                    query = net.query_start
                else:
                    query = net.query_last.weight @ h[int(state["current"])]
                    if net.query_first is not None:
                        query = query + net.query_first.weight @ h[int(routes[b, p, 0])]
                if net.query_graph is not None:
                    query = query + net.query_graph.weight @ h.mean(0)
                context = problem.context(state)
                if context is not None:
                    query = query + context[0, 0].to(h.dtype) @ net.query_context
                allowed = state["allowed"][0, 0]
                glimpses = []
                for i in range(heads):
                    part = slice(i * width, (i + 1) * width)
                    u = keys[:, part] @ query[part] / math.sqrt(width)
                    glimpses.append(u.masked_fill(~allowed, -math.inf).softmax(0) @ values[:, part])
                glimpse = net.out.weight @ torch.cat(glimpses)
                logits = 10.0 * torch.tanh(logit_keys @ glimpse / math.sqrt(dim))
                total = total + logits.masked_fill(~allowed, -math.inf).log_softmax(0)[routes[b, p, step]]
                problem.step(state, routes[b : b + 1, p : p + 1, step])
            totals.append(total)
    return torch.stack(totals).view(nodes.shape[0], -1)


@pytest.mark.parametrize("fold", [0, 1000], ids=["heads", "folded"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_likelihoods_and_gradients_equal_plain_autograd(name, graph, fold, monkeypatch):
    monkeypatch.setattr(decoding, "_FOLD_BELOW", fold)
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)  # one instance at a time: chunks are put together again
    problem = make_problem(name)
    solver = solver_of(problem, graph)
    instances = instances_of(problem, size=20 if name != "tsp" else 6, count=2)
    seeds = rollout_seeds(5, instances["index"], 2)
    routes, sampled = decode(problem, instances, solver.tables(problem, instances), 2, Choice(seeds=seeds))
    problem.check(instances, routes)
    weights = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    again = decode(problem, instances, solver.tables(problem, instances), 2, Choice(seeds=seeds))
    assert torch.equal(again[0], routes)
    for likelihood in (sampled, solver.log_likelihood(problem, instances, routes)):
        plain = plain_log_likelihood(solver, problem, instances, routes)
        torch.testing.assert_close(likelihood, plain, rtol=1e-9, atol=1e-9)
        parameters = dict(solver.named_parameters())
        ours = torch.autograd.grad((weights * likelihood).sum(), list(parameters.values()))
        theirs = torch.autograd.grad((weights * plain).sum(), list(parameters.values()))
        for key, mine, other in zip(parameters, ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_sampled_likelihood_equals_scored_routes(name):
    problem = make_problem(name)
    solver = solver_of(problem, dtype=torch.float32)
    instances = instances_of(problem, count=4, size=20, dtype=torch.float32)
    with torch.no_grad():
        routes, sampled = solver.rollout(problem, instances, starts=False, seed=3)
        torch.testing.assert_close(sampled, solver.log_likelihood(problem, instances, routes), rtol=0, atol=2e-5)


def test_four_nodes_probabilities_and_exact_policy_gradient():
    """All 24 tours: their probabilities add up to 1, and REINFORCE averages to the gradient of the expected cost."""
    problem = make_problem("tsp")
    solver = solver_of(problem)
    one = instances_of(problem, count=1, size=4)
    tours = torch.tensor(list(itertools.permutations(range(4)))).unsqueeze(0)
    likelihood = solver.log_likelihood(problem, one, tours)
    cost = problem.cost(one, tours)
    probability = likelihood.exp()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-12)
    parameters = list(solver.parameters())
    exact = torch.autograd.grad((probability * cost).sum(), parameters, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass runs once"):
        torch.autograd.grad(likelihood.sum(), parameters)
    baseline = cost.mean()
    likelihood = solver.log_likelihood(problem, one, tours)
    expected = torch.autograd.grad((probability.detach() * (cost - baseline) * likelihood).sum(), parameters)
    for mine, other in zip(expected, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_sampling_frequencies_are_the_probabilities():
    problem = make_problem("tsp")
    solver = solver_of(problem)
    one = instances_of(problem, count=1, size=4)
    tours = torch.tensor(list(itertools.permutations(range(4)))).unsqueeze(0)
    with torch.no_grad():
        probability = solver.log_likelihood(problem, one, tours).exp()[0]
        count = 40_000
        seeds = rollout_seeds(9, one["index"], count)
        routes, _ = decode(problem, one, solver.tables(problem, one), count, Choice(seeds=seeds))
    code = (routes[0] * torch.tensor([64, 16, 4, 1])).sum(-1)
    seen = torch.stack([(code == (tour * torch.tensor([64, 16, 4, 1])).sum()).double().mean() for tour in tours[0]])
    error = (probability * (1 - probability) / count).sqrt()
    assert float(((seen - probability) / error).abs().max()) < 4.5


def test_uniform_numbers_are_uniform_and_apart():
    seeds = rollout_seeds(11, torch.arange(2000), 20)
    assert seeds.unique().numel() == seeds.numel()
    numbers = torch.stack([uniforms(seeds, step) for step in range(10)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = torch.histc(numbers, 100, 0, 1)
    expected = numbers.numel() / 100
    assert float(((histogram - expected) ** 2 / expected).sum()) < 160  # chi-squared, 99 degrees of freedom
    correlation = torch.corrcoef(numbers.flatten(1).double())
    assert float((correlation - torch.eye(10)).abs().max()) < 0.02
    neighbours = torch.corrcoef(torch.stack([numbers[0, :, 0], numbers[0, :, 1]]).double())
    assert abs(float(neighbours[0, 1])) < 0.1


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_rollout_does_not_depend_on_its_batch(name):
    problem = make_problem(name)
    solver = solver_of(problem, dtype=torch.float32)
    instances = instances_of(problem, count=6, size=20, dtype=torch.float32)
    with torch.no_grad():
        together, _ = solver.rollout(problem, instances, starts=True, seed=4)
        alone, _ = solver.rollout(problem, instances[3:4], starts=True, seed=4)
    length = alone.shape[-1]
    assert torch.equal(together[3:4, :, :length], alone)
    assert not together[3, :, length:].any()


def test_beam_of_all_routes_finds_the_likeliest():
    problem = make_problem("tsp")
    solver = solver_of(problem)
    instances = instances_of(problem, count=3, size=5)
    tours = torch.tensor(list(itertools.permutations(range(5)))).expand(3, -1, -1)
    with torch.no_grad():
        best, which = solver.log_likelihood(problem, instances, tours).max(1)
        routes, likelihood = beam_search(problem, instances, solver.tables(problem, instances), 120)
    torch.testing.assert_close(likelihood[:, 0], best)
    assert torch.equal(routes[:, 0], tours[torch.arange(3), which])
    problem.check(instances, routes)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_beams_are_feasible_and_beam_one_is_greedy(name, width):
    problem = make_problem(name)
    solver = solver_of(problem)
    instances = instances_of(problem, count=3, size=20)
    with torch.no_grad():
        tables = solver.tables(problem, instances)
        routes, likelihood = beam_search(problem, instances, tables, width)
        greedy, greedy_likelihood = decode(problem, instances, tables, 1, Choice())
    problem.check(instances, routes)
    if width == 1:
        assert torch.equal(routes, greedy)
        torch.testing.assert_close(likelihood, greedy_likelihood)


@pytest.mark.parametrize("name", PROBLEMS)
def test_more_decoding_is_never_worse(name):
    problem = make_problem(name)
    solver = solver_of(problem)
    instances = instances_of(problem, count=4, size=20)
    one = solver.solve(problem, instances, Decoding(starts=False))[1]
    starts = solver.solve(problem, instances, Decoding(starts=True))[1]
    augmented_routes, augmented = solver.solve(problem, instances, Decoding(starts=True, augment=True))
    assert (augmented <= starts + 1e-9).all()
    if name == "tsp":  # a tour may start anywhere; elsewhere a forced first customer can cost
        assert float((one - starts).min()) > -1.0
    samples = solver.solve(problem, instances, Decoding(starts=True, samples=3))[1]
    more = solver.solve(problem, instances, Decoding(starts=True, samples=12))[1]
    assert (more.mean() <= samples.mean() + 1e-9).all()
    problem.check(instances, augmented_routes.unsqueeze(1))
    torch.testing.assert_close(exact_cost(problem, instances, augmented_routes.unsqueeze(1)).squeeze(1), augmented)


def test_policy_follows_a_permutation_of_nodes():
    problem = make_problem("tsp")
    solver = solver_of(problem).eval()
    instances = instances_of(problem, count=2, size=8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved = TensorDict({"locs": instances["locs"][:, order], "index": instances["index"]}, [2])
    with torch.no_grad():
        routes, likelihood = solver.rollout(problem, instances, starts=True, seed=None)
        again, likelihood_again = solver.rollout(problem, moved, starts=True, seed=None)
    assert torch.equal(order[again], routes[:, order])
    torch.testing.assert_close(likelihood_again, likelihood[:, order])


def test_norms_equal_torch():
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = InstanceNorm(5).double(), torch.nn.InstanceNorm1d(5, affine=True).double()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected)
    grads = [
        torch.autograd.grad(y.pow(3).sum(), [x, n.weight, n.bias]) for y, n in ((ours(x), ours), (expected, theirs))
    ]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
    batch, plain = BatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    torch.testing.assert_close(batch(x), plain(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10, "heads": 4}, "heads must divide dim 10, got 4"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"norm": "layer"}, "norm must be instance or batch, got 'layer'"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionSolver(False, 0, 0, True, **options)
    with pytest.raises(ValueError, match="beam goes neither"):
        Decoding(beam=3)
