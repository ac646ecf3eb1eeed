"""The routing benchmark: equal settings, equal networks, equal work, the clock, and our own loop on a tiny network."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
TINY = {"nodes": 5, "batch": 4, "layers": 2, "dim": 16, "heads": 2, "hidden": 24, "warmup": 1, "steps": 2}


def test_rl4co_is_pinned_and_leaves_torch_to_the_constraint(load):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / "rl4co.txt").read_text())
    assert "rl4co" in peers.PEERS
    assert {"torch", "rl4co==0.7.0"} <= set(with_deps)
    assert not without
    assert all("==" in line for line in with_deps if line != "torch")


def test_every_option_of_a_routing_setting_reaches_the_loop(load):
    driver, common = load("routing_speed"), load("routing_common")
    for setting in driver.SETTINGS.values():
        args = common.parse_routing_args(driver.loop_options(setting, 7, Path("probe.pt"), profile=True))
        assert (args.seed, args.threads, args.profile, args.probe) == (7, 1, True, Path("probe.pt"))
        assert {name: getattr(args, name) for name in setting} == setting
    assert not common.parse_routing_args(driver.loop_options(setting, 7, Path("p"))).profile


def test_published_settings(load):
    driver, common = load("routing_speed"), load("routing_common")
    sizes = {name: (one["nodes"], one["batch"], one["layers"]) for name, one in driver.SETTINGS.items()}
    assert (sizes["pomo20"], sizes["pomo50"]) == ((20, 64, 6), (50, 32, 6))
    assert [sizes[f"pomo{nodes}"][0] for nodes in (20, 50, 100, 200)] == [20, 50, 100, 200]
    for setting in driver.SETTINGS.values():
        args = common.RoutingArgs(**setting)
        assert (args.dim, args.heads, args.hidden) == (128, 8, 512)
        assert args.rollouts == (args.nodes if args.method == "pomo" else 1)
        assert args.network == {"norm": {"pomo": "instance", "am": "batch"}[args.method],
                                "graph_context": args.method == "am"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "pointer"}, "method: one of pomo, am, got 'pointer'"), ({"steps": 0}, "steps: must be >= 1, got 0"),
     ({"warmup": 0}, "warmup: must be >= 1, got 0"), ({"nodes": 2}, "nodes: must be >= 3, got 2")],
)  # fmt: skip
def test_routing_settings_that_make_no_sense_are_refused(load, change, message):
    with pytest.raises(ValueError, match=message):
        load("routing_common").RoutingArgs(**change)


@pytest.mark.parametrize("method", ["pomo", "am"])
def test_both_sides_are_told_the_same_network(load, method):
    common, theirs, ours = load("routing_common"), load("rl4co_loop"), load("plumbline_routing_loop")
    args = common.RoutingArgs(method=method, dim=24, heads=3, layers=4, hidden=40)
    told = theirs.policy_options(args)
    made = ours.SolverSettings(args.dim, args.heads, args.layers, args.hidden, **args.network)
    assert (told["embed_dim"], told["num_heads"], told["num_encoder_layers"]) == (made.dim, made.heads, made.layers)
    assert (told["feedforward_hidden"], told["normalization"]) == (made.hidden, made.norm)
    assert told["use_graph_context"] == made.graph_context == (method == "am")
    assert told["check_nan"] is False


# -- instances, tours, the clock --
def test_instances_depend_on_seed_and_number_only(load):
    common = load("routing_common")
    args = common.RoutingArgs(nodes=6)
    one = common.make_instances(args, 3, 5)
    assert one.shape == (3, 6, 2)
    assert torch.equal(one, common.make_instances(common.RoutingArgs(nodes=6, batch=9), 3, 5))
    assert not torch.equal(one, common.make_instances(args, 3, 6))
    assert not torch.equal(one, common.make_instances(common.RoutingArgs(nodes=6, seed=1), 3, 5))


def test_tour_lengths_and_their_check(load):
    common = load("routing_common")
    square = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]])
    routes = torch.tensor([[[0, 1, 2, 3], [0, 2, 1, 3]]])
    lengths = torch.tensor([[4.0, 2.0 + 2.0 * math.sqrt(2.0)]])
    torch.testing.assert_close(common.tour_lengths(square, routes), lengths.double())
    assert common.checked_cost(square, routes, lengths) == pytest.approx(float(lengths.mean()))
    with pytest.raises(RuntimeError, match="costs are off the tours' lengths by 0.01"):
        common.checked_cost(square, routes, lengths + 0.01)
    for wrong in ([[[0, 1, 1, 3]]], [[[0, 1, 2]]]):
        with pytest.raises(RuntimeError, match="does not visit every node once"):
            common.tour_lengths(square, torch.tensor(wrong))


def test_clock_times_whole_steps_after_warmup(load, monkeypatch):
    common = load("routing_common")
    now = [0.0]
    monkeypatch.setattr(common, "cpu_seconds", lambda: now[0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: 10.0 * now[0])
    args = common.RoutingArgs(nodes=3, batch=4, warmup=2)
    costs, seen = iter((100.0, 50.0, 1.0, 2.0, 5.0)), []

    def step(locs: torch.Tensor) -> int:
        now[0] += next(costs)
        seen.append(locs)
        return len(seen)

    rates, output, last = common.timed(step, args, steps=3, first=40)
    assert (rates["cpu_s"], rates["wall_s"], rates["instances"]) == (8.0, 80.0, 12)
    assert (rates["instances_per_cpu_s"], rates["instances_per_wall_s"]) == (1.5, 0.15)
    assert (rates["median_step_cpu_s"], rates["step_cpu_s"]) == (2.0, [1.0, 2.0, 5.0])
    assert output == 5
    assert torch.equal(last, seen[-1])
    assert all(torch.equal(locs, common.make_instances(args, 4, 40 + number)) for number, locs in enumerate(seen))


@pytest.mark.parametrize(
    ("loss", "rate", "skip", "message"),
    [("nan", 0.1, 0, "loss of the last training step is nan"), (1.0, 0.0, 0, "3 updates moved the weights by 0.0, 3"),
     (1.0, 0.1, 1, "2 updates moved the weights by .*, 3 wanted")],
)  # fmt: skip
def test_a_run_that_did_not_do_its_work_is_refused(load, loss, rate, skip, message):
    common = load("routing_common")
    args = common.RoutingArgs(**TINY)
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    calls = []

    def train(locs: torch.Tensor) -> torch.Tensor:
        calls.append(locs)
        optimizer.zero_grad()
        module(locs).sum().backward()
        if len(calls) > skip:
            optimizer.step()
        return torch.tensor(float(loss))

    def greedy(locs: torch.Tensor):
        routes = torch.arange(locs.shape[1]).expand(locs.shape[0], 1, -1)
        return routes, common.tour_lengths(locs, routes), torch.zeros(locs.shape[0], 1)

    with pytest.raises(RuntimeError, match=message):
        common.run_line("x", args, module, optimizer, train, greedy, None)


# -- the same network on both sides --
def peer_weights(args, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random weights under the names that rl4co's ``AttentionModelPolicy`` gives them."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden = args.dim, args.hidden
    shapes = {"encoder.init_embedding.init_embed.weight": (dim, 2), "encoder.init_embedding.init_embed.bias": (dim,)}
    for number in range(args.layers):
        layer = f"encoder.net.layers.{number}"
        shapes |= {
            f"{layer}.0.module.Wqkv.weight": (3 * dim, dim), f"{layer}.0.module.out_proj.weight": (dim, dim),
            f"{layer}.1.normalizer.weight": (dim,), f"{layer}.1.normalizer.bias": (dim,),
            f"{layer}.2.module.lins.0.weight": (hidden, dim), f"{layer}.2.module.lins.0.bias": (hidden,),
            f"{layer}.2.module.lins.1.weight": (dim, hidden), f"{layer}.2.module.lins.1.bias": (dim,),
            f"{layer}.3.normalizer.weight": (dim,), f"{layer}.3.normalizer.bias": (dim,),
        }  # fmt: skip
    shapes |= {
        "decoder.context_embedding.W_placeholder": (2 * dim,),
        "decoder.context_embedding.project_context.weight": (dim, 2 * dim),
        "decoder.pointer.project_out.weight": (dim, dim),
        "decoder.project_node_embeddings.weight": (3 * dim, dim),
        "decoder.project_fixed_context.weight": (dim, dim),
    }
    # large enough for attention far from uniform, which would hide mistakes
    weights = {name: 1.5 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for name, value in weights.items():
        if name.endswith("normalizer.weight"):
            value.add_(1.0)
    for number in range(args.layers):
        layer = f"encoder.net.layers.{number}"
        weights[f"{layer}.0.module.Wqkv.bias"] = torch.zeros(3 * dim)
        weights[f"{layer}.0.module.out_proj.bias"] = torch.zeros(dim)
        if not args.pomo:
            for place in (1, 3):
                weights[f"{layer}.{place}.normalizer.running_mean"] = 0.3 * torch.randn(dim, generator=generator)
                weights[f"{layer}.{place}.normalizer.running_var"] = 0.5 + torch.rand(dim, generator=generator)
                weights[f"{layer}.{place}.normalizer.num_batches_tracked"] = torch.tensor(1)
    return weights


def _norm(x: torch.Tensor, weights, name: str) -> torch.Tensor:  # [N, dim], in evaluation mode
    if f"{name}.running_mean" in weights:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    else:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attend(q, k, v, heads: int, allowed=None) -> torch.Tensor:  # [M, dim], [N, dim], [N, dim] -> [M, dim]
    found = []
    for one in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = one[0] @ one[1].T / one[0].shape[-1] ** 0.5
        if allowed is not None:
            scores[:, ~allowed] = -math.inf
        found.append(scores.softmax(-1) @ one[2])
    return torch.cat(found, -1)


def plain_encode(args, weights, locs: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[N, dim]`` of one instance ``[N, 2]``: Kool et al. 2019, section 3.1, on rl4co's names."""
    embed = "encoder.init_embedding.init_embed"
    x = locs @ weights[f"{embed}.weight"].T + weights[f"{embed}.bias"]
    for number in range(args.layers):
        layer = f"encoder.net.layers.{number}"
        query, key, value = (x @ weights[f"{layer}.0.module.Wqkv.weight"].T).chunk(3, -1)
        mixed = _attend(query, key, value, args.heads)
        x = _norm(x + mixed @ weights[f"{layer}.0.module.out_proj.weight"].T, weights, f"{layer}.1.normalizer")
        (up, up_bias), (down, down_bias) = (
            (weights[f"{layer}.2.module.lins.{place}.weight"], weights[f"{layer}.2.module.lins.{place}.bias"])
            for place in (0, 1)
        )
        x = _norm(x + (x @ up.T + up_bias).relu() @ down.T + down_bias, weights, f"{layer}.3.normalizer")
    return x


