"""Passes over the policy: scoring without gradient, and optimizer steps from accumulated micro-batches.

Every process makes the same number of passes in each phase, and all sums are over processes, so that one process and
many give the same update on the same rollouts.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer

from vpd.config import ConfigError, OptimSettings
from vpd.packing import PackedBatch, pack, plan_micro_batches
from vpd.policy.architecture import causal_lm_of
from vpd.policy.copies import WeightCopy
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import Objective, Outputs, TokenLogProbs
from vpd.policy.optimizer import make_moments
from vpd.policy.out_of_memory import halved, is_out_of_memory, joined
from vpd.policy.skipped import SkippedUpdates

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NO_MEMORY = (
    "Memory is missing for a micro-batch: lower optim.micro_batch_tokens, rollout.max_completion_length or "
    "model.logits_chunk_tokens, or set model.gradient_checkpointing = true. Then go on with --resume."
)

SCORED_BUDGETS = 4
"""How many budgets of tokens a pass without gradient may have. A pass with a gradient keeps all activations, and one
without holds those of one layer at a time."""


@dataclass(frozen=True)
class View(Generic[T]):
    """Gives the token sequences of an item, one for each turn, with the index of the first completion token in each.

    Attributes:
        of: Gives the sequences and the indices.
        as_teacher: Whether a pass over them is the teacher's.
    """

    of: Callable[[T], list[tuple[list[int], int]]]
    as_teacher: bool = False

    def __call__(self, item: T) -> list[tuple[list[int], int]]:
        return self.of(item)

    def completion_length(self, item: T) -> int:
        """The number of the item's completion tokens."""
        return sum(len(sequence) - start for sequence, start in self(item))


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of sequences in training passes.

    Attributes:
        computed: How many were computed.
        padded: How many a padded batch would have held.
    """

    computed: int = 0
    padded: int = 0

    def __add__(self, batch: PackedBatch) -> TokenCounts:
        return TokenCounts(self.computed + batch.token_count, self.padded + batch.padded_token_count)

    def __sub__(self, before: TokenCounts) -> TokenCounts:
        return TokenCounts(self.computed - before.computed, self.padded - before.padded)


@dataclass(frozen=True)
class TrainingPass:
    """What one forward with a gradient takes.

    Attributes:
        batch: The tokens.
        objective: The loss.
        conditioned: A second batch that takes keys and values from the first; see :meth:`PolicyModule.forward`.
    """

    batch: PackedBatch
    objective: Objective
    conditioned: PackedBatch | None = None


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step did.

    Attributes:
        loss: The loss, summed over micro-batches and processes.
        grad_norm: The gradient's norm before it was clipped. Where it or the loss is not finite, the weights are as
            they were.
        clipped: Whether it was clipped.
        values: For each part of this process the objective's numbers; none for an empty part.
    """

    loss: float
    grad_norm: float
    clipped: bool
    values: list[dict[str, Tensor]]


