"""fasttrain: train hundreds of small neural networks at once and map EMC scaling curves.

EMC (Effective Model Complexity) is the largest number of samples that a model and its training procedure fit to
100 % (Nakkiran et al. 2019; arXiv 2406.11463). The whole public surface is what this module exports.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# The same bits for a model whatever trains beside it need MKL's strict reproducibility mode, which MKL reads once,
# at its first call; a value that the user has set wins (docs/decisions/0002-bitwise-on-cpu.md).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from fasttrain.analysis import Results, load
    from fasttrain.claims import Verdict, study
    from fasttrain.comparison import Comparison, compare
    from fasttrain.doctor import diagnose
    from fasttrain.errors import UserError
    from fasttrain.estimators import estimates
    from fasttrain.exporting import export
    from fasttrain.extending import extend
    from fasttrain.measured import variants
    from fasttrain.merging import merge
    from fasttrain.plots import plot
    from fasttrain.prepare import Preview, preview
    from fasttrain.records import Curvature, Outcome, Terminated
    from fasttrain.repeat import Rerun, rerun
    from fasttrain.reporting import report
    from fasttrain.run import Progress, resume, scan
    from fasttrain.scaling import Scaling, fit_scaling
    from fasttrain.spec import ScanSpec, Variant

__version__ = "0.1.0"

# Imported on first use: `import fasttrain` costs milliseconds, torch and pandas cost seconds.
_EXPORTS = {
    "Comparison": "fasttrain.comparison",
    "Curvature": "fasttrain.records",
    "Outcome": "fasttrain.records",
    "Preview": "fasttrain.prepare",
    "Progress": "fasttrain.run",
    "Rerun": "fasttrain.repeat",
    "Results": "fasttrain.analysis",
    "Scaling": "fasttrain.scaling",
    "ScanSpec": "fasttrain.spec",
    "Terminated": "fasttrain.records",
    "UserError": "fasttrain.errors",
    "Variant": "fasttrain.spec",
    "Verdict": "fasttrain.claims",
    "compare": "fasttrain.comparison",
    "diagnose": "fasttrain.doctor",
    "estimates": "fasttrain.estimators",
    "export": "fasttrain.exporting",
    "extend": "fasttrain.extending",
    "fit_scaling": "fasttrain.scaling",
    "load": "fasttrain.analysis",
    "merge": "fasttrain.merging",
    "plot": "fasttrain.plots",
    "preview": "fasttrain.prepare",
    "report": "fasttrain.reporting",
    "rerun": "fasttrain.repeat",
    "resume": "fasttrain.run",
    "scan": "fasttrain.run",
    "study": "fasttrain.claims",
    "variants": "fasttrain.measured",
}
__all__ = [
    "Comparison",
    "Curvature",
    "Outcome",
    "Preview",
    "Progress",
    "Rerun",
    "Results",
    "Scaling",
    "ScanSpec",
    "Terminated",
    "UserError",
    "Variant",
    "Verdict",
    "compare",
    "diagnose",
    "estimates",
    "export",
    "extend",
    "fit_scaling",
    "load",
    "merge",
    "plot",
    "preview",
    "report",
    "rerun",
    "resume",
    "scan",
    "study",
    "variants",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
