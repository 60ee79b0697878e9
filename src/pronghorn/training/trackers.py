"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

Each is written to where its package is installed and the job asks for it; where the package is missing, one sentence
says so and the run goes on. A tracker that fails while the run goes on is told once and left alone: nobody's training
stops because a dashboard does.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

PROJECT = "pronghorn"


class Tracker(Protocol):
    """What a tracker does with the numbers of one step."""

    def write(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Events through tensorboardX in the run's folder."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """https://docs.wandb.ai; its own environment variables say where to and who."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int):
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=run.name, dir=str(run), config=settings, resume="allow")

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """https://mlflow.org; MLFLOW_TRACKING_URI says where to, else a folder `mlruns`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=run.name)
        # MLflow refuses more than 6,000 characters in a value and 100 parameters at a time.
        texts = [(name, str(value)[:500]) for name, value in settings.items()]
        for start in range(0, len(texts), 100):
            mlflow.log_params(dict(texts[start : start + 100]))

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """https://github.com/gradio-app/trackio, a local dashboard."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int):
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=run.name, config=settings, resume="allow")

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()


_KINDS: dict[str, tuple[type, str]] = {
    "tensorboard": (_TensorBoard, "tensorboardX"),
    "wandb": (_WandB, "wandb"),
    "mlflow": (_MLflow, "mlflow"),
    "trackio": (_Trackio, "trackio"),
}
TRACKERS = tuple(_KINDS)


class Trackers:
    """All trackers of a run.

    Args:
      names: of `TRACKERS`.
      run: the run's folder; its name names the run.
      settings: flat, what a tracker shows as the run's configuration.
      first_step: what was written for later steps by an interrupted run is dropped (TensorBoard).
      say: told what is missing or fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        settings: dict[str, Any],
        *,
        first_step: int = 1,
        say: Callable[[str], None] = print,
    ):
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in names:
            kind, package = _KINDS[name]
            try:
                self._open[name] = kind(run, settings, first_step)
            except ImportError:
                say(
                    f"train.trackers: {package} is not installed, so nothing goes to {name}; pip install {package}."
                )
            except Exception as error:  # whatever a service may raise: not logged in, no network
                say(
                    f"train.trackers: {name} could not be started ({_first_line(error)}); training goes on without."
                )

    def write(self, record: dict[str, Any], prefix: str) -> None:
        """Every number of a record, as `prefix/name`, at `record["step"]`."""
        numbers = {
            f"{prefix}/{name}": float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name in tuple(self._open):
            try:
                self._open[name].write(numbers, record["step"])
            except Exception as error:
                self._say(f"train.trackers: {name} failed ({_first_line(error)}); training goes on without.")
                del self._open[name]

    def close(self) -> None:
        """End them all."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                self._say(f"train.trackers: {name} could not be ended ({_first_line(error)}).")
        self._open = {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
