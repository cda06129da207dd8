"""What a person sees of a run: lines while it goes, the log, the picture, and what to do next."""

from pathlib import Path

from fira.metrics.console import ConsoleProgress
from fira.metrics.csv_log import LOG_NAME, Row, TrainingLog
from fira.metrics.run_plots import plot_files
from fira.models.family import Recipe
from fira.training import run_folder
from fira.training.config import TrainConfig
from fira.training.setup import Run
from fira.training.trainer import StepResult


class RunReport:
    """One rank's, for all: keeps the run folder. done: the last step of an earlier run."""

    def __init__(self, config: TrainConfig, out: Path, run: Run, done: int, recipe: Recipe) -> None:
        run_folder.describe(out, config, run.corpus.summary)
        print(run.heading, flush=True)
        if done:
            print(f"resumed after step {done} in {out}", flush=True)
        self.out, self.run, self.steps = out, run, recipe.steps
        self.log = TrainingLog(out / LOG_NAME, done)
        self.tokens = recipe.batch_size * run.trainer.model.config.seq_len
        self.progress = ConsoleProgress(recipe.steps, done + 1, self.tokens)
        self.last: Row | None = None

    def step(self, step: int, result: StepResult, lr: float, seconds: float, val_loss: float | None) -> None:
        """Log a step that took `seconds`, without its validation."""
        speed = self.tokens / seconds
        self.last = Row(
            iter=step,
            train_loss=result.loss,
            val_loss=val_loss,
            lr=lr,
            mfu=speed * self.run.flops_per_token / self.run.peak,
            tokens_per_s=speed,
            grad_norm=result.grad_norm,
            aux_loss=result.aux_loss,
            expert_load=result.expert_load,
            bubble=result.bubble,
            dropped=result.dropped,
            expert_dropped=result.expert_dropped if result.dropped else (),
            layer_entropy=[[entropy] for entropy in result.router_entropy],
        )
        self.log.write(self.last)
        self.progress.update(self.last)

    def finish(self, before: float) -> None:
        """Draw the picture and say what was reached. before: the validation loss at the start."""
        self.log.close()
        if self.last is None:
            print(f"nothing to do: {self.out} is at step {self.steps} already; raise --steps to go on")
            return
        summary = self.run.corpus.summary
        baselines = [f"{name} {summary[name]:.3f}" for name in ("unigram", "trigram") if summary.get(name) is not None]
        others = f" ({' and '.join(baselines)} on the same tokens)" if baselines else ""
        print(f"validation loss {before:.3f} → {self.last.val_loss:.3f}{others}")
        print(f"picture: {plot_files([self.out])}")
        if self.last.iter < self.steps:
            print(f"stopped by a signal after step {self.last.iter}; the same command with --resume auto continues")
        tokenizer = "" if self.run.tokenizer else " --tokenizer TOKENIZER.json"  # shards of token ids came without one
        print(f'next: python scripts/generate.py --checkpoint {self.out}{tokenizer} --prompt "def "', flush=True)
