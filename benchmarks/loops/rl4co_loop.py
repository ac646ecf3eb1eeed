"""rl4co's POMO and REINFORCE: a step as its ``shared_step`` makes it, without Lightning's trainer around it.

To its advantage, its checks of solutions and for NaN, both on by default, are off, and its decoder's attention is the
faster of the two that it offers, as measured up to 100 nodes: ``simple`` for POMO on 20, else torch's own, its default.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from marl_common import print_line
from routing_common import RoutingArgs, parse_routing_args, run_line, write_probe
from torch import Tensor, nn


def policy_options(args: RoutingArgs) -> dict[str, Any]:
    """Arguments of ``AttentionModelPolicy``; of POMO's, the method itself sets norm and graph context to these."""
    return {
        "embed_dim": args.dim,
        "num_heads": args.heads,
        "num_encoder_layers": args.layers,
        "feedforward_hidden": args.hidden,
        "normalization": args.network["norm"],
        "use_graph_context": args.network["graph_context"],
        "check_nan": False,
        "sdpa_fn_decoder": "simple" if args.pomo and args.nodes <= 20 else "default",
    }


def zero_biases(policy: nn.Module) -> None:
    """Take the biases of the encoder's attention, which our network does not have, out of the start weights."""
    for name, value in policy.named_parameters():
        if name.endswith(("Wqkv.bias", "out_proj.bias")):
            nn.init.zeros_(value)


def main(args: RoutingArgs) -> None:
    """Time the steps and print the result line.

    Raises:
        RuntimeError: a step did not do its work.
    """
    from rl4co.envs import TSPEnv
    from rl4co.models import POMO, REINFORCE, AttentionModelPolicy
    from rl4co.utils.ops import unbatchify
    from tensordict import TensorDict

    logging.disable(logging.WARNING)
    env = TSPEnv(generator_params={"num_loc": args.nodes}, check_solution=False)
    model: Any
    if args.pomo:
        model = POMO(env, policy_kwargs=policy_options(args), num_augment=0, num_starts=args.nodes)
    else:
        model = REINFORCE(env, AttentionModelPolicy(env_name=env.name, **policy_options(args)), baseline="no")
    policy: Any = model.policy
    zero_biases(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def train(locs: Tensor) -> Tensor:
        batch = TensorDict({"locs": locs}, [locs.shape[0]])
        td = env.reset(batch)
        if args.pomo:
            out = policy(td, env, phase="train", num_starts=args.nodes)
            reward, log_likelihood = (unbatchify(out[key], (0, args.nodes)) for key in ("reward", "log_likelihood"))
            model.calculate_loss(td, batch, out, reward, log_likelihood)
        else:
            out = policy(td, env, phase="train", select_best=False)
            model.calculate_loss(td, batch, out)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        return out["loss"].detach()

    @torch.inference_mode()
    def greedy(locs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        policy.eval()
        td = env.reset(TensorDict({"locs": locs}, [locs.shape[0]]))
        if args.pomo:
            out = policy(td, env, phase="val", decode_type="multistart_greedy", num_starts=args.nodes)
            found = [unbatchify(out[key], args.nodes) for key in ("actions", "reward", "log_likelihood")]
        else:
            out = policy(td, env, phase="val", decode_type="greedy")
            found = [out[key].unsqueeze(1) for key in ("actions", "reward", "log_likelihood")]
        policy.train()
        return found[0], -found[1], found[2]

    if args.probe is not None:
        write_probe(args.probe, args, policy.state_dict(), greedy)
    print_line(run_line("rl4co", args, policy, optimizer, train, greedy, None))


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    main(parse_routing_args())
