"""Passes over the policy: scoring without gradient, and optimizer steps from accumulated micro-batches.

Every process makes the same number of passes in each phase, and all sums are over processes, so that one process and
many give the same update on the same rollouts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.optim import Optimizer

from vpd.config import OptimSettings
from vpd.packing import PackedBatch, pack, plan_micro_batches
from vpd.policy.architecture import causal_lm_of
from vpd.policy.copies import WeightCopy
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import Objective, Outputs, TokenLogProbs
from vpd.policy.optimizer import make_moments

T = TypeVar("T")

SCORED_BUDGETS = 4
"""Budgets of tokens that a pass without gradient may have where one with a gradient keeps all activations: it holds
those of one layer at a time."""


@dataclass(frozen=True)
class View(Generic[T]):
    """From an item to one of its token sequences, and the index in it of the first completion token.

    Attributes:
        of: gives both.
        as_teacher: whether a pass over it is the teacher's.
    """

    of: Callable[[T], tuple[list[int], int]]
    as_teacher: bool = False

    def __call__(self, item: T) -> tuple[list[int], int]:
        return self.of(item)


@dataclass
class TokenCounts:
    """Tokens of sequences in training passes: how many were computed, and how many padded batches would have held."""

    computed: int = 0
    padded: int = 0

    def count(self, batch: PackedBatch) -> None:
        """Add a pass over ``batch``."""
        self.computed += batch.token_count
        self.padded += batch.padded_token_count


@dataclass
class OptimizerStep:
    """What one optimizer step did: its loss (summed over micro-batches and processes) and the gradient's norm."""

    loss: float
    grad_norm: float
    clipped: bool