def plain_log_probs(args, weights, x: torch.Tensor, route: list[int]) -> torch.Tensor:
    """Log-probabilities ``[N]`` of the node after ``route``, given embeddings: Kool et al. 2019, section 3.2."""
    keys, values, logit_keys = (x @ weights["decoder.project_node_embeddings.weight"].T).chunk(3, -1)
    place = "decoder.context_embedding"
    context = torch.cat([x[route[0]], x[route[-1]]]) if route else weights[f"{place}.W_placeholder"]
    query = weights[f"{place}.project_context.weight"] @ context
    if args.network["graph_context"]:
        query = query + weights["decoder.project_fixed_context.weight"] @ x.mean(0)
    allowed = torch.ones(x.shape[0], dtype=torch.bool)
    allowed[route] = False
    glimpse = _attend(query[None], keys, values, args.heads, allowed) @ weights["decoder.pointer.project_out.weight"].T
    logits = 10.0 * torch.tanh(glimpse[0] @ logit_keys.T / args.dim**0.5)
    return F.log_softmax(logits.masked_fill(~allowed, -math.inf), -1)


def plain_greedy(args, weights):
    """Greedy decoding by :func:`plain_log_probs`, one route after the other."""

    def greedy(locs: torch.Tensor):
        routes, totals = [], []
        for one in locs:
            x = plain_encode(args, weights, one)
            for start in range(args.rollouts):
                route, total = ([start], 0.0) if args.pomo else ([], 0.0)
                while len(route) < args.nodes:
                    log_probs = plain_log_probs(args, weights, x, route)
                    route.append(int(log_probs.argmax()))
                    total += float(log_probs.max())
                routes.append(route)
                totals.append(total)
        found = torch.tensor(routes).view(locs.shape[0], args.rollouts, args.nodes)
        ends = locs[torch.arange(locs.shape[0])[:, None, None], found]
        cost = (ends - ends.roll(1, 2)).norm(dim=-1).sum(-1)
        return found, cost, torch.tensor(totals, dtype=cost.dtype).view(cost.shape)

    return greedy