@dataclass
class Learner:
    """The prepared policy with its optimizer.

    Attributes:
        policy: What the accelerator made of a :class:`PolicyModule`.
        optimizer: The one optimizer of both steps.
        accelerator: Knows the processes and the precision.
        settings: The optimizer's settings.
        temperature: The temperature of student and teacher in every loss.
        counts: The tokens of all passes so far.
        skipped: Counts the optimizer steps that were skipped.
        budget_divisor: By what ``optim.micro_batch_tokens`` is divided, since memory was missing.
        copies: Other sets of weights that an algorithm asks for: :func:`vpd.policy.copies.make_copies`.
    """

    policy: torch.nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    settings: OptimSettings
    temperature: float
    counts: TokenCounts = field(default_factory=TokenCounts)
    copies: dict[str, WeightCopy] = field(default_factory=dict)
    skipped: SkippedUpdates = field(default_factory=SkippedUpdates)
    budget_divisor: int = 1

    @property
    def module(self) -> PolicyModule:
        """The policy without the accelerator's wrapping."""
        module = self.accelerator.unwrap_model(self.policy)
        assert isinstance(module, PolicyModule)
        return module

    def total(self, *values: float) -> list[float]:
        """Sum numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def largest(self, value: float) -> float:
        """The largest value of a number over all processes."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(torch.as_tensor(self.accelerator.gather(tensor)).max())

    def union(self, names: Iterable[str]) -> list[str]:
        """The distinct names of all processes, sorted."""
        own = sorted(set(names))
        return sorted(set(gather_object(own))) if self.accelerator.num_processes > 1 else own

    def gather(self, values: Tensor) -> Tensor:
        """The finite numbers [n] of all processes in one tensor, on the CPU; n may differ between processes."""
        padded = self.accelerator.pad_across_processes(values.to(self.accelerator.device), pad_index=float("inf"))  # pyright: ignore[reportArgumentType]
        gathered = torch.as_tensor(self.accelerator.gather(padded)).cpu()
        return gathered[gathered.isfinite()]

    @property
    def reuses_keys(self) -> bool:
        """Whether a second pass may be conditioned on the keys and values of a training pass."""
        return self.module.can_reuse_keys

    @property
    def token_budget(self) -> int:
        """The number of computed tokens in one pass with a gradient, as far as memory allows."""
        return max(1, self.settings.micro_batch_tokens // self.budget_divisor)

    def parts(self) -> dict[str, Any]:
        """Return what has a state to save, by name: the network, the optimizer, and the copies of weights."""
        copies = {f"weights_{name}": weights for name, weights in self.copies.items()}
        return {"model": self.module, "optimizer": self.optimizer, **copies}

    def micro_batches(
        self,
        items: Sequence[T],
        trained: View[T] | None,
        scored: View[T] | None = None,
        *,
        conditioned: bool = False,
        wants_layers: bool = False,
    ) -> list[list[T]]:
        """Split items so that each part stays within the token budget.

        Every process gets the same number of parts; those without items left get empty ones.

        Args:
            items: What is divided.
            trained: The view of the passes with a gradient.
            scored: The view of the passes without one, which have :data:`SCORED_BUDGETS` budgets. They have one under
                gradient checkpointing, where training passes keep little, too.
            conditioned: Whether the scored view is conditioned on the trained one's keys and values.
            wants_layers: Whether scoring keeps the states of layers before the last, and so has one budget.
        """
        budget = self.token_budget
        keeps_little = getattr(causal_lm_of(self.module.model), "is_activation_checkpointing", False)
        budgets = 1 if wants_layers or keeps_little else SCORED_BUDGETS
        views = [(trained, budget), (scored, budgets * budget)]
        given = [(view, limit) for view, limit in views if view is not None]
        parts = plan_micro_batches(
            [[[sequence for sequence, _ in view(item)] for view, _ in given] for item in items],
            [limit for _, limit in given],
            share_prefixes=self.module.share_prefixes,
            conditioned=conditioned,
        )
        most = int(self.largest(len(parts)))
        return [[items[index] for index in part] for part in parts] + [[] for _ in range(most - len(parts))]

    def pack(
        self,
        items: Sequence[T],
        view: View[T],
        *,
        keeps_keys: bool = False,
        conditioned_on: PackedBatch | None = None,
        network: PolicyModule | None = None,
    ) -> PackedBatch:
        """Pack one view of some items for a forward of the policy, or of another network; see :func:`pack`."""
        turns = [(index, *turn) for index, item in enumerate(items) for turn in view(item)]
        batch = pack(
            [sequence for _, sequence, _ in turns],
            [start for _, _, start in turns],
            rollouts=[index for index, _, _ in turns],
            share_prefixes=(network or self.module).share_prefixes,
            keeps_keys=keeps_keys,
            conditioned_on=conditioned_on,
        )
        return replace(batch, as_teacher=view.as_teacher).to(self.accelerator.device)

    @torch.no_grad()
    def score(self, batch: PackedBatch, objective: Objective, network: PolicyModule | None = None) -> Outputs:
        """One pass without gradient and dropout, of the policy or of another network."""
        self.counts += batch
        if network is not None:
            with self.accelerator.autocast():
                return network(batch, objective)
        self.policy.eval()
        return self.policy(batch, objective)

    def sequence_log_probs(self, items: Sequence[T], view: View[T], network: PolicyModule | None = None) -> Tensor:
        """log pi(y|.) of each item under one view, summed over the completion tokens of all turns: [B], on the CPU."""
        token_log_probs = self.token_log_probs(items, view, network)
        return torch.stack([values.sum() for values in token_log_probs]) if items else torch.zeros(0)

    def token_log_probs(self, items: Sequence[T], view: View[T], network: PolicyModule | None = None) -> list[Tensor]:
        """log pi(y_t|.) of each item's completion tokens under one view: one [T] an item, on the CPU."""
        objective = TokenLogProbs(self.temperature)
        return [values["log_probs"] for values in self.token_values(items, view, objective, network)]

    def token_values(
        self, items: Sequence[T], view: View[T], objective: Objective, network: PolicyModule | None = None
    ) -> list[dict[str, Tensor]]:
        """An objective's numbers for the completion tokens [S]: by name, one [T] an item, on the CPU, in fp32."""
        results: list[dict[str, Tensor]] = []
        for part in self.micro_batches(items, None, view):
            outputs = self.score(self.pack(part, view, network=network), objective, network)
            if not part:
                continue
            lengths = [view.completion_length(item) for item in part]
            columns = {name: values.float().cpu().split(lengths) for name, values in outputs.values.items()}
            results += [{name: column[i] for name, column in columns.items()} for i in range(len(part))]
        return results

    def optimise(
        self,
        parts: Sequence[list[T]],
        make_pass: Callable[[list[T]], TrainingPass],
        factor: float = 1.0,
        divisible: bool = True,
    ) -> OptimizerStep:
        """Make one optimizer step from the gradients of all parts, or none where loss or gradient is not finite.

        Args:
            parts: From :meth:`micro_batches`.
            make_pass: Is called with each part, an empty one too, right before its pass.
            factor: Multiplies the learning rate in this step. The clipped gradient is scaled, too: what the optimizer's
                momentum keeps of it moves the weights in the steps to come, at their full rate, and by far the most.
            divisible: Whether the loss of a part is the sum of those of its halves. Then parts for which memory is
                missing are halved once, and so are the budgets of all later ones.

        Raises:
            ConfigError: Memory is missing, and halving does not help.
        """
        make_moments(self.optimizer)
        loss, found = self._accumulate_in_memory(parts, make_pass, divisible)
        grad_norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        norm = float("nan") if grad_norm is None else float(grad_norm)
        # Both numbers are those of all processes, which decide alike.
        total_loss = self.total(loss)[0]
        self.skipped.note(not (math.isfinite(total_loss) and math.isfinite(norm)))
        if self.skipped.in_a_row:
            self.optimizer.zero_grad()
            return OptimizerStep(total_loss, norm, False, found)
        if factor != 1.0:
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        with self._scaled_learning_rate(factor):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return OptimizerStep(total_loss, norm, norm > self.settings.max_grad_norm, found)

    def _accumulate_in_memory(
        self, parts: Sequence[list[T]], make_pass: Callable[[list[T]], TrainingPass], divisible: bool
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """Accumulate the gradient, with halved parts where memory is missing."""
        counts = self.counts
        try:
            return self._accumulate(parts, make_pass)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Other processes are in the middle of passes that they make together with this one.
            if not divisible or self.accelerator.num_processes > 1 or not any(len(part) > 1 for part in parts):
                raise ConfigError(_NO_MEMORY) from error
        # Only here is the failed pass let go of, with all that it held.
        self.optimizer.zero_grad()
        self.counts, self.budget_divisor = counts, 2 * self.budget_divisor
        torch.cuda.empty_cache()
        logger.warning(
            "Memory is missing for a micro-batch: it is halved, and optim.micro_batch_tokens counts as %d from now on.",
            self.token_budget,
        )
        try:
            loss, found = self._accumulate(halved(parts), make_pass)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(_NO_MEMORY) from error
        return loss, joined(found)

    def _accumulate(
        self, parts: Sequence[list[T]], make_pass: Callable[[list[T]], TrainingPass]
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """Add the gradients of all parts up, and return this process's loss and the objective's numbers of each."""
        loss = 0.0
        found: list[dict[str, Tensor]] = []
        for index, part in enumerate(parts):
            taken = make_pass(part)
            for batch in (taken.batch, taken.conditioned):
                if batch is not None:
                    self.counts += batch
            self.policy.train()
            with self._synchronised(last=index == len(parts) - 1):
                outputs = self.policy(taken.batch, taken.objective, taken.conditioned)
                assert outputs.loss is not None
                # DDP averages gradients over processes, while the losses are already divided by global counts.
                self.accelerator.backward(outputs.loss * self.accelerator.num_processes)
            loss += float(outputs.loss.detach())
            found.append({name: value.detach() for name, value in outputs.values.items()})
        return loss, found

    @contextlib.contextmanager
    def _scaled_learning_rate(self, factor: float) -> Iterator[None]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy)