@dataclass
class Learner:
    """The prepared policy with its optimizer.

    Attributes:
        policy: the accelerator's wrapping of a :class:`PolicyModule`.
        optimizer: one for both steps.
        temperature: of student and teacher in every loss.
        tokens: counts of training passes.
        copies: other weights that settings ask for: :func:`vpd.policy.copies.make_copies`.
    """

    policy: torch.nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    settings: OptimSettings
    temperature: float
    tokens: TokenCounts = field(default_factory=TokenCounts)
    copies: dict[str, WeightCopy] = field(default_factory=dict)

    @property
    def module(self) -> PolicyModule:
        module = self.accelerator.unwrap_model(self.policy)
        assert isinstance(module, PolicyModule)
        return module

    def total(self, *values: float) -> list[float]:
        """Sum numbers over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def largest(self, value: float) -> float:
        """The largest of a number over all processes."""
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

    def micro_batches(
        self,
        items: Sequence[T],
        trained: View[T] | None,
        scored: View[T] | None = None,
        *,
        behind: bool = False,
        wants_layers: bool = False,
    ) -> list[list[T]]:
        """Split items so that each part stays within the token budget.

        Every process gets the same number of parts; those without items left get empty ones.

        Args:
            items: to be divided.
            trained: the view of the passes with a gradient.
            scored: that of passes without one, which have :data:`SCORED_BUDGETS` budgets; one with gradient
                checkpointing, where training passes keep little too.
            behind: whether the scored view is for :meth:`score_behind`.
            wants_layers: whether scoring keeps the states of layers before the last, and has one budget for that.
        """
        budget = self.settings.micro_batch_tokens
        keeps_little = getattr(causal_lm_of(self.module.model), "is_activation_checkpointing", False)
        budgets = 1 if wants_layers or keeps_little else SCORED_BUDGETS
        views = [(trained, budget), (scored, budgets * budget)]
        given = [(view, limit) for view, limit in views if view is not None]
        parts = plan_micro_batches(
            [[view(item)[0] for view, _ in given] for item in items],
            [limit for _, limit in given],
            share_prefixes=self.module.share_prefixes,
            behind=behind,
        )
        most = int(self.largest(len(parts)))
        return [[items[index] for index in part] for part in parts] + [[] for _ in range(most - len(parts))]

    @property
    def lends_keys(self) -> bool:
        """Whether :meth:`score_behind` may be used."""
        # Processes with nothing left make no pass within their own, which sharded weights would wait for.
        is_whole = self.accelerator.distributed_type in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        )
        return self.module.can_lend_keys and is_whole

    def pack(
        self, items: Sequence[T], view: View[T], *, lends: bool = False, behind: PackedBatch | None = None
    ) -> PackedBatch:
        """Pack one view of some items for a forward pass; see :func:`vpd.packing.pack`."""
        sequences, starts = [], []
        for item in items:
            sequence, start = view(item)
            sequences.append(sequence)
            starts.append(start)
        batch = pack(sequences, starts, share_prefixes=self.module.share_prefixes, lends=lends, behind=behind)
        return replace(batch, as_teacher=view.as_teacher).to(self.accelerator.device)

    @torch.no_grad()
    def score(self, batch: PackedBatch, objective: Objective, weights: WeightCopy | None = None) -> Outputs:
        """One pass without gradient, dropout off; of the policy, or of a copy of it."""
        self.tokens.count(batch)
        if weights is not None:
            with self.accelerator.autocast():
                return weights.module(batch, objective)
        self.policy.eval()
        return self.policy(batch, objective)

    @torch.no_grad()
    def score_behind(self, items: Sequence[T], view: View[T], lender: PackedBatch, objective: Objective) -> Outputs:
        """Score another view of items within the forward of ``lender``, whose keys and values it takes: once, for they
        are forgotten then."""
        # Not the wrapped forward: autocast is on already, and its wrapper does not nest.
        batch = self.pack(items, view, behind=lender)
        self.tokens.count(batch)
        module = self.module
        was_training = module.training
        module.eval()
        try:
            return module.compute(batch, objective)
        finally:
            module.train(was_training)
            lender.layout.forget()

    def sequence_log_probs_behind(self, items: Sequence[T], view: View[T], lender: PackedBatch) -> Tensor:
        """:meth:`sequence_log_probs` by :meth:`score_behind`."""
        found = self.score_behind(items, view, lender, TokenLogProbs(self.temperature)).values["log_probs"]
        lengths = [len(sequence) - start for sequence, start in map(view, items)]
        return torch.stack([values.sum() for values in found.float().cpu().split(lengths)])

    def sequence_log_probs(self, items: Sequence[T], view: View[T], weights: WeightCopy | None = None) -> Tensor:
        """log pi(y|.) of each completion behind one view's prompt, summed over tokens: [B], on the CPU."""
        token_log_probs = self.token_log_probs(items, view, weights)
        return torch.stack([values.sum() for values in token_log_probs]) if items else torch.zeros(0)

    def token_log_probs(self, items: Sequence[T], view: View[T], weights: WeightCopy | None = None) -> list[Tensor]:
        """log pi(y_t|.) of each item's completion tokens behind one view's prompt: one [T] an item, on the CPU."""
        objective = TokenLogProbs(self.temperature)
        return [values["log_probs"] for values in self.token_values(items, view, objective, weights)]

    def token_values(
        self, items: Sequence[T], view: View[T], objective: Objective, weights: WeightCopy | None = None
    ) -> list[dict[str, Tensor]]:
        """What an objective says of each completion token [S]: by name, one [T] an item, on the CPU, in fp32."""
        results: list[dict[str, Tensor]] = []
        for part in self.micro_batches(items, None, view):
            outputs = self.score(self.pack(part, view), objective, weights)
            if not part:
                continue
            lengths = [len(sequence) - start for sequence, start in map(view, part)]
            columns = {name: values.float().cpu().split(lengths) for name, values in outputs.values.items()}
            results += [{name: column[i] for name, column in columns.items()} for i in range(len(part))]
        return results

    def optimise(
        self,
        parts: Sequence[list[T]],
        make_pass: Callable[[list[T]], tuple[PackedBatch, Objective]],
        on_outputs: Callable[[list[T], Outputs], None] | None = None,
        factor: float = 1.0,
    ) -> OptimizerStep:
        """One optimizer step from the gradients of all parts.

        Args:
            parts: from :meth:`micro_batches`.
            make_pass: called with each part, an empty one too, right before its pass.
            on_outputs: called with each part that is not empty and what came out.
            factor: of the learning rate in this step. The clipped gradient is scaled too: what the optimizer's momentum
                keeps of it moves the weights in the steps to come, at their full rate, and by far the most of it.
        """
        make_moments(self.optimizer)
        loss = 0.0
        for index, part in enumerate(parts):
            batch, objective = make_pass(part)
            self.tokens.count(batch)
            self.policy.train()
            with self._synchronised(last=index == len(parts) - 1):
                outputs = self.policy(batch, objective)
                assert outputs.loss is not None
                # DDP averages gradients over processes, while the losses are already divided by global counts.
                self.accelerator.backward(outputs.loss * self.accelerator.num_processes)
            loss += float(outputs.loss.detach())
            if part and on_outputs is not None:
                on_outputs(part, outputs)
        grad_norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        norm = float("nan") if grad_norm is None else float(grad_norm)
        if factor != 1.0:
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        with self._scaled_learning_rate(factor):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return OptimizerStep(self.total(loss)[0], norm, norm > self.settings.max_grad_norm)

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