@pytest.mark.parametrize("method", ["pomo", "am"])
def test_weights_of_the_peer_compute_its_network_in_ours(load, method):
    """Against a plain reading of the paper, in float64."""
    common, loop = load("routing_common"), load("plumbline_routing_loop")
    args = common.RoutingArgs(method=method, **TINY)
    weights = {name: value.double() for name, value in peer_weights(args).items()}
    locs = common.make_instances(args, 16, 0).double()
    routes, cost, log_likelihood = plain_greedy(args, weights)(locs)
    problem, solver = loop.build(args)
    solver.double().eval().load_state_dict(loop.start_state(weights, args))
    instances = loop.TensorDict({"locs": locs, "index": torch.arange(16)}, [16])
    with torch.no_grad():
        found, found_log_likelihood = solver.rollout(problem, instances, args.pomo, None)
    assert torch.equal(found, routes)
    torch.testing.assert_close(problem.cost(instances, found), cost)
    torch.testing.assert_close(found_log_likelihood, log_likelihood, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["pomo", "am"])
def test_our_loop_starts_from_the_probe_and_does_the_work_it_reports(load, method, tmp_path, capsys):
    """The probe that the peer would write is made here by a plain reading of the paper."""
    common, loop, driver = load("routing_common"), load("plumbline_routing_loop"), load("routing_speed")
    args = common.RoutingArgs(method=method, **TINY, probe=tmp_path / "probe.pt")
    weights = peer_weights(args)
    common.write_probe(args.probe, args, weights, plain_greedy(args, weights))
    loop.main(args)
    line = driver.result_line(capsys.readouterr().out)
    assert line["probe"]["same_routes"] > 0.95  # of float32 logits
    assert line["probe"]["cost_difference"] < 1e-3
    assert line["probe"]["log_likelihood_difference"] < 1e-3
    assert (line["method"], line["nodes"], line["batch"], line["rollouts"]) == (
        method,
        5,
        4,
        5 if method == "pomo" else 1,
    )
    assert (line["train"]["instances"], line["greedy"]["instances"], line["updates"]) == (8, 16, 3)
    assert line["moved"] > 1e-5
    trainable = [value.numel() for name, value in weights.items() if not name.endswith(("mean", "var", "tracked"))]
    assert sum(trainable) - line["parameters"] == args.extra_parameters()


