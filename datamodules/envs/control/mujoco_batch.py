"""Gymnasium's v5 MuJoCo tasks, all copies of one stepped by one call of ``mujoco.batch``."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.envs.control.base import ControlEnv
from modules.optional import require

HUGE = 1e10  # MuJoCo's own bound: it takes larger coordinates, velocities and accelerations for a failed simulation
QUIET = (
    2  # count that a copy's warnings begin at: MuJoCo prints, and writes to a file, a warning that it counts as first
)


@dataclass(frozen=True)
class MuJoCoTask:
    """How a task of Gymnasium turns the simulation into observations, rewards and ends.

    Args:
        xml: the model's file in Gymnasium's assets.
        frame_skip: simulation steps in a control step.
        noise: scale of the noise of an episode's start: uniform on the positions, and on the velocities uniform, or
            normal (``normal``).
        hidden: leading positions that are not observed.
        clip: largest velocity in an observation.
        place: whose x coordinate moves ``forward``: of the first position (``qpos``), of the torso (``torso``), or of
            the centre of mass (``mass``). The latter two describe the state before the last simulation step.
        forward, control, alive: weights in the reward of the speed, of the action's squares, of being healthy.
        height, angle: between which the second (``height_at``) and the third position is healthy; ``None``: anywhere.
        closed: the ends of ``height`` are healthy.
        states: size that all other positions and velocities must stay below.
        contact: weight of the contact forces' squares, bounds of the forces in it, bound of the cost.
        observed: quantities observed behind positions and velocities, and how many leading numbers are left out.
        balance: the single or double inverted pendulum, whose rewards are other ones.
    """

    xml: str
    frame_skip: int
    noise: float
    normal: bool = False
    hidden: int = 1
    clip: float = np.inf
    place: str = "qpos"
    forward: float = 1.0
    control: float = 0.0
    alive: float = 0.0
    height: tuple[float, float] | None = None
    height_at: int = 1
    angle: tuple[float, float] | None = None
    closed: bool = False
    states: float | None = None
    contact: tuple[float, float, float] | None = None
    contact_most: float = np.inf
    observed: tuple[tuple[str, int], ...] = ()
    balance: str = ""


_LITE = MuJoCoTask(
    "ant.xml",
    5,
    0.1,
    normal=True,
    hidden=2,
    place="torso",
    control=0.5,
    alive=1.0,
    height=(0.2, 1.0),
    height_at=2,
    closed=True,
)
TASKS: dict[str, MuJoCoTask] = {
    "Hopper-v5": MuJoCoTask(
        "hopper.xml",
        4,
        5e-3,
        clip=10.0,
        control=1e-3,
        alive=1.0,
        height=(0.7, np.inf),
        angle=(-0.2, 0.2),
        states=100.0,
    ),
    "HalfCheetah-v5": MuJoCoTask("half_cheetah.xml", 5, 0.1, normal=True, control=0.1),
    "Walker2d-v5": MuJoCoTask(
        "walker2d_v5.xml", 4, 5e-3, clip=10.0, control=1e-3, alive=1.0, height=(0.8, 2.0), angle=(-1.0, 1.0)
    ),
    "Swimmer-v5": MuJoCoTask("swimmer.xml", 4, 0.1, hidden=2, control=1e-4),
    "InvertedPendulum-v5": MuJoCoTask("inverted_pendulum.xml", 2, 0.01, hidden=0, balance="single"),
    "InvertedDoublePendulum-v5": MuJoCoTask("inverted_double_pendulum.xml", 5, 0.1, normal=True, balance="double"),
    "Ant-v5": replace(_LITE, contact=(5e-4, -1.0, 1.0), observed=(("cfrc_ext", 6),)),
    "Ant-v5-lite": _LITE,
    "Humanoid-v5": MuJoCoTask(
        "humanoid.xml",
        5,
        1e-2,
        hidden=2,
        place="mass",
        forward=1.25,
        control=0.1,
        alive=5.0,
        height=(1.0, 2.0),
        height_at=2,
        contact=(5e-7, -np.inf, np.inf),
        contact_most=10.0,
        observed=(("cinert", 10), ("cvel", 6), ("qfrc_actuator", 6), ("cfrc_ext", 6)),
    ),
}
"""Gymnasium's v5 tasks with its default options; ``Ant-v5-lite`` has neither contact forces nor their cost."""

