"""The functions and classes that `import hesstrace_cli` gives: the commands' own, for any loop."""

import warnings
from contextlib import suppress
from importlib import import_module

with warnings.catch_warnings(), suppress(ImportError):
    # PyTorch's forward mode imports it when it is first used, and then warns of itself.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    import_module("torch._decomp.decompositions_for_jvp")
