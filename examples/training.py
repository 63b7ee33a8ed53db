"""The training loop: steps, the held-out loss on the way, checkpoints, and when to stop."""

from __future__ import annotations

import sys
import time

import corpus
import metrics
import numpy as np
import program
import runs
from job import Job, State
from tqdm import tqdm

from flax_tied_lora import checkpoint, peft

BAR = "{percentage:3.0f}% |{bar}| step {n} of {total}, {remaining} left{postfix}"


def train(job: Job, state: State, until: int, go_on: str) -> bool:
    """Trains up to a step, or until the held-out loss falls no more; saves on the way.

    Args:
      job: what to do.
      state: is changed.
      until: the last step to take.
      go_on: the command that goes on with the run.

    Returns:
      Whether the run is to go on after it: False after Ctrl-C.

    Raises:
      FailedError: the loss is no number any more, or something cannot be written.
    """
    args = job.args
    order = corpus.order(len(job.rows), args.batch * args.accumulate, args.seed, state.step)
    bar = tqdm(total=args.steps, initial=state.step, disable=None, file=sys.stdout, bar_format=BAR)
    with (
        program.StopRequest(go_on) as stop,
        runs.failing(
            job.folder, job.adapter, checkpoint.CheckpointError, peft.AdapterFileError, OSError
        ),
        job.checkpoints() as manager,
        metrics.Metrics(args.output, state.step, args.log, vars(args)) as measured,
        bar,
    ):
        if state.step == 0:
            measured.write(0, held_out_loss=state.held_out[0][1])
        print("Compiling the training step.", flush=True)
        clock = Clock(state.step, args.steps)
        for numbers in order:
            clock.start(state.step)
            learning_rate = float(job.schedule(state.step))
            job.take_step(state, numbers)
            runs.check_loss(state.losses[-1], state.step, manager, job.folder, job.adapter)
            rate = len(numbers) * args.length / clock.seconds()
            measured.write(
                state.step, loss=state.losses[-1], learning_rate=learning_rate,
                tokens_per_second=round(rate, 1),
            )  # fmt: skip
            due = state.step % args.evaluate_every == 0 or state.step == args.steps
            if due:
                evaluate(job, state, manager, measured)
            last = stop.made or state.step == until or state.is_finished(args)
            line = f"loss {np.mean(state.losses[-10:]):.3f}, {rate:.0f} tokens/s"
            if state.held_out[1:]:
                line += f", held out {state.held_out[-1][1]:.3f}"
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            if bar.disable and (last or due):
                left = clock.left(state.step)
                print(f"step {state.step:4} of {args.steps}: {line}, {left} left", flush=True)
            if last or state.step % args.save_every == 0:
                job.check_adapted(manager, state, numbers)
                job.save(manager, state)
            if last:
                break
    if stop.made:
        print(f"Stopped, and saved step {state.step}.")
    elif state.is_finished(args) and state.step < args.steps:
        print(f"Stopped at step {state.step}: the held-out loss was lowest at step "
              f"{state.best[0]}, --patience {args.patience} evaluations ago.")  # fmt: skip
    return not stop.made


def evaluate(
    job: Job, state: State, manager: checkpoint.Manager, measured: metrics.Metrics
) -> None:
    """Measures the held-out loss, and keeps the adapter if it is the best one so far."""
    loss = job.held_out_loss(state.adapted)
    runs.check_loss(loss, state.step, manager, job.folder, job.adapter)
    state.held_out.append((state.step, loss))
    measured.write(state.step, held_out_loss=loss)
    if state.best[0] == state.step:
        job.save_adapter(state.adapted)


class Clock:
    """How long a step takes, and how long those that are left will.

    Args:
      step: the last one that is done.
      steps: how many there are.
    """

    def __init__(self, step: int, steps: int) -> None:
        self._steps, self._first, self._begun = steps, step + 1, 0.0

    def start(self, step: int) -> None:
        """Notes that a step begins, after so many."""
        self._started = time.perf_counter()
        if step == self._first:
            self._begun = self._started  # the one before has compiled

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def left(self, step: int) -> str:
        """Returns minutes and seconds, by all that was done since the first step."""
        each = self.seconds()
        if step > self._first:
            each = (time.perf_counter() - self._begun) / (step - self._first)
        minutes, seconds = divmod(round(each * (self._steps - step)), 60)
        return f"{minutes}:{seconds:02}"