def test_other_weights_are_told_apart(load):
    common = load("routing_common")
    args = common.RoutingArgs(**TINY)
    probe = dict(zip(("routes", "cost", "log_likelihood"),
                     plain_greedy(args, peer_weights(args, 4))(common.make_instances(args, args.probe_instances, 0)),
                     strict=True))  # fmt: skip
    same = common.compare_probe(probe, args, plain_greedy(args, peer_weights(args, 4)))
    assert same == {"same_routes": 1.0, "cost_difference": 0.0, "log_likelihood_difference": 0.0}
    other = common.compare_probe(probe, args, plain_greedy(args, peer_weights(args, 5)))
    assert other["same_routes"] < 0.6
    assert other["log_likelihood_difference"] > 0.1


def test_biases_that_our_network_lacks_are_refused(load):
    common, loop = load("routing_common"), load("plumbline_routing_loop")
    args = common.RoutingArgs(**TINY)
    weights = peer_weights(args)
    weights["encoder.net.layers.1.0.module.out_proj.bias"][3] = 0.1
    with pytest.raises(ValueError, match=r"layers\.1\.0\.module\.out_proj\.bias must be zero"):
        loop.from_rl4co(weights, args.layers)


def test_the_peer_starts_without_those_biases(load):
    loop = load("rl4co_loop")
    policy = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("Wqkv", "out_proj", "lins")})
    loop.zero_biases(policy)
    zero = {name for name, value in policy.named_parameters() if not value.any()}
    assert zero == {"Wqkv.bias", "out_proj.bias"}


# -- the driver --
SETTING = {"method": "pomo", "nodes": 20, "batch": 64, "layers": 6, "warmup": 2, "steps": 8}


def _line(rate: float, **change) -> dict:
    phase = {"instances": 512, "instances_per_cpu_s": rate, "instances_per_wall_s": rate / 2}
    line = {
        "method": "pomo", "nodes": 20, "batch": 64, "rollouts": 20, "updates": 10, "greedy_cost": 6.5,
        "parameters": 1_285_376, "train": phase, "greedy": {**phase, "instances": 1024},
    }  # fmt: skip
    return line | change


def _round(theirs: float = 100.0, ours: float = 250.0, **change) -> dict[str, dict]:
    probe = {"same_routes": 1.0, "cost_difference": 1e-6, "log_likelihood_difference": 1e-5}
    return {"rl4co": _line(theirs, parameters=1_304_960), "plumbline": _line(ours, **({"probe": probe} | change))}


