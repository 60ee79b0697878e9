"""XLA's flags that compile a test's program for a CPU in half the time."""

import os

import jax

# One LLVM module a program: splitting it spreads work over cores, which other workers use here, and adds to it.
FLAGS = {
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
}
# MLIR emitters write loops that LLVM takes twice as long over: of 26 s of compilation at level 0 they cost 14.
EMITTERS = {"xla_cpu_use_fusion_emitters": "false"}


def set_flags() -> None:
    """Add the flags to XLA_FLAGS, in front of what is set there: XLA reads it when the first backend starts.

    Processes that a test starts inherit them, so that their programs are compiled alike. XLA ends a process that names
    a flag it does not know, so a jax that was not tried gets none: 0.11 has no flag for the emitters any more.
    """
    known = dict(FLAGS) if jax.__version_info__ < (0, 12) else {}
    known |= EMITTERS if jax.__version_info__ < (0, 11) else {}
    ours = [f"--{name}={value}" for name, value in known.items()]
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([flag for flag in ours if flag not in given] + given)