PARAMETERS = {
    "mass": ("body_mass", "body_inertia"),
    "friction": ("geom_friction",),
    "gravity": ("opt.gravity",),
    "damping": ("dof_damping",),
}
"""The model's fields that a dynamics parameter scales."""


def load_model(task: MuJoCoTask) -> Any:
    """The task's ``MjModel``, compiled of the file that Gymnasium compiles."""
    mujoco = require("mujoco", extra="control")
    (package,) = require("gymnasium", extra="control").__path__
    spec = mujoco.MjSpec.from_file(str(Path(package, "envs", "mujoco", "assets", task.xml)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*settotalmass.*")  # an attribute that half_cheetah.xml has
        return spec.compile()


class MuJoCoEnv(ControlEnv):
    """``envs`` copies of a v5 MuJoCo task of Gymnasium, equal to it step by step.

    Observations, rewards, ends of episodes and the distribution of starts are those of ``gymnasium.make(task)``; the
    file of the model is read from the installed Gymnasium. States are float64 inside. Controls are clipped by MuJoCo,
    while the cost of an action counts it unclipped.

    A copy whose simulation fails (a number that is not finite, or larger than ``1e10``, in its state, action or reward)
    terminates with reward 0, stands in the model's rest state until it is restarted, and is counted in
    :attr:`nan_resets`; it neither raises nor prints.

    Dynamics parameters: ``mass`` (of all bodies, their inertia with it, and the constants that MuJoCo derives from
    them), ``friction`` (all coefficients of all geoms), ``gravity``, ``damping`` (of all joints).

    Args:
        envs: copies.
        task: one of :data:`TASKS`.
        threads: that simulate; results do not depend on it.
        episode_limit: steps; ``None``: 1000, as in Gymnasium.
        device: ``cpu``.
        dtype: of observations and rewards, float32 or float64.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: an unknown task, another device or dtype, a count below 1.
        ImportError: MuJoCo, Gymnasium, or MuJoCo's batches (since version 3.17) are missing.
    """

    how = "MuJoCo, all copies in one call"

    def __init__(
        self,
        envs: int = 8,
        *,
        task: str = "Hopper-v5",
        threads: int = 1,
        episode_limit: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.4)
            raise ValueError(f"MuJoCoEnv: task: one of {', '.join(near or TASKS)}, got {task!r}")
        if torch.device(device).type != "cpu":
            raise ValueError(f"MuJoCoEnv: device: MuJoCo simulates on the cpu, got {device}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"MuJoCoEnv: dtype: float32 or float64, got {dtype}")
        if threads < 1 or envs < 1:
            raise ValueError(f"MuJoCoEnv: threads and envs must be >= 1, got {threads} and {envs}")
        self._mujoco = require("mujoco", extra="control")
        try:
            self._batch = require("mujoco.batch", extra="control")
        except ImportError:
            version = getattr(self._mujoco, "__version__", "?")
            raise ImportError(
                f"mujoco {version} cannot step batches, which came with 3.17: pip install -U 'plumbline[control]'"
            ) from None
        self.rules, self.name = TASKS[task], task
        self.model = load_model(self.rules)
        nq, nv, low_high = self.model.nq, self.model.nv, self.model.actuator_ctrlrange
        sizes = {"cinert": 10, "cvel": 6, "cfrc_ext": 6}
        seen = 9 if self.rules.balance == "double" else nq - self.rules.hidden + nv
        for field, left_out in self.rules.observed:
            seen += (nv if field == "qfrc_actuator" else self.model.nbody * sizes[field]) - left_out
        super().__init__(
            envs,
            observation_size=seen,
            action_size=self.model.nu,
            low=tuple(low_high[:, 0].tolist()),
            high=tuple(low_high[:, 1].tolist()),
            episode_limit=1000 if episode_limit is None else episode_limit,
            reset_size=nq + nv,
            parameters=tuple(PARAMETERS),
            dtype=dtype,
            seed=seed,
        )
        self.nan_resets = 0
        # the others never end by what the policy did
        self.fails = bool(self.rules.balance or self.rules.height or self.rules.angle)
        self._seconds = self.model.opt.timestep * self.rules.frame_skip
        self._prepare(threads)

    def _prepare(self, threads: int) -> None:
        """Make the simulations and the views of their memory that steps read and write."""
        mujoco, nq, nv = self._mujoco, self.model.nq, self.model.nv
        # contact forces are computed from the data of a copy's last step, which only persistent copies keep
        forces = "cfrc_ext" in dict(self.rules.observed)
        self._simulations = self._batch.Batch(self.model, self.envs, threads, persistent=forces)
        self._data = mujoco.MjData(self.model) if forces else None
        state: np.ndarray = self._simulations.state
        self._qpos, self._qvel = self._simulations.bind("qpos"), self._simulations.bind("qvel")
        self._ctrl = self._simulations.bind("ctrl")
        self._motion = state[:, 1 : 1 + nq + nv]  # time, positions and velocities come first, in this order
        if not (np.shares_memory(self._motion[:, 0], self._qpos) and np.shares_memory(self._motion[:, -1], self._qvel)):
            raise RuntimeError("MuJoCoEnv: MuJoCo's rows begin with other numbers than time, positions, velocities")
        first, last = int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADCTRL)
        self._counts = self._simulations.warning[:, :, 1]
        self._failures = self._counts[:, first : last + 1]
        # what a step computes beside the state, as it computed it: copies of our own, for snapshots
        wanted = [field for field, _ in self.rules.observed]
        wanted += {"torso": ["xpos"], "mass": ["xipos"], "qpos": []}[self.rules.place]
        wanted += ["site_xpos", "qfrc_constraint"] if self.rules.balance == "double" else []
        self._sources = {
            field: self._simulations.bind(field).reshape(self.envs, -1) for field in wanted if field != "cfrc_ext"
        }
        sizes = [6 * self.model.nbody if field == "cfrc_ext" else self._sources[field].shape[1] for field in wanted]
        derived = np.zeros((self.envs, sum(sizes)))
        edges = np.cumsum([0, *sizes])
        self._all_derived = derived
        self._derived = {field: derived[:, edges[i] : edges[i + 1]] for i, field in enumerate(wanted)}
        self._shared = {"state": torch.from_numpy(state)}
        if wanted:
            self._shared["derived"] = torch.from_numpy(derived)
        self.fields = dict(self._shared)
        self._nominal: dict[str, np.ndarray] = {}
        self._changes = np.zeros((self.envs, len(self.parameter_names)))
        self._changed = False
        self._simulations.reset()
        self._counts[:] = QUIET
        self._keep_derived(None, begin=True)
        self._rest, self._rest_derived = state[0].copy(), derived[0].copy()

    # -- ControlEnv ---------------------------------------------------------------------------------------------------
    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        ids = self._ids(rows)
        if ids is not None and not len(ids):
            return
        at: Any = slice(None) if ids is None else ids
        nq, noise = self.model.nq, self.rules.noise
        positions, velocities = uniforms[:, :nq].numpy(), uniforms[:, nq:]
        self._simulations.state[at] = self._rest
        self._qpos[at] += -noise + 2.0 * noise * positions
        if self.rules.normal:
            self._qvel[at] += noise * torch.special.ndtri(velocities.clamp_min(2.0**-54)).numpy()
        else:
            self._qvel[at] += -noise + 2.0 * noise * velocities.numpy()
        ordered = ids if ids is None else np.sort(ids)
        self._change(None, ordered)  # the start depends on the nominal model alone
        self._simulations.forward(ordered)
        self._counts[at] = QUIET
        self._keep_derived(ordered, begin=True)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if action.shape != (self.envs, self.action_size):
            raise ValueError(f"MuJoCoEnv: action must be {(self.envs, self.action_size)}, got {tuple(action.shape)}")
        ids = self._ids(rows)
        reward, terminated = np.zeros(self.envs), np.zeros(self.envs, dtype=bool)
        if ids is None or len(ids):
            if ids is not None:
                ids = np.sort(ids)
            controls = action.detach().to(torch.float64).numpy()
            self._ctrl[:] = controls
            if parameters is not None or self._changed:
                self._change(parameters, ids)
            with np.errstate(all="ignore"):  # of failed simulations
                reward, terminated = self._simulate(controls, ids)
        return torch.from_numpy(reward).to(self.state_dtype), torch.from_numpy(terminated)

    def _look(self, rows: Tensor | None) -> Tensor:
        ids = self._ids(rows)
        at: Any = slice(None) if ids is None else ids
        qpos, qvel = self._qpos[at], self._qvel[at]
        seen = torch.empty(len(qpos), self.observation_size, dtype=self.state_dtype)
        out, rules = seen.numpy(), self.rules
        if rules.balance == "double":
            out[:, :1] = qpos[:, :1]
            out[:, 1:3], out[:, 3:5] = np.sin(qpos[:, 1:]), np.cos(qpos[:, 1:])
            out[:, 5:8] = qvel.clip(-10.0, 10.0)
            out[:, 8] = self._derived["qfrc_constraint"][at, 0].clip(-10.0, 10.0)
            return seen
        places, numbers = qpos.shape[1] - rules.hidden, qvel.shape[1]
        out[:, :places] = qpos[:, rules.hidden :]
        if rules.clip < np.inf:
            qvel = qvel.clip(-rules.clip, rules.clip)
        out[:, places : places + numbers] = qvel
        end = places + numbers
        for field, left_out in rules.observed:
            values = self._derived[field][at, left_out:]
            if field == "cfrc_ext":
                values = self._bounded(values)
            out[:, end : end + values.shape[1]] = values
            end += values.shape[1]
        return seen

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"nan_resets": self.nan_resets}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for name, value in self._shared.items():
            value.copy_(self.fields[name])
        self.fields = dict(self._shared)  # the memory that MuJoCo reads
        self.nan_resets = state.get("nan_resets", 0)

    # -- one step -----------------------------------------------------------------------------------------------------
    def _ids(self, rows: Tensor | None) -> np.ndarray | None:
        return None if rows is None else rows.numpy().astype(np.int32)

    def _simulate(self, controls: np.ndarray, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Step copies ``ids`` and judge them: reward float64 and terminated bool ``[envs]``, 0 and False elsewhere."""
        before, failed = self._place(), None
        try:
            self._simulations.step(ids, self.rules.frame_skip)
        except self._batch.SimulationError as error:
            failed = error.ids
        self._keep_derived(ids)
        reward, terminated = self._judge(before, controls)
        if ids is not None:
            idle = np.ones(self.envs, dtype=bool)
            idle[ids] = False
            reward[idle] = 0.0
            terminated[idle] = False
        fine = np.abs(self._motion).max() < HUGE and np.abs(reward).max() < HUGE and (self._failures == QUIET).all()
        if failed is not None or not fine:
            bad = ~((np.abs(self._motion).max(1) < HUGE) & (np.abs(reward) < HUGE))
            bad |= (self._failures != QUIET).any(1)
            if failed is not None:
                bad[failed] = True
            reward[bad], terminated[bad] = 0.0, True
            self._simulations.state[bad] = self._rest
            self._all_derived[bad] = self._rest_derived
            self._counts[bad] = QUIET
            self.nan_resets += int(bad.sum())
        return reward, terminated

    def _judge(self, before: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rules, motion = self.rules, self._motion
        if rules.balance == "single":
            terminated = ~(np.abs(self._qpos[:, 1]) <= 0.2)
            return (~terminated).astype(np.float64), terminated
        if rules.balance == "double":
            tip = self._derived["site_xpos"]
            terminated = tip[:, 2] <= 1.0
            distance = 0.01 * np.square(tip[:, 0]) + np.square(tip[:, 2] - 2.0)
            swing = 1e-3 * np.square(self._qvel[:, 1]) + 5e-3 * np.square(self._qvel[:, 2])
            return 10.0 * ~terminated - distance - swing, terminated
        reward = rules.forward * ((self._place() - before) / self._seconds)
        cost = rules.control * np.square(controls).sum(1)
        if rules.contact is not None:
            forces = np.square(self._bounded(self._derived["cfrc_ext"])).sum(1)
            cost += np.minimum(rules.contact[0] * forces, rules.contact_most)
        if rules.height is None:
            return reward - cost, np.zeros(self.envs, dtype=bool)
        height, (low, high) = self._qpos[:, rules.height_at], rules.height
        healthy = (low <= height) & (height <= high) if rules.closed else (low < height) & (height < high)
        if rules.angle is not None:
            angle = self._qpos[:, 2]
            healthy &= (rules.angle[0] < angle) & (angle < rules.angle[1])
        if rules.states is not None:
            healthy &= (np.abs(motion[:, 2:]) < rules.states).all(1)
        return reward + rules.alive * healthy - cost, ~healthy

    def _place(self) -> np.ndarray:
        """x ``[envs]`` of what moves forward, a copy."""
        if self.rules.place == "torso":
            return self._derived["xpos"][:, 3].copy()
        if self.rules.place == "mass":
            return self._derived["xipos"][:, ::3] @ self.model.body_mass / self.model.body_mass.sum()
        return self._qpos[:, 0].copy()

    def _bounded(self, forces: np.ndarray) -> np.ndarray:
        """Contact forces, clipped as the task clips them."""
        _, low, high = self.rules.contact or (0.0, -np.inf, np.inf)
        return forces if high == np.inf else forces.clip(low, high)

    def _keep_derived(self, ids: np.ndarray | None, begin: bool = False) -> None:
        """Copy what the last call computed beside the state. Gymnasium has no contact forces before a first step."""
        at: Any = slice(None) if ids is None else ids
        for field, source in self._sources.items():
            self._derived[field][at] = source[at]
        if self._data is None:
            return
        forces = self._derived["cfrc_ext"]
        if begin:
            forces[at] = 0.0
            return
        for index in range(self.envs) if ids is None else ids.tolist():
            self._simulations.get_data(index, self._data)
            self._mujoco.mj_rnePostConstraint(self.model, self._data)
            forces[index] = self._data.cfrc_ext.ravel()

    def _change(self, parameters: Tensor | None, ids: np.ndarray | None) -> None:
        """Give copies ``ids`` the relative changes ``parameters`` ``[envs, 4]`` of the nominal model; ``None``: none.

        Raises:
            ValueError: a change that makes a mass 0 or less, a friction or a damping negative, or is not a number.
        """
        at: Any = slice(None) if ids is None else ids
        wanted = self._changes.copy()
        wanted[at] = 0.0 if parameters is None else parameters.detach().to(torch.float64).numpy()[at]
        if np.array_equal(wanted, self._changes):
            return
        for column, name in enumerate(self.parameter_names):
            least = float(wanted[:, column].min())
            if not (least > -1 or (least == -1 and name != "mass") or (name == "gravity" and least > -np.inf)):
                rule = "finite" if name == "gravity" else "> -1" if name == "mass" else ">= -1"
                raise ValueError(f"MuJoCoEnv: parameters: the relative change of {name} must be {rule}, got {least:g}")
        for column, name in enumerate(self.parameter_names):
            moved = np.flatnonzero(wanted[:, column] != self._changes[:, column])
            if not len(moved):
                continue
            factor = 1.0 + wanted[moved, column]
            for field in PARAMETERS[name]:
                values = self._simulations.expand(field)  # one row for each copy; at first the model's, and slower
                nominal = self._nominal.setdefault(field, values[0].copy())
                values[moved] = nominal * factor.reshape(-1, *[1] * nominal.ndim)
            if name == "mass":
                self._simulations.set_const(moved)
        self._changes, self._changed = wanted, bool(wanted.any())