def _probe(**change) -> dict:
    return {"probe": {"same_routes": 1.0, "cost_difference": 0.0, "log_likelihood_difference": 0.0} | change}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"updates": 9}, "differ in updates"), ({"rollouts": 1}, "differ in rollouts"), ({"nodes": 21}, "differ in nodes"),
     ({"greedy": {"instances": 512}}, "differ in instances of greedy"), ({"greedy_cost": 3.0}, "3.0 long on average"),
     ({"greedy_cost": 15.5}, "15.5 long on average"), ({"parameters": 1_285_377}, "19584 more are the peer's own"),
     ({"greedy_cost": 6.6}, "6.5 and 6.6 long on average"), (_probe(same_routes=0.8), "decode differently"),
     (_probe(cost_difference=0.01), "decode differently"),
     (_probe(log_likelihood_difference=5e-4), "decode differently"),
     (_probe(log_likelihood_difference=float("nan")), "decode differently")],
)  # fmt: skip
def test_unequal_work_is_refused(load, change, message):
    driver = load("routing_speed")
    driver.check_equal_work(_round(), SETTING)
    driver.check_equal_work({"plumbline": _line(1.0)}, SETTING)
    with pytest.raises(ValueError, match=message):
        driver.check_equal_work(_round(**change), SETTING)


def test_ratios_are_taken_within_a_round(load):
    driver = load("routing_speed")
    rounds = [_round(100.0, 300.0), _round(50.0, 200.0), _round(400.0, 800.0)]
    row = driver.summarise(rounds, "instances_per_cpu_s")["train"]["plumbline"]
    assert row["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0, "by_round": [3.0, 4.0, 2.0]}
    assert (row["median"], row["min"], row["max"]) == (300.0, 200.0, 800.0)
    alone = driver.summarise([{"plumbline": _line(5.0)}], "instances_per_wall_s")
    assert alone["greedy"]["plumbline"] == {"median": 2.5, "min": 2.5, "max": 2.5}


def test_growth_of_a_power_is_its_exponent(load):
    driver = load("routing_speed")
    found = {}
    for nodes in (200, 20, 50):  # an instance takes nodes**2 / 100 ms
        rates = {"plumbline": {"median": 1e5 / nodes**2}}
        setting = {"method": "pomo", "nodes": nodes}
        found[f"pomo{nodes}"] = {"setting": setting, "instances_per_cpu_s": {"train": rates, "greedy": rates}}
    found["am20"] = {"setting": {"method": "am", "nodes": 20}}
    rows = driver.growth(found)["train"]["plumbline"]
    assert [row["nodes"] for row in rows] == [20, 50, 200]
    assert [row["cpu_ms"] for row in rows] == [4.0, 25.0, 400.0]
    assert "exponent" not in rows[0]
    assert [row["exponent"] for row in rows[1:]] == [2.0, 2.0]


def test_driver_runs_the_peer_first_and_writes_what_was_measured(load, monkeypatch, tmp_path, capsys):
    driver = load("routing_speed")
    seen = []

    def run_loop(name, python, options):
        seen.append((name, str(python), options[options.index("--seed") + 1], options[options.index("--probe") + 1]))
        return _round(100.0, 250.0 + len(seen))[name] | {"loop": name}

    monkeypatch.setattr(driver, "run_loop", run_loop)
    monkeypatch.setattr(driver, "ensure_peer", lambda peer, root: tmp_path / peer)
    monkeypatch.setattr(driver, "installed_packages", lambda peer, root: {"rl4co": "0.7.0"})
    out = tmp_path / "out.json"
    given = ["--settings", "pomo20", "--loops", "plumbline", "rl4co", "--rounds", "2", "--out", str(out)]
    assert driver.main(given) == 0
    assert [(name, seed) for name, _, seed, _ in seen] == [
        ("rl4co", "0"), ("plumbline", "0"), ("rl4co", "1"), ("plumbline", "1"),
    ]  # fmt: skip
    assert [python == str(tmp_path / "rl4co") for _, python, _, _ in seen] == [True, False, True, False]
    assert seen[0][3] == seen[1][3] != seen[2][3]  # start weights are a round's own
    record = json.loads(out.read_text())
    found = record["settings"]["pomo20"]
    assert found["command"] == "python benchmarks/routing_speed.py --settings pomo20 --loops plumbline rl4co --rounds 2"
    assert found["instances_per_cpu_s"]["train"]["plumbline"]["ratio"]["by_round"] == [2.52, 2.54]
    assert len(found["rounds"]) == 2
    assert record["growth"]["train"]["rl4co"] == [{"nodes": 20, "cpu_ms": 10.0}]
    assert str(tmp_path) not in json.dumps(record)
    assert "2.53 [2.52, 2.54]" in capsys.readouterr().out

    monkeypatch.setattr(driver, "run_loop", lambda name, python, options: _round(updates=3)[name])
    assert driver.main(given) == 1
    assert "loops differ in updates" in capsys.readouterr().err
