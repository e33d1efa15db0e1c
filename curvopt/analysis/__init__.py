"""Analysis of a run: the doctor, spectra, drift, the forgetting law, recording and plots.

Importing it needs torch alone. `fit_forgetting_law` needs SciPy and the plots need matplotlib when they are called.
"""

from curvopt.analysis.aurac import aurac, plot_aurac
from curvopt.analysis.core import observe
from curvopt.analysis.doctor import doctor
from curvopt.analysis.drift import Drift, drift
from curvopt.analysis.findings import Finding, Report
from curvopt.analysis.forgetting import ForgettingFit, Law, fit_forgetting_law
from curvopt.analysis.plots import plot_forgetting, plot_frontier, plot_plan, plot_ranks, plot_spectra
from curvopt.analysis.recorder import Recorder
from curvopt.analysis.saved import inspect_saved
from curvopt.analysis.spectra import Spectrum, effective_rank, spectra

__all__ = [
    "Drift",
    "Finding",
    "ForgettingFit",
    "Law",
    "Recorder",
    "Report",
    "Spectrum",
    "aurac",
    "doctor",
    "drift",
    "effective_rank",
    "fit_forgetting_law",
    "inspect_saved",
    "observe",
    "plot_aurac",
    "plot_forgetting",
    "plot_frontier",
    "plot_plan",
    "plot_ranks",
    "plot_spectra",
    "spectra",
]
